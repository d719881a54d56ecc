"""Gaussian mixtures as data laws: exact density, score and posterior under any process (docs/theory.md,
sections 12.6 to 12.8).

Functions take a law, a process, one time t >= 0 and states x (..., n); vmap over more times. They work under jit, vmap
and grad. At t = 0 the density and the score are those of the data, and the posterior is the state itself. A law without
width in some direction has no density there (NaN).
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from ou_theory.process import Process, transition
from ou_theory.roots import require

_einsum = partial(jnp.einsum, precision="highest")


class Mixture(NamedTuple):
    """A Gaussian mixture ``sum_a w_a N(mu_a, C_a)`` of c components in n dimensions. `mixture` makes one whose parts
    are checked."""

    weights: jax.Array  # (c,) >= 0, with the sum 1
    means: jax.Array  # (c, n)
    covariances: jax.Array  # (c, n, n), positive semidefinite

    def draw(self, key: jax.Array, count: int) -> jax.Array:
        """Independent samples (count, n)."""
        for_labels, for_noise = jax.random.split(key)
        labels = jax.random.categorical(for_labels, _log_weights(self), shape=(count,))
        noise = jax.random.normal(for_noise, (count, self.means.shape[1]), self.means.dtype)
        return self.means[labels] + _einsum("kij,kj->ki", gaussian_root(self.covariances)[labels], noise)


# --- laws


def mixture(weights: ArrayLike, means: ArrayLike, covariances: ArrayLike) -> Mixture:
    """A mixture of any number of components, whose parts are checked; see `Mixture` for their shapes.

    Raises:
      ValueError: shapes do not belong together, weights are negative or do not add up to 1, or a covariance is not
        symmetric or not positive semidefinite.
    """
    law = Mixture(*(jnp.asarray(v, float) for v in (weights, means, covariances)))
    count, size = law.means.shape if law.means.ndim == 2 else (0, 0)
    if not count or not size or law.weights.shape != (count,) or law.covariances.shape != (count, size, size):
        raise ValueError(
            f"weights {law.weights.shape}, means {law.means.shape} and covariances {law.covariances.shape} must be "
            "(c,), (c, n) and (c, n, n)"
        )
    rounding = 100 * size * jnp.finfo(law.weights.dtype).eps
    require(law.weights >= 0, f"weights must not be negative, got {law.weights}")
    require(jnp.abs(law.weights.sum() - 1) <= count * rounding, f"weights must add up to 1, got {law.weights}")
    transposed, largest = jnp.swapaxes(law.covariances, 1, 2), jnp.abs(law.covariances).max()
    require(jnp.abs(law.covariances - transposed) <= rounding * largest, "covariances must be symmetric")
    least = jnp.linalg.eigvalsh(law.covariances)
    require(least >= -rounding * largest, f"covariances must be positive semidefinite, got eigenvalues {least}")
    return law


def gaussian(mean: ArrayLike, covariance: ArrayLike) -> Mixture:
    """A mixture of one component with mean (n,) and covariance (n, n)."""
    return mixture(jnp.ones(1), jnp.asarray(mean, float)[None], jnp.asarray(covariance, float)[None])


def two_clusters(centre: ArrayLike, covariance: ArrayLike) -> Mixture:
    """Two equally likely clusters at ``+-m`` with centre (n,) m and covariance (n, n) within each."""
    centre, covariance = jnp.asarray(centre, float), jnp.asarray(covariance, float)
    return mixture(jnp.full(2, 0.5), jnp.stack([centre, -centre]), jnp.stack([covariance, covariance]))


_SIGNS = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]])
_ROTATION = np.array([[1, 1], [1, -1]]) / np.sqrt(2)  # replicas to modes, and back


def mode_mixture(
    centre_common: ArrayLike,
    centre_difference: ArrayLike,
    variance_common: ArrayLike,
    variance_difference: ArrayLike,
) -> Mixture:
    """A pair (x1, x2) whose common and difference mode are independent and each clustered at its own ``+-m`` **[ours]**
    (theory, section 12.6).

    Every formula then holds mode by mode. The four components have the signs ++, +-, -+, -- of (u, v).

    Args:
      centre_common, centre_difference: m of the two modes.
      variance_common, variance_difference: s^2 of the two modes within a cluster.
    """
    centres = jnp.stack([jnp.asarray(v, float) for v in (centre_common, centre_difference)])
    variances = jnp.stack([jnp.asarray(v, float) for v in (variance_common, variance_difference)])
    means = _einsum("ij,cj->ci", _ROTATION, jnp.asarray(_SIGNS, float) * centres)
    covariance = _einsum("ij,j,kj->ik", _ROTATION, variances, _ROTATION)
    return mixture(jnp.full(4, 0.25), means, jnp.broadcast_to(covariance, (4, 2, 2)))


def replica_mixture(
    centre: ArrayLike, variance: ArrayLike, label_correlation: ArrayLike = 0.0, within_correlation: ArrayLike = 0.0
) -> Mixture:
    """A pair (x1, x2) whose replicas are each clustered at ``+-m``, with correlated labels, and correlated states
    within the clusters **[ours]** (theory, section 12.6).

    The labels have ``P(c1, c2) = (1 + r_c c1 c2) / 4``. The four components have the labels ++, +-, -+, --.

    Args:
      centre, variance: m and s^2 of each replica.
      label_correlation, within_correlation: r_c and r_w, in [-1, 1].
    """
    weights = (1 + jnp.asarray(label_correlation, float) * _SIGNS.prod(1)) / 4
    eye = jnp.eye(2)
    covariance = jnp.asarray(variance, float) * (eye + jnp.asarray(within_correlation, float) * (1 - eye))
    means = jnp.asarray(centre, float) * jnp.asarray(_SIGNS, float)
    return mixture(weights, means, jnp.broadcast_to(covariance, (4, 2, 2)))


def gaussian_root(covariance: jax.Array) -> jax.Array:
    """Square root R (..., n, n) with ``R R^T`` the covariance. Unlike Cholesky's factor, it exists where a direction
    has no width."""
    values, vectors = jnp.linalg.eigh(covariance)
    return vectors * jnp.sqrt(jnp.maximum(values, 0.0))[..., None, :]


# --- the law of the state


def noised(law: Mixture, process: Process, t: ArrayLike) -> Mixture:
    """Law of the state at time t: a mixture with means ``F mu_a`` and covariances ``P_a = F C_a F^T + Sigma`` (theory,
    section 12.6).

    Raises:
      ValueError: t is more than one time or negative, or the drift is not of the size of the law.
    """
    size = law.means.shape[-1]
    if jnp.ndim(t) or jnp.shape(process.drift) != (size, size):
        raise ValueError(
            f"time {jnp.shape(t)} and drift {jnp.shape(process.drift)} must be a number and {(size, size)}, as the "
            "law; vmap over more"
        )
    factor, covariance = transition(process, t)
    spread = _einsum("ij,ajk,lk->ail", factor, law.covariances, factor)
    return Mixture(law.weights, _einsum("ij,aj->ai", factor, law.means), spread + covariance)


def _log_weights(law: Mixture) -> jax.Array:
    some = law.weights > 0
    return jnp.where(some, jnp.log(jnp.where(some, law.weights, 1.0)), -jnp.inf)


class _Seen(NamedTuple):
    """Where states (k, n) lie relative to the components of their law."""

    root: jax.Array  # (c, n, n) Cholesky factor of P_a
    whitened: jax.Array  # (c, n, k) root^-1 (x - F mu_a)
    log_joint: jax.Array  # (k, c) log of weight times density


def _see(law: Mixture, x: jax.Array) -> _Seen:
    root = jnp.linalg.cholesky(law.covariances)
    whitened = jax.vmap(partial(solve_triangular, lower=True))(root, jnp.swapaxes(x - law.means[:, None], 1, 2))
    log_volume = jnp.log(jnp.diagonal(root, axis1=1, axis2=2)).sum(-1) + x.shape[-1] / 2 * np.log(2 * np.pi)
    return _Seen(root, whitened, (_log_weights(law) - log_volume) - (whitened**2).sum(1).T / 2)


def _pulls(seen: _Seen) -> jax.Array:
    """``P_a^-1 (x - F mu_a)``, (c, n, k)."""
    return jax.vmap(partial(solve_triangular, lower=True, trans="T"))(seen.root, seen.whitened)


def _flat(law: Mixture, x: ArrayLike) -> tuple[jax.Array, tuple[int, ...]]:
    x = jnp.asarray(x, float)
    if x.shape[-1:] != law.means.shape[-1:]:
        raise ValueError(f"states {x.shape} must be (..., {law.means.shape[-1]}), as the law")
    return x.reshape(-1, x.shape[-1]), x.shape[:-1]


def log_density(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike) -> jax.Array:
    """Log density ``log p_t(x)`` (...) at states x (..., n)."""
    flat, shape = _flat(law, x)
    return jax.nn.logsumexp(_see(noised(law, process, t), flat).log_joint, -1).reshape(shape)


def responsibilities(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike) -> jax.Array:
    """Posterior probabilities ``pi_a(x)`` (..., c) of the components at states x (..., n) (theory, section 12.7)."""
    flat, shape = _flat(law, x)
    return jax.nn.softmax(_see(noised(law, process, t), flat).log_joint, -1).reshape(*shape, law.weights.size)


def score(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike) -> jax.Array:
    """Score ``grad log p_t(x) = -sum_a pi_a P_a^-1 (x - F mu_a)`` (..., n) (theory, eq. 12.10)."""
    flat, shape = _flat(law, x)
    seen = _see(noised(law, process, t), flat)
    pull = _einsum("ka,aik->ki", jax.nn.softmax(seen.log_joint, -1), _pulls(seen))
    return -pull.reshape(*shape, pull.shape[-1])


# --- the posterior of the data


def _unless_data(t: ArrayLike, value: jax.Array, at_data: jax.Array) -> jax.Array:
    """`value`, but `at_data` where t = 0 and the law has no density: there the state is the data all the same."""
    return jnp.where((jnp.asarray(t) == 0) & jnp.isnan(value), at_data, value)


def _means(law: Mixture, process: Process, t: ArrayLike, seen: _Seen) -> jax.Array:
    """Posterior mean within each component, (k, c, n)."""
    moved = _einsum("aij,lj,alk->kai", law.covariances, transition(process, t).factor, _pulls(seen))
    return law.means + moved


def posterior_mean(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike) -> jax.Array:
    """Posterior mean ``E[x_0 | x_t = x] = sum_a pi_a [mu_a + C_a F^T P_a^-1 (x - F mu_a)]`` (..., n) (theory,
    eq. 12.10)."""
    flat, shape = _flat(law, x)
    seen = _see(noised(law, process, t), flat)
    mean = _einsum("ka,kai->ki", jax.nn.softmax(seen.log_joint, -1), _means(law, process, t, seen))
    return _unless_data(t, mean, flat).reshape(*shape, mean.shape[-1])


def posterior_covariance(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike) -> jax.Array:
    """Posterior covariance ``Cov[x_0 | x_t = x]`` (..., n, n): the covariance within the components plus that between
    their means (theory, eq. 12.11)."""
    flat, shape = _flat(law, x)
    seen = _see(noised(law, process, t), flat)
    share, means = jax.nn.softmax(seen.log_joint, -1), _means(law, process, t, seen)
    apart = means - _einsum("ka,kai->ki", share, means)[:, None]
    factor, covariance = transition(process, t)

    def within(root, prior):
        gain = jax.scipy.linalg.cho_solve((root, True), jnp.matmul(factor, prior, precision="highest")).T
        rest = jnp.eye(len(prior)) - jnp.matmul(gain, factor, precision="highest")
        # the form C - gain F C would cancel at low noise
        return _einsum("ij,jk,lk->il", rest, prior, rest) + _einsum("ij,jk,lk->il", gain, covariance, gain)

    inside = _einsum("ka,aij->kij", share, jax.vmap(within)(seen.root, law.covariances))
    total = inside + _einsum("ka,kai,kaj->kij", share, apart, apart)
    return _unless_data(t, total, jnp.zeros_like(total)).reshape(*shape, *total.shape[1:])


def tweedie_mean(process: Process, t: ArrayLike, x: ArrayLike, score: ArrayLike) -> jax.Array:
    """Posterior mean ``F^-1 (x + Sigma score)`` (..., n) of any data law, from its score (..., n) at states x (..., n)
    (theory, eq. 12.12). It loses digits as F decays."""
    factor, covariance = transition(process, t)
    moved = jnp.asarray(x, float) + _einsum("ij,...j->...i", covariance, jnp.asarray(score, float))
    return jnp.linalg.solve(factor, moved[..., None])[..., 0]


def tweedie_covariance(process: Process, t: ArrayLike, hessian: ArrayLike) -> jax.Array:
    """Posterior covariance ``F^-1 (Sigma + Sigma H Sigma) F^-T`` (..., n, n) of any data law, from the Hessian H
    (..., n, n) of its log density (theory, eq. 12.12). It loses digits as F decays."""
    factor, covariance = transition(process, t)
    bent = covariance + _einsum("ij,...jk,kl->...il", covariance, jnp.asarray(hessian, float), covariance)
    half = jnp.linalg.solve(factor, bent)
    return jnp.swapaxes(jnp.linalg.solve(factor, jnp.swapaxes(half, -1, -2)), -1, -2)


# --- generation


def reverse_drift(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike) -> jax.Array:
    """Drift ``K x + 2 D score`` (..., n) of the reverse SDE ``dx = drift dt' + sqrt(2 D) dW``, in which t' runs against
    t (theory, eq. 12.13)."""
    return _drift(law, process, t, x, 2.0)


def flow_drift(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike) -> jax.Array:
    """Velocity ``K x + D score`` (..., n) of the probability flow, which moves states without noise, in t' that runs
    against t (theory, eq. 12.13)."""
    return _drift(law, process, t, x, 1.0)


def _drift(law: Mixture, process: Process, t: ArrayLike, x: ArrayLike, share: float) -> jax.Array:
    moved = _einsum("ij,...j->...i", process.drift, jnp.asarray(x, float))
    return moved + share * process.noise * score(law, process, t, x)
