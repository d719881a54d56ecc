"""Closed forms for Gaussian modes, alone and under a constant difference gain (docs/theory.md, sections 4 and 5).

`x` is the signal-to-noise ratio ``X = S exp(ell)`` of a mode, `x0` its value at the start of generation, and `rho` in
[0, 1] the gain of the difference mode. Functions broadcast, and work under jit, vmap and grad, unless they say
otherwise."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc, betaln, entr
from jax.typing import ArrayLike
from scipy.optimize import brentq

from ou_theory.process import transition_time
from ou_theory.special import exprel, log1prel

Flow = Literal["ode", "sde"]


def _root(function: Callable[[float], float], low: float, high: float) -> float:
    """Root of a function between two points where it has opposite signs, to rounding."""
    root = brentq(function, low, high, xtol=1e-15)
    assert isinstance(root, float)
    return root


# --- one mode, uncoupled


def wiener_gain(variance: jax.Array, sigma2: jax.Array) -> jax.Array:
    """Gain ``S / (S + sigma^2)`` in [0, 1] of the posterior mean of a centred Gaussian mode, in the rescaled frame
    (theory, eq. 4.2).

    Args:
      variance: data variance S >= 0 of the mode.
      sigma2: noise variance > 0; broadcasts with `variance`.
    """
    return variance / (variance + sigma2)


def q_uncoupled(x: ArrayLike) -> jax.Array:
    """Q of a Gaussian mode without coupling, ``X / (1 + X)`` (theory, eq. 4.2)."""
    x = jnp.asarray(x, float)
    return x / (1 + x)


def commitment_log_snr(variance: ArrayLike, q: ArrayLike = 0.5) -> jax.Array:
    """Log-SNR, in nats, at which a Gaussian mode is decided to the share `q` in (0, 1). For q = 1/2 its SNR is 1 there
    (theory, eq. 4.3)."""
    q = jnp.asarray(q, float)
    return jnp.log(q) - jnp.log1p(-q) - jnp.log(variance)


def commitment_time(
    variance: ArrayLike, q: ArrayLike = 0.5, rate: ArrayLike = 1.0, noise: ArrayLike = 1.0
) -> jax.Array:
    """OU time at which a Gaussian mode is decided to the share `q` in (0, 1), on the clock of its rate and the noise
    strength (theory, eq. 4.4)."""
    q = jnp.asarray(q, float)
    return transition_time(rate, jnp.asarray(variance) * (1 - q) / q, noise)


def effective_variance(variances: ArrayLike) -> float:
    """Variance of the single mode that is half decided where a band of several variances is (theory, eq. 4.5).

    It solves ``sum S^2 / (S + S_eff) = sum S / 2``, and lies between the mean of S and ``sum S^2 / sum S``. Not for
    traced values.

    Raises:
      ValueError: a variance is not positive.
    """
    s = np.asarray(variances, np.float64).ravel()
    if not s.size or np.any(~(s > 0)):
        raise ValueError(f"variances must be positive, got {variances}")
    low, high = s.mean(), (s**2).sum() / s.sum()
    if high - low <= 1e-15 * high:
        return float(low)
    return _root(lambda v: (s**2 / (s + v)).sum() - s.sum() / 2, low * (1 - 1e-12), high * (1 + 1e-12))


def power_law(first: ArrayLike, exponent: ArrayLike, num: int) -> jax.Array:
    """Variances (num,) ``S_1 k^-a`` of the modes k = 1..num (theory, section 4.3)."""
    return jnp.asarray(first, float) * jnp.arange(1, num + 1, dtype=float) ** -jnp.asarray(exponent, float)


def power_law_time_gap(first: ArrayLike, exponent: ArrayLike, num: int, q: ArrayLike = 0.5) -> jax.Array:
    """OU time between the commitments of the first and the last mode of a power law (theory, eq. 4.6); in log-SNR they
    are ``a log(num)`` apart."""
    c = (1 - jnp.asarray(q, float)) / jnp.asarray(q, float)
    ends = power_law(first, exponent, num)[jnp.array([0, -1])]
    return 0.5 * (jnp.log1p(c * ends[0]) - jnp.log1p(c * ends[1]))


# --- a difference mode under a constant gain


def q_ode(x: ArrayLike, rho: ArrayLike, x0: ArrayLike = 0.0) -> jax.Array:
    """Q of the difference mode under the probability flow (theory, eq. 5.4)."""
    x, rho, x0 = (jnp.asarray(v, float) for v in (x, rho, x0))
    return rho**2 * x * jnp.exp((1 - rho) * jnp.log1p(x0) - (2 - rho) * jnp.log1p(x))


def q_sde(x: ArrayLike, rho: ArrayLike, x0: ArrayLike = 0.0) -> jax.Array:
    """Q of the difference mode under the ancestral SDE with independent noise in the replicas (theory, eq. 5.5)."""
    x, rho, x0 = (jnp.asarray(v, float) for v in (x, rho, x0))
    log_n, log_n0 = -jnp.log1p(x), -jnp.log1p(x0)  # logs of the noise shares 1 / (1 + X)
    b = 2 * rho - 1  # 0 at rho = 1/2, where exprel takes the limit
    started = -jnp.expm1(log_n0) * jnp.exp((b - 1) * log_n0)
    gathered = jnp.exp(b * log_n) * (log_n0 - log_n) * exprel(b * (log_n0 - log_n))
    return rho**2 * jnp.exp((1 - b) * log_n) * (started + gathered)


def peak_ode(rho: ArrayLike) -> jax.Array:
    """SNR at which `q_ode` peaks: ``1 / (1 - rho)``, infinite at rho = 1 (theory, eq. 5.6)."""
    return 1 / (1 - jnp.asarray(rho, float))


def peak_sde(rho: ArrayLike) -> jax.Array:
    """SNR at which `q_sde` peaks, for x0 = 0; infinite at rho = 1 (theory, eq. 5.6)."""
    return jnp.expm1(log1prel(1 - 2 * jnp.asarray(rho, float)))  # log1prel is -log(2 (1 - rho)) / (2 rho - 1)


def w_ode(rho: ArrayLike) -> jax.Array:
    """Peak of `q_ode` for x0 = 0: the share of a band that is ever decided individually (theory, eq. 5.7). It is 0 at
    rho = 0, and 1 at rho = 1, where its slope is infinite."""
    rho = jnp.asarray(rho, float)
    rest = 1 - rho
    return rho**2 * jnp.exp(-entr(rest) - (1 + rest) * jnp.log1p(rest))


def w_sde(rho: ArrayLike) -> jax.Array:
    """Peak of `q_sde` for x0 = 0 (theory, eq. 5.7). It is 0 at rho = 0, and 1 at rho = 1, where its slope is
    infinite."""
    rho = jnp.asarray(rho, float)
    z = 1 - 2 * rho
    near = jnp.abs(z) < 0.5  # around the removable point rho = 1/2
    safe_near, safe = jnp.where(near, z, 0.0), jnp.where(near, 1.0, z)
    log_peak = jnp.where(near, (1 + safe_near) * log1prel(safe_near), -entr(1 + safe) / safe)
    return rho**2 * jnp.exp(-log_peak)


def critical_rho(threshold: float, flow: Flow = "ode") -> float:
    """Gain at which the peak w falls to `threshold` in (0, 1); below this gain no band ever reaches that share (theory,
    section 7.5). Not for traced values.

    Raises:
      ValueError: the threshold is not in (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be in (0, 1), got {threshold}")

    def excess(rho):  # NumPy twin of w, in double precision whatever JAX's flags
        rest = 1 - rho
        if flow == "ode":
            return rho**2 * np.exp(rest * np.log(rest) - (1 + rest) * np.log1p(rest)) - threshold
        b = 2 * rho - 1
        slope = np.log1p(-b) / b if abs(b) > 1e-8 else -1 - b / 2
        return rho**2 * np.exp(2 * rest * slope) - threshold

    return _root(excess, 1e-12, 1 - 1e-14)


def relative_ratio(x: ArrayLike, rho: ArrayLike, x0: ArrayLike = 0.0) -> jax.Array:
    """Ratio R of difference energy to common energy under the flow: ``rho^2 ((1 + X0) / (1 + X))^(1 - rho)`` (theory,
    eq. 5.8)."""
    x, rho, x0 = (jnp.asarray(v, float) for v in (x, rho, x0))
    return rho**2 * jnp.exp((1 - rho) * (jnp.log1p(x0) - jnp.log1p(x)))


def synchronization_snr(threshold: ArrayLike, rho: ArrayLike, x0: ArrayLike = 0.0) -> jax.Array:
    """SNR at which `relative_ratio` falls to `threshold` (theory, eq. 5.8). It is at most `x0` if the replicas are
    synchronised from the start."""
    threshold, rho, x0 = (jnp.asarray(v, float) for v in (threshold, rho, x0))
    return jnp.expm1(jnp.log1p(x0) + jnp.log(rho**2 / threshold) / (1 - rho))


def latched_level_ode(variance: ArrayLike, rho: ArrayLike, ell_end: ArrayLike) -> jax.Array:
    """Latched commitment level under the flow, if the window opens at minus infinity and the peak lies before `ell_end`
    (theory, eq. 7.4).

    It is ``(1 - w) ell_end - a - w log S`` with an offset a that depends on rho alone. At rho = 1 it is ``-log S``, the
    SNR = 1 rule.
    """
    rho = jnp.asarray(rho, float)
    rest = 1 - rho
    inside = rest > 0
    safe = jnp.where(inside, rest, 0.5)
    log_rest, z = jnp.log(safe), safe * (jnp.log(safe) - jnp.log1p(safe))
    offset = rho**2 * (log_rest * (jnp.exp(z) / (1 + safe) - exprel(z)) + jnp.log1p(safe) * exprel(z))
    w = w_ode(rho)
    return (1 - w) * jnp.asarray(ell_end) - jnp.where(inside, offset, 0.0) - w * jnp.log(variance)


def class_mean_difference(noise_share: ArrayLike, rho: ArrayLike, start_share: ArrayLike = 1.0) -> jax.Array:
    """Difference of the states over the difference of the class means, under the flow from equal states (theory,
    eq. 5.9).

    It has no derivative in rho, because JAX's incomplete beta function has none in its first parameter.

    Args:
      noise_share: ``sigma^2 / (S + sigma^2)`` in (0, 1) at the level in question.
      rho: gain in [0, 1].
      start_share: noise share at the start.
    """
    x, rho, start = (jnp.asarray(v, float) for v in (noise_share, rho, start_share))
    a = (1 + rho) / 2
    scale = jnp.exp(betaln(a, 0.5))
    drift = scale * (betainc(a, 0.5, start) - betainc(a, 0.5, x))
    return rho / 2 * x ** ((1 - rho) / 2) / jnp.sqrt(1 - x) * drift
