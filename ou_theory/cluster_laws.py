"""Data laws and their exact denoisers (docs/theory.md, section 4).

A law lives in modes, coordinates in which everything but a few signs is independent and Gaussian; images are an
orthonormal rotation away. Levels enter as the noise variance ``sigma2`` of the rescaled frame ``y = x0 + sigma noise``.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from ou_theory.gain_model import wiener_gain
from ou_theory.roots import require


class Clusters(NamedTuple):
    """M modes ``x0 = sum_a c_a m_a + s z``: A independent signs ``c_a = +-1``, and Gaussian noise z.

    With one centre this is two clusters at ``+-m``; with none (A = 0) a Gaussian; with one centre in the common and one
    in the difference modes of a pair, its mode mixture.
    """

    variance: jax.Array  # (M,) s^2, within a cluster
    centres: jax.Array  # (A, M) m_a; no mode belongs to two of them

    def draw(self, key: jax.Array, count: int) -> jax.Array:
        """Independent samples (count, M)."""
        for_signs, for_noise = jax.random.split(key)
        signs = jax.random.rademacher(for_signs, (count, self.centres.shape[0]), self.variance.dtype)
        noise = jax.random.normal(for_noise, (count, self.variance.size), self.variance.dtype)
        return jnp.matmul(signs, self.centres, precision="highest") + jnp.sqrt(self.variance) * noise

    def field(self, y: jax.Array, sigma2: jax.Array) -> jax.Array:
        """H_a (..., A): half the log-odds of sign a at states y (..., M), which `posterior_mean` takes the tanh of."""
        return jnp.einsum("...m,am->...a", y / (self.variance + sigma2), self.centres, precision="highest")

    def posterior_mean(self, y: jax.Array, sigma2: jax.Array) -> jax.Array:
        """``E[x0 | y]`` (..., M) at states y (..., M) of noise variance `sigma2` (scalar)."""
        guess = jnp.matmul(jnp.tanh(self.field(y, sigma2)), self.centres, precision="highest")
        return guess + wiener_gain(self.variance, sigma2) * (y - guess)

    def kappa(self, sigma2: jax.Array) -> jax.Array:
        """``sum_k m_k^2 / (s_k^2 + sigma^2)`` (..., A) for levels (...), each one number for all modes: speciation of
        sign a is where it passes 1."""
        sigma2 = jnp.asarray(sigma2)[..., None, None]
        return (self.centres**2 / (self.variance + sigma2)).sum(-1)

    def total_variance(self) -> jax.Array:
        """(M,) variance of each mode, signs included."""
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
    """``E function(kappa + sqrt(kappa) z)``, z unit Gaussian, by the trapezoid rule on [-12, 12]; for functions like
    these it converges faster than any power of the number of points."""
    z = jnp.linspace(-12, 12, points, dtype=kappa.dtype)
    weight = jnp.exp(-(z**2) / 2)
    field = kappa[..., None] + jnp.sqrt(kappa)[..., None] * z
    return (weight * function(field)).sum(-1) / weight.sum()


@partial(jax.custom_jvp, nondiff_argnums=(0, 2))
def _doubt(power: int, kappa: jax.Array, points: int) -> jax.Array:
    """``E sech(H)^(2 power)`` over the field ``H = kappa + sqrt(kappa) z``; of power 1, what T lacks of 1."""
    return field_average(lambda field: jnp.cosh(field) ** (-2 * power), kappa, points)


@_doubt.defjvp
def _(power, points, primals, tangents):
    # sqrt(kappa) has no slope at 0, but the mean of an even f moves by E[f' tanh + f'' / 2] (theory, section 9.1)
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
    """``T(kappa) = E tanh(kappa + sqrt(kappa) z) = E tanh^2(kappa + sqrt(kappa) z)``, z unit Gaussian: how sure of a
    sign the exact posterior is, and the correlation of the signs of two of its draws. In [0, 1], any shape.

    Its slope is ``E sech^4(kappa + sqrt(kappa) z)``, 1 at 0; all derivatives are finite.

    Args:
      kappa: >= 0.
      points: of the quadrature.
    """
    kappa = jnp.asarray(kappa, float)
    return jnp.where(kappa == jnp.inf, 1.0, _correlation(jnp.where(kappa == jnp.inf, 1.0, kappa), points))


def sign_doubt(kappa: ArrayLike, points: int = 4801) -> jax.Array:
    """``1 - T(kappa)``, with all its digits where that is small (kappa up to about 100); see `sign_correlation`."""
    kappa = jnp.asarray(kappa, float)
    return jnp.where(kappa == jnp.inf, 0.0, _doubt(1, jnp.where(kappa == jnp.inf, 1.0, kappa), points))


def mmse(law: Clusters, sigma2: jax.Array) -> jax.Array:
    """Mean square error (..., M) of the posterior mean in each mode, for levels (...)."""
    sigma2 = jnp.asarray(sigma2)
    share = sigma2[..., None] / (law.variance + sigma2[..., None])  # of the noise in what is seen
    doubt = sign_doubt(law.kappa(sigma2))  # (..., A)
    return law.variance * share + share**2 * jnp.einsum("...a,am->...m", doubt, law.centres**2, precision="highest")
