"""Runs that go on: interrupted, with more pairs, other blocks, under another version or name of the weights."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
import xarray as xr
from counting_study import Counting, edit_json, mended, settings

from dit_jax.checkpoint import load_model, save_model
from experiments.frame import folder
from experiments.frame.bench import _together
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import report, run_study
from experiments.frame.subject import untrained_model

GROUP = "data.zarr/network"


def test_going_on_under_another_version_is_said(weights, whole, copy, capsys):
    edit_json(copy / "manifest.json", python="2.7", status="running")
    assert mended(weights, copy, whole) == []
    said = capsys.readouterr().err
    assert "resumed with another device or version, so last digits may differ (python: 2.7 -> 3" in said


@pytest.mark.parametrize("writes", range(5))
def test_a_run_that_was_interrupted_anywhere_ends_with_the_same_bits(weights, whole, tmp_path, monkeypatch, writes):
    """One law for all studies, for one driver runs them: what is finished is not measured again, and the end is the
    same. The run stores three blocks and two groups that are written whole."""
    out, made = tmp_path / "run", []

    def stopping(original):
        def store(*args):
            if len(made) == writes:
                raise KeyboardInterrupt
            original(*args)
            made.append(args[1])

        return store

    counting = Counting()
    with monkeypatch.context() as patched:
        for name in ("write", "put"):
            patched.setattr(RunFolder, name, stopping(getattr(RunFolder, name)))
        with pytest.raises(KeyboardInterrupt):
            run_study(counting.study, settings(weights), out, progress=False)
    assert len(made) == writes
    assert RunFolder.open(out).manifest["status"] == "running"
    with pytest.raises(StoreError, match="continue it with --resume"):
        run_study(counting.study, settings(weights), out, progress=False)
    assert mended(weights, out, whole) == [[0, 1], [2, 3], [4]][writes:]


@pytest.mark.parametrize("before", [2, 3, 4])
def test_more_pairs_extend_a_run(weights, whole, tmp_path, before):
    """Full blocks stay, and the end has the bits of a run that had all pairs from the start. What depends on all pairs
    is measured again."""
    out, first, more = tmp_path / "run", Counting(), Counting()
    run_study(first.study, replace(settings(weights), pairs=before), out, progress=False)
    run_study(more.study, settings(weights), out, resume=True, progress=False)
    assert more.measured == [[0, 1], [2, 3], [4]][before // 2 :]
    assert more.of_all == [0.0, 1.0, 2.0, 3.0, 4.0]
    run, fresh = RunFolder.open(out), RunFolder.open(whole)
    for group in fresh.groups:
        xr.testing.assert_identical(run.load(group), fresh.load(group))
    assert run.manifest["digests"] == fresh.manifest["digests"]
    assert run.manifest["settings"] == fresh.manifest["settings"]
    assert run.manifest["resumed"][0]["changed"] == [f"pairs: {before} -> 5"]
    assert not list(out.rglob(".*.previous"))
    with pytest.raises(StoreError, match=r"run with pairs 5, of which none are taken away: resume it with --pairs 5"):
        run_study(first.study, replace(settings(weights), pairs=before), out, resume=True, progress=False)


@pytest.mark.long
@pytest.mark.parametrize("stop", range(11))
def test_a_run_that_is_killed_while_it_grows_loses_nothing(weights, whole, tmp_path, monkeypatch, stop):
    """Killed before each of its first moves and removals of folders and writes of the manifest."""
    out, made, here = tmp_path / "run", [], threading.get_ident()
    run_study(Counting().study, replace(settings(weights), pairs=4), out, progress=False)

    def stopping(original):
        def call(*args, **kwargs):
            if threading.get_ident() == here:  # not in the threads in which zarr writes, which would not survive it
                if len(made) == stop:
                    raise KeyboardInterrupt
                made.append(args)
            return original(*args, **kwargs)

        return call

    with monkeypatch.context() as patched:
        for home, name in ((shutil, "rmtree"), (os, "replace"), (folder, "write_json")):
            patched.setattr(home, name, stopping(getattr(home, name)))
        with pytest.raises(KeyboardInterrupt):
            run_study(Counting().study, settings(weights), out, resume=True, progress=False)
    assert RunFolder.open(out).finished("network") == {0, 2}
    if RunFolder.open(out).manifest["settings"]["pairs"] == 5:
        with pytest.raises(StoreError, match="continue with --resume"):
            report(Counting().study, RunFolder.open(out, writable=True))
    assert mended(weights, out, whole) == [[4]]
    assert RunFolder.open(out).manifest["digests"] == RunFolder.open(whole).manifest["digests"]


@pytest.mark.parametrize(
    ("block", "again"), [(1, [[2], [3], [6]]), (3, [[2, 3], [6]]), (4, [[2, 3], [6]]), (9, [[2, 3], [6]])]
)
def test_blocks_may_have_another_size_when_a_run_goes_on(weights, tmp_path, block, again):
    """They are stored as before, and measured in the size that is asked for, as far as neighbours are missing."""
    out, config = tmp_path / "run", replace(settings(weights), pairs=7)
    run_study(Counting().study, config, out, progress=False)
    expected = RunFolder.open(out).load("network")
    for first in (2, 6):
        shutil.rmtree(out / GROUP / f"level/c/{first // 2}")
    counting = Counting()
    run_study(counting.study, replace(config, block=block), out, resume=True, progress=False)
    assert counting.measured == again
    run = RunFolder.open(out)
    xr.testing.assert_identical(run.load("network"), expected)
    assert run.manifest["resumed"][0]["changed"] == [f"block: 2 -> {block}"]
    assert run.manifest["settings"]["block"] == block


def test_neighbouring_blocks_are_measured_together_as_far_as_they_fit():
    slices = [(s.start, s.stop) for s in _together([0, 2, 4, 8, 10, 12, 14], 2, 5, 15)]
    assert slices == [(0, 4), (4, 6), (8, 12), (12, 15)]
    assert [(s.start, s.stop) for s in _together([0, 4], 4, 1, 6)] == [(0, 4), (4, 6)]


def test_weights_are_told_apart_by_what_they_are_and_not_by_their_name(weights, whole, copy, tmp_path, monkeypatch):
    """Another spelling of the path, and a copy in another place; but not other weights under the same name."""
    there = shutil.copytree(weights, tmp_path / "elsewhere" / "tiny")
    for path, start in (("tiny", there.parent), (str(there), tmp_path), ("elsewhere/../elsewhere/tiny", tmp_path)):
        monkeypatch.chdir(start)
        assert mended(path, copy, whole) == []
        assert RunFolder.open(copy).manifest["settings"]["weights"] == path
    save_model(untrained_model(load_model(there).config, 6), there, overwrite=True)
    with pytest.raises(StoreError, match="weights_digest"):
        mended(str(there), copy, whole)


def test_timings_are_those_of_all_processes(weights, tmp_path, monkeypatch):
    """Of those that were killed, too: the clock of the test goes a second further with each block."""
    clock = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])

    class Ticking(Counting):
        def __init__(self, last):
            super().__init__()
            measure = self.study.measure

            def timed(bench):
                write = bench.run.write

                def slowly(*args):
                    if len(self.measured) > last:
                        raise KeyboardInterrupt
                    clock[0] += 10
                    write(*args)

                bench.run.write = slowly
                measure(bench)

            self.study = replace(self.study, measure=timed)

    with pytest.raises(KeyboardInterrupt):
        run_study(Ticking(2).study, settings(weights), tmp_path / "run", progress=False)
    assert RunFolder.open(tmp_path / "run").manifest["timings"] == {"measuring_s": 20}
    run_study(Ticking(9).study, settings(weights), tmp_path / "run", resume=True, progress=False)
    timings = RunFolder.open(tmp_path / "run").manifest["timings"]
    assert timings == {"measuring_s": 60, "analysis_s": 0}  # one block more here, and three of the other group
    run_study(Ticking(9).study, settings(weights), tmp_path / "run", resume=True, progress=False)
    assert RunFolder.open(tmp_path / "run").manifest["timings"] == timings


def test_other_settings_do_not_go_on_with_a_run(weights, copy):
    with pytest.raises(StoreError, match="seed: 0 -> 1"):
        run_study(Counting().study, replace(settings(weights), seed=1), copy, resume=True, progress=False)


SLOW = """
import runpy, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have background processes ignore it
import experiments.frame.store as store
write = store.RunFolder.write
def slow(run, group, dataset, first):
    write(run, group, dataset, first)
    print("written", first, flush=True)
    time.sleep(60 if first else 0)
store.RunFolder.write = slow
command = sys.argv[1:]
def run(out):
    sys.argv[1:] = [*command, out]
    runpy.run_module("experiments.cli", run_name="__main__", alter_sys=True)
try:
    run("2")
except SystemExit as end:
    print("ended", end.code, flush=True)
run("15")
"""


@pytest.mark.long
def test_a_scheduler_s_signal_ends_like_an_interrupt(weights, tmp_path):
    """Two runs as of `python -m experiments.cli`, in one process, which takes seconds to start. The first is stopped by
    Ctrl-C. The second is stopped by SIGTERM and ends the process, whose exit status is what a shell sees: 128 and the
    number of the signal. (A process that a signal kills has a negative `returncode`.)"""
    command = ["depth", "--weights", weights, "--pairs", "4", "--block", "2", "--untrained-pairs", "2", "--steps", "8"]
    command += ["--couplings", "0", "1", "--probe-pairs", "0", "--quiet", "--out"]
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ},
        cwd=tmp_path,
    )
    assert process.stdout is not None

    def wait_for(said):
        while said not in (line := process.stdout.readline()):
            assert process.poll() is None
        return line

    for number in (signal.SIGINT, signal.SIGTERM):
        wait_for("written 2")
        time.sleep(0.2)
        process.send_signal(number)
        if number == signal.SIGINT:
            assert wait_for("ended") == "ended 130\n"
    said, errors = process.communicate(timeout=30)
    assert process.returncode == 143
    assert said == ""  # nothing ran on
    for number in (signal.SIGINT, signal.SIGTERM):
        assert RunFolder.open(tmp_path / str(int(number))).finished("network") == {0, 2}
    for word in ("terminated", "interrupted"):
        assert errors.count(f"syncgap: {word}; the same command with --resume continues where it stopped") == 1
    assert "Traceback" not in errors
