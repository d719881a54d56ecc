"""Curves of what still differs at the end, and the levels of commitment by release (docs/theory.md, section 10.3)."""

from typing import Any

import jax
import numpy as np
import xarray as xr

from experiments.frame.draws import bootstrap, both, mean_and_draws, packed, pair_draws
from experiments.frame.eigenmodes import band_share
from experiments.frame.estimator import HIGH, LOW, commitment_of
from experiments.frame.gains import regression_gains
from experiments.frame.measured import Definitions, Measured
from experiments.frame.streams import numpy_stream
from experiments.studies.release.measure import schedule
from experiments.studies.release.settings import ORDERS, ReleaseConfig
from experiments.studies.release.theory import exact_ends, measured_ends
from ou_theory.bootstrap import family_level
from ou_theory.clock import Clock

SHUFFLES = 99  # random assignments of coefficients to bands
CLAIMS = 2
LEAST_TAKEN = 0.1  # of the uncoupled energy; where coupling takes less, its share early and late cannot be told
NOTHING = 1e-9  # of the uncoupled energy: less is rounding, of which no ratio is taken
MEASURED = ("network", "untrained", "exact")
EXACT_THEORY, GAIN = "exact, theory", "regression gain"
OF_DATA = {"data": "data covariance", "sample": "sample variance"}  # the exact denoiser beside the network

DEFINITIONS: Definitions = {
    "left": ("energy of the final images' difference over that without coupling", "1"),
    "remaining": ("what is left of the difference that coupling takes when it always acts", "1"),
    "taken": ("share of the uncoupled energy that coupling takes when it always acts; negative where it adds", "1"),
    "applies": ("1 where coupling is known to take enough from the band, so that the criterion applies", "1"),
    "level": (
        "level at which the phases may change so that the share `threshold` of what coupling takes is left",
        "nat",
    ),
    "release_step": ("sampler step of that level", "1"),
    "alike_level": ("level at which the share `threshold` of the uncoupled energy is left", "nat"),
    "gap": ("level of the highest band less that of the lowest above DC", "nat"),
    "gap_steps": ("the same in sampler steps", "1"),
    "common_gap": ("level of the last band to which the criterion applies on the network, less the lowest's", "nat"),
    "common_gap_steps": ("the same in sampler steps", "1"),
    "common_claimed": ("common_gap of the first coupling, coupled first, at the level of the claims", "nat"),
    "last_band": ("last band to which the criterion applies on the network, -1 if there are not two", "1"),
    "product": ("log of the energy left by both orders, less that left by coupling always; mean over releases", "1"),
    "product_claimed": ("product of the first coupling on the network, at the level of the claims", "1"),
    "shuffled_gap": ("common_gap of the network, coefficients assigned to bands at random", "nat"),
    "tau": ("commitment level by the aligned energy of the uncoupled run", "nat"),
    "tau_gap": ("synchronization gap of the uncoupled run, from the lowest band above DC to the highest", "nat"),
    "tau_common_gap": ("synchronization gap of the uncoupled run between the bands of common_gap", "nat"),
    "order": ("which of the two phases comes first", "1"),
    "release": ("sampler step from which on the second phase acts", "1"),
    "release_ell": ("log-SNR of that step; of the end, that of the last step and one step's width", "nat"),
    "gain_coupling": ("coupling g under which the gain is measured, 0 is none", "1"),
    "shuffle": ("random assignment of coefficients to bands", "1"),
}


def levels_of(clock: Clock) -> np.ndarray:
    """Log-SNR (n + 1,) of the sampler's steps and of its end, which is given one more step of the last width."""
    ell = clock.log_snr
    return np.append(ell, 2 * ell[-1] - ell[-2])


def last_rise(rising: np.ndarray, levels: np.ndarray, threshold: float) -> np.ndarray:
    """Level from which on a curve (..., S, B) stays at or above a threshold, linear between levels (S,): (..., B). NaN
    where it ends below, or is never below."""
    below = np.moveaxis(~(rising >= threshold), -2, -1)
    count = below.shape[-1]
    last = count - 1 - np.argmax(below[..., ::-1], -1)
    known = below.any(-1) & (last < count - 1)
    at = np.minimum(last, count - 2)[..., None, :]
    low, high = (np.take_along_axis(rising, at + i, -2)[..., 0, :] for i in (0, 1))
    at = at[..., 0, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        part = (threshold - low) / (high - low)
    return np.where(known, levels[at] + part * (levels[at + 1] - levels[at]), np.nan)


def readings(left: np.ndarray, levels: np.ndarray, threshold: float) -> dict[str, np.ndarray]:
    """What the curves say of every band.

    Args:
      left: (..., G, 2, S, B) energy of the final difference over that without coupling, by coupling, order of the
        phases, and step of the change, from never to always.
      levels: (S,) of the changes.

    Returns:
      remaining (..., G, 2, S, B): `left`, with what coupling always leaves taken as 0 and no coupling as 1.
      level, alike_level (..., G, 2, B): where `remaining`, and where `left`, passes the threshold.
      taken (..., G, B); product (..., G, B), mean over the inner changes.
    """
    always = np.stack([left[..., 0, -1, :], left[..., 1, 0, :]], -2)[..., None, :]
    never = np.stack([left[..., 0, 0, :], left[..., 1, -1, :]], -2)[..., None, :]
    with np.errstate(invalid="ignore", divide="ignore"):
        remaining = (left - always) / (never - always)
        both_orders = np.log(left[..., 0, 1:-1, :] * left[..., 1, 1:-1, :] / left[..., 0, -1:, :]).mean(-2)
    both_orders = np.where(left[..., 0, -1, :] > NOTHING, both_orders, np.nan)
    found = {"remaining": remaining, "taken": 1 - always[..., 0, 0, :], "product": both_orders}
    for name, curve in (("level", remaining), ("alike_level", left)):
        falls = last_rise(1 - curve[..., 0, :, :], levels, 1 - threshold)
        rises = last_rise(curve[..., 1, :, :], levels, threshold)
        found[name] = np.stack([falls, rises], -2)
    return found


def by_band(energy: np.ndarray, index: np.ndarray, bands: int) -> np.ndarray:
    """Mean over the coefficients of each band: (..., H, W) -> (..., bands); `index` (H, W) of each coefficient."""
    member = (index[..., None] == np.arange(bands)).astype(np.float64)
    return np.tensordot(energy, member / member.sum((0, 1)), 2)


def analyse(measured: Measured[ReleaseConfig]) -> xr.Dataset:
    """Curves and levels of every source, with 95 % intervals over pairs."""
    with jax.enable_x64(True):
        return _analyse(measured)


def _analyse(measured: Measured[ReleaseConfig]) -> xr.Dataset:
    config, clock, bands = measured.config, measured.clock, measured.bands
    sources = measured.sources(*MEASURED)
    network = sources["network"]
    releases = network.release.values
    along = levels_of(clock)
    levels = along[releases]
    level = family_level(CLAIMS)
    weights = pair_draws(config.seed, network.sizes["pair"])
    ends = {}  # source -> energies (1 + draws or 1, G, 2, S, B)
    for name, group in sources.items():
        drawn = weights if name != "untrained" else pair_draws(config.seed, group.sizes["pair"])
        energy = by_band(np.asarray(group.energy.values, np.float64), bands.index, len(bands))
        ends[name] = mean_and_draws(energy, drawn)
    ends |= _theories(measured, network, ends, weights)

    found = {name: readings(each / each[:, :1, :1, :1], levels, config.threshold) for name, each in ends.items()}
    left = {name: each / each[:, :1, :1, :1] for name, each in ends.items()}
    data: dict[str, Any] = {}

    def add(name: str, values: dict[str, np.ndarray], dims: tuple[str, ...]) -> None:
        """Stores (1 + draws, ...) by source with intervals; what has no draws has none."""
        data[name] = (("source", *dims, "bound"), np.stack([_packed(each) for each in values.values()]))

    grid = ("coupling", "order", "release", "band")
    add("left", left, grid)
    add("remaining", {name: each["remaining"] for name, each in found.items()}, grid)
    add("taken", {name: each["taken"] for name, each in found.items()}, ("coupling", "band"))
    add("product", {name: each["product"] for name, each in found.items()}, ("coupling", "band"))
    taken = data["taken"][1]
    bound = np.where(np.isfinite(taken[..., 1]), taken[..., 1], taken[..., 0])
    applies = bound > LEAST_TAKEN
    data["applies"] = (("source", "coupling", "band"), applies.astype(np.int8))
    last = np.array([_last_band(each) for each in applies[0]])
    data["last_band"] = ("coupling", last)

    known = {}
    for i, (name, each) in enumerate(found.items()):
        known[name] = np.where(applies[i][:, None], each["level"], np.nan)
    steps = {name: np.interp(each, along, np.arange(along.size)) for name, each in known.items()}
    add("level", known, ("coupling", "order", "band"))
    add("release_step", steps, ("coupling", "order", "band"))
    add("alike_level", {name: each["alike_level"] for name, each in found.items()}, ("coupling", "order", "band"))
    for suffix, values in (("", known), ("_steps", steps)):
        ends_of = ("coupling", "order")
        add(f"gap{suffix}", {name: each[..., HIGH] - each[..., LOW] for name, each in values.items()}, ends_of)
        add(f"common_gap{suffix}", {name: _common(each, last) for name, each in values.items()}, ends_of)
    claimed = [_packed(_common(each, last)[:, 0, 0], level) for each in known.values()]
    data["common_claimed"] = (("source", "bound"), np.stack(claimed))
    inner = found["network"]["product"][:, 0, LOW:]
    data["product_claimed"] = (("claimed_band", "bound"), _packed(inner, family_level(CLAIMS * inner.shape[-1])))
    data["shuffled_gap"] = ("shuffle", _shuffled(measured, network, levels, int(last[0])))

    energy, inner = (network[f"uncoupled_{name}"].values for name in ("energy", "projection"))

    def uncoupled(energy, inner):
        at = commitment_of(
            energy[..., None, :, :], clock.log_snr, inner=inner[..., None, :, :], stochastic=config.eta > 0
        )
        return {"tau": at.tau[..., 0, :], "gap": at.gap[..., 0]}

    tau = both(bootstrap(uncoupled, (energy, inner), weights))
    data["tau"] = (("band", "bound"), packed(tau["tau"]))
    data["tau_gap"] = ("bound", packed(tau["gap"]))
    common = np.stack([_common(tau["tau"][:, None, None], [b])[:, 0, 0] for b in last], -1)
    data["tau_common_gap"] = (("coupling", "bound"), packed(common))
    return xr.Dataset(
        data,
        coords={
            "source": list(found),
            "coupling": list(config.couplings),
            "order": list(ORDERS),
            "release": releases,
            "release_ell": ("release", levels),
            "claimed_band": ("claimed_band", np.arange(LOW, len(bands)), {"long_name": "band above DC", "units": "1"}),
            "bound": ["estimate", "low", "high"],
            **{name: network[name] for name in ("band", "radius", "count", "step", "ell")},
        },
        attrs={
            "pairs": network.sizes["pair"],
            "untrained_pairs": sources["untrained"].sizes["pair"],
            "claim_level": level,
            "threshold": config.threshold,
            "shuffles": SHUFFLES,
        },
    )


def _packed(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """`packed`, with NaN for the interval of what has no draws."""
    if len(values) > 1:
        return packed(values, level)
    nothing = np.full_like(values[0], np.nan)
    return np.stack([values[0], nothing, nothing], -1)


def _last_band(applies: np.ndarray) -> int:
    """The last band to which the criterion applies, -1 unless it applies to the lowest above DC and to another."""
    inside = np.flatnonzero(applies[LOW:]) + LOW
    return int(inside[-1]) if inside.size > 1 and inside[0] == LOW else -1


def _common(level: np.ndarray, last: Any) -> np.ndarray:
    """Gaps (N, G, 2) between the lowest band above DC and band `last` (G,) of each coupling; NaN where that is -1."""
    gaps = [level[:, i, :, b] - level[:, i, :, LOW] + (0 if b > 0 else np.nan) for i, b in enumerate(last)]
    return np.stack(gaps, 1)


def _theories(measured, network, ends, weights) -> dict[str, np.ndarray]:
    """Energies (1 + draws or 1, G, 2, S, B) by the recursions: of the exact denoiser that was measured, of an exact
    denoiser of the data, and under the network's own gain."""
    config, clock = measured.config, measured.clock
    gates = schedule(len(clock), config.couplings, network.release.values)
    shape, flat = gates.shape[:3], gates.reshape(-1, gates.shape[-1])

    def exact(variance, share):
        found = exact_ends(flat, variance, share, clock, config.eta, config.gate_kind)
        return found.reshape(*found.shape[:-2], *shape, found.shape[-1])

    variance = np.asarray(network.uncoupled_energy.isel(step=-1).values, np.float64)
    of_bands = np.eye(variance.shape[-1])
    found = {EXACT_THEORY: exact(variance.mean(0)[None], of_bands)}
    if measured.run.holds("data"):
        data = measured.load("data")
        found[OF_DATA["data"]] = exact(data.variance.values[None], data.share.values)
    else:
        found[OF_DATA["sample"]] = found[EXACT_THEORY]
    active = np.concatenate([[0.0], config.couplings])
    active = np.argmin(np.abs(flat[..., None] - active), -1)
    share = band_share(network.mode_band.values, network.mode_count.values)

    def along(energy, product, state):
        each = measured_ends(regression_gains(energy, product, state), active, share, clock, config.eta)
        return {"ends": each.reshape(len(each), *shape, each.shape[-1])}

    values = tuple(network[f"mode_{name}"].values for name in ("energy", "product", "state"))
    numbers = flat.size * share.shape[0]
    found[GAIN] = both(bootstrap(along, values, weights, numbers=numbers))["ends"]
    return found


def _shuffled(measured, network, levels: np.ndarray, last: int) -> np.ndarray:
    """`common_gap` of the first coupling, coupled first, of random assignments of coefficients to bands; without
    intervals."""
    bands, rng = measured.bands, numpy_stream(measured.config.seed, "shuffles")
    energy = np.asarray(network.energy.values[:, :1], np.float64).mean(0)[None]
    gaps = []
    for _ in range(SHUFFLES):
        index = rng.permutation(bands.index.ravel()).reshape(bands.index.shape)
        each = by_band(energy, index, len(bands))
        found = readings(each / each[:, :1, :1, :1], levels, measured.config.threshold)
        gaps.append(_common(found["level"], [last])[0, 0, 0])
    return np.array(gaps)
