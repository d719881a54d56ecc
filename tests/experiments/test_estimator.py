"""Which estimator is the headline: the one that gives the known answer on every system here, where others do not
(docs/theory.md, section 7.4, whose table ``python tests/experiments/test_estimator.py`` prints)."""

import jax
import numpy as np
import pytest

from experiments.frame.estimator import ESTIMATORS, commitment_of, companions
from ou_theory.clock import make_clock

CLOCK = make_clock("50")
ELL, SIGMA = CLOCK.log_snr, np.asarray(CLOCK.sigma)
VARIANCE = np.array([100.0, 20.0, 0.05])  # DC, low, high
SAMPLES = 1200  # pairs times coefficients of a band: the lowest annulus of 64 pairs
ONE = np.ones((len(ELL), 3))
LATE = np.stack([np.ones(len(ELL)), 0.02 + 0.6 / (1 + np.exp(-ELL)), np.ones(len(ELL))], -1)


def run(rho, floor, seed):
    """Energies and inner products with the end (K, B) of Gaussian bands whose Wiener gains are multiplied by rho (K, B)
    and which are denoised with an error of independent noise, ``floor`` (B,) of the band's variance at log-SNR -6 and
    proportional to the noise level."""
    rng = np.random.default_rng(seed)  # of any gain the same, as of pairs at any coupling
    y = rng.standard_normal((SAMPLES, 3)) * np.sqrt(VARIANCE + SIGMA[0] ** 2)
    found = []
    for k, sigma in enumerate(SIGMA):
        wiener = VARIANCE / (VARIANCE + sigma**2)
        error = np.sqrt(np.asarray(floor) * VARIANCE) * sigma / np.exp(3)
        found.append(rho[k] * wiener * y + error * rng.standard_normal(y.shape))
        if k + 1 < len(SIGMA):
            y = y * SIGMA[k + 1] / sigma + (1 - SIGMA[k + 1] / sigma) * found[-1]
    found = np.array(found)
    return (found**2).mean(1), (found * found[-1]).mean(1)


def gaps(rho, floor, seed):
    """The gap under `rho` by every estimator, the reference being the run without coupling."""
    (none, inner_none), (energy, inner) = run(ONE, floor, seed), run(rho, floor, seed)
    with jax.enable_x64(True):
        found = companions(np.stack([none, energy]), np.stack([inner_none, inner]), ELL, -6.0, stochastic=False)
    return dict(zip(ESTIMATORS, found[:, 1], strict=True))


SYSTEMS = {  # gain beside the Wiener gain, error, known gap: of the same system without error
    "exact": (ONE, (0, 0, 0)),
    "error in the high band": (ONE, (0, 0, 0.25)),
    "gain above 1": (ONE * [1, 1, 1.15], (0, 0, 0.05)),
    "weak low band that opens late": (LATE, (0, 0.007, 0.02)),
    "ideal, g = 0.2": (ONE * (1 - 0.2) / 1.2, (0, 0.002, 0.02)),
    "ideal, g = 0.5": (ONE * (1 - 0.5) / 1.5, (0, 0.002, 0.02)),
}


@pytest.mark.parametrize("name", SYSTEMS)
def test_the_headline_is_right_on_every_known_system(name):
    rho, floor = SYSTEMS[name]
    known = gaps(rho, (0, 0, 0), 0)
    assert next(iter(known)) == "aligned"
    assert known["aligned"] == pytest.approx(known["energy"], abs=1e-6)  # without error all energy is aligned
    assert np.mean([gaps(rho, floor, seed)["aligned"] for seed in range(4)]) == pytest.approx(
        known["aligned"], abs=0.03
    )
    if name.startswith("ideal"):  # the ideal model's gap is log(20 / 0.05) at every coupling
        assert known["aligned"] == pytest.approx(gaps(ONE, (0, 0, 0), 0)["aligned"], abs=0.3)


@pytest.mark.parametrize(
    ("system", "estimator", "miss"),
    [
        ("error in the high band", "energy", 1.0),
        ("weak low band that opens late", "energy", 2.0),
        ("gain above 1", "energy, cut", 1.5),
        ("weak low band that opens late", "aligned, cut", 1.0),
        ("ideal, g = 0.5", "aligned, cut", 1.0),
    ],
)
def test_every_other_estimator_fails_somewhere(system, estimator, miss):
    rho, floor = SYSTEMS[system]
    known = gaps(rho, (0, 0, 0), 0)["aligned"]
    assert abs(gaps(rho, floor, 0)[estimator] - known) > miss


def test_the_aligned_part_is_below_all_energy_and_its_error_is_the_floor():
    none = run(ONE, (0, 0, 0.25), 0)
    with jax.enable_x64(True):
        found = commitment_of(none[0][None], ELL, inner=none[1][None])
    assert found.floor[0, 2] == pytest.approx(0.25, abs=0.05)
    assert np.abs(found.floor[0, :2]).max() < 1e-12
    assert found.decided[0] == pytest.approx(1, abs=1e-6)


def test_amplified_bands_decide_more_than_all():
    amplified = run(ONE * [1, 1, 1.3], (0, 0, 0), 0)[0]
    with jax.enable_x64(True):
        found = commitment_of(np.stack([run(ONE, (0, 0, 0), 0)[0], amplified]), ELL)
    assert found.decided[1, 2] > 3
    assert found.decided[0] == pytest.approx(1)


if __name__ == "__main__":
    for name, (rho, floor) in SYSTEMS.items():
        known = gaps(rho, (0, 0, 0), 0)["aligned"]
        means = np.mean([list(gaps(rho, floor, seed).values()) for seed in range(20)], 0)
        print(f"| {name} | {known:.2f} | " + " | ".join(f"{value:.2f}" for value in means) + " |")
