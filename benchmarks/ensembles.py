"""An ensemble through the reverse process, beside a NumPy loop and diffrax: ``python benchmarks/ensembles.py --help``.

Two clusters over many modes, noise falling geometrically. Euler's rule is the same work for all three; the exact step
is what the library does instead. Times are medians of runs taken in turns, compilation apart.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import diffrax
import jax
import jax.numpy as jnp
import lineax
import numpy as np
import tyro

from ou_theory import ensembles as en
from ou_theory.cluster_laws import Clusters
from ou_theory.keys import random_key

HIGH, LOW = 1e4, 1e-3  # noise variances at the ends
LOOP = "Euler, NumPy loop"


@dataclass(frozen=True)
class Settings:
    """Time and memory of an ensemble, ratios to the NumPy loop."""

    paths: int = 100_000
    modes: int = 64
    steps: int = 1000
    repeats: int = 1
    skip: tuple[str, ...] = ()  # names of cases to leave out


def law_of(modes: int) -> Clusters:
    """A power-law spectrum, two clusters in its lowest modes."""
    k = 1 + np.arange(modes)
    centre = np.where(k <= 4, 3.0 / k, 0.0)
    return Clusters(jnp.asarray(30.0 * k**-1.5, jnp.float32), jnp.asarray(centre[None], jnp.float32))


def euler_step(law: Clusters, ds: float) -> Callable:
    """Euler's rule in ``s = -log(noise)``, in which ``dy = (denoised - y) ds + sqrt(noise) dW``."""

    def step(key, y, noise):
        push = (law.posterior_mean(y, noise) - y) * ds
        return y + push + jnp.sqrt(noise * ds) * jax.random.normal(key, y.shape, y.dtype)

    return step


def numpy_loop(law: Clusters, noise: np.ndarray, ds: float, start: np.ndarray) -> np.ndarray:
    """The same in NumPy, single precision, in place."""
    variance, centre = np.asarray(law.variance), np.asarray(law.centres[0])
    rng, y, draw = np.random.default_rng(0), start.copy(), np.empty_like(start)
    for level in noise.astype(np.float32):
        label = np.tanh(y @ (centre / (variance + level)))
        gain = variance / (variance + level)
        rng.standard_normal(dtype=np.float32, out=draw)
        draw *= np.float32(np.sqrt(level * ds))
        # y + ds (denoised - y): the denoised is gain y + (1 - gain) label centre
        y *= 1 + np.float32(ds) * (gain - 1)
        y += np.multiply.outer(label, np.float32(ds) * (1 - gain) * centre)
        y += draw
    return y


def diffrax_solve(law: Clusters, steps: int, start: jax.Array) -> jax.Array:
    """The same by diffrax: the ensemble as one state, its fastest Brownian path."""
    first, last = -np.log(HIGH), -np.log(LOW)
    path = diffrax.UnsafeBrownianPath(start.shape, random_key(0))
    terms = diffrax.MultiTerm(
        diffrax.ODETerm(lambda s, y, _: law.posterior_mean(y, jnp.exp(-s)) - y),
        diffrax.ControlTerm(
            lambda s, y, _: lineax.DiagonalLinearOperator(jnp.full(y.shape, jnp.exp(-s / 2), y.dtype)), path
        ),
    )
    found = diffrax.diffeqsolve(
        terms,
        diffrax.Euler(),
        first,
        last,
        (last - first) / steps,
        start,
        max_steps=steps + 2,
        adjoint=diffrax.DirectAdjoint(),
    )
    assert found.ys is not None
    return found.ys[0]


def memory_beside(compiled: jax.stages.Compiled) -> int:
    """Bytes that a program needs beside what goes in and comes out."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def measure(settings: Settings) -> list[dict]:
    """Time, compile time, memory and the variance of the ends over its exact value, of every case."""
    law, steps = law_of(settings.modes), settings.steps
    ladder = np.geomspace(HIGH, LOW, steps + 1)
    ds = float(np.log(HIGH / LOW) / steps)
    start = jax.jit(lambda: en.noised_clusters(law, HIGH, 0, jnp.arange(settings.paths)))()
    cases = {
        "Euler, one jitted scan": lambda y: en.simulate(euler_step(law, ds), y, jnp.asarray(ladder[:-1]), 0)[0],
        "exact steps, one jitted scan": lambda y: en.simulate(en.clusters_sde(law), y, en.noise_steps(ladder), 0)[0],
        "Euler, diffrax": lambda y: diffrax_solve(law, steps, y),
    }
    runs: dict[str, tuple[Callable, float, float]] = {}
    for name, function in cases.items():
        if name in settings.skip:
            continue
        began = time.perf_counter()
        compiled = jax.jit(function).lower(start).compile()
        runs[name] = (compiled, time.perf_counter() - began, memory_beside(compiled) + start.nbytes)
    if LOOP not in settings.skip:
        at_once = np.asarray(start)
        runs[LOOP] = (lambda _: numpy_loop(law, ladder[:-1], ds, at_once), 0.0, 3 * at_once.nbytes)
    times: dict[str, list[float]] = {name: [] for name in runs}
    ends = {}
    for _ in range(settings.repeats):
        for name, (run, *_) in runs.items():
            began = time.perf_counter()
            ends[name] = jax.block_until_ready(run(start))
            times[name].append(time.perf_counter() - began)
    found = []
    for name, (_, compiling, size) in runs.items():
        seconds = statistics.median(times[name])
        # of the last state over its exact value, all modes alike
        variance = (np.asarray(ends[name]) ** 2).mean(0) / (np.asarray(law.total_variance()) + LOW)
        found.append(
            {
                "case": name,
                "seconds": seconds,
                "ns_per_mode_step": 1e9 * seconds / (settings.paths * settings.modes * steps),
                "compile_s": compiling,
                "bytes": size,
                "variance": float(variance.mean()),
            }
        )
    return found


def main(settings: Settings) -> None:
    found = measure(settings)
    device = jax.devices()[0].device_kind
    print(
        f"# {settings.paths} paths, {settings.modes} modes, {settings.steps} steps, {settings.repeats} turns, {device}"
    )
    print(
        f"{'case':<30} {'seconds':>9} {'ns/mode-step':>13} {'of NumPy':>9} {'compile s':>10} {'MB':>7} {'variance':>9}"
    )
    loop = next((row["seconds"] for row in found if row["case"] == LOOP), float("nan"))
    for row in found:
        print(
            f"{row['case']:<30} {row['seconds']:>9.2f} {row['ns_per_mode_step']:>13.2f} {loop / row['seconds']:>9.2f} "
            f"{row['compile_s']:>10.2f} {row['bytes'] / 1e6:>7.0f} {row['variance']:>9.3f}"
        )
    law, start = law_of(settings.modes), jax.ShapeDtypeStruct((settings.paths, settings.modes), jnp.float32)
    for few in (max(settings.steps // 10, 1), settings.steps):
        levels = en.noise_steps(np.geomspace(HIGH, LOW, few + 1))
        run = jax.jit(lambda y, levels=levels: en.simulate(en.clusters_sde(law), y, levels, 0)[0])
        beside = memory_beside(run.lower(start).compile())
        print(f"# exact steps, {few} of them: {beside / 1e6:.2f} MB beside the states")


if __name__ == "__main__":
    main(tyro.cli(Settings))
