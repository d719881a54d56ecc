"""From stored energies and the probe's scores to commitment by layer, and how late in depth the gap is made."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from experiments.frame.draws import bootstrap, both, mean_and_draws, packed, pair_draws
from experiments.frame.measured import Definitions, Measured
from experiments.frame.steps import WINDOW_START
from experiments.studies.depth.settings import LAST, DepthConfig
from ou_theory import estimator as oc

DEFINITIONS: Definitions = {
    "tau": ("commitment level after a layer, by this reading", "nat"),
    "gap": ("synchronization gap after a layer, by this reading", "nat"),
    "share": ("share of the final uncoupled gap that is made in the last fifth of the layers", "1"),
    "half": ("relative depth beyond which the uncoupled gap stays above half of its final value", "1"),
    "r2": ("share of the pair's outcome that is linearly decodable, on pairs that the probe was not fitted on", "1"),
    "probe_band": ("band of the outcome by token frequency; the last one is what lies inside patches", "1"),
    "probe_coupling": ("coupling g at which the probe was fitted and scored", "1"),
}


def readings(energy: np.ndarray, ell: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Commitment by layer from difference energies (P, C, layer, K, B), with bootstrap draws in front of the estimate.

    Every layer is its own reference: its energy at the last step without coupling.

    Returns:
      level, decided (1 + draws, C, layer, B) and gap (1 + draws, C, layer); the first row is the estimate.
    """
    return both(bootstrap(lambda mean: levels_of(mean / mean[:, :1, :, -1:, :], ell, WINDOW_START), energy, weights))


def probe_readings(error: np.ndarray, total: np.ndarray, ell: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The same for the probe: held-out R², clipped to [0, 1], takes the place of relative energy.

    Args:
      error: squares of the probe's errors (C, P, layer, level, B).
      total: squares of the outcome that it predicts, of the same dimensions.
    """
    error, total = (mean_and_draws(x, weights, 1) for x in (error, total))
    r2 = 1 - error / total
    return {**levels_of(np.clip(r2, 0, 1), ell, None), "r2": r2}


def levels_of(q: np.ndarray, ell: np.ndarray, start: float | None) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        found = oc.commitment(jnp.minimum(jnp.asarray(q), 1), ell, start)
        gap = np.asarray(oc.gap(found.level))
    return {"level": np.asarray(found.level), "decided": np.asarray(found.decided), "gap": gap}


def localisation(gap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How late in depth a gap is made.

    Args:
      gap: (..., layer) after every layer; layer 0 is the embedding.

    Returns:
      share: (...) of the final gap that is made in the last fifth of the layers.
      half: (...) relative depth, in [0, 1], from which on the gap stays above half of its final value.
      Both are NaN where the final gap is 0.
    """
    layers = gap.shape[-1] - 1
    depth = np.arange(layers + 1) / layers
    final = gap[..., -1]
    before = np.apply_along_axis(lambda row: np.interp(1 - LAST, depth, row), -1, gap)
    final = np.where(final == 0, np.nan, final)
    share = 1 - before / final
    relative = gap / final[..., None] - 0.5
    below = relative < 0
    last = layers - np.argmax(below[..., ::-1], -1)  # the last layer below half
    low = np.take_along_axis(relative, last[..., None], -1)[..., 0]
    high = np.take_along_axis(relative, np.minimum(last + 1, layers)[..., None], -1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        half = (last + np.where(high > low, -low / (high - low), 1)) / layers
    return share, np.where(np.isnan(final), np.nan, np.where(below.any(-1), half, 0.0))


def analyse(measured: Measured[DepthConfig]) -> xr.Dataset:
    """Commitment, gaps and localisation per source, reading and layer, with 95 % intervals.

    Sources are ``network`` and ``untrained``; readings ``raw``, ``readout``, their shuffled controls, and ``probe``.
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
        coords |= {
            name: dataset[name] for name in ("coupling", "layer", "band", "radius", "token_band", "token_radius")
        }
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
        dims = ("probe_coupling", layer, "level", "probe_band", "bound")
        data[f"{source}_{reading}_r2"] = (dims, packed(found["r2"]))
    return {name: dataset[name] for name in ("probe_band", "level", "level_ell")} | {
        "probe_coupling": dataset.coupling.values
    }


def _fill(data, source, reading, found, band, coupling="coupling", layer="layer") -> None:
    """Adds a reading's levels and gaps, and the localisation of its uncoupled gap, to the variables of a dataset."""
    name = f"{source}_{reading}"
    gap = found["gap"]
    data[f"{name}_tau"] = ((coupling, layer, band, "bound"), packed(found["level"]))
    data[f"{name}_gap"] = ((coupling, layer, "bound"), packed(gap))
    if layer == "layer":
        for what, values in zip(("share", "half"), localisation(gap[:, 0]), strict=True):
            data[f"{name}_{what}"] = (("bound",), packed(values))
