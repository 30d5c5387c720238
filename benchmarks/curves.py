"""Preset ``fast`` over the number of photos it is trained on; any preset over its steps.

    python benchmarks/curves.py photos ROOT/CATEGORY [ROOT/CATEGORY ...]
    python benchmarks/curves.py steps PRESET ROOT/CATEGORY [ROOT/CATEGORY ...]

Writes one JSON a run to ``results/photos``, one JSON a look to ``results/steps``, and skips
what is already there. A training of many steps goes on where it was stopped. The last look
is the result; what the others show of the test images must not choose one of them.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
from ablation import report, write

from simplenet_lib.benchmark import datasets
from simplenet_lib.config import preset
from simplenet_lib.features import FeatureMaps, cached_features
from simplenet_lib.model import SimpleNet
from simplenet_lib.training import cached_maps, calibrate, fit, split_images
from simplenet_lib.weights import find_weights

OUTPUT = Path("results")
LOOKS = 8  # at equal distances
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


def over_photos(folders: list[Path]) -> None:
    """Make the runs that are missing."""
    for folder in folders:
        normal, test, config = datasets(folder.parent, folder.name, preset("fast"))
        assert test is not None
        for seed in SEEDS:
            for count in (*(n for n in PHOTOS if n < len(normal)), len(normal)):
                path = OUTPUT / "photos" / f"{folder.name}-{count}-{seed}.json"
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
                write(path, found)


def over_steps(name: str, folders: list[Path], seed: int = 0) -> None:
    """Train step after step, and look at the test images now and then."""
    for folder in folders:
        normal, test, config = datasets(folder.parent, folder.name, preset(name, seed=seed))
        assert test is not None
        model = SimpleNet(config, find_weights(config.backbone))
        key = model.feature_key()
        features, asked = (cached_features(model.features, split, key) for split in (normal, test))
        folds = split_images(len(normal), config.heads, seed)
        state = OUTPUT / "steps" / f"{folder.name}-{name}-{seed}.training.safetensors"
        for steps in range(config.steps // LOOKS, config.steps + 1, config.steps // LOOKS):
            path = OUTPUT / "steps" / f"{folder.name}-{name}-{steps}-{seed}.json"
            if path.is_file():
                continue
            until = replace(config, steps=steps)
            history = fit(
                model.heads, model.standardise, features, folds, until, state, model.identity()
            )
            calibrate(model.eval(), features, folds)
            maps = cached_maps(model, asked, range(len(test)))
            found = report(folder, name, seed, test, maps)
            loss = history.loss[-100:].mean().item()
            write(path, {"steps": steps, "loss": loss, **found})


if __name__ == "__main__":
    if sys.argv[1] == "photos":
        over_photos([Path(argument) for argument in sys.argv[2:]])
    else:
        over_steps(sys.argv[2], [Path(argument) for argument in sys.argv[3:]])
