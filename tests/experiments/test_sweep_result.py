"""The result of a sweep: what cells have stored, under the plan's axes, with what is missing as NaN."""

import importlib.util
import json
import shutil
import tracemalloc
from dataclasses import asdict

import numpy as np
import pandas as pd
import pytest
import xarray as xr
from synthetic_sweep import ERROR, FAILED, KEPT, MISSING, PLAN, claims, fill, of_cell, synthetic_sweep

from experiments import open_sweep
from experiments.cli import main
from experiments.frame.store import RunFolder
from experiments.frame.verdict import finite
from experiments.sweeps import result as results
from experiments.sweeps.export import claims_table
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.joining import Joined
from experiments.sweeps.plan import Plan
from experiments.sweeps.result import collect, write_result


@pytest.fixture(scope="module")
def filled(analysis, tmp_path_factory) -> SweepFolder:
    """A sweep with a failed and a missing cell; tests only read it."""
    return synthetic_sweep(tmp_path_factory.mktemp("sweep") / "s", analysis)


@pytest.fixture(scope="module")
def written(filled, tmp_path_factory):
    """The same sweep with its result."""
    path = shutil.copytree(filled.path, tmp_path_factory.mktemp("written") / "s")
    write_result(SweepFolder.open(path))
    return path


@pytest.fixture
def stored(written, tmp_path) -> SweepFolder:
    return SweepFolder.open(shutil.copytree(written, tmp_path / "s"))


@pytest.fixture
def copy(filled, tmp_path) -> SweepFolder:
    shutil.copytree(filled.path, tmp_path / "s")
    return SweepFolder.open(tmp_path / "s")


@pytest.fixture(scope="module")
def result(filled) -> xr.Dataset:
    return collect(filled)


def done(sweep: SweepFolder):
    """Index on every axis, number and cell, of the cells that have a run."""
    for index, cell in enumerate(sweep.cells):
        if cell.name not in (MISSING, FAILED):
            yield np.unravel_index(index, (2, 2, 2)), index, cell


def test_the_axes_of_the_plan_are_dimensions(result):
    assert result.status.dims == PLAN.dims == ("point", "steps", "seed")
    np.testing.assert_array_equal(result.steps, [4, 6])
    np.testing.assert_array_equal(result.seed, [0, 1])
    assert result.gate_kind.dims == result.guidance.dims == ("point",)
    assert result.gate_kind.values.tolist() == ["joint", "blend"]
    np.testing.assert_array_equal(result.guidance, [np.nan, 1.5])  # the first point does not set it
    assert result.claim_value.dims == (*PLAN.dims, "claim", "bound")
    assert result.verdict.dims == (*PLAN.dims, "claim")
    assert result.gap.dims == (*PLAN.dims, "source", "coupling")


def test_every_number_is_that_of_its_cell(result, filled):
    for place, index, cell in done(filled):
        at = result.isel(dict(zip(PLAN.dims, place, strict=True)))
        own = RunFolder.open(filled.run(cell)).load("analysis")
        here = at.sel(step=own.step, bound=own.bound)
        for name in KEPT:
            np.testing.assert_array_equal(here[name], own[name], err_msg=name)
        np.testing.assert_array_equal(at.gap_interval.sel(bound="estimate"), at.gap)
        np.testing.assert_array_equal(here.ell, own.ell)
        np.testing.assert_array_equal(at.claim_value.isel(claim=0), [index, index - 1, index + 1])
        assert np.isnan(at.claim_value.isel(claim=[1, 2])).all()
        assert at.verdict.values.tolist() == ["holds", "undecided", "not tested"]
        assert (at.cell, at.run, at.status, at.error) == (cell.name, f"cells/{cell.name}", "complete", "")
        assert (at.measuring_seconds, at.analysis_seconds) == (2.5, 1)


def test_cells_of_other_sizes_are_joined_by_label(result, filled):
    np.testing.assert_array_equal(result.step, np.arange(6))
    short = result.sel(steps=4).isel(point=0)
    assert np.isnan(short.relative_energy.sel(step=[4, 5])).all()
    assert not np.isnan(short.relative_energy.sel(step=[0, 1, 2, 3], source="network")).any()
    assert result.ell.dims == (*PLAN.dims, "step")  # the levels of step 1 differ between cells
    assert result.radius.dims == ("band",)  # and bands are the same in all


def test_what_failed_or_is_missing_is_nan_with_its_error(result):
    flat = result.stack(all=PLAN.dims)
    for name, status, error in ((FAILED, "failed", ERROR), (MISSING, "missing", "")):
        at = flat.isel(all=int(np.flatnonzero(flat.cell == name)[0]))
        assert (at.status, at.error) == (status, error)
        for variable in (*KEPT, "claim_value", "measuring_seconds"):
            assert np.isnan(at[variable]).all(), variable
        assert set(at.verdict.values.tolist()) == {""}
    assert (result.attrs["complete"], result.attrs["failed"], result.attrs["missing"]) == (6, 1, 1)
    assert result.attrs["completeness"] == "6 of 8 cells"


def test_meanings_units_and_settings_are_attributes(filled, analysis, tmp_path):
    sweep = SweepFolder.create(tmp_path / "s", Plan("compare", {"pairs": 3}, {"guidance": [1.0]}))
    described = analysis[["gap"]].copy()
    described["gap"].attrs = {"long_name": "synchronization gap", "units": "nat"}
    described["coupling"].attrs = {"long_name": "coupling g", "units": "1"}
    fill(sweep.run(sweep.cells[0]), {}, described, 0.0)
    found = collect(sweep)
    assert found.gap.attrs == described.gap.attrs
    assert found.coupling.attrs == described.coupling.attrs
    assert found.measuring_seconds.attrs["units"] == "s"
    assert all("long_name" in found[name].attrs for name in ("claim_value", "verdict", "status", "guidance"))
    settings = json.loads(found.attrs["settings"])
    assert settings["pairs"] == 3
    assert "guidance" not in settings
    assert found.attrs["study"] == "compare"
    assert json.loads(found.attrs["versions"])["numpy"] == np.__version__


def test_a_stored_result_is_the_collected_one_and_is_read_when_needed(written, result, monkeypatch):
    monkeypatch.setattr(results, "collect", None)  # nothing is collected
    found = open_sweep(written)
    assert not found.variables["relative_energy"]._in_memory
    assert found.chunks == {}
    picked = found.gap.sel(source="network", coupling=0, steps=4)
    np.testing.assert_array_equal(picked, result.gap.sel(source="network", coupling=0, steps=4))
    xr.testing.assert_identical(found.load(), result)
    assert [child.name for child in written.iterdir() if child.name.startswith(".")] == []
    other = xr.open_zarr(written / "result.zarr", chunks=None)  # any xarray reads it, by its consolidated metadata
    np.testing.assert_array_equal(other.gap, result.gap)
    assert json.loads(other.attrs["manifest"])["cells"].keys() == {
        cell.name for cell in SweepFolder.open(written).cells
    }


def test_a_stored_result_becomes_a_data_frame(written):
    found = open_sweep(written)
    table = found[["claim_value", "verdict", "status"]].to_dataframe()
    assert len(table) == 8 * 3 * 3
    at = table.loc[(1, 6, 1, "There is a gap", "low")]
    assert (at.claim_value, at.verdict, at.status, at.gate_kind) == (6.0, "holds", "complete", "blend")
    whole = found.isel(source=[0], coupling=[0]).to_dataframe()
    assert len(whole) == 8 * 3 * 3 * found.sizes["step"] * found.sizes["band"]
    gaps = found.gap.sel(source="network").to_dataframe()
    assert gaps.gap.loc[(0, 4, 1, 0.0)] == found.gap.isel(point=0, steps=0, seed=1, coupling=0).sel(source="network")


def again(sweep, analysis):
    cell = sweep.cells[0]
    RunFolder.open(sweep.run(cell), writable=True).put("analysis", of_cell(analysis, 9, 4))


def claimed_again(sweep, analysis):
    entries = {"claims": [finite(asdict(claim)) for claim in claims(9.0)]}
    RunFolder.open(sweep.run(sweep.cells[0]), writable=True).write_json("claims.json", entries)


def failed_too(sweep, analysis):
    (cell,) = [cell for cell in sweep.cells if cell.name == MISSING]
    sweep.note_failure(cell, "OSError: gone")


def mended(sweep, analysis):
    (cell,) = [cell for cell in sweep.cells if cell.name == FAILED]
    fill(sweep.run(cell), {}, of_cell(analysis, 3, 4), 3.0)


def longer(sweep, analysis):
    axes = {"steps": ["4", "6"], "seed": [0, 1, 2]}
    SweepFolder.create(sweep.path, Plan("compare", PLAN.settings, axes, PLAN.points, PLAN.title), resume=True)


def broken(sweep, analysis):
    (sweep.path / "result.zarr" / "gap" / "zarr.json").write_text("{")


@pytest.mark.parametrize("change", [again, claimed_again, failed_too, mended, longer, broken])
def test_a_result_that_no_longer_fits_its_cells_is_not_used(change, stored, analysis):
    change(stored, analysis)
    found = open_sweep(stored.path)
    xr.testing.assert_identical(found, collect(SweepFolder.open(stored.path)))
    assert found.variables["gap"]._in_memory


def test_a_cell_that_cannot_be_read_is_failed_until_it_is_mended(copy, result):
    cell = copy.cells[0]
    chunk = copy.run(cell) / "data.zarr/analysis/gap/c/0/0"
    content = chunk.read_bytes()
    chunk.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    write_result(copy)
    found = open_sweep(copy.path).isel(point=0, steps=0, seed=0)
    assert found.status == "failed"
    assert "damaged" in str(found.error.values)
    assert np.isnan(found.gap).all()
    chunk.write_bytes(content)  # the manifest of the run is as before
    xr.testing.assert_identical(open_sweep(copy.path), result)


@pytest.mark.parametrize("text", ["{", "[]", '{"claims": 1}', '{"claims": [{"verdict": "holds"}]}'])
def test_malformed_claims_are_an_error_of_the_cell(text, copy):
    (copy.run(copy.cells[0]) / "claims.json").write_text(text)
    found = collect(copy).isel(point=0, steps=0, seed=0)
    assert found.status == "failed"
    assert found.error != ""
    assert np.isnan(found.gap).all()


def test_variables_beyond_the_bound_are_left_out_and_named(filled, result):
    bound = int(result.relative_energy.nbytes) - 1
    found = collect(filled, most=bound)
    assert "relative_energy" not in found
    assert list(json.loads(found.attrs["left_out"])) == ["relative_energy"]
    xr.testing.assert_equal(found.gap, result.gap)
    assert json.loads(result.attrs["left_out"]) == {}


def test_names_that_the_result_needs_itself_are_kept_apart(tmp_path):
    sweep = SweepFolder.create(tmp_path / "s", Plan("compare", {}, {"seed": [3]}))
    taken = xr.Dataset({"seed": ("claim", [1.0, 2.0]), "status": 4.0, "note": "text"}, {"claim": [7, 8]})
    fill(sweep.run(sweep.cells[0]), {}, taken, 0.0)
    found = collect(sweep)
    np.testing.assert_array_equal(found.seed, [3])
    np.testing.assert_array_equal(found.analysis_seed.sel(analysis_claim=8, seed=3), 2.0)
    assert found.analysis_status == 4
    assert found.status == "complete"
    assert "note" not in found  # estimates are numbers


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["50", "250"], [50, 250]),
        (["50", "ddim50"], ["50", "ddim50"]),
    ],
)
def test_values_of_mixed_types_are_text(values, expected, tmp_path):
    found = collect(SweepFolder.create(tmp_path / "s", Plan("compare", {}, {"steps": values})))
    np.testing.assert_array_equal(found.steps, expected)
    assert found.sizes["claim"] == 0


def test_nothing_done_and_nothing_varied(tmp_path, analysis):
    sweep = SweepFolder.create(tmp_path / "s", Plan("compare"))
    write_result(sweep)
    found = open_sweep(sweep.path)
    assert (str(found.status.values), found.status.dims) == ("missing", ())
    assert len(claims_table(found)) == 1
    fill(sweep.run(sweep.cells[0]), {}, analysis[["gap"]], 0.5)
    write_result(sweep)
    np.testing.assert_array_equal(open_sweep(sweep.path).gap, analysis.gap)


# --- joining


def joined(*cells: xr.Dataset) -> xr.Dataset:
    table = Joined(("cell",), (len(cells),))
    for index, cell in enumerate(cells):
        table.add((index,), cell)
    return table.dataset()


def test_labels_are_joined_and_increase_where_they_do_in_every_cell():
    one = xr.Dataset({"a": ("x", [1.0, 3.0])}, {"x": [0.1, 0.3], "name": ("x", ["p", "q"])})
    two = xr.Dataset({"a": ("x", [2.0, 30.0])}, {"x": [0.2, 0.1 + 0.2], "name": ("x", ["r", "q"])})
    found = joined(one, two)  # 0.1 + 0.2 is not 0.3
    np.testing.assert_array_equal(found.x, [0.1, 0.2, 0.3])
    np.testing.assert_array_equal(found.a, [[1, np.nan, 3], [np.nan, 2, 30]])
    assert found.name.values.tolist() == ["p", "r", "q"]
    falling = joined(one.isel(x=[1, 0]), two.isel(x=[1, 0]))
    np.testing.assert_array_equal(falling.x, [0.3, 0.1, 0.2])  # as they came
    np.testing.assert_array_equal(falling.a.sel(x=0.2), [np.nan, 2])


def test_dimensions_without_labels_are_joined_by_position():
    found = joined(xr.Dataset({"a": ("x", [1, 2])}), xr.Dataset({"a": ("x", [3, 4, 5])}))
    assert "x" not in found.coords
    np.testing.assert_array_equal(found.a, [[1, 2, np.nan], [3, 4, 5]])


def test_order_of_dimensions_may_differ_and_their_names_may_not():
    one = xr.Dataset({"a": (("x", "y"), [[1.0, 2.0, 3.0]]), "b": ("x", [1.0]), "c": ("x", [1.0])})
    two = xr.Dataset({"a": one.a.transpose(), "b": ("y", [1.0, 2.0, 3.0]), "c": ("x", ["text"])})
    table = Joined(("cell",), (2,))
    for index, cell in enumerate((one, two)):
        table.add((index,), cell)
    found = table.dataset()
    np.testing.assert_array_equal(found.a[0], found.a[1])
    assert set(found.data_vars) == {"a"}
    assert table.left_out.keys() == {"b", "c"}


def test_joining_is_of_bounded_memory():
    """The bound is on what is kept: large variables of many cells do not pile up."""
    most, cells = 2**22, 60
    cell = xr.Dataset({"small": ("x", np.ones(100)), "large": (("x", "y"), np.ones((100, 1000)))})
    tracemalloc.start()
    table = Joined(("cell",), (cells,), most)
    for index in range(cells):
        table.add((index,), cell)
    found = table.dataset()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert list(found.data_vars) == ["small"]
    assert peak < most < cells * cell.large.nbytes


# --- export


def test_the_table_has_a_row_for_every_cell_and_claim(result, filled):
    table = claims_table(result)
    assert table.cell.tolist() == [cell.name for cell in filled.cells for _ in range(3)]
    assert table.claim.tolist() == ["There is a gap", "It is large, too", "It lies deep"] * 8
    for _, index, cell in done(filled):
        row = table[(table.cell == cell.name) & (table.claim_id == 1)].iloc[0]
        assert (row.estimate, row.low, row.high, row.level) == (index, index - 1, index + 1, 0.975)
        assert (row.verdict, row.status, row.gate_kind) == ("holds", "complete", cell.settings.gate_kind)
        assert (row.steps, row.seed) == (int(cell.settings.steps), cell.settings.seed)
    failed = table[table.cell == FAILED]
    assert set(failed.status) == {"failed"}
    assert set(failed.error) == {ERROR}
    assert failed.estimate.isna().all()


def test_report_exports_the_table(copy, capsys, tmp_path):
    out = tmp_path / "new" / "claims.csv"
    assert main(["report", str(copy.path), "--csv", str(out)]) == 0
    assert "report.html" in capsys.readouterr().out
    table = pd.read_csv(out)
    assert len(table) == 24
    assert table.estimate[0] == 0
    assert out.read_bytes() == (copy.path / "claims.csv").read_bytes()
    assert not open_sweep(copy.path).variables["gap"]._in_memory  # the result was written


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
def test_report_exports_parquet(copy, tmp_path):
    assert main(["report", str(copy.path), "--parquet", str(tmp_path / "claims.parquet")]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "claims.parquet"), claims_table(open_sweep(copy.path)))


def test_parquet_without_pyarrow_names_the_extra(copy, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("experiments.sweeps.export.find_spec", lambda name: None)
    assert main(["report", str(copy.path), "--parquet", str(tmp_path / "x")]) == 2
    assert "syncgap[parquet]" in capsys.readouterr().err
    assert not (copy.path / "result.zarr").exists()  # said before the work


def test_what_is_no_sweep_has_no_table(copy, capsys, tmp_path):
    run = copy.run(copy.cells[0])
    assert main(["report", str(run), "--csv", str(tmp_path / "x.csv")]) == 2
    assert "is no sweep" in capsys.readouterr().err


def test_chunks_need_dask(copy, monkeypatch):
    monkeypatch.setattr(results, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs dask"):
        open_sweep(copy.path, chunks={})


def test_a_thousand_cells(analysis, tmp_path, monkeypatch):
    """Every cell's part is found in the result. Each cell's folder is a link to one of two, which are read once, for
    that takes ten times as long as to join them."""
    read, seen = results._read, {}
    monkeypatch.setattr(results, "_read", lambda path, taken: seen.get(path.resolve()) or read(path, taken))
    sweep = SweepFolder.create(tmp_path / "s", Plan("compare", {}, {"seed": list(range(500)), "guidance": [1, 2]}))
    for value in (0, 1):
        fill(tmp_path / str(value), {}, analysis[["gap"]] + value, float(value))
        seen[tmp_path / str(value)] = read(tmp_path / str(value), set())
    for index, cell in enumerate(sweep.cells):
        sweep.run(cell).symlink_to(tmp_path / str(index % 2))
    write_result(sweep)
    monkeypatch.setattr(results, "collect", None)  # what is stored is that of all cells
    found = open_sweep(sweep.path)
    assert found.attrs["complete"] == 1000
    np.testing.assert_array_equal(found.claim_value.isel(claim=0, bound=0), np.tile([0, 1], (500, 1)))
    apart = found.gap.sel(guidance=2) - found.gap.sel(guidance=1)
    assert set(np.unique(apart.sel(source="network").round(9))) == {1.0}
