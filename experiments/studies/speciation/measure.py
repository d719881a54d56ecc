"""Clones of trajectories that are given no label, and the classes in which they end (docs/theory.md, section 11.3).

Each trajectory of a pair runs to its end under the ancestral sampler. From its state at every branch step it is
continued once more with fresh noise, so that the two share their past and nothing else. A classifier says in which of
the two classes an end lies.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import xarray as xr

from dit_jax.class_names import names
from dit_jax.classifier import Classifier, Layers, check_classes, load_classifier
from dit_jax.covariance import load_covariance
from dit_jax.diffusion import Denoiser
from dit_jax.model import DiT
from dit_jax.replicas import pair_noise, run_pairs
from experiments.frame.bench import Bench, Variables, one_of
from experiments.frame.clones import clone_ends
from experiments.frame.programs import Setup
from experiments.frame.streams import stream
from experiments.frame.subject import Subject, model_folder
from experiments.studies.speciation.settings import SpeciationConfig
from experiments.studies.speciation.theory import theory_group
from ou_theory.clock import Clock

DEFAULT_BRANCHES = 8
Pixels = tuple[tuple[float, ...], float]  # their mean by channel and std, by which the network's images are scaled


def branch_steps(config: SpeciationConfig, clock: Clock) -> np.ndarray:
    """The sampler steps at which clones branch, increasing. Nothing random follows the last step, so it is none."""
    if config.branches:
        return np.sort(np.asarray(config.branches))
    return np.unique(np.linspace(0, len(clock) - 1, DEFAULT_BRANCHES + 1).round().astype(int)[:-1])


def reader(config: SpeciationConfig, subject: Subject) -> Classifier:
    """The classifier for this network's images."""
    classifier = load_classifier(config.classifier).reader(subject.manifest)
    check_classes(classifier, names(subject.manifest) or ())
    return classifier


def check(config: SpeciationConfig, subject: Subject) -> None:
    """Raises ValueError unless the network has two classes, which the classifier tells, and clones can branch."""
    count = subject.config.num_classes
    if count != 2:
        raise ValueError(
            f"speciation is between two classes, and {subject.name} has {count}: train a network on two, with "
            "`syncgap train ... --labels FILE` and the two class folders in that file"
        )
    reader(config, subject)
    clock = subject.config.clock(config.steps)
    branches = branch_steps(config, clock)
    if branches.size < 2 or branches[-1] >= len(clock) - 1:
        raise ValueError(
            f"clones must branch at two steps or more of 0..{len(clock) - 2}, got {branches.tolist()}: give other "
            "--branches or more --steps"
        )


def measurements(
    denoise: Denoiser,
    classifier: Classifier,
    clock: Clock,
    branches: np.ndarray,
    pairs,
    labels,
    shape,
    *,
    seed: int | jax.Array,
) -> dict[str, jax.Array]:
    """All measurements of a block of pairs (P,), pairs in front; see `VARIABLES`."""
    ends, states = run_pairs(
        lambda gate: denoise,
        clock,
        jnp.zeros(1),
        pairs,
        labels,
        shape,
        seed=seed,
        sampler="ancestral",
        observe=lambda step, x, denoised: x[:, 0],
    )

    def clones(inputs):
        branch, state = inputs

        def noise(step):
            return pair_noise(stream(seed, "clones", branch), pairs, step, shape)

        return classifier.classes(clone_ends(denoise, clock, state, branch, labels, noise)).T

    odds = classifier.log_odds(ends[:, 0])
    again = jax.lax.map(clones, (jnp.asarray(branches), states[branches]))
    return {
        "end": odds.argmax(-1).T,
        "sure": jax.nn.softmax(odds).max(-1).T,
        "clone": again.swapaxes(0, 1),
    }


def _classes(
    setup: Setup, branches: tuple[int, ...], pixels: Pixels, labelled: bool, model: DiT, layers: Layers, pairs, labels
) -> dict[str, jax.Array]:
    denoise = setup.denoiser(model, guidance=1.0) if labelled else setup.denoiser(model)
    classifier = Classifier(layers, dict(zip(("mean", "std"), pixels, strict=True)))
    clock, shape = setup.clock, setup.image_shape
    return measurements(denoise, classifier, clock, np.array(branches), pairs, labels, shape, seed=setup.seed)


VARIABLES: Variables = {
    "end": (("replica",), "class in which the trajectory ends, by the classifier"),
    "sure": (("replica",), "probability that the classifier gives to that class"),
    "clone": (("branch", "replica"), "class in which its clone ends"),
}


def classifier_group(classifier: Classifier) -> xr.Dataset:
    """What a run keeps of the classifier: which one it is, how often it is right, and the scale of the pixels."""
    test = classifier.about["test"]
    values = np.array([test["accuracy"], *test["interval"]])
    return xr.Dataset(
        {"accuracy": ("bound", values, {"long_name": "share of test images classified right", "units": "1"})},
        {"bound": ["estimate", "low", "high"]},
        {
            "digest": classifier.digest(),
            "class_names": list(classifier.class_names),
            "test_images": test["images"],
            "pixel_std": classifier.about["std"],
        },
    )


def measure(bench: Bench[SpeciationConfig]) -> None:
    """Fills ``classifier``, ``network``, ``labelled`` (the same network, given a label), ``untrained`` and, if the
    covariance of the training data is known, ``data``."""
    config, clock = bench.config, bench.clock
    classifier, branches = reader(config, bench.subject), branch_steps(config, clock)
    coords = {"branch": branches, "branch_ell": ("branch", clock.log_snr[branches]), "replica": [0, 1]}
    static = (tuple(branches.tolist()), (tuple(classifier.about["mean"]), classifier.about["std"]))
    classes, given = (bench.program(_classes, *static, labelled) for labelled in (False, True))

    def measured(group: str, program, subject: Callable[[], DiT], pairs: int) -> None:
        bench.measure(group, VARIABLES, coords, pairs, lambda *which: program(subject(), classifier.layers, *which))

    bench.whole("classifier", lambda: classifier_group(classifier))
    if bench.load("classifier").attrs["digest"] != classifier.digest():
        raise ValueError(
            f"{bench.run.path} was begun with another classifier than {config.classifier}: give that one, or another "
            "--out"
        )
    measured("network", classes, lambda: bench.network, config.pairs)
    measured("labelled", given, lambda: bench.network, config.labelled_pairs)
    measured("untrained", classes, lambda: bench.untrained, config.untrained_pairs)
    covariance = load_covariance(model_folder(one_of(config.weights)))
    if covariance is not None and covariance.has_bases:
        bench.whole("data", lambda: theory_group(covariance))
