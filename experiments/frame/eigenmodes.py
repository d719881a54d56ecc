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
from ou_theory.modes import Bands, Directions

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


class FineDirections(NamedTuple):
    """The same of another basis than the DCT: groups of its directions, M in all, each within one of its own groups."""

    directions: Directions
    averaging: np.ndarray  # (directions, M) float32: mean over the members of each group
    band: np.ndarray  # (M,) of each group
    count: np.ndarray  # (M,) members of each group

    def coefficients(self, dct: jax.Array) -> jax.Array:
        """Coefficients (..., directions) of DCT coefficients (..., H, W, C)."""
        return self.directions.coefficients(dct)

    def mean(self, x: jax.Array) -> jax.Array:
        """Mean over the members of each group, (..., M), of values (..., directions)."""
        return jnp.matmul(x, self.averaging, precision="highest")

    def share(self) -> np.ndarray:
        """See `Eigenmodes.share`."""
        return band_share(self.band, self.count)


def band_share(band: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(M, B) float64: what groups of `count` members count for in the mean over their bands; columns sum to 1."""
    members = (np.asarray(band)[:, None] == np.arange(np.max(band) + 1)) * np.asarray(count, np.float64)[:, None]
    return members / members.sum(0)


def eigenmodes(bands: Bands, channels: int, covariance: DataCovariance | None) -> Eigenmodes:
    """The groups of every band by the variance of the data; each band is one group where that is not known."""
    rotation = np.broadcast_to(np.eye(channels), (*bands.index.shape, channels, channels))
    index, variance = np.repeat(np.asarray(bands.index).reshape(-1), channels), None
    if covariance is not None:
        variance, rotation = np.linalg.eigh(covariance.coefficient)
    return Eigenmodes(rotation.astype(np.float32), *_by_variance(index, variance))


def fine_directions(directions: Directions, variance: np.ndarray) -> FineDirections:
    """The groups of directions by the variance (directions,) of the data."""
    return FineDirections(directions, *_by_variance(directions.index, variance))


def _by_variance(index: np.ndarray, variance: np.ndarray | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Averaging, band and count of groups by variance within bands, from the band (n,) of each mode."""
    group = index * GROUPS
    if variance is not None:
        for band in range(index.max() + 1):
            members = np.flatnonzero(index == band)
            order = members[np.argsort(-variance.reshape(-1)[members], kind="stable")]
            group[order] += np.arange(len(order)) * GROUPS // len(order)
    names, of = np.unique(group, return_inverse=True)
    count = np.bincount(of)
    averaging = (of[:, None] == np.arange(len(names))) / count
    return averaging.astype(np.float32), names // GROUPS, count
