"""Training images: a folder, or a zip, of class folders, decoded, cropped and resized once into memory."""

import hashlib
import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp"}


class DataError(ValueError):
    """Images that cannot be trained on."""


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


def load_images(source: str | Path, size: int, progress: bool = True) -> ImageSet:
    """Reads ``<class>/<image>`` files in sorted order, so that the result depends on the files alone.

    Args:
      source: a folder, or a .zip file, of class folders.
      size: side of the square images.

    Raises:
      DataError: the source is missing, holds no images in class folders, or one of its images cannot be read.
    """
    source = Path(source)
    if not source.exists():
        raise DataError(f"no such folder or zip file: {source}")
    files = _files_in_folder(source) if source.is_dir() else _files_in_zip(source)
    if not files:
        raise DataError(f"{source}: no images ({', '.join(sorted(SUFFIXES))}) in class folders <class>/<image>")
    names = sorted({name.parent.name for name in files})
    pixels = np.empty((len(files), size, size, 3), np.uint8)
    labels = np.array([names.index(name.parent.name) for name in files], np.int32)
    reader = _read(source, files)
    for i, (name, data) in enumerate(tqdm(reader, total=len(files), desc="reading images", disable=not progress)):
        try:
            with Image.open(io.BytesIO(data)) as image:
                fitted = ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BOX)
        except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
            raise DataError(f"{source}: {name} is not a readable image ({error})") from error
        pixels[i] = np.asarray(fitted)
    return image_set(pixels, labels, tuple(names), str(source))


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


def _is_image(name: PurePosixPath) -> bool:
    return name.suffix.lower() in SUFFIXES and len(name.parts) >= 2 and not name.name.startswith(".")


def _files_in_folder(folder: Path) -> list[PurePosixPath]:
    names = (PurePosixPath(*path.relative_to(folder).parts) for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in names if _is_image(name))


def _files_in_zip(path: Path) -> list[PurePosixPath]:
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(name for name in map(PurePosixPath, archive.namelist()) if _is_image(name))
    except zipfile.BadZipFile as error:
        raise DataError(f"{path} is neither a folder nor a readable zip file ({error})") from error


def _read(source: Path, files: list[PurePosixPath]) -> Iterator[tuple[PurePosixPath, bytes]]:
    if source.is_dir():
        for name in files:
            yield name, (source / name).read_bytes()
        return
    with zipfile.ZipFile(source) as archive:
        for name in files:
            try:
                yield name, archive.read(str(name))
            except zipfile.BadZipFile as error:
                raise DataError(f"{source}: {name} is damaged ({error})") from error


def image_grid(images: np.ndarray, columns: int, gap: int = 1) -> np.ndarray:
    """Images (N, H, W, 3) uint8 laid out in rows of `columns` on white: (rows (H + gap) + gap, ..., 3) uint8."""
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * (height + gap) + gap, columns * (width + gap) + gap, channels), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = (i // columns) * (height + gap) + gap, (i % columns) * (width + gap) + gap
        grid[top : top + height, left : left + width] = image
    return grid
