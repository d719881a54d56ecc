"""Cluster laws: posterior mean and error against autodiff, quadrature and sampling; speciation; reference values."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory import cluster_laws
from ou_theory.cluster_laws import Clusters, mmse, sign_correlation, sign_doubt
from ou_theory.gain_model import wiener_gain

positive = st.floats(0.05, 4.0)


def clusters(s2, m, signs=2):
    """Five modes, of which the first two carry one sign and the third another."""
    centres = np.zeros((signs, 5))
    if signs > 0:
        centres[0, :2] = m, 0.5 * m
    if signs > 1:
        centres[1, 2] = 0.7 * m
    return Clusters(jnp.asarray(s2 * np.array([1.0, 0.6, 1.3, 0.4, 2.0])), jnp.asarray(centres))


def log_density(law, sigma2):
    """Of the state in the rescaled frame, summed over all signs."""

    def at(y):
        total = law.variance + sigma2
        signs = np.stack(np.meshgrid(*[[-1.0, 1.0]] * len(law.centres), indexing="ij"), -1).reshape(
            -1, len(law.centres)
        )
        means = jnp.asarray(signs) @ law.centres
        return jax.nn.logsumexp(-((y - means) ** 2 / (2 * total)).sum(-1))

    return at


@settings(deadline=None, max_examples=25)
@given(positive, positive, positive, st.integers(0, 2**16))
def test_posterior_mean_is_tweedies(s2, m, sigma2, seed):
    with jax.enable_x64(True):
        law = clusters(s2, m)
        y = jnp.asarray(np.random.default_rng(seed).normal(0, 2, 5))
        expected = y + sigma2 * jax.grad(log_density(law, sigma2))(y)
        np.testing.assert_allclose(law.posterior_mean(y, jnp.asarray(sigma2)), expected, rtol=1e-9, atol=1e-9)


@settings(deadline=None, max_examples=25)
@given(positive, positive, st.lists(positive, min_size=2, max_size=6, unique=True))
def test_kappa_falls_with_the_noise_and_sets_the_growth_at_the_undecided_point(s2, m, levels):
    with jax.enable_x64(True):
        law = clusters(s2, m)
        levels = np.sort(levels)
        kappa = np.asarray(law.kappa(jnp.asarray(levels)))
        assert np.all(np.diff(kappa, axis=0) < 0)
        for sigma2, at in zip(levels, kappa, strict=True):
            for a, centre in enumerate(law.centres):
                _, moved = jax.jvp(lambda y, s=sigma2: law.posterior_mean(y, s), (jnp.zeros(5),), (centre,))
                share = sigma2 / (law.variance + sigma2)
                np.testing.assert_allclose(moved - centre, centre * share * (at[a] - 1), rtol=1e-9, atol=1e-12)


def test_without_signs_the_law_is_gaussian():
    law = clusters(0.8, 0.0, signs=0)
    y = jnp.asarray([0.3, -1.0, 2.0, 0.1, 0.0])
    np.testing.assert_allclose(law.posterior_mean(y, 0.5), wiener_gain(law.variance, 0.5) * y, rtol=1e-6)
    np.testing.assert_allclose(mmse(law, jnp.asarray(0.5)), law.variance * 0.5 / (law.variance + 0.5), rtol=1e-6)
    assert law.kappa(jnp.asarray(0.5)).shape == (0,)


@pytest.mark.parametrize("sigma2", [0.1, 1.0, 6.0])
def test_error_of_the_posterior_mean_by_sampling(sigma2):
    law, count = clusters(0.5, 1.5), 200_000
    clean = law.draw(jax.random.key(0), count)
    y = clean + jnp.sqrt(sigma2) * jax.random.normal(jax.random.key(1), clean.shape)
    squares = np.asarray((law.posterior_mean(y, jnp.asarray(sigma2)) - clean) ** 2, np.float64)
    expected = np.asarray(mmse(law, jnp.asarray(sigma2)))
    assert np.all(np.abs(squares.mean(0) - expected) < 5 * squares.std(0) / count**0.5)
    np.testing.assert_allclose(np.var(clean, 0), law.total_variance(), rtol=0.02)


def test_reference_values_of_the_sign_correlation():
    with jax.enable_x64(True):
        assert abs(float(sign_correlation(jnp.asarray(1.0))) - 0.5504004908) < 1e-9
        assert abs(float(sign_correlation(jnp.asarray(0.8508444376))) - 0.5) < 1e-9
        assert float(sign_correlation(jnp.asarray(0.0))) == 0


def quadrature(function, kappa):
    """Mean over the field of a sign, by the rule of its density."""
    z = np.linspace(-12, 12, 4801)
    weight = np.exp(-(z**2) / 2) / np.exp(-(z**2) / 2).sum()
    return (weight * function(kappa + np.sqrt(kappa) * z)).sum()


@settings(deadline=None, max_examples=30)
@given(st.floats(1e-3, 30.0))
def test_nishimori(kappa):
    """The mean of tanh is the mean of its square."""
    with jax.enable_x64(True):
        assert abs(float(sign_correlation(kappa)) - quadrature(np.tanh, kappa)) < 1e-12
        assert float(sign_doubt(kappa)) == pytest.approx(1 - float(sign_correlation(kappa)), abs=1e-14)


derivatives = [jax.jit(jax.vmap(d)) for d in (jax.grad(sign_correlation), jax.grad(jax.grad(sign_correlation)))]


def test_slopes_of_the_sign_correlation(x64):
    """By Stein's lemma, without Nishimori's identity; and the curvature by a difference of the slopes."""
    kappas, step = np.array([1e-3, 0.1, 1.0, 5.0, 20.0]), 1e-4

    def by_stein(field):
        return (1 - np.tanh(field)) / np.cosh(field) ** 2

    expected = [quadrature(by_stein, k) for k in kappas]
    np.testing.assert_allclose(derivatives[0](kappas), expected, rtol=1e-9, atol=1e-14)
    moved = [derivatives[0](kappas + sign * step * kappas) for sign in (1, -1)]
    np.testing.assert_allclose(derivatives[1](kappas), (moved[0] - moved[1]) / (2 * step * kappas), rtol=1e-6)


def test_the_sign_correlation_starts_smoothly(x64):
    """``kappa - kappa^2 + 5 kappa^3 / 3``: at 0 the square root of the field has no slope, but its mean has."""
    derivative = sign_correlation
    for expected in (0, 1, -2, 10):
        assert float(derivative(0.0)) == pytest.approx(expected, abs=1e-14)
        derivative = jax.grad(derivative)
    small = 1e-8
    assert float(sign_correlation(small)) == pytest.approx(small - small**2, rel=1e-14)
    law = clusters(0.5, 0.0)
    slope = jax.grad(lambda m: mmse(law._replace(centres=m), jnp.asarray(0.7)).sum())(law.centres)
    np.testing.assert_array_equal(slope, np.zeros((2, 5)))


@pytest.mark.parametrize(("kappa", "doubt"), [(20.0, 1.2036620875489877e-05), (80.0, 5.864529199810667e-19)])
def test_small_doubts_keep_their_digits(kappa, doubt):
    """Against 30 digits."""
    assert float(sign_doubt(kappa)) == pytest.approx(doubt, rel=2e-5)
    with jax.enable_x64(True):
        assert float(sign_doubt(kappa)) == pytest.approx(doubt, rel=1e-13)


def test_certainty_has_limits():
    assert float(sign_correlation(jnp.inf)) == 1
    assert float(sign_doubt(jnp.inf)) == 0
    assert np.isnan(sign_correlation(jnp.nan))


@pytest.mark.parametrize(
    ("variance", "centres", "match"),
    [
        ([1.0, -1.0], [[1.0, 0.0]], "negative"),
        ([1.0, 1.0], [[1.0, 1.0], [0.0, 1.0]], "one centre"),
        ([1.0, 1.0], [[1.0, 1.0, 0.0]], "must be"),
    ],
)
def test_bad_laws_are_refused(variance, centres, match):
    with pytest.raises(ValueError, match=match):
        cluster_laws.clusters(variance, centres)


def test_a_checked_law_is_the_law():
    law = cluster_laws.clusters([1.0, 2.0], [[0.0, 1.5]])
    assert law.variance.dtype == law.centres.dtype == jnp.float32
    np.testing.assert_allclose(law.total_variance(), [1.0, 4.25])
