"""A sweep of many cells of a tiny network whose workers are killed: ``python benchmarks/sweeps.py --help``.

Prints what a cell takes, what lies between two cells, the memory of the workers, and whether anything was lost.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro


@dataclass(frozen=True)
class Settings:
    """Run a sweep of compare on a tiny network."""

    cells: int = 100
    workers: int = 2
    kill_every: float = 0.0  # seconds between two kills of a random worker on average, of several; none by default
    seed: int = 0  # of the kills
    folder: Path | None = None  # for the files; a temporary one by default

    def __post_init__(self) -> None:
        if self.workers == 1 and self.kill_every:
            raise ValueError("one worker is the command itself, which nobody starts again; give --workers 2 or more")


FIXED = ("pairs=4", "untrained_pairs=2", "gain_pairs=2", "steps=8", "couplings=0 0.5 1")


def main(settings: Settings) -> None:
    from dit_jax.checkpoint import save_model
    from dit_jax.config import DiTConfig
    from experiments.frame.subject import untrained_model
    from experiments.sweeps.folder import SweepFolder

    with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
        weights, out = Path(temporary) / "tiny", Path(temporary) / "sweep"
        config = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3)
        save_model(untrained_model(config, 5), weights, extra={"data": None})
        seeds = ",".join(map(str, range(settings.cells)))
        command = [sys.executable, "-m", "experiments", "sweep", "--study", "compare", "--set", f"weights={weights}"]
        command += [*FIXED, f"seed={seeds}", "--out", str(out), "--workers", str(settings.workers), "--quiet"]
        started, kills, memory = time.perf_counter(), 0, []
        process, moments = subprocess.Popen(command), random.Random(settings.seed)
        while process.poll() is None:
            time.sleep(moments.expovariate(1 / settings.kill_every) if settings.kill_every else 2.0)
            found = workers_of(process.pid) if settings.workers > 1 else [process.pid]  # which runs the cells itself
            memory += [size for each in found if (size := resident(each))]
            if settings.kill_every and found:
                os.kill(moments.choice(found), signal.SIGKILL)
                kills += 1
        wall = time.perf_counter() - started
        sweep = SweepFolder.open(out)
        lines = [line.split() for line in (out / "sweep.log").read_text().splitlines()]
        own = np.array([float(line[3]) for line in lines])
        print(f"{settings.cells} cells, {settings.workers} workers, {kills} kills: {dict(sweep.states())}")
        print(f"wall {wall:.0f} s; a cell's own run {np.median(own):.2f} s (median), {own.sum():.0f} s in all")
        print(f"memory of a worker at most {max(memory) / 1e6:.0f} MB, at the end {np.mean(memory[-4:]) / 1e6:.0f} MB")
        if settings.workers == 1 and not kills:
            begun, ended = (np.array(times) for times in zip(*map(span, lines), strict=True))
            print(f"between two cells {1e3 * np.median(begun[1:] - ended[:-1]):.0f} ms (median)")
        print("result " + ("there" if (out / "result.zarr").exists() else "missing"))


def span(line: list[str]) -> tuple[float, float]:
    """When a cell began and ended, by its line of the log."""
    from datetime import datetime

    ended = datetime.fromisoformat(line[0]).timestamp()
    return ended - float(line[3]), ended


def workers_of(parent: int) -> list[int]:
    """The worker processes of a sweep, by Linux's table of processes. A sweep starts others, too, which end soon."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = entry.read_text().rpartition(")")[2].split()
            is_worker = "work" in entry.with_name("cmdline").read_text().split("\0")
        except OSError:  # it has ended
            continue
        if int(fields[1]) == parent and is_worker:
            found.append(int(entry.parent.name))
    return found


def resident(process: int) -> float:
    """Memory of a process, bytes; 0 if it has ended."""
    try:
        return 1024.0 * int(Path(f"/proc/{process}/status").read_text().split("VmRSS:")[1].split()[0])
    except (OSError, IndexError):
        return 0.0


if __name__ == "__main__":
    main(tyro.cli(Settings))
