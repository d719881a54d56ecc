"""phi by branch step, where it passes the threshold, and the same of controls and theory, from what is stored."""

from typing import Any

import numpy as np
import xarray as xr

from experiments.frame.draws import mean_and_draws, packed, pair_draws
from experiments.frame.measured import Definitions, Measured
from experiments.studies.speciation.settings import SURE, THRESHOLD, SpeciationConfig
from experiments.studies.speciation.theory import LAWS, laws, speciation_level
from ou_theory.clock import NUM_TRAIN_STEPS, Clock, make_clock

SOURCES = ("network", "labelled", "untrained")
_LEVEL = f"log-SNR at which phi passes {THRESHOLD:g}, inf if after the last branch and -inf if before the first"
DEFINITIONS: Definitions = {
    "phi": ("share of trajectories that end in the class of their clone", "1"),
    "sure_phi": (f"phi of the trajectories of whose end the classifier is surer than {SURE:g}", "1"),
    "sure_level": (f"{_LEVEL}, of those trajectories", "nat"),
    "sure_share": ("share of those trajectories", "1"),
    "others": ("share of trajectories that end in the class of the clone of the pair's other trajectory", "1"),
    "level": (_LEVEL, "nat"),
    "pixel_level": (f"{_LEVEL}, for data in units of pixels in [0, 1]", "nat"),
    "schedule_step": ("step of the 1000-step schedule of that log-SNR, 0 for the clean end", "1"),
    "pixel_step": ("step of the 1000-step schedule at which data in units of pixels in [0, 1] have that noise", "1"),
    "law_phi": ("phi of the two-Gaussian mixture", "1"),
    "law_level": (_LEVEL, "nat"),
    "first_class": ("share of trajectories that end in the first class", "1"),
    "sure": ("probability that the classifier gives to the class of an end", "1"),
    "law": ("law of theory", "1"),
    "end": ("class in which the trajectory ends", "1"),
    "clone": ("class in which its clone ends", "1"),
    "centre": ("half the distance of the class means along the component", "1"),
}


def crossing(phi: np.ndarray, levels: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """The level (...) from which on phi (..., S) stays at or above the threshold, linear between levels (S,).

    inf where phi ends below, so that it passes later than the last level if at all; -inf where it is never below; NaN
    where it is NaN anywhere."""
    phi = np.asarray(phi, np.float64)
    below = phi < threshold
    last = phi.shape[-1] - 1 - np.argmax(below[..., ::-1], -1)
    at = np.minimum(last, phi.shape[-1] - 2)
    low, high = (np.take_along_axis(phi, at[..., None] + i, -1)[..., 0] for i in (0, 1))
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (threshold - low) / (high - low)
        found = levels[at] + part * (levels[at + 1] - levels[at])
    found = np.where(below[..., -1], np.inf, np.where(below.any(-1), found, -np.inf))
    return np.where(np.isnan(phi).any(-1), np.nan, found)


def censored(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """(3,): estimate and interval of a level, from itself and its draws (1 + draws,), which may be infinite.

    The ends are draws, outward of the quantiles, for nothing lies between a level and infinity. NaN if a draw is NaN.
    """
    if np.isnan(values).any():
        return np.array([values[0], np.nan, np.nan])
    draws = np.sort(values[1:])
    outside = int((1 - level) / 2 * (len(draws) - 1))
    return np.array([values[0], draws[outside], draws[-1 - outside]])


def schedule_step(level: np.ndarray) -> np.ndarray:
    """The step of the 1000-step linear schedule, 0 for the clean end, at a log-SNR in the data's units."""
    full: Clock = make_clock(NUM_TRAIN_STEPS)
    return NUM_TRAIN_STEPS - 1 - np.interp(level, full.log_snr, np.arange(NUM_TRAIN_STEPS), np.nan, np.nan)


def step_level(step: int) -> float:
    """The log-SNR of a step of that schedule, 0 for the clean end."""
    return float(make_clock(NUM_TRAIN_STEPS).log_snr[NUM_TRAIN_STEPS - 1 - step])


def estimates(group: xr.Dataset, seed: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Estimates of one source, with 95 % intervals over pairs.

    phi counts a trajectory and its own clone. `others` counts a trajectory and the clone of the pair's other one, with
    which it shares nothing: what chance alone gives, at every branch. `sure_phi` counts the trajectories of whose end
    the classifier is sure: they are chosen by their outcome, so that it describes and estimates nothing.
    """
    weights = pair_draws(seed, group.sizes["pair"])
    end, clone = group.end.values[:, None, :], group.clone.values
    same = mean_and_draws((end == clone).mean(-1), weights)
    sure = (group.sure.values > SURE)[:, None, :]
    share = mean_and_draws(sure.mean((1, 2)), weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        of_sure = mean_and_draws(((end == clone) & sure).mean(-1), weights) / share[:, None]
    other = mean_and_draws((end == clone[..., ::-1]).mean(-1), weights)
    return {
        "phi": (("branch", "bound"), packed(same)),
        "others": (("branch", "bound"), packed(other)),
        "level": (("bound",), censored(crossing(same, group.branch_ell.values))),
        "sure_phi": (("branch", "bound"), packed(of_sure)),
        "sure_level": (("bound",), censored(crossing(of_sure, group.branch_ell.values))),
        "sure_share": (("bound",), packed(share)),
        "first_class": (("bound",), packed(mean_and_draws((end == 0).mean((1, 2)), weights))),
        "sure": (("bound",), packed(mean_and_draws(group.sure.values.mean(-1), weights))),
    }


def analyse(measured: Measured[SpeciationConfig]) -> xr.Dataset:
    """Estimates of every source, named ``<source>_<estimate>``, and theory from the covariance of the data."""
    network, shift = measured.load("network"), pixel_shift(measured)
    data: dict[str, Any] = {}
    for source in SOURCES:
        found = estimates(measured.load(source), measured.config.seed)
        data |= {f"{source}_{name}": value for name, value in found.items()}
    level = data["network_level"][1]
    data["network_schedule_step"] = ("bound",), schedule_step(level)
    data["network_pixel_level"] = ("bound",), level + shift
    data["network_pixel_step"] = ("bound",), schedule_step(level + shift)
    attrs: dict[str, Any] = {"pixel_shift": shift}
    coords = {name: network[name] for name in ("branch", "branch_ell")} | {"bound": ["estimate", "low", "high"]}
    if measured.run.holds("data"):
        theory = measured.load("data")
        fine = measured.clock.log_snr
        phi = laws(theory, np.exp(-fine))
        data["law_phi"] = ("law", "step"), phi
        data["law_level"] = ("law",), crossing(phi, fine)
        scale = np.exp(-shift)
        attrs |= {"leading": theory.leading, "leading_pixels": theory.leading * scale}
        attrs |= {"one_channel": theory.one_channel, "one_channel_pixels": theory.one_channel * scale}
        for name in ("leading", "one_channel"):
            attrs[f"{name}_level"] = speciation_level(attrs[name])
            attrs[f"{name}_pixel_level"] = speciation_level(attrs[f"{name}_pixels"])
        coords |= {"law": list(LAWS), "step": np.arange(len(fine)), "ell": ("step", fine)}
    return xr.Dataset(data, coords, attrs)


def pixel_shift(measured: Measured[SpeciationConfig]) -> float:
    """What is added to a log-SNR of standardised data to have that of the same noise beside pixels in [0, 1]."""
    return float(2 * np.log(2 / measured.load("classifier").pixel_std))
