"""The coupled Ornstein-Uhlenbeck process ``dx = -K x dt + sqrt(2 D) dW`` (docs/theory.md, sections 12.1 to 12.4).

K is any real drift matrix: stable or not, normal or not, defective, rotating. A state at time t is
``x_t = F_t (x_0 + nu_t)``, F_t the factor and nu_t Gaussian with the pulled-back noise N_t as covariance. Functions
work under jit, vmap and grad. Where a bound is violated they raise; where values are traced, the result is NaN.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.linalg import cho_factor, cho_solve, expm
from jax.typing import ArrayLike

from ou_theory.roots import require
from ou_theory.special import exprel, log1prel

_matmul = partial(jnp.matmul, precision="highest")


class Process(NamedTuple):
    """A drift and a strength of noise; `symmetric_pair`, `replicas` and `coupled` make those of coupled replicas."""

    drift: jax.Array  # (n, n) K
    noise: jax.Array  # () D > 0


class Transition(NamedTuple):
    """Law of the state given where it started: mean ``F x_0`` and covariance."""

    factor: jax.Array  # (..., n, n) F_t
    covariance: jax.Array  # (..., n, n) Sigma_t


# --- processes


def symmetric_pair(b: ArrayLike, g: ArrayLike, noise: ArrayLike = 1.0) -> Process:
    """Two replicas, ``K = [[b, -g], [-g, b]]``: rate b - g of the common and b + g of the difference mode."""
    return replicas(b, g, 2, noise)


def replicas(b: ArrayLike, g: ArrayLike, count: int, noise: ArrayLike = 1.0) -> Process:
    """`count` replicas all to all: rate ``b - (count - 1) g`` of the common and b + g of the other modes.

    Raises:
      ValueError: no replicas, not numbers, or the noise strength is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return coupled(b, 1 - jnp.eye(count), g, noise)


def coupled(b: ArrayLike, adjacency: ArrayLike, g: ArrayLike, noise: ArrayLike = 1.0) -> Process:
    """Replicas coupled along a graph, ``K = b I - g A``: rates ``b - g a``, a the eigenvalues of A.

    Args:
      adjacency: (n, n) A: entry (i, j) weighs what replica j does to replica i.

    Raises:
      ValueError: A is not square, the others are not numbers, or the noise strength is not positive.
    """
    b, g, noise, adjacency = (jnp.asarray(v, float) for v in (b, g, noise, adjacency))
    if b.ndim or g.ndim or noise.ndim:
        raise ValueError(f"b, g, noise must be numbers, got shapes {b.shape}, {g.shape}, {noise.shape}; vmap over more")
    if adjacency.ndim != 2 or adjacency.shape[0] != adjacency.shape[1]:
        raise ValueError(f"the adjacency matrix must be square, got shape {adjacency.shape}")
    require(noise > 0, f"the noise strength must be positive, got {noise}")
    return Process(b * jnp.eye(adjacency.shape[0]) - g * adjacency, noise)


def _drift(process: Process) -> jax.Array:
    drift = jnp.asarray(process.drift, float)
    if drift.ndim != 2 or drift.shape[0] != drift.shape[1]:
        raise ValueError(f"the drift must be one square matrix, got shape {drift.shape}; vmap over more")
    return drift


# --- one mode


def mode_factor(rate: ArrayLike, t: ArrayLike) -> jax.Array:
    """``exp(-rate t)``."""
    return jnp.exp(-jnp.asarray(rate, float) * jnp.asarray(t, float))


def mode_noise(rate: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Pulled-back noise ``N_lambda(t) = D / lambda (exp(2 lambda t) - 1)`` of a mode, 2 D t at rate 0; broadcasts."""
    rate, t, noise = (jnp.asarray(v, float) for v in (rate, t, noise))
    z = 2 * rate * t
    far = jnp.abs(z) > 1  # there t may be infinite
    near = 2 * noise * jnp.where(far, 0.0, t) * exprel(jnp.where(far, 0.0, z))
    return jnp.where(far, noise / jnp.where(far, rate, 1.0) * jnp.expm1(jnp.where(far, z, 0.0)), near)


def mode_variance(rate: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Variance ``D / lambda (1 - exp(-2 lambda t))`` that a mode has gathered, 2 D t at rate 0; broadcasts."""
    return mode_noise(-jnp.asarray(rate, float), t, noise)


def transition_time(rate: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """OU time at which the pulled-back noise of a mode reaches `spread`: ``log(1 + rate spread / D) / (2 rate)``.

    0 for ``spread <= 0``, infinite for ``rate spread / D <= -1`` and for an infinite spread, ``spread / 2D`` at rate 0.
    """
    rate, spread, noise = (jnp.asarray(v, float) for v in (rate, spread, noise))
    z = rate * spread / noise
    reached = ~(z <= -1) & (spread < jnp.inf)  # what is no number stays none
    time = spread / (2 * noise) * log1prel(jnp.where(reached, z, 0.0))
    return jnp.where(spread <= 0, 0.0, jnp.where(reached | jnp.isnan(spread), time, jnp.inf))


# --- any drift

_DOUBLINGS = 64
_STEP = 0.5  # |K| t up to which the matrix exponential is asked


def transition(process: Process, t: ArrayLike) -> Transition:
    """Factor ``exp(-K t)`` and covariance ``2 D int_0^t exp(-K s) exp(-K^T s) ds``, each (..., n, n).

    A matrix exponential for a short time, doubled by the semigroup law: nothing is subtracted, so that the error is
    that of the drift, eps |K| t relative to each decaying mode. An infinite time gives the stationary state of a stable
    drift.

    Args:
      process: drift (n, n).
      t: times >= 0, any shape (...). NaN where an unstable drift overflows, and beyond ``|K| t = 2^63`` unless the
        factor has decayed to 0.

    Raises:
      ValueError: a time is negative, or the drift is not one square matrix.
    """
    drift, noise, t = _drift(process), jnp.asarray(process.noise, float), jnp.asarray(t, float)
    require(~(t < 0), f"times must not be negative, got {t}")
    at = jnp.vectorize(partial(_transition, drift, noise), signature="()->(n,n),(n,n)")
    return Transition(*at(t))


@jax.jit
def _transition(drift: jax.Array, noise: jax.Array, t: jax.Array) -> tuple[jax.Array, jax.Array]:
    size = jnp.abs(jax.lax.stop_gradient(drift))
    size = jnp.maximum(size.sum(0).max(), size.sum(1).max())
    limit = jnp.where(size > 0, _STEP * 2.0**_DOUBLINGS / jnp.where(size > 0, size, 1.0), jnp.inf)
    bounded = jnp.minimum(t, limit)
    steps = jnp.log2(jnp.maximum(jax.lax.stop_gradient(bounded) * size / _STEP, 1.0))
    doublings = jnp.clip(jnp.ceil(steps), 0, _DOUBLINGS).astype(int)
    step = bounded * jnp.ldexp(jnp.ones_like(t), -doublings)

    # Van Loan: the exponential of one block matrix has the factor and what, times its transpose, is the covariance
    drift = drift * step
    n = drift.shape[0]
    block = expm(jnp.block([[-drift, jnp.eye(n)], [jnp.zeros((n, n)), drift.T]]))
    factor = block[:n, :n]
    integral = _matmul(block[:n, n:], factor.T)

    def double(i, state):
        goes = i < doublings
        factor, integral = (jnp.where(goes, v, 0.0) for v in state)  # no overflow where nothing is to be doubled
        added = _matmul(_matmul(factor, integral), factor.T)
        doubled = _matmul(factor, factor), integral + (added + added.T) / 2
        return tuple(jnp.where(goes, new, old) for new, old in zip(doubled, state, strict=True))

    factor, integral = jax.lax.fori_loop(0, _DOUBLINGS, double, (factor, (integral + integral.T) / 2))
    covariance = 2 * noise * step * integral
    known = ((t <= limit) | jnp.all(factor == 0)) & jnp.all(jnp.isfinite(covariance))
    return jnp.where(known, factor, jnp.nan), jnp.where(known, covariance, jnp.nan)


def pulled_noise(process: Process, t: ArrayLike) -> jax.Array:
    """N_t (..., n, n), the noise as if it had been added before the drift: ``2 D int_0^t exp(K s) exp(K^T s) ds``.

    The covariance of the process with the drift -K. It increases with t, and overflows (NaN) early for a stable K.
    """
    return transition(process._replace(drift=-_drift(process)), t).covariance


# --- stationary state and bounds


def _rounding(drift: jax.Array) -> jax.Array:
    return drift.shape[0] * jnp.finfo(drift.dtype).eps * jnp.linalg.norm(drift)


def is_stable(process: Process) -> jax.Array:
    """Whether a stationary state exists: all rates have a positive real part, by more than rounding (n eps |K|)."""
    drift = _drift(process)
    return jnp.linalg.eigvals(jax.lax.stop_gradient(drift)).real.min() > _rounding(drift)


def is_contracting(process: Process) -> jax.Array:
    """Whether no difference of two states ever grows, ``|F_t| <= 1`` for all t: ``K + K^T`` is positive semidefinite,
    to rounding. Stricter than `is_stable` but for the margin; a stable drift that fails amplifies transiently."""
    drift = _drift(process)
    return jnp.linalg.eigvalsh(jax.lax.stop_gradient(drift + drift.T) / 2).min() >= -_rounding(drift)


def has_real_modes(process: Process) -> jax.Array:
    """Whether all rates are real, so that no two modes rotate into each other: imaginary parts up to ``sqrt(eps) |K|``
    count as zero, which is how far rounding moves a double rate."""
    drift = jax.lax.stop_gradient(_drift(process))
    tolerance = jnp.finfo(drift.dtype).eps ** 0.5 * jnp.linalg.norm(drift)
    return jnp.abs(jnp.linalg.eigvals(drift).imag).max() <= tolerance


class CouplingRange(NamedTuple):
    low: jax.Array
    high: jax.Array


def symmetric_bound(b: ArrayLike, count: int = 2) -> CouplingRange:
    """Couplings between which `count` replicas all to all have a stationary state: ``-b < g < b / (count - 1)``.

    Raises:
      ValueError: fewer than 2 replicas, or b is not positive, where no coupling is stable.
    """
    b = jnp.asarray(b, float)
    if count < 2:
        raise ValueError(f"a coupling needs at least 2 replicas, got {count}")
    require(b > 0, f"b must be positive for a stable coupling to exist, got {b}")
    return CouplingRange(-b, b / (count - 1))


def speciation_bound(b: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Coupling ``b + D / spread`` from which on the common mode of a symmetric pair never merges its clusters; weaker
    than stability. Infinite for ``spread <= 0``, where nothing is to be merged."""
    b, spread, noise = (jnp.asarray(v, float) for v in (b, spread, noise))
    return jnp.where(spread > 0, b + noise / jnp.where(spread > 0, spread, 1.0), jnp.inf)


def stationary_covariance(process: Process) -> jax.Array:
    """Sigma_inf (n, n), the solution of ``K Sigma + Sigma K^T = 2 D``.

    Raises:
      ValueError: the drift is not stable.
    """
    stable = is_stable(process)
    require(stable, f"the drift {process.drift} has no stationary state: a rate is not positive (is_stable)")
    return jnp.where(stable, transition(process, jnp.inf).covariance, jnp.nan)


def entropy_production(process: Process) -> jax.Array:
    """Entropy () in nats that the stationary state produces per unit of time; 0 exactly for a symmetric drift, where
    detailed balance holds. It does not depend on the strength of the noise.

    Raises:
      ValueError: the drift is not stable.
    """
    drift, covariance = _drift(process), stationary_covariance(process) / process.noise
    flow = _matmul(drift, covariance)
    current = (flow - flow.T) / 2  # K Sigma - D is antisymmetric, and moves probability in circles
    whitened = cho_solve(cho_factor(covariance, lower=True), current)
    production = -jnp.trace(_matmul(current, whitened))
    return jnp.where(jnp.all(drift == drift.T), 0.0, production)


class LeftModes(NamedTuple):
    """Projections ``z = l^T x``, each of them a process of one mode with the same noise strength."""

    rates: jax.Array  # (n,) ascending
    modes: jax.Array  # (n, n), row a the unit left eigenvector l_a


def left_modes(process: Process) -> LeftModes:
    """Left eigenvectors of a drift with real rates; orthogonal if it is symmetric, parallel for a double mode of a
    defective one; the first large component is positive. Derivatives exist at simple rates.

    Raises:
      ValueError: two modes rotate into each other.
    """
    drift = _drift(process)
    real = has_real_modes(process)
    require(real, f"modes of the drift {drift} rotate into each other (has_real_modes), and have no times of their own")
    known = jax.lax.stop_gradient(drift)
    # a symmetric drift may have degenerate rates, of which only the symmetric solver makes orthogonal modes
    symmetric = jnp.all(known == known.T)
    modes = jnp.where(symmetric, jnp.linalg.eigh(known)[1], jnp.linalg.eig(known.T)[1].real).T
    modes = modes / jnp.linalg.norm(modes, axis=1, keepdims=True)
    first = jnp.argmax(jnp.abs(modes) > 0.5 * jnp.abs(modes).max(1, keepdims=True), axis=1)
    modes = modes * jnp.sign(jnp.take_along_axis(modes, first[:, None], 1))

    def rate(mode):
        return (mode * _matmul(mode, drift)).sum(-1) / (mode**2).sum(-1)

    def excess(mode):  # 0 at unit left eigenvectors only
        return _matmul(mode, drift) - rate(mode) * mode + ((mode**2).sum() - 1) * mode

    def solve(linear, value):
        return jnp.linalg.solve(jax.jacobian(linear)(value), value)

    differentiable = jax.vmap(lambda mode: jax.lax.custom_root(excess, mode, lambda _, guess: guess, solve))
    modes = differentiable(modes[jnp.argsort(rate(modes))])
    return LeftModes(jnp.where(real, rate(modes), jnp.nan), jnp.where(real, modes, jnp.nan))
