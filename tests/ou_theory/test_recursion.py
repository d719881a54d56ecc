"""Exact sampler recursions of a linear denoiser: docs/theory.md, section 5.3."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory.attention import rho as rho_of
from ou_theory.clock import make_clock
from ou_theory.estimator import commitment, gap, relative_energy
from ou_theory.gain_model import q_ode, q_sde, q_uncoupled, wiener_gain
from ou_theory.recursion import recursion_energy, recursion_statistics

LAW = settings(max_examples=25, deadline=None, derandomize=True)
COUPLINGS = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1])

energies = jax.jit(recursion_energy)


def coupled_energies(clock, variances, couplings=COUPLINGS, eta=0.0):
    """Energies (couplings, K, B) of the gain model, from the sampler's own start."""
    variances = jnp.asarray(variances, float)
    wiener = wiener_gain(variances, clock.sigma[:, None] ** 2)
    gain = rho_of(jnp.asarray(couplings, float))[:, None, None] * wiener
    return energies(gain, clock.sigma, variances + clock.sigma[0] ** 2, eta)


def by_hand(gain, sigma, start, eta):
    """One mode: the variance followed step by step, from the definition of a DDIM step."""
    variance, energy = start, []
    for k, s in enumerate(sigma):
        energy.append(gain[k] ** 2 * variance)
        after = sigma[k + 1] if k + 1 < len(sigma) else 0.0
        noise = eta**2 * after**2 * (1 - after**2 / s**2)
        variance = (gain[k] + (1 - gain[k]) * np.sqrt(after**2 - noise) / s) ** 2 * variance + noise
    return energy


@LAW
@given(st.integers(0, 2**32 - 1), st.floats(0, 1))
def test_recursion_follows_the_definition(seed, eta):
    rng = np.random.default_rng(seed)
    gain, sigma, start = rng.uniform(0, 1, (7, 2)), np.sort(rng.uniform(0.1, 9, 7))[::-1], rng.uniform(1, 80, 2)
    with jax.enable_x64(True):
        got = energies(gain, sigma.copy(), start, eta)
    for b in range(2):
        np.testing.assert_allclose(got[:, b], by_hand(gain[:, b], sigma, start[b], eta), rtol=1e-12)


def test_ancestral_step_is_the_posterior(x64):
    sigma, gain, start = np.array([3.0, 1.2]), np.array([[0.4], [0.7]]), np.array([10.0])
    q = 1.2**2 / 3.0**2
    after = (q + (1 - q) * 0.4) ** 2 * 10 + 1.2**2 * (1 - q)
    np.testing.assert_allclose(energies(gain, sigma, start, 1.0)[:, 0], [0.16 * 10, 0.49 * after], rtol=1e-13)


def test_simulated_pairs_have_these_energies():
    clock, rng = make_clock(20), np.random.default_rng(0)
    gain = 0.8 * 2.0 / (2.0 + clock.sigma**2)
    y = rng.standard_normal(40_000) * np.sqrt(2.0 + clock.sigma[0] ** 2)
    simulated = []
    for k, s in enumerate(clock.sigma):
        denoised = gain[k] * y
        simulated.append(denoised.var())
        after = clock.sigma[k + 1] if k + 1 < len(clock) else 0.0
        ratio = (after / s) ** 2
        y = ratio * y + (1 - ratio) * denoised + after * np.sqrt(1 - ratio) * rng.standard_normal(y.size)
    got = recursion_energy(gain[:, None], clock.sigma, np.array([2.0 + clock.sigma[0] ** 2]), 1.0)
    np.testing.assert_allclose(got[:, 0], simulated, rtol=5 * np.sqrt(2 / 40_000))


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_simulated_pairs_have_these_statistics_with_a_residual(eta):
    """A denoiser whose error is new at every step and grows with the state, by simulation."""
    clock, rng, count = make_clock(20), np.random.default_rng(0), 100_000
    gain, residual = 0.8 * 2.0 / (2.0 + clock.sigma**2), 0.1 / (1 + clock.sigma)
    y, denoised = rng.standard_normal(count) * np.sqrt(2.0 + clock.sigma[0] ** 2), []
    for k, s in enumerate(clock.sigma):
        denoised.append(gain[k] * y + np.sqrt(residual[k]) * y.std() * rng.standard_normal(count))
        after = clock.sigma[k + 1] if k + 1 < len(clock) else 0.0
        noise = eta * after * np.sqrt(1 - (after / s) ** 2)
        keep = np.sqrt(after**2 - noise**2) / s
        y = keep * y + (1 - keep) * denoised[-1] + noise * rng.standard_normal(count)
    start = np.array([2.0 + clock.sigma[0] ** 2])
    energy, inner = (
        np.asarray(v)[:, 0] for v in recursion_statistics(gain[:, None], clock.sigma, start, eta, residual[:, None])
    )
    error = np.sqrt(2 / count) * np.sqrt(energy * energy[-1])
    np.testing.assert_allclose([d.var() for d in denoised], energy, rtol=5 * np.sqrt(2 / count) + 0.005)
    np.testing.assert_array_less(np.abs([np.mean(d * denoised[-1]) for d in denoised] - inner), 6 * error)
    assert np.all(inner[:-1] ** 2 < 0.95 * energy[:-1] * energy[-1])  # the residual is not along the outcome


def ladder_error(num, eta, closed):
    """Largest deviation of the recursion from a closed form, on `num` levels in geometric progression."""
    sigma, variances = np.geomspace(150, 0.01, num), np.array([20.0, 1.0, 0.05])
    gain = rho_of(np.array([0, 0.05, 0.2, 1 / 3, 0.7]))[:, None, None]
    snr = variances / sigma[:, None] ** 2
    energy = energies(gain * q_uncoupled(snr), sigma, variances + sigma[0] ** 2, eta)
    return float(jnp.abs(energy / variances - closed(snr, gain, snr[0])).max())


@pytest.mark.parametrize(("eta", "closed", "other"), [(0.0, q_ode, q_sde), (1.0, q_sde, q_ode)])
def test_many_steps_tend_to_the_closed_forms(x64, eta, closed, other):
    error = ladder_error(1000, eta, closed)
    assert error < 0.01
    assert ladder_error(2000, eta, closed) == pytest.approx(error / 2, rel=0.05)
    assert ladder_error(1000, eta, other) > 0.05


@pytest.mark.parametrize("eta", [0.0, 0.3, 0.5, 1.0])
def test_every_sampler_keeps_the_uncoupled_marginals(x64, eta):
    sigma = np.geomspace(150, 0.01, 1000)
    expected = q_uncoupled(5 / sigma[:, None] ** 2)
    got = energies(expected, sigma, 5 + sigma[:1] ** 2, eta) / 5
    np.testing.assert_allclose(got, expected, atol=0.01)


def test_stochasticity_between_the_ends_gives_energies_between(x64):
    got = [coupled_energies(make_clock(250), [5.0], [0.2], eta)[0, :, 0] for eta in (0.0, 0.5, 0.8, 1.0)]
    peaks = [float(e.max()) for e in got]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[0] - peaks[-1] > 0.01 * peaks[0]


@LAW
@given(st.floats(-8, 8), st.floats(0, 1))
def test_energies_scale_with_the_square_of_the_frame(log_scale, eta):
    scale, clock = np.exp(log_scale), make_clock(10)
    with jax.enable_x64(True):
        gain = wiener_gain(2.0, clock.sigma[:, None] ** 2)
        plain = energies(gain, clock.sigma, np.array([3.0]), eta)
        scaled = energies(gain, scale * clock.sigma, scale**2 * np.array([3.0]), eta)
        np.testing.assert_allclose(scaled, scale**2 * plain, rtol=1e-11)


def test_leading_axes_broadcast():
    clock = make_clock(10)
    gain = np.random.default_rng(0).uniform(0, 1, (2, 3, 10, 4)).astype(np.float32)
    got = recursion_energy(gain, clock.sigma, np.ones(4))
    assert got.shape == (2, 3, 10, 4)
    np.testing.assert_allclose(got[1, 2], recursion_energy(gain[1, 2], clock.sigma, np.ones(4)), rtol=1e-6)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_single_precision_is_close_to_double(eta):
    clock, variances = make_clock(250), np.array([20.0, 0.05])
    with jax.enable_x64(True):
        double = np.asarray(coupled_energies(clock, variances, eta=eta))
    single = coupled_energies(clock, variances, eta=eta)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, rtol=1e-4, atol=1e-12)


def test_gradients_in_the_gain_are_finite():
    clock = make_clock(10)
    gain = jnp.asarray(wiener_gain(2.0, clock.sigma[:, None] ** 2), jnp.float32).at[0].set(0)
    for eta in (0.0, 1.0):
        grad = jax.grad(lambda g, eta=eta: recursion_energy(g, clock.sigma, jnp.ones(1), eta).sum())(gain)
        assert np.all(np.isfinite(grad))


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_gradients_in_the_levels(x64, eta):
    sigma = jnp.asarray(make_clock(6).sigma)

    def total(sigma):
        return recursion_energy(q_uncoupled(2 / sigma[:, None] ** 2), sigma, jnp.ones(1), eta).sum()

    grad = jax.grad(total)(sigma)
    for k in (0, 3, 5):  # the last level too, whose next one is 0
        h = 1e-6 * sigma[k]
        slope = (total(sigma.at[k].add(h)) - total(sigma.at[k].add(-h))) / (2 * h)
        np.testing.assert_allclose(grad[k], slope, rtol=1e-6, atol=1e-9)


# --- the recursion through the estimator: tables of docs/theory.md, section 7


def latched_step_gaps(clock, variances, eta):
    """Latched gap of two bands in uncoupled sampler steps, per coupling."""
    energy = coupled_energies(clock, variances, eta=eta)
    latched = commitment(relative_energy(energy, energy[0, -1]), clock.log_snr).latched
    steps = clock.step(latched[0])
    gaps = gap(latched, 0, 1)
    return (steps[1] - steps[0]) * gaps / gaps[0]


@pytest.mark.parametrize(
    ("num", "variances", "eta", "expected"),
    [
        (50, [20, 0.05], 0.0, [23.15, 19.85, 17.42, 12.72, 8.52, 4.29, 2.33, 0.74, 0.18, 0.01, 0]),
        (50, [20, 0.05], 1.0, [22.60, 18.21, 15.59, 11.09, 6.89, 3.31, 1.84, 0.53, 0.13, 0.01, 0]),
        (50, [100, 0.03], 0.0, [30.05, 25.94, 22.95, 16.80, 11.09, 5.79, 3.18, 0.95, 0.23, 0.02, 0]),
        (250, [20, 0.05], 0.0, [119.3, 103.5, 92.5, 69.8, 47.3, 24.6, 13.6, 4.23, 1.04, 0.08, 0]),
        (250, [20, 0.05], 1.0, [118.2, 98.2, 86.0, 63.2, 42.3, 22.0, 12.3, 3.86, 0.96, 0.08, 0]),
    ],
)
def test_table_of_latched_gaps(x64, num, variances, eta, expected):
    digits = 0.015 if num == 50 else np.where(np.array(expected) < 10, 0.015, 0.055)  # to the printed precision
    got = latched_step_gaps(make_clock(num), variances, eta)
    assert np.all(np.abs(got - np.array(expected)) < digits)


def test_latched_gap_reference(x64):
    energy = coupled_energies(make_clock(50), [20, 0.05], [0, 0.05])
    latched = commitment(relative_energy(energy, energy[0, -1]), make_clock(50).log_snr).latched
    assert float(gap(latched, 0, 1)[1]) == pytest.approx(3.093521517, rel=1e-9)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_latched_gap_falls_with_the_coupling(x64, eta):
    gaps = latched_step_gaps(make_clock(50), [20, 0.05], eta)
    assert np.all(np.diff(gaps) < 0)
    assert gaps[-1] == pytest.approx(0, abs=1e-12)


def test_commitment_gap_does_not_close_under_one_gain_for_all_bands(x64):
    clock = make_clock(1000)
    energy = coupled_energies(clock, [5.0, 0.5], [0, 0.05, 0.3, 0.8])
    found = commitment(relative_energy(energy, energy[0, -1]), clock.log_snr)
    np.testing.assert_allclose(gap(found.level, 0, 1), np.log(10), rtol=0.02)
    np.testing.assert_allclose(found.decided[:, 0], found.decided[:, 1], rtol=0.02)
    assert np.all(np.diff(found.decided[:, 0]) < 0)


def test_gains_of_their_own_for_the_bands_move_them_by_two_nats_at_most(x64):
    """Constant along the trajectory: small in the low band they widen the gap, in the high band they narrow it."""
    clock, variances = make_clock("1000"), jnp.array([20.0, 0.05])
    wiener = wiener_gain(variances, jnp.asarray(clock.sigma)[:, None] ** 2)
    start = variances + clock.sigma[0] ** 2
    uncoupled = recursion_energy(wiener, jnp.asarray(clock.sigma), start)

    def gap(*gains):
        energy = recursion_energy(jnp.array(gains) * wiener, jnp.asarray(clock.sigma), start)
        level = commitment(relative_energy(energy, uncoupled[-1]), clock.log_snr).level
        return float(level[1] - level[0])

    plain = gap(1.0, 1.0)
    assert 1.8 < gap(0.02, 1.0) - plain < 2.05
    assert -2.05 < gap(1.0, 0.02) - plain < -1.8
    assert abs(gap(0.02, 0.02) - plain) < 0.1
