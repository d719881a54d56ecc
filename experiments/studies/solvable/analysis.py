"""Levels, rates and correlations from stored measurements on the three laws, beside the theory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from experiments.frame.draws import mean_and_draws, packed, pair_draws
from experiments.frame.measured import Definitions, Measured
from experiments.frame.steps import WINDOW_START
from experiments.studies.solvable.settings import CLAIMS, SolvableConfig
from experiments.studies.solvable.theory import band_theory, clone_theory, sign_curves, sign_theory
from ou_theory import estimator as oc
from ou_theory.bootstrap import family_level
from ou_theory.clock import Clock
from ou_theory.modes import Bands

SPREAD = 0.003  # least standard error of a correlation: near 1 the resampled one falls below rounding errors

_CLONES = "correlation of two clones' ends"
DEFINITIONS: Definitions = {
    "q": ("relative energy of the denoised difference, by band", "1"),
    "tau": ("commitment level of a band of the Gaussian law", "nat"),
    "tau_claimed": ("the same, with its interval at the level of the claims", "nat"),
    "speciation": ("log-SNR at which a difference along a sign's centre begins to grow", "nat"),
    "speciation_step": ("sampler step at which a difference along a sign's centre begins to grow", "sampler steps"),
    "speciation_step_claimed": ("the same, with its interval at the level of the claims", "sampler steps"),
    "speciation_gap": ("speciation level of the pair's weak sign minus that of its strong one", "nat"),
    "growth": ("growth rate of a difference along a sign's centre, per nat of ln(1 / sigma)", "1 / nat"),
    "sign_q": ("relative energy of the denoised difference along a sign's centre", "1"),
    "clone": (f"{_CLONES}, by band of the Gaussian law", "1"),
    "clone_band": (f"{_CLONES}, by band, with a simultaneous band at the level of the claims", "1"),
    "clone_sign": (f"{_CLONES}, along the centres of the pair's signs", "1"),
    "clone_sign_shift": (f"{_CLONES} along the signs' centres minus that of the exact denoiser", "1"),
    "law": ("which of the three laws", "1"),
    "sign": ("which sign of which law", "1"),
}


def crossing_level(growth: np.ndarray, ell: np.ndarray) -> np.ndarray:
    """Level (..., sign) of the last upward passage of a rate (..., K, sign) through 0, linear between steps."""
    with jax.enable_x64(True):
        return np.asarray(oc.crossing(jnp.asarray(growth), ell, 0.0))


def simultaneous(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Estimates with a band that holds the truth at all points at once.

    The half-width is a multiple of the standard error, chosen so that a share of `level` of the resampled curves lies
    within it at every point.

    Args:
      values: (1 + draws, ...), the estimate first.
      level: 95 % by default.
    """
    point, draws = values[0], values[1:]
    spread = np.maximum(draws.std(0), SPREAD)
    largest = (np.abs(draws - point) / spread).reshape(len(draws), -1).max(1)
    factor = np.quantile(largest, level)
    return np.stack([point, point - factor * spread, point + factor * spread], -1)


def estimates(dataset: xr.Dataset, clock: Clock, seed: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Estimates with intervals (..., 3) of one source; levels in nats."""
    weights = pair_draws(seed, dataset.sizes["pair"])
    ell = clock.log_snr

    def drawn(name):
        return mean_and_draws(dataset[name].values, weights)

    energy, growth = drawn("energy"), drawn("growth")
    q = energy / energy[:, :, -1:]
    with jax.enable_x64(True):
        tau = np.asarray(oc.commitment(jnp.asarray(q[:, 0]), ell, WINDOW_START).level)
    speciation, level = crossing_level(growth, ell), family_level(CLAIMS)
    step = np.asarray(clock.step(speciation))
    signed = drawn("sign_energy")
    with np.errstate(invalid="ignore"):
        clone, clone_sign = drawn("clone_product") / drawn("clone_square"), drawn("sign_product") / drawn("sign_square")
        return {
            "q": (("law", "step", "band", "bound"), packed(q)),
            "tau": (("band", "bound"), packed(tau)),
            "tau_claimed": (("band", "bound"), packed(tau, level)),
            "speciation": (("sign", "bound"), packed(speciation)),
            "speciation_step": (("sign", "bound"), packed(step)),
            "speciation_step_claimed": (("sign", "bound"), packed(step, level)),
            "speciation_gap": (("bound",), packed(speciation[:, 2] - speciation[:, 1])),
            "growth": (("step", "sign", "bound"), packed(growth)),
            "sign_q": (("step", "sign", "bound"), packed(signed / signed[:, -1:])),
            "clone": (("branch", "band", "bound"), packed(clone)),
            "clone_band": (("branch", "band", "bound"), simultaneous(clone, level)),
            "clone_sign": (("branch", "part", "bound"), packed(clone_sign)),
        }


def sign_shift(dataset: xr.Dataset, exact: xr.Dataset, seed: int) -> np.ndarray:
    """Correlation of clones along the pair's centres minus that of the exact denoiser from the same states and noise,
    with a simultaneous band (branch, part, 3)."""
    count = dataset.sizes["pair"]
    weights = pair_draws(seed, count)

    def correlation(source):
        parts = (source[name].values[:count] for name in ("sign_product", "sign_square"))
        product, square = (mean_and_draws(values, weights) for values in parts)
        return product / square

    return simultaneous(correlation(dataset) - correlation(exact), family_level(CLAIMS))


def analyse(measured: Measured[SolvableConfig]) -> xr.Dataset:
    """Estimates of every source, and the theory."""
    config, sources = measured.config, measured.sources("network", "exact", "untrained")
    return estimates_of(measured.clock, measured.bands, sources, config.seed, config.eta)


def estimates_of(clock: Clock, bands: Bands, sources: dict[str, xr.Dataset], seed: int, eta: float = 0.0) -> xr.Dataset:
    """What `analyse` returns, from groups by name; `eta` is that of the sampler."""
    data: dict[str, Any] = {}
    for source, dataset in sources.items():
        for name, value in estimates(dataset, clock, seed).items():
            data[f"{source}_{name}"] = value
        shift = sign_shift(dataset, sources["exact"], seed)
        data[f"{source}_clone_sign_shift"] = (("branch", "part", "bound"), shift)
    network = next(iter(sources.values()))
    energy, signs = band_theory(clock, bands, eta), sign_theory(clock)
    branches = network.branch.values
    with jax.enable_x64(True):
        tau = oc.commitment(jnp.asarray(energy / energy[-1]), clock.log_snr, WINDOW_START).level
    known = sign_curves(clock, signs["kappa"])
    steps = clock.step(signs["level"])
    data |= {
        "theory_q": (("step", "band"), energy / energy[-1]),
        "theory_tau": (("band",), np.asarray(tau)),
        "theory_speciation": (("sign",), signs["level"]),
        "theory_speciation_step": (("sign",), np.asarray(steps)),
        "theory_growth": (("step", "sign"), signs["growth"]),
        "theory_sign_q": (("step", "sign"), known),
        "theory_clone": (("branch", "band"), clone_theory(clock, bands, branches)),
        "theory_clone_sign": (("branch", "part"), known[branches, 1:]),
    }
    shared = ("law", "sign", "part", "step", "ell", "band", "radius", "branch", "branch_ell")
    coords = {name: network[name] for name in shared}
    return xr.Dataset(data, coords={**coords, "bound": ["estimate", "low", "high"]})
