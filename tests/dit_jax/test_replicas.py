"""Ensembles of pairs: keys, batching, and the grid of couplings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import random_model

from dit_jax.config import DiTConfig
from dit_jax.diffusion import network_denoiser
from dit_jax.replicas import INITIAL, pair_labels, pair_noise, run_pairs
from ou_theory.clock import make_clock

CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=32, depth=2, num_heads=2, num_classes=4)
SHAPE = (8, 8, 3)
CLOCK = make_clock(6)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, 0.15)


@pytest.fixture(scope="module")
def run(model):
    jitted = jax.jit(
        lambda model, couplings, pairs, labels, sampler: run_pairs(
            lambda gate: network_denoiser(model, CLOCK, gate),
            CLOCK,
            couplings,
            pairs,
            labels,
            SHAPE,
            seed=3,
            sampler=sampler,
            observe=lambda step, x, denoised: denoised.mean(),
        ),
        static_argnums=4,
    )

    def run(couplings, pairs, sampler="ddim"):
        pairs = np.asarray(pairs)
        return jitted(model, jnp.asarray(couplings, jnp.float32), pairs, pair_labels(pairs, range(4)), sampler)

    run.compilations = jitted._cache_size
    return run


def test_noise_is_a_function_of_pair_step_and_replica_alone():
    together = pair_noise(0, jnp.array([4, 9, 2]), 5, SHAPE, replicas=3)
    alone = pair_noise(0, jnp.array([9]), 5, SHAPE, replicas=2)
    np.testing.assert_array_equal(together[:2, 1], alone[:, 0])


def test_noises_are_independent_unit_normals():
    start = pair_noise(0, jnp.arange(200), INITIAL, SHAPE)
    later = pair_noise(0, jnp.arange(200), 0, SHAPE)
    streams = np.stack([start[0], start[1], later[0], later[1], np.roll(start[0], 1, 0)]).reshape(5, -1)
    correlation = np.corrcoef(streams)
    size = streams.shape[1]
    assert np.abs(correlation - np.eye(5)).max() < 4.5 / np.sqrt(size)
    assert abs(streams.var() - 1) < 4.5 * np.sqrt(2 / streams.size)


def test_another_seed_is_another_ensemble():
    assert not np.array_equal(pair_noise(0, jnp.arange(2), 0, SHAPE), pair_noise(1, jnp.arange(2), 0, SHAPE))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
def test_results_do_not_depend_on_the_batch(run, sampler):
    """Within 1e-6 of the largest value: matrix products of another shape may round differently."""
    whole, _ = run([0.0, 0.4], range(6), sampler)
    part, _ = run([0.0, 0.4], [2, 3, 4], sampler)
    np.testing.assert_allclose(part, whole[:, :, 2:5], atol=1e-6 * np.abs(whole).max(), rtol=0)


def test_couplings_are_traced_and_share_their_noise(run):
    first, _ = run([0.0, 0.4], range(6))
    before = run.compilations()
    second, _ = run([0.0, 0.8], range(6))
    assert run.compilations() == before
    np.testing.assert_array_equal(first[:, 0], second[:, 0])
    assert np.abs(first[:, 1] - second[:, 1]).max() > 1e-3


def test_zero_coupling_is_the_uncoupled_network(run, model):
    coupled, _ = run([0.0, 0.4], range(6))
    free, _ = jax.jit(
        lambda model: run_pairs(
            lambda gate: network_denoiser(model, CLOCK),
            CLOCK,
            jnp.zeros(2),
            jnp.arange(6),
            pair_labels(np.arange(6), range(4)),
            SHAPE,
            seed=3,
        )
    )(model)
    np.testing.assert_allclose(coupled[:, 0], free[:, 0], atol=1e-6 * np.abs(free).max(), rtol=0)


def test_observations_are_stacked_over_steps(run):
    _, kept = run([0.0, 0.4], range(6))
    assert kept.shape == (len(CLOCK),)


def test_labels_follow_the_pair_index():
    np.testing.assert_array_equal(pair_labels(np.array([0, 1, 5, 12]), [3, 7, 8]), [3, 7, 8, 3])
