"""Reverse simulation of ensembles with exact denoisers (docs/theory.md, section 12.9).

Steps of the reverse SDE are draws from the exact ``p(x_s | x_t)``, so that a path has the law of the continuum at any
step sizes. Steps of the probability flow are of second and fourth order. A step is a function ``(key, x, level) -> x``
of one path; `simulate` carries many paths. Call it inside ``jax.jit``, or every call compiles anew. Random numbers
belong to (seed, path, step), and do not depend on how many paths run together.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax.scipy.linalg import solve_triangular
from jax.typing import ArrayLike

from ou_theory.cluster_laws import Clusters
from ou_theory.keys import random_key
from ou_theory.mixture import Mixture, flow_drift, gaussian_root
from ou_theory.process import Process, Transition
from ou_theory.roots import require

Level = TypeVar("Level")
Step = Callable[[jax.Array, jax.Array, Level], jax.Array]

_einsum = partial(jnp.einsum, precision="highest")
_CACHE = 2**22  # bytes of state that run together on a CPU: enough to use all cores, few enough to fit their caches


def path_keys(seed: ArrayLike, paths: ArrayLike, step: ArrayLike) -> jax.Array:
    """Random keys of (seed, path, step), of the shape of `paths`; paths and steps are whole numbers from 0 on, and step
    0 is the start."""
    paths = jnp.asarray(paths)
    root = random_key(seed)
    keys = jax.vmap(lambda path: jax.random.fold_in(jax.random.fold_in(root, path), step))(paths.reshape(-1))
    return keys.reshape(paths.shape)


def simulate(
    step: Step,
    start: jax.Array,
    levels: Any,
    seed: ArrayLike,
    *,
    paths: ArrayLike | None = None,
    observe: Callable[[jax.Array], Any] | None = None,
    first: ArrayLike = 1,
    block: int | None = None,
) -> tuple[jax.Array, Any]:
    """Carries an ensemble through all levels in one compiled scan.

    Args:
      step: ``step(key, x, level)``, x (n,), of one path.
      start: (N, n).
      levels: what each step is given: an array, or a tree of arrays, with the steps as leading axis in their order.
      seed: of the random numbers.
      paths: (N,) int, which name the paths for their random numbers; 0..N-1 by default.
      observe: ``observe(x)`` is kept after every step, and nothing else is; without it memory does not grow with the
        number of steps.
      first: number of the first step for the random numbers. A run in two parts must give the second part the number
        that follows the first, or both draw the same noise.
      block: number of paths that run together. By default as many as the caches of a CPU hold, and all on other
      devices.

    Returns:
      the last states (N, n), and what was observed, with the axes (N, steps) in front.

    Raises:
      ValueError: shapes do not belong together, paths are not whole numbers, or a block holds no path.
    """
    counts = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves(levels)}
    if len(counts) != 1 or () in counts:
        raise ValueError(f"levels must be arrays with the steps as leading axis, got leading sizes {sorted(counts)}")
    (count,) = counts.pop()
    start = jnp.asarray(start)
    start = start.astype(jnp.result_type(start, 1.0))  # whole numbers are promoted, floating types kept
    paths = jnp.arange(start.shape[0]) if paths is None else jnp.asarray(paths)
    if start.ndim != 2 or not start.size or paths.shape != start.shape[:1]:
        raise ValueError(f"start {start.shape} and paths {paths.shape} must be (N, n) and (N,), not empty")
    if not jnp.issubdtype(paths.dtype, jnp.integer):
        raise ValueError(f"paths are names, whole numbers, got {paths.dtype}")
    if block is not None and block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    if block is None and jax.default_backend() == "cpu":
        block = max(_CACHE // (start.dtype.itemsize * start.shape[1]), 1)

    def carry(path, x):
        key = jax.random.fold_in(random_key(seed), path)

        def advance(x, at):
            index, level = at
            x = step(jax.random.fold_in(key, index), x, level)
            return x, None if observe is None else observe(x)

        return jax.lax.scan(advance, x, (first + jnp.arange(count), levels))

    if block is None or block >= start.shape[0]:
        return jax.vmap(carry)(paths, start)
    return jax.lax.map(lambda args: carry(*args), (paths, start), batch_size=block)


# --- independent modes, in the frame of the data


class NoiseStep(NamedTuple):
    """Noise variances before and after a step; numbers, or (n,) if every mode has its own."""

    before: jax.Array
    after: jax.Array


def noise_steps(noise: ArrayLike) -> NoiseStep:
    """The T - 1 steps between noise variances (T,) or (T, n) in the order of generation: levels for `simulate`.

    Raises:
      ValueError: there are fewer than two levels, or the noise rises on the way, is negative or not finite.
    """
    noise = jnp.asarray(noise, float)
    require(jnp.isfinite(noise), "noise has overflowed: start at an earlier time, or use mixture_sde")
    if noise.ndim not in (1, 2) or len(noise) < 2:
        raise ValueError(f"noise {noise.shape} must be (T,) or (T, n) with two levels or more")
    require(jnp.diff(noise, axis=0) <= 0, "noise must fall in the order of generation; reverse its order")
    require(noise >= 0, f"noise variances must not be negative, got {noise.min()}")
    return NoiseStep(noise[:-1], noise[1:])


def noised_clusters(law: Clusters, noise: ArrayLike, seed: ArrayLike, paths: ArrayLike) -> jax.Array:
    """Noised draws ``x_0 + sqrt(noise) xi`` (N, n) from the law, one for each of the paths (N,): a start for
    `simulate`.

    Raises:
      ValueError: noise is negative or not finite.
    """
    require((jnp.asarray(noise) >= 0) & jnp.isfinite(jnp.asarray(noise)), f"noise variances must be >= 0, got {noise}")

    def draw(key):
        for_data, for_noise = jax.random.split(key)
        x = law.draw(for_data, 1)[0]
        return x + jnp.sqrt(jnp.asarray(noise, x.dtype)) * jax.random.normal(for_noise, x.shape, x.dtype)

    return jax.vmap(draw)(path_keys(seed, paths, 0))


def clusters_sde(law: Clusters) -> Step[NoiseStep]:
    """Exact step of the reverse SDE: it draws the signs from their posterior, then the state from the Gaussian bridge
    that the signs leave (theory, eq. 12.15).

    The state is ``y = x_0 + nu`` in the frame of the data, where the noise has independent increments. Its variances
    before and after the step are a `NoiseStep`. With one variance for each mode this is a coupled process in its modes,
    whose coupling may change in time.
    """

    def step(key: jax.Array, y: jax.Array, level: NoiseStep) -> jax.Array:
        level = NoiseStep(*(v.astype(y.dtype) for v in level))
        for_signs, for_noise = jax.random.split(key)
        chance = jax.nn.sigmoid(2 * law.field(y, level.before))
        signs = jnp.where(jax.random.uniform(for_signs, chance.shape, y.dtype) < chance, 1, -1).astype(y.dtype)
        centre = jnp.matmul(signs, law.centres, precision="highest")
        shrink = (law.variance + level.after) / (law.variance + level.before)
        width = jnp.sqrt(shrink * (level.before - level.after))
        return centre + shrink * (y - centre) + width * jax.random.normal(for_noise, y.shape, y.dtype)

    return step


def clusters_flow(law: Clusters) -> Step[NoiseStep]:
    """Step of the probability flow (theory, section 12.9). It is exact for a Gaussian law, and of second order in the
    step size otherwise: the expected signs are taken as the mean of their values before and after the step. The noise
    may fall to 0 if no variance of the law is 0."""

    def step(key: jax.Array, y: jax.Array, level: NoiseStep) -> jax.Array:
        level = NoiseStep(*(v.astype(y.dtype) for v in level))
        shrink = jnp.sqrt((law.variance + level.after) / (law.variance + level.before))

        def moved(signs):
            centre = jnp.matmul(signs, law.centres, precision="highest")
            return centre + shrink * (y - centre)

        signs = jnp.tanh(law.field(y, level.before))
        return moved((signs + jnp.tanh(law.field(moved(signs), level.after))) / 2)

    return step


# --- mixtures under any drift


class Bridge(NamedTuple):
    """One reverse step of a mixture, by component: the law of the state before the step (later in t), and the Gaussian
    law of the state after it, given the state before and the component."""

    log_scale: jax.Array  # (c,) log weight less log volume
    whiten: jax.Array  # (c, n, n) inverse Cholesky factor of the covariance before
    before: jax.Array  # (c, n) mean before
    after: jax.Array  # (c, n) mean after
    gain: jax.Array  # (c, n, n) by which the mean after follows the state before
    root: jax.Array  # (c, n, n) square root of the covariance after


def state_laws(law: Mixture, steps: Transition) -> Mixture:
    """Laws of the state at all T times of a grid: a `Mixture` whose arrays have the times as leading axis.

    Args:
      law: of the data, at the first time.
      steps: factor and covariance (T - 1, n, n) from each time to the next, for example
        ``transition(process, jnp.diff(times))``. If the drift changes, one transition for each of its values.

    Raises:
      ValueError: the steps are not of the size of the law.
    """
    size = law.means.shape[-1]
    if steps.factor.shape[1:] != (size, size) or steps.covariance.shape != steps.factor.shape:
        raise ValueError(
            f"factors {steps.factor.shape} and covariances {steps.covariance.shape} must be (T - 1, {size}, {size})"
        )

    def advance(law, step):
        means = _einsum("ij,aj->ai", step.factor, law.means)
        spread = _einsum("ij,ajk,lk->ail", step.factor, law.covariances, step.factor)
        law = Mixture(law.weights, means, spread + step.covariance)
        return law, law

    _, later = jax.lax.scan(advance, law, steps)
    return jax.tree.map(lambda first, rest: jnp.concatenate([first[None], rest]), law, later)


def bridges(law: Mixture, steps: Transition) -> Bridge:
    """The T - 1 steps of `mixture_sde` in the order of generation: levels for `simulate`; arguments as of `state_laws`
    (theory, eq. 12.14)."""
    laws = state_laws(law, steps)
    before, after = (jax.tree.map(lambda v, part=part: v[part], laws) for part in (slice(1, None), slice(None, -1)))

    def bridge(weight, mean, covariance, mean_after, covariance_after, factor, noise):
        lower = jnp.linalg.cholesky(covariance)
        whiten = solve_triangular(lower, jnp.eye(mean.size), lower=True)
        gain = _einsum("ij,kj,lk,lm->im", covariance_after, factor, whiten, whiten)
        rest = jnp.eye(mean.size) - _einsum("ij,jk->ik", gain, factor)
        # the form P - G F P would cancel where the step or the noise is small
        left = _einsum("ij,jk,lk->il", rest, covariance_after, rest) + _einsum("ij,jk,lk->il", gain, noise, gain)
        log_scale = jnp.log(weight) - jnp.log(jnp.diagonal(lower)).sum()
        return Bridge(log_scale, whiten, mean, mean_after, gain, gaussian_root(left))

    by_component = jax.vmap(bridge, (0, 0, 0, 0, 0, None, None))
    found = jax.vmap(by_component)(
        before.weights,
        before.means,
        before.covariances,
        after.means,
        after.covariances,
        steps.factor,
        steps.covariance,
    )
    return jax.tree.map(lambda v: v[::-1], found)


def mixture_sde(key: jax.Array, x: jax.Array, level: Bridge) -> jax.Array:
    """Exact step of the reverse SDE of a mixture under any drift: it draws a component from its posterior, then the
    state from the Gaussian bridge that the component leaves (theory, eq. 12.14). Its levels are `bridges`."""
    for_component, for_noise = jax.random.split(key)
    apart = x - level.before
    log_chance = level.log_scale - jnp.square(_einsum("aij,aj->ai", level.whiten, apart)).sum(-1) / 2
    one = jax.nn.one_hot(jax.random.categorical(for_component, log_chance), apart.shape[0], dtype=x.dtype)
    mean = level.after + _einsum("aij,aj->ai", level.gain, apart)
    noise = _einsum("aij,j->ai", level.root, jax.random.normal(for_noise, x.shape, x.dtype))
    return _einsum("a,ai->i", one, mean + noise)


class TimeStep(NamedTuple):
    """Times before and after a reverse step."""

    before: jax.Array
    after: jax.Array


def time_steps(times: ArrayLike) -> TimeStep:
    """The T - 1 steps between increasing times (T,), in the order of generation: levels for `simulate`.

    Raises:
      ValueError: fewer than two times, or they do not increase.
    """
    times = jnp.asarray(times, float)
    if times.ndim != 1 or times.size < 2:
        raise ValueError(f"times {times.shape} must be (T,) with two times or more")
    require(jnp.diff(times) >= 0, f"times must increase, got {times}")
    return TimeStep(times[:0:-1], times[-2::-1])


def mixture_flow(law: Mixture, process: Process) -> Step[TimeStep]:
    """Step of the probability flow of a mixture under any drift, by the classical fourth-order rule of Runge and Kutta.
    If a step ends at t = 0, the law must have a density."""

    def step(key: jax.Array, x: jax.Array, level: TimeStep) -> jax.Array:
        h = level.before - level.after
        velocity = partial(flow_drift, law, process)
        a = velocity(level.before, x)
        b = velocity(level.before - h / 2, x + h / 2 * a)
        c = velocity(level.before - h / 2, x + h / 2 * b)
        d = velocity(level.after, x + h * c)
        return x + h / 6 * (a + 2 * b + 2 * c + d)

    return step
