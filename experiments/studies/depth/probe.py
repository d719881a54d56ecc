"""What of a pair's outcome is linearly decodable inside the network, by layer, step and band (docs/theory.md, 8).

Along the ancestral sampler, where the outcome is not settled by the state, so that no reader can know more of it than
the denoised image does. Two readers: ridge regressions from the difference mode of the stream to that of the sample,
fitted on other pairs than they are scored on; and the final layer, of whose readout the products with the outcome and
with the noisy state are kept, see `experiments.studies.depth.scaled`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from dit_jax.model import DiT
from dit_jax.objective import denoised_at
from dit_jax.replicas import pair_labels, run_pairs
from dit_jax.sharding import gather
from experiments.frame.bench import Bench
from experiments.frame.instrument import shuffled_bands, stream_modes, token_bands
from experiments.frame.programs import Setup
from experiments.frame.steps import spaced_steps
from experiments.frame.streams import numpy_stream, stream
from experiments.studies.depth.settings import FOLDS, DepthConfig
from ou_theory.modes import Bands, BandWeights, band_mean, dct2, pair_modes

# of the differences of the readout, the noisy state and the outcome, in the order in which they are stored
PRODUCTS = ("read read", "read state", "read outcome", "state state", "state outcome", "outcome outcome")
ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ridge, as shares of the mean feature variance
DIMS = ("coupling", "pair", "layer", "level")
ABOUT = {
    "error": ((*DIMS, "probe_band"), "squared error of the probe on pairs that it was not fitted on"),
    "total": ((*DIMS, "probe_band"), "square of the outcome's difference mode"),
    "error_shuffled": (
        ("coupling", "pair", "level", "probe_band"),
        "squared error of the last layer where the outcomes are those of other pairs",
    ),
    "products": (
        (*DIMS, "band", "product"),
        "inner product per DCT coefficient of the differences of the readout after a layer, the state and the outcome",
    ),
    "products_shuffled": ((*DIMS, "band", "product"), "the same, coefficients in random bands"),
}


def _run(
    setup: Setup,
    steps: tuple[int, ...],
    model: DiT,
    projection: jax.Array,
    shuffled: BandWeights,
    couplings,
    pairs,
    labels,
) -> dict[str, jax.Array]:
    config, shape = model.config, setup.image_shape

    def tap(layer, activations):
        own = setup.own(activations)
        modes = [stream_modes(own[name])[1] @ projection for name in ("resid_pre", "resid_post")]
        out = model.readout(activations["resid_pre"], activations["conditioning"])[..., : shape[-1]]
        return *modes, setup.guided(out)

    def observe(step, x, denoised, taps):  # one coupling: (R, 1, P, H, W, C)
        before, after, readout = taps

        def difference(out):
            return pair_modes(denoised_at(setup.clock, step, x[:, 0], out, config.prediction))[1]

        scale = jnp.asarray(np.sqrt(setup.clock.alpha_bar), x.dtype)[step]
        return {
            "stream": jnp.concatenate([before[:1], after]),
            "read": jnp.concatenate([jax.lax.map(difference, readout), pair_modes(denoised[:, 0])[1][None]]),
            "state": pair_modes(x[:, 0])[1] / scale,
        }

    end, kept = run_pairs(
        setup.coupled(model, tap=tap),
        setup.clock,
        couplings,
        pairs,
        labels,
        shape,
        seed=stream(setup.seed, "probe trajectories"),
        sampler="ancestral",
        observe=observe,
    )
    kept = {name: value[np.array(steps)] for name, value in kept.items()}
    grid = config.input_size // config.patch_size
    read = kept["stream"].reshape(len(steps), config.depth + 1, -1, grid * grid, projection.shape[-1])
    outcome = patch_modes((end[0, 0] - end[1, 0]) * np.sqrt(0.5).item(), config.patch_size)
    products = _products(setup.bands, shuffled, kept["read"], kept["state"][:, None], pair_modes(end[:, 0])[1])
    return {
        "stream": jnp.transpose(read, (2, 1, 0, 3, 4)),
        "outcome": outcome.reshape(pairs.size, grid * grid, -1),
        **{name: jnp.transpose(value, (2, 1, 0, 3, 4)) for name, value in products.items()},
    }


def _products(
    bands: Bands, shuffled: BandWeights, read: jax.Array, state: jax.Array, outcome: jax.Array
) -> dict[str, jax.Array]:
    """Inner products (level, layer, P, B, `PRODUCTS`) of coefficients (level, layer, P, H, W, C)."""
    factors = ((read, read), (read, state), (read, outcome), (state, state), (state, outcome), (outcome, outcome))
    pairs = [jnp.broadcast_to(a * b, read.shape) for a, b in factors]
    return {
        "products": jnp.stack([band_mean(each, bands) for each in pairs], -1),
        "products_shuffled": jnp.stack([band_mean(each, shuffled) for each in pairs], -1),
    }


class Probe:
    """The probe of one study.

    Attributes:
      tokens: bands of the token grid.
      steps: sampler steps at which it reads.
      features: stream features it sees; wider streams are projected at random to that many.
    """

    def __init__(self, bench: Bench[DepthConfig], levels: int, features: int):
        self.bench, model = bench, bench.model
        self.tokens = token_bands(model.input_size // model.patch_size)
        self.shuffled = shuffled_bands(bench.bands, bench.config.seed).weights
        self.steps = spaced_steps(bench.clock, levels)
        self.features = min(model.hidden_size, features)
        rng = numpy_stream(bench.config.seed, "probe projection")
        square = np.eye(model.hidden_size)
        self.projection = (
            square
            if self.features == len(square)
            else np.linalg.qr(rng.standard_normal((len(square), self.features)))[0]
        )
        self._streams = bench.program(_run, tuple(self.steps.tolist()))

    def streams(self, model: DiT, coupling: float, count: int, what: str) -> dict[str, np.ndarray]:
        """Over all pairs: difference modes, of T coefficients of the token grid, of the stream (P, layer, level, T, D)
        and of the outcome (P, T, patch * patch * C), see `patch_modes`; the readout's ``products`` and
        ``products_shuffled`` (P, layer, level, B, `PRODUCTS`)."""
        parts = []
        block = self.bench.config.block
        grid = jnp.asarray([coupling], jnp.float32)
        for first in tqdm(range(0, count, block), desc=what, disable=not self.bench.progress):
            pairs = np.arange(first, min(first + block, count))
            which = (grid, pairs, pair_labels(pairs, self.bench.classes))
            parts.append(gather(self._streams(model, np.float32(self.projection), self.shuffled, *which)))
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def scores(self, model: DiT, group: str, couplings: Sequence[float], pairs: int) -> xr.Dataset:
        """Held-out errors and the readout's products, per pair.

        Returns:
          products, products_shuffled (coupling, pair, layer, level, band, product): see `PRODUCTS`; inner products per
          DCT coefficient of the pair's difference in what the final layer reads off the stream (denoised), in the noisy
          state (rescaled) and in the outcome.
          error, total (coupling, pair, layer, level, probe_band): squared error and total square of the outcome.
          error_shuffled: error of the last layer when the outcomes are those of other pairs (without the layer axis).
        """
        rows: dict[str, list[np.ndarray]] = {name: [] for name in ABOUT}
        names: list[str] = []
        for coupling in couplings:
            found = self.streams(model, coupling, pairs, f"{self.bench.study}: {group}, g = {coupling:g}")
            stream, outcome = found["stream"], found["outcome"]
            bands = probe_bands(outcome, self.bench.subject.image_shape[-1], self.tokens)
            names = list(bands)
            steps = range(len(self.steps))
            others = np.roll(outcome, FOLDS, 0)  # of another pair, in the same fold
            with threadpool_limits(1):  # thousands of small problems: threads would wait for each other
                each = [[probe_scores(at[:, k], outcome, bands) for k in steps] for at in stream.swapaxes(0, 1)]
                shuffled = [probe_scores(stream[:, -1, k], others, bands)[0] for k in steps]
            scores = np.transpose(np.stack(each), (2, 3, 0, 1, 4))  # (2, P, layer, level, B)
            scores = {"error": scores[0], "total": scores[1], "error_shuffled": np.stack(shuffled, -2)}
            for name, values in rows.items():
                values.append(scores.get(name, found.get(name)))
        return xr.Dataset(
            {
                name: (dims, np.stack(rows[name]), {"long_name": about, "units": "1"})
                for name, (dims, about) in ABOUT.items()
            },
            coords={
                "coupling": list(couplings),
                "pair": np.arange(pairs),
                "layer": np.arange(model.config.depth + 1),
                "level": self.steps,
                "level_ell": ("level", self.bench.clock.log_snr[self.steps]),
                "probe_band": names,
                "product": list(PRODUCTS),
                "band": np.arange(len(self.bench.bands)),
                "radius": ("band", self.bench.bands.radius),
            },
        )


def patch_modes(images: jax.Array, patch: int) -> jax.Array:
    """Images (..., H, W, C) -> (..., grid, grid, patch * patch * C): a DCT inside each patch, whose mean comes first,
    and one over the grid of patches; orthonormal."""
    *lead, height, width, channels = images.shape
    cut = images.reshape(*lead, height // patch, patch, width // patch, patch, channels)
    inner = dct2(jnp.moveaxis(cut, -4, -3))  # (..., gy, gx, patch, patch, C)
    return dct2(inner.reshape(*lead, height // patch, width // patch, -1))


def probe_bands(outcome: np.ndarray, channels: int, tokens: Bands) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Per band of the probe, by name: the token coefficients (flat) and the outcome's features that belong to it.

    The first bands are those of the patch means, by token frequency; the last one is all that lies inside patches.
    """
    index = tokens.index.ravel()
    names = ["DC" if radius == 0 else f"r = {radius:.2f}" for radius in tokens.radius]
    bands = {name: (np.flatnonzero(index == b), np.arange(channels)) for b, name in enumerate(names)}
    if outcome.shape[-1] > channels:
        bands["inside patches"] = (np.arange(index.size), np.arange(channels, outcome.shape[-1]))
    return bands


def probe_scores(
    stream: np.ndarray, outcome: np.ndarray, bands: dict[str, tuple[np.ndarray, np.ndarray]], folds: int = FOLDS
) -> np.ndarray:
    """Held-out squared error and total square of a ridge regression, per pair and band.

    One linear map serves all coefficients of a band, as the final layer's serves all tokens. Fold f holds the pairs
    ``f, f + folds, ...``; the ridge of a fold is the one that does best on the others.

    Args:
      stream: (P, T, D) features of every token coefficient.
      outcome: (P, T, F).
      bands: see `probe_bands`.

    Returns:
      (2, P, B): error, total.
    """
    count = len(stream)
    error, total = np.zeros((2, count, len(bands)))
    fold = np.arange(count) % folds
    for b, (where, features) in enumerate(bands.values()):
        x = np.asarray(stream[:, where], np.float64)  # (P, t, D)
        y = np.asarray(outcome[:, where][..., features], np.float64)
        flat = [(x[fold == f].reshape(-1, x.shape[-1]), y[fold == f].reshape(-1, y.shape[-1])) for f in range(folds)]
        gram, cross = (np.stack([u.T @ v for u, v in pairs]) for pairs in ([(u, u) for u, _ in flat], flat))
        errors = np.zeros((len(ALPHAS), count))
        for f in range(folds):
            values, vectors = np.linalg.eigh(gram.sum(0) - gram[f])
            rotated = vectors.T @ (cross.sum(0) - cross[f])
            held_x, held_y = x[fold == f] @ vectors, y[fold == f]
            for a, alpha in enumerate(ALPHAS):
                weights = rotated / (np.maximum(values, 0) + alpha * values.mean() + 1e-12)[:, None]
                errors[a, fold == f] = np.square(held_x @ weights - held_y).sum((1, 2))
        by_fold = np.stack([errors[:, fold == f].sum(1) for f in range(folds)], 1)  # (alpha, fold)
        for f in range(folds):
            best = np.argmin(by_fold.sum(1) - by_fold[:, f])
            error[fold == f, b] = errors[best, fold == f]
        total[:, b] = np.square(y).sum((1, 2))
    return np.stack([error, total])
