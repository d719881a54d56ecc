"""Figures and text of the study of two modalities."""

from functools import partial

import numpy as np
import xarray as xr
from scipy.stats import norm

from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table
from experiments.frame.verdict import Claim, Control, Verdict, above
from experiments.studies.modalities import cases
from experiments.studies.modalities import figures as draw
from experiments.studies.modalities.settings import PARTS, ModalitiesConfig
from ou_theory.bootstrap import family_level
from ou_theory.speciation import gap_large_spread, speciation_gap

CLAIMS = 8  # verdicts of the page: two by intervals, six by the chance of their largest deviation
LEVEL = 0.001  # a claim fails if deviations so large have less than this chance under the theory


def page(measured: Measured[ModalitiesConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run; there is no analysis beside what the parts have stored."""
    parts = measured.sources(*PARTS)
    figures = {
        "timescales": partial(draw.figure_timescales, parts["timescales"]),
        "speciation": partial(draw.figure_speciation, parts["speciation"]),
        "gap": partial(draw.figure_gap, parts["speciation"]),
        "anisotropic": partial(draw.figure_anisotropic, parts["anisotropic"]),
        "collapse": partial(draw.figure_collapse, parts["collapse"]),
        "filter": partial(draw.figure_filter, parts["filtering"]),
        "schedules": partial(draw.figure_schedules, parts["scheduling"]),
    }
    return Page(section(measured.config, parts), figures)


# --- comparisons


def deviations(found: np.ndarray, theory: np.ndarray) -> np.ndarray:
    """Readings (..., 2) minus theory, in standard errors, flat, where there is theory; NaN where nothing was read."""
    return ((found[..., 0] - theory) / found[..., 1])[np.isfinite(theory)]


def agree(z: np.ndarray) -> tuple[Verdict, float]:
    """Verdict on deviations in standard errors, and an upper bound on the chance that the largest is so large if theory
    is right. The bound needs no independence. The verdict is undecided where a deviation is missing."""
    if not z.size or np.isnan(z).any():
        return "undecided", float("nan")
    chance = min(1.0, float(2 * z.size * norm.sf(np.abs(z).max())))
    return ("holds" if chance > LEVEL else "does not hold"), chance


def largest(z: np.ndarray) -> float:
    """Size of the largest deviation; NaN without any."""
    return float(np.abs(z[np.isfinite(z)]).max(initial=0.0)) if np.isfinite(z).any() else float("nan")


def with_bounds(reading: np.ndarray) -> list[float]:
    """Interval of one reading, at the level of the claims."""
    reach = norm.isf((1 - family_level(CLAIMS)) / 2) * float(reading[1])
    return [float(reading[0] - reach), float(reading[0] + reach)]


def _agreement(title: str, z: np.ndarray, what: str, controls: list[Control]) -> Claim:
    verdict, chance = agree(z)
    statement = (
        f"{what} {np.isfinite(z).sum()} of {z.size} values could be read. If theory is right, one of them deviates "
        f"this much with a probability of at most {chance:.2g}. The claim does not hold if this is below {LEVEL}."
    )
    return Claim(
        0, title, verdict, "largest deviation, standard errors", largest(z), None, statement, controls, 1 - LEVEL
    )


def _control(name: str, z: np.ndarray, statement: str) -> Control:
    return Control(name, largest(z), None, agree(z)[0] == "holds", statement)


def section(settings: ModalitiesConfig, parts: dict[str, xr.Dataset]) -> Section:
    """What the study found, in words and tables."""
    pair, ring, time = parts["speciation"], parts["filtering"], parts["scheduling"]
    unequal, stored, rates = parts["anisotropic"], parts["collapse"], parts["timescales"]
    gap = draw.gaps(pair.speciation.values)
    at = int(np.argmin(np.abs(pair.coupling.values - 0.6)))
    known = float(speciation_gap(cases.B, pair.coupling.values[at], cases.SPREAD, cases.SPREAD))
    found_rates = np.stack([rates.rate, rates.rate_error], -1)
    z_rates = deviations(found_rates, rates.rate_theory.values)
    z_pair = deviations(pair.speciation.values, pair.speciation_theory.values)
    alone = np.broadcast_to(pair.speciation_theory.values[:1], pair.speciation_theory.shape)
    far = np.asarray(gap_large_spread(cases.B, pair.coupling.values[1:], cases.SPREAD))
    z_unequal = deviations(unequal.unequal.values, unequal.unequal_theory.values)
    order = [list(unequal.kind.values).index(k) for k in ("second drives first", "first drives second")]
    swapped = deviations(unequal.unequal.values[order, 1:], unequal.unequal_theory.values[order[::-1], 1:])
    z_limit = deviations(stored.collapse_limit.values, stored.collapse_theory.values)
    z_largest = deviations(stored.collapse.values[:, :, -1], stored.collapse_theory.values)
    z_ring = deviations(ring.commitment.values, ring.commitment_theory.values)
    still = np.broadcast_to(ring.commitment_theory.values[:1], ring.commitment_theory.shape)
    z_time = deviations(time.scheduled.values, time.scheduled_theory.values)
    names = list(time.schedule.values)
    constant = np.broadcast_to(time.scheduled_theory.values[names.index("constant")], time.scheduled_theory.shape)
    held = draw.gaps(time.scheduled.values)
    clean, noisy, closed = (held[names.index(name)] for name in ("clean half", "noisy half", "reversed"))
    apart = np.array([clean[0] - noisy[0], np.hypot(clean[1], noisy[1])])
    cost = 0.0
    for part, name in ((pair, "speciation"), (unequal, "unequal"), (ring, "commitment"), (time, "scheduled")):
        off = np.stack([part[f"{name}_fitted"].values, part[name].values[..., 1]], -1)
        cost = max(cost, largest(deviations(off, part[f"{name}_theory"].values)))
    claims = [
        Claim(
            0,
            "Coupling opens a gap: the common mode speciates first",
            above(with_bounds(gap[at])),
            f"gap at g = {pair.coupling.values[at]:g}, units of time",
            float(gap[at, 0]),
            with_bounds(gap[at]),
            f"Theory says {known:.3f}.",
            [
                Control(
                    "no coupling",
                    float(gap[0, 0]),
                    with_bounds(gap[0]),
                    above(with_bounds(gap[0])) == "holds",
                    "The same simulation at g = 0, where both modes are equal.",
                )
            ],
            family_level(CLAIMS),
        ),
        _agreement(
            "The relaxation rates are b − g and b + g",
            z_rates,
            "Rates follow from the decay of each mode's correlation with its start, simulated by Euler's rule.",
            [_control("rates without coupling", deviations(found_rates, np.full(rates.rate.shape, cases.B)),
                      "Theory with b for both modes; the claim must fail on it.")],
        ),
        _agreement(
            "Both modes speciate when theory says so",
            z_pair,
            "A time is read where the labels of clones have the correlation of κ = 1.",
            [
                _control("times without coupling", deviations(pair.speciation.values, alone), "The claim must fail."),
                _control("gap of far clusters", deviations(gap[1:], far), "The formula for m² − s² ≫ D / (b − g); "
                         "the claim must fail near g = b."),
            ],
        ),
        _agreement(
            "The joint criterion gives the speciation time under symmetric, one-way and rotating couplings",
            z_unequal,
            "One of the two modalities is clustered; there are four kinds of coupling.",
            [_control("the other direction", swapped, "Theory of the reversed coupling; the claim must fail on it.")],
        ),
        _agreement(
            "A score made of n stored pairs collapses where information equals log n",
            z_limit,
            "A time is read where a sample outweighs all others, and extrapolated in 1/d.",
            [_control(f"d = {int(stored['size'][-1])} alone", z_largest, "No extrapolation; the claim must fail.")],
        ),
        _agreement(
            "Waves around a ring of modalities commit in the order of their rates",
            z_ring,
            "A time is read where the values of clones have correlation ½.",
            [_control("waves without coupling", deviations(ring.commitment.values, still), "The claim must fail.")],
        ),
        _agreement(
            "Couplings that change in time act as theory says",
            z_time,
            f"There are {len(names)} schedules and two modes.",
            [_control("constant coupling", deviations(time.scheduled.values, constant), "Theory of a constant "
                      "coupling with the same integral; the claim must fail on it.")],
        ),
        Claim(
            0,
            "At equal total, coupling near the data opens a larger gap than coupling near the noise",
            above(with_bounds(apart)),
            "gap of the clean half minus that of the noisy half",
            float(apart[0]),
            with_bounds(apart),
            "Both schedules have the same integral of the coupling. One acts in the half of the times nearer to the "
            "data, the other in the noisier half, which generation passes first.",
            [
                Control("clean half", float(clean[0]), with_bounds(clean), None, "Coupled near the data."),
                Control("noisy half", float(noisy[0]), with_bounds(noisy), None, "Coupled near the noise."),
                Control("reversed", float(closed[0]), with_bounds(closed), None, "Coupled at every noise, with a "
                        "change of sign that theory chooses so that no gap is left."),
            ],
            family_level(CLAIMS),
        ),
    ]  # fmt: skip
    return Section(
        title="Two modalities, exact scores",
        question="Two modalities are generated together by a coupled diffusion whose score is known. When are their "
        "common and their difference features decided, and how does the coupling change that?",
        answer=f"At g = {pair.coupling.values[at]:g} the common mode speciates {gap[at, 0]:.3f} ± {gap[at, 1]:.3f} "
        f"before the difference mode (theory {known:.3f}); without coupling the gap is {gap[0, 0]:.3f} ± "
        f"{gap[0, 1]:.3f}. The same total coupling opens a gap of {clean[0]:.3f} ± {clean[1]:.3f} if it acts near the "
        f"data, and of {noisy[0]:.3f} ± {noisy[1]:.3f} if it acts near the noise.",
        claims=claims,
        tables=[
            _pair_table(pair, gap),
            _unequal_table(unequal),
            _collapse_table(stored),
            _ring_table(ring),
            _time_table(time, held),
        ],
        captions={
            "timescales": "Relaxation rates of the two modes against the coupling: simulated forwards (points, two "
            "standard errors) and b ∓ g (lines).",
            "speciation": "Correlation of clones' labels against the time at which they branch, for the common and the "
            "difference mode: simulation (points) and T(κ(t)) (dashed). A mode speciates where its curve passes the "
            "level of κ = 1 (dotted).",
            "gap": "Speciation times (left) and the gap between them (right) against the coupling: simulation "
            "(points), the exact formula (dashed), and its limit for far clusters (dotted).",
            "anisotropic": "Speciation of a clustered modality that is coupled to one without clusters. Left: four "
            "kinds of coupling, simulation (points) and κ(t) = 1 (dashed). Right: contours of the time over the plane "
            "of both couplings, with the bounds of stability and contraction; modes rotate in the shaded part.",
            "collapse": "Collapse times of scores made of stored samples: readings in growing dimension d, the line "
            "through them, and theory at 1/d = 0 (open symbols).",
            "filter": "Commitment of waves around a ring of eight modalities, against the rate that the coupling gives "
            "them. By theory, all couplings fall on one curve (dashed), the clock of the process.",
            "schedules": "Couplings that change in time (left), the gaps that they open (right), and the response of "
            "both modes' times to coupling at a given time (middle).",
        },
        methods=[
            f"Reverse paths take exact steps of the reverse SDE with exact scores: {settings.steps} from a branch to "
            f"the data, with {settings.paths} pairs of clones per point. Clones start at one state of the noised law "
            "and go on with independent noise. A time is read off a weighted cubic through the points whose "
            "correlation lies within 0.2 of the wanted one; its error comes from theirs. The seed is "
            f"{settings.seed}, and every point draws random numbers of its own.",
            "The common and the difference mode of the pair each have two clusters at ±2 of variance 0.25, independent "
            "of each other; b = D = 1. In the anisotropic part the first modality has such clusters, and the second is "
            "Gaussian of variance 1.",
            f"Collapse: {settings.trials} draws of a data set of n = exp({cases.LOAD:g} d) pairs, d Gaussian modes "
            "of unit variance each for the common and the difference mode. One sample is noised, and its weight in the "
            "empirical score is compared with that of all others. A score that knows only one mode does not see the "
            "other. Two details change theory by less than 0.01: n is a whole number, and a sample is not one of the "
            "others. Readings are corrected for this.",
        ],
        limits=[
            "The modes of these laws are independent and clustered. For independently clustered modalities coupling "
            "opens no gap of first order between the curvatures (docs/theory.md, 13.4).",
            "Collapse times are the end of a line fitted in 1/d. Their error does not include a possible curvature.",
            f"When the same cubic reads the exact curves, times deviate by at most {cost:.2f} of the standard errors.",
        ],
    )


# --- tables


def _plus(reading: np.ndarray, digits: int = 3) -> str:
    return f"{reading[0]:.{digits}f} ± {reading[1]:.{digits}f}" if np.isfinite(reading[0]) else "–"


def _pair_table(pair: xr.Dataset, gap: np.ndarray) -> Table:
    rows = []
    for i, g in enumerate(pair.coupling.values):
        exact, fitted = pair.speciation_theory.values[i], pair.speciation_fitted.values[i]
        cells = [f"{g:g}"]
        for mode in range(2):
            cells += [f"{exact[mode]:.3f}", _plus(pair.speciation.values[i, mode]), f"{fitted[mode]:.3f}"]
        rows.append([*cells, f"{exact[0] - exact[1]:.3f}", _plus(gap[i])])
    head = ["g", "common, theory", "simulation", "fit to theory", "difference, theory", "simulation", "fit to theory",
            "gap, theory", "simulation"]  # fmt: skip
    note = "± one standard error. Fit to theory: what the fit reads on the exact curve."
    return Table("Speciation times under a symmetric coupling", head, rows, note)


def _unequal_table(unequal: xr.Dataset) -> Table:
    rows = [
        [str(kind), f"{g:g}", f"{unequal.unequal_theory.values[i, j]:.3f}", _plus(unequal.unequal.values[i, j]),
         f"{unequal.unequal_fitted.values[i, j]:.3f}"]
        for i, kind in enumerate(unequal.kind.values)
        for j, g in enumerate(unequal.strength.values)
        if np.isfinite(unequal.unequal_theory.values[i, j])
    ]  # fmt: skip
    head = ["coupling", "g", "theory", "simulation", "fit to theory"]
    return Table("Speciation times by the joint criterion", head, rows)


def _collapse_table(stored: xr.Dataset) -> Table:
    rows = []
    for i, g in enumerate(stored.g.values):
        for j, score in enumerate(stored.score.values):
            sizes = [_plus(r) for r in stored.collapse.values[i, j]]
            rows.append(
                [f"{g:g}", str(score), *sizes, _plus(stored.collapse_limit.values[i, j]),
                 f"{stored.collapse_theory.values[i, j]:.3f}"]
            )  # fmt: skip
    head = ["g", "score of", *(f"d = {d}" for d in stored["size"].values), "1/d → 0", "theory"]
    return Table("Collapse times", head, rows)


def _ring_table(ring: xr.Dataset) -> Table:
    rows = [
        [f"{g:g}", str(int(a)), f"{ring.wave_rate.values[i, a]:.3f}", f"{ring.commitment_theory.values[i, a]:.3f}",
         _plus(ring.commitment.values[i, a])]
        for i, g in enumerate(ring.g.values)
        for a in ring.wave.values
    ]  # fmt: skip
    return Table("Commitment around the ring", ["g", "wave", "rate", "theory", "simulation"], rows)


def _time_table(time: xr.Dataset, held: np.ndarray) -> Table:
    rows = []
    for i, name in enumerate(time.schedule.values):
        exact = time.scheduled_theory.values[i]
        found = [_plus(time.scheduled.values[i, mode]) for mode in range(2)]
        rows.append([str(name), f"{exact[0]:.3f}", found[0], f"{exact[1]:.3f}", found[1],
                     f"{exact[0] - exact[1]:.3f}", _plus(held[i])])  # fmt: skip
    head = ["schedule", "common, theory", "simulation", "difference, theory", "simulation", "gap, theory", "simulation"]
    return Table("Couplings that change in time", head, rows)
