"""Compiled programs of studies, and how runs of one process share them.

A program is a function of a `Setup`, of what else is static, and of arguments that are traced. It is made of a function
without a closure, so that it can read nothing of a run beyond these. Runs whose setups are equal may therefore share
it, whatever their seeds, scales of guidance, couplings, classes and weights. They do so within `kept`, as the networks.
"""

import gc
import hashlib
import inspect
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, TypeVar

import jax
import numpy as np
from jax import monitoring
from jax.sharding import Mesh

from dit_jax.config import DiTConfig
from dit_jax.controls import Network
from dit_jax.diffusion import Denoiser, doubles, guide, network_denoiser
from dit_jax.replicas import CoupledDenoiser
from dit_jax.sharding import split
from experiments.frame.cost import flops
from experiments.frame.instrument import own_half
from experiments.frame.measured import NUM_BANDS
from experiments.frame.progress import telling
from experiments.frame.settings import GateKind, GuidedChannels, GuidedCoupling, Sampler
from ou_theory.clock import Clock
from ou_theory.modes import Bands, radial_bands

MOST = 32  # programs that are kept
COMPILED = "/jax/core/compile/backend_compile_duration"  # JAX's event of a program that is compiled or read from disk

T = TypeVar("T")


@dataclass(frozen=True)
class Setup:
    """What programs know of the run that they measure.

    The seed is traced inside a program, and so is the scale of guidance where there is any. Everything else is static:
    runs that differ in it have programs of their own.
    """

    model: DiTConfig  # a `ControlConfig` only in a study that accepts any network
    mesh: Mesh | None  # the devices over which pairs are split; None if there is only one device
    steps: str
    sampler: Sampler
    gate_kind: GateKind
    guided_channels: GuidedChannels
    guided_coupling: GuidedCoupling
    is_guided: bool  # whether the network runs under classifier-free guidance, on batches of twice the size
    seed: int | jax.Array
    guidance: float | jax.Array
    tells: bool = False  # whether slow calls of the network say that they were made, for a progress bar

    @cached_property
    def clock(self) -> Clock:
        """The sampler's noise levels, on the network's own path."""
        return self.model.clock(self.steps)

    @cached_property
    def bands(self) -> Bands:
        """The bands of the DCT over the network's images or latents."""
        return radial_bands(self.model.input_size, self.model.input_size, NUM_BANDS)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Height, width and channels of an image or latent."""
        return (self.model.input_size, self.model.input_size, self.model.in_channels)

    def denoiser(
        self, model: Network, gate: jax.Array | None = None, *, clock: Clock | None = None, **options: Any
    ) -> Denoiser:
        """A network under the guidance and the kind of gate of the settings, its batch split over the devices. Build it
        inside the jitted function that uses it, see `network_denoiser`.

        Args:
          gate: of the replicas, none by default.
          clock: the levels that it is asked for, by default those of the sampler.
          options: further options of `network_denoiser`, or others than those of the settings. Under guidance, taps and
            edits see the doubled batch; `own` and `guided` select from it.
        """
        known = {"channels": self.guided_channels, "guided_coupling": self.guided_coupling}
        options = {**known, "kind": self.gate_kind, "guidance": self.guidance, **options}
        clock = self.clock if clock is None else clock
        if self.mesh is None:
            denoise = network_denoiser(model, clock, gate, **options)
            # derivatives are taken through explicit attention, and their directions are no calls
            counts = self.tells and options.get("attention") != "explicit"
            halves = 2 if doubles(options["guidance"]) else 1
            return telling(denoise, halves, flops(model.config, 0.5, 2)) if counts else denoise
        mesh = self.mesh
        denoise = network_denoiser(model, clock, None if gate is None else split(mesh, gate, -3), **options)
        return lambda x, step, labels: denoise(split(mesh, x, -4), step, split(mesh, labels, 0))

    def coupled(self, model: Network, **options: Any) -> CoupledDenoiser:
        """The network as a function of the gate of its replicas, see `denoiser`."""
        return lambda gate: self.denoiser(model, gate, **options)

    def own(self, activations: dict[str, jax.Array]) -> dict[str, jax.Array]:
        """The part of what a tap sees that belongs to the conditional images."""
        return own_half(activations) if self.is_guided else activations

    def guided(self, out: jax.Array) -> jax.Array:
        """Network outputs (R, N or 2 N, H, W, C) that were read inside, after guidance if there is any."""
        if not self.is_guided:
            return out
        count = out.shape[-1] if self.guided_channels == "all" else min(3, out.shape[-1])
        return guide(out[:, ::2], out[:, 1::2], self.guidance, count)


@dataclass(frozen=True)
class Constant:
    """Arrays that are static in a program, made by `constant`. Equal arrays share a program."""

    value: Any = field(compare=False)
    digest: str


def constant(value: Any, *arrays: Any) -> Constant:
    """A static argument of a program that is told from others by the contents of the arrays that it is made of."""
    found = hashlib.sha256()
    for array in map(np.asarray, arrays):
        found.update(f"{array.dtype} {array.shape} ".encode() + array.tobytes())
    return Constant(value, found.hexdigest())


def program(setup: Setup, function: Callable[..., T], *static: Hashable) -> Callable[..., T]:
    """The jitted ``function(setup, *static, *arguments)``, as a function of its arguments.

    Args:
      function: of the top level of a module. It sees a `Setup` whose seed and guidance are traced.
      static: what else is fixed in the program; `constant` for arrays.

    Raises:
      TypeError: the function could read something of the run that it was first made for.
    """
    if not inspect.isfunction(function) or function.__closure__ is not None:
        raise TypeError(f"{function} must be a function of a module's top level: what it closes over is not in its key")
    # Weakly typed, as the number in a program would be; JAX uses 32 bits of a seed.
    traced = {"seed": np.uint32(setup.seed)} | ({"guidance": float(setup.guidance)} if setup.is_guided else {})
    fixed = replace(setup, seed=0, guidance=2.0 if setup.is_guided else setup.guidance)
    make = partial(_jitted, function, fixed, static)
    jitted = make() if _kept is None else _kept.program((function, fixed, static), make)
    return partial(jitted, traced)


def _jitted(function: Callable[..., T], fixed: Setup, static: tuple[Hashable, ...]) -> Callable[..., T]:
    def run(traced: dict[str, jax.Array], *arguments: Any) -> T:
        return function(replace(fixed, **traced), *static, *arguments)

    run.__name__ = function.__name__.strip("_")  # which JAX's messages name
    return jax.jit(run)


class Models:
    """The last model of each name."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Hashable, Any]] = {}
        self._alone = False  # whether the one that is there must have no other beside it

    def value(self, name: str, key: Hashable, make: Callable[[], T], *, alone: bool = False) -> T:
        """The model of this name if it was made for the same key, or what `make` gives. Before a model is made, the
        last of its name is let go, and all that came after it; or all others, if they may not lie side by side.

        Args:
          alone: whether it must have no other beside it.
        """
        if name not in self._found or self._found[name][0] != key:
            if alone or self._alone:
                self._found.clear()
            names = list(self._found)
            for stale in names[names.index(name) :] if name in names else []:  # with what was made of it
                del self._found[stale]
            if not self._found:
                gc.collect()  # a network that no run uses any more must not lie beside the next
            self._found[name], self._alone = (key, make()), alone
        return self._found[name][1]


class _Kept:
    """What runs share: the programs used last, and the last models."""

    def __init__(self) -> None:
        self.programs: OrderedDict[Hashable, Any] = OrderedDict()
        self.models = Models()

    def program(self, key: Hashable, make: Callable[[], T]) -> T:
        found = self.programs.pop(key, None) or make()
        self.programs[key] = found
        if len(self.programs) > MOST:
            self.programs.popitem(last=False)
        return found


_kept: _Kept | None = None


@contextmanager
def kept() -> Iterator[None]:
    """Within it, runs of this process share compiled programs, and the last network, with its copy on the devices and
    its last control, as long as they need the same. Without it, a run leaves nothing behind."""
    global _kept
    before = _kept
    _kept = before or _Kept()
    try:
        yield
    finally:
        _kept = before


def kept_models() -> Models | None:
    """The models that runs share now; None outside of `kept`."""
    return None if _kept is None else _kept.models


_compiled = 0


def _count(event: str, duration_secs: float, **kwargs: Any) -> None:
    global _compiled
    _compiled += event == COMPILED


monitoring.register_event_duration_secs_listener(_count)


def compilations() -> int:
    """How many programs XLA has compiled in this process, or read from its cache on disk, large and small: a program of
    a study counts as much as one addition of arrays."""
    return _compiled
