"""The configuration of a network: of a diffusion transformer, with the official variants by name, or of a control.

Importing this module loads nothing heavy: the command line takes its choices from here.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    from ou_theory.clock import Clock

Prediction = Literal["epsilon", "v", "x0", "velocity", "score"]
NoisePath = Literal["ddpm", "linear", "gvp", "vp"]
TimestepConvention = Literal["official", "diffusers"]
ControlArchitecture = Literal["unet", "mlp"]
Which = Literal["ema", "model"]  # parts of a training checkpoint
TIMESTEP_CONVENTIONS: tuple[TimestepConvention, ...] = ("official", "diffusers")
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v", "x0", "velocity", "score")
NOISE_PATHS: tuple[NoisePath, ...] = ("ddpm", "linear", "gvp", "vp")
DTYPES = ("float32", "bfloat16", "float64")
CONTROL_ARCHITECTURES: tuple[ControlArchitecture, ...] = ("unet", "mlp")
MOST_BLOCKS = 64  # of a control network: they are compiled one by one

C = TypeVar("C", bound="NetworkConfig")


class NetworkConfig:
    """What the configurations of all networks have."""

    input_size: int
    in_channels: int
    hidden_size: int
    depth: int
    num_classes: int
    learn_sigma: bool
    prediction: Prediction
    dtype: str
    path: NoisePath
    timestep_convention: TimestepConvention = "official"
    null_label: bool = True

    @property
    def label_rows(self) -> int:
        """Rows of the label table."""
        return self.num_classes + self.null_label

    @property
    def out_channels(self) -> int:
        return self.in_channels * (2 if self.learn_sigma else 1)

    def to_dict(self) -> dict:
        """All entries; but no path if it is the schedule of DDPM, and no null label if there is one: as in the
        manifests of before there were others."""
        entries = dataclasses.asdict(self)  # type: ignore[call-overload]
        before = (("path", "ddpm"), ("null_label", True))
        return {name: value for name, value in entries.items() if (name, value) not in before}

    def clock(self, steps: str | int) -> "Clock":
        """The noise levels of a sampler of the network's own path.

        Args:
          steps: see `make_clock`; on a path of flow matching a number of steps, see `path_clock`.

        Raises:
          ValueError: `steps` is not of these forms.
        """
        from ou_theory.clock import make_clock, path_clock

        return make_clock(steps) if self.path == "ddpm" else path_clock(self.path, steps)

    def training_clock(self) -> "Clock":
        """The noise levels of training: the full schedule of DDPM; or as many times of a path of flow matching, the
        midpoints of equal parts of [0, 1], so that log-SNR and the velocity are finite at each."""
        from ou_theory.clock import NUM_TRAIN_STEPS, make_clock, path_clock

        if self.path == "ddpm":
            return make_clock(NUM_TRAIN_STEPS)
        return path_clock(self.path, [(k + 0.5) / NUM_TRAIN_STEPS for k in range(NUM_TRAIN_STEPS)])

    @classmethod
    def from_dict(cls: type[C], entries: dict) -> C:
        """Inverse of `to_dict`.

        Raises:
          ValueError: an entry is unknown, and might change the function, or it is out of its domain.
        """
        unknown = sorted(set(entries) - {f.name for f in dataclasses.fields(cls)})  # type: ignore[arg-type]
        if unknown:
            raise ValueError(f"unknown {cls.__name__.removesuffix('Config')} config entries: {', '.join(unknown)}")
        return cls(**entries)

    def need_null_label(self, purpose: str, remedy: str) -> None:
        """Raises ValueError if this network has no null label; `purpose` needs one."""
        if not self.null_label:
            raise ValueError(f"{purpose} needs a null label, which this network does not have: {remedy}")

    def _check(self, *counts: str) -> None:
        """Raises ValueError unless these entries are positive integers, and those that all networks have fit."""
        own = type(self).__name__
        for name in ("input_size", "in_channels", "hidden_size", "depth", "num_classes", *counts):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{own}.{name} must be a positive integer, got {value!r}")
        for name in ("learn_sigma", "null_label"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{own}.{name} must be true or false, got {getattr(self, name)!r}")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction {self.prediction!r} is not one of {', '.join(PREDICTIONS)}")
        if self.path not in NOISE_PATHS:
            raise ValueError(f"path {self.path!r} is not one of {', '.join(NOISE_PATHS)}")
        if self.prediction == "velocity" and self.path == "ddpm":
            flows = ", ".join(NOISE_PATHS[1:])
            raise ValueError(f"prediction 'velocity' needs a path of flow matching: one of {flows}, not 'ddpm'")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype {self.dtype!r} is not one of {', '.join(DTYPES)}")


@dataclass(frozen=True)
class DiTConfig(NetworkConfig):
    """Everything but the weights that determines the function a DiT computes. The defaults are DiT-XL/2 at 256 px.

    Raises:
      ValueError: an entry is out of its domain, or entries do not fit each other.
    """

    input_size: int = 32  # side of the square input (latent pixels for the official models)
    patch_size: int = 2
    in_channels: int = 4
    hidden_size: int = 1152
    depth: int = 28
    num_heads: int = 16
    mlp_ratio: float = 4.0
    num_classes: int = 1000  # label `num_classes` is the null label of classifier-free guidance, if there is one
    learn_sigma: bool = True  # the last half of the output's channels interpolates the variance (theory, eq. 2.7)
    prediction: Prediction = "epsilon"  # what the first channels of the output predict (theory, eq. 1.3 and 2.10)
    # "diffusers" reproduces that library's code: timestep frequencies over 127, and 1e-5 as eps of the second norm
    timestep_convention: TimestepConvention = "official"
    dtype: str = "float32"  # of activations and matrix products; softmax and norms are computed in float32 or wider
    path: NoisePath = "ddpm"  # how data and noise were mixed in training (theory, section 2.1)
    null_label: bool = True  # without one, a network cannot be guided, nor trained with labels dropped

    def __post_init__(self) -> None:
        self._check("patch_size", "num_heads")
        if not isinstance(self.mlp_ratio, int | float) or not 0 < self.mlp_ratio < math.inf:
            raise ValueError(f"DiTConfig.mlp_ratio must be a positive number, got {self.mlp_ratio!r}")
        if self.input_size % self.patch_size:
            raise ValueError(f"input_size {self.input_size} is not a multiple of patch_size {self.patch_size}")
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size {self.hidden_size} is not a multiple of num_heads {self.num_heads}")
        if self.hidden_size % 4:
            raise ValueError(f"hidden_size {self.hidden_size} must be a multiple of 4 for the position embedding")
        if self.timestep_convention not in TIMESTEP_CONVENTIONS:
            known = ", ".join(TIMESTEP_CONVENTIONS)
            raise ValueError(f"timestep_convention {self.timestep_convention!r} is not one of {known}")

    @property
    def num_tokens(self) -> int:
        return (self.input_size // self.patch_size) ** 2

    @property
    def mlp_size(self) -> int:
        return round(self.hidden_size * self.mlp_ratio)  # rounded: in floating point 44 * (15 / 44) is below 15

    @property
    def patch_features(self) -> int:
        """How many numbers one output patch has."""
        return self.patch_size**2 * self.out_channels


@dataclass(frozen=True)
class ControlConfig(NetworkConfig):
    """Everything but the weights that determines the function of a network without attention, see `dit_jax.controls`.

    Raises:
      ValueError: an entry is out of its domain, or entries do not fit each other.
    """

    architecture: ControlArchitecture
    hidden_size: int  # channels of the U-Net at full resolution, twice as many below, or features of the MLP
    depth: int  # blocks of the U-Net at full resolution, below and at full resolution again, or blocks of the MLP
    input_size: int = 8
    in_channels: int = 3
    num_classes: int = 10
    learn_sigma: bool = True
    prediction: Prediction = "v"
    dtype: str = "float32"
    path: NoisePath = "ddpm"

    def __post_init__(self) -> None:
        _check_architecture(self.architecture)
        self._check()
        if self.depth > MOST_BLOCKS:
            raise ValueError(f"ControlConfig.depth must be at most {MOST_BLOCKS}, got {self.depth}")
        if self.architecture == "unet" and self.input_size % 2:
            raise ValueError(f"input_size {self.input_size} must be even for a unet, which halves it once")


CONTROL_SIZES: dict[ControlArchitecture, tuple[int, int]] = {"unet": (1, 48), "mlp": (2, 256)}  # depth, width


def config_from_dict(entries: dict[str, Any]) -> NetworkConfig:
    """The config of a manifest. That of a control names its ``architecture``, that of a DiT has no such entry.

    Raises:
      ValueError: the architecture or another entry is unknown, or an entry is out of its domain.
    """
    if "architecture" not in entries:
        return DiTConfig.from_dict(entries)
    _check_architecture(entries["architecture"])  # first: another one may well have other entries
    return ControlConfig.from_dict(entries)


def _check_architecture(name: Any) -> None:
    if name not in CONTROL_ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; known: {', '.join(CONTROL_ARCHITECTURES)}")


_SIZES = {
    "S": (12, 384, 6),
    "B": (12, 768, 12),
    "L": (24, 1024, 16),
    "XL": (28, 1152, 16),
}  # depth, width, heads

VARIANTS: dict[str, DiTConfig] = {
    f"DiT-{name}/{patch}": DiTConfig(patch_size=patch, depth=depth, hidden_size=width, num_heads=heads)
    for name, (depth, width, heads) in _SIZES.items()
    for patch in (2, 4, 8)
}


def variant(name: str, **overrides) -> DiTConfig:
    """The official variant `name`, for example ``"DiT-XL/2"``, with any entries overridden.

    Raises:
      ValueError: no such variant.
    """
    if name not in VARIANTS:
        raise ValueError(f"unknown DiT variant {name!r}; known: {', '.join(VARIANTS)}")
    return dataclasses.replace(VARIANTS[name], **overrides)
