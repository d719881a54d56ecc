"""The end of a sweep: its result and its page, once no cell is left to run."""

import contextlib
import sys
from collections.abc import Sequence

from dit_jax.lock import FolderInUse
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.page import report_sweep
from experiments.sweeps.plan import Cell

FAILED = 1  # exit code of a sweep, or a share of it, of which cells failed


def finish(folder: SweepFolder, mine: Sequence[Cell]) -> int:
    """Once no cell is left to run, makes the result and the page, if no other process does.

    Args:
      mine: the cells that this process ran, or had run.

    Returns:
      The exit code: 1 if cells of these failed, whatever other processes still do.
    """
    states = folder.states()
    if not states["open"] + states["begun"] + states["running"]:
        with contextlib.suppress(FolderInUse):
            print(f"report: {report_sweep(folder.path)}")
    failed = sum(folder.failure(cell) is not None for cell in mine)
    if failed:
        print(
            f"syncgap: {failed} of {len(mine)} cells failed; `syncgap sweep status {folder.path}` says why, and the "
            "same command with --resume tries them again",
            file=sys.stderr,
        )
    return FAILED if failed else 0
