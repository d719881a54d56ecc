"""Models and training states on disk: Orbax arrays, a manifest in JSON, and nothing half-written.

A model folder holds ``manifest.json`` (configuration, digest, provenance) and ``params/`` (an Orbax checkpoint of a
nested dict of arrays). A folder is written under another name beside its place and renamed when it is complete.
"""

import dataclasses
import hashlib
import inspect
import itertools
import json
import logging
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

from dit_jax.config import DiTConfig, TimestepConvention
from dit_jax.model import Block, DiT, param_dtype

FORMAT = "syncgap-dit"
FORMAT_VERSION = 1
STORED_DTYPES = ("float32", "bfloat16", "float64")
SMALL_BYTES = 2**26  # bytes that a config may always ask for
COMPRESSION = 64  # and beyond these, how many times the bytes that lie on disk
CHUNK_BYTES = 2**26  # size of one file of a model folder
CHUNKS_IN_FLIGHT = 4
ALIGNMENT = 64  # bytes; where JAX wants an array to begin on a CPU
SHIPPED = Path(__file__).parent / "shipped"

Arrays = dict[str, np.ndarray]  # by dotted path, for example "blocks.attn.qkv.kernel"


class CheckpointError(ValueError):
    """A folder that cannot be written, or that does not hold what it should."""


def save_model(
    model: DiT,
    directory: str | Path,
    *,
    extra: Mapping | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Writes a model folder that `load_model` reads; see `save_weights` for the arguments and what is raised."""
    if not isinstance(model.blocks, Block):
        raise CheckpointError("an unstacked model cannot be saved; save the one that it was made from")
    weights = {path: np.asarray(variable[...]) for path, variable in _variables(model)}
    return save_weights(model.config, weights, directory, extra=extra, dtype=dtype, overwrite=overwrite)


def save_weights(
    config: DiTConfig,
    weights: Arrays,
    directory: str | Path,
    *,
    extra: Mapping | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Writes the model folder of `config` and `weights`.

    Args:
      weights: every array of the model by dotted path, in the shapes of `abstract_model`.
      directory: the folder to make; parents are made too.
      extra: further JSON entries of the manifest; ``data`` says how the training images were prepared.
      dtype: ``"bfloat16"`` halves the folder (the position embedding stays as it is); None keeps each array's.
      overwrite: replace a model folder that is there already. Anything else is never replaced.

    Returns:
      the manifest.

    Raises:
      CheckpointError: the folder is taken, the weights do not fit the config, or `dtype` or `extra` is unusable.
    """
    directory = Path(directory)
    check_free(directory, overwrite)
    _check_fit(config, weights, "the weights to be saved")
    stored = stored_form(config, weights, dtype)
    manifest = _manifest(config, stored, extra or {})
    with replacing(directory) as partial:
        _write_orbax(partial / "params", stored)
        write_json(partial / "manifest.json", manifest)
    return manifest


def load_model(
    directory: str | Path,
    dtype: str | None = None,
    *,
    params: str | None = None,
    timestep_convention: TimestepConvention | None = None,
) -> DiT:
    """Reads a model folder. ``model(x, t, y)`` is then the network function, see `DiT.__call__`.

    Args:
      directory: folder written by `save_model`, by training or by a conversion; or the name of a shipped model, for
        example ``"photos16-v"``, where there is no folder of that name.
      dtype: compute dtype ``"float32"``, ``"bfloat16"`` or ``"float64"``; by default that of the stored config.
        A float64 model needs JAX's x64 mode.
      params: dtype in which parameters are kept; by default float32, or float64 for a float64 model. ``"bfloat16"``
        halves the memory of a bfloat16 model, and parameters are then not rounded anew in every call.
      timestep_convention: see `DiTConfig`; by default that of the stored config.

    Raises:
      CheckpointError: the folder is not a complete, unaltered model folder of this format.
      ValueError: unknown `dtype`, `params` or `timestep_convention`.
    """
    if params is not None and params not in STORED_DTYPES:
        raise ValueError(f"params {params!r} is not one of {', '.join(STORED_DTYPES)}")
    config, weights, _ = load_weights(_folder(directory))
    changes: dict[str, Any] = {"dtype": dtype, "timestep_convention": timestep_convention}
    config = dataclasses.replace(config, **{name: value for name, value in changes.items() if value is not None})
    if "float64" in (config.dtype, params) and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise CheckpointError("a float64 model needs JAX's x64 mode: set JAX_ENABLE_X64=1, or load it as float32")
    return _consume(config, weights, params)


def load_weights(directory: str | Path) -> tuple[DiTConfig, Arrays, dict]:
    """The config of a model folder, its arrays as they are stored, and its manifest.

    Raises:
      CheckpointError: see `load_model`.
    """
    manifest = load_manifest(directory)
    config, weights = _read_model(Path(directory), manifest)
    if digest(weights) != manifest["digest"]:
        raise CheckpointError(f"{directory}: the parameters are not those the manifest was written for; make it again")
    return config, weights, manifest


def load_manifest(directory: str | Path) -> dict:
    """The manifest of a model folder.

    Raises:
      CheckpointError: there is no manifest, it cannot be read, or it is of another format.
    """
    path = Path(directory) / "manifest.json"
    recover(directory)
    if not path.is_file():
        raise CheckpointError(
            f"{directory} is not a model folder: it has no manifest.json; convert weights or train a model first"
        )
    try:
        manifest = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); make the model folder again") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not the manifest of a {FORMAT} model folder")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise CheckpointError(
            f"{path} is of format version {manifest.get('format_version')}, this code reads {FORMAT_VERSION}; "
            "convert or train again, or use the syncgap version that wrote it"
        )
    missing = [name for name in ("config", "digest") if name not in manifest]
    if missing:
        raise CheckpointError(f"{path} lacks {', '.join(missing)}; make the model folder again")
    return manifest


def weights_digest(directory: str | Path) -> str:
    """`digest` of the parameters of a model folder, computed from the arrays themselves.

    Raises:
      CheckpointError: the folder is not a complete model folder of this format.
    """
    return digest(_read_model(Path(directory), load_manifest(directory))[1])


def digest(weights: Arrays) -> str:
    """SHA-256 over path, dtype, shape and little-endian bytes of all arrays, in the order of their paths."""
    total = hashlib.sha256()
    for path in sorted(weights):
        array = np.ascontiguousarray(weights[path])
        total.update(f"{path} {array.dtype.name} {array.shape}\n".encode())
        total.update(array.reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def shipped_model(name: str) -> Path:
    """Folder of a model that comes with the package.

    Raises:
      CheckpointError: there is none of that name.
    """
    known = _shipped_names()
    if name not in known:
        raise CheckpointError(f"no shipped model {name!r}; known: {', '.join(known) or 'none'}")
    return SHIPPED / name


def _shipped_names() -> list[str]:
    return sorted(path.parent.name for path in SHIPPED.glob("*/manifest.json"))


def _folder(model: str | Path) -> Path:
    """The folder itself if it exists, else that of the shipped model of this name, if there is one."""
    if not recover(model) and str(model) in _shipped_names():
        return SHIPPED / str(model)
    return Path(model)


def save_arrays(directory: str | Path, tree: Any) -> None:
    """Writes any pytree of arrays to a folder. It replaces what `save_arrays` wrote there before.

    Raises:
      CheckpointError: the folder holds something else.
    """
    directory = Path(directory)
    if _occupied(directory) and not (directory / "_METADATA").exists():
        raise CheckpointError(f"{directory} is not empty and holds no saved arrays; choose another folder")
    arrays = {path: np.asarray(leaf) for path, leaf in _leaves(tree)}
    with replacing(directory) as partial:
        _write_orbax(partial, arrays)


def load_arrays(directory: str | Path, like: Any) -> Any:
    """Reads what `save_arrays` wrote, as JAX arrays in the structure of `like` (arrays or shapes).

    Raises:
      CheckpointError: nothing readable is there, or its structure, shapes or dtypes are others.
    """
    directory = Path(directory)
    recover(directory)
    arrays = _read_orbax(directory)
    expected = dict(_leaves(like))
    _check_arrays(expected, arrays, str(directory))
    wrong = [path for path, leaf in expected.items() if arrays[path].dtype != leaf.dtype]
    if wrong:
        raise CheckpointError(f"{directory}: other dtypes than expected in {', '.join(wrong)}")
    # These are copies: a training state is donated to the next step, and must not lie in memory that NumPy owns.
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.array(arrays[path]) for path in expected])


def write_json(path: str | Path, entries: Any) -> None:
    """Writes JSON in one move: a reader finds the old file or the new one, never a part."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(entries, indent=2, allow_nan=False) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def recover(directory: str | Path) -> bool:
    """Whether a saved folder is there. If a replacement was killed between its two renames, the earlier folder is put
    back first."""
    directory = Path(directory)
    previous = _beside(directory, "previous")
    if previous.exists() and not directory.exists():
        os.replace(previous, directory)
    return directory.exists()


def check_free(directory: str | Path, overwrite: bool = False) -> None:
    """Raises CheckpointError unless a model folder may be written here."""
    directory = Path(directory)
    recover(directory)
    if not _occupied(directory):
        return
    if not overwrite:
        raise CheckpointError(
            f"{directory} exists and is not empty; choose another folder, or overwrite it (--overwrite)"
        )
    try:
        load_manifest(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{directory} is not overwritten, for it is no model folder of this format") from error


def abstract_model(config: DiTConfig) -> DiT:
    """The model of a config with shapes in place of arrays. Nothing is allocated, and no random number drawn."""
    return nnx.eval_shape(lambda: DiT(config, nnx.Rngs(0)))


def weight_shapes(config: DiTConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a model by dotted path."""
    return {path: variable.shape for path, variable in _variables(abstract_model(config))}


def assemble(config: DiTConfig, weights: Arrays, params: str | None = None) -> DiT:
    """The model of `config` with these weights.

    Args:
      weights: every array by dotted path. The model may use an array itself, without a copy.
      params: dtype of the parameters; by default float32, or float64 for a float64 model. Constants are never narrower
        than this default.
    """
    return _consume(config, dict(weights), params)


def _consume(config: DiTConfig, weights: Arrays, params: str | None) -> DiT:
    """`assemble`, but each array is taken out of the dict as it is used, so that two forms of all arrays never exist at
    the same time."""
    graph, state = nnx.split(abstract_model(config))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        dtype = params if isinstance(variable, nnx.Param) and params is not None else param_dtype(config)
        array = jnp.asarray(weights.pop(_dotted(path))).astype(dtype)
        flat.append((path, variable.replace(jax.block_until_ready(array))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def stored_form(config: DiTConfig, weights: Arrays, dtype: str | None) -> Arrays:
    """The arrays as they are stored: trained parameters in `dtype`, or unchanged if it is None; constants unchanged."""
    if dtype is None:
        return weights
    dtypes = stored_dtypes(config, dtype, constants=None)
    return {path: array.astype(dtypes[path] or array.dtype, copy=False) for path, array in weights.items()}


def stored_dtypes(config: DiTConfig, dtype: str, constants: str | None = "float32") -> dict[str, Any]:
    """The dtype of every array of a model by dotted path: `dtype` for trained parameters, `constants` for constants.

    Raises:
      CheckpointError: unknown `dtype`.
    """
    if dtype not in STORED_DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is not one of {', '.join(STORED_DTYPES)}")
    return {
        path: jnp.dtype(dtype) if isinstance(variable, nnx.Param) else constants
        for path, variable in _variables(abstract_model(config))
    }


def _manifest(config: DiTConfig, weights: Arrays, extra: Mapping) -> dict:
    own = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "config": config.to_dict(),
        "parameters": sum(array.size for array in weights.values()),
        "digest": digest(weights),
        "versions": {"jax": jax.__version__, "flax": flax.__version__, "orbax-checkpoint": ocp.__version__},
    }
    taken = sorted(set(own) & set(extra))
    if taken:
        raise CheckpointError(f"manifest entries {', '.join(taken)} are written by the checkpoint itself; rename them")
    manifest = {**own, "data": None, **extra}
    try:
        json.dumps(manifest, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"the extra manifest entries are not JSON ({error})") from error
    return manifest


def _variables(model: DiT) -> list[tuple[str, Any]]:
    return [(_dotted(path), variable) for path, variable in nnx.to_flat_state(nnx.state(model))]


def _dotted(path: Iterable) -> str:
    return ".".join(map(str, path))


def _read_model(directory: Path, manifest: Mapping) -> tuple[DiTConfig, Arrays]:
    """The config and the arrays of a model folder, checked to fit each other. Their digest is not compared."""
    try:
        config = DiTConfig.from_dict(manifest["config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: the manifest's config is not usable ({str(error)[:500]})") from error
    _check_size(config, directory)
    weights = _read_orbax(directory / "params", weight_shapes(config))
    _check_fit(config, weights, f"{directory / 'params'}")
    return config, weights


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="."), leaf) for path, leaf in leaves]


def _check_fit(config: DiTConfig, weights: Arrays, what: str) -> None:
    _check_arrays(dict(_variables(abstract_model(config))), weights, what)
    odd = [f"{path} ({array.dtype})" for path, array in weights.items() if array.dtype.name not in STORED_DTYPES]
    if odd:
        raise CheckpointError(f"{what}: dtype is not one of {', '.join(STORED_DTYPES)}: {', '.join(odd)}")


class _Shaped(NamedTuple):
    shape: tuple[int, ...]


def _check_arrays(expected: Mapping[str, Any], arrays: Mapping[str, Any], what: str) -> None:
    problems = [f"{path} is missing" for path in expected if path not in arrays]
    problems += [f"{path} is not expected" for path in arrays if path not in expected]
    problems += [
        f"{path} is {arrays[path].shape}, expected {leaf.shape}"
        for path, leaf in expected.items()
        if path in arrays and arrays[path].shape != leaf.shape
    ]
    if problems:
        raise CheckpointError(f"{what} does not fit: {'; '.join(problems)}")


def _write_orbax(directory: Path, arrays: Arrays) -> None:
    """Writes arrays with Orbax, but without its copy of all arrays, its single-file database, and its chunks as large
    as an array: each of these would take the memory of the parameters once more."""
    tree = unflatten_dict(arrays, sep=".")
    handler_type: Any = ocp.type_handlers.NumpyHandler
    can_spare_copy = "deepcopy_host_arrays" in inspect.signature(handler_type).parameters  # Orbax 0.12.4 cannot
    uncopied = handler_type(**({"deepcopy_host_arrays": False} if can_spare_copy else {}))
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, uncopied))
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with _quiet_orbax():
        handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, save_concurrent_gb=1, type_handler_registry=registry)
        with ocp.Checkpointer(handler) as checkpointer:
            checkpointer.save(directory.resolve(), ocp.args.PyTreeSave(tree, save_args=chunks), force=True)
    # This file holds only the path at which the folder was first written; reading does not need it.
    (directory / "commit_success.txt").unlink(missing_ok=True)


@contextmanager
def _quiet_orbax() -> Iterator[None]:
    """Silences Orbax's warnings about what was chosen on purpose: no database, no records of JAX shardings."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _check_size(config: DiTConfig, directory: Path) -> None:
    """Raises CheckpointError if the config asks for memory that the files on disk cannot account for. Compression saves
    a few percent of real parameters, and a good half of an untrained network's zeros."""
    params = directory / "params"
    if params.is_symlink():
        raise CheckpointError(f"{params} is a link; a model folder has none, copy the files themselves")
    try:
        there = sum(path.lstat().st_size for path in params.rglob("*"))
        most = SMALL_BYTES + COMPRESSION * there
        needed = 32 * config.num_tokens * config.hidden_size  # of the position embedding, made to get the shapes
        if needed <= most:
            needed = 2 * sum(math.prod(shape) for shape in weight_shapes(config).values())
    except Exception as error:  # sizes that are not numbers raise errors of any kind
        raise CheckpointError(f"{directory}: the manifest's config is not usable ({type(error).__name__})") from error
    if needed > most:
        raise CheckpointError(
            f"{directory}: the config asks for more bytes than the {there:,} of the folder can hold; "
            "make the model folder again"
        )


def _read_orbax(directory: Path, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Arrays:
    """The arrays of a folder. If `shapes` are given, no array is read unless all have these shapes."""
    if not (directory / "_METADATA").exists():
        raise CheckpointError(f"{directory} holds no saved arrays; make it again")
    odd = [path for path in directory.rglob("*") if path.is_symlink() or not (path.is_file() or path.is_dir())]
    if odd:
        raise CheckpointError(f"{odd[0]} is a link or no plain file; a folder of saved arrays has none, copy the files")
    try:
        with _quiet_orbax(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.metadata(directory.resolve()).item_metadata.tree
        announced = flatten_dict(found, sep=".")
        if shapes is not None:
            _check_arrays({path: _Shaped(shape) for path, shape in shapes.items()}, announced, str(directory))
        stores = _open_stores(directory.resolve(), announced)
        return {path: _read_chunks(store) for path, store in stores.items()}
    except CheckpointError:
        raise
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


def _occupied(directory: Path) -> bool:
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _beside(directory: Path, role: str) -> Path:
    directory = directory.absolute()
    return directory.with_name(f".{directory.name}.{role}")


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A sibling folder to fill. At the end it takes the place of `directory`; if anything fails, it is removed."""
    partial, previous = _beside(directory, "partial"), _beside(directory, "previous")
    recover(directory)
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if directory.exists():
            os.replace(directory, previous)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if recover(directory):
            shutil.rmtree(previous, ignore_errors=True)
