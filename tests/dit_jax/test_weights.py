"""The key table, the inference of configs, and what a file that is not a DiT is told."""

import argparse
import hashlib
import os
import pickle
import sys
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_jax.checkpoint import assemble, weight_shapes
from dit_jax.config import VARIANTS, DiTConfig, variant
from dit_jax.facts import Facts
from dit_jax.verify import compare_stages
from dit_jax.weights import (
    TABLE,
    WeightsError,
    convert,
    convert_entries,
    infer_config,
    source_shapes,
    variant_name,
)

TOLD: Any = {"num_heads": 6, "num_classes": 10, "prediction": "epsilon"}  # what the recorded file does not say
TINY = Path(__file__).parents[1] / "data" / "tiny_xl_like.pt"
SMALL = DiTConfig(input_size=4, in_channels=3, hidden_size=8, depth=2, num_heads=2, num_classes=3)
KNOWN = Facts("epsilon", SMALL.num_heads, SMALL.num_classes, input_size=SMALL.input_size)
BLOCK_ENTRIES = 10


@pytest.fixture(scope="module")
def state_dict():
    return torch.load(TINY, weights_only=True)


def random_entries(config: DiTConfig, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {key: rng.standard_normal(shape, np.float32) for key, shape in source_shapes(config).items()}


def saved(tmp_path: Path, content, **options) -> Path:
    path = tmp_path / "checkpoint.pt"
    torch.save(content, path, **options)
    return path


def training_form(**parts):
    """What the official training script saves: an optimizer's state and its command line beside the weights."""
    parameter = torch.nn.Parameter(torch.ones(2))
    args = argparse.Namespace(model="DiT-XL/2", image_size=256, data_path="images", epochs=1400)
    return {**parts, "opt": torch.optim.AdamW([parameter]).state_dict(), "args": args}


def test_table_covers_both_sides_once():
    targets = [rule.target for rule in TABLE]
    assert sorted(targets) == sorted(weight_shapes(SMALL))
    assert len(source_shapes(SMALL)) == len(TABLE) - BLOCK_ENTRIES + SMALL.depth * BLOCK_ENTRIES


def test_official_keys_and_shapes():
    """The released XL/2 file at 256 px: 292 entries; at 512 px only the position embedding differs."""
    shapes = source_shapes(variant("DiT-XL/2"))
    expected = {
        "pos_embed": (1, 256, 1152),
        "x_embedder.proj.weight": (1152, 4, 2, 2),
        "x_embedder.proj.bias": (1152,),
        "t_embedder.mlp.0.weight": (1152, 256),
        "t_embedder.mlp.0.bias": (1152,),
        "t_embedder.mlp.2.weight": (1152, 1152),
        "t_embedder.mlp.2.bias": (1152,),
        "y_embedder.embedding_table.weight": (1001, 1152),
        "final_layer.linear.weight": (32, 1152),
        "final_layer.linear.bias": (32,),
        "final_layer.adaLN_modulation.1.weight": (2304, 1152),
        "final_layer.adaLN_modulation.1.bias": (2304,),
    }
    block = {
        "attn.qkv.weight": (3456, 1152),
        "attn.qkv.bias": (3456,),
        "attn.proj.weight": (1152, 1152),
        "attn.proj.bias": (1152,),
        "mlp.fc1.weight": (4608, 1152),
        "mlp.fc1.bias": (4608,),
        "mlp.fc2.weight": (1152, 4608),
        "mlp.fc2.bias": (1152,),
        "adaLN_modulation.1.weight": (6912, 1152),
        "adaLN_modulation.1.bias": (6912,),
    }
    expected |= {f"blocks.{i}.{key}": shape for i in range(28) for key, shape in block.items()}
    assert shapes == expected
    assert len(shapes) == 292
    assert source_shapes(variant("DiT-XL/2", input_size=64)) == {**expected, "pos_embed": (1, 1024, 1152)}


def test_values_land_where_they_belong(state_dict):
    """Each kind of entry against its own use, in NumPy: not the table's transforms again."""
    weights = convert(TINY, **TOLD).weights
    entries = {key: value.numpy() for key, value in state_dict.items()}
    rng = np.random.default_rng(0)
    h = rng.standard_normal((5, 96), np.float32)
    np.testing.assert_allclose(
        h @ weights["blocks.attn.qkv.kernel"][2], h @ entries["blocks.2.attn.qkv.weight"].T, rtol=1e-4, atol=1e-5
    )
    # the bias of k (the middle third) has no effect on any output, so only its value can be compared
    np.testing.assert_array_equal(weights["blocks.attn.qkv.bias"][3], entries["blocks.3.attn.qkv.bias"])
    image = rng.standard_normal((4, 2, 2), np.float32)  # one patch, (C, row, column)
    ours = image.transpose(1, 2, 0).reshape(-1) @ weights["x_embedder.kernel"]
    convolved = np.einsum("dcij,cij->d", entries["x_embedder.proj.weight"], image)
    np.testing.assert_allclose(ours, convolved, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(weights["y_embedder.embedding"][10], entries["y_embedder.embedding_table.weight"][10])
    np.testing.assert_array_equal(weights["pos_embed"], entries["pos_embed"][0])


def test_conversion_of_the_released_form():
    conversion = convert(TINY, **TOLD)
    assert conversion.config == DiTConfig(input_size=8, hidden_size=96, depth=4, num_heads=6, num_classes=10)
    assert conversion.variant is None
    digest = hashlib.sha256(TINY.read_bytes()).hexdigest()
    assert conversion.provenance["source"] == {"file": "tiny_xl_like.pt", "sha256": digest, "form": "released"}
    assert {array.dtype for array in conversion.weights.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("input_size", [32, 64])
def test_official_variants_are_inferred_from_shapes(name, input_size):
    config = variant(name, input_size=input_size)
    facts = Facts("epsilon", input_size=input_size)
    assert infer_config(source_shapes(config), config.depth, facts) == (config, [])
    assert variant_name(config) == name


@given(
    grid=st.integers(1, 4),
    patch=st.integers(1, 4),
    channels=st.integers(1, 4),
    heads=st.integers(1, 3),
    depth=st.integers(1, 3),
    classes=st.integers(1, 20),
    learn_sigma=st.booleans(),
    mlp_ratio=st.sampled_from([1.0, 2.0, 4.0]),
)
@settings(max_examples=15, deadline=None)
def test_any_config_is_inferred_from_shapes(grid, patch, channels, heads, depth, classes, learn_sigma, mlp_ratio):
    config = DiTConfig(
        input_size=grid * patch,
        patch_size=patch,
        in_channels=channels,
        hidden_size=4 * heads,
        depth=depth,
        num_heads=heads,
        mlp_ratio=mlp_ratio,
        num_classes=classes,
        learn_sigma=learn_sigma,
    )
    facts = Facts("epsilon", heads, classes, input_size=grid * patch)
    assert infer_config(source_shapes(config), depth, facts) == (config, [])


def test_heads_must_be_given_for_unofficial_widths():
    with pytest.raises(WeightsError, match=r"cannot tell num_heads: .* depth 4 and width 96; give it \(--num-heads\)"):
        convert(TINY)
    with pytest.raises(WeightsError, match="not a multiple of num_heads 5"):
        convert(TINY, **{**TOLD, "num_heads": 5})


def test_training_form(tmp_path, state_dict):
    ema = {key: value + 1 for key, value in state_dict.items()}
    path = saved(tmp_path, training_form(model=state_dict, ema=ema))
    by_default = convert(path, **TOLD)
    assert by_default.provenance["source"]["form"] == "training/ema"
    np.testing.assert_array_equal(by_default.weights["x_embedder.bias"], ema["x_embedder.proj.bias"])
    model = convert(path, which="model", **TOLD)
    assert model.provenance["source"]["form"] == "training/model"
    np.testing.assert_array_equal(model.weights["x_embedder.bias"], state_dict["x_embedder.proj.bias"])


def test_part_that_is_not_there(state_dict):
    with pytest.raises(WeightsError, match="bare state dict, without a part 'model'"):
        convert(TINY, which="model", **TOLD)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_wrapped_training(tmp_path, state_dict, prefix):
    wrapped = saved(tmp_path, {prefix + key: value for key, value in state_dict.items()})
    ours, plain = convert(wrapped, **TOLD).weights, convert(TINY, **TOLD).weights
    assert all(np.array_equal(ours[path], plain[path]) for path in plain)


def test_a_ratio_that_is_no_binary_fraction():
    """44 (15 / 44) is below 15 in floating point."""
    config = DiTConfig(4, 2, 3, hidden_size=44, depth=1, num_heads=2, mlp_ratio=15 / 44, num_classes=3)
    entries = random_entries(config)
    assert entries["blocks.0.mlp.fc1.bias"].shape == (15,)
    assert convert_entries(entries, "file", KNOWN)[0] == config


def test_key_with_and_without_prefix(tmp_path, state_dict):
    twice = {**state_dict, "module.pos_embed": state_dict["pos_embed"]}
    with pytest.raises(WeightsError, match="pos_embed twice"):
        convert(saved(tmp_path, twice), **TOLD)


def test_old_file_format_and_half_precision(tmp_path, state_dict):
    half = {key: value.bfloat16() for key, value in state_dict.items()}
    weights = convert(saved(tmp_path, half, _use_new_zipfile_serialization=False), **TOLD).weights
    assert weights["x_embedder.bias"].dtype == np.float32
    np.testing.assert_array_equal(weights["x_embedder.bias"], half["x_embedder.proj.bias"].float())


FAULTS = {
    "missing": lambda entries, key: entries.pop(key),
    "unexpected": lambda entries, key: entries.update({key + ".extra": np.zeros(1, np.float32)}),
    "misshapen": lambda entries, key: entries.update({key: np.zeros((2, *entries[key].shape), np.float32)}),
    "not finite": lambda entries, key: entries[key].flat.__setitem__(-1, np.nan),
    "not a real-valued dense tensor": lambda entries, key: entries.update({key: np.zeros(1, np.int64)}),
}


@given(faults=st.dictionaries(st.sampled_from(list(source_shapes(SMALL))), st.sampled_from(list(FAULTS)), min_size=1))
@settings(max_examples=25, deadline=None)
def test_every_fault_is_listed_in_one_error(faults):
    entries = random_entries(SMALL)
    for key, fault in faults.items():
        FAULTS[fault](entries, key)
    with pytest.raises(WeightsError) as caught:
        convert_entries(entries, "file", KNOWN)
    message = str(caught.value)
    sizes_known = "cannot tell" not in message
    for key, fault in faults.items():
        if fault == "misshapen" and not sizes_known:
            continue  # there is nothing to compare with
        assert f"{fault}: {key}" in message
    lines = [line.strip().split(":")[0] for line in message.splitlines()[1:]]
    assert len([line for line in lines if line in FAULTS]) <= len(faults)


def test_all_kinds_of_faults_at_once():
    entries = random_entries(SMALL)
    FAULTS["missing"](entries, "blocks.1.mlp.fc1.weight")
    FAULTS["unexpected"](entries, "final_layer.linear.bias")
    entries["blocks.0.attn.qkv.weight"] = entries["blocks.0.attn.qkv.weight"].T
    FAULTS["not finite"](entries, "t_embedder.mlp.0.bias")
    with pytest.raises(WeightsError) as caught:
        convert_entries(entries, "file", KNOWN)
    assert str(caught.value).splitlines() == [
        "file cannot be converted:",
        "  missing: blocks.1.mlp.fc1.weight",
        "  unexpected: final_layer.linear.bias.extra",
        "  misshapen: blocks.0.attn.qkv.weight is (8, 24), expected (24, 8)",
        "  not finite: t_embedder.mlp.0.bias",
    ]


def test_random_entries_without_faults_are_accepted():
    config, weights = convert_entries(random_entries(SMALL), "file", KNOWN)
    assert config == SMALL
    assert {path: array.shape for path, array in weights.items()} == weight_shapes(SMALL)


def test_absurd_block_numbers():
    entries = random_entries(SMALL)
    entries["blocks.999999.attn.qkv.bias"] = np.zeros(24, np.float32)
    with pytest.raises(WeightsError, match="3 blocks, but numbers them up to 999999"):
        convert_entries(entries, "file", KNOWN)
    with pytest.raises(WeightsError, match=r"no entries blocks\.0.* It has conv\.weight"):
        convert_entries({"conv.weight": np.zeros(3, np.float32)}, "file", KNOWN)


class Planted:
    """Unpickling this runs a command."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_marker_works(tmp_path):
    """The attack of the next test does run where pickles are trusted."""
    pickle.loads(pickle.dumps(Planted(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("form", ["zip", "old", "bare pickle", "in training form"])
def test_planted_code_never_runs(tmp_path, state_dict, form):
    path, planted = tmp_path / "checkpoint.pt", Planted(tmp_path / "marker")
    if form == "bare pickle":
        path.write_bytes(pickle.dumps({"pos_embed": planted}))
    elif form == "in training form":
        torch.save({"ema": state_dict, "model": state_dict, "opt": {}, "args": planted}, path)
    else:
        torch.save({**state_dict, "extra": planted}, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(WeightsError, match=r"never loaded because that would run code|not a readable checkpoint"):
        convert(path, **TOLD)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_truncated_files(tmp_path, share):
    path, content = tmp_path / "cut.pt", TINY.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(WeightsError, match="not a readable checkpoint"):
        convert(path, **TOLD)


def test_foreign_files(tmp_path):
    text, archive, tensor = tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "c.pt"
    text.write_text("weights, honestly\n" * 50)
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("readme.txt", "hello")
    torch.save(torch.zeros(3), tensor)
    for path in (text, archive):
        with pytest.raises(WeightsError, match="not a readable checkpoint"):
            convert(path)
    with pytest.raises(WeightsError, match="holds a Tensor, not a state dict"):
        convert(tensor)
    with pytest.raises(WeightsError, match="is not a file"):
        convert(tmp_path / "nowhere.pt")
    with pytest.raises(WeightsError, match=r"several checkpoints, a\.pt, b\.pt, c\.pt; give the file"):
        convert(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(WeightsError, match=r"holds no \.safetensors"):
        convert(tmp_path / "empty")


def test_without_torch(monkeypatch):
    expected = convert(TINY, **TOLD).weights
    monkeypatch.setitem(sys.modules, "torch", None)
    found = convert(TINY, **TOLD)
    assert all(np.array_equal(found.weights[path], array) for path, array in expected.items())
    with pytest.raises(WeightsError, match=r"--verify\) needs PyTorch: pip install '\.\[torch\]'"):
        compare_stages(TINY, assemble(found.config, found.weights))
