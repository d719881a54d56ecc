"""Figures of a sweep: every claim against the axes, as lines and as heat maps, and the curves behind them."""

import textwrap
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.frame.drawing import COLORS, FAINT, INK, QUIET, coupling_axis, curve, new_figure
from experiments.sweeps.layout import Layout, level_of, measure_of, named, spelled, tested
from experiments.sweeps.repeats import over_repeats

MAP = "cividis"  # told apart by every kind of colour vision, and light from dark in print
MARKERS = "osD^vP*X"
MOST_LABELS, MOST_PANELS, PANELS_IN_ROW = 8, 12, 4
LEAST_WIDTH, ROW, MOST_HEIGHT = 0.6, 0.38, 5.0  # inches: of a square of a heat map with words in it, and of the map
MOST_TICKS = 24
HATCHES = {"holds": "", "does not hold": "\\\\\\", "undecided": "..", "repeats differ": "++", "no result": "xxx"}


class Curve(NamedTuple):
    """What the cells of a study draw against a dimension of their own."""

    variable: str  # its interval has the ending _interval
    dim: str
    which: dict[str, str]  # where along further dimensions
    label: str


CURVES = {"compare": Curve("gap", "coupling", {"source": "network"}, "gap  (nats)")}  # by study


def sweep_figures(result: xr.Dataset, layout: Layout) -> dict[str, tuple[str, Callable[[], Figure]]]:
    """The figures that a sweep has, by name: caption, and how to draw it."""
    if layout.first is None or not tested(result):
        return {}
    note = f" {note}" if (note := layout.note(result)) else ""
    x, lines = _x_and_lines(result, layout)
    by = f", by {named(lines)}" if lines else ""
    over = (
        f" Small points are single cells, shades the interval of the mean over {layout.repeats_in_words}, which needs "
        "three."
        if layout.repeats
        else ""
    )
    found: dict[str, tuple[str, Callable[[], Figure]]] = {}
    drawn = CURVES.get(result.attrs["study"])
    if drawn is not None and {drawn.variable, f"{drawn.variable}_interval"} <= set(result.data_vars):
        panels = min(result.sizes[layout.first], MOST_PANELS)
        few = f" The first {panels} values are shown." if panels < result.sizes[layout.first] else ""
        lines_by = f", lines by {named(layout.second)}" if layout.second else ""
        caption = f"{drawn.variable.capitalize()} against the {drawn.dim} for every {named(layout.first)}{lines_by}"
        shade = "95 % intervals over pairs"
        if layout.repeats:
            shade = f"95 % intervals of the mean over {layout.repeats_in_words}, which need three"
        found["curves"] = (f"{caption}. Shades are {shade}.{few}{note}", partial(figure_curves, result, layout, drawn))
    caption = (
        f"Value of every claim against {named(x)}{by}. Filled points are cells on which the claim holds, open ones "
    )
    caption += (
        f"those on which it does not or cannot be told. Whiskers are the intervals of the claims, over pairs.{over}"
    )
    if _valued(result):
        found["claims"] = (caption + note, partial(figure_claims, result, layout))
    if layout.second is not None:
        caption = f"Value of every claim over {named(layout.first)} and {named(layout.second)}, with the verdict in "
        caption += "words, or by hatches where there is no room. Crossed squares have no result."
        found["maps"] = (caption + note, partial(figure_maps, result, layout))
    return found


def figure_claims(result: xr.Dataset, layout: Layout) -> Figure:
    """Value of every claim against a numeric axis, lines by the other one; a row for each claim."""
    x, lines = _x_and_lines(result, layout)
    claims, facets = _valued(result), _facets(result, layout)
    shared = {"sharex": True, "sharey": "row"}  # words and numbers of the x axis stand below the last row
    figure, axes = new_figure(7.2, 0.9 + 2.1 * len(claims), len(claims), len(facets), squeeze=False, **shared)
    colors = _colors(result.sizes[lines] if lines else 1)
    for row, claim in zip(axes, claims, strict=True):
        level = level_of(result, claim)
        for ax, facet in zip(row, range(len(facets)), strict=True):
            values = _arranged(result.claim_value.isel(claim=claim), layout, x, lines, facet)
            words = _arranged(result.verdict.isel(claim=claim), layout, x, lines, facet)
            place = _x_axis(ax, result, x, room=0.09 * len(facets))
            for index, color in enumerate(colors):
                label = spelled(result, lines, index) if lines and _is_labelled(index, len(colors)) else None
                style: dict[str, Any] = {"color": color, "marker": MARKERS[index % len(MARKERS)]}
                style |= {"label": label and _plain(label), "joined": _is_numeric(result, x)}
                at = _beside(ax, place, index, len(colors))
                _cells(ax, at, values[:, index], words[:, index], level, **style)
            ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
            _title(ax, result, claim, facets, facet, measured=True)
    for ax in axes[-1]:
        ax.set_xlabel(_plain(named(x)))
    _legend(figure, axes[0, 0], lines)
    return figure


def figure_maps(result: xr.Dataset, layout: Layout) -> Figure:
    """Value of every claim over the first two axes, with verdicts; a row for each claim."""
    down, across = layout.first, layout.second
    assert down is not None
    assert across is not None
    claims, facets = tested(result), _facets(result, layout)
    high_enough = result.sizes[down] * ROW <= MOST_HEIGHT
    height = 0.9 + (max(1.0, ROW * result.sizes[down]) if high_enough else MOST_HEIGHT)
    figure, axes = new_figure(7.2, 0.4 + height * len(claims), len(claims), len(facets), squeeze=False)
    width = 5.2 / len(facets) / result.sizes[across]
    fold = int(14 * width) if high_enough and width >= LEAST_WIDTH else 0  # letters of a line
    status = [_arranged(result.status, layout, down, across, facet) for facet in range(len(facets))]
    for row, claim in zip(axes, claims, strict=True):
        arranged = [
            _arranged(result.claim_value.isel(claim=claim).sel(bound="estimate"), layout, down, across, facet)
            for facet in range(len(facets))
        ]
        means = [over_repeats(each, 0.95)[..., 0] for each in arranged]
        known = np.concatenate([each[np.isfinite(each)] for each in means])
        low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 1.0)
        if high - low < 1e-6 * max(abs(low), abs(high), 1e-6):  # all alike
            low, high = low - 0.5, high + 0.5
        for facet, (ax, mean) in enumerate(zip(row, means, strict=True)):
            drawn = ax.imshow(mean, MAP, vmin=low, vmax=high, aspect="auto")
            words = _arranged(result.verdict.isel(claim=claim), layout, down, across, facet)
            for place in np.ndindex(mean.shape):
                shade = (float(mean[place]) - low) / (high - low)
                _square(ax, place, float(mean[place]), words[place], status[facet][place], shade, fold)
            ax.set_xticks(*_ticks(result, across), rotation=0 if width > 0.5 else 90)
            ax.set_yticks(*_ticks(result, down))
            ax.set_ylabel(_plain(named(down)) if facet == 0 else "")
            ax.set_xlabel(_plain(named(across)) if claim == claims[-1] else "")
            ax.spines[:].set_visible(False)
            _title(ax, result, claim, facets, facet)
        bar = figure.colorbar(drawn, ax=row.tolist(), pad=0.01)
        bar.set_label(_plain(textwrap.fill(measure_of(result, claim), 26)), fontsize=7)
    if not fold:
        patches = [
            Patch(facecolor="white", edgecolor=INK, hatch=hatch, label=word)
            for word, hatch in HATCHES.items()
            if word != "repeats differ" or layout.repeats
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=len(patches))
    return figure


def figure_curves(result: xr.Dataset, layout: Layout, drawn: Curve) -> Figure:
    """What every cell draws against a dimension of its own: a panel for each value of the first axis, lines by the
    second."""
    x, lines, facets = layout.first, layout.second, _facets(result, layout)
    assert x is not None
    panels = min(result.sizes[x], MOST_PANELS)
    columns = panels if len(facets) > 1 else min(panels, PANELS_IN_ROW)
    rows = len(facets) if len(facets) > 1 else -(-panels // columns)
    figure, axes = new_figure(7.2, 0.6 + 2.2 * rows, rows, columns, squeeze=False, sharex=True, sharey=True)
    at = result[[drawn.variable, f"{drawn.variable}_interval"]].sel(drawn.which)
    against = at[drawn.dim].values
    colors = _colors(result.sizes[lines] if lines else 1)
    for facet in range(len(facets)):
        estimate = _arranged(at[drawn.variable], layout, x, lines, facet)  # (x, lines, repeats, against)
        ends = [
            _arranged(at[f"{drawn.variable}_interval"].sel(bound=bound), layout, x, lines, facet)
            for bound in ("low", "high")
        ]
        for panel in range(panels):
            ax = axes[facet, panel] if len(facets) > 1 else axes.flat[panel]
            for index, color in enumerate(colors):
                label = spelled(result, lines, index) if lines and _is_labelled(index, len(colors)) else None
                values = np.stack([each[panel, index] for each in (estimate, *ends)], -1)  # (repeats, against, 3)
                if layout.repeats is None:
                    shown = values[0]
                else:
                    shown = over_repeats(np.moveaxis(values[..., 0], 0, -1), 0.95)
                there = np.isfinite(shown[:, 0])
                style = {"marker": MARKERS[index % len(MARKERS)], "markersize": 3, "linewidth": 1.2}
                curve(ax, against[there], shown[there], color, label and _plain(label), **style)
            ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
            lowest = facet == rows - 1 if len(facets) > 1 else panel >= panels - columns
            coupling_axis(ax, against, name=lowest, room=0.2)
            facet_word = f"\n{facets[facet]}" if facets[facet] else ""
            ax.set_title(_plain(f"{named(x)} {spelled(result, x, panel)}{facet_word}"), fontsize=8.5)
    for ax in axes.flat[panels if len(facets) == 1 else rows * columns :]:
        ax.set_visible(False)
    for ax in axes[:, 0]:
        ax.set_ylabel(drawn.label)
    _legend(figure, axes[0, 0], lines)
    return figure


def _cells(
    ax: Axes,
    x: np.ndarray,
    values: np.ndarray,
    words: np.ndarray,
    level: float,
    *,
    joined: bool,
    color: Any,
    marker: str,
    label: str | None,
) -> None:
    """One line: values (n, R, 3) of the cells with their intervals, filled where the claim holds; of several repeats
    their mean with its interval."""
    alone = values.shape[1] == 1
    means = values[:, 0] if alone else over_repeats(values[..., 0], level)
    there = np.isfinite(means[:, 0])
    line = {"linestyle": "-" if joined else "none", "linewidth": 1.2}
    ax.plot(x[there], means[there, 0], color=color, zorder=2, **line)
    ax.plot([], [], color=color, marker=marker, markersize=4, label=label, **line)
    for repeat in range(values.shape[1]):
        at, word = values[:, repeat], words[:, repeat]
        width, alpha, size = (1.1, 1.0, 4) if alone else (0.6, 0.5, 2.5)
        ax.vlines(x, at[:, 1], at[:, 2], color=color, linewidth=width, alpha=alpha, zorder=2)
        for holds in (True, False):
            shown = (word == "holds") == holds
            face = color if holds else "white"
            ax.plot(x[shown], at[shown, 0], marker, color=color, markersize=size, mfc=face, zorder=3)
    if not alone and joined:
        ax.fill_between(x, means[:, 1], means[:, 2], color=color, alpha=0.2, linewidth=0, zorder=1)
    elif not alone:  # between words there is nothing
        ax.vlines(x, means[:, 1], means[:, 2], color=color, alpha=0.2, linewidth=9, zorder=1)


def _beside(ax: Axes, x: np.ndarray, index: int, count: int) -> np.ndarray:
    """Places of one of several lines, moved a little so that their points do not lie on each other."""
    place = np.log(x) if ax.get_xscale() == "log" else x.astype(float)
    reach = 0.3 if x.dtype.kind != "f" else min(0.03 * np.ptp(place), 0.3 * np.diff(np.sort(place)).min())
    place = place + reach * (index - (count - 1) / 2) / count
    return np.exp(place) if ax.get_xscale() == "log" else place


def _square(
    ax: Axes,
    place: tuple[int, ...],
    mean: float,
    words: np.ndarray,
    status: np.ndarray,
    shade: float,
    fold: int,
) -> None:
    """What is written on a square of a heat map, in lines of `fold` letters: value and verdict, or why there is none.
    Where there is no room, for 0 letters, verdicts are hatches."""
    there = status == "complete"
    if not there.any():
        word, kind = ("failed" if (status == "failed").any() else "missing"), "no result"
    elif len(words) == 1:
        word, kind = str(words[0]), str(words[0])
    else:
        holding = int((words[there] == "holds").sum())
        word = f"{holding} of {int(there.sum())} hold"
        alike = set(words[there].tolist())
        kind = alike.pop() if len(alike) == 1 else "repeats differ"
    shown = np.isfinite(mean)
    color = ("black" if shade > 0.55 else "white") if shown else INK
    if not shown:
        box = {"facecolor": "white", "edgecolor": QUIET, "hatch": HATCHES["no result"], "linewidth": 0}
        ax.add_patch(Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, **box))
    elif not fold and HATCHES.get(kind):
        box = {"fill": False, "edgecolor": color, "hatch": HATCHES[kind], "linewidth": 0}
        ax.add_patch(Rectangle((place[1] - 0.5, place[0] - 0.5), 1, 1, **box))
    if fold:
        word = textwrap.fill(word, fold)
        text = f"{mean:.2f}".replace("-", "−") + f"\n{word}" if shown else word
        back = None if shown else {"facecolor": "white", "edgecolor": "none", "pad": 1}
        ax.text(place[1], place[0], text, ha="center", va="center", color=color, fontsize=6.5, bbox=back)


def _arranged(array: xr.DataArray, layout: Layout, x: str, lines: str | None, facet: int) -> np.ndarray:
    """Values of one facet, (x, lines, repeats, ...), with one line or repeat where there is no such axis."""
    wanted = (x, lines, layout.repeats)
    at = {dim: facet if dim == layout.facet else 0 for dim in layout.dims if dim not in wanted}
    found = array.isel(at).transpose(*(dim for dim in wanted if dim is not None), ...).values
    for axis, dim in enumerate(wanted):
        found = np.expand_dims(found, axis) if dim is None else found
    return found


def _x_and_lines(result: xr.Dataset, layout: Layout) -> tuple[str, str | None]:
    """The axis along x, a numeric one of the first two if there is one, and that of the lines."""
    first, second = layout.first, layout.second
    assert first is not None
    if second is not None and not _is_numeric(result, first) and _is_numeric(result, second):
        return second, first
    return first, second


def _is_numeric(result: xr.Dataset, dim: str) -> bool:
    return dim not in ("point", "seed") and result[dim].dtype.kind in "fiu"


def _x_axis(ax: Axes, result: xr.Dataset, x: str, room: float) -> np.ndarray:
    """Prepares an x axis and returns where its values lie: as floats for numbers, as integers for words."""
    if not _is_numeric(result, x):
        places, words = _ticks(result, x)
        long = max(map(len, words)) * len(words) > 30
        ax.set_xticks(places, words, rotation=30 if long else 0, ha="right" if long else "center")
        ax.set_xlim(-0.5, result.sizes[x] - 0.5)
        return np.arange(result.sizes[x])
    values = result[x].values.astype(float)
    place = values
    if values.min() > 0 and values.max() >= 8 * values.min():
        ax.set_xscale("log")
        place = np.log(values)
    place = (place - place.min()) / (np.ptp(place) or 1.0)
    kept: list[int] = []
    for index in range(len(values)):  # labels that have room
        if all(abs(place[index] - place[other]) >= room for other in kept):
            kept.append(index)
    ax.xaxis.set_major_locator(FixedLocator(values[kept].tolist()))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    return values


def _ticks(result: xr.Dataset, dim: str) -> tuple[np.ndarray, list[str]]:
    """Places of an axis and their words, of every other place and so on where there are many."""
    places = np.arange(0, result.sizes[dim], -(-result.sizes[dim] // MOST_TICKS))
    return places, [_plain(spelled(result, dim, int(index))) for index in places]


def _valued(result: xr.Dataset) -> list[int]:
    """Indices of the tested claims that have a value in at least one cell."""
    known = np.isfinite(result.claim_value.sel(bound="estimate")).transpose("claim", ...).values
    return [claim for claim in tested(result) if known[claim].any()]


def _facets(result: xr.Dataset, layout: Layout) -> list[str]:
    """The facets in words; one without a word where there are none."""
    if layout.facet is None:
        return [""]
    return [f"{named(layout.facet)} {spelled(result, layout.facet, i)}" for i in range(result.sizes[layout.facet])]


def _title(ax: Axes, result: xr.Dataset, claim: int, facets: list[str], facet: int, *, measured: bool = False) -> None:
    """The claim over the whole row, with what it measures; the facet over each column."""
    lines = [str(result.claim.values[claim])]
    if measured:
        lines += textwrap.wrap(measure_of(result, claim), 96)
    said = {"fontsize": 8.5, "va": "bottom"}
    if not facets[facet]:
        ax.set_title(_plain("\n".join(lines)), **said)
        return
    ax.set_title(_plain("\n".join([*(" " for _ in lines), facets[facet]])), **said)
    if facet == 0:  # in the room above all columns, over which it may reach
        place = {"xycoords": "axes fraction", "textcoords": "offset points", "annotation_clip": False}
        pad = matplotlib.rcParams["axes.titlepad"]
        ax.annotate(_plain("\n".join([*lines, " "])), (0, 1), (0, pad), **place, **said).set_in_layout(False)


def _colors(count: int) -> list[Any]:
    """Colours of lines: those of all figures, or of a map where these do not suffice."""
    if count <= len(COLORS):
        return list(COLORS[:count])
    return list(matplotlib.colormaps[MAP](np.linspace(0, 0.95, count)))


def _is_labelled(index: int, count: int) -> bool:
    return index % -(-count // MOST_LABELS) == 0


def _legend(figure: Figure, ax: Axes, lines: str | None) -> None:
    handles, labels = ax.get_legend_handles_labels()
    if lines and handles:
        options: dict[str, Any] = {"ncols": min(len(labels), 4), "title": _plain(named(lines)), "alignment": "left"}
        figure.legend(handles, labels, loc="outside upper left", handlelength=1.6, **options)


def _plain(text: str) -> str:
    """Text without mathematics in it."""
    return text.replace("$", r"\$")
