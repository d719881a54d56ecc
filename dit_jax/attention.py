"""Multi-head attention of coupled replicas (docs/theory.md, section 6).

A gate is a non-negative R x R matrix: entry (a, b) weighs replica b's keys for replica a's queries. The diagonal is 1,
or 0 in the row of a replica that reads the others alone. The kind of a gate says how it acts, see `attend`. A coupling
g is a number, the off-diagonal of a symmetric gate.

Two implementations agree to rounding. The *explicit* one computes the attention weights in blocks, one block per
ordered pair of replicas. A zero gate adds exact zeros, so that the uncoupled model is a special case in value and in
derivative. The *fused* one calls `jax.nn.dot_product_attention`, which never stores the weights on a GPU. The log of
a joint gate is constant over a block, and enters the product of queries and keys as a few more features per head; no
bias tensor is needed.

Shape letters: R (a, b) replicas, N batch, T tokens (q of queries, k of keys), H heads, d features of a head.
"""

from contextlib import nullcontext
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.backend import get_default_device

GateKind = Literal["joint", "blend", "convex", "additive", "tanh"]
GATE_KINDS: tuple[GateKind, ...] = ("joint", "blend", "convex", "additive", "tanh")
Implementation = Literal["auto", "explicit", "fused"]
IMPLEMENTATIONS: tuple[Implementation, ...] = ("auto", "explicit", "fused")

CLOSED = -1e4  # log of a zero gate on the fused path: its exponential is exactly 0, and 0 times it is 0, not NaN


def symmetric_gate(g, num_replicas: int = 2) -> jax.Array:
    """All-to-all gate (..., R, R) of couplings `g` (...,): 1 on the diagonal, `g` elsewhere.

    Raises:
      ValueError: a concrete `g` is negative or not finite.
    """
    check_coupling(g)
    eye = jnp.eye(num_replicas)
    return eye + jnp.asarray(g)[..., None, None] * (1 - eye)


def anisotropic_gate(g_ab, g_ba) -> jax.Array:
    """Gate (..., 2, 2) of a pair in which A reads B with the weight `g_ab` (...,) and B reads A with `g_ba` (...,).

    Raises:
      ValueError: a concrete entry is negative or not finite.
    """
    check_coupling(g_ab)
    check_coupling(g_ba)
    g_ab, g_ba = jnp.broadcast_arrays(jnp.asarray(g_ab, float), jnp.asarray(g_ba, float))
    one = jnp.ones_like(g_ab)
    return jnp.stack([jnp.stack([one, g_ab], -1), jnp.stack([g_ba, one], -1)], -2)


def check_coupling(g) -> None:
    """Raises ValueError if any number of `g` is negative or not finite. Traced values are not checked."""
    if isinstance(g, Tracer):
        return
    values = np.asarray(g, np.float64)
    if not np.all(np.isfinite(values)) or np.any(values < 0):
        raise ValueError(f"coupling must be finite and >= 0, got {g}")


def check_gate(gate, kind: GateKind = "joint") -> None:
    """Raises ValueError unless `gate` (..., R, R) is one of this kind. Traced values are not checked.

    Entries must be finite and not negative; the diagonal must be 1, or 0 in a row that is open elsewhere. The
    off-diagonal entries of a convex gate are shares: in each row they must add up to at most 1, and to 1 where the
    diagonal is 0.
    """
    check_coupling(gate)
    if isinstance(gate, Tracer):
        return
    values = np.asarray(gate, np.float64)
    own = np.diagonal(values, axis1=-2, axis2=-1)
    others = values.sum(-1) - own
    if not np.all((own == 1) | (own == 0)):
        raise ValueError(
            "the diagonal of a gate must be 1, the weight of a replica's own keys, or 0 where it reads the others "
            f"alone; got {gate}"
        )
    if np.any(own + others == 0):
        raise ValueError(f"every row of a gate must be open somewhere, got {gate}")
    rounding = 1e-6
    if kind == "convex" and np.any(others > 1 + rounding):
        raise ValueError(
            "the off-diagonal entries of a convex gate are shares, which add up to at most 1 in each row; got rows of "
            f"{others.max():g} (between R replicas a coupling is at most 1 / (R - 1))"
        )
    if kind == "convex" and np.any((own == 0) & (others < 1 - rounding)):
        raise ValueError(f"a convex row with diagonal 0 must have shares that add up to 1, got {gate}")


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    gate: jax.Array | None = None,
    kind: GateKind = "joint",
    implementation: Implementation = "auto",
) -> tuple[jax.Array, jax.Array]:
    """Attention of R replicas that may read each other's keys and values.

    Args:
      q, k, v: (R, N, T, H, d).
      gate: (N, R, R) or (1, R, R), see `check_gate`; None leaves the replicas uncoupled. A row with diagonal 0 reads
        the other replicas alone: ``1 - jnp.eye(2)`` is cross-attention of a pair.
      kind: of the gate (theory, eq. 6.1). ``"joint"``: one softmax over the keys of all replicas, with the log of the
        gate added to the logits. The others take one softmax for each replica's keys, and add what it reads with
        weights. ``"blend"``: the gate's rows, normalised. ``"convex"``: off-diagonal entries as they are, which are the
        shares of the others, and 1 minus their sum for a replica's own. ``"additive"``: the entries as they are,
        own + g other. ``"tanh"``: the same with the tanh of off-diagonal entries, as in the gated cross-attention of
        Flamingo (Alayrac et al., arXiv 2204.14198).
      implementation: ``"explicit"``, ``"fused"``, or ``"auto"``: fused in bfloat16 on a GPU, else explicit. The fused
        path of ``"joint"`` has no derivative with respect to a gate entry that is 0, and its zero entries are closed
        only as long as no logit behind them exceeds the open ones by 10,000. The choice goes by JAX's default device:
        if a bfloat16 model lies on another platform, make that the default (`jax.default_device`) or ask for
        ``"explicit"``.

    Returns:
      the output (R, N, T, H, d) in the dtype of `v`, and the attention weights (N, H, R, T, R, T) with the axes query
      replica, query, key replica, key; (N, H, R, T, 1, T) for ``gate=None``. Each row of weights sums to 1, but for
      ``"additive"`` and ``"tanh"``, whose rows sum to the sum of their block weights: 1 + g and 1 + tanh g for a
      symmetric pair. Under jit, weights that are not used cost nothing.

    Raises:
      ValueError: unknown `kind` or `implementation`.
    """
    if kind not in GATE_KINDS:
        raise ValueError(f"gate kind {kind!r} is not one of {', '.join(GATE_KINDS)}")
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"attention implementation {implementation!r} is not one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "auto":
        on_gpu = get_default_device().platform == "gpu"
        implementation = "fused" if q.dtype == jnp.bfloat16 and on_gpu else "explicit"
    weights, mass = _weights(q, k, gate, kind)
    pattern = weights / mass
    if implementation == "fused":
        return _fused(q, k, v, gate, kind), pattern
    # dividing after the product with v takes fewer operations
    out = _read(weights, v) / jnp.moveaxis(mass[..., 0], 1, 3).swapaxes(0, 1)
    return out.astype(v.dtype), pattern


def read_pattern(pattern: jax.Array, v: jax.Array) -> jax.Array:
    """The output (R, N, T, H, d) that an attention pattern, as `attend` returns it, reads from `v` (R, N, T, H, d)."""
    return _read(pattern, v).astype(v.dtype)


def _weights(q: jax.Array, k: jax.Array, gate: jax.Array | None, kind: GateKind) -> tuple[jax.Array, jax.Array]:
    """Weights (N, H, R, T, B, T), at least float32, and what they are still to be divided by (N, H, R, T, 1, 1).

    B is 1 without a gate, else R. All replicas' tokens go into one product per pair and head, of contiguous matrices.
    """
    replicas, batch, tokens, heads, dim = q.shape
    q = (q.astype(jnp.promote_types(q.dtype, jnp.float32)) * dim**-0.5).astype(q.dtype)
    if gate is None:
        logits = _product("...qd,...kd->...qk", _heads_out(q), _heads_out(k))  # (R, N, H, T, T)
        logits = jnp.moveaxis(logits, 0, 2)[..., None, :]
        weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    else:
        logits = _product("...qd,...kd->...qk", _joined(q), _joined(k))
        logits = logits.reshape(batch, heads, replicas, tokens, replicas, tokens)
        gate = gate.astype(logits.dtype)
        if kind != "joint":
            weights = _separate_weights(logits, _block_weights(gate, kind)[:, None, :, None, :])  # (N, 1, a, 1, b)
            return weights, jnp.ones((1,) * weights.ndim, weights.dtype)
        weights = _joint_weights(logits, gate[:, None, :, None, :])
    return weights, weights.sum((-2, -1), keepdims=True)


def _block_weights(gate: jax.Array, kind: GateKind) -> jax.Array:
    """Weights (..., R, R) of what a replica's queries read from each replica by a softmax over its keys."""
    if kind == "blend":
        return gate / gate.sum(-1, keepdims=True)
    eye = jnp.eye(gate.shape[-1], dtype=gate.dtype)
    own, others = gate * eye, gate * (1 - eye)
    if kind == "convex":
        own = (1 - others.sum(-1, keepdims=True)) * eye
    return own + (jnp.tanh(others) if kind == "tanh" else others)


def _joint_weights(logits: jax.Array, gate: jax.Array) -> jax.Array:
    """``gate exp(logits)``, divided by the largest open entry of each row."""
    is_open = gate >= jnp.finfo(gate.dtype).tiny
    log = jnp.where(is_open, jnp.log(jnp.where(is_open, gate, 1.0)), 0.0)
    peak = jax.lax.stop_gradient(logits).max(-1) + jax.lax.stop_gradient(log)
    peak = jnp.where(is_open, peak, -jnp.inf).max(-1, keepdims=True)
    # An open gate entry enters the exponential by its log, so that it may be of any size. A closed one multiplies the
    # exponential from outside, so that its value is exactly 0 and its slope exists. Logits far above the peak exist
    # only behind a closed entry; the cap keeps 0 * exp(...) and the slope finite.
    weights = jnp.exp(jnp.minimum(logits - (peak - log)[..., None], 60.0))
    return jnp.where(is_open, 1.0, gate)[..., None] * weights


def _separate_weights(logits: jax.Array, blocks: jax.Array) -> jax.Array:
    """One softmax for each block, times the weight of the block."""
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits).max(-1, keepdims=True))
    return weights * (blocks / weights.sum(-1))[..., None]


def _read(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Weights (N, H, R, T, B, T) times values (R, N, T, H, d), at least float32."""
    batch, heads, replicas, tokens, blocks, _ = weights.shape
    weights = weights.astype(v.dtype)
    if blocks == 1:
        out = _product("...qk,...kd->...qd", jnp.moveaxis(weights[..., 0, :], 2, 0), _heads_out(v))
        return out.swapaxes(2, 3)
    out = _product("...qk,...kd->...qd", weights.reshape(batch, heads, replicas * tokens, -1), _joined(v))
    return _parted(out.swapaxes(1, 2), replicas)


def _fused(q: jax.Array, k: jax.Array, v: jax.Array, gate: jax.Array | None, kind: GateKind) -> jax.Array:
    replicas, batch, tokens, heads, dim = q.shape
    device = get_default_device()

    def attention(q, k, v):  # (batch, tokens, H, features)
        bfloat16 = q.dtype == jnp.bfloat16
        implementation = "cudnn" if bfloat16 and _cudnn_takes(device, q.shape[-1]) else "xla"
        # it takes no `precision` argument, and would use TF32 on a GPU
        with nullcontext() if bfloat16 else jax.default_matmul_precision("highest"):
            return jax.nn.dot_product_attention(q, k, v, scale=dim**-0.5, implementation=implementation)

    def flat(x):  # (N, ..., T, H, d) -> (-1, T, H, d); N stays in front, so that a batch split over devices stays split
        return x.reshape(-1, *x.shape[-3:])

    if gate is None:
        out = attention(*(flat(x.swapaxes(0, 1)) for x in (q, k, v)))
        return out.reshape(batch, replicas, *out.shape[1:]).swapaxes(0, 1)
    gate = jnp.broadcast_to(gate, (batch, replicas, replicas))
    if kind != "joint":
        pairs = (batch, replicas, replicas, tokens, heads, dim)  # (N, a, b, T, H, d)
        queries = jnp.broadcast_to(q.swapaxes(0, 1)[:, :, None], pairs)
        keys, values = (jnp.broadcast_to(x.swapaxes(0, 1)[:, None], pairs) for x in (k, v))
        each = attention(flat(queries), flat(keys), flat(values)).reshape(pairs)
        blocks = _block_weights(gate, kind)
        return jnp.einsum("nab,nabthd->anthd", blocks.astype(v.dtype), each, precision=_precision(v))

    def sequence(x):  # (R, N, T, H, d) -> (N, R * T, H, d)
        return jnp.moveaxis(x, 0, 1).reshape(batch, replicas * tokens, heads, -1)

    for_queries, for_keys = _gate_features(gate, dim, q.dtype)
    lead = (replicas, batch, tokens, heads)
    q = jnp.concatenate([q, jnp.broadcast_to(for_queries[:, :, None, None], (*lead, for_queries.shape[-1]))], -1)
    k = jnp.concatenate([k, jnp.broadcast_to(for_keys[:, None, None, None], (*lead, for_keys.shape[-1]))], -1)
    v = jnp.pad(v, [(0, 0)] * 4 + [(0, for_keys.shape[-1])])
    out = attention(sequence(q), sequence(k), sequence(v))[..., :dim]
    return _parted(out, replicas)


def _cudnn_takes(device, features: int) -> bool:
    """Whether cuDNN's attention runs heads of so many features on this device. It needs CUDA (ROCm is a "gpu" too), and
    a multiple of 8 features, at most 128 before Hopper and 256 since."""
    if device.platform != "gpu" or "cuda" not in device.client.platform_version.lower():
        return False
    most = 256 if float(device.compute_capability) >= 9 else 128
    return features % 8 == 0 and features <= most


def _gate_features(gate: jax.Array, dim: int, dtype) -> tuple[jax.Array, jax.Array]:
    """Features whose product, times ``dim ** -0.5``, is the log of the gate: queries (R, N, F) and keys (R, F).

    The keys of replica b are one-hot in b. In bfloat16 a log is split over three features, which add up to float32
    accuracy in the accumulator. F is chosen so that the head dimension becomes a multiple of 8, which cuDNN needs.
    """
    replicas = gate.shape[-1]
    log = jnp.where(gate > 0, jnp.log(jnp.where(gate > 0, gate, 1.0)), CLOSED)
    rest = jnp.maximum(log, CLOSED) * dim**0.5
    parts = []
    for _ in range(3 if dtype == jnp.bfloat16 else 1):
        parts.append(rest.astype(dtype))
        rest = rest - parts[-1].astype(rest.dtype)
    queries = jnp.moveaxis(jnp.concatenate(parts, -1), 0, 1)
    keys = jnp.tile(jnp.eye(replicas, dtype=dtype), (1, len(parts)))
    fill = -(dim + keys.shape[-1]) % 8
    return jnp.pad(queries, [(0, 0), (0, 0), (0, fill)]), jnp.pad(keys, [(0, 0), (0, fill)])


def _product(subscripts: str, left: jax.Array, right: jax.Array) -> jax.Array:
    accum = jnp.promote_types(left.dtype, jnp.float32)
    return jnp.einsum(subscripts, left, right, precision=_precision(left), preferred_element_type=accum)


def _precision(x: jax.Array):
    return None if x.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


def _heads_out(x: jax.Array) -> jax.Array:
    """(..., T, H, d) -> (..., H, T, d)."""
    return x.swapaxes(-3, -2)


def _joined(x: jax.Array) -> jax.Array:
    """(R, N, T, H, d) -> (N, H, R * T, d): the tokens of all replicas as one sequence."""
    replicas, batch, tokens, heads, dim = x.shape
    return jnp.transpose(x, (1, 3, 0, 2, 4)).reshape(batch, heads, replicas * tokens, dim)


def _parted(x: jax.Array, replicas: int) -> jax.Array:
    """(N, R * T, H, d) -> (R, N, T, H, d)."""
    return jnp.moveaxis(x.reshape(x.shape[0], replicas, -1, *x.shape[2:]), 1, 0)
