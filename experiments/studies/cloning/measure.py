"""Three measurements of one quantity: how much of an image a state has decided (docs/theory.md, sections 4.1 and 11.1).

The ancestral sampler runs without coupling. Three quantities are measured: the spread of what is predicted from
independent states, the correlation of clones that branch from one state, and the error of predicting the sampler's own
images from noise. They are one curve if the denoiser is the posterior mean of its own sampler's law. Finite steps alone
set them apart. For an exact Gaussian denoiser of the same variances and step noise that difference is known
(`step_theory`), and it is taken off.
"""

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import Denoiser
from dit_jax.model import DiT
from dit_jax.objective import posterior_tables
from dit_jax.replicas import pair_noise, run_pairs
from experiments.frame.bench import Bench, Variables
from experiments.frame.clones import clone_ends
from experiments.frame.programs import Setup
from experiments.frame.steps import spaced_steps
from experiments.frame.streams import stream
from experiments.frame.subject import Subject
from experiments.studies.cloning.settings import CloningConfig
from experiments.studies.cloning.theory import gaussian_denoiser, gaussian_filters
from ou_theory.clock import Clock
from ou_theory.modes import Bands, band_mean, dct2, pair_modes


def check(config: CloningConfig, subject: Subject) -> None:
    """Raises ValueError unless there are steps at which clones can branch."""
    if inner_branches(subject.config.clock(config.steps), config.branches).size < 2:
        raise ValueError(f"steps {config.steps!r}: clones need two sampler steps to branch at; give more --steps")


def inner_branches(clock: Clock, count: int) -> np.ndarray:
    """Steps at which clones branch, evenly spaced in log-SNR. The last step is left out: nothing random follows it, and
    all three measurements are close to 1 there.
    """
    steps = spaced_steps(clock, count, last=False)
    return steps[steps < len(clock) - 1]


def measurements(
    denoise: Denoiser, clock: Clock, bands: Bands, branches: np.ndarray, pairs, labels, shape, *, seed: int | jax.Array
) -> dict[str, jax.Array]:
    """All measurements of a block of pairs (P,), pairs in front; see `VARIABLES`."""
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
            return pair_noise(stream(seed, "clones", branch), pairs, step, shape)

        again = pair_modes(clone_ends(denoise, clock, state, branch, labels, noise))[1]
        return {
            "clone_product": band_mean(outcome * again, bands),
            "clone_square": band_mean(jnp.square(again), bands),
        }

    def predict(step):
        signal = jnp.asarray(clock.alpha_bar**0.5, ends.dtype)[step]
        spread = jnp.asarray((1 - clock.alpha_bar) ** 0.5, ends.dtype)[step]
        noisy = signal * ends + spread * pair_noise(stream(seed, "noised ends"), pairs, step, shape)
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


# Difference modes are (A - B) / sqrt(2): their mean squares are variances.
VARIABLES: Variables = {
    "energy": (("step", "band"), "mean square per coefficient of the difference of what the sampler predicts"),
    "noise": (("step",), "variance of the noise that the sampler adds, mean over pixels; unused in the last step"),
    "clone_product": (("branch", "band"), "product of the differences of the ends and of the ends of clones"),
    "clone_square": (("branch", "band"), "mean square of the difference of the clones' ends"),
    "error": (("step", "band"), "mean square error of predicting the ends from noised ends"),
    "spread": (("step", "band"), "mean square of the difference of the predictions from noised ends"),
    "aligned": (("step", "band"), "product of the differences of the predictions from noised ends and of the ends"),
    "covariance": (("band", "channel", "other"), "products of channels of the difference of the ends, per coefficient"),
}


def _run(setup: Setup, branches: tuple[int, ...], denoise: Denoiser, pairs, labels) -> dict[str, jax.Array]:
    return measurements(
        denoise, setup.clock, setup.bands, np.array(branches), pairs, labels, setup.image_shape, seed=setup.seed
    )


def _on_network(setup: Setup, branches: tuple[int, ...], model: DiT, pairs, labels):
    return _run(setup, branches, setup.denoiser(model), pairs, labels)


def _on_filters(setup: Setup, branches: tuple[int, ...], exact: tuple[jax.Array, jax.Array], pairs, labels):
    return _run(setup, branches, gaussian_denoiser(setup.clock, setup.bands, *exact), pairs, labels)


def measure(bench: Bench[CloningConfig]) -> None:
    """Fills ``network``, ``untrained``, and ``exact``: the Gaussian denoiser of the network's covariances."""
    config, clock = bench.config, bench.clock
    branches, channels = inner_branches(clock, config.branches), np.arange(bench.model.in_channels)
    coords = {
        "branch": branches,
        "branch_ell": ("branch", clock.log_snr[branches]),
        "channel": channels,
        "other": channels,
    }

    static = tuple(branches.tolist())
    on_network, on_filters = bench.program(_on_network, static), bench.program(_on_filters, static)

    def measured(name, function, subject, pairs, of_all=False):
        return bench.measure(name, VARIABLES, coords, pairs, lambda *which: function(subject(), *which), of_all=of_all)

    network = measured("network", on_network, lambda: bench.network, config.pairs)
    noise, covariance = (np.asarray(network[name].values, np.float64).mean(0) for name in ("noise", "covariance"))
    exact = tuple(jnp.asarray(v, jnp.float32) for v in (gaussian_filters(clock, noise, covariance), noise))
    measured("exact", on_filters, lambda: exact, config.pairs, of_all=True)
    measured("untrained", on_network, lambda: bench.untrained, config.untrained_pairs)
