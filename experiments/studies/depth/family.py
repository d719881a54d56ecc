"""Several networks' depth studies side by side: is the gap made in the last layers, and by which reading?"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from dit_jax.config import DiTConfig
from experiments.frame.drawing import FAINT, QUIET, curve, new_figure
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted
from experiments.frame.verdict import Verdict
from experiments.studies.depth.settings import CLAIMED, LAST, DepthConfig
from experiments.studies.depth.verdicts import READINGS, final_gap, known_gap, verdict_of

PREDICTIONS = {
    "epsilon": ("the noise", "#0072B2"),
    "v": ("v", "#D55E00"),
    "x0": ("the image", "#009E73"),
    "velocity": ("the velocity", "#CC79A7"),
    "score": ("the score", "#E69F00"),
}
SHOWN = ("readout", "scaled")  # panels


def together(runs: Sequence[Measured[DepthConfig]]) -> Page:
    """Section and figures over finished runs of the depth study."""
    order = sorted(runs, key=lambda run: (run.model.prediction, run.model.depth, run.run.path.name))
    found = {run.run.path.name: (run.model, run.load("analysis")) for run in order}
    section = Section(
        title=f"Depth: {len(runs)} networks side by side",
        question="Is a gap that is made in the last layers a property of diffusion transformers, or of what they "
        "are trained to predict?",
        answer=answer({name: (model.prediction, localised(at)) for name, (model, at) in found.items()}),
        tables=[_table({run.run.path.name: run for run in order}, found)],
        captions={
            "family": "The gap after every block without coupling, by the final layer's readout (left) and up to "
            "one fitted scalar (right), against relative depth. Colours: what the network predicts. Thicker lines: "
            f"more layers. Shaded: the last {100 * LAST:.0f} % of the layers. No line: bands commit before the "
            "window, and the gap is not known."
        },
        methods=[
            "Every network through `syncgap depth`; see its section. Localised by a reading: the share of the "
            f"final gap that is made in the last {100 * LAST:.0f} % of the layers is above {CLAIMED:g} with its "
            "whole interval."
        ],
        limits=[
            "One network of each kind and depth: its interval does not speak for another training run.",
            "Networks trained alike need not be equally good: the weight of the noise levels in the loss depends "
            "on what is predicted.",
        ],
    )
    return Page(section, {"family": partial(figure_family, found)})


def localised(analysis: xr.Dataset) -> dict[str, bool | None]:
    """By reading whether the gap is localised in the last layers; None where that is undecided, or there is no gap."""
    known: dict[Verdict, bool] = {"holds": True, "does not hold": False}
    readings = (name for name in READINGS if f"network_{name}_gap" in analysis)
    return {name: known.get(verdict_of(analysis, name)[0]) for name in readings}


def answer(networks: dict[str, tuple[str, dict[str, bool | None]]]) -> str:
    """What each reading says of how many networks, and what follows.

    Args:
      networks: by name, what it predicts and whether its gap is localised, by reading.
    """
    by_readout = _counted(networks, "readout")
    start = f"Read by the final layer, the gap is made in the last {100 * LAST:.0f} % of the layers in {by_readout}"
    if not any("scaled" in found for _, found in networks.values()):
        return f"{start}. What the final layer lets through of the noise is in that reading."
    scaled = [found["scaled"] for _, found in networks.values() if "scaled" in found]
    readout = [found["readout"] for _, found in networks.values() if "scaled" in found]
    start += f"; up to one scalar per layer, level and band, in {_counted(networks, 'scaled')}. "
    if all(scaled):
        return start + "Localisation does not depend on how the layers are scaled."
    if any(scaled):
        return start + "The readings of one scalar disagree between networks."
    if any(readout) and all(value is False for value in scaled):
        return start + (
            "What changes in the last layers is the scale of the readout, because it lets less noise through. The gap "
            "itself is not made there."
        )
    if all(value is False for value in [*readout, *scaled]):
        return start + "None of these networks has it."
    return start + "The intervals do not decide."


def _counted(networks: dict[str, tuple[str, dict[str, bool | None]]], reading: str) -> str:
    """Of how many networks of each kind a reading says that the gap is localised."""
    kinds: dict[str, list[bool | None]] = {}
    for prediction, found in networks.values():
        if reading in found:
            kinds.setdefault(prediction, []).append(found[reading])
    parts = [f"{values.count(True)} of {len(values)} that predict {_named(kind)}" for kind, values in kinds.items()]
    return " and ".join(", ".join(parts).rsplit(", ", 1))


def _named(prediction: str) -> str:
    return PREDICTIONS[prediction][0]


def _table(runs: dict[str, Measured[DepthConfig]], found: dict[str, tuple[DiTConfig, xr.Dataset]]) -> Table:
    rows = []
    for name, (model, analysis) in found.items():
        row = [name, runs[name].subject_name, _named(model.prediction), str(model.depth)]
        for reading in ("readout", "scaled", "probe"):
            if f"network_{reading}_gap" not in analysis:
                row += ["–", "–"]
                continue
            row += [formatted(final_gap(analysis, "network", reading)), verdict_of(analysis, reading)[0]]
        shares = [f"network_{band}_gained_share" for band in ("low", "high")]
        row += [formatted(analysis[share].values) if share in analysis else "–" for share in shares]
        rows.append(row)
    head = ["run", "network", "predicts", "layers"]
    for reading in ("readout", "scaled", "probe"):
        head += [f"{READINGS[reading][0]}: gap, nats", "localised"]
    head += ["added by the last fifth: lowest band", "highest band"]
    return Table("Localisation, without coupling", head, rows)


def figure_family(found: dict[str, tuple[DiTConfig, xr.Dataset]]) -> Figure:
    """Gap by relative depth of every network, two readings."""
    figure, axes = new_figure(7.2, 3.6, 1, 2, sharey=True)
    depths = sorted({model.depth for model, _ in found.values()})
    for ax, reading in zip(axes, SHOWN, strict=True):
        ax.axvspan(1 - LAST, 1, color=FAINT, alpha=0.45, linewidth=0, zorder=0)
        ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
        for model, analysis in found.values():
            if f"network_{reading}_gap" not in analysis:
                continue
            gap = known_gap(analysis, "network", reading)
            where = np.linspace(0, 1, len(gap))
            color = PREDICTIONS[model.prediction][1]
            width = 0.9 + 0.9 * depths.index(model.depth)
            curve(ax, where, gap, color, shade=0.1, linewidth=width)
        ax.set_title(READINGS[reading][0])
        ax.set_xlabel("depth")
    axes[0].set_ylabel("gap  $\\tau_{high} - \\tau_{low}$  (nats)")
    for kind, (name, color) in PREDICTIONS.items():
        if any(model.prediction == kind for model, _ in found.values()):
            axes[0].plot([], [], color=color, label=f"predicts {name}")
    for i, depth in enumerate(depths):
        axes[0].plot([], [], color=QUIET, linewidth=0.9 + 0.9 * i, label=f"{depth} layers")
    figure.legend(loc="outside upper left", ncols=6, columnspacing=1.2, handlelength=1.4)
    return figure
