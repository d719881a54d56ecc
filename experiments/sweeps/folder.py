"""A sweep on disk: its plan, a run folder for each cell, and what became of them.

    sweep.json          the plan, how it was called, versions; written once, read by every worker
    cells/NAME/         an ordinary run folder, see `experiments.frame.store`
    failed/NAME.json    the error of a cell that failed, until it is done
    logs/               what worker processes print
    sweep.log           a line for every cell that ended: time, outcome, cell, seconds, worker
    result.zarr, report.html, figures/   the labelled result and its page, made of the cells

A cell is held by the process that runs it (`dit_jax.lock`), and free as soon as that process has ended.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

from dit_jax.disk import occupied, write_json
from dit_jax.lock import is_held
from experiments.frame.manifest import StoreError, environment, now
from experiments.sweeps.plan import Cell, Plan, PlanError

FORMAT, FORMAT_VERSION = "syncgap-sweep", 1
State = Literal["complete", "running", "failed", "begun", "open"]
STORED = {"plan": dict, "command": str}  # entries of sweep.json that are read again
REMEDY = "restore the file, or run the sweep in another --out; every folder in cells is a run by itself"
STATES: tuple[State, ...] = ("complete", "running", "failed", "begun", "open")


class Failure(NamedTuple):
    """What went wrong in a cell."""

    error: str  # one line
    traceback: str
    at: str  # UTC


class SweepFolder:
    """The folder of a sweep; made by `create`, read by `open`.

    Attributes:
      path: the folder.
      plan: what is run.
    """

    def __init__(self, path: Path, plan: Plan, entries: Mapping[str, Any]) -> None:
        self.path, self.plan, self.entries = path, plan, entries

    @classmethod
    def create(cls, path: str | Path, plan: Plan, *, resume: bool = False, command: str = "") -> "SweepFolder":
        """Makes the folder of a sweep, or goes on with the one that is there.

        Args:
          resume: go on with a sweep that the folder holds. Its plan may gain cells, and loses none.

        Raises:
          StoreError: the folder holds a sweep and `resume` is not set, or something else.
          PlanError: the stored sweep has cells that the plan does not have, or that have other settings in it.
        """
        path = Path(path)
        there = (path / "sweep.json").is_file()
        if there and not resume:
            raise StoreError(f"{path} holds another sweep; continue it with --resume, or choose another --out")
        if not there and occupied(path) and any(not each.name.startswith(".") for each in path.iterdir()):
            raise StoreError(f"{path} holds something that is no sweep (no sweep.json); choose another --out")
        if there:
            before, cells = cls.open(path), {cell.name: cell.settings for cell in plan.cells()}
            lost = [cell.name for cell in before.cells if cells.get(cell.name) != cell.settings]
            if lost or before.plan.study != plan.study:
                shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
                raise PlanError(
                    f"{path} holds a sweep of {before.plan.study} with cells that are not in this plan, or have other "
                    f"settings in it ({shown}); resume it with a plan that has them, or choose another --out"
                )
            if before.plan == plan:
                return before
        entries = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "command": command,
            "started": now(),
            **environment(),
            "plan": plan.to_dict(),
        }
        (path / "cells").mkdir(parents=True, exist_ok=True)
        write_json(path / "sweep.json", entries)
        return cls(path, plan, entries)

    @classmethod
    def open(cls, path: str | Path) -> "SweepFolder":
        """The sweep that a folder holds.

        Raises:
          StoreError: there is none, or its plan cannot be read.
        """
        path = Path(path)
        try:
            entries = json.loads((path / "sweep.json").read_text("utf-8"))
        except FileNotFoundError as error:
            raise StoreError(
                f"{path} holds no sweep (no sweep.json); give the --out folder of syncgap sweep"
            ) from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{path / 'sweep.json'} cannot be read ({error})") from error
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise StoreError(f"{path / 'sweep.json'} is not that of a sweep")
        if entries.get("format_version") != FORMAT_VERSION:
            raise StoreError(
                f"{path / 'sweep.json'} is of format version {entries.get('format_version')}, and this code reads "
                f"{FORMAT_VERSION}; use the syncgap version that wrote it"
            )
        missing = [name for name, kind in STORED.items() if not isinstance(entries.get(name), kind)]
        if missing:
            raise StoreError(f"{path / 'sweep.json'} lacks {', '.join(missing)}; {REMEDY}")
        try:
            return cls(path, Plan.from_dict(entries["plan"]), entries)
        except PlanError as error:
            raise StoreError(f"the plan in {path / 'sweep.json'} cannot be used ({error}); {REMEDY}") from error

    @cached_property
    def cells(self) -> list[Cell]:
        """All cells of the plan, in its order."""
        return self.plan.cells()

    def run(self, cell: Cell) -> Path:
        """The run folder of a cell."""
        return self.path / "cells" / cell.name

    def state(self, cell: Cell) -> State:
        """What a cell is: complete; running, that is held by a process; failed; begun, to be resumed; or still open."""
        if self.is_complete(cell):
            return "complete"
        run = self.run(cell)
        if is_held(run):
            return "running"
        if self._failed(cell).is_file():
            return "failed"
        return "begun" if (run / "manifest.json").is_file() else "open"

    def states(self) -> Counter[str]:
        """How many cells are in each state."""
        return Counter(map(self.state, self.cells))

    def is_complete(self, cell: Cell) -> bool:
        """Whether a cell's run is finished."""
        try:
            return json.loads((self.run(cell) / "manifest.json").read_text("utf-8"))["status"] == "complete"
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def failure(self, cell: Cell) -> Failure | None:
        """Why a cell failed; None if it has not, or was done since."""
        try:
            found = json.loads(self._failed(cell).read_text("utf-8"))
            return None if self.is_complete(cell) else Failure(found["error"], found["traceback"], found["at"])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note_failure(self, cell: Cell, error: str, traceback: str = "") -> None:
        """Stores why a cell failed."""
        self._failed(cell).parent.mkdir(exist_ok=True)
        write_json(self._failed(cell), {"error": error, "traceback": traceback, "at": now()})

    def forget_failure(self, cell: Cell) -> None:
        """Takes back that a cell failed."""
        self._failed(cell).unlink(missing_ok=True)

    def log(self, outcome: str, cell: Cell, seconds: float, worker: str) -> None:
        """Adds a line to ``sweep.log``, in one write, so that lines of several processes do not mix."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = f"{at} {outcome} {cell.name} {seconds:.2f} s {worker}\n"
        file = os.open(self.path / "sweep.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            os.write(file, line.encode())
        finally:
            os.close(file)

    def _failed(self, cell: Cell) -> Path:
        return self.path / "failed" / f"{cell.name}.json"
