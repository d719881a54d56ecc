"""Replicas that are coupled up to a sampler step and free afterwards, or free first and coupled afterwards
(docs/theory.md, section 10.3).

All arms of a pair run in one batch from the same noise, as gates by step. What is stored is the difference of the final
images, by DCT coefficient, so that bands and shuffled bands are made of the same measurement.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.attention import symmetric_gate
from dit_jax.covariance import load_covariance
from dit_jax.diffusion import Denoiser, DenoiserOutput
from dit_jax.model import DiT
from dit_jax.replicas import CoupledDenoiser, run_pairs
from experiments.frame.bench import Bench, Variables, one_of
from experiments.frame.eigenmodes import Eigenmodes, eigenmodes
from experiments.frame.exact import covariance_group
from experiments.frame.instrument import coupled_wiener, one_pass
from experiments.frame.programs import Setup
from experiments.frame.settings import GateKind
from experiments.frame.steps import spaced_steps
from experiments.frame.subject import model_folder
from experiments.studies.release.settings import ORDERS, ReleaseConfig
from ou_theory.clock import Clock
from ou_theory.modes import band_mean, pair_modes


def release_steps(clock: Clock, count: int) -> np.ndarray:
    """Steps at which the phases change, increasing: those nearest to `count` evenly spaced log-SNRs of the estimator's
    window, and 0 and n, at which one of the two phases is empty."""
    return np.unique([0, *spaced_steps(clock, count), len(clock)])


def schedule(steps: int, couplings: tuple[float, ...], releases: np.ndarray) -> np.ndarray:
    """Coupling (G, 2, S, n) by coupling, order of phases (`ORDERS`), step of the change, and sampler step."""
    before = np.arange(steps) < np.asarray(releases)[:, None]
    return np.asarray(couplings, np.float64)[:, None, None, None] * np.stack([before, ~before])


def stepwise_wiener(variance: jax.Array, clock: Clock, kind: GateKind) -> CoupledDenoiser:
    """`coupled_wiener` under gates by step, (n, 1, N, R, R)."""
    of_gate = coupled_wiener(variance, clock, kind)

    def coupled(gate: jax.Array) -> Denoiser:
        def denoise(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
            return of_gate(gate[step, 0])(x, step, labels)

        return denoise

    return coupled


def _arms(setup: Setup, coupled: CoupledDenoiser, gates, pairs, labels) -> dict[str, jax.Array]:
    bands = setup.bands

    def observe(step, x, denoised):  # of the first arm, which is never coupled
        return x[:, 0], pair_modes(denoised[:, 0])[1]

    ends, (states, uncoupled) = run_pairs(
        coupled,
        setup.clock,
        gates,
        pairs,
        labels,
        setup.image_shape,
        seed=setup.seed,
        sampler=setup.sampler,
        observe=observe,
    )
    return {
        "energy": jnp.square(pair_modes(ends)[1]).mean(-1).swapaxes(0, 1),
        "uncoupled_energy": band_mean(jnp.square(uncoupled), bands).swapaxes(0, 1),
        "uncoupled_projection": band_mean(uncoupled * uncoupled[-1], bands).swapaxes(0, 1),
        "states": states,
    }


def _network_arms(setup: Setup, model: DiT, *args):
    return _arms(setup, setup.coupled(model), *args)


def _exact_arms(setup: Setup, variance: jax.Array, *args):
    return _arms(setup, stepwise_wiener(variance, setup.clock, setup.gate_kind), *args)


def _gains(setup: Setup, model: DiT, modes: Eigenmodes, *args):
    return one_pass(setup.coupled(model), setup.clock, modes, *args)


class ReleaseInstrument:
    """The measurements, compiled once for all releases and couplings."""

    def __init__(self, bench: Bench[ReleaseConfig]):
        self.bench, self.config = bench, bench.config
        self.releases = release_steps(bench.clock, self.config.releases)
        self.gates = schedule(len(bench.clock), self.config.couplings, self.releases)
        self.covariance = load_covariance(model_folder(one_of(self.config.weights)))
        self.modes = eigenmodes(bench.bands, bench.model.in_channels, self.covariance)
        self._network, self._gains = bench.program(_network_arms), bench.program(_gains)
        self._exact = bench.program(_exact_arms)

    def _shaped(self, found: dict[str, Any]) -> dict[str, Any]:
        energy = np.asarray(found["energy"])
        return {**found, "energy": energy.reshape(len(energy), *self.gates.shape[:3], *energy.shape[-2:])}

    def run(self, function, subject, pairs, labels, gates: np.ndarray | None = None) -> dict[str, Any]:
        """A block of pairs in all arms; see `NETWORK`. The uncoupled states (n, 2, P, H, W, C) come with it.

        Args:
          gates: of the shape of `schedule`, in its place.
        """
        gates = self.gates if gates is None else gates
        flat = jnp.asarray(gates.reshape(-1, gates.shape[-1], 1), jnp.float32)
        return self._shaped(dict(function(subject, symmetric_gate(flat), pairs, labels)))

    def network(self, model, pairs, labels, gates: np.ndarray | None = None) -> dict[str, Any]:
        """`run` on a network."""
        return self.run(self._network, model, pairs, labels, gates)

    def exact(self, variance: np.ndarray, pairs, labels) -> dict[str, Any]:
        """`run` on the exact denoiser of Gaussian modes of band variances (B,)."""
        by_coefficient = jnp.asarray(variance, jnp.float32)[self.bench.bands.index]
        return self.run(self._exact, by_coefficient, pairs, labels)

    def gains(self, model, states, labels) -> dict[str, Any]:
        """What one pass makes of the difference of uncoupled states, without coupling and under each coupling."""
        couplings = jnp.asarray([0.0, *self.config.couplings], jnp.float32)
        found = self._gains(model, self.modes, couplings, states, labels)
        return {
            "mode_energy": found["energy"].swapaxes(0, 1),
            "mode_product": found["product"].swapaxes(0, 1),
            "mode_state": found["state"],
        }


_ARMS = ("coupling", "order", "release", "row", "column")
_MODES = ("gain_coupling", "step", "mode")
ENDS: Variables = {"energy": (_ARMS, "mean square over channels of the final images' difference, by coefficient")}
NETWORK: Variables = {
    **ENDS,
    "uncoupled_energy": (("step", "band"), "mean square per coefficient of the uncoupled denoised difference"),
    "uncoupled_projection": (("step", "band"), "its inner product per coefficient with its end"),
    "mode_energy": (_MODES, "mean square of the difference after one pass from the uncoupled state"),
    "mode_product": (_MODES, "its inner product with the state's difference, y = x / sqrt(ab)"),
    "mode_state": (("step", "mode"), "mean square of the state's difference"),
}


def measure(bench: Bench[ReleaseConfig]) -> None:
    """Fills ``network``, ``untrained``, ``exact`` (the exact denoiser of the network's own variance in each band) and,
    if it is known what covariance the training data have, ``data``."""
    config, instrument = bench.config, ReleaseInstrument(bench)
    size, modes = bench.model.input_size, instrument.modes
    coords: dict[str, Any] = {
        "coupling": list(config.couplings),
        "order": list(ORDERS),
        "release": instrument.releases,
        "row": np.arange(size),
        "column": np.arange(size),
    }
    groups = {
        "gain_coupling": [0.0, *config.couplings],
        "mode": np.arange(len(modes.band)),
        "mode_band": ("mode", modes.band),
        "mode_count": ("mode", modes.count),
    }

    def on_network(pairs, labels):
        found = instrument.network(bench.network, pairs, labels)
        states = found.pop("states")
        return {**found, **instrument.gains(bench.network, states, labels)}

    def ends(function, subject):
        return lambda pairs, labels: {"energy": function(subject(), pairs, labels)["energy"]}

    network = bench.measure("network", NETWORK, {**coords, **groups}, config.pairs, on_network)
    bench.measure("untrained", ENDS, coords, config.untrained_pairs, ends(instrument.network, lambda: bench.untrained))
    variance = network.uncoupled_energy.isel(step=-1).mean("pair").values.astype(np.float64)
    bench.measure("exact", ENDS, coords, config.pairs, ends(instrument.exact, lambda: variance), of_all=True)
    if (covariance := instrument.covariance) is not None:
        bench.whole("data", lambda: covariance_group(covariance))
