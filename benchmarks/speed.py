"""Speed and memory as ratios, each measured in one run on one machine.

    python benchmarks/speed.py [NAME ...] [--data ROOT/CATEGORY]

NAME is a function of this file; all of them without one. ``quality`` and
``load`` need ``--data`` and are left out without it. Writes one JSON each to
``results/bench``, from a machine with a CUDA GPU to ``results/bench/gpu``. Run it on a machine
that does nothing else. The bare backbone is torchvision's network up to the last layer in use,
without anything of ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torchvision.models.feature_extraction import create_feature_extractor

from simplenet_lib import __version__
from simplenet_lib.benchmark import datasets, hardware
from simplenet_lib.cli import MALLOC, set_up_process
from simplenet_lib.config import preset
from simplenet_lib.dataset import ImageFiles, make_transform, photos
from simplenet_lib.export import Detector, export_onnx
from simplenet_lib.features import FEATURE_BATCH, batches, build_backbone
from simplenet_lib.localization import Result, evaluate, results
from simplenet_lib.model import SimpleNet
from simplenet_lib.synthetic import generate
from simplenet_lib.training import train
from simplenet_lib.weights import find_weights

#: Variables of the environment with which PyTorch runs as it comes: none of the command's.
PLAIN = {"THP_MEM_ALLOC_ENABLE": "0"} | dict.fromkeys((name for name, *_ in MALLOC), "")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
OUTPUT = Path("results/bench/gpu" if DEVICE == "cuda" else "results/bench")


def seconds(work: Callable[[], object]) -> float:
    """How long ``work`` takes, all of its work on a GPU included."""
    start = time.perf_counter()
    work()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def alternating(*works: Callable[[], object], rounds: int = 7) -> list[float]:
    """Median seconds of each, taken in turns so that a slow spell meets all of them."""
    for work in works:
        seconds(work)
    taken = [[seconds(work) for work in works] for _ in range(rounds)]
    return [statistics.median(column) for column in zip(*taken, strict=True)]


@contextmanager
def fresh_cache() -> Iterator[Path]:
    """A feature cache that holds nothing yet."""
    with tempfile.TemporaryDirectory() as folder:
        before = os.environ.get("SIMPLENET_CACHE")
        os.environ["SIMPLENET_CACHE"] = folder
        try:
            yield Path(folder)
        finally:
            del os.environ["SIMPLENET_CACHE"]
            if before is not None:
                os.environ["SIMPLENET_CACHE"] = before


def new_model(ratio: float = 0.0) -> SimpleNet:
    """Preset ``fast`` with untrained heads, for what does not depend on what it learned."""
    config = preset("fast", ratio=ratio)
    model = SimpleNet(config, find_weights(config.backbone)).eval()
    model.typical, model.threshold = 0.0, 1.0
    return model.to(DEVICE)


def bare_backbones() -> dict[str, Callable[[Tensor], object]]:
    """The pretrained network up to layer3, run in the three ways that PyTorch offers."""

    def network() -> nn.Module:
        config = preset("fast")
        whole = build_backbone(config.backbone, find_weights(config.backbone))
        last = config.layers[-1]
        return create_feature_extractor(whole, {last: last}).eval().to(DEVICE)

    plain, last = network(), network().to(memory_format=torch.channels_last)
    compiled = torch.compile(network().to(memory_format=torch.channels_last))

    def turned(run: Callable[[Tensor], object]) -> Callable[[Tensor], object]:
        return lambda images: run(images.contiguous(memory_format=torch.channels_last))

    return {"eager": plain, "channels_last": turned(last), "compiled": turned(compiled)}


@torch.inference_mode()
def inference(_: Path | None) -> dict[str, Any]:
    """Image in, map and score out, over the bare backbone: plain, compiled, ONNX Runtime."""
    import onnxruntime

    model = new_model()
    detector = Detector(model).to(DEVICE).eval()
    compiled = torch.compile(detector)
    bare = bare_backbones()
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.onnx"
        export_onnx(model, file)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        for batch in (64, 8, 1) if DEVICE == "cuda" else (8, 1):
            pixels = torch.rand(batch, 3, *model.config.seen, device=DEVICE)
            on_host = pixels.cpu().numpy()
            taken: dict[str, float] = {}
            # One group after the other: compiled code and ONNX Runtime bring threads of their
            # own, which keep a core busy for a while after each call.
            for group in (
                {
                    "bare_eager": functools.partial(bare["eager"], pixels),
                    "bare_channels_last": functools.partial(bare["channels_last"], pixels),
                    "ours": functools.partial(detector, pixels),
                },
                {
                    "bare_compiled": functools.partial(bare["compiled"], pixels),
                    "ours_compiled": functools.partial(compiled, pixels),
                },
                {"onnxruntime_cpu": functools.partial(session.run, None, {"pixels": on_host})},
            ):
                taken |= dict(zip(group, alternating(*group.values()), strict=True))
            eager = min(taken["bare_eager"], taken["bare_channels_last"])
            best = min(eager, taken["bare_compiled"])
            found[f"batch_{batch}"] = {
                "ms_an_image": {name: 1000 * value / batch for name, value in taken.items()},
                "ratio_to_eager": taken["ours"] / eager,
                "ratio_to_best": taken["ours"] / best,
                "ratio_compiled_to_best": taken["ours_compiled"] / best,
                "ratio_onnxruntime_to_best": taken["onnxruntime_cpu"] / best,
                "images_per_second": batch / taken["ours"],
            }
    return found


def megapixels(_: Path | None) -> dict[str, Any]:
    """JPEG photos of 12 megapixels, from file to verdict, over the bare backbone alone."""
    model = new_model(ratio=0.75)
    bare = bare_backbones()["eager"]
    images = torch.rand(FEATURE_BATCH, 3, *model.config.seen, device=DEVICE)
    count = 8 * FEATURE_BATCH
    generator = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        small = next((generate(Path(folder)) / "nut/train/good").iterdir())
        large = np.asarray(Image.open(small).convert("RGB").resize((4000, 3000)), dtype=float)
        grain = generator.normal(0, 6, large.shape)  # a camera's: it makes the files large
        file = Path(folder) / "photo.jpg"
        Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(file, quality=92)

        def ours() -> None:
            for result in results(model, [file] * count, [""] * count):
                assert isinstance(result, Result), result

        @torch.inference_mode()
        def network() -> None:
            for _number in range(count // FEATURE_BATCH):
                bare(images)

        predicted, backbone = alternating(ours, network, rounds=5)
        return {
            "pixels": [4000, 3000],
            "megabytes": file.stat().st_size / 1e6,
            "seen": list(model.config.seen),
            "ms_an_image": {"ours": 1000 * predicted / count, "bare": 1000 * backbone / count},
            "ratio": predicted / backbone,
        }


def pages(_: Path | None) -> dict[str, Any]:
    """Features of 32 images with large memory pages and kept memory, as the command asks for."""
    code = (
        "import time, torch\n"
        "from simplenet_lib.config import preset\n"
        "from simplenet_lib.model import SimpleNet\n"
        "from simplenet_lib.weights import find_weights\n"
        "model = SimpleNet(preset('fast'), find_weights('resnet50'))\n"
        "images = torch.rand(8, 3, 384, 384)\n"
        "model.features(images)\n"
        "start = time.perf_counter()\n"
        "for _ in range(4):\n"
        "    model.features(images)\n"
        "print(time.perf_counter() - start)\n"
    )
    ways = {"large_and_kept": {}, "kept": {"THP_MEM_ALLOC_ENABLE": "0"}, "plain": PLAIN}
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for _round in range(3):
        for way, changes in ways.items():
            taken[way].append(float(run_python(code, **changes)))
    seconds_of = {way: statistics.median(column) for way, column in taken.items()}
    return {"seconds": seconds_of, "ratio": seconds_of["large_and_kept"] / seconds_of["plain"]}


def evaluation(_: Path | None) -> dict[str, Any]:
    """Peak memory of ``simplenet evaluate``: 2,000 images of 1,024 px, half of them with masks."""
    model, count, side = new_model(), 2000, 1024
    with tempfile.TemporaryDirectory() as folder:
        drawn, large = generate(Path(folder) / "small") / "nut", Path(folder) / "large/nut"
        model.save(Path(folder) / "model.safetensors")
        good = sorted(drawn.glob("test/good/*"))
        bad = sorted(set(drawn.glob("test/*/*")) - set(good))
        for files in (good, bad):
            for number in range(count // 2):  # the same ones again and again cost as much
                first = number % len(files)
                image = files[first]
                mask = drawn / "ground_truth" / image.parent.name / f"{image.stem}_mask.png"
                for file, suffix in ((image, ""), (mask, "_mask"))[: 2 if files is bad else 1]:
                    path = large / file.parent.relative_to(drawn) / f"{number:04}{suffix}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    if number == first:
                        Image.open(file).resize((side, side), Image.Resampling.NEAREST).save(path)
                    else:
                        os.link(path.with_name(f"{first:04}{suffix}.png"), path)
        command = [sys.executable, "-m", "simplenet_lib.cli", "evaluate"]
        command += [str(Path(folder) / "model.safetensors"), "--data", str(large)]
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return {
            "images": count,
            "side": side,
            "peak_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024 / 1e9,
            "seconds": time.perf_counter() - start,
        }


def metrics(_: Path | None) -> dict[str, Any]:
    """AUPRO, pixel AUROC and pixel AP of 83 maps of 900x900, and the memory that they need."""
    code = (
        "import resource, sys, time\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "from peers import marked_maps\n"
        "from simplenet_lib.metrics import pixel_metrics\n"
        "masks, maps = marked_maps()\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "start = time.perf_counter()\n"
        "pixel_metrics(list(masks), list(maps))\n"
        "print(time.perf_counter() - start)\n"
        "print(before / 1e6, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)\n"
    )
    lines = run_python(code).split()
    return {
        "pixels": 83 * 900 * 900,
        "seconds": float(lines[0]),
        "peak_gb_with_the_maps": float(lines[2]),
        "peak_gb_before": float(lines[1]),
    }


def imports(_: Path | None) -> dict[str, Any]:
    """Import of the library beyond torch's, and the time of ``simplenet --help``."""
    modules = ["training", "localization", "plots", "synthetic", "benchmark"]
    lines = "".join(f"import simplenet_lib.{name}\n" for name in modules)
    timed = "import time\nimport torch, torchvision\nstart = time.perf_counter()\n"
    timed += f"{lines}print(time.perf_counter() - start)"
    found = [float(run_python(timed)) for _ in range(2)]
    program = str(Path(sys.executable).parent / "simplenet")
    helps = []
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([program, "--help"], check=True, capture_output=True)
        helps.append(time.perf_counter() - start)
    return {
        "every_module_beyond_torch_seconds": min(found),
        "help_seconds": statistics.median(helps),
        "help_imports_torch": "torch"
        in run_python("import sys, simplenet_lib.cli\nprint([*sys.modules])"),
    }


def memory(_: Path | None) -> dict[str, Any]:
    """Peak memory and speed of training on few and on many photos of 64 px."""
    peaks: dict[int, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for index in range(10_000):
            noise = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
            Image.fromarray(noise).save(Path(folder) / f"{index:05}.bmp")
        for count in (1000, 10_000):
            code = (
                "import resource, sys\n"
                "sys.path.insert(0, 'benchmarks')\n"
                "from speed import AnonymousPeak\n"
                "from pathlib import Path\n"
                "from simplenet_lib.config import preset\n"
                "from simplenet_lib.dataset import ImageFiles, make_transform, photos\n"
                "from simplenet_lib.training import train\n"
                f"samples = photos(Path({folder!r}))[:{count}]\n"
                "config = preset('fast', resize=64, crop=64)\n"
                "with AnonymousPeak() as peak:\n"
                "    result = train(ImageFiles(samples, make_transform(64, 64)), config,"
                " progress=False)\n"
                "print(peak.megabytes)\n"
                "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000)\n"
                "print(result.seconds_features)\n"
            )
            with fresh_cache():
                peaks[count] = [float(line) for line in run_python(code).split()]
    few, many = peaks[1000], peaks[10_000]
    return {
        "anonymous_peak_mb": {"1000": few[0], "10000": many[0]},
        "anonymous_mb_per_image": (many[0] - few[0]) / 9000,
        "resident_peak_mb_with_mapped_cache": {"1000": few[1], "10000": many[1]},
        "cache_mb_per_image": 2 * 8 * 8 * 1536 / 1e6,
        "images_per_second": {"1000": 1000 / few[2], "10000": 10_000 / many[2]},
    }


@torch.inference_mode()
def loading(_: Path | None) -> dict[str, Any]:
    """Share of a feature pass that the backbone spends waiting for photos of 900x900."""
    model = new_model()
    with tempfile.TemporaryDirectory() as folder:
        rng = np.random.default_rng(0)
        for index in range(160):
            coarse = rng.integers(0, 256, (90, 90, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((900, 900), Image.Resampling.BICUBIC)
            image.save(Path(folder) / f"{index:03}.png")
        files = ImageFiles(photos(Path(folder)), make_transform(384, 384))
        images = torch.stack([files[index]["image"] for index in range(len(files))])
        loaded = images.split(FEATURE_BATCH)
        model.features(loaded[0].to(DEVICE))
        alone = seconds(lambda: [model.features(batch.to(DEVICE)) for batch in loaded])
        waited, start = 0.0, time.perf_counter()
        reading = batches(files)
        while True:
            asked = time.perf_counter()
            batch = next(reading, None)
            waited += time.perf_counter() - asked
            if batch is None:
                break
            seconds(functools.partial(model.features, batch["image"].to(DEVICE)))
        whole = time.perf_counter() - start
        reading_alone = seconds(lambda: [files[index] for index in range(len(files))])
    return {
        "backbone_alone_seconds": alone,
        "reading_alone_seconds": reading_alone,
        "whole_seconds": whole,
        "idle_share": waited / whole,
        "whole_over_backbone": whole / alone,
    }


class AnonymousPeak:
    """Highest anonymous memory of this process: what the system cannot take back by itself.

    The pages of a mapped file count as resident, too, but are given back when
    memory is short. Linux only.
    """

    def __enter__(self) -> AnonymousPeak:
        self.megabytes, self.stopped = 0.0, threading.Event()
        self.watcher = threading.Thread(target=self._watch)
        self.watcher.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        self.watcher.join()

    def _watch(self) -> None:
        while not self.stopped.wait(0.05):
            lines = Path("/proc/self/status").read_text().splitlines()
            size = next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
            self.megabytes = max(self.megabytes, size / 1000)


def quality(folder: Path | None) -> dict[str, Any]:
    """From files to a measured detector, over one bare pass of the same images.

    Head training is all K heads, units and threshold included, over the bare pass of the
    training images: as PyTorch runs it by itself, in a process of its own, and with pages and
    memory as the command asks for. Bare passes and training alternate, three times: these
    machines change their speed from minute to minute. The middle round is reported.
    """
    assert folder is not None
    normal, test, config = datasets(folder.parent, folder.name, preset("fast"))
    assert test is not None
    images = [
        torch.stack([split[index]["image"] for index in range(len(split))])
        for split in (normal, test)
    ]
    bare = bare_backbones()

    @torch.inference_mode()
    def bare_pass(name: str) -> list[float]:
        taken = []
        for part in images:
            parts = part.to(DEVICE).split(FEATURE_BATCH)
            bare[name](parts[0]), bare[name](parts[-1])  # compiled, and first calls are slow
            taken.append(seconds(lambda parts=parts: [bare[name](some) for some in parts]))
        return taken

    by_itself = (
        "import sys, torch\n"
        "sys.path.insert(0, 'benchmarks')\n"
        "from pathlib import Path\n"
        "from speed import DEVICE, bare_backbones, seconds\n"
        "from simplenet_lib.benchmark import datasets\n"
        "from simplenet_lib.config import preset\n"
        "from simplenet_lib.features import FEATURE_BATCH\n"
        f"folder = Path({str(folder)!r})\n"
        "normal, _, _ = datasets(folder.parent, folder.name, preset('fast'))\n"
        "images = torch.stack([normal[index]['image'] for index in range(len(normal))])\n"
        "parts, bare = images.split(FEATURE_BATCH), bare_backbones()['channels_last']\n"
        "with torch.inference_mode():\n"
        "    bare(parts[0].to(DEVICE))\n"
        "    print(seconds(lambda: [bare(part.to(DEVICE)) for part in parts]))\n"
    )
    rounds = []
    for _ in range(3):
        plain = float(run_python(by_itself, **PLAIN))
        backbone = bare_pass("channels_last")
        with fresh_cache():
            start = time.perf_counter()
            trained = train(normal, config, device=DEVICE, progress=False)
            middle = time.perf_counter()
            found, _ = evaluate(trained.model, test, progress=False)
            end = time.perf_counter()
        rounds.append(
            {
                "plain_training_images_seconds": plain,
                "bare_training_images_seconds": backbone[0],
                "bare_seconds": sum(backbone),
                "features_seconds": trained.seconds_features,
                "training_seconds": trained.seconds_training,
                "evaluation_seconds": end - middle,
                "whole_seconds": end - start,
                "image_auroc": found["image_auroc"],
                "training_ratio": trained.seconds_training / plain,
                "training_ratio_to_pages_and_memory": trained.seconds_training / backbone[0],
                "whole_ratio": (end - start) / sum(backbone),
            }
        )
    return {**sorted(rounds, key=lambda taken: taken["training_ratio"])[1], "rounds": rounds}


def load(folder: Path | None) -> dict[str, Any]:
    """Head training while another process keeps one core busy, over the same alone."""
    assert folder is not None
    code = (
        "from pathlib import Path\n"
        "from simplenet_lib.benchmark import datasets\n"
        "from simplenet_lib.config import preset\n"
        "from simplenet_lib.training import train\n"
        f"folder = Path({str(folder)!r})\n"
        "normal, _, config = datasets(folder.parent, folder.name, preset('fast'))\n"
        "print(train(normal, config, progress=False).seconds_training)\n"
    )
    taken: dict[str, list[float]] = {"alone": [], "beside": []}
    run_python(code)  # now the features are cached
    for _ in range(3):
        taken["alone"].append(float(run_python(code, OMP_WAIT_POLICY="PASSIVE")))
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            taken["beside"].append(float(run_python(code, OMP_WAIT_POLICY="PASSIVE")))
        finally:
            busy.kill()
            busy.wait()
    alone, beside = (statistics.median(column) for column in taken.values())
    return {"alone_seconds": alone, "beside_seconds": beside, "ratio": beside / alone}


def run_python(code: str, **environment: str) -> str:
    """What a new interpreter prints; an empty variable is none."""
    command = [sys.executable, "-c", code]
    variables = {name: value for name, value in {**os.environ, **environment}.items() if value}
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    return done.stdout


ALL = (imports, pages, inference, megapixels, evaluation, metrics, loading, memory, quality, load)


def main() -> None:
    """Measure what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *(work.__name__ for work in ALL)])
    parser.add_argument("--data", type=Path)
    arguments = parser.parse_args()
    OUTPUT.mkdir(parents=True, exist_ok=True)
    set_up_process()  # as the command does
    names = arguments.names or [work.__name__ for work in ALL]
    for work in ALL:
        name = work.__name__
        if name not in names:
            continue
        if len(names) > 1:  # each in a process of its own
            data = ["--data", str(arguments.data)] if arguments.data else []
            subprocess.run([sys.executable, __file__, name, *data], check=True)
            continue
        if name in ("quality", "load") and arguments.data is None:
            print(f"{name}: needs --data ROOT/CATEGORY")
            continue
        found = {
            **work(arguments.data),
            "versions": {"simplenet_lib": __version__, "torch": torch.__version__},
            "hardware": hardware(DEVICE),
        }
        (OUTPUT / f"{name}.json").write_text(json.dumps(found, indent=2) + "\n")
        print(name, json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
