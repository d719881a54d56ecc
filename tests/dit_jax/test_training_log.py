"""The log of a training: a run that is stopped anywhere and goes on ends with the log of one that is not."""

import errno
import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dit_jax.training as training
from dit_jax.config import DiTConfig
from dit_jax.disk import CheckpointError
from dit_jax.images import ImageSet
from dit_jax.lock import FolderInUse, held
from dit_jax.model import DiT
from dit_jax.training import TrainConfig, learning_rate, train
from dit_jax.training_log import LossLog
from dit_jax.training_run import TrainingError
from ou_theory.clock import make_clock

MODEL = DiTConfig(input_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=1, num_classes=2, prediction="v")
STEPS, LINE, CHECKPOINT = 10, 3, 4  # lines at 3, 6, 9 and 10, checkpoints at 4, 8 and 10
STAGES = ("update", "torn line", "line", "keep", "state", "forget")


class Killed(BaseException):
    """As if the process had ended here."""


@pytest.fixture
def images():
    rng = np.random.default_rng(0)
    return ImageSet(rng.integers(0, 255, (6, 4, 4, 3), np.uint8), np.arange(6) % 2, ("a", "b"), np.zeros(3), 0.6, "d")


@pytest.fixture
def stub(monkeypatch):
    """Training without a network, in no time: the metrics of a step follow from its number, as they do in earnest."""

    def make_step(*_):
        def update(state, x0, labels):
            step = int(state["step"])
            rng = np.random.default_rng(step)
            t = rng.integers(0, 1000, len(x0)).astype(np.int32)
            mse, vb = rng.random((2, len(x0)), np.float32)
            metrics = {"loss": jnp.float32(rng.random()), "t": t, "mse": jnp.asarray(mse), "vb": vb}
            metrics["grad_norm"] = jnp.asarray(rng.random(), jnp.bfloat16)
            return {**state, "step": jnp.asarray(step + 1, jnp.int32)}, metrics

        return update

    def save_arrays(folder, state):
        folder.mkdir(exist_ok=True)
        (folder / "step").write_text(str(int(state["step"])))

    def load_arrays(folder, like):
        return {**like, "step": jnp.asarray(int((folder / "step").read_text()), jnp.int32)}

    network = nnx.split(DiT(MODEL, nnx.Rngs(0)), nnx.Param, ...)
    monkeypatch.setattr(training.nnx, "split", lambda *_: network)
    monkeypatch.setattr(training, "initial_state", lambda *_: {"step": jnp.zeros((), jnp.int32), "ema": network[1]})
    monkeypatch.setattr(training, "save_arrays", save_arrays)
    monkeypatch.setattr(training, "load_arrays", load_arrays)
    monkeypatch.setattr(training, "save_model", lambda *_, **__: None)
    monkeypatch.setattr(training, "make_network", lambda *_: None)
    monkeypatch.setattr(training, "make_step", make_step)
    monkeypatch.setattr(training, "_sample_grid", lambda *_: training.Image.new("RGB", (1, 1)))


def run(images, out, steps=STEPS, **options):
    config = TrainConfig(steps=steps, batch_size=2)
    train(images, MODEL, config, out, checkpoint_every=CHECKPOINT, log_every=LINE, progress=False, **options)


def history(out):
    lines = [json.loads(text) for text in (out / "log.jsonl").read_text().splitlines()]
    assert all(line.pop("seconds_per_step") > 0 for line in lines)
    return lines


def die(monkeypatch, stage, count):
    """Ends the process at a stage of the training, the `count`-th time that it comes there."""
    seen = []

    def at(home, name, *, before=True, torn=False):
        original = getattr(home, name)

        def killed(*args):
            seen.append(1)
            last = len(seen) == count
            if last and before:
                raise Killed
            result = original(*args)
            if last and torn:
                path = args[0].path
                path.write_text(path.read_text()[:-40])
            if last:
                raise Killed
            return result

        monkeypatch.setattr(home, name, killed)

    match stage:
        case "update":
            at(training.Photographs, "batch")
        case "torn line":
            at(LossLog, "write", before=False, torn=True)
        case "line":
            at(LossLog, "write", before=False)
        case "keep":
            at(LossLog, "keep", before=False)
        case "state":
            at(training, "save_arrays", before=False)
        case "forget":
            at(LossLog, "forget", before=False)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_that_was_killed_anywhere_ends_with_the_same_log(images, stub, tmp_path, monkeypatch, stage):
    run(images, tmp_path / "whole")
    whole = history(tmp_path / "whole")
    assert [line["step"] for line in whole] == [3, 6, 9, 10]
    kills = 0
    for count in range(1, STEPS + 1):
        out = tmp_path / f"run-{count}"
        with monkeypatch.context() as patch:
            die(patch, stage, count)
            try:
                run(images, out)
            except Killed:
                kills += 1
        run(images, out, resume=True)
        assert history(out) == whole
        assert [path.name for path in out.glob(".rows-*")] == [f".rows-{STEPS}.npz"]
        shutil.rmtree(out)
    assert kills >= 3


def test_a_run_that_was_killed_twice_and_is_asked_for_again_ends_with_the_same_log(images, stub, tmp_path, monkeypatch):
    run(images, tmp_path / "whole")
    for count in (6, 3):
        with monkeypatch.context() as patch:
            die(patch, "update", count)
            with pytest.raises(Killed):
                run(images, tmp_path / "run", resume=True)
    run(images, tmp_path / "run", resume=True)
    run(images, tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_a_run_that_is_lengthened_has_the_lines_of_a_long_one(images, stub, tmp_path):
    run(images, tmp_path / "long", steps=14)
    run(images, tmp_path / "run")
    run(images, tmp_path / "run", steps=14, resume=True)
    lines, long = history(tmp_path / "run"), history(tmp_path / "long")
    for line in (*lines, *long):
        line.pop("learning_rate")  # which follows from the number of steps
    assert lines == long


def test_repeated_and_torn_lines_of_older_runs_are_mended(images, stub, tmp_path):
    run(images, tmp_path / "whole")
    log = tmp_path / "whole" / "log.jsonl"
    whole, lines = history(tmp_path / "whole"), log.read_text().splitlines()
    log.write_text("\n".join([lines[0], lines[0], lines[1], '{"step": 9, "lo', *lines[2:], '{"ste']))
    run(images, tmp_path / "whole", resume=True)
    assert history(tmp_path / "whole") == whole


def test_rows_are_kept_as_they_are(tmp_path):
    log = LossLog(tmp_path / "log.jsonl", make_clock(10), lambda step: 0.0)
    rows = [
        {"t": np.arange(3, dtype=np.int32), "loss": np.float32(i / 3), "norm": jnp.bfloat16(i / 3)} for i in range(2)
    ]
    for row in rows:
        log.add(row)
    log.keep(5)
    again = LossLog(log.path, make_clock(10), lambda step: 0.0)
    again.rewind(5)
    for row, kept in zip(rows, again.rows, strict=True):
        jax.tree.map(np.testing.assert_array_equal, {**row, "norm": np.float32(row["norm"])}, kept)
    again.rewind(4)
    assert again.rows == []


@pytest.mark.long
def test_a_network_s_log_goes_on_in_the_middle_of_a_line(images, tmp_path, monkeypatch):
    run(images, tmp_path / "whole")
    with monkeypatch.context() as patch:
        die(patch, "update", 6)
        with pytest.raises(Killed):
            run(images, tmp_path / "run")
    run(images, tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "whole")


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_last_good_checkpoint(
    images, stub, tmp_path, monkeypatch, what
):
    run(images, tmp_path / "whole")
    make_step, calls = training.make_step, []

    def bad_from(first):
        def make(*arguments):
            update = make_step(*arguments)

            def spoilt(state, *batch):
                state, metrics = update(state, *batch)
                calls.append(int(state["step"]))
                return state, {**metrics, what: jnp.float32(np.nan)} if calls[-1] >= first else metrics

            return spoilt

        return make

    for first in range(1, STEPS + 1):
        out = tmp_path / f"run-{first}"
        calls.clear()
        monkeypatch.setattr(training, "make_step", bad_from(first))
        with pytest.raises(TrainingError, match=rf"is nan at step {first}: .*--learning-rate below 0\.001") as error:
            run(images, out)
        assert calls[-1] <= first + 1
        kept = CHECKPOINT * ((first - 1) // CHECKPOINT)
        assert (f"of step {kept}, stays in" if kept else "there is no checkpoint yet") in str(error.value)
        assert (out / "state").exists() == (kept > 0)
        assert not kept or (out / "state" / "step").read_text() == str(kept)
        assert all(line["step"] < first for line in (history(out) if (out / "log.jsonl").exists() else ()))
        monkeypatch.setattr(training, "make_step", make_step)
        run(images, out, resume=True)
        assert history(out) == history(tmp_path / "whole")


def test_weights_that_are_not_finite_do_not_replace_the_last_good_ones(images, stub, tmp_path, monkeypatch):
    make_step = training.make_step

    def make(*arguments):
        update = make_step(*arguments)

        def spoilt(state, *batch):
            state, metrics = update(state, *batch)
            return {**state, "params": jnp.float32(np.inf if int(state["step"]) == 8 else 0)}, metrics

        return spoilt

    monkeypatch.setattr(training, "make_step", make)
    with pytest.raises(TrainingError, match=r"the weights are not finite after step 8: .* of step 4, stays in"):
        run(images, tmp_path / "run")
    assert (tmp_path / "run" / "state" / "step").read_text() == "4"


def test_a_start_that_failed_claims_nothing(images, stub, tmp_path, monkeypatch):
    def fail(*_):
        raise RuntimeError

    for broken, change in (("make_network", {}), ("make_step", {}), ("save_arrays", {"steps": 7})):
        with monkeypatch.context() as patch:
            patch.setattr(training, broken, fail)
            with pytest.raises(RuntimeError):
                run(images, tmp_path / "run")
        shutil.copytree(tmp_path / "run", tmp_path / broken) if (tmp_path / "run").exists() else None
        run(images, tmp_path / broken, **change)  # with other settings, too, and without --resume
        assert settings(tmp_path / broken)["steps"] == change.get("steps", STEPS)
        assert history(tmp_path / broken)[-1]["step"] == change.get("steps", STEPS)
    with pytest.raises(TrainingError, match="give --resume"):
        run(images, tmp_path / "save_arrays")


def settings(out):
    return json.loads((out / "run.json").read_text())["training"]


def test_fewer_steps_are_other_settings(images, stub, tmp_path, monkeypatch):
    run(images, tmp_path / "run")
    before = (tmp_path / "run" / "run.json").read_bytes()
    with pytest.raises(TrainingError, match=r"training.steps: 10 -> 9\. Resume it with its own \(only --steps may be"):
        run(images, tmp_path / "run", steps=9, resume=True)
    assert (tmp_path / "run" / "run.json").read_bytes() == before
    with monkeypatch.context() as patch:
        die(patch, "update", 6)
        with pytest.raises(Killed):
            run(images, tmp_path / "stopped")
    with pytest.raises(TrainingError, match=r"training.steps: 10 -> 9"):  # though it has done four only
        run(images, tmp_path / "stopped", steps=9, resume=True)


def test_more_steps_are_an_extension_and_recorded_as_one(images, stub, tmp_path, monkeypatch):
    out = tmp_path / "run"
    run(images, out)
    assert "extensions" not in settings(out)
    with monkeypatch.context() as patch:
        die(patch, "update", 5)
        with pytest.raises(Killed):
            run(images, out, steps=16, resume=True)
    first = [{"at_step": 10, "steps_before": 10}]
    assert settings(out)["extensions"] == first
    run(images, out, steps=16, resume=True)
    assert settings(out)["extensions"] == first  # gone on with, not made longer again
    run(images, out, steps=20, resume=True)
    assert settings(out)["extensions"] == [*first, {"at_step": 16, "steps_before": 16}]
    expected = TrainConfig(steps=20, batch_size=2, extensions=((10, 10), (16, 16)))
    rate = learning_rate(expected)
    logged = {line["step"]: line["learning_rate"] for line in history(out)}
    assert logged[20] == float(np.asarray(rate(19)))
    with pytest.raises(TrainingError, match=r"training\.steps: 20 -> 16"):
        run(images, out, steps=16, resume=True)


@pytest.mark.parametrize("content", ["{", "[]", '{"training": {}}', '{"training": {"steps": 3, "extensions": [1]}}'])
def test_settings_that_cannot_be_read_are_named(images, stub, tmp_path, content):
    run(images, tmp_path / "run")
    (tmp_path / "run" / "run.json").write_text(content)
    with pytest.raises(TrainingError, match=r"run\.json cannot be used"):
        run(images, tmp_path / "run", resume=True)


def test_a_disk_that_fills_up_costs_no_more_than_a_checkpoint(images, stub, tmp_path, monkeypatch):
    run(images, tmp_path / "whole")
    save, saved = training.save_arrays, []

    def full(folder, state):
        saved.append(1)
        if len(saved) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save(folder, state)

    monkeypatch.setattr(training, "save_arrays", full)
    with pytest.raises(CheckpointError, match="run cannot be written: the disk is full"):
        run(images, tmp_path / "run")
    run(images, tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_a_folder_that_goes_away_is_one_line_and_is_not_made_again(images, stub, tmp_path, monkeypatch):
    batch = training.Photographs.batch

    def moving(data, config, step):
        if step == CHECKPOINT + 3:  # after a line, just before the next checkpoint
            shutil.move(tmp_path / "run", tmp_path / "elsewhere")
        return batch(data, config, step)

    monkeypatch.setattr(training.Photographs, "batch", moving)
    with pytest.raises(ValueError, match="run was removed or moved while it was trained in"):
        run(images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_log_may_end_in_anything_and_its_kept_steps_may_be_damaged(images, stub, tmp_path, monkeypatch):
    run(images, tmp_path / "whole")
    with monkeypatch.context() as patched:
        die(patched, "update", 6)
        with pytest.raises(Killed):
            run(images, tmp_path / "run")
    with (tmp_path / "run" / "log.jsonl").open("ab") as log:
        log.write(b'{"step": 6, "loss": 0.\x00\xff')
    (kept,) = (tmp_path / "run").glob(".rows-*")
    content = kept.read_bytes()
    kept.write_bytes(content[:-9])
    with pytest.raises(CheckpointError, match=r"rows-4\.npz is damaged .*remove it"):
        run(images, tmp_path / "run", resume=True)
    kept.write_bytes(content)
    run(images, tmp_path / "run", resume=True)
    assert history(tmp_path / "run") == history(tmp_path / "whole")


def test_two_trainings_do_not_share_a_folder(images, stub, tmp_path):
    with held(tmp_path / "run"), pytest.raises(FolderInUse, match=f"process {os.getpid()} on"):
        run(images, tmp_path / "run")
    run(images, tmp_path / "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
