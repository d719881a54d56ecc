"""Guidance and samplers against the official numbers, and the laws of a sampling loop."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official import load, nhwc, recorded_sinusoids, tiny_model

import dit_jax.model as model_module
from dit_jax.diffusion import DenoiserOutput, ancestral_step, ddim_step, guide, guided_output, network_denoiser, sample
from dit_jax.objective import posterior_tables
from ou_theory.clock import make_clock

TRAJECTORIES = {"ddpm10": ("10", "ancestral"), "ddim10": ("ddim10", "ddim")}


def close(found, expected, tolerance):
    """Within `tolerance` of the largest expected value."""
    np.testing.assert_allclose(found, expected, atol=tolerance * np.abs(expected).max(), rtol=0)


@pytest.fixture(scope="module")
def refs():
    return load("refs_tiny")


@pytest.fixture(scope="module")
def trajectories():
    return load("refs_traj_tiny")


@pytest.fixture(scope="module")
def model():
    return tiny_model()


# --- guidance


def guided(model, refs, scale, channels):
    x, t, y = nhwc(refs["cfg_x"]), refs["cfg_t"], refs["cfg_y"]
    half = len(x) // 2
    run = jax.jit(partial(guided_output, scale=scale, channels=channels))
    return run(model, jnp.asarray(x[:half]), t[:half], y[:half])


@pytest.mark.parametrize("scale", ["4", "1", "1.5"])
def test_official_guidance_touches_three_channels(model, refs, scale):
    expected = nhwc(refs[f"cfg_out_s{scale}_f32"])
    close(guided(model, refs, float(scale), "official"), expected[: len(expected) // 2], 5e-5)


def test_guiding_all_channels_is_another_function(model, refs):
    every = guided(model, refs, 4.0, "all")
    wrong = nhwc(refs["cfg_out_s4_ALL4CH_wrong_f32"])[: len(every)]
    close(every, wrong, 5e-5)
    official = nhwc(refs["cfg_out_s4_f32"])[: len(every)]
    np.testing.assert_array_less(1e-3, np.abs(every - official)[..., 3].max())
    close(every[..., :3], official[..., :3], 5e-5)


def test_guidance_of_one_is_the_conditional_output():
    conditional, null = jax.random.normal(jax.random.key(0), (2, 3, 4, 4, 8))
    np.testing.assert_allclose(guide(conditional, null, 1.0, 4), conditional, atol=1e-6)
    np.testing.assert_array_equal(guide(conditional, null, 3.0, 4)[..., 4:], conditional[..., 4:])


def test_guided_replicas_equal_guided_runs_when_uncoupled(model, refs):
    x = jnp.asarray(nhwc(refs["x"]))[:4].reshape(2, 2, 8, 8, 4)
    t, y = jnp.array([500, 500]), jnp.array([1, 2])
    run = jax.jit(partial(guided_output, scale=3.0))
    pair = run(model, x, t, y, jnp.broadcast_to(jnp.eye(2), (2, 2, 2)))
    for replica in range(2):
        close(pair[replica], np.asarray(run(model, x[replica], t, y)), 2e-6)


# --- trajectories


def replay(model, recorded, name, dtype):
    spec, sampler = TRAJECTORIES[name]
    clock = make_clock(spec)
    np.testing.assert_array_equal(clock.timesteps, recorded[f"{name}_model_t"])
    noises = jnp.asarray(nhwc(recorded[f"{name}_noises"]), dtype)
    start = jnp.asarray(nhwc(recorded[f"{name}_xT"]), dtype)

    @jax.jit
    def run(model):
        return sample(
            network_denoiser(model, clock),
            start,
            clock,
            jnp.asarray(recorded[f"{name}_y"]),
            sampler=sampler,
            noise=lambda step: noises[step],
            observe=lambda step, x, denoised: (x, denoised),
        )

    out, (states, denoised) = run(model)
    return np.concatenate([states[1:], out[None]]), np.asarray(denoised)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_official_trajectories_in_float64(trajectories, monkeypatch, x64, name):
    """5e-8: what is left is the last place of the official float32 sinusoids, which are not recorded at these steps.

    Sinusoids one unit off in the last place at t = 500 already cost 2e-6, so the agreement is not luck.
    """
    table = recorded_sinusoids()
    monkeypatch.setattr(model_module, "timestep_features", lambda t, dtype, _: jnp.asarray(table, dtype)[t])
    states, denoised = replay(tiny_model("float64"), trajectories, name, jnp.float64)
    close(states, nhwc(trajectories[f"{name}_samples_f64c"]), 5e-8)
    close(denoised, nhwc(trajectories[f"{name}_pred_xstart_f64c"]), 5e-8)


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_official_trajectories_in_float32(model, trajectories, name):
    """2e-4 of the largest value: ten steps of float32 on a network whose samples grow to hundreds."""
    states, denoised = replay(model, trajectories, name, jnp.float32)
    close(states, nhwc(trajectories[f"{name}_samples_f32"]), 2e-4)
    close(denoised, nhwc(trajectories[f"{name}_pred_xstart_f32"]), 2e-4)


def test_ddim_updates_from_the_recorded_predictions(trajectories, x64):
    """The update alone, fed with official predictions: the network's rounding drops out, 1e-9 and better."""
    clock = make_clock("ddim10")
    states = np.concatenate([trajectories["ddim10_xT"][None], trajectories["ddim10_samples_f64c"]]).astype(np.float64)
    update = ddim_step(clock)
    for step in range(len(clock)):
        prediction = DenoiserOutput(jnp.asarray(trajectories["ddim10_pred_xstart_f64c"][step]))
        after = update(step, jnp.asarray(states[step]), prediction, None)
        close(after, states[step + 1], 1e-11)


def test_ancestral_updates_from_the_recorded_predictions(trajectories, x64):
    """The last official step adds no noise; in the others the learned variance lies between its two bounds."""
    clock = make_clock("10")
    states = np.concatenate([trajectories["ddpm10_xT"][None], trajectories["ddpm10_samples_f64c"]]).astype(np.float64)
    noises = trajectories["ddpm10_noises"].astype(np.float64)
    weight_x0, weight_x, low, high = posterior_tables(clock)
    for step in range(len(clock)):
        mean = weight_x0[step] * trajectories["ddpm10_pred_xstart_f64c"][step] + weight_x[step] * states[step]
        noise = states[step + 1] - mean
        if step == len(clock) - 1:
            close(mean, states[step + 1], 1e-11)
            continue
        # where the learned variance stands between its bounds follows from the noise that was drawn
        large = np.abs(noises[step]) > 0.3
        log_variance = 2 * np.log(np.abs(noise[large] / noises[step][large]))
        fraction = (log_variance - low[step]) / (high[step] - low[step])
        assert np.all(np.sign(noise[large]) == np.sign(noises[step][large]))
        update = ancestral_step(clock)
        full = np.zeros_like(noise)
        full[large] = fraction
        after = update(
            step,
            jnp.asarray(states[step]),
            DenoiserOutput(jnp.asarray(trajectories["ddpm10_pred_xstart_f64c"][step]), jnp.asarray(full)),
            jnp.asarray(noises[step]),
        )
        close(np.asarray(after)[large], states[step + 1][large], 1e-10)


def test_posterior_variance_tables_are_official():
    refs = load("refs_diffusion")
    for spec in ("250", "50", "10", "ddim50", "ddim10", "10_20"):
        clock = make_clock(spec.replace("_", ","))
        _, _, low, _ = posterior_tables(clock)
        np.testing.assert_allclose(low[::-1], refs[f"plvc_{spec}"], rtol=1e-12)


@pytest.mark.parametrize(("dtype", "tag", "tolerance"), [("float32", "f32", 5e-5), ("float64", "f64c", 5e-7)])
def test_official_mean_and_variance(monkeypatch, dtype, tag, tolerance):
    """Mean, variance and prediction of single steps of the respaced clock, at the recorded noisy inputs."""
    refs = load("refs_diffusion")
    clock = make_clock("10")
    with jax.enable_x64(dtype == "float64"):
        if dtype == "float64":
            table = recorded_sinusoids()
            monkeypatch.setattr(model_module, "timestep_features", lambda t, dtype, _: jnp.asarray(table, dtype)[t])
        model = tiny_model(dtype)
        x = jnp.asarray(nhwc(refs["q_sample_f32"]), dtype)
        weight_x0, weight_x, low, high = posterior_tables(clock)
        run = jax.jit(lambda model, x, step, y: network_denoiser(model, clock)(x, step, y))
        for i, index in enumerate(refs["pmv10_t"]):
            step = len(clock) - 1 - int(index)  # theirs counts towards noise
            found = run(model, x[i : i + 1], step, jnp.asarray(refs["q_y"][i : i + 1]))
            mean = weight_x0[step] * found.denoised + weight_x[step] * x[i : i + 1]
            log_variance = found.fraction * high[step] + (1 - found.fraction) * low[step]
            named = {"pred_xstart": found.denoised, "mean": mean, "log_variance": log_variance}
            named["variance"] = jnp.exp(log_variance)
            for name, value in named.items():
                close(value[0], nhwc(refs[f"pmv10_{name}_{tag}"][i]), tolerance)


# --- laws of the loop

CLOCK = make_clock(12)
LABELS = jnp.zeros(64, jnp.int32)
VARIANCE = 0.7


def linear(x, step, labels):
    """Exact denoiser of a centred Gaussian of variance `VARIANCE`."""
    ab = jnp.asarray(CLOCK.alpha_bar, x.dtype)[step]
    return DenoiserOutput(jnp.sqrt(ab) * VARIANCE / (ab * VARIANCE + 1 - ab) * x)


def draws(seed=0):
    key = jax.random.key(seed)
    return lambda step: jax.random.normal(jax.random.fold_in(key, step), (64, 8))


def test_eta_one_is_the_ancestral_sampler_without_learned_variance():
    """Different formulas for one posterior; the ancestral one is noise-free in its last step, and so is DDIM there."""
    x = jax.random.normal(jax.random.key(1), (64, 8))
    ddim, _ = sample(linear, x, CLOCK, LABELS, eta=1.0, noise=draws())
    ancestral, _ = sample(linear, x, CLOCK, LABELS, sampler="ancestral", noise=draws())
    np.testing.assert_allclose(ddim, ancestral, atol=2e-5)


def test_a_perfect_denoiser_is_returned_by_the_last_step():
    clean = jax.random.normal(jax.random.key(2), (64, 8))
    for options in ({}, {"eta": 0.5, "noise": draws()}, {"sampler": "ancestral", "noise": draws()}):
        out, _ = sample(lambda x, step, labels: DenoiserOutput(clean), jnp.zeros((64, 8)), CLOCK, LABELS, **options)
        np.testing.assert_allclose(out, clean, atol=1e-5)


def test_ddim_needs_no_noise_and_stochastic_samplers_do():
    x = jnp.ones((64, 8))
    sample(linear, x, CLOCK, LABELS)
    for options in ({"eta": 0.1}, {"sampler": "ancestral"}):
        with pytest.raises(ValueError, match="noise"):
            sample(linear, x, CLOCK, LABELS, **options)
    with pytest.raises(ValueError, match="euler"):
        sample(linear, x, CLOCK, LABELS, sampler="euler")  # pyright: ignore[reportArgumentType]


def test_noise_of_the_last_step_is_not_used():
    last = len(CLOCK) - 1
    quiet = draws()
    loud = lambda step: quiet(step) + 1e3 * (step == last)  # noqa: E731
    for options in ({"eta": 1.0}, {"sampler": "ancestral"}):
        a, _ = sample(linear, jnp.ones((64, 8)), CLOCK, LABELS, noise=quiet, **options)
        b, _ = sample(linear, jnp.ones((64, 8)), CLOCK, LABELS, noise=loud, **options)
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_noise_enters_every_other_step():
    quiet = draws()
    for step in range(len(CLOCK) - 1):
        moved = lambda k, at=step: quiet(k) + (k == at)  # noqa: E731
        for options in ({"eta": 1.0}, {"sampler": "ancestral"}):
            a, _ = sample(linear, jnp.ones((64, 8)), CLOCK, LABELS, noise=quiet, **options)
            b, _ = sample(linear, jnp.ones((64, 8)), CLOCK, LABELS, noise=moved, **options)
            assert np.abs(a - b).max() > 1e-4


def test_the_observer_sees_what_the_denoiser_saw():
    x = jax.random.normal(jax.random.key(3), (64, 8))
    out, (steps, states, denoised) = sample(linear, x, CLOCK, LABELS, observe=lambda *seen: seen)
    np.testing.assert_array_equal(steps, np.arange(len(CLOCK)))
    np.testing.assert_array_equal(states[0], x)
    for k in (0, 5, 11):
        np.testing.assert_allclose(denoised[k], linear(states[k], k, LABELS).denoised, rtol=1e-6)
    np.testing.assert_allclose(out, denoised[-1], atol=1e-6)


def test_clipping_bounds_every_prediction():
    x = 5 * jax.random.normal(jax.random.key(4), (64, 8))
    _, free = sample(linear, x, CLOCK, LABELS, observe=lambda k, x, d: d)
    out, clipped = sample(linear, x, CLOCK, LABELS, clip=1.0, observe=lambda k, x, d: d)
    assert np.abs(free).max() > 1
    assert np.abs(clipped).max() <= 1
    np.testing.assert_allclose(out, clipped[-1], atol=1e-6)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_denoiser_inverts_every_kind_of_prediction(prediction):
    from dit_jax.config import DiTConfig
    from dit_jax.objective import add_noise, target

    config = DiTConfig(
        input_size=4,
        in_channels=2,
        hidden_size=8,
        depth=1,
        num_heads=1,
        num_classes=3,
        prediction=prediction,
        learn_sigma=False,
    )
    x0, noise = jax.random.normal(jax.random.key(5), (2, 3, 4, 4, 2))

    class Oracle:
        def __init__(self, answer):
            self.config, self.answer = config, answer

        def __call__(self, x, t, y, gate=None, **options):
            return self.answer

    for step in (0, 6, len(CLOCK) - 1):
        steps = jnp.full(3, step)
        x = add_noise(x0, noise, steps, CLOCK)
        oracle = Oracle(target(x0, noise, steps, CLOCK, config.prediction))
        found = network_denoiser(oracle, CLOCK)(x, jnp.asarray(step), jnp.zeros(3, jnp.int32))  # pyright: ignore
        scale = 1 + 1e-2 * CLOCK.sigma[step] if prediction == "epsilon" else 1
        np.testing.assert_allclose(found.denoised, x0, atol=2e-5 * scale * 10)
