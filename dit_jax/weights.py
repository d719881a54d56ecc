"""From official PyTorch checkpoints to the arrays of this package's DiT: a key table, checked both ways.

Files are read with ``weights_only=True``, so nothing in them is executed. Everything wrong with a file is collected
and raised as one error. The released DiT weights are licensed CC-BY-NC 4.0, and so is what is made from them.
"""

import argparse
import hashlib
import math
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from dit_jax.checkpoint import Arrays, weight_shapes
from dit_jax.config import VARIANTS, DiTConfig

Which = Literal["ema", "model"]
Shape = tuple[int, ...]

CONVERSION_VERSION = 1  # to be raised when the same file would give other arrays
PREFIXES = ("module.", "_orig_mod.")  # of wrapped training: DistributedDataParallel, torch.compile


class WeightsError(ValueError):
    """A checkpoint that cannot be read or does not hold a DiT."""


class Transform(NamedTuple):
    """How one entry becomes one of our arrays, and the shape the entry must have for an array of a given shape."""

    apply: Callable[[np.ndarray], np.ndarray]
    source_shape: Callable[[Shape, DiTConfig], Shape]


TRANSFORMS = {
    "same": Transform(lambda a: a, lambda shape, _: shape),
    "linear": Transform(lambda a: a.T, lambda shape, _: shape[::-1]),
    "position": Transform(lambda a: a[0], lambda shape, _: (1, *shape)),
    # (D, C, p, p) -> (p * p * C, D): row in patch, column in patch, channel, as `patchify` lays them out
    "patch": Transform(
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
        lambda shape, config: (shape[1], config.in_channels, config.patch_size, config.patch_size),
    ),
}


class Rule(NamedTuple):
    """One row of the table. A source with a ``{}`` stands for one entry per layer, stacked in the target."""

    source: str
    target: str
    transform: str

    @property
    def stacked(self) -> bool:
        return "{}" in self.source

    def sources(self, depth: int) -> list[str]:
        return [self.source.format(i) for i in range(depth)] if self.stacked else [self.source]


def _linear(source: str, target: str) -> tuple[Rule, Rule]:
    return Rule(f"{source}.weight", f"{target}.kernel", "linear"), Rule(f"{source}.bias", f"{target}.bias", "same")


TABLE: tuple[Rule, ...] = (
    Rule("pos_embed", "pos_embed", "position"),
    Rule("x_embedder.proj.weight", "x_embedder.kernel", "patch"),
    Rule("x_embedder.proj.bias", "x_embedder.bias", "same"),
    *_linear("t_embedder.mlp.0", "t_embedder.fc1"),
    *_linear("t_embedder.mlp.2", "t_embedder.fc2"),
    Rule("y_embedder.embedding_table.weight", "y_embedder.embedding", "same"),
    *_linear("blocks.{}.attn.qkv", "blocks.attn.qkv"),
    *_linear("blocks.{}.attn.proj", "blocks.attn.proj"),
    *_linear("blocks.{}.mlp.fc1", "blocks.mlp.fc1"),
    *_linear("blocks.{}.mlp.fc2", "blocks.mlp.fc2"),
    *_linear("blocks.{}.adaLN_modulation.1", "blocks.adaln"),
    *_linear("final_layer.linear", "final_layer.linear"),
    *_linear("final_layer.adaLN_modulation.1", "final_layer.adaln"),
)


@dataclass(frozen=True)
class Conversion:
    """A converted checkpoint: what `dit_jax.checkpoint.save_weights` takes, and where it came from."""

    config: DiTConfig
    weights: Arrays  # by dotted path, float32
    variant: str | None  # official name, if it is an official architecture
    provenance: dict  # entries for the manifest


def convert(source: str | Path, *, which: Which = "ema", num_heads: int | None = None) -> Conversion:
    """Reads a checkpoint file in an official form.

    Args:
      source: a .pt file, either a bare state dict (the released form) or what the official training script saves.
      which: ``"ema"`` or ``"model"``, the part of a training checkpoint to read.
      num_heads: needed for widths that no official variant has; shapes do not tell it.

    Raises:
      WeightsError: the file cannot be read safely, or its entries are not exactly those of a DiT: all missing,
        unexpected, misshapen and non-finite ones are listed.
    """
    source = Path(source)
    entries, form = read_torch(source, which)
    config, weights = convert_entries(entries, str(source), num_heads)
    return Conversion(
        config,
        weights,
        variant_name(config),
        {
            "variant": variant_name(config),
            "source": {"file": source.name, "sha256": _file_digest(source), "form": form},
            "conversion_version": CONVERSION_VERSION,
        },
    )


def read_torch(source: Path, which: Which = "ema") -> tuple[dict[str, Any], str]:
    """The state dict of a .pt file, tensors on the CPU, and its form: "released", "training/ema" or "training/model".

    Raises:
      WeightsError: see `convert`.
    """
    torch = _torch()
    if not source.is_file():
        raise WeightsError(f"{source} is not a file; give a checkpoint in the official .pt form")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # what the training script keeps as "args"
            content = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source) or None)
    except Exception as error:  # of any kind, and torch's own message would suggest to load unsafely
        raise WeightsError(
            f"{source} is not a readable checkpoint: it is damaged, of another format, or holds pickled objects other "
            f"than tensors, which are never loaded because that would run code from the file ({type(error).__name__})"
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{source} holds a {type(content).__name__}, not a state dict")
    if not any(isinstance(content.get(part), Mapping) for part in ("ema", "model")):
        if which != "ema":
            raise WeightsError(f"{source} is a bare state dict, without a part {which!r}; leave the choice out")
        return dict(content), "released"
    part = content.get(which)
    if not isinstance(part, Mapping):
        raise WeightsError(
            f"{source} is a training checkpoint without {which!r}; it has {', '.join(map(str, content))}"
        )
    return dict(part), f"training/{which}"


def convert_entries(entries: Mapping[str, Any], label: str, num_heads: int | None = None) -> tuple[DiTConfig, Arrays]:
    """Config and arrays of a state dict with official keys; `label` names it in errors.

    Raises:
      WeightsError: see `convert`.
    """
    entries = _without_prefixes(entries, label)
    arrays = {key: array for key, value in entries.items() if (array := _float32(value)) is not None}
    shapes = {key: array.shape for key, array in arrays.items()}
    depth = _depth(entries, label)
    names = dict.fromkeys(key for rule in TABLE for key in rule.sources(depth))
    problems = [f"missing: {key}" for key in names if key not in entries]
    problems += [f"unexpected: {key}" for key in entries if key not in names]
    problems += [f"not a real-valued dense tensor: {key}" for key in entries if key not in arrays]
    config, unknown = infer_config(shapes, depth, num_heads)
    problems += unknown
    if config is not None:
        problems += [
            f"misshapen: {key} is {shapes[key]}, expected {shape}"
            for key, shape in source_shapes(config).items()
            if shapes.get(key, shape) != shape
        ]
    problems += [f"not finite: {key}" for key, array in arrays.items() if not np.isfinite(array).all()]
    if problems or config is None:
        raise WeightsError(f"{label} cannot be converted:\n  " + "\n  ".join(problems))
    return config, _fill(config, arrays)


def source_shapes(config: DiTConfig) -> dict[str, Shape]:
    """Key and shape of every entry of an official state dict for `config`."""
    ours = weight_shapes(config)
    return {
        key: TRANSFORMS[rule.transform].source_shape(ours[rule.target][1 if rule.stacked else 0 :], config)
        for rule in TABLE
        for key in rule.sources(config.depth)
    }


def variant_name(config: DiTConfig) -> str | None:
    """The official name of this architecture, whatever its input size, channels and classes; None if it has none."""
    names = ("patch_size", "hidden_size", "depth", "num_heads", "mlp_ratio")
    for name, official in VARIANTS.items():
        if all(getattr(config, n) == getattr(official, n) for n in names):
            return name
    return None


def infer_config(
    shapes: Mapping[str, Shape], depth: int, num_heads: int | None = None
) -> tuple[DiTConfig | None, list[str]]:
    """The config that the shapes of an official state dict tell, and what they leave open.

    Returns:
      config: None if not all sizes can be told; with one head if only `num_heads` cannot.
      problems: one line for each size that cannot be told.
    """
    problems = []
    sizes: dict[str, Any] = {"depth": depth}

    def tell(name: str, value: Any, where: str) -> None:
        if value:
            sizes[name] = value
        else:
            problems.append(f"cannot tell {name}: it is read off {where}")

    # sizes that many entries tell are put to the vote, so that one misshapen entry is reported as such
    width = _vote(shapes, r"pos_embed|x_embedder\.proj\.bias|.*embedding_table\.weight|.*(attn\.proj|mlp\.2)\.bias")
    hidden = _vote(shapes, r"blocks\.\d+\.mlp\.fc1\.bias")
    _, channels, patch, _ = _ranked(shapes, "x_embedder.proj.weight", 4)
    _, tokens, _ = _ranked(shapes, "pos_embed", 3)
    rows = (_ranked(shapes, "final_layer.linear.weight", 2)[0], _ranked(shapes, "final_layer.linear.bias", 1)[0])
    classes = _ranked(shapes, "y_embedder.embedding_table.weight", 2)[0] - 1
    grid = math.isqrt(tokens)
    tell("hidden_size", width, "the biases")
    tell("mlp_ratio", width and hidden / width, "blocks.*.mlp.fc1.bias")
    tell("in_channels", channels, "x_embedder.proj.weight")
    tell("patch_size", patch, "x_embedder.proj.weight")
    tell("num_classes", max(classes, 0), "y_embedder.embedding_table.weight, which has one row more")
    tell("input_size", grid * patch if grid**2 == tokens else 0, "pos_embed, which has a square number of tokens")
    outputs = next((n for n in (1, 2) if patch**2 * channels * n in rows), 0)  # numbers per channel of the image
    tell("learn_sigma", outputs, "final_layer.linear, with one or two rows per number in a patch")
    if problems:
        return None, problems
    sizes["learn_sigma"] = outputs == 2
    if num_heads is None:
        num_heads = {official.hidden_size: official.num_heads for official in VARIANTS.values()}.get(width)
    if num_heads is None:
        problems.append(f"cannot tell num_heads: width {width} is of no official variant; give it (--num-heads)")
    try:
        return DiTConfig(**sizes, num_heads=1 if num_heads is None else num_heads), problems
    except ValueError as error:
        return None, [*problems, str(error)]


def _vote(shapes: Mapping[str, Shape], pattern: str) -> int:
    """The last axis that most entries of this pattern agree on; 0 if there are none."""
    found = Counter(shape[-1] for key, shape in shapes.items() if shape and re.fullmatch(pattern, key))
    return found.most_common(1)[0][0] if found else 0


def _ranked(shapes: Mapping[str, Shape], key: str, rank: int) -> Shape:
    """The shape of an entry; zeros if it is missing or not of this rank."""
    shape = shapes.get(key, ())
    return shape if len(shape) == rank else (0,) * rank


def _depth(keys: Iterable[str], label: str) -> int:
    blocks = {int(found[1]) for key in keys if (found := re.match(r"blocks\.(\d{1,6})\.", key))}
    depth = max(blocks, default=-1) + 1
    if not blocks:
        raise WeightsError(f"{label} has no entries blocks.0.*: it is not a DiT in the official form")
    if depth > 2 * len(blocks):
        raise WeightsError(f"{label} has {len(blocks)} blocks, but numbers them up to {depth - 1}")
    return depth


def _without_prefixes(entries: Mapping[str, Any], label: str) -> dict[str, Any]:
    stripped: dict[str, Any] = {}
    for key, value in entries.items():
        name = str(key)
        while name.startswith(PREFIXES):
            name = name.split(".", 1)[1]
        if name in stripped:
            raise WeightsError(f"{label} holds {name} twice, with and without a prefix")
        stripped[name] = value
    return stripped


def _float32(value: Any) -> np.ndarray | None:
    """A torch tensor or NumPy array as float32, without a copy where it is float32 already; None for anything else."""
    if isinstance(value, np.ndarray):
        return value.astype(np.float32, copy=False) if np.issubdtype(value.dtype, np.floating) else None
    torch = _torch()
    if isinstance(value, torch.Tensor) and value.is_floating_point() and value.layout is torch.strided:
        return value.detach().float().numpy()
    return None


def _fill(config: DiTConfig, arrays: Arrays) -> Arrays:
    weights = {path: np.empty(shape, np.float32) for path, shape in weight_shapes(config).items()}
    for rule in TABLE:
        apply = TRANSFORMS[rule.transform].apply
        for i, key in enumerate(rule.sources(config.depth)):
            target = weights[rule.target][i] if rule.stacked else weights[rule.target]
            target[...] = apply(arrays[key])
    return weights


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightsError("reading .pt files needs PyTorch: pip install '.[torch]'") from error
    return torch
