"""Resampling pairs: docs/theory.md, section 7.6."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ou_theory.bootstrap import family_level, percentile_interval, resample

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
    low, high = percentile_interval(counts @ data.T / 64)
    assert low.shape == (400,)
    assert 0.90 < np.mean((low < 0) & (high > 0)) < 0.98
    np.testing.assert_allclose((high - low).mean(), 2 * 1.96 / 8, rtol=0.05)


def test_the_interval_is_the_middle_of_the_draws():
    draws = np.linspace(0, 1, 101) ** 2  # skewed to the right: a symmetric interval would end elsewhere
    low, high = percentile_interval(draws, level=0.9)
    assert low == pytest.approx(0.05**2)
    assert high == pytest.approx(0.95**2)


@LAW
@given(st.floats(-5, 5), st.floats(0.1, 5), st.integers(0, 100))
def test_intervals_go_with_every_increasing_function(shift, scale, seed):
    draws = np.random.default_rng(seed).standard_normal((41, 3))  # both ends of 95 % are draws
    plain = np.array(percentile_interval(draws))
    np.testing.assert_allclose(percentile_interval(shift + scale * draws), shift + scale * plain, atol=1e-12)
    np.testing.assert_allclose(percentile_interval(np.exp(draws)), np.exp(plain), rtol=1e-12)
    turned = np.array(percentile_interval(-draws))
    np.testing.assert_allclose(turned, -plain[::-1], atol=1e-12)
    narrow = np.array(percentile_interval(draws, level=0.5))
    assert np.all(narrow[0] >= plain[0])
    assert np.all(narrow[1] <= plain[1])


def test_nan_stays_in_its_place():
    draws = np.random.default_rng(0).standard_normal((20, 3))
    draws[4, 1] = np.nan
    for end in percentile_interval(draws):
        np.testing.assert_array_equal(np.isfinite(end), [True, False, True])


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
def test_infinite_values_give_no_interval(bad):
    draws = np.tile(np.linspace(-1, 1, 200)[:, None], (1, 3))
    draws[5, 1] = bad
    for end in percentile_interval(draws):
        np.testing.assert_array_equal(np.isnan(end), [False, True, False])


@pytest.mark.parametrize("level", [0.0, 1.0, -0.5, 95])
def test_bad_levels_raise(level):
    with pytest.raises(ValueError, match="level"):
        percentile_interval([0.0, 1.0], level)


@pytest.mark.parametrize("tests", [1, 3, 8])
def test_intervals_of_a_family_are_wrong_together_as_rarely_as_one_alone(tests):
    """Independent intervals, the worst case but for opposed ones: all hold at once with the level of one, or a little
    more."""
    level = family_level(tests)
    assert 0.95 <= level**tests < 0.952
    rng = np.random.default_rng(tests)
    ends = stats.norm.ppf([(1 - level) / 2, (1 + level) / 2])
    found = rng.standard_normal((20_000, tests))
    assert np.all((found > ends[0]) & (found < ends[1]), 1).mean() == pytest.approx(0.951, abs=0.005)
    with pytest.raises(ValueError, match="at least one"):
        family_level(0)
