"""Theory of the three laws under the sampler's steps: commitment, speciation, cloning."""

import jax
import jax.numpy as jnp
import numpy as np

from experiments.frame.gaussian import ancestral_steps, wiener_gains
from experiments.studies.solvable.data import law, spectrum
from experiments.studies.solvable.settings import SIGNS
from ou_theory.clock import Clock
from ou_theory.cluster_laws import sign_correlation
from ou_theory.modes import Bands
from ou_theory.recursion import recursion_energy


def band_theory(clock: Clock, bands: Bands, eta: float = 0.0) -> np.ndarray:
    """Exact difference energies (K, B) of the Gaussian law along the sampler, coefficient by coefficient; `eta` as in
    `recursion_energy`."""
    variance = spectrum().ravel()
    gain = wiener_gains(variance, clock)
    with jax.enable_x64(True):
        start = jnp.full(variance.shape, 1 / clock.alpha_bar[0])
        energy = np.asarray(recursion_energy(jnp.asarray(gain), jnp.asarray(clock.sigma), start, eta))
    return energy @ bands.averaging.reshape(variance.size, -1)


def clone_theory(clock: Clock, bands: Bands, branches: np.ndarray) -> np.ndarray:
    """Exact correlation (branch, B) of the ends of two clones of the Gaussian law under the ancestral sampler."""
    variance = spectrum().ravel()
    factors, noise = ancestral_steps(variance, clock)
    found = []
    for branch in branches:
        shared, own = variance + clock.sigma[branch] ** 2, np.zeros_like(variance)
        for factor, added in zip(factors[branch:], noise[branch:], strict=True):
            shared, own = factor**2 * shared, factor**2 * own + added
        shared, total = (x @ bands.averaging.reshape(variance.size, -1) for x in (shared, shared + own))
        found.append(shared / total)
    return np.stack(found)


def sign_theory(clock: Clock) -> dict[str, np.ndarray]:
    """Of every sign: speciation level (kappa = 1), growth rate (K, sign), kappa (K, sign)."""
    sigma2 = clock.sigma**2
    level, growth, kappas = [], [], []
    for name, a in SIGNS:
        one = law(name)
        m2, s2 = np.asarray(one.centres[a], np.float64) ** 2, np.asarray(one.variance, np.float64)
        kappa = (m2 / (s2 + sigma2[:, None])).sum(-1)
        fine = np.exp(-np.linspace(-12, 12, 24001))
        level.append(-np.log(np.interp(1.0, (m2 / (s2 + fine[:, None])).sum(-1), fine)))
        growth.append((kappa - 1) * (m2 * sigma2[:, None] / (s2 + sigma2[:, None])).sum(-1) / m2.sum())
        kappas.append(kappa)
    return {"level": np.array(level), "growth": np.stack(growth, -1), "kappa": np.stack(kappas, -1)}


def sign_curves(clock: Clock, kappa: np.ndarray) -> np.ndarray:
    """Relative energy (K, sign) of what the posterior mean predicts along every sign's centre: 1 - mmse / Var.

    Args:
      kappa: (K, sign) of `sign_theory`.
    """
    with jax.enable_x64(True):
        trust = np.asarray(sign_correlation(jnp.asarray(kappa)))
    found = []
    for s, (name, a) in enumerate(SIGNS):
        one = law(name)
        centre, variance = np.asarray(one.centres[a], np.float64), np.asarray(one.variance)
        unit = centre / np.linalg.norm(one.centres[a])
        # parts within clusters are independent of each other; the sign's own part adds up in amplitude
        share = clock.sigma[:, None] ** 2 / (variance + clock.sigma[:, None] ** 2)
        error = (unit**2 * variance * share).sum(-1)
        error = error + (unit * centre * share).sum(-1) ** 2 * (1 - trust[:, s])
        total = (unit**2 * variance).sum() + (unit * centre).sum() ** 2
        found.append(1 - error / total)
    return np.stack(found, -1)
