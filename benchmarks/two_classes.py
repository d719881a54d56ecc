"""When do two Gaussian classes decide that have a covariance each? phi of a perfect denoiser of them:

    python benchmarks/two_classes.py cifar10-train.zip --classes automobile horse

The exact law (11.5) of docs/theory.md has one covariance for both classes. With one for each, the log-odds of the class
are quadratic in the state, and phi is an average over states, by Monte Carlo: 1 - 2 E[pi (1 - pi)].
"""

import argparse

import numpy as np
from scipy.linalg import eigh

from dit_jax.images import load_images
from dit_jax.transforms import doubled
from experiments.studies.speciation.analysis import crossing


def phi(means: list, spectra: list, sigma2: float, draws: int, seed: int = 0) -> tuple[float, float]:
    """phi of two Gaussians at a noise variance, and its standard error.

    Args:
      means: (n,) of each class.
      spectra: eigenvalues (n,) and eigenvectors (n, n) of the covariance of each class.
      draws: states of each class.
    """
    same = []
    for own, other in ((0, 1), (1, 0)):
        z = np.random.default_rng([seed, own]).standard_normal((draws, len(means[0])), np.float32)
        width, vectors = spectra[own][0] + sigma2, spectra[own][1]
        far, turned = spectra[other][0] + sigma2, spectra[other][1]
        states = (z * np.sqrt(width, dtype=np.float32)) @ vectors.T + (means[own] - means[other]).astype(np.float32)
        distance = np.square(states @ turned, dtype=np.float64) / far
        odds = (distance.sum(1) + np.log(far).sum() - np.square(z, dtype=np.float64).sum(1) - np.log(width).sum()) / 2
        same.append((1 + np.tanh(odds / 2) ** 2) / 2)
    every = np.concatenate(same)
    return float(every.mean()), float(every.std() / len(every) ** 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description="phi of two Gaussian classes with a covariance each.")
    parser.add_argument("images")
    parser.add_argument("--classes", nargs=2, required=True)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--draws", type=int, default=1000)
    given = parser.parse_args()
    images = load_images(given.images, given.size, False, labels=given.classes)
    x = doubled(images)
    labels = np.concatenate([images.labels] * 2)
    means, spectra = [], []
    for label in (0, 1):
        own = x[labels == label].reshape(np.count_nonzero(labels == label), -1)
        means.append(own.mean(0, dtype=np.float64))
        spread = own - means[-1].astype(np.float32)
        values, vectors = eigh(spread.T @ spread / len(spread), overwrite_a=True, check_finite=False)
        spectra.append((np.maximum(values, 0).astype(np.float64), vectors))
        print(f"{given.classes[label]}: largest eigenvalue {values[-1]:.1f}, variance {values.sum():.1f}", flush=True)
    levels = np.arange(-9.0, 1.5, 0.5)
    found = np.array([phi(means, spectra, float(np.exp(-level)), given.draws) for level in levels])
    for level, (value, error) in zip(levels, found, strict=True):
        print(f"log-SNR {level:5.2f}  phi {value:.3f} +- {error:.3f}", flush=True)
    print(f"phi passes 0.775 at {crossing(found[:, 0], levels):.2f}")


if __name__ == "__main__":
    main()
