"""Settings and names of the depth study."""

from dataclasses import dataclass

from experiments.frame.settings import StudyConfig, check_grid

FOLDS = 4  # of the probe's pairs: it is fitted on three, and scored on the fourth
LAST = 0.2  # share of the layers that counts as the last ones
CLAIMS = 4  # verdicts of the page at most, whose intervals hold the truth together with 95 %
CLAIMED = 0.5  # share of the gap that must be made in the last fifth of the layers for it to be localised there


@dataclass(frozen=True)
class DepthConfig(StudyConfig):
    """Read commitment off the residual stream after every block: is the gap made in the last layers?"""

    couplings: tuple[float, ...] = (0.0, 0.2, 1.0)  # g, 0 first
    probe_pairs: int = 96  # pairs on which the probe is fitted and scored; 0 leaves it out
    probe_levels: int = 12  # sampler steps at which it is, evenly spaced in log-SNR
    probe_features: int = 128  # wider streams are projected at random to that many features

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grid(self.couplings, self.gate_kind)
        if self.probe_pairs and self.probe_pairs < 2 * FOLDS:
            raise ValueError(f"probe_pairs must be 0 or at least {2 * FOLDS}, got {self.probe_pairs}")
        if self.probe_levels < 4:
            raise ValueError(f"probe_levels must be at least 4, got {self.probe_levels}")
