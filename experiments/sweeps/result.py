"""The result of a sweep: one dataset with the axes of the plan as dimensions, made of the cells' runs.

It is stored beside the cells as ``result.zarr``, written whole, with consolidated metadata. Its attribute ``manifest``
names for every cell what it was made of, so that a stored result that no longer fits its cells is recognised.
"""

import hashlib
import json
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from dit_jax.disk import recover, replacing
from dit_jax.lock import is_held
from experiments.frame.chunks import ARRAYS, with_strings, write_group
from experiments.frame.manifest import DIGESTS
from experiments.frame.page import claims_of
from experiments.frame.store import RunFolder
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.joining import MOST, Joined, one_type
from experiments.sweeps.plan import POINT, Cell

NAME = "result.zarr"
MANIFEST = "manifest"
ONE_CHUNK = 2**24  # bytes; smaller arrays are one chunk
BOUNDS = ("estimate", "low", "high")
ABOUT: Mapping[str, dict[str, str]] = {  # meaning and units of what is not the study's own
    "claim": {"long_name": "statement about a run"},
    "claim_id": {"long_name": "number of the paper's claim, 0 for one of our own", "units": "1"},
    "claim_measure": {"long_name": "what the value of a claim is, with units"},
    "claim_level": {"long_name": "level of the interval of a claim", "units": "1"},
    "claim_value": {"long_name": "value of a claim and the ends of its interval, in the units of claim_measure"},
    "verdict": {"long_name": "verdict on a claim"},
    "bound": {"long_name": "estimate, and the ends of its interval", "units": "1"},
    "cell": {"long_name": "name of the cell"},
    "run": {"long_name": "folder of the cell's run, from that of the sweep"},
    "status": {"long_name": "complete, failed or missing"},
    "error": {"long_name": "why the cell failed"},
    "measuring_seconds": {"long_name": "time that measuring took", "units": "s"},
    "analysis_seconds": {"long_name": "time that analysis and page took", "units": "s"},
    POINT: {"long_name": "number of the listed combination of settings", "units": "1"},
}


def open_sweep(path: str | Path, *, chunks: Any = None) -> xr.Dataset:
    """The result of a sweep: ``open_sweep("runs/guidance").gap.sel(source="network", coupling=0)``.

    The axes of the plan are the first dimensions. ``claim_value`` has the value of every claim with its interval, along
    ``bound``, and ``verdict`` what follows from it; the other estimates are those of the cells' analyses, each beside
    its ``_interval``, which begins with it. The stored
    result is opened, its values are read when they are needed. Where there is none, or where cells have changed since,
    the result is collected from the cells in memory.

    `to_dataframe` of a dataset has a row for every combination of labels of all its dimensions; take the variables that
    you need first: ``open_sweep(path)[["claim_value", "verdict"]].to_dataframe()``.

    Args:
      chunks: as `xarray.open_zarr` takes them, for arrays of dask, which must be installed.

    Raises:
      StoreError: there is no sweep.
      ValueError: `chunks` without dask.
    """
    if chunks is not None and find_spec("dask") is None:
        raise ValueError("chunks needs dask, which is not installed; without chunks values are read lazily, too")
    sweep = SweepFolder.open(path)
    stored = _stored(sweep, chunks)
    if stored is not None:
        return stored
    found = collect(sweep)
    return found if chunks is None else found.chunk(chunks)


def write_result(sweep: SweepFolder) -> Path:
    """Writes ``result.zarr`` of a sweep, in place of an earlier one, and returns its path. Whoever calls it holds that
    path (`dit_jax.lock`), so that two processes do not write it at once.

    Raises:
      CheckpointError: the disk refuses.
    """
    target = sweep.path / NAME
    with replacing(target) as partial:
        made_of = sources(sweep)  # before the cells are read: what changes meanwhile counts as changed
        found = collect(sweep)
        unread = found.cell.values[(found.status == "failed").values]
        for name in unread[[made_of[name].startswith("complete") for name in unread]]:
            made_of[name] = "unreadable"  # so that a result without it never counts as up to date
        found = found.assign_attrs({MANIFEST: json.dumps({"plan": _plan_digest(sweep), "cells": made_of})})
        whole = [name for name, v in found.variables.items() if v.ndim > 0 and v.nbytes <= ONE_CHUNK]
        chunks = {str(name): {"chunks": tuple(max(n, 1) for n in found[name].shape)} for name in whole}
        write_group(found, partial, chunks, mode="w")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # zarr warns that version 3 of its format does not have this yet
            zarr.consolidate_metadata(partial)
    return target


def collect(sweep: SweepFolder, *, most: int = MOST) -> xr.Dataset:
    """The result of a sweep, in memory, from the cells' runs; every checksum is verified.

    A cell that failed, is missing or cannot be read is NaN, with its error.

    Args:
      most: bytes of all estimates together. The largest variables are left out beyond; the attribute ``left_out``
        names them.
    """
    plan, cells = sweep.plan, sweep.cells
    axes = _axes(sweep)
    shape = tuple(len(axes[dim]) for dim in plan.dims)
    own = {name: np.full(shape, "", object) for name in ("cell", "run", "status", "error")}
    own |= {name: np.full(shape, np.nan, object) for name in ("measuring_seconds", "analysis_seconds")}
    joined = Joined(plan.dims, shape, most)
    joined.declare(_claims([]))
    taken = {*ABOUT, *axes, *(name for point in plan.points for name in point)}
    for place, cell in zip(np.ndindex(*shape), cells, strict=True):
        entries: dict[str, Any] = {"cell": cell.name, "run": f"cells/{cell.name}", "status": "missing"}
        failure = sweep.failure(cell)
        if failure is not None:
            entries |= {"status": "failed", "error": failure.error}
        elif sweep.is_complete(cell):
            try:
                parts, timings = _read(sweep.run(cell), taken)
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:  # a StoreError is a ValueError
                entries |= {"status": "failed", "error": " ".join(str(error).split())}
            else:
                for part in parts:
                    joined.add(place, part)
                times = {name: timings.get(f"{name}_s", np.nan) for name in ("measuring", "analysis")}
                entries |= {"status": "complete", **{f"{name}_seconds": value for name, value in times.items()}}
        for name, value in entries.items():
            own[name][place] = value
    found = joined.dataset()
    dtypes = {name: float if name.endswith("_seconds") else str for name in own}
    found = found.assign({name: (plan.dims, values.astype(dtypes[name])) for name, values in own.items()})
    found = found.assign_coords(_coordinates(sweep, axes))
    for name, about in ABOUT.items():
        if name in found.variables:
            found[name].attrs = dict(about)
    return found.assign_attrs(_attributes(sweep, found, joined.left_out))


def sources(sweep: SweepFolder) -> dict[str, str]:
    """Of what every cell's part of a result is made, by its name: ``complete`` with the digests of its analysis and of
    its claims, ``failed`` with that of its error, or ``missing``."""
    found = {}
    for cell in sweep.cells:
        failure = sweep.failure(cell)
        found[cell.name] = "missing" if failure is None else f"failed {_digest(failure.error.encode())}"
        if failure is None and sweep.is_complete(cell):
            analysis, claims = "", b""
            with suppress(OSError, ValueError, KeyError, AttributeError):
                manifest = json.loads((sweep.run(cell) / "manifest.json").read_text("utf-8"))
                analysis = " ".join(manifest[DIGESTS].get("analysis", {}).values())
            with suppress(OSError):
                claims = (sweep.run(cell) / "claims.json").read_bytes()
            found[cell.name] = f"complete {analysis} {_digest(claims)}"
    return found


def _stored(sweep: SweepFolder, chunks: Any) -> xr.Dataset | None:
    """The stored result, if it can be read and is that of the cells as they are now."""
    target = sweep.path / NAME
    if not is_held(target):  # by a process that is replacing it
        with suppress(OSError):
            recover(target)
    try:
        found = xr.open_zarr(target, chunks=chunks, consolidated=True, decode_times=False)
        made_of = json.loads(found.attrs.pop(MANIFEST))
        lost = set(found.attrs.pop(ARRAYS)) - set(map(str, found.variables))
        if lost or made_of != {"plan": _plan_digest(sweep), "cells": sources(sweep)}:
            return None
        return with_strings(found, "T", lambda values: np.array(values.tolist(), str).reshape(values.shape))
    except MemoryError:
        raise
    except Exception:  # zarr raises many kinds for a damaged store
        return None


def _read(path: Path, taken: set[str]) -> tuple[list[xr.Dataset], Mapping[str, float]]:
    """A cell's claims and analysis, and the timings of its run. Names of the analysis that the result needs itself get
    a prefix."""
    run = RunFolder.open(path)
    found = [_claims(claims_of(run))]
    if run.holds("analysis"):
        analysis = run.load("analysis")
        analysis = analysis.drop_vars([name for name, v in analysis.data_vars.items() if v.dtype.kind not in "fiub"])
        if "bound" in analysis.coords and set(analysis.bound.values.tolist()) <= set(BOUNDS):
            taken, analysis = taken - {"bound"}, _with_estimates(analysis)
        names = {*map(str, analysis.variables), *map(str, analysis.dims)} & taken
        found.append(analysis.rename({name: f"analysis_{name}" for name in names}))
    return found, run.manifest["timings"]


def _with_estimates(analysis: xr.Dataset) -> xr.Dataset:
    """Intervals of an analysis beside those of claims, whose bounds begin with the estimate."""
    if "estimate" in analysis.bound.values:
        return analysis
    found = analysis.reindex(bound=list(BOUNDS))
    for name in map(str, analysis.data_vars):
        interval = f"{name}_interval"
        if interval in found and {*found[interval].dims} == {*found[name].dims, "bound"}:
            filled = found[interval].where(found.bound != "estimate", found[name])
            found[interval] = filled.transpose(*found[interval].dims).assign_attrs(found[interval].attrs)
    return found


def _claims(claims: list[dict[str, Any]]) -> xr.Dataset:
    """Stored claims as arrays over their titles."""
    titles, seen = [], dict[str, int]()
    for claim in claims:
        seen[claim["title"]] = count = seen.get(claim["title"], 0) + 1
        titles.append(claim["title"] + (f" ({count})" if count > 1 else ""))
    values = [[claim["value"], *(claim["interval"] or [None, None])] for claim in claims]
    levels = [claim.get("level", 0.95) for claim in claims]  # older runs store none
    return xr.Dataset(
        {
            "claim_value": (("claim", "bound"), np.array(values, float).reshape(-1, 3)),
            "verdict": ("claim", np.array([claim["verdict"] for claim in claims], object)),
        },
        {
            "claim": np.array(titles, str),
            "bound": list(BOUNDS),
            "claim_id": ("claim", np.array([claim["id"] for claim in claims], int)),
            "claim_measure": ("claim", np.array([claim["measure"] for claim in claims], object)),
            "claim_level": ("claim", np.array(levels, float)),
        },
    )


def _axes(sweep: SweepFolder) -> dict[str, np.ndarray]:
    """Values along every axis, by its name."""
    found: dict[str, np.ndarray] = {}
    if sweep.plan.points:
        found[POINT] = np.arange(len(sweep.plan.points))
    for dim in sweep.plan.axes:
        places = dict.fromkeys(cell.place[dim] for cell in sweep.cells)
        found[dim] = one_type(list(places))
    return found


def _coordinates(sweep: SweepFolder, axes: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The axes as coordinates, and along the listed points what they set."""
    found: dict[str, Any] = {dim: (dim, values, {"long_name": _words(dim)}) for dim, values in axes.items()}
    if sweep.plan.points:
        each = list(_first_of_points(sweep))
        for name in dict.fromkeys(name for point in sweep.plan.points for name in point):
            values = [cell.place.get(name) for cell in each]
            numbers = all(value is None or isinstance(value, int | float) for value in values)
            there = [(np.nan if numbers else "") if value is None else value for value in values]
            found[name] = (POINT, one_type(there), {"long_name": _words(name)})
    return found


def _first_of_points(sweep: SweepFolder) -> Iterator[Cell]:
    """A cell of every point."""
    step = len(sweep.cells) // len(sweep.plan.points)
    yield from sweep.cells[::step]


def _attributes(sweep: SweepFolder, found: xr.Dataset, left_out: Mapping[str, str]) -> dict[str, Any]:
    plan, count = sweep.plan, {name: int((found.status == name).sum()) for name in ("complete", "failed", "missing")}
    varied = {*plan.axes, *(name for point in plan.points for name in point)}
    fixed = {name: value for name, value in asdict(sweep.cells[0].settings).items() if name not in varied}
    return {
        "study": plan.study,
        "title": plan.title,
        "question": plan.question,
        "settings": json.dumps(fixed, default=str),
        "versions": json.dumps(sweep.entries.get("versions", {})),
        "completeness": f"{count['complete']} of {len(sweep.cells)} cells",
        **count,
        "left_out": json.dumps(dict(left_out)),
    }


def _plan_digest(sweep: SweepFolder) -> str:
    return _digest(json.dumps(sweep.plan.to_dict(), sort_keys=True, default=str).encode())


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _words(name: str) -> str:
    return name.replace("_", " ")
