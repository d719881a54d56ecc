"""Estimates with intervals from what the response study stores, beside those of Gaussian laws."""

import numpy as np
import xarray as xr

from experiments.frame.draws import mean_and_draws, packed, pair_draws
from experiments.frame.gaussian import ddim_factors, growth_rate
from experiments.frame.measured import Definitions, Measured
from experiments.frame.steps import window
from experiments.studies.response.settings import LEAST, ResponseConfig
from ou_theory.clock import Clock
from ou_theory.modes import Bands

_RATE = "growth rate of a difference drawn from the band"
_STRETCH = "log of the factor by which the window changes a leading direction's length"
DEFINITIONS: Definitions = {
    "variance": ("variance of a band's coefficients at the ends", "1"),
    "rate": (f"{_RATE}, along the flow", "1 / nat"),
    "rate_noised": (f"{_RATE}, at noised ends", "1 / nat"),
    "rate_gaussian": (f"{_RATE}, of a Gaussian law of the band's variance", "1 / nat"),
    "rate_channels": (f"{_RATE}, of a Gaussian law of the band's covariance of channels", "1 / nat"),
    "rate_error": ("mmse / sigma^2 - 1: mean growth rate of any posterior mean, at noised ends", "1 / nat"),
    "above_channels": ("rate minus that of the Gaussian law by channels", "1 / nat"),
    "above_error": ("rate at noised ends minus the rate that the error there implies", "1 / nat"),
    "negative": ("share of probes whose response points against them", "1"),
    "leaves": ("share of the response that lies in other bands", "1"),
    "asymmetry": ("antisymmetric over symmetric part of the derivative", "1"),
    "local": ("growth rate of a leading direction in a step", "1 / nat"),
    "local_gaussian": ("growth rate of a leading mode of the Gaussian law in a step", "1 / nat"),
    "total": (_STRETCH, "nat"),
    "total_gaussian": (f"{_STRETCH}, Gaussian law", "nat"),
    "exponent": ("growth rate of a leading direction over the window", "1 / nat"),
    "content": ("share of a band in a leading direction", "1"),
    "largest": ("largest growth rate of a leading direction in a step, mean over trajectories", "1 / nat"),
    "largest_level": ("log-SNR at which the largest growth rate is reached", "nat"),
    "growing": ("share of trajectories with a step in which a direction grows", "1"),
    "rated": ("sampler step of a rate", "1"),
    "rated_ell": ("log-SNR of that step", "nat"),
    "place": ("where derivatives are taken: along the flow, or at noised ends", "1"),
    "to": ("band of the response", "1"),
    "window": ("sampler step of the window", "1"),
    "vector": ("leading direction", "1"),
    "point": ("sampler step before which a direction is recorded; the last is the end", "1"),
}


def gaussian_stretches(spectrum: np.ndarray, bands: Bands, clock: Clock, count: int) -> np.ndarray:
    """How much each DDIM step of the window stretches the Gaussian modes that are stretched most.

    Args:
      spectrum: (..., B, C) variances of the modes, by band and eigenvector of the band's covariance of channels. A band
        has each of its modes once for every one of its coefficients.
      count: how many modes are returned.

    Returns:
      logs of the factors (..., count, W), the mode with the largest product of factors first.
    """
    with np.errstate(divide="ignore"):  # the last step takes a mode without variance to 0
        each = np.log(np.moveaxis(ddim_factors(spectrum, clock)[window(clock)], 0, -1))
    each = np.repeat(each, bands.count, -3).reshape(*each.shape[:-3], -1, each.shape[-1])
    order = np.argsort(-each.sum(-1), -1)[..., :count]
    return np.take_along_axis(each, order[..., None], -2)


def estimates(dataset: xr.Dataset, clock: Clock, bands: Bands, seed: int) -> xr.Dataset:
    """Estimates with intervals of one source."""
    weights = pair_draws(seed, dataset.sizes["pair"])
    inside = window(clock, LEAST)[:-1]  # the last step goes to the clean end, which no rate reaches
    sigma = clock.sigma[dataset.level.values]

    def drawn(values):
        return mean_and_draws(values, weights)

    moment, rate, error = (drawn(dataset[name].values) for name in ("moment", "rate", "error"))
    flow, noised = rate[:, 0], rate[:, 1]
    spectrum = np.maximum(np.linalg.eigvalsh(moment), 0)  # (draws, B, channel)
    variance = spectrum.mean(-1)
    one = growth_rate(variance[..., None, :], sigma[:, None])
    channels = growth_rate(spectrum[:, None], sigma[:, None, None]).mean(-1)
    response = drawn(dataset.response.values)[:, 0]
    leaves = 1 - np.einsum("dlbb->dlb", response) / response.sum(-1)
    asymmetry = np.sqrt(drawn(dataset.antisymmetric.values) / drawn(dataset.symmetric.values))[:, 0]
    stretch = np.asarray(dataset.stretch.values, np.float64)
    width = np.diff(clock.log_snr)[inside] / 2  # in ln(1 / sigma)
    local = stretch[..., :-1] / width  # (P, replica, vector, step)
    largest = local.max((2, 3))
    level = clock.log_snr[inside][np.argmax(local.max(2), -1)]
    exponent = stretch[..., :-1].sum(-1) / width.sum()
    gaussian = gaussian_stretches(spectrum, bands, clock, dataset.sizes["vector"])
    by_band = ("level", "band", "bound")
    by_vector = ("vector", "bound")
    found = {
        "variance": (("band", "bound"), variance),
        "rate": (by_band, flow),
        "rate_noised": (by_band, noised),
        "rate_gaussian": (by_band, one),
        "rate_channels": (by_band, channels),
        "rate_error": (by_band, error - 1),
        "above_channels": (by_band, flow - channels),
        "above_error": (by_band, noised - (error - 1)),
        "negative": (by_band, drawn(dataset.negative.values)[:, 0]),
        "leaves": (by_band, leaves),
        "asymmetry": (("level", "part", "bound"), asymmetry),
        "local": (("vector", "rated", "bound"), drawn(local.mean(1))),
        "total": (by_vector, drawn(stretch.sum(-1).mean(1))),
        "local_gaussian": (("vector", "rated", "bound"), gaussian[..., :-1] / width),
        "total_gaussian": (by_vector, gaussian.sum(-1)),
        "exponent": (by_vector, drawn(exponent.mean(1))),
        "content": (("vector", "point", "band", "bound"), drawn(dataset.content.values.mean(1))),
        "largest": (("bound",), drawn(largest.mean(1))),
        "largest_level": (("bound",), drawn(level.mean(1))),
        "growing": (("bound",), drawn((largest > 0).mean(1))),
    }
    result = {name: (dims, packed(values)) for name, (dims, values) in found.items()}
    return xr.Dataset(
        result,
        coords={
            "rated": inside,
            "rated_ell": ("rated", clock.log_snr[inside]),
            "bound": ["estimate", "low", "high"],
            **{name: dataset[name] for name in ("level", "level_ell", "band", "radius", "part", "vector", "point")},
        },
    )


def exactness(dataset: xr.Dataset, variance: np.ndarray, clock: Clock) -> dict[str, float]:
    """Largest deviations of the Wiener control from its closed forms.

    Returns:
      ``rate_deviation``: of all growth rates. ``stretch_deviation``: of the log of the first direction's stretch over
      the window. That stretch follows from the share of each band in the direction at the start of the window.
    """
    rate = growth_rate(variance, clock.sigma[dataset.level.values][:, None])
    factor = ddim_factors(variance, clock)[window(clock)].prod(0)
    content = np.asarray(dataset.content.values[:, :, 0, 0], np.float64)
    expected = 0.5 * np.log((content * factor**2).sum(-1))
    measured = np.asarray(dataset.stretch.values[:, :, 0], np.float64).sum(-1)
    return {
        "rate_deviation": float(np.abs(dataset.rate.values - rate).max()),
        "stretch_deviation": float(np.abs(measured - expected).max()),
    }


def analyse(measured: Measured[ResponseConfig]) -> xr.Dataset:
    """Estimates of all sources along a dimension ``source``; in the attributes, how exact the Wiener control is."""
    clock, sources = measured.clock, measured.sources("network", "untrained", "wiener")
    each = [estimates(dataset, clock, measured.bands, measured.config.seed) for dataset in sources.values()]
    found = xr.concat(each, xr.Variable("source", list(sources)))
    variance = np.asarray(np.float32(band_variance(sources["network"])), np.float64)  # what the control is made for
    return found.assign_attrs(exactness(sources["wiener"], variance, clock))


def band_variance(dataset: xr.Dataset) -> np.ndarray:
    """Variance (B,) of each band's coefficients, by what the pairs of a source end with."""
    return np.einsum("pbcc->b", np.asarray(dataset.moment.values, np.float64)) / (
        dataset.sizes["pair"] * dataset.sizes["channel"]
    )
