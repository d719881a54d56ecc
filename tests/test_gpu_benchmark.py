"""benchmarks/gpu.py: its rehearsal goes through every stage, what is carried arrives, networks side by side are those
trained alone."""

import json
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[1]


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A zip of two classes of coloured noise, unequal in number."""
    path = tmp_path_factory.mktemp("images") / "images.zip"
    rng = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for name, count in (("cat", 13), ("dog", 29)):
            for i in range(count):
                data = BytesIO()
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(data, "PNG")
                archive.writestr(f"{name}/{i:03d}.png", data.getvalue())
    return path


def test_carried_images_are_the_ones_that_were_packed(images, tmp_path, benchmarks):
    import gpu_carry

    from dit_jax.images import load_images

    gpu_carry.pack(images, tmp_path / "packed.zip")
    arrived, expected = gpu_carry.unpack(tmp_path / "packed.zip"), load_images(images, gpu_carry.SIZE, progress=False)
    assert arrived.preparation() == expected.preparation()
    np.testing.assert_array_equal(arrived.pixels, expected.pixels)
    np.testing.assert_array_equal(arrived.labels, expected.labels)


def test_a_line_cut_short_loses_only_itself(tmp_path, benchmarks):
    import gpu

    (tmp_path / "here.jsonl").write_text('{"what": "card"}\n{"what": "jax"}\n{"wha')
    assert gpu.read_rows(tmp_path, "here") == [{"what": "card"}, {"what": "jax"}]


def test_only_wheels_that_are_missing_go_on_the_path(tmp_path, benchmarks, monkeypatch):
    import gpu_carry

    monkeypatch.setattr(gpu_carry, "FOLDER", tmp_path)
    (tmp_path / "wheels").mkdir()
    for name in ("numpy-99.0-py3-none-any.whl", "no_such_package-1.0-py3-none-any.whl"):
        with zipfile.ZipFile(tmp_path / "wheels" / name, "w") as wheel:
            wheel.writestr(f"{name.split('-')[0]}/__init__.py", "")
    (folder,) = gpu_carry.site_folder(tmp_path / "out")
    assert [path.name for path in Path(folder).iterdir()] == ["no_such_package"]


@pytest.mark.long
def test_the_rehearsal_goes_through_every_stage(images, tmp_path, benchmarks):
    import gpu
    import gpu_carry
    from gpu_stages.networks import join

    from dit_jax import load_model

    gpu_carry.pack(images, tmp_path / "packed.zip")
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), str(out), "--rehearse"]
    command += ["--images", str(tmp_path / "packed.zip"), "--networks", "deep-epsilon"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-3000:]
    outcomes = json.loads((out / "stages.json").read_text())
    assert {name: entry["outcome"] for name, entry in outcomes.items()} == dict.fromkeys(gpu.STAGES, "done")

    right = gpu.read_rows(out, "right")
    assert {row["check"] for row in right} == {"official", "attention", "gradients", "CPU", "bfloat16", "batches"}
    assert all(row["error"] <= row["limit"] for row in right)
    assert any(row["error"] > 0 for row in right)  # or nothing was compared
    fast = gpu.read_rows(out, "fast")
    assert all(row["flops_per_s"] > 0 and 0 < row["share"] < 1 for row in fast)
    assert {"jax", "torch eager"} <= set().union(*(row["seconds"] for row in fast))
    assert np.isclose(sum(r["share"] for r in gpu.read_rows(out, "profile") if "total_of" in r and r["batch"] == 16), 1)
    assert [row["exit_status"] for row in gpu.read_rows(out, "sweep")] == [0]
    for row in gpu.read_rows(out, "ensembles"):
        assert abs(row["variance"] - 1) < 0.2  # 500 paths of 8 modes

    assert join(out, tmp_path / "models") == ["deep-epsilon-0", "deep-epsilon-1"]
    assert load_model(tmp_path / "models" / "deep-epsilon-1").config.prediction == "epsilon"
    text = (out / "report.md").read_text()
    assert all(f"## {name}" in text for name in gpu.STAGES)


@pytest.mark.long
def test_networks_side_by_side_are_those_trained_alone(images, benchmarks):
    import jax
    import jax.numpy as jnp
    from flax import nnx
    from gpu_stages.networks import CHUNK, side_by_side

    from dit_jax.config import DiTConfig
    from dit_jax.images import load_images
    from dit_jax.model import DiT
    from dit_jax.training import TrainConfig, initial_state, make_update
    from dit_jax.transforms import training_data
    from ou_theory.clock import make_clock

    found = load_images(images, 4, progress=False)
    config = DiTConfig(input_size=4, in_channels=3, hidden_size=8, depth=1, num_heads=2, num_classes=2, prediction="v")
    data = [training_data(found, name) for name in ("natural", "whitened", "natural")]
    settings = [
        TrainConfig(steps=CHUNK, batch_size=4, warmup_steps=5, seed=seed, flip=d.may_mirror)
        for seed, d in zip((0, 1, 2), data, strict=True)
    ]
    together, last = side_by_side(config, settings, data, seconds=1e9)
    assert last["step"] == CHUNK
    assert len(set(last["mse"])) == 3
    step = None
    drawn = jax.jit(lambda seed: DiT(config, nnx.Rngs(jax.random.key(seed))))
    for model, each, d in zip(together, settings, data, strict=True):
        graph, params, constants = nnx.split(drawn(each.seed), nnx.Param, ...)
        state = initial_state(params, each)
        start = jax.tree.map(jnp.copy, params)
        step = step or jax.jit(make_update(config, each, graph, constants, make_clock(1000)))  # one for all seeds
        for k in range(each.steps):
            state, _ = step(state, *d.batch(each, k), each.seed, 0.5 if each.flip else 0.0)
        moved = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state["ema"], start)
        apart = jax.tree.map(lambda a, b: float(jnp.abs(a - b).max()), state["ema"], nnx.state(model, nnx.Param))
        assert max(jax.tree.leaves(moved)) > 1e-3
        assert max(jax.tree.leaves(apart)) < 1e-3 * max(jax.tree.leaves(moved))
