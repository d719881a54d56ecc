"""Schedules, respacing and clocks, against reference tables and the laws of docs/theory.md, section 2."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory.clock import (
    Clock,
    alpha_bar_of_log_snr,
    linear_betas,
    log_snr,
    make_clock,
    ou_time,
    respace,
    schedule_index,
    sigma2,
)

LAW = settings(max_examples=25, deadline=None, derandomize=True)
FULL = make_clock(1000)


@pytest.fixture(scope="module")
def refs():
    with np.load(Path(__file__).parents[1] / "data" / "refs_diffusion.npz") as data:
        return dict(data)


# --- the schedule and its four names of the noise level


def test_full_schedule_is_the_reference(refs):
    np.testing.assert_allclose(linear_betas(), refs["full_betas"], rtol=0, atol=1e-15)
    np.testing.assert_allclose(FULL.alpha_bar[::-1], refs["full_alphas_cumprod"], rtol=0, atol=1e-15)
    np.testing.assert_array_equal(FULL.timesteps, np.arange(1000)[::-1])


def test_reference_levels():
    forward = FULL.alpha_bar[::-1]
    assert forward[499] == pytest.approx(0.07858724288, rel=1e-9)
    assert ou_time(forward[[0, 999]]) == pytest.approx([5.00025e-5, 5.058856771], rel=1e-6)
    assert log_snr(forward[[0, 999]]) == pytest.approx([9.21024037, -10.11767318], abs=1e-8)
    assert make_clock(50).log_snr[10] == pytest.approx(-6.415026146, abs=1e-9)


@LAW
@given(st.floats(-30, 30))
def test_names_of_the_level_agree(ell):
    alpha_bar = alpha_bar_of_log_snr(ell)
    variance = np.exp(-ell)
    if ell < 15:  # beyond, alpha_bar near 1 holds the noise share only to rounding
        assert log_snr(alpha_bar) == pytest.approx(ell, abs=1e-8)
        assert sigma2(alpha_bar) == pytest.approx(variance, rel=1e-8)
        assert ou_time(alpha_bar) == pytest.approx(0.5 * np.log1p(variance), rel=1e-8)
    assert alpha_bar + alpha_bar_of_log_snr(-ell) == pytest.approx(1, abs=1e-15)


def test_levels_do_not_overflow():
    np.testing.assert_array_equal(alpha_bar_of_log_snr([-np.inf, -1000, 1000, np.inf]), [0, 0, 1, 1])


def test_inverse_index_map():
    indices = np.arange(1000)
    variance = sigma2(FULL.alpha_bar[::-1])
    inside = (variance >= 1e-3) & (variance <= 1e4)
    assert inside.sum() > 900
    error = np.abs(schedule_index(variance) - indices)[inside]
    assert error.max() < 0.016
    assert error.max() > 1e-3  # a closed form, not a table look-up


# --- respacing


@pytest.mark.parametrize("name", ["250", "50", "10", "ddim50", "ddim10", "10_20"])
def test_respaced_clock_is_the_reference(refs, name):
    clock = make_clock(name.replace("_", ","))
    np.testing.assert_array_equal(clock.timesteps[::-1], refs[f"map_{name}"])
    np.testing.assert_allclose(clock.alpha_bar[::-1], refs[f"acp_{name}"], rtol=0, atol=1e-15)
    np.testing.assert_allclose(clock.betas[::-1], refs[f"betas_{name}"], rtol=0, atol=1e-15)


def test_kept_steps_keep_their_level():
    for spec in ("50", "ddim25", "7,11,13"):
        kept = respace(spec)
        np.testing.assert_array_equal(make_clock(spec).alpha_bar, FULL.alpha_bar[::-1][kept][::-1])


def test_single_section_rounds_half_to_even():
    assert respace(7).tolist() == [0, 166, 333, 500, 666, 832, 999]  # strides of 166.5


def test_single_section_accumulates_its_stride():
    # ten times 49.95, added up, falls short of the 499.5 that a grid of equal parts rounds to 500
    grid = np.round(np.linspace(0, 999, 21)).astype(int)
    assert np.flatnonzero(respace(21) != grid).tolist() == [10]
    assert respace(21)[10] == 499


def test_ddim_strides():
    np.testing.assert_array_equal(respace("ddim50"), np.arange(0, 1000, 20))
    np.testing.assert_array_equal(respace("ddim1"), [0])
    np.testing.assert_array_equal(respace("ddim3", 7), [0, 3, 6])
    with pytest.raises(ValueError, match="no integer stride"):
        respace("ddim999")


def test_sections():
    np.testing.assert_array_equal(respace("2,3", 10), [0, 4, 5, 7, 9])
    np.testing.assert_array_equal(respace("1,2,2", 10), [0, 4, 6, 7, 9])  # sections of 4, 3 and 3 steps
    np.testing.assert_array_equal(respace(" 3 , 3 ", 6), np.arange(6))


@LAW
@given(st.integers(1, 1000))
def test_single_section_counts(count):
    kept = respace(count)
    assert kept.size == count
    assert np.all(np.diff(kept) > 0)
    assert kept[0] == 0
    assert kept[-1] == (999 if count > 1 else 0)


@pytest.mark.parametrize("spec", ["", "0", "-5", "5.0", "fast", "10,,20", "ddim", "ddim0", "ddim-5", "1001", "600,10"])
def test_bad_specs_raise(spec):
    with pytest.raises(ValueError, match="steps"):
        respace(spec)


# --- clocks


def test_clock_is_in_step_order():
    clock = make_clock(50)
    assert len(clock) == 50
    assert clock.timesteps[0] == 999
    assert clock.timesteps[-1] == 0
    assert np.all(np.diff(clock.timesteps) < 0)
    assert np.all(np.diff(clock.log_snr) > 0)
    assert np.all(np.diff(clock.sigma) < 0)
    np.testing.assert_allclose(clock.sigma, np.exp(-clock.log_snr / 2), rtol=1e-10)
    np.testing.assert_array_equal(clock.alpha_bar_next, [*clock.alpha_bar[1:], 1.0])
    np.testing.assert_allclose(np.cumprod(1 - clock.betas[::-1])[::-1], clock.alpha_bar, rtol=1e-13)


def test_clock_of_another_schedule():
    betas = linear_betas(40, 1e-3, 0.1)
    clock = make_clock(5, betas)
    assert clock.timesteps.tolist() == [39, 29, 20, 10, 0]
    np.testing.assert_allclose(clock.alpha_bar, np.cumprod(1 - betas)[clock.timesteps])


@pytest.mark.parametrize(
    ("steps", "alpha_bar"),
    [
        ([1, 0], [0.5]),
        ([], []),
        ([[1, 0]], [[0.2, 0.5]]),
        ([1, 0], [0.5, 0.5]),
        ([1, 0], [0.5, 0.2]),
        ([1, 0], [0.0, 0.5]),
        ([1, 0], [0.5, 1.0]),
    ],
)
def test_bad_clocks_raise(steps, alpha_bar):
    with pytest.raises(ValueError, match="clock"):
        Clock(np.array(steps, np.int64), np.array(alpha_bar, np.float64))


# --- steps of a level


def test_step_inverts_the_levels_and_is_linear_between():
    clock = make_clock(50)
    np.testing.assert_allclose(clock.step(clock.log_snr), np.arange(50), atol=1e-12)
    between = 0.25 * clock.log_snr[:-1] + 0.75 * clock.log_snr[1:]
    np.testing.assert_allclose(clock.step(between), np.arange(49) + 0.75, atol=1e-9)


def test_step_outside_the_levels():
    clock = make_clock(50)
    ends = [-np.inf, -50.0, clock.log_snr[0], clock.log_snr[-1], np.nextafter(clock.log_snr[-1], 99), np.inf, np.nan]
    np.testing.assert_array_equal(clock.step(ends), [0, 0, 0, 49, 50, 50, np.nan])


@LAW
@given(st.floats(-12, 12), st.floats(-12, 12), st.sampled_from([1, 10, 250]))
def test_step_is_monotone_and_within_the_sampler(a, b, num):
    low, high = make_clock(num).step(sorted([a, b]))
    assert 0 <= low <= high <= num


def test_step_of_unit_snr_reference():
    assert make_clock(250).step(-np.log(0.25)) == pytest.approx(212.9612330, abs=1e-7)


STEP_COUNTS = [20, 50, 100, 250, 1000]


@pytest.mark.parametrize(
    ("variance", "ell", "steps"),
    [
        (1000, -6.908, [3.31, 8.55, 17.20, 43.24, 173.96]),
        (100, -4.605, [6.20, 15.97, 32.23, 81.08, 325.33]),
        (10, -2.303, [9.79, 25.23, 50.96, 128.16, 514.63]),
        (1, 0, [14.09, 36.34, 73.39, 184.73, 740.91]),
        (0.1, 2.303, [17.19, 44.46, 89.86, 225.90, 906.62]),
        (0.01, 4.605, [18.21, 47.63, 96.32, 242.38, 972.59]),
    ],
)
def test_table_of_unit_snr_steps(variance, ell, steps):
    level = -np.log(variance)
    assert level == pytest.approx(ell, abs=6e-4)
    assert [float(make_clock(n).step(level)) for n in STEP_COUNTS] == pytest.approx(steps, abs=0.00501)


@pytest.mark.parametrize(
    ("num", "gaps"),
    [(50, [5.30, 11.47, 18.24, 24.36, 30.86, 32.38]), (250, [27.08, 58.21, 92.77, 124.07, 156.94, 165.99])],
)
def test_table_of_power_law_step_gaps(num, gaps):
    clock, low = make_clock(num), -np.log(100)
    exponents = np.array([0.5, 1, 1.5, 2, 3, 4])
    got = clock.step(low + exponents * np.log(16)) - clock.step(low)
    np.testing.assert_allclose(got, gaps, atol=0.00501)
