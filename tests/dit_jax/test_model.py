"""The network against the official PyTorch code's numbers, and the laws of its architecture.

The recorded model (tests/data/tiny_xl_like.pt) has random, non-zero tensors everywhere, so every path matters.
"""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_jax.model as model_module
from dit_jax.attention import symmetric_gate
from dit_jax.checkpoint import abstract_model, assemble, save_model, weight_shapes
from dit_jax.config import VARIANTS, DiTConfig, variant
from dit_jax.disk import CheckpointError
from dit_jax.inside import keep
from dit_jax.model import DiT, LayerNorm, Options, patchify, position_embedding, timestep_features, unpatchify
from dit_jax.weights import convert

DATA = Path(__file__).parents[1] / "data"
DEPTH = 4
INSIDE = {"norm1": "norm1", "attn": "attn_out", "norm2": "norm2", "mlp": "mlp_out", "adaLN_modulation": "adaln"}
RECORDED = [
    *("x_embedder_out", "t_embedder_out", "y_embedder_out", "c", "final_layer_out", "out"),
    *(f"hidden{i}" for i in range(DEPTH + 1)),
    *(f"block{i}_{name}_out" for i in range(DEPTH) for name in INSIDE),
]


@pytest.fixture(scope="module")
def refs():
    with np.load(DATA / "refs_tiny.npz") as file:
        return dict(file)


@pytest.fixture(scope="module")
def tiny():
    return convert(DATA / "tiny_xl_like.pt", num_heads=6, num_classes=10, prediction="epsilon")


def build(tiny, dtype="float32") -> DiT:
    return assemble(dataclasses.replace(tiny.config, dtype=dtype), tiny.weights)


def nhwc(image: np.ndarray) -> np.ndarray:
    return image.transpose(0, 2, 3, 1)


def inputs(refs, dtype="float32"):
    return jnp.asarray(nhwc(refs["x"]), dtype), jnp.asarray(refs["t"]), jnp.asarray(refs["y"])


run_jitted = nnx.jit(lambda model, x, t, y: model(x, t, y))


def everything(model: DiT, x, t, y) -> dict[str, np.ndarray]:
    """Every recorded quantity, by its recorded name."""

    @nnx.jit
    def run(model, x, t, y):
        out, taps = model(
            x, t, y, tap=lambda _, named: {k: named[k] for k in ("resid_pre", "resid_post", *INSIDE.values())}
        )
        c = model.condition(t, y)
        named = {
            "x_embedder_out": model.x_embedder(patchify(x, model.config.patch_size)),
            "t_embedder_out": model.t_embedder(t),
            "y_embedder_out": model.y_embedder(y),
            "c": c,
            "final_layer_out": model.final_layer(taps["resid_post"][-1, 0], c),
            "out": out,
            "hidden0": taps["resid_pre"][0, 0],
        }
        for i in range(DEPTH):
            named[f"hidden{i + 1}"] = taps["resid_post"][i, 0]
            for theirs, ours in INSIDE.items():
                named[f"block{i}_{theirs}_out"] = taps[ours][i] if ours == "adaln" else taps[ours][i, 0]
        return named

    return jax.tree.map(np.asarray, run(model, x, t, y))


def reference(refs, name: str, suffix: str) -> np.ndarray:
    if name.startswith("hidden"):
        return refs["hidden" + suffix][int(name[len("hidden") :])]
    return nhwc(refs[name + suffix]) if name == "out" else refs[name + suffix]


def deviation(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Largest difference of each batch element, in units of max|theirs| over the batch."""
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return np.abs(ours - theirs).reshape(len(theirs), -1).max(1) / np.abs(theirs).max()


def float32_tolerance(t: np.ndarray) -> np.ndarray:
    """The float32 sinusoid of a large timestep is ill-conditioned: 3e-5 between any two implementations at t = 999."""
    assert np.all((t <= 10) | (t >= 500))
    return np.where(t <= 10, 5e-6, 5e-5)


@pytest.fixture(scope="module")
def float32_run(refs, tiny):
    return everything(build(tiny), *inputs(refs))


@pytest.fixture(scope="module")
def float64_run(refs, tiny):
    """Float64 all through, but for the recorded float32 table of timestep sinusoids, as in the recorded numbers."""
    table = dict(zip(refs["tfreq_t"].tolist(), refs["tfreq_f32"].astype(np.float64), strict=True))
    rows = np.stack([table[float(t)] for t in refs["t"]])
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(model_module, "timestep_features", lambda t, dtype, _: jnp.asarray(rows, dtype))
        return everything(build(tiny, "float64"), *inputs(refs, "float64"))


@pytest.mark.parametrize("name", RECORDED)
def test_float32_parity(refs, float32_run, name):
    assert np.all(deviation(float32_run[name], reference(refs, name, "_f32")) <= float32_tolerance(refs["t"]))


@pytest.mark.parametrize("name", RECORDED)
def test_float64_parity(refs, float64_run, name):
    assert deviation(float64_run[name], reference(refs, name, "_f64")).max() <= 1e-10


def test_float64_parity_with_float64_sinusoids(refs, tiny, x64):
    out = run_jitted(build(tiny, "float64"), *inputs(refs, "float64"))
    assert deviation(np.asarray(out), nhwc(refs["out_f64_sin64"])).max() <= 1e-10


def test_float32_tolerance_sees_the_wrong_gelu(refs, tiny, monkeypatch):
    monkeypatch.setattr(model_module.nnx, "gelu", lambda x, approximate: jax.nn.gelu(x, approximate=False))
    out = jax.jit(lambda x, t, y: build(tiny)(x, t, y))(*inputs(refs))  # traced anew, under the patch
    found = deviation(np.asarray(out), nhwc(refs["out_f32"]))
    assert np.all(found > 2 * float32_tolerance(refs["t"]))


@pytest.mark.parametrize(("dtype", "at_0", "at_999"), [("float32", 1e-7, 1e-4), ("float64", 1e-15, 1e-12)])
def test_timestep_features(refs, x64, dtype, at_0, at_999):
    """Cosines first, frequencies 10000^(-i/128); the error grows with the angle."""
    t = refs["tfreq_t"]
    ours = np.asarray(timestep_features(jnp.asarray(t, dtype), jnp.dtype(dtype)))
    theirs = refs["tfreq_f32" if dtype == "float32" else "tfreq_f64"]
    assert ours.dtype == theirs.dtype
    assert np.all(np.abs(ours - theirs).max(1) <= at_0 + (at_999 - at_0) * t / 999)


def test_position_embedding_formula_is_the_stored_one(refs):
    ours = position_embedding(4, 96)
    np.testing.assert_allclose(ours, refs["pos_embed"][0], rtol=0, atol=1e-7)
    grid = ours.reshape(4, 4, 96)
    assert np.array_equal(grid[0, :, :48], grid[3, :, :48])  # the first half knows the column only
    assert np.array_equal(grid[:, 0, 48:], grid[:, 3, 48:])  # the last half the row only


def test_dropped_labels_take_the_null_row(refs, tiny):
    model = build(tiny)
    labels = np.where(refs["drop_force_ids"] == 1, model.config.num_classes, refs["drop_labels"])
    np.testing.assert_array_equal(model.y_embedder(jnp.asarray(labels)), refs["drop_y_emb_f32"])


def test_untrained_model_is_zero_and_its_blocks_are_the_identity(tiny):

    @jax.jit
    def run(x, t, y):
        model = DiT(tiny.config, nnx.Rngs(0))
        return model(x, t, y, tap=lambda _, named: (named["resid_pre"], named["resid_post"]))

    x = np.random.default_rng(1).standard_normal((2, 8, 8, 4), np.float32)
    out, (before, after) = run(x, np.array([3, 900]), np.array([0, 10]))
    assert np.array_equal(out, np.zeros((2, 8, 8, 8)))
    assert np.array_equal(before, after)
    assert np.ptp(before) > 1


def test_initialisation():
    """Xavier uniform linears with zero biases; normal(0.02) labels and timestep linears; zero adaLN and output."""
    config = DiTConfig(input_size=8, hidden_size=96, depth=2, num_heads=6, num_classes=300)
    state = jax.jit(lambda: nnx.state(DiT(config, nnx.Rngs(0))))()
    weights = {".".join(path): np.asarray(v[...]) for path, v in nnx.to_flat_state(state)}
    for path, array in weights.items():
        if path.endswith("bias") or "adaln" in path or path.startswith("final_layer"):
            assert not array.any(), path
        elif path.startswith(("t_embedder", "y_embedder")):
            assert abs(array.std() / 0.02 - 1) < 0.02, path
        elif path.endswith("kernel"):
            bound = np.sqrt(6 / sum(array.shape[-2:]))
            assert 0.99 * bound < np.abs(array).max() <= bound, path
            assert abs(array.std() / (bound / np.sqrt(3)) - 1) < 0.03, path
    qkv = weights["blocks.attn.qkv.kernel"]
    assert not np.array_equal(qkv[0], qkv[1])


@pytest.mark.parametrize(
    ("name", "count"),
    [("DiT-XL/2", 675_129_632), ("DiT-L/2", 458_102_816), ("DiT-B/2", 130_512_416), ("DiT-S/2", 32_963_360)],
)
def test_parameter_counts(name, count):
    assert sum(np.prod(shape) for shape in weight_shapes(variant(name)).values()) == count


def abstract_output(config: DiTConfig, batch: int, **options):
    image = jax.ShapeDtypeStruct((batch, config.input_size, config.input_size, config.in_channels), jnp.float32)
    index = jax.ShapeDtypeStruct((batch,), jnp.int32)
    call = partial(DiT.__call__, **options)
    return nnx.eval_shape(lambda model, x, t, y: call(model, x, t, y), abstract_model(config), image, index, index)


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_has_the_official_output_shape(name):
    out = abstract_output(variant(name), batch=2)
    assert (out.shape, out.dtype) == ((2, 32, 32, 8), jnp.float32)


def test_output_without_learned_variance_has_the_input_channels():
    config = DiTConfig(
        input_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=2, num_classes=2, learn_sigma=False
    )
    assert abstract_output(config, batch=1).shape == (1, 4, 4, 3)


@pytest.mark.parametrize(
    "entry",
    [
        {"depth": 0},
        {"depth": 2.0},
        {"num_heads": True},
        {"num_heads": 7},
        {"patch_size": 5},
        {"learn_sigma": "no"},
        {"learn_sigma": 1},
        {"mlp_ratio": "4"},
        {"mlp_ratio": 0.0},
        {"mlp_ratio": float("nan")},
        {"mlp_ratio": float("inf")},
        {"prediction": "noise"},
        {"prediction": "velocity"},  # without a path
        {"path": "straight"},
        {"timestep_convention": "reversed"},  # without a path
        {"dtype": "float16"},
    ],
)
def test_a_config_out_of_its_domain_is_refused_by_name(entry):
    with pytest.raises(ValueError, match=next(iter(entry))):
        DiTConfig(**entry)


@pytest.mark.parametrize("shape", [(8, 8, 4), (1, 1, 1, 8, 8, 4), (2, 4, 8, 8), (2, 16, 8, 4), (2, 8, 8, 3)])
def test_wrong_images_are_refused(tiny, shape):
    model = abstract_model(tiny.config)
    with pytest.raises(ValueError, match=r"images \(N, 8, 8, 4\)"):
        model(jnp.zeros(shape), jnp.zeros(2, int), jnp.zeros(2, int))


@pytest.mark.parametrize("label", [-1, 11])
def test_labels_out_of_range_are_refused(tiny, label):
    """Unless they are traced; the null label, 10 here, is one of them."""
    model = abstract_model(tiny.config)
    with pytest.raises(ValueError, match="labels must be from 0 to 10"):
        model.condition(jnp.zeros(2), jnp.array([10, label]))


def test_gate_without_replicas_is_refused(tiny):
    with pytest.raises(ValueError, match=r"\(R, N, H, W, C\)"):
        abstract_model(tiny.config)(jnp.zeros((2, 8, 8, 4)), jnp.zeros(2, int), jnp.zeros(2, int), jnp.eye(2)[None])


def test_bfloat16_is_close_to_float32(refs, tiny, float32_run):
    """Eight bits of mantissa through four blocks: 2% of the largest output, and not bit-equal to float32."""
    out = np.asarray(run_jitted(build(tiny, "bfloat16"), *inputs(refs)))
    found = deviation(out, float32_run["out"])
    assert out.dtype == np.float32
    assert 1e-4 < found.max() < 2e-2


def test_scan_is_the_loop_over_its_blocks(refs, tiny, float32_run):

    @nnx.jit
    def loop(model, x, t, y):
        graph, stacked = nnx.split(model.blocks)
        options = Options("joint", "explicit", None)
        h, c = model.embed(x)[None], model.condition(t, y)
        for i in range(DEPTH):
            h, _ = nnx.merge(graph, jax.tree.map(lambda a, i=i: a[i], stacked))(i, h, c, None, options)
        return unpatchify(model.final_layer(h, c), 2)[0], model(x, t, y, unroll=DEPTH)

    for out in loop(build(tiny), *inputs(refs)):
        assert deviation(np.asarray(out), float32_run["out"]).max() < 5e-6


def test_an_unstacked_model_is_the_same_function(refs, tiny, float32_run, tmp_path):
    x, t, y = inputs(refs)
    model = build(tiny)
    unstacked = model.unstacked()
    assert unstacked.unstacked() is unstacked
    assert deviation(np.asarray(run_jitted(unstacked, x, t, y)), float32_run["out"]).max() < 5e-6
    gate = symmetric_gate(jnp.arange(DEPTH) / DEPTH)[:, None]  # of each layer
    both = jnp.stack([x, x[::-1]])
    tap = keep("attn_out", "pattern")
    (a, tapped), (b, stacked) = (nnx.jit(lambda m: m(both, t, y, gate, tap=tap))(m) for m in (unstacked, model))
    np.testing.assert_allclose(a, b, atol=5e-6 * np.abs(b).max())
    for name in tapped:
        np.testing.assert_allclose(tapped[name], stacked[name], atol=5e-6 * np.abs(stacked[name]).max())
    with pytest.raises(CheckpointError, match="unstacked"):
        save_model(unstacked, tmp_path / "model")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_activations_are_in_the_compute_dtype_whatever_the_x64_mode(x64, dtype):
    """But for the attention pattern, which never goes below float32; so neither does the output."""
    config = DiTConfig(input_size=4, hidden_size=8, depth=2, num_heads=2, num_classes=2, dtype=dtype)
    out, named = abstract_output(config, batch=1, tap=lambda _, named: named)
    wide = jnp.promote_types(dtype, jnp.float32)
    assert out.dtype == named.pop("pattern").dtype == wide
    assert {name: value.dtype for name, value in named.items()} == dict.fromkeys(named, jnp.dtype(dtype))


def test_uncoupled_replicas_are_single_runs(refs, tiny):
    x, t, y = inputs(refs)
    other = jax.random.normal(jax.random.key(0), x.shape)
    both = np.asarray(run_jitted(build(tiny), jnp.stack([x, other]), t, y))
    for replica, alone in zip(both, (x, other), strict=True):
        assert deviation(replica, np.asarray(run_jitted(build(tiny), alone, t, y))).max() < 5e-6


@given(
    grid=st.integers(1, 4),
    patch=st.integers(1, 4),
    channels=st.integers(1, 3),
    lead=st.lists(st.integers(1, 3), max_size=2),
)
@settings(max_examples=6, deadline=None)
def test_unpatchify_inverts_patchify(grid, patch, channels, lead):
    image = np.arange(np.prod([*lead, (grid * patch) ** 2 * channels])).reshape(
        *lead, grid * patch, grid * patch, channels
    )
    patches = patchify(jnp.asarray(image), patch)
    assert patches.shape == (*lead, grid**2, patch**2 * channels)
    np.testing.assert_array_equal(unpatchify(patches, patch), image)
    np.testing.assert_array_equal(  # tokens row-major; in a patch, rows outer and channels inner
        patches[..., -1, :].reshape(*lead, patch, patch, channels), image[..., -patch:, -patch:, :]
    )


def test_layer_norm_keeps_its_digits_beside_a_large_mean():
    """At |mean| / std = 100, E[x^2] - E[x]^2 in float32 would be off by 4e-3."""
    x = 100 + np.random.default_rng(0).standard_normal((64, 1152))
    exact = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
    assert np.abs(np.asarray(LayerNorm()(jnp.asarray(x, jnp.float32))) - exact).max() < 1e-4


@pytest.mark.parametrize("attention", ["explicit", "fused"])
def test_matrix_products_ask_for_full_float32(attention):
    """So that no device computes them in TF32, in the network or in its attention."""
    config = DiTConfig(input_size=4, hidden_size=8, depth=1, num_heads=2, num_classes=2)
    call = jax.jit(lambda x, t, y: DiT(config, nnx.Rngs(0))(x, t, y, attention=attention))
    text = call.lower(jnp.zeros((1, 4, 4, 4)), jnp.zeros(1), jnp.zeros(1, int)).as_text()
    products = [line for line in text.splitlines() if "dot_general" in line]
    assert len(products) == 1 + 2 + 5 + 2 + 2  # patches, timestep, block's linears, attention, final layer
    assert all("[HIGHEST, HIGHEST]" in line for line in products)
