"""A description of a model folder from its manifest. Nothing is loaded or compiled."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from dit_jax.checkpoint import load_manifest, manifest_config, weights_digest
from dit_jax.class_names import names, short_name
from dit_jax.config import ControlConfig, DiTConfig, NetworkConfig
from dit_jax.latents import VAE_FACTOR, has_pixels, is_latent
from dit_jax.weights import variant_name

SHOWN_CLASSES = 8
LICENCE = "if these are the released DiT weights: CC BY-NC 4.0, non-commercial use only, also when converted"


def read_manifest(directory: str | Path) -> tuple[dict, NetworkConfig]:
    """Manifest and config of a model folder.

    Raises:
      CheckpointError: this is not a model folder, or the config in its manifest is not usable.
    """
    manifest = load_manifest(directory)
    return manifest, manifest_config(directory, manifest)


def describe(directory: str | Path) -> str:
    """A model folder in words: aligned lines ``entry  value``.

    Raises:
      CheckpointError: see `read_manifest`.
    """
    directory = Path(directory)
    manifest, config = read_manifest(directory)
    is_dit = isinstance(config, DiTConfig)
    variant = (variant_name(config) if is_dit else None) or "none of the official variants"
    entries = {
        "model": f"{directory.resolve().name}, {variant}",
        "architecture": _architecture(config),
        "input": _input(config, manifest),
        "tokens": str(config.num_tokens) if is_dit else None,
        "parameters": _number(manifest.get("parameters")) + (", position embedding included" if is_dit else ""),
        "prediction": config.prediction + (" and variance" if config.learn_sigma else ""),
        "path": None if config.path == "ddpm" else config.path,
        "timesteps": f"{config.timestep_convention} convention",
        "dtype": f"stored {_stored_dtypes(directory)}, computes in {config.dtype}",
        "on disk": _bytes(sum(path.lstat().st_size for path in directory.rglob("*") if path.is_file())),
        "digest": str(manifest["digest"]),
        "classes": _classes(config, manifest),
        **_provenance(manifest),
        **_training(manifest),
        "command": manifest.get("command"),
        "versions": ", ".join(f"{name} {version}" for name, version in _mapping(manifest, "versions").items()),
    }
    shown = {name: value for name, value in entries.items() if value}
    width = max(map(len, shown))
    return "\n".join(f"{name:<{width}}  {value}" for name, value in shown.items())


def manifest_json(directory: str | Path) -> str:
    """The manifest of a model folder, as indented JSON."""
    return json.dumps(load_manifest(directory), indent=2)


def verify(directory: str | Path) -> tuple[bool, str]:
    """Whether the arrays of a model folder are those that its manifest was written for, and a line that says so.

    Raises:
      CheckpointError: this is not a model folder, or its arrays cannot be read.
    """
    written, found = load_manifest(directory)["digest"], weights_digest(directory)
    if found == written:
        return True, "verified: the arrays have the digest of the manifest"
    return False, f"MISMATCH: the arrays have digest {found}, but the manifest says {written}; make the folder again"


def _architecture(config: NetworkConfig) -> str:
    if isinstance(config, ControlConfig):
        return f"{config.architecture}, depth {config.depth}, width {config.hidden_size}, no attention"
    assert isinstance(config, DiTConfig)
    return (
        f"{config.depth} layers, width {config.hidden_size}, {config.num_heads} heads, MLP {config.mlp_size}, "
        f"patch {config.patch_size}"
    )


def _input(config: NetworkConfig, manifest: Mapping) -> str:
    size = f"{config.input_size} x {config.input_size} x {config.in_channels}"
    if has_pixels(manifest):
        return f"{size}, standardized pixels"
    if is_latent(manifest):
        side = VAE_FACTOR * config.input_size
        return f"{size}, latents of {side} x {side} pictures for the Stable Diffusion autoencoder"
    return size


def _classes(config: NetworkConfig, manifest: Mapping) -> str:
    known = names(manifest)
    if not known:
        return f"{config.num_classes}, without names"
    few = ", ".join(f"{label} {short_name(label, known)}" for label in range(min(len(known), SHOWN_CLASSES)))
    return f"{config.num_classes}: {few}{', ...' if len(known) > SHOWN_CLASSES else ''}"


def _provenance(manifest: Mapping) -> dict[str, str]:
    source = _mapping(manifest, "source")
    if not source:
        return {}
    sha256 = source.get("sha256")
    return {
        "converted": f"{source.get('file')} ({source.get('form')})",
        "its SHA-256": ", ".join(f"{file} {value}" for file, value in sha256.items())
        if isinstance(sha256, Mapping)
        else str(sha256),
        "licence": LICENCE,
    }


def _training(manifest: Mapping) -> dict[str, str]:
    data, training, loss = (_mapping(manifest, name) for name in ("data", "training", "final_loss"))
    lines = {}
    if data:
        lines["data"] = f"{_number(data.get('images'))} images, SHA-256 {data.get('sha256')}"
        if transformation := _mapping(data, "transformation"):
            lines["transformation"] = f"{transformation.get('name')}: {transformation.get('does')}"
    if training:
        told = {"steps": "steps", "batch_size": "batch", "learning_rate": "learning rate", "seed": "seed"}
        lines["training"] = ", ".join(f"{word} {training[name]}" for name, word in told.items() if name in training)
    longer = training.get("extensions")
    if isinstance(longer, list):
        at = ", ".join(f"at step {_mapping({'': each}, '').get('at_step')}" for each in longer)
        lines["training"] = f"{lines.get('training', '')}, made longer {at}"
    if isinstance(loss.get("mse"), float):
        lines["final loss"] = f"mean square {loss['mse']:.4f} at step {loss.get('step')}"
    return lines


def _stored_dtypes(directory: Path) -> str:
    """Stored dtypes from the headers of the arrays; the manifest does not name them."""
    try:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.metadata((directory / "params").resolve()).item_metadata.tree
        return ", ".join(sorted({str(array.dtype) for array in jax.tree.leaves(found)}))
    except Exception:  # Orbax raises many kinds for a damaged folder, which --verify is for
        return "unreadably"


def _mapping(manifest: Mapping, name: str) -> dict[str, Any]:
    entry = manifest.get(name)
    return entry if isinstance(entry, dict) else {}


def _number(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _bytes(size: int) -> str:
    for unit, power in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= power:
            return f"{size / power:.1f} {unit}"
    return f"{size} bytes"
