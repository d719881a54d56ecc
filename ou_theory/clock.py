"""Noise schedules, respacing, and the clocks that go with them (docs/theory.md, section 2).

The noise level has four names: the signal power `alpha_bar` of the variance-preserving frame, the noise variance
``sigma2 = (1 - alpha_bar) / alpha_bar`` of the rescaled frame, the log-SNR ``ell = -log(sigma2)`` and the
Ornstein-Uhlenbeck time ``t = -log(alpha_bar) / 2``. Tables are NumPy float64: they are constants of a run, and their
precision must not depend on JAX's x64 flag.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ou_theory.paths import PATHS, ProbabilityPath

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

NUM_TRAIN_STEPS = 1000
BETA_MIN = 1e-4
BETA_MAX = 0.02


def linear_betas(num: int = NUM_TRAIN_STEPS, beta_min: float = BETA_MIN, beta_max: float = BETA_MAX) -> FloatArray:
    """The linear DDPM schedule (theory, eq. 2.2): `num` increments from `beta_min` to `beta_max`, (num,) float64."""
    return np.linspace(beta_min, beta_max, num, dtype=np.float64)


def ou_time(alpha_bar: ArrayLike) -> FloatArray:
    """OU time ``t = -log(alpha_bar) / 2`` of a signal power in (0, 1]."""
    return -0.5 * np.log(np.asarray(alpha_bar, np.float64))


def sigma2(alpha_bar: ArrayLike) -> FloatArray:
    """Noise variance ``(1 - alpha_bar) / alpha_bar`` in the rescaled frame ``y = x / sqrt(alpha_bar)``."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return (1 - alpha_bar) / alpha_bar


def log_snr(alpha_bar: ArrayLike) -> FloatArray:
    """Log-SNR ``ell = log(alpha_bar / (1 - alpha_bar))`` of a unit-variance mode, in nats."""
    alpha_bar = np.asarray(alpha_bar, np.float64)
    return np.log(alpha_bar) - np.log1p(-alpha_bar)


def alpha_bar_of_log_snr(ell: ArrayLike) -> FloatArray:
    """Signal power of a log-SNR: the logistic function, inverse of `log_snr`."""
    ell = np.asarray(ell, np.float64)
    return np.exp(-np.logaddexp(0.0, -ell))


def schedule_index(noise_variance: ArrayLike) -> FloatArray:
    """Real-valued index on the linear 1000-step schedule at which the noise variance is `noise_variance`.

    Two passes of the closed form of docs/theory.md, eq. (2.6); within 0.016 of the table for
    ``1e-3 <= noise_variance <= 1e4``.
    """
    last, spread = NUM_TRAIN_STEPS - 1, BETA_MAX - BETA_MIN
    offset = BETA_MIN - spread / (2 * last)
    target = np.log1p(np.asarray(noise_variance, np.float64))

    def invert(level: FloatArray) -> FloatArray:
        return last / spread * (np.sqrt(offset**2 + 2 * spread / last * level) - offset)

    j = invert(target)
    second_order = BETA_MIN**2 * j + BETA_MIN * spread / last * j**2 + spread**2 / (3 * last**2) * j**3
    return invert(target - 0.5 * second_order) - 1


def respace(spec: str | int, num_steps: int = NUM_TRAIN_STEPS) -> IntArray:
    """Indices of the full schedule that a shorter sampler keeps, increasing, (n,) int64.

    Args:
      spec: ``"50"``: 50 indices with both ends, a float stride accumulated and rounded half to even.
        ``"10,20"``: the same in equal consecutive sections of the schedule.
        ``"ddim50"``: the smallest integer stride from 0 that gives exactly 50 indices.
      num_steps: length of the full schedule.

    Raises:
      ValueError: `spec` is not of these forms, or cannot be met on `num_steps` steps.
    """
    text = str(spec).strip()
    if text.startswith("ddim"):
        count = _count(text[len("ddim") :], text)
        for stride in range(1, num_steps + 1):
            if len(range(0, num_steps, stride)) == count:
                return np.arange(0, num_steps, stride, dtype=np.int64)
        raise ValueError(f"steps {text!r}: no integer stride gives exactly {count} of {num_steps} steps; use {count!s}")
    counts = [_count(part, text) for part in text.split(",")]
    base, longer = divmod(num_steps, len(counts))
    kept: list[int] = []
    start = 0
    for i, count in enumerate(counts):
        size = base + (i < longer)
        if count > size:
            raise ValueError(f"steps {text!r}: section {i} has {size} steps, cannot keep {count} of them")
        stride = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept.append(start + round(position))
            position += stride
        start += size
    return np.unique(np.array(kept, dtype=np.int64))


def _count(text: str, spec: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"steps {spec!r} is not a step count; use for example '50', '10,20' or 'ddim50'")
    return int(text)


@dataclass(frozen=True, eq=False)
class Clock:
    """The noise levels that a sampler visits, in the order of generation: step 0 sees pure noise.

    Attributes:
      timesteps: (n,) what a network is given at step k: the index on the full schedule, int64, decreasing; or the time
        in [0, 1] on a path of flow matching, float64, increasing.
      alpha_bar: (n,) float64, increasing: signal power of the variance-preserving state at step k. After the last step
        the level is ``alpha_bar = 1`` exactly.
      path: the path of flow matching that the network was trained on; None for the schedule of DDPM.
    """

    timesteps: IntArray | FloatArray
    alpha_bar: FloatArray
    path: ProbabilityPath | None = None

    def __post_init__(self) -> None:
        if self.timesteps.shape != self.alpha_bar.shape or self.timesteps.ndim != 1 or not self.timesteps.size:
            raise ValueError(
                f"a clock needs equal, non-empty 1-d arrays, got {self.timesteps.shape}, {self.alpha_bar.shape}"
            )
        if np.any(np.diff(self.alpha_bar) <= 0) or self.alpha_bar[0] <= 0 or self.alpha_bar[-1] >= 1:
            raise ValueError("a clock's alpha_bar must increase strictly, inside (0, 1)")

    def __len__(self) -> int:
        return self.timesteps.size

    @cached_property
    def scale(self) -> FloatArray:
        """(n,) factor from the variance-preserving state to the state that the network sees (theory, eq. 2.9)."""
        return np.ones(len(self)) if self.path is None else self.path.scale(self.timesteps)

    @cached_property
    def sigma(self) -> FloatArray:
        """(n,) noise standard deviation in the rescaled frame, decreasing."""
        return np.sqrt(sigma2(self.alpha_bar))

    @cached_property
    def log_snr(self) -> FloatArray:
        """(n,) log-SNR in nats, increasing."""
        return log_snr(self.alpha_bar)

    @cached_property
    def alpha_bar_next(self) -> FloatArray:
        """(n,) signal power after the step: that of the next step, and 1 after the last."""
        return np.append(self.alpha_bar[1:], 1.0)

    @cached_property
    def betas(self) -> FloatArray:
        """(n,) respaced noise increments ``1 - alpha_bar[k] / alpha_bar[k + 1]``."""
        return 1 - self.alpha_bar / self.alpha_bar_next

    def step(self, ell: ArrayLike) -> FloatArray:
        """Real-valued sampler step of a log-SNR: linear in `ell` between steps.

        0 at or below the first level; ``len(clock)``, read "never", above the last. NaN stays NaN.
        """
        ell = np.asarray(ell, np.float64)
        inside = np.interp(ell, self.log_snr, np.arange(len(self), dtype=np.float64))
        return np.where(ell > self.log_snr[-1], float(len(self)), inside)


def make_clock(spec: str | int = "50", betas: FloatArray | None = None) -> Clock:
    """The clock of a respaced sampler.

    Args:
      spec: see `respace`.
      betas: (T,) full schedule in forward order; `linear_betas()` by default.
    """
    betas = linear_betas() if betas is None else betas
    kept = respace(spec, betas.size)
    alpha_bar = np.cumprod(1 - betas, dtype=np.float64)
    return Clock(kept[::-1].copy(), alpha_bar[kept][::-1].copy())


def path_clock(path: str, steps: str | int | ArrayLike) -> Clock:
    """The clock of a sampler on a path of flow matching.

    Args:
      path: one of `ou_theory.paths.PATHS`.
      steps: a number of steps, for as many levels uniform in t from the path's `first_time`, the last a step before
        t = 1; or the times themselves, increasing, with a finite log-SNR each.

    Raises:
      ValueError: unknown path; not a number of steps; times at which log-SNR is not finite, or does not increase.
    """
    if path not in PATHS:
        raise ValueError(f"path {path!r} is not one of {', '.join(PATHS)}")
    chosen = PATHS[path]
    if isinstance(steps, str | int):
        text = str(steps).strip()
        if not text.isdecimal() or int(text) < 1:
            raise ValueError(f"steps {text!r}: a sampler on the {path} path takes a number of steps, for example 50")
        t = np.linspace(chosen.first_time, 1, int(text) + 1)[:-1]
    else:
        t = np.asarray(steps, np.float64)
    return Clock(t, chosen.alpha_bar(t), chosen)
