"""Theory against simulation with exact scores: transition law, commitment, cloning, speciation, collapse.

Every comparison states its standard error and allows 5 of them.
"""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import brentq

from ou_theory import cloning, cluster_laws, gain_model, speciation
from ou_theory import ensembles as en
from ou_theory import mixture as mx
from ou_theory import process as ou
from ou_theory.collapse import collapse_time_isotropic, condensation, mode_information, pair_collapse_times
from ou_theory.estimator import commitment, relative_energy
from ou_theory.gain_model import q_uncoupled

pytestmark = pytest.mark.long

PATHS = 8000


def within_errors(got, expected, errors=5.0, least=0.0):
    """Means over the leading axis, within so many standard errors."""
    got = np.asarray(got, np.float64)
    error = np.maximum(got.std(0), least) / len(got) ** 0.5
    off = np.abs(got.mean(0) - np.asarray(expected)) / error
    assert np.all(off <= errors), off


@pytest.fixture(scope="module")
def by_diffrax(stock_compiler):
    """Paths of the forward process by an independent solver."""

    def solve(process, x, key):
        noise = diffrax.VirtualBrownianTree(0.0, 0.8, 0.002, (2,), key, diffrax.SpaceTimeLevyArea)
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda t, x, _: -process.drift @ x),
            diffrax.ControlTerm(lambda t, x, _: jnp.eye(2) * jnp.sqrt(2 * process.noise), noise),
        )
        return diffrax.diffeqsolve(terms, diffrax.SRA1(), 0.0, 0.8, 0.02, x).ys[0]

    return jax.jit(jax.vmap(solve, (None, 0, 0)), compiler_options=stock_compiler)


@pytest.mark.slow
@pytest.mark.parametrize("drift", [[[1.3, -0.5], [-0.2, 0.8]], [[0.3, -2.0], [2.0, 0.4]]],
                         ids=["anisotropic", "rotating"])  # fmt: skip
def test_forward_law_by_an_independent_solver(by_diffrax, drift):
    """Means, covariances and the covariance with the start."""
    process = ou.Process(jnp.asarray(drift), jnp.asarray(0.7))

    start = jax.random.normal(jax.random.key(1), (4000, 2)) + jnp.array([1.0, -2.0])
    x = np.asarray(by_diffrax(process, start, jax.random.split(jax.random.key(2), 4000)), np.float64)
    law = ou.transition(process, 0.8)
    moved = np.asarray(start, np.float64) @ np.asarray(law.factor).T
    within_errors(x - moved, 0.0)
    within_errors((x - moved)[:, :, None] * (x - moved)[:, None], law.covariance)
    within_errors((x - moved)[:, :, None] * np.asarray(start)[:, None], 0.0)


# --- commitment

VARIANCES = np.array([20.0, 2.0, 0.3, 0.05])
LEVELS = np.geomspace(1000.0, 1e-4, 61)  # noise variances


@partial(jax.jit, static_argnums=0)
def denoised_pairs(make):
    """Denoised states (2, PATHS, 60, 4) of replicas of a Gaussian spectrum from independent starts."""
    law = cluster_laws.Clusters(jnp.asarray(VARIANCES, jnp.float32), jnp.zeros((0, 4)))
    levels, step = en.noise_steps(LEVELS), make(law)
    start = en.noised_clusters(law, LEVELS[0], 0, jnp.arange(2 * PATHS))
    _, after = en.simulate(step, start, levels, 0, observe=lambda y: y)
    gain = gain_model.wiener_gain(law.variance, levels.after[:, None].astype(jnp.float32))
    return (gain * after).reshape(2, PATHS, *after.shape[1:])


@pytest.mark.parametrize("make", [en.clusters_sde, en.clusters_flow], ids=["SDE", "flow"])
def test_a_gaussian_mode_commits_where_signal_is_noise(make):
    """Q by step within 5 standard errors of X / (1 + X); the levels within 5 of the rule -ln S, which the window
    truncates for the strongest mode by ln(1 + S e^ell)."""
    a, b = np.asarray(denoised_pairs(make), np.float64)
    energy = (a - b) ** 2 / 2
    ell = -np.log(LEVELS[1:])
    x = VARIANCES * np.exp(ell)[:, None]
    within_errors(energy[:, ::6], (VARIANCES * np.asarray(q_uncoupled(x)))[::6])
    draws = np.random.default_rng(0).multinomial(PATHS, np.full(PATHS, 1 / PATHS), 100) / PATHS

    def level(mean):
        return np.asarray(commitment(relative_energy(jnp.asarray(mean), jnp.asarray(mean)[..., -1, :]), ell).level)

    with jax.enable_x64(True):
        found, spread = level(energy.mean(0)), level(np.tensordot(draws, energy, 1)).std(0)
        expected = level(VARIANCES * np.asarray(q_uncoupled(x)))
    assert np.all(np.abs(found - expected) < 5 * spread + 1e-3), (found, expected, spread)
    np.testing.assert_allclose(expected, -np.log(VARIANCES), atol=0.06)
    assert np.all(np.diff(found) > 1)


# --- clusters: one quantity, measured in three ways

PAIR = cluster_laws.Clusters(jnp.array([0.2, 0.2, 0.08]), jnp.array([[1.6, 0.6, 0.0], [0.0, 0.0, 1.1]]))
AT = (0.3, 1.5, 6.0)


@partial(jax.jit, static_argnums=1)
def clones(noise, steps):
    """A state each, and the ends of two clones of it."""
    levels = en.noise_steps(noise * jnp.linspace(1, 0, steps + 1) ** 2)
    start = en.noised_clusters(PAIR, noise, 0, jnp.arange(PATHS))
    ends = [en.simulate(en.clusters_sde(PAIR), start, levels, seed)[0] for seed in (1, 2)]
    return start, *ends


@pytest.mark.parametrize("noise", AT)
def test_cloning_is_commitment_is_the_error_of_the_posterior(noise):
    start, first, second = (np.asarray(v, np.float64) for v in clones(noise, 12))
    expected = np.asarray(cloning.clone_correlation(PAIR, noise))
    variance = np.asarray(PAIR.total_variance())
    within_errors(first * second / variance, expected)
    # replicas that never met: half of the states beside the other half
    denoised = np.asarray(PAIR.posterior_mean(jnp.asarray(start, jnp.float32), jnp.asarray(noise)), np.float64)
    apart = denoised[: PATHS // 2] - denoised[PATHS // 2 :]
    within_errors(apart**2 / (2 * variance), expected)
    within_errors((first - denoised) ** 2 / variance, 1 - expected)
    # labels of clones
    for centre, kappa in zip(np.asarray(PAIR.centres), np.asarray(PAIR.kappa(noise)), strict=True):
        weights = centre / np.asarray(PAIR.variance)
        same = np.sign(first @ weights) == np.sign(second @ weights)
        # a label read off an end is wrong once in 10000
        within_errors(same - float(cloning.same_cluster_probability(kappa)), 0.0, least=0.05)


@jax.jit
def mixture_clones(process, law, t):
    steps = ou.transition(process, jnp.diff(t * jnp.linspace(0, 1, 9) ** 1.5))
    late = jax.tree.map(lambda v: v[-1], en.state_laws(law, steps))
    start, bridges = late.draw(jax.random.key(0), PATHS), en.bridges(law, steps)
    return [en.simulate(en.mixture_sde, start, bridges, seed)[0] for seed in (1, 2)]


@pytest.mark.parametrize("drift", [[[1.0, -0.6], [-0.6, 1.0]], [[1.0, 0.0], [-1.2, 1.0]], [[0.4, -1.5], [1.5, 0.4]]],
                         ids=["symmetric", "one way", "rotating"])  # fmt: skip
def test_labels_of_clones_tell_speciation_under_any_drift(drift):
    """At kappa = 1 they correlate by T(1) = 0.5504, and by T(kappa) before and after."""
    process = ou.Process(jnp.asarray(drift), jnp.asarray(1.0))
    centre, within = np.array([2.0, 0.5]), np.diag([0.25, 0.6])
    law, moment = mx.two_clusters(centre, within), float(speciation.speciation_time(process, centre, within))
    weights = np.linalg.solve(within, centre)

    for t in (0.7 * moment, moment, 1.4 * moment):
        first, second = (np.sign(np.asarray(v, np.float64) @ weights) for v in mixture_clones(process, law, t))
        kappa = float(speciation.kappa(process, t, centre, within))
        within_errors(first * second, float(cluster_laws.sign_correlation(jnp.asarray(kappa))))
    assert float(speciation.kappa(process, moment, centre, within)) == pytest.approx(1, abs=1e-4)


def test_a_difference_begins_to_grow_at_speciation(x64):
    """Under the flow, at the symmetric point: the rate of the second-order step against the closed form, and its change
    of sign at kappa = 1."""
    law = cluster_laws.Clusters(jnp.array([0.25]), jnp.array([[2.0]]))
    noise = np.geomspace(10, 1, 60)
    apart = 1e-5

    @jax.jit
    def rates(before, after):
        step = en.clusters_flow(law)
        ends = jax.vmap(lambda a, b: step(jax.random.key(0), jnp.array([apart]), en.NoiseStep(a, b)))(before, after)
        return jnp.log(ends[:, 0] / apart) / (jnp.log(before / after) / 2)

    after = noise * np.exp(-1e-3)
    found = np.asarray(rates(noise, after))
    middle = np.sqrt(noise * after)
    kappa = np.asarray(law.kappa(middle))[:, 0]
    np.testing.assert_allclose(found, cloning.cluster_growth(kappa, 0.25, middle), atol=1e-6)
    crossing = np.interp(0.0, found, middle)
    assert crossing == pytest.approx(4 - 0.25, rel=1e-3)


# --- collapse

TRIALS = 2000


@partial(jax.jit, static_argnums=(0, 1, 3))
def log_odds(size, count, noise, trials):
    """Of the own sample against all others (trials, T), unit Gaussian modes."""

    def one(trial):
        for_data, for_noise = jax.random.split(jax.random.fold_in(jax.random.key(0), trial))
        stored = jax.random.normal(for_data, (count, size))
        return condensation(stored, jax.random.normal(for_noise, (size,)), noise)

    return jax.lax.map(one, jnp.arange(trials), batch_size=8)


def test_odds_of_the_own_sample_are_information_less_log_count():
    """While many samples weigh: above the collapse time, where the sum over the others is its mean."""
    size, count = 10, 1500
    t = np.array([0.9, 1.2, 2.0])
    noise = np.repeat(np.expm1(2 * t)[:, None], size, 1)
    got = log_odds(size, count, noise, 1000)
    within_errors(got, size * np.asarray(mode_information(1.0, t, 1.0)) - np.log(count - 1))


@pytest.mark.slow
def test_collapse_time_by_extrapolation():
    """Crossings of own and other weights at log n = 0.3 d for d = 12, 16, 20 and the line through them in 1 / d."""
    t, found = np.linspace(0.3, 0.65, 15), []
    for size in (12, 16, 20):
        noise = np.repeat(np.expm1(2 * t)[:, None], size, 1)
        odds = np.asarray(log_odds(size, round(np.exp(0.3 * size)), noise, TRIALS), np.float64)
        fits = np.polyfit(t, odds.T, 2)  # of every trial: the mean of the fits fits the mean
        mean = np.poly1d(fits.mean(1))
        root = brentq(mean, t[0], t[-1])
        slope = mean.deriv()(root)
        found.append((root, (root ** np.arange(2, -1, -1) @ fits).std() / TRIALS**0.5 / abs(slope)))
    values, errors = np.array(found).T
    fit, covariance = np.polyfit([1 / 12, 1 / 16, 1 / 20], values, 1, w=1 / errors, cov="unscaled")
    expected = float(collapse_time_isotropic(0.3, 1.0))
    assert abs(fit[1] - expected) < 5 * covariance[1, 1] ** 0.5 < 0.1
    assert np.all(values > expected + 5 * errors)  # finite sizes are off, and must be seen to be
    assert float(pair_collapse_times(1.0, 0.0, np.ones(1), np.ones(1), 0.3).common) == pytest.approx(expected, rel=1e-5)
