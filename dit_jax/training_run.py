"""The folder of a training run: which settings it was started with, how it may go on, and when it must stop."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dit_jax.disk import recover

RUN = "run.json"  # the settings; beside it lie state/, model/, log.jsonl and samples.png
EXTENSIONS = "extensions"  # in its entries of training: how the run was made longer

Extensions = tuple[tuple[int, int], ...]  # (step at which a run was made longer, steps that it had before), in order


class TrainingError(ValueError):
    """A training run that cannot be started, continued or finished."""


def started(out: Path, record: Mapping[str, Any], resume: bool) -> dict | None:
    """The settings with which the run in a folder was started, or None if there is nothing to go on from: no folder, an
    empty one, or a run without a checkpoint, which may be started anew with any settings.

    Args:
      record: the settings that are asked for.

    Raises:
      TrainingError: the folder holds something else; or a run, and `resume` is not given or settings differ.
    """
    path = out / RUN
    if not path.exists():
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise TrainingError(f"{out} is not empty and holds no training run; choose another folder")
        return None
    if not recover(out / "state") and not (out / "model").exists():
        return None
    if not resume:
        raise TrainingError(f"{out} holds a training run; give --resume to go on with it, or choose another folder")
    try:
        before = json.loads(path.read_text("utf-8"))
        steps = before["training"]["steps"]
        extensions_of(before)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise TrainingError(f"{path} cannot be used ({error!r}); train again in another folder") from error
    asked = json.loads(json.dumps(record))
    changed = [
        f"{part}.{name}: {before.get(part, {}).get(name)!r} -> {entries.get(name)!r}"
        for part, entries in asked.items()
        for name in entries | before.get(part, {})  # an entry that only the run has is a difference, too
        if before.get(part, {}).get(name) != entries.get(name)
        and (part, name) not in (("training", "steps"), ("training", EXTENSIONS))
    ]
    if asked["training"]["steps"] < steps:
        changed.append(f"training.steps: {steps} -> {asked['training']['steps']}")
    if changed:
        raise TrainingError(
            f"{out} was started with other settings: {'; '.join(changed)}. Resume it with its own (only --steps may be "
            "larger), or choose another folder"
        )
    return before


def require_there(out: Path) -> None:
    """Raises TrainingError if the folder of a run is no longer there, before a checkpoint makes a new one."""
    if not (out / RUN).is_file():
        raise TrainingError(f"{out} was removed or moved while it was trained in; put it back, or train again")


def extensions_of(record: Mapping[str, Any]) -> Extensions:
    """How a stored run was made longer."""
    return tuple((entry["at_step"], entry["steps_before"]) for entry in record["training"].get(EXTENSIONS, ()))


def extended(before: Mapping[str, Any] | None, steps: int, at: int) -> Extensions:
    """How the run was made longer, if it now goes on from step `at` to `steps`."""
    if before is None:
        return ()
    planned = before["training"]["steps"]
    return extensions_of(before) + (((at, planned),) if steps > planned else ())


def training_entries(settings: Mapping[str, Any], extensions: Sequence[tuple[int, int]]) -> dict[str, Any]:
    """The settings of training as they are stored. Only a run that was made longer has extensions."""
    entries = dict(settings)
    longer = [{"at_step": at, "steps_before": planned} for at, planned in extensions]
    return entries | ({EXTENSIONS: longer} if longer else {})


def require_finite(step: int, metrics: Mapping[str, Any], out: Path, kept: int, hints: Sequence[str]) -> None:
    """Stops a training whose loss or gradient is not finite.

    Args:
      step: the number of the step, from 1 on, that `metrics` are of.
      kept: step of the last checkpoint; 0 if there is none.
      hints: what to try.

    Raises:
      TrainingError: they are not finite; the message names the step, the last good checkpoint and the hints.
    """
    found = {"loss": float(metrics["loss"]), "norm of the gradient": float(metrics["grad_norm"])}
    odd = [f"{name} is {value}" for name, value in found.items() if not math.isfinite(value)]
    if odd:
        raise _diverged(f"the {' and the '.join(odd)} at step {step}", out, kept, hints)


def require_finite_state(step: int, state: Any, out: Path, kept: int, hints: Sequence[str]) -> None:
    """Stops a training whose state after `step` is not finite, before it replaces the last good one. See
    `require_finite`."""
    if not all(np.isfinite(np.asarray(leaf)).all() for leaf in jax.tree.leaves(state)):
        raise _diverged(f"the weights are not finite after step {step}", out, kept, hints)


def _diverged(what: str, out: Path, kept: int, hints: Sequence[str]) -> TrainingError:
    good = (
        f"the last good checkpoint, of step {kept}, stays in {out / 'state'}" if kept else "there is no checkpoint yet"
    )
    return TrainingError(f"{what}: training stops, and {good}. In another folder, try {'; or '.join(hints)}")
