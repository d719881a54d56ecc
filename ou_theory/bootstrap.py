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


def basic_interval(estimate, draws, level: float = 0.95) -> tuple[np.ndarray, np.ndarray]:
    """The basic bootstrap interval ``[2 e - q_high, 2 e - q_low]`` (theory, eq. 7.7).

    Args:
      estimate: (...) point estimates e.
      draws: (draws, ...) the same estimates on resampled pairs.
      level: nominal coverage.

    Returns:
      lower and upper ends (...); NaN where the estimate or any draw is not finite.

    Raises:
      ValueError: `level` is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"level must be in (0, 1), got {level}")
    estimate, draws = np.asarray(estimate, np.float64), np.asarray(draws, np.float64)
    finite = np.isfinite(estimate) & np.isfinite(draws).all(0)
    tail = (1 - level) / 2
    low, high = np.quantile(np.where(finite, draws, np.nan), [tail, 1 - tail], axis=0)  # NaN in, NaN out
    return 2 * estimate - high, 2 * estimate - low
