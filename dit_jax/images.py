"""Training images: a folder, or a zip, of class folders, decoded, cropped and resized once into memory."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dit_jax.image_decoding import decode
from dit_jax.image_files import find_images
from dit_jax.image_listing import DataError


@dataclass(frozen=True)
class ImageSet:
    """Images as 8-bit RGB, and the linear map that the network sees them through.

    ``x = (pixel / 127.5 - 1 - mean) / std`` with one mean per channel and one std for all: mean 0 and variance 1
    over the set, the ratios of the channels' variances kept.
    """

    pixels: np.ndarray  # (N, size, size, 3) uint8
    labels: np.ndarray  # (N,) int32, index into class_names
    class_names: tuple[str, ...]
    mean: np.ndarray  # (3,) float64
    std: float
    digest: str  # SHA-256 over pixels and labels

    def preparation(self) -> dict:
        """What a manifest needs to say about the data."""
        return {
            "images": len(self.pixels),
            "size": self.pixels.shape[1],
            "class_names": list(self.class_names),
            "class_counts": np.bincount(self.labels, minlength=len(self.class_names)).tolist(),
            "resize": "centre crop to a square, area average (PIL BOX)",
            "scaling": "x = (pixel / 127.5 - 1 - mean) / std",
            "mean": [float(m) for m in self.mean],
            "std": float(self.std),
            "sha256": self.digest,
        }


def standardize(pixels: np.ndarray, mean, std) -> np.ndarray:
    """8-bit pixels (..., 3) -> float32 of zero mean and unit variance."""
    return ((pixels / 127.5 - 1 - np.asarray(mean)) / std).astype(np.float32)


def to_pixels(x: np.ndarray, mean, std) -> np.ndarray:
    """Inverse of `standardize`, clipped and rounded to uint8."""
    return np.clip(np.round((np.asarray(x, np.float64) * std + np.asarray(mean) + 1) * 127.5), 0, 255).astype(np.uint8)


def load_images(
    source: str | Path,
    size: int,
    progress: bool = True,
    *,
    labels: Sequence[str] | None = None,
    tell: Callable[[str], object] | None = None,
) -> ImageSet:
    """Reads ``<class>/<image>`` files in sorted order, so that the result depends on the files alone.

    `find_images` says which files are read and what the classes are, `decode` how an image is read.

    Args:
      source: a folder, or a .zip file, of class folders.
      size: side of the square images.
      labels: class folders in the order of their labels; others are left out. By default all, sorted.
      tell: is given what was found, in lines, before the images are read.

    Raises:
      DataError: as `find_images`; one of the images cannot be read; all together take more memory than there is.
    """
    if size < 1:
        raise DataError(f"the side of the images must be at least 1 pixel, got {size}")
    files = find_images(source, labels)
    if tell is not None:
        tell(files.describe())
    try:
        pixels = np.empty((len(files), size, size, 3), np.uint8)
    except MemoryError as error:
        raise DataError(
            f"{source}: {len(files)} images of {size} x {size} pixels take {len(files) * size**2 * 3:,} bytes of "
            f"memory, more than there is; take a smaller size or fewer images"
        ) from error
    reader = tqdm(files.read(), total=len(files), desc="reading images", disable=not progress)
    for i, (path, content) in enumerate(reader):
        try:
            pixels[i] = decode(content, size)
        except ValueError as error:
            raise DataError(f"{source}: {path} is not a readable image ({error})") from error
    return image_set(pixels, np.array(files.labels, np.int32), files.class_names, str(source))


def image_set(pixels: np.ndarray, labels: np.ndarray, class_names: tuple[str, ...], source: str) -> ImageSet:
    """Images (N, size, size, 3) uint8 with labels (N,) int32, their mean, spread and digest.

    Raises:
      DataError: all images of `source` are the same flat colour.
    """
    scaled = pixels / np.float32(127.5) - np.float32(1)
    mean = scaled.mean((0, 1, 2), dtype=np.float64)
    std = float(np.sqrt(((scaled - mean.astype(np.float32)) ** 2).mean(dtype=np.float64)))
    if std == 0:
        raise DataError(f"{source}: all images are the same flat colour")
    digest = hashlib.sha256(pixels.tobytes() + labels.tobytes()).hexdigest()
    return ImageSet(pixels, labels, class_names, mean, std, digest)


def image_grid(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Images (N, H, W, 3) uint8 laid out in rows of `columns` on white: (rows (H + gap) + gap, ..., 3) uint8."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        grid[top : top + height, left : left + width] = image
    return grid
