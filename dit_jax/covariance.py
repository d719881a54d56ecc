"""The covariance of the data that a model was trained on, kept in its folder: what theory needs of the data.

A pair of replicas shares its class, so this is the covariance within classes, the mean over classes. A Gaussian with it
is denoised by a linear map whose principal components are those of the data; docs/theory.md, section 9.5.
"""

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.fft import dctn

from dit_jax.disk import CheckpointError, replace_synced
from dit_jax.images import ImageSet
from dit_jax.training import Photographs
from dit_jax.transforms import TransformedImages, doubled, training_data
from ou_theory.modes import radial_bands

FILE = "covariance.npz"
CHUNK = 1024  # images in double precision at a time
MOST = 4096  # numbers of an image: its covariance then takes 134 MB, and diagonalising it a few times that
LARGEST = 2**24  # bytes that the arrays of a stored covariance may take; a folder from elsewhere could claim any number
LEADING = 63  # principal components, and class directions, kept at most: six groups of ranks 1, 2-3, ..., 32-63

_STORED = {"variance": np.float32, "share": np.float32, "coefficient": np.float32}
_BASES = {"components": np.float16, "class_mean": np.float16, "class_share": np.float16}
_BASES |= {"colour_axes": np.float32, "colour_share": np.float16}  # files of older versions have none of these


class DataCovariance(NamedTuple):
    """Within-class covariance of a model's training data, all float64, in squared units of what the network sees.

    An image is n = H W C numbers here, its DCT coefficients, flattened. The last five are None in files of older
    versions; `has_bases` tells.
    """

    variance: np.ndarray  # (n,) of the principal components, decreasing
    share: np.ndarray  # (n, B) of each component that lies in each band of `radial_bands`; rows sum to 1
    coefficient: np.ndarray  # (H, W, C, C) between the channels of each DCT coefficient
    about: dict[str, Any]  # which data: how they were prepared, and how many images
    components: np.ndarray | None = None  # (at most 63, n) the leading components, of unit length
    class_mean: np.ndarray | None = None  # (classes, n) mean of each class that occurs
    class_share: np.ndarray | None = None  # (n, D) of each component along each of `class_directions`
    colour_axes: np.ndarray | None = None  # (C, C) principal axes of the channels, in columns, by falling variance
    colour_share: np.ndarray | None = None  # (n, B, C) of each component in each band and along each of these axes

    @property
    def has_bases(self) -> bool:
        """Whether the directions are there, and not the variances alone."""
        return self.components is not None

    def band_variance(self) -> np.ndarray:
        """(B,) mean variance of a coefficient of each band."""
        size, channels = self.coefficient.shape[1:3]
        count = radial_bands(size, size).count * channels
        return self.variance @ self.share / count


def class_directions(class_mean: np.ndarray) -> np.ndarray:
    """Principal directions (D, n) float64 between classes of means (classes, n), each class counting alike. They are
    orthonormal, and the first tells most. D is at most the number of classes less one, and at most 63."""
    apart = class_mean - class_mean.mean(0)
    _, size, directions = np.linalg.svd(apart, full_matrices=False)
    kept = np.count_nonzero(size > 1e-3 * size.max(initial=0)) if np.any(size) else 0  # means are kept to three digits
    return directions[: min(kept, len(class_mean) - 1, LEADING)]


def within_class(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Covariance (n, n) float64 of the DCT coefficients of images (N, H, W, C), each class about its own mean, the mean
    over the classes that occur; n = H W C, in the order of the flattened coefficients.

    Raises:
      ValueError: `x` is not of that form, or `labels` do not fit it.
    """
    if x.ndim != 4 or not len(x) or labels.shape != x.shape[:1]:
        raise ValueError(f"expected images (N, H, W, C) and labels (N,), got {x.shape} and {labels.shape}")
    classes = np.unique(labels)
    total = np.zeros((x[0].size,) * 2)
    for label in classes:
        members = np.flatnonzero(labels == label)
        mean = x[members].mean(0, dtype=np.float64)
        within = np.zeros_like(total)
        for first in range(0, len(members), CHUNK):
            modes = dctn(x[members[first : first + CHUNK]] - mean, type=2, norm="ortho", axes=(1, 2))
            modes = np.asarray(modes).reshape(len(modes), -1)
            within += modes.T @ modes
        total += within / len(members)
    return total / len(classes)


def class_means(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Means (classes, n) float64 of the DCT coefficients of images (N, H, W, C) of each class that occurs."""
    means = np.stack([x[labels == label].mean(0, dtype=np.float64) for label in np.unique(labels)])
    return np.asarray(dctn(means, type=2, norm="ortho", axes=(1, 2))).reshape(len(means), -1)


def with_mirrors(data: Photographs | TransformedImages) -> tuple[np.ndarray, np.ndarray]:
    """Images (N, H, W, C) float32 and labels (N,) of training data, with the mirror images that training makes."""
    if isinstance(data, TransformedImages):
        return data.x, data.labels
    return doubled(data.images), np.concatenate([data.images.labels] * 2)


def data_covariance(data: ImageSet | Photographs | TransformedImages) -> DataCovariance:
    """The covariance of training data, mirror images counted where training makes them.

    Raises:
      ValueError: an image has more than 4096 numbers.
    """
    data = Photographs(data) if isinstance(data, ImageSet) else data
    size, _, channels = data.shape
    if size * size * channels > MOST:
        raise ValueError(f"images of {size} x {size} x {channels} numbers are too large for this; {MOST} is the most")
    x, labels = with_mirrors(data)
    bands = radial_bands(size, size)
    covariance = within_class(x, labels)
    variance, components = np.linalg.eigh(covariance)
    order = np.argsort(-variance, kind="stable")
    variance, components = np.maximum(variance[order], 0), components[:, order]
    in_band = (bands.index.reshape(-1, 1) == np.arange(len(bands))).repeat(channels, 0)
    blocks = covariance.reshape(size, size, channels, size, size, channels)
    rows, columns = np.indices((size, size))
    coefficient = blocks[rows, columns, :, rows, columns]
    about = {"data": data.preparation(), "images": len(x)}
    squares = components.reshape(size * size, channels, -1)
    axes = np.linalg.eigh(coefficient.sum((0, 1)))[1][:, ::-1]
    along = np.square(np.einsum("pcn,cd->pdn", squares, axes))
    means = _rounded(class_means(x, labels), np.float16)  # the directions are those of the means as they are stored
    return DataCovariance(
        variance,
        (components**2).T @ in_band,
        coefficient,
        about,
        components=components[:, :LEADING].T,
        class_mean=means,
        class_share=np.square(components.T @ class_directions(means).T),
        colour_axes=axes,
        colour_share=np.einsum("pdn,pb->nbd", along, in_band[::channels].astype(float)),
    )


def save_covariance(folder: str | Path, found: DataCovariance) -> None:
    """Writes a covariance into a model folder, in one move."""
    folder, content = Path(folder), io.BytesIO()
    kinds = _STORED | (_BASES if found.has_bases else {})
    arrays = {name: getattr(found, name).astype(dtype) for name, dtype in kinds.items()}
    np.savez_compressed(content, about=np.array(json.dumps(found.about)), **arrays)
    partial = folder / f".{FILE}.partial"
    try:
        partial.write_bytes(content.getvalue())
        replace_synced(partial, folder / FILE)
    finally:
        partial.unlink(missing_ok=True)


def load_covariance(folder: str | Path) -> DataCovariance | None:
    """The covariance in a model folder, None if there is none.

    Raises:
      CheckpointError: it cannot be read.
    """
    path = Path(folder) / FILE
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise ValueError("it claims more bytes than any covariance has")
        with np.load(path, allow_pickle=False) as stored:
            names = [*_STORED, *(_BASES if "components" in stored else ())]
            arrays = {name: np.asarray(stored[name], np.float64) for name in names}
            about = json.loads(str(stored["about"]))
        found = DataCovariance(**arrays, about=about)
        size, channels = found.coefficient.shape[1:3]
        fits = found.variance.shape == (size * size * channels,) == found.share.shape[:1] and _bases_fit(found)
        if not fits or not all(np.isfinite(v).all() for v in arrays.values()):
            raise ValueError("its arrays do not fit each other, or are not finite")
    except Exception as error:  # a damaged archive raises many kinds
        raise CheckpointError(f"{path} cannot be used ({error}); syncgap covariance makes it again") from error
    return found


def _bases_fit(found: DataCovariance) -> bool:
    """Whether the shapes of the directions fit those of the variances."""
    shapes = {name: np.shape(getattr(found, name)) for name in _BASES if getattr(found, name) is not None}
    if not shapes:
        return True
    n, channels = found.variance.size, found.coefficient.shape[2]
    means = shapes.get("class_mean", ())
    return shapes == {
        "components": (min(n, LEADING), n),
        "class_mean": (*means[:1], n),
        "class_share": (n, len(class_directions(found.class_mean))) if found.class_mean is not None else (),
        "colour_axes": (channels, channels),
        "colour_share": (n, found.share.shape[1], channels),
    }


def _rounded(values: np.ndarray, dtype: type) -> np.ndarray:
    return values.astype(dtype).astype(np.float64)


def covariance_for(manifest: Mapping[str, Any], images: ImageSet) -> DataCovariance:
    """The covariance of the data that a model with this manifest was trained on, from its images.

    Raises:
      ValueError: the manifest records other images.
    """
    record = manifest.get("data") or {}
    if record.get("sha256") not in (None, images.digest):
        raise ValueError(
            f"the model was trained on other images ({record['sha256'][:12]}) than these ({images.digest[:12]})"
        )
    return data_covariance(training_data(images, (record.get("transformation") or {}).get("name", "natural")))
