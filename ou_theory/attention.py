"""What a gate does to a difference: the linearisation of gated attention (docs/theory.md, section 6).

One head; heads, the output projection and preceding linear maps only compose. Token matrices are (T, d); R replicas
are (R, T, d).
"""

from functools import partial
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from ou_theory.roots import require

GateKind = Literal["joint", "blend", "convex", "additive", "tanh"]
GATE_KINDS: tuple[GateKind, ...] = get_args(GateKind)

_matmul = partial(jnp.matmul, precision="highest")


def rho(g: jax.Array, kind: GateKind = "joint") -> jax.Array:
    """Gain of the difference mode of a symmetric pair on values and keys (theory, section 6.2): ``(1 - g) / (1 + g)``
    under `joint` and `blend`, for g in [0, 1], where the map is its own inverse (eqs. 5.1 and 6.3); ``1 - 2 g`` under
    `convex`, ``1 - g`` under `additive`, ``1 - tanh g`` under `tanh`.

    Raises:
      ValueError: another kind.
    """
    return rho_n(g, 2, kind)


def common_gain(g: jax.Array, kind: GateKind = "joint", num_replicas: int = 2) -> jax.Array:
    """Gain of the common mode of replicas coupled all to all, and of every mode on queries (theory, section 6.2): 1,
    but ``1 + (N - 1) g`` under `additive` and ``1 + (N - 1) tanh g`` under `tanh`.

    Raises:
      ValueError: another kind.
    """
    _check_kind(kind)
    if kind not in ("additive", "tanh"):
        return jnp.ones_like(g)
    return 1 + (num_replicas - 1) * (jnp.tanh(g) if kind == "tanh" else g)


def coupling_at(gain: jax.Array, kind: GateKind = "joint") -> jax.Array:
    """The coupling of a symmetric pair at which `rho` is `gain`: its inverse, for gains in (0, 1]. Kinds are compared
    fairly at equal gains (theory, section 6.2).

    Raises:
      ValueError: another kind.
    """
    _check_kind(kind)
    if kind in ("joint", "blend"):
        return (1 - gain) / (1 + gain)
    if kind == "convex":
        return (1 - gain) / 2
    return jnp.arctanh(1 - gain) if kind == "tanh" else 1 - gain


def xi(g: jax.Array) -> jax.Array:
    """Weight ``1 / (1 + g)`` of a replica's own keys under a `blend` gate, for g in [0, 1] (theory, section 6.2)."""
    return 1 / (1 + g)


def rho_n(g: jax.Array, num_replicas: int, kind: GateKind = "joint") -> jax.Array:
    """`rho` of N = `num_replicas` replicas coupled all to all, the same for every difference mode:
    ``(1 - g) / (1 + (N - 1) g)`` under `joint` and `blend`, for g in [0, 1] (theory, eq. 6.8); ``1 - N g`` under
    `convex`, for g in [0, 1 / (N - 1)]; the gain of a pair under `additive` and `tanh`.

    Raises:
      ValueError: fewer than 2 replicas, which have no difference; another kind.
    """
    _check_kind(kind)
    if num_replicas < 2:
        raise ValueError(f"a difference needs at least 2 replicas, got {num_replicas}")
    if kind in ("joint", "blend"):
        return (1 - g) / (1 + (num_replicas - 1) * g)
    if kind == "convex":
        return 1 - num_replicas * g
    return 1 - (jnp.tanh(g) if kind == "tanh" else g)


def _check_kind(kind: str) -> None:
    if kind not in GATE_KINDS:
        raise ValueError(f"gate kind {kind!r} is not one of {', '.join(GATE_KINDS)}")


def block_weights(gate: jax.Array, kind: GateKind) -> jax.Array:
    """Weights (..., R, R) with which replica a's output is made of what it reads from each replica b (theory, eq. 6.1).
    Under `joint` these are the weights at equal replicas, those of `blend`; elsewhere they depend on the tokens.

    Args:
      gate: (..., R, R), non-negative. Of a convex gate the diagonal is not read.

    Raises:
      ValueError: another kind; a gate that is negative, a row closed to all keys, or a convex row whose off-diagonal
        entries add up to more than 1.
    """
    _check_kind(kind)
    gate = jnp.asarray(gate)
    require(gate >= 0, f"a gate must not be negative, got {gate}")
    require(gate.sum(-1) > 0, f"every row of a gate must be open somewhere, got {gate}")
    if kind in ("joint", "blend"):
        return gate / gate.sum(-1, keepdims=True)
    own = jnp.eye(gate.shape[-1], dtype=bool)
    others = jnp.where(own, 0, jnp.tanh(gate) if kind == "tanh" else gate)
    diagonal = gate
    if kind == "convex":
        diagonal = 1 - others.sum(-1, keepdims=True)
        require(diagonal > -1e-6, f"the shares of others must add up to at most 1 in each row, got {gate}")
    return jnp.where(own, diagonal, others)


def gated_weights(q: jax.Array, k: jax.Array, gate: jax.Array, kind: GateKind) -> jax.Array:
    """Attention weights of coupled replicas, a plain transcription of eq. 6.1 of the theory, for checks.

    Args:
      q, k: (R, T, d) queries and keys.
      gate: (R, R), non-negative: entry (a, b) weighs replica b's keys for replica a's queries.
      kind: ``"joint"``: one softmax over all keys, whose exponentials the gate multiplies. The others: a softmax per
        replica of keys, times `block_weights`.

    Returns:
      (R, T, R, T): query replica, query, key replica, key. Each query's weights sum to the sum of its row of
      `block_weights`, which is 1 but under `additive` and `tanh`.

    Raises:
      ValueError: as `block_weights`.
    """
    blocks = block_weights(gate, kind)
    gate = jnp.asarray(gate)
    logits = jnp.einsum("aqd,bkd->aqbk", q, k, precision="highest") / q.shape[-1] ** 0.5
    if kind != "joint":
        largest = logits.max(-1, keepdims=True)
    else:  # the largest logit among the keys that the gate lets through
        largest = jnp.where(gate[:, None, :, None] > 0, logits, -jnp.inf).max((-2, -1), keepdims=True)
    # logits behind a closed gate may be larger; the bound keeps their exponentials finite, so that 0 times them is 0
    exponentials = jnp.exp(jnp.minimum(logits - jax.lax.stop_gradient(largest), 80.0))
    if kind != "joint":
        return blocks[:, None, :, None] * exponentials / exponentials.sum(-1, keepdims=True)
    weights = gate[:, None, :, None] * exponentials
    return weights / weights.sum((-2, -1), keepdims=True)


def gated_attention(q: jax.Array, k: jax.Array, v: jax.Array, gate: jax.Array, kind: GateKind) -> jax.Array:
    """Output (R, T, d) of one head of coupled replicas; see `gated_weights`."""
    return jnp.einsum("aqbk,bkd->aqd", gated_weights(q, k, gate, kind), v, precision="highest")


def pair_weights(q: jax.Array, k: jax.Array, g: jax.Array, kind: GateKind) -> jax.Array:
    """`gated_weights` of a pair under the symmetric gate with cross weight `g`: q, k (2, T, d) -> (2, T, 2, T)."""
    own = jnp.eye(2)
    return gated_weights(q, k, own + g * (1 - own), kind)


class Difference(NamedTuple):
    """The parts of a difference of attention outputs, each (..., T, d)."""

    routing: jax.Array  # through the values
    key: jax.Array  # through the pattern, by the keys
    query: jax.Array  # through the pattern, by the queries

    @property
    def total(self) -> jax.Array:
        return self.routing + self.key + self.query


def _response(q, k, v, dq, dk, dv) -> Difference:
    """Linear response (..., T, d) of attention at q, k, v (T, d) to changes (..., T, d) of its inputs."""
    scale = q.shape[-1] ** -0.5
    pattern = jax.nn.softmax(_matmul(q, k.T) * scale, -1)

    def bend(logits):  # derivative of the softmax along `logits`, applied to the values
        return _matmul(pattern * (logits - (pattern * logits).sum(-1, keepdims=True)), v)

    by_key, by_query = _matmul(q, jnp.swapaxes(dk, -1, -2)), _matmul(dq, k.T)
    return Difference(_matmul(pattern, dv), bend(by_key * scale), bend(by_query * scale))


def first_order_difference(q, k, v, dq, dk, dv, g: jax.Array, kind: GateKind = "joint") -> Difference:
    """Linear response of ``O_A - O_B`` to replicas at ``q +- dq / 2`` and so on (theory, eq. 6.3).

    It is the response of attention itself, with the differences of keys and values multiplied by `rho`, and those of
    queries by `common_gain`. `joint` and `blend` have the same one.

    Args:
      q, k, v, dq, dk, dv: (T, d), the common point and the differences.
      g: coupling in [0, 1].
      kind: of the gate.
    """
    return _response(q, k, v, common_gain(g, kind) * dq, rho(g, kind) * dk, rho(g, kind) * dv)


def first_order_response(q, k, v, dq, dk, dv, gate: jax.Array, kind: GateKind = "joint") -> Difference:
    """Linear response (R, T, d) of each replica's output to replicas at ``q + dq[a]`` and so on (theory, eq. 6.7).

    It is the response of attention itself, where the keys and values of a replica move by the displacements of all
    replicas, weighted by its row of `block_weights`, and its queries by their own times the sum of that row. `joint`
    and `blend` have the same one.

    Args:
      q, k, v: (T, d), the common point.
      dq, dk, dv: (R, T, d), the displacements.
      gate: (R, R), non-negative, as in `gated_weights`.
      kind: of the gate.
    """
    heeded = block_weights(gate, kind)
    dk, dv = (jnp.einsum("ab,btd->atd", heeded, z, precision="highest") for z in (dk, dv))
    return _response(q, k, v, heeded.sum(-1)[:, None, None] * dq, dk, dv)


def exact_difference(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, kind: GateKind) -> Difference:
    """The split of `first_order_difference` to all orders, for replicas at any distance (theory, section 6.3).

    The pattern part is divided between queries and keys by the two-player Shapley value: each difference is credited
    with the average of what it changes when it is switched on first and when second, symmetrised over its sign.

    Args:
      q, k, v: (2, T, d), one row per replica.
      g: coupling of the symmetric gate.
      kind: of the gate, see `gated_weights`.
    """

    def weights_at(dq_sign: int, dk_sign: int) -> jax.Array:
        """Attention weights with the replicas' differences of queries and keys times the signs."""

        def scaled(x, sign):
            mean, half = x.mean(0), (x[0] - x[1]) / 2
            return jnp.stack([mean + sign * half, mean - sign * half])

        return pair_weights(scaled(q, dq_sign), scaled(k, dk_sign), g, kind)

    weights = weights_at(1, 1)
    self_mean = (weights[0, :, 0] + weights[1, :, 1]) / 2
    cross_mean = (weights[0, :, 1] + weights[1, :, 0]) / 2
    mean_v = v.mean(0)
    routing = _matmul(self_mean - cross_mean, v[0] - v[1])

    def pattern(dq_sign, dk_sign):
        a = weights_at(dq_sign, dk_sign)
        # what are a replica's own keys are the other's cross keys; the sum over both is free of that exchange
        return _matmul((a[0] - a[1]).sum(1), mean_v)

    # exchanging the replicas flips dq, dk and the difference, so two of the four sign choices suffice
    aligned, opposed = pattern(1, 1), pattern(1, -1)
    query, key = (aligned + opposed) / 2, (aligned - opposed) / 2
    return Difference(routing, key, query)
