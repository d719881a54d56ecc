"""The release study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.study import Study
from experiments.studies.release.analysis import DEFINITIONS, analyse
from experiments.studies.release.measure import measure, release_steps
from experiments.studies.release.page import page
from experiments.studies.release.settings import ORDERS, ReleaseConfig


def passes(config: ReleaseConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: trajectories of both replicas in every arm, and one pass without coupling and at each
    coupling along the uncoupled ones."""
    clock = network.clock(config.steps)
    arms = len(config.couplings) * len(ORDERS) * len(release_steps(clock, config.releases))
    image_steps = 2 * len(clock) * config.halves
    return {
        "network": image_steps * (arms + 1 + len(config.couplings)) * config.pairs,
        "untrained": image_steps * arms * config.untrained_pairs,
    }


STUDY = Study("release", ReleaseConfig, measure, page, analyse, DEFINITIONS, passes=passes)
