"""Classes by name: those of a trained model's manifest, or ImageNet-1k's for the official models."""

import difflib
import unicodedata
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

IMAGENET = Path(__file__).parent / "data" / "imagenet_classes.txt"
NEAREST = 5  # names that an error suggests


def names(manifest: Mapping) -> list[str] | None:
    """Class names of a model by label, or None if nothing tells them.

    They are the manifest's own; or, for a model of 1000 classes whose manifest has no data entry, as converted ones
    have none, those of ImageNet-1k: synonyms of one WordNet synset, separated by commas.
    """
    data = manifest.get("data")
    if isinstance(data, Mapping):
        own = data.get("class_names")
        return [str(name) for name in own] if isinstance(own, list) else None
    return list(_imagenet()) if data is None and manifest["config"].get("num_classes") == 1000 else None


def resolve(classes: Sequence[str | int], names: Sequence[str] | None, num_classes: int) -> tuple[int, ...]:
    """Labels of classes given by number or by name.

    A number is always a label. A name is matched without regard to case, whole or as any one of its synonyms.

    Args:
      classes: for example ``("golden retriever", "360")``.
      names: by label, see `names`; None if the classes have none.
      num_classes: labels are below it.

    Raises:
      ValueError: a number that is no label; a name that is unknown (the nearest are listed) or that several classes
        have (they are listed with their numbers).
    """
    known = _labels_by_name((names or ())[:num_classes])
    return tuple(_resolve(str(entry).strip(), known, names, num_classes) for entry in classes)


def short_name(label: int, names: Sequence[str] | None) -> str:
    """The first synonym of a class's name, or ``class <label>`` where classes have no names."""
    return names[label].split(",")[0].strip() if names and label < len(names) else f"class {label}"


def _resolve(entry: str, known: Mapping[str, list[int]], names: Sequence[str] | None, num_classes: int) -> int:
    if entry.removeprefix("-").isdecimal():
        label = int(entry)
        if not 0 <= label < num_classes:
            raise ValueError(f"class {label} is not a label of this model, whose labels are 0..{num_classes - 1}")
        return label
    if not names:
        raise ValueError(f"class {entry!r}: the classes of this model have no names; give labels 0..{num_classes - 1}")
    found = known.get(_plain(entry), [])
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{label} ({names[label]})" for label in found)
        raise ValueError(f"class {entry!r} is the name of several classes: {several}; give the number")
    near = difflib.get_close_matches(_plain(entry), known, NEAREST, cutoff=0.5)
    numbers = "; ".join(f"{label} ({names[label]})" for label in dict.fromkeys(n for name in near for n in known[name]))
    raise ValueError(f"no class is named {entry!r}; " + (f"nearest: {numbers}" if near else "none is near"))


def _labels_by_name(names: Sequence[str]) -> dict[str, list[int]]:
    known: dict[str, list[int]] = {}
    for label, name in enumerate(names):
        for synonym in {_plain(name), *map(_plain, name.split(","))}:
            known.setdefault(synonym, []).append(label)
    return known


def _plain(name: str) -> str:
    """A name without regard to case, and with its accents in one of their two spellings."""
    return unicodedata.normalize("NFC", name.strip()).casefold()


@cache
def _imagenet() -> tuple[str, ...]:
    return tuple(IMAGENET.read_text("utf-8").splitlines())
