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
    """Law of a pair: labels with ``P(c1, c2) = (1 + r_c c1 c2) / 4``, replicas at ``c_i m`` with the variance s^2 and
    the correlation r_w within a cluster."""

    centre: ArrayLike  # m
    variance: ArrayLike  # s^2
    label_correlation: ArrayLike = 0.0  # r_c in (-1, 1)
    within_correlation: ArrayLike = 0.0  # r_w in [-1, 1]


class Modes(NamedTuple):
    """A number for either mode of a pair."""

    common: jax.Array
    difference: jax.Array


def _spreads(pair: ReplicaPair) -> tuple[jax.Array, jax.Array, jax.Array]:
    """``2 m^2`` and the variances of u and v within a cluster."""
    variance, within = jnp.asarray(pair.variance, float), jnp.asarray(pair.within_correlation, float)
    return 2 * jnp.asarray(pair.centre, float) ** 2, variance * (1 + within), variance * (1 - within)


def replica_kappas(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> Modes:
    """``2 m^2 / (s^2 (1 +- r_w) + N)`` of both modes."""
    square, common, difference = _spreads(pair)
    b, g = jnp.asarray(b, float), jnp.asarray(g, float)
    return Modes(square / (common + mode_noise(b - g, t, noise)), square / (difference + mode_noise(b + g, t, noise)))


def aligned_weight(kappas: Modes, label_correlation: ArrayLike) -> jax.Array:
    """Posterior probability, at the symmetric point, that the labels are equal:
    ``1 / (1 + (1 - r_c) / (1 + r_c) exp[(kappa_u - kappa_v) / 2])``."""
    r = jnp.asarray(label_correlation, float)
    return jax.nn.sigmoid(jnp.log1p(r) - jnp.log1p(-r) - (kappas.common - kappas.difference) / 2)


def _instabilities(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, t: ArrayLike, noise: ArrayLike) -> Modes:
    """Kappa times the weight of the states that are clustered in the mode; the mode is unstable where it exceeds 1."""
    kappas = replica_kappas(pair, b, g, t, noise)
    r = jnp.asarray(pair.label_correlation, float)
    opposite = aligned_weight(Modes(kappas.difference, kappas.common), -r)  # 1 - aligned_weight, no cancellation
    return Modes(kappas.common * aligned_weight(kappas, r), kappas.difference * opposite)


def replica_curvatures(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, t: ArrayLike, noise: ArrayLike = 1.0) -> Modes:
    """Curvatures of ``-log p_t`` at the symmetric point along u and v (it is diagonal in them):
    ``(1 - kappa_u pi) / P_u`` and ``(1 - kappa_v (1 - pi)) / P_v``."""
    b, g, t, noise = (jnp.asarray(v, float) for v in (b, g, t, noise))
    _, common, difference = _spreads(pair)
    grown = _instabilities(pair, b, g, t, noise)

    def curvature(grown, variance, rate):
        return (1 - grown) / (jnp.exp(-2 * rate * t) * variance + 2 * noise * t * exprel(-2 * rate * t))

    return Modes(curvature(grown.common, common, b - g), curvature(grown.difference, difference, b + g))


def replica_quartic(weight: ArrayLike) -> jax.Array:
    """Coefficient ``q (q - 1/3) / 8`` of ``z^4`` in ``-log p`` along a mode, in which states of the weight q at the
    origin are clustered and ``z = sqrt(kappa) x / sqrt(P)``. At onset ``q = 1 / kappa``: negative, and the transition
    discontinuous, for a kappa above `TRICRITICAL_KAPPA`."""
    weight = jnp.asarray(weight, float)
    return weight * (weight - 1 / 3) / 8


_GRID = np.exp2(-np.linspace(0, 40, 1025))


def _last_onset(excess, latest: jax.Array, rate: jax.Array, parameters) -> jax.Array:
    """Largest root in t of ``excess(t, *parameters)``, which is negative from `latest` on. Where that is infinite,
    so is the root, if the excess is still positive when the noise of the unstable mode (`rate` < 0) is at its limit."""
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
    # kappa times a weight is at most kappa, so that no root lies beyond kappa = 1
    latest = Modes(transition_time(b - g, square - common, noise), transition_time(b + g, square - difference, noise))
    return Modes(
        _last_onset(_excess_common, latest.common, b - g, parameters),
        _last_onset(_excess_difference, latest.difference, b + g, parameters),
    )


def replica_speciation_times(pair: ReplicaPair, b: ArrayLike, g: ArrayLike, noise: ArrayLike = 1.0) -> Modes:
    """Largest time, for either mode, at which its curvature changes sign; it may do so more than once.

    0 if a mode is never unstable, infinite if an unstable process never makes it stable. Roots are looked for on a
    grid of times 3 % apart; two closer than that may be missed together. Differentiable.

    Raises:
      ValueError: a label correlation not inside (-1, 1), or one within clusters outside [-1, 1].
    """
    label, within = jnp.asarray(pair.label_correlation), jnp.asarray(pair.within_correlation)
    require(jnp.abs(label) < 1, f"the label correlation must lie inside (-1, 1), got {pair.label_correlation}")
    require(jnp.abs(within) <= 1, f"the correlation within clusters must lie in [-1, 1], got {pair.within_correlation}")
    return _speciation_times(pair, b, g, noise)


def independent_gap_third_order(b: ArrayLike, g: ArrayLike, spread: ArrayLike, centre: ArrayLike, noise: ArrayLike = 1):
    """Gap ``t_u - t_v`` of independent labels (r_c = r_w = 0) to the lowest order in g, the third; negative for g > 0.

    With lengths in units of ``sqrt(D / b)``, ``-2 g^3 / (3 b^4 m^4) [(1 + z) log(1 + z) - z]^3 / (1 + z)``, where z is
    the `spread` ``m^2 - s^2 > 0``.
    """
    b, g, spread, centre, noise = (jnp.asarray(v, float) for v in (b, g, spread, centre, noise))
    unit = b / noise
    z = spread * unit
    bracket = (1 + z) * jnp.log1p(z) - z
    return -2 * (g / b) ** 3 / (3 * b * (centre**2 * unit) ** 2) * bracket**3 / (1 + z)


# --- one mode alone: the marginal law is clustered with the weight w, and a single cluster at 0 with 1 - w


def marginal_threshold() -> float:
    """Least weight ``1 / (1 + 2 exp(-3/2)) = 0.691438`` of the clustered states at which a mode's marginal density
    ever has a maximum away from 0 that grows out of it. Independent labels have 1/2: their marginals never speciate."""
    return float(1 / (1 + 2 * np.exp(-1.5)))


def marginal_instability(kappa: ArrayLike, weight: ArrayLike) -> jax.Array:
    """Kappa times the posterior weight of the clustered states at the origin of the marginal; unstable above 1."""
    kappa, weight = jnp.asarray(kappa, float), jnp.asarray(weight, float)
    return kappa * jax.nn.sigmoid(jnp.log(weight) - jnp.log1p(-weight) - kappa / 2)


def _marginal_excess(kappa, weight):
    return 1 - marginal_instability(kappa, weight)


@jax.jit
def marginal_onset(weight: ArrayLike) -> jax.Array:
    """Kappa in (1, 3] at which the marginal of a mode becomes unstable as the noise falls; NaN below
    `marginal_threshold`. The slope in the weight is infinite at the threshold."""
    weight = jnp.asarray(weight, float)
    exists = weight >= marginal_threshold()
    safe = jnp.where(exists, weight, 0.8)
    low, high = jnp.ones_like(safe), jnp.full_like(safe, 3.0)
    _, root = bisect(_marginal_excess, low, high, jax.lax.stop_gradient(safe))
    return jnp.where(exists, implicit(_marginal_excess, root, safe > marginal_threshold(), safe), jnp.nan)
