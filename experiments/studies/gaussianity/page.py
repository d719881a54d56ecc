"""Figures and text of the gaussianity study."""

from functools import partial

import numpy as np
import xarray as xr

from experiments.frame.drawing import band_names
from experiments.frame.measured import Measured
from experiments.frame.page import NOTHING, Page, Section, Table, formatted, number
from experiments.frame.verdict import Claim, Control, above, at_most, bounds
from experiments.studies.gaussianity import figures as draw
from experiments.studies.gaussianity.analysis import THEORY
from experiments.studies.gaussianity.figures import NAMED
from experiments.studies.gaussianity.settings import (
    BANDS,
    COEFFICIENTS,
    COVARIANCE,
    DENOISER,
    DIFFERENCE,
    PUBLISHED,
    REVERSED,
    SCORE,
    WHITE,
    GaussianityConfig,
)  # fmt: skip

MOST, TOLERANCE = 0.9, 0.05  # share that counts as most of the variance; loss up to which a band counts as one mode
SOURCES = {
    "untrained": (
        "untrained network",
        "The same architecture with random weights, at the network's own noised samples.",
    ),
    "exact": ("exact denoiser", "Of the Gaussian itself, at its noised draws, through the same code."),
}


def page(measured: Measured[GaussianityConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures = {"whole": partial(draw.figure_whole, analysis), "bands": partial(draw.figure_bands, analysis)}
    return Page(section(measured, analysis), figures)


def most_is_gaussian(analysis: xr.Dataset) -> Claim:
    """Claim: the covariance of the data explains nine tenths of the denoiser at each of the published noise levels."""
    value = analysis.worst_claimed.sel(source="network").values
    title = "One Gaussian explains nine tenths of the denoiser at every noise level"
    measure = "smallest share of the denoiser's variance explained, over the published noise levels"
    if not analysis.attrs["published"]:
        return Claim(0, title, "not tested", measure, None, None, "The run has none of the published noise levels.")
    where = float(analysis.worst_noise.sel(source="network"))
    at = analysis.whole.sel(quantity=DENOISER, source="network").sel(noise=where, method="nearest")
    controls = [_control(analysis, "worst_claimed", name, above, MOST) for name in SOURCES]
    for gaussian in (WHITE, REVERSED):
        found = at.sel(gaussian=gaussian).values
        also = above(bounds(found), MOST) == "holds"
        text = "In place of the data's covariance, at that noise level, with 95 %."
        controls.append(Control(NAMED[gaussian], float(found[0]), bounds(found), also, text))
    return Claim(
        0,
        title,
        above(bounds(value), MOST),
        measure,
        float(value[0]),
        bounds(value),
        f"The smallest share is that at {number(where, 1)} standard deviations of the data. Wang & Vastola report at "
        f"least {min(pair[1] for pair in PUBLISHED.values()):.3f} for theirs.",
        controls,
        analysis.attrs["claim_level"],
    )


def one_mode(analysis: xr.Dataset) -> Claim:
    """Claim: where a band commits, one variance in each band explains as much as the covariance does."""
    value, names = analysis.lost_claimed.sel(source="network").values, band_names(analysis)
    band = int(analysis.lost_band.sel(source="network"))
    theory = analysis.lost.sel(source=THEORY).values[band, 0]
    control = _control(analysis, "lost_claimed", "exact", at_most, TOLERANCE)
    text = (
        "An exact denoiser of the data's covariance in the same band, by closed form: the loss of the data themselves."
    )
    return Claim(
        0,
        "A band is one Gaussian mode",
        at_most(bounds(value), TOLERANCE),
        f"share of the denoiser's variance lost by one variance in each band, where the band commits, {names[band]}",
        float(value[0]),
        bounds(value),
        "The band above DC that loses most, at the noise level nearest to its standard deviation; the interval is that "
        f"of the largest loss, whichever band has it. Up to {TOLERANCE:g} counts as none.",
        [control, Control("theory", float(theory), None, None, text)],
        analysis.attrs["claim_level"],
    )


def _control(analysis: xr.Dataset, name: str, source: str, verdict, limit: float) -> Control:
    found = analysis[name].sel(source=source).values
    named, text = SOURCES[source]
    also = verdict(bounds(found), limit) == "holds" if source == "untrained" else None
    return Control(named, float(found[0]), bounds(found), also, text)


def section(measured: Measured[GaussianityConfig], analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings = measured.config
    most, mode = most_is_gaussian(analysis), one_mode(analysis)
    whole = analysis.whole.sel(source="network", gaussian=COVARIANCE).values[..., 0]
    exact = settings.images is not None
    limits = [
        "Noised samples of a network are not noised photographs; what the network does at states that it never makes "
        "is not seen." + (" The table of sources has both." if exact else ""),
        "The score is explained at high noise by any Gaussian, since the state itself is nearly all of it; the rows of "
        "the controls say how much that is.",
        "Beside the published numbers stands the same noise in units of each data set's standard deviation. "
        "Photographs of 16 x 16 pixels are not those of 32 x 32: at equal noise in a pixel, a feature of the image has "
        "a fourth of the signal to noise here, 1.39 nats less. Half the noise makes up for it.",
    ]
    if not exact:
        limits.append(
            "The covariance is rebuilt from what the model folder holds: its leading principal components, and for the "
            "rest the covariance of channels in each DCT coefficient. The true one explains at least about as much."
        )
    return Section(
        title=f"Gaussianity: {measured.subject_name}",
        question="How much of the variance of a network's denoiser and score does the exact denoiser of one Gaussian "
        "with the data's mean and covariance explain, by noise level and band? And if each band had one variance?",
        answer=f"The covariance explains {number(whole[0].min(), 3)} to {number(whole[0].max(), 3)} of the denoiser's "
        f"variance and {number(whole[1].min(), 3)} to {number(whole[1].max(), 3)} of the score's; where a band above "
        "DC commits, one variance in each band loses up to "
        f"{formatted(analysis.lost_claimed.sel(source='network').values)} of the denoiser's.",
        claims=[most, mode],
        tables=[
            _published_table(analysis),
            _gaussian_table(analysis),
            _band_table(analysis),
            _noise_table(analysis, DENOISER),
            _noise_table(analysis, SCORE),
            _source_table(analysis),
        ],
        captions={
            "whole": "Share of the variance explained by the exact denoiser of each Gaussian, over all coefficients, "
            "with 95 % intervals. Crosses: published, for another network on photographs of 32 x 32 pixels.",
            "bands": "The same by band, of the denoiser. Dashed: an exact denoiser of the data's covariance in the "
            "network's place, by closed form. Values below the axis are left out.",
        },
        methods=[
            f"{settings.pairs} pairs of the network's own samples ({settings.steps} steps of {settings.sampler}) are "
            "noised to the given levels, the nearest on which the network was trained, and denoised once by the "
            "network and by the exact denoiser of each Gaussian. Both replicas of a pair have the same class, which "
            "has its own mean and shares the covariance within classes.",
            "Explained is 1 − E|D − G|² / Var D, with D the network's prediction and G the Gaussian's. The numerator "
            "counts wrong means. The variance is that within the class, half of the mean square between the replicas "
            "of a pair, which holds no mean. For the score, D less the state stands in the place of D.",
        ],
        limits=limits,
    )


def _published_table(analysis: xr.Dataset) -> Table:
    rows = []
    for level, (score, denoiser) in PUBLISHED.items():
        if not np.isclose(analysis.noise.values, level).any():
            continue
        at = analysis.whole.sel(source="network", gaussian=COVARIANCE).sel(noise=level, method="nearest")
        row = [number(level / 2, 1), number(level, 1), number(float(at.noise_ell)), number(denoiser, 3)]
        row += [formatted(at.sel(quantity=DENOISER).values, 3), number(score, 4)]
        row += [formatted(at.sel(quantity=SCORE).values, 4)]
        half = np.isclose(analysis.noise.values, level / 2)
        for quantity, digits in ((DENOISER, 3), (SCORE, 4)):
            other = analysis.whole.sel(source="network", gaussian=COVARIANCE, quantity=quantity).values
            row.append(formatted(other[half][0], digits) if half.any() else NOTHING)
        rows.append(row)
    head = ["σ, data in [−1, 1]", "over the data's standard deviation", "log-SNR, nats", "denoiser, published"]
    head += ["network", "score, published", "network", "denoiser at half the noise", "score at half the noise"]
    note = (
        "Published: Wang & Vastola, CIFAR-10 of 32 x 32 pixels, of standard deviation one half. Half the noise gives "
    )
    note += "a feature of the image here the signal to noise that it has there."
    return Table("Beside the published numbers", head, rows, note)


def _gaussian_table(analysis: xr.Dataset) -> Table:
    rows = []
    for quantity in (DENOISER, SCORE, DIFFERENCE):
        for gaussian, name in NAMED.items():
            at = analysis.whole.sel(source="network", quantity=quantity, gaussian=gaussian).values
            rows.append([quantity, name, *(formatted(each, 3) for each in at)])
    head = ["of", "Gaussian", *(f"σ = {each:g}" for each in analysis.noise.values)]
    return Table("Share explained by each Gaussian, all bands", head, rows)


def _band_table(analysis: xr.Dataset) -> Table:
    rows, network = [], analysis.own.sel(source="network")
    for band, name in enumerate(band_names(analysis)):
        rows.append(
            [
                name,
                f"{float(analysis.band_variance[band]):.3g}",
                f"{float(analysis.own_noise[band]):g}",
                *(formatted(network.sel(gaussian=g).values[band]) for g in (COVARIANCE, COEFFICIENTS, BANDS)),
                formatted(analysis.lost.sel(source="network").values[band]),
                number(float(analysis.lost.sel(source=THEORY)[band, 0])),
                formatted(analysis.own.sel(source="untrained", gaussian=COVARIANCE).values[band]),
            ]
        )
    head = ["band", "variance of the data", "σ", *(NAMED[g] for g in (COVARIANCE, COEFFICIENTS, BANDS))]
    head += ["lost by one variance", "lost by an exact denoiser of the data", "untrained, covariance"]
    note = "Share of the denoiser's variance explained, at the noise level nearest to the band's standard deviation."
    return Table("Where each band commits", head, rows, note)


def _noise_table(analysis: xr.Dataset, quantity: str) -> Table:
    at = analysis.explained.sel(source="network", gaussian=COVARIANCE, quantity=quantity).values
    rows = [[name, *(formatted(each, 3) for each in at[:, b])] for b, name in enumerate(band_names(analysis))]
    head = ["band", *(f"σ = {each:g}" for each in analysis.noise.values)]
    return Table(f"Share of the {quantity} explained by the covariance, by band", head, rows)


def _source_table(analysis: xr.Dataset) -> Table:
    rows = []
    for source in analysis.source.values:
        for quantity in (DENOISER, SCORE):
            at = analysis.whole.sel(source=source, quantity=quantity, gaussian=COVARIANCE).values
            rows.append([str(source), quantity, *(formatted(each, 3) for each in at)])
    head = ["source", "of", *(f"σ = {each:g}" for each in analysis.noise.values)]
    return Table("Share explained by the covariance, all bands, by source", head, rows)
