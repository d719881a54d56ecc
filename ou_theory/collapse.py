"""Collapse: when the score of n stored samples condenses onto one of them (docs/theory.md, section 13.5).

It happens at the time t at which the mutual information of data and state equals ``log n``. Information is in nats and
falls with t, so that a larger set of samples collapses later in generation, at a smaller t.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike

from ou_theory.cluster_laws import field_average, sign_doubt
from ou_theory.process import Process, mode_noise, transition_time
from ou_theory.roots import falling_root, require
from ou_theory.speciation import observation, whitener

_matmul = partial(jnp.matmul, precision="highest")

# --- mutual information of data and state


def gaussian_information(process: Process, t: ArrayLike, covariance: ArrayLike) -> jax.Array:
    """Information ``log det(I + N_t^-1 C_0) / 2`` that the state has about Gaussian data, under any drift (theory,
    eq. 13.10), an array of t's shape.

    Args:
      process: drift (n, n).
      t: times > 0, any shape.
      covariance: (n, n) of the data, positive semidefinite.
    """
    covariance = jnp.asarray(covariance, float)
    factor, noise = observation(process, t)
    whiten = partial(solve_triangular, whitener(noise), lower=True)
    signal = whiten(jnp.swapaxes(whiten(_matmul(_matmul(factor, covariance), jnp.swapaxes(factor, -1, -2))), -1, -2))
    return jnp.linalg.slogdet(jnp.eye(covariance.shape[0]) + signal)[1] / 2


def mode_information(rate: ArrayLike, t: ArrayLike, variance: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Information ``log(1 + S / N_lambda(t)) / 2`` about one Gaussian mode at times t > 0; broadcasts (theory,
    eq. 13.10)."""
    return jnp.log1p(jnp.asarray(variance, float) / mode_noise(rate, t, noise)) / 2


@jax.custom_jvp
def _class_information(kappa: jax.Array) -> jax.Array:
    lost = field_average(lambda field: jax.nn.softplus(-2 * field), kappa)
    return jnp.clip(np.log(2) - lost, 0.0, np.log(2))


@_class_information.defjvp
def _(primals, tangents):
    # The slope is half the mean square error of the label. Differentiating the quadrature would lose it near kappa = 0.
    (kappa,), (moved,) = primals, tangents
    return _class_information(kappa), sign_doubt(kappa) / 2 * moved


def class_information(kappa: ArrayLike) -> jax.Array:
    """Information about which of two equally likely clusters the state comes from, in [0, log 2] nats (theory,
    eq. 13.11): ``I_c(kappa) = log 2 - E log(1 + exp[-2 (kappa + sqrt(kappa) z)])`` with unit Gaussian z, kappa of any
    shape. Its slope is ``(1 - T(kappa)) / 2`` with the `cluster_laws.sign_correlation` T."""
    kappa = jnp.asarray(kappa, float)
    return jnp.where(kappa == jnp.inf, np.log(2), _class_information(jnp.where(kappa == jnp.inf, 1.0, kappa)))


def cluster_information(
    rates: ArrayLike, t: ArrayLike, variances: ArrayLike, centre: ArrayLike, noise: ArrayLike = 1.0
) -> jax.Array:
    """Information (...) about data in two clusters ``+-m`` with independent modes: about the state within its cluster,
    plus about which cluster it is (theory, section 13.5).

    Args:
      rates: (..., n) of the modes.
      t: (...) times > 0.
      variances: (..., n) within a cluster, >= 0.
      centre: (..., n) m.
    """
    t, variances = jnp.asarray(t, float)[..., None], jnp.asarray(variances, float)
    kappa = (jnp.asarray(centre, float) ** 2 / (variances + mode_noise(rates, t, noise))).sum(-1)
    return mode_information(rates, t, variances, noise).sum(-1) + class_information(kappa)


# --- collapse times


def collapse_time_isotropic(
    log_count_per_mode: ArrayLike, variance: ArrayLike, rate: ArrayLike = 1.0, noise: ArrayLike = 1.0
) -> jax.Array:
    """Collapse time of n samples in d equal Gaussian modes: `transition_time` of ``S / (n^(2 / d) - 1)``; broadcasts
    (theory, eq. 13.10).

    Args:
      log_count_per_mode: ``alpha = log(n) / d >= 0``; at 0 the time is infinite.
      variance: S > 0.
    """
    variance, excess = jnp.asarray(variance, float), jnp.expm1(2 * jnp.asarray(log_count_per_mode, float))
    several = excess > 0
    return jnp.where(several, transition_time(rate, variance / jnp.where(several, excess, 1.0), noise), jnp.inf)


def _check(log_count: ArrayLike, noise: ArrayLike, **positive: ArrayLike) -> None:
    require(jnp.asarray(noise) > 0, f"the noise strength must be positive, got {noise}")
    require(jnp.asarray(log_count) >= 0, f"log_count must be the log of at least one sample, got {log_count}")
    for name, values in positive.items():
        require(jnp.asarray(values) >= 0, f"{name} must not be negative, got {values}")


def _at_one_sample(log_count: jax.Array, time: jax.Array) -> jax.Array:
    """The time, infinite for a single sample."""
    return jnp.where(log_count > 0, time, jnp.where(jnp.isnan(log_count), jnp.nan, jnp.inf))


def _scale(variance: jax.Array, rate: jax.Array, noise: jax.Array, log_count: jax.Array) -> jax.Array:
    """Guess of a collapse time, to within the curvature of `transition_time`: that of modes of the given variance."""
    spread = variance / jnp.expm1(2 * jnp.clip(log_count, 1e-3, 20.0))
    spread = jnp.where(spread > 0, spread, 1.0)
    return spread / (jnp.abs(rate) * spread + 2 * noise)


def _gaussian_excess(t, process, covariance, log_count):
    return gaussian_information(process, t, covariance) - log_count


def _gaussian_rounding(t, process, covariance, log_count):
    """Bound on the rounding error of a difference of the information between two times, if each entry of the covariance
    of the noise, and of the state, is wrong by ten times the rounding of its size."""
    factor, noise = observation(process, t)
    seen = noise + _matmul(_matmul(factor, covariance), factor.T)

    def off(matrix):
        size = jnp.sqrt(jnp.diagonal(matrix))
        inverse = cho_solve((whitener(matrix), True), jnp.eye(size.size))
        return (size[:, None] * jnp.abs(inverse) * size).sum()

    return 10 * jnp.finfo(noise.dtype).eps * (off(noise) + off(seen))


def collapse_time(process: Process, covariance: ArrayLike, log_count: ArrayLike) -> jax.Array:
    """The time () at which `gaussian_information` equals `log_count`, for any drift (theory, section 13.5).
    Differentiable.

    It is 0 for data without variance. It is infinite for one sample, and where an unstable drift keeps that much
    information for ever, or until rounding hides how it is lost.

    Args:
      process: drift (n, n).
      covariance: (n, n) of the data, positive semidefinite.
      log_count: log of the number of samples.

    Raises:
      ValueError: shapes do not belong together, the covariance or `log_count` is negative, or the noise strength not
        positive.
    """
    covariance, log_count = jnp.asarray(covariance, float), jnp.asarray(log_count, float)
    if process.drift.shape != covariance.shape or log_count.shape != ():
        raise ValueError(
            f"drift {process.drift.shape} and covariance {covariance.shape} must be (n, n) and log_count "
            f"{log_count.shape} a number; vmap over more"
        )
    _check(log_count, process.noise)
    negative = jnp.linalg.eigvalsh(covariance) < -1e-5 * jnp.abs(covariance).max()
    require(~negative, f"the covariance must be positive semidefinite, got {covariance}")
    size = covariance.shape[0]
    scale = _scale(
        jnp.trace(covariance) / size, jnp.linalg.norm(process.drift), jnp.asarray(process.noise), log_count / size
    )
    return _at_one_sample(
        log_count, falling_root(_gaussian_excess, scale, process, covariance, log_count, rounding=_gaussian_rounding)
    )


def _modes_excess(t, rates, variances, log_count, noise):
    return mode_information(rates, t[..., None], variances, noise[..., None]).sum(-1) - log_count


def collapse_time_modes(
    rates: ArrayLike, variances: ArrayLike, log_count: ArrayLike, noise: ArrayLike = 1.0
) -> jax.Array:
    """The time (...) at which independent Gaussian modes have lost all information but ``log n`` (theory, section
    13.5). Differentiable.

    It is 0 for data without variance. It is infinite for one sample, and where unstable modes keep that much for ever.

    Args:
      rates: (..., n).
      variances: (..., n) >= 0.
      log_count: (...) log of the number of samples.
      noise: (...) noise strength.

    Raises:
      ValueError: a variance or `log_count` is negative, or the noise strength not positive.
    """
    _check(log_count, noise, variances=variances)
    rates, variances = jnp.broadcast_arrays(jnp.asarray(rates, float), jnp.asarray(variances, float))
    shape = jnp.broadcast_shapes(rates.shape[:-1], jnp.shape(log_count), jnp.shape(noise))
    log_count, noise = (jnp.broadcast_to(jnp.asarray(v, float), shape) for v in (log_count, noise))
    scale = _scale(variances.max(-1), jnp.abs(rates).max(-1), noise, log_count / rates.shape[-1])
    return _at_one_sample(log_count, falling_root(_modes_excess, scale, rates, variances, log_count, noise))


def _clusters_excess(t, rates, variances, centre, log_count, noise):
    return cluster_information(rates, t, variances, centre, noise[..., None]) - log_count


def collapse_time_clusters(
    rates: ArrayLike, variances: ArrayLike, centre: ArrayLike, log_count: ArrayLike, noise: ArrayLike = 1.0
) -> jax.Array:
    """`collapse_time_modes` of data in two clusters ``+-m``, with the information of `cluster_information`; `centre` is
    (..., n).

    Raises:
      ValueError: a variance or `log_count` is negative, or the noise strength not positive.
    """
    _check(log_count, noise, variances=variances)
    rates, variances, centre = jnp.broadcast_arrays(*(jnp.asarray(v, float) for v in (rates, variances, centre)))
    shape = jnp.broadcast_shapes(rates.shape[:-1], jnp.shape(log_count), jnp.shape(noise))
    log_count, noise = (jnp.broadcast_to(jnp.asarray(v, float), shape) for v in (log_count, noise))
    scale = _scale((variances + centre**2).max(-1), jnp.abs(rates).max(-1), noise, log_count / rates.shape[-1])
    return _at_one_sample(log_count, falling_root(_clusters_excess, scale, rates, variances, centre, log_count, noise))


class PairCollapse(NamedTuple):
    """Collapse times of a coupled pair."""

    joint: jax.Array  # of the score of n stored pairs; at no smaller t than the others
    common: jax.Array  # of a score that knows only the common modes
    difference: jax.Array  # of a score that knows only the difference modes


def pair_collapse_times(
    b: ArrayLike,
    g: ArrayLike,
    variances_common: ArrayLike,
    variances_difference: ArrayLike,
    log_count: ArrayLike,
    noise: ArrayLike = 1.0,
) -> PairCollapse:
    """Collapse times of stored pairs with independent Gaussian modes under a symmetric coupling (theory, section 13.5).

    The common modes have the rate b - g, the difference modes b + g. A pair is found again by all its modes together,
    which gives the joint time. The other two times are those of scores learnt on one kind of mode **[ours]**.

    Args:
      b, g: (...) decay rate of a replica, and coupling as a rate.
      variances_common, variances_difference: (..., n) each.
      log_count: (...) log of the number of stored pairs.
      noise: (...) noise strength.

    Raises:
      ValueError: a variance or `log_count` is negative, or the noise strength not positive.
    """
    b, g = (jnp.asarray(v, float)[..., None] for v in (b, g))
    common, difference = jnp.asarray(variances_common, float), jnp.asarray(variances_difference, float)

    def modes(variances, rate):
        shape = jnp.broadcast_shapes(variances.shape, rate.shape)
        return jnp.broadcast_to(rate, shape), jnp.broadcast_to(variances, shape)

    rates_u, common = modes(common, b - g)
    rates_v, difference = modes(difference, b + g)
    leading = jnp.broadcast_shapes(common.shape[:-1], difference.shape[:-1])

    def both(u, v):
        return jnp.concatenate([jnp.broadcast_to(w, leading + w.shape[-1:]) for w in (u, v)], -1)

    return PairCollapse(
        collapse_time_modes(both(rates_u, rates_v), both(common, difference), log_count, noise),
        collapse_time_modes(rates_u, common, log_count, noise),
        collapse_time_modes(rates_v, difference, log_count, noise),
    )


# --- one draw of a stored data set


def condensation(stored: ArrayLike, draw: ArrayLike, noise: ArrayLike) -> jax.Array:
    """Log of the ratio of two weights in the empirical score: that of the sample which a state comes from, over that of
    all other samples together (theory, section 13.10).

    Collapse is where its mean passes 0, in the limit ``d -> inf`` at fixed ``log n / d``. In tens of dimensions the
    time of that is several per cent off the limit.

    Args:
      stored: (n, d) samples in the frame of the data; the state comes from the first.
      draw: (d,) unit noise; the state is ``stored[0] + sqrt(noise) draw``.
      noise: (..., d) noise variances > 0; an infinite one hides its mode.

    Returns:
      (...).

    Raises:
      ValueError: shapes do not belong together, there is a single sample, or noise is not positive.
    """
    stored, draw, noise = (jnp.asarray(v, float) for v in (stored, draw, noise))
    if stored.ndim != 2 or len(stored) < 2 or draw.shape != stored.shape[1:] or noise.shape[-1:] != draw.shape:
        raise ValueError(
            f"stored {stored.shape}, draw {draw.shape} and noise {noise.shape} must be (n, d), (d,) and (..., d), n > 1"
        )
    require(noise > 0, f"noise variances must be positive, got {noise.min()}")
    apart = stored[0] - stored[1:]
    energy = _matmul(1 / (2 * noise), jnp.square(apart).T) + _matmul(1 / jnp.sqrt(noise), (apart * draw).T)
    return -jax.nn.logsumexp(-energy, -1)
