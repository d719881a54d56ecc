"""Closed forms of two replicas against the matrix exponential, through every removable point (section 12.5)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_continuous_lyapunov

from ou_theory.process import Process, mode_factor, mode_variance, transition
from ou_theory.process_2x2 import stationary_2x2, transition_2x2

closed = jax.jit(transition_2x2)
general = jax.jit(jax.vmap(lambda drift, t, noise: transition(Process(drift, noise), t)))

KINDS = ["any", "defective", "one way", "traceless", "singular", "symmetric", "nothing"]


def draw(kind, seed, count=40):
    """Couplings and times over five decades, as exactly of the kind as rounding allows."""
    rng = np.random.default_rng(seed)
    b1, b2, g12, g21 = rng.normal(size=(4, count)) * 10 ** rng.uniform(-2, 1, count)
    h = (b1 - b2) / 2
    g21 = {"defective": -(h**2) / g12, "singular": b1 * b2 / g12, "symmetric": g12}.get(kind, g21)
    g12 = {"one way": 0 * g12}.get(kind, g12)
    b2 = {"traceless": -b1}.get(kind, b2)
    rates = np.stack([b1, b2, g12, g21]) * (kind != "nothing")
    longest = 60 / np.abs(rates).sum(0).clip(0.1)
    return (*rates, np.minimum(10 ** rng.uniform(-4, 1, count), longest), rng.uniform(0.1, 3, count))


def drift_of(b1, b2, g12, g21):
    return np.moveaxis(np.array([[b1, -g12], [-g21, b2]]), -1, 0)


def errors(got, expected):
    """Largest error of each matrix, as a share of its largest entry."""
    return np.abs(np.asarray(got) - expected).max((-2, -1)) / np.abs(expected).max((-2, -1))


@pytest.mark.parametrize("kind", KINDS)
def test_closed_forms_are_the_matrix_exponential(x64, kind):
    for seed in range(20):
        *rates, t, noise = draw(kind, seed)
        for a, b in zip(closed(*rates, t, noise), general(drift_of(*rates), t, noise), strict=True):
            assert errors(a, np.asarray(b)).max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_single_precision(kind):
    *rates, t, noise = draw(kind, 100)
    t = t / 10
    with jax.enable_x64(True):
        double = [np.asarray(v) for v in closed(*rates, t, noise)]
    for a, b in zip(closed(*rates, t, noise), double, strict=True):
        assert a.dtype == jnp.float32
        assert errors(a, b).max() < 2e-5


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.floats(0.1, 2), st.floats(-2.5, 2.5), st.floats(0, 30))
def test_symmetric_pair(b, g, t):
    with jax.enable_x64(True):
        got = closed(b, b, g, g, t, 0.7)
        for sign, rate in ((1, b - g), (-1, b + g)):
            mode = np.array([1, sign]) / 2**0.5
            size = float(jnp.abs(got.covariance).max())
            expected = float(mode_variance(rate, t, 0.7))
            assert mode @ np.asarray(got.covariance) @ mode == pytest.approx(expected, rel=1e-9, abs=1e-13 * size)
            expected, size = float(mode_factor(rate, t)), float(jnp.abs(got.factor).max())
            assert mode @ np.asarray(got.factor) @ mode == pytest.approx(expected, rel=1e-9, abs=1e-13 * size)


def directly(b1, b2, g12, g21, t, noise):
    return jnp.stack(transition_2x2(b1, b2, g12, g21, t, noise))


def by_exponential(b1, b2, g12, g21, t, noise):
    return jnp.stack(transition(Process(jnp.array([[b1, -g12], [-g21, b2]]), noise), t))


slopes = [jax.jit(jax.vmap(jax.jacfwd(f, range(6)))) for f in (directly, by_exponential)]
last_slopes = jax.jit(jax.vmap(jax.jacrev(directly, range(6))))


@pytest.mark.parametrize("kind", KINDS)
def test_slopes_pass_through_the_removable_points(x64, kind):
    *rates, t, noise = (v[:12] for v in draw(kind, 7))
    arguments = *rates, np.minimum(t, 3 / np.abs(rates).sum(0).clip(0.1)), noise
    for a, b, c in zip(slopes[0](*arguments), slopes[1](*arguments), last_slopes(*arguments), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-9 * np.abs(b).max())
        np.testing.assert_allclose(c, a, rtol=1e-8, atol=1e-9 * np.abs(b).max())


def test_no_time_and_long_times(x64):
    got = closed(1.3, 0.8, 0.5, 0.2, np.array([0.0, 500.0, 1e8]), 0.7)
    np.testing.assert_array_equal(got.factor[0], np.eye(2))
    np.testing.assert_array_equal(got.covariance[0], 0)
    expected = stationary_2x2(1.3, 0.8, 0.5, 0.2, 0.7)
    np.testing.assert_allclose(got.covariance[1:], np.stack([expected] * 2), rtol=1e-12)
    assert float(expected[0, 0]) == pytest.approx(0.6489361702, rel=1e-9)
    rotating = closed(0.3, 0.3, 2.0, -2.0, 1e5)  # a normal drift
    np.testing.assert_allclose(rotating.covariance, np.eye(2) / 0.3, atol=1e-12)
    grads = jax.grad(lambda b: closed(b, 1.0, 1.0, 1.0, 50.0).covariance.sum())(1.0)
    assert np.isfinite(grads)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2), st.floats(-2, 2))
def test_stationary_state(b1, b2, g12, g21):
    det = b1 * b2 - g12 * g21
    with jax.enable_x64(True):
        if b1 + b2 > 0.01 and det > 0.01:
            drift = np.array([[b1, -g12], [-g21, b2]])
            expected = solve_continuous_lyapunov(drift, 1.4 * np.eye(2))
            assert errors(stationary_2x2(b1, b2, g12, g21, 0.7), expected).max() < 1e-10
            adjugate = np.array([[b2, g12], [g21, b1]])
            expected = 0.7 * (det * np.eye(2) + adjugate @ adjugate.T) / ((b1 + b2) * det)
            assert errors(stationary_2x2(b1, b2, g12, g21, 0.7), expected).max() < 1e-12
        elif b1 + b2 < 0 or det < 0:
            with pytest.raises(ValueError, match="stationary"):
                stationary_2x2(b1, b2, g12, g21)


def test_boundaries():
    with pytest.raises(ValueError, match="negative"):
        transition_2x2(1.0, 1.0, 0.3, 0.3, -0.1)
    got = jax.jit(jax.vmap(lambda g: stationary_2x2(1.0, 1.0, g, g)))(jnp.array([0.5, 1.0]))
    assert np.all(np.isfinite(got[0]))
    assert np.all(np.isnan(got[1]))
    assert closed(np.ones((3, 1)), 1.0, np.zeros(4), 0.3, 1.0).covariance.shape == (3, 4, 2, 2)
