"""Bounds on couplings, stationary states and left modes of the coupled process (section 12.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import solve_continuous_lyapunov

from ou_theory import process as ou

LAW = settings(max_examples=25, deadline=None, derandomize=True)
entries = st.floats(-2, 2)
squares = st.lists(entries, min_size=9, max_size=9).map(lambda v: np.reshape(v, (3, 3)))
pairs = st.tuples(entries, entries, entries, entries).map(lambda v: np.array([[v[0], -v[1]], [-v[2], v[3]]]))

DRIFTS = {
    "symmetric": [[1.0, -0.4], [-0.4, 1.0]],
    "anisotropic": [[1.3, -0.5], [-0.2, 0.8]],
    "one way": [[1.0, -3.0], [0.0, 0.5]],
    "rotating": [[0.3, -2.0], [2.0, 0.4]],
    "defective": [[1.0, -5.0], [0.0, 1.0]],
    "marginal": [[1.0, -1.0], [-1.0, 1.0]],
    "unstable": [[0.2, -1.0], [-0.5, -0.3]],
    "nothing": [[0.0, 0.0], [0.0, 0.0]],
}

transition = jax.jit(ou.transition)
stationary_covariance = jax.jit(ou.stationary_covariance)
entropy_production = jax.jit(ou.entropy_production)
left_modes = jax.jit(ou.left_modes)


def process_of(drift, noise=0.7):
    return ou.Process(jnp.asarray(drift, float), jnp.asarray(noise, float))


# --- replicas, bounds, stationary states


@LAW
@given(st.floats(0.1, 2), st.floats(-2, 2), st.sampled_from([2, 5]))
def test_rates_of_replicas(b, g, count):
    with jax.enable_x64(True):
        rates, modes = left_modes(ou.replicas(b, g, count))
        expected = np.sort([b - (count - 1) * g] + (count - 1) * [b + g])
        np.testing.assert_allclose(rates, expected, atol=1e-12)
        np.testing.assert_allclose(modes @ modes.T, np.eye(count), atol=1e-12)
        low, high = ou.symmetric_bound(b, count)
        for near, stable in ((low, False), (low * 0.99, True), (high * 0.99, True), (high, False)):
            assert bool(ou.is_stable(ou.replicas(b, near, count))) == stable


def test_rates_of_a_graph(x64):
    ring = np.roll(np.eye(5), 1, 0) + np.roll(np.eye(5), -1, 0)
    process = ou.coupled(1.0, ring, 0.3, 0.7)
    np.testing.assert_allclose(left_modes(process).rates, np.sort(1 - 0.6 * np.cos(2 * np.pi * np.arange(5) / 5)))
    np.testing.assert_array_equal(ou.coupled(1.0, 1 - np.eye(2), 0.4).drift, ou.symmetric_pair(1.0, 0.4).drift)
    assert not ou.has_real_modes(ou.coupled(1.0, np.roll(np.eye(5), 1, 0), 0.3))  # a ring of one direction


@settings(max_examples=100, deadline=None, derandomize=True)
@given(pairs)
def test_bounds_of_two_replicas(drift):
    (b1, g12), (g21, b2) = drift * np.array([[1, -1], [-1, 1]])
    gaps = b1 + b2, b1 * b2 - g12 * g21, b1 * b2 - ((g12 + g21) / 2) ** 2, ((b1 - b2) / 2) ** 2 + g12 * g21
    with jax.enable_x64(True):
        process = process_of(drift)
        if min(abs(gap) for gap in gaps) < 1e-9:
            return
        assert bool(ou.is_stable(process)) == (gaps[0] > 0 and gaps[1] > 0)
        assert bool(ou.is_contracting(process)) == (gaps[0] > 0 and gaps[2] > 0)
        assert bool(ou.has_real_modes(process)) == (gaps[3] > 0)
        norms = np.linalg.norm(transition(process, np.geomspace(1e-4, 10, 60)).factor, 2, axis=(1, 2))
        if ou.is_contracting(process):
            assert np.all(norms <= 1 + 1e-12)
        else:
            least = np.linalg.eigvalsh((drift + drift.T) / 2)[0]
            assert norms.max() > 1 or least > -0.01  # a tiny growth may be over before the first of these times


def test_bounds_at_the_margin():
    marginal = process_of(DRIFTS["marginal"])
    assert not ou.is_stable(marginal)
    assert ou.is_contracting(marginal)
    for double in ([[1.0, -5.0], [0.0, 1.0]], [[2.0, -1.0], [1.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]]):
        assert ou.has_real_modes(process_of(double))
    assert not ou.is_contracting(process_of(DRIFTS["defective"]))  # stable, and yet it amplifies
    assert float(ou.speciation_bound(1.0, 24.0)) == pytest.approx(1 + 1 / 24)
    np.testing.assert_array_equal(ou.speciation_bound(1.0, jnp.array([0.0, -2.0])), np.inf)
    assert float(jax.grad(ou.speciation_bound, 1)(1.0, 0.0)) == 0


@LAW
@given(st.floats(0.1, 2), st.floats(0.05, 50), st.floats(0.1, 3))
def test_speciation_bound_is_where_the_clock_diverges(b, spread, noise):
    with jax.enable_x64(True):
        bound = float(ou.speciation_bound(b, spread, noise))
        assert np.isfinite(ou.transition_time(b - (bound - 1e-9), spread, noise))
        assert np.isinf(ou.transition_time(b - (bound + 1e-9), spread, noise))


@LAW
@given(squares, st.floats(0.1, 3))
def test_stationary_state(drift, noise):
    drift = drift + (0.1 - min(0.0, np.linalg.eigvals(drift).real.min())) * np.eye(3)
    with jax.enable_x64(True):
        process = process_of(drift, noise)
        covariance = np.asarray(stationary_covariance(process))
        solved = solve_continuous_lyapunov(drift, 2 * noise * np.eye(3))
        np.testing.assert_allclose(covariance, solved, rtol=0, atol=1e-9 * np.abs(solved).max())
        # tr(K Sigma K^T) / D - tr K, in which the part of detailed balance cancels
        expected = np.trace(drift @ covariance @ drift.T) / noise - np.trace(drift)
        assert float(entropy_production(process)) == pytest.approx(expected, rel=1e-6, abs=1e-8)
        assert float(entropy_production(process)) >= 0


@LAW
@given(pairs.filter(lambda k: k[0, 0] + k[1, 1] > 0.05 and np.linalg.det(k) > 0.05), st.floats(0.1, 3))
def test_entropy_production_of_two_replicas(drift, noise):
    with jax.enable_x64(True):
        got = float(entropy_production(process_of(drift, noise)))
        assert got == pytest.approx((drift[0, 1] - drift[1, 0]) ** 2 / np.trace(drift), rel=1e-9, abs=1e-14)
        symmetric = process_of(drift + drift.T + 4 * np.eye(2), noise)
        assert float(entropy_production(symmetric)) == 0


def test_coupling_correlates(x64):
    for g in (-0.6, 0.3, 0.9):
        covariance = np.asarray(stationary_covariance(ou.symmetric_pair(1.0, g, 0.7)))
        np.testing.assert_allclose(covariance, 0.7 / (1 - g**2) * np.array([[1, g], [g, 1]]), rtol=1e-12)


def test_unstable_drifts_have_no_stationary_state():
    for name in ("marginal", "unstable", "nothing"):
        for function in (ou.stationary_covariance, ou.entropy_production):
            with pytest.raises(ValueError, match="stationary"):
                function(process_of(DRIFTS[name]))
        assert np.isnan(jax.jit(ou.stationary_covariance)(process_of(DRIFTS[name]))).all()


# --- left modes


@pytest.mark.parametrize("name", ["symmetric", "anisotropic", "one way", "unstable"])
def test_left_modes_move_alone(x64, name):
    process = process_of(DRIFTS[name])
    rates, modes = left_modes(process)
    assert np.all(np.diff(rates) >= 0)
    np.testing.assert_allclose(modes @ process.drift, rates[:, None] * modes, atol=1e-13)
    np.testing.assert_allclose(jnp.linalg.norm(modes, axis=1), 1, rtol=1e-14)
    covariance = transition(process, 0.9).covariance
    np.testing.assert_allclose(
        jnp.diagonal(modes @ covariance @ modes.T), ou.mode_variance(rates, 0.9, 0.7), rtol=1e-12
    )


def test_left_modes_of_the_exceptions(x64):
    np.testing.assert_allclose(ou.left_modes(ou.symmetric_pair(1.0, 0.4)).modes * 2**0.5, [[1, 1], [1, -1]], rtol=1e-12)
    np.testing.assert_allclose(ou.left_modes(process_of(DRIFTS["defective"])).modes, [[0, 1], [0, 1]], atol=1e-12)
    with pytest.raises(ValueError, match="rotate"):
        ou.left_modes(process_of(DRIFTS["rotating"]))
    assert all(np.isnan(v).all() for v in jax.jit(ou.left_modes)(process_of(DRIFTS["rotating"])))


def test_left_modes_have_slopes(x64):
    """Also where the drift is symmetric, and away from symmetry; a defective one has none."""
    way = np.array([[0.3, -1.0], [0.7, 0.4]])

    def along(h, drift):
        return left_modes(process_of(drift + h * way))

    slopes = jax.jit(jax.jacrev(along))
    for name in ("anisotropic", "one way", "symmetric"):
        drift = np.asarray(DRIFTS[name])
        for a, low, high in zip(slopes(0.0, drift), along(-1e-5, drift), along(1e-5, drift), strict=True):
            np.testing.assert_allclose(a, (high - low) / 2e-5, rtol=1e-6, atol=1e-8)
    assert not np.isfinite(slopes(0.0, np.asarray(DRIFTS["defective"])).modes).all()
