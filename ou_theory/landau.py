"""What happens at speciation: a supercritical pitchfork, with the mean-field Ising model's magnetisation as its exact
order parameter (docs/theory.md, section 13.2).

All functions broadcast, and work under jit, vmap and grad.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from scipy.special import bernoulli, factorial

from ou_theory.roots import implicit
from ou_theory.special import exprel


class Landau(NamedTuple):
    """``-log p = r2 x^2 / 2 + u4 x^4 / 4 + ...`` of one mode about the symmetric point."""

    r2: jax.Array  # changes sign at speciation
    u4: jax.Array  # positive: the transition is continuous


def _moments(centre: ArrayLike, variance: ArrayLike, rate: ArrayLike, t: ArrayLike, noise: ArrayLike):
    """Centre mu and variance P of a cluster at time t, in the frame of the state."""
    centre, variance, rate, t, noise = (jnp.asarray(v, float) for v in (centre, variance, rate, t, noise))
    return jnp.exp(-rate * t) * centre, jnp.exp(-2 * rate * t) * variance + 2 * noise * t * exprel(-2 * rate * t)


def landau(centre: ArrayLike, variance: ArrayLike, rate: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> Landau:
    """Landau coefficients of one mode with clusters ``+-m`` of variance s^2, at time t: ``r2 = (P - mu^2) / P^2`` and
    ``u4 = mu^4 / 3 P^4`` (theory, eq. 13.3).

    Here mu is the centre and P > 0 the variance of a cluster at time t, in the frame of the state.
    """
    moved, spread = _moments(centre, variance, rate, t, noise)
    return Landau((spread - moved**2) / spread**2, (moved / spread) ** 4 / 3)


_ORDERS = np.arange(1, 10)
_SERIES = (4.0**_ORDERS * bernoulli(18)[2 * _ORDERS] / factorial(2 * _ORDERS))[::-1]  # of x coth x - 1 in x^2
_SERIES_BELOW = 0.1


def _excess(square: jax.Array, wanted: jax.Array) -> jax.Array:
    """``wanted - (x coth x - 1)`` with ``x^2 = square >= 0``. No digits are lost at small x."""
    small = square < _SERIES_BELOW
    series = jnp.polyval(jnp.asarray([*_SERIES, 0.0], square.dtype), jnp.where(small, square, 0.0))
    x = jnp.sqrt(jnp.where(small, 1.0, square))
    return wanted - jnp.where(small, series, x / jnp.tanh(x) - 1)


def magnetisation(kappa: ArrayLike) -> jax.Array:
    """The largest solution M of ``M = tanh(kappa M)``: 0 for ``kappa <= 1``, in (0, 1) above (theory, eq. 13.4).

    Near the onset ``M^2 = 3 (kappa - 1) / kappa^3``, so that the slope in kappa is infinite there. The derivative at
    kappa = 1 itself is returned as 0.
    """
    kappa = jnp.asarray(kappa, float)
    ordered = ~(kappa <= 1)  # NaN stays NaN
    kappa = jnp.clip(jnp.where(ordered, kappa, 2.0), max=1e3)  # above, M is 1 to rounding
    # x = kappa M solves x coth x = kappa. The left side is concave in x^2, so that Newton's method rises to the root
    # from any point below it.
    square = (kappa * jnp.tanh(jnp.sqrt(3 * (kappa - 1)))) ** 2
    for _ in range(6):
        value, slope = jax.jvp(lambda s: _excess(s, kappa - 1), (square,), (jnp.ones_like(square),))
        square = square - value / slope
    square = implicit(_excess, square, ordered, kappa - 1)
    return jnp.where(ordered, jnp.tanh(jnp.sqrt(square)), 0.0)


def branch(centre: ArrayLike, variance: ArrayLike, rate: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """The maximum ``x* = mu M(kappa)`` of the density on the side of the centre, in the frame of the state; 0 before
    speciation (theory, eq. 13.4). The other maximum is ``-x*``. In several modes ``x*_k = mu_k M`` with the joint
    kappa."""
    moved, spread = _moments(centre, variance, rate, t, noise)
    return moved * magnetisation(moved**2 / spread)


def onset_slope(centre: ArrayLike, variance: ArrayLike, rate: ArrayLike = 1.0, noise: ArrayLike = 1.0) -> jax.Array:
    """Slope of ``M^2`` in ``t_s - t`` at the speciation time t_s: ``6 (D + rate spread) / m^2`` with the spread
    ``m^2 - s^2`` (theory, eq. 13.4)."""
    square = jnp.asarray(centre, float) ** 2
    return 6 * (jnp.asarray(noise) + jnp.asarray(rate) * (square - jnp.asarray(variance, float))) / square
