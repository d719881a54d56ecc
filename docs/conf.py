"""How the documentation is built: ``sphinx-build docs docs/_build``."""

import re

project = "syncgap"
author = "the syncgap authors"
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.mathjax", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

nb_execution_mode = "off"  # the notebooks store their outputs; docs/notebooks/execute.py makes them

myst_enable_extensions = ["amsmath", "dollarmath"]
myst_heading_anchors = 3
# $$...$$ with \tag{} inside is one display, not a labelled environment
myst_dmath_double_inline = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
add_module_names = False
napoleon_google_docstring = True
napoleon_numpy_docstring = False
default_role = "code"  # `name` in docstrings is code, as in Markdown

html_theme = "furo"
html_title = "syncgap"
html_extra_path = ["playground.html"]


def plain(app, what, name, obj, options, lines):
    """Docstrings are plain text with ``code`` in it: |K|, a * b and *args are no markup."""
    for i, line in enumerate(lines):
        parts = re.split(r"(``.*?``|`.*?`)", line)
        lines[i] = "".join(part if part.startswith("`") else re.sub(r"([|*])", r"\\\1", part) for part in parts)


def setup(app):
    app.connect("autodoc-process-docstring", plain, priority=100)  # before napoleon
