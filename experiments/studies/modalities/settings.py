"""Settings and names of the study of two modalities."""

from dataclasses import dataclass

from experiments.frame.settings import check_seed

PARTS = ("timescales", "speciation", "anisotropic", "collapse", "filtering", "scheduling")  # groups of a run


@dataclass(frozen=True)
class ModalitiesConfig:
    """Simulate two coupled modalities with exact scores and compare with theory: timescales, speciation, collapse, the
    coupling as a filter, couplings that change in time."""

    paths: int = 4000  # pairs of clones per point
    steps: int = 16  # reverse steps from a branch to the data; each is exact
    trials: int = 2000  # draws of a stored data set, of which collapse times are read
    seed: int = 0

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for name, least in (("paths", 100), ("steps", 1), ("trials", 50)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
