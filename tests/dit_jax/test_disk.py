"""What the disk refuses is one message, which names the folder and the remedy, and no file that is sound."""

import errno
import os

import pytest

from dit_jax.disk import CheckpointError, replacing, writing


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "the disk is full .*make room, or choose a folder on another disk"),
        (errno.EDQUOT, "the disk is full"),
        (errno.EROFS, "its place is read-only .*choose another folder"),
        (errno.EACCES, "its place is read-only"),
        (errno.EIO, "Input/output error; choose another folder"),
        (errno.ENOENT, "it was removed or moved meanwhile .*run again"),
    ],
)
def test_the_reason_and_the_remedy(tmp_path, number, said):
    for name in (None, str(tmp_path / "out" / "file"), str(tmp_path / ".out.partial" / "file"), str(tmp_path.parent)):
        with pytest.raises(CheckpointError, match=f"out cannot be written: {said}"), writing(tmp_path / "out"):
            raise OSError(number, os.strerror(number), name)


def test_a_file_elsewhere_is_not_the_folder_s_fault(tmp_path):
    with pytest.raises(PermissionError, match="images"), writing(tmp_path / "out"):
        raise PermissionError(errno.EACCES, "Permission denied", "/data/images/1.png")


def test_what_a_thread_still_writes_after_a_failure_is_removed(tmp_path, monkeypatch):
    import dit_jax.disk as disk

    removed, rmtree = [], disk.shutil.rmtree

    def once_more(path, **options):
        rmtree(path, **options)
        removed.append(path)
        if len(removed) == 2:  # the first one clears what earlier processes left
            (path / "late").mkdir(parents=True)

    monkeypatch.setattr(disk.shutil, "rmtree", once_more)
    with pytest.raises(CheckpointError), replacing(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())
