"""One process at a time in a folder that is written over minutes or hours. The second one is told who holds it.

The lock is a file beside the folder, ``.NAME.lock``, that the operating system locks for its owner (flock). It is free
as soon as the owner has ended, however that came about; a file that a killed process left behind holds nothing.
"""

import errno
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

from dit_jax.disk import CheckpointError, beside, writing

try:
    import fcntl
except ImportError:  # Windows has no flock; folders are not held there
    fcntl = None

_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # from file systems that cannot lock
_TAKEN = (errno.EWOULDBLOCK, errno.EACCES)


class FolderInUse(CheckpointError):
    """Another process is writing the folder."""


@contextmanager
def held(directory: str | Path) -> Iterator[None]:
    """Holds a folder, which need not exist yet, while the block runs. Its parents are made.

    A file system without locks holds nothing, nor does a place beside the folder that cannot be written while the
    folder itself can.

    Raises:
      FolderInUse: another process holds it, or this one does already; the message says which, where and since when.
      CheckpointError: there can be no such folder: its place is read-only, full, or below a file.
    """
    place = Path(directory).resolve()  # one lock for all names of a folder
    made = [parent for parent in place.parents if not parent.exists()]
    path = beside(place, "lock")
    file = None
    try:
        file = _locked(Path(directory), path)
        yield
    finally:
        if file is not None:
            path.unlink(missing_ok=True)  # before it is released: whoever opens the path from now on makes a new file
            file.close()
        for parent in made:  # where the block made nothing, none is left
            with suppress(OSError):
                parent.rmdir()


def is_held(directory: str | Path) -> bool:
    """Whether a process holds the folder now. A process that tries to take it in this very moment may be refused."""
    if fcntl is None:
        return False
    try:
        with beside(Path(directory).resolve(), "lock").open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError as error:
                return error.errno in _TAKEN
            return False
    except OSError:
        return False


class Owner(NamedTuple):
    """The process that holds a folder, or held it last."""

    process: int  # its number on its own machine, where alone it means something
    host: str

    @property
    def is_here(self) -> bool:
        """Whether it is a process of this machine."""
        return self.host == socket.gethostname()


def owner_of(directory: str | Path) -> Owner | None:
    """The process that holds the folder, or that was killed while it did, on whatever machine; None if the last one
    gave it back."""
    try:
        found = json.loads(beside(Path(directory).resolve(), "lock").read_text("utf-8"))
        process, host = found["process"], found["host"]
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return Owner(process, host) if isinstance(process, int) and isinstance(host, str) else None


def last_owner(directory: str | Path) -> int | None:
    """The process of this machine that holds the folder, or that was killed while it did; None if there is none."""
    owner = owner_of(directory)
    return owner.process if owner is not None and owner.is_here else None


def _locked(directory: Path, path: Path) -> IO[str] | None:
    """The lock's open file, or None where there can be none."""
    while fcntl is not None:
        try:
            with writing(directory):
                file = _opened(path)
        except CheckpointError:
            if directory.is_dir() and os.access(directory, os.W_OK) and not os.access(path.parent, os.W_OK):
                return None
            raise
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not _is_still(path, file):  # its owner has just removed it
                file.close()
                continue
            file.truncate(0)
            owner = {"process": os.getpid(), "host": socket.gethostname(), "since": datetime.now(UTC).isoformat()}
            file.write(json.dumps(owner))
            file.flush()
        except OSError as error:
            if error.errno in _TAKEN:
                owner = _owner(file)
                file.close()
                raise FolderInUse(
                    f"{directory} is being written by {owner}; wait until it has ended, or choose another folder"
                ) from error
            file.close()
            if error.errno not in _NO_LOCKS:
                raise
            return None
        return file
    return None


def _opened(path: Path, tries: int = 100) -> IO[str]:
    """The lock's file and its parents, which another process that made them may just be removing."""
    while True:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a+", encoding="utf-8")
        except (FileNotFoundError, FileExistsError):  # the second where it went while mkdir was looking
            tries -= 1
            if not tries:
                raise


def _is_still(path: Path, file: IO[str]) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def _owner(file: IO[str], tries: int = 40) -> str:
    """Who holds the lock. It says so just after it has taken it, which is waited for, two seconds at most."""
    for _ in range(tries):
        try:
            file.seek(0)
            owner = json.loads(file.read())
            return f"process {owner['process']} on {owner['host']} since {owner['since'][:19]} UTC"
        except (OSError, ValueError, TypeError, KeyError):
            time.sleep(0.05)
    return "another process"
