"""A section of the report: what a study found, as data, so that pages are made from what is stored.

Every study writes its `Section` to ``section.json`` of its folder; `write_page` makes ``report.html`` of one folder, or
of several joined.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.frame.drawing import draw_figures
from experiments.frame.store import RunFolder, StoreError
from experiments.studies.compare.claims import Claim, finite
from experiments.studies.compare.page import claim_entry, embedded, facts, interval, number

PAPER = {
    1: "The synchronization gap is there without coupling",
    2: "It collapses under strong coupling",
    3: "It is localised in depth, in the last layers",
    4: "Low, global frequencies commit before high, local ones",
}


@dataclass
class Table:
    """Cells are strings; `estimate` makes those with an interval."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Section:
    """What a study has to say."""

    title: str
    question: str  # one or two sentences
    answer: str  # one sentence, with numbers
    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)  # of the figures, by name, in order
    methods: list[str] = field(default_factory=list)  # how it was measured, a paragraph each
    limits: list[str] = field(default_factory=list)


def estimate(values: ArrayLike, digits: int = 2) -> str:
    """``1.23 [1.00, 1.50]`` of (estimate, low, high); a dash where there is nothing."""
    point, low, high = np.asarray(values, np.float64)
    bounds = interval([low, high], digits)
    return number(point, digits) + (f" {bounds}" if bounds != number(None) else "")


def finish(
    run: RunFolder,
    section: Section,
    figures: Mapping[str, Callable[[], Figure]],
    timings: Mapping[str, float] | None = None,
) -> Path:
    """Stores section and figures ``{name: how to draw it}`` of a study; returns the path of its page.

    Args:
      timings: in seconds; given, they mark the run complete.
    """
    missing = set(figures) ^ set(section.captions)
    if missing:
        raise ValueError(f"figures and captions differ in {', '.join(sorted(missing))}")
    draw_figures(run.path / "figures", figures)
    run.write_json("section.json", finite(asdict(section)))
    run.write_json("claims.json", {"claims": [finite(asdict(claim)) for claim in section.claims]})
    if timings is not None:
        run.finish(timings)
    return write_page([run], run.path / "report.html")


def write_page(
    runs: Sequence[RunFolder],
    path: Path,
    *,
    title: str = "",
    summary: Sequence[Any] = (),
    joint: Sequence[Mapping[str, Any]] = (),
    others: Sequence[Any] = (),
) -> Path:
    """The page of the sections of these runs, under the first one's title by default.

    Args:
      summary: claims over all runs, in front, as the template wants them.
      joint: sections over several runs, before theirs, as the template wants them.
      others: further runs to name, ``{"name", "page", "text"}``.

    Raises:
      StoreError: a section, or a figure of it, is not stored.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    entries = [*joint, *(_entry(run) for run in runs)]
    page = environment.get_template("sections.html").render(
        title=title or entries[0]["title"], sections=entries, summary=summary, others=others
    )
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(page, encoding="utf-8")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def joint_page(folder: Path) -> Path:
    """``report.html`` of a folder of runs: what each says of the paper's four claims, the depth studies of several
    networks side by side, then the studies in full.

    Raises:
      StoreError: the folder holds no finished runs.
    """
    runs = [RunFolder.open(path.parent) for path in sorted(folder.glob("*/manifest.json"))]
    runs = [run for run in runs if (run.path / "claims.json").exists()]
    if not runs:
        raise StoreError(f"{folder} holds no finished run, nor folders of them; give the --out folder of a command")
    groups: dict[int, dict[str, Any]] = {}
    for run in runs:
        for claim in run.read_json("claims.json")["claims"]:
            if claim["verdict"] == "not tested":
                continue
            title = PAPER.get(claim["id"], "Claims of this package's own")
            group = groups.setdefault(claim["id"] or 99, {"id": claim["id"] or "", "title": title, "entries": []})
            where = {"section": run.path.name, "subject": _subject(run), "page": f"{run.path.name}/report.html"}
            group["entries"].append({**claim_entry(claim), **where})
    studies = [run for run in runs if (run.path / "section.json").exists()]
    others = [
        {"name": run.path.name, "page": f"{run.path.name}/report.html", "text": _subject(run)}
        for run in runs
        if run not in studies
    ]
    ordered = [groups[number] for number in sorted(groups)]
    depths = [run for run in studies if run.manifest.get("kind") == "depth"]
    joint = [_depth_family(folder, depths)] if len(depths) > 1 else []
    title = "Where diffusion transformers decide: all experiments"
    return write_page(studies, folder / "report.html", title=title, summary=ordered, joint=joint, others=others)


def _depth_family(folder: Path, runs: Sequence[RunFolder]) -> dict[str, Any]:
    from experiments.studies.depth.family import depth_family  # which imports this module

    section, figures = depth_family(runs)
    draw_figures(folder / "figures", figures)
    return {
        **_filled(asdict(section), folder / "figures"),
        "id": "depth-family",
        "command": "",
        "facts": [],
        "status": "complete",
    }


def _subject(run: RunFolder) -> str:
    return run.manifest.get("subject") or Path(run.manifest["settings"].get("weights", "")).name


def _entry(run: RunFolder) -> dict[str, Any]:
    manifest = run.manifest
    return {
        **_filled(run.read_json("section.json"), run.path / "figures"),
        "id": run.path.name,
        "command": manifest["command"],
        "facts": facts(manifest),
        "status": manifest["status"],
    }


def _filled(section: Mapping[str, Any], figures: Path) -> dict[str, Any]:
    """A section as the template wants it, with its figures inside."""
    shown = [
        {"name": name, "caption": caption, "source": embedded(figures / f"{name}.svg")}
        for name, caption in section["captions"].items()
    ]
    return {**section, "claims": [claim_entry(claim) for claim in section["claims"]], "figures": shown}
