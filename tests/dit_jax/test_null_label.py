"""Networks that know their classes alone: they run wherever no null label is needed, and say so where one is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hostile import CONFIG, OFFICIAL, TOLD, tensors
from models import random_model

from dit_jax.checkpoint import assemble, load_model, save_model
from dit_jax.config import DiTConfig
from dit_jax.diffusion import guided_output, network_denoiser, sample
from dit_jax.training import TrainConfig, make_update
from dit_jax.verify import compare_stages, report
from dit_jax.weights import convert
from ou_theory.clock import make_clock

WITHOUT = dataclasses.replace(CONFIG, num_classes=4, null_label=False)


@pytest.fixture(scope="module")
def pair():
    """A network with four label rows of which the last is the null label, and the same one with four classes."""
    model = random_model(CONFIG, 0.1)
    graph, state = nnx.split(model)
    other = nnx.merge(graph, state)
    other.config = WITHOUT
    return model, other


def test_the_same_table_has_another_meaning(pair, tmp_path):
    """The function is the same; every row is a class, and there is no label beyond it."""
    model, other = pair
    save_model(other, tmp_path / "model")
    loaded = load_model(tmp_path / "model")
    assert loaded.config == WITHOUT
    x, t = jnp.ones((4, 4, 4, 3)), jnp.arange(4) * 100
    np.testing.assert_array_equal(loaded(x, t, jnp.arange(4)), model(x, t, jnp.arange(4)))
    with pytest.raises(ValueError, match=r"from 0 to 3, the last class \(this network has no null label\)"):
        loaded(x, t, jnp.arange(1, 5))
    with pytest.raises(ValueError, match="labels must be from 0 to 3, the null label"):
        model(x, t, jnp.arange(1, 5))


def test_sampling_needs_none_without_guidance(pair):
    clock, labels = make_clock(3), jnp.array([0, 3])
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 3))
    with_null, without = (sample(network_denoiser(m, clock), x, clock, labels)[0] for m in pair)
    np.testing.assert_array_equal(with_null, without)


@pytest.mark.parametrize("scale", [0.0, 1.5, 4.0])
def test_guidance_is_refused(pair, scale):
    message = f"guidance {scale:g} needs a null label, which this network does not have: run it with guidance 1"
    with pytest.raises(ValueError, match=message):
        network_denoiser(pair[1], make_clock(3), guidance=scale)
    with pytest.raises(ValueError, match="needs a null label"):
        guided_output(pair[1], jnp.ones((1, 4, 4, 3)), jnp.zeros(1), jnp.zeros(1, int), scale=scale)
    network_denoiser(pair[0], make_clock(3), guidance=scale)


def test_training_drops_no_labels():
    graph, _, constants = nnx.split(random_model(WITHOUT, 0.1), nnx.Param, ...)
    settings = TrainConfig(steps=10, batch_size=2)
    assert settings.label_dropout > 0
    with pytest.raises(ValueError, match=r"label_dropout 0\.1 needs a null label.*train it with label_dropout 0"):
        make_update(WITHOUT, settings, graph, constants, make_clock(10))
    make_update(WITHOUT, dataclasses.replace(settings, label_dropout=0.0), graph, constants, make_clock(10))


@pytest.mark.parametrize("value", [None, 0, 1, "no"])
def test_the_entry_is_true_or_false(value):
    with pytest.raises(ValueError, match="null_label must be true or false"):
        DiTConfig(null_label=value)


def test_a_converted_network_without_a_null_label_is_verified(tmp_path):
    torch.save(tensors(), tmp_path / "model.pt")
    told = {key: value for key, value in TOLD.items() if key != "num_classes"}
    found = convert(tmp_path / "model.pt", **told, null_label="none")
    assert found.config == WITHOUT
    assert found.weights["y_embedder.embedding"].shape == OFFICIAL["y_embedder.embedding_table.weight"].shape
    stages = compare_stages(tmp_path / "model.pt", assemble(found.config, found.weights))
    assert report(stages, 1)[1]
