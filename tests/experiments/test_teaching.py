"""The teaching figures: the page from the command line, and that the figures show what the theory says."""

import re
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import cli
from experiments.tools import teaching
from experiments.tools.playground import build
from experiments.tools.teaching import LESSONS
from ou_theory.process import transition_time

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("theory") / "page"
    assert cli.main(["theory", "--out", str(out)]) == 0
    return out


@pytest.mark.long
def test_the_page_holds_every_figure_with_two_lines(folder, has_ink):
    page = (folder / "theory.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == len(LESSONS)
    assert "http" not in re.sub(r'src="data:[^"]*"', "", page)
    for name, lesson in LESSONS.items():
        assert has_ink(folder / "figures" / f"{name}.png")
        assert f'<section id="{name}">' in page
        assert len(re.findall(r"[.;](?: |$)", lesson.caption)) >= 2
        assert len(lesson.caption) < 240
    assert 'href="playground.html"' in page
    assert (folder / "playground.html").read_text() == build()
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_sections_that_figures_name_are_there():
    text = (Path(__file__).parents[2] / "docs" / "theory.md").read_text()
    for lesson in LESSONS.values():
        assert re.search(rf"^###? {re.escape(lesson.section)}\.? ", text, re.MULTILINE), lesson.section


def drawn(figure, panel, label):
    (line,) = (line for line in figure.axes[panel].lines if line.get_label() == label)
    return np.asarray(line.get_xdata()), np.asarray(line.get_ydata())


def test_the_pitchfork_opens_at_the_speciation_time():
    with jax.enable_x64(True):
        t, minima = drawn(teaching.pitchfork(), 1, "minima")
    onset = float(transition_time(1.0, teaching.SPREAD))
    assert (minima[t > onset] == 0).all()
    assert (minima[t < onset - 0.01] > 0).all()
    assert minima[0] == pytest.approx(np.sqrt(teaching.CENTRE2), rel=1e-6)


def test_one_gain_leaves_the_timing_gap_and_closes_the_latched_one():
    with jax.enable_x64(True):
        figure = teaching.gap_against_gate()
    (_, timing), (_, latched) = (
        drawn(figure, 0, label) for label in ("timing  $\\Gamma_\\tau$", "latched, all counted")
    )
    assert np.ptp(timing) < 0.06 * timing[0]
    assert latched[-1] < 0.01 * latched[0]


def test_clones_of_clusters_agree_more_than_gaussian_ones():
    with jax.enable_x64(True):
        figure = teaching.cloning_curves()
    (_, gaussian), (_, clusters) = (drawn(figure, 0, label) for label in ("Gaussian mode", "two clusters"))
    assert (clusters >= gaussian - 1e-9).all()
    assert (clusters - gaussian).max() > 0.05
