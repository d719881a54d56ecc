"""One process at a time in a folder; the second is told who holds it; nothing is held by the dead."""

import os
import socket
import subprocess
import sys

import pytest

from dit_jax import lock
from dit_jax.disk import CheckpointError
from dit_jax.lock import FolderInUse, held, last_owner, owner_of

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


TURNS = """
import sys
from pathlib import Path
from dit_jax.lock import FolderInUse, held
place, inside = Path(sys.argv[1]), Path(sys.argv[2])
print("ready", flush=True)
sys.stdin.readline()
alone = 0
for _ in range(300):
    try:
        with held(place):
            inside.open("x").close()  # fails where someone else is inside
            inside.unlink()
            alone += 1
    except FolderInUse as refusal:
        assert "by process" in str(refusal), refusal
print(alone)
"""


def test_of_two_processes_one_is_inside_however_often_they_try(tmp_path):
    """They make and remove the lock, and the parents of the folder, under each other's hands."""
    command = [sys.executable, "-c", TURNS, str(tmp_path / "a" / "b" / "run"), str(tmp_path / "inside")]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    both = [subprocess.Popen(command, text=True, **pipes) for _ in range(2)]
    for process in both:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    found = []
    for process in both:  # they start when their line comes
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in both:
        said, failed = process.communicate()
        assert failed == ""
        found.append(int(said))
    assert min(found) > 0
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize("number", lock._NO_LOCKS)
def test_a_file_system_without_locks_holds_nothing(tmp_path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    with held(tmp_path / "run"):
        pass


def test_a_process_of_another_machine_is_none_of_this_one(tmp_path, monkeypatch):
    """Numbers of processes mean something on their own machine alone."""
    run = tmp_path / "run"
    assert owner_of(run) is None
    with held(run):
        assert last_owner(run) == os.getpid()
        monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
        assert last_owner(run) is None
        owner = owner_of(run)
        assert owner is not None
        assert owner.process == os.getpid()
        assert not owner.is_here
    assert owner_of(run) is None
