"""What is stored is what was measured: flipped bits, lost chunks, lost groups, leftovers, malformed manifests."""

import base64
import json
import re
import shutil
from urllib.parse import unquote

import numpy as np
import pytest
import xarray as xr
from counting_study import Counting, edit_json, mended, settings

from experiments import cli
from experiments.frame.reader import open_run
from experiments.frame.settings import StudyConfig
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import Study, joint_page, report, run_study
from experiments.studies.modalities.settings import ModalitiesConfig

GROUP = "data.zarr/network"


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


def test_what_is_stored_without_a_meaning_is_refused(weights, tmp_path):
    counting = Counting()
    study = Study("counting", StudyConfig, counting.measure, counting.page, counting.analyse)
    with pytest.raises(ValueError, match="no meaning and units of: name, value"):
        run_study(study, settings(weights), tmp_path / "run", progress=False)
