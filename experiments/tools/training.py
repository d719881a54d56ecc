"""Training a network, and the covariance of what it was trained on, as the command line asks for them."""

import contextlib
import functools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dit_jax import training
from dit_jax.checkpoint import load_manifest, require_x64
from dit_jax.class_names import names
from dit_jax.config import CONTROL_SIZES, config_from_dict
from dit_jax.covariance import MOST, covariance_for, data_covariance, save_covariance
from dit_jax.disk import writing
from dit_jax.image_files import read_labels
from dit_jax.images import ImageSet, load_images
from dit_jax.lock import held
from dit_jax.training import TrainConfig
from dit_jax.training_run import RUN
from dit_jax.transforms import training_data, transformation_name
from experiments.frame.subject import model_folder
from experiments.studies.solvable.data import SolvableData
from experiments.tools.settings import Covariance, Train


def train_model(command: Train, line: str) -> Path:
    """Trains the network that a command asks for, and stores the covariance of its images; returns its folder."""
    for name in ("size", "checkpoint_every"):  # what is wrong is said before the images are read, which takes a while
        if getattr(command, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(command, name)}")
    solvable = command.data == Path("solvable")
    settings = TrainConfig(
        steps=command.steps,
        batch_size=command.batch_size,
        learning_rate=command.learning_rate,
        decay_fraction=command.decay_fraction,
        weight_cap=command.weight_cap,
        label_dropout=0.0 if solvable else 0.1,
        seed=command.seed,
    )
    transform = transformation_name(command.transform)
    entries = _size(command) | {
        "input_size": command.size,
        # the theory of solvable data is that of the posterior variance, and flow matching learns no variance
        "learn_sigma": not solvable and command.path == "ddpm",
        "prediction": command.prediction,
        "path": command.path,
        "dtype": command.dtype,
    }
    config_from_dict(entries | {"in_channels": 1, "num_classes": 1})
    require_x64(command.dtype)
    for option, given in (("--transform", transform != "natural"), ("--labels", command.labels is not None)):
        if solvable and given:
            raise ValueError(f"{option} applies to folders and zip files of images, not to solvable data; leave it out")
    if solvable:
        data = SolvableData()
    else:
        data = training_data(_images(command, command.data, command.size), transform)
    model = config_from_dict(entries | {"in_channels": data.shape[-1], "num_classes": len(data.class_names)})

    def with_covariance(trained: Path) -> None:
        if isinstance(data, SolvableData):  # whose law is known
            return
        if math.prod(data.shape) <= MOST:
            save_covariance(trained, data_covariance(data))
        else:
            print("syncgap: the images are too large to store their covariance with the model", file=sys.stderr)

    return training.train(
        data,
        model,
        replace(settings, flip=data.may_mirror),
        command.out,
        resume=command.resume,
        checkpoint_every=command.checkpoint_every,
        command=line,
        progress=not command.quiet,
        then=with_covariance,
    )


def add_covariance(command: Covariance) -> Path:
    """Adds covariance and principal directions of the training data to a model folder; returns their file."""
    folder = model_folder(command.weights)
    with _held_model(folder), writing(folder):
        manifest = load_manifest(folder)
        trained_on = names(manifest) if manifest.get("data") else None
        images = _images(command, command.images, manifest["config"]["input_size"], trained_on)
        save_covariance(folder, covariance_for(manifest, images))
    return folder / "covariance.npz"


@contextlib.contextmanager
def _held_model(folder: Path) -> Iterator[None]:
    """Holds a model's folder, and that of the training run around it, which would replace the model at its end."""

    with contextlib.ExitStack() as stack:
        for place in [*([folder.parent] if (folder.parent / RUN).is_file() else []), folder]:
            stack.enter_context(held(place))
        yield


def _images(command: Train | Covariance, source: Path, size: int, labels: Sequence[str] | None = None) -> ImageSet:
    """The images of a command, after saying what they are; in classes as --labels has them, or else as `labels`."""

    if command.labels is not None:
        labels = read_labels(command.labels)
    say = functools.partial(print, flush=True)
    return load_images(source, size, not command.quiet, labels=labels, tell=say)


def _size(command: Train) -> dict[str, Any]:
    """The entries of the config that give the architecture and its size.

    Raises:
      ValueError: an option of a DiT is given for another architecture.
    """

    given = {name: getattr(command, name) for name in ("depth", "hidden_size", "num_heads", "patch_size")}
    given = {name: value for name, value in given.items() if value is not None}
    if command.architecture == "dit":
        return {"depth": 12, "hidden_size": 96, "num_heads": 6, "patch_size": 2} | given
    foreign = [f"--{name.replace('_', '-')}" for name in ("num_heads", "patch_size") if name in given]
    if foreign:
        raise ValueError(f"only a dit has {' and '.join(foreign)}, and this is a {command.architecture}; leave it out")
    depth, width = CONTROL_SIZES[command.architecture]
    return {"architecture": command.architecture, "depth": depth, "hidden_size": width} | given
