"""Coupling switched on in a part of the network or of the trajectory only: where, and when, does it act on the gap?

Every arm is a coupling that acts in some layers, steps, heads, or on queries, keys or values alone. All run from the
same noise. What an arm takes from the gap, as a share of what coupling everything takes, says what that part does.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.attention import symmetric_gate
from dit_jax.config import DiTConfig
from dit_jax.diffusion import network_denoiser
from dit_jax.inside import chain, close_heads, share
from dit_jax.model import DiT, Edit
from dit_jax.replicas import run_pairs
from experiments.analysis import WINDOW_START, estimate, guarded_start
from experiments.interventions_report import ALL, CONSTANT, NO_HEAD, NONE, report
from experiments.study import Study, StudyConfig, pair_draws, resampled_mean, with_interval
from ou_theory.clock import Clock, make_clock
from ou_theory.estimator import commitment, gap
from ou_theory.modes import band_mean, pair_modes

WINDOWS = ("early", "middle", "late")
SHARED = {"q": "queries", "k": "keys", "v": "values", "kv": "keys, values", "qkv": "queries, keys, values"}


@dataclass(frozen=True)
class InterventionsConfig(StudyConfig):
    """Couple some layers, steps, heads, or queries, keys or values only: which of them bring the gap down?"""

    pairs: int = 16
    untrained_pairs: int = 8
    strength: float = 1.0  # coupling g where it is on
    schedule_strength: float = 0.2  # g of the constant schedule; the others have the same total over log-SNR
    singles: int = 6  # layers, and heads, that are coupled one at a time, at most; evenly spaced

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "schedule_strength"):
            value = getattr(self, name)
            if not np.isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if self.singles < 1:
            raise ValueError(f"singles must be at least 1, got {self.singles}")
        log_snr_weights(make_clock(self.steps).log_snr)


class Arm(NamedTuple):
    """One intervention."""

    kind: str  # reference, layer, first, middle, last, window, schedule, head, shared
    gate: np.ndarray  # (n, layers) coupling g by sampler step and layer
    closed: np.ndarray  # (heads,) bool, heads that stay uncoupled
    shared: np.ndarray  # (3,) weights with which queries, keys and values are shared


def spread(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` indices, evenly spaced from the first to the last."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, most))).astype(int))


def last_layers(depth: int) -> int:
    """How many layers the last fifth is, rounded up."""
    return -(-depth // 5)


def layer_sets(depth: int, singles: int) -> dict[str, tuple[str, np.ndarray]]:
    """Name -> kind and the layers (depth,) bool: one by one, and the first and the last k for several k.

    k is the last fifth, quarters, and all but the last fifth; of a fifth there is a middle one too.
    """
    layers = np.arange(depth)
    sets = {f"layer {i}": ("layer", layers == i) for i in spread(depth, singles)}
    fifth = last_layers(depth)
    sizes = {fifth, depth // 4, depth // 2, 3 * depth // 4, depth - fifth} - {0}
    for k in sorted(sizes):
        sets[f"first {k}"] = ("first", layers < k)
        sets[f"last {k}"] = ("last", layers >= depth - k)
    start = (depth - fifth) // 2
    sets[f"middle {fifth}"] = ("middle", (layers >= start) & (layers < start + fifth))
    return sets


def windows(ell: np.ndarray) -> dict[str, np.ndarray]:
    """Thirds of the estimator's window in log-SNR, as steps (n,) bool; what lies before it belongs to the first."""
    edges = np.linspace(WINDOW_START, ell[-1], len(WINDOWS) + 1)[1:-1]
    third = np.searchsorted(edges, ell, side="right")
    return {name: third == i for i, name in enumerate(WINDOWS)}


def log_snr_weights(ell: np.ndarray) -> np.ndarray:
    """Trapezoid weights (n,) of an integral over log-SNR from the first step of the estimator's window on, 0 before it.

    Raises:
      ValueError: the window holds fewer than two steps.
    """
    first = int(np.searchsorted(ell, WINDOW_START))
    if ell.size - first < 2:
        raise ValueError(f"steps: the window from {WINDOW_START:g} to {ell[-1]:.3g} nats holds fewer than two steps")
    half = np.diff(ell[first:]) / 2
    return np.concatenate([np.zeros(first), np.append(half, 0) + np.append(0, half)])


def schedules(ell: np.ndarray, strength: float) -> dict[str, np.ndarray]:
    """Couplings (n,) by step whose integral over log-SNR is that of `strength` all along; 0 before the window."""
    weights = log_snr_weights(ell)
    inside = ell[weights > 0]
    along = np.clip((ell - inside[0]) / np.ptp(inside), 0, 1)  # 0 at the window's first step, 1 at the last
    shapes = {
        CONSTANT: np.ones_like(ell),
        "first half": along < 0.5,
        "second half": along >= 0.5,
        "rising": along,
        "falling": 1 - along,
    }
    total = strength * weights.sum()
    return {name: (weights > 0) * shape * total / (weights @ shape) for name, shape in shapes.items()}


def gate_arms(clock: Clock, model: DiTConfig, config: InterventionsConfig) -> dict[str, Arm]:
    """Arms that are gates and nothing else: layers, windows of steps, schedules. "none" and "all" come first."""
    n, depth, g = len(clock), model.depth, config.strength
    opened, unshared = np.zeros(model.num_heads, bool), np.zeros(3)

    def arm(kind, steps, layers):
        return Arm(kind, np.broadcast_to(steps, (n,))[:, None] * np.broadcast_to(layers, (depth,)), opened, unshared)

    arms = {NONE: arm("reference", 0.0, 1.0), ALL: arm("reference", g, 1.0)}
    arms |= {name: arm(kind, g, layers) for name, (kind, layers) in layer_sets(depth, config.singles).items()}
    arms |= {f"{name} steps": arm("window", g * steps, 1.0) for name, steps in windows(clock.log_snr).items()}
    for name, values in schedules(clock.log_snr, config.schedule_strength).items():
        arms[name] = arm("schedule", values, 1.0)
    return arms


def control_arms(clock: Clock, model: DiTConfig, config: InterventionsConfig) -> dict[str, Arm]:
    """Those of them that the claim rests on, for the untrained network."""
    fifth = last_layers(model.depth)
    names = (NONE, ALL, *(f"{part} {fifth}" for part in ("first", "middle", "last")))
    return {name: arm for name, arm in gate_arms(clock, model, config).items() if name in names}


def edit_arms(clock: Clock, model: DiTConfig, config: InterventionsConfig) -> dict[str, Arm]:
    """Arms that edit the inside: all heads but one uncoupled, or all of them; queries, keys or values shared."""
    everywhere, heads = np.full((len(clock), model.depth), config.strength), np.arange(model.num_heads)
    arms = {NO_HEAD: Arm("head", everywhere, heads >= 0, np.zeros(3))}
    arms |= {f"head {h}": Arm("head", everywhere, heads != h, np.zeros(3)) for h in spread(heads.size, config.singles)}
    for letters, name in SHARED.items():
        weights = np.array([config.strength * (letter in letters) for letter in "qkv"])
        arms[name] = Arm("shared", 0 * everywhere, heads < 0, weights)
    return arms


class InterventionsInstrument:
    """The jitted measurement, compiled once per set of arms of the same kind."""

    def __init__(self, study: Study):
        self.study = study
        self._energies = jax.jit(self._run)

    def energies(
        self, model: DiT, arms: Mapping[str, Arm], edited: bool, pairs: np.ndarray, labels: np.ndarray
    ) -> dict[str, Any]:
        """Difference energies (P, arm, K, B) of a block of pairs.

        Args:
          edited: whether arms close heads or share anything; else the network runs without an edit.
        """
        gates = symmetric_gate(jnp.asarray(np.stack([arm.gate for arm in arms.values()]), jnp.float32))
        edits = None
        if edited:
            closed, shared = (np.stack([getattr(arm, name) for arm in arms.values()]) for name in ("closed", "shared"))
            edits = (jnp.asarray(closed), jnp.asarray(shared, jnp.float32))
        return self._energies(model, gates, edits, pairs, labels)

    def _run(self, model: DiT, gates, edits, pairs, labels):
        study = self.study

        def coupled(gate):
            edit = None if edits is None else _edit(*(jnp.tile(x, (pairs.shape[0], 1)) for x in edits))
            return network_denoiser(model, study.clock, gate, kind=study.config.gate, edit=edit)

        def observe(step, x, denoised):
            return band_mean(jnp.square(pair_modes(denoised)[1]), study.bands)

        shape = study.subject.image_shape
        _, energy = run_pairs(
            coupled, study.clock, gates, pairs, labels, shape, seed=study.config.seed, observe=observe
        )
        return {"energy": jnp.transpose(energy, (2, 1, 0, 3))}


def _edit(closed: jax.Array, shared: jax.Array) -> Edit:
    """The edit of a batch: heads (N, heads) closed, queries, keys and values shared with weights (N, 3)."""
    return chain(*(share(name, shared[:, i]) for i, name in enumerate("qkv")), close_heads(closed))


VARIABLES = {
    "energy": (("arm", "step", "band"), "mean square per DCT coefficient of the denoised difference"),
}


def readings(energy: np.ndarray, reference: np.ndarray, ell: np.ndarray, start: float) -> dict[str, np.ndarray]:
    """The estimator on mean energies (..., K, B) of an arm, whose reference is the run without coupling.

    The relative energy is cut off at 1: a band that differs more than it does without coupling counts as decided where
    it passes that. Uncut, its level goes by its own largest energy instead; where nothing passes 1 the two are equal.

    Returns:
      tau, tau_uncut, decided, left (..., B): level, decided fraction, and the energy of the end, of which nothing is
      latched; gap, gap_uncut (...).
    """
    found = estimate(np.stack([reference, energy], -3), ell, start)
    largest = energy[..., ell >= start, :].max(-2, keepdims=True)
    uncut = commitment(jnp.asarray(energy / largest), ell, start).level
    return {
        "tau": found.tau[..., 1, :],
        "tau_uncut": np.asarray(uncut),
        "decided": found.decided[..., 1, :],
        "left": found.relative_energy[..., 1, -1, :],
        "gap": found.gap[..., 1],
        "gap_uncut": np.asarray(gap(uncut)),
    }


def estimates(energy: np.ndarray, ell: np.ndarray, start: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Readings of every arm from energies (P, arm, K, B), the first arm without coupling, the second with all of it.

    Returns:
      `readings`, (1 + draws, arm, ...), the estimate in front of the bootstrap draws; and, (1 + draws, arm), `share`
      and `share_uncut`: of what the second arm takes from the gap.
    """

    def mean(index):
        values = np.asarray(energy[:, index], np.float64)
        return np.concatenate([values.mean(0)[None], resampled_mean(values, weights)])

    reference = mean(0)
    each = [readings(mean(i), reference, ell, start) for i in range(energy.shape[1])]  # all at once would be large
    found = {name: np.stack([one[name] for one in each], 1) for name in each[0]}
    for cut in ("", "_uncut"):
        taken = found[f"gap{cut}"][:, :1] - found[f"gap{cut}"]
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"share{cut}"] = taken / taken[:, 1:2]
    return found


def analyse(sources: Mapping[str, xr.Dataset], depth: int, seed: int) -> xr.Dataset:
    """Readings of every arm, the shares of the full effect, localisation and schedules, with 95 % intervals.

    Args:
      sources: stored measurements ``network`` (gates), ``edits`` (of the same pairs) and ``untrained``.
      depth: layers of the network.
      seed: of the resampling.
    """
    with jax.enable_x64(True):
        return _analyse(sources, last_layers(depth), seed)


def _analyse(sources, fifth, seed):
    parts = [sources["network"], sources["edits"]]
    ell = parts[0].ell.values
    energy = np.concatenate([part.energy.values for part in parts], 1)
    none = np.asarray(energy[:, 0], np.float64).mean(0)
    start = guarded_start(none / none[-1], none[-1], ell)
    names = np.concatenate([part.arm.values for part in parts])
    data: dict[str, Any] = {}

    def add(name, values, dims):
        entry = with_interval(values[0], values[1:])
        if name.endswith("decided"):  # a fraction
            entry = np.clip(entry, 0, 1)
        data[name] = ((*dims, "bound"), entry)

    for prefix, arms, values in (
        ("", names, energy),
        ("untrained_", sources["untrained"].arm.values, sources["untrained"].energy.values),
    ):
        found = estimates(values, ell, start, pair_draws(seed, len(values)))
        dims = {2: (f"{prefix}arm",), 3: (f"{prefix}arm", "band")}
        for name, each in found.items():
            add(prefix + name, each, dims[each.ndim])
        place = {str(name): i for i, name in enumerate(arms)}
        first, last = place[f"first {fifth}"], place[f"last {fifth}"]
        for cut in ("", "_uncut"):
            gaps, shares = found[f"gap{cut}"], found[f"share{cut}"]
            add(f"{prefix}effect{cut}", gaps[:, place[NONE]] - gaps[:, place[ALL]], ())
            add(f"{prefix}last_minus_first{cut}", shares[:, last] - shares[:, first], ())
        if not prefix:
            constant = [place[CONSTANT]]
            for name in ("gap", "gap_uncut", "decided"):
                change = found[name] - found[name][:, constant]
                add(f"{name}_against_constant", change, dims[change.ndim])
    closed = energy[:, list(names).index(NO_HEAD)].mean(0)
    return xr.Dataset(
        data,
        coords={
            "arm": names,
            "kind": ("arm", np.concatenate([part.kind.values for part in parts])),
            "gate": (("arm", "step", "layer"), np.concatenate([part.gate.values for part in parts])),
            "untrained_arm": sources["untrained"].arm.values,
            "bound": ["estimate", "low", "high"],
            **{name: parts[0][name] for name in ("band", "radius", "count", "step", "ell", "layer")},
        },
        attrs={
            "ell_start": float(start),
            "fifth": fifth,
            "closure": float(np.abs(closed / none - 1).max()),
            "pairs": len(energy),
            "untrained_pairs": sources["untrained"].sizes["pair"],
        },
    )


def interventions(
    config: InterventionsConfig, out: str | Path, *, resume: bool = False, command: str = "", progress: bool = True
) -> Path:
    """Runs the study and writes its folder; see `experiments.study.Study`.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: settings that do not fit the weights; an output folder that holds another run.
    """
    started = time.perf_counter()
    study = Study("interventions", config, out, resume=resume, command=command, progress=progress)
    instrument = InterventionsInstrument(study)
    network, untrained = study.subject.model, study.subject.untrained(config.seed)
    groups = (
        ("network", network, gate_arms, config.pairs),
        ("edits", network, edit_arms, config.pairs),
        ("untrained", untrained, control_arms, config.untrained_pairs),
    )
    sources = {}
    for name, model, make, pairs in groups:
        arms = make(study.clock, model.config, config)
        coords = {
            "arm": list(arms),
            "kind": ("arm", [arm.kind for arm in arms.values()]),
            "layer": np.arange(model.config.depth),
            "gate": (("arm", "step", "layer"), np.stack([arm.gate for arm in arms.values()]).astype(np.float32)),
        }

        def measure(pairs, labels, model=model, arms=arms, edited=name == "edits"):
            return instrument.energies(model, arms, edited, pairs, labels)

        sources[name] = study.measure(name, VARIABLES, coords, pairs, measure)
    measured = time.perf_counter()
    analysis = analyse(sources, network.config.depth, config.seed)
    study.run.put("analysis", analysis)
    timings = {"measuring_s": round(measured - started, 1), "analysis_s": round(time.perf_counter() - measured, 1)}
    return report(study.run, timings)
