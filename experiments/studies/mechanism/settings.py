"""Settings and names of the mechanism study."""

from dataclasses import dataclass

from experiments.frame.settings import StudyConfig, check_grid

PARTS = ("routing", "key", "query", "total")
READINGS = ("weights", "pattern")  # of the cross part that the self-only reading leaves out, see `split.split_head`
PLACES = ("pre", "attention", "mlp", "post")
PRODUCTS = ("pre attention", "pre mlp", "attention mlp")
SUBLAYERS = ("attention", "mlp")


@dataclass(frozen=True)
class MechanismConfig(StudyConfig):
    """Split the replicas' difference in every layer and head, in one pass: how does coupling synchronise?"""

    couplings: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)
    pairs: int = 16
    levels: int = 8  # sampler steps that are looked into at most, evenly spaced in log-SNR
    untrained_pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grid(self.couplings, self.gate_kind)
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")
