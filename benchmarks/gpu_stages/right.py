"""Is it right there? Official numbers, the CPU's numbers, fused attention against explicit, bfloat16, batches.

Deviations are relative: of a whole array by its norm, against the official numbers by the largest value, as the tests
have it.
"""

import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from dit_jax.attention import Implementation, anisotropic_gate, attend, symmetric_gate
from dit_jax.diffusion import network_denoiser
from dit_jax.model import DiT
from dit_jax.replicas import run_pairs
from gpu_stages.box import Box, markdown, random_model
from ou_theory.clock import make_clock
from ou_theory.keys import random_key

TESTS = Path(__file__).parents[2] / "tests" / "dit_jax"
CPU = jax.devices("cpu")[0]
KINDS, DTYPES = ("joint", "blend"), ("bfloat16", "float32")  # the other kinds take the path of blend
# What may be off by how much: rounding of the format, times a few for sums
LIMITS = {"float32": 2e-5, "bfloat16": 3e-2}


def run(box: Box) -> None:
    failed = 0
    for check in (official, attention, gradients, against_cpu, bfloat16, batches):
        if box.left() < 5:
            box.row(check=check.__name__, what="no time left", error=None, limit=None)
            continue
        try:
            check(box)
        except Exception as error:  # the other checks are worth their time all the same
            traceback.print_exc()
            what = f"failed: {type(error).__name__}: {error}"[:300]
            box.row(check=check.__name__, what=what, error=None, limit=None)
            failed += 1
    if failed:
        raise SystemExit(f"{failed} checks could not be made")


def official(box: Box) -> None:
    """The recorded official network in float32: after every block and at the output."""
    sys.path.insert(0, str(TESTS))
    recorded = import_module("official")
    refs, model = recorded.load("refs_tiny"), recorded.tiny_model()
    x, t, y = jnp.asarray(recorded.nhwc(refs["x"])), jnp.asarray(refs["t"]), jnp.asarray(refs["y"])
    tapped = jax.jit(lambda model, x, t, y: model(x, t, y, tap=lambda _, named: named["resid_post"]))
    out, stream = jax.device_get(tapped(model, x, t, y))
    pairs = [(out, recorded.nhwc(refs["out_f32"]))]
    pairs += [(after[0], refs["hidden_f32"][i + 1]) for i, after in enumerate(stream)]
    worst = np.max([np.abs(a - b).reshape(len(t), -1).max(1) / np.abs(b).max() for a, b in pairs], 0)
    for name, chosen, limit in (("t <= 10", refs["t"] <= 10, 5e-6), ("t >= 500", refs["t"] >= 500, 5e-5)):
        box.row(check="official", what=f"float32, every block, {name}", error=float(worst[chosen].max()), limit=limit)


def qkv(box: Box, dtype) -> jax.Array:
    """Random queries, keys and values of XL/2 in the shape that `attend` takes, (3, R, N, T, H, d)."""
    shape = (3, 2, 4, *((16, 2, 8) if box.rehearse else (256, 16, 72)))
    return jax.random.normal(random_key(0), shape, jnp.float32).astype(dtype)


def exact(function: Callable, *values) -> np.ndarray:
    """A function of what is given, in float64 on the CPU."""
    with jax.enable_x64(True), jax.default_device(CPU):
        return np.asarray(jax.jit(function)(*(jnp.asarray(np.asarray(value, np.float64)) for value in values)))


def deviation(found, reference) -> float:
    reference = np.asarray(reference, np.float64)
    return float(np.linalg.norm(np.asarray(found, np.float64) - reference) / np.linalg.norm(reference))


def attention(box: Box) -> None:
    """Both implementations, both ways to take a softmax, under gates that are closed, open, between, of each pair, and
    one-sided."""
    gates = {
        "0": symmetric_gate(0.0),
        "0.3": symmetric_gate(0.3),
        "1": symmetric_gate(1.0),
        "per pair": symmetric_gate(jnp.asarray([0.0, 0.1, 0.7, 2.0])),
        "one-sided": anisotropic_gate(0.5, 0.0),
    }
    for dtype in DTYPES[: 1 if box.rehearse else None]:
        values = qkv(box, dtype)
        for kind in KINDS:
            gated = {name: jnp.broadcast_to(gate, (4, 2, 2)) for name, gate in gates.items()}
            explicit = by("explicit", kind)  # one function, compiled once
            references = {name: exact(explicit, values, gate) for name, gate in gated.items()}
            for how in ("explicit", "fused"):
                compiled = jax.jit(by(how, kind)).lower(values, gated["0"]).compile()
                engine = "cuDNN" if "cudnn$fmha" in str(compiled.as_text()) else "XLA"
                for name, gate in gated.items():
                    error = deviation(compiled(values, gate), references[name])
                    what = f"{dtype}, {kind}, gate {name}, {how} by {engine}"
                    box.row(check="attention", what=what, error=error, limit={"bfloat16": 6e-3, "float32": 5e-6}[dtype])


def by(how: Implementation, kind) -> Callable:
    return lambda values, gate: attend(values[0], values[1], values[2], gate, kind, how)[0]


def gradients(box: Box) -> None:
    """The fused path's derivative with respect to queries, keys and values, as training in bfloat16 takes it."""
    values = qkv(box, "bfloat16")

    def slope(how):
        return jax.grad(
            lambda values: jnp.sum(
                jnp.sin(attend(values[0], values[1], values[2], None, "joint", how)[0].astype(values.dtype))
            )
        )

    reference = exact(slope("explicit"), values)
    for how in ("explicit", "fused"):
        error = deviation(jax.jit(slope(how))(values), reference)
        box.row(check="gradients", what=f"bfloat16, no gate, {how}", error=error, limit=1.5e-2)


def inputs(box: Box, model: DiT) -> tuple:
    c, rng = model.config, np.random.default_rng(1)
    x = rng.standard_normal((2, 2, c.input_size, c.input_size, c.in_channels), np.float32)
    return x, np.full(2, 500), np.arange(2), np.asarray(symmetric_gate(np.asarray([0.0, 0.3])))


def call(model, x, t, y, gate):
    return model(x, t, y, gate)


def against_cpu(box: Box) -> None:
    """A coupled S/2 in float32, here and on the CPU."""
    model = random_model(box.config("DiT-S/2", "float32"))
    found = jax.jit(call)(model, *inputs(box, model))
    there = jax.device_put(model, CPU)
    with jax.default_device(CPU):
        reference = jax.jit(call)(there, *inputs(box, model))
    box.row(check="CPU", what="float32, coupled S/2", error=deviation(found, reference), limit=LIMITS["float32"])


def bfloat16(box: Box) -> None:
    """A coupled XL/2 in bfloat16, both kinds of attention, against float32 here; the weights are the bfloat16 ones."""
    rounded = random_model(box.config("DiT-XL/2"))
    wide = jax.tree.map(lambda a: a.astype(jnp.float32), rounded)
    wide = with_config(wide, box.config("DiT-XL/2", "float32"))
    reference = jax.device_get(jax.jit(call)(wide, *inputs(box, wide)))
    for how in ("explicit", "fused"):
        run_it = jax.jit(lambda model, x, t, y, gate, how=how: model(x, t, y, gate, attention=how))
        error = deviation(run_it(rounded, *inputs(box, rounded)), reference)
        box.row(check="bfloat16", what=f"coupled XL/2, {how}", error=error, limit=LIMITS["bfloat16"])


def with_config(model: DiT, config) -> DiT:
    """The same parameters in a model of another compute dtype."""
    from flax import nnx

    graph, _ = nnx.split(nnx.eval_shape(lambda: DiT(config, nnx.Rngs(random_key(0)))))
    return nnx.merge(graph, nnx.state(model))


def batches(box: Box) -> None:
    """The same pairs sampled alone and among others: apart by rounding only, as every number has its key."""
    for dtype in DTYPES[: 1 if box.rehearse else None]:
        model = random_model(box.config("DiT-S/2", dtype))
        clock, c = make_clock(4 if box.rehearse else 10), model.config
        shape = (c.input_size, c.input_size, c.in_channels)

        @jax.jit
        def draw(model, pairs, labels, clock=clock, shape=shape):
            def coupled(gate):
                return network_denoiser(model, clock, gate)

            return run_pairs(coupled, clock, jnp.asarray([0.0, 0.3]), pairs, labels, shape, seed=0)[0]

        among = draw(model, jnp.arange(8), jnp.arange(8))[:, :, 5:6]
        alone = draw(model, jnp.asarray([5]), jnp.asarray([5]))
        what = f"{dtype}, {len(clock)} steps of S/2, alone and among 8"
        box.row(check="batches", what=what, error=deviation(alone, among), limit=LIMITS[dtype])


def table(rows: list[dict]) -> str:
    shown = []
    for row in rows:
        if row["error"] is None:
            shown.append([row["check"], row["what"], "", "", ""])
        else:
            verdict = "yes" if row["error"] <= row["limit"] else "**no**"
            shown.append([row["check"], row["what"], f"{row['error']:.1e}", f"{row['limit']:.0e}", verdict])
    return markdown(["check", "of what", "relative error", "limit", "within"], shown)
