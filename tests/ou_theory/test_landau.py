"""The pitchfork at speciation: docs/theory.md, section 13.2."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import brentq, minimize

from ou_theory.landau import branch, landau, magnetisation, onset_slope
from ou_theory.speciation import mode_kappa, mode_speciation_time

LAW = settings(max_examples=25, deadline=None, derandomize=True)
coefficients = jax.jit(landau)
magnetised = jax.jit(magnetisation)
branches = jax.jit(branch)
slopes = jax.jit(jax.vmap(jax.grad(magnetisation)))
curvatures = jax.jit(jax.vmap(jax.grad(jax.grad(magnetisation))))


def minus_log_density(x, m, s2, rate, t, noise):
    """Of one mode at time t, from its two components."""
    moved = jnp.exp(-rate * t) * m
    spread = jnp.exp(-2 * rate * t) * s2 + noise / rate * (1 - jnp.exp(-2 * rate * t))
    return -jnp.logaddexp(-((x - moved) ** 2) / (2 * spread), -((x + moved) ** 2) / (2 * spread))


second = jax.jit(jax.grad(jax.grad(minus_log_density)))
fourth = jax.jit(jax.grad(jax.grad(jax.grad(jax.grad(minus_log_density)))))


def test_references(x64):
    got = landau(2.0, 0.5, 0.6, 0.9, 0.7)
    np.testing.assert_allclose([got.r2, got.u4], [-0.4729206379, 0.7868880954], rtol=1e-9)
    assert float(magnetisation(1.5)) == pytest.approx(0.8585596366, rel=1e-9)


@LAW
@given(st.floats(0.3, 3), st.floats(0.1, 2), st.floats(0.1, 2), st.floats(0.05, 2), st.floats(0.2, 2))
def test_coefficients_are_derivatives_of_the_density(m, s2, rate, t, noise):
    with jax.enable_x64(True):
        got = coefficients(m, s2, rate, t, noise)
        assert float(got.r2) == pytest.approx(float(second(0.0, m, s2, rate, t, noise)), rel=1e-9, abs=1e-11)
        assert 6 * float(got.u4) == pytest.approx(float(fourth(0.0, m, s2, rate, t, noise)), rel=1e-8, abs=1e-9)
        assert got.u4 > 0


@LAW
@given(st.floats(0.5, 5), st.floats(0.1, 0.9), st.floats(-0.3, 2), st.floats(0.3, 2))
def test_curvature_turns_negative_at_speciation(m, share, rate, noise):
    with jax.enable_x64(True):
        time = mode_speciation_time(m, share * m**2, rate, noise)
        if np.isfinite(float(time)):
            before, after = (float(coefficients(m, share * m**2, rate, time * f, noise).r2) for f in (1.01, 0.99))
            assert before > 0 > after


def test_rate_zero_is_no_exception(x64):
    near, at = (landau(1.5, 0.4, rate, 0.7, 0.8) for rate in (1e-9, 0.0))
    np.testing.assert_allclose(at, near, rtol=1e-7)
    assert np.all(np.isfinite(jax.jacfwd(landau, 2)(1.5, 0.4, 0.0, 0.7, 0.8)))


# --- magnetisation


@LAW
@given(st.floats(-9, 1.5))
def test_magnetisation_solves_its_equation(log_excess):
    kappa = 1 + 10**log_excess
    with jax.enable_x64(True):
        got = float(magnetised(kappa))
        excess = kappa - 1
        if excess < 1e-4:  # series to the next order: M^2 = 3 e - 27/5 e^2 - ...
            assert got**2 == pytest.approx(3 * excess * (1 - 9 / 5 * excess), rel=1e-7)
        else:
            expected = brentq(lambda m: np.tanh(kappa * m) - m, 0.5 * min(1, (3 * excess) ** 0.5 / kappa**1.5), 1)
            assert got == pytest.approx(expected, rel=1e-9)


def test_disordered_and_saturated(x64):
    np.testing.assert_array_equal(magnetised(np.array([-1.0, 0.0, 0.5, 1.0])), 0)
    np.testing.assert_array_equal(magnetised(np.array([30.0, 1e5, np.inf])), 1)
    assert np.isnan(float(magnetised(np.nan)))
    np.testing.assert_array_equal(slopes(np.array([-1.0, 0.5, 1.0, 1e5, np.inf])), 0)


def test_slopes_of_the_magnetisation(x64):
    kappa = np.array([1.001, 1.03, 1.1, 1.5, 4.0])
    m, h = np.asarray(magnetised(kappa)), 1e-4 * (kappa - 1)
    np.testing.assert_allclose(slopes(kappa), m * (1 - m**2) / (1 - kappa * (1 - m**2)), rtol=1e-9)  # of the equation
    by_differences = (slopes(kappa + h) - slopes(kappa - h)) / (2 * h)
    np.testing.assert_allclose(curvatures(kappa), by_differences, rtol=1e-5)


def test_onset_of_the_magnetisation(x64):
    for kappa in (1.001, 1.0001):
        assert float(magnetisation(kappa)) ** 2 == pytest.approx(3 * (kappa - 1) / kappa**3, rel=2 * (kappa - 1))


def test_single_precision():
    kappas = 1 + np.geomspace(1e-3, 20, 25).astype(np.float32)
    with jax.enable_x64(True):
        double = np.asarray(magnetised(kappas.astype(np.float64)))
    got = magnetised(kappas)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, double, rtol=2e-6)
    assert np.all(np.isfinite(slopes(kappas)))


# --- the maximum that leaves the symmetric point


@LAW
@given(st.floats(0.8, 3), st.floats(0.1, 0.6), st.floats(0.2, 2), st.floats(0.1, 0.98))
def test_branch_is_the_maximum_of_the_density(m, s2, rate, share):
    with jax.enable_x64(True):
        t = share * float(mode_speciation_time(m, s2, rate, 0.7))
        got = float(branches(m, s2, rate, t, 0.7))
        at = jax.grad(minus_log_density)(got, m, s2, rate, t, 0.7)
        assert float(at) == pytest.approx(0, abs=1e-10)
        assert float(second(got, m, s2, rate, t, 0.7)) > 0
        assert 0 < got < m * np.exp(-rate * t)
        assert float(branches(m, s2, rate, 1.001 / share * t, 0.7)) == 0


def test_branch_in_several_modes(x64):
    m, s2, sigma2 = np.array([1.2, -0.8, 0.5]), np.array([0.2, 0.4, 0.9]), 0.6
    spread = s2 + sigma2

    def density(y):
        return -np.logaddexp(*(-((y - c * m) ** 2 / (2 * spread)).sum() for c in (1, -1)))

    found = minimize(density, m, method="BFGS", options={"gtol": 1e-9}).x
    kappa = float((m**2 / spread).sum())
    np.testing.assert_allclose(found, m * float(magnetisation(kappa)), rtol=1e-6)


@pytest.mark.parametrize("numbers", [(2.0, 0.5, 0.6, 0.7), (1.3, 0.2, -0.1, 1.0), (1.0, 0.0, 1.0, 1.0)])
def test_amplitude_law(x64, numbers):
    m, s2, rate, noise = numbers
    time = float(mode_speciation_time(*numbers))
    for early in (1e-4, 1e-5):
        square = float(magnetisation(mode_kappa(m, s2, rate, time - early, noise))) ** 2
        assert square / early == pytest.approx(float(onset_slope(*numbers)), rel=50 * early)
    slope = jax.grad(mode_kappa, 3)(m, s2, rate, time, noise)
    assert float(onset_slope(*numbers)) == pytest.approx(-3 * float(slope), rel=1e-12)
