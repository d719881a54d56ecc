"""From stored measurements to estimates: commitment levels, decided fractions, gaps, with intervals, beside the theory.

One estimator (`experiments.frame.estimator`) serves the network, its controls and the exact recursions; its companions
stand beside it in a table. Pairs are the unit of resampling: one draw of pairs serves all bands, steps and couplings of
a source.
"""

from collections.abc import Callable

import jax
import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from experiments.frame.draws import DRAWS, Drawn, bootstrap, interval_ends, pair_draws
from experiments.frame.eigenmodes import band_share
from experiments.frame.estimator import (
    ESTIMATORS,
    FLOOR_LIMIT,
    HIGH,
    LOW,
    Estimates,
    commitment_of,
    companions,
)
from experiments.frame.exact import exact_statistics
from experiments.frame.gains import Gains, ideal_gain, measured_statistics, regression_gains
from experiments.frame.measured import Measured
from experiments.frame.steps import WINDOW_START
from experiments.studies.compare.claimed import CLAIMS, add_claimed, shuffled_orders
from experiments.studies.compare.modes import ends
from experiments.studies.compare.settings import CompareConfig
from experiments.studies.compare.theory import band_statistics, energy_gains
from ou_theory import estimator as oc
from ou_theory.attention import GateKind
from ou_theory.bootstrap import family_level
from ou_theory.clock import Clock
from ou_theory.modes import Bands, Directions

_KEPT = ("band", "radius", "band_name", "count", "step", "ell", "timestep")  # coordinates of what is measured


def analyse(measured: Measured[CompareConfig]) -> xr.Dataset:
    """Everything that figures, page and claims need, from the groups ``network``, ``untrained`` and ``wiener``, and
    ``data`` where the run has it."""
    config, groups = measured.config, measured.sources("network", "untrained", "wiener")
    data = measured.load("data") if measured.run.holds("data") else None
    bands, between = measured.bands, (LOW, HIGH)
    if config.modes != "dct":  # their groups are enough here
        bands = Directions(np.empty((0, 0, 0, 0)), groups["network"].direction_band.values)
        between = ends(config.modes, len(bands))
    with jax.enable_x64(True):
        found = estimates(
            measured.clock,
            bands,
            **groups,
            data=data,
            eta=config.eta,
            seed=config.seed,
            kind=config.gate_kind,
            between=between,
        )
    if config.modes != "dct":
        found = found.assign_attrs(modes=config.modes)
        found["gap"].attrs = {
            "long_name": f"level of group {between[1]} less that of group {between[0]}",
            "units": "nat",
        }
    return found.assign_attrs(
        model=measured.subject_name,
        prediction=measured.model.prediction,
        sampler=config.sampler,
        gate_kind=config.gate_kind,
        guidance=config.guidance,
        seed=config.seed,
    )


def estimates(
    clock: Clock,
    bands: Bands | Directions,
    network: xr.Dataset,
    untrained: xr.Dataset,
    wiener: xr.Dataset,
    *,
    data: xr.Dataset | None,
    eta: float,
    seed: int,
    kind: GateKind = "joint",
    between: tuple[int, int] = (LOW, HIGH),
) -> xr.Dataset:
    """The analysis in double precision, see `analyse`.

    Args:
      data: principal components of the training data, see `exact.covariance_group`.
      eta: stochasticity of the recursion: 0 for DDIM, 1 for the ancestral sampler.
      seed: of the resampling.
      kind: of the gate, whose gain the ideal model has.
      between: first and last band of the gap.
    """
    ell, couplings, stochastic = clock.log_snr, network.coupling.values, eta > 0
    energy = _difference(network)
    mean = energy.mean(1, dtype=np.float64)
    sources: dict[str, Estimates] = {}
    draws: dict[str, Drawn] = {}
    grids: dict[str, np.ndarray] = {}

    def levels(energy: ArrayLike, inner: ArrayLike | None = None) -> Drawn:
        found = commitment_of(energy, ell, inner=inner, stochastic=stochastic, ends=between)
        return {"tau": found.tau, "decided": found.decided, "gap": found.gap}

    def add(name: str, statistics: Callable[..., tuple[ArrayLike, ArrayLike]], grid: np.ndarray, values=()):
        """Adds a theory. `statistics` maps means of `values` to energies and inner products; without `values` there is
        nothing to resample."""
        energy, inner = statistics(*(np.asarray(v, np.float64).mean(0) for v in values))
        found = commitment_of(energy, ell, inner=inner, stochastic=stochastic, ends=between)
        sources[name], grids[name] = found, grid
        if values:
            weights = pair_draws(seed, len(values[0]))  # of its own: a draw of all pairs might hold none of these
            draws[name] = bootstrap(lambda *m: levels(*statistics(*m)), values, weights, numbers=np.size(energy))[1]

    def run(name: str, group: xr.Dataset):
        """Adds what was measured, by the part of its energy that lies along its own outcome."""
        values = (_difference(group), group.projection.values)
        energy, inner = (v.mean(1, dtype=np.float64) for v in values)
        sources[name] = commitment_of(energy, ell, inner=inner, stochastic=stochastic, ends=between)
        grids[name] = group.coupling.values
        draws[name] = bootstrap(levels, values, pair_draws(seed, group.sizes["pair"]), 1)[1]

    run("network", network)

    gain_pairs = int(np.isfinite(network.one_pass_energy.isel(coupling=0, step=0, band=0)).sum())

    def measured(gains: Gains) -> tuple[np.ndarray, np.ndarray]:
        return measured_statistics(gains, share, clock, eta)

    def pairs_first(name: str) -> np.ndarray:
        values = network[name].values
        return values[:gain_pairs] if values.ndim == 3 else np.moveaxis(values[:, :gain_pairs], 1, 0)

    one_pass, recursions = pairs_first("one_pass_energy"), ["energy gain"]
    left = one_pass.mean(0, dtype=np.float64)
    per_pass = {"gain": np.sqrt(left / left[:1])}
    share, values = np.eye(mean.shape[-1]), (one_pass, pairs_first("state_energy"))
    if "mode_product" in network:  # not in runs of older versions
        share = band_share(network.mode_band.values, network.mode_count.values)
        values = (pairs_first("mode_energy"), pairs_first("mode_state"))
        known = (values[0], pairs_first("mode_product"), values[1])
        add("regression gain", lambda *means: measured(regression_gains(*means)), couplings, known)
        recursions = ["regression gain", *recursions]
        energy_of, product, state = (v.mean(0, dtype=np.float64) for v in known)
        per_pass["residual"] = (regression_gains(energy_of, product, state).residual * state) @ share / left
    add("energy gain", lambda *means: measured(energy_gains(*means)), couplings, values)
    if data is not None:
        exact, rho = "data covariance", ideal_gain(couplings, kind)
        principal = (data.variance.values, data.share.values)
        add(exact, lambda: exact_statistics(rho, *principal, clock, eta), couplings)
    else:
        exact = "sample variance"
        ends = energy[0, :, -1]
        add(exact, lambda variance: band_statistics(couplings, variance, clock, eta, kind), couplings, (ends,))
    run("untrained", untrained)
    run("wiener", wiener)
    add("wiener theory", lambda: _filtered(wiener, bands, clock, eta, kind), wiener.coupling.values)
    dataset = _dataset(clock, network, sources, draws, grids, between)
    for name, found in per_pass.items():
        dataset[name] = (("source", "coupling", "step", "band"), _full(dataset, "network", found, left.shape[1:]))
    end = mean[0, -1]
    turned = oc.aligned_share(
        oc.projection(network.projection.values[0].mean(0, dtype=np.float64), end), stochastic=stochastic
    )
    level = np.full((dataset.sizes["source"], dataset.sizes["band"]), np.nan)
    level[0] = np.asarray(oc.crossing(turned, ell, 0.5))
    dataset["projection_level"] = (("source", "band"), level)

    values, weights = (energy, network.projection.values), pair_draws(seed, network.sizes["pair"])
    by, drawn_by = bootstrap(
        lambda energy, inner: {
            "gap": companions(energy, inner, ell, WINDOW_START, stochastic=stochastic, ends=between)
        },
        values,
        weights,
        1,
    )
    dataset = dataset.assign_coords(estimator=list(ESTIMATORS))
    dataset["gap_by"] = (("estimator", "coupling"), by["gap"])
    dataset["gap_by_interval"] = (
        ("estimator", "coupling", "bound"),
        interval_ends(by["gap"], drawn_by["gap"]),
    )
    point, ends = bootstrap(lambda last: {"ratio": last / last[..., :1, :]}, energy[:, :, -1], weights, 1)
    dataset["end_energy"] = (("coupling", "band"), point["ratio"])
    dataset["end_energy_interval"] = (
        ("coupling", "band", "bound"),
        interval_ends(point["ratio"], ends["ratio"]),
    )
    if isinstance(bands, Directions):
        _add_data_variance(dataset, wiener.variance.values @ bands.averaging, energy[0, :, -1], weights)
    images = network.energy.isel(step=-1).sum("parity").mean("pair", dtype=np.float64)
    dataset["image_energy"] = (("coupling", "band"), (images / images.isel(coupling=0)).values)
    dataset["shuffled_order"] = ("shuffle", shuffled_orders(network, bands, ell, seed, stochastic=stochastic))
    add_claimed(dataset, sources, draws, grids, between)
    beside = bootstrap(levels, values, joined_draws(seed, gain_pairs, network.sizes["pair"]), 1)[1]
    _add_excess(dataset, sources, draws, {**dict.fromkeys(recursions, beside), exact: draws["network"]})
    return dataset.assign_attrs(
        low_band=between[0],
        high_band=between[1] % dataset.sizes["band"],
        ell_start=WINDOW_START,
        steps=len(clock),
        pairs=network.sizes["pair"],
        gain_pairs=gain_pairs,
        untrained_pairs=untrained.sizes["pair"],
        draws=DRAWS,
        floor_limit=FLOOR_LIMIT,
        claim_level=family_level(CLAIMS),
    )


def _add_data_variance(dataset: xr.Dataset, variance: np.ndarray, ends: np.ndarray, weights: np.ndarray) -> None:
    """Adds the variance (B,) of the data in each group, and the energy of the uncoupled ends (P, B) in units of it."""
    point, drawn = bootstrap(lambda mean: {"ratio": mean / variance}, ends, weights)
    dataset["data_variance"], dataset["end_variance"] = ("band", variance), ("band", point["ratio"])
    dataset["end_variance_interval"] = (("band", "bound"), interval_ends(point["ratio"], drawn["ratio"]))


def _filtered(
    wiener: xr.Dataset, bands: Bands | Directions, clock: Clock, eta: float, kind: GateKind
) -> tuple[np.ndarray, np.ndarray]:
    """Energies and inner products of the exact denoiser of the controls, by band."""
    energy, inner = band_statistics(wiener.coupling.values, wiener.variance.values, clock, eta, kind)
    if isinstance(bands, Bands):
        return energy, inner
    return energy @ bands.averaging, inner @ bands.averaging  # it is made for the variance along each direction


def joined_draws(seed: int, first: int, pairs: int) -> np.ndarray:
    """Bootstrap weights (draws, pairs) whose first columns are the draws that `first` pairs have of their own, and
    whose others are drawn apart: what was measured on the first pairs alone goes with what was measured on all."""
    weights, others = np.full((DRAWS, pairs), 1 / pairs), pairs - first
    weights[:, :first] = pair_draws(seed, first) * first / pairs
    if others > 1:  # another number of draws has other random numbers, also where both halves are of one size
        weights[:, first:] = pair_draws(seed, others, DRAWS + 1)[1:] * others / pairs
    return weights


def _add_excess(
    dataset: xr.Dataset, sources: dict[str, Estimates], draws: dict[str, Drawn], beside: dict[str, Drawn]
) -> None:
    """Adds what the network's levels and gaps have over those of theories, each with the network's draws that go with
    the theory's."""
    for name, dims in {"tau": ("coupling", "band"), "gap": ("coupling",)}.items():
        point, interval = [], []
        for theory, network in beside.items():
            of_theory = getattr(sources[theory], name)
            point.append(getattr(sources["network"], name) - of_theory)
            drawn = network[name] - (draws[theory][name] if theory in draws else of_theory)
            interval.append(interval_ends(point[-1], drawn))
        dataset[f"{name}_excess"] = (("theory", *dims), np.stack(point))
        dataset[f"{name}_excess_interval"] = (("theory", *dims, "bound"), np.stack(interval))
    dataset.coords["theory"] = list(beside)


def _difference(dataset: xr.Dataset) -> np.ndarray:
    """Energies (C, P, K, B) of the difference mode, as they are stored: a view, for runs may be large."""
    return dataset.energy.sel(parity="difference").values


def _full(dataset: xr.Dataset, source: str, values: np.ndarray, tail: tuple[int, ...]) -> np.ndarray:
    """`values` (C, ...) of one source in an array over all sources, NaN elsewhere."""
    table = np.full((dataset.sizes["source"], dataset.sizes["coupling"], *tail), np.nan)
    table[list(dataset.source.values).index(source)] = values
    return table


def _dataset(clock: Clock, network: xr.Dataset, sources, draws, grids, between: tuple[int, int]) -> xr.Dataset:
    couplings = network.coupling.values
    names = list(sources)
    tables: dict[str, np.ndarray] = {}

    def fill(name, grid, variable, values):
        rows = np.searchsorted(couplings, grid)
        table = tables.setdefault(variable, np.full((len(names), len(couplings), *values.shape[1:]), np.nan))
        table[names.index(name), rows] = values

    def steps_between(tau):  # the gap on the sampler's own scale
        step = clock.step(tau)
        return step[..., between[1]] - step[..., between[0]]

    for name, point in sources.items():
        grid = grids[name]
        fill(name, grid, "tau", point.tau)
        fill(name, grid, "tau_steps", clock.step(point.tau))
        fill(name, grid, "decided", point.decided)
        fill(name, grid, "gap", point.gap)
        fill(name, grid, "gap_steps", steps_between(point.tau))
        fill(name, grid, "latched_gap", point.latched_gap)
        fill(name, grid, "floor", point.floor)
        fill(name, grid, "relative_energy", point.relative_energy)
        if name in draws:
            draw = draws[name]
            pairs = {
                "tau": (point.tau, draw["tau"]),
                "decided": (point.decided, draw["decided"]),
                "gap": (point.gap, draw["gap"]),
                "gap_steps": (steps_between(point.tau), steps_between(draw["tau"])),
            }
            for variable, (centre, drawn) in pairs.items():
                fill(name, grid, f"{variable}_interval", interval_ends(centre, drawn))
    tail = {
        "tau": ("band",),
        "tau_steps": ("band",),
        "decided": ("band",),
        "floor": ("band",),
        "relative_energy": ("step", "band"),
    }
    variables = {}
    for variable, table in tables.items():
        base = variable.removesuffix("_interval")
        dims = ("source", "coupling", *tail.get(base, ())) + (("bound",) if variable.endswith("_interval") else ())
        variables[variable] = (dims, table)
    dataset = xr.Dataset(
        variables,
        coords={
            "source": names,
            "coupling": couplings,
            "bound": ["low", "high"],
            **{name: network[name] for name in _KEPT if name in network.coords},
        },
    )
    dataset["weak"] = dataset.decided <= dataset.floor
    return dataset
