"""Data laws and their exact denoisers (docs/theory.md, section 4)."""

import jax


def wiener_gain(variance: jax.Array, sigma2: jax.Array) -> jax.Array:
    """Gain of the posterior mean of a centred Gaussian mode in the rescaled frame: ``S / (S + sigma^2)``, in [0, 1].

    Args:
      variance: data variance S >= 0 of the mode.
      sigma2: noise variance > 0, broadcast against it.
    """
    return variance / (variance + sigma2)
