"""Coupled attention: limits, symmetries, and what a gate does to a difference."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import random_model

import dit_jax.attention as attention_module
from dit_jax.attention import GATE_KINDS, anisotropic_gate, symmetric_gate
from dit_jax.config import DiTConfig
from dit_jax.replicas import grid_gates
from ou_theory.attention import common_gain, exact_difference, first_order_difference, rho, rho_n

HEADS, DIM, TOKENS, BATCH = 2, 4, 5, 3
kinds = pytest.mark.parametrize("kind", GATE_KINDS)
attend = jax.jit(attention_module.attend, static_argnames=("kind", "implementation"))


def qkv(replicas=2, seed=0, scale=1.0):
    return scale * jax.random.normal(jax.random.key(seed), (3, replicas, BATCH, TOKENS, HEADS, DIM))


def gate(g, replicas=2):
    return jnp.broadcast_to(symmetric_gate(g, replicas), (BATCH, replicas, replicas))


# --- limits


@kinds
def test_zero_gate_is_independent_attention(kind):
    """To the rounding of products of another shape; without a gate bit for bit."""
    q, k, v = qkv()
    coupled, _ = attend(q, k, v, gate(0.0), kind)
    free, _ = attend(q, k, v)
    np.testing.assert_allclose(coupled, free, atol=1e-6)
    alone = jnp.concatenate([attend(q[i : i + 1], k[i : i + 1], v[i : i + 1])[0] for i in range(2)])
    np.testing.assert_array_equal(free, alone)


@kinds
def test_zero_gate_has_a_finite_and_true_slope(kind, x64):
    q, k, v = qkv(seed=1).astype(jnp.float64)

    def total(g):
        return jnp.sum(jnp.sin(attend(q, k, v, gate(g), kind)[0]))

    slope = jax.jit(jax.grad(total))(0.0)
    forward = jax.jit(lambda: jax.jvp(total, (0.0,), (1.0,))[1])()
    step = 1e-6
    difference = (total(step) - total(0.0)) / step
    np.testing.assert_allclose(slope, forward, rtol=1e-10)
    np.testing.assert_allclose(slope, difference, rtol=1e-4)
    by_input = jax.jit(jax.grad(lambda q: jnp.sum(attend(q, k, v, gate(0.0), kind)[0] ** 2)))(q)
    uncoupled = jax.jit(jax.grad(lambda q: jnp.sum(attend(q, k, v)[0] ** 2)))(q)
    np.testing.assert_allclose(by_input, uncoupled, atol=1e-12)


@kinds
def test_a_closed_replica_with_huge_logits_does_no_harm(kind):
    """Keys of the other replica that would dominate by e^400 are not read at g = 0, in value or slope."""
    q, k, v = qkv(seed=2)
    k = k.at[1].mul(200.0)
    out, _ = attend(q, k, v, gate(0.0), kind)
    free, _ = attend(q, k, v)
    np.testing.assert_allclose(out, free, atol=1e-5)
    assert np.isfinite(jax.jit(jax.grad(lambda g: attend(q, k, v, gate(g), kind)[0].sum()))(0.0))


@jax.jit
@partial(jax.value_and_grad, argnums=(0, 1))
def value_and_slopes(q, shift, k, v, g):
    gates = symmetric_gate(g * (1 + shift)).astype(q.dtype)[None]
    return jnp.sum(jnp.sin(attend(q, k, v, gates, "joint", "explicit")[0]))


@pytest.mark.parametrize("behind", [1.0, 60.0])  # the other replica's logits: of the same size, or far above
@pytest.mark.parametrize("g", [3e38, 1e30, 1e-30, 1.2e-38, 1e-42])
def test_joint_gates_of_any_size_act_through_their_log(g, behind, x64):
    """In float32 as in float64, in value and in slope by the gate's log; below the normal numbers g counts as 0."""
    q, k, v = qkv(seed=3)
    k = k.at[1].mul(behind)

    def total(dtype):
        return value_and_slopes(*(jnp.asarray(x, dtype) for x in (q, 0, k, v, g)))

    (value, slopes), (exact, exact_slopes) = total(jnp.float32), total(jnp.float64)
    assert all(np.isfinite(slope).all() for slope in slopes)
    if g < 1e-40:
        np.testing.assert_allclose(value, jnp.sum(jnp.sin(attend(q, k, v, gate(0.0))[0])), rtol=1e-5)
        return
    np.testing.assert_allclose(value, exact, atol=2e-4)
    for slope, expected in zip(slopes, exact_slopes, strict=True):
        np.testing.assert_allclose(slope, expected, atol=2e-3 * max(1, np.abs(expected).max()))


@kinds
@settings(max_examples=20, deadline=None, derandomize=True)
@given(g=st.floats(0, 3))
def test_identical_replicas_ignore_the_gate(kind, g):
    """But for the common gain of the kinds that are not normalised."""
    q, k, v = (jnp.stack([x[0], x[0]]) for x in qkv())
    coupled, _ = attend(q, k, v, gate(jnp.float32(g)), kind)
    np.testing.assert_allclose(coupled, common_gain(jnp.float32(g), kind) * attend(q, k, v)[0], atol=5e-6)


def test_all_kinds_of_separate_softmaxes_are_one_family(x64):
    """Convex gates are blend gates in other numbers, for any rows; additive is blend without the norm, and tanh is
    additive: docs/theory.md, section 6.1."""
    q, k, v = qkv(3).astype(jnp.float64)
    gates = random_gates(3).astype(jnp.float64)
    total = gates.sum(-1, keepdims=True)
    off = 1 - jnp.eye(3)
    blend = attend(q, k, v, gates, "blend")[0]
    np.testing.assert_allclose(attend(q, k, v, off * gates / total + jnp.eye(3), "convex")[0], blend, atol=1e-12)
    rows = jnp.moveaxis(total, 1, 0)[..., None, None]
    np.testing.assert_allclose(attend(q, k, v, gates, "additive")[0], rows * blend, atol=1e-12)
    squashed = jnp.tanh(off * gates) + jnp.eye(3)
    np.testing.assert_allclose(attend(q, k, v, gates, "tanh")[0], attend(q, k, v, squashed, "additive")[0], atol=1e-12)


def test_a_convex_gate_of_one_exchanges_the_replicas():
    """Each one reads the other alone, with its own queries."""
    q, k, v = qkv()
    exchanged = attend(q, k[::-1], v[::-1])[0]
    np.testing.assert_allclose(attend(q, k, v, gate(1.0), "convex")[0], exchanged, atol=1e-6)
    assert np.abs(exchanged - attend(q, k, v)[0]).max() > 0.1


@kinds
@pytest.mark.parametrize("implementation", ["explicit", "fused"])
def test_a_row_without_an_own_entry_reads_the_others_alone(kind, implementation):
    """In value and in derivative, whatever lies behind the closed keys; replica B keeps its coupling."""
    q, k, v = qkv(seed=2)
    k = k.at[0].mul(100.0)
    crossed = jnp.array([[[0.0, 1.0], [0.3, 1.0]]])
    out, pattern = attend(q, k, v, crossed, kind, implementation)
    size = np.tanh(1) if kind == "tanh" else 1  # no entry under tanh has the weight 1
    np.testing.assert_allclose(out[0], size * attend(q, k[::-1], v[::-1])[0][0], atol=1e-5)
    np.testing.assert_array_equal(pattern[:, :, 0, :, 0], 0)
    np.testing.assert_allclose(out[1], attend(q, k, v, gate(0.3), kind)[0][1], atol=1e-5)
    own = jax.jit(jax.grad(lambda k: attend(q, k, v, crossed, kind, implementation)[0][0].sum()))(k)[0]
    np.testing.assert_array_equal(own, 0)


def test_kinds_agree_where_blocks_weigh_the_same():
    """With one token per replica blend differs from joint; with equal block masses they are the same."""
    q, k, v = qkv()
    k = jnp.stack([k[0], k[0]])
    joint, _ = attend(q, k, v, gate(0.4), "joint")
    blend, _ = attend(q, k, v, gate(0.4), "blend")
    np.testing.assert_allclose(joint, blend, atol=2e-6)
    k = jnp.stack([k[0], 2 * k[0]])
    assert np.abs(attend(q, k, v, gate(0.4), "joint")[0] - attend(q, k, v, gate(0.4), "blend")[0]).max() > 1e-2


# --- symmetries


@kinds
def test_exchanging_replicas_commutes(kind):
    q, k, v = qkv()
    there = attend(q, k, v, gate(0.3), kind)[0]
    back = attend(q[::-1], k[::-1], v[::-1], gate(0.3), kind)[0][::-1]
    np.testing.assert_allclose(there, back, atol=1e-6)


@kinds
def test_permuting_the_tokens_of_one_replica_permutes_its_output(kind):
    q, k, v = qkv()
    order = np.array([3, 0, 4, 1, 2])
    permuted = [x.at[1].set(x[1][:, order]) for x in (q, k, v)]
    out, moved = (attend(*x, gate(0.3), kind)[0] for x in ((q, k, v), permuted))
    np.testing.assert_allclose(moved[0], out[0], atol=1e-6)
    np.testing.assert_allclose(moved[1], out[1][:, order], atol=1e-6)


def test_joint_inverse_gate_exchanges_own_and_other_keys():
    q, k, v = qkv()
    direct = attend(q, k, v, gate(0.25), "joint")[0]
    exchanged = attend(q, k[::-1], v[::-1], gate(4.0), "joint")[0]
    np.testing.assert_allclose(direct, exchanged, atol=2e-6)


@kinds
def test_pattern_rows_are_distributions_that_make_the_output(kind):
    """Or, where the kind is not normalised, have the common gain for a sum."""
    q, k, v = qkv(3)
    out, pattern = attend(q, k, v, gate(0.4, 3), kind)
    np.testing.assert_allclose(pattern.sum((-2, -1)), common_gain(0.4, kind, 3), atol=2e-6)
    assert (pattern >= 0).all()
    np.testing.assert_allclose(jnp.einsum("nhaqbk,bnkhd->anqhd", pattern, v), out, atol=2e-6)


@kinds
def test_gates_belong_to_their_pair(kind):
    q, k, v = qkv()
    couplings = jnp.array([0.0, 0.5, 2.0])
    mixed, _ = attend(q, k, v, symmetric_gate(couplings), kind)
    for n, g in enumerate(couplings):
        np.testing.assert_allclose(mixed[:, n], attend(q, k, v, gate(g), kind)[0][:, n], atol=1e-6)


@kinds
def test_anisotropic_gate_is_one_way(kind):
    q, k, v = qkv()
    one_way = jnp.broadcast_to(anisotropic_gate(0.8, 0.0), (BATCH, 2, 2))
    out, _ = attend(q, k, v, one_way, kind)
    np.testing.assert_allclose(out[1], attend(q, k, v)[0][1], atol=1e-6)
    np.testing.assert_allclose(out[0], attend(q, k, v, gate(0.8), kind)[0][0], atol=1e-6)


# --- the fused path


def random_gates(replicas, seed=0):
    """A gate for each pair, off-diagonal entries from 0 to above 1, one of them exactly 0."""
    values = jax.random.uniform(jax.random.key(seed), (BATCH, replicas, replicas), maxval=1.5)
    return jnp.where(jnp.eye(replicas, dtype=bool), 1.0, values.at[0, 0, 1].set(0.0))


@kinds
@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_fused_and_explicit_agree_to_rounding(kind, replicas):
    q, k, v = qkv(replicas, scale=2.0)
    for gates in (None, random_gates(replicas) if replicas > 1 else jnp.ones((1, 1, 1)), gate(0.0, replicas)):
        explicit, pattern = attend(q, k, v, gates, kind, "explicit")
        fused, same_pattern = attend(q, k, v, gates, kind, "fused")
        np.testing.assert_allclose(fused, explicit, atol=2e-6)
        np.testing.assert_array_equal(pattern, same_pattern)


@kinds
def test_fused_and_explicit_agree_in_float64_and_in_their_slopes(kind, x64):
    q, k, v = qkv().astype(jnp.float64)
    gates = random_gates(2).astype(jnp.float64)

    def total(implementation):
        return lambda q, gates: jnp.sum(jnp.sin(attend(q, k, v, gates, kind, implementation)[0]))

    for argument in (0, 1):
        opened = gates if argument == 0 else jnp.maximum(gates, 0.1)  # no slope at a closed gate on the fused path
        slopes = [jax.jit(jax.grad(total(each), argument))(q, opened) for each in ("explicit", "fused")]
        # jax.nn.dot_product_attention takes its softmax in float32 whatever the inputs
        np.testing.assert_allclose(slopes[1], slopes[0], atol=3e-6)


@kinds
def test_bfloat16_attention_is_within_its_rounding_on_both_paths(kind):
    """Three units in the last place (2^-8) of the largest value, against float32 on the same rounded inputs: the gate
    adds no more than the inputs do, because its log is carried in three parts."""
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv(scale=1.5))
    gates = random_gates(2)
    reference, _ = attend(*(x.astype(jnp.float32) for x in (q, k, v)), gates, kind, "explicit")
    for implementation in ("explicit", "fused"):
        out, _ = attend(q, k, v, gates, kind, implementation)
        assert out.dtype == jnp.bfloat16
        assert np.abs(out.astype(jnp.float32) - reference).max() < 3 * 2**-8 * np.abs(reference).max()


def test_the_log_of_a_gate_survives_bfloat16(x64):
    gates = jnp.array([[[1.0, 0.01], [0.3, 1.0]], [[1.0, 0.0], [2.5, 1.0]]])
    for dim in (64, 72):
        queries, keys = attention_module._gate_features(gates, dim, jnp.bfloat16)
        assert queries.dtype == keys.dtype == jnp.bfloat16
        assert (dim + keys.shape[-1]) % 8 == 0
        logs = jnp.einsum("anf,bf->nab", queries.astype(float), keys.astype(float)) * dim**-0.5
        exact = jnp.where(gates > 0, jnp.log(gates), attention_module.CLOSED)
        np.testing.assert_allclose(logs, exact, rtol=1e-6)


@kinds
def test_a_gate_needs_no_bias_tensor_on_the_fused_path(kind, monkeypatch):
    q, k, v = qkv()
    calls = []
    stock = jax.nn.dot_product_attention

    def recorded(q, k, v, bias=None, mask=None, **options):
        calls.append((q.shape, k.shape, bias, mask))
        return stock(q, k, v, bias, mask, **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", recorded)
    attention_module.attend(q, k, v, gate(0.3), kind, "fused")
    (queries, keys, bias, mask), *others = calls
    assert not others
    assert bias is None
    assert mask is None
    joined = (BATCH, 2 * TOKENS, HEADS, 8)  # 4 features, 2 for the gate, filled to 8
    assert queries == keys == (joined if kind == "joint" else (4 * BATCH, TOKENS, HEADS, DIM))


def test_a_closed_replica_stays_closed_on_the_fused_path():
    q, k, v = qkv(seed=2)
    k = k.at[1].mul(200.0)
    out, _ = attend(q, k, v, gate(0.0), "joint", "fused")
    np.testing.assert_allclose(out, attend(q, k, v)[0], atol=1e-5)


def fake_device(version="PJRT C API\ncuda 12090", capability="9.0", platform="gpu"):
    return SimpleNamespace(
        platform=platform, compute_capability=capability, client=SimpleNamespace(platform_version=version)
    )


@pytest.mark.parametrize(
    ("device", "most"),
    [
        (fake_device(), 256),
        (fake_device(capability="10.0"), 256),
        (fake_device(capability="8.9"), 128),
        (fake_device("PJRT C API\nrocm 60200", "gfx942"), 0),
        (fake_device("cpu", platform="cpu"), 0),
    ],
)
def test_cudnn_is_asked_for_the_heads_it_takes(device, most):
    taken = [features for features in range(4, 300, 4) if attention_module._cudnn_takes(device, features)]
    assert taken == list(range(8, most + 1, 8))


def test_the_implementation_goes_by_the_default_device(monkeypatch):
    """A bfloat16 model on a GPU is fused, without cuDNN where the heads and the gate's features are too many for it."""
    asked = []
    monkeypatch.setattr(attention_module, "get_default_device", lambda: fake_device(capability="8.6"))
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda q, k, v, **options: asked.append(options) or q)
    for dim, gates in ((64, gate(0.3)), (128, None), (128, gate(0.3))):
        attention_module.attend(*jnp.zeros((3, 2, BATCH, TOKENS, HEADS, dim), jnp.bfloat16), gates)
    assert [options["implementation"] for options in asked] == ["cudnn", "cudnn", "xla"]
    attention_module.attend(*qkv(), gate(0.3))  # float32: explicit
    assert len(asked) == 3


def test_unknown_kinds_and_implementations_are_told():
    with pytest.raises(ValueError, match="'mixed' is not one of joint, blend, convex, additive, tanh"):
        attend(*qkv(), gate(0.1), "mixed")
    with pytest.raises(ValueError, match="'flash' is not one of auto, explicit, fused"):
        attend(*qkv(), gate(0.1), implementation="flash")


# --- what a gate does to a difference


first_order = jax.jit(first_order_difference, static_argnames="kind")
exact = jax.jit(exact_difference, static_argnames="kind")


def heads(x):  # (R, N, T, h, d) -> list of single-head (R, T, d)
    return [x[:, n, :, h] for n in range(BATCH) for h in range(HEADS)]


@kinds
@pytest.mark.parametrize("g", [0.0, 0.2, 1.0, 2.5])
def test_first_order_difference(kind, g, x64):
    q, k, v = qkv(1).astype(jnp.float64)
    dq, dk, dv = qkv(1, seed=7).astype(jnp.float64)

    def difference(size):
        pair = [jnp.concatenate([x + size * d / 2, x - size * d / 2]) for x, d in ((q, dq), (k, dk), (v, dv))]
        out = attend(*pair, gate(g), kind)[0]
        return out[0] - out[1]

    value, slope = jax.jit(lambda: jax.jvp(difference, (0.0,), (1.0,)))()
    np.testing.assert_allclose(value, 0, atol=1e-12)
    parts = zip(*(heads(x) for x in (q, k, v, dq, dk, dv)), strict=True)
    expected = [first_order(*(x[0] for x in part), g, kind).total for part in parts]
    found = [slope[n, :, h] for n in range(BATCH) for h in range(HEADS)]
    np.testing.assert_allclose(found, expected, atol=1e-10)


@kinds
@pytest.mark.parametrize("g", [0.2, 1.0])
def test_exact_difference(kind, g, x64):
    q, k, v = qkv(seed=3, scale=1.5).astype(jnp.float64)
    out, pattern = attend(q, k, v, gate(g), kind)
    own = (pattern[:, :, 0, :, 0] + pattern[:, :, 1, :, 1]) / 2
    other = (pattern[:, :, 0, :, 1] + pattern[:, :, 1, :, 0]) / 2
    change = (pattern[:, :, 0] - pattern[:, :, 1]).sum(-2)
    np.testing.assert_allclose(change.sum(-1), 0, atol=1e-12)
    routing = jnp.einsum("nhqk,nkhd->nqhd", own - other, v[0] - v[1])
    by_pattern = jnp.einsum("nhqk,nkhd->nqhd", change, v.mean(0))
    np.testing.assert_allclose(out[0] - out[1], routing + by_pattern, atol=1e-12)
    for i, part in enumerate(zip(heads(q), heads(k), heads(v), strict=True)):
        n, h = divmod(i, HEADS)
        split = exact(*part, g, kind)
        np.testing.assert_allclose(split.routing, routing[n, :, h], atol=1e-12)
        np.testing.assert_allclose(split.key + split.query, by_pattern[n, :, h], atol=1e-12)
        if rho(g, kind) == 0:
            np.testing.assert_allclose(split.key, 0, atol=1e-12)


@kinds
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_difference_modes_of_many_replicas(kind, replicas, x64):
    """Values and keys of a difference mode carry rho_N, queries the common gain, and all of the common mode."""
    q, k, v = qkv(1, seed=4).astype(jnp.float64)
    dq, dk, dv = qkv(1, seed=5).astype(jnp.float64)
    g, common = 0.2, common_gain(0.2, kind, replicas)
    weights = jnp.arange(replicas) - (replicas - 1) / 2

    @jax.jit
    def response(weights, dq, dk, dv):
        shape = (replicas, 1, 1, 1, 1)

        def outputs(size):
            moved = [x + size * weights.reshape(shape) * d for x, d in ((q, dq), (k, dk), (v, dv))]
            return attend(*moved, gate(g, replicas), kind)[0]

        return jax.jvp(outputs, (0.0,), (1.0,))[1]

    @jax.jit
    def uncoupled(dq, dk, dv):
        return jax.jvp(lambda s: attend(q + s * dq, k + s * dk, v + s * dv)[0], (0.0,), (1.0,))[1]

    zero = jnp.zeros_like(dq)
    single = {
        name: response(jnp.ones(replicas), *parts)
        for name, parts in {"query": (dq, zero, zero), "rest": (zero, dk, dv)}.items()
    }
    free = {name: uncoupled(*parts) for name, parts in {"query": (dq, zero, zero), "rest": (zero, dk, dv)}.items()}
    for name in free:
        np.testing.assert_allclose(single[name], jnp.broadcast_to(common * free[name], single[name].shape), atol=1e-10)
    shape = weights.reshape(replicas, 1, 1, 1, 1)
    np.testing.assert_allclose(response(weights, dq, zero, zero), common * shape * free["query"], atol=1e-10)
    rest = rho_n(g, replicas, kind) * shape * free["rest"]
    np.testing.assert_allclose(response(weights, zero, dk, dv), rest, atol=1e-10)


# --- gates and the network


@pytest.mark.parametrize("bad", [-0.1, np.nan, np.inf])
def test_impossible_couplings_are_refused(bad):
    with pytest.raises(ValueError, match="coupling"):
        symmetric_gate(bad)
    with pytest.raises(ValueError, match="coupling"):
        anisotropic_gate(0.1, bad)


@pytest.mark.parametrize("bad", [[[1, -0.1], [0.1, 1]], [[1, np.nan], [0, 1]], [[0.5, 0.5], [0.5, 0.5]]])
def test_impossible_gates_are_refused_unless_traced(bad, model, pair):
    bad = np.array(bad, np.float32)
    with pytest.raises(ValueError, match=r"coupling|diagonal"):
        model(*pair, bad)
    with pytest.raises(ValueError, match=r"coupling|diagonal"):
        grid_gates(bad[None])
    assert run(model, *pair, bad).shape == (2, 2, 8, 8, 6)


@pytest.mark.parametrize(
    ("bad", "kind", "match"),
    [
        ([[1, 1.1], [0, 1]], "convex", "shares, which add up to at most 1 in each row; got rows of 1.1"),
        ([[0, 0.5], [0.5, 1]], "convex", "diagonal 0 must have shares that add up to 1"),
        ([[0, 0], [0.5, 1]], "blend", "open somewhere"),
        ([[0.5, 0.5], [0.5, 1]], "additive", "diagonal"),
    ],
)
def test_rows_that_are_no_gate_of_their_kind_are_told(bad, kind, match, model, pair):
    with pytest.raises(ValueError, match=match):
        model(*pair, np.array(bad, np.float32), kind=kind)


@kinds
def test_gates_at_the_bounds_of_their_kind_are_accepted(kind):
    thirds = np.full((4, 4), np.float32(1 / 3)) + np.eye(4, dtype=np.float32) * np.float32(2 / 3)  # rounded up
    attention_module.check_gate(thirds, kind)
    attention_module.check_gate(1 - np.eye(2), kind)
    attention_module.check_gate(np.eye(3), kind)


def test_an_unknown_kind_is_named():
    q, k, v = qkv()
    with pytest.raises(ValueError, match="sum"):
        attend(q, k, v, gate(0.1), "sum")  # pyright: ignore[reportArgumentType]


CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=3, num_heads=2, num_classes=4)


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, 0.3)


@pytest.fixture(scope="module")
def pair():
    return jax.random.normal(jax.random.key(9), (2, 2, 8, 8, 3)), jnp.array([10, 800]), jnp.array([1, 3])


run = jax.jit(lambda model, x, t, y, gate=None: model(x, t, y, gate))


def test_network_with_a_closed_gate_is_two_networks(model, pair):
    x, t, y = pair
    coupled = run(model, x, t, y, jnp.broadcast_to(jnp.eye(2), (2, 2, 2)))
    for replica in range(2):
        alone = np.asarray(run(model, x[replica], t, y))
        np.testing.assert_allclose(coupled[replica], alone, atol=2e-6 * np.abs(alone).max())


def test_gate_shapes_broadcast_over_layers_and_pairs(model, pair):
    x, t, y = pair
    one = symmetric_gate(0.7)
    reference = np.asarray(run(model, x, t, y, one))
    for shape in ((2, 2, 2), (1, 2, 2), (3, 1, 2, 2), (3, 2, 2, 2)):
        out = run(model, x, t, y, jnp.broadcast_to(one, shape))
        np.testing.assert_allclose(out, reference, atol=2e-6 * np.abs(reference).max())


def test_layers_take_their_own_gate(model, pair):
    """Opening one layer differs from opening none and all; opening the last changes nothing before it."""
    x, t, y = pair
    gates = {layer: jnp.stack([symmetric_gate(0.9 * (i == layer)) for i in range(3)])[:, None] for layer in range(3)}
    outs = [np.asarray(run(model, x, t, y, g)) for g in gates.values()]
    closed = np.asarray(run(model, x, t, y, jnp.eye(2)))
    for out in outs:
        assert np.abs(out - closed).max() > 1e-3
    streams = jax.jit(lambda m, g: m(x, t, y, g, tap=lambda layer, a: a["resid_post"])[1])
    last, none = streams(model, gates[2]), streams(model, jnp.broadcast_to(jnp.eye(2), (3, 1, 2, 2)))
    np.testing.assert_allclose(last[:2], none[:2], atol=1e-5)
    assert np.abs(last[2] - none[2]).max() > 1e-3


def test_some_layers_may_read_the_other_replica_alone(model, pair):
    """A cross-only layer between uncoupled ones: all normalised kinds are the same; identical replicas do not feel it,
    others do, from that layer on."""
    x, t, y = pair
    crossed = jnp.where(jnp.arange(3)[:, None, None, None] == 1, 1 - jnp.eye(2), jnp.eye(2))

    @partial(jax.jit, static_argnames="kind")
    def streams(model, x, gate, kind="joint"):
        return model(x, t, y, gate, kind=kind, tap=lambda layer, a: a["resid_post"])

    free, layers = streams(model, x, jnp.eye(2))
    scale = np.abs(free).max()
    out, crossed_layers = streams(model, x, crossed)
    np.testing.assert_allclose(crossed_layers[0], layers[0], atol=1e-5)
    assert np.abs(crossed_layers[1] - layers[1]).max() > 1e-3
    for kind in ("blend", "convex", "additive"):
        np.testing.assert_allclose(streams(model, x, crossed, kind)[0], out, atol=2e-6 * scale)
    same = jnp.stack([x[0], x[0]])
    np.testing.assert_allclose(streams(model, same, crossed)[0][0], free[0], atol=2e-6 * scale)


def test_a_gate_needs_replicas(model, pair):
    x, t, y = pair
    with pytest.raises(ValueError, match="replicas"):
        model(x[0], t, y, jnp.eye(2))
