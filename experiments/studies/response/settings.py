"""Settings and names of the response study."""

from dataclasses import dataclass
from typing import ClassVar

from experiments.frame.settings import StudyConfig

PROBES = 2  # differences that are drawn from a band; the derivative's asymmetry needs two
PLACES = ("flow", "noised ends")  # where derivatives are taken
LEAST = 3  # sampler steps that the window must hold


@dataclass(frozen=True)
class ResponseConfig(StudyConfig):
    """How do small differences grow along the reverse flow? By band, beside theory, and in the Lyapunov directions."""

    pairs: int = 16  # pairs of replicas
    untrained_pairs: int = 8  # pairs of the control with random weights
    levels: int = 12  # sampler steps at which bands are probed, evenly spaced in log-SNR
    vectors: int = 4  # leading Lyapunov directions that are followed

    SAMPLERS: ClassVar[tuple[str, ...]] = ("ddim",)  # the flow, of which derivatives are taken

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.levels < 3:
            raise ValueError(f"levels must be at least 3, got {self.levels}")
        if self.vectors < 1:
            raise ValueError(f"vectors must be at least 1, got {self.vectors}")
