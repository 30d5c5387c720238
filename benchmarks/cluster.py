"""What Ray costs on one machine, and what a lost machine costs.

    python benchmarks/cluster.py [--pairs 3] [--photos 2000] [sweep] [photos] [loss]

``sweep``: six runs of preset ``fast`` on the synthetic nuts, with and without ``--ray local``.
``photos``: generated photos through ``predict``, likewise. Both in turns, so that a slow spell
meets both ways; the ratio is that of the medians. ``loss``: four simulated machines of one core
each, of which one is lost in the middle of a sweep and of the photos; the files must be those of
one process, and Ray's memory is asked for all the while. Writes ``results/bench/cluster.json``.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

OUTPUT = Path("results/bench/cluster.json")
RAY = ["--ray", "local"]
DRAWN = 100  # photos
SWEEP = ["--categories", "nut", "--seeds", "0,1,2", "--set", "sigma=0.25,0.5"]


def simplenet(*arguments: object, codes: tuple[int, ...] = (0,)) -> float:
    """Seconds of a command in a process of its own, with an empty feature cache."""
    with tempfile.TemporaryDirectory() as cache:
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "simplenet_lib.cli", *map(str, arguments)],
            env={**os.environ, "SIMPLENET_CACHE": cache},
            stdout=subprocess.DEVNULL,
        )
        seconds = time.perf_counter() - start
    assert done.returncode in codes, arguments
    return seconds


def pairs(count: int, plain: Callable[[], float], ray: Callable[[], float]) -> dict[str, Any]:
    """Seconds of both ways in turns, and the ratio of their medians."""
    taken = [(plain(), ray()) for _ in range(count)]
    alone, together = (statistics.median(column) for column in zip(*taken, strict=True))
    return {"seconds": taken, "ratio": round(together / alone, 3), "load": os.getloadavg()}


def reports(folder: Path) -> dict[str, Any]:
    """The runs in a folder without times and the number of threads."""
    found = {path.name: json.loads(path.read_text()) for path in folder.glob("*.json")}
    for run in found.values():
        for key in [key for key in run if key.startswith("seconds") or key == "hardware"]:
            del run[key]
    return found


def rows(folder: Path) -> dict[str, tuple[str, float | None]]:
    """Verdict and score of every photo in the tables of a folder."""
    found: dict[str, tuple[str, float | None]] = {}
    for path in folder.rglob("predictions.csv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                assert row["image"] not in found
                found[row["image"]] = row["verdict"], float(row["score"]) if row["score"] else None
    return found


def used() -> float:
    """Megabytes in the object stores of all machines."""
    import ray

    whole, left = (
        resources().get("object_store_memory", 0.0)
        for resources in (ray.cluster_resources, ray.available_resources)
    )
    return (whole - left) / 1e6


def loss(home: Path, count: int) -> dict[str, Any]:
    """Lose one of four machines in the middle of a sweep and of the photos."""
    from ray.cluster_utils import Cluster

    os.environ["OMP_NUM_THREADS"] = "1"
    found: dict[str, Any] = {}
    simplenet("benchmark", "--data", home / "set", *SWEEP, "--output", home / "sweep-alone")
    model = home / "model"
    simplenet("predict", model, home / "photos", "--no-overlay", "--output", home / "photos-alone")
    works = {
        "sweep": ["benchmark", "--data", home / "set", *SWEEP],
        "photos": ["predict", model, home / "photos"],
    }
    for name, command in works.items():
        cluster = Cluster(
            initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False}
        )
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        output = home / f"{name}-lossy"
        memory: list[float] = []
        finished = threading.Event()

        def watch(
            output: Path = output,
            cluster: Any = cluster,
            lost: Any = nodes[-1],
            memory: list[float] = memory,
            finished: threading.Event = finished,
        ) -> None:
            import ray

            ray.init(cluster.address, log_to_driver=False, namespace="watch")
            try:
                whole = True
                while not finished.wait(0.5):
                    memory.append(used())
                    if whole and output.is_dir() and any(output.glob("[!.]*")):
                        cluster.remove_node(lost, allow_graceful=False)
                        whole = False
            finally:
                ray.shutdown()

        thread = threading.Thread(target=watch)
        thread.start()
        seconds = simplenet(*command, "--output", output, "--ray", cluster.address)
        finished.set()
        thread.join()
        cluster.shutdown()
        same = {"sweep": reports, "photos": rows}[name]
        found[name] = {
            "seconds": seconds,
            "object_store_mb": [max(memory, default=0.0), memory[-1] if memory else 0.0],
            "same_files": same(output) == same(home / f"{name}-alone"),
        }
    return found


def main() -> None:
    """Measure what was asked for, and keep what earlier runs measured."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--photos", type=int, default=2000)
    parser.add_argument("names", nargs="*", default=["sweep", "photos", "loss"])
    options = parser.parse_args()
    found = json.loads(OUTPUT.read_text()) if OUTPUT.is_file() else {}
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        from simplenet_lib.benchmark import hardware, versions
        from simplenet_lib.synthetic import generate

        generate(home / "set", categories=["nut"])
        generate(home / "more", categories=["nut"], train=DRAWN, test_good=0, seed=1)
        drawn = sorted((home / "more/nut/train/good").iterdir())
        (home / "photos").mkdir()
        for number in range(options.photos):  # the same ones again and again cost as much
            shutil.copy(drawn[number % DRAWN], home / "photos" / f"{number:06}.png")
        if {"photos", "loss"} & {*options.names}:
            simplenet(
                *("train", "--data", home / "set", "--category", "nut", "--output", home / "model")
            )

        def timed(command: list[object], *more: object) -> float:
            output = home / "timed"
            shutil.rmtree(output, ignore_errors=True)
            return simplenet(*command, *more, "--output", output)

        works: dict[str, list[object]] = {
            "sweep": ["benchmark", "--data", home / "set", *SWEEP],
            "photos": ["predict", home / "model", home / "photos", "--no-overlay"],
        }
        for name in options.names:
            if name == "loss":
                found[name] = loss(home, options.photos)
            else:
                work = works[name]
                found[name] = pairs(
                    options.pairs, lambda w=work: timed(w), lambda w=work: timed(w, *RAY)
                )
                if name == "photos":
                    found[name]["count"] = options.photos
            found |= {"versions": versions(), "hardware": hardware("cpu")}
            OUTPUT.write_text(json.dumps(found, indent=2) + "\n")
            print(name, json.dumps(found[name]))


if __name__ == "__main__":
    main()
