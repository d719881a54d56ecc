"""From stored measurements of the mechanism study to estimates with intervals; see `experiments.mechanism`.

Arrays of estimates have the point estimate and the bootstrap draws in front (S), then coupling (C), sampler level (K),
layer (L), and what the variable has.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from experiments.study import pair_draws, resampled_mean, with_interval
from ou_theory.estimator import HIGH_BAND, LOW_BAND

ORIGINS = ("embedding", "attention", "mlp")
TOP = 0.1  # share of the heads that counts as the strongest


def cutoff(gain: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Frequency (...) at which a gain (..., B) first passes half way between its lowest band above DC and 1.

    Linear between band centres; the highest one if it is not passed; NaN if the lowest band's gain is not below 1.
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
    """Shares of a total over levels and layers, (S, C, K, L, ...) each -> (S, C, ...): every level and layer has the
    weight with which coupling left it, ``total(g) / total(0)``."""
    part, total = part / total[:, :1], total / total[:, :1]
    return part.sum((2, 3)) / total.sum((2, 3))


def over_levels(ratio: np.ndarray) -> np.ndarray:
    """Gains of amplitude from ratios of energies (S, C, K, ...): the geometric mean over levels, since contractions
    multiply."""
    return np.exp(np.log(ratio).mean(2) / 2)


def concentration(sync: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Share (1 + draws,) of the heads' synchronisation (P, heads) that the strongest tenth carries.

    The heads are chosen on every other pair and the share is taken on the rest, both ways round.
    """
    count = max(1, round(TOP * sync.shape[1]))
    top = np.empty(len(sync))
    for half in (0, 1):
        strongest = np.argsort(sync[1 - half :: 2].mean(0))[:count]
        top[half::2] = sync[half::2][:, strongest].sum(1)
    rows = np.stack([top, sync.sum(1)], -1)
    means = np.concatenate([rows.mean(0)[None], resampled_mean(rows, weights)])
    return means[:, 0] / means[:, 1]


class Estimates:
    """Collects the estimates of one source by name, with dimensions and intervals."""

    def __init__(self, dataset: xr.Dataset, token_count: np.ndarray, seed: int):
        self.dataset = dataset
        self.weights = pair_draws(seed, dataset.sizes["pair"])
        self.share_of_band = token_count / token_count.sum()
        self.found: dict[str, tuple[tuple[str, ...], np.ndarray]] = {}

    def drawn(self, name: str) -> np.ndarray:
        """Means over pairs of a variable (P, ...): (S, ...)."""
        return self.mean(np.asarray(self.dataset[name], np.float64))

    def mean(self, values: np.ndarray) -> np.ndarray:
        return np.concatenate([values.mean(0)[None], resampled_mean(values, self.weights)])

    def over_bands(self, values: np.ndarray) -> np.ndarray:
        """Means over all token coefficients of what is given by token band (..., B)."""
        return values @ self.share_of_band

    def put(self, name: str, dims: tuple[str, ...], values: np.ndarray) -> None:
        self.found[name] = ((*dims, "bound"), with_interval(values[0], values[1:]))


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
    sync = (_change(e.dataset)[:, -1] / there[0, -1]).mean(1)  # (P, L, H) at the strongest coupling
    e.put("concentration", (), concentration(sync.reshape(len(sync), -1), e.weights))


def _lowest(values: xr.DataArray) -> np.ndarray:
    return np.asarray(values.isel(token_band=LOW_BAND), np.float64)


def _change(dataset: xr.Dataset) -> np.ndarray:
    """What coupling changes, (P, C, K, L, H), in what heads add to the square of the difference of the lowest band."""
    return _lowest(dataset.head_growth) - _lowest(dataset.head_growth_alone)


def gain_estimates(e: Estimates) -> None:
    """The end-to-end gain by pixel band, and the scale at which it changes."""
    energy = e.drawn("denoised")  # (S, C, K, B)
    ratio = energy / energy[:, :1]
    gain = over_levels(ratio)
    e.put("gain_level", ("coupling", "level", "band"), np.sqrt(ratio))
    e.put("gain", ("coupling", "band"), gain)
    e.put("gain_by_energy", ("coupling", "band"), np.sqrt(ratio.mean(2)))  # the other way to pool levels
    e.put("slope", ("coupling",), gain[..., HIGH_BAND] - gain[..., LOW_BAND])
    e.put("cutoff", ("coupling",), cutoff(gain, e.dataset.radius.values))


ESTIMATES: tuple[Callable[[Estimates], None], ...] = (
    split_estimates,
    stream_estimates,
    head_estimates,
    gain_estimates,
)


def analyse(sources: dict[str, xr.Dataset], token_count: np.ndarray, seed: int) -> xr.Dataset:
    """Estimates of every source, by name, with 95 % intervals.

    Args:
      sources: the stored groups by name.
      token_count: (B,) coefficients of each token band.
      seed: of the resampling.
    """
    data: dict[str, Any] = {}
    for source, dataset in sources.items():
        e = Estimates(dataset, token_count, seed)
        with np.errstate(invalid="ignore", divide="ignore"):
            for add in ESTIMATES:
                add(e)
        data |= {f"{source}_{name}": value for name, value in e.found.items()}
        closure = np.asarray(dataset.closure, np.float64).mean((0, 1, 2))
        total = e.over_bands(np.asarray(dataset.split_energy.sel(part="total"), np.float64)).mean((0, 1, 2))
        data[f"{source}_closure"] = ("layer", np.sqrt(closure / total))
    network = next(iter(sources.values()))
    coords: dict[Any, Any] = {name: network[name] for name in network.coords if name not in ("pair", "label")}
    coords["stage"] = np.arange(network.sizes["layer"] + 1)
    coords["origin"] = list(ORIGINS)
    return xr.Dataset(data, coords={**coords, "bound": ["estimate", "low", "high"]})
