"""Several networks side by side: their gaps, what coupling leaves of them, and how much a training changes."""

from collections.abc import Sequence
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import COLORS, FAINT, coupling_axis, curve, new_figure
from experiments.frame.exact import data_in_words
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted
from experiments.frame.settings import SAMPLER_NAMES
from experiments.frame.trainings import Training, trained_again
from experiments.studies.compare.settings import CompareConfig
from experiments.studies.compare.theory import exact_of

ALIKE = ("steps", "sampler", "guidance", "guided_channels", "guided_coupling", "gate_kind", "classes", "seed", "modes")
Found = dict[str, tuple[Measured[CompareConfig], xr.Dataset]]  # by the folder of the run


def together(runs: Sequence[Measured[CompareConfig]]) -> Page:
    """Section and figure over the runs of all networks."""
    found = {run.run.path.name: (run, run.load("analysis")) for run in runs}
    gaps = {name: with_ends(at, "gap", source="network") for name, (_, at) in found.items()}
    return Page(
        Section(
            title=f"Compare: {len(found)} runs side by side",
            question="How do networks and settings differ in their gap, and how much does training once more change?",
            answer="Gap without coupling, nats: "
            + "; ".join(f"{name} {formatted(values[0])}" for name, values in gaps.items())
            + ".",
            tables=[run_table(found), *trained_again(trainings(found))],
            captions={"gaps": "Gap of every run against the coupling g, with 95 % intervals over pairs."},
            methods=[
                "Every run is shown as its own page has it. Runs count as trainings of one network if the form of the "
                "network, the data and the settings of the measurement are the same."
            ],
            limits=[
                "Intervals in brackets are over pairs. They do not speak for a network trained again; where there are "
                "several trainings, the table of trainings does."
            ],
        ),
        {"gaps": partial(figure_gaps, gaps, {name: at.coupling.values for name, (_, at) in found.items()})},
    )


def with_ends(analysis: xr.Dataset, name: str, **which: str) -> np.ndarray:
    """A variable of one source or theory with its interval, (C, 3)."""
    at = analysis.sel(which)
    return np.concatenate([at[name].values[:, None], at[f"{name}_interval"].values], -1)


def data_of(run: Measured[CompareConfig]) -> str:
    """What the network was trained on, in words, where the run knows it."""
    return data_in_words(run.load("data").attrs["transformation"]) if run.run.holds("data") else "data not on record"


def run_table(found: Found) -> Table:
    """Over runs: what was measured how, the gap and what coupling leaves of it."""
    rows = []
    for name, (run, at) in found.items():
        config, claimed = run.config, at.sel(claimed="network")
        rows.append(
            [
                name,
                run.subject_name,
                run.model.prediction,
                data_of(run),
                f"{config.steps} steps of {SAMPLER_NAMES[config.sampler]}",
                f"{config.guidance:g}",
                config.gate_kind,
                str(config.seed),
                config.modes,
                formatted(with_ends(at, "gap", source="network")[0]),
                formatted(with_ends(at, "gap_excess", theory=exact_of(at))[0]),
                f"{float(claimed.strongest):g}",
                formatted([float(claimed.remains), *claimed.remains_interval.values]),
                formatted([float(claimed.order), *claimed.order_interval.values]),
            ]
        )
    head = [
        "run",
        "network",
        "predicts",
        "trained on",
        "sampler",
        "guidance",
        "gate",
        "modes",
        "seed",
        "gap at g = 0, nats",
    ]
    head += ["less that of an exact denoiser", "strongest g at which the gap is known", "share of the gap left there"]
    note = "Intervals of the last two columns are those of the claims, which hold together with 95 %."
    return Table("The runs", [*head, "Kendall's tau-b at g = 0"], rows, note)


def trainings(found: Found) -> list[Training]:
    """The runs as `trained_again` takes them."""
    return [
        Training(
            name,
            f"{run.model.prediction} on {data_of(run)}",
            run.model.to_dict(),
            {each: getattr(run.config, each) for each in ALIKE},
            at.coupling.values,
            with_ends(at, "gap", source="network"),
        )
        for name, (run, at) in found.items()
    ]


def figure_gaps(gaps: dict[str, np.ndarray], couplings: dict[str, np.ndarray]) -> Figure:
    """The gap against the coupling, by run."""
    figure, ax = new_figure(7.2, 3.6)
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    for i, (name, values) in enumerate(gaps.items()):
        curve(ax, couplings[name], values, COLORS[i % len(COLORS)], name, marker="o", markersize=3.5)
    coupling_axis(ax, np.unique(np.concatenate([*couplings.values()])))
    ax.set_ylabel("gap  (nats)")
    figure.legend(loc="outside right upper")
    return figure
