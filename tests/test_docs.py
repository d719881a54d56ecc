"""Every Python block of the docs runs, in order, in one namespace per page."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("README.md", "docs/inside.md")


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_python_blocks_run(page):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)
    assert blocks
    namespace = {}
    for block in blocks:
        exec(compile(block, page, "exec"), namespace)


def test_the_table_of_activations_is_the_codes():
    from dit_jax.model import ACTIVATIONS

    table = re.findall(r"^\| (`.*?`) \| (\(.*?\)) \|", (ROOT / "docs/inside.md").read_text(), re.MULTILINE)
    documented = {name.strip("` "): shape for names, shape in table for name in names.split(",")}
    assert documented == {name: text[: text.index(")") + 1] for name, text in ACTIVATIONS.items()}
