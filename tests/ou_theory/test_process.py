"""The coupled process: transitions of any drift by independent routes, modes, precision (sections 12.1, 12.2)."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp
from scipy.linalg import expm, solve_continuous_lyapunov

from ou_theory import process as ou

LAW = settings(max_examples=25, deadline=None, derandomize=True)
entries = st.floats(-2, 2)
squares = st.lists(entries, min_size=9, max_size=9).map(lambda v: np.reshape(v, (3, 3)))
times = st.floats(0, 2)

DRIFTS = {
    "symmetric": [[1.0, -0.4], [-0.4, 1.0]],
    "anisotropic": [[1.3, -0.5], [-0.2, 0.8]],
    "one way": [[1.0, -3.0], [0.0, 0.5]],
    "rotating": [[0.3, -2.0], [2.0, 0.4]],
    "defective": [[1.0, -5.0], [0.0, 1.0]],
    "marginal": [[1.0, -1.0], [-1.0, 1.0]],
    "unstable": [[0.2, -1.0], [-0.5, -0.3]],
    "nothing": [[0.0, 0.0], [0.0, 0.0]],
    "nilpotent": [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 0.0, 0.0]],
    "Jordan block": [[0.7, 2.0, 0.0], [0.0, 0.7, 2.0], [0.0, 0.0, 0.7]],
    "far from normal": [[1.0, 40.0, 0.0], [0.0, 1.5, 40.0], [0.1, 0.0, 2.0]],
    "one mode": [[1.7]],
}
STABLE = ["symmetric", "anisotropic", "one way", "rotating", "defective", "Jordan block", "one mode"]

transition = jax.jit(ou.transition)
pulled_noise = jax.jit(ou.pulled_noise)
slopes_in_time = jax.jit(jax.jacrev(ou.transition, 1))


def process_of(drift, noise=0.7):
    return ou.Process(jnp.asarray(drift, float), jnp.asarray(noise, float))


def by_blocks(drift, noise, t):
    """Van Loan's block exponential, of which one is not enough for a long time: over 64 pieces, one after another."""
    drift = np.asarray(drift, float)
    n = len(drift)
    block = expm(np.block([[-drift, 2 * noise * np.eye(n)], [np.zeros((n, n)), drift.T]]) * t / 64)
    factor, piece, covariance = block[:n, :n], block[:n, n:] @ block[:n, :n].T, np.zeros((n, n))
    for _ in range(64):
        covariance = factor @ covariance @ factor.T + piece
    return expm(-drift * t), covariance


def close(got, expected, rtol):
    """To a share of the largest entry."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=rtol * np.abs(expected).max() + 1e-300)


# --- transitions


def test_references(x64):
    process = process_of([[1.3, -0.5], [-0.2, 0.8]])
    assert float(transition(process, 0.83).covariance[0, 1]) == pytest.approx(0.1247362337, rel=1e-9)
    assert float(ou.stationary_covariance(process)[0, 0]) == pytest.approx(0.6489361702, rel=1e-9)
    assert float(ou.transition_time(0.6, 3.0)) == pytest.approx(0.8580161810, rel=1e-9)


@pytest.mark.parametrize("name", DRIFTS)
def test_transition_is_the_block_exponential(x64, name):
    at = np.array([0.0, 1e-9, 0.03, 0.4, 1.0, 2.7])
    got = transition(process_of(DRIFTS[name]), at)
    for i, t in enumerate(at):
        factor, covariance = by_blocks(DRIFTS[name], 0.7, t)
        close(got.factor[i], factor, 1e-12)
        close(got.covariance[i], covariance, 1e-12)
    np.testing.assert_array_equal(got.factor[0], np.eye(len(DRIFTS[name])))
    np.testing.assert_array_equal(got.covariance[0], 0)


@pytest.mark.parametrize("name", ["rotating", "far from normal", "unstable"])
def test_covariance_solves_its_equation(x64, name):
    drift = np.asarray(DRIFTS[name])
    n = len(drift)

    def rate(_, s):
        s = s.reshape(n, n)
        return (-drift @ s - s @ drift.T + 1.4 * np.eye(n)).ravel()

    expected = solve_ivp(rate, (0, 1.5), np.zeros(n * n), rtol=1e-12, atol=1e-12, method="DOP853").y[:, -1]
    close(transition(process_of(drift), 1.5).covariance, expected.reshape(n, n), 1e-9)


@pytest.mark.parametrize("name", STABLE)
@pytest.mark.parametrize("t", [5.0, 40.0, 300.0, 1e6, 1e30, 1e300, np.inf])
def test_long_times_of_stable_drifts(x64, name, t):
    drift = np.asarray(DRIFTS[name])
    final = solve_continuous_lyapunov(drift, 1.4 * np.eye(len(drift)))
    got = transition(process_of(drift), t)
    factor = expm(-drift * t) if t <= 300 else np.zeros_like(drift)
    close(got.covariance, final - factor @ final @ factor.T, 1e-12)
    if t <= 300:
        np.testing.assert_allclose(got.factor, factor, rtol=1e-10, atol=1e-13 * np.abs(factor).max())
    elif t >= 1e6:
        np.testing.assert_array_equal(got.factor, 0)


def test_long_times_of_exact_cases(x64):
    t = 200.0  # both rates 1: exp(-t) [[1, 5 t], [0, 1]]
    factor = transition(process_of(DRIFTS["defective"]), t).factor
    np.testing.assert_allclose(factor, np.exp(-t) * np.array([[1, 5 * t], [0, 1]]), rtol=1e-12)
    t = 300.0  # the common mode grows as exp(t / 5)
    got = transition(ou.symmetric_pair(1.0, 1.2, 0.5), t).covariance
    expected = float(ou.mode_variance(-0.2, t, 0.5)) / 2
    np.testing.assert_allclose(got, np.full((2, 2), expected), rtol=1e-11)
    got = transition(ou.symmetric_pair(1.0, 1.0, 0.5), 1e4)  # and here it diffuses freely
    np.testing.assert_allclose(got.covariance, 0.5e4 + 0.125 * np.array([[1, -1], [-1, 1]]), rtol=1e-11)
    np.testing.assert_allclose(got.factor, 0.5, rtol=1e-11)
    got = transition(process_of(np.zeros((2, 2))), 1e200)
    np.testing.assert_allclose(got.covariance, 1.4e200 * np.eye(2), rtol=1e-14)


def test_overflow_is_not_a_number(x64):
    for process, t in ((ou.symmetric_pair(1.0, 2.0), 1e3), (process_of(DRIFTS["marginal"]), 1e40)):
        assert all(np.isnan(part).all() for part in transition(process, t))
    assert np.isnan(ou.pulled_noise(ou.symmetric_pair(1.0, 0.0), 1e4)).all()


@LAW
@given(squares, times, times, st.floats(0.1, 3))
def test_semigroup(drift, s, t, noise):
    with jax.enable_x64(True):
        process = process_of(drift, noise)
        first, second, both = (transition(process, at) for at in (s, t, s + t))
        expected = second.factor @ first.covariance @ second.factor.T + second.covariance
        close(both.covariance, expected, 1e-11)
        close(both.factor, second.factor @ first.factor, 1e-11)


@LAW
@given(squares, times.filter(lambda t: t > 0.05), st.floats(0.01, 1))
def test_noise_is_positive_and_pulled_back_grows(drift, t, more):
    with jax.enable_x64(True):
        process = process_of(drift)
        factor, covariance = (np.asarray(v) for v in transition(process, t))
        assert np.linalg.eigvalsh(covariance).min() > 0
        pulled, later = np.asarray(pulled_noise(process, t)), np.asarray(pulled_noise(process, t + more))
        close(factor @ pulled @ factor.T, covariance, 1e-10 * np.linalg.cond(factor))
        assert np.linalg.eigvalsh(later - pulled).min() > -1e-13 * np.abs(later).max()


@LAW
@given(st.floats(-2, 2), st.floats(-3, 3), times, st.floats(0.1, 3))
def test_a_symmetric_pair_is_symmetric_and_diagonal_in_its_modes(b, g, t, noise):
    with jax.enable_x64(True):
        factor, covariance = (np.asarray(v) for v in transition(ou.symmetric_pair(b, g, noise), t))
        close(covariance[::-1, ::-1], covariance, 1e-13)
        for sign, rate in ((1, b - g), (-1, b + g)):
            mode = np.array([1, sign]) / 2**0.5
            assert mode @ covariance @ mode == pytest.approx(float(ou.mode_variance(rate, t, noise)), rel=1e-9)
            assert mode @ factor @ mode == pytest.approx(float(ou.mode_factor(rate, t)), rel=1e-9)


def test_transition_is_that_of_simulated_paths(x64):
    """20000 paths, 400 Euler steps, whose bias is of the order of |K| dt; 5 standard errors beside it."""
    drift, noise, t, count, steps = np.asarray(DRIFTS["anisotropic"]), 0.7, 0.83, 20_000, 400
    rng, dt = np.random.default_rng(0), t / steps
    x = np.tile([1.0, -2.0], (count, 1))
    for _ in range(steps):
        x += -x @ drift.T * dt + np.sqrt(2 * noise * dt) * rng.normal(size=x.shape)
    factor, covariance = (np.asarray(v) for v in transition(process_of(drift, noise), t))
    np.testing.assert_allclose(x.mean(0), factor @ [1.0, -2.0], atol=5 * (0.7 / count) ** 0.5 + 0.004)
    np.testing.assert_allclose(np.cov(x.T), covariance, atol=5 * 0.7 * (2 / count) ** 0.5 + 0.004)


# --- one mode


@LAW
@given(st.floats(-2, 2), st.floats(0.01, 3), st.floats(0.1, 3))
def test_clock_inverts_the_pulled_back_noise(rate, t, noise):
    with jax.enable_x64(True):
        level = ou.mode_noise(rate, t, noise)
        assert float(ou.transition_time(rate, level, noise)) == pytest.approx(t, rel=1e-9)
        process = process_of([[rate]], noise)
        assert float(pulled_noise(process, t)[0, 0]) == pytest.approx(float(level), rel=1e-12)
        got = transition(process, t)
        assert float(got.covariance[0, 0]) == pytest.approx(float(ou.mode_variance(rate, t, noise)), rel=1e-12)
        assert float(got.factor[0, 0]) == pytest.approx(float(ou.mode_factor(rate, t)), rel=1e-12)


@LAW
@given(st.floats(-0.9, 0.9), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.2, 5))
def test_clock_falls_and_bends_with_the_rate(rate, share, noise, c):
    spread = share * noise
    with jax.enable_x64(True):
        clock_at = partial(ou.transition_time, spread=0.3 * spread, noise=noise)
        slope, bend = jax.grad(clock_at)(rate), jax.grad(jax.grad(clock_at))(rate)
        assert float(slope) < 0 < float(bend)
        assert float(ou.transition_time(rate, 0.4 * spread, noise)) > float(clock_at(rate))
        scaled = ou.transition_time(c * rate, 0.3 * spread, c * noise)
        assert float(scaled) == pytest.approx(float(clock_at(rate)) / c, rel=1e-12)


def test_modes_at_their_ends(x64):
    rates = jnp.array([-1.0, -1e-14, 0.0, 1e-14, 2.0])
    np.testing.assert_allclose(ou.mode_noise(rates, 0.5, 3.0)[1:4], 3.0, rtol=1e-13)
    np.testing.assert_array_equal(ou.mode_noise(rates, 0.0), 0)
    np.testing.assert_allclose(ou.mode_variance(2.0, np.array([1e3, 1e300, np.inf]), 3.0), 1.5, rtol=1e-15)
    np.testing.assert_array_equal(ou.mode_noise(2.0, np.array([1e3, np.inf])), np.inf)
    for function in (ou.mode_noise, ou.mode_variance):
        slopes = jax.vmap(jax.grad(function), (0, None))(rates, 0.5)
        assert np.all(np.isfinite(slopes))
        sign = 1 if function is ou.mode_noise else -1
        np.testing.assert_allclose(slopes[1:4], sign * 0.5, rtol=1e-12)  # 2 D t^2 at rate 0
        assert float(jax.grad(function, 1)(0.0, 0.0)) == 2


# --- precision, derivatives, boundary


def test_time_derivative_is_the_moment_equation(x64):
    for name in ("one way", "nothing", "defective"):
        process = process_of(DRIFTS[name])
        for t in (0.0, 0.3, 4.0):
            factor, covariance = transition(process, t)
            slopes = slopes_in_time(process, t)
            moved = process.drift @ covariance
            np.testing.assert_allclose(slopes.factor, -process.drift @ factor, atol=1e-12)
            np.testing.assert_allclose(slopes.covariance, 1.4 * np.eye(2) - moved - moved.T, atol=1e-12)


def total_along(h, drift, t):
    got = ou.transition(process_of(drift + h * jnp.array([[0.3, -1.0], [0.7, 0.4]])), t)
    return (got.factor + got.covariance)[0].sum()


totals, forward, reverse = (jax.jit(f) for f in (total_along, jax.jacfwd(total_along), jax.jacrev(total_along)))


@pytest.mark.parametrize("name", ["rotating", "defective", "nothing"])
@pytest.mark.parametrize("t", [0.2, 9.0])
def test_gradients_in_the_drift(x64, name, t):
    drift = np.asarray(DRIFTS[name])
    expected = (float(totals(1e-5, drift, t)) - float(totals(-1e-5, drift, t))) / 2e-5
    assert float(forward(0.0, drift, t)) == pytest.approx(expected, rel=1e-6)
    assert float(reverse(0.0, drift, t)) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("name", DRIFTS)
def test_single_precision(name):
    unstable = name in ("unstable", "far from normal")
    at = np.array([0.0, 0.1, 0.4, 1.0, 3.0, 3.0 if unstable else 20.0], np.float32)
    with jax.enable_x64(True):
        double = transition(process_of(DRIFTS[name]), at.astype(float))
    single = transition(process_of(DRIFTS[name]), at)
    for a, b in zip(single, double, strict=True):
        assert (a.dtype, b.dtype) == (jnp.float32, jnp.float64)
        for i in range(at.size):
            close(a[i], np.asarray(b[i]), 2e-5)


def test_functions_of_processes_map():
    def everything(g):
        process = ou.symmetric_pair(1.0, g, 0.7)
        modes = ou.left_modes(process)
        return (
            ou.transition(process, 0.3),
            ou.entropy_production(process),
            (modes.rates, modes.modes**2),
            ou.symmetric_bound(1 + g),
            (ou.is_stable(process), ou.is_contracting(process), ou.has_real_modes(process)),
        )

    couplings = jnp.array([-0.3, 0.5])
    mapped = jax.jit(jax.vmap(everything))(couplings)
    for i, g in enumerate(couplings):
        jax.tree.map(lambda a, b, i=i: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), mapped, everything(g))
    slopes = jax.jit(jax.vmap(jax.grad(lambda g: ou.stationary_covariance(ou.symmetric_pair(1.0, g, 0.7))[0, 1])))
    g = np.asarray(couplings)
    np.testing.assert_allclose(slopes(couplings), 0.7 * (1 + g**2) / (1 - g**2) ** 2, rtol=1e-5)


def test_the_clock_at_its_ends():
    rates, spreads = np.array([1.0, -1.0, 0.0, 1.0, np.nan]), np.array([np.inf, np.inf, np.inf, np.nan, 1.0])
    got = np.asarray(ou.transition_time(rates, spreads))
    assert np.all(np.isinf(got[:3]))
    assert np.all(np.isnan(got[3:]))
    assert np.isfinite(jax.grad(ou.transition_time, 1)(1.0, 3.0))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: ou.symmetric_pair(1.0, 0.3, 0.0), "noise strength"),
        (lambda: ou.symmetric_pair(1.0, 0.3, np.ones(2)), "numbers"),
        (lambda: ou.symmetric_pair(np.ones(2), 0.3), "numbers"),
        (lambda: ou.replicas(1.0, 0.3, 0), "count"),
        (lambda: ou.coupled(1.0, np.ones((2, 3)), 0.3), "square"),
        (lambda: ou.transition(ou.symmetric_pair(1.0, 0.3), -1.0), "negative"),
        (lambda: ou.transition(process_of(np.ones((3, 2, 2))), 1.0), "square"),
        (lambda: ou.symmetric_bound(1.0, 1), "2 replicas"),
        (lambda: ou.symmetric_bound(0.0), "positive"),
    ],
)
def test_bad_input_raises(make, match):
    with pytest.raises(ValueError, match=match):
        make()
