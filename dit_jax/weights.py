"""From PyTorch checkpoints to the arrays of this package's DiT and back: a key table, checked both ways.

Official keys are the common form; diffusers checkpoints are given these keys first (dit_jax/diffusers_form.py).
Nothing in a file is executed (dit_jax/readers.py). Everything wrong with a file is collected and raised as one error.
The released DiT weights are licensed CC-BY-NC 4.0, and so is what is made from them.
"""

import hashlib
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_jax import diffusers_form
from dit_jax.array_folder import Arrays
from dit_jax.checkpoint import stored_dtypes, weight_shapes
from dit_jax.config import DiTConfig, NoisePath, Prediction, TimestepConvention, Which
from dit_jax.facts import Facts, NullLabel, Said, argument_facts, combined, token_grid, told
from dit_jax.infer import assumptions, infer_config, variant_name
from dit_jax.readers import Source, open_source
from dit_jax.tensors import Entry, Shape, WeightsError

CONVERSION_VERSION = 1  # raise it when the same file would give other arrays
COPIED_COLUMNS = 128  # few enough that the rows of a transposed copy stay in cache


class Transform(NamedTuple):
    """How an entry becomes one of our arrays and is got back, and the shape it has for an array of a given shape."""

    apply: Callable[[np.ndarray], np.ndarray]
    invert: Callable[[np.ndarray, DiTConfig], np.ndarray]
    source_shape: Callable[[Shape, DiTConfig], Shape]


TRANSFORMS = {
    "same": Transform(lambda a: a, lambda a, _: a, lambda shape, _: shape),
    "linear": Transform(lambda a: a.T, lambda a, _: a.T, lambda shape, _: shape[::-1]),
    "position": Transform(lambda a: a[0], lambda a, _: a[None], lambda shape, _: (1, *shape)),
    # (D, C, p, p) -> (p * p * C, D): row in patch, column in patch, channel, as `patchify` lays them out
    "patch": Transform(
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
        lambda a, config: a.reshape(*2 * [config.patch_size], -1, a.shape[1]).transpose(3, 2, 0, 1),
        lambda shape, config: (shape[1], config.in_channels, config.patch_size, config.patch_size),
    ),
}


class Rule(NamedTuple):
    """One row of the table. A source with ``{}`` in it stands for one entry per layer; the target stacks them."""

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
    weights: Arrays  # by dotted path
    variant: str | None  # official name, if it is an official architecture
    provenance: dict  # entries for the manifest
    notes: tuple[str, ...] = ()  # what the user of the model should know


def convert(
    source: str | Path,
    *,
    which: Which | None = None,
    prefix: str | None = None,
    prediction: Prediction | None = None,
    path: NoisePath | None = None,
    num_heads: int | None = None,
    num_classes: int | None = None,
    null_label: NullLabel | None = None,
    input_size: int | None = None,
    dtype: str = "float32",
    timestep_convention: TimestepConvention | None = None,
) -> Conversion:
    """Reads a checkpoint in any known form.

    It takes little more memory than the converted arrays, because files are read tensor by tensor. What neither shapes
    nor any entry of the file tell must be given; what is given must not contradict the file.

    Args:
      source: file or folder, see `dit_jax.readers.open_source`; its keys are official or of the diffusers form.
      which, prefix: of several sets of weights in a file, the one to read, see `dit_jax.readers.open_source`.
      prediction: what the network predicts, see `DiTConfig.prediction`. Only an export of this package, a training
        checkpoint with arguments, or the scheduler of a diffusers pipeline says it.
      path: how data and noise were mixed in training, see `DiTConfig.path`. Needed for a velocity or score; otherwise
        the schedule of DDPM unless the file says another.
      num_heads: needed if no official variant has this depth and width.
      num_classes: without the null label. Needed, or `null_label`, unless the label table has the 1001 rows of
        ImageNet's classes and the null label.
      null_label: ``"last"`` or ``"none"``: whether the last row of the label table is the null label.
      input_size: side of the square input, needed where the values of the position embedding do not tell it.
      dtype: of the converted parameters, ``"float32"`` or ``"bfloat16"``; the position embedding stays float32.
      timestep_convention: ``"diffusers"`` makes a model that computes what the diffusers model code does, see
        `DiTConfig.timestep_convention`; by default that of an export, and otherwise ``"official"``.

    Raises:
      WeightsError: the file cannot be read safely, its entries are not exactly those of a DiT, or it does not tell all
        of the function. The message lists everything that is missing, unexpected, misshapen, not finite or not told.
    """
    label = str(source)
    opened = open_source(source, which, prefix)
    entries, form, said = official_entries(opened, label)
    asked = Facts(prediction, num_heads, num_classes, null_label, input_size, timestep_convention, path)
    facts = combined(asked, said, label)
    config, weights = convert_entries(entries, label, facts, dtype)
    notes = [*opened.notes, *told(said), *assumptions(config, facts)]
    if "diffusers" in form:
        theirs = config.timestep_convention == "diffusers"
        notes.append(diffusers_form.NOTE_DIFFUSERS if theirs else diffusers_form.NOTE_OFFICIAL)
    digests = {file.name: _file_digest(file) for file in opened.files}
    name, sha256 = next(iter(digests.items())) if len(digests) == 1 else (Path(source).name, digests)
    return Conversion(
        config,
        weights,
        variant_name(config),
        {
            "variant": variant_name(config),
            "source": {"file": name, "sha256": sha256, "form": form},
            "conversion_version": CONVERSION_VERSION,
            **({} if opened.data is None else {"data": opened.data}),
        },
        tuple(notes),
    )


def official_entries(opened: Source, label: str) -> tuple[dict[str, Entry | None], str, list[Said]]:
    """The entries of an opened checkpoint under official keys, its form in words, and what it says of the model.

    Raises:
      WeightsError: a diffusers checkpoint is of another model.
    """
    if not diffusers_form.is_diffusers(opened.entries):
        beside = argument_facts(opened.config)
        return opened.entries, opened.form, [*opened.said, ("config.json", beside)]
    entries, said = diffusers_form.official_entries(opened.entries, opened.config, label)
    return entries, f"{opened.form}, diffusers", [*opened.said, said]


def convert_entries(
    entries: Mapping[str, Entry | np.ndarray | None], label: str, facts: Facts, dtype: str = "float32"
) -> tuple[DiTConfig, Arrays]:
    """The config and the arrays of a state dict with official keys. `label` names it in errors.

    Raises:
      WeightsError: see `convert`.
    """
    known = {key: entry for key, value in entries.items() if (entry := _entry(value))}
    shapes = {key: entry.shape for key, entry in known.items()}
    depth = _depth(entries, label)
    names = dict.fromkeys(key for rule in TABLE for key in rule.sources(depth))
    problems = [f"missing: {key}" for key in names if key not in entries]
    problems += [f"unexpected: {key}" for key in entries if key not in names]
    problems += [f"not a real-valued dense tensor: {key}" for key in entries if key not in known]
    config, unknown = infer_config(shapes, depth, facts, lambda: token_grid(_read(known, "pos_embed", label)[0]))
    problems += unknown
    if config is not None:
        problems += [
            f"misshapen: {key} is {shapes[key]}, expected {shape}"
            for key, shape in source_shapes(config).items()
            if shapes.get(key, shape) != shape
        ]
    weights: Arrays = {}
    if problems or config is None:
        problems += [f"not finite: {key}" for key in known if not np.isfinite(_read(known, key, label)).all()]
    else:
        weights, problems = _fill(config, known, label, dtype)
    if problems or config is None:
        raise WeightsError(f"{label} cannot be converted:\n  " + "\n  ".join(problems))
    return config, weights


def state_dict(config: DiTConfig, weights: Arrays) -> Iterator[tuple[str, np.ndarray]]:
    """The official keys and arrays of a model, one after the other. This inverts `convert_entries` bit for bit."""
    for rule in TABLE:
        yield from inverted(rule, weights[rule.target], config)


def inverted(rule: Rule, array: np.ndarray, config: DiTConfig) -> Iterator[tuple[str, np.ndarray]]:
    """The official keys of one of our arrays, each with a copy of its part."""
    for i, key in enumerate(rule.sources(config.depth)):
        found = TRANSFORMS[rule.transform].invert(array[i] if rule.stacked else array, config)
        entry = np.empty(found.shape, found.dtype)
        _copy(found, entry)
        yield key, entry


def source_shapes(config: DiTConfig) -> dict[str, Shape]:
    """The key and shape of every entry of an official state dict for `config`."""
    ours = weight_shapes(config)
    return {
        key: TRANSFORMS[rule.transform].source_shape(ours[rule.target][1 if rule.stacked else 0 :], config)
        for rule in TABLE
        for key in rule.sources(config.depth)
    }


def _depth(keys: Collection[str], label: str) -> int:
    blocks = {int(found[1]) for key in keys if (found := re.match(r"blocks\.(\d{1,6})\.", key))}
    depth = max(blocks, default=-1) + 1
    if not blocks:
        found = ", ".join(key[:60] for key in list(keys)[:4])
        raise WeightsError(f"{label} has no entries blocks.0.*: it is not a DiT in the official form. It has {found}")
    if depth > 2 * len(blocks):
        raise WeightsError(f"{label} has {len(blocks)} blocks, but numbers them up to {depth - 1}")
    return depth


def _entry(value: Entry | np.ndarray | None) -> Entry | None:
    if isinstance(value, np.ndarray):
        return Entry(value.shape, lambda: value) if np.issubdtype(value.dtype, np.floating) else None
    return value


def _read(entries: Mapping[str, Entry], key: str, label: str) -> np.ndarray:
    """One entry as float32, checked to have the shape that its file announced."""
    try:
        array = entries[key].read()
    except WeightsError:
        raise
    except Exception as error:  # a file that changed or is damaged beyond its header
        raise WeightsError(f"{label}: {key} cannot be read ({type(error).__name__}); the file is damaged") from error
    if array.shape != entries[key].shape:
        raise WeightsError(f"{label}: {key} has shape {array.shape}, its file announced {entries[key].shape}")
    with np.errstate(over="ignore"):  # a float64 number beyond float32 becomes infinite, and is reported as not finite
        return array.astype(np.float32, copy=False)


def _fill(config: DiTConfig, entries: Mapping[str, Entry], label: str, dtype: str) -> tuple[Arrays, list[str]]:
    """Our arrays, read one entry at a time, and a line for each entry that is not finite."""
    dtypes = stored_dtypes(config, dtype)
    weights = {path: np.empty(shape, dtypes[path]) for path, shape in weight_shapes(config).items()}
    problems = []
    for rule in TABLE:
        apply = TRANSFORMS[rule.transform].apply
        for i, key in enumerate(rule.sources(config.depth)):
            array = _read(entries, key, label)
            if not np.isfinite(array).all():
                problems.append(f"not finite: {key}")
            target = weights[rule.target][i] if rule.stacked else weights[rule.target]
            _copy(apply(array), target)
    return weights, problems


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    """``target[...] = source``; seven times faster where one is the transpose of the other in memory."""
    if source.ndim != 2:
        target[...] = source
        return
    for first in range(0, source.shape[1], COPIED_COLUMNS):
        columns = slice(first, first + COPIED_COLUMNS)
        target[:, columns] = source[:, columns]


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
