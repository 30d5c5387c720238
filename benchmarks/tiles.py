"""Small defects in large photos: the whole photo at once against overlapping tiles.

    python benchmarks/tiles.py

Draws sheets of 4,000 x 4,000 pixels, some with one spot of 12 pixels, trains preset ``fast`` on
the good ones with and without ``tile``, and writes ``results/bench/tiles.json``. Needs about 6 GB
of disk and 10 minutes.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from simplenet_lib.benchmark import datasets
from simplenet_lib.config import preset
from simplenet_lib.localization import predict
from simplenet_lib.training import train

OUTPUT = Path("results/bench/tiles.json")
SIDE, SPOT, TILE = 4000, 12, 640
CONTRAST = 30  # grey levels by which a spot is darker
COUNTS = {"train/good": 6, "test/good": 3, "test/spot": 6}


def sheet(rng: np.random.Generator, spot: bool) -> tuple[Image.Image, Image.Image]:
    """A sheet of grained metal under uneven light, and the mask of its spot."""
    grain = ndimage.gaussian_filter(rng.normal(size=(SIDE, SIDE)), (0.7, 2.5))
    light = ndimage.zoom(rng.normal(size=(5, 5)), SIDE / 5, order=3)
    grey = 128 + 8 * grain / grain.std() + 5 * light
    mask = np.zeros((SIDE, SIDE), dtype=np.uint8)
    if spot:
        y, x = rng.integers(SPOT, SIDE - SPOT, size=2)
        rows, columns = np.ogrid[:SIDE, :SIDE]
        mask[(rows - y) ** 2 + (columns - x) ** 2 <= (SPOT / 2) ** 2] = 255
        grey = grey - CONTRAST * ndimage.gaussian_filter((mask > 0).astype(float), 1)
    return Image.fromarray(grey.clip(0, 255).astype(np.uint8)), Image.fromarray(mask)


def draw(root: Path) -> None:
    """Draw the category ``sheet`` in the layout of MVTec AD."""
    rng = np.random.default_rng(0)
    for folder, count in COUNTS.items():
        for number in range(count):
            image, mask = sheet(rng, spot=folder == "test/spot")
            path = root / "sheet" / folder / f"{number:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, compress_level=1)
            if folder == "test/spot":
                path = root / "sheet/ground_truth/spot" / f"{number:03d}_mask.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                mask.save(path, compress_level=1)


def measure(root: Path, tile: int) -> dict[str, object]:
    """Train and judge the test sheets."""
    normal, test, config = datasets(root, "sheet", replace(preset("fast"), tile=tile))
    assert test is not None
    trained = train(normal, config)
    start = time.perf_counter()
    predictions = list(predict(trained.model, test))
    seconds = (time.perf_counter() - start) / len(test)
    away = []
    for p in predictions:
        if p.sample.label:
            map_ = p.map
            peak = np.unravel_index(map_.argmax(), map_.shape)
            pixels = np.argwhere(p.mask) - peak
            away.append(round(float(np.hypot(*pixels.T).min()) * SIDE / map_.shape[0]))
    defects = [bool(p.sample.label) for p in predictions]
    return {
        "tile": tile,
        "seen": config.seen,
        "scores": {
            kind: [round(p.score, 3) for p in predictions if p.sample.defect == kind]
            for kind in ("good", "spot")
        },
        "image_auroc": roc_auc_score(defects, [p.score for p in predictions]),
        "from_highest_to_spot": away,  # pixels of the sheet
        "seconds_features": round(trained.seconds_features, 1),
        "seconds_training": round(trained.seconds_training, 1),
        "seconds_an_image": round(seconds, 1),
    }


def main() -> None:
    """Measure both ways and write the result."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SIMPLENET_CACHE"] = str(Path(folder, "cache"))
        draw(Path(folder))
        found = {
            "side": SIDE,
            "spot": SPOT,
            "contrast": CONTRAST,
            **{f"{kind} sheets": count for kind, count in COUNTS.items()},
            "ways": [measure(Path(folder), tile) for tile in (0, TILE)],
        }
    OUTPUT.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
