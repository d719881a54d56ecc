"""One estimator for the network, its controls and the exact recursions: commitment levels, decided fractions, gaps."""

from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from experiments.frame.steps import WINDOW_START
from ou_theory import estimator as oc
from ou_theory.estimator import Commitment

FLOOR_LIMIT = 0.1  # largest Q at the opening of the window of a band whose own signal is still below it
WEAK = 0.002  # decided fraction under which a commitment level rests on too little
LOW, HIGH = 1, -1  # bands of the gap: the lowest annulus (band 0 is DC) and the highest


@dataclass(frozen=True)
class Estimates:
    """Point estimates of one source over couplings, as arrays (..., C, B), (..., C), (..., C, K, B)."""

    tau: np.ndarray
    decided: np.ndarray
    gap: np.ndarray
    latched_gap: np.ndarray
    relative_energy: np.ndarray


def commitment_of(energy: ArrayLike, ell: np.ndarray, start: float) -> Estimates:
    """The estimator on mean difference energies (..., C, K, B), whose first coupling is 0."""
    energy = jnp.asarray(energy)
    q = oc.relative_energy(energy, energy[..., :1, -1, :])
    found: Commitment = oc.commitment(q, jnp.asarray(ell), start)
    return Estimates(
        tau=np.asarray(found.level),
        decided=np.asarray(found.decided),
        gap=np.asarray(oc.gap(found.level, LOW, HIGH)),
        latched_gap=np.asarray(oc.gap(found.latched, LOW, HIGH)),
        relative_energy=np.asarray(q),
    )


def guarded_start(q: np.ndarray, variance: np.ndarray, ell: np.ndarray, start: float = WINDOW_START) -> float:
    """The level at which the estimator's window opens: `start`, or the first later one where noise is low enough.

    A level is noisy when a band whose own signal is still under the limit, ``S exp(ell) < 0.1``, shows more than the
    limit. The window never opens after the strongest band has begun to decide: if no level up to there is clean,
    `start` stands, and the noise floor, which is reported by band, tells.

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


def order(levels: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of commitment levels (..., B) against band order, DC left out; NaN where all levels tie."""
    levels = np.asarray(levels)[..., LOW:]
    first, second = np.triu_indices(levels.shape[-1], 1)
    sign = np.sign(levels[..., second] - levels[..., first])
    untied = np.count_nonzero(sign, axis=-1)
    with np.errstate(invalid="ignore"):
        return sign.sum(-1) / np.sqrt(untied * first.size)
