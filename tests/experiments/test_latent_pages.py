"""Pages of models of latents: what is called an image elsewhere is called a latent there."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from dit_jax.latents import linear_preview
from experiments.frame.latents import drawn, spoken
from experiments.frame.page import Page, Section, Table, store_page
from experiments.frame.store import RunFolder
from experiments.studies.compare.measure import _pictures


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("turns noise into an image in many steps", "turns noise into a latent in many steps"),
        ("An image is decided. Images, the noisy image.", "A latent is decided. Latents, the noisy latent."),
        ("mean over pixels", "mean over latent pixels"),
        ("ImageNet, my-image-model, runs/image/a, image.png, image_energy, IMAGES", None),
    ],
)
def test_words(text, said):
    if said is None:
        text, said = text.replace(", IMAGES", ""), text.replace(", IMAGES", "")
    assert spoken(text) == said
    assert spoken({"image": [text, 1.5, None]}) == {"image": [said, 1.5, None]}


def figure() -> Figure:
    made = Figure()
    ax = made.subplots()
    ax.set(xlabel="earlier than in the noisy image (nats)", title="Images")
    ax.plot([0, 1], label="an image")
    ax.legend()
    return made


def test_figures_speak_of_latents_everywhere():
    texts = {text.get_text() for text in drawn({"one": figure})["one"]().findobj(Text)}
    assert {"earlier than in the noisy latent (nats)", "Latents", "a latent"} <= texts
    assert not any("image" in text.lower() for text in texts)


@pytest.mark.parametrize(("channels", "word"), [(4, "latent"), (3, "image")])
def test_a_run_of_latents_has_a_page_that_says_so(tmp_path, channels, word):
    run = RunFolder.create(tmp_path / "run", {}, extra={"model": {"in_channels": channels}})
    table = Table("Energy of the image", ["image"], [["the image"]])
    section = Section("Images", "Which image?", "The image.", tables=[table], captions={"image": "An image."})
    store_page(run, Page(section, {"image": figure}))
    stored = json.loads((tmp_path / "run" / "section.json").read_text())
    assert stored["captions"].keys() == {"image"}  # which is the name of a file
    assert (tmp_path / "run" / "figures" / "image.svg").exists()
    said = json.dumps([stored[name] for name in ("title", "question", "answer", "tables")]).lower()
    assert word in said
    assert ("image" in said) == (word == "image")
    assert list(stored["definitions"]) == (["latent"] if word == "latent" else [])


def test_pictures_of_an_official_model_are_previews_under_the_names_of_imagenet():
    manifest = {"config": {"num_classes": 1000, "in_channels": 4}}
    bench: Any = SimpleNamespace(subject=SimpleNamespace(manifest=manifest))
    samples = np.random.default_rng(0).standard_normal((2, 3, 2, 4, 4, 4))  # (R, C, P, H, W, 4)
    found = _pictures(bench, samples, np.array([0.0, 0.5, 1.0]), np.array([207, 387]))
    assert found.label_name.values.tolist() == ["golden retriever", "lesser panda"]
    assert found.attrs["preview"] == "linear latent preview, not a decoding"
    assert found.image.shape == (2, 2, 2, 32, 32, 3)
    np.testing.assert_array_equal(found.image.values[1, 0, 1], linear_preview(samples[1:2, 2, 0])[0])
