"""How far a block is, where one takes long: every call of the network inside a compiled loop says that it was made.

Only on a CPU, and only for calls that take about a second or more: a program that calls back is not kept in JAX's
persistent cache, which matters to accelerators, whose blocks are short. What is measured does not depend on it.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import jax

from dit_jax.diffusion import Denoiser, DenoiserOutput

SLOW = 1e11  # floating point operations of a call that is worth a word


class BlockProgress:
    """The block that is measured now, on a progress bar.

    Attributes:
      seen: images that have gone through the network.
    """

    def __init__(self, bar: Any, images: float) -> None:
        """Takes the bar of the blocks, and the images of this one."""
        self.bar, self.images, self.seen = bar, images, 0

    def add(self, images: int) -> None:
        self.seen += images
        self.bar.set_postfix_str(f"{min(self.seen / self.images, 1):.0%} of this block")


_now: list[BlockProgress] = []  # a compiled program outlives the block that it was compiled for, so it looks here


@contextmanager
def progress_of_block(bar: Any, images: float) -> Iterator[None]:
    """Shows on `bar` how many of the block's images have gone through the network."""
    _now[:] = [BlockProgress(bar, images)]
    try:
        yield
    finally:
        _now.clear()
        bar.set_postfix_str("")


def telling(denoise: Denoiser, halves: int, flops_of_image: float) -> Denoiser:
    """The same denoiser, whose calls say that they were made if they are slow.

    Args:
      halves: images that the network sees for one that is denoised.
      flops_of_image: floating point operations of the network for one image.
    """

    def told(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
        images = math.prod(x.shape[:-3]) * halves
        if images * flops_of_image >= SLOW and jax.default_backend() == "cpu":
            jax.debug.callback(partial(_passed, images))
        return denoise(x, step, labels)

    return told


def _passed(images: int) -> None:
    for block in _now:
        block.add(images)
