"""The recursions beside the network (docs/theory.md, section 7.7): of an exact denoiser of its data, and under the
gains that are measured in one pass."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import xarray as xr

from experiments.frame.exact import exact_statistics
from ou_theory.attention import GateKind, rho
from ou_theory.clock import Clock
from ou_theory.recursion import recursion_statistics

EXACT = {  # exact denoisers: the variances that they are made for
    "data covariance": "the covariance of the training data within classes, all principal components",
    "sample variance": "one variance per band, from the network's own uncoupled samples",
}
RECURSIONS = {  # recursions under a gain measured in one pass: how the gain is taken
    "regression gain": "what of the denoised difference lies along that of the states; the rest is new at every step",
    "energy gain": "roots of ratios of energies, as if all of the denoised difference lay along that of the states",
}


def exact_of(analysis: xr.Dataset) -> str:
    """Which of `EXACT` a run has."""
    return next(name for name in EXACT if name in analysis.source.values)


def recursion_of(analysis: xr.Dataset) -> str:
    """The first of `RECURSIONS` that a run has; those of older versions have the second alone."""
    return next(name for name in RECURSIONS if name in analysis.source.values)


def ideal_gain(couplings: np.ndarray, kind: GateKind = "joint") -> np.ndarray:
    """The gain rho of couplings (C,) of a kind of gate. Networks run at couplings of single precision, and so does
    this."""
    return np.asarray(rho(jnp.asarray(couplings, jnp.float32), kind), np.float64)


def exact_gain(analysis: xr.Dataset) -> np.ndarray:
    """The gain (C,) by which the exact denoiser of a run multiplies its difference, at the couplings of the run."""
    return ideal_gain(analysis.coupling.values, analysis.attrs.get("gate_kind", "joint"))


def band_statistics(
    couplings: np.ndarray, variance: np.ndarray, clock: Clock, eta: float, kind: GateKind = "joint"
) -> tuple[np.ndarray, np.ndarray]:
    """`exact_statistics` of bands that are one mode each, of variances (..., B)."""
    return exact_statistics(ideal_gain(couplings, kind), variance, np.eye(variance.shape[-1]), clock, eta)


class Gains(NamedTuple):
    """What one pass makes of a difference, by group of modes."""

    gain: np.ndarray  # (..., C, K, M) w: the denoised difference over that of the states
    residual: np.ndarray | float  # (..., C, K, M) energy of the rest, over that of the states
    start: np.ndarray  # (..., 1, M) energy of the states at the first step


def regression_gains(energy: np.ndarray, product: np.ndarray, state: np.ndarray) -> Gains:
    """What of the denoised difference lies along that of the states, from means over pairs (docs/theory.md, eq. 7.8).

    Args:
      energy: (..., C, K, M) difference energies after one denoising of the same inputs.
      product: (..., C, K, M) inner products with the difference of those inputs in the rescaled frame.
      state: (..., K, M) energies of that.
    """
    state = state[..., None, :, :]
    gain = product / state
    return Gains(gain, np.maximum(energy / state - gain**2, 0), state[..., 0, :])


def energy_gains(energy: np.ndarray, state: np.ndarray) -> Gains:
    """Root ratios of energies in place of the gain, and no residual: all counts as signal; see `regression_gains`."""
    state = state[..., None, :, :]
    return Gains(np.sqrt(energy / state), 0.0, state[..., 0, :])


def measured_statistics(found: Gains, share: np.ndarray, clock: Clock, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Energies of the denoised difference by band, and inner products with its end, (..., C, K, B) each.

    Args:
      share: (M, B) of each group in the mean over its band.
    """
    gain, sigma = jnp.asarray(found.gain), jnp.asarray(clock.sigma)
    energy, inner = recursion_statistics(gain, sigma, jnp.asarray(found.start), eta, found.residual)
    return np.asarray(energy) @ share, np.asarray(inner) @ share
