"""Files that claim gigabytes are refused before the memory is taken."""

import json
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hostile import (
    DIFFUSERS,
    OFFICIAL,
    PICKLES,
    SIZES,
    edited,
    entry,
    model_folder,
    repacked,
    rezarred,
    safetensors,
    tensors,
    torch_file,
    with_pickle,
)
from safetensors.numpy import save_file

MEMORY = 300 * 2**20  # bytes that a refusal may take beyond a conversion

PROBE = """
import contextlib, json, resource, sys, time
from pathlib import Path
from dit_jax.checkpoint import load_model
from dit_jax.weights import convert

def read(path):
    told = {"prediction": "epsilon", "num_heads": 2, "num_classes": 3, "input_size": 4}
    return load_model(path) if (path / "manifest.json").exists() else convert(path, **told)

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
def test_big_claims_take_no_memory(tmp_path):
    """Each would fill gigabytes if it were believed."""
    numcodecs = pytest.importorskip("numcodecs")
    good, bad = tmp_path / "good", tmp_path / "bad"
    good.mkdir()
    bad.mkdir()
    plain, folder = torch_file(good / "model.pt"), model_folder(good / "model")
    save_file(OFFICIAL, good / "model.safetensors")
    torch.save(tensors(), good / "legacy.pt", _use_new_zipfile_serialization=False)

    zeros = {**tensors(), "pos_embed": torch.zeros(2**27)}  # half a GiB, compressed to half a MiB
    torch.save(zeros, tmp_path / "zeros.pt")
    repacked(tmp_path / "zeros.pt", bad / "packed.pt", compression=zipfile.ZIP_DEFLATED)
    (tmp_path / "zeros.pt").unlink()
    for legacy in (False, True):
        form = "legacy" if legacy else "zip"
        view = {**tensors(), "x_embedder.proj.bias": torch.zeros(1).expand(2**40)}
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
def test_position_embeddings_larger_than_the_file_take_no_memory(tmp_path):
    """Half a gigabyte and more out of a megabyte, or out of the four lines of a config.json."""
    good, bad = tmp_path / "good", tmp_path / "bad"
    (bad / "diffusers").mkdir(parents=True)
    good.mkdir()
    torch_file(good / "model.pt")
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
