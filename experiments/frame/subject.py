"""Networks under study: a converted, trained or shipped network, and its control with random weights."""

from collections.abc import Hashable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.checkpoint import load_manifest, load_model, shipped_model
from dit_jax.config import ControlConfig, DiTConfig, NetworkConfig, config_from_dict
from dit_jax.controls import Network, make_network
from dit_jax.diffusion import WITHOUT_GUIDANCE
from dit_jax.disk import CheckpointError
from dit_jax.model import DiT
from dit_jax.platform import host_device
from experiments.frame.settings import Dtype
from experiments.frame.streams import stream


def model_folder(weights: str) -> Path:
    """The folder `weights`, or that of the shipped model of this name.

    Raises:
      CheckpointError: neither exists; it is a file; it is a training run, whose model is inside.
    """
    path = Path(weights)
    if not path.is_dir():
        return shipped_model(weights)
    if (path / "model" / "manifest.json").is_file() and not (path / "manifest.json").exists():
        raise CheckpointError(f"{weights} is a training run; its model is {path / 'model'}")
    return path


def model_name(folder: Path) -> str:
    """The name of a model: that of its folder. A folder ``model``, which `syncgap train` writes, has the name of the
    training run."""
    path = folder.resolve()
    return path.parent.name if path.name == "model" else path.name


class Subject(NamedTuple):
    """A network under study, without its weights."""

    name: str  # see `model_name`
    config: DiTConfig  # a `ControlConfig` only in a study that accepts any network
    manifest: dict  # of its folder: digest, data, training

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return (self.config.input_size, self.config.input_size, self.config.in_channels)


def load_subject(weights: str, dtype: Dtype | None = None) -> Subject:
    """What is known of a converted or trained network (a folder), or a shipped model by name.

    Args:
      dtype: of activations, in place of the stored one.

    Raises:
      ValueError: there is no such model, or its manifest cannot be used.
    """
    source = model_folder(weights)
    manifest = load_manifest(source)
    config = cast(DiTConfig, config_from_dict(manifest["config"]))
    return Subject(model_name(source), config if dtype is None else replace(config, dtype=dtype), manifest)


def load_network(weights: str, dtype: Dtype | None = None, on_host: bool = False) -> DiT:
    """The network of `load_subject`; one of `dit_jax.controls` only in a study that accepts any network.

    Args:
      dtype: of activations and parameters, in place of the stored one.
      on_host: leave the arrays in the host's memory, for models that are then placed on several devices and may not fit
        on one.

    Raises:
      ValueError: there is no such model, or its folder cannot be used.
    """
    with jax.default_device(host_device() if on_host else None):
        return cast(DiT, load_model(model_folder(weights), dtype, params=dtype))


def subject_key(weights: str, dtype: Dtype | None, on_host: bool) -> Hashable:
    """What tells subjects apart: where their weights lie, what is in them, and how they are loaded.

    Raises:
      ValueError: there is no such model, or its folder cannot be used.
    """
    source = model_folder(weights).resolve()
    return (source, load_manifest(source)["digest"], dtype, on_host)


def check_dit(subject: Subject, study: str) -> None:
    """Raises ValueError unless the network is a DiT, whose attention this study couples or reads."""
    config = cast(NetworkConfig, subject.config)
    if isinstance(config, ControlConfig):
        raise ValueError(
            f"syncgap {study} couples or reads attention and needs a DiT; {subject.name} is a {config.architecture}"
        )


def check_guidance(manifest: dict, config: NetworkConfig, guidance: float) -> None:
    """Raises ValueError for guidance by a network that has no null label, or has never seen it."""
    if guidance != 1:
        config.need_null_label(f"guidance {guidance:g}", WITHOUT_GUIDANCE)
    if guidance != 1 and (manifest.get("training") or {}).get("label_dropout") == 0:
        raise ValueError(
            "guidance compares a class with the null label, on which this network was not trained (its manifest says "
            "label_dropout 0); leave --guidance out, or train with label dropout"
        )


def untrained_model(config: NetworkConfig, seed: int) -> Network:
    """The control of a network: the same architecture with random weights. Those that initialisation sets to zero are
    drawn too, so that the blocks act and the output is not zero."""
    model = make_network(config, nnx.Rngs(stream(seed, "untrained weights", 0)))
    shapes = jax.tree.leaves(jax.eval_shape(lambda: nnx.state(model, nnx.Param)))
    for i, like in enumerate(shapes):
        if like.ndim >= 2 and not jnp.any(_leaf(model, i)):
            _set_leaf(model, i, jnp.zeros(0))  # lets go of the zeros before there is something in their place
            drawn = jax.random.normal(stream(seed, "untrained weights", 1, i), like.shape, like.dtype)
            _set_leaf(model, i, drawn * np.sqrt(2 / (like.shape[-1] + like.shape[-2])))
    return model


def _leaf(model: Network, i: int) -> jax.Array:
    return jax.tree.leaves(nnx.state(model, nnx.Param))[i]


def _set_leaf(model: Network, i: int, array: jax.Array) -> None:
    leaves, tree = jax.tree.flatten(nnx.state(model, nnx.Param))
    nnx.update(model, jax.tree.unflatten(tree, [*leaves[:i], array, *leaves[i + 1 :]]))
