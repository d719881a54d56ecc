"""A network trained on data whose law is known, against the theory with nothing fitted (docs/theory.md, section 9).

The study measures the commitment of the Gaussian law by band, the speciation of the signs, and cloning curves. The same
code measures the network and the exact denoiser. Where the two disagree, the network deviates from theory. Where the
exact denoiser disagrees with the closed form, the instrument or the theory is wrong.
"""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.diffusion import Denoiser, DenoiserOutput, ancestral_step
from dit_jax.model import DiT
from dit_jax.replicas import pair_noise, run_pairs
from experiments.frame.bench import Bench, Variables
from experiments.frame.programs import Setup
from experiments.frame.settings import Sampler
from experiments.frame.steps import spaced_steps
from experiments.frame.streams import stream
from experiments.frame.subject import Subject
from experiments.studies.solvable.data import NAMES, SIZE, SolvableData, law, to_images, to_modes
from experiments.studies.solvable.settings import SIGN_NAMES, SIGNS, SolvableConfig
from ou_theory.clock import Clock
from ou_theory.cluster_laws import Clusters
from ou_theory.modes import Bands, band_mean, dct2


def check(config: SolvableConfig, subject: Subject) -> None:
    """Raises ValueError unless the network was trained on these very laws."""
    if (subject.manifest.get("data") or {}) != json.loads(json.dumps(SolvableData().preparation())):
        raise ValueError(
            f"{config.weights} was not trained on the three laws of this study; "
            "train a network on them with `syncgap train solvable OUT --size 8`"
        )


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


class SolvableInstrument:
    """The measurements, for any denoiser of the laws."""

    def __init__(
        self, clock: Clock, bands: Bands, branches: np.ndarray, seed: int | jax.Array, sampler: Sampler = "ddim"
    ):
        self.clock, self.bands, self.branches, self.seed = clock, bands, branches, seed
        self.sampler: Sampler = sampler
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
        """Difference energies along the sampler by band (P, K, B), and along the signs' centres (P, K, 2)."""
        centres = _directions(self.laws[NAMES[label]])

        def observe(step, x, denoised):
            difference = (denoised[0, 0] - denoised[1, 0]) * np.sqrt(0.5).item()
            along = jnp.einsum("pm,am->pa", to_modes(difference), centres, precision="highest")
            return band_mean(jnp.square(dct2(difference)), self.bands), jnp.square(along)

        labels = jnp.full(pairs.shape, label)
        _, (energy, along) = run_pairs(
            lambda gate: denoise,
            self.clock,
            jnp.zeros(1),
            pairs,
            labels,
            self.shape,
            seed=self.seed,
            sampler=self.sampler,
            observe=observe,
        )
        return energy.swapaxes(0, 1), along.swapaxes(0, 1)

    def _states(self, pairs, step, name):
        """States (P, modes) of the law at a step, in the rescaled frame."""
        root = stream(self.seed, "clean states", step)
        clean = jax.vmap(lambda pair: self.laws[name].draw(jax.random.fold_in(root, pair), 1)[0])(pairs)
        noise = to_modes(pair_noise(stream(self.seed, "state noise"), pairs, step, self.shape, 1)[0])
        return clean + jnp.asarray(self.clock.sigma, clean.dtype)[step] * noise

    def _growth(self, denoise, pairs, name, a):
        """Growth rate (P, K) of a difference along a sign's centre, per nat of ln(1 / sigma), on the surface where
        all signs are equally likely under the exact posterior."""
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
            key = stream(self.seed, "clones", branch)  # branches do not share noise: their errors are independent

            def body(step, x):
                noise = pair_noise(key, pairs, step, self.shape)
                return update(step, x, denoise(x, step, labels), noise)

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


VARIABLES: Variables = {
    "energy": (("law", "step", "band"), "mean square per coefficient of the denoised difference"),
    "sign_energy": (("step", "sign"), "square of the denoised difference along a sign's centre"),
    "growth": (
        ("step", "sign"),
        "growth rate of a difference along a sign's centre, per nat of ln(1 / sigma)",
        "1 / nat",
    ),
    "clone_product": (("branch", "band"), "product per coefficient of two clones' ends, Gaussian law"),
    "clone_square": (("branch", "band"), "mean square per coefficient of the clones' ends, Gaussian law"),
    "sign_product": (("branch", "part"), "product of two clones' ends along the centres of the pair's signs"),
    "sign_square": (("branch", "part"), "mean square of the clones' ends along the centres of the pair's signs"),
}


def _run(setup: Setup, branches: tuple[int, ...], denoise: Denoiser, pairs: jax.Array) -> dict[str, jax.Array]:
    instrument = SolvableInstrument(setup.clock, setup.bands, np.array(branches), setup.seed, setup.sampler)
    return instrument.measure(denoise, pairs)


def _on_network(setup: Setup, branches: tuple[int, ...], model: DiT, pairs: jax.Array):
    # The fused attention of GPUs has no forward derivative, which the growth of a difference needs.
    return _run(setup, branches, setup.denoiser(model, attention="explicit"), pairs)


def _on_exact(setup: Setup, branches: tuple[int, ...], pairs: jax.Array):
    return _run(setup, branches, exact_denoiser(setup.clock), pairs)


def measure(bench: Bench[SolvableConfig]) -> None:
    """Fills ``network``, ``untrained``, and ``exact``: the posterior mean itself."""
    config, clock = bench.config, bench.clock
    branches = spaced_steps(clock, config.branches, last=False)
    coords: dict[str, Any] = {
        "law": list(NAMES),
        "sign": list(SIGN_NAMES),
        "part": ["common", "difference"],
        "branch": branches,
        "branch_ell": ("branch", clock.log_snr[branches]),
    }
    static = tuple(branches.tolist())
    on_network, on_exact = bench.program(_on_network, static), bench.program(_on_exact, static)
    subjects = (
        ("network", lambda pairs: on_network(bench.network, pairs), config.pairs),
        ("exact", on_exact, config.pairs),
        ("untrained", lambda pairs: on_network(bench.untrained, pairs), config.untrained_pairs),
    )
    for name, run, count in subjects:
        bench.measure(name, VARIABLES, coords, count, lambda pairs, labels, run=run: run(jnp.asarray(pairs)))
