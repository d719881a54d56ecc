"""What the command line says of settings that it refuses."""

import pytest

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
