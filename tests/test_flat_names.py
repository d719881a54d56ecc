"""What `import dit_jax` and `import ou_theory` give, and what they do not load for it."""

import ast
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("dit_jax", "ou_theory")
packages = pytest.mark.parametrize("package", PACKAGES)

LOADED = """
import json, sys, {package}
before = sorted(sys.modules)
named = {{name: repr(getattr({package}, name)) for name in {package}.__all__}}
print(json.dumps([before, named, sorted(sys.modules)]))
"""


@pytest.fixture(scope="module", params=PACKAGES)
def fresh(request):
    """Package, modules after its import, its names in a fresh process, and modules after all of them were used."""
    script = LOADED.format(package=request.param)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return request.param, *json.loads(done.stdout)


def test_an_import_loads_no_library(fresh):
    _, before, _, after = fresh
    heavy = {"jax", "flax", "numpy", "scipy", "torch", "optax", "matplotlib", "orbax"}
    assert not heavy & set(before)
    assert "jax" in after  # the list names modules as they are called


def test_no_name_needs_torch_or_training(fresh):
    package, _, named, after = fresh
    assert set(importlib.import_module(package).__all__) == set(named)
    assert not {"torch", "matplotlib", "dit_jax.training"} & set(after)


def test_describing_the_conversion_loads_no_library_of_arrays():
    """The command line imports this to print its help."""
    script = "import sys, dit_jax.conversion; print('jax' in sys.modules, 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@packages
def test_type_checkers_see_the_same_names(package):
    module = importlib.import_module(package)
    assert module.__file__ is not None
    seen = {}
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] in PACKAGES:
            seen |= {name.name: node.module for name in node.names}
    assert sorted([*seen, "__version__"]) == sorted(module.__all__)
    for name, home in seen.items():
        assert getattr(module, name) is getattr(importlib.import_module(home), name)


@packages
def test_names_that_are_not_there(package):
    module = importlib.import_module(package)
    assert set(module.__all__) <= set(dir(module))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        module.nothing  # noqa: B018


@packages
def test_the_version_is_the_distributions(package):
    version = importlib.import_module("importlib.metadata").version("syncgap")
    assert importlib.import_module(package).__version__ == version
