"""Figures show what is stored: artists carry the stored numbers, bounds and flags."""

import xml.etree.ElementTree as ElementTree
from functools import partial
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
import xarray as xr
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from PIL import Image

from experiments.frame import drawing
from experiments.frame.drawing import draw_figures, new_figure
from experiments.studies.compare import figures


@pytest.fixture(autouse=True)
def style():
    """As `draw_figures` draws them."""
    with matplotlib.rc_context(drawing.STYLE):
        yield


def curves(ax) -> dict[str, np.ndarray]:
    """Heights of the named curves of a panel."""
    return {line.get_label(): np.asarray(line.get_ydata()) for line in ax.get_lines()}


def whiskers(ax) -> list[np.ndarray]:
    """Ends of the vertical interval lines of a panel, one (n, 2) array per curve, in drawing order."""
    found = [c for c in ax.collections if isinstance(c, LineCollection)]
    return [np.array([segment[:, 1] for segment in c.get_segments()]) for c in found]


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def plain(figure):
    """Lays a figure out, as saving does."""
    figure.canvas.draw()
    return figure


def test_headline_shows_the_stored_gaps(analysis):
    ax = plain(figures.figure_gap(analysis)).axes[0]
    shown = curves(ax)
    for source in ("network", *figures.theories(analysis), "untrained"):
        style = figures.SOURCES[source]
        stored = analysis.gap.sel(source=source).dropna("coupling")
        np.testing.assert_array_equal(shown[style["label"]], stored)
        assert style["label"] in texts(ax)
        (line,) = [line for line in ax.get_lines() if line.get_label() == style["label"]]
        assert (line.get_linestyle() == "-") == (source in ("network", "untrained"))  # what was measured is solid
    assert len(shown["theory, data covariance"]) == 9  # nothing is decided at g = 1 under the exact denoiser
    np.testing.assert_array_equal(whiskers(ax)[-1], analysis.gap_interval.sel(source="network"))


def test_labels_of_curves_do_not_overlap(analysis):
    crowded = analysis.copy(deep=True)
    crowded.gap[:] = 2.0  # all end at one height
    figure = plain(figures.figure_gap(crowded))
    boxes = sorted((text.get_window_extent() for text in figure.axes[0].texts), key=lambda box: box.y0)
    assert len(boxes) == 4
    assert all(upper.y0 >= lower.y1 - 1 for lower, upper in pairwise(boxes))


def test_an_interval_may_leave_out_its_estimate(analysis):
    """A bootstrap interval of a biased estimate can; error bars given as distances would fail."""
    skewed = analysis.copy(deep=True)
    skewed.gap_interval.loc[{"source": "network"}] = [9.0, 9.5]
    ax = plain(figures.figure_gap(skewed)).axes[0]
    np.testing.assert_array_equal(whiskers(ax)[-1], np.tile([9.0, 9.5], (10, 1)))


def test_a_source_without_values_is_left_out(analysis):
    ax = figures.figure_gap(analysis.where(analysis.source != "untrained")).axes[0]
    assert "untrained network" not in [*curves(ax), *texts(ax)]


@pytest.mark.parametrize("couplings", [[0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1], [0, 0.5, 1], [0, 1e-3, 4]])
def test_couplings_of_every_size_can_be_told_apart(couplings):
    figure = matplotlib.figure.Figure(figsize=(7, 4))
    ax = figure.subplots()
    ax.plot(couplings, couplings)
    drawing.coupling_axis(ax, np.asarray(couplings, np.float32))
    figure.canvas.draw()
    place = ax.transData.transform(np.c_[couplings, couplings])[:, 0]
    assert np.diff(place).min() > 0.03 * ax.bbox.width
    assert [text.get_text() for text in ax.get_xticklabels()] == [f"{g:g}" for g in couplings]


@pytest.mark.parametrize("name", ["commitment", "decided", "calibration"])
def test_tick_labels_do_not_run_into_each_other(analysis, name):
    figure = plain(figures.FIGURES[name][1](analysis))
    for ax in figure.axes:
        boxes = [text.get_window_extent() for text in ax.get_xticklabels() if text.get_text() and text.get_visible()]
        assert all(left.x1 < right.x0 for left, right in pairwise(boxes))


@pytest.mark.parametrize(
    ("draw", "variable"), [(figures.figure_commitment, "tau"), (figures.figure_decided, "decided")]
)
def test_every_band_has_its_panel(analysis, draw, variable):
    panels = [ax for ax in draw(analysis).axes if ax.get_visible()]
    assert [ax.get_title("left") or ax.get_title() for ax in panels] == drawing.band_names(analysis)
    for band, ax in enumerate(panels):
        at = analysis[variable].isel(band=band)
        shown = curves(ax)
        for source in ("network", "regression gain", "data covariance"):
            np.testing.assert_array_equal(
                shown[figures.SOURCES[source]["label"]], at.sel(source=source).dropna("coupling")
            )
        np.testing.assert_array_equal(
            whiskers(ax)[0], analysis[f"{variable}_interval"].isel(band=band).sel(source="network")
        )


def test_weak_points_and_no_others_are_open(analysis):
    figure = figures.figure_commitment(analysis)
    for band, ax in enumerate(figure.axes[: analysis.sizes["band"]]):
        (opened,) = [line for line in ax.get_lines() if str(line.get_markerfacecolor()) == "white"]
        weak = analysis.weak.sel(source="network").isel(band=band).values
        np.testing.assert_array_equal(np.isfinite(np.asarray(opened.get_ydata(), float)), weak)
    assert "weak" in [text.get_text() for text in figure.legends[0].get_texts()]
    sure = analysis.assign(weak=xr.zeros_like(analysis.weak))
    assert "weak" not in [text.get_text() for text in figures.figure_commitment(sure).legends[0].get_texts()]


def test_bands_go_from_dark_to_light(analysis):
    luminance = [np.dot(to_rgb(color), [0.21, 0.72, 0.07]) for color in drawing.band_colors(analysis)]
    assert np.all(np.diff(luminance) > 0.05)
    assert drawing.band_names(analysis)[:2] == ["DC", "r = 0.11"]


def test_energies_at_the_first_the_middle_and_the_last_coupling(analysis):
    figure = figures.figure_relative_energy(analysis)
    assert [ax.get_title("left") or ax.get_title() for ax in figure.axes] == ["$g$ = 0", "$g$ = 0.2", "$g$ = 1"]
    for coupling, ax in zip((0, 5, 9), figure.axes, strict=True):
        at = analysis.relative_energy.isel(coupling=coupling)
        for source, style in (("network", "-"), ("regression gain", "--")):
            drawn = [line.get_ydata() for line in ax.get_lines() if line.get_linestyle() == style]
            np.testing.assert_array_equal(np.stack(drawn, -1), at.sel(source=source))


def test_errors_before_the_window_do_not_set_the_scale(analysis):
    noisy = analysis.copy(deep=True)
    noisy.relative_energy[:, :, noisy.ell.values < noisy.attrs["ell_start"]] = 1e4
    low, high = figures.figure_relative_energy(noisy).axes[0].get_ylim()
    assert (low, high < 2) == (0, True)


def test_the_ideal_gain_is_that_of_the_kind_of_gate(analysis):
    ax = figures.figure_gain(analysis.assign_attrs(gate_kind="additive")).axes[0]
    (dotted,) = (line for line in ax.get_lines() if line.get_linestyle() == ":")
    np.testing.assert_allclose(dotted.get_ydata(), 0.8, atol=1e-7)
    assert "1 − g = 0.80" in texts(ax)[0]
    beyond = analysis.assign_coords(coupling=2 * analysis.coupling)
    ax = figures.figure_gain(beyond.assign_attrs(gate_kind="additive")).axes[-1]  # turned round, and as large as before
    assert ax.get_ylim()[0] < 1 < ax.get_ylim()[1]
    assert "|1 − g| = 1.00" in texts(ax)[0]


def test_gain_is_drawn_with_the_ideal_one(analysis):
    figure = figures.figure_gain(analysis)
    for coupling, ideal, ax in zip((5, 9), (2 / 3, 0), figure.axes, strict=True):
        drawn = [line.get_ydata() for line in ax.get_lines() if line.get_linestyle() == "-"]
        np.testing.assert_array_equal(np.stack(drawn, -1), analysis.gain.sel(source="network").isel(coupling=coupling))
        (dotted,) = [line for line in ax.get_lines() if line.get_linestyle() == ":"]
        np.testing.assert_allclose(dotted.get_ydata(), ideal, atol=1e-7)
        assert f"{ideal:.2f}" in texts(ax)[0]
        assert ax.get_ylim()[0] < ideal < ax.get_ylim()[1]


def test_calibration_shows_points_lines_and_what_is_left(analysis):
    axes = np.reshape(figures.figure_calibration(analysis).axes, (2, 3))
    measured, theory = (analysis.sel(source=source) for source in ("wiener", "wiener theory"))
    for column, (name, bands) in enumerate((("gap", [None]), ("tau", [1, 6]), ("decided", [1, 6]))):
        top, bottom = axes[:, column]
        points = [line for line in top.get_lines() if line.get_marker() == "o"]
        rest = [line for line in bottom.get_lines() if line.get_marker() == "o"]
        for band, point, left in zip(bands, points, rest, strict=True):
            found, exact = ((d[name] if band is None else d[name].isel(band=band)) for d in (measured, theory))
            known = np.isfinite(found.values)
            np.testing.assert_array_equal(point.get_ydata(), found.values[known])
            np.testing.assert_array_equal(left.get_ydata(), (found - exact).values[known])
        low, high = bottom.get_ylim()
        ends = np.concatenate(whiskers(bottom))
        assert low <= ends.min()
        assert high >= ends.max()


def test_pictures_are_the_stored_ones(pictures):
    figure = figures.figure_pictures(pictures)
    first, last = figure.subfigs
    for block, part in enumerate((first, last)):
        shown = np.stack([ax.get_images()[0].get_array() for ax in part.axes]).reshape(2, 6, 16, 16, 3)
        np.testing.assert_array_equal(shown, pictures.image[block].transpose("replica", "pair", ...))
        names = [ax.get_title() for ax in part.axes[:6]]
        assert names == list(pictures.label_name.values)
    assert "independent" in first.get_suptitle()
    assert "= 1" in last.get_suptitle()


def test_a_few_pictures_keep_their_size(pictures):
    def sizes(figure):
        return [ax.get_window_extent().width for ax in figure.subfigs[0].axes if ax.get_visible()]

    few, many = (sizes(plain(figures.figure_pictures(p))) for p in (pictures.isel(pair=slice(2)), pictures))
    assert (len(few), len(many)) == (4, 12)
    np.testing.assert_allclose(few, many[0], rtol=0.05)


def test_class_names_are_not_formulas(pictures):
    names = ["$x", "$\\nonsense$", "a_b", "^", "%", "&"]
    plain(figures.figure_pictures(pictures.assign_coords(label_name=("pair", names))))


def test_noise_floor_per_band_with_its_limit(analysis):
    holed = analysis.copy(deep=True)
    holed.floor.loc[{"source": "network", "band": 2}] = np.nan
    ax = plain(figures.figure_noise_floor(holed)).axes[0]
    assert [bar.get_height() for bar in ax.patches] == [0.001, 0.002, 0, 0.008, 0.02, 0.06, 0.13]
    assert texts(ax) == ["0.001", "0.002", "–", "0.008", "0.020", "0.060", "0.130", "limit 0.1"]
    assert [line.get_ydata()[0] for line in ax.get_lines()] == [0.1]


def test_a_run_may_be_small(analysis):
    """Two couplings, DC and one more band."""
    small = analysis.isel(coupling=[0, 9], band=[0, 6]).assign_attrs(low_band=1, high_band=1)
    for name, (group, draw) in figures.FIGURES.items():
        if group == "analysis":
            assert plain(draw(small)).axes, name


@pytest.mark.slow
def test_every_figure_is_saved_twice(drawn_run):
    folder = drawn_run.path / "figures"
    expected = {f"{name}.{kind}" for name in figures.FIGURES for kind in ("png", "svg")}
    assert {path.name for path in folder.iterdir()} == expected
    for name in figures.FIGURES:
        with Image.open(folder / f"{name}.png") as image:
            assert image.width > 1000
            assert np.asarray(image.convert("L")).std() > 5  # something is drawn
        assert ElementTree.parse(folder / f"{name}.svg").getroot().tag.endswith("svg")


@pytest.mark.slow
def test_drawing_again_gives_the_same_files(drawn_run, analysis, fine):
    folder = drawn_run.path / "figures"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    draw_figures(folder, {name: partial(figures.FIGURES[name][1], analysis) for name in ("gap", "noise_floor")})
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    "mine", [{"text.usetex": True}, {"font.family": ["No Such Font"]}, {"svg.fonttype": "none", "axes.grid": True}]
)
def test_a_user_s_own_style_changes_nothing(mine, tmp_path, caplog):
    def figure():
        drawn, ax = new_figure(2, 1.5)
        ax.plot([0, 1], label="$g$ of 100 % _")
        ax.legend()
        return drawn

    draw_figures(tmp_path / "plain", {"one": figure})
    with matplotlib.rc_context(mine):
        draw_figures(tmp_path / "mine", {"one": figure})
    for kind in ("png", "svg"):
        assert (tmp_path / "mine" / f"one.{kind}").read_bytes() == (tmp_path / "plain" / f"one.{kind}").read_bytes()
    assert not caplog.records


def test_a_figure_that_cannot_be_written_leaves_the_old_one(analysis, monkeypatch, tmp_path):
    (tmp_path / "gap.png").write_bytes(b"old")

    def fail(self, path, **_):
        path.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", fail)
    with pytest.raises(OSError, match="no space left"):
        draw_figures(tmp_path, {"gap": partial(figures.figure_gap, analysis)})
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"gap.png": b"old"}
