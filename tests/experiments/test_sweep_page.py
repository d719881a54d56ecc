"""The page of a sweep: every cell with its link, the stored numbers, figures that fit the axes, repeats."""

import re
from html.parser import HTMLParser
from urllib.parse import unquote

import numpy as np
import pytest
import xarray as xr
from matplotlib.text import Annotation
from scipy import stats
from synthetic_sweep import ERROR, FAILED, MISSING, PLAN, claims, fill, synthetic_sweep

from experiments.frame.collection import runs_in
from experiments.frame.page import formatted, number
from experiments.sweeps.figures import CURVES, HATCHES, figure_claims, figure_curves, figure_maps, sweep_figures
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.layout import Layout, spelled
from experiments.sweeps.page import report_sweep, write_sweep_page
from experiments.sweeps.plan import Plan
from experiments.sweeps.repeats import over_repeats, repeats_of, repeats_table
from experiments.sweeps.result import collect


class Page(HTMLParser):
    """Cells of every table by its id, all ids, and all addresses."""

    def __init__(self, text: str):
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.addresses: list[str] = []
        self.ids: list[str] = []
        self.inside = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href") if name in found]
        self.ids += [found["id"]] if "id" in found else []
        if tag == "table":
            self.rows = self.tables.setdefault(found["id"], [])
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")
            self.inside = True

    def handle_endtag(self, tag):
        self.inside = self.inside and tag not in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.rows[-1][-1] += data


@pytest.fixture(scope="module")
def sweep(analysis, tmp_path_factory) -> SweepFolder:
    made = synthetic_sweep(tmp_path_factory.mktemp("sweep") / "s", analysis)
    assert report_sweep(made.path) == made.path / "report.html"
    return made


@pytest.fixture(scope="module")
def text(sweep) -> str:
    return (sweep.path / "report.html").read_text("utf-8")


@pytest.fixture(scope="module")
def result(sweep) -> xr.Dataset:
    return collect(sweep)


def test_every_cell_is_a_row_with_the_numbers_of_its_run(text, sweep):
    head, *rows = Page(text).tables["cells"]
    assert head == ["cell", "point", "steps", "seed", "status", "There is a gap", "It is large, too"]
    assert [row[0] for row in rows] == [cell.name for cell in sweep.cells]
    for index, (row, cell) in enumerate(zip(rows, sweep.cells, strict=True)):
        assert row[2:4] == [str(cell.place["steps"]), str(cell.place["seed"])]
        if cell.name in (FAILED, MISSING):
            assert row[4:] == ["failed" if cell.name == FAILED else "missing", "–", "–"]
        else:
            assert row[4:] == ["complete", f"{formatted([index, index - 1, index + 1])}holds", "–undecided"]
    assert {row[1] for row in rows} == {"gate kind joint", "gate kind blend, guidance 1.5"}


def test_links_lead_to_the_runs_and_nothing_is_loaded_from_elsewhere(text, sweep):
    addresses = [each for each in Page(text).addresses if not each.startswith("data:image/svg+xml;base64,")]
    runs = [f"cells/{cell.name}/report.html" for cell in sweep.cells if cell.name not in (FAILED, MISSING)]
    assert [unquote(each) for each in addresses] == ["claims.csv", *runs]
    assert all(re.fullmatch(r"[\w./%-]+", each) for each in addresses)
    assert all((sweep.path / unquote(each)).is_file() for each in addresses)
    assert not re.search(r"https?:|url\(|@import|<script", text)


def test_what_failed_is_told_and_texts_are_escaped(text):
    assert Page(text).tables["errors"][1:] == [[FAILED, ERROR]]
    assert "<b>" not in text
    assert "<h1>What the &lt;gate&gt; does</h1>" in text
    assert "syncgap sweep &#39;a &amp; b&#39;" in text
    assert "6 of 8 cells are complete." in text
    assert "1 failed." in text
    assert "1 is not done yet." in text


def test_every_id_of_the_page_is_one_of_its_own(text):
    ids = Page(text).ids
    assert len(ids) == len(set(ids))
    assert {"curves", "claims", "maps", "table-1", "cells", "errors", "settings"} == set(ids)


def test_a_sweep_without_results_has_a_page(tmp_path):
    sweep = SweepFolder.create(tmp_path / "s", Plan("compare", {}, {"weights": ["ünd", "b"], "seed": [0, 1]}))
    text = write_sweep_page(sweep).read_text("utf-8")
    assert [row[1] for row in Page(text).tables["cells"][1:]] == ["ünd", "ünd", "b", "b"]
    assert "<figure" not in text
    assert "What failed" not in text


def test_links_to_names_beyond_ascii(analysis, tmp_path):
    sweep = SweepFolder.create(tmp_path / "s", Plan("compare", {}, {"weights": ["ünd 50%#", "b"]}))
    fill(sweep.run(sweep.cells[0]), {}, analysis[["gap"]], 1.0)
    text = write_sweep_page(sweep).read_text("utf-8")
    (link,) = [each for each in Page(text).addresses if each.startswith("cells/")]
    assert link.isascii()
    assert (sweep.path / unquote(link)).is_file()


def test_a_sweep_among_runs_is_told_apart(sweep):
    _, others = runs_in(sweep.path.parent)
    assert others == {"s": "a sweep"}


# --- figures


def test_heat_maps_are_drawn_where_two_axes_vary(result):
    def names(found):
        return set(sweep_figures(found, Layout.of(found, "seed")))

    assert names(result) == {"curves", "claims", "maps"}
    assert names(result.isel(steps=[0])) == names(result.isel(point=[0])) == {"curves", "claims"}
    assert names(result.isel(steps=[0], point=[0])) == {"curves", "claims"}  # over seeds
    assert names(result.isel(steps=[0], point=[0], seed=[0])) == set()
    assert names(result.drop_vars("gap")) == {"claims", "maps"}


def written_on(figure) -> list[str]:
    """What stands on squares; claims above several columns are annotations."""
    return [text.get_text() for ax in figure.axes for text in ax.texts if not isinstance(text, Annotation)]


def test_verdicts_and_what_is_missing_are_words_on_a_heat_map(result):
    layout = Layout.of(result, None)
    assert (layout.first, layout.second, layout.facet) == ("point", "steps", "seed")
    figure = figure_maps(result, layout)
    first = written_on(figure)[:8]  # of the first claim: two facets of two by two
    assert first == [
        *("0.00\nholds", "2.00\nholds", "failed", "6.00\nholds"),
        *("1.00\nholds", "missing", "5.00\nholds", "7.00\nholds"),
    ]
    assert set(written_on(figure)[8:]) == {"undecided", "failed", "missing"}


def test_repeats_are_counted_on_a_heat_map(result):
    assert written_on(figure_maps(result, Layout.of(result, "seed")))[:4] == [
        *("0.50\n2 of 2 hold", "2.00\n1 of 1 hold", "5.00\n1 of 1 hold", "6.50\n2 of 2 hold")
    ]


def test_a_dense_heat_map_has_hatches_in_place_of_words(result):
    dense = result.isel(steps=[0, 1] * 10, seed=[0])
    figure = figure_maps(
        dense.assign(verdict=dense.verdict.where(dense.point == 1, "does not hold")), Layout.of(dense, None)
    )
    assert written_on(figure) == []
    hatches = [patch.get_hatch() for patch in figure.axes[0].patches]
    assert hatches.count(HATCHES["no result"]) == 10  # blend at 4 steps, seed 0, failed
    assert hatches.count(HATCHES["does not hold"]) == 20
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["holds", "does not hold", "undecided", "no result"]


def test_repeats_that_differ_are_told_apart_from_cells_that_are_undecided(result):
    dense = result.isel(steps=[0, 1] * 10)
    differing = dense.verdict.where((dense.point == 1) | (dense.seed == 0), "undecided")  # joint: held by one seed
    figure = figure_maps(dense.assign(verdict=differing), Layout.of(dense, "seed"))
    hatches = [patch.get_hatch() for patch in figure.axes[0].patches]
    assert hatches.count(HATCHES["repeats differ"]) == 10  # joint at 4 steps; at 6 steps seed 1 is missing
    assert hatches.count(HATCHES["undecided"]) == 0
    shown = [text.get_text() for text in figure.legends[0].get_texts()]
    assert shown == ["holds", "does not hold", "undecided", "repeats differ", "no result"]


def test_lines_hold_the_values(result):
    figure = figure_claims(result, Layout.of(result, "seed"))
    (ax,) = figure.axes  # the other claims have no value
    lines = [line for line in ax.get_lines() if line.get_linestyle() == "-" and len(line.get_xdata()) == 2]
    heights = [line.get_ydata().tolist() for line in lines if line.get_color() in ("#0072B2", "#D55E00")]
    assert heights == [[0.5, 2.0], [5.0, 6.5]]  # means over seeds, joint and blend
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["gate kind joint", "gate kind blend"]


def test_curves_hold_the_values(result):
    layout = Layout.of(result, None)
    figure = figure_curves(result, layout, CURVES["compare"])
    drawn = [line.get_ydata() for ax in figure.axes for line in ax.get_lines() if len(line.get_ydata()) == 10]
    expected = [
        result.gap.sel(source="network").isel(point=point, steps=steps, seed=seed)
        for seed in (0, 1)
        for point in (0, 1)
        for steps in (0, 1)
    ]
    for line, curve in zip(drawn, [each for each in expected if np.isfinite(each).any()], strict=True):
        np.testing.assert_array_equal(line, curve)


def test_axes_beyond_three_are_drawn_at_their_first_value(result):
    wide = result.expand_dims(guidance_kind=["p", "q"], axis=0).transpose(*PLAN.dims, "guidance_kind", ...)
    layout = Layout.of(wide, None)
    assert layout.fixed == ("guidance_kind",)
    assert layout.note(wide) == "Shown at guidance kind = p; the table has all cells."
    many = Layout.of(result.isel(seed=[0, 1] * 3), None)
    assert (many.facet, many.fixed) == (None, ("seed",))  # too many values to draw side by side


def test_points_are_spelled_by_what_they_set(result):
    assert [spelled(result, "point", i) for i in (0, 1)] == ["gate kind joint", "gate kind blend"]  # which differ
    whole = ["gate kind joint", "gate kind blend, guidance 1.5"]
    assert [spelled(result, "point", i, whole=True) for i in (0, 1)] == whole
    alike = result.assign_coords(gate_kind=("point", ["joint", "joint"]))
    assert [spelled(alike, "point", i) for i in (0, 1)] == ["gate kind joint", "gate kind joint, guidance 1.5"]


# --- repeats


def test_the_interval_over_repeats_is_students():
    rng = np.random.default_rng(0)
    values = rng.standard_normal((2, 5))
    for row, each in zip(over_repeats(values, 0.9), values, strict=True):
        expected = stats.t.interval(0.9, 4, each.mean(), stats.sem(each))
        np.testing.assert_allclose(row, [each.mean(), *expected])
    holes = values.copy()
    holes[0, 3], holes[1, :3] = np.nan, np.nan
    found = over_repeats(holes, 0.9)
    np.testing.assert_allclose(found[0], over_repeats(np.delete(values[0], 3), 0.9))
    np.testing.assert_allclose(found[1], [values[1, 3:].mean(), np.nan, np.nan])  # two are too few
    assert np.isnan(over_repeats(np.full((1, 3), np.nan), 0.9)).all()


def test_seeds_are_shown_beside_pairs(result, sweep):
    repeats = repeats_of(sweep, result)
    assert repeats is not None
    assert (repeats.axis, repeats.what) == ("seed", "seeds")
    table = repeats_table(result, Layout.of(result, "seed"), repeats)
    assert len(table.rows) == 4  # the claims that have values, at every point and number of steps
    over_pairs = number(2 / (2 * stats.norm.ppf(1 - 0.025 / 2)))
    name, point = "There is a gap", "gate kind joint"
    assert table.rows[0] == [name, point, "4", "2", "0.50", "–", number(np.sqrt(0.5)), over_pairs]
    assert table.rows[1] == [name, point, "6", "1", "2.00", "–", "–", over_pairs]


def test_networks_that_were_trained_again_are_repeats(analysis, tmp_path):
    """A number at the end of the name and the same form; another form is another network, whatever its name."""
    names = ["net-0", "net-1", "net-2", "net-9", "other"]
    sweep = SweepFolder.create(tmp_path / "s", Plan("compare", {}, {"weights": names}))
    for index, cell in enumerate(sweep.cells):
        model = {"depth": 24 if cell.place["weights"] == "net-9" else 12, "dtype": ["float32", "bfloat16"][index % 2]}
        fill(sweep.run(cell), {}, analysis[["gap"]], float(index), model=model)
    found = collect(sweep)
    repeats = repeats_of(sweep, found)
    assert repeats is not None
    assert (repeats.axis, repeats.what) == ("weights", "trainings")
    assert repeats.groups == [("net-0, net-1, net-2", [0, 1, 2]), ("net-9", [3]), ("other", [4])]
    (row,) = repeats_table(found, Layout.of(found, None), repeats).rows
    mean, low, high = over_repeats(np.arange(3.0), claims(0)[0].level)
    assert row[:5] == ["There is a gap", "net-0, net-1, net-2", "3", number(mean), f"[{number(low)}, {number(high)}]"]
    alone = SweepFolder.create(tmp_path / "t", Plan("compare", {}, {"weights": ["a", "b"]}))
    assert repeats_of(alone, collect(alone)) is None
