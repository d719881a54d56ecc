"""Gives checkpoints in the form of Hugging Face's diffusers the official keys.

That form keeps the embedders of timestep and label in every block, splits qkv in three and leaves the position
embedding out. Its tensors are the official ones; its model code is not the official function (see `NOTE_OFFICIAL`).
"""

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from dit_jax.facts import Said, config_facts
from dit_jax.model import position_embedding
from dit_jax.tensors import Entry, WeightsError

NOTE_OFFICIAL = (
    "the weights are in the diffusers form and run with the official formulas. The model code of diffusers computes "
    "something else: timestep frequencies divided by 127, not 128, and an eps of 1e-5, not 1e-6, in every second norm. "
    "For its outputs, convert or load with the timestep convention 'diffusers'"
)
NOTE_DIFFUSERS = (
    "the model computes what the model code of diffusers does (timestep frequencies divided by 127, eps 1e-5 in every "
    "second norm), which is not the function that the weights were trained for"
)

ONCE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
IN_BLOCK = {
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}
EMBEDDERS = {  # a copy in every block
    "norm1.emb.timestep_embedder.linear_1.weight": "t_embedder.mlp.0.weight",
    "norm1.emb.timestep_embedder.linear_1.bias": "t_embedder.mlp.0.bias",
    "norm1.emb.timestep_embedder.linear_2.weight": "t_embedder.mlp.2.weight",
    "norm1.emb.timestep_embedder.linear_2.bias": "t_embedder.mlp.2.bias",
    "norm1.emb.class_embedder.embedding_table.weight": "y_embedder.embedding_table.weight",
}
QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")

# The values that entries of a config.json must have, if they are there, for the function to be a DiT's. The rest of the
# function follows from the shapes.
FIXED: dict[str, tuple] = {
    "activation_fn": ("gelu-approximate",),
    "norm_type": ("ada_norm_zero",),
    "norm_elementwise_affine": (False,),
    "norm_eps": (1e-5,),  # of every second norm in that library's code
    "attention_bias": (True,),
    "attention_type": ("default",),
    "cross_attention_dim": (None,),
    "caption_channels": (None,),
    "num_vector_embeds": (None,),
    "only_cross_attention": (False,),
    "double_self_attention": (False,),
    "use_linear_projection": (False,),
    "use_additional_conditions": (None, False),
    "interpolation_scale": (None, 1, 1.0),
}
SIZES = ("sample_size", "patch_size", "num_layers", "num_attention_heads", "attention_head_dim", "in_channels")
MAX_GRID = 128  # patches along a side; 32 in the released model of 512 px
UNUSED = {"out_channels", "num_embeds_ada_norm", "prediction_type", "dropout", "norm_num_groups", "upcast_attention"}


def is_diffusers(keys: Mapping[str, Any]) -> bool:
    return any(key.startswith("transformer_blocks.") for key in keys)


def official_entries(
    entries: Mapping[str, Entry | None], config: dict | None, label: str
) -> tuple[dict[str, Entry | None], Said]:
    """The same tensors under official keys, and what the config.json says beside their shapes.

    Keys that this form does not have keep their names, so that the official table reports them.

    Raises:
      WeightsError: there is no config.json, it describes another model, or, when read, the blocks' embedders differ.
    """
    sizes = _sizes(config, label)
    pending = dict(entries)
    found: dict[str, Entry | None] = {}
    for theirs, ours in ONCE.items():
        for part in ("weight", "bias"):
            _move(pending, found, f"{theirs}.{part}", f"{ours}.{part}")
    numbers = (re.match(r"transformer_blocks\.(\d{1,6})\.", key) for key in entries)
    depth = 1 + max((int(number[1]) for number in numbers if number), default=-1)
    if depth != sizes["num_layers"]:
        raise WeightsError(f"{label} has {depth} blocks, its config.json says {sizes['num_layers']}")
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for theirs, ours in IN_BLOCK.items():
            for part in ("weight", "bias"):
                _move(pending, found, f"{block}.{theirs}.{part}", f"blocks.{i}.{ours}.{part}")
        for part in ("weight", "bias"):
            _join(pending, found, [f"{block}.{name}.{part}" for name in QKV], f"blocks.{i}.attn.qkv.{part}")
    for theirs, ours in EMBEDDERS.items():
        _merge(pending, found, [f"transformer_blocks.{i}.{theirs}" for i in range(depth)], ours, label)
    grid, width = (
        sizes["sample_size"] // sizes["patch_size"],
        sizes["num_attention_heads"] * sizes["attention_head_dim"],
    )
    bias = entries.get("pos_embed.proj.bias")
    if bias is None or bias.shape != (width,):  # checked before a position embedding of that width is computed
        raise WeightsError(f"{label}: pos_embed.proj.bias does not have the {width} numbers that config.json says")
    found["pos_embed"] = Entry((1, grid * grid, width), lambda: position_embedding(grid, width)[None])
    return {**found, **pending}, ("config.json", config_facts(config or {}))


def _sizes(config: dict | None, label: str) -> dict[str, int]:
    if config is None:
        raise WeightsError(
            f"{label} is in the diffusers form, which needs the config.json that comes with it; put it beside the file"
        )
    known = {*FIXED, *SIZES, *UNUSED}
    problems = [f"unknown entry {key!r}" for key in config if not key.startswith("_") and key not in known]
    for key, allowed in FIXED.items():
        value = config.get(key, allowed[0])
        if not any(value is a or (value == a and type(value) is type(a)) for a in allowed):
            problems.append(f"{key} is {value!r}, a DiT has {allowed[0]!r}")
    for key in SIZES:
        value = config.get(key)
        if type(value) is not int or not 0 < value < 2**16:
            problems.append(f"{key} is {value!r}, not a size")
    if problems:
        raise WeightsError(f"{label}: its config.json is not one of a DiT:\n  " + "\n  ".join(map(str, problems)))
    sizes = {key: config[key] for key in SIZES}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    if (
        sizes["sample_size"] % sizes["patch_size"]
        or width % 4
        or sizes["sample_size"] // sizes["patch_size"] > MAX_GRID
    ):
        raise WeightsError(f"{label}: the sizes of its config.json do not fit together: {sizes}")
    return sizes


def _move(pending: dict, found: dict, theirs: str, ours: str) -> None:
    if theirs in pending:
        found[ours] = pending.pop(theirs)


def _join(pending: dict[str, Entry | None], found: dict, theirs: list[str], ours: str) -> None:
    """One entry of three along the first axis; left alone where one is missing or they do not fit."""
    parts = [part for key in theirs if (part := pending.get(key)) is not None]
    if len(parts) != len(theirs) or len({part.shape for part in parts}) != 1 or not parts[0].shape:
        return
    for key in theirs:
        del pending[key]
    rows, *rest = parts[0].shape
    found[ours] = Entry((3 * rows, *rest), lambda: np.concatenate([part.read() for part in parts]))


def _merge(pending: dict[str, Entry | None], found: dict, theirs: list[str], ours: str, label: str) -> None:
    """One entry of equal copies; their equality is checked when it is read."""
    copies = {key: entry for key in theirs if (entry := pending.get(key)) is not None}
    if len(copies) != len(theirs):
        return
    for key in theirs:
        del pending[key]
    first = copies[theirs[0]]

    def read() -> np.ndarray:
        array = first.read()
        for key, entry in copies.items():
            if entry.shape != first.shape or not np.array_equal(entry.read(), array, equal_nan=True):
                raise WeightsError(f"{label}: {key} is not as in block 0, but a DiT has one embedder for all blocks")
        return array

    found[ours] = Entry(first.shape, read)
