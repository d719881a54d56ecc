"""Which of several tasks of a job this process is. Most commands do not share their work among tasks, and say so; some
studies do (`dit_jax.distributed`)."""

import os
from collections.abc import Mapping

# the number of tasks, and which one this is, as Slurm, Open MPI, PMI and JAX itself say
_VARIABLES = (
    ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    ("PMI_SIZE", "PMI_RANK"),
    ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID"),
)


def task(environment: Mapping[str, str] = os.environ) -> tuple[int, int] | None:
    """Number of this task and how many there are, or None if the process is the only one, as far as it is told. A
    script that Slurm runs before any `srun` is one process, however many tasks were asked for."""
    for count, which in _VARIABLES:
        try:
            tasks, number = int(environment[count]), int(environment[which])
        except (KeyError, ValueError):
            continue
        if tasks > 1:
            return number, tasks
    return None


def several_tasks(environment: Mapping[str, str] = os.environ) -> str | None:
    """What a command that one process runs has to say to tasks of a job that all run it; None if there is only one."""
    found = task(environment)
    if found is None:
        return None
    number, tasks = found
    return (
        f"this is task {number} of {tasks} that were started with one command. Tasks of this command do not share "
        "its work: the first one that holds its folder does all of it, and the others are refused. Start one task; or "
        "split runs over tasks with `syncgap sweep`, or pairs of one run with `syncgap compare --first-pair` and "
        "`syncgap merge`"
    )
