"""SiT's network against the official PyTorch code's numbers (SiT 947f95b): its weights converted, and run.

The recorded model has random, non-zero tensors everywhere. Times are in [0, 1], where float32 sinusoids lose nothing.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from official import load, nhwc, sit_model, sit_state_dict

from dit_jax.checkpoint import load_model, save_weights
from dit_jax.diffusion import guided_output
from dit_jax.export import export_model
from dit_jax.facts import Facts
from dit_jax.model import DiT, patchify, timestep_features
from dit_jax.verify import compare_stages, report
from dit_jax.weights import NOTE_HALF, WeightsError, convert, convert_entries

DEPTH, CHANNELS, PATCH = 3, 4, 2
TOLD = {"prediction": "velocity", "path": "linear", "num_heads": 6, "num_classes": 10}
STAGES = ("x_embedder_out", "t_embedder_out", "y_embedder_out", "hidden", "final_layer_out", "out")


@pytest.fixture(scope="module")
def refs():
    return load("refs_sit_tiny")


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    """The recorded model as its authors' script saves it, but for the arguments."""
    state = {key: torch.tensor(array) for key, array in sit_state_dict().items()}
    path = tmp_path_factory.mktemp("sit") / "SiT.pt"
    torch.save(state, path)
    return path


def official(refs, name, suffix):
    """A recorded stage in our layout. The final layer's has 2 x 4 channels in each place of a patch, of which SiT uses
    the first four."""
    found = refs[name + suffix]
    if name == "final_layer_out":
        found = found.reshape(*found.shape[:-1], PATCH**2, 2, CHANNELS)[..., 0, :].reshape(*found.shape[:-1], -1)
    return nhwc(found) if "out" in name and found.shape[-2:] == (8, 8) else found


def deviation(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


def stages(model: DiT, x, t, y):
    out, taps = model(x, t, y, tap=lambda _, named: (named["resid_pre"][0], named["resid_post"][0]))
    return {
        "x_embedder_out": model.x_embedder(patchify(x, PATCH)),
        "t_embedder_out": model.t_embedder(t),
        "y_embedder_out": model.y_embedder(y),
        "hidden": jnp.concatenate([taps[0][:1], taps[1]]),
        "final_layer_out": model.final_layer(taps[1][-1], model.condition(t, y)),
        "out": out,
    }


def run(refs, dtype):
    x, t = (jnp.asarray(refs[key], dtype) for key in ("x", "t"))
    traced = jax.jit(lambda *inputs: stages(*inputs))  # anew, for the sinusoids may be others
    return jax.device_get(traced(sit_model(dtype), jnp.moveaxis(x, 1, -1), t, jnp.asarray(refs["y"])))


@pytest.fixture(scope="module")
def float32_run(refs):
    return run(refs, "float32")


@pytest.mark.parametrize("name", STAGES)
def test_float32_parity(refs, float32_run, name):
    assert deviation(float32_run[name], official(refs, name, "_f32")) <= 5e-6


def test_float64_parity(refs, x64):
    found = run(refs, "float64")
    for name in ("t_embedder_out", "out"):
        assert deviation(found[name], official(refs, name, "_f64s")) <= 1e-10


@pytest.fixture
def float32_sinusoids(refs, x64, monkeypatch):
    """Sinusoids of the recorded times as they were recorded in float32, in a model that is otherwise float64."""
    table = dict(zip(refs["tfreq_t"].tolist(), refs["tfreq_f32"].astype(np.float64), strict=True))
    times = [float(refs[key][i]) for key, chosen in KNOWN.items() for i in chosen]
    known, rows = jnp.array(times), jnp.array([table[t] for t in times])

    def features(t, dtype, _):
        return rows[jnp.argmin(jnp.abs(t[:, None] - known), 1)].astype(dtype)

    monkeypatch.setattr("dit_jax.model.timestep_features", features)


KNOWN = {"t": [0, 2, 3], "cfg_t": [0]}  # images at the times whose sinusoids are recorded


def test_float64_parity_inside(refs, float32_sinusoids):
    found = run(refs, "float64")
    assert deviation(found["hidden"][:, KNOWN["t"]], refs["hidden_f64"][:, KNOWN["t"]]) <= 1e-10
    assert deviation(found["out"][KNOWN["t"]], nhwc(refs["out_f64"])[KNOWN["t"]]) <= 1e-10


def test_sinusoids_and_their_embedding(refs, x64):
    for dtype, suffix, limit in (("float32", "_f32", 5e-6), ("float64", "_f64s", 1e-10)):
        t = jnp.asarray(refs["tfreq_t"], dtype)
        assert deviation(np.asarray(timestep_features(t, dtype)), refs["tfreq" + suffix]) <= limit
        assert (
            deviation(np.asarray(nnx.jit(lambda m, t: m.t_embedder(t))(sit_model(dtype), t)), refs["temb" + suffix])
            <= limit
        )


def guided(refs, dtype, scale, channels):
    """The half of their doubled batch that is kept."""
    x, t = (jnp.asarray(refs[key][:2], dtype) for key in ("cfg_x", "cfg_t"))
    labels = jnp.asarray(refs["cfg_y"][:2])
    run = jax.jit(lambda m, *a: guided_output(m, *a, scale=scale, channels=channels))
    return np.asarray(run(sit_model(dtype), jnp.moveaxis(x, 1, -1), t, labels))


@pytest.mark.parametrize("scale", [4, 1.5])
def test_guidance_is_official_on_three_channels_and_not_on_four(refs, scale):
    theirs = nhwc(refs[f"cfg_out_s{scale}_f32"])[:2]
    assert deviation(guided(refs, "float32", scale, "official"), theirs) <= 5e-6
    every = guided(refs, "float32", scale, "all")
    assert deviation(every, theirs) > 1e-2
    if scale == 4:
        assert deviation(every, nhwc(refs["cfg_out_s4_ALL4CH_wrong_f32"])[:2]) <= 5e-6


def test_guidance_in_float64(refs, float32_sinusoids):
    found, theirs = guided(refs, "float64", 4, "official"), nhwc(refs["cfg_out_s4_f64"])
    assert deviation(found[KNOWN["cfg_t"]], theirs[KNOWN["cfg_t"]]) <= 1e-10


# --- the file


def test_the_unused_half_of_the_outputs_is_left_out_and_told(file):
    found = convert(file, **TOLD)
    assert (found.config.learn_sigma, found.config.path, found.config.prediction) == (False, "linear", "velocity")
    assert NOTE_HALF in found.notes
    linear = sit_state_dict()["final_layer.linear.weight"].reshape(PATCH**2, 2, CHANNELS, -1)
    np.testing.assert_array_equal(
        found.weights["final_layer.linear.kernel"].T, linear[:, 0].reshape(PATCH**2 * CHANNELS, -1)
    )
    half = sit_state_dict() | {"final_layer.linear.weight": linear[:, 0].reshape(PATCH**2 * CHANNELS, -1)}
    half["final_layer.linear.bias"] = half["final_layer.linear.bias"].reshape(PATCH**2, 2, CHANNELS)[:, 0].ravel()
    config, weights = convert_entries(half, "half", Facts(**TOLD))
    assert config == found.config
    for name, array in weights.items():
        np.testing.assert_array_equal(array, found.weights[name])


def test_a_diffusion_keeps_its_variance(file):
    found = convert(file, **{**TOLD, "prediction": "epsilon", "path": "ddpm"})
    assert found.config.learn_sigma
    assert NOTE_HALF not in found.notes


def test_a_final_layer_of_unequal_halves_is_no_unused_half(file):
    odd = sit_state_dict()
    odd["final_layer.linear.bias"] = odd["final_layer.linear.bias"][:16]
    with pytest.raises(WeightsError, match=r"misshapen: final_layer.linear.weight is \(32, 96\), expected \(16, 96\)"):
        convert_entries(odd, "odd", Facts(**TOLD))


def test_it_passes_verification_and_comes_back_from_an_export(file, tmp_path):
    found = convert(file, **TOLD)
    save_weights(found.config, found.weights, tmp_path / "model", extra=found.provenance)
    model = load_model(tmp_path / "model")
    assert report(compare_stages(file, model), DEPTH)[1]  # pyright: ignore[reportArgumentType]
    export_model(tmp_path / "model", tmp_path / "out.safetensors")
    back = convert(tmp_path / "out.safetensors")
    assert back.config == found.config
    for name, array in back.weights.items():
        np.testing.assert_array_equal(array, found.weights[name])


# --- REPA's networks: the same layers in a time that runs from data to noise


def repa_state_dict():
    """The recorded weights as an early file of REPA would hold them: four outputs, projectors behind the first block,
    and the later blocks numbered on their own."""
    state = sit_state_dict()
    for part in ("weight", "bias"):
        array = state[f"final_layer.linear.{part}"]
        state[f"final_layer.linear.{part}"] = array.reshape(PATCH**2, 2, CHANNELS, -1)[:, 0].reshape(
            16, *array.shape[1:]
        )
    for key in [key for key in state if key.startswith(("blocks.1.", "blocks.2."))]:
        _, number, rest = key.split(".", 2)
        state[f"decoder_blocks.{int(number) - 1}.{rest}"] = state.pop(key)
    return state | {
        f"projectors.0.{i}.{part}": np.ones(2, np.float32) for i in (0, 2, 4) for part in ("weight", "bias")
    }


def saved(path, state, **beside):
    torch.save({"ema": {key: torch.tensor(array) for key, array in state.items()}, **beside}, path)
    return path


def test_a_file_of_repa_gives_the_same_weights_in_the_other_time(file, tmp_path):
    args = argparse.Namespace(path_type="linear", prediction="v", encoder_depth=1, num_classes=10, qk_norm=False)
    source = saved(tmp_path / "repa.pt", repa_state_dict(), args=args, steps=400000)
    found, sit = convert(source, num_heads=6), convert(file, **TOLD)
    assert found.config == dataclasses.replace(sit.config, timestep_convention="reversed")
    for name, array in found.weights.items():
        np.testing.assert_array_equal(array, sit.weights[name])
    (note,) = [note for note in found.notes if "left out" in note]
    assert note.count("projectors.0.") == 6
    save_weights(found.config, found.weights, tmp_path / "model", extra=found.provenance)
    model = load_model(tmp_path / "model")
    assert report(compare_stages(source, model), DEPTH)[1]  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("prediction", "sign"), [("velocity", -1), ("epsilon", 1), ("x0", 1)])
def test_time_runs_the_other_way_and_a_velocity_with_it(refs, prediction, sign, x64):
    sit = sit_model("float64", prediction=prediction)
    repa = sit_model("float64", prediction=prediction, timestep_convention="reversed")
    x, y = jnp.asarray(nhwc(refs["x"]), jnp.float64), jnp.asarray(refs["y"])
    t = jnp.array([0, 0.137, 0.5, 0.96])
    run = nnx.jit(lambda model, t: model(x, t, y))
    np.testing.assert_allclose(run(repa, t), sign * run(sit, 1 - t), rtol=0, atol=1e-12)


def test_projectors_ask_for_the_time(tmp_path):
    source = saved(tmp_path / "repa.pt", repa_state_dict())
    with pytest.raises(WeightsError) as caught:
        convert(source, num_heads=6, num_classes=10, prediction="velocity")
    assert "--timestep-convention reversed" in str(caught.value)
    assert "--path linear|gvp|vp" in str(caught.value)  # and all else that is not told
    found = convert(source, **TOLD, timestep_convention="official")
    assert found.config.timestep_convention == "official"
    assert convert(source, **{**TOLD, "prediction": "epsilon", "path": "ddpm"}).config.path == "ddpm"


@pytest.mark.parametrize("key", ["projectors.0.weight", "projectors.a.0.weight", "projector.0.0.weight", "projectors"])
def test_other_keys_are_unexpected_still(key):
    with pytest.raises(WeightsError, match=f"unexpected: {key}"):
        convert_entries(sit_state_dict() | {key: np.ones(2, np.float32)}, "odd", Facts(**TOLD))


def test_normalised_queries_and_keys_are_refused_by_name():
    odd = sit_state_dict()
    odd |= {
        f"blocks.{i}.attn.{n}_norm.{p}": np.ones(16, np.float32)
        for i in range(3)
        for n in "qk"
        for p in ("weight", "bias")
    }
    with pytest.raises(WeightsError, match=r"qk_norm: blocks.\*.attn.q_norm and k_norm") as caught:
        convert_entries(odd, "odd", Facts(**TOLD))
    assert str(caught.value).count("\n") == 1


def test_the_schedule_has_no_reversed_time(file):
    with pytest.raises(WeightsError, match="'reversed' needs a path of flow matching"):
        convert(file, num_heads=6, num_classes=10, prediction="epsilon", timestep_convention="reversed")
