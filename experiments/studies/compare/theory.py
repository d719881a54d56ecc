"""The recursions beside the network (docs/theory.md, section 7.7): of an exact denoiser of its data, and under the
gains that are measured in one pass."""

import numpy as np
import xarray as xr

from experiments.frame.exact import exact_statistics
from experiments.frame.gains import Gains, ideal_gain
from ou_theory.attention import GateKind
from ou_theory.clock import Clock

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


def exact_gain(analysis: xr.Dataset) -> np.ndarray:
    """The gain (C,) by which the exact denoiser of a run multiplies its difference, at the couplings of the run."""
    return ideal_gain(analysis.coupling.values, analysis.attrs.get("gate_kind", "joint"))


def band_statistics(
    couplings: np.ndarray, variance: np.ndarray, clock: Clock, eta: float, kind: GateKind = "joint"
) -> tuple[np.ndarray, np.ndarray]:
    """`exact_statistics` of bands that are one mode each, of variances (..., B)."""
    return exact_statistics(ideal_gain(couplings, kind), variance, np.eye(variance.shape[-1]), clock, eta)


def energy_gains(energy: np.ndarray, state: np.ndarray) -> Gains:
    """Root ratios of energies in place of the gain, and no residual: all counts as signal; see `regression_gains`."""
    state = state[..., None, :, :]
    return Gains(np.sqrt(energy / state), 0.0, state[..., 0, :])
