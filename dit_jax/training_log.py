"""The log of a training run: one JSON line for every so many steps, the same whether the run was interrupted or not.

A line stands for the steps since the one before. At a checkpoint the steps that have no line yet are stored beside the
state, so that a run that goes on from there writes the lines of one that was never stopped.
"""

import itertools
import json
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from dit_jax.disk import CheckpointError, replace_synced, sync
from ou_theory.clock import Clock

LEVEL_EDGES = np.array([-12.0, -8, -6, -4, -2, 0, 2, 4, 12])  # log-SNR bins of the logged loss


class LossLog:
    """Means over the steps since the last line: loss by noise level, learning rate, speed."""

    def __init__(self, path: Path, clock: Clock, schedule: optax.Schedule):
        self.path, self.schedule = path, schedule
        self.bin_of = np.digitize(clock.log_snr, LEVEL_EDGES) - 1
        self.rows: list[dict] = []
        self.since = time.perf_counter()

    def add(self, metrics: dict) -> None:
        """Takes the metrics of one step."""
        self.rows.append(metrics)

    def write(self, step: int) -> dict:
        """Appends one line for the steps since the last, of which `step` is the number of the last, and returns it."""
        rows = self._on_host()
        t = np.concatenate([row["t"] for row in rows])
        mse = np.concatenate([row["mse"] for row in rows])
        bins = self.bin_of[t]
        line = {
            "step": step,
            "loss": float(np.mean([row["loss"] for row in rows])),
            "mse": float(mse.mean()),
            "vb": float(np.mean([row["vb"].mean() for row in rows])),
            "grad_norm": float(np.mean([row["grad_norm"] for row in rows])),
            "learning_rate": float(np.asarray(self.schedule(step - 1))),
            "seconds_per_step": (time.perf_counter() - self.since) / len(rows),
            "mse_by_log_snr": {
                f"{low:g}..{high:g}": float(mse[bins == b].mean())
                for b, (low, high) in enumerate(itertools.pairwise(LEVEL_EDGES))
                if np.any(bins == b)
            },
        }
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
        self.rows, self.since = [], time.perf_counter()
        return line

    def keep(self, step: int) -> None:
        """Stores the steps that have no line yet, before the checkpoint of `step` is written."""
        rows = self._on_host()
        seconds = np.float64(time.perf_counter() - self.since)
        columns: dict[str, Any] = {name: np.stack([row[name] for row in rows]) for name in (rows[0] if rows else ())}
        partial = self._kept(step).with_suffix(".partial")
        with partial.open("wb") as file:
            np.savez(file, seconds=seconds, **columns)
        replace_synced(partial, self._kept(step))
        if self.path.exists():
            sync(self.path)  # the lines before the checkpoint are not written again

    def forget(self, step: int) -> None:
        """Removes what was kept for other checkpoints than that of `step`, which has replaced them."""
        for path in self.path.parent.glob(".rows-*"):
            if path != self._kept(step):
                path.unlink(missing_ok=True)

    def rewind(self, step: int) -> None:
        """Goes back to the checkpoint of `step`: lines of later steps, torn ones and repeated ones are removed, and the
        steps that had no line yet are taken up again. Runs of older versions did not keep these.

        Raises:
          CheckpointError: what was kept of these steps cannot be read.
        """
        self.rows, seconds = [], 0.0
        if self._kept(step).exists():
            columns = self._columns(step)
            seconds = float(columns.pop("seconds"))
            count = len(next(iter(columns.values()))) if columns else 0
            self.rows = [{name: column[i] for name, column in columns.items()} for i in range(count)]
        lines = {line["step"]: line for line in self.lines() if line["step"] <= step - len(self.rows)}
        if self.path.exists():
            partial = self.path.with_name(f".{self.path.name}.partial")
            partial.write_text("".join(json.dumps(lines[at]) + "\n" for at in sorted(lines)))
            replace_synced(partial, self.path)
        self.forget(step)
        self.since = time.perf_counter() - seconds

    def _columns(self, step: int) -> dict[str, np.ndarray]:
        path = self._kept(step)
        try:
            with np.load(path) as kept:
                columns = {name: kept[name] for name in kept.files}
            columns["seconds"]
        except Exception as error:  # a damaged archive raises many kinds
            raise CheckpointError(
                f"{path} is damaged ({error}); remove it to go on without a line of the log for its steps"
            ) from error
        return columns

    def lines(self) -> list[dict]:
        """The lines of the file; one that was torn by a kill is left out."""
        found = []
        for text in self.path.read_text(errors="replace").splitlines() if self.path.exists() else ():
            try:
                line = json.loads(text)
            except ValueError:
                continue
            if isinstance(line, dict) and isinstance(line.get("step"), int):
                found.append(line)
        return found

    def _kept(self, step: int) -> Path:
        return self.path.with_name(f".rows-{step}.npz")

    def _on_host(self) -> list[dict]:
        """The rows as NumPy's own arrays, which can be stored: what a network computes in bfloat16 is widened."""
        return [
            {name: value.astype(np.float32) if value.dtype.kind == "V" else value for name, value in row.items()}
            for row in jax.tree.map(np.asarray, jax.device_get(self.rows))
        ]
