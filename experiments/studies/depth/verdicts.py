"""Whether a gap is made in the last layers, by each reading."""

import math

import numpy as np
import xarray as xr

from experiments.frame.verdict import LEAST, Verdict, above
from experiments.studies.depth.readings import CENSORED
from experiments.studies.depth.settings import CLAIMED, LAST
from ou_theory.estimator import HIGH_BAND, LOW_BAND

READINGS = {
    "readout": ("final-layer readout", "#0072B2"),
    "scaled": ("readout with a fitted scalar", "#CC79A7"),
    "probe": ("linear probe of the outcome", "#D55E00"),
    "raw": ("raw energies of the stream", "#009E73"),
}


def grid_of(reading: str) -> str:
    """The dimension of the couplings at which a reading was taken."""
    return "coupling" if reading.removesuffix("_shuffled") in ("readout", "raw", "normalised") else "probe_coupling"


def final_gap(analysis: xr.Dataset, source: str, reading: str) -> np.ndarray:
    """The uncoupled gap after the last layer, with its interval (3,)."""
    return analysis[f"{source}_{reading}_gap"].isel({grid_of(reading): 0})[-1].values


def censored(analysis: xr.Dataset, source: str, reading: str, layer: int) -> tuple[bool, bool]:
    """Whether the lowest and the highest band commit before the window after a layer, so that their levels there are
    upper bounds. Runs of older versions do not say: False."""
    name = f"{source}_{reading}_edge"
    if name not in analysis:
        return False, False
    edge = analysis[name].isel({grid_of(reading): 0, "layer": layer}).values
    return bool(edge[LOW_BAND] > CENSORED), bool(edge[HIGH_BAND] > CENSORED)


def known_gap(analysis: xr.Dataset, source: str, reading: str) -> np.ndarray:
    """The uncoupled gap by layer, with its interval (layer, 3); NaN where neither level is known."""
    gap = analysis[f"{source}_{reading}_gap"].isel({grid_of(reading): 0}).values
    unknown = [all(censored(analysis, source, reading, layer)) for layer in range(len(gap))]
    return np.where(np.array(unknown)[:, None], np.nan, gap)


def verdict_of(analysis: xr.Dataset, reading: str, source: str = "network") -> tuple[Verdict, str]:
    """Whether the share of the final gap that is made in the last fifth of the layers is above a half, and what stands
    in the way of saying so, if anything does.

    Where a band commits before the window at the beginning of the last fifth, the gap there is a bound: from below
    where it is the low band, from above where it is the high one. A lower bound on that gap is an upper bound on the
    share, and the reverse.
    """
    share, low, high = (float(v) for v in analysis[f"{source}_{reading}_share_claimed"].values)
    if not final_gap(analysis, source, reading)[1] > LEAST or not np.isfinite([share, low, high]).all():
        return "undecided", "there is no gap to be localised"
    verdict = above([low, high], CLAIMED)
    at = (1 - LAST) * (analysis.sizes["layer"] - 1)
    edges = [censored(analysis, source, reading, layer) for layer in {math.floor(at), math.ceil(at)}]
    low_early, high_early = (any(side) for side in zip(*edges, strict=True))
    if (low_early and verdict == "holds") or (high_early and verdict == "does not hold") or (low_early and high_early):
        return "undecided", (
            "at the beginning of the last fifth "
            + ("both bands" if low_early and high_early else "a band")
            + " commit before the estimator's window, so that the gap there is not known"
        )
    return verdict, ""
