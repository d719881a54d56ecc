"""Reading image sets: folder and zip alike, scaling, and bad input."""

import shutil
import zipfile

import numpy as np
import pytest
from PIL import Image

from dit_jax.images import DataError, image_grid, load_images, standardize, to_pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes, uneven image sizes and kinds, and files that are none."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, count in (("wasp", 3), ("ant", 2)):
        (root / name).mkdir()
        for i in range(count):
            pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.{'png' if i else 'jpg'}")
    (root / "ant" / "notes.txt").write_text("not an image")
    (root / "stray.png").write_bytes((root / "wasp" / "1.png").read_bytes())
    Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(root / "ant" / "grey.png")
    return root


@pytest.fixture(scope="module")
def images(folder):
    return load_images(folder, 8, progress=False)


def test_images_come_sorted_by_class_and_name(images):
    assert images.class_names == ("ant", "wasp")
    np.testing.assert_array_equal(images.labels, [0, 0, 0, 1, 1, 1])
    assert images.pixels.shape == (6, 8, 8, 3)
    assert images.pixels.dtype == np.uint8


def test_zip_and_folder_are_the_same_set(folder, images, tmp_path):
    packed = tmp_path / "set.zip"
    with zipfile.ZipFile(packed, "w") as archive:
        for path in sorted(folder.rglob("*"), reverse=True):
            if path.is_file():
                archive.write(path, path.relative_to(folder))
    other = load_images(packed, 8, progress=False)
    np.testing.assert_array_equal(other.pixels, images.pixels)
    assert other.preparation() == images.preparation()


def test_halving_averages_two_by_two_pixels(tmp_path):
    (tmp_path / "one").mkdir()
    pixels = np.random.default_rng(1).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "one" / "a.png")
    small = load_images(tmp_path, 8, progress=False).pixels[0]
    mean = pixels.reshape(8, 2, 8, 2, 3).mean((1, 3))
    assert np.abs(small - mean).max() <= 1  # rows and columns are rounded in turn


def test_labels_order_the_classes_and_nothing_else(folder, images):
    turned = load_images(folder, 8, progress=False, labels=["wasp", "ant"])
    assert turned.class_names == ("wasp", "ant")
    np.testing.assert_array_equal(turned.pixels, images.pixels)
    np.testing.assert_array_equal(turned.labels, 1 - images.labels)
    assert turned.digest != images.digest
    counts = [load_images(folder, 8, False, labels=names).preparation()["class_counts"] for names in (None, ["wasp"])]
    assert counts == [[3, 3], [3]]


def test_what_is_read_is_told_before_it_is_read(folder, tmp_path):
    copy, told = tmp_path / "copy", []
    shutil.copytree(folder, copy)
    (copy / "ant" / "0.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"ant/0\.jpg is not a readable image \(it is empty\)"):
        load_images(copy, 8, progress=False, tell=told.append)
    (said,) = told
    assert "0: ant (3), 1: wasp (3)" in said
    assert "ant/notes.txt" in said
    assert "stray.png" in said


def test_images_of_many_formats_are_one_set(folder, images, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    for name, other in (("wasp/1.png", "1.TIF"), ("wasp/2.png", "2.bmp"), ("ant/1.png", "1.ppm")):
        with Image.open(copy / name) as image:
            image.save((copy / name).with_name(other))
        (copy / name).unlink()
    assert load_images(copy, 8, progress=False).digest == images.digest


@pytest.mark.parametrize("size", [0, -3])
def test_images_have_a_side(folder, size):
    with pytest.raises(DataError, match="at least 1 pixel"):
        load_images(folder, size)


def test_more_images_than_memory_holds_are_refused(folder):
    with pytest.raises(DataError, match="more than there is"):
        load_images(folder, 2**24, progress=False)


def test_the_network_sees_mean_zero_and_variance_one(images):
    x = standardize(images.pixels, images.mean, images.std)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x.mean((0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(x.var(), 1, atol=1e-5)
    np.testing.assert_array_equal(to_pixels(x, images.mean, images.std), images.pixels)


def test_digest_tells_sets_apart(folder, images, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert load_images(copy, 8, progress=False).digest == images.digest
    (copy / "wasp" / "2.png").unlink()
    assert load_images(copy, 8, progress=False).digest != images.digest


def test_bad_sources_are_named(tmp_path, folder):
    with pytest.raises(DataError, match="no such"):
        load_images(tmp_path / "nowhere", 8)
    (tmp_path / "empty" / "class").mkdir(parents=True)
    with pytest.raises(DataError, match="no images"):
        load_images(tmp_path / "empty", 8)
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(folder / "stray.png", flat / "a.png")
    with pytest.raises(DataError, match="class folders"):
        load_images(flat, 8)
    (tmp_path / "set.zip").write_bytes(b"PK\x03\x04 and then nothing")
    with pytest.raises(DataError, match="zip"):
        load_images(tmp_path / "set.zip", 8)


def test_a_damaged_image_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    whole = (copy / "wasp" / "1.png").read_bytes()
    (copy / "wasp" / "1.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"wasp/1\.png"):
        load_images(copy, 8, progress=False)


def test_flat_images_cannot_be_scaled(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "one" / "a.png")
    with pytest.raises(DataError, match="flat"):
        load_images(tmp_path, 8, progress=False)


def test_grid_places_images_in_rows():
    images = np.stack([np.full((2, 3, 3), value, np.uint8) for value in (10, 20, 30)])
    grid = image_grid(images, 2)
    assert grid.shape == (7, 9, 3)
    assert grid[1, 1, 0] == 10
    assert grid[1, 5, 0] == 20
    assert grid[4, 1, 0] == 30
    assert grid[4, 5, 0] == 255
