"""Folders of weights: shards and their index, links, pipes, JSON files that are none, configs of wrong types."""

import json
import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from hostile import DIFFUSERS, KEYS, OFFICIAL, model_folder, refused, same
from safetensors.numpy import save_file

# --- indexes and links

SHARDS = ("model-1-of-2.safetensors", "model-2-of-2.safetensors")


@pytest.fixture
def shards(tmp_path):
    """A good folder of two shards and their index."""
    folder = tmp_path / "shards"
    folder.mkdir()
    for i, name in enumerate(SHARDS):
        save_file({key: OFFICIAL[key] for key in KEYS[i::2]}, folder / name)
    write_index(folder, {key: SHARDS[i % 2] for i, key in enumerate(KEYS)})
    return folder


def write_index(folder: Path, names) -> Path:
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": names}))
    return path


def weight_map(folder: Path) -> dict:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]


def test_shards_are_read(shards):
    same(shards)


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


def test_shards_that_hold_other_keys_than_the_index_says(shards):
    names = weight_map(shards)
    write_index(shards, {**names, KEYS[0]: SHARDS[1]})
    assert KEYS[0] in refused(shards, "does not hold what its index says")
    write_index(shards, {key: name for key, name in names.items() if key != KEYS[0]})
    assert KEYS[0] in refused(shards, "does not hold what its index says")
    write_index(shards, {**names, "extra": SHARDS[0]})
    assert "extra" in refused(shards, "does not hold what its index says")
    write_index(shards, names)
    save_file({key: OFFICIAL[key] for key in KEYS}, shards / SHARDS[0])  # keys in both shards
    refused(shards, "does not hold what its index says")
    (shards / SHARDS[0]).unlink()
    refused(shards, "has no file 'model-1-of-2")


def test_links_out_of_the_folder_are_refused_and_within_are_followed(shards, tmp_path):
    first = shards / SHARDS[0]
    first.rename(tmp_path / "elsewhere.safetensors")
    first.symlink_to(tmp_path / "elsewhere.safetensors")
    refused(shards, "is a link out of its folder")
    first.unlink()
    (tmp_path / "elsewhere.safetensors").rename(shards / "inside")
    first.symlink_to("inside")
    same(shards)


def test_links_in_a_circle(shards):
    first = shards / SHARDS[0]
    first.unlink()
    first.symlink_to(SHARDS[0])
    refused(shards, "broken link")
    (shards.parent / "a.pt").symlink_to("b.pt")
    (shards.parent / "b.pt").symlink_to("a.pt")
    refused(shards.parent / "a.pt", "is not a file")


def test_cache_of_hugging_face(tmp_path):
    """Files are links into the blobs beside the snapshots. No other place beside them will do."""
    root = tmp_path / "models--facebook--DiT"
    (root / "blobs").mkdir(parents=True)
    snapshot = root / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    save_file(OFFICIAL, root / "blobs" / "f00d")
    (root / "blobs" / "beef").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/f00d")
    (snapshot / "config.json").symlink_to("../../blobs/beef")
    same(snapshot)
    same(snapshot / "model.safetensors")
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


def test_several_checkpoints_are_named(tmp_path):
    for name in ("ema.safetensors", "model.safetensors"):
        save_file(OFFICIAL, tmp_path / name)
    refused(tmp_path, r"several checkpoints, ema\.safetensors, model\.safetensors; give the file")


def test_model_folders_are_no_checkpoints(tmp_path):
    refused(model_folder(tmp_path / "model"), "is a model folder already; --export makes a file of it")


def test_a_pipeline_in_the_cache_of_hugging_face(tmp_path):
    """Its folders are one level deeper, and their links lead to the same blobs."""
    root = tmp_path / "models--facebook--DiT"
    (root / "blobs").mkdir(parents=True)
    transformer = root / "snapshots" / "0123abc" / "transformer"
    transformer.mkdir(parents=True)
    save_file(OFFICIAL, root / "blobs" / "f00d")
    (transformer / "model.safetensors").symlink_to("../../../blobs/f00d")
    same(transformer)


def test_folder_of_a_whole_pipeline(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    (tmp_path / "transformer").mkdir()
    save_file(OFFICIAL, tmp_path / "transformer" / "model.safetensors")
    message = refused(tmp_path, "whole diffusers pipeline")
    assert str(tmp_path / "transformer") in message
    same(tmp_path / "transformer")


def test_configs_that_are_no_files(tmp_path):
    save_file(OFFICIAL, tmp_path / "model.safetensors")
    config = tmp_path / "config.json"
    config.mkdir()
    refused(tmp_path, r"config\.json is not a file")
    config.rmdir()
    os.mkfifo(config)
    refused(tmp_path, r"config\.json is not a file")  # and does not wait for a writer
    config.unlink()
    config.symlink_to("nowhere.json")
    same(tmp_path)  # as if there were none, which this form does not need
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
