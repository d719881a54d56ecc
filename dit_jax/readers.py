"""Checkpoints, opened without running anything in them and read one tensor at a time.

It reads PyTorch's .pt and .bin files, and safetensors in one piece or sharded behind an index. What a file claims is
checked against its size before memory is taken for it. Everything wrong with a file raises a `WeightsError`.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_jax.config import Which
from dit_jax.facts import METADATA, Facts, Said, metadata_facts, read_export, scheduler_facts, training_facts
from dit_jax.pickles import Dictionary, Inert, Tensor, members
from dit_jax.tensors import Entry, Shape, WeightsError
from dit_jax.torch_files import ARCHIVE, LEGACY, TorchFile
from dit_jax.unwrap import flattened, unwrapped

INDEX_SUFFIX = ".safetensors.index.json"
MAPPED_BYTES = 2**28  # how much of a mapped file is read before its pages are given back
JSON_BYTES = 2**26  # a config or index is smaller
REAL_TYPES = {"F16", "BF16", "F32", "F64"}
MOST_TIED = 64  # how often the numbers of a file may be used: tensors can share theirs
SAVE_AGAIN = "torch.save(model.state_dict(), 'weights.pt')"
PAGE = (
    "it is an HTML page, as a web server sends it in place of a file. Take the link of the download itself; some files "
    "need a login, or a licence to be accepted"
)
DOCUMENT = "it is an XML document, as a web server sends it when it refuses a download"
OTHER_FILES: dict[bytes, str] = {  # how files begin that are no weights
    b"version https://git-lfs": "it is a Git LFS pointer of a few lines, which stands for the file. Run `git lfs pull` "
    "in its repository, or download the file itself",
    b"<!doctype html": PAGE,
    b"<html": PAGE,
    b"<?xml": DOCUMENT,
    b"<error": DOCUMENT,
    b"{": "it is JSON text, perhaps what a web server sent when it refused a download",
    b"\x1f\x8b": "it is a gzip archive; unpack it first",
    b"7z\xbc\xaf": "it is a 7z archive; unpack it first",
    b"\x93numpy": "it is a NumPy array; a state dict of tensors is needed",
    b"\x89hdf": "it is an HDF5 file; weights of PyTorch are needed",
    b"gguf": "it is a GGUF file; weights of PyTorch or safetensors are needed",
}


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    entries: dict[str, Entry | None]  # by key; None is no real-valued dense tensor, or an empty one
    form: str  # "released", "training/ema", "training/model", "safetensors"; and the prefix of its keys
    files: tuple[Path, ...]  # that hold the tensors
    config: dict | None = None  # of a config.json beside them
    said: list[Said] = field(default_factory=list)  # what else the file says of the model
    data: Mapping | None = None  # how the training images were prepared, if it is an export of this package
    notes: tuple[str, ...] = ()


def open_source(source: str | Path, which: Which | None = None, prefix: str | None = None) -> Source:
    """Opens a checkpoint.

    Args:
      source: a .pt, .pth, .ckpt or .bin file; a .safetensors file, or its index if it is sharded; or a folder with one
        of these and, in the diffusers form, a config.json (which is also looked for beside a single file).
      which: ``"ema"`` or ``"model"``, averaged or raw weights; by default averaged ones if there are any, and otherwise
        the only ones.
      prefix: of the keys of the weights, nested entries included, where a file has several sets of them.

    Raises:
      WeightsError: nothing readable is there, it cannot be read safely, or it is not clear which weights are meant.
    """
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file; give a .pt, .bin or .safetensors checkpoint, or a folder with one")
    label = str(path)
    data: Mapping | None = None
    said: list[Said] = []
    notes: list[str] = []
    if path.name.endswith(INDEX_SUFFIX) or _is_safetensors(path):
        files = _sharded(path) if path.name.endswith(INDEX_SUFFIX) else {path: None}
        found: dict[str, Any] = {}
        metadata: dict[str, str] = {}
        for file, wanted in files.items():
            entries, told = _safetensors_entries(file)
            if wanted is not None and set(entries) != wanted:
                odd = sorted(set(entries) ^ wanted)
                raise WeightsError(f"{file} does not hold what its index says; they differ in {', '.join(odd[:5])}")
            found.update(entries)
            metadata.update(told)
        # what safetensors.torch.save_model left out, since it has the numbers of another tensor
        found |= {key: found[kept] for key, kept in metadata.items() if kept in found and key not in found}
        content, form, own = flattened(found, label), "safetensors", metadata.get(METADATA)
        said += [("safetensors metadata", metadata_facts(metadata))] if own is None else []
        nested: set[str] = set()
    else:
        opened = TorchFile(path)
        files = {path: None}
        content, form, own = _torch_entries(path, opened), "released", None
        parts = members(opened.content) or {}
        nested = {f"{name}." for name in ("ema", "model") if members(parts.get(name))}
        said += training_facts(parts)
        if isinstance(opened.content, Dictionary) and isinstance(opened.content.attributes, dict):
            own = opened.content.attributes.get(METADATA)
        if not opened.checked:
            notes.append("the file was saved without checksums: damage to its numbers cannot be seen")
    chosen, lead, more = unwrapped(content, which, prefix, label)
    if lead:
        form = f"training/{lead[:-1]}" if lead in nested else f"{form}, under {lead[:-1]}"
    if own is not None:
        facts, data = read_export(own, label)
        said.append(("metadata", facts))
    entries = {key: value if isinstance(value, Entry) else None for key, value in chosen.items()}
    _check_claims(label, entries, sum(file.stat().st_size for file in files))
    config = _config_beside(path)
    said += _scheduler_beside(path)
    return Source(entries, form, tuple(files), config, said, data, (*notes, *more))


def _is_safetensors(path: Path) -> bool:
    """Whether a file is to be read as safetensors, by its name or its first bytes; if not, it is PyTorch's.

    Raises:
      WeightsError: it is neither, but a file of a kind that is known.
    """
    try:
        with path.open("rb") as file:
            start = file.read(64)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from error
    if start.startswith((ARCHIVE, LEGACY)):
        return False
    named = path.suffix == ".safetensors"
    refused = f"{path} is not a readable {'safetensors file' if named else 'checkpoint'}: "
    if not start:
        raise WeightsError(f"{refused}it is empty, as a download that failed leaves it; download it again")
    if what := _other_file(start):
        raise WeightsError(f"{refused}{what}")
    length = int.from_bytes(start[:8], "little")
    return named or (start[8:9] == b"{" and length < path.stat().st_size)


def _other_file(start: bytes) -> str | None:
    """What a file is that begins so and is no weights; None if that is not known."""
    plain = start.lstrip(b"\xef\xbb\xbf\r\n\t ").lower()
    return next((what for begins, what in OTHER_FILES.items() if plain.startswith(begins)), None)


def read_json(path: Path) -> dict:
    """Reads a JSON object of reasonable size.

    Raises:
      WeightsError: the file is not one.
    """
    if not path.is_file():  # reading a pipe would wait for ever
        raise WeightsError(f"{path} is not a file")
    if path.stat().st_size > JSON_BYTES:
        raise WeightsError(f"{path} has {path.stat().st_size} bytes; that is no config or index")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise WeightsError(f"{path} cannot be read as JSON ({type(error).__name__})") from error
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        what = None if raw.lstrip().startswith(b"{") else _other_file(raw[:64])
        raise WeightsError(f"{path} cannot be read as JSON ({what or type(error).__name__})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _in_folder(folder: Path) -> Path:
    """The one checkpoint of a folder. An index is looked for before the shards that it names."""
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise WeightsError(f"{folder} holds several checkpoints, {', '.join(p.name for p in found)}; give the file")
        if found:
            return _inside(folder, found[0].name)
    if (folder / "transformer").is_dir():
        raise WeightsError(f"{folder} looks like a whole diffusers pipeline; give its folder {folder / 'transformer'}")
    if (folder / "manifest.json").is_file():
        raise WeightsError(f"{folder} is a model folder already; --export makes a file of it")
    raise WeightsError(f"{folder} holds no .safetensors, .bin or .pt file")


def _inside(folder: Path, name: Any) -> Path:
    """The file of that name in a folder. A link may lead to the blobs of a Hugging Face cache, and else not out of the
    folder."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or "\\" in name or "\0" in name:
        raise WeightsError(f"{folder} names a file {str(name)[:100]!r}: only plain names in the same folder are read")
    path = folder / name
    try:
        home, real = folder.resolve(strict=True), path.resolve(strict=True)
    except (OSError, RuntimeError, UnicodeError) as error:
        raise WeightsError(f"{folder} has no file {name[:100]!r}, or it is a broken link") from error
    caches = [place.parent / "blobs" for place in (home.parent, home.parent.parent) if place.name == "snapshots"]
    if real.parent not in (home, *caches):
        raise WeightsError(
            f"{path} is a link out of its folder, to {real}; copy the file there, or give it by its name"
        )
    return path


def _config_beside(path: Path) -> dict | None:
    return read_json(_inside(path.parent, "config.json")) if (path.parent / "config.json").exists() else None


def _scheduler_beside(path: Path) -> list[Said]:
    """What the scheduler of a diffusers pipeline says of the network in its folder ``transformer``."""
    name = "scheduler_config.json"
    folder = path.parent.absolute().parent / "scheduler"
    if path.parent.absolute().name != "transformer" or not (folder / name).exists():
        return []
    facts = scheduler_facts(read_json(_inside(folder, name)))
    return [(f"scheduler/{name}", facts)] if facts != Facts() else []


def _sharded(index: Path) -> dict[Path, set[str] | None]:
    """The shards of an index and the keys that each should hold."""
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise WeightsError(f"{index} has no weight_map from keys to files")
    if not all(isinstance(name, str) for name in names.values()):
        raise WeightsError(f"{index} names files by something else than strings")
    keys: dict[str, set[str]] = {}
    for key, name in names.items():
        keys.setdefault(name, set()).add(key)
    return {_inside(index.parent, name): wanted for name, wanted in keys.items()}


# --- safetensors


def _safetensors_entries(path: Path) -> tuple[dict[str, Entry | None], dict[str, str]]:
    """The entries of a file, and its metadata."""
    from safetensors import SafetensorError, safe_open

    def opened() -> Any:
        return safe_open(path, framework="np")

    if not _is_safetensors(path):
        raise WeightsError(f"{path} is not a readable safetensors file: it is PyTorch's; name it .pt")
    try:
        mapped = _Mapped(opened)
        entries: dict[str, Entry | None] = {}
        for key in mapped.file.keys():  # noqa: SIM118 (it is a method of the file, no dictionary)
            part = mapped.file.get_slice(key)
            shape = tuple(part.get_shape())
            real = part.get_dtype() in REAL_TYPES and 0 not in shape  # whose other sizes nothing accounts for
            entries[key] = Entry(shape, _reader(mapped, key, shape)) if real else None
        metadata = mapped.file.metadata() or {}
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise WeightsError(
            f"{path} is not a readable safetensors file ({type(error).__name__}: {error}); "
            "compare its size and SHA-256 with its publisher's, and download it again"
        ) from error
    return entries, metadata


class _Mapped:
    """A memory-mapped file. It is opened anew now and then, so that pages already read do not count as our memory."""

    def __init__(self, opened: Callable[[], Any]):
        self.opened = opened
        self.file: Any = opened()
        self.read = 0

    def tensor(self, key: str, shape: Shape) -> Any:
        self.read += 4 * math.prod(shape)
        if self.read > MAPPED_BYTES:
            self.file, self.read = None, 0  # unmapped before it is mapped again
            self.file = self.opened()
        return self.file.get_tensor(key)


def _reader(mapped: _Mapped, key: str, shape: Shape) -> Callable[[], np.ndarray]:
    return lambda: mapped.tensor(key, shape)


# --- PyTorch


def _torch_entries(path: Path, file: TorchFile) -> dict[str, Any]:
    """Every dense real tensor of a .pt file as an `Entry`, and whatever else is in it as it is, by flat keys."""
    content = members(file.content)
    if not content:
        kind = file.content.name if isinstance(file.content, Inert) else type(file.content).__name__
        raise WeightsError(f"{path} holds a {kind}, not a state dict; save one: {SAVE_AGAIN}")
    if not all(isinstance(key, str) for key in content):
        raise WeightsError(f"{path} has keys that are not strings; it is no state dict")

    def entry(value: Any) -> Any:
        return Entry(value.shape, lambda: file.array(value)) if isinstance(value, Tensor) and value.is_real else value

    return {key: entry(value) for key, value in flattened(content, str(path)).items()}


def _check_claims(label: str, entries: Mapping[str, Entry | None], size: int) -> None:
    """Raises WeightsError if tensors that share their numbers would fill any memory."""
    claimed = sum(4 * math.prod(entry.shape) for entry in entries.values() if entry is not None)
    if claimed > MOST_TIED * size:
        raise WeightsError(
            f"{label} claims tensors of {claimed} bytes, and has {size}: it repeats the same numbers more than "
            f"{MOST_TIED} times; save clones of the tensors: {SAVE_AGAIN}"
        )
