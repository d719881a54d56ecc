"""From stored measurements to estimates: commitment levels, decided fractions, gaps, with intervals, beside the theory.

One estimator (`ou_theory.estimator`) serves the network, its controls and the exact recursions. Pairs are the unit of
resampling: one draw of pairs serves all bands, steps and couplings of a source.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from jax.typing import ArrayLike

from ou_theory import estimator as oc
from ou_theory.attention import rho
from ou_theory.bootstrap import basic_interval, resample
from ou_theory.clock import Clock
from ou_theory.estimator import Commitment
from ou_theory.gain_model import wiener_gain
from ou_theory.recursion import recursion_energy

WINDOW_START = -6.0  # log-SNR at which the window of the estimator opens, unless guarded
FLOOR_LIMIT = 0.1  # largest Q there of a band whose own signal is still below it
WEAK = 0.002  # decided fraction under which a commitment level rests on too little
DRAWS = 1000
LOW, HIGH = 1, -1  # bands of the gap: the lowest annulus (band 0 is DC) and the highest


@dataclass(frozen=True)
class Estimates:
    """Point estimates of one source over couplings, as arrays (..., C, B), (..., C), (..., C, K, B)."""

    tau: np.ndarray
    decided: np.ndarray
    gap: np.ndarray
    latched_gap: np.ndarray
    relative_energy: np.ndarray


def estimate(energy: ArrayLike, ell: np.ndarray, start: float) -> Estimates:
    """The estimator on mean difference energies (..., C, K, B), whose first coupling is 0."""
    energy = jnp.asarray(energy)
    q = oc.relative_energy(energy, energy[..., :1, -1, :])
    found: Commitment = oc.commitment(q, jnp.asarray(ell), start)
    return Estimates(
        tau=np.asarray(found.level),
        decided=np.asarray(found.decided),
        gap=np.asarray(oc.gap(found.level, LOW, HIGH)),
        latched_gap=np.asarray(oc.gap(found.latched, LOW, HIGH)),
        relative_energy=np.asarray(q),
    )


def guarded_start(q: np.ndarray, variance: np.ndarray, ell: np.ndarray, start: float = WINDOW_START) -> float:
    """The level at which the estimator's window opens: `start`, or the first later one where noise is low enough.

    A level is noisy when a band whose own signal is still under the limit, ``S exp(ell) < 0.1``, shows more than the
    limit. The window never opens after the strongest band has begun to decide: if no level up to there is clean,
    `start` stands, and the noise floor, which is reported by band, tells.

    Args:
      q: (K, B) relative energy at zero coupling.
      variance: (B,) data variance of the bands.
      ell: (K,) levels.
    """
    for k in np.flatnonzero(ell >= start):
        signal = variance * np.exp(ell[k])
        if signal.max() >= FLOOR_LIMIT:
            break
        if q[k].max() < FLOOR_LIMIT:
            return start if k == 0 or ell[k - 1] < start else float(ell[k])
    return start


def theory_energy(rho_gain: ArrayLike, band_gain: ArrayLike, clock: Clock, eta: float) -> jax.Array:
    """Exact energies (..., C, K, B) of the denoised difference under per-step gains ``rho * W``."""
    gain = jnp.asarray(rho_gain) * jnp.asarray(band_gain)
    start = jnp.full(gain.shape[:-2] + gain.shape[-1:], 1 / clock.alpha_bar[0])
    return recursion_energy(gain, jnp.asarray(clock.sigma), start, eta=eta)


def ideal_energy(couplings: np.ndarray, variance: np.ndarray, clock: Clock, eta: float) -> jax.Array:
    """`theory_energy` of the ideal model: Wiener gains of band variances (..., B), and the gain (1 - g) / (1 + g)."""
    band_gain = wiener_gain(jnp.asarray(variance)[..., None, None, :], jnp.asarray(clock.sigma**2)[:, None])
    return theory_energy(np.asarray(rho(jnp.asarray(couplings)))[:, None, None], band_gain, clock, eta)


def measured_gains(one_pass: np.ndarray, uncoupled: np.ndarray, state: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one-pass gain rho (..., C, K, B) and the uncoupled gain W (..., 1, K, B) from mean energies.

    Args:
      one_pass: (..., C, K, B) difference energies after one denoising of the same inputs.
      uncoupled: (..., K, B) the same at coupling 0.
      state: (..., K, B) difference energies of those inputs in the rescaled frame.
    """
    uncoupled = uncoupled[..., None, :, :]
    return np.sqrt(one_pass / uncoupled), np.sqrt(uncoupled / state[..., None, :, :])


def analyse(
    clock: Clock,
    network: xr.Dataset,
    untrained: xr.Dataset,
    wiener: xr.Dataset,
    *,
    eta: float,
    seed: int,
    draws: int = DRAWS,
) -> tuple[xr.Dataset, dict[str, dict]]:
    """Everything that figures, report and claims need.

    Args:
      clock: of the run.
      network, untrained, wiener: stored measurements; see `experiments.compare`.
      eta: stochasticity of the recursion: 0 for DDIM, 1 for the ancestral sampler.
      seed: of the resampling.

    Returns:
      the analysis dataset, and the bootstrap draws per source: ``{"network": {"gap": (draws, C), ...}, ...}``.
    """
    with jax.enable_x64(True):
        return _analyse(clock, network, untrained, wiener, eta, seed, draws)


def _analyse(clock, network, untrained, wiener, eta, seed, draws):
    ell = clock.log_snr
    couplings = network.coupling.values
    energy = _difference(network)
    mean = energy.mean(1)
    start = guarded_start(mean[0] / mean[0, -1], mean[0, -1], ell)

    def weights(pairs):
        return np.asarray(resample(seed, pairs, draws), np.float64) / pairs

    def resampled(energy):  # (C, P, K, B) -> (draws, C, K, B)
        return np.tensordot(weights(energy.shape[1]), energy, (1, 1))

    sources: dict[str, Estimates] = {}
    boots: dict[str, Estimates] = {}
    grids: dict[str, np.ndarray] = {}

    def add(name, point, drawn, grid):
        sources[name] = estimate(point, ell, start)
        if drawn is not None:
            boots[name] = estimate(drawn, ell, start)
        grids[name] = grid

    add("network", mean, resampled(energy), couplings)

    gain_pairs = int(np.isfinite(network.one_pass_energy.isel(coupling=0, step=0, band=0)).sum())
    one_pass = network.one_pass_energy.values[:, :gain_pairs]
    state = network.state_energy.values[:gain_pairs]
    part = weights(gain_pairs)  # a draw of all pairs might hold none of these
    gain, band_gain = measured_gains(one_pass.mean(1), one_pass[0].mean(0), state.mean(0))
    gain_draws, band_gain_draws = measured_gains(
        np.tensordot(part, one_pass, (1, 1)),
        np.tensordot(part, one_pass[0], (1, 0)),
        np.tensordot(part, state, (1, 0)),
    )
    add(
        "measured gain",
        theory_energy(gain, band_gain, clock, eta),
        theory_energy(gain_draws, band_gain_draws, clock, eta),
        couplings,
    )
    variance, drawn_variance = mean[0, -1], resampled(energy[:1, :, -1:])[:, 0, 0]
    add(
        "ideal gain",
        ideal_energy(couplings, variance, clock, eta),
        ideal_energy(couplings, drawn_variance, clock, eta),
        couplings,
    )
    blank = _difference(untrained)
    add(
        "untrained",
        blank.mean(1),
        resampled(blank),
        untrained.coupling.values,
    )
    exact = _difference(wiener)
    add("wiener", exact.mean(1), resampled(exact), wiener.coupling.values)
    add(
        "wiener theory",
        ideal_energy(wiener.coupling.values, wiener.variance.values, clock, eta),
        None,
        wiener.coupling.values,
    )
    shuffled = network.energy_shuffled.values
    order_control = estimate(resampled(shuffled), ell, start)

    dataset = _dataset(clock, network, sources, boots, grids)
    dataset["gain"] = (
        ("source", "coupling", "step", "band"),
        _full(dataset, "network", gain, (len(ell), mean.shape[-1])),
    )
    inner = network.projection.values
    floors, projected = {}, {}
    for name, data, measured in (
        ("network", inner, energy),
        ("untrained", untrained.projection.values, blank),
    ):
        aligned = np.asarray(oc.projection(data[0].mean(0), measured[0, :, -1].mean(0)))
        opening = int(np.searchsorted(ell, start))
        share = oc.aligned_share(aligned, stochastic=eta > 0)
        floors[name] = np.asarray(oc.noise_floor(sources[name].relative_energy[0], aligned, stochastic=eta > 0))[
            opening
        ]
        projected[name] = np.asarray(oc.crossing(share, ell, 0.5))
    for variable, values in (("floor", floors), ("projection_level", projected)):
        table = np.full((dataset.sizes["source"], dataset.sizes["band"]), np.nan)
        for name, row in values.items():
            table[list(dataset.source.values).index(name)] = row
        dataset[variable] = (("source", "band"), table)
    dataset.attrs.update(
        low_band=LOW,
        high_band=dataset.sizes["band"] + HIGH,
        ell_start=float(start),
        steps=len(clock),
        pairs=network.sizes["pair"],
        gain_pairs=gain_pairs,
        untrained_pairs=untrained.sizes["pair"],
        draws=draws,
        floor_limit=FLOOR_LIMIT,
    )
    drawn = {name: vars(found) for name, found in boots.items()}
    drawn["shuffled bands"] = vars(order_control)
    drawn["shuffled bands"]["point"] = vars(estimate(shuffled.mean(1), ell, start))
    return dataset, drawn


def _difference(dataset: xr.Dataset) -> np.ndarray:
    return np.asarray(dataset.energy.sel(parity="difference").values, np.float64)


def _full(dataset: xr.Dataset, source: str, values: np.ndarray, tail: tuple[int, ...]) -> np.ndarray:
    """`values` (C, ...) of one source in an array over all sources, NaN elsewhere."""
    table = np.full((dataset.sizes["source"], dataset.sizes["coupling"], *tail), np.nan)
    table[list(dataset.source.values).index(source)] = values
    return table


def _dataset(clock: Clock, network: xr.Dataset, sources, boots, grids) -> xr.Dataset:
    couplings = network.coupling.values
    names = list(sources)
    tables: dict[str, np.ndarray] = {}

    def fill(name, grid, variable, values):
        rows = np.searchsorted(couplings, grid)
        table = tables.setdefault(variable, np.full((len(names), len(couplings), *values.shape[1:]), np.nan))
        table[names.index(name), rows] = values

    def steps_between(tau):  # the gap on the sampler's own scale
        step = clock.step(tau)
        return step[..., HIGH] - step[..., LOW]

    for name, point in sources.items():
        grid = grids[name]
        fill(name, grid, "tau", point.tau)
        fill(name, grid, "tau_steps", clock.step(point.tau))
        fill(name, grid, "decided", point.decided)
        fill(name, grid, "gap", point.gap)
        fill(name, grid, "gap_steps", steps_between(point.tau))
        fill(name, grid, "latched_gap", point.latched_gap)
        fill(name, grid, "relative_energy", point.relative_energy)
        if name in boots:
            draw = boots[name]
            pairs = {
                "tau": (point.tau, draw.tau),
                "decided": (point.decided, draw.decided),
                "gap": (point.gap, draw.gap),
                "gap_steps": (steps_between(point.tau), steps_between(draw.tau)),
            }
            for variable, (centre, drawn) in pairs.items():
                fill(name, grid, f"{variable}_interval", np.stack(basic_interval(centre, drawn), -1))
    tail = {
        "tau": ("band",),
        "tau_steps": ("band",),
        "decided": ("band",),
        "relative_energy": ("step", "band"),
    }
    variables = {}
    for variable, table in tables.items():
        base = variable.removesuffix("_interval")
        dims = ("source", "coupling", *tail.get(base, ())) + (("bound",) if variable.endswith("_interval") else ())
        variables[variable] = (dims, table)
    dataset = xr.Dataset(
        variables,
        coords={
            "source": names,
            "coupling": couplings,
            "bound": ["low", "high"],
            **{name: network[name] for name in ("band", "radius", "count", "step", "ell", "timestep")},
        },
    )
    dataset["weak"] = dataset.decided < WEAK
    return dataset


def order(levels: np.ndarray) -> np.ndarray:
    """Kendall's tau-b of commitment levels (..., B) against band order, DC left out; NaN where all levels tie."""
    levels = np.asarray(levels)[..., LOW:]
    first, second = np.triu_indices(levels.shape[-1], 1)
    sign = np.sign(levels[..., second] - levels[..., first])
    untied = np.count_nonzero(sign, axis=-1)
    with np.errstate(invalid="ignore"):
        return sign.sum(-1) / np.sqrt(untied * first.size)
