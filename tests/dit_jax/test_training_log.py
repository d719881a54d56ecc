"""The log of a training: a run that is stopped anywhere and goes on ends with the log of one that is not."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dit_jax.training as training
from dit_jax.config import DiTConfig
from dit_jax.images import ImageSet
from dit_jax.model import DiT
from dit_jax.training import TrainConfig, train
from dit_jax.training_log import LossLog
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
