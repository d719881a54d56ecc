"""The coupled Ornstein-Uhlenbeck process ``dx = -K x dt + sqrt(2 D) dW`` (docs/theory.md, sections 12.1 to 12.4).

K is any real drift matrix: stable or not, normal or not, defective, rotating. A state at time t is
``x_t = F_t (x_0 + nu_t)``, where F_t is the factor and nu_t is Gaussian with the pulled-back noise N_t as covariance.
Functions work under jit, vmap and grad. They raise where a bound is violated; if the values are traced, the result is
NaN.
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
    """A drift and a noise strength. `symmetric_pair`, `replicas` and `coupled` make those of coupled replicas."""

    drift: jax.Array  # (n, n) K
    noise: jax.Array  # () D > 0


class Transition(NamedTuple):
    """Law of the state given where it started: mean ``F x_0`` and covariance."""

    factor: jax.Array  # (..., n, n) F_t
    covariance: jax.Array  # (..., n, n) Sigma_t


# --- processes


def symmetric_pair(b: ArrayLike, g: ArrayLike, noise: ArrayLike = 1.0) -> Process:
    """Two replicas with ``K = [[b, -g], [-g, b]]``. The common mode has the rate b - g, the difference mode b + g."""
    return replicas(b, g, 2, noise)


def replicas(b: ArrayLike, g: ArrayLike, count: int, noise: ArrayLike = 1.0) -> Process:
    """`count` replicas, coupled all to all. The common mode has the rate ``b - (count - 1) g``, all others b + g.

    Raises:
      ValueError: no replicas, not numbers, or the noise strength is not positive.
    """
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return coupled(b, 1 - jnp.eye(count), g, noise)


def coupled(b: ArrayLike, adjacency: ArrayLike, g: ArrayLike, noise: ArrayLike = 1.0) -> Process:
    """Replicas coupled along a graph: ``K = b I - g A``, whose rates are ``b - g a`` for the eigenvalues a of A.

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
    """Factor ``exp(-rate t)`` by which a mode has decayed at time t; broadcasts (theory, eq. 12.5)."""
    return jnp.exp(-jnp.asarray(rate, float) * jnp.asarray(t, float))


def mode_noise(rate: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Pulled-back noise ``N_lambda(t) = D / lambda (exp(2 lambda t) - 1)`` of a mode, which is 2 D t at rate 0;
    broadcasts (theory, eq. 12.5)."""
    rate, t, noise = (jnp.asarray(v, float) for v in (rate, t, noise))
    z = 2 * rate * t
    far = jnp.abs(z) > 1  # this branch takes an infinite t
    near = 2 * noise * jnp.where(far, 0.0, t) * exprel(jnp.where(far, 0.0, z))
    return jnp.where(far, noise / jnp.where(far, rate, 1.0) * jnp.expm1(jnp.where(far, z, 0.0)), near)


def mode_variance(rate: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """Variance ``D / lambda (1 - exp(-2 lambda t))`` of the noise that a mode has gathered by time t, which is 2 D t at
    rate 0; broadcasts (theory, eq. 12.5)."""
    return mode_noise(-jnp.asarray(rate, float), t, noise)


def transition_time(rate: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """OU time at which the pulled-back noise of a mode reaches `spread`: ``log(1 + rate spread / D) / (2 rate)``, the
    clock f of eq. 4.4 of the theory. Broadcasts.

    It is ``spread / 2D`` at rate 0, 0 for ``spread <= 0``, and infinite for ``rate spread / D <= -1`` and for an
    infinite spread.
    """
    rate, spread, noise = (jnp.asarray(v, float) for v in (rate, spread, noise))
    z = rate * spread / noise
    reached = ~(z <= -1) & (spread < jnp.inf)  # NaN stays NaN
    time = spread / (2 * noise) * log1prel(jnp.where(reached, z, 0.0))
    return jnp.where(spread <= 0, 0.0, jnp.where(reached | jnp.isnan(spread), time, jnp.inf))


# --- any drift

_DOUBLINGS = 64
_STEP = 0.5  # largest |K| t for which the matrix exponential is computed directly


def transition(process: Process, t: ArrayLike) -> Transition:
    """Factor ``exp(-K t)`` and covariance ``2 D int_0^t exp(-K s) exp(-K^T s) ds``, each (..., n, n).

    The matrix exponential of a short time is doubled by the semigroup law (theory, section 12.1). Nothing is
    subtracted, so the error is that of the drift: eps |K| t relative to each decaying mode. An infinite time gives the
    stationary state of a stable drift.

    Args:
      process: drift (n, n).
      t: times >= 0, any shape (...). The result is NaN where an unstable drift overflows, and beyond
        ``|K| t = 2^63`` unless the factor has decayed to 0.

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

    # Van Loan: one block of the exponential is the factor F, and another one times F^T is the covariance
    drift = drift * step
    n = drift.shape[0]
    block = expm(jnp.block([[-drift, jnp.eye(n)], [jnp.zeros((n, n)), drift.T]]))
    factor = block[:n, :n]
    integral = _matmul(block[:n, n:], factor.T)

    def double(i, state):
        goes = i < doublings
        factor, integral = (jnp.where(goes, v, 0.0) for v in state)  # 0 when done, so as not to overflow
        added = _matmul(_matmul(factor, integral), factor.T)
        doubled = _matmul(factor, factor), integral + (added + added.T) / 2
        return tuple(jnp.where(goes, new, old) for new, old in zip(doubled, state, strict=True))

    factor, integral = jax.lax.fori_loop(0, _DOUBLINGS, double, (factor, (integral + integral.T) / 2))
    covariance = 2 * noise * step * integral
    known = ((t <= limit) | jnp.all(factor == 0)) & jnp.all(jnp.isfinite(covariance))
    return jnp.where(known, factor, jnp.nan), jnp.where(known, covariance, jnp.nan)


def pulled_noise(process: Process, t: ArrayLike) -> jax.Array:
    """Pulled-back noise ``N_t = 2 D int_0^t exp(K s) exp(K^T s) ds`` (..., n, n) at times t (...): the covariance that
    the noise would have, had it been added before the drift acted (theory, eq. 12.4).

    It is the covariance of the process with the drift -K. It increases with t, and overflows (NaN) early if K is
    stable.
    """
    return transition(process._replace(drift=-_drift(process)), t).covariance


# --- stationary state and bounds


def _rounding(drift: jax.Array) -> jax.Array:
    return drift.shape[0] * jnp.finfo(drift.dtype).eps * jnp.linalg.norm(drift)


def is_stable(process: Process) -> jax.Array:
    """Whether a stationary state exists, () bool: whether the real parts of all rates exceed rounding, n eps |K|."""
    drift = _drift(process)
    return jnp.linalg.eigvals(jax.lax.stop_gradient(drift)).real.min() > _rounding(drift)


def is_contracting(process: Process) -> jax.Array:
    """Whether no difference of two states ever grows, () bool: whether ``|F_t| <= 1`` for all t, which is that
    ``K + K^T`` is positive semidefinite, to rounding. A stable drift that is not contracting amplifies some differences
    for a while."""
    drift = _drift(process)
    return jnp.linalg.eigvalsh(jax.lax.stop_gradient(drift + drift.T) / 2).min() >= -_rounding(drift)


def has_real_modes(process: Process) -> jax.Array:
    """Whether all rates are real, () bool, so that no two modes rotate into each other. Imaginary parts up to
    ``sqrt(eps) |K|`` count as zero, because rounding moves a double rate by that much."""
    drift = jax.lax.stop_gradient(_drift(process))
    tolerance = jnp.finfo(drift.dtype).eps ** 0.5 * jnp.linalg.norm(drift)
    return jnp.abs(jnp.linalg.eigvals(drift).imag).max() <= tolerance


class CouplingRange(NamedTuple):
    """The open interval of couplings with a stationary state."""

    low: jax.Array
    high: jax.Array


def symmetric_bound(b: ArrayLike, count: int = 2) -> CouplingRange:
    """The couplings ``-b < g < b / (count - 1)`` for which `count` replicas, coupled all to all, have a stationary
    state (theory, section 12.3).

    Raises:
      ValueError: fewer than 2 replicas, or b is not positive, where no coupling is stable.
    """
    b = jnp.asarray(b, float)
    if count < 2:
        raise ValueError(f"a coupling needs at least 2 replicas, got {count}")
    require(b > 0, f"b must be positive for a stable coupling to exist, got {b}")
    return CouplingRange(-b, b / (count - 1))


def speciation_bound(b: ArrayLike, spread: ArrayLike, noise: ArrayLike = 1.0) -> jax.Array:
    """The coupling ``b + D / spread`` above which a symmetric pair never merges the clusters of its common mode; the
    pair is already unstable above b. Infinite for ``spread <= 0``, where there are no clusters to merge. Broadcasts
    (theory, section 12.3)."""
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
    """Entropy () in nats that the stationary state produces per unit of time (theory, eq. 12.6).

    It is exactly 0 for a symmetric drift, where detailed balance holds, and does not depend on the noise strength.

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
    """The projections ``z = l^T x`` of the state. Each is a process of one mode with the same noise strength."""

    rates: jax.Array  # (n,) ascending
    modes: jax.Array  # (n, n), row a the unit left eigenvector l_a


def left_modes(process: Process) -> LeftModes:
    """Unit left eigenvectors of a drift with real rates, by ascending rate (theory, section 12.2).

    They are orthogonal if the drift is symmetric; a defective drift has two parallel ones at its double rate. Their
    first large component is positive. Derivatives exist at simple rates.

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
