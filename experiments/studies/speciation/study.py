"""The speciation study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.study import Study
from experiments.studies.speciation.analysis import DEFINITIONS, analyse
from experiments.studies.speciation.measure import branch_steps, check, measure
from experiments.studies.speciation.page import page
from experiments.studies.speciation.settings import SpeciationConfig


def passes(config: SpeciationConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: both replicas from the first step on, and a clone of each from every branch on."""
    clock = network.clock(config.steps)
    each = 2 * (len(clock) + int((len(clock) - branch_steps(config, clock)).sum()))
    return {
        "network": each * config.halves * config.pairs,
        "labelled": each * config.labelled_pairs,  # without guidance
        "untrained": each * config.halves * config.untrained_pairs,
    }


STUDY = Study("speciation", SpeciationConfig, measure, page, analyse, DEFINITIONS, check, passes=passes)
