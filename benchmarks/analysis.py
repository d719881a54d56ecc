"""Time and memory of what follows the sampling: ``python benchmarks/analysis.py --help``.

Synthetic runs of `compare` are stored, then analysed as ``syncgap report`` does it. Each is made in one process and
analysed in another, so that the peak of resident memory is that of the analysis alone.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

SIZES = ("16,200,50", "64,10,1000", "64,10,50", "256,10,50", "1000,10,50", "10000,10,50")


@dataclass(frozen=True)
class Settings:
    """Analysis and page of runs of several sizes: seconds, and the peak of memory beyond imports and data."""

    sizes: tuple[str, ...] = SIZES  # pairs,couplings,steps of each run
    make: str | None = None  # store one run of this size in `run`, in this process, and print its bytes
    run: Path | None = None  # analyse this one run, in this process, and print what it took as JSON


def make_run(folder: Path, pairs: int, couplings: int, steps: int) -> int:
    """Stores what a run of `compare` measures, with energies of a Gaussian law under ideal coupling and with random
    numbers on top of them, and returns the bytes of its arrays in memory."""
    from xarray import Dataset

    from dit_jax.config import DiTConfig
    from experiments.frame.store import RunFolder
    from experiments.studies.compare.measure import NETWORK
    from experiments.studies.compare.settings import CompareConfig
    from ou_theory.clock import make_clock
    from ou_theory.modes import radial_bands

    clock, bands = make_clock(steps), radial_bands(16, 16, 6)
    grid = np.linspace(0, 1, couplings)
    few = grid[np.unique([0, couplings // 2, couplings - 1])]
    config = CompareConfig(couplings=tuple(grid), pairs=pairs, steps=str(steps))
    model = DiTConfig(
        input_size=16,
        patch_size=2,
        in_channels=3,
        hidden_size=96,
        depth=12,
        num_heads=6,
        num_classes=10,
        prediction="v",
    )
    settings = {"couplings": list(config.couplings), "pairs": pairs, "steps": config.steps, "classes": [0]}
    run = RunFolder.create(
        folder, settings, extra={"kind": "compare", "subject": "synthetic", "model": model.to_dict()}
    )
    variance = np.geomspace(30, 0.05, len(bands)).astype(np.float32)
    signal = variance * np.exp(clock.log_snr)[:, None].astype(np.float32)
    sizes = {"pair": pairs, "coupling": couplings, "step": steps, "band": len(bands), "parity": 2}
    sizes |= {"row": 16, "column": 16}
    rng = np.random.default_rng(0)
    stored = 0

    def dataset(couplings, index):
        rho = ((1 - couplings) / (1 + couplings)).astype(np.float32)
        energy = variance * (rho[:, None, None] * signal / (1 + signal)) ** 2  # (C, K, B)
        shapes = {**sizes, "pair": len(index), "coupling": len(couplings)}
        data = {}
        for name, (dims, *_) in NETWORK.items():
            mean = energy[0] if "coupling" not in dims else energy[:, None]
            mean = mean[..., None] if "parity" in dims else mean[..., bands.index] if "row" in dims else mean
            shape = [shapes[dim] for dim in dims]
            data[name] = (dims, mean * rng.gamma(8, 1 / 8, shape).astype(np.float32))
            if "row" in dims:  # stored of these pairs alone
                data[name][1][index >= config.gain_pairs] = np.nan
        coords = {"coupling": couplings, "pair": index, "step": np.arange(steps), "ell": ("step", clock.log_snr)}
        coords |= {"timestep": ("step", clock.timesteps), "band": np.arange(len(bands))}
        coords |= {"radius": ("band", bands.radius), "count": ("band", bands.count), "parity": ["common", "difference"]}
        return Dataset(data, coords=coords)

    for group, couplings_of, count in (("network", grid, pairs), ("untrained", few, min(16, pairs))):
        block = 64
        template = (
            dataset(couplings_of, np.arange(1)).isel(pair=np.zeros(count, int)).assign_coords(pair=np.arange(count))
        )
        stored += template.nbytes
        run.declare(group, template, chunk=block)
        for first in range(0, count, block):
            run.write(group, dataset(couplings_of, np.arange(first, min(first + block, count))), first)
    exact = dataset(grid, np.arange(pairs)).drop_vars("one_pass_energy").assign(variance=("band", variance))
    stored += exact.nbytes
    run.put("wiener", exact)
    image = np.zeros((2, 2, 2, 16, 16, 3), np.uint8)
    names = ("coupling", "pair", "replica", "y", "x", "rgb")
    run.put(
        "pictures", Dataset({"image": (names, image)}, {"coupling": grid[[0, -1]], "label_name": ("pair", ["a", "b"])})
    )
    return stored


def peak() -> float:
    """The largest resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(folder: Path) -> dict[str, float]:
    """Time of the analysis and of the whole report of a run, and memory."""
    import jax

    from experiments.frame.measured import Measured
    from experiments.frame.store import RunFolder
    from experiments.frame.study import report
    from experiments.studies.compare.study import STUDY

    jax.devices()
    imports = peak()
    run = RunFolder.open(folder, writable=True)
    took: list[float] = []

    def analyse(measured: Measured) -> Any:
        started = time.perf_counter()
        found = STUDY.analyse(measured)
        took.append(time.perf_counter() - started)
        return found

    started = time.perf_counter()
    report(dataclasses.replace(STUDY, analyse=analyse), run)
    whole = time.perf_counter() - started
    return {"analysis": took[0], "report": whole, "imports": imports, "peak": peak()}


def main(settings: Settings) -> None:
    if settings.run is not None and settings.make is not None:
        print(make_run(settings.run, *map(int, settings.make.split(","))))
        return
    if settings.run is not None:
        print(json.dumps(measure(settings.run)))
        return
    print(f"{'pairs':>6} {'couplings':>9} {'steps':>5} {'analysis s':>10} {'ns each':>8} {'report s':>8}"
          f" {'imports MB':>10} {'data MB':>8} {'peak MB':>8} {'beyond MB':>9}")  # fmt: skip
    for size in settings.sizes:
        pairs, couplings, steps = map(int, size.split(","))
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--run", f"{folder}/run"]
            made = subprocess.run([*command, "--make", size], capture_output=True, text=True, check=True)
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{pairs:>6} {couplings:>9} {steps:>5} {done.stderr.strip().splitlines()[-1]}", flush=True)
            continue
        data = int(made.stdout) / 2**20
        found = json.loads(done.stdout)
        each = 1e9 * found["analysis"] / (pairs * couplings * steps)
        beyond = found["peak"] - found["imports"] - data
        print(f"{pairs:>6} {couplings:>9} {steps:>5} {found['analysis']:>10.1f} {each:>8.0f} {found['report']:>8.1f}"
              f" {found['imports']:>10.0f} {data:>8.0f} {found['peak']:>8.0f} {beyond:>9.0f}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(tyro.cli(Settings))
