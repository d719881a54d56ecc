"""Settings and names of the solvable study."""

from dataclasses import dataclass

from experiments.frame.settings import StudyConfig

SIGNS = (("clusters", 0), ("pair", 0), ("pair", 1))  # law, and which of its signs
CLAIMS = 3  # verdicts of the page, whose intervals hold the truth together with 95 %
SIGN_NAMES = ("clusters", "pair, common mode", "pair, difference mode")


@dataclass(frozen=True)
class SolvableConfig(StudyConfig):
    """Compare a network that was trained on data of known law with the exact theory of these data."""

    weights: str = "solvable8"  # the shipped model, or a folder of `syncgap train solvable`
    pairs: int = 128  # pairs of replicas
    block: int = 16  # pairs that run together; an interruption loses one block at most
    branches: int = 10  # sampler steps at which clones branch, evenly spaced in log-SNR

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 3:
            raise ValueError(f"branches must be at least 3, got {self.branches}")
        if self.classes not in (None, (0, 1, 2)):
            raise ValueError("this study runs all three laws: leave --classes out")
        if self.guidance != 1:
            raise ValueError("guidance must be 1: the theory describes each law without guidance")
