"""Parts of one run, by several processes, join to what one process measures; others are refused with the reason."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from dit_jax import disk
from experiments import cli
from experiments.frame import parts as joining
from experiments.frame.collection import runs_in
from experiments.frame.page import Page, Section
from experiments.frame.parts import merge
from experiments.frame.settings import StudyConfig
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import Study, report, run_study
from experiments.studies.compare.settings import CompareConfig

pytestmark = pytest.mark.usefixtures("blank_figures")

SPANS = ((0, 4), (4, 2), (6, 3))  # first pair and pairs of each part: the last one ends in the middle of a block


def measure(bench):
    config = bench.config
    start = {"first_pair": config.first_pair}

    def block(pairs, labels):
        return {"level": np.add.outer(np.sqrt(pairs), labels[:, None] * np.arange(5.0))[:, 0]}

    variables = {"level": (("step",), "a number")}
    network = bench.measure("network", variables, {}, config.pairs, block, **start)
    count = min(config.untrained_pairs, config.end) - config.first_pair
    if count > 0:
        bench.measure("untrained", variables, {}, count, block, **start)
    if not config.first_pair:
        bench.whole("mean", lambda: xr.Dataset({"mean": network.level.mean()}), of_all=True)


def page(measured, analysis):
    section = Section("Parts", "How many?", f"{float(measured.load('mean')['mean']):.6f}", captions={"one": "One."})
    return Page(section, {"one": lambda: Figure((1, 1))})


STUDY = Study("compare", CompareConfig, measure, page, definitions={"mean": ("mean over pairs", "1")})


@pytest.fixture(scope="module")
def settings(weights):
    return CompareConfig(weights=weights, pairs=9, block=2, steps="5", untrained_pairs=5)


def run(out, settings, **changed):
    run_study(STUDY, replace(settings, **changed), out, progress=False)
    return out


@pytest.fixture(scope="module")
def whole(settings, tmp_path_factory):
    return RunFolder.open(run(tmp_path_factory.mktemp("whole") / "run", settings))


@pytest.fixture(scope="module")
def parts(settings, tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    return [run(root / str(first), settings, first_pair=first, pairs=count) for first, count in SPANS]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_joined_parts_are_what_one_process_measures(whole, parts, tmp_path, order):
    merge(STUDY, [parts[i] for i in order], tmp_path / "run", progress=False)
    joined = RunFolder.open(tmp_path / "run")
    assert joined.manifest["digests"] == whole.manifest["digests"]  # of the bytes of every chunk and description
    assert joined.manifest["settings"] == whole.manifest["settings"]
    for group in whole.groups:
        xr.testing.assert_identical(joined.load(group), whole.load(group))
    assert joined.read_json("section.json") == whole.read_json("section.json")
    assert joined.manifest["status"] == "complete"
    text = (tmp_path / "run" / "report.html").read_text()
    assert 'id="run-one"' in text  # ids and addresses are those of the folder
    assert "partial" not in text
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


class Killed(BaseException):
    """Stands in for a kill: nothing is tidied up."""


@pytest.mark.parametrize("at", ["_join", "run_held"])
def test_joining_that_is_killed_is_done_again_by_the_same_command(whole, parts, tmp_path, monkeypatch, at):
    """In the middle of the arrays, or before the analysis."""
    made, calls = getattr(joining, at), []

    def killed(*args, **options):
        calls.append(args)
        if len(calls) == (2 if at == "_join" else 1):
            raise Killed
        return made(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(joining, at, killed)
        patch.setattr(disk, "_remove", lambda directory: None)
        with pytest.raises(Killed):
            merge(STUDY, parts, tmp_path / "run", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == [".run.partial"]
    assert runs_in(tmp_path) == ({}, {})  # which no one takes for a run
    merge(STUDY, parts, tmp_path / "run", progress=False)
    assert RunFolder.open(tmp_path / "run").manifest["digests"] == whole.manifest["digests"]
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_parts_that_do_not_make_up_a_run_are_refused(settings, parts, tmp_path):
    other = run(tmp_path / "other", settings, first_pair=4, pairs=2, seed=1)
    unfinished = RunFolder.open(shutil.copytree(parts[1], tmp_path / "unfinished"), writable=True)
    unfinished._update(status="running")
    for given, said in (
        ([parts[0], parts[2]], "pairs 4 to 5 are in no part"),
        ([parts[0], parts[0]], "they overlap"),
        (parts[1:], "no part has the pairs 0 to 3"),
        ([parts[0], other], "are no parts of one run: settings.seed: 0 -> 1"),
        ([parts[0], unfinished.path], "is not finished; continue it with --resume"),
    ):
        with pytest.raises(StoreError, match=said):
            merge(STUDY, given, tmp_path / "run", progress=False)
        assert not (tmp_path / "run").exists()
    with pytest.raises(StoreError, match="holds another run"):
        merge(STUDY, parts, parts[0], progress=False)


def test_a_part_has_no_page_and_says_what_it_is(parts, capsys):
    assert not (parts[1] / "report.html").exists()
    with pytest.raises(StoreError, match="is a part of a run, which has no page of its own; `syncgap merge`"):
        report(STUDY, RunFolder.open(parts[1], writable=True))
    runs, others = runs_in(parts[0].parent)
    assert list(runs) == ["0"]
    assert others == dict.fromkeys("46", "a part of a run; join it with the others by `syncgap merge`")
    assert cli.main(["merge", str(parts[1]), "--out", str(parts[1].parent / "x")]) == 2
    assert "at least two parts" in capsys.readouterr().err


def test_parts_begin_where_blocks_do(settings):
    with pytest.raises(ValueError, match="first_pair must be a multiple of the block of 2 pairs"):
        replace(settings, first_pair=3)
    with pytest.raises(ValueError, match="first_pair"):
        replace(settings, first_pair=-2)


def test_other_studies_are_not_measured_in_parts(parts, tmp_path, capsys):
    with pytest.raises(StoreError, match="runs of other cannot be measured in parts; compare can"):
        merge(replace(STUDY, name="other", config=StudyConfig), parts, tmp_path / "run")
    with pytest.raises(SystemExit):
        cli.main(["depth", "--first-pair", "4"])
    assert "--first-pair" in capsys.readouterr().err
