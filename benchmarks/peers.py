"""SimpleNet beside detectors of anomalib: same machine, same images, same backbone.

    python benchmarks/peers.py ROOT/CATEGORY [NAME ...] [--python FILE]

NAME is a key of DETECTORS or METRICS; all of them without one. anomalib is installed into a
temporary environment, unless FILE is the interpreter of one that has it and this library. Every
detector runs in a process of its own, on a CUDA GPU if there is one, with batches of eight,
images of 320 px and, where it can take one, the same ResNet-50. anomalib's networks are driven
by plain loops: no time is lost in its trainer. What would take hours is worked out from a
measured part, and says so. Writes ``peers.json`` into ``results/bench``, or ``results/bench/gpu``.
Run it on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

OUTPUT = Path("results/bench")
PACKAGES = {"anomalib": "2.7.0", "torch": "2.15.0", "torchvision": "0.29.2"}
SIDE = 320


def device() -> str:
    """Where detectors run."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def now() -> float:
    """Seconds, once all work on a GPU is done."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class Data:
    """Both splits of a category as batches, read from disk each time they are asked for."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.data import DataLoader

        from simplenet_lib.benchmark import datasets
        from simplenet_lib.config import preset

        config = preset("fast", resize=SIDE, crop=SIDE, ratio=1.0)
        self.normal, self.test, self.config = datasets(folder.parent, folder.name, config)
        self.loader = DataLoader(self.normal, batch_size=8)

    def batches(self) -> Iterator[Any]:
        """Batches of normal images on the device."""
        return (batch["image"].to(device()) for batch in self.loader)


def backbone() -> Any:
    """The ResNet-50 that this library uses, as a module."""
    from simplenet_lib.features import build_backbone
    from simplenet_lib.weights import find_weights

    return build_backbone("resnet50", find_weights("resnet50")).eval()


def simplenet(data: Data) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """Preset ``fast`` of this library, at the size that the others are given."""
    from simplenet_lib.localization import anomaly_map, image_score
    from simplenet_lib.training import train

    start = now()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["SIMPLENET_CACHE"] = cache
        model = train(data.normal, data.config, device=device(), progress=False).model

    def detect(images: Any) -> Any:
        maps = anomaly_map(model(images), data.config.seen, data.config.smoothing)
        return image_score(maps), maps

    return detect, {"train_seconds": now() - start}


def patchcore(data: Data) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """PatchCore with a memory of 1%; anomalib's default of 10% is worked out from it."""
    import torch
    from anomalib.models.image.patchcore.torch_model import PatchcoreModel

    start = now()
    model = PatchcoreModel(layers=("layer2", "layer3"), backbone=backbone()).to(device())
    model.train()
    with torch.inference_mode():
        for images in data.batches():
            model(images)
        collected = now()
        model.subsample_embedding(0.01)
        chosen = now()
    model.eval()
    found = {
        "train_seconds": chosen - start,
        "note": "memory of 1% of the vectors",
        "train_seconds_of_the_default_worked_out": collected - start + 10 * (chosen - collected),
    }
    return scored(model), found


def padim(data: Data) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """PaDiM with 100 channels, what anomalib takes of a ResNet-18."""
    import torch
    from anomalib.models.image.padim.torch_model import PadimModel

    torch.manual_seed(0)
    start = now()
    model = PadimModel(backbone(), ["layer1", "layer2", "layer3"], n_features=100).to(device())
    model.train()
    with torch.inference_mode():
        for images in data.batches():
            model(images)
        model.fit()
    model.eval()
    found = {"train_seconds": now() - start, "note": "100 channels of ResNet-50"}
    return scored(model), found


def supersimplenet(data: Data) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """SuperSimpleNet: a few measured steps, 300 epochs worked out; its score is not measured."""
    import torch
    from anomalib.models.image.supersimplenet.loss import SSNLoss
    from anomalib.models.image.supersimplenet.torch_model import SupersimplenetModel

    torch.manual_seed(0)
    model = SupersimplenetModel(backbone=backbone(), layers=["layer2", "layer3"]).to(device())
    loss_of = SSNLoss()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    images = next(data.batches())
    masks, labels = images.new_zeros(len(images), SIDE, SIDE), images.new_zeros(len(images))
    model.train()

    def step() -> None:
        loss = loss_of(*model(images, masks, labels))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return scored(model), worked_out(model, step, 300 * len(data.loader))


def efficientad(data: Data) -> tuple[Callable[[Any], Any], dict[str, Any]]:
    """EfficientAD: measured steps of one image, 70,000 worked out; its score is not measured.

    Its teacher's weights and ImageNette come from addresses of their own. The teacher is
    random here, which takes the same time.
    """
    import torch
    from anomalib.models.image.efficient_ad.torch_model import EfficientAdModel

    model = EfficientAdModel().to(device())
    trained = [*model.student.parameters(), *model.ae.parameters()]
    optimizer = torch.optim.Adam(trained, lr=1e-4, weight_decay=1e-5)
    image = data.normal[0]["image"][None].to(device())
    for name, like in (("mean", torch.zeros_like), ("std", torch.ones_like)):
        model.mean_std[name].data = like(model.mean_std[name])
    model.train()

    def step() -> None:
        loss = sum(model(image, image))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return scored(model), worked_out(model, step, 70_000)


def scored(model: Any) -> Callable[[Any], Any]:
    """Score and map of an image, from a network of anomalib."""

    def detect(images: Any) -> Any:
        result = model(images)
        return result.pred_score, result.anomaly_map

    return detect


def worked_out(model: Any, step: Callable[[], None], steps: int) -> dict[str, Any]:
    """Time of a training of so many steps, from three of them."""
    step()
    taken = []
    for _ in range(3):
        start = now()
        step()
        taken.append(now() - start)
    model.eval()
    one = statistics.median(taken)
    return {
        "train_seconds": one * steps,
        "note": f"training worked out: {steps:,} steps of {one:.1f} s",
        "untrained": True,
    }


DETECTORS = {
    work.__name__: work for work in (simplenet, padim, patchcore, supersimplenet, efficientad)
}


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Train one detector and apply it to every test image, one at a time."""
    import numpy as np
    import torch

    from simplenet_lib.metrics import image_metrics, pixel_metrics

    data = Data(folder)
    detect, found = DETECTORS[name](data)
    scores, maps, masks, seconds = [], [], [], []
    images = range(3) if found.pop("untrained", False) else range(len(data.test))
    with torch.inference_mode():
        detect(data.test[0]["image"][None].to(device()))
        for index in images:
            item = data.test[index]
            start = now()
            score, map_ = detect(item["image"][None].to(device()))
            seconds.append(now() - start)
            scores.append(float(score.flatten()[0]))
            maps.append(map_.reshape(SIDE, SIDE).float().cpu().numpy())
            masks.append(item["mask"].numpy())
        for count in (8, 64) if device() == "cuda" else ():  # one image leaves most of it idle
            some = torch.stack([data.test[index]["image"] for index in range(count)])
            taken = []
            for _ in range(5):
                start = now()
                detect(some.to(device()))
                taken.append(now() - start)
            found[f"image_ms_of_{count}"] = 1000 * statistics.median(taken) / count
    if len(scores) == len(data.test):
        labels = np.array([sample.label for sample in data.test.samples])
        found |= image_metrics(labels, np.array(scores)) | pixel_metrics(masks, maps)
    found["image_ms"] = 1000 * statistics.median(seconds)
    found["peak_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    if device() == "cuda":
        found["peak_gb_of_the_gpu"] = torch.cuda.max_memory_allocated() / 1e9
        found["gpu"] = torch.cuda.get_device_name()
    return found


def marked_maps() -> tuple[Any, Any]:
    """Masks of 83 images of 900x900, 63 with one defect, and maps that find it to some degree."""
    import numpy as np

    rng = np.random.default_rng(0)
    masks = np.zeros((83, 900, 900), dtype=bool)
    for index in range(20, 83):
        y, x = rng.integers(0, 800, 2)
        masks[index, y : y + 60, x : x + 90] = True
    maps = rng.standard_normal(masks.shape, dtype=np.float32)
    maps += masks
    return masks, maps


def metrics(name: str) -> dict[str, Any]:
    """Pixel AUROC and AUPRO of 83 maps of 900x900: this library, or torchmetrics and anomalib."""
    masks, maps = marked_maps()
    if name == "ours":
        from simplenet_lib.metrics import pixel_metrics

        start = time.perf_counter()
        found = pixel_metrics(list(masks), list(maps))
        auroc, aupro = found["pixel_auroc"], found["aupro"]
    else:
        import torch
        from anomalib.metrics.aupro import _AUPRO
        from torchmetrics.classification import BinaryAUROC

        scores, truth = torch.from_numpy(maps), torch.from_numpy(masks).int()
        start = time.perf_counter()
        area, overlap = BinaryAUROC(thresholds=None), _AUPRO(fpr_limit=0.3)
        area.update(scores.flatten(), truth.flatten())
        auroc = float(area.compute())
        overlap.update(scores, truth)
        aupro = float(overlap.compute())
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    return {"seconds": seconds, "peak_gb": peak, "pixel_auroc": auroc, "aupro": aupro}


METRICS = {
    "metrics of this library": lambda _: metrics("ours"),
    "metrics of torchmetrics and anomalib": lambda _: metrics("theirs"),
}


def install(environment: Path) -> Path:
    """An environment with anomalib and this library; its interpreter."""
    venv.create(environment, with_pip=True)
    python = environment / "bin" / "python"
    root = Path(__file__).parents[1]
    packages = [f"{name}=={wanted}" for name, wanted in PACKAGES.items()]
    command = [python, "-m", "pip", "install", "--quiet", "--editable", root, *packages]
    subprocess.run(command, check=True)
    return python


def main() -> None:
    """Measure the named detectors, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", choices=[[], *DETECTORS, *METRICS])
    parser.add_argument("--python", type=Path)
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        (name,) = arguments.names
        work = METRICS[name] if name in METRICS else functools.partial(measure, name)
        packages = [f"{name}=={version(name)}" for name in PACKAGES]
        print(json.dumps({**work(arguments.folder), "packages": packages}))
        return
    output = OUTPUT / ("gpu/peers.json" if device() == "cuda" else "peers.json")
    report: dict[str, Any] = json.loads(output.read_text()) if output.is_file() else {}
    with tempfile.TemporaryDirectory() as temporary:
        python = arguments.python or install(Path(temporary))
        for name in arguments.names or (*DETECTORS, *METRICS):
            command = [python, __file__, str(arguments.folder), name, "--measure"]
            variables = {**os.environ, "THP_MEM_ALLOC_ENABLE": "1"}  # as our command does
            done = subprocess.run(
                command, check=True, stdout=subprocess.PIPE, text=True, env=variables
            )
            report[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, report[name])
            report["images"] = f"{arguments.folder.name}, {SIDE} px"
            report["packages"] = report[name].pop("packages")
            report["hardware"] = f"{os.cpu_count()} CPU cores, {platform.machine()}"
            output.parent.mkdir(parents=True, exist_ok=True)
            output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
