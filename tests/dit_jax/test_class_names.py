"""Class names: the ImageNet list against facts known elsewhere, and what a name or number resolves to."""

from itertools import pairwise

import pytest

from dit_jax.checkpoint import load_manifest, shipped_model
from dit_jax.class_names import names, resolve, short_name

OFFICIAL = {"config": {"num_classes": 1000}, "data": None}
IMAGENET = names(OFFICIAL) or []
KNOWN = {
    0: "tench",
    88: "macaw",
    207: "golden retriever",
    250: "Siberian husky",
    279: "Arctic fox",
    291: "lion",
    360: "otter",
    387: "lesser panda",
    417: "balloon",
    555: "fire engine",
    779: "school bus",
    933: "cheeseburger",
    974: "geyser",
    979: "valley",
    980: "volcano",
    999: "toilet tissue",
}
PETS = ["cat", "dog", "Guinea Pig, cavy", "dogfish"]


def test_the_imagenet_list_is_whole_and_in_its_order():
    assert len(IMAGENET) == 1000
    assert all(name == name.strip() and name and name.isascii() for name in IMAGENET)
    assert {label: short_name(label, IMAGENET) for label in KNOWN} == KNOWN
    assert IMAGENET[0] == "tench, Tinca tinca"
    assert IMAGENET[999] == "toilet tissue, toilet paper, bathroom tissue"
    # the order is by synset, whose animals come first and whose artefacts are in the order of the alphabet
    artefacts = [name.casefold() for name in IMAGENET[398:500]]
    out_of_order = [name for a, name in pairwise(artefacts) if a[0] > name[0]]
    assert not out_of_order


def test_only_two_lines_of_the_list_are_the_same():
    twice = {name for name in IMAGENET if IMAGENET.count(name) > 1}
    assert twice == {"crane"}


def test_names_come_from_the_manifest_first():
    assert short_name(5, names(load_manifest(shipped_model("photos16-v")))) == "dog"
    own = {"config": {"num_classes": 1000}, "data": {"class_names": ["a", "b"]}}
    assert names(own) == ["a", "b"]


@pytest.mark.parametrize(
    "manifest",
    [
        {"config": {"num_classes": 1000}, "data": {"mean": [0.0]}},
        {"config": {"num_classes": 10}, "data": None},
        {"config": {"num_classes": 10}},
    ],
)
def test_nothing_is_made_up_for_other_classes(manifest):
    assert names(manifest) is None


def test_a_manifest_without_a_data_entry_may_be_official():
    assert names({"config": {"num_classes": 1000}}) == IMAGENET


@pytest.mark.parametrize(
    ("entry", "label"),
    [
        ("207", 207),
        (207, 207),
        (" 0 ", 0),
        ("golden retriever", 207),
        ("GOLDEN Retriever", 207),
        ("red panda", 387),
        ("Ailurus fulgens", 387),
        ("vale", 979),
        ("maillot, tank suit", 639),
        ("tank suit", 639),
        ("plumber's helper", 731),
    ],
)
def test_numbers_names_and_synonyms(entry, label):
    assert resolve([entry], IMAGENET, 1000) == (label,)


def test_several_classes_keep_their_order_and_repetitions():
    assert resolve(("dog", "0", "DOG", "cavy"), PETS, 4) == (1, 0, 1, 2)


@pytest.mark.parametrize(
    ("name", "labels"),
    [("crane", (134, 517)), ("maillot", (638, 639)), ("cardigan", (264, 474)), ("panda", (387, 388))],
)
def test_a_name_of_several_classes_lists_their_numbers(name, labels):
    with pytest.raises(ValueError, match="several classes") as caught:
        resolve([name], IMAGENET, 1000)
    assert all(f"{label} (" in str(caught.value) for label in labels)


def test_an_unknown_name_lists_the_nearest():
    with pytest.raises(ValueError, match=r"no class is named 'goldn retriver'.*207 \(golden retriever\)"):
        resolve(["goldn retriver"], IMAGENET, 1000)
    with pytest.raises(ValueError, match="none is near"):
        resolve(["xqzzw"], IMAGENET, 1000)


def test_a_near_class_is_listed_once_for_all_its_synonyms():
    with pytest.raises(ValueError, match="nearest") as caught:
        resolve(["hammerhead sharks"], IMAGENET, 1000)
    assert str(caught.value).count("4 (hammerhead") == 1


@pytest.mark.parametrize("entry", ["4", "-1", "1000"])
def test_numbers_that_are_no_labels(entry):
    with pytest.raises(ValueError, match=r"not a label of this model, whose labels are 0\.\.3"):
        resolve([entry], PETS, 4)


def test_the_null_label_cannot_be_had_by_a_name_beyond_the_classes():
    with pytest.raises(ValueError, match="no class is named 'dogfish'"):
        resolve(["dogfish"], PETS, 3)


def test_names_where_there_are_none():
    assert resolve(["3"], None, 4) == (3,)
    with pytest.raises(ValueError, match="have no names"):
        resolve(["dog"], None, 4)
    assert short_name(3, None) == "class 3"
    assert short_name(9, PETS) == "class 9"
