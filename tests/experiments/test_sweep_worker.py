"""One worker of a sweep: what it runs, leaves, takes over and writes down. A study without a network stands in."""

import json
import os
import subprocess
import sys
from contextlib import contextmanager

import pytest
import square_study
import xarray as xr
from square_study import STUDY

from dit_jax.lock import held
from experiments import studies
from experiments.frame.manifest import StoreError
from experiments.frame.store import RunFolder
from experiments.frame.study import Study, run_study
from experiments.sweeps import worker
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.plan import Plan, PlanError
from experiments.sweeps.worker import work


@pytest.fixture(autouse=True)
def _one_study(monkeypatch):
    square_study.only_study(monkeypatch.setattr)
    monkeypatch.setattr(worker, "POLL_S", 0.01)


def sweep(path, *values, **options) -> SweepFolder:
    return SweepFolder.create(path, Plan("square", axes={"value": list(values)}), **options)


def test_every_cell_is_an_ordinary_run(tmp_path):
    folder = sweep(tmp_path / "sweep", 1, 2, command="syncgap sweep squares")
    assert folder.states() == {"open": 2}
    ended = []
    outcome = work(folder, folder.cells, command="as told", after=lambda cell, how: ended.append((cell.name, how)))
    assert outcome.done == ["value=1", "value=2"]
    assert ended == [("value=1", "done"), ("value=2", "done")]
    assert folder.states() == {"complete": 2}
    run = RunFolder.open(folder.path / "cells" / "value=2")
    assert run.load("analysis").root == 2
    assert run.manifest["command"] == "as told"
    lines = (folder.path / "sweep.log").read_text().splitlines()
    assert [line.split()[1:3] for line in lines] == [["done", "value=1"], ["done", "value=2"]]


def test_what_is_complete_is_left_as_it_is(tmp_path):
    folder = sweep(tmp_path / "sweep", 1)
    work(folder, folder.cells)
    before = (folder.run(folder.cells[0]) / "manifest.json").read_bytes()
    assert work(folder, folder.cells).there == ["value=1"]
    assert (folder.run(folder.cells[0]) / "manifest.json").read_bytes() == before


def test_a_failed_cell_is_written_down_and_the_others_run(tmp_path):
    folder = sweep(tmp_path / "sweep", -1, 1001, 3)
    outcome = work(folder, folder.cells)
    assert (outcome.failed, outcome.done) == (["value=-1", "value=1001"], ["value=3"])
    assert folder.states() == {"failed": 2, "complete": 1}
    refused, broken = (folder.failure(cell) for cell in folder.cells[:2])
    assert refused is not None
    assert refused.error == "no root"
    assert broken is not None
    assert broken.error == "ZeroDivisionError: too much"
    assert "measure" in broken.traceback
    assert work(folder, folder.cells).failed == outcome.failed  # not tried again before that is asked for


def test_a_failure_that_is_forgotten_is_tried_again(tmp_path, monkeypatch):
    folder = sweep(tmp_path / "sweep", 1001)
    work(folder, folder.cells)
    monkeypatch.setattr(studies, "find", lambda name: Study(**{**vars(STUDY), "measure": lambda bench: bench.whole(
        "square", lambda: xr.Dataset({"square": 4.0}))}))  # fmt: skip
    folder.forget_failure(folder.cells[0])
    assert work(folder, folder.cells).done == ["value=1001"]
    assert folder.failure(folder.cells[0]) is None


def test_a_cell_that_another_process_holds_is_left_to_it(tmp_path, monkeypatch):
    folder = sweep(tmp_path / "sweep", 1, 2)
    seen = []
    with held(folder.run(folder.cells[0])) as _:
        assert folder.state(folder.cells[0]) == "running"

        def wait(seconds):
            seen.append(folder.states())
            raise TimeoutError

        monkeypatch.setattr(worker, "sleep", wait)
        with pytest.raises(TimeoutError):
            work(folder, folder.cells)
    assert seen == [{"running": 1, "complete": 1}]
    assert work(folder, folder.cells).done == ["value=1"]  # its owner has ended without finishing it


def test_a_cell_that_another_process_ends_before_it_can_be_held_is_left(tmp_path, monkeypatch):
    folder = sweep(tmp_path / "sweep", 1)

    @contextmanager
    def late(path):
        run_study(STUDY, folder.cells[0].settings, path, progress=False)
        with held(path):
            yield

    monkeypatch.setattr(worker, "held", late)
    assert work(folder, folder.cells).there == ["value=1"]
    assert (folder.path / "diary").read_text().count("begin") == 1
    assert not (folder.path / "sweep.log").exists()


def test_a_begun_cell_is_continued(tmp_path):
    folder = sweep(tmp_path / "sweep", 5)
    (cell,) = folder.cells
    run = RunFolder.create(
        folder.run(cell), {"value": 5.0, "seed": 0, "pause_s": 0.0}, extra={"kind": "square", "subject": "numbers"}
    )
    run.put("square", xr.Dataset({"square": ((), 36.0, {"long_name": "s", "units": "1"})}))
    assert folder.state(cell) == "begun"
    work(folder, folder.cells)
    assert RunFolder.open(folder.run(cell)).load("analysis").root == 6  # of what was there


def test_a_folder_that_was_killed_before_its_first_word_is_begun_anew(tmp_path):
    folder = sweep(tmp_path / "sweep", 5)
    run = folder.run(folder.cells[0])
    run.mkdir(parents=True)
    (run / ".manifest.json.partial").write_text("{")
    assert work(folder, folder.cells).done == ["value=5"]


def test_a_sweep_is_found_again_and_may_grow(tmp_path):
    path = tmp_path / "sweep"
    folder = sweep(path, 1, 2)
    work(folder, folder.cells)
    assert SweepFolder.open(path).plan == folder.plan
    with pytest.raises(StoreError, match="continue it with --resume"):
        sweep(path, 1, 2)
    more = sweep(path, 1, 2, 3, resume=True)
    assert more.states() == {"complete": 2, "open": 1}
    with pytest.raises(PlanError, match=r"cells that are not in this plan.*value=2, value=3"):
        sweep(path, 1, resume=True)


def test_folders_that_hold_something_else_are_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds something that is no sweep"):
        sweep(tmp_path, 1)
    with pytest.raises(StoreError, match="holds no sweep"):
        SweepFolder.open(tmp_path)
    entries = {"format": "syncgap-sweep", "format_version": 1, "command": ""}
    for changed, said in (
        ({"format_version": 99}, "format version 99"),
        ({}, "sweep.json lacks plan; restore the file"),
        ({"plan": {"study": "square"}, "command": None}, "lacks command"),
        ({"plan": {"study": "square", "axis": {}}}, r"the plan in .* cannot be used \(a plan has no entry axis"),
    ):
        (tmp_path / "sweep.json").write_text(json.dumps({**entries, **changed}))
        with pytest.raises(StoreError, match=said):
            SweepFolder.open(tmp_path)


@pytest.mark.long
def test_workers_that_are_killed_at_random_lose_nothing_and_never_share_a_cell(tmp_path):
    """Two processes work on all cells of one sweep. Twenty times one of them is killed, at a random moment after it has
    begun a cell. Those that are left run many cells, and need no more memory for them."""
    many = 250
    plan = Plan("square", settings={"pause_s": 0.03}, axes={"value": list(range(1, many + 1))})
    folder = SweepFolder.create(tmp_path / "sweep", plan)
    line = [sys.executable, square_study.__file__, str(folder.path), "20"]
    subprocess.run(line, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, check=True, timeout=600)

    assert folder.states() == {"complete": many}
    for cell in folder.cells:
        assert RunFolder.open(folder.run(cell)).load("analysis").root == cell.settings.value
    at_work: dict[str, str] = {}
    begun = 0
    for word, cell, process in (line.split() for line in (folder.path / "diary").read_text().splitlines()):
        if word == "end":
            assert at_work.pop(cell) == process  # who ends a cell is the last who began it: nobody came between
        else:
            begun += 1
            at_work[cell] = process
    assert not at_work
    assert begun > many  # kills were in the middle of cells
    ended = [line.split()[2] for line in (folder.path / "sweep.log").read_text().splitlines()]
    assert len(ended) == len(set(ended))  # what is complete is not run again
    if (memory := folder.path / "memory").exists():  # where the system tells it
        sizes: dict[str, list[int]] = {}
        for process, size in (line.split() for line in memory.read_text().splitlines()):
            sizes.setdefault(process, []).append(int(size))
        assert max(map(len, sizes.values())) > 50
        for grown in sizes.values():
            assert max(grown) - max(grown[:20]) < 30e6
