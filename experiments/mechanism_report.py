"""Figures and text of the mechanism study."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.claims import Claim, Control
from experiments.drawing import (
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
from experiments.mechanism_analysis import TOP
from experiments.report import number
from experiments.section import Section, Table, estimate, finish
from experiments.store import RunFolder
from ou_theory.attention import rho
from ou_theory.estimator import HIGH_BAND, LOW_BAND

PART_COLORS = {"routing": "#0072B2", "key": "#009E73", "query": "#D55E00"}
ORIGIN_COLORS = {"embedding": "#8a8f99", "attention": "#0072B2", "mlp": "#E69F00"}
SOURCES = {"network": "network", "untrained": "untrained network", "random": "untrained, gates open"}
PANELS = 4  # couplings that are drawn side by side, at most
LISTED = 8  # heads in the table
TOKEN_RADIUS = "radial frequency of the token grid"


def report(run: RunFolder, timings: dict[str, float] | None = None) -> Path:
    """Draws and writes what a run has stored; returns the path of its page."""
    analysis = run.load("analysis")
    patch = run.manifest["model"]["patch_size"]
    figures: dict[str, Callable[[], Figure]] = {
        "gain": partial(figure_gain, analysis, patch),
        "parts": partial(figure_parts, analysis),
        "first_order": partial(figure_first_order, analysis),
        "layers": partial(figure_layers, analysis),
        "stream": partial(figure_stream, analysis),
        "heads": partial(figure_heads, analysis),
    }
    return finish(run, section(run.manifest, analysis), figures, timings)


def section(manifest: dict, analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings, pairs = manifest["settings"], manifest["settings"]["pairs"]
    names, last = band_names(analysis), analysis.isel(coupling=-1)
    g = float(analysis.coupling[-1])
    claim = low_pass_claim(analysis)
    left = {part: last.network_share_all.sel(part=part).values for part in PART_COLORS}
    kept = [last.network_gain.isel(band=band).values for band in (LOW_BAND, HIGH_BAND)]
    other = [last.network_gain_by_energy.isel(band=band).values for band in (LOW_BAND, HIGH_BAND)]
    scale = cutoff_text(last.network_cutoff.values, float(analysis.radius[HIGH_BAND]))
    levels = ", ".join(number(ell, 1) for ell in analysis.level_ell.values)
    nyquist = 1 / manifest["model"]["patch_size"]
    return Section(
        title=f"Mechanism: {manifest['subject']}",
        question="How does coupling bring replicas together inside one pass: through values, keys or queries, in which "
        "layers and heads, and at which spatial scales?",
        answer=f"At g = {g:g} the denoised difference keeps {estimate(kept[0])} of its amplitude in the lowest band "
        f"({names[LOW_BAND]}) and {estimate(kept[1])} in the highest ({names[HIGH_BAND]}); half way between the lowest "
        f"and 1: {scale}. Of what is left of the attention difference, {_percent(left['routing'])} is routing, "
        f"{_percent(left['key'])} key pattern, {_percent(left['query'])} query pattern.",
        claims=[claim],
        tables=[
            _gain_table(analysis),
            _share_table(analysis),
            _size_table(analysis),
            _neglect_table(analysis),
            _growth_table(analysis),
            _bypass_table(analysis),
            _heads_table(analysis),
        ],
        captions={
            "gain": "End to end: amplitude of the denoised difference after one pass under a coupling, relative to no "
            f"coupling, by pixel band (left), and by level at g = {g:g} (right). Dashed line: the highest frequency "
            "along an axis that a grid of tokens carries; beyond it is what lies inside patches.",
            "parts": "Exact shares of the attention difference by band of the token grid; they sum to 1, and a "
            "negative one works against the total.",
            "first_order": "Size of each part under coupling relative to the same part without, of the same queries, "
            "keys and values (left; points: measured, lines: first order, ρ(g) for routing and key, 1 for query). "
            "Relative error of the first-order prediction of the whole difference, by level (right).",
            "layers": "Exact shares of the attention difference by layer, all bands together.",
            "stream": f"Difference of the residual stream after every block at g = {g:g}, relative to no coupling, by "
            "band of the token grid (left; 0: the embedding). What adds up to the stream's final difference: shares "
            f"by origin (right; filled: g = {g:g}, open: g = 0).",
            "heads": f"At g = {g:g}: difference of each head's output relative to the same head without coupling "
            "(left); what coupling changes in what the head adds to the square of the stream's difference, lowest band "
            "of the token grid above DC, in % of that square (right; negative brings the replicas together).",
        },
        methods=[
            f"{pairs} pairs run uncoupled under DDIM, {settings['steps']} steps. Their states at log-SNR {levels} "
            f"are denoised once under every coupling, gate {settings['gate']}. All ratios to g = 0 are of passes that "
            "start from the same states.",
            "The split is that of docs/theory.md, section 6: routing is the difference of values read with the mean "
            "of own minus cross weights; the pattern part is divided between keys and queries by the Shapley value. "
            f"The parts add up to the difference of the network's own head outputs within "
            f"{float(analysis.network_closure.max()):.1e} of its size (largest of all layers).",
            "Shares pool levels and layers, each with the weight with which coupling left its difference. Gains over "
            "several levels are geometric means, since contractions multiply; as roots of mean energy ratios, in which "
            f"the levels with the largest gain weigh most, those of the denoised difference at g = {g:g} are "
            f"{estimate(other[0])} in the lowest band and {estimate(other[1])} in the highest.",
            "A head writes to the stream through its slice of the output projection and the block's gate. The square "
            "of the stream's difference after attention minus that before is a sum over heads, exactly: of the inner "
            "products of what each writes with the sum of both differences. Its change by coupling, of the same q, k, "
            "v, is the head's share in synchronisation. The pull is the inner product with the difference before "
            "alone.",
            "Controls: random weights in the same architecture, whose gates are nearly closed, so that attention "
            "hardly acts; and the same with a bias of 1 on every gate, so that it does.",
            "The self-only reading keeps what a replica's own pattern changes, with weight ξ(g) = 1/(1 + g), and "
            "neglects the change of the cross pattern. It is given twice: for the weights as they are, and for "
            "patterns whose rows are normalised; the two are the same under the blend gate.",
        ],
        limits=[
            "One pass at chosen levels: over a trajectory contractions multiply, and the states of a coupled run are "
            "not those of an uncoupled one.",
            "The stream's difference holds the noise of the states as well as what the network makes of them. In an "
            "ε-network it need not shrink when the denoised difference does; bypass and heads are about the stream.",
            "What attention leaves to the stream and the MLP is counted by where it was added last; an MLP also passes "
            "on what attention did before it.",
            f"The cut-off is read off {len(names) - 1} bands by linear interpolation. The token grid ends at r = "
            f"{nyquist:.2f} along an axis: attention does not see finer structure as frequencies.",
            "Intervals come from resampling pairs; they speak for this network, not for a network trained again"
            + (f", and from as few as {pairs} pairs they are somewhat too short." if pairs < 64 else "."),
        ],
    )


def low_pass_claim(analysis: xr.Dataset) -> Claim:
    """Whether the lowest band is synchronised more than the highest, end to end, at the strongest coupling."""
    g = float(analysis.coupling[-1])
    top = float(analysis.radius[HIGH_BAND])
    value, low, high = (float(v) for v in analysis.network_slope.isel(coupling=-1).values)
    last = analysis.isel(coupling=-1)
    first = last.network_part_gain.sel(part="total").values
    ends = {source: [last[f"{source}_gain"].isel(band=b).values for b in (LOW_BAND, HIGH_BAND)] for source in SOURCES}
    grows = ends["network"][1][1] > 1
    return Claim(
        0,
        "Attention under coupling is a low-pass synchroniser",
        _verdict([low, high]),
        f"one-pass gain of the highest band minus that of the lowest above DC, g = {g:g}",
        value,
        [low, high],
        f"Half way between the lowest band's gain and 1: {cutoff_text(last.network_cutoff.values, top)}. Inside "
        f"attention, its heads' difference keeps {estimate(first[LOW_BAND])} of its size in the lowest band of the "
        f"token grid and {estimate(first[HIGH_BAND])} in the highest, of the same queries, keys and values."
        + (f" The highest band of the denoised difference grows: {estimate(ends['network'][1])}." if grows else ""),
        [
            _control(SOURCES[source], last[f"{source}_slope"].values, *ends[source])
            for source in ("untrained", "random")
        ],
    )


def _control(name: str, slope: np.ndarray, low: np.ndarray, high: np.ndarray) -> Control:
    interval = [float(v) for v in slope[1:]]
    text = f"Keeps {estimate(low)} in the lowest and {estimate(high)} in the highest band."
    return Control(name, float(slope[0]), interval, _verdict(interval) == "holds", text)


def _verdict(interval: list[float]) -> str:
    if not np.isfinite(interval).all():
        return "undecided"
    return "holds" if interval[0] > 0 else "does not hold" if interval[1] <= 0 else "undecided"


def cutoff_text(values: np.ndarray, top: float) -> str:
    """The cut-off in words; `top` is the highest band's frequency, where the estimate is censored."""
    if not np.isfinite(values[0]):
        return "nowhere, for the lowest band is not synchronised"
    if values[0] >= top:
        return f"not up to r = {top:.2f}, the highest band"
    return f"r = {estimate(values)}"


def _percent(values: np.ndarray) -> str:
    return estimate(100 * np.asarray(values), 0) + " %"


def _table(
    title: str, analysis: xr.Dataset, head: list[str], cells: Callable[[xr.Dataset], list[str]], note: str
) -> Table:
    """A table over sources and couplings: all of the network's, the first and the last of the controls'.

    Args:
      cells: of a row, from the estimates of a source at a coupling, without the source's name in front.
    """
    rows, last = [], analysis.sizes["coupling"] - 1
    for source, name in SOURCES.items():
        own = [each for each in analysis.data_vars if str(each).startswith(f"{source}_")]
        found = analysis[own].rename({each: str(each).removeprefix(f"{source}_") for each in own})
        for i, g in enumerate(analysis.coupling.values):
            if source == "network" or i in (0, last):
                rows.append([name, f"{g:g}", *cells(found.isel(coupling=i))])
    return Table(title, ["source", "g", *head], rows, note)


def _gain_table(analysis: xr.Dataset) -> Table:
    top = float(analysis.radius[HIGH_BAND])

    def cells(at):
        ends = [estimate(at.gain.isel(band=band).values) for band in (LOW_BAND, HIGH_BAND)]
        cut, low_pass = at.cutoff.values, at.slope.values[1] > 0
        scale = "–" if not low_pass else f"> {top:.2f}" if cut[0] >= top else estimate(cut)
        return [*ends, estimate(at.slope.values), scale]

    head = ["gain, lowest band", "gain, highest band", "highest − lowest", "half-way frequency"]
    note = (
        "Of the denoised difference, after one pass; geometric mean over levels. Half-way frequency: where the gain "
        "passes half way between that of the lowest band and 1, for what is low-pass."
    )
    return _table("End-to-end gain", analysis, head, cells, note)


def _share_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        return [_percent(at.share_all.sel(part=part).values) for part in PART_COLORS]

    note = "Of what is left under that coupling; all heads, layers, levels and bands."
    return _table("Exact shares of the attention difference", analysis, list(PART_COLORS), cells, note)


def _size_table(analysis: xr.Dataset) -> Table:
    names = [*PART_COLORS, "total"]

    def cells(at):
        rows = [estimate(at.part_gain_all.sel(part=part).values) for part in names]
        return [*rows, number(float(rho(at.coupling.values)))]

    note = "Relative to no coupling, of the same q, k, v. To first order routing and key have the size ρ(g), query 1."
    return _table("Sizes of the parts", analysis, [*names, "ρ(g)"], cells, note)


def _neglect_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        error = _percent(at.first_order_all.values)
        if at.coupling == 0:  # where there is no cross part
            return [error, "0", "0", "0"]
        missed = [_percent(at.missed_all.sel(reading=reading).values) for reading in ("pattern", "weights")]
        return [error, _percent(at.missed_error.sel(reading="pattern").values), *missed]

    head = ["error, first order", "error, ξ", "missed by ξ, rows normalised", "missed by ξ, as is"]
    note = (
        "Errors are amplitudes relative to the exact difference of the heads' outputs. What ξ misses is a share of the "
        "pattern part (key plus query)."
    )
    return _table("What first order and the self-only reading leave out", analysis, head, cells, note)


def _growth_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        growth = at.part_growth.isel(token_band=LOW_BAND)
        return [_percent(growth.sel(part=part).values) for part in (*PART_COLORS, "total")]

    note = (
        "Lowest band of the token grid above DC: what attention adds to the square of the stream's difference, in % of "
        "that square, summed over layers; mean over levels."
    )
    return _table("What attention adds to the difference", analysis, [*PART_COLORS, "total"], cells, note)


def _bypass_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        low = at.isel(token_band=LOW_BAND)
        logs = [estimate(low.contraction.sel(sublayer=name).values) for name in ("attention", "mlp")]
        return [*logs, _percent(low.bypass.values), _percent(at.bypass_all.values)]

    head = ["ln gain, attention", "ln gain, MLPs", "bypass, lowest band", "bypass, all bands"]
    note = (
        "ln gain: what coupling changes in ln amplitude of the stream's difference, lowest band of the token grid "
        "above DC, summed over layers; mean over levels. Bypass: share of the stream's final difference that no "
        "attention layer added."
    )
    return _table("What bypasses attention", analysis, head, cells, note)


def _heads_table(analysis: xr.Dataset) -> Table:
    last = analysis.isel(coupling=-1)
    heads = analysis.sizes["head"]
    sync, pull, kept = (last[f"network_head_{name}"].values.reshape(-1, 3) for name in ("sync", "pull", "gain"))
    rows = []
    for unit in np.argsort(sync[:, 0])[:LISTED].tolist():
        numbers = [estimate(100 * sync[unit], 1), estimate(100 * pull[unit], 1), estimate(kept[unit])]
        rows.append([str(unit // heads), str(unit % heads), *numbers])
    note = (
        "Layers and heads count from 0; lowest band of the token grid above DC. The strongest "
        f"{100 * TOP:.0f} % of all heads, chosen on other pairs than they are measured on, carry "
        f"{_percent(last.network_concentration.values)} of the whole change."
    )
    head = ["layer", "head", "change of the square by coupling, %", "pull, %", "output difference that is left"]
    return Table(f"Heads that synchronise most, g = {float(analysis.coupling[-1]):g}", head, rows, note)


def _curve(ax: Any, x: Any, values: np.ndarray, color: Any, label: str | None = None, **options: Any) -> None:
    """A curve of estimates (..., 3) with its band."""
    ax.fill_between(x, values[:, 1], values[:, 2], color=color, alpha=0.16, linewidth=0)
    ax.plot(x, values[:, 0], **{"color": color, "marker": "o", "markersize": 3.5, "label": label, **options})


def _coupling_colors(analysis: xr.Dataset) -> list:
    return list(matplotlib.colormaps["plasma"](np.linspace(0, 0.8, analysis.sizes["coupling"])))


def figure_gain(analysis: xr.Dataset, patch: int) -> Figure:
    """End-to-end gain by band, and by level at the strongest coupling."""
    figure, (left, right) = new_figure(7.2, 3.5, 1, 2, sharey=True)
    for i, (g, color) in enumerate(zip(analysis.coupling.values, _coupling_colors(analysis), strict=True)):
        if g > 0:
            _curve(left, analysis.radius, analysis.network_gain[i].values, color, f"$g$ = {g:g}")
    for source, style in (("untrained", "-"), ("random", "-.")):
        values, name = analysis[f"{source}_gain"][-1].values, SOURCES[source]
        _curve(left, analysis.radius, values, QUIET, name, marker=None, linestyle=style)
    left.axvline(1 / patch, ymax=0.66, color=INK, linestyle="--", linewidth=0.9)  # below the legend
    left.set_xlabel("radial frequency, fraction of Nyquist")
    left.set_ylabel("one-pass gain")
    left.set_title("By band, levels pooled")
    left.legend(loc="upper left", fontsize=7.5)
    for band, (name, color) in enumerate(zip(band_names(analysis), band_colors(analysis), strict=True)):
        values = analysis.network_gain_level[-1, :, band].values
        _curve(right, analysis.level_ell, values, color, name)
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
            _curve(ax, analysis.token_radius, analysis.network_share[i].sel(part=part).values, color, part)
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
    left.plot(fine, rho(fine), color=INK, linestyle="--", linewidth=1.1, label="ρ(g)")
    left.plot(fine, np.ones_like(fine), color=INK, linestyle=":", linewidth=1.1, label="1")
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
        _curve(right, analysis.level_ell, analysis.network_first_order_level[i].values, color, f"$g$ = {g:g}")
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
            _curve(ax, analysis.layer, analysis.network_share_layer[i].sel(part=part).values, color, part)
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
        _curve(left, analysis.stage, analysis.network_stream_gain[-1, :, band].values, color, name, marker=None)
    left.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
    left.set_xlabel("after block")
    left.set_ylabel("gain of the stream's difference")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(fontsize=7.5, ncols=2)
    for origin, color in ORIGIN_COLORS.items():
        at = analysis.network_origin_share.sel(origin=origin)
        _curve(right, analysis.token_radius, at[-1].values, color, "MLPs" if origin == "mlp" else origin)
        _curve(right, analysis.token_radius, at[0].values, color, markerfacecolor="white", linewidth=0.9)
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
    titles = ("Difference of the output that is left", "Change of the square, %")
    for ax, (values, colors, low, high), title in zip(axes, maps, titles, strict=True):
        image = ax.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto", origin="lower")
        figure.colorbar(image, ax=ax, pad=0.02)
        ax.set_title(title)
        ax.set_xlabel("head")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(heads, 8)))
        ax.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0].set_ylabel("layer")
    return figure
