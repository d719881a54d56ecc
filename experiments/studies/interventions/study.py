"""The interventions study as one object."""

from dit_jax.config import DiTConfig, NetworkConfig
from experiments.frame.study import Study
from experiments.studies.interventions.analysis import DEFINITIONS, analyse
from experiments.studies.interventions.arms import control_arms, edit_arms, gate_arms
from experiments.studies.interventions.measure import check, measure
from experiments.studies.interventions.page import page
from experiments.studies.interventions.settings import InterventionsConfig


def passes(config: InterventionsConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: trajectories of both replicas in every arm."""
    assert isinstance(network, DiTConfig)
    clock = network.clock(config.steps)
    groups = (
        ("network", gate_arms, config.pairs),
        ("edits", edit_arms, config.pairs),
        ("untrained", control_arms, config.untrained_pairs),
    )
    each = 2 * len(clock) * config.halves
    return {group: each * len(arms(clock, network, config)) * pairs for group, arms, pairs in groups}


STUDY = Study("interventions", InterventionsConfig, measure, page, analyse, DEFINITIONS, check, passes=passes)
