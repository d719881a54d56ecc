"""Converts an official PyTorch DiT checkpoint to a model folder of this package.

The released DiT weights are licensed CC-BY-NC 4.0 (non-commercial), and so is what is made from them.
"""

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from dit_jax.checkpoint import CheckpointError, check_free, digest, save_weights, stored_form
from dit_jax.weights import WeightsError, Which, convert


def run(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    which: Which = "ema",
    num_heads: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
    dry_run: bool = False,
) -> None:
    """Converts an official PyTorch DiT checkpoint to a model folder, which `dit_jax.load_model` reads.

    The released DiT weights are licensed CC-BY-NC 4.0 (non-commercial), and so is what is made from them.

    Args:
      source: .pt file: a bare state dict (the released form), or what the official training script saves.
      out: model folder to make.
      which: the part of a training checkpoint to read.
      num_heads: attention heads, needed for widths that no official variant has.
      dtype: of the stored parameters.
      overwrite: replace a model folder that is there already.
      dry_run: read and check everything, write nothing.
    """
    check_free(out, overwrite)
    conversion = convert(source, which=which, num_heads=num_heads)
    config = conversion.config
    weights = stored_form(config, conversion.weights, dtype)
    print(f"variant     {conversion.variant or 'none of the official ones'}")
    print(f"config      {', '.join(f'{name}={value}' for name, value in config.to_dict().items())}")
    print(f"parameters  {sum(array.size for array in weights.values()):,}, position embedding included")
    print(f"digest      {digest(weights)}")
    if dry_run:
        print(f"dry run: {out} not written")
        return
    save_weights(config, weights, out, extra=conversion.provenance, overwrite=overwrite)
    print(f"written     {out}")


def main() -> None:
    try:
        tyro.cli(run, prog="convert_weights.py", config=(tyro.conf.FlagCreatePairsOff,))
    except (WeightsError, CheckpointError) as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
