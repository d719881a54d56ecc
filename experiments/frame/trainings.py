"""Networks that were trained again: how the gap varies between trainings, beside how it varies over pairs."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from experiments.frame.page import NOTHING, Table, interval, number


class Training(NamedTuple):
    """One trained network and its gap."""

    name: str
    kind: str  # of network and data, in words
    form: Mapping[str, Any]  # its configuration
    settings: Mapping[str, Any]  # of the measurement, as far as they change the gap
    coupling: np.ndarray  # (C,)
    gap: np.ndarray  # (C, 3) in nats, with its 95 % interval over pairs


def over_networks(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Interval (2,) of the mean of independently trained networks, by Student's t; NaN for fewer than three."""
    if values.size < 3:
        return np.full(2, np.nan)
    reach = stats.t.isf((1 - level) / 2, values.size - 1) * stats.sem(values)
    return np.array([values.mean() - reach, values.mean() + reach])


def trained_again(trainings: Sequence[Training]) -> list[Table]:
    """How the gap varies between trainings of one form of network on one kind of data, measured alike, beside how it
    varies over pairs; no table where none was trained twice."""
    alike: dict[tuple[str, ...], list[Training]] = {}
    for each in trainings:
        form = sorted(f"{key}={value}" for key, value in each.form.items() if key != "dtype")
        measured = sorted(f"{key}={value}" for key, value in each.settings.items())
        alike.setdefault((each.kind, *form, *measured), []).append(each)
    rows = []
    for members in (members for members in alike.values() if len(members) > 1):
        shared = set.intersection(*(set(each.coupling.tolist()) for each in members))
        for g in sorted(shared):
            gaps = np.array([each.gap[each.coupling.tolist().index(g)] for each in members])
            over = over_networks(gaps[:, 0])
            rows.append(
                [
                    f"{members[0].kind}: {', '.join(each.name for each in members)}",
                    f"{g:g}",
                    number(float(gaps[:, 0].mean())),
                    interval(over.tolist()) if np.isfinite(over).all() else NOTHING,
                    number(float(gaps[:, 0].std(ddof=1))),
                    number(float((gaps[:, 2] - gaps[:, 1]).mean() / (2 * stats.norm.ppf(0.975)))),
                ]
            )
    head = [
        "trained again",
        "g",
        "mean gap, nats",
        "95 % interval over trainings",
        "spread over trainings",
        "over pairs",
    ]
    note = (
        "Spreads are standard deviations, that over pairs from the mean width of the intervals. Networks of a row "
        "differ in training seed, or in how they were trained. The 95 % interval needs three."
    )
    return [Table("Gap of networks that were trained again", head, rows, note)] if rows else []
