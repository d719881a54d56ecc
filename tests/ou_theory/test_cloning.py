"""Cloning, growth rates and single steps: docs/theory.md, sections 13.6 to 13.8."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp
from scipy.optimize import brentq

from ou_theory import cloning as cl
from ou_theory import recursion
from ou_theory.clock import make_clock
from ou_theory.cluster_laws import Clusters, sign_correlation
from ou_theory.gain_model import commitment_log_snr, effective_variance, power_law, q_ode, q_uncoupled, wiener_gain
from ou_theory.recursion import recursion_energy

LAW = settings(max_examples=25, deadline=None, derandomize=True)
positive = st.floats(0.05, 5)
correlation = jax.jit(sign_correlation)
clone_correlations = jax.jit(cl.clone_correlation)
levels = jax.jit(cl.kappa_level)


# --- clones of clusters


def cluster_law(m, s2):
    """Three modes, the first two clustered."""
    return Clusters(jnp.asarray(s2 * np.array([1.0, 0.6, 2.0])), jnp.asarray([[m, 0.5 * m, 0.0]]))


@LAW
@given(positive, positive, st.floats(-3, 3))
def test_no_law_commits_later_than_a_gaussian_of_its_variance(m, s2, log_sigma2):
    with jax.enable_x64(True):
        law = cluster_law(m, s2)
        sigma2 = 10 ** (log_sigma2 + np.array([0.0, 0.1]))
        got = np.asarray(clone_correlations(law, sigma2))
        gaussian = np.asarray(q_uncoupled(law.total_variance() / sigma2[:, None]))
    assert np.all(got >= gaussian - 1e-12)
    np.testing.assert_allclose(got[:, 2], gaussian[:, 2], rtol=1e-10)  # the last mode is Gaussian
    assert np.all(got[1] < got[0])  # falls with the noise
    assert np.all((got > 0) & (got < 1))


def test_clones_end_alike_by_sampling():
    """Posterior draws from the exact posterior, two for each state."""
    rng, count, m, s2, sigma2 = np.random.default_rng(0), 200_000, 1.3, 0.4, 1.1
    label = rng.choice([-1.0, 1.0], count)
    y = label * m + np.sqrt(s2 + sigma2) * rng.normal(size=count)
    gain, posterior = s2 / (s2 + sigma2), s2 * sigma2 / (s2 + sigma2)
    clones, labels = [], []
    for _ in range(2):
        drawn = np.where(rng.random(count) < 1 / (1 + np.exp(-2 * m * y / (s2 + sigma2))), 1.0, -1.0)
        clones.append(drawn * m + gain * (y - drawn * m) + np.sqrt(posterior) * rng.normal(size=count))
        labels.append(drawn)
    kappa = m**2 / (s2 + sigma2)
    assert (labels[0] == labels[1]).mean() == pytest.approx(float(cl.same_cluster_probability(kappa)), abs=0.005)
    law = Clusters(jnp.asarray([s2]), jnp.asarray([[m]]))
    assert np.corrcoef(*clones)[0, 1] == pytest.approx(float(cl.clone_correlation(law, sigma2)[0]), abs=0.01)


@pytest.mark.parametrize("kappa", [0.1, 0.85, 1.0, 4.0])
def test_probability_of_the_same_cluster_by_quadrature(x64, kappa):
    def same(h):
        plus, minus = (np.exp(-((h - c * kappa) ** 2) / (2 * kappa)) / np.sqrt(2 * np.pi * kappa) for c in (1, -1))
        return 0.5 * (plus**2 + minus**2) / (plus + minus)

    reach = kappa + 12 * kappa**0.5
    expected, _ = quad(same, -reach, reach, epsabs=1e-13, limit=200)
    assert float(cl.same_cluster_probability(kappa)) == pytest.approx(expected, rel=1e-9)


def test_references(x64):
    assert float(sign_correlation(jnp.asarray(1.0))) == pytest.approx(0.5504004908, rel=1e-9)
    assert float(cl.kappa_level()) == pytest.approx(0.8508444376, rel=1e-9)
    assert float(cl.same_cluster_probability(cl.kappa_level())) == pytest.approx(0.75, rel=1e-12)


@LAW
@given(st.floats(1e-6, 1 - 1e-6))
def test_level_inverts_the_correlation(q):
    with jax.enable_x64(True):
        got = float(levels(q))
        assert float(correlation(got)) == pytest.approx(q, rel=1e-10)
        expected = brentq(lambda k: float(correlation(k)) - q, 1e-9, 80, xtol=1e-14)
        assert got == pytest.approx(expected, rel=1e-6)


def test_level_at_its_ends_and_its_slopes(x64):
    np.testing.assert_array_equal(cl.kappa_level(np.array([0.0, 1.0])), [0, np.inf])
    assert np.isnan(float(levels(np.nan)))
    slopes = jax.jit(jax.vmap(jax.grad(cl.kappa_level)))(jnp.array([0.0, 0.5, 0.9, 1.0]))
    assert np.all(np.isfinite(slopes))
    for q, slope in ((0.5, slopes[1]), (0.9, slopes[2])):
        expected = (float(levels(q + 1e-5)) - float(levels(q - 1e-5))) / 2e-5
        assert float(slope) == pytest.approx(expected, rel=1e-7)
    for bad in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match="correlation"):
            cl.kappa_level(bad)


def test_cloning_time(x64):
    time = float(cl.cluster_cloning_time(2.0, 0.25, 0.5, 0.6, 0.7))
    kappa = 4 / (0.25 + 0.7 / 0.6 * np.expm1(1.2 * time))
    assert kappa == pytest.approx(0.8508444376, rel=1e-9)
    assert float(cl.cluster_cloning_time(1.0, 0.5, 0.9)) == 0  # the labels never correlate that much


def test_single_precision_is_close_to_double():
    q = np.array([0.01, 0.3, 0.5, 0.9, 0.99])
    with jax.enable_x64(True):
        double = np.asarray(levels(q)), np.asarray(cl.coupled_cloning_variance(2.0, 9.0, 0.3, q))
    got = levels(q), cl.coupled_cloning_variance(2.0, 9.0, 0.3, q)
    assert all(v.dtype == jnp.float32 for v in got)
    for a, b in zip(got, double, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4)


# --- coupled clones


@pytest.mark.parametrize("rho", [0.0, 0.3, 0.5, 0.5 + 1e-9, 0.8, 1.0])
def test_coupled_clones_by_the_moment_equation(x64, rho):
    s, x_branch, x_end = 2.0, 0.3, 9.0

    def moment(log_sigma, v):
        sigma2 = np.exp(2 * log_sigma)
        return 4 * (1 - rho * s / (s + sigma2)) * v - 2 * sigma2

    ends = [0.5 * np.log(s / x) for x in (x_branch, x_end)]
    expected = solve_ivp(moment, ends, [0.0], rtol=1e-11, atol=1e-13).y[0, -1]
    got = cl.coupled_cloning_variance(s, x_end, x_branch, rho)
    assert float(got) == pytest.approx(expected, rel=1e-8)
    assert np.isfinite(float(jax.grad(cl.coupled_cloning_variance, 3)(s, x_end, x_branch, rho)))


def test_coupled_clones_at_the_clean_end(x64):
    assert float(cl.coupled_cloning_variance(2.0, 1e12, 0.3, 1.0)) == pytest.approx(2 / 1.3, rel=1e-9)  # the posterior
    ends = np.asarray(cl.coupled_cloning_variance(2.0, 10.0 ** np.arange(2, 12), 0.3, 0.8))
    assert np.all(np.diff(ends) < 0)
    assert ends[-1] < 1e-3
    assert float(cl.coupled_cloning_variance(2.0, 0.3, 0.3, 0.8)) == 0  # at the branch
    scaled = cl.coupled_cloning_variance(6.0, 9.0, 0.3, 0.8)
    assert float(scaled) == pytest.approx(3 * float(cl.coupled_cloning_variance(2.0, 9.0, 0.3, 0.8)), rel=1e-14)


# --- growth rates


@LAW
@given(st.floats(0.01, 100), st.floats(0.02, 0.98))
def test_rates_of_a_gaussian_mode_are_slopes_of_its_flow(s, alpha_bar):
    """Under the flow the rescaled state is proportional to sqrt(S + sigma^2)."""
    with jax.enable_x64(True):
        sigma2, time = (1 - alpha_bar) / alpha_bar, -0.5 * np.log(alpha_bar)
        rescaled = jax.grad(lambda r: 0.5 * jnp.log(s + jnp.exp(-2 * r)))(-0.5 * np.log(sigma2))
        assert float(cl.rescaled_growth_flow(s, sigma2)) == pytest.approx(float(rescaled), rel=1e-9)
        assert float(cl.rescaled_growth_sde(s, sigma2)) == pytest.approx(2 * float(rescaled), rel=1e-9)

        def state(t):
            return 0.5 * jnp.log(s + jnp.expm1(2 * t)) - t

        def denoised(t):
            return state(t) + t + jnp.log(s / (s + jnp.expm1(2 * t)))

        assert float(cl.state_growth(s, alpha_bar)) == pytest.approx(-float(jax.grad(state)(time)), rel=1e-8, abs=1e-12)
        assert float(cl.denoised_growth(s, alpha_bar)) == pytest.approx(-float(jax.grad(denoised)(time)), rel=1e-8)


def test_signs_of_the_rates():
    s, alpha_bar = np.array([0.01, 0.5, 1.0, 2.0, 50.0])[:, None], np.linspace(0.01, 0.99, 21)
    np.testing.assert_array_equal(np.sign(cl.state_growth(s, alpha_bar)), np.sign(s - 1) * np.ones(21))
    assert np.all(cl.denoised_growth(s, alpha_bar) > 0)
    assert np.all(cl.rescaled_growth_flow(s, 1 / alpha_bar - 1) < 0)


@LAW
@given(positive, positive, positive)
def test_growth_at_the_undecided_point_changes_sign_at_speciation(m, s2, sigma2):
    with jax.enable_x64(True):
        law = Clusters(jnp.asarray([s2, s2]), jnp.asarray([[m, 0.4 * m]]))
        _, moved = jax.jvp(lambda y: y - law.posterior_mean(y, jnp.asarray(sigma2)), (jnp.zeros(2),), (law.centres[0],))
        rate = cl.cluster_growth(law.kappa(jnp.asarray(sigma2))[0], s2, sigma2)
        np.testing.assert_allclose(-moved, float(rate) * law.centres[0], rtol=1e-9, atol=1e-12)
        assert np.sign(rate) == np.sign(law.kappa(jnp.asarray(sigma2))[0] - 1)


@LAW
@given(st.floats(0.01, 100), st.floats(0, 0.99))
def test_rate_of_the_coupled_energy(x, rho):
    with jax.enable_x64(True):
        slope = jax.grad(lambda ell: jnp.log(q_ode(jnp.exp(ell), rho + 1e-3)))(np.log(x))
        got = float(cl.coupled_energy_growth(x, rho + 1e-3))
        assert got == pytest.approx(float(slope), rel=1e-8, abs=1e-10)
    assert float(cl.coupled_energy_growth(1 / (1 - rho), rho)) == pytest.approx(0, abs=1e-5)


# --- single steps


def test_steps_are_those_of_the_recursion(x64):
    sigma, gain, start = np.array([3.0, 1.2, 0.4]), np.array([0.4, 0.7, 0.9]), 10.0
    for step, eta in ((recursion.mode_ddim_step, 0.0), (recursion.mode_ancestral_step, 1.0)):
        variance, energies = start, []
        for k in range(3):
            energies.append(gain[k] ** 2 * variance)
            if k < 2:
                factor, noise = step(gain[k], sigma[k], sigma[k + 1])
                variance = float(factor**2 * variance + noise)
        expected = recursion_energy(gain[:, None], sigma, np.array([start]), eta)[:, 0]
        np.testing.assert_allclose(energies, expected, rtol=1e-13)


def test_shared_noise_says_nothing():
    """Two replicas of Gaussian data under the ancestral sampler with the same noise: what they predict differs by the
    same amount at every step. With noise of their own it does not."""
    rng, clock, s = np.random.default_rng(0), make_clock(50), 1.7
    start = rng.normal(size=2) * np.sqrt(s + clock.sigma[0] ** 2)
    for shared in (True, False):
        y, differences = start, []
        with jax.enable_x64(True):
            for sigma, after in zip(clock.sigma, [*clock.sigma[1:], 0.0], strict=True):
                gain = s / (s + sigma**2)
                differences.append(gain * (y[0] - y[1]))
                step = recursion.mode_ancestral_step(gain, sigma, after)
                noise = rng.normal(size=2)
                y = np.asarray(step.factor) * y + np.sqrt(np.asarray(step.noise)) * (noise[0] if shared else noise)
        assert np.allclose(differences, differences[0], rtol=1e-12) == shared


@pytest.mark.parametrize("num", [20, 50, 250, 1000])
@pytest.mark.parametrize(("eta", "low", "high"), [(0.0, 0.22, 0.92), (1.0, 0.38, 2.03)])
def test_discrete_samplers_are_early(x64, num, eta, low, high):
    bias = cl.half_energy_bias(make_clock(num), np.geomspace(0.01, 100, 25), eta)
    assert np.all((bias >= -2.1) & (bias < 0))
    assert np.all((-bias >= low) & (-bias <= high))


def test_bias_is_a_quarter_of_a_step_on_a_geometric_ladder(x64):
    sigma, s = np.geomspace(300, 0.003, 2001), 1.0
    gain = wiener_gain(s, sigma[:, None] ** 2)
    energy = np.asarray(recursion_energy(gain, sigma, np.array([s + sigma[0] ** 2])))[:, 0]
    step = np.interp(0.5, energy / energy[-1], np.arange(2001))
    assert step - np.interp(0, -np.log(sigma**2), np.arange(2001)) == pytest.approx(-0.25, abs=0.002)


def test_bias_needs_variances():
    with pytest.raises(ValueError, match="positive"):
        cl.half_energy_bias(make_clock(10), [1.0, 0.0])


# --- bands and spectra


@LAW
@given(st.lists(st.floats(1e-3, 1e3), min_size=5, max_size=5))
def test_bounds_of_the_effective_variance(variances):
    s = np.array(variances)
    low, high = s.mean(), (s**2).sum() / s.sum()
    assert low * (1 - 1e-12) <= effective_variance(variances) <= high * (1 + 1e-12)


def test_gaps_of_a_power_law(x64):
    exponents, clock = np.array([0.5, 1, 1.5, 2, 3, 4]), make_clock(250)
    ends = np.stack([power_law(100.0, a, 16)[np.array([0, -1])] for a in exponents])
    level = commitment_log_snr(ends)
    np.testing.assert_allclose(level[:, 1] - level[:, 0], exponents * np.log(16), rtol=1e-12)
    exact = np.diff(clock.step(np.asarray(level)), axis=1)[:, 0]
    rough = cl.power_law_step_gap(250, 100.0, exponents, 16)
    np.testing.assert_allclose(rough, exact, rtol=0.06)
    assert float(cl.power_law_step_gap(250, 100.0, 60.0, 16)) == pytest.approx(
        0.317 * 250 * np.log(101) ** 0.5, rel=2e-3
    )
