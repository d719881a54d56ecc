"""What a study measures with: the network and its control, the devices, and the folder of the run."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import xarray as xr
from flax import nnx
from tqdm import tqdm

from dit_jax.config import NetworkConfig
from dit_jax.diffusion import Denoiser, guide, network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import CoupledDenoiser, pair_labels
from dit_jax.sharding import make_mesh, place_model, place_pairs, split
from experiments.frame.chunks import filled
from experiments.frame.cost import flops
from experiments.frame.forecast import Forecast
from experiments.frame.instrument import own_half
from experiments.frame.measured import NUM_BANDS, Definitions, Measured, described
from experiments.frame.progress import progress_of_block, telling
from experiments.frame.settings import ProtocolConfig, StudyConfig
from experiments.frame.steps import window
from experiments.frame.store import RunFolder
from experiments.frame.subject import Subject, check_dit, check_guidance, load_subject
from ou_theory.modes import Bands, radial_bands

LEAST_LEVELS = 2  # sampler steps that the estimator's window must hold in every study: a gap lies between two levels

C = TypeVar("C")
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


class Bench(Measured[C]):
    """One run of a study while it measures.

    Attributes:
      study: the name of the study.
      run: the folder that is filled.
      subject: the network as loaded, with shapes in place of its arrays as soon as `network` or `untrained` is asked
        for, which are on the devices.
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
    ) -> None:
        """Loads the network, if the settings name one, and opens the folder.

        Args:
          study: the name of the study.
          subject: what is studied, for a study without a network.
          definitions: meaning and units of coordinates, beside those that are common.
          check: raises ValueError for settings that do not fit the network, before there is a folder.
          passes: images that go through the network by group; with `progress` the run says what it costs.
          any_network: accept networks without attention, too (`dit_jax.controls`).

        Raises:
          ValueError: a network that is no DiT where one is needed; settings that do not fit the weights or the devices;
            an output folder that holds another run.
        """
        self.study, self.progress, self.mesh, self.definitions = study, progress, None, definitions or {}
        self.forecast: Forecast | None = None
        self._model: tuple[str, DiT | None] = ("", None)  # the one that is in memory, by name
        settings, extra = asdict(cast(Any, config)), {"kind": study, "subject": subject}
        if isinstance(config, StudyConfig):
            self.mesh = make_mesh(jax.local_devices()) if jax.local_device_count() > 1 else None
            self.subject = load_subject(one_of(config.weights), config.dtype, on_host=self.mesh is not None)
            if not any_network:
                check_dit(self.subject, study)
            model = self.subject.model.config
            check_guidance(self.subject.manifest, model, config.guidance)
            self.classes = tuple(range(model.num_classes)) if config.classes is None else tuple(config.classes)
            if not self.classes or any(not 0 <= c < model.num_classes for c in self.classes):
                raise ValueError(f"classes must be in 0..{model.num_classes - 1}, got {self.classes}")
            window(model.clock(config.steps), LEAST_LEVELS)
            radial_bands(model.input_size, model.input_size, NUM_BANDS)
            if self.mesh is not None and config.block % self.mesh.size:
                raise ValueError(
                    f"blocks of {config.block} pairs cannot be split over {self.mesh.size} devices: "
                    f"give --block {self.mesh.size} or a multiple of it"
                )
            if check is not None:
                check(config, self.subject)
            if passes is not None:
                least = 1 if self.mesh is None else self.mesh.size
                of_pairs = partial(_passes, passes, config, model)
                self.forecast = Forecast(study, of_pairs, config.pairs, config.block, least)
            if isinstance(config, ProtocolConfig) and config.unknown:
                extra["unknown_of_protocol"] = list(config.unknown)
            settings["classes"] = list(self.classes)
            extra |= {
                "subject": self.subject.name,
                "weights_digest": self.subject.manifest["digest"],
                "model": model.to_dict(),
                "bands": NUM_BANDS,
            }
        super().__init__(RunFolder.create(out, settings, resume=resume, command=command, extra=extra), config)

    @property
    def network(self) -> DiT:
        """The network under study, on the devices."""
        return self.only("network", self._loaded)

    @property
    def untrained(self) -> DiT:
        """Its control with random weights, on the devices."""
        return self.only("untrained", lambda: self.subject.untrained(cast(StudyConfig, self.config).seed))

    def only(self, name: str, make: Callable[[], DiT]) -> DiT:
        """A model on the devices, made when it is asked for under this name. The memory holds one of them at a time: it
        lets go of the one before, which is made again if it is asked for again."""
        if self._model[0] != name:
            self._model = ("", None)
            if name != "network":
                self.subject = self.subject.without_arrays()
            self._model = (name, self.place(make()))
        return cast(DiT, self._model[1])

    def _loaded(self) -> DiT:
        config, subject = cast(StudyConfig, self.config), self.subject
        if isinstance(jax.tree.leaves(nnx.state(subject.model))[0], jax.ShapeDtypeStruct):
            subject = load_subject(one_of(config.weights), config.dtype, on_host=self.mesh is not None)
        self.subject = subject.without_arrays()
        return subject.model

    def place(self, model: DiT) -> DiT:
        """A model on the devices."""
        parameters = cast(StudyConfig, self.config).parameters
        return model if self.mesh is None else place_model(model, self.mesh, parameters)

    def denoiser(self, model: DiT, gate: jax.Array | None = None, **options: Any) -> Denoiser:
        """A network under the guidance and the kind of gate of the settings, its batch split over the devices. Build it
        inside the jitted function that uses it, see `network_denoiser`.

        Args:
          gate: of the replicas, none by default.
          options: further options of `network_denoiser`. Under guidance, taps and edits see the doubled batch;
            `own` and `guided` select from it.
        """
        config = cast(StudyConfig, self.config)
        options |= {"channels": config.guided_channels, "guided_coupling": config.guided_coupling}
        options |= {"kind": config.gate_kind, "guidance": config.guidance}
        if self.mesh is None:
            denoise = network_denoiser(model, self.clock, gate, **options)
            # derivatives are taken through explicit attention, and their directions are not calls
            counts = self.progress and options.get("attention") != "explicit"
            return telling(denoise, config.halves, flops(model.config, 0.5, 2)) if counts else denoise
        mesh = self.mesh
        denoise = network_denoiser(model, self.clock, None if gate is None else split(mesh, gate, -3), **options)
        return lambda x, step, labels: denoise(split(mesh, x, -4), step, split(mesh, labels, 0))

    def coupled(self, model: DiT, **options: Any) -> CoupledDenoiser:
        """The network as a function of the gate of its replicas, see `denoiser`."""
        return lambda gate: self.denoiser(model, gate, **options)

    @property
    def is_guided(self) -> bool:
        """Whether the network runs under classifier-free guidance, on batches of twice the size."""
        return cast(StudyConfig, self.config).guidance != 1

    def own(self, activations: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The part of what a tap sees that belongs to the conditional images."""
        return own_half(activations) if self.is_guided else activations

    def guided(self, out: jax.Array) -> jax.Array:
        """Network outputs (R, N or 2 N, H, W, C) that were read inside, after guidance if there is any."""
        if not self.is_guided:
            return out
        config = cast(StudyConfig, self.config)
        count = out.shape[-1] if config.guided_channels == "all" else min(3, out.shape[-1])
        return guide(out[:, ::2], out[:, 1::2], config.guidance, count)

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
    ) -> xr.Dataset:
        """Fills a group of the run block by block, skips blocks that are finished, and returns the whole group.

        Args:
          variables: float32, see `Variables`.
          coords: coordinates of their dimensions, as xarray takes them; those of pair, step and band are known.
          pairs: number of pairs.
          measure: see `Measure`.
          first_pair: index of the first pair, for pairs that must differ from those of another group.
          bands: coordinates of the dimension ``band``; by default those of the bands of the DCT.
        """
        if group not in self.run.manifest["blocks"] and self.run.holds(group):  # of a version that wrote it whole
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
        )
        block = cast(StudyConfig, self.config).block
        self.run.declare(group, template, chunk=block)
        done = self.run.finished(group)
        blocks = [first for first in range(0, pairs, block) if first not in done]
        forecast = self.forecast if self.progress and blocks else None
        forecast = forecast if forecast is not None and forecast.wants(group) else None
        if forecast is not None:
            forecast.tell_before(group, template.nbytes, self.run)
        bar = tqdm(range(0, pairs, block), desc=f"{self.study}: {group}", disable=not self.progress)
        for first in bar:
            if first in done:
                continue
            chosen = slice(first, min(first + block, pairs))
            with ExitStack() as watched:
                if forecast is not None and first == blocks[0]:
                    watched.enter_context(forecast.telling(group, blocks, pairs, self.run))
                if self.progress and self.forecast is not None and group in self.forecast.total:
                    images = self.forecast.of_block(group, first, chosen.stop, pairs)
                    watched.enter_context(progress_of_block(bar, images))
                found = jax.device_get(dict(measure(*self._split(index[chosen], labels[chosen]))))
                values = {name: (dims[name], np.asarray(value, np.float32)) for name, value in found.items()}
                self.run.write(group, xr.Dataset(values, coords={"pair": index[chosen]}), first)
        return self.run.load(group)

    def whole(self, group: str, make: Callable[[], xr.Dataset]) -> xr.Dataset:
        """A group that is made at once; it is read from the store if it is there."""
        if not self.run.holds(group):
            self.run.put(group, described(make(), self.definitions))
        return self.run.load(group)

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


def _passes(passes: Callable[[Any, Any], Mapping[str, int]], config: Any, model: Any, pairs: int) -> Mapping[str, int]:
    """The passes of a run of so many pairs."""
    return passes(replace(config, pairs=pairs), model)


def _of_frequency(bands: Bands) -> dict[str, Any]:
    """Coordinates of the bands of the DCT."""
    return {"band": np.arange(len(bands)), "radius": ("band", bands.radius), "count": ("band", bands.count)}
