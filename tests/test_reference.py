"""The reference: every public name of the library has an example, and each one runs."""

from __future__ import annotations

import ast
import copy
import doctest
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
import torch
from numpydoc.docscrape import get_doc_object
from PIL import Image
from torchvision.models import resnet18

from simplenet_lib.benchmark import datasets
from simplenet_lib.config import preset
from simplenet_lib.model import SimpleNet
from simplenet_lib.synthetic import generate
from simplenet_lib.training import train

ROOT = Path(__file__).parent.parent


def public_names() -> list[str]:
    """Every function and class that a module defines without an underscore, ``module.name``.

    Not those of the command: its reference is ``--help``.
    """
    return [
        f"{path.stem}.{node.name}"
        for path in sorted((ROOT / "simplenet_lib").glob("*.py"))
        if path.stem not in ("__init__", "cli")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
    ]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What reference/index.md says is at hand: made once, of random weights."""
    folder = tmp_path_factory.mktemp("reference")
    data = generate(
        folder / "data", categories=("nut",), train=6, test_good=2, test_per_defect=1, size=64
    )
    weights_file = folder / "resnet18.pth"
    with torch.random.fork_rng(devices=[]), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        torch.save(resnet18().state_dict(), weights_file)
        patch.setenv("SIMPLENET_CACHE", str(folder / "cache"))
        tiny = {"backbone": "resnet18", "layers": ("layer1",), "resize": 32, "crop": 32}
        config = preset("fast", **tiny, heads=2, steps=3, batch_size=64)
        normal, _, config = datasets(data, "nut", config)
        model = train(normal, config, weights=weights_file, progress=False).model
    return {"data": data, "weights_file": weights_file, "model": model}


def test_page_of_the_command_says_what_its_help_says(tmp_path: Path) -> None:
    program = Path(sys.executable).with_name("typer")
    command = [program, "simplenet_lib.cli", "utils", "docs", "--name", "simplenet"]
    command += ["--title", "The command", "--output", tmp_path / "command.md"]
    subprocess.run(command, check=True, capture_output=True, cwd=ROOT)
    written = (tmp_path / "command.md").read_text()
    assert written == (ROOT / "reference" / "command.md").read_text(), "run `make format`"


@pytest.mark.parametrize("name", public_names())
def test_examples_run(
    name: str, prepared: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module(f"simplenet_lib.{name.split('.')[0]}")
    documented = getattr(module, name.split(".")[1])
    assert get_doc_object(documented)["Examples"], f"{name} has no section Examples"
    own = {
        key: value
        for key, value in vars(module).items()
        if not key.startswith("_") and getattr(value, "__module__", "") == module.__name__
    }
    names = {"np": np, "torch": torch, "Path": Path, "Image": Image, "folder": tmp_path}
    model: SimpleNet = copy.deepcopy(prepared["model"])
    monkeypatch.setenv("SIMPLENET_CACHE", str(prepared["data"].with_name("cache")))
    monkeypatch.setenv("PATH", os.environ["PATH"])  # one example changes it
    found = doctest.DocTestFinder().find(
        documented, name, module, {**own, **names, **prepared, "model": model}
    )
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    with matplotlib.rc_context():
        for test in found:
            report: list[str] = []
            runner.run(test, out=report.append)
            assert not runner.failures, "".join(report)
    assert runner.tries >= 1, f"{name} has no example that runs"
