"""Two modalities: readings of clones, schedules, verdicts, and the study end to end."""

import json

import numpy as np
import pytest

from experiments import cli
from experiments.frame import study
from experiments.frame.store import RunFolder
from experiments.studies.modalities import cases
from experiments.studies.modalities import measure as mo
from experiments.studies.modalities.clone_reading import SPECIATION, end_of_line, read_crossing, read_zero
from experiments.studies.modalities.figures import gaps
from experiments.studies.modalities.page import agree, deviations, largest, with_bounds
from experiments.studies.modalities.settings import ModalitiesConfig
from ou_theory.cluster_laws import sign_correlation
from ou_theory.schedules import scheduled_noise

FLAGS = ["--paths", "1000", "--steps", "2", "--trials", "400", "--quiet"]


def test_the_level_is_that_of_speciation():
    assert pytest.approx(float(sign_correlation(np.ones(()))), abs=1e-6) == SPECIATION


# --- readings


def curve(t):
    return 1 / (1 + t**2)


def test_a_cubic_is_read_exactly():
    t = np.linspace(0, 2, 21)
    found = read_crossing(t, 0.9 - 0.3 * t - 0.02 * t**3, np.full(21, 0.01), 0.5)
    root = np.real(next(r for r in np.roots([-0.02, 0, -0.3, 0.4]) if abs(r.imag) < 1e-9))
    assert found.value == pytest.approx(root, abs=1e-9)
    assert 0 < found.error < 0.02


def test_errors_of_readings_are_what_they_say():
    """600 curves with noise: root mean square of the deviations in standard errors within 5 of its own error (0.03) of
    1, mean within 5 of 0."""
    rng, t = np.random.default_rng(0), np.linspace(0.1, 2.5, 25)
    error = 0.012 * np.sqrt(1 - curve(t) ** 2)
    found = np.array([read_crossing(t, curve(t) + error * rng.normal(size=25), error, 0.5) for _ in range(600)])
    exact = read_crossing(t, curve(t), error, 0.5).value
    assert exact == pytest.approx(1, abs=2e-3)
    z = (found[:, 0] - exact) / found[:, 1]
    assert abs(z.mean()) < 5 / 600**0.5
    assert (z**2).mean() ** 0.5 == pytest.approx(1, abs=0.15)


@pytest.mark.parametrize(
    "values", [np.full(10, 0.9), np.linspace(0.3, 0.9, 10), np.array([1, 1, 1, 1, 0.6, 0.4, 0, 0, 0, 0.0])]
)
def test_no_crossing_is_no_number(values):
    """None at all, a rising curve, too few points."""
    assert np.isnan(read_crossing(np.arange(10.0), values, np.full(10, 0.01), 0.5)).all()


def test_zero_of_the_mean_over_trials():
    rng, t = np.random.default_rng(0), np.geomspace(0.2, 1.5, 20)
    odds = -2 * np.log(t / 0.5) + rng.normal(size=(4000, 1))
    found = read_zero(t, odds)
    assert found.error == pytest.approx(0.5 / 2 / 4000**0.5, rel=0.1)
    assert abs(found.value - 0.5) < 5 * found.error
    for nowhere in (odds + 20, odds + 5, -odds):
        assert np.isnan(read_zero(t, nowhere)).all()


def test_end_of_a_line():
    sizes = np.array([10, 20, 40])
    readings = np.stack([0.4 + 2 / sizes, np.full(3, 0.01)], -1)
    assert end_of_line(sizes, readings).value == pytest.approx(0.4)
    readings[1] = np.nan
    assert np.isnan(end_of_line(sizes, readings)).all()


# --- verdicts


def test_verdicts():
    assert agree(np.array([0.5, -2.0, 1.0]))[0] == "holds"
    assert agree(np.array([0.5, -6.0, 1.0]))[0] == "does not hold"
    many = np.zeros(1000)
    many[0] = 3.5
    assert agree(many)[0] == "holds"  # one in a thousand is as far off by chance
    assert agree(many[:1])[0] == "does not hold"
    assert agree(np.array([]))[0] == "undecided"
    assert agree(np.array([0.1, np.nan]))[0] == "undecided"  # what could not be read does not agree
    assert largest(np.array([0.1, np.nan, -2.0])) == 2
    assert np.isnan(largest(np.array([np.nan])))


def test_gaps_and_deviations():
    found = np.array([[[1.0, 0.3], [0.4, 0.4]], [[np.nan, np.nan], [1.0, 0.1]]])
    np.testing.assert_allclose(gaps(found)[0], [0.6, 0.5])
    theory = np.array([[0.7, 0.4], [1.0, np.nan]])
    np.testing.assert_allclose(deviations(found, theory), [1.0, 0.0, np.nan])
    low, high = with_bounds(np.array([1.0, 0.1]))
    assert (low, high) == pytest.approx((0.727, 1.273), abs=1e-3)  # 99.4 % each, for eight claims


# --- schedules


def test_schedules_have_one_integral_or_no_gap():
    known, width = cases.schedules(), np.diff(cases.EDGES)[0]
    for name, g in known.items():
        total = g.sum() * width
        if name not in ("none", "reversed"):
            assert total == pytest.approx(cases.TOTAL), name
    common, difference = cases.schedule_times(known["reversed"])
    assert common - difference == pytest.approx(0, abs=1e-5)
    assert np.abs(known["reversed"]).min() > 0.1
    assert np.subtract(*cases.schedule_times(known["noisy half"])) == pytest.approx(0, abs=1e-5)


def test_noise_between_the_edges_of_a_schedule():
    g = cases.schedules()["rising with noise"]
    on_grid = cases.schedule_noise(g, cases.EDGES)
    np.testing.assert_allclose(on_grid.T, scheduled_noise(np.stack([cases.B - g, cases.B + g]), cases.EDGES), rtol=1e-5)
    between = cases.schedule_noise(g, np.array([1.61, 0.0, 0.013]))  # any order, beyond the grid
    assert np.all(between[0] > on_grid[-1])
    np.testing.assert_allclose(between[1], 0)
    assert np.all((between[2] > 0) & (between[2] < on_grid[1]))


# --- the study


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "modalities"
    assert cli.main(["modalities", "--out", str(out), *FLAGS]) == 0
    return RunFolder.open(out)


@pytest.mark.long
def test_the_folder_holds_what_theory_and_simulation_say(finished):
    assert finished.manifest["status"] == "complete"
    assert finished.manifest["kind"] == "modalities"
    pair = finished.load("speciation")
    assert pair.speciation.dims == ("coupling", "mode", "reading")
    np.testing.assert_allclose(pair.speciation_fitted, pair.speciation_theory, atol=0.01)
    z = deviations(pair.speciation.values, pair.speciation_theory.values)
    assert z.size == 14
    assert np.abs(z).max() < 5
    for name in mo.PARTS:
        assert finished.load(name).sizes
    page = (finished.path / "report.html").read_text()
    drawn = sorted((finished.path / "figures").glob("*.svg"))
    assert drawn
    assert page.count("data:image/svg+xml;base64,") == len(drawn)
    assert "At equal total, coupling near the data opens a larger gap than coupling near the noise" in page


@pytest.mark.long
def test_claims_have_controls_that_fail(finished):
    """With few paths, too: theory agrees, and what must fail does."""
    claims = json.loads((finished.path / "claims.json").read_text())["claims"]
    assert len(claims) == 8
    assert {c["verdict"] for c in claims} == {"holds"}
    names = [k["name"] for c in claims for k in c["controls"]]
    assert len(set(names)) == len(names)
    control = {k["name"]: k["also_holds"] for c in claims for k in c["controls"]}
    for name in ("no coupling", "rates without coupling", "times without coupling", "gap of far clusters",
                 "the other direction", "d = 28 alone", "waves without coupling", "constant coupling"):  # fmt: skip
        assert control[name] is False, name


@pytest.mark.long
def test_an_interrupted_run_ends_with_the_same_bits(finished, tmp_path, monkeypatch):
    out = tmp_path / "again"
    calls = []

    def dies(config):
        calls.append("dies")
        raise KeyboardInterrupt

    def stored(name):  # as it was measured before, to save the time
        return lambda config: finished.load(name)

    for name in mo.PARTS:
        monkeypatch.setitem(mo.MEASURES, name, stored(name))
    monkeypatch.setitem(mo.MEASURES, "filtering", dies)
    assert cli.main(["modalities", "--out", str(out), *FLAGS]) == 130
    monkeypatch.undo()
    monkeypatch.setitem(mo.MEASURES, "scheduling", stored("scheduling"))
    for name in mo.PARTS[: mo.PARTS.index("filtering")]:  # done before
        monkeypatch.setitem(mo.MEASURES, name, lambda config: pytest.fail("measured twice"))
    monkeypatch.setattr(study, "report", lambda of, run, **_: run.path)  # test_a_stored_run_is_drawn_again has this law
    assert cli.main(["modalities", "--out", str(out), "--resume", *FLAGS]) == 0
    assert calls == ["dies"]
    for name in mo.PARTS:
        assert RunFolder.open(out).load(name).identical(finished.load(name))
    assert cli.main(["modalities", "--out", str(out), *FLAGS]) == 2  # taken


@pytest.mark.long
def test_a_stored_run_is_drawn_again(finished):
    before = (finished.path / "report.html").read_text()
    (finished.path / "report.html").unlink()
    assert cli.main(["report", str(finished.path)]) == 0
    assert (finished.path / "report.html").read_text() == before


@pytest.mark.parametrize(("name", "least"), [("paths", 100), ("steps", 1), ("trials", 50)])
def test_bad_settings_are_refused(name, least):
    with pytest.raises(ValueError, match=f"{name} must be at least {least}"):
        ModalitiesConfig(**{name: least - 1})
