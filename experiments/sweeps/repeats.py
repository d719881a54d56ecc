"""Repeats among the cells of a sweep: seeds of the noise, and networks trained again from another seed."""

import json
import re
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import xarray as xr
from scipy import stats

from experiments.frame.page import NOTHING, Table, interval, number
from experiments.frame.trainings import over_networks
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.layout import Layout, level_of, named, spelled, tested

_NUMBERED = re.compile(r"(.*\D)\d+")  # name of a network that was trained several times: what it is, and a number
MOST_ROWS = 400


class Repeats(NamedTuple):
    """An axis along which cells are repeats of each other, all or in groups.

    Attributes:
      axis: its name.
      groups: networks that are repeats of each other (nothing for seeds), and their indices along the axis.
      what: seeds or trainings.
    """

    axis: str
    groups: list[tuple[str, list[int]]]
    what: str


def repeats_of(sweep: SweepFolder, result: xr.Dataset) -> Repeats | None:
    """The axis of repeats of a sweep: ``seed``, or ``weights`` whose names differ in a number at their end while the
    networks have the same form; None if there is none."""
    sizes = {dim: result.sizes[dim] for dim in sweep.plan.dims}
    if sizes.get("seed", 1) > 1:
        return Repeats("seed", [("", list(range(sizes["seed"])))], "seeds")
    if sizes.get("weights", 1) > 1:
        groups: dict[tuple[str, str], list[int]] = {}
        for place, name in enumerate(result.weights.values.tolist()):
            numbered = _NUMBERED.fullmatch(str(name))
            form = _form(sweep, name)
            key = (numbered[1].rstrip("-_"), form) if numbered and form else (str(name), str(place))
            groups.setdefault(key, []).append(place)
        if any(len(members) > 1 for members in groups.values()):
            names = result.weights.values.astype(str)
            return Repeats("weights", [(", ".join(names[each]), each) for each in groups.values()], "trainings")
    return None


def _form(sweep: SweepFolder, weights: str | float) -> str:
    """The configuration of a network as text, from a run of it; empty where there is none."""
    for cell in sweep.cells:
        if cell.place["weights"] == weights:
            with suppress(OSError, ValueError, KeyError, TypeError):
                model = json.loads((sweep.run(cell) / "manifest.json").read_text("utf-8"))["model"]
                return json.dumps({name: value for name, value in model.items() if name != "dtype"}, sort_keys=True)
    return ""


def over_repeats(values: np.ndarray, level: float) -> np.ndarray:
    """Mean of repeats with its interval over them by Student's t, (..., 3) of values (..., R); no interval for fewer
    than three that are known, NaN for none."""
    flat = values.reshape(-1, values.shape[-1])
    found = np.full((len(flat), 3), np.nan)
    for row, each in zip(found, flat, strict=True):
        known = each[np.isfinite(each)]
        if known.size:
            row[:] = known.mean(), *over_networks(known, level)
    return found.reshape(*values.shape[:-1], 3)


def repeats_table(result: xr.Dataset, layout: Layout, repeats: Repeats) -> Table:
    """How every claim's value varies between repeats, beside how it varies over pairs."""
    others = [dim for dim in layout.dims if dim != repeats.axis]
    shape = [result.sizes[dim] for dim in others]
    rows = []
    for claim in tested(result):
        values = result.claim_value.isel(claim=claim).transpose(*others, repeats.axis, "bound").values
        level = level_of(result, claim)
        for place in np.ndindex(*shape):
            for name, members in repeats.groups:
                each = values[place][members]
                each = each[np.isfinite(each[:, 0])]
                if len(members) < 2 or not len(each):
                    continue
                where = [spelled(result, dim, index) for dim, index in zip(others, place, strict=True)]
                group = [name] if repeats.axis == "weights" else []
                mean, *ends = over_repeats(each[:, 0], level)
                pairs = (each[:, 2] - each[:, 1]).mean() / (2 * stats.norm.ppf((1 + level) / 2))
                rows.append(
                    [
                        str(result.claim.values[claim]),
                        *where,
                        *group,
                        str(len(each)),
                        number(mean),
                        interval(ends),
                        number(float(each[:, 0].std(ddof=1))) if len(each) > 1 else NOTHING,
                        number(float(pairs)),
                    ]
                )
    places = [*map(named, others), *(["networks"] if repeats.axis == "weights" else [])]
    head = ["claim", *places, repeats.what, "mean", f"interval over {repeats.what}"]
    head += [f"spread over {repeats.what}", "spread over pairs"]
    note = (
        "Spreads are standard deviations, that over pairs from the mean width of the cells' own intervals. The "
        f"interval over {repeats.what} is that of the mean, by Student's t at the level of the claim, and needs three."
    )
    if len(rows) > MOST_ROWS:
        note += f" The first {MOST_ROWS} of {len(rows)} rows are shown."
    return Table(f"Between {repeats.what} and over pairs", head, rows[:MOST_ROWS], note)
