"""Figures and text of the interventions study."""

from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.frame.drawing import band_names
from experiments.frame.estimator import HIGH, LOW
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, power
from experiments.frame.settings import SAMPLER_NAMES
from experiments.frame.steps import WINDOW_START
from experiments.frame.verdict import LEAST, Claim, Control, Verdict, above, all_hold, bounds
from experiments.studies.interventions import figures as draw
from experiments.studies.interventions.analysis import BY
from experiments.studies.interventions.figures import arms_of
from experiments.studies.interventions.settings import ALL, CLAIMED, NONE, InterventionsConfig


def page(measured: Measured[InterventionsConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures: dict[str, Callable[[], Figure]] = {
        "layers": partial(draw.figure_layers, analysis),
        "bands": partial(draw.figure_bands, analysis),
        "parts": partial(draw.figure_parts, analysis),
        "schedules": partial(draw.figure_schedules, analysis),
    }
    if not analysis.effect[1] > LEAST:
        del figures["layers"]  # shares of nothing
    return Page(section(measured, analysis, list(figures)), figures)


def section(measured: Measured[InterventionsConfig], analysis: xr.Dataset, figures: Sequence[str]) -> Section:
    """What the study found, in words and tables."""
    settings, names = measured.config, band_names(analysis)
    g, depth, pairs = settings.strength, analysis.sizes["layer"], analysis.attrs["pairs"]
    counts = ", ".join(str(int((analysis.gate.sel(arm=name)[:, 0] > 0).sum())) for name in arms_of(analysis, "window"))
    captions = {
        "layers": "The full effect is the reduction of the gap when all layers are coupled. Left: share of it when "
        "only the first, middle or last layers are coupled. Right: share when only one layer is coupled. Dashed: an "
        "equal share for every layer. Open symbols: by the gap of all energy. Bars: 95 % intervals.",
        "bands": f"Commitment level (left) and decided fraction (right) of every band when a fifth of the layers, no "
        f"layer or every layer is coupled with g = {g:g}. Dotted: the level by all energy.",
        "parts": f"Gap (left) and decided fraction of the lowest and the highest band (right) when coupling g = {g:g} "
        "is on in some steps or heads only, or when replicas share queries, keys or values instead. Open symbols: "
        "the gap by all energy. Vertical lines: nothing coupled, and everything coupled.",
        "schedules": "Schedules of equal total coupling over log-SNR (left), the gap under each, and the decided "
        "fraction of the lowest band. Bars: 95 % intervals; vertical line: constant coupling.",
    }
    limits = [
        "The gap compares when bands commit. Where coupling leaves a band little to decide (marked *), the level of "
        "that band is uncertain; see its decided fraction.",
        "The decided fraction is a running maximum: a difference that coupling removes later still counts as decided. "
        "The columns of what is left at the end show such late effects.",
        f"Windows and schedules are equal in log-SNR, so they hold different numbers of steps: the windows "
        f"{counts}, the second half {int((analysis.gate.sel(arm='second half')[:, 0] > 0).sum())}. "
        "The late arms act at few steps.",
        "Effects of parts need not add up to that of the whole: the effect of one layer or step depends on the others.",
        "Heads of the same number in different layers have nothing in common. Coupling one number in all layers "
        f"samples 1/{measured.model.num_heads} of the heads.",
        f"Every interval is for its own number alone. For about one in twenty of the {analysis.sizes['arm']} arms, the "
        "true value lies outside by chance. The claim rests on the first, middle and last fifth, which were named in "
        "advance.",
        "Coupling a part makes the network run on states that it was not trained on, as all coupling does.",
        "Nominal 95 % intervals from so few pairs cover about 85 to 90 %; --pairs 64 is better."
        if pairs < 64
        else "Intervals come from resampling pairs; they speak for this network, not for one trained again.",
    ]
    return Section(
        title=f"Interventions: {measured.subject_name}",
        question="Which layers, steps and heads, and which of queries, keys and values, bring the gap down when they "
        f"alone are coupled? Coupling g = {g:g} is switched on in one part at a time.",
        answer=_answer(analysis, g, depth),
        claims=[localisation(analysis)],
        tables=_tables(analysis, settings),
        captions={name: captions[name] for name in figures},
        methods=[
            f"{pairs} pairs under {SAMPLER_NAMES[settings.sampler]}, {settings.steps} steps, with the "
            f"{settings.gate_kind} gate and the same noise in every arm. The gap is between {names[LOW]} and "
            f"{names[HIGH]}, as in the main experiment. Every arm is measured against the energies without coupling, "
            f"and the estimator's window opens at {analysis.attrs['ell_start']:.1f} nats. The share of the full effect "
            "is (gap without coupling − gap of the arm) / (gap without coupling − gap with everything coupled). One "
            "draw of pairs serves all arms, so that the noise they share cancels.",
            "Commitment levels use the energy along the outcome of the same arm, relative to its own maximum "
            "(docs/theory.md, section 7.4). Beside it stands the gap by all energy, in which the network's errors can "
            "look like early commitment.",
            f"Layers count from 0. Windows of steps are thirds of the log-SNR from {WINDOW_START:g} to the end; the "
            f"steps before {WINDOW_START:g} belong to the early one. Schedules act "
            f"from {WINDOW_START:g} on and have the integral over log-SNR of g = {settings.schedule_strength:g}.",
            "To uncouple a head, only its attention to its own replica's keys is kept, and normalised again. With all "
            "heads uncoupled in this way, the energies equal those without coupling to a relative error of "
            f"{power(analysis.attrs['closure'])}. Queries, keys or values are shared without a gate: "
            f"each replica goes on with (own + {g:g} × other) / {1 + g:g}. To first order, a joint or blend gate is "
            "the same as sharing keys and values (docs/theory.md, section 6)"
            + ("." if settings.gate_kind in ("joint", "blend") else f"; a {settings.gate_kind} gate of that g is not."),
        ],
        limits=limits,
    )


def localisation(analysis: xr.Dataset) -> Claim:
    """Claim 3 in a causal reading: coupling the last layers alone brings the gap down.

    The full effect is the reduction of the gap when all layers are coupled; there is one if its whole interval is above
    `LEAST`. The claim holds if coupling the last fifth of the layers alone brings more than half of it, and more than
    coupling the first fifth does, each with its whole interval. It does not hold if the whole interval of either says
    the opposite. Otherwise, and where there is no full effect, it is undecided.
    """
    fifth, depth = analysis.attrs["fifth"], analysis.sizes["layer"]
    shares = {end: analysis.share.sel(arm=f"{end} {fifth}").values for end in ("first", "middle", "last")}
    verdict = localised(analysis.effect.values, shares["last"], analysis.last_minus_first.values)
    there = bool(analysis.effect[1] > LEAST)
    controls = [
        Control(
            f"{end} {fifth} layers",
            _value(shares[end], there),
            _bounds(shares[end], there),
            bool(shares[end][1] > CLAIMED) if there else None,
            "The same share for these layers. The claim holds on them if the whole interval is above one half.",
        )
        for end in ("first", "middle")
    ]
    controls.append(
        Control("equal share", fifth / depth, None, fifth / depth > CLAIMED, "Share of the layers that are coupled.")
    )
    blank = analysis.untrained_effect.values
    gaps = [analysis.untrained_gap.sel(untrained_arm=name).values for name in (NONE, ALL)]
    found = analysis.untrained_share.sel(untrained_arm=f"last {fifth}").values
    acts = bool(blank[1] > LEAST)
    text = f"The same architecture with random weights: gap {formatted(gaps[0])} nats, coupled {formatted(gaps[1])}"
    controls.append(
        Control(
            "untrained network",
            _value(found, acts),
            _bounds(found, acts),
            localised(blank, found, analysis.untrained_last_minus_first.values) == "holds" if acts else False,
            text + ("." if acts else "; coupling does not reduce its gap, so there is nothing to localise."),
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
        f"Coupling all layers reduces the gap by {formatted(analysis.effect)} nats. The share of the last {fifth} "
        f"minus that of the first {fifth} is {formatted(difference)}. By all energy, the reduction is "
        f"{formatted(analysis.effect_energy)} nats, and the last {fifth} layers bring "
        f"{formatted(analysis.share_energy.sel(arm=f'last {fifth}'))} of it."
        if there
        else f"Coupling all layers reduces the gap by {formatted(analysis.effect)} nats: no effect to be localised.",
        controls,
    )


def localised(effect: ArrayLike, last: ArrayLike, difference: ArrayLike) -> Verdict:
    """The verdict of `localisation` from (estimate, low, high) of the full effect, of the last fifth's share, and of
    that share minus the first fifth's."""
    effect, last, difference = (np.asarray(x, np.float64) for x in (effect, last, difference))
    if not effect[1] > LEAST or not np.isfinite([last, difference]).all():
        return "undecided"
    return all_hold(above(last[1:], CLAIMED), above(difference[1:]))


def _value(values: np.ndarray, there: bool) -> float | None:
    return float(values[0]) if there else None


def _bounds(values: np.ndarray, there: bool) -> list[float] | None:
    return bounds(values) if there else None


def _answer(analysis: xr.Dataset, g: float, depth: int) -> str:
    gaps = [formatted(analysis[name].sel(arm=arm)) for name in ("gap", "gap_energy") for arm in (NONE, ALL)]
    start = (
        f"Coupling everything at g = {g:g} takes the gap from {gaps[0]} to {gaps[1]} nats (by all energy: from "
        f"{gaps[2]} to {gaps[3]})"
    )
    if not analysis.effect[1] > LEAST:
        return f"{start}: there is no effect to share among parts."
    fifth = analysis.attrs["fifth"]

    def shares(arms: dict[str, str]) -> str:
        return ", ".join(f"{text} {formatted(analysis.share.sel(arm=arm))}" for arm, text in arms.items())

    layers = shares({f"{end} {fifth}": end for end in ("first", "middle", "last")})
    steps = shares({name: name.removesuffix(" steps") for name in arms_of(analysis, "window")})
    return (
        f"{start}. Shares of that effect when only {fifth} of the {depth} layers are coupled: {layers}. Shares when "
        f"only a third of the log-SNR is coupled: {steps}."
    )


def _row(analysis: xr.Dataset, name: str) -> list[str]:
    at = analysis.sel(arm=name)
    decided = at.decided[:, 0].values
    weak = " *" if np.any(decided[[LOW, HIGH]] <= at.floor[[LOW, HIGH], 0].values) else ""
    cells = [name]
    for by in BY:
        there = analysis[f"effect{by}"][1] > LEAST
        cells += [formatted(at[f"gap{by}"]) + weak, formatted(at[f"share{by}"]) if there else "–"]
    return cells + [formatted(at[what][band]) for what in ("decided", "left") for band in (LOW, HIGH)]


def _tables(analysis: xr.Dataset, settings: InterventionsConfig) -> list[Table]:
    head = ["coupled", "gap, nats", "share of the full effect", "gap by all energy", "share"]
    head += ["decided fraction, low", "decided fraction, high", "left at the end, low", "left at the end, high"]
    note = "Low: lowest band above DC; high: highest band. Left at the end: energy relative to no coupling."
    references = [_row(analysis, name) for name in (NONE, ALL)]
    groups = {
        "Layers": ("layer", "first", "middle", "last"),
        "Steps": ("window",),
        "Heads, in all layers": ("head",),
        "Queries, keys, values, shared": ("shared",),
    }
    tables = []
    for title, kinds in groups.items():
        rows = references + [_row(analysis, name) for kind in kinds for name in arms_of(analysis, kind)]
        tables.append(Table(title, head, rows, note + _weak_note(rows)))
    rows = []
    for name in arms_of(analysis, "schedule"):
        at = analysis.sel(arm=name)
        row = [name, f"{float(at.gate.max()):.2f}"]
        for what, band in (("gap", None), ("gap_energy", None), ("decided", LOW), ("decided", HIGH)):
            value, change = at[what], at[f"{what}_against_constant"]
            row += [formatted(x if band is None else x[band]) for x in (value, change)]
        rows.append(row)
    head = ["schedule", "largest g"]
    for what in ("gap, nats", "gap by all energy", "decided fraction, low", "decided fraction, high"):
        head += [what, "minus constant"]
    title = f"Schedules with the same integral over log-SNR as g = {settings.schedule_strength:g}"
    return [*tables, Table(title, head, rows)]


def _weak_note(rows: list[list[str]]) -> str:
    if any(row[1].endswith("*") for row in rows):
        return " *: one of the two bands decides no more than the error where the window opens."
    return ""
