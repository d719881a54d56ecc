"""The command line: ``syncgap --help``. Imports nothing heavy until a command runs."""

import contextlib
import functools
import io
import re
import shlex
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import tyro

from dit_jax.conversion import convert_checkpoint
from dit_jax.disk import from_home, writing
from dit_jax.job import several_tasks, task
from dit_jax.lock import FolderInUse, held
from experiments import studies
from experiments.sweeps.settings import Sweep
from experiments.tools.settings import Covariance, MakeClassifier, SampleConfig, Train

_BORDER = re.compile(r"(.*?)((?:\x1b\[[\d;]*m|│| )*)")  # a line in a box, and the box's right border
INTERRUPTED, TERMINATED = 130, 143  # exit codes: 128 and the number of the signal


@dataclass(frozen=True)
class Theory:
    """Draw the teaching figures of the theory as one page with captions, and an interactive page beside it."""

    out: Path = Path("runs/theory")  # folder of the page


C = TypeVar("C")
_Flag = Annotated[bool, tyro.conf.FlagCreatePairsOff]


@dataclass(frozen=True)
class StudyRun(Generic[C]):
    """One of the studies."""

    study: ClassVar[str]  # its name
    settings: tyro.conf.OmitArgPrefixes[C]
    # tyro reads no comments of a class that `_command` extends, so the help of these stands in their types
    out: Annotated[Path | None, tyro.conf.arg(help="folder of the run; runs/STUDY by default")] = None
    resume: Annotated[_Flag, tyro.conf.arg(help="continue an interrupted run in --out")] = False
    quiet: Annotated[_Flag, tyro.conf.arg(help="no progress bar")] = False


def _command(study: str) -> type:
    """`StudyRun` of this study, with the docstring of its settings as its help."""
    config = studies.settings_of(study)
    namespace = {"__doc__": config.__doc__, "study": study}
    return make_dataclass(config.__name__, [], bases=(StudyRun[config],), namespace=namespace, frozen=True)


@dataclass(frozen=True)
class Report:
    """Make the figures and the report of a stored run or sweep again, or join the reports of a folder of runs."""

    run: tyro.conf.Positional[Path]  # the --out folder of a command, or a folder of such folders
    csv: Path | None = None  # of a sweep: export a table with a row for every cell and claim
    parquet: Path | None = None  # the same as a Parquet file, which needs pyarrow


@dataclass(frozen=True)
class Merge:
    """Join parts of one run of compare, measured with --first-pair, to the run that one process would have made."""

    runs: tyro.conf.Positional[tuple[Path, ...]]  # folders of the parts, in any order
    out: Path  # folder of the joined run
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


@dataclass(frozen=True)
class Sample:
    """Sample pictures of chosen classes; writes arrays, a grid of the pictures, and a manifest."""

    weights: tyro.conf.Positional[str]  # folder of a converted or trained network, or the name of a shipped one
    out: tyro.conf.Positional[Path]  # folder of the pictures
    settings: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # replace an earlier folder of pictures
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


@dataclass(frozen=True)
class Info:
    """Describe the contents of a model folder."""

    weights: tyro.conf.Positional[str]  # folder of a converted or trained network, or the name of a shipped one
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # read the arrays and check their digest
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # print the manifest as JSON instead


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@functools.wraps(convert_checkpoint)
def _convert(*args: Any, **settings: Any) -> Callable[[], int]:
    """`convert_checkpoint`, to be run once the command line is read."""
    return functools.partial(convert_checkpoint, *args, **settings)


def _parsed(commands: dict[str, Any], argv: list[str]) -> Any:
    """The command that a line asks for. tyro names a setting's place in its own tree; its errors are shown without."""
    place, plain = "__tyro-dummy-inner__.settings", "the settings"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.extras.subcommand_cli_from_dict(commands, args=argv, prog="syncgap")
    finally:
        for line in said.getvalue().splitlines():
            text, border = _BORDER.fullmatch(line).groups()  # type: ignore[union-attr]  # it matches any line
            shorter = text.replace(place, plain)
            print(shorter + " " * (len(text) - len(shorter)) + border, file=sys.stderr)


class Terminated(KeyboardInterrupt):
    """A scheduler asked the process to end (SIGTERM). It is handled as Ctrl-C, with another exit code."""


def main(args: list[str] | None = None) -> int:
    """Runs one command and returns the exit code. Expected errors are one message, not a traceback."""
    given = sys.argv[1:] if args is None else args
    argv = [from_home(argument) for argument in given]
    for stream in (sys.stdout, sys.stderr):  # what a terminal cannot show is no reason to fail
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    commands: dict[str, Any] = {name: _command(name) for name in studies.NAMES}
    commands |= {
        "sweep": Sweep,
        "report": Report,
        "merge": Merge,
        "theory": Theory,
        "train": Train,
        "sample": Sample,
        "info": Info,
        "covariance": Covariance,
        "classifier": MakeClassifier,
        "convert": _convert,
    }
    command: Any = _parsed(commands, argv)
    line = shlex.join(["syncgap", *given])
    if not _joins(command):
        return _code(command, line)
    from dit_jax.distributed import leave

    try:
        code = _code(command, line)
    except Exception:
        traceback.print_exc()
        code = 1
    return leave(code) if code else 0


def _joins(command: Any) -> bool:
    """Whether the tasks of this job step run the command together. (Of a sweep each runs cells of its own.)"""
    return isinstance(command, StudyRun) and task() is not None and studies.find(command.study).joins


def _code(command: Any, line: str) -> int:
    """Runs a command and returns the exit code."""
    joins = _joins(command)
    try:
        with _ending_like_an_interrupt():
            if joins:
                from dit_jax.distributed import join

                join()
            if not isinstance(command, Info | Sweep):  # which need none, or leave them to other processes
                from dit_jax.platform import devices

                devices()
            if isinstance(command, StudyRun | Train) and not joins and (found := task()) and found[0] == 0:
                print(f"syncgap: {several_tasks()}", file=sys.stderr)
            return command() if isinstance(command, functools.partial) else _run(command, line)
    except (ValueError, OSError, MemoryError) as error:
        more = f"; {several_tasks()}" if isinstance(error, FolderInUse) and several_tasks() and not joins else ""
        print(f"syncgap: {_in_one_line(error)}{more}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):  # JAX's word for a device without room
            raise
        print(f"syncgap: {_in_one_line(MemoryError(error))}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as end:
        resumable = isinstance(command, Train | StudyRun | Sweep)
        how = "; the same command with --resume continues where it stopped" if resumable else ""
        terminated = isinstance(end, Terminated)
        print(f"\nsyncgap: {'terminated' if terminated else 'interrupted'}{how}", file=sys.stderr)
        return TERMINATED if terminated else INTERRUPTED


def _in_one_line(error: Exception) -> str:
    """An expected error as the command line says it."""
    if isinstance(error, MemoryError):
        reason = f" ({str(error).splitlines()[0]})" if str(error) else ""
        return f"the memory does not suffice{reason}; give a smaller --block, --batch or --batch-size if there is one"
    return str(error)


@contextlib.contextmanager
def _ending_like_an_interrupt() -> Iterator[None]:
    """While a command runs, SIGTERM, which schedulers send, raises `Terminated`. Outside the main thread signals cannot
    be caught, and nothing is changed."""

    def terminate(*_: Any) -> None:
        raise Terminated

    try:
        before = signal.signal(signal.SIGTERM, terminate)
    except ValueError:
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(command: Any, line: str) -> int:
    if isinstance(command, StudyRun):
        import jax

        from experiments.frame.study import run_each, run_study

        name = command.study
        out = command.out or Path("runs") / name
        run = run_each if isinstance(getattr(command.settings, "weights", None), tuple) else run_study
        options = {"resume": command.resume, "command": line, "progress": not command.quiet}
        with writing(out):
            page = run(studies.find(name), command.settings, out, **options)
        if jax.process_index() == 0:
            print(f"report: {page}" if page.suffix else f"part: {page} (join all parts with `syncgap merge`)")
    elif isinstance(command, Sweep):
        from experiments.sweeps.command import sweep

        return sweep(command, line)
    elif isinstance(command, Merge):
        from experiments.tools.reports import merged

        print(f"report: {merged(command.runs, command.out, command=line, progress=not command.quiet)}")
    elif isinstance(command, Report):
        print(f"report: {_report(command)}")
    elif isinstance(command, Theory):
        from experiments.tools.teaching import theory

        with held(command.out), writing(command.out):
            print(f"page: {theory(command.out)}")
    elif isinstance(command, Sample):
        from experiments.tools.pictures import sample_pictures

        with held(command.out):
            made = sample_pictures(
                command.weights,
                command.settings,
                command.out,
                overwrite=command.overwrite,
                command=line,
                progress=not command.quiet,
            )
        print(f"pictures: {command.out / 'grid.png'} ({made['grid']['shows']})")
    elif isinstance(command, Info):
        return _info(command)
    elif isinstance(command, Covariance):
        from experiments.tools.training import add_covariance

        print(f"covariance: {add_covariance(command)}")
    elif isinstance(command, MakeClassifier):
        from experiments.tools.classifier import make_classifier

        print(make_classifier(command))
    else:
        from experiments.tools.training import train_model

        print(f"model: {train_model(command, line)}")
    return 0


def _report(command: Report) -> Path:
    from experiments.frame.collection import SWEEP, what_else
    from experiments.sweeps.page import report_sweep
    from experiments.tools.reports import report_again

    if command.run.is_dir() and what_else(command.run) == SWEEP:
        return report_sweep(command.run, csv=command.csv, parquet=command.parquet)
    if command.csv or command.parquet:
        raise ValueError(f"{command.run} is no sweep, and --csv and --parquet export sweeps; leave them out")
    return report_again(command.run)


def _info(command: Info) -> int:
    from experiments.frame.subject import model_folder
    from experiments.tools.info import describe, manifest_json, verify

    folder = model_folder(command.weights)
    print(manifest_json(folder) if command.json else describe(folder))
    if not command.verify:
        return 0
    matches, line = verify(folder)
    print(line, file=sys.stderr if command.json or not matches else sys.stdout)
    return 0 if matches else 2


if __name__ == "__main__":
    sys.exit(main())
