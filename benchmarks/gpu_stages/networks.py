"""With what is left: networks trained side by side, each in a process of its own, brought back in parts.

The 28-layer pair and further seeds and spectra of the shipped 12-layer architecture; 16 x 16 photographs, bfloat16.
Each network trains for a short while to see how long a step takes beside the others, and then goes on for as many steps
as its time holds: the first steps are those of the long run, since the rate still rises in them.
"""

import json
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from gpu_stages.box import Box, markdown

PART = 15_000_000  # bytes of a part
TRIAL, MOST = 100, 60_000  # steps of the trial, and at most
STARTING, ENDING = 60.0, 25.0  # seconds: images and compiling again; pictures, saving and packing


@dataclass(frozen=True)
class Network:
    """What is trained."""

    prediction: str
    transform: str = "natural"
    seed: int = 0
    depth: int = 12
    hidden_size: int = 96
    num_heads: int = 6
    batch_size: int = 128
    learning_rate: float = 1.5e-3

    @property
    def weight_cap(self) -> float:
        """As the shipped networks: predicting noise, the clean end counts up to 20 times."""
        return 20.0 if self.prediction == "epsilon" else 1.0


DEEP = {"depth": 28, "hidden_size": 128, "num_heads": 4, "learning_rate": 1e-3}
NETWORKS = {
    "deep-epsilon": Network("epsilon", **DEEP),
    "deep-v": Network("v", **DEEP),
    "reversed-v": Network("v", "reversed"),
    "whitened-v": Network("v", "whitened"),
    "reversed-epsilon": Network("epsilon", "reversed"),
    "natural-epsilon-0": Network("epsilon"),
    "natural-epsilon-1": Network("epsilon", seed=1),
    "natural-epsilon-2": Network("epsilon", seed=2),
    "natural-v-1": Network("v", seed=1),
    "natural-v-2": Network("v", seed=2),
}


def run(box: Box) -> None:
    names = [name for name in NETWORKS if name in (box.networks or NETWORKS)]
    seconds = box.left() - ENDING
    running = {}
    for name in names:
        command = [sys.executable, "-m", "gpu_stages.networks", name, str(box.out), str(box.images), str(seconds)]
        log = (box.out / f"train-{name}.log").open("w")
        command += ["--rehearse"] if box.rehearse else []
        running[name] = subprocess.Popen(command, cwd=Path(__file__).parents[1], stdout=log, stderr=subprocess.STDOUT)
    while running and box.left() > 5:
        for name, process in list(running.items()):
            if process.poll() is not None:
                del running[name]
                report(box, name, process.returncode)
        time.sleep(0.2)
    for name, process in running.items():
        process.kill()
        report(box, name, "stopped at the limit")
    folders = [box.out / "models" / name for name in names if (box.out / "models" / name / "manifest.json").exists()]
    for part in pack(folders, box.out / "models.tar"):
        box.row(part=part.name, bytes=part.stat().st_size)


def report(box: Box, name: str, code: int | str) -> None:
    log = box.out / "training" / name / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else [{}]
    tail = (box.out / f"train-{name}.log").read_text()[-600:] if code else ""
    box.row(network=name, exit_status=code, **{k: v for k, v in lines[-1].items() if k != "grad_norm"}, tail=tail)


def train_one(name: str, out: Path, images: Path, seconds: float, rehearse: bool) -> None:
    """Trains one network within so many seconds and leaves ``models/NAME`` in bfloat16."""
    began = time.monotonic()
    import carry
    from dit_jax.checkpoint import load_manifest, load_model, save_model
    from dit_jax.config import DiTConfig
    from dit_jax.training import TrainConfig, training_data, train

    network = NETWORKS[name]
    found = carry.unpack(images)
    data, flip = training_data(found, network.transform)
    config = DiTConfig(
        input_size=carry.SIZE,
        in_channels=3,
        num_classes=len(found.class_names),
        depth=2 if rehearse else network.depth,
        hidden_size=32 if rehearse else network.hidden_size,
        num_heads=2 if rehearse else network.num_heads,
        prediction=network.prediction,
        dtype="bfloat16",
    )
    trial = 4 if rehearse else TRIAL

    def settings(steps: int) -> TrainConfig:
        return TrainConfig(
            steps=steps,
            batch_size=8 if rehearse else network.batch_size,
            learning_rate=network.learning_rate,
            seed=network.seed,
            weight_cap=network.weight_cap,
            flip=flip,
        )

    folder = out / "training" / name
    options = {"log_every": max(1, trial // 4), "checkpoint_every": 10**9, "progress": False}
    train(data, config, settings(trial), folder, **options)
    last = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    tried = time.monotonic() - began
    left = seconds - tried - min(STARTING, tried)  # the program is compiled again: its schedule has changed
    steps = 2 * trial if rehearse else min(MOST, trial + int(0.9 * left / last["seconds_per_step"]))
    print(f"{name}: {last['seconds_per_step']:.4f} s a step, {steps} steps, {left:.0f} s left after {tried:.0f}", flush=True)
    options |= {"log_every": max(1, steps // 40)}
    command = f"python benchmarks/gpu.py OUT --only networks --networks {name}"
    model = train(data, config, settings(steps), folder, resume=True, command=command, **options)
    extra = {k: v for k, v in load_manifest(model).items() if k in ("data", "training", "final_loss", "command")}
    save_model(load_model(model), out / "models" / name, dtype="bfloat16", extra=extra, overwrite=True)
    print(f"{name}: {time.monotonic() - began:.0f} s in all", flush=True)


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
    train_one(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), float(sys.argv[4]), "--rehearse" in sys.argv)
