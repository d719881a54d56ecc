"""Settings and names of the gaussianity study."""

from dataclasses import dataclass
from math import isfinite

from experiments.frame.settings import StudyConfig

COVARIANCE, COEFFICIENTS, BANDS, WHITE, REVERSED = GAUSSIANS = (
    "covariance",  # of the data, within classes
    "coefficients",  # of the data's, only what each DCT coefficient's own channels share
    "bands",  # one variance in each band
    "white",  # one variance for all modes
    "reversed",  # as coefficients, the spectrum turned round
)
DENOISER, SCORE, DIFFERENCE = QUANTITIES = ("denoiser", "score", "difference")
PUBLISHED = {  # of Wang & Vastola: noise level over the data's standard deviation -> score, denoiser
    0.2: (0.818, 0.993),
    1.0: (0.959, 0.952),
    2.0: (0.984, 0.923),
    4.0: (0.996, 0.913),
    10.0: (0.9996, 0.942),
}


@dataclass(frozen=True)
class GaussianityConfig(StudyConfig):
    """How much of a network is the exact denoiser of one Gaussian, by noise level and band? Is a band one mode?"""

    pairs: int = 64  # pairs of replicas
    block: int = 8  # pairs that run together; an interruption loses one block at most
    noise: tuple[float, ...] = (0.1, 0.2, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.0, 7.0, 10.0, 20.0)  # levels sigma
    images: str | None = None  # the training images: exact covariance, and noised photographs beside noised samples

    def __post_init__(self) -> None:
        super().__post_init__()
        rising = all(a < b for a, b in zip(self.noise, self.noise[1:], strict=False))
        if not self.noise or not rising or not all(isfinite(s) and s > 0 for s in self.noise):
            raise ValueError(f"noise must be finite levels > 0 that increase, got {self.noise}")
        if self.guidance != 1:
            raise ValueError(f"guidance {self.guidance:g} makes another denoiser than the one trained; leave it at 1")
