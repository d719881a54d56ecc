"""A study without a network for tests of sweeps, and two processes that work on a sweep of it, of which one is killed
again and again: ``python square_study.py SWEEP KILLS``."""

import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from experiments import studies
from experiments.frame.page import Page, Section
from experiments.frame.study import Study
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.worker import work


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
    if (told := Path("/proc/self/statm")).exists():  # pages in memory, under Linux
        size = int(told.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        _add(diary.with_name("memory"), f"{os.getpid()} {size}")


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


class Worker:
    """A process that works on all cells of a sweep; a copy of this one, which has imported all that it needs."""

    def __init__(self, sweep):
        self.process = os.fork()
        if not self.process:
            work(sweep, sweep.cells)
            os._exit(0)

    def is_at_a_cell(self, diary: Path) -> bool:
        """Waits until it has begun one; False if it ended before."""
        while not (diary.exists() and any(line.endswith(f" {self.process}\n") for line in diary.open())):
            if os.waitid(os.P_PID, self.process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None:
                return False
            time.sleep(0.01)
        return True

    def kill(self):
        os.kill(self.process, signal.SIGKILL)
        os.waitpid(self.process, 0)

    def exit_code(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.process, 0)[1])


def main(path: str, kills: int) -> list[int]:
    """Exit codes of the two processes that were left in the end."""
    sweep, moments = SweepFolder.open(path), random.Random(0)
    workers = [Worker(sweep), Worker(sweep)]
    for _ in range(kills):
        victim = moments.randrange(2)
        if workers[victim].is_at_a_cell(sweep.path / "diary"):
            time.sleep(moments.uniform(0, 0.2))
            workers[victim].kill()
            workers[victim] = Worker(sweep)
    return [worker.exit_code() for worker in workers]


if __name__ == "__main__":
    only_study()
    sys.exit(any(main(sys.argv[1], int(sys.argv[2]))))
