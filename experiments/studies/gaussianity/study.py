"""The gaussianity study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.study import Study
from experiments.studies.gaussianity.analysis import DEFINITIONS, analyse
from experiments.studies.gaussianity.measure import check, measure
from experiments.studies.gaussianity.page import page
from experiments.studies.gaussianity.settings import GaussianityConfig


def passes(config: GaussianityConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: both replicas are sampled, and looked at with every noise."""
    levels = 2 * len(config.noise)
    each = 2 * len(network.clock(config.steps)) + levels
    found = {"network": each * config.pairs, "untrained": each * config.untrained_pairs}
    return found if config.images is None else {**found, "photographs": levels * config.pairs}


STUDY = Study("gaussianity", GaussianityConfig, measure, page, analyse, DEFINITIONS, check, passes=passes)
