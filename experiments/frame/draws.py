"""Intervals by resampling pairs: one draw of pairs serves all quantities that are measured on them."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from ou_theory.bootstrap import percentile_interval, resample

DRAWS = 1000
CEILING = 2**27  # bytes of resampled measurements and what is computed from them; an analysis stays under 2**30 in all
WORKING = 24  # arrays of the largest size that an estimator and JAX hold at the same time, as measured

Drawn = dict[str, np.ndarray]


def pair_draws(seed: int, pairs: int, draws: int = DRAWS) -> np.ndarray:
    """Bootstrap weights (draws, pairs) float64 whose rows sum to 1.

    Raises:
      ValueError: fewer than two pairs.
    """
    return np.asarray(resample(seed, pairs, draws), np.float64) / pairs


def resampled_mean(values: Any, weights: np.ndarray, axis: int = 0) -> np.ndarray:
    """Means (draws, ...) float64 over the axis of pairs of `values`, one for each row of `weights` (draws, pairs)."""
    return np.tensordot(weights, np.asarray(values, np.float64), (1, axis))


def mean_and_draws(values: Any, weights: np.ndarray, axis: int = 0) -> np.ndarray:
    """The mean over the axis of pairs, then its bootstrap draws: (1 + draws, ...) float64."""
    values = np.asarray(values, np.float64)
    return np.concatenate([values.mean(axis)[None], resampled_mean(values, weights, axis)])


def in_chunks(rows: np.ndarray, numbers: int, ceiling: int = CEILING) -> Iterator[np.ndarray]:
    """Rows (n, ...), one for each draw, in parts that fit into memory. The parts have nearly equal sizes, because
    operations are compiled again for every size.

    Args:
      numbers: how many float64 numbers the largest array holds for one draw.
      ceiling: in bytes.
    """
    most = max(1, ceiling // max(8 * numbers * WORKING, 1))
    size = max(1, -(-len(rows) // -(-len(rows) // most))) if len(rows) else 1
    for first in range(0, len(rows), size):
        yield rows[first : first + size]


def bootstrap(
    estimator: Callable[..., Mapping[str, np.ndarray]],
    values: Any,
    weights: np.ndarray,
    axis: int = 0,
    *,
    numbers: int = 0,
    ceiling: int = CEILING,
) -> tuple[Drawn, Drawn]:
    """An estimator on the mean over pairs and on its bootstrap draws, in bounded memory.

    The draws go through the estimator in chunks, so that the resampled measurements and the estimator's own arrays stay
    under the ceiling. Its results are kept for all draws, so they should be small.

    Args:
      estimator: takes means (n, ...) and gives named arrays (n, ...).
      values: measurements with pairs along `axis`; or a tuple of such arrays, one for each argument of the estimator.
      weights: (draws, pairs) of `pair_draws`.
      numbers: how many float64 numbers the largest array of the estimator holds for one draw, if more than its input.
      ceiling: in bytes.

    Returns:
      the estimates by name, and their draws (draws, ...) by name.
    """
    given = values if isinstance(values, tuple) else (values,)
    # One copy in double precision, with the pairs in front as the product wants them, serves all chunks.
    parts = [np.ascontiguousarray(np.moveaxis(np.asarray(x), axis, 0), np.float64) for x in given]
    point = {name: np.asarray(x)[0] for name, x in estimator(*(part.mean(0)[None] for part in parts)).items()}
    numbers = max(numbers, sum(part[0].size for part in parts))
    # Filled in place: results that were kept chunk by chunk would lie between the temporaries, whose memory could then
    # not be used again.
    drawn = {name: np.empty((len(weights), *value.shape), value.dtype) for name, value in point.items()}
    first = 0
    for rows in in_chunks(weights, numbers, ceiling):
        found = estimator(*(resampled_mean(part, rows) for part in parts))
        for name, kept in drawn.items():
            kept[first : first + len(rows)] = found[name]
        first += len(rows)
    return point, drawn


def both(found: tuple[Drawn, Drawn]) -> Drawn:
    """What `bootstrap` returns as arrays (1 + draws, ...), the estimate first."""
    point, draws = found
    return {name: np.concatenate([np.asarray(value, np.float64)[None], draws[name]]) for name, value in point.items()}


def interval_ends(point: Any, draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """(..., 2) float64: the ends of the interval of an estimate, from draws (draws, ...). NaN where the estimate is not
    finite: there is nothing that an interval could be of."""
    ends = np.stack(percentile_interval(draws, level), -1)
    return np.where(np.isfinite(np.asarray(point, np.float64))[..., None], ends, np.nan)


def with_interval(point: Any, draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """(..., 3) float64: the estimate and the ends of its interval, 95 % by default, from draws (draws, ...)."""
    return np.concatenate([np.asarray(point, np.float64)[..., None], interval_ends(point, draws, level)], -1)


def packed(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """(..., 3): the estimate and its interval, from `mean_and_draws` or what follows from it (1 + draws, ...)."""
    return with_interval(values[0], values[1:], level)
