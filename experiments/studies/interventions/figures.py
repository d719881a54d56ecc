"""Figures of the interventions study."""

from collections.abc import Sequence

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.frame.drawing import FAINT, INK, LEVEL_LABEL, QUIET, band_names, curve, new_figure
from experiments.frame.estimator import HIGH, LOW
from experiments.frame.steps import WINDOW_START
from experiments.studies.interventions.settings import ALL, CONSTANT, NONE

FIRST_COLOR, LAST_COLOR, MIDDLE_COLOR = "#0072B2", "#D55E00", "#009E73"
SCHEDULE_COLORS = (INK, "#0072B2", "#D55E00", "#E69F00", "#56B4E9")


def arms_of(analysis: xr.Dataset, *kinds: str) -> list[str]:
    """Names of the arms of these kinds."""
    return [str(name) for name, kind in zip(analysis.arm.values, analysis.kind.values, strict=True) if kind in kinds]


def _points(ax: Axes, at: Sequence[int], arms: xr.Dataset, color: str, label: str) -> None:
    """Shares of the full effect with their intervals, filled, and those by all energy beside them, open."""
    for name, shift, options in (
        ("share", 0.0, {"markersize": 4.5, "label": label or None}),
        ("share_energy", 0.22, {"markersize": 4, "markerfacecolor": "white", "alpha": 0.7}),
    ):
        values = arms[name].values
        bars = np.abs(values[:, 1:] - values[:, :1]).T
        style = {"color": color, "linestyle": "none", "marker": "o", "elinewidth": 1, "capsize": 2}
        ax.errorbar(np.asarray(at) + shift, values[:, 0], bars, **style, **options)


def figure_layers(analysis: xr.Dataset) -> Figure:
    """Share of the full effect by how many of the first or last layers are coupled, and by single layer."""
    figure, (left, right) = new_figure(7.2, 3.5, 1, 2, sharey=True)
    depth = analysis.sizes["layer"]
    for ax in (left, right):
        ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
        ax.axhline(1, color=FAINT, linewidth=0.8, zorder=0)
    left.plot([0, depth], [0, 1], color=QUIET, linestyle="--", linewidth=1)
    for kind, color in (("first", FIRST_COLOR), ("last", LAST_COLOR), ("middle", MIDDLE_COLOR)):
        names = arms_of(analysis, kind)
        size = [int((analysis.gate.sel(arm=name) > 0).any("step").sum()) for name in names]
        values = analysis.share.sel(arm=names).values
        _points(left, size, analysis.sel(arm=names), color, f"{kind} layers")
        if kind != "middle":
            left.plot([0, *size, depth], [0, *values[:, 0], 1], color=color)
    left.set_xlabel("layers coupled")
    left.set_ylabel("share of the full effect on the gap")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="upper left")
    names = arms_of(analysis, "layer")
    layers = [int(name.split()[1]) for name in names]
    right.axhline(1 / depth, color=QUIET, linestyle="--", linewidth=1)
    _points(right, layers, analysis.sel(arm=names), INK, "")
    right.set_xlim(-0.6, depth - 0.4)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("the one layer coupled, counted from 0")
    left.set_title("First, middle or last layers")
    right.set_title("One layer")
    return figure


def figure_bands(analysis: xr.Dataset) -> Figure:
    """Commitment level and decided fraction by band, where a fifth of the layers is coupled."""
    figure, axes = new_figure(7.2, 3.4, 1, 2)
    fifth = analysis.attrs["fifth"]
    arms = {NONE: QUIET, f"first {fifth}": FIRST_COLOR, f"middle {fifth}": MIDDLE_COLOR}
    arms |= {f"last {fifth}": LAST_COLOR, ALL: INK}
    for ax, name in zip(axes, ("tau", "decided"), strict=True):
        for arm, color in arms.items():
            values = analysis[name].sel(arm=arm).values
            if name == "tau":  # no more than the error
                at = analysis.sel(arm=arm)
                values = np.where((at.decided[:, :1] <= at.floor[:, :1]).values, np.nan, values)
            curve(ax, analysis.radius, values, color, arm, marker="o", markersize=3.5)
            if name == "tau":
                whole = np.where(np.isfinite(values[:, 0]), analysis.tau_energy.sel(arm=arm)[:, 0].values, np.nan)
                ax.plot(analysis.radius, whole, color=color, linestyle=":", linewidth=1.2)
        ax.set_xlabel("radial frequency of the band")
    axes[0].set_ylabel("commitment level  $\\tau$  (nats)")
    axes[1].set_ylabel("decided fraction  $F$")
    axes[1].set_ylim(bottom=-0.04)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), title="layers coupled", alignment="left"
    )
    return figure


def figure_parts(analysis: xr.Dataset) -> Figure:
    """Gap and decided fractions of every arm of steps, heads, queries, keys and values."""
    kinds = {"window": "steps", "head": "heads, in all layers", "shared": "shared, without a gate"}
    rows: list[tuple[str, str]] = []  # what is written, and the arm it is of, if any
    for kind, title in kinds.items():
        rows.append((title, ""))
        rows += [(name.removesuffix(" steps"), name) for name in arms_of(analysis, kind)]
    figure, (left, right) = new_figure(7.2, 0.9 + 0.22 * len(rows), 1, 2, sharey=True)
    for name, color in ((NONE, QUIET), (ALL, INK)):
        left.axvline(float(analysis.gap.sel(arm=name)[0]), color=color, linewidth=1, linestyle="--", label=name)
        for band in (LOW, HIGH):
            right.axvline(float(analysis.decided.sel(arm=name)[band, 0]), color=color, linewidth=1, linestyle="--")
    for height, (_, arm) in enumerate(rows):
        if not arm:
            continue
        _dot(left, height + 0.2, analysis.gap_energy.sel(arm=arm).values, QUIET, fill="white")
        _dot(left, height, analysis.gap.sel(arm=arm).values, INK)
        for band, color in ((LOW, FIRST_COLOR), (HIGH, LAST_COLOR)):
            _dot(right, height, analysis.decided.sel(arm=arm)[band].values, color)
    for band, color, name in ((LOW, FIRST_COLOR, "lowest band"), (HIGH, LAST_COLOR, "highest band")):
        right.plot([], [], "o", color=color, markersize=4.5, label=f"{name}, {band_names(analysis)[band]}")
    left.set_yticks(range(len(rows)), [text for text, _ in rows])
    for tick, (_, arm) in zip(left.get_yticklabels(), rows, strict=True):
        tick.set_fontweight("normal" if arm else "bold")
    left.tick_params(axis="y", length=0)
    right.tick_params(axis="y", length=0)
    left.set_ylim(len(rows) - 0.4, -0.6)
    left.set_xlabel("gap  $\\tau_{high} - \\tau_{low}$  (nats)")
    right.set_xlabel("decided fraction  $F$")
    right.set_xlim(-0.04, 1.06)
    figure.legend(loc="outside upper right", ncols=4)
    return figure


def _dot(ax: Axes, height: float, values: np.ndarray, color: str, fill: str | None = None) -> None:
    """An estimate and its interval in a row."""
    ax.plot(values[1:], [height, height], color=color, linewidth=1.4, alpha=0.7, solid_capstyle="butt")
    ax.plot(values[0], height, "o", color=color, markerfacecolor=fill or color, markersize=4.5)


def figure_schedules(analysis: xr.Dataset) -> Figure:
    """Schedules over log-SNR, and gap and decided fraction under each."""
    figure, (left, middle, right) = new_figure(7.2, 3.0, 1, 3, width_ratios=(1.25, 1, 1))
    names = arms_of(analysis, "schedule")
    inside = analysis.ell.values >= WINDOW_START
    for height, (name, color) in enumerate(zip(names, SCHEDULE_COLORS, strict=True)):
        at = analysis.sel(arm=name)
        left.step(analysis.ell.values[inside], at.gate[:, 0].values[inside], where="mid", color=color)
        _dot(middle, height, at.gap.values, color)
        _dot(right, height, at.decided[LOW].values, color)
    for ax, values in ((middle, analysis.gap), (right, analysis.decided[:, LOW])):
        ax.axvline(float(values.sel(arm=CONSTANT)[0]), color=QUIET, linewidth=1, linestyle="--", zorder=0)
        ax.set_ylim(len(names) - 0.4, -0.6)
        ax.tick_params(axis="y", length=0)
    middle.set_yticks(range(len(names)), names)
    right.set_yticks(range(len(names)), [""] * len(names))
    left.set_xlabel(LEVEL_LABEL)
    left.set_ylabel("coupling  $g$")
    left.set_ylim(bottom=0)
    middle.set_xlabel("gap  (nats)")
    right.set_xlabel("decided fraction, low")
    return figure
