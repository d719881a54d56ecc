"""Closed forms of the process of two replicas with any coupling, ``K = [[b1, -g12], [-g21, b2]]`` (docs/theory.md,
section 12.5).

All arguments broadcast; results have two more axes. With the mean rate ``k = (b1 + b2) / 2`` and ``w2 = ((b1 - b2) /
2)^2 + g12 g21`` the rates are ``k +- sqrt(w2)``: real, double or rotating, which these forms pass through smoothly, as
they pass the bounds of stability. Errors are of the size of the rounding of the largest entry.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ou_theory.process import Transition
from ou_theory.roots import require
from ou_theory.special import exprel


def _matrix(a11: jax.Array, a12: jax.Array, a21: jax.Array, a22: jax.Array) -> jax.Array:
    rows = [jnp.stack(jnp.broadcast_arrays(*row), -1) for row in ((a11, a12), (a21, a22))]
    return jnp.stack(jnp.broadcast_arrays(*rows), -2)


_COSH = [1 / float(np.prod(np.arange(1.0, 2 * k + 1))) for k in range(9, -1, -1)]  # of cosh(sqrt(y)) in y
_SINH = [1 / float(np.prod(np.arange(1.0, 2 * k + 2))) for k in range(9, -1, -1)]  # of sinh(sqrt(y)) / sqrt(y)


def _waves(a: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``exp(-a) cosh(w)`` and ``exp(-a) sinh(w) / w`` for ``y = w^2`` of either sign."""
    near, rotating = jnp.abs(y) < 1, y <= -1
    around = jnp.where(near, y, 0.0)
    w = jnp.sqrt(jnp.where(near, 1.0, jnp.abs(y)))
    slow = jnp.exp(jnp.where(near | rotating, 0.0, w - a))
    fast = slow * jnp.exp(-2 * w)
    decay = jnp.exp(-jnp.where(near | rotating, a, 0.0))

    def pick(series, sine, real):
        return jnp.where(near, decay * jnp.polyval(jnp.array(series), around), jnp.where(rotating, decay * sine, real))

    return pick(_COSH, jnp.cos(w), (slow + fast) / 2), pick(_SINH, jnp.sin(w) / w, (slow - fast) / (2 * w))


class _Moments(NamedTuple):
    """Integrals over s in [0, 1] of ``exp(-a s)`` times the following."""

    one: jax.Array  # 1
    cosh: jax.Array  # cosh(w s)
    sinh: jax.Array  # sinh(w s) / w
    bend: jax.Array  # (cosh(w s) - 1) / w^2


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def _moments(a: jax.Array, y: jax.Array) -> _Moments:
    """The integrals of `_Moments`, by one of three formulas. Each is used in the part of the (a, y) plane where none of
    its differences cancels, and each is smooth in y there."""
    one = exprel(-a)

    # where neither a nor y is large: Gauss quadrature of analytic functions
    small = (jnp.abs(a) < 2) & (jnp.abs(y) < 4)
    s = jnp.asarray((_NODES + 1) / 2, a.dtype)
    weight = jnp.asarray(_WEIGHTS / 2, a.dtype)
    a_small, y_small = jnp.where(small, a, 0.0)[..., None], jnp.where(small, y, 0.0)[..., None]
    cosh, sinh = _waves(a_small * s, y_small * s**2)
    _, half = _waves(a_small * s / 2, y_small * s**2 / 4)  # exp(-a) (cosh w - 1) / w^2 = (exp(-a/2) sinh(w/2) / w)^2 2
    quadrature = ((weight * v).sum(-1) for v in (cosh, s * sinh, (s * half) ** 2 / 2))

    # where w is real and comparable to a: sums and differences of the integrals of two exponentials
    apart = ~small & (jnp.abs(y) > a**2 / 4)
    real = apart & (y > 0)
    w = jnp.sqrt(jnp.where(real, y, 1.0))
    slow, fast = exprel(jnp.where(real, w - a, 0.0)), exprel(jnp.where(real, -w - a, 0.0))

    # elsewhere, and for any rotating y: the antiderivatives, whose denominator is a^2 - w^2
    plain = ~small & ~real
    a_plain, y_plain = jnp.where(plain, a, 2.0), jnp.where(plain, y, 0.0)
    c, sn = _waves(a_plain, y_plain)
    _, half = _waves(a_plain / 2, y_plain / 4)
    det = a_plain**2 - y_plain
    cosh = jnp.where(real, (slow + fast) / 2, (a_plain - a_plain * c - y_plain * sn) / det)
    sinh = jnp.where(real, (slow - fast) / (2 * w), (1 - a_plain * sn - c) / det)
    a_plain = jnp.where(apart, 2.0, a_plain)
    bend = (1 - jnp.exp(-a_plain) - a_plain**2 * half**2 / 2 - a_plain * sn) / (a_plain * det)
    bend = jnp.where(apart, (cosh - one) / jnp.where(apart, y, 1.0), bend)
    return _Moments(one, *(jnp.where(small, u, v) for u, v in zip(quadrature, (cosh, sinh, bend), strict=True)))


def transition_2x2(
    b1: ArrayLike, b2: ArrayLike, g12: ArrayLike, g21: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0
) -> Transition:
    """Factor and covariance (..., 2, 2) at finite times >= 0 (theory, eq. 12.8): an independent route to
    `process.transition`.

    Raises:
      ValueError: a time is negative.
    """
    b1, b2, g12, g21, t, noise = (jnp.asarray(v, float) for v in (b1, b2, g12, g21, t, noise))
    require(~(t < 0), f"times must not be negative, got {t}")
    k, h = (b1 + b2) / 2, (b1 - b2) / 2
    w2 = h**2 + g12 * g21
    c, s = _waves(k * t, w2 * t**2)
    s = t * s
    factor = _matrix(c - h * s, g12 * s, g21 * s, c + h * s)

    # the integral of exp(-K s) exp(-K s)^T, term by term; K - k has the rows (h, -g12) and (-g21, -h)
    one, cosh, sinh, bend = _moments(2 * k * t, 4 * w2 * t**2)
    own, first, second = t * (one + cosh), 2 * t**2 * sinh, 4 * t**3 * bend
    cross = first * (g12 + g21) + second * h * (g12 - g21)
    sum1, sum2 = second * (h**2 + g12**2), second * (h**2 + g21**2)
    covariance = _matrix(own - 2 * h * first + sum1, cross, cross, own + 2 * h * first + sum2)
    return Transition(factor, noise[..., None, None] * covariance)


def stationary_2x2(b1: ArrayLike, b2: ArrayLike, g12: ArrayLike, g21: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Stationary covariance (..., 2, 2): ``D K^-1 (1 + a J)`` with ``J = [[0, 1], [-1, 0]]`` and
    ``a = (g21 - g12) / (b1 + b2)`` (theory, eq. 12.9).

    Raises:
      ValueError: the pair is not stable, which takes ``b1 + b2 > 0`` and ``g12 g21 < b1 b2``. If the values are
        traced, the result is NaN.
    """
    b1, b2, g12, g21, noise = (jnp.asarray(v, float) for v in (b1, b2, g12, g21, noise))
    det = b1 * b2 - g12 * g21
    stable = (b1 + b2 > 0) & (det > 0)
    require(stable, "no stationary state: b1 + b2 must be positive and g12 g21 less than b1 b2")
    a = (g21 - g12) / jnp.where(stable, b1 + b2, 1.0)
    scale = jnp.where(stable, noise / jnp.where(stable, det, 1.0), jnp.nan)
    off = (a * (b2 - b1) + g12 + g21) / 2  # the mean of two expressions that are equal but for rounding
    return scale[..., None, None] * _matrix(b2 - a * g12, off, off, b1 + a * g21)
