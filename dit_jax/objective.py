"""The training loss: the squared error of the prediction, plus the variational bound of the learned variance.

The bound (Nichol & Dhariwal, arXiv 2102.09672) trains the variance channels only; the mean in it is held constant.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Prediction
from ou_theory.clock import Clock


class Loss(NamedTuple):
    """Per-sample terms, each (N,); `vb` in bits per dimension, zero without a learned variance."""

    mse: jax.Array
    vb: jax.Array


def _level(values: np.ndarray, step: jax.Array, x: jax.Array) -> jax.Array:
    """Per-sample constants (N, 1, 1, 1) in the dtype of `x`, gathered from a float64 table."""
    return jnp.asarray(values, x.dtype)[step][:, None, None, None]


def add_noise(x0: jax.Array, noise: jax.Array, step: jax.Array, clock: Clock) -> jax.Array:
    """The noisy state ``sqrt(ab) x0 + sqrt(1 - ab) noise`` of clean images (N, H, W, C) at sampler steps (N,)."""
    ab = clock.alpha_bar
    return _level(np.sqrt(ab), step, x0) * x0 + _level(np.sqrt(1 - ab), step, x0) * noise


def target(x0: jax.Array, noise: jax.Array, step: jax.Array, clock: Clock, prediction: Prediction) -> jax.Array:
    """What the first channels of the network should predict, (N, H, W, C) (theory, eq. 1.3)."""
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    ab = clock.alpha_bar
    return _level(np.sqrt(ab), step, x0) * noise - _level(np.sqrt(1 - ab), step, x0) * x0


def denoised_from(out: jax.Array, x: jax.Array, alpha_bar: jax.Array, prediction: Prediction) -> jax.Array:
    """The predicted clean image, from the network's prediction `out` and the state `x` that it saw at signal power
    `alpha_bar` (theory, eq. 1.3)."""
    if prediction == "epsilon":
        return jnp.sqrt(1 / alpha_bar) * x - jnp.sqrt(1 / alpha_bar - 1) * out
    if prediction == "x0":
        return out
    return jnp.sqrt(alpha_bar) * x - jnp.sqrt(1 - alpha_bar) * out


def posterior_tables(clock: Clock) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Tables of the posterior q(x_next | x, x0), each (n,) float64 in step order.

    Returns:
      the weight of x0 and the weight of x in the mean; the log of the variance, with that of the last step (0) replaced
      by its neighbour; the log of the upper variance beta (theory, eq. 2.7).
    """
    ab, after, beta = clock.alpha_bar, clock.alpha_bar_next, clock.betas
    weight_x0 = beta * np.sqrt(after) / (1 - ab)
    weight_x = (1 - after) * np.sqrt(1 - beta) / (1 - ab)
    variance = beta * (1 - after) / (1 - ab)
    if variance.size > 1:
        variance[-1] = variance[-2]
    else:
        variance[-1] = beta[-1]
    return weight_x0, weight_x, np.log(variance), np.log(beta)


def losses(
    out: jax.Array, x0: jax.Array, noise: jax.Array, step: jax.Array, clock: Clock, prediction: Prediction
) -> Loss:
    """Loss terms of raw network outputs.

    Args:
      out: (N, H, W, C) or, with a learned variance, (N, H, W, 2C): the network at `add_noise(x0, noise, step)`.
      x0, noise: (N, H, W, C).
      step: (N,) sampler steps of `clock`.
    """
    channels = x0.shape[-1]
    mean_part, variance_part = out[..., :channels], out[..., channels:]
    mse = jnp.square(target(x0, noise, step, clock, prediction) - mean_part).mean((1, 2, 3))
    if not variance_part.size:
        return Loss(mse, jnp.zeros_like(mse))
    x = add_noise(x0, noise, step, clock)
    denoised = denoised_from(jax.lax.stop_gradient(mean_part), x, _level(clock.alpha_bar, step, x), prediction)
    weight_x0, weight_x, low, high = (_level(table, step, x) for table in posterior_tables(clock))
    fraction = (variance_part + 1) / 2
    log_variance = fraction * high + (1 - fraction) * low
    true_mean = weight_x0 * x0 + weight_x * x
    model_mean = weight_x0 * denoised + weight_x * x
    kl = 0.5 * (
        log_variance
        - low
        - 1
        + jnp.exp(low - log_variance)
        + jnp.square(true_mean - model_mean) * jnp.exp(-log_variance)
    )
    decoder = -_discrete_log_likelihood(x0, model_mean, 0.5 * log_variance)
    nats = jnp.where((step == len(clock) - 1)[:, None, None, None], decoder, kl)
    return Loss(mse, nats.mean((1, 2, 3)) / np.log(2.0))


def _discrete_log_likelihood(x: jax.Array, mean: jax.Array, log_scale: jax.Array) -> jax.Array:
    """Log probability of the 1/255 bin around `x` (8-bit pixels on [-1, 1]) under a Gaussian, tails included."""

    def cdf(z):  # tanh approximation of the normal distribution function
        return 0.5 * (1 + jnp.tanh(np.sqrt(2 / np.pi) * (z + 0.044715 * z**3)))

    inverse = jnp.exp(-log_scale)
    above = cdf(inverse * (x - mean + 1 / 255))
    below = cdf(inverse * (x - mean - 1 / 255))
    mass = jnp.where(x < -0.999, above, jnp.where(x > 0.999, 1 - below, above - below))
    return jnp.log(jnp.maximum(mass, 1e-12))
