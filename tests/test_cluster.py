"""Both commands on Ray: the same files as without it, whatever is lost on the way."""

import csv
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from simplenet_lib import cli, cluster  # before Ray, for which it sets the environment
from simplenet_lib.benchmark import Job, missing_jobs
from simplenet_lib.config import PRESETS, Config, SimpleNetError, preset
from simplenet_lib.synthetic import generate

ROOT = Path(__file__).parent.parent


def tiny(**changes: Any) -> Config:
    values: dict[str, Any] = {"backbone": "resnet18", "layers": ("layer2",), "batch_size": 64}
    values |= {"resize": 64, "crop": 64, "adaptor_channels": 8, "steps": 300, "heads": 2}
    return preset("fast", **{**values, **changes})


@pytest.fixture(scope="module", autouse=True)
def home(surroundings: Path) -> Iterator[Path]:
    """A folder with data, random weights, and a preset as small as they are."""
    folder = surroundings
    size: dict[str, Any] = {"train": 8, "test_good": 2, "test_per_defect": 1, "size": 64}
    generate(folder / "set", categories=["cloth", "nut"], **size)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "fast", tiny())
        patch.chdir(folder)
        yield folder


@pytest.fixture(scope="module")
def nodes(home: Path) -> Iterator[Any]:
    """One machine of one core, simulated by processes of Ray's; each test adds one to lose."""
    from ray.cluster_utils import Cluster

    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    yield made
    made.shutdown()


@pytest.fixture(scope="module")
def trained(home: Path) -> Path:
    simplenet("train", "--data", "set", "--category", "cloth", "--output", "trained")
    return home / "trained"


def simplenet(*arguments: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    assert result.exit_code == code, result.output + repr(result.exception)
    return result.stdout


def when(happened: Callable[[], bool], act: Callable[[], object]) -> threading.Thread:
    """Do something in a thread as soon as something has happened."""

    def watch() -> None:
        while not happened():
            time.sleep(0.02)
        act()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def reports(folder: Path) -> dict[str, dict[str, Any]]:
    """The runs in a folder without what differs between any two runs."""
    return {
        path.name: {
            key: value
            for key, value in json.loads(path.read_text()).items()
            if not key.startswith("seconds")
        }
        for path in folder.iterdir()
    }


def rows(tables: list[Path]) -> dict[str, dict[str, str]]:
    """The rows of some tables by image, of which none may come twice."""
    found: dict[str, dict[str, str]] = {}
    for path in tables:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                assert found.setdefault(row["image"], row) is row
    return found


# Sweeps -------------------------------------------------------------------------------


# First, as Ray's local start and end would disturb a cluster that is simulated here already.
def test_local_ray_lists_failed_runs_and_leaves_nothing_running(home: Path) -> None:
    jobs = missing_jobs(home / "set", ["cloth"], [tiny(steps=3)], [0, 1], home / "some")
    other: Job = replace(jobs[1], path=home / "resnet18-f37072fd.pth/1.json")  # not a folder

    def raylets() -> set[str]:  # of this process: a simulated cluster may be one
        listed = subprocess.run(
            ["ps", "-eo", "ppid,pid,args"], capture_output=True, text=True, check=True
        )
        lines = [line.split(None, 2) for line in listed.stdout.splitlines()]
        return {
            pid for parent, pid, what in lines if parent == str(os.getpid()) and "raylet" in what
        }

    before = raylets()
    failed = cluster.sweep([jobs[0], other], "local", weights=None, device="auto", progress=False)
    assert failed.keys() == {"1.json"} and "could not be written" in failed["1.json"]
    assert [path.name for path in (home / "some").iterdir()] == [jobs[0].path.name]
    assert raylets() == before


def test_a_sweep_that_loses_a_machine_ends_with_the_same_files(home: Path, nodes: Any) -> None:
    sweep = ["benchmark", "--data", "set", "--seeds", "0,1", "--set", "sigma=0.3,0.5"]
    simplenet(*sweep, "--output", "alone")
    done = home / "together/cloth-fast-0.json"
    lost = nodes.add_node(num_cpus=1)
    thread = when(done.is_file, lambda: nodes.remove_node(lost, allow_graceful=False))
    table = simplenet(*sweep, "--output", "together", "--ray", nodes.address)
    thread.join()
    assert reports(home / "together") == reports(home / "alone")
    assert len(reports(home / "together")) == 8
    assert "| nut | `fast`, sigma=0.5 | 2 |" in table
    # Once more there is nothing to do, and no cluster is asked.
    again = simplenet(*sweep, "--output", "together", "--ray", "127.0.0.1:1")
    assert again[again.index("| category") :] == table[table.index("| category") :]


# Photos -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photos(home: Path) -> Path:
    """40 photos, of which three are damaged."""
    folder = home / "photos"
    folder.mkdir()
    images = sorted((home / "set").glob("*/t*/*/*.png"))
    for number in range(40):
        shutil.copy(images[number % len(images)], folder / f"{number:02}.png")
    (folder / "03.png").write_bytes(b"")
    (folder / "17.png").write_text("no image")
    (folder / "29.png").write_bytes((folder / "30.png").read_bytes()[:100])
    return folder


def test_photos_on_machines_that_are_lost_get_the_rows_of_one_process(
    home: Path, nodes: Any, trained: Path, photos: Path
) -> None:
    simplenet("predict", trained, "photos", "--no-overlay", "--output", "one", code=3)
    lost = nodes.add_node(num_cpus=1)
    thread = when(
        lambda: any((home / "many").glob("part-*")),
        lambda: nodes.remove_node(lost, allow_graceful=False),
    )
    command = ["predict", trained, "photos", "--output", "many", "--save-maps", "--ray"]
    said = simplenet(*command, nodes.address, code=3)
    thread.join()
    expected, tables = rows([home / "one/predictions.csv"]), [*(home / "many").glob("*/*.csv")]
    found = rows(tables)
    assert "of 37 images are anomalous" in said and "3 cannot be read" in said
    assert found.keys() == expected.keys() and len(tables) == 3
    for name, row in found.items():
        assert bool(row.pop("map")) == (not row["error"])
        assert row == {key: value for key, value in expected[name].items() if key != "map"}
    assert sum(bool(row["error"]) for row in found.values()) == 3
    assert len([*(home / "many").glob("*/maps/*.npy")]) == 37
    assert not [*(home / "many").glob(".partial-*")]
    # Parquet says the same, exactly.
    for path in (home / "many").glob("*/*.parquet"):
        for record in pq.read_table(path).to_pylist():
            row = found[record["image"]]
            assert (record["error"] or "") == row["error"]
            assert row["score"] == (f"{record['score']:.6g}" if record["verdict"] else "")
    # What is known is skipped, and nothing is asked of a cluster.
    before = {path: path.stat().st_mtime_ns for path in tables}
    assert "40 of them judged before" in simplenet(*command, "127.0.0.1:1", code=3)
    assert {path: path.stat().st_mtime_ns for path in (home / "many").glob("*/*.csv")} == before


def judge(trained: Path, output: Path, threshold: float = 1.0) -> cluster._Judge:
    kinds = {"overlays": False, "maps": False, "records": False}
    return cluster._Judge(
        *(trained / "model.safetensors", None, "cpu", os.getcwd(), output, threshold, kinds),
        *({"model": "1", "threshold": "1.0"}, None),
    )


def test_a_part_is_whole_or_absent_and_the_same_when_tried_again(
    trained: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch = {"image": np.array([b"photos/00.png", b"photos/17.png"], dtype=object)}
    actor = judge(trained, tmp_path)

    def full(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cluster.pq, "write_table", full)
        with pytest.raises(OSError, match="No space"):
            actor(batch)
    assert not [*tmp_path.glob("part-*")]
    assert [actor(batch) for _ in range(2)] == [{"photos": [2]}] * 2
    assert len([*tmp_path.glob("part-*")]) == 1
    # What a lost process leaves is removed by the next command.
    (tmp_path / ".partial-part-1").mkdir()
    cluster._remove_unfinished(tmp_path)
    assert len([*tmp_path.glob(".partial-*")]) == 0


def test_photos_at_an_address_are_those_of_the_disk(
    trained: Path, photos: Path, tmp_path: Path
) -> None:
    memory = fsspec.filesystem("memory")
    for number in (0, 1, 3):
        memory.pipe(f"/bucket/{number}.png", (photos / f"{number:02}.png").read_bytes())
    memory.pipe("/bucket/.hidden/9.png", b"")
    memory.pipe("/list.txt", b"photos/05.png\n\nphotos/06.png\nphotos/05.png\n")
    names = cluster.find_photos(["memory://bucket", "memory://list.txt"], tmp_path)
    assert [Path(name).name for name in names[:3]] == ["0.png", "1.png", "3.png"]
    assert names[3:] == ["photos/05.png", "photos/06.png"]
    here = ["photos/00.png", "photos/01.png", "photos/03.png"]
    made = []
    for output, some in (("disk", here), ("address", names[:3])):
        (tmp_path / output).mkdir()
        judge(trained, tmp_path / output)({"image": np.array([*map(str.encode, some)], object)})
        (path,) = (tmp_path / output).glob("*/*.parquet")
        made.append(pq.read_table(path).to_pylist())
    assert [row.pop("image") for row in made[0] + made[1]] == here + names[:3]
    assert made[0][2].pop("error") == "not a readable image (the file is empty)."
    assert made[1][2].pop("error").startswith("not a readable image (")
    assert made[0] == made[1]


def test_a_list_or_folder_without_photos_is_named(tmp_path: Path, home: Path) -> None:
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "empty").mkdir()
    for image, sentence in (
        ("list.txt", "not a list of photos in UTF-8"),
        ("empty", "no images found"),
        ("nowhere", "no such image or folder"),
    ):
        with pytest.raises(SimpleNetError, match=sentence):
            cluster.find_photos([str(tmp_path / image)], home / "out")
    with pytest.raises(SimpleNetError, match="memory://nothing: cannot be opened"):
        cluster.find_photos(["memory://nothing"], home / "out")


def test_other_verdicts_and_other_files_are_not_mixed_with_ours(
    trained: Path, photos: Path, tmp_path: Path
) -> None:
    judge(trained, tmp_path)({"image": np.array([b"photos/00.png"], dtype=object)})
    cluster._check_parts(tmp_path)
    assert cluster._known(tmp_path, {"model": "1", "threshold": "1.0"}) == {"photos/00.png"}
    for other in ({"model": "2", "threshold": "1.0"}, {"model": "1", "threshold": "2.0"}):
        with pytest.raises(SimpleNetError, match="another model or threshold"):
            cluster._known(tmp_path, other)
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(SimpleNetError, match="holds something else \\(thesis.txt\\)"):
        cluster._check_parts(tmp_path)


# What is missing ----------------------------------------------------------------------


def test_without_the_extra_one_sentence_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Path
) -> None:
    for command in (
        ["predict", str(trained), "photos", "--ray", "local"],
        ["benchmark", "--data", "set", "--ray", "local"],
    ):
        with monkeypatch.context() as patch:
            patch.delitem(sys.modules, "simplenet_lib.cluster")
            patch.delattr("simplenet_lib.cluster")
            patch.setitem(sys.modules, "ray", None)
            patch.setattr(sys, "argv", ["simplenet", *command])
            with pytest.raises(SystemExit) as caught:
                cli.main()
        assert caught.value.code == 2
        (sentence,) = capsys.readouterr().err.splitlines()
        assert 'pip install "simplenet_lib[cluster]"' in sentence


def test_a_cluster_that_is_not_there_is_named() -> None:
    with (
        pytest.raises(SimpleNetError, match=r"no Ray at '127\.0\.0\.1:1'"),
        cluster._connected("127.0.0.1:1"),
    ):
        pass
