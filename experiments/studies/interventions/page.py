"""Figures and text of the interventions study."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike

from experiments.frame.drawing import FAINT, INK, LEVEL_LABEL, QUIET, band_names, new_figure
from experiments.frame.page import Section, Table, estimate, finish
from experiments.frame.store import RunFolder
from experiments.studies.compare.analysis import HIGH, LOW, WEAK, WINDOW_START
from experiments.studies.compare.claims import Claim, Control

NONE, ALL, NO_HEAD, CONSTANT = "none", "all", "no head", "constant"  # names of arms
CLAIMED = 0.5  # share of the full effect that coupling the last fifth of the layers must bring
FIRST_COLOR, LAST_COLOR, MIDDLE_COLOR = "#0072B2", "#D55E00", "#009E73"
SCHEDULE_COLORS = (INK, "#0072B2", "#D55E00", "#E69F00", "#56B4E9")


def report(run: RunFolder, timings: dict[str, float] | None = None) -> Path:
    """Draws and writes what a run has stored; returns the path of its page."""
    analysis = run.load("analysis")
    figures: dict[str, Callable[[], Figure]] = {
        "layers": partial(figure_layers, analysis),
        "bands": partial(figure_bands, analysis),
        "parts": partial(figure_parts, analysis),
        "schedules": partial(figure_schedules, analysis),
    }
    if not analysis.effect[1] > 0:
        del figures["layers"]  # shares of nothing
    return finish(run, section(run.manifest, analysis, list(figures)), figures, timings)


def section(manifest: dict, analysis: xr.Dataset, figures: Sequence[str]) -> Section:
    """What the study found, in words and tables."""
    settings, names = manifest["settings"], band_names(analysis)
    g, depth, pairs = settings["strength"], analysis.sizes["layer"], analysis.attrs["pairs"]
    counts = ", ".join(str(int((analysis.gate.sel(arm=name)[:, 0] > 0).sum())) for name in _arms(analysis, "window"))
    captions = {
        "layers": "Share of the full effect (what coupling all layers takes from the gap) that comes with coupling the "
        "first, or the last, layers only (left; dashed: an equal share for every layer), and one layer only (right; "
        "dashed: an equal share). Open: by the gap that is not cut off at 1. Bars: 95 % intervals.",
        "bands": f"Commitment level (left) and decided fraction (right) of every band under coupling of a fifth of the "
        f"layers, of none and of all, g = {g:g}. Dotted: the level that is not cut off at 1.",
        "parts": f"Gap (left) and decided fraction of the lowest and the highest band (right) where coupling g = {g:g} "
        "is on in some steps or heads only, or where replicas share queries, keys or values instead. Open: "
        "the gap that is not cut off at 1. Vertical lines: no coupling, and all of it.",
        "schedules": "Schedules of equal total coupling over log-SNR (left), the gap under each, and the decided "
        "fraction of the lowest band. Bars: 95 % intervals; vertical line: constant coupling.",
    }
    limits = [
        "The gap says when a band commits, given that it does. Where coupling leaves the low band nearly nothing to "
        "decide individually (marked *), its level rests on that little; the decided fractions stand beside it.",
        "Decided is a running maximum: a difference that coupling takes away after it was there still counts as "
        "decided. The column of what is left at the end does not latch, and shows such late effects.",
        f"Log-SNR is the measure of windows and schedules, not steps: the windows hold {counts} steps, the second half "
        f"{int((analysis.gate.sel(arm='second half')[:, 0] > 0).sum())}. At most steps the late arms do nothing.",
        "Effects of parts need not add up to that of the whole: what one layer or step brings depends on what the "
        "others do.",
        "A head's number means nothing across layers: one head everywhere is a sample of "
        f"1/{manifest['model']['num_heads']} of the heads.",
        f"Every interval is for its own number: of {analysis.sizes['arm']} arms one in twenty is missed by chance. The "
        "claim rests on the first, middle and last fifth, which were named in advance.",
        "Coupling a part makes the network run on states that it was not trained on, as all coupling does.",
        "Nominal 95 % intervals from so few pairs cover less, about 85 to 90 %; --pairs 64 is better."
        if pairs < 64
        else "Intervals come from resampling pairs; they speak for this network, not for one trained again.",
    ]
    return Section(
        title=f"Interventions: {manifest['subject']}",
        question=f"Which layers, steps, heads, and which of queries, keys and values, must be coupled for the gap to "
        f"come down? Coupling g = {g:g} is switched on in a part only.",
        answer=_answer(analysis, g, depth),
        claims=[localisation(analysis)],
        tables=_tables(analysis, settings),
        captions={name: captions[name] for name in figures},
        methods=[
            f"{pairs} pairs under DDIM, {settings['steps']} steps, gate {settings['gate']}, the same noise in every "
            f"arm. Gap between {names[LOW]} and {names[HIGH]}, as in the main experiment; every arm is measured "
            f"against the energies without coupling; the estimator's window opens at "
            f"{analysis.attrs['ell_start']:.1f} nats. The share of the full effect is "
            "(gap without coupling − gap of the arm) / (gap without coupling − gap with everything coupled); one draw "
            "of pairs serves all arms, so that the noise they share cancels.",
            "Relative energies are cut off at 1: where coupling makes a band differ more than it does without, the "
            "band counts as decided once it passes what it is without coupling, which moves its level forward. The gap "
            "that is not cut off goes by every arm's own largest energy; where nothing passes 1 it is the same.",
            f"Layers count from 0. Windows of steps are thirds of the log-SNR from {WINDOW_START:g} to the end; the "
            f"steps before {WINDOW_START:g} belong to the early one. Schedules act "
            f"from {WINDOW_START:g} on and have the integral over log-SNR of g = {settings['schedule_strength']:g}.",
            "A head is uncoupled by keeping its attention to its own replica's keys and normalising it again. With all "
            "heads uncoupled in this way energies repeat those without coupling within "
            f"{_power(analysis.attrs['closure'])} of themselves. Queries, keys or values are shared without a gate: "
            f"each replica goes on with (own + {g:g} × other) / {1 + g:g}. To first order, the gate is the same as "
            "sharing keys and values (docs/theory.md, section 6).",
        ],
        limits=limits,
    )


def localisation(analysis: xr.Dataset) -> Claim:
    """Claim 3 as a causal statement: it is the last layers that must be coupled for the gap to come down.

    Let there be a full effect: what coupling all layers takes from the gap is above 0 with its whole interval. The
    claim holds if the share of it that coupling the last fifth of the layers alone brings is above one half, and above
    the share of the first fifth, each with its whole interval. It does not hold if either is wholly not so. Else, and
    where there is no full effect, it is undecided.
    """
    fifth, depth = analysis.attrs["fifth"], analysis.sizes["layer"]
    shares = {end: analysis.share.sel(arm=f"{end} {fifth}").values for end in ("first", "middle", "last")}
    verdict = localised(analysis.effect.values, shares["last"], analysis.last_minus_first.values)
    there = bool(analysis.effect[1] > 0)
    controls = [
        Control(
            f"{end} {fifth} layers",
            _value(shares[end], there),
            _bounds(shares[end], there),
            bool(shares[end][1] > CLAIMED) if there else None,
            "The same share; it holds if it is wholly above one half.",
        )
        for end in ("first", "middle")
    ]
    controls.append(
        Control("equal share", fifth / depth, None, fifth / depth > CLAIMED, "Share of the layers that are coupled.")
    )
    blank = analysis.untrained_effect.values
    gaps = [analysis.untrained_gap.sel(untrained_arm=name).values for name in (NONE, ALL)]
    found = analysis.untrained_share.sel(untrained_arm=f"last {fifth}").values
    acts = bool(blank[1] > 0)
    text = f"The same architecture with random weights: gap {estimate(gaps[0])} nats, coupled {estimate(gaps[1])}"
    controls.append(
        Control(
            "untrained network",
            _value(found, acts),
            _bounds(found, acts),
            localised(blank, found, analysis.untrained_last_minus_first.values) == "holds" if acts else False,
            text + ("." if acts else "; coupling brings no gap down, so there is nothing to be localised."),
        )
    )
    difference = analysis.last_minus_first.values
    return Claim(
        3,
        "Localised in the last layers (causal reading)",
        verdict,
        f"share of the full effect on the gap that coupling the last {fifth} of {depth} layers alone brings; localised "
        f"means more than {CLAIMED:g}, and more than the first {fifth}",
        _value(shares["last"], there),
        _bounds(shares["last"], there),
        f"Coupling all layers takes {estimate(analysis.effect)} nats from the gap; the last {fifth} bring "
        f"{estimate(difference)} of that more than the first {fifth}. Not cut off at 1, the gap loses "
        f"{estimate(analysis.effect_uncut)} nats, and the last {fifth} bring "
        f"{estimate(analysis.share_uncut.sel(arm=f'last {fifth}'))} of it."
        if there
        else f"Coupling all layers takes {estimate(analysis.effect)} nats from the gap: no effect to be localised.",
        controls,
    )


def localised(effect: ArrayLike, last: ArrayLike, difference: ArrayLike) -> str:
    """The verdict of `localisation` from (estimate, low, high) of the full effect, the last fifth's share, and what
    that is above the first fifth's."""
    effect, last, difference = (np.asarray(x, np.float64) for x in (effect, last, difference))
    if not effect[1] > 0 or not np.isfinite([last, difference]).all():
        return "undecided"
    if last[1] > CLAIMED and difference[1] > 0:
        return "holds"
    return "does not hold" if last[2] <= CLAIMED or difference[2] <= 0 else "undecided"


def _value(values: np.ndarray, there: bool) -> float | None:
    return float(values[0]) if there else None


def _bounds(values: np.ndarray, there: bool) -> list[float] | None:
    return [float(v) for v in values[1:]] if there else None


def _power(value: float) -> str:
    return f"{value:.0e}".replace("e-0", "e-")


def _answer(analysis: xr.Dataset, g: float, depth: int) -> str:
    gaps = [estimate(analysis[name].sel(arm=arm)) for name in ("gap", "gap_uncut") for arm in (NONE, ALL)]
    start = f"Coupling everything at g = {g:g} takes the gap from {gaps[0]} to {gaps[1]} nats (not cut off: {gaps[3]})"
    if not analysis.effect[1] > 0:
        return f"{start}: no effect that a part could have a share in."
    fifth = analysis.attrs["fifth"]

    def shares(arms: dict[str, str]) -> str:
        return ", ".join(f"{text} {estimate(analysis.share.sel(arm=arm))}" for arm, text in arms.items())

    layers = shares({f"{end} {fifth}": end for end in ("first", "middle", "last")})
    steps = shares({name: name.removesuffix(" steps") for name in _arms(analysis, "window")})
    return (
        f"{start}. Shares of that effect: of {fifth} of the {depth} layers, {layers}; of a third of the log-SNR, "
        f"{steps}."
    )


def _arms(analysis: xr.Dataset, *kinds: str) -> list[str]:
    return [str(name) for name, kind in zip(analysis.arm.values, analysis.kind.values, strict=True) if kind in kinds]


def _row(analysis: xr.Dataset, name: str) -> list[str]:
    at = analysis.sel(arm=name)
    decided = at.decided[:, 0].values
    weak = " *" if min(decided[LOW], decided[HIGH]) < WEAK else ""
    cells = [name]
    for cut in ("", "_uncut"):
        there = analysis[f"effect{cut}"][1] > 0
        cells += [estimate(at[f"gap{cut}"]) + weak, estimate(at[f"share{cut}"]) if there else "–"]
    return cells + [estimate(at[what][band]) for what in ("decided", "left") for band in (LOW, HIGH)]


def _tables(analysis: xr.Dataset, settings: dict) -> list[Table]:
    head = ["coupled", "gap, nats", "share of the full effect", "gap, not cut off", "share"]
    head += ["decided, low", "decided, high", "left at the end, low", "left at the end, high"]
    note = "Decided and left: of the difference without coupling, lowest band above DC and highest band."
    references = [_row(analysis, name) for name in (NONE, ALL)]
    groups = {
        "Layers": ("layer", "first", "middle", "last"),
        "Steps": ("window",),
        "Heads, in all layers": ("head",),
        "Queries, keys, values, shared": ("shared",),
    }
    tables = []
    for title, kinds in groups.items():
        rows = references + [_row(analysis, name) for kind in kinds for name in _arms(analysis, kind)]
        tables.append(Table(title, head, rows, note + _weak_note(rows)))
    rows = []
    for name in _arms(analysis, "schedule"):
        at = analysis.sel(arm=name)
        row = [name, f"{float(at.gate.max()):.2f}"]
        for what, band in (("gap", None), ("gap_uncut", None), ("decided", LOW), ("decided", HIGH)):
            value, change = at[what], at[f"{what}_against_constant"]
            row += [estimate(x if band is None else x[band]) for x in (value, change)]
        rows.append(row)
    head = ["schedule", "largest g"]
    for what in ("gap, nats", "gap, not cut off", "decided, low", "decided, high"):
        head += [what, "against constant"]
    title = f"Schedules with the total of g = {settings['schedule_strength']:g}"
    return [*tables, Table(title, head, rows)]


def _weak_note(rows: list[list[str]]) -> str:
    if any(row[1].endswith("*") for row in rows):
        return f" *: one of the two bands decides less than {100 * WEAK:g} % individually."
    return ""


def _points(ax: Axes, at: Sequence[int], arms: xr.Dataset, color: str, label: str) -> None:
    """Shares of the full effect with their intervals, filled, and uncut ones beside them, open."""
    for name, shift, options in (
        ("share", 0.0, {"markersize": 4.5, "label": label or None}),
        ("share_uncut", 0.22, {"markersize": 4, "markerfacecolor": "white", "alpha": 0.7}),
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
        names = _arms(analysis, kind)
        size = [int((analysis.gate.sel(arm=name) > 0).any("step").sum()) for name in names]
        values = analysis.share.sel(arm=names).values
        _points(left, size, analysis.sel(arm=names), color, f"{kind} layers")
        if kind != "middle":
            left.plot([0, *size, depth], [0, *values[:, 0], 1], color=color)
    left.set_xlabel("layers coupled")
    left.set_ylabel("share of the full effect on the gap")
    left.xaxis.set_major_locator(MaxNLocator(integer=True))
    left.legend(loc="upper left")
    names = _arms(analysis, "layer")
    layers = [int(name.split()[1]) for name in names]
    right.axhline(1 / depth, color=QUIET, linestyle="--", linewidth=1)
    _points(right, layers, analysis.sel(arm=names), INK, "")
    right.set_xlim(-0.6, depth - 0.4)
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    right.set_xlabel("the one layer coupled, from 0")
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
            if name == "tau":  # no level rests on less
                values = np.where((analysis.decided.sel(arm=arm)[:, :1] < WEAK).values, np.nan, values)
            ax.fill_between(analysis.radius, values[:, 1], values[:, 2], color=color, alpha=0.15, linewidth=0)
            ax.plot(analysis.radius, values[:, 0], color=color, marker="o", markersize=3.5, label=arm)
            if name == "tau":
                uncut = np.where(np.isfinite(values[:, 0]), analysis.tau_uncut.sel(arm=arm)[:, 0].values, np.nan)
                ax.plot(analysis.radius, uncut, color=color, linestyle=":", linewidth=1.2)
        ax.set_xlabel("radial frequency of the band")
    axes[0].set_ylabel("commitment level  $\\tau$  (nats)")
    axes[1].set_ylabel("decided fraction  $F$")
    axes[1].set_ylim(-0.04, 1.08)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), title="layers coupled", alignment="left"
    )
    return figure


def figure_parts(analysis: xr.Dataset) -> Figure:
    """Gap and decided fractions of every arm of steps, heads, queries, keys and values."""
    kinds = {"window": "steps", "head": "heads, in all layers", "shared": "shared, no gate"}
    rows: list[tuple[str, str]] = []  # what is written, and the arm it is of, if any
    for kind, title in kinds.items():
        rows.append((title, ""))
        rows += [(name.removesuffix(" steps"), name) for name in _arms(analysis, kind)]
    figure, (left, right) = new_figure(7.2, 0.9 + 0.22 * len(rows), 1, 2, sharey=True)
    for name, color in ((NONE, QUIET), (ALL, INK)):
        left.axvline(float(analysis.gap.sel(arm=name)[0]), color=color, linewidth=1, linestyle="--", label=name)
        for band in (LOW, HIGH):
            right.axvline(float(analysis.decided.sel(arm=name)[band, 0]), color=color, linewidth=1, linestyle="--")
    for height, (_, arm) in enumerate(rows):
        if not arm:
            continue
        _dot(left, height + 0.2, analysis.gap_uncut.sel(arm=arm).values, QUIET, fill="white")
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
    names = _arms(analysis, "schedule")
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
    right.set_xlabel("decided, lowest band")
    return figure
