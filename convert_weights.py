"""Converts a PyTorch DiT checkpoint to a model folder of this package, or a model folder back.

The same as ``syncgap convert``. The released DiT weights are licensed CC-BY-NC 4.0 (non-commercial), and so is what is
made from them.
"""

import sys

import tyro

from dit_jax.conversion import convert_checkpoint
from dit_jax.disk import from_home


def main() -> None:
    try:
        options = (tyro.conf.FlagCreatePairsOff,)
        arguments = [from_home(argument) for argument in sys.argv[1:]]
        sys.exit(tyro.cli(convert_checkpoint, prog="convert_weights.py", args=arguments, config=options))
    except (ValueError, OSError) as error:
        print(f"convert_weights.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
