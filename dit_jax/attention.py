"""Multi-head attention of coupled replicas (docs/theory.md, section 6).

A gate is a non-negative matrix with unit diagonal: entry (a, b) weighs replica b's keys for replica a's queries.
Both couplings are computed block by block, one block per ordered pair of replicas, so that a zero gate adds
exact zeros: the uncoupled model is a special case in value and in derivative, with no logarithm of zero.
"""

from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

Coupling = Literal["joint", "blend"]
COUPLINGS: tuple[Coupling, ...] = ("joint", "blend")


def symmetric_gate(g, num_replicas: int = 2) -> jax.Array:
    """All-to-all gate: 1 on the diagonal, `g` elsewhere. `g` (...,) gives (..., R, R).

    Raises:
      ValueError: a concrete `g` is negative or not finite.
    """
    check_coupling(g)
    eye = jnp.eye(num_replicas)
    return eye + jnp.asarray(g)[..., None, None] * (1 - eye)


def anisotropic_gate(g_ab, g_ba) -> jax.Array:
    """Gate of a pair in which A reads B with weight `g_ab` and B reads A with `g_ba`: (...,) each gives (..., 2, 2).

    Raises:
      ValueError: a concrete entry is negative or not finite.
    """
    check_coupling(g_ab)
    check_coupling(g_ba)
    g_ab, g_ba = jnp.broadcast_arrays(jnp.asarray(g_ab, float), jnp.asarray(g_ba, float))
    one = jnp.ones_like(g_ab)
    return jnp.stack([jnp.stack([one, g_ab], -1), jnp.stack([g_ba, one], -1)], -2)


def check_coupling(g) -> None:
    """Raises ValueError if `g` is concrete and anywhere negative or not finite (traced values pass)."""
    if isinstance(g, Tracer):
        return
    values = np.asarray(g, np.float64)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"coupling must be finite and >= 0, got {g}")


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, gate: jax.Array | None = None, coupling: Coupling = "joint"
) -> tuple[jax.Array, jax.Array]:
    """Attention of R replicas that may read each other's keys and values.

    Args:
      q, k, v: (R, N, T, heads, head_dim).
      gate: (N, R, R) or (1, R, R), non-negative, unit diagonal; None leaves the replicas uncoupled.
      coupling: ``"joint"``: one softmax over all replicas' keys, the log of the gate added to the logits.
        ``"blend"``: a softmax per replica of keys, averaged with the gate's rows as weights.

    Returns:
      out: (R, N, T, heads, head_dim), in the dtype of `v`.
      pattern: (N, heads, R, T, R, T) attention weights, (query replica, query, key replica, key); for
        ``gate=None``, (N, heads, R, T, 1, T). Each row sums to 1. Free if unused under jit.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling {coupling!r} is not one of {', '.join(COUPLINGS)}")
    precision = None if q.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    accum = jnp.promote_types(q.dtype, jnp.float32)
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    if gate is None:
        logits = jnp.einsum("anqhd,ankhd->nhaqk", q, k, precision=precision, preferred_element_type=accum)
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
        mass = weights.sum(-1)
        out = jnp.einsum("nhaqk,ankhd->anqhd", weights.astype(v.dtype), v, precision=precision)
        weights, mass = weights[..., None, :], mass[..., None]
    else:
        logits = jnp.einsum("anqhd,bnkhd->nhaqbk", q, k, precision=precision, preferred_element_type=accum)
        gate = gate.astype(accum)[:, None, :, None, :]  # (n, h, a, q, b)
        weights = (_joint_weights if coupling == "joint" else _blend_weights)(logits, gate)
        mass = weights.sum((-2, -1))[..., None]
        out = jnp.einsum("nhaqbk,bnkhd->anqhd", weights.astype(v.dtype), v, precision=precision)
    # normalised after the product with v, where there are fewer numbers
    out = out / jnp.einsum("nhaqb->anqhb", mass).astype(v.dtype)
    return out, weights / mass[..., None]


def _joint_weights(logits: jax.Array, gate: jax.Array) -> jax.Array:
    """``gate exp(logits)`` up to a factor per row, the largest open entry being 1."""
    peak = jax.lax.stop_gradient(logits).max(-1)
    peak = jnp.where(gate > 0, peak, -jnp.inf).max(-1)[..., None, None]
    # only a closed block (gate 0) can lie far above the open ones; the cap keeps 0 * exp(..) and its slope finite
    return gate[..., None] * jnp.exp(jnp.minimum(logits - peak, 60.0))


def _blend_weights(logits: jax.Array, gate: jax.Array) -> jax.Array:
    """A softmax per block, the blocks weighted by the gate's rows."""
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits).max(-1, keepdims=True))
    return weights * (gate / gate.sum(-1, keepdims=True) / weights.sum(-1))[..., None]
