"""Worker processes on this machine: started, watched, and started again if they are killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from dit_jax.lock import last_owner
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.plan import Cell
from experiments.sweeps.shares import Shard

TERMINATED = 128 + signal.SIGTERM  # exit code of a worker that was asked to end
TRIES = 3  # deaths of the processes that run a cell, without a block more, after which it counts as failed
ANYWHERE = ""  # in the place of a cell's name: deaths outside of a cell, as far as can be told
_ASK = "import jax, json; d = jax.local_devices(); print(json.dumps([d[0].platform, len(d)]))"


class WorkerError(ValueError):
    """A worker process that ended with an error of the sweep, not of a cell, or that cannot be kept alive."""


def gpus() -> int:
    """GPUs of this machine that JAX sees; 0 on CPUs and TPUs. Asked in another process, for this one would take their
    memory from the workers."""
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    try:
        platform, count = json.loads(asked.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return 0
    return count if platform == "gpu" else 0


def visible(gpus: int) -> list[str]:
    """The devices that worker processes can be given, as CUDA_VISIBLE_DEVICES names them: those of this process's own
    environment, where a scheduler says which they are, and otherwise the first `gpus` of the machine."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return [device for device in given.split(",") if device] if given else [str(index) for index in range(gpus)]


@dataclass
class _Worker:
    """A process and the cells of its share."""

    sweep: SweepFolder
    shard: Shard
    cells: list[Cell]
    environment: Mapping[str, str]
    log: IO[str]
    options: Sequence[str]
    deaths: dict[str, tuple[object, int]] = field(default_factory=dict)  # cell -> where it was, deaths there
    process: subprocess.Popen = field(init=False)

    def __post_init__(self) -> None:
        self.start()

    def start(self) -> None:
        line = [sys.executable, "-m", "experiments", "sweep", "work", str(self.sweep.path)]
        line += ["--shard", str(self.shard), "--quiet", *self.options]
        self.process = subprocess.Popen(
            line, stdout=self.log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env={**self.environment}
        )

    def is_at_work(self) -> bool:
        """Whether there is more to wait for. A process that was killed, or asked to end by somebody else, is started
        again: a scheduler that ends a job asks every process of it, and ends this one too.

        Raises:
          WorkerError: it ended with an error of its own, or keeps being killed outside of any cell.
        """
        code = self.process.poll()
        if code is None:
            return True
        if code > 0 and code != TERMINATED:
            raise WorkerError(f"worker {self.shard} ended with exit code {code}; {self.log.name} says why")
        if code == 0:
            return False
        self._blame(signal.SIGTERM if code > 0 else -code)
        self.start()
        return True

    def _blame(self, number: int) -> None:
        """Gives up the cell that the process was at, if processes keep dying there, or the worker if it was at none."""
        runs = {cell.name: self.sweep.run(cell) for cell in self.cells}
        cell = next((each for each in self.cells if last_owner(runs[each.name]) == self.process.pid), None)
        name, signal_name = cell.name if cell else ANYWHERE, signal.Signals(number).name
        where = _progress(runs[name]) if cell else list(map(_progress, runs.values()))
        before, count = self.deaths.get(name, (where, 0))
        count = count + 1 if before == where else 1
        self.deaths[name] = (where, count)
        if cell:
            self.deaths.pop(ANYWHERE, None)  # which are counted in a row
        if count < TRIES:
            return
        if cell is None:
            raise WorkerError(
                f"worker {self.shard} was killed ({signal_name}) {count} times outside of a cell, as far as locks say, "
                f"and got no further in between; {self.log.name} may say why; --resume tries it again"
            )
        self.sweep.note_failure(
            cell,
            f"the process that ran it was killed ({signal_name}) {count} times without getting further; a process that "
            "needs more memory than there is ends like this: give a smaller block",
        )


def _progress(run: Path) -> object:
    """How far a run is: its finished blocks."""
    try:
        manifest = json.loads((run / "manifest.json").read_text("utf-8"))
        return {**manifest["blocks"], "timings": sorted(manifest["timings"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def run_processes(
    sweep: SweepFolder,
    shares: Mapping[Shard, list[Cell]],
    *,
    devices: Sequence[str] = (),
    figures: bool = False,
    poll_s: float = 0.5,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Runs shares in a process each, and waits for them. What that of share i prints is in ``logs/worker-I.log``.

    Args:
      devices: GPUs, of which every process sees one alone, in turn; without any it sees what this process does.
      figures: draw the figures of every cell.
      watch: called every `poll_s` seconds.

    Raises:
      WorkerError: a worker ended with an error that is not one of a cell; the others are ended.
    """
    (sweep.path / "logs").mkdir(exist_ok=True)
    with ExitStack() as stack:
        workers: list[_Worker] = []
        stack.callback(_end, workers)
        for place, (shard, cells) in enumerate(shares.items()):
            log = stack.enter_context((sweep.path / "logs" / f"worker-{shard.index}.log").open("a"))
            environment = {**os.environ}
            if devices:
                environment["CUDA_VISIBLE_DEVICES"] = devices[place % len(devices)]
            options = ("--figures",) if figures else ()
            workers.append(_Worker(sweep, shard, cells, environment, log, options))
        while sum(worker.is_at_work() for worker in workers):  # each is asked
            watch()
            time.sleep(poll_s)
        watch()


def _end(workers: Sequence[_Worker]) -> None:
    """Ends processes as a scheduler would, and waits until they are gone."""
    there = [worker.process for worker in workers if worker.process.poll() is None]
    for process in there:
        process.terminate()
    for process in there:
        try:
            process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
