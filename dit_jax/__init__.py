"""Diffusion transformers in Flax NNX, with replicas coupled inside attention."""

from dit_jax.checkpoint import load_manifest, load_model, save_model, shipped_model
from dit_jax.config import VARIANTS, DiTConfig, variant
from dit_jax.diffusion import network_denoiser, sample
from dit_jax.model import DiT

__all__ = [
    "VARIANTS",
    "DiT",
    "DiTConfig",
    "load_manifest",
    "load_model",
    "network_denoiser",
    "sample",
    "save_model",
    "shipped_model",
    "variant",
]
