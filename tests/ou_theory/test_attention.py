"""What a gate does to a difference: docs/theory.md, section 6."""

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
    coupling_at,
    exact_difference,
    first_order_difference,
    gated_attention,
    gated_weights,
    pair_weights,
    rho,
    xi,
)

LAW = settings(max_examples=25, deadline=None, derandomize=True)
every = pytest.mark.parametrize("kind", GATE_KINDS)
couplings = st.sampled_from(GATE_KINDS).flatmap(  # a kind and a coupling that it takes
    lambda kind: st.tuples(st.just(kind), st.floats(0.01, 1 if kind == "convex" else 3))
)
seeds = st.integers(0, 2**32 - 1)

X = np.array([[1, 0.5], [-0.3, 0.8], [0.2, -1]])
DELTA = np.array([[0.4, -0.2], [0.1, 0.3], [-0.5, 0.6]])
PROJECTIONS = [
    np.array([[0.9, -0.4], [0.2, 1.1]]),
    np.array([[1, 0.3], [-0.5, 0.7]]),
    np.array([[0.6, 0.1], [-0.2, 1.2]]),
]


def reference_pair():
    """q, k, v, (2, 3, 2) each, of the reference case; x64."""
    pair = np.stack([X + DELTA / 2, X - DELTA / 2])
    return tuple(jnp.asarray(pair @ w) for w in PROJECTIONS)


def random_pair(seed, tokens=4, dim=3):
    return tuple(jnp.asarray(z) for z in np.random.default_rng(seed).standard_normal((3, 2, tokens, dim)))


def output(q, k, v, g, kind):
    """(2, T, d) outputs of the pair."""
    return jnp.einsum("aqbk,bkd->aqd", pair_weights(q, k, g, kind), v)


def split(pair):
    """Common point and differences of q, k, v."""
    return [z.mean(0) for z in pair], [z[0] - z[1] for z in pair]


# --- gains


@LAW
@given(st.floats(0, 1))
def test_rho_is_its_own_inverse_and_bounds_xi(g):
    assert rho(rho(g)) == pytest.approx(g, abs=1e-15)
    assert xi(g) + g * xi(g) == pytest.approx(1)
    assert rho(g) <= xi(g) <= 1


@LAW
@given(st.floats(0.01, 1), st.sampled_from(GATE_KINDS))
def test_couplings_of_equal_gain(gain, kind):
    with jax.enable_x64(True):
        g = coupling_at(gain, kind)
        assert float(rho(g, kind)) == pytest.approx(gain, abs=1e-12)
        assert g >= 0
        own, cross = block_weights(jnp.array([[1, g], [g, 1]]), kind)[0]
        assert float(own - cross) == pytest.approx(gain, abs=1e-12)
        assert float(own + cross) == pytest.approx(float(common_gain(g, kind)), abs=1e-12)


# --- weights


@every
def test_weights_are_a_distribution(kind):
    """Or, where the kind is not normalised, have the common gain for a sum."""
    q, k, _ = random_pair(0)
    weights = pair_weights(q, k, 0.3, kind)
    assert weights.shape == (2, 4, 2, 4)
    assert np.all(weights > 0)
    np.testing.assert_allclose(weights.sum((2, 3)), common_gain(0.3, kind), rtol=1e-5)


@every
def test_identical_replicas_ignore_the_coupling(x64, kind):
    pair = tuple(jnp.stack([z[0], z[0]]) for z in random_pair(1))
    alone = jax.nn.softmax(pair[0][0] @ pair[1][0].T / 3**0.5, -1) @ pair[2][0]
    for g in (1e-6, 0.3, 1.0) if kind == "convex" else (1e-6, 0.3, 1.0, 4.0):
        expected = common_gain(g, kind) * jnp.stack([alone, alone])
        np.testing.assert_allclose(output(*pair, g, kind), expected, atol=1e-14)


def test_inverse_gate_exchanges_own_and_cross_keys(x64):
    q, k, v = random_pair(2)
    for g in (0.1, 0.7, 2.0):
        exchanged = jnp.einsum("aqbk,bkd->aqd", pair_weights(q, k[::-1], 1 / g, "joint"), v[::-1])
        np.testing.assert_allclose(exchanged, output(q, k, v, g, "joint"), atol=1e-14)


@every
def test_token_permutations_commute(x64, kind):
    q, k, v = random_pair(3)
    order = np.array([2, 0, 3, 1])

    def permuted(z):  # replica A only
        return z.at[0].set(z[0, order])

    got = output(permuted(q), permuted(k), permuted(v), 0.4, kind)
    np.testing.assert_allclose(got, permuted(output(q, k, v, 0.4, kind)), atol=1e-14)


# --- first order


def test_first_order_reference(x64):
    common, diff = split(reference_pair())
    got = first_order_difference(*common, *diff, 0.3).total
    np.testing.assert_allclose(got[0], [0.02903699262, 0.1173774051], rtol=1e-8)


@LAW
@given(seeds, couplings)
def test_first_order_is_the_derivative(seed, coupling):
    kind, g = coupling
    with jax.enable_x64(True):
        common, diff = split(random_pair(seed))

        def moved(size):
            pair = [jnp.stack([c + size * d / 2, c - size * d / 2]) for c, d in zip(common, diff, strict=True)]
            out = output(*pair, g, kind)
            return out[0] - out[1]

        expected = jax.jvp(moved, (0.0,), (1.0,))[1]
        np.testing.assert_allclose(first_order_difference(*common, *diff, g, kind).total, expected, atol=1e-10)


def test_first_order_parts_carry_their_gains(x64):
    common, diff = split(random_pair(5))
    free, gated, locked = (first_order_difference(*common, *diff, g) for g in (0.0, 0.3, 1.0))
    np.testing.assert_allclose(gated.routing, rho(0.3) * free.routing, atol=1e-15)
    np.testing.assert_allclose(gated.key, rho(0.3) * free.key, atol=1e-15)
    np.testing.assert_array_equal(gated.query, free.query)
    assert np.all(locked.routing == 0)
    assert np.all(locked.key == 0)
    assert np.abs(locked.total).max() > 0.01  # g = 1 does not annihilate the difference


@every
def test_remainder_is_third_order(x64, kind):
    common, diff = split(random_pair(6))
    remainders = []
    for size in (0.04, 0.02):
        small = [size * d for d in diff]
        pair = [jnp.stack([c + d / 2, c - d / 2]) for c, d in zip(common, small, strict=True)]
        first = first_order_difference(*common, *small, 0.37, kind)
        exact = exact_difference(*pair, 0.37, kind)
        parts = [jnp.abs(a - b).max() for a, b in zip(exact, first, strict=True)]
        remainders.append([float(p) for p in (*parts, jnp.abs(exact.total - first.total).max())])
    slopes = np.log2(np.array(remainders[0]) / remainders[1])
    np.testing.assert_allclose(slopes, 3, atol=0.05)


# --- to all orders


def test_exact_reference(x64):
    got = exact_difference(*reference_pair(), 0.3, "joint").total
    np.testing.assert_allclose(got[1], [0.03634689456, 0.1134065069], rtol=1e-8)


@LAW
@given(seeds, couplings)
def test_exact_parts_add_up(seed, coupling):
    kind, g = coupling
    with jax.enable_x64(True):
        pair = random_pair(seed)
        out = output(*pair, g, kind)
        np.testing.assert_allclose(exact_difference(*pair, g, kind).total, out[0] - out[1], atol=1e-13)


@LAW
@given(seeds, couplings)
def test_exact_parts_are_odd_and_ignore_constants(seed, coupling):
    kind, g = coupling
    with jax.enable_x64(True):
        q, k, v = random_pair(seed)
        parts = exact_difference(q, k, v, g, kind)
        swapped = exact_difference(q[::-1], k[::-1], v[::-1], g, kind)
        shifted = exact_difference(q, k, v + 7.0, g, kind)  # rows of the pattern difference sum to 0
        for a, b, c in zip(parts, swapped, shifted, strict=True):
            np.testing.assert_allclose(a, -b, atol=1e-13)
            np.testing.assert_allclose(a, c, atol=1e-13)


@every
def test_key_part_vanishes_where_rho_does(x64, kind):
    """At g = 1, but for convex gates at 1/2, and under tanh in the limit."""
    pair = random_pair(8)
    assert np.abs(exact_difference(*pair, 0.3, kind).key).max() > 1e-3
    locked = exact_difference(*pair, min(float(coupling_at(0.0, kind)), 30.0), kind)
    np.testing.assert_allclose(locked.key, 0, atol=1e-15)
    assert np.abs(locked.query).max() > 1e-2


@every
def test_parts_belong_to_their_causes(x64, kind):
    q, k, v = random_pair(9)

    def same(z):
        return jnp.stack([z.mean(0)] * 2)

    assert np.abs(exact_difference(same(q), k, v, 0.3, kind).query).max() < 1e-14
    assert np.abs(exact_difference(q, same(k), v, 0.3, kind).key).max() < 1e-14
    assert np.abs(exact_difference(q, k, same(v), 0.3, kind).routing).max() == 0


def test_xi_belongs_to_the_own_pattern_of_blend(x64):
    """The own part of the pattern difference is xi times the uncoupled response; the cross part is of first order
    too, and turns the sign of the key response."""
    g, size = 0.37, 1e-4
    (q, k, v), (dq, dk, _) = split(random_pair(10))
    weights = pair_weights(
        *(jnp.stack([c + size * d / 2, c - size * d / 2]) for c, d in ((q, dq), (k, dk))), g, "blend"
    )
    own = (weights[0, :, 0] - weights[1, :, 1]) @ v / size
    cross = (weights[0, :, 1] - weights[1, :, 0]) @ v / size
    free = first_order_difference(q, k, v, dq, dk, 0 * v, 0.0)
    np.testing.assert_allclose(own, xi(g) * (free.query + free.key), atol=1e-7)
    np.testing.assert_allclose(cross, g * xi(g) * (free.query - free.key), atol=1e-7)
    assert np.abs(cross).max() > 0.1 * np.abs(own).max()


# --- between the kinds of gate, and without coupling


@every
def test_closed_gate_is_uncoupled_in_value_and_slope(x64, kind):
    q, k, v = random_pair(13)
    alone = jnp.stack(
        [gated_attention(q[i : i + 1], k[i : i + 1], v[i : i + 1], jnp.ones((1, 1)), kind)[0] for i in (0, 1)]
    )
    np.testing.assert_allclose(gated_attention(q, k, v, jnp.eye(2), kind), alone, atol=1e-15)
    slope = jax.jacobian(lambda g: pair_weights(q, k, g, kind))(0.0)
    ahead = (pair_weights(q, k, 1e-6, kind) - pair_weights(q, k, 0.0, kind)) / 1e-6
    np.testing.assert_allclose(slope, ahead, atol=1e-4)


def test_kinds_differ_at_third_order(x64):
    """At zero distance both are the same; `joint` also moves weight between the replicas' keys."""
    pair = random_pair(14)
    gate = jnp.array([[1.0, 0.4], [0.4, 1.0]])
    blend = gated_weights(*pair[:2], gate, "blend")
    np.testing.assert_allclose(blend.sum(-1)[0, :, 0], xi(0.4), rtol=1e-14)
    assert np.ptp(gated_weights(*pair[:2], gate, "joint").sum(-1)[0, :, 0]) > 0.01
    common, diff = split(pair)
    gaps = []
    for size in (0.04, 0.02):
        near = [jnp.stack([c + size * d / 2, c - size * d / 2]) for c, d in zip(common, diff, strict=True)]
        out = [gated_attention(*near, gate, kind) for kind in ("joint", "blend")]
        gaps.append(float(jnp.abs((out[0][0] - out[0][1]) - (out[1][0] - out[1][1])).max()))
    assert np.log2(gaps[0] / gaps[1]) == pytest.approx(3, abs=0.05)


@every
def test_keys_behind_a_closed_gate_may_be_of_any_size(kind):
    """In single precision, where the exponentials of the other replica's keys are infinite."""
    q = jnp.ones((2, 3, 4))
    k = jnp.stack([jnp.zeros((3, 4)), jnp.full((3, 4), 1e4)])
    weights = np.asarray(gated_weights(q, k, jnp.eye(2), kind))
    np.testing.assert_allclose(weights[0, :, 0], 1 / 3, rtol=1e-6)
    np.testing.assert_allclose(weights[0, :, 1], 0)
    slopes = jax.grad(lambda gate: gated_weights(q, k / 1e3, gate, kind)[0, :, 1].sum())(jnp.eye(2))
    assert np.all(np.isfinite(slopes))


@pytest.mark.parametrize(
    ("gate", "kind", "match"),
    [
        ([[1.0, 0.5], [0.5, 1.0]], "blnd", "'blnd' is not one of joint, blend, convex, additive, tanh"),
        ([[1.0, -0.5], [0.5, 1.0]], "joint", "negative"),
        ([[0.0, 0.0], [0.5, 1.0]], "blend", "open somewhere"),
        ([[1.0, 1.5], [0.5, 1.0]], "convex", "add up to at most 1"),
    ],
)
def test_bad_gates_are_refused(gate, kind, match):
    with pytest.raises(ValueError, match=match):
        gated_weights(jnp.ones((2, 3, 4)), jnp.ones((2, 3, 4)), jnp.array(gate), kind)
