"""The default preset end to end, with the real pretrained weights."""

from pathlib import Path

import pytest

from simplenet_lib.benchmark import datasets
from simplenet_lib.config import preset
from simplenet_lib.localization import evaluate
from simplenet_lib.synthetic import generate
from simplenet_lib.training import train
from simplenet_lib.weights import Weights


def test_default_finds_synthetic_defects(
    pretrained: Weights, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIMPLENET_CACHE", str(tmp_path / "cache"))
    data = generate(
        tmp_path / "data", categories=("nut",), train=40, test_good=8, test_per_defect=2
    )
    # The default, but for half of its steps: more of them change little here.
    normal, test, config = datasets(data, "nut", preset("fast", steps=200))
    assert test is not None and config.seen == (384, 384)
    trained = train(normal, config, progress=False)
    metrics, predictions = evaluate(trained.model, test, progress=False)
    # A detector that learned nothing has 0.5; the per-pixel baseline stays below 0.80.
    assert metrics["image_auroc"] > 0.95
    assert metrics["pixel_auroc"] > 0.95
    # From 40 photos on one odd photo cannot set the threshold. Every defect is above it, and
    # none is taken for other light, focus or product.
    assert all(p.anomalous for p in predictions if p.sample.label)
    assert not any(p.unfamiliar for p in predictions)
    history = trained.history
    assert history.loss[0] > 1.3  # the trivial solution costs 2 log 2 = 1.39
    assert history.loss[-10:].mean() < 1.0
    assert history.normal[-10:].mean() > 0.5 and history.noisy[-10:].mean() > 0.5
