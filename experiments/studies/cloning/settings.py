"""Settings and names of the cloning study."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.frame.settings import Sampler, StudyConfig

MEASURES = {"q": "Q", "clones": "clones", "mmse": "1 − mmse/Var"}
CONTRASTS = (("q", "clones"), ("q", "mmse"), ("clones", "mmse"))


@dataclass(frozen=True)
class CloningConfig(StudyConfig):
    """How much has a state decided? Compare the spread of predictions, clones, and the error of one prediction."""

    sampler: Sampler = "ancestral"  # clones need the noise of the ancestral sampler
    branches: int = 8  # sampler steps at which clones branch, evenly spaced in log-SNR; fewer if some coincide
    pairs: int = 32  # pairs of replicas
    block: int = 8  # pairs that run together; an interruption loses one block at most
    untrained_pairs: int = 8  # pairs of the control with random weights

    SAMPLERS: ClassVar[tuple[str, ...]] = ("ancestral",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 3:
            raise ValueError(f"branches must be at least 3, got {self.branches}")
