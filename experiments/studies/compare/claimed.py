"""What the claims rest on: the gap without coupling, what remains of it, the order of the bands, and shuffled bands."""

import numpy as np
import xarray as xr

from experiments.frame.draws import Drawn, in_chunks, with_interval
from experiments.frame.estimator import LOW, Estimates, commitment_of, order
from experiments.frame.streams import numpy_stream
from experiments.frame.verdict import LEAST, told_from_zero
from ou_theory.bootstrap import family_level
from ou_theory.modes import Bands, Directions

SHUFFLED = "shuffled bands"  # the network's energies with coefficients assigned to bands at random
SHUFFLES = 999  # times
CLAIMS = 3  # verdicts of the page, whose intervals hold the truth together with 95 %


def shuffled_orders(
    network: xr.Dataset, bands: Bands | Directions, ell: np.ndarray, seed: int, *, stochastic: bool
) -> np.ndarray:
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
        tau = commitment_of(energy, ell, inner=inner, stochastic=stochastic).tau[:, 0]
        found.append(order(tau, LOW if isinstance(bands, Bands) else 0))
    return np.concatenate(found)


def add_claimed(
    dataset: xr.Dataset,
    sources: dict[str, Estimates],
    draws: dict[str, Drawn],
    grids: dict[str, np.ndarray],
    between: tuple[int, int],
) -> None:
    """Adds what the claims rest on, of every source that has draws: the gap without coupling, what remains of it, and
    the order of the bands. Their intervals hold together, see `CLAIMS`."""
    names, level = list(draws), family_level(CLAIMS)
    tables = {name: np.full((len(names), 3), np.nan) for name in ("uncoupled", "remains", "order")}
    share, strongest = np.full((2, len(names)), np.nan)
    for i, (name, drawn) in enumerate(draws.items()):
        row = list(dataset.source.values).index(name)
        known = np.isfinite(dataset.gap[row].values) & ~dataset.weak[row].values[:, list(between)].any(-1)
        of_grid = np.searchsorted(grids[name], dataset.coupling.values[known])
        tables["uncoupled"][i] = with_interval(sources[name].gap[0], drawn["gap"][:, 0], level)
        if told_from_zero(tables["uncoupled"][i]):
            tables["remains"][i] = remaining_gap(sources[name].gap[of_grid], drawn["gap"][:, of_grid], level)
        strongest[i] = dataset.coupling.values[known][-1] if known.any() else np.nan
        first = LOW if "radius" in dataset else 0
        levels, drawn_levels = sources[name].tau[0], drawn["tau"][:, 0]
        if np.ptp(levels[first:]) > LEAST:
            tables["order"][i] = with_interval(order(levels, first), order(drawn_levels, first), level)
        share[i] = np.mean(drawn["gap"][:, 0] > 0)
    dataset["in_order"] = ("claimed", share)
    dataset["strongest"] = ("claimed", strongest)
    for name, values in tables.items():
        dataset[name] = ("claimed", values[:, 0])
        dataset[f"{name}_interval"] = (("claimed", "bound"), values[:, 1:])
    dataset["claimed"] = ("claimed", names, {"long_name": "source of what the claims rest on", "units": "1"})
    reached = dataset.shuffled_order.values >= tables["order"][names.index("network"), 0]
    known = reached.size > 0 and np.isfinite(tables["order"][names.index("network"), 0])
    dataset["order_p"] = ((), (1 + reached.sum()) / (1 + reached.size) if known else np.nan)


def remaining_gap(gap: np.ndarray, draws: np.ndarray, level: float = 0.95) -> np.ndarray:
    """The gap (C,) at the strongest coupling over that at the first, and its interval, (3,), from draws (draws, C)."""
    gap, draws = gap[np.isfinite(gap)], draws[:, np.isfinite(draws).all(0)]
    if min(gap.size, draws.shape[1]) < 2:
        return np.full(3, np.nan)
    with np.errstate(divide="ignore", invalid="ignore"):  # a network that has none has nothing that could remain
        ratio, drawn = gap[-1] / gap[0], draws[:, -1] / draws[:, 0]
        return with_interval(ratio, drawn, level) if np.isfinite(drawn).all() else np.full(3, np.nan)
