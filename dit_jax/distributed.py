"""Processes of one job step that measure one run together, through ``jax.distributed``.

After `join` all of them see the devices of all, and each runs the same code on the same host arrays, as
`dit_jax.sharding` wants it. Where one dies, JAX aborts the others: within `HEARTBEAT_S` at most.
"""

import os
import sys
from collections.abc import Callable, Mapping
from typing import NoReturn, TypeVar, cast

import jax
import numpy as np
from jax.experimental import multihost_utils

from dit_jax.job import task
from dit_jax.platform import PlatformError

HEARTBEAT_S = 100  # after which a process that says nothing counts as dead

T = TypeVar("T")


class FailedElsewhere(ValueError):
    """Another process of the run has failed, and says why."""


def join(environment: Mapping[str, str] = os.environ) -> None:
    """Joins the tasks of this job step, unless they have joined. To be called before anything asks JAX for devices.

    JAX finds the address of the first task under Slurm and Open MPI; ``JAX_COORDINATOR_ADDRESS`` names it otherwise.
    Under ``srun --gpus-per-task`` a process uses all GPUs of its task. Otherwise JAX gives it the one of its place on
    the node under Slurm and Open MPI, and all that it sees elsewhere.

    Raises:
      PlatformError: this is the only task, or the tasks do not find each other; the message says what to set.
    """
    if jax.distributed.is_initialized():
        return
    found = task(environment)
    if found is None:
        raise PlatformError("this is the only task of its job step, as far as it is told; there is none to join")
    number, tasks = found
    jax.config.update("jax_enable_preemption_service", False)  # which would take SIGTERM from the command line
    try:
        jax.distributed.initialize(
            environment.get("JAX_COORDINATOR_ADDRESS"),
            tasks,
            number,
            _own_gpus(environment),
            heartbeat_timeout_seconds=HEARTBEAT_S,
        )
    except (RuntimeError, ValueError) as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise PlatformError(
            f"task {number} of {tasks} could not join the others ({reason}); set JAX_COORDINATOR_ADDRESS=HOST:PORT to "
            "a free port of the first task's host, the same in all tasks, and unset proxy variables"
        ) from error


def agreed(make: Callable[[], T]) -> T:
    """What `make` gives in this process, after it has ended in all of them. All must call it.

    Raises:
      FailedElsewhere: it has failed in another process; an error of its own is raised as it is.
    """
    error, made = None, None
    try:
        made = make()
    except Exception as failure:
        error = failure
    failed = np.flatnonzero(multihost_utils.process_allgather(np.array([error is not None]), tiled=True))
    if failed.size:
        jax.distributed.shutdown()  # while all are here, so that none is aborted because another has ended
    if error is not None:
        raise error
    if failed.size:
        which = ", ".join(map(str, failed))
        raise FailedElsewhere(f"process {which} of {jax.process_count()} failed; its own message says why")
    return cast(T, made)


def require_same(number: int, otherwise: str) -> None:
    """Compares an unsigned number of 32 bits between all processes. All must call it.

    Raises:
      ValueError: it is not the same in all, with the message `otherwise`; in all of them.
    """
    found = multihost_utils.process_allgather(np.array([number], np.uint32), tiled=True)
    if (found != found[0]).any():
        jax.distributed.shutdown()
        raise ValueError(otherwise)


def leave(code: int) -> NoReturn:
    """Ends a process that has failed, with this exit code. At a normal end JAX would wait for the others, which may be
    waiting for this one, and then abort."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _own_gpus(environment: Mapping[str, str]) -> list[int] | None:
    """The GPUs of a task to which Slurm has bound its own, by their places among those that it sees. JAX itself would
    take the one of the task's place on the node, which such a task does not see."""
    bound = environment.get("SLURM_GPUS_PER_TASK")  # "2", or "a100:2"
    if bound is None or "JAX_LOCAL_DEVICE_IDS" in environment:
        return None
    return list(range(int(bound.rsplit(":", 1)[-1])))
