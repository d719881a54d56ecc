"""Figures and text of the study of two modalities."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure
from scipy.stats import norm

from experiments.claims import Claim, Control, side
from experiments.clone_reading import SPECIATION
from experiments.drawing import FAINT, INK, QUIET, new_figure
from experiments.section import Section, Table, finish
from experiments.store import RunFolder
from ou_theory.process import transition_time
from ou_theory.schedules import schedule_response
from ou_theory.speciation import gap_large_spread, speciation_gap

COMMON, DIFFERENCE, THIRD = "#0072B2", "#D55E00", "#009E73"
COLORS = (COMMON, DIFFERENCE, THIRD, "#CC79A7", "#E69F00", "#56B4E9", INK)
LEVEL = 0.001  # chance, if theory is right, with which a set of comparisons may be called off
SPREAD, RATE = 3.75, 1.0  # of the clusters, and of a modality alone


def report(run: RunFolder, timings: dict[str, float] | None = None) -> Path:
    """Draws and writes what a run has stored; returns the path of its page."""
    from experiments.modalities import PARTS  # which imports this module

    parts = {name: run.load(name) for name in PARTS}
    figures = {
        "timescales": partial(figure_timescales, parts["timescales"]),
        "speciation": partial(figure_speciation, parts["speciation"]),
        "gap": partial(figure_gap, parts["speciation"]),
        "anisotropic": partial(figure_anisotropic, parts["anisotropic"]),
        "collapse": partial(figure_collapse, parts["collapse"]),
        "filter": partial(figure_filter, parts["filtering"]),
        "schedules": partial(figure_schedules, parts["scheduling"]),
    }
    return finish(run, section(run.manifest, parts), figures, timings)


# --- comparisons


def deviations(found: np.ndarray, theory: np.ndarray) -> np.ndarray:
    """Readings (..., 2) less theory, in standard errors; where there is a reading, flat."""
    z = (found[..., 0] - theory) / found[..., 1]
    return z[np.isfinite(z)]


def agree(z: np.ndarray) -> tuple[str, float]:
    """Verdict on deviations in standard errors, and a bound on the chance of so large a one among them if theory is
    right, be they independent or not."""
    chance = min(1.0, float(2 * z.size * norm.sf(np.abs(z).max()))) if z.size else 0.0
    return ("holds" if chance > LEVEL else "does not hold"), chance


def gaps(found: np.ndarray) -> np.ndarray:
    """Common less difference mode, value and error, of readings (..., 2 modes, 2)."""
    return np.stack([found[..., 0, 0] - found[..., 1, 0], np.hypot(found[..., 0, 1], found[..., 1, 1])], -1)


def with_bounds(reading: np.ndarray) -> list[float]:
    """95 % interval of one reading."""
    reach = norm.ppf(0.975) * float(reading[1])
    return [float(reading[0] - reach), float(reading[0] + reach)]


def _agreement(title: str, z: np.ndarray, what: str, controls: list[Control]) -> Claim:
    verdict, chance = agree(z)
    statement = (
        f"{what}; {z.size} comparisons, nothing fitted. Chance of so large a deviation among them if theory is right: "
        f"at most {chance:.2g}; the claim fails below {LEVEL}."
    )
    return Claim(
        0, title, verdict, "largest deviation, standard errors", float(np.abs(z).max()), None, statement, controls
    )


def _control(name: str, z: np.ndarray, statement: str) -> Control:
    return Control(name, float(np.abs(z).max()), None, agree(z)[0] == "holds", statement)


def section(manifest: dict, parts: dict[str, xr.Dataset]) -> Section:
    """What the study found, in words and tables."""
    settings = manifest["settings"]
    pair, ring, time = parts["speciation"], parts["filtering"], parts["scheduling"]
    unequal, stored, rates = parts["anisotropic"], parts["collapse"], parts["timescales"]
    gap = gaps(pair.speciation.values)
    at = int(np.argmin(np.abs(pair.coupling.values - 0.6)))
    known = float(speciation_gap(RATE, pair.coupling.values[at], SPREAD, SPREAD))
    found_rates = np.stack([rates.rate, rates.rate_error], -1)
    z_rates = deviations(found_rates, rates.rate_theory.values)
    z_pair = deviations(pair.speciation.values, pair.speciation_theory.values)
    alone = np.broadcast_to(pair.speciation_theory.values[:1], pair.speciation_theory.shape)
    far = np.asarray(gap_large_spread(RATE, pair.coupling.values[1:], SPREAD))
    z_unequal = deviations(unequal.unequal.values, unequal.unequal_theory.values)
    order = [list(unequal.kind.values).index(k) for k in ("second drives first", "first drives second")]
    swapped = deviations(unequal.unequal.values[order, 1:], unequal.unequal_theory.values[order[::-1], 1:])
    z_limit = deviations(stored.collapse_limit.values, stored.collapse_theory.values)
    largest = deviations(stored.collapse.values[:, :, -1], stored.collapse_theory.values)
    z_ring = deviations(ring.commitment.values, ring.commitment_theory.values)
    still = np.broadcast_to(ring.commitment_theory.values[:1], ring.commitment_theory.shape)
    z_time = deviations(time.scheduled.values, time.scheduled_theory.values)
    names = list(time.schedule.values)
    constant = np.broadcast_to(time.scheduled_theory.values[names.index("constant")], time.scheduled_theory.shape)
    held = gaps(time.scheduled.values)
    clean, noisy, closed = (held[names.index(name)] for name in ("clean half", "noisy half", "reversed"))
    claims = [
        Claim(
            0,
            "Coupling opens a gap: the common mode speciates first",
            side(with_bounds(gap[at])),
            f"gap at g = {pair.coupling.values[at]:g}, units of time",
            float(gap[at, 0]),
            with_bounds(gap[at]),
            f"Theory: {known:.3f}.",
            [
                Control(
                    "no coupling",
                    float(gap[0, 0]),
                    with_bounds(gap[0]),
                    side(with_bounds(gap[0])) == "holds",
                    "The same simulation at g = 0, where both modes are equal.",
                )
            ],
        ),
        _agreement(
            "Relaxation rates form the hierarchy b - g, b + g",
            z_rates,
            "Decay of each mode's correlation with its start, Euler's rule",
            [_control("rates without coupling", deviations(found_rates, np.full(rates.rate.shape, RATE)),
                      "b for both modes: it must fail.")],
        ),
        _agreement(
            "Both modes speciate when theory says so",
            z_pair,
            "Where labels of clones correlate as at kappa = 1",
            [
                _control("times without coupling", deviations(pair.speciation.values, alone), "It must fail."),
                _control("gap of far clusters", deviations(gap[1:], far), "The formula for m^2 - s^2 >> D / (b - g): "
                         "it must fail near g = b."),
            ],
        ),
        _agreement(
            "Under couplings of any symmetry the joint criterion tells the time",
            z_unequal,
            "One modality clustered, four kinds of coupling",
            [_control("the other direction", swapped, "Theory of the coupling reversed: it must fail.")],
        ),
        _agreement(
            "Scores of n stored pairs collapse where information equals log n",
            z_limit,
            "Crossings of own and other weights, extrapolated in 1 / d",
            [_control(f"d = {int(stored['size'][-1])} alone", largest, "Not extrapolated: finite size must show.")],
        ),
        _agreement(
            "Waves around a ring of modalities commit in the order of their rates",
            z_ring,
            "Where values of clones correlate by one half",
            [_control("times without coupling", deviations(ring.commitment.values, still), "It must fail.")],
        ),
        _agreement(
            "Couplings that change in time act as theory says",
            z_time,
            f"{len(names)} schedules",
            [_control("constant coupling", deviations(time.scheduled.values, constant), "Of the same integral: it "
                      "must fail.")],
        ),
        Claim(
            0,
            "At equal total, coupling near the data holds the gap open",
            side(with_bounds(np.array([clean[0] - noisy[0], np.hypot(clean[1], noisy[1])]))),
            "gap, coupling in the clean half",
            float(clean[0]),
            with_bounds(clean),
            "Compared with coupling in the noisy half, which comes too early in generation to matter.",
            [
                Control("noisy half", float(noisy[0]), with_bounds(noisy), None, "The same integral of the coupling."),
                Control("reversed", float(closed[0]), with_bounds(closed), None, "Coupled at every noise, with a "
                        "change of sign that theory chooses so that no gap is left."),
            ],
        ),
    ]  # fmt: skip
    return Section(
        title="Two modalities, exact scores",
        question="Two modalities are generated together by a coupled diffusion whose score is known. When are their "
        "common and their difference features decided, and what does the coupling do to that?",
        answer=f"At g = {pair.coupling.values[at]:g} the common mode speciates {gap[at, 0]:.3f} ± {gap[at, 1]:.3f} "
        f"before the difference mode (theory {known:.3f}); without coupling the gap is {gap[0, 0]:.3f} ± "
        f"{gap[0, 1]:.3f}. The same total coupling opens {clean[0]:.3f} ± {clean[1]:.3f} near the data and "
        f"{noisy[0]:.3f} ± {noisy[1]:.3f} near the noise.",
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
            "speciation": "Correlation of clones' labels against the time at which they branch, common and difference "
            "mode: simulation (points) over T(κ(t)) (lines). The level at κ = 1, dotted, is where a mode speciates.",
            "gap": "Speciation times (left) and the gap between them (right) against the coupling: simulation over "
            "the exact formula, with its limits.",
            "anisotropic": "Speciation of a clustered modality joined to one without clusters: four kinds of coupling, "
            "simulation over κ(t) = 1 (left). Over the plane of both couplings (right): contours of the time, and the "
            "bounds of stability, of contraction, and of real modes.",
            "collapse": "Collapse of scores of stored samples: crossings in growing dimension, the line through them, "
            "and theory at 1/d = 0 (open).",
            "filter": "Commitment of waves around a ring of eight modalities, against the rate that the coupling gives "
            "them. All couplings fall on one curve, the clock of the process.",
            "schedules": "Couplings that change in time (left), the gaps that they open (right), and the response of "
            "both modes' times to coupling at a given time (middle).",
        },
        methods=[
            f"Reverse paths by exact steps of the reverse SDE with exact scores, {settings['steps']} from a branch to "
            f"the data, {settings['paths']} pairs of clones per point. Clones start at one state of the noised law and "
            "go on with independent noise. A time is read off a weighted cubic through the points whose correlation "
            f"lies within 0.2 of the wanted one; its error comes from theirs. Seed {settings['seed']}; no random "
            "number serves two points.",
            "Common and difference mode of the pair are each in two clusters ±2 of variance 0.25, independent of each "
            "other; b = D = 1. In the anisotropic part the first modality is in such clusters, the second is Gaussian "
            "of variance 1.",
            f"Collapse: {settings['trials']} draws of a data set of exp(0.3 d) pairs, d Gaussian modes of unit "
            "variance each for the common and the difference mode; one sample is noised, and its weight in the "
            "empirical score compared with all others. A score that knows one mode alone does not see the other.",
        ],
        limits=[
            "The laws are those in which modes are independent and clustered: for independently clustered modalities "
            "coupling opens no gap of first order between the curvatures (docs/theory.md, 13.4).",
            "The extrapolation in 1/d is a line; its own error is not in the interval.",
            "The cubic through the points costs less than the errors shown: the tables give what it makes of the exact "
            "curve.",
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
    head = ["g", "common, theory", "simulation", "fit of theory", "difference, theory", "simulation", "fit of theory",
            "gap, theory", "simulation"]  # fmt: skip
    return Table("Speciation times under a symmetric coupling", head, rows, "± one standard error.")


def _unequal_table(unequal: xr.Dataset) -> Table:
    rows = [
        [str(kind), f"{g:g}", f"{unequal.unequal_theory.values[i, j]:.3f}", _plus(unequal.unequal.values[i, j]),
         f"{unequal.unequal_fitted.values[i, j]:.3f}"]
        for i, kind in enumerate(unequal.kind.values)
        for j, g in enumerate(unequal.strength.values)
        if np.isfinite(unequal.unequal_theory.values[i, j])
    ]  # fmt: skip
    return Table("The joint criterion", ["coupling", "g", "theory", "simulation", "fit of theory"], rows)


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


# --- figures


def _points(ax, x, reading: np.ndarray, color, label: str | None = None) -> None:
    style: Any = {"marker": "o", "markersize": 3.5, "linestyle": "none", "color": color, "elinewidth": 1.1}
    ax.errorbar(x, reading[..., 0], 2 * reading[..., 1], label=label, **style)


def figure_timescales(rates: xr.Dataset) -> Figure:
    """Rates against the coupling."""
    figure, ax = new_figure(5.0, 3.0)
    g = rates.coupling.values
    for i, (mode, color) in enumerate(zip(rates.mode.values, (COMMON, DIFFERENCE), strict=True)):
        ax.plot(g, rates.rate_theory.values[:, i], color=color, linestyle="--", linewidth=1.2)
        _points(ax, g, np.stack([rates.rate.values[:, i], rates.rate_error.values[:, i]], -1), color, f"{mode} mode")
    ax.set(xlabel="coupling  $g$", ylabel="relaxation rate", ylim=(0, None))
    ax.legend()
    return figure


def figure_speciation(pair: xr.Dataset) -> Figure:
    """Curves of clones."""
    figure, axes = new_figure(7.2, 3.2, 1, 2, sharey=True)
    shown = [i for i, g in enumerate(pair.coupling.values) if g in (0, 0.3, 0.6, 0.9)]
    for mode, ax in enumerate(axes):
        for i, color in zip(shown, COLORS, strict=False):
            ax.plot(pair.time, pair.correlation_theory[i, :, mode], color=color, linestyle="--", linewidth=1.1)
            reading = np.stack([pair.correlation.values[i, :, mode], pair.correlation_error.values[i, :, mode]], -1)
            _points(ax, pair.time.values, reading, color, f"$g$ = {pair.coupling.values[i]:g}")
        ax.axhline(SPECIATION, color=QUIET, linestyle=":", linewidth=1)
        ax.set(xlabel="time of the branch   (generation $\\leftarrow$)", title=f"{pair.mode.values[mode]} mode")
    axes[0].set_ylabel("correlation of clones' labels")
    axes[1].legend()
    return figure


def figure_gap(pair: xr.Dataset) -> Figure:
    """Times and gap against the coupling."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    g, fine = pair.coupling.values, np.linspace(0, 0.97, 120)
    for i, (mode, color) in enumerate(zip(pair.mode.values, (COMMON, DIFFERENCE), strict=True)):
        rate = RATE + (-1, 1)[i] * fine
        left.plot(fine, np.asarray(transition_time(rate, SPREAD)), color=color, linestyle="--", linewidth=1.2)
        _points(left, g, pair.speciation.values[:, i], color, f"{mode} mode")
    left.set(xlabel="coupling  $g$", ylabel="speciation time")
    left.legend()
    right.plot(fine, np.asarray(speciation_gap(RATE, fine, SPREAD, SPREAD)), color=INK, linestyle="--", label="exact")
    far = np.asarray(gap_large_spread(RATE, fine, SPREAD))
    right.plot(fine, far, color=QUIET, linestyle=":", label="far clusters")
    _points(right, g, gaps(pair.speciation.values), THIRD, "simulation")
    right.set(xlabel="coupling  $g$", ylabel="gap  $t_u - t_v$", ylim=(-0.1, 1.4))
    right.legend()
    return figure


def figure_anisotropic(unequal: xr.Dataset) -> Figure:
    """Times by kind of coupling, and the plane of couplings."""
    from experiments.modalities import plane_of_couplings, unequal_time

    figure, (left, right) = new_figure(7.2, 3.4, 1, 2)
    for i, (kind, color) in enumerate(zip(unequal.kind.values, COLORS, strict=False)):
        top = 0.99 if kind == "symmetric" else 1.3
        fine = np.linspace(0, top, 25)
        left.plot(fine, [unequal_time(str(kind), g) for g in fine], color=color, linestyle="--", linewidth=1.1)
        _points(left, unequal.strength.values, unequal.unequal.values[i], color, str(kind))
    left.set(xlabel="coupling", ylabel="speciation time")
    left.legend(fontsize=7.5)
    axis, times = plane_of_couplings()
    drawn = right.contour(axis, axis, times, levels=np.arange(0.4, 1.6, 0.1), cmap="viridis", linewidths=1.1)
    right.clabel(drawn, fontsize=7)
    g = np.linspace(0.5, 2, 100)
    for sign in (1, -1):
        right.plot(sign * g, sign / g, color=DIFFERENCE, linewidth=1.4, label="stable" if sign > 0 else None)
        right.plot([-2, 2], [2 + 2 * sign, -2 + 2 * sign], color=QUIET, linestyle="--", linewidth=1.1,
                   label="contracting" if sign > 0 else None)  # fmt: skip
    right.fill_between([-2, 0], 0, 2, color=FAINT, alpha=0.5, linewidth=0, label="rotating")
    right.fill_between([0, 2], -2, 0, color=FAINT, alpha=0.5, linewidth=0)
    right.set(
        xlabel="$g_{12}$: second drives first", ylabel="$g_{21}$: first drives second", xlim=(-2, 2), ylim=(-2, 2)
    )
    right.legend(fontsize=7, loc="lower left")
    return figure


def figure_collapse(stored: xr.Dataset) -> Figure:
    """Crossings against 1 / d."""
    figure, axes = new_figure(7.2, 3.0, 1, len(stored.g), sharey=True)
    for i, (g, ax) in enumerate(zip(stored.g.values, axes, strict=True)):
        for j, (score, color) in enumerate(zip(stored.score.values, (INK, COMMON, DIFFERENCE), strict=True)):
            x = 1 / stored["size"].values
            _points(ax, x, stored.collapse.values[i, j], color, str(score))
            slope = np.polyfit(x, stored.collapse.values[i, j, :, 0], 1, w=1 / stored.collapse.values[i, j, :, 1])
            ax.plot([0, x[0]], np.polyval(slope, [0, x[0]]), color=color, linewidth=0.9)
            ax.plot(0, stored.collapse_theory.values[i, j], "D", color=color, markerfacecolor="white", markersize=5)
        ax.set(xlabel="1 / d", title=f"$g$ = {g:g}", xlim=(-0.006, None))
    axes[0].set_ylabel("collapse time")
    axes[0].legend(fontsize=7.5)
    return figure


def figure_filter(ring: xr.Dataset) -> Figure:
    """Times against rates."""
    figure, ax = new_figure(5.4, 3.2)
    rate = np.linspace(ring.wave_rate.values.min() - 0.05, ring.wave_rate.values.max() + 0.05, 200)
    ax.plot(rate, np.asarray(transition_time(rate, 4.0)), color=INK, linestyle="--", label="$f(\\lambda; S)$")
    for i, (g, color) in enumerate(zip(ring.g.values, COLORS, strict=False)):
        _points(ax, ring.wave_rate.values[i], ring.commitment.values[i], color, f"$g$ = {g:g}")
    ax.set(xlabel="rate  $\\lambda = b - 2 g \\cos(2 \\pi a / 8)$", ylabel="commitment time")
    ax.legend()
    return figure


def figure_schedules(time: xr.Dataset) -> Figure:
    """Schedules, response, gaps."""
    figure, (left, middle, right) = new_figure(7.4, 3.3, 1, 3, width_ratios=(1, 1, 1.15))
    names = list(time.schedule.values)
    for name, g, color in zip(names, time.schedule_coupling.values, COLORS, strict=True):
        left.step(time.step, g, where="mid", color=color, linewidth=1.2, label=name)
    left.set(xlabel="time", ylabel="coupling")
    s = np.linspace(0, 1.6, 200)
    for sign, color, mode in ((-1, COMMON, "common"), (1, DIFFERENCE, "difference")):
        response = -sign * np.asarray(schedule_response(RATE + sign * 0.3, SPREAD, s))
        middle.plot(s, response, color=color, label=mode)
    middle.axhline(0, color=FAINT, linewidth=0.8)
    middle.set(xlabel="time of the coupling", ylabel="change of the speciation time", title="Response at $g$ = 0.3")
    middle.legend(fontsize=7.5)
    held, place = gaps(time.scheduled.values), np.arange(len(names))
    exact = time.scheduled_theory.values[:, 0] - time.scheduled_theory.values[:, 1]
    right.barh(place, exact, color=[*COLORS[: len(names)]], alpha=0.35, height=0.6)
    right.errorbar(held[:, 0], place, xerr=2 * held[:, 1], color=INK, marker="o", markersize=3.5, linestyle="none")
    right.set_yticks(place, names, fontsize=7.5)
    right.invert_yaxis()
    right.set(xlabel="gap  $t_u - t_v$")
    return figure
