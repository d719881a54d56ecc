"""What every stage of ``benchmarks/gpu.py`` is given: its time, its folder, its device; how runs are timed."""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dit_jax.config import DiTConfig, variant
from dit_jax.model import DiT, position_embedding
from ou_theory.keys import random_key


@dataclass
class Box:
    """A stage's share of the run."""

    out: Path
    stage: str
    seconds: float
    rehearse: bool
    images: Path
    networks: tuple[str, ...] = ()
    started: float = field(default_factory=time.monotonic)

    def left(self) -> float:
        """Seconds of the budget that are left. A rehearsal goes through everything."""
        return 1e9 if self.rehearse else self.seconds - (time.monotonic() - self.started)

    def row(self, **entries: Any) -> None:
        """Keeps one row of results, on disk at once, and prints it."""
        line = json.dumps(entries)
        with (self.out / f"{self.stage}.jsonl").open("a") as file:
            file.write(line + "\n")
        print(f"{time.monotonic() - self.started:6.1f} s  {line}", flush=True)

    def rows_of(self, stage: str) -> list[dict]:
        path = self.out / f"{stage}.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def config(self, name: str, dtype: str = "bfloat16") -> DiTConfig:
        """The official variant, or in a rehearsal a tiny one of the same form."""
        tiny = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 2, "num_classes": 10}
        return variant(name, dtype=dtype, **(tiny if self.rehearse else {}))

    def peak(self) -> float:
        """The measured bfloat16 matrix-product rate, FLOP/s; NaN if it was not measured."""
        return max((row["flops"] for row in self.rows_of("here") if row.get("what") == "matmul"), default=float("nan"))


def random_model(config: DiTConfig, seed: int = 0) -> DiT:
    """A DiT with small random weights everywhere, in the config's dtype, drawn on the device."""
    graph, params, constants = nnx.split(nnx.eval_shape(lambda: DiT(config, nnx.Rngs(random_key(0)))), nnx.Param, ...)
    leaves, tree = jax.tree.flatten(params)
    dtype = jnp.dtype(config.dtype)

    @jax.jit
    def draw(key):
        keys = [jax.random.fold_in(key, i) for i in range(len(leaves))]
        return [0.02 * jax.random.normal(k, leaf.shape, dtype) for k, leaf in zip(keys, leaves, strict=True)]

    drawn = jax.tree.unflatten(tree, draw(random_key(seed)))
    positions = position_embedding(config.input_size // config.patch_size, config.hidden_size)
    fixed = jax.tree.map(lambda leaf: jnp.asarray(positions, leaf.dtype), constants)  # there are no other constants
    return nnx.merge(graph, drawn, fixed)


def seconds_of(runs: dict[str, Callable[[], Any]], budget: float, least: int = 5) -> dict[str, list[float]]:
    """Seconds of runs that wait for their results, taken in turns after two of each to warm up."""
    for run in runs.values():
        run()
        run()
    times: dict[str, list[float]] = {name: [] for name in runs}
    end = time.monotonic() + budget
    while len(next(iter(times.values()))) < least or (time.monotonic() < end and len(next(iter(times.values()))) < 30):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return times


def median(times: list[float]) -> float:
    return statistics.median(times)


def markdown(header: list[str], rows: list[list[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *[[str(cell) for cell in row] for row in rows]]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
