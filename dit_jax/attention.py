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
        logits = logits[..., None, :]
    else:
        logits = jnp.einsum("anqhd,bnkhd->nhaqbk", q, k, precision=precision, preferred_element_type=accum)
    peak = jax.lax.stop_gradient(logits.max(-1))  # (n, h, a, q, b): of each block
    weights = jnp.exp(logits - peak[..., None])
    mass = weights.sum(-1)
    weights = weights.astype(v.dtype)
    if gate is None:
        out = jnp.einsum("nhaqk,ankhd->anqhd", weights[..., 0, :], v, precision=precision)
        scale = 1 / mass
        out = out * jnp.einsum("nhaqb->anqhb", scale).astype(v.dtype)
        return out, weights * scale[..., None]
    blocks = jnp.einsum("nhaqbk,bnkhd->anqhbd", weights, v, precision=precision)
    scale = _block_scale(peak, mass, gate.astype(accum)[:, None, :, None, :], coupling)
    out = jnp.einsum("anqhbd,nhaqb->anqhd", blocks, scale.astype(v.dtype), precision=precision)
    return out, weights * scale[..., None]


def _block_scale(peak: jax.Array, mass: jax.Array, gate: jax.Array, coupling: Coupling) -> jax.Array:
    """Factor (n, h, a, q, b) that turns each block's ``exp(logits - peak)`` into attention weights."""
    if coupling == "blend":
        return gate / gate.sum(-1, keepdims=True) / mass
    open_peak = jnp.where(gate > 0, peak, -jnp.inf).max(-1, keepdims=True)
    # Only a closed block (gate 0) can lie far above the open ones; the cap keeps 0 * exp(..) and its slope finite.
    lift = gate * jnp.exp(jnp.minimum(peak - open_peak, 60.0))
    return lift / (lift * mass).sum(-1, keepdims=True)
