"""Network and exact Gaussian denoisers at the same noised images (docs/theory.md, section 9.6).

Images are the network's own samples with noise put on again. What is stored are mean squares by band: of what each
Gaussian's denoiser misses of the network's prediction, and of the prediction itself.
"""

from functools import cache, lru_cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.covariance import DataCovariance, class_means, covariance_for, load_covariance, with_mirrors, within_class
from dit_jax.diffusion import Denoiser
from dit_jax.images import ImageSet, load_images
from dit_jax.model import DiT
from dit_jax.replicas import pair_labels, pair_noise, run_pairs
from dit_jax.transforms import training_data
from experiments.frame.bench import Bench, Variables, one_of
from experiments.frame.programs import Setup
from experiments.frame.streams import stream
from experiments.frame.subject import Subject, model_folder
from experiments.studies.gaussianity.law import Gaussians, closed_form, denoised, exact_denoiser, gaussians
from experiments.studies.gaussianity.settings import BANDS, GAUSSIANS, GaussianityConfig
from ou_theory.clock import Clock
from ou_theory.modes import band_mean, dct2, idct2

NEAREST = 0.1  # nats that a training level may be away from the noise that is asked for


def stored_covariance(config: GaussianityConfig) -> DataCovariance | None:
    return load_covariance(model_folder(one_of(config.weights)))


def check(config: GaussianityConfig, subject: Subject) -> None:
    """Raises ValueError unless the model folder has covariance and class means, training knows the noise levels, and
    the images, if any, can be read and are those of the network's data."""
    found, model = stored_covariance(config), subject.config
    if found is None or not found.has_bases:
        raise ValueError(
            f"{config.weights} has no covariance of its data with principal directions, of which the Gaussian is made; "
            "syncgap covariance FOLDER IMAGES adds it"
        )
    if found.class_mean is None or len(found.class_mean) != model.num_classes:
        raise ValueError(f"{config.weights}: its data have no mean for each of the {model.num_classes} classes")
    level_steps(model.training_clock(), config.noise)
    if config.images is not None:
        images = _read(config.images, model.input_size)
        recorded = (subject.manifest.get("data") or {}).get("sha256", images.digest)
        if recorded != images.digest or len(images.class_names) != model.num_classes:
            raise ValueError(
                f"{config.images} has other images than those on which the network was trained: give these"
            )


@lru_cache(maxsize=1)
def _read(images: str, size: int) -> ImageSet:
    """The images that `check` has read, for the instrument, which lets go of them."""
    return load_images(images, size, progress=False)


def level_steps(clock: Clock, noise: tuple[float, ...]) -> np.ndarray:
    """Steps of a clock that are nearest to noise levels.

    Raises:
      ValueError: one is too far from all steps.
    """
    wanted = -2 * np.log(noise)
    steps = np.abs(clock.log_snr[:, None] - wanted).argmin(0)
    far = np.abs(clock.log_snr[steps] - wanted) > NEAREST
    if far.any():
        raise ValueError(f"noise {np.asarray(noise)[far][0]:g} is beyond the levels on which the network was trained")
    return steps


class Photographs(NamedTuple):
    """The training images as they are noised: all of them with their mirror images."""

    x: np.ndarray  # (N, H, W, C) float32
    labels: np.ndarray  # (N,)

    def pairs(self, seed: int, pairs: np.ndarray, labels: np.ndarray) -> np.ndarray:
        """Two different images of its class for each pair: (2, P, H, W, C) float32."""
        chosen = []
        for pair, label in zip(np.asarray(pairs).tolist(), np.asarray(labels).tolist(), strict=True):
            members = np.flatnonzero(self.labels == label)
            key = stream(seed, "clean states", 1, pair)
            chosen.append(members[np.asarray(jax.random.choice(key, members.size, (2,), replace=False))])
        return self.x[np.array(chosen).T]


def _sampled(setup: Setup, model: DiT, pairs, labels) -> jax.Array:
    ends, _ = run_pairs(
        setup.coupled(model),
        setup.clock,
        jnp.zeros(1),
        pairs,
        labels,
        setup.image_shape,
        seed=setup.seed,
        sampler=setup.sampler,
    )
    return ends[:, 0]


def _of_network(setup: Setup, noise: tuple[float, ...], model: DiT, *args):
    return _explained(setup, noise, setup.denoiser(model, clock=setup.model.training_clock()), *args)


def _of_exact(setup: Setup, noise: tuple[float, ...], laws: Gaussians, *args):
    denoise = exact_denoiser(laws, setup.model.training_clock(), setup.image_shape)
    return _explained(setup, noise, denoise, laws, *args)


def _explained(setup: Setup, noise: tuple[float, ...], denoise: Denoiser, laws: Gaussians, images, pairs, labels):
    clock, bands = setup.model.training_clock(), setup.bands
    steps = level_steps(clock, noise)

    def by_band(coefficients):
        return band_mean(jnp.square(coefficients).reshape(*coefficients.shape[:-1], *setup.image_shape), bands)

    def at(inputs):
        index, step = inputs
        sigma = jnp.asarray(clock.sigma, jnp.float32)[step]
        y = images + sigma * pair_noise(stream(setup.seed, "noised ends"), pairs, index, setup.image_shape)
        found = denoise(y * jnp.asarray(clock.alpha_bar**0.5, jnp.float32)[step], step, labels).denoised
        y, found = (dct2(v).reshape(*v.shape[:2], -1) for v in (y, found))
        missed = found - denoised(laws, y, sigma**2, labels, slice(None))  # (G, 2, P, n)
        return {
            "error": by_band(missed).mean(1),
            "difference_error": by_band(_apart(missed, 1)),
            "variance": by_band(_apart(found)),
            "score_variance": by_band(_apart(found - y)),
        }

    each = jax.lax.map(at, (jnp.arange(len(steps)), jnp.asarray(steps)))
    # (L, G, P, B) and (L, P, B) -> pairs in front
    return {k: jnp.moveaxis(v, (-2, 0), (0, -2)) for k, v in each.items()}


class GaussianityInstrument:
    """The measurements, compiled once."""

    def __init__(self, bench: Bench[GaussianityConfig]):
        self.bench, self.config, self.shape = bench, bench.config, bench.subject.image_shape
        self.levels = bench.model.training_clock()
        self.steps = level_steps(self.levels, self.config.noise)
        found, full, mean, self.photographs = stored_covariance(self.config), None, None, None
        assert found is not None
        if self.config.images is not None:
            images = _read(self.config.images, bench.model.input_size)
            _read.cache_clear()
            found = covariance_for(bench.subject.manifest, images)
            self.photographs = Photographs(*with_mirrors(training_data(images, transformation_of(found))))
            full, mean = within_class(*self.photographs), class_means(*self.photographs)
        self.laws = gaussians(found, bench.bands, full=full, mean=mean)
        self._samples = bench.program(_sampled)
        self._network = bench.program(_of_network, self.config.noise)
        self._exact = bench.program(_of_exact, self.config.noise)

    def samples(self, pairs, labels) -> jax.Array:
        """The network's own images (2, P, H, W, C)."""
        return self._samples(self.bench.network, pairs, labels)

    def draws(self, pairs, labels) -> jax.Array:
        """Draws of the first Gaussian (2, P, H, W, C)."""
        unit = pair_noise(stream(self.config.seed, "clean states", 0), pairs, 0, self.shape)
        unit = unit.reshape(*unit.shape[:2], -1)
        along = unit * jnp.sqrt(jnp.asarray(self.laws.variance[0]))
        found = jnp.asarray(self.laws.mean)[labels] + jnp.matmul(along, self.laws.basis[0].T, precision="highest")
        return idct2(found.reshape(*unit.shape[:2], *self.shape))

    def network(self, model: DiT, images, pairs, labels) -> dict[str, Any]:
        """What the Gaussians explain of a network at noised images; see `VARIABLES`."""
        return self._network(model, self.laws, images, pairs, labels)

    def exact(self, images, pairs, labels) -> dict[str, Any]:
        """The same of the exact denoiser of the first Gaussian, made as a network is."""
        return self._exact(self.laws, images, pairs, labels)


def transformation_of(found: DataCovariance) -> str:
    """The name of what was made of the photographs before training."""
    return (found.about["data"].get("transformation") or {}).get("name", "natural")


def _apart(x: jax.Array, axis: int = 0) -> jax.Array:
    """The difference mode of coefficients whose replicas lie along an axis."""
    a, b = jnp.moveaxis(x, axis, 0)
    return (a - b) * np.sqrt(0.5).item()


VARIABLES: Variables = {
    "error": (("gaussian", "noise", "band"), "mean square of the network's prediction less that of the Gaussian"),
    "difference_error": (("gaussian", "noise", "band"), "the same of the difference mode of the pair"),
    "variance": (("noise", "band"), "mean square of the difference mode of the network's predictions"),
    "score_variance": (("noise", "band"), "mean square of the difference mode of prediction less state, y"),
}


def measure(bench: Bench[GaussianityConfig]) -> None:
    """Fills ``network`` and ``untrained``, both at the network's own noised samples; ``exact``, the exact denoiser of
    the first Gaussian at its noised draws, and ``theory``, the closed form of that; ``data``, the variance of the
    bands; and, if there are images, ``photographs``, the network at these."""
    config, instrument = bench.config, GaussianityInstrument(bench)
    laws, bands = instrument.laws, bench.bands
    coords: dict[str, Any] = {
        "gaussian": list(GAUSSIANS),
        "noise": list(config.noise),
        "noise_ell": ("noise", instrument.levels.log_snr[instrument.steps]),
    }

    def at_samples(*pairs):
        return instrument.network(bench.network, instrument.samples(*pairs), *pairs)

    @cache
    def of_control() -> np.ndarray:
        """The network's images of all pairs of the control (2, P, H, W, C), drawn before the control takes its place in
        memory."""
        index, block = np.arange(config.untrained_pairs), config.block
        labels = np.asarray(pair_labels(index, bench.classes))
        parts = [slice(first, first + block) for first in range(0, len(index), block)]
        return np.concatenate([np.asarray(instrument.samples(index[at], labels[at])) for at in parts], 1)

    def of_untrained(pairs, labels):
        images = of_control()[:, np.asarray(pairs)]
        return instrument.network(bench.untrained, images, pairs, labels)

    def at_draws(*pairs):
        return instrument.exact(instrument.draws(*pairs), *pairs)

    def theory() -> xr.Dataset:
        found = closed_form(laws, instrument.levels.sigma[instrument.steps], bands)
        dims = {name: VARIABLES[name][0] for name in found}
        arrays = {name: (dims[name], value, {"long_name": VARIABLES[name][1]}) for name, value in found.items()}
        return xr.Dataset(arrays, coords={**coords, "band": np.arange(len(bands))})

    def data() -> xr.Dataset:
        each = laws.variance[GAUSSIANS.index(BANDS)].reshape(*bands.index.shape, -1)[..., 0]
        variance = np.array([each[bands.index == b].mean(dtype=np.float64) for b in range(len(bands))])
        return xr.Dataset({"band_variance": ("band", variance)}, coords={"band": np.arange(len(bands))})

    bench.measure("network", VARIABLES, coords, config.pairs, at_samples)
    if (photographs := instrument.photographs) is not None:

        def at_photographs(*pairs):
            return instrument.network(bench.network, photographs.pairs(config.seed, *pairs), *pairs)

        bench.measure("photographs", VARIABLES, coords, config.pairs, at_photographs)
    bench.measure("untrained", VARIABLES, coords, config.untrained_pairs, of_untrained)
    bench.measure("exact", VARIABLES, coords, config.pairs, at_draws)
    bench.whole("theory", theory)
    bench.whole("data", data)
