"""What coupling does to the difference of two replicas inside one pass (docs/theory.md, section 6).

The uncoupled states of a few sampler steps are denoised once under every coupling. In every layer and head, the
difference of the attention output is split exactly into parts that come through values (routing), keys and queries. The
difference of the residual stream is followed through attention and MLP to the denoised image.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.attention import symmetric_gate
from dit_jax.model import Block, DiT, widened
from dit_jax.replicas import run_pairs
from experiments.frame.bench import Bench, Variables
from experiments.frame.instrument import token_bands
from experiments.frame.programs import Setup
from experiments.frame.steps import spaced_steps
from experiments.studies.mechanism.settings import PARTS, PLACES, PRODUCTS, READINGS, SUBLAYERS, MechanismConfig
from experiments.studies.mechanism.split import HeadSplit, split_head
from ou_theory.modes import band_mean, dct2, pair_modes


def open_gates(model: DiT) -> DiT:
    """A copy whose blocks add all of their attention and MLP to the stream, because every adaLN gate gets a bias of 1.
    It serves as a control with random weights whose attention acts; the adaLN gates of `Bench.untrained` are nearly
    closed."""
    copy = nnx.clone(model)
    assert isinstance(copy.blocks, Block)
    assert copy.blocks.adaln.bias is not None
    width = model.config.hidden_size
    bias = copy.blocks.adaln.bias[...]
    for first in (2 * width, 5 * width):  # see `Block`
        bias = bias.at[..., first : first + width].add(1)
    copy.blocks.adaln.bias[...] = bias
    return copy


class _Inside:
    """What the programs do.

    Attributes:
      tokens: bands of the token grid.
      steps: sampler steps that are looked into.
    """

    def __init__(self, setup: Setup, levels: int):
        self.setup = setup
        self.grid = setup.model.input_size // setup.model.patch_size
        self.tokens = token_bands(self.grid)
        self.steps = spaced_steps(setup.clock, levels)

    def states(self, model: DiT, pairs, labels):
        """Uncoupled states (levels, 2, P, H, W, C) along the sampler."""
        setup = self.setup
        _, states = run_pairs(
            setup.coupled(model),
            setup.clock,
            jnp.zeros(1),
            pairs,
            labels,
            setup.image_shape,
            seed=setup.seed,
            sampler=setup.sampler,
            observe=lambda step, x, denoised: x[:, 0],
        )
        return states[self.steps]

    def one_pass(self, model: DiT, couplings, states, labels):
        count, size = couplings.shape[0], labels.shape[0]
        gs = jnp.tile(couplings, size)  # a pair's couplings side by side
        labels = jnp.repeat(labels, count)
        denoise = self.setup.denoiser(model, symmetric_gate(gs), tap=self._tap(model, gs))

        def at_level(inputs):
            step, x = inputs
            x = jnp.repeat(x, count, 1)
            output = denoise(x, step, labels)
            found, writes = output.taps
            embedding = self._difference(widened(model.embed(x.astype(model.config.dtype))))
            final = embedding + sum(write.sum(0) for write in writes.values())
            origin = [band_mean(writes[name] * final, self.tokens) for name in SUBLAYERS]
            denoised = jnp.square(pair_modes(output.denoised)[1])
            return found | {
                "origin": jnp.stack(origin, -2),
                "origin_embedding": band_mean(embedding * final, self.tokens),
                "denoised": band_mean(denoised, self.setup.bands),
            }

        with jax.default_matmul_precision("highest"):
            found = jax.lax.map(at_level, (jnp.asarray(self.steps), states))

        def pairs_in_front(name, value):  # (level, [layer,] P * C, ...) -> (P, C, level, [layer,] ...)
            batch = 2 if "layer" in VARIABLES[name][0] else 1
            value = value.reshape(*value.shape[:batch], size, count, *value.shape[batch + 1 :])
            return jnp.moveaxis(value, (batch, batch + 1), (0, 1))

        return {name: pairs_in_front(name, value) for name, value in found.items()}

    def _difference(self, x: jax.Array) -> jax.Array:
        """Difference mode (..., grid, grid, F) of both replicas' tokens (2, ..., T, F), in DCT over the token grid."""
        return self._modes(x[0] - x[1])

    def _modes(self, difference: jax.Array) -> jax.Array:
        *lead, _, features = difference.shape
        return dct2(difference.reshape(*lead, self.grid, self.grid, features)) * np.sqrt(0.5).item()

    def _tap(self, model: DiT, gs: jax.Array):
        """The tap that returns what is measured in a block, and what its sublayers add to the stream's difference."""
        config, tokens, kind = model.config, self.tokens, self.setup.gate_kind
        assert isinstance(model.blocks, Block)
        kernels = model.blocks.attn.proj.kernel[...].astype(config.dtype)

        def tap(layer, activations):
            activations = self.setup.own(activations)
            stream = [self._difference(widened(activations[f"resid_{at}"])) for at in ("pre", "mid", "post")]
            pre, attention, mlp = stream[0], stream[1] - stream[0], stream[2] - stream[1]
            kernel = widened(kernels[layer]).reshape(config.num_heads, -1, config.hidden_size)
            gate_attn = widened(jnp.split(activations["adaln"], 6, -1)[2])

            def one(inputs):  # a pair at a coupling
                q, k, v, out, g, gate_attn, pre = inputs
                heads = [jnp.moveaxis(x, 2, 0) for x in (q, k, v)]  # (H, 2, T, d)
                split = jax.vmap(lambda q, k, v: split_head(q, k, v, g, kind))(*heads)
                split = HeadSplit(*(self._modes(x.swapaxes(0, 1)) for x in split))  # (part, H, grid, grid, d)
                own = self._modes(jnp.moveaxis(out[0] - out[1], 1, 0))
                pattern = split.exact[1] + split.exact[2]
                write = jnp.einsum("phyxd,hde->phyxe", jnp.stack([split.exact[3], split.alone[3]]), kernel) * gate_attn
                parts = jnp.einsum("phyxd,hde->pyxe", split.exact, kernel) * gate_attn
                # |pre + sum of w|^2 - |pre|^2 = sum of w * (2 pre + sum of w): what each w adds to the square
                sums = 2 * pre + write.sum(1)  # with the coupling and without

                def energy(x):
                    return band_mean(jnp.square(x), tokens)

                def product(x, y):
                    return band_mean(x * y, tokens)

                return {
                    "split_energy": energy(split.exact).mean(1),
                    "split_product": product(split.exact, split.exact[3]).mean(1),
                    "alone_energy": energy(split.alone).mean(1),
                    "first_order_error": energy(split.error).mean(1),
                    "pattern_energy": energy(pattern).mean(0),
                    "cross_energy": energy(split.cross).mean(1),
                    "cross_product": product(split.cross, pattern).mean(1),
                    "closure": jnp.square(split.exact[3] - own).mean(),
                    "head_product": (split.exact * split.exact[3]).mean((-3, -2, -1)).T,
                    "head_alone": jnp.square(split.alone[3]).mean((-3, -2, -1)),
                    "head_write": energy(write[0]),
                    "head_pull": product(write[0], pre),
                    "head_pull_alone": product(write[1], pre),
                    "head_growth": product(write[0], sums[0]),
                    "head_growth_alone": product(write[1], sums[1]),
                    "part_growth": product(parts, sums[0]),
                }

            batch = [jnp.moveaxis(widened(activations[name]), 1, 0) for name in ("q", "k", "v", "head_out")]
            found = jax.lax.map(one, (*batch, gs, gate_attn, pre))
            added = [pre, attention, mlp, stream[2]]
            pairs = (pre * attention, pre * mlp, attention * mlp)
            found["stream_energy"] = jnp.stack([band_mean(jnp.square(x), tokens) for x in added], -2)
            found["stream_product"] = jnp.stack([band_mean(x, tokens) for x in pairs], -2)
            return found, {"attention": attention, "mlp": mlp}

        return tap


def _states(setup: Setup, levels: int, *args):
    return _Inside(setup, levels).states(*args)


def _one_pass(setup: Setup, levels: int, *args):
    return _Inside(setup, levels).one_pass(*args)


class MechanismInstrument:
    """The measurements, compiled once per network shape.

    Attributes:
      tokens: bands of the token grid.
      steps: sampler steps that are looked into.
    """

    def __init__(self, bench: Bench[MechanismConfig]):
        self.config = bench.config
        inside = _Inside(bench.setup, bench.config.levels)
        self.tokens, self.steps = inside.tokens, inside.steps
        self.states = bench.program(_states, bench.config.levels)
        self.one_pass = bench.program(_one_pass, bench.config.levels)

    def measure(self, model: DiT, pairs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Everything of a block of pairs, with pairs in front; see `VARIABLES`."""
        states = self.states(model, pairs, labels)
        return self.one_pass(model, jnp.asarray(self.config.couplings, jnp.float32), states, labels)


_GRID = ("coupling", "level", "layer")
_PER = "mean square per token coefficient and feature"
VARIABLES: Variables = {
    "split_energy": ((*_GRID, "part", "token_band"), f"{_PER} of the parts of the heads' difference, mean over heads"),
    "split_product": ((*_GRID, "part", "token_band"), "inner product of these parts with the total"),
    "alone_energy": ((*_GRID, "part", "token_band"), f"{_PER} of the parts without coupling, of the same q, k, v"),
    "first_order_error": ((*_GRID, "part", "token_band"), f"{_PER} of exact minus first order"),
    "pattern_energy": ((*_GRID, "token_band"), f"{_PER} of the pattern part, key plus query"),
    "cross_energy": ((*_GRID, "reading", "token_band"), f"{_PER} of the cross part that the self-only reading omits"),
    "cross_product": ((*_GRID, "reading", "token_band"), "inner product of the cross part with the pattern part"),
    "closure": (_GRID, f"{_PER} of the sum of the parts minus the difference of the network's own head outputs"),
    "head_product": ((*_GRID, "head", "part"), "inner product of the parts of a head's difference with the total"),
    "head_alone": ((*_GRID, "head"), f"{_PER} of a head's difference without coupling, of the same q, k, v"),
    "head_write": ((*_GRID, "head", "token_band"), f"{_PER} of the difference that a head adds to the stream"),
    "head_pull": ((*_GRID, "head", "token_band"), "inner product of what a head adds with the stream's difference"),
    "head_pull_alone": ((*_GRID, "head", "token_band"), "head_pull without coupling, from the same q, k, v"),
    "head_growth": ((*_GRID, "head", "token_band"), "what a head adds to the square of the stream's difference"),
    "head_growth_alone": ((*_GRID, "head", "token_band"), "head_growth without coupling, from the same q, k, v"),
    "part_growth": ((*_GRID, "part", "token_band"), "what a part of the heads' difference adds to that square"),
    "stream_energy": ((*_GRID, "place", "token_band"), f"{_PER} of the stream's difference and of what is added to it"),
    "stream_product": ((*_GRID, "product", "token_band"), "inner products of the stream's difference and additions"),
    "origin": ((*_GRID, "sublayer", "token_band"), "inner product of what a sublayer adds with the final difference"),
    "origin_embedding": (
        ("coupling", "level", "token_band"),
        "inner product of the difference of the embeddings with the final difference",
    ),
    "denoised": (("coupling", "level", "band"), "mean square per DCT coefficient of the denoised difference"),
}


def measure(bench: Bench[MechanismConfig]) -> None:
    """Fills ``network``, ``untrained``, and ``random``: the untrained network with open adaLN gates."""
    config, instrument, model = bench.config, MechanismInstrument(bench), bench.model
    coords = {
        "coupling": np.asarray(config.couplings, np.float64),
        "level": instrument.steps,
        "level_ell": ("level", bench.clock.log_snr[instrument.steps]),
        "layer": np.arange(model.depth),
        "head": np.arange(model.num_heads),
        "part": list(PARTS),
        "reading": list(READINGS),
        "place": list(PLACES),
        "product": list(PRODUCTS),
        "sublayer": list(SUBLAYERS),
        "token_band": np.arange(len(instrument.tokens)),
        "token_radius": ("token_band", instrument.tokens.radius),
    }
    subjects = (
        ("network", lambda: bench.network, config.pairs),
        ("untrained", lambda: bench.untrained, config.untrained_pairs),
        (
            "random",
            lambda: bench.only("random", lambda: open_gates(bench.random())),
            config.untrained_pairs,
        ),
    )
    for name, make, pairs in subjects:

        def on_network(pairs, labels, make=make):
            return instrument.measure(make(), pairs, labels)

        bench.measure(name, VARIABLES, coords, pairs, on_network)
