"""What a state tells of its data: docs/theory.md, section 13.5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad
from scipy.linalg import expm, solve_continuous_lyapunov

from ou_theory import collapse as co
from ou_theory.cluster_laws import sign_correlation
from ou_theory.process import Process, symmetric_pair

LAW = settings(max_examples=25, deadline=None, derandomize=True)
DRIFT = np.array([[1.3, -0.9], [0.4, 0.8]])
COVARIANCE = np.array([[2.0, 0.6], [0.6, 1.0]])

informations = jax.jit(co.gaussian_information)


def process_of(drift, noise=0.7):
    return Process(jnp.asarray(drift, float), jnp.asarray(noise, float))


def information_by_hand(t, drift=DRIFT, noise=0.7, covariance=COVARIANCE):
    """From the covariance of the state, with and without the data, by SciPy."""
    factor = expm(-drift * t)
    stationary = solve_continuous_lyapunov(drift, 2 * noise * np.eye(len(drift)))
    given_data = stationary - factor @ stationary @ factor.T
    total = factor @ covariance @ factor.T + given_data
    return (np.linalg.slogdet(total)[1] - np.linalg.slogdet(given_data)[1]) / 2


def test_information_under_a_drift_that_is_not_normal(x64):
    times = np.array([0.01, 0.3, 1.0, 4.0])
    expected = [information_by_hand(t) for t in times]
    np.testing.assert_allclose(informations(process_of(DRIFT), times, COVARIANCE), expected, rtol=1e-9)


@LAW
@given(st.integers(0, 2**32 - 1))
def test_information_falls_with_time_under_any_drift(seed):
    rng = np.random.default_rng(seed)
    drift, root = rng.normal(size=(3, 3)), rng.normal(size=(3, 3))
    with jax.enable_x64(True):
        times = np.linspace(0.05, 3, 40) / np.linalg.norm(drift)
        assert np.all(np.diff(informations(process_of(drift), times, root @ root.T)) < 0)


def test_information_of_modes_adds_up(x64):
    joint = co.gaussian_information(symmetric_pair(1.0, 0.4, 0.7), 0.8, np.array([[2.0, 0.5], [0.5, 2.0]]))
    modes = co.mode_information(np.array([0.6, 1.4]), 0.8, np.array([2.5, 1.5]), 0.7)
    assert float(joint) == pytest.approx(float(modes.sum()), rel=1e-12)


def test_information_by_sampling():
    """The mean log ratio of the densities of the state, with and without the data."""
    rng, count = np.random.default_rng(0), 200_000
    m, s2, sigma2 = 1.2, 0.4, 0.9
    clean = rng.choice([-m, m], count) + np.sqrt(s2) * rng.normal(size=count)
    y = clean + np.sqrt(sigma2) * rng.normal(size=count)
    spread = s2 + sigma2
    total = np.logaddexp(-((y - m) ** 2) / (2 * spread), -((y + m) ** 2) / (2 * spread)) - np.log(2 * spread**0.5)
    ratio = -((y - clean) ** 2) / (2 * sigma2) - np.log(sigma2**0.5) - total
    t = 0.5 * np.log1p(sigma2)
    got = float(co.cluster_information(np.ones(1), t, np.array([s2]), np.array([m])))
    assert abs(ratio.mean() - got) < 5 * ratio.std() / count**0.5


def test_information_of_clusters_by_quadrature(x64):
    m, s2, sigma2 = 1.2, 0.4, 0.9
    spread = s2 + sigma2

    def density(y):
        return np.mean([np.exp(-((y - c * m) ** 2) / (2 * spread)) for c in (1, -1)]) / np.sqrt(2 * np.pi * spread)

    entropy, _ = quad(lambda y: -density(y) * np.log(density(y)), -15, 15, epsabs=1e-13, limit=200)
    expected = entropy - 0.5 * np.log(2 * np.pi * np.e * sigma2)
    got = co.cluster_information(np.ones(1), 0.5 * np.log1p(sigma2), np.array([s2]), np.array([m]))
    assert float(got) == pytest.approx(expected, rel=1e-9)


def test_class_information_references(x64):
    assert float(co.class_information(2.0)) == pytest.approx(0.5000721361, rel=1e-9)
    np.testing.assert_allclose(co.class_information(np.array([0.0, 200.0])), [0, np.log(2)], atol=1e-15)
    small = 1e-4
    assert float(co.class_information(small)) == pytest.approx(small / 2 - small**2 / 4, rel=1e-6)


@LAW
@given(st.lists(st.floats(0, 60), min_size=6, max_size=6))
def test_class_information_rises_between_its_bounds(kappas):
    with jax.enable_x64(True):
        got = np.asarray(co.class_information(np.sort(kappas)))
    assert np.all((got >= 0) & (got <= np.log(2)))
    assert np.all(np.diff(got) >= -1e-15)


@pytest.mark.parametrize("kappa", [0.0, 1e-8, 0.3, 2.0, 30.0])
def test_slope_of_the_class_information(x64, kappa):
    slope = float(jax.grad(co.class_information)(kappa))
    assert slope == pytest.approx((1 - float(sign_correlation(jnp.asarray(kappa)))) / 2, rel=1e-7, abs=1e-15)
    if kappa > 0.01:
        h = 1e-4
        moved = [float(co.class_information(kappa + s * h)) for s in (-1, 1)]
        assert slope == pytest.approx((moved[1] - moved[0]) / (2 * h), rel=1e-6, abs=1e-10)
        moved = [float(jax.grad(co.class_information)(kappa + s * h)) for s in (-1, 1)]
        curvature = float(jax.grad(jax.grad(co.class_information))(kappa))
        assert curvature == pytest.approx((moved[1] - moved[0]) / (2 * h), rel=1e-6, abs=1e-10)


def test_class_information_in_single_precision():
    kappas = np.geomspace(1e-3, 50, 20)
    with jax.enable_x64(True):
        double = np.asarray(co.class_information(kappas))
    got = co.class_information(kappas)
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, double, atol=5e-6)
    assert np.all((got >= 0) & (got <= np.float32(np.log(2))))
