"""The command that converts checkpoints: ``convert_weights.py`` and ``syncgap convert``.

Importing this module loads nothing heavy, so that a command line can describe the command at once.
"""

import functools
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from dit_jax.config import NoisePath, Prediction, TimestepConvention, Which
from dit_jax.lock import held


def _alone(convert: Callable[..., int]) -> Callable[..., int]:
    """The conversion, in a place that no other process writes meanwhile."""

    @functools.wraps(convert)
    def holding(source: Path, out: Path, *, dry_run: bool = False, **options: Any) -> int:
        with nullcontext() if dry_run else held(out):
            return convert(source, out, dry_run=dry_run, **options)

    return holding


@_alone
def convert_checkpoint(
    source: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="SOURCE")],
    out: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="OUT")],
    *,
    prediction: Prediction | None = None,
    path: NoisePath | None = None,
    num_classes: int | None = None,
    null_label: Literal["last", "none"] | None = None,
    num_heads: int | None = None,
    input_size: int | None = None,
    which: Which | None = None,
    prefix: str | None = None,
    timestep_convention: TimestepConvention | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    overwrite: bool = False,
    dry_run: bool = False,
    verify: bool = False,
    export: bool = False,
) -> int:
    """Convert a PyTorch DiT checkpoint to a model folder, which `dit_jax.load_model` reads, or a model folder back.

    Shapes do not tell the whole function of a network. What the file does not say elsewhere either must be given by
    --prediction, --path, --num-classes, --num-heads and --input-size; an error says which of them are needed. The
    released DiTs need --prediction epsilon alone, the released SiTs --prediction velocity --path linear. Exports of
    this package (--export) need none.

    The released DiT weights are licensed CC-BY-NC 4.0 (non-commercial), and so is what is made from them.

    Args:
      source: a .pt or .bin file (bare state dict, the released form, or a training checkpoint with weights under
        entries or prefixes such as ema, model, state_dict); a .safetensors file, or its index if it is sharded; or a
        folder with one of these, as diffusers has them. Nothing in a file is run.
      out: model folder to make.
      prediction: what the network predicts: epsilon (the noise, as the released DiTs do), v, x0, velocity (as the
        released SiTs do) or score. All have the same keys and shapes, so the file cannot tell.
      path: how data and noise were mixed in training: ddpm, the default for epsilon, v and x0, or a path of flow
        matching, which velocity and score need: linear (the released SiTs), gvp or vp.
      num_classes: classes, the null label of guidance left out. Needed, or --null-label, unless the label table has
        1001 rows (ImageNet's classes and the null label).
      null_label: none if no row of the label table is the null label's; such a network runs without guidance only.
      num_heads: attention heads, needed for depths and widths that no official variant has.
      input_size: side of the square input (of latents for the official models), needed if the values of the position
        embedding do not show their grid.
      which: ema or model, averaged or raw weights of a training checkpoint; by default averaged ones if there are any,
        otherwise the only ones.
      prefix: of the keys of the weights, where a file has several sets of them, for example --prefix net_b.
      timestep_convention: "diffusers" to reproduce the outputs of that library's model code; by default official, or
        what an export says.
      dtype: of the stored parameters.
      overwrite: replace a model folder that is there already.
      dry_run: read and check everything, write nothing.
      verify: then run the checkpoint in PyTorch and the model folder in JAX, and print how far apart they are by stage.
      export: the other way: SOURCE is a model folder, OUT a .safetensors or .pt file with the official keys.

    Returns:
      exit status: 0, or 1 if `verify` finds the two further apart than it allows.

    Raises:
      CheckpointError: the model folder cannot be read or written, or options exclude each other.
      WeightsError: the checkpoint cannot be read safely, or is not that of a DiT.
    """
    from dit_jax.checkpoint import check_free, digest, load_model, save_weights
    from dit_jax.disk import CheckpointError
    from dit_jax.export import export_model
    from dit_jax.facts import option
    from dit_jax.weights import convert

    given = {
        "prediction": prediction,
        "path": path,
        "num_classes": num_classes,
        "null_label": null_label,
        "num_heads": num_heads,
        "input_size": input_size,
        "which": which,
        "prefix": prefix,
        "timestep_convention": timestep_convention,
    }
    if export and (dry_run or verify):
        raise CheckpointError("--export reads a model folder, and takes neither --dry-run nor --verify")
    if export and (named := [option(name) for name, value in given.items() if value is not None]):
        raise CheckpointError(f"--export reads a model folder, which says these itself: leave {', '.join(named)} out")
    if dry_run and verify:
        raise CheckpointError("--verify runs the model folder, and --dry-run writes none; give one of them")
    if export:
        export_model(source, out, overwrite=overwrite)
        print(f"written     {out}")
        return 0
    check_free(out, overwrite)
    conversion = convert(source, dtype=dtype, **given)
    config, weights = conversion.config, conversion.weights
    print(f"variant     {conversion.variant or 'none of the official ones'}")
    print(f"config      {', '.join(f'{name}={value}' for name, value in config.to_dict().items())}")
    print(f"parameters  {sum(array.size for array in weights.values()):,}, position embedding included")
    for note in conversion.notes:
        print(f"note        {note}")
    if dry_run:
        print(f"digest      {digest(weights)}")
        print(f"dry run: {out} not written")
        return 0
    manifest = save_weights(config, weights, out, extra=conversion.provenance, overwrite=overwrite)
    print(f"digest      {manifest['digest']}")
    print(f"written     {out}")
    if not verify:
        return 0
    del conversion, weights
    from dit_jax.model import DiT
    from dit_jax.verify import compare_stages, report

    model = load_model(out, "float32")
    assert isinstance(model, DiT)
    stages = compare_stages(source, model, which=which, prefix=prefix, stored=dtype)
    table, passed = report(stages, config.depth)
    print(table)
    return 0 if passed else 1
