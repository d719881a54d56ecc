"""Ensembles of coupled replica pairs: keys, initial and step noise, a grid of couplings in one batch.

Every random number is a function of (seed, pair, step, replica) alone. Results therefore do not depend on how pairs are
batched, and runs at different couplings see the same noise.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.attention import check_gate, symmetric_gate
from dit_jax.diffusion import Denoiser, Sampler, sample
from ou_theory.clock import Clock
from ou_theory.keys import random_key

CoupledDenoiser = Callable[[jax.Array], Denoiser]  # gate ([[n,] layers,] N, R, R) -> denoiser of states (R, N, H, W, C)
PairObserver = Callable[..., Any]

INITIAL = -1  # the "step" of the initial noise


def pair_noise(
    seed: int | jax.Array, pairs: jax.Array, step: int | jax.Array, shape: Sequence[int], replicas: int = 2
) -> jax.Array:
    """Unit Gaussian noise (R, N, *shape) float32 of pairs (N,) at one step, independent between replicas, pairs and
    steps. The step `INITIAL` gives the initial noise. In place of a seed there may be a key, for another purpose."""
    is_key = isinstance(seed, jax.Array) and jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    root = seed if is_key else random_key(seed)

    def draw(replica, pair):
        key = jax.random.fold_in(jax.random.fold_in(root, pair), jnp.asarray(step) + 1)
        return jax.random.normal(jax.random.fold_in(key, replica), tuple(shape), jnp.float32)

    over_pairs = jax.vmap(draw, (None, 0))
    return jax.vmap(over_pairs, (0, None))(jnp.arange(replicas), jnp.asarray(pairs))


def pair_labels(pairs: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Class label of each pair, (N,) int32: the classes in turn, by pair index. Both replicas of a pair share it."""
    return np.asarray(classes, np.int32)[np.asarray(pairs) % len(classes)]


def run_pairs(
    coupled: CoupledDenoiser,
    clock: Clock,
    couplings: jax.Array,
    pairs: jax.Array,
    labels: jax.Array,
    shape: Sequence[int],
    *,
    seed: int | jax.Array,
    replicas: int = 2,
    sampler: Sampler = "ddim",
    eta: float = 0.0,
    observe: PairObserver | None = None,
) -> tuple[jax.Array, Any]:
    """Samples every pair at every coupling, as one batch of P * C. The couplings of a pair lie side by side in it, so
    that a batch that is split over devices by pair stays split.

    Args:
      coupled: maps a gate to the denoiser under it.
      clock: n noise levels.
      couplings: (C,) couplings g of symmetric all-to-all gates; or gates of any form: (C, R, R), by layer
        (C, layers, R, R), or by sampler step and layer (C, n, layers, R, R), where `layers` and n may be 1. They are
        traced, so that another grid of the same shape does not compile again.
      pairs: (P,) pair indices, which select the noise.
      labels: (P,) class labels.
      shape: (H, W, channels) of one image.
      seed: of the whole experiment; or a key, see `pair_noise`.
      replicas: R.
      sampler, eta: see `sample`.
      observe: ``observe(step, x, denoised)`` with arrays (R, C, P, H, W, channels); see `sample`. Taps, a fourth
        argument if there are any, come as the network gave them, with a batch axis of P * C.

    Returns:
      samples (R, C, P, H, W, channels), and the observations stacked over steps.

    Raises:
      ValueError: `couplings` is of none of these shapes.
    """
    grid = (couplings.shape[0], pairs.shape[0])
    gate = grid_gates(couplings, replicas)
    gate = jnp.moveaxis(jnp.tile(gate, (grid[1],) + (1,) * (gate.ndim - 1)), 0, -3)

    def to_grid(x):
        return x.reshape(replicas, *grid[::-1], *x.shape[2:]).swapaxes(1, 2)

    def noise(step):
        return jnp.repeat(pair_noise(seed, pairs, step, shape, replicas), grid[0], 1)

    def observer(step, x, denoised, *taps):
        return None if observe is None else observe(step, to_grid(x), to_grid(denoised), *taps)

    out, kept = sample(
        coupled(gate),
        noise(INITIAL),
        clock,
        jnp.repeat(labels, grid[0]),
        sampler=sampler,
        eta=eta,
        noise=noise,
        observe=observer,
    )
    return to_grid(out), kept


def grid_gates(couplings: jax.Array, replicas: int = 2) -> jax.Array:
    """The gates (C, [[n,] layers,] R, R) of a grid: symmetric ones of couplings g (C,), or the given gates, checked.

    Raises:
      ValueError: `couplings` has none of these shapes, or its numbers make no gate. Traced numbers are not checked.
    """
    if couplings.ndim == 1:
        return symmetric_gate(couplings, replicas)
    if couplings.ndim not in (3, 4, 5) or couplings.shape[-2:] != (replicas, replicas):
        raise ValueError(
            f"couplings {couplings.shape} are neither scalars (C,) nor gates (C, [[steps,] layers,] R, R) of "
            f"R = {replicas} replicas"
        )
    check_gate(couplings)
    return couplings
