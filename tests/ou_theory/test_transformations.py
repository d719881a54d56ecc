"""Every public closed form of ou_theory works under jit, vmap and grad, with finite and right gradients, and in single
precision. A new public function fails `test_every_public_function_is_here` until it has an example or is exempt."""

import importlib
import inspect
import pkgutil
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ou_theory
from ou_theory.cluster_laws import Clusters
from ou_theory.mixture import Mixture
from ou_theory.modes import radial_bands
from ou_theory.process import Process, Transition
from ou_theory.replica_speciation import Modes, ReplicaPair


class Example(NamedTuple):
    arguments: tuple  # to be traced, in their order: numbers, or trees of arrays
    known: dict[str, Any]  # to be given as they are


def at(*arguments, **known):
    return Example(arguments, known)


def spread_out(*shape, low=-1.0, high=1.0):
    """Numbers of no pattern."""
    count = int(np.prod(shape))
    return low + (high - low) * ((0.5 + np.arange(count)) * 0.6180339887 % 1).reshape(shape)


PROCESS = Process(np.array([[1.3, -0.5], [-0.2, 0.8]]), np.array(0.7))
CENTRE, COVARIANCE, TIME = np.array([2.0, 1.1]), np.array([[0.5, 0.1], [0.1, 0.3]]), 0.4
LAW = Mixture(
    np.array([0.4, 0.6]),
    np.array([[1, 0.5], [-1, 0.2]]),
    np.array([[[0.5, 0.1], [0.1, 0.4]], [[0.3, -0.05], [-0.05, 0.6]]]),
)
STATES = np.array([[0.3, -0.8], [1.1, 0.4]])
CLUSTERS = Clusters(np.array([0.5, 0.3, 0.8]), np.array([[1.5, 0.7, 0.0], [0.0, 0.0, 1.1]]))
PAIR = ReplicaPair(np.array(1.7), np.array(0.3), np.array(0.2), np.array(0.1))
TOKENS = tuple(spread_out(3, 2, 4, 3))  # q, k, v of two replicas
COMMON, MOVED = tuple(z.mean(0) for z in TOKENS), tuple(spread_out(3, 2, 4, 3, low=-0.7))
GATE = np.array([[1.0, 0.4], [0.7, 1.0]])
BANDS = radial_bands(4, 6, 2)
ELL = np.linspace(-4.0, 5.0, 8)
Q = 1 / (1 + np.exp(-ELL[:, None] - np.array([1.0, 0.0, -2.0])))
RATES, TIMES = np.array([0.8, 0.3, -0.2]), np.array([0.0, 0.5, 1.2, 2.0])

EXAMPLES = {
    "attention.rho": at(0.3),
    "attention.xi": at(0.3),
    "attention.common_gain": at(0.3, kind="tanh", num_replicas=4),
    "attention.coupling_at": at(0.3, kind="tanh"),
    "attention.block_weights": at(GATE, kind="tanh"),
    "attention.rho_n": at(0.3, num_replicas=4),
    "attention.gated_weights": at(*TOKENS[:2], GATE, kind="joint"),
    "attention.gated_attention": at(*TOKENS, GATE, kind="blend"),
    "attention.pair_weights": at(*TOKENS[:2], 0.3, kind="blend"),
    "attention.first_order_difference": at(*COMMON, *(z[0] for z in MOVED), 0.3),
    "attention.first_order_response": at(*COMMON, *MOVED, GATE),
    "attention.exact_difference": at(*TOKENS, 0.3, kind="joint"),
    "cloning.same_cluster_probability": at(1.3),
    "cloning.same_side_probability": at(0.6, 2.0, 0.3, points=1201),
    "cloning.clone_correlation": at(CLUSTERS, np.array([0.3, 2.0])),
    "cloning.kappa_level": at(0.4),
    "cloning.cluster_cloning_time": at(2.0, 0.3, 0.5, 0.6, 0.7),
    "cloning.coupled_cloning_variance": at(2.0, 9.0, 0.3, 0.8),
    "cloning.rescaled_growth_flow": at(2.0, 0.3),
    "cloning.rescaled_growth_sde": at(2.0, 0.3),
    "cloning.state_growth": at(2.0, 0.3),
    "cloning.denoised_growth": at(2.0, 0.3),
    "cloning.cluster_growth": at(1.3, 2.0, 0.3),
    "cloning.coupled_energy_growth": at(2.0, 0.3),
    "recursion.mode_ddim_step": at(0.4, 3.0, 1.2),
    "recursion.mode_ancestral_step": at(0.4, 3.0, 1.2),
    "cloning.power_law_step_gap": at(50.0, 100.0, 1.5, 16.0, 0.4),
    "collapse.gaussian_information": at(PROCESS, TIME, COVARIANCE),
    "collapse.mode_information": at(0.6, 0.8, 2.0, 0.7),
    "collapse.class_information": at(1.3),
    "collapse.cluster_information": at(np.array([0.6, 1.4]), 0.8, np.array([2.0, 0.4]), CENTRE, 0.7),
    "collapse.collapse_time_isotropic": at(0.3, 2.0, 0.6, 0.7),
    "collapse.collapse_time": at(PROCESS, COVARIANCE, 1.5),
    "collapse.collapse_time_modes": at(np.array([0.6, 1.4]), np.array([2.0, 0.4]), 1.5, 0.7),
    "collapse.collapse_time_clusters": at(np.array([0.6, 1.4]), np.array([2.0, 0.4]), CENTRE, 1.5, 0.7),
    "collapse.pair_collapse_times": at(1.0, 0.4, np.array([4.0, 1.0]), np.array([2.0, 0.5]), 1.5, 0.7),
    "collapse.condensation": at(spread_out(4, 3), spread_out(3), np.array([0.3, 1.1, 0.6])),
    "estimator.relative_energy": at(Q, np.array([0.9, 0.8, 0.6])),
    "estimator.latch": at(Q),
    "estimator.commitment": at(Q, ell=ELL),
    "estimator.gap": at(spread_out(2, 3), low=0, high=2),
    "estimator.threshold_step": at(Q, ell=ELL, threshold=0.4),
    "estimator.projection": at(Q, np.array([0.9, 0.8, 0.6])),
    "estimator.aligned_share": at(Q),
    "estimator.aligned_energy": at(0.7 * Q, np.array([0.9, 0.8, 0.6]), np.array([1.0, 1.1, 0.5])),
    "estimator.crossing": at(Q, ell=ELL, threshold=0.6),
    "gain_model.q_uncoupled": at(2.0),
    "gain_model.commitment_log_snr": at(2.0, 0.4),
    "gain_model.commitment_time": at(2.0, 0.4, 0.6, 0.7),
    "gain_model.power_law": at(2.0, 1.5, num=4),
    "gain_model.power_law_time_gap": at(2.0, 1.5, num=4, q=0.4),
    "gain_model.q_ode": at(2.0, 0.8, 0.1),
    "gain_model.q_sde": at(2.0, 0.8, 0.1),
    "gain_model.peak_ode": at(0.8),
    "gain_model.peak_sde": at(0.8),
    "gain_model.w_ode": at(0.8),
    "gain_model.w_sde": at(np.array([0.2, 0.5, 0.8])),
    "gain_model.relative_ratio": at(2.0, 0.8, 0.1),
    "gain_model.synchronization_snr": at(0.4, 0.8, 0.1),
    "gain_model.latched_level_ode": at(2.0, 0.8, 9.0),
    "gain_model.class_mean_difference": at(0.3, rho=0.7, start_share=0.95),  # JAX has no gradient in rho
    "landau.landau": at(2.0, 0.3, 0.6, 0.8, 0.7),
    "landau.magnetisation": at(np.array([0.7, 1.4])),
    "landau.branch": at(2.0, 0.3, 0.6, 0.8, 0.7),
    "landau.onset_slope": at(2.0, 0.3, 0.6, 0.7),
    "gain_model.wiener_gain": at(2.0, 0.3),
    "cluster_laws.Clusters.field": at(CLUSTERS, spread_out(2, 3), 0.7),
    "cluster_laws.Clusters.posterior_mean": at(CLUSTERS, spread_out(2, 3), 0.7),
    "cluster_laws.Clusters.kappa": at(CLUSTERS, np.array([0.3, 2.0])),
    "cluster_laws.Clusters.total_variance": at(CLUSTERS),
    "cluster_laws.sign_correlation": at(np.array([0.0, 1.3]), points=2001),
    "cluster_laws.sign_doubt": at(np.array([0.0, 1.3]), points=2001),
    "cluster_laws.mmse": at(CLUSTERS, np.array([0.3, 2.0])),
    "mixture.mixture": at(*LAW),
    "mixture.gaussian": at(CENTRE, COVARIANCE),
    "mixture.two_clusters": at(CENTRE, COVARIANCE),
    "mixture.mode_mixture": at(2.0, 1.1, 0.5, 0.3),
    "mixture.replica_mixture": at(2.0, 0.3, 0.4, 0.2),
    "mixture.gaussian_root": at(COVARIANCE),
    "mixture.noised": at(LAW, PROCESS, TIME),
    "mixture.log_density": at(LAW, PROCESS, TIME, STATES),
    "mixture.responsibilities": at(LAW, PROCESS, TIME, STATES),
    "mixture.score": at(LAW, PROCESS, TIME, STATES),
    "mixture.posterior_mean": at(LAW, PROCESS, TIME, STATES),
    "mixture.posterior_covariance": at(LAW, PROCESS, TIME, STATES),
    "mixture.tweedie_mean": at(PROCESS, TIME, STATES, spread_out(2, 2)),
    "mixture.tweedie_covariance": at(PROCESS, TIME, -COVARIANCE),
    "mixture.reverse_drift": at(LAW, PROCESS, TIME, STATES),
    "mixture.flow_drift": at(LAW, PROCESS, TIME, STATES),
    "modes.dct2": at(spread_out(4, 6, 2)),
    "modes.idct2": at(spread_out(4, 6, 2)),
    "modes.pair_modes": at(spread_out(2, 4, 6, 1)),
    "modes.band_mean": at(spread_out(4, 6, 2), bands=BANDS),
    "process.symmetric_pair": at(1.0, 0.4, 0.7),
    "process.replicas": at(1.0, 0.4, noise=0.7, count=3),
    "process.coupled": at(1.0, np.array([[0, 1.0, 0.3], [0.5, 0, 0.8], [0.2, 0.9, 0]]), 0.4, 0.7),
    "process.mode_factor": at(0.6, 0.8),
    "process.mode_noise": at(0.6, 0.8, 0.7),
    "process.mode_variance": at(0.6, 0.8, 0.7),
    "process.transition_time": at(0.6, 2.0, 0.7),
    "process.transition": at(PROCESS, np.array([0.3, 1.7])),
    "process.pulled_noise": at(PROCESS, TIME),
    "process.is_stable": at(PROCESS),
    "process.is_contracting": at(PROCESS),
    "process.has_real_modes": at(PROCESS),
    "process.symmetric_bound": at(1.2, count=4),
    "process.speciation_bound": at(1.2, 2.0, 0.7),
    "process.stationary_covariance": at(PROCESS),
    "process.entropy_production": at(PROCESS),
    "process.left_modes": at(PROCESS),
    "process_2x2.transition_2x2": at(1.3, 0.8, 0.5, 0.2, 0.4, 0.7),
    "process_2x2.stationary_2x2": at(1.3, 0.8, 0.5, 0.2, 0.7),
    "recursion.recursion_energy": at(
        spread_out(5, 2, low=0.2, high=0.9), np.array([9.0, 4.0, 2.0, 0.8, 0.3]), np.array([70.0, 85.0]), 0.6
    ),
    "recursion.recursion_statistics": at(
        spread_out(5, 2, low=0.2, high=0.9), np.array([9.0, 4.0, 2.0, 0.8, 0.3]), np.array([70.0, 85.0]), 0.6, 0.2
    ),
    "replica_speciation.replica_kappas": at(PAIR, 1.0, 0.3, 0.5, 0.7),
    "replica_speciation.aligned_weight": at(Modes(2.0, 1.2), 0.2),
    "replica_speciation.replica_curvatures": at(PAIR, 1.0, 0.3, 0.5, 0.7),
    "replica_speciation.replica_quartic": at(0.4),
    "replica_speciation.replica_speciation_times": at(PAIR, 1.0, 0.3, 0.7),
    "replica_speciation.independent_gap_third_order": at(1.0, 0.3, 3.0, 2.0, 0.7),
    "replica_speciation.marginal_instability": at(2.0, 0.8),
    "replica_speciation.marginal_onset": at(0.8),
    "schedules.scheduled_modes": at(RATES, TIMES, 0.7),
    "schedules.scheduled_noise": at(RATES, TIMES, 0.7),
    "schedules.scheduled_time": at(RATES, TIMES, 1.1, 0.7),
    "schedules.schedule_response": at(0.6, 2.0, TIMES, 0.7),
    "schedules.schedule_time": at(np.array([0.1, 0.7, 2.0, 3.0]), TIMES),
    "special.exprel": at(np.array([0.001, 0.7])),
    "special.log1prel": at(np.array([0.001, 0.7])),
    "speciation.observation": at(PROCESS, TIME),
    "speciation.whitener": at(COVARIANCE),
    "speciation.kappa": at(PROCESS, TIME, CENTRE, COVARIANCE),
    "speciation.mode_kappa": at(2.0, 0.3, 0.6, 0.8, 0.7),
    "speciation.mode_speciation_time": at(2.0, 0.3, 0.6, 0.7),
    "speciation.speciation_time": at(PROCESS, CENTRE, COVARIANCE),
    "speciation.speciation_gap": at(1.0, 0.3, 3.0, 2.0, 0.7),
    "speciation.gap_small_coupling": at(1.0, 0.3, 3.0, 0.7),
    "speciation.gap_large_spread": at(1.0, 0.3, 3.0, 0.7),
    "speciation.kappa_after": at(
        Transition(spread_out(2, 2, 2), np.stack([COVARIANCE, 2 * COVARIANCE])), CENTRE, COVARIANCE
    ),
    "cluster_laws.clusters": at(np.array([0.3, 0.4]), np.array([[1.0, 0.5]])),
    "speciation.gap_large_spread_error": at(1.0, 0.3, 3.0, 0.7),
    "speciation.gap_at_bound": at(1.0, 3.0, 0.7),
    "speciation.gap_without_coupling": at(1.0, 3.0, 2.0, 0.7),
    "speciation.projected_times": at(PROCESS, CENTRE, COVARIANCE),
    "speciation.projected_gap": at(PROCESS, CENTRE, COVARIANCE),
}
EXEMPT = {
    "tables in NumPy's double precision, constants of a run": """
        clock.linear_betas clock.ou_time clock.sigma2 clock.log_snr clock.alpha_bar_of_log_snr clock.schedule_index
        clock.respace clock.make_clock clock.path_clock clock.Clock.step modes.radial_bands modes.Bands.with_index
        paths.ProbabilityPath.rates paths.ProbabilityPath.denoising_weights paths.ProbabilityPath.scale
        paths.ProbabilityPath.alpha_bar paths.ProbabilityPath.log_snr
        cloning.half_energy_bias bootstrap.resample bootstrap.percentile_interval bootstrap.family_level""",
    "Python numbers": """
        estimator.threshold_gap gain_model.effective_variance gain_model.critical_rho
        replica_speciation.marginal_threshold""",
    "of functions, not of arrays; test_roots.py": """
        roots.require roots.bisect roots.implicit roots.falling_root cluster_laws.field_average""",
    "of objects that are no arrays; test_modes.py": """
        modes.Bands.coefficients modes.Bands.each modes.Bands.mean modes.Directions.coefficients modes.Directions.each
        modes.Directions.images modes.Directions.mean modes.rank_groups""",
    "makes keys; test_keys.py": "keys.random_key",
    "draws random numbers": "cluster_laws.Clusters.draw mixture.Mixture.draw",
    "draws random paths, or prepares that; test_ensembles.py": """
        ensembles.path_keys ensembles.simulate ensembles.noise_steps ensembles.noised_clusters ensembles.clusters_sde
        ensembles.clusters_flow ensembles.state_laws ensembles.bridges ensembles.mixture_sde ensembles.time_steps
        ensembles.mixture_flow""",
}


def public_functions():
    """By name, methods of public classes too."""
    found = {}
    for info in pkgutil.iter_modules(ou_theory.__path__):
        module = importlib.import_module(f"ou_theory.{info.name}")
        for name, value in vars(module).items():
            if name.startswith("_") or getattr(value, "__module__", None) != module.__name__:
                continue
            if inspect.isclass(value):
                methods = {f"{name}.{k}": f for k, f in vars(value).items() if inspect.isfunction(f) and k[0] != "_"}
                found |= {f"{info.name}.{k}": f for k, f in methods.items()}
            elif callable(value):
                found[f"{info.name}.{name}"] = value
    return found


FUNCTIONS = public_functions()


def test_every_public_function_is_here():
    exempt = [name for names in EXEMPT.values() for name in names.split()]
    assert sorted([*EXAMPLES, *exempt]) == sorted(FUNCTIONS)


def test_examples_give_every_number():
    """Defaults would leave arguments out of the gradients."""
    for name, example in EXAMPLES.items():
        signature = inspect.signature(FUNCTIONS[name])
        given = signature.bind(*example.arguments, **example.known).arguments
        left = {k for k, v in signature.parameters.items() if type(v.default) in (int, float)} - set(given)
        assert not left, f"{name}: {left}"


STEP = 1e-5
SINGLE = 1e-5  # error in single precision, relative to the largest entry of an array of the result
SLOPE = 1e-7  # error of a slope, relative to the sum of its terms


def check(function, arguments):
    """Raises AssertionError, or JAX's errors, unless `function` keeps the promise of this file at the arguments.

    It is called once as it is, in single precision, and compiled once, in double precision, mapped with its gradient
    over the arguments and two places near them.
    """
    numbers, tree = jax.tree.flatten(arguments)
    numbers = [np.asarray(v, float) for v in numbers]
    # a direction in which all arguments move, each entry in proportion to itself, so that structural zeros stay
    away = [v * (1 + 0.4 * np.cos(1 + i + np.arange(v.size)).reshape(v.shape)) for i, v in enumerate(numbers)]

    def plain(*numbers):
        return jax.tree.leaves(function(*jax.tree.unflatten(tree, numbers)))

    def weighed(numbers):
        """One number that hangs on every part of the result by a weight of its own, and the result."""
        result = plain(*numbers)
        smooth = [v.ravel() for v in result if jnp.issubdtype(v.dtype, jnp.floating)]
        flat = jnp.concatenate([*smooth, jnp.zeros(1)])
        return (jnp.cos(1.0 + jnp.arange(flat.size)) * flat).sum(), result

    single = plain(*(jnp.asarray(v, jnp.float32) for v in numbers))
    with jax.enable_x64(True):
        rows = [np.stack([v, v + STEP * d, v - STEP * d]) for v, d in zip(numbers, away, strict=True)]
        mapped = jax.jit(jax.vmap(jax.value_and_grad(weighed, has_aux=True)))(rows)
        (sums, double), slopes = jax.tree.map(np.asarray, mapped)
    for got, value in zip(single, double, strict=True):
        assert got.dtype in (jnp.float32, bool)
        got, value = np.asarray(got, float), np.asarray(value[0], float)
        np.testing.assert_allclose(got, value, rtol=0, atol=SINGLE * np.abs(value).max())
    assert all(np.all(np.isfinite(s)) for s in slopes), "a gradient is not finite"
    terms = np.concatenate([np.ravel(s[0] * d) for s, d in zip(slopes, away, strict=True)])
    error = terms.sum() - (sums[1] - sums[2]) / (2 * STEP)
    assert abs(error) <= SLOPE * np.abs(terms).sum() + 1e-10 * np.abs(sums[0]), "a gradient is wrong"


@pytest.mark.long
@pytest.mark.parametrize("name", EXAMPLES)
def test_works_under_all_transformations(name):
    arguments, known = EXAMPLES[name]
    check(lambda *traced: FUNCTIONS[name](*traced, **known), arguments)


@pytest.mark.parametrize(
    "bad",
    [
        lambda x: x if x > 0 else -x,
        lambda x: jnp.asarray(np.sin(x)),
        lambda x: jnp.sqrt(x * 0),
        lambda x: x * jax.lax.stop_gradient(x),
        lambda x: (x + 1e4) - 1e4,
        lambda x: x * (1 + 1e-4 * (jnp.asarray(x).dtype == jnp.float32)),
    ],
    ids=["branches", "leaves JAX", "no slope", "wrong slope", "loses digits", "differs"],
)
def test_the_check_finds(bad):
    with pytest.raises((AssertionError, jax.errors.TracerArrayConversionError, jax.errors.TracerBoolConversionError)):
        check(bad, (0.7,))
