"""Runs of one process that share programs and networks: the same numbers, nothing compiled again, nothing left over."""

import dataclasses
import gc
import weakref
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sharing
import xarray as xr
from flax import nnx

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from experiments import studies
from experiments.frame import bench as frame_bench
from experiments.frame import programs
from experiments.frame.bench import Bench
from experiments.frame.store import RunFolder
from experiments.frame.study import report, run_study
from experiments.frame.subject import untrained_model
from ou_theory.keys import random_key

FAST = {"pairs": 2, "steps": "8", "block": 2, "untrained_pairs": 2, "guidance": 2.5, "seed": 1}
OTHER = {"pairs": 3, "guidance": 1.5, "seed": 2**32 - 1, "classes": (2, 1)}  # and other weights; all that may be traced
COMPARE = {"couplings": (0.0, 0.3, 1.0), "gain_pairs": 2}
STUDIES = {  # what is fast in each study, and what else may differ between runs of one program; compare is below
    "release": ({"releases": 2}, {"couplings": (0.4,)}),
    "interventions": ({"singles": 1}, {"strength": 0.5, "schedule_strength": 0.1}),
    "cloning": ({}, {}),
    "response": ({"vectors": 1, "levels": 3}, {}),
    "mechanism": ({"couplings": (0.0, 1.0), "levels": 2}, {"couplings": (0.0, 0.5)}),
    "depth": ({"couplings": (0.0, 1.0), "probe_pairs": 12}, {"couplings": (0.0, 0.5)}),
}


@pytest.fixture(scope="module")
def others(tmp_path_factory):
    """Another network of the architecture of `weights`."""
    folder = tmp_path_factory.mktemp("weights") / "others"
    config = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=3)
    save_model(untrained_model(config, 6), folder, extra={"data": None})
    return str(folder)


def measured(study, out, **settings) -> dict[str, xr.Dataset]:
    found = studies.find(study)
    return sharing.measured(found, found.config(**settings), out)


@pytest.mark.long
@pytest.mark.parametrize("study", STUDIES)
def test_shared_programs_measure_what_own_ones_do_bit_for_bit(study, weights, others, tmp_path):
    """The second run differs in everything that the two may differ in, and takes nothing from the first."""
    fast, more = STUDIES[study]
    first = FAST | fast
    second = first | OTHER | more | {"weights": others}
    alone = measured(study, tmp_path / "alone", **second)
    with programs.kept():
        before = measured(study, tmp_path / "first", weights=weights, **first)
        made = set(programs._kept.programs)
        shared = measured(study, tmp_path / "second", **second)
        assert set(programs._kept.programs) == made != set()
    assert alone.keys() == shared.keys()
    for group, expected in alone.items():
        xr.testing.assert_identical(shared[group], expected)
    assert not any(alone[group].identical(before[group]) for group in alone)


CELLS = [{}, OTHER | {"pairs": 2}, {"seed": 3, "guidance": 4.0, "couplings": (0.0, 0.5, 0.7)}]


def page_of_one_figure(measured, analysis):
    """The page of compare, which has more figures than a test needs to draw."""
    page = studies.find("compare").page(measured, analysis)
    page.section.captions = {"gap": page.section.captions["gap"]}
    return page._replace(figures={"gap": page.figures["gap"]})


COMPARE_STUDY = dataclasses.replace(studies.find("compare"), page=page_of_one_figure)


@pytest.fixture(scope="module")
def swept(weights, others, tmp_path_factory):
    """Three runs of compare that share what they can, without figures. The second is of other weights."""
    folder, compare = tmp_path_factory.mktemp("swept"), COMPARE_STUDY
    with programs.kept():
        for i, cell in enumerate(CELLS):
            config = compare.config(**FAST | COMPARE | {"weights": others if i == 1 else weights} | cell)
            run_study(compare, config, folder / str(i), progress=False, figures=False)
    return folder


@pytest.mark.long
def test_runs_of_other_seeds_scales_couplings_classes_and_weights_compile_nothing(swept):
    """Not even a small operation."""
    counts = [RunFolder.open(swept / str(i)).manifest["compilations"] for i in range(3)]
    assert counts[0] > 0
    assert counts[1:] == [0, 0]


@pytest.mark.long
def test_runs_that_share_programs_measure_what_they_do_alone(swept, others, tmp_path):
    """The first cell has left nothing in the second."""
    run = RunFolder.open(swept / "1")
    for group, expected in measured("compare", tmp_path / "alone", **FAST | COMPARE | CELLS[1], weights=others).items():
        xr.testing.assert_identical(run.load(group), expected)


@pytest.mark.long
def test_a_run_without_figures_has_all_else_and_gets_them_by_its_report(swept):
    run = RunFolder.open(swept / "1", writable=True)
    page = (run.path / "report.html").read_text()
    assert run.manifest["status"] == "complete"
    assert not (run.path / "figures").exists()
    assert "<figure" not in page
    assert f"syncgap report {run.path}" in page
    before, claims = (run.read_json(name) for name in ("section.json", "claims.json"))
    assert all(table["title"] in page for table in before["tables"])
    report(COMPARE_STUDY, run)
    page = (run.path / "report.html").read_text()
    assert page.count("<figure") == len(before["captions"]) == 1
    assert 'class="undrawn"' not in page
    assert run.read_json("claims.json") == claims
    assert before == run.read_json("section.json") | {"drawn": False}


def test_compilations_are_counted_once_for_a_program():
    double = jax.jit(lambda x: 2 * x)
    x = jnp.ones(3)
    before = programs.compilations()
    double(x)
    assert programs.compilations() == before + 1
    double(x + x - x)
    after = programs.compilations()
    double(x)
    assert programs.compilations() == after


@pytest.mark.parametrize("seed", [0, 1, 2**31, 2**32 - 1])
def test_a_traced_seed_is_the_same_key(seed):
    keys = [jax.random.key_data(key) for key in (random_key(seed), jax.jit(random_key)(np.uint32(seed)))]
    np.testing.assert_array_equal(*keys)


# --- what is shared


def setup(**more) -> programs.Setup:
    fixed = programs.Setup(
        DiTConfig(input_size=8, hidden_size=16, depth=2, num_heads=2),
        None,
        steps="8",
        sampler="ddim",
        gate_kind="joint",
        guided_channels="all",
        guided_coupling="both",
        is_guided=True,
        seed=0,
        guidance=2.0,
    )
    return dataclasses.replace(fixed, **more)


def traced(setup, scale, x):
    return scale * x + setup.guidance + setup.seed


def test_setups_that_differ_in_what_is_static_have_programs_of_their_own():
    fixed = setup()
    with programs.kept():
        first = programs.program(fixed, traced, 2)
        same = programs.program(dataclasses.replace(fixed, seed=5, guidance=3.0), traced, 2)
        assert first.func is same.func
        assert [float(each(1.0)) for each in (first, same)] == [4.0, 10.0]
        static = {"steps": "9", "sampler": "ancestral", "gate_kind": "blend", "guided_channels": "official"}
        static |= {"guided_coupling": "conditional", "is_guided": False}
        static["model"] = dataclasses.replace(fixed.model, dtype="bfloat16")
        for name, value in static.items():
            other = programs.program(dataclasses.replace(fixed, **{name: value}), traced, 2)
            assert other.func is not first.func, name
        assert programs.program(fixed, traced, 3).func is not first.func
    assert programs.program(fixed, traced, 2).func is not first.func


def test_arrays_that_are_static_are_told_apart_by_their_contents():
    a, b = np.arange(4.0), np.arange(4.0)
    assert programs.constant("x", a) == programs.constant("y", b)
    assert hash(programs.constant("x", a)) == hash(programs.constant("y", b))
    for other in (a.reshape(2, 2), a.astype(np.float32), a + 1):
        assert programs.constant("x", a) != programs.constant("x", other)


def test_a_function_that_could_read_another_run_is_refused():
    seed = 3

    class Owner:
        def method(self, setup):
            return setup

    for function in (lambda setup: seed, Owner().method, partial(traced, scale=1)):
        with pytest.raises(TypeError, match="top level"):
            programs.program(setup(), function)


def test_few_programs_are_kept_and_those_used_last():
    with programs.kept():
        first = programs.program(setup(), traced, 0)
        for number in range(1, 2 * programs.MOST):
            programs.program(setup(), traced, number)
            assert programs.program(setup(), traced, 0).func is first.func
        assert len(programs._kept.programs) == programs.MOST


def array_of(model) -> weakref.ref:
    return weakref.ref(jax.tree.leaves(nnx.state(model))[0])


@pytest.mark.long
def test_a_network_is_loaded_once_and_let_go_before_the_next(weights, others, tmp_path, monkeypatch):
    loaded, original = [], frame_bench.load_network

    def load(*args, **options):
        gc.collect()
        loaded.append([each() is None for each in alive])
        return original(*args, **options)

    monkeypatch.setattr(frame_bench, "load_network", load)
    alive: list[weakref.ref] = []

    def use(name, **settings):
        config = studies.find("compare").config(**FAST | settings)
        bench = Bench("compare", config, tmp_path / name)
        alive.extend([array_of(bench.network), array_of(bench.untrained)])

    with programs.kept():
        use("first", weights=weights)
        use("again", weights=weights, guidance=1.0)
        assert loaded == [[]]
        assert alive[0]() is alive[2]() is not None
        assert alive[1]() is alive[3]() is not None
        use("seed", weights=weights, seed=2)
        assert alive[0]() is alive[4]()
        assert alive[1]() is None  # the control is another one
        use("others", weights=others)
        use("dtype", weights=others, dtype="bfloat16")
        assert loaded[1:] == [[True] * 6, [True] * 8]
        monkeypatch.setattr(frame_bench, "SMALL", 0)
        use("large", weights=weights)
        assert alive[-1]() is not None
        assert all(each() is None for each in alive[:-1])  # nor the network that the control is one of
        monkeypatch.setattr(frame_bench, "SMALL", 10**9)
        use("small", weights=others)
        assert alive[-1]() is not None
        assert alive[-2]() is not None
        assert all(each() is None for each in alive[:-2])
    gc.collect()
    assert all(each() is None for each in alive)
    use("own", weights=others)
    gc.collect()
    assert alive[-1]() is alive[-2]() is None
