"""Taps, edits, the lens, and gates by layer and by step: one path for all."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from models import random_model

from dit_jax import denoised_at
from dit_jax.attention import GATE_KINDS, anisotropic_gate, symmetric_gate
from dit_jax.config import DiTConfig
from dit_jax.diffusion import guided_output, network_denoiser, sample
from dit_jax.inside import ablate, chain, close_heads, copy_replica, keep, lens, replace, residual_norm, share
from dit_jax.model import ACTIVATIONS
from dit_jax.replicas import run_pairs
from ou_theory.attention import common_gain, coupling_at, rho
from ou_theory.clock import make_clock

CONFIG = DiTConfig(input_size=8, in_channels=3, hidden_size=24, depth=3, num_heads=2, num_classes=4)
BATCH, CLOCK = 2, make_clock(4)
T, Y = jnp.array([900, 30]), jnp.array([1, 3])


@pytest.fixture(scope="module")
def model():
    return random_model(CONFIG, 0.2)


def images(replicas=2, seed=0):
    return jax.random.normal(jax.random.key(seed), (replicas, BATCH, 8, 8, 3))


def close(a, b, tolerance=2e-6):
    np.testing.assert_allclose(a, b, atol=tolerance * np.abs(np.asarray(b)).max())


@nnx.jit(static_argnames=("tap", "edit", "kind"))
def run(model, x, gate=None, tap=None, edit=None, kind="joint"):
    return model(x, T, Y, gate, tap=tap, edit=edit, kind=kind)


# --- taps


@pytest.mark.parametrize("gated", [True, False])
def test_every_activation_has_its_documented_shape(model, gated):
    sizes = {"R": 2, "N": BATCH, "T": 16, "D": 24, "6D": 144, "4D": 96, "heads": 2, "head_dim": 12}
    sizes["R or 1"] = 2 if gated else 1
    _, taps = run(model, images(), symmetric_gate(jnp.array([0.3])) if gated else None, keep(*ACTIVATIONS))
    assert set(taps) == set(ACTIVATIONS)
    for name, text in ACTIVATIONS.items():
        letters = text[1 : text.index(")")].split(", ")
        assert taps[name].shape == (3, *(sizes[letter] for letter in letters)), name


def test_a_tap_changes_nothing_and_a_block_is_made_of_its_activations(model):
    out, a = run(model, images(), symmetric_gate(jnp.array([0.3])), keep(*ACTIVATIONS))
    close(out, run(model, images(), symmetric_gate(jnp.array([0.3]))))
    _, _, gate_attn, _, _, gate_mlp = jnp.split(a["adaln"], 6, -1)
    close(a["resid_mid"], a["resid_pre"] + gate_attn[:, None, :, None] * a["attn_out"])
    close(a["resid_post"], a["resid_mid"] + gate_mlp[:, None, :, None] * a["mlp_out"])
    close(a["resid_pre"][1:], a["resid_post"][:-1])
    close(jnp.einsum("lnhaqbk,lbnkhd->lanqhd", a["pattern"], a["v"]), a["head_out"])


def test_only_what_is_asked_for_is_kept(model):
    """The compiled program's outputs are the tapped arrays and no more; an unused pattern is not in the program."""
    norm = jax.jit(lambda model, x: model(x, T, Y, attention="fused", tap=residual_norm)).lower(model, images())
    assert [leaf.shape for leaf in jax.tree.leaves(norm.out_info)] == [(2, BATCH, 8, 8, 6), (3, 2, BATCH)]
    full = jax.jit(lambda model, x: model(x, T, Y, attention="fused", tap=keep("pattern"))).lower(model, images())
    plain = jax.jit(lambda model, x: model(x, T, Y, attention="fused")).lower(model, images())
    exponentials = [x.compile().as_text().count(" exponential(") for x in (plain, norm, full)]
    assert exponentials[0] == exponentials[1] < exponentials[2]


def test_residual_norm(model):
    _, (norm, a) = run(model, images(), None, lambda i, a: (residual_norm(i, a), a["resid_post"]))
    close(norm, np.sqrt((np.asarray(a) ** 2).mean((-1, -2))))


# --- the lens


def test_the_last_readout_of_the_lens_is_the_output(model, stock_compiler):
    gate = symmetric_gate(jnp.array([0.5]))

    @partial(jax.jit, compiler_options=stock_compiler)
    def look(model, x):
        return model(x, T, Y, gate, tap=lens(model))

    out, readout = look(model, images())
    assert readout.shape == (3, *out.shape)
    np.testing.assert_array_equal(readout[-1], out)
    short = random_model(dataclasses.replace(CONFIG, depth=1), 0.2, seed=1)
    for part in ("x_embedder", "pos_embed", "t_embedder", "y_embedder", "final_layer"):
        setattr(short, part, getattr(model, part))
    nnx.update(short.blocks, jax.tree.map(lambda a: a[:1], nnx.state(model.blocks)))
    close(readout[0], run(short, images(), gate))  # after one block: the network that has one
    assert np.abs(readout[0] - readout[-1]).max() > 0.1


def test_lens_along_a_trajectory_ends_in_what_the_sampler_saw(model):
    @jax.jit
    def trajectory(model, x):
        denoiser = network_denoiser(model, CLOCK, tap=lens(model))

        def observe(step, x, denoised, readout):
            return denoised, denoised_at(CLOCK, step, x, readout[..., :3], CONFIG.prediction)

        return sample(denoiser, x, CLOCK, Y, observe=observe)

    _, (denoised, by_layer) = trajectory(model, images())
    assert by_layer.shape == (4, 3, 2, BATCH, 8, 8, 3)
    close(by_layer[:, -1], denoised)


# --- edits


def test_an_edit_that_changes_nothing_changes_nothing(model):
    gate = symmetric_gate(jnp.array([0.3]))
    np.testing.assert_array_equal(
        run(model, images(), gate, None, lambda name, layer, value: value), run(model, images(), gate)
    )


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_can_be_edited_and_the_tap_sees_the_edit(model, name):
    gate = symmetric_gate(jnp.array([0.3]))

    def halve(at, layer, value):
        return jnp.where(layer == 1, value / 2, value) if at == name else value

    out, taps = run(model, images(), gate, keep(name), halve)
    plain, before = run(model, images(), gate, keep(name))
    assert np.abs(out - plain).max() > 1e-3 * np.abs(plain).max()
    close(taps[name][0], before[name][0])
    if name not in ("resid_post",):  # everything in a layer up to the edited point is as before
        close(taps[name][1], before[name][1] / 2)


def test_ablating_both_sublayers_everywhere_leaves_embedding_and_final_layer(model):
    x = images()
    out = run(model, x, None, None, chain(ablate("attn_out"), ablate("mlp_out")))
    close(out, model.readout(model.embed(x), model.condition(T, Y)))
    partly = run(
        model, x, None, keep("resid_pre", "resid_post"), chain(ablate("attn_out", [1]), ablate("mlp_out", [1]))
    )[1]
    close(partly["resid_post"][1], partly["resid_pre"][1])
    assert np.abs(partly["resid_post"][0] - partly["resid_pre"][0]).max() > 0.01


def test_ablating_one_head_leaves_the_others(model):
    _, taps = run(model, images(), None, keep("head_out"), ablate("head_out", [0], heads=[1]))
    _, before = run(model, images(), None, keep("head_out"))
    assert not np.any(taps["head_out"][0][..., 1, :])
    close(taps["head_out"][0][..., 0, :], before["head_out"][0][..., 0, :])


def test_a_pattern_edit_is_what_the_values_are_read_with(model):
    def own_token(name, layer, value):
        return jnp.broadcast_to(jnp.eye(16)[:, None, :], value.shape) if name == "pattern" else value

    _, taps = run(model, images(), None, keep("v", "head_out"), own_token)
    close(taps["head_out"], taps["v"])


def test_patching_one_replica_into_the_other(model):
    """From the patched layer on, the target is the source (same conditioning); before it, it is itself."""
    x = images()
    out, taps = run(model, x, None, keep("resid_pre"), copy_replica("resid_pre", 1, 0, [1]))
    plain, before = run(model, x, None, keep("resid_pre"))
    close(out[0], plain[1])
    close(out[1], plain[1])
    close(taps["resid_pre"][0], before["resid_pre"][0])


def test_stored_activations_can_be_put_into_another_run(model):
    x, other = images(), images(seed=5)
    plain, stored = run(model, x, None, keep("resid_post"))

    @jax.jit
    def patched(model, other, stored):
        return model(other, T, Y, edit=replace("resid_post", stored, [2]))

    close(patched(model, other, stored["resid_post"]), plain)
    edit = replace("resid_post", stored["resid_post"], iter([2]))
    for tap in (None, keep("q")):  # a trace each
        close(jax.tree.leaves(run(model, other, None, tap, edit))[0], plain)


def test_wrong_edits_and_names_are_told(model):
    with pytest.raises(ValueError, match=r"attn_out .*\(R, N, T, D\).*\(24,\)"):
        run(model, images(), None, None, lambda n, i, v: v[0, 0, 0] if n == "attn_out" else v)
    with pytest.raises(ValueError, match=r"resid_pre .*NoneType"):
        run(model, images(), None, None, lambda n, i, v: None)
    with pytest.raises(ValueError, match="'atn_out'; known: resid_pre"):
        keep("atn_out")
    with pytest.raises(ValueError, match="'atn_out'"):
        ablate("atn_out")
    with pytest.raises(ValueError, match="no replica axis"):
        copy_replica("adaln", 0, 1)
    with pytest.raises(ValueError, match="head_out"):
        ablate("attn_out", heads=[0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ablate("attn_out", [-1]), "layers count from 0, got -1"),
        (lambda: copy_replica("q", 0, 1, [2, -3]), "layers count from 0, got 2, -3"),
        (lambda: replace("q", jnp.zeros((3, 1)), [-1]), "layers count from 0"),
        (lambda: replace("q", jnp.zeros((3, 1)), [1, 3]), "no layer 3: there are 3"),
        (lambda: ablate("head_out", heads=[0, 2]), "no head 2: there are 2"),
        (lambda: copy_replica("q", 0, 2), "no replica 2: there are 2"),
        (lambda: copy_replica("q", 7, 0), "no replica 7: there are 2"),
    ],
)
def test_what_is_not_there_is_told(model, make, message):
    with pytest.raises(ValueError, match=message):
        run(model, images(), None, None, make())


# --- gates: by layer, by step, one-way, of more replicas


def test_a_gate_by_layer_acts_in_its_layers(model):
    g = jnp.array([0.0, 0.7, 0.0])
    _, taps = run(model, images(), symmetric_gate(g)[:, None], keep("resid_pre", "attn_out"))
    _, free = run(model, images(), None, keep("resid_pre", "attn_out"))
    close(taps["attn_out"][0], free["attn_out"][0])
    close(taps["resid_pre"][1], free["resid_pre"][1])
    assert np.abs(taps["attn_out"][1] - free["attn_out"][1]).max() > 1e-3
    everywhere = run(model, images(), symmetric_gate(jnp.full(3, 0.7))[:, None])
    close(everywhere, run(model, images(), symmetric_gate(jnp.array([0.7]))))


def test_a_gate_by_step_acts_in_its_steps(model):
    def states(gate):
        denoiser = network_denoiser(model, CLOCK, gate)
        return sample(denoiser, images(), CLOCK, Y, observe=lambda step, x, denoised: denoised)[1]

    switched = symmetric_gate(jnp.array([0.0, 0.0, 0.9, 0.9]))[:, None, None]  # (steps, layers, pairs, R, R)
    run_states = jax.jit(states)
    late, free, always = run_states(switched), run_states(None), run_states(symmetric_gate(jnp.array([0.9])))
    close(late[:2], free[:2])
    assert np.abs(late[2] - free[2]).max() > 1e-3
    assert np.abs(late[2] - always[2]).max() > 1e-3
    close(run_states(symmetric_gate(jnp.full(4, 0.9))[:, None, None]), always)
    with pytest.raises(ValueError, match="3 steps, the clock 4"):
        network_denoiser(model, CLOCK, switched[:3])


def test_run_pairs_takes_any_gates_and_agrees_with_the_scalar_form(model):
    pairs, labels = jnp.arange(2), jnp.array([0, 3])

    @jax.jit
    def run(model, couplings):
        return run_pairs(
            lambda gate: network_denoiser(model, CLOCK, gate), CLOCK, couplings, pairs, labels, (8, 8, 3), seed=0
        )[0]

    g = jnp.array([0.0, 0.6])
    scalar = run(model, g)
    matrix = symmetric_gate(g)
    close(run(model, matrix), scalar)
    close(run(model, jnp.broadcast_to(matrix[:, None], (2, 3, 2, 2))), scalar)
    close(run(model, matrix[:, None, None]), scalar)
    one_way = run(model, anisotropic_gate(jnp.array([0.6]), jnp.array([0.0])))
    close(one_way[1, 0], scalar[1, 0])  # B reads nothing
    assert np.abs(one_way[0, 0] - scalar[0, 0]).max() > 1e-3
    late = anisotropic_gate(jnp.array([[0.0, 0.0, 0.6]]), jnp.array([[0.0, 0.0, 0.6]]))  # (C, layers, R, R)
    assert np.abs(run(model, late)[:, 0] - scalar[:, 1]).max() > 1e-3
    with pytest.raises(ValueError, match="couplings"):
        run(model, jnp.ones((2, 3, 3)))


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_more_replicas_come_through_the_same_path(model, kind):
    """Three replicas of which two read each other and the third is alone: the pair, and the single run."""
    x = images(3)
    gate = jnp.eye(3).at[0, 1].set(0.4).at[1, 0].set(0.4)[None]
    out = run(model, x, gate, None, None, kind)
    close(out[:2], run(model, x[:2], symmetric_gate(jnp.array([0.4])), None, None, kind))
    close(out[2], run(model, x[2]))


@pytest.mark.parametrize("shape", [(3, 3), (5, 1, 2, 2), (3, 2, 2), (2,)])
def test_gates_that_do_not_fit_are_told(model, shape):
    with pytest.raises(ValueError, match="does not broadcast"):
        run(model, images(), jnp.ones(shape))


# --- guidance


def test_guidance_couples_both_halves_or_the_conditional_one(model):
    """One doubled batch: its halves are the network's conditional and null outputs, coupled as asked."""
    x, gate, scale = images(), symmetric_gate(jnp.array([0.6])), 2.5
    null = jnp.full_like(Y, CONFIG.num_classes)

    @nnx.jit(static_argnames="halves")
    def guided(model, gate, halves):
        return guided_output(model, x, T, Y, gate, scale=scale, guided_coupling=halves)

    conditional = run(model, x, gate)
    for halves, null_gate in (("both", gate), ("conditional", None)):
        unconditional = jax.jit(lambda m, g: m(x, T, null, g))(model, null_gate)
        out = guided(model, gate, halves)
        close(out[..., :3], unconditional[..., :3] + scale * (conditional - unconditional)[..., :3], 1e-5)
        close(out[..., 3:], conditional[..., 3:], 1e-5)
        by_pair = jnp.broadcast_to(gate, (3, BATCH, 2, 2))  # of every layer and pair
        close(guided(model, by_pair, halves), out, 1e-5)
    with pytest.raises(ValueError, match="'neither' is not one of both, conditional"):
        guided(model, gate, "neither")


def test_guidance_is_one_call_of_the_network(model):
    calls = []

    class Counted:
        config = CONFIG

        def __call__(self, x, *arguments, **options):
            calls.append(x.shape)
            return model(x, *arguments, **options)

    guided_output(Counted(), images(), T, Y, scale=2.0)  # pyright: ignore
    assert calls == [(2, 2 * BATCH, 8, 8, 3)]


def test_a_tap_under_guidance_sees_the_doubled_batch(model):
    @jax.jit
    def tapped(model, x):
        denoiser = network_denoiser(model, CLOCK, guidance=2.0, tap=residual_norm)
        return sample(denoiser, x, CLOCK, Y, observe=lambda step, x, denoised, norms: norms)[1]

    norms = tapped(model, images())
    assert norms.shape == (4, 3, 2, 2 * BATCH)
    first = CLOCK.timesteps[0]
    for half, labels in enumerate((Y, jnp.full_like(Y, CONFIG.num_classes))):  # side by side, image by image
        alone = jax.jit(lambda m, y: m(images(), jnp.full(BATCH, first), y, tap=residual_norm)[1])(model, labels)
        close(norms[0, ..., half::2], alone, 1e-5)
    assert np.abs(norms[..., ::2] - norms[..., 1::2]).max() > 1e-4


# --- coupling of some heads, of queries, keys or values


@pytest.mark.parametrize("kind", GATE_KINDS)
def test_closed_heads_are_uncoupled_exactly(model, kind):
    x, gate = images(), symmetric_gate(jnp.array([0.7]))
    free, coupled = run(model, x), run(model, x, gate, kind=kind)
    close(run(model, x, gate, None, close_heads([0, 1]), kind), free, 1e-5)
    close(run(model, x, gate, None, close_heads([]), kind), coupled, 1e-5)
    taps = run(model, x, gate, keep("head_out", "pattern"), close_heads([1], [0]), kind)[1]
    alone = run(model, x, None, keep("head_out"))[1]["head_out"][0]
    both = run(model, x, gate, keep("head_out"), kind=kind)[1]["head_out"][0]
    close(taps["head_out"][0][..., 1, :], alone[..., 1, :], 1e-5)
    close(taps["head_out"][0][..., 0, :], both[..., 0, :], 1e-5)
    assert np.abs(alone - both).max() > 1e-3
    masses = np.full(taps["pattern"].shape[:5], common_gain(0.7, kind))
    masses[0][:, 1] = 1
    close(taps["pattern"].sum((-2, -1)), masses, 1e-5)
    assert np.any(taps["pattern"][1][:, 1, 0, :, 1])  # the next layer reads across


def test_closed_heads_may_differ_by_pair_and_are_data(model):
    x, gate = images(), symmetric_gate(jnp.array([0.7]))
    traces = []

    @jax.jit
    def closed_in(model, closed):
        traces.append(closed.shape)
        return model(x, T, Y, gate, edit=close_heads(closed))

    free, coupled = run(model, x), run(model, x, gate)
    mixed = closed_in(model, jnp.array([[True, True], [False, False]]))
    close(mixed[:, 0], free[:, 0], 1e-5)
    close(mixed[:, 1], coupled[:, 1], 1e-5)
    one = closed_in(model, jnp.array([[True, False], [True, False]]))
    close(one, run(model, x, gate, None, close_heads([0])), 1e-5)
    assert traces == [(2, 2)]
    close(run(model, x, None, None, close_heads(np.array([True, False]))), free)


def test_sharing_nothing_is_the_identity_and_sharing_all_makes_replicas_read_alike(model):
    x = images(3)
    nothing = chain(*(share(name, 0.0) for name in "qkv"))
    np.testing.assert_array_equal(run(model, x, None, None, nothing), run(model, x))
    everything = chain(*(share(name, 1.0) for name in "qkv"))
    taps = run(model, x, None, keep("attn_out"), everything)[1]["attn_out"]
    close(taps, np.broadcast_to(np.asarray(taps)[:, :1], taps.shape))
    assert np.abs(run(model, x, None, keep("attn_out"))[1]["attn_out"][:, 0] - taps[:, 0]).max() > 1e-3


def test_sharing_by_pair_and_its_mean_and_difference(model):
    """The mean over replicas stays; their differences shrink by (1 - w) / (1 + (R - 1) w)."""
    x = images(3)
    before = run(model, x, None, keep("k"))[1]["k"][1]
    weight = jnp.array([0.0, 0.3])
    after = jax.jit(lambda m, w: m(x, T, Y, tap=keep("k"), edit=share("k", w, [1])))(model, weight)[1]["k"][1]
    close(after.mean(0), before.mean(0))
    rho = np.asarray((1 - weight) / (1 + 2 * weight))[:, None, None, None]
    close(after[0] - after[1], rho * (before[0] - before[1]))


@pytest.mark.parametrize("kind", ["joint", "blend", "convex"])
def test_sharing_keys_and_values_is_the_gate_to_first_order(model, kind):
    """docs/theory.md, section 6: the queries' part of the difference is not coupled by either. Convex gates do the same
    at the coupling of equal gain."""
    x = images()
    x = x.at[1].set(x[0] + 0.01 * x[1])
    shared = chain(share("k", 0.6), share("v", 0.6))
    gate = symmetric_gate(coupling_at(rho(jnp.array([0.6])), kind))
    a, b, free = run(model, x, None, None, shared), run(model, x, gate, kind=kind), run(model, x)
    close(a[0] - a[1], b[0] - b[1], 1e-3)
    assert np.abs((a - free)[0] - (a - free)[1]).max() > 0.05 * np.abs(free[0] - free[1]).max()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: close_heads([2]), "no head 2: there are 2"),
        (lambda: close_heads([0], [-1]), "layers count from 0"),
        (lambda: close_heads(np.zeros(3, bool)), r"closed heads \(3,\) are neither \(2,\) nor \(2, 2\)"),
        (lambda: share("pattern", 1.0), "q, k or v can be shared, not 'pattern'"),
        (lambda: share("q", -0.1), "coupling must be finite and >= 0"),
        (lambda: share("q", jnp.ones(3)), r"weight \(3,\) is neither a scalar nor one for each of 2 pairs"),
    ],
)
def test_what_cannot_be_closed_or_shared_is_told(model, make, message):
    with pytest.raises(ValueError, match=message):
        run(model, images(), symmetric_gate(jnp.array([0.3])), None, make())
