"""Figures of the depth study."""

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
from experiments.studies.depth.settings import LAST
from experiments.studies.depth.verdicts import READINGS, grid_of, known_gap
from ou_theory.estimator import HIGH_BAND, LOW_BAND

LOW_COLOR, HIGH_COLOR = "#0072B2", "#D55E00"
NORMALISED, QUIET_GREEN = "raw energies over the stream's own mean square", "#8fd0b8"


def figure_gap(analysis: xr.Dataset) -> Figure:
    """Gap by layer at no coupling, all readings."""
    figure, ax = new_figure(7.2, 4.0)
    layers = analysis.layer.values
    ax.axvspan((1 - LAST) * layers[-1], layers[-1], color=FAINT, alpha=0.45, linewidth=0, zorder=0)
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    curves = [("network", name, *READINGS[name]) for name in READINGS]
    curves.append(("network", "normalised", NORMALISED, QUIET_GREEN))
    curves.append(("untrained", "scaled", "readout with a fitted scalar, untrained", QUIET))
    for source, name, label, color in curves:
        if f"{source}_{name}_gap" in analysis:
            at = known_gap(analysis, source, name)
            curve(ax, layers, at, color, label, shade=0.18, marker="o", markersize=4)
    ax.set_xlabel("after block")
    ax.set_ylabel("gap  $\\tau_{high} - \\tau_{low}$  (nats)")
    ax.set_title("Where in depth the gap is made, $g = 0$")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def figure_coupled(analysis: xr.Dataset) -> Figure:
    """Gap by layer by the readout, one curve per coupling."""
    figure, ax = new_figure(7.2, 3.4)
    layers = analysis.layer.values
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    shades = np.linspace(0.75, 0.0, analysis.sizes["coupling"])
    for index, g in enumerate(analysis.coupling.values):
        at = analysis.network_readout_gap.isel(coupling=index).values
        color = (shades[index] * 0.9, shades[index] * 0.9, 0.55 + 0.35 * shades[index])
        curve(ax, layers, at, color, f"$g$ = {g:g}", shade=0.2, marker="o", markersize=3.5)
    ax.set_xlabel("after block")
    ax.set_ylabel("gap, readout (nats)")
    ax.legend()
    return figure


def figure_levels(analysis: xr.Dataset) -> Figure:
    """Commitment levels by layer and band, readout and probe."""
    panels = ["readout"] + (["probe"] if "network_probe_tau" in analysis else [])
    figure, axes = new_figure(7.2, 3.5, 1, len(panels), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], panels, strict=True):
        tau = analysis[f"network_{name}_tau"].isel({grid_of(name): 0})
        bands = tau.shape[1]
        colors = band_colors(analysis) if name == "readout" else band_colors(analysis.rename(probe_band="pb"))
        for band in range(bands):
            values = tau[:, band].values
            color = colors[min(band, len(colors) - 1)] if band < len(colors) else INK
            curve(ax, analysis.layer, values, color, band_names(analysis)[band] if name == "readout" else None)
        ax.set_title(READINGS[name][0])
        ax.set_xlabel("after block")
    axes[0][0].set_ylabel("commitment level  $\\tau$  (nats)")
    band_legend(figure, axes[0][0], "")
    return figure


def figure_decodable(analysis: xr.Dataset) -> Figure:
    """Held-out R2 against log-SNR at three depths, lowest and highest band, and the shuffled control."""
    figure, axes = new_figure(7.2, 3.2, 1, 2, sharey=True)
    depth = analysis.layer.values[-1]
    for ax, band in zip(axes, (1, analysis.sizes["probe_band"] - 1), strict=True):
        for layer, color in ((0, "#56B4E9"), (depth // 2, "#009E73"), (depth, "#0072B2")):
            r2 = analysis.network_probe_r2.isel(probe_coupling=0, probe_band=band).sel(layer=layer).values
            ax.fill_between(analysis.level_ell, r2[:, 1], r2[:, 2], color=color, alpha=0.18, linewidth=0)
            name = {0: "embedding", depth: "end of the network"}.get(layer, f"after block {layer}")
            ax.plot(analysis.level_ell, r2[:, 0], color=color, marker="o", markersize=3.5, label=name)
        control = analysis.network_probe_shuffled_r2.isel(probe_coupling=0, probe_band=band, last_layer=0).values
        ax.plot(analysis.level_ell, control[:, 0], color=QUIET, linestyle=":", label="outcomes of other pairs")
        ax.set_title(f"band {analysis.probe_band.values[band]}")
        ax.set_xlabel(LEVEL_LABEL)
        ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes[0].set_ylim(-0.3, 1.05)
    axes[0].set_ylabel("decodable share, $R^2$")
    axes[0].legend(loc="upper left")
    return figure


def figure_gained(analysis: xr.Dataset) -> Figure:
    """What depth adds to the noisy state, and how much noise the readout lets through, by layer."""
    figure, (left, right) = new_figure(7.2, 3.6, 1, 2)
    layers = analysis.layer.values
    level = int(np.abs(analysis.level_ell.values - analysis.network_state_tau[0, 0, LOW_BAND, 0].item()).argmin())
    for ax in (left, right):
        ax.axvspan((1 - LAST) * layers[-1], layers[-1], color=FAINT, alpha=0.45, linewidth=0, zorder=0)
        ax.set_xlabel("after block")
    for band, color, name in ((LOW_BAND, LOW_COLOR, "lowest band"), (HIGH_BAND, HIGH_COLOR, "highest band")):
        at = analysis.network_gained.isel(probe_coupling=0, band=band).values
        curve(left, layers, at, color, name, marker="o", markersize=3.5)
        control = analysis.untrained_gained.isel(probe_coupling=0, band=band).values
        left.plot(layers, control[:, 0], color=color, linestyle=":", linewidth=1)
        passed = analysis.network_passed.isel(probe_coupling=0, level=level, band=band).values
        curve(right, layers, passed, color, marker="o", markersize=3.5)
    left.set_ylabel("earlier than in the noisy image (nats)")
    left.set_title("What depth adds")
    right.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
    right.set_yscale("log")
    right.set_ylabel("energy of the noise over the outcome's")
    right.set_title(f"Noise in the readout, at {analysis.level_ell.values[level]:.1f} nats")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def figure_modes(analysis: xr.Dataset) -> Figure:
    """Share of the difference mode in the stream's energy by layer, lowest and highest band of the token grid."""
    figure, axes = new_figure(7.2, 3.2, 1, 2, sharey=True)
    levels = analysis.share_level.values
    for ax, band, name in zip(axes, (LOW_BAND, HIGH_BAND), ("lowest band", "highest band"), strict=True):
        for index, color in zip((0, len(levels) // 2, len(levels) - 1), ("#56B4E9", "#009E73", "#0072B2"), strict=True):
            at = analysis.network_difference_share.isel(share_level=index, token_band=band).values
            curve(ax, analysis.layer.values, at, color, f"{levels[index]:.1f} nats", marker="o", markersize=3)
        ax.axhline(0.5, color=FAINT, linewidth=0.8, zorder=0)
        ax.set_title(f"{name} above DC" if band == LOW_BAND else name)
        ax.set_xlabel("after block")
    axes[0].set_ylabel("share of the difference mode")
    axes[0].legend()
    return figure


def shown_levels(analysis: xr.Dataset) -> tuple[int, int, int]:
    """Places of the noisiest, the middle and the cleanest of the levels at which the stream's energies are given."""
    count = analysis.sizes["share_level"]
    return 0, count // 2, count - 1


def figure_stream(analysis: xr.Dataset) -> Figure:
    """Size of the residual stream by layer, and of its difference mode, raw and over that size."""
    figure, (left, right) = new_figure(7.2, 3.6, 1, 2)
    levels, layers = analysis.share_level.values, analysis.layer.values
    for index, color in zip(shown_levels(analysis), ("#56B4E9", "#009E73", "#0072B2"), strict=True):
        curve(left, layers, analysis.network_size.isel(share_level=index).values, color, f"{levels[index]:.1f} nats")
        control = analysis.untrained_size.isel(share_level=index).values
        left.plot(layers, control[:, 0], color=color, linestyle=":", linewidth=1)
    middle = shown_levels(analysis)[1]
    for band, color, name in ((LOW_BAND, LOW_COLOR, "lowest band"), (HIGH_BAND, HIGH_COLOR, "highest band")):
        for variable, style in (("network_energy", "-"), ("network_relative", "--")):
            at = analysis[variable].isel(share_level=middle, token_band=band).values
            label = f"{name}, {'raw' if style == '-' else 'over the stream'}"
            curve(right, layers, at, color, label, linestyle=style)
    left.set_title("Mean square of the stream")
    right.set_title(f"Its difference mode, {levels[middle]:.1f} nats")
    for ax in (left, right):
        ax.set_yscale("log")
        ax.set_xlabel("after block")
    left.legend()
    handles, labels = right.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4)
    return figure
