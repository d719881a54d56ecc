"""Times read off clones: where the ends of two continuations of one state have a given correlation.

The clones are ensembles with exact scores; every reading has a standard error.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import root_scalar

from ou_theory import ensembles as en
from ou_theory.cluster_laws import Clusters
from ou_theory.keys import random_key
from ou_theory.mixture import Mixture
from ou_theory.process import Transition

SPECIATION = 0.5504004908  # correlation of clones' labels where a mode speciates: cluster_laws.sign_correlation(1)
WINDOW = 0.2  # correlations so far from the wanted one enter the fit


class Reading(NamedTuple):
    """Where a falling curve passes a level."""

    value: float
    error: float  # standard error


def read_crossing(times: np.ndarray, values: np.ndarray, errors: np.ndarray, level: float) -> Reading:
    """The time at which a curve falls through a level.

    A weighted cubic is fitted to the points at which the curve lies within `WINDOW` of the level. A first fit chooses
    these points; if their own values chose them, points with large errors would be left out on one side only. The
    weights are errors that have been smoothed over time: the error of a single correlation is smaller where the
    correlation happens to come out larger, and such weights would pull the curve up.

    Args:
      times: (T,) increasing.
      values: (T,) the curve at these times.
      errors: (T,) standard errors of the values.
      level: the value that is looked for.

    Returns:
      the time and its standard error; NaN if the chosen points do not lie on both sides of the level.
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
    """The time at which the mean of log-odds over trials falls through 0.

    A cubic in log t is fitted to the mean. The standard error follows from the spread of the trials.

    Args:
      times: (T,) increasing, above 0.
      odds: (R, T) log-odds of every trial at these times.

    Returns:
      the time and its standard error; NaN if the mean does not change sign within the times.
    """
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
    """The value at infinite size: where the weighted line through readings ends, at 1 / d = 0.

    Args:
      sizes: (D,) the sizes d.
      readings: (D, 2) value and standard error at each size; NaN where nothing could be read.

    Returns:
      the value and its standard error; NaN if there are fewer than three readings.
    """
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
    """Mean over paths (P, ...) and its standard error. The error is at least that of a single disagreement among the
    paths, because paths that all agree do not show that the error is 0."""
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
    """Ends of two clones each of a mixture under any drift; `steps` are the forward steps."""
    late = jax.tree.map(lambda v: v[-1], en.state_laws(law, steps))
    start = late.draw(random_key(seeds[0]), paths)
    bridges = en.bridges(law, steps)
    first, second = (en.simulate(en.mixture_sde, start, bridges, seed)[0] for seed in (seeds[1], seeds[2]))
    return first, second
