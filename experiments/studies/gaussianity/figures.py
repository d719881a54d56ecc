"""Figures of the gaussianity study."""

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

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
from experiments.studies.gaussianity.settings import (
    BANDS,
    COEFFICIENTS,
    COVARIANCE,
    DENOISER,
    PUBLISHED,
    REVERSED,
    SCORE,
    WHITE,
)  # fmt: skip

NAMED = {
    COVARIANCE: "covariance of the data",
    COEFFICIENTS: "each DCT coefficient alone",
    BANDS: "one variance in each band",
    WHITE: "one variance for all modes",
    REVERSED: "spectrum turned round",
}


def figure_whole(analysis: xr.Dataset) -> Figure:
    """What each Gaussian explains of denoiser and score, by noise level, beside the published numbers."""
    figure, axes = new_figure(7.4, 3.6, 1, 2, sharey=True)
    ell = analysis.noise_ell.values
    for ax, quantity, column in zip(axes, (DENOISER, SCORE), (1, 0), strict=True):
        ax.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
        at = analysis.whole.sel(quantity=quantity)
        for (gaussian, name), color in zip(NAMED.items(), COLORS, strict=False):
            curve(ax, ell, at.sel(source="network", gaussian=gaussian).values, color, name, marker="o", markersize=3)
        ax.plot(
            ell, at.sel(source="untrained", gaussian=COVARIANCE).values[:, 0], color=QUIET, label="untrained network"
        )
        levels = -2 * np.log(list(PUBLISHED))
        shares = [pair[column] for pair in PUBLISHED.values()]
        ax.plot(levels, shares, "x", color=INK, markersize=6, label="Wang & Vastola, covariance of their data")
        ax.set_title(quantity)
        ax.set_xlabel(LEVEL_LABEL)
        ax.set_ylim(-0.2, 1.05)
    axes[0].set_ylabel("share of the variance explained")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def figure_bands(analysis: xr.Dataset) -> Figure:
    """What covariance and one variance in each band explain of the denoiser, by noise level and band."""
    figure, axes = new_figure(7.4, 3.6, 1, 2, sharey=True)
    ell, names, colors = analysis.noise_ell.values, band_names(analysis), band_colors(analysis)
    at = analysis.explained.sel(quantity=DENOISER)
    for ax, gaussian in zip(axes, (COVARIANCE, BANDS), strict=True):
        ax.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
        for band, (name, color) in enumerate(zip(names, colors, strict=True)):
            each = at.sel(gaussian=gaussian).isel(band=band)
            curve(ax, ell, each.sel(source="network").values, color, name, marker="o", markersize=2.5)
            ax.plot(ell, each.sel(source="exact, theory").values[:, 0], color=color, linestyle="--", linewidth=1)
        ax.set_title(NAMED[gaussian])
        ax.set_xlabel(LEVEL_LABEL)
        ax.set_ylim(-0.2, 1.05)
    axes[0].set_ylabel("share of the denoiser's variance explained")
    band_legend(figure, axes[0], "")
    return figure
