"""Figures and text of the mechanism study."""

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import band_names
from experiments.frame.gates import COMMON, OWN, RHO
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, number, percent
from experiments.frame.settings import SAMPLER_NAMES
from experiments.frame.verdict import Claim, Control, above
from experiments.studies.mechanism import figures as draw
from experiments.studies.mechanism.analysis import TOP
from experiments.studies.mechanism.figures import PART_COLORS, SOURCES
from experiments.studies.mechanism.settings import MechanismConfig
from ou_theory.attention import rho
from ou_theory.estimator import HIGH_BAND, LOW_BAND

LISTED = 8  # heads in the table


def page(measured: Measured[MechanismConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures: dict[str, Callable[[], Figure]] = {
        "gain": partial(draw.figure_gain, analysis, measured.model.patch_size),
        "parts": partial(draw.figure_parts, analysis),
        "first_order": partial(draw.figure_first_order, analysis),
        "layers": partial(draw.figure_layers, analysis),
        "stream": partial(draw.figure_stream, analysis),
        "heads": partial(draw.figure_heads, analysis),
    }
    return Page(section(measured, analysis), figures)


def section(measured: Measured[MechanismConfig], analysis: xr.Dataset) -> Section:
    """What the study found, in words and tables."""
    settings, pairs = measured.config, measured.config.pairs
    names, last = band_names(analysis), analysis.isel(coupling=-1)
    g = float(analysis.coupling[-1])
    claim = low_pass_claim(analysis)
    left = {part: last.network_share_all.sel(part=part).values for part in PART_COLORS}
    kept = [last.network_gain.isel(band=band).values for band in (LOW_BAND, HIGH_BAND)]
    other = [last.network_gain_by_energy.isel(band=band).values for band in (LOW_BAND, HIGH_BAND)]
    scale = cutoff_text(last.network_cutoff.values, float(analysis.radius[HIGH_BAND]))
    levels = ", ".join(number(ell, 1) for ell in analysis.level_ell.values)
    nyquist = 1 / measured.model.patch_size
    return Section(
        title=f"Mechanism: {measured.subject_name}",
        question="How does coupling bring replicas together inside one pass: through values, keys or queries, in which "
        "layers and heads, and at which spatial scales?",
        answer=f"At g = {g:g} the denoised difference keeps {formatted(kept[0])} of its amplitude in the lowest band "
        f"({names[LOW_BAND]}) and {formatted(kept[1])} in the highest ({names[HIGH_BAND]}). {scale} Of the attention "
        f"difference that is left, {percent(left['routing'])} is routing, {percent(left['key'])} the key pattern and "
        f"{percent(left['query'])} the query pattern.",
        claims=[claim],
        tables=[
            _gain_table(analysis),
            _share_table(analysis),
            _size_table(analysis),
            _neglect_table(analysis),
            _growth_table(analysis),
            _bypass_table(analysis),
            _heads_table(analysis),
        ],
        captions={
            "gain": "End to end: amplitude of the denoised difference after one pass under a coupling, relative to no "
            f"coupling, by pixel band (left), and by level at g = {g:g} (right). Dashed line: the highest frequency "
            "along an axis that the grid of tokens carries; structure beyond it lies inside patches.",
            "parts": "Exact shares of the attention difference by band of the token grid. They sum to 1; a negative "
            "share works against the total.",
            "first_order": "Left: size of each part under coupling relative to the same part without coupling, of the "
            "same queries, keys and values. Points: measured; lines: first order, ρ(g) for routing and key, "
            f"{COMMON[settings.gate_kind]} for query. Right: relative error of the first-order prediction of the whole "
            "difference, by level.",
            "layers": "Exact shares of the attention difference by layer, all bands together.",
            "stream": f"Left: difference of the residual stream after every block at g = {g:g}, relative to no "
            "coupling, by band of the token grid; 0 is the embedding. Right: shares of the stream's final difference "
            f"by origin; filled: g = {g:g}, open: g = 0.",
            "heads": f"Heads at g = {g:g}. Left: difference of each head's output relative to the same head without "
            "coupling. Right: how much coupling changes the head's term in the square of the stream's difference, in % "
            "of that square, lowest band of the token grid above DC; negative brings the replicas together.",
        },
        methods=[
            f"{pairs} pairs run uncoupled under {SAMPLER_NAMES[settings.sampler]}, {settings.steps} steps. Their "
            f"states at log-SNR {levels} are denoised once under every coupling with the {settings.gate_kind} gate. "
            "All ratios to g = 0 are of passes that start from the same states.",
            "The split is that of docs/theory.md, section 6: routing is the difference of values read with the mean "
            "of own minus cross weights; the pattern part is divided between keys and queries by the Shapley value. "
            f"The parts add up to the difference of the network's own head outputs within "
            f"{float(analysis.network_closure.max()):.1e} of its size (largest of all layers).",
            "Shares pool levels and layers, each weighted by the difference that coupling left there. Gains over "
            "several levels are geometric means, since contractions multiply. One could also take roots of mean energy "
            "ratios, in which the levels with the largest gain weigh most. Then the gains of the denoised difference "
            f"at g = {g:g} are {formatted(other[0])} in the lowest band and {formatted(other[1])} in the highest.",
            "A head writes to the stream through its slice of the output projection and the block's adaLN gate. "
            "Attention changes the square of the stream's difference by an exact sum over heads: the inner product of "
            "what a head writes with (difference before + difference after). A head's share in synchronisation is how "
            "much coupling changes its term, with the same q, k, v. The pull is the inner product with the difference "
            "before alone.",
            "There are two controls. The first is the same architecture with random weights; its adaLN gates, the "
            "factors with which a block adds attention and MLP to the stream, are nearly 0, so attention hardly acts. "
            "The second has a bias of 1 on every adaLN gate, so its attention acts.",
            "The self-only reading keeps the change of a replica's own pattern, with weight "
            f"ξ(g) = {OWN[settings.gate_kind]}, and neglects the change of the cross pattern. What it misses is given "
            "twice: for the weights as they are, and for patterns whose rows are normalised. The two are the same "
            "under every gate but joint.",
        ],
        limits=[
            "This is one pass at chosen levels. Over a trajectory contractions multiply, and the states of a coupled "
            "run are not those of an uncoupled one.",
            "The stream's difference holds the noise of the states as well as what the network makes of them. In an "
            "ε-network it need not shrink when the denoised difference does; bypass and heads are about the stream.",
            "Each contribution is credited to the layer that last added it, though an MLP also passes on what "
            "attention wrote.",
            f"The cut-off is read off {len(names) - 1} bands by linear interpolation. The token grid ends at r = "
            f"{nyquist:.2f} along an axis: attention does not see finer structure as frequencies.",
            "Intervals come from resampling pairs. They speak for this network, not for a network trained again"
            + (f", and intervals from {pairs} pairs are somewhat too short." if pairs < 64 else "."),
        ],
    )


def low_pass_claim(analysis: xr.Dataset) -> Claim:
    """Whether the lowest band is synchronised more than the highest, end to end, at the strongest coupling."""
    g = float(analysis.coupling[-1])
    top = float(analysis.radius[HIGH_BAND])
    value, low, high = (float(v) for v in analysis.network_slope.isel(coupling=-1).values)
    last = analysis.isel(coupling=-1)
    first = last.network_part_gain.sel(part="total").values
    ends = {source: [last[f"{source}_gain"].isel(band=b).values for b in (LOW_BAND, HIGH_BAND)] for source in SOURCES}
    grows = ends["network"][1][1] > 1
    return Claim(
        0,
        "Coupling synchronises this network's low bands more than its high ones",
        above([low, high]),
        f"one-pass gain of the highest band minus that of the lowest above DC, g = {g:g}",
        value,
        [low, high],
        f"{cutoff_text(last.network_cutoff.values, top)} Inside attention, the difference of the heads' outputs keeps "
        f"{formatted(first[LOW_BAND])} of its size in the lowest band of the token grid and "
        f"{formatted(first[HIGH_BAND])} in the highest, from the same queries, keys and values."
        + (f" The highest band of the denoised difference grows: {formatted(ends['network'][1])}." if grows else "")
        + " This is not a law of attention: the shipped network that was trained on a reversed spectrum synchronises "
        "its high bands (syncgap spectrum).",
        [
            _control(SOURCES[source], last[f"{source}_slope"].values, *ends[source])
            for source in ("untrained", "random")
        ],
    )


def _control(name: str, slope: np.ndarray, low: np.ndarray, high: np.ndarray) -> Control:
    interval = [float(v) for v in slope[1:]]
    text = f"The difference keeps {formatted(low)} in the lowest and {formatted(high)} in the highest band."
    return Control(name, float(slope[0]), interval, above(interval) == "holds", text)


def cutoff_text(values: np.ndarray, top: float) -> str:
    """The cut-off in a sentence; `top` is the highest band's frequency, where the estimate is censored."""
    if not np.isfinite(values[0]):
        return "The gain has no half-way frequency, because the lowest band is not synchronised."
    passes = "half way between that of the lowest band and 1"
    if values[0] >= top:
        return f"The gain does not pass {passes} up to r = {top:.2f}, the highest band."
    return f"The gain passes {passes} at r = {formatted(values)}."


def _table(
    title: str, analysis: xr.Dataset, head: list[str], cells: Callable[[xr.Dataset], list[str]], note: str
) -> Table:
    """A table over sources and couplings: all of the network's, the first and the last of the controls'.

    Args:
      cells: of a row, from the estimates of a source at a coupling, without the source's name in front.
    """
    rows, last = [], analysis.sizes["coupling"] - 1
    for source, name in SOURCES.items():
        own = [each for each in analysis.data_vars if str(each).startswith(f"{source}_")]
        found = analysis[own].rename({each: str(each).removeprefix(f"{source}_") for each in own})
        for i, g in enumerate(analysis.coupling.values):
            if source == "network" or i in (0, last):
                rows.append([name, f"{g:g}", *cells(found.isel(coupling=i))])
    return Table(title, ["source", "g", *head], rows, note)


def _gain_table(analysis: xr.Dataset) -> Table:
    top = float(analysis.radius[HIGH_BAND])

    def cells(at):
        ends = [formatted(at.gain.isel(band=band).values) for band in (LOW_BAND, HIGH_BAND)]
        cut, low_pass = at.cutoff.values, at.slope.values[1] > 0
        scale = "–" if not low_pass else f"> {top:.2f}" if cut[0] >= top else formatted(cut)
        return [*ends, formatted(at.slope.values), scale]

    head = ["gain, lowest band", "gain, highest band", "highest − lowest", "half-way frequency"]
    note = (
        "Of the denoised difference, after one pass; geometric mean over levels. Half-way frequency: where the gain "
        "passes half way between that of the lowest band and 1. It is given where the lowest band is synchronised."
    )
    return _table("End-to-end gain", analysis, head, cells, note)


def _share_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        return [percent(at.share_all.sel(part=part).values) for part in PART_COLORS]

    note = "Shares of the difference that is left under that coupling, over all heads, layers, levels and bands."
    return _table("Exact shares of the attention difference", analysis, list(PART_COLORS), cells, note)


def _size_table(analysis: xr.Dataset) -> Table:
    kind = analysis.attrs.get("gate_kind", "joint")
    names = [*PART_COLORS, "total"]

    def cells(at):
        rows = [formatted(at.part_gain_all.sel(part=part).values) for part in names]
        return [*rows, number(float(rho(at.coupling.values, kind)))]

    note = (
        "Relative to no coupling, with the same q, k, v. To first order, routing and key have size "
        f"ρ(g) = {RHO[kind]}, query {COMMON[kind]}."
    )
    return _table("Sizes of the parts", analysis, [*names, "ρ(g)"], cells, note)


def _neglect_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        error = percent(at.first_order_all.values)
        if at.coupling == 0:  # where there is no cross part
            return [error, "0", "0", "0"]
        missed = [percent(at.missed_all.sel(reading=reading).values) for reading in ("pattern", "weights")]
        return [error, percent(at.missed_error.sel(reading="pattern").values), *missed]

    head = ["error of first order", "error of ξ", "missed by ξ, rows normalised", "missed by ξ, weights as they are"]
    note = (
        "Errors are amplitudes relative to the exact difference of the heads' outputs. ξ is the self-only reading; "
        "what it misses is a share of the pattern part (key plus query)."
    )
    return _table("What first order and the self-only reading leave out", analysis, head, cells, note)


def _growth_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        growth = at.part_growth.isel(token_band=LOW_BAND)
        return [percent(growth.sel(part=part).values) for part in (*PART_COLORS, "total")]

    note = (
        "Lowest band of the token grid above DC: what attention adds to the square of the stream's difference, in % of "
        "that square, summed over layers; mean over levels."
    )
    return _table("What attention adds to the difference", analysis, [*PART_COLORS, "total"], cells, note)


def _bypass_table(analysis: xr.Dataset) -> Table:
    def cells(at):
        low = at.isel(token_band=LOW_BAND)
        logs = [formatted(low.contraction.sel(sublayer=name).values) for name in ("attention", "mlp")]
        return [*logs, percent(low.bypass.values), percent(at.bypass_all.values)]

    head = ["ln gain, attention", "ln gain, MLPs", "bypass, lowest band", "bypass, all bands"]
    note = (
        "ln gain: what coupling changes in ln amplitude of the stream's difference, lowest band of the token grid "
        "above DC, summed over layers; mean over levels. Bypass: share of the stream's final difference that no "
        "attention layer added."
    )
    return _table("What bypasses attention", analysis, head, cells, note)


def _heads_table(analysis: xr.Dataset) -> Table:
    last = analysis.isel(coupling=-1)
    heads = analysis.sizes["head"]
    sync, pull, kept = (last[f"network_head_{name}"].values.reshape(-1, 3) for name in ("sync", "pull", "gain"))
    rows = []
    for unit in np.argsort(sync[:, 0])[:LISTED].tolist():
        numbers = [formatted(100 * sync[unit], 1), formatted(100 * pull[unit], 1), formatted(kept[unit])]
        rows.append([str(unit // heads), str(unit % heads), *numbers])
    note = (
        "Layers and heads count from 0; lowest band of the token grid above DC. The strongest "
        f"{100 * TOP:.0f} % of all heads, chosen on other pairs than those that measure them, carry "
        f"{percent(last.network_concentration.values)} of the whole change."
    )
    head = ["layer", "head", "change of the square by coupling, %", "pull, %", "output difference, relative"]
    return Table(f"Heads that synchronise most, g = {float(analysis.coupling[-1]):g}", head, rows, note)
