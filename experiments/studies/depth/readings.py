"""Commitment levels by layer from relative energies or explained shares, and how late in depth a gap is made."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.frame.draws import bootstrap, both
from experiments.frame.steps import WINDOW_START
from experiments.studies.depth.settings import LAST
from ou_theory import estimator as oc

CENSORED = 0.5  # share of a band that is decided where the window opens, above which its level is only a bound


def readings(energy: np.ndarray, ell: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Commitment by layer from difference energies (P, C, layer, K, B), with bootstrap draws in front of the estimate.

    All energy counts, up to its own maximum after that layer.

    Returns:
      see `levels_of`; the first of the 1 + draws rows is the estimate.
    """
    return both(bootstrap(lambda mean: levels_of(mean, ell, WINDOW_START), energy, weights))


def probe_readings(error: np.ndarray, total: np.ndarray, ell: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The same for the probe: held-out R², clipped to [0, 1], takes the place of relative energy.

    Args:
      error: squares of the probe's errors (C, P, layer, level, B).
      total: squares of the outcome that it predicts, of the same dimensions.
    """

    def estimates(error, total):
        r2 = 1 - error / total
        return levels_of(np.clip(r2, 0, 1), ell, None) | {"r2": r2}

    return both(bootstrap(estimates, (error, total), weights, 1))


def levels_of(q: np.ndarray, ell: np.ndarray, start: float | None) -> dict[str, np.ndarray]:
    """Commitment from what is decided, q (..., K, B), relative to its own maximum.

    Returns:
      level (..., B) and gap (...); and edge (..., B), the share that is decided where the window opens. Where that is
      more than `CENSORED`, the band commits before the window, and the level is only an upper bound.
    """
    with jax.enable_x64(True):
        found = oc.commitment(jnp.asarray(q), ell, start)
        gap = np.asarray(oc.gap(found.level))
        edge = found.latch[..., 0, :] / jnp.where(found.decided > 0, found.decided, jnp.nan)
    return {"level": np.asarray(found.level), "gap": gap, "edge": np.asarray(edge)}


def made_in_last(gap: np.ndarray, count: int) -> np.ndarray:
    """Share (...) of the final gap (..., layer) that is made in the last `count` layers; NaN where the final gap is 0.
    Layer 0 is the embedding."""
    final = gap[..., -1]
    return 1 - gap[..., -1 - count] / np.where(final == 0, np.nan, final)


def localisation(gap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How late in depth a gap is made.

    Args:
      gap: (..., layer) after every layer; layer 0 is the embedding.

    Returns:
      share: (...) of the final gap that is made in the last fifth of the layers.
      half: (...) relative depth, in [0, 1], from which on the gap stays above half of its final value.
      Both are NaN where the final gap is 0.
    """
    layers = gap.shape[-1] - 1
    depth = np.arange(layers + 1) / layers
    final = gap[..., -1]
    before = np.apply_along_axis(lambda row: np.interp(1 - LAST, depth, row), -1, gap)
    final = np.where(final == 0, np.nan, final)
    share = 1 - before / final
    relative = gap / final[..., None] - 0.5
    below = relative < 0
    last = layers - np.argmax(below[..., ::-1], -1)  # the last layer below half
    low = np.take_along_axis(relative, last[..., None], -1)[..., 0]
    high = np.take_along_axis(relative, np.minimum(last + 1, layers)[..., None], -1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        half = (last + np.where(high > low, -low / (high - low), 1)) / layers
    return share, np.where(np.isnan(final), np.nan, np.where(below.any(-1), half, 0.0))
