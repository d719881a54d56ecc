"""Figures of the mechanism study."""

from functools import partial

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.frame import drawing
from experiments.frame.drawing import (
    COUPLING_LABEL,
    FAINT,
    INK,
    LEVEL_LABEL,
    QUIET,
    band_colors,
    band_names,
    coupling_axis,
    new_figure,
)
from experiments.frame.gates import COMMON
from ou_theory.attention import common_gain, rho

curve = partial(drawing.curve, marker="o", markersize=3.5)

PART_COLORS = {"routing": "#0072B2", "key": "#009E73", "query": "#D55E00"}
ORIGIN_COLORS = {"embedding": "#8a8f99", "attention": "#0072B2", "mlp": "#E69F00"}
SOURCES = {"network": "network", "untrained": "untrained network", "random": "untrained, adaLN gates open"}
PANELS = 4  # couplings that are drawn side by side, at most
TOKEN_RADIUS = "radial frequency of the token grid"


def _coupling_colors(analysis: xr.Dataset) -> list:
    return list(matplotlib.colormaps["plasma"](np.linspace(0, 0.8, analysis.sizes["coupling"])))


def figure_gain(analysis: xr.Dataset, patch: int) -> Figure:
    """End-to-end gain by band, and by level at the strongest coupling."""
    figure, (left, right) = new_figure(7.2, 3.5, 1, 2, sharey=True)
    for i, (g, color) in enumerate(zip(analysis.coupling.values, _coupling_colors(analysis), strict=True)):
        if g > 0:
            curve(left, analysis.radius, analysis.network_gain[i].values, color, f"$g$ = {g:g}")
    for source, style in (("untrained", "-"), ("random", "-.")):
        values, name = analysis[f"{source}_gain"][-1].values, SOURCES[source]
        curve(left, analysis.radius, values, QUIET, name, marker=None, linestyle=style)
    left.axvline(1 / patch, ymax=0.66, color=INK, linestyle="--", linewidth=0.9)  # below the legend
    left.set_xlabel("radial frequency, fraction of Nyquist")
    left.set_ylabel("one-pass gain")
    left.set_title("By band, levels pooled")
    left.legend(loc="upper left", fontsize=7.5)
    for band, (name, color) in enumerate(zip(band_names(analysis), band_colors(analysis), strict=True)):
        values = analysis.network_gain_level[-1, :, band].values
        curve(right, analysis.level_ell, values, color, name)
    right.set_xlabel(LEVEL_LABEL)
    right.set_title(f"By level, $g$ = {float(analysis.coupling[-1]):g}")
    right.legend(loc="upper right", fontsize=7.5)
    for ax in (left, right):
        ax.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
        ax.set_ylim(bottom=0)
    return figure


def figure_parts(analysis: xr.Dataset) -> Figure:
    """Shares by token band, a panel per coupling."""
    chosen = np.unique(np.linspace(0, analysis.sizes["coupling"] - 1, PANELS).round().astype(int))
    figure, axes = new_figure(7.2, 2.9, 1, len(chosen), sharey=True, squeeze=False)
    for ax, i in zip(axes[0], chosen, strict=True):
        for part, color in PART_COLORS.items():
            curve(ax, analysis.token_radius, analysis.network_share[i].sel(part=part).values, color, part)
        ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
        ax.set_title(f"$g$ = {float(analysis.coupling[i]):g}")
    axes[0][0].set_ylabel("share of the difference")
    figure.supxlabel(TOKEN_RADIUS, fontsize=9)
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=3)
    return figure


def figure_first_order(analysis: xr.Dataset) -> Figure:
    """Sizes of the parts against the coupling, and the first-order error by level."""
    figure, (left, right) = new_figure(7.2, 3.3, 1, 2)
    grid = analysis.coupling.values
    fine = np.linspace(0, grid[-1], 200)
    kind = analysis.attrs.get("gate_kind", "joint")
    left.plot(fine, rho(fine, kind), color=INK, linestyle="--", linewidth=1.1, label="ρ(g)")
    left.plot(fine, common_gain(fine, kind), color=INK, linestyle=":", linewidth=1.1, label=COMMON[kind])
    for shift, (part, color) in zip((-0.012, 0.0, 0.012), PART_COLORS.items(), strict=True):
        values = analysis.network_part_gain_all.sel(part=part).values
        left.vlines(grid + shift, values[:, 1], values[:, 2], color=color, linewidth=1.2)
        left.plot(grid + shift, values[:, 0], color=color, marker="o", markersize=4, linestyle="none", label=part)
    left.set_xlabel(COUPLING_LABEL)
    left.set_ylabel("size relative to $g$ = 0")
    left.set_title("Parts, same q, k, v")
    left.legend(fontsize=7.5)
    coupling_axis(left, grid)
    for i, (g, color) in enumerate(zip(grid, _coupling_colors(analysis), strict=True)):
        curve(right, analysis.level_ell, analysis.network_first_order_level[i].values, color, f"$g$ = {g:g}")
    right.set_ylim(0, 1.35 * right.get_ylim()[1])
    right.set_xlabel(LEVEL_LABEL)
    right.set_ylabel("relative error")
    right.set_title("First order against exact")
    right.legend(loc="upper left", ncols=2)
    return figure


def figure_layers(analysis: xr.Dataset) -> Figure:
    """Shares by layer without and with the strongest coupling."""
    figure, axes = new_figure(7.2, 2.9, 1, 2, sharey=True)
    for ax, i in zip(axes, (0, -1), strict=True):
        for part, color in PART_COLORS.items():
            curve(ax, analysis.layer, analysis.network_share_layer[i].sel(part=part).values, color, part)
        ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
        ax.set_title(f"$g$ = {float(analysis.coupling[i]):g}")
        ax.set_xlabel("layer")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("share of the difference")
    axes[0].legend()
    return figure


def figure_stream(analysis: xr.Dataset) -> Figure:
    """The gain of the stream by layer, and the origins of its final difference."""
    figure, (left, right) = new_figure(7.2, 3.5, 1, 2)
    bands = analysis.sizes["token_band"]
    for band, color in enumerate(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, bands))):
        radius = float(analysis.token_radius[band])
        name = "DC" if radius == 0 else f"r = {radius:.2f}"
        curve(left, analysis.stage, analysis.network_stream_gain[-1, :, band].values, color, name, marker=None)
    left.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
    left.set_xlabel("after block")
    left.set_ylabel("gain of the stream's difference")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=7.5, ncols=2)
    for origin, color in ORIGIN_COLORS.items():
        at = analysis.network_origin_share.sel(origin=origin)
        curve(right, analysis.token_radius, at[-1].values, color, "MLPs" if origin == "mlp" else origin)
        curve(right, analysis.token_radius, at[0].values, color, markerfacecolor="white", linewidth=0.9)
    right.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    right.set_ylim(top=right.get_ylim()[1] + 0.25 * np.ptp(right.get_ylim()))  # room for the legend
    right.set_xlabel(TOKEN_RADIUS)
    right.set_ylabel("share of the final difference")
    right.legend(loc="upper right")
    return figure


def figure_heads(analysis: xr.Dataset) -> Figure:
    """Maps over layers and heads at the strongest coupling."""
    layers, heads = analysis.sizes["layer"], analysis.sizes["head"]
    figure, axes = new_figure(7.2, 1.6 + 0.2 * layers, 1, 2, sharey=True)
    last = analysis.isel(coupling=-1, bound=0)
    kept, sync = last.network_head_gain.values, 100 * last.network_head_sync.values
    most = max(float(np.nanmax(np.abs(sync), initial=0.0)), 1e-12)
    maps = ((kept, "viridis", 0.0, max(1.0, float(np.nanmax(kept, initial=0.0)))), (sync, "RdBu", -most, most))
    titles = ("Output difference, relative to no coupling", "Change of the square, %")
    for ax, (values, colors, low, high), title in zip(axes, maps, titles, strict=True):
        image = ax.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto", origin="lower")
        figure.colorbar(image, ax=ax, pad=0.02)
        ax.set_title(title)
        ax.set_xlabel("head")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(heads, 8)))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("layer")
    return figure
