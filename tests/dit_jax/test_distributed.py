"""Joining the tasks of a job step: what JAX is told, and what is said where it does not work."""

import jax
import numpy as np
import pytest

from dit_jax.distributed import FailedElsewhere, agreed, join, require_same
from dit_jax.platform import PlatformError

SLURM = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
BY_HAND = {"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.fixture(autouse=True)
def _settings():
    before = jax.config.jax_enable_preemption_service
    yield
    jax.config.update("jax_enable_preemption_service", before)


@pytest.mark.parametrize(
    ("environment", "told"),
    [
        (SLURM, (None, 4, 3, None)),  # JAX finds the address, and the GPU by the task's place on the node
        ({**SLURM, "SLURM_GPUS_PER_TASK": "1"}, (None, 4, 3, [0])),  # the only one that this task sees
        ({**SLURM, "SLURM_GPUS_PER_TASK": "a100:2"}, (None, 4, 3, [0, 1])),
        ({**SLURM, "SLURM_GPUS_PER_TASK": "2", "JAX_LOCAL_DEVICE_IDS": "1"}, (None, 4, 3, None)),  # which JAX reads
        ({**BY_HAND, "JAX_COORDINATOR_ADDRESS": "node1:4000"}, ("node1:4000", 2, 1, None)),
    ],
)
def test_what_jax_is_told(environment, told, monkeypatch):
    found = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **_: found.append(args))
    join(environment)
    assert found == [told]


@pytest.mark.parametrize("variable", ["JAX_NUM_PROCESSES", "SLURM_STEP_NUM_TASKS"])
def test_tasks_that_do_not_find_each_other_are_told_what_to_set(variable, monkeypatch):
    def fail(*_, **__):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    environment = BY_HAND if variable in BY_HAND else SLURM
    said = r"could not join the others \(coordinator_address should .*set JAX_COORDINATOR_ADDRESS=HOST:PORT"
    with pytest.raises(PlatformError, match=said):
        join(environment)


def test_a_task_alone_joins_nobody():
    with pytest.raises(PlatformError, match="only task"):
        join({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"})


def gathered(monkeypatch, *others):
    """As if other processes had given these."""

    def allgather(own, tiled):
        return np.array([own[0], *others], own.dtype)

    monkeypatch.setattr("jax.experimental.multihost_utils.process_allgather", allgather)


def test_a_failure_anywhere_is_one_everywhere(monkeypatch):
    def fail():
        raise KeyError("mine")

    assert agreed(lambda: 3) == 3
    with pytest.raises(KeyError, match="mine"):
        agreed(fail)
    gathered(monkeypatch, False, True)
    with pytest.raises(FailedElsewhere, match="process 2 of"):
        agreed(lambda: 3)
    with pytest.raises(KeyError, match="mine"):
        agreed(fail)


def test_what_is_not_the_same_everywhere_is_said(monkeypatch):
    require_same(2**32 - 1, "differs")
    gathered(monkeypatch, 7, 7)
    require_same(7, "differs")
    with pytest.raises(ValueError, match="differs"):
        require_same(8, "differs")
