"""The paths of flow matching: how data and noise are mixed over time (docs/theory.md, section 2.1).

A path mixes data and noise as ``alpha(t) data + sigma(t) noise``, t = 0 noise, t = 1 data. Conventions and names are
those of SiT (Ma et al., arXiv 2401.08740). All functions take and return NumPy float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
Function = Callable[[FloatArray], FloatArray]

FIRST_TIME = 1e-3  # where samplers start on a path that holds no data at t = 0: log-SNR is -13.8 nats on the linear one
VP_BETAS = 0.1, 20.0


@dataclass(frozen=True, eq=False)
class ProbabilityPath:
    """A path of flow matching.

    Attributes:
      alpha, sigma: weights of data and noise, functions of t in [0, 1].
      alpha_rate, sigma_rate: their derivatives by t.
      time: the inverse of `log_snr`: t of a log-SNR in nats.
      first_time: the first t of a sampler. Log-SNR is finite there.
    """

    name: str
    alpha: Function
    sigma: Function
    alpha_rate: Function
    sigma_rate: Function
    time: Function
    first_time: float

    def rates(self, t: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """The derivatives of alpha and sigma at t."""
        t = np.asarray(t, np.float64)
        return self.alpha_rate(t), self.sigma_rate(t)

    def denoising_weights(self, t: ArrayLike) -> tuple[FloatArray, FloatArray]:
        """The weights of state and velocity whose sum is the data (theory, eq. 2.10).

        They are finite at both ends, but for t = 1 on the VP path, where sigma has no derivative.
        """
        t = np.asarray(t, np.float64)
        sigma, (alpha_rate, sigma_rate) = self.sigma(t), self.rates(t)
        wronskian = alpha_rate * sigma - self.alpha(t) * sigma_rate
        return -sigma_rate / wronskian, sigma / wronskian

    def scale(self, t: ArrayLike) -> FloatArray:
        """The factor ``sqrt(alpha^2 + sigma^2)`` from the variance-preserving state to that of the path."""
        t = np.asarray(t, np.float64)
        return np.hypot(self.alpha(t), self.sigma(t))

    def alpha_bar(self, t: ArrayLike) -> FloatArray:
        """Signal power ``alpha^2 / (alpha^2 + sigma^2)`` of the variance-preserving state."""
        t = np.asarray(t, np.float64)
        return np.square(self.alpha(t) / self.scale(t))

    def log_snr(self, t: ArrayLike) -> FloatArray:
        """Log-SNR ``2 log(alpha / sigma)`` in nats; infinite where a weight is zero."""
        t = np.asarray(t, np.float64)
        with np.errstate(divide="ignore"):
            return 2 * (np.log(self.alpha(t)) - np.log(self.sigma(t)))


def _vp_log_alpha(t: FloatArray) -> FloatArray:
    low, high = VP_BETAS
    return -np.square(1 - t) * (high - low) / 4 - (1 - t) * low / 2


def _vp_half_beta(t: FloatArray) -> FloatArray:
    low, high = VP_BETAS
    return (low + (high - low) * (1 - t)) / 2


def _vp_sigma(t: FloatArray) -> FloatArray:
    return np.sqrt(-np.expm1(2 * _vp_log_alpha(t)))


def _vp_sigma_rate(t: FloatArray) -> FloatArray:
    with np.errstate(divide="ignore"):  # minus infinity at t = 1
        return -np.exp(2 * _vp_log_alpha(t)) * _vp_half_beta(t) / _vp_sigma(t)


def _vp_time(ell: FloatArray) -> FloatArray:
    low, high = VP_BETAS
    noise = np.logaddexp(0.0, -ell)  # -2 log alpha, a quadratic function of 1 - t
    return 1 - 2 * noise / (low + np.sqrt(low**2 + 2 * (high - low) * noise))


PATHS = {
    "linear": ProbabilityPath(
        "linear",
        alpha=lambda t: t,
        sigma=lambda t: 1 - t,
        alpha_rate=np.ones_like,
        sigma_rate=lambda t: -np.ones_like(t),
        time=lambda ell: np.exp(-np.logaddexp(0.0, -np.asarray(ell) / 2)),
        first_time=FIRST_TIME,
    ),
    "gvp": ProbabilityPath(
        "gvp",
        alpha=lambda t: np.sin(np.pi / 2 * t),
        sigma=lambda t: np.cos(np.pi / 2 * t),
        alpha_rate=lambda t: np.pi / 2 * np.cos(np.pi / 2 * t),
        sigma_rate=lambda t: -np.pi / 2 * np.sin(np.pi / 2 * t),
        time=lambda ell: 2 / np.pi * np.arctan(np.exp(np.asarray(ell) / 2)),
        first_time=FIRST_TIME,
    ),
    "vp": ProbabilityPath(
        "vp",
        alpha=lambda t: np.exp(_vp_log_alpha(t)),
        sigma=_vp_sigma,
        alpha_rate=lambda t: np.exp(_vp_log_alpha(t)) * _vp_half_beta(t),
        sigma_rate=_vp_sigma_rate,
        time=_vp_time,
        first_time=0.0,
    ),
}
