"""Differences of exponentials and logarithms that stay accurate where they cancel, in value and in derivative."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

_SERIES_BELOW = 0.02  # smaller arguments use the series, which reach double precision; larger ones the plain quotient
_EXPREL = [1 / 40320, 1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0]
_LOG1PREL = [-1 / 10, 1 / 9, -1 / 8, 1 / 7, -1 / 6, 1 / 5, -1 / 4, 1 / 3, -1 / 2, 1.0]


def exprel(x: ArrayLike) -> jax.Array:
    """``(exp(x) - 1) / x`` for any real `x`, which is 1 at 0."""
    x = jnp.asarray(x, float)
    small = jnp.abs(x) < _SERIES_BELOW
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, jnp.polyval(jnp.array(_EXPREL, x.dtype), jnp.where(small, x, 0.0)), jnp.expm1(safe) / safe)


def log1prel(x: ArrayLike) -> jax.Array:
    """``log(1 + x) / x`` for ``x >= -1``, which is 1 at 0 and infinite at -1."""
    x = jnp.asarray(x, float)
    small = jnp.abs(x) < _SERIES_BELOW
    safe = jnp.where(small, 1.0, x)
    return jnp.where(
        small, jnp.polyval(jnp.array(_LOG1PREL, x.dtype), jnp.where(small, x, 0.0)), jnp.log1p(safe) / safe
    )
