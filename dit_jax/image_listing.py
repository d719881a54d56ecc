"""What a folder or a zip file holds: images by their path, other things with the reason why they are left out."""

import heapq
import os
import stat
import textwrap
import zipfile
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dit_jax.image_decoding import suffixes

Parts = tuple[str, ...]  # of a path below the source
Place = Path | zipfile.ZipInfo  # where an image is read

SYSTEM = {"__macosx", "__pycache__", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "lost+found"}
SYSTEM |= {"system volume information", "thumbs.db", "desktop.ini"}
# pictures that Pillow, or some build of it, does not read by itself: a class of them must not vanish
FOREIGN = {".heic", ".heif", ".jxl", ".exr", ".eps", ".svg", ".raw", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf"}
FOREIGN |= {".orf", ".rw2", ".pef", ".srw", ".webp", ".avif", ".jp2"}

LARGEST_FILE = 2**29  # bytes; uncompressed, the largest image that Pillow agrees to decode
UNPACKED = 2**32  # bytes that the images of any zip may unpack to
MOST_TIMES = 200  # above UNPACKED, the most that they may be of the zip's own size: photographs are packed already
PIECE = 4096  # bytes that a zip is unpacked by, so that an entry that lies about its size is stopped early

HIDDEN = "hidden, or made by the system"
FORMAT = "not in a format that is read"
AGAIN = "links to a folder that is read anyway"
SPECIAL = "no regular files"
REPLACED = "zip entries that a later one of the same path replaces"
UPWARD = "zip entries with .. in their path"


class DataError(ValueError):
    """Images that cannot be trained on."""


@dataclass
class Listing:
    """What a source holds, as far as it is found."""

    images: dict[Parts, Place] = field(default_factory=dict)
    folders: set[Parts] = field(default_factory=set)
    foreign: list[Parts] = field(default_factory=list)  # photographs in formats that are not read
    left_out: defaultdict[str, set[str]] = field(default_factory=lambda: defaultdict(set))

    def leave(self, reason: str, parts: Parts) -> None:
        self.left_out[reason].add("/".join(parts))

    def hides(self, parts: Parts) -> bool:
        """Whether a path is of no interest to anyone, which is noted of its first such part."""
        for depth, part in enumerate(parts, 1):
            if part.startswith(".") or part.casefold() in SYSTEM:
                self.leave(HIDDEN, parts[:depth])
                return True
        return False

    def add(self, parts: Parts, place: Place) -> None:
        """Takes in a file by its suffix."""
        suffix = Path(parts[-1]).suffix.lower()
        if suffix in suffixes():
            self.images[parts] = place
            return
        self.leave(FORMAT, parts)
        if suffix in FOREIGN:
            self.foreign.append(parts)


def list_source(source: Path) -> Listing:
    """Lists a folder or a .zip file. Links to folders are followed; of zip entries with one path the last counts.

    Raises:
      DataError: the source is missing or cannot be listed, holds a link that leads nowhere, or is a zip that is
        encrypted or claims to unpack to very much more than its size.
    """
    if not source.exists():
        raise DataError(f"no such folder or zip file: {source}")
    return _list_folder(source) if source.is_dir() else _list_zip(source)


def content_of(place: Place, archive: zipfile.ZipFile | None) -> bytes:
    """The bytes of a file, or of an entry of a zip."""
    size = place.stat().st_size if isinstance(place, Path) else place.file_size
    if size > LARGEST_FILE:
        raise ValueError(f"it has {size:,} bytes, and {LARGEST_FILE:,} is the most")
    if isinstance(place, Path):
        return place.read_bytes()
    assert archive is not None
    with archive.open(place) as file:
        return b"".join(iter(lambda: file.read(PIECE), b""))


def shown(text: str) -> str:
    """A name from a file system for the terminal: characters that are not printable are escaped."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def told(left_out: Mapping[str, Collection[str]]) -> list[str]:
    """What was left out and why, in lines: a few examples of each."""
    lines = ["  left out:"] if left_out else []
    for reason, paths in left_out.items():
        few = sorted(paths)[:3]
        more = f", and {len(paths) - len(few)} more" if len(paths) > len(few) else ""
        lines += paragraph(f"{reason}: {', '.join(map(shown, few))}{more}", "    ")
    return lines


def paragraph(text: str, indent: str = "  ") -> list[str]:
    """Text in lines of up to 100 characters, with no word broken."""
    return textwrap.wrap(
        text,
        100,
        initial_indent=indent,
        subsequent_indent=indent + "  ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def _list_folder(source: Path) -> Listing:
    """Lists a folder. Links to folders come last, so that a folder that is read without a link is read that way."""
    listing = Listing()
    pending: list[tuple[Parts, str]] = [((), str(source))]
    links: list[tuple[Parts, str]] = []  # a heap: the order in which a system lists a folder must not matter
    seen = set()
    while pending or links:
        parts, folder = pending.pop() if pending else heapq.heappop(links)
        try:
            status = os.stat(folder)
            if (identity := (status.st_dev, status.st_ino)) in seen:
                listing.leave(AGAIN, parts)
                continue
            entries = list(os.scandir(folder))
        except OSError as error:
            raise DataError(f"{source}: the folder {shown(folder)} cannot be listed ({error.strerror})") from error
        seen.add(identity)
        listing.folders.add(parts)
        for entry in entries:
            inside = (*parts, entry.name)
            if listing.hides(inside):
                continue
            if entry.is_symlink() and not os.path.exists(entry.path):
                raise DataError(f"{source}: the link {shown('/'.join(inside))} leads nowhere; mend or remove it")
            if entry.is_dir():
                if entry.is_symlink():
                    heapq.heappush(links, (inside, entry.path))
                else:
                    pending.append((inside, entry.path))
            elif entry.is_file():
                listing.add(inside, Path(entry.path))
            else:
                listing.leave(SPECIAL, inside)
    return listing


def _list_zip(source: Path) -> Listing:
    listing = Listing()
    try:
        with zipfile.ZipFile(source) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, UnicodeDecodeError, NotImplementedError) as error:
        raise DataError(f"{source} is neither a folder nor a readable zip file ({error})") from error
    for entry in entries:
        name = _entry_name(entry).replace("\\", "/")
        parts = tuple(part for part in name.split("/") if part not in ("", "."))
        if ".." in parts:
            listing.leave(UPWARD, parts)
            continue
        if not parts or listing.hides(parts):
            continue
        if stat.S_ISLNK(entry.external_attr >> 16):
            raise DataError(
                f"{source}: {shown('/'.join(parts))} is a link, which says nothing of the images that it led to; pack "
                f"the folder anew with links followed (zip -r does, zip -y does not)"
            )
        is_folder = name.endswith("/")
        listing.folders |= {parts[:depth] for depth in range(1, len(parts) + is_folder)}
        if is_folder:
            continue
        if parts in listing.images:
            listing.leave(REPLACED, parts)
        listing.add(parts, entry)
    _check_zip(source, listing)
    return listing


def _entry_name(entry: zipfile.ZipInfo) -> str:
    """The name of a zip entry. Finder writes UTF-8 without the flag that says so, and Python takes it for cp437."""
    if entry.flag_bits & 0x800:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename


def _check_zip(source: Path, listing: Listing) -> None:
    unpacked = 0
    for parts, entry in listing.images.items():
        assert isinstance(entry, zipfile.ZipInfo)
        if entry.flag_bits & 1:
            raise DataError(f"{source} is encrypted ({shown('/'.join(parts))}); unpack it, and give the folder")
        unpacked += entry.file_size
    packed = source.stat().st_size
    if unpacked > max(UNPACKED, MOST_TIMES * packed):
        raise DataError(
            f"{source} of {packed:,} bytes claims to unpack to {unpacked:,}, {unpacked // packed} times as much; no "
            f"photographs do. If it is sound, unpack it, and give the folder"
        )
