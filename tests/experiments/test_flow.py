"""Networks of flow matching from training to studies: each runs on the clock of its own path."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import load_manifest, load_model
from dit_jax.diffusion import network_denoiser, sample
from dit_jax.replicas import INITIAL, pair_noise
from experiments import cli
from experiments.frame.bench import Bench
from experiments.frame.measured import Measured
from experiments.frame.subject import load_subject
from experiments.studies.cloning import measure as cloning
from experiments.studies.cloning.settings import CloningConfig
from experiments.studies.interventions import measure as interventions
from experiments.studies.interventions.settings import InterventionsConfig
from experiments.studies.response import measure as response
from experiments.studies.response.settings import ResponseConfig
from experiments.tools.info import describe
from ou_theory.clock import path_clock

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]

TINY = ["--size", "8", "--depth", "1", "--hidden-size", "16", "--num-heads", "2", "--batch-size", "4", "--steps", "2"]
CHECKS = {CloningConfig: cloning.check, ResponseConfig: response.check, InterventionsConfig: interventions.check}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> str:
    """Folder of a network of the linear path, trained for two steps."""
    out = tmp_path_factory.mktemp("flow") / "run"
    assert (
        cli.main(["train", "solvable", str(out), *TINY, "--prediction", "velocity", "--path", "linear", "--quiet"]) == 0
    )
    return str(out / "model")


def test_the_manifest_and_info_name_the_path(trained):
    config = load_manifest(trained)["config"]
    assert (config["prediction"], config["path"], config["learn_sigma"]) == ("velocity", "linear", False)
    lines = dict(line.split(maxsplit=1) for line in describe(trained).splitlines())
    assert (lines["prediction"], lines["path"]) == ("velocity", "linear")


@pytest.mark.long
def test_a_study_runs_on_the_clock_of_the_path(trained, tmp_path):
    bench = Bench("cloning", CloningConfig(weights=trained, steps="7"), tmp_path / "run")
    expected = path_clock("linear", 7)
    for measured in (bench, Measured.of(bench.run, CloningConfig)):  # while it measures, and as it is read
        np.testing.assert_array_equal(measured.clock.timesteps, expected.timesteps)
        np.testing.assert_array_equal(measured.clock.log_snr, expected.log_snr)
        assert measured.clock.path is expected.path


@pytest.mark.parametrize("settings", CHECKS)
def test_checks_ask_the_clock_of_the_path(settings, trained):
    """Ten steps of the schedule lie otherwise, and a stride of it is no number of steps."""
    subject = load_subject(trained)
    CHECKS[settings](
        settings(weights=trained, steps="10", **({"vectors": 2} if settings is ResponseConfig else {})), subject
    )
    with pytest.raises(ValueError, match="a sampler on the linear path takes a number of steps"):
        CHECKS[settings](settings(weights=trained, steps="ddim10"), subject)


def test_steps_of_a_schedule_are_refused_before_there_is_a_folder(trained, tmp_path):
    with pytest.raises(ValueError, match="steps '5,5': a sampler on the linear path takes a number of steps"):
        Bench("cloning", CloningConfig(weights=trained, steps="5,5"), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_pictures_are_euler_steps_of_the_flow(trained, tmp_path):
    assert cli.main(["sample", trained, str(tmp_path / "out"), "--steps", "4", "--count", "2", "--quiet"]) == 0
    with np.load(tmp_path / "out" / "latents.npz") as arrays:
        found, labels = arrays["samples"], jnp.repeat(jnp.asarray(arrays["labels"]), 2)
    model, clock = load_model(trained), path_clock("linear", 4)
    shape = found.shape[2:]
    x = pair_noise(0, jnp.arange(labels.size), INITIAL, shape, replicas=1)[0]

    @jax.jit
    def euler(model, x):
        x, times = x * clock.scale[0], np.append(clock.timesteps, 1)
        for t, after in pairwise(times):
            x = x + (after - t) * model(x, jnp.full(labels.shape, t), labels)
        return x

    expected = euler(model, x)
    np.testing.assert_allclose(found.reshape(-1, *shape), expected, rtol=1e-4, atol=1e-4)
    ours = jax.jit(lambda model, x: sample(network_denoiser(model, clock), x, clock, labels)[0])(model, x)
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4)
