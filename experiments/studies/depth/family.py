"""Several networks' depth studies side by side: is localisation a matter of what a network predicts?"""

from collections.abc import Sequence
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from dit_jax.config import DiTConfig
from experiments.frame.drawing import FAINT, QUIET, curve, new_figure
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted
from experiments.studies.depth.page import READINGS, grid_of
from experiments.studies.depth.settings import CLAIMED, LAST, DepthConfig

PREDICTIONS = {"epsilon": ("the noise", "#0072B2"), "v": ("v", "#D55E00"), "x0": ("the image", "#009E73")}
SHOWN = ("readout", "probe")  # panels


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
            "family": "The gap after every block without coupling, by the final layer's readout (left) and by the "
            "linear probe (right), against relative depth. Colours: what the network predicts. Thicker lines: more "
            f"layers. Shaded: the last {100 * LAST:.0f} % of the layers."
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
    """By reading whether the gap is localised in the last layers; None where the interval holds both, or no gap."""
    found: dict[str, bool | None] = {}
    for name in READINGS:
        if f"network_{name}_gap" not in analysis:
            continue
        gap = analysis[f"network_{name}_gap"].isel({grid_of(name): 0, "layer": -1}).values
        _, low, high = analysis[f"network_{name}_share"].values
        there = gap[1] > 0 and np.isfinite([low, high]).all()
        found[name] = None if not there or low <= CLAIMED < high else bool(low > CLAIMED)
    return found


def answer(networks: dict[str, tuple[str, dict[str, bool | None]]]) -> str:
    """One sentence for what was found, one for what follows.

    Args:
      networks: by name, what it predicts and whether its gap is localised, by reading.
    """
    readout: dict[str, list[bool | None]] = {}
    for prediction, found in networks.values():
        readout.setdefault(prediction, []).append(found["readout"])
    parts = [f"{values.count(True)} of {len(values)} that predict {_named(kind)}" for kind, values in readout.items()]
    probes = [found["probe"] for _, found in networks.values() if "probe" in found]
    by_probe = (
        f"; by the linear probe {probes.count(True)} of all {len(probes)}, which is no evidence: the embedding holds "
        "the noisy image, of which the probe decodes the gap before any block"
        if probes
        else ""
    )
    start = (
        f"Read by the final layer, the gap is made in the last {100 * LAST:.0f} % of the layers in "
        f"{' and '.join(', '.join(parts).rsplit(', ', 1))}{by_probe}. "
    )
    noise = readout.pop("epsilon", [])
    others = [value for values in readout.values() for value in values]
    if noise and others and all(noise) and all(value is False for value in others):
        return start + (
            "Localisation in the last layers is a property of predicting the noise and of reading it with the final "
            "layer, not of diffusion transformers."
        )
    if all([*noise, *others]):
        return start + "It does not depend on what is predicted."
    if all(value is False for value in [*noise, *others]):
        return start + "None of these networks has it."
    return start + "What is predicted does not decide it alone, or the intervals do not."


def _named(prediction: str) -> str:
    return PREDICTIONS[prediction][0]


def _table(runs: dict[str, Measured[DepthConfig]], found: dict[str, tuple[DiTConfig, xr.Dataset]]) -> Table:
    rows = []
    for name, (model, analysis) in found.items():
        row = [name, runs[name].subject_name, _named(model.prediction), str(model.depth)]
        row.append(formatted(analysis.network_readout_gap.isel(coupling=0, layer=-1).values))
        row += [formatted(analysis[f"network_readout_{what}"].values) for what in ("share", "half")]
        if "network_probe_gap" in analysis:
            gap = analysis.network_probe_gap.isel(probe_coupling=0)
            row += [formatted(gap.isel(layer=layer).values) for layer in (0, -1)]
            row.append(formatted(analysis.network_probe_share.values))
        else:
            row += ["–"] * 3
        rows.append([*row, formatted(analysis.untrained_readout_gap.isel(coupling=0, layer=-1).values)])
    head = ["run", "network", "predicts", "layers", "gap, nats", "readout: share of the last fifth", "half depth"]
    head += ["probe: gap in the embedding", "at the end", "share of the last fifth", "untrained: gap"]
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
            gap = analysis[f"network_{reading}_gap"].isel({grid_of(reading): 0}).values
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
