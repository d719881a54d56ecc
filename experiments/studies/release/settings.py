"""Settings and names of the release study."""

from dataclasses import dataclass
from math import isfinite

from experiments.frame.settings import ProtocolConfig, check_shares

COUPLED_FIRST, FREE_FIRST = "coupled first", "free first"
ORDERS = (COUPLED_FIRST, FREE_FIRST)  # which of the two phases comes first


@dataclass(frozen=True)
class ReleaseConfig(ProtocolConfig):
    """When can coupled replicas be released and still end alike? Coupled up to a step, then free; and reversed."""

    pairs: int = 16  # pairs of replicas
    untrained_pairs: int = 8  # pairs of the control with random weights
    couplings: tuple[float, ...] = (1.0,)  # couplings g of the coupled phase
    releases: int = 12  # steps at which the phases change, evenly spaced in log-SNR; never and always come on top
    threshold: float = 0.5  # share of what coupling takes from a band at which the band counts as committed

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.couplings or not all(isfinite(g) and g > 0 for g in self.couplings):
            raise ValueError(
                f"couplings must be finite and > 0, got {self.couplings}; there is nothing to release from"
            )
        check_shares(self.gate_kind, self.couplings)
        if self.releases < 2:
            raise ValueError(f"releases must be at least 2, got {self.releases}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must lie between 0 and 1, got {self.threshold}")
