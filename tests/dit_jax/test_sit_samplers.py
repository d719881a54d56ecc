"""The samplers of flows against the official trajectories (SiT 947f95b), and their laws.

The adaptive solver dopri5 has no counterpart here.
"""

from typing import get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from official import load, nhwc, sit_model

from dit_jax.config import PREDICTIONS, Diffusion, DiTConfig
from dit_jax.diffusion import network_denoiser, sample
from dit_jax.flow import (
    LAST_SIZE,
    Field,
    Flow,
    diffusion_table,
    euler_maruyama,
    field_weights,
    flow_times,
    network_flow,
    sample_flow,
)
from dit_jax.objective import add_noise, network_input, target
from ou_theory.clock import path_clock
from ou_theory.paths import PATHS

REFS = load("refs_sit_traj")
SDE = {"sampler": "sde", "last_step": "mean"}
CFG = {"guidance": 4.0, "channels": "official"}
NOISE, SCORE = {"prediction": "epsilon"}, {"prediction": "score"}
GVP, VP = {"path": "gvp"}, {"path": "vp"}


def sde_heun(flow, diffusion):
    """SiT's second-order stochastic sampler: a further sampler is one function."""
    spread = np.sqrt(2 * diffusion[:-1] * flow.sizes)

    def drift(x, k):
        velocity, score = flow.field(x, k)
        return velocity + jnp.asarray(diffusion, x.dtype)[k] * score

    def update(k, x, noise):
        size = jnp.asarray(flow.sizes, x.dtype)[k]
        x = x + jnp.asarray(spread, x.dtype)[k] * noise
        first = drift(x, k)
        return x + size / 2 * (first + drift(x + size * first, k + 1))

    return update


# official run: changes of the network's config, and what `run` is given
WHOLE = {  # every state is recorded
    "lin_euler10": ({}, {}),
    "lin_heun10": ({}, {"sampler": "heun"}),
    "lin_sde10": ({}, SDE),
    "gvp_sde10": (GVP, SDE),
    "lin_euler10cfg4": ({}, CFG),
}
ENDS = {  # the result alone is
    "lin_euler_numsteps10": ({}, {"steps": 9}),
    "lin_euler10_reverse": ({}, {"reverse": True}),
    "vp_euler10": (VP, {}),
    "vp_sde10": (VP, SDE),
    "lin_noise_euler10": (NOISE, {}),
    "lin_score_euler10": (SCORE, {}),
    "gvp_noise_euler10": (GVP | NOISE, {}),
    "vp_noise_euler10": (VP | NOISE, {}),
    "vp_score_euler10": (VP | SCORE, {}),
    "lin_noise_sde10_SBDM": (NOISE, SDE | {"diffusion": "sbdm"}),
    "lin_sde10_linear": ({}, SDE | {"diffusion": "linear"}),
    "lin_sde10_decreasing": ({}, SDE | {"diffusion": "decreasing"}),
    "lin_sde10_incdec": ({}, SDE | {"diffusion": "increasing-decreasing"}),
    "lin_sde10_norm.5": ({}, SDE | {"norm": 0.5}),
    "vp_sde10_SBDM": (VP, SDE | {"diffusion": "sbdm"}),
    "lin_sde10_lastNone": ({}, SDE | {"last_step": None}),
    "lin_sde10_lastTweedie": ({}, SDE | {"last_step": "tweedie"}),
    "lin_sde10_lastEuler": ({}, SDE | {"last_step": "euler"}),
    "gvp_sde10_lastTweedie": (GVP, SDE | {"last_step": "tweedie"}),
    "lin_sdeheun10": ({}, SDE | {"sampler": sde_heun}),
    "lin_sde10cfg4": ({}, SDE | CFG),
}


def run(name, dtype, changes, options):
    """The states before every step and the result, of the half of a doubled batch that is kept."""
    options = dict(options)
    steps, reverse = options.pop("steps", 10), options.pop("reverse", False)
    guided = {key: options.pop(key) for key in CFG if key in options}
    model = sit_model(dtype, **changes)
    times = flow_times(model.config, steps, LAST_SIZE if options.get("last_step") else 0.0)
    noises = REFS.get(f"{name}.noises", REFS["noises"])[:, :2]
    start = jnp.asarray(nhwc(REFS[f"{name}.x_init"] if reverse else REFS["xT"]), dtype)
    if "sampler" in options and options["sampler"] != "heun":
        options["noise"] = lambda step: jnp.asarray(nhwc(noises), dtype)[step]

    @jax.jit
    def sampled(model, x):
        flow = network_flow(model, times[::-1] if reverse else times, jnp.asarray(REFS["y"]), **guided)
        return sample_flow(flow, x, observe=lambda _, x: x, **options)

    return tuple(np.asarray(a) for a in sampled(model, start))


def deviation(ours, theirs):
    assert ours.shape == theirs.shape
    assert ours.dtype == theirs.dtype
    return np.abs(ours - theirs).max() / np.abs(theirs).max()


@pytest.mark.parametrize("name", WHOLE)
def test_trajectories_in_float32(name):
    end, states = run(name, "float32", *WHOLE[name])
    theirs = nhwc(REFS[f"{name}.states_f32"][:, :2])
    for k, state in enumerate(states):
        assert deviation(state, theirs[k]) <= 5e-6
    assert deviation(end, theirs[-1]) <= 5e-6


@pytest.mark.long
@pytest.mark.parametrize("name", WHOLE)
def test_trajectories_in_float64(name, x64):
    """With sinusoids in float64."""
    end, _ = run(name, "float64", *WHOLE[name])
    assert deviation(end, nhwc(REFS[f"{name}.final_f64s"][:2])) <= 1e-10


@pytest.mark.long
@pytest.mark.parametrize("name", ENDS)
def test_results_in_float32(name):
    end, _ = run(name, "float32", *ENDS[name])
    assert deviation(end, nhwc(REFS[f"{name}.final_f32"][:2])) <= 5e-6


@pytest.mark.long
@pytest.mark.parametrize("name", ENDS)
def test_results_in_float64(name, x64):
    """They were recorded with sinusoids in float32 alone, whose rounding is all that is allowed."""
    end, _ = run(name, "float64", *ENDS[name])
    assert deviation(end, nhwc(REFS[f"{name}.final_f64c"][:2])) <= 2e-7


# --- tables and laws


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("name", get_args(Diffusion))
def test_diffusions_are_official(path, name):
    """But for the constant one, whose official form is broken."""
    t = REFS["paths.t"]
    found = diffusion_table(PATHS[path], t, name, 0.7)
    theirs = np.ones_like(t) if name == "constant" else REFS[f"paths.{path}.diffusion_{name}"]
    if name == "decreasing":
        found, theirs = diffusion_table(PATHS[path], t, name), theirs / 0.7
    inside = (
        slice(None, -1) if path == "vp" and name == "sbdm" else slice(None)
    )  # official at t = 1: beta / 2, not 0 / 0
    np.testing.assert_allclose(found[inside], 0.7 * theirs[inside], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_true_prediction_tells_velocity_and_score(path, prediction, x64):
    clock, step = path_clock(path, [0.01, 0.3, 0.6, 0.99]), jnp.arange(4)
    data, noise = jax.random.normal(jax.random.key(0), (2, 4, 2, 2, 1), jnp.float64)
    x = network_input(add_noise(data, noise, step, clock), step, clock)
    out = target(data, noise, step, clock, prediction)
    weights = [table[:, None, None, None] for table in field_weights(PATHS[path], clock.timesteps, prediction)]
    for (from_x, from_out), known in zip((weights[:2], weights[2:]), ("velocity", "score"), strict=True):
        np.testing.assert_allclose(from_x * x + from_out * out, target(data, noise, step, clock, known), rtol=1e-9)


def gaussian_flow(path, times, variance):
    """The exact flow of Gaussian data of this variance."""
    path = PATHS[path]
    alpha, sigma, (alpha_rate, sigma_rate) = path.alpha(times), path.sigma(times), path.rates(times)
    total = alpha**2 * variance + sigma**2
    velocity = (alpha_rate * alpha * variance + sigma_rate * sigma) / total
    return Flow(path, times, lambda x, k: Field(jnp.asarray(velocity)[k] * x, -x / jnp.asarray(total)[k]))


@pytest.mark.long
@pytest.mark.parametrize(("sampler", "order"), [("euler", 1), ("heun", 2)])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_orders_of_the_samplers(sampler, order, path, x64):
    """The flow scales a Gaussian mode by its standard deviation."""

    def error(steps):
        flow = gaussian_flow(path, np.linspace(0, 1, steps + 1), 3.0)
        return abs(float(sample_flow(flow, jnp.ones(()), sampler=sampler)[0]) - np.sqrt(3.0))

    assert np.log2(error(40) / error(80)) == pytest.approx(order, abs=0.1)


@pytest.mark.long
@pytest.mark.parametrize("diffusion", get_args(Diffusion))
def test_every_diffusion_leaves_the_law_as_it_is(diffusion, x64):
    """A step is linear in state and noise, so that variances follow from the step of each."""

    def variance(steps):
        times = np.linspace(0.01, 0.99, steps + 1)
        flow = gaussian_flow("linear", times, 0.5)
        update = jax.jit(jax.vmap(euler_maruyama(flow, diffusion_table(flow.path, times, diffusion)), (0, None, None)))
        each = jnp.arange(steps)
        keep, spread = update(each, jnp.ones(()), jnp.zeros(())), update(each, jnp.zeros(()), jnp.ones(()))
        total = 0.01**2 * 0.5 + 0.99**2
        for a, b in zip(np.asarray(keep), np.asarray(spread), strict=True):
            total = a**2 * total + b**2
        return total

    expected = 0.99**2 * 0.5 + 0.01**2
    errors = [abs(variance(steps) / expected - 1) for steps in (1000, 4000)]
    assert errors[1] < 0.01
    assert errors[1] < 0.5 * errors[0]


def test_a_euler_run_of_the_linear_path_is_ddim_from_the_same_levels(x64):
    """To rounding, in the two frames (theory, section 2.1)."""
    model = sit_model("float64")
    times, labels = np.linspace(0.001, 1, 8), jnp.asarray(REFS["y"])
    clock, start = path_clock("linear", times[:-1]), jnp.asarray(nhwc(REFS["xT"]), jnp.float64)
    ddim, _ = jax.jit(lambda m, x: sample(network_denoiser(m, clock), x, clock, labels))(model, start)
    ours, _ = jax.jit(lambda m, x: sample_flow(network_flow(m, times, labels), x))(model, clock.scale[0] * start)
    assert deviation(np.asarray(ours), np.asarray(ddim)) < 1e-12


# --- failures


def test_a_network_of_the_schedule_has_no_flow():
    with pytest.raises(ValueError, match="trained on the schedule of DDPM: use the sampler ddim or ancestral"):
        flow_times(DiTConfig(), 10)


@pytest.mark.parametrize("times", [[0.5], [0, 1.5], [0, 0.5, 0.5], [-0.1, 1], [[0, 1]]])
def test_times_that_are_no_grid_are_refused(times):
    with pytest.raises(ValueError, match=r"two or more in \[0, 1\], all increasing or all decreasing"):
        network_flow(sit_model(), times, jnp.zeros(1, jnp.int32))


def test_a_noise_prediction_has_no_velocity_without_data():
    with pytest.raises(ValueError, match="predicts epsilon tells no velocity at t = 0"):
        network_flow(sit_model(**NOISE), [0, 0.5, 1], jnp.zeros(1, jnp.int32))
    assert flow_times(sit_model(**NOISE).config, 2)[0] == 1e-3


@pytest.mark.parametrize(
    ("options", "about"),
    [
        ({"sampler": "dopri5"}, "sampler 'dopri5' is not one of euler, heun, sde"),
        ({"sampler": "sde"}, "stochastic: give noise"),
        ({"sampler": "sde", "noise": jnp.zeros, "diffusion": "none"}, "diffusion 'none' is not one of sigma, sbdm"),
        ({"sampler": "sde", "noise": jnp.zeros, "diffusion": "sbdm"}, "'sbdm' is infinite at t = 0: leave that time"),
        ({"last_step": "none"}, "last step 'none' is not one of mean, euler, tweedie"),
        ({"last_step": "mean"}, "t = 1, where this grid of times ends already"),
    ],
)
def test_settings_that_cannot_be_run_are_refused(options, about):
    """The official code gives NaN for the fourth."""
    with pytest.raises(ValueError, match=about):
        sample_flow(gaussian_flow("linear", np.linspace(0, 1, 5), 2.0), jnp.ones(()), **options)


def test_a_stochastic_sampler_does_not_run_from_data_to_noise():
    flow = gaussian_flow("linear", np.linspace(0.9, 0, 5), 2.0)
    with pytest.raises(ValueError, match="runs from noise to data: its times must increase"):
        sample_flow(flow, jnp.ones(()), sampler="sde", noise=jnp.zeros)
