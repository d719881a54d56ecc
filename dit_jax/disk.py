"""Whole writes: a reader finds the old file or folder, or the new one, never a part.

A folder is written under another name beside its place and renamed when it is complete.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class CheckpointError(ValueError):
    """A folder that cannot be written, or that does not hold what it should."""


def write_json(path: str | Path, entries: Any) -> None:
    """Writes JSON in one move: a reader finds the old file or the new one, never a part."""
    path = Path(path)
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.write_text(json.dumps(entries, indent=2, allow_nan=False) + "\n")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def recover(directory: str | Path) -> bool:
    """Whether a saved folder is there. If a replacement was killed between its two renames, the earlier folder is put
    back first."""
    directory = Path(directory)
    previous = _beside(directory, "previous")
    if previous.exists() and not directory.exists():
        os.replace(previous, directory)
    return directory.exists()


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A sibling folder to fill. At the end it takes the place of `directory`; if anything fails, it is removed."""
    partial, previous = _beside(directory, "partial"), _beside(directory, "previous")
    recover(directory)
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if directory.exists():
            os.replace(directory, previous)
        os.replace(partial, directory)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if recover(directory):
            shutil.rmtree(previous, ignore_errors=True)


def occupied(directory: Path) -> bool:
    """Whether something is there that is not an empty folder."""
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def _beside(directory: Path, role: str) -> Path:
    directory = directory.absolute()
    return directory.with_name(f".{directory.name}.{role}")
