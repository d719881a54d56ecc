"""Cloning and growth: how alike two continuations of one state end, and how fast a difference grows on the way
(docs/theory.md, sections 13.6 to 13.8).

Clones branch from one state of noise variance sigma^2 and go on with independent noise under the reverse SDE, so that
their ends are independent draws of the posterior. The ends of a Gaussian mode correlate by `gain_model.q_uncoupled`.
Functions broadcast, and work under jit, vmap and grad, unless they say otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr
from jax.typing import ArrayLike

from ou_theory.clock import BETA_MAX, BETA_MIN, NUM_TRAIN_STEPS, Clock
from ou_theory.cluster_laws import Clusters, mmse, sign_correlation
from ou_theory.estimator import latch, relative_energy, threshold_step
from ou_theory.gain_model import commitment_log_snr, wiener_gain
from ou_theory.process import transition_time
from ou_theory.recursion import recursion_energy
from ou_theory.roots import falling_root, require
from ou_theory.special import exprel

# --- clones of clusters


def same_cluster_probability(kappa: ArrayLike) -> jax.Array:
    """Probability ``(1 + T(kappa)) / 2`` that two clones end in the same of two clusters; kappa of any shape."""
    return (1 + sign_correlation(jnp.asarray(kappa, float))) / 2


def same_side_probability(centre: ArrayLike, variance: ArrayLike, sigma2: ArrayLike, points: int = 4801) -> jax.Array:
    """Probability that two clones end on the same side of 0 in one mode with clusters at ``+-m`` (theory, eq. 11.6).

    The side is what a classifier sees, and need not be the cluster. Far clusters have `same_cluster_probability`, and
    one Gaussian (m = 0) has ``1/2 + arcsin(X / (1 + X)) / pi`` with its signal-to-noise ratio X. Broadcasts.

    Args:
      centre, variance: m, and s^2 > 0 within a cluster.
      sigma2: noise variance > 0 at which the clones branch.
      points: of the quadrature, a trapezoid rule.
    """
    m, s2, noise = jnp.broadcast_arrays(*(jnp.asarray(v, float)[..., None] for v in (centre, variance, sigma2)))
    z = jnp.linspace(-12, 12, points)
    weight = jnp.exp(-(z**2) / 2)
    y = m + jnp.sqrt(s2 + noise) * z  # of one cluster; the other is its mirror image
    share, spread = s2 / (s2 + noise), jnp.sqrt(s2 * noise / (s2 + noise))
    own = jax.nn.sigmoid(2 * m * y / (s2 + noise))
    right = own * ndtr((m + share * (y - m)) / spread) + (1 - own) * ndtr((share * (y + m) - m) / spread)
    return (weight * (right**2 + (1 - right) ** 2)).sum(-1) / weight.sum()


def clone_correlation(law: Clusters, sigma2: ArrayLike) -> jax.Array:
    """Correlation ``1 - mmse / Var`` of the ends of two clones in each mode: the Q of any law (theory, eq. 4.1).

    It is at least ``X / (1 + X)`` with ``X = Var / sigma^2``, which is its value for a Gaussian law of that variance.

    Args:
      law: of M modes.
      sigma2: (...) noise variances at which the clones branch.

    Returns:
      (..., M).
    """
    return 1 - mmse(law, jnp.asarray(sigma2, float)) / law.total_variance()


def _missing_correlation(kappa, q):
    return q - sign_correlation(kappa)


def kappa_level(q: ArrayLike = 0.5) -> jax.Array:
    """The kappa at which ``T(kappa) = q``, so that the labels of clones correlate by q. Differentiable for q in (0, 1).

    It is 0 at q = 0 and infinite at q = 1. At one half it is 0.850844: clones commit a little before speciation, which
    is at kappa = 1.

    Raises:
      ValueError: q is outside [0, 1].
    """
    q = jnp.asarray(q, float)
    require((q >= 0) & (q <= 1), f"q is a correlation in [0, 1], got {q}")
    inside = (q > 0) & (q < 1)
    safe = jnp.where(inside, q, 0.5)
    level = falling_root(_missing_correlation, safe, safe)
    return jnp.where(inside, level, jnp.where(q == 0, 0.0, jnp.where(q == 1, jnp.inf, jnp.nan)))


def cluster_cloning_time(
    centre: ArrayLike, variance: ArrayLike, q: ArrayLike = 0.5, rate: ArrayLike = 1.0, noise: ArrayLike = 1.0
) -> jax.Array:
    """OU time at which the labels of clones correlate by q in (0, 1), for one mode with clusters ``+-m`` of variance
    s^2: `transition_time` of the spread ``m^2 / kappa_q - s^2``. It is 0 if they correlate by less at every time."""
    spread = jnp.asarray(centre, float) ** 2 / kappa_level(q) - jnp.asarray(variance, float)
    return transition_time(rate, spread, noise)


def coupled_cloning_variance(variance: ArrayLike, x_end: ArrayLike, x_branch: ArrayLike, rho: ArrayLike) -> jax.Array:
    """Variance of the difference mode of two coupled clones, in the rescaled frame (theory, eq. 13.12).

    The clones branch at the SNR `x_branch` and run under the ancestral SDE, with the gain `rho` on their difference, to
    the SNR `x_end`. With the noise shares ``z = 1 / (1 + X)`` the variance is
    ``S z_e^(2 - 2 rho) / (1 - z_e)^2 [z_b^(2 rho - 1) - z_e^(2 rho - 1)] / (2 rho - 1)``, computed without loss of
    digits around rho = 1/2. As the noise vanishes it tends to 0 for every rho < 1, and to the posterior variance at the
    branch for rho = 1.

    Args:
      variance: S > 0.
      x_end: ``S / sigma^2 > 0`` at the end, not below `x_branch`.
      x_branch: ``S / sigma^2 >= 0`` at the branch.
      rho: gain in [0, 1].
    """
    variance, x_end, x_branch, rho = (jnp.asarray(v, float) for v in (variance, x_end, x_branch, rho))
    end, branch = -jnp.log1p(x_end), -jnp.log1p(x_branch)  # logs of the noise shares
    b = 2 * rho - 1
    gathered = (branch - end) * exprel(b * (branch - end))
    return variance * jnp.exp(end) * gathered / jnp.expm1(end) ** 2


# --- growth of a small difference along the reverse process


def rescaled_growth_flow(variance: ArrayLike, sigma2: ArrayLike) -> jax.Array:
    """Growth rate of a difference of rescaled states of a Gaussian mode under the flow, per unit of ``log(1 / sigma)``:
    ``-sigma^2 / (S + sigma^2)``. It is always negative."""
    sigma2 = jnp.asarray(sigma2, float)
    return -sigma2 / (jnp.asarray(variance, float) + sigma2)


def rescaled_growth_sde(variance: ArrayLike, sigma2: ArrayLike) -> jax.Array:
    """The rate of `rescaled_growth_flow` under the reverse SDE with shared noise, which is twice as large."""
    return 2 * rescaled_growth_flow(variance, sigma2)


def state_growth(variance: ArrayLike, alpha_bar: ArrayLike) -> jax.Array:
    """Growth rate of a difference of variance-preserving states of a Gaussian mode under the flow, per reverse OU time:
    ``(S - 1) alpha_bar / P`` with ``P = 1 + (S - 1) alpha_bar``. Its sign is that of S - 1 at all times, so that it
    says nothing about commitment."""
    excess = (jnp.asarray(variance, float) - 1) * jnp.asarray(alpha_bar, float)
    return excess / (1 + excess)


def denoised_growth(variance: ArrayLike, alpha_bar: ArrayLike) -> jax.Array:
    """Growth rate of a difference of predictions of a Gaussian mode under the flow, per reverse OU time: ``1 / P > 0``
    with the P of `state_growth`."""
    return 1 / (1 + (jnp.asarray(variance, float) - 1) * jnp.asarray(alpha_bar, float))


def cluster_growth(kappa: ArrayLike, variance: ArrayLike, sigma2: ArrayLike) -> jax.Array:
    """Growth rate of a difference of rescaled states along the centre, at the symmetric point of two clusters, under
    the flow, per unit of ``log(1 / sigma)``: ``sigma^2 / (s^2 + sigma^2) (kappa - 1)``. It changes sign at speciation.
    """
    return -rescaled_growth_flow(variance, sigma2) * (jnp.asarray(kappa, float) - 1)


def coupled_energy_growth(x: ArrayLike, rho: ArrayLike) -> jax.Array:
    """Growth rate of the energy of the predicted difference under the flow with the gain `rho`, per nat of log-SNR:
    ``(1 - (1 - rho) X) / (1 + X)``. It changes sign at ``X = 1 / (1 - rho)``."""
    x, rho = jnp.asarray(x, float), jnp.asarray(rho, float)
    return (1 - (1 - rho) * x) / (1 + x)


# --- what the finite steps of a sampler cost


def half_energy_bias(clock: Clock, variances: ArrayLike, eta: float = 0.0) -> np.ndarray:
    """The sampler step at which an uncoupled Gaussian mode has half of its final energy, minus its SNR = 1 step.

    The result (B,) is negative: a discrete sampler is early, by less than 1 step for DDIM and by about 2 for the
    ancestral sampler, however many steps it takes (theory, section 13.8). Theory and network must therefore go through
    the same recursion. Not for traced values.

    Args:
      clock: of the sampler.
      variances: (B,) positive.
      eta: as in `recursion.recursion_energy`.

    Raises:
      ValueError: a variance is not positive.
    """
    variances = np.asarray(variances, np.float64)
    require(variances > 0, f"variances must be positive, got {variances}")
    gain = wiener_gain(jnp.asarray(variances), jnp.asarray(clock.sigma)[:, None] ** 2)
    energy = recursion_energy(gain, jnp.asarray(clock.sigma), jnp.asarray(variances + clock.sigma[0] ** 2), eta)
    half = threshold_step(latch(relative_energy(energy, energy[-1])), clock.log_snr, 0.5)
    return np.asarray(half) - clock.step(np.asarray(commitment_log_snr(variances)))


# --- bands and spectra


def power_law_step_gap(
    steps: ArrayLike, first: ArrayLike, exponent: ArrayLike, num: ArrayLike, q: ArrayLike = 0.5
) -> jax.Array:
    """Rough number of sampler steps between the commitments of the first and the last of the modes ``S_1 k^-a``,
    k = 1..num, on the linear schedule (theory, eq. 13.13); `Clock.step` is exact. Broadcasts.

    It is ``0.317 n [sqrt(log(1 + c S_1)) - sqrt(log(1 + c S_num))]`` with ``c = (1 - q) / q``. It saturates as the
    exponent grows, since few steps lie at small noise, whereas the gap in log-SNR is ``a log(num)``, without bound.

    Args:
      steps: n of the sampler.
      first, exponent, num: S_1, a and the number of modes.
      q: share to which a mode is decided where it counts as committed.
    """
    steps, first, exponent, num, q = (jnp.asarray(v, float) for v in (steps, first, exponent, num, q))
    c = (1 - q) / q
    ends = jnp.sqrt(jnp.log1p(c * first)) - jnp.sqrt(jnp.log1p(c * first * num**-exponent))
    return (2 / ((BETA_MAX - BETA_MIN) * (NUM_TRAIN_STEPS - 1))) ** 0.5 * steps * ends
