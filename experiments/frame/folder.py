"""The folder of a run but for its arrays: manifest, JSON files, timings, and what of it is out of date."""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dit_jax.disk import write_json
from experiments.frame.manifest import COMPILATIONS, OUTDATED, StoreError, now, without_nan


class Folder:
    """What a `RunFolder` is, but for its arrays.

    Attributes:
      path: the folder.
      manifest: the entries of ``manifest.json``; replaced, never changed in place.
      moved: for a resumed run, which device, versions or size of blocks differ from those before.
    """

    def __init__(self, path: Path, manifest: dict, *, writable: bool):
        self.path, self.manifest, self.writable = path, manifest, writable
        self.moved: list[str] = []
        self._counting: tuple[str, float, float] | None = None

    def is_outdated(self, group: str) -> bool:
        """Whether a group was made before pairs were added to the run, and not brought up to date since."""
        return group in self.manifest.get(OUTDATED, ())

    def confirm(self, group: str) -> None:
        """Says that a group is right for all pairs of the run, too."""
        if self.is_outdated(group):
            self._update(**self._without_outdated(group))

    def _without_outdated(self, group: str) -> dict[str, list[str]]:
        outdated = self.manifest.get(OUTDATED)
        return {} if outdated is None else {OUTDATED: [name for name in outdated if name != group]}

    def _sweep(self) -> None:
        """Removes half-written files that a killed process has left behind."""
        for left in self.path.rglob("*.partial"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)

    def write_json(self, name: str, entries: Any) -> None:
        """Writes a JSON file of the run in one move; NaN and infinities become null."""
        self._require_writable()
        write_json(self.path / name, without_nan(entries))

    def read_json(self, name: str) -> Any:
        """Reads what `write_json` wrote.

        Raises:
          StoreError: it is missing or damaged.
        """
        path = self.path / name
        try:
            return json.loads(path.read_text())
        except FileNotFoundError as error:
            raise StoreError(f"{self.path} holds no {name}; {self._remedy()}") from error
        except (OSError, ValueError) as error:
            raise StoreError(f"{path} cannot be read ({error}); {self._remedy()}") from error

    def count(self, timing: str, since: float) -> None:
        """From now on every write of the manifest says how long this has taken: since `since` (of
        `time.perf_counter`), and in earlier processes, also those that were killed. `note` ends it."""
        self._counting = timing, self.manifest["timings"].get(timing, 0.0), since

    def note(self, **timings: float) -> None:
        """Adds seconds to timings of the manifest, and ends what `count` counts."""
        self._update()
        self._counting = None
        known = self.manifest["timings"]
        self._update(timings={**known, **{name: round(known.get(name, 0) + s, 1) for name, s in timings.items()}})

    def note_compilations(self, count: int) -> None:
        """Adds to how many programs were compiled while the run was measured."""
        self._update(**{COMPILATIONS: self.manifest.get(COMPILATIONS, 0) + count})

    def finish(self, write: Callable[[dict], Any] | None = None) -> None:
        """Marks the run complete.

        Args:
          write: called just before, with the manifest as it will be, to write a page that shows it.
        """
        self._sweep()  # of an earlier process that was killed
        last = {} if self.manifest["status"] == "complete" else {"status": "complete", "finished": now()}
        if write is not None:
            write({**self.manifest, **last})
        self._update(**last)

    def _update(self, **entries: Any) -> None:
        self._require_writable()
        manifest = {**self.manifest, **entries}
        if self._counting is not None:
            timing, before, since = self._counting
            spent = round(before + time.perf_counter() - since, 1)
            manifest["timings"] = {**manifest["timings"], timing: spent}
        write_json(self.path / "manifest.json", manifest)
        self.manifest = manifest

    def _require_writable(self) -> None:
        if self.manifest and not (self.path / "manifest.json").is_file():  # or else zarr would make a new one
            raise StoreError(f"{self.path} was removed or moved while it was written; put it back, or run again")
        if not self.writable:
            raise StoreError(f"{self.path} was opened for reading; RunFolder.create(..., resume=True) writes")

    def _remedy(self) -> str:
        unfinished = self.manifest["status"] != "complete"
        again = "the same command with --resume makes it again"
        return "its run is not finished, continue it with --resume" if unfinished else again
