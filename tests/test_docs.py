"""Every Python block of the docs runs, in order, in one namespace per page."""

import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

from experiments.cli import main

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/inside.md", "docs/studies.md")


@pytest.mark.long
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # runs are written under it
    if "runs/compare" in (text := (ROOT / page).read_text()):  # which the first command of the README leaves
        small = ["--couplings", "0", "0.2", "--pairs", "2", "--gain-pairs", "2", "--untrained-pairs", "2"]
        assert main(["compare", *small, "--block", "2", "--steps", "8", "--quiet"]) == 0
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_the_table_of_activations_is_the_codes():
    from dit_jax.model import ACTIVATIONS

    table = re.findall(r"^\| (`.*?`) \| (\(.*?\)) \|", (ROOT / "docs/inside.md").read_text(), re.MULTILINE)
    documented = {name.strip("` "): shape for names, shape in table for name in names.split(",")}
    assert documented == {name: text[: text.index(")") + 1] for name, text in ACTIVATIONS.items()}


def extensions() -> list[str]:
    space = {}
    exec((ROOT / "docs" / "conf.py").read_text(), space)
    return space["extensions"]


@pytest.mark.long
def test_the_documentation_builds_without_a_warning(tmp_path):
    # without pages of source code and without every function in every sidebar, which take half of the time
    quick = ["-D", "toc_object_entries=0", "-D", f"extensions={','.join(set(extensions()) - {'sphinx.ext.viewcode'})}"]
    strict = ["-q", "-W", "--keep-going", "-b", "html"]
    build = [sys.executable, "-m", "sphinx", *strict, *quick, str(ROOT / "docs"), str(tmp_path)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theory, api = (tmp_path / "theory.html").read_text(), (tmp_path / "api/ou_theory.html").read_text()
    assert "\\tag{5.11}" in theory
    assert 'id="ou_theory.recursion.recursion_energy"' in api


def test_a_study_is_short():
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/studies.md").read_text(), re.MULTILINE | re.DOTALL)
    (example,) = [block for block in blocks if "Study(" in block]
    assert len(example.splitlines()) < 60


@pytest.mark.parametrize("package", ["ou_theory", "dit_jax"])
def test_every_module_is_documented(package):
    page = (ROOT / "docs" / "api" / f"{package}.md").read_text()
    for path in (ROOT / package).glob("*.py"):
        assert path.stem == "__init__" or f"automodule:: {package}.{path.stem}\n" in page, path.stem


def test_names_on_the_page_of_symbols_exist():
    rows = re.findall(r"^\| .* \| (`.*`) \|$", (ROOT / "docs" / "symbols.md").read_text(), re.MULTILINE)
    assert len(rows) > 25
    for name in re.findall(r"`([\w.]+)`", " ".join(rows)):
        path = name if name.startswith("experiments.") else f"ou_theory.{name}"
        pkgutil.resolve_name(path)  # raises where it does not exist
