"""What theory says of clones of two classes, from the covariance of the data alone (docs/theory.md, section 11.3)."""

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from scipy.optimize import root_scalar

from dit_jax.covariance import DataCovariance
from ou_theory.cloning import same_cluster_probability, same_side_probability
from ou_theory.cluster_laws import Clusters

LAWS = {
    "classes": "two Gaussian classes, all directions",
    "side": "side of the leading direction",
}


def leading(variance: np.ndarray, centre: np.ndarray) -> tuple[float, np.ndarray]:
    """The largest eigenvalue of ``diag(variance) + centre centre^T`` and its unit eigenvector (n,) float64, by the root
    of ``1 = sum_i centre_i^2 / (lambda - variance_i)``.

    Args:
      variance: (n,).
      centre: (n,).
    """
    top = float(variance.max())
    size = float(centre @ centre)

    def missing(rise: float) -> float:
        return float((centre**2 / (top + rise - variance)).sum()) - 1

    if not size or missing(1e-12 * size) <= 0:  # the centre has no part along the largest variance
        return top, (np.arange(variance.size) == variance.argmax()).astype(np.float64)
    found = root_scalar(missing, bracket=(1e-12 * size, size * (1 + 1e-9)), xtol=1e-14 * size)
    rise = float(found.root)
    vector = centre / (top + rise - variance)
    return top + rise, vector / np.linalg.norm(vector)


def theory_group(found: DataCovariance) -> xr.Dataset:
    """Two classes as a Gaussian mixture with one covariance, on the principal components within classes: the variance
    of each, and half the difference of the class means along it. All in squared units of what the network sees."""
    assert found.components is not None
    assert found.class_mean is not None
    assert found.class_share is not None
    half = (found.class_mean[0] - found.class_mean[1]) / 2
    centre = np.sqrt(found.class_share[:, 0] * (half @ half))
    value, vector = leading(found.variance, centre)
    channels = found.coefficient.shape[-1]
    wide = found.components * np.sqrt(found.variance[: len(found.components), None])
    each = [np.linalg.norm(np.vstack([wide, half])[:, c::channels], 2) ** 2 for c in range(channels)]
    about = {
        "variance": "variance within classes",
        "centre": "half the distance of the class means along the component",
    }
    return xr.Dataset(
        {
            name: ("component", values, {"long_name": about[name], "units": "1"})
            for name, values in (("variance", found.variance), ("centre", centre))
        },
        coords={"component": np.arange(centre.size)},
        attrs={
            "leading": value,
            "leading_centre": float(vector @ centre),
            "leading_within": float(vector**2 @ found.variance),
            "one_channel": float(max(each)),
        },
    )


def laws(data: xr.Dataset, sigma2: np.ndarray) -> np.ndarray:
    """phi (law, ...) of the mixture by the laws of `LAWS`, at noise variances (...)."""
    with jax.enable_x64(True):
        noise = jnp.asarray(sigma2, jnp.float64)
        law = Clusters(jnp.asarray(data.variance.values), jnp.asarray(data.centre.values)[None])
        classes = same_cluster_probability(law.kappa(noise)[..., 0])
        side = same_side_probability(data.leading_centre, data.leading_within, noise)
        return np.stack([np.asarray(classes), np.asarray(side)])


def speciation_level(eigenvalue: float) -> float:
    """Log-SNR at the time ``t_S = log(eigenvalue) / 2`` of Biroli et al., where the noise variance is the eigenvalue
    less 1; in the units in which the eigenvalue is taken."""
    return -float(np.log(eigenvalue - 1)) if eigenvalue > 1 else np.inf
