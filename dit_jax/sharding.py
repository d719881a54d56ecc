"""Ensembles on several devices, of one process or of several.

Pairs are independent, so that the batch is split over the one axis of a mesh and the network stays as it is. Parameters
are whole on every device, or they are split too, and gathered layer by layer where they are used::

    mesh = make_mesh()
    model = place_model(model, mesh, "sharded")
    pairs, labels = place_pairs(mesh, pairs, labels)
    samples = gather(sampled(model, couplings, pairs, labels))

Here `sampled` is a jitted function that calls `run_pairs` with the denoiser ``split_batch(mesh, coupled)``. Results are
those of one device, up to the rounding of matrix products of another shape.

Several processes run the same program, each with the same host arrays, after ``jax.distributed.initialize(address,
num_processes, process_id)``, which must come before anything that asks for devices; its coordinator listens on every
network interface unless it is given a ``coordinator_bind_address``. `dit_jax.distributed` does so for the tasks
of a job step.
"""

from typing import Any, Literal

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from dit_jax.diffusion import Denoiser
from dit_jax.model import DiT
from dit_jax.platform import devices as all_devices
from dit_jax.replicas import CoupledDenoiser

Parameters = Literal["replicated", "sharded"]
PARAMETERS: tuple[Parameters, ...] = ("replicated", "sharded")

AXIS = "pairs"
SMALL = 4096  # elements below which an array is not worth gathering


class SplitParam(nnx.Param):
    """A parameter that is stored split over devices and is whole when it is read. If the network read the parts, the
    compiler might split its arithmetic like them, and send activations between devices in every layer."""

    def get_value(self, **kwargs) -> jax.Array:
        return jax.lax.with_sharding_constraint(super().get_value(**kwargs), self.get_metadata("whole"))


def make_mesh(devices=None) -> Mesh:
    """A mesh with the single axis `AXIS` over `devices` (all by default). Sharding propagates through it by itself."""
    chosen = all_devices() if devices is None else devices
    return jax.make_mesh((len(chosen),), (AXIS,), (AxisType.Auto,), devices=chosen)


def place_model(model: DiT, mesh: Mesh, parameters: Parameters = "replicated") -> DiT:
    """A copy of the model on the devices of a mesh.

    Args:
      model: the same in every process, readable there.
      parameters: ``"replicated"``, or ``"sharded"``: every parameter of at least `SMALL` elements is split along its
        largest axis that the device count divides; along the layers only if nothing else divides, because one layer
        is used at a time.

    Raises:
      ValueError: unknown `parameters`.
    """
    if parameters not in PARAMETERS:
        raise ValueError(f"parameters {parameters!r} is not one of {', '.join(PARAMETERS)}")
    whole = _along(mesh)

    def place(path, variable: nnx.Variable) -> nnx.Variable:
        host = np.asarray(variable[...])
        if parameters == "sharded" and isinstance(variable, nnx.Param):
            axis = _split_axis(host.shape, mesh.size, stacked=path[0] == jax.tree_util.GetAttrKey("blocks"))
            if axis is not None:
                return SplitParam(_place(host, _along(mesh, axis)), whole=whole)
        placed = _place(host, whole)
        return nnx.Param(placed) if isinstance(variable, SplitParam) else variable.replace(placed)

    return jax.tree.map_with_path(place, model, is_leaf=lambda node: isinstance(node, nnx.Variable))


def place_pairs(mesh: Mesh, *arrays) -> tuple[jax.Array, ...]:
    """Arrays (P, ...), the same in every process, split over the devices by pair.

    Raises:
      ValueError: P is not a multiple of the number of devices.
    """
    for array in arrays:
        if len(array) % mesh.size:
            raise ValueError(
                f"{len(array)} pairs cannot be split evenly over {mesh.size} devices: "
                f"take a multiple of {mesh.size} pairs, or a mesh of fewer devices"
            )
    return tuple(_place(np.asarray(array), _along(mesh, 0)) for array in arrays)


def split(mesh: Mesh, array: jax.Array, axis: int) -> jax.Array:
    """The array, split over the devices along an axis; within jit too."""
    return jax.lax.with_sharding_constraint(array, _along(mesh, axis % array.ndim))


def split_batch(mesh: Mesh, coupled: CoupledDenoiser) -> CoupledDenoiser:
    """The same denoiser, with its batch split over the devices. `run_pairs` reshapes pairs and couplings into one
    batch, and the compiler cannot follow through that reshape how the pairs were split."""

    def split_coupled(gate: jax.Array) -> Denoiser:
        denoiser = coupled(split(mesh, gate, -3))
        return lambda x, step, labels: denoiser(split(mesh, x, -4), step, split(mesh, labels, 0))

    return split_coupled


def gather(tree: Any) -> Any:
    """The tree with whole NumPy arrays, in every process. All processes must call it."""

    def whole(array):
        if isinstance(array, jax.Array) and not array.is_fully_addressable:
            return multihost_utils.process_allgather(array, tiled=True)
        return np.asarray(array)

    return jax.tree.map(whole, tree)


def _split_axis(shape: tuple[int, ...], count: int, stacked: bool) -> int | None:
    axes = [axis for axis, size in enumerate(shape) if size % count == 0]
    if not axes or np.prod(shape) < SMALL:
        return None
    return max(axes, key=lambda axis: (not (stacked and axis == 0), shape[axis]))


def _along(mesh: Mesh, axis: int | None = None) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, AXIS))


def _place(host: np.ndarray, sharding: NamedSharding) -> jax.Array:
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
