"""Resampling pairs: docs/theory.md, section 7.6."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory.bootstrap import basic_interval, resample

LAW = settings(max_examples=25, deadline=None, derandomize=True)


@LAW
@given(st.integers(0, 2**31), st.integers(2, 80), st.integers(1, 50))
def test_counts(seed, num_pairs, draws):
    counts = resample(seed, num_pairs, draws)
    assert counts.shape == (draws, num_pairs)
    assert np.all(counts >= 0)
    np.testing.assert_array_equal(counts.sum(1), num_pairs)
    np.testing.assert_array_equal(counts, resample(seed, num_pairs, draws))


def test_draws_are_those_of_sampling_with_replacement():
    counts = resample(0, 10, 20_000)
    assert np.any(counts[0] != counts[1])
    assert np.any(counts != resample(1, 10, 20_000))
    np.testing.assert_allclose(counts.mean(0), 1, atol=0.04)
    np.testing.assert_allclose(counts.var(0), 0.9, atol=0.05)  # n (1 / n) (1 - 1 / n)


@pytest.mark.parametrize("num_pairs", [0, 1])
def test_too_few_pairs_raise(num_pairs):
    with pytest.raises(ValueError, match="at least 2 pairs"):
        resample(0, num_pairs, 10)


def test_coverage_of_a_gaussian_mean():
    rng = np.random.default_rng(7)
    data = rng.standard_normal((400, 64))  # experiments, pairs
    counts = resample(3, 64, 600)
    low, high = basic_interval(data.mean(1), counts @ data.T / 64)
    assert low.shape == (400,)
    assert 0.90 < np.mean((low < 0) & (high > 0)) < 0.98
    np.testing.assert_allclose((high - low).mean(), 2 * 1.96 / 8, rtol=0.05)


def test_the_interval_is_basic_not_percentile():
    draws = np.linspace(0, 1, 101) ** 2  # skewed to the right: the basic interval reaches to the left
    low, high = basic_interval(0.25, draws, level=0.9)
    assert low == pytest.approx(0.5 - 0.95**2)
    assert high == pytest.approx(0.5 - 0.05**2)


@LAW
@given(st.floats(-5, 5), st.floats(0.1, 5), st.integers(0, 100))
def test_intervals_move_and_stretch_with_the_data(shift, scale, seed):
    draws = np.random.default_rng(seed).standard_normal((50, 3))
    plain = np.array(basic_interval(draws.mean(0), draws))
    moved = np.array(basic_interval(shift + scale * draws.mean(0), shift + scale * draws))
    np.testing.assert_allclose(moved, shift + scale * plain, atol=1e-12)
    narrow = np.array(basic_interval(draws.mean(0), draws, level=0.5))
    assert np.all(narrow[0] >= plain[0])
    assert np.all(narrow[1] <= plain[1])


def test_nan_stays_in_its_place():
    draws = np.random.default_rng(0).standard_normal((20, 3))
    draws[4, 1] = np.nan
    low, high = basic_interval([0.0, 0.0, np.nan], draws)
    np.testing.assert_array_equal(np.isfinite(low), [True, False, False])
    np.testing.assert_array_equal(np.isfinite(high), [True, False, False])


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_infinite_values_give_no_interval(bad):
    draws = np.tile(np.linspace(-1, 1, 200)[:, None], (1, 3))
    draws[5, 1] = bad
    for end in basic_interval([0.0, 0.0, bad], draws):
        np.testing.assert_array_equal(np.isnan(end), [False, True, True])


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95])
def test_bad_levels_raise(level):
    with pytest.raises(ValueError, match="level"):
        basic_interval(0.0, [0.0, 1.0], level)
