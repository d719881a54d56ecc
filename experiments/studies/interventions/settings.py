"""Settings and names of the interventions study."""

from dataclasses import dataclass
from math import isfinite

from experiments.frame.settings import StudyConfig

NONE, ALL, NO_HEAD, CONSTANT = "none", "all", "no head", "constant"  # names of arms
CLAIMED = 0.5  # share of the full effect that coupling the last fifth of the layers must bring


@dataclass(frozen=True)
class InterventionsConfig(StudyConfig):
    """Which parts bring the gap down? Couple only some layers, steps, heads, or only queries, keys or values."""

    pairs: int = 16  # pairs of replicas
    untrained_pairs: int = 8  # pairs of the control with random weights
    strength: float = 1.0  # coupling g where it is on
    schedule_strength: float = 0.2  # g of the constant schedule; the others have the same integral over log-SNR
    singles: int = 6  # how many layers, and how many heads, are coupled one at a time at most; evenly spaced

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("strength", "schedule_strength"):
            value = getattr(self, name)
            if not isfinite(value) or value <= 0:
                raise ValueError(f"{name} must be finite and > 0, got {value}")
        if self.singles < 1:
            raise ValueError(f"singles must be at least 1, got {self.singles}")


def last_layers(depth: int) -> int:
    """How many layers the last fifth is, rounded up."""
    return -(-depth // 5)
