"""What the command line says of settings that it refuses."""

import numpy as np
import pytest
from PIL import Image

from experiments import cli


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--pairs", "1"], "the settings: pairs must be at least 2"),
        (["--couplings", "0.5", "1"], "the settings: couplings must hold 0"),
        (["--pairs", "x"], "parsing --pairs"),
    ],
)
def test_an_error_names_the_setting_and_nothing_of_the_parser(flags, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["compare", *flags])
    assert ended.value.code == 2
    text = capsys.readouterr().err
    assert said in text
    assert "tyro" not in text
    assert len({len(line) for line in text.splitlines()}) == 1  # the box keeps its shape


def test_training_says_what_it_reads_in_the_order_of_the_labels(tmp_path, monkeypatch, capsys):
    for name, level in (("1", 10), ("10", 20), ("2", 30)):
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), level, np.uint8)).save(tmp_path / "set" / name / "a.png")
    (tmp_path / "set" / ".ipynb_checkpoints").mkdir()
    (tmp_path / "labels.txt").write_text("10\n1\n")
    trained_on = []

    def no_training(data, *_, **__):
        trained_on.append(data.class_names)
        raise ValueError("far enough")

    monkeypatch.setattr("dit_jax.training.train", no_training)
    command = ["train", str(tmp_path / "set"), str(tmp_path / "run"), "--size", "8", "--quiet"]
    assert cli.main(command) == 2
    said = capsys.readouterr()
    assert "3 images in 3 classes, by label\n  0: 1 (1), 1: 2 (1), 2: 10 (1)\n" in said.out
    assert ".ipynb_checkpoints" in said.out
    assert "far enough" in said.err
    assert cli.main([*command, "--labels", str(tmp_path / "labels.txt")]) == 2
    assert "0: 10 (1), 1: 1 (1)" in capsys.readouterr().out
    assert trained_on == [("1", "2", "10"), ("10", "1")]
    assert cli.main(["train", "solvable", str(tmp_path / "run"), "--size", "8", "--labels", "labels.txt"]) == 2
    assert "--labels applies to folders" in capsys.readouterr().err
