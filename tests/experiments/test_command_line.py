"""What the command line says of settings and of paths that it refuses, and where it runs."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import experiments.frame.study
from dit_jax import job
from dit_jax.disk import from_home
from dit_jax.lock import held
from experiments import cli


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pairs", "1"], "the settings: pairs must be at least 2"),
        (["--couplings", "0.5", "1"], "the settings: couplings must hold 0"),
        (["--pairs", "x"], "parsing --pairs"),
    ],
)
def test_an_error_names_the_setting_and_nothing_of_the_parser(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *flags])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert "tyro" not in text
    assert len({len(line) for line in text.splitlines()}) == 1  # the box keeps its shape


def test_training_says_what_it_reads_in_the_order_of_the_labels(tmp_path, monkeypatch, capsys):
    for name, level in (("1", 10), ("10", 20), ("2", 30)):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / "set" / name / "a.png")
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "labels.txt").write_text("10\n1\n")
    trained_on = []

    def no_training(data, *_, **__):
        trained_on.append(data.class_names)
        raise ValueError("far enough")

    monkeypatch.setattr("dit_jax.training.train", no_training)
    command = ["train", str(tmp_path / "set"), str(tmp_path / "run"), "--size", "8", "--quiet"]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert "3 images in 3 classes, by label\n  0: 1 (1), 1: 2 (1), 2: 10 (1)\n" in said.out
    assert ".ipynb_checkpoints" in said.out
    assert "far enough" in said.err
    assert cli.main([*command, "--labels", str(tmp_path / "labels.txt")]) == 2
    assert "0: 10 (1), 1: 1 (1)" in capsys.readouterr().out
    assert trained_on == [("1", "2", "10"), ("10", "1")]
    assert cli.main(["train", "solvable", str(tmp_path / "run"), "--size", "8", "--labels", "labels.txt"]) == 2
    assert "--labels applies to folders" in capsys.readouterr().err


def test_a_path_may_begin_with_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert from_home("--out=~/x") == f"--out={tmp_path}/x"
    assert from_home("~/x") == f"{tmp_path}/x"
    for plain in ("--out=a~b", "a/~/b", "--quiet", "--a-b=c=~/d", "red panda", ""):
        assert from_home(plain) == plain
    monkeypatch.chdir(tmp_path)
    assert (
        cli.main(["sample", "photos8-natural", "--steps", "1", "--count", "1", "--classes", "0", "--quiet", "~/p"]) == 0
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p"]
    assert json.loads((tmp_path / "p" / "manifest.json").read_text())["command"].endswith("'~/p'")


@pytest.mark.parametrize("command", [[], ["compare"], ["convert"]])
def test_help_on_a_terminal_that_shows_ascii_only(command):
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    code = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", code, *command, "--help"], env=environment, capture_output=True)
    assert done.returncode == 0
    assert b"usage: syncgap" in done.stdout
    assert done.stdout.isascii()
    assert not done.stderr


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("runs/mine/modle", r"there is no folder runs/mine/modle; is it runs/mine/model\?"),
        ("run/mine/model", "there is no folder run/mine/model: .*/run/mine does not exist"),
        ("runs/mine", "runs/mine is a training run; its model is runs/mine/model"),
        ("photos8-naturl", r"no folder photos8-naturl and no shipped model .*; known: .*; is it photos8-natural\?"),
        ("dit.pt", r"dit.pt is a file; give a model folder \(syncgap convert"),
    ],
)
def test_a_mistyped_model_is_told_what_is_there(given, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "model").mkdir(parents=True)
    (tmp_path / "runs" / "mine" / "model" / "manifest.json").write_text("{}")
    (tmp_path / "dit.pt").write_text("")
    for command in (["info", given], ["sample", given, "out"], ["compare", "--weights", given, "--out", "out"]):
        assert cli.main(command) == 2
        assert re.search(said, capsys.readouterr().err)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dit.pt", "runs"]


def test_reports_are_of_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "manifest.json").write_text('{"format": "syncgap-pictures"}')
    for given, said in (
        ("runs", "there is no folder runs"),
        ("pictures", "pictures holds pictures, of which there is no"),
    ):
        assert cli.main(["report", given]) == 2
        assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [MemoryError(), RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")]
)
def test_a_lack_of_memory_is_one_line(error, tmp_path, monkeypatch, capsys):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(experiments.frame.study, "run_study", fail)
    assert cli.main(["compare", "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("syncgap: the memory does not suffice")
    assert "smaller --block" in said


def test_a_folder_that_is_being_written_is_left_alone(tmp_path, capsys):
    """By every command that writes: it is told who holds the folder, and touches nothing."""
    out = tmp_path / "out"
    commands = [["compare", "--out"], ["spectrum", "--out"], ["modalities", "--out"], ["theory", "--out"]]
    commands += [["sample", "photos8-natural"], ["convert", str(tmp_path / "x.pt")], ["train", "solvable", "--size=8"]]
    with held(out):
        for command in commands:
            assert cli.main([*command, str(out)]) == 2
            assert f"being written by process {os.getpid()}" in capsys.readouterr().err, command
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}, "this is task 2 of 4"),
        ({"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "0"}, "this is task 0 of 8"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1", "JAX_COORDINATOR_ADDRESS": "x:1"}, "this is task 1 of 2"),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, None),  # a script that runs before any srun
        ({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}, None),
        ({}, None),
    ],
)
def test_tasks_of_a_job_are_told_that_they_do_not_share_a_run(variables, said, tmp_path, monkeypatch, capsys):
    for name in {name for pair in job._VARIABLES for name in pair} | {"SLURM_NTASKS"}:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with held(tmp_path / "out"):
        assert cli.main(["release", "--out", str(tmp_path / "out")]) == 2
    text = capsys.readouterr().err
    assert "being written by process" in text
    if said is None:
        assert "this is task" not in text
    else:
        assert text.count(said) == (2 if "task 0" in said else 1)  # in the error; the first is told when it starts
        assert "syncgap sweep" in text


def test_reports_and_covariances_wait_for_no_one_either(weights, tmp_path, capsys):
    """They change what is there: of a run, of a folder of runs, of a model, of a model whose training goes on."""
    model, training = Path(weights), tmp_path / "training"
    (tmp_path / "runs").mkdir()
    (training / "model").mkdir(parents=True)
    (training / "run.json").write_text("{}")
    (training / "model" / "manifest.json").write_text("{}")
    for place, command in (
        (tmp_path / "runs", ["report", str(tmp_path / "runs")]),
        (model, ["covariance", str(model), str(tmp_path / "images")]),
        (training, ["covariance", str(training / "model"), str(tmp_path / "images")]),
    ):
        with held(place):
            assert cli.main(command) == 2
            assert f"being written by process {os.getpid()}" in capsys.readouterr().err, command
