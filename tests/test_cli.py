"""The command as a user meets it: what it writes, and one sentence for every mistake."""

import csv
import ctypes
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from typer.testing import CliRunner

from simplenet_lib import cli, dataset, outputs, training
from simplenet_lib.cli import app
from simplenet_lib.config import PRESETS, preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.localization import predict
from simplenet_lib.model import SimpleNet
from simplenet_lib.synthetic import generate

ROOT = Path(__file__).parent.parent
TINY = ["backbone=resnet18", "layers=layer2", "resize=64", "crop=64", "steps=3", "batch_size=32"]
TINY += ["heads=2", "adaptor_channels=8", "hidden_channels=8", "loss=cross-entropy"]
SET = [part for change in TINY for part in ("--set", change)]
pytestmark = pytest.mark.usefixtures("surroundings")
PIXEL_KEYS = {"pixel_auroc", "pixel_ap", "aupro"}


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of 17 small images with the one category 'cloth'."""
    root = tmp_path_factory.mktemp("data") / "set"
    return generate(root, categories=["cloth"], train=8, test_good=2, test_per_defect=1, size=64)


@pytest.fixture
def data(pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to damage, in the current folder."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine, "data")
    return Path("data")


@pytest.fixture(scope="module")
def trained(pristine: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("trained") / "run"
    simplenet("train", "--data", pristine, "--output", output, *SET)
    return output


def report_of(output: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((output / "metrics.json").read_text())
    return report


def simplenet(*arguments: object) -> str:
    """Run a command that works, and return what it prints on stdout."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.output + repr(result.exception)
    return result.stdout


@pytest.fixture
def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> Callable[..., str]:
    """Run a command that must fail as mistakes do, and return its one sentence."""

    def run(*arguments: object) -> str:
        before = set(tmp_path.rglob("*"))
        monkeypatch.setattr(sys, "argv", ["simplenet", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        assert caught.value.code == 2
        _, stderr = capsys.readouterr()
        bars = (
            "check:",
            "features:",
            "train:",
            "predict:",
        )  # progress may stand before the sentence
        (sentence,) = (line for line in stderr.splitlines() if line and not line.startswith(bars))
        assert sentence.startswith("simplenet: ")
        assert "Traceback" not in stderr
        assert set(tmp_path.rglob("*")) == before, "something half-written was left behind"
        return sentence

    return run


@pytest.fixture
def no_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistakes in the test folder are noticed before a training is paid for."""

    def paid(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the training was started")

    monkeypatch.setattr("simplenet_lib.benchmark.train", paid)


# Once through -------------------------------------------------------------------------


def test_large_photos_are_seen_at_their_own_resolution_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    Path("good").mkdir()
    for number in range(3):
        photo = rng.normal(120, 6, (300, 560)).clip(0, 255).astype(np.uint8)
        Image.fromarray(photo).save(f"good/{number}.png")
    kept = [change for change in TINY if not change.startswith(("resize", "crop"))]
    options = [part for change in kept for part in ("--set", change)]
    simplenet("train", "--data", "good", "--output", "run", "--tile", "256", *options)
    config = json.loads(Path("run/metrics.json").read_text())["config"]
    # 300 x 560 has the area of a square of 410 pixels: not the preset's 384.
    assert (config["tile"], config["resize"], config["crop"]) == (256, 416, 416)
    simplenet("predict", "run", "good", "--output", "out", "--save-maps")
    assert np.load("out/maps/0.npy").shape == (300, 560)
    assert "in tiles cannot be exported" in refused("export", "run")
    assert "tile is 100" in refused("train", "--data", "good", "--tile", "100")


def test_a_changed_size_cuts_nothing_off(data: Path) -> None:
    changes = [change for change in TINY if not change.startswith("crop")]
    options = [part for change in changes for part in ("--set", change)]
    simplenet("train", "--data", data, "--output", "run", *options)
    config = json.loads(Path("run/metrics.json").read_text())["config"]
    assert config["crop"] == config["resize"] == 64


def test_train_writes_model_metrics_and_examples(trained: Path) -> None:
    assert {p.name for p in trained.iterdir()} == {
        "model.safetensors",
        "metrics.json",
        "examples.png",
    }
    metrics = report_of(trained)
    timings = {"seconds_features", "seconds_training", "seconds_evaluation"}
    names = {"dataset", "category", "preset", "seed", "steps", "config", "versions", "hardware"}
    scores = {"image_auroc", "image_ap", "image_f1max", *PIXEL_KEYS}
    rates = {"false_alarm_rate", "detection_rate"}
    assert metrics.keys() >= names | timings | scores | rates
    assert all(0 <= metrics[name] <= 1 for name in scores | rates)
    assert all(metrics[name] >= 0 for name in timings)
    assert metrics["dataset"] == "set"
    assert metrics["category"] == "cloth"
    assert (metrics["preset"], metrics["seed"], metrics["steps"]) == ("fast", 0, 3)
    assert metrics["config"]["backbone"] == "resnet18"
    assert metrics["config"]["ratio"] == 1.0  # that of the photos
    assert metrics["train_images"] == metrics["scored_unseen"] == 8
    assert metrics["deviation_over_images"].keys() == {"image_auroc", "pixel_auroc", "aupro"}
    files = {kind: len(found) for kind, found in metrics["scores"].items()}
    assert files == {"good": 2, "cut": 1, "fibre": 1, "hole": 1, "missing_thread": 1, "stain": 1}
    with Image.open(trained / "examples.png") as picture:
        picture.load()


def test_train_names_the_oddest_photos_and_says_what_the_threshold_means(
    data: Path, trained: Path
) -> None:
    printed = simplenet("train", "--data", data, "--output", "run", *SET)
    odd = report_of(Path("run"))["oddest_training_images"]
    assert odd == report_of(trained)["oddest_training_images"]
    assert len(odd) == 3
    assert set(odd) <= {path.name for path in (data / "cloth/train/good").iterdir()}
    assert list(odd.values()) == sorted(odd.values(), reverse=True)
    assert next(iter(odd.values())) == 1  # the highest score is the threshold
    named = ", ".join(f"{name} ({score:.2f})" for name, score in odd.items())
    assert f"The training photos that look least normal: {named}. Is there a defect" in printed
    # A photo like eight others scores higher than all of them in one of nine cases.
    assert "the highest score of 8 good photos" in printed
    assert "expect about 11.1% false alarms" in printed
    written = ["run/model.safetensors", "run/metrics.json", "run/examples.png"]
    assert printed.splitlines()[-3:] == written
    printed = simplenet(
        "train", "--data", data, "--output", "lower", *SET, "--set", "false_alarms=0.25"
    )
    # The second highest of eight: a ninth exceeds it in two of nine cases.
    assert "the second highest score of 8 good photos" in printed
    assert "expect about 22.2% false alarms" in printed
    assert "The training photos that look least normal: " in printed


def test_evaluate_agrees_with_train(trained: Path, pristine: Path) -> None:
    printed = simplenet("evaluate", trained, "--data", pristine)
    metrics = report_of(trained)
    assert f"image AUROC                      {metrics['image_auroc']:.3f}" in printed
    assert f"AUPRO (to 30% FPR)               {metrics['aupro']:.3f}" in printed
    assert f"false alarms at the threshold    {metrics['false_alarm_rate']:.3f}" in printed
    assert f"defects found at the threshold   {metrics['detection_rate']:.3f}" in printed


def test_evaluate_leaves_out_what_cannot_be_read(trained: Path, data: Path) -> None:
    broken = data / "cloth/test/hole/000.png"
    broken.write_bytes(broken.read_bytes()[:200])
    simplenet("train", "--data", data, "--output", "run", "--skip-damaged", *SET)
    result = CliRunner().invoke(app, ["evaluate", "run"])  # the same images as in training
    assert result.exit_code == 3
    assert f"1 of the test images cannot be read: {broken.resolve()}" in result.stdout
    assert "AUROC" in result.stdout
    with Path("run/evaluation.csv").open(newline="", encoding="utf-8-sig") as file:
        assert len(list(csv.DictReader(file))) == 6


def test_predict_says_which_page_it_read(trained: Path, data: Path) -> None:
    with Image.open(data / "cloth/test/good/000.png") as page:
        page.save("several.tif", save_all=True, append_images=[page, page])
        page.save("one.tif")
    printed = simplenet("predict", trained, "several.tif", "one.tif")
    assert "1 of them have several pages or frames: the first of each is what counts." in printed


def test_same_seed_same_model_and_the_seed_is_recorded(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    simplenet("train", "--data", data, "--output", "again", *SET)
    again = Path("again/model.safetensors").read_bytes()
    assert again == (trained / "model.safetensors").read_bytes()
    simplenet("train", "--data", data, *SET, "--set", "seed=4")
    output = tmp_path / "runs" / "cloth-fast-4"
    assert report_of(output)["seed"] == 4
    assert (output / "model.safetensors").read_bytes() != again


def test_verdicts_do_not_hang_on_the_number_of_threads(trained: Path, pristine: Path) -> None:
    """Sums are added in another order, so scores may differ in their last digits."""
    model = SimpleNet.load(trained / "model.safetensors")
    transform = make_transform(model.config.size, model.config.seen)
    images = AnomalyDataset(pristine, "cloth", "test", transform)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(list(predict(model, images, progress=False)))
    torch.set_num_threads(1)
    one, two = found
    assert [p.anomalous for p in one] == [p.anomalous for p in two]
    assert [p.unfamiliar for p in one] == [p.unfamiliar for p in two]
    assert [p.score for p in one] == pytest.approx([p.score for p in two], abs=1e-4)


def test_train_without_masks_and_without_test_images(data: Path) -> None:
    shutil.rmtree(data / "cloth" / "ground_truth")
    printed = simplenet("train", "--data", data, "--output", "run", *SET)
    assert "no masks" in printed
    metrics = report_of(Path("run"))
    assert "image_auroc" in metrics
    assert not PIXEL_KEYS & metrics.keys()
    assert metrics["deviation_over_images"].keys() == {"image_auroc"}
    shutil.rmtree(data / "cloth" / "test")
    printed = simplenet("train", "--data", data, "--output", "bare", *SET)
    assert "nothing to evaluate" in printed
    assert {p.name for p in Path("bare").iterdir()} == {"model.safetensors", "metrics.json"}
    assert not {"image_auroc", "scores"} & report_of(Path("bare")).keys()
    assert len(report_of(Path("bare"))["oddest_training_images"]) == 3


def test_train_on_a_folder_of_photos_alone(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refused: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine / "cloth/train/good", "my photos")
    printed = simplenet("train", "--data", "my photos", *SET)
    assert "8 good photos, each scored by heads that have not seen it" in printed
    run = Path("runs/my photos-fast-0")
    metrics = report_of(run)
    assert (metrics["dataset"], metrics["category"]) == ("my photos", "my photos")
    assert metrics["train_images"] == metrics["scored_unseen"] == 8
    # The layout must not matter: the same photos give the same bytes.
    simplenet("train", "--data", pristine, "--output", "layout", *SET)
    same = Path("layout/model.safetensors").read_bytes()
    assert (run / "model.safetensors").read_bytes() == same
    assert "holds photos only" in refused("evaluate", run, "--data", "my photos")
    Path("empty").mkdir()
    assert "no normal images. What can be read" in refused("train", "--data", "empty", *SET)
    Path("one").mkdir()
    shutil.copy("my photos/000.png", "one")
    assert "1 normal image: at least 2" in refused("train", "--data", "one", *SET)


def test_photos_keep_their_shape(data: Path) -> None:
    """A model of photos that are wider than high sees them so, and so does `predict`."""
    for path in data.glob("cloth/*/*/*.png"):
        with Image.open(path) as image:
            image.load()
        image.resize((96, 48), Image.Resampling.NEAREST).save(path)
    simplenet("train", "--data", data, "--output", "run", *SET)
    config = report_of(Path("run"))["config"]
    assert (config["ratio"], config["resize"]) == (0.5, 64)
    model = SimpleNet.load(Path("run/model.safetensors"))
    assert model.config.seen == (48, 96)
    assert model.level.shape == (6, 12)
    printed = simplenet("evaluate", "run", "--data", data)
    assert (
        f"pixel AUROC                      {report_of(Path('run'))['pixel_auroc']:.3f}" in printed
    )
    # What is typed counts: then they are squeezed.
    simplenet("train", "--data", data, "--output", "square", *SET, "--set", "ratio=1")
    assert report_of(Path("square"))["config"]["ratio"] == 1
    assert SimpleNet.load(Path("square/model.safetensors")).config.seen == (64, 64)


def test_one_head_is_scored_on_the_photos_it_has_not_seen(data: Path) -> None:
    printed = simplenet("train", "--data", data, "--output", "run", *SET, "--set", "heads=1")
    report = report_of(Path("run"))
    assert (report["train_images"], report["scored_unseen"]) == (8, 1)
    assert "the highest score of 1 good photos" in printed
    assert "expect about 50.0% false alarms" in printed
    assert list(report["oddest_training_images"].values()) == [0]  # the only score is typical


# Benchmark ----------------------------------------------------------------------------


@pytest.fixture
def small_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    """The preset 'fast' with the numbers of TINY."""
    tiny: dict[str, Any] = dict(change.split("=") for change in TINY)
    tiny |= {name: int(value) for name, value in tiny.items() if value.isdigit()}
    tiny["layers"] = tuple(tiny["layers"].split(","))
    monkeypatch.setitem(PRESETS, "fast", preset("fast", **tiny))


@pytest.mark.usefixtures("small_preset")
def test_benchmark_makes_what_is_missing_and_a_table(
    data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = simplenet("benchmark", "--data", data, "--seeds", "0,1")
    assert {p.name for p in Path("results").iterdir()} == {
        "cloth-fast-0.json",
        "cloth-fast-1.json",
    }
    runs = [json.loads(Path(f"results/cloth-fast-{seed}.json").read_text()) for seed in (0, 1)]
    alone = report_of(trained)
    times = {"seconds_features", "seconds_training", "seconds_evaluation"}
    assert alone.pop("data") != "" and runs[0].keys() == alone.keys()
    assert runs[0]["dataset"] == "data"  # a copy of the other's set
    same = alone.keys() - times - {"dataset"}
    assert {key: runs[0][key] for key in same} == {key: alone[key] for key in same}
    percent = [100 * run["image_auroc"] for run in runs]
    mean, deviation = sum(percent) / 2, abs(percent[0] - percent[1]) / 2**0.5
    over_images = 50 * sum(run["deviation_over_images"]["image_auroc"] for run in runs)
    cell = f"{mean:.1f} ± {deviation:.1f} ± {over_images:.1f}"
    assert f"| cloth | `fast` | 2 | {cell} |" in first

    def paid(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a run that is there was made again")

    monkeypatch.setattr("simplenet_lib.benchmark.train", paid)
    again = simplenet("benchmark", "--data", data, "--categories", "cloth", "--seeds", "1,0")
    found, again = again.split("\n", 1)
    assert found.startswith("cloth: Found 8 normal images to train on; to test with 2 good, 1 cut")
    assert again == first[first.index("| category") :]


@pytest.mark.usefixtures("small_preset")
def test_benchmark_goes_on_after_an_interruption(
    data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    arguments = ["benchmark", "--data", str(data), "--seeds", "0"]
    with monkeypatch.context() as patch:  # after the training, before the evaluation
        patch.setattr("simplenet_lib.benchmark.predict", stop)
        result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 130
    (state,) = Path("results").iterdir()
    assert state.name == "cloth-fast-0.training.safetensors"
    simplenet(*arguments)
    assert [p.name for p in Path("results").iterdir()] == ["cloth-fast-0.json"]


@pytest.mark.usefixtures("small_preset")
def test_benchmark_tries_every_combination_under_names_of_their_own(data: Path) -> None:
    simplenet("benchmark", "--data", data, "--seeds", "0")
    grid = ["--set", "sigma=0.3,0.5", "--set", "steps=3,4", "--set", "layers=layer2"]
    said = simplenet("benchmark", "--data", data, "--seeds", "0,0", *grid)
    # What equals the preset is the run that is there.
    assert "1 of 3: " in said and "cloth-fast-0\n" not in said
    found = {path.name: json.loads(path.read_text()) for path in Path("results").iterdir()}
    changes = {name: run.get("changes", {}) for name, run in found.items()}
    assert changes == {
        "cloth-fast-0.json": {},
        "cloth-fast-sigma=0.5-0.json": {"sigma": 0.5},
        "cloth-fast-steps=4-0.json": {"steps": 4},
        "cloth-fast-sigma=0.5,steps=4-0.json": {"sigma": 0.5, "steps": 4},
    }
    for run in found.values():
        expected = {"sigma": 0.3, "steps": 3} | run.get("changes", {})
        assert expected.items() <= run["config"].items() and run["steps"] == expected["steps"]
    # The table alone: a row a combination, and nothing else.
    printed = simplenet("benchmark", "--table")
    assert said.endswith(printed)
    assert [line.split(" | ")[1] for line in printed.splitlines()[2:]] == [
        "`fast`",
        "`fast`, sigma=0.5,steps=4",
        "`fast`, sigma=0.5",
        "`fast`, steps=4",
    ]


@pytest.mark.usefixtures("small_preset")
def test_benchmark_reads_every_file_once_and_goes_on_without_damaged_ones(
    data: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = data / "cloth/test/hole/000.png"
    damaged.write_bytes(damaged.read_bytes()[:99])
    sentence = refused("benchmark", "--data", data, "--seeds", "0")
    assert str(damaged) in sentence and "--skip-damaged" in sentence
    counted: list[int] = []
    walked: list[Path] = []
    count, walk = dataset.check, dataset.find_samples

    def counting(samples: Any, *args: Any, **kwargs: Any) -> Any:
        counted.append(len(samples))
        return count(samples, *args, **kwargs)

    def walking(folder: Path) -> Any:
        walked.append(folder)
        return walk(folder)

    monkeypatch.setattr("simplenet_lib.benchmark.check", counting)
    monkeypatch.setattr("simplenet_lib.dataset.find_samples", walking)
    said = simplenet("benchmark", "--data", data, "--seeds", "0,1", "--skip-damaged")
    assert "1 damaged files are left out" in said
    assert counted == [15] and walked == [data / "cloth"]
    assert "hole" not in json.loads(Path("results/cloth-fast-1.json").read_text())["scores"]


@pytest.mark.usefixtures("small_preset", "no_training")
def test_benchmark_refuses_before_it_trains(data: Path, refused: Callable[..., str]) -> None:
    def benchmark(*arguments: object, root: object = data) -> str:
        return refused("benchmark", "--data", root, *arguments)

    assert "nowhere: no such folder" in benchmark(root="nowhere")
    Path("empty").mkdir()
    assert "empty: holds no category. What can be read" in benchmark(root="empty")
    assert "no category 'bolt'. Found: cloth" in benchmark("--categories", "cloth,bolt")
    assert "--seeds one: expected numbers" in benchmark("--seeds", "one")
    assert "--set seed=1: seeds are named with --seeds" in benchmark("--set", "seed=1")
    assert "--set sigma: expected NAME=VALUE" in benchmark("--set", "sigma")
    assert "sigma is -1, outside 0" in benchmark("--set", "sigma=0.25,-1")
    assert "name the folder of categories: --data" in refused("benchmark")
    assert "results: holds no runs" in refused("benchmark", "--table")
    assert "unknown preset 'slow'" in benchmark("--preset", "slow")
    Path("results").mkdir()
    other = Path("results/cloth-fast-0.json")
    for text, sentence in (
        ("{", "not a readable run"),
        ("[]", "not a run of this program"),
        ('{"category": "cloth", "seed": 0}', "of another data set or configuration"),
    ):
        other.write_text(text)
        assert f"{other}: " in (message := benchmark()) and sentence in message
    other.unlink()
    image = data / "cloth/test/hole/000.png"
    image.unlink()
    assert "a mask without an image" in benchmark()


# Export -------------------------------------------------------------------------------


def test_export_gives_what_predict_gives(trained: Path, data: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    printed = simplenet("export", trained, "--output", "detector.onnx")
    assert printed.strip() == "detector.onnx"
    session = onnxruntime.InferenceSession("detector.onnx", providers=["CPUExecutionProvider"])
    simplenet("predict", trained, data / "cloth/test")
    for row in rows():
        with Image.open(row["image"]) as image:  # 64x64, as the network wants them
            pixels = np.asarray(image.convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
        _, score = session.run(None, {"pixels": pixels[None]})
        assert score[0] == pytest.approx(float(row["score"]), abs=1e-4)
        assert row["verdict"] == ("anomalous" if score[0] > 1 else "normal")
    stated = session.get_modelmeta().custom_metadata_map
    assert (stated["size"], stated["seen"]) == ("[64, 64]", "[64, 64]")
    assert json.loads(stated["config"]) == report_of(trained)["config"]


def test_export_refuses(trained: Path, tmp_path: Path, refused: Callable[..., str]) -> None:
    assert "no such checkpoint" in refused("export", tmp_path)
    assert "cannot be written to" in refused("export", trained, "--output", "/proc/x/model.onnx")


def test_info_describes_the_model(trained: Path) -> None:
    printed = simplenet("info", trained)
    lines = [line.split() for line in printed.splitlines()]
    for name, value in report_of(trained)["config"].items():
        assert [name, *str(value).split()] in lines
    assert ["torch", torch.__version__] in lines


# Predict ------------------------------------------------------------------------------


def rows(output: str = "predictions") -> list[dict[str, str]]:
    with (Path(output) / "predictions.csv").open(newline="", encoding="utf-8-sig") as file:
        return list(csv.DictReader(file))


def test_predict_a_folder_keeps_its_names(trained: Path, data: Path) -> None:
    test = data / "cloth" / "test"
    Image.new("RGB", (90, 50)).save(test / "wide one, größer.jpg")
    printed = simplenet("predict", trained, test)
    table = rows()
    anomalous = sum(row["verdict"] == "anomalous" for row in table)
    assert printed.startswith(f"Found {len(table)} images.\n{anomalous} of {len(table)} images are")
    columns = ["image", "score", "verdict", "unfamiliar", "regions", "overlay", "map", "error"]
    assert list(table[0]) == columns
    images = sorted(p for p in test.rglob("*.*"))
    assert sorted(row["image"] for row in table) == [str(p) for p in images]
    for row in table:
        name = Path(row["image"]).relative_to(test).with_suffix(".png")
        assert row["overlay"] == str("overlays" / name)
        assert row["verdict"] == ("anomalous" if float(row["score"]) > 1 else "normal")
        with (
            Image.open(row["image"]) as image,
            Image.open(Path("predictions", row["overlay"])) as o,
        ):
            o.load()
            assert o.size == image.size
    overlays = {p for p in Path("predictions/overlays").rglob("*") if p.is_file()}
    assert len(overlays) == len(table)


def test_predict_warns_of_photos_unlike_those_of_the_training(trained: Path, data: Path) -> None:
    Path("dark").mkdir()
    good = sorted((data / "cloth/train/good").iterdir())
    for path in good[:4]:
        with Image.open(path) as image:
            image.point(lambda value: value // 3).save(Path("dark", path.name))
    printed = simplenet("predict", trained, "dark")
    assert "4 of them look unlike the training photos as a whole" in printed
    assert all("darker" in row["unfamiliar"].split(", ") for row in rows())
    printed = simplenet("predict", trained, data / "cloth/train/good")
    assert "unlike" not in printed
    assert {row["unfamiliar"] for row in rows()} == {""}
    # A few of many are their own affair; the table still says which.
    printed = simplenet("predict", trained, "dark", *good[:4])
    assert "unlike" not in printed
    assert [bool(row["unfamiliar"]) for row in rows()] == [True] * 4 + [False] * 4


def test_predict_single_images_with_the_same_stem(trained: Path, data: Path) -> None:
    first, second = data / "cloth/test/good/000.png", data / "cloth/test/hole/000.png"
    simplenet("predict", trained, first, second, first)
    assert [row["image"] for row in rows()] == [str(first), str(second)]
    assert [row["overlay"] for row in rows()] == ["overlays/000.png", "overlays/000-2.png"]
    assert {p.name for p in Path("predictions/overlays").iterdir()} == {"000.png", "000-2.png"}


def test_predict_replaces_its_own_output_only(
    trained: Path, data: Path, refused: Callable[..., str]
) -> None:
    good = data / "cloth/test/good"
    Path("predictions").mkdir()
    folder = os.stat("predictions").st_ino
    (Path("predictions") / ".DS_Store").write_text("the file manager's")
    simplenet("predict", trained, good, "--json", "--save-maps")
    (Path("predictions") / "Thumbs.db").write_text("the file manager's")
    (Path("predictions/overlays") / "mine.png").write_text("mine")
    simplenet("predict", trained, good / "001.png")
    assert len(rows()) == 1
    assert {p.name for p in Path("predictions").iterdir()} == {
        ".DS_Store",
        "Thumbs.db",
        "predictions.csv",
        "overlays",
    }
    assert {p.name for p in Path("predictions/overlays").iterdir()} == {"001.png", "mine.png"}
    assert {p.name for p in Path().iterdir()} == {"data", "predictions"}
    assert os.stat("predictions").st_ino == folder  # a mount could be filled like this, too
    # What the user put there under the name of an overlay is left alone.
    (Path("predictions/overlays") / "000.png").write_text("mine")
    simplenet("predict", trained, good / "000.png")
    assert rows()[0]["overlay"] == "overlays/000-2.png"
    assert Path("predictions/overlays/000.png").read_text() == "mine"
    # What an earlier run wrote is no image to predict.
    count = len([*data.rglob("*.png")])
    for _ in range(2):
        simplenet("predict", trained, data, "--output", data / "found")
        assert len(rows(str(data / "found"))) == count
    # A table of ours beside something of the user's is a folder of the user's.
    Path("predictions/notes.txt").write_text("mine")
    message = refused("predict", trained, good)
    assert "predictions: exists and holds something else" in message
    assert Path("predictions/notes.txt").read_text() == "mine"
    Path("file").write_text("mine")
    assert "exists" in refused("predict", trained, good, "--output", "file")
    assert "exists" in refused("predict", trained, good, "--output", "data")
    assert "exists" in refused("predict", trained, good, "--output", good)
    Path("theirs").mkdir()
    Path("theirs/predictions.csv").write_text("name,price\n")
    assert "exists" in refused("predict", trained, good, "--output", "theirs")


def test_predict_removes_only_what_its_table_names(trained: Path, data: Path) -> None:
    Path("mine.png").write_text("mine")
    Path("predictions/overlays").mkdir(parents=True)
    header = "image,score,verdict,unfamiliar,overlay\r\n"
    outside = ("../mine.png", "overlays/../../mine.png", str(Path("mine.png").resolve()), "")
    table = header + "".join(f"a.png,1,normal,,{name}\r\n" for name in outside)
    Path("predictions/predictions.csv").write_text(table)
    simplenet("predict", trained, data / "cloth/test/good")
    assert Path("mine.png").read_text() == "mine"
    assert len(rows()) == 2


def test_predict_into_a_link_and_not_into_a_link_to_nowhere(
    trained: Path, data: Path, refused: Callable[..., str]
) -> None:
    Path("disk").mkdir()
    Path("link").symlink_to("disk")
    good = data / "cloth/test/good"
    for _ in range(2):
        simplenet("predict", trained, good, "--output", "link")
    assert Path("link").is_symlink() and len(rows("disk")) == 2
    Path("nowhere").symlink_to("gone")
    assert "a link that leads nowhere" in refused("predict", trained, good, "--output", "nowhere")


def test_predict_goes_on_past_damaged_photos(trained: Path, data: Path) -> None:
    good = data / "cloth/test/good"
    (good / "0.png").write_bytes(b"")
    (good / "0001.jpg").write_bytes(b"no image")
    command = ["predict", str(trained), str(good), "--json"]
    result = CliRunner().invoke(app, command)
    assert result.exit_code == 3
    assert f"2 cannot be read, the column `error` says why: {good / '0.png'}" in result.stdout
    assert " of 2 images are anomalous" in result.stdout
    table = {Path(row["image"]).name: row for row in rows()}
    assert table.keys() == {"0.png", "0001.jpg", "000.png", "001.png"}
    assert "the file is empty" in table["0.png"]["error"]
    assert table["0001.jpg"]["error"].startswith("not a readable image")
    for name, row in table.items():
        assert bool(row["error"]) == (row["score"] == "") == (name in ("0.png", "0001.jpg"))
        assert bool(row["overlay"]) == bool(row["score"])
    Path("notes.txt").write_text("no image")
    assert CliRunner().invoke(app, [*command[:2], "notes.txt"]).exit_code == 3
    assert [row["verdict"] for row in rows()] == [""]


def test_predict_refuses_what_it_cannot_do(
    trained: Path, data: Path, refused: Callable[..., str]
) -> None:
    assert "nowhere: no such image or folder" in refused("predict", trained, "nowhere")
    Path("empty").mkdir()
    assert "no images found" in refused("predict", trained, "empty")
    assert "File name too long" in refused("predict", trained, "x" * 300)
    assert "no such checkpoint" in refused("predict", "empty", data)
    assert "the threshold is nan" in refused("predict", trained, data, "--threshold", "nan")
    Path("notes.txt").write_text("no folder")
    for output in ("notes.txt/under", "/proc/nowhere/predictions"):
        message = refused("predict", trained, data, "--output", output)
        assert f"{output}: cannot be" in message
    for device, sentence in {
        "tpu": "unknown device 'tpu'",
        "cuda:x": "unknown device 'cuda:x'",
        "cuda:99": "CUDA device" if not torch.cuda.is_available() else "no device 'cuda:99'",
        "mps": "no Apple GPU found. Use --device cpu",
        "cpu:1": "no device 'cpu:1'",
    }.items():
        assert sentence in refused("predict", trained, data, "--device", device)


def test_names_never_collide_and_are_no_formulas(trained: Path, data: Path) -> None:
    """On a disk that knows no case, in a spreadsheet, and whatever bytes a name has."""
    source = data / "cloth/test/hole/000.png"
    odd = [b"a.png", b"A.PNG", b"a.jpg", b"=1+1.png", b"@x.png", b"-2.png", "é.png".encode()]
    odd += ["e\u0301.png".encode(), b"two\nlines.png", b"\xff\xfe.png", b"b.png/c.png", b"b.jpg"]
    odd += [b"x" * 251 + b".png", b"x" * 251 + b".jpg"]
    Path("odd").mkdir()
    for name in odd:
        path = Path("odd", os.fsdecode(name))
        path.parent.mkdir(exist_ok=True)
        shutil.copy(source, path)
    os.chdir("odd")
    simplenet("predict", trained, ".", "--output", "../out", "--json", "--save-maps")
    records = json.loads(Path("../out/predictions.json").read_text())
    assert {os.fsencode(record["image"]) for record in records} == set(odd)
    table = rows("../out")
    assert len(table) == len(odd) and {row["score"] for row in table} == {table[0]["score"]}
    for kind in ("overlay", "map"):
        written = [row[kind] for row in table]
        assert len({unicodedata.normalize("NFC", name).casefold() for name in written}) == len(odd)
        for record in records:
            assert Path("../out", record[kind]).is_file()
    cells = {row["image"] for row in table}
    assert {"./=1+1.png", "./@x.png", "./-2.png", "two\nlines.png", "é.png"} <= cells
    assert not any(cell[0] in "=+-@\t\r" for cell in cells)
    assert all(Path(cell).is_file() for cell in cells if "udcff" not in cell)
    assert Path("../out/predictions.csv").read_bytes().startswith("\ufeffimage,".encode())


def test_json_maps_and_regions_say_the_same(trained: Path, data: Path) -> None:
    photo = Image.new("RGB", (90, 50))
    photo.paste("white", (10, 5, 30, 25))
    photo.save(data / "cloth/test/good/wide.png")
    command = ["predict", trained, data / "cloth/test", "--save-maps", "--json", "--no-overlay"]
    simplenet(*command)
    assert not Path("predictions/overlays").exists()
    records = json.loads(Path("predictions/predictions.json").read_text())
    assert len(records) == len(rows()) == 8
    for record, row in zip(records, rows(), strict=True):
        assert row["overlay"] == "" and record["overlay"] is None
        map_ = np.load(Path("predictions", record["map"]), allow_pickle=False)
        with Image.open(record["image"]) as image:
            assert [*image.size] == record["size"] == [*map_.shape[::-1]]
        assert map_.dtype == np.float32
        assert record["score"] == pytest.approx(float(row["score"]), rel=1e-4)
        assert record["verdict"] == row["verdict"]
        peaks = [region["peak"] for region in record["regions"]]
        assert bool(peaks) == (record["verdict"] == "anomalous")
        assert not peaks or (peaks[0] == record["score"] and peaks == sorted(peaks, reverse=True))
        for region in record["regions"]:
            assert f"x={region['x']} y={region['y']} width={region['width']}" in row["regions"]
    scores = {row["image"]: float(row["score"]) for row in rows()}
    middle = round(sum(sorted(scores.values())[4:6]) / 2, 4)
    printed = simplenet(*command, "--threshold", middle)
    assert f"3 of 8 images are anomalous (score above {middle:g})" in printed
    for row in rows():  # the scores stay, the verdicts move
        assert float(row["score"]) == scores[row["image"]]
        assert row["verdict"] == ("anomalous" if scores[row["image"]] > middle else "normal")
        assert bool(row["regions"]) == (row["verdict"] == "anomalous")


@pytest.mark.parametrize("stopped", ["Ctrl-C", "full disk in overlay", "full disk in table"])
def test_a_run_that_is_stopped_keeps_what_it_has(
    stopped: str,
    trained: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    put, line = outputs.PredictionFolder._put, outputs._line
    done = []

    def full(*args: Any) -> Any:
        raise OSError(28, "No space left on device")

    def third_fails(self: Any, name: Path, content: Any, made: list[Path]) -> str:
        done.append(name)
        result = put(self, name, content, made)
        if len(done) == 3:
            if stopped == "Ctrl-C":
                raise KeyboardInterrupt
            if stopped == "full disk in overlay":
                full()
            monkeypatch.setattr(outputs, "_line", full)
        return result

    monkeypatch.setattr(outputs.PredictionFolder, "_put", third_fails)
    command = ["predict", str(trained), str(data / "cloth/test"), "--json"]
    monkeypatch.setattr(sys, "argv", ["simplenet", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == (130 if stopped == "Ctrl-C" else 2)
    sentence = capsys.readouterr().err.splitlines()[-1]
    if stopped == "Ctrl-C":
        assert "stopped. 2 of 7 images are in predictions/predictions.csv" in sentence
    else:
        assert "predictions: could not be written" in sentence and "No space left" in sentence
        assert "What is known of 2 images is kept" in sentence
    assert len(rows()) == len(json.loads(Path("predictions/predictions.json").read_text())) == 2
    written = {p for p in Path("predictions/overlays").rglob("*") if p.is_file()}
    assert written == {Path("predictions", row["overlay"]) for row in rows()}
    monkeypatch.setattr(outputs.PredictionFolder, "_put", put)
    monkeypatch.setattr(outputs, "_line", line)
    simplenet(*command)
    assert len(rows()) == 7


def test_a_real_full_disk_takes_back_what_it_took(tmp_path: Path) -> None:
    """A write that takes a part and then refuses leaves the file as it was."""

    class Disk(io.FileIO):
        room = 25

        def write(self, data: Any) -> int:
            taken = super().write(bytes(data)[: self.room])
            self.room -= taken
            if not taken:
                raise OSError(28, "No space left on device")
            return taken

    with Disk(tmp_path / "table", "w+") as file:
        outputs._write(file, 0, b"one,two\n")
        with pytest.raises(OSError, match="No space"):
            outputs._write(file, 8, b"a line that does not fit\n")
        file.room = 10
        outputs._write(file, 8, b"three\n")
    assert (tmp_path / "table").read_bytes() == b"one,two\nthree\n"


@pytest.mark.skipif(sys.platform == "win32", reason="there an open file cannot be removed")
def test_two_predicts_do_not_share_a_folder(
    trained: Path, data: Path, refused: Callable[..., str]
) -> None:
    image = data / "cloth/test/good/000.png"
    with outputs.PredictionFolder(Path("predictions"), {image: Path("000.png")}):
        message = refused("predict", trained, image)
    assert "another `simplenet predict` is writing there" in message
    simplenet("predict", trained, image)


def test_each_photo_is_decoded_once(
    trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = []
    load = ImageFile.ImageFile.load

    def counted(self: Any) -> Any:
        if self.fp is not None and self.tile:
            decoded.append(self.size)
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", counted)
    simplenet("predict", trained, data / "cloth/test", "--json", "--save-maps")
    assert len(decoded) == len(rows()) == 7


def test_any_size_of_image_is_judged(trained: Path) -> None:
    sizes = [(1, 1), (1, 40), (300, 2), (2000, 1500)]
    with tempfile.TemporaryDirectory() as folder:
        for number, size in enumerate(sizes):
            Image.new("L", size, 90).save(Path(folder, f"{number}.png"))
        out = Path(folder, "out")
        simplenet("predict", trained, folder, "--output", out, "--save-maps", "--json")
        for record, size in zip(
            json.loads((out / "predictions.json").read_text()), sizes, strict=True
        ):
            assert np.load(out / record["map"], allow_pickle=False).shape == size[::-1]
            with Image.open(out / record["overlay"]) as overlay:
                large = size[0] * size[1] > 2_000_000
                assert overlay.size == ((1000, 750) if large else size)


# A model that is there already ----------------------------------------------------------


def test_train_overwrites_no_other_model(
    data: Path, trained: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["train", "--data", data, "--output", "run", *SET]
    simplenet(*command)
    before = Path("run/model.safetensors").stat().st_mtime_ns

    def paid(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the training was started")

    monkeypatch.setattr("simplenet_lib.benchmark.train", paid)
    printed = simplenet(*command)
    assert "run/model.safetensors is there already, of the same images and settings" in printed
    message = refused(*command, "--set", "sigma=0.5", "--seed", "3")
    assert "run: holds a model that was trained with" in message
    assert "sigma 0.3 (now 0.5)" in message and "seed 0 (now 3)" in message
    assert "Choose another --output, or move it away" in message
    (data / "cloth/train/good/000.png").unlink()
    assert "was trained with other images" in refused(*command)
    Path("run/model.safetensors").write_text("mine")
    assert "not a readable checkpoint" in (message := refused(*command))
    assert "It is not overwritten" in message
    assert Path("run/model.safetensors").read_text() == "mine"
    assert before


def test_evaluate_finds_what_the_model_was_trained_on(
    data: Path, refused: Callable[..., str]
) -> None:
    simplenet("train", "--data", data, "--output", "run", *SET)
    printed = simplenet("evaluate", "run")
    assert (
        f"image AUROC                      {report_of(Path('run'))['image_auroc']:.3f}" in printed
    )
    with Path("run/evaluation.csv").open(newline="", encoding="utf-8-sig") as file:
        table = list(csv.DictReader(file))
    assert len(table) == 7
    wrong = [row for row in table if row["right"] == "no"]
    for row in table:
        assert (row["verdict"] == "anomalous") == (float(row["score"]) > 1)
        assert (row["right"] == "yes") == ((row["kind"] != "good") == (float(row["score"]) > 1))
    # At a threshold that nothing reaches every defect is missed, the lowest score first.
    printed = simplenet("evaluate", "run", "--threshold", "99", "--output", "table.csv")
    assert "Wrong verdicts, worst first (5 of 7):" in printed
    lines = [line.split() for line in printed.splitlines() if " missed " in line]
    scores = [float(line[0]) for line in lines]
    assert scores == sorted(scores) and len(scores) == 5
    assert f"defects found at the threshold   {0:.3f}" in printed
    assert len(wrong) == 7 - sum(row["right"] == "yes" for row in table)

    assert "exists and is something else" in refused(
        "evaluate", "run", "--output", "run/metrics.json"
    )
    image = data / "cloth/test/hole/000.png"
    with Image.open(image) as picture:
        picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(image)
    message = refused("evaluate", "run")
    assert "are others than when the model was trained" in message and "--data" in message
    simplenet("evaluate", "run", "--data", data)
    report = Path("run/metrics.json").read_text()
    Path("run/metrics.json").write_text(report.replace('"images": "', '"images": "0'))
    assert "not of this model" in refused("evaluate", "run")
    Path("run/metrics.json").unlink()
    assert "Name test images with --data" in refused("evaluate", "run")


def test_calibrate_sets_the_threshold_by_other_photos(
    data: Path, trained: Path, refused: Callable[..., str]
) -> None:
    shutil.copytree(trained, "run")
    generate(
        Path("more"),
        categories=["cloth"],
        train=12,
        test_good=1,
        test_per_defect=1,
        size=64,
        seed=5,
    )
    photos = Path("more/cloth/train/good")
    simplenet("predict", "run", photos)
    scores = np.array([float(row["score"]) for row in rows()])
    printed = simplenet("calibrate", "run", photos, "--output", "new")
    assert "the highest score of 12 good photos, new to the model: expect about 7.7%" in printed
    assert f"A score of 1 was one of {scores.max():.3f} before." in printed
    assert (trained / "model.safetensors").read_bytes() == Path(
        "run/model.safetensors"
    ).read_bytes()
    simplenet("predict", "new", photos)
    expected = (scores - np.median(scores)) / (scores.max() - np.median(scores))
    assert [float(row["score"]) for row in rows()] == pytest.approx(expected, abs=1e-3)
    # Two of thirteen: the second highest. In place, too.
    printed = simplenet("calibrate", "run", photos, "--max-false-alarms", "0.16")
    assert "the second highest score of 12" in printed and "about 15.4% false alarms" in printed
    simplenet("predict", "run", photos)
    assert sum(row["verdict"] == "anomalous" for row in rows()) == 1
    printed = simplenet("calibrate", "run", photos, "--max-false-alarms", "0.01")
    assert "more than the 1.00% asked for: for these, 99 photos are needed" in printed

    assert "exists. It is not overwritten" in refused("calibrate", "run", photos, "--output", "new")
    ours = data / "cloth/train/good"
    said = refused("calibrate", "run", ours)
    assert "8 of the 8 photos, such as" in said and "are those the model was trained on" in said
    shutil.copy(next(ours.iterdir()), photos / "of_the_training.png")
    assert "1 of the 13 photos, such as" in refused("calibrate", "run", photos)
    (photos / "of_the_training.png").unlink()
    one = next(photos.iterdir())
    assert "at least 2 are needed" in refused("calibrate", "run", one)
    shutil.copy(one, "copy.png")
    assert "do not differ" in refused("calibrate", "run", one, "copy.png")
    Path("bad.png").write_text("no image")
    assert "bad.png: not a readable image" in refused("calibrate", "run", one, "bad.png")


def test_train_keeps_to_the_false_alarms_asked_for(data: Path, refused: Callable[..., str]) -> None:
    command = ["train", "--data", data, *SET, "--max-false-alarms"]
    printed = simplenet(*command, "0.25", "--output", "run")
    assert "the second highest score of 8 good photos" in printed
    assert "expect about 22.2% false alarms" in printed and "asked for" not in printed
    odd = list(report_of(Path("run"))["oddest_training_images"].values())
    assert odd[0] > 1 and odd[1] == 1
    printed = simplenet(*command, "0.01", "--output", "strict")
    assert "expect about 11.1% false alarms" in printed
    assert "more than the 1.00% asked for: for these, 99 photos are needed" in printed
    assert "false_alarms is 0.7, outside 0 to 0.5" in refused(
        "train", "--data", data, *SET, "--set", "false_alarms=0.7"
    )


# The machine ----------------------------------------------------------------------------


def test_info_downloads_nothing_and_needs_no_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def paid(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a download was started")

    monkeypatch.delenv("SIMPLENET_WEIGHTS")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr("simplenet_lib.weights.fetch", paid)
    monkeypatch.setattr("simplenet_lib.weights.npm_weights", paid)
    assert "not on this machine yet" in simplenet("info")
    assert "resnet18" in simplenet("info", trained)


def test_no_home_folder_is_named_with_the_remedy(
    data: Path, trained: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def nobody(*args: Any) -> Any:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nobody)
    monkeypatch.delenv("SIMPLENET_CACHE")
    message = refused("train", "--data", data, *SET)
    assert "no home folder" in message and "SIMPLENET_CACHE" in message
    monkeypatch.delenv("SIMPLENET_WEIGHTS")
    monkeypatch.setattr("torch.hub.get_dir", lambda: "~/.cache/torch")
    message = refused("predict", trained, data)
    assert "no home folder" in message and "TORCH_HOME" in message


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "memory is full"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "memory is full"),
        (MemoryError(), "memory is full"),
        (RuntimeError("CUDA error: no kernel image is available\nmore"), "the GPU failed"),
    ],
)
def test_full_memory_and_a_failing_gpu_get_one_sentence(
    error: Exception,
    sentence: str,
    trained: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*args: Any) -> Any:
        raise error

    monkeypatch.setattr("simplenet_lib.localization.judge", fail)
    monkeypatch.setattr(sys, "argv", ["simplenet", "predict", str(trained), str(data)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert sentence in last and "--device cpu" in last


# Mistakes in the data -----------------------------------------------------------------


@pytest.mark.usefixtures("no_training")
def test_mistakes_are_noticed_before_training(data: Path, refused: Callable[..., str]) -> None:
    def train(*arguments: str, root: object = data) -> str:
        return refused("train", "--data", root, *SET, *arguments)

    assert "nowhere: no such folder" in train(root="nowhere")
    assert "is a category itself" in train("--category", "x", root=data / "cloth" / "test")
    assert "no category 'silk'. Found: cloth" in train("--category", "silk")
    assert "is a category itself" in train("--category", "x", root=data / "cloth")
    assert "unknown preset 'quick'. Known: course, fast, paper" in train("--preset", "quick")
    for change, message in {
        "steps": "expected NAME=VALUE",
        "speed=3": "expected NAME=VALUE with one of",
        "preset=paper": "expected NAME=VALUE with one of",
        "steps=many": "steps is 'many', not int",
        "steps=0": "steps is 0, outside 1 to",
        "neighbourhood=2": "must be odd",
        "crop=65": "crop is 65, outside 32 to 64",
        "heads=0": "heads is 0, outside 1 to",
        "averaging=1": "averaging is 1, outside 0 to 0.9999",
        "loss=mean": "loss is 'mean', not margin or cross-entropy",
        "border=mirror": "border is 'mirror', not reflect or zeros",
    }.items():
        assert message in train("--set", change)
    for output in ("data/manifest.json", "data/manifest.json/under", "/proc/nowhere/run"):
        assert f"{output}: cannot be written to" in train("--output", output)

    mask = data / "cloth/ground_truth/hole/000_mask.png"
    original = mask.read_bytes()
    mask.write_bytes(original[:20])
    assert f"{mask}: not a readable image" in train()
    mask.write_bytes(original)
    mask.rename(mask.with_name("777_mask.png"))
    assert "777_mask.png: a mask without an image" in train()
    mask.with_name("777_mask.png").unlink()
    assert "Give every one a mask, or none" in train()
    mask.write_bytes(original)
    shutil.rmtree(data / "cloth/train/good")
    assert "no normal images to train on. Found to test with 2 good, 1 cut" in train()
    (data / "cloth/train/good").mkdir()
    assert "no normal images" in train()


@pytest.mark.usefixtures("no_training")
def test_sizes_are_compared_upright(data: Path) -> None:
    """A camera's photo lies on its side and says so; its mask was drawn upright."""
    image = data / "cloth/test/hole/000.png"
    image.unlink()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (80, 60)).save(image.with_suffix(".jpg"), exif=exif)
    mask = data / "cloth/ground_truth/hole/000_mask.png"
    Image.new("L", (60, 80)).save(mask)
    result = CliRunner().invoke(app, ["train", "--data", str(data), *SET])
    assert "the training was started" in str(result.exception)
    assert "but its image is" not in result.stdout
    Image.new("L", (80, 60)).save(mask)
    result = CliRunner().invoke(app, ["train", "--data", str(data), *SET])
    assert "80x60, but its image is 60x80. Pixel metrics are left out" in result.stdout
    assert "the training was started" in str(result.exception)


def test_mistakes_that_training_notices(
    data: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: str) -> str:
        return refused("train", "--data", data, *SET, "--output", "run", *arguments)

    assert "unknown backbone 'vgg16'" in train("--set", "backbone=vgg16")
    assert "unknown layer 'layer9'" in train("--set", "layers=layer2,layer9")
    assert "unknown device 'tpu'" in train("--device", "tpu")
    assert "no such weights file or folder" in train("--weights", "nowhere.pth")
    monkeypatch.setenv("SIMPLENET_WEIGHTS", "missing.pth")
    assert "missing.pth: no such weights file or folder" in train()


@pytest.mark.usefixtures("no_training")
def test_all_damaged_files_are_named_before_the_training(
    data: Path, refused: Callable[..., str]
) -> None:
    images = [data / f"cloth/{name}" for name in ("train/good/003.png", "test/good/001.png")]
    images[0].write_bytes(images[0].read_bytes()[:700])
    message = refused("train", "--data", data, *SET)
    assert f"simplenet: {images[0]}: not a readable image" in message and "--skip-" in message
    images[1].write_bytes(b"")
    message = refused("train", "--data", data, *SET)
    assert "2 files cannot be read: " in message
    assert f"{images[0]}: not a readable image" in message
    assert f"{images[1]}: not a readable image (the file is empty)" in message


def test_damaged_files_can_be_left_out(data: Path) -> None:
    for name in ("train/good/003.png", "test/good/001.png"):
        (data / "cloth" / name).write_bytes(b"damaged")
    printed = simplenet("train", "--data", data, "--output", "run", *SET, "--skip-damaged")
    assert "2 damaged files are left out: " in printed and "003.png" in printed
    report = report_of(Path("run"))
    assert report["train_images"] == 7
    assert list(report["scores"]["good"]) == ["000"]


def test_evaluation_never_costs_the_trained_model(
    data: Path, trained: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A test image that is lost during the training."""
    image = data / "cloth/test/good/001.png"
    whole = image.read_bytes()
    fit = training.fit

    def fit_and_lose(*args: Any, **kwargs: Any) -> Any:
        image.write_bytes(whole[:700])
        return fit(*args, **kwargs)

    monkeypatch.setattr(training, "fit", fit_and_lose)
    command = ["train", "--data", str(data), "--output", "run", *SET]
    monkeypatch.setattr(sys, "argv", ["simplenet", *command])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert f"simplenet: {image}: not a readable image" in printed.err
    assert f"Trained: {Path('run/model.safetensors')}" in printed.out
    model = Path("run/model.safetensors")
    assert model.read_bytes() == (trained / "model.safetensors").read_bytes()
    assert report_of(Path("run"))["train_images"] == 8
    image.write_bytes(whole)
    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(training, "cross_entropy_loss", None)  # no step is made again
    simplenet(*command)
    assert report_of(Path("run"))["image_auroc"] == report_of(trained)["image_auroc"]
    assert not Path("run/training.safetensors").exists()


@pytest.mark.parametrize("fault", ["black", "inverted", "another size"])
def test_useless_masks_cost_the_pixel_metrics_alone(data: Path, trained: Path, fault: str) -> None:
    for path in (data / "cloth/ground_truth").rglob("*.png"):
        with Image.open(path) as mask:
            changed = {
                "black": Image.new("L", mask.size),
                "inverted": mask.point(lambda value: 255 - value),
                "another size": mask.resize((65, 64)),
            }[fault]
        changed.save(path)
    printed = simplenet("train", "--data", data, "--output", "run", *SET)
    said = {
        "black": "No pixel is marked in any of the 5 masks: pixel metrics are left out.",
        "inverted": "5 of 5 masks mark more than half of their image, as if they were inverted",
        "another size": "65x64, but its image is 64x64. Pixel metrics are left out: 5 of 5 masks",
    }[fault]
    assert said in printed
    report = report_of(Path("run"))
    assert report["image_auroc"] == report_of(trained)["image_auroc"]
    assert not PIXEL_KEYS & report.keys()
    assert said in simplenet("evaluate", "run", "--data", data)


def test_deep_photos_give_the_same_verdicts_as_those_of_8_bits(
    data: Path, trained: Path, tmp_path: Path
) -> None:
    """12 bits in 16-bit files: white is found in training, stored, and used in predict."""
    shutil.copytree(data, "deep")
    for path in Path("deep/cloth").glob("t*/*/*.png"):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L"))
        Image.fromarray(grey).save(data / path.relative_to("deep"))
        Image.fromarray(np.ceil(grey * (4095 / 255)).astype(np.uint16)).save(path)
    simplenet("train", "--data", data, "--output", "shallow", *SET)
    simplenet("train", "--data", "deep", "--output", "run", *SET)
    assert (
        report_of(Path("run"))["config"]["white"],
        SimpleNet.load(Path("run/model.safetensors")).config.white,
    ) == (4095, 4095)
    assert report_of(Path("shallow"))["config"]["white"] == 0
    scores = []
    for model, root in (("shallow", data), ("run", "deep")):
        simplenet("predict", model, Path(root, "cloth/test"))
        scores.append([float(row["score"]) for row in rows()])
    assert scores[0] == pytest.approx(scores[1], abs=1e-4)
    simplenet("train", "--data", "deep", "--output", "given", *SET, "--white", "65535")
    assert report_of(Path("given"))["config"]["white"] == 65535


def test_folders_named_ok_and_ng_and_a_category_named_directly(
    pristine: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(pristine / "cloth/train/good", "parts/OK/monday")
    shutil.copytree(pristine / "cloth/test/hole", "parts/NG")
    Path("parts/OK/@eaDir").mkdir()
    shutil.copy("parts/NG/000.png", "parts/OK/@eaDir")
    printed = simplenet("train", "--data", "parts", *SET)
    assert "parts: Found 7 normal images to train on; to test with 1 good, 1 NG; 0 masks" in printed
    report = report_of(Path("runs/parts-fast-0"))
    assert (report["category"], report["train_images"]) == ("parts", 7)
    assert report["scores"].keys() == {"good", "NG"}
    monkeypatch.chdir("parts")
    assert "1 NG" in simplenet("evaluate", "../runs/parts-fast-0", "--data", ".")
    printed = simplenet("predict", "../runs/parts-fast-0", ".", "--output", "../out")
    assert printed.startswith("Found 9 images; 1 file passed over (1 hidden or the system's).")


def test_large_scans_need_max_pixels(trained: Path, data: Path) -> None:
    before = Image.MAX_IMAGE_PIXELS
    try:
        image = data / "cloth/test/good/000.png"
        command = ["predict", trained, image, "--max-pixels", 64 * 64 - 2]
        assert CliRunner().invoke(app, [*map(str, command)]).exit_code == 3
        assert "allow it with --max-pixels" in rows()[0]["error"]
        simplenet(*command[:-1], 64 * 64)
    finally:
        Image.MAX_IMAGE_PIXELS = before


def test_a_state_of_another_training_is_refused(
    data: Path, trained: Path, refused: Callable[..., str]
) -> None:
    Path("run").mkdir()
    state = Path("run/training.safetensors")
    shutil.copy(trained / "model.safetensors", state)
    command = ["train", "--data", data, "--output", "run", *SET]
    message = refused(*command)
    assert "another configuration, weights or images" in message
    assert "Remove it" in message
    state.write_bytes(b"damaged")
    message = refused(*command)
    assert "training.safetensors: not a readable checkpoint" in message
    assert "Remove it" in message


# Ctrl-C -------------------------------------------------------------------------------


def test_ctrl_c_and_the_same_command_give_the_same_model(data: Path) -> None:
    changes = ("steps=400", "averaging=0.9")
    steps = [*SET, *(part for change in changes for part in ("--set", change))]
    command = ["train", "--data", str(data), "--output", "run", *steps]
    process = subprocess.Popen(
        [sys.executable, "-m", "simplenet_lib.cli", *command],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    state = Path("run/training.safetensors")
    deadline = time.monotonic() + 120
    while not state.exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    (found,) = stdout.splitlines()
    assert found.startswith("cloth: Found 8 normal images")
    assert stderr.splitlines()[-1] == (
        "simplenet: stopped. Run the same command to go on from there."
    )
    assert "Traceback" not in stderr
    assert [p.name for p in Path("run").iterdir()] == ["training.safetensors"]
    simplenet(*command)
    simplenet("train", "--data", data, "--output", "undisturbed", *steps)
    resumed = Path("run/model.safetensors").read_bytes()
    assert resumed == Path("undisturbed/model.safetensors").read_bytes()


def test_two_trainings_in_one_folder_at_once_end_like_one(data: Path) -> None:
    changes = ("steps=200", "averaging=0.9")
    steps = [*SET, *(part for change in changes for part in ("--set", change))]
    command = ["train", "--data", str(data), "--output", "run", *steps]
    program = [sys.executable, "-m", "simplenet_lib.cli", *command]
    both = [subprocess.Popen(program, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
    simplenet("train", "--data", data, "--output", "alone", *steps)
    names = {path.name for path in Path("alone").iterdir()}
    assert {path.name for path in Path("run").iterdir()} == names
    alone = Path("alone/model.safetensors").read_bytes()
    assert Path("run/model.safetensors").read_bytes() == alone


# Help ---------------------------------------------------------------------------------


def test_help_is_quick_and_complete() -> None:
    code = (
        "import sys; from simplenet_lib.cli import main; sys.argv = ['simplenet', '--help']\n"
        "try: main()\nfinally: print('torch' in sys.modules, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr.strip() == "False"
    for name in ("synthetic", "download", "train", "evaluate", "predict", "info"):
        assert name in done.stdout
        assert "--help" in simplenet(name, "--help")


@pytest.mark.parametrize(
    "name", ["OMP_WAIT_POLICY", "THP_MEM_ALLOC_ENABLE", "MALLOC_TRIM_THRESHOLD_"]
)
@pytest.mark.parametrize("typed", [None, "mine"])
def test_the_environment_is_set_before_torch_reads_it_unless_the_user_did(
    name: str, typed: str | None
) -> None:
    code = (
        "import os, sys\nfrom simplenet_lib import cli\n"
        f"cli.app = lambda: print(os.environ['{name}'], 'torch' in sys.modules)\ncli.main()"
    )
    environment = {key: value for key, value in os.environ.items() if key != name}
    if typed:
        environment[name] = typed
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    default = {"OMP_WAIT_POLICY": "PASSIVE", "THP_MEM_ALLOC_ENABLE": "1"}.get(name, str(2**30))
    assert done.stdout.split() == [typed or default, "False"], done.stderr


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="another allocator")
def test_memory_of_an_array_serves_the_next_one() -> None:
    code = (
        "import os, resource, sys\n"
        "import numpy as np\n"
        "from simplenet_lib.cli import keep_memory\n"
        "if sys.argv[1] == 'keep': keep_memory()\n"
        "def work(): np.full(20_000_000, 1.0)\n"  # 160 MB
        "work()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(5): work()\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)\n"
    )
    environment = {key: value for key, value in os.environ.items() if "MALLOC" not in key}
    kept, given_back = (
        int(
            subprocess.run(
                [sys.executable, "-c", code, how],
                capture_output=True,
                text=True,
                env=environment | {"NUMPY_MADVISE_HUGEPAGE": "0"},
                check=True,
            ).stdout
        )
        for how in ("keep", "not")
    )
    assert kept < 1000 < 100_000 < given_back


def test_nothing_typed_shows_the_help_and_a_wrong_option_is_named() -> None:
    assert "Usage" in CliRunner().invoke(app, []).output
    result = CliRunner().invoke(app, ["train", "--fast"])
    assert result.exit_code == 2
    assert "--fast" in result.output
