"""JAX's numerical settings under which studies measure."""

from collections.abc import Iterator
from contextlib import contextmanager

import jax


@contextmanager
def own_numerics() -> Iterator[None]:
    """JAX as studies need it, whatever the environment says: they measure in single precision, and missing values are
    NaN. A part that needs double precision asks for it."""
    with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"), jax.debug_nans(False), jax.debug_infs(False):
        yield
