"""Figures of the response study."""

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from experiments.frame.drawing import (
    COLORS,
    FAINT,
    INK,
    LEVEL_LABEL,
    QUIET,
    band_colors,
    band_legend,
    band_names,
    curve,
    new_figure,
)

VECTOR_COLORS = COLORS[:6]
RATE = "growth rate per nat of $\\ln(1/\\sigma)$"


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
        ax.plot(ell, at.rate_channels[:, 0], color=INK, linestyle=":", linewidth=1.4, label="Gaussian, channels")
        curve(ax, ell, at.rate.values, colors[band], "network, flow")
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
        curve(ax, network.level_ell.values, network[name][:, band].values, color, label)
    ax.set_xlabel(LEVEL_LABEL)


def figure_departures(analysis: xr.Dataset) -> Figure:
    """The rate minus that of the Gaussian law, and minus the one that the error implies."""
    figure, axes = new_figure(7.2, 3.5, 1, 2)
    network, exact = (analysis.sel(source=name) for name in ("network", "wiener"))
    for ax, name in zip(axes, ("above_channels", "above_error"), strict=True):
        ax.plot(exact.level_ell, exact[name][..., 0], color=QUIET, linewidth=0.8, alpha=0.8)
        _by_band(ax, network, name)
    axes[0].set_ylabel("difference of rates")
    axes[0].set_title("network minus Gaussian law")
    axes[1].set_title("rate minus (mmse / σ² − 1), noised ends")
    axes[1].set_ylim(-0.55, 0.55)
    band_legend(figure, axes[0], "")
    return figure


def figure_between(network: xr.Dataset) -> Figure:
    """The share of the response outside the band, and how far the derivative is from symmetric."""
    figure, (left, right) = new_figure(7.2, 3.5, 1, 2)
    _by_band(left, network, "leaves")
    _by_band(right, network, "asymmetry")
    curve(right, network.level_ell.values, network.asymmetry.sel(part="all").values, INK, linewidth=2)
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
        curve(left, ell, analysis.local.sel(source="network", vector=vector).values, color, f"direction {vector + 1}")
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
