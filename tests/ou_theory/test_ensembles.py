"""Ensembles: keys, exact steps at any size, orders of the flows, an independent solver (section 12.9)."""

from functools import partial

import diffrax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import ks_2samp

from ou_theory import ensembles as en
from ou_theory import mixture as mx
from ou_theory import process as ou
from ou_theory.cluster_laws import Clusters

pytestmark = pytest.mark.long

PAIR = ([1.0, 0.4, 0.2], [[1.5, -0.8, 0.0], [0.0, 0.0, 1.2]])  # variances within, centres of two signs
LAW = ([0.4, 0.6], [[1.0, 0.5], [-1.0, 0.2]], [[[0.5, 0.1], [0.1, 0.4]], [[0.3, -0.05], [-0.05, 0.6]]])
DRIFTS = {
    "symmetric": [[1.0, -0.4], [-0.4, 1.0]],
    "one way": [[1.0, -3.0], [0.0, 0.5]],
    "rotating": [[0.3, -2.0], [2.0, 0.4]],
    "unstable": [[0.2, -1.0], [-0.5, -0.3]],
}


def clusters():
    return Clusters(*(jnp.asarray(v, float) for v in PAIR))


def process_of(name, noise=0.7):
    return ou.Process(jnp.asarray(DRIFTS[name], float), jnp.asarray(noise, float))


@partial(jax.jit, static_argnums=(0, 3, 4))
def generate(make, levels, seed, count, block=None):
    """The three modes of the law, from their noised state."""
    law = clusters()
    start = en.noised_clusters(law, levels.before[0], seed, jnp.arange(count))
    return en.simulate(make(law), start, levels, seed, block=block, observe=lambda y: y[0])


def within_errors(got, expected, errors=5.0):
    """Means over the leading axis, within so many standard errors."""
    got = np.asarray(got, np.float64)
    error = got.std(0) / len(got) ** 0.5
    assert np.all(np.abs(got.mean(0) - expected) <= errors * error), (got.mean(0), expected, error)


# --- random numbers


@pytest.mark.parametrize("make", [en.clusters_sde, en.clusters_flow])
def test_paths_do_not_depend_on_what_runs_beside_them(make):
    levels = en.noise_steps(np.geomspace(50, 1e-2, 6))
    whole, seen = generate(make, levels, 3, 50)
    blocked, seen_in_blocks = generate(make, levels, 3, 50, 16)
    some, _ = generate(make, levels, 3, 20)
    assert seen.shape == (50, 5)
    np.testing.assert_allclose(blocked, whole, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen_in_blocks, seen, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(some, whole[:20], rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(seen[:, -1], whole[:, 0])
    other, _ = generate(make, levels, 4, 50)
    assert np.abs(np.asarray(other) - whole).min() > 0


def test_a_run_in_two_legs_is_the_whole():
    law, ladder = clusters(), np.geomspace(50, 1e-2, 6)
    start = en.noised_clusters(law, 50.0, 3, jnp.arange(20))
    run = jax.jit(
        lambda x, noise, first: en.simulate(en.clusters_sde(law), x, en.noise_steps(noise), 3, first=first)[0]
    )
    whole, half = run(start, ladder, 1), run(start, ladder[:3], 1)
    np.testing.assert_allclose(run(half, ladder[2:], 3), whole, rtol=1e-5, atol=1e-5)
    assert np.abs(np.asarray(run(half, ladder[2:], 1)) - whole).min() > 0


def test_no_key_serves_twice():
    """Of paths, steps and seeds; the start is step 0."""
    keys = [en.path_keys(seed, np.arange(3), step) for seed in (0, 1) for step in range(3)]
    data = {tuple(row) for k in keys for row in np.asarray(jax.random.key_data(k)).tolist()}
    assert len(data) == 18
    step = jax.jit(
        lambda: en.simulate(lambda key, x, level: jax.random.normal(key, x.shape), jnp.zeros((3, 2)), jnp.zeros(2), 5)
    )
    expected = jax.vmap(lambda key: jax.random.normal(key, (2,)))(en.path_keys(5, np.arange(3), 2))
    np.testing.assert_allclose(step()[0], expected, rtol=1e-6)


def test_nothing_is_kept_that_is_not_observed():
    """Memory of the compiled simulation does not grow with the steps."""

    def memory(steps, observe=None):
        levels = en.noise_steps(np.geomspace(50, 1e-2, steps + 1))
        run = jax.jit(lambda x: en.simulate(en.clusters_sde(clusters()), x, levels, 0, observe=observe, block=64))
        found = run.lower(jnp.zeros((256, 3))).compile().memory_analysis()
        return found.temp_size_in_bytes + found.output_size_in_bytes

    assert memory(400) - memory(40) < 400 * 8 * 4  # the levels themselves, a few numbers a step
    assert memory(400, lambda y: y) - memory(40, lambda y: y) > 256 * 3 * 4 * 300


# --- independent modes


@pytest.mark.parametrize("steps", [1, 3, 40])
def test_reverse_steps_of_any_size_return_the_data(steps):
    """20000 paths: first and second moments, products of the signs' directions, within 5 standard errors."""
    law = clusters()
    levels = en.noise_steps(np.append(np.geomspace(30, 0.05, steps), 0))
    y, _ = generate(en.clusters_sde, levels, 0, 20_000)
    within_errors(y, 0.0)
    within_errors(y**2, np.asarray(law.total_variance()))
    within_errors(y[:, 0] * y[:, 1], 1.5 * -0.8)
    within_errors(y[:, 0] * y[:, 2], 0.0)
    within_errors(y[:, 2] ** 4, 1.2**4 + 6 * 1.2**2 * 0.2 + 3 * 0.2**2)


def test_one_step_is_many():
    """The joint law of a noisy and a clean state: 20000 paths in 1 and 20000 others in 30 steps, by the test of
    Kolmogorov and Smirnov."""
    one, _ = generate(en.clusters_sde, en.noise_steps(np.array([4.0, 0.1])), 0, 20_000)
    many, _ = generate(en.clusters_sde, en.noise_steps(np.geomspace(4.0, 0.1, 31)), 1, 20_000)
    first, second = (en.noised_clusters(clusters(), 4.0, seed, jnp.arange(20_000)) for seed in (0, 1))
    for a, b in ((one, many), (one * first, many * second), (one - 0.3 * first, many - 0.3 * second)):
        for i in range(3):
            assert ks_2samp(np.asarray(a)[:, i], np.asarray(b)[:, i]).pvalue > 1e-3
    wrong = generate(en.clusters_sde, en.noise_steps(np.array([4.0, 0.2])), 0, 20_000)[0]  # the check can fail
    assert min(ks_2samp(np.asarray(wrong)[:, i], np.asarray(many)[:, i]).pvalue for i in range(3)) < 1e-3


def test_modes_may_have_noise_of_their_own():
    """A coupled pair in its modes: the same paths in one frame and in the other."""
    law, times = Clusters(jnp.array([0.25, 0.25]), jnp.array([[1.6, 0.0], [0.0, 1.2]])), np.linspace(2, 0, 21)
    noise = np.stack([ou.mode_noise(0.6, times), ou.mode_noise(1.4, times)], 1)
    start = en.noised_clusters(law, noise[0], 0, jnp.arange(20_000))
    y, _ = jax.jit(lambda s: en.simulate(en.clusters_sde(law), s, en.noise_steps(noise), 0))(start)
    within_errors(y**2, [1.6**2 + 0.25, 1.2**2 + 0.25])
    within_errors(y[:, 0] * y[:, 1], 0.0)
    # the bridge of each mode: what is left of the start is what the forward process added
    within_errors(y * start, [1.6**2 + 0.25, 1.2**2 + 0.25])


def test_flow_of_a_gaussian_law_is_exact(x64):
    law = Clusters(jnp.array([3.0, 0.2]), jnp.zeros((0, 2)))
    start = jnp.array([[1.0, -2.0]])
    got, _ = en.simulate(en.clusters_flow(law), start, en.noise_steps(np.array([9.0, 0.7, 0.0])), 0)
    np.testing.assert_allclose(got, start * np.sqrt(law.variance / (law.variance + 9)), rtol=1e-13)


def test_order_of_the_flow_of_clusters(x64):
    """Against a solution to 1e-10; halving the steps divides the error by 4."""
    law, start = clusters(), np.random.default_rng(0).normal(size=(20, 3)) * 3

    def velocity(log_noise, y, _):
        noise = jnp.exp(log_noise)
        return (y - law.posterior_mean(y, noise)) / 2

    def solve(y):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(velocity), diffrax.Dopri8(), np.log(9.0), np.log(0.05), None, y,
            stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-10),
        ).ys[0]  # fmt: skip

    expected = jax.jit(jax.vmap(solve))(start)
    errors = []
    for steps in (40, 80, 160):
        levels = en.noise_steps(np.geomspace(9.0, 0.05, steps + 1))
        got, _ = jax.jit(lambda levels: en.simulate(en.clusters_flow(law), start, levels, 0))(levels)
        errors.append(np.abs(got - expected).max())
    assert errors[-1] < 2e-4
    np.testing.assert_allclose(np.divide(errors[:-1], errors[1:]), 4, rtol=0.2)


# --- mixtures under any drift


@partial(jax.jit, static_argnums=2)
def start_of(law, steps, count, seed=0):
    laws = en.state_laws(law, steps)
    return jax.tree.map(lambda v: v[-1], laws).draw(jax.random.key(seed), count)


@jax.jit
def ends_of(law, steps, start, seed):
    return en.simulate(en.mixture_sde, start, en.bridges(law, steps), seed)[0]


transition = jax.jit(ou.transition)


@pytest.mark.parametrize("name", DRIFTS)
@pytest.mark.parametrize("steps", [1, 25])
def test_reverse_steps_under_any_drift_return_the_data(name, steps):
    """20000 paths to the data: moments up to the third within 5 standard errors; and with the start, whose covariance
    with the data is C F^T."""
    law, process = mx.mixture(*LAW), process_of(name)
    rungs = transition(process, np.full(steps, 1.5 / steps))
    start = start_of(law, rungs, 20_000)
    x = ends_of(law, rungs, start, 1)
    data = np.asarray(law.draw(jax.random.key(9), 400_000), np.float64)
    weights, means, covariances = (np.asarray(v) for v in law)
    second = np.einsum("a,aij->ij", weights, covariances + means[:, :, None] * means[:, None])
    within_errors(x, weights @ means)
    within_errors(x[:, :, None] * x[:, None], second)
    within_errors(x**3, (data**3).mean(0), 6)  # beside the error of the data's own mean
    factor = np.asarray(transition(process, 1.5).factor)
    within_errors(x[:, :, None] * start[:, None], second @ factor.T)


def test_drift_that_changes_in_time():
    """Two drifts that do not commute, one after the other: the laws on the way are the composed ones, and paths end as
    the data."""
    law, parts = mx.mixture(*LAW), [transition(process_of(name), 0.6) for name in ("one way", "rotating")]
    steps = ou.Transition(*(jnp.stack([a, b]) for a, b in zip(*parts, strict=True)))
    laws = jax.jit(en.state_laws)(law, steps)
    factor = parts[1].factor @ parts[0].factor
    np.testing.assert_allclose(laws.means[-1], law.means @ factor.T, rtol=1e-5, atol=1e-6)
    noise = parts[1].factor @ parts[0].covariance @ parts[1].factor.T + parts[1].covariance
    spread = factor @ law.covariances @ factor.T + noise
    np.testing.assert_allclose(laws.covariances[-1], spread, rtol=1e-5, atol=1e-6)
    x = ends_of(law, steps, start_of(law, steps, 20_000), 1)
    within_errors(x, np.asarray(law.weights @ law.means))
    within_errors(
        x[:, 0] * x[:, 1], float(jnp.einsum("a,a", law.weights, law.covariances[:, 0, 1] + law.means.prod(1)))
    )


def test_a_law_without_width_is_reached():
    """Stored samples as data: every path ends at one of them, in equal shares."""
    stored = np.array([[1.0, 0.0], [-1.0, 1.0], [0.5, -2.0]])
    law = mx.mixture(np.full(3, 1 / 3), stored, np.zeros((3, 2, 2)))
    rungs = transition(process_of("symmetric"), np.full(8, 0.2))
    x = ends_of(law, rungs, start_of(law, rungs, 6000), 0)
    distance = np.linalg.norm(np.asarray(x)[:, None] - stored, axis=-1)
    assert distance.min(1).max() < 1e-3
    shares = np.bincount(distance.argmin(1)) / 6000
    np.testing.assert_allclose(shares, 1 / 3, atol=5 * (2 / 9 / 6000) ** 0.5)


@pytest.mark.long
def test_flow_of_a_mixture_is_diffraxs(x64):
    """Path by path, fourth order."""
    law, process = mx.mixture(*LAW), process_of("one way")
    start = np.random.default_rng(0).normal(size=(10, 2))

    def solve(x):
        return diffrax.diffeqsolve(
            diffrax.ODETerm(lambda s, x, _: mx.flow_drift(law, process, 1.5 - s, x)), diffrax.Dopri8(),
            0.0, 1.5, None, x,
            stepsize_controller=diffrax.PIDController(rtol=1e-10, atol=1e-11),
        ).ys[0]  # fmt: skip

    expected = jax.jit(jax.vmap(solve))(start)
    flow = jax.jit(lambda times: en.simulate(en.mixture_flow(law, process), start, en.time_steps(times), 0)[0])
    errors = [np.abs(flow(1.5 * np.linspace(0, 1, steps + 1)) - expected).max() for steps in (20, 40)]
    assert errors[1] < 1e-5
    assert 10 < errors[0] / errors[1] < 25


@pytest.fixture(scope="module")
def by_diffrax(stock_compiler):
    """Paths of the reverse SDE by an independent solver: additive noise, order 1.5, 50 steps of equal size."""
    law, end = mx.mixture(*LAW), 1.5

    def solve(process, x, key):
        noise = diffrax.UnsafeBrownianPath((2,), key, diffrax.SpaceTimeLevyArea)  # no step is tried twice
        terms = diffrax.MultiTerm(
            diffrax.ODETerm(lambda s, x, _: mx.reverse_drift(law, process, end - s, x)),
            diffrax.ControlTerm(lambda s, x, _: jnp.eye(2) * jnp.sqrt(2 * process.noise), noise),
        )
        return diffrax.diffeqsolve(terms, diffrax.SRA1(), 0.0, end, end / 50, x, adjoint=diffrax.ForwardMode()).ys[0]

    return jax.jit(jax.vmap(solve, (None, 0, 0)), compiler_options=stock_compiler)


@pytest.mark.long
@pytest.mark.parametrize("name", ["symmetric", "one way"])
def test_reverse_sde_has_the_law_of_diffraxs(by_diffrax, name):
    """4000 paths of an independent solver beside 20000 exact ones: moments up to the third within 5 joint standard
    errors."""
    law, process, end = mx.mixture(*LAW), process_of(name), 1.5
    rungs = transition(process, np.full(10, end / 10))
    theirs = by_diffrax(process, start_of(law, rungs, 4000, 1), jax.random.split(jax.random.key(0), 4000))
    ours = ends_of(law, rungs, start_of(law, rungs, 20_000, 2), 3)
    theirs, ours = np.asarray(theirs, np.float64), np.asarray(ours, np.float64)
    for of in (lambda x: x, lambda x: x**2, lambda x: x**3, lambda x: x.prod(1)):
        a, b = of(theirs), of(ours)
        error = (a.var(0) / len(a) + b.var(0) / len(b)) ** 0.5
        assert np.all(np.abs(a.mean(0) - b.mean(0)) < 5 * error)


def test_levels_run_from_noise_to_data():
    down = en.noise_steps([3.0, 2.0, 0.0])
    np.testing.assert_array_equal(down.before, [3, 2])
    np.testing.assert_array_equal(down.after, [2, 0])
    back = en.time_steps([0.0, 0.5, 2.0])
    np.testing.assert_array_equal(back.before, [2, 0.5])
    np.testing.assert_array_equal(back.after, [0.5, 0])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: en.noise_steps([1.0, 2.0]), "must fall"),
        (lambda: en.noise_steps([1.0, -1.0]), "negative"),
        (lambda: en.noise_steps([1.0]), "two levels"),
        (lambda: en.noise_steps([np.inf, 1.0]), "overflowed"),
        (lambda: en.noised_clusters(clusters(), -1.0, 0, jnp.arange(2)), ">= 0"),
        (lambda: en.simulate(None, jnp.zeros((2, 1)), jnp.zeros(2), 0, paths=jnp.array([0.5, 1.0])), "whole numbers"),
        (lambda: en.simulate(None, jnp.zeros((0, 1)), jnp.zeros(2), 0), "not empty"),
        (lambda: en.time_steps([1.0, 0.5]), "increase"),
        (lambda: en.time_steps(1.0), "two times"),
        (lambda: en.simulate(None, jnp.zeros(3), jnp.zeros(2), 0), r"\(N, n\)"),
        (lambda: en.simulate(None, jnp.zeros((3, 1)), jnp.zeros(2), 0, paths=jnp.arange(2)), r"\(N,\)"),
        (lambda: en.simulate(None, jnp.zeros((3, 1)), (jnp.zeros(2), jnp.zeros(3)), 0), "leading axis"),
        (lambda: en.simulate(None, jnp.zeros((3, 1)), jnp.zeros(2), 0, block=0), "block"),
        (lambda: en.bridges(mx.mixture(*LAW), ou.transition(ou.replicas(1.0, 0.1, 3), np.ones(2))), "must be"),
    ],
)
def test_bad_input_raises(make, match):
    with pytest.raises(ValueError, match=match):
        make()
