"""The bootstrap: the same numbers in chunks, and bounded memory."""

import tracemalloc

import numpy as np
import pytest

from experiments.frame import draws
from experiments.frame.draws import bootstrap, both, mean_and_draws, packed, pair_draws, resampled_mean


def spread(mean, other):
    return {"ratio": mean[:, 0] / other, "largest": mean.max(1)}


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return rng.random((12, 5)) + 1, rng.random(12) + 1


@pytest.mark.parametrize("ceiling", [1, 3000, draws.CEILING])
def test_chunks_of_draws_are_the_draws(values, ceiling):
    weights = pair_draws(3, 12, 50)
    point, drawn = bootstrap(spread, values, weights, ceiling=ceiling)
    mean, other = (resampled_mean(each, weights) for each in values)
    np.testing.assert_allclose(drawn["ratio"], mean[:, 0] / other)
    np.testing.assert_allclose(drawn["largest"], mean.max(1))
    assert point["ratio"] == pytest.approx(values[0][:, 0].mean() / values[1].mean())
    assert both((point, drawn))["largest"].shape == (51,)


def test_how_many_go_at_once_follows_from_the_ceiling(values):
    sizes = []

    def seen(mean):
        sizes.append(len(mean))
        return {"mean": mean.mean(1)}

    each = 5 * 8 * draws.WORKING
    bootstrap(seen, values[0], pair_draws(0, 12, 50), ceiling=20 * each)
    assert sizes == [1, 17, 17, 16]  # the estimate, then the draws, in parts of even size and at most 20
    sizes.clear()
    bootstrap(seen, values[0], pair_draws(0, 12, 50), numbers=50, ceiling=20 * each)
    assert sizes == [1, *[2] * 25]


def test_memory_has_a_ceiling_and_does_not_grow_with_the_draws():
    values = np.ones((4, 200, 50, 7), np.float32)  # 200 couplings, 50 steps: 0.56 MB for a draw, 0.56 GB for all
    weights = pair_draws(0, 4)
    tracemalloc.start()
    bootstrap(lambda mean: {"gap": np.sqrt(mean).sum((1, 2, 3))}, values, weights, ceiling=2**26)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2**26


def test_interval_of_what_is_packed_is_that_of_its_rows(values):
    found = packed(mean_and_draws(values[0], pair_draws(1, 12)))
    assert found.shape == (5, 3)
    np.testing.assert_allclose(found[:, 0], values[0].mean(0))
    assert np.all((found[:, 1] < found[:, 0]) & (found[:, 0] < found[:, 2]))
