"""Differences of exponentials and logarithms that stay accurate where they cancel."""

import jax
import jax.numpy as jnp


def exprel(x: jax.Array) -> jax.Array:
    """``(exp(x) - 1) / x``, 1 at 0, with finite derivatives there."""
    x = jnp.asarray(x, float)
    small = jnp.abs(x) < 1e-4
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 + x / 2 + x**2 / 6, jnp.expm1(safe) / safe)


def log1prel(x: jax.Array) -> jax.Array:
    """``log(1 + x) / x``, 1 at 0, with finite derivatives there; `x` > -1."""
    x = jnp.asarray(x, float)
    small = jnp.abs(x) < 1e-4
    safe = jnp.where(small, 1.0, x)
    return jnp.where(small, 1 - x / 2 + x**2 / 3, jnp.log1p(safe) / safe)
