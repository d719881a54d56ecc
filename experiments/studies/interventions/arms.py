"""The arms of the interventions study: in which layers, steps and heads a coupling acts, and on what."""

from typing import NamedTuple

import numpy as np

from dit_jax.config import DiTConfig
from experiments.frame.settings import PAPER_DEPTH, PAPER_LAST
from experiments.frame.steps import WINDOW_START
from experiments.studies.interventions.settings import ALL, CONSTANT, NO_HEAD, NONE, InterventionsConfig, last_layers
from ou_theory.clock import Clock

WINDOWS = ("early", "middle", "late")
SHARED = {"q": "queries", "k": "keys", "v": "values", "kv": "keys, values", "qkv": "queries, keys, values"}


class Arm(NamedTuple):
    """One intervention."""

    kind: str  # reference, layer, first, middle, last, window, schedule, head, shared
    gate: np.ndarray  # (n, layers) coupling g by sampler step and layer
    closed: np.ndarray  # (heads,) bool, heads that stay uncoupled
    shared: np.ndarray  # (3,) weights with which queries, keys and values are shared


def spread(count: int, most: int) -> np.ndarray:
    """Up to `most` of `count` indices, evenly spaced from the first to the last."""
    return np.unique(np.round(np.linspace(0, count - 1, min(count, most))).astype(int))


def layer_sets(depth: int, singles: int) -> dict[str, tuple[str, np.ndarray]]:
    """Sets of layers that are coupled together: single layers, and the first and the last k of them.

    The numbers k are a fifth of the layers, one, two and three quarters, and all but a fifth; of 28 layers
    also 5, as in the paper. A fifth in the middle is a set too.

    Args:
      depth: layers of the network.
      singles: single layers, at most.

    Returns:
      name -> kind of the set, and which layers are in it, (depth,) bool.
    """
    layers = np.arange(depth)
    sets = {f"layer {i}": ("layer", layers == i) for i in spread(depth, singles)}
    fifth = last_layers(depth)
    sizes = {fifth, depth // 4, depth // 2, 3 * depth // 4, depth - fifth} - {0}
    sizes |= {PAPER_LAST} if depth == PAPER_DEPTH else set()
    for k in sorted(sizes):
        sets[f"first {k}"] = ("first", layers < k)
        sets[f"last {k}"] = ("last", layers >= depth - k)
    start = (depth - fifth) // 2
    sets[f"middle {fifth}"] = ("middle", (layers >= start) & (layers < start + fifth))
    return sets


def windows(ell: np.ndarray) -> dict[str, np.ndarray]:
    """The early, middle and late third of the estimator's window, by log-SNR, as steps (n,) bool. Steps before the
    window belong to the early third."""
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
    """Couplings (n,) by sampler step. All have the same integral over log-SNR, that of a constant coupling of
    `strength`, and none acts before the estimator's window."""
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
    """Those of the `gate_arms` that the claim rests on, for the untrained network."""
    fifth = last_layers(model.depth)
    names = (NONE, ALL, *(f"{part} {fifth}" for part in ("first", "middle", "last")))
    return {name: arm for name, arm in gate_arms(clock, model, config).items() if name in names}


def edit_arms(clock: Clock, model: DiTConfig, config: InterventionsConfig) -> dict[str, Arm]:
    """Arms that change what happens inside attention: all heads but one are uncoupled, or all of them, or replicas
    share their queries, keys or values instead of being coupled by a gate."""
    everywhere, heads = np.full((len(clock), model.depth), config.strength), np.arange(model.num_heads)
    arms = {NO_HEAD: Arm("head", everywhere, heads >= 0, np.zeros(3))}
    arms |= {f"head {h}": Arm("head", everywhere, heads != h, np.zeros(3)) for h in spread(heads.size, config.singles)}
    for letters, name in SHARED.items():
        weights = np.array([config.strength * (letter in letters) for letter in "qkv"])
        arms[name] = Arm("shared", 0 * everywhere, heads < 0, weights)
    return arms
