"""Rates and noise that change in time (docs/theory.md, sections 12.4 and 13.9).

A symmetric pair keeps its modes under any coupling g(t): the common mode has the rate ``b - g(t)``, the difference mode
``b + g(t)``. Rates are constant between the times of a grid, and everything is exact for such rates at any step size.
For a smooth rate take its values in the middles of the steps; the error is then of second order in the step size. All
functions work under jit, vmap and grad.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ou_theory.process import mode_factor, mode_noise, mode_variance, transition_time
from ou_theory.roots import require


def _grid(rate_values: ArrayLike, times: ArrayLike, noise: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array]:
    rates, times, noise = (jnp.asarray(v, float) for v in (rate_values, times, noise))
    if times.ndim != 1 or rates.ndim < 1 or rates.shape[-1] != times.size - 1:
        raise ValueError(f"{times.shape} times and rates {rates.shape} must be (T,) and (..., T - 1): one rate a step")
    if noise.ndim:
        raise ValueError(f"the noise strength must be a number, got shape {noise.shape}; vmap over more")
    require(~(jnp.diff(times) < 0), f"times must increase, got {times}")
    require(noise > 0, f"the noise strength must be positive, got {noise}")
    return rates, times, noise


class ScheduledMode(NamedTuple):
    """The transition law of a mode from the first time of a grid to every time of it."""

    factor: jax.Array  # (..., T) ``exp(-int rate)``
    variance: jax.Array  # (..., T)


def scheduled_modes(rate_values: ArrayLike, times: ArrayLike, noise: ArrayLike = 1.0) -> ScheduledMode:
    """Factor and variance of a mode whose rate changes (theory, eq. 12.7).

    Args:
      rate_values: (..., T - 1) rates between the times.
      times: (T,) increasing.
      noise: number.

    Raises:
      ValueError: shapes do not belong together, the times decrease, or the noise strength is not positive.
    """
    rates, times, noise = _grid(rate_values, times, noise)
    steps = jnp.diff(times)

    def join(first, second):
        return first[0] * second[0], second[0] ** 2 * first[1] + second[1]

    start = jnp.zeros((*rates.shape[:-1], 1), rates.dtype)
    factor = jnp.concatenate([start + 1, mode_factor(rates, steps)], -1)
    variance = jnp.concatenate([start, mode_variance(rates, steps, noise)], -1)
    return ScheduledMode(*jax.lax.associative_scan(join, (factor, variance), axis=-1))


def scheduled_noise(rate_values: ArrayLike, times: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Pulled-back noise ``N(t) = 2 D int_0^t exp(2 int_0^s rate) ds`` (..., T) of a mode whose rate changes (theory,
    section 13.9). Arguments are as in `scheduled_modes`. It increases, and overflows where the mode has forgotten the
    data entirely."""
    rates, times, noise = _grid(rate_values, times, noise)
    steps = jnp.diff(times)
    start = jnp.zeros((*rates.shape[:-1], 1), rates.dtype)
    stretch = jnp.exp(2 * jnp.concatenate([start, jnp.cumsum(rates * steps, -1)[..., :-1]], -1))
    added = stretch * mode_noise(rates, steps, noise)
    return jnp.concatenate([start, jnp.cumsum(added, -1)], -1)


def scheduled_time(rate_values: ArrayLike, times: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Time (...) at which the pulled-back noise of a mode whose rate changes reaches `spread` (theory, eq. 13.14).

    It is speciation for ``m^2 - s^2`` and commitment for ``S (1 - q) / q``, as `process.transition_time` is for a
    constant rate. The last rate holds beyond the last time. The time is 0 for ``spread <= 0``, and infinite if the
    noise never reaches the spread.

    Args:
      rate_values: (..., T - 1) rates between the times.
      times: (T,) increasing, from 0.
      spread: (...) or a number.
      noise: number.

    Raises:
      ValueError: shapes do not belong together, the times decrease or do not begin at 0, or the noise strength is not
        positive.
    """
    rates, times, noise = _grid(rate_values, times, noise)
    require(times[0] == 0, f"times must begin at 0, where the data are, got {times[0]}")
    spread = jnp.asarray(spread, float)
    shape = jnp.broadcast_shapes(rates.shape[:-1], spread.shape)
    rates = jnp.broadcast_to(rates, (*shape, rates.shape[-1]))

    # `log_missing` is the log of the noise that is still missing at the beginning of a step, in the units of that time;
    # the noise itself may overflow
    def advance(state, step):
        log_missing, found, time = state
        rate, began, width, is_last = step
        within = _clock(rate, log_missing, noise)
        here = ~found & (is_last | (within <= width))
        goes_on = ~found & ~here & (width > 0)
        log_share = _log_noise(rate, jnp.where(goes_on, width, 1.0), noise) - log_missing
        log_share = jnp.where(goes_on, jnp.minimum(log_share, -jnp.finfo(rates.dtype).eps), -1.0)
        left = log_missing + jnp.log1p(-jnp.exp(log_share)) - 2 * rate * width
        return (jnp.where(goes_on, left, log_missing), found | here, jnp.where(here, began + within, time)), None

    positive = spread > 0
    log_spread = jnp.broadcast_to(jnp.log(jnp.where(positive, spread, 1.0)), shape).astype(rates.dtype)
    start = log_spread, jnp.zeros(shape, bool), jnp.full(shape, jnp.inf, rates.dtype)
    count = times.size - 1
    steps = jnp.moveaxis(rates, -1, 0), times[:-1], jnp.diff(times), jnp.arange(count) == count - 1
    (_, _, time), _ = jax.lax.scan(advance, start, steps)
    return jnp.where(positive, time, jnp.where(jnp.isnan(spread), jnp.nan, 0.0))


_LARGE = 40.0  # 1 is lost beside the exponential of a larger number


def _clock(rate: jax.Array, log_spread: jax.Array, noise: jax.Array) -> jax.Array:
    """`transition_time` of a spread that is given by its log."""
    large = log_spread > _LARGE
    rises = large & (rate > 0)
    safe = jnp.where(rises, rate, 1.0)
    far = jax.nn.softplus(log_spread + jnp.log(safe / noise)) / (2 * safe)
    near = transition_time(jnp.where(large, 1.0, rate), jnp.exp(jnp.where(large, 0.0, log_spread)), noise)
    return jnp.where(large, jnp.where(rises, far, jnp.inf), near)


def _log_noise(rate: jax.Array, t: jax.Array, noise: jax.Array) -> jax.Array:
    """Log of `mode_noise` at t > 0."""
    z = 2 * rate * t
    far = z > 1
    safe = jnp.where(far, z, 2.0)
    distant = jnp.log(noise / jnp.where(far, rate, 1.0)) + safe + jnp.log1p(-jnp.exp(-safe))
    return jnp.where(far, distant, jnp.log(mode_noise(jnp.where(far, 0.0, rate), t, noise)))


def schedule_response(rate: ArrayLike, spread: ArrayLike, times: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Response of a mode's speciation time to a coupling that slows the mode at the time s, per unit of coupling and of
    s: ``[spread - N(s)] / (D + rate spread)`` before the mode's own time, 0 after it (theory, eq. 13.15). Broadcasts.

    It is minus the functional derivative of the time in the rate, at a constant rate. It is largest at the data, s = 0,
    and falls to 0 at the mode's own time: a coupling at more noise than that changes nothing. It is NaN where the mode
    has no finite time.

    Args:
      rate: constant rate of the mode.
      spread: pulled-back noise at which the mode speciates, for example ``m^2 - s^2``.
      times: s >= 0.

    Raises:
      ValueError: a time is negative.
    """
    rate, spread, noise, times = (jnp.asarray(v, float) for v in (rate, spread, noise, times))
    require(~(times < 0), f"times must not be negative, got {times}")
    times = jnp.minimum(times, transition_time(rate, spread, noise))
    finite = noise + rate * spread > 0
    slope = jnp.where(finite, noise + rate * spread, jnp.nan)  # half the slope of the noise at the mode's own time
    return jnp.maximum(spread - mode_noise(rate, times, noise), 0.0) / slope


def schedule_time(beta: ArrayLike, times: ArrayLike) -> jax.Array:
    """OU times ``int beta / 2`` (..., T) of the process ``dx = -beta x / 2 ds + sqrt(beta) dW``. In this time its rate
    and noise strength are 1 (theory, section 12.4). `clock.ou_time` takes a table of signal powers instead.

    Args:
      beta: (..., T), linear between the times.
      times: (T,) increasing.

    Raises:
      ValueError: shapes do not belong together, or the times decrease.
    """
    beta, times = jnp.asarray(beta, float), jnp.asarray(times, float)
    if times.ndim != 1 or beta.shape[-1:] != times.shape:
        raise ValueError(f"{times.shape} times and beta {beta.shape} must be (T,) and (..., T)")
    require(~(jnp.diff(times) < 0), f"times must increase, got {times}")
    rise = jnp.diff(times) * (beta[..., 1:] + beta[..., :-1]) / 4
    return jnp.concatenate([jnp.zeros_like(rise[..., :1]), jnp.cumsum(rise, -1)], -1)
