"""Where in depth do bands commit? The residual stream after every block, read in four ways by one estimator.

*raw*: energies of the common and the difference mode over the token grid. *readout*: the final layer applied to the
stream, made into a denoised image. *scaled*: what share of the pair's final outcome that image explains up to one
scalar. *probe*: what share of it is linearly decodable from the stream, fitted on other pairs. See docs/theory.md,
section 8.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.model import DiT
from dit_jax.objective import denoised_at
from dit_jax.replicas import run_pairs
from experiments.frame.bench import Bench, Variables
from experiments.frame.instrument import shuffled_bands, stream_modes, token_bands
from experiments.frame.programs import Setup
from experiments.studies.depth.probe import Probe
from experiments.studies.depth.settings import FOLDS, DepthConfig
from ou_theory.modes import BandWeights, band_mean, pair_modes


def _run(setup: Setup, model: DiT, shuffled: BandWeights, shuffled_tokens: BandWeights, couplings, pairs, labels):
    clock, bands = setup.clock, setup.bands
    tokens = token_bands(setup.model.input_size // setup.model.patch_size)
    shape = setup.image_shape

    def raw(stream):  # (2, N, T, D) -> (N, B', 3): common, difference, difference in shuffled bands
        common, difference = (jnp.square(mode) for mode in stream_modes(stream))
        parts = (common, tokens), (difference, tokens), (difference, shuffled_tokens)
        return jnp.stack([band_mean(squares, bands) for squares, bands in parts], -1)

    def tap(layer, activations):
        own = setup.own(activations)
        out = model.readout(activations["resid_pre"], activations["conditioning"])[..., : shape[-1]]
        return {"before": raw(own["resid_pre"]), "after": raw(own["resid_post"]), "readout": setup.guided(out)}

    def observe(step, x, denoised, taps):
        def to_grid(readout):  # (R, P * C, ...) -> (R, C, P, ...)
            return readout.reshape(2, x.shape[2], x.shape[1], *readout.shape[2:]).swapaxes(1, 2)

        def difference(readout):  # (C, P, B) twice
            out = to_grid(readout).astype(x.dtype)
            squares = jnp.square(pair_modes(denoised_at(clock, step, x, out, model.config.prediction))[1])
            return jnp.stack([band_mean(squares, bands), band_mean(squares, shuffled)], -1)

        end = jnp.square(pair_modes(denoised)[1])
        end = jnp.stack([band_mean(end, bands), band_mean(end, shuffled)], -1)
        stream = jnp.concatenate([taps["before"][:1], taps["after"]])
        stream = stream.reshape(stream.shape[0], x.shape[2], x.shape[1], *stream.shape[2:])
        return {
            "raw": stream.swapaxes(1, 2),
            "readout": jnp.concatenate([jax.lax.map(difference, taps["readout"]), end[None]]),
        }

    _, kept = run_pairs(
        setup.coupled(model, tap=tap),
        clock,
        couplings,
        pairs,
        labels,
        shape,
        seed=setup.seed,
        sampler=setup.sampler,
        observe=observe,
    )
    # (K, layer, C, P, band, kind) -> (P, C, layer, K, band, kind)
    found = {name: jnp.transpose(value, (3, 2, 1, 0, 4, 5)) for name, value in kept.items()}
    return {
        "raw": found["raw"][..., :2],
        "raw_shuffled": found["raw"][..., 2],
        "readout": found["readout"][..., 0],
        "readout_shuffled": found["readout"][..., 1],
    }


class DepthInstrument:
    """The measurements, compiled once per network shape."""

    def __init__(self, bench: Bench[DepthConfig]):
        seed, self.config = bench.config.seed, bench.config
        self.tokens = token_bands(bench.model.input_size // bench.model.patch_size)
        self.shuffled = shuffled_bands(bench.bands, seed).weights, shuffled_bands(self.tokens, seed).weights
        self._energies = bench.program(_run)

    def energies(self, model: DiT, pairs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Energies of a block of pairs, with pairs in front; see `VARIABLES`."""
        couplings = jnp.asarray(self.config.couplings, jnp.float32)
        return self._energies(model, *self.shuffled, couplings, pairs, labels)


VARIABLES: Variables = {
    "raw": (
        ("coupling", "layer", "step", "token_band", "parity"),
        "mean square per token coefficient and feature of the residual stream's mode",
    ),
    "raw_shuffled": (
        ("coupling", "layer", "step", "token_band"),
        "the same of the difference mode, coefficients in random bands",
    ),
    "readout": (
        ("coupling", "layer", "step", "band"),
        "mean square per DCT coefficient of the difference of what the final layer reads off the stream, denoised",
    ),
    "readout_shuffled": (("coupling", "layer", "step", "band"), "the same, coefficients in random bands"),
}


def probed(config: DepthConfig, group: str) -> int:
    """Pairs of the probe beside a group: fewer of the untrained network."""
    return config.probe_pairs if group == "network" else max(2 * FOLDS, config.probe_pairs // 3)


def measure(bench: Bench[DepthConfig]) -> None:
    """Fills ``network`` and ``untrained``, and, where there is a probe, ``probe_network`` and ``probe_untrained``."""
    config, instrument = bench.config, DepthInstrument(bench)
    probe = Probe(bench, config.probe_levels, config.probe_features)
    coords = {
        "coupling": np.asarray(config.couplings, np.float64),
        "layer": np.arange(bench.model.depth + 1),
        "parity": ["common", "difference"],
        "token_band": np.arange(len(instrument.tokens)),
        "token_radius": ("token_band", instrument.tokens.radius),
    }
    couplings = (0.0, config.couplings[-1])  # of the probe
    for name, pairs in (("network", config.pairs), ("untrained", config.untrained_pairs)):

        def on_network(pairs, labels, name=name):
            return instrument.energies(getattr(bench, name), pairs, labels)

        bench.measure(name, VARIABLES, coords, pairs, on_network)
        if config.probe_pairs:
            few = probed(config, name)
            group = f"probe_{name}"
            bench.whole(
                group,
                lambda name=name, few=few, group=group: probe.scores(getattr(bench, name), group, couplings, few),
            )
