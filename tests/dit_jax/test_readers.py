"""Hostile and damaged files: each a refusal that names it, with nothing run, nothing written and no memory taken."""

import argparse
import gc
import io
import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from dit_jax.checkpoint import load_model, save_weights, weight_shapes
from dit_jax.config import DiTConfig
from dit_jax.disk import CheckpointError
from dit_jax.weights import WeightsError, convert, convert_entries, source_shapes

CONFIG = DiTConfig(input_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=2, num_classes=3)
KEYS = sorted(source_shapes(CONFIG))
MEMORY = 300 * 2**20  # bytes that a refusal may take beyond a conversion


@pytest.fixture(scope="module")
def official():
    rng = np.random.default_rng(0)
    return {key: rng.standard_normal(shape, np.float32) for key, shape in source_shapes(CONFIG).items()}


def tensors(entries) -> dict:
    return {key: torch.tensor(value) for key, value in entries.items()}


def read(path):
    return convert(path, num_heads=CONFIG.num_heads)


def refused(path, message: str) -> str:
    with pytest.raises(WeightsError, match=message) as caught:
        read(path)
    assert type(caught.value) is WeightsError
    return str(caught.value)


def same(path, official):
    entries = read(path).weights
    np.testing.assert_array_equal(entries["t_embedder.fc1.bias"], official["t_embedder.mlp.0.bias"])
    assert {key: array.shape for key, array in entries.items()} == weight_shapes(CONFIG)


# --- safetensors


def safetensors(path: Path, header, data: bytes = b"", claimed: int | None = None) -> Path:
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(content) if claimed is None else claimed) + content + data)
    return path


def entry(shape, start, end, dtype="F32"):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


HEADERS = {
    "header beyond the file": ({"a": entry([1], 0, 4)}, bytes(4), 10**6),
    "absurd header": ({"a": entry([1], 0, 4)}, bytes(4), 2**63 - 1),
    "longest header": ({"a": entry([1], 0, 4)}, bytes(4), 2**64 - 1),
    "no JSON": (b"weights, honestly", b"", None),
    "no UTF-8": (b'{"\xff\xfe": 1}', b"", None),
    "a list": ([entry([1], 0, 4)], bytes(4), None),
    "a number": (7, b"", None),
    "an entry is a list": ({"a": [1, 2]}, bytes(4), None),
    "nested lists": (b"[" * 100_000, b"", None),
    "nested objects": (b'{"a":' * 100_000, b"", None),
    "overflowing shape": ({"a": entry([2**40, 2**40], 0, 4)}, bytes(4), None),
    "size beyond an integer": ({"a": entry([2**70], 0, 4)}, bytes(4), None),
    "negative size": ({"a": entry([-1], 0, 4)}, bytes(4), None),
    "fractional size": ({"a": entry([1.5], 0, 4)}, bytes(4), None),
    "size in words": ({"a": entry(["one"], 0, 4)}, bytes(4), None),
    "negative offset": ({"a": entry([1], -4, 0)}, bytes(4), None),
    "offsets outside": ({"a": entry([2], 0, 8)}, bytes(4), None),
    "offsets in reverse": ({"a": entry([1], 4, 0)}, bytes(4), None),
    "overlap": ({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, bytes(4), None),
    "gap": ({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12), None),
    "more data than entries": ({"a": entry([1], 0, 4)}, bytes(8), None),
    "shape that lies": ({"a": entry([3], 0, 4)}, bytes(4), None),
    "type that lies": ({"a": entry([1], 0, 4, "F64")}, bytes(4), None),
    "unknown type": ({"a": entry([1], 0, 4, "F33")}, bytes(4), None),
    "metadata of another kind": ({"__metadata__": {"a": 1}, "a": entry([1], 0, 4)}, bytes(4), None),
    "a key twice": (
        b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}',
        bytes(8),
        None,
    ),
}


@pytest.mark.parametrize("fault", HEADERS)
def test_headers_that_lie(tmp_path, fault):
    header, data, claimed = HEADERS[fault]
    refused(safetensors(tmp_path / "model.safetensors", header, data, claimed), "not a readable safetensors file")


def test_a_whole_model_in_a_header_made_here_is_read(tmp_path, official):
    """So that the refusals above are for their faults, not for the way that the files are made."""
    header, data = {}, b""
    for key, array in official.items():
        header[key] = entry(list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    path = safetensors(tmp_path / "model.safetensors", header, data)
    same(path, official)
    content = path.read_bytes()
    for length in (0, 7, 8, 100, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "not a readable safetensors file")
    path.write_bytes(content[:8])
    os.truncate(path, 2**20)
    refused(path, "not a readable safetensors file")


@pytest.mark.parametrize("dtype", ["I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2"])
def test_types_that_are_no_real_numbers_are_listed(tmp_path, official, dtype):
    width = {"I64": 8, "I32": 4}.get(dtype, 1)
    header, data = {}, b""
    for key, array in official.items():
        wrong = key == KEYS[3]
        size = array.size * (width if wrong else 4)
        header[key] = entry(list(array.shape), len(data), len(data) + size, dtype if wrong else "F32")
        data += bytes(size)
    message = refused(safetensors(tmp_path / "model.safetensors", header, data), "cannot be converted")
    assert message.splitlines()[1:] == [f"  not a real-valued dense tensor: {KEYS[3]}"]


def test_empty_tensors_of_any_claim_are_listed(tmp_path, official):
    """No byte accounts for the other sizes of an empty tensor, which must tell nothing about the model."""
    others = {key: value for key, value in official.items() if key != "pos_embed"}
    header, data = {"pos_embed": entry([1, 2**40, 0], 0, 0)}, b""
    for key, array in others.items():
        header[key] = entry(list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    path = safetensors(tmp_path / "model.safetensors", header, data)
    assert "not a real-valued dense tensor: pos_embed" in refused(path, "cannot tell input_size")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_real_types_are_rounded_to_float32(tmp_path, official, dtype):
    narrow = {key: (value / 3).astype(getattr(ml_dtypes, dtype, dtype)) for key, value in official.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file({key: value.astype(np.float32) for key, value in narrow.items()}, tmp_path / "wide.safetensors")
    found, expected = read(tmp_path / "narrow.safetensors").weights, read(tmp_path / "wide.safetensors").weights
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, strict=True)


# --- PyTorch files


def repacked(source: Path, path: Path, content: bytes | None = None, compression=zipfile.ZIP_STORED, extra=()) -> Path:
    """A .pt archive again, with another pickle, compression or further entries."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", compression) as new:
        for item in old.infolist():
            pickled = item.filename.endswith("/data.pkl")
            new.writestr(item.filename, old.read(item) if content is None or not pickled else content)
        for name in extra:
            new.writestr(name, "planted")
    return path


@pytest.fixture
def plain(tmp_path, official):
    """A good .pt file, in a folder of its own."""
    (tmp_path / "plain").mkdir()
    torch.save(tensors(official), tmp_path / "plain" / "model.pt")
    return tmp_path / "plain" / "model.pt"


def with_pickle(plain: Path, body: bytes, legacy: bool = False) -> Path:
    """A .pt file whose content is this pickle."""
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


class OlderReader:
    """PyTorch's reader of archives as it was in 2.11: it cannot tell the size of a record."""

    def __init__(self, path: str):
        reader = READER(path)
        self.get_record, self.get_record_offset = reader.get_record, reader.get_record_offset


READER = torch._C.PyTorchFileReader


@pytest.fixture(params=["this PyTorch", "PyTorch 2.11"])
def pytorch(request, monkeypatch):
    if request.param == "PyTorch 2.11":
        monkeypatch.setattr(torch._C, "PyTorchFileReader", OlderReader)
        load = torch.load

        def loaded(*args, **options):  # PyTorch's own loading needs its own reader
            with monkeypatch.context() as patch:
                patch.setattr(torch._C, "PyTorchFileReader", READER)
                return load(*args, **options)

        monkeypatch.setattr(torch, "load", loaded)
    return request.param


def test_repacked_archives_are_read(plain, tmp_path, official, pytorch):
    same(repacked(plain, tmp_path / "again.pt"), official)


def test_compressed_archive_is_refused_before_it_is_unpacked(plain, tmp_path):
    packed = repacked(plain, tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    refused(packed, r"archive is compressed \('model/data\.pkl'\)")
    assert torch.load(packed, weights_only=True)  # PyTorch itself reads it


def test_archive_that_python_and_pytorch_see_differently(plain, tmp_path, pytorch):
    """Two directories in one archive: Python takes the one before the end, PyTorch the one at the offset given."""
    bomb = repacked(plain, tmp_path / "bomb.pt", bytes(2**22), zipfile.ZIP_DEFLATED).read_bytes()
    good = repacked(plain, tmp_path / "good.pt").read_bytes()

    def directory(content: bytes) -> tuple[bytes, int]:
        size, offset = struct.unpack("<2L", content[-10:-2])
        return content[offset : offset + size], offset

    (seen, offset), (shown, _) = directory(bomb), directory(good)
    count = shown.count(b"PK\1\2")
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(shown), offset, 0)
    path = tmp_path / "both.pt"
    path.write_bytes(bomb[:offset] + seen + shown + end)
    with zipfile.ZipFile(path) as file:
        assert {item.compress_type for item in file.infolist()} == {zipfile.ZIP_STORED}
    refused(path, "its archive is compressed; save it with" if pytorch == "this PyTorch" else "it is damaged")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size", [2**20, 2**40, 2**60])
def test_repeated_views_are_refused(tmp_path, official, legacy, size):
    content = {**tensors(official), "x_embedder.proj.bias": torch.zeros(1).expand(size)}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "model.pt", "claims tensors of|not a readable checkpoint")


@pytest.mark.parametrize("legacy", [False, True])
def test_storage_sizes_that_lie(tmp_path, legacy):
    """The size stands in the storage's reference, in the tensor's shape and, in the older form, in the data."""
    path = tmp_path / "model.pt"
    torch.save({"blocks.0.mlp.fc1.bias": torch.zeros(77_777)}, path, _use_new_zipfile_serialization=not legacy)
    content, told = path.read_bytes(), struct.pack("<i", 77_777)
    if not legacy:
        with zipfile.ZipFile(path) as file:
            content = file.read("model/data.pkl")
    assert content.count(told) == (3 if legacy else 2)
    for lie in (1, 77_778, 2**31 - 1, -1):
        for places in (1, 2):
            changed = content.replace(told, struct.pack("<i", lie), places)
            if legacy:
                (tmp_path / "lie.pt").write_bytes(changed)
            else:
                repacked(path, tmp_path / "lie.pt", changed)
            refused(tmp_path / "lie.pt", "claims tensors of|not a readable checkpoint|cannot be converted|damaged")


def test_numbers_that_are_none_are_listed_by_key(tmp_path, official):
    content = tensors(official)
    content[KEYS[2]].view(-1)[-1] = torch.nan
    content[KEYS[5]].view(-1)[0] = -torch.inf
    content[KEYS[7]] = content[KEYS[7]].double() + 1e300  # beyond float32
    torch.save(content, tmp_path / "model.pt")
    lines = refused(tmp_path / "model.pt", "cannot be converted").splitlines()[1:]
    assert sorted(lines) == sorted(f"  not finite: {KEYS[i]}" for i in (2, 5, 7))


@pytest.mark.parametrize("kind", ["integer", "boolean", "complex", "no tensor"])
@pytest.mark.parametrize("legacy", [False, True])
def test_values_that_are_no_real_tensors_are_listed(tmp_path, official, kind, legacy):
    value = {"integer": torch.arange(8), "boolean": torch.ones(8) > 0, "complex": torch.ones(8) * 1j, "no tensor": "8"}
    content = {**tensors(official), "x_embedder.proj.bias": value[kind]}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / "model.pt", "cannot be converted")
    assert message.splitlines()[1:] == ["  not a real-valued dense tensor: x_embedder.proj.bias"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "quantised", "float8", "bytes"])
def test_tensors_of_other_kinds_are_refused_by_name(tmp_path, official, kind, legacy):
    if kind == "sparse":
        value, name = torch.eye(8).to_sparse(), "_rebuild_sparse_tensor"
    elif kind == "quantised":
        value, name = torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.quint8), "_rebuild_qtensor"
    elif kind == "float8":
        value, name = torch.ones(8).to(torch.float8_e4m3fn), "_rebuild_tensor_v3"
    else:
        value, name = b"8", "encode"
    content = {**tensors(official), "x_embedder.proj.bias": value}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    refused(tmp_path / "model.pt", rf"objects other than dense tensors \(\S+ {name}\), which are never loaded")


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torchscript_archive(tmp_path):
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), str(tmp_path / "script.pt"))
    refused(tmp_path / "script.pt", "not a readable checkpoint")


def test_tar_archive_of_the_first_versions(tmp_path):
    path = tmp_path / "model.pt"
    with tarfile.open(path, "w") as file:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            content = pickle.dumps({"pos_embed": 1}, 2)
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    refused(path, "not a readable checkpoint")


@pytest.mark.parametrize("legacy", [False, True])
def test_keys_that_are_no_strings(tmp_path, official, legacy):
    weights = tensors(official)
    for content in ({**weights, 1: torch.ones(1)}, {"ema": {**weights, (1, 2): 3}}, {"ema": weights, 3: 4}):
        torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
        refused(tmp_path / "model.pt", "keys that are not strings")


DEEP = 300_000
PICKLES = {  # bodies of pickles of protocol 2
    "key of many tuples": b"})" + b"\x85" * DEEP + b"Ns",
    "key of exponential size": b")q\x00" + b"h\x00h\x00\x86q\x00" * 64 + b"0}h\x00Ns",
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


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_made_to_exhaust_memory_or_stack(plain, name, legacy):
    start = time.monotonic()
    refused(with_pickle(plain, PICKLES[name], legacy), "not a readable checkpoint|not a state dict")
    assert time.monotonic() - start < 20


def test_lists_in_lists_do_no_harm(plain):
    """As deep as those above, as a value: nothing looks into it."""
    body = b"}X\x01\x00\x00\x00a" + b"]" * DEEP + b"a" * (DEEP - 1) + b"s"
    refused(with_pickle(plain, body), "no entries blocks")


@pytest.mark.parametrize("junk", [[1, 2], "weights", 3, None, {}, {"a": 3}, {"blocks.0.attn": {"b": 1}}, {"a": [1]}])
def test_training_form_with_junk_for_weights(tmp_path, official, junk):
    torch.save({"ema": junk, "model": tensors(official), "args": argparse.Namespace(a=1)}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "without 'ema'|no entries blocks|missing")
    assert convert(tmp_path / "model.pt", which="model", num_heads=2).config == CONFIG


@pytest.mark.parametrize("name", ["../../x", "/x", "model/../../../x", "..\\x", "model/data/../../x"])
def test_names_in_an_archive_lead_nowhere(plain, tmp_path, official, name):
    climbing = repacked(plain, tmp_path / "climbing.pt", extra=[name])
    before = sorted(tmp_path.parent.parent.glob("*")), sorted(tmp_path.parent.rglob("*"))
    if name.startswith("model/"):
        same(climbing, official)
    else:
        refused(climbing, "not a readable checkpoint")
    assert (sorted(tmp_path.parent.parent.glob("*")), sorted(tmp_path.parent.rglob("*"))) == before
    assert not Path("/x").exists()


# --- planted code


class Planted:
    """Unpickling this makes a folder."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("place", ["entry", "folder", "args", "ema", "key"])
def test_planted_code_never_runs(tmp_path, official, place, legacy, pytorch):
    marker = tmp_path / "marker"
    planted, weights = Planted(marker), tensors(official)
    content = {
        "entry": {**weights, "pos_embed": planted},
        "folder": {**weights, "extra": planted},
        "args": {"ema": weights, "model": weights, "args": argparse.Namespace(model=planted)},
        "ema": {"ema": planted, "model": weights},
        "key": {planted: weights},
    }[place]
    path = tmp_path / "model" / ("pytorch_model.bin" if place == "folder" else "model.pt")
    path.parent.mkdir()
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    for which in ("ema", "model"):
        with pytest.raises(WeightsError, match=r"\(posix mkdir\), which are never loaded"):
            convert(path.parent if place == "folder" else path, which=which, num_heads=2)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the attack does work where files are trusted
    assert marker.exists()


# --- indexes and links

SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")


@pytest.fixture
def shards(tmp_path, official):
    """A good folder of two shards and their index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, name in enumerate(SHARDS):
        save_file({key: official[key] for key in KEYS[i::2]}, folder / name)
    write_index(folder, {key: SHARDS[i % 2] for i, key in enumerate(KEYS)})
    return folder


def write_index(folder: Path, names) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def weight_map(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_shards_are_read(shards, official):
    same(shards, official)


@pytest.mark.parametrize(
    "name",
    ["../model-1-of-2.safetensors", "/etc/passwd", "..", ".", "", "a/b", "a\\b", "a\0b", "\ud800", "x" * 5000, "none"],
)
def test_names_that_lead_out_of_the_folder(shards, name):
    shutil.copy(shards / SHARDS[0], shards.parent / SHARDS[0])  # what the climbing name would find
    write_index(shards, {**weight_map(shards), KEYS[0]: name})
    refused(shards, "only plain names in the same folder|has no file|is not there")


@pytest.mark.parametrize("name", [None, 3, 1.5, True, ["a"], {"a": 1}])
def test_names_that_are_no_strings(shards, name):
    write_index(shards, {**weight_map(shards), KEYS[0]: name})
    refused(shards, "something else than strings")


@pytest.mark.parametrize("names", [None, 3, [], {}, "model", [["a", "b"]]])
def test_weight_maps_that_are_none(shards, names):
    write_index(shards, names)
    refused(shards, "no weight_map")


def test_shards_that_hold_other_keys_than_the_index_says(shards, official):
    names = weight_map(shards)
    write_index(shards, {**names, KEYS[0]: SHARDS[1]})
    assert KEYS[0] in refused(shards, "does not hold what its index says")
    write_index(shards, {key: name for key, name in names.items() if key != KEYS[0]})
    assert KEYS[0] in refused(shards, "does not hold what its index says")
    write_index(shards, {**names, "extra": SHARDS[0]})
    assert "extra" in refused(shards, "does not hold what its index says")
    write_index(shards, names)
    save_file({key: official[key] for key in KEYS}, shards / SHARDS[0])  # keys in both shards
    refused(shards, "does not hold what its index says")
    (shards / SHARDS[0]).unlink()
    refused(shards, "has no file 'model-1-of-2")


def test_links_out_of_the_folder_are_refused_and_within_are_followed(shards, tmp_path, official):
    first = shards / SHARDS[0]
    first.rename(tmp_path / "elsewhere.safetensors")
    first.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(shards, "is a link out of its folder")
    first.unlink()
    (tmp_path / "elsewhere.safetensors").rename(shards / "inside")
    first.symlink_to("inside")
    same(shards, official)


def test_links_in_a_circle(shards):
    first = shards / SHARDS[0]
    first.unlink()
    first.symlink_to(SHARDS[0])
    refused(shards, "broken link")
    (shards.parent / "a.pt").symlink_to("b.pt")
    (shards.parent / "b.pt").symlink_to("a.pt")
    refused(shards.parent / "a.pt", "is not a file")


def test_cache_of_hugging_face(tmp_path, official):
    """Files are links into the blobs beside the snapshots. No other place beside them will do."""
    root = tmp_path / "models--facebook--DiT"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    save_file(official, root / "blobs" / "f00d")
    (root / "blobs" / "beef").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    same(snapshot, official)
    same(snapshot / "model.safetensors", official)
    (root / "blobs" / "f00d").rename(root / "f00d")
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to("../../f00d")
    refused(snapshot, "is a link out of its folder")


def test_indexes_of_any_size_are_read_in_time(shards):
    start = time.monotonic()
    write_index(shards, {**weight_map(shards), **{f"key.{i}": SHARDS[0] for i in range(100_000)}})
    refused(shards, "does not hold what its index says")
    write_index(shards, {f"key.{i}": f"shard-{i}.safetensors" for i in range(100_000)})
    refused(shards, "has no file 'shard-0")
    assert time.monotonic() - start < 10


JSONS = {
    "empty": (b"", "cannot be read as JSON"),
    "words": (b"weights, honestly", "cannot be read as JSON"),
    "cut": (b'{"weight_map": {"a', "cannot be read as JSON"),
    "bytes": (b"\xff\xfe\x00", "cannot be read as JSON"),
    "nested lists": (b"[" * 100_000, "cannot be read as JSON"),
    "nested objects": (b'{"a":' * 100_000, "cannot be read as JSON"),
    "a number of many digits": (b'{"a": ' + b"9" * 100_000 + b"}", "cannot be read as JSON"),
    "a list": (b"[1, 2]", "holds a list, not a JSON object"),
    "null": (b"null", "holds a NoneType, not a JSON object"),
}


@pytest.mark.parametrize("fault", JSONS)
@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_json_files_that_are_none(shards, name, fault):
    content, message = JSONS[fault]
    (shards / name).write_bytes(content)
    refused(shards, message)


@pytest.mark.parametrize("name", ["model.safetensors.index.json", "config.json"])
def test_json_files_of_absurd_size(shards, name):
    path = shards / name
    path.touch()
    os.truncate(path, 10**8)  # takes no room on disk
    refused(shards, r"has 100000000 bytes; that is no config or index")


# --- folders


def test_several_checkpoints_are_named(tmp_path, official):
    for name in ("ema.safetensors", "model.safetensors"):
        save_file(official, tmp_path / name)
    refused(tmp_path, r"several checkpoints, ema\.safetensors, model\.safetensors; give the file")


def test_folder_of_a_whole_pipeline(tmp_path, official):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    save_file(official, tmp_path / "transformer" / "model.safetensors")
    message = refused(tmp_path, "whole diffusers pipeline")
    assert str(tmp_path / "transformer") in message
    same(tmp_path / "transformer", official)


def test_configs_that_are_no_files(tmp_path, official):
    save_file(official, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.mkdir()
    refused(tmp_path, r"config\.json is not a file")
    config.rmdir()
    os.mkfifo(config)
    refused(tmp_path, r"config\.json is not a file")  # and does not wait for a writer
    config.unlink()
    config.symlink_to("nowhere.json")
    same(tmp_path, official)  # as if there were none, which this form does not need
    config.unlink()
    (tmp_path.parent / "outside.json").write_text("{}")
    config.symlink_to(tmp_path.parent / "outside.json")
    refused(tmp_path, "is a link out of its folder")


def test_checkpoints_that_are_no_files(tmp_path):
    for name in ("model.pt", "model.safetensors"):
        os.mkfifo(tmp_path / name)
        refused(tmp_path / name, "is not a file")
        refused(tmp_path, "is not a file")
        (tmp_path / name).unlink()
        (tmp_path / name).mkdir()
        refused(tmp_path, "is not a file|holds no .safetensors")
        (tmp_path / name).rmdir()


DIFFUSERS = {
    "activation_fn": "gelu-approximate",
    "attention_head_dim": 4,
    "in_channels": 3,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 2,
    "num_layers": 1,
    "patch_size": 2,
    "sample_size": 4,
}


@pytest.mark.parametrize("value", [None, True, 4.0, "4", [4], {"a": 4}, -4, 0, 2**16, 10**400, float("nan")])
@pytest.mark.parametrize("key", ["sample_size", "num_layers", "attention_head_dim", "patch_size"])
def test_configs_of_wrong_types(tmp_path, key, value):
    save_file({"transformer_blocks.0.ff.net.2.bias": np.zeros(8, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({**DIFFUSERS, key: value}))
    refused(tmp_path, f"{key} is .*, not a size|cannot be read as JSON")


def test_diffusers_keys_without_a_number(tmp_path):
    save_file({"transformer_blocks.first.ff.net.2.bias": np.zeros(8, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(DIFFUSERS))
    refused(tmp_path, "blocks")


# --- model folders


@pytest.fixture(scope="module")
def saved(tmp_path_factory, official):
    folder = tmp_path_factory.mktemp("saved") / "model"
    save_weights(CONFIG, convert_entries(official, "file", CONFIG.num_heads)[1], folder)
    return folder


@pytest.fixture
def folder(tmp_path, saved):
    """A good model folder."""
    return shutil.copytree(saved, tmp_path / "model")


def edited(folder: Path, **changes) -> Path:
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "config": {**manifest["config"], **changes}}))
    return folder


def not_loaded(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert type(caught.value) is CheckpointError


SIZES = [
    *[{name: value} for name in ("depth", "num_classes", "in_channels") for value in (10**9, 10**12, 2**63, 10**400)],
    *[{"hidden_size": 8 * value} for value in (10**9, 2**63, 10**400)],
    *[{"input_size": value, "patch_size": 1} for value in (10**5, 2**31, 10**400)],
    {"input_size": 2**40, "patch_size": 2**40},
]
ABSURD = [
    *SIZES,
    *[{"mlp_ratio": value} for value in (float("nan"), float("inf"), -1, 0, 1e300, 1e-300, "4", None, [4], {"a": 4})],
    *[{name: v} for name in ("depth", "hidden_size", "num_heads") for v in (0, -8, 8.0, "8", None, [8], {"a": 8})],
    *[{name: value} for name in ("prediction", "timestep_convention", "dtype") for value in (None, 3, [], {}, "x")],
    {"learn_sigma": None},
    {"learn_sigma": []},
    {"another": 1},
]


@pytest.mark.parametrize("changes", ABSURD, ids=lambda changes: str(changes)[:40])
def test_absurd_configs_are_refused_at_once(folder, changes):
    start = time.monotonic()
    not_loaded(edited(folder, **changes), "config is not usable|asks for more bytes|does not fit|cannot be read")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"[" * 100_000, "cannot be read"),
        (b'{"a":' * 100_000, "cannot be read"),
        (b"\xff\xfe", "cannot be read"),
        (b"[]", "is not the manifest"),
        (b'{"format": "syncgap-dit", "format_version": [1]}', "is of format version"),
        (b'{"format": "syncgap-dit", "format_version": 1, "config": ["depth"], "digest": 0}', "is not usable|unknown"),
        (b'{"format": "syncgap-dit", "format_version": 1, "config": [[]], "digest": 0}', "config is not usable"),
    ],
)
def test_manifests_that_are_none(folder, content, message):
    (folder / "manifest.json").write_bytes(content)
    not_loaded(folder, message)


def test_manifests_that_are_no_files(folder):
    (folder / "manifest.json").unlink()
    os.mkfifo(folder / "manifest.json")
    not_loaded(folder, "no manifest")
    (folder / "manifest.json").unlink()
    (folder / "manifest.json").mkdir()
    not_loaded(folder, "no manifest")
    not_loaded(folder / "params" / "_METADATA", "no manifest")


def test_parameters_of_another_model(folder, tmp_path):
    other = DiTConfig(**{**CONFIG.to_dict(), "depth": 2})
    save_weights(other, {p: np.ones(s, np.float32) for p, s in weight_shapes(other).items()}, tmp_path / "other")
    shutil.rmtree(folder / "params")
    shutil.copytree(tmp_path / "other" / "params", folder / "params")
    not_loaded(folder, r"blocks\.adaln\.bias is \(2, 48\), expected \(1, 48\)")


@pytest.mark.parametrize("kind", ["file", "folder", "outside", "dangling", "root"])
def test_links_in_parameters(folder, tmp_path, kind):
    place = folder / "params" / "x_embedder.bias"
    if kind == "root":
        (folder / "params").rename(tmp_path / "params")
        (folder / "params").symlink_to(tmp_path / "params")
    elif kind == "file":
        (place / ".zarray").rename(place / "zarray")
        (place / ".zarray").symlink_to("zarray")
    elif kind == "folder":
        place.rename(tmp_path / "moved")
        place.symlink_to(tmp_path / "moved")
    else:
        (place / "extra").symlink_to("/etc/passwd" if kind == "outside" else "nowhere")
    not_loaded(folder, "is a link|but a link")


def test_pipes_in_parameters_are_not_waited_for(folder):
    for name in ("_METADATA", "x_embedder.bias/.zarray", "x_embedder.bias/0"):
        path = folder / "params" / name
        content = path.read_bytes()
        path.unlink()
        os.mkfifo(path)
        not_loaded(folder, "is a link or no plain file")
        path.unlink()
        path.write_bytes(content)
    load_model(folder)


@pytest.fixture(scope="module")
def quiet():
    """From here on without Orbax's reports of the reads that it gives up after one has failed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    gc.collect()
    sys.unraisablehook = hook


def rezarred(folder: Path, **changes) -> Path:
    path = folder / "params" / "pos_embed" / ".zarray"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


@pytest.mark.parametrize(
    "changes",
    [
        {"shape": [2**40, 8]},
        {"shape": [2**40, 8], "chunks": [2**40, 8]},
        {"chunks": [2**40, 8]},
        {"chunks": [5, 8]},
        {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}},
        {"compressor": {"id": "zlib", "level": 1}},
        {"compressor": None},
        {"filters": [{"id": "delta"}]},
        {"dtype": "<f8"},
        {"dtype": "|O"},
        {"dtype": "<i4"},
        {"order": "Z"},
        {"zarr_format": 3},
    ],
    ids=str,
)
def test_arrays_described_as_what_they_are_not(folder, changes, quiet):
    not_loaded(
        rezarred(folder, **changes), "does not fit|as Orbax does|is damaged|not those the manifest|dtype is not one"
    )


# --- memory

PROBE = """
import contextlib, json, resource, sys, time
from pathlib import Path
from dit_jax.checkpoint import load_model
from dit_jax.weights import convert

def read(path):
    return load_model(path) if (path / "manifest.json").exists() else convert(path, num_heads=2)

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024

resource.setrlimit(resource.RLIMIT_AS, (24 * 2**30, resource.RLIM_INFINITY))  # a failure should not take the machine
good, bad = sys.argv[1:]
for path in sorted(Path(good).iterdir()):
    read(path)
found = {}
for path in sorted(Path(bad).iterdir()):
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # the peak is from now on
    before, start = peak(), time.monotonic()
    try:
        read(path)
        error = "none"
    except Exception as caught:
        error = type(caught).__name__
    found[path.name] = error, peak() - before, time.monotonic() - start
print(json.dumps(found))
"""


def probe(good: Path, bad: Path) -> dict:
    """Error, growth of the peak of memory and seconds for each case, read in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(good), str(bad)], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")


@needs_proc
@pytest.mark.long
def test_big_claims_take_no_memory(plain, folder, tmp_path, official):
    """Each would fill gigabytes if it were believed."""
    numcodecs = pytest.importorskip("numcodecs")
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    shutil.copy(plain, good / "model.pt")
    save_file(official, good / "model.safetensors")
    torch.save(tensors(official), good / "legacy.pt", _use_new_zipfile_serialization=False)
    shutil.copytree(folder, good / "model")

    zeros = {**tensors(official), "pos_embed": torch.zeros(2**27)}  # half a GiB, compressed to half a MiB
    torch.save(zeros, tmp_path / "zeros.pt")
    repacked(tmp_path / "zeros.pt", bad / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    (tmp_path / "zeros.pt").unlink()
    for legacy in (False, True):
        form = "legacy" if legacy else "zip"
        view = {**tensors(official), "x_embedder.proj.bias": torch.zeros(1).expand(2**40)}
        torch.save(view, bad / f"view-{form}.pt", _use_new_zipfile_serialization=not legacy)
        for name, body in PICKLES.items():
            shutil.move(with_pickle(plain, body, legacy), bad / f"{name}-{form}.pt")
    torch.save({"a": torch.zeros(77_777)}, bad / "storage.pt", _use_new_zipfile_serialization=False)
    content = (bad / "storage.pt").read_bytes()
    (bad / "storage.pt").write_bytes(content.replace(struct.pack("<i", 77_777), struct.pack("<i", 2**31 - 1)))
    safetensors(bad / "shape.safetensors", {"a": entry([2**30], 0, 2**32)}, bytes(4))
    safetensors(bad / "header.safetensors", {"a": entry([1], 0, 4)}, bytes(4), 2**34)
    for i, changes in enumerate([*SIZES, {"input_size": 8192}, {"hidden_size": 2**25}, {"num_classes": 2**28}]):
        edited(shutil.copytree(folder, bad / f"config-{i}"), **changes)
    swollen = shutil.copytree(folder, bad / "chunk")
    rezarred(swollen, chunks=[2**27, 8])
    zstd = numcodecs.Zstd(level=1).encode(np.zeros(2**30, np.uint8))
    (swollen / "params" / "pos_embed" / "0.0").write_bytes(zstd)
    (shutil.copytree(folder, bad / "zstd") / "params" / "pos_embed" / "0.0").write_bytes(zstd)
    blosc = rezarred(shutil.copytree(folder, bad / "blosc"), compressor=numcodecs.Blosc().get_config())
    packed = numcodecs.Blosc().encode(np.zeros(2**30, np.uint8))
    (blosc / "params" / "pos_embed" / "0.0").write_bytes(packed)

    found = probe(good, bad)
    assert len(found) > 60
    for name, (error, growth, seconds) in found.items():
        wanted = "CheckpointError" if (bad / name).is_dir() else "WeightsError"
        assert (error, growth < MEMORY, seconds < 20) == (wanted, True, True), (name, error, growth, seconds)


@needs_proc
@pytest.mark.slow
def test_position_embeddings_larger_than_the_file_take_no_memory(plain, tmp_path):
    """Half a gigabyte and more out of a megabyte, or out of the four lines of a config.json."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    (bad / "diffusers").mkdir(parents=True)
    good.mkdir()
    shutil.copy(plain, good / "model.pt")
    wide = 512
    entries = {
        "pos_embed": (1, wide * wide, 1),
        "x_embedder.proj.weight": (1, 1, 1, 1),
        "x_embedder.proj.bias": (wide,),
        "t_embedder.mlp.2.bias": (wide,),
        "y_embedder.embedding_table.weight": (2, 1),
        "blocks.0.mlp.fc1.bias": (wide,),
        "blocks.0.attn.proj.bias": (wide,),
        "final_layer.linear.weight": (1, 1),
    }
    save_file({key: np.zeros(shape, np.float32) for key, shape in entries.items()}, bad / "official.safetensors")
    diffusers = {"transformer_blocks.0.ff.net.2.bias": np.zeros(8, np.float32)}
    save_file(diffusers, bad / "diffusers" / "model.safetensors")
    config = {**DIFFUSERS, "patch_size": 1, "sample_size": wide, "attention_head_dim": wide // 2}
    (bad / "diffusers" / "config.json").write_text(json.dumps(config))
    for name, (error, growth, _) in probe(good, bad).items():
        assert error == "WeightsError", name
        assert growth < MEMORY, (name, growth)
