"""The covariance of training data: what it is, where it is kept, and which data it is of."""

import numpy as np
import pytest
from PIL import Image
from scipy.fft import dctn

from dit_jax.checkpoint import save_model
from dit_jax.config import DiTConfig
from dit_jax.covariance import (
    FILE,
    LEADING,
    class_directions,
    covariance_for,
    data_covariance,
    load_covariance,
    save_covariance,
    within_class,
)
from dit_jax.disk import CheckpointError
from dit_jax.images import ImageSet, load_images
from dit_jax.transforms import doubled, training_data
from experiments.cli import main
from experiments.frame.subject import untrained_model
from ou_theory.modes import radial_bands

SIZE = 8
CONFIG = DiTConfig(input_size=SIZE, in_channels=3, hidden_size=8, depth=1, num_heads=2, num_classes=2, prediction="v")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of smooth images of colour that differ in their mean, 60 each."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, base in (("bright", 150), ("dark", 60)):
        (root / name).mkdir()
        for i in range(60):
            coarse = np.clip(base + 40 * rng.standard_normal((4, 4, 3)), 0, 255).astype(np.uint8)
            Image.fromarray(coarse).resize((SIZE, SIZE), Image.Resampling.BILINEAR).save(root / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def images(folder) -> ImageSet:
    return load_images(folder, SIZE, progress=False)


def test_it_is_the_covariance_within_classes_in_the_bands(images):
    found, bands = data_covariance(images), radial_bands(SIZE, SIZE, 6)
    x, labels = doubled(images), np.concatenate([images.labels] * 2)
    within = np.concatenate([x[labels == c] - x[labels == c].mean(0) for c in (0, 1)])  # classes of one size
    energy = np.square(dctn(within, axes=(1, 2), norm="ortho")).mean(0)
    expected = [energy[bands.index == b].mean() for b in range(len(bands))]
    np.testing.assert_allclose(found.band_variance(), expected, rtol=1e-5)
    np.testing.assert_allclose(found.share.sum(1), 1, rtol=1e-5)
    np.testing.assert_allclose(found.variance.sum(), energy.sum(), rtol=1e-5)
    assert np.all(np.diff(found.variance) <= 0)
    np.testing.assert_allclose(np.einsum("hwcc->hwc", found.coefficient), energy, rtol=1e-4, atol=1e-6)
    assert found.about == {"data": training_data(images).preparation(), "images": 240}


def test_the_mean_of_a_class_is_no_variance():
    x = np.zeros((6, 2, 2, 1), np.float32)
    x[3:] = 5
    np.testing.assert_allclose(within_class(x, np.array([0, 0, 0, 1, 1, 1])), 0, atol=1e-12)
    assert within_class(x, np.zeros(6, int)).trace() == pytest.approx(4 * 6.25)


def test_classes_count_alike():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((40, 2, 2, 1)).astype(np.float32)
    x[:30] *= 3
    labels = np.repeat([0, 1], [30, 10])
    both = within_class(x, labels)
    each = [within_class(x[labels == c], labels[labels == c]) for c in (0, 1)]
    np.testing.assert_allclose(both, (each[0] + each[1]) / 2, rtol=1e-12)


@pytest.mark.parametrize("name", ["permuted", "reversed"])
def test_transformed_data_have_their_own(images, name):
    natural, found = data_covariance(images), data_covariance(training_data(images, name))
    if name == "permuted":  # an orthogonal map keeps the eigenvalues
        np.testing.assert_allclose(found.variance, natural.variance, rtol=1e-3, atol=1e-5)
    low_high = [each.band_variance()[1] / each.band_variance()[-1] for each in (natural, found)]
    assert low_high[0] > 30 > 3 > low_high[1]


def test_it_comes_back_from_a_model_folder(images, tmp_path):
    save_model(untrained_model(CONFIG, 0), tmp_path / "model")
    assert load_covariance(tmp_path / "model") is None
    found = data_covariance(images)
    save_covariance(tmp_path / "model", found)
    back = load_covariance(tmp_path / "model")
    for name in ("variance", "share", "coefficient"):
        np.testing.assert_array_equal(getattr(back, name), getattr(found, name).astype(np.float32))
    assert back.about == found.about
    for damage in (b"", (tmp_path / "model" / FILE).read_bytes()[:-40], b"no archive"):
        (tmp_path / "model" / FILE).write_bytes(damage)
        with pytest.raises(CheckpointError, match=r"covariance\.npz cannot be used.*syncgap covariance"):
            load_covariance(tmp_path / "model")


BASES = ("components", "class_mean", "class_share", "colour_axes", "colour_share")


def test_components_make_the_covariance_diagonal(images):
    found = data_covariance(images)
    x, labels = doubled(images), np.concatenate([images.labels] * 2)
    inside = found.components @ within_class(x, labels) @ found.components.T
    np.testing.assert_allclose(inside, np.diag(found.variance[:LEADING]), atol=1e-6 * found.variance[0])
    rotated = np.einsum("hwcd,ca,db->ab", found.coefficient, found.colour_axes, found.colour_axes)
    np.testing.assert_allclose(rotated, np.diag(np.diag(rotated)), atol=1e-9 * rotated[0, 0])
    assert np.all(np.diff(np.diag(rotated)) < 0)


def test_directions_come_back_to_three_digits_and_fit_each_other(images, tmp_path):
    found = data_covariance(images)
    save_covariance(tmp_path, found)
    back = load_covariance(tmp_path)
    for name in BASES:
        np.testing.assert_allclose(getattr(back, name), getattr(found, name), rtol=1e-3, atol=1e-6, err_msg=name)
    apart = class_directions(back.class_mean)
    assert len(apart) == 1  # of two classes
    np.testing.assert_allclose(back.class_share[:LEADING], np.square(back.components @ apart.T), atol=2e-3)
    np.testing.assert_allclose(back.colour_share.sum(2), back.share, atol=2e-3)
    means = np.stack([doubled(images)[np.tile(images.labels, 2) == c].mean(0) for c in (0, 1)])
    expected = dctn(means, axes=(1, 2), norm="ortho").reshape(2, -1)
    np.testing.assert_allclose(back.class_mean, expected, rtol=1e-3, atol=1e-4)


def test_files_of_older_versions_are_read_and_half_a_file_is_not(images, tmp_path):
    found = data_covariance(images)
    old = found._replace(**dict.fromkeys(BASES))
    save_covariance(tmp_path, old)
    back = load_covariance(tmp_path)
    assert not back.has_bases
    with np.load(tmp_path / FILE) as stored:
        assert sorted(stored) == ["about", "coefficient", "share", "variance"]
        before = dict(stored)
    save_covariance(tmp_path, found)
    with np.load(tmp_path / FILE) as stored:
        after = dict(stored)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value)
    for wrong in ({"components": after["components"][:-1]}, {"class_share": after["class_share"][:, :0]}):
        np.savez(tmp_path / FILE, **{**after, **wrong})
        with pytest.raises(CheckpointError, match=r"do not fit.*syncgap covariance"):
            load_covariance(tmp_path)
    np.savez(tmp_path / FILE, **{name: value for name, value in after.items() if name != "colour_share"})
    with pytest.raises(CheckpointError, match=r"colour_share.*syncgap covariance"):
        load_covariance(tmp_path)


def test_classes_without_a_difference_have_no_directions():
    assert class_directions(np.ones((3, 12))).shape == (0, 12)
    assert class_directions(np.eye(3, 12)).shape == (2, 12)


def test_a_claim_of_too_many_bytes_is_refused_unread(tmp_path):
    np.savez_compressed(tmp_path / FILE, variance=np.zeros(2**23), share=np.ones((1, 7)), about="{}")
    with pytest.raises(CheckpointError, match="claims more bytes"):
        load_covariance(tmp_path)


def test_no_object_is_unpickled(tmp_path):
    np.savez(tmp_path / FILE, variance=np.array([{}], object), share=np.ones((1, 7)), coefficient=np.ones((1, 1, 1, 1)))
    with pytest.raises(CheckpointError, match="allow_pickle"):
        load_covariance(tmp_path)


def test_the_command_adds_it_and_refuses_other_images(folder, images, tmp_path, capsys):
    record = training_data(images, "reversed").preparation()
    save_model(untrained_model(CONFIG, 0), tmp_path / "model", extra={"data": record})
    assert main(["covariance", str(tmp_path / "model"), str(folder), "--quiet"]) == 0
    assert load_covariance(tmp_path / "model").about["data"] == record
    with pytest.raises(ValueError, match="trained on other images"):
        covariance_for({"data": {"sha256": "0" * 64}}, images)
    assert main(["covariance", str(tmp_path / "nothing"), str(folder), "--quiet"]) == 2
    assert "there is no folder" in capsys.readouterr().err


def test_the_command_reads_classes_in_the_order_of_the_model(folder, tmp_path, capsys):
    turned, model = load_images(folder, SIZE, progress=False, labels=["dark", "bright"]), tmp_path / "model"
    save_model(untrained_model(CONFIG, 0), model, extra={"data": turned.preparation()})
    assert main(["covariance", str(model), str(folder), "--quiet"]) == 0
    assert "0: dark (60), 1: bright (60)" in capsys.readouterr().out
    assert load_covariance(model).about["data"] == turned.preparation()
    order = tmp_path / "labels.txt"
    order.write_text("bright\ndark\n")
    assert main(["covariance", str(model), str(folder), "--quiet", "--labels", str(order)]) == 2
    said = capsys.readouterr()
    assert "0: bright (60), 1: dark (60)" in said.out
    assert "trained on other images" in said.err


def test_too_large_images_are_refused():
    data = ImageSet(np.zeros((2, 64, 64, 3), np.uint8), np.zeros(2, np.int32), ("a",), np.zeros(3), 1.0, "d")
    with pytest.raises(ValueError, match="too large"):
        data_covariance(data)
