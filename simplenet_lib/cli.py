"""The command ``simplenet``. PyTorch is imported only by the commands that need it."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simplenet_lib.config import PRESETS, Config, SimpleNetError
from simplenet_lib.config import preset as preset_named

if TYPE_CHECKING:
    from simplenet_lib.benchmark import Run
    from simplenet_lib.localization import Prediction
    from simplenet_lib.model import SimpleNet

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    help="Find defects in photographs, having seen only good parts: SimpleNet (CVPR 2023)."
    "\n\nStart with `simplenet train`: it draws a synthetic data set, trains on it,"
    " and prints where everything went. Then `simplenet predict` on images of yours.",
)

Data = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="Folder of good photos, or with folders OK and NG, or in the MVTec AD layout:"
        " train/good, test/good, test/DEFECT; or a folder of several such. Without it, the"
        " synthetic data set in data/synthetic, drawn if it is not there.",
    ),
]
Category = Annotated[
    str | None,
    typer.Option("--category", help="Folder in DATA to use. May be left out if there is one."),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        envvar="SIMPLENET_WEIGHTS",
        help="File or folder with the backbone's pretrained weights, if you have them.",
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="cpu, cuda, or auto: a GPU if PyTorch finds one.")
]


def _max_pixels(count: int | None) -> int | None:
    """Pillow refuses twice its limit: a small file could declare an image that fills memory."""
    if count is not None:
        from PIL import Image

        Image.MAX_IMAGE_PIXELS = -(-count // 2)
    return count


MaxPixels = Annotated[
    int | None,
    typer.Option(
        "--max-pixels",
        min=1,
        callback=_max_pixels,
        help="Read images of up to so many pixels, such as large scans; 178,956,970 by default.",
    ),
]
ModelPath = Annotated[
    Path, typer.Argument(help="A model.safetensors, or the folder that `train` wrote it to.")
]

SYNTHETIC = Path("data/synthetic")


def main() -> None:
    """Run the command; what the user can mend becomes one sentence and exit code 2."""
    # Memory in large pages, on Linux. PyTorch reads this before its first array, and the backbone
    # then takes up to a fifth less time (`benchmarks/speed.py`, pages).
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Threads that wait for others sleep. They would spin by default, and take the cores from
    # those that they wait for as soon as another program is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # Pillow warns at half of what it refuses.
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    # A name on the disk may be no text; printing it should not end the command.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        app()
    except (SimpleNetError, OSError) as error:
        print(f"simplenet: {error}", file=sys.stderr)
        sys.exit(2)


@app.command()
def synthetic(
    output: Annotated[Path, typer.Option(help="Folder to write.")] = SYNTHETIC,
    seed: Annotated[int, typer.Option(help="Another seed draws other images.")] = 0,
) -> None:
    """Draw the synthetic data set: cloth and hex nuts, with exact masks."""
    from simplenet_lib.synthetic import generate

    print(f"Synthetic data set: {generate(output, seed=seed)}")


@app.command()
def download(
    output: Annotated[Path, typer.Option(help="Folder to put the categories in.")] = Path(
        "data/mvtec_ad"
    ),
    category: Annotated[
        list[str] | None, typer.Option(help="Only this category; may be repeated.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Address, if the official one moved.")] = None,
    sha256: Annotated[str | None, typer.Option(help="Checksum of another archive.")] = None,
) -> None:
    """Download MVTec AD (5 GB, CC BY-NC-SA 4.0: not for commercial use)."""
    from simplenet_lib.download import MVTEC_SHA256, MVTEC_URL, download_mvtec

    folders = download_mvtec(output, category, url or MVTEC_URL, sha256 or MVTEC_SHA256)
    for folder in folders:
        print(folder)


@app.command()
def train(
    data: Data = None,
    category: Category = None,
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "fast",
    seed: Annotated[int, typer.Option(help="Seed of everything random.")] = 0,
    output: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; runs/CATEGORY-PRESET-SEED by default."),
    ] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Change one number of the preset, such as sigma=0.25 or"
            " layers=layer1,layer2; may be repeated. `simplenet info` lists the names.",
        ),
    ] = None,
    white: Annotated[
        float,
        typer.Option(
            help="The value that is white in photos of more than 8 bits, such as 4095; 0: found"
            " from their highest value.",
        ),
    ] = 0,
    skip_damaged: Annotated[
        bool, typer.Option("--skip-damaged", help="Train without the files that cannot be read.")
    ] = False,
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Train a detector on good photos; with test images, evaluate it on these.

    DATA is a folder of good photos and nothing else, or says by the names of its
    folders which are good: OK and NG, or train/good and test. Leaves model.safetensors and
    metrics.json in OUTPUT, and examples.png if there are test images. Ctrl-C
    keeps what was learned: the same command goes on from there.
    """
    config = _changed(preset_named(preset, seed=seed, white=white), changes or [])
    data, category = _find_data(data, category)
    output = output or Path("runs") / f"{category or data.resolve().name}-{preset}-{config.seed}"
    _check_writable(output)

    from simplenet_lib.model import write_whole

    state = output / "training.safetensors"
    written = [output / "model.safetensors", output / "metrics.json"]

    def keep(run: Run) -> None:
        run.trained.model.save(written[0])
        write_whole(written[1], _as_json(run.report))
        say(f"Trained: {written[0]}")

    say = _say_of(category or data.resolve().name)
    done = _run(data, category, config, weights, device, state, keep, say, skip_damaged)
    if done.predictions is not None:
        write_whole(written[1], _as_json(done.report))
        written.append(output / "examples.png")
        _write_examples(written[-1], done.trained.model, done.predictions)
        _print_metrics(done.report)
    else:
        print("No test images with and without a defect: nothing to evaluate.")
    scored = done.report["scored_unseen"]
    print(promise(scored, config.false_alarms))
    oddest = ", ".join(
        f"{name} ({score:.2f})" for name, score in done.report["oddest_training_images"].items()
    )
    print(f"The training photos that look least normal: {oddest}. Is there a defect in one?")
    state.unlink(missing_ok=True)
    for path in written:
        print(path)


@app.command()
def benchmark(
    data: Annotated[Path, typer.Option(help="Folder that holds categories, the MVTec AD layout.")],
    categories: Annotated[
        str | None, typer.Option(help="Some of them, such as bottle,grid; all by default.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0,1,2",
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "fast",
    output: Annotated[Path, typer.Option(help="Folder for one JSON a run.")] = Path("results"),
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Train and evaluate every category with every seed, and print a table.

    A run whose file is in OUTPUT already is skipped, so the same command goes on
    after Ctrl-C. The last step is what counts: test images choose nothing.
    """
    from simplenet_lib.benchmark import can_be_evaluated, datasets, is_done, read_runs, table
    from simplenet_lib.dataset import LAYOUTS
    from simplenet_lib.dataset import categories as categories_in
    from simplenet_lib.model import write_whole

    if not data.is_dir():
        raise SimpleNetError(f"{data}: no such folder.")
    names = categories.split(",") if categories else categories_in(data)
    if not names:
        raise SimpleNetError(f"{data}: holds no category. {LAYOUTS}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise SimpleNetError(f"--seeds {seeds}: expected numbers such as 0,1,2.") from None
    dataset = data.resolve().name
    missing = []
    for name in names:
        # A folder that cannot be read is found now, not after hours.
        _, test, config = datasets(data, name, preset_named(preset), say=_say_of(name))
        if not can_be_evaluated(test):
            raise SimpleNetError(f"{data / name}: no test images with and without a defect.")
        for number in numbers:
            path = output / f"{name}-{preset}-{number}.json"
            seeded = replace(config, seed=number)
            if not is_done(path, dataset, name, seeded):
                missing.append((name, seeded, path))
    _check_writable(output)
    for number, (name, config, path) in enumerate(missing, start=1):
        print(f"{number} of {len(missing)}: {name}, seed {config.seed}", flush=True)
        state = path.with_suffix(".training.safetensors")
        done = _run(data, name, config, weights, device, state)
        write_whole(path, _as_json(done.report))
        state.unlink(missing_ok=True)
    print(table(read_runs(output)))


def _run(
    data: Path,
    category: str | None,
    config: Config,
    weights: Path | None,
    device: str,
    state: Path,
    keep: Callable[[Run], None] = lambda run: None,
    say: Callable[[str], None] = lambda sentence: None,
    skip_damaged: bool = False,
) -> Run:
    """Train, and evaluate if there is a test split; what is learned is kept in ``state``."""
    from simplenet_lib.benchmark import run

    try:
        return run(
            data,
            category,
            config,
            weights=weights,
            device=_device(device),
            checkpoint=state,
            skip_damaged=skip_damaged,
            say=say,
            keep=keep,
        )
    except KeyboardInterrupt:
        kept = " Run the same command to go on from there." if state.is_file() else ""
        print(f"simplenet: stopped.{kept}", file=sys.stderr)
        raise typer.Exit(130) from None


def _say_of(name: str) -> Callable[[str], None]:
    """Print what was found in a category."""
    return lambda sentence: print(f"{name}: {sentence}", flush=True)


@app.command()
def evaluate(
    model: ModelPath,
    data: Data = None,
    category: Category = None,
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Evaluate a trained model on the test images of a category."""
    data, category = _find_data(data, category)
    if category is None:
        raise SimpleNetError(f"{data}: holds photos only. `simplenet predict` gives them verdicts.")
    from simplenet_lib.benchmark import compare
    from simplenet_lib.dataset import AnomalyDataset, make_transform
    from simplenet_lib.localization import evaluate as evaluate_model

    net = _load(model, weights, device)
    transform = make_transform(net.config.size, net.config.seen)
    test = AnomalyDataset(data, category, "test", transform, net.config.white)
    for sentence in filter(None, (test.found.summary(), test.mask_note)):
        _say_of(category)(sentence)
    _, predictions = evaluate_model(net, test)
    _print_metrics(compare(predictions))


@app.command()
def predict(
    model: ModelPath,
    images: Annotated[
        list[Path], typer.Argument(help="Images, or folders that are searched for images.")
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for predictions.csv and the overlays.")
    ] = Path("predictions"),
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Score images: a CSV with a verdict for each, and the anomaly map laid over each.

    The white line in an overlay encloses what is more anomalous than the
    threshold. An image counts as unfamiliar if it looks unlike the training
    photos as a whole: do not trust its verdict. A folder that an earlier
    `predict` wrote is replaced.
    """
    ours = {"predictions.csv", "overlays"}
    if os.path.lexists(output) and not (
        output.is_dir() and {path.name for path in output.iterdir()} in (set(), ours)
    ):
        raise SimpleNetError(f"{output}: exists and holds something else. Choose another.")
    found = _find_images(images, output)
    _check_writable(output.absolute().parent)

    from simplenet_lib.dataset import ImageFiles, Sample, make_transform, read_image
    from simplenet_lib.localization import predict as predict_images
    from simplenet_lib.plots import overlay

    net = _load(model, weights, device)
    transform = make_transform(net.config.size, net.config.seen)
    dataset = ImageFiles([Sample(path, "good") for path in found], transform, net.config.white)
    table = io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(["image", "score", "verdict", "unfamiliar", "overlay"])
    anomalous = unfamiliar = 0
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output.parent, prefix=".predict-") as scratch:
            staged = Path(scratch) / "predictions"
            for prediction in predict_images(net, dataset):
                path = prediction.sample.image
                name = Path("overlays") / found[path]
                image = read_image(path, white=net.config.white)
                picture = overlay(image, prediction.map, net.config)
                (staged / name).parent.mkdir(parents=True, exist_ok=True)
                picture.save(staged / name)
                verdict = "anomalous" if prediction.anomalous else "normal"
                anomalous += prediction.anomalous
                unlike = ", ".join(prediction.unfamiliar)
                unfamiliar += bool(unlike)
                writer.writerow([path, f"{prediction.score:.6g}", verdict, unlike, name])
            text = table.getvalue().encode(errors="surrogateescape")
            (staged / "predictions.csv").write_bytes(text)
            if output.exists():
                os.replace(output, Path(scratch) / "earlier")
            os.replace(staged, output)
    except OSError as error:
        raise SimpleNetError(f"{output}: could not be written ({error}).") from error
    print(f"{anomalous} of {len(found)} images are anomalous (score above 1).")
    if 2 * unfamiliar > len(found):
        print(
            f"{unfamiliar} of them look unlike the training photos as a whole (other light, focus,"
            " camera or product?): do not trust these verdicts. See chapter 12."
        )
    print(output / "predictions.csv")
    print(output / "overlays")


@app.command()
def export(
    model: ModelPath,
    output: Annotated[Path, typer.Option(help="File to write.")] = Path("model.onnx"),
    weights: Weights = None,
) -> None:
    """Write a trained model, backbone included, as one ONNX file for other programs.

    Input: RGB pixels (N, 3, side, side) from 0 to 1, resized and cropped as
    its metadata say. Outputs: anomaly map and image score.
    """
    net = _load(model, weights, "cpu")
    _check_writable(output.absolute().parent)
    from simplenet_lib.export import export_onnx

    export_onnx(net, output)
    print(output)


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="A trained model to describe.")] = None,
    weights: Weights = None,
) -> None:
    """Show versions, where the pretrained weights come from, the cache, and a model's settings."""
    from simplenet_lib.benchmark import versions
    from simplenet_lib.features import cache_folder
    from simplenet_lib.weights import find_weights

    for name, version in versions().items():
        print(f"{name:14} {version}")
    entries = list(cache_folder().glob("*.npy"))
    size = sum(entry.stat().st_size for entry in entries) / 1e9
    print(f"{'feature cache':14} {cache_folder()}: {len(entries)} files, {size:.1f} GB")
    if model is None:
        print(f"{'weights':14} {find_weights('resnet50', weights).source}")
        config = PRESETS["fast"]
    else:
        net = _load(model, weights, "cpu")
        config = net.config
    print(f"{'preset':14} {config.preset}")
    for name, value in json.loads(config.to_json()).items():
        print(f"  {name:16} {value}")


def _find_data(data: Path | None, category: str | None) -> tuple[Path, str | None]:
    """The data folder and category to use; None for a folder of good photos alone.

    The synthetic set is drawn if nothing is named.
    """
    if data is None:
        from simplenet_lib.synthetic import generate

        category = category or "nut"
        print(f"Using '{category}' of the synthetic data set in {SYNTHETIC}.")
        return generate(SYNTHETIC), category
    if not data.is_dir():
        raise SimpleNetError(f"{data}: no such folder.")
    from simplenet_lib.dataset import categories, is_category

    here = data if data.name not in ("", "..") else data.resolve()
    if is_category(data) and category in (None, here.name):
        return here.parent, here.name
    if category is None:
        found = categories(data)
        if not found:
            return data, None
        if len(found) > 1:
            raise SimpleNetError(f"{data}: name a --category. Found: {', '.join(found)}.")
        category = found[0]
    return data, category


def _changed(config: Config, changes: list[str]) -> Config:
    """Apply ``--set NAME=VALUE``; the configuration checks names, types and ranges itself."""
    values: dict[str, Any] = json.loads(config.to_json())
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals or name not in values or name == "preset":
            raise SimpleNetError(
                f"--set {change}: expected NAME=VALUE with one of {', '.join(values)}."
            )
        if name == "layers":
            values[name] = text.split(",")
        else:
            try:
                values[name] = json.loads(text)
            except ValueError:
                values[name] = text
    return Config.from_json(json.dumps(values))


def _find_images(paths: list[Path], output: Path) -> dict[Path, Path]:
    """Every image to predict, and the name of its overlay; an earlier output is left out."""
    from simplenet_lib.dataset import image_files, passed_over

    found: dict[Path, Path] = {}
    passed: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            for image in image_files(path, passed):
                if not image.resolve().is_relative_to(output.resolve()):
                    found[image] = image.relative_to(path).with_suffix(".png")
        elif path.exists():
            found[path] = Path(path.stem + ".png")
        else:
            raise SimpleNetError(f"{path}: no such image or folder.")
    if not found:
        but = f", but {passed_over(passed)}" if passed else ""
        raise SimpleNetError(f"{', '.join(map(str, paths))}: no images found{but}.")
    print(f"Found {len(found)} images{'; ' if passed else ''}{passed_over(passed)}.", flush=True)
    taken: set[Path] = set()
    for image, name in found.items():  # a.jpg and a.png must not share one overlay
        number = 2
        unique = name
        while unique in taken:
            unique = name.with_stem(f"{name.stem}-{number}")
            number += 1
        taken.add(unique)
        found[image] = unique
    return found


def _check_writable(folder: Path) -> None:
    """Fail before the work, not after it, if nothing can be written to ``folder``."""
    try:
        existing = folder.absolute()
        while not existing.exists():
            existing = existing.parent
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise SimpleNetError(f"{folder}: cannot be written to ({error}).") from error


def _load(path: Path, weights: Path | None, device: str) -> SimpleNet:
    from simplenet_lib.model import SimpleNet

    file = path / "model.safetensors" if path.is_dir() else path
    return SimpleNet.load(file, weights).to(_device(device))


def _device(name: str) -> str:
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name not in ("cpu", "cuda"):
        raise SimpleNetError(f"unknown device '{name}'. Known: cpu, cuda, auto.")
    if name == "cuda" and not torch.cuda.is_available():
        raise SimpleNetError("no CUDA device found. Use --device cpu.")
    return name


def promise(count: int, false_alarms: float) -> str:
    """What can be said of false alarms at a threshold from ``count`` good photos."""
    from simplenet_lib.localization import allowed

    rank = max(1, allowed(count, false_alarms))
    which = "highest score" if rank == 1 else f"number {rank} of the highest scores"
    return (
        f"The threshold is the {which} of {count} good photos, each scored by heads that have"
        f" not seen it: expect about {rank / (count + 1):.1%} false alarms on photos like them."
    )


def _as_json(report: dict[str, Any]) -> bytes:
    return (json.dumps(report, indent=2) + "\n").encode()


def _print_metrics(metrics: dict[str, Any]) -> None:
    names = {
        "image_auroc": "image AUROC",
        "image_ap": "image AP",
        "image_f1max": "image F1-max",
        "pixel_auroc": "pixel AUROC",
        "pixel_ap": "pixel AP",
        "aupro": "AUPRO (to 30% FPR)",
        "false_alarm_rate": "false alarms at the threshold",
        "detection_rate": "defects found at the threshold",
    }
    for key, name in names.items():
        value = f"{metrics[key]:.3f}" if key in metrics else "no masks"
        print(f"{name:32} {value}")
    if "mask_note" in metrics:
        print(metrics["mask_note"])


def _write_examples(path: Path, model: SimpleNet, predictions: list[Prediction]) -> None:
    """A picture of the first image of every kind, normal first."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from simplenet_lib.model import write_whole
    from simplenet_lib.plots import gallery

    kinds = {prediction.sample.defect: prediction for prediction in reversed(predictions)}
    order = sorted(kinds, key=lambda defect: (defect != "good", defect))[:8]
    figure = gallery([kinds[kind] for kind in order], model.config)
    picture = io.BytesIO()
    figure.savefig(picture, dpi=100, format="png")
    plt.close(figure)
    write_whole(path, picture.getvalue())


if __name__ == "__main__":
    main()
