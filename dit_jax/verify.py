"""Compares a converted model in JAX with its checkpoint in PyTorch, stage by stage.

Both sides run on the CPU in float32 on the same random input. The PyTorch side is this package's own DiT
(dit_jax/torch_reference.py), filled from the file under its official keys, and rounded as the converted one is stored.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from dit_jax.checkpoint import stored_dtypes
from dit_jax.config import DiTConfig, Which
from dit_jax.inside import keep
from dit_jax.model import DiT
from dit_jax.platform import host_device
from dit_jax.readers import open_source
from dit_jax.tensors import Entry, WeightsError
from dit_jax.weights import TABLE, official_entries

IN_BLOCK = ("adaln", "norm1", "attn_out", "norm2", "mlp_out", "resid_post")
# By timestep: the largest deviation, as a share of the largest value of a stage. At large t the float32 sinusoids of
# two libraries differ by 3e-5.
LIMITS = {5: 5e-6, 700: 5e-5}
DEEP = 12  # number of blocks for which the limits hold; for deeper networks they grow with the depth


class Stage(NamedTuple):
    """Largest difference of a stage over its largest value (1 if that is 0), at each timestep of `LIMITS`."""

    name: str
    deviation: tuple[float, ...]


def limits(depth: int) -> tuple[float, ...]:
    """The largest allowed deviation of the output, at each timestep of `LIMITS`."""
    return tuple(limit * max(1.0, depth / DEEP) for limit in LIMITS.values())


def compare_stages(
    source: str | Path,
    model: DiT,
    *,
    which: Which | None = None,
    prefix: str | None = None,
    stored: str = "float32",
    seed: int = 0,
) -> list[Stage]:
    """Runs both models and compares them from the embedding to the output.

    Args:
      source, which, prefix: the checkpoint, see `dit_jax.weights.convert`.
      model: the model that was converted from it, with float32 as compute dtype.
      stored: dtype to which the conversion rounded its parameters.
      seed: of the random input.

    Raises:
      WeightsError: the checkpoint cannot be read, or PyTorch is not installed.
    """
    config = model.config
    timesteps = np.array(list(LIMITS))
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((len(timesteps), config.input_size, config.input_size, config.in_channels), np.float32)
    y = rng.integers(0, config.label_rows, len(timesteps))
    entries, _, _ = official_entries(open_source(source, which, prefix), str(source))
    theirs = _torch_stages(entries, config, stored, x, timesteps, y)
    ours = _jax_stages(model, x, timesteps, y)

    def deviation(name: str) -> tuple[float, ...]:
        a, b = ours[name], theirs[name]
        over = tuple(range(1, a.ndim))
        largest = np.abs(b).max(over)
        return tuple((np.abs(a - b).max(over) / np.where(largest > 0, largest, 1)).tolist())

    return [Stage(name, deviation(name)) for name in theirs]


def _jax_stages(model: DiT, x: np.ndarray, t: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    @jax.jit
    def run(model, x, t, y):
        out, taps = model(x, t, y, tap=keep(*IN_BLOCK))
        return model.embed(x), model.condition(t, y), taps, out

    cpu = host_device()
    embedded, conditioning, taps, out = jax.device_get(run(*jax.device_put((model, x, t, y), cpu)))
    stages = {"embedded": embedded, "conditioning": conditioning}
    for i in range(model.config.depth):
        stages |= {f"blocks.{i}.{name}": taps[name][i].reshape(len(x), *taps[name].shape[-2:]) for name in IN_BLOCK[1:]}
        stages[f"blocks.{i}.adaln"] = taps["adaln"][i]
    return {**stages, "out": out}


def _torch_stages(
    entries: Mapping[str, Entry | None], config: DiTConfig, stored: str, x: np.ndarray, t: np.ndarray, y: np.ndarray
) -> dict[str, np.ndarray]:
    try:
        import torch
    except ImportError as error:
        raise WeightsError("the comparison (--verify) needs PyTorch: pip install '.[torch]'") from error

    from dit_jax.torch_reference import TorchDiT

    dtypes = stored_dtypes(config, stored)
    with torch.device("meta"):
        reference = TorchDiT(config)
    state = {
        key: torch.tensor(entry.read().astype(np.float32).astype(dtypes[rule.target]).astype(np.float32))
        for rule in TABLE
        for key in rule.sources(config.depth)
        if (entry := entries.get(key)) is not None
    }
    reference.load_state_dict(state, assign=True)
    stages: dict[str, torch.Tensor] = {}
    with torch.inference_mode():
        nchw = torch.tensor(x).permute(0, 3, 1, 2)
        out = reference(nchw, torch.tensor(t), torch.tensor(y), stages=stages)
    found = {name: stage.numpy() for name, stage in stages.items()}
    return {**found, "out": out.permute(0, 2, 3, 1).numpy()}


def report(stages: list[Stage], depth: int) -> tuple[str, bool]:
    """A table of the stages, and whether the output is within `limits`."""
    allowed = limits(depth)
    head = "  ".join(f"t = {t:<7}" for t in LIMITS)
    rows = [f"{stage.name:<22}" + "  ".join(f"{d:<11.1e}" for d in stage.deviation) for stage in stages]
    passed = all(d <= limit for d, limit in zip(stages[-1].deviation, allowed, strict=True))
    verdict = "within" if passed else "BEYOND"
    rows.append(f"the output is {verdict} {', '.join(f'{limit:.1e}' for limit in allowed)} of its largest value")
    return "\n".join([f"{'stage':<22}{head}", *rows]), passed
