"""The training loss against the official numbers, and its targets."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official import load, nhwc, recorded_sinusoids, tiny_model

import dit_jax.model as model_module
from dit_jax.config import PREDICTIONS
from dit_jax.objective import add_noise, denoised_at, losses, target
from ou_theory.clock import make_clock

CLOCK = make_clock(1000)


@pytest.fixture(scope="module")
def refs():
    return load("refs_diffusion")


def steps(refs):  # theirs counts towards noise
    return jnp.asarray(len(CLOCK) - 1 - refs["q_t"])


def test_noising_is_official(refs, x64):
    x0, noise = (jnp.asarray(nhwc(refs[name]), jnp.float64) for name in ("q_x0", "q_noise"))
    np.testing.assert_allclose(add_noise(x0, noise, steps(refs), CLOCK), nhwc(refs["q_sample_f64c"]), atol=1e-12)


@pytest.mark.parametrize(("dtype", "tag", "tolerance"), [("float32", "f32", 1e-4), ("float64", "f64c", 1e-6)])
def test_losses_are_official(refs, monkeypatch, dtype, tag, tolerance):
    """Squared error and bound in bits, the discretised likelihood at t = 0 included, on the recorded model."""
    with jax.enable_x64(dtype == "float64"):
        if dtype == "float64":
            table = recorded_sinusoids()
            monkeypatch.setattr(model_module, "timestep_features", lambda t, dtype, _: jnp.asarray(table, dtype)[t])
        model = tiny_model(dtype)
        x0, noise = (jnp.asarray(nhwc(refs[name]), dtype) for name in ("q_x0", "q_noise"))
        step = steps(refs)

        @jax.jit
        def run(model):
            x = add_noise(x0, noise, step, CLOCK)
            out = model(x, jnp.asarray(refs["q_t"]), jnp.asarray(refs["q_y"]))
            return losses(out, x0, noise, step, CLOCK, "epsilon")

        found = run(model)
    for name in ("mse", "vb"):
        np.testing.assert_allclose(getattr(found, name), refs[f"loss_mse_{name}_{tag}"], rtol=tolerance)


@pytest.mark.parametrize("prediction", [kind for kind in PREDICTIONS if kind != "velocity"])
def test_the_true_target_gives_back_the_image(prediction, x64):
    x0, noise = jax.random.normal(jax.random.key(0), (2, 6, 4, 4, 2), jnp.float64)
    step = jnp.array([0, 1, 300, 700, 998, 999])
    x = add_noise(x0, noise, step, CLOCK)
    truth = target(x0, noise, step, CLOCK, prediction)
    np.testing.assert_allclose(denoised_at(CLOCK, step, x, truth, prediction), x0, atol=1e-10)
    np.testing.assert_allclose(losses(truth, x0, noise, step, CLOCK, prediction).mse, 0, atol=1e-20)


def test_the_bound_trains_the_variance_only():
    x0, noise = jax.random.normal(jax.random.key(1), (2, 4, 4, 4, 2))
    out = jax.random.normal(jax.random.key(2), (4, 4, 4, 4))
    step = jnp.array([0, 300, 700, 999])
    slope = jax.grad(lambda out: losses(out, x0, noise, step, CLOCK, "epsilon").vb.sum())(out)
    assert np.abs(slope[..., :2]).max() == 0
    assert np.all(np.abs(slope[..., 2:]).max((1, 2, 3)) > 0)


def test_the_bound_is_smallest_at_the_posterior_variance_for_a_perfect_mean(x64):
    """With the true noise predicted, the divergence vanishes at fraction 0, that is at output -1, and nowhere else."""
    x0, noise = jax.random.normal(jax.random.key(3), (2, 3, 4, 4, 2), jnp.float64)
    step = jnp.array([900, 990, 998])

    def bound(v):
        out = jnp.concatenate([noise, jnp.full_like(noise, v)], -1)
        return losses(out, x0, noise, step, CLOCK, "epsilon").vb

    np.testing.assert_allclose(bound(-1.0), 0, atol=1e-12)
    assert np.all(bound(1.0) > 1e-6)
    assert np.all(bound(-3.0) > 1e-6)


def test_without_learned_variance_there_is_no_bound():
    x0, noise = jax.random.normal(jax.random.key(4), (2, 3, 4, 4, 2))
    found = losses(noise, x0, noise, jnp.array([1, 2, 3]), CLOCK, "epsilon")
    np.testing.assert_array_equal(found.vb, 0)
