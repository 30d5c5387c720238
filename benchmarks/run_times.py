"""Write the book's page of versions and run times from the notebooks that `make book` ran.

    rm -rf _build/run && make book && python benchmarks/run_times.py

Without the first command `make book` runs only what has changed, and the page would mix the
times of several days. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import platform
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

PACKAGES = ("torch", "torchvision", "numpy", "scipy", "scikit-learn", "pillow", "matplotlib")
BOOK = ("jupyter-book", "nbval", "jupytext")


def seconds(notebook: Path) -> float:
    """Time from the start of the first code cell to the end of the last."""
    cells = json.loads(notebook.read_text())["cells"]
    marks = [cell["metadata"]["execution"] for cell in cells if cell["cell_type"] == "code"]
    start, end = marks[0]["iopub.execute_input"], marks[-1]["shell.execute_reply"]
    return (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()


def main() -> None:
    """Write ``versions.md``."""
    notebooks = sorted(Path("_build/run").glob("*.ipynb"))
    if not notebooks:
        raise SystemExit("_build/run holds no notebooks: run `make book` first.")
    lines = [
        "# Versions and run times",
        "",
        "The outputs in this book were made with these versions. `requirements.lock` holds all of",
        "them; `pyproject.toml` says which others are admitted. `benchmarks/run_times.py` writes",
        "this page and says how.",
        "",
        "| package | version |",
        "|---|---|",
        f"| Python | {platform.python_version()} |",
    ]
    lines += [f"| {name} | {version(name).split('+')[0]} |" for name in PACKAGES + BOOK]
    lines += [
        "",
        f"Run times on {os.cpu_count()} cores of an {platform.machine()} processor without a GPU,",
        "one notebook after the other. The first one that needs them also draws the synthetic",
        "data set (about 15 s) and fetches the pretrained weights; features that one chapter has",
        "computed are cached for the next.",
        "",
        "| chapter | seconds |",
        "|---|---|",
    ]
    for notebook in notebooks:
        lines.append(f"| {notebook.stem} | {seconds(notebook):.0f} |")
    Path("versions.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
