"""One Gaussian and a network: laws of explained variance, the exact denoiser, and the study end to end."""

import json
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from sharing import assert_shared

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.covariance import DataCovariance, save_covariance
from experiments import cli
from experiments.frame import bench
from experiments.frame.draws import packed
from experiments.frame.store import RunFolder
from experiments.frame.subject import load_network, load_subject, untrained_model
from experiments.studies.gaussianity.analysis import explained, extreme
from experiments.studies.gaussianity.law import closed_form, denoised, gaussians, rebuilt
from experiments.studies.gaussianity.measure import GaussianityInstrument, Photographs, check, level_steps
from experiments.studies.gaussianity.settings import (
    BANDS,
    COEFFICIENTS,
    COVARIANCE,
    GAUSSIANS,
    REVERSED,
    WHITE,
    GaussianityConfig,
)  # fmt: skip
from experiments.studies.gaussianity.study import STUDY
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands

pytestmark = pytest.mark.usefixtures("blank_figures")

SIZE, CHANNELS, LEADING = 8, 3, 63
NUMBERS = SIZE * SIZE * CHANNELS
BY = radial_bands(SIZE, SIZE, 6)
SIGMA = np.array([0.1, 0.3, 1.0, 3.0, 10.0])
MODEL = DiTConfig(input_size=SIZE, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=3, prediction="v")


def covariance(correlated: float, seed: int = 0) -> tuple[DataCovariance, np.ndarray]:
    """Data whose variance falls with frequency and differs between colours, and their covariance (n, n)."""
    rng = np.random.default_rng(seed)
    radius = np.hypot(*np.indices((SIZE, SIZE)))
    spread = np.sqrt(np.repeat(20.0 / (1 + radius.reshape(-1)) ** 2.5, CHANNELS) * np.tile([1.5, 0.3, 0.05], SIZE**2))
    mixing = np.kron(np.eye(SIZE * SIZE), np.linalg.qr(rng.standard_normal((CHANNELS, CHANNELS)))[0])
    across = np.linalg.qr(np.eye(NUMBERS) + correlated * rng.standard_normal((NUMBERS, NUMBERS)))[0]
    root = across @ mixing * spread
    full = root @ root.T
    variance, axes = np.linalg.eigh(full)
    blocks = full.reshape(SIZE * SIZE, CHANNELS, SIZE * SIZE, CHANNELS)
    own = blocks[np.arange(SIZE**2), :, np.arange(SIZE**2)].reshape(SIZE, SIZE, CHANNELS, CHANNELS)
    about = {"data": {}, "images": 1000}
    means = rng.standard_normal((3, NUMBERS))
    kept = axes[:, ::-1][:, :LEADING].T
    return DataCovariance(variance[::-1], np.zeros((NUMBERS, 7)), own, about, components=kept, class_mean=means), full


@pytest.fixture(scope="module")
def laws():
    found, full = covariance(0.02)
    return gaussians(found, BY, full=full)


def shares(laws) -> dict[str, np.ndarray]:
    """Of the denoiser over all coefficients, by noise level, in closed form."""
    found, weight = closed_form(laws, SIGMA, BY), BY.count / BY.count.sum()
    whole = 1 - found["error"] @ weight / (found["variance"] @ weight)
    return dict(zip(GAUSSIANS, whole, strict=True))


# --- laws


def test_a_finer_gaussian_never_explains_less_and_a_reversed_spectrum_clearly_less(laws):
    """Each is the best linear denoiser of its form, and the forms contain each other (docs/theory.md, 9.6)."""
    found = shares(laws)
    np.testing.assert_allclose(found[COVARIANCE], 1, rtol=1e-9)
    for finer, coarser in ((COVARIANCE, COEFFICIENTS), (COEFFICIENTS, BANDS), (BANDS, WHITE)):
        assert np.all(found[finer] > found[coarser])
    assert np.all(found[REVERSED] < found[BANDS] - 0.01)
    assert np.all(found[REVERSED][SIGMA >= 1] < 0.3)


def test_the_closed_form_is_the_mean_over_noised_draws(laws):
    """And the explained share of the draws of a Gaussian's own denoiser is 1."""
    rng, pairs, sigma = np.random.default_rng(1), 1500, 0.7
    root = laws.basis[0] * np.sqrt(laws.variance[0])
    clean = rng.standard_normal((2, pairs, NUMBERS)) @ root.T
    labels = jnp.asarray(np.arange(pairs) % 3)
    y = clean + laws.mean[np.asarray(labels)] + sigma * rng.standard_normal(clean.shape)
    each = np.asarray(denoised(laws, jnp.asarray(y, jnp.float32), jnp.float32(sigma**2), labels, slice(None)))
    squares = np.square(each - each[:1]).mean((1, 2))
    channels = np.repeat(BY.index.reshape(-1), CHANNELS)
    found = np.stack([squares[:, channels == b].mean(1) for b in range(len(BY))], 1)
    expected = closed_form(laws, np.array([sigma]), BY)
    np.testing.assert_allclose(found, expected["error"][:, 0], rtol=0.15, atol=1e-9)
    apart = np.square((each[0, 0] - each[0, 1]) / np.sqrt(2)).mean(0)
    variance = np.array([apart[channels == b].mean() for b in range(len(BY))])
    np.testing.assert_allclose(variance, expected["variance"][0], rtol=0.2)
    np.testing.assert_allclose(explained(found[0], found[0], variance, variance), 1, atol=1e-9)


def test_what_a_folder_keeps_is_the_covariance_where_coefficients_are_uncorrelated():
    found, full = covariance(0.0)
    axes, variance = rebuilt(found)
    np.testing.assert_allclose(axes.T @ axes, np.eye(NUMBERS), atol=1e-9)
    np.testing.assert_allclose((axes * variance) @ axes.T, full, atol=1e-9)


def test_what_a_folder_keeps_is_better_than_coefficients_alone_where_they_are_correlated():
    found, full = covariance(0.2)
    assert found.components is not None
    axes, variance = rebuilt(found)
    np.testing.assert_allclose(axes[:, :LEADING] * np.sign((axes[:, :LEADING].T * found.components).sum(1)),
                               found.components.T, atol=1e-9)  # fmt: skip
    assert np.all(np.diff(variance[:LEADING]) <= 0)
    blocks = gaussians(found, BY, full=full)
    alone = (blocks.basis[1] * blocks.variance[1]) @ blocks.basis[1].T
    assert np.linalg.norm((axes * variance) @ axes.T - full) < 0.2 * np.linalg.norm(alone - full)


def test_the_worst_of_several_has_the_interval_of_the_worst():
    """The smallest by estimate is well known, another may lie far below; of equal numbers each may be the smallest."""
    rng = np.random.default_rng(3)
    draws = np.array([0.90, 0.91, 0.99]) + np.array([0.001, 0.05, 0.2]) * rng.standard_normal((4000, 3))
    values = np.concatenate([[[0.90, 0.91, 0.99]], draws])
    point, low, high = extreme(values, 0.95, np.min)
    alone = [packed(values[:, [i]], 1 - 0.05 / 3)[0] for i in range(3)]
    assert point == 0.90
    assert low == alone[2][1] < alone[1][1] < alone[0][1]
    assert high == alone[0][2]
    np.testing.assert_allclose(extreme(-values, 0.95, np.max), [-point, -high, -low], rtol=1e-12)
    equal = np.concatenate([np.zeros((1, 5)), rng.standard_normal((4000, 5))])
    assert np.mean(equal[1:].min(1) < extreme(equal, 0.95, np.min)[1]) < 0.05


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder with a network, `tiny`, that has the covariance of its data, and with `images` of its classes."""
    root = tmp_path_factory.mktemp("gaussianity")
    save_model(untrained_model(MODEL, 5), root / "tiny", extra={"data": None})
    found, _ = covariance(0.02)
    rest = {"class_share": np.zeros((NUMBERS, 2)), "colour_axes": np.eye(3), "colour_share": np.zeros((NUMBERS, 7, 3))}
    save_covariance(root / "tiny", found._replace(**rest))
    rng = np.random.default_rng(2)
    for name in "abc":
        (root / "images" / name).mkdir(parents=True)
        for i in range(8):
            coarse = np.clip(120 + 40 * rng.standard_normal((4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((SIZE, SIZE)).save(root / "images" / name / f"{i}.png")
    return root


def fast(tiny, **more) -> GaussianityConfig:
    given = {"pairs": 4, "untrained_pairs": 2, "block": 2, "steps": "4", "noise": (0.2, 1.0)}
    return GaussianityConfig(weights=str(tiny / "tiny"), **(given | more))


# --- settings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise": ()}, "noise must be finite"),
        ({"noise": (1.0, 0.5)}, "increase"),
        ({"noise": (0.0, 1.0)}, "> 0"),
        ({"guidance": 4.0}, "leave it at 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        GaussianityConfig(**change)


def test_noise_that_training_never_saw_is_refused():
    clock = make_clock(1000)
    np.testing.assert_allclose(clock.sigma[level_steps(clock, tuple(SIGMA))], SIGMA, rtol=0.02)
    with pytest.raises(ValueError, match="noise 1000 is beyond"):
        level_steps(clock, (1.0, 1000.0))


def test_a_network_without_the_covariance_of_its_data_is_refused(weights):
    with pytest.raises(ValueError, match="syncgap covariance"):
        check(GaussianityConfig(weights=weights), load_subject(weights))


def test_images_of_another_network_are_refused_before_there_is_a_folder(tiny, tmp_path, capsys):
    for i, name in enumerate("ab"):
        (tmp_path / "two" / name).mkdir(parents=True)
        Image.fromarray(np.full((SIZE, SIZE, 3), 99 * i, np.uint8)).save(tmp_path / "two" / name / "0.png")
    weights = str(tiny / "tiny")
    for images, said in (("two", "other images"), ("none", "none")):
        options = ["--weights", weights, "--images", str(tmp_path / images), "--out", str(tmp_path / "run"), "--quiet"]
        assert cli.main(["gaussianity", *options]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_control_sees_the_networks_own_images_and_the_network_is_loaded_once(tiny, tmp_path, monkeypatch):
    """It is measured after the network has left the memory, at images that the network has drawn before."""
    loaded, seen = [], []
    original = GaussianityInstrument.network

    def network(self, model, images, pairs, labels):
        seen.append((list(pairs), np.asarray(images)))
        return original(self, model, images, pairs, labels)

    monkeypatch.setattr(GaussianityInstrument, "network", network)
    monkeypatch.setattr(bench, "load_network", lambda *given: loaded.append(1) or load_network(*given))
    monkeypatch.setattr(bench, "SMALL", 0)  # so that the memory holds one model at a time
    config = fast(tiny, untrained_pairs=3, noise=(1.0,))
    STUDY.measure(bench.Bench("gaussianity", config, tmp_path / "run", definitions=STUDY.definitions))
    assert len(loaded) == 1
    assert [pairs for pairs, _ in seen] == [[0, 1], [2, 3], [0, 1], [2]]
    for (_, own), (pairs, control) in zip(seen[:2], seen[2:], strict=True):
        np.testing.assert_allclose(control, own[:, : len(pairs)], atol=1e-5)


@pytest.mark.long
def test_runs_of_other_seeds_and_classes_share_programs_and_measure_what_they_do_alone(tiny, tmp_path):
    config = fast(tiny, pairs=2, images=str(tiny / "images"))
    other = replace(config, seed=2**32 - 1, classes=(2, 1))
    assert_shared(STUDY, config, other, tmp_path, ("network", "untrained", "exact", "photographs"))


# --- the study


@pytest.fixture(scope="module")
def finished(tiny):
    flags = ["--weights", str(tiny / "tiny"), "--pairs", "6", "--untrained-pairs", "2", "--block", "3", "--steps", "4"]
    flags += ["--images", str(tiny / "images")]
    assert cli.main(["gaussianity", *flags, "--noise", "0.2", "1", "10", "--out", str(tiny / "run"), "--quiet"]) == 0
    return RunFolder.open(tiny / "run")


@pytest.mark.long
def test_the_exact_denoiser_is_explained_wholly_and_an_untrained_network_is_not(finished):
    analysis = finished.load("analysis")
    own = analysis.whole.sel(gaussian=COVARIANCE, bound="estimate")
    np.testing.assert_allclose(own.sel(source="exact"), 1, atol=1e-5)
    np.testing.assert_allclose(own.sel(source="exact, theory"), 1, atol=1e-5)
    assert np.all(own.sel(source="untrained", quantity="denoiser") < 0.9)
    bands = analysis.whole.sel(gaussian=BANDS, quantity="denoiser")
    assert np.all(bands.sel(source="exact").isel(bound=0) < 0.99)


@pytest.mark.long
def test_noised_photographs_stand_beside_noised_samples(finished):
    """With the images the covariance is that of these, whatever the folder holds."""
    analysis, data = finished.load("analysis"), finished.load("data")
    assert np.isfinite(analysis.whole.sel(source="photographs", bound="estimate")).all()
    assert not np.allclose(finished.load("photographs").variance, finished.load("network").variance)
    total = (data.band_variance.values * BY.count).sum() / BY.count.sum()
    assert 0.5 < total <= 1  # standardised images, within classes


@pytest.mark.long
def test_the_page_has_its_claims_and_the_published_numbers(finished):
    claims = json.loads((finished.path / "claims.json").read_text())["claims"]
    assert [claim["title"] for claim in claims] == [
        "One Gaussian explains nine tenths of the denoiser at every noise level",
        "A band is one Gaussian mode",
    ]
    untrained = claims[0]["controls"][0]
    assert untrained["name"] == "untrained network"
    assert untrained["also_holds"] is False
    text = (finished.path / "report.html").read_text()
    assert "0.9996" in text
    assert "0.913" not in text.split("Beside the published numbers")[1].split("</table>")[0]  # 4 was not run


def test_a_pair_of_photographs_is_two_of_its_class():
    labels = np.repeat([0, 1, 2], 5)
    photographs = Photographs(np.arange(15, dtype=np.float32).reshape(15, 1, 1, 1), labels)
    pairs, wanted = np.arange(12), np.arange(12) % 3
    found = photographs.pairs(0, pairs, wanted)[..., 0, 0, 0].astype(int)
    assert found.shape == (2, 12)
    assert np.all(labels[found] == wanted)
    assert np.all(found[0] != found[1])
    np.testing.assert_array_equal(photographs.pairs(0, pairs[4:6], wanted[4:6])[..., 0, 0, 0], found[:, 4:6])
