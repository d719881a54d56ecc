"""Linear response: how a small difference grows along the reverse flow, by band and in the directions that grow most.

Derivatives of the denoiser are taken along uncoupled DDIM trajectories in the rescaled frame. They give the growth
rates of differences drawn at random from a band, which stand beside those of a Gaussian law of the same spectrum and
beside the rate that the denoiser's own mean square error implies. They also tell how much of the response leaves the
band, whether the derivative is symmetric, as that of a posterior mean is, and what the leading Lyapunov directions are.
See docs/theory.md, section 11.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.attention import symmetric_gate
from dit_jax.diffusion import Denoiser, ddim_step
from dit_jax.model import DiT
from dit_jax.replicas import INITIAL, pair_noise, run_pairs
from experiments.frame.bench import Bench, Variables
from experiments.frame.instrument import coupled_wiener
from experiments.frame.programs import Setup
from experiments.frame.steps import spaced_steps, window
from experiments.frame.streams import stream
from experiments.frame.subject import Subject
from experiments.studies.response.analysis import band_variance
from experiments.studies.response.settings import LEAST, PLACES, PROBES, ResponseConfig
from ou_theory.clock import Clock
from ou_theory.modes import Bands, band_mean, dct2, idct2, pair_modes


def check(config: ResponseConfig, subject: Subject) -> None:
    """Raises ValueError for more directions than images have, or too few steps in the window."""
    if config.vectors > np.prod(subject.image_shape):
        size = np.prod(subject.image_shape)
        raise ValueError(f"vectors must be at most {size}, the size of an image, got {config.vectors}")
    window(subject.config.clock(config.steps), LEAST)


class ResponseInstrument:
    """The measurements, for any denoiser of images of one shape."""

    def __init__(
        self,
        clock: Clock,
        bands: Bands,
        steps: np.ndarray,
        vectors: int,
        seed: int | jax.Array,
        shape: tuple[int, int, int],
    ):
        self.clock, self.bands, self.steps, self.window = clock, bands, steps, window(clock, LEAST)
        self.vectors, self.seed, self.shape = vectors, seed, shape
        # probes have no part outside their band, so one draw of white coefficients serves all bands
        self.masks = bands.index == np.arange(len(bands))[:, None, None]

    def measure(self, denoise: Denoiser, pairs: jax.Array, labels: jax.Array) -> dict[str, jax.Array]:
        """All variables of a block of pairs, pairs in front; see `VARIABLES`."""
        states, ends = self.flow(denoise, pairs, labels)
        noise, probes, first = self.noise(pairs)
        stretch, content = self.directions(denoise, states, labels, first)
        steps = jnp.asarray(self.steps)
        sigma = jnp.asarray(self.clock.sigma, jnp.float32)[steps]
        noised = ends + sigma.reshape(-1, *(1,) * ends.ndim) * noise

        def at(inputs):
            step, y, white = inputs
            denoised, found = self.respond(denoise, step, y, white, labels)
            error = band_mean(jnp.square(dct2(denoised - ends)), self.bands).mean(0)
            return {**found, "error": error / jnp.asarray(self.clock.sigma**2, jnp.float32)[step]}

        both = jnp.tile(steps, 2), jnp.concatenate([states[steps], noised]), jnp.concatenate([probes, probes])
        found = jax.lax.map(at, both)
        # (place * level, P, ...) -> (P, place, level, ...)
        found = {k: jnp.moveaxis(v.reshape(len(PLACES), -1, *v.shape[1:]), 2, 0) for k, v in found.items()}
        difference = pair_modes(ends)[1]
        weights = jnp.asarray(self.bands.averaging, difference.dtype)
        return {
            **found,
            "error": found["error"][:, 1],
            "moment": jnp.einsum("phwc,phwd,hwb->pbcd", difference, difference, weights, precision="highest"),
            "stretch": jnp.moveaxis(stretch, (3, 2, 1, 0), (0, 1, 2, 3)),
            "content": jnp.moveaxis(content, (3, 2, 1, 0), (0, 1, 2, 3)),
        }

    def noise(self, pairs: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Unit noise, (2, P, H, W, C) each: of the noised ends (L, ...), of the probes' coefficients (L, PROBES, ...),
        of the first directions (V, ...). One draw, which compiles in a third of the time."""
        count = len(self.steps)
        ends = [stream(self.seed, "noised ends")]
        probes = [stream(self.seed, "differences", probe) for probe in range(PROBES)]
        first = [stream(self.seed, "directions", vector) for vector in range(self.vectors)]
        keys = jnp.stack([*(key for key in ends + probes for _ in self.steps), *first])
        steps = np.append(np.tile(self.steps, 1 + PROBES), np.full(self.vectors, INITIAL))
        drawn = jax.vmap(lambda key, step: pair_noise(key, pairs, step, self.shape))(keys, steps)
        probes = drawn[count : -self.vectors].reshape(PROBES, count, *drawn.shape[1:]).swapaxes(0, 1)
        return drawn[:count], probes, drawn[-self.vectors :]

    def flow(self, denoise: Denoiser, pairs: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
        """States (K, 2, P, H, W, C) of uncoupled pairs under DDIM, rescaled, and their ends (2, P, H, W, C)."""
        ends, states = run_pairs(
            lambda gate: denoise,
            self.clock,
            jnp.zeros(1),
            pairs,
            labels,
            self.shape,
            seed=self.seed,
            observe=lambda step, x, denoised: x[:, 0],
        )
        scale = jnp.asarray(self.clock.alpha_bar**-0.5, states.dtype)
        return states * scale.reshape(-1, *(1,) * (states.ndim - 1)), ends[:, 0]

    def directions(self, denoise: Denoiser, states: jax.Array, labels: jax.Array, first: jax.Array):
        """The directions that are stretched most from the start of the window to its end, and what becomes of them.

        One round of power iteration finds them: the `first` directions are carried to the end, taken back to the start
        by the transposed derivative, and carried to the end again. See `carried` for what is returned.
        """
        last, *_ = self.carried(denoise, states, labels, first)
        _, stretch, content = self.carried(denoise, states, labels, self.pulled(denoise, states, labels, last))
        return stretch, content

    def carried(self, denoise: Denoiser, states: jax.Array, labels: jax.Array, first: jax.Array):
        """Carries small differences through the steps of the window. They are made orthonormal before and after each
        step, so that each follows a direction of its own.

        Args:
          first: (V, 2, P, H, W, C) at its first step.

        Returns:
          the last ones, logs of the lengths (W, V, 2, P) that the steps give to them, and the share of every band in
          them (W + 1, V, 2, P, B), before each step and at the end.
        """

        def body(directions, inputs):
            step, y = inputs
            _, moved = pushed(self._advance(denoise, step, labels), y, directions)
            moved, length = orthonormal(moved)
            return moved, (jnp.log(length), self._content(moved))

        first, _ = orthonormal(first)
        last, (stretch, content) = jax.lax.scan(body, first, (jnp.asarray(self.window), states[self.window]))
        return last, stretch, jnp.concatenate([self._content(first)[None], content])

    def pulled(self, denoise: Denoiser, states: jax.Array, labels: jax.Array, last: jax.Array) -> jax.Array:
        """Orthonormal differences at the end taken back to the start of the window by the transposed derivative."""

        def body(directions, inputs):
            step, y = inputs
            _, back = jax.vjp(self._advance(denoise, step, labels), y)
            return orthonormal(jax.vmap(lambda direction: back(direction)[0])(directions))[0], None

        return jax.lax.scan(body, last, (jnp.asarray(self.window), states[self.window]), reverse=True)[0]

    def _advance(self, denoise, step, labels):
        """One DDIM step as a function of the rescaled state."""
        update = ddim_step(self.clock)
        into = jnp.asarray(self.clock.alpha_bar**0.5, jnp.float32)[step]
        out = jnp.asarray(self.clock.alpha_bar_next**-0.5, jnp.float32)[step]

        def advance(y):
            x = into * y
            return update(step, x, denoise(x, step, labels), None) * out

        return advance

    def _content(self, directions):
        """Share (..., B) of each band in directions of unit length."""
        return band_mean(jnp.square(dct2(directions)), self.bands) * (self.bands.count * self.shape[-1])

    def respond(self, denoise: Denoiser, step: jax.Array, y: jax.Array, white: jax.Array, labels: jax.Array):
        """The denoised images of states, and those of `VARIABLES` that describe the derivative there.

        Args:
          y: (2, P, H, W, C) rescaled states of both replicas.
          white: (PROBES, 2, P, H, W, C) white coefficients; the probes of a band are those that lie in it.

        Returns:
          the denoised images, and means over replicas and probes by name, (P, ...) each.
        """
        masks = jnp.asarray(self.masks, white.dtype)[:, None, None, None, :, :, None]
        probes = (masks * white).reshape(-1, *y.shape)  # band outer, probe inner; DCT coefficients
        into = jnp.asarray(self.clock.alpha_bar**0.5, jnp.float32)[step]
        denoised, moved = pushed(lambda y: denoise(into * y, step, labels).denoised, y, idct2(probes).astype(y.dtype))
        moved = dct2(moved)
        size = jnp.square(probes).sum((-3, -2, -1))  # (band * probe, 2, P)
        product = jnp.einsum("irphwc,jrphwc->ijrp", probes, moved, precision="highest")
        own = jnp.einsum("iirp->irp", product) / size
        energy = band_mean(jnp.square(moved), self.bands) * (self.bands.count * self.shape[-1]) / size[..., None]
        count = len(self.bands)
        own, energy = (x.reshape(count, PROBES, *x.shape[1:]) for x in (own, energy))
        product = product.reshape(count, PROBES, count, PROBES, *product.shape[2:])
        forth, back = product[:, 0, :, 1], product[:, 1, :, 0].swapaxes(0, 1)  # <u, J v>, <v, J u>, by bands of u and v
        within_and_all = [
            jnp.concatenate([jnp.einsum("aarp->arp", x), x.sum((0, 1))[None]]) for x in (forth + back, forth - back)
        ]
        symmetric, antisymmetric = (jnp.square(x).mean(1).T for x in within_and_all)
        return denoised, {
            "rate": own.mean((1, 2)).T - 1,
            "negative": (own < 0).mean((1, 2)).T,
            "response": jnp.moveaxis(energy.mean((1, 2)), 0, 1),
            "symmetric": symmetric,
            "antisymmetric": antisymmetric,
        }


VARIABLES: Variables = {
    "rate": (("place", "level", "band"), "growth rate of a difference drawn from the band, per nat of ln(1 / sigma)"),
    "negative": (("place", "level", "band"), "share of probes whose response points against them"),
    "response": (("place", "level", "band", "to"), "energy that the derivative gives a band, per energy of the probe"),
    "symmetric": (("place", "level", "part"), "square of <u, J v> + <v, J u>, white u and v of a band, or of all"),
    "antisymmetric": (("place", "level", "part"), "square of <u, J v> - <v, J u>"),
    "error": (("level", "band"), "square error per coefficient of the ends predicted from noised ends, over sigma^2"),
    "moment": (("band", "channel", "other"), "product of channels of the difference of the ends, per coefficient"),
    "stretch": (("replica", "vector", "window"), "log of the factor by which a step stretches a direction", "nat"),
    "content": (
        ("replica", "vector", "point", "band"),
        "share of a band in a direction, before each step, and at the end",
    ),
}


def pushed(f: Callable[[jax.Array], jax.Array], y: jax.Array, tangents: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``f(y)``, and its derivative along tangents (T, *y.shape); f itself is computed once."""
    return jax.vmap(lambda tangent: jax.jvp(f, (y,), (tangent,)), out_axes=(None, 0))(tangents)


def orthonormal(directions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Gram-Schmidt on directions (V, 2, P, H, W, C): the same number, and the lengths (V, 2, P) of what each adds."""
    matrix = jnp.moveaxis(directions.reshape(*directions.shape[:3], -1), 0, -1)
    q, r = jnp.linalg.qr(matrix.astype(jnp.float32))
    diagonal = jnp.diagonal(r, axis1=-2, axis2=-1)
    q = q * jnp.where(diagonal < 0, -1, 1)[..., None, :]
    return jnp.moveaxis(q, -1, 0).reshape(directions.shape), jnp.moveaxis(jnp.abs(diagonal), -1, 0)


def wiener(variance: jax.Array, bands: Bands, clock: Clock, count: int) -> Denoiser:
    """The exact denoiser of independent Gaussian coefficients with the variances (B,) of bands, for `count` pairs."""
    return coupled_wiener(variance[bands.index], clock)(symmetric_gate(jnp.zeros(count)))


def _measured(setup: Setup, steps: tuple[int, ...], vectors: int, denoise: Denoiser, pairs, labels):
    instrument = ResponseInstrument(setup.clock, setup.bands, np.array(steps), vectors, setup.seed, setup.image_shape)
    return instrument.measure(denoise, pairs, labels)


def _on_network(setup: Setup, steps: tuple[int, ...], vectors: int, model: DiT, pairs, labels):
    denoise = setup.denoiser(model, attention="explicit")  # fused attention has no forward derivative
    return _measured(setup, steps, vectors, denoise, pairs, labels)


def _on_wiener(setup: Setup, steps: tuple[int, ...], vectors: int, variance: jax.Array, pairs, labels):
    return _measured(setup, steps, vectors, wiener(variance, setup.bands, setup.clock, pairs.size), pairs, labels)


def measure(bench: Bench[ResponseConfig]) -> None:
    """Fills ``network``, ``untrained``, and ``wiener``: the exact denoiser of the network's band variances."""
    config, clock, bands, shape = bench.config, bench.clock, bench.bands, bench.subject.image_shape
    inside, steps = window(clock, LEAST), spaced_steps(clock, config.levels, last=False)
    coords = {
        "place": list(PLACES),
        "level": steps,
        "level_ell": ("level", clock.log_snr[steps]),
        "to": np.arange(len(bands)),
        "part": [*(str(band) for band in range(len(bands))), "all"],
        "channel": np.arange(shape[-1]),
        "other": np.arange(shape[-1]),
        "replica": ["A", "B"],
        "vector": np.arange(config.vectors),
        "window": inside,
        "point": np.append(inside, len(clock)),
    }

    static = (tuple(steps.tolist()), config.vectors)
    on_network, on_wiener = bench.program(_on_network, *static), bench.program(_on_wiener, *static)

    def measured(name: str, count: int, run: Callable[..., Any], subject: Callable[[], Any], **options) -> xr.Dataset:
        def block(pairs, labels):
            return run(subject(), pairs, labels)

        return bench.measure(name, VARIABLES, coords, count, block, **options)

    network = measured("network", config.pairs, on_network, lambda: bench.network)
    measured("untrained", config.untrained_pairs, on_network, lambda: bench.untrained)
    variance = jnp.asarray(np.float32(band_variance(network)))
    measured("wiener", config.pairs, on_wiener, lambda: variance, of_all=True)
