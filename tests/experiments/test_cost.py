"""What a run costs: the declared passes against a count of what goes through the network, and its arithmetic."""

import gc
import math
import weakref
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import xarray as xr
from flax import nnx
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

from dit_jax.attention import symmetric_gate
from dit_jax.config import ControlConfig, DiTConfig
from dit_jax.controls import make_network
from dit_jax.model import DiT
from dit_jax.replicas import run_pairs
from experiments import studies
from experiments.frame import bench as bench_module
from experiments.frame import forecast, progress
from experiments.frame.bench import Bench
from experiments.frame.cost import flops, passes_of, run_flops
from experiments.frame.forecast import Forecast, covered
from experiments.frame.settings import StudyConfig
from experiments.frame.store import RunFolder

SEEN = [0]  # pixels that went through `counted`
counted_p = Primitive("counted")  # the identity; what goes through it, tangents and cotangents too, is counted


def counted(x):
    return counted_p.bind(x)


def _lowered(x):
    jax.debug.callback(lambda: SEEN.__setitem__(0, SEEN[0] + x.size))
    return x


counted_p.def_abstract_eval(lambda x: x)
mlir.register_lowering(counted_p, mlir.lower_fun(_lowered, multiple_results=False))
ad.deflinear2(counted_p, lambda cotangent, _: [counted(cotangent)])
batching.defvectorized(counted_p)

SMALL = {"pairs": 4, "block": 2, "untrained_pairs": 2, "steps": "10"}
CASES = {
    "compare": {"couplings": (0.0, 0.1, 0.5, 1.0), "pairs": 5, "gain_pairs": 3, "guidance": 2.0},
    "depth": {"couplings": (0.0, 0.2, 0.5), "probe_pairs": 8, "probe_levels": 4},
    "mechanism": {"couplings": (0.0, 0.5, 1.0), "levels": 3},
    "interventions": {"singles": 2, "guidance": 2.0},
    "release": {"couplings": (0.5, 1.0), "releases": 3},
    "cloning": {"branches": 3},
    "response": {"levels": 3, "vectors": 2},
    "solvable": {"branches": 3, "weights": "solvable8"},
    "spectrum": {"couplings": (0.0, 0.5, 1.0), "weights": ("photos8-natural",)},
}


@pytest.fixture
def measured_passes(monkeypatch, tmp_path):
    """Runs what a study measures and counts the images that go through the network in each group."""

    def run(name, weights):
        study = studies.find(name)
        settings = study.config(**{**SMALL, "weights": weights, **CASES[name]})
        groups = {}

        def of_group(original):
            def measuring(bench, group, *args, **options):
                if group == "pictures":  # made of what is measured for another group
                    return original(bench, group, *args, **options)
                SEEN[0] = 0
                found = original(bench, group, *args, **options)
                jax.effects_barrier()
                groups[group], rest = divmod(SEEN[0], math.prod(bench.subject.image_shape))
                assert rest == 0
                return found

            return measuring

        for method in ("measure", "whole"):
            monkeypatch.setattr(Bench, method, of_group(getattr(Bench, method)))
        monkeypatch.setattr(DiT, "__call__", counting(DiT.__call__))
        options = {"definitions": study.definitions, "check": study.check, "any_network": study.any_network}
        bench = Bench(study.name, settings, tmp_path / "run", **options)
        study.measure(bench)
        return passes_of(study, settings, bench.model), groups

    return run


def counting(original):
    """A network that counts its inputs. A stand-in without blocks if nothing looks inside, which compiles at once."""

    def call(self, x, t, y, gate=None, **options):
        x = counted(x)
        if options.get("tap") is not None or options.get("edit") is not None:
            return original(self, x, t, y, gate, **options)
        return jnp.concatenate([0.5 * jnp.tanh(x)] * (self.config.out_channels // x.shape[-1]), -1)

    return call


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [name if name == "release" else pytest.param(name, marks=pytest.mark.long) for name in CASES]
)
def test_a_study_declares_what_goes_through_its_network(name, weights, measured_passes):
    declared, found = measured_passes(name, weights)
    assert list(declared.items()) == [(group, count) for group, count in found.items() if count]  # in this order


def test_networks_without_attention_run_uncoupled():
    study = studies.find("spectrum")
    settings = study.config(**{**SMALL, **CASES["spectrum"]})
    with_attention, without = (passes_of(study, settings, NETWORKS[name])["network"] for name in ("dit", "unet"))
    assert with_attention == 3 * without == 3 * 2 * 10 * 4


@pytest.mark.parametrize("name", CASES)
def test_too_few_steps_are_refused_before_there_is_a_folder(name, weights, tmp_path):
    """Two steps, of which one lies before the estimator's window."""
    study = studies.find(name)
    given = {**SMALL, "weights": weights, **CASES[name], "steps": "2"}
    with pytest.raises(ValueError, match="steps"):
        Bench(name, study.config(**given), tmp_path / "run", check=study.check)
    assert not (tmp_path / "run").exists()


def test_who_hears_of_the_cost_is_told_once_in_the_place_of_the_terminal(weights, tmp_path, capsys):
    heard, study = [], studies.find("release")
    config = study.config(**{**SMALL, "weights": weights, **CASES["release"]})
    bench = Bench("release", config, tmp_path / "run", passes=study.passes, heard=heard.append)
    variables = {"level": (("step",), "a number")}
    steps = len(bench.clock)
    for group in ("network", "untrained"):
        bench.measure(group, variables, {}, 4, lambda pairs, labels: {"level": np.ones((len(pairs), steps))})
    assert len(heard) == 1
    assert heard[0] > 0
    assert capsys.readouterr().err == ""


def test_every_study_of_a_network_declares_its_passes():
    measured = {name for name in studies.NAMES if studies.find(name).subject is None}
    assert {name for name in measured if studies.find(name).passes is not None} == measured
    assert measured - set(CASES) == {"gaussianity", "speciation"}  # which need more than a network: data, a classifier


NETWORKS = {
    "dit": DiTConfig(input_size=8, in_channels=3, hidden_size=24, depth=3, num_heads=2, mlp_ratio=3, num_classes=3),
    "unet": ControlConfig("unet", hidden_size=12, depth=2, input_size=6, in_channels=2),
    "mlp": ControlConfig("mlp", hidden_size=12, depth=3, input_size=6, in_channels=2),
}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("replicas", [1, 2])
def test_the_arithmetic_is_that_of_the_matrix_products(name, replicas):
    config, images = NETWORKS[name], 5
    model = make_network(config, nnx.Rngs(0))
    x = jnp.zeros((replicas, images, config.input_size, config.input_size, config.in_channels))
    gate = None if name != "dit" else symmetric_gate(jnp.full(images, 0.3), replicas)
    call = jax.make_jaxpr(lambda x, t, y: model(x, t, y, gate, **({"attention": "explicit"} if name == "dit" else {})))
    traced = call(x, jnp.zeros(images), jnp.zeros(images, jnp.int32))
    assert products(traced.jaxpr) == flops(config, images, replicas)


def products(jaxpr):
    """Floating point operations of the matrix products of a program, loops counted as often as they run."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[i] for i in contracted)
        inner = [v for v in equation.params.values() if hasattr(v, "eqns") or hasattr(v, "jaxpr")]
        total += equation.params.get("length", 1) * sum(products(getattr(v, "jaxpr", v)) for v in inner)
    return total


def test_a_run_is_its_passes_times_the_arithmetic_of_one():
    study = studies.find("compare")
    network = NETWORKS["dit"]
    alone = study.config(couplings=(0.0, 1.0), pairs=8, gain_pairs=8, untrained_pairs=8, steps="10")
    twice = study.config(couplings=(0.0, 1.0), pairs=16, gain_pairs=16, untrained_pairs=16, steps="10")
    assert run_flops(study, alone, network) == sum(passes_of(study, alone, network).values()) * flops(network, 1, 2) / 2
    assert run_flops(study, twice, network) == 2 * run_flops(study, alone, network)
    assert run_flops(studies.find("modalities"), None, network) == 0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("block", [1, 2, 3, 8])
def test_the_images_of_blocks_add_up(name, block):
    study = studies.find(name)
    settings = study.config(**{**SMALL, **CASES[name], "block": block, "pairs": 7, "untrained_pairs": 5})
    network = DiTConfig(input_size=8, in_channels=3, hidden_size=24, depth=3, num_heads=2, num_classes=3)

    def passes(pairs):
        return passes_of(study, replace(settings, pairs=pairs), network)

    found, pairs = Forecast(name, passes, 7, block), {"network": 7, "edits": 7}
    for group, total in passes(7).items():
        count = pairs.get(group, 5)
        images = [found.of_block(group, first, min(first + block, count), count) for first in range(0, count, block)]
        assert sum(images) == pytest.approx(total)


def test_the_first_pairs_of_a_comparison_have_more_images():
    """The gain is measured on them alone: a block of them is no measure of the others."""
    settings = studies.find("compare").config(**SMALL, gain_pairs=2)

    def passes(pairs):
        return passes_of(studies.find("compare"), replace(settings, pairs=pairs), NETWORKS["dit"])

    found = Forecast("compare", passes, 4, 2)
    assert found.of_block("network", 0, 2, 4) == 2 * found.of_block("network", 2, 4, 4)


@pytest.fixture
def told(tmp_path, monkeypatch, capsys):
    """What a run of 6 pairs says if its first block takes so many seconds, of which so many are compilation."""

    def run(seconds, compiling, *, least=1, stored=()):
        folder = RunFolder.create(tmp_path / f"run{seconds}-{compiling}-{least}-{len(stored)}", {})
        for group in stored:
            folder.put(group, xr.Dataset())
        found = Forecast("compare", lambda pairs: {"network": 100 * pairs, "untrained": 200}, 6, 2, least)
        now = iter([0.0, 0.0 + seconds])
        monkeypatch.setattr(forecast.time, "perf_counter", lambda: next(now))
        monkeypatch.setattr(forecast, "covered", lambda spans: compiling)
        assert found.wants("network")
        found.tell_before("network", 3_000_000, folder)
        with found.telling("network", [slice(0, 2), slice(2, 4), slice(4, 6)], 6, folder):
            pass
        assert not found.wants("network")
        assert not found.wants("untrained")
        return capsys.readouterr()

    return run


def test_a_run_says_first_what_it_costs(told):
    said = told(70.0, 10.0)
    assert not said.out
    before, after = said.err.split("\n")[:2]
    assert "800 images go through the network (network 600, untrained 200)" in before
    assert "3 MB of disk" in before
    # 200 images took a minute, 600 are left
    assert "first block took 1 min 00 s, and its compilation 10 s; about 3 min 00 s more" in after
    assert "--block" not in after


def test_what_is_stored_costs_nothing(told):
    assert "about 2 min 00 s more" in told(70.0, 10.0, stored=("untrained",)).err


def test_blocks_that_take_long_should_be_smaller(told):
    assert "--block 1 loses less" in told(1100.0, 0.0).err
    assert "--block" not in told(1100.0, 600.0).err
    assert "--block" not in told(4000.0, 0.0, least=2).err  # two devices need two pairs


def test_inner_compilation_is_counted_once():
    assert covered([]) == 0
    assert covered([(1.0, 2.0), (0.0, 3.0), (5.0, 6.0), (5.5, 7.0)]) == 5


def test_compilation_is_noticed():
    with forecast.compilation() as compiling:
        assert compiling() == 0
        jax.jit(lambda x: jnp.sin(x) + 3)(jnp.ones(3))
        first = compiling()
        assert first > 0
    jax.jit(lambda x: jnp.cos(x) + 3)(jnp.ones(3))
    assert compiling() == first


@pytest.fixture
def one_group(weights, tmp_path, monkeypatch):
    """The ends of 4 pairs in blocks of 2, measured with or without a progress bar; and what the bar said."""

    def run(shows, slow=0.0):
        said = []
        monkeypatch.setattr(progress, "SLOW", slow)
        monkeypatch.setattr(bench_module.tqdm, "set_postfix_str", lambda bar, text, **_: said.append(text))
        config = StudyConfig(weights=weights, pairs=4, block=2, steps="6", guidance=2.0)
        bench = Bench(
            "spread",
            config,
            tmp_path / f"{shows}{slow}",
            progress=shows,
            passes=lambda config, network: {"network": 2 * 6 * 2 * 2 * config.pairs},
        )

        @jax.jit
        def on_network(model, pairs, labels):
            gates = jnp.array([0.0, 0.5])
            ends, _ = run_pairs(bench.coupled(model), bench.clock, gates, pairs, labels, (8, 8, 3), seed=0)
            return {"ends": jnp.moveaxis(ends, 2, 0).reshape(len(pairs), -1)}

        variables = {"ends": (("number",), "pixels")}
        coords = {"number": ("number", np.arange(2 * 2 * 192), {"long_name": "pixel", "units": "1"})}
        found = bench.measure("network", variables, coords, 4, lambda *block: on_network(bench.network, *block))
        return found.ends.values, said

    return run


def test_a_block_tells_how_far_it_is_and_measures_the_same(one_group, capsys):
    quiet, silent = one_group(False)
    shown, said = one_group(True)
    np.testing.assert_array_equal(shown, quiet)
    assert not silent
    block = [*(f"{share:.0%} of this block" for share in np.arange(1, 7) / 6), ""]
    assert said == 2 * block
    assert "images go through the network" in capsys.readouterr().err


def test_fast_calls_say_nothing(one_group):
    assert set(one_group(True, slow=1e12)[1]) == {""}


@pytest.mark.parametrize("large", [True, False])
def test_one_large_model_is_in_memory(weights, tmp_path, monkeypatch, large):
    """A large network is let go before its control is drawn, and read again, as it was, where it is asked for again. A
    small one stays."""
    if large:
        monkeypatch.setattr(bench_module, "SMALL", 0)
    bench = Bench("spread", StudyConfig(weights=weights), tmp_path / "run")

    def kernels(model):
        return np.array(model.blocks.mlp.fc1.kernel[...]), weakref.ref(model.blocks.mlp.fc1.kernel[...])

    values, network = kernels(bench.network)
    assert kernels(bench.network)[1]() is network()
    assert network() is not None
    drawn, control = kernels(bench.untrained)
    gc.collect()
    assert (network() is None) == large
    assert np.abs(drawn - values).max() > 0.01
    again, _ = kernels(bench.network)
    np.testing.assert_array_equal(again, values)
    gc.collect()
    assert (control() is None) == large
