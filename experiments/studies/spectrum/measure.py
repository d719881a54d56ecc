"""Uncoupled and coupled pairs of one network, and the covariance of the data that it was trained on."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.covariance import DataCovariance, load_covariance
from dit_jax.model import DiT
from experiments.frame.bench import Bench, Variables
from experiments.frame.exact import covariance_group
from experiments.frame.instrument import trajectories
from experiments.frame.store import StoreError
from experiments.frame.subject import Facts, model_folder
from experiments.studies.spectrum.settings import SpectrumConfig

_GRID = ("coupling", "pair", "step", "band")
VARIABLES: Variables = {
    "energy": (_GRID, "mean square per DCT coefficient of the denoised difference"),
    "projection": (_GRID, "inner product per coefficient of the denoised difference with its end"),
}


def check(config: SpectrumConfig, facts: Facts) -> None:
    """Raises ValueError unless the covariance of the network's data is known."""
    _covariance(config)


def measure(bench: Bench[SpectrumConfig]) -> None:
    """Fills the groups ``network`` and ``data``. Networks without attention run uncoupled."""
    config = bench.config
    has_attention = isinstance(bench.network, DiT)
    grid = np.asarray(config.couplings if has_attention else [0.0])

    @jax.jit
    def run(model, couplings, pairs, labels):
        found = trajectories(
            bench.coupled(model) if has_attention else lambda gate: bench.denoiser(model),
            bench.clock,
            bench.bands,
            couplings,
            pairs,
            labels,
            bench.subject.image_shape,
            seed=config.seed,
            sampler=config.sampler,
        )
        return {"energy": found["energy"][..., 1], "projection": found["projection"]}

    couplings = jnp.asarray(grid, jnp.float32)
    bench.measure(
        "network",
        VARIABLES,
        {"coupling": grid},
        config.pairs,
        lambda pairs, labels: run(bench.network, couplings, pairs, labels),
    )
    bench.whole("data", lambda: covariance_group(_covariance(config)))


def _covariance(config: SpectrumConfig) -> DataCovariance:
    (name,) = config.weights
    found = load_covariance(model_folder(name))
    if found is None:
        raise StoreError(
            f"{name} holds no covariance of its training data: add it with `syncgap covariance {name} IMAGES`, "
            "where IMAGES are the images that it was trained on"
        )
    return found
