"""The findings of a study as data: sections, which are stored, and the pages that are made of them.

Every run stores its `Section` in ``section.json``, with its figures beside it. `write_page` makes ``report.html`` of
one run, or of several joined. A page loads nothing from elsewhere, so it can be passed on as one file.
"""

import base64
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure
from numpy.typing import ArrayLike

from experiments.frame import latents
from experiments.frame.drawing import draw_figures
from experiments.frame.files import write_text
from experiments.frame.forecast import duration
from experiments.frame.manifest import NUMERICS
from experiments.frame.measured import study_of, subject_of
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.verdict import Claim, finite

NOTHING = "–"
RUN_SETTINGS = ("pairs", "steps", "sampler", "guidance", "seed")  # that a joint page gives of every run
PAPER = {
    1: "The synchronization gap is there without coupling",
    2: "It collapses under strong coupling",
    3: "It is localised in depth, in the last layers",
    4: "Low, global frequencies commit before high, local ones",
}


@dataclass
class Table:
    """Cells are strings; `formatted` makes those with an interval."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""


@dataclass
class Section:
    """The findings of a study.

    Raises:
      ValueError: the verdicts are not right together with 95 %; `ou_theory.bootstrap.family_level` is their level.
    """

    title: str
    question: str  # one or two sentences
    answer: str  # one sentence, with numbers
    claims: list[Claim] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    captions: dict[str, str] = field(default_factory=dict)  # of the figures, by name, in order
    methods: list[str] = field(default_factory=list)  # how it was measured, a paragraph each
    limits: list[str] = field(default_factory=list)
    definitions: dict[str, str] = field(default_factory=dict)  # what words mean, in order

    def __post_init__(self) -> None:
        wrong = sum(1 - claim.level for claim in self.claims if claim.verdict != "not tested")
        if wrong > 0.05 * (1 + 1e-9):
            raise ValueError(
                f"the verdicts of {self.title!r} may be wrong with a chance of {wrong:.3f} in all; give each of its "
                "claims the level family_level(number of claims)"
            )


class Page(NamedTuple):
    """A section, and how to draw its figures, by name."""

    section: Section
    figures: Mapping[str, Callable[[], Figure]]


# --- numbers in words


def number(value: float | None, digits: int = 2) -> str:
    """`value` with that many decimals and a proper minus sign; a dash for None, NaN and infinities."""
    if value is None or not np.isfinite(value):
        return NOTHING
    text = f"{value:.{digits}f}"
    return (text if float(text) else f"{0:.{digits}f}").replace("-", "−")


def interval(ends: Sequence[float | None] | None, digits: int = 2) -> str:
    """``[low, high]``; a dash where there is none."""
    if ends is None or any(number(end) == NOTHING for end in ends):
        return NOTHING
    return "[" + ", ".join(number(end, digits) for end in ends) + "]"


def formatted(values: ArrayLike, digits: int = 2) -> str:
    """``1.23 [1.00, 1.50]`` of (estimate, low, high); a dash where there is nothing."""
    point, low, high = np.asarray(values, np.float64)
    ends = interval([low, high], digits)
    return number(point, digits) + (f" {ends}" if ends != NOTHING else "")


def percent(values: ArrayLike) -> str:
    """``12 % [10, 14]`` of shares (estimate, low, high); a dash where there is nothing."""
    share = 100 * np.asarray(values, np.float64)
    return formatted(share, 0).replace(" [", " % [", 1) if "[" in formatted(share, 0) else number(share[0], 0)


def power(value: float) -> str:
    """A size to one digit: ``3e-7``."""
    return f"{value:.0e}".replace("e-0", "e-")


# --- storing a section, and pages of sections


def store_page(run: RunFolder, page: Page, *, figures: bool = True) -> None:
    """Draws the figures of a run and stores its section and its claims, see `drawn_section`."""
    section = drawn_section(page, run.path / "figures", [run], figures=figures)
    run.write_json("section.json", section)
    run.write_json("claims.json", {"claims": section["claims"]})


def drawn_section(page: Page, folder: Path, runs: Sequence[RunFolder], *, figures: bool = True) -> dict[str, Any]:
    """Draws the figures of a page to a folder; returns its section as it is stored. Where a run is of latents, both
    call them so.

    Args:
      runs: that the page is about.
      figures: whether to draw; the section says if there are none.

    Raises:
      ValueError: a figure without a caption, or a caption without a figure.
    """
    missing = set(page.figures) ^ set(page.section.captions)
    if missing:
        raise ValueError(f"figures and captions differ in {', '.join(sorted(missing))}")
    section, drawings = finite(asdict(page.section)), page.figures
    if any(latents.of_latents(run.manifest) for run in runs):
        section, drawings = latents.spoken(section), latents.drawn(drawings)
        section["definitions"] = {"latent": latents.MEANING, **section["definitions"]}
    if figures:
        draw_figures(folder, drawings)
    return section | ({} if figures else {"drawn": False})


def write_page(
    path: Path,
    sections: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    summary: Sequence[Mapping[str, Any]] = (),
    kinds: Sequence[Table] = (),
    others: Mapping[str, str] | None = None,
    runs: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes a page of sections and returns its path. The title is that of the first section by default.

    Args:
      sections: as `stored_section` and `filled` give them.
      summary: claims over several runs, shown in front, as `summary_of` gives them.
      kinds: what depends on the kind of prediction, shown behind the summary, as `kinds.by_kind` gives it.
      others: what lies beside the runs and is left out: name, and what it is.
      runs: with what each was run, as `run_entry` gives it.
    """
    page = templates(Path(__file__).parent / "templates").get_template("sections.html")
    about = {"summary": summary, "kinds": kinds, "others": others or {}, "runs": runs}
    return write_text(path, page.render(title=title or sections[0]["title"], sections=sections, **about))


def run_entry(name: str, run: RunFolder) -> dict[str, Any]:
    """What a joint page says of a run in front: study, subject, and the settings by which runs differ most."""
    settings = run.manifest["settings"]
    shown = {each: _plain(settings[each]) if each in settings else NOTHING for each in RUN_SETTINGS}
    return {"name": name, "page": page_of(name), "study": study_of(run), "subject": subject_of(run), "settings": shown}


def page_of(name: str) -> str:
    """The address of a run's page, from that of the folder around it: a path, whatever the run is called."""
    return f"./{quote(name)}/report.html"


@cache
def templates(folder: Path) -> Environment:
    """Jinja templates of a folder, each compiled once. Every value is escaped, and a missing one is an error."""
    shared = Path(__file__).parent / "templates"
    return Environment(
        loader=FileSystemLoader([folder, shared]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def stored_section(
    run: RunFolder, manifest: Mapping[str, Any] | None = None, *, name: str | None = None
) -> dict[str, Any]:
    """The section of a run as the template needs it.

    Args:
      name: of the run on the page; by default that of its folder.
      manifest: used in place of the stored one, which says that the run is complete only after its page is written.

    Raises:
      StoreError: the section, or a figure of it, is not stored.
    """
    manifest = run.manifest if manifest is None else manifest
    about = {"id": name or run.path.name, "command": manifest["command"], "status": manifest["status"]}
    return filled(run.read_json("section.json"), run.path / "figures") | about | {"facts": facts(manifest)}


def filled(section: Mapping[str, Any], figures: Path) -> dict[str, Any]:
    """A section's entries with claims as the template needs them, and with the figures of a folder embedded.

    Raises:
      StoreError: the section is malformed, or a figure cannot be read.
    """
    try:
        drawn = section.get("drawn", True)  # the section says only if they are not
        shown = [
            {"name": name, "caption": caption, "source": embedded(_inside(figures, f"{name}.svg"))}
            for name, caption in section["captions"].items()
            if drawn
        ]
        entries = {**section, "claims": [claim_entry(claim) for claim in section["claims"]], "figures": shown}
    except (TypeError, KeyError, AttributeError) as error:
        raise StoreError(
            f"the section of {figures.parent} is malformed ({error!r}); `syncgap report` on that folder writes it again"
        ) from error
    folder = None if drawn else figures.parent
    return {"definitions": {}, "id": "", "command": "", "facts": [], "status": "complete", "undrawn": folder, **entries}


def claims_of(run: RunFolder) -> list[dict[str, Any]]:
    """The claims of a run as they are stored.

    Raises:
      StoreError: there are none, or they are malformed.
    """
    stored = run.read_json("claims.json")
    claims = stored.get("claims") if isinstance(stored, dict) else None
    if not isinstance(claims, list) or not all(isinstance(claim, dict) and "verdict" in claim for claim in claims):
        raise StoreError(f"{run.path / 'claims.json'} is malformed; `syncgap report {run.path}` writes it again")
    return claims


def summary_of(runs: Mapping[str, RunFolder]) -> list[dict[str, Any]]:
    """What runs, by their names, say about each of the paper's claims, and about their own."""
    groups: dict[int, dict[str, Any]] = {}
    for name, run in runs.items():
        for claim in claims_of(run):
            if claim["verdict"] == "not tested":
                continue
            title = PAPER.get(claim["id"], "Claims that are not the paper's")
            group = groups.setdefault(claim["id"] or 99, {"id": claim["id"] or "", "title": title, "entries": []})
            where = {"section": name, "subject": subject_of(run), "page": page_of(name)}
            group["entries"].append({**claim_entry(claim), **where})
    return [groups[number] for number in sorted(groups)]


def claim_entry(claim: Mapping) -> dict[str, Any]:
    """A stored claim as the page shows it; ``also`` names the controls on which it holds too."""
    verdict = claim["verdict"]
    controls = [
        {
            "name": control["name"],
            "value": number(control["value"]),
            "interval": interval(control["interval"]),
            "also": {True: "yes", False: "no"}.get(control["also_holds"], NOTHING),
            "statement": control["statement"],
        }
        for control in claim["controls"]
    ]
    return {
        **{name: claim[name] for name in ("id", "title", "measure", "statement")},
        "verdict": f"{verdict} here" if verdict == "not tested" else verdict,
        "slug": verdict.replace(" ", "-"),
        "tested": verdict != "not tested",
        "value": number(claim["value"]),
        "interval": interval(claim["interval"]),
        "level": f"{100 * claim.get('level', 0.95):.3g} %",  # stored by older versions without
        "controls": controls,
        "also": [control["name"] for control in controls if control["also"] == "yes"],
    }


def facts(manifest: Mapping) -> list[tuple[str, str]]:
    """Settings and provenance of a run, one per line."""
    versions = ", ".join(f"{name} {version}" for name, version in manifest["versions"].items() if version)
    timings = [
        f"{name.removesuffix('_s').replace('_', ' ')} {duration(t) if name.endswith('_s') else t}"
        for name, t in manifest["timings"].items()
    ]
    lines = [(name.replace("_", " "), _plain(value)) for name, value in manifest["settings"].items()]
    lines += [("weights digest", manifest["weights_digest"])] if "weights_digest" in manifest else []
    numerics = manifest.get(NUMERICS)  # older runs have none
    lines += [("random numbers", numerics["generator"])] if numerics else []
    lines += [
        ("git revision", manifest["git_revision"] or NOTHING),
        ("Python", manifest["python"]),
        ("packages", versions),
        ("device", f"{manifest['device']} ({manifest['platform']})"),
        ("started, finished", f"{manifest['started']}, {manifest['finished'] or NOTHING}"),
        ("took", ", ".join(timings) or NOTHING),
    ]
    for again in manifest["resumed"]:
        lines.append(("resumed", "; ".join([str(again.get("at", "")), *map(str, again.get("changed", ()))])))
    return lines


def _inside(folder: Path, name: str) -> Path:
    """A file of a folder. A stored name, or a link, that leads out of it is an error: runs come from elsewhere, too."""
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise StoreError(
            f"the section of {folder.parent} names a figure outside of {folder} ({name}); `syncgap report` on that "
            "folder writes it again"
        )
    return path


def embedded(path: Path) -> str:
    """An SVG file as a data URL.

    Raises:
      StoreError: it cannot be read.
    """
    try:
        return "data:image/svg+xml;base64," + base64.b64encode(path.read_bytes()).decode()
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error}); draw the figures again with `syncgap report`") from error


def _plain(value: Any) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)
