"""What of a pair's outcome is linearly decodable from the residual stream, by layer, step and band (docs/theory.md, 8).

Ridge regressions from the difference mode of the stream to that of the sample, along the ancestral sampler, where the
outcome is not settled by the state: no reader can know more of it than the denoised image does. Fitted on other pairs
than they are scored on.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr
from threadpoolctl import threadpool_limits
from tqdm import tqdm

from dit_jax.diffusion import network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import pair_labels, run_pairs
from experiments.analysis import WINDOW_START
from experiments.study import Study
from ou_theory.modes import Bands, dct2, pair_modes, radial_bands

ALPHAS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)  # ridge, as shares of the mean feature variance
FOLDS = 4
SEED_OFFSET = 1  # the probe's pairs are not those of other measurements


def token_bands(grid: int, most: int = 6) -> Bands:
    """Bands of the DCT over a grid of tokens: as many annuli as are not empty, at most `most`."""
    for num in range(most, 0, -1):
        try:
            return radial_bands(grid, grid, num)
        except ValueError:
            continue
    raise ValueError(f"a grid of {grid} x {grid} tokens has no bands: the model has one token")


def stream_modes(stream: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Common and difference mode (N, grid, grid, D) of residual streams (2, N, T, D), in DCT over the token grid."""
    grid = round(stream.shape[-2] ** 0.5)
    return pair_modes(stream.astype(jnp.float32).reshape(*stream.shape[:-2], grid, grid, stream.shape[-1]))


class Probe:
    """The probe of one study.

    Attributes:
      tokens: bands of the token grid.
      steps: sampler steps at which it reads.
      features: stream features it sees; wider streams are projected at random to that many.
    """

    def __init__(self, study: Study, levels: int, features: int):
        self.study = study
        model, ell = study.subject.model.config, study.clock.log_snr
        self.tokens = token_bands(model.input_size // model.patch_size)
        inside = np.flatnonzero(ell >= WINDOW_START)
        wanted = np.linspace(ell[inside[0]], ell[-1], levels)
        self.steps = np.unique(np.abs(ell[:, None] - wanted).argmin(0))
        self.features = min(model.hidden_size, features)
        rng = np.random.default_rng([study.config.seed, model.hidden_size, features])
        square = np.eye(model.hidden_size)
        self.projection = (
            square
            if self.features == len(square)
            else np.linalg.qr(rng.standard_normal((len(square), self.features)))[0]
        )
        self._streams = jax.jit(self._run)

    def _run(self, model: DiT, couplings, pairs, labels):
        study, config = self.study, model.config
        projection = jnp.asarray(self.projection, jnp.float32)

        def tap(layer, activations):
            return [stream_modes(activations[name])[1] @ projection for name in ("resid_pre", "resid_post")]

        def coupled(gate):
            return network_denoiser(model, study.clock, gate, kind=study.config.gate, tap=tap)

        end, kept = run_pairs(
            coupled,
            study.clock,
            couplings,
            pairs,
            labels,
            study.subject.image_shape,
            seed=study.config.seed + SEED_OFFSET,
            sampler="ancestral",
            observe=lambda step, x, denoised, taps: jnp.concatenate([taps[0][:1], taps[1]]),
        )
        grid = config.input_size // config.patch_size
        stream = kept[self.steps].reshape(len(self.steps), config.depth + 1, -1, grid * grid, self.features)
        outcome = patch_modes((end[0, 0] - end[1, 0]) * np.sqrt(0.5).item(), config.patch_size)
        return jnp.transpose(stream, (2, 1, 0, 3, 4)), outcome.reshape(pairs.size, grid * grid, -1)

    def streams(self, model: DiT, coupling: float, count: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Difference modes over all pairs, T coefficients of the token grid: of the stream (P, layer, level, T, D), and
        of the outcome (P, T, patch * patch * C), see `patch_modes`."""
        parts = []
        block = self.study.config.block
        grid = jnp.asarray([coupling], jnp.float32)
        for first in tqdm(range(0, count, block), desc=what, disable=not self.study.progress):
            pairs = np.arange(first, min(first + block, count))
            parts.append(jax.device_get(self._streams(model, grid, pairs, pair_labels(pairs, self.study.classes))))
        stream, outcome = (np.concatenate(each) for each in zip(*parts, strict=True))
        return stream, outcome

    def scores(self, model: DiT, group: str, couplings: Sequence[float], pairs: int) -> xr.Dataset:
        """Held-out errors per pair, from the store if they are there.

        Returns:
          error, total (coupling, pair, layer, level, probe_band): squared error and total square of the outcome.
          error_shuffled: error of the last layer when the outcomes are those of other pairs (without the layer axis).
        """
        run = self.study.run
        if (run.path / "data.zarr" / group).exists():
            return run.load(group)
        rows: dict[str, list[np.ndarray]] = {"error": [], "total": [], "error_shuffled": []}
        names: list[str] = []
        for coupling in couplings:
            stream, outcome = self.streams(model, coupling, pairs, f"{self.study.kind}: {group}, g = {coupling:g}")
            bands = probe_bands(outcome, self.study.subject.image_shape[-1], self.tokens)
            names = list(bands)
            steps = range(len(self.steps))
            others = np.roll(outcome, FOLDS, 0)  # of another pair, in the same fold
            with threadpool_limits(1):  # thousands of small problems: threads would wait for each other
                each = [[probe_scores(at[:, k], outcome, bands) for k in steps] for at in stream.swapaxes(0, 1)]
                shuffled = [probe_scores(stream[:, -1, k], others, bands)[0] for k in steps]
            scores = np.transpose(np.stack(each), (2, 3, 0, 1, 4))  # (2, P, layer, level, B)
            for name, values in zip(rows, (*scores, np.stack(shuffled, -2)), strict=True):
                rows[name].append(values)
        dims = ("coupling", "pair", "layer", "level", "probe_band")
        dataset = xr.Dataset(
            {
                "error": (dims, np.stack(rows["error"])),
                "total": (dims, np.stack(rows["total"])),
                "error_shuffled": (("coupling", "pair", "level", "probe_band"), np.stack(rows["error_shuffled"])),
            },
            coords={
                "coupling": list(couplings),
                "pair": np.arange(pairs),
                "layer": np.arange(model.config.depth + 1),
                "level": self.steps,
                "level_ell": ("level", self.study.clock.log_snr[self.steps]),
                "probe_band": names,
            },
        )
        run.put(group, dataset)
        return dataset


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
