"""Closed forms of the exact Gaussian denoiser under the ancestral sampler's finite steps, for any step noise."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import Denoiser, DenoiserOutput
from dit_jax.objective import posterior_tables
from experiments.frame.gaussian import ancestral_steps, wiener_gains
from ou_theory.clock import Clock
from ou_theory.modes import Bands, dct2, idct2


def step_maps(clock: Clock, noise: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gaussian modes under an ancestral sampler with a given step noise, in the rescaled frame.

    Args:
      noise: (K,) variance of the noise that each step adds, before rescaling.
      variance: (...) of the modes.

    Returns:
      Wiener gains (K, ...), what each step multiplies a mode by (K, ...), and variances of the states (K + 1, ...).
    """
    added = noise / clock.alpha_bar_next
    added[-1] = 0
    factors, _ = ancestral_steps(variance, clock)
    states = [np.full(np.shape(variance), 1 / clock.alpha_bar[0])]
    for factor, more in zip(factors, added, strict=True):
        states.append(factor**2 * states[-1] + more)
    return wiener_gains(variance, clock), factors, np.stack(states)


def matched_variance(clock: Clock, noise: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Variances (...) of the Gaussian modes for which the sampler ends with the variances `end` (...). The two differ,
    because finite steps do not keep a law's variance."""
    grid = np.geomspace(1e-8, 1e8, 6401)
    ends = step_maps(clock, noise, grid)[2][-1]
    return np.exp(np.interp(np.log(np.maximum(end, 1e-12)), np.log(ends), np.log(grid)))


def step_theory(clock: Clock, noise: np.ndarray, covariance: np.ndarray) -> dict[str, np.ndarray]:
    """Exact values of the measurements for the Gaussian law that ends with these covariances of channels (..., B, C, C)
    under a sampler with this step noise (K,).

    Returns:
      q, clones, mmse: the three curves (..., K, B), which differ only because steps are finite.
      spread, aligned: variance of predictions from noised ends, and covariance with them, over the ends' variance.
      linear: ``1 - error / variance`` (..., K, B) of the ends' best linear filter: a lower bound of 1 - mmse / Var.
      kept: (..., B) the ends' variance as a share of that of the law.
    """
    end = np.maximum(np.linalg.eigvalsh(covariance), 1e-12)
    law = matched_variance(clock, noise, end)
    gain, factor, state = step_maps(clock, noise, law)
    sigma2 = clock.sigma.reshape(-1, *(1,) * end.ndim) ** 2
    to_end = np.cumprod(factor[::-1] ** 2, 0)[::-1]
    shares = {
        "q": gain**2 * state[:-1],
        "clones": to_end * state[:-1],
        "mmse": end - (1 - gain) ** 2 * end - gain**2 * sigma2,
        "spread": gain**2 * (end + sigma2),
        "aligned": gain * end,
        "linear": end**2 / (end + sigma2),
    }
    total = end.sum(-1)
    found = {name: np.moveaxis(value.sum(-1) / total, 0, -2) for name, value in shares.items()}
    return {**found, "kept": total / law.sum(-1)}


def gaussian_filters(clock: Clock, noise: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Exact denoisers (K, B, C, C) of the Gaussian law of `step_theory`, as matrices over channels."""
    values, vectors = np.linalg.eigh(covariance)
    law = matched_variance(clock, noise, values)
    gain = law / (law + clock.sigma[:, None, None] ** 2)
    return np.einsum("bci,kbi,bdi->kbcd", vectors, gain, vectors)


def gaussian_denoiser(clock: Clock, bands: Bands, filters: jax.Array, noise: jax.Array) -> Denoiser:
    """The denoiser of channel filters (K, B, C, C) by band, for images of mean 0, with this step noise (K,)."""
    low, high = (jnp.asarray(table, jnp.float32) for table in posterior_tables(clock)[2:])
    fraction = (jnp.log(noise) - low) / (high - low)

    def denoise(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
        y = dct2(x * jnp.asarray(clock.alpha_bar**-0.5, x.dtype)[step])
        denoised = jnp.einsum("...hwc,hwcd->...hwd", y, filters[step][bands.index], precision="highest")
        return DenoiserOutput(idct2(denoised), jnp.broadcast_to(fraction[step], x.shape))

    return denoise
