"""``manifest.json`` of a run: its settings, versions and device, and how two runs are told apart."""

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import jax
import numpy as np

from dit_jax.platform import devices
from experiments.frame.settings import ADDED, RENAMED
from ou_theory.keys import GENERATOR

FORMAT = "syncgap-run"
FORMAT_VERSION = 1
PACKAGES = ("syncgap", "jax", "jaxlib", "flax", "numpy", "xarray", "zarr")
OWN_ENTRIES = (
    *("format", "format_version", "status", "command", "settings", "started", "finished", "timings"),
    *("resumed", "blocks", "python", "versions", "device", "platform", "git_revision"),
)
DIGESTS = "digests"  # of what is stored; older runs have none
NUMERICS = "numerics"  # what JAX is set to that changes numbers; older runs have none
OUTDATED = "outdated"  # groups that were made before pairs were added to the run; most runs have none
COMPILATIONS = "compilations"  # programs that were compiled while it was measured; older runs do not say
NEWER = (DIGESTS, NUMERICS, OUTDATED, COMPILATIONS)  # entries of the store's own that older runs lack
FREE = ("block", "parameters")  # settings that say how pairs are measured, not what: a resumed run may have others
GROWING = ("pairs", "untrained_pairs")  # settings that may be larger when a run is resumed
ENTRY_TYPES: dict[str, type] = {  # of what the code reads from a manifest
    "settings": dict, "timings": dict, "versions": dict, "blocks": dict, "resumed": list,
    "status": str, "command": str, "started": str, "device": str, "platform": str,
}  # fmt: skip


class StoreError(ValueError):
    """A run folder that cannot be used as asked."""


def environment() -> dict[str, Any]:
    """Python, packages (null: not installed), device, git revision (null: none) and settings of JAX of this process.

    Raises:
      PlatformError: JAX has no device.
    """
    device, settings = devices()[0], cast(Any, jax.config)  # whose names JAX adds as it runs
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": str(getattr(device, "device_kind", device)),
        "platform": f"{device.platform}, {jax.device_count()} device(s), {os.cpu_count()} CPU cores, "
        f"{platform.system()} {platform.machine()}",
        "git_revision": _own_revision(),
        NUMERICS: {
            "generator": GENERATOR,
            "x64": settings.jax_enable_x64,
            "matmul_precision": settings.jax_default_matmul_precision,
        },
    }


@cache
def _own_revision() -> str | None:
    """`git_revision` of this code. What a process runs does not change when its files do."""
    return git_revision(Path(__file__).parent)


def git_revision(folder: Path) -> str | None:
    """Commit of the checkout that tracks this code, with ``-dirty`` if it was changed since; None outside of one."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # not a repository that merely lies around the package
        return git("describe", "--always", "--abbrev=40", "--exclude=*", "--dirty")
    except (OSError, subprocess.SubprocessError):
        return None


def differences(old: Any, new: Any) -> list[str]:
    """What differs between two nested dictionaries, as lines ``dotted.name: old -> new``."""
    before, after = dict(_leaves(old)), dict(_leaves(new))
    names = [*before, *(name for name in after if name not in before)]
    return [
        f"{name}: {before.get(name, 'nothing')} -> {after.get(name, 'nothing')}"
        for name in names
        if name not in before or name not in after or before[name] != after[name]
    ]


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping) and (tree or not prefix):
        for name, value in tree.items():
            yield from _leaves(value, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, tree


def read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read ({error}); start the run again in another --out") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path} holds something else: its manifest is not that of a run; choose another --out")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{file} is of format version {manifest.get('format_version')}, and this code reads {FORMAT_VERSION}; "
            "use the syncgap version that wrote it, or run again in another --out"
        )
    missing = [name for name in OWN_ENTRIES if name not in manifest]
    if missing:
        raise StoreError(f"{file} lacks {', '.join(missing)}; start the run again in another --out")
    wrong = [name for name, kind in ENTRY_TYPES.items() if not isinstance(manifest[name], kind)]
    if not wrong:
        wrong += [f"blocks.{group}" for group, done in manifest["blocks"].items() if not _whole_numbers(done)]
        wrong += [
            f"timings.{name}" for name, value in manifest["timings"].items() if not isinstance(value, int | float)
        ]
        wrong += ["status"] if manifest["status"] not in ("running", "complete") else []
        digests = manifest.get(DIGESTS, {})
        wrong += [] if isinstance(digests, dict) and all(map(_is_digests, digests.values())) else [DIGESTS]
        wrong += ["resumed" for entry in manifest["resumed"] if not isinstance(entry, dict)][:1]
    if wrong:
        raise StoreError(f"{file} is malformed in {', '.join(wrong)}; correct it, or run again in another --out")
    return manifest


def _whole_numbers(values: Any) -> bool:
    whole = isinstance(values, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in values)
    return whole and len(set(values)) == len(values)


def _is_digests(entries: Any) -> bool:
    return isinstance(entries, dict) and all(isinstance(value, str) for value in entries.values())


def comparable(entries: Mapping) -> dict:
    """The entries of a manifest by which runs are told apart. Settings have their present names, numbers are rounded to
    single precision, in which networks run, and entries that older runs lack are left out or have the value of old."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return float(str(np.float32(value)))
        if isinstance(value, list):
            return [rounded(each) for each in value]
        return {name: rounded(each) for name, each in value.items()} if isinstance(value, dict) else value

    kept = {name: value for name, value in entries.items() if name not in ("kind", "subject")}
    settings = ADDED | {RENAMED.get(name, name): value for name, value in entries["settings"].items()}
    return {**kept, "settings": rounded(settings)}


def forbidden(path: Path, before: Mapping, asked: Mapping) -> list[str]:
    """What forbids to go on with the run at `path`: entries that differ from those that are asked for, as lines.
    Settings that are `FREE` may differ, those that are `GROWING` may be larger, and weights with one digest may have
    any name.

    Raises:
      StoreError: the run has more pairs than are asked for.
    """
    old, new = comparable(before), comparable(asked)
    had, wanted = old["settings"], new["settings"]
    for name in GROWING:
        if isinstance(had.get(name), int) and isinstance(wanted.get(name), int):
            if wanted[name] < had[name]:
                raise StoreError(
                    f"{path} holds a run with {name} {had[name]}, of which none are taken away: resume it with "
                    f"--{name.replace('_', '-')} {had[name]} or more, or choose another --out"
                )
            had[name] = wanted[name]
    by_digest = "weights_digest" in old and "weights_digest" in new
    for settings in (had, wanted):
        for name in (*FREE, *(["weights"] if by_digest else [])):
            settings.pop(name, None)
    return differences(old, new)


def json_form(entries: Any, what: str) -> Any:
    """`entries` as they come back from JSON: tuples become lists, keys become strings."""
    try:
        return json.loads(json.dumps(entries, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} must be JSON-able and finite ({error})") from error


def without_nan(entries: Any) -> Any:
    """Entries of a JSON file, NaN and infinities as null."""
    if isinstance(entries, Mapping):
        return {name: without_nan(value) for name, value in entries.items()}
    if isinstance(entries, list | tuple):
        return [without_nan(value) for value in entries]
    return None if isinstance(entries, float) and not np.isfinite(entries) else entries


@cache
def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
