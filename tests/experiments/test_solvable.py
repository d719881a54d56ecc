"""Data of known law: the instrument on the exact denoiser against closed forms, and the study end to end."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.training import TrainConfig
from experiments import cli
from experiments.frame.steps import spaced_steps
from experiments.frame.store import RunFolder
from experiments.frame.study import run_study
from experiments.frame.subject import untrained_model
from experiments.studies.solvable.analysis import crossing_level, estimates, sign_shift, simultaneous
from experiments.studies.solvable.data import NAMES, SIZE, SolvableData, law, spectrum, to_images, to_modes
from experiments.studies.solvable.measure import SolvableInstrument, exact_denoiser
from experiments.studies.solvable.settings import SolvableConfig
from experiments.studies.solvable.study import STUDY
from experiments.studies.solvable.theory import band_theory, clone_theory, sign_theory
from ou_theory import estimator as oc
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands

TINY = DiTConfig(
    input_size=8, in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3, learn_sigma=False, prediction="v"
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("blank_figures")]


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_model(untrained_model(TINY, 5), folder, extra={"data": SolvableData().preparation()})
    return str(folder)


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "solvable"
    flags = ["--pairs", "4", "--block", "4", "--untrained-pairs", "4", "--steps", "8", "--branches", "3", "--quiet"]
    assert cli.main(["solvable", "--weights", weights, "--out", str(out), *flags]) == 0
    return RunFolder.open(out)


@pytest.fixture(scope="module")
def exact(stock_compiler):
    """The exact denoiser through the instrument: 250 steps, 400 pairs."""
    clock, bands = make_clock("250"), radial_bands(SIZE, SIZE, 6)
    branches = spaced_steps(clock, 5, last=False)
    instrument = SolvableInstrument(clock, bands, branches, 0)
    run = jax.jit(lambda pairs: instrument.measure(exact_denoiser(clock), pairs), compiler_options=stock_compiler)
    found = run(jnp.arange(400))
    return clock, bands, branches, jax.device_get(found)


def test_modes_are_orthonormal_and_come_back():
    x = jax.random.normal(jax.random.key(0), (3, SIZE, SIZE, 2))
    modes = to_modes(x)
    np.testing.assert_allclose(to_images(modes), x, atol=1e-5)
    np.testing.assert_allclose((modes**2).sum(-1), (x**2).sum((1, 2, 3)), rtol=1e-5)


@pytest.mark.long
def test_drawn_images_have_the_law():
    x, labels = SolvableData().batch(TrainConfig(batch_size=9000), 3)
    again, _ = SolvableData().batch(TrainConfig(batch_size=9000), 3)
    np.testing.assert_array_equal(x, again)
    assert spectrum().mean() == pytest.approx(1)
    for c, name in enumerate(NAMES):
        modes = np.asarray(to_modes(x[labels == c]))
        np.testing.assert_allclose(modes.var(0), law(name).total_variance(), rtol=0.2)
    common, difference = (np.asarray(to_modes(x[labels == 2]) @ centre) for centre in law("pair").centres)
    assert abs(np.corrcoef(np.sign(common), np.sign(difference))[0, 1]) < 0.06  # two independent signs


@pytest.mark.long
def test_exact_denoiser_is_the_posterior_mean_of_the_label(exact):
    clock = exact[0]
    denoise, step = exact_denoiser(clock), 120
    x = jax.random.normal(jax.random.key(0), (3, SIZE, SIZE, 2))
    found = denoise(jnp.stack([x, 2 * x]), jnp.asarray(step), jnp.arange(3)).denoised
    for c, name in enumerate(NAMES):
        y = to_modes(2 * x[c]) / np.sqrt(clock.alpha_bar[step])
        expected = to_images(law(name).posterior_mean(y, jnp.asarray(clock.sigma[step] ** 2, jnp.float32)))
        np.testing.assert_allclose(found[1, c], expected, atol=2e-5)


@pytest.mark.long
def test_commitment_of_the_exact_denoiser_is_the_recursions(exact):
    clock, bands, _, found = exact
    energy = np.asarray(found["energy"][:, 0], np.float64).mean(0)
    known = band_theory(clock, bands)
    tau, expected = (
        np.asarray(oc.commitment(jnp.asarray(e / e[-1]), clock.log_snr, -6.0).level) for e in (energy, known)
    )
    np.testing.assert_allclose(tau, expected, atol=0.03)
    np.testing.assert_allclose(energy[-1], known[-1], rtol=0.25)  # of a chi-square with few coefficients


@pytest.mark.long
def test_speciation_of_the_exact_denoiser_is_where_kappa_is_one(exact):
    clock, *_, found = exact
    theory = sign_theory(clock)
    np.testing.assert_allclose(found["growth"].mean(0), theory["growth"], atol=2e-3)
    np.testing.assert_allclose(crossing_level(found["growth"].mean(0), clock.log_snr), theory["level"], atol=0.01)
    at = np.exp(-theory["level"])
    np.testing.assert_allclose(
        [float(law("clusters").kappa(at[0])[0]), float(law("pair").kappa(at[2])[1])], 1, atol=1e-3
    )


@pytest.mark.long
def test_clones_of_the_exact_denoiser_correlate_as_they_must(exact):
    clock, bands, branches, found = exact
    correlation = found["clone_product"].mean(0) / found["clone_square"].mean(0)
    known = clone_theory(clock, bands, branches)
    standard_error = (1 - known**2) / np.sqrt(400 * 2 * bands.count)
    assert np.all(np.abs(correlation - known) < 4.5 * standard_error + 0.005)
    assert np.all(np.diff(known, axis=0) > 0)


def test_simultaneous_band_covers_all_points_together():
    rng = np.random.default_rng(0)
    missed = 0
    for _ in range(200):
        data = rng.standard_normal((128, 30))  # 30 points, truth 0
        weights = rng.multinomial(128, np.full(128, 1 / 128), 200) / 128
        band = simultaneous(np.concatenate([data.mean(0)[None], weights @ data]))
        missed += not np.all((band[:, 1] <= 0) & (band[:, 2] >= 0))
    assert missed < 24  # 10 expected, and the bootstrap is a little short


@pytest.mark.long
def test_the_folder_holds_estimates_and_theory(finished):
    analysis = finished.load("analysis")
    assert finished.manifest["status"] == "complete"
    for name in ("tau", "speciation", "clone", "clone_sign_shift"):
        assert f"network_{name}" in analysis
    np.testing.assert_allclose(analysis.exact_clone_sign_shift.isel(bound=0), 0, atol=1e-7)
    claims = finished.read_json("claims.json")["claims"]
    assert [claim["verdict"] for claim in claims[:1]] == ["does not hold"]  # nothing was trained
    captions = finished.read_json("section.json")["captions"]
    assert {path.stem for path in (finished.path / "figures").glob("*.png")} == set(captions)
    assert (finished.path / "report.html").read_text().count("<figure") == len(captions)


@pytest.mark.long
def test_a_run_of_other_settings_or_classes_is_refused(finished, weights):
    with pytest.raises(ValueError, match="other settings"):
        run_study(STUDY, SolvableConfig(weights=weights, pairs=6), finished.path, resume=True)
    with pytest.raises(ValueError, match="--classes"):
        SolvableConfig(classes=(0,))
    with pytest.raises(ValueError, match="branches"):
        SolvableConfig(branches=2)


def test_a_model_of_other_data_is_refused(tmp_path):
    save_model(untrained_model(dataclasses.replace(TINY, in_channels=3), 0), tmp_path / "photos", extra={"data": None})
    with pytest.raises(ValueError, match="solvable"):
        run_study(STUDY, SolvableConfig(weights=str(tmp_path / "photos")), tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.long
def test_estimates_of_a_source(finished):
    found = estimates(finished.load("exact"), make_clock("8"), 0)
    assert found["tau"][1].shape == (7, 3)
    shift = sign_shift(finished.load("network"), finished.load("exact"), 0)
    assert np.abs(shift[..., 0]).max() > 0.05  # the untrained network is not the exact denoiser
