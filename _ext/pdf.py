"""One PDF of the whole book: the built pages, one after the other, printed by a browser.

python _ext/pdf.py _build/html
"""

from __future__ import annotations

import posixpath
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from bs4 import BeautifulSoup, Tag
from ebook import find_node, keep_first_pictures
from pypdf import PdfWriter
from pypdf.generic import DictionaryObject, NameObject, TextStringObject

ROOT = Path(__file__).parent.parent
#: What is of use on a screen only.
LEFT_OUT = ".headerlink, .colab, .downloads, script, button, input[type=button]"
#: Signs and plain names in code: every coloured word costs a hundred bytes.
UNCOLOURED = "pre span.n, pre span.p, pre span.o, pre span.w"
PAPER = """
@page { size: A4; }
html { font-size: 15px; }
main { max-width: none; }
.bd-main .bd-content { margin: 0 !important; }
.bd-main .bd-content .bd-article-container { max-width: none; }
.bd-main .bd-content .bd-article-container .bd-article { break-before: page; padding: 0; }
.bd-main .bd-content .bd-article h1 { display: block !important; } /* which the theme hides */
pre, code { white-space: pre-wrap !important; overflow-wrap: anywhere; }
figure, img, tr, summary { break-inside: avoid; }
summary { break-after: avoid; }
.title { font-size: 2.5em; }
.contents li { list-style: none; margin: 0.4em 0; }
"""


def documents() -> list[str]:
    """The book's pages in their order."""

    def below(entry: dict[str, Any]) -> Iterator[str]:
        if "file" in entry:
            yield entry["file"]
        for inner in (
            *entry.get("parts", ()),
            *entry.get("chapters", ()),
            *entry.get("sections", ()),
        ):
            yield from below(inner)

    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    return [toc["root"], *below(toc)]


def name(document: str) -> str:
    return document.replace("/", "-")


def article(html: Path, document: str, known: dict[str, str]) -> Tag:
    """A page's text, with names that are its own and links that stay in the book."""
    page = BeautifulSoup((html / f"{document}.html").read_text("utf-8"), "html.parser")
    found = page.select_one("article.bd-article")
    assert isinstance(found, Tag), document
    keep_first_pictures(found)
    for unwanted in found.select(LEFT_OUT):
        unwanted.decompose()
    for summary in found.select("details.hide > summary"):  # of a cell; all cells are open here
        if "Show the solution" in summary.text:
            summary.string = "Solution"
        else:
            summary.decompose()
    for word in found.select(UNCOLOURED):
        word.unwrap()
    found.smooth()
    folder = posixpath.dirname(document)
    for element in found.find_all(True):
        for attribute in ("id", "for", "aria-labelledby", "aria-describedby"):
            if attribute in element.attrs:
                element[attribute] = f"{name(document)}--{element[attribute]}"
        if element.name == "details":
            element["open"] = ""
        if element.name == "img" and not element["src"].startswith("data:"):
            element["src"] = posixpath.normpath(posixpath.join(folder, element["src"]))
        if element.name == "a" and "href" in element.attrs:
            parts = urlsplit(element["href"])
            if parts.scheme:
                continue
            path = posixpath.normpath(posixpath.join(folder, unquote(parts.path)))
            target = known.get(path) if parts.path else name(document)
            if target is None:
                element.unwrap()
            else:
                element["href"] = f"#{target}" + (f"--{parts.fragment}" if parts.fragment else "")
    found["id"] = name(document)
    return found


def whole_book(html: Path) -> str:
    """One page that holds the title, the contents and every page of the book."""
    config = yaml.safe_load((ROOT / "_config.yml").read_text("utf-8"))
    known = {f"{document}.html": name(document) for document in documents()}
    articles = [article(html, document, known) for document in documents()]
    # A page with formulas, one folder down: a page without any loads no MathJax.
    chapter = next(document for document in documents() if document.startswith("notebooks/"))
    book = BeautifulSoup((html / f"{chapter}.html").read_text("utf-8"), "html.parser")
    styles = [link["href"] for link in book.select("link[rel=stylesheet]")]
    scripts = [s for s in book.select("script") if "MathJax" in s.text]
    mathjax = [s for s in book.select("script[src*=mathjax]")]
    contents = "".join(
        f'<li><a href="#{part["id"]}">{part.select_one("h1").get_text()}</a></li>'  # type: ignore[union-attr]
        for part in articles
    )
    link = '<link rel="stylesheet" href="{}">'
    return "\n".join(
        [
            '<!doctype html><html lang="en" data-theme="light"><meta charset="utf-8">',
            f"<title>{config['title']}</title>",
            *(link.format(posixpath.normpath(posixpath.join("notebooks", s))) for s in styles),
            f"<style>{PAPER}</style>",
            *map(str, scripts),
            *(str(s).replace('src="../', 'src="') for s in mathjax),
            '<main class="bd-main"><div class="bd-content"><div class="bd-article-container">',
            f'<p class="title">{config["title"]}</p><p>{config["html"]["extra_footer"]}</p>',
            f'<ul class="contents">{contents}</ul>',
            *map(str, articles),
            "</div></div></main></html>",
        ]
    )


def name_bookmarks(path: Path, titles: list[str]) -> None:
    """Give each bookmark its heading's text, which Chromium doubles near the end of a page."""
    writer = PdfWriter(clone_from=path)
    rest = iter(titles)

    def rename(parent: DictionaryObject) -> None:
        mark = parent.get("/First")
        while mark is not None:
            bookmark = mark.get_object()
            bookmark[NameObject("/Title")] = TextStringObject(next(rest))
            rename(bookmark)
            mark = bookmark.get("/Next")

    rename(writer.root_object["/Outlines"])
    assert next(rest, None) is None, "each heading has its bookmark"
    writer.write(path)


def main() -> None:
    html = Path(sys.argv[1]).resolve()
    source = html / "whole_book.html"
    book = whole_book(html)
    source.write_text(book, encoding="utf-8")
    headings = BeautifulSoup(book, "html.parser").find_all(["h1", "h2", "h3", "h4", "h5", "h6"])
    try:
        script = Path(__file__).parent / "print.mjs"
        target = html / "simplenet-piece-by-piece.pdf"
        subprocess.run([find_node(), str(script), str(source), str(target)], check=True)
        name_bookmarks(target, [" ".join(heading.get_text().split()) for heading in headings])
    finally:
        source.unlink()


if __name__ == "__main__":
    main()
