"""Every public name of ou_theory has a use: other modules call it, or docs/theory.md names it at its formula."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MODULES = {path.stem: ast.parse(path.read_text()) for path in (ROOT / "ou_theory").glob("*.py")}
CITED = set(re.findall(r"`(?:\w+\.)*(\w+)`", (ROOT / "docs" / "theory.md").read_text()))


def names_in(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            found.add(node.id if isinstance(node, ast.Name) else node.attr)
        elif isinstance(node, ast.alias):
            found.add(node.name)
    return found


def public(tree: ast.Module) -> list[str]:
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


@cache
def names_of(path: Path) -> set[str]:
    return names_in(ast.parse(path.read_text()))


def elsewhere(module: str) -> set[str]:
    """Names that code outside a module uses, tests and the flat names of the package apart."""
    files = [path for path in (ROOT / "ou_theory").glob("*.py") if path.stem not in (module, "__init__")]
    for package in ("dit_jax", "experiments", "benchmarks"):
        files += (ROOT / package).rglob("*.py")
    return set().union(*map(names_of, files))


@pytest.mark.parametrize("module", sorted(MODULES))
def test_every_function_is_called_or_cited(module):
    used = CITED | elsewhere(module)
    assert not [name for name in public(MODULES[module]) if name not in used]


def test_the_check_finds():
    tree = ast.parse("def nobody_calls_this(): ...\ndef _private(): ...\ndef rho(): ...")
    assert [name for name in public(tree) if name not in CITED] == ["nobody_calls_this"]
