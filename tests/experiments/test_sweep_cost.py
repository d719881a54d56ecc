"""What cells of a sweep cost, in every study of a network, and which of them run in the same compiled programs."""

import pytest

from experiments import studies
from experiments.frame.settings import StudyConfig
from experiments.sweeps.cost import costs
from experiments.sweeps.plan import Plan, PlanError

SETTINGS = {"pairs": 2, "untrained_pairs": 2, "steps": "10"}
WITH_DATA = {
    "solvable": "solvable8",
    "spectrum": "photos8-natural",
}  # the others can do without; a tiny network has none
NEED_LARGE_DATA = ("speciation", "gaussianity", "modalities")
NAMES = [name for name in studies.NAMES if name not in NEED_LARGE_DATA]


def cost(study, weights, settings=None, **axes):
    fixed = {**SETTINGS, "weights": WITH_DATA.get(study, weights), **(settings or {})}
    plan = Plan(study, {name: value for name, value in fixed.items() if name not in axes}, axes)
    return costs(plan, plan.cells())


@pytest.mark.parametrize("study", NAMES)
def test_every_study_of_a_network_can_be_swept(study, weights):
    assert issubclass(studies.settings_of(study), StudyConfig)
    first, second, longer, _ = cost(study, weights, steps=[10, 12], pairs=[2, 4])
    assert first.program == second.program != longer.program
    assert 0 < first.images < second.images
    assert first.flops > 1


def test_programs_are_told_apart_by_what_is_compiled(weights):
    def programs(**axes):
        return len({each.program for each in cost("compare", weights, **axes)})

    assert programs(couplings=[[0, 1], [0, 0.5]]) == 1  # traced
    assert programs(couplings=[[0, 1], [0, 0.5, 1]]) == 2  # of another shape
    assert programs(guidance=[1.5, 4]) == 1
    assert programs(guidance=[0, 1, 4]) == 3  # the null label alone, none, two halves
    assert programs(gate_kind=["joint", "blend"]) == 2
    assert programs(seed=[0, 1], classes=[[0], [1, 2]]) == 1


def test_a_cell_of_several_networks_is_refused_by_name():
    with pytest.raises(
        PlanError, match=r"one network, got weights photos8-natural, photos8-whitened.*; make them an axis"
    ):
        cost("spectrum", None, {"weights": ["photos8-natural", "photos8-whitened"]})
