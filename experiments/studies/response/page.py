"""Figures and text of the response study."""

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import band_names
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, number, percent, power
from experiments.frame.verdict import Claim, Control, at_most, bounds
from experiments.studies.response import figures as draw
from experiments.studies.response.settings import ResponseConfig

SOURCES = {"network": "network", "wiener": "Wiener denoiser", "untrained": "untrained network"}


def page(measured: Measured[ResponseConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    network = analysis.sel(source="network")
    figures: dict[str, Callable[[], Figure]] = {
        "rates": partial(draw.figure_rates, network),
        "departures": partial(draw.figure_departures, analysis),
        "between": partial(draw.figure_between, network),
        "directions": partial(draw.figure_directions, analysis),
    }
    return Page(section(measured, analysis), figures)


def section(measured: Measured[ResponseConfig], analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    network = analysis.sel(source="network")
    pairs, vectors, steps = measured.config.pairs, network.sizes["vector"], measured.config.steps
    exact = analysis.sel(source="wiener")
    deviation, stretch = (power(analysis.attrs[name]) for name in ("rate_deviation", "stretch_deviation"))
    kept = exact.variance[:, 0] / network.variance[:, 0]
    return Section(
        title=f"Linear response: {measured.subject_name}",
        question="How does a small difference between two states grow or shrink along the reverse flow, by band and in "
        "the directions that are stretched most? Does it do so as under a Gaussian law of the same spectrum?",
        answer=_answer(network),
        claims=[never_grows(analysis)],
        tables=_tables(analysis),
        captions={
            "rates": "Growth rate of a difference drawn at random from each band, along the flow. Beside it: rates of "
            "Gaussian laws with the variance of the band (dashed) and with its covariance of channels (dotted), and "
            "mmse / σ² − 1 (dots), the mean rate of any exact posterior mean. Vertical line: SNR = 1. A rate of −1 "
            "means that the denoised image does not respond to the difference; a rate of 0 means that it takes the "
            "whole difference over.",
            "departures": "Left: rate of the network minus that of the Gaussian law with the covariance of channels; "
            "above 0 the network responds more. Right: rate at noised ends minus the one that the mean square error "
            "there implies; 0 for a posterior mean. Grey: the same for the Wiener denoiser, which shows the effect of "
            "finite steps and few pairs.",
            "between": "Left: share of the energy of the denoiser's response that lies outside the band of the "
            "difference; 0 for a stationary Gaussian law. Right: antisymmetric part of the derivative "
            "over its symmetric part; 0 for any posterior mean. Black: of the whole derivative.",
            "directions": f"Left: growth of the {vectors} leading directions in each step of the window, network "
            "(solid) and the leading modes of a Gaussian law with the network's covariance of channels (dashed; some "
            "coincide). Right: share of every band in the directions at the end, for the network (left bar of each "
            "two) and for the Wiener denoiser through the same code (right bar).",
        },
        methods=[
            f"{pairs} uncoupled pairs under DDIM, {steps} steps, both replicas, in the rescaled frame y = "
            "x / sqrt(alpha_bar), in which the flow is dy / d ln(1/σ) = D(y) − y. At "
            f"{network.sizes['level']} steps, two differences of white noise in every band are pushed through the "
            "denoiser's derivative J = dD/dy. The rate is the projection of J applied to a difference on that "
            "difference, relative to its square, minus 1. The Gaussian laws have the variances of the pairs' "
            "differences at the end, by band, or by band and channel.",
            "For a posterior mean, J is the posterior's covariance over σ². It is symmetric, and its rates are −1 or "
            "more. Their mean in every band is mmse / σ² − 1, which is at most that of a Gaussian law of equal "
            "covariance. The error is measured by noising the run's own ends once, and the derivative is probed there, "
            "too.",
            f"{vectors} random directions at the start of the window are taken to the end by the derivatives of the "
            "DDIM steps, back by the transposed ones, and to the end again. They are made orthonormal after every "
            "step. This is one round of power iteration towards the directions that are stretched most. Their growth "
            "in a step is the log of the factor by which the last passage stretches them there, divided by the step in "
            "ln(1/σ). The last step goes to the clean end, infinitely far in ln(1/σ), so it counts in the stretch "
            "only. Under the posterior mean of a Gaussian law, or of any log-concave law, no difference grows. Near "
            "the middle between two clusters, differences along the line that joins them do grow.",
            "The Wiener denoiser with the network's band variances runs through the same code, and its closed form is "
            f"known. Its rates deviate from that by at most {deviation}. The log of its first direction's stretch, "
            f"which follows from the bands of that direction at the start, deviates by at most {stretch}.",
        ],
        limits=[
            "Intervals come from resampling pairs; nominal 95 % intervals from so few pairs cover about 85 to 90 %."
            if pairs < 64
            else "Intervals come from resampling pairs; they speak for this network, not for one trained again.",
            "The flow's ends stand in for the data, but finite steps shrink them. By band, the ends of the Wiener "
            f"denoiser have {float(kept.min()):.2f} to {float(kept.max()):.2f} of the variance that it was made for; "
            "this includes sampling error. Smaller variances lower the rates of the Gaussian laws, so a network whose "
            "rate is below them is even further below a law of the data's own covariance.",
            "The Gaussian laws have one covariance for all classes and all coefficients of a band. Where these differ, "
            "the mean rate of Gaussian laws is lower than that of their mean.",
            "In bands that are nearly all noise the response is small, and shares of it mean little.",
            "Where a leading direction grows in a step, some difference grows there. Where none does, some other "
            "difference may still grow: the directions are chosen for the whole window.",
        ],
    )


def never_grows(analysis: xr.Dataset) -> Claim:
    """The claim of the Gaussian theory that a small difference never grows.

    The measure is the largest growth rate of a trajectory over the leading directions and the steps of the window,
    averaged over trajectories. The claim holds if the interval of that mean lies wholly at or below 0, does not hold if
    it lies wholly above, and is undecided in between.
    """
    values = {name: analysis.largest.sel(source=name).values for name in SOURCES}
    network = analysis.sel(source="network")
    texts = {
        "wiener": "Exact denoiser of a Gaussian law with the network's band variances: nothing can grow.",
        "untrained": "The same architecture with random weights: growth there says nothing about data.",
    }
    return Claim(
        0,
        "A small difference never grows in the rescaled frame",
        at_most(values["network"][1:]),
        "largest growth rate per nat of ln(1/σ) of a leading direction in a step, mean over trajectories",
        float(values["network"][0]),
        bounds(values["network"]),
        f"The largest rate is reached at a log-SNR of {formatted(network.largest_level)} nats on average; "
        f"{percent(network.growing)} of the trajectories have a step in which a direction grows.",
        [
            Control(
                SOURCES[name],
                float(values[name][0]),
                bounds(values[name]),
                at_most(values[name][1:]) == "holds",
                text,
            )
            for name, text in texts.items()
        ],
    )


def _half(network: xr.Dataset) -> np.ndarray:
    """Index of the level nearest to SNR = 1 of every band, at which the Gaussian rate is -1/2."""
    wanted = -np.log(network.variance[:, 0].values)
    return np.abs(network.level_ell.values[:, None] - wanted).argmin(0)


def _answer(network: xr.Dataset) -> str:
    above = network.above_channels.values
    low, high = (float(above[..., 0].flat[pick(above[..., 0])]) for pick in (np.argmin, np.argmax))
    below, over = np.mean(above[..., 2] < 0), np.mean(above[..., 1] > 0)
    return (
        f"The rate minus that of a Gaussian law of the same covariance lies between {number(low)} and {number(high)} "
        f"over bands and levels. The interval of this difference is wholly below 0 in {100 * below:.0f} % of bands and "
        f"levels, and wholly above in {100 * over:.0f} %. The window changes the log of the leading direction's length "
        f"by {formatted(network.total[0])} (Gaussian law: {formatted(network.total_gaussian[0])}); the largest growth "
        f"rate in a step is {formatted(network.largest)} per nat."
    )


def _tables(analysis: xr.Dataset) -> list[Table]:
    network, names = analysis.sel(source="network"), band_names(analysis)
    rows = []
    for band, level in enumerate(_half(network)):
        at = network.isel(level=level, band=band)
        cells = [at.rate, at.rate_gaussian, at.rate_channels, at.above_channels, at.rate_noised, at.rate_error]
        cells += [at.above_error, at.leaves, network.asymmetry[level, band]]
        rows.append([names[band], number(float(at.level_ell), 1), *(formatted(cell) for cell in cells)])
    head = ["band", "log-SNR", "rate", "Gaussian, one variance", "Gaussian, channels", "rate minus Gaussian, channels"]
    head += ["rate at noised ends", "mmse / σ² − 1 there", "rate there minus that", "share outside the band"]
    head.append("asymmetry")
    rates = Table(
        "Growth rates where each band is half decided",
        head,
        rows,
        "At the probed level nearest to SNR = 1. Asymmetry: antisymmetric over symmetric part of J in the band. At any "
        f"level, at most {100 * float(network.negative[..., 0].max()):.0f} % of a band's probes have a rate below −1, "
        "which no posterior mean has.",
    )
    rows = []
    for vector in network.vector.values:
        row = [str(int(vector) + 1)]
        for name in SOURCES:
            at = analysis.sel(source=name, vector=vector)
            row += [formatted(at.total), formatted(at.exponent)]
            if name == "network":
                content = at.content[-1]
                first = int(content.values[:, 0].argmax())
                row.append(f"{names[first]}: {formatted(content[first])}")
                row.append(formatted(at.total_gaussian))
        rows.append(row)
    head = ["direction", "stretch", "rate", "largest band at the end", "Gaussian law"]
    head += [f"{what}, {name}" for name in ("Wiener", "untrained") for what in ("stretch", "rate")]
    note = "Stretch: log of the factor by which the window changes the length. "
    note += "Rate: per nat of ln(1/σ), without the last step. "
    note += "Gaussian law: stretch of the leading modes under the law with the network's covariance of channels."
    return [rates, Table("Leading directions", head, rows, note)]
