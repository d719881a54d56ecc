"""A run on disk: one folder with a manifest, labelled arrays, figures and a report.

    manifest.json   settings, versions and device, and which blocks of pairs are finished
    data.zarr       one group per dataset

Any xarray opens the groups: ``xr.open_datatree(folder / "data.zarr", engine="zarr", consolidated=False)``. A block
counts once the manifest names it. A process that dies before that leaves the manifest and the blocks it names
unchanged; the block is written again when the run is resumed. Every stored chunk carries a checksum, which is verified
on each read. The manifest has a digest of every block, of every group that was written whole, and of the descriptions
of arrays. Damaged or missing data are an error for readers. Resuming the run measures them again, and only them.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import zarr

from dit_jax.disk import recover, sync, sync_files, sync_folder
from experiments.frame.chunks import (
    NOT_DAMAGE,
    block_of,
    blocks_of,
    damaged,
    files_of,
    filled,
    layout_of,
    missing_chunks,
    opened,
    pairs_of,
    readable,
    write_group,
    write_region,
)  # fmt: skip
from experiments.frame.digests import LAYOUT, WHOLE, altered, bad_blocks, digest
from experiments.frame.folder import Folder
from experiments.frame.growth import enlarge, require_layout, undo_halves
from experiments.frame.manifest import (
    DIGESTS,
    FORMAT,
    FORMAT_VERSION,
    FREE,
    GROWING,
    NEWER,
    OUTDATED,
    OWN_ENTRIES,
    StoreError,
    differences,
    environment,
    forbidden,
    json_form,
    now,
    read_manifest,
)  # fmt: skip


class RunFolder(Folder):
    """The folder of one run; made by `create`, read by `open`.

    Attributes:
      path: the folder.
      manifest: the entries of ``manifest.json``; replaced, never changed in place.
      moved: for a resumed run, which device, versions or size of blocks differ from those before.
    """

    def __init__(self, path: Path, manifest: dict, *, writable: bool):
        super().__init__(path, manifest, writable=writable)
        self._declared: dict[str, xr.Dataset] = {}  # groups that are being written, without their values

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
        asked = json_form({"settings": dict(settings), **(extra or {})}, "settings and extra")
        taken = sorted(set(extra or {}) & {*OWN_ENTRIES, *NEWER})
        if taken:
            raise StoreError(f"manifest entries {', '.join(taken)} are the store's own; rename those in extra")
        if path.exists() and (not path.is_dir() or any(path.glob("[!.]*"))):  # parts of a killed write begin with a dot
            return cls._reopen(path, asked, resume, command)
        own = {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "status": "running",
            "command": command,
            **environment(),
            "started": now(),
            "finished": None,
            "timings": {},
            "resumed": [],
            "blocks": {},
            DIGESTS: {},
        }
        path.mkdir(parents=True, exist_ok=True)
        sync(path.parent)
        run = cls(path, {}, writable=True)
        run._update(**own, **asked)
        return run

    @classmethod
    def _reopen(cls, path: Path, asked: dict, resume: bool, command: str) -> "RunFolder":
        if not (path / "manifest.json").is_file():
            raise StoreError(f"{path} holds something that is no run (no manifest.json); choose another --out")
        manifest = read_manifest(path)
        if not resume:
            raise StoreError(f"{path} holds another run; continue it with --resume, or choose another --out")
        before = {name: manifest[name] for name in manifest if name == "settings" or name not in (*OWN_ENTRIES, *NEWER)}
        changed = forbidden(path, before, asked)
        if changed:
            raise StoreError(
                f"{path} holds a run with other settings ({'; '.join(changed)}); "
                "resume it with the settings it was started with, or choose another --out"
            )
        here = {name: value for name, value in environment().items() if name in manifest}  # older runs lack some
        moved = differences({name: manifest[name] for name in here}, here)
        run = cls(path, manifest, writable=True)
        had = manifest["settings"]
        given = {name: asked["settings"][name] for name in (*FREE, *GROWING, "weights") if name in asked["settings"]}
        other = {name: value for name, value in given.items() if name in had and had[name] != value}
        told = {name: differences({name: had[name]}, {name: value})[0] for name, value in other.items()}
        run.moved = [*moved, *(line for name, line in told.items() if name in FREE)]
        run._sweep()
        undo_halves(run)
        larger = bool(set(other) & set(GROWING))  # what there is must be brought up to date before it is read
        run._update(
            status="running",
            finished=None,
            resumed=[*manifest["resumed"], {"at": now(), "command": command, "changed": [*moved, *told.values()]}],
            settings={**had, **other},
            **({OUTDATED: run.groups} if larger else {}),
        )
        run._drop_damaged()
        return run

    @classmethod
    def open(cls, path: str | Path, *, writable: bool = False) -> "RunFolder":
        """Opens the stored run at `path`, for reading unless `writable`.

        Raises:
          StoreError: there is no run, or its manifest cannot be used.
        """
        path = Path(path)
        if not (path / "manifest.json").is_file():
            raise StoreError(f"{path} holds no run (no manifest.json); give the --out folder of a syncgap command")
        run = cls(path, read_manifest(path), writable=writable)
        if writable and run.manifest["status"] != "running":  # whoever is running it may be writing
            run._sweep()
        return run

    def declare(self, group: str, template: xr.Dataset, chunk: int = 1, *, of_all: bool = False) -> int:
        """Makes a group that `write` fills block by block. A group that exists already is kept with its blocks. After
        pairs were added to the run it is made larger, and keeps its full blocks.

        Args:
          group: its name.
          template: attributes, coordinates, and variables of full shape, whose values are ignored: the group starts
            out as NaN (or 0, for integers). Every variable has the dimension ``pair``.
          chunk: pairs in a block, which is stored as one chunk of every variable; the last block may have fewer.
          of_all: every value depends on all pairs, so that none is kept when pairs are added.

        Returns:
          the pairs in a block: `chunk`, or what a group that exists already has.

        Raises:
          StoreError: the group exists with another layout.
        """
        without = [str(name) for name, variable in template.data_vars.items() if "pair" not in variable.dims]
        if without:
            raise StoreError(f"group {group!r}: all variables need the dimension pair; without: {', '.join(without)}")
        if chunk < 1:
            raise StoreError(f"chunk must be at least 1, got {chunk}")
        self._declared.pop(group, None)
        if group in self.manifest["blocks"] and recover(self._group(group)):
            outdated = self.is_outdated(group)
            if not outdated and self._mend_coordinates(group, template):
                self._update(digests=self._with_digest(group, LAYOUT))
            if not (outdated and of_all):
                require_layout(self, group, template)
                return enlarge(self, group, template, chunk) if outdated else block_of(self._group(group))
        self._update(blocks={name: done for name, done in self.manifest["blocks"].items() if name != group})
        self._write_empty(group, template, chunk)
        self._update(
            blocks={**self.manifest["blocks"], group: []},
            digests={**self._digests, group: {LAYOUT: digest(self._group(group), LAYOUT)}},
            **self._without_outdated(group),
        )
        return chunk

    def _write_empty(self, group: str, template: xr.Dataset, chunk: int) -> None:
        # Chunks that hold nothing but the fill value are not written, so this costs no space.
        empty = {name: v.copy(data=filled(v.dtype, v.shape)) for name, v in template.data_vars.items()}
        chunks = {
            str(name): {"chunks": tuple(min(chunk, n) if dim == "pair" else n for dim, n in v.sizes.items())}
            for name, v in template.data_vars.items()
        }
        self._write_zarr(template.assign(empty), self.path / "data.zarr", chunks, group=group, mode="w")
        self._mend_coordinates(group, template)  # nor were coordinates that happen to be the fill value
        sync_folder(self._group(group))
        sync(self._group("") / "zarr.json", self._group(""), self._group("").parent)

    def write(self, group: str, dataset: xr.Dataset, first: int) -> None:
        """Writes the block of pairs ``first, first + 1, ...`` of a declared group, then marks it finished.

        Args:
          dataset: all variables of the group, the block's pairs along ``pair``. Coordinates are the declared ones.

        Raises:
          StoreError: the group is not declared, or the block does not fit it.
          OSError: the disk cannot be written; the block is then not finished, and earlier ones are untouched.
        """
        if group not in self.manifest["blocks"]:
            raise StoreError(f"group {group!r} is not declared; declare it before writing blocks")
        self._require_writable()
        if group not in self._declared:
            self._declared[group] = self._open(group)
        stored = self._declared[group]
        last = first + dataset.sizes.get("pair", 0)
        if not 0 <= first < last <= stored.sizes["pair"]:
            raise StoreError(f"group {group!r} has {stored.sizes['pair']} pairs, the block is [{first}, {last})")
        expected = layout_of(stored.isel(pair=slice(first, last)))
        if layout_of(dataset) != expected:
            wrong = "; ".join(differences(expected, layout_of(dataset)))
            raise StoreError(f"the block at pair {first} does not fit group {group!r}: {wrong}")
        for name, variable in stored.data_vars.items():
            chunk = variable.encoding["chunks"][variable.dims.index("pair")]
            if first % chunk or last != min(first + chunk, stored.sizes["pair"]):
                raise StoreError(f"block [{first}, {last}) cuts through a chunk of {chunk} pairs of {group}/{name}")
        values = {str(name): dataset.variables[name].values.astype(v.dtype) for name, v in stored.data_vars.items()}
        region = {
            str(name): tuple(slice(first, last) if dim == "pair" else slice(None) for dim in v.dims)
            for name, v in stored.data_vars.items()
        }
        write_region(self._group(group), values, region)
        sync_files(files_of(self._group(group), first), self._group(group))
        done = sorted({*self.manifest["blocks"][group], first})
        self._update(blocks={**self.manifest["blocks"], group: done}, digests=self._with_digest(group, str(first)))

    def finished(self, group: str) -> set[int]:
        """First pairs of the finished blocks of a group."""
        return set(self.manifest["blocks"].get(group, ()))

    def coordinate(self, group: str, name: str) -> np.ndarray | None:
        """A coordinate of a group that is written in part. None if no block of it is right for the pairs of the run, or
        if the coordinate cannot be read, which `declare` then writes again."""
        if not self.finished(group) or self.is_outdated(group):
            return None
        try:
            return self._open(group)[name].values
        except NOT_DAMAGE:
            raise
        except Exception:  # zarr and its codecs raise many kinds
            return None

    def put(self, group: str, dataset: xr.Dataset) -> None:
        """Writes a whole group in one move, in place of an earlier one of that name."""
        self._require_writable()
        if group in self.manifest["blocks"]:
            raise StoreError(f"group {group!r} is written in blocks; choose another name")
        target = self._group(group)
        partial = self.path / f".{group}.partial"
        previous = target.with_name(f".{group}.previous")  # where `recover` looks
        recover(target)
        zarr.open_group(self.path / "data.zarr", mode="a", zarr_format=3)
        shutil.rmtree(partial, ignore_errors=True)
        try:
            self._write_zarr(dataset, partial, mode="w", write_empty_chunks=True)
            sync_folder(partial)
            # A kill before the move leaves the old group with the new digest: it counts as damaged and is made again.
            whole = {**self._digests, group: {WHOLE: digest(partial, WHOLE)}}
            self._update(digests=whole, **self._without_outdated(group))
            if target.exists():
                shutil.rmtree(previous, ignore_errors=True)
                os.replace(target, previous)
            os.replace(partial, target)
            sync(target.parent / "zarr.json", target.parent, self.path)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            if recover(target):
                shutil.rmtree(previous, ignore_errors=True)

    @property
    def groups(self) -> list[str]:
        """Names of all groups that exist or that the manifest names."""
        there = {found.name for found in self._group("").glob("[!.]*") if found.is_dir()}
        return sorted(there | set(self.manifest["blocks"]) | set(self._digests))

    def holds(self, group: str) -> bool:
        """Whether a group of this name exists, finished or not."""
        return recover(self._group(group))

    def load(self, group: str, *, partial: bool = False) -> xr.Dataset:
        """A group, in memory. Every chunk's checksum is verified.

        Args:
          partial: accept a group whose blocks are not all measured; the missing ones are NaN.

        Raises:
          StoreError: it is missing, incomplete or damaged; the message names blocks and remedy.
        """
        target = self._group(group)
        if not recover(target):
            raise StoreError(f"{self.path} holds no group {group!r}; {self._remedy()}")
        if self.is_outdated(group):
            raise StoreError(f"{self.path}: group {group!r} lacks the pairs that were added; continue with --resume")
        try:
            done = self.manifest["blocks"].get(group)
            altered = self._altered(group)
            there = set(done or ()) if LAYOUT in altered else set(blocks_of(target))
            missing = missing_chunks(target, done and [first for first in done if first in there])
            found = self._open(group).load()
        except NOT_DAMAGE:
            raise
        except Exception as error:  # zarr and its codecs raise many kinds for a damaged group
            raise StoreError(f"{self._damage(group)} ({type(error).__name__}: {error})") from error
        invented = sorted(set(done or ()) - there)
        if invented:
            raise StoreError(
                f"{self.path}: the manifest names blocks of group {group!r} that it cannot have: {invented}"
            )
        if missing or altered:
            why = f"{missing[0]} does not exist" if missing else "its digest differs from the one that was written"
            raise StoreError(f"{self._damage(group)} ({why})")
        if done is not None and not partial and there - set(done):
            pairs = pairs_of(target, sorted(there - set(done)))
            raise StoreError(f"{self.path}: {pairs} of group {group!r} are not measured yet; continue with --resume")
        return found

    def _mend_coordinates(self, group: str, template: xr.Dataset) -> bool:
        """Writes unreadable coordinates of a group again, which follow from the settings; returns whether any were."""
        bad = [name for name in template.coords if damaged(self._group(group), only=str(name))]
        for name in bad:
            shutil.rmtree(self._group(group) / str(name), ignore_errors=True)
        if bad:
            mended = template.coords.to_dataset()
            mended = mended.drop_vars([name for name in mended.variables if name not in bad])
            self._write_zarr(mended, self.path / "data.zarr", group=group, mode="a", write_empty_chunks=True)
        return bool(bad)

    @property
    def _digests(self) -> dict[str, dict[str, str]]:
        return self.manifest.get(DIGESTS, {})

    def _with_digest(self, group: str, name: str) -> dict[str, dict[str, str]]:
        return {**self._digests, group: {**self._digests.get(group, {}), name: digest(self._group(group), name)}}

    def _altered(self, group: str) -> set[str]:
        return altered(self._group(group), self._digests.get(group, {}), self.finished(group))

    def _bad_blocks(self, group: str) -> list[int]:
        return bad_blocks(self._group(group), self._digests.get(group, {}), self.finished(group))

    def _damage(self, group: str) -> str:
        """A message: which part of a group is damaged or missing, and what to do."""
        done = self.manifest["blocks"].get(group)
        sound = readable(self._group(group)) and LAYOUT not in self._altered(group)
        blocks = self._bad_blocks(group) if done and sound else []
        what = f"{pairs_of(self._group(group), blocks)} of group {group!r} are" if blocks else f"group {group!r} is"
        return f"{self.path}: {what} damaged or missing; the same command with --resume makes only that part again"

    def _drop_damaged(self) -> None:
        """Forgets what cannot be read, so that it is measured again: blocks, and groups that were written whole."""
        blocks = {}
        for group, done in self.manifest["blocks"].items():
            target = self._group(group)
            # otherwise the whole group is measured again
            if recover(target) and readable(target) and LAYOUT not in self._altered(group):
                bad, there = self._bad_blocks(group), blocks_of(target)
                blocks[group] = [first for first in done if first in there and first not in bad]
        if blocks != self.manifest["blocks"]:
            self._update(blocks=blocks)
        for target in self._group("").glob("[!.]*"):
            lost = not readable(target) or damaged(target) or self._altered(target.name)
            if target.is_dir() and target.name not in blocks and lost:
                shutil.rmtree(target)

    def _group(self, group: str) -> Path:
        return self.path / "data.zarr" / group

    def _open(self, group: str) -> xr.Dataset:
        return opened(self.path / "data.zarr", group)

    def _write_zarr(self, dataset: xr.Dataset, path: Path, *args: Any, **options: Any) -> None:
        self._require_writable()
        write_group(dataset, path, *args, **options)
