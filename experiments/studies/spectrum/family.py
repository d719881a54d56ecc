"""Networks of different data side by side: does the gap follow the spectrum, and do networks add a gap of their own?"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from scipy import stats

from experiments.frame.drawing import COLORS, FAINT, INK, band_names, coupling_axis, curve, new_figure
from experiments.frame.draws import with_interval
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, interval, number
from experiments.frame.trainings import Training, over_networks, trained_again
from experiments.frame.verdict import Claim, Control, above, bounds
from experiments.studies.spectrum.page import data_of
from experiments.studies.spectrum.settings import CLAIMS, LIMIT, SpectrumConfig
from ou_theory.bootstrap import family_level, percentile_interval

ARCHITECTURES = {"dit": ("transformer", "o"), "unet": ("U-Net", "s"), "mlp": ("MLP", "^")}
Networks = dict[str, xr.Dataset]  # the analysis of each network, by name


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
        (centre, covariance) = np.polyfit(theory, gaps, 1, cov=True)  # of the residuals, divided by n - 2
        reach = stats.t.ppf(0.975, len(theory) - 2) * np.sqrt(np.diag(covariance))
        across = np.stack([centre - reach, centre + reach], -1)
    over_pairs = [with_interval(v, d) for v, d in zip((slope, intercept), drawn, strict=True)]
    return Line(*over_pairs, *across)


def widest(*intervals: np.ndarray) -> list[float]:
    """The interval that holds all of these that are known."""
    known = np.array([each for each in intervals if np.isfinite(each).all()])
    return [float(known[:, 0].min()), float(known[:, 1].max())]


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
            claims=[more_than_data(found), order_beyond_data(found)],
            tables=[network_table(found), *trained_again(trainings(runs, found)), *band_tables(found)],
            captions={
                "spectrum": "Gap of every network without coupling against that of an exact denoiser of its data's "
                "covariance, with 95 % intervals over pairs. Line: least squares. Dashed: equal gaps.",
                "couplings": "Gap of every network that has attention to couple, against the coupling g.",
            },
            methods=[
                "Every network was measured by `syncgap spectrum` with the same noise, sampler and estimator. The "
                "theory is that of each network's own data; nothing is fitted to a network. If the gap were a "
                "property of the architecture alone, the points would lie on a flat line.",
                "The claim that the gap is more than the spectrum of the data explains is tested on networks whose "
                f"data have a gap of less than {LIMIT:g} nats. It holds if the whole interval of their mean gap is "
                f"above {LIMIT:g} nats, and does not hold if it is wholly below. The interval contains that over pairs "
                "and, from three such networks on, that over networks. The claim that low frequencies commit first "
                "whatever the data is tested on networks whose data have the opposite order. Each interval has the "
                f"level {100 * family_level(CLAIMS):.1f} %, so that both hold the truth together with 95 %.",
            ],
            limits=[
                "The interval over networks treats each network as one independent draw around the line. Networks of "
                "several training seeds on the same data would say more.",
            ],
        ),
        {"spectrum": partial(figure_spectrum, found, fit), "couplings": partial(figure_couplings, found)},
    )


def answer(theory: np.ndarray, gaps: np.ndarray, fit: Line | None) -> str:
    """One sentence with the numbers."""
    if fit is None:
        return "The data of all networks have the same gap, so this run cannot tell whose gap it is."
    largest, smallest = int(np.argmax(theory)), int(np.argmin(theory))
    return (
        f"The gap follows the data: slope {formatted(fit.slope)}, intercept {formatted(fit.intercept)} nats over "
        f"{len(theory)} networks{_across(fit)}. It is {formatted(gaps[largest])} nats where the data's is "
        f"{number(theory[largest])}, and {formatted(gaps[smallest])} where the data's is {number(theory[smallest])}."
        if fit.slope[1] > 0
        else f"These {len(theory)} networks do not show that the gap follows the data: slope {formatted(fit.slope)}."
    )


def _across(fit: Line) -> str:
    if not np.isfinite(fit.slope_over_networks).all():
        return ""
    return (
        f" (over networks: slope {interval(fit.slope_over_networks.tolist())}, intercept "
        f"{interval(fit.intercept_over_networks.tolist())})"
    )


def more_than_data(found: Networks) -> Claim:
    """Claim 1b: a network whose data have no gap has one."""
    flat = {name: at for name, at in found.items() if abs(float(at.theory_gap)) < LIMIT}
    title, measure = "The gap is more than the spectrum of the data explains", "gap where the data have none, nats"
    if not flat:
        statement = f"No network here was trained on data whose own gap is below {LIMIT:g} nats."
        return Claim(1, title, "not tested", measure, None, None, statement)
    gaps = np.array([float(at.gap[0, 0]) for at in flat.values()])
    drawn = np.mean([at.gap_draws.values for at in flat.values()], 0)
    level = family_level(CLAIMS)
    ends = widest(np.array(percentile_interval(drawn, level)), over_networks(gaps, level))
    strongest, at = max(found.items(), key=lambda item: float(item[1].theory_gap))
    return Claim(
        1,
        title,
        above(ends, LIMIT),
        measure,
        float(gaps.mean()),
        ends,
        f"Mean over {', '.join(flat)}, whose data have a gap of less than {LIMIT:g} nats. The claim asks for a gap of "
        f"more than {LIMIT:g} nats.",
        [
            Control(
                strongest,
                float(at.gap[0, 0]),
                bounds(at.gap_claimed),
                None,
                f"The network whose data have the largest gap, {number(float(at.theory_gap))} nats.",
            )
        ],
        level,
    )


def order_beyond_data(found: Networks) -> Claim:
    """Claim 4b: a network whose data have the opposite order has low before high."""
    opposite = {name: at for name, at in found.items() if float(at.theory_gap) < -LIMIT}
    title = "Low frequencies commit first whatever the data"
    measure = "Kendall's tau-b where the data have the opposite order"
    if not opposite:
        statement = "No network here was trained on data whose high frequencies are stronger."
        return Claim(4, title, "not tested", measure, None, None, statement)
    orders = np.array([at.order_claimed.values for at in opposite.values()])
    ends = [float(orders[:, 1].min()), float(orders[:, 2].max())]
    return Claim(
        4,
        title,
        above(ends),
        measure,
        float(orders[:, 0].mean()),
        ends,
        f"In the data of {', '.join(opposite)} high frequencies are stronger. The interval contains all of theirs.",
        [
            Control(name, float(at.order_claimed[0]), bounds(at.order_claimed), None, f"Trained on {data_of(at)}.")
            for name, at in found.items()
            if float(at.theory_gap) > LIMIT
        ],
        family_level(CLAIMS),
    )


def network_table(found: Networks) -> Table:
    """Over networks: data, gaps of data and network by two estimators, order."""
    rows = [
        [
            name,
            ARCHITECTURES[at.attrs.get("architecture", "dit")][0],
            data_of(at),
            number(float(at.theory_gap)),
            formatted(at.gap[0]),
            formatted(at.gap_by_energy[0]),
            number(float(at.theory_order)),
            formatted(at.order[0]),
        ]
        for name, at in found.items()
    ]
    head = ["network", "architecture", "trained on", "gap of the data, nats", "gap, nats", "gap by all energy"]
    return Table("Networks without coupling", [*head, "Kendall's tau-b of the data", "Kendall's tau-b"], rows)


def trainings(runs: Sequence[Measured[SpectrumConfig]], found: Networks) -> list[Training]:
    """The networks as `trained_again` takes them; they were all measured alike."""
    known = [(run.model.to_dict(), run.subject_name, found[run.subject_name]) for run in runs]
    return [
        Training(name, f"{architecture_of(at)} on {data_of(at)}", form, {}, at.coupling.values, at.gap.values)
        for form, name, at in known
    ]


def architecture_of(analysis: xr.Dataset) -> str:
    """The kind of network, in a word."""
    return ARCHITECTURES[analysis.attrs.get("architecture", "dit")][0]


def band_tables(found: Networks) -> list[Table]:
    """Level of every network minus that of its data, by band; a table for each set of bands."""
    sets: dict[tuple[str, ...], list[str]] = {}
    for name, at in found.items():
        sets.setdefault(tuple(band_names(at)), []).append(name)
    return [
        Table(
            "Commitment level of each band minus theory of the data, nats",
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


def colors(found: Networks) -> dict[str, str]:
    """A colour for every kind of data."""
    kinds = list(dict.fromkeys(at.attrs["transformation"] for at in found.values()))
    return {kind: COLORS[i % len(COLORS)] for i, kind in enumerate(kinds)}


def figure_spectrum(found: Networks, fit: Line | None) -> Figure:
    """Gap of the networks against that of their data."""
    figure, ax = new_figure(7.2, 4.2)
    theory = np.array([float(at.theory_gap) for at in found.values()])
    ends = np.array([theory.min() - 0.4, theory.max() + 0.4])
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    ax.plot(ends, ends, color=INK, linestyle="--", linewidth=1, label="equal gaps")
    if fit is not None:
        ax.plot(ends, fit.slope[0] * ends + fit.intercept[0], color=INK, linewidth=1, label="least squares")
    named = set()
    for at in found.values():
        kind, (architecture, marker) = at.attrs["transformation"], ARCHITECTURES[at.attrs.get("architecture", "dit")]
        label = kind if architecture == "transformer" else f"{kind}, {architecture}"
        gap, color = at.gap[0].values, colors(found)[kind]
        ax.vlines(float(at.theory_gap), gap[1], gap[2], color=color, linewidth=1.2)
        style = {"color": color, "marker": marker, "markersize": 5, "linestyle": "none"}
        ax.plot([float(at.theory_gap)], [gap[0]], label=None if label in named else label, **style)
        named.add(label)
    ax.set_xlabel("gap of the data: exact denoiser of their covariance  (nats)")
    ax.set_ylabel("gap of the network  (nats)")
    figure.legend(loc="outside right upper")
    return figure


def figure_couplings(found: Networks) -> Figure:
    """The gap against the coupling, by network."""
    figure, ax = new_figure(7.2, 3.6)
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
        figure.legend(loc="outside right upper")
    ax.set_ylabel("gap  (nats)")
    return figure
