"""Keys of JAX's random numbers, made in one place: the environment cannot change which numbers a seed stands for."""

import jax
from jax.typing import ArrayLike

GENERATOR = "threefry2x32"  # of every key; manifests say so
_FIXED = {"jax_threefry_partitionable": True, "jax_random_seed_offset": 0}  # what else the numbers hang on


def random_key(seed: ArrayLike) -> jax.Array:
    """The scalar typed key of a seed, of the generator `GENERATOR` whatever ``JAX_DEFAULT_PRNG_IMPL`` names.

    Args:
      seed: a whole number, of which JAX uses 32 bits; may be traced.

    Raises:
      ValueError: JAX is set to draw other numbers from the same key; the message names the setting.
    """
    for name, value in _FIXED.items():
        if getattr(jax.config, name, value) != value:
            raise ValueError(
                f"{name.upper()} is set to {getattr(jax.config, name)!r}, under which a seed stands for other random "
                f"numbers; leave it at {value!r}"
            )
    return jax.random.key(seed, impl=GENERATOR)
