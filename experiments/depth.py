"""Where in depth do bands commit? The residual stream after every block, read in three ways by one estimator.

*raw*: energies of the common and the difference mode over the token grid. *readout*: the final layer applied to the
stream, made into a denoised image. *probe*: what share of the pair's final outcome is linearly decodable there, fitted
on other pairs. See docs/theory.md, section 8.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.diffusion import denoised_at, network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import run_pairs
from experiments.analysis import WINDOW_START
from experiments.depth_report import LAST, report
from experiments.measure import shuffled_bands
from experiments.probe import FOLDS, SEED_OFFSET, Probe, stream_modes, token_bands
from experiments.study import Study, StudyConfig, pair_draws, resampled_mean, with_interval
from ou_theory import estimator as oc
from ou_theory.modes import band_mean, pair_modes


@dataclass(frozen=True)
class DepthConfig(StudyConfig):
    """Read commitment off the residual stream after every block: is the gap made in the last layers?"""

    couplings: tuple[float, ...] = (0.0, 0.2, 1.0)
    probe_pairs: int = 96  # pairs on which the probe is fitted and scored; 0 leaves it out
    probe_levels: int = 12  # sampler steps at which it is, evenly spaced in log-SNR
    probe_features: int = 128  # wider streams are projected at random to that many features

    def __post_init__(self) -> None:
        super().__post_init__()
        grid = np.asarray(self.couplings, np.float64)
        if grid.size < 2 or grid[0] != 0 or not np.all(np.diff(grid) > 0) or not np.isfinite(grid[-1]):
            raise ValueError(f"couplings must start at 0, the reference, and increase, got {self.couplings}")
        if self.probe_pairs and self.probe_pairs < 2 * FOLDS:
            raise ValueError(f"probe_pairs must be 0 or at least {2 * FOLDS}, got {self.probe_pairs}")
        if self.probe_levels < 4:
            raise ValueError(f"probe_levels must be at least 4, got {self.probe_levels}")


class DepthInstrument:
    """The jitted measurements, compiled once per network shape."""

    def __init__(self, study: Study, config: DepthConfig):
        self.study, self.config = study, config
        model = study.subject.model.config
        self.tokens = token_bands(model.input_size // model.patch_size)
        self.shuffled = shuffled_bands(study.bands, config.seed)
        self.shuffled_tokens = shuffled_bands(self.tokens, config.seed)
        self._energies = jax.jit(self._run_energies)

    def energies(self, model: DiT, pairs: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
        """Energies of a block of pairs, with pairs in front; see `VARIABLES`."""
        return self._energies(model, jnp.asarray(self.config.couplings, jnp.float32), pairs, labels)

    def _run_energies(self, model: DiT, couplings, pairs, labels):
        clock, bands = self.study.clock, self.study.bands
        shape = self.study.subject.image_shape

        def raw(stream):  # (2, N, T, D) -> (N, B', 3): common, difference, difference in shuffled bands
            common, difference = (jnp.square(mode) for mode in stream_modes(stream))
            parts = (common, self.tokens), (difference, self.tokens), (difference, self.shuffled_tokens)
            return jnp.stack([band_mean(squares, bands) for squares, bands in parts], -1)

        def tap(layer, activations):
            before = activations["resid_pre"]
            return {
                "before": raw(before),
                "after": raw(activations["resid_post"]),
                "readout": model.readout(before, activations["conditioning"])[..., : shape[-1]],
            }

        def observe(step, x, denoised, taps):
            def to_grid(readout):  # (R, P * C, ...) -> (R, C, P, ...)
                return readout.reshape(2, x.shape[2], x.shape[1], *readout.shape[2:]).swapaxes(1, 2)

            def difference(readout):  # (C, P, B) twice
                out = to_grid(readout).astype(x.dtype)
                squares = jnp.square(pair_modes(denoised_at(clock, step, x, out, model.config.prediction))[1])
                return jnp.stack([band_mean(squares, bands), band_mean(squares, self.shuffled)], -1)

            end = jnp.square(pair_modes(denoised)[1])
            end = jnp.stack([band_mean(end, bands), band_mean(end, self.shuffled)], -1)
            stream = jnp.concatenate([taps["before"][:1], taps["after"]])
            stream = stream.reshape(stream.shape[0], x.shape[2], x.shape[1], *stream.shape[2:])
            return {
                "raw": stream.swapaxes(1, 2),
                "readout": jnp.concatenate([jax.lax.map(difference, taps["readout"]), end[None]]),
            }

        def coupled(gate):
            return network_denoiser(model, clock, gate, kind=self.config.gate, tap=tap)

        _, kept = run_pairs(coupled, clock, couplings, pairs, labels, shape, seed=self.config.seed, observe=observe)
        # (K, layer, C, P, band, kind) -> (P, C, layer, K, band, kind)
        found = {name: jnp.transpose(value, (3, 2, 1, 0, 4, 5)) for name, value in kept.items()}
        return {
            "raw": found["raw"][..., :2],
            "raw_shuffled": found["raw"][..., 2],
            "readout": found["readout"][..., 0],
            "readout_shuffled": found["readout"][..., 1],
        }


VARIABLES = {
    "raw": (
        ("coupling", "layer", "step", "token_band", "parity"),
        "mean square per token coefficient and feature of the residual stream's mode",
    ),
    "raw_shuffled": (
        ("coupling", "layer", "step", "token_band"),
        "the same of the difference mode, coefficients in random bands",
    ),
    "readout": (
        ("coupling", "layer", "step", "band"),
        "mean square per DCT coefficient of the difference of what the final layer reads off the stream, denoised",
    ),
    "readout_shuffled": (("coupling", "layer", "step", "band"), "the same, coefficients in random bands"),
}


def readings(energy: np.ndarray, ell: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Commitment by layer from difference energies (P, C, layer, K, B), with bootstrap draws in front of the estimate.

    Every layer is its own reference: its energy at the last step without coupling.

    Returns:
      level, decided (1 + draws, C, layer, B) and gap (1 + draws, C, layer); the first row is the estimate.
    """
    mean = np.concatenate([np.asarray(energy, np.float64).mean(0)[None], resampled_mean(energy, weights)])
    q = mean / mean[:, :1, :, -1:, :]
    return levels_of(q, ell, WINDOW_START)


def probe_readings(error: np.ndarray, total: np.ndarray, ell: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """The same from the probe's scores (C, P, layer, level, B): R2, not below 0, in the place of relative energy."""
    error, total = np.moveaxis(error, 1, 0), np.moveaxis(total, 1, 0)
    error, total = (np.concatenate([x.mean(0)[None], resampled_mean(x, weights)]) for x in (error, total))
    r2 = 1 - error / total
    return {**levels_of(np.clip(r2, 0, 1), ell, None), "r2": r2}


def levels_of(q: np.ndarray, ell: np.ndarray, start: float | None) -> dict[str, np.ndarray]:
    with jax.enable_x64(True):
        found = oc.commitment(jnp.asarray(q), ell, start)
        gap = np.asarray(oc.gap(found.level))
    return {"level": np.asarray(found.level), "decided": np.asarray(found.decided), "gap": gap}


def localisation(gap: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How late in depth a gap (..., layer) is made; layer 0 is the embedding.

    Returns:
      share: of the final gap, made in the last fifth of the layers.
      half: depth in [0, 1] beyond which it stays above half of its final value. NaN, both, where that is 0.
    """
    layers = gap.shape[-1] - 1
    depth = np.arange(layers + 1) / layers
    final = gap[..., -1]
    before = np.apply_along_axis(lambda row: np.interp(1 - LAST, depth, row), -1, gap)
    final = np.where(final == 0, np.nan, final)
    share = 1 - before / final
    relative = gap / final[..., None] - 0.5
    below = relative < 0
    last = layers - np.argmax(below[..., ::-1], -1)  # the last layer below half
    low = np.take_along_axis(relative, last[..., None], -1)[..., 0]
    high = np.take_along_axis(relative, np.minimum(last + 1, layers)[..., None], -1)[..., 0]
    with np.errstate(invalid="ignore", divide="ignore"):
        half = (last + np.where(high > low, -low / (high - low), 1)) / layers
    return share, np.where(np.isnan(final), np.nan, np.where(below.any(-1), half, 0.0))


def analyse(study: Study, sources: dict[str, xr.Dataset], probes: dict[str, xr.Dataset]) -> xr.Dataset:
    """Commitment, gaps and localisation per source, reading and layer, with 95 % intervals.

    Sources are ``network`` and ``untrained``; readings ``raw``, ``readout``, their shuffled controls, and ``probe``.
    """
    seed, ell = study.config.seed, study.clock.log_snr
    data: dict[str, Any] = {}
    coords: dict[str, Any] = {"bound": ["estimate", "low", "high"]}
    for source, dataset in sources.items():
        weights = pair_draws(seed, dataset.sizes["pair"])
        energies = {
            "raw": dataset.raw.sel(parity="difference").values,
            "raw_shuffled": dataset.raw_shuffled.values,
            "readout": dataset.readout.values,
            "readout_shuffled": dataset.readout_shuffled.values,
        }
        for reading, energy in energies.items():
            band = "token_band" if reading.startswith("raw") else "band"
            _fill(data, source, reading, readings(energy, ell, weights), band)
        coords |= {
            name: dataset[name] for name in ("coupling", "layer", "band", "radius", "token_band", "token_radius")
        }
    for source, dataset in probes.items():
        weights = pair_draws(seed + SEED_OFFSET, dataset.sizes["pair"])
        levels = dataset.level_ell.values
        shuffled = dataset.error_shuffled.expand_dims("layer", 2).values, dataset.total.isel(layer=[-1]).values
        for reading, scores in (("probe", (dataset.error.values, dataset.total.values)), ("probe_shuffled", shuffled)):
            found = probe_readings(*scores, levels, weights)
            layer = "layer" if reading == "probe" else "last_layer"
            _fill(data, source, reading, found, "probe_band", "probe_coupling", layer)
            dims = ("probe_coupling", layer, "level", "probe_band", "bound")
            data[f"{source}_{reading}_r2"] = (dims, with_interval(found["r2"][0], found["r2"][1:]))
        coords |= {name: dataset[name] for name in ("probe_band", "level", "level_ell")}
        coords["probe_coupling"] = dataset.coupling.values
    return xr.Dataset(data, coords=coords)


def _fill(data, source, reading, found, band, coupling="coupling", layer="layer") -> None:
    """Adds a reading's levels and gaps, and the localisation of its uncoupled gap, to the variables of a dataset."""
    name = f"{source}_{reading}"
    gap = found["gap"]
    data[f"{name}_tau"] = ((coupling, layer, band, "bound"), with_interval(found["level"][0], found["level"][1:]))
    data[f"{name}_gap"] = ((coupling, layer, "bound"), with_interval(gap[0], gap[1:]))
    if layer == "layer":
        for what, values in zip(("share", "half"), localisation(gap[:, 0]), strict=True):
            data[f"{name}_{what}"] = (("bound",), with_interval(values[0], values[1:]))


def depth(
    config: DepthConfig, out: str | Path, *, resume: bool = False, command: str = "", progress: bool = True
) -> Path:
    """Runs the study and writes its folder; see `experiments.study.Study`.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: settings that do not fit the weights; an output folder that holds another run.
    """
    started = time.perf_counter()
    study = Study("depth", config, out, resume=resume, command=command, progress=progress)
    instrument = DepthInstrument(study, config)
    probe = Probe(study, config.probe_levels, config.probe_features)
    untrained = study.subject.untrained(config.seed)
    subjects = (("network", study.subject.model, config.pairs), ("untrained", untrained, config.untrained_pairs))
    coords = {
        "coupling": np.asarray(config.couplings),
        "layer": np.arange(study.subject.model.config.depth + 1),
        "parity": ["common", "difference"],
        "token_band": np.arange(len(instrument.tokens)),
        "token_radius": ("token_band", instrument.tokens.radius),
    }
    sources, probes = {}, {}
    for name, model, pairs in subjects:
        sources[name] = study.measure(
            name, VARIABLES, coords, pairs, lambda pairs, labels, model=model: instrument.energies(model, pairs, labels)
        )
        if config.probe_pairs:
            few = config.probe_pairs if name == "network" else max(2 * FOLDS, config.probe_pairs // 3)
            probes[name] = probe.scores(model, f"probe_{name}", (0.0, config.couplings[-1]), few)
    measured = time.perf_counter()
    analysis = analyse(study, sources, probes)
    study.run.put("analysis", analysis)
    timings = {"measuring_s": round(measured - started, 1), "analysis_s": round(time.perf_counter() - measured, 1)}
    return report(study.run, timings)
