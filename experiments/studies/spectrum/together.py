"""Networks of different data side by side: does the gap follow the spectrum, and what is left of it for the network?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats

from experiments.frame.drawing import FAINT, INK, band_names, coupling_axis, curve, new_figure
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, number
from experiments.frame.verdict import Claim, Control, Verdict, above
from experiments.studies.spectrum.page import data_of
from experiments.studies.spectrum.settings import LIMIT, SpectrumConfig
from ou_theory.bootstrap import basic_interval

COLORS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8f99"]


@dataclass(frozen=True)
class Line:
    """Gap of the networks against that of their data: slope and intercept, (3,) each with the interval over pairs, and
    the interval (2,) over networks, which needs three of them."""

    slope: np.ndarray
    intercept: np.ndarray
    slope_over_networks: np.ndarray
    intercept_over_networks: np.ndarray


def line(theory: np.ndarray, gaps: np.ndarray, draws: np.ndarray) -> Line | None:
    """Least squares of gaps (n,) on those of the theory (n,). None if the theory does not differ.

    Args:
      draws: (draws, n) of resampled pairs, the same pairs in every network.
    """
    if len(theory) < 2 or np.ptp(theory) < 1e-3:
        return None
    slope, intercept = np.polyfit(theory, gaps, 1)
    drawn = np.polyfit(theory, draws.T, 1)
    across = np.full((2, 2), np.nan)
    if len(theory) > 2:
        fit = stats.linregress(theory, gaps)
        reach = stats.t.ppf(0.975, len(theory) - 2) * np.array([fit.stderr, fit.intercept_stderr])
        centre = np.array([slope, intercept])
        across = np.stack([centre - reach, centre + reach], -1)
    over_pairs = [np.stack([v, *basic_interval(v, d)], -1) for v, d in zip((slope, intercept), drawn, strict=True)]
    return Line(*over_pairs, *across)


def widest(*intervals: np.ndarray) -> list[float]:
    """The interval that holds all of these that are known."""
    known = np.array([each for each in intervals if np.isfinite(each).all()])
    return [float(known[:, 0].min()), float(known[:, 1].max())]


def beyond(interval: Sequence[float]) -> Verdict:
    """Whether the gap is more than the data's: holds if what is left where theory has none is wholly beyond `LIMIT`,
    does not hold if it is wholly below it."""
    return above(interval, LIMIT)


def together(runs: Sequence[Measured[SpectrumConfig]]) -> Page:
    """Section and figures over the runs of all networks."""
    found = {run.subject_name: run.load("analysis") for run in runs}
    found = dict(sorted(found.items(), key=lambda item: -float(item[1].theory_gap)))
    theory = np.array([float(at.theory_gap) for at in found.values()])
    gaps = np.stack([at.gap[0].values for at in found.values()])
    fit = line(theory, gaps[:, 0], np.stack([at.gap_draws.values for at in found.values()], -1))
    return Page(
        Section(
            title=f"Whose gap is it? {len(found)} networks on data of different spectra",
            question="Is the synchronization gap, and its order, a property of the architecture or of the spectrum of "
            "the data?",
            answer=answer(theory, gaps, fit),
            claims=[] if fit is None else [more_than_data(fit, found), order_beyond_data(found)],
            tables=[network_table(found), *band_tables(found)],
            captions={
                "spectrum": "Gap of every network without coupling against that of an exact denoiser of its data's "
                "covariance, with 95 % intervals over pairs. Line: least squares. Dashed: the gap is the data's.",
                "couplings": "The gap of every network that can be coupled, against the coupling.",
            },
            methods=[
                "Every network through `syncgap spectrum`: the same pairs of noise, sampler and estimator. The theory "
                "is that of each network's own data; nothing is fitted to a network. If the gap were the "
                "architecture's, the points would lie on a flat line.",
                f"The intercept is the gap where the data have none. The claim that the gap is more than the data's "
                f"holds if the intercept is above {LIMIT:g} nats with its whole interval, the wider of that over pairs "
                "and that over networks, and does not hold if it is wholly below. The claim that low frequencies "
                "commit first whatever the data do does not hold if a network whose data say the opposite does the "
                "opposite.",
            ],
            limits=[
                "The interval over networks takes each as one draw from around the line. Networks of several training "
                "seeds on the same data say more.",
            ],
        ),
        {"spectrum": partial(figure_spectrum, found, fit), "couplings": partial(figure_couplings, found)},
    )


def answer(theory: np.ndarray, gaps: np.ndarray, fit: Line | None) -> str:
    """One sentence with the numbers."""
    if fit is None:
        return "The networks' data have the same gap: nothing can be said of whose it is."
    largest, smallest = int(np.argmax(theory)), int(np.argmin(theory))
    return (
        f"The gap follows the data: slope {formatted(fit.slope)}, intercept {formatted(fit.intercept)} nats over "
        f"{len(theory)} networks. It is {formatted(gaps[largest])} nats where the data's is {number(theory[largest])}, "
        f"and {formatted(gaps[smallest])} where the data's is {number(theory[smallest])}."
        if fit.slope[1] > 0
        else f"The gap does not follow the data: slope {formatted(fit.slope)} over {len(theory)} networks."
    )


def more_than_data(fit: Line, found: dict[str, xr.Dataset]) -> Claim:
    """Claim 1b."""
    interval = widest(fit.intercept[1:], fit.intercept_over_networks)
    name, flattest = min(found.items(), key=lambda item: abs(float(item[1].theory_gap)))
    return Claim(
        1,
        "The gap is more than the spectrum of the data explains",
        beyond(interval),
        "intercept of the networks' gaps against those of their data, nats",
        float(fit.intercept[0]),
        interval,
        f"Where the data have no gap, {number(fit.intercept[0])} nats are left; the gap changes by "
        f"{formatted(fit.slope)} nats for every nat of the data's.",
        [
            Control(
                name,
                float(flattest.gap[0, 0]),
                [float(v) for v in flattest.gap[0, 1:]],
                beyond(flattest.gap[0, 1:].values) == "holds",
                f"The network whose data have the smallest gap, {number(float(flattest.theory_gap))}: its own gap.",
            )
        ],
    )


def order_beyond_data(found: dict[str, xr.Dataset]) -> Claim:
    """Claim 4b."""
    opposite = {name: at for name, at in found.items() if float(at.theory_order) < 0}
    if not opposite:
        return Claim(
            4,
            "Low frequencies commit first whatever the data",
            "not tested",
            "Kendall's tau-b where the data say the opposite",
            None,
            None,
            "No network here was trained on data whose high frequencies are stronger.",
        )
    orders = np.array([at.order[0].values for at in opposite.values()])
    interval = [float(orders[:, 1].min()), float(orders[:, 2].max())]
    return Claim(
        4,
        "Low frequencies commit first whatever the data",
        above(interval),
        "Kendall's tau-b of level against frequency where the data say the opposite, smallest and largest interval",
        float(orders[:, 0].mean()),
        interval,
        f"In {', '.join(opposite)} the data's high frequencies are stronger.",
        [
            Control(
                name, float(at.order[0, 0]), [float(v) for v in at.order[0, 1:]], None, data_of(at).capitalize() + "."
            )
            for name, at in found.items()
            if name not in opposite
        ],
    )


def network_table(found: dict[str, xr.Dataset]) -> Table:
    """Over networks: data, gaps of data and network by two estimators, order."""
    rows = [
        [
            name,
            data_of(at),
            number(float(at.theory_gap)),
            formatted(at.gap[0]),
            formatted(at.gap_by_energy[0]),
            number(float(at.theory_order)),
            formatted(at.order[0]),
        ]
        for name, at in found.items()
    ]
    head = ["network", "trained on", "gap of the data, nats", "gap, nats", "gap by all energy"]
    return Table("Networks without coupling", [*head, "order of the data", "order"], rows)


def band_tables(found: dict[str, xr.Dataset]) -> list[Table]:
    """Level of every network less that of its data, by band; a table for each set of bands."""
    sets: dict[tuple[str, ...], list[str]] = {}
    for name, at in found.items():
        sets.setdefault(tuple(band_names(at)), []).append(name)
    return [
        Table(
            "Level of each band less that of the data's theory, nats",
            ["network", *names],
            [
                [
                    member,
                    *(
                        formatted(found[member].tau[0, b] - float(found[member].theory_tau[b]))
                        for b in range(len(names))
                    ),
                ]
                for member in members
            ],
        )
        for names, members in sets.items()
    ]


def colors(found: dict[str, xr.Dataset]) -> dict[str, str]:
    """A colour for every kind of data."""
    kinds = list(dict.fromkeys(at.attrs["transformation"] for at in found.values()))
    return {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(kinds)}


def figure_spectrum(found: dict[str, xr.Dataset], fit: Line | None) -> Figure:
    """Gap of the networks against that of their data."""
    figure, ax = new_figure(6.4, 4.2)
    theory = np.array([float(at.theory_gap) for at in found.values()])
    ends = np.array([theory.min() - 0.4, theory.max() + 0.4])
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    ax.plot(ends, ends, color=INK, linestyle="--", linewidth=1, label="the gap is the data's")
    if fit is not None:
        ax.plot(ends, fit.slope[0] * ends + fit.intercept[0], color=INK, linewidth=1, label="least squares")
    for kind, color in colors(found).items():
        members = [at for at in found.values() if at.attrs["transformation"] == kind]
        x = [float(at.theory_gap) for at in members]
        gaps = np.stack([at.gap[0].values for at in members])
        ax.vlines(x, gaps[:, 1], gaps[:, 2], color=color, linewidth=1.2)
        ax.plot(x, gaps[:, 0], color=color, marker="o", markersize=5, linestyle="none", label=kind)
    ax.set_xlabel("gap of the data: exact denoiser of their covariance  (nats)")
    ax.set_ylabel("gap of the network  (nats)")
    ax.legend()
    return figure


def figure_couplings(found: dict[str, xr.Dataset]) -> Figure:
    """The gap against the coupling, by network."""
    figure, ax = new_figure(6.4, 3.6)
    shown = {name: at for name, at in found.items() if at.sizes["coupling"] > 1}
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    colour, named = colors(found), set()
    for at in shown.values():
        kind = at.attrs["transformation"]
        label = None if kind in named else kind
        named.add(kind)
        curve(ax, at.coupling.values, at.gap.values, colour[kind], label, marker="o", markersize=3.5)
    if shown:
        coupling_axis(ax, next(iter(shown.values())).coupling.values)
        ax.legend()
    ax.set_ylabel("gap  (nats)")
    return figure
