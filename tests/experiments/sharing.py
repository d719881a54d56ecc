"""Whether runs of one process share programs, and measure with them what each measures alone."""

from pathlib import Path
from typing import Any

import xarray as xr

from experiments.frame import programs
from experiments.frame.bench import Bench
from experiments.frame.study import Study


def measured(study: Study, config: Any, out: Path) -> dict[str, xr.Dataset]:
    """Every group that a study measures, without its analysis and page."""
    bench = Bench(study.name, config, out, definitions=study.definitions, check=study.check)
    study.measure(bench)
    return {group: bench.load(group) for group in bench.run.groups}


def assert_shared(study: Study, config: Any, other: Any, folder: Path, differing: tuple[str, ...]) -> None:
    """After a run of `config`, one of `other` compiles nothing, and measures to the bit what it does alone; which is
    something else in the groups `differing`."""
    with programs.kept():
        first = measured(study, config, folder / "first")
        before = programs.compilations()
        shared = measured(study, other, folder / "shared")
        assert programs.compilations() == before
    alone = measured(study, other, folder / "alone")
    for group, expected in alone.items():
        xr.testing.assert_identical(shared[group], expected)
    assert not any(first[group].identical(alone[group]) for group in differing)
