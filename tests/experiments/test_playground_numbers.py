"""The numbers of the interactive page against `ou_theory`, in a real browser: curves, and simulated pairs."""

from functools import lru_cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from playground_browser import DEFAULTS, call, opened, plain, screen
from scipy.special import ndtr

from ou_theory import attention, gain_model, landau, mixture, process, speciation
from ou_theory.clock import make_clock, respace
from ou_theory.estimator import commitment, gap, relative_energy
from ou_theory.gain_model import wiener_gain
from ou_theory.recursion import recursion_energy

MODES = ("common", "difference")

pytestmark = pytest.mark.slow


def close(found, wanted, scale=None):
    """Equal to 1e-6 of the largest value, or of `scale`, and missing at the same places."""
    found, wanted = plain(found), np.asarray(wanted, np.float64)
    assert found.shape == wanted.shape
    assert (np.isnan(found) == np.isnan(wanted)).all()
    if np.isnan(wanted).all():
        return
    scale = np.nanmax(np.abs(wanted)) if scale is None else scale
    assert np.nanmax(np.abs(found - wanted)) <= 1e-6 * scale


# --- curves


def random_settings(count, seed):
    rng = np.random.default_rng(seed)
    for _ in range(count):
        yield {
            "g": float(rng.uniform(-0.95, 0.95)),
            "m2": float(rng.uniform(0.5, 30)),
            "s2": float(rng.uniform(0.05, 2)),
            "progress": float(rng.uniform(0, 1)),
            "gate": float(rng.uniform(0, 1) ** 2),
            "bands": int(rng.integers(2, 9)),
            "exponent": float(rng.uniform(0, 4)),
            "s1": float(rng.uniform(1, 100)),
            "steps": int(rng.choice([10, 19, 50, 117, 250])),
            "sampler": str(rng.choice(["ddim", "ancestral"])),
        }


def edges():
    yield {}
    for g in (-0.95, -0.01, 0, 1e-9, 0.95):
        for m2, s2 in ((0.5, 2), (0.5, 0.5), (0.51, 0.5), (30, 0.05)):
            yield {"g": g, "m2": m2, "s2": s2, "progress": 0.3}
    for progress in (0, 1):
        yield {"g": -0.5, "progress": progress}
    for steps in (10, 250):
        for sampler in ("ddim", "ancestral"):
            for gate in (0, 1e-6, 1 / 3, 1 - 1e-6, 1):  # at 1/3 the gain is 1/2, where a formula has a removable point
                yield {"steps": steps, "sampler": sampler, "gate": gate, "bands": 8, "exponent": 4, "s1": 100}
            yield {"steps": steps, "sampler": sampler, "exponent": 0, "bands": 2, "s1": 1}
    # just before and just after a mode splits, where its wells move fastest
    horizon = 1.35 * float(np.log1p(0.5 * 5.75))
    for mode_time in (np.log1p(0.5 * 5.75), np.log1p(1.5 * 5.75) / 3):
        for t in (mode_time * (1 - 1e-4), mode_time * (1 + 1e-4), mode_time * (1 - 1e-2)):
            yield {"progress": float(1 - t / horizon)}


SETTINGS = [{**DEFAULTS, **some} for some in (*edges(), *random_settings(45, 5))]


@jax.jit
def densities(rate, m2, s2, t, x):
    def one(rate, m, s2, t, x):
        law = mixture.Mixture(jnp.full(2, 0.5), jnp.stack([m, -m])[:, None], jnp.full((2, 1, 1), s2))
        return mixture.log_density(law, process.Process(rate[None, None], jnp.ones(())), t, x[:, None])

    return jax.vmap(one)(rate, jnp.sqrt(m2), s2, t, x)


@pytest.fixture(scope="module")
def evaluated(browser):
    screen(browser, 1280, 1600)
    opened(browser)
    found = call(browser, "arguments[0].map(s => ({...syncgap.evaluate(s), pair: null}))", SETTINGS)
    return list(zip(SETTINGS, found, strict=True))


def test_there_are_many_settings():
    assert len(SETTINGS) >= 60


def test_the_wells_are_those_of_the_theory(evaluated, x64):
    settings = [SimpleNamespace(**s) for s, _ in evaluated]
    g, m2, s2, progress = (np.array([getattr(s, name) for s in settings]) for name in ("g", "m2", "s2", "progress"))
    times = [np.asarray(speciation.mode_speciation_time(np.sqrt(m2), s2, 1 + sign * g)) for sign in (-1, 1)]
    gaps = np.asarray(speciation.speciation_gap(1, g, m2 - s2, m2 - s2))
    t = np.maximum(1.5, 1.35 * np.maximum(*times)) * (1 - progress)
    x = np.array([one["potential"]["x"] for _, one in evaluated])
    for mode, sign in enumerate((-1, 1)):
        rate = 1 + sign * g
        kappa = np.asarray(speciation.mode_kappa(np.sqrt(m2), s2, rate, t))
        branch = np.asarray(landau.branch(np.sqrt(m2), s2, rate, t))
        density = np.asarray(densities(rate, m2, s2, t, x))
        depth = np.asarray(densities(rate, m2, s2, t, branch[:, None]))[:, 0]
        for i, (_, one) in enumerate(evaluated):
            close(one["speciation"][MODES[mode]], times[mode][i], max(times[mode][i], 1e-3))
            close(one["potential"]["kappa"][mode], kappa[i])
            close(one["potential"]["branch"][mode], branch[i], np.sqrt(m2[i]))
            close(one["potential"][MODES[mode]], -density[i])
            close(one["potential"]["depth"][mode], -depth[i], 1)
        assert (branch > 0).any()
        assert (branch == 0).any()
    for i, (_, one) in enumerate(evaluated):
        close(one["speciation"]["gap"], gaps[i], max(times[0][i], times[1][i], 1e-3))
        close(one["potential"]["t"], t[i], 1)


def test_the_curves_against_the_coupling_are_those_of_the_theory(evaluated, x64):
    for settings, one in evaluated[::7]:
        curves, spread = one["coupling"], settings["m2"] - settings["s2"]
        g = plain(curves["g"])
        assert (g[0], g[-1], len(g)) == (-0.95, 0.95, 191)
        scale = max(float(process.transition_time(0.05, spread)), 1e-3)
        close(curves["common"], process.transition_time(1 - g, spread), scale)
        close(curves["difference"], process.transition_time(1 + g, spread), scale)
        close(curves["gap"], speciation.speciation_gap(1, g, spread, spread), scale)


@lru_cache
def estimator(steps):
    """Commitment (gate, K, 8) at variances (8,), gates (G,) and an eta, from `ou_theory` alone; compiled once."""
    clock = make_clock(steps)

    @jax.jit
    def estimate(variance, gates, eta):
        gain = attention.rho(jnp.append(gates, 0.0))[:, None, None]
        wiener = wiener_gain(variance, jnp.asarray(clock.sigma[:, None] ** 2))
        start = jnp.full(8, 1 / clock.alpha_bar[0])
        energy = recursion_energy(gain * wiener, jnp.asarray(clock.sigma), start, eta)
        return commitment(relative_energy(energy[:-1], energy[-1, -1]), clock.log_snr)

    return clock, estimate


def estimates(settings, gates):
    """Clock, variances and commitment of the bands at every gate."""
    clock, estimate = estimator(settings["steps"])
    variance = gain_model.power_law(settings["s1"], settings["exponent"], 8)
    found = estimate(variance, jnp.asarray(gates), {"ddim": 0.0, "ancestral": 1.0}[settings["sampler"]])
    bands = settings["bands"]
    return clock, variance[:bands], jax.tree.map(lambda value: np.asarray(value)[..., :bands], found)


def test_bands_and_gaps_are_those_of_the_recursion(evaluated, x64):
    ramp = (np.arange(51) / 50) ** 2
    weights = {"ddim": gain_model.w_ode, "ancestral": gain_model.w_sde}
    nothing = 0
    for settings, one in evaluated:
        bands, gates = one["bands"], one["gates"]
        clock, variance, found = estimates(settings, np.append(settings["gate"], ramp))
        reach = clock.log_snr[-1] - clock.log_snr[0]
        close(bands["ell"], clock.log_snr)
        close(bands["variance"], variance)
        close(np.transpose(bands["latched"]), found.latch[0], 1)
        close(bands["decided"], found.decided[0], 1)
        close(bands["tau"], found.level[0], reach)
        close(bands["level"], found.latched[0], reach)
        close(bands["tauStep"], clock.step(found.level[0]), len(clock))
        close(bands["gap"], gap(found.level[0], low=0), reach)
        close(bands["gapLatched"], gap(found.latched[0], low=0), reach)
        steps = clock.step(found.level[0])
        close(bands["gapSteps"], steps[-1] - steps[0], len(clock))
        weight = weights[settings["sampler"]]
        close(bands["share"], weight(attention.rho(settings["gate"])), 1)
        close(gates["gate"], ramp)
        close(gates["gap"], gap(found.level[1:], low=0), reach)
        close(gates["gapLatched"], gap(found.latched[1:], low=0), reach)
        close(gates["decidedLow"], found.decided[1:, 0], 1)
        close(gates["decidedHigh"], found.decided[1:, -1], 1)
        close(gates["share"], weight(attention.rho(jnp.asarray(ramp))), 1)
        nothing += bands["gap"] is None
    assert nothing == 4  # at gate 1


def test_the_clock_is_the_samplers_at_every_number_of_steps(page):
    assert 0.5 in np.arange(18) * 55.5 % 1  # 19 steps: positions between two indices, which go to the even one
    assert respace(19)[1] == 56
    assert respace(19)[3] == 166
    counts = list(range(10, 251))
    levels = call(page, "arguments[0].map(steps => syncgap.evaluate({steps, bands: 2}).bands.ell)", counts)
    for count, level in zip(counts, levels, strict=True):
        assert np.abs(plain(level) - make_clock(count).log_snr).max() < 1e-11


# --- simulated pairs

SIMULATED = [
    {"g": 0.5, "path": "sde"},
    {"g": -0.8, "m2": 20, "s2": 0.05, "path": "sde", "seed": 5},
    {"g": 0.95, "m2": 2, "s2": 1, "path": "sde", "seed": 6},
    {"g": 0.3, "m2": 12, "s2": 0.1, "path": "flow", "seed": 7},
    {"g": 0.95, "m2": 30, "s2": 0.05, "path": "flow", "seed": 8},
]


def theory_squares(settings, mode, t):
    rate = 1 + (-1, 1)[mode] * settings["g"]
    data = settings["m2"] + settings["s2"]
    return np.asarray(process.mode_factor(rate, t)) ** 2 * data + np.asarray(process.mode_variance(rate, t))


@pytest.mark.parametrize("some", SIMULATED)
def test_mean_squares_of_pairs_are_those_of_the_process(page, x64, some):
    found = call(page, "syncgap.ensemble(arguments[0], 8000)", some)
    t = plain(found["t"])
    assert t[-1] == 0
    assert (np.diff(t) < 0).all()
    for mode, name in enumerate(MODES):
        wanted = theory_squares({**DEFAULTS, **some}, mode, t)
        mean, error = plain(found[name]["mean"]), plain(found[name]["error"])
        close(found[name]["theory"], wanted)
        assert (np.abs(mean - wanted) < 4.5 * error).all()
        assert (error < 0.03 * wanted).all()


def paths(page, some, count):
    found = call(page, "syncgap.simulate(arguments[0], arguments[1])", some, count)
    return plain(found["t"]), [plain(found[name]) for name in MODES]


def test_noisy_paths_forget_as_the_process_does(page):
    """Backwards in time or forwards, the state at two times has the same joint law: E x_s x_t decays with the rate."""
    some = {"g": 0.4, "m2": 3, "s2": 0.3, "seed": 21}
    t, both = paths(page, some, 3000)
    for mode, x in enumerate(both):
        rate = 1 + (-1, 1)[mode] * some["g"]
        for late, early in ((0, -1), (60, 120), (100, 101), (140, -1)):
            product = x[:, late] * x[:, early] - np.exp(-rate * (t[late] - t[early])) * x[:, early] ** 2
            assert abs(product.mean()) < 4.5 * product.std() / np.sqrt(len(product))


def test_noisy_paths_end_in_the_clusters(page):
    some = {"g": 0.4, "m2": 9, "s2": 0.25, "seed": 22}
    _, both = paths(page, some, 2000)
    for x in both:
        side = np.sign(x[:, -1])
        rest = side * x[:, -1] - 3
        assert abs(side.mean()) < 4.5 / np.sqrt(2000)
        assert abs(rest.mean()) < 4.5 * 0.5 / np.sqrt(2000)
        assert abs(rest.var() / 0.25 - 1) < 4.5 * np.sqrt(2 / 2000)
    ends = np.sign(both[0][:, -1] * both[1][:, -1])
    assert abs(ends.mean()) < 4.5 / np.sqrt(2000)  # the modes decide independently


@pytest.mark.parametrize("some", SIMULATED[3:])
def test_smooth_paths_keep_their_rank(page, some):
    """The probability flow in one dimension moves every quantile along with the law."""
    t, both = paths(page, some, 300)
    for mode, x in enumerate(both):
        rate = 1 + (-1, 1)[mode] * some["g"]
        factor = np.exp(-rate * t)
        mean, spread = factor * np.sqrt(some["m2"]), np.sqrt(factor**2 * some["s2"] + (1 - factor**2) / rate)
        rank = (ndtr((x - mean) / spread) + ndtr((x + mean) / spread)) / 2
        assert np.abs(rank - rank[:, :1]).max() < 2e-3


def test_a_seed_gives_the_same_pair_again(page):
    few, many = (paths(page, {"seed": 3}, count)[1] for count in (2, 5))
    again, other = paths(page, {"seed": 3}, 2)[1], paths(page, {"seed": 4}, 2)[1]
    assert np.array_equal(few, again)
    assert np.array_equal(few, [x[:2] for x in many])
    assert not np.isclose(few, other).any()
    start = [paths(page, {"seed": 3, "path": path}, 1)[1][0][0, 0] for path in ("sde", "flow")]
    assert start[0] == start[1]
    drawn = call(page, "syncgap.shown().pair")
    _, (u, v) = paths(page, {}, 1)
    assert np.array_equal(drawn["common"], u[0])
    assert np.allclose(plain(drawn["a"]) * np.sqrt(2), u[0] + v[0], atol=1e-12)
    assert np.allclose(plain(drawn["b"]) * np.sqrt(2), u[0] - v[0], atol=1e-12)


def test_paths_bend_with_the_sliders(page):
    _, near = paths(page, {"g": 0.5, "progress": 0.1}, 1)
    _, moved = paths(page, {"g": 0.501, "progress": 0.9}, 1)
    assert 0 < np.abs(np.subtract(near, moved)).max() < 0.2


def test_the_wells_that_are_drawn_are_the_branches(page, x64):
    pair = call(page, "syncgap.shown().pair")
    for mode, name in enumerate(MODES):
        rate = 1 + (-1, 1)[mode] * DEFAULTS["g"]
        close(pair["wells"][name], landau.branch(np.sqrt(6), 0.25, rate, plain(pair["t"])))
