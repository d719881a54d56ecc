"""The notebooks run, say what they store, and their checks can fail."""

import ast
import importlib.util
import json
import re
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parents[1] / "docs" / "notebooks"


def _load(path):
    spec = importlib.util.spec_from_file_location("execute_notebooks", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


execute = _load(FOLDER / "execute.py")
each_notebook = pytest.mark.parametrize("path", execute.PATHS, ids=lambda path: path.stem)

# --- execution: outputs are those stored, and every check refuses wrong answers; both in one run

PROBE = '''
def _probe(name, source):
    """Runs a check with answers that are a little too large and a little too small."""

    def wrong(value, scale, shift):
        if callable(value):
            return lambda *args, **kwargs: wrong(value(*args, **kwargs), scale, shift)
        return scale * value + shift

    for scale, shift in ((1.05, 0.03), (0.95, -0.03)):
        try:
            exec(source, globals() | {name: wrong(globals()[name], scale, shift)})
        except AssertionError:
            continue
        raise RuntimeError(f"the check accepts {scale} times the answer {name} {shift:+}")
'''


RESET = """
%reset -f
import jax
jax.config.update("jax_enable_x64", False)
import matplotlib
matplotlib.rcdefaults()
%matplotlib inline
"""


def probed(notebook):
    """The notebook's cells, with one in front that makes the kernel as new and one behind each check that probes it;
    and the places of its own cells."""
    cells, own, name = [nbformat.v4.new_code_cell(source) for source in (RESET, PROBE)], [], None
    for cell in notebook.cells:
        cell.id = nbformat.v4.new_code_cell().id  # those of another notebook may be the same
        own.append(len(cells))
        cells.append(cell)
        name = cell.metadata.get("answer", name)
        if "check" in cell.metadata.get("tags", []):
            cells.append(nbformat.v4.new_code_cell(f"_probe({name!r}, {cell.source!r})"))
    return cells, own


@pytest.fixture(scope="module")
def executed():
    """The own cells of each notebook after all of them have run in one kernel, one after the other, none with names or
    settings of those before it: starting a kernel takes longer than what most of them compute."""
    cells, places = [], {}
    for path in execute.PATHS:
        more, own = probed(nbformat.read(path, 4))
        places[path] = [len(cells) + place for place in own]
        cells += more
    done = execute.run(nbformat.v4.new_notebook(cells=cells)).cells
    return {path: [done[place] for place in own] for path, own in places.items()}


NUMBER = re.compile(r"[-+]?\d+(?:\.(\d+))?")


def assert_same_text(got, stored):
    """Equal but for numbers, which may differ by one unit in their last digit: rounding is the machine's."""
    assert NUMBER.sub("#", got) == NUMBER.sub("#", stored)
    for a, b in zip(NUMBER.finditer(got), NUMBER.finditer(stored), strict=True):
        unit = 10.0 ** -len(b[1]) if b[1] else 0
        assert len(a[1] or "") == len(b[1] or ""), (a[0], b[0])
        assert abs(float(a[0]) - float(b[0])) <= 1.01 * unit, (a[0], b[0])


def outputs(cell):
    """What is compared: texts, and that there is a picture where one is stored."""
    found = []
    for output in cell.get("outputs", []):
        data = output.get("data", {})
        found.append(output.text if output.output_type == "stream" else data.get("text/plain", sorted(data)))
    return found


@pytest.mark.long
@each_notebook
def test_runs_and_says_what_is_stored_and_its_checks_can_fail(executed, path):
    stored = nbformat.read(path, 4)
    for cell, done in zip(stored.cells, executed[path], strict=True):
        got, expected = outputs(done), outputs(cell)
        assert len(got) == len(expected), cell.source
        for a, b in zip(got, expected, strict=True):
            if isinstance(b, str):
                assert_same_text(a, b)
            else:
                assert a == b


def test_a_check_that_cannot_fail_is_found():
    """Also one that fails on one side only."""
    space = {"answer": 2.0, "same": lambda x: x}
    exec(PROBE, space)
    space["_probe"]("answer", "assert abs(answer - 2) < 0.01")
    space["_probe"]("same", "assert same(3.0) == 3")
    for source in ("assert answer", "assert answer < 2.1", "assert answer > 1.9"):
        with pytest.raises(RuntimeError, match="accepts"):
            space["_probe"]("answer", source)


def test_texts_are_compared_by_their_digits():
    assert_same_text("gap 1.361 +- 0.02 (s.e.)", "gap 1.362 +- 0.02 (s.e.)")
    for text in ("gap 1.363", "gap 1.3610", "lag 1.361", "gap -1.361", "gap 1.361 1"):
        with pytest.raises(AssertionError):
            assert_same_text(text, "gap 1.361")


# --- what is stored


def names_defined(source):
    """Functions and variables of the top level."""
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign):
            found |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


@each_notebook
def test_exercises_have_a_task_an_answer_and_a_check(path):
    cells = nbformat.read(path, 4).cells
    number = path.stem[0]
    tasks = [i for i, cell in enumerate(cells) if re.match(r"#+ Exercise", cell.source)]
    assert 3 <= len(tasks) <= 5
    assert len(tasks) == sum("answer" in c.metadata or "check" in c.metadata.get("tags", []) for c in cells) / 2
    for count, i in enumerate(tasks, 1):
        task, answer, check = cells[i : i + 3]
        name = answer.metadata["answer"]
        assert task.source.startswith(f"### Exercise {number}.{count}: ")
        assert f"`{name}" in task.source
        assert answer.metadata["tags"] == ["answer", "hide-input"]
        assert name in names_defined(answer.source)
        assert check.metadata["tags"] == ["check"]
        used = {node.id for node in ast.walk(ast.parse(check.source)) if isinstance(node, ast.Name)}
        assert name in used
        assert "assert" in check.source


@each_notebook
def test_stored_outputs_are_small_and_nobodys(path):
    """They are there, without errors, warnings, times or paths of a machine."""
    assert path.stat().st_size < 150_000
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    assert notebook.metadata == execute.METADATA
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert {output.output_type for output in outputs} <= {"stream", "display_data"}
    assert all(output.name == "stdout" for output in outputs if output.output_type == "stream")
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert 3 <= len(pictures) <= 5
    for cell in notebook.cells:
        assert set(cell.metadata) <= {"tags", "answer"}
        assert cell.get("execution_count") is None
    for picture in pictures:
        picture.data.clear()
    text = json.dumps(notebook)
    assert not re.search(r"/(home|root|tmp|work|usr|Users|opt|var)/|site-packages|[A-Z]:\\\\", text)


@each_notebook
def test_every_picture_is_explained(path):
    """By the text behind it."""
    cells = nbformat.read(path, 4).cells
    for cell, after in zip(cells, [*cells[1:], None], strict=True):
        if any("image/png" in output.get("data", {}) for output in cell.get("outputs", [])):
            assert after is not None
            assert after.cell_type == "markdown"
            assert not after.source.startswith("#")


def test_all_notebooks_are_listed():
    index = (FOLDER / "index.md").read_text()
    assert len(execute.PATHS) == 6
    for path in execute.PATHS:
        assert f"({path.name})" in index
        assert f"\n{path.stem}\n" in index
