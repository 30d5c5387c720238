"""Sphinx extension: every notebook also in plain Markdown, for Colab and Jupyter.

Outside the book a notebook would show MyST's roles and directives as text. ``plain/NAME.ipynb``
beside the pages has links, headings, quotes and folded blocks instead; its code is the same.
A page links to this form: to download it, and in Colab once the repository has an address.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from docutils import nodes
from offline import address_is_set
from sphinx.application import Sphinx
from sphinx.util import logging

logger = logging.getLogger(__name__)

#: The branch that holds the built book, see the README.
BRANCH = "gh-pages"
OPENING = re.compile(r"(:{3,}|`{3,})\{([\w-]+)\} *(.*)")
OPTION = re.compile(r":([\w-]+): *(.*)")
INLINE = re.compile(
    r"\{(?P<role>[\w:]+)\}`(?P<of>[^`]+)`"
    r"|(?P<code>(?P<tick>`+)(?!`).+?(?<!`)(?P=tick)(?!`))"
    r"|\$\$(?P<formula>.+?)\$\$ *\((?P<name>[\w-]+)\)"
    r"|\]\((?P<link>[^)\s]+)\)"
    r"|^\((?P<target>[\w-]+)\)=$",
    re.DOTALL | re.MULTILINE,
)


def book_address(app: Sphinx) -> str:
    """Where the book is published, as seen from ``plain/``: GitHub Pages unless set otherwise."""
    if not address_is_set(app.config):
        return "../"
    owner, name = urlsplit(app.config.html_theme_options["repository_url"]).path.split("/")[1:3]
    return str(app.config.html_baseurl or f"https://{owner}.github.io/{name}/")


class Plain:
    """The plain form of one notebook of the book."""

    def __init__(self, app: Sphinx, docname: str) -> None:
        self.app, self.env, self.docname = app, app.env, docname
        self.address = book_address(app)

    def notebook(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(self.env.doc2path(self.docname)).read_text("utf-8"))
        found["cells"] = [plain for cell in found["cells"] for plain in self.cell(cell)]
        return found

    def cell(self, cell: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if cell["cell_type"] == "markdown":
            text = self.markdown("".join(cell["source"]).split("\n"))
            yield {**cell, "source": text.splitlines(keepends=True)}
            return
        yield cell
        figure = cell["metadata"].get("mystnb", {}).get("figure")
        if figure and figure["name"] in self.env.get_domain("std").anonlabels:
            caption = f"*{self.number('figure', figure['name'])}:* {self.inline(figure['caption'])}"
            yield {
                "cell_type": "markdown",
                "id": f"{cell['id']}-caption",
                "metadata": {},
                "source": caption.splitlines(keepends=True),
            }

    # --- blocks ------------------------------------------------------------------------------

    def markdown(self, lines: list[str]) -> str:
        """Plain Markdown of these lines, directives and all."""
        parts: list[str] = []
        text: list[str] = []

        def close_text() -> None:
            if text:
                parts.append(self.inline("\n".join(text)))
                text.clear()

        while lines:
            line = lines[0]
            directive = OPENING.fullmatch(line)
            fence = re.match(r":{3,}|`{3,}", line)
            if fence is None:
                text.append(line)
                lines = lines[1:]
                continue
            close_text()
            end = next(i for i, other in enumerate(lines) if i and other.strip() == fence[0])
            if directive is None:
                parts.append("\n".join(lines[: end + 1]))
            else:
                parts.append(self.directive(directive[2], directive[3], lines[1:end]))
            lines = lines[end + 1 :]
        close_text()
        return "\n".join(parts)

    def directive(self, name: str, argument: str, lines: list[str]) -> str:
        options: dict[str, str] = {}
        while lines and (option := OPTION.fullmatch(lines[0])):
            options[option[1]] = option[2]
            lines = lines[1:]
        if name in ("figure", "image"):
            picture = f"![{options.get('alt', '')}]({self.link(argument)})"
            if name == "image":
                return picture
            number = self.number("figure", options["name"])
            return f"{picture}\n\n*{number}:* {self.markdown(lines).strip()}"
        body = self.markdown(lines).strip()
        if name == "exercise":
            return f"### {self.number('exercise', options['label'])}, {argument}\n\n{body}"
        if name in ("admonition", "note", "tip", "hint", "important", "warning", "seealso"):
            title = self.inline(argument) if argument else name.capitalize()
            quote = f"**{title}**\n\n{body}"
            return "\n".join(f"> {line}".rstrip() for line in quote.split("\n"))
        if name == "dropdown":
            title = html.escape(argument)
            return f"<details>\n<summary>{title}</summary>\n\n{body}\n\n</details>"
        logger.warning("no plain form for the directive {%s}", name, location=self.docname)
        return body

    # --- within a line -----------------------------------------------------------------------

    def inline(self, text: str) -> str:
        return INLINE.sub(self.replacement, text)

    def replacement(self, found: re.Match[str]) -> str:
        if found["role"]:
            return self.role(found["role"], " ".join(found["of"].split()))
        if found["formula"]:
            formula = found["formula"].strip()
            if r"\\" in formula and r"\begin" not in formula:
                formula = rf"\begin{{split}}{formula}\end{{split}}"
            return f"$$\n{formula} \\tag{{{self.equation(found['name'])}}}\n$$"
        if found["link"]:
            return f"]({self.link(found['link'])})"
        return "" if found["target"] else found[0]

    def role(self, role: str, of: str) -> str:
        explicit = re.fullmatch(r"(.*?) *<([^<>]+)>", of)
        text, target = (explicit[1], explicit[2]) if explicit else (of, of)
        if role in ("cite:p", "cite:t"):
            cited = [self.citation(key.strip(), role) for key in of.split(",")]
            return f"({'; '.join(cited)})" if role == "cite:p" else ", ".join(cited)
        if role == "eq":
            docname, _ = self.env.get_domain("math").equations[target]
            page = "" if docname == self.docname else self.page(docname)
            label = f"({self.equation(target)})"
            return f"[{label}]({page}#equation-{nodes.make_id(target)})" if page else label
        std = self.env.get_domain("std")
        if role == "numref":
            docname, anchor, _ = std.labels[target]
            number = self.number("figure", target)
            if explicit:
                digits = number.split()[-1]
                number = text.replace("%s", digits).replace("{number}", digits)
            return f"[{number}]({self.page(docname)}#{anchor})"
        if role == "ref":
            docname, anchor = std.anonlabels[target]
            if not explicit and anchor in self.env.toc_fignumbers[docname].get("exercise", {}):
                text = self.number("exercise", target)
            elif not explicit:
                text = std.labels[target][2]
            return f"[{text}]({self.page(docname)}#{anchor})"
        if role == "term":
            terms = {n.lower(): place for (kind, n), place in std.objects.items() if kind == "term"}
            docname, anchor = terms[target.lower()]
            return f"[{text}]({self.page(docname)}#{anchor})"
        logger.warning("no plain form for the role {%s}", role, location=self.docname)
        return of

    def citation(self, key: str, role: str) -> str:
        (cited,) = (c for c in self.env.get_domain("cite").citations if c.key == key)
        names = [" ".join(p.prelast_names + p.last_names) for p in cited.entry.persons["author"]]
        who = names[0] if len(names) == 1 else " and ".join(names)
        if len(names) > 2:
            who = f"{names[0]} et al."
        who = re.sub(r"[{}]", "", who)
        year = cited.entry.fields["year"]
        label = f"{who}, {year}" if role == "cite:p" else f"{who} ({year})"
        return f"[{label}]({self.page(cited.bibliography_key.docname)}#{cited.citation_id})"

    # --- numbers and addresses ---------------------------------------------------------------

    def number(self, kind: str, label: str) -> str:
        docname, anchor = self.env.get_domain("std").anonlabels[label]
        digits = ".".join(map(str, self.env.toc_fignumbers[docname][kind][anchor]))
        return f"{'Fig.' if kind == 'figure' else 'Exercise'} {digits}"

    def equation(self, label: str) -> str:
        docname, _ = self.env.get_domain("math").equations[label]
        anchor = f"equation-{nodes.make_id(label)}"
        return ".".join(map(str, self.env.toc_fignumbers[docname]["displaymath"][anchor]))

    def page(self, docname: str) -> str:
        return self.address + self.app.builder.get_target_uri(docname)

    def link(self, link: str) -> str:
        parts = urlsplit(link)
        if parts.scheme or not parts.path:
            return link
        path = posixpath.normpath(posixpath.join(posixpath.dirname(self.docname), parts.path))
        docname = self.env.path2doc(path)
        if docname in self.env.found_docs:
            fragment = f"#{parts.fragment}" if parts.fragment else ""
            return self.page(docname) + fragment
        return f"{self.address}_images/{self.env.images[path][1]}"


def is_chapter(app: Sphinx, docname: str) -> bool:
    return app.builder.name == "html" and app.env.doc2path(docname).endswith(".ipynb")


def write_plain(app: Sphinx, error: Exception | None) -> None:
    if error is not None:
        return
    for docname in filter(lambda name: is_chapter(app, name), app.env.found_docs):
        target = Path(app.outdir) / "plain" / f"{posixpath.basename(docname)}.ipynb"
        target.parent.mkdir(exist_ok=True)
        notebook = json.dumps(Plain(app, docname).notebook(), ensure_ascii=False, indent=1)
        target.write_text(notebook + "\n", encoding="utf-8")


def add_badge(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Below a chapter's title: the way into Colab, or what a maintainer does to open it."""
    if not is_chapter(app, docname):
        return
    if address_is_set(app.config):
        repository = urlsplit(app.config.html_theme_options["repository_url"]).path
        name = posixpath.basename(docname)
        address = f"https://colab.research.google.com/github{repository}/blob/{BRANCH}/plain/{name}"
        text = f'<p><a class="colab" href="{address}.ipynb">Open in Colab</a></p>'
    else:
        text = (
            '<p class="colab">A link that opens this chapter in Colab appears here after '
            "<code>make repository URL=https://github.com/NAME/REPOSITORY</code>.</p>"
        )
    title = next(doctree.findall(nodes.title))
    title.parent.insert(title.parent.index(title) + 1, nodes.raw("", text, format="html"))


def offer_plain(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """The button that downloads a page's source downloads the plain form."""
    if doctree is None or not is_chapter(app, pagename):
        return
    for group in context["header_buttons"]:
        for button in group.get("buttons", []):
            if button["label"] == "download-source-button":
                plain = f"plain/{posixpath.basename(pagename)}.ipynb"
                button["url"] = context["pathto"](plain, 1)


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("doctree-resolved", add_badge)
    app.connect("html-page-context", offer_plain, priority=600)
    app.connect("build-finished", write_plain)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
