"""The interactive page of the theory: one HTML file that needs neither a server nor a network.

``model.js`` is the theory in JavaScript, without a document; ``page.js`` draws it. uPlot 1.6.32 (uPlot.LICENSE) is
bundled as released.
"""

import re
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from experiments.frame.files import write_text

SOURCES = Path(__file__).parent


def _read(name: str) -> str:
    return (SOURCES / name).read_text(encoding="utf-8").rstrip("\n")


def inline_script(text: str) -> str:
    """JavaScript that neither ends a script element nor opens a comment in one.

    Outside of strings and regular expressions the escapes would mean something else: no source here has any there.
    """
    return re.sub(r"<(/script|!--|script)", r"\\x3C\1", text, flags=re.IGNORECASE)


def inline_style(text: str) -> str:
    """CSS as it is.

    Raises:
      ValueError: it would end the style element that it is put in.
    """
    if "</style" in text.lower():
        raise ValueError("a style sheet holds '</style', which would end its element; write it in another way")
    return text


def build() -> str:
    """The page as one string: template, style sheets and scripts, nothing fetched from anywhere."""
    licence = _read("uPlot.LICENSE").replace("*/", "* /")
    scripts = [f"/*\n{licence}\n*/\n{_read('uPlot.iife.min.js')}", _read("model.js"), _read("page.js")]
    environment = Environment(
        loader=FileSystemLoader(SOURCES), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    return environment.get_template("page.html").render(
        styles=[inline_style(_read(name)) for name in ("uPlot.min.css", "page.css")],
        scripts=[inline_script(text) for text in scripts],
    )


def write_playground(path: str | Path) -> Path:
    """Writes the page to `path`, an HTML file, and returns it.

    Raises:
      ValueError: there is a folder at `path`.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name the file to write, for example {path / 'playground.html'}")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_text(path, build())
