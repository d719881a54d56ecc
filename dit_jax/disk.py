"""Whole writes: a reader finds the old file or folder, or the new one, never a part.

A folder is written under another name beside its place and renamed when it is complete. What is renamed is on the disk
before (`sync`), so that a loss of power leaves whole things, too.
"""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator
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
        replace_synced(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def sync(*paths: Path) -> None:
    """Returns when files, and the entries of folders, are on the disk itself.

    Raises:
      OSError: the disk refuses. File systems that cannot sync a folder need not.
    """
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def sync_files(files: Iterable[Path], top: Path) -> None:
    """Syncs files, and the folders that lead to them from `top` on, which may be new."""
    files = list(files)
    folders = {parent for file in files for parent in file.parents if parent.is_relative_to(top)}
    sync(*files, *sorted(folders, reverse=True))


def sync_folder(folder: Path) -> None:
    """Syncs all that is in a folder."""
    sync(*(path for path in folder.rglob("*") if path.is_file() or path.is_dir()), folder)


def replace_synced(made: Path, place: Path) -> None:
    """Gives a new file or folder its place, and returns when both are on the disk."""
    sync_folder(made) if made.is_dir() else sync(made)
    os.replace(made, place)
    sync(place.parent)


def recover(directory: str | Path) -> bool:
    """Whether a saved folder is there. If a replacement was killed between its two renames, the earlier folder is put
    back first."""
    directory = Path(directory)
    previous = beside(directory, "previous")
    if previous.exists() and not directory.exists():
        os.replace(previous, directory)
    return directory.exists()


@contextmanager
def replacing(directory: Path) -> Iterator[Path]:
    """A sibling folder to fill. At the end it takes the place of `directory`; if anything fails, it is removed.

    Raises:
      CheckpointError: the disk refuses, see `writing`.
    """
    partial, previous = beside(directory, "partial"), beside(directory, "previous")
    recover(directory)
    shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
    if directory.exists():
        shutil.rmtree(previous, ignore_errors=True)
    try:
        with writing(directory):
            partial.mkdir(parents=True)
            yield partial
            sync_folder(partial)  # before the old one is moved away
            if directory.exists():
                os.replace(directory, previous)
            os.replace(partial, directory)
            sync(directory.parent)
    finally:
        _remove(partial)
        if recover(directory):
            shutil.rmtree(previous, ignore_errors=True)


@contextmanager
def writing(directory: str | Path) -> Iterator[None]:
    """While something is written to a folder. A refusal of the disk is one message, with the folder and the remedy.
    Errors that name a file elsewhere stay as they are.

    Raises:
      CheckpointError: the place is full, read-only, below a file, or cannot be written otherwise.
    """
    try:
        yield
    except OSError as error:
        if not _concerns(Path(directory).absolute(), error.filename):
            raise
        raise CheckpointError(f"{directory} cannot be written: {_reason(directory, error)}") from error


def _concerns(directory: Path, name: Any) -> bool:
    """Whether a file of this name lies in the folder, beside it or above it, or has no name."""
    if not isinstance(name, str | os.PathLike):
        return True
    path = Path(name).absolute()
    return path.is_relative_to(directory.parent) or directory.is_relative_to(path)


def _reason(directory: str | Path, error: OSError) -> str:
    above = [parent for parent in Path(directory).absolute().parents if parent.exists() and not parent.is_dir()]
    if above:
        return f"{above[0]} is a file; choose another folder"
    reason = error.strerror or str(error)
    if error.errno == errno.ENOENT:
        return f"it was removed or moved meanwhile ({reason}); run again, or choose another folder"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"the disk is full ({reason}); make room, or choose a folder on another disk"
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"its place is read-only ({reason}); choose another folder"
    return f"{reason}; choose another folder"


def from_home(argument: str) -> str:
    """An argument of a command line, ~ at the beginning of its path replaced by the home folder. A shell leaves
    ``--out=~/x`` as it is."""
    option, path = re.fullmatch(r"(--?[\w-]+=)?(.*)", argument, re.DOTALL).groups()  # type: ignore[union-attr]
    return (option or "") + (os.path.expanduser(path) if path.startswith("~") else path)


def _remove(directory: Path, tries: int = 20) -> None:
    """Removes a folder into which threads of a write that has failed may still be writing."""
    for _ in range(tries):
        shutil.rmtree(directory, ignore_errors=True)
        if not directory.exists():
            return
        time.sleep(0.05)


def link(file: Path, place: Path) -> None:
    """The same file under another name, or a copy where the file system has no links."""
    try:
        os.link(file, place)
    except OSError:
        shutil.copyfile(file, place)


def occupied(directory: Path) -> bool:
    """Whether something is there that is not an empty folder."""
    return directory.exists() and (not directory.is_dir() or any(directory.iterdir()))


def beside(directory: Path, role: str) -> Path:
    """The hidden sibling of a folder that has this role."""
    directory = directory.absolute()
    return directory.with_name(f".{directory.name}.{role}")
