"""A folder of runs, beside which other things may lie: pictures, models, training runs, sweeps, pages."""

import json
from pathlib import Path

from experiments.frame.manifest import FORMAT, StoreError
from experiments.frame.store import RunFolder

OTHERS = {"syncgap-dit": "a model", "syncgap-pictures": "pictures"}  # what else has a manifest, by its format
TRAINING = "a training run"
SWEEP = "a sweep"
RESULTLESS = "a run without results yet"
PART = "a part of a run"


def is_part(run: RunFolder) -> bool:
    """Whether a run measures pairs from a later one than the first on, to be joined with others."""
    return run.manifest["settings"].get("first_pair", 0) > 0


def runs_in(folder: Path) -> tuple[dict[str, RunFolder], dict[str, str]]:
    """What lies in a folder: its finished runs, and in words what is none; both by their place in it. A study of
    several networks has its runs one folder further down."""
    runs, others = {}, {}
    for path in sorted(each for each in folder.iterdir() if each.is_dir() and not each.name.startswith(".")):
        deeper = [each.parent for each in sorted(path.glob("*/manifest.json")) if _format(each) == FORMAT]
        for each in [path] if (path / "manifest.json").exists() or not deeper else deeper:
            name = each.relative_to(folder).as_posix()
            try:
                other = what_else(each)
                if other is None:
                    runs[name] = RunFolder.open(each)
                elif RESULTLESS in other and is_part(RunFolder.open(each)):
                    other = f"{PART}; join it with the others by `syncgap merge`"
            except StoreError as error:
                other = str(error)
            if other is not None:
                others[name] = other
    return runs, others


def what_else(path: Path) -> str | None:
    """What a folder is if it is no finished run; None if it is one, or says so."""
    if (path / "run.json").exists() and (path / "log.jsonl").exists():
        return TRAINING
    if (path / "sweep.json").exists():
        return SWEEP
    if not (path / "manifest.json").exists():
        return "no run"
    found = _format(path / "manifest.json")
    if found in OTHERS:
        return OTHERS[found]
    if found == FORMAT and not (path / "section.json").exists():
        return f"{RESULTLESS}; continue it with --resume"
    return None


def _format(manifest: Path) -> str | None:
    try:
        found = json.loads(manifest.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    kind = found.get("format") if isinstance(found, dict) else None
    return kind if isinstance(kind, str) else None
