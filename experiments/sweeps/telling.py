"""What a sweep says on the terminal: what it will cost, how far it is, what became of its cells."""

import json
import os
import socket
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Self

from tqdm import tqdm

from experiments.frame.forecast import duration
from experiments.frame.manifest import environment, now
from experiments.sweeps.cost import Cost
from experiments.sweeps.folder import STATES, SweepFolder
from experiments.sweeps.plan import Cell, Plan

VARIABLES = ("SLURM_", "CUDA_VISIBLE_DEVICES", "JAX_", "XLA_", "JOB_COMPLETION_INDEX")  # that are told in logs
MOST_SHOWN = 200  # rows of a dry run's table
BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}{postfix}"  # in parts of the cost, not of the cells


def tell(plan: Plan, cells: Sequence[Cell], cost: Sequence[Cost]) -> None:
    """Says on stderr what the sweep consists of."""
    programs = len({each.program for each in cost})
    images, flops = sum(each.images for each in cost), sum(each.flops for each in cost)
    told = f"sweep of {plan.study}: {len(cells)} cells, {programs} sets of compiled programs"
    if images:
        told += f", {images:.3g} images through networks, {flops:.2g} floating point operations"
    print(told, file=sys.stderr)


def dry_run(cells: Sequence[Cell], cost: Sequence[Cost]) -> str:
    """The table of cells: name, images through the network, share of the cost."""
    total, width = sum(each.flops for each in cost), max(len(cell.name) for cell in cells)
    lines = [f"{'cell':{width}}  {'images':>10}  {'share':>6}"]
    for cell, each in list(zip(cells, cost, strict=True))[:MOST_SHOWN]:
        lines.append(f"{cell.name:{width}}  {each.images:10d}  {100 * each.flops / total:5.1f}%")
    if len(cells) > MOST_SHOWN:
        lines.append(f"... and {len(cells) - MOST_SHOWN} more")
    return "\n".join(lines)


def status(sweep: SweepFolder) -> str:
    """How many cells are in each state, and what failed, one line each."""
    states = {cell.name: sweep.state(cell) for cell in sweep.cells}
    counts = Counter(states.values())
    lines = [f"{sweep.path}: " + ", ".join(f"{counts[state]} {state}" for state in STATES if counts[state])]
    for cell in sweep.cells:
        if states[cell.name] == "running":
            lines.append(f"running  {cell.name}")
        failure = sweep.failure(cell)
        if states[cell.name] == "failed" and failure is not None:
            lines.append(f"failed   {cell.name}: {failure.error}")
    return "\n".join(lines)


def surroundings() -> str:
    """Where this process runs, as a line of JSON at the beginning of a worker's log: time, host, versions, device, and
    the variables by which schedulers and JAX are told what to do."""
    variables = {name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)}
    variables.pop("SLURM_JWT", None)  # a secret
    return json.dumps({"started": now(), "host": socket.gethostname(), **environment(), "variables": variables})


class Progress:
    """A bar over all cells of a process, or of all processes that it watches. Cells that were complete before take no
    part in it, so that the time that is left is that of the others."""

    def __init__(self, sweep: SweepFolder, cells: Sequence[Cell], cost: Sequence[Cost], *, quiet: bool) -> None:
        self.sweep, self.cost = sweep, {cell.name: each.flops for cell, each in zip(cells, cost, strict=True)}
        self.left = {cell.name: cell for cell in cells}
        self.count, self.failed, self.is_told, self.quiet = len(self.left), 0, False, quiet
        self.images = {cell.name: each.images for cell, each in zip(cells, cost, strict=True)}
        self.bar = tqdm(total=sum(self.cost.values()), desc="sweep", bar_format=BAR, disable=quiet, smoothing=0)

    def __enter__(self) -> Self:
        for cell in list(self.left.values()):
            if self.sweep.is_complete(cell):
                self.after(cell, "there")
        return self

    def __exit__(self, *_: Any) -> None:
        self.bar.close()

    def heard(self, cell: Cell, seconds: float) -> None:
        """After the first block of all: says how long the cells that are left will take, by their arithmetic.
        Compiling, analysis and pages come on top."""
        if self.is_told or self.quiet or not self.images[cell.name]:
            return
        self.is_told = True
        rate = seconds * self.images[cell.name] / self.cost[cell.name]
        more = rate * sum(self.cost[name] for name in self.left)
        tqdm.write(
            f"about {duration(more)} in networks, by one timed block; compiling and analysis come on top",
            file=sys.stderr,
        )

    def after(self, cell: Cell, outcome: str) -> None:
        """A cell ended: done, failed, or there, which took no time of the processes that are watched."""
        if self.left.pop(cell.name, None) is None:
            return
        self.failed += outcome == "failed"
        if outcome == "there":
            self.bar.total -= self.cost[cell.name]
            self.bar.refresh()
        else:
            self.bar.update(self.cost[cell.name])
        self.bar.set_postfix_str(f"{self.count - len(self.left)} of {self.count} cells, {self.failed} failed")

    def look(self) -> None:
        """Looks which of the cells that other processes run have ended since."""
        for cell in list(self.left.values()):
            if self.sweep.is_complete(cell):
                self.after(cell, "done")
            elif self.sweep.failure(cell) is not None:
                self.after(cell, "failed")
