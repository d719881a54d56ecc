"""The training loop on a tiny set: it learns, resumes exactly, and keeps its settings."""

import json
from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx

import dit_jax.training as training
from dit_jax.checkpoint import load_manifest, load_model
from dit_jax.config import DiTConfig
from dit_jax.images import ImageSet
from dit_jax.model import DiT
from dit_jax.training import TrainConfig, batch_indices, learning_rate, make_step, optimizer, train
from dit_jax.training_run import TrainingError
from experiments.cli import main

MODEL = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=2, prediction="v")
FLOW = replace(MODEL, prediction="velocity", path="linear", learn_sigma=False)
FAST = TrainConfig(steps=6, batch_size=4, warmup_steps=2, learning_rate=1e-2, seed=3)

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def images():
    """Two flat-coloured classes with a little noise."""
    rng = np.random.default_rng(0)
    labels = np.arange(12, dtype=np.int32) % 2
    pixels = np.where(labels[:, None, None, None] == 0, 60, 200) + rng.integers(-20, 20, (12, 8, 8, 3))
    return ImageSet(pixels.astype(np.uint8), labels, ("dark", "light"), np.zeros(3), 0.6, "digest")


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    out = tmp_path_factory.mktemp("train") / "whole"
    train(images, MODEL, FAST, out, checkpoint_every=3, log_every=2, progress=False, command="syncgap train")
    return out


def weights(folder):
    return nnx.to_flat_state(nnx.state(load_model(folder / "model")))


def test_the_folder_holds_model_log_and_samples(whole, images):
    manifest = load_manifest(whole / "model")
    assert manifest["data"] == images.preparation()
    assert manifest["training"]["steps"] == 6
    assert (manifest["command"], manifest["generator"]) == ("syncgap train", "threefry2x32")
    assert "extensions" not in manifest["training"]
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    assert all(np.isfinite(line["loss"]) for line in lines)
    assert lines[-1]["mse_by_log_snr"]
    assert (whole / "samples.png").stat().st_size > 0


@pytest.mark.long
def test_a_resumed_run_ends_with_the_same_bits(whole, images, tmp_path, monkeypatch):
    out = tmp_path / "run"
    step = training.standardize

    def stop(*args, calls=[]):  # noqa: B006
        calls.append(1)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return step(*args)

    monkeypatch.setattr(training, "standardize", stop)
    with pytest.raises(KeyboardInterrupt):
        train(images, MODEL, FAST, out, checkpoint_every=3, progress=False)
    monkeypatch.setattr(training, "standardize", step)
    train(images, MODEL, FAST, out, resume=True, checkpoint_every=3, progress=False)
    for (path, a), (other, b) in zip(weights(whole), weights(out), strict=True):
        assert path == other
        np.testing.assert_array_equal(a[...], b[...])


def test_other_settings_do_not_resume(whole, images):
    with pytest.raises(ValueError, match=r"training.learning_rate: 0.01 -> 0.02"):
        train(images, MODEL, replace(FAST, learning_rate=0.02), whole, resume=True, progress=False)
    with pytest.raises(ValueError, match="--resume"):
        train(images, MODEL, FAST, whole, progress=False)


def test_foreign_folders_and_misfits_are_refused(images, tmp_path):
    (tmp_path / "letter.txt").write_text("dear reader")
    with pytest.raises(ValueError, match="not empty"):
        train(images, MODEL, FAST, tmp_path, progress=False)
    with pytest.raises(ValueError, match="classes"):
        train(images, replace(MODEL, num_classes=3), FAST, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="images are"):
        train(images, replace(MODEL, input_size=16), FAST, tmp_path / "b", progress=False)
    assert not (tmp_path / "a").exists()


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("steps", (0, -1)),
        ("batch_size", (0, -4)),
        ("learning_rate", (0, -1, NAN, INF)),
        ("warmup_steps", (-1,)),
        ("decay_fraction", (0.0, 1.1, NAN)),
        ("weight_decay", (-1, NAN, INF)),
        ("beta2", (-0.1, 1, NAN)),
        ("clip_norm", (0, -1, NAN)),
        ("ema_decay", (-0.1, 1, NAN)),
        ("label_dropout", (1.0, -0.1, NAN)),
        ("weight_cap", (0, -1, NAN, INF)),
        ("seed", (-1, 2**32)),
    ],
)
def test_impossible_settings_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"^{name} must be"):
            TrainConfig(**{name: value})


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--learning-rate", "-1"], "learning_rate must be positive and finite, got -1.0"),
        (["--learning-rate", "nan"], "learning_rate must be positive and finite, got nan"),
        (["--size", "-4"], "--size must be at least 1, got -4"),
        (["--size", "7"], "patch"),
        (["--seed", "-1"], "seed must be a whole number from 0"),
        (["--checkpoint-every", "0"], "--checkpoint-every must be at least 1, got 0"),
        (["--depth", "0"], "depth must be a positive integer"),
        (["--dtype", "float64"], "set JAX_ENABLE_X64=1"),
        (["--dtype", "float99"], "float99"),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_read_or_made(options, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "no-images-here", "out", *options]) == 2
    assert said in (told := capsys.readouterr().err)
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_double_precision_is_not_trained_in_single(images, tmp_path):
    with pytest.raises(ValueError, match="JAX_ENABLE_X64=1"):
        train(images, replace(MODEL, dtype="float64"), FAST, tmp_path / "run", progress=False)
    for every in ({"checkpoint_every": 0}, {"log_every": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(every))} must be at least 1"):
            train(images, MODEL, FAST, tmp_path / "run", progress=False, **every)
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_training_that_diverges_stops_and_says_what_to_try(images, tmp_path):
    config = replace(FAST, learning_rate=1e30, steps=20)
    with pytest.raises(TrainingError, match=r"at step \d+: training stops, and the last good .*below 1e\+30"):
        train(images, MODEL, config, tmp_path / "run", checkpoint_every=1, log_every=1, progress=False)
    for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert not (tmp_path / "run" / "model").exists()


def state_of(config, model=MODEL):
    graph, params, constants = nnx.split(DiT(model, nnx.Rngs(0)), nnx.Param, ...)
    state = {"params": params, "ema": jax.tree.map(np.array, params), "opt": optimizer(config).init(params)}
    return {**state, "step": np.zeros((), np.int32)}, make_step(model, config, graph, constants, model.training_clock())


@pytest.mark.parametrize("model", [MODEL, FLOW], ids=["v", "velocity"])
def test_the_loss_falls(images, model):
    config = TrainConfig(steps=200, batch_size=12, warmup_steps=5, learning_rate=5e-3)
    state, step = state_of(config, model)
    x0 = training.standardize(images.pixels, images.mean, images.std)
    history = []
    for _ in range(60):
        state, metrics = step(state, x0, images.labels)
        history.append(float(metrics["mse"].mean()))
    assert np.mean(history[-10:]) < 0.6 * np.mean(history[:10])


def test_ema_follows_the_weights(images):
    state, step = state_of(FAST)
    x0 = training.standardize(images.pixels[:4], images.mean, images.std)
    before = jax.device_get(state["ema"]["final_layer"]["linear"]["kernel"][...])
    state, _ = step(state, x0, images.labels[:4])
    state, _ = step(state, x0, images.labels[:4])  # the first step has rate 0
    after = jax.device_get(state["ema"]["final_layer"]["linear"]["kernel"][...])
    now = jax.device_get(state["params"]["final_layer"]["linear"]["kernel"][...])
    decay = 3 / 12  # (1 + step) / (10 + step) at step 2, below the asymptotic decay
    np.testing.assert_allclose(after, before + (1 - decay) * (now - before), rtol=1e-4, atol=1e-7)


@pytest.mark.long
def test_dropped_labels_are_null(images):
    """With every label dropped, the update does not depend on the labels."""
    config = replace(FAST, label_dropout=0.999999)
    x0 = training.standardize(images.pixels[:4], images.mean, images.std)
    losses = []
    for labels in (np.zeros(4, np.int32), np.ones(4, np.int32)):
        state, step = state_of(config)
        losses.append(float(step(state, x0, labels)[1]["loss"]))
    assert losses[0] == losses[1]


def test_rate_warms_up_holds_and_decays_to_zero():
    config = TrainConfig(steps=100, warmup_steps=10, learning_rate=1e-3, decay_fraction=0.2)
    rate = [float(np.asarray(learning_rate(config)(step))) for step in range(101)]
    assert rate[0] == 0
    np.testing.assert_allclose(rate[10:81], 1e-3)
    assert np.all(np.diff(rate[:11]) > 0)
    assert np.all(np.diff(rate[80:]) < 0)
    np.testing.assert_allclose(rate[100], 0, atol=1e-12)


def rates(config):
    return np.array([float(np.asarray(learning_rate(config)(step))) for step in range(config.steps + 1)])


SHORT = TrainConfig(steps=100, warmup_steps=20, learning_rate=1e-3, decay_fraction=0.2)


@pytest.mark.parametrize("at", [0, 7, 20, 50, 80])
def test_a_run_made_longer_before_its_decay_has_the_rate_of_a_long_one(at):
    longer = replace(SHORT, steps=200, extensions=((at, 100),))
    np.testing.assert_array_equal(rates(longer), rates(replace(SHORT, steps=200)))


@pytest.mark.parametrize("extensions", [((81, 100),), ((90, 100),), ((100, 100),), ((100, 100), (130, 140))])
def test_the_rate_of_a_run_made_longer_has_no_jump(extensions):
    longer = replace(SHORT, steps=200, extensions=extensions)
    rate = rates(longer)
    first = extensions[0][0]
    np.testing.assert_allclose(rate[: first + 1], rates(SHORT)[: first + 1], rtol=1e-6)
    assert np.abs(np.diff(rate)).max() < 1.01e-3 / 20  # of the warm-up and of a decay over 20 steps
    assert rate[-1] == pytest.approx(0, abs=1e-12)
    assert rate[extensions[-1][0] + 1 :].max() == pytest.approx(1e-3)  # it is reached again


@pytest.mark.parametrize(("at", "steps"), [(90, 101), (100, 101), (100, 110), (100, 130)])
def test_a_run_made_a_little_longer_still_ends_at_zero(at, steps):
    rate = rates(replace(SHORT, steps=steps, extensions=((at, 100),)))
    assert rate[-1] == 0
    assert np.abs(np.diff(rate)).max() < 1.01e-3 / 20
    assert np.all(rate[1:-1] > 0) or at == 100  # which is the last step of the short run, where it was zero


def test_lengthening_a_run_keeps_the_rate_before_the_decay():
    short, long = (learning_rate(TrainConfig(steps=steps)) for steps in (4000, 6000))
    for step in (0, 100, 300, 2000, 3000):
        np.testing.assert_array_equal(short(step), long(step))


def test_an_epoch_visits_every_image_once():
    config = TrainConfig(batch_size=4, seed=1)
    epoch = np.concatenate([batch_indices(config, 12, step) for step in range(3)])
    np.testing.assert_array_equal(np.sort(epoch), np.arange(12))
    following = np.concatenate([batch_indices(config, 12, step) for step in range(3, 6)])
    assert np.any(epoch != following)
    assert batch_indices(config, 2, 0).shape == (4,)  # a set smaller than a batch repeats
