"""Settings of the tools. Imports nothing heavy, so that the command line answers at once."""

from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit_jax.config import Diffusion, LastStep
from experiments.frame.settings import Dtype, GuidedChannels

PictureSampler = Literal["ddim", "ancestral", "euler", "heun", "sde"]
FLOW_SAMPLERS = ("euler", "heun", "sde")


@dataclass(frozen=True)
class SampleConfig:
    """Settings of a set of pictures. Together with the weights they determine the pictures."""

    classes: tuple[str, ...] = ()  # names or numbers, one row of the grid each; the first 8 by default
    count: int = 4  # pictures of each class
    steps: str = "50"  # sampler steps, for example 50, 250 or ddim50
    # ddim; ancestral; and for networks of flow matching alone euler and heun, which integrate the flow, and sde, the
    # method of Euler and Maruyama for an SDE of the same law
    sampler: PictureSampler = "ddim"
    eta: float = 0.0  # stochasticity of DDIM, from 0 to 1
    diffusion: Diffusion = "sigma"  # of the sde sampler
    last_step: LastStep | None = "mean"  # of the sde sampler: without noise, of size 0.04, after its steps
    guidance: float = 1.0  # classifier-free guidance scale; 1 is none, 0 the null label alone
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
        if self.sampler != "ddim" and self.eta:
            raise ValueError(f"eta is a setting of the ddim sampler; leave it out for the {self.sampler} one")
        if self.sampler != "sde" and (self.diffusion, self.last_step) != ("sigma", "mean"):
            raise ValueError(f"diffusion and last_step are settings of the sde sampler, not of the {self.sampler} one")
        if not isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be in 0..{2**32 - 1}, got {self.seed}")


@dataclass(frozen=True)
class MakeClassifier:
    """Train a small classifier of photographs and test it; `syncgap speciation` needs one."""

    images: tyro.conf.Positional[Path]  # images to train on: a folder or zip file of <class>/<image>
    test: tyro.conf.Positional[Path]  # other images of the same classes, on which its accuracy is counted
    out: tyro.conf.Positional[Path]  # file that is written, .npz
    classes: tuple[str, ...] = ()  # class folders in label order; by default all, sorted
    size: int = 32  # images are cropped and resized to size x size
    epochs: int = 20  # passes over the images
    batch_size: int = 128  # images in a step
    seed: int = 0  # of initial weights, order, mirrors and shifts
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


@dataclass(frozen=True)
class Train:
    """Train a small network on class folders of images or on data whose law is known."""

    data: tyro.conf.Positional[Path]  # a folder or zip file of <class>/<image>, or the word solvable with --size 8
    out: tyro.conf.Positional[Path]  # folder of the training run
    labels: Path | None = None  # text file of class folders, one a line, in label order; by default all, sorted
    transform: str = "natural"  # of the images: natural (none), whitened, reversed, power:A, permuted or gaussian
    size: int = 16  # images are cropped and resized to size x size
    prediction: Literal["epsilon", "v", "x0", "velocity", "score"] = "v"  # what the network predicts
    path: Literal["ddpm", "linear", "gvp", "vp"] = "ddpm"  # schedule of the noise: DDPM's, or a path of flow matching
    architecture: Literal["dit", "unet", "mlp"] = "dit"  # a DiT, or a control without attention
    depth: int | None = None  # by default 12 for a dit, 1 for a unet, 2 for an mlp
    hidden_size: int | None = None  # by default 96 for a dit, 48 for a unet, 256 for an mlp
    num_heads: int | None = None  # only for a dit, by default 6
    patch_size: int | None = None  # only for a dit, by default 2
    steps: int = 6000  # training steps
    batch_size: int = 64  # images in a step
    learning_rate: float = 1.5e-3  # peak learning rate
    decay_fraction: float = 0.25  # share of the steps at the end over which the learning rate falls to zero
    weight_cap: float = 1.0  # epsilon only: loss weight min(1 + 1/SNR, cap); 1 is the official loss
    seed: int = 0  # of initial weights, batches and noise
    dtype: str = "float32"  # of activations and matrix products
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # continue an interrupted run in that folder
    checkpoint_every: int = 500  # training steps between checkpoints
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


@dataclass(frozen=True)
class Covariance:
    """Add covariance and principal directions of the training data to a model folder that lacks them; `syncgap
    spectrum` and `syncgap compare --modes` need them."""

    weights: tyro.conf.Positional[str]  # folder of the model
    images: tyro.conf.Positional[Path]  # the images it was trained on: a folder or zip file of <class>/<image>
    labels: Path | None = None  # text file of class folders, one a line, in label order; by default as in training
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar
