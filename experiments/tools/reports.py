"""Pages of stored runs: of one again, of a folder of runs, of parts of a run that are joined."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dit_jax.disk import writing
from dit_jax.lock import held
from experiments import studies
from experiments.frame.collection import OTHERS, TRAINING, what_else
from experiments.frame.parts import merge
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import find_study, joint_page, report


def report_again(folder: Path) -> Path:
    """Makes analysis, figures and page of a run again, or the joint page of a folder of runs; returns its path.

    Raises:
      ValueError: there are no runs, another process writes there, or something that is stored is damaged.
    """
    if not folder.is_dir():
        raise StoreError(f"there is no folder {folder}; give the --out folder of a study, or a folder of such folders")
    if (what := what_else(folder)) in (*OTHERS.values(), TRAINING):
        raise StoreError(f"{folder} holds {what}, of which there is no report; studies have one")
    with held(folder), writing(folder):
        if not (folder / "manifest.json").exists():
            return joint_page(folder, studies.find)
        run = RunFolder.open(folder, writable=True)
        return report(find_study(run, studies.find), run)


def merged(parts: Sequence[Path], out: Path, **options: Any) -> Path:
    """Joins parts of a run, see `merge`; returns the path of its page.

    Raises:
      ValueError: see `merge`.
    """
    if len(parts) < 2:
        raise ValueError("syncgap merge joins at least two parts of a run; give their folders")
    with writing(out):
        return merge(find_study(RunFolder.open(parts[0]), studies.find), parts, out, **options)
