"""Worker processes on this machine: which device each sees, when a worker that dies is given up, and how far they are.
No process is started; a fake one stands in."""

import signal

import pytest
import square_study

from experiments.sweeps import local
from experiments.sweeps.cost import Cost
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.local import TERMINATED, TRIES, WorkerError, run_processes, visible
from experiments.sweeps.plan import Plan
from experiments.sweeps.shares import Shard
from experiments.sweeps.telling import Progress
from experiments.sweeps.worker import work


@pytest.fixture(autouse=True)
def _one_study(monkeypatch):
    square_study.only_study(monkeypatch.setattr)


@pytest.fixture
def folder(tmp_path) -> SweepFolder:
    return SweepFolder.create(tmp_path / "sweep", Plan("square", axes={"value": [1, 2, 3]}))


@pytest.fixture
def started(monkeypatch):
    """Processes that end as `codes` says, with 0 once these are used up; what each was started with."""

    def of(*codes, run=lambda count: None):
        calls, left = [], iter(codes)

        class Process:
            pid = 4321

            def __init__(self, line, env, **_):
                calls.append((line, env))
                run(len(calls))
                self.code = next(left, 0)

            def poll(self):
                return self.code

        monkeypatch.setattr(local.subprocess, "Popen", Process)
        return calls

    return of


def each(folder, count):
    return {Shard(i, count): folder.cells[i::count] for i in range(count)}


@pytest.mark.parametrize(
    ("given", "gpus", "expected"),
    [
        (None, 2, ["0", "1", "0"]),
        ("", 0, ["", "", ""]),  # hidden from all of them
        ("4,7", 2, ["4", "7", "4"]),  # more workers than devices
        ("4", 1, ["4", "4", "4"]),
        (None, 0, [None, None, None]),
    ],
)
def test_every_worker_sees_a_device_that_exists(folder, started, monkeypatch, given, gpus, expected):
    if given is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    calls = started()
    run_processes(folder, each(folder, 3), devices=visible(gpus), poll_s=0)
    assert [environment.get("CUDA_VISIBLE_DEVICES") for _, environment in calls] == expected


def test_a_worker_that_somebody_else_ends_is_started_again(folder, started):
    """A scheduler asks every process of a job to end, and this one too."""
    calls = started(TERMINATED)
    run_processes(folder, each(folder, 1), poll_s=0)
    assert len(calls) == 2


def test_a_worker_that_dies_outside_of_a_cell_is_given_up(folder, started):
    calls = started(*[-signal.SIGKILL] * 20)
    with pytest.raises(WorkerError, match=r"worker 0/1 was killed \(SIGKILL\) 3 times outside .*worker-0\.log"):
        run_processes(folder, each(folder, 1), poll_s=0)
    assert len(calls) == TRIES
    assert folder.states() == {"open": 3}


def test_a_worker_that_gets_further_between_its_deaths_goes_on(folder, started):
    """Two deaths, a cell that is done, two deaths, a cell that is done, ..."""

    def run(count):
        if count % 2 == 0:
            work(folder, folder.cells[count // 2 - 1 : count // 2])

    calls = started(*[-signal.SIGKILL] * 6, run=run)
    run_processes(folder, each(folder, 1), poll_s=0)
    assert len(calls) == 7
    assert folder.states() == {"complete": 3}


def test_a_death_at_a_cell_lies_between_others(folder, started, monkeypatch):
    """Deaths elsewhere are counted in a row, those at the cell together."""
    owners = iter([None, None, 4321, None, None, 4321, None, None, 4321])
    current = []
    monkeypatch.setattr(local, "last_owner", lambda run: current[-1] if run == folder.run(folder.cells[0]) else None)
    started(*[-signal.SIGKILL] * 9, run=lambda count: current.append(next(owners, None)))
    run_processes(folder, each(folder, 1), poll_s=0)
    failure = folder.failure(folder.cells[0])
    assert failure is not None
    assert "killed (SIGKILL) 3 times without getting further" in failure.error


def test_progress_counts_what_was_complete_before_as_no_work(folder):
    cost = [Cost(0, flops, None) for flops in (1.0, 2.0, 4.0)]
    work(folder, folder.cells[:1])
    with Progress(folder, folder.cells, cost, quiet=False) as progress:
        assert (progress.bar.n, progress.bar.total) == (0, 6)
        work(folder, folder.cells[1:2])
        progress.look()
        assert (progress.bar.n, progress.bar.total) == (2, 6)
        assert progress.bar.postfix == "2 of 3 cells, 0 failed"
