"""Figures of the release study."""

import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.frame.drawing import FAINT, INK, QUIET, band_colors, band_legend, band_names, curve, new_figure
from experiments.studies.release.analysis import GAIN, OF_DATA
from experiments.studies.release.settings import COUPLED_FIRST, FREE_FIRST

RELEASE_LABEL = "log-SNR at which the phases change (nats)"
LEVEL_COLORS = {COUPLED_FIRST: "#0072B2", FREE_FIRST: "#D55E00"}


def exact_of(analysis: xr.Dataset) -> str:
    """The exact denoiser of the data that a run has beside its network."""
    return next(name for name in OF_DATA.values() if name in analysis.source.values)


def theories(analysis: xr.Dataset) -> tuple[tuple[str, str], ...]:
    """The recursions beside the network, each with its line."""
    return (exact_of(analysis), "--"), (GAIN, ":")


def figure_curves(analysis: xr.Dataset) -> Figure:
    """What still differs at the end, by the level of release, for both orders of the phases."""
    couplings = analysis.coupling.values
    figure, axes = new_figure(7.4, 3.1 * len(couplings) + 0.4, len(couplings), 2, squeeze=False, sharey="row")
    ell, names, colors = analysis.release_ell.values[1:], band_names(analysis), band_colors(analysis)
    for row, g in zip(axes, couplings, strict=True):
        for ax, order in zip(row, LEVEL_COLORS, strict=True):
            at = analysis.left.sel(coupling=g, order=order).isel(release=slice(1, None))
            ax.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
            for band, (name, color) in enumerate(zip(names, colors, strict=True)):
                curve(ax, ell, at.sel(source="network").values[:, band], color, name, marker="o", markersize=2.5)
                for source, style in theories(analysis):
                    ax.plot(ell, at.sel(source=source).values[:, band, 0], color=color, linestyle=style, linewidth=1)
            ax.set_title(f"{order}, g = {g:g}")
            ax.set_xlabel(RELEASE_LABEL)
        row[0].set_ylabel("final difference, energy over uncoupled")
    band_legend(figure, axes[0, 0], "")
    return figure


def figure_levels(analysis: xr.Dataset) -> Figure:
    """Levels of commitment by release, by band, beside the recursions and the uncoupled estimator."""
    couplings, radius = analysis.coupling.values, analysis.radius.values
    figure, axes = new_figure(3.7 * max(2, len(couplings)), 3.4, 1, max(2, len(couplings)), squeeze=False)
    for ax, g in zip(axes[0], couplings, strict=False):
        at = analysis.level.sel(coupling=g)
        for order, color in LEVEL_COLORS.items():
            curve(ax, radius, at.sel(source="network", order=order).values, color, order, marker="o", markersize=3.5)
            for source, style in theories(analysis):
                values = at.sel(source=source, order=order).values[:, 0]
                ax.plot(radius, values, color=color, linestyle=style, linewidth=1.2)
        curve(ax, radius, analysis.tau.values, QUIET, "uncoupled, aligned energy")
        ax.set_title(f"g = {g:g}")
        ax.set_xlabel("radial frequency of the band")
        ax.set_ylabel("level of commitment (nats)")
    for ax in axes[0, len(couplings) :]:
        _taken(ax, analysis)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _taken(ax: Axes, analysis: xr.Dataset) -> None:
    """What coupling takes from every band if it always acts."""
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    at, radius = analysis.taken.isel(coupling=0), analysis.radius.values
    curve(ax, radius, at.sel(source="network").values, INK, marker="o", markersize=3.5)
    for source, style in theories(analysis):
        ax.plot(radius, at.sel(source=source).values[:, 0], color=INK, linestyle=style, linewidth=1.2)
    ax.set_title("What coupling takes if it always acts")
    ax.set_xlabel("radial frequency of the band")
    ax.set_ylabel("share of the uncoupled energy")
