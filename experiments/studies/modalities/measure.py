"""Two modalities generated together: theory of the coupled process beside simulation with exact scores
(docs/theory.md, section 13.10).

Each part of the study draws its own random numbers, is stored as one group, and is left out when the run is resumed.
The time of an event is read off clones: it is where the labels (or the values) of two continuations of one state have
the correlation that theory gives for the event. Every reading has a standard error. The same fit reads the exact curve,
too, which shows what the fit costs.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

from experiments.frame.bench import Bench
from experiments.frame.measured import Definitions
from experiments.studies.modalities import cases
from experiments.studies.modalities.clone_reading import (
    SPECIATION,
    Draws,
    clones_of_mixture,
    clones_of_modes,
    correlation,
    end_of_line,
    read_crossing,
    read_zero,
)
from experiments.studies.modalities.settings import PARTS, ModalitiesConfig
from ou_theory import process as ou
from ou_theory.cluster_laws import Clusters, sign_correlation
from ou_theory.collapse import condensation, pair_collapse_times
from ou_theory.gain_model import commitment_time, q_uncoupled
from ou_theory.keys import random_key
from ou_theory.mixture import two_clusters
from ou_theory.speciation import kappa, mode_kappa, mode_speciation_time

_READ = "read off clones, value and standard error"
_FITTED = "the same fit on the exact curve"
DEFINITIONS: Definitions = {
    "rate": ("relaxation rate of a mode, simulated forwards", "1 / time"),
    "rate_error": ("standard error of the relaxation rate", "1 / time"),
    "rate_theory": ("relaxation rate of a mode, theory", "1 / time"),
    "correlation": ("correlation of clones' labels by the time at which they branch", "1"),
    "correlation_error": ("standard error of that correlation", "1"),
    "correlation_theory": ("correlation of clones' labels, exact", "1"),
    "speciation": (f"speciation time {_READ}", "time"),
    "speciation_fitted": (f"speciation time by {_FITTED}", "time"),
    "speciation_theory": ("speciation time, theory", "time"),
    "unequal": (f"speciation time under couplings of any symmetry {_READ}", "time"),
    "unequal_fitted": (f"speciation time under couplings of any symmetry by {_FITTED}", "time"),
    "unequal_theory": ("speciation time under couplings of any symmetry, theory", "time"),
    "collapse": ("collapse time of stored samples, value and standard error", "time"),
    "collapse_limit": ("collapse time at infinite dimension, value and standard error", "time"),
    "collapse_theory": ("collapse time, theory", "time"),
    "commitment": (f"commitment time {_READ}", "time"),
    "commitment_fitted": (f"commitment time by {_FITTED}", "time"),
    "commitment_theory": ("commitment time, theory", "time"),
    "wave_rate": ("relaxation rate of a wave around the ring", "1 / time"),
    "scheduled": (f"speciation time under a schedule {_READ}", "time"),
    "scheduled_fitted": (f"speciation time under a schedule by {_FITTED}", "time"),
    "scheduled_theory": ("speciation time under a schedule, theory", "time"),
    "schedule_coupling": ("coupling of a schedule at a time", "1"),
    "mode": ("common or difference mode", "1"),
    "time": ("time of the branch", "time"),
    "reading": ("value, and its standard error", "1"),
    "kind": ("kind of coupling", "1"),
    "strength": ("coupling of that kind", "1"),
    "g": ("coupling g", "1"),
    "score": ("modes that the score knows", "1"),
    "size": ("modes of a modality", "1"),
    "wave": ("wave around the ring", "1"),
    "schedule": ("name of the schedule", "1"),
    "step": ("middle of a step of the schedule's grid", "time"),
}


def _towards_data(t: float, steps: int) -> np.ndarray:
    """Times (steps + 1,) from t to 0, denser towards 0."""
    return t * np.linspace(1, 0, steps + 1) ** 1.5


def _label_curves(noise_of: Callable, times: np.ndarray, config: ModalitiesConfig, draws: Draws):
    """Correlations (T, 2) of clones' labels in both modes and their errors, for branches at the times; `noise_of` gives
    the noise (t, 2) of the modes at times (t,)."""
    found = []
    for t in times:
        noise = jnp.asarray(noise_of(_towards_data(t, config.steps)), jnp.float32)
        first, second = clones_of_modes(cases.pair_of_clusters(), noise, draws(), config.paths)
        found.append(correlation(np.asarray(jnp.sign(first) * jnp.sign(second), np.float64)))
    values, errors = zip(*found, strict=True)
    return np.array(values), np.array(errors)


def _read(times, values, errors, level) -> np.ndarray:
    """Readings (n, 2) of curves (T, n): value and error."""
    return np.array([read_crossing(times, values[:, i], errors[:, i], level) for i in range(values.shape[1])])


# --- the parts


def timescales(config: ModalitiesConfig) -> xr.Dataset:
    """Rates of both modes by a forward simulation: Euler's rule in small steps, the decay of each mode's correlation
    with its start."""
    end, euler = 0.5, 200
    dt = end / euler

    @jax.jit
    def decay(g, key):
        drift = jnp.array([[cases.B, -1.0], [-1.0, cases.B]]) * jnp.array([[1.0, g], [g, 1.0]])
        for_start, for_noise = jax.random.split(key)
        start = jax.random.normal(for_start, (16 * config.paths, 2))

        def advance(x, key):
            return x - dt * x @ drift.T + jnp.sqrt(2 * dt) * jax.random.normal(key, x.shape), None

        x, _ = jax.lax.scan(advance, start, jax.random.split(for_noise, euler))
        rotate = jnp.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
        return start @ rotate, x @ rotate

    rates, errors = [], []
    for i, g in enumerate(cases.COUPLINGS):
        start, x = (np.asarray(v, np.float64) for v in decay(g, jax.random.fold_in(random_key(config.seed), i)))
        factor = (start * x).mean(0) / (start**2).mean(0)
        error = (start * (x - factor * start)).std(0) / (start**2).mean(0) / len(x) ** 0.5
        # (1 - rate dt)^n is what Euler's rule makes of exp(-rate t)
        rates.append((1 - factor ** (1 / euler)) / dt)
        errors.append(error / factor / end)
    data = {
        "rate": (("coupling", "mode"), rates),
        "rate_error": (("coupling", "mode"), errors),
        "rate_theory": (("coupling", "mode"), [cases.mode_rates(g) for g in cases.COUPLINGS]),
    }
    return xr.Dataset(data, {"coupling": cases.COUPLINGS, "mode": list(cases.MODES)})


def speciation(config: ModalitiesConfig) -> xr.Dataset:
    """Speciation of both modes against a symmetric coupling."""
    times, draws = np.arange(0.1, 2.2, 0.06), Draws(config.seed, 1)
    curves, errors, exact, found, fitted = [], [], [], [], []
    for g in cases.COUPLINGS:
        rates = cases.mode_rates(g)
        values, error = _label_curves(lambda t, r=rates: ou.mode_noise(r, t[:, None]), times, config, draws)
        known = np.asarray(sign_correlation(mode_kappa(cases.CENTRE, cases.WIDTH, rates, times[:, None])))
        curves.append(values)
        errors.append(error)
        exact.append(known)
        found.append(_read(times, values, error, SPECIATION))
        fitted.append(_read(times, known, error, SPECIATION)[:, 0])
    data = {
        "correlation": (("coupling", "time", "mode"), curves),
        "correlation_error": (("coupling", "time", "mode"), errors),
        "correlation_theory": (("coupling", "time", "mode"), exact),
        "speciation": (("coupling", "mode", "reading"), found),
        "speciation_fitted": (("coupling", "mode"), fitted),
        "speciation_theory": (
            ("coupling", "mode"),
            [np.asarray(mode_speciation_time(cases.CENTRE, cases.WIDTH, cases.mode_rates(g))) for g in cases.COUPLINGS],
        ),
    }
    coords = {"coupling": cases.COUPLINGS, "time": times, "mode": list(cases.MODES), "reading": ["value", "error"]}
    return xr.Dataset(data, coords)


def anisotropic(config: ModalitiesConfig) -> xr.Dataset:
    """The joint criterion under couplings of any symmetry: the first modality is clustered, the second is not."""
    law = two_clusters(*cases.UNEQUAL_LAW)
    draws = Draws(config.seed, 2)
    shape = (len(cases.KINDS), cases.UNEQUAL.size)
    found, fitted, exact = np.full((*shape, 2), np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    for i, kind in enumerate(cases.KINDS):
        for j, g in enumerate(cases.UNEQUAL):
            process = cases.unequal_process(kind, g)
            if kind == "symmetric" and g >= cases.B:
                continue
            exact[i, j] = cases.unequal_time(kind, g)
            times = exact[i, j] * np.linspace(0.4, 1.8, 20)
            curve = []
            for t in times:
                steps = ou.transition(process, jnp.asarray(np.diff(_towards_data(t, config.steps)[::-1])))
                first, second = clones_of_mixture(law, steps, draws(), config.paths)
                labels = np.asarray(jnp.sign(first[:, 0]) * jnp.sign(second[:, 0]), np.float64)
                curve.append(correlation(labels))
            values, errors = np.array(curve).T
            known = np.asarray(sign_correlation(kappa(process, jnp.asarray(times), *cases.UNEQUAL_LAW)))
            found[i, j] = read_crossing(times, values, errors, SPECIATION)
            fitted[i, j] = read_crossing(times, known, errors, SPECIATION).value
    data = {
        "unequal": (("kind", "strength", "reading"), found),
        "unequal_fitted": (("kind", "strength"), fitted),
        "unequal_theory": (("kind", "strength"), exact),
    }
    return xr.Dataset(data, {"kind": list(cases.KINDS), "strength": cases.UNEQUAL, "reading": ["value", "error"]})


def _collapse_times(load: float) -> np.ndarray:
    """Collapse times of all couplings and scores, at ``log n / d = load``."""
    one = np.ones(1)
    return np.array([pair_collapse_times(cases.B, g, one, one, load) for g in cases.COLLAPSE_COUPLINGS])


def collapse(config: ModalitiesConfig) -> xr.Dataset:
    """Times at which a sample outweighs all others, in data sets of growing size, and a line through them in 1 / d."""
    times = np.geomspace(0.15, 1.6, 45)
    noise = np.stack([np.asarray(ou.mode_noise(cases.mode_rates(g), times[:, None])) for g in cases.COLLAPSE_COUPLINGS])
    # a score that knows one mode sees the other under so much noise that it says nothing
    blind = np.array([[1.0, 1.0], [1.0, np.inf], [np.inf, 1.0]])
    levels = jnp.asarray(noise[:, None] * blind[:, None], jnp.float32)  # coupling, score, time, mode

    @partial(jax.jit, static_argnums=(0, 1))
    def excess(size, count, seed, trials):
        def one(trial):
            for_data, for_noise = jax.random.split(jax.random.fold_in(random_key(seed), trial))
            stored = jax.random.normal(for_data, (count, 2 * size))
            return condensation(stored, jax.random.normal(for_noise, (2 * size,)), jnp.repeat(levels, size, -1))

        return jax.lax.map(one, trials, batch_size=8)

    known = _collapse_times(cases.LOAD)
    found = np.empty((len(cases.COLLAPSE_COUPLINGS), len(cases.SCORES), len(cases.SIZES), 2))
    for s, size in enumerate(cases.SIZES):
        count = round(np.exp(cases.LOAD * size))
        seed = Draws(config.seed, 3 + s)()[0]
        odds = np.asarray(excess(int(size), count, seed, jnp.arange(config.trials)), np.float64)
        for i in range(found.shape[0]):
            for j in range(found.shape[1]):
                found[i, j, s] = read_zero(times, odds[:, i, j])
        # the own sample is none of the others, and their number is whole: what that changes in theory is taken out
        found[:, :, s, 0] += known - _collapse_times(np.log(count - 1) / size)
    limit = [[end_of_line(cases.SIZES, readings) for readings in scores] for scores in found]
    data = {
        "collapse": (("g", "score", "size", "reading"), found),
        "collapse_limit": (("g", "score", "reading"), limit),
        "collapse_theory": (("g", "score"), known),
    }
    coords = {
        "g": cases.COLLAPSE_COUPLINGS,
        "score": list(cases.SCORES),
        "size": cases.SIZES,
        "reading": ["value", "error"],
    }
    return xr.Dataset(data, coords)


def filtering(config: ModalitiesConfig) -> xr.Dataset:
    """Commitment of Gaussian features of modalities around a ring, wave by wave."""
    waves, draws = cases.RING // 2 + 1, Draws(config.seed, 20)
    law = Clusters(jnp.full(waves, cases.STRENGTH), jnp.zeros((0, waves)))
    found, fitted, exact = [], [], []
    for g in cases.RING_COUPLINGS:
        rates = cases.ring_rates(g)
        exact.append(np.asarray(commitment_time(cases.STRENGTH, 0.5, rates)))
        times = np.geomspace(0.3 * exact[-1].min(), 2.2 * exact[-1].max(), 40)
        curve = []
        for t in times:
            noise = jnp.asarray(ou.mode_noise(rates, _towards_data(t, config.steps)[:, None]), jnp.float32)
            first, second = clones_of_modes(law, noise, draws(), config.paths)
            curve.append(correlation(np.asarray(first * second / cases.STRENGTH, np.float64)))
        values, errors = (np.array(v) for v in zip(*curve, strict=True))
        found.append(_read(times, values, errors, 0.5))
        known = np.asarray(q_uncoupled(cases.STRENGTH / ou.mode_noise(rates, times[:, None])))
        fitted.append(_read(times, known, errors, 0.5)[:, 0])
    data = {
        "commitment": (("g", "wave", "reading"), found),
        "commitment_fitted": (("g", "wave"), fitted),
        "commitment_theory": (("g", "wave"), exact),
        "wave_rate": (("g", "wave"), [cases.ring_rates(g) for g in cases.RING_COUPLINGS]),
    }
    return xr.Dataset(data, {"g": cases.RING_COUPLINGS, "wave": np.arange(waves), "reading": ["value", "error"]})


def scheduling(config: ModalitiesConfig) -> xr.Dataset:
    """Speciation of both modes under couplings that change in time."""
    known, draws = cases.schedules(), Draws(config.seed, 21)
    times = np.arange(0.2, 1.6, 0.06)
    found, fitted, exact = [], [], []
    for g in known.values():
        values, errors = _label_curves(lambda t, g=g: cases.schedule_noise(g, t), times, config, draws)
        noise = jnp.asarray(cases.schedule_noise(g, times))
        curve = np.asarray(sign_correlation(cases.CENTRE**2 / (cases.WIDTH + noise)))
        found.append(_read(times, values, errors, SPECIATION))
        fitted.append(_read(times, curve, errors, SPECIATION)[:, 0])
        exact.append(cases.schedule_times(g))
    data = {
        "scheduled": (("schedule", "mode", "reading"), found),
        "scheduled_fitted": (("schedule", "mode"), fitted),
        "scheduled_theory": (("schedule", "mode"), exact),
        "schedule_coupling": (("schedule", "step"), np.stack(list(known.values()))),
    }
    coords = {
        "schedule": list(known),
        "mode": list(cases.MODES),
        "reading": ["value", "error"],
        "step": (cases.EDGES[1:] + cases.EDGES[:-1]) / 2,
    }
    return xr.Dataset(data, coords)


MEASURES: dict[str, Callable[[ModalitiesConfig], xr.Dataset]] = {
    "timescales": timescales,
    "speciation": speciation,
    "anisotropic": anisotropic,
    "collapse": collapse,
    "filtering": filtering,
    "scheduling": scheduling,
}


def measure(bench: Bench[ModalitiesConfig]) -> None:
    """Fills a group for every part; each draws its own random numbers."""
    for name in tqdm(PARTS, desc="modalities", disable=not bench.progress):
        bench.whole(name, lambda name=name: MEASURES[name](bench.config))
