"""The command line: `syncgap compare`, `syncgap train`, `syncgap report`, `syncgap sample`, `syncgap info`."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dit_jax.config import Prediction
from experiments.compare import CompareConfig
from experiments.pictures import SampleConfig


@dataclass(frozen=True)
class Compare:
    """Measure the synchronization gap of a DiT against the coupling and lay it over the theory."""

    settings: tyro.conf.OmitArgPrefixes[CompareConfig] = field(default_factory=CompareConfig)
    out: Path = Path("runs/compare")  # folder of the run
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # go on with an interrupted run in --out
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False  # no progress bar


@dataclass(frozen=True)
class Train:
    """Train a small DiT on class folders of images."""

    data: tyro.conf.Positional[Path]  # a folder or zip file of <class>/<image>
    out: tyro.conf.Positional[Path]  # folder of the training run
    size: int = 16  # images are cropped and resized to size x size
    prediction: Prediction = "v"
    depth: int = 12
    hidden_size: int = 96
    num_heads: int = 6
    patch_size: int = 2
    steps: int = 6000
    batch_size: int = 64
    learning_rate: float = 1.5e-3
    weight_cap: float = 1.0  # epsilon only: loss weight min(1 + 1/SNR, cap); 1 is the official loss
    seed: int = 0
    dtype: str = "float32"
    resume: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    checkpoint_every: int = 500
    quiet: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


@dataclass(frozen=True)
class Report:
    """Draw the figures and the report of a stored run again."""

    run: tyro.conf.Positional[Path]


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


def main(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. Errors of ours are one message, not a traceback."""
    argv = sys.argv[1:] if args is None else args
    command = tyro.extras.subcommand_cli_from_dict(
        {"compare": Compare, "train": Train, "report": Report, "sample": Sample, "info": Info},
        args=argv,
        prog="syncgap",
    )
    line = shlex.join(["syncgap", *argv])
    try:
        return _run(command, line)
    except (ValueError, OSError) as error:
        print(f"syncgap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        resumable = isinstance(command, Compare | Train)
        how = "; the same command with --resume goes on from the last finished block" if resumable else ""
        print(f"\nsyncgap: interrupted{how}", file=sys.stderr)
        return 130


def _run(command: Compare | Train | Report | Sample | Info, line: str) -> int:
    if isinstance(command, Compare):
        from experiments.compare import compare

        report = compare(command.settings, command.out, resume=command.resume, command=line, progress=not command.quiet)
        print(f"report: {report}")
    elif isinstance(command, Report):
        from experiments.figures import save_figures
        from experiments.report import write_report
        from experiments.store import RunFolder

        run = RunFolder.open(command.run)
        save_figures(run)
        print(f"report: {write_report(run)}")
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

    images = load_images(command.data, command.size, progress=not command.quiet)
    model = DiTConfig(
        input_size=command.size,
        patch_size=command.patch_size,
        in_channels=3,
        hidden_size=command.hidden_size,
        depth=command.depth,
        num_heads=command.num_heads,
        num_classes=len(images.class_names),
        prediction=command.prediction,
        dtype=command.dtype,
    )
    settings = TrainConfig(
        steps=command.steps,
        batch_size=command.batch_size,
        learning_rate=command.learning_rate,
        weight_cap=command.weight_cap,
        seed=command.seed,
    )
    return train(
        images,
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
