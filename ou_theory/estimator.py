"""When a band commits, and how much of it: one estimator for theory and network (docs/theory.md, section 7).

Energies and what derives from them have the axes (..., step, band); anything may stand in front (couplings, bootstrap
draws). Levels are log-SNR in nats.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

Status = Literal["both", "none", "low_only", "high_only"]
LOW_BAND, HIGH_BAND = 1, -1  # the bands of the gap: the lowest annulus (band 0 is DC) and the highest


class Commitment(NamedTuple):
    """What `commitment` finds; (..., B) but for `latch`."""

    level: jax.Array  # commitment level tau: when, given that it is decided; NaN if nothing is
    decided: jax.Array  # decided fraction F in [0, 1]
    latched: jax.Array  # latched level: F tau + (1 - F) ell_end, the undecided part counted at the clean end
    latch: jax.Array  # (..., steps in the window, B) running maximum M


def relative_energy(energy: jax.Array, reference: jax.Array) -> jax.Array:
    """Q: difference energies (..., K, B) as a share of what the band differs by in the end, uncoupled: (..., B)."""
    return energy / reference[..., None, :]


def latch(q: jax.Array) -> jax.Array:
    """M: the running maximum of Q over steps, at most 1: the share of the band that has been decided so far."""
    return jnp.minimum(jax.lax.cummax(q, axis=q.ndim - 2), 1)


def commitment(q: jax.Array, ell: ArrayLike, start: float | None = None) -> Commitment:
    """Commitment level, decided fraction and latched level, by the trapezoid rule over sampler steps.

    Args:
      q: (..., K, B) relative energy.
      ell: (K,) concrete, increasing log-SNR of the steps.
      start: the window opens at the first step at or above this level; all steps by default. Earlier steps, where an
        epsilon-network's error is amplified, are not latched.

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
    """The synchronization gap: levels (or steps) (..., B) of the high band minus the low one; > 0 if low is first."""
    return level[..., high] - level[..., low]


def threshold_step(m: jax.Array, ell: ArrayLike, threshold: ArrayLike) -> jax.Array:
    """First sampler step (..., B) at which M reaches `threshold`; K, read "never", if it does not.

    Linear between steps, in the step as in the level, which is the same thing there.

    Args:
      m: (..., K', B) running maximum; of the last K' steps, if the estimator's window left out the first ones.
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
    """Gap between two threshold steps, and how to read it.

    ``both``: a plain difference. ``none``: neither band ever commits individually, the gap is 0. ``low_only``: the
    high band never does, the gap is a lower bound. ``high_only``: the low band never does, a negative bound.
    """
    has_low, has_high = low < num_steps, high < num_steps
    if has_low and has_high:
        return high - low, "both"
    if not has_low and not has_high:
        return 0.0, "none"
    return high - low, "low_only" if has_low else "high_only"


def projection(inner: jax.Array, end_energy: jax.Array) -> jax.Array:
    """a: alignment (..., K, B) of the denoised difference with its own end, from inner products and end energies
    (..., B). Errors that do not correlate with the outcome average out of it."""
    return inner / end_energy[..., None, :]


def aligned_share(a: ArrayLike, *, stochastic: bool = False) -> jax.Array:
    """What Q would be if a Gaussian mode were as aligned with its end as `a` says.

    ``a^2`` under a deterministic sampler, where the mode only changes its size. ``a`` under a stochastic one, whose
    exact denoised is a martingale: what is added later does not correlate with what is there.
    """
    a = jnp.asarray(a)
    return a if stochastic else a**2


def noise_floor(q: ArrayLike, a: ArrayLike, *, stochastic: bool = False) -> jax.Array:
    """What Q holds beyond its aligned share: an estimate of the denoiser's error energy."""
    return jnp.asarray(q) - aligned_share(a, stochastic=stochastic)


def crossing(a: jax.Array, ell: ArrayLike, threshold: float = 0.5**0.5) -> jax.Array:
    """Level (..., B) of the last upward crossing of `threshold` by a (..., K, B), linear between steps; NaN if none."""
    levels = jnp.asarray(ell, a.dtype)[:, None]
    below, above = a[..., :-1, :], a[..., 1:, :]
    up = (below < threshold) & (above >= threshold)
    share = jnp.where(up, (threshold - below) / jnp.where(up, above - below, 1), 0)
    at = jnp.where(up, levels[:-1] + share * (levels[1:] - levels[:-1]), -jnp.inf)
    return jnp.where(up.any(-2), at.max(-2, initial=-jnp.inf), jnp.nan)
