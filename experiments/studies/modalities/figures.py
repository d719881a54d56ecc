"""Figures of the study of two modalities: simulation in points with two standard errors, theory dashed."""

from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import FAINT, INK, QUIET, new_figure
from experiments.studies.modalities import cases
from experiments.studies.modalities.clone_reading import SPECIATION
from ou_theory.process import transition_time
from ou_theory.schedules import schedule_response
from ou_theory.speciation import gap_large_spread, speciation_gap

COMMON, DIFFERENCE, THIRD = "#0072B2", "#D55E00", "#009E73"
COLORS = (COMMON, DIFFERENCE, THIRD, "#CC79A7", "#E69F00", "#56B4E9", INK)


def gaps(found: np.ndarray) -> np.ndarray:
    """Common minus difference mode, value and error, of readings (..., 2 modes, 2)."""
    return np.stack([found[..., 0, 0] - found[..., 1, 0], np.hypot(found[..., 0, 1], found[..., 1, 1])], -1)


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
    """Correlation of clones against the time of the branch."""
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
    """Speciation times and their gap against the coupling."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    g, fine = pair.coupling.values, np.linspace(0, 0.97, 120)
    for i, (mode, color) in enumerate(zip(pair.mode.values, (COMMON, DIFFERENCE), strict=True)):
        rate = cases.B + (-1, 1)[i] * fine
        left.plot(fine, np.asarray(transition_time(rate, cases.SPREAD)), color=color, linestyle="--", linewidth=1.2)
        _points(left, g, pair.speciation.values[:, i], color, f"{mode} mode")
    left.set(xlabel="coupling  $g$", ylabel="speciation time")
    left.legend()
    right.plot(
        fine,
        np.asarray(speciation_gap(cases.B, fine, cases.SPREAD, cases.SPREAD)),
        color=INK,
        linestyle="--",
        label="exact",
    )
    far = np.asarray(gap_large_spread(cases.B, fine, cases.SPREAD))
    right.plot(fine, far, color=QUIET, linestyle=":", label="far clusters")
    _points(right, g, gaps(pair.speciation.values), THIRD, "simulation")
    right.set(xlabel="coupling  $g$", ylabel="gap  $t_u - t_v$", ylim=(-0.1, 1.4))
    right.legend()
    return figure


def figure_anisotropic(unequal: xr.Dataset) -> Figure:
    """Speciation times by kind of coupling, and over the plane of couplings."""
    figure, (left, right) = new_figure(7.2, 3.4, 1, 2)
    for i, (kind, color) in enumerate(zip(unequal.kind.values, COLORS, strict=False)):
        top = 0.99 if kind == "symmetric" else 1.3
        fine = np.linspace(0, top, 25)
        left.plot(fine, [cases.unequal_time(str(kind), g) for g in fine], color=color, linestyle="--", linewidth=1.1)
        _points(left, unequal.strength.values, unequal.unequal.values[i], color, str(kind))
    left.set(xlabel="coupling", ylabel="speciation time")
    left.legend(fontsize=7.5)
    axis, times = cases.plane_of_couplings()
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
    """Collapse times against 1 / d."""
    figure, axes = new_figure(7.2, 3.0, 1, len(stored.g), sharey=True)
    for i, (g, ax) in enumerate(zip(stored.g.values, axes, strict=True)):
        for j, (score, color) in enumerate(zip(stored.score.values, (INK, COMMON, DIFFERENCE), strict=True)):
            x = 1 / stored["size"].values
            _points(ax, x, stored.collapse.values[i, j], color, str(score))
            value, error = stored.collapse.values[i, j].T
            there = np.isfinite(value)
            if there.sum() > 2:
                line = np.polyfit(x[there], value[there], 1, w=1 / error[there])
                ax.plot([0, x[0]], np.polyval(line, [0, x[0]]), color=color, linewidth=0.9)
            ax.plot(0, stored.collapse_theory.values[i, j], "D", color=color, markerfacecolor="white", markersize=5)
        ax.set(xlabel="1 / d", title=f"$g$ = {g:g}", xlim=(-0.006, None))
    axes[0].set_ylabel("collapse time")
    axes[0].legend(fontsize=7.5)
    return figure


def figure_filter(ring: xr.Dataset) -> Figure:
    """Commitment times against relaxation rates."""
    figure, ax = new_figure(5.4, 3.2)
    rate = np.linspace(ring.wave_rate.values.min() - 0.05, ring.wave_rate.values.max() + 0.05, 200)
    ax.plot(
        rate, np.asarray(transition_time(rate, cases.STRENGTH)), color=INK, linestyle="--", label="$f(\\lambda; S)$"
    )
    for i, (g, color) in enumerate(zip(ring.g.values, COLORS, strict=False)):
        _points(ax, ring.wave_rate.values[i], ring.commitment.values[i], color, f"$g$ = {g:g}")
    ax.set(xlabel="rate  $\\lambda = b - 2 g \\cos(2 \\pi a / 8)$", ylabel="commitment time")
    ax.legend()
    return figure


def figure_schedules(time: xr.Dataset) -> Figure:
    """Schedules, the response to them, and the gaps that they open."""
    figure, (left, middle, right) = new_figure(7.4, 3.3, 1, 3, width_ratios=(1, 1, 1.15))
    names = list(time.schedule.values)
    for name, g, color in zip(names, time.schedule_coupling.values, COLORS, strict=True):
        left.step(time.step, g, where="mid", color=color, linewidth=1.2, label=name)
    left.set(xlabel="time", ylabel="coupling")
    s = np.linspace(0, cases.HORIZON, 200)
    for sign, color, mode in ((-1, COMMON, "common"), (1, DIFFERENCE, "difference")):
        response = -sign * np.asarray(schedule_response(cases.B + sign * 0.3, cases.SPREAD, s))
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
