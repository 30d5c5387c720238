"""Change one thing of preset ``fast`` at a time, or compare with another detector.

    python benchmarks/ablation.py ROOT/CATEGORY [ROOT/CATEGORY ...]

Writes one JSON a run to ``results/ablation`` and skips runs that are already
there; the unchanged preset is what ``simplenet benchmark`` measured. Test
images pass the backbone once and are cached like training images, so a run
costs little more than training its head.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor, nn

import simplenet_lib.model
from simplenet_lib import training
from simplenet_lib.adaptor import Adaptor
from simplenet_lib.baselines import NearestNeighbour, PixelGaussian, PositionGaussian
from simplenet_lib.config import Config, preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import FeatureMaps, Standardise, cached_features
from simplenet_lib.localization import anomaly_map, image_score
from simplenet_lib.loss import margin_loss
from simplenet_lib.metrics import image_metrics, pixel_metrics
from simplenet_lib.model import SimpleNet
from simplenet_lib.training import cached_maps, train
from simplenet_lib.weights import find_weights

SEEDS = (0, 1, 2)
OUTPUT = Path("results/ablation")

#: Name of the variant, and what it changes of preset ``fast``.
VARIANTS: dict[str, dict[str, Any]] = {
    "mirrored border": {},
    "three layers": {"layers": ("layer2", "layer1", "layer3")},
    "neighbourhood of 3": {"neighbourhood": 3},
    "256 pixels": {"resize": 256, "crop": 256},
    "head twice as wide": {"adaptor_channels": 512, "hidden_channels": 512},
    "sigma 0.25": {"sigma": 0.25},
    "sigma 1": {"sigma": 1.0},
    "no BatchNorm": {"batchnorm": False},
    "learning rates / 3": {"adaptor_lr": 1e-4, "discriminator_lr": 2e-4},
    "no clipping": {},
    "not standardised": {"standardise": False},
    "no adaptor": {"adaptor_channels": 1536},  # as wide as the features it hands on
    "frozen adaptor": {"adaptor_lr": 0.0},
    "two-layer adaptor": {},
    "cross-entropy": {},
}
#: Detectors that train no network, on what `fast` gives to its head, or on the image itself.
BASELINES = {
    "pixel mean and variance": PixelGaussian,
    "Gaussian per position": PositionGaussian,
    "nearest neighbour": NearestNeighbour,
}


def mirrored_map(scores: Tensor, size: int, smoothing: float) -> Tensor:
    """The anomaly map as it would be if the map were mirrored at its border."""
    resized = anomaly_map(scores, size, smoothing=0).numpy()
    sigma = (0, smoothing, smoothing)
    return torch.from_numpy(ndimage.gaussian_filter(resized, sigma, mode="mirror", truncate=3))


class NoAdaptor(nn.Module):
    """Hands features on; its one parameter is for the optimiser, which refuses to have none."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        assert in_channels == out_channels
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """Return features (N, C, h, w) as they are."""
        return features


class TwoLayerAdaptor(nn.Sequential):
    """1x1 convolution, LeakyReLU, 1x1 convolution."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(
            Adaptor(in_channels, out_channels),
            nn.LeakyReLU(0.2),
            Adaptor(out_channels, out_channels),
        )


def cross_entropy(normal: Tensor, noisy: Tensor, margin: float) -> Tensor:
    """Cross-entropy of a score as the logit of "normal"; it has no margin."""
    return F.softplus(-normal).mean() + F.softplus(noisy).mean()


def splits(folder: Path, config: Config) -> tuple[AnomalyDataset, AnomalyDataset]:
    """The training and test split of a category."""
    transform = make_transform(config.resize, config.crop)
    train_split = AnomalyDataset(folder.parent, folder.name, "train", transform)
    return train_split, AnomalyDataset(folder.parent, folder.name, "test", transform)


def report(
    folder: Path, name: str, seed: int, test: AnomalyDataset, maps: Tensor
) -> dict[str, object]:
    """What is written of a run; ``maps`` are the anomaly maps of the test images."""
    labels = np.array([sample.label for sample in test.samples])
    masks = [test[index]["mask"].numpy() for index in range(len(test))]
    return {
        "dataset": folder.parent.resolve().name,
        "category": folder.name,
        "variant": name,
        "seed": seed,
        **image_metrics(labels, image_score(maps).numpy()),
        **pixel_metrics(masks, list(maps.numpy())),
    }


def run_variant(folder: Path, name: str, config: Config) -> dict[str, object]:
    """Train on one category and measure the last step on its test images."""
    Standardise.LIMIT = 1e9 if name == "no clipping" else 3.0
    training.anomaly_map = mirrored_map if name == "mirrored border" else anomaly_map
    training.margin_loss = cross_entropy if name == "cross-entropy" else margin_loss
    adaptors = {"no adaptor": NoAdaptor, "two-layer adaptor": TwoLayerAdaptor}
    simplenet_lib.model.Adaptor = adaptors.get(name, Adaptor)
    normal, test = splits(folder, config)
    trained = train(normal, config)
    features = cached_features(trained.model.features, test, trained.model.feature_key())
    maps = cached_maps(trained.model, features, range(len(test)))
    return {
        **report(folder, name, config.seed, test, maps),
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
        return self.standardise(values.permute(2, 0, 1))


def run_baseline(folder: Path, name: str, config: Config) -> dict[str, object]:
    """Fit a baseline on all normal images of a category and measure it on its test images."""
    normal, test = splits(folder, config)
    detector = BASELINES[name]() if name.startswith("pixel") else BASELINES[name](seed=config.seed)
    if name.startswith("pixel"):
        seen, asked = ([item["image"] for item in split] for split in (normal, test))
    else:
        model = SimpleNet(config, find_weights(config.backbone))
        seen, asked = (
            Standardised(
                cached_features(model.features, split, model.feature_key()), model.head.standardise
            )
            for split in (normal, test)
        )
        model.head.standardise.fit(seen.features, range(len(normal)))
    detector.fit(seen)
    scores = torch.stack([detector.score_map(values) for values in asked])
    maps = anomaly_map(scores, config.crop, config.smoothing)
    return report(folder, name, config.seed, test, maps)


def main(folders: list[Path]) -> None:
    """Run every variant and baseline on every folder with every seed, then print a table."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for name in (*BASELINES, *VARIANTS):
            for seed in SEEDS[:1] if name.startswith("pixel") else SEEDS:
                stem = f"{folder.name}-{name}-{seed}".replace(" ", "_").replace("/", "by")
                path = OUTPUT / f"{stem}.json"
                if not path.is_file():
                    run = run_baseline if name in BASELINES else run_variant
                    found = run(folder, name, preset("fast", seed=seed, **VARIANTS.get(name, {})))
                    path.write_text(json.dumps(found, indent=2) + "\n")
    table()


def table() -> None:
    """Print mean ± standard deviation over seeds of every variant and category, in percent."""
    reports = [json.loads(path.read_text()) for path in sorted(OUTPUT.glob("*.json"))]
    unchanged = [json.loads(path.read_text()) for path in OUTPUT.parent.glob("*-fast-*.json")]
    reports += [{**found, "variant": "fast"} for found in unchanged]
    categories = list(dict.fromkeys(found["category"] for found in reports))
    print("| variant |", " | ".join(categories), "|")
    print("|---" * (len(categories) + 1) + "|")
    for name in ("fast", *VARIANTS, *BASELINES):
        cells = []
        for category in categories:
            rows = [r for r in reports if (r["variant"], r["category"]) == (name, category)]
            pair = []
            for key in ("image_auroc", "pixel_auroc"):
                values = 100 * np.array([row[key] for row in rows])
                pair.append(f"{values.mean():.1f} ± {values.std():.1f}" if rows else "-")
            cells.append(" / ".join(pair))
        print(f"| {name} |", " | ".join(cells), "|")


if __name__ == "__main__":
    main([Path(argument) for argument in sys.argv[1:]])
