"""``convert_weights.py`` and ``syncgap convert`` from file to function."""

import errno
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from dit_jax.checkpoint import load_manifest, load_model
from experiments.cli import main

ROOT = Path(__file__).parents[1]
DATA = ROOT / "tests" / "data"
# what the recorded file does not say
TOLD = ("--num-heads", "6", "--num-classes", "10", "--prediction", "epsilon")
TINY = DATA / "tiny_xl_like.pt"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("convert_weights", ROOT / "convert_weights.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(script, monkeypatch, capsys):
    """Runs the script in this process: exit status, standard output, standard error."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["convert_weights.py", *map(str, arguments)])
        status = 0
        try:
            script.main()
        except SystemExit as stop:
            status = stop.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.mark.slow
def test_converted_model_is_the_official_function(tmp_path):
    """From any working directory, in a process of its own."""
    command = [sys.executable, str(ROOT / "convert_weights.py"), str(TINY), "model", *TOLD]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    model = load_model(tmp_path / "model")
    with np.load(DATA / "refs_tiny.npz") as refs:
        x, t, y, expected = (refs[name] for name in ("x", "t", "y", "out_f32"))
    call = nnx.jit(lambda model, *args: model(*args))
    out = np.asarray(call(model, jnp.asarray(x.transpose(0, 2, 3, 1)), jnp.asarray(t), jnp.asarray(y)))
    assert out.shape == (6, 8, 8, 8)
    error = np.abs(out - expected.transpose(0, 2, 3, 1)).max((1, 2, 3)) / np.abs(expected).max()
    assert np.all(error <= np.where(t <= 10, 5e-6, 5e-5))


def test_report_and_manifest(run, tmp_path):
    status, out, _ = run(TINY, tmp_path / "model", *TOLD)
    manifest = load_manifest(tmp_path / "model")
    assert status == 0
    for part in ("none of the official ones", "729,248", manifest["digest"], str(tmp_path / "model")):
        assert part in out
    assert manifest["source"]["file"] == "tiny_xl_like.pt"
    assert len(manifest["source"]["sha256"]) == 64
    assert manifest["conversion_version"] == 2
    assert manifest["config"]["num_heads"] == 6


def test_dry_run_checks_everything_and_writes_nothing(run, tmp_path):
    status, out, _ = run(TINY, tmp_path / "model", *TOLD, "--dry-run")
    assert status == 0
    assert "not written" in out
    assert not list(tmp_path.iterdir())
    status, _, errors = run(TINY, tmp_path / "model", "--num-heads", 7, "--dry-run")
    assert status == 2
    assert "num_heads 7" in errors


def test_dry_run_announces_the_digest_that_is_written(run, tmp_path):
    options = (TINY, tmp_path / "model", *TOLD, "--dtype", "bfloat16")
    announced = run(*options, "--dry-run")[1]
    run(*options)
    assert load_manifest(tmp_path / "model")["digest"] in announced


def test_errors_are_one_message_and_status_2(run, tmp_path):
    content = torch.load(TINY, weights_only=True)
    del content["pos_embed"]
    content["blocks.2.mlp.fc2.bias"][5] = torch.inf
    torch.save(content, tmp_path / "bad.pt")
    status, out, errors = run(tmp_path / "bad.pt", tmp_path / "model", *TOLD)
    assert (status, out) == (2, "")
    assert "missing: pos_embed" in errors
    assert "not finite: blocks.2.mlp.fc2.bias" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "model").exists()


def test_existing_folder_needs_overwrite(run, tmp_path):
    arguments = (TINY, tmp_path / "model", *TOLD)
    assert run(*arguments)[0] == 0
    status, _, errors = run(*arguments, "--dtype", "bfloat16")
    assert status == 2
    assert "--overwrite" in errors
    assert run(*arguments, "--dtype", "bfloat16", "--overwrite")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_which_part_of_a_training_checkpoint(run, tmp_path):
    ema = torch.load(TINY, weights_only=True)
    model = {key: value + 1 for key, value in ema.items()}
    torch.save({"model": model, "ema": ema, "opt": {}}, tmp_path / "train.pt")
    digests = {}
    for which in ("ema", "model"):
        assert run(tmp_path / "train.pt", tmp_path / which, *TOLD, "--which", which)[0] == 0
        manifest = json.loads((tmp_path / which / "manifest.json").read_text())
        assert manifest["source"]["form"] == f"training/{which}"
        digests[which] = manifest["digest"]
    assert digests["ema"] != digests["model"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_verify_prints_the_stages_and_passes(run, tmp_path, dtype):
    status, out, _ = run(TINY, tmp_path / "model", *TOLD, "--verify", "--dtype", dtype)
    assert status == 0
    stages = [line.split() for line in out.splitlines() if line.startswith("blocks.")]
    assert len(stages) == 4 * 6
    assert all(float(number) < 1e-4 for _, *numbers in stages for number in numbers)


def test_verify_reports_a_fault_in_its_status(run, tmp_path, monkeypatch):
    """A model folder that computes something else than its checkpoint: here, in the other timestep convention."""
    import dit_jax.verify as verify

    stock = verify._jax_stages

    def faulty(model, x, t, y):
        model.t_embedder.divisor = 127
        return stock(model, x, t, y)

    monkeypatch.setattr(verify, "_jax_stages", faulty)
    status, out, _ = run(TINY, tmp_path / "model", *TOLD, "--verify")
    assert status == 1
    assert "BEYOND" in out


def test_export_and_back(run, tmp_path):
    assert run(TINY, tmp_path / "model", *TOLD)[0] == 0
    assert run("--export", tmp_path / "model", tmp_path / "back.safetensors")[0] == 0
    assert run(tmp_path / "back.safetensors", tmp_path / "again")[0] == 0
    assert load_manifest(tmp_path / "again")["digest"] == load_manifest(tmp_path / "model")["digest"]
    status, _, error = run("--export", tmp_path / "model", tmp_path / "back.safetensors")
    assert status == 2
    assert "--overwrite" in error


def test_what_is_asked_for_names_its_options(run, tmp_path):
    """All of it in one message; nothing is assumed and nothing written."""
    status, out, errors = run(TINY, tmp_path / "model")
    assert (status, out) == (2, "")
    for option in ("--prediction epsilon|v|x0|velocity|score", "--num-classes 10", "--num-classes 11", "--num-heads"):
        assert option in errors
    assert not list(tmp_path.iterdir())


def test_an_export_needs_no_options(run, tmp_path):
    """Also of a network that predicts something else, and has no null label."""
    told = ("--num-heads", 6, "--null-label", "none", "--prediction", "v", "--timestep-convention", "diffusers")
    assert run(TINY, tmp_path / "model", *told)[0] == 0
    for suffix in ("pt", "safetensors"):
        assert run("--export", tmp_path / "model", tmp_path / f"out.{suffix}")[0] == 0
        assert run(tmp_path / f"out.{suffix}", tmp_path / suffix)[0] == 0
        first, again = (load_manifest(tmp_path / name) for name in ("model", suffix))
        assert (again["config"], again["digest"]) == (first["config"], first["digest"])
    assert first["config"]["prediction"] == "v"
    assert first["config"]["null_label"] is False


def test_verify_reads_the_weights_that_were_converted(run, tmp_path):
    """From the same prefix, of a network whose last label row is a class."""
    weights = torch.load(TINY, weights_only=True)
    both = {f"{part}.{key}": value + i for i, part in enumerate("ab") for key, value in weights.items()}
    torch.save(both, tmp_path / "both.pt")
    told = ("--num-heads", 6, "--null-label", "none", "--prediction", "epsilon")
    status, _, errors = run(tmp_path / "both.pt", tmp_path / "model", *told)
    assert (status, "--prefix" in errors) == (2, True)
    assert run(tmp_path / "both.pt", tmp_path / "model", *told, "--prefix", "a", "--verify")[0] == 0


def test_guidance_of_a_network_without_a_null_label_is_refused_by_the_command(tmp_path, capsys):
    told = ["--num-heads", "6", "--null-label", "none", "--prediction", "epsilon"]
    assert main(["convert", str(TINY), str(tmp_path / "model"), *told]) == 0
    sample = [
        "sample",
        str(tmp_path / "model"),
        str(tmp_path / "out"),
        "--classes",
        "10",
        "--count",
        "1",
        "--steps",
        "2",
    ]
    assert main([*sample, "--guidance", "2", "--quiet"]) == 2
    assert "guidance 2 needs a null label" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*sample, "--quiet"]) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--verify", "--dry-run"), "give one of them"),
        (("--export", "--verify"), "takes neither"),
        (("--export", "--dry-run"), "takes neither"),
    ],
)
def test_options_that_exclude_each_other_are_refused(run, tmp_path, options, message):
    status, _, errors = run(TINY, tmp_path / "model", *TOLD, *options)
    assert status == 2
    assert message in errors
    assert not list(tmp_path.iterdir())


def test_export_takes_no_facts(run, tmp_path):
    status, _, errors = run("--export", tmp_path / "model", tmp_path / "out.pt", *TOLD)
    assert status == 2
    assert "which says these itself: leave --prediction, --num-classes, --num-heads out" in errors


@pytest.mark.slow
@pytest.mark.long
def test_a_conversion_that_is_killed_leaves_nothing_half_written(tmp_path):
    """Killed at any moment, the folder is not there, or whole; and the next conversion succeeds."""
    out = tmp_path / "model"
    # each conversion in a process of its own, forked from one that has imported everything and done nothing
    script = f"""
import os, sys
sys.argv = {["convert_weights.py", str(TINY), str(out), *TOLD]}
sys.path.insert(0, {str(ROOT)!r})
import torch, convert_weights
import dit_jax.checkpoint as checkpoint

def convert(at=None, before=False):
    def hooked(*args, **kwargs):
        if before:
            os.kill(os.getpid(), 9)
        result = stock(*args, **kwargs)
        os.kill(os.getpid(), 9)
    if at:
        stock = getattr(checkpoint, at)
        setattr(checkpoint, at, hooked)
    convert_weights.main()

def in_a_process(*options):
    sys.stdout.flush()
    child = os.fork()
    if not child:
        try:
            convert(*options)
        except SystemExit as end:
            os._exit(end.code or 0)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), os.path.exists({str(out)!r})

for at in ("write_arrays", "write_json"):
    for before in (True, False):
        print(in_a_process(at, before))
print(in_a_process())
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    told = [line for line in done.stdout.splitlines() if line.startswith("(")]
    assert told == ["(-9, False)"] * 4 + ["(0, True)"]
    assert load_model(out).config.depth == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


def test_syncgap_convert_is_the_same_command(run, tmp_path, capsys):
    options = [*TOLD, "--dtype", "bfloat16"]
    status, told, _ = run(TINY, tmp_path / "script", *options)
    assert main(["convert", str(TINY), str(tmp_path / "command"), *options]) == status == 0
    assert capsys.readouterr().out == told.replace(str(tmp_path / "script"), str(tmp_path / "command"))
    assert load_manifest(tmp_path / "command") == load_manifest(tmp_path / "script")
    assert main(["convert", str(TINY), str(tmp_path / "command"), *options]) == 2
    assert "exists and is not empty" in capsys.readouterr().err


@pytest.mark.long
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path):
    out, limit = tmp_path / "model", 20_000  # bytes of a file
    script = f"""
import resource, signal, sys
from experiments.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.exit(main(["convert", {str(TINY)!r}, {str(out)!r}, *{TOLD}]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    told = "the disk is full (File too large); make room, or choose a folder on another disk"
    assert done.stderr == f"syncgap: {out} cannot be written: {told}\n"
    assert not list(tmp_path.iterdir())


def test_places_where_nothing_can_be_written_are_named_before_the_file_is_read(run, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    status, out, errors = run(tmp_path / "nothing.pt", tmp_path / "file" / "model")
    assert (status, out) == (2, "")
    assert f"model cannot be written: {tmp_path / 'file'} is a file; choose another folder" in errors

    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(Path, "open", refuse)
    status, _, errors = run(tmp_path / "nothing.pt", tmp_path / "model")
    assert status == 2
    assert "model cannot be written: its place is read-only (Read-only file system); choose another folder" in errors
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_path_may_begin_with_the_home_folder(run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(TINY, "~/model", *TOLD)[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
