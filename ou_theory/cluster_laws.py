"""Laws of clustered data and their exact denoisers (docs/theory.md, section 9).

The coordinates of a law are modes: given a few signs, they are independent and Gaussian. Images follow by an
orthonormal rotation. A level is the noise variance ``sigma2`` of the rescaled frame ``y = x0 + sigma noise``."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ou_theory.gain_model import wiener_gain
from ou_theory.roots import require


class Clusters(NamedTuple):
    """M modes ``x0 = sum_a c_a m_a + s z`` with A independent signs ``c_a = +-1`` and unit Gaussian z.

    One centre makes two clusters at ``+-m``; none (A = 0) makes a Gaussian. The mode mixture of a pair has one centre
    in the common and one in the difference modes. `clusters` makes a law whose parts are checked."""

    variance: jax.Array  # (M,) s^2, within a cluster
    centres: jax.Array  # (A, M) m_a; no mode belongs to two of them

    def draw(self, key: jax.Array, count: int) -> jax.Array:
        """Independent samples (count, M)."""
        for_signs, for_noise = jax.random.split(key)
        signs = jax.random.rademacher(for_signs, (count, self.centres.shape[0]), self.variance.dtype)
        noise = jax.random.normal(for_noise, (count, self.variance.size), self.variance.dtype)
        return jnp.matmul(signs, self.centres, precision="highest") + jnp.sqrt(self.variance) * noise

    def field(self, y: jax.Array, sigma2: jax.Array) -> jax.Array:
        """Half the log-odds H_a (..., A) of each sign at states y (..., M) of noise variance `sigma2`: the posterior
        mean of sign a is ``tanh(H_a)`` (theory, section 9.1)."""
        return jnp.einsum("...m,am->...a", y / (self.variance + sigma2), self.centres, precision="highest")

    def posterior_mean(self, y: jax.Array, sigma2: jax.Array) -> jax.Array:
        """Posterior mean ``E[x0 | y]`` (..., M) at states y (..., M) of noise variance `sigma2`, a number."""
        guess = jnp.matmul(jnp.tanh(self.field(y, sigma2)), self.centres, precision="highest")
        return guess + wiener_gain(self.variance, sigma2) * (y - guess)

    def kappa(self, sigma2: jax.Array) -> jax.Array:
        """Curvature ratio ``sum_k m_k^2 / (s_k^2 + sigma^2)`` (..., A) of each sign at noise variances (...), which all
        modes share. Sign a speciates where it passes 1."""
        sigma2 = jnp.asarray(sigma2)[..., None, None]
        return (self.centres**2 / (self.variance + sigma2)).sum(-1)

    def total_variance(self) -> jax.Array:
        """Variance (M,) of each mode, with that of the signs."""
        return self.variance + (self.centres**2).sum(0)


def clusters(variance: ArrayLike, centres: ArrayLike) -> Clusters:
    """A law whose parts are checked.

    Args:
      variance: (M,) >= 0.
      centres: (A, M).

    Raises:
      ValueError: shapes do not belong together, a variance is negative, or two centres share a mode.
    """
    law = Clusters(jnp.asarray(variance, float), jnp.asarray(centres, float))
    if law.variance.ndim != 1 or law.centres.ndim != 2 or law.centres.shape[1] != law.variance.size:
        raise ValueError(f"variance {law.variance.shape} and centres {law.centres.shape} must be (M,) and (A, M)")
    require(law.variance >= 0, f"variances must not be negative, got {law.variance}")
    require((law.centres != 0).sum(0) <= 1, f"a mode may belong to one centre only, got {law.centres}")
    return law


def field_average(function: Callable[[jax.Array], jax.Array], kappa: jax.Array, points: int = 4801) -> jax.Array:
    """Mean ``E function(kappa + sqrt(kappa) z)`` over a unit Gaussian z, by the trapezoid rule on [-12, 12]. For smooth
    functions the rule converges faster than any power of the number of points."""
    z = jnp.linspace(-12, 12, points, dtype=kappa.dtype)
    weight = jnp.exp(-(z**2) / 2)
    field = kappa[..., None] + jnp.sqrt(kappa)[..., None] * z
    return (weight * function(field)).sum(-1) / weight.sum()


@partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def _doubt(power: int, kappa: jax.Array, points: int) -> jax.Array:
    """``E sech(H)^(2 power)`` over the field ``H = kappa + sqrt(kappa) z``. With power 1 it is ``1 - T``."""
    return field_average(lambda field: jnp.cosh(field) ** (-2 * power), kappa, points)


@_doubt.defjvp
def _(power, points, primals, tangents):
    # sqrt(kappa) has no slope at 0, but the mean of an even f has the slope E[f' tanh + f'' / 2] (theory, section 9.1)
    (kappa,), (moved,) = primals, tangents
    value = _doubt(power, kappa, points)
    slope = 2 * power * (power - 1) * value - power * (2 * power - 1) * _doubt(power + 1, kappa, points)
    return value, slope * moved


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _correlation(kappa: jax.Array, points: int) -> jax.Array:
    return field_average(lambda field: jnp.tanh(field) ** 2, kappa, points)


@_correlation.defjvp
def _(points, primals, tangents):
    (kappa,), (moved,) = primals, tangents
    return _correlation(kappa, points), _doubt(2, kappa, points) * moved


def sign_correlation(kappa: ArrayLike, points: int = 4801) -> jax.Array:
    """Correlation ``T(kappa)`` in [0, 1] of the signs of two draws from the exact posterior (theory, section 9.1).

    It is ``E tanh(kappa + sqrt(kappa) z) = E tanh^2(kappa + sqrt(kappa) z)`` with unit Gaussian z, and also the mean
    square of the posterior mean of a sign. Its slope is ``E sech^4(kappa + sqrt(kappa) z)``, which is 1 at 0; all
    derivatives are finite.

    Args:
      kappa: >= 0, any shape.
      points: of the quadrature.
    """
    kappa = jnp.asarray(kappa, float)
    return jnp.where(kappa == jnp.inf, 1.0, _correlation(jnp.where(kappa == jnp.inf, 1.0, kappa), points))


def sign_doubt(kappa: ArrayLike, points: int = 4801) -> jax.Array:
    """``1 - T(kappa)`` with the T of `sign_correlation`. It keeps all its digits where it is small, for kappa up to
    about 100."""
    kappa = jnp.asarray(kappa, float)
    return jnp.where(kappa == jnp.inf, 0.0, _doubt(1, jnp.where(kappa == jnp.inf, 1.0, kappa), points))


def mmse(law: Clusters, sigma2: jax.Array) -> jax.Array:
    """Mean square error (..., M) of the posterior mean in each mode, at noise variances `sigma2` (...)."""
    sigma2 = jnp.asarray(sigma2)
    share = sigma2[..., None] / (law.variance + sigma2[..., None])  # share of the noise in the variance of y
    doubt = sign_doubt(law.kappa(sigma2))  # (..., A)
    return law.variance * share + share**2 * jnp.einsum("...a,am->...m", doubt, law.centres**2, precision="highest")
