"""The paths of flow matching against SiT's numbers, and their clocks."""

from pathlib import Path

import numpy as np
import pytest

from ou_theory.clock import alpha_bar_of_log_snr, log_snr, path_clock
from ou_theory.paths import PATHS

REFS = np.load(Path(__file__).parents[1] / "data" / "refs_paths.npz")  # SiT 947f95b, float64
paths = pytest.mark.parametrize("name", PATHS)


@paths
def test_weights_and_rates_are_official(name):
    path, t = PATHS[name], REFS["t"]
    for found, quantity in ((path.alpha(t), "alpha"), (path.sigma(t), "sigma")):
        np.testing.assert_allclose(found, REFS[f"{name}.{quantity}"], atol=1e-15)
    for found, quantity in zip(path.rates(t), ("d_alpha", "d_sigma"), strict=True):
        np.testing.assert_allclose(found, REFS[f"{name}.{quantity}"], rtol=1e-13, atol=1e-15)


@paths
def test_noise_from_a_velocity_is_official(name):
    """Theirs goes by alpha / alpha', ours by the denoised image. Ends apart, where theirs divides by zero."""
    path, inside = PATHS[name], slice(1, -1)
    t, x, v = REFS["t"][inside, None], REFS["x"][inside].astype(np.float64), REFS["v"][inside].astype(np.float64)
    from_state, from_velocity = path.denoising_weights(t)
    noise = (x - path.alpha(t) * (from_state * x + from_velocity * v)) / path.sigma(t)
    np.testing.assert_allclose(noise, REFS[f"{name}.noise_from_velocity"][inside], rtol=1e-9)
    np.testing.assert_allclose(-noise / path.sigma(t), REFS[f"{name}.score_from_velocity"][inside], rtol=1e-9)


@paths
def test_the_velocity_of_a_mixture_gives_back_the_data(name):
    """Also at the ends. There is no velocity at the end of the VP path, where the rate of sigma is infinite."""
    path = PATHS[name]
    t = np.array([0, 1e-9, 1e-3, 0.2, 0.5, 0.9, 1 - 1e-3, 1 - 1e-6, 1])[: -1 if name == "vp" else None, None]
    data, noise = np.random.default_rng(0).standard_normal((2, t.size, 50))
    alpha_rate, sigma_rate = path.rates(t)
    from_state, from_velocity = path.denoising_weights(t)
    state, velocity = path.alpha(t) * data + path.sigma(t) * noise, alpha_rate * data + sigma_rate * noise
    # at the start of the VP path the state holds less than a hundredth of the data
    np.testing.assert_allclose(from_state * state + from_velocity * velocity, data, atol=1e-12)


@paths
def test_time_is_the_inverse_of_log_snr(name):
    path, ell = PATHS[name], np.linspace(-9, 20, 59)
    np.testing.assert_allclose(path.log_snr(path.time(ell)), ell, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(path.time(path.log_snr(REFS["t"])), REFS["t"], atol=1e-15)
    np.testing.assert_allclose(log_snr(path.alpha_bar(path.time(ell))), ell, rtol=1e-6, atol=1e-12)


def test_signal_power_of_the_linear_path_is_logistic_in_log_snr():
    t = np.linspace(0.01, 0.99, 99)
    linear, gvp = PATHS["linear"], PATHS["gvp"]
    np.testing.assert_allclose(linear.log_snr(t), 2 * np.log(t / (1 - t)), atol=1e-13)
    np.testing.assert_allclose(linear.alpha_bar(t), alpha_bar_of_log_snr(linear.log_snr(t)), rtol=1e-13)
    np.testing.assert_allclose(gvp.scale(t), 1, rtol=1e-15)  # variance-preserving in itself
    assert linear.scale(0.5) == pytest.approx(np.sqrt(0.5))


@paths
def test_a_clock_is_uniform_in_time(name):
    clock, path = path_clock(name, "50"), PATHS[name]
    assert len(clock) == 50
    assert clock.timesteps[0] == path.first_time
    np.testing.assert_allclose(np.diff(clock.timesteps, append=1), (1 - path.first_time) / 50, rtol=1e-12)
    np.testing.assert_allclose(clock.log_snr, path.log_snr(clock.timesteps), rtol=1e-9)
    np.testing.assert_allclose(clock.scale * np.sqrt(clock.alpha_bar), path.alpha(clock.timesteps), rtol=1e-13)
    np.testing.assert_allclose(clock.scale * np.sqrt(1 - clock.alpha_bar), path.sigma(clock.timesteps), rtol=1e-12)


def test_a_clock_of_given_times_has_them():
    t = [0.1, 0.2, 0.7]
    np.testing.assert_array_equal(path_clock("gvp", t).timesteps, t)


@pytest.mark.parametrize("steps", ["ddim50", "10,20", "0", "-3", "fifty", 0])
def test_a_sampler_on_a_path_takes_a_number_of_steps(steps):
    with pytest.raises(ValueError, match="sampler on the linear path takes a number of steps"):
        path_clock("linear", steps)


@pytest.mark.parametrize("times", [[0.0, 0.5], [0.5, 1.0], [0.5, 0.2], []])
def test_times_without_a_log_snr_are_refused(times):
    with pytest.raises(ValueError, match="a clock"):
        path_clock("linear", times)


def test_unknown_paths_are_refused():
    with pytest.raises(ValueError, match="path 'ddpm' is not one of linear, gvp, vp"):
        path_clock("ddpm", 50)
