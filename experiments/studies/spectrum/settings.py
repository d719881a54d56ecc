"""Settings of the study of the data's spectrum."""

# pyright: reportIncompatibleVariableOverride=false
from dataclasses import dataclass
from typing import Annotated, ClassVar

import tyro

from experiments.frame.settings import StudyConfig, check_grid

SHIPPED = ("photos8-natural", "photos8-whitened", "photos8-reversed")
LIMIT = 0.5  # nats; a smaller gap counts as none
CLAIMS = 2  # verdicts over all networks, whose intervals hold the truth together with 95 %


@dataclass(frozen=True)
class SpectrumConfig(StudyConfig):
    """Whose gap is it, the architecture's or the data's? Compare networks trained on data of different spectra, each
    with the exact theory of its own data. Every network is a run of its own, in a folder of its name under --out."""

    weights: tuple[str, ...] = SHIPPED  # folders of models, or names of shipped ones
    couplings: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0, 2.0)  # g; networks without attention run uncoupled
    pairs: int = 64  # pairs of replicas
    block: int = 16  # pairs that run together; an interruption loses one block at most
    untrained_pairs: Annotated[int, tyro.conf.Suppress] = 16  # unused: networks of other data are the control

    SAMPLERS: ClassVar[tuple[str, ...]] = ("ddim",)  # the theory describes the deterministic flow

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grid(self.couplings, self.gate_kind)
        if not self.weights or len(set(self.weights)) < len(self.weights):
            raise ValueError(f"weights must name at least one network, each once, got {self.weights}")
        if self.guidance != 1:
            raise ValueError("guidance must be 1: the theory describes the data, and guided samples do not follow them")
