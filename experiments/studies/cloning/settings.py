"""Settings and names of the cloning study."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.frame.settings import Sampler, StudyConfig

MEASURES = {"q": "Q", "clones": "clones", "mmse": "1 − mmse/Var"}
CONTRASTS = (("q", "clones"), ("q", "mmse"), ("clones", "mmse"))


@dataclass(frozen=True)
class CloningConfig(StudyConfig):
    """Is what a state has decided the same by spread of predictions, by clones, and by error of one prediction?"""

    sampler: Sampler = "ancestral"  # clones need its noise
    branches: int = 8  # steps at which clones branch, evenly spaced in log-SNR, at most
    pairs: int = 32
    block: int = 8
    untrained_pairs: int = 8

    SAMPLERS: ClassVar[tuple[str, ...]] = ("ancestral",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 3:
            raise ValueError(f"branches must be at least 3, got {self.branches}")
