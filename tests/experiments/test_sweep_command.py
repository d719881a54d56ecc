"""The command ``syncgap sweep`` on this machine, in process: one worker, several, shares, resuming, exit codes,
cancelling. A study without a network stands in."""

import contextlib
import os
import signal
import socket
import threading

import pytest
import square_study

from dit_jax.lock import held
from experiments import cli
from experiments.sweeps import command as command_module
from experiments.sweeps import local, worker
from experiments.sweeps.command import cancel
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.plan import Plan
from experiments.sweeps.settings import Sweep


@pytest.fixture(autouse=True)
def _one_study(monkeypatch):
    square_study.only_study(monkeypatch.setattr)
    monkeypatch.setattr(worker, "POLL_S", 0.01)
    monkeypatch.setattr(command_module, "gpus", lambda: 0)  # which asks another process


@pytest.fixture
def folder(tmp_path) -> SweepFolder:
    return SweepFolder.create(tmp_path / "sweep", Plan("square", axes={"value": [1, 2, 3]}))


def run(out, *more, values="1,2,3") -> int:
    return cli.main(["sweep", "--study", "square", "--set", f"value={values}", "--out", str(out), "--quiet", *more])


def states(out) -> dict:
    return dict(SweepFolder.open(out).states())


def test_one_process_runs_all_cells_and_makes_the_result(tmp_path, capsys):
    out = tmp_path / "sweep"
    assert run(out) == 0
    assert states(out) == {"complete": 3}
    assert (out / "result.zarr").is_dir()
    said = capsys.readouterr()
    assert f"report: {out / 'report.html'}" in said.out
    assert "sweep of square: 3 cells" in said.err
    assert cli.main(["sweep", "status", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}: 3 complete\n"
    assert run(out) == 2
    assert "continue it with --resume" in capsys.readouterr().err


def test_a_dry_run_runs_nothing(tmp_path, capsys):
    out = tmp_path / "sweep"
    assert run(out, "--dry-run") == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()[1:]] == ["value=1", "value=2", "value=3"]
    assert not out.exists()


def test_a_failure_is_an_exit_code_and_is_tried_again(tmp_path, capsys, monkeypatch):
    out = tmp_path / "sweep"
    assert run(out, values="-1,2") == 1
    assert f"1 of 2 cells failed; `syncgap sweep status {out}` says why" in capsys.readouterr().err
    assert (out / "report.html").is_file()  # which shows it
    assert cli.main(["sweep", "status", str(out)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{out}: 1 complete, 1 failed", "failed   value=-1: no root"]
    before = (out / "cells" / "value=2" / "manifest.json").read_bytes()
    assert run(out, "--resume", values="-1,2") == 1  # tried again, in vain
    assert [line.split()[1:3] for line in (out / "sweep.log").read_text().splitlines()] == [
        *(["failed", "value=-1"], ["done", "value=2"], ["failed", "value=-1"])
    ]
    study = square_study.Study(**{**vars(square_study.STUDY), "measure": lambda bench: bench.whole(
        "square", lambda: square_study.xr.Dataset({"square": 1.0}))})  # fmt: skip
    monkeypatch.setattr(square_study.studies, "find", lambda name: study)
    assert run(out, "--resume", values="-1,2") == 0
    assert states(out) == {"complete": 2}
    assert (out / "cells" / "value=2" / "manifest.json").read_bytes() == before


def test_shares_are_run_one_by_one_and_the_last_makes_the_result(tmp_path, capsys):
    out = tmp_path / "sweep"
    assert run(out, "--shard", "0/2") == 0
    assert "share 0/2 of the sweep, 2 cells" in capsys.readouterr().err
    assert states(out) == {"complete": 2, "open": 1}
    assert not (out / "report.html").exists()
    assert run(out, "--shard", "1/2") == 0  # goes on in the folder by itself
    assert states(out) == {"complete": 3}
    assert (out / "report.html").is_file()


def test_workers_of_a_share_are_refused_wherever_the_share_comes_from(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    assert run(tmp_path / "sweep", "--workers", "2") == 2
    assert "share 1/3, as the environment says, and a share is run by one process" in capsys.readouterr().err
    assert run(tmp_path / "sweep") == 0
    assert states(tmp_path / "sweep") == {"complete": 1, "open": 2}


def test_a_share_of_which_cells_failed_says_so_while_others_are_open(tmp_path):
    out = tmp_path / "sweep"
    assert run(out, "--shard", "0/2", values="-1,2") == 1
    assert states(out) == {"failed": 1, "open": 1}
    assert run(out, "--shard", "1/2", values="-1,2") == 0  # its own cell is done
    assert (out / "report.html").is_file()


def test_one_writer_at_a_time_makes_the_folder(tmp_path):
    entered = threading.Event()

    def other():
        with command_module._alone(tmp_path / "sweep.json"):
            entered.set()

    thread = threading.Thread(target=other)
    with command_module._alone(tmp_path / "sweep.json"):
        thread.start()
        assert not entered.wait(0.3)
    thread.join(60)
    assert entered.is_set()


@pytest.fixture
def processes(monkeypatch):
    """Workers in this process: each does its share as it starts, and ends with the next of `codes`, 0 once these are
    used up."""
    started, codes = [], []

    class Process:
        pid = 0

        def __init__(self, line, **_):
            started.append(line)
            sweep = SweepFolder.open(line[line.index("work") + 1])
            shard = command_module.read_shard(line[line.index("--shard") + 1], {})
            cells = [c for c in sweep.cells[shard.index :: shard.count] if not sweep.is_complete(c)]
            worker.work(sweep, cells)
            self.code = codes.pop(0) if codes else 0

        def poll(self):
            return self.code

        def terminate(self):
            raise AssertionError("it has ended")

    monkeypatch.setattr(local.subprocess, "Popen", Process)
    return started, codes


def test_several_workers_take_a_share_each(tmp_path, processes):
    started, codes = processes
    codes[:] = [-signal.SIGKILL]
    out = tmp_path / "sweep"
    assert run(out, "--workers", "2", "--figures", values="-1,1,2,3") == 1
    assert [line[line.index("--shard") + 1] for line in started] == ["0/2", "1/2", "0/2"]  # the first was killed
    assert all("--figures" in line for line in started)
    assert states(out) == {"complete": 3, "failed": 1}
    assert (out / "report.html").is_file()
    before = len(started)
    assert run(out, "--workers", "9", "--resume", values="-1,1,2,3") == 1
    assert len(started) - before == 4  # no more than cells


def test_an_error_of_the_sweep_in_a_worker_is_one_message(tmp_path, processes, capsys):
    _, codes = processes
    codes[:] = [2]
    out = tmp_path / "sweep"
    assert run(out, "--workers", "2") == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"syncgap: worker 0/2 ended with exit code 2; {out / 'logs' / 'worker-0.log'} says why"


def test_a_platform_without_devices_is_one_message(tmp_path, capsys, monkeypatch):
    def none():
        raise RuntimeError("Unable to initialize backend 'tpu'")

    monkeypatch.setattr("dit_jax.platform.jax.devices", none)
    assert run(tmp_path / "sweep") == 2
    assert "syncgap: JAX has no usable device" in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"shard": "0/2", "slurm": ("time=1",)}, "--shard or --slurm"),
        ({"shard": "0/2", "workers": 2}, "--shard or --workers"),
        ({"tasks": 3}, "give --slurm, too"),
    ],
)
def test_options_that_would_be_dropped_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        Sweep(plan=("paper",), **options)


# --- cancel


@pytest.fixture
def signals(monkeypatch):
    sent = []
    monkeypatch.setattr(command_module.os, "kill", lambda process, number: sent.append((process, number)))
    return sent


@pytest.mark.parametrize("which", ["folder", "cell", "both"])
def test_cancel_ends_who_holds_the_folder_or_is_at_a_cell(folder, signals, which):
    places = {"folder": [folder.path], "cell": [folder.run(folder.cells[1])]}
    places["both"] = places["folder"] + places["cell"]
    with contextlib.ExitStack() as stack:
        for place in places[which]:
            stack.enter_context(held(place))
        assert cancel(folder) == 0
    assert signals == [(os.getpid(), signal.SIGTERM)]  # once


def test_cancel_ends_no_process_for_one_of_another_machine(folder, signals, monkeypatch):
    with held(folder.path):
        host = socket.gethostname()
        monkeypatch.setattr(socket, "gethostname", lambda: "another")
        with pytest.raises(ValueError, match=f"processes on {host} run .*give the same command there"):
            cancel(folder)
    with pytest.raises(ValueError, match="no process runs"):
        cancel(folder)
    assert signals == []
