"""Plans of sweeps: their cells, what is refused, and the shares of workers."""

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from experiments.sweeps.folder import SweepFolder
from experiments.sweeps.plan import SHIPPED, Plan, PlanError, read_plan
from experiments.sweeps.shares import WHOLE, read_shard, shares


def compare(**entries) -> Plan:
    return Plan.from_dict({"study": "compare", **entries})


def test_cells_are_the_product_of_the_axes_the_last_one_fastest():
    plan = compare(settings={"pairs": 8}, axes={"guidance": [1, 1.5], "steps": [50, 250]}, repeats=2)
    cells = plan.cells()
    assert plan.dims == ("guidance", "steps", "seed")
    assert [tuple(cell.place.values()) for cell in cells[:3]] == [(1, 50, 0), (1, 50, 1), (1, 250, 0)]
    assert len(cells) == len({cell.name for cell in cells}) == 8
    assert {(c.settings.guidance, c.settings.steps, c.settings.seed) for c in cells} == {
        (g, s, n) for g in (1.0, 1.5) for s in ("50", "250") for n in (0, 1)
    }
    assert all(cell.settings.pairs == 8 for cell in cells)


def test_points_are_crossed_with_the_axes():
    points = [{"gate_kind": "convex", "couplings": [0, 0.5]}, {"gate_kind": "joint", "couplings": [0, 1, 2]}]
    cells = compare(points=points, axes={"seed": [3, 4]}).cells()
    assert [(c.settings.gate_kind, c.settings.couplings, c.settings.seed) for c in cells] == [
        ("convex", (0.0, 0.5), 3),
        ("convex", (0.0, 0.5), 4),
        ("joint", (0.0, 1.0, 2.0), 3),
        ("joint", (0.0, 1.0, 2.0), 4),
    ]
    assert cells[0].place == {"gate_kind": "convex", "couplings": "0_0.5", "seed": 3}


def test_a_plan_without_axes_is_one_cell():
    (cell,) = compare(settings={"pairs": 4}).cells()
    assert cell.name == "only"
    assert cell.place == {}


def test_options_of_the_command_line_take_the_place_of_the_plans_own():
    plan = compare(settings={"pairs": 8, "steps": 50}, axes={"guidance": [1, 2]})
    changed = plan.with_values(["guidance=4", "steps=25,100", "couplings=0 0.5, 0 1", "gate-kind=blend"])
    assert changed.settings == {"pairs": 8, "guidance": 4, "gate_kind": "blend"}
    assert changed.axes == {"steps": [25, 100], "couplings": [[0, 0.5], [0, 1]]}
    assert [cell.settings.couplings for cell in changed.cells()][:2] == [(0.0, 0.5), (0.0, 1.0)]


def test_options_of_the_command_line_take_the_place_of_what_points_set():
    points = [{"gate_kind": kind, "steps": steps} for kind in ("joint", "blend") for steps in (50, 100)]
    plan = compare(points=points, settings={"pairs": 8})
    fixed = plan.with_values(["steps=25"])
    assert fixed.points == [{"gate_kind": "joint"}, {"gate_kind": "blend"}]
    assert [cell.settings.steps for cell in fixed.cells()] == ["25", "25"]
    assert len(plan.with_values(["steps=25,50,75"]).cells()) == 6
    assert plan.with_values(["pairs=4"]).points == points
    none_left = plan.with_values(["steps=25", "gate_kind=joint"])
    assert none_left.points == []
    assert none_left.dims == ()
    with pytest.raises(PlanError, match="--set steps takes all that a point"):
        compare(points=[{"steps": 25}, {"gate_kind": "blend"}]).with_values(["steps=50"])


def test_a_value_that_is_none_by_name():
    chosen = compare(axes={"classes": ["none", [0, 1]]}).cells()
    assert [cell.settings.classes for cell in chosen] == [None, (0, 1)]


def test_a_plan_survives_json():
    plan = compare(points=[{"steps": 50}], axes={"seed": [0, 1]}, title="t", question="q", settings={"pairs": 4})
    assert Plan.from_dict(plan.to_dict()) == plan


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ({"settings": {"gides": 1}}, "no setting gides; it has block"),
        ({"axes": {"guidance": ["much"]}}, "guidance=much: guidance must be a number, got 'much'"),
        ({"axes": {"pairs": [4.5]}}, "pairs must be a whole number"),
        ({"axes": {"pairs": [float("inf")]}}, "pairs must be a whole number, got inf"),
        ({"axes": {"pairs": [10**400]}, "settings": {"seed": 10**400}}, "seed must be a whole number from 0"),
        ({"axes": {"pairs": [float("nan")]}}, "pairs must be a whole number, got nan"),
        ({"axes": {"guidance": [10**400]}}, "guidance must be a number, got 1000"),
        ({"axes": {"sampler": ["ddpm"]}}, "'ddpm' is not one of ddim, ancestral"),
        ({"axes": {"pairs": [8, 1]}}, "pairs=1: pairs must be at least 2"),
        ({"axes": {"seed": [0, 0]}}, "have the same settings"),
        ({"axes": {"guidance": [1, 1.0000001]}}, "have the same name"),
        ({"axes": {"seed": []}}, "axis seed has no values"),
        ({"axes": {"seed": 3}}, "a single value belongs to"),
        ({"axes": {"seed": [1]}, "settings": {"seed": 2}}, "seed is given more than once"),
        ({"axes": {"seed": [1]}, "repeats": 2}, "repeats or an axis seed"),
        ({"repeats": 0}, "at least 1"),
        ({"axis": {}}, "no entry axis"),
        ({"settings": [1]}, "settings of a plan must be a table"),
        ({"study": "compass"}, "no study 'compass'"),
        ({"points": [{}]}, "every"),
    ],
)
def test_what_cannot_run_is_refused_by_name(entries, said):
    with pytest.raises(PlanError) as error:
        compare(**entries).cells()
    assert said in str(error.value)


@pytest.mark.parametrize("option", ["guidance", "=1", "guidance=", "guidance=1,,2"])
def test_options_of_another_form_are_refused(option):
    with pytest.raises(PlanError, match="not of the form NAME=VALUE"):
        compare().with_values([option])


def test_unreadable_plans_name_file_and_reason(tmp_path):
    broken = tmp_path / "p.toml"
    broken.write_text("study = compare")
    with pytest.raises(PlanError, match=r"p\.toml cannot be read as TOML"):
        read_plan(str(broken))
    with pytest.raises(PlanError, match=r"there is no plan nowhere; .*guidance"):
        read_plan("nowhere")
    broken.write_text('study = "compare"\nsteps = 3')
    with pytest.raises(PlanError, match=r"p\.toml: a plan has no entry steps"):
        read_plan(str(broken))


@pytest.mark.parametrize("name", sorted(path.stem for path in SHIPPED.glob("*.toml")))
def test_shipped_plans_are_valid(name):
    plan = read_plan(name)
    assert plan.title
    assert plan.question
    assert len(plan.cells()) > 1


def test_long_names_stay_apart_and_fit_a_file_system():
    grids = [[0, *(i / 1000 + step / 10 for step in range(1, 40))] for i in range(5)]
    cells = compare(axes={"couplings": grids}).cells()
    assert len({cell.name for cell in cells}) == 5
    assert all(len(cell.name) < 200 for cell in cells)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # by a busy machine's clock
@given(st.lists(st.floats(0.1, 100), min_size=1, max_size=40), st.integers(1, 12))
def test_shares_hold_every_cell_once_and_are_equal_up_to_one_cell(costs, count):
    found = shares(costs, [0] * len(costs), count)
    assert sorted(i for share in found for i in share) == list(range(len(costs)))
    totals = [sum(costs[i] for i in share) for share in found]
    assert max(totals) - min(totals) <= max(costs) * (1 + 1e-9)


def test_cells_of_one_program_follow_each_other():
    (only,) = shares([1.0] * 6, ["a", "b", "a", "b", "c", "a"], 1)
    assert only == [0, 2, 5, 1, 3, 4]


def test_shares_are_by_cost_not_by_count():
    found = shares([10, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1], [0] * 11, 2)
    assert sorted(map(len, found)) == [1, 10]


def test_a_share_is_read_from_the_line_or_the_scheduler():
    slurm = {"SLURM_ARRAY_TASK_ID": "7", "SLURM_ARRAY_TASK_MIN": "3", "SLURM_ARRAY_TASK_COUNT": "5"}
    assert read_shard(None, {}) == WHOLE
    assert read_shard("2/8", slurm) == (2, 8)
    assert read_shard(None, slurm) == (4, 5)
    assert read_shard(None, {**slurm, "SLURM_ARRAY_TASK_STEP": "2"}) == (2, 5)
    assert read_shard("/4", {"JOB_COMPLETION_INDEX": "3"}) == (3, 4)


def test_processes_of_one_command_take_a_share_each():
    assert read_shard(None, {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "1"}) == (1, 3)
    step = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "2"}
    assert read_shard(None, step) == (2, 4)
    assert read_shard("1/3", step) == (1, 3)
    array = {"SLURM_ARRAY_TASK_ID": "1", "SLURM_ARRAY_TASK_COUNT": "3"}
    assert read_shard(None, {**array, **step}) == (6, 12)
    assert read_shard(None, {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) == WHOLE
    assert read_shard(None, {"SLURM_NTASKS": "4", "SLURM_PROCID": "0"}) == WHOLE  # a batch script, outside of srun


@pytest.mark.parametrize(
    ("text", "environment", "said"),
    [
        ("3", {}, "form i/n"),
        ("a/2", {}, "form i/n"),
        ("2/2", {}, "shard 2/2 does not exist"),
        ("0/0", {}, "does not exist"),
        ("/4", {}, "leaves the index to the environment"),
        (None, {"JOB_COMPLETION_INDEX": "3"}, "nothing says how many"),
        (None, {"SLURM_ARRAY_TASK_ID": "x"}, "does not say which share"),
    ],
)
def test_shares_that_do_not_exist_are_refused(text, environment, said):
    with pytest.raises(PlanError) as error:
        read_shard(text, environment)
    assert said in str(error.value)


def test_a_worker_finds_its_share_from_the_stored_plan(tmp_path):
    """The plan that is opened again has the cells, the programs and so the shares of the one that was given."""
    plan = compare(
        settings={"pairs": 4}, points=[{"gate_kind": "joint"}, {"gate_kind": "blend", "steps": 100}], repeats=5
    )
    plan = plan.with_values(["couplings=0 0.5, 0 1"])
    again = SweepFolder.open(SweepFolder.create(tmp_path / "sweep", plan).path)
    assert again.cells == plan.cells()
    costs = np.random.default_rng(0).exponential(size=len(again.cells)).tolist()
    groups = [[cell.settings.gate_kind for cell in cells] for cells in (again.cells, plan.cells())]
    assert shares(costs, groups[0], 7) == shares(costs, groups[1], 7)
