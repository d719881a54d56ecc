"""Damaged and hostile PyTorch files: each a refusal that names it, with no planted code run and nothing written."""

import argparse
import io
import os
import pickle
import struct
import tarfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hostile import CONFIG, DEEP, KEYS, PICKLES, TOLD, refused, repacked, same, tensors, torch_file, with_pickle

from dit_jax.weights import WeightsError, convert


@pytest.fixture
def plain(tmp_path):
    """A good .pt file, in a folder of its own."""
    (tmp_path / "plain").mkdir()
    return torch_file(tmp_path / "plain" / "model.pt")


def test_repacked_archives_are_read(plain, tmp_path):
    same(repacked(plain, tmp_path / "again.pt"))


def test_compressed_archive_is_refused_before_it_is_unpacked(plain, tmp_path):
    packed = repacked(plain, tmp_path / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    refused(packed, r"archive is compressed \('model/data\.pkl'\)")
    assert torch.load(packed, weights_only=True)  # PyTorch itself reads it


def test_archive_that_python_and_pytorch_see_differently(plain, tmp_path):
    """Two directories in one archive: Python takes the one before the end, PyTorch the one at the offset given. Only
    Python's is read, whose records are not where they should be."""
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
    refused(path, "it is damaged")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("size", [2**20, 2**40, 2**60])
def test_repeated_views_are_refused(tmp_path, legacy, size):
    content = {**tensors(), "x_embedder.proj.bias": torch.zeros(1).expand(size)}
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


def test_numbers_that_are_none_are_listed_by_key(tmp_path):
    content = tensors()
    content[KEYS[2]].view(-1)[-1] = torch.nan
    content[KEYS[5]].view(-1)[0] = -torch.inf
    content[KEYS[7]] = content[KEYS[7]].double() + 1e300  # beyond float32
    torch.save(content, tmp_path / "model.pt")
    lines = refused(tmp_path / "model.pt", "cannot be converted").splitlines()[1:]
    assert sorted(lines) == sorted(f"  not finite: {KEYS[i]}" for i in (2, 5, 7))


@pytest.mark.parametrize("kind", ["integer", "boolean", "complex", "no tensor"])
@pytest.mark.parametrize("legacy", [False, True])
def test_values_that_are_no_real_tensors_are_listed(tmp_path, kind, legacy):
    value = {"integer": torch.arange(8), "boolean": torch.ones(8) > 0, "complex": torch.ones(8) * 1j, "no tensor": "8"}
    content = {**tensors(), "x_embedder.proj.bias": value[kind]}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / "model.pt", "cannot be converted")
    assert message.splitlines()[1:] == ["  not a real-valued dense tensor: x_embedder.proj.bias"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("kind", ["sparse", "quantised", "float8", "bytes", "negated"])
def test_tensors_of_other_kinds_are_listed(tmp_path, kind, legacy):
    value = {
        "sparse": lambda: torch.eye(8).to_sparse(),
        "quantised": lambda: torch.quantize_per_tensor(torch.ones(8), 0.1, 0, torch.quint8),
        "float8": lambda: torch.ones(8).to(torch.float8_e4m3fn),
        "bytes": lambda: b"8",
        "negated": lambda: torch._neg_view(torch.ones(8)),
    }[kind]()
    content = {**tensors(), "x_embedder.proj.bias": value}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    message = refused(tmp_path / "model.pt", "cannot be converted|numbers of an unknown kind")
    assert message.splitlines()[1:] in ([], ["  not a real-valued dense tensor: x_embedder.proj.bias"])


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
def test_keys_that_are_no_strings(tmp_path, legacy):
    weights = tensors()
    for content in ({**weights, 1: torch.ones(1)}, {"ema": {**weights, (1, 2): 3}}, {3: 4, "ema": weights}):
        torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
        refused(tmp_path / "model.pt", "keys that are not strings")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", PICKLES)
def test_pickles_made_to_exhaust_memory_or_stack(plain, name, legacy):
    start = time.monotonic()
    refused(with_pickle(plain, PICKLES[name], legacy), "not a readable checkpoint|not? a? ?state dict|no entries")
    assert time.monotonic() - start < 20


def test_lists_in_lists_do_no_harm(plain):
    """As deep as those above, as a value: nothing looks into it."""
    body = b"}X\x01\x00\x00\x00a" + b"]" * DEEP + b"a" * (DEEP - 1) + b"s"
    refused(with_pickle(plain, body), "no entries blocks")


@pytest.mark.parametrize("junk", [[1, 2], "weights", 3, None, {}, {"a": 3}, {"blocks.0.attn": {"b": 1}}, {"a": [1]}])
def test_training_form_with_junk_for_weights(tmp_path, junk):
    torch.save({"ema": junk, "model": tensors(), "args": argparse.Namespace(a=1)}, tmp_path / "model.pt")
    refused(tmp_path / "model.pt", "without 'ema' weights .* give --which model")
    assert convert(tmp_path / "model.pt", which="model", **TOLD).config == CONFIG


@pytest.mark.parametrize("name", ["../../x", "/x", "model/../../../x", "..\\x", "model/data/../../x"])
def test_names_in_an_archive_lead_nowhere(plain, tmp_path, name):
    climbing = repacked(plain, tmp_path / "climbing.pt", extra=[name])
    before = sorted(tmp_path.parent.parent.glob("*")), sorted(tmp_path.parent.rglob("*"))
    if name.startswith("model/"):
        same(climbing)
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
def test_planted_code_never_runs(tmp_path, place, legacy):
    marker = tmp_path / "marker"
    planted, weights = Planted(marker), tensors()
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
            convert(path.parent if place == "folder" else path, which=which, **TOLD)
    assert not marker.exists()
    torch.load(path, weights_only=False)  # the attack does work where files are trusted
    assert marker.exists()
