"""Modes beyond the bands of the DCT (docs/theory.md, section 7.9): which directions, in which groups, and what the
training data have along them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from dit_jax.covariance import DataCovariance, class_directions, load_covariance
from experiments.frame.subject import Subject, model_folder
from experiments.studies.compare.settings import CompareConfig, ModesKind
from ou_theory.modes import Directions, radial_bands, rank_groups

FREQUENCIES = {"DC": (0,), "low": (1, 2), "middle": (3, 4), "high": (5, 6)}  # radial bands that the colours are told by
COLOURS = ("luminance", "chrominance")  # the first principal axis of the channels, and the other two


class DataModes(NamedTuple):
    """Directions of a network's data, B groups of them, and the variance of the data within classes."""

    directions: Directions
    names: list[str]  # (B,) of the groups
    variance: np.ndarray  # (M,) along each direction
    share: np.ndarray  # (n, B) of each principal component that lies along the directions of each group


def data_modes(kind: ModesKind, weights: str) -> DataModes:
    """The directions of a kind, of the data that a network was trained on.

    Args:
      kind: any but ``"dct"``.
      weights: folder of the network, or the name of a shipped one.

    Raises:
      ValueError: the folder does not hold what it takes, or the data have no such directions.
    """
    folder = model_folder(weights)
    found = load_covariance(folder)
    if found is None or not found.has_bases:
        raise ValueError(_missing(kind, folder, found))
    return _MAKERS[kind](found)


def check(config: CompareConfig, subject: Subject) -> None:
    """Raises ValueError if the network's folder does not hold the directions that the settings ask for."""
    del subject  # the directions are those of its folder
    if config.modes != "dct":
        data_modes(config.modes, config.weights)


def ends(kind: ModesKind, groups: int) -> tuple[int, int]:
    """First and last group of the gap: low luminance and low chrominance for colours, else the first and the last."""
    if kind == "colour":
        low = list(FREQUENCIES).index("low")
        return low, len(FREQUENCIES) + low
    return (1 if kind == "dct" else 0), groups - 1


def _principal(found: DataCovariance) -> DataModes:
    """The leading principal components, by rank."""
    assert found.components is not None
    left, _, right = np.linalg.svd(found.components, full_matrices=False)  # they are stored to three digits
    index = rank_groups(len(found.components))
    share = np.zeros((found.variance.size, index.max() + 1))
    share[np.arange(index.size), index] = 1
    return DataModes(_directions(left @ right, found, index), _ranks(index), found.variance[: index.size], share)


def _colours(found: DataCovariance) -> DataModes:
    """Every DCT coefficient on the principal axes that the channels have over the whole data."""
    assert found.colour_axes is not None
    assert found.colour_share is not None
    rows, columns, channels = found.coefficient.shape[:3]
    if channels != 3:
        raise ValueError(f"--modes colour is for images of three channels; these have {channels}")
    frequency = np.empty(found.share.shape[1], int)  # of each band
    for place, bands in enumerate(FREQUENCIES.values()):
        frequency[list(bands)] = place
    colour = np.array([0, 1, 1]) * len(FREQUENCIES)
    index = (frequency[radial_bands(rows, columns).index][..., None] + colour).reshape(-1)
    matrix = np.kron(np.eye(rows * columns), found.colour_axes.T)
    variance = np.einsum("hwcd,ca,da->hwa", found.coefficient, found.colour_axes, found.colour_axes)
    share = np.zeros((found.variance.size, index.max() + 1))
    for axis in range(channels):
        np.add.at(share.T, frequency + colour[axis], found.colour_share[..., axis].T)
    names = [f"{colour} {frequency}" for colour in COLOURS for frequency in FREQUENCIES]
    return DataModes(_directions(matrix, found, index), names, variance.reshape(-1), share)


def _classes(found: DataCovariance) -> DataModes:
    """The principal directions between the means of the classes, by rank."""
    assert found.class_mean is not None
    assert found.class_share is not None
    apart = class_directions(found.class_mean)
    if len(apart) < 2:
        raise ValueError(f"--modes class needs three classes of different means; these data have {len(apart) + 1}")
    index = rank_groups(len(apart))
    share = found.class_share @ (index[:, None] == np.arange(index.max() + 1))
    return DataModes(_directions(apart, found, index), _ranks(index), found.variance @ found.class_share, share)


_MAKERS = {"pca": _principal, "colour": _colours, "class": _classes}


def _directions(rows: np.ndarray, found: DataCovariance, index: np.ndarray) -> Directions:
    """Groups of directions that are the rows (M, n) of a matrix."""
    return Directions(rows.T.reshape(*found.coefficient.shape[:3], len(rows)).astype(np.float32), index)


def _ranks(index: np.ndarray) -> list[str]:
    first = np.searchsorted(index, np.arange(index.max() + 1)) + 1
    last = np.append(first[1:] - 1, index.size)
    return [f"{a}" if a == b else f"{a}–{b}" for a, b in zip(first, last, strict=True)]


def _missing(kind: ModesKind, folder: Path, found: DataCovariance | None) -> str:
    lacks = "no covariance of its training data" if found is None else "that of an older version, without directions"
    remedy = f"syncgap covariance {folder} IMAGES adds them"
    return f"--modes {kind} needs directions of the training data, and {folder} holds {lacks}; {remedy}"
