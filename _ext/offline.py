"""Sphinx extension: what a page needs lies in the book itself, and no link leads nowhere."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError

from simplenet_lib import __version__

#: Of MathJax the component that pages load, what it may load in turn, and its licence.
MATHJAX = (
    "es5/tex-chtml.js",
    "es5/input/tex/extensions",
    "es5/output/chtml/fonts/woff-v2",
    "LICENSE",
)
#: What extensions write: a name that hides a button's own, one name for many, roles of old.
MISLEADING = (
    ' aria-label="Toggle hidden content"',
    ' id="exercise-content"',
    ' role="doc-biblioentry"',
    ' role="list"',
)


def address_is_set(config: Config) -> bool:
    """Whether a maintainer has run ``make repository``."""
    return "/OWNER/" not in config.html_theme_options["repository_url"]


def set_options(app: Sphinx, config: Config) -> None:
    config.version = __version__
    config.mathjax_path = "mathjax/es5/tex-chtml.js"
    for button in ("use_repository_button", "use_issues_button"):
        config.html_theme_options[button] &= address_is_set(config)


def copy_mathjax(app: Sphinx) -> None:
    if app.builder.name != "html":
        return
    source = Path(app.srcdir) / "node_modules" / "mathjax"
    if not source.is_dir():
        raise ExtensionError(f"{source} is missing: `make book` installs it, or `npm ci`.")
    for name in MATHJAX:
        target = Path(app.outdir) / "_static" / "mathjax" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (source / name).is_dir():
            shutil.copytree(source / name, target, dirs_exist_ok=True)
        else:
            shutil.copy(source / name, target)


def mend_players(app: Sphinx, doctree: nodes.document) -> None:
    """matplotlib's player asks a CDN for icons, which the theme has; its slider has no name."""
    for raw in doctree.findall(nodes.raw):
        text = re.sub(r'<link\b[^>]*\bhref="https?://[^>]*>', "", raw.astext())
        text = text.replace('class="anim-slider"', 'class="anim-slider" aria-label="Frame"')
        raw.children = [nodes.Text(text)]


def mend_page(
    app: Sphinx, pagename: str, template: str, context: dict[str, Any], doctree: object
) -> None:
    """Leave out scripts and styles that nothing uses, and attributes that mislead readers."""
    body = context.get("body", "")
    # Nothing uses thebe; the figures that answer stand below pictures.
    unused = "thebe" if 'id="fig-' in body else "thebe|figures"
    for kind in ("script_files", "css_files"):
        context[kind] = [f for f in context[kind] if not re.search(unused, str(vars(f)).lower())]
    for attribute in MISLEADING:
        body = body.replace(attribute, "")
    # Sphinx writes a signature of several lines as a list of definitions without terms.
    context["body"] = re.sub(
        r'<dl>\n(<dd><em class="sig-param">.*?)</dl>',
        lambda lines: f'<div class="sig-lines">\n{lines[1]}</div>'.replace("dd>", "div>"),
        body,
        flags=re.DOTALL,
    )


def setup(app: Sphinx) -> dict[str, Any]:
    app.connect("config-inited", set_options)
    app.connect("builder-inited", copy_mathjax)
    app.connect("doctree-read", mend_players)
    app.connect("html-page-context", mend_page, priority=900)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
