"""One Gaussian and a network: laws of explained variance, the exact denoiser, and the study end to end."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.covariance import DataCovariance, save_covariance
from experiments import cli
from experiments.frame.store import RunFolder
from experiments.frame.subject import load_subject, untrained_model
from experiments.studies.gaussianity.analysis import explained
from experiments.studies.gaussianity.law import closed_form, denoised, gaussians, rebuilt
from experiments.studies.gaussianity.measure import Photographs, check, level_steps
from experiments.studies.gaussianity.settings import (
    BANDS,
    COEFFICIENTS,
    COVARIANCE,
    GAUSSIANS,
    PUBLISHED,
    REVERSED,
    WHITE,
    GaussianityConfig,
)  # fmt: skip
from ou_theory.clock import make_clock
from ou_theory.modes import radial_bands

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


def test_published_numbers_agree_with_each_other():
    """Both lists miss the same error, so they tell the denoiser's variance, which is at most that of the data and rises
    with falling noise; exchanged they do not."""
    level = np.array(list(PUBLISHED))
    score, denoiser = np.array(list(PUBLISHED.values())).T
    spread = (1 - score) * level**2 / (1 - denoiser)  # of the denoiser, if the score is nearly all noise
    assert np.all((spread[2:] > 0.5) & (spread[2:] < 1))
    exchanged = (1 - denoiser) * level**2 / (1 - score)
    assert np.all(exchanged[2:] > 10)


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


# --- the study


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
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
    flags = ["--weights", str(root / "tiny"), "--pairs", "6", "--untrained-pairs", "2", "--block", "3", "--steps", "4"]
    flags += ["--images", str(root / "images")]
    assert cli.main(["gaussianity", *flags, "--noise", "0.2", "1", "10", "--out", str(root / "run"), "--quiet"]) == 0
    return RunFolder.open(root / "run")


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


def test_draws_and_noise_have_keys_of_their_own():
    from experiments.frame.streams import stream

    keys = [stream(0, "clean states", 0), stream(0, "clean states", 1, 0), stream(0, "noised ends")]
    assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 3
