"""One process that runs cells of a sweep, one after another. What one cell does wrong is written down and left."""

import os
import socket
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter, sleep
from typing import Any

from dit_jax.lock import FolderInUse, held
from experiments import studies
from experiments.frame.numerics import own_numerics
from experiments.frame.programs import kept
from experiments.frame.study import Study, run_held
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
    heard: Callable[[Cell, float], None] = lambda cell, seconds: None,
) -> Outcome:
    """Runs the cells that are not complete yet, those that were begun from where they stopped. A cell that another
    process holds is left to it, and looked at again in the end: if that process dies, the cell is taken over. A cell
    that has failed is left out until `SweepFolder.forget_failure`.

    Args:
      command: how the sweep was called, for the manifests.
      figures: draw the figures of every cell; without, `syncgap report` on its folder draws them.
      after: called with every cell that ended, and how: done, failed or there.
      heard: told of every cell, after its first block, how many seconds an image takes to go through the network.
    """
    study: Study = studies.find(sweep.plan.study)
    worker = f"{socket.gethostname()}:{os.getpid()}"
    outcome, waiting, in_use = Outcome(), list(cells), []
    with kept():
        while waiting:
            for cell in waiting:
                if sweep.is_complete(cell):
                    how = "there"
                elif sweep.failure(cell) is not None:
                    how = "failed"
                else:
                    started = perf_counter()
                    how = _run(study, sweep, cell, command=command, figures=figures, heard=partial(heard, cell))
                    if how == "in use":
                        in_use.append(cell)
                        continue
                    if how != "there":
                        sweep.log(how, cell, perf_counter() - started, worker)
                getattr(outcome, how).append(cell.name)
                after(cell, how)
            waiting, in_use = in_use, []
            if waiting:
                sleep(POLL_S)
    return outcome


@own_numerics()
def _run(study: Study, sweep: SweepFolder, cell: Cell, **options: Any) -> str:
    """Runs one cell; how it ended: done, failed, in use by another process, or there, made by one just now."""
    run = sweep.run(cell)
    try:
        with held(run):
            if sweep.is_complete(cell):
                return "there"
            run_held(study, cell.settings, run, resume=True, progress=False, **options)
    except FolderInUse:
        return "in use"
    except Exception as error:  # whatever it is: the other cells can do without this one
        sweep.note_failure(cell, _line(error), traceback.format_exc())
        return "failed"
    sweep.forget_failure(cell)
    return "done"


def _line(error: BaseException) -> str:
    """An error in one line; the kind of those that are no ordinary refusals."""
    text = " ".join(str(error).split())
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
