"""Speciation of a pair whose replicas, not modes, are clustered (docs/theory.md, section 13.4).

Each replica has a label +-1 and a centre +-m: four clusters, so that the common and the difference mode are clustered
together. An "aligned" state has equal labels and lies at ``+-sqrt(2) m`` in the common mode u; any other lies there in
the difference mode v. The drift is that of a symmetric pair, with rates b - g of u and b + g of v. All functions
broadcast, and work under jit, vmap and grad.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ou_theory.process import mode_noise, transition_time
from ou_theory.roots import bisect, implicit, require
from ou_theory.special import exprel

TRICRITICAL_KAPPA = 3.0  # a mode that speciates at a larger kappa of its own does so discontinuously


class ReplicaPair(NamedTuple):
    """Law of a pair of clustered replicas: the labels have ``P(c1, c2) = (1 + r_c c1 c2) / 4``; replica i lies at
    ``c_i m`` with the variance s^2; within a cluster, the replicas correlate by r_w."""

    centre: ArrayLike  # m
    variance: ArrayLike  # s^2
    label_correlation: ArrayLike = 0.0  # r_c in (-1, 1)
    within_correlation: ArrayLike = 0.0  # r_w in [-1, 1]


class Modes(NamedTuple):
    """One number for each mode of a pair."""

    common: jax.Array
    difference: jax.Array


def _spreads(pair: ReplicaPair) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``2 m^2`` and the variances of u and v within a cluster."""
    variance, within = jnp.asarray(pair.variance, float), jnp.asarray(pair.within_correlation, float)
    return 2 * jnp.asarray(pair.centre, float) ** 2, variance * (1 + within), variance * (1 - within)


def replica_kappas(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> Modes:
    """Curvature ratios ``2 m^2 / (s^2 (1 +- r_w) + N)`` of both modes (theory, eq. 13.8)."""
    square, common, difference = _spreads(pair)
    b, g = jnp.asarray(b, float), jnp.asarray(g, float)
    return Modes(square / (common + mode_noise(b - g, t, noise)), square / (difference + mode_noise(b + g, t, noise)))


def aligned_weight(kappas: Modes, label_correlation: ArrayLike) -> jax.Array:
    """Posterior probability that the labels are equal, at the symmetric point:
    ``1 / (1 + (1 - r_c) / (1 + r_c) exp[(kappa_u - kappa_v) / 2])`` (theory, eq. 13.8)."""
    r = jnp.asarray(label_correlation, float)
    return jax.nn.sigmoid(jnp.log1p(r) - jnp.log1p(-r) - (kappas.common - kappas.difference) / 2)


def _instabilities(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, t: ArrayLike, noise: ArrayLike) -> Modes:
    """Kappa of each mode times the weight of the states that are clustered in it. A mode is unstable where this
    exceeds 1."""
    kappas = replica_kappas(pair, b, g, t, noise)
    r = jnp.asarray(pair.label_correlation, float)
    opposite = aligned_weight(Modes(kappas.difference, kappas.common), -r)  # 1 - aligned_weight, no cancellation
    return Modes(kappas.common * aligned_weight(kappas, r), kappas.difference * opposite)


def replica_curvatures(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> Modes:
    """Curvatures of ``-log p_t`` at the symmetric point along u and v: ``(1 - kappa_u pi) / P_u`` and
    ``(1 - kappa_v (1 - pi)) / P_v`` (theory, eq. 13.8). The Hessian is diagonal in u and v."""
    b, g, t, noise = (jnp.asarray(v, float) for v in (b, g, t, noise))
    _, common, difference = _spreads(pair)
    grown = _instabilities(pair, b, g, t, noise)

    def curvature(grown, variance, rate):
        return (1 - grown) / (jnp.exp(-2 * rate * t) * variance + 2 * noise * t * exprel(-2 * rate * t))

    return Modes(curvature(grown.common, common, b - g), curvature(grown.difference, difference, b + g))


def replica_quartic(weight: ArrayLike) -> jax.Array:
    """Coefficient ``q (q - 1/3) / 8`` of ``z^4`` in ``-log p`` along a mode, where ``z = sqrt(kappa) x / sqrt(P)`` and
    q is the weight, at the origin, of the states that are clustered in the mode (theory, section 13.4).

    At the onset ``q = 1 / kappa``. If kappa is above `TRICRITICAL_KAPPA` there, the coefficient is negative and the
    transition discontinuous.
    """
    weight = jnp.asarray(weight, float)
    return weight * (weight - 1 / 3) / 8


_GRID = np.exp2(-np.linspace(0, 40, 1025))


def _last_onset(excess, latest: jax.Array, rate: jax.Array, parameters) -> jax.Array:
    """Largest root in t of ``excess(t, *parameters)``, which is negative after `latest`. If `latest` is infinite, the
    root is infinite too where the excess stays positive while the noise of the unstable mode (`rate` < 0) reaches its
    limit."""
    bounded = jnp.isfinite(latest)
    top = jnp.where(bounded, 1.001 * latest, 20 / jnp.abs(jnp.where(bounded, 1.0, rate)))
    top = jax.lax.stop_gradient(jnp.where(top > 0, top, 1.0))
    fixed = jax.lax.stop_gradient(parameters)
    times = top[..., None] * jnp.asarray(_GRID, top.dtype)
    above = excess(times, *(p[..., None] for p in fixed)) > 0
    first = jnp.argmax(above, -1)[..., None]
    found = above.any(-1) & ~above[..., 0] & (latest > 0)
    low = jnp.take_along_axis(times, first, -1)[..., 0]
    high = jnp.take_along_axis(times, jnp.maximum(first - 1, 0), -1)[..., 0]
    _, root = bisect(excess, low, high, *fixed)
    root = implicit(excess, root, found, *parameters)
    never = jnp.where(above[..., 0], jnp.inf, 0.0)
    return jnp.where(found, root, jnp.where(jnp.isnan(latest), jnp.nan, never))


def _excess_common(t, centre, variance, label, within, b, g, noise):
    return _instabilities(ReplicaPair(centre, variance, label, within), b, g, t, noise).common - 1


def _excess_difference(t, centre, variance, label, within, b, g, noise):
    return _instabilities(ReplicaPair(centre, variance, label, within), b, g, t, noise).difference - 1


@jax.jit
def _speciation_times(pair: ReplicaPair, b, g, noise) -> Modes:
    parameters = jnp.broadcast_arrays(*(jnp.asarray(v, float) for v in (*pair, b, g, noise)))
    *law, b, g, noise = parameters
    square, common, difference = _spreads(ReplicaPair(*law))
    # kappa times a weight is at most kappa, so that every root lies where kappa is at least 1
    latest = Modes(transition_time(b - g, square - common, noise), transition_time(b + g, square - difference, noise))
    return Modes(
        _last_onset(_excess_common, latest.common, b - g, parameters),
        _last_onset(_excess_difference, latest.difference, b + g, parameters),
    )


def replica_speciation_times(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, noise: ArrayLike = 1.0) -> Modes:
    """Speciation times of both modes: the largest time at which the curvature along the mode changes sign, which it may
    do more than once (theory, section 13.4). Differentiable.

    A time is 0 if the mode is never unstable, and infinite if an unstable process never makes it stable. Roots are
    looked for on a grid of times 3 % apart; two roots that are closer than that may both be missed.

    Raises:
      ValueError: a label correlation not inside (-1, 1), or one within clusters outside [-1, 1].
    """
    label, within = jnp.asarray(pair.label_correlation), jnp.asarray(pair.within_correlation)
    require(jnp.abs(label) < 1, f"the label correlation must lie inside (-1, 1), got {pair.label_correlation}")
    require(jnp.abs(within) <= 1, f"the correlation within clusters must lie in [-1, 1], got {pair.within_correlation}")
    return _speciation_times(pair, b, g, noise)


def independent_gap_third_order(b: ArrayLike, g: ArrayLike, spread: ArrayLike, centre: ArrayLike, noise: ArrayLike = 1):
    """Gap ``t_u - t_v`` for independent labels (r_c = r_w = 0) to the lowest order in g, which is the third (theory,
    eq. 13.9). It is negative for g > 0.

    With lengths in units of ``sqrt(D / b)`` it is ``-2 g^3 / (3 b^4 m^4) [(1 + z) log(1 + z) - z]^3 / (1 + z)``, where
    z is the `spread` ``m^2 - s^2 > 0``."""
    b, g, spread, centre, noise = (jnp.asarray(v, float) for v in (b, g, spread, centre, noise))
    unit = b / noise
    z = spread * unit
    bracket = (1 + z) * jnp.log1p(z) - z
    return -2 * (g / b) ** 3 / (3 * b * (centre**2 * unit) ** 2) * bracket**3 / (1 + z)


# --- one mode alone: its marginal law has two clusters with the weight w, and one cluster at 0 with the weight 1 - w


def marginal_threshold() -> float:
    """The least weight of the clustered states, ``1 / (1 + 2 exp(-3/2)) = 0.691438``, at which the marginal density of
    a mode ever becomes unstable at 0 (theory, section 13.4). Independent labels have the weight 1/2, so that their
    marginals never speciate."""
    return float(1 / (1 + 2 * np.exp(-1.5)))


def marginal_instability(kappa: ArrayLike, weight: ArrayLike) -> jax.Array:
    """Kappa times the posterior weight of the clustered states at the origin of the marginal, which is unstable where
    this exceeds 1 (theory, section 13.4)."""
    kappa, weight = jnp.asarray(kappa, float), jnp.asarray(weight, float)
    return kappa * jax.nn.sigmoid(jnp.log(weight) - jnp.log1p(-weight) - kappa / 2)


def _marginal_excess(kappa, weight):
    return 1 - marginal_instability(kappa, weight)


@jax.jit
def marginal_onset(weight: ArrayLike) -> jax.Array:
    """The kappa in (1, 3] at which the marginal of a mode becomes unstable as the noise falls; NaN for weights below
    `marginal_threshold`, where its slope is infinite (theory, section 13.4)."""
    weight = jnp.asarray(weight, float)
    exists = weight >= marginal_threshold()
    safe = jnp.where(exists, weight, 0.8)
    low, high = jnp.ones_like(safe), jnp.full_like(safe, 3.0)
    _, root = bisect(_marginal_excess, low, high, jax.lax.stop_gradient(safe))
    return jnp.where(exists, implicit(_marginal_excess, root, safe > marginal_threshold(), safe), jnp.nan)
