"""Global strictness, and the x64 switch."""

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "warn")


@pytest.fixture
def x64():
    """Double precision for one test."""
    with jax.enable_x64(True):
        yield
