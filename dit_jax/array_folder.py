"""Folders of arrays: Orbax checkpoints of a nested dict, written and read in bounded memory."""

import inspect
import itertools
import logging
import math
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.disk import CheckpointError, occupied, recover, replacing
from dit_jax.platform import devices

CHUNK_BYTES = 2**26  # size of one file of a folder
CHUNKS_IN_FLIGHT = 4
ALIGNMENT = 64  # bytes; where JAX wants an array to begin on a CPU

Arrays = dict[str, np.ndarray]  # by dotted path, for example "blocks.attn.qkv.kernel"


def save_arrays(directory: str | Path, tree: Any) -> None:
    """Writes any pytree of arrays to a folder. It replaces what `save_arrays` wrote there before.

    Raises:
      CheckpointError: the folder holds something else.
    """
    directory = Path(directory)
    if occupied(directory) and not (directory / "_METADATA").exists():
        raise CheckpointError(f"{directory} is not empty and holds no saved arrays; choose another folder")
    arrays = {path: np.asarray(leaf) for path, leaf in _leaves(tree)}
    with replacing(directory) as partial:
        write_arrays(partial, arrays)


def load_arrays(directory: str | Path, like: Any) -> Any:
    """Reads what `save_arrays` wrote, as JAX arrays in the structure of `like` (arrays or shapes).

    Raises:
      CheckpointError: nothing readable is there, or its structure, shapes or dtypes are others.
    """
    directory = Path(directory)
    recover(directory)
    arrays = read_arrays(directory)
    expected = dict(_leaves(like))
    check_shapes({path: leaf.shape for path, leaf in expected.items()}, arrays, str(directory))
    wrong = [path for path, leaf in expected.items() if arrays[path].dtype != leaf.dtype]
    if wrong:
        raise CheckpointError(f"{directory}: other dtypes than expected in {', '.join(wrong)}")
    # These are copies: a training state is donated to the next step, and must not lie in memory that NumPy owns.
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.array(arrays[path]) for path in expected])


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def check_shapes(expected: Mapping[str, tuple[int, ...]], arrays: Mapping[str, Any], what: str) -> None:
    """Raises CheckpointError unless `arrays` has exactly the paths and shapes of `expected`."""
    problems = [f"{path} is missing" for path in expected if path not in arrays]
    problems += [f"{path} is not expected" for path in arrays if path not in expected]
    problems += [
        f"{path} is {arrays[path].shape}, expected {shape}"
        for path, shape in expected.items()
        if path in arrays and tuple(arrays[path].shape) != tuple(shape)
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}")


def write_arrays(directory: Path, arrays: Arrays) -> None:
    """Writes arrays with Orbax, but without its copy of all arrays, its single-file database, and its chunks as large
    as an array: each of these would take the memory of the parameters once more.

    Raises:
      OSError: the disk cannot be written.
      PlatformError: JAX has no device.
    """
    tree = unflatten_dict(arrays, sep=".")
    handler_type: Any = ocp.type_handlers.NumpyHandler
    can_spare_copy = "deepcopy_host_arrays" in inspect.signature(handler_type).parameters  # Orbax 0.12.4 cannot
    uncopied = handler_type(**({"deepcopy_host_arrays": False} if can_spare_copy else {}))
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, uncopied))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    devices()  # Orbax asks for them, too, and what is wrong with them is no fault of the folder
    target = directory.resolve()
    try:
        with _quiet_orbax(logging.CRITICAL), _quiet_threads(target):  # an error is raised, which says it once
            handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, save_concurrent_gb=1, type_handler_registry=registry)
            with ocp.Checkpointer(handler) as checkpointer:
                checkpointer.save(target, ocp.args.PyTreeSave(tree, save_args=chunks), force=True)
    except (MemoryError, KeyboardInterrupt):
        raise
    except Exception as error:  # of many kinds, by which thread of which library the disk refuses
        for left in target.parent.glob(f"{target.name}.orbax-checkpoint-tmp*"):
            shutil.rmtree(left, ignore_errors=True)
        raise _refusal(error) from error
    # This file holds only the path at which the folder was first written; reading does not need it.
    (directory / "commit_success.txt").unlink(missing_ok=True)


def _refusal(error: Exception) -> OSError:
    """What the disk said, as an OSError; TensorStore wraps it in words, the number of the system's error at the end."""
    if isinstance(error, OSError):
        return error
    number = re.search(r"os_error_code='(\d+)'", str(error))
    if number:
        return OSError(int(number[1]), os.strerror(int(number[1])))
    return OSError(str(error).strip().splitlines()[0] if str(error).strip() else repr(error))


@contextmanager
def _quiet_threads(target: Path) -> Iterator[None]:
    """Silences TensorStore's threads, which print a traceback each if they end after Orbax has given up, and asyncio,
    which logs what nobody asked them. They may do so at any later time, so that this holds on after a failure."""
    before, logger = sys.unraisablehook, logging.getLogger("asyncio")

    def of_others(record: logging.LogRecord) -> bool:
        return str(target) not in record.getMessage()

    def hook(failed: Any) -> None:
        if not (failed.exc_type is RuntimeError and str(failed.exc_value) == "Event loop is closed"):
            before(failed)

    sys.unraisablehook = hook
    logger.addFilter(of_others)
    yield
    sys.unraisablehook = before
    logger.removeFilter(of_others)


@contextmanager
def _quiet_orbax(level: int = logging.ERROR) -> Iterator[None]:
    """Silences Orbax's warnings about what was chosen on purpose: no database, no records of JAX shardings."""
    logger = logging.getLogger("absl")
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def read_arrays(directory: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Arrays:
    """The arrays of a folder. If `shapes` are given, no array is read unless all have these shapes."""
    if not (directory / "_METADATA").exists():
        raise CheckpointError(f"{directory} holds no saved arrays; make it again")
    odd = [path for path in directory.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
    if odd:
        raise CheckpointError(f"{odd[0]} is a link or no plain file; a folder of saved arrays has none, copy the files")
    devices()  # as in `write_arrays`
    try:
        with _quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.metadata(directory.resolve()).item_metadata.tree
        announced = flatten_dict(found, sep=".")
        if shapes is not None:
            check_shapes(shapes, announced, str(directory))
        stores = _open_stores(directory.resolve(), announced)
        return {path: _read_chunks(store) for path, store in stores.items()}
    except (CheckpointError, MemoryError):
        raise
    except PermissionError as error:
        raise CheckpointError(f"{error.filename or directory} may not be read: {error.strerror}") from error
    except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged folder
        reason = str(error).strip().splitlines()
        raise CheckpointError(f"{directory} is damaged: {reason[0] if reason else error!r}; make it again") from error


def _open_stores(directory: Path, announced: Mapping[str, Any]) -> dict[str, tensorstore.TensorStore]:
    """Opens the stored arrays without reading them. Arrays that could take more memory to read than they hold are
    refused: those with chunks larger than the array, and those with another codec than Orbax's own, as some codecs
    believe a file that claims gigabytes."""
    folder = {"driver": "file", "path": f"{directory}/"}
    if (directory / "manifest.ocdbt").exists():
        folder = {"driver": "ocdbt", "base": folder, "path": ""}
    stores = {}
    for path, array in announced.items():
        place = {**folder, "path": f"{folder['path']}{path}/"}
        store = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True).result()
        stored = store.spec().to_json()["metadata"]
        codec = stored["compressor"] or {"id": "zstd"}
        too_large = math.prod(stored["chunks"]) > max(1, math.prod(array.shape))
        if store.shape != tuple(array.shape) or too_large or codec["id"] != "zstd" or stored["filters"]:
            raise CheckpointError(f"{directory}: {path} is not stored as Orbax does; make it again")
        stores[path] = store
    return stores


def _read_chunks(store: tensorstore.TensorStore) -> np.ndarray:
    """Reads a whole array, a few chunks at a time. Orbax would hold all chunks in memory beside it, compressed and not.

    The array is aligned as JAX needs it on a CPU, so that a model can use it without a copy.
    """
    dtype, size = store.dtype.numpy_dtype, math.prod(store.shape) * store.dtype.numpy_dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    array = raw[start : start + size].view(dtype).reshape(store.shape)
    chunks = store.spec().to_json()["metadata"]["chunks"]
    spans = [
        [slice(low, min(low + step, length)) for low in range(0, length, step)]
        for length, step in zip(store.shape, chunks, strict=True)
    ]
    blocks = itertools.product(*spans)
    while group := list(itertools.islice(blocks, CHUNKS_IN_FLIGHT)):
        reads = [store[block].read() for block in group]
        for block, found in zip(group, reads, strict=True):
            array[block] = found.result()
    return array
