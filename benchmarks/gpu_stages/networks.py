"""With what is left: networks trained side by side, brought back in parts.

The shipped architecture with 28 layers in place of 12, two seeds of each kind, and further seeds and spectra of the
shipped one, on 16 x 16 photographs in bfloat16. Small networks leave a GPU idle between kernels, so those of one shape
are trained as one program (a group), and each group runs in a process of its own. Training ends by the clock: the
learning rate falls over the last quarter of the time, and the manifest says how many steps there were.
"""

import json
import subprocess
import sys
import tarfile
import time
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gpu_stages.box import Box, markdown
from ou_theory.keys import random_key

BENCHMARKS = Path(__file__).parents[1]
PART = 15_000_000  # bytes of a part
CHUNK = 50  # steps in one call
ENDING = 20.0  # seconds for saving and packing


@dataclass(frozen=True)
class Network:
    """What is trained."""

    prediction: Literal["epsilon", "v", "velocity"]
    transform: str = "natural"
    seed: int = 0


@dataclass(frozen=True)
class Shape:
    """How the networks of a group look and are trained."""

    depth: int = 12
    hidden_size: int = 96
    num_heads: int = 6
    batch_size: int = 128
    learning_rate: float = 1.5e-3
    patch_size: int = 2
    images: str | None = None  # a file beside the images that are given; by default these


DEEP = Shape(depth=28, batch_size=256, learning_rate=1e-3)
PAIR = Shape(depth=10, hidden_size=192, learning_rate=1e-3, images="pair.zip")  # two classes at 32 x 32
GROUPS: dict[str, tuple[Shape, dict[str, Network]]] = {
    "deep-epsilon": (DEEP, {f"deep-epsilon-{seed}": Network("epsilon", seed=seed) for seed in range(2)}),
    "deep-v": (DEEP, {f"deep-v-{seed}": Network("v", seed=seed) for seed in range(2)}),
    "v": (
        Shape(),
        {
            f"{transform}-v-{seed}": Network("v", transform, seed)
            for transform, seeds in (("natural", 3), ("reversed", 2), ("whitened", 2))
            for seed in range(seeds)
        },
    ),
    "epsilon": (
        Shape(),
        {
            f"{transform}-epsilon-{seed}": Network("epsilon", transform, seed)
            for transform, seeds in (("natural", 3), ("reversed", 1))
            for seed in range(seeds)
        },
    ),
    "velocity": (
        Shape(),
        {
            f"{transform}-velocity-{seed}": Network("velocity", transform, seed)
            for transform, seeds in (("natural", 3), ("reversed", 1))
            for seed in range(seeds)
        },
    ),
    "deep-velocity": (DEEP, {f"deep-velocity-{seed}": Network("velocity", seed=seed) for seed in range(2)}),
    "pair": (PAIR, {f"pair-v-{seed}": Network("v", seed=seed) for seed in range(2)}),
}


def run(box: Box) -> None:
    names = [name for name in GROUPS if name in (box.networks or GROUPS)]
    running = {}
    for name in names:
        where = str(box.out.resolve()), str(box.images.resolve())
        command = [sys.executable, "-m", "gpu_stages.networks", name, *where, str(box.left() - ENDING)]
        command += ["--rehearse"] if box.rehearse else []
        with (box.out / f"train-{name}.log").open("w") as log:
            running[name] = subprocess.Popen(command, cwd=BENCHMARKS, stdout=log, stderr=subprocess.STDOUT)
    while running and box.left() > 4:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                report(box, name, process.returncode)
        time.sleep(0.2)
    for name, process in running.items():
        process.kill()
        report(box, name, "stopped at the limit")
    folders = sorted(path.parent for path in (box.out / "models").glob("*/manifest.json"))
    for part in pack(folders, box.out / "models.tar"):
        box.row(part=part.name, bytes=part.stat().st_size)


def report(box: Box, group: str, code: int | str) -> None:
    tail = (box.out / f"train-{group}.log").read_text()[-600:] if code else ""
    for name in GROUPS[group][1]:
        path = box.out / "models" / name / "manifest.json"
        final = json.loads(path.read_text())["final_loss"] if path.exists() else {}
        box.row(network=name, group=group, exit_status=code, tail=tail, **final)


def train_group(name: str, out: Path, images: Path, seconds: float, rehearse: bool) -> None:
    """Trains the networks of one group within so many seconds and leaves ``models/NAME`` of each in bfloat16."""
    began = time.monotonic()
    import gpu_carry

    from dit_jax.checkpoint import save_model
    from dit_jax.config import DiTConfig
    from dit_jax.training import TrainConfig
    from dit_jax.transforms import training_data

    shape, networks = GROUPS[name]
    found = gpu_carry.unpack(images.with_name(shape.images or images.name))
    data = {network.transform: training_data(found, network.transform) for network in networks.values()}
    prediction = next(iter(networks.values())).prediction  # one kind a group, as a program has one loss
    if rehearse:
        shape = replace(shape, depth=1, hidden_size=32, num_heads=2, batch_size=8)
    config = DiTConfig(
        input_size=found.pixels.shape[1],
        patch_size=shape.patch_size,
        in_channels=3,
        num_classes=len(found.class_names),
        prediction=prediction,
        path="linear" if prediction == "velocity" else "ddpm",
        learn_sigma=prediction != "velocity",  # the loss of flow matching is that of the velocity alone
        depth=shape.depth,
        hidden_size=shape.hidden_size,
        num_heads=shape.num_heads,
        dtype="bfloat16",
    )

    settings = {
        label: TrainConfig(
            steps=2 * CHUNK if rehearse else 10**6,  # no network gets there: the clock ends it
            batch_size=shape.batch_size,
            learning_rate=shape.learning_rate,
            seed=network.seed,
            weight_cap=20.0 if prediction == "epsilon" else 1.0,  # as the shipped ones
            flip=data[network.transform].may_mirror,
        )
        for label, network in networks.items()
    }
    sources = [data[network.transform] for network in networks.values()]
    left = seconds - (time.monotonic() - began)
    print(f"{name}: {left:.0f} s left", flush=True)
    models, last = side_by_side(config, list(settings.values()), sources, left)
    for i, (label, network) in enumerate(networks.items()):
        extra = {
            "data": data[network.transform].preparation(),
            "training": asdict(settings[label]) | {"steps": last["step"], "ended": "by the clock"},
            "final_loss": {k: v[i] if isinstance(v, list) else v for k, v in last.items()},
            "command": "python benchmarks/gpu.py OUT --only networks",
        }
        save_model(models[i], out / "models" / label, dtype="bfloat16", extra=extra, overwrite=True)
    print(f"{name}: {time.monotonic() - began:.0f} s in all, {last}", flush=True)


def side_by_side(config, settings: list, data: list, seconds: float) -> tuple[list[Any], dict]:
    """Trains networks of one shape, which differ in seed and data, as one program on one device.

    Every network sees the batches, noise and levels that `dit_jax.training.train` gives it alone.

    Args:
      config: of all networks.
      settings: of each; all but ``seed`` and ``flip`` are the first one's.
      data: what each is trained on, `Photographs` or `TransformedImages`; held on the device.
      seconds: time from now; after compiling, the learning rate falls to zero over the last part of it. Training
        that has done all its steps ends earlier, at the full rate.

    Returns:
      the models with averaged weights; and the steps that were done, seconds a step, and for each network the mean loss
      and squared error over the last steps.
    """
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from dit_jax.model import DiT
    from dit_jax.training import batch_indices, initial_state, make_update

    first = settings[0]
    drawn = jax.jit(lambda seed: DiT(config, nnx.Rngs(random_key(seed))))
    split = [nnx.split(drawn(each.seed), nnx.Param, ...) for each in settings]
    graph, _, constants = split[0]
    update = jax.vmap(make_update(config, first, graph, constants, config.training_clock()))
    states = [initial_state(params, first) for _, params, _ in split]
    state = jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
    sources = list({id(d): d for d in data}.values())
    whole = [everything(d) for d in sources]
    arrays = [tuple(map(jnp.asarray, images_and_labels)) for images_and_labels in whole]
    of = [sources.index(d) for d in data]
    seeds = jnp.asarray([each.seed for each in settings])
    mirrored = jnp.asarray([0.5 if each.flip else 0.0 for each in settings])

    @partial(jax.jit, donate_argnums=0)
    def advance(state, arrays, indices, rate):
        def body(state, chosen):
            x0 = jnp.stack([arrays[of[i]][0][index] for i, index in enumerate(chosen)])
            labels = jnp.stack([arrays[of[i]][1][index] for i, index in enumerate(chosen)])
            state, metrics = update(state, x0, labels, seeds, mirrored, jnp.full(len(of), rate))
            return state, {"loss": metrics["loss"], "mse": metrics["mse"].mean(-1)}

        state, metrics = jax.lax.scan(body, state, indices)
        return state, jax.tree.map(lambda x: x.mean(0), metrics)

    began, done, metrics = time.monotonic(), 0, None
    started = began
    while done < first.steps and (now := time.monotonic()) < began + seconds:
        share_left = (began + seconds - now) / (began + seconds - started)
        rate = min(1.0, share_left / first.decay_fraction)
        rows = range(done, min(done + CHUNK, first.steps))
        chosen = [[batch_indices(s, len(whole[i][1]), k) for s, i in zip(settings, of, strict=True)] for k in rows]
        state, ahead = advance(state, arrays, jnp.asarray(np.asarray(chosen, np.int32)), rate)
        jax.block_until_ready(metrics)  # the device has one call to work on, and no more in line
        metrics, done = ahead, rows.stop
        if done == CHUNK:
            jax.block_until_ready(metrics)
            started = time.monotonic()
            print(f"compiled after {started - began:.0f} s", flush=True)
        elif done % (10 * CHUNK) == 0:
            shown = jax.tree.map(lambda x: np.round(x, 4).tolist(), jax.device_get(metrics))
            print(f"{time.monotonic() - began:.0f} s, {done} steps, rate {rate:.2f}, {shown}", flush=True)
    if metrics is None:
        raise ValueError("no time to train")
    losses = {name: values.tolist() for name, values in jax.device_get(metrics).items()}
    each = (time.monotonic() - started) / max(done - CHUNK, 1)
    models = [
        nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state["ema"]), constants) for i in range(len(settings))
    ]
    return models, {"step": done, "seconds_per_step": each, **losses}


def everything(data):
    """All images (N, H, W, 3) float32 as the network sees them, and their labels (N,)."""
    from dit_jax.images import standardize
    from dit_jax.training import Photographs

    if isinstance(data, Photographs):
        return standardize(data.images.pixels, data.images.mean, data.images.std), data.images.labels
    return data.x, data.labels


def pack(folders: list[Path], target: Path) -> list[Path]:
    """One tar of model folders, in parts ``models.tar.0``, ``.1``, ... that `join` puts together."""
    with tarfile.open(target, "w") as archive:
        for folder in folders:
            archive.add(folder, folder.name)
    data = target.read_bytes()
    target.unlink()
    parts = []
    for i in range(0, len(data), PART):
        parts.append(target.with_name(f"{target.name}.{i // PART}"))
        parts[-1].write_bytes(data[i : i + PART])
    return parts


def join(folder: Path, out: Path) -> list[str]:
    """Unpacks the model folders whose parts lie in `folder` into `out`, and gives their names."""
    import io

    parts = sorted(folder.glob("models.tar.*"), key=lambda path: int(path.suffix[1:]))
    with tarfile.open(fileobj=io.BytesIO(b"".join(part.read_bytes() for part in parts))) as archive:
        archive.extractall(out, filter="data")
        return sorted({name.split("/")[0] for name in archive.getnames()})


def table(rows: list[dict]) -> str:
    shown = []
    for row in rows:
        if "network" in row:
            numbers = [row.get("step", ""), f"{row.get('seconds_per_step', float('nan')):.4f}"]
            shown.append([row["network"], row["exit_status"], *numbers, f"{row.get('mse', float('nan')):.4f}"])
    return markdown(["network", "exit status", "steps", "s a step", "squared error"], shown)


if __name__ == "__main__":
    train_group(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), "--rehearse" in sys.argv)
