"""What the page of one network says: its levels against the exact theory of its data."""

from functools import partial

import numpy as np
import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import FAINT, INK, QUIET, band_names, coupling_axis, curve, new_figure
from experiments.frame.exact import data_in_words
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section, Table, formatted, number
from experiments.studies.spectrum.settings import SpectrumConfig

COLOR = "#0072B2"


def data_of(analysis: xr.Dataset) -> str:
    """What the network was trained on, in words."""
    return data_in_words(analysis.attrs["transformation"])


def page(measured: Measured[SpectrumConfig], analysis: xr.Dataset) -> Page:
    """Section and figures of one network."""
    return Page(section(measured, analysis), {"levels": partial(figure_levels, analysis)})


def section(measured: Measured[SpectrumConfig], analysis: xr.Dataset) -> Section:
    """What was found, in words and tables."""
    gap, theory = analysis.gap[0].values, float(analysis.theory_gap)
    return Section(
        title=f"Spectrum: {measured.subject_name}",
        question=f"Trained on {data_of(analysis)}: is the network's gap that of its data?",
        answer=f"The gap without coupling is {formatted(gap)} nats. An exact denoiser of Gaussian data of the same "
        f"covariance has {number(theory)}.",
        tables=[band_table(analysis), coupling_table(analysis)],
        captions={
            "levels": "Left: commitment level of each band without coupling, network (points, 95 % intervals) and "
            "exact denoiser of the data's covariance (line). Right: the gap against the coupling."
        },
        methods=[
            f"{analysis.attrs['pairs']} pairs, {measured.config.steps} steps of DDIM, the same noise at every coupling "
            "and for every network. Commitment levels use the energy along the outcome, relative to its own maximum "
            "(docs/theory.md, section 7.4).",
            "The theory takes nothing from the network. It is an exact denoiser of Gaussian data with the covariance "
            "of the training images within classes, all principal components, under the sampler's own steps.",
        ],
        limits=[
            "Photographs are not Gaussian: what a network knows beyond the covariance lets bands commit earlier than "
            "the theory says.",
            "Intervals are over pairs. They do not speak for a network trained again.",
        ],
    )


def band_table(analysis: xr.Dataset) -> Table:
    """Over bands: levels of network and theory without coupling."""
    tau = analysis.tau[0].values
    rows = [
        [
            name,
            formatted(tau[b]),
            number(float(analysis.theory_tau[b])),
            formatted(tau[b] - float(analysis.theory_tau[b])),
        ]
        for b, name in enumerate(band_names(analysis))
    ]
    return Table("Commitment levels without coupling", ["band", "τ, nats", "τ, theory of the data", "difference"], rows)


def coupling_table(analysis: xr.Dataset) -> Table:
    """Over couplings: gap by two estimators, order, decided fractions of the two bands of the gap."""
    rows = [
        [
            f"{g:.4g}",
            formatted(at.gap),
            formatted(at.gap_by_energy),
            formatted(at.order),
            *(formatted(at.decided[analysis.attrs[f"{end}_band"]], 3) for end in ("low", "high")),
        ]
        for g, at in ((float(g), analysis.sel(coupling=g)) for g in analysis.coupling)
    ]
    head = ["g", "gap, nats", "gap by all energy", "Kendall's tau-b", "decided fraction, low", "decided fraction, high"]
    note = "Kendall's tau-b is 1 where bands commit from low to high. Low: lowest band above DC; high: highest band."
    return Table("The gap against the coupling", head, rows, note)


def figure_levels(analysis: xr.Dataset) -> Figure:
    """Levels by band beside the theory of the data; the gap against the coupling."""
    figure, (left, right) = new_figure(7.2, 3.2, 1, 2)
    curve(left, analysis.radius, analysis.tau[0].values, COLOR, "network", marker="o", markersize=4)
    left.plot(
        analysis.radius, analysis.theory_tau, color=INK, linestyle="--", linewidth=1.2, label="theory of the data"
    )
    left.set_xlabel("radial frequency of the band")
    left.set_ylabel("commitment level  $\\tau$  (nats)")
    left.legend()
    couplings = analysis.coupling.values
    curve(right, couplings, analysis.gap.values, COLOR, marker="o", markersize=4)
    right.axhline(0, color=FAINT, linewidth=0.8, zorder=0)
    right.plot([couplings[0]], [float(analysis.theory_gap)], color=QUIET, marker="_", markersize=14)
    if np.size(couplings) > 1:
        coupling_axis(right, couplings)
    right.set_ylabel("gap  (nats)")
    return figure
