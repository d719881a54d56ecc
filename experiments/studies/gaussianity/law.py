"""Gaussians that stand for the data, and what each explains of the exact denoiser of the first (docs/theory.md, 9.6).

Images are DCT coefficients here, flattened, n = H W C numbers.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.covariance import DataCovariance
from dit_jax.diffusion import Denoiser, DenoiserOutput
from dit_jax.transforms import mirrored_rank
from experiments.studies.gaussianity.settings import BANDS, COEFFICIENTS, COVARIANCE, GAUSSIANS, REVERSED, WHITE
from ou_theory.clock import Clock
from ou_theory.modes import Bands, dct2, idct2


class Gaussians(NamedTuple):
    """Gaussian laws of one mean by class, in the order of `GAUSSIANS`."""

    basis: np.ndarray  # (G, n, n) float32, principal axes in columns
    variance: np.ndarray  # (G, n) float32 along them
    mean: np.ndarray  # (classes, n) float32


def rebuilt(found: DataCovariance) -> tuple[np.ndarray, np.ndarray]:
    """The covariance of the data as far as a model folder has it: axes (n, n) in columns, variances (n,).

    The leading principal components are stored. What is left of the covariance of each DCT coefficient's channels
    stands for the rest, projected on what is orthogonal to them; coefficients are uncorrelated in it.
    """
    assert found.components is not None
    n, leading = found.variance.size, len(found.components)
    left, _, right = np.linalg.svd(found.components.T, full_matrices=False)
    axes = left @ right  # the nearest orthonormal ones: they are stored with three digits
    own = (axes * found.variance[:leading]) @ axes.T
    rest = _of_coefficients(found.coefficient - _blocks(own, found.coefficient.shape))
    projection = np.eye(n) - axes @ axes.T
    # the null space of the projection is pushed below everything else, to be told from it
    shift = 2 * np.abs(rest).sum(1).max() + 1
    variance, others = np.linalg.eigh(projection @ rest @ projection - shift * axes @ axes.T)
    kept = slice(None, leading - 1, -1)
    return (
        np.concatenate([axes, others[:, kept]], 1),
        np.concatenate([found.variance[:leading], np.maximum(variance[kept], 0)]),
    )


def gaussians(
    found: DataCovariance, bands: Bands, *, full: np.ndarray | None = None, mean: np.ndarray | None = None
) -> Gaussians:
    """The laws of `GAUSSIANS`.

    Args:
      full: (n, n) covariance within classes, in place of what can be rebuilt.
      mean: (classes, n) of the classes, in place of the stored ones.
    """
    blocks = found.coefficient if full is None else _blocks(full, found.coefficient.shape)
    if full is None:
        axes, variance = rebuilt(found)
    else:
        variance, axes = np.linalg.eigh(full)
    by_coefficient = np.trace(blocks, axis1=-2, axis2=-1) / blocks.shape[-1]  # (H, W)
    band = np.array([by_coefficient[bands.index == b].mean() for b in range(len(bands))])
    channels = blocks.shape[-1]
    laws = {
        COVARIANCE: (axes, np.maximum(variance, 0)),
        COEFFICIENTS: _principal(blocks),
        BANDS: (np.eye(variance.size), np.repeat(band[bands.index].reshape(-1), channels)),
        WHITE: (np.eye(variance.size), np.full(variance.size, by_coefficient.mean())),
        REVERSED: _principal(mirrored_rank(blocks)),
    }
    basis, spread = zip(*(laws[name] for name in GAUSSIANS), strict=True)
    center = found.class_mean if mean is None else mean
    return Gaussians(*(np.asarray(v, np.float32) for v in (np.stack(basis), np.stack(spread), center)))


def denoised(laws: Gaussians, y: jax.Array, sigma2: jax.Array, labels: jax.Array, which: slice | int) -> jax.Array:
    """Posterior means (G, R, N, n), or (R, N, n) of one law, of rescaled states (R, N, n) in DCT coefficients."""
    mean, basis, variance = jnp.asarray(laws.mean)[labels], laws.basis[which], laws.variance[which]
    along = jnp.einsum("rpn,...nm->...rpm", y - mean, basis, precision="highest")
    gain = variance / (variance + sigma2)
    return mean + jnp.einsum("...rpm,...nm->...rpn", along * gain[..., None, None, :], basis, precision="highest")


def exact_denoiser(laws: Gaussians, clock: Clock, shape: tuple[int, int, int]) -> Denoiser:
    """The posterior mean of the first law, as a denoiser of variance-preserving states (R, N, H, W, C)."""

    def denoise(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
        scale = jnp.asarray(clock.alpha_bar**-0.5, x.dtype)[step]
        y = dct2(scale * x).reshape(*x.shape[:2], -1)
        found = denoised(laws, y, jnp.asarray(clock.sigma**2, x.dtype)[step], labels, 0)
        return DenoiserOutput(idct2(found.reshape(*x.shape[:2], *shape)))

    return denoise


def closed_form(laws: Gaussians, sigma: np.ndarray, bands: Bands) -> dict[str, np.ndarray]:
    """What the laws miss of the exact denoiser of the first one, at its own noised draws, float64, by band: `error`
    (G, L, B), and `variance` and `score_variance` (L, B); see `VARIABLES` of the measurements."""
    basis, spread = np.asarray(laws.basis, np.float64), np.asarray(laws.variance, np.float64)
    own, channels = spread[0], laws.variance.shape[1] // bands.index.size
    member = (np.repeat(bands.index.reshape(-1), channels)[:, None] == np.arange(len(bands))).astype(np.float64)
    weights = member / member.sum(0)
    onto = [b.T @ basis[0] for b in basis]

    def by_band(gain):  # (n, n): of a map in coordinates of the first law's axes, whose noised variances it bears
        return np.square(gain).sum(1) @ weights

    error, variance, score = [], [], []
    for level in np.asarray(sigma, np.float64):
        size = np.sqrt(own + level**2)
        exact = own / size**2
        of_exact = basis[0] * (exact * size)
        each = [b @ ((s / (s + level**2))[:, None] * o) * size for b, s, o in zip(basis, spread, onto, strict=True)]
        error.append([by_band(one - of_exact) for one in each])
        variance.append(by_band(of_exact))
        score.append(by_band(basis[0] * ((exact - 1) * size)))
    found = {"error": np.swapaxes(error, 0, 1), "variance": np.array(variance), "score_variance": np.array(score)}
    return {name: np.asarray(value) for name, value in found.items()}


def _blocks(matrix: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(H, W, C, C) between the channels of each coefficient, of a covariance (n, n)."""
    height, width, channels, _ = shape
    each = np.arange(height * width)
    return matrix.reshape(each.size, channels, each.size, channels)[each, :, each].reshape(shape)


def _of_coefficients(blocks: np.ndarray) -> np.ndarray:
    """The covariance (n, n) of uncorrelated coefficients with these blocks (H, W, C, C)."""
    height, width, channels, _ = blocks.shape
    each = np.arange(height * width)
    matrix = np.zeros((each.size, channels, each.size, channels))
    matrix[each, :, each] = blocks.reshape(-1, channels, channels)
    return matrix.reshape(each.size * channels, -1)


def _principal(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Axes (n, n) and variances (n,) of uncorrelated coefficients with these blocks."""
    variance, axes = np.linalg.eigh(blocks)
    return _of_coefficients(axes), np.maximum(variance, 0).reshape(-1)
