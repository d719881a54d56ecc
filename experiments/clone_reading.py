"""Times read off clones: where the ends of two continuations of one state correlate by a given amount.

Ensembles with exact scores; every reading has a standard error.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import root_scalar

from ou_theory import ensembles as en
from ou_theory.cluster_laws import Clusters
from ou_theory.mixture import Mixture
from ou_theory.process import Transition

SPECIATION = 0.5504004908  # correlation of clones' labels where a mode speciates: cluster_laws.sign_correlation(1)
WINDOW = 0.2  # correlations so far from the wanted one enter the fit


class Reading(NamedTuple):
    """Where a falling curve passes a level."""

    value: float
    error: float  # standard


def read_crossing(times: np.ndarray, values: np.ndarray, errors: np.ndarray, level: float) -> Reading:
    """By a weighted cubic through the points at which the curve lies within `WINDOW` of the level; NaN if they do not
    lie on both sides of it.

    Which points these are is told by a first fit, not by their own values, whose errors would then be cut off; and the
    weights come from errors smoothed over time, as that of a correlation by itself is the smaller the larger it is.

    Args:
      times, values, errors: (T,), standard errors of the values.
    """
    near = np.abs(values - level) < WINDOW
    found = Reading(np.nan, np.nan)
    for _ in range(2):
        if near.sum() < 5 or not (values[near].min() < level < values[near].max()):
            return Reading(np.nan, np.nan)
        middle = times[near].mean()
        t = times[near] - middle
        smooth = np.polyval(np.polyfit(t, errors[near], 2), t)
        fit, covariance = np.polyfit(t, values[near] - level, 3, w=1 / np.maximum(smooth, 1e-12), cov="unscaled")
        first, last = t[0], t[-1]
        if np.polyval(fit, first) <= 0 or np.polyval(fit, last) >= 0:
            return Reading(np.nan, np.nan)
        root = root_scalar(lambda x, fit=fit: np.polyval(fit, x), bracket=(first, last)).root
        powers = root ** np.arange(3, -1, -1)
        error = np.sqrt(powers @ covariance @ powers) / abs(np.polyval(np.polyder(fit), root))
        found = Reading(root + middle, float(error))
        apart = times - middle
        near = (first <= apart) & (apart <= last) & (np.abs(np.polyval(fit, apart)) < WINDOW)
    return found


def read_zero(times: np.ndarray, odds: np.ndarray) -> Reading:
    """Time at which the mean over trials (R, T) of log-odds falls through 0, by a cubic in log t; error by the spread
    of the trials. NaN if they do not lie on both sides of it."""
    mean = odds.mean(0)
    near = np.abs(mean) < 4
    if near.sum() < 5 or not mean[near].min() < 0 < mean[near].max():
        return Reading(np.nan, np.nan)
    t = np.log(times[near])
    middle = t.mean()
    fits = np.polyfit(t - middle, odds[:, near].T, 3)  # linear in the data: the mean of the fits fits the mean
    fit = fits.mean(1)
    if np.polyval(fit, t[0] - middle) <= 0 or np.polyval(fit, t[-1] - middle) >= 0:
        return Reading(np.nan, np.nan)
    root = root_scalar(lambda x: np.polyval(fit, x), bracket=(t[0] - middle, t[-1] - middle)).root
    values = (root ** np.arange(3, -1, -1)) @ fits
    slope = np.polyval(np.polyder(fit), root)
    found = np.exp(root + middle)
    return Reading(found, found * values.std() / len(values) ** 0.5 / abs(slope))


def end_of_line(sizes: np.ndarray, readings: np.ndarray) -> Reading:
    """Value at 1 / d = 0 of the weighted line through readings (D, 2) at the sizes d; NaN if fewer than 3 are there."""
    there = np.isfinite(readings).all(-1)
    if there.sum() < 3:
        return Reading(np.nan, np.nan)
    value, error = readings[there].T
    fit, covariance = np.polyfit(1 / sizes[there], value, 1, w=1 / error, cov="unscaled")
    return Reading(fit[1], float(covariance[1, 1] ** 0.5))


class Draws:
    """Seeds of the points of a part, of 32 bits each."""

    def __init__(self, seed: int, part: int):
        self._sequence = np.random.SeedSequence((seed, part))

    def __call__(self) -> np.ndarray:
        """Three seeds: of the states, and of the noise of either clone."""
        return self._sequence.spawn(1)[0].generate_state(3)


def correlation(product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean over paths (P, ...) and its standard error, not below that of one disagreement in all."""
    return product.mean(0), np.maximum(product.std(0), 2 * len(product) ** -0.5) / len(product) ** 0.5


@partial(jax.jit, static_argnames="paths")
def clones_of_modes(law: Clusters, noise: jax.Array, seeds: jax.Array, paths: int) -> tuple[jax.Array, jax.Array]:
    """Ends (paths, n) of two clones each, of independent modes; `noise` (steps + 1, n) from the branch to 0."""
    levels, names = en.noise_steps(noise), jnp.arange(paths)
    start = en.noised_clusters(law, noise[0], seeds[0], names)
    first, second = (en.simulate(en.clusters_sde(law), start, levels, seed)[0] for seed in (seeds[1], seeds[2]))
    return first, second


@partial(jax.jit, static_argnames="paths")
def clones_of_mixture(law: Mixture, steps: Transition, seeds: jax.Array, paths: int) -> tuple[jax.Array, jax.Array]:
    """The same of a mixture under any drift, the forward steps given."""
    late = jax.tree.map(lambda v: v[-1], en.state_laws(law, steps))
    start = late.draw(jax.random.key(seeds[0]), paths)
    bridges = en.bridges(law, steps)
    first, second = (en.simulate(en.mixture_sde, start, bridges, seed)[0] for seed in (seeds[1], seeds[2]))
    return first, second
