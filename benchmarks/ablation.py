"""How the default was found: change one thing at a time, on several data sets and seeds.

    python benchmarks/ablation.py ROOT/CATEGORY [ROOT/CATEGORY ...]

Writes one JSON a run to ``results/ablation`` and skips runs that are already
there; the unchanged preset is what ``benchmarks/results.py`` measured. Test
images pass the backbone once and are cached like training images, so a run
costs little more than training its head.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from simplenet_lib import training
from simplenet_lib.config import Config, preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import Standardise, cached_features
from simplenet_lib.localization import anomaly_map, image_score
from simplenet_lib.metrics import image_metrics, pixel_metrics
from simplenet_lib.training import cached_maps, train

SEEDS = (0, 1, 2)
OUTPUT = Path("results/ablation")

#: Name of the variant, and what it changes of preset ``fast``.
VARIANTS: dict[str, dict[str, object]] = {
    "mirrored border": {},
    "layer2 + layer3": {"layers": ("layer2", "layer3")},
    "no neighbourhood": {"neighbourhood": 1},
    "sigma 0.25": {"sigma": 0.25},
    "sigma 1": {"sigma": 1.0},
    "no BatchNorm": {"batchnorm": False},
    "learning rates / 3": {"adaptor_lr": 1e-4, "discriminator_lr": 2e-4},
    "no clipping": {},
    "not standardised": {"standardise": False},
}


def mirrored_map(scores: Tensor, size: int, smoothing: float) -> Tensor:
    """The anomaly map as it would be if the map were mirrored at its border."""
    resized = anomaly_map(scores, size, smoothing=0).numpy()
    sigma = (0, smoothing, smoothing)
    return torch.from_numpy(ndimage.gaussian_filter(resized, sigma, mode="mirror", truncate=3))


def run(folder: Path, name: str, config: Config) -> dict[str, object]:
    """Train on one category and measure the last step on its test images."""
    Standardise.LIMIT = 1e9 if name == "no clipping" else 3.0
    training.anomaly_map = mirrored_map if name == "mirrored border" else anomaly_map
    transform = make_transform(config.resize, config.crop)
    trained = train(AnomalyDataset(folder.parent, folder.name, "train", transform), config)
    test = AnomalyDataset(folder.parent, folder.name, "test", transform)
    features = cached_features(trained.model.features, test, trained.model.feature_key())
    maps = cached_maps(trained.model, features, range(len(test)))
    labels = np.array([sample.label for sample in test.samples])
    masks = [test[index]["mask"].numpy() for index in range(len(test))]
    return {
        "dataset": folder.parent.resolve().name,
        "category": folder.name,
        "variant": name,
        "seed": config.seed,
        **image_metrics(labels, image_score(maps).numpy()),
        **pixel_metrics(masks, list(maps.numpy())),
        "seconds_training": round(trained.seconds_training, 2),
        "changes": VARIANTS[name],
    }


def main(folders: list[Path]) -> None:
    """Run every variant on every folder with every seed, then print a table."""
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for folder in folders:
        for name, changes in VARIANTS.items():
            for seed in SEEDS:
                stem = f"{folder.name}-{name}-{seed}".replace(" ", "_").replace("/", "by")
                path = OUTPUT / f"{stem}.json"
                if not path.is_file():
                    report = run(folder, name, preset("fast", seed=seed, **changes))
                    path.write_text(json.dumps(report, indent=2) + "\n")
    table()


def table() -> None:
    """Print mean ± standard deviation over seeds of every variant and category, in percent."""
    reports = [json.loads(path.read_text()) for path in sorted(OUTPUT.glob("*.json"))]
    unchanged = [json.loads(path.read_text()) for path in OUTPUT.parent.glob("*-fast-*.json")]
    reports += [{**report, "variant": "fast"} for report in unchanged]
    categories = list(dict.fromkeys(report["category"] for report in reports))
    print("| variant |", " | ".join(categories), "|")
    print("|---" * (len(categories) + 1) + "|")
    for name in ("fast", *VARIANTS):
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
