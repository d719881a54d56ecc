"""Settings of the main study."""

from dataclasses import dataclass
from math import isfinite
from typing import Literal, get_args

from experiments.frame.settings import ProtocolConfig, check_shares

ModesKind = Literal["dct", "pca", "colour", "class"]


@dataclass(frozen=True)
class CompareConfig(ProtocolConfig):
    """Measure the synchronization gap of a DiT against the coupling and lay it over the theory."""

    couplings: tuple[float, ...] = (0.0, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 1.5, 2.0, 4.0)  # g, 0 among them
    pairs: int = 64  # pairs of replicas
    gain_pairs: int = 32  # pairs on which the one-pass gain is measured
    first_pair: int = 0  # measure pairs from this one on, a part that `syncgap merge` joins with the others
    modes: ModesKind = "dct"  # dct: bands of frequency; pca, colour, class: directions of the training data

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.couplings or not all(isfinite(g) and g >= 0 for g in self.couplings):
            raise ValueError(f"couplings must be finite and >= 0, got {self.couplings}")
        if len(set(self.couplings)) < 2 or 0 not in self.couplings:
            raise ValueError(f"couplings must hold 0, the reference, and at least one more value, got {self.couplings}")
        check_shares(self.gate_kind, self.couplings)
        if self.modes not in get_args(ModesKind):
            raise ValueError(f"modes {self.modes!r} is not one of {', '.join(get_args(ModesKind))}")
        if self.first_pair < 0 or self.first_pair % self.block:
            raise ValueError(
                f"first_pair must be a multiple of the block of {self.block} pairs, so that parts of a run join at the "
                f"ends of blocks; got {self.first_pair}"
            )
        if self.gain_pairs < 2:
            raise ValueError("gain_pairs must be at least 2: intervals come from resampling pairs")
        object.__setattr__(self, "couplings", tuple(sorted({float(g) for g in self.couplings})))

    @property
    def end(self) -> int:
        """The pair after the last one."""
        return self.first_pair + self.pairs
