"""Figures and text of the release study."""

from functools import partial

import numpy as np
import xarray as xr

from experiments.frame.drawing import band_names
from experiments.frame.estimator import HIGH, LOW
from experiments.frame.gains import ideal_gain
from experiments.frame.measured import Measured
from experiments.frame.page import NOTHING, Page, Section, Table, formatted, number
from experiments.frame.settings import SAMPLER_NAMES
from experiments.frame.verdict import LEAST, Claim, Control, above, bounds, within
from experiments.studies.release import figures as draw
from experiments.studies.release.analysis import EXACT_THEORY, GAIN, LEAST_TAKEN
from experiments.studies.release.figures import exact_of
from experiments.studies.release.settings import COUPLED_FIRST, FREE_FIRST, ORDERS, ReleaseConfig
from experiments.studies.release.theory import ideal_level

LIMIT = float(np.log(1.25))  # the two orders tell the same if they agree to a quarter of the energy
OTHER_STEPS = (50, 100, 250, 1000)  # numbers of sampler steps in which a gap is given


def page(measured: Measured[ReleaseConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures = {"curves": partial(draw.figure_curves, analysis), "levels": partial(draw.figure_levels, analysis)}
    return Page(section(measured, analysis), figures)


def last_name(analysis: xr.Dataset, coupling: int = 0) -> str | None:
    """The last band to which the criterion applies, None if it does not apply to two bands above DC."""
    last = int(analysis.last_band[coupling])
    return band_names(analysis)[last] if last > 0 else None


def later(analysis: xr.Dataset) -> Claim:
    """Claim: the last band to which the criterion applies may be released later than the lowest above DC."""
    names, last = band_names(analysis), last_name(analysis)
    g = float(analysis.coupling[0])

    def of(source: str) -> np.ndarray:
        return analysis.common_claimed.sel(source=source).values

    def control(source: str, name: str, text: str) -> Control:
        values = of(source)
        ends = bounds(values) if np.isfinite(values).all() else None
        holds = above(ends, LEAST) == "holds" if source == "untrained" else None
        return Control(name, float(values[0]), ends, holds, text)

    value = of("network")
    shuffled = analysis.shuffled_gap.values
    there = bool(np.isfinite(shuffled).all())
    return Claim(
        0,
        "High frequencies need the coupling longer than low ones to end alike",
        above(value[1:], LEAST),
        f"gap by release at g = {g:g}, coupled first, from {names[LOW]} to {last or NOTHING}, nats",
        float(value[0]),
        bounds(value),
        f"Replicas coupled with g = {g:g} end alike in a band if they are released after its level. {last} is the "
        "highest band from which coupling takes more than a tenth; above it there is nothing to release."
        if last
        else f"Coupling with g = {g:g} is not known to take a tenth from two bands above DC, the lowest among "
        "them, so there is no gap by release.",
        [
            control("untrained", "untrained network", "The same architecture with random weights."),
            Control(
                "shuffled bands",
                float(np.median(shuffled)) if there else None,
                [float(v) for v in np.quantile(shuffled, [0.025, 0.975])] if there else None,
                bool(value[0] <= np.quantile(shuffled, 0.975)) if there else None,
                f"The same images, coefficients assigned to bands at random, {shuffled.size} times: median and the "
                "range of 95 % of them.",
            ),
            control(
                "exact", "exact denoiser", f"Of the network's own spectrum; theory: {number(of(EXACT_THEORY)[0])}."
            ),
            control(exact_of(analysis), f"theory: {exact_of(analysis)}", "An exact denoiser of the data, same bands."),
            control(GAIN, f"theory: {GAIN}", "The recursion under the network's one-pass gain, nothing fitted."),
        ],
        analysis.attrs["claim_level"],
    )


def one_story(measured: Measured[ReleaseConfig], analysis: xr.Dataset) -> Claim:
    """Claim: what one order leaves and what the other leaves multiply to what coupling always leaves."""
    g, limit = float(analysis.coupling[0]), number(LIMIT)
    title = "What coupling takes early and what it takes late multiply"
    measure = f"log of the energies left by both orders over that left by coupling always, g = {g:g}, farthest band"
    if measured.config.eta > 0:
        text = (
            "Under a sampler that adds noise the law does not hold for any denoiser: fresh noise enters in both phases."
        )
        return Claim(0, title, "not tested", measure, None, None, text)
    values = analysis.product_claimed.values
    worst = int(np.nanargmax(np.abs(values[:, 0]))) if np.isfinite(values[:, 0]).any() else 0

    def farthest(source: str) -> np.ndarray:
        each = analysis["product"].sel(source=source).isel(coupling=0).values[LOW:]
        known = np.abs(np.nan_to_num(each[:, 0]))
        return each[int(known.argmax())]

    def control(source: str, name: str, text: str) -> Control:
        found = farthest(source)
        return Control(name, float(found[0]), bounds(found) if np.isfinite(found).all() else None, None, text)

    known = np.isfinite(values).all()
    return Claim(
        0,
        title,
        within(values[:, 1:], LIMIT) if known else "undecided",
        measure,
        float(values[worst, 0]),
        bounds(values[worst]),
        "If a denoiser acts on each mode alone and linearly, a step multiplies the difference by a number that does "
        f"not depend on what came before, so that this is 0 (docs/theory.md, eq. 10.6). It counts as 0 within "
        f"±{limit}, "
        "mean over the inner releases, in all bands above DC.",
        [
            control("exact", "exact denoiser", "0 by the law; a dash where coupling leaves nothing."),
            control("untrained", "untrained network", "The same architecture with random weights."),
        ],
        analysis.attrs["claim_level"],
    )


def section(measured: Measured[ReleaseConfig], analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings, names = measured.config, band_names(analysis)
    q, n, last = settings.threshold, analysis.sizes["step"], last_name(analysis)
    offsets = ", ".join(
        f"{number(value)} at g = {g:g}"
        for g, value in zip(settings.couplings, ideal_level(_ideal(settings), q), strict=True)
    )
    return Section(
        title=f"Release: {measured.subject_name}",
        question="Replicas are coupled up to a step and free afterwards. How late must they be released to end alike, "
        "in which bands? And the reverse: how long may they be free, if they are coupled afterwards?",
        answer=_answer(analysis, settings, last),
        claims=[later(analysis), one_story(measured, analysis)],
        tables=[*_level_tables(analysis, settings), _gap_table(analysis), _steps_table(measured, analysis)],
        captions={
            "curves": "Energy of the final images' difference, over that of uncoupled replicas, by band (colours) with "
            "95 % intervals. Left: coupled up to that level, then free. Right: free up to that level, then coupled. "
            f"Dashed: exact denoiser ({exact_of(analysis)}) with the ideal gain; dotted: recursion under the network's "
            "one-pass gain.",
            "levels": f"Level at which the share {q:g} of what coupling takes is left, for both orders, with 95 % "
            "intervals; only bands from which coupling takes more than a tenth. Dashed and dotted: as above. Grey: "
            "commitment level of the uncoupled run.",
        },
        methods=[
            f"{analysis.attrs['pairs']} pairs under {SAMPLER_NAMES[settings.sampler]}, {n} steps, {settings.gate_kind} "
            "gate; the replicas of a pair share the class and each has initial noise of its own, the same in all arms. "
            f"The phases change before one of the steps {', '.join(map(str, analysis.release.values))}: at 0 the first "
            f"phase is empty, at {n} the second one. Bands are of the DCT; D(s) is the mean square of the difference "
            "of the final images over that without coupling.",
            "Coupling all the way leaves the difference D(always), for the replicas began apart and no network pulls "
            "them together entirely. It is taken off: r(s) = (D(s) − D(always)) / (1 − D(always)) goes from 1 to 0 if "
            f"coupling comes first, and from 0 to 1 if it comes last. A band commits where r passes {q:g} for the last "
            "time, linear in log-SNR between the releases (our criterion). It applies where 1 − D(always), what "
            f"coupling takes, lies above {LEAST_TAKEN:g} with its whole interval: of less it cannot be told what is "
            "taken early and what late. Where coupling adds to the difference, "
            "nothing is made alike, and there is no level. Beside it stands the level where D itself passes the same "
            "share, which no band has that coupling leaves too different.",
            f"An exact denoiser with one gain rho for all modes leaves (1 + X)^−(1 − rho) under the flow, X the SNR of "
            f"the mode at the release. Its level is −ln S plus a number that all modes share ({offsets}), so the gap "
            "by "
            "release is that of the data at every coupling. The recursions here have the sampler's own steps.",
            "Intervals are percentiles of the estimates on resampled pairs; one draw of pairs serves all arms. "
            f"The two claims hold together with 95 %. The untrained network has "
            f"{analysis.attrs['untrained_pairs']} pairs.",
        ],
        limits=[
            "Under a deterministic sampler a released replica only goes on from where it is: what still differs at the "
            "end was there at the release and is amplified or lost, but not drawn anew. Under the ancestral sampler "
            "each replica has noise of its own after the release.",
            "The level of the end is that of the last step and one more step's width: beyond the last step there is no "
            "log-SNR. A level in that last piece says that the last step alone decides.",
            "Levels are interpolated between few releases; --releases sets how many. Network and theory are read off "
            "the same releases, so that they compare; a level of its own may be off by a part of their distance.",
            "Accounts of the paper (arXiv 2603.20987) give a gap of 39 to 41 diffusion steps. Which threshold, which "
            "modes and how many sampler steps that is for is not known to us, so the gap is given in steps of several "
            "samplers, and no verdict is drawn.",
            "The recursion under the network's gain takes gains on uncoupled states, while coupled replicas visit "
            "others.",
        ],
        definitions={
            COUPLED_FIRST: "coupled in the steps before the change, free from it on",
            FREE_FIRST: "free in the steps before the change, coupled from it on",
            "gap by release": f"level of a high band less that of {names[LOW]}, in nats of log-SNR or in sampler steps",
        },
    )


def _ideal(settings: ReleaseConfig) -> np.ndarray:
    return ideal_gain(np.asarray(settings.couplings), settings.gate_kind)


def _answer(analysis: xr.Dataset, settings: ReleaseConfig, last: str | None) -> str:
    names, at = band_names(analysis), analysis.sel(source="network").isel(coupling=0)
    g = settings.couplings[0]
    if last is None:
        return f"Coupling with g = {g:g} is not known to take a tenth from two bands above DC: no gap by release."
    first = at.sel(order=COUPLED_FIRST)
    theory = analysis.common_gap.sel(source=exact_of(analysis), order=COUPLED_FIRST).values[0, 0]
    low = formatted(first.level[LOW])
    return (
        f"Coupled with g = {g:g} and then released, replicas end alike in {names[LOW]} from {low} nats on, and in "
        f"{last} {formatted(first.common_gap)} nats later ({formatted(first.common_gap_steps, 1)} of {settings.steps} "
        "steps; "
        f"an exact denoiser of the data: {number(theory)} nats). In the reverse order the gap is "
        f"{formatted(at.sel(order=FREE_FIRST).common_gap)} nats."
    )


def _level_tables(analysis: xr.Dataset, settings: ReleaseConfig) -> list[Table]:
    tables, theories = [], (exact_of(analysis), GAIN)
    for g in settings.couplings:
        at, rows = analysis.sel(coupling=g), []
        for band, name in enumerate(band_names(analysis)):
            mine = at.sel(source="network")
            row = [name, formatted(mine.taken[band])]
            for order in ORDERS:
                row += [
                    formatted(mine.level.sel(order=order)[band]),
                    formatted(mine.release_step.sel(order=order)[band], 1),
                ]
                row += [formatted(at.level.sel(source=theory, order=order)[band]) for theory in theories]
            row += [formatted(mine.alike_level.sel(order=COUPLED_FIRST)[band]), formatted(analysis.tau[band])]
            rows.append(row)
        head = ["band", "taken by coupling always"]
        for order in ORDERS:
            head += [f"{order}: level, nats", "step", *theories]
        head += [f"level of D = {settings.threshold:g}, coupled first", "τ uncoupled"]
        note = (
            "A dash in place of a level: coupling is not known to take a tenth from the band, or the curve has none. "
        )
        note += "Steps count from 0, real-valued; τ: commitment level by the aligned energy of the uncoupled run."
        tables.append(Table(f"Commitment by release, g = {g:g}", head, rows, note))
    return tables


def _gap_table(analysis: xr.Dataset) -> Table:
    rows, names = [], band_names(analysis)
    sources = ("network", exact_of(analysis), GAIN, "exact", EXACT_THEORY, "untrained")
    for i, g in enumerate(analysis.coupling.values):
        last = last_name(analysis, i)
        for order in ORDERS:
            at = analysis.isel(coupling=i).sel(order=order)
            mine = at.sel(source="network")
            row = [f"{g:g}", order, formatted(mine.gap), formatted(mine.gap_steps, 1)]
            row += [f"{names[LOW]} to {last}" if last else NOTHING, formatted(mine.common_gap_steps, 1)]
            row += [formatted(at.common_gap.sel(source=source)) for source in sources]
            row += [formatted(analysis.tau_gap), formatted(analysis.tau_common_gap[i])]
            rows.append(row)
    head = ["g", "order", f"gap to {names[HIGH]}, nats", "steps", "bands", "gap between these, steps", "nats"]
    head += [*sources[1:-3], "exact denoiser", "its theory", "untrained network"]
    head += [f"gap of the uncoupled run to {names[HIGH]}", "between these bands"]
    note = "The gap to the highest band exists where coupling takes more than a tenth of it. The other columns are "
    note += "between the lowest band above DC and the last to which the criterion applies on the network."
    return Table("Gap by release", head, rows, note)


def _steps_table(measured: Measured[ReleaseConfig], analysis: xr.Dataset) -> Table:
    rows, names = [], band_names(analysis)
    for i, g in enumerate(analysis.coupling.values):
        last = int(analysis.last_band[i])
        if last < 0:
            continue
        for source in ("network", exact_of(analysis), GAIN):
            level = analysis.level.isel(coupling=i).sel(source=source, order=COUPLED_FIRST).values[:, 0]
            gaps = [float(np.diff(measured.model.clock(str(k)).step(level[[LOW, last]]))[0]) for k in OTHER_STEPS]
            rows.append([f"{g:g}", source, f"{names[LOW]} to {names[last]}", *(number(gap, 1) for gap in gaps)])
    head = ["g", "source", "bands", *(f"{k} steps" for k in OTHER_STEPS)]
    note = "The same levels in nats as steps of samplers with these numbers of steps; they were not run again."
    return Table("Gap by release, coupled first, in steps", head, rows, note)
