"""Networks with random parameters everywhere, also where the initialisation is zero, so that every part matters."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.config import DiTConfig
from dit_jax.model import DiT, position_embedding


def random_model(config: DiTConfig, scale: float, seed: int = 0) -> DiT:
    """A network whose parameters are normal numbers of this scale; its constants are its own."""
    graph, params, constants = nnx.split(nnx.eval_shape(lambda: DiT(config, nnx.Rngs(0))), nnx.Param, ...)
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: jnp.asarray(scale * rng.standard_normal(leaf.shape), leaf.dtype), params)
    grid = config.input_size // config.patch_size
    positions = position_embedding(grid, config.hidden_size)
    fixed = jax.tree.map(lambda leaf: jnp.asarray(positions, leaf.dtype), constants)  # there are no other constants
    return nnx.merge(graph, drawn, fixed)
