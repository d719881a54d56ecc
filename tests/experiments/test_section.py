"""Sections and their pages, and the frame that studies share."""

import shutil
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from matplotlib.figure import Figure

from experiments import studies
from experiments.cli import main
from experiments.frame.bench import Bench
from experiments.frame.collection import runs_in
from experiments.frame.draws import pair_draws, resampled_mean, with_interval
from experiments.frame.page import Page, Section, Table, formatted, store_page, stored_section, write_page
from experiments.frame.settings import StudyConfig
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import Study, joint_page, report
from experiments.frame.subject import load_network, load_subject, untrained_model
from experiments.frame.verdict import Claim, Control
from ou_theory.bootstrap import family_level

VARIABLES = {"level": (("step", "band"), "something")}


def section(verdict="holds", value=0.7):
    control = Control("untrained <network>", 0.6, [0.55, 0.65], True, "Also.")
    claim = Claim(3, "Late", verdict, "share", value, [0.6, 0.8], "So it is.", [control])
    table = Table("Numbers", ["a", "b"], [["1", "2 <3>"]], "Noted.")
    return Section(
        "Depth: x & y", "Where?", "There.", [claim], [table], {"one": "A caption."}, ["Like this."], ["Small."]
    )


def made(path, **changes):
    run = RunFolder.create(path, {"weights": "x"}, command="syncgap depth", extra={"subject": "x", "kind": "depth"})
    page = Page(section(**changes), {"one": partial(Figure, (2, 2))})
    report(Study("depth", StudyConfig, lambda bench: None, lambda measured, analysis: page), run)
    return run


def bench(weights, out, resume=False, **changes):
    config = StudyConfig(weights=weights, steps="5", **{"pairs": 5, "block": 2, **changes})
    return Bench("depth", config, out, resume=resume)


def test_a_page_holds_claims_tables_figures_and_limits_escaped(tmp_path):
    run = made(tmp_path / "run")
    text = (run.path / "report.html").read_text()
    for part in (
        "Depth: x &amp; y",
        "untrained &lt;network&gt;",
        "2 &lt;3&gt;",
        "0.70",
        "[0.60, 0.80]",
        "A caption.",
        "Small.",
    ):
        assert part in text
    assert "data:image/svg+xml;base64," in text
    assert run.manifest["status"] == "complete"
    assert run.read_json("claims.json")["claims"][0]["id"] == 3


def test_figures_without_captions_are_refused(tmp_path):
    run = RunFolder.create(tmp_path / "run", {})
    with pytest.raises(ValueError, match="two"):
        store_page(run, Page(section(), {"one": Figure, "two": Figure}))
    assert not (tmp_path / "run" / "section.json").exists()


def test_verdicts_of_a_page_are_right_together_with_95_percent():
    claim = section().claims[0]
    untested = replace(claim, verdict="not tested")
    Section("One", "?", "!", [claim, untested])
    with pytest.raises(ValueError, match="family_level"):
        Section("Two", "?", "!", [claim, claim])
    Section("Two", "?", "!", [replace(claim, level=family_level(2))] * 2)


def test_a_claim_is_shown_with_the_level_of_its_interval(tmp_path):
    claim = replace(section().claims[0], level=family_level(3))
    run = RunFolder.create(tmp_path / "run", {"weights": "x"}, extra={"subject": "x", "kind": "depth"})
    store_page(run, Page(Section("Depth", "?", "!", [claim]), {}))
    text = write_page(tmp_path / "page.html", [stored_section(run)]).read_text()
    assert "(interval: 98.3 %)" in text


def test_runs_of_a_folder_are_joined_by_claim(tmp_path):
    made(tmp_path / "a")
    made(tmp_path / "b", verdict="does not hold", value=0.1)
    unfinished = RunFolder.create(tmp_path / "c", {})
    assert unfinished.manifest["status"] == "running"
    text = joint_page(tmp_path, lambda kind: None).read_text()
    assert text.count('class="verdict holds"') == 2  # in the summary, and in its section
    assert text.count('class="verdict does-not-hold"') == 2
    assert "localised in depth" in text
    assert text.index('id="a"') < text.index('id="b"')
    assert 'id="c"' not in text


def test_what_is_no_run_is_listed_and_left_out(tmp_path, capsys, monkeypatch):
    for name in ("a", "several/a", "several/b"):
        made(tmp_path / name)
    RunFolder.create(tmp_path / "begun", {})
    there = {
        "pictures/manifest.json": '{"format": "syncgap-pictures"}',
        "xl2/manifest.json": '{"format": "syncgap-dit"}',
        "mine/run.json": "{}",
        "mine/log.jsonl": "",
        "mine/model/manifest.json": '{"format": "syncgap-dit"}',
        "theory/theory.html": "",
        "torn/manifest.json": '{"format": ',
        "foreign/manifest.json": '{"format": ["x"]}',
        "newer/manifest.json": '{"format": "syncgap-run", "format_version": 99}',
        "several/c/manifest.json": '{"format": "syncgap-dit"}',
        ".hidden/manifest.json": "{}",
        "note.txt": "",
    }
    for name, text in there.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / "newer" / "section.json").write_text("{}")
    runs, others = runs_in(tmp_path)
    assert list(runs) == ["a", "several/a", "several/b"]
    assert list(others) == ["begun", "foreign", "mine", "newer", "pictures", "theory", "torn", "xl2"]
    assert others["pictures"] == "pictures"
    assert (others["xl2"], others["mine"], others["theory"]) == ("a model", "a training run", "no run")
    assert "--resume" in others["begun"]
    assert "version 99" in others["newer"]
    monkeypatch.setattr(studies, "find", lambda name: None)  # these runs cannot be laid side by side
    assert main(["report", str(tmp_path)]) == 0
    told = capsys.readouterr()
    text = (tmp_path / "report.html").read_text()
    for name, what in others.items():
        assert f"{name}: {what}" in told.err
        assert f"{name} ({what.split()[0]}" in text
    assert all(f'id="{name}"' in text and f'href="./{name}/report.html"' in text for name in runs)


def test_a_folder_without_runs_has_no_page(tmp_path):
    with pytest.raises(StoreError, match="no finished run"):
        joint_page(tmp_path, lambda kind: None)
    with pytest.raises(StoreError, match=r"section\.json"):
        stored_section(RunFolder.create(tmp_path / "empty", {}))
    assert not (tmp_path / "report.html").exists()


def test_estimates_are_written_with_their_intervals():
    assert formatted([1.234, 1.0, 1.5]) == "1.23 [1.00, 1.50]"
    assert formatted([-0.5, -1, 0], 1) == "−0.5 [−1.0, 0.0]"
    assert formatted([np.nan] * 3) == "–"


def test_blocks_are_measured_once_and_kept(weights, tmp_path):
    seen = []

    def measure(pairs, labels, fail_at=99):
        if fail_at in pairs:
            raise RuntimeError("power cut")
        seen.append(list(pairs))
        return {"level": np.broadcast_to(pairs[:, None, None] + 10.0 * labels[:, None, None], (len(pairs), 5, 7))}

    with pytest.raises(RuntimeError):
        bench(weights, tmp_path / "run").measure("network", VARIABLES, {}, 5, partial(measure, fail_at=4))
    found = bench(weights, tmp_path / "run", resume=True).measure("network", VARIABLES, {}, 5, measure)
    assert seen == [[0, 1], [2, 3], [4]]
    assert found.level.dims == ("pair", "step", "band")
    np.testing.assert_array_equal(found.level[:, 0, 0], [0, 11, 22, 3, 14])  # classes in turn
    np.testing.assert_array_equal(found.label, [0, 1, 2, 0, 1])
    assert {"ell", "radius"} <= set(found.coords)


def test_the_control_has_the_subjects_shape_and_other_weights(weights, tmp_path):
    subject = load_subject(weights)
    assert subject.name == "tiny"
    assert subject.image_shape == (8, 8, 3)
    assert load_subject(shutil.copytree(weights, tmp_path / "run7" / "model")).name == "run7"
    blank, network = untrained_model(subject.config, 0), load_network(weights)
    assert blank.config == network.config
    assert not np.allclose(blank.x_embedder.kernel[...], network.x_embedder.kernel[...])
    assert np.abs(blank.final_layer.linear.kernel[...]).max() > 0  # zero at initialisation, drawn here


def test_resampling_is_by_pairs_and_repeatable():
    weights = pair_draws(3, 6, 50)
    np.testing.assert_array_equal(weights, pair_draws(3, 6, 50))
    np.testing.assert_allclose(weights.sum(1), 1)
    values = np.arange(12.0).reshape(6, 2)
    means = resampled_mean(values, weights)
    np.testing.assert_allclose(means[:, 1] - means[:, 0], 1)  # one draw for both columns
    interval = with_interval(values.mean(0), means)
    assert interval.shape == (2, 3)
    assert np.all((interval[:, 1] < interval[:, 0]) & (interval[:, 0] < interval[:, 2]))
