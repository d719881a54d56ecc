"""The way of imports: down only, no measurement imports a page, no circles."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FLOORS = ("frame", "studies", "tools", "sweeps", "cli")  # each may use those before it, and itself
PAGES = {"page", "figures", "family"}  # files of a study that draw and write, and what only they may be used by
SHOWING = {"page", "figures", "family", "study"}


def modules() -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(name: str) -> set[str]:
    """Modules of `experiments` that a module imports, wherever in its text."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name} imports relatively"
            found |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return {module for module in found if module in MODULES} - {"experiments"}


def floor(name: str) -> str:
    return name.split(".")[1] if "." in name else "cli"


def study(name: str) -> str | None:
    parts = name.split(".")
    return parts[2] if len(parts) > 2 and parts[1] == "studies" else None


def test_arrows_run_down_only():
    assert set(map(floor, MODULES)) == {*FLOORS, "__main__"}
    for name in MODULES:
        if floor(name) in FLOORS:
            above = FLOORS[FLOORS.index(floor(name)) + 1 :]
            wrong = {module for module in imports(name) if floor(module) in above}
            assert not wrong, f"{name} imports {wrong}"


def test_studies_know_nothing_of_each_other():
    for name in MODULES:
        if study(name) is not None:
            wrong = {module for module in imports(name) if study(module) not in (None, study(name))}
            assert not wrong, f"{name} imports {wrong}"


def test_measuring_and_analysis_do_not_import_pages():
    """Nor anything that draws, through whatever they import."""
    for name in MODULES:
        if study(name) is not None and name.split(".")[-1] not in SHOWING:
            reached, new = set(), {name}
            while new:
                reached |= new
                new = {module for each in new for module in imports(each)} - reached
            shown = {module for module in reached if study(module) and module.split(".")[-1] in PAGES}
            assert not shown | (reached & {"experiments.frame.page", "experiments.frame.drawing"}), name


def test_there_are_no_circles():
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]):
        assert name not in path, " -> ".join((*path, name))
        if name not in done:
            for module in sorted(imports(name)):
                visit(module, (*path, name))
            done.add(name)

    for name in MODULES:
        visit(name, ())


def test_a_circle_would_be_found(monkeypatch, tmp_path):
    for name, other in (("a", "b"), ("b", "a")):
        (tmp_path / f"{name}.py").write_text(f"from experiments.frame.{other} import x")
        monkeypatch.setitem(MODULES, f"experiments.frame.{name}", tmp_path / f"{name}.py")
    with pytest.raises(AssertionError, match=r"frame\.a -> experiments\.frame\.b -> experiments\.frame\.a"):
        test_there_are_no_circles()


@pytest.mark.parametrize(
    "name", sorted(path.name for path in (ROOT / "experiments" / "studies").iterdir() if path.is_dir())
)
def test_a_study_is_one_folder_and_one_name(name):
    from experiments import studies

    if name.startswith("__"):
        pytest.skip("no study")
    assert name in studies.NAMES
    found = studies.find(name)
    assert found.name == name
    assert found.config is studies.settings_of(name)


def test_files_are_short():
    for name, path in MODULES.items():
        assert len(path.read_text().splitlines()) <= 410, name


def test_the_command_line_imports_nothing_heavy_until_a_command_runs():
    """Help and errors of arguments answer at once."""
    script = """
import sys
from experiments import cli
for arguments in (["--help"], ["compare", "--help"], ["depth", "--pairs", "x"], ["convert", "x"], ["nothing"]):
    try:
        cli.main(arguments)
    except SystemExit:
        pass
print([name for name in ("jax", "flax", "numpy", "xarray", "matplotlib", "torch", "orbax") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert "synchronization gap" in done.stdout
