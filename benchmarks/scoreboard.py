"""The scores of the book's detectors on the 60 test nuts: the board that closes every chapter.

    python benchmarks/scoreboard.py

Writes ``results/nuts/scoreboard.json``: the labels of the test images, and for each detector
their image scores, in the order in which the chapters build them. One run, seed 0; the same
settings as in the chapters (1: pixels at 256 px; 2: layer2 and layer3 at 256 px; 7: one head
with the margin loss at 256 px; 8: preset ``fast`` as it is).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from simplenet_lib.baselines import PixelGaussian
from simplenet_lib.benchmark import datasets
from simplenet_lib.config import Config, preset
from simplenet_lib.features import Standardise, cache_folder
from simplenet_lib.localization import predict
from simplenet_lib.model import SimpleNet
from simplenet_lib.synthetic import generate
from simplenet_lib.training import train
from simplenet_lib.weights import find_weights

OUTPUT = Path("results/nuts/scoreboard.json")
MEMORY = 2000  # vectors of normal positions

#: What chapter 7 trains: one head, the paper's loss, no treatment of the border.
ONE_HEAD = preset(
    "fast",
    resize=256,
    crop=256,
    border="zeros",
    neighbourhood=1,
    adaptor_channels=256,
    hidden_channels=256,
    fine_scale=1.0,
    sigma=0.5,
    emphasis=0.0,
    loss="margin",
    heads=1,
    steps=100,
    batch_size=2048,
    averaging=0.0,
    bound=0.0,
    smoothing=5.0,
)


def statistics(train_maps: Tensor, test_maps: Tensor) -> list[float]:
    """Highest value of chapter 1's map, for maps (N, C, h, w)."""
    judge = PixelGaussian()
    judge.fit(list(train_maps))
    return [float(judge.score_map(map_).max()) for map_ in test_maps]


def neighbours(train_features: Tensor, test_features: Tensor) -> list[float]:
    """Largest distance to the nearest of some standardised normal vectors, as in chapter 2.

    Features are (N, h, w, C).
    """
    standardise = Standardise(train_features.shape[-1])
    standardise.fit(train_features.half().numpy())
    vectors = standardise(train_features).flatten(0, 2)
    order = torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))
    memory = vectors[order[:MEMORY]]
    return [
        float(torch.cdist(standardise(image).flatten(0, 1), memory).amin(dim=1).max())
        for image in test_features
    ]


def trained(root: Path, config: Config) -> list[float]:
    """Image scores of a detector trained with ``config``."""
    normal, test, config = datasets(root, "nut", config)
    assert test is not None
    model = train(normal, config).model
    return [prediction.score for prediction in predict(model, test)]


def main() -> None:
    """Measure every detector and write the board."""
    root = generate(cache_folder() / "synthetic")
    normal, test, _ = datasets(root, "nut", ONE_HEAD)
    assert test is not None
    pixels = [
        torch.stack([split[i]["image"] for i in range(len(split))]) for split in (normal, test)
    ]
    backbone = SimpleNet(ONE_HEAD, find_weights(ONE_HEAD.backbone)).features
    with torch.inference_mode():
        features = [backbone(images) for images in pixels]
    rows = {
        "pixel statistics": statistics(*pixels),
        "position statistics": statistics(*(maps.permute(0, 3, 1, 2) for maps in features)),
        "neighbours": neighbours(*features),
        "one head": trained(root, ONE_HEAD),
        "committee": trained(root, preset("fast")),
    }
    board = {
        "labels": [sample.label for sample in test.samples],
        "scores": {name: [round(score, 4) for score in scores] for name, scores in rows.items()},
    }
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(json.dumps(board) + "\n")


if __name__ == "__main__":
    main()
