"""Pairs whose replicas are clustered: docs/theory.md, section 13.4."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.optimize import brentq

from ou_theory import replica_speciation as rs
from ou_theory.replica_speciation import Modes, ReplicaPair

LAW = settings(max_examples=25, deadline=None, derandomize=True)
correlations = st.floats(-0.95, 0.95)
curvatures = jax.jit(rs.replica_curvatures)
slope_of_onset = jax.jit(jax.grad(rs.marginal_onset))


def four_clusters(x, pair, b, g, t, noise):
    """-log p_t of both replicas (2,), from the four components and the matrices of the process."""
    drift = jnp.array([[b, -g], [-g, b]])
    factor = jax.scipy.linalg.expm(-drift * t)
    stationary = noise / (b**2 - g**2) * jnp.array([[b, g], [g, b]])
    within = pair.variance * jnp.array([[1, pair.within_correlation], [pair.within_correlation, 1]])
    precision = jnp.linalg.inv(factor @ within @ factor.T + stationary - factor @ stationary @ factor.T)
    labels = jnp.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    weights = (1 + pair.label_correlation * labels[:, 0] * labels[:, 1]) / 4
    away = x - pair.centre * labels @ factor.T
    return -jax.nn.logsumexp(jnp.log(weights) - jnp.einsum("ai,ij,aj->a", away, precision, away) / 2)


hessian = jax.jit(jax.hessian(four_clusters))
TO_MODES = np.array([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5


@LAW
@given(st.floats(0.5, 3), st.floats(0.1, 1), correlations, correlations, st.floats(-0.9, 0.9), st.floats(0.1, 1.5))
def test_curvatures_are_those_of_the_four_clusters(m, s2, label, within, g, t):
    with jax.enable_x64(True):
        pair = ReplicaPair(m, s2, label, within)
        expected = TO_MODES @ np.asarray(hessian(jnp.zeros(2), pair, 1.0, g, t, 0.8)) @ TO_MODES.T
        got = curvatures(pair, 1.0, g, t, 0.8)
        scale = np.abs(expected).max()
        np.testing.assert_allclose(np.diag([float(v) for v in got]), expected, rtol=1e-9, atol=1e-11 * scale)


@LAW
@given(st.floats(0.05, 12), st.floats(0.05, 12), correlations)
def test_aligned_weight(common, difference, label):
    """By Bayes' rule on the masses of the four components at the origin."""
    with jax.enable_x64(True):
        aligned, opposite = (1 + label) * np.exp(-common / 2), (1 - label) * np.exp(-difference / 2)
        got = rs.aligned_weight(Modes(jnp.asarray(common), jnp.asarray(difference)), label)
        assert float(got) == pytest.approx(aligned / (aligned + opposite), rel=1e-12)


def test_one_pure_mode_is_the_mode_mixture(x64):
    """Labels that always agree leave clusters in the common mode alone."""
    pair = ReplicaPair(1.5, 0.4, 1 - 1e-15)
    times = rs.replica_speciation_times(pair, 1.0, 0.3)
    assert float(times.common) == pytest.approx(np.log1p(0.7 * (2 * 1.5**2 - 0.4)) / 1.4, rel=1e-9)
    assert float(times.difference) == 0


# --- the order of the transition


def along_difference(v, weight, kappa):
    """-log of a mode's density, clusters of the weight `weight` at the origin, in units of P = 1."""
    return v**2 / 2 - jnp.log1p(weight * (jnp.cosh(jnp.sqrt(kappa) * v) - 1))


@LAW
@given(st.floats(0.05, 1), st.floats(0.5, 6))
def test_quartic_by_derivatives(weight, kappa):
    with jax.enable_x64(True):
        fourth = along_difference
        for _ in range(4):
            fourth = jax.grad(fourth)
        expected = float(fourth(0.0, weight, kappa)) / 24 / kappa**2  # z = sqrt(kappa) v
        assert float(rs.replica_quartic(weight)) == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_tricritical_point(x64):
    assert rs.TRICRITICAL_KAPPA == 3
    at_onset = rs.replica_quartic(1 / np.array([2.9, 3.0, 3.1]))
    assert at_onset[0] > 0 > at_onset[2]
    assert abs(float(at_onset[1])) < 1e-17
    # just beyond the onset a kappa below 3 gives a small maximum, one above 3 a distant one
    v = np.linspace(0, 4, 40001)
    for kappa, far in ((2.9, False), (3.3, True)):
        away = v[np.argmin(along_difference(v, 1.0001 / kappa, kappa))]
        assert (away > 0.5) == far
    clean = rs.replica_quartic(1.0)  # all states clustered: -log cosh z, 1/12
    assert float(clean) == pytest.approx(1 / 12)


# --- the marginal


def test_marginal_threshold(x64):
    assert rs.marginal_threshold() == pytest.approx(0.691438, abs=5e-7)
    kappa = np.linspace(0, 30, 300001)
    for weight, unstable in ((0.6913, False), (0.6916, True), (0.5, False)):
        assert bool(np.any(np.asarray(rs.marginal_instability(kappa, weight)) > 1)) == unstable


@LAW
@given(st.floats(0.6915, 0.999999))
def test_marginal_onset(weight):
    with jax.enable_x64(True):
        got = float(rs.marginal_onset(weight))
        expected = brentq(lambda k: (k - 1) * np.exp(-k / 2) - (1 - weight) / weight, 1, 3, xtol=1e-14)
        assert got == pytest.approx(expected, rel=1e-7)
        h = 1e-6 * (weight - 0.6914) * (1 - weight)
        moved = [float(rs.marginal_onset(weight + s * h)) for s in (-1, 1)]
        assert float(slope_of_onset(weight)) == pytest.approx((moved[1] - moved[0]) / (2 * h), rel=1e-3)


def test_marginal_at_its_ends(x64):
    got = rs.marginal_onset(np.array([0.5, rs.marginal_threshold(), 1.0, np.nan]))
    np.testing.assert_allclose(got, [np.nan, 3, 1, np.nan], rtol=1e-6)
    grads = jax.vmap(jax.grad(rs.marginal_onset))(jnp.array([0.5, 0.8]))
    assert np.all(np.isfinite(grads))


# --- speciation times


@LAW
@given(st.floats(0.5, 3), st.floats(0.05, 0.9), correlations, correlations, st.floats(-0.9, 0.9))
def test_times_are_the_last_sign_changes(m, s2, label, within, g):
    with jax.enable_x64(True):
        pair = ReplicaPair(m, s2, label, within)
        found = rs.replica_speciation_times(pair, 1.0, g)
        for i, time in enumerate(found):
            time = float(time)
            later = np.asarray(curvatures(pair, 1.0, g, time + np.geomspace(1e-6, 10, 400), 1.0)[i])
            assert np.all(later > 0)
            if time > 0:
                assert float(curvatures(pair, 1.0, g, time * (1 - 1e-6), 1.0)[i]) < 0


def test_last_of_several_sign_changes(x64):
    pair, g = ReplicaPair(2.95, 0.1416, -0.37, 0.186), -0.646
    times = np.geomspace(1e-4, 3, 3001)
    signs = np.sign(np.asarray(curvatures(pair, 1.0, g, times, 1.0)))
    changes = [times[1:][np.diff(s) != 0] for s in signs]
    assert [len(c) for c in changes] == [1, 4]
    got = rs.replica_speciation_times(pair, 1.0, g)
    for time, found in zip(got, changes, strict=True):
        assert float(time) == pytest.approx(found[-1] if found.size else 0, rel=4e-3)


def test_independent_labels_open_a_gap_of_third_order(x64):
    couplings = np.array([0.02, 0.04, 0.08])
    times = rs.replica_speciation_times(ReplicaPair(2.0, 0.25), 1.0, couplings)
    gap = np.asarray(times.common - times.difference)
    assert np.all(gap < 0)  # the difference mode goes first
    ratios = gap[1:] / gap[:-1]
    assert abs(ratios[0] - 8.006) < 0.005
    assert abs(ratios[1] - 8.024) < 0.01
    law = np.asarray(rs.independent_gap_third_order(1.0, couplings, 3.75, 2.0))
    error = gap / law - 1
    np.testing.assert_allclose(error[1:] / error[:-1], 4, rtol=0.02)  # the next order is g^2 higher
    assert abs(error[0] * 4 / 3 - error[1] / 3) < 2e-5  # extrapolated to g = 0


def test_third_order_law_in_any_units(x64):
    times = rs.replica_speciation_times(ReplicaPair(2.0, 0.25), 0.7, np.array([0.01, 0.02]), 1.6)
    gap = np.asarray(times.common - times.difference)
    law = np.asarray(rs.independent_gap_third_order(0.7, np.array([0.01, 0.02]), 3.75, 2.0, 1.6))
    error = gap / law - 1
    assert abs(error[0] * 4 / 3 - error[1] / 3) < 1e-4


def test_no_gap_without_coupling_or_correlation(x64):
    times = rs.replica_speciation_times(ReplicaPair(2.0, 0.25), 1.0, 0.0)
    assert float(times.common) == pytest.approx(np.log1p(3.75) / 2, rel=1e-12)  # each replica's own
    assert float(times.difference) == pytest.approx(float(times.common), rel=1e-12)
    swapped = [rs.replica_speciation_times(ReplicaPair(2.0, 0.25, s * 0.4, s * 0.3), 1.0, s * 0.2) for s in (1, -1)]
    np.testing.assert_allclose(swapped[0], swapped[1][::-1], rtol=1e-12)


@pytest.mark.parametrize("which", [0, 1])
def test_slopes_of_the_times(x64, which):
    def time(m, s2, label, within, g):
        return rs.replica_speciation_times(ReplicaPair(m, s2, label, within), 1.0, g)[which]

    at = np.array([1.7, 0.3, 0.2, 0.1, 0.3])
    grads = jax.jit(jax.grad(time, argnums=range(5)))(*at)
    for i, grad in enumerate(grads):
        h = 1e-5 * np.eye(5)[i]
        assert float(grad) == pytest.approx((float(time(*(at + h))) - float(time(*(at - h)))) / 2e-5, rel=1e-6)


def test_times_at_their_ends():
    closer = rs.replica_speciation_times(ReplicaPair(0.3, 1.0), 1.0, np.array([0.0, 0.5]))
    np.testing.assert_array_equal(closer, 0)
    grads = jax.grad(lambda m: rs.replica_speciation_times(ReplicaPair(m, 1.0), 1.0, 0.5).common)(0.3)
    assert float(grads) == 0
    strong = rs.replica_speciation_times(ReplicaPair(2.0, 0.5, 0.5), 1.0, 1.5)
    assert float(strong.common) == np.inf
    assert 0 <= float(strong.difference) < np.inf


def test_single_precision():
    pairs = ReplicaPair(np.array([1.0, 2.0, 3.0]), 0.3, 0.2, 0.1)
    with jax.enable_x64(True):
        double = rs.replica_speciation_times(pairs, 1.0, 0.3)
    got = rs.replica_speciation_times(pairs, 1.0, 0.3)
    assert got.common.dtype == jnp.float32
    np.testing.assert_allclose(got, double, rtol=1e-4)


@pytest.mark.parametrize(("label", "within", "match"), [(1.0, 0, "label"), (-1.5, 0, "label"), (0, 1.1, "within")])
def test_bad_correlations_raise(label, within, match):
    with pytest.raises(ValueError, match=match):
        rs.replica_speciation_times(ReplicaPair(1.0, 0.3, label, within), 1.0, 0.1)


def test_matrices_of_the_test_are_the_process():
    """The hand-written covariance used above satisfies the Lyapunov equation."""
    drift = np.array([[1.0, -0.4], [-0.4, 1.0]])
    stationary = 0.8 / (1 - 0.16) * np.array([[1.0, 0.4], [0.4, 1.0]])
    np.testing.assert_allclose(drift @ stationary + stationary @ drift.T, 1.6 * np.eye(2), atol=1e-12)
    np.testing.assert_allclose(expm(-drift) @ TO_MODES[0], np.exp(-0.6) * TO_MODES[0], rtol=1e-12)
