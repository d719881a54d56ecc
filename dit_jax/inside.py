"""Ready-made taps and edits: what people most often want to see, or to change, inside a DiT.

Each is a plain function of the form that `DiT.__call__` takes, so yours go wherever these do; docs/inside.md has
examples. Layers count from 0.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.model import ACTIVATIONS, DiT, Edit, Tap

PER_REPLICA = tuple(name for name, shape in ACTIVATIONS.items() if shape.startswith("(R, "))


def keep(*names: str) -> Tap:
    """The tap that keeps these activations as they are: a dict of arrays with a leading axis of layers.

    Raises:
      ValueError: unknown name.
    """
    _check(names)
    return lambda layer, activations: {name: activations[name] for name in names}


def lens(model: DiT) -> Tap:
    """The tap that reads the output off after every block: the final layer applied to the residual stream there.

    Comes back as (depth, R, N, H, W, C_out); the last layer's is the output of the network. `denoised_at` in
    dit_jax.diffusion turns it into a denoised image per layer.
    """
    return lambda layer, activations: model.readout(activations["resid_post"], activations["conditioning"])


def residual_norm(layer: jax.Array, activations: dict[str, jax.Array]) -> jax.Array:
    """The tap of the root mean square of the residual stream after each block: (depth, R, N) float32."""
    resid = activations["resid_post"].astype(jnp.float32)
    return jnp.sqrt(jnp.square(resid).mean((-2, -1)))


def ablate(name: str, layers: Iterable[int] | None = None, heads: Sequence[int] | None = None) -> Edit:
    """The edit that sets an activation to zero, in these layers (all by default).

    Args:
      name: of `ACTIVATIONS`; ``"attn_out"`` or ``"mlp_out"`` takes a sublayer out, ``"head_out"`` heads.
      heads: for ``"head_out"`` only: these heads and no others.

    Raises:
      ValueError: unknown name, or heads of something that has none.
    """
    _check([name])
    if heads is not None and name != "head_out":
        raise ValueError(f"heads can be told apart in head_out, not in {name}")

    def change(value: jax.Array) -> jax.Array:
        return jnp.zeros_like(value) if heads is None else value.at[..., np.asarray(heads, int), :].set(0)

    return _in_layers(name, layers, change)


def copy_replica(name: str, source: int, target: int, layers: Iterable[int] | None = None) -> Edit:
    """The edit that patches replica `source`'s activation into replica `target`, in these layers (all by default).

    Raises:
      ValueError: unknown name, or one without a leading replica axis.
    """
    if name not in PER_REPLICA:
        raise ValueError(f"{name!r} has no replica axis in front; these have: {', '.join(PER_REPLICA)}")
    return _in_layers(name, layers, lambda value: value.at[target].set(value[source]))


def replace(name: str, values: jax.Array, layers: Iterable[int] | None = None) -> Edit:
    """The edit that puts stored activations in: `values` with a leading axis of all layers, as a tap gives them back.

    Raises:
      ValueError: unknown name.
    """
    _check([name])

    def edit(at: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        if at != name:
            return value
        stored = jnp.broadcast_to(jnp.asarray(values)[layer], value.shape).astype(value.dtype)
        return jnp.where(_chosen(layer, layers), stored, value)

    return edit


def chain(*edits: Edit) -> Edit:
    """The edits one after the other."""

    def edit(name: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        for each in edits:
            value = each(name, layer, value)
        return value

    return edit


def _in_layers(name: str, layers: Iterable[int] | None, change: Any) -> Edit:
    layers = None if layers is None else tuple(layers)

    def edit(at: str, layer: jax.Array, value: jax.Array) -> jax.Array:
        return jnp.where(_chosen(layer, layers), change(value), value) if at == name else value

    return edit


def _chosen(layer: jax.Array, layers: Iterable[int] | None) -> jax.Array:
    return jnp.asarray(True) if layers is None else jnp.isin(layer, np.asarray(tuple(layers), np.int32))


def _check(names: Iterable[str]) -> None:
    unknown = [name for name in names if name not in ACTIVATIONS]
    if unknown:
        raise ValueError(f"no activation {', '.join(map(repr, unknown))}; known: {', '.join(ACTIVATIONS)}")
