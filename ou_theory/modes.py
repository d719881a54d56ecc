"""Modes of an image: the orthonormal DCT-II, and groups of coefficients that are measured together (docs/theory.md,
section 3): radial frequency bands, or groups of the directions of any other orthonormal basis."""

import dataclasses
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


@lru_cache
def _dct_matrix(size: int) -> np.ndarray:
    """Orthonormal DCT-II as a matrix (frequency, position), float64."""
    frequency, position = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.sqrt(2 / size) * np.cos(np.pi * (2 * position + 1) * frequency / (2 * size))
    matrix[0] /= np.sqrt(2)
    return matrix


def _transform(x: jax.Array, rows: np.ndarray, columns: np.ndarray) -> jax.Array:
    x = jnp.asarray(x)
    dtype = jnp.result_type(x, 1.0)  # whole numbers are promoted, floating types kept
    along_rows, along_columns = jnp.asarray(rows, dtype), jnp.asarray(columns, dtype)
    return jnp.einsum("ih,jw,...hwc->...ijc", along_rows, along_columns, x, precision="highest")


def dct2(x: jax.Array) -> jax.Array:
    """Orthonormal 2-d DCT-II of images (..., H, W, C), of the same shape (theory, eq. 3.1). White noise of unit
    variance has unit variance in every coefficient. Two small matrix products beat a fast transform at these sizes."""
    return _transform(x, _dct_matrix(x.shape[-3]), _dct_matrix(x.shape[-2]))


def idct2(x: jax.Array) -> jax.Array:
    """Inverse of `dct2`."""
    return _transform(x, _dct_matrix(x.shape[-3]).T, _dct_matrix(x.shape[-2]).T)


def pair_modes(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """DCT coefficients of the common mode ``(x_A + x_B) / sqrt(2)`` and of the difference mode
    ``(x_A - x_B) / sqrt(2)``, each (..., H, W, C) (theory, eq. 1.2).

    Args:
      x: (2, ..., H, W, C), the replica axis in front.

    Raises:
      ValueError: there are not two replicas.
    """
    if x.shape[0] != 2:
        raise ValueError(f"a pair has two replicas, got {x.shape[0]}")
    a, b = dct2(x)
    return (a + b) * np.sqrt(0.5).item(), (a - b) * np.sqrt(0.5).item()


class BandWeights(NamedTuple):
    """As much of `Bands` as `band_mean` needs, for programs to which bands are an argument."""

    averaging: jax.Array | np.ndarray  # (H, W, B) weights of the mean over each band


@dataclass(frozen=True, eq=False)
class Bands:
    """A partition of the DCT coefficients of an H x W image; make it with `radial_bands`.

    Attributes:
      index: (H, W) int, band of each coefficient.
      radius: (B,) centre of each band, in units of the Nyquist frequency of an axis; 0 for DC.
    """

    index: np.ndarray
    radius: np.ndarray

    def __len__(self) -> int:
        return self.radius.size

    @cached_property
    def count(self) -> np.ndarray:
        """(B,) coefficients per band and channel."""
        return np.bincount(self.index.ravel(), minlength=len(self))

    @cached_property
    def averaging(self) -> np.ndarray:
        """(H, W, B) weights of the mean over each band, float64."""
        return (self.index[..., None] == np.arange(len(self))) / self.count

    @property
    def weights(self) -> BandWeights:
        """The bands as an argument of a program, float32."""
        return BandWeights(self.averaging.astype(np.float32))

    def coefficients(self, dct: jax.Array) -> jax.Array:
        """The coefficients that are grouped, (..., H, W, C), of DCT coefficients: themselves."""
        return dct

    def each(self, values: jax.Array) -> jax.Array:
        """Values (..., H, W, C) by coefficient: the mean over channels, which share their band, (..., H, W)."""
        return values.mean(-1)

    def mean(self, values: jax.Array) -> jax.Array:
        """`band_mean`: (..., H, W, C) -> (..., B)."""
        return band_mean(values, self)

    def with_index(self, index: np.ndarray) -> "Bands":
        """The same bands with another assignment (H, W) of coefficients to them."""
        return dataclasses.replace(self, index=index)


def radial_bands(height: int, width: int, num: int = 6) -> Bands:
    """Bands by radius ``sqrt((i / H)^2 + (j / W)^2)``: DC in a band of its own, then `num` annuli of equal width
    (theory, section 3).

    Raises:
      ValueError: `num` is less than 1, or a band would be empty.
    """
    if num < 1:
        raise ValueError(f"num bands must be at least 1, got {num}")
    radius = np.hypot(np.arange(height)[:, None] / height, np.arange(width)[None] / width)
    edges = np.linspace(0, radius.max(), num + 1)
    index = np.searchsorted(edges[:-1], radius, side="left")  # annulus b is (edges[b - 1], edges[b]]
    bands = Bands(index, np.append(0.0, (edges[:-1] + edges[1:]) / 2))
    if np.any(bands.count == 0):
        empty = ", ".join(map(str, np.flatnonzero(bands.count == 0)))
        raise ValueError(f"{num} bands are too many for a {height} x {width} image: band {empty} would be empty")
    return bands


def band_mean(coefficients: jax.Array, bands: Bands | BandWeights) -> jax.Array:
    """Mean over the coefficients of each band and over channels: (..., H, W, C) -> (..., B).

    The mean of squared coefficients is the band energy; that of the product of two sets is their inner product per
    coefficient (theory, eq. 3.3).
    """
    weights = jnp.asarray(bands.averaging, coefficients.dtype)
    return jnp.einsum("...hwc,hwb->...b", coefficients, weights, precision="highest") / coefficients.shape[-1]


@dataclass(frozen=True, eq=False)
class Directions:
    """Groups of orthonormal directions in the space of images, in the place of `Bands` (theory, eq. 3.4).

    Attributes:
      matrix: (H, W, C, M) float32, the DCT coefficients of each direction. M may be less than H W C: what lies along
        none of the directions is not measured.
      index: (M,) int, group of each direction; no group is empty.
    """

    matrix: np.ndarray
    index: np.ndarray

    def __len__(self) -> int:
        return int(self.index.max()) + 1

    @cached_property
    def count(self) -> np.ndarray:
        """(B,) directions per group."""
        return np.bincount(self.index)

    @cached_property
    def averaging(self) -> np.ndarray:
        """(M, B) weights of the mean over each group, float64."""
        return (self.index[:, None] == np.arange(len(self))) / self.count

    def coefficients(self, dct: jax.Array) -> jax.Array:
        """Coefficients (..., M) along the directions, of DCT coefficients (..., H, W, C)."""
        return jnp.einsum("...hwc,hwcm->...m", dct, jnp.asarray(self.matrix, dct.dtype), precision="highest")

    def images(self, coefficients: jax.Array) -> jax.Array:
        """The images (..., H, W, C) that have these coefficients (..., M), and nothing along other directions."""
        matrix = jnp.asarray(self.matrix, coefficients.dtype)
        return idct2(jnp.einsum("...m,hwcm->...hwc", coefficients, matrix, precision="highest"))

    def each(self, values: jax.Array) -> jax.Array:
        """Values (..., M) by direction, as they are."""
        return values

    def mean(self, values: jax.Array) -> jax.Array:
        """Mean over the directions of each group: (..., M) -> (..., B)."""
        return jnp.matmul(values, jnp.asarray(self.averaging, values.dtype), precision="highest")


def rank_groups(count: int) -> np.ndarray:
    """Groups (count,) of ranks that double in size: 1, 2-3, 4-7, 8-15 and so on; the last may be cut short."""
    return np.array([rank.bit_length() - 1 for rank in range(1, count + 1)], np.int64)
