"""Files that are no weights, or no longer those that were written: what they are is said, and what to do."""

import json
import zipfile

import numpy as np
import pytest
import torch
from hostile import KEYS, OFFICIAL, read, refused, same, tensors, torch_file
from safetensors.numpy import save_file

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 12345\n"
OTHERS = {
    "empty": (b"", "it is empty, as a download that failed leaves it"),
    "LFS pointer": (POINTER, "it is a Git LFS pointer .*git lfs pull"),
    "HTML page": (b"\n<!DOCTYPE html>\n<html><body>Sign in</body></html>", "it is an HTML page"),
    "bare HTML": (b"<html lang='en'>404</html>", "it is an HTML page"),
    "XML error": (
        b"\xef\xbb\xbf<?xml version='1.0'?><Error>AccessDenied</Error>",
        "it is an XML document",
    ),
    "JSON error": (b'{"error": "Repository not found"}', "it is JSON text"),
    "gzip": (b"\x1f\x8b\x08" + bytes(60), "it is a gzip archive; unpack it"),
    "NumPy": (b"\x93NUMPY\x01\x00" + bytes(60), "it is a NumPy array"),
    "HDF5": (b"\x89HDF\r\n\x1a\n" + bytes(60), "it is an HDF5 file"),
    "GGUF": (b"GGUF\x03" + bytes(60), "it is a GGUF file"),
}


@pytest.mark.parametrize("suffix", ["pt", "bin", "safetensors"])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_files_are_told_apart(tmp_path, kind, suffix):
    content, message = OTHERS[kind]
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(content)
    refused(path, f"not a readable (checkpoint|safetensors file): {message}")


def test_a_shard_that_is_a_pointer_is_named(tmp_path):
    save_file({key: OFFICIAL[key] for key in KEYS[::2]}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(POINTER)
    names = {key: "ab"[i % 2] + ".safetensors" for i, key in enumerate(KEYS)}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(tmp_path, r"b\.safetensors is not a readable safetensors file: it is a Git LFS pointer")


@pytest.mark.parametrize("kind", ["LFS pointer", "HTML page", "XML error"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_json_files_that_are_something_else(tmp_path, name, kind):
    content, message = OTHERS[kind]
    save_file(OFFICIAL, tmp_path / "model.safetensors")
    (tmp_path / name).write_bytes(content)
    refused(tmp_path, rf"{name} cannot be read as JSON \({message}")


def test_files_are_read_by_their_content(tmp_path):
    """Whatever their names are; but a shard must be what its index says."""
    torch_file(tmp_path / "model.safetensors")
    same(tmp_path / "model.safetensors")
    save_file(OFFICIAL, tmp_path / "model.pt")
    same(tmp_path / "model.pt")


@pytest.mark.parametrize("name", [".pth", ".ckpt"])
def test_other_names_of_checkpoints_are_found_in_folders(tmp_path, name):
    torch_file(tmp_path / f"model{name}")
    same(tmp_path)


def places(path) -> dict[str, tuple[int, int]]:
    """Where the bytes of each record of an archive are, and how many."""
    found = {}
    with zipfile.ZipFile(path) as file:
        for info in file.infolist():
            with path.open("rb") as raw:
                raw.seek(info.header_offset)
                header = raw.read(30)
            skip = sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
            found[info.filename.split("/", 1)[1]] = info.header_offset + 30 + skip, info.file_size
    return found


def flipped(path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_a_flipped_bit_in_any_record_of_weights_is_seen(tmp_path):
    path = torch_file(tmp_path / "model.pt")
    good = path.read_bytes()
    records = {name: place for name, place in places(path).items() if name.startswith("data")}
    assert len(records) == len(KEYS) + 1
    for name, (start, size) in records.items():
        for at in (start, start + size // 2, start + size - 1):
            flipped(path, at)
            refused(path, f"is damaged: the checksum of its record {name} does not fit; download it again")
            path.write_bytes(good)
    same(path)


def test_a_flipped_bit_in_what_is_not_read_does_no_harm(tmp_path):
    torch.save({"ema": tensors(), "opt": {"state": {0: torch.ones(1000)}}}, tmp_path / "model.pt")
    start, size = max(places(tmp_path / "model.pt").values(), key=lambda place: place[1] == 4000)
    assert size == 4000
    flipped(tmp_path / "model.pt", start)
    same(tmp_path / "model.pt")


def test_files_without_checksums_are_read_and_say_so(tmp_path):
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch_file(tmp_path / "model.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    same(tmp_path / "model.pt")
    assert "saved without checksums" in read(tmp_path / "model.pt").notes[0]


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_views_of_any_layout_are_read_as_pytorch_reads_them(tmp_path, dtype, legacy):
    """Transposed, sliced with steps, from the middle of a storage, of one number; in every real type."""
    base = torch.arange(4000.0).to(getattr(torch, dtype)) / 7
    views = {
        "x_embedder.proj.bias": base[100:108],
        "t_embedder.mlp.0.bias": base[3:50:6],
        "t_embedder.mlp.0.weight": base[: 256 * 8].view(256, 8).T,
        "final_layer.linear.weight": base[::2][: 24 * 8].view(24, 8),
        "blocks.0.attn.proj.weight": base[:1000].view(10, 10, 10)[1:9, 2:10, 5],
        "blocks.0.attn.proj.bias": base[7].expand(8),
    }
    content = {**tensors(), **views}
    torch.save(content, tmp_path / "model.pt", _use_new_zipfile_serialization=not legacy)
    found = read(tmp_path / "model.pt").weights
    for path, key in (
        ("x_embedder.bias", "x_embedder.proj.bias"),
        ("t_embedder.fc1.bias", "t_embedder.mlp.0.bias"),
        ("blocks.attn.proj.bias", "blocks.0.attn.proj.bias"),
    ):
        np.testing.assert_array_equal(found[path].reshape(-1), views[key].float())
    for path, key in (
        ("t_embedder.fc1.kernel", "t_embedder.mlp.0.weight"),
        ("final_layer.linear.kernel", "final_layer.linear.weight"),
        ("blocks.attn.proj.kernel", "blocks.0.attn.proj.weight"),
    ):
        np.testing.assert_array_equal(found[path].reshape(views[key].T.shape), views[key].float().T)


def test_big_endian_files(tmp_path):
    """As PyTorch writes them on other machines: the numbers and a record that says so."""
    path = torch_file(tmp_path / "model.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(tmp_path / "big.pt", "w") as new:
        for info in old.infolist():
            content = old.read(info)
            if "/data/" in info.filename:
                content = np.frombuffer(content, np.float32).byteswap().tobytes()
            new.writestr(info.filename, b"big" if info.filename.endswith("byteorder") else content)
    same(tmp_path / "big.pt")
