"""Text and tables of the depth study."""

from collections.abc import Callable
from functools import partial

import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, percent
from experiments.frame.settings import PAPER_DEPTH, PAPER_LAST, SAMPLER_NAMES
from experiments.frame.verdict import LEAST, Claim, Control
from experiments.studies.depth.figures import (
    figure_coupled,
    figure_decodable,
    figure_gained,
    figure_gap,
    figure_levels,
    figure_modes,
    figure_stream,
    shown_levels,
)
from experiments.studies.depth.settings import CLAIMED, CLAIMS, LAST, DepthConfig
from experiments.studies.depth.verdicts import READINGS, censored, final_gap, grid_of, verdict_of
from ou_theory.bootstrap import family_level
from ou_theory.estimator import HIGH_BAND, LOW_BAND

NOT_KNOWN = "not known"


def page(measured: Measured[DepthConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures: dict[str, Callable[[], Figure]] = {
        "gap_by_layer": partial(figure_gap, analysis),
        "coupled": partial(figure_coupled, analysis),
        "levels_by_layer": partial(figure_levels, analysis),
    }
    if "network_difference_share" in analysis:
        figures["modes"] = partial(figure_modes, analysis)
    if "network_size" in analysis:
        figures["stream"] = partial(figure_stream, analysis)
    if "network_gained" in analysis:
        figures["gained"] = partial(figure_gained, analysis)
    if "network_probe_r2" in analysis:
        figures["decodable"] = partial(figure_decodable, analysis)
    return Page(section(measured, analysis, list(figures)), figures)


def section(measured: Measured[DepthConfig], analysis: xr.Dataset, figures: list[str]) -> Section:
    """What the study found, in words and tables."""
    known = [name for name in READINGS if f"network_{name}_gap" in analysis]
    settings, model = measured.config, measured.model
    claims = [_claim(analysis, name) for name in known]
    parts = []
    for name in known:
        has_gap = final_gap(analysis, "network", name)[1] > LEAST
        share = percent(analysis[f"network_{name}_share"].values) if has_gap else "(no gap)"
        parts.append(f"{READINGS[name][0]} {share}")
    captions = {
        "gap_by_layer": "The gap after every block without coupling, by every reading; layer 0 is the embedding. "
        "Shaded: the last fifth of the layers. Grey: the untrained network. No line: the gap is not known, because "
        "bands commit before the window.",
        "coupled": "The gap after every block by the readout, for every coupling.",
        "levels_by_layer": "Commitment level of every band after every block, without coupling, by the readout (left) "
        "and by the probe (right). The gap is the highest band's level minus that of the lowest above DC.",
        "modes": "Share of the difference mode in the energy of a pair's residual stream, without coupling, in the "
        "lowest band of the token grid above DC and in its highest, at three noise levels. One half: the replicas "
        "have nothing in common.",
        "stream": "Left: mean square of the residual stream after every block, without coupling, at three noise "
        "levels; dotted: the untrained network. Right: that of the pair's difference mode in the lowest band of the "
        "token grid above DC and in its highest, as it is and over the mean square of the stream.",
        "gained": "Left: how much earlier a band commits when the readout after a block is known beside the noisy "
        "image. Dotted: the untrained network. Right: energy of the state's noise that the readout lets through, "
        "over that of the outcome, where the lowest band commits.",
        "decodable": "Share of the pair's final difference that is linearly decodable (held-out R²) from the "
        "embedding, from the middle and from the end of the network, along the ancestral sampler.",
    }
    tables = [_table(analysis, known), _stream(analysis), _summary(analysis, known)]
    if "network_gained" in analysis:
        tables.insert(1, _gained(analysis))
    return Section(
        title=f"Depth: {measured.subject_name}",
        question=f"This network of {model.depth} layers predicts {model.prediction}. After which layer is its gap "
        "there?",
        answer=f"Share of the final gap that is made in the last {100 * LAST:.0f} % of the layers: {'; '.join(parts)}.",
        claims=claims,
        tables=tables,
        captions={name: captions[name] for name in figures},
        methods=[
            f"{settings.pairs} pairs under {SAMPLER_NAMES[settings.sampler]}, {settings.steps} steps, gate "
            f"{settings.gate_kind}. After every block the residual stream is read: its common and difference energies "
            "over the token grid (raw), and the image that the final layer reads off it, denoised with the sampler's "
            "coefficients (readout). All energy counts, up to its own maximum after that block. Window of the "
            "estimator: log-SNR of -6 and up.",
            "The fitted scalar, the regressions on readout and noisy image, and the probe use pairs of their own along "
            "the ancestral sampler. Under DDIM the outcome is a function of the initial noise, and all of it would be "
            "decodable from the start. The share of the outcome that is explained takes the place of the relative "
            "energy. The scalar is one factor per layer, level and band; it takes away the readout's arbitrary scale.",
            "The probe is a ridge regression from the difference mode of the stream to that of the sample, in DCT "
            "coefficients over the token grid, one linear map per band, layer and step, fitted on other pairs than "
            "it is scored on. Its highest band is what lies inside patches.",
        ],
        limits=[
            "Intervals come from resampling pairs. They speak for this network, not for a network trained again, "
            "and do not include the uncertainty of the probe's fit.",
            "The readout applies the final layer where it was not trained to be applied. The raw reading sees "
            "whatever the stream carries, the noise of the state included.",
            "The noisy image alone explains the outcome with a gap of its own, and a layer that has computed nothing "
            "reads out a multiple of it. That is why the embedding has the gap by the fitted scalar and by the probe. "
            "What depth adds to the noisy image could come at any layer, and is shown beside it.",
            "A probe that fails shows that nothing is linearly decodable, not that nothing is there.",
        ],
    )


def _claim(analysis: xr.Dataset, reading: str) -> Claim:
    share, low, high = (float(v) for v in analysis[f"network_{reading}_share_claimed"].values)
    final = final_gap(analysis, "network", reading)
    there = final[1] > LEAST
    verdict, doubt = verdict_of(analysis, reading)
    half = analysis[f"network_{reading}_half"].values
    controls = []
    for source, name, text in (
        ("untrained", reading, "The same architecture with random weights."),
        ("network", f"{reading}_shuffled", "Coefficients assigned to bands at random."),
    ):
        if f"{source}_{name}_share_claimed" not in analysis:
            continue
        gap, values = final_gap(analysis, source, name), analysis[f"{source}_{name}_share_claimed"].values
        has_gap = bool(gap[1] > LEAST)
        controls.append(
            Control(
                "untrained network" if source == "untrained" else "shuffled bands",
                float(values[0]) if has_gap else None,
                [float(v) for v in values[1:]] if has_gap else None,
                bool(values[1] > CLAIMED) if has_gap else False,
                f"{text} Its final gap is {formatted(gap)} nats"
                + ("." if has_gap else ": there is none to be localised."),
            )
        )
    return Claim(
        3,
        f"The gap is localised in the last layers ({READINGS[reading][0]})",
        verdict,
        f"share of the final gap made in the last {100 * LAST:.0f} % of the layers; localised means more than "
        f"{CLAIMED:g}",
        share if there else None,
        [low, high] if there else None,
        (
            f"Final gap {formatted(final)} nats; it stays above half of that from {formatted(half)} of the depth on"
            + (f"; {doubt}." if doubt else ".")
        )
        if there
        else f"The final gap in this reading is {formatted(final)} nats: there is none to be localised.",
        controls,
        family_level(CLAIMS),
    )


def gap_cell(analysis: xr.Dataset, source: str, reading: str, layer: int) -> str:
    """The uncoupled gap after a layer as text: a bound where one band commits before the window, and not known where
    both do."""
    at = formatted(analysis[f"{source}_{reading}_gap"].isel({grid_of(reading): 0}).sel(layer=layer).values)
    low, high = censored(analysis, source, reading, layer)
    if low and high:
        return NOT_KNOWN
    return f"> {at}" if low else f"< {at}" if high else at


def _table(analysis: xr.Dataset, known: list[str]) -> Table:
    columns = [("network", name) for name in known] + [("untrained", "readout")]
    columns += [("untrained", "scaled")] if "scaled" in known else []
    rows = [
        [str(int(layer)), *(gap_cell(analysis, source, name, int(layer)) for source, name in columns)]
        for layer in analysis.layer.values
    ]
    head = ["after block", *(f"{READINGS[name][0]}, nats" for name in known)]
    head += [f"untrained, {READINGS[name][0]}" for source, name in columns if source == "untrained"]
    return Table(
        "Gap by layer without coupling",
        head,
        rows,
        f'0: the embedding, before any block. "{NOT_KNOWN}": more than half of what either band decides is there when '
        "the window opens; < and >: of one of them, so that the gap is a bound.",
    )


def _gained(analysis: xr.Dataset) -> Table:
    rows = []
    for layer in analysis.layer.values:
        cells = [str(int(layer))]
        for source in ("network", "untrained"):
            at = analysis[f"{source}_gained"].isel(probe_coupling=0).sel(layer=layer)
            cells += [formatted(at.isel(band=band).values) for band in (LOW_BAND, HIGH_BAND)]
        rows.append(cells)
    shares = ["last fifth"]
    for source in ("network", "untrained"):
        shares += [formatted(analysis[f"{source}_{name}_gained_share"].values) for name in ("low", "high")]
    gap = formatted(final_gap(analysis, "network", "state")) if "network_state_gap" in analysis else ""
    return Table(
        "What depth adds to the noisy image",
        ["after block", "lowest band, nats", "highest band, nats", "untrained: lowest", "untrained: highest"],
        [*rows, shares],
        "How much earlier a band commits when the outcome is regressed on the readout and the noisy image, than on "
        f"the noisy image alone, whose gap is {gap} nats. Last row: the share that the last fifth of the layers adds.",
    )


def _stream(analysis: xr.Dataset) -> Table:
    places, levels = shown_levels(analysis), analysis.share_level.values
    middle, rows = places[1], []
    for layer in analysis.layer.values:
        at = analysis.sel(layer=layer)
        cells = [str(int(layer)), *(f"{at.network_size[place, 0].item():.3g}" for place in places)]
        for name in ("network_energy", "network_relative"):
            cells += [f"{at[name][middle, band, 0].item():.2g}" for band in (LOW_BAND, HIGH_BAND)]
        cells += [gap_cell(analysis, "network", reading, int(layer)) for reading in ("raw", "normalised")]
        rows.append([*cells, gap_cell(analysis, "untrained", "normalised", int(layer))])
    head = ["after block", *(f"mean square of the stream, {levels[place]:.1f} nats" for place in places)]
    head += ["difference, lowest band", "highest band", "over the stream: lowest band", "highest band"]
    head += ["gap by raw energies, nats", "over the stream, nats", "untrained, over the stream"]
    note = (
        f"Energies of the difference mode at {levels[middle]:.1f} nats. A size that depends on the layer alone moves "
    )
    note += "no level; over the stream, energies are divided by its mean square after the same block at the same step."
    return Table("Scale of the residual stream, without coupling", head, rows, note)


def _summary(analysis: xr.Dataset, known: list[str]) -> Table:
    rows, as_in_paper = [], "network_readout_paper_share" in analysis
    for source in ("network", "untrained"):
        for name in known:
            grid = grid_of(name)
            gap = analysis[f"{source}_{name}_gap"].isel(layer=-1)
            ends = [formatted(gap.isel({grid: i}).values) for i in (0, -1)]
            share, half = (analysis[f"{source}_{name}_{what}"].values for what in ("share", "half"))
            rows.append([source, READINGS[name][0], *ends, formatted(share), formatted(half)])
            if as_in_paper:
                rows[-1].append(formatted(analysis[f"{source}_{name}_paper_share"].values))
    head = [
        "source",
        "reading",
        "final gap, g = 0",
        "final gap, strongest g",
        "share in the last fifth",
        "depth of half the gap",
        *([f"share in the last {PAPER_LAST} of {PAPER_DEPTH}"] if as_in_paper else []),
    ]
    return Table(
        "Localisation",
        head,
        rows,
        "Shares above 1: the gap has the other sign before. Where the final gap is near 0, share and depth mean "
        "nothing.",
    )
