"""The main question: when does each frequency band commit, and what does coupling do to that, beside the theory?

Runs replica pairs of a DiT over a grid of couplings, an untrained network and an exact denoiser through the same
instrument, stores what was measured, and turns it into estimates, claims, figures and a report.
"""

import time
from dataclasses import asdict, dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from tqdm import tqdm

from dit_jax.attention import GATE_KINDS, GateKind
from dit_jax.config import DiTConfig
from dit_jax.diffusion import GuidedChannels, GuidedCoupling, Sampler
from dit_jax.images import to_pixels
from dit_jax.model import DiT
from dit_jax.replicas import CoupledDenoiser, pair_labels
from dit_jax.sharding import Parameters, make_mesh, place_model, place_pairs, split_batch
from experiments.analysis import analyse
from experiments.claims import claims
from experiments.figures import save_figures
from experiments.measure import coupled_network, coupled_wiener, one_pass, shuffled_bands, trajectories
from experiments.report import write_report
from experiments.store import RunFolder
from experiments.study import DEFAULT_WEIGHTS, NUM_BANDS, Dtype, load_subject
from ou_theory.clock import Clock, make_clock
from ou_theory.modes import Bands, radial_bands

PICTURED_PAIRS = 6


@dataclass(frozen=True)
class CompareConfig:
    """Settings of a run; together with the weights they fix its numbers."""

    weights: str = DEFAULT_WEIGHTS  # a converted DiT (folder), or the name of a shipped model
    couplings: tuple[float, ...] = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0)
    pairs: int = 64
    steps: str = "50"  # sampler steps, for example 50, 250 or ddim50
    sampler: Sampler = "ddim"
    gate: GateKind = "joint"
    guidance: float = 1.0
    guided_channels: GuidedChannels = "all"
    guided_coupling: GuidedCoupling = "both"  # halves of the guided batch that the gate couples
    classes: tuple[int, ...] | None = None  # labels that the pairs take in turn; all classes by default
    seed: int = 0
    block: int = 4  # pairs that run together; what an interruption may lose
    gain_pairs: int = 32  # pairs on which the one-pass gain is measured
    untrained_pairs: int = 16
    parameters: Parameters = "replicated"  # on several devices: whole on each, or sharded over them
    dtype: Dtype | None = None  # of activations and parameters; the stored one by default

    def __post_init__(self) -> None:
        couplings = np.asarray(self.couplings, np.float64)
        if not couplings.size or not np.all(np.isfinite(couplings)) or np.any(couplings < 0):
            raise ValueError(f"couplings must be finite and >= 0, got {self.couplings}")
        if np.unique(couplings).size < 2 or 0 not in couplings:
            raise ValueError(f"couplings must hold 0, the reference, and at least one more value, got {self.couplings}")
        if self.block < 1:
            raise ValueError(f"block must be at least 1, got {self.block}")
        for name in ("pairs", "gain_pairs", "untrained_pairs"):
            if getattr(self, name) < 2:
                raise ValueError(f"{name} must be at least 2: intervals come from resampling pairs")
        if self.gate not in GATE_KINDS:
            raise ValueError(f"gate {self.gate!r} is not one of {', '.join(GATE_KINDS)}")
        if not np.isfinite(self.guidance):
            raise ValueError(f"guidance must be finite, got {self.guidance}")

    @property
    def grid(self) -> np.ndarray:
        """The couplings, increasing, each once, (C,) float32."""
        return np.unique(np.asarray(self.couplings, np.float32))


class Instrument:
    """The jitted measurements of one kind of subject, compiled once per shape for the whole grid of couplings. With
    several devices, the pairs of a block are split over them."""

    def __init__(self, config: CompareConfig, model_config: DiTConfig, clock: Clock, bands: Bands):
        self.config, self.clock, self.bands = config, clock, bands
        self.shuffled = shuffled_bands(bands, config.seed)
        self.mesh = make_mesh(jax.local_devices()) if jax.local_device_count() > 1 else None
        if self.mesh is not None and config.block % self.mesh.size:
            raise ValueError(
                f"blocks of {config.block} pairs cannot be split over {self.mesh.size} devices: "
                f"give --block {self.mesh.size} or a multiple of it"
            )
        self.shape = (model_config.input_size, model_config.input_size, model_config.in_channels)
        self._network_run = jax.jit(lambda model, *args: self._run(self._coupled(model), *args))
        self._network_gain = jax.jit(
            lambda model, couplings, states, labels: one_pass(
                self._coupled(model), clock, bands, couplings, states, labels
            )
        )
        self._wiener_run = jax.jit(lambda variance, *args: self._run(coupled_wiener(variance, clock), *args))

    def _coupled(self, model: DiT) -> CoupledDenoiser:
        c = self.config
        coupled = coupled_network(model, self.clock, c.gate, c.guidance, c.guided_channels, c.guided_coupling)
        return coupled if self.mesh is None else split_batch(self.mesh, coupled)

    def place(self, model: DiT) -> DiT:
        """The model where the instrument runs it."""
        return model if self.mesh is None else place_model(model, self.mesh, self.config.parameters)

    def _run(self, coupled: CoupledDenoiser, couplings, pairs, labels):
        return trajectories(
            coupled,
            self.clock,
            self.bands,
            self.shuffled,
            couplings,
            pairs,
            labels,
            self.shape,
            seed=self.config.seed,
            sampler=self.config.sampler,
        )

    def network(self, model: DiT, couplings, pairs, labels, with_gain: bool) -> dict[str, np.ndarray]:
        """Measurements of a block of pairs on a network, with the one-pass gain if asked for."""
        if self.mesh is not None and len(pairs) % self.mesh.size == 0:  # the last block may be smaller
            pairs, labels = place_pairs(self.mesh, pairs, labels)
        found = dict(self._network_run(model, couplings, pairs, labels))
        states = found.pop("states")
        energy = found["energy"][..., 1]
        gains = jnp.full(energy.shape, jnp.nan)
        if with_gain:  # at zero coupling the trajectory itself is the one pass
            gains = jnp.concatenate([energy[:1], self._network_gain(model, couplings[1:], states, labels)])
        found["one_pass_energy"] = gains
        return jax.device_get(found)

    def wiener(self, variance, couplings, pairs, labels) -> dict[str, np.ndarray]:
        """Measurements of a block of pairs on the exact denoiser of Gaussian modes of band variances (B,)."""
        found = dict(self._wiener_run(jnp.asarray(variance)[self.bands.index], couplings, pairs, labels))
        found.pop("states")
        return jax.device_get(found)


def template(config: CompareConfig, couplings: np.ndarray, pairs: int, clock: Clock, bands: Bands) -> xr.Dataset:
    """An empty dataset of measurements, with coordinates, units and definitions."""
    sizes = {"coupling": len(couplings), "pair": pairs, "step": len(clock), "band": len(bands), "parity": 2}

    def empty(*dims: str, about: str):
        return dims, np.full([sizes[d] for d in dims], np.nan, np.float32), {"long_name": about, "units": "1"}

    per_coefficient = "mean square per DCT coefficient of the denoised"
    labels = config.classes or ()
    return xr.Dataset(
        {
            "energy": empty("coupling", "pair", "step", "band", "parity", about=f"{per_coefficient} mode"),
            "energy_shuffled": empty(
                "coupling",
                "pair",
                "step",
                "band",
                about=f"{per_coefficient} difference mode, coefficients in random bands",
            ),
            "one_pass_energy": empty(
                "coupling",
                "pair",
                "step",
                "band",
                about=f"{per_coefficient} difference after one pass from the uncoupled state",
            ),
            "projection": empty(
                "coupling",
                "pair",
                "step",
                "band",
                about="inner product per coefficient of the denoised difference with its end",
            ),
            "state_energy": empty(
                "pair",
                "step",
                "band",
                about="mean square per coefficient of the uncoupled state's difference, y = x / sqrt(ab)",
            ),
        },
        coords={
            "coupling": ("coupling", couplings, {"long_name": "gate of the other replica's keys"}),
            "pair": np.arange(pairs),
            "step": ("step", np.arange(len(clock)), {"long_name": "sampler step, 0 sees pure noise"}),
            "band": np.arange(len(bands)),
            "parity": ["common", "difference"],
            "ell": ("step", clock.log_snr, {"long_name": "log-SNR", "units": "nat"}),
            "timestep": ("step", clock.timesteps),
            "radius": ("band", bands.radius, {"long_name": "radial frequency, fraction of Nyquist per axis"}),
            "count": ("band", bands.count, {"long_name": "coefficients per channel"}),
            "label": ("pair", pair_labels(np.arange(pairs), labels)),
        },
    )


def compare(
    config: CompareConfig, out: str | Path, *, resume: bool = False, command: str = "", progress: bool = True
) -> Path:
    """Runs the comparison and writes its folder.

    Args:
      config: settings.
      out: folder of the run.
      resume: go on with an interrupted run of the same settings; it ends with the same bits.
      command: how it was called, for the manifest.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: settings that do not fit the weights; an output folder that holds another run.
    """
    started = time.perf_counter()
    several = jax.local_device_count() > 1
    source, model, manifest = subject = load_subject(config.weights, config.dtype, on_host=several)
    classes = config.classes or tuple(range(model.config.num_classes))
    if any(not 0 <= c < model.config.num_classes for c in classes):
        raise ValueError(f"classes must be in 0..{model.config.num_classes - 1}, got {classes}")
    clock = make_clock(config.steps)
    size = model.config.input_size
    bands = radial_bands(size, size, NUM_BANDS)
    settings = {**asdict(config), "classes": list(classes), "couplings": [float(g) for g in config.grid]}
    extra = {"weights_digest": manifest["digest"], "model": model.config.to_dict(), "bands": NUM_BANDS}
    instrument = Instrument(config, model.config, clock, bands)
    run = RunFolder.create(out, settings, resume=resume, command=command, extra=extra)

    grid = config.grid
    few = grid[np.unique([0, len(grid) // 2, len(grid) - 1])]
    untrained = subject.untrained(config.seed)
    filled = CompareConfig(**{**asdict(config), "classes": classes})
    subjects = (
        ("network", instrument.place(model), grid, config.pairs, config.gain_pairs),
        ("untrained", instrument.place(untrained), few, min(config.untrained_pairs, config.pairs), 0),
    )
    blocks = [
        (group, subject, couplings, np.arange(first, min(first + config.block, pairs)), first < gain_pairs)
        for group, subject, couplings, pairs, gain_pairs in subjects
        for first in range(0, pairs, config.block)
    ]
    for group, _, couplings, pairs, _ in subjects:
        run.declare(group, template(filled, couplings, pairs, clock, bands), chunk=config.block)
    total = sum(_images(config, len(couplings), len(pairs), gain) for _, _, couplings, pairs, gain in blocks)
    with tqdm(total=total, unit="img", unit_scale=True, desc="sampling", disable=not progress) as bar:
        for group, subject, couplings, pairs, with_gain in blocks:
            first = int(pairs[0])
            if first not in run.finished(group):
                labels = pair_labels(pairs, classes)
                found = instrument.network(subject, jnp.asarray(couplings), jnp.asarray(pairs), labels, with_gain)
                samples = found.pop("sample")
                if group == "network" and first == 0:
                    run.put("pictures", _pictures(samples, grid, labels, manifest))
                run.write(group, _block(found, pairs), first)
            bar.update(_images(config, len(couplings), len(pairs), with_gain))
    network = run.load("network")
    variance = network.energy.sel(parity="difference").isel(coupling=0, step=-1).mean("pair").values.astype(np.float64)
    pairs = np.arange(config.pairs)
    found = instrument.wiener(variance, jnp.asarray(grid), jnp.asarray(pairs), pair_labels(pairs, classes))
    found.pop("sample")
    exact = template(filled, grid, config.pairs, clock, bands).drop_vars("one_pass_energy")
    run.put("wiener", exact.assign(_block(found, pairs).data_vars).assign(variance=("band", variance)))
    sampled = time.perf_counter()

    eta = 0.0 if config.sampler == "ddim" else 1.0
    analysis, drawn = analyse(clock, network, run.load("untrained"), run.load("wiener"), eta=eta, seed=config.seed)
    analysis.attrs.update(
        model=source,
        prediction=model.config.prediction,
        sampler=config.sampler,
        gate=config.gate,
        guidance=config.guidance,
        seed=config.seed,
    )
    run.put("analysis", analysis)
    run.write_json("claims.json", {"claims": claims(analysis, drawn)})
    run.finish({"sampling_s": round(sampled - started, 1), "analysis_s": round(time.perf_counter() - sampled, 1)})
    save_figures(run)
    return write_report(run)


def _block(found: dict[str, np.ndarray], pairs: np.ndarray) -> xr.Dataset:
    dims = {
        "energy": ("coupling", "pair", "step", "band", "parity"),
        "energy_shuffled": ("coupling", "pair", "step", "band"),
        "one_pass_energy": ("coupling", "pair", "step", "band"),
        "projection": ("coupling", "pair", "step", "band"),
        "state_energy": ("pair", "step", "band"),
    }
    return xr.Dataset({name: (dims[name], values) for name, values in found.items()}, coords={"pair": pairs})


def _images(config: CompareConfig, couplings: int, pairs: int, with_gain: bool) -> int:
    """Images that the network denoises for a block of pairs."""
    doubled = 2 if config.guidance != 1 else 1
    passes = couplings + (couplings - 1 if with_gain else 0)
    return 2 * doubled * pairs * passes * len(make_clock(config.steps))


def _pictures(samples: np.ndarray, grid: np.ndarray, labels: np.ndarray, manifest: dict) -> xr.Dataset:
    """8-bit pictures (coupling, pair, replica, y, x, rgb) of the first pairs at the first and the last coupling."""
    chosen = np.moveaxis(samples[:, [0, -1], :PICTURED_PAIRS, :, :, :3], 0, 2)
    data = manifest.get("data") or {}
    if "mean" in data:
        pixels = to_pixels(chosen, data["mean"], data["std"])
        preview = "pixels"
    else:
        spread = np.abs(chosen).max() or 1.0
        pixels = np.round(np.clip(chosen / spread + 1, 0, 2) * 127.5).astype(np.uint8)
        preview = "first three latent channels"
    names = data.get("class_names")
    shown = [names[label] if names else f"class {label}" for label in labels[: chosen.shape[1]]]
    if pixels.shape[-1] < 3:
        pixels = np.repeat(pixels[..., :1], 3, -1)
    return xr.Dataset(
        {"image": (("coupling", "pair", "replica", "y", "x", "rgb"), pixels)},
        coords={"coupling": grid[[0, -1]], "label_name": ("pair", shown)},
        attrs={"preview": preview},
    )
