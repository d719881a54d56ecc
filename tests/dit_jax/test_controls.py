"""The networks without attention: functions of the DiT's form, trained and stored as it is, and never coupled."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from dit_jax import training
from dit_jax.attention import symmetric_gate
from dit_jax.checkpoint import load_manifest, load_model, load_weights, save_model, weight_shapes, weights_digest
from dit_jax.config import CONTROL_SIZES, ControlConfig, DiTConfig, config_from_dict
from dit_jax.controls import MLP, Convolution, UNet, make_network
from dit_jax.diffusion import network_denoiser
from dit_jax.disk import CheckpointError
from dit_jax.export import export_model
from dit_jax.images import ImageSet
from dit_jax.training import Photographs, TrainConfig, train
from experiments.cli import main
from experiments.frame.bench import Bench
from experiments.frame.settings import StudyConfig
from ou_theory.clock import make_clock

CONFIGS = {
    "unet": ControlConfig("unet", 4, 1, input_size=8, in_channels=3, num_classes=2),
    "mlp": ControlConfig("mlp", 16, 2, input_size=8, in_channels=3, num_classes=2),
}
MODULES = {"unet": UNet, "mlp": MLP}
FAST = TrainConfig(steps=4, batch_size=4, warmup_steps=2, learning_rate=1e-2, seed=3)

each = pytest.mark.parametrize("name", CONFIGS)


def perturbed(config, seed=0):
    """A network with random numbers everywhere, where initialisation has zeros, too."""
    model = make_network(config, nnx.Rngs(seed))
    rng = np.random.default_rng(seed)
    state = nnx.state(model)
    nnx.update(model, jax.tree.map(lambda leaf: leaf + 0.3 * rng.standard_normal(leaf.shape).astype("f4"), state))
    return model


@jax.jit
def run(model, x, t, y):
    return model(x, t, y)


def batch(*lead, seed=1):
    """States (*lead, 2, 8, 8, 3), timesteps and labels."""
    x = np.random.default_rng(seed).standard_normal((*lead, 2, 8, 8, 3), np.float32)
    return x, np.array([10, 700]), np.array([0, 2])


@each
def test_the_output_has_the_shape_of_the_input_and_is_zero_at_first(name):
    config = CONFIGS[name]
    model = make_network(config, nnx.Rngs(0))
    assert isinstance(model, MODULES[name])
    out = run(model, *batch())
    assert out.shape == (2, 8, 8, 6)
    assert out.dtype == jnp.float32
    assert not out.any()
    narrow = jax.eval_shape(make_network(replace(config, dtype="bfloat16", learn_sigma=False), nnx.Rngs(0)), *batch(3))
    assert narrow.shape == (3, 2, 8, 8, 3)
    assert narrow.dtype == jnp.float32


@pytest.mark.parametrize(("name", "depth", "width"), [(name, *size) for name, size in CONTROL_SIZES.items()])
def test_the_networks_of_the_command_are_as_large_as_a_small_dit(name, depth, width):
    shapes = weight_shapes(ControlConfig(name, width, depth))
    assert 3e5 < sum(np.prod(shape) for shape in shapes.values()) < 6e5


@each
def test_time_and_class_matter_and_replicas_do_not_meet(name):
    model = perturbed(CONFIGS[name])
    x, t, y = batch(2)
    out = run(model, x, t, y)
    for other in (run(model, x, t + 100, y), run(model, x, t, 1 - y % 2)):
        assert np.abs(other - out).max() > 1e-2
    for each, alone in zip(out, x, strict=True):
        np.testing.assert_allclose(run(model, alone, t, y), each, atol=1e-5)
    moved = run(model, np.stack([x[0], x[1] + 1]), t, y)
    np.testing.assert_array_equal(moved[0], out[0])


def test_the_mlp_knows_no_place():
    """Pixel sites renamed in data, rows of the first layer and columns of the last: the same function."""
    config = CONFIGS["mlp"]
    model, renamed = perturbed(config), perturbed(config)
    x, t, y = batch()
    order = np.random.default_rng(2).permutation(64)
    rows = np.arange(64 * 3).reshape(64, 3)[order].ravel()
    columns = np.arange(64 * 6).reshape(64, 6)[order].ravel()
    renamed.first.kernel[...] = model.first.kernel[...][rows]
    renamed.head.linear.kernel[...] = model.head.linear.kernel[...][:, columns]
    renamed.head.linear.bias[...] = model.head.linear.bias[...][columns]

    def permuted(images):
        return images.reshape(2, 64, -1)[:, order].reshape(images.shape)

    expected = permuted(np.asarray(run(model, x, t, y)))
    np.testing.assert_allclose(run(renamed, permuted(x), t, y), expected, rtol=1e-5, atol=1e-4)
    assert np.abs(run(model, permuted(x), t, y) - expected).max() > 0.1  # with the old weights it is another one


def test_a_convolution_moves_with_the_image_and_sees_neighbours_only():
    layer = Convolution(3, 2, CONFIGS["unet"], nnx.Rngs(0))
    x = np.random.default_rng(0).standard_normal((1, 6, 6, 3), np.float32)
    out = layer(x)
    assert out.shape == (1, 6, 6, 2)
    moved = layer(np.roll(x, (1, 2), (1, 2)))
    np.testing.assert_allclose(moved[:, 2:-1, 3:-1], out[:, 1:-2, 1:-3], atol=1e-6)  # away from the border
    x[0, 2, 3] += 1
    changed = np.abs(layer(x) - out).max((0, 3)) > 0
    assert changed[1:4, 2:5].all()
    assert changed.sum() == 9
    kernel = layer.kernel[...].reshape(3, 3, 3, 2)
    expected = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
    np.testing.assert_allclose(layer(x), expected, atol=1e-5)


@each
def test_it_is_a_denoiser_under_guidance_too(name):
    model, (x, _, y) = perturbed(CONFIGS[name]), batch(2)
    plain, guided = (
        jax.eval_shape(network_denoiser(model, make_clock(8), guidance=guidance), x, jnp.asarray(3), y)
        for guidance in (1.0, 2.0)
    )
    for found in (plain, guided):
        assert found.denoised.shape == found.fraction.shape == x.shape


@each
def test_coupling_taps_edits_and_misfits_are_refused(name):
    model = perturbed(CONFIGS[name])
    x, t, y = batch(2)
    uncoupled = jax.jit(lambda model, x: model(x, t, y, np.eye(2)))(model, x)
    np.testing.assert_array_equal(uncoupled, run(model, x, t, y))
    for gate in (symmetric_gate(0.1), jnp.eye(3), jnp.ones((2, 3))):
        with pytest.raises(ValueError, match=f"a {name} has no attention"):
            model(x, t, y, gate)
    with pytest.raises(ValueError, match=f"a {name} has no attention"):
        model(x[0], t, y, symmetric_gate(0.0))
    with pytest.raises(ValueError, match=f"a {name} has no attention"):  # a traced gate may be any
        jax.jit(lambda gate: model(x, t, y, gate))(symmetric_gate(0.0))
    with pytest.raises(ValueError, match=f"a {name} has not"):
        model(x, t, y, tap=lambda layer, activations: activations)
    with pytest.raises(ValueError, match="this model takes images"):
        model(x[..., :2], t, y)
    with pytest.raises(ValueError, match="null label"):
        model(x, t, y + 1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"architecture": "vit"}, "unknown architecture 'vit'; known: unet, mlp"),
        ({"architecture": ["unet"]}, "unknown architecture"),
        ({"hidden_size": 0}, "hidden_size must be a positive integer"),
        ({"depth": True}, "depth must be a positive integer"),
        ({"depth": 65}, "depth must be at most 64"),
        ({"input_size": 7}, "must be even"),
        ({"prediction": "w"}, "prediction 'w'"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"learn_sigma": 1}, "learn_sigma"),
        ({"num_heads": 4}, "unknown Control config entries: num_heads"),
    ],
)
def test_bad_configs_are_refused(change, told):
    with pytest.raises(ValueError, match=told):
        config_from_dict(CONFIGS["unet"].to_dict() | change)


def test_a_config_comes_back_from_its_entries():
    assert ControlConfig("mlp", 16, 2, input_size=7).input_size == 7
    for config in (*CONFIGS.values(), DiTConfig()):
        assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert "architecture" not in DiTConfig().to_dict()  # its folders stay as they are


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model folder of each architecture, by name."""
    root = tmp_path_factory.mktemp("controls")
    for name, config in CONFIGS.items():
        save_model(perturbed(config), root / name)
    return {name: root / name for name in CONFIGS}


@each
def test_a_folder_gives_the_same_function_back(name, folders):
    model, found = perturbed(CONFIGS[name]), load_model(folders[name])
    assert isinstance(found, MODULES[name])
    assert found.config == model.config
    np.testing.assert_array_equal(run(found, *batch()), run(model, *batch()))
    config, weights, manifest = load_weights(folders[name])
    assert config.to_dict() == manifest["config"]
    assert manifest["config"]["architecture"] == name
    assert weights_digest(folders[name]) == manifest["digest"]
    assert {path: array.shape for path, array in weights.items()} == weight_shapes(config)


def test_what_only_a_dit_has_is_refused(folders, tmp_path):
    with pytest.raises(ValueError, match="no DiT"):
        load_model(folders["mlp"], timestep_convention="diffusers")
    with pytest.raises(CheckpointError, match="no DiT"):
        export_model(folders["mlp"], tmp_path / "mlp.safetensors")
    manifest = load_manifest(folders["mlp"])
    (tmp_path / "odd").mkdir()
    manifest["config"]["architecture"] = "vit"
    (tmp_path / "odd" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="unknown architecture 'vit'"):
        load_model(tmp_path / "odd")


@each
def test_a_study_refuses_it_unless_it_takes_any_network(name, folders, tmp_path, capsys):
    assert main(["compare", "--weights", str(folders[name]), "--out", str(tmp_path / "compare"), "--quiet"]) == 2
    assert f"syncgap compare couples or reads attention and needs a DiT; {name} is a {name}" in (
        capsys.readouterr().err
    )
    assert not (tmp_path / "compare").exists()
    config = StudyConfig(weights=str(folders[name]), pairs=2, block=2, steps="5")
    bench = Bench("spectrum", config, tmp_path / "any", any_network=True)
    assert bench.model == CONFIGS[name]
    x, _, y = batch(2)
    assert jax.eval_shape(bench.denoiser(bench.network), x, jnp.asarray(2), y).denoised.shape == x.shape
    assert np.abs(bench.untrained.head.linear.kernel[...]).max() > 0  # zero at initialisation, drawn here


@pytest.mark.long
def test_training_resumes_with_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(training, "_sample_grid", lambda *_: Image.new("L", (1, 1)))  # a command draws it below
    config = CONFIGS["mlp"]
    pixels = np.random.default_rng(0).integers(0, 255, (12, 8, 8, 3)).astype(np.uint8)
    images = ImageSet(pixels, np.arange(12, dtype=np.int32) % 2, ("odd", "even"), np.zeros(3), 0.6, "digest")

    class Stopping(Photographs):
        def batch(self, config, step):
            if step == 3:
                raise KeyboardInterrupt
            return super().batch(config, step)

    options = {"checkpoint_every": 2, "progress": False}
    whole = train(images, config, FAST, tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        train(Stopping(images), config, FAST, tmp_path / "parts", **options)
    parts = train(images, config, FAST, tmp_path / "parts", resume=True, **options)
    assert load_manifest(whole)["digest"] == load_manifest(parts)["digest"]
    assert np.abs(run(load_model(whole), *batch())).max() > 0
    with pytest.raises(ValueError, match="model"):
        train(images, replace(config, depth=3), FAST, tmp_path / "parts", resume=True, **options)


@pytest.mark.long
def test_the_command_trains_and_describes_it(tmp_path, capsys):
    flags = ["--architecture", "unet", "--hidden-size", "8", "--size", "8", "--steps", "1", "--batch-size", "2"]
    assert main(["train", "solvable", str(tmp_path / "run"), *flags, "--quiet"]) == 0
    config = load_model(tmp_path / "run" / "model").config
    assert (config.architecture, config.hidden_size, config.depth) == ("unet", 8, 1)
    assert main(["info", str(tmp_path / "run" / "model"), "--verify"]) == 0
    told = capsys.readouterr().out
    assert "unet, depth 1, width 8, no attention" in told
    assert "tokens" not in told
    assert main(["train", "nowhere", str(tmp_path / "other"), "--architecture", "mlp", "--num-heads", "6"]) == 2
    assert "only a dit has --num-heads, and this is a mlp" in capsys.readouterr().err
