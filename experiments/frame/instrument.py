"""The instrument: measurements on coupled pairs along their trajectories (docs/theory.md, section 7).

A subject is anything that denoises under a gate: the network, an untrained network, a Wiener filter. All go through
the two functions here, which return plain arrays with the axes of the stored datasets.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.attention import symmetric_gate
from dit_jax.diffusion import Denoiser, DenoiserOutput, Sampler
from dit_jax.inside import PER_REPLICA
from dit_jax.replicas import CoupledDenoiser, run_pairs
from experiments.frame.eigenmodes import Eigenmodes, FineDirections
from ou_theory.attention import GateKind, block_weights
from ou_theory.clock import Clock
from ou_theory.gain_model import wiener_gain
from ou_theory.modes import Bands, Directions, dct2, idct2, pair_modes, radial_bands


def own_half(activations: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Activations of the conditional half of a guided batch: every other image along its axis, see `guided_output`."""
    return {name: value[:, ::2] if name in PER_REPLICA else value[::2] for name, value in activations.items()}


def token_bands(grid: int, most: int = 6) -> Bands:
    """Bands of the DCT over a grid of tokens: as many annuli as are not empty, at most `most`.

    Raises:
      ValueError: the grid is one token.
    """
    for num in range(most, 0, -1):
        try:
            return radial_bands(grid, grid, num)
        except ValueError:
            continue
    raise ValueError(f"a grid of {grid} x {grid} tokens has no bands: the model has one token")


def stream_modes(stream: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Common and difference mode (N, grid, grid, D) float32 of residual streams (2, N, T, D), in DCT over the token
    grid."""
    grid = round(stream.shape[-2] ** 0.5)
    return pair_modes(stream.astype(jnp.float32).reshape(*stream.shape[:-2], grid, grid, stream.shape[-1]))


def coupled_wiener(
    variance: jax.Array, clock: Clock, kind: GateKind = "joint", directions: Directions | None = None
) -> CoupledDenoiser:
    """The exact denoiser of independent Gaussian modes whose predictions are mixed by the gate's weights of blocks.

    The common mode of a symmetric pair is multiplied by `ou_theory.attention.common_gain`, which is 1 if the kind of
    gate is normalised, and its difference mode by `ou_theory.attention.rho`: the ideal model of docs/theory.md,
    section 5.

    Args:
      variance: (H, W) or (H, W, C) data variance of each DCT coefficient; or (M,) of each of the directions.
      kind: of the gate.
      directions: modes in the place of the DCT's. Along others the data have no variance.
    """
    if directions is None:
        variance = variance if variance.ndim == 3 else variance[..., None]

    def coupled(gate: jax.Array) -> Denoiser:
        mixing = block_weights(gate, kind)

        def denoise(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
            sigma2 = jnp.asarray(clock.sigma**2, x.dtype)[step]
            scale = jnp.asarray(clock.alpha_bar**-0.5, x.dtype)[step]
            if directions is not None:
                each = wiener_gain(variance, sigma2) * directions.coefficients(dct2(scale * x))
                return DenoiserOutput(directions.images(jnp.einsum("nab,bnm->anm", mixing, each, precision="highest")))
            each = wiener_gain(variance, sigma2) * dct2(scale * x)
            return DenoiserOutput(idct2(jnp.einsum("nab,bnhwc->anhwc", mixing, each, precision="highest")))

        return denoise

    return coupled


def shuffled_bands(bands: Bands, seed: int) -> Bands:
    """Bands of the same sizes whose coefficients are drawn at random: the control of every statement about order."""
    rng = np.random.default_rng([seed, 0])
    index = rng.permutation(bands.index.ravel()).reshape(bands.index.shape)
    return bands.with_index(index)


def trajectories(
    coupled: CoupledDenoiser,
    clock: Clock,
    bands: Bands | Directions,
    couplings: jax.Array,
    pairs: jax.Array,
    labels: jax.Array,
    shape: Sequence[int],
    *,
    seed: int | jax.Array,
    sampler: Sampler,
) -> dict[str, jax.Array]:
    """Runs P pairs at C couplings and measures them; the first coupling must be 0.

    Args:
      bands: groups of modes, in the DCT or in another basis; a coefficient is one of its basis.

    Returns:
      energy (C, P, K, B, 2): mean square of the denoised common and difference modes per coefficient.
      projection (C, P, K, B): inner product of the denoised difference with its own end, per coefficient.
      coefficient_energy, coefficient_projection (P, K, H, W), for directions (P, K, M): of the uncoupled difference.
      state_energy (P, K, B): of the difference of the uncoupled states in the rescaled frame.
      states (K, 2, P, H, W, channels): the uncoupled states, for `one_pass`.
      sample (2, C, P, H, W, channels).
    """
    scale = jnp.asarray(clock.alpha_bar**-0.5, jnp.float32)

    def observe(step, x, denoised):
        common, difference = map(bands.coefficients, pair_modes(denoised))
        state = bands.coefficients(pair_modes(x[:, 0])[1]) * scale[step]
        energy = jnp.stack([bands.mean(jnp.square(mode)) for mode in (common, difference)], -1)
        return {
            "energy": energy,
            "state_energy": bands.mean(jnp.square(state)),
            "states": x[:, 0],
            "difference": difference,
        }

    out, kept = run_pairs(coupled, clock, couplings, pairs, labels, shape, seed=seed, sampler=sampler, observe=observe)
    difference = kept.pop("difference")
    inner = difference * difference[-1]
    uncoupled = difference[:, 0]
    return {
        "energy": jnp.moveaxis(kept["energy"], 0, 2),
        "projection": jnp.moveaxis(bands.mean(inner), 0, 2),
        "coefficient_energy": bands.each(jnp.square(uncoupled)).swapaxes(0, 1),
        "coefficient_projection": bands.each(inner[:, 0]).swapaxes(0, 1),
        "state_energy": jnp.moveaxis(kept["state_energy"], 0, 1),
        "states": kept["states"],
        "sample": out,
    }


def one_pass(
    coupled: CoupledDenoiser,
    clock: Clock,
    modes: Eigenmodes | FineDirections,
    couplings: jax.Array,
    states: jax.Array,
    labels: jax.Array,
) -> dict[str, jax.Array]:
    """What one denoising of the same inputs makes of their difference under every coupling.

    Args:
      modes: M groups over which is averaged.
      couplings: (C,).
      states: (K, 2, P, H, W, channels) as `trajectories` returns them.
      labels: (P,).

    Returns:
      energy (C, P, K, M): mean square of the denoised difference.
      product (C, P, K, M): its inner product with the difference of the inputs in the rescaled frame.
      state (P, K, M): mean square of that difference of the inputs.
    """
    count, size = couplings.shape[0], labels.shape[0]
    scale = jnp.asarray(clock.alpha_bar**-0.5, jnp.float32)
    denoise = coupled(jnp.tile(symmetric_gate(couplings), (size, 1, 1)))  # the order of `run_pairs`

    def at_step(inputs):
        step, x = inputs
        denoised = denoise(jnp.repeat(x, count, 1), step, jnp.repeat(labels, count)).denoised
        difference = modes.coefficients(pair_modes(denoised.reshape(2, size, count, *x.shape[2:]))[1])
        state = modes.coefficients(pair_modes(x)[1]) * scale[step]
        energy, product = (modes.mean(each) for each in (jnp.square(difference), difference * state[:, None]))
        return energy, product, modes.mean(jnp.square(state))

    energy, product, state = jax.lax.map(at_step, (jnp.arange(len(clock)), states))
    to_grid = (2, 1, 0, 3)
    return {
        "energy": energy.transpose(to_grid),
        "product": product.transpose(to_grid),
        "state": state.swapaxes(0, 1),
    }
