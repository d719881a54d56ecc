"""One process that runs cells of a sweep, one after another. What one cell does wrong is written down and left."""

import os
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dit_jax.lock import FolderInUse
from experiments import studies
from experiments.frame.study import Study, run_study
from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.plan import Cell

POLL_S = 1.0  # between two looks at cells that other processes hold


@dataclass
class Outcome:
    """What a worker did: names of cells."""

    done: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)  # now or before
    there: list[str] = field(default_factory=list)  # complete before, or by another process


def work(
    sweep: SweepFolder,
    cells: Sequence[Cell],
    *,
    command: str = "",
    figures: bool = False,
    after: Callable[[Cell, str], None] = lambda cell, outcome: None,
) -> Outcome:
    """Runs the cells that are not complete yet, those that were begun from where they stopped. A cell that another
    process holds is left to it, and looked at again in the end: if that process dies, the cell is taken over. A cell
    that has failed is left out until `SweepFolder.forget_failure`.

    Args:
      command: how the sweep was called, for the manifests.
      figures: draw the figures of every cell; without, `syncgap report` on its folder draws them.
      after: called with every cell that ended, and how: done, failed or there.
    """
    study: Study = studies.find(sweep.plan.study)
    worker = f"{socket.gethostname()}:{os.getpid()}"
    outcome, waiting, held = Outcome(), list(cells), []
    while waiting:
        for cell in waiting:
            if sweep.is_complete(cell):
                outcome.there.append(cell.name)
                after(cell, "there")
                continue
            if sweep.failure(cell) is not None:
                outcome.failed.append(cell.name)
                after(cell, "failed")
                continue
            started = time.perf_counter()
            try:
                run_study(
                    study,
                    cell.settings,
                    sweep.run(cell),
                    resume=True,
                    command=command,
                    progress=False,
                )
            except FolderInUse:
                held.append(cell)
                continue
            except Exception as error:  # whatever it is: the other cells can do without this one
                sweep.note_failure(cell, _line(error), traceback.format_exc())
                how = "failed"
                outcome.failed.append(cell.name)
            else:
                sweep.forget_failure(cell)
                how = "done"
                outcome.done.append(cell.name)
            sweep.log(how, cell, time.perf_counter() - started, worker)
            after(cell, how)
        waiting, held = held, []
        if waiting:
            time.sleep(POLL_S)
    return outcome


def _line(error: BaseException) -> str:
    """An error in one line; the kind of those that are no ordinary refusals."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
