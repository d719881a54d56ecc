"""The file of the interactive page: what the sources build, whole in itself, written safely. It needs no browser."""

import os
import re
from html.parser import HTMLParser

import pytest
from playground_browser import PREBUILT

from experiments.tools import playground

pytestmark = pytest.mark.slow


def test_the_shipped_copy_is_what_the_sources_build():
    assert PREBUILT.read_text(encoding="utf-8") == playground.build(), (
        "docs/playground.html is not up to date: "
        "python -c \"from experiments.tools.playground import write_playground as w; w('docs/playground.html')\""
    )
    assert PREBUILT.stat().st_size < 200_000  # a page that loads at once: no library, font or picture is packed into it


class Reader(HTMLParser):
    """Elements with their attributes, and the text of scripts, as a browser splits them."""

    def __init__(self):
        super().__init__()
        self.elements, self.scripts, self.element = [], [], ""

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self.element = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.element = ""

    def handle_data(self, data):
        if self.element == "script":
            self.scripts[-1] += data


def test_everything_is_inside_and_nothing_ends_a_script_early():
    reader = Reader()
    reader.feed(playground.build())
    assert not [tag for tag, attrs in reader.elements if {"src", "href", "srcset", "data"} & attrs.keys()]
    assert not {"link", "iframe", "object", "base", "img"} & {tag for tag, _ in reader.elements}
    library, model, page = (text.strip() for text in reader.scripts)
    assert library.endswith((playground.SOURCES / "uPlot.iife.min.js").read_text().strip())
    assert "MIT License" in library
    assert "uPlot (v1.6.32)" in library
    assert model == (playground.SOURCES / "model.js").read_text().strip()
    assert page == (playground.SOURCES / "page.js").read_text().strip()
    styles = [(playground.SOURCES / name).read_text() for name in ("page.css", "uPlot.min.css")]
    assert not [style for style in styles if "url(" in style or "@import" in style]


def test_what_would_end_an_element_is_escaped_or_refused():
    text = playground.inline_script("a = '</script>'; b = '</SCRIPT >'; c = '<!--<script'; d = 1 < 2")
    assert not re.search(r"</script|<!--|<script", text, re.IGNORECASE)
    assert text == r"a = '\x3C/script>'; b = '\x3C/SCRIPT >'; c = '\x3C!--\x3Cscript'; d = 1 < 2"
    with pytest.raises(ValueError, match="</style"):
        playground.inline_style("a { content: '</STYLE>' }")


def test_the_page_is_written_aside_and_renamed(tmp_path, monkeypatch):
    path = playground.write_playground(tmp_path / "new" / "page.html")
    assert path.read_text(encoding="utf-8") == playground.build()
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]
    with pytest.raises(ValueError, match="folder"):
        playground.write_playground(tmp_path)
    path.write_text("before")
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk")))
    with pytest.raises(OSError, match="disk"):
        playground.write_playground(path)
    assert path.read_text() == "before"
    assert [entry.name for entry in path.parent.iterdir()] == ["page.html"]
