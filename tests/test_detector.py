"""The default preset end to end, with the real pretrained weights."""

from pathlib import Path

import pytest

from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.localization import evaluate
from simplenet_lib.synthetic import generate
from simplenet_lib.training import train
from simplenet_lib.weights import Weights


def test_default_finds_synthetic_defects(
    pretrained: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMPLENET_CACHE", str(tmp_path / "cache"))
    data = generate(
        tmp_path / "data", categories=("nut",), train=40, test_good=12, test_per_defect=4
    )
    config = preset("fast")
    transform = make_transform(config.resize, config.crop)
    trained = train(AnomalyDataset(data, "nut", "train", transform), config, progress=False)
    test = AnomalyDataset(data, "nut", "test", transform)
    metrics, _ = evaluate(trained.model, test, progress=False)
    # A detector that learned nothing has 0.5; the per-pixel baseline stays below 0.80.
    assert metrics["image_auroc"] > 0.95
    assert metrics["pixel_auroc"] > 0.95
    history = trained.history
    assert history.loss[0] > 0.8  # the trivial solution costs 2m = 1
    assert history.loss[-10:].mean() < 0.3
    assert history.normal[-10:].mean() > 0.5 and history.noisy[-10:].mean() > 0.5
