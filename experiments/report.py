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
from markupsafe import Markup

from experiments.figures import FIGURES, band_names
from experiments.store import RunFolder, StoreError

NOTHING = "–"
SAMPLERS = {"ddim": "DDIM", "ancestral": "ancestral"}
CAPTIONS = {
    "gap": "The synchronization gap against the coupling. Blue: the network, with 95 % intervals. Orange: the exact recursion "
    "under the network's measured one-pass gain, nothing fitted. Dotted: the recursion under the ideal gain; it ends where "
    "nothing individual is left. Grey: the untrained network.",
    "commitment": "When each band commits. Points: the network with its intervals; open points rest on too little. Lines: the "
    "recursion under the measured and the ideal gain.",
    "decided": "How much of each band the replicas still decide individually, against the coupling.",
    "relative_energy": "The energy of the replicas' difference along the trajectory, relative to the end of the uncoupled run. "
    "Solid: network. Dashed: recursion under the measured gain. Shaded: before the window that the estimator looks at.",
    "gain": "What one pass through the network leaves of a difference between the replicas, band by band. In the ideal model "
    "all curves lie on the dotted line.",
    "pictures": "Replicas A and B of several pairs, without coupling and with the strongest. The noise is the same in both "
    "rows of pairs.",
    "noise_floor": "The part of the relative energy at the start of the window that is error rather than decision.",
    "calibration": "The instrument on a system whose answer is known: an exact denoiser run through the same pipeline (points) "
    "against its own theory (lines), and the difference.",
}


def write_report(run: RunFolder) -> Path:
    """Writes ``report.html`` of a run, whose figures `save_figures` has drawn, and returns its path.

    Raises:
      StoreError: something that the report needs is not stored.
    """
    analysis = run.load("analysis")
    preview = run.load("pictures").attrs.get("preview", "pixels")
    figures = {name: _figure(run, name, preview) for name in FIGURES}
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html").render(
        run=run_facts(run.manifest, analysis),
        bands={end: band_names(analysis)[analysis.attrs[f"{end}_band"]] for end in ("low", "high")},
        claims=[claim_entry(claim) for claim in run.read_json("claims.json")["claims"]],
        couplings=coupling_rows(analysis),
        band_rows=band_rows(analysis),
        calibration=calibration(analysis),
        limits=limits(analysis),
        facts=facts(run.manifest),
        figure=figures.__getitem__,
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
            f" ({model['depth']} layers of width {model['hidden_size']}, {model['input_size']} × {model['input_size']} × "
            f"{model['in_channels']}, patch {model['patch_size']}, {attrs['prediction']}-prediction)"
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


def limits(analysis: xr.Dataset) -> list[str]:
    """What a reader must know before leaning on the numbers."""
    names, attrs = band_names(analysis), analysis.attrs
    floor = analysis.floor.sel(source="network").values
    above = [names[band] for band in np.flatnonzero(floor > attrs["floor_limit"])]
    weak = analysis.weak.sel(source="network").values
    few = [
        f"{', '.join(names[band] for band in np.flatnonzero(row))} at g = {g:.4g}"
        for g, row in zip(analysis.coupling.values, weak, strict=True)
        if row.any()
    ]
    return [
        f"Intervals come from {attrs['pairs']} pairs and are slightly short: in trials with 64 to 128 pairs nominal 95 % "
        "intervals covered 90 to 95 %, fewer pairs less. They speak for this network, this sampler and these classes, not "
        "for a network trained again.",
        f"The noise floor is {number(float(np.nanmax(floor, initial=0.0)), 3)} at most. "
        + (
            f"It is above {attrs['floor_limit']:g} in {', '.join(above)}, whose commitment level it pulls down."
            if above
            else f"No band is above {attrs['floor_limit']:g}."
        ),
        f"The estimator looks at ℓ ≥ {number(attrs['ell_start'], 1)} only; earlier, errors of the network would be taken for "
        "decisions.",
        f"Too little is decided to rely on τ (†) in: {'; '.join(few)}."
        if few
        else "In every band and at every coupling enough is decided for τ to be relied on.",
        "The theory takes the network as linear and every band as one Gaussian mode. Data that are not Gaussian commit "
        "at that level or earlier, so that the two agree is a finding, not a matter of course.",
        f"In sampler steps the gap depends on the number of steps ({attrs['steps']} here) and on their spacing; compare runs in "
        "nats.",
        "The two replicas have the same class and independent noise. Where in the network's depth a band commits is not "
        "looked at.",
    ]


def facts(manifest: Mapping) -> list[tuple[str, str]]:
    """Settings and provenance, one per line."""
    settings = {name: value for name, value in manifest["settings"].items()}
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    lines = [(name.replace("_", " "), _plain(value)) for name, value in settings.items()]
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


def _figure(run: RunFolder, name: str, preview: str) -> Markup:
    path = run.path / "figures" / f"{name}.svg"
    try:
        source = base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error}); draw the figures again with `syncgap report`") from error
    caption = CAPTIONS[name]
    if name == "pictures" and preview != "pixels":
        caption += f" Shown: {preview}."
    return Markup(
        '<figure id="{0}"><img alt="{1}" src="data:image/svg+xml;base64,{2}"><figcaption>{1}</figcaption></figure>'
    ).format(f"figure-{name}", caption, source)


def _cell(value: str, bounds: str = "", weak: bool = False) -> dict[str, Any]:
    return {"value": value, "interval": "" if bounds == NOTHING else bounds, "weak": weak}


def _estimate(at: xr.Dataset, name: str, digits: int, weak: bool = False) -> dict[str, Any]:
    return _cell(number(at[name].item(), digits), interval(at[f"{name}_interval"].values, digits), weak)


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
