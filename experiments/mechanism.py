"""What coupling does to the difference of two replicas inside one pass (docs/theory.md, section 6).

The uncoupled states of a few sampler steps are denoised once under every coupling. In every layer and head the
difference of the attention output is split exactly into what comes through values (routing), keys and queries; the
difference of the residual stream is followed through attention and MLP to the denoised image.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.attention import GateKind, symmetric_gate
from dit_jax.diffusion import network_denoiser
from dit_jax.model import Block, DiT, widened
from dit_jax.replicas import run_pairs
from experiments.analysis import WINDOW_START
from experiments.mechanism_analysis import analyse
from experiments.mechanism_report import report
from experiments.probe import token_bands
from experiments.study import Study, StudyConfig
from ou_theory.attention import exact_difference, first_order_difference, pair_weights
from ou_theory.clock import Clock
from ou_theory.modes import band_mean, dct2, pair_modes

PARTS = ("routing", "key", "query", "total")
READINGS = ("weights", "pattern")  # of the cross part that the self-only reading leaves out, see `split_head`
PLACES = ("pre", "attention", "mlp", "post")
PRODUCTS = ("pre attention", "pre mlp", "attention mlp")
SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True)
class MechanismConfig(StudyConfig):
    """Split the replicas' difference in every layer and head, in one pass: how does coupling synchronise?"""

    couplings: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)
    pairs: int = 16
    levels: int = 8  # sampler steps that are looked into at most, evenly spaced in log-SNR
    untrained_pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        grid = np.asarray(self.couplings, np.float64)
        if grid.size < 2 or grid[0] != 0 or not np.all(np.diff(grid) > 0) or not np.isfinite(grid[-1]):
            raise ValueError(f"couplings must start at 0, the reference, and increase, got {self.couplings}")
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")


def chosen_steps(clock: Clock, levels: int) -> np.ndarray:
    """Sampler steps nearest to `levels` evenly spaced log-SNRs of the estimator's window, increasing, each once.

    Raises:
      ValueError: the sampler has no step in the window.
    """
    ell = clock.log_snr
    inside = np.flatnonzero(ell >= WINDOW_START)
    if not inside.size:
        raise ValueError(f"steps: none of the sampler's {len(clock)} has a log-SNR of {WINDOW_START:g} or more")
    wanted = np.linspace(ell[inside[0]], ell[-1], levels)
    return np.unique(inside[np.abs(ell[inside, None] - wanted).argmin(0)])


def open_gates(model: DiT) -> DiT:
    """A copy whose blocks add all of their attention and MLP to the stream: the gates get a bias of 1. A control with
    random weights whose attention acts; those of `Subject.untrained` are nearly closed."""
    copy = nnx.clone(model)
    assert isinstance(copy.blocks, Block)
    assert copy.blocks.adaln.bias is not None
    width = model.config.hidden_size
    bias = copy.blocks.adaln.bias[...]
    for first in (2 * width, 5 * width):  # see `Block`
        bias = bias.at[..., first : first + width].add(1)
    copy.blocks.adaln.bias[...] = bias
    return copy


class HeadSplit(NamedTuple):
    """What `split_head` finds; the first axis holds `PARTS` or `READINGS`."""

    exact: jax.Array  # (4, T, d)
    alone: jax.Array  # (4, T, d) the same without coupling
    error: jax.Array  # (4, T, d) exact minus first order
    cross: jax.Array  # (2, T, d)


def split_head(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, kind: GateKind) -> HeadSplit:
    """The split of ``O_A - O_B`` of one head, for q, k, v (2, T, d).

    ``cross`` is what is neglected where the replicas' readings of each other are taken to have the same pattern:
    ``(a_AB - a_BA) V`` with the weights as they are, or with rows normalised, times their mean mass. Under `blend` the
    two are the same; under `joint` the first also counts the mass that moves between own and other keys, which the
    self part takes back.
    """

    def rows(parts):
        return jnp.stack([*parts, parts.total])

    exact = rows(exact_difference(q, k, v, g, kind))
    common = [x.mean(0) for x in (q, k, v)]
    differences = [x[0] - x[1] for x in (q, k, v)]
    first = rows(first_order_difference(*common, *differences, g=g))
    weights = pair_weights(q, k, g, kind)
    a, b = weights[0, :, 1], weights[1, :, 0]
    mass = [w.sum(-1, keepdims=True) for w in (a, b)]
    pattern_a, pattern_b = (w / jnp.where(m > 0, m, 1) for w, m in zip((a, b), mass, strict=True))
    cross = jnp.stack([a - b, (mass[0] + mass[1]) / 2 * (pattern_a - pattern_b)]) @ common[2]
    return HeadSplit(exact, rows(exact_difference(q, k, v, jnp.zeros_like(g), kind)), exact - first, cross)


class MechanismInstrument:
    """The jitted measurements, compiled once per network shape.

    Attributes:
      tokens: bands of the token grid.
      steps: sampler steps that are looked into.
    """

    def __init__(self, study: Study, config: MechanismConfig):
        self.study, self.config = study, config
        model = study.subject.model.config
        self.grid = model.input_size // model.patch_size
        self.tokens = token_bands(self.grid)
        self.steps = chosen_steps(study.clock, config.levels)
        self.states = jax.jit(self._states)
        self.one_pass = jax.jit(self._one_pass)

    def measure(self, model: DiT, pairs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Everything of a block of pairs, with pairs in front; see `VARIABLES`."""
        states = self.states(model, pairs, labels)
        return self.one_pass(model, jnp.asarray(self.config.couplings, jnp.float32), states, labels)

    def _states(self, model: DiT, pairs, labels):
        """Uncoupled states (levels, 2, P, H, W, C) under DDIM."""
        study = self.study
        _, states = run_pairs(
            lambda gate: network_denoiser(model, study.clock, gate, kind=study.config.gate),
            study.clock,
            jnp.zeros(1),
            pairs,
            labels,
            study.subject.image_shape,
            seed=study.config.seed,
            observe=lambda step, x, denoised: x[:, 0],
        )
        return states[self.steps]

    def _one_pass(self, model: DiT, couplings, states, labels):
        count, size = couplings.shape[0], labels.shape[0]
        gs = jnp.tile(couplings, size)  # a pair's couplings side by side
        labels = jnp.repeat(labels, count)
        denoise = network_denoiser(
            model, self.study.clock, symmetric_gate(gs), kind=self.study.config.gate, tap=self._tap(model, gs)
        )

        def at_level(inputs):
            step, x = inputs
            x = jnp.repeat(x, count, 1)
            prediction = denoise(x, step, labels)
            found, writes = prediction.taps
            embedding = self._difference(widened(model.embed(x.astype(model.config.dtype))))
            final = embedding + sum(write.sum(0) for write in writes.values())
            origin = [band_mean(writes[name] * final, self.tokens) for name in SUBLAYERS]
            denoised = jnp.square(pair_modes(prediction.denoised)[1])
            return found | {
                "origin": jnp.stack(origin, -2),
                "origin_embedding": band_mean(embedding * final, self.tokens),
                "denoised": band_mean(denoised, self.study.bands),
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
        config, tokens, gate = model.config, self.tokens, self.study.config.gate
        assert isinstance(model.blocks, Block)
        kernels = model.blocks.attn.proj.kernel[...].astype(config.dtype)

        def tap(layer, activations):
            stream = [self._difference(widened(activations[f"resid_{at}"])) for at in ("pre", "mid", "post")]
            pre, attention, mlp = stream[0], stream[1] - stream[0], stream[2] - stream[1]
            kernel = widened(kernels[layer]).reshape(config.num_heads, -1, config.hidden_size)
            gate_attn = widened(jnp.split(activations["adaln"], 6, -1)[2])

            def one(inputs):  # a pair at a coupling
                q, k, v, out, g, gate_attn, pre = inputs
                heads = [jnp.moveaxis(x, 2, 0) for x in (q, k, v)]  # (H, 2, T, d)
                split = jax.vmap(lambda q, k, v: split_head(q, k, v, g, gate))(*heads)
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


_GRID = ("coupling", "level", "layer")
_PER = "mean square per token coefficient and feature"
VARIABLES = {
    "split_energy": ((*_GRID, "part", "token_band"), f"{_PER} of the parts of the heads' difference, mean over heads"),
    "split_product": ((*_GRID, "part", "token_band"), "their inner product with the total"),
    "alone_energy": ((*_GRID, "part", "token_band"), f"{_PER} of the parts without coupling, of the same q, k, v"),
    "first_order_error": ((*_GRID, "part", "token_band"), f"{_PER} of exact minus first order"),
    "pattern_energy": ((*_GRID, "token_band"), f"{_PER} of the pattern part, key plus query"),
    "cross_energy": ((*_GRID, "reading", "token_band"), f"{_PER} of the cross part that the self-only reading leaves"),
    "cross_product": ((*_GRID, "reading", "token_band"), "its inner product with the pattern part"),
    "closure": (_GRID, f"{_PER} of the sum of the parts minus the difference of the network's own head outputs"),
    "head_product": ((*_GRID, "head", "part"), "inner product of the parts of a head's difference with the total"),
    "head_alone": ((*_GRID, "head"), f"{_PER} of a head's difference without coupling, of the same q, k, v"),
    "head_write": ((*_GRID, "head", "token_band"), f"{_PER} of the difference that a head adds to the stream"),
    "head_pull": ((*_GRID, "head", "token_band"), "its inner product with the difference that is there"),
    "head_pull_alone": ((*_GRID, "head", "token_band"), "the same without coupling, of the same q, k, v"),
    "head_growth": ((*_GRID, "head", "token_band"), "what a head adds to the square of the difference that is there"),
    "head_growth_alone": ((*_GRID, "head", "token_band"), "the same without coupling, of the same q, k, v"),
    "part_growth": ((*_GRID, "part", "token_band"), "the same of the parts of the heads' difference, under coupling"),
    "stream_energy": ((*_GRID, "place", "token_band"), f"{_PER} of the stream's difference and of what is added to it"),
    "stream_product": ((*_GRID, "product", "token_band"), "inner products of what is there and what is added"),
    "origin": ((*_GRID, "sublayer", "token_band"), "inner product of what is added with the final difference"),
    "origin_embedding": (("coupling", "level", "token_band"), "the same of the difference of the embeddings"),
    "denoised": (("coupling", "level", "band"), "mean square per DCT coefficient of the denoised difference"),
}


def mechanism(
    config: MechanismConfig, out: str | Path, *, resume: bool = False, command: str = "", progress: bool = True
) -> Path:
    """Runs the study and writes its folder; see `experiments.study.Study`.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: settings that do not fit the weights; an output folder that holds another run.
    """
    started = time.perf_counter()
    study = Study("mechanism", config, out, resume=resume, command=command, progress=progress)
    instrument = MechanismInstrument(study, config)
    model = study.subject.model
    coords = {
        "coupling": np.asarray(config.couplings),
        "level": instrument.steps,
        "level_ell": ("level", study.clock.log_snr[instrument.steps]),
        "layer": np.arange(model.config.depth),
        "head": np.arange(model.config.num_heads),
        "part": list(PARTS),
        "reading": list(READINGS),
        "place": list(PLACES),
        "product": list(PRODUCTS),
        "sublayer": list(SUBLAYERS),
        "token_band": np.arange(len(instrument.tokens)),
        "token_radius": ("token_band", instrument.tokens.radius),
    }
    untrained = study.subject.untrained(config.seed)
    subjects = (
        ("network", model, config.pairs),
        ("untrained", untrained, config.untrained_pairs),
        ("random", open_gates(untrained), config.untrained_pairs),
    )
    sources = {
        name: study.measure(
            name, VARIABLES, coords, pairs, lambda pairs, labels, model=model: instrument.measure(model, pairs, labels)
        )
        for name, model, pairs in subjects
    }
    measured = time.perf_counter()
    analysis = analyse(sources, instrument.tokens.count, config.seed)
    study.run.put("analysis", analysis)
    timings = {"measuring_s": round(measured - started, 1), "analysis_s": round(time.perf_counter() - measured, 1)}
    return report(study.run, timings)
