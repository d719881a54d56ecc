"""Exact Gaussian modes under a sampler's finite steps, in double precision and step by step.

The formulas are those of `ou_theory.recursion` and `ou_theory.cloning`; here they are applied to the steps of a clock.
A mode of variance S is denoised by its Wiener gain. Everything is in the rescaled frame y = x / sqrt(alpha_bar).
"""

import jax
import numpy as np

from ou_theory import cloning, recursion
from ou_theory.clock import Clock


def wiener_gains(variance: np.ndarray, clock: Clock) -> np.ndarray:
    """Gains (K, ...) of modes of variances (...)."""
    variance = np.asarray(variance, np.float64)
    return variance / (variance + _levels(clock, variance)[:-1] ** 2)


def ddim_factors(variance: np.ndarray, clock: Clock) -> np.ndarray:
    """The factor (K, ...) by which each DDIM step multiplies modes of variances (...)."""
    sigma = _levels(clock, variance)
    with jax.enable_x64(True):
        return np.asarray(recursion.mode_ddim_step(wiener_gains(variance, clock), sigma[:-1], sigma[1:]).factor)


def ancestral_steps(variance: np.ndarray, clock: Clock) -> tuple[np.ndarray, np.ndarray]:
    """The factor by which each ancestral step multiplies modes of variances (...), and the variance of the noise that
    the step adds, which is that of the exact posterior: (K, ...) each."""
    sigma = _levels(clock, variance)
    with jax.enable_x64(True):
        step = recursion.mode_ancestral_step(wiener_gains(variance, clock), sigma[:-1], sigma[1:])
        return np.asarray(step.factor), np.asarray(step.noise)


def growth_rate(variance: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Growth rate, per nat of ln(1 / sigma), of differences of modes along the flow; arrays that broadcast."""
    with jax.enable_x64(True):
        return np.asarray(cloning.rescaled_growth_flow(variance, np.asarray(sigma, np.float64) ** 2))


def _levels(clock: Clock, variance: np.ndarray) -> np.ndarray:
    """Noise levels (K + 1, 1, ...), the clean end last, to broadcast with variances."""
    return np.append(clock.sigma, 0.0).reshape(-1, *(1,) * np.ndim(variance))
