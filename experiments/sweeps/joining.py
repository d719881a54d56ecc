"""Labelled arrays of many cells as one: the axes of the sweep in front, the cells' own dimensions joined by label."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

MOST = 2**29  # bytes of all values together; the largest variables are left out beyond
SEEN = 9  # significant digits by which labels are told apart


class Joined:
    """Variables of all cells, filled one cell after another.

    A dimension of the cells has the labels of all of them (an outer join); dimensions without labels are joined by
    position. Labels that increase in every cell increase in the result. What a cell lacks is NaN, or an empty text.

    Attributes:
      left_out: variables that are not in the result, and why.
    """

    def __init__(self, axes: Sequence[str], shape: Sequence[int], most: int = MOST) -> None:
        """
        Args:
          axes, shape: names and sizes of the sweep's axes.
          most: bytes of all values together.
        """
        self.axes, self.shape, self.most = tuple(axes), tuple(shape), most
        self.left_out: dict[str, str] = {}
        self._labels: dict[str, list[Any]] = {}
        self._place: dict[str, dict[tuple[str, int], int]] = {}  # of a label in its dimension
        self._named: set[str] = set()  # dimensions with labels
        self._falling: set[str] = set()  # those whose labels do not increase
        self._values: dict[str, np.ndarray] = {}
        self._dims: dict[str, tuple[str, ...]] = {}
        self._coordinates: set[str] = set()
        self._fractions: set[str] = set()  # variables that are not whole numbers
        self._attrs: dict[str, dict[str, Any]] = {}

    def add(self, place: tuple[int, ...], cell: xr.Dataset) -> None:
        """Fills in a cell, in memory.

        Args:
          place: index on every axis.
          cell: its variables, numbers or texts.
        """
        where = self.declare(cell)
        for key, variable in cell.variables.items():
            name = str(key)
            if name in self._values and name not in cell.dims:
                own = self._dims[name]
                inside = np.ix_(*(where[dim] for dim in own)) if own else ()
                self._values[name][(*place, ...)][inside] = variable.transpose(*own).values

    def declare(self, cell: xr.Dataset) -> dict[str, np.ndarray]:
        """Makes room for what a cell has. Returns the places of its labels, by dimension."""
        where = {str(dim): self._placed(str(dim), cell) for dim in cell.dims}
        for key, variable in cell.variables.items():
            name = str(key)
            self._attrs.setdefault(name, dict(variable.attrs))
            if name in cell.dims or name in self.left_out:
                continue
            if variable.dtype.kind not in "fiubUTO":
                self.left_out[name] = "it is neither numbers nor text"
            elif set(self._dims.setdefault(name, tuple(map(str, variable.dims)))) != set(variable.dims):
                self._drop(name, "its dimensions differ between cells")
            elif name not in self._values:
                fill = np.array("", object) if variable.dtype.kind in "UTO" else np.array(np.nan)
                self._values[name] = np.full((0,) * (len(self.shape) + variable.ndim), fill, fill.dtype)
            elif (self._values[name].dtype == object) != (variable.dtype.kind in "UTO"):
                self._drop(name, "it is text in some cells and numbers in others")
            if name in cell.coords:
                self._coordinates.add(name)
            if variable.dtype.kind not in "iu":
                self._fractions.add(name)
        self._make_room()
        return where

    def dataset(self) -> xr.Dataset:
        """All that was filled in. A coordinate that all cells share lies along its own dimensions alone."""
        data, coords = {}, {}
        for name, values in self._values.items():
            dims, values = (*self.axes, *self._dims[name]), _text(values)
            if name in self._coordinates:
                common = _common(values, len(self.axes))
                if common is not None:
                    dims, values = self._dims[name], common
                    if name not in self._fractions and not np.isnan(common).any():
                        values = common.astype(int)
                coords[name] = (dims, values, self._attrs[name])
            else:
                data[name] = (dims, values, self._attrs[name])
        for dim in self._named:
            coords[dim] = (dim, one_type(self._labels[dim]), self._attrs.get(dim, {}))
        found = xr.Dataset(data, coords)
        for dim in sorted(self._named - self._falling):
            labels = found[dim].values
            if labels.dtype.kind != "U" and np.any(np.diff(labels) < 0):
                found = found.isel({dim: np.argsort(labels, kind="stable")})
        return found

    def _placed(self, dim: str, cell: xr.Dataset) -> np.ndarray:
        """Places of a cell's labels along a dimension; new labels get new places."""
        labels = np.arange(cell.sizes[dim])
        if dim in cell.coords:
            self._named.add(dim)
            labels = cell[dim].values
            numbers = labels.dtype.kind in "fiu"
            if not numbers or (np.diff(labels.astype(float)) <= 0).any():
                self._falling.add(dim)
        places, known = self._place.setdefault(dim, {}), self._labels.setdefault(dim, [])
        found, seen = [], dict[str, int]()
        for label in labels.tolist():
            word = f"{label:.{SEEN}g}" if isinstance(label, float) else str(label)
            seen[word] = count = seen.get(word, 0) + 1  # a label that a cell has twice stays two
            if (word, count) not in places:
                places[word, count] = len(known)
                known.append(label)
            found.append(places[word, count])
        return np.array(found, int)

    def _make_room(self) -> None:
        """Enlarges all arrays to the labels that are known now."""
        sizes = {name: [*self.shape, *(len(self._labels[dim]) for dim in self._dims[name])] for name in self._values}
        bytes_of = {name: int(np.prod(size)) * self._values[name].itemsize for name, size in sizes.items()}
        while sum(bytes_of.values()) > self.most:
            largest = max(bytes_of, key=lambda name: bytes_of[name])
            reason = f"with {bytes_of.pop(largest) / 2**20:.0f} MiB it is too large; the cells' own runs have it"
            self._drop(largest, reason)
        for name, values in self._values.items():
            if values.shape != (size := tuple(sizes[name])):
                larger = np.full(size, "" if values.dtype == object else np.nan, values.dtype)
                larger[tuple(map(slice, values.shape))] = values
                self._values[name] = larger

    def _drop(self, name: str, why: str) -> None:
        self._values.pop(name, None)
        self.left_out[name] = why


def one_type(values: Sequence[Any]) -> np.ndarray:
    """Values (n,) of one kind: numbers, or texts if not all are numbers."""
    if all(isinstance(value, int | float) and not isinstance(value, bool) for value in values):
        return np.array(values) if len(values) else np.empty(0, str)
    return np.array([f"{value:g}" if isinstance(value, float) else str(value) for value in values], str)


def _text(values: np.ndarray) -> np.ndarray:
    return values.astype(str) if values.dtype == object else values


def _common(values: np.ndarray, axes: int) -> np.ndarray | None:
    """What all cells have where they have something; None if two differ."""
    flat = values.reshape(int(np.prod(values.shape[:axes])), *values.shape[axes:])
    there = flat != "" if flat.dtype.kind == "U" else ~np.isnan(flat)
    first = np.take_along_axis(flat, there.argmax(0)[None], 0)
    return first[0] if np.all((flat == first) | ~there) else None
