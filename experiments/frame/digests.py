"""Digests of what a group holds.

A checksum inside a chunk shows that its bytes were written together. A digest shows more: that they lie where they were
written, under the same description. The digests of a group have names: `LAYOUT` for its description, `WHOLE` for a
group that was written at once, and for each block its first pair, as text.
"""

import hashlib
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path

from experiments.frame.chunks import NOT_DAMAGE, damaged, files_of

LAYOUT, WHOLE = "layout", "whole"


def digest(group: Path, name: str) -> str:
    """The digest of this name, 16 hexadecimal digits, of what lies in the folder `group` now.

    Raises:
      OSError: a file is not there.
    """
    if name == LAYOUT:
        return _digest(group, group.rglob("zarr.json"))
    if name == WHOLE:
        return _digest(group, (path for path in group.rglob("*") if path.is_file()))
    return _digest(group, files_of(group, int(name)))


def altered(group: Path, digests: Mapping[str, str], done: Collection[int]) -> set[str]:
    """Names of the digests that no longer fit. Digests of blocks count only if the block is finished, in `done`."""
    found = set()
    for name, expected in digests.items():
        if name in (LAYOUT, WHOLE) or int(name) in done:
            try:
                fits = digest(group, name) == expected
            except NOT_DAMAGE:
                raise
            except Exception:  # zarr raises many kinds
                fits = False
            if not fits:
                found.add(name)
    return found


def bad_blocks(group: Path, digests: Mapping[str, str], done: Collection[int]) -> list[int]:
    """First pairs of the finished blocks that are damaged, missing or not what was written."""
    moved = {int(name) for name in altered(group, digests, done) if name not in (LAYOUT, WHOLE)}
    return sorted({*damaged(group, sorted(done)), *moved})


def _digest(group: Path, files: Iterable[Path]) -> str:
    found = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        found.update(f"{file.relative_to(group)} {len(content)} ".encode() + content)
    return found.hexdigest()[:16]
