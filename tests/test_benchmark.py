"""What is measured and published: a run and its report, files of runs, and their table."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import roc_auc_score
from torchvision.models import resnet18

from simplenet_lib import benchmark
from simplenet_lib.benchmark import (
    PAPER,
    PUBLISHED_MEANS,
    Run,
    can_be_evaluated,
    datasets,
    is_done,
    mean_and_deviation,
    measured_runs,
    read_runs,
    run,
    table,
    with_both,
)
from simplenet_lib.config import Config, SimpleNetError, preset
from simplenet_lib.localization import predict
from simplenet_lib.synthetic import generate

CONFIG = preset("fast")
RUN = {"dataset": "set", "category": "nut", "seed": 0, "config": json.loads(CONFIG.to_json())}


def test_papers_categories_average_to_the_papers_mean() -> None:
    assert len(PAPER) == 15
    means = np.mean(list(PAPER.values()), axis=0)
    # The second is 98.15 before rounding, so a transcribed mean may round either way.
    assert np.abs(means - PUBLISHED_MEANS["SimpleNet, paper"][:2]).max() <= 0.055


# A run and its report -----------------------------------------------------------------


def tiny(**changes: Any) -> Config:
    values: dict[str, Any] = {"backbone": "resnet18", "layers": ("layer2",), "batch_size": 64}
    values |= {"resize": 64, "crop": 64, "adaptor_channels": 8, "steps": 3, "heads": 2}
    return preset("fast", **{**values, **changes})


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven good photos of cloth; two good ones and five with a defect for the test."""
    root = tmp_path_factory.mktemp("data") / "set"
    return generate(root, categories=["cloth"], train=7, test_good=2, test_per_defect=1, size=64)


@pytest.fixture(scope="module")
def done(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet18.pth")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMPLENET_CACHE", str(folder / "cache"))
        return run(data, "cloth", tiny(), weights=folder / "resnet18.pth", progress=False)


def test_a_report_says_what_was_done(done: Run, data: Path) -> None:
    report = done.report
    assert json.loads(json.dumps(report)) == report
    assert (report["dataset"], report["category"]) == ("set", "cloth")
    assert (report["preset"], report["seed"], report["steps"]) == ("fast", 0, 3)
    assert report["config"] == json.loads(tiny(ratio=1.0).to_json())
    assert report["config"] == json.loads(done.trained.model.config.to_json())
    assert report["versions"]["torch"] == torch.__version__
    assert report["hardware"].startswith(f"{torch.get_num_threads()} CPU threads")
    for name in ("seconds_features", "seconds_training", "seconds_evaluation"):
        assert 0 <= report[name] < 600


def test_a_report_names_the_three_oddest_photos(done: Run, data: Path) -> None:
    scores = done.trained.scores
    assert done.report["train_images"] == done.report["scored_unseen"] == len(scores) == 7
    names = [path.name for path in sorted((data / "cloth/train/good").iterdir())]
    ranked = sorted(zip(scores.tolist(), names, strict=True), reverse=True)
    odd = done.report["oddest_training_images"]
    assert list(odd) == [name for _, name in ranked[:3]]
    assert list(odd.values()) == pytest.approx([score for score, _ in ranked[:3]], abs=5e-4)


def test_a_report_holds_every_score_and_what_follows_from_them(done: Run, data: Path) -> None:
    report, predictions = done.report, done.predictions
    assert predictions is not None
    found = {
        (defect, stem): score
        for defect, scores in report["scores"].items()
        for stem, score in scores.items()
    }
    files = sorted((data / "cloth/test").glob("*/*.png"))
    assert set(found) == {(path.parent.name, path.stem) for path in files}
    _, test, _ = datasets(data, "cloth", tiny())
    assert test is not None
    again = list(predict(done.trained.model, test, progress=False))
    for prediction in again:
        sample = prediction.sample
        assert found[sample.defect, sample.image.stem] == pytest.approx(prediction.score, abs=6e-5)
    for share, label in (("unfamiliar_share_normal", 0), ("unfamiliar_share_defect", 1)):
        unlike = [bool(p.unfamiliar) for p in again if p.sample.label == label]
        assert report[share] == pytest.approx(sum(unlike) / len(unlike))
    # Metrics and rates, from the scores alone.
    labels = np.array([defect != "good" for defect, _ in found])
    scores = np.array(list(found.values()))
    assert report["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert report["false_alarm_rate"] == (scores[~labels] > 1).mean()
    assert report["detection_rate"] == (scores[labels] > 1).mean()
    pixels = [np.concatenate([getattr(p, name).ravel() for p in again]) for name in ("mask", "map")]
    assert report["pixel_auroc"] == pytest.approx(roc_auc_score(*pixels), abs=1e-6)


def test_a_report_states_deviations_over_images(done: Run) -> None:
    deviations = done.report["deviation_over_images"]
    assert deviations.keys() == {"image_auroc", "pixel_auroc", "aupro"}
    # Hanley and McNeil's formula with 2 normal images and 5 with a defect.
    a = done.report["image_auroc"]
    variance = a * (1 - a) + 4 * (a / (2 - a) - a**2) + (2 * a**2 / (1 + a) - a**2)
    assert deviations["image_auroc"] == pytest.approx((variance / 10) ** 0.5, abs=6e-6)
    # Five defects drawn anew: their mean moves by their deviation over the root of five.
    assert 0.001 < deviations["pixel_auroc"] < 0.3
    assert 0.001 < deviations["aupro"] < 0.3


def test_rates_are_those_of_the_verdicts(done: Run) -> None:
    assert done.predictions is not None
    predictions = sorted(done.predictions, key=lambda p: p.score)
    values = [0.5, 1.0, 1.5, 2.0, 0.0, 3.0, 1.0001]
    changed = []
    for prediction, score in zip(predictions, values, strict=True):
        fields = {**vars(prediction), "score": score, "anomalous": score > 1}
        changed.append(type(prediction)(**fields))
    report = benchmark.compare(changed)
    for rate, kind in (("false_alarm_rate", 0), ("detection_rate", 1)):
        verdicts = [p.score > 1 for p in changed if p.sample.label == kind]
        assert report[rate] == pytest.approx(sum(verdicts) / len(verdicts))


def test_without_masks_pixels_are_not_measured(done: Run) -> None:
    assert done.predictions is not None
    bare = []
    for prediction in done.predictions:
        sample = type(prediction.sample)(prediction.sample.image, prediction.sample.defect)
        fields = {**vars(prediction), "sample": sample, "mask": np.zeros_like(prediction.mask)}
        bare.append(type(prediction)(**fields))
    report = benchmark.compare(bare)
    assert report["deviation_over_images"].keys() == {"image_auroc"}
    assert not {"pixel_auroc", "pixel_ap", "aupro"} & report.keys()
    for name in ("image_auroc", "false_alarm_rate", "detection_rate", "scores"):
        assert report[name] == done.report[name]


# Data ---------------------------------------------------------------------------------


def photo(path: Path, width: int, height: int, orientation: int = 1) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.new("RGB", (width, height)).save(path, exif=exif)


def test_the_photos_own_shape_takes_the_place_of_no_ratio(tmp_path: Path) -> None:
    for number, height in enumerate((40, 50, 70)):
        photo(tmp_path / f"set/part/train/good/{number}.png", 100, height)
    photo(tmp_path / "set/part/test/good/0.png", 100, 100)
    photo(tmp_path / "set/part/test/hole/0.png", 100, 100)
    normal, test, config = datasets(tmp_path / "set", "part", preset("fast"))
    assert config == preset("fast", ratio=0.5)  # the median
    # About 384 squared pixels of that shape, in multiples of 16.
    assert config.seen == (272, 544)
    assert normal[0]["image"].shape == (3, 272, 544)
    assert test is not None
    assert test[1]["image"].shape == (3, 272, 544) and test[1]["mask"].shape == (272, 544)
    assert can_be_evaluated(test)
    # A folder of photos alone is the same but for the test.
    folder = tmp_path / "set/part/train/good"
    assert datasets(folder, None, preset("fast"))[1:] == (None, config)
    # A ratio that was asked for stays.
    normal, _, config = datasets(tmp_path / "set", "part", preset("fast", ratio=1.0))
    assert config.ratio == 1.0 and normal[0]["image"].shape == (3, 384, 384)


def test_the_shape_is_that_of_the_upright_photo(tmp_path: Path) -> None:
    photo(tmp_path / "0.jpg", 80, 60, orientation=6)
    normal, _, config = datasets(tmp_path, None, tiny())
    assert config.ratio == 1.333
    assert normal[0]["image"].shape == (3, *config.seen) == (3, 80, 48)


def test_a_test_needs_both_kinds(tmp_path: Path) -> None:
    assert not can_be_evaluated(None)
    photo(tmp_path / "part/train/good/0.png", 64, 64)
    assert datasets(tmp_path, "part", tiny())[1] is None
    for kind, enough in (("hole", False), ("good", True)):
        photo(tmp_path / "part/test" / kind / "0.png", 64, 64)
        _, test, _ = datasets(tmp_path, "part", tiny())
        assert can_be_evaluated(test) == enough


# Files of runs ------------------------------------------------------------------------


def test_committed_runs_are_whole_and_hold_three_seeds() -> None:
    runs = measured_runs()
    assert {(run["category"], run["preset"]) for run in runs} >= {
        ("bottle", "fast"),
        ("grid", "fast"),
        ("weld", "fast"),
        ("bottle", "course"),
    }
    for one in runs:
        assert 0 <= one["image_auroc"] <= 1 and 0 <= one["aupro"] <= 1
        assert one["config"]["seed"] == one["seed"]
        assert Config.from_json(json.dumps(one["config"])).preset == one["preset"]
        # The scores of all images give the published number again.
        scores = [
            (kind != "good", score)
            for kind, found in one["scores"].items()
            for score in found.values()
        ]
        area = roc_auc_score(*zip(*scores, strict=True))
        assert area == pytest.approx(one["image_auroc"], abs=1e-3)
    seeds: dict[tuple[str, str], set[int]] = {}
    for one in measured_runs("ablation"):
        seeds.setdefault((one["category"], one["variant"]), set()).add(one["seed"])
    assert seeds and all(found == {0} for found in seeds.values())  # as the README says


@given(st.lists(st.floats(0, 1), min_size=2, max_size=6))
def test_mean_and_deviation_are_numpys(values: list[float]) -> None:
    mean, deviation = mean_and_deviation(values).split(" ± ")
    assert float(mean) == pytest.approx(100 * np.mean(values), abs=0.0501)
    assert float(deviation) == pytest.approx(100 * np.std(values, ddof=1), abs=0.0501)


def test_one_value_has_no_deviation() -> None:
    assert mean_and_deviation([0.5]) == "50.0"


def test_both_deviations_stand_beside_a_metric() -> None:
    runs = [
        {"aupro": 0.90, "deviation_over_images": {"aupro": 0.010}},
        {"aupro": 0.92, "deviation_over_images": {"aupro": 0.030, "image_auroc": 0.5}},
    ]
    assert with_both(runs, "aupro") == "91.0 ± 1.4 ± 2.0"
    assert with_both(runs[:1], "aupro") == "90.0 ± – ± 1.0"
    # A deviation of 0 was measured; none at all was not.
    assert with_both([{"aupro": 1.0, "deviation_over_images": {"aupro": 0.0}}], "aupro") == (
        "100.0 ± – ± 0.0"
    )
    without = [{"aupro": 0.90}, {"aupro": 0.92}]
    assert with_both(without, "aupro") == "91.0 ± 1.4"
    assert with_both(without[:1], "aupro") == "90.0"
    assert with_both([runs[0], without[1]], "aupro") == "91.0 ± 1.4 ± 1.0"
    assert with_both(runs, "pixel_auroc") == "no masks"
    assert with_both([], "aupro") == "no masks"


def test_table_groups_seeds_and_leaves_out_what_was_not_measured() -> None:
    run = {"category": "nut", "preset": "fast", "image_auroc": 0.9, "image_ap": 1.0}
    run |= {"seconds_features": 30.0, "seconds_training": 10.0}
    run |= {"false_alarm_rate": 0.05, "detection_rate": 1.0}
    run |= {"deviation_over_images": {"image_auroc": 0.02}}
    other = {**run, "image_auroc": 1.0, "seconds_features": 0.1, "seconds_training": 20.0}
    other |= {"false_alarm_rate": 0.15}
    heading, _, row = table([run, other]).splitlines()
    assert heading == (
        "| category | preset | seeds | image AUROC | pixel AUROC | AUPRO | false alarms"
        " | defects found | features, s | training, s |"
    )
    assert row == (
        "| nut | `fast` | 2 | 95.0 ± 7.1 ± 2.0 | no masks | no masks | 10.0 ± 7.1 | 100.0 ± 0.0"
        " | 30 | 15 |"
    )
    paper = {**run, "preset": "paper", "pixel_auroc": 0.981, "aupro": 0.95}
    paper["deviation_over_images"] = {"image_auroc": 0.02, "pixel_auroc": 0.01, "aupro": 0.015}
    rows = table([run, paper, other]).splitlines()[2:]
    assert rows == [
        row,
        "| nut | `paper` | 1 | 90.0 ± – ± 2.0 | 98.1 ± – ± 1.0 | 95.0 ± – ± 1.5 | 5.0 | 100.0"
        " | 30 | 10 |",
    ]


def test_a_run_is_done_if_its_file_says_so(tmp_path: Path) -> None:
    path = tmp_path / "nut-fast-0.json"
    assert not is_done(path, "set", "nut", CONFIG)
    path.write_text(json.dumps(RUN))
    assert is_done(path, "set", "nut", CONFIG)
    for dataset, category, config in (
        ("other", "nut", CONFIG),
        ("set", "bolt", CONFIG),
        ("set", "nut", preset("fast", sigma=0.4)),
        ("set", "nut", preset("fast", ratio=0.5)),
        ("set", "nut", preset("fast", seed=1)),
    ):
        with pytest.raises(SimpleNetError, match="another data set or configuration"):
            is_done(path, dataset, category, config)


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, "{}", '{"category": "nut"}', "\x00"])
def test_a_file_that_is_no_run_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(SimpleNetError, match=r"a\.json: not a"):
        read_runs(tmp_path)
