"""The cloning study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.study import Study
from experiments.studies.cloning.analysis import DEFINITIONS, analyse
from experiments.studies.cloning.measure import check, inner_branches, measure
from experiments.studies.cloning.page import page
from experiments.studies.cloning.settings import CloningConfig


def passes(config: CloningConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: trajectories of both replicas, one prediction from noised ends at every step, and the
    rest of the trajectory from every branch."""
    clock = network.clock(config.steps)
    steps = 2 * len(clock) + int((len(clock) - inner_branches(clock, config.branches)).sum())
    pairs = {"network": config.pairs, "untrained": config.untrained_pairs}
    return {group: 2 * steps * config.halves * count for group, count in pairs.items()}


STUDY = Study("cloning", CloningConfig, measure, page, analyse, DEFINITIONS, check, passes=passes)
