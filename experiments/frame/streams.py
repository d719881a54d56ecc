"""Random numbers by purpose: every use has its own key, which is folded from the seed, the purpose and indices.

The noise of the trajectories is keyed by the seed alone (`dit_jax.replicas.pair_noise`); every other purpose folds a
number of its own into that key first. These numbers are larger than any pair's index, so that no purpose shares a key
with a pair, and no seed shares one with another seed. `pair_noise` folds pair, step and replica into the key that it is
given. Two uses have generators of an older form, so that stored runs keep their bits: the shuffled bands of ``depth``,
and the draws of the study ``modalities``. Neither shares its numbers with a key.
"""

import jax
import jax.numpy as jnp
import numpy as np

from ou_theory.keys import random_key

FIRST = 2**31  # the numbers of the purposes begin here; indices of pairs, steps and branches are smaller
PURPOSES = {  # these numbers never change; a new purpose takes a new one
    "noised ends": 0,  # noise that is put on the ends of trajectories
    "clones": 1,  # noise of a clone after it has branched
    "probe trajectories": 2,  # noise of the pairs that the linear probe is fitted on
    "probe projection": 3,  # directions on which the linear probe projects wide streams
    "differences": 4,  # small differences that are pushed through a denoiser's derivative
    "directions": 5,  # directions that power iteration starts from
    "clean states": 6,  # draws of a known law
    "state noise": 7,  # noise that is put on the clean states
    "shuffles": 8,  # random assignments of coefficients to bands
    "untrained weights": 9,  # weights of the control network
}


def stream(seed: int | jax.Array, purpose: str, *indices: int | jax.Array) -> jax.Array:
    """The key of one purpose: a scalar typed key.

    Args:
      seed: of the run; may be traced.
      purpose: one of `PURPOSES`.
      indices: below `FIRST`, for example the step at which a clone branches; may be traced.

    Raises:
      ValueError: unknown purpose.
    """
    if purpose not in PURPOSES:
        raise ValueError(f"purpose {purpose!r} is not one of {', '.join(PURPOSES)}")
    key = jax.random.fold_in(random_key(seed), jnp.uint32(FIRST + PURPOSES[purpose]))
    for index in indices:
        key = jax.random.fold_in(key, index)
    return key


def numpy_stream(seed: int, purpose: str) -> np.random.Generator:
    """NumPy's generator for one purpose.

    Raises:
      ValueError: unknown purpose.
    """
    return np.random.default_rng(np.asarray(jax.random.key_data(stream(seed, purpose))))
