"""The study of the data's spectrum as one object."""

from dit_jax.config import DiTConfig, NetworkConfig
from experiments.frame.study import Study
from experiments.studies.spectrum.analysis import DEFINITIONS, analyse
from experiments.studies.spectrum.family import together
from experiments.studies.spectrum.measure import check, measure
from experiments.studies.spectrum.page import page
from experiments.studies.spectrum.settings import SpectrumConfig


def passes(config: SpectrumConfig, network: NetworkConfig) -> dict[str, int]:
    """Images through one network: trajectories of both replicas at every coupling; uncoupled without attention."""
    couplings = len(config.couplings) if isinstance(network, DiTConfig) else 1
    return {"network": 2 * len(network.clock(config.steps)) * couplings * config.pairs}


STUDY = Study(
    "spectrum", SpectrumConfig, measure, page, analyse, DEFINITIONS, check, together, any_network=True, passes=passes
)
