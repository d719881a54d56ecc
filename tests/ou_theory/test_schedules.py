"""Rates that change in time: integrals, times, responses (sections 12.4, 13.9)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import quad, solve_ivp

from ou_theory import clock
from ou_theory import process as ou
from ou_theory import schedules as sc
from ou_theory.speciation import speciation_gap

LAW = settings(max_examples=25, deadline=None, derandomize=True)
rates_of_steps = st.lists(st.floats(-1.5, 2.5), min_size=6, max_size=6).map(np.array)
GRID = np.array([0.0, 0.1, 0.3, 0.3, 0.8, 1.0, 2.0])

scheduled_modes = jax.jit(sc.scheduled_modes)
scheduled_noise = jax.jit(sc.scheduled_noise)
scheduled_time = jax.jit(sc.scheduled_time)
schedule_response = jax.jit(sc.schedule_response)
slopes_of_the_time = jax.jit(jax.grad(sc.scheduled_time))
slope_of_the_clock = jax.jit(jax.grad(ou.transition_time))


def test_constant_rates_are_the_process(x64):
    grid = np.array([0.0, 0.1, 0.1, 0.7, 3.0])
    rates = np.array([0.0, 1.4, -0.5])
    got = scheduled_modes(np.repeat(rates[:, None], 4, 1), grid, 0.7)
    np.testing.assert_allclose(got.factor, ou.mode_factor(rates[:, None], grid), rtol=1e-13)
    np.testing.assert_allclose(got.variance, ou.mode_variance(rates[:, None], grid, 0.7), rtol=1e-13, atol=1e-15)


def test_changing_rates_are_the_integral(x64):
    """``2 D int exp(-2 int_s^t rate) ds``, step by step."""
    grid, rates = np.array([0.0, 0.3, 1.0, 1.2, 2.0]), np.array([1.0, -2.0, 30.0, 0.2])
    sums = np.append(0, np.cumsum(rates * np.diff(grid)))
    got = scheduled_modes(rates, grid, 0.7)
    np.testing.assert_allclose(got.factor, np.exp(-sums), rtol=1e-13)
    for i in range(1, 5):
        expected, _ = quad(
            lambda s, i=i: 1.4 * np.exp(-2 * (sums[i] - np.interp(s, grid, sums))),
            0,
            grid[i],
            points=grid[1:-1],
            epsabs=1e-13,
        )
        assert float(got.variance[i]) == pytest.approx(expected, rel=1e-10)


def test_a_coupling_switched_on_smoothly(x64):
    """The common mode of a pair against the moment equations of the pair; the error is of second order."""

    def coupling(t):
        return 0.8 * np.sin(t) ** 2

    def rate(t, s):
        drift, s = np.array([[1, -coupling(t)], [-coupling(t), 1]]), s.reshape(2, 2)
        return (-drift @ s - s @ drift.T + 1.4 * np.eye(2)).ravel()

    expected = solve_ivp(rate, (0, 3), np.zeros(4), rtol=1e-11, atol=1e-12).y[:, -1].reshape(2, 2)
    errors = []
    for steps in (50, 100):
        grid = np.linspace(0, 3, steps + 1)
        g = coupling((grid[1:] + grid[:-1]) / 2)
        common, difference = scheduled_modes(np.stack([1 - g, 1 + g]), grid, 0.7).variance[:, -1]
        errors.append([float(common) - expected.sum() / 2, float(difference) - (expected[0, 0] - expected[0, 1])])
    np.testing.assert_allclose(errors[1], 0, atol=1e-4)
    np.testing.assert_allclose(np.divide(*errors), 4, rtol=0.05)


def test_extreme_schedules_stay_finite():
    grid = np.array([0.0, 1e-3, 1.0, 1e4])
    got = scheduled_modes(np.array([-50.0, 1e6, 1e3]), grid)
    assert np.all(np.isfinite(got.variance))
    np.testing.assert_allclose(got.variance[1:], [0.105171 / 100 * 2, 1e-6, 1e-3], rtol=1e-4)
    grads = jax.grad(lambda r: sc.scheduled_modes(r, grid).variance.sum())(jnp.array([0.0, 1e6, 1e3]))
    assert np.all(np.isfinite(grads))


def test_schedule_time(x64):
    times_ = np.linspace(0, 1, 6)
    got = sc.schedule_time(np.array([[0.1], [2.0]]) + 3 * times_, times_)
    np.testing.assert_allclose(got, np.array([[0.05], [1.0]]) * times_ + 0.75 * times_**2, rtol=1e-14, atol=1e-16)
    betas = clock.linear_betas()  # of the discrete schedule the first order, by 0.67 % at most
    discrete = clock.ou_time(np.cumprod(1 - betas))
    got = sc.schedule_time(np.append(betas[0], betas), np.arange(1001.0))[1:]
    np.testing.assert_allclose(got[50:], discrete[50:], rtol=0.02)


# --- the noise of a schedule, and when it reaches a spread


@LAW
@given(rates_of_steps, st.floats(0.2, 3))
def test_pulled_noise_is_the_variance_before_the_drift(rates, noise):
    with jax.enable_x64(True):
        mode = scheduled_modes(rates, GRID, noise)
        got = scheduled_noise(rates, GRID, noise)
        np.testing.assert_allclose(got, mode.variance / mode.factor**2, rtol=1e-11, atol=1e-14)
        assert np.all(np.diff(got)[np.diff(GRID) > 0] > 0)


@LAW
@given(rates_of_steps, st.floats(0.2, 3), st.floats(1e-4, 30))
def test_time_is_where_the_noise_reaches_the_spread(rates, noise, spread):
    with jax.enable_x64(True):
        t = float(scheduled_time(rates, GRID, spread, noise))
        if np.isinf(t):
            assert rates[-1] < 0
            far = np.append(GRID, 1e3)
            assert float(scheduled_noise(np.append(rates, rates[-1]), far, noise)[-1]) <= spread * (1 + 1e-9)
        else:
            inside = np.searchsorted(GRID, t, side="right")
            grid = np.insert(GRID, inside, t)
            split = np.insert(rates, min(inside, rates.size), rates[min(inside, rates.size) - 1])
            assert float(scheduled_noise(split, grid, noise)[inside]) == pytest.approx(spread, rel=1e-10)


def test_constant_schedule_is_the_clock(x64):
    spread = np.array([-1.0, 0.0, 0.5, 3.75, 40.0])
    got = scheduled_time(np.full((5, 6), 0.6), GRID, spread, 0.7)
    np.testing.assert_allclose(got, ou.transition_time(0.6, spread, 0.7), rtol=1e-13)
    assert float(scheduled_time(np.full(6, -0.1), GRID, 8.0, 0.7)) == np.inf


def test_gap_of_a_schedule_is_held_open_at_the_clean_end(x64):
    """The same total coupling opens more of a gap the less noise it acts at, and none beyond the speciation times."""
    grid, spread, b = np.linspace(0, 3, 301), 3.75, 1.0

    def gap(g):
        common, difference = scheduled_time(np.stack([b - g, b + g]), grid, np.full(2, spread))
        return float(common - difference)

    middle = (grid[1:] + grid[:-1]) / 2
    clean, even, noisy = (
        np.where((low <= middle) & (middle < high), 0.2 / (high - low), 0.0)
        for low, high in ((0, 0.4), (0, 2), (1.4, 3))
    )
    assert np.isclose(clean.sum(), even.sum())
    assert gap(clean) > 1.1 * gap(even) > 0
    assert gap(noisy) == 0.0  # both modes have speciated below t = 1
    assert gap(np.full(300, 0.4)) == pytest.approx(float(speciation_gap(b, 0.4, spread, spread)), rel=1e-12)


@LAW
@given(st.floats(-0.2, 2), st.floats(0.1, 3), st.floats(0.1, 0.95), st.floats(0.2, 3))
def test_response_is_the_derivative_of_the_time(rate, spread, share, noise):
    """Of a rate lowered in one short step; its integral is that of a rate lowered everywhere."""
    with jax.enable_x64(True):
        end = float(ou.transition_time(rate, spread, noise))
        grid = end * np.linspace(0, 1.2, 61)
        step = int(share * 50)
        slopes = -slopes_of_the_time(jnp.full(60, rate), grid, spread, noise)
        middle, width = (grid[step] + grid[step + 1]) / 2, grid[1]
        expected = float(schedule_response(rate, spread, middle, noise))
        assert float(slopes[step]) / width == pytest.approx(expected, rel=2e-3)
        assert np.all(np.asarray(slopes)[51:] == 0)
        nodes, weights = np.polynomial.legendre.leggauss(20)
        whole = end / 2 * weights @ np.asarray(schedule_response(rate, spread, end / 2 * (1 + nodes), noise))
        assert whole == pytest.approx(-float(slope_of_the_clock(rate, spread, noise)), rel=1e-9)


@pytest.mark.parametrize(
    ("rates", "grid", "expected"),
    [
        ([-10.0, 10.0], [0.0, 5.0, 20.0], 5 + (np.log(10 * (3.75 - 0.1)) + 100) / 20),  # forgets nothing, then all
        ([60.0, 1.0], [0.0, 5.0, 20.0], np.log1p(60 * 3.75) / 120),  # noise overflows after its time
        ([-1.0, -1.0], [0.0, 1.0, 2.0], np.inf),
        ([1e-9, 1e-9], [0.0, 1.0, 2.0], 3.75 / 2),
    ],
)
def test_extreme_rates_have_times_and_slopes(rates, grid, expected):
    """In single precision, where the noise of the first two is beyond all numbers."""
    got, slopes = jax.value_and_grad(sc.scheduled_time)(jnp.array(rates), jnp.array(grid), 3.75)
    np.testing.assert_allclose(got, expected, rtol=1e-5)
    assert np.all(np.isfinite(slopes))
    many = jax.grad(sc.scheduled_time)(jnp.ones(60), jnp.arange(61.0), 3.75)
    np.testing.assert_allclose(many.sum(), jax.grad(ou.transition_time)(1.0, 3.75), rtol=1e-5)
    assert np.all(np.asarray(many)[1:] == 0)


def test_no_number_in_no_number_out():
    got = sc.scheduled_time(np.ones(2), np.arange(3.0), np.array([np.nan, 1.0, np.inf]))
    assert np.isnan(got[0])
    assert np.isfinite(got[1])
    assert got[2] == np.inf
    assert np.isnan(sc.schedule_response(-1.0, 3.75, 0.1))


def test_single_precision():
    rates = np.array([0.6, 1.4, -0.2, 1.0, 0.3, 1.0])
    spread = np.array([0.1, 1.0, 3.75])
    single = scheduled_time(np.tile(rates, (3, 1)), GRID, spread)
    with jax.enable_x64(True):
        double = scheduled_time(np.tile(rates, (3, 1)), GRID, spread)
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, rtol=2e-6)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: sc.scheduled_modes(np.ones(3), np.arange(3.0)), "one rate a step"),
        (lambda: sc.scheduled_noise(np.ones(3), np.arange(3.0)), "one rate a step"),
        (lambda: sc.scheduled_time(np.ones(2), np.array([0.0, 2.0, 1.0]), 1.0), "increase"),
        (lambda: sc.scheduled_time(np.ones(2), np.array([0.5, 1.0, 2.0]), 1.0), "begin at 0"),
        (lambda: sc.scheduled_time(np.ones(2), np.arange(3.0), 1.0, np.ones(2)), "must be a number"),
        (lambda: sc.scheduled_noise(np.ones(2), np.arange(3.0), -1.0), "positive"),
        (lambda: sc.schedule_response(1.0, 1.0, -0.5), "negative"),
        (lambda: sc.schedule_time(np.ones(3), np.array([0.0, 2.0, 1.0])), "increase"),
        (lambda: sc.schedule_time(np.ones(3), np.arange(4.0)), r"\(T,\)"),
    ],
)
def test_bad_input_raises(make, match):
    with pytest.raises(ValueError, match=match):
        make()
