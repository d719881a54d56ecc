"""The command line: `syncgap compare`, `syncgap train`, `syncgap report`."""

import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from dit_jax.config import Prediction
from experiments.compare import CompareConfig


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


def main(args: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. Errors of ours are one message, not a traceback."""
    argv = sys.argv[1:] if args is None else args
    command = tyro.extras.subcommand_cli_from_dict(
        {"compare": Compare, "train": Train, "report": Report}, args=argv, prog="syncgap"
    )
    line = shlex.join(["syncgap", *argv])
    try:
        return _run(command, line)
    except (ValueError, OSError) as error:
        print(f"syncgap: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(
            "\nsyncgap: interrupted; the same command with --resume goes on from the last finished block",
            file=sys.stderr,
        )
        return 130


def _run(command: Compare | Train | Report, line: str) -> int:
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
    else:
        print(f"model: {_train(command, line)}")
    return 0


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
