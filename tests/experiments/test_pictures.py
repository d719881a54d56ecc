"""`syncgap sample` from end to end on tiny random networks: the folder, its independence of the batch, bad input."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.checkpoint import load_manifest, load_model, save_model
from dit_jax.config import DiTConfig
from dit_jax.diffusion import network_denoiser, sample
from dit_jax.disk import CheckpointError
from dit_jax.images import to_pixels
from dit_jax.replicas import INITIAL, pair_noise
from experiments import cli
from experiments.frame.subject import untrained_model
from experiments.tools import pictures
from experiments.tools.pictures import PicturesError, draw, sample_pictures
from experiments.tools.settings import SampleConfig
from ou_theory.clock import make_clock

PHOTOS = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=2, num_heads=2, num_classes=10, prediction="v")
LATENTS = DiTConfig(input_size=4, in_channels=4, hidden_size=16, depth=1, num_heads=2, num_classes=1000)
DATA = {"mean": [0.0, 0.1, -0.1], "std": 0.5, "class_names": ["ant", "bee", "cow", *"defghij"]}
QUICK = {"steps": "4", "count": 2}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "photos"
    save_model(untrained_model(PHOTOS, 5), folder, extra={"data": DATA})
    return str(folder)


@pytest.fixture(scope="module")
def latent(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "latent"
    save_model(untrained_model(LATENTS, 5), folder, extra={"source": {"file": "DiT.pt"}})
    return str(folder)


@pytest.fixture
def drawn(monkeypatch):
    """Noise in place of samples, where only the folder matters."""

    def noise(model, clock, config, labels, **options):
        return np.random.default_rng(config.seed).normal(size=(len(labels), 8, 8, 3)).astype(np.float32)

    monkeypatch.setattr(pictures, "draw", noise)


def run(weights, out, **settings):
    return sample_pictures(weights, SampleConfig(**{**QUICK, **settings}), out, progress=False)


def stored(out):
    with np.load(out / "latents.npz") as arrays:
        return arrays["samples"], arrays["labels"]


def test_the_folder(photos, tmp_path, capsys):
    out = tmp_path / "deep" / "out"
    line = ["sample", photos, str(out), "--classes", "cow", "0", "BEE", "--count", "2", "--steps", "4", "--quiet"]
    assert cli.main(line) == 0
    assert f"{out / 'grid.png'} (pixels)" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "latents.npz", "manifest.json"]
    assert [path.name for path in out.parent.iterdir()] == ["out"]

    samples, labels = stored(out)
    assert samples.shape == (3, 2, 8, 8, 3)
    assert samples.dtype == np.float32
    assert labels.dtype == np.int32
    np.testing.assert_array_equal(labels, [2, 0, 1])

    grid = np.asarray(Image.open(out / "grid.png"))
    assert grid.shape == (3 * 10 + 2, 2 * 10 + 2, 3)
    for row in range(3):
        for column in range(2):
            cell = grid[10 * row + 2 : 10 * row + 10, 10 * column + 2 : 10 * column + 10]
            np.testing.assert_array_equal(cell, to_pixels(samples[row, column], DATA["mean"], DATA["std"]))
    assert (grid[:2] == 255).all()
    assert (grid[10:12] == 255).all()

    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["format"] == "syncgap-pictures"
    assert manifest["command"].startswith("syncgap sample ")
    assert manifest["weights_digest"] == load_manifest(photos)["digest"]
    assert manifest["settings"]["classes"] == ["cow", "0", "BEE"]
    assert manifest["settings"]["vae"] is None
    assert manifest["grid"] == {
        "shows": "pixels",
        "rows": [{"label": 2, "name": "cow"}, {"label": 0, "name": "ant"}, {"label": 1, "name": "bee"}],
        "columns": 2,
    }
    assert manifest["versions"]["jax"]


def test_samples_are_those_of_the_library(photos, tmp_path):
    run(photos, tmp_path / "out", classes=("1", "4"), guidance=3.0, seed=7)
    model, clock = load_model(photos), make_clock(4)
    noise = pair_noise(7, jnp.arange(4), INITIAL, (8, 8, 3), replicas=1)[0]
    denoiser = network_denoiser(model, clock, guidance=3.0)
    expected, _ = sample(denoiser, noise, clock, jnp.array([1, 1, 4, 4]))
    found, _ = stored(tmp_path / "out")
    np.testing.assert_allclose(found.reshape(4, 8, 8, 3), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"eta": 1.0}, {"sampler": "ancestral", "guidance": 2.0}])
def test_pictures_do_not_depend_on_the_batch(photos, settings):
    model, labels = load_model(photos), np.array([0, 3, 3, 7], np.int32)
    one, three = (draw(model, make_clock(4), SampleConfig(batch=b, **settings), labels) for b in (1, 3))
    np.testing.assert_allclose(one, three, rtol=2e-6, atol=1e-5)  # an untrained network's samples go up to 30
    assert np.abs(one[1] - one[2]).max() > 0.1  # of one class, but other noise


@pytest.mark.long
def test_every_setting_has_an_effect(photos):
    model, labels = load_model(photos), np.array([0, 1], np.int32)
    settings = (
        SampleConfig(),
        SampleConfig(seed=1),
        SampleConfig(eta=1.0),
        SampleConfig(guidance=4.0),
        SampleConfig(sampler="ancestral"),
    )
    drawn = [draw(model, make_clock(4), config, labels) for config in settings]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            assert np.abs(a - b).max() > 1e-3


def test_official_guidance_leaves_the_fourth_channel_conditional(latent):
    model, labels, clock = load_model(latent), np.array([0, 1], np.int32), make_clock(1)
    plain, official, every = (
        draw(model, clock, config, labels)
        for config in (
            SampleConfig(),
            SampleConfig(guidance=50.0, guided_channels="official"),
            SampleConfig(guidance=50.0),
        )
    )
    np.testing.assert_allclose(official[..., 3], plain[..., 3], rtol=0, atol=1e-5)
    np.testing.assert_allclose(official[..., :3], every[..., :3], rtol=0, atol=1e-5)
    assert np.abs(every[..., 3] - plain[..., 3]).max() > 1e-3


def test_one_compilation_for_all_batches(photos, monkeypatch):
    traced = []
    monkeypatch.setattr(
        pictures, "network_denoiser", lambda *args, **options: traced.append(1) or network_denoiser(*args, **options)
    )
    samples = draw(load_model(photos), make_clock(4), SampleConfig(batch=2), np.zeros(5, np.int32))
    assert len(traced) == 1
    assert np.abs(samples).min(axis=(1, 2, 3)).all()


@pytest.mark.usefixtures("drawn")
def test_by_default_the_first_eight_classes(photos, tmp_path):
    run(photos, tmp_path / "out", count=1)
    np.testing.assert_array_equal(stored(tmp_path / "out")[1], np.arange(8))


def test_latents_without_an_autoencoder_are_a_preview(latent, tmp_path, capsys):
    out = tmp_path / "out"
    line = [
        "sample",
        latent,
        str(out),
        "--classes",
        "golden retriever",
        "88",
        "--count",
        "3",
        "--steps",
        "4",
        "--quiet",
    ]
    assert cli.main(line) == 0
    assert "linear latent preview, not a decoding" in capsys.readouterr().out
    assert stored(out)[0].shape == (2, 3, 4, 4, 4)
    assert np.asarray(Image.open(out / "grid.png")).shape == (2 * 34 + 2, 3 * 34 + 2, 3)
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["grid"]["shows"] == "linear latent preview, not a decoding"
    assert [row["name"] for row in manifest["grid"]["rows"]] == ["golden retriever", "macaw"]
    assert manifest["weights_source"] == {"file": "DiT.pt"}


def test_latents_with_an_autoencoder_are_decoded(latent, tmp_path, monkeypatch):
    def decoder(path):
        assert path == tmp_path / "vae"
        return lambda z: np.full((len(z), 32, 32, 3), 77, np.uint8)

    monkeypatch.setattr(pictures, "vae_decoder", decoder)
    made = run(latent, tmp_path / "out", classes=("0",), vae=tmp_path / "vae")
    assert made["grid"]["shows"] == "VAE decoding"
    assert made["settings"]["vae"] == str(tmp_path / "vae")
    assert np.asarray(Image.open(tmp_path / "out" / "grid.png"))[5, 5, 0] == 77


def test_what_is_missing_is_said_before_any_sampling(photos, latent, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *args, **options: pytest.fail("sampled"))
    with pytest.raises(ValueError, match="decodes latents"):
        run(photos, tmp_path / "out", vae=tmp_path)
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"syncgap\[vae\]"):
        run(latent, tmp_path / "out", vae=tmp_path)
    with pytest.raises(ValueError, match="no class is named"):
        run(photos, tmp_path / "out", classes=("unicorn",))
    with pytest.raises(ValueError, match=r"labels are 0\.\.9"):
        run(photos, tmp_path / "out", classes=("10",))
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


@pytest.mark.usefixtures("drawn")
def test_a_folder_is_replaced_only_if_asked_and_only_if_it_holds_pictures(photos, tmp_path, capsys):
    out = tmp_path / "out"
    line = ["sample", photos, str(out), "--classes", "0", "--count", "1", "--steps", "2", "--quiet"]
    out.mkdir()
    assert cli.main(line) == 0  # an empty folder is free
    first = stored(out)[0]
    assert cli.main([*line, "--seed", "1"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    np.testing.assert_array_equal(stored(out)[0], first)
    (out / "notes.txt").write_text("of the old one")
    assert cli.main([*line, "--seed", "1", "--overwrite"]) == 0
    assert np.abs(stored(out)[0] - first).max() > 0.01
    assert sorted(path.name for path in out.iterdir()) == ["grid.png", "latents.npz", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("manifest", [None, '{"format": "syncgap-run"}', "[]", "not JSON", '{"format": "syncgap-dit"}'])
def test_another_folder_is_never_replaced(photos, tmp_path, manifest):
    (tmp_path / "thesis.tex").write_text("years")
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(manifest)
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    with pytest.raises(PicturesError, match="no folder of pictures"):
        sample_pictures(photos, SampleConfig(**QUICK), tmp_path, overwrite=True, progress=False)
    assert {path: path.read_text() for path in tmp_path.iterdir()} == before


def test_a_file_is_not_replaced(photos, tmp_path):
    (tmp_path / "out").write_text("a file")
    with pytest.raises(PicturesError, match="not overwritten"):
        sample_pictures(photos, SampleConfig(**QUICK), tmp_path / "out", overwrite=True, progress=False)


@pytest.mark.usefixtures("drawn")
def test_a_failure_while_writing_leaves_what_was_there(photos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run(photos, out, classes=("0",))
    before = stored(out)[0]

    def full(*args, **options):
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(CheckpointError, match="out cannot be written: no space"):
        sample_pictures(photos, SampleConfig(**QUICK, seed=1), out, overwrite=True, progress=False)
    np.testing.assert_array_equal(stored(out)[0], before)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_samples_that_are_not_finite_are_no_pictures(photos, tmp_path, monkeypatch):
    monkeypatch.setattr(pictures, "draw", lambda *args, **options: np.full((2, 8, 8, 3), np.nan, np.float32))
    with pytest.raises(PicturesError, match="not finite"):
        run(photos, tmp_path / "out", classes=("0",))
    assert not list(tmp_path.iterdir())


def test_a_model_kept_in_bfloat16(photos):
    model = load_model(photos, "bfloat16", params="bfloat16")
    samples = draw(model, make_clock(4), SampleConfig(), np.array([0, 1], np.int32))
    exact = draw(load_model(photos), make_clock(4), SampleConfig(), np.array([0, 1], np.int32))
    assert samples.dtype == np.float32
    assert 0 < np.abs(samples - exact).max() < 0.2


@pytest.mark.parametrize(
    ("settings", "about"),
    [
        ({"count": 0}, "count"),
        ({"batch": 0}, "batch"),
        ({"eta": -0.1}, "eta"),
        ({"eta": 1.1}, "eta"),
        ({"eta": float("nan")}, "eta"),
        ({"eta": 0.5, "sampler": "ancestral"}, "ancestral"),
        ({"guidance": float("inf")}, "guidance"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**32}, "seed"),
    ],
)
def test_settings_out_of_their_domain(settings, about):
    with pytest.raises(ValueError, match=about):
        SampleConfig(**settings)


def test_the_largest_seed_is_usable(photos):
    assert np.isfinite(
        draw(load_model(photos), make_clock(1), SampleConfig(seed=2**32 - 1), np.zeros(1, np.int32))
    ).all()
    assert jax.random.key_data(jax.random.key(2**32 - 1)).tolist() != jax.random.key_data(jax.random.key(0)).tolist()


def test_bad_steps_are_one_message(photos, tmp_path, capsys):
    assert cli.main(["sample", photos, str(tmp_path / "out"), "--steps", "fifty", "--quiet"]) == 2
    assert capsys.readouterr().err.startswith("syncgap: ")
