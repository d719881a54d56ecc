"""What every question about a network shares: the subject, its control, the pairs, the folder that is filled in blocks.

A study is a dataclass of settings (`StudyConfig` and more), a function that measures a block of pairs, and a function
that turns what is stored into estimates and a `Section` of the report.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from flax import nnx
from tqdm import tqdm

from dit_jax.attention import GATE_KINDS, GateKind
from dit_jax.checkpoint import load_manifest, load_model
from dit_jax.config import DiTConfig
from dit_jax.model import DiT
from dit_jax.replicas import pair_labels
from experiments.info import model_folder
from experiments.store import RunFolder
from ou_theory.bootstrap import basic_interval, resample
from ou_theory.clock import Clock, make_clock
from ou_theory.modes import Bands, radial_bands

DEFAULT_WEIGHTS = "photos16-v"
NUM_BANDS = 6
DRAWS = 1000
Dtype = Literal["float32", "bfloat16"]
Variables = Mapping[str, tuple[Sequence[str], str]]  # name -> dimensions after "pair", meaning
Measure = Callable[[np.ndarray, np.ndarray], Mapping[str, Any]]  # pairs, labels -> arrays with pairs in front


class Subject(NamedTuple):
    """A network under study."""

    name: str  # of its folder; of the training run for the folder ``model`` that `syncgap train` leaves in it
    model: DiT
    manifest: dict  # of its folder: digest, data, training

    @property
    def image_shape(self) -> tuple[int, int, int]:
        config = self.model.config
        return (config.input_size, config.input_size, config.in_channels)

    def untrained(self, seed: int) -> DiT:
        """The control: the same architecture with random weights everywhere, those that initialisation sets to zero
        drawn too, so that the blocks act and the output is not trivially zero; where the subject's arrays lie."""
        device = next(iter(jax.tree.leaves(nnx.state(self.model))[0].devices()))
        with jax.default_device(device):
            return untrained_model(self.model.config, seed)


def load_subject(weights: str, dtype: Dtype | None = None, on_host: bool = False) -> Subject:
    """A converted or trained DiT (a folder), or a shipped model by name.

    Args:
      dtype: of activations and parameters, in place of the stored one.
      on_host: leave the arrays in the host's memory; for models that are then placed on several devices, none of which
        may hold the whole.

    Raises:
      ValueError: there is no such model, or its folder cannot be used.
    """
    source = model_folder(weights)
    with jax.default_device(jax.local_devices(backend="cpu")[0]) if on_host else nullcontext():
        path = source.resolve()
        name = path.parent.name if path.name == "model" else path.name
        return Subject(name, load_model(source, dtype, params=dtype), load_manifest(source))


def untrained_model(config: DiTConfig, seed: int) -> DiT:
    """A DiT with random weights everywhere, see `Subject.untrained`."""
    model = DiT(config, nnx.Rngs(seed))
    state = nnx.state(model, nnx.Param)
    leaves, tree = jax.tree.flatten(state)
    drawn = [
        jax.random.normal(jax.random.fold_in(jax.random.key(seed), i), leaf.shape, leaf.dtype)
        * np.sqrt(2 / (leaf.shape[-1] + leaf.shape[-2]))
        if leaf.ndim >= 2 and not jnp.any(leaf)
        else leaf
        for i, leaf in enumerate(leaves)
    ]
    nnx.update(model, jax.tree.unflatten(tree, drawn))
    return model


@dataclass(frozen=True)
class StudyConfig:
    """Settings that every study has; together with the weights they fix its numbers."""

    weights: str = DEFAULT_WEIGHTS  # a converted DiT (folder), or the name of a shipped model
    pairs: int = 32
    steps: str = "50"  # sampler steps, for example 50, 250 or ddim50
    gate: GateKind = "joint"
    classes: tuple[int, ...] | None = None  # labels that the pairs take in turn; all classes by default
    seed: int = 0
    block: int = 4  # pairs that run together; what an interruption may lose
    untrained_pairs: int = 16  # pairs of the control with random weights
    dtype: Dtype | None = None  # of activations and parameters; the stored one by default

    def __post_init__(self) -> None:
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        for name in ("pairs", "untrained_pairs"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2: intervals come from resampling pairs")
        if self.gate not in GATE_KINDS:
            raise ValueError(f"gate {self.gate!r} is not one of {', '.join(GATE_KINDS)}")


class Study:
    """A study at work.

    Attributes:
      kind: its name, for example ``"depth"``.
      subject, clock, bands, classes: what is measured, on which noise levels, in which DCT bands, for which labels.
      run: the folder that is filled.
    """

    def __init__(
        self, kind: str, config: StudyConfig, out: str | Path, *, resume: bool, command: str, progress: bool
    ) -> None:
        """Loads the network and opens the folder.

        Raises:
          ValueError: settings that do not fit the weights; an output folder that holds another run.
        """
        self.kind, self.config, self.progress = kind, config, progress
        self.subject = load_subject(config.weights, config.dtype)
        model = self.subject.model.config
        self.classes = tuple(range(model.num_classes)) if config.classes is None else tuple(config.classes)
        if not self.classes or any(not 0 <= c < model.num_classes for c in self.classes):
            raise ValueError(f"classes must be in 0..{model.num_classes - 1}, got {self.classes}")
        self.clock: Clock = make_clock(config.steps)
        self.bands: Bands = radial_bands(model.input_size, model.input_size, NUM_BANDS)
        self.run = RunFolder.create(
            out,
            {**asdict(config), "classes": list(self.classes)},
            resume=resume,
            command=command,
            extra={
                "kind": kind,
                "subject": self.subject.name,
                "weights_digest": self.subject.manifest["digest"],
                "model": model.to_dict(),
                "bands": NUM_BANDS,
            },
        )

    def measure(
        self,
        group: str,
        variables: Variables,
        coords: Mapping[str, Any],
        pairs: int,
        measure: Measure,
        *,
        first_pair: int = 0,
    ) -> xr.Dataset:
        """Fills a group of the run block by block, leaving out what is there already, and returns it whole.

        Args:
          variables: name -> (dimensions after ``pair``, meaning); float32.
          coords: of those dimensions, as xarray takes them; step, ell and band are added.
          pairs: how many.
          measure: ``measure(pairs, labels)`` of int arrays (n,) gives every variable with n pairs in front.
          first_pair: index of the first, for pairs that must not be those of another group.
        """
        base: dict[str, Any] = {
            "step": ("step", np.arange(len(self.clock)), {"long_name": "sampler step, 0 sees pure noise"}),
            "ell": ("step", self.clock.log_snr, {"long_name": "log-SNR", "units": "nat"}),
            "band": np.arange(len(self.bands)),
            "radius": ("band", self.bands.radius, {"long_name": "radial frequency, fraction of Nyquist per axis"}),
            "count": ("band", self.bands.count, {"long_name": "coefficients per channel"}),
        }
        used = {dim for dims, _ in variables.values() for dim in dims}
        kept = {name: value for name, value in base.items() if (value[0] if isinstance(value, tuple) else name) in used}
        index = first_pair + np.arange(pairs)
        labels = pair_labels(index, self.classes)
        known = xr.Dataset(coords={**kept, **coords, "pair": index, "label": ("pair", labels)})
        sizes = {**known.sizes}
        template = known.assign(
            {
                name: (
                    ("pair", *dims),
                    np.full([pairs, *(sizes[d] for d in dims)], np.nan, np.float32),
                    {"long_name": about},
                )
                for name, (dims, about) in variables.items()
            }
        )
        block = self.config.block
        self.run.declare(group, template, chunk=block)
        done = self.run.finished(group)
        for first in tqdm(range(0, pairs, block), desc=f"{self.kind}: {group}", disable=not self.progress):
            if first in done:
                continue
            chosen = slice(first, min(first + block, pairs))
            found = jax.device_get(dict(measure(index[chosen], labels[chosen])))
            values = {name: (("pair", *variables[name][0]), np.asarray(v, np.float32)) for name, v in found.items()}
            self.run.write(group, xr.Dataset(values, coords={"pair": index[chosen]}), first)
        return self.run.load(group)


def pair_draws(seed: int, pairs: int, draws: int = DRAWS) -> np.ndarray:
    """Bootstrap weights (draws, pairs), rows sum to 1: one draw of pairs serves all that is measured on them."""
    return np.asarray(resample(seed, pairs, draws), np.float64) / pairs


def resampled_mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Means over the leading axis of pairs, (P, ...) -> (draws, ...)."""
    return np.tensordot(weights, np.asarray(values, np.float64), (1, 0))


def with_interval(point: Any, draws: np.ndarray) -> np.ndarray:
    """(..., 3): the estimate and the ends of its 95 % interval."""
    return np.stack([np.asarray(point, np.float64), *basic_interval(point, draws)], -1)
