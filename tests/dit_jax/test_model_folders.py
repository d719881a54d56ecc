"""Damaged and hostile model folders: each a refusal that names it, at once, whatever the manifest claims."""

import gc
import os
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hostile import CONFIG, SIZES, edited, model_folder, rezarred

from dit_jax.checkpoint import load_model, save_weights, weight_shapes
from dit_jax.config import DiTConfig
from dit_jax.disk import CheckpointError


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return model_folder(tmp_path_factory.mktemp("saved") / "model")


@pytest.fixture
def folder(tmp_path, saved):
    """A good model folder."""
    return shutil.copytree(saved, tmp_path / "model")


def not_loaded(folder: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_model(folder)
    assert type(caught.value) is CheckpointError


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
