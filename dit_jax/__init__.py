"""Diffusion transformers in Flax NNX, with replicas coupled inside attention.

The names of `__all__` are what most uses need. Each is imported when it is first asked for, so that ``import dit_jax``
loads no library.
"""

# ruff: noqa: F401

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers see; at run time the table below is used
    from dit_jax import inside
    from dit_jax.attention import anisotropic_gate, symmetric_gate
    from dit_jax.checkpoint import load_manifest, load_model, save_model, save_weights, shipped_model
    from dit_jax.config import VARIANTS, DiTConfig, variant
    from dit_jax.diffusion import DenoiserOutput, guided_output, network_denoiser, sample
    from dit_jax.export import export_model
    from dit_jax.model import DiT
    from dit_jax.objective import denoised_at
    from dit_jax.replicas import pair_noise, run_pairs
    from dit_jax.weights import convert
    from ou_theory.clock import Clock, make_clock

    __version__: str

_NAMES = {
    "dit_jax.attention": "anisotropic_gate symmetric_gate",
    "dit_jax.checkpoint": "load_manifest load_model save_model save_weights shipped_model",
    "dit_jax.config": "VARIANTS DiTConfig variant",
    "dit_jax.diffusion": "DenoiserOutput guided_output network_denoiser sample",
    "dit_jax.export": "export_model",
    "dit_jax.model": "DiT",
    "dit_jax.objective": "denoised_at",
    "dit_jax.replicas": "pair_noise run_pairs",
    "dit_jax.weights": "convert",
    "ou_theory.clock": "Clock make_clock",
}
_HOMES = {name: home for home, names in _NAMES.items() for name in names.split()}

__all__ = ["__version__", "inside", *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("syncgap")
    if name == "inside":
        return import_module("dit_jax.inside")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
