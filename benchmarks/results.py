"""Measure a preset on data sets of yours, with three seeds, and print the README's table.

    python benchmarks/results.py PRESET ROOT/CATEGORY [ROOT/CATEGORY ...]

Every run is `simplenet train` as typed, in a process of its own; its
metrics.json is kept as ``results/CATEGORY-PRESET-SEED.json``, and a run whose
file is there already is skipped. Features are computed anew for the first seed,
and cached for the others.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

SEEDS = (0, 1, 2)
OUTPUT = Path("results")
COLUMNS = {
    "image_auroc": "image AUROC",
    "image_ap": "image AP",
    "image_f1max": "image F1-max",
    "pixel_auroc": "pixel AUROC",
    "aupro": "AUPRO",
}


def main(preset: str, folders: list[Path]) -> None:
    """Run what is missing, then print the table of everything in ``results``."""
    OUTPUT.mkdir(exist_ok=True)
    for folder in folders:
        for seed in SEEDS:
            target = OUTPUT / f"{folder.name}-{preset}-{seed}.json"
            if target.is_file():
                continue
            with tempfile.TemporaryDirectory() as scratch:
                command = ["simplenet", "train", "--data", str(folder.parent)]
                command += ["--category", folder.name, "--preset", preset, "--seed", str(seed)]
                subprocess.run([*command, "--output", scratch], check=True)
                shutil.copyfile(Path(scratch) / "metrics.json", target)
    table()


def table() -> None:
    """Print mean ± standard deviation over seeds, in percent, and the seconds it took."""
    groups: dict[tuple[str, str], list[dict[str, float]]] = {}
    for path in sorted(OUTPUT.glob("*.json")):
        report = json.loads(path.read_text())
        groups.setdefault((report["category"], report["preset"]), []).append(report)
    print("| category | preset |", " | ".join(COLUMNS.values()), "| features, s | training, s |")
    print("|---|---|" + "---|" * (len(COLUMNS) + 2))
    for (category, preset), reports in groups.items():
        cells = []
        for key in COLUMNS:
            values = [100 * report[key] for report in reports]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.pstdev(values):.1f}")
        # The first run of a category computes the features, the others read the cache.
        features = max(report["seconds_features"] for report in reports)
        training = statistics.mean(report["seconds_training"] for report in reports)
        cells += [f"{features:.0f}", f"{training:.0f}"]
        print(f"| {category} | `{preset}` |", " | ".join(cells), "|")


if __name__ == "__main__":
    main(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])
