"""Transformed training data: each transformation has the statistics that its name promises, and a run records it."""

import json
from functools import cache

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit_jax.checkpoint import load_manifest
from dit_jax.config import DiTConfig
from dit_jax.images import DataError, ImageSet, load_images, standardize
from dit_jax.training import Photographs, TrainConfig, train
from dit_jax.transforms import (
    CHUNK,
    TransformedImages,
    covariance_by_coefficient,
    doubled,
    mirrored_rank,
    power_variance,
    squared_radius,
    training_data,
    transformation_name,
)
from experiments.cli import main
from experiments.studies.solvable.data import SolvableData
from experiments.tools.info import describe
from ou_theory.modes import dct2, idct2

SIZE, COUNT = 8, 700  # twice the count is more than a chunk, and no multiple of it
POWERS = ("power:-3", "power:0", "power:1.5", "power:3")
WHITENING = ("whitened", "reversed", *POWERS)
ALL = (*WHITENING, "permuted", "gaussian")
assert CHUNK < 2 * COUNT


def image_set(pixels: np.ndarray, labels: np.ndarray, digest: str = "digest") -> ImageSet:
    scaled = pixels / 127.5 - 1
    mean = scaled.mean((0, 1, 2))
    return ImageSet(pixels, labels, ("a", "b"), mean, float(np.sqrt(((scaled - mean) ** 2).mean())), digest)


def colours(rng: np.random.Generator, count: int) -> np.ndarray:
    """Images with a falling spectrum, colours that are correlated otherwise at each frequency, a mean image without
    mirror symmetry, and a contrast that differs widely between images, as photographs have it: (count, 8, 8, 3) uint8.
    """
    radius = np.sqrt(squared_radius(SIZE))
    mix = np.eye(3) + 0.8 * rng.random((SIZE, SIZE, 3, 3))
    coefficients = np.einsum("ijcd,nijd->nijc", mix, rng.standard_normal((count, SIZE, SIZE, 3)))
    coefficients /= np.maximum(radius, 1)[..., None]
    contrast = np.exp(0.7 * rng.standard_normal((count, 1, 1, 1)))
    ramp = np.linspace(-0.5, 0.5, SIZE)[:, None]
    x = np.asarray(idct2(coefficients * contrast)) + ramp[:, None] + ramp
    return np.clip(np.round(30 * x + 120), 0, 255).astype(np.uint8)


@cache
def images() -> ImageSet:
    rng = np.random.default_rng(0)
    return image_set(colours(rng, COUNT), rng.integers(0, 2, COUNT).astype(np.int32))


@cache
def made(name: str) -> TransformedImages:
    data = training_data(images(), name)
    assert isinstance(data, TransformedImages)
    return data


def by_rank() -> list[tuple[int, int]]:
    """Coefficients by radius, ties by flat index; written out apart from the code under test."""
    pairs = [(i, j) for i in range(SIZE) for j in range(SIZE)]
    return sorted(pairs, key=lambda pair: (pair[0] ** 2 + pair[1] ** 2, SIZE * pair[0] + pair[1]))


def kurtosis(x: np.ndarray) -> float:
    """Mean over coefficients and channels of the fourth standardised moment; 3 for a Gaussian."""
    c = np.asarray(dct2(x), np.float64)
    c = c - c.mean(0)
    return float(((c**4).mean(0) / (c**2).mean(0) ** 2).mean())


def test_covariance_by_coefficient_is_numpys_of_the_projects_dct():
    x = doubled(images())
    c = np.asarray(dct2(x), np.float64)
    found = covariance_by_coefficient(x)
    assert found.shape == (SIZE, SIZE, 3, 3)
    for i, j in ((0, 0), (0, 1), (3, 2), (7, 7)):
        np.testing.assert_allclose(found[i, j], np.cov(c[:, i, j].T, bias=True), rtol=1e-5, atol=1e-6)
    assert np.ptp(found[..., 0, 1] / found[..., 0, 0]) > 0.1  # the colours are not correlated alike, so tests can tell
    for bad in (x[0], x[:0]):
        with pytest.raises(ValueError, match="N, H, W, C"):
            covariance_by_coefficient(bad)


@pytest.mark.parametrize("name", WHITENING)
def test_the_mean_is_zero(name):
    assert abs(doubled(images()).mean(0)).max() > 0.1
    np.testing.assert_allclose(made(name).x.mean(0, dtype=np.float64), 0, atol=1e-6)


@pytest.mark.parametrize("name", ["whitened", "power:0"])
def test_whitened_has_unit_covariance_in_every_coefficient(name):
    unit = np.broadcast_to(np.eye(3), (SIZE, SIZE, 3, 3))
    np.testing.assert_allclose(covariance_by_coefficient(made(name).x), unit, atol=2e-6)


def test_whitening_turns_no_colour():
    """The symmetric root: of all whitened colours those nearest to the colours themselves."""
    before, after = (np.asarray(dct2(x), np.float64) for x in (doubled(images()), made("whitened").x))
    for i, j in ((0, 0), (1, 2), (5, 5)):
        cross = after[:, i, j].T @ (before[:, i, j] - before[:, i, j].mean(0))
        np.testing.assert_allclose(cross, cross.T, atol=1e-4 * abs(cross).max())
        assert np.linalg.eigvalsh(cross)[0] > 0


def test_reversed_has_the_covariance_of_mirrored_rank():
    natural, turned = covariance_by_coefficient(doubled(images())), covariance_by_coefficient(made("reversed").x)
    order = by_rank()
    for here, there in zip(order, reversed(order), strict=True):
        np.testing.assert_allclose(turned[here], natural[there], rtol=1e-5, atol=1e-6)
    assert np.trace(natural[0, 0]) > 10 * np.trace(turned[0, 0])
    np.testing.assert_allclose(np.trace(turned.sum((0, 1))), np.trace(natural.sum((0, 1))), rtol=1e-6)


@pytest.mark.parametrize("name", POWERS)
def test_power_has_the_slope_of_its_exponent(name):
    exponent = float(name[6:])
    covariance = covariance_by_coefficient(made(name).x)
    variance = np.trace(covariance, axis1=-2, axis2=-1) / 3
    unit = variance[..., None, None] * np.eye(3)
    np.testing.assert_allclose(covariance, unit, atol=1e-5 * variance.max())
    radius = np.maximum(np.hypot(*np.mgrid[:SIZE, :SIZE]), 1)
    slope, _ = np.polyfit(np.log(radius).ravel(), np.log(variance).ravel(), 1)
    np.testing.assert_allclose(slope, -exponent, atol=1e-4)
    np.testing.assert_allclose(variance * radius**exponent, variance[0, 0], rtol=1e-4)
    np.testing.assert_allclose(variance.mean(), 1, rtol=1e-5)


def test_power_0_is_whitened():
    np.testing.assert_array_equal(made("power:0").x, made("whitened").x)


@pytest.mark.parametrize("name", ["whitened", "reversed", "power:1.5"])
def test_the_set_is_closed_under_mirroring(name):
    x = made(name).x
    np.testing.assert_allclose(x[COUNT:], x[:COUNT, :, ::-1], atol=1e-5)
    assert abs(x - x[:, :, ::-1]).max() > 1


def test_permuted_moves_all_sites_of_all_images_alike():
    before, after = (x.reshape(2 * COUNT, SIZE**2, 3) for x in (doubled(images()), made("permuted").x))
    columns = {before[:, site].tobytes(): site for site in range(SIZE**2)}
    order = [columns[after[:, site].tobytes()] for site in range(SIZE**2)]  # a KeyError if a site is none of them
    assert sorted(order) == list(range(SIZE**2))
    assert sum(a == b for a, b in enumerate(order)) < SIZE
    assert np.any(after[COUNT:] != made("permuted").x[:COUNT, :, ::-1].reshape(COUNT, SIZE**2, 3))  # hence no flips
    eigenvalues = [np.linalg.eigvalsh(np.cov(x.reshape(2 * COUNT, -1).T)) for x in (before, after)]
    np.testing.assert_allclose(eigenvalues[1], eigenvalues[0], rtol=1e-6, atol=1e-9)


def test_the_permutation_does_not_depend_on_the_images():
    sites = np.arange(SIZE**2, dtype=np.uint8).reshape(1, SIZE, SIZE, 1)
    orders = []
    for factor in (1, 3):
        pixels = np.repeat(factor * sites, 3, -1)
        x = training_data(image_set(pixels, np.zeros(1, np.int32)), "permuted").batch(TrainConfig(batch_size=2), 0)[0]
        orders.append(np.sort(np.argsort(x[..., 0].reshape(2, -1)), axis=0))
    np.testing.assert_array_equal(*orders)


def test_gaussian_has_the_sets_mean_and_covariance_within_standard_errors():
    source, draws = (x.reshape(len(x), -1).astype(np.float64) for x in (doubled(images()), made("gaussian").x))
    assert draws.shape == (COUNT, 3 * SIZE**2)
    covariance = np.cov(source.T, bias=True)
    variance = np.diag(covariance)
    z = (draws.mean(0) - source.mean(0)) / np.sqrt(variance / COUNT)
    assert abs(z).max() < 4.5  # of 192 standard normal numbers
    centred = draws - source.mean(0)
    error = np.sqrt((np.outer(variance, variance) + covariance**2) / COUNT)
    z = (centred.T @ centred / COUNT - covariance) / error
    assert abs(z).max() < 6  # of 18 528
    assert 0.9 < z[np.triu_indices(len(z))].std() < 1.1
    assert (abs(covariance) / error > 6).mean() > 0.05  # there are covariances to miss


def test_gaussian_has_no_more_than_second_order_statistics():
    error = np.sqrt(24 / COUNT)  # of one coefficient's kurtosis; the mean over 192 has less
    assert abs(kurtosis(made("gaussian").x) - 3) < 2 * error
    assert kurtosis(doubled(images())) > 3 + 10 * error
    assert kurtosis(made("whitened").x) > 3 + 10 * error  # a linear map per coefficient leaves it


def test_gaussian_draws_do_not_depend_on_how_many_there_are():
    few = image_set(images().pixels[:2].copy(), np.zeros(2, np.int32))
    twice = image_set(np.concatenate([few.pixels] * 2), np.zeros(4, np.int32))
    a, b = (training_data(each, "gaussian") for each in (few, twice))
    assert isinstance(a, TransformedImages)
    assert isinstance(b, TransformedImages)
    np.testing.assert_allclose(b.x[:2], a.x, atol=1e-4)
    assert np.all(abs(b.x[2:] - a.x).max((1, 2, 3)) > 0.01)


def test_natural_is_the_photographs():
    data, config = training_data(images()), TrainConfig(batch_size=16, seed=5)
    assert isinstance(data, Photographs)
    assert data.may_mirror
    assert data.preparation() == images().preparation()
    for step in (0, 100):
        for a, b in zip(data.batch(config, step), Photographs(images()).batch(config, step), strict=True):
            np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(
        doubled(images())[:COUNT], standardize(images().pixels, data.images.mean, data.images.std)
    )


@pytest.mark.parametrize("name", ALL)
def test_an_epoch_visits_every_image_with_its_label(name):
    data = made(name)
    count = COUNT if name == "gaussian" else 2 * COUNT
    assert data.x.shape == (count, SIZE, SIZE, 3)
    assert data.x.dtype == np.float32
    assert not data.may_mirror
    np.testing.assert_array_equal(data.labels, np.resize(images().labels, count))
    config = TrainConfig(batch_size=100)
    batches = [data.batch(config, step) for step in range(count // 100)]
    row = {image.tobytes(): label for image, label in zip(data.x, data.labels, strict=True)}
    seen = {image.tobytes(): label for x, labels in batches for image, label in zip(x, labels, strict=True)}
    assert seen == row


def test_every_record_is_another_and_is_made_again_alike():
    records = [training_data(images(), name).preparation() for name in ("natural", *ALL)]
    assert "transformation" not in records[0]
    told = [record["transformation"] for record in records[1:]]
    assert [entry["name"] for entry in told] == list(ALL)
    assert {entry["seed"] for entry in told} == {0}
    other = TransformedImages(
        image_set(images().pixels, images().labels, "another"), "whitened", *[np.zeros((2, 1))] * 2
    )
    assert len({entry["sha256"] for entry in (*told, other.preparation()["transformation"])}) == len(ALL) + 1
    again = training_data(images(), "whitened")
    assert again.preparation() == json.loads(json.dumps(made("whitened").preparation()))
    np.testing.assert_array_equal(again.batch(TrainConfig(), 1)[0], made("whitened").batch(TrainConfig(), 1)[0])
    assert {**made("gaussian").preparation(), "transformation": None} == {**records[0], "transformation": None}


def test_pictures_are_a_linear_map_to_bytes():
    level = np.linspace(-0.5, 0.5, 5, dtype=np.float32)[:, None, None, None] * np.ones((SIZE, SIZE, 3), np.float32)
    shown = made("whitened").pictures(level)
    assert shown.dtype == np.uint8
    np.testing.assert_allclose(np.diff(shown.astype(int), axis=0), 127.5 * images().std / 4, atol=1)
    np.testing.assert_allclose(shown[2, 0, 0], 127.5 * (images().mean + 1), atol=1)


@given(st.integers(1, 12))
def test_turning_the_order_round_twice_changes_nothing(size):
    values = np.arange(size**2).reshape(size, size)
    turned = mirrored_rank(values)
    np.testing.assert_array_equal(mirrored_rank(turned), values)
    radius = squared_radius(size).ravel()
    assert np.all(np.diff(radius[turned.ravel()][np.argsort(radius, kind="stable")]) <= 0)


@given(st.integers(1, 32), st.floats(-6, 6))
def test_powers_are_1_on_average_and_have_their_ratio(size, exponent):
    variance = power_variance(size, exponent)
    np.testing.assert_allclose(variance.mean(), 1)
    far = max(np.hypot(size - 1, size - 1), 1)
    np.testing.assert_allclose(variance[-1, -1] / variance[0, 0], far**-exponent, rtol=1e-9)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_an_exponent_has_one_spelling(exponent):
    name = transformation_name(f"power:{exponent!r}")
    assert float(name[6:]) == exponent
    assert transformation_name(name) == name
    assert transformation_name(f"power: {exponent:+.17e}") == name
    assert not name.startswith("power:-0") or exponent < 0


def test_spellings():
    assert [transformation_name(f"power:{text}") for text in ("3.0", "+3", "-0.0", "15e-1")] == [
        "power:3",
        "power:3",
        "power:0",
        "power:1.5",
    ]
    assert transformation_name("gaussian") == "gaussian"


@pytest.mark.parametrize("bad", ["blurred", "", "whitened:1", "Whitened", "powers:2", "natural:"])
def test_unknown_names_are_refused_with_the_known_ones(bad):
    with pytest.raises(ValueError, match=r"natural, whitened, reversed, power:A, permuted, gaussian"):
        transformation_name(bad)


@pytest.mark.parametrize("bad", ["power", "power:", "power:A", "power:nan", "power:inf", "power:-inf", "power:1e999"])
def test_exponents_that_are_no_number_are_refused(bad):
    with pytest.raises(ValueError, match="finite"):
        transformation_name(bad)


@pytest.mark.parametrize("exponent", [40, -40, 1e308, -1e308])
def test_exponents_beyond_single_precision_are_refused(exponent):
    with pytest.raises(ValueError, match="nearer to 0"):
        training_data(images(), f"power:{exponent}")


def test_grey_images_cannot_be_whitened():
    grey = image_set(np.repeat(images().pixels[..., :1], 3, -1), images().labels)
    for name in WHITENING:
        with pytest.raises(DataError, match=rf"{name} cannot .* 64 of 64.*grey.*permuted or gaussian"):
            training_data(grey, name)
    for name in ("permuted", "gaussian"):
        x = training_data(grey, name).batch(TrainConfig(), 0)[0]
        assert np.all(np.isfinite(x))
        assert abs(x - x[..., :1]).max() < 1e-3  # they stay grey


def test_few_images_cannot_be_whitened():
    few = image_set(images().pixels[:2], images().labels[:2])
    with pytest.raises(DataError, match="very few"):
        training_data(few, "whitened")


# --- training


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("photos")
    for i, pixels in enumerate(colours(np.random.default_rng(1), 24)):
        path = root / ("wasp" if i % 2 else "ant") / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(path)
    return root


def flags(folder, out, *more):
    tiny = ["--size", "8", "--depth", "1", "--hidden-size", "16", "--num-heads", "2", "--batch-size", "4"]
    return ["train", str(folder), str(out), *tiny, "--quiet", *more]


@pytest.mark.long
def test_a_run_records_its_transformation_and_goes_on_with_no_other(folder, tmp_path, capsys):
    run, plain = tmp_path / "run", tmp_path / "plain"
    assert main(flags(folder, run, "--steps", "2", "--transform", "power:1.50")) == 0
    record, manifest = json.loads((run / "run.json").read_text()), load_manifest(run / "model")
    assert record["data"] == manifest["data"] == training_data(load_images(folder, 8, False), "power:1.5").preparation()
    assert record["data"]["transformation"]["name"] == "power:1.5"
    assert record["training"]["flip"] is False
    assert "power:1.5: whitened, then" in describe(run / "model")
    assert main(flags(folder, plain, "--steps", "2")) == 0
    record = json.loads((plain / "run.json").read_text())
    assert record["data"] == load_images(folder, 8, False).preparation()
    assert record["training"]["flip"] is True
    capsys.readouterr()
    for out, other in ((run, "power:2"), (run, "gaussian"), (run, "natural"), (plain, "whitened")):
        assert main(flags(folder, out, "--steps", "3", "--resume", "--transform", other)) == 2
        assert "data.transformation" in capsys.readouterr().err
    assert main(flags(folder, run, "--steps", "3", "--resume", "--transform", "power:1.5")) == 0
    assert main(flags(folder, plain, "--steps", "3", "--resume", "--transform", "natural")) == 0


def test_data_that_hold_their_mirror_images_are_not_mirrored(tmp_path):
    model = DiTConfig(input_size=8, in_channels=3, hidden_size=16, depth=1, num_heads=2, num_classes=2)
    with pytest.raises(ValueError, match="flip=False"):
        train(made("permuted"), model, TrainConfig(steps=1), tmp_path / "run", progress=False)
    model = DiTConfig(input_size=8, in_channels=2, hidden_size=16, depth=1, num_heads=2, num_classes=3)
    with pytest.raises(ValueError, match="flip=False"):
        train(SolvableData(), model, TrainConfig(steps=1), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_the_command_names_what_is_wrong(folder, tmp_path, capsys):
    for source, name, told in (
        (tmp_path / "nowhere", "sharpened", "natural, whitened"),  # before the images are looked for
        (folder, "power:much", "finite"),
        ("solvable", "whitened", "--transform"),
    ):
        assert main(flags(source, tmp_path / "run", "--steps", "2", "--transform", name)) == 2
        assert told in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
