"""From the energies of every arm to its gap, and what share of the full effect it brings."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from experiments.frame.draws import bootstrap, both, packed, pair_draws
from experiments.frame.estimator import commitment_of, guarded_start
from experiments.frame.measured import Definitions, Measured
from experiments.studies.interventions.settings import ALL, CONSTANT, NO_HEAD, NONE, InterventionsConfig, last_layers
from ou_theory.estimator import commitment, gap

DEFINITIONS: Definitions = {
    "tau": ("commitment level of a band", "nat"),
    "tau_uncut": ("commitment level of a band, relative energies not cut off at 1", "nat"),
    "decided": ("decided fraction of a band", "1"),
    "left": ("energy of a band's difference at the end, relative to no coupling", "1"),
    "gap": ("synchronization gap", "nat"),
    "gap_uncut": ("synchronization gap, relative energies not cut off at 1", "nat"),
    "share": ("share of what coupling everything takes from the gap", "1"),
    "share_uncut": ("share of what coupling everything takes from the gap that is not cut off", "1"),
    "effect": ("what coupling everything takes from the gap", "nat"),
    "effect_uncut": ("what coupling everything takes from the gap that is not cut off", "nat"),
    "last_minus_first": ("share of the last fifth of the layers less that of the first", "1"),
    "last_minus_first_uncut": ("the same of the gap that is not cut off", "1"),
    "gap_against_constant": ("gap less that under the constant schedule", "nat"),
    "gap_uncut_against_constant": ("gap that is not cut off less that under the constant schedule", "nat"),
    "decided_against_constant": ("decided fraction less that under the constant schedule", "1"),
    "arm": ("which part is coupled", "1"),
    "kind": ("kind of arm", "1"),
    "gate": ("coupling g by sampler step and layer", "1"),
}


def readings(energy: np.ndarray, reference: np.ndarray, ell: np.ndarray, start: float) -> dict[str, np.ndarray]:
    """The estimator on mean energies (..., K, B) of an arm, whose reference is the run without coupling.

    The relative energy is cut off at 1: a band that differs more than it does without coupling counts as decided where
    it passes that. Uncut, its level goes by its own largest energy instead; where nothing passes 1 the two are equal.

    Returns:
      tau, tau_uncut, decided, left (..., B): level, decided fraction, and the energy of the end, of which nothing is
      latched; gap, gap_uncut (...).
    """
    end = reference[..., -1:, :]
    cut = np.minimum(np.stack([reference, energy], -3), end[..., None, :, :])
    found = commitment_of(cut, ell, start)
    largest = energy[..., ell >= start, :].max(-2, keepdims=True)
    uncut = commitment(jnp.asarray(energy / largest), ell, start).level
    return {
        "tau": found.tau[..., 1, :],
        "tau_uncut": np.asarray(uncut),
        "decided": found.decided[..., 1, :],
        "left": energy[..., -1, :] / end[..., 0, :],
        "gap": found.gap[..., 1],
        "gap_uncut": np.asarray(gap(uncut)),
    }


def arm_readings(energy: np.ndarray, ell: np.ndarray, start: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Readings of every arm from energies (P, arm, K, B), the first arm without coupling, the second with all of it.

    Returns:
      `readings`, (1 + draws, arm, ...), the estimate in front of the bootstrap draws; and, (1 + draws, arm), `share`
      and `share_uncut`: the arm's reduction of the gap, divided by that of coupling everything.
    """
    each = [  # all arms at once would be large
        both(bootstrap(lambda arm, none: readings(arm, none, ell, start), (energy[:, i], energy[:, 0]), weights))
        for i in range(energy.shape[1])
    ]
    found = {name: np.stack([one[name] for one in each], 1) for name in each[0]}
    for cut in ("", "_uncut"):
        taken = found[f"gap{cut}"][:, :1] - found[f"gap{cut}"]
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"share{cut}"] = taken / taken[:, 1:2]
    return found


def analyse(measured: Measured[InterventionsConfig]) -> xr.Dataset:
    """Readings of every arm, the shares of the full effect, localisation and schedules, with 95 % intervals."""
    return estimates(measured.sources("network", "edits", "untrained"), measured.model.depth, measured.config.seed)


def estimates(sources: Mapping[str, xr.Dataset], depth: int, seed: int) -> xr.Dataset:
    """The analysis in double precision.

    Args:
      sources: stored measurements ``network`` (gates), ``edits`` (of the same pairs) and ``untrained``.
      depth: layers of the network.
      seed: of the resampling.
    """
    with jax.enable_x64(True):
        return _estimates(sources, last_layers(depth), seed)


def _estimates(sources, fifth, seed):
    parts = [sources["network"], sources["edits"]]
    ell = parts[0].ell.values
    energy = np.concatenate([part.energy.values for part in parts], 1)
    none = np.asarray(energy[:, 0], np.float64).mean(0)
    start = guarded_start(none / none[-1], none[-1], ell)
    names = np.concatenate([part.arm.values for part in parts])
    data: dict[str, Any] = {}

    def add(name, values, dims):
        entry = packed(values)
        if name.endswith("decided"):  # a fraction
            entry = np.clip(entry, 0, 1)
        data[name] = ((*dims, "bound"), entry)

    for prefix, arms, values in (
        ("", names, energy),
        ("untrained_", sources["untrained"].arm.values, sources["untrained"].energy.values),
    ):
        found = arm_readings(values, ell, start, pair_draws(seed, len(values)))
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
