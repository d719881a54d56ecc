"""The recorded official model and its float32 sinusoids, for tests of what runs on top of the network."""

import dataclasses
from pathlib import Path

import numpy as np

from dit_jax.checkpoint import assemble
from dit_jax.model import DiT
from dit_jax.weights import convert

DATA = Path(__file__).parents[1] / "data"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def tiny_model(dtype: str = "float32") -> DiT:
    converted = convert(DATA / "tiny_xl_like.pt", num_heads=6, num_classes=10, prediction="epsilon")
    return assemble(dataclasses.replace(converted.config, dtype=dtype), converted.weights)


def recorded_sinusoids() -> np.ndarray:
    """The official float32 timestep features of t = 0..999, (1000, 256), to the last place of each sine.

    The recording holds seven timesteps. They pin every float32 frequency down to one candidate (at t = 999 one unit
    in its last place moves the angle by 6e-5); sines and cosines of the others are rounded from float64, and may differ
    from the recording machine's by one unit in the last place, 6e-8.
    """
    refs = load("refs_tiny")
    guess = (10000.0 ** -(np.arange(128) / 128)).astype(np.float32)
    candidates = [guess]
    for toward in (np.float32(0), np.float32(2)):
        step = guess
        for _ in range(4):
            step = np.nextafter(step, toward)
            candidates.append(step)
    candidates = np.stack(candidates)  # (candidates, 128)
    angles = refs["tfreq_t"].astype(np.float32)[:, None, None] * candidates
    both = np.concatenate([np.cos(angles.astype(np.float64)), np.sin(angles.astype(np.float64))], -1)
    miss = np.abs(both - refs["tfreq_f32"][:, None]).max(0)
    best = np.argmin(np.maximum(miss[:, :128], miss[:, 128:]), 0)
    frequencies = candidates[best, np.arange(128)]
    angles = (np.arange(1000, dtype=np.float32)[:, None] * frequencies).astype(np.float64)
    return np.concatenate([np.cos(angles), np.sin(angles)], -1).astype(np.float32)
