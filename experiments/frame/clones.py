"""Clones: continuations of one state of a trajectory with noise of their own (docs/theory.md, section 11.1)."""

import jax

from dit_jax.diffusion import Denoiser, ancestral_step
from ou_theory.clock import Clock


def clone_ends(denoise: Denoiser, clock: Clock, states, branch, labels, noise) -> jax.Array:
    """Where clones end: the ancestral sampler continues from a step with fresh noise.

    Args:
      states: (2, P, H, W, C) at the step `branch`, which may be traced.
      labels: (P,).
      noise: ``noise(step)`` of the shape of the states.

    Returns:
      the ends (2, P, H, W, C).
    """
    update = ancestral_step(clock)

    def body(step, x):
        return update(step, x, denoise(x, step, labels), noise(step))

    return jax.lax.fori_loop(branch, len(clock), body, states)
