"""Model folders: parameters, a manifest that says what they are, and nothing half-written.

A model folder holds ``manifest.json`` (configuration, digest, provenance) and ``params/`` (an Orbax checkpoint of a
nested dict of arrays). A folder is written under another name beside its place and renamed when it is complete.
"""

import dataclasses
import difflib
import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import flax
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx

from dit_jax.array_folder import Arrays, check_shapes, read_arrays, write_arrays
from dit_jax.config import DiTConfig, NetworkConfig, TimestepConvention, config_from_dict
from dit_jax.controls import Network, make_network
from dit_jax.disk import CheckpointError, occupied, recover, replacing, write_json
from dit_jax.model import Block, DiT, param_dtype

FORMAT = "syncgap-dit"
FORMAT_VERSION = 1
STORED_DTYPES = ("float32", "bfloat16", "float64")
SMALL_BYTES = 2**26  # bytes that a config may always ask for
COMPRESSION = 64  # and beyond these, how many times the bytes that lie on disk
SHIPPED = Path(__file__).parent / "shipped"


def save_model(
    model: Network,
    directory: str | Path,
    *,
    extra: Mapping | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
) -> dict:
    """Writes a model folder that `load_model` reads; see `save_weights` for the arguments and what is raised."""
    if isinstance(model, DiT) and not isinstance(model.blocks, Block):
        raise CheckpointError("an unstacked model cannot be saved; save the one that it was made from")
    weights = {path: np.asarray(variable[...]) for path, variable in _variables(model)}
    return save_weights(model.config, weights, directory, extra=extra, dtype=dtype, overwrite=overwrite)


def save_weights(
    config: NetworkConfig,
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
        write_arrays(partial / "params", stored)
        write_json(partial / "manifest.json", manifest)
    return manifest


def load_model(
    directory: str | Path,
    dtype: str | None = None,
    *,
    params: str | None = None,
    timestep_convention: TimestepConvention | None = None,
) -> Network:
    """Reads a model folder. ``model(x, t, y)`` is then the network function, see `DiT.__call__`.

    The model is a `DiT`, or the control network that the manifest's config names (`dit_jax.controls`).

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
      ValueError: unknown `dtype`, `params` or `timestep_convention`, or a convention for a network that is no DiT.
    """
    if params is not None and params not in STORED_DTYPES:
        raise ValueError(f"params {params!r} is not one of {', '.join(STORED_DTYPES)}")
    config, weights, _ = load_weights(_folder(directory))
    if timestep_convention is not None and not isinstance(config, DiTConfig):
        raise ValueError(f"{directory} holds no DiT: give no timestep_convention")
    changes: dict[str, Any] = {"dtype": dtype, "timestep_convention": timestep_convention}
    changes = {name: value for name, value in changes.items() if value is not None}
    config = dataclasses.replace(cast(Any, config), **changes)
    require_x64(config.dtype, params)
    return _consume(config, weights, params)


def require_x64(*dtypes: str | None) -> None:
    """Raises CheckpointError if one of the dtypes is float64 and JAX would make float32 of it."""
    if "float64" in dtypes and jax.dtypes.canonicalize_dtype(np.float64) != np.float64:
        raise CheckpointError("a float64 model needs JAX's x64 mode: set JAX_ENABLE_X64=1, or give dtype float32")


def load_weights(directory: str | Path) -> tuple[NetworkConfig, Arrays, dict]:
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
    if not recover(directory):
        raise CheckpointError(_no_model(str(directory)))
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


def manifest_config(directory: str | Path, manifest: Mapping) -> NetworkConfig:
    """The config in the manifest of a model folder.

    Raises:
      CheckpointError: it is of an architecture that is not known, or not usable otherwise.
    """
    try:
        return config_from_dict(manifest["config"])
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{directory}: the manifest's config is not usable ({str(error)[:500]})") from error


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
    if name in _shipped_names():
        return SHIPPED / name
    raise CheckpointError(_no_model(name))


def _no_model(given: str) -> str:
    """What to say where there is no folder and no shipped model of this name, with the nearest that there is."""
    path, known = Path(given), _shipped_names()
    if path.is_file():
        return f"{given} is a file; give a model folder (syncgap convert makes one of a checkpoint)"
    parent = path.absolute().parent
    if not parent.is_dir():
        return f"there is no folder {given}: {parent} does not exist"
    like = difflib.get_close_matches(path.name, [each.name for each in parent.iterdir() if each.is_dir()], 1)
    if os.sep in given:
        return f"there is no folder {given}" + (f"; is it {path.with_name(like[0])}?" if like else "")
    like += difflib.get_close_matches(given, known, 1)
    meant = f"; is it {' or '.join(like)}?" if like else ""
    return f"there is no folder {given} and no shipped model {given!r}; known: {', '.join(known) or 'none'}{meant}"


def _shipped_names() -> list[str]:
    return sorted(path.parent.name for path in SHIPPED.glob("*/manifest.json"))


def _folder(model: str | Path) -> Path:
    """The folder itself if it exists, else that of the shipped model of this name, if there is one."""
    if not recover(model) and str(model) in _shipped_names():
        return SHIPPED / str(model)
    return Path(model)


def check_free(directory: str | Path, overwrite: bool = False) -> None:
    """Raises CheckpointError unless a model folder may be written here."""
    directory = Path(directory)
    recover(directory)
    if not occupied(directory):
        return
    if not overwrite:
        raise CheckpointError(
            f"{directory} exists and is not empty; choose another folder, or overwrite it (--overwrite)"
        )
    try:
        load_manifest(directory)
    except CheckpointError as error:
        raise CheckpointError(f"{directory} is not overwritten, for it is no model folder of this format") from error


def abstract_model(config: NetworkConfig) -> Network:
    """The model of a config with shapes in place of arrays. Nothing is allocated, and no random number drawn."""
    graph, state = _traced(config, jax.dtypes.canonicalize_dtype(np.float64) == np.float64)
    model = nnx.merge(graph, state, copy=True)
    model.config = config  # equal configs may differ in type, as 4 and 4.0 do
    return model


@lru_cache(maxsize=64)
def _traced(config: NetworkConfig, x64: bool) -> tuple[nnx.GraphDef, nnx.State]:
    """What makes up an abstract model. Tracing it takes a tenth of a second, and one load wants it five times. Dtypes
    hang on the switch `x64`, too."""
    return nnx.split(nnx.eval_shape(lambda: make_network(config, nnx.Rngs(0))))


def weight_shapes(config: NetworkConfig) -> dict[str, tuple[int, ...]]:
    """Shape of every array of a model by dotted path."""
    return {path: variable.shape for path, variable in _variables(abstract_model(config))}


def assemble(config: NetworkConfig, weights: Arrays, params: str | None = None) -> Network:
    """The model of `config` with these weights.

    Args:
      weights: every array by dotted path. The model may use an array itself, without a copy.
      params: dtype of the parameters; by default float32, or float64 for a float64 model. Constants are never narrower
        than this default.
    """
    return _consume(config, dict(weights), params)


def _consume(config: NetworkConfig, weights: Arrays, params: str | None) -> Network:
    """`assemble`, but each array is taken out of the dict as it is used, so that two forms of all arrays never exist at
    the same time."""
    graph, state = nnx.split(abstract_model(config))
    flat = []
    for path, variable in nnx.to_flat_state(state):
        dtype = params if isinstance(variable, nnx.Param) and params is not None else param_dtype(config)
        array = jnp.asarray(weights.pop(_dotted(path))).astype(dtype)
        flat.append((path, variable.replace(jax.block_until_ready(array))))
    return nnx.merge(graph, nnx.from_flat_state(flat))


def stored_form(config: NetworkConfig, weights: Arrays, dtype: str | None) -> Arrays:
    """The arrays as they are stored: trained parameters in `dtype`, or unchanged if it is None; constants unchanged."""
    if dtype is None:
        return weights
    dtypes = stored_dtypes(config, dtype, constants=None)
    return {path: array.astype(dtypes[path] or array.dtype, copy=False) for path, array in weights.items()}


def stored_dtypes(config: NetworkConfig, dtype: str, constants: str | None = "float32") -> dict[str, Any]:
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


def _manifest(config: NetworkConfig, weights: Arrays, extra: Mapping) -> dict:
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


def _variables(model: Network) -> list[tuple[str, Any]]:
    return [(_dotted(path), variable) for path, variable in nnx.to_flat_state(nnx.state(model))]


def _dotted(path: Iterable) -> str:
    return ".".join(map(str, path))


def _read_model(directory: Path, manifest: Mapping) -> tuple[NetworkConfig, Arrays]:
    """The config and the arrays of a model folder, checked to fit each other. Their digest is not compared."""
    config = manifest_config(directory, manifest)
    _check_size(config, directory)
    weights = read_arrays(directory / "params", weight_shapes(config))
    _check_fit(config, weights, f"{directory / 'params'}")
    return config, weights


def _check_fit(config: NetworkConfig, weights: Arrays, what: str) -> None:
    check_shapes(weight_shapes(config), weights, what)
    odd = [f"{path} ({array.dtype})" for path, array in weights.items() if array.dtype.name not in STORED_DTYPES]
    if odd:
        raise CheckpointError(f"{what}: dtype is not one of {', '.join(STORED_DTYPES)}: {', '.join(odd)}")


def _check_size(config: NetworkConfig, directory: Path) -> None:
    """Raises CheckpointError if the config asks for memory that the files on disk cannot account for. Compression saves
    a few percent of real parameters, and a good half of an untrained network's zeros."""
    params = directory / "params"
    if params.is_symlink():
        raise CheckpointError(f"{params} is a link; a model folder has none, copy the files themselves")
    try:
        there = sum(path.lstat().st_size for path in params.rglob("*"))
        most = SMALL_BYTES + COMPRESSION * there
        # of the DiT's position embedding, which is made to get the shapes
        needed = 32 * config.num_tokens * config.hidden_size if isinstance(config, DiTConfig) else 0
        if needed <= most:
            needed = 2 * sum(math.prod(shape) for shape in weight_shapes(config).values())
    except Exception as error:  # sizes that are not numbers raise errors of any kind
        raise CheckpointError(f"{directory}: the manifest's config is not usable ({type(error).__name__})") from error
    if needed > most:
        raise CheckpointError(
            f"{directory}: the config asks for more bytes than the {there:,} of the folder can hold; "
            "make the model folder again"
        )
