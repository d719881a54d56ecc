"""How often a nominal 95 % interval of the gap holds the true one: ``python benchmarks/coverage.py``.

Pairs of trajectories of Gaussian data with the variances of the shipped 8 x 8 photographs are denoised exactly, or with
an error of independent noise, under DDIM. Of every set of pairs the gap and its draws are taken as `syncgap compare`
does, and three intervals are made of them. The truth is the gap at infinitely many pairs, without error.
"""

from dataclasses import dataclass

import numpy as np
import tyro
from scipy import stats

from dit_jax.checkpoint import shipped_model
from dit_jax.covariance import load_covariance
from experiments.frame.estimator import HIGH, LOW
from experiments.frame.exact import exact_statistics
from experiments.frame.gaussian import ddim_factors, wiener_gains
from experiments.frame.steps import WINDOW_START
from ou_theory.bootstrap import resample
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands


@dataclass(frozen=True)
class Settings:
    """Coverage of three bootstrap intervals of the gap, by number of pairs."""

    pairs: tuple[int, ...] = (8, 16, 32, 64, 128)
    trials: int = 400
    draws: int = 400
    errors: tuple[float, ...] = (0.0, 0.25)  # energy of the error in the highest band at log-SNR -6, of the band's own
    model: str = "photos8-natural"  # whose data
    seed: int = 0


def gaps(energy: np.ndarray, inner: np.ndarray, ell: np.ndarray) -> np.ndarray:
    """The headline's gap (...) of mean energies and inner products (..., K, B)."""
    opened = ell >= WINDOW_START
    share = np.maximum(inner / energy[..., -1:, :], 0)[..., opened, :] ** 2
    latched = np.maximum.accumulate(share, -2)
    tau = ell[-1] - np.trapezoid(latched / latched[..., -1:, :], ell[opened], axis=-2)
    return tau[..., HIGH] - tau[..., LOW]


def intervals(point: float, draws: np.ndarray, jackknife: np.ndarray) -> dict[str, tuple[float, float]]:
    """Basic, percentile, and bias-corrected accelerated (Efron and Tibshirani, *An Introduction to the Bootstrap*)."""
    low, high = np.quantile(draws, [0.025, 0.975])
    bias = stats.norm.ppf(np.clip((draws < point).mean(), 1e-3, 1 - 1e-3))
    apart = jackknife.mean() - jackknife
    acceleration = (apart**3).sum() / (6 * (apart**2).sum() ** 1.5)
    z = bias + stats.norm.ppf([0.025, 0.975])
    levels = stats.norm.cdf(bias + z / (1 - acceleration * z))
    return {
        "basic": (2 * point - high, 2 * point - low),
        "percentile": (low, high),
        "BCa": tuple(np.quantile(draws, levels)),
    }


def main(settings: Settings) -> None:
    clock, data = make_clock("50"), load_covariance(shipped_model(settings.model))
    assert data is not None
    size = data.coefficient.shape[0]
    bands = radial_bands(size, size, 6)
    variance = np.maximum(np.linalg.eigvalsh(data.coefficient), 0).reshape(-1)  # three colours of every coefficient
    share = (bands.index.reshape(-1, 1) == np.arange(len(bands))).repeat(3, 0).astype(float)
    ell, sigma = clock.log_snr, clock.sigma
    energy, inner = (v[0] for v in exact_statistics(np.ones(1), variance, share, clock))
    truth = float(gaps(energy, inner, ell))
    gains, steps = wiener_gains(variance, clock), ddim_factors(variance, clock)
    highest = (variance @ share / share.sum(0))[HIGH]
    print(f"true gap {truth:.3f} nats; {settings.trials} trials, {settings.draws} draws, seed {settings.seed}")
    print("| error | pairs | bias | spread | basic | percentile | BCa |\n|---|---|---|---|---|---|---|")
    for error in settings.errors:
        for count in settings.pairs:
            rng = np.random.default_rng([settings.seed, count, round(1000 * error)])
            found, held = [], {"basic": 0, "percentile": 0, "BCa": 0}
            weights = resample(settings.seed, count, settings.draws) / count
            left_out = (1 - np.eye(count)) / (count - 1)
            for _ in range(settings.trials):
                y = rng.standard_normal((count, variance.size)) * np.sqrt(variance + sigma[0] ** 2)
                denoised = []
                for k in range(len(clock)):
                    noise = np.sqrt(error * highest) * sigma[k] / np.exp(-WINDOW_START / 2)
                    wrong = noise * rng.standard_normal(y.shape) if error else 0.0
                    denoised.append(gains[k] * y + wrong)
                    following = sigma[k + 1] if k + 1 < len(clock) else 0.0
                    y = steps[k] * y + (1 - following / sigma[k]) * wrong
                seen = np.array(denoised)
                energy, inner = (np.moveaxis(v @ share, 1, 0) for v in (seen**2, seen * seen[-1]))  # (P, K, B)
                point = float(gaps(energy.mean(0), inner.mean(0), ell))

                def of(rows, energy=energy, inner=inner):
                    return gaps(np.tensordot(rows, energy, 1), np.tensordot(rows, inner, 1), ell)

                found.append(point)
                for name, (low, high) in intervals(point, of(weights), of(left_out)).items():
                    held[name] += low <= truth <= high
            cells = [f"{held[name] / settings.trials:.3f}" for name in held]
            off = f"{np.mean(found) - truth:+.3f}", f"{np.std(found):.3f}"
            print("| " + " | ".join([f"{error:g}", str(count), *off, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
