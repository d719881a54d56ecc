"""Collapse times of an empirical score: docs/theory.md, section 13.5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm, solve_continuous_lyapunov
from scipy.optimize import brentq

from ou_theory import collapse as co
from ou_theory.process import Process, symmetric_pair
from ou_theory.speciation import mode_speciation_time, speciation_gap

LAW = settings(max_examples=25, deadline=None, derandomize=True)
positive = st.floats(0.1, 5)
DRIFT = np.array([[1.3, -0.9], [0.4, 0.8]])
COVARIANCE = np.array([[2.0, 0.6], [0.6, 1.0]])

pair_times = jax.jit(co.pair_collapse_times)
collapse_time = jax.jit(co.collapse_time)
collapse_time_modes = jax.jit(co.collapse_time_modes)
collapse_time_clusters = jax.jit(co.collapse_time_clusters)
collapse_time_isotropic = jax.jit(co.collapse_time_isotropic)
cluster_information = jax.jit(co.cluster_information)


def process_of(drift, noise=0.7):
    return Process(jnp.asarray(drift, float), jnp.asarray(noise, float))


def information_by_hand(t, drift=DRIFT, noise=0.7, covariance=COVARIANCE):
    """From the covariance of the state, with and without the data, by SciPy."""
    factor = expm(-drift * t)
    stationary = solve_continuous_lyapunov(drift, 2 * noise * np.eye(len(drift)))
    given_data = stationary - factor @ stationary @ factor.T
    total = factor @ covariance @ factor.T + given_data
    return (np.linalg.slogdet(total)[1] - np.linalg.slogdet(given_data)[1]) / 2


def test_references(x64):
    assert float(collapse_time_isotropic(0.3, 1.0)) == pytest.approx(0.3979351842, rel=1e-9)
    got = pair_times(1.0, 0.4, np.array([4.0, 1.0]), np.array([2.0, 0.5]), 1.5)
    assert float(got.joint) == pytest.approx(0.4610693362, rel=1e-9)


def test_time_by_another_root_finder(x64):
    for log_count in (0.05, 1.0, 8.0):
        expected = brentq(lambda t, n=log_count: information_by_hand(t) - n, 1e-8, 20, xtol=1e-15)
        got = float(collapse_time(process_of(DRIFT), COVARIANCE, log_count))
        assert got == pytest.approx(expected, rel=1e-8)


@LAW
@given(positive, st.floats(0.01, 8), st.floats(-0.3, 2), st.floats(0.2, 2))
def test_three_routes_to_an_isotropic_time(variance, alpha, rate, noise):
    with jax.enable_x64(True):
        closed = float(collapse_time_isotropic(alpha, variance, rate, noise))
        by_modes = float(collapse_time_modes(np.full(2, rate), np.full(2, variance), 2 * alpha, noise))
        assert by_modes == pytest.approx(closed, rel=1e-9)
        if closed < 20:
            process = process_of(rate * np.eye(2), noise)
            got = float(collapse_time(process, variance * np.eye(2), 2 * alpha))
            assert got == pytest.approx(closed, rel=1e-8)


def test_clusters_collapse_later_than_one_of_them_and_by_the_label(x64):
    rates, variances, centre = np.ones(3), np.full(3, 0.3), np.array([2.0, 0.5, 0.0])
    for log_count in (1.0, 4.0, 12.0):
        got = float(collapse_time_clusters(rates, variances, centre, log_count))
        informed = cluster_information(rates, got, variances, centre)
        assert float(informed) == pytest.approx(log_count, rel=1e-10)
        alone = [float(collapse_time_modes(rates, variances, n)) for n in (log_count, log_count - np.log(2))]
        assert alone[0] < got <= alone[1] * (1 + 1e-12)  # the label is worth at most log 2
    distant = float(collapse_time_clusters(rates, variances, 50 * centre, 4.0))
    assert distant == pytest.approx(float(collapse_time_modes(rates, variances, 4.0 - np.log(2))), rel=1e-12)
    none = float(collapse_time_clusters(rates, variances, 0 * centre, 4.0))
    assert none == pytest.approx(float(collapse_time_modes(rates, variances, 4.0)), rel=1e-12)


@LAW
@given(
    st.floats(-0.95, 0.95),
    st.lists(positive, min_size=4, max_size=4),
    st.floats(0.2, 10),
    st.floats(1.05, 3),
    st.integers(0, 3),
)
def test_monotone(g, variances, log_count, more, which):
    """Joint not before either mode; sooner in generation with more variance, later with more samples."""
    with jax.enable_x64(True):
        s = np.array(variances)
        times = pair_times(1.0, g, s[:2], s[2:], log_count)
        assert times.joint >= max(times.common, times.difference)
        fuller = pair_times(1.0, g, s[:2], s[2:], more * log_count)
        assert all(a < b for a, b in zip(fuller, times, strict=True))
        s[which] *= more
        wider = pair_times(1.0, g, s[:2], s[2:], log_count)
        assert wider.joint > times.joint
        assert (wider.common > times.common) == (which < 2)
        assert (wider.difference > times.difference) == (which >= 2)


def test_gap_of_isotropic_modes_is_that_of_speciation(x64):
    times = pair_times(1.0, 0.4, np.full(5, 2.0), np.full(5, 2.0), 2.0)
    spread = 2 / np.expm1(2 * 2.0 / 5)
    expected = float(speciation_gap(1.0, 0.4, spread, spread))
    assert float(times.common - times.difference) == pytest.approx(expected, rel=1e-10)


def test_pair_is_the_process(x64):
    """Joint collapse of one mode per replica, from the matrices."""
    covariance = np.array([[2.0, 0.5], [0.5, 2.0]])
    got = float(collapse_time(symmetric_pair(1.0, 0.4), covariance, 1.2))
    expected = pair_times(1.0, 0.4, np.array([2.5]), np.array([1.5]), 1.2)
    assert got == pytest.approx(float(expected.joint), rel=1e-10)


def test_pairs_broadcast():
    times = pair_times(1.0, np.array([0.0, 0.3, 0.6]), np.ones((3, 4)), np.ones(2), 1.0)
    assert [v.shape for v in times] == [(3,)] * 3
    rank = np.log1p(1 / (np.expm1(2 * 0.7 * 0.2) / 0.7))  # of two modes at g = 0.3 and t = 0.2
    got = pair_times(1.0, 0.3, np.ones(2), np.ones(2), rank)
    assert float(got.common) == pytest.approx(0.2, rel=1e-5)


@LAW
@given(st.floats(0.01, 3), positive, st.floats(0.5, 4), st.floats(-0.2, 2), st.floats(0.3, 2))
def test_order_of_collapse_and_speciation(alpha, variance, m, rate, noise):
    with jax.enable_x64(True):
        collapse = float(collapse_time_isotropic(alpha, variance, rate, noise))
        speciation = float(mode_speciation_time(m, 0.2, rate, noise))
        if np.isfinite(collapse) and speciation > 0:
            assert (variance / np.expm1(2 * alpha) > m**2 - 0.2) == (collapse > speciation)


def test_ends(x64):
    process = process_of(DRIFT)
    assert float(collapse_time(process, COVARIANCE, 0.0)) == np.inf  # a single sample
    assert float(collapse_time(process, np.zeros((2, 2)), 1.0)) == 0
    assert np.isnan(float(collapse_time(process, np.full((2, 2), np.nan), 1.0)))
    assert float(collapse_time_isotropic(0.0, 1.0)) == np.inf
    rank_one = float(collapse_time(process_of(np.eye(2), 1.0), np.diag([2.0, 0.0]), 1.0))
    assert rank_one == pytest.approx(float(collapse_time_isotropic(1.0, 2.0)), rel=1e-9)
    # an unstable drift keeps log(1 + S |rate| / D) / 2 for ever
    kept = 0.5 * np.log1p(2.0)
    for share, finite in ((0.99, False), (1.01, True)):
        assert np.isfinite(float(collapse_time_modes(np.array([-1.0]), np.array([2.0]), share * kept))) == finite
        unstable = collapse_time(process_of([[-1.0]], 1.0), np.array([[2.0]]), share * kept)
        assert np.isfinite(float(unstable)) == finite


@pytest.mark.parametrize("rates", [(-1.0, 3.0), (-0.5, -2.0), (-1.0, -1.0)])
def test_what_an_unstable_drift_remembers_for_ever(x64, stock_compiler, rates):
    """At the far end a last place decides between a late time and none."""
    time = jax.jit(co.collapse_time, compiler_options=stock_compiler)
    process = symmetric_pair(sum(rates) / 2, (rates[1] - rates[0]) / 2, 0.7)
    covariance = np.array([[2.0, 0.5], [0.5, 2.0]])
    kept = sum(0.5 * np.log1p(s * -r / 0.7) for r, s in zip(rates, (2.5, 1.5), strict=True) if r < 0)
    for share, finite in ((0.99, False), (1.01, True)):
        got = float(time(process, covariance, share * kept))
        expected = float(collapse_time_modes(np.array(rates), np.array([2.5, 1.5]), share * kept, 0.7))
        assert np.isfinite(expected) == finite
        assert got == pytest.approx(expected, rel=1e-9)


def test_slopes_and_curvatures(x64):
    def by_modes(rate, variance, alpha, noise):
        ones = jnp.ones(3)
        return collapse_time_modes(rate * ones, variance * ones, 3 * alpha, noise)

    at = (0.8, 2.0, 0.5, 0.7)
    closed = lambda r, s, a, d: collapse_time_isotropic(a, s, r, d)  # noqa: E731
    for derivative in (jax.jacrev, lambda f, n: jax.jacfwd(jax.jacrev(f, n), n)):
        got, expected = (jax.jit(derivative(f, (0, 1, 2, 3)))(*at) for f in (by_modes, closed))
        np.testing.assert_allclose(np.array(got), np.array(expected), rtol=1e-8)


def test_slopes_under_any_drift(x64):
    arguments = [DRIFT, np.array(0.7), COVARIANCE, np.array(1.1)]
    time = jax.jit(jax.value_and_grad(lambda k, d, c, n: collapse_time(Process(k, d), c, n), argnums=(0, 1, 2, 3)))
    _, slopes = time(*arguments)
    rng = np.random.default_rng(0)
    for i, slope in enumerate(slopes):
        way = rng.normal(size=arguments[i].shape)
        way = way + way.T if i == 2 else way
        moved = []
        for h in (-1e-5, 1e-5):
            changed = list(arguments)
            changed[i] = arguments[i] + h * way
            moved.append(float(time(*changed)[0]))
        assert float((slope * way).sum()) == pytest.approx((moved[1] - moved[0]) / 2e-5, rel=1e-6)


def test_no_nan_slopes_where_there_is_no_time():
    def time(variance, log_count):
        return collapse_time_modes(jnp.array([-1.0, 0.5]), jnp.stack([variance, variance]), log_count)

    grads = jax.jit(jax.vmap(jax.grad(time, (0, 1))))(jnp.array([0.0, 2.0, 2.0, 1.0]), jnp.array([1.0, 0.0, 0.1, 1.0]))
    assert np.all(np.isfinite(grads))


def test_single_precision():
    s = np.array([[4.0, 1.0], [2.0, 0.5]])
    with jax.enable_x64(True):
        double = np.array(pair_times(1.0, 0.4, s[0], s[1], np.array([0.3, 1.5, 9.0])))
        general = float(collapse_time(process_of(DRIFT), COVARIANCE, 1.5))
    got = pair_times(1.0, 0.4, s[0], s[1], np.array([0.3, 1.5, 9.0]))
    assert got.joint.dtype == jnp.float32
    np.testing.assert_allclose(np.array(got), double, rtol=1e-5)
    assert float(collapse_time(process_of(DRIFT), COVARIANCE, 1.5)) == pytest.approx(general, rel=1e-5)


def test_bad_input_raises():
    with pytest.raises(ValueError, match="log_count"):
        co.collapse_time(process_of(DRIFT), COVARIANCE, -0.1)
    with pytest.raises(ValueError, match="variances"):
        co.collapse_time_modes(np.ones(2), np.array([1.0, -1.0]), 1.0)
    with pytest.raises(ValueError, match="variances"):
        co.collapse_time_clusters(np.ones(2), np.array([1.0, -1.0]), np.ones(2), 1.0)
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        co.collapse_time(process_of(DRIFT), np.eye(3), 1.0)
