"""What every network demands of its inputs."""

import jax
import numpy as np
from jax.core import Tracer

from dit_jax.config import NetworkConfig


def check_labels(y: jax.Array, config: NetworkConfig) -> None:
    """Raises ValueError if a label is out of range. Traced labels are not checked."""
    last = config.label_rows - 1
    if not isinstance(y, Tracer) and np.any((np.asarray(y) < 0) | (np.asarray(y) > last)):
        which = "the null label" if config.null_label else "the last class (this network has no null label)"
        raise ValueError(f"labels must be from 0 to {last}, {which}; got {y}")


def check_images(x: jax.Array, config: NetworkConfig) -> None:
    """Raises ValueError unless images (N, H, W, C) or (R, N, H, W, C) fit the config."""
    image = (config.input_size, config.input_size, config.in_channels)
    if x.shape[-3:] != image or x.ndim not in (4, 5):
        raise ValueError(
            f"this model takes images (N, {', '.join(map(str, image))}), with or without replicas; got {x.shape}"
        )
