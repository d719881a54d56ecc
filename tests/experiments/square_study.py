"""A study without a network for tests of sweeps, and a process that works on a sweep of it:
``python square_study.py SWEEP``."""

import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from experiments import studies
from experiments.frame.page import Page, Section
from experiments.frame.study import Study


@dataclass(frozen=True)
class SquareConfig:
    """How large is a square?"""

    value: float = 0.0
    seed: int = 0
    pause_s: float = 0.0


def measure(bench):
    """Two groups, between which a process can be killed; says in a file beside the cells who is at work."""
    if bench.config.value < 0:
        raise ValueError("no\nroot")
    if bench.config.value > 1000:
        raise ZeroDivisionError("too much")
    diary = bench.run.path.parents[1] / "diary"
    _add(diary, f"begin {bench.run.path.name} {os.getpid()}")
    bench.whole("half", lambda: xr.Dataset({"half": bench.config.value / 2}))
    time.sleep(bench.config.pause_s)
    bench.whole("square", lambda: xr.Dataset({"square": bench.config.value**2}))
    _add(diary, f"end {bench.run.path.name} {os.getpid()}")


def _add(path: Path, line: str) -> None:
    with path.open("a") as file:
        file.write(line + "\n")


def analyse(measured):
    return xr.Dataset({"root": measured.load("square").square ** 0.5})


def page(measured, analysis):
    return Page(Section("Squares", "Is a square positive?", "Yes."), {})


DEFINITIONS = {"half": ("a half", "1"), "square": ("a square", "1"), "root": ("its root", "1")}
STUDY = Study("square", SquareConfig, measure, page, analyse, DEFINITIONS, subject="numbers")


def only_study(setattr=setattr) -> None:
    """Makes it the only study."""
    setattr(studies, "NAMES", ("square",))
    setattr(studies, "find", lambda name: STUDY)
    setattr(studies, "settings_of", lambda name: SquareConfig)


if __name__ == "__main__":
    from experiments.sweeps.folder import SweepFolder
    from experiments.sweeps.worker import work

    only_study()
    sweep = SweepFolder.open(sys.argv[1])
    work(sweep, sweep.cells)
