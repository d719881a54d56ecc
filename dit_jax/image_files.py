"""Which images a folder or a zip file holds, in which classes, and what is left out and why; nothing is decoded.

A class is a folder that holds images itself, at any depth. It is called by its own name, or by its path where folders
in different places share a name. Classes are in the order of their names, in numerical order where all are numbers,
or as a list says. Accents count alike in both spellings of Unicode, so that all systems read one set alike.
"""

import itertools
import unicodedata
import zipfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from dit_jax.image_listing import DataError, Listing, Parts, Place, content_of, list_source, paragraph, shown, told

SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}
OUTSIDE = "images outside the class folders"
EMPTY = "folders without an image that is read"
UNLISTED = "class folders that are not among the labels"


@dataclass(frozen=True)
class ImageFiles:
    """The images of a folder or zip file, by path."""

    source: Path
    class_names: tuple[str, ...]  # in the order of the labels
    paths: tuple[Parts, ...]  # of the images, below the source
    labels: tuple[int, ...]  # of the images, index into class_names
    places: tuple[Place, ...]  # where each is read
    left_out: dict[str, tuple[str, ...]]  # what was left out, by reason

    def __len__(self) -> int:
        return len(self.paths)

    def describe(self) -> str:
        """Classes with their counts in the order of the labels, and what was left out and why, in lines."""
        counts = Counter(self.labels)
        classes = [f"{label}: {shown(name)} ({counts[label]})" for label, name in enumerate(self.class_names)]
        lines = [f"{self.source}: {_number(len(self), 'image')} in {_number(len(classes), 'class')}, by label"]
        lines += paragraph(", ".join(classes))
        if any(_is_number(name) and int(name) != label for label, name in enumerate(self.class_names)):
            lines += paragraph("the numbers that name the folders are not their labels; --classes takes labels")
        return "\n".join(lines + told(self.left_out))

    def read(self) -> Iterator[tuple[str, bytes]]:
        """Path and content of every image, one after another.

        Raises:
          DataError: a file cannot be read, or is larger than 512 MiB.
        """
        with nullcontext() if self.source.is_dir() else zipfile.ZipFile(self.source) as archive:
            for parts, place in zip(self.paths, self.places, strict=True):
                path = shown("/".join(parts))
                try:
                    content = content_of(place, archive)
                except Exception as error:  # damaged archives raise many kinds
                    raise DataError(
                        f"{self.source}: {path} cannot be read ({error or type(error).__name__})"
                    ) from error
                yield path, content


def find_images(source: str | Path, labels: Sequence[str] | None = None) -> ImageFiles:
    """Finds the images of a folder or zip file in class folders. Links to folders are followed.

    Hidden files, and what systems leave in folders, are no images. Of entries of a zip that have one path the last
    counts, as for a program that unpacks it; paths may begin with ``./`` or ``/``, and may be written with backslashes.

    Args:
      source: a folder, or a .zip file.
      labels: class folders in the order of their labels, each by its name or by its path below the source; others are
        left out. By default all.

    Raises:
      DataError: the source is missing or cannot be listed; it holds no images in class folders, or several parts of a
        set (train, test); a label is not the name of one class folder; a class would be lost, because a link leads
        nowhere or its images are in a format that is not read; a zip is encrypted or unpacks to very much more.
    """
    source = Path(source)
    listing = list_source(source)
    _leave_strays(listing)
    if not listing.images:
        why = f"{source}: no images in class folders <class>/<image>; a set without classes needs one folder, too"
        raise DataError("\n".join([why, *told(listing.left_out)]))
    folders = sorted({parts[:-1] for parts in listing.images}, key=_composed)
    if labels is None:
        _check_parts_of_a_set(source, folders)
        _check_lost_classes(source, listing, folders)
        classes = _in_order(_named(source, folders))
    else:
        chosen = _chosen(source, folders, labels)
        for folder in set(folders) - set(chosen):
            listing.leave(UNLISTED, folder)
        classes = _named(source, chosen)
    label_of = {folder: label for label, folder in enumerate(classes.values())}
    paths = sorted((parts for parts in listing.images if parts[:-1] in label_of), key=lambda p: (_composed(p), p))
    return ImageFiles(
        source,
        tuple(classes),
        tuple(paths),
        tuple(label_of[parts[:-1]] for parts in paths),
        tuple(listing.images[parts] for parts in paths),
        {reason: tuple(sorted(paths)) for reason, paths in sorted(listing.left_out.items())},
    )


def read_labels(path: str | Path) -> tuple[str, ...]:
    """Names of class folders from a text file in UTF-8: one a line, in the order of the labels; blank lines are none.

    Raises:
      DataError: the file cannot be read, or holds no name.
    """
    try:
        lines = Path(path).read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: the labels cannot be read ({error})") from error
    names = tuple(line.strip() for line in lines if line.strip())
    if not names:
        raise DataError(f"{path} holds no labels; write the name of one class folder on each line, in label order")
    return names


def _leave_strays(listing: Listing) -> None:
    """Leaves out images beside class folders, at the top or in a folder around all of them, and notes empty folders."""
    folders = {parts[:-1] for parts in listing.images} - {()}
    around = _common(folders)
    strays = {()} if around not in folders or len(folders) < 3 else {(), around}
    for parts in [parts for parts in listing.images if parts[:-1] in strays]:
        listing.leave(OUTSIDE, parts)
        del listing.images[parts]
    full = {folder[:depth] for folder in folders for depth in range(len(folder) + 1)} | {()}
    for folder in listing.folders - full:
        if folder[:-1] in full:  # of nested ones the outermost
            listing.leave(EMPTY, folder)


def _check_parts_of_a_set(source: Path, folders: list[Parts]) -> None:
    found = {part for folder in folders for part in folder if part.casefold() in SPLITS}
    if len({part.casefold() for part in found}) > 1:
        example = next(folder for folder in folders if found & set(folder))
        raise DataError(
            f"{source} holds several parts of a set ({', '.join(map(shown, sorted(found)))}). Take one: give its "
            f"folder, or give --labels a file with the class folders to read, one a line, as in "
            f"{shown('/'.join(example))}"
        )


def _check_lost_classes(source: Path, listing: Listing, folders: list[Parts]) -> None:
    classes = {(), *folders}
    seen = {parts[:-1] for parts in listing.foreign} - classes
    lost = sorted(folder for folder in seen if not any(folder[:depth] in classes for depth in range(1, len(folder))))
    if lost:
        kinds = sorted({Path(parts[-1]).suffix for parts in listing.foreign if parts[:-1] in lost})
        raise DataError(
            f"{source}: the images in {', '.join(shown('/'.join(folder)) for folder in lost)} are in a format that is "
            f"not read ({', '.join(kinds)}); convert them to PNG, or leave them out with --labels and a file of the "
            f"class folders to read"
        )


def _named(source: Path, folders: Sequence[Parts]) -> dict[str, Parts]:
    """Folders by the name of their class: their own, or their path where several have it."""
    own = Counter(_composed(folder)[-1] for folder in folders)
    above = len(_common(folder[:-1] for folder in folders))
    named: dict[str, Parts] = {}
    for folder in folders:
        path = _composed(folder)
        name = path[-1] if own[path[-1]] == 1 else "/".join(path[above:])
        if name in named:
            raise DataError(
                f"{source}: two folders are called {shown(name)}, in different spellings of its accents; rename one"
            )
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{source}: the name of the folder {shown(name)} is not in UTF-8; rename it") from error
        named[name] = folder
    return named


def _in_order(named: dict[str, Parts]) -> dict[str, Parts]:
    """Classes by name; by number where all their folders are called by numbers."""
    by_number = all(_is_number(name.rpartition("/")[2]) for name in named)

    def place(name: str) -> tuple:
        above, _, last = name.rpartition("/")
        digits = last.lstrip("0")
        return (above, len(digits), digits, last) if by_number else (name,)

    return {name: named[name] for name in sorted(named, key=place)}


def _is_number(name: str) -> bool:
    return name.isascii() and name.isdecimal() and len(name) < 100


def _chosen(source: Path, folders: list[Parts], labels: Sequence[str]) -> list[Parts]:
    """The folder of each label."""
    above = len(_common(folder[:-1] for folder in folders))
    ways: defaultdict[str, set[Parts]] = defaultdict(set)  # in which a folder may be called, but for its own name
    own: defaultdict[str, set[Parts]] = defaultdict(set)
    for folder in folders:
        path = _composed(folder)
        for way in ("/".join(path), "/".join(path[above:])):
            ways[way].add(folder)
        own[path[-1]].add(folder)
    chosen: list[Parts] = []
    for label in labels:
        name = _composed((label.replace("\\", "/").removeprefix("./").rstrip("/"),))[0]
        found = ways.get(name) or own.get(name) or set()
        if not found:
            near = get_close_matches(name, [*own, *ways], 3)
            hint = f"; near are {', '.join(map(shown, dict.fromkeys(near)))}" if near else ""
            raise DataError(
                f"{source} has no class folder {shown(label)!r} with images; --labels or the model asks for it{hint}"
            )
        if len(found) > 1:
            several = ", ".join(shown("/".join(folder)) for folder in sorted(found))
            raise DataError(f"{source} has several folders {shown(label)!r}: {several}; give the path of one as label")
        if (folder := found.pop()) in chosen:
            raise DataError(f"the labels name the class folder {shown('/'.join(folder))} of {source} twice")
        chosen.append(folder)
    return chosen


def _common(paths: Iterable[Parts]) -> Parts:
    """The path of the innermost folder around all of these."""
    levels = itertools.takewhile(lambda level: len(set(level)) == 1, zip(*paths, strict=False))
    return tuple(level[0] for level in levels)


def _composed(parts: Parts) -> Parts:
    return tuple(unicodedata.normalize("NFC", part) for part in parts)


def _number(count: int, what: str) -> str:
    plural = "classes" if what == "class" else f"{what}s"
    return f"{count} {what if count == 1 else plural}"
