"""Figures and text of the solvable-data study."""

from functools import partial
from typing import Any

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import (
    FAINT,
    INK,
    LEVEL_LABEL,
    QUIET,
    TAU_LABEL,
    band_colors,
    band_legend,
    band_names,
    new_figure,
)
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted
from experiments.frame.settings import SAMPLER_NAMES
from experiments.frame.steps import WINDOW_START
from experiments.frame.verdict import Claim, Control, Verdict, bounds, within
from experiments.studies.solvable.settings import CLAIMS, SolvableConfig
from ou_theory.bootstrap import family_level

TAU_WITHIN = 0.15  # nats
STEPS_WITHIN = 1.0  # sampler steps
FLOOR = 0.1  # a band is left out if its relative error energy where the window opens is above this
SOURCES = {"network": "network", "exact": "exact denoiser, same instrument", "untrained": "untrained network"}
SIGN_COLORS = ("#0072B2", "#D55E00", "#009E73")


def page(measured: Measured[SolvableConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures = {
        "commitment": partial(figure_commitment, analysis),
        "speciation": partial(figure_speciation, analysis),
        "cloning": partial(figure_cloning, analysis),
    }
    return Page(section(measured, analysis), figures)


def deviations(analysis: xr.Dataset, source: str, name: str = "tau") -> np.ndarray:
    """Commitment level minus theory by band, with interval (B, 3); ``tau_claimed`` has the intervals of the claims."""
    return analysis[f"{source}_{name}"].values - analysis.theory_tau.values[:, None]


def step_shifts(analysis: xr.Dataset, source: str) -> np.ndarray:
    """Step of speciation minus theory by sign, with the interval of the claims (sign, 3)."""
    return analysis[f"{source}_speciation_step_claimed"].values - analysis.theory_speciation_step.values[:, None]


def floors(analysis: xr.Dataset, source: str, start: float = WINDOW_START) -> np.ndarray:
    """Noise floor (B,): relative energy at the opening of the window beyond what the exact recursion has there."""
    first = int(np.searchsorted(analysis.ell.values, start))
    return analysis[f"{source}_q"].values[0, first, :, 0] - analysis.theory_q.values[first]


def curves_agree(analysis: xr.Dataset, source: str) -> tuple[Verdict, float, float]:
    """Verdict on the cloning curves (inside their simultaneous bands or not), largest and mean deviation."""
    bands = analysis[f"{source}_clone_band"].values - analysis.theory_clone.values[..., None]
    signs = analysis[f"{source}_clone_sign_shift"].values
    apart = np.concatenate([bands.reshape(-1, 3), signs.reshape(-1, 3)])
    inside = bool(np.all((apart[:, 1] <= 0) & (apart[:, 2] >= 0)))
    off = np.abs(apart[:, 0])
    return ("holds" if inside else "does not hold"), float(off.max()), float(off.mean())


def section(measured: Measured[SolvableConfig], analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings = measured.config
    clean = floors(analysis, "network") <= FLOOR
    if not clean.any():
        clean = ~clean  # then every band counts, and the claim fails by itself
    names = band_names(analysis)
    shift = deviations(analysis, "network", "tau_claimed")
    worst = int(np.argmax(np.where(clean, np.abs(shift[:, 0]), -1)))
    speciation = step_shifts(analysis, "network")
    last = int(np.argmax(np.abs(speciation[:, 0])))
    verdicts = (
        within(shift[clean, 1:], TAU_WITHIN),
        within(speciation[:, 1:], STEPS_WITHIN),
        curves_agree(analysis, "network"),
    )
    claims = [
        Claim(
            0,
            f"Every band of the Gaussian law commits within {TAU_WITHIN} nats of the exact recursion",
            verdicts[0],
            f"largest deviation, nats, in {names[worst]}",
            float(shift[worst, 0]),
            bounds(shift[worst]),
            "Nothing is fitted: the recursion knows the law and the sampler, not the network."
            + ("" if clean.all() else f" Left out because of their noise floor: {', '.join(np.array(names)[~clean])}."),
            [_tau_control(analysis, source, clean) for source in ("exact", "untrained")],
            family_level(CLAIMS),
        ),
        Claim(
            0,
            "Every sign is decided within one sampler step of where the law's symmetry breaks",
            verdicts[1],
            f"largest deviation, steps, {analysis.sign.values[last]}",
            float(speciation[last, 0]),
            bounds(speciation[last]),
            "A sign is decided at the step where a difference along its centre begins to grow. Theory puts this step "
            "where κ, the signal-to-noise ratio along the centre, is 1.",
            [_speciation_control(analysis, source) for source in ("exact", "untrained")],
            family_level(CLAIMS),
        ),
        Claim(
            0,
            "The cloning curves are those of the law",
            verdicts[2][0],
            "largest deviation of a correlation",
            verdicts[2][1],
            None,
            "The claim holds if the curves' simultaneous bands contain the exact values at every branch. For the "
            "Gaussian law, the exact values are those of this sampler in closed form. For the pair's signs, they are "
            "those of the exact denoiser from the same states and noise. The mean deviation is "
            f"{verdicts[2][2]:.3f}.",
            [_clone_control(analysis, source) for source in ("exact", "untrained")],
            family_level(CLAIMS),
        ),
    ]
    gap = analysis.network_speciation_gap.values
    known = float(analysis.theory_speciation[2] - analysis.theory_speciation[1])
    return Section(
        title=f"Solvable data: {measured.subject_name}",
        question="Trained on data whose law is known, does a network decide when the theory says it must?",
        answer=f"Bands commit within {np.abs(shift[clean, 0]).max():.3f} nats of theory, signs are decided within "
        f"{np.abs(speciation[:, 0]).max():.2f} sampler steps of it, and correlations of clones lie within "
        f"{verdicts[2][1]:.3f} of the exact values. The gap between the two signs of the coupled pair is "
        f"{formatted(gap)} nats; theory says {known:.2f}.",
        claims=claims,
        tables=[_band_table(analysis), _sign_table(analysis)],
        captions={
            "commitment": "Left: commitment level of every band of the Gaussian law, for the network and the exact "
            "denoiser through the same instrument, beside the exact recursion. Right: their deviations from the "
            "recursion; shaded: the tolerance.",
            "speciation": "Growth rate of a difference along a sign's centre, on the surface where the sign is "
            "undecided. The law's symmetry breaks where the rate turns positive. Lines: closed form. Points: network, "
            "with intervals.",
            "cloning": "Correlation of the ends of two clones against the level at which they branch: bands of the "
            "Gaussian law (left) and signs (right). Lines: exact for this sampler (left), the law's own (right). "
            "Points: network, with intervals.",
        },
        methods=[
            f"{settings.pairs} pairs per law, {settings.steps} steps. Three laws of 8 × 8 images with two "
            "channels: a Gaussian with a power-law spectrum; the same with one sign in the common mode of the "
            "channels; and with two signs, a strong one in the common and a weak one in the difference mode.",
            f"Commitment: pairs run under {SAMPLER_NAMES[settings.sampler]}; energies of the denoised difference by "
            "band are compared with the recursion, evaluated coefficient by coefficient. Speciation: states of the law "
            "are moved to where all signs are equally likely, and one derivative along the centre is taken through the "
            "denoiser. Cloning: states of the law are continued twice with independent noise, under the ancestral "
            "sampler with the posterior variance.",
        ],
        limits=[
            "Intervals come from resampling pairs of one network. They do not speak for a network trained again.",
            "The closed form for the signs' clones is that of continuous time; the exact denoiser shows what the "
            "sampler's steps change.",
        ],
    )


def _tau_control(analysis: xr.Dataset, source: str, clean: np.ndarray) -> Control:
    shift = deviations(analysis, source, "tau_claimed")[clean]
    worst = int(np.argmax(np.abs(shift[:, 0])))
    also = within(shift[:, 1:], TAU_WITHIN) == "holds"
    interval = bounds(shift[worst])
    return Control(SOURCES[source], float(shift[worst, 0]), interval, also, _expected(source))


def _speciation_control(analysis: xr.Dataset, source: str) -> Control:
    shift = step_shifts(analysis, source)
    if not np.isfinite(shift[:, 0]).any():
        return Control(SOURCES[source], None, None, False, "No difference along a centre begins to grow at any step.")
    worst = int(np.nanargmax(np.abs(shift[:, 0])))
    also = within(shift[:, 1:], STEPS_WITHIN) == "holds"
    interval = bounds(shift[worst])
    return Control(SOURCES[source], float(shift[worst, 0]), interval, also, _expected(source))


def _clone_control(analysis: xr.Dataset, source: str) -> Control:
    verdict, largest, _ = curves_agree(analysis, source)
    return Control(SOURCES[source], largest, None, verdict == "holds", _expected(source))


def _expected(source: str) -> str:
    if source == "exact":
        return "The posterior mean itself through the same code: its error is that of the instrument and the steps."
    return "The same architecture with random weights; the claim must fail on it."


def _band_table(analysis: xr.Dataset) -> Table:
    rows = []
    for band, name in enumerate(band_names(analysis)):
        rows.append(
            [
                name,
                f"{float(analysis.theory_tau[band]):.3f}",
                *(formatted(analysis[f"{source}_tau"].values[band], 3) for source in SOURCES),
                formatted(deviations(analysis, "network")[band], 3),
                f"{floors(analysis, 'network')[band]:.3f}",
            ]
        )
    head = ["band", "recursion", *SOURCES.values(), "network − recursion", "noise floor"]
    return Table("Commitment level of the Gaussian law, nats", head, rows)


def _sign_table(analysis: xr.Dataset) -> Table:
    rows = []
    for s, name in enumerate(analysis.sign.values):
        theory = f"{float(analysis.theory_speciation[s]):.3f} ({float(analysis.theory_speciation_step[s]):.2f})"
        found = [formatted(analysis[f"{source}_speciation"].values[s], 3) for source in SOURCES]
        steps = [formatted(analysis[f"{source}_speciation_step"].values[s]) for source in ("network", "exact")]
        rows.append([str(name), theory, *found, *steps])
    head = ["sign", "theory, κ = 1 (step)", *SOURCES.values(), "network, step", "exact denoiser, step"]
    return Table("Speciation level, nats of log-SNR", head, rows)


def figure_commitment(analysis: xr.Dataset) -> Figure:
    """Levels by band and deviations."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    bands = np.arange(analysis.sizes["band"])
    left.plot(bands, analysis.theory_tau, color=INK, linestyle="--", label="exact recursion")
    right.axhspan(-TAU_WITHIN, TAU_WITHIN, color=FAINT, alpha=0.5, linewidth=0)
    right.axhline(0, color=INK, linestyle="--", linewidth=1)
    for source, color, offset in (("network", "#0072B2", -0.08), ("exact", "#D55E00", 0.08)):
        for ax, values in ((left, analysis[f"{source}_tau"].values), (right, deviations(analysis, source))):
            ax.vlines(bands + offset, values[:, 1], values[:, 2], color=color, linewidth=1.2)
            ax.plot(bands + offset, values[:, 0], color=color, marker="o", markersize=4, linestyle="none", label=source)
    for ax in (left, right):
        ax.set_xticks(bands, band_names(analysis), rotation=30, ha="right")
    left.set_ylabel(TAU_LABEL)
    right.set_ylabel("minus recursion (nats)")
    left.legend()
    return figure


def figure_speciation(analysis: xr.Dataset) -> Figure:
    """Growth rates along the signs' centres."""
    figure, ax = new_figure(7.2, 3.6)
    ax.axhline(0, color=QUIET, linewidth=0.8)
    for s, (name, color) in enumerate(zip(analysis.sign.values, SIGN_COLORS, strict=True)):
        values = analysis.network_growth.values[:, s]
        ax.plot(analysis.ell, analysis.theory_growth[:, s], color=color, linestyle="--", linewidth=1.2)
        ax.vlines(analysis.ell, values[:, 1], values[:, 2], color=color, linewidth=1)
        ax.plot(analysis.ell, values[:, 0], color=color, marker="o", markersize=3, linestyle="none", label=name)
        ax.axvline(float(analysis.theory_speciation[s]), color=color, linewidth=0.8, linestyle=":")
    ax.set_xlabel(LEVEL_LABEL)
    ax.set_ylabel("growth per nat of ln(1/σ)")
    ax.legend()
    return figure


def figure_cloning(analysis: xr.Dataset) -> Figure:
    """Cloning curves by band and by sign."""
    figure, (left, right) = new_figure(7.2, 3.4, 1, 2, sharey=True)
    point: Any = {"marker": "o", "markersize": 3.5, "linestyle": "none"}
    for band, color in enumerate(band_colors(analysis)):
        values = analysis.network_clone.values[:, band]
        left.plot(analysis.branch_ell, analysis.theory_clone[:, band], color=color, linestyle="--", linewidth=1)
        left.vlines(analysis.branch_ell, values[:, 1], values[:, 2], color=color, linewidth=1)
        left.plot(
            analysis.branch_ell,
            values[:, 0],
            color=color,
            marker="o",
            ms=3.5,
            ls="none",
            label=band_names(analysis)[band],
        )
    for s, (name, color) in enumerate(zip(analysis.sign.values[1:], SIGN_COLORS[1:], strict=True)):
        values = analysis.network_clone_sign.values[:, s]
        right.plot(analysis.branch_ell, analysis.theory_clone_sign[:, s], color=color, linestyle="--", linewidth=1)
        right.vlines(analysis.branch_ell, values[:, 1], values[:, 2], color=color, linewidth=1)
        right.plot(analysis.branch_ell, values[:, 0], color=color, label=name, **point)
    left.set_ylabel("correlation of clones")
    for ax in (left, right):
        ax.set_xlabel(LEVEL_LABEL)
    right.legend()
    band_legend(figure, left, "")
    return figure
