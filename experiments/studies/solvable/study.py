"""The solvable study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.steps import spaced_steps
from experiments.frame.study import Study
from experiments.studies.solvable.analysis import DEFINITIONS, analyse
from experiments.studies.solvable.data import NAMES
from experiments.studies.solvable.measure import check, measure
from experiments.studies.solvable.page import page
from experiments.studies.solvable.settings import SIGNS, SolvableConfig


def passes(config: SolvableConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: trajectories of both replicas under every law; a state and its derivative at every
    step for every sign; the rest of the trajectory of two clones from every branch under two laws."""
    clock = network.clock(config.steps)
    cloned = 2 * int((len(clock) - spaced_steps(clock, config.branches, last=False)).sum())
    each = 2 * (len(clock) * (len(NAMES) + len(SIGNS)) + cloned)
    pairs = {"network": config.pairs, "untrained": config.untrained_pairs}
    return {group: each * count for group, count in pairs.items()}


STUDY = Study("solvable", SolvableConfig, measure, page, analyse, DEFINITIONS, check, passes=passes)
