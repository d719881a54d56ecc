"""Who does which cells: the i-th of n shares, equal in cost, and told by the environment of a scheduler."""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from dit_jax.job import task
from experiments.sweeps.plan import PlanError

_TASK = "SLURM_ARRAY_TASK_ID"
_SLURM = {_TASK: 0, "SLURM_ARRAY_TASK_MIN": 0, "SLURM_ARRAY_TASK_COUNT": 1, "SLURM_ARRAY_TASK_STEP": 1}
_KUBERNETES = "JOB_COMPLETION_INDEX"  # of an indexed job, which does not say how many there are


class Shard(NamedTuple):
    """The i-th of n shares."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


WHOLE = Shard(0, 1)


def read_shard(text: str | None, environment: Mapping[str, str]) -> Shard:
    """The share that a command line names, or the environment.

    Args:
      text: ``i/n`` with i from 0 to n - 1; ``/n``, with i from the environment; None asks the environment for both,
        and without an array there it is the whole.
      environment: where Slurm says index and count of the task of an array, and srun, mpirun and others those of a
        process (`dit_jax.job.task`), which may be one of an array's task; or an indexed job of Kubernetes its index.

    Raises:
      PlanError: neither says which share it is.
    """
    index, count = _of_environment(environment)
    if text is not None:
        match = re.fullmatch(r"(\d*)/(\d+)", text)
        if match is None:
            raise PlanError(f"--shard must be of the form i/n, for example 0/8 for the first of eight, got {text!r}")
        count = int(match[2])
        index = int(match[1]) if match[1] else index
        if index is None:
            raise PlanError(
                f"--shard {text} leaves the index to the environment, which has neither {_TASK} nor {_KUBERNETES}"
            )
    if index is None:
        return WHOLE
    if count is None:
        raise PlanError(f"{_KUBERNETES} is set, and nothing says how many tasks there are; give --shard /n")
    if not 0 <= index < count:
        raise PlanError(f"shard {index}/{count} does not exist: the first is 0/{count}, the last {count - 1}/{count}")
    return Shard(index, count)


def _of_environment(environment: Mapping[str, str]) -> tuple[int | None, int | None]:
    try:
        process, processes = task(environment) or (0, 1)
        if _TASK in environment or processes > 1:
            index, first, count, step = (int(environment.get(name, default)) for name, default in _SLURM.items())
            return (index - first) // step * processes + process, count * processes
        if _KUBERNETES in environment:
            return int(environment[_KUBERNETES]), None
    except ValueError as error:
        raise PlanError(f"the environment does not say which share this task is ({error})") from error
    return None, None


def shares(costs: Sequence[float], groups: Sequence[object], count: int) -> list[list[int]]:
    """The indices of the cells of each of `count` shares, as equal in cost as can be done greedily: the dearest cell
    first, always to the share that has least. Within a share, cells of one group, which share their compiled programs,
    follow each other in the order of the plan.

    Every worker finds the same shares from the plan alone.
    """
    dearest = sorted(range(len(costs)), key=lambda i: (-costs[i], i))
    totals, found = [0.0] * count, [[] for _ in range(count)]
    for i in dearest:
        least = min(range(count), key=lambda share: (totals[share], len(found[share]), share))
        totals[least] += costs[i]
        found[least].append(i)
    first = {group: i for i, group in reversed(list(enumerate(groups)))}
    return [sorted(share, key=lambda i: (first[groups[i]], i)) for share in found]
