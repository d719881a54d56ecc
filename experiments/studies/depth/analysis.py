"""From stored energies, the probe's scores and the readout's products to commitment by layer, with intervals."""

from typing import Any

import numpy as np
import xarray as xr

from experiments.frame.draws import bootstrap, both, packed, pair_draws
from experiments.frame.instrument import token_bands
from experiments.frame.measured import Definitions, Measured
from experiments.frame.settings import PAPER_DEPTH, PAPER_LAST
from experiments.frame.steps import spaced_steps
from experiments.studies.depth.readings import localisation, made_in_last, probe_readings, readings
from experiments.studies.depth.scaled import scaled_readings
from experiments.studies.depth.settings import CLAIMS, DepthConfig
from experiments.studies.depth.stream import stream_readings
from ou_theory.bootstrap import family_level
from ou_theory.estimator import HIGH_BAND, LOW_BAND

DEFINITIONS: Definitions = {
    "tau": ("commitment level after a layer, by this reading", "nat"),
    "gap": ("synchronization gap after a layer, by this reading", "nat"),
    "edge": (
        "share of what a band decides that is there where the window opens; above a half its level is a bound",
        "1",
    ),
    "share": ("share of the final uncoupled gap that is made in the last fifth of the layers", "1"),
    "share_claimed": ("that share, with its interval at the level of the claims", "1"),
    "paper_share": (f"share of it that is made in the last {PAPER_LAST} layers, if there are {PAPER_DEPTH}", "1"),
    "half": ("relative depth beyond which the uncoupled gap stays above half of its final value", "1"),
    "r2": ("share of the pair's outcome that the reader explains", "1"),
    "gained": ("how much earlier a band commits after a layer than in the noisy state, by regression on both", "nat"),
    "gained_share": ("share of that which is gained in the last fifth of the layers", "1"),
    "signal": ("coefficient of the outcome in the readout", "1"),
    "noise": ("coefficient of the state's noise in the readout", "1"),
    "passed": ("energy of the state's noise in the readout over that of the outcome", "1"),
    "difference_share": (
        "share of the difference mode in the energy of an uncoupled pair's residual stream",
        "1",
    ),
    "size": ("mean square of the residual stream, per token coefficient and feature, without coupling", "1"),
    "energy": ("that of its difference mode, by band", "1"),
    "relative": ("the same over the mean square of the stream", "1"),
    "probe_band": ("band of the outcome by token frequency; the last one is what lies inside patches", "1"),
    "product": ("which two of the readout, the noisy state and the outcome are multiplied", "1"),
    "share_level": ("log-SNR at which the share of the difference mode is given", "nat"),
    "probe_coupling": ("coupling g at which the probe was fitted and scored", "1"),
}
SHARES_AT = 12  # levels at which the share of the difference mode is given


def analyse(measured: Measured[DepthConfig]) -> xr.Dataset:
    """Commitment, gaps and localisation per source, reading and layer, with 95 % intervals.

    Sources are ``network`` and ``untrained``; readings ``raw``, ``normalised`` (raw energies over the mean square
    of the stream), ``readout``, ``probe``, ``scaled``, ``joined`` and ``state`` (which has one layer), and the shuffled
    controls of four of them.
    """
    seed, ell = measured.config.seed, measured.clock.log_snr
    data: dict[str, Any] = {}
    coords: dict[str, Any] = {"bound": ["estimate", "low", "high"]}
    for source in ("network", "untrained"):
        dataset = measured.load(source)
        weights = pair_draws(seed, dataset.sizes["pair"])
        energies = {
            "raw": dataset.raw.sel(parity="difference").values,
            "raw_shuffled": dataset.raw_shuffled.values,
            "readout": dataset.readout.values,
            "readout_shuffled": dataset.readout_shuffled.values,
        }
        for reading, energy in energies.items():
            band = "token_band" if reading.startswith("raw") else "band"
            _fill(data, source, reading, readings(energy, ell, weights), band)
        steps = spaced_steps(measured.clock, SHARES_AT)
        uncoupled = dataset.raw.isel(coupling=0, step=steps).values  # (P, layer, K', B, parity)
        found = both(bootstrap(lambda mean: {"share": mean[..., 1] / mean.sum(-1)}, uncoupled, weights))["share"]
        data[f"{source}_difference_share"] = (("layer", "share_level", "token_band", "bound"), packed(found))
        count = token_bands(measured.model.input_size // measured.model.patch_size).count
        found, stream = stream_readings(dataset.raw.values, count, ell, steps, weights)
        _fill(data, source, "normalised", found, "token_band")
        size, energy = stream["size"], stream["energy"]
        data[f"{source}_size"] = (("layer", "share_level", "bound"), packed(size))
        for name, values in (("energy", energy), ("relative", energy / size[..., None])):
            data[f"{source}_{name}"] = (("layer", "share_level", "token_band", "bound"), packed(values))
        coords |= {
            name: dataset[name] for name in ("coupling", "layer", "band", "radius", "token_band", "token_radius")
        } | {"share_level": ell[steps]}
        if measured.config.probe_pairs:
            coords |= _probed(data, source, measured.load(f"probe_{source}"), seed)
    return xr.Dataset(data, coords=coords)


def _probed(data: dict[str, Any], source: str, dataset: xr.Dataset, seed: int) -> dict[str, Any]:
    """Adds what the probe finds to the variables of a dataset; returns its coordinates."""
    weights, levels = pair_draws(seed, dataset.sizes["pair"]), dataset.level_ell.values
    shuffled = dataset.error_shuffled.expand_dims("layer", 2).values, dataset.total.isel(layer=[-1]).values
    for reading, scores in (("probe", (dataset.error.values, dataset.total.values)), ("probe_shuffled", shuffled)):
        found = probe_readings(*scores, levels, weights)
        layer = "layer" if reading == "probe" else "last_layer"
        _fill(data, source, reading, found, "probe_band", "probe_coupling", layer)
    if "products" in dataset:  # runs of older versions have none
        _scaled(data, source, dataset, levels, weights)
    return {name: dataset[name] for name in ("probe_band", "level", "level_ell")} | {
        "probe_coupling": dataset.coupling.values
    }


def _scaled(data: dict[str, Any], source: str, dataset: xr.Dataset, levels: np.ndarray, weights: np.ndarray) -> None:
    """Adds the readings of the final layer's readout up to a scalar, and what depth gains over the noisy state."""
    found, passed = scaled_readings(dataset.products.values, levels, weights)
    for reading, values in found.items():
        layer = "layer" if reading != "state" else "state_layer"
        _fill(data, source, reading, values, "band", "probe_coupling", layer)
    shuffled, _ = scaled_readings(dataset.products_shuffled.values, levels, weights)
    _fill(data, source, "scaled_shuffled", shuffled["scaled"], "band", "probe_coupling")
    gained = found["state"]["level"] - found["joined"]["level"]  # (1 + draws, C, layer, B)
    data[f"{source}_gained"] = (("probe_coupling", "layer", "band", "bound"), packed(gained))
    for name, band in (("low", LOW_BAND), ("high", HIGH_BAND)):
        share, _ = localisation(gained[:, 0, :, band])
        data[f"{source}_{name}_gained_share"] = (("bound",), packed(share))
    for name, values in passed.items():
        dims = ("probe_coupling", "layer", "level", "band", "bound")
        data[f"{source}_{name}"] = (dims, packed(values))


def _fill(data, source, reading, found, band, coupling="coupling", layer="layer") -> None:
    """Adds a reading's levels and gaps, and the localisation of its uncoupled gap, to the variables of a dataset."""
    name, gap = f"{source}_{reading}", found["gap"]
    data[f"{name}_tau"] = ((coupling, layer, band, "bound"), packed(found["level"]))
    data[f"{name}_edge"] = ((coupling, layer, band), found["edge"][0])
    data[f"{name}_gap"] = ((coupling, layer, "bound"), packed(gap))
    if "r2" in found:
        data[f"{name}_r2"] = ((coupling, layer, "level", band, "bound"), packed(found["r2"]))
    if layer == "layer":
        if gap.shape[-1] == PAPER_DEPTH + 1:
            data[f"{name}_paper_share"] = (("bound",), packed(made_in_last(gap[:, 0], PAPER_LAST)))
        for what, values in zip(("share", "half"), localisation(gap[:, 0]), strict=True):
            data[f"{name}_{what}"] = (("bound",), packed(values))
            if what == "share":
                data[f"{name}_share_claimed"] = (("bound",), packed(values, family_level(CLAIMS)))
