"""Samplers with a linear denoiser: one step of a mode, and its exact energy after every step (docs/theory.md,
sections 5.3 and 13.8).

The recursion follows a network from its measured one-pass gain, with no fitted parameter. In the limit of many steps it
tends to the continuum formulas of `ou_theory.gain_model`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


class ModeStep(NamedTuple):
    """One step of a sampler, for one mode of the rescaled frame: ``y' = factor y + sqrt(noise) xi``, xi unit noise."""

    factor: jax.Array
    noise: jax.Array


def mode_ddim_step(gain: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> ModeStep:
    """The DDIM step of a mode whose denoised is ``gain y``: factor ``G + (1 - G) sigma' / sigma``, no noise.

    Args:
      gain: G of the denoiser; all three broadcast.
      sigma, sigma_next: noise levels of the rescaled frame before and after the step.
    """
    gain = jnp.asarray(gain, float)
    factor = gain + (1 - gain) * jnp.asarray(sigma_next, float) / jnp.asarray(sigma, float)
    return ModeStep(factor, jnp.zeros_like(factor))


def mode_ancestral_step(gain: ArrayLike, sigma: ArrayLike, sigma_next: ArrayLike) -> ModeStep:
    """The ancestral step of a mode, with the posterior variance: the factor is ``q + (1 - q) G`` and the noise
    ``sigma'^2 (1 - q)``, with ``q = sigma'^2 / sigma^2``; arguments as of `mode_ddim_step`."""
    gain, sigma, sigma_next = (jnp.asarray(v, float) for v in (gain, sigma, sigma_next))
    q = (sigma_next / sigma) ** 2
    factor = q + (1 - q) * gain
    return ModeStep(factor, jnp.broadcast_to(sigma_next**2 * (1 - q), factor.shape))


def recursion_energy(gain: jax.Array, sigma: jax.Array, start_variance: jax.Array, eta: float = 0.0) -> jax.Array:
    """Variance of the denoised mode at every step (theory, eq. 5.11).

    In the rescaled frame one step multiplies the mode by ``G + (1 - G) c / sigma`` and adds noise of variance
    ``n^2 = eta^2 sigma'^2 (1 - sigma'^2 / sigma^2)``, with ``c^2 = sigma'^2 - n^2`` and ``sigma'`` the next level
    (0 after the last). ``eta`` 0 is DDIM; 1 is the ancestral sampler with the posterior variance.

    Args:
      gain: (..., K, B) gain G of the denoiser at each step.
      sigma: (K,) noise levels of the rescaled frame, decreasing.
      start_variance: (..., B) variance of the mode at the first step.
      eta: stochasticity of the sampler, in [0, 1].

    Returns:
      ``G^2 Var(y)``, (..., K, B).
    """
    return recursion_statistics(gain, sigma, start_variance, eta)[0]


def recursion_statistics(
    gain: jax.Array,
    sigma: jax.Array,
    start_variance: jax.Array,
    eta: float = 0.0,
    residual: ArrayLike = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Energy of the denoised mode at every step, and its inner product with its end, of a denoiser that may leave a
    residual (theory, eqs. 7.9 to 7.11): ``D = G y + r``, with r uncorrelated with the state and from step to step.

    Args:
      residual: (..., K, B) or what broadcasts: variance of r over that of the state; 0 for a linear denoiser.
      gain, sigma, start_variance, eta: see `recursion_energy`.

    Returns:
      ``E[D_k^2]`` and ``E[D_k D_{K-1}]``, (..., K, B) each.
    """
    gain, sigma = jnp.asarray(gain), jnp.asarray(sigma)
    ratio = sigma[1:] / sigma[:-1]
    fresh = eta**2 * (1 - ratio**2)  # share of the next level's variance that is drawn anew
    keep = jnp.append(ratio * jnp.sqrt(1 - fresh), 0.0).astype(gain.dtype)  # the last step goes to the clean end
    noise = jnp.append(sigma[1:] ** 2 * fresh, 0.0).astype(gain.dtype)

    gains = jnp.moveaxis(gain, -2, 0)
    rest = jnp.moveaxis(jnp.broadcast_to(jnp.asarray(residual, gain.dtype), gain.shape), -2, 0)
    start = jnp.broadcast_to(start_variance, gains.shape[1:]).astype(gain.dtype)
    energy, inner = _statistics(gains, rest, start, keep, noise)
    return jnp.moveaxis(energy, 0, -2), jnp.moveaxis(inner, 0, -2)


@jax.jit  # a loop outside of a compiled function is compiled again at every call, and none of its programs is let go
def _statistics(
    gains: jax.Array, rest: jax.Array, start: jax.Array, keep: jax.Array, noise: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The loops of `recursion_statistics` over steps, the first axis: forwards for energies, and backwards for what of
    a state is in the last denoised."""

    def forwards(variance, inputs):
        gain, rest, keep, noise = inputs
        after = ((gain + (1 - gain) * keep) ** 2 + (1 - keep) ** 2 * rest) * variance + noise
        return after, (gain**2 * variance + rest * variance, variance)

    def backwards(onward, inputs):  # `onward`: what of the next state reaches the end
        gain, rest, keep, variance = inputs
        factor = gain + (1 - gain) * keep
        return factor * onward, onward * (gain * factor + (1 - keep) * rest) * variance

    energy, variances = jax.lax.scan(forwards, start, (gains, rest, keep, noise))[1]
    before_end = (gains[:-1], rest[:-1], keep[:-1], variances[:-1])
    inner = jax.lax.scan(backwards, gains[-1], before_end, reverse=True)[1]
    return energy, jnp.concatenate([inner, energy[-1:]])
