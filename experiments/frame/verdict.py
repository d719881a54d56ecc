"""Claims as statements about a run: verdict, value, interval and controls.

A claim holds when its interval lies wholly on the claimed side, does not hold when it lies wholly on the other, and is
undecided in between. The same rule is applied to the controls. The intervals of all claims of a page hold the truth
together with 95 %, so each has the level of `ou_theory.bootstrap.family_level` (docs/theory.md, section 7.6).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike

Verdict = Literal["holds", "does not hold", "undecided", "not tested"]
LEAST = 1e-3  # nats; a smaller gap counts as none, for levels in single precision are not known better


@dataclass
class Control:
    """The measure of a claim on a case where the claim should not hold, or where the answer is known."""

    name: str
    value: float | None
    interval: list[float] | None
    also_holds: bool | None  # whether the claim holds here too; None where that is no objection to it
    statement: str


@dataclass
class Claim:
    """A statement about a run. The id is the number of one of the paper's four claims, or 0 for one of our own."""

    id: int
    title: str
    verdict: Verdict
    measure: str  # what the value is, with units
    value: float | None
    interval: list[float] | None
    statement: str
    controls: list[Control] = field(default_factory=list)
    level: float = 0.95  # of the interval, and of those of the controls


def above(interval: ArrayLike | None, threshold: float = 0.0) -> Verdict:
    """Whether something lies above a threshold, by its interval (2,): holds if the interval is wholly above it, does
    not hold if no part is above it, else undecided. An interval that is not finite is undecided."""
    if interval is None or not np.isfinite(np.asarray(interval, np.float64)).all():
        return "undecided"
    low, high = np.asarray(interval, np.float64)
    return "holds" if low > threshold else "does not hold" if high <= threshold else "undecided"


def told_from_zero(values: ArrayLike) -> bool:
    """Whether a gap, (estimate, low, high) in nats, is known to be there, either way, so that a share of it means
    something."""
    _, low, high = np.asarray(values, np.float64)
    return bool(low > LEAST or high < -LEAST)


def at_most(interval: ArrayLike | None, threshold: float = 0.0) -> Verdict:
    """Whether something lies at or below a threshold: the opposite of `above`."""
    opposite: dict[Verdict, Verdict] = {"holds": "does not hold", "does not hold": "holds"}
    found = above(interval, threshold)
    return opposite.get(found, found)


def within(intervals: ArrayLike, limit: float) -> Verdict:
    """Whether everything lies within ``±limit``, by intervals (..., 2): holds if all are wholly inside, does not hold
    if one is wholly outside."""
    low, high = np.moveaxis(np.asarray(intervals, np.float64), -1, 0)
    if np.all((low > -limit) & (high < limit)):
        return "holds"
    return "does not hold" if np.any((low >= limit) | (high <= -limit)) else "undecided"


def all_hold(*verdicts: Verdict) -> Verdict:
    """Holds if all do, does not hold if one does not."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "holds" if all(verdict == "holds" for verdict in verdicts) else "undecided"


def bounds(values: Sequence[float] | np.ndarray) -> list[float]:
    """The interval of (estimate, low, high), as a claim stores it."""
    return [float(value) for value in np.asarray(values)[1:]]


def finite(entry: Any) -> Any:
    """The same entry with None in place of NaN and infinities, which JSON lacks."""
    if isinstance(entry, dict):
        return {name: finite(value) for name, value in entry.items()}
    if isinstance(entry, list):
        values = [finite(value) for value in entry]
        return None if values and all(value is None for value in values) else values
    return None if isinstance(entry, float) and not np.isfinite(entry) else entry
