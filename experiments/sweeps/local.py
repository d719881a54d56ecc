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
_ASK = "import jax, json; d = jax.local_devices(); print(json.dumps([d[0].platform, len(d)]))"


class WorkerError(RuntimeError):
    """A worker process that ended by itself with an error of the sweep, not of a cell."""


def gpus() -> int:
    """GPUs of this machine that JAX sees; 0 on CPUs and TPUs. Asked in another process, for this one would take their
    memory from the workers."""
    asked = subprocess.run([sys.executable, "-c", _ASK], capture_output=True, text=True, check=False)
    try:
        platform, count = json.loads(asked.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        return 0
    return count if platform == "gpu" else 0


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
          WorkerError: it ended with an error of its own.
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
        """Gives up the cell that the process was at, if processes keep dying there."""
        cell = next((each for each in self.cells if last_owner(self.sweep.run(each)) == self.process.pid), None)
        if cell is None:
            return
        where = _progress(self.sweep.run(cell))
        before, count = self.deaths.get(cell.name, (where, 0))
        count = count + 1 if before == where else 1
        self.deaths[cell.name] = (where, count)
        if count >= TRIES:
            name = signal.Signals(number).name
            self.sweep.note_failure(
                cell,
                f"the process that ran it was killed ({name}) {count} times without getting further; a process that "
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
    one_gpu_each: bool,
    figures: bool = False,
    poll_s: float = 0.5,
    watch: Callable[[], None] = lambda: None,
) -> None:
    """Runs shares in a process each, and waits for them. What that of share i prints is in ``logs/worker-I.log``.

    Args:
      one_gpu_each: let every process see one GPU alone.
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
            if one_gpu_each:
                visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
                environment["CUDA_VISIBLE_DEVICES"] = visible[place] if len(visible) > place else str(place)
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
