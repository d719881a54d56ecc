"""What readers of files say of a tensor, and the error that they raise."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class WeightsError(ValueError):
    """A checkpoint that cannot be read or does not hold a DiT."""


class Entry(NamedTuple):
    """One tensor of a file: its shape, and how to read it (float16, bfloat16, float32 or float64)."""

    shape: Shape
    read: Callable[[], np.ndarray]
