"""What is stored is what was measured: flipped bits, lost chunks, lost groups, leftovers, malformed manifests."""

import base64
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from urllib.parse import unquote

import numpy as np
import pytest
import xarray as xr
from matplotlib.figure import Figure

from dit_jax.checkpoint import load_model, save_model
from experiments import cli
from experiments.frame import folder
from experiments.frame.bench import _together
from experiments.frame.measured import Measured
from experiments.frame.page import Page, Section
from experiments.frame.reader import open_run
from experiments.frame.settings import StudyConfig
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import Study, joint_page, report, run_study
from experiments.frame.subject import untrained_model
from experiments.studies.modalities.settings import ModalitiesConfig

GROUP = "data.zarr/network"


class Counting:
    """A study whose measurements are numbers that follow from pair and step, and are counted."""

    def __init__(self):
        self.measured: list[list[int]] = []
        self.of_all: list[float] = []
        meaning = {
            "mean": ("mean over pairs", "nat"),
            "name": ("a name", "1"),
            "value": ("a value", "1"),
            "k": ("which", "1"),
        }
        self.study = Study("counting", StudyConfig, self.measure, self.page, self.analyse, meaning)

    def measure(self, bench):
        def block(pairs, labels):
            self.measured.append(list(pairs))
            return {"level": np.add.outer(pairs, np.arange(5.0)), "blank": np.full((len(pairs), 5), np.nan)}

        variables = {"level": (("step",), "a number", "nat"), "blank": (("step",), "nothing")}
        found = bench.measure("network", variables, {}, bench.config.pairs, block)
        mean = float(found.level.isel(step=0).mean())

        def beside(pairs, labels):
            self.of_all.extend(map(float, pairs))
            return {"level": np.full((len(pairs), 5), mean)}

        bench.measure("beside", {"level": variables["level"]}, {}, bench.config.pairs, beside, of_all=True)
        bench.whole("more", lambda: xr.Dataset({"name": ("k", ["one", "two"]), "value": ("k", [1.5, 2.5])}))

    @staticmethod
    def analyse(measured):
        assert measured.load("more").value.sum() == 4
        return xr.Dataset({"mean": measured.load("network").level.mean("pair")})

    @staticmethod
    def page(measured: Measured, analysis: xr.Dataset) -> Page:
        return Page(Section("Counting", "How many?", f"{float(analysis['mean'][0]):.2f}", captions={"one": "One."}),
                    {"one": lambda: Figure((1, 1))})  # fmt: skip


def settings(weights):
    return StudyConfig(weights=weights, pairs=5, block=2, steps="5")


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "whole"
    run_study(Counting().study, settings(weights), out, progress=False)
    return out


@pytest.fixture
def copy(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def mended(weights, out, whole) -> list[list[int]]:
    """Resumes a run, checks that it is as good as new, and says which pairs were measured for that."""
    counting = Counting()
    run_study(counting.study, settings(weights), out, resume=True, progress=False)
    for group in ("network", "beside", "more", "analysis"):
        xr.testing.assert_identical(RunFolder.open(out).load(group), RunFolder.open(whole).load(group))
    assert RunFolder.open(out).manifest["status"] == "complete"
    return counting.measured


def chunks(out, group):
    return sorted(path for path in (out / "data.zarr" / group).rglob("*") if path.is_file() and "/c" in str(path))


def test_every_flipped_bit_of_every_chunk_is_found_and_mended(weights, whole, tmp_path):
    """Measurements, coordinates, what was written whole, and the analysis."""
    rng = np.random.default_rng(0)
    files = [path.relative_to(whole) for group in ("network", "more", "analysis") for path in chunks(whole, group)]
    assert len(files) > 15
    blocks = {"0": [0, 1], "1": [2, 3], "2": [4]}
    # together where nothing is measured again, and by the block where something is
    mending: dict[str, list] = {}
    for file in files:
        data = bytearray((whole / file).read_bytes())
        data[rng.integers(len(data))] ^= 1 << int(rng.integers(8))
        group, variable = file.parts[1:3]
        block = file.parts[4] if variable in ("level", "blank") else None
        mending.setdefault(f"{variable}-{block}" if block else "again", []).append((file, bytes(data), block))
        out = shutil.copytree(whole, tmp_path / "alone")
        (out / file).write_bytes(data)
        with pytest.raises(StoreError, match=f"group '{group}' (is|are) damaged or missing.*--resume"):
            RunFolder.open(out).load(group)
        if group != "analysis":  # which report makes again
            with pytest.raises(StoreError, match="damaged or missing"):
                report(Counting().study, RunFolder.open(out, writable=True))
        shutil.rmtree(out)
    assert len(mending) == 7
    for name, damaged in mending.items():
        out = shutil.copytree(whole, tmp_path / name)
        for file, data, _ in damaged:
            (out / file).write_bytes(data)
        assert mended(weights, out, whole) == [blocks[block] for *_, block in damaged if block], name


@pytest.mark.parametrize("variable", ["level", "blank"])
def test_a_lost_chunk_is_named_and_measured_again_and_only_it(weights, whole, copy, variable):
    """Of missing values, too, which would read as what they are."""
    (copy / GROUP / variable / "c/1/0").unlink()
    with pytest.raises(StoreError, match=r"pairs 2 to 3 of group 'network' are damaged or missing.*--resume"):
        report(Counting().study, RunFolder.open(copy, writable=True))
    assert mended(weights, copy, whole) == [[2, 3]]


@pytest.mark.parametrize(("lost", "again"), [("network", [[0, 1], [2, 3], [4]]), ("more", []), ("analysis", [])])
def test_a_lost_group_is_an_error_and_is_made_again(weights, whole, copy, lost, again):
    shutil.rmtree(copy / "data.zarr" / lost)
    if lost == "analysis":
        report(Counting().study, RunFolder.open(copy, writable=True))  # it follows from the others
    else:
        with pytest.raises(StoreError, match=f"no group '{lost}'"):
            report(Counting().study, RunFolder.open(copy, writable=True))
    assert mended(weights, copy, whole) == again


@pytest.mark.parametrize("swap", [False, True])
def test_a_chunk_in_another_ones_place_is_found_and_its_block_is_measured_again(weights, whole, copy, swap):
    """Each is sound in itself."""
    first, second = (copy / GROUP / "level" / "c" / str(i) / "0" for i in (0, 1))
    bytes_of = [path.read_bytes() for path in (first, second)]
    second.write_bytes(bytes_of[0])
    if swap:
        first.write_bytes(bytes_of[1])
    named = "pairs 0 to 1, 2 to 3" if swap else "pairs 2 to 3"
    for read in (lambda: open_run(copy), lambda: report(Counting().study, RunFolder.open(copy, writable=True))):
        with pytest.raises(StoreError, match=f"{named} of group 'network' are damaged or missing"):
            read()
    assert mended(weights, copy, whole) == ([[0, 1], [2, 3]] if swap else [[2, 3]])


def edit_json(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("edit", ["another's", "shape", "type", "dimensions"])
def test_a_description_that_was_changed_costs_its_group(weights, whole, copy, edit):
    path = copy / GROUP / "level" / "zarr.json"
    if edit == "another's":
        path.write_text((copy / GROUP / "pair" / "zarr.json").read_text())
    else:
        changes = {
            "shape": {"shape": [5, 4]},
            "type": {"data_type": "int32", "fill_value": 0},
            "dimensions": {"dimension_names": ["step", "pair"]},
        }
        edit_json(path, **changes[edit])
    with pytest.raises(StoreError, match=r"group 'network' .* damaged or missing; the same command with --resume"):
        open_run(copy)
    assert mended(weights, copy, whole) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize("group", ["network", "more", "analysis"])
def test_no_group_is_missed_in_silence(copy, group):
    shutil.rmtree(copy / "data.zarr" / group)
    with pytest.raises(StoreError, match=f"no group '{group}'; the same command with --resume makes it again"):
        open_run(copy)


def test_blocks_that_cannot_be_are_named_and_forgotten(weights, whole, copy):
    edit_json(copy / "manifest.json", blocks={"network": [0, 1, 2, 4, 400]})
    with pytest.raises(StoreError, match="blocks of group 'network' that it cannot have: \\[1, 400\\]"):
        open_run(copy)
    assert mended(weights, copy, whole) == []


def test_a_run_without_digests_is_an_older_one_and_is_read(whole, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    del manifest["digests"]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    xr.testing.assert_identical(open_run(copy)["network"].to_dataset(), open_run(whole)["network"].to_dataset())


def test_going_on_under_another_version_is_said(weights, whole, copy, capsys):
    edit_json(copy / "manifest.json", python="2.7", status="running")
    assert mended(weights, copy, whole) == []
    said = capsys.readouterr().err
    assert "resumed with another device or version, so last digits may differ (python: 2.7 -> 3" in said


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5, "a"])
def test_seeds_that_keys_would_not_tell_apart_are_refused(seed):
    for config in (StudyConfig, ModalitiesConfig):
        with pytest.raises(ValueError, match="seed must be a whole number from 0"):
            config(seed=seed)


@pytest.mark.parametrize("lost", ["network/zarr.json", "network/level/zarr.json", "network/level"])
def test_a_lost_description_costs_its_group(weights, whole, copy, lost):
    path = copy / "data.zarr" / lost
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.write_text("{")
    with pytest.raises(StoreError):
        report(Counting().study, RunFolder.open(copy, writable=True))
    assert mended(weights, copy, whole) == [[0, 1], [2, 3], [4]]


def test_a_block_that_the_manifest_does_not_know_is_measured_again(weights, whole, copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["blocks"]["network"] = [0, 4]
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"pairs 2 to 3 of group 'network' are not measured yet.*--resume"):
        report(Counting().study, RunFolder.open(copy, writable=True))
    assert mended(weights, copy, whole) == [[2, 3]]


def test_leftovers_of_a_kill_are_swept(weights, whole, copy):
    left = [copy / GROUP / "level/c/0/0.3f2a.partial", copy / ".analysis.partial", copy / "figures/.one.svg.partial"]
    for path in left:
        path.write_bytes(b"half")
    RunFolder.open(copy)  # a reader changes nothing
    assert all(path.exists() for path in left)
    RunFolder.open(copy, writable=True)
    assert not any(path.exists() for path in left)
    left[0].write_bytes(b"half")
    assert mended(weights, copy, whole) == []
    assert not list(copy.rglob("*.partial"))


@pytest.mark.parametrize(
    ("entry", "value"),
    [
        ("blocks", "network"),
        ("blocks", ["network"]),
        ("blocks", {"network": "0"}),
        ("blocks", {"network": [0, -2]}),
        ("blocks", {"network": [True]}),
        ("settings", []),
        ("timings", None),
        ("versions", "1.0"),
        ("resumed", {}),
        ("resumed", ["yesterday"]),
        ("status", 1),
        ("status", "done"),
        ("timings", {"measuring_s": "long"}),
        ("blocks", {"network": [0, 0]}),
        ("digests", {"network": "0"}),
    ],
)
def test_a_malformed_manifest_is_one_clear_error(copy, capsys, entry, value):
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps({**manifest, entry: value}))
    with pytest.raises(StoreError, match=rf"manifest\.json is malformed in {entry}"):
        RunFolder.open(copy)
    assert cli.main(["report", str(copy)]) == 2
    assert "malformed" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["[]", "{}", '{"claims": {}}', '{"claims": [1]}', "{"])
def test_malformed_claims_and_sections_are_one_clear_error(copy, capsys, text):
    (copy / "claims.json").write_text(text)
    assert cli.main(["report", str(copy.parent)]) == 2
    assert "claims.json" in capsys.readouterr().err
    (copy / "section.json").write_text(text)
    assert cli.main(["report", str(copy.parent)]) == 2
    assert "syncgap: " in capsys.readouterr().err


def test_settings_that_cannot_be_used_are_one_clear_error(copy):
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["settings"]["pairs"] = 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(StoreError, match=r"settings that cannot be used .*pairs must be at least 2"):
        report(Counting().study, RunFolder.open(copy, writable=True))


@pytest.mark.parametrize("stage", ["analyse", "page", "store_page", "write_page"])
def test_what_fails_after_measuring_is_finished_by_report_and_by_resume(weights, whole, tmp_path, monkeypatch, stage):
    counting = Counting()

    def fail(*_, **__):
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        if stage in ("analyse", "page"):
            study = Study(
                "counting",
                StudyConfig,
                counting.measure,
                definitions=counting.study.definitions,
                **{"page": counting.page, "analyse": counting.analyse, stage: fail},
            )
        else:
            study = counting.study
            patched.setattr(f"experiments.frame.study.{stage}", fail)
        with pytest.raises(OSError, match="no space left"):
            run_study(study, settings(weights), tmp_path / "run", progress=False)
    assert RunFolder.open(tmp_path / "run").manifest["status"] == "running"
    other = shutil.copytree(tmp_path / "run", tmp_path / "other")
    report(Counting().study, RunFolder.open(tmp_path / "run", writable=True))
    run = RunFolder.open(tmp_path / "run")
    assert run.manifest["status"] == "complete"
    assert {"measuring_s", "analysis_s"} <= set(run.manifest["timings"])
    assert "not finished" not in (run.path / "report.html").read_text()
    assert mended(weights, other, whole) == []


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


def spoiled(run, name):
    """A run of which one thing cannot be shown."""
    section = json.loads((run / "section.json").read_text())
    if name == "claims":
        (run / "claims.json").write_text("{")
    elif name == "outside":
        section["captions"] = {"../../secret": "A file of another folder."}
    else:
        (run / "figures" / "one.svg").unlink()
        (run / "figures" / "one.svg").symlink_to(run.parent / "secret.svg")
    (run / "section.json").write_text(json.dumps(section))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("claims", "claims.json cannot be read"),
        ("outside", "names a figure outside of"),
        ("link", "names a figure outside of"),
    ],
)
def test_a_run_that_cannot_be_shown_is_left_out_with_the_reason(whole, tmp_path, capsys, name, said):
    """It does not cost the page of all others, and nothing beside a run's figures gets into a page."""
    (tmp_path / "secret.svg").write_text("<svg>SECRET</svg>")
    for each in ("good", "bad"):
        shutil.copytree(whole, tmp_path / each)
    spoiled(tmp_path / "bad", name)
    text = joint_page(tmp_path, lambda study: None).read_text()
    assert said in text
    assert f"left out: bad: {tmp_path / 'bad'}" in capsys.readouterr().err.replace("the section of ", "")
    assert 'id="good"' in text
    assert 'id="bad"' not in text
    assert base64.b64encode(b"<svg>SECRET</svg>").decode() not in text


def test_a_joint_page_says_with_what_each_run_was_made(whole, tmp_path):
    """And leads to runs by paths, whatever they are called."""
    names = ["javascript:alert(1)", "a b#c?d", "100%"]
    for name in names:
        shutil.copytree(whole, tmp_path / name)
    text = joint_page(tmp_path, lambda study: None).read_text()
    links = re.findall(r'href="([^"]*)"', text)
    assert sorted(links) == [
        "./100%25/report.html",
        "./a%20b%23c%3Fd/report.html",
        "./javascript%3Aalert%281%29/report.html",
    ]
    assert all((tmp_path / unquote(link)).is_file() for link in links)
    (table,) = re.findall(r'id="runs-table".*?</table>', text, re.S)
    cells = re.findall(r"<t[dh][^>]*>([^<]*)</t[dh]>", table)
    assert cells[:8] == ["Run", "Study", "Of", "pairs", "steps", "sampler", "guidance", "seed"]
    assert cells[8:15] == ["counting", "tiny", "5", "5", "ddim", "1.0", "0"]


def test_other_settings_do_not_go_on_with_a_run(weights, copy):
    with pytest.raises(StoreError, match="seed: 0 -> 1"):
        run_study(Counting().study, replace(settings(weights), seed=1), copy, resume=True, progress=False)


def test_report_recomputes_the_analysis_from_what_was_measured(copy):
    run = RunFolder.open(copy, writable=True)
    analysis = run.load("analysis")
    run.put("analysis", analysis + 1)
    report(Counting().study, run)
    xr.testing.assert_identical(run.load("analysis"), analysis)


def test_all_of_a_run_is_read_by_name(whole):
    tree = open_run(whole)
    assert set(tree.children) == {"network", "beside", "more", "analysis"}
    assert tree.attrs["kind"] == "counting"
    assert float(tree["network"]["level"].sel(pair=3, step=2)) == 5
    for group in tree.children.values():
        for name, variable in group.dataset.variables.items():
            assert {"long_name", "units"} <= set(variable.attrs), name


def test_couplings_of_older_runs_are_found_by_what_was_asked_for(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    run.put("old", xr.Dataset({"x": ("coupling", [1.0, 2.0])}, {"coupling": np.float32([0.2, 0.35])}))
    assert float(open_run(tmp_path / "run")["old"].x.sel(coupling=0.35)) == 2


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


def test_what_is_stored_without_a_meaning_is_refused(weights, tmp_path):
    counting = Counting()
    study = Study("counting", StudyConfig, counting.measure, counting.page, counting.analyse)
    with pytest.raises(ValueError, match="no meaning and units of: name, value"):
        run_study(study, settings(weights), tmp_path / "run", progress=False)
