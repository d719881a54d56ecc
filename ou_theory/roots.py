"""Roots in time that work under jit, vmap and grad, derivatives by the implicit function theorem."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

_HALVINGS = 64


def require(holds: ArrayLike, message: str) -> None:
    """ValueError unless `holds` everywhere; nothing is checked while values are traced."""
    if not isinstance(holds, Tracer) and not np.all(holds):
        raise ValueError(message)


def bisect(function: Callable[..., jax.Array], low: jax.Array, high: jax.Array, *parameters) -> jax.Array:
    """Bracket (low, high) of a fall through 0, to rounding, halved until it does not shrink.

    `function` maps (t, *parameters) to an array of t's shape, element by element.
    """

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) / 2
        above = function(middle, *parameters) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))


def implicit(function: Callable[..., jax.Array], root: jax.Array, found: jax.Array, *parameters) -> jax.Array:
    """A root found without derivatives, with all its derivatives in the parameters where `found`, and none elsewhere.

    `function` maps (t, *parameters) to an array of t's shape, element by element.
    """
    root = jax.lax.stop_gradient(root)

    def excess(t):
        return jnp.where(found, function(t, *parameters), t - root)

    return jax.lax.custom_root(
        excess, root, lambda _, guess: guess, lambda linear, value: value / linear(jnp.ones_like(value))
    )


@partial(jax.jit, static_argnums=0, static_argnames="rounding")
def falling_root(
    function: Callable[..., jax.Array],
    scale: jax.Array,
    *parameters,
    rounding: Callable[..., jax.Array] | None = None,
) -> jax.Array:
    """The t > 0 at which a strictly decreasing function passes 0.

    Args:
      function: maps (t, *parameters) to an array of t's shape, element by element. It may be NaN, by overflow or
        rounding, at times far below and far above `scale`; a root is then found in between.
      scale: guess of t, of the shape of the result; wrong by a factor of 2^50 it still serves, and `function` must be
        a number there.
      parameters: arrays or trees of arrays; the result is differentiable in these.
      rounding: of the form of `function`: how far its value may be off. Beyond `scale` it is seen to fall to 0 only
        if it falls by more than that over the last tenth of the time, else a level just above 0 may pass for a root.

    Returns:
      0 if the function is nowhere seen above 0, infinity if it is not seen to fall to 0, NaN if it is NaN at `scale`.
    """
    scale, fixed = jax.lax.stop_gradient((scale, parameters))
    reach = 60.0 if scale.dtype == jnp.float32 else 200.0

    def at(octave, *parameters):
        return function(scale * jnp.exp2(octave), *parameters)

    def away_from_nan(octave, *parameters):
        value = at(octave, *parameters)
        return jnp.where(jnp.isnan(value), -octave, value)

    low, high = bisect(away_from_nan, jnp.full_like(scale, -reach), jnp.full_like(scale, reach), *fixed)
    root = scale * jnp.exp2(high)
    # in turn: side by side, large batches of LAPACK's solves can wait for the same two threads for ever
    at_low, at_high, before, at_scale = jax.lax.map(
        lambda t: function(t, *fixed), jnp.stack([scale * jnp.exp2(low), root, 0.9 * root, scale])
    )
    # that an end moved says what the value was; evaluated again, it may round to the other side of 0
    starts = (low > -reach) & ~jnp.isnan(at_low)
    ends = (high < reach) & ~jnp.isnan(at_high)
    if rounding is not None:
        last, before = jax.lax.optimization_barrier((root, before))
        ends &= (high <= 0) | (before > rounding(last, *fixed))  # a level that is never left lies late
    found = starts & ends
    root = implicit(function, jnp.where(found, root, scale), found, *parameters)
    return jnp.where(found, root, jnp.where(jnp.isnan(at_scale), jnp.nan, jnp.where(starts, jnp.inf, 0.0)))
