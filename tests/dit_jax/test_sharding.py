"""Ensembles on several devices give what one device gives, and really are split."""

import itertools
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from models import random_model
from processes import TIMEOUT, free_port, run_together

from dit_jax.checkpoint import load_model, save_model
from dit_jax.config import DiTConfig
from dit_jax.sharding import _split_axis, gather, make_mesh, place_model

SCRIPT = Path(__file__).with_name("sharded_run.py")
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "devices.py"
CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4)


@pytest.fixture(scope="module")
def single(tmp_path_factory):
    """One process: both samplers on one of its devices, and all ways to use eight."""
    out = tmp_path_factory.mktemp("single") / "out.npz"
    samplers, layouts = ("ddim", "ancestral"), ("1 replicated", "8 replicated", "8 sharded")
    cases = ",".join(f"{layout} {sampler}" for layout in layouts for sampler in samplers)
    run_together([[str(SCRIPT), str(out), cases]], devices=8)
    return dict(np.load(out))


def assert_close(found, expected):
    """To the rounding of some steps: a product sums in another order where a device has fewer rows of it, by how much
    depends on the processor (up to 1.2e-6 seen). A pair at the wrong place or with other noise differs by 0.1 and more.
    """
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("parameters", ["replicated", "sharded"])
def test_eight_devices_give_what_one_gives(single, parameters, sampler):
    one, eight = f"1 replicated {sampler}", f"8 {parameters} {sampler}"
    for name in ("samples", "means"):
        assert_close(single[f"{eight}/{name}"], single[f"{one}/{name}"])
    samples = single[f"{one}/samples"]
    scale = np.abs(samples).max()
    assert np.abs(samples[:, 0] - samples[:, 2]).max() > 1e-2 * scale  # the coupling acts
    assert np.abs(samples[:, :, :-1] - samples[:, :, 1:]).max((0, 1, 3, 4, 5)).min() > 1e-2 * scale  # pairs differ


@pytest.mark.long
@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("parameters", ["replicated", "sharded"])
def test_samples_and_work_are_split(single, parameters, sampler):
    case = f"8 {parameters} {sampler}"
    np.testing.assert_array_equal(single[f"{case}/sample_shards"], [[2, 3, 1, 8, 8, 3]] * 8)
    assert single[f"{case}/all_reduces"] == 0  # parameters may be gathered, products are never summed across devices
    assert single[f"{case}/flops"] < 0.15 * single[f"1 replicated {sampler}/flops"]


@pytest.mark.long
def test_large_parameters_are_split_and_small_ones_whole(single):
    kernels = 5  # qkv, two of the MLP and the modulation of the blocks, and the first of the timestep
    np.testing.assert_array_equal(single["8 sharded ddim/part_if_split"], [1 / 8] * kernels)
    assert np.all(single["8 sharded ddim/part_if_whole"] == 1)
    assert single["8 replicated ddim/part_if_split"].size == 0


@pytest.mark.long
def test_two_processes_give_what_one_gives(single, tmp_path):
    cases = ("4 replicated ddim", "4 sharded ancestral")
    address = f"127.0.0.1:{free_port()}"
    outs = [tmp_path / f"{i}.npz" for i in range(2)]
    run_together(
        [[str(SCRIPT), str(out), ",".join(cases), address, "2", str(i)] for i, out in enumerate(outs)], devices=2
    )
    for out, case in itertools.product(outs, cases):
        found = np.load(out)
        for name in ("samples", "means"):
            assert_close(found[f"{case}/{name}"], single[f"1 replicated {case.split()[-1]}/{name}"])
        np.testing.assert_array_equal(found[f"{case}/sample_shards"], [[2, 3, 2, 8, 8, 3]] * 2)  # of this process
        parts = found[f"{case}/part_if_split"]
        assert np.all(parts == 1 / 4)
        assert (parts.size > 0) == ("sharded" in case)


@pytest.mark.slow
def test_a_failing_process_ends_the_other_and_is_shown(tmp_path):
    """The harness of these tests: a run that is broken is reported, and does not wait for what never comes."""
    started = time.monotonic()
    with pytest.raises(pytest.fail.Exception, match="deliberate"):
        run_together([["-c", "import time; time.sleep(600)"], ["-c", "raise SystemExit('deliberate')"]], devices=1)
    assert time.monotonic() - started < TIMEOUT / 2


@pytest.mark.long
def test_benchmark_prints_a_line_per_device_count():
    """Two pairs do not divide among four devices, so that one and two are left."""
    command = [str(BENCHMARK), "--size", "tiny", "--pairs", "2", "--steps", "2", "--parameters", "sharded"]
    (out,) = run_together([command], devices=1)
    assert "share the same" in out
    rows = [line.split() for line in out.splitlines() if line.split()[:1] in (["1"], ["2"])]
    assert [row[0] for row in rows] == ["1", "2"]
    assert float(rows[0][1]) > 0
    assert rows[0][2] == "1.00"


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, 0.15)


@pytest.mark.parametrize(
    ("shape", "stacked", "axis"),
    [
        ((256, 1152), False, 1),  # the largest
        ((1001, 1152), False, 1),  # the largest that divides
        ((1152, 1001), False, 0),
        ((1152, 384, 768), True, 2),  # not the layers, however many
        ((24, 1001, 33), True, 0),  # but for want of another
        ((1001, 999), False, None),
        ((8, 511), False, None),  # small
        ((8, 512), False, 1),
    ],
)
def test_axis_of_a_parameter_on_eight_devices(shape, stacked, axis):
    assert _split_axis(shape, 8, stacked) == axis


def test_a_sharded_model_reads_and_saves_as_the_model_it_was(model, tmp_path):
    placed = place_model(model, make_mesh(jax.devices()[:1]), "sharded")
    save_model(placed, tmp_path / "model")
    for found, expected in zip(jax.tree.leaves(load_model(tmp_path / "model")), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_a_sharded_model_can_be_placed_again(model):
    mesh = make_mesh(jax.devices()[:1])
    back = place_model(place_model(model, mesh, "sharded"), mesh, "replicated")
    assert jax.tree.structure(back) == jax.tree.structure(model)
    for found, expected in zip(jax.tree.leaves(back), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_gather_takes_any_tree():
    tree = gather({"a": jax.numpy.arange(3), "b": [np.ones(2), 1.5]})
    np.testing.assert_array_equal(tree["a"], [0, 1, 2])
    assert isinstance(tree["a"], np.ndarray)
    assert tree["b"][1] == 1.5


def test_unknown_layout_of_parameters(model):
    unknown: Any = "split"
    with pytest.raises(ValueError, match=r"parameters 'split' is not one of replicated, sharded"):
        place_model(model, make_mesh(jax.devices()[:1]), unknown)


@pytest.mark.slow
def test_pairs_that_do_not_divide():
    code = """
import numpy as np
from dit_jax.sharding import make_mesh, place_pairs
try:
    place_pairs(make_mesh(), np.arange(8), np.zeros(6))
except ValueError as error:
    print(error)
"""
    (out,) = run_together([["-c", code]], devices=4)
    assert out.startswith("6 pairs cannot be split evenly over 4 devices: take a multiple of 4 pairs")


@pytest.mark.slow
def test_nothing_is_sent_between_devices_on_any_path():
    """Fused attention and both halves of guidance stay where their pair is."""
    code = f"""
import sys
sys.path.insert(0, {str(SCRIPT.parent)!r})
import jax, jax.numpy as jnp
from dit_jax.attention import symmetric_gate
from dit_jax.diffusion import guided_output
from dit_jax.sharding import make_mesh, place_model, split
from sharded_run import CONFIG, random_model
mesh = make_mesh()
model = place_model(random_model(CONFIG, 0.15), mesh)
inputs = jnp.ones((2, 8, 8, 8, 3)), jnp.ones(8), jnp.ones(8, int), symmetric_gate(jnp.full(8, 0.3))
def sent(call):
    def on_mesh(model, x, t, y, gate):
        x, gate, t, y = split(mesh, x, -4), split(mesh, gate, -3), split(mesh, t, 0), split(mesh, y, 0)
        return split(mesh, call(model, x, t, y, gate), -4)
    program = jax.jit(on_mesh).lower(model, *inputs).compile().as_text()
    names = "all-gather", "all-to-all", "all-reduce", "collective-permute"
    return [name for name in names if f" {{name}}" in program]
print("free", sent(lambda model, x, t, y, gate: model(x, t, y, attention="fused")))
for kind in ("joint", "blend", "additive"):
    print(kind, sent(lambda model, *args: model(*args, kind=kind, attention="fused")))
for halves in ("both", "conditional"):
    print(halves, sent(lambda model, *args: guided_output(model, *args, scale=2.0, guided_coupling=halves)))
"""
    (out,) = run_together([["-c", code]], devices=4)
    assert out.splitlines() == [f"{name} []" for name in ("free", "joint", "blend", "additive", "both", "conditional")]
