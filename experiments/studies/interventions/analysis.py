"""The gap of every arm from its energies, and its share of the full effect."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import xarray as xr

from experiments.frame.draws import bootstrap, both, packed, pair_draws
from experiments.frame.estimator import commitment_of
from experiments.frame.measured import Definitions, Measured
from experiments.frame.steps import WINDOW_START
from experiments.frame.store import StoreError
from experiments.studies.interventions.settings import ALL, CONSTANT, NO_HEAD, NONE, InterventionsConfig, last_layers

BY = ("", "_energy")  # the headline estimator, and its companion that counts all energy

DEFINITIONS: Definitions = {
    "tau": ("commitment level of a band", "nat"),
    "tau_energy": ("commitment level of a band by all energy, not only that along the outcome", "nat"),
    "decided": ("decided fraction of a band", "1"),
    "left": ("energy of a band's difference at the end, relative to no coupling", "1"),
    "floor": ("noise floor: error energy where the window opens, in units of the uncoupled end", "1"),
    "gap": ("synchronization gap", "nat"),
    "gap_energy": ("synchronization gap by all energy", "nat"),
    "share": ("reduction of the gap, as a share of that by coupling everything", "1"),
    "share_energy": ("reduction of the gap by all energy, as a share of that by coupling everything", "1"),
    "effect": ("reduction of the gap by coupling everything", "nat"),
    "effect_energy": ("reduction of the gap by all energy, by coupling everything", "nat"),
    "last_minus_first": ("share of the last fifth of the layers minus that of the first", "1"),
    "last_minus_first_energy": ("share_energy of the last fifth of the layers minus that of the first", "1"),
    "gap_against_constant": ("gap minus that under the constant schedule", "nat"),
    "gap_energy_against_constant": ("gap by all energy minus that under the constant schedule", "nat"),
    "decided_against_constant": ("decided fraction minus that under the constant schedule", "1"),
    "arm": ("which part is coupled", "1"),
    "kind": ("kind of arm", "1"),
    "gate": ("coupling g by sampler step and layer", "1"),
}


def readings(
    energy: np.ndarray, inner: np.ndarray, reference: np.ndarray, ell: np.ndarray, *, stochastic: bool = False
) -> dict[str, np.ndarray]:
    """The estimator on mean energies and inner products (..., K, B) of an arm, whose reference is the run without
    coupling.

    Returns:
      tau, tau_energy, decided, left, floor (..., B): level by the energy along the outcome, and by all energy; decided
      fraction; energy at the end, without a running maximum; error where the window opens. gap, gap_energy (...).
    """
    end = reference[..., -1:, :]
    pair = np.stack([reference, energy], -3)
    # the reference's inner products do not enter what is read off the arm
    found = commitment_of(pair, ell, inner=np.stack([reference, inner], -3), stochastic=stochastic)
    whole = commitment_of(pair, ell)
    return {
        "tau": found.tau[..., 1, :],
        "tau_energy": whole.tau[..., 1, :],
        "decided": found.decided[..., 1, :],
        "left": energy[..., -1, :] / end[..., 0, :],
        "floor": found.floor[..., 1, :],
        "gap": found.gap[..., 1],
        "gap_energy": whole.gap[..., 1],
    }


def arm_readings(
    energy: np.ndarray, inner: np.ndarray, ell: np.ndarray, weights: np.ndarray, *, stochastic: bool = False
) -> dict[str, np.ndarray]:
    """Readings of every arm from energies and inner products (P, arm, K, B), the first arm without coupling, the second
    with all of it.

    Returns:
      `readings`, (1 + draws, arm, ...), the estimate in front of the bootstrap draws; and, (1 + draws, arm), `share`
      and `share_energy`: the arm's reduction of the gap, divided by that of coupling everything.
    """

    def of(arm, along, none):
        return readings(arm, along, none, ell, stochastic=stochastic)

    each = [  # all arms at once would be large
        both(bootstrap(of, (energy[:, i], inner[:, i], energy[:, 0]), weights)) for i in range(energy.shape[1])
    ]
    found = {name: np.stack([one[name] for one in each], 1) for name in each[0]}
    for by in BY:
        taken = found[f"gap{by}"][:, :1] - found[f"gap{by}"]
        with np.errstate(invalid="ignore", divide="ignore"):
            found[f"share{by}"] = taken / taken[:, 1:2]
    return found


def analyse(measured: Measured[InterventionsConfig]) -> xr.Dataset:
    """Readings of every arm, the shares of the full effect, localisation and schedules, with 95 % intervals."""
    sources, config = measured.sources("network", "edits", "untrained"), measured.config
    if "projection" not in sources["network"]:
        raise StoreError(f"{measured.run.path} stores no inner products (older version); run it again in another --out")
    return estimates(sources, measured.model.depth, config.seed, stochastic=config.eta > 0)


def estimates(sources: Mapping[str, xr.Dataset], depth: int, seed: int, *, stochastic: bool = False) -> xr.Dataset:
    """The analysis in double precision.

    Args:
      sources: stored measurements ``network`` (gates), ``edits`` (of the same pairs) and ``untrained``.
      depth: layers of the network.
      seed: of the resampling.
      stochastic: whether the sampler adds noise.
    """
    with jax.enable_x64(True):
        return _estimates(sources, last_layers(depth), seed, stochastic)


def _estimates(sources, fifth, seed, stochastic):
    parts = [sources["network"], sources["edits"]]
    ell = parts[0].ell.values
    energy, inner = (np.concatenate([part[name].values for part in parts], 1) for name in ("energy", "projection"))
    none = np.asarray(energy[:, 0], np.float64).mean(0)
    names = np.concatenate([part.arm.values for part in parts])
    data: dict[str, Any] = {}

    def add(name, values, dims):
        data[name] = ((*dims, "bound"), packed(values))

    blank = sources["untrained"]
    for prefix, arms, values, along in (
        ("", names, energy, inner),
        ("untrained_", blank.arm.values, blank.energy.values, blank.projection.values),
    ):
        found = arm_readings(values, along, ell, pair_draws(seed, len(values)), stochastic=stochastic)
        dims = {2: (f"{prefix}arm",), 3: (f"{prefix}arm", "band")}
        for name, each in found.items():
            add(prefix + name, each, dims[each.ndim])
        place = {str(name): i for i, name in enumerate(arms)}
        first, last = place[f"first {fifth}"], place[f"last {fifth}"]
        for by in BY:
            gaps, shares = found[f"gap{by}"], found[f"share{by}"]
            add(f"{prefix}effect{by}", gaps[:, place[NONE]] - gaps[:, place[ALL]], ())
            add(f"{prefix}last_minus_first{by}", shares[:, last] - shares[:, first], ())
        if not prefix:
            constant = [place[CONSTANT]]
            for name in ("gap", "gap_energy", "decided"):
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
            "ell_start": WINDOW_START,
            "fifth": fifth,
            "closure": float(np.abs(closed / none - 1).max()),
            "pairs": len(energy),
            "untrained_pairs": sources["untrained"].sizes["pair"],
        },
    )
