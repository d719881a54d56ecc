"""Rates and noise that change in time (docs/theory.md, sections 12.4 and 13.9).

A symmetric pair keeps its modes under any coupling g(t): the common mode has the rate ``b - g(t)``, the difference mode
``b + g(t)``. Rates are constant between the times of a grid, and everything is exact for that at any step; of a smooth
rate take the values in the middles of the steps, then the error is of second order in them. All functions work under
jit, vmap and grad.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ou_theory.process import mode_factor, mode_noise, mode_variance, transition_time
from ou_theory.roots import require


def _grid(rate_values: ArrayLike, times: ArrayLike) -> tuple[jax.Array, jax.Array]:
    rates, times = jnp.asarray(rate_values, float), jnp.asarray(times, float)
    if times.ndim != 1 or rates.ndim < 1 or rates.shape[-1] != times.size - 1:
        raise ValueError(f"{times.shape} times and rates {rates.shape} must be (T,) and (..., T - 1): one rate a step")
    require(~(jnp.diff(times) < 0), f"times must increase, got {times}")
    return rates, times


class ScheduledMode(NamedTuple):
    """A mode at the times of a grid, given where it started."""

    factor: jax.Array  # (..., T) ``exp(-int rate)``
    variance: jax.Array  # (..., T)


def scheduled_modes(rate_values: ArrayLike, times: ArrayLike, noise: ArrayLike = 1.0) -> ScheduledMode:
    """Factor and variance of a mode whose rate changes.

    Args:
      rate_values: (..., T - 1) rates between the times.
      times: (T,) increasing.
      noise: number.

    Raises:
      ValueError: shapes do not belong together, or the times decrease.
    """
    rates, times = _grid(rate_values, times)
    steps = jnp.diff(times)

    def join(first, second):
        return first[0] * second[0], second[0] ** 2 * first[1] + second[1]

    start = jnp.zeros((*rates.shape[:-1], 1), rates.dtype)
    factor = jnp.concatenate([start + 1, mode_factor(rates, steps)], -1)
    variance = jnp.concatenate([start, mode_variance(rates, steps, noise)], -1)
    return ScheduledMode(*jax.lax.associative_scan(join, (factor, variance), axis=-1))


def scheduled_noise(rate_values: ArrayLike, times: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Pulled-back noise ``N(t) = 2 D int_0^t exp(2 int_0^s rate) ds`` (..., T) of a mode whose rate changes; arguments
    as in `scheduled_modes`. It increases, and overflows where the mode has forgotten all."""
    rates, times = _grid(rate_values, times)
    return _noise(rates, times, jnp.asarray(noise, float))[1]


def _noise(rates: jax.Array, times: jax.Array, noise: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``exp(2 int rate)`` and the pulled-back noise at the times, (..., T) each."""
    steps = jnp.diff(times)
    start = jnp.zeros((*rates.shape[:-1], 1), rates.dtype)
    stretch = jnp.exp(2 * jnp.concatenate([start, jnp.cumsum(rates * steps, -1)], -1))
    added = stretch[..., :-1] * mode_noise(rates, steps, noise)
    return stretch, jnp.concatenate([start, jnp.cumsum(added, -1)], -1)


def scheduled_time(rate_values: ArrayLike, times: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Time (...) at which the pulled-back noise of a mode whose rate changes reaches `spread`: speciation for
    ``m^2 - s^2``, commitment for ``S (1 - q) / q``, as `process.transition_time` for a constant rate.

    The last rate goes on beyond the last time. 0 for ``spread <= 0``, infinite if the noise never gets there.

    Args:
      rate_values: (..., T - 1) rates between the times.
      times: (T,) increasing, from 0.
      spread: (...) or a number.
      noise: number.

    Raises:
      ValueError: shapes do not belong together, or the times decrease or do not begin at 0.
    """
    rates, times = _grid(rate_values, times)
    require(times[0] == 0, f"times must begin at 0, where the data are, got {times[0]}")
    spread, noise = jnp.asarray(spread, float), jnp.asarray(noise, float)
    stretch, gathered = (v[..., :-1] for v in _noise(rates, times, noise))
    # in the step in which it happens: the clock, for what is still missing, in the units of its beginning
    last = jnp.maximum((gathered < spread[..., None]).sum(-1, keepdims=True) - 1, 0)
    rates, stretch, gathered, began = (
        jnp.take_along_axis(jnp.broadcast_to(v, (*last.shape[:-1], rates.shape[-1])), last, -1)[..., 0]
        for v in (rates, stretch, gathered, times[:-1])
    )
    return jnp.where(spread <= 0, 0.0, began + transition_time(rates, (spread - gathered) / stretch, noise))


def schedule_response(rate: ArrayLike, spread: ArrayLike, times: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """How much later in t a mode speciates per unit of coupling that slows it at the time s and per unit of s:
    ``[spread - N(s)] / (D + rate spread)`` before its time, 0 after it; broadcasts.

    The functional derivative of the time in the rate, with a minus, at a constant rate. It is largest at the clean end
    and falls to 0 at the mode's own time: coupling at more noise than that changes nothing.

    Args:
      rate: of the mode; its time must be finite.
      spread: pulled-back noise at its time, for example ``m^2 - s^2``.
      times: s >= 0.
    """
    rate, spread, noise = (jnp.asarray(v, float) for v in (rate, spread, noise))
    times = jnp.minimum(jnp.asarray(times, float), transition_time(rate, spread, noise))
    return jnp.maximum(spread - mode_noise(rate, times, noise), 0.0) / (noise + rate * spread)


def schedule_time(beta: ArrayLike, times: ArrayLike) -> jax.Array:
    """OU times (..., T) ``int beta / 2`` of ``dx = -beta x / 2 ds + sqrt(beta) dW``, whose rate and noise strength on
    this clock are 1.

    Args:
      beta: (..., T), linear between the times. For a table of signal powers there is `clock.ou_time`.
      times: (T,).
    """
    beta, times = jnp.asarray(beta, float), jnp.asarray(times, float)
    if times.ndim != 1 or beta.shape[-1:] != times.shape:
        raise ValueError(f"{times.shape} times and beta {beta.shape} must be (T,) and (..., T)")
    rise = jnp.diff(times) * (beta[..., 1:] + beta[..., :-1]) / 4
    return jnp.concatenate([jnp.zeros_like(rise[..., :1]), jnp.cumsum(rise, -1)], -1)
