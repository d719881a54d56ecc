"""Runs that several processes measure together, through the command line."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from processes import free_port, run_together

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.lock import held
from experiments.frame.store import RunFolder
from experiments.frame.study import run_joined
from experiments.frame.subject import untrained_model
from experiments.studies import find

pytestmark = pytest.mark.long

COMPARE = ["--pairs", "3", "--block", "2", "--untrained-pairs", "2", "--gain-pairs", "2", "--couplings", "0", "1"]
DEPTH = ["--pairs", "3", "--block", "2", "--untrained-pairs", "2", "--probe-pairs", "8", "--couplings", "0", "1"]
SIZES = {"compare": [*COMPARE, "--steps", "6"], "depth": [*DEPTH, "--steps", "8"]}
SCRIPT = """
import os, sys, time
from pathlib import Path
os.environ.update({environment})
from dit_jax import distributed
from experiments import cli
from experiments.frame import study
from experiments.frame.store import RunFolder

def reported(of, run, **_):  # nothing reads the figures
    print("reported", flush=True)
    return run.path / "report.html"

def left(code):
    print("left with", code, flush=True)
    os._exit(0)

def killed():  # the first process last: JAX would abort the other before it has written
    gone = Path({gone!r})
    if os.environ["JAX_PROCESS_ID"] == "0":
        while not gone.exists():
            time.sleep(0.05)
    gone.touch()
    os._exit(0)

def write(run, group, dataset, first, write=RunFolder.write):
    write(run, group, dataset, first)
    print("wrote", group, first, flush=True)
    if {gone!r}:
        killed()

study.report, distributed.leave, RunFolder.write = reported, left, write
sys.exit(max(cli.main(command) for command in {commands}))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> str:
    """A network with parameters that are large enough to be split."""
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    config = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    save_model(untrained_model(config, 5), folder, extra={"data": None})
    return str(folder)


def command(study: str, weights: str, out: Path, *more: str) -> list[str]:
    sharded = ["--parameters", "sharded", "--quiet", "--out", str(out)]
    return [study, "--weights", weights, *SIZES[study], *sharded, *more]


def together(commands: list[list[list[str]]], place: Path, gone: str = "") -> list[list[str]]:
    """What each process prints that runs these commands, joined with the others, with one device each. Alone, a process
    has two."""
    scripts, address = [], f"127.0.0.1:{free_port()}"
    for i, each in enumerate(commands):
        environment = {"TMPDIR": str(place / f"tmp{i}"), "JAX_PROCESS_ID": str(i)}
        if len(commands) > 1:
            environment |= {"JAX_NUM_PROCESSES": str(len(commands)), "JAX_COORDINATOR_ADDRESS": address}
        (place / f"tmp{i}").mkdir(exist_ok=True)
        scripts.append(["-c", SCRIPT.format(environment=environment, commands=each, gone=gone)])
    said = run_together(scripts, devices=1 if len(commands) > 1 else 2)
    return [[line for line in text.splitlines() if not line.startswith("[Gloo]")] for text in said]


@pytest.fixture(scope="module")
def alone(weights, tmp_path_factory):
    """The runs of one process with two devices."""
    folder = tmp_path_factory.mktemp("alone")
    together([[command(study, weights, folder / study) for study in SIZES]], folder)
    return folder


def assert_same(found: Path, expected: Path):
    """In all groups; see `test_sharding.assert_close`. (Here all bits were equal.)"""
    one, two = RunFolder.open(expected), RunFolder.open(found)
    assert two.groups == one.groups
    for group in one.groups:
        found_group, expected_group = two.load(group), one.load(group)
        for name, values in expected_group.data_vars.items():
            if values.dtype.kind == "f":
                scale = np.nanmax(np.abs(values.values), initial=0)
                np.testing.assert_allclose(found_group[name], values, atol=1e-5 * scale, rtol=0, err_msg=str(name))
        xr.testing.assert_identical(found_group.coords.to_dataset(), expected_group.coords.to_dataset())


def assert_nothing_else(place: Path, *runs: str):
    """Neither locks nor copies are left."""
    assert {each.name for each in place.iterdir()} - {"tmp0", "tmp1", "gone"} == set(runs)
    assert not list(place.glob("tmp*/syncgap*"))


def test_two_processes_measure_the_runs_of_one(weights, alone, tmp_path):
    """The last block has one pair, which two devices cannot share."""
    commands = [command(study, weights, tmp_path / study) for study in SIZES]
    first, second = together([commands] * 2, tmp_path)
    for study in SIZES:
        assert_same(tmp_path / study, alone / study)
        assert RunFolder.open(tmp_path / study).manifest["platform"].startswith("cpu, 2 device(s)")
        page = [line for line in first if line == f"report: {tmp_path / study / 'report.html'}"]
        assert len(page) == 1
    assert first.count("reported") == len(SIZES)
    assert second == [line for line in first if line.startswith("wrote")]  # the same blocks, and no page
    assert_nothing_else(tmp_path, *SIZES)


def test_processes_that_were_killed_go_on_together(weights, alone, tmp_path):
    out = tmp_path / "out"
    said = together([[command("compare", weights, out)]] * 2, tmp_path, gone=str(tmp_path / "gone"))
    assert said == [["wrote network 0"]] * 2
    assert RunFolder.open(out).finished("network") == {0}
    (copy,) = (tmp_path / "tmp1").glob("syncgap*")  # which a process that is killed cannot remove
    shutil.rmtree(copy)
    first, second = together([[command("compare", weights, out, "--resume")]] * 2, tmp_path)
    assert first[0] == second[0] == "wrote network 2"
    assert "wrote network 0" not in first + second
    assert_same(out, alone / "compare")
    assert_nothing_else(tmp_path, "out")


def test_a_failure_of_one_ends_all(weights, tmp_path):
    """A folder that is taken, which the first process alone finds."""
    out = tmp_path / "out"
    with held(out):
        assert together([[command("compare", weights, out)]] * 2, tmp_path) == [["left with 2"]] * 2
    assert_nothing_else(tmp_path)


def test_processes_with_other_settings_do_not_join_a_run(weights, tmp_path):
    commands = [[command("compare", weights, tmp_path / name)] for name in ("one", "two")]
    assert together(commands, tmp_path) == [["left with 2"]] * 2
    assert_nothing_else(tmp_path)


def test_other_studies_are_measured_by_one_process(tmp_path):
    config: Any = None
    with pytest.raises(ValueError, match="release measures a run in one process only"):
        run_joined(find("release"), config, tmp_path / "out", resume=False, command="", progress=False)
