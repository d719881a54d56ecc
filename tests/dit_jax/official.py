"""The recorded official models, DiT and SiT, and DiT's float32 sinusoids, for tests of what runs on top of them."""

import dataclasses
import zlib
from pathlib import Path

import numpy as np

from dit_jax.checkpoint import assemble
from dit_jax.facts import Facts
from dit_jax.model import DiT, position_embedding
from dit_jax.weights import convert, convert_entries

DATA = Path(__file__).parents[1] / "data"


def load(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def nhwc(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, -3, -1)


def tiny_model(dtype: str = "float32") -> DiT:
    converted = convert(DATA / "tiny_xl_like.pt", num_heads=6, num_classes=10, prediction="epsilon")
    model = assemble(dataclasses.replace(converted.config, dtype=dtype), converted.weights)
    assert isinstance(model, DiT)
    return model


SIT_KEYS = {  # official name: shape and standard deviation of the recorded weights
    "x_embedder.proj": ((96, 4, 2, 2), 0.12),
    "t_embedder.mlp.0": ((96, 256), 0.15),
    "t_embedder.mlp.2": ((96, 96), 0.15),
    "y_embedder.embedding_table": ((11, 96), 0.4),
    **{
        f"blocks.{i}.{name}": shape
        for i in range(3)
        for name, shape in {
            "attn.qkv": ((288, 96), 0.2),
            "attn.proj": ((96, 96), 0.12),
            "mlp.fc1": ((384, 96), 0.12),
            "mlp.fc2": ((96, 384), 0.12),
            "adaLN_modulation.1": ((576, 96), 0.12),
        }.items()
    },
    "final_layer.linear": ((32, 96), 0.12),
    "final_layer.adaLN_modulation.1": ((192, 96), 0.12),
}


def sit_state_dict() -> dict[str, np.ndarray]:
    """The official keys of the recorded SiT: 3 blocks, 8 x 8 x 4, 10 classes, and a final layer of 2 x 4 channels.

    Its weights were drawn key by key, and are drawn again here; its biases are recorded."""
    biases = {key.removeprefix("weights."): a for key, a in load("refs_sit_tiny").items() if key.startswith("weights.")}
    drawn = {}
    for name, (shape, scale) in SIT_KEYS.items():
        rng = np.random.default_rng([7101, zlib.crc32(f"{name}.weight".encode())])
        drawn[f"{name}.weight"] = np.float32(scale) * rng.standard_normal(shape).astype(np.float32)
    return {"pos_embed": position_embedding(4, 96)[None].astype(np.float32), **drawn, **biases}


def sit_model(dtype: str = "float32", **changes) -> DiT:
    """The recorded SiT, with `changes` of its config (its prediction and path are read into the same network)."""
    facts = Facts(prediction="velocity", path="linear", num_heads=6, num_classes=10)
    config, weights = convert_entries(sit_state_dict(), "SiT", facts)
    model = assemble(dataclasses.replace(config, dtype=dtype, **changes), weights)
    assert isinstance(model, DiT)
    return model


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
