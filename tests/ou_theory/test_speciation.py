"""Speciation under any drift: docs/theory.md, section 13.1."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import expm
from scipy.optimize import brentq

from ou_theory import speciation as sp
from ou_theory.process import Process, Transition, mode_noise, symmetric_pair, transition, transition_time

LAW = settings(max_examples=25, deadline=None, derandomize=True)

DRIFTS = {
    "symmetric": [[1.0, -0.4], [-0.4, 1.0]],
    "one way": [[1.0, 0.0], [-0.8, 0.7]],
    "rotating": [[0.6, -1.5], [1.5, 0.6]],
    "defective": [[0.8, 1.0], [0.0, 0.8]],
    "far from normal": [[1.0, 6.0], [0.0, 0.5]],
    "driftless": [[0.0, 0.0], [0.0, 0.0]],
    "stiff": [[300.0, 0.0], [-1.0, 0.01]],
    "slightly unstable": [[1.0, -1.02], [-1.02, 1.0]],
}
CENTRE = np.array([2.0, 1.1])
COVARIANCE = np.array([[0.5, 0.1], [0.1, 0.3]])

kappas, moved_by = jax.jit(sp.kappa), jax.jit(transition)
speciation_time = jax.jit(sp.speciation_time)
mode_speciation_time = jax.jit(sp.mode_speciation_time)
projected_times = jax.jit(sp.projected_times)
projected_gap = jax.jit(sp.projected_gap)
kappa_after = jax.jit(sp.kappa_after)
mode_kappa = jax.jit(sp.mode_kappa)
time_and_slopes = jax.jit(jax.value_and_grad(lambda drift, noise, m, c: sp.speciation_time(Process(drift, noise), m, c),
                                             argnums=(0, 1, 2, 3)))  # fmt: skip


def process_of(drift, noise=0.7):
    return Process(jnp.asarray(drift, float), jnp.asarray(noise, float))


NODES, WEIGHTS = np.polynomial.legendre.leggauss(16)
PIECES = 16


def pulled_back(drift, noise, t):
    """N_t, from its definition as an integral: in equal pieces, each the first one carried on by the flow."""
    drift, piece = np.asarray(drift), t / PIECES
    roots = [expm(drift * piece * (1 + node) / 2) for node in NODES]
    first = piece / 2 * sum(weight * root @ root.T for weight, root in zip(WEIGHTS, roots, strict=True))
    flow, moved, value = expm(drift * piece), np.eye(len(drift)), 0
    for _ in range(PIECES):
        value = value + moved @ first @ moved.T
        moved = flow @ moved
    return 2 * noise * value


def kappa_by_hand(drift, noise, t, centre=CENTRE, covariance=COVARIANCE):
    return centre @ np.linalg.solve(covariance + pulled_back(drift, noise, t), centre)


def random_problem(seed):
    """Any real 3 x 3 drift, clusters of any shape."""
    rng = np.random.default_rng(seed)
    root = rng.normal(size=(3, 3))
    return rng.normal(size=(3, 3)), rng.uniform(0.2, 2), rng.normal(size=3) * rng.uniform(0.5, 5), root @ root.T / 4


# --- kappa


@pytest.mark.parametrize("name", [n for n in DRIFTS if n != "stiff"])
def test_kappa_is_its_definition(x64, name):
    times = np.array([1e-3, 0.2, 0.9, 2.5])
    got = kappas(process_of(DRIFTS[name]), times, CENTRE, COVARIANCE)
    np.testing.assert_allclose(got, [kappa_by_hand(DRIFTS[name], 0.7, t) for t in times], rtol=1e-10)


@LAW
@given(st.integers(0, 2**32 - 1))
def test_kappa_falls_with_time_under_any_drift(seed):
    drift, noise, centre, covariance = random_problem(seed)
    with jax.enable_x64(True):
        got = kappas(process_of(drift, noise), np.linspace(0, 3, 40) / np.linalg.norm(drift), centre, covariance)
    assert np.all(np.diff(got) < 0)


def lowest_curvature(process, t, centre, covariance):
    """Of -log p_t at the symmetric point, in the noised frame, from the two components."""
    factor, noise = transition(process, t)
    precision = jnp.linalg.inv(factor @ covariance @ factor.T + noise)

    def minus_log_density(x):
        away = jnp.stack([x - factor @ centre, x + factor @ centre])
        return -jax.nn.logsumexp(-jnp.einsum("ai,ij,aj->a", away, precision, away) / 2)

    return jnp.linalg.eigvalsh(jax.hessian(minus_log_density)(jnp.zeros(len(centre))))[0]


curvature_and_kappa = jax.jit(lambda p, t, m, c: (lowest_curvature(p, t, m, c), sp.kappa(p, t, m, c)))


@LAW
@given(st.integers(0, 2**32 - 1), st.floats(0.05, 1.5))
def test_sign_of_the_lowest_curvature(seed, t):
    drift, noise, centre, covariance = random_problem(seed)
    with jax.enable_x64(True):
        curvature, kappa = map(float, curvature_and_kappa(process_of(drift, noise), t, centre, covariance))
    assert abs(kappa - 1) < 1e-9 or np.sign(curvature) == np.sign(1 - kappa)


def test_kappa_of_one_mode_and_of_diagonal_data(x64):
    m, s2, t = np.array([1.5, 0.4]), np.array([0.3, 0.8]), 0.6
    alone = mode_kappa(m, s2, 1.0, t)
    np.testing.assert_allclose(alone, m**2 / (s2 + np.expm1(2 * t)), rtol=1e-13)
    joint = kappas(process_of(np.eye(2), 1.0), t, m, np.diag(s2))
    assert float(joint) == pytest.approx(float(alone.sum()), rel=1e-12)


def test_kappa_at_the_ends(x64):
    process = process_of(DRIFTS["one way"])
    ends = kappas(process, np.array([0.0, 1e4]), CENTRE, COVARIANCE)
    np.testing.assert_allclose(ends, [CENTRE @ np.linalg.solve(COVARIANCE, CENTRE), 0], rtol=1e-12, atol=1e-300)


# --- speciation times


@pytest.mark.parametrize("name", list(DRIFTS))
def test_time_by_another_root_finder(x64, name):
    got = float(speciation_time(process_of(DRIFTS[name]), CENTRE, COVARIANCE))
    if name == "stiff":  # too stiff for quadrature; kappa itself is 1 there, and nowhere else
        assert float(kappas(process_of(DRIFTS[name]), got, CENTRE, COVARIANCE)) == pytest.approx(1, rel=1e-10)
        return
    expected = brentq(lambda t: kappa_by_hand(DRIFTS[name], 0.7, t) - 1, 1e-3, 6.0, xtol=1e-13)
    assert got == pytest.approx(expected, rel=1e-9)


def test_references(x64):
    along = np.array([1.0, 1.0]) / 2**0.5, np.array([1.0, -1.0]) / 2**0.5
    for direction, rate, expected in zip(along, (0.6, 1.4), (0.9822124970, 0.6544933799), strict=True):
        got = speciation_time(symmetric_pair(1.0, 0.4), 2 * direction, 0.25 * np.eye(2))
        assert float(got) == pytest.approx(expected, rel=1e-9)
        assert float(mode_speciation_time(2.0, 0.25, rate)) == pytest.approx(expected, rel=1e-9)


@LAW
@given(st.floats(0.1, 4), st.floats(0.01, 9), st.floats(0.1, 2))
def test_clusters_speciate_if_and_only_if_they_stand_apart(m, s2, noise):
    with jax.enable_x64(True):
        time = float(speciation_time(process_of(np.eye(2), noise), np.array([m, 0]), s2 * np.eye(2)))
        assert (time > 0) == (m**2 > s2) or abs(m**2 / s2 - 1) < 1e-12
        assert time == pytest.approx(float(mode_speciation_time(m, s2, 1.0, noise)), rel=1e-9, abs=1e-12)


@LAW
@given(st.integers(0, 2**32 - 1))
def test_kappa_is_one_at_the_time(seed):
    drift, noise, centre, covariance = random_problem(seed)
    drift = drift + 3 * np.eye(3)  # mostly stable
    with jax.enable_x64(True):
        process = process_of(drift, noise)
        time = speciation_time(process, centre, covariance)
        apart = centre @ np.linalg.solve(covariance, centre) > 1
        assert (0 < time < np.inf) == apart or np.linalg.eigvals(drift).real.min() <= 0
        if 0 < time < np.inf:
            assert float(kappas(process, time, centre, covariance)) == pytest.approx(1, rel=1e-9)


def test_strong_coupling_never_erases_the_class(x64):
    # b = D = 1 and spread 24 in the common mode, which grows at a rate above b: the bound is b + D / spread
    centre, bound = np.full(2, 12.5**0.5), 1 + 1 / 24
    for g, finite in ((1.0, True), (bound - 1e-3, True), (bound + 1e-3, False), (2.0, False)):
        time = float(speciation_time(symmetric_pair(1.0, g), centre, np.eye(2)))
        expected = float(transition_time(1 - g, 24.0))
        assert np.isfinite(time) == finite
        assert time == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("rates", [(-1.0, 3.0), (-0.5, -2.0), (-1.0, -1.0), (-30.0, 0.02)])
def test_what_an_unstable_drift_remembers_for_ever(double, rates):
    """Clusters along one growing mode, a little too strong and a little too weak to be remembered."""
    slow, fast = rates
    with jax.enable_x64(double):
        process = symmetric_pair((slow + fast) / 2, (fast - slow) / 2, 0.7)
        for share, finite in ((1.01, False), (0.99, True)):
            strength = (share * (0.2 + 0.7 / -slow)) ** 0.5  # kappa tends to the share
            got = float(speciation_time(process, np.full(2, strength / 2**0.5), 0.2 * np.eye(2)))
            expected = float(transition_time(slow, strength**2 - 0.2, 0.7))
            assert np.isfinite(expected) == finite
            assert got == pytest.approx(expected, rel=1e-9 if double else 1e-3)


def unstable_problem(seed, excess):
    """A drift with one growing mode, which remembers clusters for ever to ``kappa = 1 + excess``; of single precision,
    so that both precisions are asked the same."""
    rng = np.random.default_rng(seed)
    rates, right = np.append(-rng.uniform(0.05, 20), rng.normal(size=2) ** 2 * 5), rng.normal(size=(3, 3))
    right = right if seed % 2 else np.linalg.qr(right)[0]
    drift = np.float32(right @ np.diag(rates) @ np.linalg.inv(right)).astype(float)
    rates, left = np.linalg.eig(drift.T)
    slow = np.argmin(rates.real)
    rate, left = rates[slow].real, left[:, slow].real
    root, centre = rng.normal(size=(3, 3)), rng.normal(size=3)
    covariance = root @ root.T / 4
    # in the end only the growing mode's own projection is left, with noise of the variance D / |rate|
    spread = left @ covariance @ left + 0.7 / -rate
    return drift, centre * (spread * (1 + excess)) ** 0.5 / abs(left @ centre), covariance


@pytest.mark.parametrize("double", [True, False])
@pytest.mark.parametrize("excess", [0.1, 0.01, 1e-3])
def test_what_is_remembered_for_ever_has_no_time(double, excess):
    """Modes that grow and modes that decay: kappa is 1 + excess for as long as it can be told, and what rounding makes
    of it later, when nothing more can be seen beside the noise of the modes that were left behind, is no time."""
    problems = [unstable_problem(seed, excess) for seed in range(40)]
    with jax.enable_x64(double):
        drifts, centres, covariances = (jnp.asarray(np.stack(v), float) for v in zip(*problems, strict=True))
        find = jax.jit(jax.vmap(lambda k, m, c: sp.speciation_time(process_of(k), m, c)))
        times = find(drifts, centres, covariances)
    np.testing.assert_array_equal(times, np.inf)


@pytest.mark.parametrize("covariance", [np.zeros((2, 2)), np.full((2, 2), 0.3), np.array([[0.3, -0.3], [-0.3, 0.3]])])
def test_clusters_without_width(x64, covariance):
    process, drift = process_of(DRIFTS["one way"]), DRIFTS["one way"]
    for centre in (CENTRE, np.array([0.05, 0.02])):
        got = float(speciation_time(process, centre, covariance))
        expected = brentq(lambda t, m=centre: kappa_by_hand(drift, 0.7, t, m, covariance) - 1, 1e-6, 20.0, xtol=1e-14)
        assert got == pytest.approx(expected, rel=1e-9)
    if covariance.any():  # the centre is within the width
        inside = 0.1 * np.linalg.eigh(covariance)[1][:, 1]
        assert float(speciation_time(process, inside, covariance)) == 0


def test_no_centre_no_time():
    assert float(speciation_time(process_of(np.eye(2)), np.zeros(2), np.eye(2))) == 0
    assert np.isnan(float(speciation_time(process_of(np.eye(2)), np.full(2, np.nan), np.eye(2))))


@pytest.mark.parametrize("name", ["rotating", "defective", "slightly unstable"])
def test_slopes_of_the_time(x64, name):
    arguments = [np.asarray(a, float) for a in (DRIFTS[name], 0.7, CENTRE, COVARIANCE)]
    _, slopes = time_and_slopes(*arguments)
    rng = np.random.default_rng(0)
    for i, slope in enumerate(slopes):
        way = rng.normal(size=arguments[i].shape)
        way = way + way.T if i == 3 else way
        moved = []
        for h in (-1e-5, 1e-5):
            changed = list(arguments)
            changed[i] = arguments[i] + h * way
            moved.append(float(time_and_slopes(*changed)[0]))
        assert float((slope * way).sum()) == pytest.approx((moved[1] - moved[0]) / 2e-5, rel=1e-6, abs=1e-8)


def test_times_map_over_problems_and_gradients_stay_finite():
    centres = jnp.array([[2.0, 1.1], [0.0, 0.0], [0.1, 0.1]])
    times = jax.jit(jax.vmap(sp.speciation_time, (None, 0, None)))(process_of(DRIFTS["one way"]), centres, COVARIANCE)
    assert times.dtype == jnp.float32
    assert np.all(np.asarray(times[1:]) == 0)
    centres = jnp.concatenate([centres, jnp.full((1, 2), 30.0)])  # the last is never merged
    time = jax.grad(lambda m: speciation_time(symmetric_pair(1.0, 1.2), m, 0.3 * jnp.eye(2)))
    grads = jax.jit(jax.vmap(time))(centres)
    assert np.all(np.isfinite(grads))


@pytest.mark.parametrize("name", list(DRIFTS))
def test_time_in_single_precision(name):
    with jax.enable_x64(True):
        double = float(speciation_time(process_of(DRIFTS[name]), CENTRE, COVARIANCE))
    assert float(speciation_time(process_of(DRIFTS[name]), CENTRE, COVARIANCE)) == pytest.approx(double, rel=2e-4)


def test_bad_input_raises():
    with pytest.raises(ValueError, match=r"\(n, n\)"):
        sp.speciation_time(process_of(np.eye(2)), np.ones(3), np.eye(2))
    with pytest.raises(ValueError, match="noise strength"):
        sp.speciation_time(process_of(np.eye(2), 0.0), np.ones(2), np.eye(2))


# --- anisotropic drifts


def test_projected_times_of_a_symmetric_pair(x64):
    centre = np.array([[1.0, 1.0], [1.0, -1.0]]) / 2**0.5 @ np.array([2.0, 1.5])  # 2 in u and 1.5 in v
    got = projected_times(symmetric_pair(1.0, 0.4), centre, 0.25 * np.eye(2))
    np.testing.assert_allclose(got.rates, [0.6, 1.4], rtol=1e-12)
    expected = [float(mode_speciation_time(2.0, 0.25, 0.6)), float(mode_speciation_time(1.5, 0.25, 1.4))]
    np.testing.assert_allclose(got.times, expected, rtol=1e-12)
    gap = projected_gap(symmetric_pair(1.0, 0.4), centre, 0.25 * np.eye(2))
    assert float(gap) == pytest.approx(float(sp.speciation_gap(1.0, 0.4, 3.75, 2.0)), rel=1e-12)


def test_projected_times_under_an_unequal_drift(x64):
    drift = np.array([[1.3, -0.5], [-0.2, 0.8]])
    got = projected_times(process_of(drift), CENTRE, COVARIANCE)
    rates, modes = np.linalg.eig(drift.T)
    for rate, mode in zip(rates, modes.T, strict=True):
        spread = (mode @ CENTRE) ** 2 - mode @ COVARIANCE @ mode
        i = int(np.argmin(np.abs(np.asarray(got.rates) - rate)))
        assert float(got.times[i]) == pytest.approx(float(transition_time(rate, spread, 0.7)), rel=1e-10)
        # the projection is a scalar process with this rate and noise
        factor, noise = moved_by(process_of(drift), 0.8)
        np.testing.assert_allclose(mode @ factor, np.exp(-rate * 0.8) * mode, rtol=1e-10)
        variance = np.exp(-1.6 * rate) * float(mode_noise(rate, 0.8, 0.7))
        assert float(mode @ noise @ mode) == pytest.approx(variance, rel=1e-10)
    assert np.all(np.diff(got.rates) > 0)


def test_rotating_modes_have_no_times():
    with pytest.raises(ValueError, match="rotat"):
        sp.projected_gap(process_of(DRIFTS["rotating"]), CENTRE, COVARIANCE)


@pytest.mark.parametrize("double", [False, True], ids=["float32", "x64"])
def test_clusters_that_hardly_stand_apart(double):
    """kappa(0) = 1 + e for e down to rounding: the clock at e / (1 + e), or 0, never infinite."""
    with jax.enable_x64(double):
        eps = float(jnp.finfo(jnp.zeros(()).dtype).eps)
        for excess in eps * 4.0 ** np.arange(-1, 12):
            process = Process(jnp.eye(1), jnp.asarray(1.0))
            t = float(speciation_time(process, jnp.ones(1), jnp.full((1, 1), 1 / (1 + excess))))
            assert t == pytest.approx(float(transition_time(1.0, excess / (1 + excess))), rel=1e-3, abs=2 * eps)


def test_kappa_under_a_drift_that_changes(x64):
    """Steps of one drift are that drift; of two, in either order, the composed law."""
    centre, covariance = np.array([2.0, 0.5]), np.diag([0.25, 0.6])
    drifts = [Process(jnp.array(k), jnp.asarray(0.7)) for k in ([[1.0, 0.0], [-1.2, 1.0]], [[0.4, -1.5], [1.5, 0.4]])]
    once, other = (moved_by(process, 0.3) for process in drifts)
    same = moved_by(drifts[0], jnp.full(4, 0.3))
    got = kappa_after(same, centre, covariance)
    np.testing.assert_allclose(got, kappas(drifts[0], 0.3 * np.arange(1, 5), centre, covariance), rtol=1e-11)
    ends = []
    for a, b in ((once, other), (other, once)):
        steps = Transition(*(jnp.stack(pair) for pair in zip(a, b, strict=True)))
        spread = b.factor @ (a.factor @ covariance @ a.factor.T + a.covariance) @ b.factor.T + b.covariance
        moved = b.factor @ a.factor @ centre
        ends.append(float(kappa_after(steps, centre, covariance)[-1]))
        assert ends[-1] == pytest.approx(float(moved @ np.linalg.solve(spread, moved)), rel=1e-12)
    assert abs(ends[0] - ends[1]) > 0.01
