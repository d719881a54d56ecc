"""Where the weights are in a checkpoint: nested entries, prefixes, EMA beside raw weights, and what an error says."""

import copy
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
from hostile import OFFICIAL, TOLD, refused, tensors
from safetensors.numpy import save_file

from dit_jax.weights import WeightsError, convert

BIAS = "t_embedder.mlp.0.bias"


def under(prefix: str, by: float = 0.0) -> dict:
    return {prefix + key: value + by for key, value in tensors().items()}


def read(path, **options):
    """By how much the weights that were read differ from the first ones, and the conversion."""
    found = convert(path, **TOLD, **options)
    return found.weights["t_embedder.fc1.bias"][0] - OFFICIAL[BIAS][0], found


def saved(tmp_path, content, legacy=False):
    torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=not legacy)
    return tmp_path / "model.ckpt"


ONLY = {  # one set of weights, and where its note says that it is
    "state_dict": lambda: ({"state_dict": under(""), "epoch": 3}, "state_dict"),
    "model_state_dict": lambda: ({"model_state_dict": OrderedDict(under("")), "loss": 0.1}, "model_state_dict"),
    "model without ema": lambda: ({"model": under(""), "opt": {"state": {}}, "ema_decay": 0.9999}, "model"),
    "net": lambda: (under("net."), "net"),
    "model": lambda: (under("model."), "model"),
    "lightning": lambda: (
        {"state_dict": {**under("model.net."), "vae.conv.weight": torch.ones(3)}, "pytorch-lightning_version": "2"},
        "state_dict.model.net",
    ),
    "compiled and distributed": lambda: ({"state_dict": under("module.dit._orig_mod.")}, "state_dict.dit"),
    "default dictionary": lambda: ({"weights": defaultdict(list, under(""))}, "weights"),
    "whole module": lambda: ({"network": pickled_module()}, "network"),
}


def pickled_module() -> torch.nn.Module:
    """A module that is pickled as a whole, with the weights of the model under their own keys."""
    root = torch.nn.Module()
    for key, value in tensors().items():
        *path, name = key.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, torch.nn.Module())
            module = module._modules[part]
        module.register_parameter(name, torch.nn.Parameter(value))
    return root


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("form", ONLY)
def test_a_single_set_of_weights_is_found_and_named(tmp_path, form, legacy):
    content, where = ONLY[form]()
    by, found = read(saved(tmp_path, content, legacy))
    assert by == 0
    assert found.notes[0] == f"the weights are those under {where!r}, the only ones in the file"


@pytest.mark.parametrize("form", ["module.", "_orig_mod.", "module._orig_mod.", "_fsdp_wrapped_module."])
def test_wrappers_need_no_note(tmp_path, form):
    by, found = read(saved(tmp_path, under(form)))
    assert by == 0
    assert not [note for note in found.notes if "under" in note]
    block = {key.replace("blocks.0.", "blocks.0._orig_mod."): value for key, value in tensors().items()}
    assert read(saved(tmp_path, block))[0] == 0


def test_weights_averaged_by_pytorch(tmp_path):
    averaged = {"n_averaged": torch.tensor(7), **under("module.", 1.0)}
    assert read(saved(tmp_path, averaged))[0] == pytest.approx(1)


PAIRS = {  # raw weights, and EMA weights that are larger by one
    "official": lambda: {"model": under(""), "ema": under("", 1.0), "opt": {}},
    "other names": lambda: {"model_state_dict": under(""), "ema_state_dict": under("", 1.0)},
    "flat": lambda: {**under("model."), **under("ema_model.", 1.0)},
    "raw without prefix": lambda: {**under(""), **under("ema_model.", 1.0), "ema_model.initted": torch.ones(1)},
    "nested and flat": lambda: {"state_dict": {**under("net."), **under("net_ema.", 1.0)}},
    "ema in parts": lambda: {"model": under(""), "ema": {"decay": 0.99, "module": under("", 1.0)}},
}


@pytest.mark.parametrize("form", PAIRS)
def test_ema_is_the_default_and_either_can_be_asked_for(tmp_path, form):
    path = saved(tmp_path, PAIRS[form]())
    assert read(path)[0] == pytest.approx(1)
    assert read(path, which="ema")[0] == pytest.approx(1)
    assert read(path, which="model")[0] == 0


def test_which_weights_of_a_safetensors_file(tmp_path):
    both = {f"{part}.{key}": value + i for i, part in enumerate(("model", "ema")) for key, value in OFFICIAL.items()}
    save_file(both, tmp_path / "model.safetensors")
    assert read(tmp_path / "model.safetensors")[0] == pytest.approx(1)
    assert read(tmp_path / "model.safetensors", which="model")[0] == 0
    assert read(tmp_path / "model.safetensors", prefix="model.")[0] == 0


NO_EMA = {
    "none": {"ema": None},
    "empty": {"ema": {}},
    "list of tensors": {"ema": {"decay": 0.99, "shadow_params": [torch.ones(3)]}},
    "keys without dots": {"model_ema.blocks0attnqkvweight": torch.ones(3)},
}


@pytest.mark.parametrize("form", NO_EMA)
def test_ema_that_cannot_be_read_is_not_replaced_in_silence(tmp_path, form):
    path = saved(tmp_path, {"model": under(""), **NO_EMA[form]})
    refused(path, r"without 'ema' weights .* it has weights under 'model'; .* give --which model")
    assert read(path, which="model")[0] == 0


def test_several_sets_of_weights_ask_for_a_prefix(tmp_path):
    path = saved(tmp_path, {**under("net_a."), **under("net_b.", 1.0)})
    refused(path, r"several sets of weights; it has weights under 'net_a', 'net_b'; say which, .* --prefix net_b")
    assert read(path, prefix="net_b")[0] == pytest.approx(1)
    assert read(path, prefix="net_a.")[0] == 0
    two = saved(tmp_path, {"ema": {"0.999": under(""), "0.9999": under("", 1.0)}, "model": under("", 2.0)})
    refused(two, "several sets .*'ema.0.999', 'ema.0.9999'.*--prefix")
    assert read(two, prefix="ema.0.9999")[0] == pytest.approx(1)


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        (lambda: under("model."), {"which": "ema"}, "without EMA weights .* under 'model'; give --which model"),
        (lambda: under("ema."), {"which": "model"}, "holds EMA weights alone; .* under 'ema'; leave --which out"),
        (lambda: under(""), {"which": "model"}, "bare state dict, without a part 'model'; leave --which out"),
        (
            lambda: under("net."),
            {"prefix": "nets"},
            r"no entries under 'nets'; .* net\.pos_embed.* under 'net'",
        ),
    ],
)
def test_choices_that_are_not_there(tmp_path, content, options, message):
    with pytest.raises(WeightsError, match=message):
        read(saved(tmp_path, content()), **options)


def test_keys_are_shown_where_no_dit_is_found(tmp_path):
    other = {f"down_blocks.{i}.resnets.conv.weight": torch.ones(3) for i in range(9)}
    message = refused(saved(tmp_path, {"unet": other}), "not a DiT in the official form")
    assert "unet.down_blocks.0.resnets.conv.weight" in message
    assert "and 5 more" in message


def test_a_network_beside_the_dit_is_left_out(tmp_path):
    """Another transformer has blocks too, but no parts of a DiT."""
    encoder = {f"encoder.blocks.{i}.attn.qkv.weight": torch.ones(3) for i in range(2)}
    assert read(saved(tmp_path, {**under("dit."), **encoder}))[0] == 0
    refused(saved(tmp_path, {**under(""), **encoder}), "unexpected: encoder.blocks.0")


def test_tied_tensors_are_read(tmp_path):
    """Fifty keys of the numbers of one: more bytes than the file has."""
    content = tensors()
    table = torch.ones(8, 24)
    content["blocks.0.attn.qkv.weight"] = table.T
    content["blocks.0.mlp.fc1.weight"] = table.flatten().repeat(2)[:256].view(32, 8)
    block = {key.removeprefix("blocks.0"): value for key, value in content.items() if key.startswith("blocks.0.")}
    content |= {f"blocks.{i}{key}": value for i in range(1, 50) for key, value in block.items()}
    torch.save(content, tmp_path / "model.pt")
    claimed = sum(value.numel() * 4 for value in content.values())
    assert claimed > (tmp_path / "model.pt").stat().st_size
    weights = convert(tmp_path / "model.pt", **TOLD).weights
    np.testing.assert_array_equal(weights["blocks.attn.qkv.kernel"], np.ones((50, 8, 24)))
    np.testing.assert_array_equal(weights["blocks.mlp.fc1.bias"][49], OFFICIAL["blocks.0.mlp.fc1.bias"])


def test_tied_tensors_that_safetensors_stored_once(tmp_path):
    from safetensors.torch import save_model

    module = pickled_module()
    fc1, fc2 = (module.blocks._modules["0"].mlp._modules[name] for name in ("fc1", "fc2"))  # type: ignore[union-attr]
    fc2.bias = module.x_embedder.proj.bias  # type: ignore[union-attr]
    assert fc1 is not fc2
    save_model(copy.copy(module), str(tmp_path / "model.safetensors"))
    weights = convert(tmp_path / "model.safetensors", **TOLD).weights
    np.testing.assert_array_equal(weights["blocks.mlp.fc2.bias"][0], weights["x_embedder.bias"])
