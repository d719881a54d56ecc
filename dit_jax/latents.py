"""Turns samples into pictures: pixels if the model was trained on them, decoded latents, or a labelled stand-in."""

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from dit_jax.images import to_pixels

Decoder = Callable[[np.ndarray], np.ndarray]  # latents (N, h, w, 4) -> pixels (N, H, W, 3) uint8

# the official models were trained on the Stable Diffusion autoencoder's latents times this: their variance is then 1
VAE_SCALE = 0.18215
VAE_CHANNELS = 4
VAE_FACTOR = 8  # pixels to a latent pixel, along each side

# RGB in -1..1 of the scaled latents of that autoencoder, fitted by Keturn
# (discuss.huggingface.co/t/decoding-latents-to-rgb-without-upscaling/23204)
LATENT_RGB = np.array(
    [
        [0.298, 0.207, 0.208],
        [0.187, 0.286, 0.173],
        [-0.158, 0.189, 0.264],
        [-0.184, -0.271, -0.473],
    ]
)

PIXELS = "pixels"
DECODED = "VAE decoding"
PREVIEW = "linear latent preview, not a decoding"
CHANNELS = "first three channels over their maximum, not a decoding"
CHANNEL = "first channel over its maximum, not a decoding"


def has_pixels(manifest: Mapping) -> bool:
    """Whether a model's samples are standardized pixels, as for models that were trained here."""
    data = manifest.get("data")
    return isinstance(data, Mapping) and "mean" in data and "std" in data


def is_latent(manifest: Mapping) -> bool:
    """Whether a model's samples can be latents of the Stable Diffusion autoencoder, as for the official models."""
    return not has_pixels(manifest) and manifest["config"].get("in_channels") == VAE_CHANNELS


def to_pictures(samples: np.ndarray, manifest: Mapping, decoder: Decoder | None = None) -> tuple[np.ndarray, str]:
    """Turns samples into pictures, and says of which sort they are.

    Args:
      samples: (N, H, W, C), of the model that `manifest` describes.
      decoder: of latents, see `vae_decoder`.

    Returns:
      pixels (N, H', W', 3) uint8, H' and W' being multiples of H and W, and one of the labels above.

    Raises:
      ValueError: a decoder for samples that are no latents of its kind.
    """
    if decoder is not None and not is_latent(manifest):
        raise ValueError(f"a VAE decodes latents of {VAE_CHANNELS} channels, and this model's samples are none")
    if has_pixels(manifest):
        return to_pixels(samples, manifest["data"]["mean"], manifest["data"]["std"]), PIXELS
    if decoder is not None:
        return decoder(samples), DECODED
    if is_latent(manifest):
        return linear_preview(samples), PREVIEW
    return first_channels(samples), CHANNELS if samples.shape[-1] >= 3 else CHANNEL


def linear_preview(latents: np.ndarray) -> np.ndarray:
    """Linear map of scaled latents (N, h, w, 4) to pixels (N, 8 h, 8 w, 3) uint8, in squares of 8 pixels."""
    pixels = _to_bytes(np.asarray(latents, np.float64) @ LATENT_RGB)
    return pixels.repeat(VAE_FACTOR, 1).repeat(VAE_FACTOR, 2)


def first_channels(samples: np.ndarray) -> np.ndarray:
    """The first three channels of (..., C) as RGB, or the first as grey if there are fewer, uint8. Zero is mid-grey,
    and the largest magnitude of all has full intensity."""
    chosen = np.asarray(samples[..., :3] if samples.shape[-1] >= 3 else samples[..., :1].repeat(3, -1), np.float64)
    return _to_bytes(chosen / (np.abs(chosen).max(initial=0) or 1.0))


def vae_decoder(folder: str | Path) -> Decoder:
    """The decoder of an AutoencoderKL in diffusers form, in PyTorch on the CPU, one picture at a time.

    Args:
      folder: holds ``config.json`` and the weights; nothing is downloaded.

    Raises:
      ValueError: no such folder, not the autoencoder of the official DiTs, or diffusers is not installed.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is not a folder with an AutoencoderKL in diffusers form: it has no config.json")
    try:
        torch, diffusers = importlib.import_module("torch"), importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(
            f"decoding latents needs diffusers and PyTorch ({error}): pip install 'syncgap[vae]'"
        ) from error
    try:
        vae = diffusers.AutoencoderKL.from_pretrained(str(folder), local_files_only=True).float().eval()
    except Exception as error:  # of many kinds, by what is wrong with the folder
        raise ValueError(f"{folder}: diffusers cannot read the autoencoder ({str(error)[:500]})") from error
    expected = {"latent_channels": VAE_CHANNELS, "scaling_factor": VAE_SCALE}
    found = {name: getattr(vae.config, name, value) for name, value in expected.items()}
    if found != expected:
        raise ValueError(f"{folder} is not the autoencoder of the official DiTs: it has {found}, expected {expected}")

    def decode(latents: np.ndarray) -> np.ndarray:
        pictures = []
        with torch.inference_mode():
            for latent in np.asarray(latents, np.float32):
                z = torch.from_numpy(np.ascontiguousarray(latent.transpose(2, 0, 1)))[None] / VAE_SCALE
                pictures.append(vae.decode(z).sample[0].permute(1, 2, 0).numpy())
        return _to_bytes(np.stack(pictures))

    return decode


def _to_bytes(x: np.ndarray) -> np.ndarray:
    """-1..1 -> uint8, clipped and rounded."""
    return np.round(np.clip(x / 2 + 0.5, 0, 1) * 255).astype(np.uint8)
