"""Files of tensors, opened without running anything in them and read one tensor at a time.

It reads PyTorch's .pt and .bin files, and safetensors in one piece or sharded behind an index. What a file claims is
checked against its size before memory is taken for it. Everything wrong with a file raises a `WeightsError`.
"""

import argparse
import io
import json
import math
import pickletools
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from dit_jax.config import Which

Shape = tuple[int, ...]

INDEX_SUFFIX = ".safetensors.index.json"
MAPPED_BYTES = 2**28  # how much of a mapped file is read before its pages are given back
JSON_BYTES = 2**26  # a config or index is smaller
REAL_TYPES = {"F16", "BF16", "F32", "F64"}
# The names that occur in the pickle of a state dict, and of the "args" that the training script keeps. PyTorch's safe
# loading allows more, some of which can take any memory or time (codecs, sparse tensors, copies of repeated views).
PICKLED = re.compile(
    r"torch \w+Storage|torch (b?float|u?int|complex|bool)\w*|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|collections OrderedDict|argparse Namespace"
)
TUPLE_SIZE = 1000  # nested tuples included; hashing a larger key can take for ever or overflow the stack
LEGACY_PICKLES = 5  # that a file from before version 1.6 begins with: magic number, version, system, content, storages


class WeightsError(ValueError):
    """A checkpoint that cannot be read or does not hold a DiT."""


class Entry(NamedTuple):
    """One tensor of a file: its shape, and how to read it (float16, bfloat16, float32 or float64)."""

    shape: Shape
    read: Callable[[], np.ndarray]


@dataclass(frozen=True)
class Source:
    """An opened checkpoint."""

    entries: dict[str, Entry | None]  # by key; None is no real-valued dense tensor, or an empty one
    form: str  # "released", "training/ema", "training/model", "safetensors"
    files: tuple[Path, ...]  # that hold the tensors
    config: dict | None = None  # of a config.json beside them


def open_source(source: str | Path, which: Which = "ema") -> Source:
    """Opens a checkpoint.

    Args:
      source: a .pt or .bin file; a .safetensors file, or its index if it is sharded; or a folder with one of these and,
        in the diffusers form, a config.json (which is also looked for beside a single file).
      which: the part of a training checkpoint to read.

    Raises:
      WeightsError: nothing readable is there, or it cannot be read safely.
    """
    path = Path(source)
    if path.is_dir():
        path = _in_folder(path)
    if not path.is_file():
        raise WeightsError(f"{path} is not a file; give a .pt, .bin or .safetensors checkpoint, or a folder with one")
    if path.name.endswith(INDEX_SUFFIX):
        files = _sharded(path)
    elif path.suffix == ".safetensors":
        files = {path: None}
    else:
        entries, form = _torch_entries(path, which)
        return Source(entries, form, (path,), _config_beside(path))
    if which != "ema":
        raise WeightsError(f"{path} is a bare state dict, without a part {which!r}; leave the choice out")
    entries: dict[str, Entry | None] = {}
    for file, wanted in files.items():
        found = _safetensors_entries(file)
        if wanted is not None and set(found) != wanted:
            odd = sorted(set(found) ^ wanted)
            raise WeightsError(f"{file} does not hold what its index says; they differ in {', '.join(odd[:5])}")
        entries.update(found)
    return Source(entries, "safetensors", tuple(files), _config_beside(path))


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
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path} cannot be read as JSON ({type(error).__name__})") from error
    if not isinstance(content, dict):
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a JSON object")
    return content


def _in_folder(folder: Path) -> Path:
    """The one checkpoint of a folder. An index is looked for before the shards that it names."""
    for pattern in (f"*{INDEX_SUFFIX}", "*.safetensors", "*.bin", "*.pt"):
        found = sorted(folder.glob(pattern))
        if len(found) > 1:
            raise WeightsError(f"{folder} holds several checkpoints, {', '.join(p.name for p in found)}; give the file")
        if found:
            return _inside(folder, found[0].name)
    if (folder / "transformer").is_dir():
        raise WeightsError(f"{folder} looks like a whole diffusers pipeline; give its folder {folder / 'transformer'}")
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
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    if real.parent not in (home, cache):
        raise WeightsError(
            f"{path} is a link out of its folder, to {real}; copy the file there, or give it by its name"
        )
    return path


def _config_beside(path: Path) -> dict | None:
    return read_json(_inside(path.parent, "config.json")) if (path.parent / "config.json").exists() else None


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


def _safetensors_entries(path: Path) -> dict[str, Entry | None]:
    from safetensors import SafetensorError, safe_open

    def opened() -> Any:
        return safe_open(path, framework="np")

    try:
        mapped = _Mapped(opened)
        entries: dict[str, Entry | None] = {}
        for key in mapped.file.keys():  # noqa: SIM118 (it is a method of the file, no dictionary)
            part = mapped.file.get_slice(key)
            shape = tuple(part.get_shape())
            real = part.get_dtype() in REAL_TYPES and 0 not in shape  # whose other sizes nothing accounts for
            entries[key] = Entry(shape, _reader(mapped, key, shape)) if real else None
    except (SafetensorError, OSError, ValueError, OverflowError, RuntimeError) as error:
        raise WeightsError(f"{path} is not a readable safetensors file ({type(error).__name__}: {error})") from error
    return entries


class _Mapped:
    """A memory-mapped file. It is opened anew now and then, so that pages already read do not count as our memory."""

    def __init__(self, opened: Callable[[], Any], in_memory: bool = False):
        self.opened, self.in_memory = opened, in_memory
        self.file: Any = opened()
        self.read = 0

    def tensor(self, key: str, shape: Shape) -> Any:
        self.read += 4 * math.prod(shape)
        if self.read > MAPPED_BYTES and not self.in_memory:
            self.file, self.read = None, 0  # unmapped before it is mapped again
            self.file = self.opened()
        return self.file.get_tensor(key)


def _reader(mapped: _Mapped, key: str, shape: Shape) -> Callable[[], np.ndarray]:
    return lambda: mapped.tensor(key, shape)


# --- PyTorch


class _TorchFile:
    """The state dict of a .pt file, mapped where its form allows."""

    def __init__(self, path: Path, which: Which):
        self.torch = _torch()
        content = _load(self.torch, path)
        if not any(isinstance(content.get(part), Mapping) for part in ("ema", "model")):
            if which != "ema":
                raise WeightsError(f"{path} is a bare state dict, without a part {which!r}; leave the choice out")
            self.form = "released"
            self.part = content
            return
        part = content.get(which)
        if not isinstance(part, Mapping):
            held = ", ".join(name[:40] for name in content)
            raise WeightsError(f"{path} is a training checkpoint without {which!r}; it has {held}")
        _check_keys(part, path)
        self.form = f"training/{which}"
        self.part = part

    def is_real(self, value: Any) -> bool:
        torch = self.torch
        return (
            isinstance(value, torch.Tensor)
            and value.device.type == "cpu"
            and value.layout is torch.strided
            and value.dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
            and value.numel() > 0
        )

    def get_tensor(self, key: str) -> np.ndarray:
        value = self.part[key].detach()
        if value.dtype is self.torch.bfloat16:  # NumPy has no such type of its own; float32 holds it exactly
            value = value.float()
        return value.numpy()


def _torch_entries(path: Path, which: Which) -> tuple[dict[str, Entry | None], str]:
    mapped = _Mapped(lambda: _TorchFile(path, which), in_memory=not _is_archive(path))
    part: Mapping[str, Any] = mapped.file.part
    real = {key: value for key, value in part.items() if mapped.file.is_real(value)}
    claimed = sum(value.numel() * value.element_size() for value in real.values())
    if claimed > path.stat().st_size:  # views that repeat a storage would fill any memory
        raise WeightsError(f"{path} claims tensors of {claimed} bytes, more than it has; it is damaged or hostile")
    entries: dict[str, Entry | None] = dict.fromkeys(part)
    for key, value in real.items():
        shape = tuple(value.shape)
        entries[key] = Entry(shape, _reader(mapped, key, shape))
    return entries, mapped.file.form


def _load(torch: Any, path: Path) -> Mapping:
    """The content of a .pt file; nothing in it is executed. Zip archives are mapped, the older form is read whole."""
    refused = f"{path} is not a readable checkpoint: "
    try:
        archive = _is_archive(path)
        if archive:
            with zipfile.ZipFile(path) as file:
                packed = [entry.filename for entry in file.infolist() if entry.compress_type != zipfile.ZIP_STORED]
            if packed:  # PyTorch never compresses; a small file could fill the memory
                raise WeightsError(f"{refused}its archive is compressed ({packed[0][:100]!r}); save it with torch.save")
            reader = torch._C.PyTorchFileReader(str(path))  # which may see another archive than Python does
            if hasattr(reader, "get_record_size"):
                if reader.get_record_size("data.pkl") > path.stat().st_size:
                    raise WeightsError(f"{refused}its archive is compressed; save it with torch.save")
                _check_pickle(io.BytesIO(reader.get_record("data.pkl")), refused)
            else:  # PyTorch 2.11 cannot tell a size: the record is read where it lies, as it is not compressed
                with path.open("rb") as file:
                    file.seek(reader.get_record_offset("data.pkl"))
                    _check_pickle(file, refused)
        else:
            with path.open("rb") as file:
                for _ in range(LEGACY_PICKLES):
                    _check_pickle(file, refused)
        with torch.serialization.safe_globals([argparse.Namespace]):  # what the training script keeps as "args"
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=archive or None)
    except WeightsError:
        raise
    except Exception as error:  # errors of any kind; torch's own message would suggest loading unsafely
        raise WeightsError(
            f"{refused}it is damaged, of another format, or holds pickled objects other than tensors, which are never "
            f"loaded because that would run code from the file ({type(error).__name__})"
        ) from error
    if not isinstance(content, Mapping) or not content:
        raise WeightsError(f"{path} holds a {type(content).__name__}, not a state dict")
    _check_keys(content, path)
    return content


def _is_archive(path: Path) -> bool:
    """Whether PyTorch takes a file for an archive. It goes by the first bytes, where Python goes by the last ones."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"PK\x03\x04"
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror})") from error


def _check_keys(part: Mapping, path: Path) -> None:
    if not all(isinstance(key, str) for key in part):
        raise WeightsError(f"{path} has keys that are not strings; it is no state dict")


def _check_pickle(file: BinaryIO, refused: str) -> None:
    """Reads one pickle of a file, and raises WeightsError if it holds anything but dense tensors in nested containers.

    It follows the stack of the unpickler, on which it keeps only the names of globals and, for everything else, a size:
    0 for an empty tuple, 1 for what is not a tuple. Sizes are counted because tuples in tuples, used again by
    reference, can be of exponential size."""
    stack: list[int | str] = []
    marks: list[int] = []
    memo: dict[int, int | str] = {}
    for opcode, found, _ in pickletools.genops(file):
        argument: Any = found
        needed, left = opcode.stack_before, opcode.stack_after
        if pickletools.markobject in needed:
            first = marks.pop()
            start = first - needed.index(pickletools.markobject)
        else:
            first = start = len(stack) - len(needed)
        if start < 0:
            raise ValueError("nothing left on the stack")
        popped = stack[first:]
        pushed: list[int | str] = [1] * len(left)
        if opcode.name == "GLOBAL":
            if not PICKLED.fullmatch(argument):
                raise WeightsError(
                    f"{refused}it holds pickled objects other than dense tensors ({argument[:100]}), which are never "
                    "loaded because that would run code from the file"
                )
            pushed = [argument]
        elif opcode.name == "MARK":
            marks.append(len(stack))
            pushed = []
        elif "PUT" in opcode.name:
            memo[argument] = stack[-1]
        elif "GET" in opcode.name:
            pushed = [memo[argument]]
        elif pickletools.pytuple in left:
            size = 1 + sum(part if isinstance(part, int) else 1 for part in popped) if popped else 0
            if size > TUPLE_SIZE:
                raise WeightsError(f"{refused}it holds tuples in tuples of more than {TUPLE_SIZE} parts")
            pushed = [size]
        elif opcode.name == "REDUCE" and popped[0] == "collections OrderedDict" and popped[1] != 0:
            raise WeightsError(f"{refused}it makes dictionaries of other objects")
        stack[start:] = pushed


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise WeightsError("reading .pt files needs PyTorch: pip install '.[torch]'") from error
    return torch
