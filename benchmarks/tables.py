"""Write the tables of README.md and benchmarks.md anew from the measurements in ``results/``.

    python benchmarks/tables.py

A table stands between two comments, ``<!-- table NAME -->`` and ``<!-- end -->``. A test
holds that both pages say what this program would write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import mean
from typing import Any

from simplenet_lib.benchmark import PAPER, mean_and_deviation, measured_runs, table, with_both
from simplenet_lib.metrics import image_metrics

ROOT = Path(__file__).parent.parent
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


def single_photos() -> str:
    """Image AUROC without the good test photos that score highest: one, two and three of them."""
    lines = [
        "| category | all | without the highest good photo | two | three | highest in each run |",
        "|---|---|---|---|---|---|",
    ]
    for category in ("kolektorsdd", "screw", "weld"):
        aurocs, highest = [], []
        for run in runs_of(category, "fast"):
            kinds = dict(run["scores"])
            good = sorted(kinds.pop("good").items(), key=lambda one: -one[1])
            defects = [score for kind in kinds.values() for score in kind.values()]
            highest.append(good[0][0])
            aurocs.append(
                [
                    image_metrics(
                        [0] * (len(good) - count) + [1] * len(defects),
                        [score for _, score in good[count:]] + defects,
                    )["image_auroc"]
                    for count in range(4)
                ]
            )
        cells = [f"{100 * mean(column):.1f}" for column in zip(*aurocs, strict=True)]
        names = ", ".join(f"{name} {highest.count(name)}x" for name in dict.fromkeys(highest))
        lines.append(f"| {' | '.join([category, *cells, names])} |")
    return "\n".join(lines)


def presets() -> str:
    """Every preset on every measured category."""
    return table(measured_runs())


def published() -> str:
    """Preset ``paper`` on bottle: loss and metrics at every look at the test images."""
    lines = ["| step | loss | image AUROC | pixel AUROC | AUPRO |", "|---|---|---|---|---|"]
    for run in sorted(measured_runs("steps"), key=lambda run: run["steps"]):
        values = [f"{100 * run[name]:.1f}" for name in ("image_auroc", "pixel_auroc", "aupro")]
        lines.append(f"| {run['steps']:,} | {run['loss']:.4f} | {' | '.join(values)} |")
    return "\n".join(lines)


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


def speed() -> str:
    """Prediction and training of this library beside the bare backbone."""
    found = measured("inference")
    rows = []
    for count, words in ((1, "one image at a time"), (8, "eight at a time, for each")):
        times = found[f"batch_{count}"]["ms_an_image"]
        eager = min(times["bare_eager"], times["bare_channels_last"])
        compiled = times["bare_compiled"]
        rows += [
            (f"{words}: PyTorch", times["ours"], eager, "ms"),
            (f"{words}: compiled", times["ours_compiled"], compiled, "ms"),
            (
                f"{words}: ONNX Runtime, the backbone compiled",
                times["onnxruntime_cpu"],
                compiled,
                "ms",
            ),
        ]
    large = measured("megapixels")["ms_an_image"]
    rows.append(("JPEG photos of 12 megapixels, from file to verdict", *large.values(), "ms"))
    run, load = measured("quality"), measured("load")
    heads, plain = run["training_seconds"], run["plain_training_images_seconds"]
    rows += [
        ("five heads and threshold on the 320 photos of screw", heads, plain, "s"),
        (
            "the same, the backbone with pages and memory as the command asks for",
            heads,
            run["bare_training_images_seconds"],
            "s",
        ),
    ]
    lines = ["| | ours | bare backbone | ratio |", "|---|---|---|---|"]
    for name, ours, bare, unit in rows:
        lines.append(f"| {name} | {ours:.0f} {unit} | {bare:.0f} {unit} | {ours / bare:.2f} |")
    lines.append(
        f"| five heads and threshold while another program keeps a core busy"
        f" | {load['beside_seconds']:.0f} s | alone {load['alone_seconds']:.0f} s"
        f" | {load['ratio']:.2f} |"
    )
    return "\n".join(lines)


def peers(folder: str = "") -> str:
    """Detectors of anomalib beside this library, on the same images of one category."""
    lines = [
        "| detector | image AUROC | pixel AUROC | AUPRO | training | one image, ms | memory, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, run in measured(f"{folder}peers").items():
        if isinstance(run, dict) and "image_ms" in run:
            metrics = [
                f"{100 * run[metric]:.1f}" if metric in run else "–"
                for metric in ("image_auroc", "pixel_auroc", "aupro")
            ]
            training = f"{run['train_seconds']:.0f} s"
            if "worked out" in run.get("note", ""):
                training = f"about {run['train_seconds'] / 3600:.0f} h"
            memory = run.get("peak_gb_of_the_gpu", run["peak_gb"])
            cells = [name, *metrics, training, f"{run['image_ms']:.0f}", f"{memory:.1f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def gpu_speed() -> str:
    """Images a second on a GPU: this library, the bare backbone, PatchCore of anomalib."""
    found = measured("gpu/inference")
    rows = {
        "this library, 384 px": "ours",
        "bare backbone, 384 px": "bare_channels_last",
        "this library, compiled": "ours_compiled",
        "bare backbone, compiled": "bare_compiled",
    }
    lines = ["| images at a time | 1 | 8 | 64 |", "|---|---|---|---|"]
    for words, name in rows.items():
        times = [found[f"batch_{count}"]["ms_an_image"][name] for count in (1, 8, 64)]
        lines.append(per_second(words, times))
    for words, name in (("this library, 320 px", "simplenet"), ("PatchCore, 320 px", "patchcore")):
        run = measured("gpu/peers")[name]
        lines.append(per_second(words, [run[f"image_ms{of}"] for of in ("", "_of_8", "_of_64")]))
    return "\n".join(lines)


def gpu_training() -> str:
    """Where the time of a category goes, on two cores and on a GPU."""
    cores, gpu = measured("quality"), measured("gpu/screw-fast-0")
    lines = ["| screw, s | two cores | H100 |", "|---|---|---|"]
    for words, name, other in (
        ("features of 320 photos", "features_seconds", "seconds_features"),
        ("five heads and threshold", "training_seconds", "seconds_training"),
        ("160 test photos, metrics included", "evaluation_seconds", "seconds_evaluation"),
    ):
        lines.append(f"| {words} | {cores[name]:.0f} | {gpu[other]:.1f} |")
    return "\n".join(lines)


def per_second(words: str, milliseconds: list[float]) -> str:
    """A line of images a second."""
    return f"| {words} | {' | '.join(f'{1000 / one:,.0f}' for one in milliseconds)} |"


def tiles() -> str:
    """Small spots on large sheets: the whole sheet at once, and tiles."""
    found = measured("tiles")
    lines = [
        "| looks at | image AUROC | from highest score to spot, px | one sheet, s |",
        "|---|---|---|---|",
    ]
    for way in found["ways"]:
        name = f"tiles of {way['tile']} px" if way["tile"] else f"the sheet in {way['seen'][0]} px"
        away = ", ".join(map(str, sorted(way["from_highest_to_spot"])))
        auroc, seconds = 100 * way["image_auroc"], way["seconds_an_image"]
        lines.append(f"| {name} | {auroc:.1f} | {away} | {seconds:.0f} |")
    return "\n".join(lines)


def measured(name: str) -> dict[str, Any]:
    """What a program of this folder has measured in ``results/bench/``."""
    found: dict[str, Any] = json.loads((ROOT / "results" / "bench" / f"{name}.json").read_text())
    return found


def left_out() -> str:
    """For each data set the variant that is best on the four others, and what it is worth there."""
    runs = measured_runs("ablation")
    aurocs: dict[str, dict[str, float]] = {}
    for run in runs:
        if "changes" in run:
            aurocs.setdefault(run["variant"], {})[run["category"]] = 100 * run["image_auroc"]
    lines = [
        "| left out | best on the four others | there | on the one left out | `fast` there |",
        "|---|---|---|---|---|",
    ]
    for category in CATEGORIES:
        means = {
            name: mean(found[other] for other in CATEGORIES if other != category)
            for name, found in aurocs.items()
        }
        best = max(means, key=lambda name: means[name])
        cells = [category, best.replace("unchanged", "`fast`")]
        cells += [f"{means[best]:.2f} (`fast` {means['unchanged']:.2f})"]
        cells += [f"{aurocs[name][category]:.1f}" for name in (best, "unchanged")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


#: For each page its tables.
TABLES = {
    "README.md": {"expectations": expectations},
    "benchmarks.md": {
        "presets": presets,
        "single photos": single_photos,
        "published": published,
        "ablation": ablation,
        "left out": left_out,
        "tiles": tiles,
        "speed": speed,
        "peers": peers,
        "gpu": gpu_speed,
        "gpu training": gpu_training,
        "gpu peers": lambda: peers("gpu/"),
    },
}


def rewritten(page: str) -> str:
    """The text of a page with every table written anew."""
    text = (ROOT / page).read_text()
    for name, make in TABLES[page].items():
        pattern = rf"(<!-- table {name} -->\n).*?(<!-- end -->)"
        written = make() + "\n"
        text, count = re.subn(
            pattern, lambda found, new=written: found[1] + new + found[2], text, flags=re.S
        )
        if count != 1:
            raise SystemExit(f"{page}: {count} tables named {name}, not one.")
    return text


if __name__ == "__main__":
    for page in TABLES:
        (ROOT / page).write_text(rewritten(page))
