"""What is wrong with the platform is said as such, in one line, and blamed on no file."""

import os
import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

from dit_jax import platform
from dit_jax.array_folder import write_arrays
from dit_jax.checkpoint import load_model, shipped_model
from dit_jax.platform import PlatformError, devices, host_device
from experiments.cli import main


@pytest.fixture(params=[AssertionError(), RuntimeError("Unable to initialize backend 'cuda': no GPU\nmore")])
def broken(request, monkeypatch):
    def fail(*_, **__):
        raise request.param

    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setattr(platform, "_settings", lambda: SimpleNamespace(jax_platforms="tpu"))
    return request.param


def test_a_sound_model_is_not_called_damaged(broken, tmp_path):
    with pytest.raises(PlatformError, match="no usable device") as error:
        load_model("photos8-natural")
    assert "damaged" not in str(error.value)
    assert "\n" not in str(error.value)
    assert str(broken).split("\n")[0] in str(error.value)
    with pytest.raises(PlatformError):
        write_arrays(tmp_path / "arrays", {})
    with pytest.raises(PlatformError, match="set JAX_PLATFORMS=tpu,cpu"):
        host_device()
    with pytest.raises(PlatformError, match="set JAX_PLATFORMS=cpu to run on the CPU"):
        devices()


@pytest.mark.parametrize(
    ("platforms", "remedy"),
    [("cpu", "the installation of JAX is broken"), ("cuda,cpu", "set JAX_PLATFORMS=cpu to run on the CPU")],
)
def test_the_remedy_is_another_than_what_is_set(broken, monkeypatch, platforms, remedy):
    monkeypatch.setattr(platform, "_settings", lambda: SimpleNamespace(jax_platforms=platforms))
    for find in (devices, host_device):
        with pytest.raises(PlatformError, match=f"JAX_PLATFORMS={platforms}.*; {remedy}"):
            find()


@pytest.mark.parametrize("command", [["compare"], ["theory"], ["sample", "photos8-natural"], ["convert", "nothing.pt"],
                                     ["train", "solvable"], ["info", "photos8-natural", "--verify"]])  # fmt: skip
def test_every_command_says_one_line(broken, command, tmp_path, capsys):
    out = {"compare": ["--out", "x"], "theory": ["--out", "x"], "info": []}.get(command[0], ["x"])
    assert main([*command, *(str(tmp_path / "x") if word == "x" else word for word in out)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("syncgap: JAX has no usable device")
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.long
def test_a_platform_that_does_not_exist(tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "nonsense"}
    code = "import sys; from experiments.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "info", str(shipped_model("photos8-natural")), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 2
    assert "JAX_PLATFORMS=nonsense" in done.stderr
    assert "damaged" not in done.stderr
    assert "Traceback" not in done.stderr
