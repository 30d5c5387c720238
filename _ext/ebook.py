"""Sphinx extension: the EPUB in strict XHTML, with formulas in MathML, so that epubcheck passes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from bs4 import BeautifulSoup, Tag
from sphinx.application import Sphinx
from sphinx.builders.epub3 import Epub3Builder
from sphinx.errors import ExtensionError

FORMULA = re.compile(r"\s*(?:\\\((?P<inline>.*)\\\)|\\\[(?P<display>.*)\\\])\s*", re.DOTALL)
STYLES = ("epub.css", "pygments.css", "book.css")


def find_node() -> str:
    """node, which comes with the environment; that need not be on the PATH."""
    node = shutil.which("node", path=str(Path(sys.executable).parent)) or shutil.which("node")
    if node is None:
        raise ExtensionError("node is missing: `make setup` installs it.")
    return node


def keep_first_pictures(soup: Tag) -> None:
    """Of matplotlib's players, which need a script, keep the first picture."""
    for player in soup.select(".animation"):
        script = player.find_next("script", string=re.compile(r"frames\[0\]"))
        picture = player.find("img")
        assert isinstance(script, Tag) and isinstance(picture, Tag)
        first = re.search(r'frames\[0\] = "([^"]+)"', script.text)
        assert first is not None
        still = BeautifulSoup("", "html.parser").new_tag("img")
        still.attrs = {"src": re.sub(r"\\\s", "", first[1]), "alt": picture["alt"]}
        player.replace_with(still)


class MathML:
    """MathJax in a process of its own, which turns one TeX formula after the other into MathML."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [find_node(), str(Path(__file__).parent / "formulas.mjs")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            encoding="utf-8",
        )

    def __call__(self, tex: str, *, display: bool) -> str:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps([tex, display]) + "\n")
        self.process.stdin.flush()
        mathml = self.process.stdout.readline()
        if not mathml or "<merror" in mathml:
            raise ExtensionError(f"MathJax does not understand {tex!r}.")
        return str(json.loads(mathml))

    def close(self) -> None:
        self.process.communicate()


class EBook(Epub3Builder):
    """Sphinx's builder, whose pages and list of files are mended."""

    def init(self) -> None:
        super().init()
        self.mathml = MathML()

    def finish(self) -> None:
        super().finish()
        self.mathml.close()

    def handle_page(
        self,
        pagename: str,
        addctx: dict[str, Any],
        templatename: str = "page.html",
        outfilename: str | None = None,
        event_arg: Any = None,
    ) -> None:
        addctx["body"] = self.mended(addctx.get("body", ""))
        super().handle_page(pagename, addctx, templatename, outfilename, event_arg)

    def mended(self, body: str) -> str:
        soup = BeautifulSoup(body, "html.parser")
        for element in soup.select(".math"):
            for text in element.find_all(string=FORMULA, recursive=False):
                found = FORMULA.fullmatch(text)
                assert found is not None
                display = found["display"] is not None
                tex = found["display"] if display else found["inline"]
                text.replace_with(BeautifulSoup(self.mathml(tex, display=display), "html.parser"))
        keep_first_pictures(soup)
        for script in soup.select("script, style, link"):
            script.decompose()
        for summary in soup.select("summary"):  # holds two texts, one for each state, as paragraphs
            for paragraph in summary.select("p.expanded"):
                paragraph.decompose()
            for paragraph in summary.select("p"):
                paragraph.name = "span"
        for entry in soup.select("[role=doc-biblioentry]"):  # which EPUB has given up
            del entry["role"]
        return str(soup)

    def build_content(self) -> None:
        """Declare which pages hold formulas."""
        super().build_content()
        path = Path(self.outdir) / "content.opf"
        path.write_text(
            re.sub(r'href="(\S+\.xhtml)" media-type="\S+"', self.declared, path.read_text("utf-8")),
            encoding="utf-8",
        )

    def declared(self, item: re.Match[str]) -> str:
        page = Path(self.outdir) / item[1]
        has_formulas = page.is_file() and "<math" in page.read_text("utf-8")
        return item[0] + (' properties="mathml"' if has_formulas else "")


def keep_styles(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Of the extensions' styles and scripts keep what an EPUB has a use for."""
    if app.builder.name == "epub":
        context["script_files"] = []
        context["css_files"] = [
            file for file in context["css_files"] if Path(str(file.filename)).name in STYLES
        ]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_builder(EBook, override=True)
    app.connect("html-page-context", keep_styles, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": False}
