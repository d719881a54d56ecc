"""Settings of the tools. Imports nothing heavy, so that the command line answers at once."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path

from experiments.frame.settings import Dtype, GuidedChannels, Sampler


@dataclass(frozen=True)
class SampleConfig:
    """Settings of a set of pictures. Together with the weights they determine the pictures."""

    classes: tuple[str, ...] = ()  # names or numbers, one row of the grid each; the first 8 by default
    count: int = 4  # pictures of each class
    steps: str = "50"  # sampler steps, for example 50, 250 or ddim50
    sampler: Sampler = "ddim"  # DDIM, or the ancestral sampler
    eta: float = 0.0  # stochasticity of DDIM, from 0 to 1
    guidance: float = 1.0  # classifier-free guidance scale; 1 is none
    guided_channels: GuidedChannels = "all"  # channels that guidance acts on: official is the first three
    seed: int = 0  # of all random numbers
    batch: int = 8  # pictures that are sampled together; does not change them
    vae: Path | None = None  # folder of an AutoencoderKL in diffusers form, to decode latents
    dtype: Dtype | None = None  # of activations and parameters; the stored one by default

    def __post_init__(self) -> None:
        for name in ("count", "batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.eta <= 1:
            raise ValueError(f"eta must be in 0..1, got {self.eta}")
        if self.sampler == "ancestral" and self.eta:
            raise ValueError("eta is a setting of the ddim sampler; leave it out for the ancestral one")
        if not isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")
