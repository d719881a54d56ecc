"""What all figures share: style, axes, bands, files. Measurements are solid, theory is dashed or dotted."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
import numpy as np
import xarray as xr
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from experiments.frame.files import replacing_file

STYLE: Any = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.hashsalt": "syncgap",  # the same figure is the same file
}
# Okabe and Ito's colours, told apart by every kind of colour vision.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8f99")
DPI = 180
INK, QUIET, FAINT = "#1f2430", "#8a8f99", "#d5d8de"
GAP_LABEL = "synchronization gap  $\\Gamma_\\tau = \\tau_{high} - \\tau_{low}$  (nats)"
TAU_LABEL = "commitment level  $\\tau$  (nats)"
LEVEL_LABEL = "log-SNR  $\\ell$  (nats)   generation $\\rightarrow$"
COUPLING_LABEL = "coupling  $g$"


def draw_figures(folder: Path, figures: Mapping[str, Callable[[], Figure]]) -> None:
    """Draws ``{name: how}`` in the common style as ``<name>.png`` and ``.svg``, each in one move."""
    folder.mkdir(exist_ok=True)
    with matplotlib.style.context(["default", STYLE]):  # whatever the user's matplotlibrc says
        for name, draw in figures.items():
            figure = draw()
            _save(figure, folder / f"{name}.png", dpi=DPI, metadata={"Software": None})
            figure.set_layout_engine("none")  # the layout is done
            _save(figure, folder / f"{name}.svg", metadata={"Date": None, "Creator": None})


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of that many inches, and its axes."""
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, **options)


def band_names(analysis: xr.Dataset) -> list[str]:
    """Short names of the bands: those that are stored, or DC and the radial frequency of the others."""
    if "band_name" in analysis.coords:
        return [str(name) for name in analysis.band_name.values]
    return ["DC" if radius == 0 else f"r = {radius:.2f}" for radius in analysis.radius.values]


def band_colors(analysis: xr.Dataset) -> list:
    """One colour per band, dark to light."""
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 0.88, analysis.sizes["band"])))


def curve(
    ax: Axes, x: Any, values: np.ndarray, color: Any, label: str | None = None, *, shade: float = 0.16, **style: Any
) -> None:
    """A curve of (estimate, low, high), in the last axis of `values` (n, 3), its intervals as a band."""
    ax.fill_between(x, values[:, 1], values[:, 2], color=color, alpha=shade, linewidth=0)
    ax.plot(x, values[:, 0], **{"color": color, "label": label, **style})


def coupling_axis(ax: Axes, couplings: np.ndarray, *, name: bool = True, room: float = 0.055) -> None:
    """An x axis on which 0 and couplings of every size can be told apart: linear near 0, logarithmic beyond.

    Args:
      room: share of the axis that a tick label takes; couplings closer than that to a labelled one get no label.
    """
    positive = couplings[couplings > 0]
    width = min(2 * float(positive.min()), 1.0) if positive.size else 1.0
    ax.set_xscale("asinh", linear_width=width)
    place = np.arcsinh(couplings / width)
    place = (place - place[0]) / (np.ptp(place) or 1.0)
    kept: list[int] = []
    for index in [0, len(couplings) - 1, *range(1, len(couplings) - 1)]:
        if all(abs(place[index] - place[other]) >= room for other in kept):
            kept.append(index)
    kept.sort()
    ax.xaxis.set_major_locator(FixedLocator([float(couplings[i]) for i in kept]))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(lambda value, _: f"{value:.4g}")
    if name:
        ax.set_xlabel(COUPLING_LABEL)


def end_labels(ax: Axes, heights: Sequence[float], names: Sequence[tuple[str, Any]]) -> None:
    """Names curves, by text and colour, beside their right ends, kept apart from each other."""
    ax.autoscale_view()
    apart = 0.055 * np.ptp(ax.get_ylim())
    order = np.argsort(heights)
    placed = np.asarray(heights, float)[order]
    for _ in range(100):  # neighbours push each other off
        overlap = np.maximum(apart - np.diff(placed), 0) / 2
        placed[:-1] -= overlap
        placed[1:] += overlap
    for index, height in zip(order.tolist(), placed.tolist(), strict=True):
        text, color = names[index]
        ax.annotate(
            text,
            (1, height),
            (4, 0),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="center",
            color=color,
            fontsize=8.5,
            annotation_clip=False,
        )


def band_legend(figure: Figure, ax: Axes, note: str) -> None:
    """Draws the legend of bands above the panels."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="outside upper left",
        ncols=len(labels),
        title=note or None,
        alignment="left",
        handlelength=1.2,
        columnspacing=1.4,
    )


def _save(figure: Figure, path: Path, **options: Any) -> None:
    with replacing_file(path) as partial:
        figure.savefig(partial, format=path.suffix[1:], **options)
