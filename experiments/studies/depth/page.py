"""Figures and text of the depth study."""

from collections.abc import Callable
from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import (
    FAINT,
    INK,
    LEVEL_LABEL,
    QUIET,
    band_colors,
    band_legend,
    band_names,
    curve,
    new_figure,
)
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, percent
from experiments.frame.settings import SAMPLER_NAMES
from experiments.frame.verdict import Claim, Control, above
from experiments.studies.depth.settings import CLAIMED, LAST, DepthConfig

READINGS = {
    "readout": ("final-layer readout", "#0072B2"),
    "probe": ("linear probe of the outcome", "#D55E00"),
    "raw": ("raw energies of the stream", "#009E73"),
}


def page(measured: Measured[DepthConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of a run."""
    figures: dict[str, Callable[[], Figure]] = {
        "gap_by_layer": partial(figure_gap, analysis),
        "coupled": partial(figure_coupled, analysis),
        "levels_by_layer": partial(figure_levels, analysis),
    }
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
        final = analysis[f"network_{name}_gap"].isel({grid_of(name): 0, "layer": -1}).values
        share = percent(analysis[f"network_{name}_share"].values) if final[1] > 0 else "(no gap)"
        parts.append(f"{READINGS[name][0]} {share}")
    captions = {
        "gap_by_layer": "The gap after every block without coupling, in three readings; layer 0 is the embedding. "
        "Shaded: the last fifth of the layers. Grey: the readout of the untrained network.",
        "coupled": "The gap after every block by the readout, for every coupling.",
        "levels_by_layer": "Commitment level of every band after every block, without coupling, by the readout (left) "
        "and by the probe (right). The gap is the highest band's level minus that of the lowest above DC.",
        "decodable": "Share of the pair's final difference that is linearly decodable (held-out R²) from the "
        "embedding, from the middle and from the end of the network, along the ancestral sampler.",
    }
    return Section(
        title=f"Depth: {measured.subject_name}",
        question=f"This network of {model.depth} layers predicts {model.prediction}. After which layer is its gap "
        "there?",
        answer=f"Share of the final gap that is made in the last {100 * LAST:.0f} % of the layers: {'; '.join(parts)}.",
        claims=claims,
        tables=[_table(analysis, known), _summary(analysis, known)],
        captions={name: captions[name] for name in figures},
        methods=[
            f"{settings.pairs} pairs under {SAMPLER_NAMES[settings.sampler]}, {settings.steps} steps, gate "
            f"{settings.gate_kind}. After every block the residual stream is read: its common and difference energies "
            "over the token grid (raw), and the image that the final layer reads off it, denoised with the sampler's "
            "coefficients (readout). Each layer is its own reference: the energy of its last step without coupling. "
            "Window of the estimator: log-SNR of -6 and up.",
            "The probe is a ridge regression from the difference mode of the stream to that of the sample, in DCT "
            "coefficients over the token grid, one linear map per band, layer and step, fitted on other pairs than "
            "it is scored on. It runs along the ancestral sampler: under DDIM the outcome is a function of the "
            "initial noise, and all of it would be decodable from the start. The probe's held-out R² takes the place "
            "of the relative energy. Its highest band is what lies inside patches.",
        ],
        limits=[
            "Intervals come from resampling pairs. They speak for this network, not for a network trained again, "
            "and do not include the uncertainty of the probe's fit.",
            "The readout applies the final layer where it was not trained to be applied. The raw reading sees "
            "whatever the stream carries, the noise of the state included.",
            "A probe that fails shows that nothing is linearly decodable, not that nothing is there.",
        ],
    )


def _claim(analysis: xr.Dataset, reading: str) -> Claim:
    share, low, high = (float(v) for v in analysis[f"network_{reading}_share"].values)
    final = analysis[f"network_{reading}_gap"].isel({grid_of(reading): 0, "layer": -1}).values
    there = final[1] > 0
    verdict = above([low, high], CLAIMED) if there else "undecided"
    half = analysis[f"network_{reading}_half"].values
    controls = []
    for source, name, text in (
        ("untrained", reading, "The same architecture with random weights."),
        ("network", f"{reading}_shuffled", "Coefficients assigned to bands at random."),
    ):
        if f"{source}_{name}_share" not in analysis:
            continue
        gap = analysis[f"{source}_{name}_gap"].isel({grid_of(reading): 0, "layer": -1}).values
        values = analysis[f"{source}_{name}_share"].values
        has_gap = bool(gap[1] > 0)
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
        f"Final gap {formatted(final)} nats; it stays above half of that from {formatted(half)} of the depth on."
        if there
        else f"The final gap in this reading is {formatted(final)} nats: there is none to be localised.",
        controls,
    )


def grid_of(reading: str) -> str:
    """The dimension of the couplings at which a reading was taken."""
    return "probe_coupling" if reading.startswith("probe") else "coupling"


def _table(analysis: xr.Dataset, known: list[str]) -> Table:
    rows = [
        [
            str(int(layer)),
            *(
                formatted(analysis[f"network_{name}_gap"].isel({grid_of(name): 0}).sel(layer=layer).values)
                for name in known
            ),
            formatted(analysis.untrained_readout_gap.isel(coupling=0).sel(layer=layer).values),
        ]
        for layer in analysis.layer.values
    ]
    head = ["after block", *(f"{READINGS[name][0]}, nats" for name in known), "untrained, readout"]
    return Table("Gap by layer without coupling", head, rows, "0: the embedding, before any block.")


def _summary(analysis: xr.Dataset, known: list[str]) -> Table:
    rows = []
    for source in ("network", "untrained"):
        for name in known:
            grid = grid_of(name)
            gap = analysis[f"{source}_{name}_gap"].isel(layer=-1)
            ends = [formatted(gap.isel({grid: i}).values) for i in (0, -1)]
            share, half = (analysis[f"{source}_{name}_{what}"].values for what in ("share", "half"))
            rows.append([source, READINGS[name][0], *ends, formatted(share), formatted(half)])
    head = [
        "source",
        "reading",
        "final gap, g = 0",
        "final gap, strongest g",
        "share in the last fifth",
        "depth of half the gap",
    ]
    return Table(
        "Localisation",
        head,
        rows,
        "Shares above 1: the gap has the other sign before. Where the final gap is near 0, share and depth mean "
        "nothing.",
    )


def figure_gap(analysis: xr.Dataset) -> Figure:
    """Gap by layer at no coupling, all readings."""
    figure, ax = new_figure(7.2, 4.0)
    layers = analysis.layer.values
    ax.axvspan((1 - LAST) * layers[-1], layers[-1], color=FAINT, alpha=0.45, linewidth=0, zorder=0)
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    curves = [(f"network_{name}_gap", grid_of(name), *READINGS[name]) for name in READINGS]
    curves.append(("untrained_readout_gap", "coupling", "readout, untrained", QUIET))
    for variable, grid, label, color in curves:
        if variable in analysis:
            at = analysis[variable].isel({grid: 0}).values
            curve(ax, layers, at, color, label, shade=0.18, marker="o", markersize=4)
    ax.set_xlabel("after block")
    ax.set_ylabel("gap  $\\tau_{high} - \\tau_{low}$  (nats)")
    ax.set_title("Where in depth the gap is made, $g = 0$")
    figure.legend(loc="outside upper left", ncols=2)
    return figure


def figure_coupled(analysis: xr.Dataset) -> Figure:
    """Gap by layer by the readout, one curve per coupling."""
    figure, ax = new_figure(7.2, 3.4)
    layers = analysis.layer.values
    ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    shades = np.linspace(0.75, 0.0, analysis.sizes["coupling"])
    for index, g in enumerate(analysis.coupling.values):
        at = analysis.network_readout_gap.isel(coupling=index).values
        color = (shades[index] * 0.9, shades[index] * 0.9, 0.55 + 0.35 * shades[index])
        curve(ax, layers, at, color, f"$g$ = {g:g}", shade=0.2, marker="o", markersize=3.5)
    ax.set_xlabel("after block")
    ax.set_ylabel("gap, readout (nats)")
    ax.legend()
    return figure


def figure_levels(analysis: xr.Dataset) -> Figure:
    """Commitment levels by layer and band, readout and probe."""
    panels = ["readout"] + (["probe"] if "network_probe_tau" in analysis else [])
    figure, axes = new_figure(7.2, 3.5, 1, len(panels), sharey=True, squeeze=False)
    for ax, name in zip(axes[0], panels, strict=True):
        tau = analysis[f"network_{name}_tau"].isel({grid_of(name): 0})
        bands = tau.shape[1]
        colors = band_colors(analysis) if name == "readout" else band_colors(analysis.rename(probe_band="pb"))
        for band in range(bands):
            values = tau[:, band].values
            color = colors[min(band, len(colors) - 1)] if band < len(colors) else INK
            curve(ax, analysis.layer, values, color, band_names(analysis)[band] if name == "readout" else None)
        ax.set_title(READINGS[name][0])
        ax.set_xlabel("after block")
    axes[0][0].set_ylabel("commitment level  $\\tau$  (nats)")
    band_legend(figure, axes[0][0], "")
    return figure


def figure_decodable(analysis: xr.Dataset) -> Figure:
    """Held-out R2 against log-SNR at three depths, lowest and highest band, and the shuffled control."""
    figure, axes = new_figure(7.2, 3.2, 1, 2, sharey=True)
    depth = analysis.layer.values[-1]
    for ax, band in zip(axes, (1, analysis.sizes["probe_band"] - 1), strict=True):
        for layer, color in ((0, "#56B4E9"), (depth // 2, "#009E73"), (depth, "#0072B2")):
            r2 = analysis.network_probe_r2.isel(probe_coupling=0, probe_band=band).sel(layer=layer).values
            ax.fill_between(analysis.level_ell, r2[:, 1], r2[:, 2], color=color, alpha=0.18, linewidth=0)
            name = {0: "embedding", depth: "end of the network"}.get(layer, f"after block {layer}")
            ax.plot(analysis.level_ell, r2[:, 0], color=color, marker="o", markersize=3.5, label=name)
        control = analysis.network_probe_shuffled_r2.isel(probe_coupling=0, probe_band=band, last_layer=0).values
        ax.plot(analysis.level_ell, control[:, 0], color=QUIET, linestyle=":", label="outcomes of other pairs")
        ax.set_title(f"band {analysis.probe_band.values[band]}")
        ax.set_xlabel(LEVEL_LABEL)
        ax.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    axes[0].set_ylim(-0.3, 1.05)
    axes[0].set_ylabel("decodable share, $R^2$")
    axes[0].legend(loc="upper left")
    return figure
