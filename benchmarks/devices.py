"""Speed of an ensemble of pairs over the number of devices: ``python benchmarks/devices.py --help``.

With several accelerators, runs on 1, 2, 4, ... of them. On a CPU, runs itself in processes with 1, 2, 4 and 8 forced
host devices, which share the same cores.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import jax
import numpy as np
import tyro
from flax import nnx

from dit_jax.config import DiTConfig, variant
from dit_jax.diffusion import network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import pair_labels, run_pairs
from dit_jax.sharding import Parameters, gather, make_mesh, place_model, place_pairs, split, split_batch
from ou_theory.clock import make_clock
from ou_theory.keys import random_key

TINY = DiTConfig(input_size=8, in_channels=3, hidden_size=64, depth=4, num_heads=4, num_classes=4)
COUPLING = np.array([0.5], np.float32)
FORCED = (1, 2, 4, 8)
REPEATS = 3


@dataclass(frozen=True)
class Settings:
    """Time per pair and sampler step over the number of devices."""

    size: str = "tiny"  # "tiny" or an official variant, for example DiT-B/2
    pairs: int = 8  # device counts that do not divide it are left out
    steps: int = 10
    parameters: Parameters = "replicated"
    worker: int | None = None  # print only the seconds that a run takes on so many devices

    def __post_init__(self) -> None:
        if self.pairs < 1:
            raise ValueError(f"pairs must be at least 1, got {self.pairs}")


def seconds(settings: Settings, devices: int) -> float:
    """The fastest of `REPEATS` runs of the whole ensemble, after compilation."""
    config = TINY if settings.size == "tiny" else variant(settings.size)
    clock = make_clock(settings.steps)
    mesh = make_mesh(jax.devices()[:devices])
    model = place_model(DiT(config, nnx.Rngs(random_key(0))), mesh, settings.parameters)
    indices = np.arange(settings.pairs)
    pairs, labels = place_pairs(mesh, indices, pair_labels(indices, range(config.num_classes)))

    @jax.jit
    def sampled(model, couplings, pairs, labels):
        coupled = split_batch(mesh, lambda gate: network_denoiser(model, clock, gate))
        shape = (config.input_size, config.input_size, config.in_channels)
        return split(mesh, run_pairs(coupled, clock, couplings, pairs, labels, shape, seed=0)[0], 2)

    def run() -> float:
        started = time.perf_counter()
        gather(sampled(model, COUPLING, pairs, labels))
        return time.perf_counter() - started

    run()
    return min(run() for _ in range(REPEATS))


def seconds_forced(settings: Settings, devices: int) -> float:
    """`seconds` in a process of its own, because the number of host devices is fixed at its start."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    arguments = [f"--{name}={getattr(settings, name)}" for name in ("size", "pairs", "steps", "parameters")]
    done = subprocess.run(
        [sys.executable, __file__, *arguments, f"--worker={devices}"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return float(done.stdout.split()[-1])


def main(settings: Settings) -> None:
    if settings.worker is not None:
        print(seconds(settings, settings.worker))
        return
    forced = jax.default_backend() == "cpu"
    counts = FORCED if forced else [2**i for i in range(jax.device_count().bit_length())]
    what = f"{settings.size}, {settings.pairs} pairs, {settings.steps} steps, parameters {settings.parameters}"
    print(f"# {what}, on {jax.devices()[0].device_kind}")
    if forced:
        print(f"# forced host devices share the same {os.cpu_count()} cores: this shows the overhead of splitting, and")
        print("# how well one device fills the cores, but not the speed-up from more hardware")
    print(f"{'devices':>7}  {'ms per pair step':>16}  {'relative speed':>14}")
    reference = None
    for count in counts:
        if settings.pairs % count:
            continue
        taken = (seconds_forced if forced else seconds)(settings, count)
        reference = reference or taken
        per_step = 1e3 * taken / (settings.pairs * settings.steps)
        print(f"{count:>7}  {per_step:>16.3f}  {reference / taken:>14.2f}", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings))
