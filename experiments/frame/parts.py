"""Parts of one run, measured by several processes or machines, joined to what one process would have measured.

Every pair has random numbers of its own, so a part is a run of some of the pairs. What depends on all of them, the
analysis and the page are made from the joined pairs.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import xarray as xr

from dit_jax.disk import occupied, replacing
from dit_jax.lock import held
from experiments.frame.chunks import filled
from experiments.frame.manifest import FREE, NEWER, OWN_ENTRIES, comparable, differences
from experiments.frame.measured import Measured
from experiments.frame.numerics import own_numerics
from experiments.frame.page import stored_section, write_page
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.study import Study, run_held

FIRST = "first_pair"  # the setting that makes a part of a run


@own_numerics()
def merge(
    study: Study[Any],
    parts: Sequence[str | Path],
    out: str | Path,
    *,
    command: str = "",
    progress: bool = True,
    figures: bool = True,
) -> Path:
    """Joins parts of one run to a run in `out`. With the same blocks it has the bits of a run by one process. The run
    is made beside `out` and takes its place when it is finished, so that one that is killed can be joined again.

    Args:
      parts: folders of runs of this study that differ in `pairs` and `first_pair` alone, in any order.
      command, progress, figures: as in `run_study`.

    Returns:
      the path of ``report.html``.

    Raises:
      ValueError: settings or weights differ; pairs are missing or in two parts; a part is unfinished or damaged; `out`
        is taken.
    """
    out = Path(out)
    runs = sorted((RunFolder.open(path) for path in parts), key=lambda run: run.manifest["settings"].get(FIRST, 0))
    _check(study, runs)
    first, settings = runs[0], [run.manifest["settings"] for run in runs]
    joined = {**settings[0], "pairs": sum(each["pairs"] for each in settings)}
    extra = {name: entry for name, entry in first.manifest.items() if name not in (*OWN_ENTRIES, *NEWER)}
    with held(out):
        if occupied(out):
            raise StoreError(f"{out} holds another run or something else; choose another --out")
        with replacing(out) as partial:
            run = RunFolder.create(partial, joined, command=command, extra=extra)
            _fill(study, runs, run, progress=progress, figures=figures)
        return write_page(out / "report.html", [stored_section(RunFolder.open(out))])  # which is called by its folder


def _fill(study: Study[Any], parts: Sequence[RunFolder], run: RunFolder, *, progress: bool, figures: bool) -> None:
    """Fills the folder of the joined run, analyses it and marks it complete."""
    first = parts[0]
    for group in first.manifest["blocks"]:
        if not first.load(group).attrs.get("of_all"):
            having = [part for part in parts if group in part.manifest["blocks"]]
            _join(run, group, having, run.manifest["settings"]["block"])
    if first.holds("pictures"):
        run.put("pictures", first.load("pictures"))
    config = Measured.of(run, study.config).config
    command = run.manifest["command"]
    run_held(study, config, run.path, resume=True, command=command, progress=progress, figures=figures)


def _check(study: Study[Any], runs: Sequence[RunFolder]) -> None:
    if not hasattr(study.config, FIRST):
        raise StoreError(f"runs of {study.name} cannot be measured in parts; compare can")
    alike = []
    for run in runs:
        entries = {name: entry for name, entry in run.manifest.items() if name not in OWN_ENTRIES and name not in NEWER}
        settings = comparable({"settings": run.manifest["settings"]})["settings"]
        settings = {name: value for name, value in settings.items() if name not in ("pairs", FIRST, "weights", *FREE)}
        alike.append(comparable({**entries, "settings": settings}))
        if run.manifest["status"] != "complete":
            raise StoreError(f"{run.path} is not finished; continue it with --resume")
    for run, entries in zip(runs, alike, strict=True):
        if changed := differences(alike[0], entries):
            raise StoreError(f"{run.path} and {runs[0].path} are no parts of one run: {'; '.join(changed)}")
    spans = [(run.manifest["settings"].get(FIRST, 0), run.manifest["settings"]["pairs"], run) for run in runs]
    if spans[0][0] != 0:
        raise StoreError(f"no part has the pairs 0 to {spans[0][0] - 1}; measure them without --first-pair")
    for (begin, count, run), (after, _, following) in pairwise(spans):
        if begin + count != after:
            what = f"pairs {begin + count} to {after - 1} are in no part" if begin + count < after else "they overlap"
            raise StoreError(
                f"{run.path} ends with pair {begin + count - 1}, {following.path} begins with {after}: {what}"
            )


def _join(run: RunFolder, group: str, parts: Sequence[RunFolder], block: int) -> None:
    """Copies a group that is written in blocks, part by part; every chunk's checksum is verified on the way."""
    found = [part.load(group).coords.to_dataset() for part in parts]
    pairs = xr.concat(found, "pair", data_vars="minimal", coords="minimal", compat="override", join="override")
    like = parts[0].load(group)
    size = pairs.sizes["pair"]
    empty = {
        name: (v.dims, filled(v.dtype, [size if dim == "pair" else n for dim, n in v.sizes.items()]), v.attrs)
        for name, v in like.data_vars.items()
    }
    chunk, first = run.declare(group, pairs.assign(empty).assign_attrs(like.attrs), block), 0
    for part in parts:
        measured = part.load(group)
        for at in range(0, measured.sizes["pair"], chunk):
            run.write(group, measured.isel(pair=slice(at, at + chunk)), first + at)
        first += measured.sizes["pair"]
