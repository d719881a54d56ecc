"""The mechanism study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.steps import spaced_steps
from experiments.frame.study import Study
from experiments.studies.mechanism.analysis import DEFINITIONS, analyse
from experiments.studies.mechanism.measure import measure
from experiments.studies.mechanism.page import page
from experiments.studies.mechanism.settings import MechanismConfig


def passes(config: MechanismConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: uncoupled trajectories of both replicas, and one pass at every level and coupling."""
    clock = network.clock(config.steps)
    each = 2 * config.halves * (len(clock) + len(spaced_steps(clock, config.levels)) * len(config.couplings))
    pairs = {"network": config.pairs, "untrained": config.untrained_pairs, "random": config.untrained_pairs}
    return {group: each * count for group, count in pairs.items()}


STUDY = Study("mechanism", MechanismConfig, measure, page, analyse, DEFINITIONS, passes=passes)
