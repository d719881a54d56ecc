"""One process of an ensemble on several devices: ``sharded_run.py OUT CASES [ADDRESS PROCESSES PROCESS]``.

Runs the cases, each "<devices> <parameters> <sampler>", and writes their samples and how things lay as an npz file.
"""

import sys
from typing import Any

import jax
import numpy as np
from flax import nnx
from models import random_model

from dit_jax.config import DiTConfig
from dit_jax.diffusion import network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import pair_labels, run_pairs
from dit_jax.sharding import SplitParam, gather, make_mesh, place_model, place_pairs, split, split_batch
from ou_theory.clock import make_clock

CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4)
CLOCK = make_clock(5)
PAIRS = np.arange(8)
LABELS = pair_labels(PAIRS, range(4))
COUPLINGS = np.array([0, 0.3, 0.8], np.float32)


def variables(model: DiT) -> list[nnx.Variable]:
    return jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, nnx.Variable))


def run_case(devices: int, parameters: Any, sampler: Any) -> dict[str, np.ndarray]:
    mesh = make_mesh(jax.devices()[:devices])
    model = place_model(random_model(CONFIG, 0.15), mesh, parameters)
    pairs, labels = place_pairs(mesh, PAIRS, LABELS)

    @jax.jit
    def sampled(model, couplings, pairs, labels):
        coupled = split_batch(mesh, lambda gate: network_denoiser(model, CLOCK, gate))
        shape = (CONFIG.input_size, CONFIG.input_size, CONFIG.in_channels)
        samples, means = run_pairs(
            coupled,
            CLOCK,
            couplings,
            pairs,
            labels,
            shape,
            seed=3,
            sampler=sampler,
            observe=lambda step, x, denoised: denoised.mean((0, 3, 4, 5)),
        )
        return split(mesh, samples, 2), means

    compiled = sampled.lower(model, COUPLINGS, pairs, labels).compile()
    samples, means = compiled(model, COUPLINGS, pairs, labels)
    arrays = [variable.get_raw_value() for variable in variables(model)]
    is_split = [isinstance(variable, SplitParam) for variable in variables(model)]
    part = [array.addressable_shards[0].data.size / array.size for array in arrays]
    whole = gather({"samples": samples, "means": means})
    program = compiled.as_text()
    assert program
    flops = (compiled.cost_analysis() or {})["flops"]
    return {
        **whole,
        "sample_shards": np.array([shard.data.shape for shard in samples.addressable_shards]),
        "part_if_split": np.array([p for p, s in zip(part, is_split, strict=True) if s]),
        "part_if_whole": np.array([p for p, s in zip(part, is_split, strict=True) if not s]),
        "flops": np.array(flops),  # of one device, loops counted once
        "all_reduces": np.array(program.count(" all-reduce")),
    }


def main(out: str, cases: str, address: str = "", processes: str = "1", process: str = "0") -> None:
    if address:
        jax.distributed.initialize(
            address, int(processes), int(process), initialization_timeout=30, coordinator_bind_address=address
        )
    results = {}
    for case in cases.split(","):
        devices, parameters, sampler = case.split()
        for name, value in run_case(int(devices), parameters, sampler).items():
            results[f"{case}/{name}"] = value
    np.savez(out, **results)


if __name__ == "__main__":
    main(*sys.argv[1:])
