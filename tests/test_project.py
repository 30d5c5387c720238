"""The files around the code agree with each other and hold nothing private."""

import ast
import importlib.util
import re
import subprocess
import tomllib
from collections import defaultdict
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from simplenet_lib import __version__

ROOT = Path(__file__).parent.parent
CONDA_NAMES = {"pytorch": "torch"}
MACHINE_PATH = re.compile(r"(?<![\w.~*-])/(?:work|root|home|Users)/\w")
REGISTRY_HOST = re.compile(r"\b(?:pypi\.org|pythonhosted\.org|npmjs\.(?:org|com))\b")


def as_ranges(lines: list[str]) -> dict[str, str]:
    requirements = [Requirement(line) for line in lines]
    return {canonicalize_name(r.name): str(r.specifier) for r in requirements}


@pytest.fixture(scope="module")
def declared() -> dict[str, str]:
    """Name and range of every package that pyproject.toml asks for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    dev = Requirement(extras.pop("dev")[0])
    assert dev.extras == set(extras), "the extra 'dev' must name every other extra"
    lines = [*project["dependencies"], *(line for extra in extras.values() for line in extra)]
    ranges = as_ranges(lines)
    for line in lines:  # a package in two extras must have the same range in both
        requirement = Requirement(line)
        assert ranges[canonicalize_name(requirement.name)] == str(requirement.specifier)
    return ranges | {"python": project["requires-python"]}


@pytest.fixture(scope="module")
def files() -> list[Path]:
    """Every file that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git repository")
    paths = [ROOT / name for name in listing.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def test_conda_environment_asks_for_the_same_packages(declared: dict[str, str]) -> None:
    lines = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    (from_pip,) = (line["pip"] for line in lines if isinstance(line, dict))
    assert "--editable ." in from_pip
    conda = as_ranges([line for line in lines if isinstance(line, str) and line != "pip"])
    pip = as_ranges([line for line in from_pip if line != "--editable ."])
    assert not conda.keys() & pip.keys()
    assert {CONDA_NAMES.get(name, name): spec for name, spec in (conda | pip).items()} == declared


def test_lock_holds_every_package_within_its_range(declared: dict[str, str]) -> None:
    text = (ROOT / "requirements.lock").read_text()
    locked = defaultdict(set)
    for entry in re.split(r"\n(?=\S)", text.strip()):
        name, version = re.match(r"([\w.-]+)==(\S+)", entry).groups()
        locked[canonicalize_name(name)].add(Version(version))
        assert "--hash=sha256:" in entry, f"{name} has no hash"
    for name, spec in declared.items():
        if name != "python":
            requirement = Requirement(f"{name}{spec}")
            assert locked[name], f"{name} is not in requirements.lock: run `make lock`"
            assert all(version in requirement.specifier for version in locked[name]), name
    assert locked["torch"] == {Version("2.15.0")}
    assert locked["torchvision"] == {Version("0.29.2")}


def test_locks_name_no_address() -> None:
    text = (ROOT / "requirements.lock").read_text()
    assert "://" not in text
    assert " @ " not in text
    assert not re.search(r"^\s*-(?!-hash=)", text, flags=re.MULTILINE)
    assert "://" not in (ROOT / "package-lock.json").read_text()


def test_citation_names_the_current_version() -> None:
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__


@pytest.mark.parametrize("page", ["README.md", "benchmarks.md"])
def test_tables_are_those_of_the_runs(page: str) -> None:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert page in tables.TABLES
    assert tables.rewritten(page) == (ROOT / page).read_text(), "run `python benchmarks/tables.py`"


def test_files_are_small(files: list[Path]) -> None:
    assert [path for path in files if path.stat().st_size > 2_000_000] == []


def test_files_name_no_machine_path_and_no_package_registry(files: list[Path]) -> None:
    found = []
    for path in files:
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # a picture
        for pattern in (MACHINE_PATH, REGISTRY_HOST):
            found += [f"{path.relative_to(ROOT)}: {match[0]}" for match in pattern.finditer(text)]
    assert found == []


def test_whatever_is_loaded_is_data() -> None:
    """What no rule of ruff sees: torch.load and numpy.load must say that they unpickle nothing."""
    safe = {"torch.load": ("weights_only", True), "np.load": ("allow_pickle", False)}
    seen = set()
    for folder in ("simplenet_lib", "benchmarks", "notebooks/py"):
        for path in (ROOT / folder).glob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if not isinstance(node, ast.Call) or ast.unparse(node.func) not in safe:
                    continue
                name = ast.unparse(node.func)
                keyword, value = safe[name]
                words = {word.arg: word.value for word in node.keywords}
                given = ast.unparse(words.get(keyword, node))
                assert given == str(value), f"{path.name}: {ast.unparse(node)}"
                seen.add(name)
    assert seen == set(safe), "the test looks for calls that nobody makes any more"
