"""A small convolutional classifier of images. It says in which class a trajectory has ended (docs/theory.md, 11.3).

It reads images as a network of diffusion does, and undoes that network's scaling of the pixels, so that one classifier
serves all networks of its classes and size. It is kept in one file without pickles, with what it was trained on and how
often it is right on images that it has not seen.
"""

import hashlib
import io
import json
import os
import zipfile
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree
from scipy.stats import beta
from tqdm import tqdm

from dit_jax.controls import neighbourhoods
from dit_jax.disk import CheckpointError
from dit_jax.images import ImageSet
from dit_jax.model import patchify
from ou_theory.keys import random_key

WIDTHS = (32, 64, 128)  # channels after each convolution; the image has a quarter of the pixels at each further one
LARGEST = 2**24  # bytes that the arrays of a file may take; a file from elsewhere could claim any number
PAD = 4  # pixels by which training shifts an image at most

Layers = Sequence[
    tuple[jax.Array | np.ndarray, jax.Array | np.ndarray]
]  # kernel (fan in, fan out) and bias (fan out,) of every layer


class ClassifierError(ValueError):
    """A classifier that cannot be trained, read or used."""


class Classifier(NamedTuple):
    """A trained classifier."""

    layers: Layers  # its arrays, float32
    about: dict[str, Any]  # class names, size, images, settings, accuracy on the test images with its 95 % interval

    @property
    def class_names(self) -> tuple[str, ...]:
        return tuple(self.about["class_names"])

    def reader(self, manifest: dict[str, Any]) -> "Classifier":
        """The classifier for images (..., H, W, 3) as the network of this manifest sees and makes them, which are
        ``(pixel / 127.5 - 1 - mean) / std``.

        Raises:
          ClassifierError: the network makes no such images, or images of another size.
        """
        data, size = manifest.get("data") or {}, manifest["config"]["input_size"]
        if manifest["config"]["in_channels"] != 3 or "mean" not in data or data.get("transformation"):
            raise ClassifierError(
                "a classifier reads photographs; this network makes none, or its manifest does not say how their "
                "pixels were scaled (data: mean and std): take a network that `syncgap train` made of photographs"
            )
        if size != self.about["size"]:
            raise ClassifierError(
                f"the classifier reads images of {self.about['size']} pixels and the network makes {size}: train one "
                f"with `syncgap classifier ... --size {size}`"
            )
        return self._replace(about=self.about | {"mean": data["mean"], "std": data["std"]})

    def digest(self) -> str:
        """SHA-256 of the arrays."""
        return hashlib.sha256(
            b"".join(np.asarray(v, np.float32).tobytes() for each in self.layers for v in each)
        ).hexdigest()

    def log_odds(self, images: jax.Array) -> jax.Array:
        """Logits (..., classes) of images (..., H, W, 3) in [-1, 1], or of a network after `reader`."""
        scaled = images * self.about.get("std", 1.0) + jnp.asarray(self.about.get("mean", 0.0), images.dtype)
        return logits(self.layers, scaled.reshape(-1, *images.shape[-3:])).reshape(*images.shape[:-3], -1)

    def classes(self, images: jax.Array) -> jax.Array:
        """The likeliest class (...) int32 of images (..., H, W, 3), see `log_odds`."""
        return self.log_odds(images).argmax(-1).astype(jnp.int32)


def check_form(size: int, epochs: int = 1, batch: int = 1) -> None:
    """Raises ClassifierError unless images of this side can be read, and there is something to train."""
    if size < 8 or size % 8:
        raise ClassifierError(f"the side of the images must be a multiple of 8, got {size}; give another --size")
    if epochs < 1 or batch < 1:
        raise ClassifierError(f"--epochs and --batch-size must be at least 1, got {epochs} and {batch}")


def initial_layers(size: int, classes: int, key: jax.Array) -> Layers:
    """Random layers for images (size, size, 3).

    Raises:
      ClassifierError: `size` is no multiple of 8, or there are fewer than two classes.
    """
    check_form(size)
    if classes < 2:
        raise ClassifierError("a classifier needs two classes or more; name them with --classes")
    fans = [12, *WIDTHS]
    shapes = [(9 * a, b) for a, b in pairwise(fans)] + [(WIDTHS[-1], classes)]
    keys = jax.random.split(key, len(shapes))
    return [
        (jax.random.normal(k, shape, jnp.float32) * np.float32((2 / shape[0]) ** 0.5), jnp.zeros(shape[1]))
        for k, shape in zip(keys, shapes, strict=True)
    ]


def logits(layers: Layers, x: jax.Array) -> jax.Array:
    """Logits (N, classes) of images (N, H, W, 3) in [-1, 1]."""
    *convolutions, (kernel, bias) = layers
    side = x.shape[1] // 2
    hidden = patchify(x, 2).reshape(len(x), side, side, -1)
    for i, (w, b) in enumerate(convolutions):
        if i:
            n, height, width, features = hidden.shape
            hidden = hidden.reshape(n, height // 2, 2, width // 2, 2, features).mean((2, 4))
        hidden = jax.nn.gelu(jnp.matmul(neighbourhoods(hidden), w) + b)
    return jnp.matmul(hidden.mean((1, 2)), kernel) + bias


def train_classifier(
    images: ImageSet, test: ImageSet, *, epochs: int = 20, batch: int = 128, seed: int = 0, progress: bool = False
) -> Classifier:
    """Trains on one set of images, mirrored and shifted at random, and counts on another how often it is right.

    Args:
      images, test: of the same classes and size.
      epochs: passes over the images.
      batch: images in a step.
      seed: of initial layers, order, mirrors and shifts.

    Raises:
      ClassifierError: the sets do not fit each other, are the same, or are too small. That they share some images is
        not noticed.
    """
    if test.class_names != images.class_names or test.pixels.shape[1:] != images.pixels.shape[1:]:
        raise ClassifierError(
            f"the test images have the classes {', '.join(test.class_names)}, the training images "
            f"{', '.join(images.class_names)}: name the same with --classes"
        )
    if test.digest == images.digest:
        raise ClassifierError("the test images are the training images; give others, or the accuracy means nothing")
    if len(images.pixels) < batch:
        raise ClassifierError(f"{len(images.pixels)} images do not fill a batch of {batch}; give more images")
    check_form(images.pixels.shape[1], epochs, batch)
    size, steps = images.pixels.shape[1], epochs * (len(images.pixels) // batch)
    layers = initial_layers(size, len(images.class_names), random_key(seed))
    rate = optax.cosine_decay_schedule(3e-3, steps)
    optimizer = optax.adamw(rate, weight_decay=1e-2)
    state = optimizer.init(layers)

    @jax.jit
    def update(layers, state, pixels, labels):
        def loss(layers):
            found = logits(layers, pixels.astype(jnp.float32) / 127.5 - 1)
            return optax.softmax_cross_entropy_with_integer_labels(found, labels).mean()

        change, state = optimizer.update(jax.grad(loss)(layers), state, layers)
        return optax.apply_updates(layers, change), state

    draw = np.random.default_rng(seed)
    bar = tqdm(total=steps, desc="classifier", disable=not progress)
    for _ in range(epochs):
        order = draw.permutation(len(images.pixels))
        for first in range(0, len(order) - batch + 1, batch):
            chosen = order[first : first + batch]
            pixels = _varied(images.pixels[chosen], draw)
            layers, state = update(layers, state, pixels, images.labels[chosen])
            bar.update()
    bar.close()
    about = {
        "format": "syncgap-classifier",
        "class_names": list(images.class_names),
        "size": size,
        "images": images.preparation(),
        "training": {"epochs": epochs, "batch": batch, "seed": seed},
    }
    made = Classifier([(np.asarray(w), np.asarray(b)) for w, b in layers], about)
    right = np.concatenate([np.asarray(made.classes(part)) for part in _parts(test.pixels)]) == test.labels
    return made._replace(about=about | {"test": {**accuracy(right), "sha256": test.digest}})


def accuracy(right: np.ndarray) -> dict[str, Any]:
    """How often a classifier is right, by answers (N,) bool, with the exact 95 % interval (Clopper and Pearson)."""
    count, hits = len(right), int(right.sum())
    low = float(beta.ppf(0.025, hits, count - hits + 1)) if hits else 0.0
    high = float(beta.ppf(0.975, hits + 1, count - hits)) if hits < count else 1.0
    return {"images": count, "accuracy": hits / count, "interval": [low, high]}


def _parts(pixels: np.ndarray, most: int = 500):
    for first in range(0, len(pixels), most):
        yield jnp.asarray(pixels[first : first + most], jnp.float32) / 127.5 - 1


def _varied(pixels: np.ndarray, draw: np.random.Generator) -> np.ndarray:
    """Images (N, size, size, 3) uint8 mirrored and shifted at random, the border repeated."""
    count, size = pixels.shape[:2]
    wide = np.pad(pixels, ((0, 0), (PAD, PAD), (PAD, PAD), (0, 0)), mode="edge")
    rows, columns = draw.integers(0, 2 * PAD + 1, (2, count, 1)) + np.arange(size)
    mirrored = draw.random((count, 1)) < 0.5
    columns = np.where(mirrored, columns[:, ::-1], columns)
    return wide[np.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]]


def save_classifier(path: str | Path, classifier: Classifier) -> None:
    """Writes a classifier as an .npz file without pickles, in one move."""
    path, content = Path(path), io.BytesIO()
    arrays = {}
    for i, (kernel, bias) in enumerate(classifier.layers):
        arrays |= {f"kernel{i}": np.asarray(kernel, np.float32), f"bias{i}": np.asarray(bias, np.float32)}
    np.savez_compressed(content, manifest=np.array(json.dumps(classifier.about)), **arrays)
    partial = path.with_name(f".{path.name}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.write_bytes(content.getvalue())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_classifier(path: str | Path) -> Classifier:
    """A classifier from its file.

    Raises:
      CheckpointError: there is no such file, or it holds no classifier.
      ClassifierError: it does not say how often it is right on test images.
    """
    path = Path(path)
    remedy = "syncgap classifier makes one"
    if not path.is_file():
        raise CheckpointError(f"there is no classifier {path}; {remedy}")
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > LARGEST:
                raise ValueError("it claims more bytes than any classifier has")
        with np.load(path, allow_pickle=False) as stored:
            about = json.loads(str(stored["manifest"]))
            count = len([name for name in stored if name.startswith("kernel")])
            layers = [(np.asarray(stored[f"kernel{i}"]), np.asarray(stored[f"bias{i}"])) for i in range(count)]
        if about.get("format") != "syncgap-classifier":
            raise ValueError("its manifest is not that of a classifier")
        expected = jax.eval_shape(lambda: initial_layers(about["size"], len(about["class_names"]), random_key(0)))
        if [tuple(np.shape(v) for v in layer) for layer in layers] != [tuple(v.shape for v in e) for e in expected]:
            raise ValueError("its arrays have other shapes than its manifest says")
        if not np.isfinite(ravel_pytree(layers)[0]).all():
            raise ValueError("its arrays are not finite")
    except Exception as error:  # a damaged archive raises many kinds
        raise CheckpointError(f"{path} is no classifier that can be used ({error}); {remedy}") from error
    test = about.get("test")
    if not isinstance(test, dict) or not {"images", "accuracy", "interval"} <= set(test):
        raise ClassifierError(f"{path} does not say how often it is right on test images; {remedy} that does")
    return Classifier(layers, about)


def check_classes(classifier: Classifier, names: Sequence[str]) -> None:
    """Raises ClassifierError unless the classifier tells exactly the classes of these names, in this order."""
    if classifier.class_names != tuple(names):
        raise ClassifierError(
            f"the classifier tells {', '.join(classifier.class_names)}; the network was trained on "
            f"{', '.join(names)}: train a classifier of these with `syncgap classifier`"
        )
