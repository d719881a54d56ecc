"""What shapes do not tell: it is asked for by option, taken from what the file says, and never contradicted."""

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch
from hostile import CONFIG, DIFFUSERS, OFFICIAL, TOLD, refused, tensors
from safetensors.numpy import save_file
from test_fuzz import diffusers_entries

from dit_jax.checkpoint import load_manifest, load_weights, save_weights, shipped_model
from dit_jax.config import DiTConfig, variant
from dit_jax.export import export_model
from dit_jax.facts import METADATA, Facts, token_grid
from dit_jax.infer import infer_config
from dit_jax.model import position_embedding
from dit_jax.weights import WeightsError, convert, convert_entries, source_shapes

WITHOUT = {name: {key: value for key, value in TOLD.items() if key != name} for name in TOLD}


@pytest.fixture
def plain(tmp_path):
    """The model in a form that says nothing of it beside its shapes."""
    torch.save(tensors(), tmp_path / "model.pt")
    return tmp_path / "model.pt"


def problems(path, **options) -> list[str]:
    with pytest.raises(WeightsError, match="cannot be converted") as caught:
        convert(path, **options)
    return [line.strip() for line in str(caught.value).splitlines()[1:]]


def saved(path, content):
    torch.save(content, path)
    return path


# --- questions


@pytest.mark.parametrize("name", TOLD)
def test_each_thing_that_shapes_do_not_tell_is_asked_for_by_its_option(plain, name):
    (line,) = problems(plain, **WITHOUT[name])
    assert line.startswith(f"cannot tell {name}")
    assert f"--{name.replace('_', '-')}" in line


def test_all_questions_are_asked_at_once(plain):
    assert len(problems(plain)) == len(TOLD)
    assert convert(plain, **TOLD).config == CONFIG


@pytest.mark.parametrize("prediction", ["epsilon", "v", "x0"])
def test_the_prediction_that_is_given_is_kept(plain, prediction):
    assert convert(plain, **{**TOLD, "prediction": prediction}).config.prediction == prediction


def test_predictions_that_cannot_be_run_are_refused():
    with pytest.raises(WeightsError, match="it predicts 'the future'; only epsilon"):
        convert_entries(OFFICIAL, "file", Facts(**{**TOLD, "prediction": "the future"}))


def test_the_released_network_needs_its_prediction_alone():
    """Its sizes are official, its label rows those of ImageNet, its positions those of the formula."""
    config = variant("DiT-XL/2")
    shapes = source_shapes(config)
    grid = (16, 16)
    assert infer_config(shapes, 28, Facts("epsilon"), lambda: grid) == (config, [])
    _, (line,) = infer_config(shapes, 28, Facts(), lambda: grid)
    assert "--prediction epsilon|v|x0|velocity|score" in line


def test_what_is_taken_for_granted_is_told(tmp_path):
    config = variant("DiT-S/8", input_size=16, in_channels=1)
    entries = {key: np.zeros(shape, np.float32) for key, shape in source_shapes(config).items()}
    entries["pos_embed"] = position_embedding(2, config.hidden_size)[None]
    save_file(entries, tmp_path / "model.safetensors")
    found = convert(tmp_path / "model.safetensors", prediction="v")
    assert found.config == dataclasses.replace(config, prediction="v")
    assert [note.split(",")[0] for note in found.notes] == [
        "it is run on the noise schedule of DDPM",
        "6 attention heads",
        "1001 label rows are taken for 1000 classes and the null label",
    ]
    given = convert(tmp_path / "model.safetensors", prediction="v", path="ddpm", num_heads=6, null_label="last")
    assert given.config == found.config
    assert given.notes == ()


def test_heads_are_official_only_with_the_official_depth():
    config = variant("DiT-B/2", depth=6)
    _, (line,) = infer_config(source_shapes(config), 6, Facts("epsilon"), lambda: (16, 16))
    assert "cannot tell num_heads: no official variant has depth 6 and width 768" in line


# --- label rows


@pytest.mark.parametrize(
    ("options", "classes", "null"),
    [
        ({"num_classes": 3}, 3, True),
        ({"num_classes": 4}, 4, False),
        ({"null_label": "last"}, 3, True),
        ({"null_label": "none"}, 4, False),
        ({"num_classes": 4, "null_label": "none"}, 4, False),
    ],
)
def test_four_label_rows_are_what_is_said_of_them(plain, options, classes, null):
    config = convert(plain, **WITHOUT["num_classes"], **options).config
    assert (config.num_classes, config.null_label) == (classes, null)


@pytest.mark.parametrize(
    "options", [{"num_classes": 2}, {"num_classes": 5}, {"num_classes": 4, "null_label": "last"}, {"num_classes": 1000}]
)
def test_label_rows_that_do_not_fit(plain, options):
    (line,) = problems(plain, **WITHOUT["num_classes"], **options)
    assert line.startswith(f"num_classes {options['num_classes']} ")
    assert "4 label rows" in line


def test_a_single_label_row_is_a_class():
    one = {**OFFICIAL, "y_embedder.embedding_table.weight": OFFICIAL["y_embedder.embedding_table.weight"][:1]}
    config, _ = convert_entries(one, "file", Facts(**WITHOUT["num_classes"]))
    assert (config.num_classes, config.null_label) == (1, False)
    with pytest.raises(WeightsError, match="it cannot be the null label"):
        convert_entries(one, "file", Facts(**WITHOUT["num_classes"], null_label="last"))


# --- the grid of tokens


def positions(rows: int, columns: int, width: int = 16, scale: float = 1.0, swapped: bool = False) -> np.ndarray:
    """(rows * columns, width) by the official formula, for any grid; or with its halves swapped."""
    frequencies = 10000.0 ** (-np.arange(width // 4) / (width // 4))

    def half(n):
        angles = scale * np.arange(n)[:, None] * frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], -1)

    row, column = np.repeat(half(rows), columns, 0), np.tile(half(columns), (rows, 1))
    return np.concatenate([row, column] if swapped else [column, row], -1).astype(np.float32)


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("grid", [(4, 4), (2, 8), (8, 2), (1, 16), (3, 5), (1, 1), (2, 2)])
def test_grids_are_read_off_position_embeddings(grid, scale, swapped):
    found = token_grid(positions(*grid, scale=scale, swapped=swapped))
    assert found in ((grid, grid[::-1]) if 1 in grid else (grid,))
    assert token_grid(positions(*grid).astype(np.float16)) in (grid, grid[::-1])


def test_the_formula_here_is_that_of_the_models():
    np.testing.assert_allclose(positions(4, 4), position_embedding(4, 16), atol=1e-6)


@pytest.mark.parametrize("values", ["random", "zero", "shuffled"])
def test_no_grid_is_read_off_other_values(values):
    rng = np.random.default_rng(0)
    found = {
        "random": rng.standard_normal((16, 16)),
        "zero": np.zeros((16, 16)),
        "shuffled": rng.permutation(positions(4, 4)),
    }[values]
    assert token_grid(found) is None


def with_tokens(grid) -> dict:
    return {**OFFICIAL, "pos_embed": positions(*grid, width=CONFIG.hidden_size)[None]}


def test_grids_that_are_no_squares_are_refused_by_their_size():
    """With and without as many tokens as a square has, and whatever size is given."""
    for facts in (Facts(**TOLD), Facts(**WITHOUT["input_size"])):
        for grid in ((2, 8), (8, 2), (3, 5)):
            with pytest.raises(WeightsError, match=f"of {grid[0]} x {grid[1]} tokens, by its values; only square"):
                convert_entries(with_tokens(grid), "file", facts)
    fifteen = {**OFFICIAL, "pos_embed": np.random.default_rng(0).standard_normal((1, 15, 8)).astype(np.float32)}
    with pytest.raises(WeightsError, match="pos_embed has 15 tokens, which make no square"):
        convert_entries(fifteen, "file", Facts(**TOLD))


def test_values_that_are_not_finite_or_too_narrow_tell_no_grid():
    assert token_grid(np.full((16, 16), np.nan)) is None
    assert token_grid(np.ones((16, 1))) is None


def test_a_square_grid_is_told_by_its_values():
    config, _ = convert_entries(with_tokens((4, 4)), "file", Facts(**WITHOUT["input_size"]))
    assert config.input_size == 8
    with pytest.raises(WeightsError, match="input_size 4 does not fit the 4 x 4 tokens of patch 2"):
        convert_entries(with_tokens((4, 4)), "file", Facts(**TOLD))


# --- exports


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize(
    "changes",
    [
        {"prediction": "v", "timestep_convention": "diffusers", "dtype": "bfloat16"},
        {"prediction": "x0", "null_label": False, "num_classes": 4},
        {"prediction": "velocity", "path": "gvp", "learn_sigma": True},
    ],
)
def test_an_export_says_everything(tmp_path, suffix, changes):
    config = dataclasses.replace(CONFIG, **changes)
    _, weights = convert_entries(OFFICIAL, "file", Facts(**TOLD))
    data = {"mean": [0.0], "std": [1.0], "class_names": ["a"]}
    save_weights(config, weights, tmp_path / "model", extra={"data": data})
    export_model(tmp_path / "model", tmp_path / f"out.{suffix}")
    back = convert(tmp_path / f"out.{suffix}")
    assert back.config == config
    assert back.provenance["data"] == data
    assert not [note for note in back.notes if "ancestral" not in note]


def test_a_shipped_model_comes_back_as_it_was(tmp_path):
    """What it predicts, how its images were prepared, and every bit of it."""
    folder = shipped_model("photos16-v")
    export_model(folder, tmp_path / "out.safetensors")
    back = convert(tmp_path / "out.safetensors")
    config, weights, manifest = load_weights(folder)
    assert back.config == config
    assert config.prediction == "v"
    save_weights(back.config, back.weights, tmp_path / "model", extra=back.provenance)
    again = load_manifest(tmp_path / "model")
    assert (again["digest"], again["data"]) == (manifest["digest"], manifest["data"])
    assert weights


def test_the_export_is_a_plain_state_dict_for_pytorch(tmp_path):
    save_weights(CONFIG, convert_entries(OFFICIAL, "file", Facts(**TOLD))[1], tmp_path / "model")
    export_model(tmp_path / "model", tmp_path / "out.pt")
    state = torch.load(tmp_path / "out.pt", weights_only=True)
    assert sorted(state) == sorted(OFFICIAL)
    assert all(isinstance(value, torch.Tensor) for value in state.values())


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"config": {}}', '{"config": {"depth": "a"}, "data": 1}', "[" * 10**5]
)
def test_metadata_that_no_export_wrote_is_refused(tmp_path, text):
    save_file(OFFICIAL, tmp_path / "model.safetensors", metadata={METADATA: text})
    refused(tmp_path / "model.safetensors", "is not what an export writes .* export it again")


# --- what files say, and contradictions


@pytest.mark.parametrize(
    ("arguments", "prediction"),
    [
        ({"prediction": "noise"}, "epsilon"),
        ({"prediction_type": "v_prediction"}, "v"),
        ({"predict_xstart": True}, "x0"),
        ({"diffusion": {"parameters": {"predict_v": True, "predict_xstart": False}}}, "v"),
    ],
)
def test_arguments_of_training_are_understood(tmp_path, arguments, prediction):
    sizes = {"num_heads": 2, "num_classes": 4, "class_dropout_prob": 0.0}
    for made in (argparse.Namespace(**arguments, **sizes), {**arguments, "model": sizes}):
        path = saved(tmp_path / "model.pt", {"model": tensors(), "ema": tensors(), "args": made})
        config = convert(path, input_size=4).config
        assert config == dataclasses.replace(CONFIG, prediction=prediction, num_classes=4, null_label=False)


@pytest.mark.parametrize("prediction", ["velocity", "v"])
def test_flow_matching_is_not_taken_for_a_diffusion(tmp_path, prediction):
    """What REPA's script calls v is the velocity of its path. A DiT with a given prediction is something else."""
    args = argparse.Namespace(prediction=prediction, path_type="Linear", model="SiT-XL/2")
    path = saved(tmp_path / "model.pt", {"ema": tensors(), "args": args})
    config = convert(path, **WITHOUT["prediction"]).config
    assert config == dataclasses.replace(CONFIG, prediction="velocity", path="linear")
    with pytest.raises(WeightsError, match="--prediction v contradicts its args, which says velocity"):
        convert(path, **{**TOLD, "prediction": "v"})
    with pytest.raises(WeightsError, match="--path ddpm contradicts its args, which says linear"):
        convert(path, **WITHOUT["prediction"], path="ddpm")


@pytest.mark.parametrize("prediction", ["velocity", "score"])
def test_networks_of_flow_matching_need_their_path(plain, prediction):
    told = {**TOLD, "prediction": prediction}
    (line,) = problems(plain, **told)
    assert line.startswith("cannot tell path")
    assert "--path linear|gvp|vp" in line
    found = convert(plain, **told, path="gvp")
    assert found.config == dataclasses.replace(CONFIG, prediction=prediction, path="gvp")
    assert "sample with DDIM" in found.notes[0]


def test_the_schedule_that_is_taken_for_granted_is_told(plain):
    assert convert(plain, **TOLD).notes == (
        "it is run on the noise schedule of DDPM, as the released DiTs are (--path)",
    )
    assert convert(plain, **TOLD, path="ddpm").notes == ()


def refused_with(path, options) -> str:
    with pytest.raises(WeightsError) as caught:
        convert(path, **options)
    return str(caught.value)


def test_arguments_that_disagree_say_nothing(tmp_path):
    """Nor do those of another network beside the DiT."""
    disagree = {"model": {"prediction": "v"}, "diffusion": {"prediction": "epsilon"}, "prediction_kind": "x0"}
    for args in (disagree, {"encoder": {"prediction": "v", "num_heads": 4}}):
        path = saved(tmp_path / "model.pt", {"ema": tensors(), "args": args})
        assert "cannot tell prediction" in refused_with(path, WITHOUT["prediction"])
        assert convert(path, **TOLD).config == CONFIG


@pytest.mark.parametrize("key", ["prediction", "prediction_type", "modelspec.prediction_type"])
def test_metadata_of_other_programs_are_heeded(tmp_path, key):
    save_file(OFFICIAL, tmp_path / "model.safetensors", metadata={key: "v", "num_heads": "2", "format": "pt"})
    found = convert(tmp_path / "model.safetensors", num_classes=3, input_size=4)
    assert found.config == dataclasses.replace(CONFIG, prediction="v")
    assert found.notes[0] == "by its safetensors metadata: prediction v, num_heads 2"


def test_what_arguments_said_is_told(tmp_path):
    args = argparse.Namespace(prediction="v", num_heads=2, image_size=256)
    path = saved(tmp_path / "model.pt", {"ema": tensors(), "args": args})
    found = convert(path, num_classes=3, input_size=4)
    assert found.notes[0] == "by its args: prediction v, num_heads 2"


@pytest.fixture
def pipeline(tmp_path):
    """A diffusers pipeline: its transformer, and the scheduler that says what this predicts."""
    folder = tmp_path / "pipeline" / "transformer"
    folder.mkdir(parents=True)
    save_file(diffusers_entries(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({**DIFFUSERS, "num_embeds_ada_norm": 3}))
    (folder.parent / "scheduler").mkdir()
    return folder


@pytest.mark.parametrize(("name", "prediction"), [("epsilon", "epsilon"), ("v_prediction", "v"), ("sample", "x0")])
def test_the_scheduler_of_a_pipeline_says_the_prediction(pipeline, name, prediction):
    scheduler = pipeline.parent / "scheduler" / "scheduler_config.json"
    assert "cannot tell prediction" in refused_with(pipeline, {})
    scheduler.write_text(json.dumps({"_class_name": "DDIMScheduler", "prediction_type": name}))
    assert convert(pipeline).config == dataclasses.replace(CONFIG, prediction=prediction)
    scheduler.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler"}))
    assert convert(pipeline).config == dataclasses.replace(CONFIG, prediction="velocity", path="linear")


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [("num_heads", 4, "2"), ("num_classes", 4, "3"), ("input_size", 8, "4"), ("null_label", "none", "last")],
)
def test_options_do_not_override_a_config_json(pipeline, name, value, said):
    message = refused_with(pipeline, {"prediction": "epsilon", name: value})
    option = "--" + name.replace("_", "-")
    assert f"{option} {value} contradicts its config.json, which says {said}; leave the option out" in message
    same = {"num_heads": 2, "num_classes": 3, "input_size": 4, "null_label": "last"}
    assert convert(pipeline, prediction="epsilon", **{name: same[name]}).config == CONFIG


def test_a_config_json_beside_official_keys_is_heeded(tmp_path):
    save_file(OFFICIAL, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"num_heads": 4, "num_classes": 3}))
    assert convert(tmp_path, prediction="v", input_size=4).config.num_heads == 4
    message = refused_with(tmp_path, {**TOLD, "num_heads": 2})
    assert "--num-heads 2 contradicts its config.json, which says 4" in message


def test_options_do_not_override_an_export(tmp_path):
    save_weights(
        dataclasses.replace(CONFIG, prediction="v"),
        convert_entries(OFFICIAL, "file", Facts(**TOLD))[1],
        tmp_path / "model",
    )
    for suffix in ("pt", "safetensors"):
        export_model(tmp_path / "model", tmp_path / f"out.{suffix}")
        message = refused_with(tmp_path / f"out.{suffix}", {"prediction": "epsilon"})
        assert "--prediction epsilon contradicts its metadata, which says v" in message


def test_a_config_from_before_there_were_networks_without_a_null_label():
    """Manifests and digests of models with a null label are as they were."""
    assert "null_label" not in CONFIG.to_dict()
    assert DiTConfig.from_dict(CONFIG.to_dict()) == CONFIG
    without = dataclasses.replace(CONFIG, null_label=False)
    assert DiTConfig.from_dict(without.to_dict()) == without
