"""Two modalities generated together: theory of the coupled process over simulation with exact scores (docs/theory.md,
section 13.10).

Each part of the study draws its own random numbers, is stored as one group, and is left out when the run is resumed.
Times of a simulation are read off clones: where the labels (or the values) of two continuations of one state correlate
by as much as theory says they do at the event. Every reading has a standard error, and goes through the same fit on the
exact curve, which shows what the fit costs.
"""

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy.optimize import root_scalar
from tqdm import tqdm

from experiments.clone_reading import (
    SPECIATION,
    Draws,
    clones_of_mixture,
    clones_of_modes,
    correlation,
    read_crossing,
    read_zero,
)
from experiments.modalities_report import report
from experiments.store import RunFolder, StoreError
from ou_theory import process as ou
from ou_theory.collapse import collapse_time_isotropic, condensation, pair_collapse_times
from ou_theory.gain_model import commitment_time
from ou_theory.laws import Clusters, sign_correlation
from ou_theory.mixture import two_clusters
from ou_theory.schedules import scheduled_noise, scheduled_time
from ou_theory.speciation import kappa, mode_kappa, mode_speciation_time, speciation_time

B = 1.0  # relaxation rate of a modality alone; the noise strength is 1
CENTRE, WIDTH = 2.0, 0.25  # of a mode's two clusters: centre, and variance within
SPREAD = CENTRE**2 - WIDTH
MODES = ("common", "difference")


@dataclass(frozen=True)
class ModalitiesConfig:
    """Simulate two coupled modalities with exact scores and lay the theory over it: timescales, speciation, collapse,
    the coupling as a filter, couplings that change in time."""

    paths: int = 4000  # pairs of clones per point
    steps: int = 16  # reverse steps from a branch to the data; each is exact
    trials: int = 2000  # draws of a stored data set, for collapse
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("paths", 100), ("steps", 1), ("trials", 50)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


def _clusters() -> Clusters:
    """Common and difference mode, each in two clusters of its own."""
    return Clusters(jnp.full(2, WIDTH), CENTRE * jnp.eye(2))


def _towards_data(t: float, steps: int) -> np.ndarray:
    """Times (steps + 1,) from t to 0, denser towards 0."""
    return t * np.linspace(1, 0, steps + 1) ** 1.5


def _label_curves(noise_of: Callable, times: np.ndarray, config: ModalitiesConfig, draws: Draws):
    """Correlations (T, 2) of clones' labels in both modes and their errors, for branches at the times; `noise_of` gives
    the noise (t, 2) of the modes at times (t,)."""
    found = []
    for t in times:
        noise = jnp.asarray(noise_of(_towards_data(t, config.steps)), jnp.float32)
        first, second = clones_of_modes(_clusters(), noise, draws(), config.paths)
        found.append(correlation(np.asarray(jnp.sign(first) * jnp.sign(second), np.float64)))
    values, errors = zip(*found, strict=True)
    return np.array(values), np.array(errors)


def _read(times, values, errors, level) -> np.ndarray:
    """Readings (2, 2) of two curves (T, 2): value and error."""
    return np.array([read_crossing(times, values[:, i], errors[:, i], level) for i in range(values.shape[1])])


# --- the parts

COUPLINGS = np.array([0.0, 0.15, 0.3, 0.45, 0.6, 0.75, 0.9])


def _mode_rates(g: float) -> np.ndarray:
    return np.array([B - g, B + g])


def timescales(config: ModalitiesConfig) -> xr.Dataset:
    """Rates of both modes by a forward simulation: Euler's rule in small steps, the decay of each mode's correlation
    with its start."""
    end, euler = 0.5, 200
    dt = end / euler

    @jax.jit
    def decay(g, key):
        drift = jnp.array([[B, -1.0], [-1.0, B]]) * jnp.array([[1.0, g], [g, 1.0]])
        for_start, for_noise = jax.random.split(key)
        start = jax.random.normal(for_start, (16 * config.paths, 2))

        def advance(x, key):
            return x - dt * x @ drift.T + jnp.sqrt(2 * dt) * jax.random.normal(key, x.shape), None

        x, _ = jax.lax.scan(advance, start, jax.random.split(for_noise, euler))
        rotate = jnp.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
        return start @ rotate, x @ rotate

    rates, errors = [], []
    for i, g in enumerate(COUPLINGS):
        start, x = (np.asarray(v, np.float64) for v in decay(g, jax.random.fold_in(jax.random.key(config.seed), i)))
        factor = (start * x).mean(0) / (start**2).mean(0)
        error = (start * (x - factor * start)).std(0) / (start**2).mean(0) / len(x) ** 0.5
        # (1 - rate dt)^n is what Euler's rule makes of exp(-rate t)
        rates.append((1 - factor ** (1 / euler)) / dt)
        errors.append(error / factor / end)
    data = {
        "rate": (("coupling", "mode"), rates),
        "rate_error": (("coupling", "mode"), errors),
        "rate_theory": (("coupling", "mode"), [_mode_rates(g) for g in COUPLINGS]),
    }
    return xr.Dataset(data, {"coupling": COUPLINGS, "mode": list(MODES)})


def speciation(config: ModalitiesConfig) -> xr.Dataset:
    """Speciation of both modes against a symmetric coupling."""
    times, draws = np.arange(0.1, 2.2, 0.06), Draws(config.seed, 1)
    curves, errors, exact, found, fitted = [], [], [], [], []
    for g in COUPLINGS:
        rates = _mode_rates(g)
        values, error = _label_curves(lambda t, r=rates: ou.mode_noise(r, t[:, None]), times, config, draws)
        known = np.asarray(sign_correlation(mode_kappa(CENTRE, WIDTH, rates, times[:, None])))
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
            [np.asarray(mode_speciation_time(CENTRE, WIDTH, _mode_rates(g))) for g in COUPLINGS],
        ),
    }
    coords = {"coupling": COUPLINGS, "time": times, "mode": list(MODES), "reading": ["value", "error"]}
    return xr.Dataset(data, coords)


# what drives what: entries g12 (of the second modality in the first one's drift) and g21, in units of the coupling
KINDS = {
    "symmetric": (1.0, 1.0),
    "first drives second": (0.0, 1.0),
    "second drives first": (1.0, 0.0),
    "rotating": (1.0, -1.0),
}
UNEQUAL = np.array([0.0, 0.4, 0.8, 1.2])


def unequal_process(kind: str, g: float) -> ou.Process:
    """Drift ``[[b, -g12], [-g21, b]]`` of a kind of coupling."""
    g12, g21 = KINDS[kind]
    return ou.Process(jnp.array([[B, -g12 * g], [-g21 * g, B]]), jnp.asarray(1.0))


def unequal_time(kind: str, g: float) -> float:
    """Time of the joint criterion in the part below."""
    return float(_joint_time(unequal_process(kind, g).drift))


@jax.jit
def _joint_time(drift: jax.Array) -> jax.Array:
    return speciation_time(ou.Process(drift, jnp.asarray(1.0)), *UNEQUAL_LAW)


UNEQUAL_LAW = (np.array([CENTRE, 0.0]), np.diag([WIDTH, 1.0]))  # the first modality is clustered


def plane_of_couplings(reach: float = 2.0, points: int = 41) -> tuple[np.ndarray, np.ndarray]:
    """Couplings (N,) and the time of the joint criterion (N, N) over them, g21 along the first axis; NaN where there is
    no stationary state."""
    axis = np.linspace(-reach, reach, points)
    g12, g21 = (jnp.asarray(v) for v in np.meshgrid(axis, axis))
    drift = jnp.stack(
        [jnp.stack([jnp.full(g12.shape, B), -g12], -1), jnp.stack([-g21, jnp.full(g12.shape, B)], -1)], -2
    )
    times = jax.vmap(jax.vmap(_joint_time))(drift)
    return axis, np.where(np.asarray(g12 * g21) < B**2, np.asarray(times), np.nan)


def anisotropic(config: ModalitiesConfig) -> xr.Dataset:
    """The joint criterion under couplings of any symmetry: the first modality is clustered, the second is not."""
    law = two_clusters(*UNEQUAL_LAW)
    draws = Draws(config.seed, 2)
    shape = (len(KINDS), UNEQUAL.size)
    found, fitted, exact = np.full((*shape, 2), np.nan), np.full(shape, np.nan), np.full(shape, np.nan)
    for i, kind in enumerate(KINDS):
        for j, g in enumerate(UNEQUAL):
            process = unequal_process(kind, g)
            if kind == "symmetric" and g >= B:
                continue
            exact[i, j] = unequal_time(kind, g)
            times = exact[i, j] * np.linspace(0.4, 1.8, 20)
            curve = []
            for t in times:
                steps = ou.transition(process, jnp.asarray(np.diff(_towards_data(t, config.steps)[::-1])))
                first, second = clones_of_mixture(law, steps, draws(), config.paths)
                labels = np.asarray(jnp.sign(first[:, 0]) * jnp.sign(second[:, 0]), np.float64)
                curve.append(correlation(labels))
            values, errors = np.array(curve).T
            known = np.asarray(sign_correlation(kappa(process, jnp.asarray(times), *UNEQUAL_LAW)))
            found[i, j] = read_crossing(times, values, errors, SPECIATION)
            fitted[i, j] = read_crossing(times, known, errors, SPECIATION).value
    data = {
        "unequal": (("kind", "strength", "reading"), found),
        "unequal_fitted": (("kind", "strength"), fitted),
        "unequal_theory": (("kind", "strength"), exact),
    }
    return xr.Dataset(data, {"kind": list(KINDS), "strength": UNEQUAL, "reading": ["value", "error"]})


LOAD = 0.3  # alpha: log of the stored samples per mode of a modality
SIZES = np.array([12, 16, 20, 24, 28])
COLLAPSE_COUPLINGS = np.array([0.0, 0.3, 0.6])
SCORES = ("joint", *MODES)  # what the score knows: both modes, or one


def collapse(config: ModalitiesConfig) -> xr.Dataset:
    """Where the own sample outweighs all others, for data sets of growing size, and the line through them in 1 / d."""
    times = np.geomspace(0.15, 1.6, 30)
    noise = np.stack([np.asarray(ou.mode_noise(_mode_rates(g), times[:, None])) for g in COLLAPSE_COUPLINGS])
    # a score that knows one mode sees the other under so much noise that it says nothing
    blind = np.array([[1.0, 1.0], [1.0, np.inf], [np.inf, 1.0]])
    levels = jnp.asarray(noise[:, None] * blind[:, None], jnp.float32)  # coupling, score, time, mode

    @partial(jax.jit, static_argnums=(0, 1))
    def excess(size, count, seed, trials):
        def one(trial):
            for_data, for_noise = jax.random.split(jax.random.fold_in(jax.random.key(seed), trial))
            stored = jax.random.normal(for_data, (count, 2 * size))
            return condensation(stored, jax.random.normal(for_noise, (2 * size,)), jnp.repeat(levels, size, -1))

        return jax.lax.map(one, trials, batch_size=8)

    found = np.empty((len(COLLAPSE_COUPLINGS), len(SCORES), len(SIZES), 2))
    for s, size in enumerate(SIZES):
        count = round(np.exp(LOAD * size))
        seed = Draws(config.seed, 3 + s)()[0]
        odds = np.asarray(excess(int(size), count, seed, jnp.arange(config.trials)), np.float64)
        for i in range(found.shape[0]):
            for j in range(found.shape[1]):
                found[i, j, s] = read_zero(times, odds[:, i, j])
    limit = np.empty((*found.shape[:2], 2))
    for i in range(found.shape[0]):
        for j in range(found.shape[1]):
            fit, covariance = np.polyfit(1 / SIZES, found[i, j, :, 0], 1, w=1 / found[i, j, :, 1], cov="unscaled")
            limit[i, j] = fit[1], covariance[1, 1] ** 0.5
    one = np.ones(1)
    known = [pair_collapse_times(B, g, one, one, LOAD) for g in COLLAPSE_COUPLINGS]
    data = {
        "collapse": (("g", "score", "size", "reading"), found),
        "collapse_limit": (("g", "score", "reading"), limit),
        "collapse_theory": (("g", "score"), np.array(known)),
        "collapse_one": ((), float(collapse_time_isotropic(LOAD, 1.0))),
    }
    coords = {"g": COLLAPSE_COUPLINGS, "score": list(SCORES), "size": SIZES, "reading": ["value", "error"]}
    return xr.Dataset(data, coords)


RING, STRENGTH = 8, 4.0  # modalities around a ring, and the variance of their Gaussian features
RING_COUPLINGS = np.array([0.0, 0.2, 0.4])


def ring_rates(g: float) -> np.ndarray:
    """Rates ``b - 2 g cos(2 pi a / n)`` of the waves around the ring, a = 0..n/2."""
    return B - 2 * g * np.cos(2 * np.pi * np.arange(RING // 2 + 1) / RING)


def filtering(config: ModalitiesConfig) -> xr.Dataset:
    """Commitment of Gaussian features of modalities around a ring, wave by wave."""
    waves, draws = RING // 2 + 1, Draws(config.seed, 20)
    law = Clusters(jnp.full(waves, STRENGTH), jnp.zeros((0, waves)))
    found, exact = [], []
    for g in RING_COUPLINGS:
        rates = ring_rates(g)
        exact.append(np.asarray(commitment_time(STRENGTH, 0.5, rates)))
        times = np.geomspace(0.3 * exact[-1].min(), 2.2 * exact[-1].max(), 40)
        curve = []
        for t in times:
            noise = jnp.asarray(ou.mode_noise(rates, _towards_data(t, config.steps)[:, None]), jnp.float32)
            first, second = clones_of_modes(law, noise, draws(), config.paths)
            curve.append(correlation(np.asarray(first * second / STRENGTH, np.float64)))
        values, errors = (np.array(v) for v in zip(*curve, strict=True))
        found.append(_read(times, values, errors, 0.5))
    data = {
        "commitment": (("g", "wave", "reading"), found),
        "commitment_theory": (("g", "wave"), exact),
        "wave_rate": (("g", "wave"), [ring_rates(g) for g in RING_COUPLINGS]),
    }
    return xr.Dataset(data, {"g": RING_COUPLINGS, "wave": np.arange(waves), "reading": ["value", "error"]})


HORIZON, TOTAL = 1.6, 0.48  # time up to which schedules couple, and the integral of their coupling
EDGES = np.linspace(0, HORIZON, 65)


def schedules() -> dict[str, np.ndarray]:
    """Couplings by step of the grid `EDGES`. Those of the first group have the same integral over time; the last one
    couples at every noise, and yet leaves no gap."""
    middle = (EDGES[1:] + EDGES[:-1]) / 2 / HORIZON
    flat = np.full(middle.size, TOTAL / HORIZON)
    shapes = {
        "none": 0 * flat,
        "constant": flat,
        "clean quarter": 4 * flat * (middle < 0.25),
        "clean half": 2 * flat * (middle < 0.5),
        "noisy half": 2 * flat * (middle >= 0.5),
        "rising with noise": 2 * flat * middle,
    }
    first, strong = middle < 0.2, 2 * TOTAL / HORIZON

    def left(counter):  # gap of a coupling that is reversed beyond the clean fifth
        return float(np.subtract(*_schedule_times(np.where(first, strong, -counter))))

    return {**shapes, "reversed": np.where(first, strong, -root_scalar(left, bracket=(0.0, 0.95)).root)}


def _schedule_times(g: np.ndarray) -> np.ndarray:
    return np.asarray(scheduled_time(np.stack([B - g, B + g]), EDGES, np.full(2, SPREAD)), np.float64)


def _schedule_noise(g: np.ndarray, t: np.ndarray) -> np.ndarray:
    """Noise (t, 2) of both modes at times that need not be on the grid."""
    grid = np.union1d(EDGES, t)
    inside = np.clip(np.searchsorted(EDGES, (grid[1:] + grid[:-1]) / 2) - 1, 0, g.size - 1)
    noise = np.asarray(scheduled_noise(np.stack([B - g[inside], B + g[inside]]), grid))
    return noise[:, np.searchsorted(grid, t)].T


def scheduling(config: ModalitiesConfig) -> xr.Dataset:
    """Speciation of both modes under couplings that change in time."""
    known, draws = schedules(), Draws(config.seed, 21)
    times = np.arange(0.2, 1.6, 0.06)
    found, fitted, exact = [], [], []
    for g in known.values():
        values, errors = _label_curves(lambda t, g=g: _schedule_noise(g, t), times, config, draws)
        curve = np.asarray(sign_correlation(CENTRE**2 / (WIDTH + jnp.asarray(_schedule_noise(g, times)))))
        found.append(_read(times, values, errors, SPECIATION))
        fitted.append(_read(times, curve, errors, SPECIATION)[:, 0])
        exact.append(_schedule_times(g))
    data = {
        "scheduled": (("schedule", "mode", "reading"), found),
        "scheduled_fitted": (("schedule", "mode"), fitted),
        "scheduled_theory": (("schedule", "mode"), exact),
        "schedule_coupling": (("schedule", "step"), np.stack(list(known.values()))),
    }
    coords = {
        "schedule": list(known),
        "mode": list(MODES),
        "reading": ["value", "error"],
        "step": (EDGES[1:] + EDGES[:-1]) / 2,
    }
    return xr.Dataset(data, coords)


PARTS: dict[str, Callable[[ModalitiesConfig], xr.Dataset]] = {
    "timescales": timescales,
    "speciation": speciation,
    "anisotropic": anisotropic,
    "collapse": collapse,
    "filtering": filtering,
    "scheduling": scheduling,
}


def modalities(
    config: ModalitiesConfig, out: str | Path, *, resume: bool = False, command: str = "", progress: bool = True
) -> Path:
    """Runs the study and writes its folder.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: a folder that holds another run.
    """
    started = time.perf_counter()
    extra = {"kind": "modalities", "subject": "exact scores"}
    run = RunFolder.create(out, asdict(config), resume=resume, command=command, extra=extra)
    for name, part in tqdm(PARTS.items(), desc="modalities", disable=not progress):
        if not _stored(run, name):
            run.put(name, part(config))
    return report(run, {"simulation_s": round(time.perf_counter() - started, 1)})


def _stored(run: RunFolder, name: str) -> bool:
    try:
        run.load(name)
    except StoreError:
        return False
    return True
