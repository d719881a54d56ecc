"""The three curves from stored measurements, how far they disagree beyond what finite steps cost, and why."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from experiments.frame.draws import in_chunks, mean_and_draws, packed, pair_draws, with_interval
from experiments.frame.estimator import LOW, guarded_start
from experiments.frame.measured import Definitions, Measured
from experiments.studies.cloning.settings import CONTRASTS, MEASURES, CloningConfig
from experiments.studies.cloning.theory import step_theory
from ou_theory import estimator as oc
from ou_theory.clock import Clock

_APART = "distance of a measurement from the mean of the other two, beyond what finite steps cost"
_PART = "part of 1 - mmse/Var minus Q, beyond what finite steps cost"
_BOUND = "1 - mmse/Var minus a lower bound of it for any posterior mean"
DEFINITIONS: Definitions = {
    "q": ("Q: variance of what the sampler predicts over that of the ends", "1"),
    "mmse": ("1 - mmse/Var of predicting the noised ends", "1"),
    "clones": ("correlation of clones' ends", "1"),
    "difference": ("difference of two measurements", "1"),
    "beyond": ("difference of two measurements beyond what finite steps cost", "1"),
    "absolute": ("mean absolute difference of two measurements", "1"),
    "absolute_noise": ("mean absolute difference that sampling noise alone would give", "1"),
    "square": ("mean square difference beyond what finite steps cost, free of sampling noise", "1"),
    "square_raw": ("mean square difference, free of sampling noise", "1"),
    "square_steps": ("mean square difference for the exact Gaussian denoiser, which is what finite steps cost", "1"),
    "signed": ("mean difference beyond what finite steps cost", "1"),
    "apart": (_APART, "1"),
    "apart_band": (f"{_APART}, by band", "1"),
    "parts": (_PART, "1"),
    "parts_mean": (f"{_PART}, mean over branch steps", "1"),
    "excess": (_BOUND, "1"),
    "excess_mean": (f"{_BOUND}, mean over branch steps", "1"),
    "tau": ("commitment level", "nat"),
    "half": ("log-SNR at which a curve passes one half", "nat"),
    "snr_one": ("log-SNR at which the signal-to-noise ratio is 1", "nat"),
    "kept": ("variance of the ends over that of the law, under finite steps", "1"),
    "steps_q": ("Q of the exact Gaussian denoiser under the same steps", "1"),
    "steps_mmse": ("1 - mmse/Var of the exact Gaussian denoiser under the same steps", "1"),
    "start": ("log-SNR at which the window of the estimator opens", "nat"),
    "contrast": ("the two measurements whose difference is taken", "1"),
    "measure": ("which measurement", "1"),
    "curve": ("which curve", "1"),
    "where": ("whether a band is less or more than half decided", "1"),
    "filter": ("which bound", "1"),
}


def mean_square(values: np.ndarray, pairs: int) -> np.ndarray:
    """The mean square of differences over all points, freed of sampling noise, with its interval.

    The square of an estimate is too large by the estimate's variance; the square of a resampled estimate is too large
    by twice as much. The spread of the draws tells that variance, and it is taken off. A negative result is noise
    around 0.

    Args:
      values: (1 + draws, ...) differences, the estimate first.
      pairs: how many pairs were resampled.

    Returns:
      (3,): the mean square and the ends of its interval.
    """
    noise = float(values[1:].var(0).mean()) * pairs / (pairs - 1)
    squares = np.square(values).reshape(len(values), -1).mean(1)
    return with_interval(squares[0] - noise, squares[1:] - 2 * noise)


def estimates(dataset: xr.Dataset, clock: Clock, seed: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """All estimates of one source, intervals in the last axis, from one draw of pairs; levels in nats.

    Averages over bands leave out DC: it has one coefficient per channel, whose noise would drown the rest.
    """
    pairs, branches, ell = dataset.sizes["pair"], dataset.branch.values, clock.log_snr
    weights = pair_draws(seed, pairs)

    def drawn(name):
        return mean_and_draws(dataset[name].values, weights)

    def packed_each(values):
        return np.stack([packed(value) for value in values])

    covariance = drawn("covariance")
    variance = np.trace(covariance, axis1=-2, axis2=-1) / covariance.shape[-1]
    step_noise = np.asarray(dataset.noise.values, np.float64).mean(0)  # its own spread does not matter
    each = [step_theory(clock, step_noise, some) for some in in_chunks(covariance, len(clock) * covariance[0].size)]
    theory = {name: np.concatenate([one[name] for one in each]) for name in each[0]}
    q, error, spread, aligned = (drawn(name) / variance[:, None] for name in ("energy", "error", "spread", "aligned"))
    clones = 2 * drawn("clone_product") / (variance[:, None] + drawn("clone_square"))
    at = {"q": q[:, branches], "clones": clones, "mmse": 1 - error[:, branches]}
    rest = {name: value - theory[name][:, branches] for name, value in at.items()}
    raw, beyond = ([curves[a] - curves[b] for a, b in CONTRASTS] for curves in (at, rest))
    steps = [(theory[a] - theory[b])[0, branches, LOW:] for a, b in CONTRASTS]
    apart = [1.5 * (rest[name] - sum(rest.values()) / 3) for name in MEASURES]  # from the mean of the other two
    undecided = q[0, branches, LOW:] < 0.5
    inside = [value[..., LOW:] for value in apart]
    where = [undecided | True, undecided, ~undecided]
    # mmse - Q is due to other states, to predictions that vary more than they know, and to an offset of their mean
    parts = [spread - q, 2 * (aligned - spread), 1 - error - (2 * aligned - spread)]
    known = [theory["spread"] - theory["q"], 2 * (theory["aligned"] - theory["spread"]), 0.0]
    parts = [(found - exact)[:, branches, LOW:] for found, exact in zip(parts, known, strict=True)]

    grid = np.append(branches, len(clock) - 1)  # everything is decided at the last step
    ends = [np.concatenate([value, np.ones_like(value[:, :1])], 1) for value in at.values()]
    start = guarded_start(q[0], variance[0], ell)
    with jax.enable_x64(True):
        half = [np.asarray(oc.crossing(jnp.asarray(value), ell[grid], 0.5)) for value in ends]
        tau = [np.asarray(oc.commitment(jnp.clip(jnp.asarray(c), 0, 1), ell, start).level) for c in (q, 1 - error)]
    scalar = variance[:, None] / (variance[:, None] + clock.sigma[:, None] ** 2)
    excess = [(1 - error - bound)[:, branches] for bound in (scalar, theory["linear"])]
    point, curve, band = ("branch", "band", "bound"), ("step", "band", "bound"), ("band", "bound")
    scale = np.sqrt(2 / np.pi)  # mean absolute value of unit noise
    return {
        "q": (curve, packed(q)),
        "mmse": (curve, packed(1 - error)),
        "clones": (point, packed(clones)),
        "difference": (("contrast", *point), packed_each(raw)),
        "beyond": (("contrast", *point), packed_each(beyond)),
        "absolute": (("contrast",), np.array([np.abs(v[0, :, LOW:]).mean() for v in raw])),
        "absolute_noise": (("contrast",), np.array([scale * v[1:, :, LOW:].std(0).mean() for v in raw])),
        "square": (("contrast", "bound"), np.stack([mean_square(v[..., LOW:], pairs) for v in beyond])),
        "square_raw": (("contrast", "bound"), np.stack([mean_square(v[..., LOW:], pairs) for v in raw])),
        "square_steps": (("contrast",), np.array([np.square(v).mean() for v in steps])),
        "signed": (("contrast", "bound"), packed_each([v[..., LOW:].mean((1, 2)) for v in beyond])),
        "apart": (
            ("measure", "where", "bound"),
            np.stack(
                [packed_each([v[:, w].mean(1) if w.any() else v[:, 0, 0] * np.nan for w in where]) for v in inside]
            ),
        ),
        "apart_band": (("measure", *band), packed_each([v.mean(1) for v in apart])),
        "parts": (("part", "branch", "bound"), packed_each([v.mean(2) for v in parts])),
        "parts_mean": (("part", "bound"), packed_each([v.mean((1, 2)) for v in parts])),
        "excess": (("filter", *point), packed_each(excess)),
        "excess_mean": (("filter", *band), packed_each([v.mean(1) for v in excess])),
        "tau": (("curve", *band), packed_each(tau)),
        "half": (("measure", *band), packed_each(half)),
        "snr_one": (band, packed(-np.log(variance))),
        "kept": (band, packed(theory["kept"])),
        "steps_q": (("step", "band"), theory["q"][0]),
        "steps_mmse": (("step", "band"), theory["mmse"][0]),
        "start": ((), np.asarray(start)),
    }


def analyse(measured: Measured[CloningConfig]) -> xr.Dataset:
    """Estimates of every source, named ``<source>_<estimate>``."""
    return estimates_of(measured.clock, measured.sources("network", "exact", "untrained"), measured.config.seed)


def estimates_of(clock: Clock, sources: dict[str, xr.Dataset], seed: int) -> xr.Dataset:
    """The estimates of `analyse`, from groups by name."""
    data = {
        f"{source}_{name}": value
        for source, dataset in sources.items()
        for name, value in estimates(dataset, clock, seed).items()
    }
    one = next(iter(sources.values()))
    shared = {name: one[name] for name in ("step", "ell", "band", "radius", "branch", "branch_ell")}
    labels: dict[str, Any] = {
        "contrast": [f"{a} - {b}" for a, b in CONTRASTS],
        "measure": list(MEASURES),
        "curve": ["q", "mmse"],
        "where": ["all", "undecided", "decided"],
        "part": ["states", "calibration", "offset"],
        "filter": ["one variance", "by channel"],
        "bound": ["estimate", "low", "high"],
    }
    return xr.Dataset(data, coords={**shared, **labels})
