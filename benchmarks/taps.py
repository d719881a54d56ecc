"""What taps and edits cost in time and memory: ``python benchmarks/taps.py --help``. Medians of runs taken in turns."""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx

from dit_jax.attention import symmetric_gate
from dit_jax.config import variant
from dit_jax.inside import ablate, keep, lens, residual_norm
from dit_jax.model import DiT
from ou_theory.keys import random_key


@dataclass(frozen=True)
class Settings:
    """Time and memory of a coupled pair step with taps and edits, beside the plain step."""

    size: str = "DiT-S/2"
    pairs: int = 2
    repeats: int = 9


def main(settings: Settings) -> None:
    config = variant(settings.size)
    model = DiT(config, nnx.Rngs(random_key(0)))
    shape = (2, settings.pairs, config.input_size, config.input_size, config.in_channels)
    x = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    t, y, gate = jnp.full(settings.pairs, 500), jnp.arange(settings.pairs), symmetric_gate(jnp.array([0.3]))
    cases: dict[str, dict[str, Any]] = {
        "plain": {},
        "tap residual norm": {"tap": residual_norm},
        "tap residual stream": {"tap": keep("resid_post")},
        "tap one head's pattern": {"tap": lambda layer, a: a["pattern"][:, 0]},
        "tap all patterns": {"tap": keep("pattern")},
        "lens": {"tap": lens(model)},
        "ablate one layer": {"edit": ablate("attn_out", [3])},
        "edit the pattern": {"edit": lambda name, layer, value: value**1.0 if name == "pattern" else value},
    }
    runs = {}
    for name, options in cases.items():
        compiled = jax.jit(lambda m, x, options=options: m(x, t, y, gate, **options)).lower(model, x).compile()
        runs[name] = compiled
        jax.block_until_ready(compiled(model, x))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(settings.repeats):
        for name, compiled in runs.items():
            started = time.perf_counter()
            jax.block_until_ready(compiled(model, x))
            times[name].append(time.perf_counter() - started)
    print(
        f"# {settings.size}, {settings.pairs} coupled pairs, {jax.devices()[0].device_kind}, {settings.repeats} turns"
    )
    print(f"{'case':<24} {'ms':>8} {'relative':>9} {'temp MB':>9} {'kept MB':>9}")
    plain = statistics.median(times["plain"])
    for name, compiled in runs.items():
        median, memory = statistics.median(times[name]), compiled.memory_analysis()
        kept = memory.output_size_in_bytes - runs["plain"].memory_analysis().output_size_in_bytes
        temporary = memory.temp_size_in_bytes
        print(f"{name:<24} {1e3 * median:>8.1f} {median / plain:>9.2f} {temporary / 1e6:>9.0f} {kept / 1e6:>9.2f}")


if __name__ == "__main__":
    main(tyro.cli(Settings))
