"""What a study measures with: the network and its control, the devices, and the folder of the run."""

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import xarray as xr
from flax import nnx
from tqdm import tqdm

from dit_jax.checkpoint import abstract_model
from dit_jax.config import NetworkConfig
from dit_jax.diffusion import Denoiser
from dit_jax.model import DiT
from dit_jax.platform import host_device
from dit_jax.replicas import CoupledDenoiser, pair_labels
from dit_jax.sharding import gather, make_mesh, place_model, place_pairs
from experiments.frame import programs
from experiments.frame.chunks import filled
from experiments.frame.forecast import Forecast
from experiments.frame.measured import NUM_BANDS, Definitions, Measured, described
from experiments.frame.programs import Setup
from experiments.frame.progress import progress_of_block
from experiments.frame.settings import ProtocolConfig, StudyConfig
from experiments.frame.steps import window
from experiments.frame.store import RunFolder
from experiments.frame.subject import (
    Subject,
    check_dit,
    check_guidance,
    load_network,
    load_subject,
    subject_key,
    untrained_model,
)
from ou_theory.modes import Bands, radial_bands

SMALL = 50_000_000  # parameters of a network that may lie in memory beside its control
LEAST_LEVELS = 2  # sampler steps that the estimator's window must hold in every study: a gap lies between two levels

C = TypeVar("C")
T = TypeVar("T")
Variables = Mapping[str, tuple[Sequence[str], str] | tuple[Sequence[str], str, str]]
"""Name -> dimensions, meaning, units ("1" by default). The dimension ``pair`` comes first where it is not named."""

Measure = Callable[[Any, Any], Mapping[str, Any]]
"""Pairs (n,) and their labels (n,) -> arrays of the dimensions of the variables."""


def one_of(weights: str | Sequence[str]) -> str:
    """The one network of a run. Studies of several networks name it in a tuple."""
    if isinstance(weights, str):
        return weights
    (name,) = weights
    return name


def checked_settings(
    study: str,
    config: StudyConfig,
    subject: Subject,
    check: Callable[[Any, Subject], None] | None = None,
    any_network: bool = False,
    devices: int = 1,
) -> tuple[int, ...]:
    """The labels that pairs take in turn, after all that can be checked before anything is computed.

    Args:
      devices: over which the pairs of a block are split.

    Raises:
      ValueError: settings that fit neither the network nor the devices.
    """
    model = subject.config
    if not any_network:
        check_dit(subject, study)
    check_guidance(subject.manifest, model, config.guidance)
    classes = tuple(range(model.num_classes)) if config.classes is None else tuple(config.classes)
    if not classes or any(not 0 <= c < model.num_classes for c in classes):
        raise ValueError(f"classes must be in 0..{model.num_classes - 1}, got {classes}")
    window(model.clock(config.steps), LEAST_LEVELS)
    radial_bands(model.input_size, model.input_size, NUM_BANDS)
    if config.block % devices:
        raise ValueError(
            f"blocks of {config.block} pairs cannot be split over {devices} devices: "
            f"give --block {devices} or a multiple of it"
        )
    if check is not None:
        check(config, subject)
    return classes


class Bench(Measured[C]):
    """One run of a study while it measures.

    Attributes:
      study: the name of the study.
      run: the folder that is filled.
      subject: name, architecture and manifest of the network, without its weights.
      classes: labels that the pairs take in turn.
      mesh: the devices over which the pairs of a block are split; None if there is only one device.
    """

    def __init__(
        self,
        study: str,
        config: C,
        out: str | Path,
        *,
        subject: str | None = None,
        definitions: Definitions | None = None,
        check: Callable[[C, Subject], None] | None = None,
        passes: Callable[[C, NetworkConfig], Mapping[str, int]] | None = None,
        any_network: bool = False,
        resume: bool = False,
        command: str = "",
        progress: bool = False,
        heard: Callable[[float], None] | None = None,
    ) -> None:
        """Loads the network, if the settings name one, and opens the folder.

        Args:
          study: the name of the study.
          subject: what is studied, for a study without a network.
          definitions: meaning and units of coordinates, beside those that are common.
          check: raises ValueError for settings that do not fit the network, before there is a folder.
          passes: images that go through the network by group; with `progress` the run says what it costs.
          any_network: accept networks without attention, too (`dit_jax.controls`).
          heard: told, after the first block, how many seconds an image takes, in the place of the terminal.

        Raises:
          ValueError: a network that is no DiT where one is needed; settings that do not fit the weights or the devices;
            an output folder that holds another run.
        """
        self.study, self.progress, self.mesh, self.definitions = study, progress, None, definitions or {}
        self.forecast: Forecast | None = None
        self._models = programs.Models()
        self.config = config  # which the network asks for
        settings, extra = asdict(cast(Any, config)), {"kind": study, "subject": subject}
        if isinstance(config, StudyConfig):
            weights, devices = one_of(config.weights), jax.device_count()  # of all processes that have joined
            self.mesh = make_mesh() if devices > 1 else None
            self.subject = load_subject(weights, config.dtype)
            self.subject_key = subject_key(weights, config.dtype, on_host=self.mesh is not None)
            self.classes = checked_settings(study, config, self.subject, check, any_network, devices)
            self.network  # noqa: B018  # what is wrong with the weights is said before there is a folder
            if passes is not None and (progress or heard is not None):
                of_pairs = partial(_passes, passes, config, self.subject.config)
                self.forecast = Forecast(study, of_pairs, config.pairs, config.block, devices, heard)
            if isinstance(config, ProtocolConfig) and config.unknown:
                extra["unknown_of_protocol"] = list(config.unknown)
            settings["classes"] = list(self.classes)
            extra |= {
                "subject": self.subject.name,
                "weights_digest": self.subject.manifest["digest"],
                "model": self.subject.config.to_dict(),
                "bands": NUM_BANDS,
            }
        super().__init__(RunFolder.create(out, settings, resume=resume, command=command, extra=extra), config)

    @cached_property
    def setup(self) -> Setup:
        """What programs know of this run."""
        config = cast(StudyConfig, self.config)
        return Setup(
            self.subject.config,
            self.mesh,
            config.steps,
            config.sampler,
            config.gate_kind,
            config.guided_channels,
            config.guided_coupling,
            is_guided=config.halves == 2,
            seed=config.seed,
            guidance=config.guidance,
            tells=self.progress,
        )

    def program(self, function: Callable[..., T], *static: Hashable) -> Callable[..., T]:
        """The jitted ``function(setup, *static, *arguments)``, as a function of its arguments; see `programs`."""
        return programs.program(self.setup, function, *static)

    @property
    def network(self) -> DiT:
        """The network under study, on the devices."""
        config = cast(StudyConfig, self.config)
        return self.only("network", lambda: load_network(one_of(config.weights), config.dtype, self.mesh is not None))

    @property
    def untrained(self) -> DiT:
        """Its control with random weights, on the devices."""
        return self.only("untrained", self.random)

    def random(self) -> DiT:
        """A network of the same architecture with random weights, where weights are before they are placed."""
        with jax.default_device(host_device() if self.mesh is not None else None):
            return cast(DiT, untrained_model(self.subject.config, cast(StudyConfig, self.config).seed))

    def only(self, name: str, make: Callable[[], DiT]) -> DiT:
        """A model on the devices, made when it is asked for under this name. Of large models the memory holds one at a
        time: it lets go of the one before, which is made again if it is asked for again."""
        config, alone = cast(StudyConfig, self.config), _parameters(self.subject.config) > SMALL
        key = (self.subject_key, self.mesh, config.parameters, None if name == "network" else config.seed)
        models = programs.kept_models() or self._models
        return models.value(name, key, lambda: self.place(make()), alone=alone)

    def place(self, model: DiT) -> DiT:
        """A model on the devices."""
        parameters = cast(StudyConfig, self.config).parameters
        return model if self.mesh is None else place_model(model, self.mesh, parameters)

    def denoiser(self, model: DiT, gate: jax.Array | None = None, **options: Any) -> Denoiser:
        """See `Setup.denoiser`."""
        return self.setup.denoiser(model, gate, **options)

    def coupled(self, model: DiT, **options: Any) -> CoupledDenoiser:
        """See `Setup.coupled`."""
        return self.setup.coupled(model, **options)

    def measure(
        self,
        group: str,
        variables: Variables,
        coords: Mapping[str, Any],
        pairs: int,
        measure: Measure,
        *,
        first_pair: int = 0,
        bands: Mapping[str, Any] | None = None,
        of_all: bool = False,
    ) -> xr.Dataset:
        """Fills a group of the run block by block, skips blocks that are finished, and returns the whole group.

        Blocks are stored as the group was begun. Where the settings now have another size of blocks, pairs are measured
        in blocks of that size, or of as many stored blocks as it holds.

        Args:
          variables: float32, see `Variables`.
          coords: coordinates of their dimensions, as xarray takes them; those of pair, step and band are known.
          pairs: number of pairs.
          measure: see `Measure`.
          first_pair: index of the first pair, for pairs that must differ from those of another group.
          bands: coordinates of the dimension ``band``; by default those of the bands of the DCT.
          of_all: every value depends on all pairs, for example by a variance that they have: when pairs are added to
            the run, the group is measured again.
        """
        written_whole = group not in self.run.manifest["blocks"] and self.run.holds(group)  # by an older version
        if written_whole and not self.run.is_outdated(group):
            return self.run.load(group)
        dims = {name: tuple(d if "pair" in d else ("pair", *d)) for name, (d, *_) in variables.items()}
        index = first_pair + np.arange(pairs)
        labels = pair_labels(index, self.classes)
        used = {dim for each in dims.values() for dim in each}
        known = xr.Dataset(coords={**self._coords(used, bands), **coords, "pair": index, "label": ("pair", labels)})
        sizes = dict(known.sizes)
        template = described(
            known.assign(
                {
                    name: (
                        dims[name],
                        filled(np.dtype(np.float32), [sizes[dim] for dim in dims[name]]),
                        {"long_name": about, "units": units[0] if units else "1"},
                    )
                    for name, (_, about, *units) in variables.items()
                }
            ),
            self.definitions,
        ).assign_attrs({"of_all": True} if of_all else {})
        block = cast(StudyConfig, self.config).block
        chunk = self.run.declare(group, template, chunk=block, of_all=of_all)
        firsts, done = range(0, pairs, chunk), self.run.finished(group)
        together = list(_together([first for first in firsts if first not in done], chunk, block, pairs))
        forecast = self.forecast if together and self.forecast is not None and self.forecast.wants(group) else None
        if forecast is not None:
            forecast.tell_before(group, template.nbytes, self.run)
        shown = {"total": len(firsts), "initial": len(done & set(firsts)), "disable": not self.progress}
        with tqdm(desc=f"{self.study}: {group}", **shown) as bar:
            for chosen in together:
                with ExitStack() as watched:
                    if forecast is not None and chosen is together[0]:
                        watched.enter_context(forecast.telling(group, together, pairs, self.run))
                    if self.progress and self.forecast is not None and group in self.forecast.total:
                        images = self.forecast.of_block(group, chosen.start, chosen.stop, pairs)
                        watched.enter_context(progress_of_block(bar, images))
                    pieces = [slice(at, min(at + block, chosen.stop)) for at in range(chosen.start, chosen.stop, block)]
                    found = [gather(dict(measure(*self._split(index[at], labels[at])))) for at in pieces]
                    each = [
                        xr.Dataset({name: (dims[name], np.asarray(v, np.float32)) for name, v in x.items()})
                        for x in found
                    ]
                    joined = (each[0] if len(each) == 1 else xr.concat(each, "pair")).assign_coords(pair=index[chosen])
                    for at in range(0, len(index[chosen]), chunk):
                        self.run.write(group, joined.isel(pair=slice(at, at + chunk)), chosen.start + at)
                        bar.update()
        return self.run.load(group)

    def whole(self, group: str, make: Callable[[], xr.Dataset], *, of_all: bool = False) -> None:
        """Fills a group of the run at once, unless it is there.

        Args:
          of_all: it depends on all pairs, see `measure`.
        """
        if not self.run.holds(group) or (of_all and self.run.is_outdated(group)):
            self.run.put(group, described(make(), self.definitions))
        self.run.confirm(group)

    def _coords(self, used: set[str], bands: Mapping[str, Any] | None = None) -> dict[str, Any]:
        clock = self.clock
        known: dict[str, Any] = {
            "step": np.arange(len(clock)),
            "ell": ("step", clock.log_snr),
            "timestep": ("step", clock.timesteps),
            **(bands or _of_frequency(self.bands)),
        }
        return {name: v for name, v in known.items() if (v[0] if isinstance(v, tuple) else name) in used}

    def _split(self, pairs: np.ndarray, labels: np.ndarray) -> tuple[Any, Any]:
        """A block's pairs and labels, split over the devices; the last block may be too small for that."""
        if self.mesh is None or len(pairs) % self.mesh.size:
            return pairs, labels
        placed_pairs, placed_labels = place_pairs(self.mesh, pairs, labels)
        return placed_pairs, placed_labels


def _parameters(config: NetworkConfig) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(abstract_model(config), nnx.Param)))


def _passes(passes: Callable[[Any, Any], Mapping[str, int]], config: Any, model: Any, pairs: int) -> Mapping[str, int]:
    """The passes of a run of so many pairs."""
    return passes(replace(config, pairs=pairs), model)


def _together(firsts: Sequence[int], chunk: int, block: int, pairs: int) -> Iterator[slice]:
    """Neighbours among the stored blocks of `chunk` pairs that begin at `firsts`, as many together as `block` pairs
    hold, but at least one."""
    most = max(1, block // chunk)
    while firsts:
        count = next((n for n in range(1, most) if firsts[n : n + 1] != [firsts[0] + n * chunk]), most)
        yield slice(firsts[0], min(firsts[0] + count * chunk, pairs))
        firsts = firsts[count:]


def _of_frequency(bands: Bands) -> dict[str, Any]:
    """Coordinates of the bands of the DCT."""
    return {"band": np.arange(len(bands)), "radius": ("band", bands.radius), "count": ("band", bands.count)}
