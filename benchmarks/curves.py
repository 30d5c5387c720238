"""Two curves of preset ``fast``: over the steps of a training, and over the number of photos.

    python benchmarks/curves.py steps|photos ROOT/CATEGORY [ROOT/CATEGORY ...]

Writes one JSON a run to ``results/steps`` or ``results/photos`` and skips runs
that are already there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from ablation import SEEDS, splits

from simplenet_lib import training
from simplenet_lib.config import preset
from simplenet_lib.features import cached_features
from simplenet_lib.localization import image_score, threshold
from simplenet_lib.metrics import image_metrics, pixel_metrics
from simplenet_lib.model import SimpleNet
from simplenet_lib.training import cached_maps, fit, split_images
from simplenet_lib.weights import find_weights

OUTPUT = Path("results")
EVERY, STEPS = 20, 200
PHOTOS = (5, 10, 20, 50, 100)


class Category:
    """One category with the cached features of both splits."""

    def __init__(self, folder: Path) -> None:
        model = untrained(seed=0)
        self.normal, self.test = splits(folder, model.config)
        self.features, self.test_features = (
            cached_features(model.features, split, model.feature_key())
            for split in (self.normal, self.test)
        )
        self.labels = np.array([sample.label for sample in self.test.samples])
        self.masks = [self.test[index]["mask"].numpy() for index in range(len(self.test))]

    def test_maps(self, model: SimpleNet) -> torch.Tensor:
        """Anomaly maps of the test images; the head is then back in training."""
        model.eval()
        maps = cached_maps(model, self.test_features, range(len(self.test)))
        model.train()
        return maps


def untrained(seed: int, **changes: object) -> SimpleNet:
    """A model of preset ``fast`` before its training."""
    config = preset("fast", seed=seed, **changes)
    return SimpleNet(config, find_weights(config.backbone))


def steps(category: Category, seed: int) -> dict[str, object]:
    """Measure the test images every few steps: what nobody should choose by."""
    model = untrained(seed, steps=STEPS)
    training_images, _ = split_images(len(category.normal), model.config.holdout, seed)
    rows = []

    def measure(path, head, optimizers, curves, step, identity):  # type: ignore[no-untyped-def]
        maps = category.test_maps(model)
        found = image_metrics(category.labels, image_score(maps).numpy())
        found |= pixel_metrics(category.masks, list(maps.numpy()))
        rows.append({"step": step, **found})

    training.CHECKPOINT_EVERY, training._keep = EVERY, measure
    fit(model.head, category.features, training_images, model.config, Path("never written"))
    return {"steps": rows}


def photos(category: Category, seed: int, count: int) -> dict[str, object]:
    """Train on ``count`` normal photos drawn at random, the threshold's photos among them."""
    model = untrained(seed)
    order = np.random.default_rng(seed).permutation(len(category.normal))[:count]
    train_at, held_out_at = split_images(len(order), model.config.holdout, seed)
    fit(model.head, category.features, sorted(order[train_at].tolist()), model.config)
    model.eval()
    held_out = cached_maps(model, category.features, order[held_out_at].tolist())
    limit = threshold(image_score(held_out), model.config.quantile)
    scores = image_score(category.test_maps(model)).numpy()
    return {
        "photos": len(order),
        **image_metrics(category.labels, scores),
        "false_alarm_rate": float((scores[category.labels == 0] > limit).mean()),
        "detection_rate": float((scores[category.labels == 1] > limit).mean()),
    }


def main(kind: str, folders: list[Path]) -> None:
    """Make the runs that are missing."""
    for folder in folders:
        category = Category(folder)
        total = len(category.normal)
        counts = [0] if kind == "steps" else [*(n for n in PHOTOS if n < total), total]
        for seed in SEEDS:
            for count in counts:
                suffix = f"-{count}" if kind == "photos" else ""
                path = OUTPUT / kind / f"{folder.name}{suffix}-{seed}.json"
                if path.is_file():
                    continue
                found = steps(category, seed) if kind == "steps" else photos(category, seed, count)
                head = {"dataset": folder.parent.resolve().name, "category": folder.name}
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(json.dumps({**head, "seed": seed, **found}, indent=2) + "\n")


if __name__ == "__main__":
    main(sys.argv[1], [Path(argument) for argument in sys.argv[2:]])
