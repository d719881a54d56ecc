"""A sweep as a job array of Slurm, through submitit (the extra ``slurm``).

Every task of the array starts worker processes for its shares, as a sweep on one machine does, and watches them. Some
time before its time limit a task is told so: it puts itself back into the queue, and goes on where it was. What a
task's own process prints is in ``logs/JOB_TASK_0_log.out``, what its workers print in ``logs/worker-I.log``; which jobs
there are is in ``slurm.json``.
"""

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from dit_jax.disk import write_json
from experiments.frame.manifest import StoreError, now
from experiments.sweeps.cost import costs, parts
from experiments.sweeps.finish import finish
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.local import gpus, run_processes, visible
from experiments.sweeps.plan import PlanError
from experiments.sweeps.shares import Shard

if TYPE_CHECKING:
    import submitit

MOST_TASKS = 100  # of an array, if --tasks does not say
REQUEUES = 10  # times that a task goes back into the queue at its time limit, if requeues=N does not say
SBATCH = "sbatch."  # before the name of an option of sbatch that submitit does not know
_OURS = ("requeues", "time")
_NOT_OFFERED = ("nodes", "ntasks_per_node", "num_gpus", "additional_parameters", "use_srun", "stderr_to_stdout")
_TIME = re.compile(r"(?:(?P<days>\d+)-)?(?P<parts>\d+(?::\d+){0,2})")
_ENDED = {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT"}
_ENDED |= {"PREEMPTED", "REVOKED", "ended"}
_UNKNOWN = "unknown"  # a task of which nobody says anything
SILENT = "Slurm does not answer here (squeue)"
_FORGOTTEN = "Invalid job id"  # what squeue says of a job that ended some minutes ago


@dataclass(frozen=True)
class Task:
    """What one task of the array does: its shares of the sweep, in a worker process each.

    Attributes:
      folder: of the sweep, absolute.
      index, count: which task it is, of how many.
      workers: processes of a task; if there are several, each sees one GPU alone.
      figures: draw the figures of every cell.
      requeues: how many times it may go back into the queue from now on.
    """

    folder: str
    index: int
    count: int
    workers: int = 1
    figures: bool = False
    requeues: int = REQUEUES

    def __call__(self) -> None:
        """Runs the shares. A task of which cells failed ends with exit code 1, which Slurm shows as FAILED: submitit
        lets SystemExit through, and gives no meaning to what a function returns."""
        jax.config.update("jax_platforms", "cpu")  # devices are left to the workers
        sweep, count = SweepFolder.open(self.folder), self.count * self.workers
        each = parts(sweep.cells, costs(sweep.plan, sweep.cells), count)
        first = self.index * self.workers
        mine = {Shard(i, count): each[i] for i in range(first, first + self.workers)}
        devices = visible(gpus()) if self.workers > 1 else []
        run_processes(sweep, mine, devices=devices, figures=self.figures)
        if code := finish(sweep, [cell for cells in mine.values() for cell in cells]):
            sys.exit(code)

    def checkpoint(self) -> "submitit.helpers.DelayedSubmission":
        """What goes back into the queue; submitit asks for it. Cells go on where they are, so it is the task itself."""
        from submitit.helpers import DelayedSubmission

        if self.requeues == 0:
            sys.exit("this task has been put back into the queue as often as it may (requeues=N)")
        return DelayedSubmission(replace(self, requeues=self.requeues - 1))


def executor_for(sweep: str, folder: Any, options: Sequence[str]) -> "submitit.SlurmExecutor":
    """submitit's executor with the options of a command line.

    Args:
      sweep: name of the job.
      folder: where scripts and logs are to be.
      options: ``KEY=VALUE``: `time`, the limit of a task in minutes or as Slurm writes it; `requeues`; submitit's names
        of Slurm's options (``partition``, ``gpus_per_node``, ``account``, ...); and ``sbatch.KEY=VALUE`` for any other
        option of sbatch.

    Raises:
      PlanError: an unknown option, a value of another form, no time, no submitit, or no Slurm on this machine.
    """
    given = _read(options)
    try:
        import submitit
    except ImportError as error:
        raise PlanError("--slurm needs submitit, which is not installed: pip install 'syncgap[slurm]'") from error
    known = submitit.SlurmExecutor._valid_parameters() - set(_NOT_OFFERED) | set(_OURS)
    own = {name: value for name, value in given.items() if not name.startswith(SBATCH)}
    if unknown := sorted(set(own) - known):
        raise PlanError(
            f"--slurm has no option {', '.join(unknown)}; it has {', '.join(sorted(known))}; any other option of "
            f"sbatch is given as {SBATCH}NAME=VALUE"
        )
    if "time" not in own:
        raise PlanError("--slurm needs the time limit of a task: time=MINUTES, or time=HOURS:MINUTES:SECONDS")
    requeues = own.pop("requeues", REQUEUES)
    if not isinstance(requeues, int) or requeues < 0:
        raise PlanError(f"requeues must be a whole number from 0 on, got {requeues}")
    own["time"] = minutes(str(own["time"]))
    for name, split in (("setup", lambda text: [text]), ("teardown", lambda text: [text]), ("srun_args", shlex.split)):
        if name in own:
            own[name] = split(str(own[name]))
    if "cpus_per_task" in own:  # srun does not take it over from sbatch
        own["srun_args"] = [f"--cpus-per-task={own['cpus_per_task']}", *own.get("srun_args", ())]
    more = {"requeue": True} if requeues else {}  # on some clusters only what says so may go back into the queue
    more |= {name.removeprefix(SBATCH): value for name, value in given.items() if name.startswith(SBATCH)}
    try:
        executor = submitit.SlurmExecutor(folder, max_num_timeout=requeues)
    except RuntimeError as error:
        raise PlanError("this machine has no Slurm (no srun); submit where there is one") from error
    defaults = {"job_name": f"syncgap-{sweep}", "wckey": None, "stderr_to_stdout": True}
    executor.update_parameters(**{**defaults, **own}, additional_parameters=more or None)
    return executor


def workers_of(executor: "submitit.SlurmExecutor") -> int:
    """Worker processes of a task: one for each GPU of ``gpus_per_node``, which may have a kind before it."""
    found = re.fullmatch(r"(?:.*:)?(\d+)", str(executor.parameters.get("gpus_per_node", 1)))
    if found is None or int(found[1]) < 1:
        raise PlanError(f"gpus_per_node must be a number, or KIND:NUMBER, got {executor.parameters['gpus_per_node']}")
    return int(found[1])


def submit(
    sweep: SweepFolder,
    executor: "submitit.Executor",
    tasks: int,
    *,
    workers: int = 1,
    figures: bool = False,
) -> str:
    """Submits the array and returns its job id.

    Raises:
      PlanError: Slurm refuses the job.
    """
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    requeues = getattr(executor, "max_num_timeout", REQUEUES)
    array = [Task(str(sweep.path.resolve()), i, tasks, workers, figures, requeues) for i in range(tasks)]
    inside = "SLURM_JOB_ID" in os.environ  # submitted from within a job, whose own options are not to be inherited
    try:
        with clean_env() if inside else contextlib.nullcontext():
            jobs = executor.submit_array(array)
    except (FailedJobError, FailedSubmissionError) as error:
        raise PlanError(
            f"Slurm does not take the job ({' '.join(str(error).split())}); change --slurm, and give the command with "
            "--resume"
        ) from error
    job = jobs[0].job_id.partition("_")[0]
    entry = {"job": job, "tasks": tasks, "workers": workers, "requeues": requeues, "submitted": now()}
    entry["options"] = {name: value for name, value in executor.parameters.items() if value is not None}
    write_json(sweep.path / "slurm.json", {"jobs": [*_jobs(sweep.path), entry]})
    return job


def active(path: Path) -> list[str]:
    """The arrays of the sweep in this folder of which tasks are waiting or running."""
    return [entry["job"] for entry in _jobs(path) if set(_states(entry)) - _ENDED - {_UNKNOWN}]


def silent(path: Path) -> list[str]:
    """The arrays of the sweep in this folder of which tasks may be waiting or running, for Slurm does not answer."""
    return [entry["job"] for entry in _jobs(path) if _UNKNOWN in _states(entry)]


def refuse_active(path: Path) -> None:
    """Refuses a folder whose sweep Slurm has already.

    Raises:
      StoreError: an array of it is waiting or running, or may be.
    """
    if there := active(path):
        raise StoreError(
            f"{path} is already being run by job {', '.join(there)} of Slurm; wait until it has ended, or end it with "
            f"syncgap sweep cancel {path}"
        )
    if there := silent(path):
        raise StoreError(
            f"job {', '.join(there)} may be running {path}: {SILENT}; try again, or, if you know that it has ended, "
            f"remove {path / 'slurm.json'} first"
        )


def cancel(path: Path) -> list[str]:
    """Cancels the arrays of this sweep that are waiting or running, and returns their ids."""
    found = active(path)
    if found:
        from submitit import SlurmJob

        for job in found:
            SlurmJob(path / "logs", job).cancel(check=False)
    return found


def status(path: Path) -> list[str]:
    """A line for each array of this sweep: in which states its tasks are, in Slurm's words. Tasks of which Slurm has
    forgotten what became of them are called ended. Where Slurm does not answer, or is not there, tasks are unknown."""
    lines = []
    for entry in _jobs(path):
        states = _states(entry)
        told = ", ".join(f"{count} {state}" for state, count in states.items())
        lines.append(f"Slurm job {entry['job']}: {told}" + (f"; {SILENT}" if _UNKNOWN in states else ""))
    return lines


def minutes(text: str) -> int:
    """A time limit as Slurm writes it, in minutes, rounded up: M, M:S, H:M:S, D-H, D-H:M or D-H:M:S.

    Raises:
      PlanError: it is of another form, or zero.
    """
    found = _TIME.fullmatch(text)
    if found is None:
        raise PlanError(f"time must be minutes, HOURS:MINUTES:SECONDS or DAYS-HOURS, got {text!r}")
    parts = [int(part) for part in found["parts"].split(":")]
    if found["days"] is not None:
        hours, rest, seconds = (*parts, 0, 0)[:3]
        hours += 24 * int(found["days"])
    elif len(parts) == 3:
        hours, rest, seconds = parts
    else:
        hours, rest, seconds = 0, *(*parts, 0)[:2]
    total = 60 * hours + rest + (seconds + 59) // 60
    if total < 1:
        raise PlanError(f"time must be a minute at least, got {text!r}")
    return total


def _read(options: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE``, each once; whole numbers and true and false as such."""
    given: dict[str, Any] = {}
    for option in options:
        name, sign, value = option.partition("=")
        if not name.startswith(SBATCH):
            name = name.lstrip("-").replace("-", "_")
        if not sign or not name or not value:
            raise PlanError(f"--slurm {option!r} is not of the form KEY=VALUE, for example partition=gpu")
        if name in given:
            raise PlanError(f"--slurm has {name} twice")
        given[name] = int(value) if value.isdecimal() else {"true": True, "false": False}.get(value, value)
    return given


def _jobs(path: Path) -> list[Mapping[str, Any]]:
    try:
        return json.loads((path / "slurm.json").read_text("utf-8"))["jobs"]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{path / 'slurm.json'} cannot be read ({error}); remove it") from error


def _states(entry: Mapping[str, Any]) -> Counter[str]:
    """How many tasks of an array are in which state. squeue knows those that wait, run or ended within minutes; sacct,
    where a cluster keeps accounts, the others."""
    job, count = entry["job"], entry["tasks"]
    names = [f"{job}_{i}" for i in range(count)] if count > 1 else [job]  # a single task is submitted as no array
    kept = _asked("sacct", "--noheader", "--parsable2", "--allocations", "--jobs", job, "--format", "JobID,State")
    there = _asked("squeue", "--noheader", "--array", "--states", "all", "--jobs", job, "--format", "%i|%T")
    known = {**(kept or {}), **(there or {})}
    return Counter(known.get(name, _UNKNOWN if there is None else "ended") for name in names)


def _asked(*line: str) -> dict[str, str] | None:
    """What a command of Slurm says of each task, nothing if it does not know the job; None where there is no answer."""
    try:
        said = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if said.returncode and _FORGOTTEN not in said.stderr:
        return None
    rows = (row.split("|") for row in said.stdout.splitlines())
    return {row[0]: row[1].split()[0] for row in rows if len(row) == 2 and row[1]}
