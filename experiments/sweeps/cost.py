"""What the cells of a sweep cost, and whether they can run at all: checked whole before anything runs."""

from collections.abc import Callable, Sequence
from dataclasses import fields
from functools import cache
from typing import NamedTuple

from experiments import studies
from experiments.frame.bench import checked_settings, one_of
from experiments.frame.cost import passes_of, run_flops
from experiments.frame.settings import StudyConfig
from experiments.frame.study import Study
from experiments.frame.subject import Subject, load_subject
from experiments.sweeps.plan import Cell, Plan, PlanError
from experiments.sweeps.shares import shares

TRACED = ("seed", "classes", "pairs", "untrained_pairs")  # cells that differ in these alone share compiled programs
BY_FORM = (
    "weights",
    "guidance",
    "couplings",
)  # and in these where networks are of one form, and as many passes are made


class Cost(NamedTuple):
    """Of a cell."""

    images: int  # that go through a network
    flops: float  # of the network's matrix products; 1 where the study does not say
    program: object  # cells of the same one need no new compilation


def costs(plan: Plan, cells: Sequence[Cell], devices: int = 1) -> list[Cost]:
    """What every cell costs.

    Args:
      devices: over which each process splits its pairs.

    Raises:
      PlanError: a cell cannot run: its network does not exist, or its settings do not fit it; the message names the
        cell.
    """
    study: Study = studies.find(plan.study)
    load = cache(load_subject)
    found = []
    for cell in cells:
        try:
            found.append(_cost(study, cell, load, devices))
        except ValueError as error:
            raise PlanError(f"{cell.name}: {error}") from error
    return found


def _cost(study: Study, cell: Cell, load: Callable[[str], Subject], devices: int) -> Cost:
    config = cell.settings
    if not isinstance(config, StudyConfig):
        return Cost(0, 1.0, None)
    if not isinstance(config.weights, str) and len(config.weights) > 1:
        names = ", ".join(config.weights)
        raise ValueError(f"a cell is a run of one network, got weights {names}; make them an axis: weights = [...]")
    network = load(one_of(config.weights))
    checked_settings(study.name, config, network, study.check, study.any_network, devices)
    couplings, guidance = len(getattr(config, "couplings", ())), config.guidance if config.halves == 1 else None
    static = ((each.name, getattr(config, each.name)) for each in fields(config))
    settings = tuple((name, value) for name, value in static if name not in (*TRACED, *BY_FORM))
    program = (network.config, config.halves, guidance, couplings, settings)
    images = sum(passes_of(study, config, network.config).values())
    return Cost(images, run_flops(study, config, network.config) or 1.0, program)


def parts(cells: list[Cell], cost: list[Cost], count: int) -> list[list[Cell]]:
    """The cells of each of `count` shares."""
    found = shares([each.flops for each in cost], [each.program for each in cost], count)
    return [[cells[i] for i in part] for part in found]
