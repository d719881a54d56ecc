"""Groups of a run to which pairs were added: they are made larger beside the old ones, whose full blocks they keep."""

import os
import shutil
from typing import Any

import xarray as xr

from dit_jax.disk import link, recover, sync, sync_folder
from experiments.frame.chunks import block_of, damaged, files_of, layout_of, pairs_in
from experiments.frame.digests import LAYOUT, digest
from experiments.frame.manifest import StoreError

Run = Any  # a `RunFolder`, whose module imports this one


def require_layout(run: Run, group: str, template: xr.Dataset) -> None:
    """Raises StoreError unless a group is as the template has it, or as its first pairs have it if it is outdated."""
    stored, target = run._open(group), run._group(group)
    if run.is_outdated(group) and stored.sizes["pair"] <= template.sizes["pair"]:
        template = template.isel(pair=slice(stored.sizes["pair"]))
        unreadable = [str(name) for name in template.coords if damaged(target, only=str(name))]
        stored, template = (each.drop_vars(unreadable, errors="ignore") for each in (stored, template))
    coords = stored.coords.to_dataset(), template.coords.to_dataset()
    if layout_of(stored) != layout_of(template) or not coords[0].equals(coords[1]):
        raise StoreError(f"{target} has another layout than this run needs; choose another --out")


def enlarge(run: Run, group: str, template: xr.Dataset, chunk: int) -> int:
    """Makes a group as large as the template, and returns the pairs in its blocks.

    It is made beside the old one and then takes its place. A kill leaves the one or the other whole, see `undo_halves`.

    Args:
      chunk: pairs in a block, where the old group is a single block that is not full.
    """
    target, larger, previous = (run._group(name) for name in (group, f".{group}.partial", f".{group}.previous"))
    size, block = pairs_in(target), block_of(target)
    if block == size < chunk:
        block = chunk
    full = [first for first in run.manifest["blocks"][group] if first + block <= size]
    shutil.rmtree(larger, ignore_errors=True)
    run._write_empty(larger.name, template, block)
    for file in (file for first in full for file in files_of(target, first)):
        place = larger / file.relative_to(target)
        place.parent.mkdir(parents=True, exist_ok=True)
        link(file, place)
    sync_folder(larger)
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(target, previous)
    os.replace(larger, target)
    sync(target.parent)
    kept = {name: value for name, value in run._digests.get(group, {}).items() if name in map(str, full)}
    run._update(
        blocks={**run.manifest["blocks"], group: full},
        digests={**run._digests, group: {LAYOUT: digest(target, LAYOUT), **kept}},
        **run._without_outdated(group),
    )
    shutil.rmtree(previous, ignore_errors=True)
    return block


def undo_halves(run: Run) -> None:
    """Puts a group back whose larger form has taken its place, if the manifest does not know of that yet."""
    for previous in run._group("").glob(".*.previous"):
        group = previous.name.removeprefix(".").removesuffix(".previous")
        expected = run._digests.get(group, {}).get(LAYOUT)
        if recover(run._group(group)) and previous.exists():
            if digest(run._group(group), LAYOUT) != expected == digest(previous, LAYOUT):
                shutil.rmtree(run._group(group))
                os.replace(previous, run._group(group))
            shutil.rmtree(previous, ignore_errors=True)
