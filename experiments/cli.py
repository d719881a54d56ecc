"""The command line: ``syncgap --help``."""

import functools
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

import tyro

from dit_jax.config import Prediction
from dit_jax.conversion import convert_checkpoint
from experiments.cloning import CloningConfig
from experiments.compare import CompareConfig
from experiments.depth import DepthConfig
from experiments.interventions import InterventionsConfig
from experiments.mechanism import MechanismConfig
from experiments.modalities import ModalitiesConfig
from experiments.pictures import SampleConfig
from experiments.response import ResponseConfig
from experiments.solvable import SolvableConfig
from experiments.study import StudyConfig


@dataclass(frozen=True)
class Compare:
    """Measure the synchronization gap of a DiT against the coupling and lay it over the theory."""

    settings: tyro.conf.OmitArgPrefixes[CompareConfig] = field(default_factory=CompareConfig)
    out: Path = Path("runs/compare")  # folder of the run
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # go on with an interrupted run in --out
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


@dataclass(frozen=True)
class Train:
    """Train a small DiT on class folders of images, or on data whose law is known."""

    data: tyro.conf.Positional[Path]  # a folder or zip file of <class>/<image>, or the word solvable (--size 8)
    out: tyro.conf.Positional[Path]  # folder of the training run
    transform: str = "natural"  # of the images: natural, whitened, reversed, power:A, permuted or gaussian
    size: int = 16  # images are cropped and resized to size x size
    prediction: Prediction = "v"
    depth: int = 12
    hidden_size: int = 96
    num_heads: int = 6
    patch_size: int = 2
    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    decay_fraction: float = 0.25  # share of the steps, at the end, over which the rate falls to zero
    weight_cap: float = 1.0  # epsilon only: loss weight min(1 + 1/SNR, cap); 1 is the official loss
    seed: int = 0
    dtype: str = "float32"
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    checkpoint_every: int = 500
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclass(frozen=True)
class Theory:
    """Draw the teaching figures of the theory, with captions, as one page, with the interactive one beside it."""

    out: Path = Path("runs/theory")  # folder of the page


C = TypeVar("C", bound=StudyConfig | ModalitiesConfig)


@dataclass(frozen=True)
class StudyRun(Generic[C]):
    """One of the studies; its settings say which."""

    settings: tyro.conf.OmitArgPrefixes[C]
    out: Path | None = None  # folder of the run; runs/ and the name of the study by default
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # go on with an interrupted run in --out
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


STUDIES: dict[str, type[StudyConfig] | type[ModalitiesConfig]] = {
    "depth": DepthConfig,
    "mechanism": MechanismConfig,
    "interventions": InterventionsConfig,
    "cloning": CloningConfig,
    "response": ResponseConfig,
    "solvable": SolvableConfig,
    "modalities": ModalitiesConfig,
}


def _documented(config: type[StudyConfig] | type[ModalitiesConfig]) -> type:
    """`StudyRun` of these settings, with their docstring as its help."""
    return make_dataclass(
        config.__name__, [], bases=(StudyRun[config],), namespace={"__doc__": config.__doc__}, frozen=True
    )


@dataclass(frozen=True)
class Report:
    """Draw the figures and the report of a stored run again, or join those of a folder of runs into one."""

    run: tyro.conf.Positional[Path]  # the --out folder of a command, or a folder of such folders


@dataclass(frozen=True)
class Sample:
    """Draw pictures of chosen classes: arrays, a grid to look at, a manifest."""

    weights: tyro.conf.Positional[str]  # a converted or trained DiT (folder), or the name of a shipped model
    out: tyro.conf.Positional[Path]  # folder of the pictures
    settings: tyro.conf.OmitArgPrefixes[SampleConfig] = field(default_factory=SampleConfig)
    overwrite: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # replace a folder of pictures
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


@dataclass(frozen=True)
class Info:
    """Say what a model folder holds."""

    weights: tyro.conf.Positional[str]  # a converted or trained DiT (folder), or the name of a shipped model
    verify: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # read the arrays and check their digest
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # print the manifest instead


@tyro.conf.configure(tyro.conf.FlagCreatePairsOff)
@functools.wraps(convert_checkpoint)
def _convert(*args: Any, **settings: Any) -> Callable[[], int]:
    """`convert_checkpoint`, to be run once the command line is read."""
    return functools.partial(convert_checkpoint, *args, **settings)


def main(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. Errors of ours are one message, not a traceback."""
    argv = sys.argv[1:] if args is None else args
    studies = {name: _documented(config) for name, config in STUDIES.items()}
    command: Any = tyro.extras.subcommand_cli_from_dict(
        {
            "compare": Compare,
            **studies,
            "report": Report,
            "theory": Theory,
            "train": Train,
            "sample": Sample,
            "info": Info,
            "convert": _convert,
        },
        args=argv,
        prog="syncgap",
    )
    line = shlex.join(["syncgap", *argv])
    try:
        if isinstance(command, functools.partial):
            return command()
        return _run(command, line)
    except (ValueError, OSError) as error:
        print(f"syncgap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumable = isinstance(command, Compare | Train | StudyRun)
        how = "; the same command with --resume goes on from the last finished block" if resumable else ""
        print(f"\nsyncgap: interrupted{how}", file=sys.stderr)
        return 130


def _run(command: Compare | StudyRun | Train | Report | Sample | Info, line: str) -> int:
    if isinstance(command, Compare):
        from experiments.compare import compare

        report = compare(command.settings, command.out, resume=command.resume, command=line, progress=not command.quiet)
        print(f"report: {report}")
    elif isinstance(command, StudyRun):
        kind = next(name for name, config in STUDIES.items() if type(command.settings) is config)
        run: Callable[..., Path] = getattr(import_module(f"experiments.{kind}"), kind)
        out = command.out or Path("runs") / kind
        page = run(command.settings, out, resume=command.resume, command=line, progress=not command.quiet)
        print(f"report: {page}")
    elif isinstance(command, Report):
        print(f"report: {_report(command.run)}")
    elif isinstance(command, Theory):
        from experiments.teaching import theory

        print(f"page: {theory(command.out)}")
    elif isinstance(command, Sample):
        from experiments.pictures import sample_pictures

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
    else:
        print(f"model: {_train(command, line)}")
    return 0


def _report(folder: Path) -> Path:
    from experiments.figures import save_figures
    from experiments.report import write_report
    from experiments.section import joint_page
    from experiments.store import RunFolder

    if folder.is_dir() and not (folder / "manifest.json").exists():
        return joint_page(folder)
    run = RunFolder.open(folder, writable=True)
    kind = run.manifest.get("kind")
    if kind in STUDIES:
        return import_module(f"experiments.{kind}_report").report(run)
    save_figures(run)
    return write_report(run)


def _info(command: Info) -> int:
    from experiments.info import describe, manifest_json, model_folder, verify

    folder = model_folder(command.weights)
    print(manifest_json(folder) if command.json else describe(folder))
    if not command.verify:
        return 0
    matches, line = verify(folder)
    print(line, file=sys.stderr if command.json or not matches else sys.stdout)
    return 0 if matches else 2


def _train(command: Train, line: str) -> Path:
    from dit_jax.config import DiTConfig
    from dit_jax.images import load_images
    from dit_jax.training import TrainConfig, train
    from dit_jax.transforms import training_data, transformation_name
    from experiments.solvable_data import SolvableData

    solvable = command.data == Path("solvable")
    transform = transformation_name(command.transform)  # before the images are read, which takes a while
    if solvable and transform != "natural":
        raise ValueError("solvable data have a law of their own; --transform is for folders and zip files of images")
    if solvable:
        data = SolvableData()
    else:
        data = training_data(load_images(command.data, command.size, not command.quiet), transform)
    model = DiTConfig(
        input_size=command.size,
        patch_size=command.patch_size,
        in_channels=data.shape[-1],
        hidden_size=command.hidden_size,
        depth=command.depth,
        num_heads=command.num_heads,
        num_classes=len(data.class_names),
        learn_sigma=not solvable,  # the theory is that of the posterior variance
        prediction=command.prediction,
        dtype=command.dtype,
    )
    settings = TrainConfig(
        steps=command.steps,
        batch_size=command.batch_size,
        learning_rate=command.learning_rate,
        decay_fraction=command.decay_fraction,
        weight_cap=command.weight_cap,
        flip=data.may_mirror,
        label_dropout=0.0 if solvable else 0.1,
        seed=command.seed,
    )
    return train(
        data,
        model,
        settings,
        command.out,
        resume=command.resume,
        checkpoint_every=command.checkpoint_every,
        command=line,
        progress=not command.quiet,
    )


if __name__ == "__main__":
    sys.exit(main())
