"""Hostile and damaged weight files for the tests of the readers: one tiny model in every form, and how to spoil it."""

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dit_jax.checkpoint import save_weights, weight_shapes
from dit_jax.config import DiTConfig
from dit_jax.facts import Facts
from dit_jax.weights import WeightsError, convert, convert_entries, source_shapes

CONFIG = DiTConfig(input_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=2, num_classes=3)
# what no file of these tests says of it
TOLD: Any = {"prediction": "epsilon", "num_heads": 2, "num_classes": 3, "input_size": 4}
KEYS = sorted(source_shapes(CONFIG))
RNG = np.random.default_rng(0)
OFFICIAL = {key: RNG.standard_normal(shape, np.float32) for key, shape in source_shapes(CONFIG).items()}
DIFFUSERS = {  # its config.json in the form of the diffusers library
    "activation_fn": "gelu-approximate",
    "attention_head_dim": 4,
    "in_channels": 3,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 2,
    "num_layers": 1,
    "patch_size": 2,
    "sample_size": 4,
}


def tensors() -> dict:
    """The model's state dict; its tensors may be written to."""
    return {key: torch.tensor(value) for key, value in OFFICIAL.items()}


def read(path):
    return convert(path, **TOLD)


def refused(path, message: str) -> str:
    """The whole text of the error, which is a `WeightsError` that matches `message`."""
    with pytest.raises(WeightsError, match=message) as caught:
        read(path)
    assert type(caught.value) is WeightsError, type(caught.value)
    return str(caught.value)


def same(path):
    """Asserts that the file or folder is read as the model."""
    entries = read(path).weights
    np.testing.assert_array_equal(entries["t_embedder.fc1.bias"], OFFICIAL["t_embedder.mlp.0.bias"])
    shapes = {key: array.shape for key, array in entries.items()}
    assert shapes == weight_shapes(CONFIG), shapes


# --- safetensors


def safetensors(path: Path, header, data: bytes = b"", claimed: int | None = None) -> Path:
    """A file with this header, JSON or bytes, this data, and the header's own length or the one claimed."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if claimed is None else claimed) + content + data)
    return path


def entry(shape, start, end, dtype="F32") -> dict:
    """What the header says of one tensor."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


# --- PyTorch files


def torch_file(path: Path) -> Path:
    """The model as a good .pt file."""
    torch.save(tensors(), path)
    return path


def repacked(source: Path, path: Path, content: bytes | None = None, compression=zipfile.ZIP_STORED, extra=()) -> Path:
    """A .pt archive again, with another pickle, compression or further entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for item in old.infolist():
            pickled = item.filename.endswith("/data.pkl")
            new.writestr(item.filename, old.read(item) if content is None or not pickled else content)
        for name in extra:
            new.writestr(name, "planted")
    return path


def with_pickle(plain: Path, body: bytes, legacy: bool = False) -> Path:
    """A .pt file beside the good one `plain`, whose content is the pickle of this body."""
    path = plain.with_name("crafted.pt")
    if not legacy:
        return repacked(plain, path, b"\x80\x02" + body + b".")
    torch.save({}, path, _use_new_zipfile_serialization=False)
    file = io.BytesIO(path.read_bytes())
    parts = []
    for _ in range(5):
        start = file.tell()
        pickle.load(file)
        parts.append(file.getvalue()[start : file.tell()])
    parts[3] = b"\x80\x02" + body + b"."
    path.write_bytes(b"".join(parts))
    return path


DEEP = 300_000
PICKLES = {  # bodies of pickles of protocol 2, made to exhaust memory or stack, or malformed
    "key of many tuples": b"})" + b"\x85" * DEEP + b"Ns",
    "key of exponential size": b")q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b"0}h\x00Ns",
    "key whose size a call hides": b")q\x00"
    + b"ctorch._utils\n_rebuild_parameter\nh\x00h\x00\x86\x85Rq\x00" * 64
    + b"0}h\x00Ns",
    "key whose size a class hides": b")q\x00" + b"ctorch\nSize\nh\x00h\x00\x86\x85Rq\x00" * 64 + b"0}h\x00Ns",
    "key whose size a reference hides": b")q\x00"
    + b"(X\x06\x00\x00\x00moduleh\x00h\x00\x86NNtQq\x00" * 64
    + b"0}h\x00Ns",
    "key of doubled tuples": b")" + b"2\x86" * 64 + b"q\x000}h\x00Ns",
    "a memo of gigabytes": b"}r\xff\xff\xff\x7f",
    "many classes": b"".join(b"ca\nb%d\n0" % i for i in range(20_000)) + b"}",
    "key of exponential width": b")q\x00" + (b"(" + b"h\x00" * 99 + b"tq\x00") * 9 + b"0}h\x00Ns",
    "value of many tuples": b"}X\x01\x00\x00\x00a)" + b"\x85" * DEEP + b"s",
    "many marks": b"(" * DEEP,
    "text doubled by a codec": b"c_codecs\nencode\nq\x01X\x01\x00\x00\x00aX\x06\x00\x00\x00latin1\x86Rq\x00"
    + b"h\x01h\x00X\x03\x00\x00\x00hex\x86Rq\x00" * 30,
    "many bytes": b"}X\x01\x00\x00\x00ac__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85Rs",
    "many numbers": b"}X\x01\x00\x00\x00actorch\nFloatTensor\nJ\xff\xff\xff\x7f\x85Rs",
    "dictionary of an object": b"}X\x01\x00\x00\x00accollections\nOrderedDict\n]\x85Rs",
    "dictionary of a list": b"}X\x01\x00\x00\x00accollections\nOrderedDict\n](N]eRs",
    "unknown opcode": b"}\xff",
    "nothing on the stack": b"\x85\x85\x85",
    "memo of nothing": b"}h\x07Ns",
    "endless text": b"X\xff\xff\xff\xffabc",
    "nothing at all": b"",
    "none": b"N",
    "a list": b"]",
    "an empty dictionary": b"}",
}

# --- model folders


def model_folder(path: Path) -> Path:
    """The model as a good model folder."""
    save_weights(CONFIG, convert_entries(OFFICIAL, "file", Facts(**TOLD))[1], path)
    return path


def edited(folder: Path, **changes) -> Path:
    """The model folder with these entries changed in the config of its manifest."""
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "config": {**manifest["config"], **changes}}))
    return folder


def rezarred(folder: Path, **changes) -> Path:
    """The model folder with these entries changed in the description of an array."""
    path = folder / "params" / "pos_embed" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


SIZES = [  # changes of a config that ask for gigabytes and more
    *[{name: value} for name in ("depth", "num_classes", "in_channels") for value in (10**9, 10**12, 2**63, 10**400)],
    *[{"hidden_size": 8 * value} for value in (10**9, 2**63, 10**400)],
    *[{"input_size": value, "patch_size": 1} for value in (10**5, 2**31, 10**400)],
    {"input_size": 2**40, "patch_size": 2**40},
]
