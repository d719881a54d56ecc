"""How much arithmetic a network call is."""

from dit_jax.config import DiTConfig


def flops(config: DiTConfig, images: int, replicas: int) -> float:
    """Floating point operations of the matrix products of one call on `images` times `replicas`, two per
    multiply-add; replicas read each other's keys."""
    d, t, m = config.hidden_size, config.num_tokens, config.mlp_size
    token = config.depth * (4 * d * d + 2 * d * m + 2 * replicas * t * d)
    token += config.patch_size**2 * config.in_channels * d + d * config.patch_features
    conditioning = config.depth * 6 * d * d + 256 * d + 3 * d * d
    return 2.0 * images * (replicas * t * token + conditioning)
