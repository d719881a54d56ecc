"""How much of a prediction's variance a Gaussian explains, by noise level and band (docs/theory.md, section 9.6)."""

from collections.abc import Callable
from typing import Any

import numpy as np
import xarray as xr

from experiments.frame.draws import bootstrap, both, packed, pair_draws
from experiments.frame.estimator import LOW
from experiments.frame.measured import Definitions, Measured
from experiments.studies.gaussianity.settings import (
    BANDS,
    COVARIANCE,
    DENOISER,
    GAUSSIANS,
    PUBLISHED,
    QUANTITIES,
    GaussianityConfig,
)  # fmt: skip
from ou_theory.bootstrap import family_level

CLAIMS = 2
MEASURED = ("network", "untrained", "exact", "photographs")
THEORY = "exact, theory"

DEFINITIONS: Definitions = {
    "explained": ("share of the variance of the network's prediction that the Gaussian's explains", "1"),
    "whole": ("the same over all bands, each coefficient counting alike", "1"),
    "variance_share": ("share of the bands in the variance of the prediction, within the class", "1"),
    "own": ("the denoiser's share explained by the covariance at the noise level at which the band commits", "1"),
    "lost": ("how much less one variance in each band explains there", "1"),
    "own_noise": ("noise level nearest to the band's standard deviation, where its SNR is 1", "1"),
    "worst_claimed": ("smallest share of the denoiser explained at the published levels, level of the claims", "1"),
    "worst_noise": ("noise level of that", "1"),
    "lost_claimed": ("largest loss by one variance in each band, level of the claims", "1"),
    "lost_band": ("band of that", "1"),
    "band_variance": ("variance of a coefficient of the band in the data, within classes, mean", "1"),
    "noise": ("noise level sigma in units of the data's standard deviation, as asked for", "1"),
    "noise_ell": ("log-SNR at which it was measured", "nat"),
    "gaussian": ("Gaussian whose exact denoiser is compared", "1"),
    "quantity": ("what is explained: denoised image, score, or the denoised difference of a pair", "1"),
    "claimed": ("source of a claim's number", "1"),
}


def explained(error: np.ndarray, apart: np.ndarray, variance: np.ndarray, score: np.ndarray) -> np.ndarray:
    """Shares by quantity (Q, ...) from mean squares (...) that broadcast; NaN where there is no variance."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.stack([1 - error / variance, 1 - error / score, 1 - apart / variance])


def analyse(measured: Measured[GaussianityConfig]) -> xr.Dataset:
    """Explained shares of every source, with 95 % intervals over pairs."""
    config, bands = measured.config, measured.bands
    held = [name for name in MEASURED if name != "photographs" or measured.run.holds(name)]
    sources = measured.sources(*held)
    band_variance = measured.load("data").band_variance.values
    noise = np.asarray(config.noise)
    own = np.abs(np.log(noise)[:, None] - 0.5 * np.log(band_variance)).argmin(0)  # (B,)
    published = [i for i, level in enumerate(noise) if np.isclose(level, list(PUBLISHED)).any()]
    weight = bands.count / bands.count.sum()
    level = family_level(CLAIMS)

    def readings(error, apart, variance, score):
        """Of mean squares (N, G, L, B) and (N, L, B)."""
        variance, score = variance[:, None], score[:, None]
        shares = np.moveaxis(explained(error, apart, variance, score), 0, 1)  # (N, Q, G, L, B)
        whole = np.moveaxis(explained(*(each @ weight for each in (error, apart, variance, score))), 0, 1)
        at = shares[:, QUANTITIES.index(DENOISER)][..., own, np.arange(len(own))]  # (N, G, B)
        return {
            "explained": shares,
            "whole": whole,
            "own": at,
            "lost": at[:, GAUSSIANS.index(COVARIANCE)] - at[:, GAUSSIANS.index(BANDS)],
            "variance_share": (variance * weight / (variance @ weight)[..., None])[:, 0],
        }

    found = {}
    for name, group in sources.items():
        weights = pair_draws(config.seed, group.sizes["pair"])
        values = tuple(group[v].values for v in ("error", "difference_error", "variance", "score_variance"))
        found[name] = both(bootstrap(readings, values, weights, numbers=len(QUANTITIES) * values[0][0].size))
    theory = measured.load("theory")
    error, variance, score = (np.asarray(theory[v].values)[None] for v in ("error", "variance", "score_variance"))
    found[THEORY] = readings(error, error, variance, score)

    grid = ("quantity", "gaussian", "noise")
    dims = {"explained": (*grid, "band"), "whole": grid, "own": ("gaussian", "band"), "lost": ("band",)}
    dims["variance_share"] = ("noise", "band")
    data: dict[str, Any] = {
        name: (("source", *of, "bound"), np.stack([_packed(each[name]) for each in found.values()]))
        for name, of in dims.items()
    }
    data |= _claimed(found, published, noise, level)
    data["own_noise"] = ("band", noise[own])
    data["band_variance"] = ("band", band_variance)
    return xr.Dataset(
        data,
        coords={
            "source": list(found),
            "quantity": list(QUANTITIES),
            "bound": ["estimate", "low", "high"],
            **{
                name: sources["network"][name] for name in ("gaussian", "noise", "noise_ell", "band", "radius", "count")
            },
        },
        attrs={"claim_level": level, "pairs": sources["network"].sizes["pair"], "published": len(published)},
    )


def _claimed(found: dict[str, Any], published: list[int], noise: np.ndarray, level: float) -> dict[str, Any]:
    """The numbers of the claims by source: the worst of the published levels by the covariance, and the worst loss by
    one variance in each band above DC, each with the interval of the worst and not of where it seems to be."""
    worst, where, lost, band = [], [], [], []
    for each in found.values():
        whole = each["whole"][:, QUANTITIES.index(DENOISER), GAUSSIANS.index(COVARIANCE)][:, published]
        worst.append(extreme(whole, level, np.min) if published else np.full(3, np.nan))
        where.append(noise[published[int(np.argmin(whole[0]))]] if published else np.nan)
        above = each["lost"][:, LOW:]
        lost.append(extreme(above, level, np.max))
        band.append(int(np.nanargmax(above[0])) + LOW)
    return {
        "worst_claimed": (("source", "bound"), np.array(worst)),
        "worst_noise": ("source", np.array(where)),
        "lost_claimed": (("source", "bound"), np.array(lost)),
        "lost_band": ("source", np.array(band)),
    }


def extreme(values: np.ndarray, level: float, of: Callable[..., np.ndarray]) -> np.ndarray:
    """(3,): the smallest (`np.min`) or largest (`np.max`) of several numbers, from them and their draws (1 + draws, n).

    The interval goes from the extreme of the lower ends to that of the upper ends of intervals that are right together,
    so that it holds whichever number is the extreme.
    """
    return of(_packed(values, family_level(values.shape[1], level)), axis=0)


def _packed(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """`packed`, with NaN for the interval of what has no draws."""
    if len(values) > 1:
        return packed(values, level)
    nothing = np.full_like(values[0], np.nan)
    return np.stack([values[0], nothing, nothing], -1)
