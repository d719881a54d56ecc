"""The share of the outcome that a multiple of the final layer's readout explains, by layer (docs/theory.md, 8).

All of it follows from the mean inner products, per level, layer and band, of three differences: the readout r, the
noisy state x in the rescaled frame, and the outcome y. Along the ancestral sampler x is y with independent noise.
"""

import numpy as np

from experiments.frame.draws import bootstrap, both
from experiments.studies.depth.readings import levels_of

# readings: name -> what the outcome is regressed on
REGRESSIONS = ("state", "scaled", "joined")


def scaled_readings(
    products: np.ndarray, ell: np.ndarray, weights: np.ndarray
) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """Commitment by layer from explained shares, and what passes through the readout.

    Args:
      products: (C, P, layer, level, B, 6), the last axis as in `experiments.studies.depth.probe.PRODUCTS`.
      ell: (level,) log-SNR.
      weights: (draws, P) of the bootstrap.

    Returns:
      by reading, level, gap, edge and r2 as `levels_of` gives them, for the outcome regressed on the noisy ``state``
      alone (one layer), on the readout (``scaled``: one scalar per layer, level and band), and on both (``joined``);
      and the readout's parts (1 + draws, C, layer, level, B): ``signal``, the coefficient of the outcome in it,
      ``noise``, that of the state's noise, and ``passed``, the energy of that noise over the outcome's.
    """
    flat = both(bootstrap(lambda means: _estimates(means, ell), products, weights, 1))
    found = {name: {what: flat[f"{name} {what}"] for what in ("level", "gap", "edge", "r2")} for name in REGRESSIONS}
    return found, {name: flat[name] for name in ("signal", "noise", "passed")}


def _estimates(means: np.ndarray, ell: np.ndarray) -> dict[str, np.ndarray]:
    """All of it from mean products (n, C, layer, level, B, 6), by reading and name."""
    rr, rx, ry, xx, xy, yy = np.moveaxis(means, -1, 0)
    of_state = explained(xx, xy, yy)
    # the readout's part across the state; a readout that is a multiple of the state has none but rounding
    of_both = of_state + explained(rr - rx**2 / xx, ry - rx * xy / xx, yy, least=1e-6 * rr)
    shares = of_state[:, :, :1], explained(rr, ry, yy), np.minimum(of_both, 1)  # the state is the same for all layers
    found = parts(rr, rx, ry, xx, xy, yy)
    for name, r2 in zip(REGRESSIONS, shares, strict=True):
        found |= {f"{name} {what}": value for what, value in (levels_of(r2, ell, None) | {"r2": r2}).items()}
    return found


def explained(ff: np.ndarray, fy: np.ndarray, yy: np.ndarray, least: np.ndarray | float = 0.0) -> np.ndarray:
    """Share of y that a multiple of f explains, from their inner products; 0 where f has no more than `least`, or there
    is no y."""
    there = (ff > least) & (yy > 0)
    return np.where(there, fy**2 / np.where(there, ff * yy, 1), 0)


def parts(rr, rx, ry, xx, xy, yy) -> dict[str, np.ndarray]:
    """The readout as ``signal * y + noise * (x - y)`` and a rest that is orthogonal to both; NaN where x is y."""
    yn, nn, rn = xy - yy, xx - 2 * xy + yy, rx - ry
    determinant = yy * nn - yn**2
    with np.errstate(divide="ignore", invalid="ignore"):
        signal, noise = (ry * nn - rn * yn) / determinant, (rn * yy - ry * yn) / determinant
        passed = noise**2 * nn / yy
    there = determinant > 1e-9 * yy * nn
    found = {"signal": signal, "noise": noise, "passed": passed}
    return {name: np.where(there, values, np.nan) for name, values in found.items()}
