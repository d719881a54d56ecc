"""Coupling that is switched on in a part of the network or of the trajectory: where and when does it act on the gap?

Every arm is a coupling that acts in some layers, steps or heads, or on queries, keys or values alone. All arms run from
the same noise. The effect of an arm is how much it reduces the gap, as a share of the reduction by coupling everything.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.attention import symmetric_gate
from dit_jax.inside import chain, close_heads, share
from dit_jax.model import DiT, Edit
from dit_jax.replicas import run_pairs
from experiments.frame.bench import Bench, Variables
from experiments.frame.programs import Setup
from experiments.frame.subject import Subject
from experiments.studies.interventions.arms import Arm, control_arms, edit_arms, gate_arms, log_snr_weights, schedules
from experiments.studies.interventions.settings import InterventionsConfig
from ou_theory.modes import band_mean, pair_modes


def check(config: InterventionsConfig, subject: Subject) -> None:
    """Raises ValueError unless the estimator's window holds steps for schedules, and a convex gate always leaves a
    replica a share of its own, without which no head could be closed."""
    ell = subject.config.clock(config.steps).log_snr
    log_snr_weights(ell)
    strongest = max(config.strength, *(values.max() for values in schedules(ell, config.schedule_strength).values()))
    if config.gate_kind == "convex" and strongest >= 1:
        raise ValueError(
            f"strength: a convex gate must leave replicas a share of their own here, got couplings of {strongest:g}; "
            "give a --strength and --schedule-strength below 1"
        )


def _run(setup: Setup, model: DiT, gates, edits, pairs, labels) -> dict[str, jax.Array]:
    edit = None
    if edits is not None:
        closed, shared = (jnp.tile(x, (pairs.shape[0], 1)) for x in edits)
        if setup.is_guided:  # the two halves of every image lie side by side
            halves = jnp.array([1, setup.guided_coupling == "both"], shared.dtype)[:, None]
            closed = jnp.repeat(closed, 2, 0)
            shared = (shared[:, None] * halves).reshape(-1, 3)
        edit = _edit(closed, shared)

    def observe(step, x, denoised):
        return pair_modes(denoised)[1]

    _, difference = run_pairs(
        setup.coupled(model, edit=edit),
        setup.clock,
        gates,
        pairs,
        labels,
        setup.image_shape,
        seed=setup.seed,
        sampler=setup.sampler,
        observe=observe,
    )
    products = {"energy": difference * difference, "projection": difference * difference[-1]}
    return {name: jnp.transpose(band_mean(v, setup.bands), (2, 1, 0, 3)) for name, v in products.items()}


class InterventionsInstrument:
    """The measurement, compiled once per set of arms of the same kind."""

    def __init__(self, bench: Bench[InterventionsConfig]):
        self._energies = bench.program(_run)

    def energies(
        self, model: DiT, arms: Mapping[str, Arm], edited: bool, pairs: np.ndarray, labels: np.ndarray
    ) -> dict[str, Any]:
        """Energies of the denoised difference and inner products with its end, (P, arm, K, B) each, of a block.

        Args:
          edited: whether arms close heads or share anything; else the network runs without an edit.
        """
        gates = symmetric_gate(jnp.asarray(np.stack([arm.gate for arm in arms.values()]), jnp.float32))
        edits = None
        if edited:
            closed, shared = (np.stack([getattr(arm, name) for arm in arms.values()]) for name in ("closed", "shared"))
            edits = (jnp.asarray(closed), jnp.asarray(shared, jnp.float32))
        return self._energies(model, gates, edits, pairs, labels)


def _edit(closed: jax.Array, shared: jax.Array) -> Edit:
    """The edit of a batch: heads (N, heads) closed, queries, keys and values shared with weights (N, 3)."""
    return chain(*(share(name, shared[:, i]) for i, name in enumerate("qkv")), close_heads(closed))


VARIABLES: Variables = {
    "energy": (("arm", "step", "band"), "mean square per DCT coefficient of the denoised difference"),
    "projection": (("arm", "step", "band"), "inner product per coefficient of the denoised difference with its end"),
}


def measure(bench: Bench[InterventionsConfig]) -> None:
    """Fills ``network`` (arms that are gates), ``edits`` (the other arms, on the same pairs) and ``untrained``."""
    config, instrument = bench.config, InterventionsInstrument(bench)
    groups = (
        ("network", "network", gate_arms, config.pairs),
        ("edits", "network", edit_arms, config.pairs),
        ("untrained", "untrained", control_arms, config.untrained_pairs),
    )
    for name, model, make, pairs in groups:
        arms = make(bench.clock, bench.model, config)
        gates = np.stack([arm.gate for arm in arms.values()])
        coords = {
            "arm": list(arms),
            "kind": ("arm", [arm.kind for arm in arms.values()], {"long_name": "kind of arm"}),
            "layer": np.arange(bench.model.depth),
            "gate": (("arm", "step", "layer"), gates, {"long_name": "coupling g by sampler step and layer"}),
        }

        def on_network(pairs, labels, model=model, arms=arms, edited=name == "edits"):
            return instrument.energies(getattr(bench, model), arms, edited, pairs, labels)

        bench.measure(name, VARIABLES, coords, pairs, on_network)
