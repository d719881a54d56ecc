"""The response study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.measured import NUM_BANDS
from experiments.frame.steps import spaced_steps, window
from experiments.frame.study import Study
from experiments.studies.response.analysis import DEFINITIONS, analyse
from experiments.studies.response.measure import check, measure
from experiments.studies.response.page import page
from experiments.studies.response.settings import LEAST, PLACES, PROBES, ResponseConfig


def passes(config: ResponseConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: trajectories of both replicas; at every step of the window, three times, their states
    and the directions that are carried; at every level and place, the states and the probes of all bands."""
    clock = network.clock(config.steps)
    carried = 3 * len(window(clock, LEAST)) * (1 + config.vectors)
    levels = len(spaced_steps(clock, config.levels, last=False))
    probed = len(PLACES) * levels * (1 + PROBES * (NUM_BANDS + 1))
    pairs = {"network": config.pairs, "untrained": config.untrained_pairs}
    each = 2 * config.halves * (len(clock) + carried + probed)
    return {group: each * count for group, count in pairs.items()}


STUDY = Study("response", ResponseConfig, measure, page, analyse, DEFINITIONS, check, passes=passes)
