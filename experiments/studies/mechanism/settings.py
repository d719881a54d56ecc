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
    """How does coupling synchronise replicas in one pass? Split their difference in every layer and head."""

    couplings: tuple[float, ...] = (0.0, 0.2, 0.5, 1.0)  # couplings g, increasing from 0
    pairs: int = 16  # pairs of replicas
    levels: int = 8  # sampler steps that are examined, evenly spaced in log-SNR; fewer if some coincide
    untrained_pairs: int = 8  # pairs of each control with random weights

    def __post_init__(self) -> None:
        super().__post_init__()
        check_grid(self.couplings, self.gate_kind)
        if self.levels < 1:
            raise ValueError(f"levels must be at least 1, got {self.levels}")
