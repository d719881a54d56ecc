"""A study as one object, and the one driver that runs, times, resumes, stores and reports all of them.

A study has settings, a measurement on blocks of pairs, an analysis of what is stored, and a page. Data flow in one
direction: `measure` fills the run's groups, `analyse` reads nothing but groups and settings, and `page` reads these and
the analysis. If anything fails after measuring, `report` makes it again from what is stored.
"""

import shutil
import sys
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Generic, TypeVar, cast

import jax
import xarray as xr

from dit_jax.config import NetworkConfig
from dit_jax.disk import write_json
from dit_jax.distributed import agreed, require_same
from dit_jax.lock import held
from experiments.frame.bench import Bench
from experiments.frame.collection import PART, is_part, runs_in
from experiments.frame.kinds import by_kind
from experiments.frame.measured import Definitions, Measured, described, study_of
from experiments.frame.numerics import own_numerics
from experiments.frame.page import (
    Page,
    claims_of,
    drawn_section,
    filled,
    run_entry,
    store_page,
    stored_section,
    summary_of,
    write_page,
)
from experiments.frame.programs import compilations, kept
from experiments.frame.store import RunFolder, StoreError
from experiments.frame.subject import Subject, model_folder, model_name

C = TypeVar("C")


@dataclass(frozen=True)
class Study(Generic[C]):
    """A question, from its settings to its page."""

    name: str  # of the command and of the folder under runs/; the manifest stores it as "kind"
    config: type[C]  # a dataclass of settings: `StudyConfig` or one that extends it, if a network is measured
    measure: Callable[[Bench[C]], None]  # fills the groups of the run
    page: Callable[[Measured[C], xr.Dataset], Page]  # from what is stored, and the analysis
    analyse: Callable[[Measured[C]], xr.Dataset] = lambda measured: xr.Dataset()  # estimates from what is stored
    definitions: Definitions = field(default_factory=dict)  # meaning and units of what is stored, by name
    check: Callable[[C, Subject], None] | None = None  # raises ValueError for settings that do not fit the network
    together: Callable[[Sequence[Measured[C]]], Page] | None = None  # several runs side by side
    subject: str | None = None  # what is studied, for a study without a network
    any_network: bool = False  # whether networks without attention are accepted, too
    passes: Callable[[C, NetworkConfig], Mapping[str, int]] | None = None  # images through a network, see `frame.cost`
    joins: bool = False  # whether several processes can measure one run together, see `run_joined`


@own_numerics()
def run_study(
    study: Study[C],
    config: C,
    out: str | Path,
    *,
    resume: bool = False,
    command: str = "",
    progress: bool = True,
    figures: bool = True,
    heard: Callable[[float], None] | None = None,
) -> Path:
    """Runs a study and fills the folder of the run.

    Args:
      config: settings.
      out: folder of the run.
      resume: continue an interrupted run of the same settings; it ends with the same bits.
      command: how it was called, for the manifest.
      figures: whether to draw the figures, which takes longer than the rest of the page. `report` draws them later.
      heard: is told, after the first block, how many seconds an image takes to go through the network.

    Returns:
      the path of ``report.html``; of the folder itself for a part of a run, which has no page.

    Raises:
      ValueError: settings that do not fit the weights; an output folder that holds another run, or that another process
        is writing.
    """
    out, options = Path(out), {"resume": resume, "command": command, "progress": progress}
    if jax.distributed.is_initialized() and jax.process_count() > 1:
        return run_joined(study, config, out, **options, figures=figures)
    with held(out):
        return run_held(study, config, out, **options, figures=figures, heard=heard)


def run_held(
    study: Study[C],
    config: C,
    out: Path,
    *,
    resume: bool,
    command: str,
    progress: bool,
    figures: bool = True,
    heard: Callable[[float], None] | None = None,
) -> Path:
    """`run_study` in a folder that this process holds."""
    started, compiled = time.perf_counter(), compilations()
    bench = _opened(study, config, out, resume=resume, command=command, progress=progress, heard=heard)
    _say(bench)
    _measure(study, bench, started, compiled)
    return _finished(study, bench, figures)


def run_joined(
    study: Study[C], config: C, out: Path, *, resume: bool, command: str, progress: bool, figures: bool = True
) -> Path:
    """`run_study` in one of several processes that have joined (`dit_jax.distributed`), all of which call it.

    The pairs of a block, and with sharded parameters the weights, are split over the devices of all processes. The
    first process owns the folder, speaks, and makes the page. Each of the others does the same with a copy of the
    folder as it is when measuring begins, which it throws away, so that all skip the same blocks.

    Returns:
      what `run_study` does; `out` in the others.

    Raises:
      FailedElsewhere: another process has failed before measuring or after it.
      ValueError: see `run_study`; a study that cannot be measured in this way, other settings in another process, a
        folder that another process cannot read.
    """
    if not study.joins:
        raise ValueError(f"syncgap {study.name} measures a run in one process only; start it as one task")
    started, compiled, first = time.perf_counter(), compilations(), jax.process_index() == 0
    require_same(
        zlib.crc32(repr((study.name, config, str(out), resume)).encode()),
        "the tasks of this job step were given different settings or folders, and tasks of one step measure one run "
        "together; start each run in a step of its own (srun -n 1)",
    )
    with ExitStack() as stack:

        def open_first() -> Bench[C]:
            stack.enter_context(held(out))
            return _opened(study, config, out, resume=resume, command=command, progress=progress)

        def open_other() -> Bench[C]:
            copy = Path(stack.enter_context(TemporaryDirectory(prefix="syncgap-"))) / "run"
            try:
                shutil.copytree(out, copy)
            except OSError as error:
                raise StoreError(
                    f"process {jax.process_index()} cannot read or copy {out}, which the first process writes "
                    f"({error}); give an --out folder that all hosts see, and TMPDIR one with room for a copy"
                ) from error
            return _opened(study, config, copy, resume=True, command=command, progress=False)

        opened = agreed(open_first) if first else agreed(lambda: None)
        seen = zlib.crc32((out / "manifest.json").read_bytes()) if (out / "manifest.json").is_file() else 0
        bench = agreed((lambda: opened) if first else open_other)
        require_same(seen, f"not all processes see the same state of {out}; wait some seconds and use --resume")
        assert bench is not None
        if first:
            _say(bench)
        _measure(study, bench, started, compiled)
        return agreed(lambda: _finished(study, bench, figures) if first else out)


def _opened(study: Study[C], config: C, out: Path, **options: Any) -> Bench[C]:
    return Bench(
        study.name,
        config,
        out,
        subject=study.subject,
        definitions=study.definitions,
        check=study.check,
        passes=study.passes,
        any_network=study.any_network,
        **options,
    )


def _say(bench: Bench[Any]) -> None:
    """What whoever reads the results has to know before."""
    if bench.run.moved:
        changed = "; ".join(bench.run.moved)
        print(f"resumed with another device or version, so last digits may differ ({changed})", file=sys.stderr)
    if unknown := bench.manifest.get("unknown_of_protocol"):
        print(f"not known of the paper's protocol, and as the settings have it: {'; '.join(unknown)}", file=sys.stderr)


def _measure(study: Study[C], bench: Bench[C], started: float, compiled: int) -> None:
    bench.run.count("measuring_s", started)
    study.measure(bench)
    bench.run.note()
    bench.run.note_compilations(compilations() - compiled)


def _finished(study: Study[C], bench: Bench[C], figures: bool) -> Path:
    if is_part(bench.run):
        bench.run.finish()
        return bench.run.path
    return report(study, bench.run, figures=figures)


def run_each(study: Study[C], config: C, out: str | Path, **options: Any) -> Path:
    """Runs a study of several networks: each in a folder of `out` that has the network's name, then all side by side.

    Args:
      config: settings whose `weights` are a tuple.
      options: of `run_study`. With `resume`, networks that are finished are not run again, and new ones are added.

    Returns:
      the path of the joint ``report.html``.

    Raises:
      ValueError: two networks have the same name; see `run_study`; another process writes `out`.
    """
    out, weights = Path(out), cast(Any, config).weights
    folders = {model_name(model_folder(each)): each for each in weights}
    if len(folders) < len(weights):
        raise ValueError(f"two of the networks have the same name: {', '.join(weights)}; rename a folder")
    with held(out), kept():  # whose page is everyone's; each network's folder is held by `run_study` beside it
        for name, each in folders.items():
            run_study(study, replace(cast(Any, config), weights=(each,)), out / name, **options)
        return joint_page(out, {study.name: study}.get, figures=options.get("figures", True))


@own_numerics()
def report(study: Study[C], run: RunFolder, *, figures: bool = True) -> Path:
    """Makes analysis, claims, figures and page of a run from what it has measured, and marks the run complete. Returns
    the path of ``report.html``.

    Args:
      figures: whether to draw the figures. A page without says how to get them.

    Raises:
      StoreError: something that was measured is missing or damaged; the message says what to do.
    """
    if is_part(run):
        raise StoreError(f"{run.path} is {PART}, which has no page of its own; `syncgap merge` joins parts")
    started = time.perf_counter()
    measured = Measured.of(run, study.config)
    analysis = study.analyse(measured)
    if analysis.variables:
        analysis = described(analysis, study.definitions)
        run.put("analysis", analysis)
    store_page(run, study.page(measured, analysis), figures=figures)
    if run.manifest["status"] != "complete":
        run.note(analysis_s=time.perf_counter() - started)
    path = run.path / "report.html"
    run.finish(lambda manifest: write_page(path, [stored_section(run, manifest)]))
    return path


def joint_page(folder: Path, find: Callable[[str], Study[Any] | None], *, figures: bool = True) -> Path:
    """``report.html`` of a folder of runs. First comes what each run says about the paper's four claims, then which
    verdicts depend on what networks predict, then the studies of several networks side by side, then every run in full.
    What is no finished run, or cannot be shown, is listed with the reason and left out.

    Args:
      find: the study of a name, or None if there is none.
      figures: whether to draw those of several networks side by side.

    Raises:
      StoreError: the folder holds no finished runs.
    """
    runs, others = runs_in(folder)
    sections: dict[str, Mapping[str, Any]] = {}
    for name, run in list(runs.items()):
        try:  # a run that cannot be shown must not cost the page of all others
            sections[name] = stored_section(run, name=name)
            claims_of(run)
        except StoreError as error:
            others[name] = str(error)
            del runs[name]
    if not runs:
        there = f" ({'; '.join(f'{name}: {what}' for name, what in others.items())})" if others else ""
        raise StoreError(f"{folder} holds no finished run{there}; give an --out folder, or a folder of such folders")
    studies: dict[str, list[RunFolder]] = {}
    for run in runs.values():
        studies.setdefault(study_of(run), []).append(run)
    joint = []
    for name, members in studies.items():
        if len(members) > 1 and (study := find(name)) is not None and study.together is not None:
            try:
                joint.append(_together(folder, study, members, figures))
            except StoreError as error:
                others[f"the runs of {name} side by side"] = str(error)
    if others:
        print(f"left out: {'; '.join(f'{name}: {what}' for name, what in others.items())}", file=sys.stderr)
    shown = [*joint, *(sections[name] for name in runs)]
    title = "Where diffusion transformers decide: all experiments"
    entries = [run_entry(name, run) for name, run in runs.items()]
    return write_page(
        folder / "report.html",
        shown,
        title=title,
        summary=summary_of(runs),
        kinds=[table for name, members in studies.items() if (table := by_kind(name, members)) is not None],
        others=others,
        runs=entries,
    )


def find_study(run: RunFolder, find: Callable[[str], Study[Any] | None]) -> Study[Any]:
    """The study of a run.

    Raises:
      StoreError: it is not known.
    """
    study = find(study_of(run))
    if study is None:
        raise StoreError(f"{run.path} is a run of the study {study_of(run)!r}, which this version does not have")
    return study


def _together(folder: Path, study: Study[Any], runs: Sequence[RunFolder], figures: bool) -> Mapping[str, Any]:
    assert study.together is not None
    page = study.together([Measured.of(run, study.config) for run in runs])
    section = drawn_section(page, folder / "figures", runs, figures=figures)
    write_json(folder / f"{study.name}-together.json", section)
    return {**filled(section, folder / "figures"), "id": f"{study.name}-together"}
