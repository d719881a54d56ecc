"""When a band commits, and how much of it: one estimator for theory and network (docs/theory.md, section 7).

Energies and what follows from them have the axes (..., step, band), with any axes in front: couplings, bootstrap draws.
Levels are log-SNR in nats.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Status = Literal["both", "none", "low_only", "high_only"]
LOW_BAND, HIGH_BAND = 1, -1  # the bands of the gap: the lowest annulus (band 0 is DC) and the highest


class Commitment(NamedTuple):
    """What `commitment` finds; all but `latch` are (..., B)."""

    level: jax.Array  # commitment level tau of what the band decides; NaN if it decides nothing
    decided: jax.Array  # decided fraction F >= 0; above 1 where coupling amplifies the difference of replicas
    latched: jax.Array  # latched level F tau + (1 - F) ell_end, which counts the undecided part at the clean end
    latch: jax.Array  # (..., steps in the window, B) running maximum M


def relative_energy(energy: jax.Array, reference: jax.Array) -> jax.Array:
    """Relative energy Q (..., K, B) (theory, eq. 7.1).

    Args:
      energy: (..., K, B) energy of the difference of replicas.
      reference: (..., B) the same energy at the end, without coupling.
    """
    return energy / reference[..., None, :]


def latch(q: jax.Array) -> jax.Array:
    """Running maximum M of Q (..., K, B) over steps: the share of the band that has been decided by each step (theory,
    eq. 7.1). It is not cut at 1, since a cut moves the level of every band that coupling amplifies."""
    return jax.lax.cummax(q, axis=q.ndim - 2)


def commitment(q: jax.Array, ell: ArrayLike, start: float | None = None) -> Commitment:
    """Commitment level, decided fraction and latched level, by the trapezoid rule over sampler steps (theory, eqs. 7.2
    and 7.3).

    Args:
      q: (..., K, B) relative energy, or the aligned energy of a network (`aligned_energy`), whose error would count
        as decided otherwise.
      ell: (K,) increasing log-SNR of the steps; not traced.
      start: the window opens at the first step at or above this level; by default it holds all steps.

    Raises:
      ValueError: the window holds fewer than two steps, or `ell` does not fit `q`.
    """
    ell = np.asarray(ell, np.float64)
    if ell.shape != (q.shape[-2],):
        raise ValueError(f"ell {ell.shape} does not fit the step axis of q {q.shape}")
    first = 0 if start is None else int(np.searchsorted(ell, start))
    if ell.size - first < 2:
        raise ValueError(f"the window from {start} to {ell[-1]:.3g} nats holds fewer than two steps")
    m = latch(q[..., first:, :])
    levels = jnp.asarray(ell[first:], m.dtype)
    decided = m[..., -1, :]
    some = decided > 0
    shape = m / jnp.where(some, decided, 1)[..., None, :]
    end = levels[-1]
    level = jnp.where(some, end - jnp.trapezoid(shape, levels, axis=-2), jnp.nan)
    return Commitment(level, decided, end - jnp.trapezoid(m, levels, axis=-2), m)


def gap(level: jax.Array, low: int = LOW_BAND, high: int = HIGH_BAND) -> jax.Array:
    """The synchronization gap (...): level, or step, of the high band minus that of the low band, from levels (..., B).
    It is positive if the low band commits first (theory, eq. 7.2)."""
    return level[..., high] - level[..., low]


def threshold_step(m: jax.Array, ell: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """First sampler step (..., B) at which M reaches `threshold`; K, read "never", if it does not (theory, section
    7.5).

    M is interpolated linearly in the step, and so in the level, which is itself linear in the step between two steps.

    Args:
      m: (..., K', B) running maximum in the last K' steps; the estimator's window may leave out the first ones.
      ell: (K,) levels of all sampler steps.
    """
    num_steps = np.size(ell)
    opened = num_steps - m.shape[-2]
    reached = m >= threshold
    first = jnp.argmax(reached, axis=-2)
    before = jnp.maximum(first - 1, 0)
    m_first, m_before = (jnp.take_along_axis(m, i[..., None, :], -2)[..., 0, :] for i in (first, before))
    share = jnp.where(first > 0, (threshold - m_before) / jnp.where(first > 0, m_first - m_before, 1), 0)
    return jnp.where(reached.any(-2), opened + before + share, float(num_steps))


def threshold_gap(low: float, high: float, num_steps: int) -> tuple[float, Status]:
    """Gap between the threshold steps of two bands, and how to read it (theory, section 7.5).

    ``both``: the gap is the difference of the steps. ``none``: neither band reaches the threshold, and the gap is 0.
    ``low_only``: the high band does not, and the gap is a lower bound. ``high_only``: the low band does not, and the
    gap is a negative bound.

    Args:
      low, high: from `threshold_step`.
      num_steps: K, which stands for "never".
    """
    has_low, has_high = low < num_steps, high < num_steps
    if has_low and has_high:
        return high - low, "both"
    if not has_low and not has_high:
        return 0.0, "none"
    return high - low, "low_only" if has_low else "high_only"


def projection(inner: jax.Array, end_energy: jax.Array) -> jax.Array:
    """Alignment a (..., K, B) of the denoised difference with its own end (theory, eq. 7.5). Errors that do not
    correlate with the outcome average out of it.

    Args:
      inner: (..., K, B) inner product of the denoised difference and its end.
      end_energy: (..., B) energy of the end.
    """
    return inner / end_energy[..., None, :]


def aligned_share(a: ArrayLike, *, stochastic: bool = False) -> jax.Array:
    """The Q of a Gaussian mode whose alignment with its end is `a` (theory, section 7.4), 0 where `a` is negative.

    It is ``a^2`` under a deterministic sampler, where a mode only changes its size. It is ``a`` under a stochastic
    sampler, where the denoised of an exact denoiser is a martingale: later changes do not correlate with it.
    """
    a = jnp.maximum(jnp.asarray(a), 0)
    return a if stochastic else a**2


def aligned_energy(
    inner: jax.Array, end_energy: jax.Array, reference: jax.Array, *, stochastic: bool = False
) -> jax.Array:
    """The part of Q that lies along the outcome, ``share(a) E(end; g) / E(end; 0)`` (..., K, B) (theory, eq. 7.6).

    It equals Q for Gaussian modes without error. Error that does not correlate with the outcome averages out of it, and
    a deterministic sampler's is never above Q.

    Args:
      inner: (..., K, B) inner product of the denoised difference and its end.
      end_energy: (..., B) energy of the end.
      reference: (..., B) the same energy without coupling.
    """
    ends = jnp.where(end_energy > 0, end_energy, 1)  # replicas that end alike have decided nothing
    share = aligned_share(projection(inner, ends), stochastic=stochastic)
    return share * (end_energy / reference)[..., None, :]


def crossing(a: jax.Array, ell: ArrayLike, threshold: float = 0.5**0.5) -> jax.Array:
    """Level (..., B) of the last upward crossing of `threshold` by a (..., K, B), linear between steps; NaN if there is
    none (theory, section 7.4)."""
    levels = jnp.asarray(ell, a.dtype)[:, None]
    below, above = a[..., :-1, :], a[..., 1:, :]
    up = (below < threshold) & (above >= threshold)
    share = jnp.where(up, (threshold - below) / jnp.where(up, above - below, 1), 0)
    at = jnp.where(up, levels[:-1] + share * (levels[1:] - levels[:-1]), -jnp.inf)
    return jnp.where(up.any(-2), at.max(-2, initial=-jnp.inf), jnp.nan)
