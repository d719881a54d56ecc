"""A seed stands for the same random numbers whatever JAX is set to, or it is an error."""

import ast
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dit_jax.config import DiTConfig
from dit_jax.replicas import pair_noise
from experiments.frame.streams import numpy_stream, stream
from experiments.frame.subject import untrained_model
from ou_theory.ensembles import path_keys
from ou_theory.keys import GENERATOR, random_key

ROOT = Path(__file__).parents[2]
PACKAGES = ("ou_theory", "dit_jax", "experiments", "benchmarks")
CONFIG = DiTConfig(input_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=2, num_classes=2)


def drawn() -> list[np.ndarray]:
    """Numbers of every way in which the packages make keys."""
    keys = [stream(3, "clones", 5), path_keys(3, np.arange(2), 1)[1]]
    weights = jax.tree.leaves(nnx.state(untrained_model(CONFIG, 3)))
    numbers = [pair_noise(3, np.arange(2), -1, (4,)), *(jax.random.normal(key, (4,)) for key in keys), *weights]
    return [*map(np.asarray, numbers), numpy_stream(3, "shuffles").normal(size=3)]


def test_a_seed_has_the_numbers_that_it_always_had():
    found = jax.random.normal(random_key(0), (4,))
    np.testing.assert_allclose(found, [1.6226422, 2.0252647, -0.43359444, -0.07861735], rtol=1e-6)
    assert random_key(7) == jax.random.key(7, impl="threefry2x32")
    here = {name: jax.tree.leaves(nnx.state(nnx.Linear(3, 4, rngs=nnx.Rngs(seed)))) for name, seed in
            {"number": 7, "key": random_key(7)}.items()}  # fmt: skip
    assert all(map(np.array_equal, here["number"], here["key"]))


def test_another_default_generator_changes_nothing():
    before = drawn()
    with jax.default_prng_impl("rbg"):
        assert jax.random.key_impl(jax.random.key(0)) != GENERATOR  # it would
        for ours, other in zip(before, drawn(), strict=True):
            np.testing.assert_array_equal(ours, other)


def test_settings_under_which_a_seed_means_other_numbers_are_refused():
    with jax.threefry_partitionable(False), pytest.raises(ValueError, match="JAX_THREEFRY_PARTITIONABLE is set to"):
        random_key(0)
    jax.config.update("jax_random_seed_offset", 3)
    try:
        with pytest.raises(ValueError, match=r"JAX_RANDOM_SEED_OFFSET is set to 3.*leave it at 0"):
            random_key(0)
    finally:
        jax.config.update("jax_random_seed_offset", 0)


OURS = ("nnx.Rngs(random_key(", "nnx.Rngs(stream(")  # `experiments.frame.streams` folds keys of `random_key`


def without_generator(tree: ast.AST) -> list[str]:
    """Calls that make keys of whatever generator JAX is set to."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    named = {id(call): ast.unparse(call.func) for call in calls}
    found = [ast.unparse(c) for c in calls if named[id(c)] in ("jax.random.key", "random.key", "jax.random.PRNGKey")]
    for call in calls:
        if named[id(call)] in ("nnx.Rngs", "Rngs") and not ast.unparse(call).startswith(OURS):
            found.append(ast.unparse(call))
    return found


def test_every_key_names_its_generator():
    files = [path for package in PACKAGES for path in (ROOT / package).rglob("*.py")]
    found = {path.relative_to(ROOT).as_posix(): without_generator(ast.parse(path.read_text())) for path in files}
    assert {name: calls for name, calls in found.items() if calls} == {
        "ou_theory/keys.py": ["jax.random.key(seed, impl=GENERATOR)"],
        "dit_jax/checkpoint.py": ["nnx.Rngs(0)"],  # for shapes; nothing is drawn
    }


def test_the_check_finds():
    assert len(without_generator(ast.parse("jax.random.key(0); nnx.Rngs(seed); nnx.Rngs(random_key(1))"))) == 2
