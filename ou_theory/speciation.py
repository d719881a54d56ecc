"""Speciation: when a diffusion commits to one of two clusters, and the gap that coupling opens (docs/theory.md,
sections 13.1 to 13.3).

Clusters lie at ``+-m`` and have the covariance C within. `spread` is ``m^2 - s^2``: a mode speciates where its noise,
pulled back to the data, has this variance. "First" means at a larger time t, earlier in generation. All functions work
under jit, vmap and grad; functions of numbers broadcast.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve, solve_triangular
from jax.typing import ArrayLike

from ou_theory.process import Process, Transition, left_modes, mode_noise, transition, transition_time
from ou_theory.roots import falling_root, require
from ou_theory.special import log1prel

_matmul = partial(jnp.matmul, precision="highest")

# --- the criterion


def observation(process: Process, t: ArrayLike) -> Transition:
    """The state at times t (...) as an observation ``A x_0 + noise`` of the data, in the frame in which the noise grows
    less (theory, section 13.1).

    If the rates are positive on average, this is the frame of the state: A is the factor of `transition`, and the noise
    has its covariance. Otherwise it is the frame of the data: A is the identity, and the noise has the covariance N_t.

    Returns:
      A and the covariance of the noise, each (..., n, n).
    """
    forward = jnp.trace(process.drift) >= 0
    factor, covariance = transition(process._replace(drift=jnp.where(forward, process.drift, -process.drift)), t)
    return Transition(jnp.where(forward, factor, jnp.eye(factor.shape[-1])), covariance)


def whitener(covariance: jax.Array) -> jax.Array:
    """Cholesky factor (..., n, n) of a covariance. It is NaN where the covariance has overflowed, or where growing
    modes differ so much in size that rounding has lost one beside the other."""
    lower = jnp.linalg.cholesky(covariance)
    rest, whole = (jnp.diagonal(m, axis1=-2, axis2=-1) for m in (lower, covariance))
    lost = (rest**2 < 100 * jnp.finfo(lower.dtype).eps * whole) | jnp.isinf(whole)
    return jnp.where(lost.any(-1)[..., None, None], jnp.nan, lower)


def _seen(process: Process, t: ArrayLike, centre: jax.Array, covariance: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Centre (..., n) and covariance (..., n, n) of a cluster in the frame of `observation` at times t (...)."""
    factor, noise = observation(process, t)
    spread = _matmul(_matmul(factor, covariance), jnp.swapaxes(factor, -1, -2)) + noise
    return _matmul(factor, centre), spread


def kappa(process: Process, t: ArrayLike, centre: ArrayLike, covariance: ArrayLike) -> jax.Array:
    """Curvature ratio ``m^T (C + N_t)^-1 m`` for any drift (theory, eq. 13.1). The symmetric point of the density is a
    maximum where it is below 1, and no longer where it is above.

    It strictly decreases in t. For a stable drift it is computed as ``(F m)^T (F C F^T + Sigma)^-1 F m``, in which
    nothing overflows. It is NaN at times at which the modes of an unstable drift have grown so far apart that rounding
    hides one of them, and at t = 0 if C is singular.

    Args:
      process: drift (n, n).
      t: times >= 0, any shape.
      centre: (n,) m.
      covariance: (n, n) C, positive semidefinite.

    Returns:
      an array of t's shape.
    """
    centre, covariance = jnp.asarray(centre, float), jnp.asarray(covariance, float)
    return _curvature_ratio(*_seen(process, t, centre, covariance))


def kappa_after(steps: Transition, centre: ArrayLike, covariance: ArrayLike) -> jax.Array:
    """`kappa` (T - 1,) after each of T - 1 steps, under a drift that changes from step to step (theory, section 13.1).

    Args:
      steps: factors and covariances (T - 1, n, n) of the steps in their order: the `process.transition` of each drift.
      centre, covariance: (n,) m and (n, n) C.
    """
    start = jnp.asarray(centre, float), jnp.asarray(covariance, float)

    def advance(seen, step):
        moved, spread = seen
        spread = _matmul(_matmul(step.factor, spread), step.factor.T) + step.covariance
        seen = _matmul(step.factor, moved), spread
        return seen, seen

    _, seen = jax.lax.scan(advance, start, steps)
    return _curvature_ratio(*seen)


def _curvature_ratio(moved: jax.Array, spread: jax.Array) -> jax.Array:
    white = solve_triangular(whitener(spread), moved[..., None], lower=True)[..., 0]
    return (white**2).sum(-1)


def mode_kappa(
    centre: ArrayLike, variance: ArrayLike, rate: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0
) -> jax.Array:
    """`kappa` of one mode: ``m^2 / (s^2 + N_lambda(t))``; broadcasts (theory, eq. 13.2)."""
    return jnp.asarray(centre, float) ** 2 / (jnp.asarray(variance, float) + mode_noise(rate, t, noise))


def mode_speciation_time(
    centre: ArrayLike, variance: ArrayLike, rate: ArrayLike = 1.0, noise: ArrayLike = 1.0
) -> jax.Array:
    """Time at which one mode speciates: `transition_time` of the spread ``m^2 - s^2``; broadcasts (theory, eq. 13.2).

    It is 0 if the density has one maximum even without noise (``m^2 <= s^2``), and infinite if the process never merges
    the clusters (``rate spread <= -D``).
    """
    return transition_time(rate, jnp.asarray(centre, float) ** 2 - jnp.asarray(variance, float), noise)


def _above_one(t, process, centre, covariance):
    return kappa(process, t, centre, covariance) - 1


def _rounding(t, process, centre, covariance):
    """Bound on the rounding error of a difference of kappa between two times, if each entry of the spread is wrong by
    ten times the rounding of its size."""
    moved, spread = _seen(process, t, centre, covariance)
    size = jnp.sqrt(jnp.diagonal(spread, axis1=-2, axis2=-1))
    pull = cho_solve((whitener(spread), True), moved)
    return 20 * jnp.finfo(spread.dtype).eps * (size * jnp.abs(pull)).sum(-1) ** 2


def speciation_time(process: Process, centre: ArrayLike, covariance: ArrayLike) -> jax.Array:
    """The time () at which `kappa` is 1, for any drift (theory, section 13.1). Differentiable in all arguments.

    It is 0 if ``kappa(0) <= 1``. It is infinite if kappa stays above 1 for ever, which takes an unstable drift, or if
    it stays above 1 until rounding hides how it falls.

    Args:
      process: drift (n, n).
      centre: (n,) m.
      covariance: (n, n) C, positive semidefinite.

    Raises:
      ValueError: shapes do not belong together, or the noise strength is not positive.
    """
    centre, covariance = jnp.asarray(centre, float), jnp.asarray(covariance, float)
    size = process.drift.shape[0]
    if process.drift.shape != (size, size) or centre.shape != (size,) or covariance.shape != (size, size):
        raise ValueError(
            f"drift {process.drift.shape}, centre {centre.shape} and covariance {covariance.shape} must be "
            "(n, n), (n,) and (n, n); vmap over more"
        )
    require(jnp.asarray(process.noise) > 0, f"the noise strength must be positive, got {process.noise}")
    square = (centre**2).sum()
    square = jnp.where(square > 0, square, 1.0)  # at m = 0 the time is 0, and any scale serves
    scale = square / (jnp.linalg.norm(process.drift) * square + 2 * process.noise)
    return falling_root(_above_one, scale, process, centre, covariance, rounding=_rounding)


# --- the gap of a symmetric pair whose common and difference mode are each clustered


def _clock_slope(rate: jax.Array, spread: jax.Array, noise: jax.Array) -> jax.Array:
    """Derivative of `transition_time` in its rate, element by element; negative."""
    z = rate * spread / noise
    _, slope = jax.jvp(log1prel, (z,), (jnp.ones_like(z),))
    return (spread / noise) ** 2 / 2 * slope


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def speciation_gap(
    b: ArrayLike, g: ArrayLike, spread_common: ArrayLike, spread_difference: ArrayLike, noise: ArrayLike = 1.0
) -> jax.Array:
    """Gap ``t_u - t_v`` between the speciation times of the common and the difference mode of a symmetric pair
    (theory, eq. 13.5), positive if the common mode speciates first; broadcasts.

    The gap is ``f(b - g; spread_common) - f(b + g; spread_difference)`` with f the `transition_time`. For equal spreads
    it is odd in g, increasing, and convex on [0, b). It is infinite for ``g >= b + D / spread_common``, and minus
    infinity for ``g <= -(b + D / spread_difference)``. No digits are lost at small g.

    Args:
      b, g: decay rate of a replica, and coupling as a rate.
      spread_common, spread_difference: ``m^2 - s^2`` of the two modes.
      noise: strength D.
    """
    b, g, common, difference, noise = jnp.broadcast_arrays(
        *(jnp.asarray(v, float) for v in (b, g, spread_common, spread_difference, noise))
    )
    spread = jnp.maximum(difference, 0.0)
    # At one spread, f(b - g) - f(b + g) is an integral of the slope of f in the rate. 16 nodes give it to rounding, as
    # long as the rate at which f diverges is far enough from the interval.
    near = noise + b * spread >= 2 * jnp.abs(g) * spread
    rate = jnp.where(near, b, 1.0)[..., None] + jnp.where(near, g, 0.0)[..., None] * jnp.asarray(_NODES, b.dtype)
    slopes = _clock_slope(rate, jnp.where(near, spread, 1.0)[..., None], noise[..., None])
    integral = -g * (slopes * jnp.asarray(_WEIGHTS, b.dtype)).sum(-1)
    rest = transition_time(b - g, common, noise) - transition_time(b - g, spread, noise)
    far = transition_time(b - g, common, noise) - transition_time(b + g, difference, noise)
    return jnp.where(near, integral + jnp.where(near, rest, 0.0), far)


def gap_small_coupling(b: ArrayLike, g: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """The gap to first order in g (theory, eq. 13.6): ``g / b^2 [log(1 + z) - z / (1 + z)]``, ``z = b spread / D``."""
    b, g, spread, noise = (jnp.asarray(v, float) for v in (b, g, spread, noise))
    return -2 * g * _clock_slope(b, jnp.maximum(spread, 0.0), noise)


def gap_large_spread(b: ArrayLike, g: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """The gap for ``(b - |g|) spread >> D`` (theory, eq. 13.7). Its divergence as ``g -> b`` is an artefact of this
    limit; `gap_at_bound` is the true value."""
    b, g, spread, noise = (jnp.asarray(v, float) for v in (b, g, spread, noise))
    slow, fast = b - g, b + g
    return g / (slow * fast) * jnp.log(spread / noise) + jnp.log(slow) / (2 * slow) - jnp.log(fast) / (2 * fast)


def gap_large_spread_error(b: ArrayLike, g: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Bound on the error of `gap_large_spread` for |g| < b (theory, eq. 13.7)."""
    b, g, spread, noise = (jnp.asarray(v, float) for v in (b, g, spread, noise))
    return noise / (2 * spread) * ((b - g) ** -2 + (b + g) ** -2)


def gap_at_bound(b: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """The gap as g tends to b, where the pair loses its stationary state: ``spread / 2D - f(2b; spread)``, which is
    finite (theory, eq. 13.6)."""
    b, spread, noise = (jnp.asarray(v, float) for v in (b, spread, noise))
    return jnp.maximum(spread, 0.0) / (2 * noise) - transition_time(2 * b, spread, noise)


def gap_without_coupling(
    b: ArrayLike, spread_common: ArrayLike, spread_difference: ArrayLike, noise: ArrayLike = 1.0
) -> jax.Array:
    """The gap at g = 0: ``log[(1 + b spread_common / D) / (1 + b spread_difference / D)] / 2b``. It comes from the
    different strengths of the modes, not from coupling (theory, section 13.3)."""
    return transition_time(b, spread_common, noise) - transition_time(b, spread_difference, noise)


class ModeTimes(NamedTuple):
    """The rates of the left modes of a drift, and the speciation time of each alone."""

    rates: jax.Array  # (n,) ascending
    times: jax.Array  # (n,)


def projected_times(process: Process, centre: ArrayLike, covariance: ArrayLike) -> ModeTimes:
    """Speciation times of the projections on the unit left eigenvectors of a drift with real rates **[ours]**: the
    `transition_time` of ``(l^T m)^2 - l^T C l`` (theory, section 13.1). The joint `speciation_time` is a different
    time, and it is always defined.

    Raises:
      ValueError: two modes rotate into each other.
    """
    centre, covariance = jnp.asarray(centre, float), jnp.asarray(covariance, float)
    rates, modes = left_modes(process)
    spread = _matmul(modes, centre) ** 2 - (_matmul(modes, covariance) * modes).sum(-1)
    return ModeTimes(rates, transition_time(rates, spread, process.noise))


def projected_gap(process: Process, centre: ArrayLike, covariance: ArrayLike) -> jax.Array:
    """The time of the slowest left mode minus that of the fastest (`projected_times`). For a symmetric pair with g > 0
    this is the gap between common and difference mode."""
    times = projected_times(process, centre, covariance).times
    return times[0] - times[-1]
