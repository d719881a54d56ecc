"""Settings and names of the solvable study."""

from dataclasses import dataclass

from experiments.frame.settings import StudyConfig

SIGNS = (("clusters", 0), ("pair", 0), ("pair", 1))  # law, and which of its signs
SIGN_NAMES = ("clusters", "pair, common mode", "pair, difference mode")


@dataclass(frozen=True)
class SolvableConfig(StudyConfig):
    """Measure a network trained on data of known law against its exact theory."""

    weights: str = "solvable8"  # the shipped model, or a folder of `syncgap train solvable`
    pairs: int = 128
    block: int = 16
    branches: int = 10  # steps at which clones branch, evenly spaced in log-SNR

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 3:
            raise ValueError(f"branches must be at least 3, got {self.branches}")
        if self.classes not in (None, (0, 1, 2)):
            raise ValueError("this study runs all three laws: leave --classes out")
        if self.guidance != 1:
            raise ValueError("guidance must be 1: the theory is that of each law by itself")
