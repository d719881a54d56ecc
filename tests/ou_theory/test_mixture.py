"""Data laws under any process: densities, scores and posteriors by independent routes (sections 12.6, 12.7)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm

from ou_theory import mixture as mx
from ou_theory.process import Process, symmetric_pair, transition

LAW = settings(max_examples=25, deadline=None, derandomize=True)
seeds = st.integers(0, 2**16)
times = st.floats(0.01, 2)

DRIFTS = {
    "symmetric": [[1.0, -0.4], [-0.4, 1.0]],
    "one way": [[1.0, -3.0], [0.0, 0.5]],
    "rotating": [[0.3, -2.0], [2.0, 0.4]],
    "defective": [[1.0, -2.0], [0.0, 1.0]],
    "unstable": [[0.2, -1.0], [-0.5, -0.3]],
}
EXAMPLE = (
    np.array([0.4, 0.6]),
    np.array([[1.0, 0.5], [-1.0, 0.2]]),
    np.array([[[0.5, 0.1], [0.1, 0.4]], [[0.3, -0.05], [-0.05, 0.6]]]),
)

log_density, score, responsibilities = (jax.jit(f) for f in (mx.log_density, mx.score, mx.responsibilities))
posterior_mean, posterior_covariance = (jax.jit(f) for f in (mx.posterior_mean, mx.posterior_covariance))


def process_of(drift, noise=0.7):
    return Process(jnp.asarray(drift, float), jnp.asarray(noise, float))


def law_of(parts):
    return mx.Mixture(*(jnp.asarray(v, float) for v in parts))


def normal(x, mean, covariance):
    apart = x - mean
    square = (apart * np.linalg.solve(covariance, apart.T).T).sum(-1)
    return np.exp(-square / 2) / np.linalg.det(2 * np.pi * covariance) ** 0.5


def draw(seed):
    """A law of two components, any drift and five states."""
    rng = np.random.default_rng(seed)
    roots = rng.normal(size=(2, 2, 2))
    weights = rng.dirichlet([1, 1])
    law = mx.mixture(weights, rng.normal(0, 1.5, (2, 2)), roots @ np.swapaxes(roots, 1, 2) + 0.05 * np.eye(2))
    drifts = [*DRIFTS.values(), rng.normal(size=(2, 2))]
    return law, process_of(drifts[rng.integers(len(drifts))], rng.uniform(0.2, 2)), rng.normal(0, 2, (5, 2))


# --- density and score


def test_reference(x64):
    process = process_of([[1.3, -0.5], [-0.2, 0.8]])
    got = posterior_mean(law_of(EXAMPLE), process, 0.4, np.tile([0.3, -0.8], (2, 1)))
    np.testing.assert_allclose(got, [[0.09890933746, -0.2066904274]] * 2, rtol=1e-9)


@LAW
@given(seeds, times)
def test_density(seed, t):
    with jax.enable_x64(True):
        law, process, x = draw(seed)
        factor, noise = expm(-np.asarray(process.drift) * t), np.asarray(transition(process, t).covariance)
        joint = [
            w * normal(x, factor @ m, factor @ np.asarray(c) @ factor.T + noise) for w, m, c in zip(*law, strict=True)
        ]
        np.testing.assert_allclose(log_density(law, process, t, x), np.log(np.sum(joint, 0)), rtol=1e-8, atol=1e-9)
        shares = responsibilities(law, process, t, x)
        np.testing.assert_allclose(shares, (joint / np.sum(joint, 0)).T, rtol=1e-7, atol=1e-12)


slope = jax.jit(jax.vmap(jax.grad(mx.log_density, 3), (None, None, None, 0)))


@LAW
@given(seeds, times)
def test_score_is_the_slope_of_the_density(seed, t):
    with jax.enable_x64(True):
        law, process, x = draw(seed)
        got = np.asarray(score(law, process, t, x))
        np.testing.assert_allclose(got, slope(law, process, t, x), rtol=1e-10, atol=1e-12 * np.abs(got).max())


@jax.jit
def imbalance(law, process, t, x):
    """What ``d/dt log p`` and the Fokker-Planck equation differ by, and the first."""

    def at(x):
        change = jax.grad(mx.log_density, 2)(law, process, t, x)
        s, bend = mx.score(law, process, t, x), jax.jacfwd(mx.score, 3)(law, process, t, x)
        spread = process.noise * (s @ s + jnp.trace(bend))
        return change - (jnp.trace(process.drift) + s @ process.drift @ x + spread), change

    return jax.vmap(at)(x)


@LAW
@given(seeds, times)
def test_density_obeys_fokker_and_planck(seed, t):
    with jax.enable_x64(True):
        difference, change = imbalance(*draw(seed)[:2], t, draw(seed)[2])
        np.testing.assert_allclose(difference, 0, atol=1e-9 * (1 + np.abs(change).max()))


def test_far_states_and_components_without_weight():
    law = law_of(EXAMPLE)._replace(weights=jnp.array([1.0, 0.0]))
    process = process_of(DRIFTS["symmetric"])
    x = np.array([[1e4, -3e4], [0.1, 0.2]])
    alone = jax.tree.map(lambda v: jnp.stack([v[0], v[0]]), law)._replace(weights=jnp.array([0.5, 0.5]))
    np.testing.assert_allclose(score(law, process, 0.3, x), score(alone, process, 0.3, x), rtol=1e-5)
    np.testing.assert_array_equal(responsibilities(law, process, 0.3, x), [[1, 0], [1, 0]])
    shares = responsibilities(law_of(EXAMPLE), process, 0.3, x)
    assert np.all(np.isfinite(shares))
    gradients = jax.jit(jax.grad(lambda law: mx.log_density(law, process, 0.3, x[1])))(law)
    assert all(np.isfinite(v).all() for v in (gradients.means, gradients.covariances))


# --- posterior


tweedie_mean, tweedie_covariance = jax.jit(mx.tweedie_mean), jax.jit(mx.tweedie_covariance)
hessian = jax.jit(jax.vmap(jax.jacfwd(mx.score, 3), (None, None, None, 0)))


@LAW
@given(seeds, times)
def test_posterior_is_tweedies(seed, t):
    with jax.enable_x64(True):
        law, process, x = draw(seed)
        digits = 1e-14 * np.linalg.cond(np.asarray(transition(process, t).factor))
        mean = np.asarray(posterior_mean(law, process, t, x))
        got = tweedie_mean(process, t, x, score(law, process, t, x))
        np.testing.assert_allclose(got, mean, atol=1e4 * digits * (1 + np.abs(mean).max()))
        covariance = np.asarray(posterior_covariance(law, process, t, x))
        got = tweedie_covariance(process, t, hessian(law, process, t, x))
        np.testing.assert_allclose(got, covariance, atol=1e5 * digits * (1 + np.abs(covariance).max()))
        assert np.linalg.eigvalsh(covariance).min() > 0


@pytest.mark.parametrize("name", ["one way", "rotating"])
def test_posterior_by_quadrature(x64, name):
    process, t, x = process_of(DRIFTS[name]), 0.6, np.array([0.4, -0.3])
    axis = np.linspace(-7, 7, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2)
    factor, noise = (np.asarray(v) for v in transition(process, t))
    prior = sum(w * normal(grid, m, c) for w, m, c in zip(*EXAMPLE, strict=True))
    weight = prior * normal(grid @ factor.T, x, noise)
    weight /= weight.sum()
    mean = weight @ grid
    seen = np.stack([x, x])
    np.testing.assert_allclose(posterior_mean(law_of(EXAMPLE), process, t, seen)[0], mean, rtol=1e-10)
    covariance = (grid - mean).T @ (weight[:, None] * (grid - mean))
    np.testing.assert_allclose(posterior_covariance(law_of(EXAMPLE), process, t, seen)[0], covariance, rtol=1e-10)


@pytest.mark.parametrize("t", [1e-12, 1e-6, 0.5, 40.0])
def test_posterior_of_a_gaussian_at_any_noise(x64, t):
    """``(C^-1 + F^T Sigma^-1 F)^-1`` without loss of digits where it is small."""
    process, prior = process_of(DRIFTS["one way"]), np.array([[0.5, 0.1], [0.1, 0.4]])
    factor, noise = (np.asarray(v) for v in transition(process, t))
    expected = np.linalg.inv(np.linalg.inv(prior) + factor.T @ np.linalg.inv(noise) @ factor)
    law = mx.mixture(np.array([0.3, 0.7]), np.tile([1.0, 2.0], (2, 1)), np.stack([prior, prior]))  # the same twice
    got = posterior_covariance(law, process, t, np.tile([0.3, -1.0], (2, 1)))
    np.testing.assert_allclose(got[0], expected, rtol=1e-9, atol=1e-11 * expected.max())


def test_at_no_time_the_state_is_the_data(x64):
    process, x = process_of(DRIFTS["one way"]), np.array([[0.3, -0.8], [2.0, 0.0]])
    law = law_of(EXAMPLE)
    prior = sum(w * normal(x, m, c) for w, m, c in zip(*EXAMPLE, strict=True))
    np.testing.assert_allclose(log_density(law, process, 0.0, x), np.log(prior), rtol=1e-12)
    flat = mx.two_clusters(np.array([1.0, 0.5]), np.diag([0.3, 0.0]))
    for some in (law, flat):
        np.testing.assert_allclose(posterior_mean(some, process, 0.0, x), x, atol=1e-13)
        np.testing.assert_allclose(posterior_covariance(some, process, 0.0, x), 0, atol=1e-14)
        np.testing.assert_allclose(posterior_mean(some, process, 1e-10, x)[:, 0], x[:, 0], atol=1e-7)
    assert np.isnan(score(flat, process, 0.0, x)).all()
    slopes = jax.jit(jax.jacfwd(mx.posterior_mean, 2))(law, process, 0.0, x)
    # d/dt F^-1 (x + Sigma score) = K x + 2 D score
    np.testing.assert_allclose(slopes, x @ process.drift.T + 1.4 * score(law, process, 0.0, x), rtol=1e-9)


# --- precision, transformations, boundary


def everything(law, process, t, x):
    return (
        mx.log_density(law, process, t, x),
        mx.score(law, process, t, x),
        mx.responsibilities(law, process, t, x),
        mx.posterior_mean(law, process, t, x),
        mx.posterior_covariance(law, process, t, x),
        mx.reverse_drift(law, process, t, x),
        mx.flow_drift(law, process, t, x),
        mx.tweedie_mean(process, t, x, x),
        mx.tweedie_covariance(process, t, x[..., None] * x[..., None, :]),
    )


mapped = jax.jit(jax.vmap(everything, (None, None, 0, None)))


def test_single_precision_and_maps_over_time():
    process, x = process_of(DRIFTS["symmetric"]), np.array([[0.3, -0.8], [2.0, 0.1]])
    at = np.array([0.0, 0.3, 3.0], np.float32)
    with jax.enable_x64(True):
        double = mapped(law_of(EXAMPLE), process_of(DRIFTS["symmetric"]), at.astype(float), x)
        one = score(law_of(EXAMPLE), process_of(DRIFTS["symmetric"]), 0.3, x)
        np.testing.assert_allclose(double[1][1], one, rtol=1e-6)
    for a, b in zip(mapped(law_of(EXAMPLE), process, at, x), double, strict=True):
        assert (a.dtype, b.dtype) == (jnp.float32, jnp.float64)
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)


def test_slopes_are_finite_at_no_time():
    arguments = law_of(EXAMPLE), process_of(DRIFTS["defective"]), 0.0, jnp.array([0.3, -0.8])
    slopes = jax.jit(jax.jacfwd(mx.posterior_covariance, (1, 2)))(*arguments)
    assert all(np.all(np.isfinite(v)) for v in jax.tree.leaves(slopes))


def test_shapes():
    process = process_of(DRIFTS["symmetric"])
    for shape in ((), (3,), (2, 0), (2, 3, 1)):
        got = jax.eval_shape(everything, law_of(EXAMPLE), process, 0.3, jnp.zeros((*shape, 2)))
        ends = (), (2,), (2,), (2,), (2, 2), (2,), (2,), (2,), (2, 2)
        assert [v.shape for v in got] == [shape + end for end in ends]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: mx.mixture(np.ones(2) / 2, np.zeros(2), np.eye(2)[None]), r"\(c, n\)"),
        (lambda: mx.mixture(np.array([1.5, -0.5]), np.zeros((2, 1)), np.ones((2, 1, 1))), "negative"),
        (lambda: mx.mixture(np.array([0.5, 0.4]), np.zeros((2, 1)), np.ones((2, 1, 1))), "add up"),
        (lambda: mx.gaussian(np.zeros(2), np.array([[1.0, 0.5], [0.0, 1.0]])), "symmetric"),
        (lambda: mx.gaussian(np.zeros(2), np.array([[1.0, 2.0], [2.0, 1.0]])), "semidefinite"),
        (lambda: mx.two_clusters(np.zeros(2), np.eye(3)), r"\(c, n\)"),
        (lambda: mx.mode_mixture(1.0, 1.0, 0.5, -0.1), "semidefinite"),
        (lambda: mx.replica_mixture(1.0, 0.5, 1.2), "negative"),
        (lambda: mx.replica_mixture(1.0, 0.5, 0.0, -1.2), "semidefinite"),
        (lambda: mx.score(law_of(EXAMPLE), symmetric_pair(1.0, 0.3), np.ones(2), np.zeros(2)), "number"),
        (lambda: mx.score(law_of(EXAMPLE), process_of(np.eye(3)), 1.0, np.zeros(2)), "as the law"),
        (lambda: mx.score(law_of(EXAMPLE), symmetric_pair(1.0, 0.3), 1.0, np.zeros(3)), "states"),
        (lambda: mx.score(law_of(EXAMPLE), symmetric_pair(1.0, 0.3), -1.0, np.zeros(2)), "negative"),
    ],
)
def test_bad_input_raises(make, match):
    with pytest.raises(ValueError, match=match):
        make()
