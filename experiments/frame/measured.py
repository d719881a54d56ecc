"""A run as analyses and pages read it: its settings and its stored groups."""

from collections.abc import Mapping
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import xarray as xr

from dit_jax.config import DiTConfig, config_from_dict
from experiments.frame.settings import RENAMED
from experiments.frame.store import RunFolder, StoreError
from ou_theory.clock import Clock
from ou_theory.modes import Bands, radial_bands

C = TypeVar("C")
NUM_BANDS = 6  # annuli; DC is a band of its own beside them


class Measured(Generic[C]):
    """A stored run.

    Attributes:
      run: its folder.
      config: its settings; those that an older version did not store have their defaults.
    """

    def __init__(self, run: RunFolder, config: C) -> None:
        self.run, self.config = run, config

    @classmethod
    def of(cls, run: RunFolder, settings: type[C]) -> "Measured[C]":
        """Reads a run whose settings are of this type.

        Raises:
          StoreError: the stored settings are of another type.
        """
        stored = {RENAMED.get(name, name): value for name, value in run.manifest["settings"].items()}
        known = {each.name for each in fields(settings)}  # type: ignore[arg-type]
        given = {name: tuple(v) if isinstance(v, list) else v for name, v in stored.items() if name in known}
        try:
            return cls(run, settings(**given))
        except (TypeError, ValueError) as error:
            raise StoreError(f"{run.path / 'manifest.json'} holds settings that cannot be used ({error})") from error

    @property
    def manifest(self) -> dict[str, Any]:
        """The entries of the run's manifest."""
        return self.run.manifest

    @property
    def subject_name(self) -> str:
        """What the run studies, in a word."""
        return subject_of(self.run)

    @cached_property
    def clock(self) -> Clock:
        """The sampler's noise levels, on the network's own path."""
        return self.model.clock(self.config.steps)  # type: ignore[attr-defined]

    @cached_property
    def model(self) -> DiTConfig:
        """The architecture of the network. It is a `ControlConfig` only in a study that accepts any network."""
        return cast(DiTConfig, config_from_dict(self.manifest["model"]))

    @cached_property
    def bands(self) -> Bands:
        """The bands of the DCT over the network's images or latents."""
        return radial_bands(self.model.input_size, self.model.input_size, NUM_BANDS)

    def load(self, group: str) -> xr.Dataset:
        """A group that is measured in full.

        Raises:
          StoreError: the group is missing or incomplete; the message says what to do.
        """
        return self.run.load(group)

    def sources(self, *groups: str) -> dict[str, xr.Dataset]:
        """Groups by name, see `load`."""
        return {group: self.load(group) for group in groups}


def study_of(run: RunFolder) -> str:
    """The name of a run's study. Older runs of compare do not store it."""
    return run.manifest.get("kind", "compare")


def subject_of(run: RunFolder) -> str:
    """What a run studies, in a word: its subject, or the name of its weights."""
    return run.manifest.get("subject") or Path(run.manifest["settings"].get("weights", "")).name


Definitions = Mapping[str, tuple[str, str]]  # name -> meaning, units

COORDINATES: Definitions = {
    "pair": ("index of the pair, which selects its noise", "1"),
    "label": ("class of the pair, which both replicas share", "1"),
    "coupling": ("coupling g: weight of the other replica's keys", "1"),
    "step": ("sampler step; step 0 starts from pure noise", "1"),
    "ell": ("log-SNR", "nat"),
    "timestep": ("timestep of training that the network is given at the sampler step", "1"),
    "band": ("band of the DCT by radial frequency, 0 is DC", "1"),
    "radius": ("radial frequency, fraction of Nyquist per axis", "1"),
    "row": ("vertical index of the DCT coefficient", "1"),
    "column": ("horizontal index of the DCT coefficient", "1"),
    "count": ("coefficients per channel", "1"),
    "token_band": ("band of the DCT over the grid of tokens, 0 is DC", "1"),
    "token_radius": ("radial frequency over the grid of tokens, fraction of its Nyquist per axis", "1"),
    "parity": ("common or difference mode of the pair", "1"),
    "layer": ("layer of the network", "1"),
    "head": ("attention head", "1"),
    "level": ("sampler step that is examined", "1"),
    "level_ell": ("log-SNR of that step", "nat"),
    "branch": ("sampler step at which clones branch", "1"),
    "branch_ell": ("log-SNR of that step", "nat"),
    "bound": ("estimate, and the ends of its 95 % interval", "1"),
    "source": ("network or control that the estimates describe", "1"),
    "channel": ("channel of the image, or of the latent", "1"),
    "other": ("the other channel of a product", "1"),
    "replica": ("replica of the pair", "1"),
    "part": ("part of a whole", "1"),
    "mode": ("group of modes of one band and of like variance in the data", "1"),
    "mode_band": ("band of the group", "1"),
    "mode_count": ("modes in the group", "1"),
    "band_name": ("name of the band", "1"),
    "direction": ("direction in the space of images, or of latents", "1"),
    "direction_band": ("group of the direction", "1"),
    "component": ("principal component of the data", "1"),
    "label_name": ("name of the pair's class", "1"),
}


def described(dataset: xr.Dataset, definitions: Definitions) -> xr.Dataset:
    """The dataset with a meaning and units on each of its variables and coordinates.

    Args:
      definitions: meaning and units by name of the variable, or by the part of its name after its source and an
        underscore; those of common coordinates are known.

    Raises:
      ValueError: a variable is without a meaning.
    """
    found = dataset.copy()
    known = {**COORDINATES, **definitions}
    for name, variable in found.variables.items():
        parts = str(name).split("_")
        tails = ["_".join(parts[i:]) for i in range(len(parts))]
        entry = next((known[tail] for tail in tails if tail in known), None)
        if entry is not None:
            variable.attrs = {"long_name": entry[0], "units": entry[1], **variable.attrs}
    bare = sorted(str(name) for name, variable in found.variables.items() if "long_name" not in variable.attrs)
    if bare:
        raise ValueError(f"the study defines no meaning and units of: {', '.join(bare)}; add them to its definitions")
    return found
