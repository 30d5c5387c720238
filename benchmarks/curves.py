"""Preset ``fast`` over the number of photos it is trained on.

    python benchmarks/curves.py ROOT/CATEGORY [ROOT/CATEGORY ...]

Writes one JSON a run to ``results/photos`` and skips runs that are already there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from ablation import report

from simplenet_lib.benchmark import datasets
from simplenet_lib.config import preset
from simplenet_lib.features import FeatureMaps, cached_features
from simplenet_lib.model import SimpleNet
from simplenet_lib.training import cached_maps, calibrate, fit, split_images
from simplenet_lib.weights import find_weights

OUTPUT = Path("results/photos")
PHOTOS = (5, 10, 20, 50, 100)
SEEDS = (0, 1, 2)


def chosen(features: FeatureMaps, count: int, seed: int) -> FeatureMaps:
    """The cached features of ``count`` images drawn at random."""
    order = np.random.default_rng(seed).permutation(len(features))[:count]
    return FeatureMaps(
        [features[int(image)] for image in order],
        features.descriptions[order],
        [features.digests[image] for image in order],
    )


def main(folders: list[Path]) -> None:
    """Make the runs that are missing."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        normal, test, config = datasets(folder.parent, folder.name, preset("fast"))
        assert test is not None
        for seed in SEEDS:
            for count in (*(n for n in PHOTOS if n < len(normal)), len(normal)):
                path = OUTPUT / f"{folder.name}-{count}-{seed}.json"
                if path.is_file():
                    continue
                seeded = preset("fast", seed=seed, ratio=config.ratio)
                model = SimpleNet(seeded, find_weights(config.backbone))
                key = model.feature_key()
                features = chosen(cached_features(model.features, normal, key), count, seed)
                folds = split_images(count, seeded.heads, seed)
                fit(model.heads, model.standardise, features, folds, seeded)
                calibrate(model.eval(), features, folds)
                asked = cached_features(model.features, test, key)
                maps = cached_maps(model, asked, range(len(test)))
                found = {"photos": count, **report(folder, "fast", seed, test, maps)}
                path.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
