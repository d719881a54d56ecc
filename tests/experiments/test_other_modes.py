"""Modes beyond the DCT: directions of the data, the exact denoiser in its own basis, and the study end to end."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.covariance import class_directions, data_covariance, load_covariance, save_covariance, within_class
from dit_jax.images import ImageSet
from dit_jax.transforms import doubled
from experiments import cli
from experiments.frame.eigenmodes import fine_directions
from experiments.frame.estimator import commitment_of
from experiments.frame.exact import exact_statistics
from experiments.frame.gains import ideal_gain, measured_statistics, regression_gains
from experiments.frame.instrument import coupled_wiener, one_pass, trajectories
from experiments.frame.manifest import comparable
from experiments.frame.store import RunFolder
from experiments.frame.subject import untrained_model
from experiments.studies.compare.modes import FREQUENCIES, data_modes, ends
from ou_theory.clock import make_clock
from ou_theory.modes import Directions, dct2, rank_groups

pytestmark = pytest.mark.usefixtures("blank_figures")

SIZE, PAIRS = 4, 600
SHAPE = (SIZE, SIZE, 2)
NUMBERS = SIZE * SIZE * 2
CLOCK = make_clock(20)
COUPLINGS = np.array([0.0, 0.3], np.float32)
MODEL = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=4, prediction="v")
KINDS = ("pca", "colour", "class")


# --- a Gaussian of any covariance, whose components lie along no axis


@pytest.fixture(scope="module")
def basis():
    """Orthonormal rows, and a falling variance along each."""
    rng = np.random.default_rng(0)
    return np.linalg.qr(rng.standard_normal((NUMBERS, NUMBERS)))[0].T, 30.0 * 0.75 ** np.arange(NUMBERS)


def directions(rows, index) -> Directions:
    return Directions(rows.T.reshape(*SHAPE, len(rows)).astype(np.float32), index)


def exact_denoiser(basis):
    rows, variance = basis
    return coupled_wiener(jnp.asarray(variance, jnp.float32), CLOCK, "joint", directions(rows, np.arange(NUMBERS)))


def measured(basis, groups, sampler):
    run = jax.jit(
        lambda pairs: trajectories(
            exact_denoiser(basis),
            CLOCK,
            groups,
            jnp.asarray(COUPLINGS),
            pairs,
            jnp.zeros(PAIRS, jnp.int32),
            SHAPE,
            seed=0,
            sampler=sampler,
        )
    )
    return run(jnp.arange(PAIRS))


@pytest.mark.parametrize("sampler", ["ddim", "ancestral"])
@pytest.mark.parametrize("own", [True, False], ids=["own components", "other directions"])
def test_an_exact_denoiser_agrees_with_the_recursion_to_sampling_error(basis, sampler, own):
    """In the basis of its own components each of which is one mode, and along directions that mix all of them."""
    rows, variance = basis
    count = 15
    chosen = rows[:count] if own else np.linalg.qr(np.random.default_rng(1).standard_normal((NUMBERS, count)))[0].T
    groups = directions(chosen, rank_groups(count))
    share = np.square(rows @ chosen.T) @ groups.averaging
    found, eta = measured(basis, groups, sampler), float(sampler == "ancestral")
    energy, inner = exact_statistics(ideal_gain(COUPLINGS), variance, share, CLOCK, eta)
    stored = np.asarray(found["energy"], np.float64)[..., 1].mean(1)
    along = np.asarray(found["projection"], np.float64)
    for value, theory in ((np.asarray(found["energy"], np.float64)[..., 1], energy), (along, inner)):
        error = value.std(1) / np.sqrt(PAIRS)
        assert np.all(np.abs(value.mean(1) - theory) < 5 * error + 1e-4 * np.abs(theory).max())
    with jax.enable_x64(True):
        network, recursion = (
            commitment_of(e, CLOCK.log_snr, inner=i, stochastic=bool(eta), ends=(0, 3))
            for e, i in ((stored, along.mean(1)), (energy, inner))
        )
    np.testing.assert_allclose(network.tau, recursion.tau, atol=0.2)
    assert np.ptp(recursion.tau[0]) > (1.5 if own else 0)


def test_one_component_has_no_sampling_error_under_ddim(basis):
    """Its amplitude goes from the noise to the end by known factors, so that relative energies are the theory's."""
    rows, variance = basis
    groups = directions(rows[:4], np.arange(4))
    stored = np.asarray(measured(basis, groups, "ddim")["energy"], np.float64)[..., 1].mean(1)
    energy, _ = exact_statistics(ideal_gain(COUPLINGS), variance[:4], np.eye(4), CLOCK)
    np.testing.assert_allclose(stored / stored[:1, -1:], energy / energy[:1, -1:], rtol=2e-3, atol=1e-6)


def test_groups_by_variance_return_the_gains_of_their_modes(basis):
    rows, variance = basis
    groups = directions(rows[:15], rank_groups(15))
    fine = fine_directions(groups, variance[:15])
    assert list(fine.count) == [1, 1, 1, 1, 1, 1, 1, 2, 1, 1, 2, 1, 1]
    states = measured(basis, groups, "ddim")["states"]
    run = partial(one_pass, exact_denoiser(basis), CLOCK, fine)
    found = jax.jit(lambda states: run(jnp.asarray(COUPLINGS), states, jnp.zeros(PAIRS, jnp.int32)))(states)
    gains = regression_gains(*(np.asarray(found[name], np.float64).mean(axis) for name, axis in _MEANS))
    single = np.flatnonzero(fine.count == 1)
    mode = [int(np.flatnonzero(fine.averaging[:, group])[0]) for group in single]
    wiener = variance[mode] / (variance[mode] + CLOCK.sigma[:, None] ** 2)
    expected = ideal_gain(COUPLINGS)[:, None, None] * wiener
    np.testing.assert_allclose(gains.gain[..., single], expected, rtol=2e-3, atol=1e-6)
    energy, _ = measured_statistics(gains, fine.share(), CLOCK, 0.0)
    stored = np.asarray(measured(basis, groups, "ddim")["energy"], np.float64)[0, ..., 1].mean(0)
    np.testing.assert_allclose(energy[0], stored, rtol=2e-3)  # uncoupled energies: an identity


_MEANS = (("energy", 1), ("product", 1), ("state", 0))


# --- directions of training data


@pytest.fixture(scope="module")
def images() -> ImageSet:
    """Four classes of smooth coloured images whose means differ, 40 each."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(4), 40).astype(np.int32)
    coarse = (
        rng.normal(0, 18, (160, 2, 2, 3)) + rng.normal(0, 25, (160, 2, 2, 1)) + rng.normal(0, 12, (4, 2, 2, 3))[labels]
    )
    fine = coarse.repeat(4, 1).repeat(4, 2) + rng.normal(0, 4, (160, 8, 8, 3))
    pixels = np.clip(128 + fine, 0, 255).astype(np.uint8)
    return ImageSet(pixels, labels, tuple("abcd"), np.full(3, 0.5), 0.2, "digest")


@pytest.fixture(scope="module")
def weights(images, tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_model(untrained_model(MODEL, 5), folder, extra={"data": None})
    save_covariance(folder, data_covariance(images))
    return str(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_have_the_variance_that_the_data_have_along_them(kind, images, weights):
    """Directly from the images; and what of each component lies along them adds up to it."""
    found, stored = data_modes(kind, weights), load_covariance(weights)
    assert stored is not None
    rows = np.asarray(found.directions.matrix, np.float64).reshape(stored.variance.size, -1).T
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=2e-3)
    x, labels = doubled(images), np.concatenate([images.labels] * 2)
    direct = np.einsum("mi,ij,mj->m", rows, within_class(x, labels), rows)
    np.testing.assert_allclose(found.variance, direct, rtol=0.02, atol=2e-4)
    members = found.directions.index[:, None] == np.arange(len(found.names))
    np.testing.assert_allclose(stored.variance @ found.share, direct @ members, rtol=0.02, atol=2e-3)
    np.testing.assert_allclose(found.share.sum(0), found.directions.count, rtol=0.01)
    assert len(found.names) == len(found.directions)


def test_groups_are_named_by_rank_or_colour(weights):
    assert data_modes("pca", weights).names == ["1", "2–3", "4–7", "8–15", "16–31", "32–63"]
    assert data_modes("class", weights).names == ["1", "2–3"]
    names = data_modes("colour", weights).names
    assert names[:4] == [f"luminance {frequency}" for frequency in FREQUENCIES]
    first, last = ends("colour", len(names))
    assert (names[first], names[last]) == ("luminance low", "chrominance low")
    assert ends("pca", 6) == (0, 5)
    assert ends("dct", 7) == (1, 6)


def test_luminance_is_what_the_channels_share(images, weights):
    """The images have more of it than of the rest, and a grey image has nothing else."""
    found = data_modes("colour", weights)
    by_group = found.variance @ found.directions.averaging
    half = len(FREQUENCIES)
    assert np.all(by_group[:2] > 2 * by_group[half : half + 2])
    grey = np.repeat(np.random.default_rng(0).standard_normal((8, 8, 1)), 3, -1).astype(np.float32)
    energy = np.asarray(found.directions.mean(jnp.square(found.directions.coefficients(dct2(jnp.asarray(grey))))))
    assert np.all(energy[half:] < 0.02 * energy[:half].max())


def test_class_directions_span_the_class_means(images, weights):
    stored = load_covariance(weights)
    assert stored is not None
    apart = stored.class_mean - stored.class_mean.mean(0)
    rows = class_directions(stored.class_mean)
    assert len(rows) == 3
    np.testing.assert_allclose(apart @ rows.T @ rows, apart, atol=1e-5)
    between = np.square(apart @ rows.T).sum(0)
    assert np.all(np.diff(between) < 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_without_directions_is_told_how_to_get_them(kind, images, tmp_path, capsys):
    folder = tmp_path / "old"
    save_model(untrained_model(MODEL, 5), folder, extra={"data": None})
    command = ["compare", "--weights", str(folder), "--modes", kind, "--out", str(tmp_path / "run"), "--quiet"]
    assert cli.main(command) == 2
    assert f"syncgap covariance {folder} IMAGES" in capsys.readouterr().err
    old = data_covariance(images)._replace(
        components=None, class_mean=None, class_share=None, colour_axes=None, colour_share=None
    )
    save_covariance(folder, old)
    assert cli.main(command) == 2
    assert "older version" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_data_without_such_directions_are_refused(images, tmp_path):
    two = images.labels < 2
    few = replace(images, pixels=images.pixels[two], labels=images.labels[two], class_names=("a", "b"))
    save_covariance(tmp_path, data_covariance(few))
    with pytest.raises(ValueError, match="three classes of different means; these data have 2"):
        data_modes("class", str(tmp_path))
    grey = replace(images, pixels=images.pixels[..., :1], mean=np.full(1, 0.5))
    save_covariance(tmp_path, data_covariance(grey))
    with pytest.raises(ValueError, match="three channels; these have 1"):
        data_modes("colour", str(tmp_path))


# --- the study


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_study_runs_in_other_modes(kind, weights, tmp_path):
    flags = ["--couplings", "0", "0.3", "1", "--pairs", "4", "--steps", "8", "--block", "2", "--gain-pairs", "2"]
    out = tmp_path / "run"
    command = ["compare", "--weights", weights, "--modes", kind, "--out", str(out), *flags]
    assert cli.main([*command, "--untrained-pairs", "2", "--quiet"]) == 0
    run, expected = RunFolder.open(out), data_modes(kind, weights)
    network, analysis = run.load("network"), run.load("analysis")
    assert list(network.band_name.values) == list(analysis.band_name.values) == expected.names
    assert "radius" not in network.coords
    assert np.isfinite(network.energy).all()
    of = network.coefficient_energy.isel(pair=0).values @ expected.directions.averaging
    np.testing.assert_allclose(
        of, network.energy.sel(parity="difference").isel(coupling=0, pair=0), rtol=1e-4, atol=1e-6
    )
    first, last = ends(kind, len(expected.names))
    tau = analysis.tau.sel(source="network").isel(coupling=0).values
    assert analysis.gap.sel(source="network").values[0] == pytest.approx(tau[last] - tau[first])
    assert analysis.theory.values[-1] == "data covariance"
    text = (out / "report.html").read_text()
    assert "above DC" not in text
    assert all(name in text for name in expected.names)


def test_settings_of_older_runs_are_those_of_the_dct():
    new, old = ({"settings": {"seed": 0, **more}} for more in ({"modes": "dct"}, {}))
    assert comparable(old) == comparable(new)
    assert comparable({"settings": {"seed": 0, "modes": "pca"}}) != comparable(new)
