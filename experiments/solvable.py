"""A network trained on data whose law is known, against the theory with nothing fitted (docs/theory.md, section 9).

Commitment of the Gaussian law by band, speciation of the signs, cloning curves. Everything is measured on the network
and on the exact denoiser by the same code: where they disagree the network is off, where the exact denoiser disagrees
with the closed form the instrument or the theory is.
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.checkpoint import load_manifest
from dit_jax.diffusion import Denoiser, DenoiserOutput, ancestral_step, network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import pair_noise, run_pairs
from experiments.analysis import WINDOW_START
from experiments.info import model_folder
from experiments.solvable_data import NAMES, SIZE, SolvableData, law, spectrum, to_images, to_modes
from experiments.solvable_report import report
from experiments.study import Measure, Study, StudyConfig, pair_draws, resampled_mean, with_interval
from ou_theory import estimator as oc
from ou_theory.clock import Clock
from ou_theory.cluster_laws import Clusters, sign_correlation
from ou_theory.modes import Bands, band_mean, dct2
from ou_theory.recursion import recursion_energy

SIGNS = (("clusters", 0), ("pair", 0), ("pair", 1))  # law, and which of its signs
SIGN_NAMES = ("clusters", "pair, common mode", "pair, difference mode")
SPREAD = 0.003  # least standard error of a correlation: near 1 the resampled one is smaller than the arithmetic's
# added to the seed: clean states and their noise, off trajectories; noise after branching, one seed per branch step
STATE_SEED, NOISE_SEED, CLONE_SEED = 2, 3, 4


@dataclass(frozen=True)
class SolvableConfig(StudyConfig):
    """Measure a network trained on data of known law against its exact theory."""

    weights: str = "solvable8"  # the shipped model, or a folder of `syncgap train solvable`
    pairs: int = 128
    block: int = 16
    branches: int = 10  # steps at which clones branch, evenly spaced in log-SNR

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 3:
            raise ValueError(f"branches must be at least 3, got {self.branches}")
        if self.classes is not None:
            raise ValueError("this study runs all three laws: leave --classes out")


def exact_denoiser(clock: Clock) -> Denoiser:
    """The posterior mean of every law, by label; states (..., N, 8, 8, 2)."""
    laws = [law(name) for name in NAMES]

    def denoise(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
        sigma2 = jnp.asarray(clock.sigma**2, x.dtype)[step]
        y = to_modes(x * jnp.asarray(clock.alpha_bar**-0.5, x.dtype)[step])
        each = jnp.stack([one.posterior_mean(y, sigma2) for one in laws])
        mean = jnp.take_along_axis(each, labels.reshape(1, *(1,) * (y.ndim - 2), -1, 1), 0)[0]
        return DenoiserOutput(to_images(mean))

    return denoise


def branch_steps(clock: Clock, count: int) -> np.ndarray:
    """Sampler steps (up to `count`) evenly spaced in log-SNR over the estimator's window, the last one left out."""
    ell = clock.log_snr
    inside = np.flatnonzero(ell >= WINDOW_START)
    wanted = np.linspace(ell[inside[0]], ell[-1], count + 1)[:-1]
    return np.unique(np.abs(ell[:, None] - wanted).argmin(0))


class SolvableInstrument:
    """The measurements, for any denoiser of the laws."""

    def __init__(self, clock: Clock, bands: Bands, branches: np.ndarray, seed: int):
        self.clock, self.bands, self.branches, self.seed = clock, bands, branches, seed
        self.laws = {name: law(name) for name in NAMES}
        self.shape = (SIZE, SIZE, 2)

    def measure(self, denoise: Denoiser, pairs: jax.Array) -> dict[str, jax.Array]:
        """All variables of a block of pairs, pairs in front; see `VARIABLES`."""
        energy, signed = zip(*(self._trajectories(denoise, pairs, c) for c in range(len(NAMES))), strict=True)
        product, square, *_ = self._clones(denoise, pairs, "gaussian")
        *_, sign_product, sign_square = self._clones(denoise, pairs, "pair")
        return {
            "energy": jnp.stack(energy, 1),
            "sign_energy": jnp.stack([signed[NAMES.index(name)][..., a] for name, a in SIGNS], -1),
            "growth": jnp.stack([self._growth(denoise, pairs, name, a) for name, a in SIGNS], -1),
            "clone_product": product,
            "clone_square": square,
            "sign_product": sign_product,
            "sign_square": sign_square,
        }

    def _trajectories(self, denoise, pairs, label):
        """Difference energies under DDIM by band (P, K, B), and along the signs' centres (P, K, 2)."""
        centres = _directions(self.laws[NAMES[label]])

        def observe(step, x, denoised):
            difference = (denoised[0, 0] - denoised[1, 0]) * np.sqrt(0.5).item()
            along = jnp.einsum("pm,am->pa", to_modes(difference), centres, precision="highest")
            return band_mean(jnp.square(dct2(difference)), self.bands), jnp.square(along)

        labels = jnp.full(pairs.shape, label)
        _, (energy, along) = run_pairs(
            lambda gate: denoise, self.clock, jnp.zeros(1), pairs, labels, self.shape, seed=self.seed, observe=observe
        )
        return energy.swapaxes(0, 1), along.swapaxes(0, 1)

    def _states(self, pairs, step, name):
        """States (P, modes) of the law at a step, in the rescaled frame."""
        root = jax.random.fold_in(jax.random.key(self.seed + STATE_SEED), step)
        clean = jax.vmap(lambda pair: self.laws[name].draw(jax.random.fold_in(root, pair), 1)[0])(pairs)
        noise = to_modes(pair_noise(self.seed + NOISE_SEED, pairs, step, self.shape, 1)[0])
        return clean + jnp.asarray(self.clock.sigma, clean.dtype)[step] * noise

    def _growth(self, denoise, pairs, name, a):
        """Growth rate (P, K) of a difference along a sign's centre, per nat of ln(1 / sigma), on the surface where the
        exact posterior holds all signs for equally likely."""
        one = self.laws[name]
        labels = jnp.full(pairs.shape, NAMES.index(name))
        direction = jnp.broadcast_to(one.centres[a], (pairs.size, one.variance.size))

        def at_step(step):
            sigma2 = jnp.asarray(self.clock.sigma**2, jnp.float32)[step]
            y = self._states(pairs, step, name)
            field, kappa = one.field(y, sigma2), one.kappa(sigma2)
            y = y - jnp.matmul(field / kappa, one.centres, precision="highest")  # now all fields are 0
            scale = jnp.asarray(self.clock.alpha_bar**0.5, jnp.float32)[step]

            def denoised(y):
                return to_modes(denoise(to_images(scale * y)[None], step, labels).denoised[0])

            _, moved = jax.jvp(denoised, (y,), (direction,))
            return ((moved - direction) * direction).sum(-1) / jnp.square(direction).sum(-1)

        return jax.lax.map(at_step, jnp.arange(len(self.clock))).T

    def _clones(self, denoise, pairs, name):
        """Clones of states of the law, ancestral sampler: product of the two ends and mean square, by band
        (P, branch, B) and along the signs' centres (P, branch, 2)."""
        update = ancestral_step(self.clock)
        centres = _directions(self.laws[name])
        labels = jnp.full(pairs.shape, NAMES.index(name))

        def from_branch(branch):
            seed = self.seed + CLONE_SEED + branch  # branches do not share noise: their errors are independent

            def body(step, x):
                return update(step, x, denoise(x, step, labels), pair_noise(seed, pairs, step, self.shape))

            scale = jnp.asarray(self.clock.alpha_bar**0.5, jnp.float32)[branch]
            x = to_images(scale * self._states(pairs, branch, name))
            a, b = jax.lax.fori_loop(branch, len(self.clock), body, jnp.stack([x, x]))
            first, second = dct2(a), dct2(b)
            along = jnp.einsum("rpm,am->rpa", to_modes(jnp.stack([a, b])), centres, precision="highest")
            square = band_mean((first**2 + second**2) / 2, self.bands)
            return band_mean(first * second, self.bands), square, along.prod(0), jnp.square(along).mean(0)

        found = jax.lax.map(from_branch, jnp.asarray(self.branches))
        return tuple(value.swapaxes(0, 1) for value in found)


def _directions(one: Clusters) -> jax.Array:
    """Unit centres (2, M), zero where the law has no such sign."""
    centres = one.centres / jnp.linalg.norm(one.centres, axis=-1, keepdims=True)
    return jnp.zeros((2, one.variance.size)).at[: len(centres)].set(centres)


VARIABLES = {
    "energy": (("law", "step", "band"), "mean square per coefficient of the denoised difference, DDIM"),
    "sign_energy": (("step", "sign"), "square of the denoised difference along a sign's centre, DDIM"),
    "growth": (("step", "sign"), "growth rate of a difference along a sign's centre, per nat of ln(1 / sigma)"),
    "clone_product": (("branch", "band"), "product per coefficient of two clones' ends, Gaussian law"),
    "clone_square": (("branch", "band"), "mean square per coefficient of the clones' ends, Gaussian law"),
    "sign_product": (("branch", "part"), "product of two clones' ends along the centres of the pair's signs"),
    "sign_square": (("branch", "part"), "mean square of the clones' ends along the centres of the pair's signs"),
}


def band_theory(clock: Clock, bands: Bands) -> np.ndarray:
    """Exact difference energies (K, B) of the Gaussian law under DDIM, coefficient by coefficient."""
    variance = spectrum().ravel()
    gain = variance / (variance + clock.sigma[:, None] ** 2)
    with jax.enable_x64(True):
        start = jnp.full(variance.shape, 1 / clock.alpha_bar[0])
        energy = np.asarray(recursion_energy(jnp.asarray(gain), jnp.asarray(clock.sigma), start))
    return energy @ bands.averaging.reshape(variance.size, -1)


def clone_theory(clock: Clock, bands: Bands, branches: np.ndarray) -> np.ndarray:
    """Exact correlation (branch, B) of the ends of two clones of the Gaussian law under the ancestral sampler."""
    variance = spectrum().ravel()
    sigma = np.append(clock.sigma, 0.0)
    found = []
    for branch in branches:
        shared, own = variance + sigma[branch] ** 2, np.zeros_like(variance)
        for k in range(branch, len(clock)):
            kept = (sigma[k + 1] / sigma[k]) ** 2
            factor = (kept + (1 - kept) * variance / (variance + sigma[k] ** 2)) ** 2
            shared, own = factor * shared, factor * own + sigma[k + 1] ** 2 * (1 - kept)
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


def crossing_level(growth: np.ndarray, ell: np.ndarray) -> np.ndarray:
    """Level (..., sign) of the last upward passage of a rate (..., K, sign) through 0, linear between steps."""
    with jax.enable_x64(True):
        return np.asarray(oc.crossing(jnp.asarray(growth), ell, 0.0))


def simultaneous(values: np.ndarray, level: float = 0.95) -> np.ndarray:
    """Estimates with a band (..., 3) that holds the truth at all points at once with this probability.

    Args:
      values: (1 + draws, ...), the estimate first.
    """
    point, draws = values[0], values[1:]
    spread = np.maximum(draws.std(0), SPREAD)
    largest = (np.abs(draws - point) / spread).reshape(len(draws), -1).max(1)
    factor = np.quantile(largest, level)
    return np.stack([point, point - factor * spread, point + factor * spread], -1)


def estimates(dataset: xr.Dataset, clock: Clock, seed: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """Estimates with intervals (..., 3) of one source; levels in nats."""
    weights = pair_draws(seed, dataset.sizes["pair"])
    ell = clock.log_snr

    def drawn(name):
        values = np.asarray(dataset[name].values, np.float64)
        return np.concatenate([values.mean(0)[None], resampled_mean(values, weights)])

    def packed(values):
        return with_interval(values[0], values[1:])

    energy, growth = drawn("energy"), drawn("growth")
    q = energy / energy[:, :, -1:]
    with jax.enable_x64(True):
        tau = np.asarray(oc.commitment(jnp.asarray(q[:, 0]), ell, WINDOW_START).level)
    speciation = crossing_level(growth, ell)
    signed = drawn("sign_energy")
    with np.errstate(invalid="ignore"):
        clone, clone_sign = drawn("clone_product") / drawn("clone_square"), drawn("sign_product") / drawn("sign_square")
        return {
            "q": (("law", "step", "band", "bound"), packed(q)),
            "tau": (("band", "bound"), packed(tau)),
            "speciation": (("sign", "bound"), packed(speciation)),
            "speciation_step": (("sign", "bound"), packed(np.asarray(clock.step(speciation)))),
            "speciation_gap": (("bound",), packed(speciation[:, 2] - speciation[:, 1])),
            "growth": (("step", "sign", "bound"), packed(growth)),
            "sign_q": (("step", "sign", "bound"), packed(signed / signed[:, -1:])),
            "clone": (("branch", "band", "bound"), packed(clone)),
            "clone_band": (("branch", "band", "bound"), simultaneous(clone)),
            "clone_sign": (("branch", "part", "bound"), packed(clone_sign)),
        }


def sign_shift(dataset: xr.Dataset, exact: xr.Dataset, seed: int) -> np.ndarray:
    """Correlation of clones along the pair's centres minus that of the exact denoiser from the same states and noise,
    with a simultaneous band (branch, part, 3)."""
    count = dataset.sizes["pair"]
    weights = pair_draws(seed, count)

    def correlation(source):
        parts = (np.asarray(source[name].values[:count], np.float64) for name in ("sign_product", "sign_square"))
        product, square = (np.concatenate([x.mean(0)[None], resampled_mean(x, weights)]) for x in parts)
        return product / square

    return simultaneous(correlation(dataset) - correlation(exact))


def analyse(clock: Clock, bands: Bands, sources: dict[str, xr.Dataset], seed: int) -> xr.Dataset:
    """Estimates of every source, and the theory."""
    data: dict[str, Any] = {}
    for source, dataset in sources.items():
        for name, value in estimates(dataset, clock, seed).items():
            data[f"{source}_{name}"] = value
        shift = sign_shift(dataset, sources["exact"], seed)
        data[f"{source}_clone_sign_shift"] = (("branch", "part", "bound"), shift)
    network = next(iter(sources.values()))
    energy, signs = band_theory(clock, bands), sign_theory(clock)
    branches = network.branch.values
    with jax.enable_x64(True):
        tau = oc.commitment(jnp.asarray(energy / energy[-1]), clock.log_snr, WINDOW_START).level
        kappa = jnp.asarray(signs["kappa"])
        trust = np.asarray(sign_correlation(kappa))
        known = []
        for s, (name, a) in enumerate(SIGNS):
            one = law(name)
            unit = np.asarray(one.centres[a], np.float64) / np.linalg.norm(one.centres[a])
            # the error along the centre: within-cluster parts are independent, the sign's part adds in amplitude
            share = clock.sigma[:, None] ** 2 / (np.asarray(one.variance) + clock.sigma[:, None] ** 2)
            m = np.asarray(one.centres[a], np.float64)
            error = (unit**2 * np.asarray(one.variance) * share).sum(-1)
            error = error + (unit * m * share).sum(-1) ** 2 * (1 - trust[:, s])
            total = (unit**2 * np.asarray(one.variance)).sum() + (unit * m).sum() ** 2
            known.append(1 - error / total)
    steps = clock.step(signs["level"])
    data |= {
        "theory_q": (("step", "band"), energy / energy[-1]),
        "theory_tau": (("band",), np.asarray(tau)),
        "theory_speciation": (("sign",), signs["level"]),
        "theory_speciation_step": (("sign",), np.asarray(steps)),
        "theory_growth": (("step", "sign"), signs["growth"]),
        "theory_sign_q": (("step", "sign"), np.stack(known, -1)),
        "theory_clone": (("branch", "band"), clone_theory(clock, bands, branches)),
        "theory_clone_sign": (("branch", "part"), np.stack(known, -1)[branches, 1:]),
    }
    shared = ("law", "sign", "part", "step", "ell", "band", "radius", "branch", "branch_ell")
    coords = {name: network[name] for name in shared}
    return xr.Dataset(data, coords={**coords, "bound": ["estimate", "low", "high"]})


def check_trained_on(weights: str) -> None:
    """Raises ValueError unless the model was trained on these very laws."""
    manifest = load_manifest(model_folder(weights))
    if (manifest.get("data") or {}) != json.loads(json.dumps(SolvableData().preparation())):
        raise ValueError(f"{weights} was not trained on these laws; train one with `syncgap train solvable --size 8`")


def solvable(
    config: SolvableConfig, out: str | Path, *, resume: bool = False, command: str = "", progress: bool = True
) -> Path:
    """Runs the study and writes its folder; see `experiments.study.Study`.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: weights that were not trained on these laws; settings that do not fit; a folder that is taken.
    """
    started = time.perf_counter()
    check_trained_on(config.weights)
    study = Study("solvable", config, out, resume=resume, command=command, progress=progress)
    clock, model = study.clock, study.subject.model
    branches = branch_steps(clock, config.branches)
    instrument = SolvableInstrument(clock, study.bands, branches, config.seed)
    coords = {
        "law": list(NAMES),
        "sign": list(SIGN_NAMES),
        "part": ["common", "difference"],
        "branch": branches,
        "branch_ell": ("branch", clock.log_snr[branches]),
    }
    on_network = jax.jit(lambda model, pairs: instrument.measure(network_denoiser(model, clock), pairs))
    on_exact = jax.jit(lambda pairs: instrument.measure(exact_denoiser(clock), pairs))
    subjects: dict[str, tuple[Callable[[jax.Array], Any], int]] = {
        "network": (lambda pairs: on_network(model, pairs), config.pairs),
        "exact": (on_exact, config.pairs),
    }
    untrained: DiT = study.subject.untrained(config.seed)
    subjects["untrained"] = (lambda pairs: on_network(untrained, pairs), config.untrained_pairs)

    def measured_on(run: Callable[[jax.Array], Any]) -> Measure:
        return lambda pairs, labels: run(jnp.asarray(pairs))

    sources = {
        name: study.measure(name, VARIABLES, coords, count, measured_on(run)) for name, (run, count) in subjects.items()
    }
    measured = time.perf_counter()
    analysis = analyse(clock, study.bands, sources, config.seed)
    study.run.put("analysis", analysis)
    timings = {"measuring_s": round(measured - started, 1), "analysis_s": round(time.perf_counter() - measured, 1)}
    return report(study.run, timings)
