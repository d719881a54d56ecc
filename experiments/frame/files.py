"""Files that are written whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing_file(path: Path) -> Iterator[Path]:
    """A file beside `path` to fill. It replaces `path` at the end, or is removed if anything fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """Writes UTF-8 text in one move: a reader finds the old file or the new one, never a part. Returns `path`."""
    with replacing_file(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return path
