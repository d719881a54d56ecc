"""Levels and gaps of one network beside those of an exact denoiser of its data's covariance."""

import jax
import numpy as np
import xarray as xr

from experiments.frame.draws import bootstrap, pair_draws, with_interval
from experiments.frame.estimator import HIGH, LOW, commitment_of, order
from experiments.frame.exact import exact_statistics
from experiments.frame.measured import Definitions, Measured
from experiments.studies.spectrum.settings import CLAIMS, SpectrumConfig
from ou_theory.bootstrap import family_level

DEFINITIONS: Definitions = {
    "tau": ("commitment level of a band", "nat"),
    "decided": ("decided fraction of a band, in units of its uncoupled variation", "1"),
    "gap": ("synchronization gap", "nat"),
    "gap_by_energy": ("synchronization gap by all energy, not only that along the outcome", "nat"),
    "order": ("Kendall's tau-b of commitment level against frequency, DC left out", "1"),
    "gap_claimed": ("synchronization gap without coupling, its interval at the level of the claims", "nat"),
    "order_claimed": ("Kendall's tau-b without coupling, its interval at the level of the claims", "1"),
    "gap_draws": ("synchronization gap without coupling of resampled pairs", "nat"),
    "draw": ("index of the bootstrap draw", "1"),
    "theory_tau": ("commitment level of a band, exact denoiser of the data's covariance", "nat"),
    "theory_gap": ("synchronization gap, exact denoiser of the data's covariance", "nat"),
    "theory_order": ("Kendall's tau-b, exact denoiser of the data's covariance", "1"),
    "variance": ("variance of the data by principal component within classes", "1"),
    "share": ("share of the component that lies in the band", "1"),
}


def analyse(measured: Measured[SpectrumConfig]) -> xr.Dataset:
    """Estimates with 95 % intervals over pairs, and the theory of the data."""
    network, data = measured.load("network"), measured.load("data")
    ell, seed = measured.clock.log_snr, measured.config.seed

    def estimates(energy, inner):
        found = commitment_of(energy, ell, inner=inner)
        whole = commitment_of(energy, ell)
        values = {"tau": found.tau, "decided": found.decided, "gap": found.gap, "gap_by_energy": whole.gap}
        return {**values, "order": order(found.tau)}

    with jax.enable_x64(True):
        values = (network.energy.values, network.projection.values)
        point, draws = bootstrap(estimates, values, pair_draws(seed, network.sizes["pair"]), 1)
        energy, inner = exact_statistics(np.ones(1), data.variance.values, data.share.values, measured.clock)
        theory = commitment_of(energy, ell, inner=inner)
    dims = {"tau": ("coupling", "band"), "decided": ("coupling", "band")}
    found = {name: with_interval(value, draws[name]) for name, value in point.items()}
    level = family_level(CLAIMS)
    claimed = {f"{name}_claimed": with_interval(point[name][0], draws[name][:, 0], level) for name in ("gap", "order")}
    return xr.Dataset(
        {
            **{name: (("bound",), values) for name, values in claimed.items()},
            **{name: ((*dims.get(name, ("coupling",)), "bound"), values) for name, values in found.items()},
            "gap_draws": ("draw", draws["gap"][:, 0]),
            "theory_tau": ("band", theory.tau[0]),
            "theory_gap": ((), theory.gap[0]),
            "theory_order": ((), order(theory.tau[0])),
        },
        coords={
            "bound": ["estimate", "low", "high"],
            **{name: network[name] for name in ("coupling", "band", "radius", "count")},
        },
        attrs={
            "transformation": data.attrs["transformation"],
            "architecture": getattr(measured.model, "architecture", "dit"),
            "low_band": LOW,
            "high_band": network.sizes["band"] + HIGH,
            "pairs": network.sizes["pair"],
        },
    )
