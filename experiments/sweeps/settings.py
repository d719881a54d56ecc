"""The options of ``syncgap sweep``. Imports nothing heavy."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class Sweep:
    """Run a study over many settings: every combination is an ordinary run, and all become one labelled result.

    `syncgap sweep PLAN` runs the plan of a TOML file, or a shipped plan by its name. A plan may come without a file,
    too: `syncgap sweep --study compare --set guidance=1,1.5,4 steps=50,250`. `syncgap sweep status FOLDER` says how far
    a sweep is, `syncgap sweep cancel FOLDER` ends it. docs/sweeps.md has more.
    """

    plan: tyro.conf.Positional[tuple[str, ...]] = ()  # a plan; or status FOLDER, or cancel FOLDER
    study: str | None = None  # in the place of a plan: the study whose settings --set gives
    set: tuple[str, ...] = ()  # NAME=VALUE fixes a setting, NAME=VALUE,VALUE,... is an axis; "NAME=0 0.5 1" is a list
    out: Path | None = None  # folder of the sweep; runs/sweep-PLAN by default
    dry_run: _Flag = False  # print the cells and what they cost, and run nothing
    resume: _Flag = False  # continue the sweep in --out: what is complete stays, what failed is tried again
    workers: int | None = None  # processes on this machine; by default one a GPU, and one on CPUs
    shard: str | None = None  # run only the i-th of n shares of equal cost: i/n; /n takes i from the scheduler
    slurm: tuple[str, ...] = ()  # submit to Slurm with these options: partition=gpu time=120 gpus_per_node=1
    tasks: int | None = None  # tasks of the Slurm array; by default one a cell, at most 100
    figures: _Flag = False  # draw the figures of every cell; `syncgap report FOLDER` draws those of one
    quiet: _Flag = False  # no progress bar

    def __post_init__(self) -> None:
        for name in ("workers", "tasks"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.shard is not None and self.slurm:
            raise ValueError(
                "give --shard or --slurm, not both: an array of Slurm divides the cells over its tasks itself"
            )
        if self.shard is not None and self.workers is not None:
            raise ValueError("give --shard or --workers, not both: a share is run by the process that is given it")
        if self.tasks is not None and not self.slurm:
            raise ValueError("--tasks is the number of tasks of an array of Slurm; give --slurm, too, or leave it out")
