"""Estimates with intervals from the stored measurements of the mechanism study.

Arrays of estimates have the point estimate and the bootstrap draws in front (S), then coupling (C), sampler level (K),
layer (L), and what the variable has.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from experiments.frame.draws import in_chunks, mean_and_draws, packed, pair_draws, resampled_mean
from experiments.frame.instrument import token_bands
from experiments.frame.measured import Definitions, Measured
from experiments.studies.mechanism.settings import MechanismConfig
from ou_theory.estimator import HIGH_BAND, LOW_BAND

ORIGINS = ("embedding", "attention", "mlp")
TOP = 0.1  # share of the heads that counts as the strongest

_SHARE = "share of the attention difference that a part makes up, exactly"
_KEPT = "size under coupling, relative to the size without coupling from the same q, k, v"
_MISSED = "what the self-only reading leaves out, as a share of"
DEFINITIONS: Definitions = {
    "share": (f"{_SHARE}, by band of the token grid", "1"),
    "share_all": (_SHARE, "1"),
    "share_layer": (f"{_SHARE}, by layer", "1"),
    "part_gain": (f"{_KEPT}, of a part of the attention difference", "1"),
    "part_gain_all": (f"{_KEPT}, of a part of the attention difference, all bands", "1"),
    "first_order": ("relative error of the first-order prediction of the difference", "1"),
    "first_order_all": ("relative error of the first-order prediction of the difference, all bands", "1"),
    "first_order_level": ("relative error of the first-order prediction of the difference, by level", "1"),
    "missed": (f"{_MISSED} the pattern part", "1"),
    "missed_all": (f"{_MISSED} the pattern part, all bands", "1"),
    "missed_error": (f"{_MISSED} the whole difference, as an amplitude", "1"),
    "stream_gain": ("amplitude of the residual stream's difference after a stage, relative to no coupling", "1"),
    "block_bypass": ("share of the stream's difference after a block that its attention did not add", "1"),
    "origin_share": ("share of the stream's final difference by where it was added", "1"),
    "bypass": ("share of the stream's final difference that no attention layer added", "1"),
    "bypass_all": ("share of the stream's final difference that no attention layer added, all bands", "1"),
    "contraction": ("change by coupling of ln amplitude of the stream's difference, summed over layers", "1"),
    "part_growth": ("what a part adds to the square of the stream's difference, relative to it", "1"),
    "head_gain": (f"{_KEPT}, of a head's output difference", "1"),
    "head_pull": ("product of what a head writes with the stream's difference, relative to its square", "1"),
    "head_sync": ("change by coupling of what a head adds to the square of the stream's difference", "1"),
    "concentration": ("share of the heads' synchronisation that the strongest tenth carries", "1"),
    "gain": ("one-pass gain: amplitude of the denoised difference relative to no coupling", "1"),
    "gain_level": ("one-pass gain: amplitude of the denoised difference relative to no coupling, by level", "1"),
    "gain_by_energy": ("one-pass gain as the root of a mean ratio of energies", "1"),
    "slope": ("one-pass gain of the highest band minus that of the lowest above DC", "1"),
    "cutoff": ("frequency at which the gain passes half way between its lowest band and 1", "Nyquist"),
    "closure": ("relative deviation of the parts' sum from the difference of the network's own head outputs", "1"),
    "stage": ("after the embedding (0) and after every block", "1"),
    "origin": ("where a part of the stream's difference was added", "1"),
    "reading": ("which reading of the cross part", "1"),
    "place": ("place in a block", "1"),
    "product": ("which inner product", "1"),
    "sublayer": ("attention or MLP", "1"),
}


def cutoff(gain: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """The frequency up to which coupling acts: where the gain first rises half way from its lowest band to 1.

    The gain is interpolated linearly between the centres of bands.

    Args:
      gain: (..., B) one-pass gain by band.
      radius: (B,) radial frequency of the bands.

    Returns:
      the frequency (...). Where the gain never rises that far it is that of the highest band. Where the gain of the
      lowest band above DC is not below 1, nothing is synchronised and it is NaN.
    """
    gain, radius = gain[..., LOW_BAND:], radius[LOW_BAND:]
    low = gain[..., :1]
    above = gain >= (1 + low) / 2
    first = np.maximum(above.argmax(-1), 1)[..., None]
    y0, y1 = (np.take_along_axis(gain, first - i, -1)[..., 0] for i in (1, 0))
    x0, x1 = (radius[(first - i)[..., 0]] for i in (1, 0))
    with np.errstate(invalid="ignore", divide="ignore"):
        found = x0 + ((1 + low[..., 0]) / 2 - y0) / (y1 - y0) * (x1 - x0)
    return np.where(low[..., 0] < 1, np.where(above.any(-1), found, radius[-1]), np.nan)


def pooled(part: np.ndarray, total: np.ndarray) -> np.ndarray:
    """Shares of a total, pooled over levels and layers.

    Both arguments are divided by the total without coupling. A level or layer therefore counts by how much of its total
    coupling has left, ``total(g) / total(0)``, and not by how large it is.

    Args:
      part, total: (S, C, K, L, ...).

    Returns:
      (S, C, ...).
    """
    part, total = part / total[:, :1], total / total[:, :1]
    return part.sum((2, 3)) / total.sum((2, 3))


def over_levels(ratio: np.ndarray) -> np.ndarray:
    """Gains of amplitude (S, C, ...) from ratios of energies (S, C, K, ...). Over levels the geometric mean is taken,
    because contractions multiply along a trajectory."""
    return np.exp(np.log(ratio).mean(2) / 2)


def concentration(sync: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The share of the heads' synchronisation that the strongest tenth of the heads carries.

    Every other pair chooses the heads, and the remaining pairs measure their share; then the two halves change places.
    Heads that were chosen by the pairs that measure them would look stronger than they are.

    Args:
      sync: (P, heads) what each head does for synchronisation, by pair.
      weights: (draws, P) of the bootstrap.

    Returns:
      (1 + draws,), the estimate first.
    """
    count = max(1, round(TOP * sync.shape[1]))
    top = np.empty(len(sync))
    for half in (0, 1):
        strongest = np.argsort(sync[1 - half :: 2].mean(0))[:count]
        top[half::2] = sync[half::2][:, strongest].sum(1)
    rows = np.stack([top, sync.sum(1)], -1)
    means = mean_and_draws(rows, weights)
    return means[:, 0] / means[:, 1]


class Estimates:
    """Collects estimates of one source by name, with their dimensions, on resampled pairs.

    Args:
      dataset: its stored measurements.
      token_count: (B,) coefficients of each token band.
      weights: (S, P) of the pairs, rows sum to 1.
    """

    def __init__(self, dataset: xr.Dataset, token_count: np.ndarray, weights: np.ndarray):
        self.dataset, self.weights = dataset, weights
        self.share_of_band = token_count / token_count.sum()
        self.found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}

    def drawn(self, name: str) -> np.ndarray:
        """Means over pairs of a variable (P, ...): (S, ...)."""
        return self.mean(np.asarray(self.dataset[name], np.float64))

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Means over pairs of what is given by pair (P, ...): (S, ...)."""
        return resampled_mean(values, self.weights)

    def over_bands(self, values: np.ndarray) -> np.ndarray:
        """Means over all token coefficients of what is given by token band (..., B)."""
        return values @ self.share_of_band

    def put(self, name: str, dims: tuple[str, ...], values: np.ndarray) -> None:
        self.found[name] = (dims, values)


def split_estimates(e: Estimates) -> None:
    """Sizes of the parts, the first-order error, and what the self-only reading leaves out."""
    product, energy = e.drawn("split_product"), e.drawn("split_energy")  # (S, C, K, L, part, B)
    total = energy[..., 3, :]
    whole = e.over_bands(total)
    e.put("share", ("coupling", "part", "token_band"), pooled(product, total[..., None, :]))
    product = e.over_bands(product)
    e.put("share_all", ("coupling", "part"), pooled(product, whole[..., None]))
    by_layer = (product / whole[:, :1, ..., None]).sum(2) / (whole / whole[:, :1]).sum(2)[..., None]
    e.put("share_layer", ("coupling", "layer", "part"), by_layer)
    alone = e.drawn("alone_energy")
    e.put("part_gain", ("coupling", "part", "token_band"), np.sqrt((energy / alone).mean((2, 3))))
    ratio = e.over_bands(energy) / e.over_bands(alone)
    e.put("part_gain_all", ("coupling", "part"), np.sqrt(ratio.mean((2, 3))))
    error = e.drawn("first_order_error")[..., 3, :]
    e.put("first_order", ("coupling", "token_band"), np.sqrt((error / total).mean((2, 3))))
    error = e.over_bands(error) / whole
    e.put("first_order_all", ("coupling",), np.sqrt(error.mean((2, 3))))
    e.put("first_order_level", ("coupling", "level"), np.sqrt(error.mean(3)))
    pattern, cross = e.drawn("pattern_energy"), e.drawn("cross_product")
    e.put("missed", ("coupling", "reading", "token_band"), pooled(cross, pattern[..., None, :]))
    e.put("missed_all", ("coupling", "reading"), pooled(e.over_bands(cross), e.over_bands(pattern)[..., None]))
    lost = e.over_bands(e.drawn("cross_energy")) / whole[..., None]
    e.put("missed_error", ("coupling", "reading"), np.sqrt(lost.mean((2, 3))))


def stream_estimates(e: Estimates) -> None:
    """The gain by layer, where the final difference comes from, and what bypasses attention."""
    energy, product = e.drawn("stream_energy"), e.drawn("stream_product")  # (S, C, K, L, place or product, B)
    pre, attention, post = (energy[..., i, :] for i in (0, 1, 3))
    stages = np.concatenate([pre[..., :1, :], post], -2)  # after the embedding and after every block
    e.put("stream_gain", ("coupling", "stage", "token_band"), over_levels(stages / stages[:, :1]))
    attention_post = product[..., 0, :] + attention + product[..., 2, :]
    bypass = 1 - (e.over_bands(attention_post) / e.over_bands(post)).mean(2)
    e.put("block_bypass", ("coupling", "layer"), bypass)
    origin = np.concatenate([e.drawn("origin_embedding")[..., None, :], e.drawn("origin").sum(3)], 3)
    final = origin.sum(3)  # (S, C, K, B)
    # `pooled` sees one layer: the last
    e.put(
        "origin_share", ("coupling", "origin", "token_band"), pooled(origin[:, :, :, None], final[:, :, :, None, None])
    )
    e.put("bypass", ("coupling", "token_band"), 1 - pooled(origin[..., 1, :][:, :, :, None], final[:, :, :, None]))
    by_attention, final = e.over_bands(origin[..., 1, :]), e.over_bands(final)
    e.put("bypass_all", ("coupling",), 1 - pooled(by_attention[..., None], final[..., None]))
    # logarithms of amplitudes: what coupling changes in the sublayers adds up, over layers, to the stream's gain
    middle = pre + 2 * product[..., 0, :] + attention
    logs = np.stack([np.log(middle / pre), np.log(post / middle)], -2) / 2
    e.put("contraction", ("coupling", "sublayer", "token_band"), (logs - logs[:, :1]).sum(3).mean(2))
    growth = e.drawn("part_growth") / pre[..., None, :]
    e.put("part_growth", ("coupling", "part", "token_band"), growth.sum(3).mean(2))


def head_estimates(e: Estimates) -> None:
    """What coupling does to every head's difference, and which heads pull the replicas together."""
    energy = e.drawn("head_product")[..., 3]
    e.put("head_gain", ("coupling", "layer", "head"), np.sqrt((energy / e.drawn("head_alone")).mean(2)))
    there = e.mean(_lowest(e.dataset.stream_energy.sel(place="pre")))[..., None]  # (S, C, K, L, 1)
    pull, change = (e.mean(values) for values in (_lowest(e.dataset.head_pull), _change(e.dataset)))
    e.put("head_pull", ("coupling", "layer", "head"), (pull / there).mean(2))
    e.put("head_sync", ("coupling", "layer", "head"), (change / there).mean(2))


def _lowest(values: xr.DataArray) -> np.ndarray:
    return np.asarray(values.isel(token_band=LOW_BAND), np.float64)


def _change(dataset: xr.Dataset) -> np.ndarray:
    """What coupling changes, (P, C, K, L, H), in what heads add to the square of the difference of the lowest band."""
    return _lowest(dataset.head_growth) - _lowest(dataset.head_growth_alone)


def synchronisation(dataset: xr.Dataset) -> np.ndarray:
    """What every head does for synchronisation at the strongest coupling, by pair: (P, L * H)."""
    there = _lowest(dataset.stream_energy.sel(place="pre")).mean(0)[-1, ..., None]
    sync = (_change(dataset)[:, -1] / there).mean(1)
    return sync.reshape(len(sync), -1)


def gain_estimates(e: Estimates) -> None:
    """The end-to-end gain by pixel band, and the scale at which it changes."""
    energy = e.drawn("denoised")  # (S, C, K, B)
    ratio = energy / energy[:, :1]
    gain = over_levels(ratio)
    e.put("gain_level", ("coupling", "level", "band"), np.sqrt(ratio))
    e.put("gain", ("coupling", "band"), gain)
    e.put("gain_by_energy", ("coupling", "band"), np.sqrt(ratio.mean(2)))  # pools levels by energy instead
    e.put("slope", ("coupling",), gain[..., HIGH_BAND] - gain[..., LOW_BAND])
    e.put("cutoff", ("coupling",), cutoff(gain, e.dataset.radius.values))


ESTIMATES: tuple[Callable[[Estimates], None], ...] = (
    split_estimates,
    stream_estimates,
    head_estimates,
    gain_estimates,
)


def analyse(measured: Measured[MechanismConfig]) -> xr.Dataset:
    """Estimates of every source, by name, with 95 % intervals."""
    model = measured.model
    token_count = token_bands(model.input_size // model.patch_size).count
    found = estimates(measured.sources("network", "untrained", "random"), token_count, measured.config.seed)
    return found.assign_attrs(gate_kind=measured.config.gate_kind)


def estimates(sources: dict[str, xr.Dataset], token_count: np.ndarray, seed: int) -> xr.Dataset:
    """Estimates of every source, by name, with 95 % intervals.

    Args:
      sources: the stored groups by name.
      token_count: (B,) coefficients of each token band.
      seed: of the resampling.
    """
    data: dict[str, Any] = {}
    for source, dataset in sources.items():
        pairs = dataset.sizes["pair"]
        weights = pair_draws(seed, pairs)
        rows = np.concatenate([np.full((1, pairs), 1 / pairs), weights])  # the estimate first
        numbers = sum(variable.size for variable in dataset.data_vars.values()) // pairs
        parts = [Estimates(dataset, token_count, some) for some in in_chunks(rows, numbers)]
        for e in parts:
            with np.errstate(invalid="ignore", divide="ignore"):
                for add in ESTIMATES:
                    add(e)
        for name, (dims, _) in parts[0].found.items():
            values = np.concatenate([e.found[name][1] for e in parts])
            data[f"{source}_{name}"] = ((*dims, "bound"), packed(values))
        data[f"{source}_concentration"] = ("bound", packed(concentration(synchronisation(dataset), weights)))
        closure = np.asarray(dataset.closure, np.float64).mean((0, 1, 2))
        total = parts[0].over_bands(np.asarray(dataset.split_energy.sel(part="total"), np.float64)).mean((0, 1, 2))
        data[f"{source}_closure"] = ("layer", np.sqrt(closure / total))
    network = next(iter(sources.values()))
    coords: dict[Any, Any] = {name: network[name] for name in network.coords if name not in ("pair", "label")}
    coords["stage"] = np.arange(network.sizes["layer"] + 1)
    coords["origin"] = list(ORIGINS)
    return xr.Dataset(data, coords={**coords, "bound": ["estimate", "low", "high"]})
