"""What a study measures with: the network and its control, the devices, and the folder of the run."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, cast

import jax
import numpy as np
import xarray as xr
from tqdm import tqdm

from dit_jax.diffusion import Denoiser, guide, network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import CoupledDenoiser, pair_labels
from dit_jax.sharding import make_mesh, place_model, place_pairs, split
from experiments.frame.instrument import own_half
from experiments.frame.measured import NUM_BANDS, Definitions, Measured, described
from experiments.frame.settings import StudyConfig
from experiments.frame.store import RunFolder
from experiments.frame.subject import Subject, check_dit, check_guidance, load_subject
from ou_theory.modes import Bands, radial_bands

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
      subject: the network as loaded; `network` is its copy on the devices.
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
          any_network: accept networks without attention, too (`dit_jax.controls`).

        Raises:
          ValueError: a network that is no DiT where one is needed; settings that do not fit the weights or the devices;
            an output folder that holds another run.
        """
        self.study, self.progress, self.mesh, self.definitions = study, progress, None, definitions or {}
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
            model.clock(config.steps)
            radial_bands(model.input_size, model.input_size, NUM_BANDS)
            if self.mesh is not None and config.block % self.mesh.size:
                raise ValueError(
                    f"blocks of {config.block} pairs cannot be split over {self.mesh.size} devices: "
                    f"give --block {self.mesh.size} or a multiple of it"
                )
            if check is not None:
                check(config, self.subject)
            settings["classes"] = list(self.classes)
            extra |= {
                "subject": self.subject.name,
                "weights_digest": self.subject.manifest["digest"],
                "model": model.to_dict(),
                "bands": NUM_BANDS,
            }
        super().__init__(RunFolder.create(out, settings, resume=resume, command=command, extra=extra), config)

    @cached_property
    def network(self) -> DiT:
        """The network under study, on the devices."""
        return self.place(self.subject.model)

    @cached_property
    def untrained(self) -> DiT:
        """Its control with random weights, on the devices."""
        return self.place(self.subject.untrained(cast(StudyConfig, self.config).seed))

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
            return network_denoiser(model, self.clock, gate, **options)
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
                        np.full([sizes[dim] for dim in dims[name]], np.nan, np.float32),
                        {"long_name": about, "units": units[0] if units else "1"},
                    )
                    for name, (_, about, *units) in variables.items()
                }
            ),
            self.definitions,
        )
        block = cast(StudyConfig, self.config).block
        chunk = self.run.declare(group, template, chunk=block, of_all=of_all)
        firsts, done = range(0, pairs, chunk), self.run.finished(group)
        left = [first for first in firsts if first not in done]
        about = {"total": len(firsts), "initial": len(firsts) - len(left), "disable": not self.progress}
        with tqdm(desc=f"{self.study}: {group}", **about) as bar:
            for chosen in _together(left, chunk, block, pairs):
                pieces = [slice(at, min(at + block, chosen.stop)) for at in range(chosen.start, chosen.stop, block)]
                found = [jax.device_get(dict(measure(*self._split(index[at], labels[at])))) for at in pieces]
                each = [
                    xr.Dataset({name: (dims[name], np.asarray(v, np.float32)) for name, v in x.items()}) for x in found
                ]
                measured = (each[0] if len(each) == 1 else xr.concat(each, "pair")).assign_coords(pair=index[chosen])
                for at in range(0, len(index[chosen]), chunk):
                    self.run.write(group, measured.isel(pair=slice(at, at + chunk)), chosen.start + at)
                    bar.update()
        return self.run.load(group)

    def whole(self, group: str, make: Callable[[], xr.Dataset], *, of_all: bool = False) -> xr.Dataset:
        """A group that is made at once; it is read from the store if it is there.

        Args:
          of_all: it depends on all pairs, see `measure`.
        """
        if not self.run.holds(group) or (of_all and self.run.is_outdated(group)):
            self.run.put(group, described(make(), self.definitions))
        self.run.confirm(group)
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
