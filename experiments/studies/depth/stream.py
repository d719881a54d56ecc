"""The scale of the residual stream, and raw energies in units of it (docs/theory.md, section 8)."""

import numpy as np

from experiments.frame.draws import bootstrap, both
from experiments.frame.steps import WINDOW_START
from experiments.studies.depth.readings import levels_of


def stream_readings(
    raw: np.ndarray, count: np.ndarray, ell: np.ndarray, steps: np.ndarray, weights: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Commitment from the difference mode's share of the stream, and how large stream and difference are.

    Args:
      raw: (P, C, layer, K, B, 2) mean squares of common and difference mode by band of the token grid.
      count: (B,) token coefficients per band.
      ell: (K,) log-SNR.
      steps: (L,) of the K at which sizes are given.
      weights: (draws, P).

    Returns:
      what `levels_of` gives of energies over the stream's mean square after the same layer at the same step; and,
      uncoupled, ``size`` (1 + draws, layer, L), the mean square of the stream, and ``energy`` (1 + draws, layer, L, B),
      that of the difference mode by band.
    """
    share = count / count.sum()

    def estimates(mean):
        size = mean.mean(-1) @ share
        found = levels_of(mean[..., 1] / size[..., None], ell, WINDOW_START)
        return found | {"size": size[:, 0][..., steps], "energy": mean[:, 0, ..., 1][..., steps, :]}

    found = both(bootstrap(estimates, raw, weights))
    return found, {name: found.pop(name) for name in ("size", "energy")}
