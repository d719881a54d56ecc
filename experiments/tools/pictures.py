"""Pictures from a network: samples of chosen classes as arrays and as one grid, with a manifest."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image
from tqdm import tqdm

from dit_jax.checkpoint import load_model
from dit_jax.class_names import names, resolve, short_name
from dit_jax.controls import Network
from dit_jax.diffusion import network_denoiser, sample
from dit_jax.disk import recover, replacing, write_json
from dit_jax.images import image_grid
from dit_jax.latents import is_latent, to_pictures, vae_decoder
from dit_jax.replicas import INITIAL, pair_noise
from experiments.frame.manifest import environment
from experiments.frame.numerics import own_numerics
from experiments.frame.subject import check_guidance, model_folder
from experiments.tools.info import read_manifest
from experiments.tools.settings import SampleConfig
from ou_theory.clock import Clock

FORMAT = "syncgap-pictures"
FORMAT_VERSION = 1
DEFAULT_CLASSES = 8
GAP = 2  # pixels between the pictures of the grid


class PicturesError(ValueError):
    """Pictures that cannot be made as asked."""


@own_numerics()
def sample_pictures(
    weights: str,
    config: SampleConfig,
    out: str | Path,
    *,
    overwrite: bool = False,
    command: str = "",
    progress: bool = True,
) -> dict:
    """Samples pictures and writes a folder: ``latents.npz``, ``grid.png`` (one row per class), ``manifest.json``.

    Args:
      weights: a converted or trained DiT (folder), or the name of a shipped model.
      overwrite: replace a folder of pictures that is there already. Anything else is never replaced.
      command: how it was called, for the manifest.

    Returns:
      the manifest.

    Raises:
      ValueError: settings that do not fit the weights; a folder that is in use; samples that are not finite.
    """
    out = Path(out)
    check_free(out, overwrite)
    source = model_folder(weights)
    manifest, model_config = read_manifest(source)
    if config.vae is not None and not is_latent(manifest):
        raise PicturesError(f"--vae decodes latents of the official models, which {source.name} does not produce")
    decoder = None if config.vae is None else vae_decoder(config.vae)
    check_guidance(manifest, model_config, config.guidance)
    clock = model_config.clock(config.steps)
    known = names(manifest)
    asked = config.classes or tuple(map(str, range(min(model_config.num_classes, DEFAULT_CLASSES))))
    labels = np.array(resolve(asked, known, model_config.num_classes), np.int32)

    samples = draw(
        load_model(source, config.dtype, params=config.dtype),
        clock,
        config,
        np.repeat(labels, config.count),
        progress=progress,
    )
    if not np.isfinite(samples).all():
        raise PicturesError("samples are not finite: use more --steps, less --guidance, or --dtype float32")
    pictures, shows = to_pictures(samples, manifest, decoder)
    written = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "command": command,
        "settings": _settings(config, asked),
        "weights": source.resolve().name,
        "weights_digest": manifest["digest"],
        "weights_source": manifest.get("source"),
        "model": manifest["config"],
        "grid": {
            "shows": shows,
            "rows": [{"label": int(label), "name": short_name(label, known)} for label in labels],
            "columns": config.count,
        },
        **environment(),
    }
    with replacing(out) as partial:
        shaped = samples.reshape(len(labels), config.count, *samples.shape[1:])
        np.savez(partial / "latents.npz", samples=shaped, labels=labels)
        Image.fromarray(image_grid(pictures, config.count, GAP)).save(partial / "grid.png")
        write_json(partial / "manifest.json", written)
    return written


def draw(
    model: Network, clock: Clock, config: SampleConfig, labels: np.ndarray, *, progress: bool = False
) -> np.ndarray:
    """Samples (N, H, W, C) float32 of labels (N,).

    All noise is a function of (seed, index of the picture, step), so a picture does not depend on its batch.
    """
    shape = (model.config.input_size, model.config.input_size, model.config.in_channels)

    @jax.jit
    def run(model: Network, pictures: jax.Array, labels: jax.Array) -> jax.Array:
        def noise(step):
            return pair_noise(config.seed, pictures, step, shape, replicas=1)[0]

        denoiser = network_denoiser(model, clock, guidance=config.guidance, channels=config.guided_channels)
        out, _ = sample(denoiser, noise(INITIAL), clock, labels, sampler=config.sampler, eta=config.eta, noise=noise)
        return out

    size = min(config.batch, len(labels))
    samples = np.empty((len(labels), *shape), np.float32)
    with tqdm(total=len(labels), unit="img", desc="sampling", disable=not progress) as bar:
        for first in range(0, len(labels), size):
            count = min(size, len(labels) - first)
            # the last batch is filled up with its last picture, so that nothing is compiled again
            indices = np.minimum(np.arange(first, first + size), first + count - 1)
            samples[first : first + count] = run(model, indices, labels[indices])[:count]
            bar.update(count)
    return samples


def check_free(out: Path, overwrite: bool) -> None:
    """Raises PicturesError unless pictures may be written here: into a new or empty folder, or over older pictures."""
    recover(out)
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise PicturesError(f"{out} exists and is not empty; choose another folder, or replace it with --overwrite")
    if not _holds_pictures(out):
        raise PicturesError(f"{out} is not overwritten: it is no folder of pictures made by `syncgap sample`")


def _holds_pictures(out: Path) -> bool:
    try:
        manifest = json.loads((out / "manifest.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("format") == FORMAT


def _settings(config: SampleConfig, classes: tuple[str, ...]) -> dict[str, Any]:
    return {**asdict(config), "classes": list(classes), "vae": None if config.vae is None else str(config.vae)}
