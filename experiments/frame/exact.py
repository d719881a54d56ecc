"""The covariance of a network's data as a group of a run, and what an exact denoiser of Gaussian data makes of it."""

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.covariance import DataCovariance
from ou_theory.clock import Clock
from ou_theory.gain_model import wiener_gain
from ou_theory.recursion import recursion_statistics

TRANSFORMED = {
    "natural": "the photographs as they are",
    "whitened": "photographs whose every DCT coefficient has variance 1",
    "reversed": "photographs whose spectrum is turned round, low for high",
    "permuted": "photographs whose pixels are permuted, the same way in all",
    "gaussian": "Gaussian images of the photographs' mean and covariance",
}


def data_in_words(transformation: str) -> str:
    """What a network was trained on, by the name of the transformation that its covariance records."""
    if transformation in TRANSFORMED:
        return TRANSFORMED[transformation]
    return f"photographs with a spectrum proportional to r^−{float(transformation.removeprefix('power:')):g}".replace(
        "−-", ""
    )


def covariance_group(found: DataCovariance, share: np.ndarray | None = None) -> xr.Dataset:
    """The principal components of a network's data, as a run stores them: variances (component,) and their shares
    (component, band), in the bands of the DCT unless those in other groups of modes are given."""
    about = "share of the component that lies in the band"
    share = found.share if share is None else share
    transformation = (found.about["data"].get("transformation") or {}).get("name", "natural")
    return xr.Dataset(
        {
            "variance": ("component", found.variance, {"long_name": "within-class variance", "units": "1"}),
            "share": (("component", "band"), share, {"long_name": about, "units": "1"}),
        },
        coords={"component": np.arange(found.variance.size), "band": np.arange(share.shape[1])},
        attrs={"transformation": transformation, "images": found.about["images"]},
    )


def exact_statistics(
    rho: np.ndarray, variance: np.ndarray, share: np.ndarray, clock: Clock, eta: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Energy of the denoised difference and its inner product with its end, (..., C, K, B) float64 each, of an exact
    denoiser of Gaussian data whose difference mode is multiplied by a gain.

    Each principal component is denoised by ``rho`` times its Wiener gain and keeps its own course, so a band is the sum
    over what of the components lies in it (docs/theory.md, eq. 9.7).

    Args:
      rho: (C,) gains of the couplings, the same at all steps; or (C, K), by step. 1 is no coupling.
      variance: (..., n) of the components.
      share: (n, B) of each component in each band.
      eta: stochasticity of the sampler: 0 for DDIM, 1 for the ancestral sampler.
    """
    with jax.enable_x64(True):
        sigma = jnp.asarray(clock.sigma, jnp.float64)
        wiener = wiener_gain(jnp.asarray(variance, jnp.float64)[..., None, None, :], sigma[:, None] ** 2)
        by_step = jnp.asarray(rho, jnp.float64).reshape(len(rho), -1, 1)
        gain = by_step * wiener
        start = jnp.full(gain.shape[:-2] + gain.shape[-1:], 1 / clock.alpha_bar[0])
        energy, inner = recursion_statistics(gain, sigma, start, eta)
        return np.asarray(energy) @ share, np.asarray(inner) @ share
