"""The main study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.study import Study
from experiments.studies.compare.analysis import analyse
from experiments.studies.compare.definitions import DEFINITIONS
from experiments.studies.compare.family import together
from experiments.studies.compare.measure import few, measure
from experiments.studies.compare.modes import check
from experiments.studies.compare.page import page
from experiments.studies.compare.settings import CompareConfig


def passes(config: CompareConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: trajectories of both replicas at every coupling, and on whole blocks as many again
    for the gain of one pass."""
    image_steps = 2 * len(network.clock(config.steps)) * config.halves
    gained = min(config.pairs, -(-config.gain_pairs // config.block) * config.block)
    return {
        "network": image_steps * len(config.couplings) * (config.pairs + gained),
        "untrained": image_steps * len(few(config.couplings)) * min(config.pairs, config.untrained_pairs),
    }


STUDY = Study("compare", CompareConfig, measure, page, analyse, DEFINITIONS, check, together, passes=passes)
