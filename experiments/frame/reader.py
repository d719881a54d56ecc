"""Reading what a run has stored."""

from pathlib import Path

import xarray as xr

from experiments.frame.manifest import DIGESTS, OUTDATED
from experiments.frame.store import RunFolder


def open_run(path: str | Path) -> xr.DataTree:
    """All that a run has stored, by group, in memory: ``open_run("runs/compare")["network"].energy``.

    The attributes of the tree are the run's settings, its status, and the versions and device it ran with. Coordinates
    of couplings, levels and frequencies are float64, so that ``.sel(coupling=0.2)`` finds its value.

    Raises:
      StoreError: there is no run, or it is unfinished or damaged; the message says what to do.
    """
    run = RunFolder.open(path)
    tree = xr.DataTree.from_dict({group: run.load(group) for group in run.groups})
    tree.attrs.update(
        {name: value for name, value in run.manifest.items() if name not in ("blocks", DIGESTS, OUTDATED)}
    )
    return tree
