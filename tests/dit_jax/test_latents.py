"""Pictures of samples: exact values of every kind, what each calls itself, the decoder on a stub of diffusers."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_jax import latents
from dit_jax.images import standardize
from dit_jax.latents import first_channels, is_latent, linear_preview, to_pictures, vae_decoder

OFFICIAL = {"config": {"in_channels": 4}, "data": None}
TRAINED = {"config": {"in_channels": 3}, "data": {"mean": [0.1, 0.0, -0.2], "std": 0.5}}


def other(channels):
    return {"config": {"in_channels": channels}, "data": None}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    return tmp_path


@pytest.fixture
def diffusers(monkeypatch):
    """A stand-in of the library, whose autoencoder enlarges 8 times what it is given, first channels as RGB."""
    calls = []

    class AutoencoderKL(torch.nn.Module):
        config = SimpleNamespace(latent_channels=4, scaling_factor=0.18215)

        @classmethod
        def from_pretrained(cls, path, **options):
            calls.append((path, options))
            return cls()

        def decode(self, z):
            assert not self.training
            assert not torch.is_grad_enabled()
            assert z.shape[:2] == (1, 4)
            picture = z[:, :3].repeat_interleave(8, 2).repeat_interleave(8, 3)
            return SimpleNamespace(sample=picture)

    module = SimpleNamespace(AutoencoderKL=AutoencoderKL, calls=calls)
    monkeypatch.setitem(sys.modules, "diffusers", module)
    return module


def test_pixels_come_back_exactly():
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3), np.uint8)
    data = TRAINED["data"]
    found, shows = to_pictures(standardize(pixels, data["mean"], data["std"]), TRAINED)
    np.testing.assert_array_equal(found, pixels)
    assert shows == "pixels"


def test_the_preview_is_the_linear_map_in_squares_of_eight():
    z = np.zeros((1, 2, 2, 4), np.float32)
    z[0, 0, 0] = [1, 0, 0, 0]
    z[0, 0, 1] = [0, 0, 0, 1]
    z[0, 1, 0] = [1, 1, 1, 1]
    found, shows = to_pictures(z, OFFICIAL)
    assert shows == "linear latent preview, not a decoding"
    assert found.shape == (1, 16, 16, 3)
    assert found.dtype == np.uint8
    # (x + 1) / 2 * 255 of the rows of the matrix, of their sum, and of zero
    np.testing.assert_array_equal(found[0, 0, 0], np.round([127.5 * 1.298, 127.5 * 1.207, 127.5 * 1.208]))
    np.testing.assert_array_equal(found[0, 7, 8], np.round([127.5 * 0.816, 127.5 * 0.729, 127.5 * 0.527]))
    np.testing.assert_array_equal(found[0, 8, 0], np.round([127.5 * 1.143, 127.5 * 1.411, 127.5 * 1.172]))
    np.testing.assert_array_equal(found[0, 15, 15], [128, 128, 128])
    blocks = found.reshape(2, 8, 2, 8, 3)
    np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :1, :, :1], blocks.shape))


def test_the_preview_clips():
    assert set(np.unique(linear_preview(np.array([[[[50.0, 0, 0, 0]], [[-50.0, 0, 0, 0]]]])))) == {0, 255}


def test_first_channels_are_scaled_by_their_largest_magnitude():
    x = np.zeros((1, 1, 3, 5))
    x[0, 0, 0, :4] = [2, -4, 1, 100]  # the fourth channel has no say
    pixels, shows = to_pictures(x, other(5))
    np.testing.assert_array_equal(pixels[0, 0, 0], [191, 0, 159])
    np.testing.assert_array_equal(pixels[0, 0, 1], [128, 128, 128])
    assert shows == "first three channels over their maximum, not a decoding"


@pytest.mark.parametrize("channels", [1, 2])
def test_fewer_than_three_channels_are_grey(channels):
    x = np.random.default_rng(0).normal(size=(2, 3, 3, channels))
    pixels, shows = to_pictures(x, other(channels))
    assert pixels.shape == (2, 3, 3, 3)
    np.testing.assert_array_equal(pixels, np.repeat(pixels[..., :1], 3, -1))
    assert np.abs(x[..., 0]).argmax() in np.flatnonzero(np.isin(pixels[..., 0].reshape(-1), [0, 255]))
    assert shows.startswith("first channel ")


def test_samples_that_are_zero_are_grey():
    np.testing.assert_array_equal(first_channels(np.zeros((1, 2, 2, 3))), np.full((1, 2, 2, 3), 128))


@pytest.mark.parametrize(
    ("manifest", "latent"),
    [(OFFICIAL, True), (TRAINED, False), (other(3), False), ({**TRAINED, "config": {"in_channels": 4}}, False)],
)
def test_what_counts_as_latents(manifest, latent):
    assert is_latent(manifest) == latent


@pytest.mark.parametrize("manifest", [TRAINED, other(3)])
def test_only_latents_are_decoded(manifest):
    with pytest.raises(ValueError, match="4 channels"):
        to_pictures(np.zeros((1, 2, 2, 3)), manifest, lambda z: z)


def test_decoding_divides_by_the_factor_and_maps_to_pixels(folder, diffusers):
    z = np.array([0.5, -0.5, 0, 9]) * 0.18215
    z = np.stack([np.broadcast_to(z, (2, 3, 4)), np.zeros((2, 3, 4))])
    z[1, 0, 2, 1] = 5 * 0.18215
    pixels, shows = to_pictures(z, OFFICIAL, vae_decoder(folder))
    assert shows == "VAE decoding"
    assert pixels.shape == (2, 16, 24, 3)
    assert pixels.dtype == np.uint8
    np.testing.assert_array_equal(pixels[0], np.broadcast_to([191, 64, 128], (16, 24, 3)))
    np.testing.assert_array_equal(np.argwhere(pixels[1, ..., 1] == 255).min(0), [0, 16])  # rows and columns unswapped
    assert diffusers.calls == [(str(folder), {"local_files_only": True})]


def test_without_diffusers_the_error_names_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match=r"pip install 'syncgap\[vae\]'"):
        vae_decoder(folder)


def test_a_folder_that_is_no_autoencoder(tmp_path, diffusers):
    with pytest.raises(ValueError, match=r"no config\.json"):
        vae_decoder(tmp_path)
    assert not diffusers.calls


def test_what_diffusers_cannot_read_is_an_error_of_the_folder(folder, diffusers, monkeypatch):
    def broken(path, **options):
        raise RuntimeError("size mismatch for decoder.conv_in.weight")

    monkeypatch.setattr(diffusers.AutoencoderKL, "from_pretrained", broken)
    with pytest.raises(ValueError, match=r"cannot read the autoencoder.*size mismatch"):
        vae_decoder(folder)


@pytest.mark.parametrize("entry", [{"latent_channels": 16}, {"scaling_factor": 0.13025}])
def test_another_autoencoder_is_refused(folder, diffusers, monkeypatch, entry):
    config = SimpleNamespace(**{"latent_channels": 4, "scaling_factor": 0.18215, **entry})
    monkeypatch.setattr(diffusers.AutoencoderKL, "config", config)
    with pytest.raises(ValueError, match="not the autoencoder of the official DiTs"):
        vae_decoder(folder)


def test_the_matrix_is_the_published_one():
    np.testing.assert_allclose(latents.LATENT_RGB.sum(0), [0.143, 0.411, 0.172], atol=1e-12)
    np.testing.assert_array_equal(latents.LATENT_RGB[2], [-0.158, 0.189, 0.264])
