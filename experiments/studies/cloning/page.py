"""Figures and text of the cloning study."""

from functools import partial

import numpy as np
import xarray as xr
from numpy.typing import ArrayLike

from experiments.frame.drawing import band_names
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted
from experiments.frame.verdict import Claim, Control, Verdict, bounds, within
from experiments.studies.cloning import figures as draw
from experiments.studies.cloning.figures import PARTS, TOLERANCE
from experiments.studies.cloning.settings import CONTRASTS, MEASURES, CloningConfig

CONTROLS = {"exact": "exact Gaussian denoiser", "untrained": "untrained network"}
MEANING = {
    ("q", True): "the predictions along the trajectory vary more than what is decided: they carry errors that later "
    "steps take back",
    ("q", False): "the predictions along the trajectory vary less than what is decided: they are drawn to the mean, "
    "and later steps add what they leave out",
    ("clones", True): "the states hold more of the outcome than the predictions say: fresh noise changes too little",
    ("clones", False): "fresh noise changes more than the predictions leave open",
    ("mmse", True): "a noised end tells more about the image than the sampler's own state at that level has decided: "
    "the states on the way are not noised versions of their ends",
    ("mmse", False): "predictions from noised ends miss more of the image than the sampler's own states leave open: "
    "the denoiser is not the posterior mean of its own ends",
}


def page(measured: Measured[CloningConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures = {
        "curves": partial(draw.figure_curves, analysis),
        "differences": partial(draw.figure_differences, analysis),
        "reasons": partial(draw.figure_reasons, analysis),
    }
    return Page(section(measured, analysis), figures)


def verdict(rms: np.ndarray) -> Verdict:
    """Of the root mean squares (contrast, 3), estimate and interval each.

    Holds if all three intervals lie within the tolerance, does not hold if one lies wholly outside, else undecided.
    """
    return within(rms[:, 1:], TOLERANCE)


def named(contrast: tuple[str, str]) -> str:
    return " and ".join(MEASURES[name] for name in contrast)


def root(squares: ArrayLike) -> np.ndarray:
    """Square roots of noise-corrected mean squares; negative ones count as 0."""
    return np.sqrt(np.maximum(np.asarray(squares), 0))


def odd_one(analysis: xr.Dataset, source: str) -> str:
    """The measurement that differs from the other two, which agree best."""
    closest = CONTRASTS[int(np.argmin(analysis[f"{source}_square"].values[:, 0]))]
    return next(name for name in MEASURES if name not in closest)


def deviation(analysis: xr.Dataset, source: str) -> str:
    """Which measurement deviates, in which bands and by how much, and what that says."""
    measure = odd_one(analysis, source)
    at = {"measure": measure}
    everywhere, undecided, decided = analysis[f"{source}_apart"].sel(at).values
    bands = analysis[f"{source}_apart_band"].sel(at).values
    names = np.array(band_names(analysis))
    sides = {"above": bands[:, 1] > 0, "below": bands[:, 2] < 0}
    text = (
        f"The measurement farthest from the mean of the other two is {MEASURES[measure]}. It differs by "
        f"{formatted(everywhere, 3)} on average, by {formatted(undecided, 3)} where a band is less than half decided, "
        f"and by {formatted(decided, 3)} where it is more."
    )
    for side, found in sides.items():
        if found.any():
            which = [
                f"{name} ({formatted(values, 3)})" for name, values in zip(names[found], bands[found], strict=True)
            ]
            text += f" It lies {side} them in {', '.join(which)}: {MEANING[measure, side == 'above']}."
    return text if any(found.any() for found in sides.values()) else f"{text} No band's interval excludes 0."


def section(measured: Measured[CloningConfig], analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings = measured.config
    rms, steps = root(analysis.network_square.values), root(analysis.network_square_steps.values)
    worst = int(np.argmax(rms[:, 0]))
    found = verdict(rms)
    reasons = analysis.network_parts_mean.values
    kept = analysis.network_kept.values[:, 0]
    claim = Claim(
        0,
        "Q, cloning and 1 − mmse/Var are one quantity",
        found,
        f"root mean square difference of {named(CONTRASTS[worst])} over bands above DC and branch steps, beyond what "
        "finite steps cost",
        float(rms[worst, 0]),
        bounds(rms[worst]),
        "This is the largest of the three disagreements. The claim holds if the intervals of all three end below "
        f"{TOLERANCE:g}, and does not hold if one begins above it. Resampling shows how much of the mean squares is "
        f"sampling noise; that part is taken off. {deviation(analysis, 'network')}",
        [_control(analysis, source) for source in CONTROLS],
    )
    return Section(
        title=f"Cloning: {measured.subject_name}",
        question="How much of an image is decided at a step? Three measurements tell: the spread of predictions, the "
        "correlation of clones that branch there, and the error of one prediction. They give the same curve if the "
        "denoiser is the posterior mean of its own sampler's law.",
        answer=f"The root mean square differences of the three curves, beyond what {settings.steps} steps cost, are "
        + "; ".join(f"{formatted(r, 3)} ({named(c)})" for c, r in zip(CONTRASTS, rms, strict=True))
        + f". The curve farthest from the other two is {MEASURES[odd_one(analysis, 'network')]}.",
        claims=[claim],
        tables=[_contrast_table(analysis), _level_table(analysis), _bound_table(analysis)],
        captions={
            "curves": "How much of a band is decided, by the three measurements, with 95 % intervals. Dashed and "
            "dotted: Q (and clones) and 1 − mmse/Var of an exact Gaussian denoiser under the same steps and step "
            "noise; the distance between these two is what finite steps cost.",
            "differences": "Differences of the measurements at the branch steps, the cost of finite steps taken off, "
            f"by band (colours), with intervals. Shaded: ± {TOLERANCE:g}. Top: network; bottom: exact Gaussian "
            "denoiser through the same code.",
            "reasons": "Left: 1 − mmse/Var minus Q, mean over bands above DC, split exactly into three parts. Right: "
            "by band, 1 − mmse/Var minus that of the best linear filter of the sampler's own images. A value above 0 "
            "means that the images are not Gaussian or that a band holds several variances. A value below 0 means that "
            "the network predicts worse than that filter.",
        },
        methods=[
            f"{settings.pairs} pairs of replicas run uncoupled under the ancestral sampler, {settings.steps} steps. "
            "Both replicas of a pair have the same class, and each has noise of its own. Q is the variance of the "
            "predictions, divided by that of the ends. For the clones, the states of "
            f"{analysis.sizes['branch']} steps are continued once more with fresh noise: from its state on, a "
            "replica's own path and the new one are two clones. Their correlation is taken of differences of "
            "replicas, which removes the mean of the class and much noise. For 1 − mmse/Var, noise is put on the ends, "
            "and the network predicts the ends once. The law is that of the model's own images; no data enter. One "
            "draw of pairs serves all intervals.",
            "An exact denoiser of a Gaussian law goes through the same code. Its variances, by band and channel "
            "mixture, are chosen so that the sampler, with the step noise that the network asked for, ends with the "
            "network's own covariances. Its three curves are known in closed form. Q and clones agree at any "
            f"number of steps. 1 − mmse/Var is {steps[1]:.3f} (root mean square) away from them, since the sampler's "
            "states and ends are not those of the law: by band, the ends keep "
            f"{', '.join(f'{100 * k:.0f}' for k in kept)} % of its variance. This cost, at the variances of each "
            "source, is taken off before disagreements are judged.",
            "1 − mmse/Var minus Q is the sum of three parts. First, predictions vary differently on noised ends than "
            "on the sampler's states. Second, their variance differs from their covariance with the outcome. Third, "
            "their mean is off. Beyond what finite steps cost, these parts are "
            + "; ".join(f"{name} {formatted(v, 3)}" for name, v in zip(PARTS, reasons, strict=True))
            + " on average.",
        ],
        limits=[
            "The cost of finite steps is exact for a Gaussian law with one covariance of channels per band and white "
            "step noise; the law of a network is not of this kind. The cost shrinks with more steps.",
            "Mean absolute differences include sampling noise (its share is given); root mean squares have it removed.",
            "The level at which a curve passes ½ is interpolated between few branch steps. It has no interval where "
            "some resampled curves pass ½ before the first of these.",
        ],
    )


def _control(analysis: xr.Dataset, source: str) -> Control:
    rms = root(analysis[f"{source}_square"].values)
    worst = int(np.argmax(rms[:, 0]))
    found = verdict(rms)
    text = {
        "exact": "The posterior mean itself, with the same steps and noise; the rest is sampling error. By the "
        f"same rule the claim {'is ' * (found == 'undecided')}{found} on it. Before the cost of finite steps is taken "
        f"off, the disagreement is {root(analysis.exact_square_raw.values)[:, 0].max():.3f}.",
        "untrained": "The same architecture with random weights is no posterior mean; the claim must fail on it.",
    }[source]
    also = found == "holds" if source == "untrained" else None  # the exact one must hold: no objection to the claim
    return Control(CONTROLS[source], float(rms[worst, 0]), bounds(rms[worst]), also, text)


def _contrast_table(analysis: xr.Dataset) -> Table:
    rows = []
    for index, contrast in enumerate(CONTRASTS):
        absolute, noise = (float(analysis[f"network_{name}"][index]) for name in ("absolute", "absolute_noise"))
        raw = formatted(root(analysis.network_square_raw.values[index]), 3)
        steps = f"{root(float(analysis.network_square_steps[index])):.3f}"
        beyond = [formatted(root(analysis[f"{source}_square"].values[index]), 3) for source in ("network", *CONTROLS)]
        signed = formatted(analysis.network_signed.values[index], 3)
        rows.append([named(contrast), f"{absolute:.3f} ({noise:.3f})", raw, steps, beyond[0], signed, *beyond[1:]])
    head = ["between", "mean absolute (noise alone)", "root mean square", "finite steps alone", "beyond finite steps"]
    head += ["mean of first minus second, beyond", *(f"{name}, beyond" for name in CONTROLS.values())]
    return Table("Disagreement over bands above DC and branch steps", head, rows)


def _level_table(analysis: xr.Dataset) -> Table:
    rows = []
    for band, name in enumerate(band_names(analysis)):
        tau = [formatted(analysis.network_tau.values[i, band]) for i in range(2)]
        half = [formatted(analysis.network_half.values[i, band]) for i in range(3)]
        rows.append([name, *tau, *half, formatted(analysis.network_snr_one.values[band])])
    head = ["band", "τ of Q", "τ of 1 − mmse/Var", *(f"level of {name} = ½" for name in MEASURES.values())]
    head.append("level of SNR = 1")
    note = (
        "τ uses all steps. The levels at which a curve passes ½ are interpolated between the branch steps. A law that "
        "is not Gaussian commits at or before the level of SNR = 1."
    )
    return Table("Commitment levels, nats", head, rows, note)


def _bound_table(analysis: xr.Dataset) -> Table:
    rows = []
    for band, name in enumerate(band_names(analysis)):
        excess = [formatted(analysis.network_excess_mean.values[i, band], 3) for i in range(2)]
        exact = formatted(analysis.exact_excess_mean.values[1, band], 3)
        kept = [formatted(analysis[f"{source}_kept"].values[band], 3) for source in ("network", "exact")]
        rows.append([name, *excess, exact, *kept])
    head = ["band", "minus X/(1+X)", "minus the linear filter by channel", "the same, exact Gaussian"]
    head += ["variance kept", "the same, exact Gaussian"]
    note = (
        "Mean over branch steps of 1 − mmse/Var minus a lower bound of it for any posterior mean. X is the variance of "
        "the band over that of the noise. Variance kept: by an exact Gaussian denoiser under these steps."
    )
    return Table("The lower bound, and what finite steps cost", head, rows, note)
