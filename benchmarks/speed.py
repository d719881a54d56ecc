"""Speed against PyTorch doing the same: ``python benchmarks/speed.py --help``.

Forward pass, pair step (two replicas coupled in every attention layer) and full DDIM sampling of coupled pairs, here
and in this package's own PyTorch DiT (SDPA; compiled too on a GPU). Both run in one process on the same inputs, in
turns, so that whatever else the machine does hits both. Random weights.
"""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # both frameworks on one card

import jax
import jax.numpy as jnp
import numpy as np
import torch
import tyro
from flax import nnx

from dit_jax.attention import symmetric_gate
from dit_jax.config import DiTConfig, variant
from dit_jax.diffusion import network_denoiser, sample
from dit_jax.model import DiT
from dit_jax.torch_reference import TorchDiT
from dit_jax.weights import state_dict
from experiments.frame.cost import flops
from ou_theory.clock import make_clock
from ou_theory.keys import random_key

COUPLING = 0.3
TIMESTEP = 500
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
Task = Literal["forward", "pair", "sample"]
Run = Callable[[], Any]


@dataclass(frozen=True)
class Settings:
    """Speed of JAX against PyTorch, in turns."""

    sizes: tuple[str, ...] = ("DiT-S/2", "DiT-B/2", "DiT-XL/2")
    tasks: tuple[Task, ...] = ("forward", "pair", "sample")
    dtype: Literal["float32", "bfloat16"] = "float32"  # activations, products and parameters
    batch: int = 2  # images, or pairs
    steps: int = 4  # of full sampling
    repeats: int = 7
    unstacked: bool = False  # an array per layer in place of stacked ones and a scan
    growth: bool = False  # also: cost over batch, tokens and replicas, for the first size
    compile_times: bool = False  # also: compile time, scanned and unrolled


def peak(dtype: str) -> dict[str, float]:
    """FLOP/s of a large square matrix product in either framework: the best of ten."""
    n = 8192 if DEVICE == "cuda" else 2048
    a = np.random.default_rng(0).standard_normal((n, n), np.float32)
    ours = jnp.asarray(a, dtype)
    product = jax.jit(
        lambda a: jnp.dot(a, a, preferred_element_type=jnp.float32, precision="highest" if dtype == "float32" else None)
    )
    theirs = torch.tensor(a).to(DEVICE, TORCH_DTYPES[dtype])

    def in_torch() -> None:
        _ = theirs @ theirs
        _wait()

    runs: dict[str, Run] = {"jax": lambda: jax.block_until_ready(product(ours)), "torch": in_torch}
    return {name: 2 * n**3 / min(times) for name, times in in_turns(runs, 10).items()}


def in_turns(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of each run, taken in turns after a warm-up of each."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - started)
    return times


class Pair:
    """The same network twice, and the same inputs."""

    def __init__(self, config: DiTConfig, unstacked: bool):
        self.config = config
        model = DiT(config, nnx.Rngs(random_key(0)))
        params = nnx.state(model, nnx.Param)
        leaves, tree = jax.tree.flatten(params)
        rng = np.random.default_rng(0)
        drawn = [jnp.asarray(0.02 * rng.standard_normal(leaf.shape, np.float32), config.dtype) for leaf in leaves]
        nnx.update(model, jax.tree.unflatten(tree, drawn))
        with torch.device("meta"):
            reference = TorchDiT(config)
        weights = {
            ".".join(map(str, path)): np.asarray(v[...], np.float32) for path, v in nnx.to_flat_state(nnx.state(model))
        }
        dtype = TORCH_DTYPES[config.dtype]
        entries = {key: torch.from_numpy(array).to(DEVICE, dtype) for key, array in state_dict(config, weights)}
        reference.load_state_dict(entries, assign=True)
        self.reference = reference.eval()
        self.model = model.unstacked() if unstacked else model

    def inputs(self, batch: int, replicas: int | None) -> tuple[Any, Any]:
        """Arguments of either network: ``(x, t, y, gate)``; no gate without replicas."""
        c = self.config
        lead = (batch,) if replicas is None else (replicas, batch)
        x = np.random.default_rng(1).standard_normal((*lead, c.input_size, c.input_size, c.in_channels), np.float32)
        t, y = np.full(batch, TIMESTEP), np.arange(batch)
        gate = None if replicas is None else np.tile(symmetric_gate(np.float32(COUPLING), replicas), (batch, 1, 1))
        ours = (jnp.asarray(x), jnp.asarray(t), jnp.asarray(y), None if gate is None else jnp.asarray(gate))
        tensor = torch.tensor(np.moveaxis(x, -1, -3)).to(DEVICE, TORCH_DTYPES[c.dtype])
        theirs = [tensor, *(torch.tensor(v).to(DEVICE) for v in (t, y))]
        return ours, [*theirs, None if gate is None else torch.tensor(gate).to(DEVICE)]


def runs_of(
    pair: Pair, task: Task, batch: int, replicas: int | None, settings: Settings
) -> tuple[dict[str, Run], float]:
    """The runs to time, and the memory that ours takes beside its arguments in bytes."""
    ours, theirs = pair.inputs(batch, replicas)
    clock = make_clock(settings.steps)

    def jax_task(model, x, t, y, gate):
        if task == "sample":
            return sample(network_denoiser(model, clock, gate), x, clock, y)[0]
        return model(x, t, y, gate)

    def torch_task(network):
        return torch_ddim(network, clock, *theirs) if task == "sample" else network(*theirs)

    compiled = jax.jit(jax_task).lower(pair.model, *ours).compile()
    networks: dict[str, Any] = {"torch": pair.reference}
    if DEVICE == "cuda":
        networks["torch.compile"] = torch.compile(pair.reference)

    def in_torch(network) -> Run:
        def run() -> None:
            with torch.inference_mode():
                torch_task(network)
                _wait()

        return run

    runs: dict[str, Run] = {"jax": lambda: jax.block_until_ready(compiled(pair.model, *ours))}
    runs |= {name: in_torch(network) for name, network in networks.items()}
    return runs, getattr(compiled.memory_analysis(), "temp_size_in_bytes", float("nan"))


def torch_ddim(network, clock, x, t, y, gate):
    """Deterministic DDIM with epsilon prediction, as `dit_jax.diffusion` does it."""
    channels = x.shape[-3]
    for k in range(len(clock)):
        now, after = float(clock.alpha_bar[k]), float(clock.alpha_bar_next[k])
        out = network(x, torch.full_like(t, int(clock.timesteps[k])), y, gate)[..., :channels, :, :].float()
        x0 = (x.float() - (1 - now) ** 0.5 * out) / now**0.5
        x = (after**0.5 * x0 + (1 - after) ** 0.5 * out).to(x.dtype)
    return x


def row(name: str, pair: Pair, task: Task, batch: int, replicas: int | None, settings: Settings, best: float) -> None:
    runs, memory = runs_of(pair, task, batch, replicas, settings)
    times = in_turns(runs, settings.repeats)
    median = {who: statistics.median(found) for who, found in times.items()}
    calls = settings.steps if task == "sample" else 1
    work = calls * flops(pair.config, batch, replicas or 1)
    ratios = ""
    for who in sorted(times.keys() - {"jax"}):
        turns = [theirs / ours for theirs, ours in zip(times[who], times["jax"], strict=True)]
        ratios += f"{median[who] / median['jax']:>6.2f} [{min(turns):.2f}, {max(turns):.2f}]  "
    rate = work / median["jax"]
    print(
        f"{name:<26} {task:<8} {1e3 * median['jax']:>9.1f} {1e3 * median['torch']:>9.1f}  {ratios}"
        f"{rate / 1e12:>7.3f} {rate / best:>6.0%} {memory / 1e6:>9.0f}",
        flush=True,
    )


def compile_times(config: DiTConfig, batch: int) -> None:
    """Seconds to trace and compile the forward pass, scanned and with a copy of the block for every layer."""
    shape = jax.ShapeDtypeStruct((batch, config.input_size, config.input_size, config.in_channels), jnp.float32)
    index = jax.ShapeDtypeStruct((batch,), jnp.int32)
    for what in ("scanned", "unstacked"):
        model = nnx.eval_shape(lambda: DiT(config, nnx.Rngs(random_key(0))))
        if what == "unstacked":
            model = nnx.eval_shape(lambda: DiT(config, nnx.Rngs(random_key(0))).unstacked())
        started = time.perf_counter()
        lowered = jax.jit(lambda m, x, t, y: m(x, t, y)).lower(model, shape, index, index)
        traced = time.perf_counter()
        lowered.compile()
        print(
            f"  {what:<9} trace {traced - started:>6.2f} s  compile {time.perf_counter() - traced:>6.2f} s", flush=True
        )


def _wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def main(settings: Settings) -> None:
    best_of = peak(settings.dtype)
    best = max(best_of.values())
    card = jax.devices()[0].device_kind
    print(
        f"# {card}, {os.cpu_count()} cores, torch on {DEVICE} with {torch.get_num_threads()} threads, {settings.dtype}"
    )
    print(
        f"# jax {jax.__version__}, torch {torch.__version__}; batch {settings.batch}, {settings.repeats} turns, medians"
    )
    shown = ", ".join(f"{who} {rate / 1e12:.2f}" for who, rate in best_of.items())
    print(f"# peak of a large matrix product, TFLOP/s: {shown}; shares are of the larger")
    others = "torch / jax" + ("    torch.compile / jax" if DEVICE == "cuda" else "")
    print(f"{'size':<26} {'task':<8} {'jax ms':>9} {'torch ms':>9}  {others:<20}  TFLOP/s  share   temp MB")
    for size in settings.sizes:
        config = variant(size, dtype=settings.dtype)
        pair = Pair(config, settings.unstacked)
        for task in settings.tasks:
            row(size, pair, task, settings.batch, None if task == "forward" else 2, settings, best)
        if settings.compile_times:
            compile_times(config, settings.batch)
    if settings.growth:
        config = variant(settings.sizes[0], dtype=settings.dtype)
        pair = Pair(config, settings.unstacked)
        for batch in (1, 2, 4, 8):
            row(f"{settings.sizes[0]} batch {batch}", pair, "forward", batch, None, settings, best)
        for replicas in (1, 2, 3, 4):
            row(f"{settings.sizes[0]} replicas {replicas}", pair, "pair", settings.batch, replicas, settings, best)
        for patch in (8, 4, 2):
            other = Pair(replace(config, patch_size=patch), settings.unstacked)
            name = f"patch {patch}, {other.config.num_tokens} tokens"
            row(name, other, "pair", settings.batch, 2, settings, best)


if __name__ == "__main__":
    main(tyro.cli(Settings))
