"""Settings and names of the speciation study."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.frame.settings import Sampler, StudyConfig

THRESHOLD = 0.775  # of phi, where Biroli et al. read the speciation time; (1 + T(1)) / 2 of two far clusters


SURE = 0.95  # probability of its class above which the classifier counts as sure of an end


@dataclass(frozen=True)
class SpeciationConfig(StudyConfig):
    """When does a process without a label decide between two classes? Do clones that branch at a step end in one?"""

    classifier: str = ""  # file of `syncgap classifier` for the network's two classes; needed
    sampler: Sampler = "ancestral"  # clones need the noise of the ancestral sampler
    guidance: float = 0.0  # 0 is the null label alone, so that the trajectory decides the class and not its label
    branches: tuple[int, ...] = ()  # sampler steps at which clones branch; by default 8, evenly spaced
    pairs: int = 64  # pairs of trajectories, each of which is cloned at every branch
    block: int = 8  # pairs that run together; an interruption loses one block at most
    labelled_pairs: int = 8  # pairs of the control that is given the class
    untrained_pairs: int = 8  # pairs of the control with random weights

    SAMPLERS: ClassVar[tuple[str, ...]] = ("ancestral",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.classifier:
            raise ValueError("classifier is missing: make one with `syncgap classifier` and name it with --classifier")
        if self.labelled_pairs < 2:
            raise ValueError("labelled_pairs must be at least 2: intervals come from resampling pairs")
        if any(b < 0 for b in self.branches) or len(set(self.branches)) != len(self.branches):
            raise ValueError(f"branches must be sampler steps, each once, got {self.branches}")
