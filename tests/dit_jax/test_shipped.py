"""The models that come with the package: whole, documented, small, and better than no model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import load_manifest, load_model, shipped_model
from dit_jax.covariance import load_covariance
from dit_jax.diffusion import network_denoiser
from dit_jax.disk import CheckpointError
from dit_jax.training import TrainConfig
from experiments.frame.settings import DEFAULT_WEIGHTS
from experiments.frame.subject import untrained_model
from experiments.studies.solvable.data import SolvableData
from experiments.studies.solvable.measure import exact_denoiser
from experiments.studies.spectrum.settings import SHIPPED as SPECTRA
from ou_theory.clock import make_clock

PHOTOS = {"photos16-v": "v", "photos16-epsilon": "epsilon", "photos16-velocity": "velocity"}
NAMES = {**PHOTOS, "solvable8": "v", **dict.fromkeys(SPECTRA, "v")}


@pytest.mark.parametrize("name", NAMES)
def test_a_shipped_model_says_where_it_comes_from(name):
    folder = shipped_model(name)
    manifest = load_manifest(folder)
    assert manifest["config"]["prediction"] == NAMES[name]
    assert manifest["command"].startswith(("syncgap train", "python benchmarks/gpu.py"))
    assert manifest["final_loss"]["step"] == manifest["training"]["steps"] > 1000
    assert len(manifest["data"]["class_names"]) == manifest["config"]["num_classes"]
    card = (folder / "README.md").read_text()
    assert manifest["command"] in card
    assert "Licence" in card


def test_the_default_is_shipped_and_all_stay_small():
    assert DEFAULT_WEIGHTS in NAMES
    files = [path for name in NAMES for path in shipped_model(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 26e6
    with pytest.raises(CheckpointError, match="photos16-v"):
        shipped_model("photos99")


@pytest.mark.parametrize("name", [*PHOTOS, *SPECTRA])
def test_a_shipped_model_of_photographs_knows_their_covariance(name):
    """Its bands have the variances of the data, whose sum per pixel is 1 but for what classes tell apart."""
    found, manifest = load_covariance(shipped_model(name)), load_manifest(shipped_model(name))
    assert found.about["data"] == manifest["data"]
    assert 0.85 < found.variance.mean() < 1
    ratio = found.band_variance()[1] / found.band_variance()[-1]
    expected = {"photos8-whitened": (0.9, 1), "photos8-reversed": (0.003, 0.01)}.get(name, (50, 500))
    assert expected[0] < ratio < expected[1]


@pytest.mark.parametrize("name", PHOTOS)
def test_a_shipped_model_of_16_pixels_knows_the_directions_of_its_data(name):
    """For `syncgap compare --modes`, in a file that stays small."""
    path = shipped_model(name) / "covariance.npz"
    found = load_covariance(path.parent)
    assert path.stat().st_size < 200e3
    assert found.components.shape == (63, 768)
    assert found.class_share.shape == (768, 9)
    luminance = np.abs(found.colour_axes[:, 0])
    np.testing.assert_allclose(luminance, 3**-0.5, rtol=0.02)  # grey
    assert found.variance[:63].sum() > 0.9 * found.variance.sum()


@pytest.mark.parametrize("name", PHOTOS)
def test_a_shipped_model_denoises(name):
    """Smooth random images of unit variance, noise of a tenth of it: a trained network takes out most of the noise
    (the error of doing nothing is 0.1), the same architecture untrained does not."""
    model = load_model(name)  # by name, as by folder
    clock = model.config.training_clock()
    step = int(np.searchsorted(clock.log_snr, np.log(10)))
    corners = jax.random.normal(jax.random.key(0), (8, 2, 2, 3))
    clean = jax.image.resize(corners, (8, 16, 16, 3), "linear")
    clean = (clean - clean.mean()) / clean.std()
    ab = clock.alpha_bar[step]
    noisy = np.sqrt(ab) * clean + np.sqrt(1 - ab) * jax.random.normal(jax.random.key(1), clean.shape)
    run = jax.jit(lambda model: network_denoiser(model, clock)(noisy, jnp.asarray(step), jnp.arange(8)).denoised)
    error = float(jnp.square(run(model) - clean).mean())
    untrained = float(jnp.square(run(untrained_model(model.config, 0)) - clean).mean())
    assert error < 0.03
    assert untrained > 0.06


@pytest.mark.long
def test_the_solvable_model_comes_close_to_the_exact_posterior_mean():
    """Of draws of its laws at three levels the error is above the least possible, by a few percent at most."""
    model, data, clock = load_model("solvable8"), SolvableData(), make_clock(1000)
    count = 512 * len(data.class_names)
    clean, labels = data.batch(TrainConfig(batch_size=count, seed=99), 0)
    run = jax.jit(lambda model, x, step: network_denoiser(model, clock)(x, step, jnp.asarray(labels)).denoised)
    exact = jax.jit(exact_denoiser(clock))
    for level in (-3.0, 0.0, 3.0):
        step = int(np.searchsorted(clock.log_snr, level))
        ab = clock.alpha_bar[step]
        noisy = np.sqrt(ab) * clean + np.sqrt(1 - ab) * jax.random.normal(jax.random.key(step), clean.shape)
        errors = [
            float(jnp.square(guess - clean).mean())
            for guess in (
                run(model, noisy, jnp.asarray(step)),
                exact(noisy, jnp.asarray(step), jnp.asarray(labels)).denoised,
            )
        ]
        assert errors[1] < errors[0] < 1.05 * errors[1]
