"""From stored measurements to estimates: commitment levels, decided fractions, gaps, with intervals, beside the theory.

One estimator (`experiments.frame.estimator`) serves the network, its controls and the exact recursions; its companions
stand beside it in a table. Pairs are the unit of resampling: one draw of pairs serves all bands, steps and couplings of
a source.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from experiments.frame.draws import DRAWS, Drawn, bootstrap, in_chunks, pair_draws
from experiments.frame.estimator import (
    ESTIMATORS,
    FLOOR_LIMIT,
    HIGH,
    LOW,
    Estimates,
    commitment_of,
    companions,
    order,
)
from experiments.frame.measured import Definitions, Measured
from experiments.frame.steps import WINDOW_START
from experiments.frame.streams import numpy_stream
from experiments.studies.compare.settings import CompareConfig
from ou_theory import estimator as oc
from ou_theory.attention import GateKind, rho
from ou_theory.bootstrap import basic_interval
from ou_theory.clock import Clock
from ou_theory.gain_model import wiener_gain
from ou_theory.modes import Bands
from ou_theory.recursion import recursion_energy

SHUFFLED = "shuffled bands"  # the network's energies with coefficients assigned to bands at random
SHUFFLES = 999  # times

DEFINITIONS: Definitions = {
    "tau": ("commitment level of a band", "nat"),
    "tau_interval": ("its 95 % interval", "nat"),
    "tau_steps": ("commitment level on the sampler's own scale", "sampler steps"),
    "decided": (
        "decided fraction of a band: what replicas decide individually, in units of its uncoupled variation; above 1 "
        "where coupling amplifies their difference",
        "1",
    ),
    "decided_interval": ("its 95 % interval", "1"),
    "gap": ("synchronization gap: level of the highest band less that of the lowest above DC", "nat"),
    "gap_interval": ("its 95 % interval", "nat"),
    "gap_steps": ("synchronization gap on the sampler's own scale", "sampler steps"),
    "gap_steps_interval": ("its 95 % interval", "sampler steps"),
    "latched_gap": ("gap of the levels that are not normalised by the decided fraction", "nat"),
    "relative_energy": ("energy of the denoised difference over that of its uncoupled end", "1"),
    "end_energy": ("energy of the difference of the final images over that of the uncoupled ones", "1"),
    "end_energy_interval": ("its 95 % interval", "1"),
    "image_energy": ("energy of a final image, mean of both replicas, over that of an uncoupled one", "1"),
    "weak": ("whether no more is decided than the error where the window opens, so that the level is not known", "1"),
    "estimator": ("what is accumulated until a band counts as decided; the first is the headline", "1"),
    "gap_by": ("synchronization gap of the network by other estimators, too", "nat"),
    "gap_by_interval": ("its 95 % interval", "nat"),
    "gain": ("one-pass gain rho: what one denoising leaves of a difference, relative to no coupling", "1"),
    "floor": ("noise floor: error energy where the window opens, in units of the band's uncoupled end", "1"),
    "projection_level": ("log-SNR at which the predicted difference has half of its energy along the final one", "nat"),
    "strongest": ("strongest coupling at which both bands of the gap decide more than their error", "1"),
    "remains": ("gap at that coupling over the gap without", "1"),
    "remains_interval": ("its 95 % interval", "1"),
    "order": ("Kendall's tau-b of commitment level against frequency, DC left out, without coupling", "1"),
    "order_interval": ("its 95 % interval", "1"),
    "in_order": ("share of the resampled runs in which the lowest band commits before the highest", "1"),
    "shuffled_order": ("Kendall's tau-b with coefficients assigned to bands at random", "1"),
    "shuffle": ("number of the random assignment", "1"),
    "order_p": ("share of random assignments, the true one among them, with at least the network's order", "1"),
}


def theory_statistics(
    rho_gain: ArrayLike, band_gain: ArrayLike, clock: Clock, eta: float
) -> tuple[jax.Array, jax.Array]:
    """Exact energies of the denoised difference under per-step gains ``rho * W``, and its inner products with its end,
    (..., C, K, B) each. The two say different things where a gain below 0 turns the difference round."""
    return _recursion(rho_gain, band_gain, clock.sigma, 1 / clock.alpha_bar[0], eta)


@partial(jax.jit, static_argnames="eta")
def _recursion(rho_gain, band_gain, sigma, start, eta: float) -> tuple[jax.Array, jax.Array]:
    gain = jnp.asarray(rho_gain) * jnp.asarray(band_gain)
    energy = recursion_energy(gain, sigma, jnp.full(gain.shape[:-2] + gain.shape[-1:], start), eta=eta)
    ratio = sigma[1:] / sigma[:-1]
    keep = ratio * jnp.sqrt(1 - eta**2 * (1 - ratio**2))
    factor = gain[..., :-1, :] + (1 - gain[..., :-1, :]) * keep[:, None]  # of the state, step by step
    onward = jnp.concatenate([jnp.cumprod(factor[..., ::-1, :], -2)[..., ::-1, :], jnp.ones_like(gain[..., :1, :])], -2)
    state = jnp.where(gain == 0, 0, energy / jnp.where(gain == 0, 1, gain))  # gain times the variance of the state
    return energy, state * onward * gain[..., -1:, :]


def ideal_statistics(
    couplings: np.ndarray, variance: np.ndarray, clock: Clock, eta: float, kind: GateKind = "joint"
) -> tuple[jax.Array, jax.Array]:
    """`theory_statistics` of the ideal model: Wiener gains of band variances (..., B), and the gain `rho` of the gate.
    Networks run at couplings of single precision, and so does this."""
    band_gain = wiener_gain(jnp.asarray(variance)[..., None, None, :], jnp.asarray(clock.sigma**2)[:, None])
    ideal = np.asarray(rho(jnp.asarray(couplings, jnp.float32), kind))
    return theory_statistics(ideal[:, None, None], band_gain, clock, eta)


def measured_gains(one_pass: np.ndarray, uncoupled: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one-pass gain rho (..., C, K, B) and the uncoupled gain W (..., 1, K, B) from mean energies.

    Args:
      one_pass: (..., C, K, B) difference energies after one denoising of the same inputs.
      uncoupled: (..., K, B) the same at coupling 0.
      state: (..., K, B) difference energies of those inputs in the rescaled frame.
    """
    uncoupled = uncoupled[..., None, :, :]
    return np.sqrt(one_pass / uncoupled), np.sqrt(uncoupled / state[..., None, :, :])


def analyse(measured: Measured[CompareConfig]) -> xr.Dataset:
    """Everything that figures, page and claims need, from the groups ``network``, ``untrained`` and ``wiener``."""
    config, groups = measured.config, measured.sources("network", "untrained", "wiener")
    with jax.enable_x64(True):
        found = estimates(
            measured.clock, measured.bands, **groups, eta=config.eta, seed=config.seed, kind=config.gate_kind
        )
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
    bands: Bands,
    network: xr.Dataset,
    untrained: xr.Dataset,
    wiener: xr.Dataset,
    *,
    eta: float,
    seed: int,
    kind: GateKind = "joint",
) -> xr.Dataset:
    """The analysis in double precision, see `analyse`.

    Args:
      eta: stochasticity of the recursion: 0 for DDIM, 1 for the ancestral sampler.
      seed: of the resampling.
      kind: of the gate, whose gain the ideal model has.
    """
    ell, couplings, stochastic = clock.log_snr, network.coupling.values, eta > 0
    energy = _difference(network)
    mean = energy.mean(1, dtype=np.float64)
    sources: dict[str, Estimates] = {}
    draws: dict[str, Drawn] = {}
    grids: dict[str, np.ndarray] = {}

    def levels(energy: ArrayLike, inner: ArrayLike | None = None) -> Drawn:
        found = commitment_of(energy, ell, inner=inner, stochastic=stochastic)
        return {"tau": found.tau, "decided": found.decided, "gap": found.gap}

    def add(name: str, statistics: Callable[..., tuple[ArrayLike, ArrayLike]], grid: np.ndarray, values=(), axis=0):
        """A recursion: how its energies and inner products follow from means of what is resampled, if anything is."""
        energy, inner = statistics(*(np.asarray(v, np.float64).mean(axis) for v in values))
        sources[name], grids[name] = commitment_of(energy, ell, inner=inner, stochastic=stochastic), grid
        if values:
            weights = pair_draws(seed, values[0].shape[axis])
            size = np.size(energy)
            draws[name] = bootstrap(lambda *m: levels(*statistics(*m)), values, weights, axis, numbers=size)[1]

    def run(name: str, group: xr.Dataset):
        """What was run: the part of its energies that lies along its outcomes."""
        values = (_difference(group), group.projection.values)
        energy, inner = (v.mean(1, dtype=np.float64) for v in values)
        sources[name] = commitment_of(energy, ell, inner=inner, stochastic=stochastic)
        grids[name] = group.coupling.values
        draws[name] = bootstrap(levels, values, pair_draws(seed, group.sizes["pair"]), 1)[1]

    run("network", network)

    gain_pairs = int(np.isfinite(network.one_pass_energy.isel(coupling=0, step=0, band=0)).sum())
    one_pass = network.one_pass_energy.values[:, :gain_pairs]
    state = network.state_energy.values[:gain_pairs]
    gain, _ = measured_gains(one_pass.mean(1), one_pass[0].mean(0), state.mean(0))
    add(
        "measured gain",
        lambda *means: theory_statistics(*measured_gains(*means), clock, eta),
        couplings,
        (np.moveaxis(one_pass, 1, 0), one_pass[0], state),  # a draw of all pairs might hold none of these
    )
    ideal = partial(ideal_statistics, couplings, clock=clock, eta=eta, kind=kind)
    add("ideal gain", lambda ends: ideal(ends[..., 0, :]), couplings, (energy[:1, :, -1],), axis=1)
    run("untrained", untrained)
    run("wiener", wiener)
    exact = ideal_statistics(wiener.coupling.values, wiener.variance.values, clock, eta, kind)
    add("wiener theory", lambda: exact, wiener.coupling.values)
    dataset = _dataset(clock, network, sources, draws, grids)
    dataset["gain"] = (
        ("source", "coupling", "step", "band"),
        _full(dataset, "network", gain, (len(ell), mean.shape[-1])),
    )
    end = mean[0, -1]
    share = oc.aligned_share(
        oc.projection(network.projection.values[0].mean(0, dtype=np.float64), end), stochastic=stochastic
    )
    level = np.full((dataset.sizes["source"], dataset.sizes["band"]), np.nan)
    level[0] = np.asarray(oc.crossing(share, ell, 0.5))
    dataset["projection_level"] = (("source", "band"), level)

    values, weights = (energy, network.projection.values), pair_draws(seed, network.sizes["pair"])
    by, drawn_by = bootstrap(
        lambda energy, inner: {"gap": companions(energy, inner, ell, WINDOW_START, stochastic=stochastic)},
        values,
        weights,
        1,
    )
    dataset = dataset.assign_coords(estimator=list(ESTIMATORS))
    dataset["gap_by"] = (("estimator", "coupling"), by["gap"])
    dataset["gap_by_interval"] = (
        ("estimator", "coupling", "bound"),
        np.stack(basic_interval(by["gap"], drawn_by["gap"]), -1),
    )
    point, ends = bootstrap(lambda last: {"ratio": last / last[..., :1, :]}, energy[:, :, -1], weights, 1)
    dataset["end_energy"] = (("coupling", "band"), point["ratio"])
    dataset["end_energy_interval"] = (
        ("coupling", "band", "bound"),
        np.stack(basic_interval(point["ratio"], ends["ratio"]), -1),
    )
    images = network.energy.isel(step=-1).sum("parity").mean("pair", dtype=np.float64)
    dataset["image_energy"] = (("coupling", "band"), (images / images.isel(coupling=0)).values)
    dataset["shuffled_order"] = ("shuffle", shuffled_orders(network, bands, ell, seed, stochastic=stochastic))
    _add_claimed(dataset, sources, draws, grids)
    return dataset.assign_attrs(
        low_band=LOW,
        high_band=dataset.sizes["band"] + HIGH,
        ell_start=WINDOW_START,
        steps=len(clock),
        pairs=network.sizes["pair"],
        gain_pairs=gain_pairs,
        untrained_pairs=untrained.sizes["pair"],
        draws=DRAWS,
        floor_limit=FLOOR_LIMIT,
    )


def shuffled_orders(network: xr.Dataset, bands: Bands, ell: np.ndarray, seed: int, *, stochastic: bool) -> np.ndarray:
    """Kendall's tau-b (`SHUFFLES`,) of the network's levels when its coefficients are assigned to bands at random: what
    the claim about order is worth. The pairs are those whose coefficients are stored: none in runs of older versions.
    """
    if "coefficient_energy" not in network:
        return np.empty(0)
    mean = {
        name: network[f"coefficient_{name}"].mean("pair").values.astype(np.float64).reshape(len(ell), -1)
        for name in ("energy", "projection")
    }
    rng = numpy_stream(seed, "shuffles")
    orders = np.stack([rng.permutation(bands.index.size) for _ in range(SHUFFLES)])
    averaging = bands.averaging.reshape(-1, len(bands))
    found = []
    for chosen in in_chunks(orders, mean["energy"].size):
        energy, inner = (np.moveaxis(v[:, chosen] @ averaging, 0, 1)[:, None] for v in mean.values())
        found.append(order(commitment_of(energy, ell, inner=inner, stochastic=stochastic).tau[:, 0]))
    return np.concatenate(found)


def _add_claimed(
    dataset: xr.Dataset, sources: dict[str, Estimates], draws: dict[str, Drawn], grids: dict[str, np.ndarray]
) -> None:
    """Adds what the claims rest on: what remains of the gap, and the order of the bands, of every source that has
    draws."""
    names = list(draws)
    tables = {"remains": np.full((len(names), 3), np.nan), "order": np.full((len(names), 3), np.nan)}
    share, strongest = np.full((2, len(names)), np.nan)
    for i, (name, drawn) in enumerate(draws.items()):
        row = list(dataset.source.values).index(name)
        known = np.isfinite(dataset.gap[row].values) & ~dataset.weak[row].values[:, [LOW, HIGH]].any(-1)
        of_grid = np.searchsorted(grids[name], dataset.coupling.values[known])
        tables["remains"][i] = remaining_gap(sources[name].gap[of_grid], drawn["gap"][:, of_grid])
        strongest[i] = dataset.coupling.values[known][-1] if known.any() else np.nan
        tables["order"][i] = _order(sources[name].tau[0], drawn["tau"][:, 0])
        share[i] = np.mean(drawn["gap"][:, 0] > 0)
    dataset["in_order"] = ("claimed", share)
    dataset["strongest"] = ("claimed", strongest)
    for name, values in tables.items():
        dataset[name] = ("claimed", values[:, 0])
        dataset[f"{name}_interval"] = (("claimed", "bound"), values[:, 1:])
    dataset["claimed"] = ("claimed", names, {"long_name": "source of what the claims rest on", "units": "1"})
    reached = dataset.shuffled_order.values >= tables["order"][names.index("network"), 0]
    dataset["order_p"] = ((), (1 + reached.sum()) / (1 + reached.size) if reached.size else np.nan)


def remaining_gap(gap: np.ndarray, draws: np.ndarray) -> np.ndarray:
    """The gap (C,) at the strongest coupling over that at the first, and its interval, (3,), from draws (draws, C)."""
    gap, draws = gap[np.isfinite(gap)], draws[:, np.isfinite(draws).all(0)]
    if min(gap.size, draws.shape[1]) < 2:
        return np.full(3, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):  # a network that has none has nothing that could remain
        ratio, drawn = gap[-1] / gap[0], draws[:, -1] / draws[:, 0]
        return np.array([ratio, *basic_interval(ratio, drawn)]) if np.isfinite(drawn).all() else np.full(3, np.nan)


def _order(levels: np.ndarray, draws: np.ndarray) -> np.ndarray:
    value = order(levels)
    return np.array([value, *np.clip(basic_interval(value, order(draws)), -1, 1)])


def _difference(dataset: xr.Dataset) -> np.ndarray:
    """Energies (C, P, K, B) of the difference mode, as they are stored: a view, for runs may be large."""
    return dataset.energy.sel(parity="difference").values


def _full(dataset: xr.Dataset, source: str, values: np.ndarray, tail: tuple[int, ...]) -> np.ndarray:
    """`values` (C, ...) of one source in an array over all sources, NaN elsewhere."""
    table = np.full((dataset.sizes["source"], dataset.sizes["coupling"], *tail), np.nan)
    table[list(dataset.source.values).index(source)] = values
    return table


def _dataset(clock: Clock, network: xr.Dataset, sources, draws, grids) -> xr.Dataset:
    couplings = network.coupling.values
    names = list(sources)
    tables: dict[str, np.ndarray] = {}

    def fill(name, grid, variable, values):
        rows = np.searchsorted(couplings, grid)
        table = tables.setdefault(variable, np.full((len(names), len(couplings), *values.shape[1:]), np.nan))
        table[names.index(name), rows] = values

    def steps_between(tau):  # the gap on the sampler's own scale
        step = clock.step(tau)
        return step[..., HIGH] - step[..., LOW]

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
                fill(name, grid, f"{variable}_interval", np.stack(basic_interval(centre, drawn), -1))
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
            **{name: network[name] for name in ("band", "radius", "count", "step", "ell", "timestep")},
        },
    )
    dataset["weak"] = dataset.decided <= dataset.floor
    return dataset
