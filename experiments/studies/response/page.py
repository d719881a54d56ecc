"""Figures and text of the response study."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import ArrayLike

from experiments.frame.drawing import FAINT, INK, LEVEL_LABEL, QUIET, band_colors, band_legend, band_names, new_figure
from experiments.frame.page import Section, Table, estimate, finish
from experiments.frame.store import RunFolder
from experiments.studies.compare.claims import Claim, Control
from experiments.studies.compare.page import number

VECTOR_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
RATE = "growth rate per nat of $\\ln(1/\\sigma)$"
SOURCES = {"network": "network", "wiener": "Wiener denoiser", "untrained": "untrained network"}


def report(run: RunFolder, timings: dict[str, float] | None = None) -> Path:
    """Draws and writes what a run has stored; returns the path of its page."""
    analysis = run.load("analysis")
    network = analysis.sel(source="network")
    figures: dict[str, Callable[[], Figure]] = {
        "rates": partial(figure_rates, network),
        "departures": partial(figure_departures, analysis),
        "between": partial(figure_between, network),
        "directions": partial(figure_directions, analysis),
    }
    return finish(run, section(run.manifest, analysis), figures, timings)


def section(manifest: dict, analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings, network = manifest["settings"], analysis.sel(source="network")
    pairs, vectors, steps = settings["pairs"], network.sizes["vector"], settings["steps"]
    exact = analysis.sel(source="wiener")
    deviation, stretch = (_power(analysis.attrs[name]) for name in ("rate_deviation", "stretch_deviation"))
    kept = exact.variance[:, 0] / network.variance[:, 0]
    return Section(
        title=f"Linear response: {manifest['subject']}",
        question="How does a small difference between two states grow or shrink along the reverse flow, by band and in "
        "the directions that are stretched most, and is that what a Gaussian law of the same spectrum does?",
        answer=_answer(network),
        claims=[never_grows(analysis)],
        tables=_tables(analysis),
        captions={
            "rates": "Growth rate of a difference drawn at random from each band, along the flow, beside those of "
            "Gaussian laws with the variance of the band (dashed) and with its covariance of channels (dotted), and "
            "beside mmse / σ² − 1 (dots), the mean rate of any exact posterior mean. Vertical line: SNR = 1. At −1 the "
            "denoised image does not respond to the difference, at 0 it takes it over.",
            "departures": "Left: network less the Gaussian law with the covariance of channels; above 0 it responds "
            "more. Right: the rate at noised ends less what the mean square error there says, 0 for a posterior mean. "
            "Grey: the same of the Wiener denoiser, which shows what finite steps and few pairs do.",
            "between": "Left: share of the energy of the denoiser's response that lies in other bands than the "
            "difference it responds to; 0 for a stationary Gaussian law. Right: antisymmetric part of the derivative "
            "over its symmetric part, 0 for any posterior mean; black: of the whole derivative.",
            "directions": f"Left: growth of the {vectors} leading directions in each step of the window, network "
            "(solid) and the leading modes of a Gaussian law with the network's covariance of channels (dashed, some "
            "alike). Right: share of every band in the directions at the end, network (left of each two bars) and the "
            "Wiener denoiser through the same code (right).",
        },
        methods=[
            f"{pairs} uncoupled pairs under DDIM, {steps} steps, both replicas, in the rescaled frame y = "
            "x / sqrt(alpha_bar), in which the flow is dy / d ln(1/σ) = D(y) − y. At "
            f"{network.sizes['level']} steps, two differences of white noise in every band are pushed through the "
            "denoiser's derivative J = dD/dy; the rate is their share in themselves after J, less 1. The Gaussian "
            "laws have the variances that the pairs' differences end with, by band, or by band and channel.",
            "For a posterior mean J is the posterior's covariance over σ²: symmetric, with rates of −1 and more, and "
            "with a mean rate of mmse / σ² − 1 in every band, at most that of a Gaussian law of equal covariance. "
            "The error is measured by noising the run's own ends once, and the derivative is probed there, too.",
            f"{vectors} random directions at the start of the window are taken to the end by the derivatives of the "
            "DDIM steps, back by the transposed ones, and to the end again, orthonormal after every step: one round of "
            "power iteration towards what is stretched most. The log of what a step of the last passage makes of "
            "their lengths, over the step in ln(1/σ), is their growth. The last step goes to the clean end, "
            "infinitely far in ln(1/σ): it counts in the stretch only. Nothing grows under the posterior mean of a "
            "Gaussian, or of any log-concave law; near the middle between clusters, differences along their axis do.",
            "Control by closed form: the Wiener denoiser with the network's band variances runs through the same "
            f"code. None of its rates is off by more than {deviation}, and no log of the stretch of its first "
            f"direction, which follows from the bands that it has at the start, by more than {stretch}.",
        ],
        limits=[
            "Intervals come from resampling pairs; nominal 95 % intervals from so few cover less, about 85 to 90 %."
            if pairs < 64
            else "Intervals come from resampling pairs; they speak for this network, not for one trained again.",
            "The flow's ends stand in for the data, but finite steps shrink them: those of the Wiener denoiser have "
            f"{float(kept.min()):.2f} to {float(kept.max()):.2f} of the variance that it was made for, by band, luck "
            "of the pairs included. That lowers the Gaussian laws' rates, so that a network below them is below a law "
            "of the data's own covariance all the more.",
            "The Gaussian laws have one covariance for all classes and all coefficients of a band. Where these differ, "
            "the mean rate of Gaussian laws is lower than that of their mean.",
            "Where a band is nearly all noise its response is small, and shares of it speak of a small thing.",
            "A step in which a leading direction grows is a step in which some difference grows, but one that is 0 or "
            "below does not say that none does: the direction is chosen for the whole window.",
        ],
    )


def never_grows(analysis: xr.Dataset) -> Claim:
    """The Gaussian theory's claim, by the largest growth rate of a trajectory over the leading directions and the steps
    of the window, averaged over trajectories. It holds if the interval of that mean lies wholly at or below 0, does not
    hold if it lies wholly above, and is undecided in between.
    """
    values = {name: analysis.largest.sel(source=name).values for name in SOURCES}
    network = analysis.sel(source="network")
    texts = {
        "wiener": "Exact denoiser of a Gaussian law with the network's band variances: nothing can grow.",
        "untrained": "The same architecture with random weights: what grows there is no sign of what data are like.",
    }
    return Claim(
        0,
        "A small difference never grows in the rescaled frame",
        side(values["network"]),
        "largest growth rate per nat of ln(1/σ) of a leading direction in a step, mean over trajectories",
        float(values["network"][0]),
        [float(v) for v in values["network"][1:]],
        f"It is reached at a log-SNR of {estimate(network.largest_level)} nats on average; {_percent(network.growing)} "
        "of the trajectories have a step in which a direction grows.",
        [
            Control(
                SOURCES[name],
                float(values[name][0]),
                [float(v) for v in values[name][1:]],
                side(values[name]) == "holds",
                text,
            )
            for name, text in texts.items()
        ],
    )


def side(values: ArrayLike) -> str:
    """The verdict of `never_grows` from (estimate, low, high)."""
    _, low, high = np.asarray(values, np.float64)
    return "holds" if high <= 0 else "does not hold" if low > 0 else "undecided"


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def _percent(values: ArrayLike) -> str:
    return estimate(100 * np.asarray(values), 0).replace(" [", " % [", 1)


def _half(network: xr.Dataset) -> np.ndarray:
    """Index of the level nearest to SNR = 1 of every band, at which the Gaussian rate is -1/2."""
    wanted = -np.log(network.variance[:, 0].values)
    return np.abs(network.level_ell.values[:, None] - wanted).argmin(0)


def _answer(network: xr.Dataset) -> str:
    above = network.above_channels.values
    low, high = (float(above[..., 0].flat[pick(above[..., 0])]) for pick in (np.argmin, np.argmax))
    below, over = np.mean(above[..., 2] < 0), np.mean(above[..., 1] > 0)
    return (
        f"The rate less that of a Gaussian law of the same covariance goes from {number(low)} to {number(high)} over "
        f"bands and levels; its interval lies wholly below 0 in {100 * below:.0f} % of them, wholly above in "
        f"{100 * over:.0f} %. The window changes the log of the leading direction's length by "
        f"{estimate(network.total[0])} (Gaussian law: {estimate(network.total_gaussian[0])}); the largest growth rate "
        f"in a step is {estimate(network.largest)} per nat."
    )


def _tables(analysis: xr.Dataset) -> list[Table]:
    network, names = analysis.sel(source="network"), band_names(analysis)
    rows = []
    for band, level in enumerate(_half(network)):
        at = network.isel(level=level, band=band)
        cells = [at.rate, at.rate_gaussian, at.rate_channels, at.above_channels, at.rate_noised, at.rate_error]
        cells += [at.above_error, at.leaves, network.asymmetry[level, band]]
        rows.append([names[band], number(float(at.level_ell), 1), *(estimate(cell) for cell in cells)])
    head = ["band", "log-SNR", "rate", "Gaussian, one variance", "Gaussian, channels", "rate less that"]
    head += ["rate at noised ends", "mmse / σ² − 1 there", "difference", "leaves the band", "asymmetry"]
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
            row += [estimate(at.total), estimate(at.exponent)]
            if name == "network":
                content = at.content[-1]
                first = int(content.values[:, 0].argmax())
                row.append(f"{names[first]}: {estimate(content[first])}")
                row.append(estimate(at.total_gaussian))
        rows.append(row)
    head = ["direction", "stretch", "rate", "largest band at the end", "Gaussian law"]
    head += [f"{what}, {name}" for name in ("Wiener", "untrained") for what in ("stretch", "rate")]
    note = "Stretch: log of what the window makes of the length. Rate: per nat of ln(1/σ), without the last step. "
    note += "Gaussian law: stretch of the leading modes of that with the network's covariance of channels."
    return [rates, Table("Leading directions", head, rows, note)]


def _curve(ax: Axes, x: np.ndarray, values: np.ndarray, color, label: str | None = None, **style) -> None:
    """An estimate (X, 3) with its interval."""
    ax.fill_between(x, values[:, 1], values[:, 2], color=color, alpha=0.16, linewidth=0)
    ax.plot(x, values[:, 0], color=color, label=label, **style)


def figure_rates(network: xr.Dataset) -> Figure:
    """Growth rate against log-SNR, a panel per band, with the theories."""
    bands = network.sizes["band"]
    figure, axes = new_figure(7.2, 4.6, 2, (bands + 2) // 2, sharex=True, sharey=True)
    ell, colors = network.level_ell.values, band_colors(network)
    for band, (ax, name) in enumerate(zip(axes.flat, band_names(network), strict=False)):
        at = network.isel(band=band)
        for height in (-1, 0):
            ax.axhline(height, color=FAINT, linewidth=0.8, zorder=0)
        ax.axvline(-np.log(float(at.variance[0])), color=FAINT, linewidth=0.8, zorder=0)
        ax.plot(ell, at.rate_gaussian[:, 0], color=QUIET, linestyle="--", linewidth=1.2, label="Gaussian law")
        ax.plot(ell, at.rate_channels[:, 0], color=INK, linestyle=":", linewidth=1.4, label="same, channels")
        _curve(ax, ell, at.rate.values, colors[band], "network, flow")
        error = at.rate_error.values
        bars = np.abs(error[:, 1:] - error[:, :1]).T
        style = {"color": INK, "linestyle": "none", "marker": "o", "markersize": 2.6, "elinewidth": 0.8}
        ax.errorbar(ell, error[:, 0], bars, label="mmse / σ² − 1", **style)
        ax.set_title(name)
    axes[0][0].set_ylim(-1.12, 0.12)
    for ax in list(axes.flat)[bands:]:
        ax.set_axis_off()
    handles, labels = axes[0][0].get_legend_handles_labels()
    axes.flat[-1].legend(handles, labels, loc="center left")
    axes.flat[bands - axes.shape[1]].tick_params(labelbottom=True)
    figure.supxlabel(LEVEL_LABEL, fontsize=9)
    figure.supylabel(RATE, fontsize=9)
    return figure


def _by_band(ax: Axes, network: xr.Dataset, name: str) -> None:
    """A quantity (level, band, 3) against log-SNR, one curve per band."""
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    for band, (color, label) in enumerate(zip(band_colors(network), band_names(network), strict=True)):
        _curve(ax, network.level_ell.values, network[name][:, band].values, color, label)
    ax.set_xlabel(LEVEL_LABEL)


def figure_departures(analysis: xr.Dataset) -> Figure:
    """What the rate is above that of the Gaussian law, and above what the error says."""
    figure, axes = new_figure(7.2, 3.5, 1, 2)
    network, exact = (analysis.sel(source=name) for name in ("network", "wiener"))
    for ax, name in zip(axes, ("above_channels", "above_error"), strict=True):
        ax.plot(exact.level_ell, exact[name][..., 0], color=QUIET, linewidth=0.8, alpha=0.8)
        _by_band(ax, network, name)
    axes[0].set_ylabel("difference of rates")
    axes[0].set_title("network less Gaussian law")
    axes[1].set_title("rate less (mmse / σ² − 1), noised ends")
    axes[1].set_ylim(-0.55, 0.55)
    band_legend(figure, axes[0], "")
    return figure


def figure_between(network: xr.Dataset) -> Figure:
    """What leaves the band, and how far the derivative is from symmetric."""
    figure, (left, right) = new_figure(7.2, 3.5, 1, 2)
    _by_band(left, network, "leaves")
    _by_band(right, network, "asymmetry")
    _curve(right, network.level_ell.values, network.asymmetry.sel(part="all").values, INK, linewidth=2)
    left.set_ylim(0, 1)
    right.set_ylim(0, 1)
    left.set_title("share of the response outside the band")
    right.set_title("antisymmetric over symmetric part")
    band_legend(figure, left, "")
    return figure


def figure_directions(analysis: xr.Dataset) -> Figure:
    """Growth of the leading directions by step, and their bands at the end."""
    figure, (left, right) = new_figure(7.2, 3.6, 1, 2, width_ratios=(1.5, 1))
    left.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    vectors = analysis.vector.values
    ell = analysis.rated_ell.values
    for vector in vectors:
        color = VECTOR_COLORS[vector % len(VECTOR_COLORS)]
        _curve(left, ell, analysis.local.sel(source="network", vector=vector).values, color, f"direction {vector + 1}")
        theory = analysis.local_gaussian.sel(source="network", vector=vector)
        left.plot(ell, theory[:, 0], color=color, linestyle="--", linewidth=1, alpha=0.8)
    left.set_xlabel(LEVEL_LABEL)
    left.set_ylabel(RATE)
    left.legend(loc="lower right")
    for place, (name, alpha) in zip((vectors - 0.2, vectors + 0.2), (("network", 1), ("wiener", 0.55)), strict=True):
        content = analysis.content.sel(source=name).isel(point=-1, bound=0).values  # (vector, band)
        bottom = np.cumsum(content, -1) - content
        for band, color in enumerate(band_colors(analysis)):
            right.bar(place, content[:, band], 0.36, bottom[:, band], color=color, alpha=alpha)
    right.set_xticks(vectors, [str(v + 1) for v in vectors])
    right.set_xlabel("direction, at the end")
    right.set_ylabel("share of each band")
    right.set_ylim(0, 1)
    patches = [Patch(color=c, label=n) for c, n in zip(band_colors(analysis), band_names(analysis), strict=True)]
    figure.legend(handles=patches, loc="outside upper left", ncols=len(patches), handlelength=1, columnspacing=1.2)
    return figure
