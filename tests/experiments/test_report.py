"""The report: the stored numbers, the verdicts, the warnings, and nothing from elsewhere."""

import base64
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest

from dit_jax.attention import GATE_KINDS
from experiments.frame import page as frame
from experiments.frame.gates import RHO, told
from experiments.frame.page import stored_section, write_page
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import joint_page
from experiments.studies.compare.claims import _exact_remains
from experiments.studies.compare.figures import FIGURES
from experiments.studies.compare.page import limits, section
from experiments.studies.compare.study import STUDY
from ou_theory.attention import rho

pytestmark = pytest.mark.slow  # the figures are drawn once

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Cells of every table by its id, texts of elements by class, addresses, and open tags."""

    def __init__(self, text: str):
        super().__init__()
        self.tables, self.addresses, self.open, self.text = {}, [], [], []
        self.rows: list = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.addresses += [found[name] for name in ("src", "href", "srcset", "data", "action") if found.get(name)]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.rows = self.tables.setdefault(found.get("id", f"table {len(self.tables)}"), [])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if "td" in self.open or "th" in self.open:
            self.rows[-1][-1] += f" {data.strip()}"


def write(run, **manifest):
    return write_page(run.path / "report.html", [stored_section(run, {**run.manifest, **manifest})])


def read(run) -> tuple[str, Page]:
    text = (run.path / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


@pytest.fixture(scope="module")
def written(drawn_run) -> tuple[str, Page]:
    assert write(drawn_run) == drawn_run.path / "report.html"
    return read(drawn_run)


@pytest.fixture
def copy(drawn_run, tmp_path) -> RunFolder:
    shutil.copytree(drawn_run.path, tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


def numbers(cell: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.\d+", cell.replace("−", "-"))]


def test_table_over_couplings_holds_the_stored_numbers(written, analysis):
    rows = written[1].tables["run-table-1"][1:]
    assert len(rows) == 10
    network, recursion, ideal, blank = (
        analysis.sel(source=source) for source in ("network", "regression gain", "data covariance", "untrained")
    )
    columns = [
        (network.tau[:, 1], network.tau_interval[:, 1], 0.005),
        (network.tau[:, 6], network.tau_interval[:, 6], 0.005),
        (network.decided[:, 1], network.decided_interval[:, 1], 0.0005),
        (network.decided[:, 6], network.decided_interval[:, 6], 0.0005),
        (network.gap, network.gap_interval, 0.005),
        (network.gap_steps, network.gap_steps_interval, 0.05),
        (recursion.gap, recursion.gap_interval, 0.005),
        (ideal.gap, ideal.gap_interval, 0.005),
        (blank.gap, blank.gap_interval, 0.005),
    ]
    for c, row in enumerate(rows):
        assert row[0].strip() == f"{float(analysis.coupling[c]):.4g}"
        for cell, (values, bounds, rounding) in zip(row[1:], columns, strict=True):
            expected = [float(values[c]), *bounds[c].values]
            if np.isnan(expected[0]):
                assert cell.strip() == "–"
            else:
                known = [value for value in expected if np.isfinite(value)]  # a theory of the data has no interval
                np.testing.assert_allclose(numbers(cell), known, atol=rounding * 1.001)
    assert rows[9][8].strip() == "–"  # the exact denoiser decides nothing at g = 1
    assert rows[1][9].strip() == "–"  # the untrained network was not run there


def test_weak_levels_are_marked(written):
    rows = written[1].tables["run-table-1"][1:]
    assert [("†" in "".join(row)) for row in rows] == [False] * 9 + [True]
    assert "†" in rows[9][1]


def test_table_over_bands_holds_the_stored_numbers(written, analysis):
    rows = written[1].tables["run-table-4"][1:]
    assert [row[0].strip() for row in rows] == ["DC", *(f"r = {r:.2f}" for r in analysis.radius.values[1:])]
    at = analysis.isel(coupling=0)
    for band, row in enumerate(rows):
        network = at.sel(source="network").isel(band=band)
        assert int(row[1]) == int(analysis["count"][band])
        np.testing.assert_allclose(numbers(row[2]), [network.tau, *network.tau_interval.values], atol=0.00501)
        np.testing.assert_allclose(numbers(row[3]), [network.tau_steps], atol=0.0501)
        for column, theory in ((4, "data covariance"), (6, "regression gain")):
            known = at.isel(band=band).sel(source=theory)
            assert numbers(row[column])[0] == pytest.approx(known.tau.item(), abs=0.00501)
            apart = at.isel(band=band).sel(theory=theory)
            stated = [apart.tau_excess, *apart.tau_excess_interval.values]
            np.testing.assert_allclose(numbers(row[column + 1]), stated, atol=0.00501)
        np.testing.assert_allclose(numbers(row[8]), [network.projection_level], atol=0.00501)
        np.testing.assert_allclose(numbers(row[9]), [network.floor], atol=0.000501)


def test_tables_of_what_theory_leaves_hold_the_stored_numbers(written, analysis):
    for table, theory in ((5, "regression gain"), (6, "data covariance")):
        excess = analysis.sel(theory=theory)
        for c, row in enumerate(written[1].tables[f"run-table-{table}"][1:]):
            expected = [*excess.tau_excess.values[c], excess.gap_excess.values[c]]
            for cell, value in zip(row[1:], expected, strict=True):
                if np.isnan(value):
                    assert cell.strip() == "–"
                else:
                    assert numbers(cell)[0] == pytest.approx(value, abs=0.00501)


def test_tables_over_estimators_and_energies_hold_the_stored_numbers(written, analysis):
    by, ends = (written[1].tables[f"run-table-{n}"][1:] for n in (2, 3))
    for c, (row, energies) in enumerate(zip(by, ends, strict=True)):
        found = np.array([numbers(cell) for cell in row[1:]])
        expected = np.concatenate([analysis.gap_by.values[:, c, None], analysis.gap_by_interval.values[:, c]], 1)
        np.testing.assert_allclose(found, expected, atol=0.00501)
        np.testing.assert_allclose([numbers(cell)[0] for cell in energies[1:]], analysis.end_energy[c], atol=0.000501)


def test_every_claim_has_its_verdict_value_and_interval(written, drawn_run):
    text, _ = written
    claims = drawn_run.read_json("claims.json")["claims"]
    assert [(claim["id"], claim["verdict"]) for claim in claims] == [
        (1, "holds"),
        (2, "undecided"),
        (3, "not tested"),
        (4, "holds"),
    ]
    for index, claim in enumerate(claims, 1):
        card = re.search(rf'<article class="claim" id="run-claim-{index}">.*?</article>', text, re.S)[0]
        assert claim["title"] in card
        shown = "not tested here" if claim["verdict"] == "not tested" else claim["verdict"]
        assert f">{shown}</span>" in card
        if claim["value"] is not None:
            assert f'<span class="value">{frame.number(claim["value"])}</span>' in card
            assert frame.interval(claim["interval"]) in card
        for control in claim["controls"]:
            assert control["name"] in card
            assert frame.number(control["value"]) in card
    assert '<span class="value">' not in re.search(r'id="run-claim-3">.*?</article>', text, re.S)[0]


def test_a_control_that_also_holds_is_flagged_and_no_other(written):
    text, _ = written
    cards = dict(re.findall(r'<article class="claim" id="run-claim-(\d)">(.*?)</article>', text, re.S))
    assert {number for number, card in cards.items() if "Also holds on: untrained network." in card} == {"4"}
    assert "<strong>yes</strong>" in cards["4"]
    assert "<strong>yes</strong>" not in cards["1"]


def test_nothing_is_loaded_from_elsewhere(written):
    text, page = written
    assert text.startswith("<!doctype html>")
    assert page.open == []  # every element is closed
    assert all(address.startswith("data:image/svg+xml;base64,") for address in page.addresses)
    assert not re.search(r"https?:|url\(|@import|<script", text)
    assert len(text.encode()) < 3_000_000


def test_every_figure_is_embedded_with_a_caption(written, drawn_run):
    text, page = written
    embedded = {base64.b64decode(address.partition(",")[2]) for address in page.addresses}
    assert embedded == {(drawn_run.path / f"figures/{name}.svg").read_bytes() for name in FIGURES}
    for name in FIGURES:
        caption = re.search(rf'id="run-{name}">.*?<figcaption>(.*?)</figcaption>', text, re.S)[1]
        assert len(caption) > 40


def test_values_are_escaped(written):
    text, page = written
    assert "'runs/a <b>'" in "".join(page.text)
    assert "<b>" not in text


def test_what_was_run_and_how_to_run_it_again(written, stored_run):
    _, page = written
    text = re.sub(r"\s+", " ", "".join(page.text))
    assert "64 pairs of replicas of photos16-v (12 layers of width 96" in text
    assert "50 steps of DDIM, gate joint, guidance 1, seed 0" in text
    assert "0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1" in text
    assert "sampling 2 min 51 s" in text
    facts = {row[0].strip(): row[1].strip() for row in page.tables["run-settings"]}
    assert facts["weights digest"] == "ab12" * 16
    assert facts["seed"] == "0"
    assert f"numpy {np.__version__}" in facts["packages"]
    assert stored_run.manifest["started"] in facts["started, finished"]
    assert "Low is r = 0.11, high is r = 1.21" in text
    for word in (
        "Commitment level",
        "Decided fraction",
        "Synchronization gap",
        "One-pass gain",
        "Noise floor",
        "Interval",
    ):
        assert word in text


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_the_exact_control_goes_by_the_gain_of_its_gate(kind, analysis):
    (control,) = _exact_remains(analysis.assign_attrs(gate_kind=kind))
    gain = np.asarray(rho(analysis.coupling.values, kind))
    assert f"at g = {analysis.coupling.values[gain > 1e-7][-1]:g}." in control.statement
    assert ("below 0" in control.statement) == (gain < 0).any()


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_the_page_speaks_of_the_gate_that_was_run(kind, analysis, stored_run):
    found = section(stored_run.manifest, analysis.assign_attrs(gate_kind=kind))
    text = " ".join([*found.methods, *found.definitions.values()])
    assert f"multiplied by {RHO[kind]}" in text
    assert f"The ideal model has {RHO[kind]}." in text
    assert told(kind) in text
    assert ("times too large" in text) == (kind in ("additive", "tanh"))
    assert any("between 0.97 and 1.04 times the energy of an uncoupled one" in limit for limit in found.limits)


def test_runs_side_by_side_and_what_counts_as_a_training(drawn_run, tmp_path):
    """Three runs that were measured alike are trainings of one network; another seed of the noise is something else."""
    for name in ("one", "two", "three", "other"):
        shutil.copytree(drawn_run.path, tmp_path / name)
    path = tmp_path / "other" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["settings"]["seed"] = 7
    path.write_text(json.dumps(manifest))
    text = joint_page(tmp_path, {"compare": STUDY}.get).read_text()
    assert text.index('id="compare-together"') < text.index('id="one"')
    ids = re.findall(r' id="([^"]*)"', text)
    assert len(ids) == len(set(ids)) > 20
    tables = Page(text).tables
    rows = tables["compare-together-table-1"][1:]
    assert [row[0].strip() for row in rows] == ["one", "other", "three", "two"]
    assert {row[7].strip() for row in rows} == {"0", "7"}
    again = tables["compare-together-table-2"][1:]
    assert {row[0].split(": ")[1].strip() for row in again} == {"one, three, two"}
    assert {row[4].strip() for row in again} == {"0.00"}  # one run is no spread


def test_limits_speak_of_this_run(written):
    text = re.sub(r"\s+", " ", "".join(written[1].text))
    assert "The noise floor is 0.130 at most. It is above 0.1 in r = 1.21" in text
    assert "ℓ ≥ −6.0" in text
    assert "No more than the error where the window opens is decided in: DC, r = 0.11 at g = 1;" in text
    assert "at most 0.00" in text  # the exact denoiser's deviation


def test_limits_of_a_clean_run(analysis):
    clean = analysis.assign(floor=0 * analysis.floor, weak=analysis.weak & False)
    found = " ".join(limits(clean))
    assert "The noise floor is 0.000 at most. No band is above 0.1." in found
    assert "In every band and at every coupling more is decided than the error" in found


def test_claims_without_values_are_dashes(copy):
    section = json.loads((copy.path / "section.json").read_text())
    section["claims"][0].update(value=None, interval=[None, None])
    (copy.path / "section.json").write_text(json.dumps(section))
    write(copy)
    assert '<span class="value">–</span> <span class="quiet">–</span>' in read(copy)[0]


def test_an_unfinished_run_says_so(copy, written):
    assert "This run is not finished" not in written[0]
    write(copy, status="running")
    assert "This run is not finished" in read(copy)[0]


def test_what_is_missing_is_named_and_the_old_page_stays(copy, written):
    before = (copy.path / "report.html").read_bytes()
    (copy.path / "figures/gap.svg").unlink()
    with pytest.raises(StoreError, match=r"gap\.svg cannot be read.*syncgap report"):
        write(copy)
    (copy.path / "section.json").unlink()
    (copy.path / "figures/gap.svg").write_text("<svg/>")
    with pytest.raises(StoreError, match=r"no section\.json"):
        write(copy)
    assert (copy.path / "report.html").read_bytes() == before


@pytest.mark.parametrize(
    ("value", "digits", "shown"),
    [
        (1.005, 1, "1.0"),
        (-0.31, 2, "−0.31"),
        (-0.001, 2, "0.00"),
        (np.nan, 2, "–"),
        (None, 2, "–"),
        (np.inf, 2, "–"),
        (3, 0, "3"),
    ],
)
def test_numbers(value, digits, shown):
    assert frame.number(value, digits) == shown


@pytest.mark.parametrize(
    ("bounds", "shown"), [([-1, 2.5], "[−1.00, 2.50]"), (None, "–"), ([None, 1.0], "–"), ([np.nan, np.nan], "–")]
)
def test_intervals(bounds, shown):
    assert frame.interval(bounds) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.4, "0 s"), (59.6, "1 min 00 s"), (245, "4 min 05 s"), (7380, "2 h 03 min")]
)
def test_durations(seconds, shown):
    assert frame.duration(seconds) == shown
