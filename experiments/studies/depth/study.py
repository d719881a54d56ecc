"""The depth study as one object."""

from dit_jax.config import NetworkConfig
from experiments.frame.study import Study
from experiments.studies.depth.analysis import DEFINITIONS, analyse
from experiments.studies.depth.family import together
from experiments.studies.depth.measure import measure, probed
from experiments.studies.depth.page import page
from experiments.studies.depth.settings import DepthConfig


def passes(config: DepthConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through the network: trajectories of both replicas at every coupling, those of the probe at two."""
    image_steps = 2 * len(network.clock(config.steps)) * config.halves
    found = {}
    for group, pairs in (("network", config.pairs), ("untrained", config.untrained_pairs)):
        found[group] = image_steps * len(config.couplings) * pairs
        if config.probe_pairs:
            found[f"probe_{group}"] = image_steps * 2 * probed(config, group)
    return found


STUDY = Study("depth", DepthConfig, measure, page, analyse, DEFINITIONS, together=together, passes=passes, joins=True)
