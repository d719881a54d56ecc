"""Any number of replicas under any gate, and what survives at g = 1: docs/theory.md, sections 6.4 and 6.5."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ou_theory.attention import (
    GATE_KINDS,
    block_weights,
    common_gain,
    exact_difference,
    first_order_difference,
    first_order_response,
    gated_attention,
    rho,
    rho_n,
)
from ou_theory.gain_model import w_ode

LAW = settings(max_examples=15, deadline=None, derandomize=True)
every = pytest.mark.parametrize("kind", GATE_KINDS)
seeds = st.integers(0, 2**32 - 1)
TOKENS, DIM = 4, 3


def common_point(rng):
    """q, k, v, (T, d) each."""
    return jnp.asarray(rng.standard_normal((3, TOKENS, DIM)))


def displacements(rng, num):
    """dq, dk, dv, (R, T, d) each."""
    return jnp.asarray(rng.standard_normal((3, num, TOKENS, DIM)))


def all_to_all(g, num):
    return jnp.eye(num) + g * (1 - jnp.eye(num))


def alone(q, k, v):
    """Attention without replicas."""
    return jax.nn.softmax(q @ k.T / q.shape[-1] ** 0.5, -1) @ v


def random_gate(rng, num, scale, kind):
    """Any gate of the kind, entries up to `scale`; the off-diagonal entries of a convex one add up to at most 1."""
    gate = rng.uniform(0, scale / max(scale * (num - 1), 1) if kind == "convex" else scale, (num, num))
    gate[np.diag_indices(num)] = 1
    return gate


def slope(common, moved, gate, kind):
    """Derivative (R, T, d) of the outputs as the replicas leave the common point."""

    def outputs(size):
        return gated_attention(*(c + size * d for c, d in zip(common, moved, strict=True)), gate, kind)

    return jax.jvp(outputs, (0.0,), (1.0,))[1]


# --- first order, any gate


@every
@pytest.mark.parametrize("num", [1, 2, 3, 4, 5])
def test_response_is_the_derivative_under_any_gate(x64, num, kind):
    for seed in range(5):
        rng = np.random.default_rng([seed, num])
        common, moved = common_point(rng), displacements(rng, num)
        gate = jnp.asarray(random_gate(rng, num, 2, kind))
        got = first_order_response(*common, *moved, gate, kind)
        np.testing.assert_allclose(got.total, slope(common, moved, gate, kind), atol=1e-12)
        own = first_order_response(*common, *moved, jnp.eye(num))
        heeded = block_weights(gate, kind)
        total = heeded.sum(1)[:, None, None]
        np.testing.assert_allclose(got.query, total * own.query, atol=1e-13)  # no other replica reaches the queries
        if kind not in ("additive", "tanh"):
            np.testing.assert_allclose(total, 1, atol=1e-15)
        for part, free in ((got.routing, own.routing), (got.key, own.key)):
            np.testing.assert_allclose(part, jnp.einsum("ab,btd->atd", heeded, free), atol=1e-13)


@LAW
@given(seeds, st.sampled_from(GATE_KINDS), st.floats(0, 3))
def test_a_pair_is_two_replicas(seed, kind, g):
    g = g / 3 if kind == "convex" else g
    with jax.enable_x64(True):
        rng = np.random.default_rng(seed)
        common, (diff, *_) = common_point(rng), displacements(rng, 3).swapaxes(0, 1)
        pair = jnp.stack([diff / 2, -diff / 2], 1)
        got = first_order_response(*common, *pair, all_to_all(g, 2), kind)
        for part, expected in zip(got, first_order_difference(*common, *diff, g, kind), strict=True):
            np.testing.assert_allclose(part[0] - part[1], expected, atol=1e-13)


@every
@pytest.mark.parametrize("num", [2, 3, 5])
def test_all_to_all_difference_modes_carry_rho_n(x64, num, kind):
    """Every entry moves by amplitudes of its own, of which nothing is asked but that they add up to zero."""
    rng = np.random.default_rng(num)
    common, moved = common_point(rng), displacements(rng, num)
    moved = moved - moved.mean(1, keepdims=True)
    free = first_order_response(*common, *moved, jnp.eye(num))
    for g in (0.0, 0.1, 0.25) if kind == "convex" else (0.0, 0.25, 1.0, 2.5):
        got = slope(common, moved, all_to_all(g, num), kind)
        expected = rho_n(g, num, kind) * (free.routing + free.key) + common_gain(g, kind, num) * free.query
        np.testing.assert_allclose(got, expected, atol=1e-12)


@every
@pytest.mark.parametrize("num", [2, 3, 5])
def test_the_common_mode_feels_no_gate(x64, num, kind):
    """But for its size, where the kind is not normalised."""
    rng = np.random.default_rng(num)
    common, moved = common_point(rng), displacements(rng, 1)
    together = jnp.broadcast_to(moved, (3, num, TOKENS, DIM))
    gate = jnp.asarray(random_gate(rng, num, 2, kind))
    expected = jax.jvp(alone, tuple(common), tuple(moved[:, 0]))[1]
    got = slope(common, together, gate, kind)
    total = block_weights(gate, kind).sum(1)[:, None, None]
    np.testing.assert_allclose(got, total * expected, atol=1e-12)


@LAW
@given(st.floats(0.01, 0.98), st.integers(2, 20))
def test_rho_n_laws(g, num):
    assert rho_n(0.0, num) == 1
    assert rho_n(1.0, num) == 0
    assert rho_n(g + 0.01, num) < rho_n(g, num)
    assert rho_n(g, num + 1) < rho_n(g, num)
    assert rho_n(g, 2) == pytest.approx(rho(g))
    # many replicas: (1 - g) / g N, from below
    assert 0 <= 1 - rho_n(g, num) * g * num / (1 - g) <= 1 / (g * num)


def test_rho_n_reference():
    assert rho_n(0.25, 5) == pytest.approx(0.375, rel=1e-12)


# --- g = 1


@pytest.mark.parametrize("kind", ["joint", "blend"])
def test_the_query_term_is_the_first_order_at_unit_gate(x64, kind):
    rng = np.random.default_rng(0)
    common, (diff, *_) = common_point(rng), displacements(rng, 2).swapaxes(0, 1)
    remainders = []
    for size in (0.04, 0.02):
        pair = jnp.stack([common + size * diff / 2, common - size * diff / 2], 1)
        query = first_order_difference(*common, *(size * diff), 1.0).query
        assert jnp.abs(query).max() > 0.1 * size
        out = gated_attention(*pair, all_to_all(1.0, 2), kind)
        remainders.append(float(jnp.abs(out[0] - out[1] - query).max()))
    assert np.log2(remainders[0] / remainders[1]) == pytest.approx(3, abs=0.05)


@pytest.mark.parametrize("kind", ["joint", "blend", "additive"])
def test_shared_queries_leave_no_difference_at_unit_gate(x64, kind):
    """To all orders, for any number of replicas; and the key share of a pair is nil whatever the queries."""
    for num in (2, 4):
        rng = np.random.default_rng(num)
        q, k, v = displacements(rng, num)
        shared = jnp.broadcast_to(q.mean(0), q.shape)
        out = gated_attention(shared, k, v, jnp.ones((num, num)), kind)
        np.testing.assert_allclose(out, jnp.broadcast_to(out[0], out.shape), atol=1e-15)
        for other in (
            gated_attention(q, k, v, jnp.ones((num, num)), kind),  # queries of their own
            gated_attention(shared, k, v, all_to_all(0.9, num), kind),  # or another gate
        ):
            assert jnp.abs(other - other[0]).max() > 1e-2
    np.testing.assert_allclose(exact_difference(q[:2], k[:2], v[:2], 1.0, kind).key, 0, atol=1e-15)


class Block(NamedTuple):
    """A residual block: one head of gated attention, then an MLP per replica."""

    inputs: jax.Array  # (3, d, d) of queries, keys, values
    out: jax.Array  # (d, d)
    up: jax.Array  # (d, 4 d)
    down: jax.Array  # (4 d, d)

    def __call__(self, x, gate, kind):
        """x (R, T, d) -> (R, T, d)."""
        x = x + gated_attention(*(x @ w for w in self.inputs), gate, kind) @ self.out
        return x + jax.nn.gelu(x @ self.up) @ self.down


def random_block(seed, dim=8):
    rng = np.random.default_rng(seed)
    shapes = (3, dim, dim), (dim, dim), (dim, 4 * dim), (4 * dim, dim)
    return Block(*(jnp.asarray(rng.standard_normal(s) / s[-2] ** 0.5) for s in shapes))


@pytest.mark.parametrize("kind", ["joint", "blend", "convex"])
def test_equal_replicas_stay_equal_and_run_uncoupled(x64, kind):
    rng, blocks = np.random.default_rng(3), [random_block(seed) for seed in range(3)]
    for num, scale in ((2, 1.0), (4, 5.0)):
        start = jnp.asarray(rng.standard_normal((6, 8)))
        gate = jnp.asarray(random_gate(rng, num, scale, kind))
        together, single = jnp.broadcast_to(start, (num, 6, 8)), start[None]
        for block in blocks:
            together, single = block(together, gate, kind), block(single, jnp.ones((1, 1)), kind)
        np.testing.assert_allclose(together, jnp.broadcast_to(single, together.shape), rtol=1e-11)


@pytest.mark.parametrize("kind", ["joint", "blend"])
def test_a_residual_block_amplifies_differences_at_unit_gate(x64, kind):
    """The gain of a difference at the synchronised point, root mean square over all directions: for each of these
    blocks above 1 at any gate, as the stream passes with gain 1, and less at g = 1 than without coupling."""

    @jax.jit
    def gain(block, x, g):
        def difference(delta):
            out = block(jnp.stack([x + delta / 2, x - delta / 2]), all_to_all(g, 2), kind)
            return out[0] - out[1]

        return jnp.sqrt((jax.jacfwd(difference)(jnp.zeros_like(x)) ** 2).sum() / x.size)

    gains = []
    for seed in range(20):
        x = jnp.asarray(np.random.default_rng([seed, 1]).standard_normal((6, 8)))
        free, half, locked = (float(gain(random_block(seed), x, g)) for g in (0.0, 0.5, 1.0))
        assert half > 1
        assert free > locked > 1
        gains.append((free, locked))
    np.testing.assert_allclose(np.mean(gains, 0), [1.5, 1.3], atol=0.05)  # what section 6.4 quotes


@pytest.mark.parametrize(("gain", "left"), [(0.99, 0.927), (0.95, 0.738), (0.9, 0.579), (0.8, 0.373), (0.5, 0.096)])
def test_any_constant_gain_below_one_contracts(gain, left):
    """What is ever decided individually where the whole network passes differences with a constant gain."""
    assert float(w_ode(gain)) == pytest.approx(left, abs=5e-4)
