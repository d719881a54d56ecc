"""Figures, drawn from what a run has stored and from nothing else.

``figure_<name>(dataset) -> Figure``, one function per figure; `FIGURES` has them all.
Measurements are solid, theory is dashed or dotted. A band has the same colour everywhere, dark (DC) to light (highest).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from experiments.frame.drawing import (
    FAINT,
    GAP_LABEL,
    INK,
    LEVEL_LABEL,
    QUIET,
    TAU_LABEL,
    band_colors,
    band_legend,
    band_names,
    coupling_axis,
    end_labels,
    new_figure,
)
from experiments.frame.gates import RHO
from experiments.studies.compare.theory import EXACT, exact_gain, exact_of, recursion_of

_MEASURED_GAIN = {"color": "#D55E00", "linestyle": "--", "label": "recursion, regression gain"}
_EXACT = {"color": INK, "linestyle": ":"}
SOURCES: dict[str, dict[str, Any]] = {
    "network": {"color": "#0072B2", "linestyle": "-", "marker": "o", "label": "network"},
    "regression gain": _MEASURED_GAIN,
    "energy gain": {"color": "#CC79A7", "linestyle": "-.", "label": "recursion, energy gain"},
    "data covariance": {**_EXACT, "label": "theory, data covariance"},
    "sample variance": {**_EXACT, "label": "theory, own samples"},
    "untrained": {"color": QUIET, "linestyle": "-", "marker": "s", "label": "untrained network"},
}
DECIDED_LABEL = "decided fraction  $F$"


def theories(analysis: xr.Dataset) -> tuple[str, str]:
    """The recursion under the measured gain and the exact denoiser that a run has."""
    return recursion_of(analysis), exact_of(analysis)


def figure_gap(analysis: xr.Dataset) -> Figure:
    """The headline: synchronization gap against coupling, network over theory."""
    figure, ax = new_figure(7.2, 4.3)
    shown = [name for name in SOURCES if name in analysis.source and _any(analysis.gap.sel(source=name))]
    for name in reversed(shown):
        at = _sensible(analysis, name)
        style = {**SOURCES[name], "band": name != "untrained", "whiskers": name in ("network", "untrained")}
        _curve(ax, at.gap, at.gap_interval, **style)
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    coupling_axis(ax, analysis.coupling.values)
    ends = [float(_sensible(analysis, name).gap.dropna("coupling")[-1]) for name in shown]
    end_labels(ax, ends, [(SOURCES[name]["label"], SOURCES[name]["color"]) for name in shown])
    ax.set_ylabel(GAP_LABEL)
    ax.set_title("Synchronization gap against coupling, with 95 % intervals")
    return figure


def figure_commitment(analysis: xr.Dataset) -> Figure:
    """Commitment level of every band against coupling, network over the two theories."""
    return _per_band(analysis, "tau", TAU_LABEL)


def figure_decided(analysis: xr.Dataset) -> Figure:
    """Decided fraction of every band against coupling, network over the two theories."""
    figure = _per_band(analysis, "decided", DECIDED_LABEL)
    for ax in figure.axes:
        ax.set_ylim(bottom=-0.03)
    return figure


def figure_relative_energy(analysis: xr.Dataset) -> Figure:
    """Relative energy of the difference mode along the trajectory, uncoupled and coupled."""
    chosen = _some_couplings(analysis)
    figure, axes = new_figure(7.2, 3.3, 1, len(chosen), sharey=True)
    left = figure.axes[0]
    q, recursion = analysis.relative_energy, recursion_of(analysis)
    inside = (analysis.ell >= analysis.attrs["ell_start"]).values
    for ax, g in zip(np.atleast_1d(axes), chosen, strict=True):
        at = q.isel(coupling=g)
        for band, color in enumerate(band_colors(analysis)):
            ax.plot(
                analysis.ell, at.sel(source="network").isel(band=band), color=color, label=band_names(analysis)[band]
            )
            ax.plot(analysis.ell, at.sel(source=recursion).isel(band=band), color=color, linestyle="--", linewidth=1)
        ax.set_title(_coupling_name(analysis, g))
        ax.set_xlabel(LEVEL_LABEL)
        _window(ax, analysis)
    top = np.nanmax(q.sel(source=["network", recursion]).isel(coupling=chosen, step=inside).values)
    left.set_ylim(0, min(1.08 * float(top), 2.0))  # outside the window an epsilon-network's error has no bounds
    left.set_ylabel("relative energy  $Q$  of the difference")
    band_legend(figure, left, f"solid: network,  dashed: recursion, {recursion}")
    return figure


def figure_gain(analysis: xr.Dataset) -> Figure:
    """One-pass gain of the network along the trajectory, against the ideal gain."""
    chosen, kind = _some_couplings(analysis)[1:], analysis.attrs.get("gate_kind", "joint")
    figure, axes = new_figure(7.2, 3.3, 1, len(chosen), sharey=True)
    left = figure.axes[0]
    for ax, g in zip(np.atleast_1d(axes), chosen, strict=True):
        gain = analysis.gain.sel(source="network").isel(coupling=g)
        for band, color in enumerate(band_colors(analysis)):
            ax.plot(analysis.ell, gain.isel(band=band), color=color, label=band_names(analysis)[band])
        ideal = float(exact_gain(analysis)[g])
        formula = RHO[kind] if ideal >= 0 else f"|{RHO[kind]}|"
        ideal = abs(ideal)  # the measured gain is an amplitude
        ax.axhline(ideal, color=INK, linestyle=":", linewidth=1.4)
        ax.annotate(
            f"ideal  {formula} = {ideal:.2f}",
            (1, ideal),
            (-3, 4 if ideal < 0.2 else -4),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            ha="right",
            va="bottom" if ideal < 0.2 else "top",
            fontsize=8,
        )
        ax.set_title(_coupling_name(analysis, g))
        ax.set_xlabel(LEVEL_LABEL)
        _window(ax, analysis)
    inside = (analysis.ell >= analysis.attrs["ell_start"]).values
    shown = analysis.gain.sel(source="network").isel(coupling=chosen, step=inside).values
    top = float(np.nanmax(shown)) if np.isfinite(shown).any() else 1.0
    left.set_ylim(-0.04, 1.08 * max(top, 1.0))
    left.set_ylabel("one-pass gain  $\\rho$")
    band_legend(figure, left, "")
    return figure


def figure_calibration(analysis: xr.Dataset) -> Figure:
    """The instrument on an exact denoiser: measured points on the lines of its own theory, and what is left over."""
    figure, axes = new_figure(7.2, 4.4, 2, 3, sharex=True, height_ratios=[2.6, 1])
    low, high = analysis.attrs["low_band"], analysis.attrs["high_band"]
    columns = (
        ("gap", "gap  $\\Gamma_\\tau$  (nats)", (None,)),
        ("tau", TAU_LABEL, (low, high)),
        ("decided", DECIDED_LABEL, (low, high)),
    )
    for (top, bottom), (variable, label, bands) in zip(axes.T, columns, strict=True):
        reach = 0.01
        for band in bands:
            at = analysis if band is None else analysis.isel(band=band)
            color = SOURCES["network"]["color"] if band is None else band_colors(analysis)[band]
            measured, interval = at[variable].sel(source="wiener"), at[f"{variable}_interval"].sel(source="wiener")
            theory = at[variable].sel(source="wiener theory")
            name = None if band is None else band_names(analysis)[band]
            top.plot(analysis.coupling, theory, color=color, linewidth=1.2, zorder=2, label=name)
            points = {"color": color, "linestyle": "none", "marker": "o", "whiskers": True}
            _curve(top, measured, interval, **points)
            _curve(bottom, measured - theory, interval - theory, **points)
            left_over = np.append((interval - theory).values, (measured - theory).values)
            reach = max(reach, float(np.nanmax(np.abs(left_over), initial=0.0)))
        top.set_title(label)
        bottom.axhline(0, color=INK, linewidth=0.8, zorder=0)
        bottom.set_ylim(-1.15 * reach, 1.15 * reach)
        coupling_axis(bottom, analysis.coupling.values, room=0.19)
    axes[0, 0].axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes[0, 2].legend(loc="upper right", handlelength=1.4)
    axes[0, 0].set_ylabel("measured (points), theory (lines)")
    axes[1, 0].set_ylabel("points − lines")
    return figure


def figure_pictures(pictures: xr.Dataset) -> Figure:
    """Replica A above replica B of several pairs, at the first and the last coupling."""
    image = pictures.image
    couplings, pairs, replicas = (image.sizes[name] for name in ("coupling", "pair", "replica"))
    columns = max(pairs, 6)  # a few pairs are not blown up
    figure = Figure(figsize=(7.2, 0.55 + couplings * (0.2 + replicas * 7.2 / (columns + 1))), layout="constrained")
    for block, part in enumerate(figure.subfigures(couplings, 1, squeeze=False, hspace=0.02).flat):
        g = float(pictures.coupling[block])
        part.suptitle(f"$g$ = {g:g}" + (", independent" if g == 0 else ""), x=0.01, ha="left", fontsize=10)
        axes = part.subplots(replicas, columns, squeeze=False, gridspec_kw={"hspace": 0.02, "wspace": 0.02})
        for (replica, pair), ax in np.ndenumerate(axes):
            if pair >= pairs:
                ax.set_visible(False)
                continue
            ax.imshow(image[block, pair, replica].values, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if replica == 0:
                ax.set_title(str(pictures.label_name.values[pair]), fontsize=8, loc="center", pad=2, parse_math=False)
            if pair == 0:
                ax.set_ylabel("AB"[replica] if replicas == 2 else str(replica), rotation=0, ha="right", va="center")
    return figure


def figure_noise_floor(analysis: xr.Dataset) -> Figure:
    """What of the relative energy at the start of the window is error rather than decision, per band."""
    figure, ax = new_figure(7.2, 2.7)
    floor = analysis.floor.sel(source="network").isel(coupling=0).values
    limit = float(analysis.attrs.get("floor_limit", 0.1))
    ax.bar(np.arange(len(floor)), np.nan_to_num(floor), width=0.62, color=band_colors(analysis))
    for band, value in enumerate(floor):
        text = f"{value:.3f}".replace("-", "−") if np.isfinite(value) else "–"
        offset, align = (3, "bottom") if not value < 0 else (-3, "top")
        ax.annotate(
            text,
            (band, np.nan_to_num(value)),
            (0, offset),
            textcoords="offset points",
            ha="center",
            va=align,
            fontsize=8,
        )
    ax.axhline(limit, color=_MEASURED_GAIN["color"], linestyle="--", linewidth=1.2)
    ax.annotate(
        f"limit {limit:g}",
        (1, limit),
        (4, 0),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="center",
        color=_MEASURED_GAIN["color"],
        fontsize=8,
    )
    ax.set_ylim(min(0.0, 1.25 * np.nanmin(floor, initial=0.0)), 1.25 * np.nanmax(floor, initial=limit))
    ax.set_xticks(np.arange(len(floor)), band_names(analysis))
    ax.set_xlabel("band")
    ax.set_ylabel("noise floor\nenergy not along the outcome")
    ax.set_title(f"Noise floor of the network at $\\ell = {analysis.attrs['ell_start']:.1f}$, $g = 0$")
    return figure


FIGURES: dict[str, tuple[str, Callable[[xr.Dataset], Figure]]] = {  # name: (stored group, how to draw it)
    "gap": ("analysis", figure_gap),
    "commitment": ("analysis", figure_commitment),
    "decided": ("analysis", figure_decided),
    "relative_energy": ("analysis", figure_relative_energy),
    "gain": ("analysis", figure_gain),
    "pictures": ("pictures", figure_pictures),
    "noise_floor": ("analysis", figure_noise_floor),
    "calibration": ("analysis", figure_calibration),
}


def _sensible(analysis: xr.Dataset, name: str) -> xr.Dataset:
    """A source whose levels are drawn: an exact denoiser's where its gain is above 0, for beyond it decides all in its
    last step."""
    at = analysis.sel(source=name)
    return at.where(analysis.coupling.copy(data=exact_gain(analysis)) > 0) if name in EXACT else at


def _any(values: xr.DataArray) -> bool:
    return bool(np.isfinite(values.values).any())


def _curve(
    ax: Axes, values: xr.DataArray, interval: xr.DataArray, *, band: bool = False, whiskers: bool = False, **style: Any
) -> None:
    """A curve over the couplings where it is defined, with its interval as a band or as whiskers.

    An interval need not contain its point estimate, so whiskers are drawn from bound to bound.
    """
    known = np.isfinite(values.values)
    g, y = values.coupling.values[known], values.values[known]
    low, high = (interval.sel(bound=bound).values[known] for bound in ("low", "high"))
    color = style["color"]
    if band:
        ax.fill_between(g, low, high, color=color, alpha=0.14, linewidth=0, zorder=1)
    if whiskers:
        ax.vlines(g, low, high, color=color, linewidth=1.1, zorder=2)
    style = {"markersize": 4, "zorder": 3, **style}
    ax.plot(g, y, **style)


def _per_band(analysis: xr.Dataset, variable: str, label: str) -> Figure:
    """One panel per band: the network in the band's colour, the two theories in grey."""
    bands = analysis.sizes["band"]
    rows = 1 if bands < 4 else 2
    columns = -(-bands // rows)
    figure, axes = new_figure(7.2, 0.6 + 1.9 * rows, rows, columns, sharex=True, sharey=True)
    flat = np.atleast_1d(axes).ravel()
    for band, ax in enumerate(flat[:bands]):
        at = analysis.isel(band=band)
        for name, color in zip(theories(analysis), (INK, QUIET), strict=True):
            style = {**SOURCES[name], "color": color, "linewidth": 1.2}
            theory = _sensible(at, name) if variable == "tau" else at.sel(source=name)
            _curve(ax, theory[variable], theory[f"{variable}_interval"], **style)
        style = {**SOURCES["network"], "color": band_colors(analysis)[band]}
        network, interval = at[variable].sel(source="network"), at[f"{variable}_interval"].sel(source="network")
        _curve(ax, network, interval, whiskers=True, **style)
        weak = network.where(at.weak.sel(source="network"))
        ax.plot(
            weak.coupling, weak, linestyle="none", marker="o", markersize=4, color=style["color"], mfc="white", zorder=4
        )
        ax.set_title(band_names(analysis)[band])
        lowest = band >= bands - columns
        ax.tick_params(labelbottom=lowest)
        coupling_axis(ax, analysis.coupling.values, name=lowest, room=0.19)
    for ax in flat[bands:]:
        ax.set_visible(False)
    drawn = np.concatenate([line.get_ydata() for ax in flat[:bands] for line in ax.get_lines()])
    low, high = np.nanmin(drawn), np.nanmax(drawn)  # intervals of weak points may reach out of the panel
    flat[0].set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))
    figure.supylabel(label, fontsize=9)
    handles, labels = flat[0].get_legend_handles_labels()
    if bool(analysis.weak.sel(source="network").any()):
        handles.append(Line2D([], [], color=INK, linestyle="none", marker="o", markersize=4, mfc="white"))
        labels.append("weak")
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    return figure


def _some_couplings(analysis: xr.Dataset) -> Sequence[int]:
    """Indices of the first, the middle and the last coupling."""
    count = analysis.sizes["coupling"]
    return sorted({0, count // 2, count - 1})


def _coupling_name(analysis: xr.Dataset, index: int) -> str:
    return f"$g$ = {float(analysis.coupling[index]):g}"


def _window(ax: Axes, analysis: xr.Dataset) -> None:
    """Shades the steps before the window of the estimator opens."""
    first, start = float(analysis.ell.min()), analysis.attrs["ell_start"]
    ax.axvspan(first, start, color=FAINT, alpha=0.45, linewidth=0, zorder=0)
    ax.margins(x=0)
