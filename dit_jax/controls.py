"""Two networks without attention, of what the DiT is compared with: a convolutional U-Net and a patchless MLP.

They are trained and sampled as the DiT is, and differ from it in one thing: how pixels reach each other. A convolution
sees neighbours, and the same ones everywhere. The MLP sees the flattened image and knows of no place in it. Neither has
attention, so that replicas cannot be coupled in them.
Shape letters: R replicas, N batch, D features, E width of the conditioning.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from dit_jax.attention import GateKind, Implementation
from dit_jax.config import ControlArchitecture, ControlConfig, DiTConfig, NetworkConfig
from dit_jax.inputs import check_images, check_labels
from dit_jax.model import (
    DiT,
    Edit,
    LayerNorm,
    Linear,
    Tap,
    TimestepEmbedder,
    label_embedder,
    modulate,
    patchify,
    unpatchify,
    widened,
)

CONDITIONING = 64  # width of the embedding of timestep and label
_xavier = nnx.initializers.xavier_uniform()
_zeros = nnx.initializers.zeros_init()


class Convolution(Linear):
    """A 3 x 3 convolution with zeros around the image: one `Linear` of every pixel's neighbourhood.

    Written as a matrix product, it has the precision of the DiT's products, and a gradient that is fast on CPUs.
    """

    def __init__(self, fan_in: int, fan_out: int, config: ControlConfig, rngs: nnx.Rngs, init=_xavier):
        super().__init__(9 * fan_in, fan_out, config, rngs, init)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        return super().__call__(neighbourhoods(inputs))


def neighbourhoods(x: jax.Array) -> jax.Array:
    """Images (..., H, W, C) -> (..., H, W, 9 C): every pixel with its neighbours, rows outer, channel fastest."""
    height, width = x.shape[-3:-1]
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 3) + [(1, 1), (1, 1), (0, 0)])
    return jnp.concatenate([padded[..., i : i + height, j : j + width, :] for i in range(3) for j in range(3)], -1)


class Block(nnx.Module):
    """The DiT's residual block under adaLN with two layers, of the kind `layer`, in place of attention and MLP."""

    def __init__(self, layer: type[Linear], width: int, config: ControlConfig, rngs: nnx.Rngs):
        self.norm = LayerNorm()
        self.first = layer(width, width, config, rngs)
        self.second = layer(width, width, config, rngs)
        self.adaln = Linear(CONDITIONING, 3 * width, config, rngs, _zeros)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Features x (R, N, H, W, D) and conditioning c (N, E) -> x after the block."""
        shift, scale, gate = jnp.split(self.adaln(nnx.silu(c))[:, None], 3, -1)  # (N, 1, D): one for all rows
        hidden = self.first(modulate(self.norm(x), shift, scale))
        hidden = nnx.gelu(widened(hidden), approximate=True).astype(x.dtype)
        return (widened(x) + widened(gate)[..., None, :] * widened(self.second(hidden))).astype(x.dtype)


class Head(nnx.Module):
    """The DiT's final layer: zero at initialisation."""

    def __init__(self, layer: type[Linear], width: int, fan_out: int, config: ControlConfig, rngs: nnx.Rngs):
        self.norm = LayerNorm()
        self.linear = layer(width, fan_out, config, rngs, _zeros)
        self.adaln = Linear(CONDITIONING, 2 * width, config, rngs, _zeros)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Features x (R, N, H, W, D) and conditioning c (N, E) -> outputs (R, N, H, W, fan_out)."""
        shift, scale = jnp.split(self.adaln(nnx.silu(c))[:, None], 2, -1)
        return self.linear(modulate(self.norm(x), shift, scale))


class Control(nnx.Module):
    """What both networks have: the conditioning, the checks, and `DiT.__call__` for replicas that are not coupled."""

    def __init__(self, config: ControlConfig, rngs: nnx.Rngs):
        self.config = config
        self.t_embedder = TimestepEmbedder(config, CONDITIONING, rngs)
        self.y_embedder = label_embedder(config, CONDITIONING, rngs)

    def body(self, x: jax.Array, c: jax.Array) -> jax.Array:
        """Images x (R, N, H, W, C) and conditioning c (N, E) -> (R, N, H, W, C_out)."""
        raise NotImplementedError

    def __call__(
        self,
        x: jax.Array,
        t: jax.Array,
        y: jax.Array,
        gate: jax.Array | None = None,
        *,
        kind: GateKind = "joint",
        attention: Implementation = "auto",
        tap: Tap | None = None,
        edit: Edit | None = None,
        unroll: int = 1,
    ) -> jax.Array:
        """Raw network output, under the signature of `DiT.__call__`.

        Args:
          x: (N, H, W, C), or (R, N, H, W, C) for R replicas of N pairs.
          t: (N,) timesteps on the original 0..999 grid, or times in [0, 1] of a network that was trained on a path of
            flow matching (`DiTConfig.path`); replicas share them.
          y: (N,) int labels; `config.num_classes` is the null label.
          gate: None, or one that couples nothing: identity matrices (..., R, R), not traced.
          kind, attention, unroll: without effect.
          tap, edit: must be None.

        Returns:
          (..., H, W, out_channels), of the shape of `x` but for the channels, at least float32.

        Raises:
          ValueError: the image does not fit the config, the gate couples or is traced, there is a tap or an edit, or a
            label that is not traced is out of range.
        """
        config = self.config
        check_images(x, config)
        check_labels(y, config)
        if gate is not None and (isinstance(gate, Tracer) or not _is_identity(gate, x)):
            raise ValueError(f"a {config.architecture} has no attention to couple replicas in: give no gate")
        if tap is not None or edit is not None:
            raise ValueError(f"taps and edits are of a DiT's activations, which a {config.architecture} has not")
        c = self.t_embedder(t) + self.y_embedder(y)
        inputs = x.astype(config.dtype)
        out = self.body(inputs[None], c)[0] if x.ndim == 4 else self.body(inputs, c)
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))


def _is_identity(gate: jax.Array, x: jax.Array) -> bool:
    """Whether the gate leaves each of the replicas of x (R, N, H, W, C) to itself."""
    replicas = x.shape[0]
    fits = x.ndim == 5 and gate.shape[-2:] == (replicas, replicas)
    return fits and bool(np.all(np.asarray(gate) == np.eye(replicas)))


class UNet(Control):
    """A convolutional U-Net of two resolutions, with `depth` blocks on the way down, below, and on the way up."""

    def __init__(self, config: ControlConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        width, wide = config.hidden_size, 2 * config.hidden_size

        def blocks(width: int) -> nnx.List:
            return nnx.List([Block(Convolution, width, config, rngs) for _ in range(config.depth)])

        self.stem = Convolution(config.in_channels, width, config, rngs)
        self.down = blocks(width)
        self.shrink = Linear(4 * width, wide, config, rngs)
        self.below = blocks(wide)
        self.grow = Linear(wide, 4 * width, config, rngs)
        self.merge = Linear(2 * width, width, config, rngs)
        self.up = blocks(width)
        self.head = Head(Convolution, width, config.out_channels, config, rngs)

    def body(self, x: jax.Array, c: jax.Array) -> jax.Array:
        x = self.stem(x)
        for block in self.down:
            x = block(x, c)
        half = unpatchify(self.shrink(patchify(x, 2)), 1)  # 2 x 2 pixels become one of twice the features
        for block in self.below:
            half = block(half, c)
        grown = unpatchify(self.grow(patchify(half, 1)), 2)
        x = self.merge(jnp.concatenate([x, grown], -1))
        for block in self.up:
            x = block(x, c)
        return self.head(x, c)


class MLP(Control):
    """A residual MLP of `depth` blocks on the flattened image.

    Every pixel site has its own rows in the first layer and its own columns in the last: the network has no prior of
    what is near what, and sites can be renamed in data and weights without any change.
    """

    def __init__(self, config: ControlConfig, rngs: nnx.Rngs):
        super().__init__(config, rngs)
        sites, width = config.input_size**2, config.hidden_size
        self.first = Linear(sites * config.in_channels, width, config, rngs)
        self.blocks = nnx.List([Block(Linear, width, config, rngs) for _ in range(config.depth)])
        self.head = Head(Linear, width, sites * config.out_channels, config, rngs)

    def body(self, x: jax.Array, c: jax.Array) -> jax.Array:
        features = self.first(x.reshape(*x.shape[:2], 1, 1, -1))  # as an image of a single pixel
        for block in self.blocks:
            features = block(features, c)
        return self.head(features, c).reshape(*x.shape[:-1], -1)


Network = DiT | UNet | MLP
CONTROLS: dict[ControlArchitecture, type[UNet] | type[MLP]] = {"unet": UNet, "mlp": MLP}


def make_network(config: NetworkConfig, rngs: nnx.Rngs) -> Network:
    """The network of a config, as it is before training."""
    if isinstance(config, ControlConfig):
        return CONTROLS[config.architecture](config, rngs)
    assert isinstance(config, DiTConfig)
    return DiT(config, rngs)
