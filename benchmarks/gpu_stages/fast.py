"""How fast? Coupled pair steps of DiT-XL/2 in bfloat16 and forward passes of every size, beside PyTorch in turns."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dit_jax.attention import symmetric_gate
from dit_jax.config import DiTConfig
from dit_jax.diffusion import guided_output
from dit_jax.model import DiT
from experiments.frame.cost import flops
from gpu_stages.box import Box, markdown, median, random_model, seconds_of

COUPLING = 0.3


@dataclass(frozen=True)
class Case:
    """One line of the table."""

    size: str
    batch: int  # pairs, or images where there are no replicas
    replicas: int | None = 2
    unstacked: bool = False
    guidance: float = 1.0
    beside: tuple[str, ...] = ()  # what of PyTorch is timed in turns


CASES = (
    Case("DiT-XL/2", 16, beside=("eager", "compiled")),
    Case("DiT-XL/2", 64, beside=("eager", "compiled")),
    Case("DiT-XL/2", 4, beside=("eager", "compiled")),
    Case("DiT-XL/2", 64, replicas=None, beside=("eager", "compiled")),
    Case("DiT-XL/2", 16, guidance=4.0),
    Case("DiT-XL/2", 16, unstacked=True),
    Case("DiT-L/2", 64, replicas=None, beside=("eager",)),
    Case("DiT-B/2", 64, replicas=None, beside=("eager",)),
    Case("DiT-S/2", 64, replicas=None, beside=("eager",)),
)
REHEARSED = (*CASES[4:6], CASES[-1])  # one of each kind: in tiny all sizes are alike


def inputs(config: DiTConfig, case: Case) -> list[np.ndarray]:
    lead = (case.batch,) if case.replicas is None else (case.replicas, case.batch)
    shape = (*lead, config.input_size, config.input_size, config.in_channels)
    x = np.random.default_rng(1).standard_normal(shape, np.float32)
    y = np.arange(case.batch) % config.num_classes
    gate = [] if case.replicas is None else [np.tile(symmetric_gate(np.float32(COUPLING)), (case.batch, 1, 1))]
    return [x, np.full(case.batch, 500), y, *gate]


def ours(model: DiT, case: Case) -> tuple[Callable[[], Any], dict]:
    """The run, and what compiling it took and planned."""

    def call(model, x, t, y, gate=None):
        if case.guidance == 1:
            return model(x, t, y, gate)
        return guided_output(model, x, t, y, gate, scale=case.guidance)

    given = [jnp.asarray(value) for value in inputs(model.config, case)]
    began = time.perf_counter()
    compiled = jax.jit(call).lower(model, *given).compile()
    memory = compiled.memory_analysis()
    planned: dict[str, Any] = {"compile_s": round(time.perf_counter() - began, 1)}
    planned["temp_bytes"] = getattr(memory, "temp_size_in_bytes", None)
    planned["argument_bytes"] = getattr(memory, "argument_size_in_bytes", None)
    return lambda: jax.block_until_ready(compiled(model, *given)), planned


class Torch:
    """The same network in PyTorch, in bfloat16 with scaled_dot_product_attention."""

    def __init__(self, model: DiT):
        import torch

        from dit_jax.torch_reference import TorchDiT
        from dit_jax.weights import state_dict

        self.torch, self.device = torch, "cuda" if torch.cuda.is_available() else "cpu"
        weights = {
            ".".join(map(str, path)): np.asarray(v[...], np.float32) for path, v in nnx.to_flat_state(nnx.state(model))
        }
        with torch.device("meta"):
            network = TorchDiT(model.config)
        entries = {k: torch.from_numpy(a).to(self.device, torch.bfloat16) for k, a in state_dict(model.config, weights)}
        network.load_state_dict(entries, assign=True)
        self.networks = {"eager": network.eval()}

    def compiled(self) -> None:
        """Adds the network with each block compiled: the blocks are alike, so one compilation serves all."""
        import copy

        network = copy.copy(self.networks["eager"])
        network._modules = dict(network._modules)
        network.blocks = self.torch.nn.ModuleList(
            self.torch.compile(block, dynamic=False) for block in self.networks["eager"].blocks
        )
        self.networks["compiled"] = network

    def run(self, which: str, config: DiTConfig, case: Case) -> Callable[[], Any]:
        torch, network = self.torch, self.networks[which]
        x, t, y, *gate = inputs(config, case)
        image = torch.tensor(np.moveaxis(x, -1, -3)).to(self.device, torch.bfloat16)
        rest = [torch.tensor(value).to(self.device) for value in (t, y, *gate)]

        def run_it():
            with torch.inference_mode():
                network(image, *rest)
                if self.device == "cuda":
                    torch.cuda.synchronize()

        return run_it


def run(box: Box) -> None:
    peak, size = box.peak(), None
    model = theirs = None
    for case in REHEARSED if box.rehearse else CASES:
        if box.left() < 12:
            box.row(size=case.size, batch=case.batch, replicas=case.replicas, skipped="no time left")
            continue
        if case.size != size:
            model = theirs = None  # frees the last one first
            size, model = case.size, random_model(box.config(case.size))
        assert model is not None
        subject = model.unstacked() if case.unstacked else model
        runs: dict[str, Callable[[], Any]] = {}
        runs["jax"], planned = ours(subject, case)
        problems = {}
        if case.beside:
            try:
                theirs = theirs or Torch(model)
                if "compiled" in case.beside and "compiled" not in theirs.networks and theirs.device == "cuda":
                    theirs.compiled()
                for which in [which for which in case.beside if which in theirs.networks]:
                    began = time.perf_counter()
                    runs[f"torch {which}"] = theirs.run(which, model.config, case)
                    runs[f"torch {which}"]()
                    planned[f"first_{which}_s"] = round(time.perf_counter() - began, 1)
            except Exception as error:  # PyTorch is for comparison: without it, or out of its memory, we go on
                problems["torch_failed"] = f"{type(error).__name__}: {error}"[:300]
                runs = {"jax": runs["jax"]}
        times = seconds_of(runs, 0.1 if box.rehearse else 2.5)
        work = flops(model.config, case.batch, case.replicas or 1) * (2 if case.guidance != 1 else 1)
        stats = jax.devices()[0].memory_stats() or {}
        box.row(
            size=case.size,
            batch=case.batch,
            replicas=case.replicas,
            unstacked=case.unstacked,
            guidance=case.guidance,
            seconds={name: median(found) for name, found in times.items()},
            ratios={name: spread(found, times["jax"]) for name, found in times.items() if name != "jax"},
            turns=len(times["jax"]),
            flops_per_s=work / median(times["jax"]),
            share=work / median(times["jax"]) / peak,
            peak_bytes=stats.get("peak_bytes_in_use"),
            **planned,
            **problems,
        )
        del subject


def spread(theirs: list[float], ours: list[float]) -> list[float]:
    """Lowest and highest ratio of the turns."""
    ratios = [a / b for a, b in zip(theirs, ours, strict=True)]
    return [min(ratios), max(ratios)]


def table(rows: list[dict]) -> str:
    header = [
        "size",
        "batch",
        "ms",
        "TFLOP/s",
        "share of peak",
        "images/s",
        "torch eager / jax",
        "torch compiled / jax",
    ]
    header += ["compile s", "memory GB"]
    shown = []
    for row in rows:
        if "skipped" in row:
            continue
        ms = row["seconds"]["jax"]
        notes = ", guidance" * (row["guidance"] != 1) + ", unstacked" * row["unstacked"]
        what = f"{row['batch']} {'pairs' if row['replicas'] else 'images'}{notes}"
        ratios = []
        for which in ("torch eager", "torch compiled"):
            if which in row["ratios"]:
                low, high = row["ratios"][which]
                ratios.append(f"{row['seconds'][which] / ms:.2f} [{low:.2f}, {high:.2f}]")
            else:
                ratios.append("")
        images = row["batch"] * (row["replicas"] or 1) * (2 if row["guidance"] != 1 else 1)
        memory = ((row["temp_bytes"] or 0) + (row["argument_bytes"] or 0)) / 1e9
        numbers = [f"{1e3 * ms:.2f}", f"{row['flops_per_s'] / 1e12:.0f}", f"{row['share']:.0%}", f"{images / ms:.0f}"]
        shown.append([row["size"], what, *numbers, *ratios, row["compile_s"], f"{memory:.2f}"])
    return markdown(header, shown)
