"""Files changed at random: every reader gives a whole model or its own error, and nothing else happens.

``pytest --hypothesis-profile=thorough tests/dit_jax/test_fuzz.py`` tries two and a half times as many files.
"""

import copy
import gc
import json
import struct
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from flax import nnx
from flax.traverse_util import unflatten_dict
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save, save_file

from dit_jax.checkpoint import load_model, save_weights, weight_shapes
from dit_jax.config import DiTConfig
from dit_jax.disk import CheckpointError
from dit_jax.facts import Facts
from dit_jax.weights import WeightsError, convert, convert_entries, source_shapes

CONFIG = DiTConfig(input_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=2, num_classes=3)
# what no file of these tests says of it
TOLD: Any = {"prediction": "epsilon", "num_heads": 2, "num_classes": 3, "input_size": 4}
RNG = np.random.default_rng(0)
OFFICIAL = {key: RNG.standard_normal(shape, np.float32) for key, shape in source_shapes(CONFIG).items()}
_, WEIGHTS = convert_entries(OFFICIAL, "file", Facts(**TOLD))
WIDTH = CONFIG.hidden_size
EMBEDDERS = {
    "timestep_embedder.linear_1": "t_embedder.mlp.0",
    "timestep_embedder.linear_2": "t_embedder.mlp.2",
}


def fuzz(examples: int):
    """`examples` under the profile of 250, in proportion under any other."""
    checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    count = examples * settings().max_examples // 250
    return settings(max_examples=count, derandomize=True, deadline=None, suppress_health_check=checks)


# --- changes of bytes and of JSON

SPOT = st.tuples(st.sampled_from(["start", "anywhere", "end"]), st.integers(0, 2**16))
CHANGES = st.lists(
    st.tuples(
        st.sampled_from(["flip", "cut", "insert", "overwrite", "repeat", "remove"]),
        SPOT,
        st.integers(1, 64),
        st.binary(min_size=1, max_size=12) | st.sampled_from([bytes(8), b"\xff" * 8, b"\xff\xff\xff\x7f", b"\0"]),
    ),
    min_size=1,
    max_size=4,
)


def place(spot, content: bytes) -> int:
    """A place in the content, one time of three near its start or its end, where its structure is described."""
    kind, offset = spot
    near = min(len(content), 600)
    if not content:
        return 0
    return {"start": offset % near, "anywhere": offset % len(content), "end": len(content) - 1 - offset % near}[kind]


def changed(content: bytes, changes) -> bytes:
    for kind, spot, length, data in changes:
        at = place(spot, content)
        end = at + length
        if kind == "flip" and content:
            content = content[:at] + bytes([content[at] ^ 1 << length % 8]) + content[at + 1 :]
        elif kind == "cut":
            content = content[:at]
        elif kind == "insert":
            content = content[:at] + data + content[at:]
        elif kind == "overwrite":
            content = content[:at] + data + content[at + len(data) :]
        elif kind == "repeat":
            content = content[:end] + content[at:]
        elif kind == "remove":
            content = content[:at] + content[end:]
    return content


ODD = [
    0,
    1,
    -1,
    2,
    8,
    2**31,
    2**32 + 8,
    2**63 - 1,
    2**64,
    10**400,
    0.5,
    8.0,
    1e300,
    float("nan"),
    float("inf"),
    "",
    "8",
]
ODD += [None, True, False, "F32", "F64", "BF16", "I32", "../x", "\0", "\ud800", "float64", "bfloat16", "v", [], {}]
VALUES = st.sampled_from(ODD) | st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
EDITS = st.lists(
    st.tuples(st.sampled_from(["set", "remove", "add", "copy"]), st.integers(0, 2**16), VALUES), min_size=1, max_size=3
)


def places(document) -> Iterator[tuple]:
    """Container and key of every value in a JSON document."""
    pairs = document.items() if isinstance(document, dict) else enumerate(document)
    for key, value in list(pairs):
        yield document, key
        if isinstance(value, dict | list):
            yield from places(value)


def edited(document, edits):
    """The document with values set, removed, added or copied from elsewhere in it."""
    document = copy.deepcopy(document)
    for kind, number, value in edits:
        found = list(places(document))
        if not found:
            break
        container, key = found[number % len(found)]
        if kind == "set":
            container[key] = value
        elif kind == "remove":
            del container[key]
        elif kind == "copy":
            other, name = found[number * 31 % len(found)]
            container[key] = copy.deepcopy(other[name])
        elif isinstance(container, dict):
            container[str(value)[:20]] = value
        else:
            container.insert(key, value)
    return document


# --- the law


def result(read, own: type[Exception]):
    """What is read, or None if the error is the reader's own."""
    try:
        return read()
    except Exception as error:
        if type(error) is own:
            return None
        raise


def check_conversion(path: Path) -> bool:
    """Whether the file was read. If so it is a whole model, if not its own error says why; nothing is written."""
    before = sorted(path.parent.iterdir())
    conversion = result(lambda: convert(path, **TOLD), WeightsError)
    assert sorted(path.parent.iterdir()) == before
    if conversion is None:
        return False
    assert {key: array.shape for key, array in conversion.weights.items()} == weight_shapes(conversion.config)
    assert all(array.dtype == np.float32 and np.isfinite(array).all() for array in conversion.weights.values())
    return True


def check_folder(folder: Path) -> bool:
    """As above for a model folder. Its digest lets no other parameters pass than those that were saved."""
    before = sorted(folder.parent.rglob("*"))
    model = result(lambda: load_model(folder), CheckpointError)
    assert sorted(folder.parent.rglob("*")) == before
    if model is None:
        return False
    for path, variable in nnx.to_flat_state(nnx.state(model)):
        np.testing.assert_array_equal(np.asarray(variable[...]), WEIGHTS[".".join(map(str, path))], strict=True)
    return True


# --- files of tensors


def diffusers_entries() -> dict[str, np.ndarray]:
    """The same model in the diffusers form."""
    block = "transformer_blocks.0"
    found = {f"{block}.norm1.emb.class_embedder.embedding_table.weight": OFFICIAL["y_embedder.embedding_table.weight"]}
    renamed = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
        f"{block}.norm1.linear": "blocks.0.adaLN_modulation.1",
        f"{block}.attn1.to_out.0": "blocks.0.attn.proj",
        f"{block}.ff.net.0.proj": "blocks.0.mlp.fc1",
        f"{block}.ff.net.2": "blocks.0.mlp.fc2",
        **{f"{block}.norm1.emb.{theirs}": ours for theirs, ours in EMBEDDERS.items()},
    }
    for part in ("weight", "bias"):
        found |= {f"{theirs}.{part}": OFFICIAL[f"{ours}.{part}"] for theirs, ours in renamed.items()}
        for name, array in zip("qkv", np.split(OFFICIAL[f"blocks.0.attn.qkv.{part}"], 3), strict=True):
            found[f"{block}.attn1.to_{name}.{part}"] = array
    return found


DIFFUSERS_CONFIG = {
    "_class_name": "Transformer2DModel",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": WIDTH // 2,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 3,
    "norm_elementwise_affine": False,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": 2,
    "num_embeds_ada_norm": 3,
    "num_layers": 1,
    "out_channels": 6,
    "patch_size": 2,
    "sample_size": 4,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    """A good file of each form, each in a folder of its own."""
    root = tmp_path_factory.mktemp("files")
    weights = {key: torch.tensor(value) for key, value in OFFICIAL.items()}
    paths = {
        "zip": root / "zip" / "model.pt",
        "legacy": root / "legacy" / "model.pt",
        "training": root / "training" / "model.pt",
        "safetensors": root / "safetensors" / "model.safetensors",
        "index": root / "index" / "model.safetensors.index.json",
        "config": root / "config" / "model.safetensors",
    }
    for path in paths.values():
        path.parent.mkdir()
    torch.save(weights, paths["zip"])
    torch.save(weights, paths["legacy"], _use_new_zipfile_serialization=False)
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))]).state_dict()
    torch.save({"ema": weights, "model": weights, "opt": optimizer}, paths["training"])
    save_file(OFFICIAL, paths["safetensors"])
    names = {key: f"model-{i % 2}.safetensors" for i, key in enumerate(OFFICIAL)}
    for name in set(names.values()):
        save_file({key: OFFICIAL[key] for key in names if names[key] == name}, paths["index"].parent / name)
    paths["index"].write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": names}))
    save_file(diffusers_entries(), paths["config"])
    (paths["config"].parent / "config.json").write_text(json.dumps(DIFFUSERS_CONFIG))
    return paths


def test_the_files_are_good(files):
    for path in files.values():
        assert check_conversion(path), path


def check_bytes(path: Path, changes, content: bytes | None = None) -> None:
    good = path.read_bytes() if content is None else content
    try:
        path.write_bytes(changed(good, changes))
        check_conversion(path)
    finally:
        path.write_bytes(good)


@given(changes=CHANGES)
@fuzz(120)
def test_archives(files, changes):
    check_bytes(files["zip"], changes)


@given(changes=CHANGES)
@fuzz(60)
def test_archives_of_training(files, changes):
    check_bytes(files["training"], changes)


@given(changes=CHANGES)
@fuzz(120)
def test_legacy_files(files, changes):
    check_bytes(files["legacy"], changes)


@given(changes=CHANGES)
@fuzz(100)
def test_safetensors(files, changes):
    check_bytes(files["safetensors"], changes)


@given(changes=CHANGES, training=st.booleans())
@fuzz(200)
def test_pickles_in_archives(files, changes, training):
    """The checksums of the archive are right, so that the changes get to the pickle."""
    source = files["training" if training else "zip"]
    check_pickle(source, lambda content: changed(content, changes))


def check_pickle(source: Path, change) -> None:
    good = source.read_bytes()
    with zipfile.ZipFile(source) as old:
        entries = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(source, "w") as new:
        for name, content in entries.items():
            new.writestr(name, change(content) if name.endswith("/data.pkl") else content)
    try:
        check_conversion(source)
    finally:
        source.write_bytes(good)


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


WORDS = [
    *[bytes([code]) for code in b")}](teus\x85\x86\x87RbaQN\x81\x88\x89\x8f.02"],
    *[b"K\0", b"K\x01", b"K\x08", b"J\xff\xff\xff\x7f", b"J\xff\xff\xff\xff", b"\x8a\x08" + b"\xff" * 7 + b"\x7f"],
    *[b"q\0", b"q\1", b"h\0", b"h\1", b"U\x01a", b"G" + bytes(8), b"\x8a\0"],
    *[text(word) for word in ("storage", "cpu", "0", "1", "ema", "pos_embed", "x_embedder.proj.bias", "args")],
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ctorch._utils\n_rebuild_tensor\n",
    b"ctorch._utils\n_rebuild_parameter\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch\nHalfStorage\n",
    b"ctorch\nfloat32\n",
    b"ccollections\nOrderedDict\n",
    b"cargparse\nNamespace\n",
    b"ctorch\nSize\n",
    b"comegaconf.dictconfig\nDictConfig\n",
    b"ctorch._tensor\n_rebuild_from_type_v2\n",
    b"2",
    b"\x94",
    b"\x93",
    b"cposix\nsystem\n",
    # a storage, and a tensor of it
    b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x08tQ",
    b"ctorch._utils\n_rebuild_tensor_v2\n(h\0K\0K\x08\x85K\x01\x85\x89ccollections\nOrderedDict\n)Rt",
]


@given(words=st.lists(st.sampled_from(WORDS), max_size=30), keyed=st.booleans())
@fuzz(400)
def test_sentences_of_the_pickle_language(files, words, keyed):
    body = b"".join(words)
    whole = b"\x80\x02" + (b"}" + text("ema") + b"}" + text("a") + body + b"ss." if keyed else body + b".")
    check_pickle(files["zip"], lambda _: whole)


@given(edits=EDITS)
@fuzz(120)
def test_headers_of_safetensors(files, edits):
    path = files["safetensors"]
    good = path.read_bytes()
    length = struct.unpack("<Q", good[:8])[0]
    header = json.dumps(edited(json.loads(good[8 : 8 + length]), edits)).encode()
    try:
        path.write_bytes(struct.pack("<Q", len(header)) + header + good[8 + length :])
        check_conversion(path)
    finally:
        path.write_bytes(good)


@given(
    st.dictionaries(
        st.sampled_from([*OFFICIAL, "blocks.1.mlp.fc1.bias", "module.pos_embed"]),
        st.lists(st.integers(0, 4) | st.sampled_from([8, 9]), max_size=5),
        max_size=4,
    )
)
@fuzz(60)
def test_shapes(files, shapes):
    """Well-formed files of other tensors."""
    assume(all(np.prod(shape) < 2**16 for shape in shapes.values()))
    path = files["safetensors"]
    good = path.read_bytes()
    try:
        path.write_bytes(save({**OFFICIAL, **{key: np.ones(shape, np.float32) for key, shape in shapes.items()}}))
        check_conversion(path)
    finally:
        path.write_bytes(good)


def check_json(path: Path, edits, check) -> None:
    good = path.read_bytes()
    try:
        path.write_text(json.dumps(edited(json.loads(good), edits)))
        check()
    finally:
        path.write_bytes(good)


@given(edits=EDITS)
@fuzz(60)
def test_indexes(files, edits):
    check_json(files["index"], edits, lambda: check_conversion(files["index"]))


@given(changes=CHANGES)
@fuzz(30)
def test_bytes_of_indexes(files, changes):
    check_bytes(files["index"], changes)


@given(edits=EDITS)
@fuzz(60)
def test_configs(files, edits):
    check_json(files["config"].parent / "config.json", edits, lambda: check_conversion(files["config"]))


# --- model folders


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """A good model folder in today's form, and one with the database of files that the shipped models have."""
    root = tmp_path_factory.mktemp("folders")
    found = {"files": root / "files" / "model", "database": root / "database" / "model"}
    for folder in found.values():
        save_weights(CONFIG, WEIGHTS, folder)
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_ocdbt=True)) as checkpointer:
        checkpointer.save(found["database"] / "params", unflatten_dict(WEIGHTS, sep="."), force=True)
    return found


@pytest.fixture
def quiet():
    """Without Orbax's reports of the reads that it gives up after one has failed."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    yield
    gc.collect()
    sys.unraisablehook = hook


def test_the_folders_are_good(folders):
    assert (folders["database"] / "params" / "manifest.ocdbt").exists()
    assert all(check_folder(folder) for folder in folders.values())


def parameter_files(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "params").rglob("*") if path.is_file())


@given(edits=EDITS)
@fuzz(30)
def test_manifests(folders, edits):
    check_json(folders["files"] / "manifest.json", edits, lambda: check_folder(folders["files"]))


@given(edits=EDITS)
@fuzz(40)
def test_configs_in_manifests(folders, edits):
    def aimed(document):
        return {**document, "config": edited(document["config"], edits)}

    path = folders["files"] / "manifest.json"
    good = path.read_bytes()
    try:
        path.write_text(json.dumps(aimed(json.loads(good))))
        check_folder(folders["files"])
    finally:
        path.write_bytes(good)


@given(edits=EDITS, number=st.integers(0, 2**16))
@fuzz(30)
def test_descriptions_of_arrays(folders, quiet, edits, number):
    """The tree of the parameters, and each array's own description."""
    described = [path for path in parameter_files(folders["files"]) if path.name in ("_METADATA", ".zarray")]
    path = described[number % (2 * len(described)) % len(described)]
    check_json(path, edits, lambda: check_folder(folders["files"]))


@pytest.mark.slow
@pytest.mark.parametrize("form", ["files", "database"])
@given(changes=CHANGES, number=st.integers(0, 2**16))
@fuzz(20)
def test_bytes_of_model_folders(folders, quiet, form, changes, number):
    candidates = [folders[form] / "manifest.json", *parameter_files(folders[form])]
    path = candidates[number % len(candidates)]
    good = path.read_bytes()
    try:
        path.write_bytes(changed(good, changes))
        check_folder(folders[form])
    finally:
        path.write_bytes(good)
