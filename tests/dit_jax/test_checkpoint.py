"""Model folders: same bits back, nothing half-written, and refusals that say what to do."""

import json
import os
import shutil
import socket
from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_jax.checkpoint as checkpoint
from dit_jax import array_folder
from dit_jax.array_folder import load_arrays, save_arrays
from dit_jax.checkpoint import (
    abstract_model,
    assemble,
    digest,
    load_manifest,
    load_model,
    load_weights,
    save_model,
    save_weights,
    shipped_model,
    weight_shapes,
    weights_digest,
)
from dit_jax.config import DiTConfig, variant
from dit_jax.disk import CheckpointError, recover, write_json

CONFIG = DiTConfig(input_size=4, in_channels=3, hidden_size=8, depth=2, num_heads=2, num_classes=3)


@cache
def shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    return weight_shapes(config)


def random_weights(config: DiTConfig = CONFIG, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {path: rng.standard_normal(shape, np.float32) for path, shape in shapes(config).items()}


def arrays_of(model) -> dict[str, np.ndarray]:
    return {".".join(path): np.asarray(variable[...]) for path, variable in nnx.to_flat_state(nnx.state(model))}


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(
        np.array_equal(first[key], second[key]) and first[key].dtype == second[key].dtype for key in first
    )


@pytest.fixture
def folder(tmp_path):
    """A saved model."""
    save_weights(CONFIG, random_weights(), tmp_path / "model", extra={"note": "for tests"})
    return tmp_path / "model"


def edit_manifest(folder, **changes):
    path = folder / "manifest.json"
    entries = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({key: value for key, value in entries.items() if value is not None}))


def test_same_bits_back(tmp_path):
    model = assemble(CONFIG, random_weights())
    manifest = save_model(model, tmp_path / "deep" / "model", extra={"data": {"images": 5}, "command": "train"})
    back = load_model(tmp_path / "deep" / "model")
    assert back.config == CONFIG
    assert equal(arrays_of(back), arrays_of(model))
    assert isinstance(back.pos_embed, type(model.pos_embed))
    assert manifest == load_manifest(tmp_path / "deep" / "model")
    assert manifest["config"] == CONFIG.to_dict()
    assert manifest["parameters"] == sum(array.size for array in random_weights().values())
    assert manifest["data"] == {"images": 5}
    assert manifest["command"] == "train"
    assert manifest["versions"]["jax"] == jax.__version__


def test_orbax_that_cannot_spare_its_copy_writes_the_same(tmp_path, monkeypatch):
    """In 0.12.4 its handler of NumPy arrays has no such option."""
    newer = ocp.type_handlers.NumpyHandler

    class Older(newer):
        def __init__(self, metadata_key=None, ocdbt_process_id=None):
            super().__init__(metadata_key, ocdbt_process_id)

    save_weights(CONFIG, random_weights(), tmp_path / "newer")
    monkeypatch.setattr(ocp.type_handlers, "NumpyHandler", Older)
    save_weights(CONFIG, random_weights(), tmp_path / "older")
    assert equal(arrays_of(load_model(tmp_path / "older")), arrays_of(load_model(tmp_path / "newer")))


def test_saved_model_computes_the_same_function(folder):
    inputs = jnp.ones((2, 4, 4, 3)), jnp.array([5, 900]), jnp.array([0, 3])
    call = nnx.jit(lambda model, *args: model(*args))
    out = call(load_model(folder), *inputs)
    assert np.array_equal(out, call(assemble(CONFIG, random_weights()), *inputs))
    assert np.ptp(out) > 0


def test_bfloat16_storage(tmp_path):
    weights = random_weights()
    save_weights(CONFIG, weights, tmp_path / "model", dtype="bfloat16")
    expected = {path: array.astype(jnp.bfloat16).astype(np.float32) for path, array in weights.items()}
    expected["pos_embed"] = weights["pos_embed"]
    assert equal(arrays_of(load_model(tmp_path / "model")), expected)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compute_dtype_override(folder, dtype):
    model = load_model(folder, dtype=dtype)
    assert model.config.dtype == dtype
    assert {array.dtype for array in arrays_of(model).values()} == {np.dtype(np.float32)}


def test_float64(folder, x64):
    model = load_model(folder, dtype="float64")
    assert {array.dtype for array in arrays_of(model).values()} == {np.dtype(np.float64)}
    assert equal(arrays_of(model), {path: array.astype(np.float64) for path, array in random_weights().items()})


def test_float64_needs_x64(folder):
    with pytest.raises(CheckpointError, match="JAX_ENABLE_X64"):
        load_model(folder, dtype="float64")
    with pytest.raises(ValueError, match="dtype 'float16' is not one of"):
        load_model(folder, dtype="float16")


def test_abstract_model_allocates_nothing():
    def allocated():
        return sum(array.nbytes for array in jax.live_arrays())

    before = allocated()
    model = abstract_model(variant("DiT-XL/2"))
    assert allocated() - before < 2**20
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(nnx.state(model)))


def test_folder_can_be_moved_and_names_no_place(folder, tmp_path):
    moved = tmp_path / "elsewhere" / "renamed"
    moved.parent.mkdir()
    shutil.move(folder, moved)
    assert equal(arrays_of(load_model(moved)), random_weights())
    files = [path for path in moved.rglob("*") if path.is_file()]
    assert len(files) <= 2 * len(random_weights()) + 5  # of each array its description and its values
    places = [str(tmp_path), str(tmp_path.parent.parent), os.path.expanduser("~") + "/"]
    places += [name for name in [socket.gethostname()] if len(name) > 4]  # shorter ones occur by chance in any data
    for path in files:
        content = path.read_bytes()
        assert not [place for place in places if place.encode() in content], path


def test_refuses_a_folder_in_use(folder):
    before = sorted(folder.rglob("*"))
    with pytest.raises(CheckpointError, match=r"not empty; choose another folder, or overwrite"):
        save_weights(CONFIG, random_weights(seed=1), folder)
    assert sorted(folder.rglob("*")) == before
    assert equal(arrays_of(load_model(folder)), random_weights())


def test_empty_folder_is_free(tmp_path):
    (tmp_path / "model").mkdir()
    save_weights(CONFIG, random_weights(), tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_overwrite(folder):
    save_weights(CONFIG, random_weights(seed=1), folder, overwrite=True)
    assert equal(arrays_of(load_model(folder)), random_weights(seed=1))
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_overwrite_spares_what_is_no_model(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(CheckpointError, match="is not overwritten, for it is no model folder"):
        save_weights(CONFIG, random_weights(), tmp_path, overwrite=True)
    with pytest.raises(CheckpointError, match="holds no saved arrays"):
        save_arrays(tmp_path, {"a": np.zeros(3)})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


@pytest.mark.parametrize("failure", [KeyboardInterrupt, OSError("disk full")])
@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("stage", ["arrays", "manifest", "rename"])
def test_interrupted_write_leaves_nothing_behind(tmp_path, monkeypatch, failure, existing, stage):
    target = tmp_path / "model"
    if existing:
        save_weights(CONFIG, random_weights(), target)
    replace = os.replace

    def fail(*_, **__):
        raise failure

    def write_a_part(directory, arrays):
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "part").write_bytes(b"half")
        fail()

    def fail_on_arrival(source, destination):
        fail() if str(source).endswith(".model.partial") else replace(source, destination)

    where, broken = {
        "arrays": (checkpoint, ("write_arrays", write_a_part)),
        "manifest": (checkpoint, ("write_json", fail)),
        "rename": (os, ("replace", fail_on_arrival)),
    }[stage]
    with monkeypatch.context() as patch:
        patch.setattr(where, *broken)
        with pytest.raises((KeyboardInterrupt, CheckpointError)):
            save_weights(CONFIG, random_weights(seed=1), target, overwrite=existing)
    assert [path.name for path in tmp_path.iterdir()] == ["model"] * existing
    if existing:
        assert equal(arrays_of(load_model(target)), random_weights())


def test_failing_orbax_leaves_nothing_behind(tmp_path, monkeypatch):
    def save(self, directory, *_, **__):
        (directory / "d").mkdir(parents=True)
        raise RuntimeError("interrupted")

    monkeypatch.setattr(ocp.Checkpointer, "save", save)
    with pytest.raises(CheckpointError, match="model cannot be written: interrupted"):
        save_weights(CONFIG, random_weights(), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_recovers_from_a_kill_between_the_two_renames(folder):
    previous = folder.with_name(".model.previous")
    os.rename(folder, previous)
    assert recover(folder)
    assert not previous.exists()
    assert equal(arrays_of(load_model(folder)), random_weights())
    assert not recover(folder.with_name("other"))


def test_leftovers_of_a_killed_write_are_cleared(folder):
    for role in ("partial", "previous"):
        shutil.copytree(folder, folder.with_name(f".model.{role}"))
    save_weights(CONFIG, random_weights(seed=1), folder, overwrite=True)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_altered_parameters_are_refused(folder, tmp_path):
    save_weights(CONFIG, random_weights(seed=1), tmp_path / "other")
    shutil.rmtree(folder / "params")
    shutil.copytree(tmp_path / "other" / "params", folder / "params")
    with pytest.raises(CheckpointError, match="not those the manifest was written for"):
        load_model(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format version 2, this code reads 1; convert or train again"),
        ({"format_version": None}, "format version None"),
        ({"format": "other"}, "not the manifest of a syncgap-dit model"),
        ({"config": None}, "lacks config"),
        ({"digest": None}, "lacks digest"),
        ({"config": {**CONFIG.to_dict(), "qk_norm": True}}, "unknown DiT config entries: qk_norm"),
        ({"config": {**CONFIG.to_dict(), "depth": 0}}, r"config is not usable \(DiTConfig.depth"),
        ({"config": 3}, "config is not usable"),
        ({"config": {**CONFIG.to_dict(), "num_classes": 7}}, r"y_embedder\.embedding is \(4, 8\), expected \(8, 8\)"),
    ],
)
def test_manifests_that_are_refused(folder, changes, message):
    edit_manifest(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        load_model(folder)


@pytest.mark.filterwarnings("ignore:Explicitly requested dtype float64")
def test_abstract_models_share_nothing_that_changes():
    """They are traced once a config: dtypes follow the x64 switch, a change of one model stays its own, and the config
    is the one that was asked for."""
    one, other = abstract_model(CONFIG), abstract_model(CONFIG)
    assert one.x_embedder.kernel is not other.x_embedder.kernel
    one.x_embedder.bias = one.blocks = None  # pyright: ignore
    assert other.blocks is not None
    assert abstract_model(CONFIG).x_embedder.bias is not None
    ratio = replace(CONFIG, mlp_ratio=int(CONFIG.mlp_ratio))
    assert ratio == CONFIG
    assert abstract_model(ratio).config is ratio
    wide = replace(CONFIG, dtype="float64")
    narrow = abstract_model(wide).x_embedder.kernel.dtype
    with jax.enable_x64(True):
        assert (narrow, abstract_model(wide).x_embedder.kernel.dtype) == (jnp.float32, jnp.float64)


def test_incomplete_folders_are_refused(folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"there is no folder .*nowhere$"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no manifest\.json; convert weights or train"):
        load_model(tmp_path)
    shutil.rmtree(folder / "params")
    with pytest.raises(CheckpointError, match="params holds no saved arrays"):
        load_model(folder)
    (folder / "manifest.json").write_text('{"format": ')
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_model(folder)


def test_damage_is_an_error_or_without_effect(folder):
    """A flipped byte in any file of the parameters, or its loss. Orbax's own records of the writing have no effect."""
    refused = {}
    for path in (path for path in (folder / "params").rglob("*") if path.is_file()):
        content = path.read_bytes()
        middle = len(content) // 2
        for damaged in (content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :], None):
            path.unlink() if damaged is None else path.write_bytes(damaged)
            try:
                assert equal(load_weights(folder)[1], random_weights()), path
            except CheckpointError as error:
                refused[path.name] = str(error)
        path.write_bytes(content)
    assert {"_METADATA", ".zarray", "0.0"} <= set(refused)  # the tree, the arrays' descriptions and values
    assert all(str(folder) in message and "make it again" in message for message in refused.values())


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = random_weights()
    weights["pos_embed"] = weights["pos_embed"][:2]
    weights["extra"] = weights.pop("x_embedder.bias")
    weights["final_layer.linear.bias"] = weights["final_layer.linear.bias"].astype(np.float16)
    with pytest.raises(CheckpointError) as caught:
        save_weights(CONFIG, weights, tmp_path / "model")
    for part in ("x_embedder.bias is missing", "extra is not expected", "pos_embed is (2, 8), expected (4, 8)"):
        assert part in str(caught.value)
    weights = {**random_weights(), "pos_embed": random_weights()["pos_embed"].astype(np.float16)}
    with pytest.raises(CheckpointError, match=r"pos_embed \(float16\)"):
        save_weights(CONFIG, weights, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_unusable_arguments_write_nothing(tmp_path):
    for options, message in [
        ({"dtype": "float16"}, "dtype 'float16' is not one of"),
        ({"extra": {"digest": "0"}}, "entries digest are written by the checkpoint"),
        ({"extra": {"when": object()}}, "not JSON"),
        ({"extra": {"loss": float("nan")}}, "not JSON"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            save_weights(CONFIG, random_weights(), tmp_path / "model", **options)
    assert not list(tmp_path.iterdir())


def test_digest_on_disk_is_the_digest_in_memory(folder):
    assert weights_digest(folder) == digest(random_weights()) == load_manifest(folder)["digest"]


def test_digest_of_arrays_that_do_not_fit_is_refused_unread(folder, monkeypatch):
    monkeypatch.setattr(array_folder, "_open_stores", lambda *_: pytest.fail("read"))
    edit_manifest(folder, config={**CONFIG.to_dict(), "num_classes": 4})
    with pytest.raises(CheckpointError, match=r"y_embedder.embedding is \(4, 8\), expected \(5, 8\)"):
        weights_digest(folder)
    edit_manifest(folder, config={**CONFIG.to_dict(), "hidden_size": 2**20})
    with pytest.raises(CheckpointError, match="asks for more bytes"):
        weights_digest(folder)


@given(
    path=st.sampled_from(sorted(shapes(CONFIG))),
    change=st.sampled_from(["bit", "dtype", "shape", "path"]),
    place=st.integers(0, 2**20),
)
@settings(max_examples=15, deadline=None)
def test_digest_sees_every_change(path, change, place):
    weights = random_weights()
    before = digest(weights)
    array = weights.pop(path)
    if change == "bit":
        array = array.copy()
        array.reshape(-1).view(np.uint8)[place % array.nbytes] ^= 1 << place % 8
    elif change == "dtype":
        array = array.view(np.int32)
    elif change == "shape":
        array = array[None]
    else:
        path += "x"
    assert digest({**weights, path: array}) != before
    assert digest(dict(reversed(random_weights().items()))) == before


def test_shipped_model_names():
    with pytest.raises(CheckpointError, match="no shipped model 'nobody'; known: "):
        shipped_model("nobody")


def test_shipped_model_is_found(folder, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", folder.parent)
    assert shipped_model("model") == folder


def test_a_folder_comes_before_a_shipped_model_of_its_name(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "SHIPPED", folder.parent)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    shipped = arrays_of(load_model("model"))
    assert equal(shipped, arrays_of(load_model(folder)))
    save_weights(CONFIG, random_weights(seed=1), "model")
    assert not equal(shipped, arrays_of(load_model("model")))
    with pytest.raises(CheckpointError, match="there is no folder nobody"):
        load_model("nobody")


def training_state():
    params = nnx.state(assemble(CONFIG, random_weights()), nnx.Param)
    return {"params": params, "opt": optax.adamw(1e-3).init(params), "step": jnp.array(7, jnp.int32)}


def test_arrays_of_a_training_state(tmp_path):
    state = training_state()
    save_arrays(tmp_path / "state", {**state, "step": jnp.array(6, jnp.int32)})
    save_arrays(tmp_path / "state", state)
    back = load_arrays(tmp_path / "state", jax.eval_shape(lambda: state))
    assert jax.tree.structure(back) == jax.tree.structure(state)
    for ours, theirs in zip(jax.tree.leaves(back), jax.tree.leaves(state), strict=True):
        assert isinstance(ours, jax.Array)
        assert ours.dtype == theirs.dtype
        assert np.array_equal(ours, theirs)
    assert [path.name for path in tmp_path.iterdir()] == ["state"]


def test_arrays_of_another_structure_are_refused(tmp_path):
    save_arrays(tmp_path / "state", {"a": jnp.zeros(3), "b": jnp.zeros(2)})
    for like, message in [
        ({"a": jnp.zeros(3)}, "b is not expected"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(2), "c": jnp.zeros(1)}, "c is missing"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(3)}, r"b is \(2,\), expected \(3,\)"),
        ({"a": jnp.zeros(3), "b": jnp.zeros(2, int)}, "other dtypes than expected in b"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            load_arrays(tmp_path / "state", like)
    with pytest.raises(CheckpointError, match="holds no saved arrays"):
        load_arrays(tmp_path / "nowhere", {"a": jnp.zeros(3)})


def test_write_json_is_all_or_nothing(tmp_path):
    path = tmp_path / "run.json"
    write_json(path, {"a": 1})
    for bad in (object(), float("inf")):
        with pytest.raises((TypeError, ValueError)):
            write_json(path, {"a": bad})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
