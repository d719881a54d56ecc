"""The estimator of commitment: docs/theory.md, section 7."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory.clock import make_clock
from ou_theory.estimator import (
    aligned_energy,
    commitment,
    crossing,
    gap,
    latch,
    projection,
    relative_energy,
    threshold_gap,
    threshold_step,
)
from ou_theory.gain_model import latched_level_ode, q_ode, q_uncoupled, w_ode

LAW = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**32 - 1)
STEPS, BANDS = 12, 3


def draw(seed, top=1.4, shape=(STEPS, BANDS)):
    """Relative energies, not monotone, some above 1; and irregular levels."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0, top, shape) * rng.uniform(0, 1, shape), np.cumsum(rng.uniform(0.1, 2, shape[-2])) - 8


def column(*values):
    """One band's values as (K, 1)."""
    return jnp.array(values, float)[:, None]


# --- levels


def test_relative_energy_divides_by_the_reference_of_the_band():
    energy = jnp.arange(24.0).reshape(2, 3, 4)
    got = relative_energy(energy, jnp.array([1.0, 2, 4, 8]))
    np.testing.assert_array_equal(got, energy / np.array([1, 2, 4, 8]))
    per_lead = relative_energy(energy, 2.0 ** jnp.arange(8).reshape(2, 4))
    np.testing.assert_array_equal(per_lead, energy / 2.0 ** np.arange(8).reshape(2, 1, 4))


def test_latch_holds_the_maximum_and_is_not_cut():
    assert latch(column(0.2, 0.1, 0.7, 0.3, 1.5, 0.9))[:, 0].tolist() == pytest.approx([0.2, 0.2, 0.7, 0.7, 1.5, 1.5])


def test_a_jump_commits_where_it_happens():
    ell = np.array([-2.0, -1.0, 0.0, 0.001, 2.0, 3.0])
    found = commitment(column(0, 0, 0, 0.8, 0.1, 0.4), ell)
    assert float(found.decided[0]) == pytest.approx(0.8)
    assert float(found.level[0]) == pytest.approx(0.0005, abs=1e-6)
    assert float(found.latched[0]) == pytest.approx(0.8 * 0.0005 + 0.2 * 3, abs=1e-6)


@LAW
@given(seeds)
def test_latched_level_is_split_by_what_is_decided(seed):
    q, ell = draw(seed)
    with jax.enable_x64(True):
        found = commitment(jnp.asarray(q), ell)
        whole = found.decided * found.level + (1 - found.decided) * ell[-1]
        np.testing.assert_allclose(found.latched, whole, atol=1e-12)
        np.testing.assert_array_equal(found.decided, q.max(0))
        assert np.all((found.level >= ell[0] - 1e-12) & (found.level <= ell[-1] + 1e-12))
        assert np.all((found.level <= found.latched + 1e-12) == (found.decided <= 1))
        assert np.all(np.diff(found.latch, axis=0) >= 0)


@LAW
@given(seeds)
def test_latched_level_averages_threshold_levels(seed):
    """Of bands that no coupling amplifies."""
    q, ell = draw(seed, top=1.0)
    with jax.enable_x64(True):
        found = commitment(jnp.asarray(q), ell)
        thresholds = (jnp.arange(4000) + 0.5) / 4000
        steps = jax.vmap(lambda t: threshold_step(found.latch, ell, t))(thresholds)
    levels = np.interp(steps, np.arange(STEPS), ell)  # "never" counts at the clean end
    np.testing.assert_allclose(levels.mean(0), found.latched, atol=1e-3 * (ell[-1] - ell[0]))


@LAW
@given(seeds, st.floats(-5, 5), st.floats(0.1, 0.9))
def test_shift_and_scale(seed, shift, scale):
    q, ell = draw(seed, top=1.0)
    with jax.enable_x64(True):
        plain, shifted = commitment(jnp.asarray(q), ell), commitment(jnp.asarray(q), ell + shift)
        np.testing.assert_allclose(shifted.level, plain.level + shift, atol=1e-12)
        np.testing.assert_allclose(shifted.latched, plain.latched + shift, atol=1e-12)
        np.testing.assert_array_equal(shifted.decided, plain.decided)
        np.testing.assert_allclose(gap(shifted.level), gap(plain.level), atol=1e-12)
        lower = commitment(jnp.asarray(scale * q), ell)  # a band that decides less of itself does so at the same level
        np.testing.assert_allclose(lower.level, plain.level, atol=1e-12)
        np.testing.assert_allclose(lower.decided, scale * plain.decided, atol=1e-12)


@LAW
@given(seeds)
def test_more_energy_is_never_later(seed):
    q, ell = draw(seed)
    more = q + np.random.default_rng(seed + 1).uniform(0, 0.2, q.shape)
    with jax.enable_x64(True):
        plain, raised = commitment(jnp.asarray(q), ell), commitment(jnp.asarray(more), ell)
        assert np.all(raised.latched <= plain.latched + 1e-12)
        assert np.all(raised.decided >= plain.decided)


def test_nothing_decided_has_no_level():
    ell = np.linspace(-3, 3, 5)
    q = jnp.stack([jnp.zeros(5), jnp.linspace(0, 1, 5)], -1)
    found = commitment(q, ell)
    assert np.isnan(found.level[0])
    assert np.isfinite(found.level[1])
    assert found.decided[0] == 0
    assert found.latched[0] == 3
    assert np.all(np.isfinite(found.latch))


def test_gradients_are_finite_beside_an_undecided_band():
    ell = np.linspace(-3, 3, 5)
    q = jnp.array([[0, 0.1], [0, 0.3], [0, 0.2], [0, 0.7], [0, 0.9]])
    grad_latched = jax.jit(jax.grad(lambda q: commitment(q, ell).latched.sum()))(q)
    grad_level = jax.jit(jax.grad(lambda q: jnp.nansum(commitment(q, ell).level)))
    assert np.all(np.isfinite(grad_latched))
    assert np.all(np.isfinite(grad_level(q)))
    # raising the peak at the second step raises M there and at the third
    assert float(grad_latched[1, 1]) == pytest.approx(-3.0, rel=1e-5)
    assert float(grad_latched[2, 1]) == 0
    # the level ignores the scale of Q, so its slope goes with the inverse scale
    np.testing.assert_allclose(grad_level(0.5 * q), 2 * grad_level(q), rtol=1e-4, atol=1e-5)


def test_leading_axes_broadcast():
    ell = draw(0)[1]
    q = jnp.asarray(draw(1, shape=(2, 4, STEPS, BANDS))[0])

    @jax.jit
    def everything(q):
        return *commitment(q, ell, start=-5.0), threshold_step(latch(q), ell, 0.4), crossing(q, ell)

    whole, one = everything(q), everything(q[1, 2])
    assert whole[0].shape == (2, 4, BANDS)
    for a, b in zip(whole, one, strict=True):
        np.testing.assert_allclose(a[1, 2], b, rtol=1e-6)


# --- the window


def test_window_does_not_latch_earlier_steps():
    ell = np.arange(-8.0, 4.0)
    q = np.zeros((12, 1))
    q[1], q[4:, 0] = 0.9, np.linspace(0.05, 0.6, 8)
    guarded = commitment(jnp.asarray(q), ell, start=-6.0)
    clean = commitment(jnp.asarray(np.where(ell[:, None] < -6, 0, q)), ell, start=-6.0)
    for a, b in zip(guarded, clean, strict=True):
        np.testing.assert_array_equal(a, b)
    assert guarded.latch.shape == (10, 1)
    assert float(guarded.decided[0]) == pytest.approx(0.6)
    assert float(commitment(jnp.asarray(q), ell).decided[0]) == pytest.approx(0.9)


def test_window_opens_at_the_first_step_at_or_above_the_start():
    q, ell = draw(3)
    q = jnp.asarray(q)
    for first in (1, 5):
        at = commitment(q, ell, start=ell[first])
        assert at.latch.shape[0] == STEPS - first
        np.testing.assert_array_equal(commitment(q, ell, start=ell[first] - 0.01).latched, at.latched)
        assert commitment(q, ell, start=ell[first] + 0.01).latch.shape[0] == STEPS - first - 1
    np.testing.assert_array_equal(commitment(q, ell, start=-99).latched, commitment(q, ell).latched)


def test_bad_windows_and_levels_raise():
    q, ell = jnp.ones((4, 2)), np.arange(4.0)
    assert commitment(q, ell, start=2.0).latch.shape[0] == 2
    for start in (2.5, 3.0, 99.0):
        with pytest.raises(ValueError, match="fewer than two steps"):
            commitment(q, ell, start=start)
    for levels in (np.arange(5.0), np.arange(2.0), ell[:, None]):
        with pytest.raises(ValueError, match="does not fit"):
            commitment(q, levels)


# --- against the closed forms


def test_uncoupled_band_commits_at_unit_snr(x64):
    ell = np.linspace(-30, 30, 20_001)
    variances = np.array([50.0, 1.0, 0.02])
    found = commitment(q_uncoupled(variances * np.exp(ell)[:, None]), ell)
    np.testing.assert_allclose(found.level, -np.log(variances), atol=1e-6)
    np.testing.assert_allclose(gap(found.level, 0), np.log(2500), atol=1e-6)


@pytest.mark.parametrize("rho", [0.1, 0.5, 0.9, 0.99])
def test_coupled_band_latches_as_the_closed_form(x64, rho):
    ell, variance = np.linspace(-30, 30, 20_001), np.array([2.0, 0.1])
    found = commitment(q_ode(variance * np.exp(ell)[:, None], rho), ell)
    np.testing.assert_allclose(found.decided, w_ode(rho), rtol=1e-5)
    np.testing.assert_allclose(found.latched, latched_level_ode(variance, rho, 30.0), atol=1e-4)
    # the height collapses with the gain, the spacing does not
    np.testing.assert_allclose(gap(found.level, 0), np.log(20), atol=1e-4)
    np.testing.assert_allclose(gap(found.latched, 0), w_ode(rho) * np.log(20), atol=1e-4)


def test_single_precision_is_close_to_double():
    clock, variances = make_clock(250), np.array([20.0, 0.05])
    with jax.enable_x64(True):
        double = commitment(q_ode(variances * np.exp(clock.log_snr)[:, None], 0.8), clock.log_snr, -6.0)
        double = [np.asarray(v) for v in double]
    single = commitment(q_ode(variances * np.exp(clock.log_snr)[:, None], 0.8), clock.log_snr, -6.0)
    assert single.level.dtype == jnp.float32
    for a, b in zip(single, double, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5)


def test_gap_takes_the_lowest_annulus_and_the_highest_band():
    assert float(gap(jnp.array([9.0, 1.0, 5.0, 4.0]))) == 3
    assert float(gap(jnp.array([9.0, 1.0, 5.0, 4.0]), low=0, high=2)) == -4


# --- thresholds


def test_threshold_step_interpolates_in_the_level():
    m, ell = column(0.1, 0.3, 0.3, 0.9), [-3.0, -2.0, 0.0, 4.0]
    expected = {0.05: 0, 0.1: 0, 0.2: 0.5, 0.3: 1, 0.6: 2.5, 0.9: 3, 0.91: 4}
    got = {t: float(threshold_step(m, ell, t)[0]) for t in expected}
    assert got == pytest.approx(expected, abs=1e-5)


def test_threshold_step_counts_all_steps_of_a_windowed_maximum():
    q, ell = column(0.1, 0.9, 0.1, 0.3, 0.7), np.arange(-8.0, -3.0)
    m = commitment(q, ell, start=-6.0).latch
    expected = {0.05: 2, 0.2: 2.5, 0.5: 3.5, 0.8: 5}
    assert {t: float(threshold_step(m, ell, t)[0]) for t in expected} == pytest.approx(expected, abs=1e-5)


def test_threshold_step_of_an_uncoupled_band_is_its_unit_snr_step(x64):
    clock = make_clock(1000)
    variances = np.array([20.0, 0.05])
    m = latch(q_uncoupled(variances * np.exp(clock.log_snr)[:, None]))
    np.testing.assert_allclose(threshold_step(m, clock.log_snr, 0.5), clock.step(-np.log(variances)), atol=0.01)


def test_threshold_gap_jumps_to_zero(x64):
    clock, gaps, states = make_clock(50), [], []
    dense = np.linspace(clock.log_snr[0], clock.log_snr[-1], 40_001)  # the continuous curve, read in sampler steps
    for g in (0, 0.01, 0.02, 0.05, 0.07, 0.0709, 0.072):
        q = q_ode(np.array([20.0, 0.05]) * np.exp(dense)[:, None], (1 - g) / (1 + g))
        found = np.asarray(threshold_step(latch(q), dense, 0.5))
        levels = np.interp(found, np.arange(dense.size), dense)
        steps = np.where(found < dense.size, clock.step(levels), 50.0)
        width, state = threshold_gap(float(steps[0]), float(steps[1]), 50)
        gaps.append(width)
        states.append(state)
    np.testing.assert_allclose(gaps, [23.6, 23.3, 23.0, 21.4, 17.7, 16.7, 0], atol=0.051)
    assert states == ["both"] * 6 + ["none"]


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (3.0, 7.5, (4.5, "both")),
        (8.0, 7.0, (-1.0, "both")),
        (50.0, 50.0, (0.0, "none")),
        (30.0, 50.0, (20.0, "low_only")),
        (50.0, 30.0, (-20.0, "high_only")),
    ],
)
def test_threshold_gap_says_how_to_read_it(low, high, expected):
    assert threshold_gap(low, high, 50) == expected


# --- projection


def test_projection_of_a_gaussian_band_crosses_at_unit_snr(x64):
    ell, variances = np.linspace(-12, 12, 4001), np.array([20.0, 0.05])
    q = q_uncoupled(variances * np.exp(ell)[:, None])
    a = projection(jnp.sqrt(q) * variances, jnp.asarray(variances))
    np.testing.assert_allclose(a, np.sqrt(q), rtol=1e-12)
    np.testing.assert_allclose(crossing(a, ell), -np.log(variances), atol=1e-4)
    aligned = aligned_energy(jnp.sqrt(q) * variances, jnp.asarray(variances), jnp.asarray(2 * variances))
    np.testing.assert_allclose(aligned, q / 2, rtol=1e-12)  # the reference is twice as large


@LAW
@given(seeds)
def test_aligned_energy_is_never_above_all_energy(seed):
    """By Cauchy and Schwarz, for any differences under a deterministic sampler; a stochastic one's is the root."""
    rng = np.random.default_rng(seed)
    d = rng.standard_normal((STEPS, 50, BANDS)) * rng.uniform(0.1, 3, (STEPS, 1, BANDS))
    energy, inner, reference = (d**2).mean(1), (d * d[-1]).mean(1), rng.uniform(0.5, 2, BANDS)
    with jax.enable_x64(True):
        arrays = (jnp.asarray(inner), jnp.asarray(energy[-1]), jnp.asarray(reference))
        aligned, stochastic = (np.asarray(aligned_energy(*arrays, stochastic=which)) for which in (False, True))
    assert np.all(aligned <= energy / reference + 1e-12)
    np.testing.assert_allclose(aligned[-1], energy[-1] / reference)
    np.testing.assert_array_equal(aligned == 0, inner < 0)  # what points away from the outcome counts as nothing
    ends = energy[-1] / reference
    np.testing.assert_allclose(stochastic / ends, np.sqrt(aligned / ends))


def test_replicas_that_end_alike_have_decided_nothing():
    found = aligned_energy(jnp.zeros((3, 2)), jnp.array([0.0, 1.0]), jnp.ones(2))
    np.testing.assert_array_equal(found, 0)


def test_crossing_is_the_last_upward_one():
    ell = [0.0, 1.0, 2.0, 4.0, 5.0]
    assert float(crossing(column(0, 1, 0, 1, 1), ell, 0.25)[0]) == pytest.approx(2.5)
    assert float(crossing(column(0, 1, 0.5, 0.2, 0.1), ell, 0.25)[0]) == pytest.approx(0.25)
    assert float(crossing(column(0, 0.25, 0.5, 0.2, 0.1), ell, 0.25)[0]) == pytest.approx(1.0)


def test_no_upward_crossing_gives_nan():
    ell = np.arange(3.0)
    a = jnp.array([[0.1, 0.9, 0.9, 0.1], [0.2, 0.9, 0.2, 0.9], [0.3, 0.9, 0.1, 0.9]])
    np.testing.assert_array_equal(np.isnan(crossing(a, ell)), [True, True, True, False])
