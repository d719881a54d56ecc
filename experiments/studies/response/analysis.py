"""From what the response study stores to estimates with intervals, beside those of Gaussian laws."""

import numpy as np
import xarray as xr

from experiments.frame.study import pair_draws, resampled_mean, with_interval
from experiments.studies.compare.analysis import WINDOW_START
from ou_theory.clock import Clock
from ou_theory.modes import Bands


def gaussian_factors(variance: np.ndarray, clock: Clock) -> np.ndarray:
    """What every DDIM step multiplies a Gaussian mode by, (..., K) for variances (...)."""
    gain = variance[..., None] / (variance[..., None] + clock.sigma**2)
    return gain + (1 - gain) * np.append(clock.sigma[1:], 0.0) / clock.sigma


def gaussian_rate(variance: np.ndarray, sigma: np.ndarray) -> np.ndarray:
    """Growth rate (..., L, B) per nat of ln(1 / sigma) of Gaussian modes (..., B)."""
    sigma2 = sigma[:, None] ** 2
    return -sigma2 / (variance[..., None, :] + sigma2)


def gaussian_stretches(spectrum: np.ndarray, bands: Bands, clock: Clock, count: int) -> np.ndarray:
    """Logs (..., count, W) of what the DDIM steps of the window multiply Gaussian modes by, of the `count` modes that
    are stretched most in all.

    Args:
      spectrum: (..., B, C) variances of the modes of each band, each of which it has as often as it has coefficients.
    """
    with np.errstate(divide="ignore"):  # the last step takes a mode without variance to 0
        each = np.log(gaussian_factors(spectrum, clock)[..., window(clock)])
    each = np.repeat(each, bands.count, -3).reshape(*each.shape[:-3], -1, each.shape[-1])
    order = np.argsort(-each.sum(-1), -1)[..., :count]
    return np.take_along_axis(each, order[..., None], -2)


def window(clock: Clock) -> np.ndarray:
    """Sampler steps in the window.

    Raises:
      ValueError: fewer than three.
    """
    inside = np.flatnonzero(clock.log_snr >= WINDOW_START)
    if inside.size < 3:
        raise ValueError(
            f"{len(clock)} sampler steps leave {inside.size} at log-SNR {WINDOW_START:g} and above: give more --steps"
        )
    return inside


def estimates(dataset: xr.Dataset, clock: Clock, bands: Bands, seed: int) -> xr.Dataset:
    """Estimates with intervals of one source."""
    weights = pair_draws(seed, dataset.sizes["pair"])
    inside = window(clock)[:-1]  # the last step goes to the clean end, which no rate reaches
    sigma = clock.sigma[dataset.level.values]

    def drawn(values):
        values = np.asarray(values, np.float64)
        return np.concatenate([values.mean(0)[None], resampled_mean(values, weights)])

    moment, rate, error = (drawn(dataset[name].values) for name in ("moment", "rate", "error"))
    flow, noised = rate[:, 0], rate[:, 1]
    spectrum = np.maximum(np.linalg.eigvalsh(moment), 0)  # (draws, B, channel)
    variance = spectrum.mean(-1)
    one = gaussian_rate(variance, sigma)
    channels = np.moveaxis(gaussian_rate(np.moveaxis(spectrum, -1, 1), sigma), 1, -1).mean(-1)
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
    result = {name: (dims, with_interval(values[0], values[1:])) for name, (dims, values) in found.items()}
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
    """Largest deviations of the Wiener control from its closed forms: of all rates, and of the log of what the window
    stretches the first direction by, which follows from its content at the start of the window."""
    rate = gaussian_rate(variance, clock.sigma[dataset.level.values])
    factor = gaussian_factors(variance, clock)[:, window(clock)].prod(-1)
    content = np.asarray(dataset.content.values[:, :, 0, 0], np.float64)
    expected = 0.5 * np.log((content * factor**2).sum(-1))
    measured = np.asarray(dataset.stretch.values[:, :, 0], np.float64).sum(-1)
    return {
        "rate_deviation": float(np.abs(dataset.rate.values - rate).max()),
        "stretch_deviation": float(np.abs(measured - expected).max()),
    }


def analyse(clock: Clock, bands: Bands, sources: dict[str, xr.Dataset], variance: np.ndarray, seed: int) -> xr.Dataset:
    """Estimates of all sources along a dimension ``source``; in the attributes, how exact the Wiener control is."""
    each = [estimates(dataset, clock, bands, seed) for dataset in sources.values()]
    found = xr.concat(each, xr.Variable("source", list(sources)))
    return found.assign_attrs(exactness(sources["wiener"], variance, clock))


def band_variance(dataset: xr.Dataset) -> np.ndarray:
    """Variance (B,) of each band's coefficients, by what the pairs of a source end with."""
    return np.einsum("pbcc->b", np.asarray(dataset.moment.values, np.float64)) / (
        dataset.sizes["pair"] * dataset.sizes["channel"]
    )
