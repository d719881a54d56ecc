"""Arrays of a zarr group on disk: which chunks should exist, whether they can be read, and the form of values."""

import itertools
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr
from zarr.codecs import Crc32cCodec, ZstdCodec

ARRAYS = "arrays"  # attribute of a group: the names of its arrays, so that a missing one is noticed
NOT_DAMAGE = (MemoryError, PermissionError)  # errors of the machine, which say nothing of the file
CODECS = (ZstdCodec(), Crc32cCodec())  # of every chunk; the checksum covers the compressed bytes


def _arrays(group: Path) -> Sequence[tuple[Path, zarr.Array, int | None]]:
    """Every array of a group, its folder, and the axis of pairs along which it is written block by block. The axis
    is None for coordinates, which are written at once."""
    descriptions = (group / "zarr.json", *sorted(group.glob("*/zarr.json")))
    return _described(group, tuple((path, path.read_bytes()) for path in descriptions if path.is_file()))


@lru_cache(maxsize=16)
def _described(group: Path, descriptions: Hashable) -> Sequence[tuple[Path, zarr.Array, int | None]]:
    """See `_arrays`. Opening arrays takes longer than reading small ones, and a group is looked at many times; it is
    opened again if a description has changed."""
    opened = zarr.open_group(group, mode="r")
    arrays = dict(opened.arrays())
    named = {name for array in arrays.values() for name in str(array.attrs.get("coordinates", "")).split()}
    named |= set(str(opened.attrs.get("coordinates", "")).split())
    found = []
    for name, array in arrays.items():
        dims = getattr(array.metadata, "dimension_names", None) or ()
        coordinate = name in named or name in dims
        found.append((group / name, array, dims.index("pair") if "pair" in dims and not coordinate else None))
    return found


def _checked(array: zarr.Array) -> bool:
    """Whether the chunks of an array carry checksums. Runs with checksums write every chunk of a finished block."""
    return any(isinstance(codec, Crc32cCodec) for codec in array.compressors)


def readable(group: Path) -> bool:
    """Whether the descriptions of a group and of its arrays can be read, and no array is missing."""
    try:
        found = {path.name for path, *_ in _arrays(group)}
        named: Any = zarr.open_group(group, mode="r").attrs.get(ARRAYS, found)
        return found == set(named)
    except NOT_DAMAGE:
        raise
    except Exception:  # zarr raises many kinds
        return False


def blocks_of(group: Path) -> list[int]:
    """First pairs of the blocks of a group that is written in blocks."""
    for _, array, axis in _arrays(group):
        if axis is not None:
            return list(range(0, array.shape[axis], array.chunks[axis]))
    return []


def pairs_in(group: Path) -> int:
    """Pairs of a group that is written in blocks, finished or not."""
    return next(array.shape[axis] for _, array, axis in _arrays(group) if axis is not None)


def block_of(group: Path) -> int:
    """Pairs in a block of such a group; the last block may have fewer."""
    return next(array.chunks[axis] for _, array, axis in _arrays(group) if axis is not None)


def _chunks(group: Path, done: Sequence[int] | None) -> Iterator[tuple[int | None, Path, zarr.Array, tuple]]:
    """Every chunk that should be on disk: block, file, array and region. The block is None where there are none.

    Args:
      done: first pairs of the finished blocks; None for a group that was written whole.
    """
    for path, array, axis in _arrays(group):
        axis = None if done is None else axis
        grid = [range(-(-n // size)) for n, size in zip(array.shape, array.chunks, strict=True)]
        if axis is not None and done is not None:
            grid[axis] = [first // array.chunks[axis] for first in done]  # type: ignore[call-overload]
        for index in itertools.product(*grid):
            region = tuple(slice(i * size, (i + 1) * size) for i, size in zip(index, array.chunks, strict=True))
            block = None if axis is None else index[axis] * array.chunks[axis]
            yield block, path.joinpath("c", *map(str, index)), array, region


def files_of(group: Path, first: int) -> list[Path]:
    """Files of the chunks of the block at pair `first`."""
    return [file for block, file, *_ in _chunks(group, [first]) if block == first]


def missing_chunks(group: Path, done: Sequence[int] | None = None) -> list[Path]:
    """Files of chunks that were written and no longer exist. Runs without checksums left out chunks of NaN, so nothing
    counts as missing in them."""
    return [file for _, file, array, _ in _chunks(group, done) if _checked(array) and not file.is_file()]


def damaged(group: Path, done: Sequence[int] | None = None, *, only: str | None = None) -> list[int]:
    """First pairs of the finished blocks that cannot be read or do not exist.

    Args:
      done: first pairs of the finished blocks; None for a group that was written whole, which counts as block 0.
        Coordinates are no part of any block.
      only: look at this one array, whole.
    """
    bad: set[int] = set()
    for block, file, array, region in _chunks(group, done):
        if (only is None and done is not None and block is None) or (only is not None and array.basename != only):
            continue
        try:
            if _checked(array) and not file.is_file():
                raise FileNotFoundError(file)
            array[region]
        except NOT_DAMAGE:
            raise
        except Exception:  # zarr and its codecs raise many kinds
            bad.add(block or 0)
    return sorted(bad)


def pairs_of(group: Path, blocks: Sequence[int]) -> str:
    """Blocks in words: ``pairs 0 to 3, 8 to 11``."""
    for _, array, axis in _arrays(group):
        if axis is not None:
            size, end = array.chunks[axis], array.shape[axis]
            return "pairs " + ", ".join(f"{first} to {min(first + size, end) - 1}" for first in blocks)
    return "pairs of blocks " + ", ".join(map(str, blocks))


def with_strings(dataset: xr.Dataset, kind: str, convert: Callable[[np.ndarray], np.ndarray]) -> xr.Dataset:
    """`dataset` with its string variables of one NumPy kind converted."""

    def converted(variables: Mapping) -> dict:
        found = {name: v for name, v in variables.items() if v.dtype.kind == kind}
        return {name: (v.dims, convert(v.values), v.attrs) for name, v in found.items()}

    for assign, variables in ((xr.Dataset.assign, dataset.data_vars), (xr.Dataset.assign_coords, dataset.coords)):
        if found := converted(variables):  # assigning nothing takes its time, too
            dataset = assign(dataset, found)
    return dataset


def as_written(values: np.ndarray) -> np.ndarray:
    """Single-precision numbers as the double-precision ones that they were written as: 0.2, not 0.20000000298."""
    return np.array([float(str(value)) for value in values.ravel()]).reshape(values.shape)


def opened(store: Path, group: str) -> xr.Dataset:
    """A stored group, its values not yet read.

    Raises:
      FileNotFoundError: an array of it is missing. xarray and zarr raise other errors for damaged data.
    """
    dataset = xr.open_zarr(store, group=group, consolidated=False, chunks=None, decode_times=False)
    there = set(map(str, dataset.variables))
    lost = set(dataset.attrs.pop(ARRAYS, there)) - there
    if lost:
        raise FileNotFoundError(f"missing: {', '.join(sorted(lost))}")
    dataset = with_strings(dataset, "T", lambda values: np.array(values.tolist(), str))
    single = {name: v for name, v in dataset.coords.items() if v.dtype == np.float32}  # of older runs
    mended = {name: v.copy(data=as_written(v.values)) for name, v in single.items()}
    return dataset.assign_coords(mended) if mended else dataset


def write_group(dataset: xr.Dataset, path: Path, encoding: Mapping[str, Mapping] | None = None, **options: Any) -> None:
    """Writes a group with a checksum on every chunk.

    Args:
      encoding: of arrays by name, beside the codecs.
      options: of `xarray.Dataset.to_zarr`.
    """
    # The zarr 3 format has variable-length strings, but not NumPy's fixed-length ones.
    dataset = with_strings(dataset, "U", lambda values: values.astype(np.dtypes.StringDType()))
    own = {name: (encoding or {}).get(str(name), {}) for name in dataset.variables}
    options["encoding"] = {name: {"compressors": CODECS, **each} for name, each in own.items()}
    if options.get("mode") == "w":
        dataset = dataset.assign_attrs({ARRAYS: sorted(map(str, dataset.variables))})
    dataset.to_zarr(path, zarr_format=3, consolidated=False, **options)


def write_region(group: Path, values: Mapping[str, np.ndarray], region: Mapping[str, tuple[slice, ...]]) -> None:
    """Writes into arrays of a group that exist, each in its region; chunks of the fill value, too."""
    with zarr.config.set({"array.write_empty_chunks": True}):
        arrays: Any = zarr.open_group(group, mode="r+")
        for name, value in values.items():
            arrays[name][region[name]] = value


def layout_of(dataset: xr.Dataset) -> dict[str, dict]:
    """Dimensions and shape of every variable."""
    return {str(name): {"dims": variable.dims, "shape": variable.shape} for name, variable in dataset.data_vars.items()}


def filled(dtype: np.dtype, shape: Sequence[int]) -> np.ndarray:
    """What a group starts out with: NaN, or 0 for integers. It takes no memory, and cannot be written to."""
    return np.broadcast_to(np.asarray(np.nan if np.issubdtype(dtype, np.floating) else 0, dtype), shape)
