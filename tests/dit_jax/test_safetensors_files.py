"""Safetensors files with a damaged or lying header are refused by name; every real type is read."""

import os

import ml_dtypes
import numpy as np
import pytest
from hostile import KEYS, OFFICIAL, entry, read, refused, safetensors, same
from safetensors.numpy import save_file

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


def test_a_whole_model_in_a_header_made_here_is_read(tmp_path):
    """So that the refusals above are for their faults, not for the way that the files are made."""
    header, data = {}, b""
    for key, array in OFFICIAL.items():
        header[key] = entry(list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    path = safetensors(tmp_path / "model.safetensors", header, data)
    same(path)
    content = path.read_bytes()
    for length in (0, 7, 8, 100, len(content) - 1):
        path.write_bytes(content[:length])
        refused(path, "not a readable safetensors file")
    path.write_bytes(content[:8])
    os.truncate(path, 2**20)
    refused(path, "not a readable safetensors file")


@pytest.mark.parametrize("dtype", ["I64", "I32", "U8", "BOOL", "F8_E4M3", "F8_E5M2"])
def test_types_that_are_no_real_numbers_are_listed(tmp_path, dtype):
    width = {"I64": 8, "I32": 4}.get(dtype, 1)
    header, data = {}, b""
    for key, array in OFFICIAL.items():
        wrong = key == KEYS[3]
        size = array.size * (width if wrong else 4)
        header[key] = entry(list(array.shape), len(data), len(data) + size, dtype if wrong else "F32")
        data += bytes(size)
    message = refused(safetensors(tmp_path / "model.safetensors", header, data), "cannot be converted")
    assert message.splitlines()[1:] == [f"  not a real-valued dense tensor: {KEYS[3]}"]


def test_empty_tensors_of_any_claim_are_listed(tmp_path):
    """No byte accounts for the other sizes of an empty tensor, which must tell nothing about the model."""
    others = {key: value for key, value in OFFICIAL.items() if key != "pos_embed"}
    header, data = {"pos_embed": entry([1, 2**40, 0], 0, 0)}, b""
    for key, array in others.items():
        header[key] = entry(list(array.shape), len(data), len(data) + array.nbytes)
        data += array.tobytes()
    path = safetensors(tmp_path / "model.safetensors", header, data)
    assert "not a real-valued dense tensor: pos_embed" in refused(path, "cannot tell input_size")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_real_types_are_rounded_to_float32(tmp_path, dtype):
    narrow = {key: (value / 3).astype(getattr(ml_dtypes, dtype, dtype)) for key, value in OFFICIAL.items()}
    save_file(narrow, tmp_path / "narrow.safetensors")
    save_file({key: value.astype(np.float32) for key, value in narrow.items()}, tmp_path / "wide.safetensors")
    found, expected = read(tmp_path / "narrow.safetensors").weights, read(tmp_path / "wide.safetensors").weights
    for path, array in expected.items():
        np.testing.assert_array_equal(found[path], array, strict=True)
