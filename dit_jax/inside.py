"""Ready-made taps and edits: what people most often want to see, or to change, inside a DiT.

Each is a plain function of the form that `DiT.__call__` takes, and so are your own; docs/inside.md has examples.
Layers, heads and replicas count from 0. An edit is not told the depth of the network, so that layers beyond the last
change nothing."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.attention import check_coupling
from dit_jax.model import ACTIVATIONS, DiT, Edit, Tap

PER_REPLICA = tuple(name for name, shape in ACTIVATIONS.items() if shape.startswith("(R, "))


def keep(*names: str) -> Tap:
    """The tap that keeps activations as they are: a dict of arrays with a leading axis of layers, see `ACTIVATIONS`.

    Raises:
      ValueError: unknown name.
    """
    _check(names)
    return lambda layer, activations: {name: activations[name] for name in names}


def lens(model: DiT) -> Tap:
    """The tap that applies the final layer to the residual stream after every block.

    It comes back as (depth, R, N, H, W, C_out); that of the last layer is the output of the network.
    `dit_jax.objective.denoised_at` turns it into a denoised image per layer.
    """
    return lambda layer, activations: model.readout(activations["resid_post"], activations["conditioning"])


def residual_norm(layer: jax.Array, activations: dict[str, jax.Array]) -> jax.Array:
    """The tap that keeps the root mean square of the residual stream after each block: (depth, R, N) float32."""
    resid = activations["resid_post"].astype(jnp.float32)
    return jnp.sqrt(jnp.square(resid).mean((-2, -1)))


def ablate(name: str, layers: Iterable[int] | None = None, heads: Sequence[int] | None = None) -> Edit:
    """The edit that sets an activation to zero, in these layers (all by default).

    Args:
      name: one of `ACTIVATIONS`. ``"attn_out"`` or ``"mlp_out"`` removes a sublayer, ``"head_out"`` removes heads.
      heads: the heads to remove, for ``"head_out"`` only; all by default.

    Raises:
      ValueError: the name is unknown, a layer is negative, or heads are given for another activation; when it is used:
        there are no such heads.
    """
    _check([name])
    if heads is not None and name != "head_out":
        raise ValueError(f"heads can be told apart in head_out, not in {name}")

    def change(value: jax.Array) -> jax.Array:
        if heads is None:
            return jnp.zeros_like(value)
        _check_inside("head", heads, value.shape[-2])
        return value.at[..., np.asarray(heads, int), :].set(0)

    return _in_layers(name, layers, change)


def copy_replica(name: str, source: int, target: int, layers: Iterable[int] | None = None) -> Edit:
    """The edit that replaces replica `target`'s activation by that of replica `source`, in these layers (all by
    default).

    Raises:
      ValueError: the name is unknown or has no replica axis in front, or a layer is negative; when it is used: there
      are
        no such replicas.
    """
    if name not in PER_REPLICA:
        raise ValueError(f"{name!r} has no replica axis in front; these have: {', '.join(PER_REPLICA)}")

    def change(value: jax.Array) -> jax.Array:
        _check_inside("replica", (source, target), len(value))
        return value.at[target].set(value[source])

    return _in_layers(name, layers, change)


def replace(name: str, values: jax.Array, layers: Iterable[int] | None = None) -> Edit:
    """The edit that puts stored activations in place, in these layers (all by default).

    Args:
      values: with a leading axis of all layers, as a tap gives them back.

    Raises:
      ValueError: the name is unknown, or `values` does not have the layers.
    """
    _check([name])
    layers = _checked(layers)
    _check_inside("layer", layers or (), len(values))

    def edit(at: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        if at != name:
            return value
        stored = jnp.broadcast_to(jnp.asarray(values)[layer], value.shape).astype(value.dtype)
        return jnp.where(_chosen(layer, layers), stored, value)

    return edit


def close_heads(heads: Sequence[int] | np.ndarray | jax.Array, layers: Iterable[int] | None = None) -> Edit:
    """The edit that uncouples heads under any gate, in these layers (all by default).

    In the patterns of these heads only the blocks of a replica's own keys are kept, and normalised. That is their
    attention without coupling, for every kind of gate. Where a gate gives a replica's own keys no weight at all (in a
    row with diagonal 0, or a convex row whose shares add up to 1), the pattern does not hold it, and the result is NaN.

    Args:
      heads: indices; or booleans (heads,) or (N, heads), True where a head is closed. Booleans may be traced, so that
        others of the same shape do not compile again.

    Raises:
      ValueError: a layer is negative; when it is used: there are no such heads, or booleans have another shape.
    """
    if not isinstance(heads, np.ndarray | jax.Array) or heads.dtype != bool:
        heads = tuple(int(head) for head in heads)

    def change(value: jax.Array) -> jax.Array:
        batch, count, replicas, _, blocks, _ = value.shape
        if isinstance(heads, tuple):
            _check_inside("head", heads, count)
            closed = jnp.isin(np.arange(count), np.asarray(heads, np.int32))
        else:
            if heads.shape not in ((count,), (1, count), (batch, count)):
                raise ValueError(f"closed heads {heads.shape} are neither ({count},) nor ({batch}, {count})")
            closed = jnp.asarray(heads)
        if blocks == 1:  # without a gate there are only own keys
            return value
        own = value * jnp.eye(replicas, dtype=value.dtype)[:, None, :, None]
        own = own / own.sum((-2, -1), keepdims=True)
        return jnp.where(closed.reshape(-1, count, 1, 1, 1, 1), own, value)

    return _in_layers("pattern", layers, change)


def share(name: str, weight: float | jax.Array, layers: Iterable[int] | None = None) -> Edit:
    """The edit by which replicas share their queries, keys or values, in these layers (all by default).

    Replica a gets ``(x_a + w sum of the others) / (1 + (R - 1) w)``. With the weight 0 nothing changes; with 1 all
    replicas get the mean.

    Args:
      name: ``"q"``, ``"k"`` or ``"v"``.
      weight: w >= 0, a number or (N,), which may be traced.

    Raises:
      ValueError: the name is another, a layer is negative, or the weight is negative or not finite; when it is used:
      the
        weight has another shape.
    """
    if name not in ("q", "k", "v"):
        raise ValueError(f"q, k or v can be shared, not {name!r}")
    check_coupling(weight)

    def change(value: jax.Array) -> jax.Array:
        w = jnp.asarray(weight, jnp.promote_types(value.dtype, jnp.float32))
        if w.shape not in ((), (1,), value.shape[1:2]):
            raise ValueError(f"weight {w.shape} is neither a scalar nor one for each of {value.shape[1]} pairs")
        w = w.reshape(-1, 1, 1, 1)
        wide = value.astype(w.dtype)
        mixed = ((1 - w) * wide + w * wide.sum(0)) / (1 + (len(value) - 1) * w)
        return mixed.astype(value.dtype)

    return _in_layers(name, layers, change)


def chain(*edits: Edit) -> Edit:
    """The edit that applies these edits one after the other."""

    def edit(name: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        for each in edits:
            value = each(name, layer, value)
        return value

    return edit


def _in_layers(name: str, layers: Iterable[int] | None, change: Any) -> Edit:
    layers = _checked(layers)

    def edit(at: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(_chosen(layer, layers), change(value), value) if at == name else value

    return edit


def _checked(layers: Iterable[int] | None) -> tuple[int, ...] | None:
    layers = None if layers is None else tuple(layers)
    if layers is not None and any(layer < 0 for layer in layers):
        raise ValueError(f"layers count from 0, got {', '.join(map(str, layers))}")
    return layers


def _chosen(layer: jax.Array, layers: tuple[int, ...] | None) -> jax.Array:
    return jnp.asarray(True) if layers is None else jnp.isin(layer, np.asarray(layers, np.int32))


def _check_inside(what: str, indices: Iterable[int], count: int) -> None:
    outside = [index for index in indices if not 0 <= index < count]
    if outside:
        raise ValueError(f"no {what} {', '.join(map(str, outside))}: there are {count}, from 0")


def _check(names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in ACTIVATIONS]
    if unknown:
        raise ValueError(f"no activation {', '.join(map(repr, unknown))}; known: {', '.join(ACTIVATIONS)}")
