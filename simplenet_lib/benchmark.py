"""Chapter 11: measured runs on many categories, and what others have published."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from simplenet_lib.config import Config, SimpleNetError

#: Image AUROC and pixel AUROC of SimpleNet on MVTec AD in percent, as the paper
#: states them (table 1); transcribed from secondary sources.
PAPER = {
    "carpet": (99.7, 98.2),
    "grid": (99.7, 98.8),
    "leather": (100.0, 99.2),
    "tile": (99.8, 97.0),
    "wood": (100.0, 94.5),
    "bottle": (100.0, 98.0),
    "cable": (99.9, 97.6),
    "capsule": (97.7, 98.9),
    "hazelnut": (100.0, 97.9),
    "metal_nut": (100.0, 98.8),
    "pill": (99.0, 98.6),
    "screw": (98.2, 99.3),
    "toothbrush": (99.7, 98.5),
    "transistor": (100.0, 97.6),
    "zipper": (99.9, 98.9),
}

#: Mean image AUROC and pixel AUROC over the 15 categories, in percent, and which
#: state of the network they are from; transcribed from secondary sources.
PUBLISHED_MEANS = {
    "SimpleNet, paper": (99.6, 98.1, "best epoch on the test set"),
    "SimpleNet, an independent rerun of the published code": (
        99.63,
        97.87,
        "best epoch on the test set",
    ),
    "SuperSimpleNet": (98.4, 97.5, "last epoch"),
}


def measured_runs(kind: str = "") -> list[dict[str, Any]]:
    """Read the measured runs that come with this library, sorted by file name.

    Parameters
    ----------
    kind : str
        Folder in ``results/``: ``""`` for whole runs of a preset, ``"ablation"``,
        ``"steps"``, ``"photos"`` or ``"long"``.
    """
    # An installed library carries them inside; in a checkout they lie beside it.
    package = Path(__file__).parent
    inside = package / "results"
    return read_runs((inside if inside.is_dir() else package.parent / "results") / kind)


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Read every run in ``folder``, sorted by file name.

    Raises
    ------
    SimpleNetError
        If a file is not what ``simplenet benchmark`` writes.
    """
    return [read_run(path) for path in sorted(folder.glob("*.json"))]


def read_run(path: Path) -> dict[str, Any]:
    """Read one run; see :func:`read_runs`."""
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SimpleNetError(f"{path}: not a readable run ({error}).") from error
    if not isinstance(run, dict) or not {"category", "seed"} <= run.keys():
        raise SimpleNetError(f"{path}: not a run of this program. Move it away.")
    return run


def is_done(path: Path, dataset: str, category: str, config: Config) -> bool:
    """Whether ``path`` holds this very run already.

    Raises
    ------
    SimpleNetError
        If it holds another run: of another data set or configuration.
    """
    if not path.is_file():
        return False
    run = read_run(path)
    wanted = [dataset, category, json.loads(config.to_json())]
    if [run.get("dataset"), run.get("category"), run.get("config")] != wanted:
        raise SimpleNetError(
            f"{path}: a run of another data set or configuration. Move it away, or choose"
            " another output folder."
        )
    return True


def mean_and_deviation(values: Sequence[float]) -> str:
    """Shares between 0 and 1 as percent, ``"99.8 ± 0.2"``; one value has no deviation."""
    percent = [100 * value for value in values]
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{statistics.mean(percent):.1f} ± {statistics.pstdev(percent):.1f}"


def table(runs: Iterable[dict[str, Any]]) -> str:
    """Mean ± standard deviation over seeds, one row a category and preset, as Markdown.

    Metrics are in percent. The seconds of the features are the highest of a
    row: later seeds read them from the cache.
    """
    columns = {
        "image_auroc": "image AUROC",
        "image_ap": "image AP",
        "image_f1max": "image F1-max",
        "pixel_auroc": "pixel AUROC",
        "aupro": "AUPRO",
    }
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        groups.setdefault((run["category"], run["preset"]), []).append(run)
    heading = ["category", "preset", "seeds", *columns.values(), "features, s", "training, s"]
    lines = [heading, ["---"] * len(heading)]
    for (category, preset), group in groups.items():
        row = [category, f"`{preset}`", str(len(group))]
        for key in columns:
            values = [run[key] for run in group if key in run]
            row.append(mean_and_deviation(values) if values else "no masks")
        features = max(run["seconds_features"] for run in group)
        training = statistics.mean(run["seconds_training"] for run in group)
        lines.append([*row, f"{features:.0f}", f"{training:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
