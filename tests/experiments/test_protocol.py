"""The preset of the paper's protocol: it sets what is known, gives way to options, and says what is not known."""

from dataclasses import replace

import pytest

from experiments import cli
from experiments.frame.bench import Bench
from experiments.frame.manifest import comparable
from experiments.studies.compare.settings import CompareConfig
from experiments.studies.release.settings import ReleaseConfig


@pytest.mark.parametrize("config", [CompareConfig, ReleaseConfig])
def test_the_protocol_of_the_paper_is_its_steps_unless_they_are_given(config):
    assert (config().steps, config().unknown) == ("50", ())
    paper = config(protocol="paper")
    assert paper.steps == "250"
    assert "grid of couplings" in " ".join(paper.unknown)
    assert config(protocol="paper", steps="50").steps == "50"
    assert replace(paper, pairs=3) == config(protocol="paper", pairs=3)
    with pytest.raises(ValueError, match="protocol 'papers' is not one of own, paper"):
        config(protocol="papers")


def test_the_command_line_takes_the_protocol_and_lets_options_win():
    commands = {name: cli._command(name) for name in ("compare", "release")}
    settings = cli._parsed(commands, ["compare", "--protocol", "paper"]).settings
    assert (settings.protocol, settings.steps) == ("paper", "250")
    assert cli._parsed(commands, ["release", "--steps", "50", "--protocol", "paper"]).settings.steps == "50"


def test_a_run_stores_what_is_not_known_of_the_protocol(weights, tmp_path):
    settings = {"weights": weights, "pairs": 2, "block": 2, "steps": "10"}
    for protocol in ("own", "paper"):
        bench = Bench("compare", CompareConfig(**settings, protocol=protocol), tmp_path / protocol)
        assert bench.manifest["settings"]["protocol"] == protocol
        assert ("unknown_of_protocol" in bench.manifest) == (protocol == "paper")
    assert "the grid of couplings" in bench.manifest["unknown_of_protocol"]


def test_older_runs_ran_by_no_protocol():
    entries = {"settings": {"steps": "50"}}
    assert comparable(entries) == comparable({"settings": {"steps": "50", "protocol": "own"}})
