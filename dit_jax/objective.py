"""The training loss: the squared error of the prediction, plus the variational bound of the learned variance.

The bound (Nichol & Dhariwal, arXiv 2102.09672) trains the variance channels only; the mean in it is held constant.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import Prediction
from ou_theory.clock import Clock
from ou_theory.paths import ProbabilityPath


class Loss(NamedTuple):
    """Per-sample terms, each (N,); `vb` in bits per dimension, zero without a learned variance."""

    mse: jax.Array
    vb: jax.Array


def at_step(table: np.ndarray, step: jax.Array, x: jax.Array) -> jax.Array:
    """Constants of a float64 table in the dtype of `x`: of one step for all of `x`, or of steps (N,) for images
    `x` (N, H, W, C)."""
    values = jnp.asarray(table, x.dtype)[step]
    return values[:, None, None, None] if values.ndim else values


def add_noise(x0: jax.Array, noise: jax.Array, step: jax.Array, clock: Clock) -> jax.Array:
    """The noisy state ``sqrt(ab) x0 + sqrt(1 - ab) noise`` of clean images (N, H, W, C) at sampler steps (N,)."""
    ab = clock.alpha_bar
    return at_step(np.sqrt(ab), step, x0) * x0 + at_step(np.sqrt(1 - ab), step, x0) * noise


def network_input(x: jax.Array, step: jax.Array, clock: Clock) -> jax.Array:
    """What the network is given in place of the variance-preserving state `x` (theory, eq. 2.9)."""
    return x if clock.path is None else at_step(clock.scale, step, x) * x


def target(x0: jax.Array, noise: jax.Array, step: jax.Array, clock: Clock, prediction: Prediction) -> jax.Array:
    """What the first channels of the network should predict, (N, H, W, C) (theory, eq. 1.3 and 2.8).

    Raises:
      ValueError: a velocity is asked for on the clock of a schedule, which has no path.
    """
    if prediction == "epsilon":
        return noise
    if prediction == "x0":
        return x0
    ab = clock.alpha_bar
    if prediction == "score":
        return -noise / at_step(_noise_weight(clock), step, x0)
    if prediction == "velocity":
        from_x0, from_noise = _path(clock).rates(clock.timesteps)
    else:
        from_x0, from_noise = -np.sqrt(1 - ab), np.sqrt(ab)
    return at_step(from_noise, step, x0) * noise + at_step(from_x0, step, x0) * x0


def _path(clock: Clock) -> ProbabilityPath:
    if clock.path is None:
        raise ValueError("a velocity is defined on a path of flow matching: use the clock of one, see path_clock")
    return clock.path


def _noise_weight(clock: Clock) -> np.ndarray:
    """(n,) standard deviation of the noise in what the network sees."""
    return clock.scale * np.sqrt(1 - clock.alpha_bar)


def denoising_weights(clock: Clock, prediction: Prediction) -> tuple[np.ndarray, np.ndarray]:
    """The denoised image is linear in the variance-preserving state and the network's output: its weights of both,
    (n,) float64 each (theory, eq. 1.3 and 2.10). They are tables in float64, as ``1 / alpha_bar - 1`` would lose three
    digits at the clean end in float32."""
    ab = clock.alpha_bar
    if prediction == "epsilon":
        return np.sqrt(1 / ab), -np.sqrt(1 / ab - 1)
    if prediction == "score":
        return np.sqrt(1 / ab), np.sqrt(1 / ab - 1) * _noise_weight(clock)
    if prediction == "x0":
        return np.zeros_like(ab), np.ones_like(ab)
    if prediction == "v":
        return np.sqrt(ab), -np.sqrt(1 - ab)
    from_state, from_velocity = _path(clock).denoising_weights(clock.timesteps)
    return from_state * clock.scale, from_velocity


def denoised_at(clock: Clock, step: jax.Array, x: jax.Array, out: jax.Array, prediction: Prediction) -> jax.Array:
    """The clean image (..., H, W, C) that the network's output `out` (..., H, W, C) predicts.

    Args:
      step: of the clock, () for all of `x`, or (N,) for images `x` (N, H, W, C).
      x: variance-preserving state.
      prediction: what `out` is, see `DiTConfig.prediction`.

    Raises:
      ValueError: `out` is a velocity, and the clock that of a schedule, which has no path.
    """
    if prediction == "x0":
        return out
    from_state, from_output = denoising_weights(clock, prediction)
    return at_step(from_state, step, x) * x + at_step(from_output, step, x) * out


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
    error = target(x0, noise, step, clock, prediction) - mean_part
    if prediction == "score":  # in units of the noise, as in SiT: the score itself grows without bound
        error *= at_step(_noise_weight(clock), step, x0)
    mse = jnp.square(error).mean((1, 2, 3))
    if not variance_part.size:
        return Loss(mse, jnp.zeros_like(mse))
    x = add_noise(x0, noise, step, clock)
    denoised = denoised_at(clock, step, x, jax.lax.stop_gradient(mean_part), prediction)
    weight_x0, weight_x, low, high = (at_step(table, step, x) for table in posterior_tables(clock))
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
