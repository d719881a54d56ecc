"""What a run costs, known before it runs: images that go through a network, and the arithmetic of each.

A study says how many images go through a network in each group that it measures (`Study.passes`). Every image of every
call counts: of both replicas, at every coupling, both halves under guidance, of the untrained control. A direction
along which a derivative is carried through the network counts as an image, for it goes through the same matrix
products.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from dit_jax.config import ControlConfig, DiTConfig, NetworkConfig
from dit_jax.controls import CONDITIONING
from dit_jax.model import FREQUENCY_FEATURES


class Costed(Protocol):
    """A study that may say what goes through its network, an `experiments.frame.study.Study`."""

    @property
    def passes(self) -> Callable[[Any, NetworkConfig], Mapping[str, int]] | None: ...


def passes_of(study: Costed, config: Any, network: NetworkConfig) -> Mapping[str, int]:
    """Images that go through a network by group, in the order in which groups are measured; none of a study that does
    not say."""
    return {} if study.passes is None else study.passes(config, network)


def run_flops(study: Costed, config: Any, network: NetworkConfig) -> float:
    """Floating point operations of the network's matrix products in a whole run of pairs of replicas. Runs of a sweep
    can share devices by it; analysis and exact denoisers are not counted, which cost little beside a large network."""
    return sum(passes_of(study, config, network).values()) * flops(network, 0.5, 2)


def flops(config: NetworkConfig, images: float, replicas: int) -> float:
    """Floating point operations of the matrix products of one call on `images` times `replicas`, two per multiply-add.
    In a DiT, replicas read each other's keys and share the conditioning.

    Args:
      config: of a DiT, or of a control without attention.
    """
    if isinstance(config, DiTConfig):
        d, t = config.hidden_size, config.num_tokens
        token = config.depth * (4 * d * d + 2 * d * config.mlp_size + 2 * replicas * t * d)
        token += config.patch_size**2 * config.in_channels * d + d * config.patch_features
        each, shared = t * token, config.depth * 6 * d * d + 2 * d * d + _embedding(d)
    else:
        assert isinstance(config, ControlConfig)
        each, shared = _unet(config) if config.architecture == "unet" else _mlp(config)
    return 2.0 * images * (replicas * each + shared)


def _embedding(width: int) -> int:
    """Multiply-adds of the timestep's embedding."""
    return FREQUENCY_FEATURES * width + width * width


def _unet(config: ControlConfig) -> tuple[int, int]:
    """Multiply-adds of an image, and of the conditioning that replicas share."""
    d, pixels = config.hidden_size, config.input_size**2
    at_full = 9 * config.in_channels * d + 2 * config.depth * 18 * d * d + 2 * d * d + 9 * d * config.out_channels
    at_half = 4 * d * 2 * d + config.depth * 18 * (2 * d) ** 2 + 2 * d * 4 * d
    widths = config.depth * (3 * d + 3 * 2 * d + 3 * d) + 2 * d
    return pixels * at_full + pixels // 4 * at_half, CONDITIONING * widths + _embedding(CONDITIONING)


def _mlp(config: ControlConfig) -> tuple[int, int]:
    """Multiply-adds of an image, and of the conditioning that replicas share."""
    d, sites = config.hidden_size, config.input_size**2
    image = sites * config.in_channels * d + config.depth * 2 * d * d + d * sites * config.out_channels
    return image, CONDITIONING * (3 * config.depth + 2) * d + _embedding(CONDITIONING)
