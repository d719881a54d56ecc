"""Closed forms of Gaussian modes and of a constant difference gain: docs/theory.md, sections 4 and 5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from ou_theory import gain_model as gm
from ou_theory.special import exprel, log1prel

LAW = settings(max_examples=25, deadline=None, derandomize=True)
gains = st.floats(0.001, 0.999)
ratios = st.floats(1e-6, 1e6)


def slope(function, at, h=1e-4):
    """Central difference of fourth order."""
    f = [float(function(at + i * h)) for i in (-2, -1, 1, 2)]
    return (f[0] - 8 * f[1] + 8 * f[2] - f[3]) / (12 * h)


# --- special functions


@pytest.mark.parametrize("x", [-0.9, -0.3, -2e-2, -1e-4, -1e-7, 0.0, 1e-9, 1e-4, 2e-2, 0.5, 3.0])
def test_relative_functions_and_their_slopes(x64, x):
    expected = (np.expm1(x) / x, np.log1p(x) / x) if x else (1.0, 1.0)
    for function, value in zip((exprel, log1prel), expected, strict=True):
        assert float(function(x)) == pytest.approx(value, rel=1e-13)
        assert float(jax.grad(function)(x)) == pytest.approx(slope(function, x, 1e-3), rel=1e-6)


# --- one mode, uncoupled


def test_uncoupled_references(x64):
    assert float(gm.transition_time(0.6, 3.0)) == pytest.approx(0.8580161810, rel=1e-9)
    assert float(gm.commitment_time(5.0, 0.8)) == pytest.approx(0.4054651081, rel=1e-9)
    assert float(gm.commitment_log_snr(7.0)) == pytest.approx(-np.log(7), rel=1e-14)


@LAW
@given(st.floats(-2, 2), st.floats(0.05, 2), st.floats(0.1, 3))
def test_transition_time_inverts_the_pulled_back_noise(rate, time, noise):
    with jax.enable_x64(True):
        spread = 2 * noise * time * exprel(2 * rate * time)
        assert float(gm.transition_time(rate, spread, noise)) == pytest.approx(time, rel=1e-9)


@LAW
@given(st.floats(-0.9, 5), st.floats(0.1, 3), st.floats(0.1, 3), st.floats(0.2, 5))
def test_transition_time_scales_and_is_monotone(z, spread, noise, c):
    rate = z * noise / spread  # a finite time needs z > -1
    with jax.enable_x64(True):
        time = float(gm.transition_time(rate, spread, noise))
        assert float(gm.transition_time(c * rate, spread, c * noise)) == pytest.approx(time / c, rel=1e-12)
        assert float(gm.transition_time(rate + 0.01, spread, noise)) < time
        assert float(gm.transition_time(rate, 1.01 * spread, noise)) > time


def test_transition_time_at_its_ends(x64):
    assert float(gm.transition_time(0.0, 3.0, 2.0)) == 0.75
    assert float(jax.grad(gm.transition_time)(0.0, 3.0)) == pytest.approx(-2.25)  # -spread^2 / 4
    got = gm.transition_time(jnp.array([-1.0, -2.0, -0.5, -0.5]), jnp.array([1.0, 1.0, 0.0, -1.0]))
    np.testing.assert_array_equal(got, [np.inf, np.inf, 0, 0])
    grads = jax.vmap(jax.grad(gm.transition_time))(jnp.array([-1.0, -2.0]), jnp.ones(2))
    assert not np.any(np.isnan(grads))


@LAW
@given(ratios, st.floats(0.01, 0.99))
def test_commitment_level_is_where_q_reaches_the_share(variance, q):
    with jax.enable_x64(True):
        ell = gm.commitment_log_snr(variance, q)
        assert float(gm.q_uncoupled(variance * jnp.exp(ell))) == pytest.approx(q, rel=1e-10)
        time = 0.5 * np.log1p(np.exp(-float(ell)))  # the same instant on the OU clock
        assert float(gm.commitment_time(variance, q)) == pytest.approx(time, rel=1e-9)


@LAW
@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=6))
def test_effective_variance(variances):
    s = np.array(variances)
    got = gm.effective_variance(s)
    assert s.mean() * (1 - 1e-9) <= got <= (s**2).sum() / s.sum() * (1 + 1e-9)
    assert (s**2 / (s + got)).sum() == pytest.approx(s.sum() / 2, rel=1e-9)
    assert gm.effective_variance(3 * s) == pytest.approx(3 * got, rel=1e-9)


@pytest.mark.parametrize("bad", [[], [1.0, 0.0], [1.0, -2.0], [np.nan]])
def test_effective_variance_needs_positive_variances(bad):
    with pytest.raises(ValueError, match="positive"):
        gm.effective_variance(bad)


def test_power_law(x64):
    np.testing.assert_allclose(gm.power_law(100.0, 2.0, 3), [100, 25, 100 / 9])
    exponents = np.array([0.5, 1, 1.5, 2, 3, 4])
    ends = np.stack([gm.power_law(100.0, a, 16)[jnp.array([0, -1])] for a in exponents])
    gap = np.diff(gm.commitment_log_snr(ends), axis=1)[:, 0]
    np.testing.assert_allclose(gap, [1.386, 2.773, 4.159, 5.545, 8.318, 11.090], atol=6e-4)
    times = gm.commitment_time(ends)
    by_formula = [gm.power_law_time_gap(100.0, a, 16) for a in exponents]
    np.testing.assert_allclose(by_formula, times[:, 0] - times[:, 1], rtol=1e-12)
    assert float(gm.power_law_time_gap(100.0, 40.0, 16)) == pytest.approx(0.5 * np.log(101), rel=1e-12)


# --- a constant gain: references, table, limits


def test_gain_references(x64):
    got = [
        gm.q_ode(2.0, 0.8),
        gm.q_sde(2.0, 0.8),
        gm.w_ode(0.8),
        gm.w_sde(0.8),
        gm.synchronization_snr(0.5, 0.9, 0.01),
        gm.latched_level_ode(2.0, 0.9, 9.0),
        gm.critical_rho(0.5),
        gm.class_mean_difference(0.3, 0.7),
    ]
    expected = [
        0.3425030664,
        0.3317980604,
        0.3727077967,
        0.3474454549,
        124.7394392,
        2.991185895,
        0.8674667402,
        0.6130314214,
    ]
    np.testing.assert_allclose([float(v) for v in got], expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("share", "expected"),
    [
        (gm.w_ode, [1, 0.8714, 0.7811, 0.5923, 0.4030, 0.2100, 0.1165, 0.0362, 0.0089, 0.0007, 0]),
        (gm.w_sde, [1, 0.8410, 0.7433, 0.5541, 0.3755, 0.1975, 0.1110, 0.0352, 0.0087, 0.0007, 0]),
    ],
)
def test_table_of_decided_shares(x64, share, expected):
    g = np.array([0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 1])
    np.testing.assert_allclose(share((1 - g) / (1 + g)), expected, atol=0.0000501)


def test_residual_shares_of_small_contractions(x64):
    got = gm.w_ode(np.array([0.99, 0.95, 0.9, 0.8, 0.5]))
    np.testing.assert_allclose(got, [0.927, 0.738, 0.579, 0.373, 0.096], atol=0.000501)


FLOWS = [(gm.q_ode, gm.w_ode, gm.peak_ode), (gm.q_sde, gm.w_sde, gm.peak_sde)]


@pytest.mark.parametrize("flow", FLOWS, ids=["ode", "sde"])
def test_share_is_the_maximum_of_q(x64, flow):
    q, w, peak = flow
    x = np.geomspace(1e-3, 1e7, 200_001)
    for rho in (0.02, 0.3, 0.499999, 0.5, 0.500001, 0.75, 0.98):
        curve = np.asarray(q(x, rho))
        assert float(w(rho)) == pytest.approx(curve.max(), rel=1e-7)
        assert float(peak(rho)) == pytest.approx(x[curve.argmax()], rel=1e-3)
        assert float(q(peak(rho), rho)) == pytest.approx(float(w(rho)), rel=1e-12)


@pytest.mark.parametrize("flow", FLOWS, ids=["ode", "sde"])
def test_ends_of_the_gain(x64, flow):
    q, w, peak = flow
    x = np.array([0.0, 0.3, 1.0, 40.0])
    np.testing.assert_allclose(q(x, 1.0), x / (1 + x), rtol=1e-13)
    np.testing.assert_array_equal(q(x, 0.0), 0)
    np.testing.assert_allclose(q(x, 1e-6) / 1e-12, x / (1 + x) ** 2, rtol=1e-4)
    assert float(w(1.0)) == 1
    assert float(w(0.0)) == 0
    assert float(w(1e-6)) == pytest.approx(0.25e-12, rel=1e-4)
    assert float(peak(1.0)) == np.inf
    assert float(peak(0.0)) == 1


@LAW
@given(ratios, gains, st.floats(0, 0.99))
def test_order_of_the_flows(x, rho, start):
    x0 = start * x
    with jax.enable_x64(True):
        ode, sde = float(gm.q_ode(x, rho, x0)), float(gm.q_sde(x, rho, x0))
        assert 0 <= sde <= ode * (1 + 1e-12)
        assert float(gm.q_ode(x, rho + 0.001, x0)) > ode
        assert float(gm.q_sde(x, rho + 0.001, x0)) > sde
        w_ode, w_sde = float(gm.w_ode(rho)), float(gm.w_sde(rho))
        assert w_sde <= w_ode * (1 + 1e-12)
        assert w_ode <= rho**2
        assert float(gm.q_sde(x, rho)) <= w_sde * (1 + 1e-12)
        assert float(gm.q_ode(x, rho)) <= w_ode * (1 + 1e-12)


@LAW
@given(ratios, gains)
def test_both_flows_start_with_the_same_energy(x0, rho):
    with jax.enable_x64(True):
        expected = rho**2 * x0 / (1 + x0)
        assert float(gm.q_ode(x0, rho, x0)) == pytest.approx(expected, rel=1e-9)
        assert float(gm.q_sde(x0, rho, x0)) == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("rho", [0.3, 0.5, 0.9])
def test_closed_forms_solve_the_moment_equation(x64, rho):
    """Variance of the mode over log sigma: ``V' = 2 (1 - rho W) V``; twice that and ``- 2 sigma^2`` for the SDE."""
    variance, start = 2.0, 30.0

    def moments(stochastic):
        def rate(s, v):
            sigma2 = np.exp(2 * s)
            drift = 2 * (1 - rho * variance / (variance + sigma2)) * v
            return 2 * drift - 2 * sigma2 if stochastic else drift

        span = (np.log(start), np.log(0.2))
        return solve_ivp(rate, span, [variance + start**2], rtol=1e-11, atol=1e-11, method="DOP853").y[0, -1]

    x, x0 = variance / 0.2**2, variance / start**2
    wiener = x / (1 + x)
    for stochastic, closed in ((False, gm.q_ode), (True, gm.q_sde)):
        expected = (rho * wiener) ** 2 * moments(stochastic) / variance
        assert float(closed(x, rho, x0)) == pytest.approx(expected, rel=1e-8)


def test_removable_points_of_the_sde(x64):
    x = np.array([0.3, 1.0, 40.0])
    share = 1 / (1 + x)
    np.testing.assert_allclose(gm.q_sde(x, 0.5), -0.25 * share * np.log(share), rtol=1e-13)
    assert float(gm.peak_sde(0.5)) == pytest.approx(np.e - 1, rel=1e-13)
    assert float(gm.w_sde(0.5)) == pytest.approx(0.25 / np.e, rel=1e-13)
    for function in (gm.w_sde, gm.peak_sde, lambda rho: gm.q_sde(3.0, rho), lambda rho: gm.q_sde(3.0, rho, 0.1)):
        assert float(jax.grad(function)(0.5)) == pytest.approx(slope(function, 0.5, 1e-3), rel=1e-7)


@pytest.mark.parametrize("q", [gm.q_ode, gm.q_sde])
def test_gradients_of_q_at_the_ends(x64, q):
    """Q is smooth at rho = 1 and at X = 0; its peak has infinite slope in rho at 1."""
    assert float(jax.grad(q, 1)(3.0, 1.0)) == pytest.approx(slope(lambda rho: q(3.0, rho), 1.0), rel=1e-7)
    assert float(jax.grad(q, 0)(3.0, 1.0)) == pytest.approx(1 / 16, rel=1e-12)
    assert float(jax.grad(q, 0)(0.0, 0.7)) == pytest.approx(0.49, rel=1e-12)
    assert float(jax.grad(q, 1)(3.0, 0.0)) == 0


@pytest.mark.parametrize("w", [gm.w_ode, gm.w_sde])
def test_gradients_of_the_share(x64, w):
    for rho in (0.1, 0.25, 0.45, 0.7, 0.95):
        assert float(jax.grad(w)(rho)) == pytest.approx(slope(w, rho), rel=1e-7)
    assert float(jax.grad(w)(1.0)) == np.inf
    assert (float(w(1.0)) - float(w(1 - 1e-8))) / 1e-8 > 10  # and so it is


@LAW
@given(st.floats(0.01, 0.97), st.sampled_from(["ode", "sde"]))
def test_critical_gain_inverts_the_share(threshold, flow):
    with jax.enable_x64(True):
        w = gm.w_ode if flow == "ode" else gm.w_sde
        assert float(w(gm.critical_rho(threshold, flow))) == pytest.approx(threshold, rel=1e-9)


def test_critical_gain_references():
    for flow, rho, g in (("ode", 0.86746674, 0.07096954), ("sde", 0.88287120, 0.06220755)):
        got = gm.critical_rho(0.5, flow)
        assert got == pytest.approx(rho, abs=5e-9)
        assert (1 - got) / (1 + got) == pytest.approx(g, abs=5e-9)
    for sde_half in (0.25 / np.e, 0.25 / np.e * (1 + 1e-9)):  # the removable point of the SDE
        assert gm.critical_rho(sde_half, "sde") == pytest.approx(0.5, abs=1e-8)


@pytest.mark.parametrize("threshold", [0.0, 1.0, -1.0, np.nan])
def test_critical_gain_needs_a_share(threshold):
    with pytest.raises(ValueError, match="threshold"):
        gm.critical_rho(threshold)


# --- difference against common mode


@LAW
@given(ratios, gains, st.floats(0, 0.99))
def test_relative_ratio_is_difference_over_common(x, rho, start):
    x0 = start * x
    with jax.enable_x64(True):
        ratio = float(gm.relative_ratio(x, rho, x0))
        assert ratio == pytest.approx(float(gm.q_ode(x, rho, x0) / gm.q_uncoupled(x)), rel=1e-9)
        assert 0 <= ratio <= rho**2 * (1 + 1e-12)
        assert float(gm.relative_ratio(1.01 * x, rho)) < float(gm.relative_ratio(x, rho))


@LAW
@given(st.floats(0.1, 0.95), st.floats(0.05, 0.9), st.floats(0, 0.1))
def test_synchronization_inverts_the_ratio(rho, share, x0):
    threshold = share * rho**2
    with jax.enable_x64(True):
        snr = gm.synchronization_snr(threshold, rho, x0)
        assert float(gm.relative_ratio(snr, rho, x0)) == pytest.approx(threshold, rel=1e-8)
        assert float(gm.synchronization_snr(rho**2 * 1.1, rho, x0)) < x0  # synchronised from the start


# --- latched level


@LAW
@given(st.floats(0.05, 0.98), st.floats(0.05, 20), st.floats(15, 25))
def test_latched_level_is_the_integral_of_the_latched_curve(rho, variance, end):
    with jax.enable_x64(True):
        ell = np.linspace(-30, end, 20_001)
        m = np.maximum.accumulate(np.asarray(gm.q_ode(variance * np.exp(ell), rho)))
        assert float(gm.latched_level_ode(variance, rho, end)) == pytest.approx(end - np.trapezoid(m, ell), abs=1e-4)


def test_latched_level_without_coupling_is_unit_snr(x64):
    variances = np.array([20.0, 1.0, 0.05])
    np.testing.assert_allclose(gm.latched_level_ode(variances, 1.0, 9.0), -np.log(variances), atol=1e-13)
    near = gm.latched_level_ode(variances, 1 - 1e-7, 9.0)
    np.testing.assert_allclose(near, -np.log(variances), atol=1e-4)
    np.testing.assert_allclose(gm.latched_level_ode(variances, 0.0, 9.0), 9.0)  # nothing is decided
    grad = jax.grad(lambda rho: gm.latched_level_ode(2.0, rho, 9.0))
    assert float(grad(0.9)) == pytest.approx(slope(lambda rho: gm.latched_level_ode(2.0, rho, 9.0), 0.9), rel=1e-7)


@LAW
@given(gains, st.floats(0.01, 100), st.floats(0.01, 100), st.floats(0.1, 10))
def test_latched_gap_depends_on_the_ratio_of_variances(rho, low, high, c):
    with jax.enable_x64(True):
        levels = gm.latched_level_ode(np.array([low, high]), rho, 9.0)
        scaled = gm.latched_level_ode(c * np.array([low, high]), rho, 9.0)
        gap = float(levels[1] - levels[0])
        assert gap == pytest.approx(float(gm.w_ode(rho)) * np.log(low / high), abs=1e-12)
        assert float(scaled[1] - scaled[0]) == pytest.approx(gap, abs=1e-12)
        assert np.sign(gap) == np.sign(np.log(low / high)) or abs(gap) < 1e-12


# --- different class means


@pytest.mark.parametrize("rho", [0.2, 0.7, 1.0])
@pytest.mark.parametrize("start_share", [0.999, 0.9])
def test_class_means_solve_the_flow(x64, rho, start_share):
    """Unit variance: ``dy / dlog sigma = y - rho (W y + (1 - W) mu)``, from equal states."""

    def rate(s, y):
        wiener = 1 / (1 + np.exp(2 * s))
        return y - rho * (wiener * y + (1 - wiener))

    for share in (0.6, 0.1, 0.01):
        span = [0.5 * np.log(x / (1 - x)) for x in (start_share, share)]
        expected = solve_ivp(rate, span, [0.0], rtol=1e-11, atol=1e-12, method="DOP853").y[0, -1]
        assert float(gm.class_mean_difference(share, rho, start_share)) == pytest.approx(expected, rel=1e-8)


def test_class_means_at_the_ends(x64):
    x = np.array([0.9, 0.5, 0.1])
    np.testing.assert_allclose(gm.class_mean_difference(x, 1.0, 0.95), 1 - np.sqrt(0.05 / (1 - x)), rtol=1e-12)
    np.testing.assert_allclose(gm.class_mean_difference(x, 0.0), 0)
    assert float(gm.class_mean_difference(1e-12, 0.8)) < 0.1 < float(gm.class_mean_difference(0.3, 0.8))
    assert float(gm.class_mean_difference(0.9, 0.7, 0.9)) == 0


# --- precision


@jax.jit
def curves():
    x, rho = np.geomspace(1e-4, 1e4, 41), np.linspace(0, 1, 21)[:, None]
    return [
        gm.q_ode(x, rho, 1e-4),
        gm.q_sde(x, rho, 1e-4),
        gm.w_ode(rho),
        gm.w_sde(rho),
        gm.relative_ratio(x, rho),
        gm.latched_level_ode(np.float32(0.3), rho, 9.0),
        gm.transition_time(rho - 0.3, 2.0),
        gm.class_mean_difference(1 / (1.001 + x), 0.7),
    ]


def test_single_precision_is_close_to_double():
    with jax.enable_x64(True):
        double = [np.asarray(v) for v in curves()]
    assert double[0].dtype == np.float64
    for a, b in zip(curves(), double, strict=True):
        assert a.dtype == jnp.float32
        assert np.all(np.isfinite(a))
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-6)
