"""The report of a run: one page that needs nothing else, made from what is stored."""

import base64
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.frame.drawing import band_names
from experiments.frame.store import RunFolder, StoreError
from experiments.studies.compare.figures import FIGURES

NOTHING = "–"
SAMPLERS = {"ddim": "DDIM", "ancestral": "ancestral"}


def write_report(run: RunFolder) -> Path:
    """Writes ``report.html`` of a run, whose figures `save_figures` has drawn, and returns its path.

    Raises:
      StoreError: something that the report needs is not stored.
    """
    analysis = run.load("analysis")
    figures = {name: embedded(run.path / "figures" / f"{name}.svg") for name in FIGURES}
    couplings = coupling_rows(analysis)
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parents[2] / "frame" / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        run=run_facts(run.manifest, analysis),
        bands={end: band_names(analysis)[analysis.attrs[f"{end}_band"]] for end in ("low", "high")},
        claims=[claim_entry(claim) for claim in run.read_json("claims.json")["claims"]],
        couplings=couplings,
        weak=any(cell["weak"] for row in couplings for cell in row),
        band_rows=band_rows(analysis),
        calibration=calibration(analysis),
        limits=limits(analysis),
        facts=facts(run.manifest),
        figures=figures,
        preview=run.load("pictures").attrs.get("preview", "pixels"),
    )
    path = run.path / "report.html"
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def number(value: float | None, digits: int = 2) -> str:
    """`value` with that many decimals and a proper minus sign; a dash for None, NaN and infinities."""
    if value is None or not np.isfinite(value):
        return NOTHING
    text = f"{value:.{digits}f}"
    return (text if float(text) else f"{0:.{digits}f}").replace("-", "−")


def interval(bounds: Sequence[float | None] | None, digits: int = 2) -> str:
    """``[low, high]``; a dash where there is none."""
    if bounds is None or any(number(bound) == NOTHING for bound in bounds):
        return NOTHING
    return "[" + ", ".join(number(bound, digits) for bound in bounds) + "]"


def duration(seconds: float) -> str:
    """Seconds in words: ``12 s``, ``4 min 05 s``, ``2 h 03 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def run_facts(manifest: Mapping, analysis: xr.Dataset) -> dict[str, Any]:
    """What was run, in words."""
    attrs, model = analysis.attrs, manifest.get("model") or {}
    about = ""
    if model:
        about = (
            f" ({model['depth']} layers of width {model['hidden_size']}, patch {model['patch_size']}, "
            f"{model['input_size']} × {model['input_size']} × {model['in_channels']}, {attrs['prediction']}-prediction)"
        )
    timings = [f"{name.removesuffix('_s').replace('_', ' ')} {duration(t)}" for name, t in manifest["timings"].items()]
    return {
        **{name: attrs[name] for name in ("model", "pairs", "steps", "gate", "seed", "gain_pairs", "untrained_pairs")},
        "draws": attrs["draws"],
        "guidance": f"{attrs['guidance']:g}",
        "sampler": SAMPLERS.get(attrs["sampler"], attrs["sampler"]),
        "about_model": about,
        "couplings": ", ".join(f"{g:.4g}" for g in analysis.coupling.values),
        "status": manifest["status"],
        "command": manifest["command"],
        "started": f"{datetime.fromisoformat(manifest['started']):%Y-%m-%d %H:%M} UTC",
        "took": ", ".join(timings) or "no timings",
        "device": f"{manifest['device']} ({manifest['platform']})",
    }


def claim_entry(claim: Mapping) -> dict[str, Any]:
    """A stored claim as the page shows it; ``also`` names the controls on which it holds too."""
    verdict = claim["verdict"]
    controls = [
        {
            "name": control["name"],
            "value": number(control["value"]),
            "interval": interval(control["interval"]),
            "also": {True: "yes", False: "no"}.get(control["also_holds"], NOTHING),
            "statement": control["statement"],
        }
        for control in claim["controls"]
    ]
    return {
        **{name: claim[name] for name in ("id", "title", "measure", "statement")},
        "verdict": f"{verdict} here" if verdict == "not tested" else verdict,
        "slug": verdict.replace(" ", "-"),
        "tested": verdict != "not tested",
        "value": number(claim["value"]),
        "interval": interval(claim["interval"]),
        "controls": controls,
        "also": [control["name"] for control in controls if control["also"] == "yes"],
    }


def coupling_rows(analysis: xr.Dataset) -> list[list[dict]]:
    """The table over couplings: g, tau low and high, F low and high, the gap three ways and the untrained one."""
    network = analysis.sel(source="network")
    ends = [analysis.attrs["low_band"], analysis.attrs["high_band"]]
    rows = []
    for c, g in enumerate(analysis.coupling.values):
        at, here = network.isel(coupling=c), analysis.isel(coupling=c)
        row = [_cell(f"{g:.4g}")]
        for band in ends:
            row.append(_estimate(at.isel(band=band), "tau", 2, weak=bool(at.weak[band])))
        row += [_estimate(at.isel(band=band), "decided", 3) for band in ends]
        row += [_estimate(at, "gap", 2), _estimate(at, "gap_steps", 1)]
        row += [_estimate(here.sel(source=source), "gap", 2) for source in ("measured gain", "ideal gain", "untrained")]
        rows.append(row)
    return rows


def band_rows(analysis: xr.Dataset) -> list[list[dict]]:
    """The table over bands at zero coupling."""
    network = analysis.sel(source="network").isel(coupling=0)
    recursion = analysis.sel(source="measured gain").isel(coupling=0)
    return [
        [
            _cell(name),
            _cell(str(int(analysis["count"][band]))),
            _estimate(network.isel(band=band), "tau", 2),
            _cell(number(network.tau_steps[band].item(), 1)),
            _estimate(recursion.isel(band=band), "tau", 2),
            _cell(number(network.projection_level[band].item())),
            _cell(number(network.floor[band].item(), 3)),
        ]
        for band, name in enumerate(band_names(analysis))
    ]


def calibration(analysis: xr.Dataset) -> dict[str, str]:
    """Largest deviation of the exact denoiser's measurements from its theory."""
    measured, theory = (analysis.sel(source=source) for source in ("wiener", "wiener theory"))
    return {name: number(float(np.abs(measured[name] - theory[name]).max()), 4) for name in ("gap", "tau", "decided")}


def limits(analysis: xr.Dataset) -> dict[str, Any]:
    """Noise floors and the bands of which too little is decided."""
    names, limit = band_names(analysis), analysis.attrs["floor_limit"]
    floor = analysis.floor.sel(source="network").values
    weak = analysis.weak.sel(source="network").values
    return {
        "floor": number(float(np.nanmax(floor, initial=0.0)), 3),
        "floor_limit": f"{limit:g}",
        "noisy": [names[band] for band in np.flatnonzero(floor > limit)],
        "weak": [
            f"{', '.join(names[band] for band in np.flatnonzero(row))} at g = {g:.4g}"
            for g, row in zip(analysis.coupling.values, weak, strict=True)
            if row.any()
        ],
        "start": number(analysis.attrs["ell_start"], 1),
    }


def facts(manifest: Mapping) -> list[tuple[str, str]]:
    """Settings and provenance, one per line."""
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    lines = [(name.replace("_", " "), _plain(value)) for name, value in manifest["settings"].items()]
    lines += [("weights digest", manifest["weights_digest"])] if "weights_digest" in manifest else []
    lines += [
        ("git revision", manifest["git_revision"] or NOTHING),
        ("Python", manifest["python"]),
        ("packages", versions),
        ("device", f"{manifest['device']} ({manifest['platform']})"),
        ("started, finished", f"{manifest['started']}, {manifest['finished'] or NOTHING}"),
    ]
    for again in manifest["resumed"]:
        lines.append(("resumed", "; ".join([again["at"], *again["changed"]])))
    return lines


def embedded(path: Path) -> str:
    """An SVG file as a data URL.

    Raises:
      StoreError: it cannot be read.
    """
    try:
        return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error}); draw the figures again with `syncgap report`") from error


def _cell(value: str, bounds: str = "", weak: bool = False) -> dict[str, Any]:
    return {"value": value, "interval": "" if bounds == NOTHING else bounds, "weak": weak}


def _estimate(at: xr.Dataset, name: str, digits: int, weak: bool = False) -> dict[str, Any]:
    return _cell(number(at[name].item(), digits), interval(at[f"{name}_interval"].values.tolist(), digits), weak)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
