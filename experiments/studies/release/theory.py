"""What the recursions say of a release (docs/theory.md, section 10.3): an exact denoiser of Gaussian data, and the
network's own gain in one pass."""

import numpy as np

from experiments.frame.exact import exact_statistics
from experiments.frame.gains import Gains, ideal_gain, measured_statistics
from experiments.frame.settings import GateKind
from ou_theory.clock import Clock


def exact_ends(
    gates: np.ndarray, variance: np.ndarray, share: np.ndarray, clock: Clock, eta: float, kind: GateKind
) -> np.ndarray:
    """Energy (..., A, B) of the final difference of an exact denoiser of Gaussian data, whose difference mode is
    multiplied by the ideal gain of the coupling while it acts.

    Args:
      gates: (A, K) coupling of each arm by sampler step.
      variance: (..., n) of the data's principal components.
      share: (n, B) of each component in each band.
      eta: 0 for DDIM, 1 for the ancestral sampler.
    """
    return exact_statistics(ideal_gain(gates, kind), variance, share, clock, eta)[0][..., -1, :]


def by_arm(found: Gains, active: np.ndarray) -> Gains:
    """Gains (..., A, K, M) of arms, from those of couplings (..., C, K, M).

    Args:
      active: (A, K) index of the coupling that acts in each arm at each step; 0 is none.
    """
    steps = np.arange(active.shape[-1])

    def chosen(values: np.ndarray | float) -> np.ndarray:
        return np.asarray(values)[..., active, steps, :]

    return Gains(chosen(found.gain), chosen(found.residual), found.start)


def measured_ends(found: Gains, active: np.ndarray, share: np.ndarray, clock: Clock, eta: float) -> np.ndarray:
    """Energy (..., A, B) of the final difference by the recursion under measured gains, see `by_arm`."""
    return measured_statistics(by_arm(found, active), share, clock, eta)[0][..., -1, :]


def ideal_level(rho: np.ndarray, threshold: float = 0.5) -> np.ndarray:
    """Level (nats) at which a mode of variance 1 may be released so that the share `threshold` of its difference stays,
    in the continuum of the flow; a mode of variance S is earlier by ln S (docs/theory.md, eq. 10.4). At rho = 0 and one
    half it is 0: the level of SNR = 1."""
    return np.log(np.expm1(-np.log(threshold) / (1 - np.asarray(rho, np.float64))))
