"""Memory and time of converting and loading a checkpoint: ``python benchmarks/weights.py --help``.

Writes a random checkpoint of an official variant in the official form, then reads the plain file, converts it and loads
the model folder, each in a process of its own whose peak resident memory is reported beside the file's size.
"""

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import tyro

CHUNK = 2**24


@dataclass(frozen=True)
class Settings:
    """Peak memory and time of a conversion, beside a plain read of the file."""

    size: str = "DiT-XL/2"
    form: Literal["pt", "safetensors"] = "pt"
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the model folder
    folder: Path | None = None  # for the files, some 8 GB for XL/2; a temporary one by default
    task: str | None = None  # run one task in this process


def write(settings: Settings, source: Path) -> None:
    from dit_jax.config import variant
    from dit_jax.weights import source_shapes

    rng = np.random.default_rng(0)
    entries = {
        key: 0.02 * rng.standard_normal(shape, np.float32)
        for key, shape in source_shapes(variant(settings.size)).items()
    }
    if settings.form == "pt":
        import torch

        torch.save({key: torch.from_numpy(value) for key, value in entries.items()}, source)
    else:
        from safetensors.numpy import save_file

        save_file(entries, source)


def read(settings: Settings, source: Path) -> None:
    with source.open("rb", buffering=0) as file:
        buffer = bytearray(CHUNK)
        while file.readinto(buffer):
            pass


def convert(settings: Settings, source: Path) -> None:
    from dit_jax.checkpoint import save_weights
    from dit_jax.weights import convert

    conversion = convert(source, prediction="epsilon", input_size=32, dtype=settings.dtype)
    save_weights(
        conversion.config, conversion.weights, source.with_name("model"), extra=conversion.provenance, overwrite=True
    )


def load(settings: Settings, source: Path) -> None:
    import jax

    from dit_jax.checkpoint import load_model

    jax.block_until_ready(jax.tree.leaves(load_model(source.with_name("model"))))


def imports(settings: Settings, source: Path) -> None:
    import torch  # noqa: F401

    import dit_jax.weights  # noqa: F401


TASKS = {task.__name__: task for task in (write, read, imports, convert, load)}


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory(dir=settings.folder) as temporary:
        folder = settings.folder if settings.task else Path(temporary)
        assert folder is not None
        source = folder / f"checkpoint.{settings.form}"
        if settings.task:
            started = time.perf_counter()
            TASKS[settings.task](settings, source)
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
            print(time.perf_counter() - started, peak)
            return
        print(f"# {settings.size}, official keys in .{settings.form}, model folder in {settings.dtype}")
        print(f"{'task':<10} {'seconds':>8} {'peak GB':>8} {'peak / file':>12}")
        for task in TASKS:
            options = [f"--{name}={getattr(settings, name)}" for name in ("size", "form", "dtype")]
            command = [sys.executable, __file__, *options, f"--folder={folder}", f"--task={task}"]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            seconds, peak = map(float, done.stdout.split()[-2:])
            size = source.stat().st_size
            print(f"{task:<10} {seconds:>8.2f} {peak / 1e9:>8.2f} {peak / size:>12.2f}", flush=True)
        print(f"# the file has {size / 1e9:.2f} GB")


if __name__ == "__main__":
    main(tyro.cli(Settings))
