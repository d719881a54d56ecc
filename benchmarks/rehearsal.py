"""A whole use of an official-sized network with random weights: ``python benchmarks/rehearsal.py --help``.

Writes a random checkpoint in the official form, converts it, describes it and runs studies on it, each in a process of
its own. Prints what each run said of its cost beforehand, and the time and the peak resident memory that it took.
"""

import math
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

FORMS = {"DiT": ["--prediction", "epsilon"], "SiT": ["--prediction", "velocity", "--path", "linear"]}
STUDIES = {
    "compare": ["--couplings", "0", "1", "--pairs", "2", "--gain-pairs", "2", "--untrained-pairs", "2"],
    "depth": ["--couplings", "0", "1", "--pairs", "2", "--untrained-pairs", "2", "--probe-pairs", "0"],
}


@dataclass(frozen=True)
class Settings:
    """Rehearse conversion and studies at an official size."""

    size: str = "DiT-XL/2"  # official variant whose shapes the checkpoint has
    steps: int = 4  # sampler steps of the studies
    forms: tuple[str, ...] = tuple(FORMS)
    studies: tuple[str, ...] = tuple(STUDIES)
    folder: Path | None = None  # for the files, some 9 GB for XL/2; a temporary one by default


def run(name: str, command: list[str], weights: float) -> None:
    """Runs a command, and prints its time, its peak memory, and that in units of the weights."""
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *command], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    peak = used.ru_maxrss * 1024
    print(f"{name:<14} {time.perf_counter() - started:>8.1f} {peak / 1e9:>8.2f} {peak / weights:>8.2f}", flush=True)
    for line in said.splitlines():
        if line.startswith("syncgap") or status:
            print(f"    {line.strip()}", flush=True)
    if status:
        sys.exit(f"{name} ended with status {os.waitstatus_to_exitcode(status)}")


def main(settings: Settings) -> None:
    from dit_jax.config import variant
    from dit_jax.weights import source_shapes

    weights = 4.0 * sum(math.prod(shape) for shape in source_shapes(variant(settings.size)).values())
    with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
        source = Path(temporary) / "checkpoint.pt"
        print(f"# {settings.size}, {weights / 1e9:.2f} GB of weights, {settings.steps} steps")
        print(f"{'task':<14} {'seconds':>8} {'peak GB':>8} {'/ weights':>9}")
        here = str(Path(__file__).with_name("weights.py"))
        run("write", [here, "--size", settings.size, "--folder", temporary, "--task", "write"], weights)
        for form in settings.forms:
            model, cli = f"{temporary}/{form}", ["-m", "experiments"]
            size = ["--input-size", "32"]  # random numbers in the place of the position embedding do not tell it
            run(f"{form} convert", [*cli, "convert", str(source), model, *FORMS[form], *size], weights)
            run(f"{form} info", [*cli, "info", model], weights)
            for study in settings.studies:
                options = ["--weights", model, "--steps", str(settings.steps), "--out", f"{temporary}/{form}-{study}"]
                run(f"{form} {study}", [*cli, study, *options, *STUDIES[study]], weights)


if __name__ == "__main__":
    main(tyro.cli(Settings))
