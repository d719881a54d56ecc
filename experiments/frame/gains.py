"""Gains of a pair's difference: the ideal one of a coupling, those that are measured in one pass, and the recursion
under them (docs/theory.md, sections 6.2 and 7.7)."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from ou_theory.attention import GateKind, rho
from ou_theory.clock import Clock
from ou_theory.recursion import recursion_statistics


def ideal_gain(couplings: np.ndarray, kind: GateKind = "joint") -> np.ndarray:
    """The gain rho of couplings (C,) of a kind of gate. Networks run at couplings of single precision, and so does
    this."""
    return np.asarray(rho(jnp.asarray(couplings, jnp.float32), kind), np.float64)


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


def measured_statistics(found: Gains, share: np.ndarray, clock: Clock, eta: float) -> tuple[np.ndarray, np.ndarray]:
    """Energies of the denoised difference by band, and inner products with its end, (..., C, K, B) each.

    Args:
      share: (M, B) of each group in the mean over its band.
    """
    gain, sigma = jnp.asarray(found.gain), jnp.asarray(clock.sigma)
    energy, inner = recursion_statistics(gain, sigma, jnp.asarray(found.start), eta, found.residual)
    return np.asarray(energy) @ share, np.asarray(inner) @ share
