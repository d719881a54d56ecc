"""Streams of random numbers by name: no key of a pair or a purpose is drawn twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dit_jax.config import DiTConfig
from dit_jax.model import DiT
from dit_jax.replicas import INITIAL, pair_noise
from experiments.frame.streams import FIRST, PURPOSES, numpy_stream, stream
from experiments.frame.subject import untrained_model
from experiments.studies.modalities.clone_reading import Draws

SEEDS, PAIRS, STEPS, INDICES = 20, 6, 5, 6


PAIR, STEP, REPLICA = (
    jnp.asarray(each.ravel())
    for each in np.meshgrid(np.arange(PAIRS), np.arange(INITIAL, STEPS), np.arange(2), indexing="ij")
)


@jax.jit
def keys_of(root: jax.Array) -> jax.Array:
    """Keys (pair * step * replica, 2) that `pair_noise` draws with."""
    fold = jax.random.fold_in

    def key(pair, step, replica):
        return jax.random.key_data(fold(fold(fold(root, pair), step + 1), replica))

    return jax.vmap(key)(PAIR, STEP, REPLICA)


def every_key() -> dict[tuple, jax.Array]:
    """Of the seeds 0..19: the trajectories, every purpose, and every purpose with an index."""
    found = {}
    for seed in range(SEEDS):
        found["trajectories", seed] = keys_of(jax.random.key(seed))
        for purpose in PURPOSES:
            found[purpose, seed] = keys_of(stream(seed, purpose))
            for index in range(INDICES):
                found[purpose, seed, index] = keys_of(stream(seed, purpose, index))
    return found


def test_no_key_is_drawn_twice():
    found = every_key()
    everything = np.concatenate(jax.device_get([*found.values()]))
    assert len(everything) == SEEDS * (1 + len(PURPOSES) * (1 + INDICES)) * PAIRS * (STEPS + 1) * 2
    assert len(np.unique(everything, axis=0)) == len(everything)


def test_noise_is_that_of_its_key_and_of_no_seed():
    """Under seeds that were added up, clones of one seed had the noise of another one's trajectories."""
    pairs, shape = np.arange(3), (4,)
    clones = np.asarray(pair_noise(stream(0, "clones", 2), pairs, 1, shape))
    for seed in range(SEEDS):
        assert not np.isclose(clones, np.asarray(pair_noise(seed, pairs, 1, shape))).any()
    np.testing.assert_array_equal(clones, pair_noise(stream(0, "clones", 2), pairs, 1, shape))
    np.testing.assert_array_equal(pair_noise(7, pairs, 1, shape), pair_noise(jax.random.key(7), pairs, 1, shape))


def test_the_untrained_network_has_random_numbers_of_its_own():
    """Its weights were once drawn from the keys that the noise of the pairs is folded from."""
    config = DiTConfig(input_size=4, in_channels=1, hidden_size=8, depth=1, num_heads=1, num_classes=2)
    weights, other = (jax.tree.leaves(nnx.state(untrained_model(config, seed), nnx.Param)) for seed in (0, 1))
    initial = jax.tree.leaves(nnx.state(DiT(config, nnx.Rngs(0)), nnx.Param))
    drawn = [i for i, leaf in enumerate(weights) if np.ptp(leaf) > 0]
    assert len(drawn) > 10
    for i in drawn:
        noise = jax.random.normal(jax.random.fold_in(jax.random.key(0), i), weights[i].shape)
        for known in (noise, initial[i], other[i]):
            if np.ptp(known) > 0:
                assert abs(np.corrcoef(np.ravel(weights[i]), np.ravel(known))[0, 1]) < 0.9


def test_a_stream_may_be_traced_and_has_a_known_purpose():
    inside = jax.jit(lambda seed, branch: jax.random.key_data(stream(seed, "clones", branch)))(3, 4)
    np.testing.assert_array_equal(inside, jax.random.key_data(stream(3, "clones", 4)))
    with pytest.raises(ValueError, match="'clone' is not one of"):
        stream(0, "clone")
    assert len(set(PURPOSES.values())) == len(PURPOSES)
    assert max(PURPOSES.values()) < 2**32 - FIRST


def test_numpy_streams_differ_by_seed_and_purpose():
    first = {(seed, p): numpy_stream(seed, p).integers(2**63) for seed in range(SEEDS) for p in PURPOSES}
    assert len(set(first.values())) == len(first)
    assert numpy_stream(1, "clones").integers(2**63) == first[1, "clones"]


def test_seeds_of_the_points_of_two_modalities_do_not_meet():
    """They are of 32 bits, so that this holds for these seeds and parts, not for all."""
    drawn = [Draws(seed, part)() for seed in range(SEEDS) for part in range(22)]
    assert len(np.unique(np.concatenate(drawn))) == 3 * len(drawn)
