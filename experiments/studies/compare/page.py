"""What the page of the main study says, from its analysis."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from experiments.frame.drawing import band_names
from experiments.frame.estimator import ESTIMATORS
from experiments.frame.gates import COMMON, RHO, told
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, number
from experiments.frame.settings import SAMPLER_NAMES, GateKind
from experiments.studies.compare.claimed import CLAIMS
from experiments.studies.compare.claims import claims
from experiments.studies.compare.figures import FIGURES
from experiments.studies.compare.settings import CompareConfig
from experiments.studies.compare.theory import EXACT, RECURSIONS, exact_gain, exact_of, recursion_of
from experiments.studies.compare.wording import BANDS, QUESTIONS, SORTED, first_and_last, modes_of
from ou_theory.bootstrap import family_level


def page(measured: Measured[CompareConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    pictures = measured.load("pictures")
    groups = {"analysis": analysis, "pictures": pictures}
    figures = {name: partial(draw, groups[group]) for name, (group, draw) in FIGURES.items()}
    preview = pictures.attrs.get("preview", "pixels")
    return Page(section(measured.manifest, analysis, preview), figures)


def section(manifest: Mapping[str, Any], analysis: xr.Dataset, preview: str = "pixels") -> Section:
    """What the study found, in words and tables.

    Args:
      preview: what the pictures show: ``"pixels"``, or what of a latent.
    """
    attrs, found, names = analysis.attrs, claims(analysis), band_names(analysis)
    low, high = (names[attrs[f"{end}_band"]] for end in ("low", "high"))
    network = analysis.sel(source="network")
    first, last = (_cell(network.isel(coupling=i), "gap") for i in (0, -1))
    recursion, exact = recursion_of(analysis), exact_of(analysis)
    uncoupled = _cell(analysis.sel(source=exact).isel(coupling=0), "gap")
    by_gain = _cell(analysis.sel(source=recursion).isel(coupling=-1), "gap")
    strongest, (early, late) = f"g = {float(analysis.coupling[-1]):.4g}", first_and_last(analysis)
    kind = modes_of(analysis)
    if kind != "dct":
        low, high = early, late
    return Section(
        title=f"Synchronization gap of {attrs['model']}",
        question=QUESTIONS[kind],
        answer=f"Uncoupled, {late} commits {first} nats after {early}. An exact denoiser made for "
        f"{EXACT[exact]} has {uncoupled}. At {strongest} the gap is {last} nats, and {by_gain} by the recursion under "
        f"the {recursion} of the network. Differences in single bands can cancel in a gap; the tables have them.",
        claims=found,
        tables=[
            coupling_table(analysis),
            estimator_table(analysis),
            energy_table(analysis),
            band_table(analysis),
            *(excess_table(analysis, theory) for theory in analysis.theory.values),
        ],
        captions=captions(analysis, preview),
        methods=[
            _run(manifest, analysis),
            *methods(attrs["gate_kind"], kind),
            _theories(analysis),
            _controls(analysis),
        ],
        limits=limits(analysis),
        definitions=definitions(low, high, attrs["draws"], attrs["gate_kind"], kind),
    )


def _run(manifest: Mapping[str, Any], analysis: xr.Dataset) -> str:
    attrs, model = analysis.attrs, manifest.get("model") or {}
    about = (
        f" ({model['depth']} layers of width {model['hidden_size']}, patch {model['patch_size']}, "
        f"{model['input_size']} × {model['input_size']} × {model['in_channels']}, {attrs['prediction']}-prediction)"
        if model
        else ""
    )
    return (
        f"{attrs['pairs']} pairs of replicas of {attrs['model']}{about}, each pair at every coupling from the same "
        f"noise: {attrs['steps']} steps of {SAMPLER_NAMES.get(attrs['sampler'], attrs['sampler'])}, gate "
        f"{attrs['gate_kind']}, guidance {attrs['guidance']:g}, seed {attrs['seed']}. Couplings: "
        f"{', '.join(f'{g:.4g}' for g in analysis.coupling.values)}. The one-pass gain was measured on "
        f"{attrs['gain_pairs']} of the pairs, the untrained control on {attrs['untrained_pairs']}."
    )


def methods(kind: GateKind, modes: str = "dct") -> list[str]:
    """How it was measured under a kind of gate and by kind of modes, for readers who know attention."""
    return [text.format(coupled=told(kind), sorted=SORTED[modes]) for text in METHODS]


METHODS = [
    "A diffusion model turns noise into an image in many steps, and the image is not decided all at once. To see "
    "when, run two trajectories – a pair of replicas – of the same class from different noise, and compare at every "
    "step the clean image that each predicts. Where nothing is decided yet, both predict the same blur. Once "
    "something is decided, they differ. Sorted by {sorted}, this difference shows which parts of an image "
    "are settled early and which late.",
    "Then let the replicas see each other: in every attention layer {coupled} What that does to their difference is "
    "measured band by band: it may fade in some bands and grow in others.",
]
_ALONG = (
    "How much coupling shrinks a difference in one pass is measured with nothing fitted: the gain is the part of the "
    "denoised difference that lies along the difference of the states, and the rest enters as noise that is new at "
    "every step (docs/theory.md, section 7.7). Uncoupled, the energies are then the network's own by construction, and "
    "what is left of a level says that the rest is not new at every step. The energy gain is the other extreme: it "
    "counts the rest as if it lay along the states."
)
_BY_ENERGY = (
    "How much coupling shrinks a difference in one pass is measured with nothing fitted, as roots of ratios of "
    "energies. This run is of an older version, which stored no inner products: errors count as signal, and the unlike "
    "colours of a band as one mode."
)


def _theories(analysis: xr.Dataset) -> str:
    gain = _ALONG if recursion_of(analysis) == "regression gain" else _BY_ENERGY
    exact, kind = exact_of(analysis), analysis.attrs["gate_kind"]
    ideal = RHO[kind]
    if COMMON[kind] != "1":
        ideal += (
            f", which is what values and keys pass on (what the replicas have in common would be {COMMON[kind]} times "
            "too large, so that only the difference means anything),"
        )
    warning = (
        " The colours and coefficients of a band count as alike there, which they are not: single bands can be off by "
        "more than a nat where the gap is not. It is known where the model's folder holds the covariance of its data; "
        "syncgap covariance adds it."
        if exact == "sample variance"
        else ""
    )
    return (
        "The theory is a pair of coupled Ornstein–Uhlenbeck processes whose sampler can be solved exactly, step by "
        f"step. It stands here twice. First as an exact denoiser made for {EXACT[exact]}, whose difference is "
        f"multiplied by {ideal} in every mode.{warning} Second as a recursion under the network's own gain. " + gain
    )


def captions(analysis: xr.Dataset, preview: str) -> dict[str, str]:
    """Captions of the figures, by name; `preview`: see `section`."""
    exact = EXACT[exact_of(analysis)]
    recursions = "; ".join(f"{name}: {text}" for name, text in RECURSIONS.items() if name in analysis.source)
    shown = "" if preview == "pixels" else f" Shown: {preview}."
    return {
        **CAPTIONS,
        "gap": "The synchronization gap against the coupling. Blue: the network, with 95 % intervals. Broken lines: "
        f"recursions under the network's one-pass gain, nothing fitted, {recursions}. Dotted: an exact denoiser made "
        f"for {exact}; where its gain is 0 nothing individual is left in it. Grey: the untrained network.",
        "pictures": CAPTIONS["pictures"] + shown,
    }


CAPTIONS = {
    "commitment": "When each band commits. Points: the network with its intervals; open points rest on too little. "
    "Lines: the recursion under the gain measured in one pass (dark), and the exact denoiser (light).",
    "decided": "How much of each band the replicas still decide individually, against the coupling.",
    "relative_energy": "The energy of the replicas' difference along the trajectory, relative to the end of the "
    "uncoupled run. Solid: network. Dashed: recursion under the gain measured in one pass. Shaded: before the window "
    "of the estimator.",
    "gain": "What one pass through the network leaves of a difference between the replicas, band by band. In the ideal "
    "model all curves lie on the dotted line.",
    "pictures": "Replicas A and B of several pairs, without coupling and with the strongest, from the same noise.",
    "noise_floor": "The part of the relative energy at the start of the window that is error rather than decision.",
    "calibration": "The instrument on a system whose answer is known: an exact denoiser run through the same pipeline "
    "(points) against its own theory (lines), and the difference.",
}


def definitions(low: str, high: str, draws: int, kind: GateKind, modes: str = "dct") -> dict[str, str]:
    """What the words of the page mean."""
    sign = "low frequencies commit first" if modes == "dct" else f"{low} commits first"
    return {
        "Band, log-SNR ℓ": f"{BANDS[modes]} Low is {low}, high is {high}. ℓ is the logarithm of the "
        "signal-to-noise ratio in nats, and rises as generation goes on.",
        "Aligned energy": "The part of the energy of the predicted difference that lies along the final difference of "
        "the same pair, in units of what the band has at the end uncoupled. Errors that have nothing to do with the "
        "outcome average out of it.",
        "Decided fraction F": "The largest aligned energy that a coupled pair reaches in a band: how much of the band "
        "the replicas decide each for itself. It is above 1 where coupling amplifies their difference.",
        "Commitment level τ": "The mean log-SNR at which that fraction gets decided: the end of the window minus the "
        "area under the running maximum of the aligned energy over F. Uncoupled Gaussian modes commit where their "
        "signal-to-noise ratio is 1.",
        "Synchronization gap Γ": "τ of the high band minus τ of the low band, in nats. Positive: "
        f"{sign}. In sampler steps the same difference is read off at the steps of this run, so it depends on "
        "their number.",
        "One-pass gain ρ": "How much one pass through the coupled network shrinks the difference of two given inputs, "
        f"relative to the uncoupled network: 1 leaves it, 0 removes it. The ideal model has {RHO[kind]}. It is the "
        "root of a ratio of energies, errors included; the recursion takes another gain (docs/theory.md, 7.7).",
        "Noise floor": "The part of the relative energy Q at the start of the window that is not aligned with the "
        "outcome. It is the network's error, and estimators that take all energy count it as an early decision.",
        "Interval": f"The middle 95 % of {draws} estimates on resampled pairs (percentile bootstrap). One draw serves "
        "all bands, steps and couplings, so that differences and ratios keep their own, narrower intervals. The "
        f"intervals of the {CLAIMS} claims are wider, {100 * family_level(CLAIMS):.1f} % each, so that all of them "
        "together hold the truth with 95 %.",
    }


def coupling_table(analysis: xr.Dataset) -> Table:
    """Over couplings: g, tau low and high, F low and high, the gap three ways and the untrained one."""
    network = analysis.sel(source="network")
    ends = [analysis.attrs["low_band"], analysis.attrs["high_band"]]
    rows = []
    for c, g in enumerate(analysis.coupling.values):
        at, here = network.isel(coupling=c), analysis.isel(coupling=c)
        row = [f"{g:.4g}"]
        row += [_cell(at.isel(band=band), "tau") + ("†" if at.weak[band] else "") for band in ends]
        row += [_cell(at.isel(band=band), "decided", 3) for band in ends]
        row += [_cell(at, "gap"), _cell(at, "gap_steps", 1)]
        others = (recursion_of(analysis), exact_of(analysis), "untrained")
        row += [_cell(here.sel(source=source), "gap") for source in others]
        rows.append(row)
    head = ["g", "τ low, nats", "τ high, nats", "F low", "F high", "gap Γ, nats", "gap Γ, steps"]
    head += [f"gap, {recursion_of(analysis)}, nats", f"gap, {exact_of(analysis)}, nats", "gap, untrained, nats"]
    note = "95 % intervals in brackets; – where there is nothing to tell."
    if any("†" in cell for row in rows for cell in row):
        note += " † No more is decided there than the error where the window opens; the level is not known."
    return Table("Commitment against the coupling", head, rows, note)


def estimator_table(analysis: xr.Dataset) -> Table:
    """The network's gap by every estimator, over couplings."""
    rows = [
        [f"{g:.4g}", *(_cell_by(analysis, name, c) for name in analysis.estimator.values)]
        for c, g in enumerate(analysis.coupling.values)
    ]
    head = ["g", *(ESTIMATORS[name] for name in analysis.estimator.values)]
    note = (
        "Gap of the network in nats, with 95 % intervals. The first column is the headline: it alone gives the known "
        "answer on every test system (docs/theory.md, section 7.4). What the columns say alike does not depend on the "
        "estimator."
    )
    return Table("The gap by four estimators", head, rows, note)


def energy_table(analysis: xr.Dataset) -> Table:
    """Energy of the replicas' final difference by band, over couplings."""
    names = band_names(analysis)
    rows = [
        [
            f"{g:.4g}",
            *(
                formatted([at.end_energy[band].item(), *at.end_energy_interval[band].values], 3)
                for band in range(len(names))
            ),
        ]
        for g, at in ((g, analysis.isel(coupling=c)) for c, g in enumerate(analysis.coupling.values))
    ]
    note = "In units of the uncoupled one; above 1 coupling amplifies the difference."
    return Table("Energy of the difference of the final images", ["g", *names], rows, note)


def _cell_by(analysis: xr.Dataset, name: str, coupling: int) -> str:
    at = analysis.sel(estimator=name).isel(coupling=coupling)
    return _cell(at, "gap_by")


def band_table(analysis: xr.Dataset) -> Table:
    """Over bands, at zero coupling: network, both theories, and how far they are apart."""
    network = analysis.sel(source="network").isel(coupling=0)
    theories = [exact_of(analysis), recursion_of(analysis)]
    rows = []
    for band, name in enumerate(band_names(analysis)):
        at, here = network.isel(band=band), analysis.isel(coupling=0, band=band)
        row = [name, str(int(analysis["count"][band]))]
        if "data_variance" in analysis:
            row += [f"{at.data_variance.item():.3g}", _cell(at, "end_variance")]
        row += [_cell(at, "tau"), number(at.tau_steps.item(), 1)]
        for theory in theories:
            row += [_cell(here.sel(source=theory), "tau"), _cell(here.sel(theory=theory), "tau_excess")]
        rows.append([*row, number(at.projection_level.item()), number(at.floor.item(), 3)])
    head = ["band", "coefficients per channel" if modes_of(analysis) == "dct" else "directions"]
    if "data_variance" in analysis:
        head += ["variance of the data", "network's over that"]
    head += ["τ, nats", "τ, sampler step"]
    for theory in theories:
        head += [f"τ, {theory}", "τ less that"]
    note = (
        "The projection level is a check on τ that the noise floor cannot move: where the predicted difference, "
        "projected on the final one, reaches √½ (½ under a stochastic sampler)."
    )
    return Table("Bands without coupling", [*head, "projection level, nats", "noise floor"], rows, note)


def excess_table(analysis: xr.Dataset, theory: str) -> Table:
    """Over couplings: by how much the network's levels and gap differ from those of a theory."""
    kept = [f"{name}_excess{part}" for name in ("tau", "gap") for part in ("", "_interval")]
    excess, names = analysis[kept].sel(theory=theory), band_names(analysis)
    rows = [
        [
            f"{g:.4g}",
            *(_cell(excess.isel(coupling=c, band=band), "tau_excess") for band in range(len(names))),
            _cell(excess.isel(coupling=c), "gap_excess"),
        ]
        for c, g in enumerate(analysis.coupling.values)
    ]
    note = (
        "In nats; 0 would be agreement, below 0 the network commits earlier. The last column is the difference of two "
        "of the others."
    )
    if theory in EXACT and (exact_gain(analysis) < 0).any():
        note += " Where the exact denoiser's gain is below 0 it decides all in its last step."
    return Table(
        f"τ of the network less that by {theory}", ["g", *(f"τ, {name}" for name in names), "gap Γ"], rows, note
    )


def calibration(analysis: xr.Dataset) -> dict[str, str]:
    """Largest deviation of the exact denoiser's measurements from its theory."""
    measured, theory = (analysis.sel(source=source) for source in ("wiener", "wiener theory"))
    return {name: number(float(np.abs(measured[name] - theory[name]).max()), 4) for name in ("gap", "tau", "decided")}


def _controls(analysis: xr.Dataset) -> str:
    off = calibration(analysis)
    made, error = "of the network's own spectrum", ""
    if modes_of(analysis) != "dct":
        made = "made for the variance of the data along each direction"
        error = " Many directions share a band, so that it differs by the sampling error of the pairs."
    return (
        "Controls. The same architecture with random weights everywhere goes through the same instrument: what it "
        f"also shows is not learned. An exact denoiser goes through it, too: a Wiener filter {made}, whose gap, "
        f"levels and fractions are known: its measured gap is at most {off['gap']} nats, its τ at "
        f"most {off['tau']} nats and its F at most {off['decided']} from the theory.{error}"
    )


def limits(analysis: xr.Dataset) -> list[str]:
    """What limits a run: noise floors, bands of which too little is decided, and what no run escapes."""
    names, attrs = band_names(analysis), analysis.attrs
    floor = analysis.floor.sel(source="network").isel(coupling=0).values
    weak = [
        f"{', '.join(names[band] for band in np.flatnonzero(row))} at g = {g:.4g}"
        for g, row in zip(analysis.coupling.values, analysis.weak.sel(source="network").values, strict=True)
        if row.any()
    ]
    noisy = [names[band] for band in np.flatnonzero(floor > attrs["floor_limit"])]
    largest = number(float(np.nanmax(floor, initial=0.0)), 3)
    above = (
        f"It is above {attrs['floor_limit']:g} in {', '.join(noisy)}: there, estimators that take all energy read an "
        "earlier level."
    )
    images = analysis.image_energy.values
    return [
        f"Intervals come from {attrs['pairs']} pairs and are slightly short: in trials with 64 to 128 pairs nominal "
        "95 % intervals covered 91 to 94 %, with 16 pairs 88 to 92 %. They speak for this network, this sampler and "
        "these classes, not for a network trained again.",
        f"The noise floor is {largest} at most. " + (above if noisy else f"No band is above {attrs['floor_limit']:g}."),
        f"The estimator looks at ℓ ≥ {number(attrs['ell_start'], 1)} only, for theory as for the network; what is "
        "decided earlier counts there.",
        f"No more than the error where the window opens is decided in: {'; '.join(weak)}; τ is not known there."
        if weak
        else "In every band and at every coupling more is decided than the error where the window opens.",
        f"A final image has between {number(float(images.min()))} and {number(float(images.max()))} times the energy "
        "of an uncoupled one, over bands and couplings. Far from 1 it is no image such as the network was trained on.",
        "The exact denoiser takes the data as Gaussian. Data that are not commit at that level or earlier. The "
        "recursion takes a band as one linear mode and its residual as new at every step. Where either agrees with the "
        "network, that is a finding, not a matter of course.",
        f"In sampler steps the gap depends on the number of steps ({attrs['steps']} here) and on their spacing; "
        "compare runs in nats.",
        "A gap without coupling follows the spectrum of the data in any denoiser that fits them. This study cannot "
        "tell what of it is the architecture's; syncgap spectrum can.",
        "The two replicas have the same class and independent noise. This study does not look at where in the "
        "network's depth a band commits.",
    ]


def _cell(at: xr.Dataset, name: str, digits: int = 2) -> str:
    return formatted([at[name].item(), *at[f"{name}_interval"].values], digits)
