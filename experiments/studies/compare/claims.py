"""The paper's claims 1, 2 and 4 as statements about a run, and a placeholder for 3."""

import numpy as np
import xarray as xr

from experiments.frame.estimator import ESTIMATORS
from experiments.frame.verdict import LEAST, Claim, Control, Verdict, above, told_from_zero, within
from experiments.studies.compare.analysis import SHUFFLED
from experiments.studies.compare.theory import EXACT, exact_gain, exact_of, recursion_of
from experiments.studies.compare.wording import first_and_last, modes_of

COLLAPSED = 0.5  # the gap has collapsed when less than this share of it is left


def claims(analysis: xr.Dataset) -> list[Claim]:
    """Claims 1, 2 and 4, and a placeholder for 3. Claim 4 is about frequency, and so about bands of the DCT alone."""
    order = {"dct": [_order], "pca": [_no_order, _rank_order]}.get(modes_of(analysis), [_no_order])
    return [_gap_exists(analysis), _gap_collapses(analysis), _depth(), *(claim(analysis) for claim in order)]


def collapsed(interval: list[float]) -> Verdict:
    """Whether less than half of the gap is left, either way."""
    return within(interval, COLLAPSED) if np.isfinite(interval).all() else "undecided"


def _gap(analysis: xr.Dataset, source: str) -> tuple[float, list[float]]:
    at = analysis.sel(source=source).isel(coupling=0)
    return float(at.gap), [float(v) for v in at.gap_interval]


def _gap_exists(analysis: xr.Dataset) -> Claim:
    value, interval = _claimed(analysis, "uncoupled", "network")
    steps = float(analysis.gap_steps.sel(source="network").isel(coupling=0))
    blank, blank_interval = _claimed(analysis, "uncoupled", "untrained")
    told, (exact, _) = told_from_zero([value, *interval]), _gap(analysis, "wiener")
    theory = float(analysis.gap.sel(source="wiener theory").isel(coupling=0))
    recursion, recursion_interval = _claimed(analysis, "uncoupled", recursion_of(analysis))
    known, known_interval = _gap(analysis, exact_of(analysis))
    early, late = first_and_last(analysis)
    early += " above DC" if modes_of(analysis) == "dct" else ""
    return Claim(
        1,
        "The synchronization gap is there without coupling",
        above(interval, LEAST),
        "gap at g = 0, nats of log-SNR",
        value,
        interval,
        (
            f"Uncoupled, {late} commits {value:.2f} nats ({steps:.1f} sampler steps) after {early}. Whether this is "
            "more than the spectrum of the data makes in any denoiser is not tested here: syncgap spectrum tests it."
            if told
            else f"Uncoupled, no gap can be told from 0; less than {LEAST:g} nats counts as none."
        ),
        [
            Control(
                "untrained network",
                blank,
                blank_interval,
                above(blank_interval) == "holds",
                "The same architecture with random weights"
                + (f": {100 * blank / value:.0f} % of the network's gap." if told else "."),
            ),
            Control(
                "Wiener denoiser",
                exact,
                None,
                None,
                f"An exact denoiser of the same spectrum; its own theory says {theory:.2f}.",
            ),
            Control(
                f"theory: {exact_of(analysis)}",
                known,
                known_interval if np.isfinite(known_interval).all() else None,
                None,
                f"An exact denoiser made for {EXACT[exact_of(analysis)]}.",
            ),
            Control(
                f"theory: {recursion_of(analysis)}",
                recursion,
                recursion_interval,
                None,
                "The recursion of the sampler under the network's one-pass gain, nothing fitted.",
            ),
        ],
        analysis.attrs["claim_level"],
    )


def _claimed(analysis: xr.Dataset, name: str, source: str) -> tuple[float, list[float]]:
    at = analysis.sel(claimed=source)
    return float(at[name]), [float(v) for v in at[f"{name}_interval"]]


def _with_ends(analysis: xr.Dataset, name: str, source: str) -> list[float]:
    value, interval = _claimed(analysis, name, source)
    return [value, *interval]


def _gap_collapses(analysis: xr.Dataset) -> Claim:
    strongest = float(analysis.strongest.sel(claimed="network").fillna(analysis.coupling[-1]))  # none: nothing is known
    value, interval = _claimed(analysis, "remains", "network")
    there = bool(np.isfinite(value))
    network = analysis.sel(source="network").sel(coupling=strongest)
    low, high = (float(network.decided[analysis.attrs[name]]) for name in ("low_band", "high_band"))
    early, late = first_and_last(analysis)
    if modes_of(analysis) == "dct":
        early, late = "the lowest band", "the highest"
    controls = []
    if told_from_zero(_with_ends(analysis, "uncoupled", "untrained")):
        blank, blank_interval = _claimed(analysis, "remains", "untrained")
        controls.append(
            Control(
                "untrained network",
                blank,
                blank_interval,
                collapsed(blank_interval) == "holds",
                "The same ratio.",
            )
        )
    else:
        controls.append(Control("untrained network", None, None, None, "It has no gap at g = 0 that could collapse."))
    for name in list(ESTIMATORS)[1:]:
        gaps, ends = (analysis[each].sel(estimator=name) for each in ("gap_by", "gap_by_interval"))
        known = there and told_from_zero([gaps[0], *ends[0].values])
        ratio = float(gaps.sel(coupling=strongest) / gaps[0]) if known else None
        controls.append(Control(f"by {name}", ratio, None, None, f"The same ratio of {ESTIMATORS[name]}."))
    ratio, ratio_interval = _claimed(analysis, "remains", recursion_of(analysis))
    text = "The same ratio by the recursion under the network's one-pass gain."
    controls.append(Control(f"theory: {recursion_of(analysis)}", ratio, ratio_interval, None, text))
    controls += _exact_remains(analysis)
    return Claim(
        2,
        "The gap collapses under strong coupling",
        collapsed(interval),
        f"gap at g = {strongest:g} as a share of the gap at g = 0",
        value,
        interval,
        (
            f"At g = {strongest:g}, the strongest coupling at which both bands decide more than their error, the gap "
            f"is {value:+.2f} times what it is uncoupled; collapsed means less than {COLLAPSED:g} either way. What the "
            f"replicas decide individually is {100 * low:.1f} % of the uncoupled in {early} and "
            f"{100 * high:.1f} % in {late}."
            if there
            else "This cannot be told: no gap without coupling is known that could collapse, or none under coupling."
        ),
        controls,
        analysis.attrs["claim_level"],
    )


def _exact_remains(analysis: xr.Dataset) -> list[Control]:
    """What of the gap one gain for all bands leaves, at the strongest coupling at which that gain is above 0."""
    gap, gain = analysis.gap.sel(source=exact_of(analysis)), exact_gain(analysis)
    positive = analysis.coupling.values[gain > 0]
    if positive.size < 2 or not abs(gap[0]) > LEAST:
        return []
    text = f"An exact denoiser whose difference is multiplied by one gain in all bands, at g = {positive[-1]:g}."
    if (gain < 0).any():
        text += " At stronger couplings that gain is below 0, and all is decided in the last step."
    ratio = float(gap.sel(coupling=positive[-1]) / gap[0])
    return [Control(f"theory: {exact_of(analysis)}", ratio, None, None, text)]


def _depth() -> Claim:
    return Claim(
        3,
        "The gap is localised in the last layers",
        "not tested",
        "commitment by layer",
        None,
        None,
        "This run reads the network's output only; depth is a question of its own.",
    )


def _shuffled(analysis: xr.Dataset) -> Control:
    """The order of bands to which coefficients are assigned at random, and how often it is the network's."""
    orders, p = analysis.shuffled_order.values, float(analysis.order_p)
    if not orders.size:
        return Control(SHUFFLED, None, None, None, "This run has stored no coefficients to shuffle.")
    return Control(
        SHUFFLED,
        float(np.median(orders)),
        [float(v) for v in np.quantile(orders, [0.025, 0.975])],
        p > 0.05,
        f"The same trajectories, coefficients assigned to bands at random, {orders.size} times: median and the range "
        f"of 95 % of them. So much order comes about by chance with p = {p:.3f}.",
    )


def _no_order(_: xr.Dataset) -> Claim:
    return Claim(
        4,
        "Low, global frequencies commit before high, local ones",
        "not tested",
        "Kendall's tau-b of commitment level against frequency",
        None,
        None,
        "The modes of this run are no bands of frequency; syncgap compare without --modes has them.",
    )


def _rank_order(analysis: xr.Dataset) -> Claim:
    claim = _order(analysis)
    claim.id, claim.title = 0, "Principal components of large variance commit before those of small"
    claim.measure = "Kendall's tau-b of commitment level against rank, g = 0"
    claim.statement = "An exact denoiser of Gaussian data commits its components in this order."
    return claim


def _order(analysis: xr.Dataset) -> Claim:
    def control(source, name, text):
        value, interval = _claimed(analysis, "order", source)
        return Control(name, value, interval, above(interval) == "holds", text)

    value, interval = _claimed(analysis, "order", "network")
    share = float(analysis.in_order.sel(claimed="network"))
    blank = analysis.tau.sel(source="untrained").isel(coupling=0).values
    return Claim(
        4,
        "Low, global frequencies commit before high, local ones",
        above(interval),
        "Kendall's tau-b of commitment level against frequency, DC left out, g = 0",
        value,
        interval,
        (
            f"In {100 * share:.1f} % of the resampled runs the lowest band commits before the highest. Whether the "
            "order is more than that of the data's spectrum is not tested here: syncgap spectrum tests it."
            if np.isfinite(value)
            else f"The levels of all bands above DC lie within {LEAST:g} nats: they have no order."
        ),
        [
            _shuffled(analysis),
            control(
                "untrained",
                "untrained network",
                f"The same architecture with random weights; its levels span {np.ptp(blank):.3f} nats in all.",
            ),
        ],
        analysis.attrs["claim_level"],
    )
