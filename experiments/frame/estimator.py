"""One estimator for the network, its controls and the exact recursions: commitment levels, decided fractions, gaps.

The headline is the *aligned* energy (docs/theory.md, section 7.4): what of the predicted difference lies along the
final one. Other estimators stand beside it as companions, since a gap that only one of them has is a gap of the
estimator.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from experiments.frame.steps import WINDOW_START
from ou_theory import estimator as oc

FLOOR_LIMIT = 0.1  # largest Q where the window opens, for a band whose own signal is still below this
LOW, HIGH = 1, -1  # bands of the gap: the lowest annulus (band 0 is DC) and the highest

# name -> the energy that is accumulated, in words; the first is the headline
ESTIMATORS = {
    "aligned": "energy along the outcome, by its own maximum",
    "aligned, cut": "energy along the outcome, cut where it reaches that of the outcome",
    "energy": "all energy, by its own maximum",
    "energy, cut": "all energy, cut where it reaches that of the uncoupled outcome",
}


@dataclass(frozen=True)
class Estimates:
    """Point estimates of one source over couplings, as arrays (..., C, B), (..., C), (..., C, K, B)."""

    tau: np.ndarray
    decided: np.ndarray
    gap: np.ndarray
    latched_gap: np.ndarray
    relative_energy: np.ndarray  # of all energy, errors included
    floor: np.ndarray  # (..., C, B) error energy where the window opens, in units of the uncoupled end


def commitment_of(
    energy: ArrayLike,
    ell: np.ndarray,
    start: float = WINDOW_START,
    *,
    inner: ArrayLike | None = None,
    stochastic: bool = False,
    ends: tuple[int, int] = (LOW, HIGH),
) -> Estimates:
    """The estimator on mean difference energies (..., C, K, B), whose first coupling is 0.

    Args:
      start: log-SNR at which the window opens.
      inner: inner products with the own end, of the same shape. Without them all energy counts, which is right only
        for exact recursions: they have no errors.
      stochastic: whether the sampler adds noise.
      ends: first and last band of the gap.
    """
    found = _program(tuple(np.asarray(ell, np.float64)), float(start), stochastic, ends)(energy, inner)
    return Estimates(**{name: np.asarray(value) for name, value in found.items()})


@lru_cache(maxsize=64)
def _program(
    ell: tuple[float, ...], start: float, stochastic: bool, ends: tuple[int, int]
) -> Callable[..., dict[str, jax.Array]]:
    """The estimator on the steps of one clock as one program: operation by operation, compiling takes most of the time
    of an analysis."""
    levels = np.array(ell)

    @jax.jit
    def estimates(energy: jax.Array, inner: jax.Array | None) -> dict[str, jax.Array]:
        end = energy[..., -1, :]
        q = oc.relative_energy(energy, end[..., :1, :])
        aligned = q if inner is None else oc.aligned_energy(inner, end, end[..., :1, :], stochastic=stochastic)
        found = oc.commitment(aligned, levels, start)
        return {
            "tau": found.level,
            "decided": found.decided,
            "gap": oc.gap(found.level, *ends),
            "latched_gap": oc.gap(found.latched, *ends),
            "relative_energy": q,
            "floor": (q - aligned)[..., int(np.searchsorted(levels, start)), :],
        }

    return estimates


def companions(
    energy: ArrayLike,
    inner: ArrayLike,
    ell: np.ndarray,
    start: float,
    *,
    stochastic: bool,
    ends: tuple[int, int] = (LOW, HIGH),
) -> np.ndarray:
    """Gaps (..., estimator, C) by all of `ESTIMATORS`; the arguments are those of `commitment_of`."""
    return np.asarray(_companions(tuple(np.asarray(ell, np.float64)), float(start), stochastic, ends)(energy, inner))


@lru_cache(maxsize=64)
def _companions(
    ell: tuple[float, ...], start: float, stochastic: bool, ends: tuple[int, int]
) -> Callable[..., jax.Array]:
    levels = np.array(ell)

    @jax.jit
    def gaps(energy: jax.Array, inner: jax.Array) -> jax.Array:
        end = energy[..., -1, :]
        share = oc.aligned_share(oc.projection(inner, end), stochastic=stochastic)
        q = oc.relative_energy(energy, end[..., :1, :])
        accumulated = (share, jnp.minimum(share, 1), q, jnp.minimum(q, 1))  # the order of `ESTIMATORS`
        return jnp.stack([oc.gap(oc.commitment(each, levels, start).level, *ends) for each in accumulated], -2)

    return gaps


def guarded_start(q: np.ndarray, variance: np.ndarray, ell: np.ndarray, start: float = WINDOW_START) -> float:
    """Where the window opens for whole energies: at `start`, or at the first later level where noise is low enough.

    A level is noisy when a band whose own signal is still under the limit, ``S exp(ell) < 0.1``, shows more than the
    limit. The window never opens after the strongest band has begun to decide. If no level up to there is clean,
    `start` is returned, and the noise floor, which is reported by band, shows the error.

    Args:
      q: (K, B) relative energy at zero coupling.
      variance: (B,) data variance of the bands.
      ell: (K,) levels.
    """
    for k in np.flatnonzero(ell >= start):
        signal = variance * np.exp(ell[k])
        if signal.max() >= FLOOR_LIMIT:
            break
        if q[k].max() < FLOOR_LIMIT:
            return start if k == 0 or ell[k - 1] < start else float(ell[k])
    return start


def order(levels: np.ndarray, lowest: int = LOW) -> np.ndarray:
    """Kendall's tau-b of commitment levels (..., B) against band order, from the band `lowest` on, which leaves DC out
    by default; NaN where all levels tie."""
    levels = np.asarray(levels)[..., lowest:]
    first, second = np.triu_indices(levels.shape[-1], 1)
    sign = np.sign(levels[..., second] - levels[..., first])
    untied = np.count_nonzero(sign, axis=-1)
    with np.errstate(invalid="ignore"):
        return sign.sum(-1) / np.sqrt(untied * first.size)
