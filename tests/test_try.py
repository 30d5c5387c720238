"""The page "Try it" in headless Chromium against the library: same scores, same checkpoint."""

from __future__ import annotations

import base64
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import resnet18
from typer.testing import CliRunner

from simplenet_lib.cli import app
from simplenet_lib.config import Config
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import FeatureMaps, Standardise
from simplenet_lib.model import Head, SimpleNet
from simplenet_lib.noise import random_seed
from simplenet_lib.synthetic import generate
from simplenet_lib.training import NOISE, fit, train
from simplenet_lib.weights import find_weights

ROOT = Path(__file__).parent.parent
PATH = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
NODE = shutil.which("node", path=PATH)

pytest.importorskip("onnx")
if (NODE is None or not (ROOT / "node_modules").exists()) and not os.environ.get("CI"):
    pytest.skip("node or its packages are missing: `make test`", allow_module_level=True)
sys.path.insert(0, str(ROOT / "live"))
import build as live  # noqa: E402

#: As light as it gets: a small backbone, of random numbers, and small pictures.
SMALL = replace(
    live.PAGE,
    backbone="resnet18",
    resize=64,
    crop=64,
    adaptor_channels=16,
    hidden_channels=8,
    steps=30,
    batch_size=64,
    smoothing=4.0,
)
PATIENCE = 120  # seconds for one thing to happen: machines are busy


def raw_html(page: str) -> str:
    """The parts of a page that are written in HTML, as a page of their own."""
    parts = re.findall(r"```\{raw\} html\n(.*?)\n```", page, re.DOTALL)
    assert len(parts) == 3
    style = "<style>body { color: black; background: white }</style>"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>Try it</title>{style}'
        f'<link rel="icon" href="data:,"><main><h1>Try it</h1>{"".join(parts)}</main></html>'
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("try")


@pytest.fixture(scope="module")
def weights(folder: Path) -> Path:
    """A ResNet-18 of random numbers whose features differ from place to place."""
    torch.manual_seed(0)
    file = folder / "resnet18.pth"
    torch.save(resnet18().state_dict(), file)
    return file


@pytest.fixture(scope="module")
def images(folder: Path) -> Path:
    return generate(folder / "nuts", categories=["nut"], train=20, test_good=4, test_per_defect=2)


def trained(images: Path, weights: Path, config: Config) -> SimpleNet:
    dataset = AnomalyDataset(images, "nut", "train", make_transform(config.size, config.seen))
    return train(dataset, config, weights=weights, progress=False).model


@pytest.fixture(scope="module")
def model(images: Path, weights: Path, folder: Path) -> tuple[SimpleNet, SimpleNet]:
    """The detector of the page, and one of five heads that sees a rectangle's centre."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMPLENET_CACHE", str(folder / "cache"))
        other = replace(SMALL, heads=5, resize=96, crop=80, ratio=0.6, steps=20)
        return trained(images, weights, SMALL), trained(images, weights, other)


@pytest.fixture(scope="module")
def report(
    folder: Path, images: Path, weights: Path, model: tuple[SimpleNet, SimpleNet]
) -> dict[str, Any]:
    """What a browser reports that has used the page from end to end."""
    root = folder / "book"
    files = root / "_static" / "try"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMPLENET_WEIGHTS", str(weights))
        live.build(files, root, model[0], images)
    (root / "try.html").write_text(raw_html((ROOT / "try.md").read_text()))

    photos = folder / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)

    def photo(name: str, source: Path, size: tuple[int, int], **options: Any) -> str:
        with Image.open(source) as nut:
            noisy = np.asarray(nut.convert("RGB").resize(size)) + rng.normal(0, 3, (*size[::-1], 3))
        picture = Image.fromarray(noisy.clip(0, 255).astype(np.uint8))
        picture.save(photos / name, **options)
        return str(photos / name)

    nuts = sorted((images / "nut" / "train" / "good").iterdir())
    # One is of another shape than the rest, which it keeps.
    sizes = [(170, 230) if i == 7 else (230, 170) for i in range(len(nuts))]
    good = [
        photo(f"good-{i:02}.png", *pair) for i, pair in enumerate(zip(nuts, sizes, strict=True))
    ]
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright
    test = [
        photo("large.png", nuts[0], (1200, 900)),
        photo("small.png", nuts[1], (40, 30)),
        photo("turned.png", nuts[2], (180, 230), exif=turned),
    ]
    with Image.open(images / "nut" / "test" / "rust" / "000.png") as nut:
        clear = nut.convert("RGBA")
    clear.putalpha(Image.linear_gradient("L").resize(clear.size).point(lambda a: 255 * (a > 90)))
    clear.save(photos / "clear.png")
    Image.open(images / "nut" / "test" / "dent" / "000.png").convert("L").save(photos / "grey.png")
    test += [str(photos / "clear.png"), str(photos / "grey.png")]

    bad = {name: photos / f"bad.{name}" for name in ("txt", "heic", "png")}
    bad["txt"].write_text("no picture")
    bad["heic"].write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(64))
    Image.new("1", (10_000, 10_000)).save(bad["png"])

    other = folder / "library.safetensors"
    model[1].save(other)
    tiles = folder / "tiles.safetensors"
    in_tiles = SimpleNet(replace(SMALL, tile=256), live.find_weights("resnet18", weights))
    in_tiles.typical, in_tiles.threshold = 0.0, 1.0
    in_tiles.save(tiles)
    job = {
        "root": str(root),
        "good": good,
        "test": test,
        "bad": {"text": str(bad["txt"]), "heic": str(bad["heic"]), "large": str(bad["png"])},
        "model": str(other),
        "tiles": str(tiles),
        "checkpoint": str(folder / "from-page.safetensors"),
        "patience": PATIENCE,
    }
    (folder / "job.json").write_text(json.dumps(job))
    command = [str(NODE), "tests/try.mjs", str(folder / "job.json"), str(folder / "report.json")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10 * PATIENCE)
    assert done.returncode == 0, done.stdout + done.stderr
    return {**job, "photos": good, **json.loads((folder / "report.json").read_text())}


def test_precomputed_answers_are_the_detectors(
    report: dict[str, Any], model: tuple[SimpleNet, SimpleNet], images: Path
) -> None:
    kinds = ["good", *live.SHOWN]
    assert len(report["answers"]) == len(kinds)
    for kind, answer in zip(kinds, report["answers"], strict=True):
        score = model[0].predict(images / "nut" / "test" / kind / "000.png").score
        assert answer.startswith(f"{kind.replace('_', ' ')}: {score:.2f}, ")


def test_scratches_score_as_in_the_library(
    report: dict[str, Any], model: tuple[SimpleNet, SimpleNet], images: Path
) -> None:
    clean = model[0].predict(images / "nut" / "test" / "good" / "000.png").score
    assert report["clean"] == pytest.approx(clean, abs=1e-3)
    picture = base64.b64decode(report["picture"].split(",")[1])
    assert report["scratched"] == pytest.approx(model[0].predict(picture).score, abs=1e-3)
    assert abs(report["scratched"] - report["clean"]) > 1e-2  # or agreement would say nothing
    assert report["cleaned"] == pytest.approx(clean, abs=1e-3)


def test_the_page_s_checkpoint_predicts_the_same(
    report: dict[str, Any], weights: Path, folder: Path
) -> None:
    output = folder / "predictions"
    command = ["predict", report["checkpoint"], *report["test"], "--output", str(output)]
    done = CliRunner().invoke(app, [*command, "--weights", str(weights), "--device", "cpu"])
    assert done.exit_code == 0, done.output
    with (output / "predictions.csv").open(encoding="utf-8-sig") as table:
        rows = {row["image"]: row for row in csv.DictReader(table)}
    scores = [float(rows[name]["score"]) for name in report["test"]]
    assert report["own"] == pytest.approx(scores, abs=1e-3)
    assert np.ptp(scores) > 0.1
    assert not any(row["unfamiliar"] for row in rows.values())


def test_a_page_s_training_is_the_library_s(report: dict[str, Any], weights: Path) -> None:
    """The good photos' scores tell the units: 0 in the middle, 1 at the threshold."""
    scores = sorted(report["good"])
    assert len(scores) == len(report["good"]) == 20
    assert (scores[9] + scores[10]) / 2 == pytest.approx(0, abs=0.011)  # two decimals are shown
    assert scores[-1] == 1.0  # one of 20 may lie on it, none above
    found = SimpleNet.load(report["checkpoint"], weights)
    assert found.config == replace(SMALL, ratio=0.739)  # 170 / 230
    assert float(found.level.std()) > 0 and float(found.scale.std()) > 0
    # Photos that it was trained on score like those that no head has seen, or lower.
    inside = [result.score for result in found.predict(report["photos"])]
    assert np.median(inside) < 1


def test_a_model_of_the_library_s_predicts_the_same(
    report: dict[str, Any], model: tuple[SimpleNet, SimpleNet]
) -> None:
    scores = [result.score for result in model[1].predict(report["test"])]
    assert report["library"] == pytest.approx(scores, abs=1e-3)
    assert np.ptp(scores) > 0.1


def test_bad_input_gets_a_sentence(report: dict[str, Any]) -> None:
    said = report["sentences"]
    assert "bad.txt is not a picture" in said["text"]
    assert "HEIC" in said["heic"] and "JPEG" in said["heic"]
    assert "100 megapixels" in said["large"]
    assert said["two"].startswith("2 photos are too few")
    assert "not a readable checkpoint" in said["model"]
    assert "tile 256" in said["tiles"]
    assert "2 GB of memory" in report["memory"]
    assert "backbone.onnx has arrived damaged" in report["damaged"]


def test_works_offline_and_asks_nobody_else(report: dict[str, Any]) -> None:
    assert report["offline"] == report["clean"]
    assert report["errors"] == []
    outside = [one for one in report["requests"] if not one.startswith(("/", "data:", "blob:"))]
    assert outside == []


def test_is_accessible(report: dict[str, Any]) -> None:
    assert report["violations"] == []


def test_is_small_before_the_click(report: dict[str, Any]) -> None:
    root = Path(report["root"])
    local = [one for one in report["before"] if one.startswith("/")]
    assert any("info.json" in one for one in local) and not any("onnx" in one for one in local)
    assert sum((root / one[1:]).stat().st_size for one in local) <= 30_000


def test_a_page_s_head_starts_as_the_library_s(weights: Path) -> None:
    network = SimpleNet(SMALL, find_weights(SMALL.backbone, weights))
    layers = network.features.layer_channels
    layout = live.TrainingStep(network.features.channels, SMALL).layout(layers)
    script = f"""
        import {{ firstState, random }} from "{ROOT / "live" / "training.js"}";
        console.log(firstState({json.dumps(layout)}, random(0)).toString());
    """
    said = subprocess.run(
        [str(NODE), "--input-type=module", "-e", script], capture_output=True, text=True, check=True
    )
    state = torch.tensor([float(value) for value in said.stdout.split(",")]).view(4, -1)
    assert torch.equal(state[0], state[1]) and not state[2:].any()
    sizes = [math.prod(one["shape"]) for one in layout]
    found = dict(zip((one["name"] for one in layout), state[0].split(sizes), strict=True))
    for name, expected in network.heads[0].state_dict().items():
        if name in found and found[name].numel() >= 100:  # enough to be compared
            size = float(expected.square().mean().sqrt())
            assert float(found[name].square().mean().sqrt()) == pytest.approx(size, rel=0.15), name
    columns = found["adaptor.linear.weight"].view(-1, sum(layers)).split(layers, dim=1)
    fine, coarse = (float(part.square().mean().sqrt()) for part in columns)
    assert fine / coarse == pytest.approx(SMALL.fine_scale, rel=0.1)


def test_training_step_is_the_library_s() -> None:
    """Two steps of `fit`, its batches and noise recorded, against the graph."""
    onnxruntime = pytest.importorskip("onnxruntime")
    channels, config = 6, replace(SMALL, heads=1, steps=2, batch_size=8)
    rng = np.random.default_rng(0)
    maps = [rng.normal(size=(3, 3, channels)).astype(np.float16) for _ in range(3)]
    for one in maps:
        one[..., 0] = 0  # a channel that never fires has no gradient
    features = FeatureMaps(maps, np.zeros((3, 1), np.float32), [""] * 3)
    batches: list[Any] = []

    class Recorded(FeatureMaps):
        def vectors(self, positions: Any) -> Any:
            batches.append(FeatureMaps.vectors(self, positions))
            return batches[-1]

    torch.manual_seed(0)
    head, standardise = Head(channels, config), Standardise(channels)
    step = live.TrainingStep(channels, config)

    def flat(values: dict[str, Tensor]) -> Tensor:
        return torch.cat([values[name].flatten() for name in step.shapes])

    start = flat({name: value.clone() for name, value in head.state_dict().items()})
    state = torch.stack([start, start, torch.zeros_like(start), torch.zeros_like(start)])
    recorded = Recorded(features.maps, features.descriptions, features.digests)
    folds = np.full(3, -1)
    history = fit([head], standardise, recorded, folds, config, progress=False)

    graph = live.training_graph(channels, config).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    losses = []
    for number in range(config.steps):
        generator = torch.Generator().manual_seed(random_seed(config.seed, NOISE, number, 0))
        noise = torch.empty(8, config.adaptor_channels).normal_(0, 1, generator=generator)
        following, loss = session.run(
            ["next", "loss"],
            {
                "vectors": batches[number],
                "channel_mean": standardise.mean.numpy(),
                "channel_std": standardise.std.numpy(),
                "noise": noise.numpy(),
                "step": np.array(number, np.float32),
                "state": state.numpy(),
            },
        )
        state = torch.from_numpy(following)
        losses.append(float(loss))
    assert losses == pytest.approx(history.loss.tolist(), abs=1e-5)
    after = flat(head.state_dict())
    sizes = [shape.numel() for shape in step.shapes.values()]
    for name, first, page, library in zip(
        step.shapes, *(torch.split(row, sizes) for row in (start, state[1], after)), strict=True
    ):
        # BatchNorm takes off what a bias before it adds: its gradient is rounding, which Adam
        # enlarges to whole steps; and the mean that it takes off follows.
        rounding = name.endswith((".linear.bias", ".hidden.bias", ".running_mean"))
        assert (library - first).abs().max() > 1e-5 or rounding
        assert (page - library).abs().max() < (2e-3 if rounding else 2e-6), name
