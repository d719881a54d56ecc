"""What a model folder says of itself, that nothing is loaded for it, and that a changed folder is found out."""

import json
import shutil

import jax
import pytest

from dit_jax import checkpoint
from dit_jax.checkpoint import save_model, shipped_model
from dit_jax.config import DiTConfig, variant
from dit_jax.disk import CheckpointError
from experiments import cli
from experiments.frame.subject import model_folder, untrained_model
from experiments.tools.info import describe, verify

TINY = DiTConfig(input_size=4, in_channels=4, hidden_size=16, depth=2, num_heads=2, num_classes=1000)
SOURCE = {"file": "DiT.pt", "sha256": "ab" * 32, "form": "pt, ema"}


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "tiny"
    save_model(untrained_model(TINY, 0), folder, extra={"variant": None, "source": SOURCE}, dtype="bfloat16")
    return folder


def entries(text):
    """{entry: value} of aligned lines; fails if they are not aligned."""
    lines = text.splitlines()
    width = max(len(line.split("  ")[0]) for line in lines) + 2
    assert all(line[width - 1] == " " and line[width] != " " for line in lines)
    return {line[:width].strip(): line[width:] for line in lines}


def edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_shipped_model():
    found = entries(describe(shipped_model("photos16-v")))
    assert found["model"] == "photos16-v, none of the official variants"
    assert found["architecture"] == "12 layers, width 96, 6 heads, MLP 384, patch 2"
    assert found["input"] == "16 x 16 x 3, standardized pixels"
    assert found["tokens"] == "64"
    assert found["parameters"].startswith("2,071,320")
    assert found["prediction"] == "v and variance"
    assert found["dtype"] == "stored float32, computes in float32"
    assert found["on disk"].endswith(" MB")
    assert found["digest"] == "fe21bc007b2933168388fd50f8acfab978c4e873c2af226a23ceb4d3992b230f"
    assert found["classes"].startswith("10: 0 airplane, 1 automobile, ")
    assert found["classes"].endswith("7 horse, ...")
    assert found["training"] == "steps 4000, batch 64, learning rate 0.0015, seed 0"
    assert found["final loss"] == "mean square 0.4802 at step 4000"
    assert found["versions"].startswith("jax 0.")
    assert "licence" not in found


def test_converted_weights_tell_source_licence_and_latents(official):
    found = entries(describe(official))
    assert found["input"] == "4 x 4 x 4, latents of 32 x 32 pictures for the Stable Diffusion autoencoder"
    assert found["classes"].startswith("1000: 0 tench, 1 goldfish, ")
    assert found["converted"] == "DiT.pt (pt, ema)"
    assert found["its SHA-256"] == "ab" * 32
    assert "CC BY-NC 4.0" in found["licence"]
    assert found["dtype"] == "stored bfloat16, float32, computes in float32"
    assert "training" not in found


def test_official_variants_have_their_name(official, tmp_path):
    folder = shutil.copytree(official, tmp_path / "xl")
    edit(folder, config=variant("DiT-XL/2", input_size=64).to_dict(), source={**SOURCE, "sha256": {"a": "1", "b": "2"}})
    found = entries(describe(folder))
    assert found["model"] == "xl, DiT-XL/2"
    assert found["tokens"] == "1024"
    assert found["its SHA-256"] == "a 1, b 2"


def test_nothing_is_loaded_or_compiled(monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("arrays were read, or something was traced")

    monkeypatch.setattr(checkpoint, "read_arrays", refused)
    monkeypatch.setattr(checkpoint, "abstract_model", refused)
    compiled = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        assert cli.main(["info", "photos16-v"]) == 0
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert not [event for event in compiled if "compile" in event or "trace" in event]


def test_a_folder_whose_arrays_are_gone_is_still_described(official, tmp_path):
    folder = shutil.copytree(official, tmp_path / "bare")
    shutil.rmtree(folder / "params")
    assert entries(describe(folder))["dtype"] == "stored unreadably, computes in float32"
    with pytest.raises(CheckpointError, match="no saved arrays"):
        verify(folder)


@pytest.mark.parametrize(
    "change", [{"data": "photos"}, {"source": 3}, {"versions": None}, {"final_loss": {"mse": None}}]
)
def test_odd_entries_do_not_stop_the_description(official, tmp_path, change):
    folder = shutil.copytree(official, tmp_path / "odd")
    edit(folder, **change)
    assert entries(describe(folder))["tokens"] == "4"


def test_verify_accepts_what_was_written(official, capsys):
    assert cli.main(["info", str(official), "--verify"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "verified: the arrays have the digest of the manifest"


def test_verify_finds_other_arrays(official, tmp_path, capsys):
    folder = shutil.copytree(official, tmp_path / "other")
    shutil.rmtree(folder / "params")
    save_model(untrained_model(TINY, 1), tmp_path / "source", dtype="bfloat16")
    shutil.copytree(tmp_path / "source" / "params", folder / "params")
    assert cli.main(["info", str(folder), "--verify"]) == 2
    said = capsys.readouterr()
    assert "MISMATCH" in said.err
    assert "verified" not in said.out


def test_json_is_the_manifest_and_nothing_else(official, capsys):
    assert cli.main(["info", str(official), "--json", "--verify"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((official / "manifest.json").read_text())


def test_what_is_no_model_is_an_error(official, tmp_path, capsys):
    assert cli.main(["info", str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert cli.main(["info", "photos"]) == 2
    assert "photos16-v" in capsys.readouterr().err
    folder = shutil.copytree(official, tmp_path / "unusable")
    edit(folder, config={"depth": 0})
    with pytest.raises(CheckpointError, match="config is not usable"):
        describe(folder)


def test_a_folder_goes_before_a_shipped_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert model_folder("photos16-v") == shipped_model("photos16-v")
    (tmp_path / "photos16-v").mkdir()
    assert str(model_folder("photos16-v")) == "photos16-v"
