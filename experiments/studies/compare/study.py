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
    gained = min(config.end, -(-config.gain_pairs // config.block) * config.block)
    control = max(0, min(config.end, config.untrained_pairs) - config.first_pair)
    return {
        "network": image_steps * len(config.couplings) * (config.pairs + max(0, gained - config.first_pair)),
        "untrained": image_steps * len(few(config.couplings)) * control,
    }


STUDY = Study("compare", CompareConfig, measure, page, analyse, DEFINITIONS, check, together, passes=passes, joins=True)
