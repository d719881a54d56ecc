"""A DiT in PyTorch, written from the same facts as the JAX one, for checking conversions and for benchmarks.

Nothing else in the package imports this file; it needs the extra ``torch``. Its state dict has the official keys, so
that a checkpoint loads with ``load_state_dict``. Images are NCHW here, as PyTorch has them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dit_jax.config import DiTConfig

Stages = dict[str, Tensor]


class PatchEmbedder(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        p = config.patch_size
        self.proj = nn.Conv2d(config.in_channels, config.hidden_size, p, stride=p)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        width = config.hidden_size
        self.divisor = 127 if config.timestep_convention == "diffusers" else 128
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        dtype = next(self.parameters()).dtype
        wide = torch.promote_types(dtype, torch.float32)  # angles reach 999: never in 16 bits
        powers = torch.arange(128, dtype=wide, device=t.device) / self.divisor
        angles = t.to(wide)[:, None] * torch.exp(-math.log(10000.0) * powers)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], -1).to(dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.embedding_table = nn.Embedding(config.label_rows, config.hidden_size)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class Attention(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x (N, tokens, D); `bias` (N, 1, tokens, tokens) is added to the logits."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return self.proj(out.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm1 = _norm(config)
        self.norm2 = _norm(config, 1e-5 if config.timestep_convention == "diffusers" else 1e-6)
        self.attn, self.mlp = Attention(config), Mlp(config)
        self.adaLN_modulation = _modulation(config, 6)

    def forward(self, x: Tensor, c: Tensor, bias: Tensor | None, replicas: int, stages: Stages | None) -> Tensor:
        """x (R * N, T, D), replicas outermost; c (R * N, D)."""
        adaln = self.adaLN_modulation(c)
        shift1, scale1, gate1, shift2, scale2, gate2 = adaln[:, None].chunk(6, -1)
        norm1 = self.norm1(x)
        h = norm1 * (1 + scale1) + shift1
        if bias is None:
            attn_out = self.attn(h)
        else:  # one sequence of all replicas' tokens
            attn_out = _split_replicas(self.attn(_join_replicas(h, replicas), bias), replicas)
        x = x + gate1 * attn_out
        norm2 = self.norm2(x)
        mlp_out = self.mlp(norm2 * (1 + scale2) + shift2)
        x = x + gate2 * mlp_out
        if stages is not None:
            stages.update(adaln=adaln, norm1=norm1, attn_out=attn_out, norm2=norm2, mlp_out=mlp_out, resid_post=x)
        return x


class FinalLayer(nn.Module):
    def __init__(self, config: DiTConfig):
        super().__init__()
        self.norm = _norm(config)
        self.linear = nn.Linear(config.hidden_size, config.patch_features)
        self.adaLN_modulation = _modulation(config, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, -1)
        return self.linear(self.norm(x) * (1 + scale) + shift)


class TorchDiT(nn.Module):
    """``model(x, t, y)``: x (N, C, H, W), t and y (N,) -> (N, C_out, H, W).

    With `gate`, x is (R, N, C, H, W): replicas coupled by one softmax over all their keys, as ``kind="joint"``.
    """

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        self.pos_embed = nn.Parameter(torch.zeros(1, config.num_tokens, config.hidden_size), requires_grad=False)
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = TimestepEmbedder(config)
        self.y_embedder = LabelEmbedder(config)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_layer = FinalLayer(config)

    def forward(
        self, x: Tensor, t: Tensor, y: Tensor, gate: Tensor | None = None, stages: dict[str, Tensor] | None = None
    ) -> Tensor:
        """Runs the network. `gate` is (N, R, R). `stages` is a dict that is filled with activations by name; those of a
        block have names like ``blocks.3.attn_out``."""
        lead, replicas = x.shape[:-3], x.shape[0] if x.ndim == 5 else 1
        h = self.x_embedder(x.flatten(0, -4)) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        if stages is not None:
            stages.update({"embedded": h, "conditioning": c})
        c = c.repeat(replicas, 1)
        bias = None if gate is None else _log_gate(gate, h.shape[1], h.dtype)
        for i, block in enumerate(self.blocks):
            inside: Stages | None = None if stages is None else {}
            h = block(h, c, bias, replicas, inside)
            if stages is not None and inside is not None:
                stages.update({f"blocks.{i}.{name}": value for name, value in inside.items()})
        out = self.unpatchify(self.final_layer(h, c))
        return out.unflatten(0, lead) if x.ndim == 5 else out

    def unpatchify(self, x: Tensor) -> Tensor:
        config = self.config
        p, grid = config.patch_size, config.input_size // config.patch_size
        x = x.unflatten(1, (grid, grid)).unflatten(-1, (p, p, config.out_channels))  # (n, row, column, p, q, c)
        return x.permute(0, 5, 1, 3, 2, 4).reshape(-1, config.out_channels, grid * p, grid * p)


def _norm(config: DiTConfig, eps: float = 1e-6) -> nn.LayerNorm:
    return nn.LayerNorm(config.hidden_size, elementwise_affine=False, eps=eps)


def _modulation(config: DiTConfig, parts: int) -> nn.Sequential:
    return nn.Sequential(nn.SiLU(), nn.Linear(config.hidden_size, parts * config.hidden_size))


def _log_gate(gate: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    each = gate.log().repeat_interleave(tokens, 1).repeat_interleave(tokens, 2)
    return each[:, None].to(dtype)


def _join_replicas(x: Tensor, replicas: int) -> Tensor:
    return x.unflatten(0, (replicas, -1)).transpose(0, 1).flatten(1, 2)


def _split_replicas(x: Tensor, replicas: int) -> Tensor:
    return x.unflatten(1, (replicas, -1)).transpose(0, 1).flatten(0, 1)
