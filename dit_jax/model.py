"""The diffusion transformer (Peebles & Xie, arXiv 2212.09748) in Flax NNX.

One block is built with its parameters stacked over the layers and run under `jax.lax.scan`, so that it is compiled once
at any depth. Inside, tokens are (replica, batch, token, channel); only attention mixes replicas.
Shape letters: R replicas, N batch, T tokens, D width.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.extend.backend import get_default_device

from dit_jax.attention import GateKind, Implementation, attend, check_gate, read_pattern
from dit_jax.config import DiTConfig, NetworkConfig
from dit_jax.inputs import check_images, check_labels

Tap = Callable[[jax.Array, dict[str, jax.Array]], Any]
Edit = Callable[[str, jax.Array, jax.Array], jax.Array]

# The activations of every block, in the order in which they are computed: a tap is given them, an edit may change them.
ACTIVATIONS = {
    "resid_pre": "(R, N, T, D) residual stream before the block",
    "adaln": "(N, 6D) shift, scale and gate of attention, then of the MLP",
    "norm1": "(R, N, T, D) normalised residual, before shift and scale",
    "q": "(R, N, T, heads, head_dim) queries",
    "k": "(R, N, T, heads, head_dim) keys",
    "v": "(R, N, T, heads, head_dim) values",
    "pattern": "(N, heads, R, T, R or 1, T) attention weights, see `dit_jax.attention.attend`",
    "head_out": "(R, N, T, heads, head_dim) what each head read, before the output projection",
    "attn_out": "(R, N, T, D) attention output, before its gate",
    "resid_mid": "(R, N, T, D) residual stream between attention and MLP",
    "norm2": "(R, N, T, D) normalised residual, before shift and scale",
    "mlp_hidden": "(R, N, T, 4D) MLP features after the GELU",
    "mlp_out": "(R, N, T, D) MLP output, before its gate",
    "resid_post": "(R, N, T, D) residual stream after the block",
}

FREQUENCY_FEATURES = 256
_xavier = nnx.initializers.xavier_uniform()
_normal = nnx.initializers.normal(0.02)
_zeros = nnx.initializers.zeros_init()


class Constant(nnx.Variable):
    """An array that belongs to the weights but is not trained."""


def timestep_features(t: jax.Array, dtype=jnp.float32, divisor: int = FREQUENCY_FEATURES // 2) -> jax.Array:
    """Sinusoids of the raw timestep: t (N,) -> (N, 256), cosines first, frequencies 10000^(-i/divisor)."""
    half = FREQUENCY_FEATURES // 2
    angles = t.astype(dtype)[:, None] * jnp.exp(-math.log(10000.0) * jnp.arange(half, dtype=dtype) / divisor)[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def position_embedding(grid: int, width: int) -> np.ndarray:
    """The fixed 2-d position embedding (grid * grid, width) float32. The first half of the width encodes the column,
    the second half the row, each with the sines first."""
    frequencies = 10000.0 ** -(np.arange(width // 4) / (width / 4))
    angles = np.arange(grid)[:, None] * frequencies
    axis = np.concatenate([np.sin(angles), np.cos(angles)], -1)  # (grid, width / 2)
    column = np.broadcast_to(axis[None], (grid, grid, width // 2))
    row = np.broadcast_to(axis[:, None], (grid, grid, width // 2))
    return np.concatenate([column, row], -1).reshape(grid * grid, width).astype(np.float32)


def patchify(x: jax.Array, patch: int) -> jax.Array:
    """Images (..., H, W, C) -> patches (..., T, patch * patch * C), rows outer, channel fastest."""
    *lead, height, width, channels = x.shape
    x = x.reshape(*lead, height // patch, patch, width // patch, patch, channels)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, -1, patch * patch * channels)


def unpatchify(x: jax.Array, patch: int) -> jax.Array:
    """Inverse of `patchify` for a square image."""
    *lead, tokens, features = x.shape
    grid = round(tokens**0.5)
    x = x.reshape(*lead, grid, grid, patch, patch, features // patch**2)
    return jnp.swapaxes(x, -4, -3).reshape(*lead, grid * patch, grid * patch, -1)


def modulate(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Tokens (R, N, T, D) shifted and scaled by (R, N, D) or (N, D)."""
    return (widened(x) * (1 + widened(scale)[..., None, :]) + widened(shift)[..., None, :]).astype(x.dtype)


def widened(x: jax.Array) -> jax.Array:
    """The array in float32 or wider. What lies between two matrix products is computed in it, and rounded once."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class LayerNorm(nnx.Module):
    """Layer norm without parameters, computed in float32 or wider by two passes; E[x^2] - E[x]^2 would lose digits."""

    def __init__(self, eps: float = 1e-6):
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        wide = widened(x)
        centred = wide - wide.mean(-1, keepdims=True)
        return (centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)).astype(x.dtype)


class Linear(nnx.Linear):
    """`nnx.Linear` in the config's compute dtype. A float32 product has full float32 precision on any device (no TF32);
    a narrower dtype is summed in float32. A GPU rounds a bfloat16 result before the bias is added, and once after.
    """

    def __init__(self, fan_in: int, fan_out: int, config: NetworkConfig, rngs: nnx.Rngs, init=_xavier):
        self.compute_dtype = jnp.dtype(config.dtype)
        super().__init__(
            fan_in,
            fan_out,
            param_dtype=param_dtype(config),
            precision=None if config.dtype == "bfloat16" else jax.lax.Precision.HIGHEST,
            kernel_init=init,
            rngs=rngs,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        dtype = self.compute_dtype
        wide = jnp.promote_types(dtype, jnp.float32)
        assert self.bias is not None
        inputs, kernel, bias = inputs.astype(dtype), self.kernel[...].astype(dtype), self.bias[...]
        if dtype == jnp.bfloat16 and get_default_device().platform == "gpu":
            # A float32 result would be written to memory and read once more, a tenth of the time of a large network.
            return jnp.dot(inputs, kernel) + bias.astype(dtype)
        # The product is kept in float32 until the bias is added: a bfloat16 product would lose digits of the sum, and
        # would keep XLA from using the matrix units of CPUs.
        out = jnp.dot(inputs, kernel, precision=self.precision, preferred_element_type=wide)
        return (out + bias.astype(wide)).astype(dtype)


def param_dtype(config: NetworkConfig):
    """The dtype in which a model keeps its parameters: float64 for a float64 model, else float32."""
    return jnp.float64 if config.dtype == "float64" else jnp.float32


class TimestepEmbedder(nnx.Module):
    def __init__(self, config: NetworkConfig, width: int, rngs: nnx.Rngs):
        self.fc1 = Linear(FREQUENCY_FEATURES, width, config, rngs, _normal)
        self.fc2 = Linear(width, width, config, rngs, _normal)
        self.feature_dtype = param_dtype(config)
        self.divisor = FREQUENCY_FEATURES // 2 - (config.timestep_convention == "diffusers")

    def __call__(self, t: jax.Array) -> jax.Array:
        return self.fc2(nnx.silu(self.fc1(timestep_features(t, self.feature_dtype, self.divisor))))


def label_embedder(config: NetworkConfig, width: int, rngs: nnx.Rngs) -> nnx.Embed:
    """A vector (width,) for every label, the null label included if there is one."""
    return nnx.Embed(
        config.label_rows,
        width,
        dtype=jnp.dtype(config.dtype),
        param_dtype=param_dtype(config),
        embedding_init=_normal,
        rngs=rngs,
    )


class Attention(nnx.Module):
    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.qkv = Linear(config.hidden_size, 3 * config.hidden_size, config, rngs)
        self.proj = Linear(config.hidden_size, config.hidden_size, config, rngs)
        self.num_heads = config.num_heads

    def __call__(self, x: jax.Array, gate: jax.Array | None, options: "Options", at: "Point") -> jax.Array:
        qkv = self.qkv(x).reshape(*x.shape[:-1], 3, self.num_heads, -1)
        q, k, v = (at(name, qkv[..., i, :, :]) for i, name in enumerate("qkv"))
        out, pattern = attend(q, k, v, gate, options.kind, options.attention)
        edited = at("pattern", pattern)
        if edited is not pattern:
            out = read_pattern(edited, v)
        return self.proj(at("head_out", out).reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.fc1 = Linear(config.hidden_size, config.mlp_size, config, rngs)
        self.fc2 = Linear(config.mlp_size, config.hidden_size, config, rngs)

    def __call__(self, x: jax.Array, at: "Point") -> jax.Array:
        hidden = nnx.gelu(widened(self.fc1(x)), approximate=True).astype(x.dtype)
        return self.fc2(at("mlp_hidden", hidden))


class Options(NamedTuple):
    """How blocks are run. Nothing in it is traced."""

    kind: GateKind
    attention: Implementation
    edit: Edit | None


class Point:
    """Collects the activations of one block by name. ``at(name, value)`` returns the value, or what the edit makes of
    it."""

    def __init__(self, layer: jax.Array, edit: Edit | None):
        self.layer, self.edit = layer, edit
        self.activations: dict[str, jax.Array] = {}

    def __call__(self, name: str, value: jax.Array) -> jax.Array:
        if self.edit is not None:
            edited = self.edit(name, self.layer, value)
            if not hasattr(edited, "shape") or edited.shape != value.shape or edited.dtype != value.dtype:
                found = f"{edited.dtype}{edited.shape}" if hasattr(edited, "shape") else type(edited).__name__
                raise ValueError(
                    f"an edit must return {name} as it got it, {value.dtype}{value.shape} {ACTIVATIONS[name]}; got "
                    f"{found} (return the value itself where there is nothing to change)"
                )
            value = edited
        self.activations[name] = value
        return value


class Block(nnx.Module):
    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.norm1 = LayerNorm()
        self.norm2 = LayerNorm(1e-5 if config.timestep_convention == "diffusers" else 1e-6)
        self.attn = Attention(config, rngs)
        self.mlp = Mlp(config, rngs)
        self.adaln = Linear(config.hidden_size, 6 * config.hidden_size, config, rngs, _zeros)

    def __call__(
        self, layer: jax.Array, x: jax.Array, c: jax.Array, gate: jax.Array | None, options: Options
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Tokens x (R, N, T, D) and conditioning c (N, D) -> x after the block, and its named activations."""
        at = Point(layer, options.edit)
        x = at("resid_pre", x)
        adaln = at("adaln", self.adaln(nnx.silu(c)))
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = jnp.split(adaln, 6, -1)
        h = modulate(at("norm1", self.norm1(x)), shift_attn, scale_attn)
        x = at("resid_mid", _add(x, gate_attn, at("attn_out", self.attn(h, gate, options, at))))
        h = modulate(at("norm2", self.norm2(x)), shift_mlp, scale_mlp)
        x = at("resid_post", _add(x, gate_mlp, at("mlp_out", self.mlp(h, at))))
        return x, at.activations


def _add(x: jax.Array, gate: jax.Array, out: jax.Array) -> jax.Array:
    """The residual stream x (R, N, T, D) plus a sublayer's output (R, N, T, D) times its adaLN gate (N, D)."""
    return (widened(x) + widened(gate)[..., None, :] * widened(out)).astype(x.dtype)


class FinalLayer(nnx.Module):
    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        self.norm = LayerNorm()
        self.linear = Linear(config.hidden_size, config.patch_features, config, rngs, _zeros)
        self.adaln = Linear(config.hidden_size, 2 * config.hidden_size, config, rngs, _zeros)

    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        shift, scale = jnp.split(self.adaln(nnx.silu(c)), 2, -1)
        return self.linear(modulate(self.norm(x), shift, scale))


class DiT(nnx.Module):
    """A diffusion transformer with optional replica coupling in every attention layer.

    ``model(x, t, y)`` is the official function; ``model(x, t, y, gate=...)`` runs replicas that read each other.
    """

    def __init__(self, config: DiTConfig, rngs: nnx.Rngs):
        grid = config.input_size // config.patch_size
        width = config.hidden_size
        self.config = config
        self.x_embedder = Linear(config.patch_size**2 * config.in_channels, width, config, rngs)
        self.pos_embed = Constant(jnp.asarray(position_embedding(grid, width), param_dtype(config)))
        self.t_embedder = TimestepEmbedder(config, width, rngs)
        self.y_embedder = label_embedder(config, width, rngs)

        @nnx.split_rngs(splits=config.depth)
        @nnx.vmap(in_axes=(None, 0), out_axes=0)
        def stack(config: DiTConfig, rngs: nnx.Rngs) -> Block:
            return Block(config, rngs)

        self.blocks: Block | nnx.List = stack(config, rngs)
        self.final_layer = FinalLayer(config, rngs)

    def unstacked(self) -> "DiT":
        """The same function as a model that holds one array per layer instead of stacked ones. For running only: such a
        model cannot be trained or saved.

        Its blocks are compiled one by one, which takes longer, but their parameters are read where they lie. A scan
        copies the parameters of each layer out of the stack; on a CPU this takes up to a quarter of the time of a large
        network at small batches (benchmarks/RESULTS.md). The parameters of the blocks are copied: they take their
        memory twice until the stacked model is deleted."""
        if not isinstance(self.blocks, Block):
            return self
        graph, state = nnx.split(self)
        copy = nnx.merge(graph, state)
        blocks, weights = nnx.split(self.blocks)
        each = (jax.tree.map(lambda a, i=i: a[i], weights) for i in range(self.config.depth))
        copy.blocks = nnx.List([nnx.merge(blocks, layer) for layer in each])
        return copy

    def embed(self, x: jax.Array) -> jax.Array:
        """Images (..., H, W, C) -> tokens (..., T, D) with positions added."""
        tokens = self.x_embedder(patchify(x, self.config.patch_size))
        return tokens + self.pos_embed[...].astype(tokens.dtype)

    def condition(self, t: jax.Array, y: jax.Array) -> jax.Array:
        """Timesteps and labels (N,) -> conditioning vector (N, D).

        Raises:
          ValueError: a label is out of range. Traced labels are not checked.
        """
        check_labels(y, self.config)
        return self.t_embedder(t) + self.y_embedder(y)

    def readout(self, h: jax.Array, c: jax.Array) -> jax.Array:
        """The final layer on a residual stream: tokens (..., N, T, D), conditioning (N, D) -> (..., N, H, W, C_out)."""
        out = unpatchify(self.final_layer(h, c), self.config.patch_size)
        return out.astype(jnp.promote_types(out.dtype, jnp.float32))

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
    ) -> Any:
        """Raw network output. Call it under jit: outside, every call traces and compiles the layers anew.

        Args:
          x: (N, H, W, C), or (R, N, H, W, C) for R replicas of N pairs.
          t: (N,) timesteps on the original 0..999 grid, or times in [0, 1] of a network that was trained on a path of
            flow matching (`DiTConfig.path`); replicas share them.
          y: (N,) int labels; `config.num_classes` is the null label, if there is one.
          gate: (R, R), or any shape that broadcasts to (depth, N, R, R): one gate per layer, per pair, or both. None
            runs the replicas uncoupled.
          kind: of the gate, one of `dit_jax.attention.GATE_KINDS`, see `dit_jax.attention.attend`.
          attention: implementation, see `dit_jax.attention.attend`.
          tap: called as ``tap(layer, activations)`` in every block. `layer` is a traced int; `activations` is a dict
            with the names and shapes of `ACTIVATIONS`, and with ``"conditioning"`` (N, D), which is the same in all
            blocks. The pytree that it returns comes back stacked over layers; nothing else is kept.
          edit: called as ``edit(name, layer, value)`` for every name of `ACTIVATIONS`. What it returns must have the
            shape and dtype of `value`; it replaces `value`, also for a tap. Both functions must be pure.
          unroll: layers per scan iteration. A larger number compiles longer and makes training faster on CPUs; the
            result is the same.

        Returns:
          (..., H, W, out_channels), of the shape of `x` but for the channels, at least float32. With `tap`, a tuple of
          that and the taps.

        Raises:
          ValueError: the image does not fit the config, a gate comes without a replica axis or does not broadcast, an
            edit changes a shape or dtype, or a label or gate that is not traced is out of range.
        """
        config = self.config
        check_images(x, config)
        if gate is not None and x.ndim != 5:
            raise ValueError("a gate couples replicas: give x as (R, N, H, W, C)")
        single = x.ndim == 4
        if single:
            x = x[None]
        h = self.embed(x.astype(config.dtype))
        c = self.condition(t, y)
        gates = None if gate is None else _gates(gate, kind, config.depth, *x.shape[:2])
        options = Options(kind, attention, edit)

        def run(block: Block, h, index, gate):
            h, activations = block(index, h, c, gate, options)
            return h, None if tap is None else tap(index, {**activations, "conditioning": c})

        if isinstance(self.blocks, Block):
            graph, weights = nnx.split(self.blocks)
            layers = (weights, jnp.arange(config.depth), gates)
            h, taps = jax.lax.scan(lambda h, x: run(nnx.merge(graph, x[0]), h, *x[1:]), h, layers, unroll=unroll)
        else:
            each = []
            for i, block in enumerate(self.blocks):
                h, found = run(block, h, jnp.asarray(i), None if gates is None else gates[i])
                each.append(found)
            taps = jax.tree.map(lambda *layers: jnp.stack(layers), *each)
        out = self.readout(h[0] if single else h, c)
        return out if tap is None else (out, taps)


def _gates(gate: jax.Array, kind: GateKind, depth: int, replicas: int, pairs: int) -> jax.Array:
    """The gate, checked, and broadcast to (depth, N or 1, R, R)."""
    full = (depth, pairs, replicas, replicas)
    fits = 2 <= gate.ndim <= 4 and all(
        n in (1, m) for n, m in zip(gate.shape[:-2][::-1], full[:-2][::-1], strict=False)
    )
    if not fits or gate.shape[-2:] != full[-2:]:
        raise ValueError(
            f"gate {gate.shape} does not broadcast to (layers, pairs, replicas, replicas) = {full}; see "
            "dit_jax.attention.symmetric_gate"
        )
    check_gate(gate, kind)
    lead = jnp.broadcast_shapes(gate.shape[:-2], (depth, 1))
    return jnp.broadcast_to(gate, (*lead, replicas, replicas))
