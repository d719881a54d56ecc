"""The main question: when does each frequency band commit, and what does coupling do to that, beside the theory?

Replica pairs of a DiT run over a grid of couplings; an untrained network and an exact denoiser go through the same
instrument.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.class_names import names as class_names
from dit_jax.class_names import short_name
from dit_jax.covariance import load_covariance
from dit_jax.latents import to_pictures
from dit_jax.model import DiT
from dit_jax.replicas import CoupledDenoiser, pair_labels
from dit_jax.sharding import gather
from experiments.frame.bench import Bench, Variables, one_of
from experiments.frame.eigenmodes import Eigenmodes, eigenmodes, fine_directions
from experiments.frame.exact import covariance_group
from experiments.frame.instrument import coupled_wiener, one_pass, trajectories
from experiments.frame.programs import Constant, Setup, constant
from experiments.frame.subject import model_folder
from experiments.studies.compare.modes import DataModes, data_modes
from experiments.studies.compare.settings import CompareConfig

PICTURED_PAIRS = 6
_GRID = ("coupling", "pair", "step", "band")
_PER = "mean square per DCT coefficient of the denoised"

TRAJECTORIES: Variables = {
    "energy": ((*_GRID, "parity"), f"{_PER} mode"),
    "projection": (_GRID, "inner product per coefficient of the denoised difference with its end"),
    "state_energy": (
        ("pair", "step", "band"),
        "mean square per coefficient of the uncoupled state's difference, y = x / sqrt(ab)",
    ),
}
_PLANE = ("pair", "step", "row", "column")
_MODES = ("coupling", "pair", "step", "mode")
NETWORK: Variables = {
    **TRAJECTORIES,
    "coefficient_energy": (_PLANE, "mean square over channels of the uncoupled denoised difference's coefficient"),
    "coefficient_projection": (_PLANE, "its inner product with the coefficient's end, mean over channels"),
    "one_pass_energy": (_GRID, f"{_PER} difference after one pass from the uncoupled state"),
    "mode_energy": (_MODES, "mean square over the modes of a group of that difference"),
    "mode_product": (_MODES, "its inner product with the state's difference, y = x / sqrt(ab), mean over the group"),
    "mode_state": (("pair", "step", "mode"), "mean square over the modes of a group of the state's difference"),
}
UNTRAINED: Variables = {**TRAJECTORIES, "one_pass_energy": NETWORK["one_pass_energy"]}
MORE = tuple(name for name in NETWORK if name not in TRAJECTORIES)  # of some pairs only, for time and space
DIRECTIONS: Variables = {  # in the place of those by DCT coefficient
    "coefficient_energy": (("pair", "step", "direction"), "square of the uncoupled denoised difference along it"),
    "coefficient_projection": (("pair", "step", "direction"), "its inner product with its end, along the direction"),
}


def _trajectories(
    setup: Setup, directions: Constant | None, coupled: CoupledDenoiser, couplings, pairs, labels
) -> dict[str, jax.Array]:
    return trajectories(
        coupled,
        setup.clock,
        setup.bands if directions is None else directions.value,
        couplings,
        pairs,
        labels,
        setup.image_shape,
        seed=setup.seed,
        sampler=setup.sampler,
    )


def _network_run(setup: Setup, directions: Constant | None, model: DiT, couplings, pairs, labels):
    return _trajectories(setup, directions, setup.coupled(model), couplings, pairs, labels)


def _network_gain(setup: Setup, fine: Constant | None, model: DiT, groups: Eigenmodes | None, *args):
    """`groups` are those of the DCT, which may differ between networks of one program; other modes are `fine`."""
    modes = groups if fine is None else fine.value
    assert modes is not None
    return one_pass(setup.coupled(model), setup.clock, modes, *args)


def _wiener_run(setup: Setup, directions: Constant | None, variance: jax.Array, couplings, pairs, labels):
    coupled = coupled_wiener(variance, setup.clock, setup.gate_kind, directions and directions.value)
    return _named(TRAJECTORIES, _trajectories(setup, directions, coupled, couplings, pairs, labels))


class Instrument:
    """The measurements, compiled once per shape for the whole grid of couplings."""

    def __init__(self, bench: Bench[CompareConfig]):
        self.bench, self.config = bench, bench.config
        self.covariance = load_covariance(model_folder(one_of(bench.config.weights)))
        directions = fine = None
        if bench.config.modes == "dct":
            self.data_modes, self.bands, self.variables = None, bench.bands, NETWORK
            self.modes = eigenmodes(bench.bands, bench.model.in_channels, self.covariance)
        else:
            self.data_modes = data_modes(bench.config.modes, one_of(bench.config.weights))
            self.bands, self.variables = self.data_modes.directions, {**NETWORK, **DIRECTIONS}
            self.modes = fine_directions(self.bands, self.data_modes.variance)
            arrays = (self.bands.matrix, self.bands.index)
            directions, fine = constant(self.bands, *arrays), constant(self.modes, *arrays, self.modes.averaging)
        self._network_run = bench.program(_network_run, directions)
        self._network_gain = bench.program(_network_gain, fine)
        self._wiener_run = bench.program(_wiener_run, directions)

    def network(self, model: DiT, couplings, pairs, labels, with_more: bool) -> dict[str, Any]:
        """Measurements of a block of pairs on a network, see `NETWORK`, and the samples. What is measured in one pass,
        and what is kept by coefficient, are NaN unless asked for: they cost time and space."""
        couplings = jnp.asarray(couplings, jnp.float32)
        found: dict[str, Any] = dict(self._network_run(model, couplings, pairs, labels))
        states = found.pop("states")
        if with_more:
            groups = self.modes if isinstance(self.modes, Eigenmodes) else None
            modes = gather(self._network_gain(model, groups, couplings, states, labels))
            found |= {f"mode_{name}": value for name, value in modes.items()}
            found["one_pass_energy"] = modes["energy"] @ self.modes.share()
        else:
            grid, steps = found["energy"].shape[:3], len(self.bench.clock)
            sizes = {"coupling": grid[0], "pair": grid[1], "step": steps, "mode": len(self.modes.band)}
            sizes |= {"band": len(self.bands)} | dict.fromkeys(("row", "column"), self.bench.model.input_size)
            sizes |= {"direction": np.size(self.bands.index)}
            dims = {name: self.variables[name][0] for name in MORE}
            found |= {name: np.full([sizes[dim] for dim in dims[name]], np.nan, np.float32) for name in MORE}
        return found

    def wiener(self, variance: np.ndarray, couplings, pairs, labels) -> dict[str, Any]:
        """Measurements of a block of pairs on the exact denoiser of Gaussian modes of band variances (B,), or of
        variances (M,) along the directions; see `TRAJECTORIES`."""
        variances = jnp.asarray(variance, jnp.float32)
        variances = variances[self.bands.index] if self.data_modes is None else variances
        return self._wiener_run(variances, jnp.asarray(couplings, jnp.float32), pairs, labels)


def few(couplings: tuple[float, ...]) -> np.ndarray:
    """The couplings of the untrained network: the first, a middle and the last one."""
    grid = np.asarray(couplings)
    return grid[np.unique([0, len(grid) // 2, len(grid) - 1])]


def measure(bench: Bench[CompareConfig]) -> None:
    """Fills the groups ``network``, ``pictures``, ``untrained`` and ``wiener``, and ``data`` if it is known what
    covariance the network's training data have."""
    config, instrument = bench.config, Instrument(bench)
    grid = np.asarray(config.couplings)
    some = few(config.couplings)

    def on_network(pairs, labels):
        first = int(gather(pairs)[0])
        found = instrument.network(bench.network, grid, pairs, labels, with_more=first < config.gain_pairs)
        for name in MORE if first < config.gain_pairs else ():  # of these pairs alone, however many run together
            found[name] = np.array(gather(found[name]))
            along_pairs = np.moveaxis(found[name], instrument.variables[name][0].index("pair"), 0)
            along_pairs[config.gain_pairs - first :] = np.nan
        samples = found.pop("sample")
        if first == 0:
            pictures = partial(_pictures, bench, gather(samples), grid, gather(labels))
            bench.whole("pictures", pictures, of_all=True)  # if pairs were added, the first block was not full
        return found

    def on_untrained(pairs, labels):
        return _named(UNTRAINED, instrument.network(bench.untrained, some, pairs, labels, with_more=False))

    size, parity = bench.model.input_size, ["common", "difference"]
    plane: dict[str, Any] = {"row": np.arange(size), "column": np.arange(size)}
    modes, bands = instrument.modes, None
    if instrument.data_modes is not None:
        plane, bands = _coords(instrument.data_modes)
    groups = {
        "mode": np.arange(len(modes.band)),
        "mode_band": ("mode", modes.band),
        "mode_count": ("mode", modes.count),
    }
    coords = {"coupling": grid, "parity": parity, **plane, **groups}
    start: dict[str, Any] = {"first_pair": config.first_pair}
    network = bench.measure("network", instrument.variables, coords, config.pairs, on_network, bands=bands, **start)
    if not bench.run.holds("pictures") and not config.first_pair:  # they were damaged
        pairs = np.arange(min(config.block, config.pairs))
        on_network(pairs, pair_labels(pairs, bench.classes))
    bench.run.confirm("pictures")
    # unlike in other studies, never more than of the network; without it, runs of few pairs would have other numbers
    count = min(config.untrained_pairs, config.end) - config.first_pair
    if count > 0:  # a part of a run measures the control on its own pairs, as far as the control goes
        some_coords = {"coupling": some, "parity": parity}
        bench.measure("untrained", UNTRAINED, some_coords, count, on_untrained, bands=bands, **start)
    if config.first_pair:
        return  # what depends on all pairs is made when the parts are joined
    of, variance = _variance(instrument, network)
    variance = _begun(bench, variance)
    about = {"long_name": f"variance of each {of} that the denoiser is made for", "units": "1"}
    coords = {"coupling": grid, "parity": parity, "variance": (of, variance, about)}
    directions = {name: plane[name] for name in ("direction", "direction_band") if name in plane}

    def on_wiener(pairs, labels):
        return instrument.wiener(variance, grid, pairs, labels)

    coords |= directions
    bench.measure("wiener", TRAJECTORIES, coords, config.pairs, on_wiener, bands=bands, of_all=True)
    if (covariance := instrument.covariance) is not None:
        bench.whole("data", lambda: covariance_group(covariance, instrument.data_modes and instrument.data_modes.share))


def _coords(of: DataModes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Coordinates of directions, and of their groups."""
    about = {"long_name": "group of directions, in the place of a band of the DCT", "units": "1"}
    count = {"long_name": "directions in the group", "units": "1"}
    index, groups = of.directions.index, len(of.names)
    directions = {"direction": np.arange(index.size), "direction_band": ("direction", index)}
    bands = {"band": ("band", np.arange(groups), about), "count": ("band", of.directions.count, count)}
    return directions, {**bands, "band_name": ("band", of.names)}


def _begun(bench: Bench, variance: np.ndarray) -> np.ndarray:
    """The variance of an exact denoiser that is measured in part already: all blocks must be of one denoiser, and
    on other devices that of the network differs in the last digits."""
    known = bench.run.coordinate("wiener", "variance")
    return variance if known is None or known.shape != variance.shape else known


def _variance(instrument: Instrument, network: xr.Dataset) -> tuple[str, np.ndarray]:
    """What the exact denoiser is made for, float64: ``band`` and the network's own variance in each band; or
    ``direction`` and the data's along each."""
    if instrument.data_modes is not None:
        return "direction", instrument.data_modes.variance
    energy = network.energy.sel(parity="difference").isel(coupling=0, step=-1)
    return "band", energy.mean("pair").values.astype(np.float64)


def _named(variables: Variables, found: Mapping[str, Any]) -> dict[str, Any]:
    """Those of `found` that are stored under `variables`."""
    return {name: found[name] for name in variables}


def _pictures(bench: Bench, samples: np.ndarray, grid: np.ndarray, labels: np.ndarray) -> xr.Dataset:
    """8-bit pictures (coupling, pair, replica, y, x, rgb) of the first pairs at the first and the last coupling."""
    chosen = np.moveaxis(samples[:, [0, -1], :PICTURED_PAIRS], 0, 2)
    flat, preview = to_pictures(chosen.reshape(-1, *chosen.shape[3:]), bench.subject.manifest)
    pixels = flat.reshape(*chosen.shape[:3], *flat.shape[1:])
    known = class_names(bench.subject.manifest)
    shown = [short_name(int(label), known) for label in labels[: chosen.shape[1]]]
    about = {"long_name": "samples as pictures, 8 bits", "units": "1"}
    return xr.Dataset(
        {"image": (("coupling", "pair", "replica", "y", "x", "rgb"), pixels, about)},
        coords={"coupling": grid[[0, -1]], "label_name": ("pair", shown)},
        attrs={"preview": preview},
    )
