"""Uncoupled and coupled pairs of one network, and the covariance of the data that it was trained on."""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.config import DiTConfig
from dit_jax.controls import Network
from dit_jax.covariance import DataCovariance, load_covariance
from dit_jax.model import DiT
from experiments.frame.bench import Bench, Variables
from experiments.frame.exact import covariance_group
from experiments.frame.instrument import trajectories
from experiments.frame.programs import Setup
from experiments.frame.store import StoreError
from experiments.frame.subject import Subject, model_folder
from experiments.studies.spectrum.settings import SpectrumConfig

_GRID = ("coupling", "pair", "step", "band")
VARIABLES: Variables = {
    "energy": (_GRID, "mean square per DCT coefficient of the denoised difference"),
    "projection": (_GRID, "inner product per coefficient of the denoised difference with its end"),
}


def check(config: SpectrumConfig, subject: Subject) -> None:
    """Raises ValueError unless the covariance of the network's data is known."""
    _covariance(config)


def _run(setup: Setup, model: Network, couplings, pairs, labels) -> dict[str, jax.Array]:
    found = trajectories(
        setup.coupled(model) if isinstance(model, DiT) else lambda gate: setup.denoiser(model),
        setup.clock,
        setup.bands,
        couplings,
        pairs,
        labels,
        setup.image_shape,
        seed=setup.seed,
        sampler=setup.sampler,
    )
    return {"energy": found["energy"][..., 1], "projection": found["projection"]}


def measure(bench: Bench[SpectrumConfig]) -> None:
    """Fills the groups ``network`` and ``data``. Networks without attention run uncoupled."""
    config = bench.config
    grid = np.asarray(config.couplings if isinstance(bench.model, DiTConfig) else [0.0])
    run = bench.program(_run)
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
