"""Images whose law is known exactly: a Gaussian spectrum, two clusters, and a coupled pair (docs/theory.md, section 9).

They are 8 x 8 with two channels, which are thought of as the two members of a pair: the common and the difference mode
``(a +- b) / sqrt(2)`` of the channels, in DCT coefficients, are the modes in which the law is independent.

    gaussian   every mode Gaussian, variance falling as a power of the frequency
    clusters   the same with a smaller variance, and one sign in a few low modes of the common mode
    pair       the same with two independent signs, a strong one in the common mode, a weak one in the difference mode
"""

from dataclasses import dataclass
from functools import cached_property

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.training import TrainConfig
from ou_theory.cluster_laws import Clusters
from ou_theory.keys import random_key
from ou_theory.modes import dct2, idct2

SIZE, CHANNELS = 8, 2
EXPONENT = 1.25  # of 1 + i^2 + j^2
WITHIN = 0.2  # variance within clusters, as a share of the Gaussian law's
CARRIERS = ((0, 1), (1, 0), (1, 1))  # coefficients that carry a sign
STRENGTH = {"common": 16.0, "difference": 6.0}  # |m|^2 of a sign's centre
NAMES = ("gaussian", "clusters", "pair")
OWN = 2**31  # in the keys of training batches: a number beyond those that training uses


def spectrum() -> np.ndarray:
    """Variance (8, 8) of each coefficient of the Gaussian law, 1 on average."""
    i, j = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    power = (1.0 + i**2 + j**2) ** -EXPONENT
    return power / power.mean()


def law(name: str) -> Clusters:
    """The law of one class, over modes (8 * 8 * 2): DCT coefficient outer, common and difference mode inner."""
    within = spectrum() if name == "gaussian" else WITHIN * spectrum()
    parts = {"gaussian": (), "clusters": ("common",), "pair": ("common", "difference")}[name]
    centres = np.zeros((len(parts), SIZE, SIZE, CHANNELS))
    for a, part in enumerate(parts):
        for i, j in CARRIERS:
            centres[a, i, j, ("common", "difference").index(part)] = np.sqrt(STRENGTH[part] / len(CARRIERS))
    variance = np.repeat(within[..., None], CHANNELS, -1).reshape(-1)
    return Clusters(
        jnp.asarray(variance, jnp.float32), jnp.asarray(centres.reshape(len(parts), variance.size), jnp.float32)
    )


def to_modes(x: jax.Array) -> jax.Array:
    """Images (..., 8, 8, 2) -> modes (..., 128); orthonormal."""
    return _rotate(dct2(x)).reshape(*x.shape[:-3], -1)


def to_images(modes: jax.Array) -> jax.Array:
    """Inverse of `to_modes`."""
    return idct2(_rotate(modes.reshape(*modes.shape[:-1], SIZE, SIZE, CHANNELS)))


def _rotate(x: jax.Array) -> jax.Array:
    """Channels (a, b) to (a + b, a - b) / sqrt(2), its own inverse."""
    return jnp.stack([x[..., 0] + x[..., 1], x[..., 0] - x[..., 1]], -1) * np.sqrt(0.5).item()


@dataclass(frozen=True)
class SolvableData:
    """The three laws as training data, drawn on the fly: no image is seen twice."""

    @property
    def class_names(self) -> tuple[str, ...]:
        return NAMES

    @property
    def shape(self) -> tuple[int, int, int]:
        return (SIZE, SIZE, CHANNELS)

    @property
    def may_mirror(self) -> bool:
        return False  # a mirror turns the signs of some of the modes that carry a cluster, and not those of the others

    @cached_property
    def _draw(self):
        laws = [law(name) for name in NAMES]

        @jax.jit
        def draw(seed, step, labels):
            # Training splits the key of (seed, step) for itself, and parts of a split are what folding 0, 1, ... gives.
            key = jax.random.fold_in(jax.random.fold_in(random_key(seed), step), OWN)
            each = jnp.stack([one.draw(jax.random.fold_in(key, c), labels.size) for c, one in enumerate(laws)])
            return to_images(each[labels, jnp.arange(labels.size)])

        return draw

    def batch(self, config: TrainConfig, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Images and labels of one step, the classes in turn."""
        labels = np.arange(config.batch_size, dtype=np.int32) % len(NAMES)
        return np.asarray(self._draw(config.seed, step, labels)), labels

    def preparation(self) -> dict:
        return {
            "law": "experiments.solvable_data",
            "class_names": list(NAMES),
            "size": SIZE,
            "exponent": EXPONENT,
            "within": WITHIN,
            "carriers": [list(pair) for pair in CARRIERS],
            "strength": STRENGTH,
        }

    def pictures(self, x: np.ndarray) -> np.ndarray:
        """First channel red, second blue, their mean green; 1 standard deviation is a fifth of the range."""
        a, b = np.moveaxis(np.asarray(x), -1, 0)
        colour = np.stack([a, (a + b) / 2, b], -1)
        return np.clip(np.round((0.5 + 0.2 * colour) * 255), 0, 255).astype(np.uint8)
