"""Which verdicts depend on the kind of prediction, over runs of one study."""

import pytest

from experiments.frame.kinds import DIFFERS, OPEN, SAME, WITHIN, by_kind, compared, kind_of
from experiments.frame.page import NOTHING, Page, Section, store_page
from experiments.frame.store import RunFolder
from experiments.frame.study import joint_page
from experiments.frame.verdict import Claim


def made(path, verdict, prediction="v", flow="ddpm", title="It is late", **settings) -> RunFolder:
    model = {"prediction": prediction, "path": flow}
    extra = {"subject": "x", "kind": "depth", "model": model}
    run = RunFolder.create(path, {"weights": "x", "steps": "50", **settings}, extra=extra)
    store_page(run, Page(Section("Depth", "?", "!", [Claim(3, title, verdict, "share", 0.5, None, ".")]), {}))
    run.finish()
    return run


@pytest.mark.parametrize(
    ("verdicts", "said"),
    [
        ([["holds"], ["holds", "holds"]], SAME),
        ([["holds"], ["does not hold"]], DIFFERS),
        ([["holds"], ["undecided"], ["does not hold"]], DIFFERS),
        ([["holds"], ["undecided"]], OPEN),
        ([["holds", "undecided"], ["holds"]], OPEN),
        ([["holds", "does not hold"], ["holds"]], WITHIN),
        ([["undecided"], ["undecided"]], SAME),
        ([["holds"], ["not tested"]], NOTHING),
        ([["holds"]], NOTHING),
    ],
)
def test_only_a_verdict_and_its_opposite_differ(verdicts, said):
    assert compared(verdicts) == said


def test_a_row_for_each_claim_and_a_column_for_each_kind(tmp_path):
    runs = [
        made(tmp_path / "a", "holds", "epsilon"),
        made(tmp_path / "b", "does not hold"),
        made(tmp_path / "c", "undecided"),
        made(tmp_path / "d", "holds", "velocity", "linear", title="It is early", steps="20"),
    ]
    table = by_kind("depth", runs)
    assert table is not None
    assert table.head == ["claim", "epsilon: 1 run", "v: 2 runs", "velocity (linear path): 1 run", "of the kinds"]
    assert table.rows == [
        ["(3) It is late", "holds", "does not hold (1), undecided (1)", NOTHING, DIFFERS],
        ["(3) It is early", NOTHING, NOTHING, "holds", NOTHING],
    ]
    assert table.note.endswith("too: steps.")
    assert by_kind("depth", runs[1:3]) is None
    assert kind_of({"settings": {}}) is None


def test_the_joint_page_shows_the_table_only_where_kinds_differ(tmp_path):
    made(tmp_path / "a", "holds", "epsilon")
    made(tmp_path / "b", "holds", "v")
    text = joint_page(tmp_path, lambda kind: None).read_text()
    assert text.index('id="summary"') < text.index('id="kinds-table-1"') < text.index('id="a"')
    assert f"<td>{SAME}</td>" in text
    one = tmp_path / "alike"
    made(one / "a", "holds")
    made(one / "b", "does not hold")
    assert 'id="kinds"' not in joint_page(one, lambda kind: None).read_text()
