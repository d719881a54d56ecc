"""Named data laws, their samples, and generation back to them (sections 12.6, 12.8)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.integrate import solve_ivp

from ou_theory import mixture as mx
from ou_theory.cluster_laws import Clusters
from ou_theory.gain_model import power_law, wiener_gain
from ou_theory.process import Process, symmetric_pair

LAW = settings(max_examples=25, deadline=None, derandomize=True)
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

score, posterior_mean = jax.jit(mx.score), jax.jit(mx.posterior_mean)
reverse_drift, flow_drift = jax.jit(mx.reverse_drift), jax.jit(mx.flow_drift)


def process_of(drift, noise=0.7):
    return Process(jnp.asarray(drift, float), jnp.asarray(noise, float))


def law_of(parts):
    return mx.Mixture(*(jnp.asarray(v, float) for v in parts))


# --- laws


def test_clusters_of_independent_modes_agree(x64):
    """`cluster_laws.Clusters` in the rescaled frame of the variance-preserving process, b = D = 1."""
    variance, centre, t = np.array([0.4, 1.3]), np.array([1.5, -0.7]), 0.6
    x = np.random.default_rng(0).normal(0, 1.5, (6, 2))
    process, sigma2 = process_of(np.eye(2), 1.0), jnp.expm1(2 * t)
    expected = Clusters(jnp.asarray(variance), jnp.asarray(centre[None])).posterior_mean(np.exp(t) * x, sigma2)
    law = mx.two_clusters(centre, np.diag(variance))
    np.testing.assert_allclose(posterior_mean(law, process, t, x), expected, rtol=1e-11)
    # a score in closed form: one tanh
    level = np.exp(-2 * t) * variance + 1 - np.exp(-2 * t)
    moved = np.exp(-t) * centre
    field = (moved * x / level).sum(-1, keepdims=True)
    np.testing.assert_allclose(score(law, process, t, x), (moved * np.tanh(field) - x) / level, rtol=1e-11)
    # and the two signs of a mode mixture, in the modes
    rotation = np.array([[1, 1], [1, -1]]) / 2**0.5
    pair = Clusters(jnp.asarray(variance), jnp.diag(jnp.asarray(centre)))
    expected = pair.posterior_mean(np.exp(t) * x, sigma2) @ rotation
    law = mx.mode_mixture(*centre, *variance)
    np.testing.assert_allclose(posterior_mean(law, process, t, x @ rotation), expected, rtol=1e-11)


@LAW
@given(st.floats(0, 2), st.floats(0, 2), st.floats(0.05, 2), st.floats(0.05, 2), st.floats(-0.9, 0.9), times)
def test_mode_mixture_under_coupling_is_a_law_per_mode(mu, mv, su, sv, g, t):
    rotation = np.array([[1, 1], [1, -1]]) / 2**0.5
    x = np.random.default_rng(0).normal(0, 1.5, (6, 2))
    with jax.enable_x64(True):
        law, process = mx.mode_mixture(mu, mv, su, sv), symmetric_pair(1.0, g, 0.7)
        got = np.asarray(score(law, process, t, x)) @ rotation
        for i, (centre, variance, rate) in enumerate(((mu, su, 1 - g), (mv, sv, 1 + g))):
            mode = mx.two_clusters(np.array([centre]), np.array([[variance]]))
            expected = score(mode, process_of([[rate]]), t, (x @ rotation)[:, i : i + 1])[:, 0]
            np.testing.assert_allclose(got[:, i], expected, rtol=1e-9, atol=1e-9)


def test_replica_mixture(x64):
    law = mx.replica_mixture(1.5, 0.4, 0.6, -0.3)
    means, weights = np.asarray(law.means), np.asarray(law.weights)
    assert weights.sum() == pytest.approx(1, abs=1e-15)
    assert weights @ (means[:, 0] * means[:, 1]) == pytest.approx(0.6 * 1.5**2)
    np.testing.assert_allclose(law.covariances[0], 0.4 * np.array([[1, -0.3], [-0.3, 1]]))
    x = np.random.default_rng(0).normal(0, 1.5, (6, 2))
    process = process_of(np.eye(2))  # independent replicas without coupling
    alone = mx.two_clusters(np.array([1.5]), np.array([[0.4]]))
    got = np.asarray(score(mx.replica_mixture(1.5, 0.4), process, 0.5, x))
    for i in range(2):
        expected = score(alone, process_of([[1.0]]), 0.5, x[:, i : i + 1])[:, 0]
        np.testing.assert_allclose(got[:, i], expected, rtol=1e-11)
    np.testing.assert_array_equal(mx.replica_mixture(1.5, 0.4, 1.0).weights, [0.5, 0, 0, 0.5])


def test_power_law(x64):
    law, t = mx.gaussian(np.zeros(3), np.diag(power_law(4.0, 2.0, 3))), 0.3
    x = np.random.default_rng(0).normal(0, 1.5, (6, 3))
    variance = 4.0 / np.array([1, 4, 9])
    expected = wiener_gain(jnp.asarray(variance), jnp.expm1(2 * t)) * np.exp(t) * x
    np.testing.assert_allclose(posterior_mean(law, process_of(np.eye(3), 1.0), t, x), expected, rtol=1e-12)


def test_samples():
    """40000 draws; means within 5 standard errors, second moments within 5 of theirs."""
    law, count = law_of(EXAMPLE), 40_000
    x = np.asarray(jax.jit(mx.Mixture.draw, static_argnums=2)(law, jax.random.key(0), count), np.float64)
    weights, means, covariances = EXAMPLE
    mean = weights @ means
    apart = means - mean
    covariance = np.einsum("a,aij->ij", weights, covariances + apart[:, :, None] * apart[:, None])
    assert x.shape == (count, 2)
    assert np.all(np.abs(x.mean(0) - mean) < 5 * (np.diag(covariance) / count) ** 0.5)
    products = (x - mean)[:, :, None] * (x - mean)[:, None]
    assert np.all(np.abs(products.mean(0) - covariance) < 5 * products.std(0) / count**0.5)
    flat = mx.two_clusters(np.array([1.0, 2.0]), np.diag([0.3, 0.0])).draw(jax.random.key(1), 50)
    np.testing.assert_allclose(np.abs(flat[:, 1]), 2, rtol=1e-6)
    assert len(np.unique(np.abs(flat[:, 0]))) == 50


# --- generation


@pytest.mark.parametrize("name", DRIFTS)
@pytest.mark.parametrize("stochastic", [False, True], ids=["flow", "reverse SDE"])
def test_generation_returns_the_data(x64, name, stochastic):
    """Moment equations of the linear drift, from the law at T = 1.5 back to the data."""
    process, mean, prior = process_of(DRIFTS[name]), np.array([1.0, -0.5]), np.array([[0.8, 0.2], [0.2, 0.3]])
    law, drift, end = mx.gaussian(mean, prior), reverse_drift if stochastic else flow_drift, 1.5
    probes = np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])

    def rate(s, moments):
        m, c = moments[:2], moments[2:].reshape(2, 2)
        push, *columns = np.asarray(drift(law, process, end - s, probes))
        slope = (np.array(columns) - push).T
        change = slope @ c + c @ slope.T + (1.4 * np.eye(2) if stochastic else 0)
        return np.concatenate([push + slope @ m, change.ravel()])

    late = mx.noised(law, process, end)
    start = np.concatenate([late.means[0], np.ravel(late.covariances[0])])
    got = solve_ivp(rate, (0, end), start, rtol=1e-9, atol=1e-10, method="DOP853").y[:, -1]
    np.testing.assert_allclose(got[:2], mean, atol=1e-6)
    np.testing.assert_allclose(got[2:].reshape(2, 2), prior, atol=1e-6)


@jax.jit
def carried_back(law, process, x, grid):
    """Runge and Kutta along the probability flow."""

    def step(x, ends):
        t, h = ends[0], ends[0] - ends[1]
        a = mx.flow_drift(law, process, t, x)
        b = mx.flow_drift(law, process, t - h / 2, x + h / 2 * a)
        c = mx.flow_drift(law, process, t - h / 2, x + h / 2 * b)
        d = mx.flow_drift(law, process, t - h, x + h * c)
        return x + h / 6 * (a + 2 * b + 2 * c + d), None

    return jax.lax.scan(step, x, jnp.stack([grid[:-1], grid[1:]], 1))[0]


def test_flow_carries_samples_of_the_noised_law_to_the_data():
    """8000 draws; moments up to the third within 5 standard errors."""
    law, process, count = law_of(EXAMPLE), process_of(DRIFTS["one way"]), 8000
    late = mx.noised(law, process, 1.5).draw(jax.random.key(0), count)
    got = np.asarray(carried_back(law, process, late, 1.5 * jnp.linspace(1, 0, 41) ** 2), np.float64)
    data = np.asarray(law.draw(jax.random.key(1), 100_000), np.float64)
    for power in (1, 2, 3):
        for i in range(2):
            error = np.std(got[:, i] ** power) * (1 / count + 1 / 100_000) ** 0.5
            assert abs(np.mean(got[:, i] ** power) - np.mean(data[:, i] ** power)) < 5 * error
    assert abs(np.mean(np.prod(got, 1)) - np.mean(np.prod(data, 1))) < 5 * np.std(np.prod(got, 1)) / count**0.5
