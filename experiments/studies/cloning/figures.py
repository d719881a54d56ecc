"""Figures of the cloning study."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import (
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
from experiments.studies.cloning.settings import CONTRASTS, MEASURES

COLORS = {"q": "#0072B2", "clones": "#D55E00", "mmse": "#009E73"}
TOLERANCE = 0.05  # root mean square, in units of a correlation
PARTS = {
    "states": ("the sampler's states are not its noised ends", "#CC79A7"),
    "calibration": ("predictions vary too much or too little", "#E69F00"),
    "offset": ("offset of the predictions' mean", QUIET),
}


def figure_curves(analysis: xr.Dataset) -> Figure:
    """The three curves in one panel per band."""
    bands = analysis.sizes["band"]
    figure, axes = new_figure(7.4, 1.75 * -(-(bands + 1) // 4), -(-(bands + 1) // 4), 4, sharex=True, sharey=True)
    panels = axes.ravel()
    first = float(analysis.branch_ell[0]) - 1
    shown = analysis.ell.values >= first
    ell = analysis.ell.values[shown]
    for band, (ax, name) in enumerate(zip(panels, band_names(analysis), strict=False)):
        for which, style in (("q", "--"), ("mmse", ":")):
            values = analysis[f"network_{which}"].values[shown, band]
            ax.fill_between(ell, values[:, 1], values[:, 2], color=COLORS[which], alpha=0.2, linewidth=0)
            ax.plot(ell, values[:, 0], color=COLORS[which], label=MEASURES[which])
            theory = analysis[f"network_steps_{which}"].values[shown, band]
            ax.plot(ell, theory, color=INK, linestyle=style, linewidth=0.9, label=f"{MEASURES[which]}, exact Gaussian")
        values = analysis.network_clones.values[:, band]
        ax.vlines(analysis.branch_ell, values[:, 1], values[:, 2], color=COLORS["clones"], linewidth=1.2)
        ax.plot(analysis.branch_ell, values[:, 0], "o", ms=3.5, color=COLORS["clones"], label=MEASURES["clones"])
        ax.set_title(name)
    panels[0].set_ylim(-0.1, 1.1)
    panels[0].set_xlim(first, ell[-1])
    handles, labels = panels[0].get_legend_handles_labels()
    for ax in panels[bands:]:
        ax.axis("off")
    panels[-1].legend(handles, labels, loc="center", fontsize=8)
    figure.supxlabel(LEVEL_LABEL, fontsize=9)
    figure.supylabel("share decided", fontsize=9)
    return figure


def figure_differences(analysis: xr.Dataset) -> Figure:
    """Differences beyond what finite steps cost, for the network and the exact denoiser."""
    figure, axes = new_figure(7.4, 4.2, 2, 3, sharex=True, sharey=True)
    names = band_names(analysis)
    shift = np.linspace(-0.3, 0.3, len(names))
    for source, row in zip(("network", "exact"), axes, strict=True):
        for index, ((a, b), ax) in enumerate(zip(CONTRASTS, row, strict=True)):
            ax.axhspan(-TOLERANCE, TOLERANCE, color=FAINT, alpha=0.5, linewidth=0)
            ax.axhline(0, color=INK, linewidth=0.6)
            for band, color in enumerate(band_colors(analysis)):
                values = analysis[f"{source}_beyond"].values[index, :, band]
                at = analysis.branch_ell.values + shift[band]
                ax.vlines(at, values[:, 1], values[:, 2], color=color, linewidth=1)
                ax.plot(at, values[:, 0], "o", ms=2.8, color=color, label=names[band])
            if source == "network":
                ax.set_title(f"{MEASURES[a]}  minus  {MEASURES[b]}", fontsize=8.5)
        row[0].set_ylabel("network" if source == "network" else "exact Gaussian")
    figure.supxlabel(LEVEL_LABEL, fontsize=9)
    band_legend(figure, axes[0, 0], "")
    return figure


def figure_reasons(analysis: xr.Dataset) -> Figure:
    """Parts of 1 - mmse/Var - Q, and the distance from the best linear filter."""
    figure, (left, right) = new_figure(7.4, 3.6, 1, 2)
    level = analysis.branch_ell.values
    for index, (label, color) in enumerate(PARTS.values()):
        values = analysis.network_parts.values[index]
        curve(left, level, values, color, label, shade=0.2, marker="o", markersize=3.5)
    left.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), fontsize=8)
    left.set_ylabel("part of 1 − mmse/Var minus Q")
    for band, (name, color) in enumerate(zip(band_names(analysis), band_colors(analysis), strict=True)):
        values = analysis.network_excess.values[1, :, band]
        curve(right, level, values, color, name, marker="o", markersize=3.5)
    right.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8)
    right.set_ylabel("1 − mmse/Var minus linear filter")
    for ax in (left, right):
        ax.axhline(0, color=INK, linewidth=0.6)
        ax.set_xlabel(LEVEL_LABEL)
    return figure
