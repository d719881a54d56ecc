"""The covariance of training data: what it is, where it is kept, and which data it is of."""

import numpy as np
import pytest

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.covariance import (
    FILE,
    covariance_for,
    data_covariance,
    load_covariance,
    save_covariance,
    within_class,
)
from dit_jax.disk import CheckpointError
from dit_jax.images import ImageSet
from dit_jax.transforms import doubled, training_data
from experiments.cli import main
from ou_theory.modes import radial_bands

RNG = np.random.default_rng(0)
SIZE = 8
PIXELS = RNG.integers(0, 256, (300, SIZE, SIZE, 3)).astype(np.uint8)
PIXELS[:150, :4] //= 3  # the classes differ in their mean


def image_set() -> ImageSet:
    labels = np.repeat([0, 1], 150).astype(np.int32)
    return ImageSet.of(PIXELS, labels, ("dark", "light")) if hasattr(ImageSet, "of") else make(PIXELS, labels)
