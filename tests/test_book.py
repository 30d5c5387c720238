"""The book: every notebook is what its text says, ran to its end, and the pages hold together."""

from __future__ import annotations

import ast
import html.parser
import json
import re
import shutil
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import jupytext
import pytest
import yaml
from packaging.requirements import Requirement
from test_project import MACHINE_PATH
from test_reference import public_names

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEXTS = sorted((ROOT / "notebooks" / "py").glob("*.py"))
TAGS = {"library", "hide-cell", "hide-input", "hide-output", "nbval-ignore-output"}
METADATA = {"tags", "mystnb", "cellView", "jupyter", "lines_to_next_cell"}
SECTIONS = [
    "What you will learn",
    "Before you start",
    "The idea",
    "From the paper",
    "Build it",
    "What it does",
    "What can go wrong",
    "Exercises",
    "Quiz",
    "The scoreboard",
    "Summary",
    "References",
    "Next",
]
#: The modules that a chapter builds, and what of them it must show.
TAUGHT = {
    "01_dataset": (
        ["dataset"],
        {"Sample", "read_image", "read_mask", "make_transform", "ImageFiles"},
    ),
    "02_features": (["features"], {"FrozenFeatures", "Standardise"}),
    "03_adaptor": (["adaptor"], {"Adaptor"}),
    "04_noise": (["noise"], {"add_noise"}),
    "05_discriminator": (["discriminator"], {"Discriminator"}),
    "06_margin_loss": (["loss"], {"margin_loss"}),
    "07_training": (["training", "model"], {"Head", "split_images", "shuffled_positions"}),
    "08_localization": (["localization", "metrics"], {"anomaly_map", "image_score", "threshold"}),
    "10_ablations": (
        ["baselines"],
        {"PixelGaussian", "PositionGaussian", "coreset", "PatchCore"},
    ),
    "11_benchmark": (["benchmark"], {"mean_and_deviation"}),
    "12_your_own_photos": (
        ["export", "localization", "dataset"],
        {"as_rgb", "Detector"},
    ),
}
SOLUTION = {
    "mystnb": {
        "code_prompt_show": "Show the solution",
        "code_prompt_hide": "Hide the solution",
    },
    "cellView": "form",
    "jupyter": {"source_hidden": True},
}

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


@cache
def cells(path: Path) -> list[dict[str, Any]]:
    """The cells of a notebook, with their sources as one string each."""
    found: list[dict[str, Any]] = json.loads(path.read_text())["cells"]
    return [{**cell, "source": "".join(cell["source"])} for cell in found]


def code(path: Path) -> list[dict[str, Any]]:
    return [cell for cell in cells(path) if cell["cell_type"] == "code"]


def prose(path: Path) -> str:
    return "\n\n".join(c["source"] for c in cells(path) if c["cell_type"] == "markdown")


def repository() -> dict[str, str]:
    found: dict[str, str] = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
    return found


# --- a notebook and its text -------------------------------------------------------------


def test_every_chapter_of_the_table_of_contents_is_there_and_has_its_text() -> None:
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    listed = [chapter["file"] for part in toc["parts"] for chapter in part["chapters"]]
    chapters = [name.removeprefix("notebooks/") for name in listed if "/" in name]
    assert chapters == [path.stem for path in NOTEBOOKS] == [path.stem for path in TEXTS]
    assert set(TAUGHT) <= set(chapters)


@each_notebook
def test_notebook_and_text_hold_the_same_cells(path: Path) -> None:
    pair = (jupytext.read(path), jupytext.read(path.parent / "py" / f"{path.stem}.py"))
    notebook, text = (
        [(cell.cell_type, cell.source.strip(), dict(cell.metadata)) for cell in side.cells]
        for side in pair
    )
    for ran, written in zip(notebook, text, strict=True):
        assert ran == written, "run `make sync`"


@each_notebook
def test_every_code_cell_ran_in_order(path: Path) -> None:
    assert [cell["execution_count"] for cell in code(path)] == list(range(1, len(code(path)) + 1))


@each_notebook
def test_cells_carry_known_tags_and_metadata_only(path: Path) -> None:
    for cell in cells(path):
        metadata = cell["metadata"]
        assert set(metadata) <= METADATA, metadata
        assert set(metadata.get("tags", [])) <= TAGS, metadata


@each_notebook
def test_outputs_hold_no_error_no_warning_and_no_path_of_a_machine(path: Path) -> None:
    for cell in code(path):
        for output in cell["outputs"]:
            assert output["output_type"] != "error", cell["source"]
            assert output.get("name") != "stderr", output
            data = {"text/plain": output.get("text", [])} | output.get("data", {})
            for kind in ("text/plain", "text/html"):
                text = "".join(data.get(kind, []))
                assert not re.search(r"\w*Warning\b|\b0x[0-9a-f]{6,}", text), text[:500]
                if "base64" not in text:
                    assert not MACHINE_PATH.search(text), text[:500]


@each_notebook
def test_code_names_no_path_of_a_machine(path: Path) -> None:
    assert not MACHINE_PATH.search("\n".join(cell["source"] for cell in cells(path)))


@each_notebook
def test_imports_only_what_comes_with_the_library(path: Path) -> None:
    """On Colab the setup cell installs the library and what it needs, nothing else."""
    modules = {"PIL": "pillow", "sklearn": "scikit-learn"}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = [*project["dependencies"], *project["optional-dependencies"]["export"]]
    installed = {Requirement(line).name for line in lines}
    installed |= {"simplenet_lib", "IPython"} | sys.stdlib_module_names
    for cell in code(path):
        for node in ast.walk(ast.parse(cell["source"])):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in (name.split(".")[0] for name in names):
                assert modules.get(name, name) in installed, name


# --- a chapter and the library -----------------------------------------------------------


def definitions(source: str) -> dict[str, str]:
    """Every function, class and constant of a source without its docstrings, by name."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            first = node.body[0] if node.body else None
            if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant):
                node.body = node.body[1:] or [ast.Pass()]
    found = {}
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            target = node.targets[0] if isinstance(node, ast.Assign) else node.target
            found[ast.unparse(target)] = ast.unparse(node)
        elif not isinstance(node, ast.Import | ast.ImportFrom | ast.Pass):
            found[f"line {node.lineno}"] = ast.unparse(node)
    return found


@pytest.mark.parametrize("chapter", TAUGHT)
def test_library_cells_equal_the_library(chapter: str) -> None:
    modules, required = TAUGHT[chapter]
    library: dict[str, str] = {}
    for module in modules:
        library |= definitions((ROOT / "simplenet_lib" / f"{module}.py").read_text())
    shown: dict[str, str] = {}
    for cell in code(ROOT / "notebooks" / f"{chapter}.ipynb"):
        if "library" in cell["metadata"].get("tags", []):
            shown |= definitions(cell["source"])
    assert required <= shown.keys()
    for name, source in shown.items():
        assert source == library.get(name), f"{chapter}: {name} differs from {modules}"


# --- a chapter as a lesson ---------------------------------------------------------------


@each_notebook
def test_chapter_has_the_whole_anatomy(path: Path) -> None:
    headings = re.findall(r"^## (.+)$", prose(path), flags=re.MULTILINE)
    assert [heading for heading in headings if heading in SECTIONS] == SECTIONS
    goals = prose(path).split("## What you will learn")[1].split("\n## ")[0]
    assert 3 <= len(re.findall(r"^- \*\*", goals, flags=re.MULTILINE)) <= 5


@each_notebook
def test_chapter_is_a_lesson_not_a_log(path: Path) -> None:
    """Of its code a reader sees at most 15 cells and 220 lines; the rest is folded."""
    folded = {"hide-input", "hide-cell"}
    seen = [c["source"] for c in code(path) if not folded & set(c["metadata"].get("tags", []))]
    assert len(seen) <= 15
    assert sum(bool(line.strip()) for source in seen for line in source.splitlines()) <= 220


@each_notebook
def test_chapter_has_graded_exercises_with_solutions_that_ran(path: Path) -> None:
    exercises = re.findall(r"^:::\{exercise\} (\w+): .+?^:::$", prose(path), flags=re.M | re.S)
    assert len(exercises) >= 2
    assert set(exercises) <= {"easy", "medium", "hard"}
    assert "expected result" not in prose(path).lower(), "it waits behind the solution's button"
    kinds = []
    for cell in cells(path):
        if cell["cell_type"] == "markdown" and ":::{exercise}" in cell["source"]:
            kinds.append("exercise")
        elif "Show the solution" in json.dumps(cell["metadata"]):
            metadata = {key: cell["metadata"].get(key) for key in SOLUTION}
            assert metadata == SOLUTION, cell["metadata"]
            assert "hide-cell" in cell["metadata"]["tags"]
            assert re.match(r"# @title Solution\n# Expected result: \S", cell["source"])
            assert "assert" in cell["source"] and cell["outputs"], "a solution checks itself"
            kinds.append("solution")
    assert kinds == ["exercise", "solution"] * len(exercises)


@each_notebook
def test_chapter_asks_three_questions_and_answers_them(path: Path) -> None:
    quiz = prose(path).split("## Quiz")[1].split("## Summary")[0]
    questions = re.findall(
        r"^\*\*(\d)\. [^<]+?\*\*\n\n<details>\n<summary>Answer</summary>\n\n(.+?)\n\n</details>",
        quiz,
        flags=re.MULTILINE | re.DOTALL,
    )
    assert [number for number, _ in questions] == ["1", "2", "3"]
    assert all(len(answer) > 60 for _, answer in questions)


@each_notebook
def test_figures_have_captions_and_alt_texts(path: Path) -> None:
    for cell in code(path):
        pictures = [o for o in cell["outputs"] if "image/png" in o.get("data", {})]
        assert len(pictures) <= 1, "one figure a cell: each needs its own alt text"
        if pictures:
            mystnb = cell["metadata"]["mystnb"]
            assert len(mystnb["image"]["alt"]) > 30
            assert mystnb["figure"]["name"].startswith("fig-")
            assert mystnb["figure"]["caption"]
            assert len(pictures[0]["data"]["image/png"]) < 400_000


# --- addresses ---------------------------------------------------------------------------


def addresses_agree(root: Path) -> None:
    """Colab links and setup cells name the repository of ``_config.yml``."""
    config = yaml.safe_load((root / "_config.yml").read_text())["repository"]
    colab = config["url"].replace("https://github.com", "https://colab.research.google.com/github")
    setups = set()
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        link = f"{colab}/blob/{config['branch']}/notebooks/{path.name}"
        (badge,) = re.findall(r"\[!\[Open in Colab\]\(\S+\)\]\((\S+)\)", prose(path))
        assert badge == link
        setup = code(path)[0]
        assert f'\nREPOSITORY = "{config["url"]}"\n' in setup["source"]
        assert setup["metadata"]["tags"] == ["hide-cell", "nbval-ignore-output"]
        setups.add(setup["source"])
    assert len(setups) == 1, "the setup cell is the same in every chapter"


def test_addresses_agree_with_the_configuration() -> None:
    addresses_agree(ROOT)


def test_make_repository_rewrites_every_address(tmp_path: Path) -> None:
    for name in ("Makefile", "_config.yml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks")
    command = ["make", "repository", "URL=https://github.com/someone/detector"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    config = yaml.safe_load((tmp_path / "_config.yml").read_text())
    assert config["repository"]["url"] == "https://github.com/someone/detector"
    addresses_agree(tmp_path)
    old = urlsplit(repository()["url"]).path
    for text in (tmp_path / "notebooks").rglob("*.*"):
        assert f"{old}/" not in text.read_text() and f'{old}"' not in text.read_text()
    bad = subprocess.run(["make", "repository", "URL=nowhere"], cwd=tmp_path, capture_output=True)
    assert bad.returncode == 2


def test_setup_cell_without_an_address_stops_with_one_sentence(tmp_path: Path) -> None:
    # An interpreter that sees no library, as on a fresh Colab.
    source = code(NOTEBOOKS[0])[0]["source"].replace(
        f'"{repository()["url"]}"', '"https://github.com/OWNER/x"'
    )
    command = [sys.executable, "-I", "-S", "-c", source]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "make repository URL=" in done.stderr


# --- the rendered pages ------------------------------------------------------------------


class Page(html.parser.HTMLParser):
    """The images, links and anchors of one page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.images: list[tuple[str, str]] = []
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        if "id" in values:
            self.anchors.add(values["id"])
        if tag == "img":
            self.images.append((values.get("src", ""), values.get("alt", "")))
            self.links.append(values.get("src", ""))
        if tag == "a" and "href" in values:
            self.links.append(values["href"])


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Page]:
    """Every page of the book, built anew with warnings as errors."""
    output = tmp_path_factory.mktemp("book")
    program = Path(sys.executable).parent / "jupyter-book"
    command = [str(program), "build", "--warningiserror", "--quiet"]
    command += ["--path-output", str(output), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    folder = output / "_build" / "html"
    return {path: Page(path) for path in sorted(folder.rglob("*.html"))}


def test_every_page_is_built(pages: dict[Path, Page]) -> None:
    names = {path.stem for path in pages}
    assert {path.stem for path in NOTEBOOKS} <= names
    references = {"notation", "glossary", "original", "promises", "versions", "references"}
    references |= {"api", "benchmarks", "cluster", "teaching", "errata"}
    assert {"intro", *references} <= names


def test_every_public_name_has_an_entry_in_the_reference(pages: dict[Path, Page]) -> None:
    anchors = {
        anchor
        for path in pages
        if path.parent.name == "reference"
        for anchor in pages[path].anchors
    }
    assert {f"simplenet_lib.{name}" for name in public_names()} - anchors == set()


def test_every_image_has_an_alt_text(pages: dict[Path, Page]) -> None:
    missing = [
        f"{path.name}: {source}"
        for path, page in pages.items()
        for source, alt in page.images
        if not alt.strip() or alt.strip() == source
    ]
    assert missing == []


def test_internal_links_resolve(pages: dict[Path, Page]) -> None:
    broken = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or link in ("", "#"):
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            if not target.is_file():
                broken.append(f"{path.name}: {link}")
            elif parts.fragment and target in pages:
                anchors = pages[target].anchors
                if unquote(parts.fragment) not in anchors:
                    broken.append(f"{path.name}: {link}")
    assert broken == []


def test_every_term_of_the_glossary_is_used() -> None:
    text = (ROOT / "glossary.md").read_text()
    terms = re.findall(r"^(\w[^\n]*)\n  \S", text, flags=re.MULTILINE)
    used = set()
    for source in [prose(path) for path in NOTEBOOKS] + [text, (ROOT / "intro.md").read_text()]:
        for role in re.findall(r"\{term\}`([^`]+)`", source):
            reference = re.search(r"<([^>]+)>$", role)
            used.add(" ".join((reference[1] if reference else role).split()).lower())
    assert len(terms) > 30
    assert [term for term in terms if term.lower() not in used] == []


def test_page_of_versions_names_the_locked_ones() -> None:
    lock = set(
        re.findall(r"^([\w.-]+)==([^\s+]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE)
    )
    page = (ROOT / "versions.md").read_text()
    rows = dict(re.findall(r"^\| ([\w.-]+) \| (\d\S*) \|$", page, re.MULTILINE))
    chapters = {name: rows.pop(name) for name in list(rows) if name[:2].isdigit()}
    assert chapters.keys() == {path.stem for path in NOTEBOOKS}
    rows.pop("Python")
    assert {"torch", "torchvision", "numpy", "jupyter-book"} <= rows.keys()
    assert set(rows.items()) <= lock
