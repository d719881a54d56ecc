"""Flow matching: networks on SiT's paths, seen from the variance-preserving frame of everything else."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official import load, nhwc

from dit_jax.config import PREDICTIONS, ControlConfig, DiTConfig, config_from_dict
from dit_jax.diffusion import DenoiserOutput, ddim_step, network_denoiser, sample
from dit_jax.objective import add_noise, denoised_at, losses, network_input, target
from ou_theory.clock import make_clock, path_clock
from ou_theory.paths import PATHS

paths = pytest.mark.parametrize("name", PATHS)
TINY = {"input_size": 4, "in_channels": 2, "hidden_size": 8, "depth": 1, "num_heads": 1, "num_classes": 3}


def flow(name, **changes):
    return DiTConfig(**{**TINY, "prediction": "velocity", "path": name, "learn_sigma": False, **changes})


@paths
def test_states_and_targets_are_official(name, x64):
    refs = load("refs_paths")
    clock, step = path_clock(name, refs["loss_t"].astype(np.float64)), jnp.arange(3)
    data, noise = (jnp.asarray(nhwc(refs[key]), jnp.float64) for key in ("loss_x1", "loss_x0"))
    seen = network_input(add_noise(data, noise, step, clock), step, clock)
    np.testing.assert_allclose(seen, nhwc(refs[f"loss.{name}.xt"]), atol=1e-7)  # their times are float32
    found = target(data, noise, step, clock, "velocity")
    np.testing.assert_allclose(found, nhwc(refs[f"loss.{name}.ut"]), atol=1e-6)


@paths
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_true_target_gives_back_the_image_on_every_path(name, prediction, x64):
    clock = flow(name).training_clock()
    data, noise = jax.random.normal(jax.random.key(0), (2, 6, 4, 4, 2), jnp.float64)
    step = jnp.array([0, 1, 300, 700, 998, 999])
    state, truth = add_noise(data, noise, step, clock), target(data, noise, step, clock, prediction)
    np.testing.assert_allclose(denoised_at(clock, step, state, truth, prediction), data, atol=1e-9)
    np.testing.assert_allclose(losses(truth, data, noise, step, clock, prediction).mse, 0, atol=1e-20)


@paths
def test_the_loss_of_a_velocity_is_its_squared_error_and_that_of_a_score_in_units_of_noise(name, x64):
    clock, step = flow(name).training_clock(), jnp.array([3, 500, 990])
    data, noise, error = jax.random.normal(jax.random.key(1), (3, 3, 4, 4, 2), jnp.float64)
    velocity = target(data, noise, step, clock, "velocity")
    found = losses(velocity + error, data, noise, step, clock, "velocity").mse
    np.testing.assert_allclose(found, jnp.square(error).mean((1, 2, 3)), rtol=1e-9)
    sigma = PATHS[name].sigma(clock.timesteps)[step, None, None, None]
    found = losses((error - noise) / sigma, data, noise, step, clock, "score").mse
    np.testing.assert_allclose(found, jnp.square(error).mean((1, 2, 3)), rtol=1e-9)


def euler_error(name):
    """How far a DDIM step lies from the Euler step of the flow, at most, by sampler step."""
    clock, path = path_clock(name, 10), PATHS[name]
    update, times = ddim_step(clock), np.append(clock.timesteps, 1)
    state, velocity = np.random.default_rng(0).standard_normal((2, 10, 64))
    errors = []
    for k, (z, v) in enumerate(zip(state, velocity, strict=True)):
        step = jnp.asarray(k)
        found = update(step, z, DenoiserOutput(denoised_at(clock, step, jnp.asarray(z), v, "velocity")), None)
        euler = clock.scale[k] * z + (times[k + 1] - times[k]) * v
        errors.append(np.abs(path.scale(times[k + 1]) * found - euler).max())
    return np.array(errors)


def test_a_ddim_step_is_the_euler_step_of_the_flow_on_the_linear_path_alone(x64):
    """Data and noise are both straight lines in t there, so that a step may hold either the velocity or both."""
    assert euler_error("linear").max() < 1e-14
    assert euler_error("gvp").min() > 1e-3
    assert euler_error("vp").min() > 1e-3


class GaussianFlow:
    """A network that gives the exact velocity of Gaussian data: it sees the path's own state and time alone."""

    def __init__(self, config, variance):
        self.config, self.variance, self.path = config, variance, PATHS[config.path]

    def __call__(self, x, t, y, gate=None, **options):
        path, t = self.path, np.asarray(t)[:, None, None, None]  # not under jit, for the path is NumPy's
        alpha, sigma, (alpha_rate, sigma_rate) = path.alpha(t), path.sigma(t), path.rates(t)
        total = alpha**2 * self.variance + sigma**2
        return alpha_rate * alpha * self.variance / total * x + sigma_rate * sigma / total * x


@paths
def test_the_exact_flow_of_gaussian_data_denoises_as_wiener(name, x64):
    """Its output for the path's state becomes the Wiener filter of the variance-preserving one."""
    variance = np.geomspace(0.05, 20, 32).reshape(4, 4, 2)
    config = flow(name)
    clock = config.clock(9)
    denoise = network_denoiser(GaussianFlow(config, variance), clock)  # pyright: ignore
    state = jax.random.normal(jax.random.key(2), (3, 4, 4, 2), jnp.float64)
    for step, ab in enumerate(clock.alpha_bar):
        found = denoise(state, jnp.asarray(step), jnp.zeros(3, jnp.int32)).denoised
        gain = np.sqrt(ab) * variance / (ab * variance + 1 - ab)
        np.testing.assert_allclose(found, gain * state, rtol=1e-9)


def test_more_steps_lead_to_the_law_of_gaussian_data(x64):
    """The flow scales every mode by its standard deviation; the sampler's error falls as one over its steps."""
    variance = np.geomspace(0.2, 5, 32).reshape(4, 4, 2)
    noise, config = jax.random.normal(jax.random.key(3), (2, 4, 4, 2), jnp.float64), flow("linear")

    def error(steps):
        clock = config.clock(steps)

        def wiener(x, step, labels):
            ab = jnp.asarray(clock.alpha_bar)[step]
            return DenoiserOutput(jnp.sqrt(ab) * variance / (ab * variance + 1 - ab) * x)

        found = sample(wiener, noise, clock, jnp.zeros(2, jnp.int32))[0]
        return float(np.abs(found / (np.sqrt(variance) * noise) - 1).max())

    assert error(160) < 0.03
    assert 3 < error(40) / error(160) < 5


def test_the_clock_is_that_of_the_network_s_path():
    network = GaussianFlow(flow("linear"), 1.0)
    for clock, about in ((make_clock(10), "ddpm"), (path_clock("gvp", 10), "gvp")):
        with pytest.raises(ValueError, match=f"clock is of the path {about}, the network of linear"):
            network_denoiser(network, clock)  # pyright: ignore[reportArgumentType]


def test_configs_name_their_path_where_it_is_not_that_of_ddpm():
    assert "path" not in DiTConfig(**TINY).to_dict()  # folders and digests stay as they are
    assert "path" not in ControlConfig(architecture="mlp", hidden_size=8, depth=1).to_dict()
    control = ControlConfig(architecture="unet", hidden_size=8, depth=1, prediction="velocity", path="vp")
    for config in (flow("linear"), flow("gvp", prediction="v"), control):
        stored = json.loads(json.dumps(config.to_dict()))
        assert stored["path"] == config.path
        assert config_from_dict(stored) == config


def test_clocks_of_a_config():
    ddpm = DiTConfig(**TINY)
    np.testing.assert_array_equal(ddpm.clock("ddim50").timesteps, make_clock("ddim50").timesteps)
    np.testing.assert_array_equal(ddpm.training_clock().timesteps, np.arange(1000)[::-1])
    training = flow("linear").training_clock()
    np.testing.assert_allclose(training.timesteps, np.arange(0.0005, 1, 0.001), atol=1e-12)
    assert np.isfinite(training.log_snr).all()


@pytest.mark.parametrize(
    ("change", "about"),
    [
        ({"path": "ddpm"}, "needs a path of flow matching: one of linear, gvp, vp"),
        ({"path": "cosine"}, "path 'cosine' is not one of ddpm, linear, gvp, vp"),
    ],
)
def test_paths_that_do_not_fit_are_refused(change, about):
    with pytest.raises(ValueError, match=about):
        flow("linear", **change)


def test_a_schedule_has_no_velocity():
    x = jnp.ones((1, 4, 4, 2))
    for ask in (target, lambda *a: denoised_at(a[3], a[2], a[0], a[1], a[4])):
        with pytest.raises(ValueError, match="velocity is defined on a path"):
            ask(x, x, jnp.zeros(1, jnp.int32), make_clock(10), "velocity")
