"""Three measurements of one quantity: how much of an image a state has decided (docs/theory.md, sections 4.1 and 11.1).

Along the ancestral sampler without coupling: the spread of what is predicted from independent states, the correlation
of clones that branch from one state, and the error of predicting the sampler's own images from noise. They are one
curve if the denoiser is the posterior mean of its own sampler's law. Finite steps alone set them apart, by what an
exact Gaussian denoiser of the same variances and step noise loses; that is known (`step_theory`) and taken off.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.diffusion import Denoiser, DenoiserOutput, ancestral_step, network_denoiser
from dit_jax.objective import posterior_tables
from dit_jax.replicas import pair_noise, run_pairs
from experiments.analysis import LOW, guarded_start
from experiments.cloning_report import CONTRASTS, MEASURES, report
from experiments.solvable import branch_steps
from experiments.study import Study, StudyConfig, pair_draws, resampled_mean, with_interval
from ou_theory import estimator as oc
from ou_theory.clock import Clock, make_clock
from ou_theory.modes import Bands, band_mean, dct2, idct2, pair_modes

# added to the seed: noise of the images that are predicted again; noise after branching, one seed per branch step
NOISE_SEED, CLONE_SEED = 1, 2


@dataclass(frozen=True)
class CloningConfig(StudyConfig):
    """Is what a state has decided the same by spread of predictions, by clones, and by error of one prediction?"""

    branches: int = 8  # steps at which clones branch, evenly spaced in log-SNR, at most
    pairs: int = 32
    block: int = 8
    untrained_pairs: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.branches < 3:
            raise ValueError(f"branches must be at least 3, got {self.branches}")
        if inner_branches(make_clock(self.steps), self.branches).size < 2:
            raise ValueError(f"steps {self.steps!r}: fewer than two of them leave clones anything to differ by")


def inner_branches(clock: Clock, count: int) -> np.ndarray:
    """`branch_steps` but for the last step: nothing random follows it, and all three measurements are 1 or nearly."""
    steps = branch_steps(clock, count)
    return steps[steps < len(clock) - 1]


def clone_ends(denoise: Denoiser, clock: Clock, states, branch, labels, noise) -> jax.Array:
    """Ends (2, P, H, W, C) of states of the step `branch`, which may be traced, under ``noise(step)`` from there on."""
    update = ancestral_step(clock)

    def body(step, x):
        return update(step, x, denoise(x, step, labels), noise(step))

    return jax.lax.fori_loop(branch, len(clock), body, states)


def measure(
    denoise: Denoiser, clock: Clock, bands: Bands, branches: np.ndarray, pairs, labels, shape, *, seed: int
) -> dict[str, jax.Array]:
    """All measurements of a block of pairs (P,), pairs in front; see `variables`."""
    low, high = (jnp.asarray(table, jnp.float32) for table in posterior_tables(clock)[2:])

    def revealed(x, step, labels):
        found = denoise(x, step, labels)
        return found._replace(taps=jnp.zeros_like(x) if found.fraction is None else found.fraction)

    def observe(step, x, denoised, fraction):
        variance = jnp.exp(fraction * high[step] + (1 - fraction) * low[step])
        energy = band_mean(jnp.square(pair_modes(denoised[:, 0])[1]), bands)
        return energy, variance.mean((0, 2, 3, 4)), x[:, 0]

    ends, (energy, noise_variance, states) = run_pairs(
        lambda gate: revealed,
        clock,
        jnp.zeros(1),
        pairs,
        labels,
        shape,
        seed=seed,
        sampler="ancestral",
        observe=observe,
    )
    ends = ends[:, 0]
    outcome = pair_modes(ends)[1]

    def clones(inputs):
        branch, state = inputs

        def noise(step):  # branches do not share noise: their errors are independent
            return pair_noise(seed + CLONE_SEED + branch, pairs, step, shape)

        again = pair_modes(clone_ends(denoise, clock, state, branch, labels, noise))[1]
        return {
            "clone_product": band_mean(outcome * again, bands),
            "clone_square": band_mean(jnp.square(again), bands),
        }

    def predict(step):
        signal = jnp.asarray(clock.alpha_bar**0.5, ends.dtype)[step]
        spread = jnp.asarray((1 - clock.alpha_bar) ** 0.5, ends.dtype)[step]
        noisy = signal * ends + spread * pair_noise(seed + NOISE_SEED, pairs, step, shape)
        found = denoise(noisy, step, labels).denoised
        error, difference = jnp.square(dct2(found - ends)), pair_modes(found)[1]
        return {
            "error": band_mean(error, bands).mean(0),
            "spread": band_mean(jnp.square(difference), bands),
            "aligned": band_mean(difference * outcome, bands),
        }

    found = {"energy": energy, "noise": noise_variance, **jax.lax.map(predict, jnp.arange(len(clock)))}
    found |= jax.lax.map(clones, (jnp.asarray(branches), states[branches]))
    averaging = jnp.asarray(bands.averaging, ends.dtype)
    covariance = jnp.einsum("phwc,phwd,hwb->pbcd", outcome, outcome, averaging, precision="highest")
    return {**{name: value.swapaxes(0, 1) for name, value in found.items()}, "covariance": covariance}


def variables() -> dict[str, tuple[tuple[str, ...], str]]:
    """What is stored per pair. Difference modes are ``(A - B) / sqrt(2)``: their mean squares are variances."""
    return {
        "energy": (("step", "band"), "mean square per coefficient of the difference of what the sampler predicts"),
        "noise": (("step",), "variance of the noise that the sampler adds, mean over pixels; unused in the last step"),
        "clone_product": (("branch", "band"), "product of the ends' difference and that of clones from the branch on"),
        "clone_square": (("branch", "band"), "mean square of the difference of the clones' ends"),
        "error": (("step", "band"), "mean square error of predicting the ends after noise was put on them"),
        "spread": (("step", "band"), "mean square of the difference of these predictions"),
        "aligned": (("step", "band"), "product of that difference and the ends' own"),
        "covariance": (("band", "channel", "other"), "products of channels of the ends' difference, per coefficient"),
    }


# --- the exact Gaussian denoiser: closed forms under the sampler's finite steps


def step_maps(clock: Clock, noise: np.ndarray, variance: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wiener gains (K, ...), factors of the steps (K, ...) and variances of the states (K + 1, ...), rescaled frame, of
    Gaussian modes (...) under an ancestral sampler that adds noise of the variances `noise` (K,)."""
    added = noise / clock.alpha_bar_next
    added[-1] = 0
    ratio = np.append(clock.sigma[1:] / clock.sigma[:-1], 0) ** 2
    gains, factors, states = [], [], [np.full(np.shape(variance), 1 / clock.alpha_bar[0])]
    for k, sigma in enumerate(clock.sigma):
        gains.append(variance / (variance + sigma**2))
        factors.append(ratio[k] + (1 - ratio[k]) * gains[-1])
        states.append(factors[-1] ** 2 * states[-1] + added[k])
    return np.stack(gains), np.stack(factors), np.stack(states)


def matched_variance(clock: Clock, noise: np.ndarray, end: np.ndarray) -> np.ndarray:
    """Variances of Gaussian modes whose exact denoiser, under this sampler, ends with the variances `end` (...): finite
    steps do not keep them."""
    grid = np.geomspace(1e-8, 1e8, 6401)
    ends = step_maps(clock, noise, grid)[2][-1]
    return np.exp(np.interp(np.log(np.maximum(end, 1e-12)), np.log(ends), np.log(grid)))


def step_theory(clock: Clock, noise: np.ndarray, covariance: np.ndarray) -> dict[str, np.ndarray]:
    """The measurements, exact, of the Gaussian law that ends with these covariances of channels (..., B, C, C) under a
    sampler with this step noise (K,).

    Returns:
      q, clones, mmse: the three curves (..., K, B); equal but for the steps' size.
      spread, aligned: variance of predictions from noised ends, and covariance with them, over the ends' variance.
      linear: ``1 - error / variance`` (..., K, B) of the ends' best linear filter, below 1 - mmse / Var of any law.
      kept: (..., B) the ends' variance as a share of that of the law.
    """
    end = np.maximum(np.linalg.eigvalsh(covariance), 1e-12)
    law = matched_variance(clock, noise, end)
    gain, factor, state = step_maps(clock, noise, law)
    sigma2 = clock.sigma.reshape(-1, *(1,) * end.ndim) ** 2
    to_end = np.cumprod(factor[::-1] ** 2, 0)[::-1]
    shares = {
        "q": gain**2 * state[:-1],
        "clones": to_end * state[:-1],
        "mmse": end - (1 - gain) ** 2 * end - gain**2 * sigma2,
        "spread": gain**2 * (end + sigma2),
        "aligned": gain * end,
        "linear": end**2 / (end + sigma2),
    }
    total = end.sum(-1)
    found = {name: np.moveaxis(value.sum(-1) / total, 0, -2) for name, value in shares.items()}
    return {**found, "kept": total / law.sum(-1)}


def gaussian_filters(clock: Clock, noise: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """Exact denoisers (K, B, C, C) of the Gaussian law of `step_theory`, as matrices over channels."""
    values, vectors = np.linalg.eigh(covariance)
    law = matched_variance(clock, noise, values)
    gain = law / (law + clock.sigma[:, None, None] ** 2)
    return np.einsum("bci,kbi,bdi->kbcd", vectors, gain, vectors)


def gaussian_denoiser(clock: Clock, bands: Bands, filters: jax.Array, noise: jax.Array) -> Denoiser:
    """The denoiser of channel filters (K, B, C, C) by band, for images of mean 0, with this step noise (K,)."""
    low, high = (jnp.asarray(table, jnp.float32) for table in posterior_tables(clock)[2:])
    fraction = (jnp.log(noise) - low) / (high - low)

    def denoise(x: jax.Array, step: jax.Array, labels: jax.Array) -> DenoiserOutput:
        y = dct2(x * jnp.asarray(clock.alpha_bar**-0.5, x.dtype)[step])
        denoised = jnp.einsum("...hwc,hwcd->...hwd", y, filters[step][bands.index], precision="highest")
        return DenoiserOutput(idct2(denoised), jnp.broadcast_to(fraction[step], x.shape))

    return denoise


# --- estimates


def mean_square(values: np.ndarray, pairs: int) -> np.ndarray:
    """Mean square (3,) of differences (1 + draws, ...) over all points, with interval, free of their noise.

    The square of an estimate is too large by its variance, that of a resampled one by twice as much; the draws tell the
    variance. Negative values are noise around 0.
    """
    noise = float(values[1:].var(0).mean()) * pairs / (pairs - 1)
    squares = np.square(values).reshape(len(values), -1).mean(1)
    return with_interval(squares[0] - noise, squares[1:] - 2 * noise)


def estimates(dataset: xr.Dataset, clock: Clock, seed: int) -> dict[str, tuple[tuple[str, ...], np.ndarray]]:
    """All estimates of one source, intervals in the last axis, from one draw of pairs; levels in nats.

    What is averaged over bands leaves out DC, three coefficients whose noise would drown the rest.
    """
    pairs, branches, ell = dataset.sizes["pair"], dataset.branch.values, clock.log_snr
    weights = pair_draws(seed, pairs)

    def drawn(name):
        values = np.asarray(dataset[name].values, np.float64)
        return np.concatenate([values.mean(0)[None], resampled_mean(values, weights)])

    def packed(values):
        return with_interval(values[0], values[1:])

    def packed_each(values):
        return np.stack([packed(value) for value in values])

    covariance = drawn("covariance")
    variance = np.trace(covariance, axis1=-2, axis2=-1) / covariance.shape[-1]
    step_noise = np.asarray(dataset.noise.values, np.float64).mean(0)  # its own spread does not matter
    theory = step_theory(clock, step_noise, covariance)
    q, error, spread, aligned = (drawn(name) / variance[:, None] for name in ("energy", "error", "spread", "aligned"))
    clones = 2 * drawn("clone_product") / (variance[:, None] + drawn("clone_square"))
    at = {"q": q[:, branches], "clones": clones, "mmse": 1 - error[:, branches]}
    rest = {name: value - theory[name][:, branches] for name, value in at.items()}
    raw, beyond = ([curves[a] - curves[b] for a, b in CONTRASTS] for curves in (at, rest))
    steps = [(theory[a] - theory[b])[0, branches, LOW:] for a, b in CONTRASTS]
    apart = [1.5 * (rest[name] - sum(rest.values()) / 3) for name in MEASURES]  # from the mean of the other two
    undecided = q[0, branches, LOW:] < 0.5
    inside = [value[..., LOW:] for value in apart]
    where = [undecided | True, undecided, ~undecided]
    # what of mmse - Q is due to other states, to predictions that vary more than they know, to an offset of their mean
    parts = [spread - q, 2 * (aligned - spread), 1 - error - (2 * aligned - spread)]
    known = [theory["spread"] - theory["q"], 2 * (theory["aligned"] - theory["spread"]), 0.0]
    parts = [(found - exact)[:, branches, LOW:] for found, exact in zip(parts, known, strict=True)]

    grid = np.append(branches, len(clock) - 1)  # nothing is open at the last step
    ends = [np.concatenate([value, np.ones_like(value[:, :1])], 1) for value in at.values()]
    start = guarded_start(q[0], variance[0], ell)
    with jax.enable_x64(True):
        half = [np.asarray(oc.crossing(jnp.asarray(value), ell[grid], 0.5)) for value in ends]
        tau = [np.asarray(oc.commitment(jnp.clip(jnp.asarray(c), 0), ell, start).level) for c in (q, 1 - error)]
    scalar = variance[:, None] / (variance[:, None] + clock.sigma[:, None] ** 2)
    excess = [(1 - error - bound)[:, branches] for bound in (scalar, theory["linear"])]
    point, curve, band = ("branch", "band", "bound"), ("step", "band", "bound"), ("band", "bound")
    scale = np.sqrt(2 / np.pi)  # mean absolute value of unit noise
    return {
        "q": (curve, packed(q)),
        "mmse": (curve, packed(1 - error)),
        "clones": (point, packed(clones)),
        "difference": (("contrast", *point), packed_each(raw)),
        "beyond": (("contrast", *point), packed_each(beyond)),
        "absolute": (("contrast",), np.array([np.abs(v[0, :, LOW:]).mean() for v in raw])),
        "absolute_noise": (("contrast",), np.array([scale * v[1:, :, LOW:].std(0).mean() for v in raw])),
        "square": (("contrast", "bound"), np.stack([mean_square(v[..., LOW:], pairs) for v in beyond])),
        "square_raw": (("contrast", "bound"), np.stack([mean_square(v[..., LOW:], pairs) for v in raw])),
        "square_steps": (("contrast",), np.array([np.square(v).mean() for v in steps])),
        "signed": (("contrast", "bound"), packed_each([v[..., LOW:].mean((1, 2)) for v in beyond])),
        "apart": (
            ("measure", "where", "bound"),
            np.stack(
                [packed_each([v[:, w].mean(1) if w.any() else v[:, 0, 0] * np.nan for w in where]) for v in inside]
            ),
        ),
        "apart_band": (("measure", *band), packed_each([v.mean(1) for v in apart])),
        "parts": (("part", "branch", "bound"), packed_each([v.mean(2) for v in parts])),
        "parts_mean": (("part", "bound"), packed_each([v.mean((1, 2)) for v in parts])),
        "excess": (("filter", *point), packed_each(excess)),
        "excess_mean": (("filter", *band), packed_each([v.mean(1) for v in excess])),
        "tau": (("curve", *band), packed_each(tau)),
        "half": (("measure", *band), packed_each(half)),
        "snr_one": (band, packed(-np.log(variance))),
        "kept": (band, packed(theory["kept"])),
        "steps_q": (("step", "band"), theory["q"][0]),
        "steps_mmse": (("step", "band"), theory["mmse"][0]),
        "start": ((), np.asarray(start)),
    }


def analyse(clock: Clock, sources: dict[str, xr.Dataset], seed: int) -> xr.Dataset:
    """Estimates of every source, named ``<source>_<estimate>``."""
    data = {
        f"{source}_{name}": value
        for source, dataset in sources.items()
        for name, value in estimates(dataset, clock, seed).items()
    }
    one = next(iter(sources.values()))
    shared = {name: one[name] for name in ("step", "ell", "band", "radius", "branch", "branch_ell")}
    labels: dict[str, Any] = {
        "contrast": [f"{a} - {b}" for a, b in CONTRASTS],
        "measure": list(MEASURES),
        "curve": ["q", "mmse"],
        "where": ["all", "undecided", "decided"],
        "part": ["states", "calibration", "offset"],
        "filter": ["one variance", "by channel"],
        "bound": ["estimate", "low", "high"],
    }
    return xr.Dataset(data, coords={**shared, **labels})


def cloning(
    config: CloningConfig, out: str | Path, *, resume: bool = False, command: str = "", progress: bool = True
) -> Path:
    """Runs the study and writes its folder; see `experiments.study.Study`.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: settings that do not fit the weights; an output folder that holds another run.
    """
    started = time.perf_counter()
    study = Study("cloning", config, out, resume=resume, command=command, progress=progress)
    clock, bands, shape = study.clock, study.bands, study.subject.image_shape
    branches = inner_branches(clock, config.branches)
    channels = np.arange(shape[-1])
    coords = {
        "branch": branches,
        "branch_ell": ("branch", clock.log_snr[branches]),
        "channel": channels,
        "other": channels,
    }

    def run(denoise, pairs, labels):
        return measure(denoise, clock, bands, branches, pairs, labels, shape, seed=config.seed)

    on_network = jax.jit(lambda model, *which: run(network_denoiser(model, clock), *which))
    on_filters = jax.jit(lambda exact, *which: run(gaussian_denoiser(clock, bands, *exact), *which))

    def measured(name, function, subject, pairs):
        return study.measure(name, variables(), coords, pairs, lambda *which: function(subject, *which))

    sources = {"network": measured("network", on_network, study.subject.model, config.pairs)}
    found = sources["network"]
    noise, covariance = (np.asarray(found[name].values, np.float64).mean(0) for name in ("noise", "covariance"))
    exact = tuple(jnp.asarray(v, jnp.float32) for v in (gaussian_filters(clock, noise, covariance), noise))
    sources["exact"] = measured("exact", on_filters, exact, config.pairs)
    untrained = study.subject.untrained(config.seed)
    sources["untrained"] = measured("untrained", on_network, untrained, config.untrained_pairs)
    finished = time.perf_counter()
    study.run.put("analysis", analyse(clock, sources, config.seed))
    timings = {"measuring_s": round(finished - started, 1), "analysis_s": round(time.perf_counter() - finished, 1)}
    return report(study.run, timings)
