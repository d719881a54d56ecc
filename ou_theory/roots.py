"""Roots in time that work under jit, vmap and grad. Their derivatives follow from the implicit function theorem
(docs/theory.md, section 13.1)."""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.typing import ArrayLike

_HALVINGS = 64


def require(holds: ArrayLike, message: str) -> None:
    """Raises ValueError with `message` unless `holds` is true everywhere. Traced values are not checked."""
    if not isinstance(holds, Tracer) and not np.all(holds):
        raise ValueError(message)


def bisect(function: Callable[..., jax.Array], low: jax.Array, high: jax.Array, *parameters) -> jax.Array:
    """Narrows a bracket by halving until it is as tight as rounding allows.

    Args:
      function: maps (t, *parameters) to an array of t's shape, element by element.
      low, high: ends of the bracket; the function is positive at `low` and falls through 0 before `high`.

    Returns:
      the ends (low, high) of the tight bracket.
    """

    def halve(_, bracket):
        low, high = bracket
        middle = low + (high - low) / 2
        above = function(middle, *parameters) > 0
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    return jax.lax.fori_loop(0, _HALVINGS, halve, (low, high))


def implicit(function: Callable[..., jax.Array], root: jax.Array, found: jax.Array, *parameters) -> jax.Array:
    """Gives a root that was found without derivatives its derivatives in the parameters.

    Args:
      function: maps (t, *parameters) to an array of t's shape, element by element; it is 0 at the root.
      root: value of the root.
      found: whether there is a root; elsewhere `root` is returned as a constant.
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
        rounding, at times far below and far above `scale`; the root is then looked for in between.
      scale: a guess of t, of the shape of the result. It may be wrong by a factor of 2^50, but `function` must not be
        NaN there.
      parameters: arrays or trees of arrays; the result is differentiable in these.
      rounding: maps the arguments of `function` to the rounding error of its value. A root beyond `scale` then counts
        only if the function falls by more than this error over the last tenth of the time. Without it, a function
        that levels off just above 0 may seem to have a root.

    Returns:
      the root; 0 if the function is not positive anywhere, infinity if it does not fall to 0, NaN if it is NaN at
      `scale`.
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
    # lax.map evaluates one time after another: large batches of LAPACK solves that run at once can deadlock, each
    # waiting for threads that the others hold
    at_low, at_high, before, at_scale = jax.lax.map(
        lambda t: function(t, *fixed), jnp.stack([scale * jnp.exp2(low), root, 0.9 * root, scale])
    )
    # An end of the bracket moves only where the function was found positive (low) or negative (high). That record is
    # used here, because the function, evaluated once more, may round to the other side of 0.
    starts = (low > -reach) & ~jnp.isnan(at_low)
    ends = (high < reach) & ~jnp.isnan(at_high)
    if rounding is not None:
        last, before = jax.lax.optimization_barrier((root, before))
        ends &= (high <= 0) | (before > rounding(last, *fixed))  # only at late times can it level off
    found = starts & ends
    root = implicit(function, jnp.where(found, root, scale), found, *parameters)
    return jnp.where(found, root, jnp.where(jnp.isnan(at_scale), jnp.nan, jnp.where(starts, jnp.inf, 0.0)))
