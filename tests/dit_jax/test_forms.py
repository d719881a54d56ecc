"""Every form of DiT weights gives the same model: diffusers, safetensors, shards, narrow types; and the way back."""

import dataclasses
import json
import sys
import weakref
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import dit_jax.export as export
from dit_jax.checkpoint import assemble, load_model, save_weights
from dit_jax.disk import CheckpointError
from dit_jax.export import export_model
from dit_jax.model import DiT, position_embedding
from dit_jax.verify import compare_stages, limits, report
from dit_jax.weights import WeightsError, convert, state_dict

TINY = Path(__file__).parents[1] / "data" / "tiny_xl_like.pt"
DEPTH, WIDTH, HEADS = 4, 96, 6
TOLD: Any = {"num_heads": HEADS, "num_classes": 10, "prediction": "epsilon"}  # what the recorded file does not say
CONFIG_JSON = {
    "_class_name": "Transformer2DModel",
    "_diffusers_version": "0.12.0.dev0",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "attention_head_dim": WIDTH // HEADS,
    "cross_attention_dim": None,
    "dropout": 0.0,
    "in_channels": 4,
    "norm_elementwise_affine": False,
    "norm_num_groups": 32,
    "norm_type": "ada_norm_zero",
    "num_attention_heads": HEADS,
    "num_embeds_ada_norm": 10,
    "num_layers": DEPTH,
    "num_vector_embeds": None,
    "only_cross_attention": False,
    "out_channels": 8,
    "patch_size": 2,
    "sample_size": 8,
    "upcast_attention": False,
    "use_linear_projection": False,
}


@pytest.fixture(scope="module")
def official():
    """The recorded model's state dict, with the position embedding that the formula gives (diffusers stores none)."""
    entries = {key: value.numpy() for key, value in torch.load(TINY, weights_only=True).items()}
    return {**entries, "pos_embed": position_embedding(4, WIDTH)[None]}


def diffusers_form(official):
    """The same tensors as diffusers keeps them, written from the table of the form's keys."""
    found = {}
    once = {
        "x_embedder.proj": "pos_embed.proj",
        "final_layer.adaLN_modulation.1": "proj_out_1",
        "final_layer.linear": "proj_out_2",
    }
    for part in ("weight", "bias"):
        for ours, theirs in once.items():
            found[f"{theirs}.{part}"] = official[f"{ours}.{part}"]
        for i in range(DEPTH):
            block = f"transformer_blocks.{i}"
            q, k, v = np.split(official[f"blocks.{i}.attn.qkv.{part}"], 3)
            found |= {f"{block}.attn1.to_q.{part}": q, f"{block}.attn1.to_k.{part}": k, f"{block}.attn1.to_v.{part}": v}
            found[f"{block}.attn1.to_out.0.{part}"] = official[f"blocks.{i}.attn.proj.{part}"]
            found[f"{block}.ff.net.0.proj.{part}"] = official[f"blocks.{i}.mlp.fc1.{part}"]
            found[f"{block}.ff.net.2.{part}"] = official[f"blocks.{i}.mlp.fc2.{part}"]
            found[f"{block}.norm1.linear.{part}"] = official[f"blocks.{i}.adaLN_modulation.1.{part}"]
            for ours, theirs in (("0", "linear_1"), ("2", "linear_2")):
                found[f"{block}.norm1.emb.timestep_embedder.{theirs}.{part}"] = official[
                    f"t_embedder.mlp.{ours}.{part}"
                ]
    for i in range(DEPTH):
        table = f"transformer_blocks.{i}.norm1.emb.class_embedder.embedding_table.weight"
        found[table] = official["y_embedder.embedding_table.weight"]
    return {key: np.ascontiguousarray(value) for key, value in found.items()}


def diffusers_folder(folder: Path, entries, **changes) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(entries, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({**CONFIG_JSON, **changes}))
    return folder


def same(found, expected):
    assert found.keys() == expected.keys()
    for path in expected:
        np.testing.assert_array_equal(found[path], expected[path], err_msg=path)


@pytest.fixture(scope="module")
def expected(official, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "model.pt"
    torch.save({key: torch.tensor(value) for key, value in official.items()}, path)
    return convert(path, **TOLD)


# --- the diffusers form


def test_the_xl_form_has_its_538_keys(official):
    """37 keys outside the fused parts at XL's depth: 6 once, 19 in each of 28 blocks."""
    assert len(diffusers_form(official)) == 6 + 19 * DEPTH
    assert 6 + 19 * 28 == 538


@pytest.mark.parametrize("given", ["folder", "file"])
def test_diffusers_form_is_the_same_model(tmp_path, official, expected, given):
    folder = diffusers_folder(tmp_path, diffusers_form(official))
    source = folder if given == "folder" else folder / "diffusion_pytorch_model.safetensors"
    found = convert(source, prediction="epsilon")  # config.json tells the rest
    assert found.config == expected.config
    same(found.weights, expected.weights)
    assert found.provenance["source"]["form"] == "safetensors, diffusers"
    assert any("127" in note for note in found.notes)
    assert not any("127" in note for note in expected.notes)


def test_diffusers_weights_in_a_pytorch_file(tmp_path, official, expected):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG_JSON))
    path = tmp_path / "diffusion_pytorch_model.bin"
    torch.save({key: torch.tensor(value) for key, value in diffusers_form(official).items()}, path)
    same(convert(path, prediction="epsilon").weights, expected.weights)


def run(model: DiT, refs) -> np.ndarray:
    x = np.moveaxis(refs["x"], 1, -1).astype(np.float32)
    return np.moveaxis(jax.jit(lambda m, *args: m(*args))(model, x, refs["t"], refs["y"]), -1, 1)


@pytest.fixture(scope="module")
def refs():
    with np.load(TINY.parent / "refs_tiny.npz") as file:
        return dict(file)


def test_either_timestep_convention_computes_its_own_function(tmp_path, official, refs):
    """Each against the recorded outputs of its own code, and 12% away from the other's. The recorded model's stored
    position embedding is the formula's to float32 rounding."""
    folder = diffusers_folder(tmp_path / "in", diffusers_form(official))
    stock, out = refs["diffusers_stock_out_f32"], refs["out_f32"]
    size = np.abs(out).max()
    assert np.abs(stock - out).max() > 0.02 * size
    limit = np.where(refs["t"] <= 10, 5e-6, 5e-5)[:, None, None, None] * size
    for convention, reference in (("official", out), ("diffusers", stock)):
        conversion = convert(folder, prediction="epsilon", timestep_convention=convention)
        assert conversion.config.timestep_convention == convention
        assert (np.abs(run(assemble(conversion.config, conversion.weights), refs) - reference) < limit).all()
    save_weights(conversion.config, conversion.weights, tmp_path / "out", extra=conversion.provenance)
    assert load_model(tmp_path / "out").config.timestep_convention == "diffusers"
    model = load_model(tmp_path / "out", timestep_convention="official")
    assert (np.abs(run(model, refs) - out) < limit).all()


def test_embedders_that_differ_between_blocks_are_refused(tmp_path, official):
    entries = diffusers_form(official)
    key = "transformer_blocks.2.norm1.emb.timestep_embedder.linear_1.weight"
    entries[key] = entries[key].copy()
    entries[key][3, 3] += 1e-6
    with pytest.raises(WeightsError, match=r"transformer_blocks\.2\.\S+linear_1\.weight is not as in block 0"):
        convert(diffusers_folder(tmp_path, entries), prediction="epsilon")


def test_missing_and_unknown_diffusers_keys_are_listed(tmp_path, official):
    entries = diffusers_form(official)
    del entries["transformer_blocks.1.attn1.to_k.weight"]
    entries["transformer_blocks.0.attn1.norm_q.weight"] = np.ones(16, np.float32)
    with pytest.raises(WeightsError) as error:
        convert(diffusers_folder(tmp_path, entries))
    for line in ("missing: blocks.1.attn.qkv.weight", "unexpected: transformer_blocks.1.attn1.to_q.weight", "norm_q"):
        assert line in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation_fn": "gelu"}, "activation_fn is 'gelu', a DiT has 'gelu-approximate'"),
        ({"norm_type": "layer_norm"}, "norm_type"),
        ({"norm_eps": 1e-6}, "norm_eps is 1e-06, a DiT has 1e-05"),
        ({"cross_attention_dim": 768}, "cross_attention_dim is 768"),
        ({"num_layers": 3}, "4 blocks, its config.json says 3"),
        ({"sample_size": None}, "sample_size is None, not a size"),
        ({"sample_size": 7}, "do not fit together"),
        ({"rotary": True}, "unknown entry 'rotary'"),
    ],
)
def test_configs_of_other_models_are_refused(tmp_path, official, changes, message):
    with pytest.raises(WeightsError, match=message):
        convert(diffusers_folder(tmp_path, diffusers_form(official), **changes))


def test_diffusers_weights_need_their_config(tmp_path, official):
    folder = diffusers_folder(tmp_path, diffusers_form(official))
    (folder / "config.json").unlink()
    with pytest.raises(WeightsError, match=r"needs the config\.json"):
        convert(folder)


def test_larger_images_have_a_larger_grid(tmp_path, official):
    """512 px against 256 px: nothing but the position embedding differs."""
    found = convert(diffusers_folder(tmp_path, diffusers_form(official), sample_size=16), prediction="epsilon")
    assert found.config.input_size == 16
    np.testing.assert_array_equal(found.weights["pos_embed"], position_embedding(8, WIDTH))
    larger = {**official, "pos_embed": position_embedding(8, WIDTH)[None]}
    save_file(larger, tmp_path / "official.safetensors")
    (tmp_path / "config.json").unlink()
    same(convert(tmp_path / "official.safetensors", **TOLD).weights, found.weights)


# --- safetensors, shards, prefixes, types


def test_official_keys_in_safetensors_with_prefixes(tmp_path, official, expected):
    save_file({f"module._orig_mod.{key}": value for key, value in official.items()}, tmp_path / "model.safetensors")
    same(convert(tmp_path / "model.safetensors", **TOLD).weights, expected.weights)


@pytest.mark.parametrize("given", ["folder", "index"])
def test_sharded_safetensors(tmp_path, official, expected, given):
    entries = diffusers_form(official)
    folder = diffusers_folder(tmp_path, entries)
    (folder / "diffusion_pytorch_model.safetensors").unlink()
    names = sorted(entries)
    shards = {f"diffusion_pytorch_model-0000{i + 1}-of-00003.safetensors": names[i::3] for i in range(3)}
    for name, keys in shards.items():
        save_file({key: entries[key] for key in keys}, folder / name)
    index = folder / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(
        json.dumps({"metadata": {}, "weight_map": {k: name for name, keys in shards.items() for k in keys}})
    )
    found = convert(folder if given == "folder" else index, prediction="epsilon")
    same(found.weights, expected.weights)
    assert set(found.provenance["source"]["sha256"]) == set(shards)
    json.dumps(found.provenance)


@pytest.mark.parametrize("form", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_other_float_types_are_read_for_what_they_hold(tmp_path, official, dtype, form):
    numpy_type = ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    narrow = {key: value.astype(numpy_type) for key, value in official.items()}
    path = tmp_path / f"model.{form}"
    if form == "pt":
        torch.save({key: torch.tensor(value).to(getattr(torch, dtype)) for key, value in official.items()}, path)
    else:
        save_file(narrow, path)
    found = convert(path, **TOLD)
    back = dict(state_dict(found.config, found.weights))
    same(back, {key: value.astype(np.float32) for key, value in narrow.items()})


def test_conversion_to_bfloat16_rounds_once_and_spares_the_positions(tmp_path, expected, official):
    save_file(official, tmp_path / "model.safetensors")
    found = convert(tmp_path / "model.safetensors", **TOLD, dtype="bfloat16")
    for path, array in found.weights.items():
        rounded = expected.weights[path] if path == "pos_embed" else expected.weights[path].astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(array, rounded, err_msg=path)


def test_bfloat16_parameters_compute_what_rounded_parameters_do(tmp_path, expected, refs):
    """Kept in bfloat16 or rounded in each call: the same products; biases are the only difference, and small."""
    save_weights(expected.config, expected.weights, tmp_path / "m")
    wide, kept = load_model(tmp_path / "m", "bfloat16"), load_model(tmp_path / "m", "bfloat16", params="bfloat16")
    kinds = {str(leaf.dtype) for leaf in jax.tree.leaves(kept) if hasattr(leaf, "dtype")}
    assert kinds == {"bfloat16", "float32"}
    assert kept.pos_embed[...].dtype == jnp.float32
    a, b = run(wide, refs), run(kept, refs)
    assert 0 < np.abs(a - b).max() < 2e-2 * np.abs(a).max()
    with pytest.raises(ValueError, match="params 'int8'"):
        load_model(tmp_path / "m", params="int8")


# --- the way back


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_is_the_inverse_of_conversion_bit_for_bit(tmp_path, official, expected, suffix, dtype):
    save_weights(expected.config, expected.weights, tmp_path / "model", dtype=dtype)
    path = tmp_path / "back" / f"model.{suffix}"
    export_model(tmp_path / "model", path)
    if suffix == "pt":
        back = torch.load(path, weights_only=True)
        found = {
            key: value.view(torch.uint16).numpy() if dtype else value.numpy()
            for key, value in back.items()
            if key != "pos_embed"
        }
    else:
        found = {
            key: value.view(np.uint16) if dtype else value
            for key, value in load_file(path).items()
            if key != "pos_embed"
        }
    wanted = {
        key: value.astype(ml_dtypes.bfloat16).view(np.uint16) if dtype else value for key, value in official.items()
    }
    del wanted["pos_embed"]
    same(found, wanted)
    again = convert(path, **TOLD)
    np.testing.assert_array_equal(again.weights["pos_embed"], official["pos_embed"][0])
    assert not list(path.parent.glob(".*"))


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
def test_export_lets_go_of_what_it_has_inverted(tmp_path, expected, monkeypatch, suffix):
    """When the file is written, none of the folder's own arrays are left: one form is held, not two."""
    save_weights(expected.config, expected.weights, tmp_path / "model")
    left, stock = {}, export.load_weights

    def watched(directory):
        config, weights, manifest = stock(directory)
        left.update({path: weakref.ref(array) for path, array in weights.items()})
        return config, weights, manifest

    def writer(*_, **__):
        assert left
        assert not [path for path, array in left.items() if array() is not None]
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "load_weights", watched)
    monkeypatch.setattr(torch, "save", writer)
    monkeypatch.setattr("safetensors.numpy.save_file", writer)
    with pytest.raises(KeyboardInterrupt):
        export_model(tmp_path / "model", tmp_path / f"out.{suffix}")


def test_export_refuses_what_it_cannot_do(tmp_path, expected, monkeypatch):
    save_weights(expected.config, expected.weights, tmp_path / "model")
    with pytest.raises(CheckpointError, match=r"neither \.safetensors nor \.pt"):
        export_model(tmp_path / "model", tmp_path / "model.onnx")
    (tmp_path / "taken.pt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists"):
        export_model(tmp_path / "model", tmp_path / "taken.pt")
    assert (tmp_path / "taken.pt").read_text() == "mine"
    (tmp_path / "folder.pt").mkdir()
    with pytest.raises(CheckpointError, match=r"folder\.pt is a folder; give the name of a file$"):
        export_model(tmp_path / "model", tmp_path / "folder.pt", overwrite=True)
    export_model(tmp_path / "model", tmp_path / "taken.pt", overwrite=True)
    assert torch.load(tmp_path / "taken.pt", weights_only=True)
    with pytest.raises(CheckpointError, match="there is no folder"):
        export_model(tmp_path / "nowhere", tmp_path / "a.pt")
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(CheckpointError, match="needs PyTorch"):
        export_model(tmp_path / "model", tmp_path / "a.pt")
    assert not (tmp_path / "a.pt").exists()
    assert not list(tmp_path.glob(".*"))


# --- PyTorch beside JAX


@pytest.mark.parametrize("convention", ["official", "diffusers"])
def test_verification_passes_on_the_true_model_and_finds_the_stage_of_a_fault(tmp_path, official, convention):
    folder = diffusers_folder(tmp_path, diffusers_form(official))
    conversion = convert(folder, prediction="epsilon", timestep_convention=convention)
    stages = compare_stages(folder, assemble(conversion.config, conversion.weights))
    assert len(stages) == 2 + 6 * DEPTH + 1
    table, passed = report(stages, DEPTH)
    assert passed
    assert "the output is within 5.0e-06, 5.0e-05" in table
    broken = {**conversion.weights, "blocks.mlp.fc1.kernel": conversion.weights["blocks.mlp.fc1.kernel"].copy()}
    broken["blocks.mlp.fc1.kernel"][2] *= 1.01
    stages = compare_stages(folder, assemble(conversion.config, broken))
    first = next(stage.name for stage in stages if stage.deviation[0] > 1e-4)
    assert first == "blocks.2.mlp_out"
    table, passed = report(stages, DEPTH)
    assert not passed
    assert "BEYOND" in table


def test_a_stage_that_is_zero_on_both_sides_deviates_by_nothing(tmp_path, official):
    quiet = {key: np.zeros_like(value) if key.startswith("final") else value for key, value in official.items()}
    save_file(quiet, tmp_path / "model.safetensors")
    conversion = convert(tmp_path / "model.safetensors", **TOLD)
    with np.errstate(all="raise"):
        stages = compare_stages(tmp_path / "model.safetensors", assemble(conversion.config, conversion.weights))
    assert stages[-1] == ("out", (0.0, 0.0))
    assert report(stages, DEPTH)[1]


def test_the_limits_of_verification_grow_with_the_depth_only_beyond_twelve():
    assert limits(4) == limits(12) == (5e-6, 5e-5)
    assert limits(28)[0] == pytest.approx(5e-6 * 28 / 12)


def test_the_reference_in_pytorch_is_the_official_function(official, refs):
    """Against the recorded official outputs, so that what conversions are verified with is itself verified."""
    from dit_jax.torch_reference import TorchDiT

    config = convert(TINY, **TOLD).config
    stored = torch.load(TINY, weights_only=True)
    for convention, reference in (("official", refs["out_f32"]), ("diffusers", refs["diffusers_stock_out_f32"])):
        model = TorchDiT(dataclasses.replace(config, timestep_convention=convention))
        model.load_state_dict(stored)
        with torch.inference_mode():
            out = model(torch.tensor(refs["x"]).float(), torch.tensor(refs["t"]), torch.tensor(refs["y"])).numpy()
        limit = np.where(refs["t"] <= 10, 5e-6, 5e-5)[:, None, None, None] * np.abs(reference).max()
        assert (np.abs(out - reference) < limit).all()


@pytest.mark.parametrize("g", [0.0, 0.3, 1.0])
def test_coupled_replicas_in_pytorch_are_those_in_jax(g, refs):
    from dit_jax.attention import symmetric_gate
    from dit_jax.torch_reference import TorchDiT

    conversion = convert(TINY, **TOLD)
    reference = TorchDiT(conversion.config)
    reference.load_state_dict(torch.load(TINY, weights_only=True))
    x = np.random.default_rng(0).standard_normal((2, 3, 8, 8, 4), np.float32)
    t, y = np.array([900, 400, 2]), np.array([1, 2, 10])
    gate = np.tile(symmetric_gate(np.float32(g)), (3, 1, 1))
    with torch.inference_mode():
        theirs = reference(torch.tensor(x).permute(0, 1, 4, 2, 3), torch.tensor(t), torch.tensor(y), torch.tensor(gate))
    ours = assemble(conversion.config, conversion.weights)(jnp.asarray(x), t, y, jnp.asarray(gate))
    np.testing.assert_allclose(ours, theirs.permute(0, 1, 3, 4, 2), atol=5e-5 * np.abs(ours).max())
