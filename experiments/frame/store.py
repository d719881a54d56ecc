"""A run on disk: one folder with a manifest, labelled arrays, figures and a report.

    manifest.json   what was run, with what, on what, and which blocks of pairs are finished
    data.zarr       one group per dataset, opened by any xarray: ``xr.open_datatree(folder / "data.zarr")``

A block counts once the manifest names it. Whatever dies before that leaves the manifest and the blocks it names as they
were, and is written again when the run goes on.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
import xarray as xr
import zarr

from dit_jax.checkpoint import recover, write_json

FORMAT = "syncgap-run"
FORMAT_VERSION = 1
PACKAGES = ("syncgap", "jax", "jaxlib", "flax", "numpy", "xarray", "zarr")
OWN_ENTRIES = (
    *("format", "format_version", "status", "command", "settings", "started", "finished", "timings"),
    *("resumed", "blocks", "python", "versions", "device", "platform", "git_revision"),
)


class StoreError(ValueError):
    """A run folder that cannot be used as asked."""


class RunFolder:
    """The folder of one run; made by `create`, read by `open`.

    Attributes:
      path: the folder.
      manifest: the entries of ``manifest.json``; replaced, never changed in place.
    """

    def __init__(self, path: Path, manifest: dict, *, writable: bool):
        self.path, self.manifest, self.writable = path, manifest, writable

    @classmethod
    def create(
        cls,
        path: str | Path,
        settings: Mapping,
        *,
        resume: bool = False,
        command: str = "",
        extra: Mapping | None = None,
    ) -> "RunFolder":
        """Makes the folder of a run, or reopens it.

        Args:
          path: the folder; parents are made too.
          settings: JSON-able; with `extra` they fix the run's numbers, and must be the same when it is resumed.
          resume: go on with the run that the folder holds; start one where there is none.
          command: how it was called.
          extra: further entries of the manifest, for example the digest of the weights.

        Raises:
          StoreError: the folder holds another run or something else, or `settings` or `extra` are not JSON.
        """
        path = Path(path)
        asked = _json_form({"settings": dict(settings), **(extra or {})}, "settings and extra")
        taken = sorted(set(extra or {}) & set(OWN_ENTRIES))
        if taken:
            raise StoreError(f"manifest entries {', '.join(taken)} are the store's own; rename those in extra")
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            return cls._reopen(path, asked, resume, command)
        own = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "running",
            "command": command,
            **environment(),
            "started": _now(),
            "finished": None,
            "timings": {},
            "resumed": [],
            "blocks": {},
        }
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, {}, writable=True)
        run._update(**own, **asked)
        return run

    @classmethod
    def _reopen(cls, path: Path, asked: dict, resume: bool, command: str) -> "RunFolder":
        if not (path / "manifest.json").is_file():
            raise StoreError(f"{path} holds something that is no run (no manifest.json); choose another --out")
        manifest = _read_manifest(path)
        if not resume:
            raise StoreError(f"{path} holds another run; --resume goes on with it, or choose another --out")
        before = {name: manifest[name] for name in manifest if name == "settings" or name not in OWN_ENTRIES}
        changed = differences(before, asked)
        if changed:
            raise StoreError(
                f"{path} holds a run with other settings ({'; '.join(changed)}); "
                "resume it with the settings it was started with, or choose another --out"
            )
        here = environment()
        moved = differences({name: manifest.get(name) for name in here}, here)
        run = cls(path, manifest, writable=True)
        entry = {"at": _now(), "command": command, "changed": moved}
        run._update(status="running", finished=None, resumed=[*manifest["resumed"], entry])
        return run

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> "RunFolder":
        """Opens the stored run at `path`, for reading unless `writable`.

        Raises:
          StoreError: there is none, or its manifest cannot be used.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise StoreError(f"{path} holds no run (no manifest.json); give the --out folder of a syncgap command")
        return cls(path, _read_manifest(path), writable=writable)

    def declare(self, group: str, template: xr.Dataset, chunk: int = 1) -> None:
        """Makes a group that `write` fills block by block; one that is there already is kept with its blocks.

        Args:
          group: its name.
          template: attributes, coordinates, and variables of full shape, whose values are ignored: the group starts
            out as NaN (or 0, for integers). Every variable has the dimension ``pair``.
          chunk: pairs per stored chunk. Blocks begin at its multiples, so that no chunk belongs to two blocks.

        Raises:
          StoreError: the group is there with another layout.
        """
        without = [str(name) for name, variable in template.data_vars.items() if "pair" not in variable.dims]
        if without:
            raise StoreError(f"group {group!r}: every variable needs the dimension pair, not so: {', '.join(without)}")
        if chunk < 1:
            raise StoreError(f"chunk must be at least 1, got {chunk}")
        if group in self.manifest["blocks"] and recover(self._group(group)):
            stored = self._open(group)
            if _layout(stored) != _layout(template) or not _coords(stored).equals(_coords(template)):
                raise StoreError(f"{self._group(group)} has another layout than this run needs; choose another --out")
            return
        self._update(blocks={name: done for name, done in self.manifest["blocks"].items() if name != group})
        # Chunks that hold nothing but the fill value are not written, so this costs no space.
        empty = {name: xr.full_like(v, _fill(v.dtype)) for name, v in template.data_vars.items()}
        encoding = {
            name: {"chunks": tuple(min(chunk, n) if dim == "pair" else n for dim, n in v.sizes.items())}
            for name, v in template.data_vars.items()
        }
        self._write_zarr(template.assign(empty), self.path / "data.zarr", group=group, mode="w", encoding=encoding)
        self._update(blocks={**self.manifest["blocks"], group: []})

    def write(self, group: str, dataset: xr.Dataset, first: int) -> None:
        """Writes the block of pairs ``first, first + 1, ...`` of a declared group, then marks it finished.

        Args:
          dataset: all variables of the group, the block's pairs along ``pair``. Coordinates are the declared ones.

        Raises:
          StoreError: the group is not declared, or the block does not fit it.
          OSError: the disk; the block is then not finished, and earlier ones are untouched.
        """
        if group not in self.manifest["blocks"]:
            raise StoreError(f"group {group!r} is not declared; declare it before writing blocks")
        stored = self._open(group)
        last = first + dataset.sizes.get("pair", 0)
        if not 0 <= first < last <= stored.sizes["pair"]:
            raise StoreError(f"group {group!r} has {stored.sizes['pair']} pairs, the block is [{first}, {last})")
        expected = _layout(stored.isel(pair=slice(first, last)))
        if _layout(dataset) != expected:
            wrong = "; ".join(differences(expected, _layout(dataset)))
            raise StoreError(f"the block at pair {first} does not fit group {group!r}: {wrong}")
        for name, variable in stored.data_vars.items():
            chunk = variable.encoding["chunks"][variable.dims.index("pair")]
            if first % chunk or (last % chunk and last != stored.sizes["pair"]):
                raise StoreError(f"block [{first}, {last}) cuts through a chunk of {chunk} pairs of {group}/{name}")
        self._require_writable()
        block = xr.Dataset({name: dataset.variables[name].astype(v.dtype) for name, v in stored.data_vars.items()})
        self._write_zarr(block, self.path / "data.zarr", group=group, region={"pair": slice(first, last)})
        done = sorted({*self.manifest["blocks"][group], first})
        self._update(blocks={**self.manifest["blocks"], group: done})

    def finished(self, group: str) -> set[int]:
        """First pairs of the finished blocks of a group."""
        return set(self.manifest["blocks"].get(group, ()))

    def put(self, group: str, dataset: xr.Dataset) -> None:
        """Writes a whole group in one move, in place of an earlier one of that name."""
        self._require_writable()
        if group in self.manifest["blocks"]:
            raise StoreError(f"group {group!r} is written in blocks; put another name")
        target = self._group(group)
        partial = self.path / f".{group}.partial"
        previous = target.with_name(f".{group}.previous")  # where `recover` looks
        recover(target)
        zarr.open_group(self.path / "data.zarr", mode="a", zarr_format=3)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write_zarr(dataset, partial, mode="w")
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(target, previous)
            os.replace(partial, target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if recover(target):
                shutil.rmtree(previous, ignore_errors=True)

    def load(self, group: str) -> xr.Dataset:
        """A group, in memory.

        Raises:
          StoreError: it is not there or damaged.
        """
        target = self._group(group)
        if not recover(target):
            raise StoreError(f"{self.path} holds no group {group!r}; {self._remedy()}")
        try:
            return self._open(group).load()
        except Exception as error:  # zarr and its codecs raise many kinds for a damaged group
            raise StoreError(f"{target} is damaged ({error}); run it again into another --out") from error

    def write_json(self, name: str, entries: Any) -> None:
        """Writes a JSON file of the run in one move; NaN and infinities become null."""
        self._require_writable()
        write_json(self.path / name, _without_nan(entries))

    def read_json(self, name: str) -> Any:
        """Reads what `write_json` wrote.

        Raises:
          StoreError: it is not there or damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise StoreError(f"{self.path} holds no {name}; {self._remedy()}") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); {self._remedy()}") from error

    def finish(self, timings: Mapping[str, float]) -> None:
        """Marks the run complete; `timings` are in seconds."""
        self._update(status="complete", finished=_now(), timings=dict(timings))

    def _group(self, group: str) -> Path:
        return self.path / "data.zarr" / group

    def _open(self, group: str) -> xr.Dataset:
        dataset = xr.open_zarr(
            self.path / "data.zarr", group=group, consolidated=False, chunks=None, decode_times=False
        )
        return _with_strings(dataset, "T", lambda values: np.array(values.tolist(), str))

    def _write_zarr(self, dataset: xr.Dataset, path: Path, **options: Any) -> None:
        self._require_writable()
        # Variable-length strings have a place in the zarr 3 format, NumPy's fixed-length ones have not.
        dataset = _with_strings(dataset, "U", lambda values: values.astype(np.dtypes.StringDType()))
        dataset.to_zarr(path, zarr_format=3, consolidated=False, **options)

    def _update(self, **entries: Any) -> None:
        self._require_writable()
        manifest = {**self.manifest, **entries}
        write_json(self.path / "manifest.json", manifest)
        self.manifest = manifest

    def _require_writable(self) -> None:
        if not self.writable:
            raise StoreError(f"{self.path} was opened for reading; RunFolder.create(..., resume=True) writes")

    def _remedy(self) -> str:
        unfinished = self.manifest["status"] != "complete"
        return "its run is not finished, go on with --resume" if unfinished else "run it again into another --out"


def environment() -> dict[str, Any]:
    """Python, packages (null: not installed), device and git revision (null: none) of this process."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": str(getattr(device, "device_kind", device)),
        "platform": f"{device.platform}, {jax.device_count()} device(s), {os.cpu_count()} CPU cores, "
        f"{platform.system()} {platform.machine()}",
        "git_revision": git_revision(Path(__file__).parent),
    }


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


def _read_manifest(path: Path) -> dict:
    file = path / "manifest.json"
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise StoreError(f"{file} cannot be read ({error}); start the run again in another --out") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise StoreError(f"{path} holds something else, its manifest is not of a {FORMAT}; choose another --out")
    if manifest.get("format_version") != FORMAT_VERSION:
        raise StoreError(
            f"{file} is of format version {manifest.get('format_version')}, this code reads {FORMAT_VERSION}; "
            "use the syncgap version that wrote it, or run it again"
        )
    missing = [name for name in OWN_ENTRIES if name not in manifest]
    if missing:
        raise StoreError(f"{file} lacks {', '.join(missing)}; start the run again in another --out")
    return manifest


def _layout(dataset: xr.Dataset) -> dict[str, dict]:
    return {str(name): {"dims": variable.dims, "shape": variable.shape} for name, variable in dataset.data_vars.items()}


def _coords(dataset: xr.Dataset) -> xr.Dataset:
    return dataset.coords.to_dataset()


def _fill(dtype: np.dtype) -> float | int:
    return np.nan if np.issubdtype(dtype, np.floating) else 0


def _with_strings(dataset: xr.Dataset, kind: str, convert: Callable[[np.ndarray], np.ndarray]) -> xr.Dataset:
    """`dataset` with its string variables of one NumPy kind converted."""

    def converted(variables: Mapping) -> dict:
        found = {name: v for name, v in variables.items() if v.dtype.kind == kind}
        return {name: (v.dims, convert(v.values), v.attrs) for name, v in found.items()}

    return dataset.assign(converted(dataset.data_vars)).assign_coords(converted(dataset.coords))


def _json_form(entries: Any, what: str) -> Any:
    """`entries` as they come back from JSON: tuples become lists, keys become strings."""
    try:
        return json.loads(json.dumps(entries, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise StoreError(f"{what} must be JSON-able and finite ({error})") from error


def _without_nan(entries: Any) -> Any:
    if isinstance(entries, Mapping):
        return {name: _without_nan(value) for name, value in entries.items()}
    if isinstance(entries, list | tuple):
        return [_without_nan(value) for value in entries]
    return None if isinstance(entries, float) and not np.isfinite(entries) else entries


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
