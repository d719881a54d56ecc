"""Settings of every study of a network. Imports nothing heavy, so that the command line answers at once."""

from dataclasses import dataclass
from itertools import pairwise
from math import isfinite
from typing import Annotated, ClassVar, Literal, get_args

import tyro

DEFAULT_WEIGHTS = "photos16-v"

Dtype = Literal["float32", "bfloat16"]
GateKind = Literal["joint", "blend", "convex", "additive", "tanh"]
GuidedChannels = Literal["official", "all"]
GuidedCoupling = Literal["both", "conditional"]
Parameters = Literal["replicated", "sharded"]
Sampler = Literal["ddim", "ancestral"]
Protocol = Literal["own", "paper"]

PAPER_DEPTH, PAPER_LAST = 28, 5  # blocks of the paper's network, and how many of the last ones it names
STEPS, PAPER_STEPS = "50", "250"  # sampler steps by default, and of the paper
AUTO = "auto"  # a setting that follows from others
UNKNOWN_OF_PAPER = (  # what a run under its protocol takes from these settings
    "the grid of couplings",
    "the number of pairs and their classes",
    "sampler and guidance",
    "which modes count as committed, and when",
)

SAMPLER_NAMES: dict[str, str] = {"ddim": "DDIM", "ancestral": "the ancestral sampler"}
RENAMED = {"gate": "gate_kind"}  # settings of older runs, and what they are called now
# settings that older runs do not store, and what they ran with
ADDED = {"modes": "dct", "protocol": "own", "first_pair": 0}


@dataclass(frozen=True)
class StudyConfig:
    """Settings that every study of a network has; together with the weights they fix its numbers."""

    weights: str = DEFAULT_WEIGHTS  # folder of a converted or trained DiT, or the name of a shipped model
    pairs: int = 32  # pairs of replicas
    steps: str = STEPS  # sampler steps, for example 50, 250 or ddim50
    sampler: Sampler = "ddim"  # DDIM, or the ancestral sampler, which adds noise
    gate_kind: Annotated[GateKind, tyro.conf.arg(aliases=["--gate"])] = "joint"  # joint: one softmax
    guidance: float = 1.0  # classifier-free guidance scale; 1 is none, 0 the null label alone
    guided_channels: GuidedChannels = "all"  # channels that guidance acts on: official is the first three
    guided_coupling: GuidedCoupling = "both"  # halves of the guided batch that the gate couples
    classes: tuple[int, ...] | None = None  # labels that the pairs take in turn; all classes by default
    seed: int = 0  # of all random numbers
    block: int = 4  # pairs that run together; an interruption loses one block at most (of depth: or one probe)
    untrained_pairs: int = 16  # pairs of the control with random weights
    parameters: Parameters = "replicated"  # on several devices: whole on each, or sharded over them
    dtype: Dtype | None = None  # of activations and parameters; the stored one by default

    SAMPLERS: ClassVar[tuple[str, ...]] = get_args(Sampler)  # those that the study's question allows

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        check_seed(self.seed)
        for name in ("pairs", "untrained_pairs"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2: intervals come from resampling pairs")
        for name, known in (("gate_kind", GateKind), ("guided_channels", GuidedChannels),
                            ("guided_coupling", GuidedCoupling), ("parameters", Parameters)):  # fmt: skip
            if getattr(self, name) not in get_args(known):
                raise ValueError(f"{name} {getattr(self, name)!r} is not one of {', '.join(get_args(known))}")
        if self.sampler not in self.SAMPLERS:
            raise ValueError(f"sampler {self.sampler!r} is not one of {', '.join(self.SAMPLERS)} in this study")
        if not isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")

    @property
    def halves(self) -> int:
        """Images that the network sees for one that is denoised: a conditional one and a null one under guidance; one
        without (1), and for the null label alone (0)."""
        return 1 if self.guidance in (0, 1) else 2

    @property
    def eta(self) -> float:
        """Stochasticity of the sampler in exact recursions: 0 for DDIM, 1 for the ancestral sampler."""
        return 0.0 if self.sampler == "ddim" else 1.0


@dataclass(frozen=True)
class ProtocolConfig(StudyConfig):
    """Settings of a study of which accounts of the paper say how it ran."""

    steps: str = AUTO  # sampler steps, for example 50, 250 or ddim50; auto is 50, or what --protocol says
    protocol: Protocol = "own"  # paper: its 250 steps unless --steps is given; it has 28 layers, and names the last 5

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.protocol not in get_args(Protocol):
            raise ValueError(f"protocol {self.protocol!r} is not one of {', '.join(get_args(Protocol))}")
        if self.steps == AUTO:
            object.__setattr__(self, "steps", PAPER_STEPS if self.protocol == "paper" else STEPS)

    @property
    def unknown(self) -> tuple[str, ...]:
        """What is not known of the protocol, so that the run has it from its other settings."""
        return UNKNOWN_OF_PAPER if self.protocol == "paper" else ()


def check_seed(seed: int) -> None:
    """Raises ValueError for a seed for which JAX would make the same key as for another one."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be a whole number from 0 to 2^32 - 1, got {seed!r}")


def check_shares(kind: GateKind, couplings: tuple[float, ...]) -> None:
    """Raises ValueError if a coupling of a pair is more than 1 under a convex gate, where it is the other's share."""
    if kind == "convex" and max(couplings) > 1:
        raise ValueError(
            f"couplings of a convex gate are the other replica's share, at most 1; got {max(couplings):g} (1 / 2 "
            "leaves no difference in what is read, 1 exchanges the replicas)"
        )


def check_grid(couplings: tuple[float, ...], kind: GateKind = "joint") -> None:
    """Raises ValueError unless couplings start at 0, the reference, and increase, and are fit for the kind of gate."""
    increasing = all(low < high < float("inf") for low, high in pairwise(couplings))
    if len(couplings) < 2 or couplings[0] != 0 or not increasing:
        raise ValueError(f"couplings must start at 0, the reference, and increase, got {couplings}")
    check_shares(kind, couplings)
