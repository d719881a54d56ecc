"""One process at a time in a folder; the second is told who holds it; nothing is held by the dead."""

import os
import socket
import subprocess
import sys

import pytest

from dit_jax import lock
from dit_jax.disk import CheckpointError
from dit_jax.lock import FolderInUse, held

HOLD = """
import sys, time
from dit_jax.lock import held
with held(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def another(tmp_path):
    """Another process, which holds the folder `run`."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_the_second_is_told_who_holds_the_folder_and_the_dead_hold_nothing(another, tmp_path):
    who = f"run is being written by process {another.pid} on {socket.gethostname()}"
    with pytest.raises(FolderInUse, match=who), held(tmp_path / "run"):
        pass
    with held(tmp_path / "other"):  # which is another folder
        pass
    another.kill()
    another.wait()
    assert (tmp_path / ".run.lock").exists()
    with held(tmp_path / "run"):
        assert str(os.getpid()) in (tmp_path / ".run.lock").read_text()
    assert not list(tmp_path.iterdir())


def test_all_names_of_a_folder_are_one(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    with held(tmp_path / "run"), pytest.raises(FolderInUse), held(tmp_path / "link" / ".." / "run"):
        pass
    with held(tmp_path / "link"), pytest.raises(FolderInUse, match=str(os.getpid())), held(tmp_path / "run"):
        pass
    with held(tmp_path / "run"):
        pass


def test_nothing_is_left_of_a_failure(tmp_path):
    with pytest.raises(ZeroDivisionError), held(tmp_path / "a" / "b" / "run"):
        1 / len([each for each in (tmp_path / "a" / "b").iterdir() if each.is_dir()])
    assert not list(tmp_path.iterdir())
    with held(tmp_path / "a" / "run"):
        (tmp_path / "a" / "run").mkdir()
    assert (tmp_path / "a" / "run").is_dir()


def test_a_lock_that_its_owner_has_just_removed_is_made_again(tmp_path, monkeypatch):
    found = []
    is_still = lock._is_still

    def removed_first(path, file):
        if not found:
            path.unlink()
        found.append(is_still(path, file))
        return found[-1]

    monkeypatch.setattr(lock, "_is_still", removed_first)
    with held(tmp_path / "run"):
        assert found == [False, True]
        monkeypatch.undo()
        with pytest.raises(FolderInUse), held(tmp_path / "run"):
            pass


def test_a_place_that_can_be_no_folder_s_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    said = r"run cannot be written: .*/file is a file; choose another folder"
    with pytest.raises(CheckpointError, match=said), held(tmp_path / "file" / "deeper" / "run"):
        pass
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize("number", lock._NO_LOCKS)
def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with held(tmp_path / "run"):
        pass
