"""The classifier: what it learns, its accuracy, the round trip of its file, and errors that name a remedy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from dit_jax.classifier import (
    Classifier,
    ClassifierError,
    accuracy,
    check_classes,
    initial_layers,
    load_classifier,
    save_classifier,
    train_classifier,
)
from dit_jax.disk import CheckpointError
from dit_jax.images import image_set, standardize
from ou_theory.keys import random_key

NAMES = ("bright", "dark")


def images(count: int, seed: int):
    """Noisy grey images, brighter ones of class 0."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count, dtype=np.int32) % 2
    level = np.where(labels == 0, 160, 90)[:, None, None, None]
    pixels = np.clip(level + rng.normal(0, 30, (count, 8, 8, 3)), 0, 255).astype(np.uint8)
    return image_set(pixels, labels, NAMES, "here")


@pytest.fixture(scope="module")
def trained():
    return train_classifier(images(256, 0), images(100, 1), epochs=6, batch=64, seed=3)


def test_learns_what_tells_the_classes_apart_and_says_how_well(trained):
    test = trained.about["test"]
    assert test["images"] == 100
    assert test["accuracy"] > 0.95
    assert test["interval"][0] < test["accuracy"] <= test["interval"][1]
    flat = jnp.ones((2, 3, 8, 8, 3)) * jnp.array([0.25, -0.3])[:, None, None, None, None]
    np.testing.assert_array_equal(trained.classes(flat), [[0] * 3, [1] * 3])


def test_interval_is_exact_at_the_ends_and_holds_the_share():
    every = accuracy(np.ones(100, bool))
    assert every["interval"] == pytest.approx([0.025 ** (1 / 100), 1])
    none = accuracy(np.zeros(100, bool))
    assert none["interval"] == pytest.approx([0, 1 - 0.025 ** (1 / 100)])
    assert accuracy(np.arange(1000) < 970)["interval"] == pytest.approx([0.9574, 0.9797], abs=1e-4)


def test_file_gives_the_same_classifier_back_without_pickles(trained, tmp_path):
    save_classifier(tmp_path / "deep" / "c.npz", trained)
    again = load_classifier(tmp_path / "deep" / "c.npz")
    assert again.about == trained.about
    assert again.digest() == trained.digest()
    x = jnp.linspace(-1, 1, 8 * 8 * 3).reshape(1, 8, 8, 3)
    np.testing.assert_array_equal(again.log_odds(x), trained.log_odds(x))
    with np.load(tmp_path / "deep" / "c.npz", allow_pickle=False) as stored:
        assert json.loads(str(stored["manifest"]))["class_names"] == list(NAMES)


def test_file_that_does_not_say_how_often_it_is_right_is_refused(trained, tmp_path):
    for test in ({}, {"test": {"images": 3}}, {"test": None}):
        about = {name: value for name, value in trained.about.items() if name != "test"} | test
        save_classifier(tmp_path / "c.npz", trained._replace(about=about))
        with pytest.raises(ClassifierError, match="syncgap classifier makes one that does"):
            load_classifier(tmp_path / "c.npz")


def test_reads_the_images_of_a_network_as_their_pixels(trained):
    pixels = images(4, 2).pixels
    mean, std = [-0.1, 0.0, 0.2], 0.5
    manifest = {"config": {"input_size": 8, "in_channels": 3}, "data": {"mean": mean, "std": std}}
    scaled = jnp.asarray(standardize(pixels, mean, std))
    plain = trained.log_odds(jnp.asarray(pixels, jnp.float32) / 127.5 - 1)
    np.testing.assert_allclose(trained.reader(manifest).log_odds(scaled), plain, atol=1e-4)


@pytest.mark.parametrize(
    ("manifest", "remedy"),
    [
        ({"config": {"input_size": 16, "in_channels": 3}, "data": {"mean": [0] * 3, "std": 1}}, "--size 16"),
        ({"config": {"input_size": 8, "in_channels": 3}, "data": None}, "syncgap train"),
        ({"config": {"input_size": 8, "in_channels": 4}, "data": {"mean": [0] * 4, "std": 1}}, "syncgap train"),
    ],
)
def test_networks_whose_images_it_cannot_read_are_refused(trained, manifest, remedy):
    with pytest.raises(ClassifierError, match=remedy):
        trained.reader(manifest)


def test_other_classes_are_refused_by_name(trained):
    check_classes(trained, NAMES)
    with pytest.raises(ClassifierError, match="dark, bright"):
        check_classes(trained, NAMES[::-1])


def test_images_that_cannot_train_it_are_refused():
    few = images(16, 0)
    with pytest.raises(ClassifierError, match="fill a batch"):
        train_classifier(few, images(20, 1), batch=64)
    with pytest.raises(ClassifierError, match="are the training images"):
        train_classifier(few, few, batch=8)
    other = image_set(few.pixels, few.labels, ("a", "b"), "here")
    with pytest.raises(ClassifierError, match="--classes"):
        train_classifier(few, other, batch=8)
    with pytest.raises(ClassifierError, match="--size"):
        initial_layers(12, 2, random_key(0))
    with pytest.raises(ClassifierError, match="--classes"):
        initial_layers(16, 1, random_key(0))


def test_files_that_hold_no_classifier_are_refused_with_the_remedy(trained, tmp_path):
    with pytest.raises(CheckpointError, match="syncgap classifier"):
        load_classifier(tmp_path / "none.npz")
    path = tmp_path / "c.npz"
    save_classifier(path, trained)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match="syncgap classifier"):
        load_classifier(path)
    wrong = Classifier(trained.layers[:-1], trained.about)
    save_classifier(path, wrong)
    with pytest.raises(CheckpointError, match="shapes"):
        load_classifier(path)
    np.savez(path, manifest=np.array({"a": 1}, dtype=object))
    with pytest.raises(CheckpointError, match="syncgap classifier"):
        load_classifier(path)
