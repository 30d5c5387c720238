"""Write the tables of README.md anew from the runs in ``results/``.

    python benchmarks/tables.py

A table stands between two comments, ``<!-- table NAME -->`` and ``<!-- end -->``. A test
holds that the README says what this program would write.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from simplenet_lib.benchmark import PAPER, mean_and_deviation, measured_runs, table, with_both

README = Path(__file__).parent.parent / "README.md"
#: The five development sets, hardest first, as the tables order them.
CATEGORIES = ("kolektorsdd", "screw", "weld", "grid", "bottle")


def expectations() -> str:
    """Preset ``fast`` on every measured category, beside the paper where it has a figure."""
    lines = [
        "| category | image AUROC | pixel AUROC | AUPRO | false alarms | defects found | paper |",
        "|---|---|---|---|---|---|---|",
    ]
    for category in CATEGORIES:
        runs = runs_of(category, "fast")
        if runs:
            rates = [
                mean_and_deviation([run[rate] for run in runs])
                for rate in ("false_alarm_rate", "detection_rate")
            ]
            # grid: other images stand in for its missing normal test images.
            paper = f"{PAPER[category][0]}" if category in ("screw", "bottle") else "–"
            metrics = [with_both(runs, name) for name in ("image_auroc", "pixel_auroc", "aupro")]
            lines.append(f"| {' | '.join([category, *metrics, *rates, paper])} |")
    return "\n".join(lines)


def runs_of(category: str, preset: str) -> list[dict[str, Any]]:
    """The committed runs of a preset on a category."""
    return [
        run for run in measured_runs() if run["category"] == category and run["preset"] == preset
    ]


def presets() -> str:
    """The other presets."""
    return table(run for run in measured_runs() if run["preset"] != "fast")


def ablation() -> str:
    """One change of ``fast`` a row: image AUROC / AUPRO, by category."""
    runs = measured_runs("ablation")
    names = list(dict.fromkeys(run["variant"] for run in sorted(runs, key=place)))
    lines = ["| variant | " + " | ".join(CATEGORIES) + " |", "|---" * (len(CATEGORIES) + 1) + "|"]
    rows = {"fast": [runs_of(category, "fast") for category in CATEGORIES]}
    for name in names:
        rows[name] = [
            [run for run in runs if run["category"] == category and run["variant"] == name]
            for category in CATEGORIES
        ]
    for name, columns in rows.items():
        cells = [
            " / ".join(
                mean_and_deviation([run[metric] for run in column])
                for metric in ("image_auroc", "aupro")
            )
            if column
            else "–"
            for column in columns
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def place(run: dict[str, Any]) -> tuple[bool, str]:
    """Changes of ``fast`` first, then the detectors that train no network."""
    return "changes" not in run, run["variant"]


TABLES = {"expectations": expectations, "presets": presets, "ablation": ablation}


def rewritten(text: str) -> str:
    """The text with every table written anew."""
    for name, make in TABLES.items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        written = make() + "\n"
        text, count = re.subn(
            pattern, lambda found, new=written: found[1] + new + found[2], text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"README.md: {count} tables named {name}, not one.")
    return text


if __name__ == "__main__":
    README.write_text(rewritten(README.read_text()))
