"""The paper's sweep in size: a random DiT-XL/2 through ``syncgap compare``, 250 steps and ten couplings."""

import json
import threading
import time
from pathlib import Path

import jax

from dit_jax.checkpoint import save_model
from experiments.cli import main
from experiments.frame.cost import flops
from gpu_stages.box import Box, markdown, random_model

COUPLINGS = (0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1)
BLOCK = 4
FIXED = 80.0  # seconds for writing and reading the weights, compiling, the control, the analysis and the page


def run(box: Box) -> None:
    config = box.config("DiT-XL/2")
    steps, couplings = (4, (0, 0.3)) if box.rehearse else (250, COUPLINGS)
    blocks = 1 if box.rehearse else max(1, int((box.left() - FIXED) / block_seconds(box, steps)))
    pairs = blocks * BLOCK
    weights, out = box.out / "sweep" / "weights", box.out / "sweep" / "run"
    began = time.perf_counter()
    save_model(random_model(config), weights, dtype="bfloat16", overwrite=True)
    saved = time.perf_counter()
    watch = Watch(out / "manifest.json")
    watch.start()
    asked = ["--weights", weights, "--steps", steps, "--pairs", pairs, "--block", BLOCK, "--dtype", "bfloat16"]
    asked += ["--gain-pairs", 2, "--untrained-pairs", 2, "--classes", *(0, 1), "--out", out, "--quiet"]
    code = main([str(part) for part in ["compare", *asked, "--couplings", *couplings]])
    watch.stop()
    finished = time.perf_counter()
    # blocks after the first two have neither compilation nor the gain's passes in them
    steady = watch.seconds_per_block(skip=2)
    images = 2 * BLOCK * len(couplings) * steps
    rate = BLOCK / steady if steady else None
    box.row(
        pairs=pairs,
        steps=steps,
        couplings=len(couplings),
        exit_status=code,
        save_s=round(saved - began, 1),
        command_s=round(finished - saved, 1),
        timings=json.loads((out / "manifest.json").read_text())["timings"]
        if (out / "manifest.json").exists()
        else None,
        seconds_per_block=steady,
        pairs_per_hour=rate and 3600 * rate,
        flops_per_s=steady and flops(config, images // 2, 2) / steady,
        share=steady and flops(config, images // 2, 2) / steady / box.peak(),
        device=jax.devices()[0].device_kind,
    )


def block_seconds(box: Box, steps: int) -> float:
    """What a block should take, by the pair step measured in stage ``fast``."""
    for row in box.rows_of("fast"):
        if row.get("replicas") == 2 and row.get("guidance") == 1 and row.get("batch") == 64 and "seconds" in row:
            return row["seconds"]["jax"] / 64 * BLOCK * len(COUPLINGS) * steps
    return 40.0


class Watch(threading.Thread):
    """Notes when each block of the run is finished, from its manifest."""

    def __init__(self, manifest: Path):
        super().__init__(daemon=True)
        self.manifest, self.times, self._stop_asked = manifest, [], threading.Event()

    def run(self) -> None:
        while not self._stop_asked.wait(0.1):
            self.look()

    def look(self) -> None:
        try:
            done = json.loads(self.manifest.read_text())["blocks"].get("network", [])
        except (OSError, ValueError, KeyError):
            return
        self.times += [time.perf_counter()] * (len(done) - len(self.times))

    def stop(self) -> None:
        self._stop_asked.set()
        self.join()

    def seconds_per_block(self, skip: int) -> float | None:
        times = self.times[skip - 1 :]
        return (times[-1] - times[0]) / (len(times) - 1) if len(times) > 1 else None


def table(rows: list[dict]) -> str:
    shown = []
    for row in rows:
        steady = row["seconds_per_block"]
        numbers = ["", "", ""]
        if steady:
            numbers = [f"{row['pairs_per_hour']:.0f}", f"{row['flops_per_s'] / 1e12:.0f}", f"{row['share']:.0%}"]
        shown.append([row["pairs"], row["steps"], row["couplings"], row["command_s"], *numbers])
    header = ["pairs", "steps", "couplings", "whole command, s", "pairs an hour", "TFLOP/s", "share of peak"]
    return markdown(header, shown)
