"""Modes finer than bands: each band is split into groups of modes of similar data variance, one gain for a group.

The colours of a photograph differ in variance by more than neighbouring frequencies do, so a band is no single mode
(docs/theory.md, section 7.7). Each DCT coefficient is therefore rotated to the principal axes of its channels, and the
modes of a band are sorted by variance into a few groups of equal size.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.covariance import DataCovariance
from ou_theory.modes import Bands

GROUPS = 6  # of a band, at most; more do not change the levels of a Gaussian by 0.1 nats


class Eigenmodes(NamedTuple):
    """Groups of modes, M in all, each within one band."""

    rotation: np.ndarray  # (H, W, C, C) float32, principal axes of the channels in columns
    averaging: np.ndarray  # (H * W * C, M) float32: mean over the members of each group
    band: np.ndarray  # (M,) of each group
    count: np.ndarray  # (M,) members of each group

    def coefficients(self, dct: jax.Array) -> jax.Array:
        """DCT coefficients (..., H, W, C) on the principal axes of their channels, the same shape."""
        return jnp.einsum("...hwc,hwcd->...hwd", dct, self.rotation, precision="highest")

    def mean(self, x: jax.Array) -> jax.Array:
        """Mean over the members of each group, (..., M), of values on the principal axes (..., H, W, C)."""
        return jnp.matmul(x.reshape(*x.shape[:-3], -1), self.averaging, precision="highest")

    def share(self) -> np.ndarray:
        """(M, B) float64: what each group counts for in the mean over its band; columns sum to 1."""
        return band_share(self.band, self.count)


def band_share(band: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(M, B) float64: what groups of `count` members count for in the mean over their bands; columns sum to 1."""
    members = (np.asarray(band)[:, None] == np.arange(np.max(band) + 1)) * np.asarray(count, np.float64)[:, None]
    return members / members.sum(0)


def eigenmodes(bands: Bands, channels: int, covariance: DataCovariance | None) -> Eigenmodes:
    """The groups of every band by the variance of the data; each band is one group where that is not known."""
    rotation = np.broadcast_to(np.eye(channels), (*bands.index.shape, channels, channels))
    index = np.repeat(np.asarray(bands.index).reshape(-1), channels)
    group = index * GROUPS
    if covariance is not None:
        variance, rotation = np.linalg.eigh(covariance.coefficient)
        for band in range(len(bands)):
            members = np.flatnonzero(index == band)
            order = members[np.argsort(-variance.reshape(-1)[members], kind="stable")]
            group[order] += np.arange(len(order)) * GROUPS // len(order)
    names, of = np.unique(group, return_inverse=True)
    count = np.bincount(of)
    averaging = (of[:, None] == np.arange(len(names))) / count
    return Eigenmodes(rotation.astype(np.float32), averaging.astype(np.float32), names // GROUPS, count)
