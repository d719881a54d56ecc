"""Uncertainty by resampling pairs (docs/theory.md, section 7.6)."""

import numpy as np


def resample(seed: int, num_pairs: int, draws: int) -> np.ndarray:
    """How often each pair enters each bootstrap sample: (draws, num_pairs) int, whose rows sum to `num_pairs`. The same
    arguments give the same numbers.

    Raises:
      ValueError: fewer than two pairs, which have no spread.
    """
    if num_pairs < 2:
        raise ValueError(f"an interval needs at least 2 pairs to resample, got {num_pairs}")
    rng = np.random.default_rng([seed, num_pairs, draws])
    return rng.multinomial(num_pairs, np.full(num_pairs, 1 / num_pairs), size=draws)


def percentile_interval(draws, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The percentile bootstrap interval: the middle part of the draws (theory, eq. 7.7).

    Args:
      draws: (draws, ...) estimates on resampled pairs.
      level: nominal coverage.

    Returns:
      lower and upper ends (...); NaN where any draw is not finite.

    Raises:
      ValueError: `level` is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    draws = np.asarray(draws, np.float64)
    tail = (1 - level) / 2
    low, high = np.quantile(np.where(np.isfinite(draws).all(0), draws, np.nan), [tail, 1 - tail], axis=0)
    return low, high  # NaN in, NaN out


def family_level(tests: int, level: float = 0.95) -> float:
    """The level of each of several intervals at which all of them together hold the truth with `level` or more,
    however they depend on each other (Bonferroni; theory, section 7.6).

    Raises:
      ValueError: `tests` is less than 1.
    """
    if tests < 1:
        raise ValueError(f"a family has at least one test, got {tests}")
    return 1 - (1 - level) / tests
