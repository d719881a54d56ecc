"""Figure and text of the speciation study."""

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr

from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, number, percent
from experiments.frame.verdict import Claim, Control, Verdict, bounds, within
from experiments.studies.speciation.analysis import schedule_step, step_level
from experiments.studies.speciation.figures import NAMES, figure_phi
from experiments.studies.speciation.settings import SURE, THRESHOLD, SpeciationConfig
from experiments.studies.speciation.theory import LAWS

TOLERANCE = 0.5  # nats between the measured level and that of t_S
PUBLISHED = {"eigenvalue": 16.72, "predicted": 526, "measured": 432}  # Biroli et al., CIFAR-10, cars and horses
PUBLISHED_LEVELS = {name: step_level(int(PUBLISHED[name])) for name in ("predicted", "measured")}


def page(measured: Measured[SpeciationConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    return Page(section(measured, analysis), {"phi": partial(figure_phi, analysis)})


def section(measured: Measured[SpeciationConfig], analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings, classifier = measured.config, measured.load("classifier")
    names = " and ".join(classifier.class_names)
    return Section(
        title=f"Speciation: {measured.subject_name}",
        question=f"When does a process without a label decide between {names}? Clones that branch at a step share "
        "their past and have noise of their own afterwards; phi is the chance that both end in the same class.",
        answer=_answer(analysis),
        claims=[at_speciation_time(analysis)],
        tables=[_phi_table(analysis), _level_table(analysis)],
        captions={
            "phi": f"Share of trajectories that end in the class of their clone, by the level at which it branches, "
            f"with 95 % intervals over pairs. Horizontal: {THRESHOLD:g}. Dashed: the exact law of two Gaussian classes "
            "of the data's means and covariance. Dotted: the exact law of the side of the leading direction on which "
            "clones of that mixture end."
        },
        methods=[
            f"{2 * settings.pairs} trajectories in {settings.pairs} pairs run under the ancestral sampler, "
            f"{settings.steps} steps, with guidance {settings.guidance:g}"
            + (" (the null label alone)" if settings.guidance == 0 else "")
            + ". From its state at every branch step each is continued once more with fresh noise. A classifier reads "
            f"the ends; on {classifier.test_images} test photographs it is right in {percent(classifier.accuracy)}. "
            f"The probability that it gives to its answer is {formatted(analysis.network_sure)} in the mean; "
            f"{percent(analysis.network_first_class)} of the trajectories end as {classifier.class_names[0]}.",
            "If the classifier erred on the two ends independently, phi − ½ would be measured as "
            f"{number(float(2 * classifier.accuracy[0] - 1) ** 2)} of itself; it errs alike on ends that look alike.",
            f"It is surer than {SURE:g} of {percent(analysis.network_sure_share)} of the ends. phi of these "
            f"trajectories passes the threshold at {_level(analysis, analysis.network_sure_level)} nats. They "
            "are chosen by their outcome: this tells where the others matter, and is no estimate of phi.",
            "The level of a curve is that from which on it stays above the threshold, linear between branch levels. A "
            "curve that ends below passes it after the last branch, if at all, and one that is never below before the "
            "first: resampled curves of both kinds count, as infinite, and the ends of an interval are such levels.",
        ],
        limits=[
            "Intervals come from resampling pairs; they speak for this network, not for one trained again.",
            "Biroli et al. standardise nothing but the mean, so that their noise meets pixels of [0, 1]. This "
            "network's data have variance 1. The same noise beside the same photograph is at a log-SNR higher by "
            f"{number(analysis.pixel_shift)} in their units.",
            "The Gaussian laws have one covariance for both classes. Photographs of a class are no Gaussian.",
        ],
    )


def _answer(analysis: xr.Dataset) -> str:
    level = analysis.network_level
    said = f"phi passes {THRESHOLD:g} at a log-SNR of {_level(analysis, level)} nats"
    said += f", {_level(analysis, level, analysis.pixel_shift)} beside pixels of [0, 1]"
    if "law_phi" in analysis:
        said += f"; ½ ln Λ says {number(analysis.leading_level)}"
    return said + "."


def at_speciation_time(analysis: xr.Dataset) -> Claim:
    """Claim: phi passes the threshold where the leading eigenvalue of the data says."""
    title = "The class is decided at the time that the data's largest eigenvalue gives"
    measure = f"log-SNR at which phi passes {THRESHOLD:g}, less that of t_S = ½ ln Λ, nats"
    if "law_phi" not in analysis:
        text = "It is not known what covariance the training data have; `syncgap covariance` adds it."
        return Claim(0, title, "not tested", measure, None, None, text)
    apart = {name: analysis[f"{name}_level"].values - analysis.leading_level for name in NAMES}
    texts = {
        "labelled": "With the label the class is given, so that phi should be above the threshold from the start.",
        "untrained": "The same architecture with random weights.",
    }
    controls = [
        Control(NAMES[name], *_known(apart[name]), _verdict(apart[name]) == "holds", texts[name]) for name in texts
    ]
    return Claim(
        0,
        title,
        _verdict(apart["network"]),
        measure,
        *_known(apart["network"]),
        f"The claim holds if the interval of the difference lies within ±{TOLERANCE:g} nats, and does not hold if it "
        f"lies outside. phi passes the threshold at {_level(analysis, analysis.network_level)} nats, and ½ ln Λ says "
        f"{number(analysis.leading_level)}. By the exact laws of the mixture phi passes "
        f"the threshold at {_law_levels(analysis)}.",
        controls,
    )


def _verdict(values: np.ndarray) -> Verdict:
    return "undecided" if np.isnan(values).any() else within(values[1:], TOLERANCE)


def _known(values: np.ndarray) -> tuple[float | None, list[float] | None]:
    """Value and interval of a claim, which may be infinite; None where they are not known."""
    return None if np.isnan(values[0]) else float(values[0]), None if np.isnan(values).any() else bounds(values)


def _level(analysis: xr.Dataset, values: xr.DataArray, shift: float = 0, digits: int = 2, of: Callable = float) -> str:
    """Estimate and interval of a level, as numbers ``of`` the shifted level; words in place of an infinite one."""
    first, last = (number(of(analysis.branch_ell.values[i] + shift), digits) for i in (0, -1))

    def said(value: float) -> str:
        if np.isinf(value):
            return f"after {last}" if value > 0 else f"before {first}"
        return number(of(value + shift), digits)

    point, low, high = (float(value) for value in values)
    return said(point) if np.isnan([low, high]).any() else f"{said(point)} [{said(low)}, {said(high)}]"


def _law_levels(analysis: xr.Dataset) -> str:
    each = [f"{number(analysis.law_level.sel(law=law))} ({name})" for law, name in LAWS.items()]
    return " and ".join(each) + "; a dash means that it never does"


def _phi_table(analysis: xr.Dataset) -> Table:
    known = "law_phi" in analysis
    head = [
        "branch step",
        "log-SNR",
        *NAMES.values(),
        "sure ends",
        "clones of other trajectories",
        *(LAWS.values() if known else ()),
    ]
    rows = []
    for i, step in enumerate(analysis.branch.values):
        row = [str(step), number(analysis.branch_ell[i])]
        row += [formatted(analysis[f"{name}_phi"].values[i]) for name in NAMES]
        row.append(formatted(analysis.network_sure_phi.values[i]))
        row.append(formatted(analysis.network_others.values[i]))
        rows.append(row + ([number(v) for v in analysis.law_phi.values[:, step]] if known else []))
    note = f"Sure ends: trajectories without a label of whose end the classifier is surer than {SURE:g}. "
    note += "Clones of other trajectories share nothing with a trajectory; their column is what chance gives."
    return Table("Share of trajectories that end in the class of their clone", head, rows, note)


def _level_table(analysis: xr.Dataset) -> Table:
    shift, level = analysis.pixel_shift, analysis.network_level
    rows = [
        ["measured here", *(_level(analysis, level, by) for by in (0, shift)),
         _level(analysis, level, shift, 0, schedule_step)],
        ["measured by Biroli et al.", *(number(PUBLISHED_LEVELS["measured"] - d) for d in (shift, 0)),
         str(PUBLISHED["measured"])],
        [f"predicted by Biroli et al., Λ = {PUBLISHED['eigenvalue']:g}",
         *(number(PUBLISHED_LEVELS["predicted"] - d) for d in (shift, 0)), str(PUBLISHED["predicted"])],
    ]  # fmt: skip
    if "law_phi" in analysis:
        for name, words in (("leading", "this data"), ("one_channel", "one channel of this data")):
            eigenvalue = number(analysis.attrs[f"{name}_pixels"])
            levels = [number(analysis.attrs[f"{name}{unit}_level"]) for unit in ("", "_pixel")]
            rows.append([f"½ ln Λ of {words}, Λ = {eigenvalue} for pixels of [0, 1]", *levels, ""])
        for law, words in LAWS.items():
            exact = float(analysis.law_level.sel(law=law))
            rows.append([f"exact law: {words}", number(exact), number(exact + shift), ""])
    head = ["", "log-SNR, this network's units", "log-SNR, pixels of [0, 1]", "step of 1000, pixels of [0, 1]"]
    note = (
        "Steps are of the linear schedule of 1000 steps, 0 at the clean end. The published numbers are for a network "
        "that is trained on pixels of [0, 1] less their mean, without division by their spread. After and before: "
        "than the last and the first branch."
    )
    return Table(f"Where phi passes {THRESHOLD:g}", head, rows, note)
