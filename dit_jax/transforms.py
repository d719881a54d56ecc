"""Training data made from any image set by a named transformation of its statistics (docs/theory.md, section 9.4).

    natural     the images as they are
    whitened    every DCT coefficient of every channel has mean 0 and variance 1, channels are uncorrelated
    reversed    whitened, then each coefficient gets the colour covariance of the coefficient of mirrored rank
    power:A     whitened, then coefficients at radius r get variance proportional to max(r, 1)^-A
    permuted    one fixed random permutation of the pixel sites
    gaussian    draws of a Gaussian with the mean and covariance of the set

A training run mirrors natural images at random. A mirror image is as likely as the image itself then, and the
transformed data keep that: each transformation is made from the *doubled* set, the images and their mirror images
behind them. Such data are not mirrored again while a model is trained, since a permuted image is no longer mirrored
by reversing its columns.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.fft import dctn, idctn

from dit_jax.images import DataError, ImageSet, standardize, to_pixels
from dit_jax.training import Photographs, TrainConfig, batch_indices

TRANSFORM_SEED = 0  # apart from the seed of training, so that runs of any training seed see the same data
# Purposes of random numbers, keyed (seed, purpose, ...). They are large: training keys its epochs by (seed, epoch).
PERMUTATION = 0x7065726D
GAUSSIAN = 0x67617573

RECIPE = 1  # part of the digest; raised when a change of the code changes what a name means
CHUNK = 1024  # images that are in double precision at a time
SINGULAR = 1e-9  # least variance of a colour direction; rounding to 8 bits alone leaves about 2e-5, to float32 1e-14
WEAKEST = 1e-12  # least variance of a coefficient that float32 images of variance 1 can hold

DOES = {
    "whitened": "every DCT coefficient and channel has mean 0 and variance 1; channels are uncorrelated in each",
    "reversed": "whitened, then the colour covariance of the coefficient of mirrored rank by radius",
    "power": "whitened, then variance proportional to max(r, 1)^-A at radius r = sqrt(i^2 + j^2), 1 on average",
    "permuted": "one fixed permutation of the pixel sites, the same for all images and channels",
    "gaussian": "Gaussian draws with the set's mean and covariance; labels are kept but carry no information",
}
KNOWN = ("natural", "whitened", "reversed", "power:A", "permuted", "gaussian")


@dataclass(frozen=True, eq=False)
class TransformedImages:
    """A transformed image set in epochs without replacement; make it with `training_data`."""

    images: ImageSet  # what it was made from
    name: str  # as `transformation_name` returns it
    x: np.ndarray  # (M, n, n, 3) float32 as the network sees them; M = 2 N, or N for gaussian
    labels: np.ndarray  # (M,) int32, index into class_names

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.images.class_names

    @property
    def shape(self) -> tuple[int, ...]:
        return self.x.shape[1:]

    @property
    def may_mirror(self) -> bool:
        return False  # mirror images are in the data already

    def batch(self, config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
        chosen = batch_indices(config, len(self.x), step)
        return self.x[chosen], self.labels[chosen]

    def preparation(self) -> dict:
        """The image set's record, and under "transformation" what was made of it.

        Its SHA-256 is over the image set's, the name, the seed and the version of the recipe. It is not over the
        transformed numbers: their last digits depend on the machine's linear algebra, and a run may be resumed on
        another machine.
        """
        told = f"{self.images.digest} {self.name} seed {TRANSFORM_SEED} recipe {RECIPE}"
        return self.images.preparation() | {
            "transformation": {
                "name": self.name,
                "seed": TRANSFORM_SEED,
                "does": DOES[self.name.partition(":")[0]],
                "images": len(self.x),
                "mirror images": "in the set before it is transformed; none are made in training",
                "sha256": hashlib.sha256(told.encode()).hexdigest(),
            }
        }

    def pictures(self, x: np.ndarray) -> np.ndarray:
        """Pixels (..., n, n, 3) uint8, by the linear map that belongs to the natural images."""
        return to_pixels(x, self.images.mean, self.images.std)


def transformation_name(text: str) -> str:
    """The one spelling of a transformation's name: ``power:3.0`` and ``power:+3`` are ``power:3``.

    Raises:
      ValueError: there is no such transformation, or the exponent of ``power`` is not a finite number.
    """
    kind, colon, tail = text.partition(":")
    if kind == "power":
        try:
            exponent = float(tail)
        except ValueError:
            exponent = math.nan
        if not math.isfinite(exponent):
            raise ValueError(f"the exponent of {text!r} is not a finite number; write power:A, as in power:1.5")
        return f"power:{np.format_float_positional(exponent + 0.0, trim='-')}"  # + 0.0 makes -0 a 0
    if colon or kind not in KNOWN:
        raise ValueError(f"no transformation {text!r}; there are {', '.join(KNOWN)} (A a number, as in power:1.5)")
    return kind


def training_data(images: ImageSet, name: str = "natural") -> Photographs | TransformedImages:
    """The images as training data under a named transformation.

    Besides `images` and the result it needs a few hundred images in double precision; `gaussian` also needs three
    matrices of (3 n^2)^2 doubles and the time to diagonalise one.

    Args:
      images: N images of n x n pixels.
      name: one of `KNOWN`, with a number for A.

    Returns:
      `Photographs` for natural; else `TransformedImages` with 2 N images, or N for gaussian. Both are in units in
      which the image set has variance 1.

    Raises:
      ValueError: the name is none, or the exponent asks for variances that single precision cannot hold.
      DataError: the transformation whitens, and the set does not vary in all three colours in some coefficient.
    """
    name = transformation_name(name)
    if name == "natural":
        return Photographs(images)
    gains = power_variance(images.pixels.shape[1], float(name[6:])) if name.startswith("power:") else None
    x = doubled(images)
    labels = np.concatenate([images.labels, images.labels])
    if name == "permuted":
        _permute(x)
    elif name == "gaussian":
        x, labels = _gaussian(x, len(images.labels)), images.labels
    else:
        mean, covariance = _moments(x)
        _check_colours(covariance, name)
        maps = _matrix_power(covariance, -0.5)
        if name == "reversed":
            maps = _matrix_power(mirrored_rank(covariance), 0.5) @ maps
        elif gains is not None:
            maps *= np.sqrt(gains)[..., None, None]
        _recolour(x, mean, maps)
    return TransformedImages(images, name, x, labels)


def doubled(images: ImageSet) -> np.ndarray:
    """Standardised images and, behind them, their mirror images: (2 N, n, n, 3) float32."""
    count = len(images.pixels)
    x = np.empty((2 * count, *images.pixels.shape[1:]), np.float32)
    for part in _chunks(count):
        x[part] = standardize(images.pixels[part], images.mean, images.std)
    x[count:] = x[:count, :, ::-1]
    return x


def covariance_by_coefficient(x: np.ndarray) -> np.ndarray:
    """Covariance between the channels in each coefficient of the orthonormal 2-d DCT, the mean over the set removed.

    Args:
      x: images (N, H, W, C).

    Returns:
      (H, W, C, C) float64, in squared units of `x`, with 1 / N and not 1 / (N - 1). Its diagonals are the variances
      that the theory of commitment takes as the data's spectrum.

    Raises:
      ValueError: `x` is not of that form, or holds no image.
    """
    if x.ndim != 4 or not len(x):
        raise ValueError(f"expected at least one image, in the form (N, H, W, C), got an array {x.shape}")
    return _moments(x)[1]


def power_variance(size: int, exponent: float) -> np.ndarray:
    """Variance (size, size) of each DCT coefficient, proportional to max(r, 1)^-exponent and 1 on average.

    Raises:
      ValueError: a variance is below 1e-12, which single precision cannot hold beside the others.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        logs = -exponent * np.log(np.maximum(np.sqrt(squared_radius(size)), 1))
        variance = np.exp(logs - logs.max())
    variance /= variance.mean()
    if not variance.min() >= WEAKEST:  # a NaN counts, too: the logarithms themselves overflowed
        raise ValueError(
            f"power:{exponent:g} at size {size} gives coefficients variances that single precision cannot hold beside "
            f"each other; take an exponent nearer to 0"
        )
    return variance


def mirrored_rank(values: np.ndarray) -> np.ndarray:
    """Values by coefficient (n, n, ...) with their order by radius turned round.

    Coefficients are sorted by radius, ties by their flat index; of n^2 of them, rank k gets the value of rank
    n^2 - 1 - k.
    """
    size = values.shape[0]
    order = np.argsort(squared_radius(size), axis=None, kind="stable")
    flat = values.reshape(size * size, *values.shape[2:])
    turned = np.empty_like(flat)
    turned[order] = flat[order[::-1]]
    return turned.reshape(values.shape)


def squared_radius(size: int) -> np.ndarray:
    """i^2 + j^2 of each coefficient, (size, size) int: whole numbers, so that equal radii are exactly equal."""
    index = np.arange(size)
    return index[:, None] ** 2 + index[None] ** 2


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK))


def _dct(x: np.ndarray) -> np.ndarray:
    """As `ou_theory.modes.dct2`, but in double precision whatever the setting of jax and the device."""
    return np.asarray(dctn(x, type=2, norm="ortho", axes=(1, 2)))


def _moments(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean image (H, W, C) and the channels' covariance in each of its DCT coefficients (H, W, C, C), float64."""
    mean = x.mean(0, dtype=np.float64)
    total = np.zeros((*x.shape[1:], x.shape[-1]))
    for part in _chunks(len(x)):
        channels_first = np.moveaxis(_dct(x[part] - mean), 0, -1)  # (H, W, C, chunk)
        total += channels_first @ np.swapaxes(channels_first, -1, -2)
    return mean, total / len(x)


def _check_colours(covariance: np.ndarray, name: str) -> None:
    """Whether the colour covariance of every coefficient can be inverted."""
    least = np.linalg.eigvalsh(covariance)[..., 0]
    if least.min() < SINGULAR:
        i, j = np.unravel_index(least.argmin(), least.shape)
        raise DataError(
            f"{name} cannot be made of these images: it whitens the three colours of each DCT coefficient, and in "
            f"{np.sum(least < SINGULAR)} of {least.size}, ({i}, {j}) among them, a colour direction has no variance of "
            f"its own. That is so for grey images and for very few. Take more images, in colour, or a transformation "
            f"that does not whiten: permuted or gaussian"
        )


def _matrix_power(covariance: np.ndarray, power: float) -> np.ndarray:
    """Symmetric power of covariance matrices (..., C, C)."""
    values, vectors = np.linalg.eigh(covariance)
    return (vectors * np.maximum(values, 0)[..., None, :] ** power) @ np.swapaxes(vectors, -1, -2)


def _recolour(x: np.ndarray, mean: np.ndarray, maps: np.ndarray) -> None:
    """Takes the mean from the images `x` and multiplies their coefficients by `maps` (n, n, 3, 3), in place."""
    for part in _chunks(len(x)):
        coefficients = np.einsum("ijcd,nijd->nijc", maps, _dct(x[part] - mean))
        x[part] = idctn(coefficients, type=2, norm="ortho", axes=(1, 2))


def _permute(x: np.ndarray) -> None:
    """Permutes the pixel sites of the images `x`, in place."""
    sites = x.reshape(len(x), -1, x.shape[-1])
    order = np.random.default_rng([TRANSFORM_SEED, PERMUTATION]).permutation(sites.shape[1])
    for part in _chunks(len(x)):
        sites[part] = sites[part][:, order]


def _gaussian(x: np.ndarray, count: int) -> np.ndarray:
    """`count` draws of the Gaussian that has the mean and covariance of the images `x`."""
    flat = x.reshape(len(x), -1)
    mean = flat.mean(0, dtype=np.float64)
    covariance = np.zeros((mean.size, mean.size))
    for part in _chunks(len(x)):
        centred = flat[part] - mean
        covariance += centred.T @ centred
    # the symmetric root is unique, for singular covariances too: no choice of eigenvectors shows in the draws
    root = _matrix_power(covariance / len(x), 0.5)
    draws = np.empty((count, mean.size), np.float32)
    for part in _chunks(count):
        keys = ([TRANSFORM_SEED, GAUSSIAN, i] for i in range(part.start, part.stop))
        normal = np.stack([np.random.default_rng(key).standard_normal(mean.size) for key in keys])
        draws[part] = mean + normal @ root
    return draws.reshape(count, *x.shape[1:])
