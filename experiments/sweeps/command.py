"""``syncgap sweep``: checks a plan, says what it costs, and runs it here, in part, or on a cluster."""

import contextlib
import math
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import jax

from dit_jax.disk import writing
from dit_jax.lock import FolderInUse, held, is_held, owner_of
from dit_jax.platform import devices
from experiments.frame.manifest import StoreError
from experiments.sweeps import slurm
from experiments.sweeps.cost import Cost, costs, parts
from experiments.sweeps.finish import finish
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.local import gpus, run_processes, visible
from experiments.sweeps.plan import Cell, Plan, PlanError, read_plan
from experiments.sweeps.settings import Sweep
from experiments.sweeps.shares import WHOLE, Shard, read_shard
from experiments.sweeps.telling import Progress, dry_run, status, surroundings, tell
from experiments.sweeps.worker import work


def sweep(command: Sweep, line: str) -> int:
    """Runs the command and returns its exit code.

    Raises:
      PlanError: a plan that cannot be run.
      StoreError: a folder that holds something else, or in which another process runs the sweep.
      PlatformError: JAX has no device.
      WorkerError: a worker process ended with an error of the sweep, or cannot be kept alive.
    """
    before = cast(Any, jax.config).jax_platforms  # whose names JAX adds as it runs
    try:
        return _sweep(command, line)
    finally:
        jax.config.update("jax_platforms", before)  # which a process changes that leaves devices to others


def _sweep(command: Sweep, line: str) -> int:
    words = list(command.plan)
    if len(words) == 2 and words[0] == "status":
        folder = SweepFolder.open(words[1])
        print("\n".join([status(folder), *slurm.status(folder.path)]))
        return 0
    if len(words) == 2 and words[0] == "cancel":
        return cancel(SweepFolder.open(words[1]))
    if len(words) == 2 and words[0] == "work":  # how worker processes are started, by one who finishes the sweep
        print(surroundings(), flush=True)
        _share(SweepFolder.open(words[1]), read_shard(command.shard, os.environ), command)
        return 0
    return _run(command, line)


def plan_of(command: Sweep) -> Plan:
    """The plan that a command line asks for.

    Raises:
      PlanError: none, or more than one.
    """
    words = list(command.plan)
    if len(words) > 1:
        raise PlanError(f"give one plan, or status FOLDER, or cancel FOLDER; got {' '.join(words)}")
    if bool(words) == (command.study is not None):
        raise PlanError("give a plan (a TOML file, or the name of a shipped one), or --study with --set")
    plan = read_plan(words[0]) if command.study is None else Plan(command.study)
    return plan.with_values(command.set)


def _run(command: Sweep, line: str) -> int:
    if command.slurm:
        return _submit(command, line)
    plan, shard = plan_of(command), read_shard(command.shard, os.environ)
    if command.workers is not None and shard != WHOLE:
        raise PlanError(
            f"this process is to run share {shard}, as the environment says, and a share is run by one process; leave "
            "--workers out"
        )
    cells = plan.cells()
    alone = command.dry_run or shard != WHOLE
    found = 0 if alone else gpus()
    workers = 1 if alone else min(command.workers or max(1, found), len(cells))
    if workers > 1 or command.dry_run:
        jax.config.update("jax_platforms", "cpu")  # this process computes nothing: devices are left to the workers
    cost = costs(plan, cells, len(devices()))
    tell(plan, cells, cost)
    if command.dry_run:
        print(dry_run(cells, cost))
        return 0
    if shard != WHOLE:  # which --shard or the environment says
        count = len(parts(cells, cost, shard.count)[shard.index])
        print(f"this process runs share {shard} of the sweep, {count} cells", file=sys.stderr)
    out = _out(command)
    with writing(out), contextlib.ExitStack() as stack:
        if shard == WHOLE:
            stack.enter_context(held(out))
        with _alone(out / "sweep.json"):  # processes of several shares begin at the same time
            folder = SweepFolder.create(out, plan, resume=command.resume or shard != WHOLE, command=line)
        if workers == 1:
            return finish(folder, _share(folder, shard, command, cost))
        _forget_failures(folder, cells, command)
        each = {Shard(i, workers): part for i, part in enumerate(parts(cells, cost, workers))}
        with Progress(folder, cells, cost, quiet=command.quiet) as progress:
            run_processes(folder, each, devices=visible(found), figures=command.figures, watch=progress.look)
        return finish(folder, cells)


def _submit(command: Sweep, line: str) -> int:
    """Submits the sweep to Slurm, and leaves it to it."""
    jax.config.update("jax_platforms", "cpu")  # where jobs are submitted is not where they run
    plan, out = plan_of(command), _out(command)
    cells = plan.cells()
    cost = costs(plan, cells)
    tell(plan, cells, cost)
    if command.dry_run:
        print(dry_run(cells, cost))
        return 0
    executor = slurm.executor_for(_name(command), out / "logs", command.slurm)
    workers = command.workers or slurm.workers_of(executor)
    tasks = min(command.tasks or slurm.MOST_TASKS, math.ceil(len(cells) / workers))
    with writing(out), held(out):  # of two commands, the second finds the job of the first
        slurm.refuse_active(out)
        with _alone(out / "sweep.json"):
            folder = SweepFolder.create(out, plan, resume=command.resume, command=line)
        _forget_failures(folder, cells, command)
        job = slurm.submit(folder, executor, tasks, workers=workers, figures=command.figures)
    print(f"Slurm job {job}: {tasks} tasks" + (f" with {workers} workers each" if workers > 1 else ""))
    print(f"how far it is:   syncgap sweep status {out}\nto end it:       syncgap sweep cancel {out}")
    return 0


def _name(command: Sweep) -> str:
    return Path(command.plan[0]).stem if command.plan else str(command.study)


def _out(command: Sweep) -> Path:
    return command.out or Path("runs") / f"sweep-{_name(command)}"


@contextlib.contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds a file while the block runs, and waits if another process does."""
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(held(path))
                break
            except FolderInUse:
                time.sleep(0.1)
        yield


def _share(folder: SweepFolder, shard: Shard, command: Sweep, cost: list[Cost] | None = None) -> list[Cell]:
    """Runs one share in this process, and returns its cells."""
    cells = folder.cells
    cost = costs(folder.plan, cells, len(devices())) if cost is None else cost
    mine = parts(cells, cost, shard.count)[shard.index]
    _forget_failures(folder, mine, command)
    by_name = {cell.name: each for cell, each in zip(cells, cost, strict=True)}
    with Progress(folder, mine, [by_name[cell.name] for cell in mine], quiet=command.quiet) as progress:
        work(
            folder,
            mine,
            command=folder.entries["command"],
            figures=command.figures,
            after=progress.after,
            heard=progress.heard,
        )
    return mine


def _forget_failures(folder: SweepFolder, cells: list[Cell], command: Sweep) -> None:
    """Resuming tries again what failed. A worker that is started again does not."""
    if command.resume:
        for cell in cells:
            folder.forget_failure(cell)


def cancel(folder: SweepFolder) -> int:
    """Ends the job that runs a sweep on Slurm, or the processes that run it on this machine: the one that holds the
    folder, which ends its workers, and those that are at a cell. What is measured stays.

    Raises:
      StoreError: neither job nor process of this machine runs it; the message names the machines of others.
    """
    if jobs := slurm.cancel(folder.path):
        print(f"cancelled Slurm job {', '.join(jobs)}; the command that submitted it goes on with --resume")
        return 0
    places = [folder.path, *map(folder.run, folder.cells)]
    owners = dict.fromkeys(owner for place in places if is_held(place) and (owner := owner_of(place)) is not None)
    here = [owner.process for owner in owners if owner.is_here]
    others = sorted({owner.host for owner in owners if not owner.is_here})
    elsewhere = f"processes on {', '.join(others)} run {folder.path}; give the same command there" if others else ""
    if not here:
        if unknown := slurm.silent(folder.path):
            raise StoreError(f"job {', '.join(unknown)} may be running {folder.path}: {slurm.SILENT}; try again later")
        raise StoreError(elsewhere or f"no job of Slurm that this machine knows and no process runs {folder.path}")
    for process in here:
        with contextlib.suppress(ProcessLookupError):  # a worker may have ended with the first
            os.kill(process, signal.SIGTERM)
    print(f"asked {', '.join(map(str, here))} to end; the command that started the sweep continues it with --resume")
    if elsewhere:
        print(elsewhere)
    return 0
