"""The end of a sweep: its result and its page, once no cell is left to run."""

import contextlib
import sys

from dit_jax.lock import FolderInUse
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.page import report_sweep

FAILED = 1  # exit code of a sweep of which cells failed


def finish(folder: SweepFolder) -> int:
    """Once no cell is left to run, makes the result and the page, if no other process does. Returns the exit code: 1 if
    cells failed."""
    states = folder.states()
    if states["open"] + states["begun"] + states["running"]:
        return 0
    with contextlib.suppress(FolderInUse):
        print(f"report: {report_sweep(folder.path)}")
    if states["failed"]:
        print(
            f"syncgap: {states['failed']} of {len(folder.cells)} cells failed; the report says why, and the same "
            "command with --resume tries them again",
            file=sys.stderr,
        )
    return FAILED if states["failed"] else 0
