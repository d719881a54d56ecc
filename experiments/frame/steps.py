"""The sampler steps that are examined: those of the estimator's window, and some evenly spaced in log-SNR."""

import numpy as np

from ou_theory.clock import Clock

WINDOW_START = -6.0  # log-SNR, in nats, at which the window of the estimator opens, or later if noise is too high


def window(clock: Clock, least: int = 1) -> np.ndarray:
    """Sampler steps in the window, increasing int64.

    Raises:
      ValueError: the window holds fewer than `least` steps.
    """
    inside = np.flatnonzero(clock.log_snr >= WINDOW_START)
    if inside.size < least:
        raise ValueError(
            f"steps: {least} sampler steps must have a log-SNR of {WINDOW_START:g} or more, but only {inside.size} of "
            f"{len(clock)} have; give more --steps"
        )
    return inside


def spaced_steps(clock: Clock, count: int, *, last: bool = True) -> np.ndarray:
    """The sampler steps nearest to `count` evenly spaced log-SNRs of the window, increasing, each once.

    Args:
      last: whether the last step is one of them. Without it the spacing is that of `count` + 1 steps.

    Raises:
      ValueError: the window holds no step.
    """
    ell = clock.log_snr
    wanted = np.linspace(ell[window(clock)[0]], ell[-1], count if last else count + 1)
    return np.unique(np.abs(ell[:, None] - (wanted if last else wanted[:-1])).argmin(0))
