"""What a run folder promises: nothing half-written, nothing mixed, the same bits after an interruption."""

import json
import os
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import jax
import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from experiments.frame import folder, manifest, store
from experiments.frame.chunks import files_of
from experiments.frame.store import RunFolder, StoreError

PAIRS, BLOCK = 7, 2
FIRSTS = range(0, PAIRS, BLOCK)
SETTINGS = {"couplings": (0.0, 0.5), "pairs": PAIRS, "model": {"depth": 2, "name": "tiny"}}


def measured() -> xr.Dataset:
    rng = np.random.default_rng(0)
    energy = rng.random((2, PAIRS, 3), np.float32)
    energy[1, 5] = np.nan  # a value that was measured as NaN is not a hole
    return xr.Dataset(
        {
            "energy": (("coupling", "pair", "step"), energy, {"units": "1", "long_name": "mean square"}),
            "state_energy": (("pair", "step"), rng.random((PAIRS, 3), np.float32), {"units": "1"}),
        },
        coords={
            "coupling": ("coupling", [0.0, 0.5], {"long_name": "gate"}),
            "pair": np.arange(PAIRS),
            "label": ("pair", np.arange(PAIRS) % 3),
            "class_name": ("pair", [f"class {i % 3}" for i in range(PAIRS)]),
            "parity": ["common", "difference"],
        },
        attrs={"title": "a test"},
    )


def template() -> xr.Dataset:
    full = measured()
    return full.assign({name: xr.full_like(variable, np.nan) for name, variable in full.data_vars.items()})


def write_block(run, first):
    run.write("network", measured().isel(pair=slice(first, first + BLOCK)), first)


def started(path, **options) -> RunFolder:
    run = RunFolder.create(path, SETTINGS, **options)
    run.declare("network", template(), chunk=BLOCK)
    return run


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, bytes]:
    """The stored arrays of a run that was never interrupted."""
    run = started(tmp_path_factory.mktemp("whole") / "run")
    for first in FIRSTS:
        write_block(run, first)
    return files(run.path / "data.zarr")


def test_manifest_says_what_was_run(tmp_path):
    run = RunFolder.create(tmp_path / "a" / "run", SETTINGS, command="syncgap compare", extra={"weights_digest": "ab"})
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert manifest["settings"] == {"couplings": [0.0, 0.5], "pairs": 7, "model": {"depth": 2, "name": "tiny"}}
    assert manifest["status"] == "running"
    assert manifest["finished"] is None
    assert (manifest["command"], manifest["weights_digest"]) == ("syncgap compare", "ab")
    assert manifest["versions"]["numpy"] == np.__version__
    assert manifest["versions"].keys() >= {"jax", "flax", "xarray", "zarr", "syncgap"}
    assert manifest.keys() >= {"python", "device", "platform", "git_revision", "started"}
    assert manifest["numerics"] == {"generator": "threefry2x32", "x64": False, "matmul_precision": None}
    run.note(sampling_s=1.5)
    run.finish()
    manifest = json.loads((run.path / "manifest.json").read_text())
    assert (manifest["status"], manifest["timings"]) == ("complete", {"sampling_s": 1.5})
    assert manifest["finished"] >= manifest["started"]
    assert RunFolder.open(run.path).manifest == manifest


@given(order=st.permutations(list(FIRSTS)))
@settings(max_examples=5, deadline=None)
def test_blocks_in_any_order_make_up_the_dataset(tmp_path_factory, whole, order):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # zarr warns of what is not in its format's specification
        run = started(tmp_path_factory.mktemp("order") / "run")
        for count, first in enumerate(order):
            assert run.finished("network") == set(order[:count])
            write_block(run, first)
        loaded = run.load("network", partial=True)
    xr.testing.assert_identical(loaded, measured())
    assert loaded.energy.dtype == np.float32
    assert files(run.path / "data.zarr") == whole


def test_a_declared_group_is_empty_and_described(tmp_path):
    run = started(tmp_path / "run")
    xr.testing.assert_identical(run.load("network", partial=True), template())
    assert run.finished("network") == run.finished("other") == set()
    write_block(run, 2)
    hole = np.isnan(run.load("network", partial=True).state_energy).all("step").values
    np.testing.assert_array_equal(hole, [True, True, False, False, True, True, True])
    run.declare("network", template())  # is there already
    assert run.finished("network") == {2}
    assert not np.isnan(run.load("network", partial=True).state_energy.values[2:4]).any()


def test_coordinates_may_be_all_zero(tmp_path):
    """A network of one layer has the coordinate 0 and nothing else, which is also what stands for a missing chunk."""
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    coords = {"layer": [0], "label": ("pair", [0] * PAIRS), "level": [0.0], "name": [""]}
    dims = ("pair", "layer", "level", "name")
    run.declare("network", xr.Dataset({"found": (dims, np.empty((PAIRS, 1, 1, 1)))}, coords=coords), chunk=PAIRS)
    run.write("network", xr.Dataset({"found": (dims, np.ones((PAIRS, 1, 1, 1)))}), 0)
    found = RunFolder.open(run.path).load("network")
    assert found.layer.values.tolist() == [0]
    assert found.label.values.tolist() == [0] * PAIRS
    assert found.level.values.tolist() == [0.0]
    assert found.name.values.tolist() == [""]


def test_values_of_the_template_do_not_count(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    run.declare("network", measured())
    assert np.isnan(run.load("network", partial=True).energy).all()


def fail_at_zarr(monkeypatch):
    monkeypatch.setattr(xr.Dataset, "to_zarr", raise_disk_full)
    monkeypatch.setattr(store, "write_region", raise_disk_full)


def fail_between_variables(monkeypatch):
    """The disk fills up when half of the block's chunks are written."""
    from zarr.storage import LocalStore

    original, count = LocalStore.set, iter(range(100))

    async def limited(self, key, value):
        if "/c/" in key and next(count) >= 1:
            raise_disk_full()
        await original(self, key, value)

    monkeypatch.setattr(LocalStore, "set", limited)


def fail_at_the_manifest(monkeypatch):
    monkeypatch.setattr(folder, "write_json", raise_disk_full)


def raise_disk_full(*_, **__):
    raise OSError("no space left on device")


@pytest.mark.parametrize("failure", [fail_at_zarr, fail_between_variables, fail_at_the_manifest])
def test_a_write_that_fails_midway_costs_one_block_and_resumes_to_the_same_bits(tmp_path, whole, failure):
    run = started(tmp_path / "run")
    write_block(run, 0)
    before = (run.path / "manifest.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        failure(patch)
        with pytest.raises(OSError, match="no space left"):
            write_block(run, 2)
    assert (run.path / "manifest.json").read_bytes() == before
    assert run.finished("network") == {0}
    kept = run.load("network", partial=True).isel(pair=slice(0, 2))
    xr.testing.assert_identical(kept, measured().isel(pair=slice(0, 2)))

    again = started(run.path, resume=True)
    assert again.finished("network") == {0}
    for first in set(FIRSTS) - again.finished("network"):
        write_block(again, first)
    assert files(run.path / "data.zarr") == whole
    assert not list(run.path.rglob("*partial*"))


def test_what_the_manifest_calls_finished_is_on_the_disk_before(tmp_path, monkeypatch):
    """What a loss of power leaves. At every move that makes a manifest, the files of all that it names, the folders
    that lead there, and the manifest itself have been synced."""
    synced, seen, fsync, replace = set(), [], os.fsync, os.replace

    def recording(descriptor):
        fsync(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        synced.add((path, path.stat().st_ino))

    def moving(source, target):
        if Path(target).name == "manifest.json":
            named = json.loads(Path(source).read_text())
            groups = {name: tmp_path / "run" / "data.zarr" / name for name in named["blocks"]}
            needed = {Path(source), *(path for group in groups.values() for path in group.rglob("zarr.json"))}
            for name, done in named["blocks"].items():
                for first in done:
                    files = files_of(groups[name], first)
                    folders = {p for file in files for p in file.parents if p.is_relative_to(groups[name])}
                    needed |= {*files, *folders}
            for name in set(named["digests"]) - set(named["blocks"]):
                partial = tmp_path / "run" / f".{name}.partial"
                needed |= set(partial.rglob("*")) if partial.exists() else set()
            assert all((path, path.stat().st_ino) in synced for path in needed)
            seen.append(len(needed))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", recording)
    monkeypatch.setattr(os, "replace", moving)
    run = started(tmp_path / "run")
    write_block(run, 0)
    write_block(run, 2)
    run.put("more", measured())
    assert {(path, path.stat().st_ino) for path in (tmp_path, run.path)} <= synced  # where run and manifest have names
    assert len(seen) == 6
    assert seen[4] > seen[3] > seen[2] > 5
    assert seen[5] > 10


@pytest.mark.parametrize(
    "action", [lambda run: write_block(run, 2), lambda run: run.put("more", measured()), lambda run: run.note(a_s=1)]
)
def test_a_run_whose_folder_goes_away_says_so_and_makes_no_new_one(tmp_path, action):
    run = started(tmp_path / "run")
    write_block(run, 0)
    shutil.move(run.path, tmp_path / "elsewhere")
    with pytest.raises(StoreError, match="run was removed or moved while it was written"):
        action(run)
    assert not run.path.exists()


def test_a_group_that_was_half_declared_or_lost_starts_afresh(tmp_path):
    run = started(tmp_path / "run")
    write_block(run, 0)
    shutil.rmtree(run.path / "data.zarr")
    again = started(run.path, resume=True)
    assert again.finished("network") == set()
    assert np.isnan(again.load("network", partial=True).energy).all()


def test_a_lost_group_forgets_its_blocks_before_it_is_made_again(tmp_path, monkeypatch):
    run = started(tmp_path / "run")
    write_block(run, 0)
    shutil.rmtree(run.path / "data.zarr")
    fail_at_zarr(monkeypatch)
    with pytest.raises(OSError, match="no space left"):
        started(run.path, resume=True)
    assert RunFolder.open(run.path).finished("network") == set()


def test_put_replaces_a_group_in_one_move(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    flags = measured().assign(weak=("pair", np.arange(PAIRS) > 3), image=("pair", np.arange(PAIRS, dtype=np.uint8)))
    run.put("analysis", measured())
    run.put("analysis", flags)
    xr.testing.assert_identical(run.load("analysis"), flags)
    assert run.load("analysis").weak.dtype == bool
    assert run.load("analysis").image.dtype == np.uint8
    before = files(run.path)
    moves = iter(range(10))
    replace = os.replace

    def fail_second(source, target):
        if next(moves) == 1:
            raise_disk_full()
        replace(source, target)

    for name, failure in (("replace", fail_second), ("replace", raise_disk_full)):
        monkeypatch.setattr(store.os, name, failure)
        with pytest.raises(OSError, match="no space left"):
            run.put("analysis", measured())
        monkeypatch.undo()
        assert files(run.path) == before


def test_a_put_that_was_killed_between_its_moves_is_undone(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    run.put("analysis", measured())
    (run.path / "data.zarr/analysis").rename(run.path / "data.zarr/.analysis.previous")
    xr.testing.assert_identical(RunFolder.open(run.path).load("analysis"), measured())


def test_any_xarray_reads_the_arrays(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    run.put("analysis", measured())
    (call,) = re.findall(r"``(xr\.open_datatree\(.*?\))``", store.__doc__)
    with warnings.catch_warnings(action="error"):
        tree = eval(call, {"xr": xr, "folder": run.path})
    np.testing.assert_array_equal(tree["analysis"].energy, measured().energy)
    shown = call.replace('folder / "data.zarr"', '"runs/small/data.zarr"')
    assert f"`{shown}`" in (Path(__file__).parents[2] / "docs" / "studies.md").read_text()


def test_labels_select_after_loading(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    run.put("analysis", xr.Dataset({"gap": ("source", [1.0, 2.0])}, coords={"source": ["network", "ideal gain"]}))
    assert run.load("analysis").gap.sel(source="ideal gain") == 2.0


def test_resuming_needs_the_same_settings(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS, extra={"weights_digest": "ab"})
    before = (run.path / "manifest.json").read_bytes()
    other = {"couplings": (0.0, 0.6), "pairs": 8, "model": {"depth": 3, "name": "tiny"}, "seed": 1}
    with pytest.raises(StoreError) as error:
        RunFolder.create(run.path, other, resume=True, extra={"weights_digest": "cd"})
    for line in (
        "settings.couplings: [0.0, 0.5] -> [0.0, 0.6]",
        "settings.model.depth: 2 -> 3",
        "settings.seed: nothing -> 1",
    ):
        assert line in str(error.value)
    assert "weights_digest: ab -> cd" in str(error.value)
    assert "name" not in str(error.value)  # what agrees is not listed, nor what may differ
    assert "pairs" not in str(error.value)
    assert (run.path / "manifest.json").read_bytes() == before
    as_lists = {**SETTINGS, "couplings": [0.0, 0.5]}
    again = RunFolder.create(run.path, as_lists, resume=True, command="again", extra={"weights_digest": "ab"})
    assert [entry["command"] for entry in again.manifest["resumed"]] == ["again"]
    assert again.manifest["started"] == run.manifest["started"]


def test_resume_records_what_changed_around_it(tmp_path, monkeypatch):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    here = store.environment()
    monkeypatch.setattr(store, "environment", lambda: {**here, "versions": {**here["versions"], "jax": "99.0"}})
    again = RunFolder.create(run.path, SETTINGS, resume=True)
    assert again.manifest["resumed"][0]["changed"] == [f"versions.jax: {here['versions']['jax']} -> 99.0"]
    assert again.manifest["versions"] == here["versions"]


def test_resume_records_other_settings_of_jax(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    with jax.default_matmul_precision("highest"):
        again = RunFolder.create(run.path, SETTINGS, resume=True)
    assert again.moved == ["numerics.matmul_precision: None -> highest"]
    assert RunFolder.create(run.path, SETTINGS, resume=True).moved == []
    manifest = json.loads((run.path / "manifest.json").read_text())
    del manifest["numerics"]  # as older runs
    (run.path / "manifest.json").write_text(json.dumps(manifest))
    assert RunFolder.create(run.path, SETTINGS, resume=True).moved == []


def test_resume_starts_where_nothing_is(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new"):
        assert RunFolder.create(tmp_path / name, SETTINGS, resume=True).manifest["resumed"] == []


def test_another_run_is_not_touched(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    with pytest.raises(StoreError, match="another run; continue it with --resume"):
        RunFolder.create(run.path, SETTINGS)


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "mine", "is no run"),
        ("manifest.json", '{"format": "syncgap-dit"}', "something else"),
        ("manifest.json", '["format"]', "something else"),
        ("manifest.json", '{"format": "syncgap-run", "for', "cannot be read"),
        ("manifest.json", '{"format": "syncgap-run", "format_version": 9}', "version 9"),
        ("manifest.json", '{"format": "syncgap-run", "format_version": 1, "status": "complete"}', "lacks command"),
    ],
)
def test_foreign_and_damaged_folders_are_refused(tmp_path, resume, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(StoreError, match=message):
        RunFolder.create(tmp_path, SETTINGS, resume=resume)
    with pytest.raises(StoreError, match="holds no run" if name == "notes.txt" else message):
        RunFolder.open(tmp_path)
    assert files(tmp_path) == {name: text.encode()}


def test_a_file_and_nothing_are_no_runs(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(StoreError, match="is no run"):
        RunFolder.create(tmp_path / "file", SETTINGS)
    for name in ("file", "nothing"):
        with pytest.raises(StoreError, match="holds no run"):
            RunFolder.open(tmp_path / name)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"settings": {"rate": float("nan")}}, "JSON-able and finite"),
        ({"settings": {"path": Path("x")}}, "JSON-able"),
        ({"settings": {}, "extra": {"status": "done"}}, "status are the store's own"),
    ],
)
def test_settings_that_cannot_be_kept_are_refused(tmp_path, arguments, message):
    with pytest.raises(StoreError, match=message):
        RunFolder.create(tmp_path / "run", **arguments)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("block", "first", "message"),
    [
        (measured().isel(pair=slice(0, 2)), 6, r"has 7 pairs, the block is \[6, 8\)"),
        (measured().isel(pair=slice(0, 0)), 0, r"the block is \[0, 0\)"),
        (measured().isel(pair=slice(0, 2)), -2, "the block is"),
        (measured().isel(pair=slice(0, 2)).drop_vars("energy"), 0, "energy.dims: .* -> nothing"),
        (measured().isel(pair=slice(0, 2), step=slice(2)), 0, r"energy.shape: \(2, 2, 3\) -> \(2, 2, 2\)"),
        (measured().isel(pair=slice(0, 2)).transpose("step", "pair", ...), 0, "energy.dims"),
        (measured().isel(pair=slice(1, 3)), 1, "cuts through a chunk of 2"),
        (measured().isel(pair=slice(0, 3)), 0, "cuts through a chunk of 2"),
    ],
)
def test_blocks_that_do_not_fit_are_refused(tmp_path, block, first, message):
    run = started(tmp_path / "run")
    with pytest.raises(StoreError, match=message):
        run.write("network", block, first)
    assert run.finished("network") == set()
    assert np.isnan(run.load("network", partial=True).energy).all()


def test_groups_are_used_as_declared(tmp_path):
    run = started(tmp_path / "run")
    with pytest.raises(StoreError, match="'other' is not declared"):
        run.write("other", measured(), 0)
    with pytest.raises(StoreError, match="written in blocks"):
        run.put("network", measured())
    with pytest.raises(StoreError, match="another layout"):
        run.declare("network", template().isel(step=slice(2)))
    with pytest.raises(StoreError, match="another layout"):
        run.declare("network", template().assign_coords(coupling=[0.0, 0.7]))
    with pytest.raises(StoreError, match="dimension pair; without: gap"):
        run.declare("more", template().assign(gap=("coupling", [1.0, 2.0])))
    with pytest.raises(StoreError, match="chunk must be at least 1"):
        run.declare("more", template(), chunk=0)


def test_an_opened_run_is_read_only(tmp_path):
    path = started(tmp_path / "run").path
    run, before = RunFolder.open(path), files(path)
    for write in (
        lambda: run.declare("more", template()),
        lambda: write_block(run, 0),
        lambda: run.put("analysis", measured()),
        lambda: run.write_json("claims.json", {}),
        lambda: run.finish(),
    ):
        with pytest.raises(StoreError, match="opened for reading"):
            write()
    assert files(path) == before


def test_missing_and_damaged_groups_say_what_to_do(tmp_path):
    run = started(tmp_path / "run")
    with pytest.raises(StoreError, match="no group 'analysis'; its run is not finished, continue it with --resume"):
        run.load("analysis")
    write_block(run, 0)
    run.finish()
    with pytest.raises(StoreError, match="no group 'analysis'; the same command with --resume"):
        run.load("analysis")
    chunk = next(path for path in (run.path / "data.zarr/network/energy/c").rglob("*") if path.is_file())
    chunk.write_bytes(chunk.read_bytes()[:10])
    with pytest.raises(StoreError, match=r"pairs 0 to 1 of group 'network' are damaged or missing.*--resume"):
        run.load("network", partial=True)


def test_json_files_hold_no_nan(tmp_path):
    run = RunFolder.create(tmp_path / "run", SETTINGS)
    run.write_json("claims.json", {"claims": [{"value": float("nan"), "interval": (1.0, float("inf")), "id": 1}]})
    assert run.read_json("claims.json") == {"claims": [{"value": None, "interval": [1.0, None], "id": 1}]}
    (run.path / "claims.json").write_text("{")
    with pytest.raises(StoreError, match=r"claims\.json cannot be read"):
        run.read_json("claims.json")
    with pytest.raises(StoreError, match=r"holds no other\.json"):
        run.read_json("other.json")


def test_git_revision_is_of_the_code_and_not_of_what_lies_around_it(tmp_path):
    def git(*arguments):
        identity = ["-c", "user.name=n", "-c", "user.email=n@example.org"]
        subprocess.run(["git", "-C", str(tmp_path), *identity, *arguments], check=True, capture_output=True)

    assert manifest.git_revision(tmp_path) is None
    (tmp_path / "other.txt").write_text("x")
    git("init")
    git("add", "other.txt")
    git("commit", "-m", "first")
    (tmp_path / "manifest.py").write_text("x")
    assert manifest.git_revision(tmp_path) is None  # the code is not part of this repository
    git("add", "manifest.py")
    git("commit", "-m", "second")
    clean = manifest.git_revision(tmp_path)
    assert len(clean) == 40
    assert int(clean, 16)
    (tmp_path / "manifest.py").write_text("y")
    assert manifest.git_revision(tmp_path) == f"{clean}-dirty"


@given(
    st.dictionaries(st.sampled_from("abc"), st.one_of(st.integers(0, 2), st.dictionaries(st.just("d"), st.integers())))
)
def test_nothing_differs_from_itself(tree):
    assert manifest.differences(tree, tree) == []
    assert len(manifest.differences(tree, {**tree, "new": 1})) == 1
