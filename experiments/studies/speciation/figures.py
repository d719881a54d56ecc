"""The figure of the speciation study."""

import xarray as xr
from matplotlib.figure import Figure

from experiments.frame.drawing import COLORS, INK, LEVEL_LABEL, QUIET, curve, new_figure
from experiments.studies.speciation.settings import THRESHOLD
from experiments.studies.speciation.theory import LAWS

NAMES = {
    "network": "trajectories without a label",
    "labelled": "the same network, given the label",
    "untrained": "untrained network",
}


def figure_phi(analysis: xr.Dataset) -> Figure:
    """phi by branch level, of the network, its controls and theory."""
    figure, ax = new_figure(6.6, 3.8)
    level = analysis.branch_ell.values
    for (source, name), color in zip(NAMES.items(), COLORS, strict=False):
        curve(ax, level, analysis[f"{source}_phi"].values, color, name, marker="o", markersize=3.5)
    curve(ax, level, analysis.network_others.values, QUIET, "clones of other trajectories", marker="o", markersize=3.5)
    if "law_phi" in analysis:
        for law, style in zip(LAWS, ("--", ":"), strict=True):
            ax.plot(analysis.ell, analysis.law_phi.sel(law=law), color=INK, linestyle=style, label=LAWS[law])
        ax.axvline(analysis.leading_level, color=COLORS[4], label="$t_S = \\frac{1}{2}\\ln\\Lambda$")
    ax.axhline(THRESHOLD, color=QUIET, linewidth=0.8)
    ax.set_xlim(level[0] - 0.5, level[-1] + 0.5)
    ax.set_xlabel(LEVEL_LABEL)
    ax.set_ylabel("share in the class of the clone")
    figure.legend(loc="outside right upper", fontsize=7.5)
    return figure
