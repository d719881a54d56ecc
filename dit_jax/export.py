"""Writes a model folder as one file with the official keys, for PyTorch users. Stored values are kept bit for bit.

The file says what its shapes do not: a .safetensors file in its metadata, a .pt file in an attribute ``syncgap`` of the
state dict, an OrderedDict whose entries are the tensors alone.
"""

import os
from collections import OrderedDict
from pathlib import Path

import numpy as np

from dit_jax.checkpoint import load_weights
from dit_jax.config import DiTConfig
from dit_jax.disk import CheckpointError
from dit_jax.facts import METADATA, export_metadata
from dit_jax.weights import TABLE, inverted

SUFFIXES = (".safetensors", ".pt")


def export_model(directory: str | Path, out: str | Path, *, overwrite: bool = False) -> None:
    """Writes the parameters of a model folder, in the dtypes in which it stores them.

    Args:
      directory: model folder.
      out: file to write, ``.safetensors`` or ``.pt`` (which needs PyTorch).
      overwrite: replace a file that is there already.

    Raises:
      CheckpointError: the folder is not a complete model folder of a DiT, the file is there already, or its form is
        unknown.
    """
    out = Path(out)
    if out.suffix not in SUFFIXES:
        raise CheckpointError(f"{out} is neither {' nor '.join(SUFFIXES)}; the name says which form to write")
    if out.is_dir():
        raise CheckpointError(f"{out} is a folder; give the name of a file")
    if out.exists() and not overwrite:
        raise CheckpointError(f"{out} exists; choose another name, or overwrite it (--overwrite)")
    config, weights, manifest = load_weights(directory)
    if not isinstance(config, DiTConfig):
        raise CheckpointError(f"{directory} holds no DiT; the official keys are those of a DiT")
    entries: dict[str, np.ndarray] = {}
    for rule in TABLE:  # arrays are taken out one by one, so that both forms of all of them never exist at once
        entries.update(inverted(rule, weights.pop(rule.target), config))
    told = export_metadata(config, manifest.get("data"))
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    try:
        if out.suffix == ".pt":
            _save_torch(entries, told, partial)
        else:
            from safetensors.numpy import save_file

            save_file(entries, partial, metadata={"format": "pt", METADATA: told})
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def _save_torch(entries: dict[str, np.ndarray], told: str, path: Path) -> None:
    try:
        import torch
    except ImportError as error:
        raise CheckpointError(
            "writing .pt files needs PyTorch: pip install '.[torch]'; or export .safetensors"
        ) from error

    def tensor(array: np.ndarray) -> torch.Tensor:
        if array.dtype.name == "bfloat16":  # NumPy has no bfloat16; the same 16 bits are passed on
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    state = OrderedDict((key, tensor(array)) for key, array in entries.items())
    setattr(state, METADATA, told)
    torch.save(state, path)
