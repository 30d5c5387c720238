"""Change one thing of preset ``fast`` at a time, or compare with another detector.

    python benchmarks/ablation.py ROOT/CATEGORY [ROOT/CATEGORY ...]

Writes one JSON a run to ``results/ablation`` and skips runs that are already
there. Test images pass the backbone once and are cached like training images, so
a run costs little more than training its heads.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from simplenet_lib.baselines import PatchCore, PixelGaussian, PositionGaussian
from simplenet_lib.benchmark import compare, datasets
from simplenet_lib.config import Config, preset
from simplenet_lib.dataset import AnomalyDataset, own_part, upright_size
from simplenet_lib.features import FeatureMaps, Standardise, cached_features
from simplenet_lib.localization import Prediction, anomaly_map
from simplenet_lib.model import SimpleNet
from simplenet_lib.training import cached_maps, train
from simplenet_lib.weights import find_weights

OUTPUT = Path("results/ablation")
MARGIN = 32  # pixels that count as the border

#: Name of the variant, and what it changes of preset ``fast``.
VARIANTS: dict[str, dict[str, Any]] = {
    "unchanged": {},
    "one head": {"heads": 1},
    "forty heads": {"heads": 40},
    "margin loss": {"loss": "margin"},
    "zeros at the border": {"border": "zeros"},
    "both layers alike": {"fine_scale": 1.0},
    "all positions equally often": {"emphasis": 0.0},
    "one unit for all positions": {"position_units": False, "bound": 0.0},
    "no bound": {"bound": 0.0},
    "seen in a square": {"ratio": 1.0},
    "320 pixels": {"resize": 320, "crop": 320, "smoothing": 5.0},
    "no neighbourhood": {"neighbourhood": 1},
    "no averaging": {"averaging": 0.0},
    "half the noise": {"sigma": 0.15},
    "twice the noise": {"sigma": 0.6},
    "half the width": {"adaptor_channels": 64, "hidden_channels": 64},
    "twice the width": {"adaptor_channels": 256, "hidden_channels": 256},
    "half the smoothing": {"smoothing": 4.0},
}
#: Detectors that train no network, on the features that ``fast`` sees, or on the image itself.
BASELINES: dict[str, Callable[[int], Any]] = {
    "pixel mean and variance": lambda seed: PixelGaussian(),
    "Gaussian per position": lambda seed: PositionGaussian(seed=seed),
    # The features are averaged over neighbourhoods already.
    "PatchCore": lambda seed: PatchCore(neighbourhood=1, seed=seed),
}


def report(
    folder: Path, name: str, config: Config, test: AnomalyDataset, maps: Tensor
) -> dict[str, object]:
    """What is written of a run; ``maps`` are the anomaly maps of the test images."""
    predictions = []
    for index, (sample, map_) in enumerate(zip(test.samples, maps.numpy(), strict=True)):
        own = own_part(*upright_size(sample.image), config)
        map_, mask = map_[own], test[index]["mask"].numpy()[own]
        score = float(map_.max())
        predictions.append(Prediction(sample, score, score > 1, lambda map_=map_: map_, mask, []))
    return {
        "dataset": folder.parent.resolve().name,
        "category": folder.name,
        "variant": name,
        "seed": config.seed,
        **border_shares([p.map for p in predictions if not p.sample.label]),
        **compare(predictions),
    }


def border_shares(maps: list[np.ndarray[Any, Any]]) -> dict[str, float]:
    """How often the highest score of a normal image lies at its border, and the border's area.

    The two are equal for a detector that treats the border as it treats the middle.
    """
    maxima, areas = [], []
    for map_ in maps:
        inside = np.zeros(map_.shape, dtype=bool)
        inside[MARGIN:-MARGIN, MARGIN:-MARGIN] = True
        maxima.append(not inside.flat[map_.argmax()])
        areas.append(1 - inside.mean())
    return {
        "border_share_of_maxima": round(float(np.mean(maxima)), 3),
        "border_share_of_area": round(float(np.mean(areas)), 3),
    }


def run_variant(folder: Path, name: str, config: Config) -> dict[str, object]:
    """Train on one category and measure the last step on its test images."""
    normal, test, config = datasets(folder.parent, folder.name, config)
    assert test is not None
    trained = train(normal, config)
    features = cached_features(trained.model.features, test, trained.model.feature_key())
    maps = cached_maps(trained.model, features, range(len(test)))
    return {
        **report(folder, name, config, test, maps),
        "seconds_training": round(trained.seconds_training, 2),
        "changes": VARIANTS[name],
    }


class Standardised:
    """Cached features as a sequence of standardised maps (C, h, w), made when asked for."""

    def __init__(self, features: FeatureMaps, standardise: Standardise) -> None:
        self.features, self.standardise = features, standardise

    def __len__(self) -> int:
        return len(self.features)

    def __getitem__(self, index: int) -> Tensor:
        if not 0 <= index < len(self):
            raise IndexError(index)
        values = torch.from_numpy(self.features[index].copy()).float()
        return self.standardise(values).permute(2, 0, 1)


def run_baseline(folder: Path, name: str, config: Config) -> dict[str, object]:
    """Fit a baseline on all normal images of a category and measure it on its test images."""
    normal, test, config = datasets(folder.parent, folder.name, config)
    assert test is not None
    detector = BASELINES[name](config.seed)
    seen: Any
    asked: Any
    if name.startswith("pixel"):
        seen, asked = ([item["image"] for item in split] for split in (normal, test))
    else:
        model = SimpleNet(config, find_weights(config.backbone))
        features = cached_features(model.features, normal, model.feature_key())
        model.standardise.fit(features)
        seen = Standardised(features, model.standardise)
        asked = Standardised(
            cached_features(model.features, test, model.feature_key()), model.standardise
        )
    start = time.perf_counter()
    detector.fit(seen)
    fitted = time.perf_counter()
    scores = torch.stack([detector.score_map(values) for values in asked])
    scored = time.perf_counter()
    # A distance has no 0 for normal: its mean takes that place outside of the map.
    maps = anomaly_map(scores - scores.mean(), config.seen, config.smoothing)
    return {
        **report(folder, name, config, test, maps),
        "seconds_training": round(fitted - start, 2),
        "ms_an_image_beyond_features": round(1000 * (scored - fitted) / len(test), 1),
    }


def write(path: Path, found: dict[str, object]) -> None:
    """Write one result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")


def main(folders: list[Path], seeds: tuple[int, ...] = (0,)) -> None:
    """Run every variant and baseline on every folder with every seed."""
    for folder in folders:
        for name in (*BASELINES, *VARIANTS):
            for seed in seeds:
                path = OUTPUT / f"{folder.name}-{name.replace(' ', '_')}-{seed}.json"
                if not path.is_file():
                    run = run_baseline if name in BASELINES else run_variant
                    found = run(folder, name, preset("fast", seed=seed, **VARIANTS.get(name, {})))
                    write(path, found)


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
