"""The command ``simplenet``. PyTorch is imported only by the commands that need it."""

from __future__ import annotations

import ctypes
import io
import json
import math
import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from simplenet_lib.config import PRESETS, Config, SimpleNetError
from simplenet_lib.config import preset as preset_named

if TYPE_CHECKING:
    from simplenet_lib.benchmark import Run
    from simplenet_lib.dataset import ImageFiles
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
    str,
    typer.Option(
        "--device", help="cpu, cuda, cuda:1, mps, or auto: a CUDA GPU if PyTorch finds one."
    ),
]
Threshold = Annotated[
    float,
    typer.Option("--threshold", help="Score above which an image is anomalous; 1: the model's."),
]
MaxFalseAlarms = Annotated[
    float | None,
    typer.Option(
        "--max-false-alarms",
        min=0,
        max=0.5,
        help="Share of good photos that may be called anomalous, such as 0.01; 0 for none of those"
        " that set the threshold. 0.05 by default.",
    ),
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

SkipDamaged = Annotated[
    bool, typer.Option("--skip-damaged", help="Go on without the files that cannot be read.")
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Work with Ray: `local` starts it on this machine and ends it again, `auto` or"
        " HOST:PORT is a cluster that runs. Needs the extra `cluster`.",
    ),
]

SYNTHETIC = Path("data/synthetic")
GO_ON = " Run the same command to go on from there."
#: Options of glibc's allocator: their names in the environment, their numbers for mallopt, bytes.
MALLOC = (
    ("MALLOC_MMAP_THRESHOLD_", -3, 2**30),
    ("MALLOC_TRIM_THRESHOLD_", -1, 2**30),
    ("MALLOC_TOP_PAD_", -2, 2**26),
)


def main() -> None:
    """Run the command; what the user can mend becomes one sentence and exit code 2."""
    set_up_process()
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
    except (RuntimeError, MemoryError) as error:  # PyTorch's are known by their words alone
        text = f"{type(error).__name__} {error}".lower()
        if any(word in text for word in ("memoryerror", "out of memory", "allocate memory")):
            what = "the memory is full: close other programs, or use --device cpu if it is a GPU's"
        elif "cuda error" in text or "no kernel image" in text:
            what = f"the GPU failed ({str(error).splitlines()[0]}): use --device cpu"
        else:
            raise
        print(f"simplenet: {what}.", file=sys.stderr)
        sys.exit(2)


def set_up_process() -> None:
    """Choose how this process and those that it starts wait and use memory, for speed."""
    # Memory in large pages, on Linux. PyTorch reads this before its first array.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # Threads that wait for others sleep. They would spin by default, and take the cores from
    # those that they wait for as soon as another program is busy.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    keep_memory()


def keep_memory() -> None:
    """Have Linux keep the memory of arrays that are gone for those that come, up to 1 GB.

    It would take it back from large ones, and fill it with zeros for the next: the backbone
    then takes up to half as long again (`benchmarks/speed.py`, pages).
    """
    for name, option, size in MALLOC:
        if name not in os.environ:
            os.environ[name] = str(size)  # for processes that this one starts
            if sys.platform == "linux":
                with suppress(OSError, AttributeError):  # a C library without it
                    ctypes.CDLL(None).mallopt(option, size)


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
    tile: Annotated[
        int,
        typer.Option(
            help="For small defects in large photos: look at them at their own resolution, in"
            " overlapping tiles of so many pixels, such as 640.",
        ),
    ] = 0,
    skip_damaged: SkipDamaged = False,
    max_pixels: MaxPixels = None,
    max_false_alarms: MaxFalseAlarms = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Train a detector on good photos; with test images, evaluate it on these.

    DATA is a folder of good photos and nothing else, or says by the names of its
    folders which are good: OK and NG, or train/good and test. Leaves model.safetensors and
    metrics.json in OUTPUT, and examples.png if there are test images. Ctrl-C
    keeps what was learned: the same command goes on from there. A model that is
    there already is never overwritten.
    """
    config = _changed(preset_named(preset, seed=seed, white=white, tile=tile), changes or [])
    if max_false_alarms is not None:
        config = replace(config, false_alarms=max_false_alarms)
    data, category = _find_data(data, category)
    output = output or Path("runs") / f"{category or data.resolve().name}-{preset}-{config.seed}"
    from simplenet_lib.benchmark import is_trained, write_run
    from simplenet_lib.model import check_writable

    check_writable(output)
    state = output / "training.safetensors"
    written = [output / "model.safetensors", output / "metrics.json"]

    def ready(normal: ImageFiles, config: Config) -> None:
        done = written[1].is_file() and not state.is_file()  # and not stopped on the way
        if is_trained(written[0], normal, config, weights) and done:
            print(
                f"{written[0]} is there already, of the same images and settings. To evaluate it:"
                f" simplenet evaluate {output}"
            )
            raise typer.Exit

    def keep(run: Run) -> None:
        run.trained.model.save(written[0])
        write_run(written[1], run.report | where)
        say(f"Trained: {written[0]}")

    say = _say_of(category or data.resolve().name)
    where = {"data": str(data.resolve())}
    done = _run(
        data,
        category,
        config,
        weights,
        device,
        state,
        ready=ready,
        keep=keep,
        say=say,
        skip_damaged=skip_damaged,
    )
    if done.predictions is not None:
        write_run(written[1], done.report | where)
        written.append(output / "examples.png")
        _write_examples(written[-1], done.trained.model, done.predictions)
        _print_metrics(done.report)
    else:
        print("No test images with and without a defect: nothing to evaluate.")
    _print_promise(
        done.report["scored_unseen"],
        config.false_alarms,
        max_false_alarms is not None,
        "each scored by heads that have not seen it",
    )
    oddest = ", ".join(
        f"{name} ({score:.2f})" for name, score in done.report["oddest_training_images"].items()
    )
    print(f"The training photos that look least normal: {oddest}. Is there a defect in one?")
    state.unlink(missing_ok=True)
    for path in written:
        print(path)


@app.command()
def benchmark(
    data: Annotated[
        Path | None, typer.Option(help="Folder that holds categories, the MVTec AD layout.")
    ] = None,
    categories: Annotated[
        str | None, typer.Option(help="Some of them, such as bottle,grid; all by default.")
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, such as 0,1,2.")] = "0,1,2",
    preset: Annotated[str, typer.Option(help=f"One of {', '.join(PRESETS)}.")] = "fast",
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE,...",
            help="Try every value of a number of the preset, such as sigma=0.25,0.5; of several"
            " names every combination. Of layers one choice each time: layers=layer1,layer2.",
        ),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for one JSON a run.")] = Path("results"),
    only_table: Annotated[
        bool, typer.Option("--table", help="Only print the table of the runs in OUTPUT.")
    ] = False,
    skip_damaged: SkipDamaged = False,
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
    ray: RayAddress = None,
) -> None:
    """Train and evaluate every category with every seed, and print a table.

    A run whose file is in OUTPUT already is skipped, so the same command goes on
    after Ctrl-C. The last step is what counts: test images choose nothing. In the table
    the first ± is the standard deviation over seeds, the second the one over test images.
    """
    from simplenet_lib.benchmark import missing_jobs, read_runs, table
    from simplenet_lib.dataset import LAYOUTS
    from simplenet_lib.dataset import categories as categories_in
    from simplenet_lib.model import check_writable

    if only_table:
        runs = read_runs(output)
        if not runs:
            raise SimpleNetError(f"{output}: holds no runs.")
        print(table(runs))
        return
    if data is None:
        raise SimpleNetError("name the folder of categories: --data FOLDER.")
    if not data.is_dir():
        raise SimpleNetError(f"{data}: no such folder.")
    names = categories.split(",") if categories else categories_in(data)
    if not names:
        raise SimpleNetError(f"{data}: holds no category. {LAYOUTS}")
    try:
        numbers = [int(seed) for seed in seeds.split(",")]
    except ValueError:
        raise SimpleNetError(f"--seeds {seeds}: expected numbers such as 0,1,2.") from None
    configs = _variants(preset_named(preset), changes or [])
    failed: dict[str, str] = {}
    if ray is None:
        device = _device(device)
    else:
        from simplenet_lib.cluster import sweep

        data, output = data.absolute(), output.absolute()  # other machines know no current folder
    jobs = missing_jobs(
        data,
        names,
        configs,
        numbers,
        output,
        skip_damaged=skip_damaged,
        say=lambda name, sentence: _say_of(name)(sentence),
    )
    check_writable(output)
    try:
        if ray is not None:
            failed = sweep(jobs, ray, weights=weights, device=device)
        else:
            for number, job in enumerate(jobs, start=1):
                print(f"{number} of {len(jobs)}: {job.path.stem}", flush=True)
                job.run(weights, device)
    except KeyboardInterrupt:
        raise _stopped(GO_ON) from None
    if runs := read_runs(output):
        print(table(runs))
    if failed:
        raise SimpleNetError(
            f"{len(failed)} of {len(jobs)} runs failed: "
            + " ".join(f"{name}: {reason}" for name, reason in failed.items())
            + " Run the same command to try them again."
        )


def _run(
    data: Path,
    category: str | None,
    config: Config,
    weights: Path | None,
    device: str,
    state: Path,
    **options: Any,
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
            **options,
        )
    except KeyboardInterrupt:
        raise _stopped(GO_ON if state.is_file() else "") from None


def _stopped(kept: str) -> typer.Exit:
    """Say that Ctrl-C ended the command, and what is left of its work; its exit code."""
    print(f"simplenet: stopped.{kept}", file=sys.stderr)
    return typer.Exit(130)


def _say_of(name: str) -> Callable[[str], None]:
    """Print what was found in a category."""
    return lambda sentence: print(f"{name}: {sentence}", flush=True)


@app.command()
def evaluate(
    model: ModelPath,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder as for `train`; without it, what the model was trained on."),
    ] = None,
    category: Category = None,
    output: Annotated[
        Path | None,
        typer.Option(help="Table of all images; evaluation.csv beside the model by default."),
    ] = None,
    threshold: Threshold = 1.0,
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Evaluate a trained model on test images: metrics, a table, and the wrong verdicts.

    Without --data it takes the test images that lay beside those of the training,
    and refuses if they have changed since. Images that cannot be read are named and
    left out, and the exit code is then 3.
    """
    from simplenet_lib.benchmark import compare, digest_of, trained_on
    from simplenet_lib.dataset import AnomalyDataset, check, make_transform
    from simplenet_lib.localization import check_both_kinds, check_threshold
    from simplenet_lib.localization import predict as predict_images
    from simplenet_lib.model import checkpoint_in
    from simplenet_lib.outputs import check_evaluation, write_evaluation

    check_threshold(threshold)
    file = checkpoint_in(model)
    output = output or file.parent / "evaluation.csv"
    check_evaluation(output)
    if data is None:
        data, category, digest = trained_on(file)
        print(f"Test images of '{category}' in {data}, beside those of the training.")
    else:
        data, category = _find_data(data, category)
        digest = None
    if category is None:
        raise SimpleNetError(f"{data}: holds photos only. `simplenet predict` gives them verdicts.")
    net = _load(model, weights, device)
    transform = make_transform(net.config.size, net.config.seen)
    test = AnomalyDataset(data, category, "test", transform, net.config.white)
    for sentence in filter(None, (test.found.summary(), test.mask_note)):
        _say_of(category)(sentence)
    damaged = check(test.samples, net.config.white, progress=True).damaged
    if damaged:
        count, reasons = len(damaged), " ".join(damaged.values())
        _say_of(category)(f"{count} of the test images cannot be read: {reasons}")
        test.samples = [sample for sample in test.samples if sample.image not in damaged]
    check_both_kinds(test.samples)
    if digest not in (None, digest_of(test.samples)):
        raise SimpleNetError(
            f"{data}: the test images of '{category}' are others than when the model was trained."
            f" To evaluate on them all the same: --data {data} --category {category}."
        )
    predictions = [
        replace(prediction, anomalous=prediction.score > threshold)
        for prediction in predict_images(net, test)
    ]
    _print_metrics(compare(predictions))
    wrong = write_evaluation(output, predictions, threshold)
    if wrong:
        print(f"Wrong verdicts, worst first ({len(wrong)} of {len(predictions)}):")
        for prediction in wrong[:20]:
            kind = "false alarm" if prediction.anomalous else f"missed {prediction.sample.defect}"
            print(f"{prediction.score:8.2f}  {kind:20} {prediction.sample.image}")
        if len(wrong) > 20:
            print(f"and {len(wrong) - 20} more in the table")
    print(output)
    if damaged:
        raise typer.Exit(3)


@app.command()
def predict(
    model: ModelPath,
    images: Annotated[
        list[str],
        typer.Argument(
            help="Images, or folders that are searched for images. With --ray also addresses such"
            " as s3://BUCKET/FOLDER, and lists in a .txt, one image a line."
        ),
    ],
    output: Annotated[
        Path, typer.Option(help="Folder for predictions.csv and the overlays.")
    ] = Path("predictions"),
    threshold: Threshold = 1.0,
    overlay: Annotated[
        bool | None,
        typer.Option(
            "--overlay/--no-overlay",
            help="Lay the map over each image, as PNG; by default with --ray only if asked for.",
            show_default=False,
        ),
    ] = None,
    save_maps: Annotated[
        bool,
        typer.Option(
            "--save-maps",
            help="Anomaly maps as .npy, float32, as large as their images; NaN where none is seen.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Write predictions.json as well, with all regions.")
    ] = False,
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
    ray: RayAddress = None,
) -> None:
    """Score images: a table with a verdict for each, and the anomaly map laid over each.

    The white line in an overlay encloses what is more anomalous than the
    threshold; the table names these regions. An image counts as unfamiliar if it
    looks unlike the training photos as a whole: do not trust its verdict.

    Table and overlays are written while the images are judged: what is there stays
    after Ctrl-C. An image that cannot be read is in the table with the reason, and
    the exit code is then 3. What an earlier `predict` wrote to the folder is
    replaced. With --ray the folder is filled part by part, each with a table as CSV and as
    Parquet, and the same command goes on where an earlier one ended.
    """
    from simplenet_lib.dataset import has_pages
    from simplenet_lib.localization import check_threshold, results
    from simplenet_lib.outputs import TABLE, PredictionFolder, check_folder

    check_threshold(threshold)
    if ray is not None:
        from simplenet_lib.cluster import score

        kinds = {"overlays": bool(overlay), "maps": save_maps, "records": as_json}
        try:
            counts = score(
                model,
                images,
                output,
                ray,
                threshold,
                kinds,
                weights=weights,
                device=device,
                say=lambda sentence: print(sentence, flush=True),
            )
        except KeyboardInterrupt:
            raise _stopped(GO_ON) from None
        _print_verdicts(counts["anomalous"], counts["unfamiliar"], counts["judged"], threshold)
        if counts["damaged"]:
            print(f"{counts['damaged']} cannot be read, the column `error` says why.")
        print(output)
        if counts["damaged"]:
            raise typer.Exit(3)
        return
    check_folder(output)
    found = _find_images([*map(Path, images)], output)
    net = _load(model, weights, device)
    anomalous = unfamiliar = 0
    damaged: list[Path] = []
    folder = PredictionFolder(
        output, found, overlays=overlay is not False, maps=save_maps, records=as_json
    )
    try:
        names = [str(path) for path in found]
        judging = results(net, [*found], names, threshold=threshold, progress=True)
        # Closed, so that its bar and threads end before anything is said.
        with folder, closing(judging) as judged:
            for path, result in zip(found, judged, strict=True):
                folder.write(path, result)
                if isinstance(result, SimpleNetError):
                    damaged.append(path)
                else:
                    anomalous += result.anomalous
                    unfamiliar += bool(result.unfamiliar)
    except KeyboardInterrupt:
        kept = f" {folder.written} of {len(found)} images are in {output / TABLE}."
        raise _stopped(kept) from None
    count = len(found) - len(damaged)
    _print_verdicts(anomalous, unfamiliar, count, threshold)
    if several := sum(map(has_pages, set(found).difference(damaged))):
        print(f"{several} of them have several pages or frames: the first of each is what counts.")
    if damaged:
        some = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        print(f"{len(damaged)} cannot be read, the column `error` says why: {some}")
    for path in sorted(output.iterdir()):
        if path.name in folder.made:
            print(path)
    if damaged:
        raise typer.Exit(3)


@app.command()
def calibrate(
    model: ModelPath,
    photos: Annotated[
        list[Path],
        typer.Argument(help="Good photos that it was not trained on, or folders of such."),
    ],
    max_false_alarms: MaxFalseAlarms = None,
    output: Annotated[
        Path | None, typer.Option(help="Write the model here, and leave the first as it is.")
    ] = None,
    max_pixels: MaxPixels = None,
    weights: Weights = None,
    device: Device = "auto",
) -> None:
    """Set the threshold of a trained model anew, by good photos, without training.

    For example after a new lamp, or once there are more photos: the more, the
    fewer false alarms can be promised.
    """
    from simplenet_lib.benchmark import recalibrate
    from simplenet_lib.model import check_writable, checkpoint_in

    file = checkpoint_in(model)
    target = output or file
    if output is not None and (output.is_dir() or not output.suffix):
        target = output / "model.safetensors"
    if output is not None and target.exists():
        raise SimpleNetError(f"{target}: exists. It is not overwritten; choose another --output.")
    check_writable(target.parent)
    found = _find_images(photos, target)
    net = _load(model, weights, device)
    before, unfamiliar = recalibrate(net, [*found], max_false_alarms)
    net.save(target)
    asked = max_false_alarms is not None
    _print_promise(len(found), net.config.false_alarms, asked, "new to the model")
    print(f"A score of 1 was one of {before:.3f} before.")
    if 2 * unfamiliar > len(found):
        print(
            f"{unfamiliar} of the photos look unlike the training photos as a whole, and `predict`"
            " will go on to say so: better train anew, with photos like these."
        )
    print(target)


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
    from simplenet_lib.export import export_onnx
    from simplenet_lib.model import check_writable

    check_writable(output.absolute().parent)
    net = _load(model, weights, "cpu")

    export_onnx(net, output)
    print(output)


@app.command()
def info(
    model: Annotated[Path | None, typer.Argument(help="A trained model to describe.")] = None,
    weights: Weights = None,
) -> None:
    """Show versions, where the pretrained weights come from, the cache, and a model's settings.

    Nothing is downloaded, and no weights are needed.
    """
    from simplenet_lib.benchmark import versions
    from simplenet_lib.features import cache_folder
    from simplenet_lib.model import checkpoint_in, read_checkpoint
    from simplenet_lib.weights import find_weights

    for name, version in versions().items():
        print(f"{name:14} {version}")
    entries = list(cache_folder().glob("*.npy"))
    size = sum(entry.stat().st_size for entry in entries) / 1e9
    print(f"{'feature cache':14} {cache_folder()}: {len(entries)} files, {size:.1f} GB")
    if model is None:
        config = PRESETS["fast"]
        try:
            source = find_weights(config.backbone, weights, download=False).source
        except SimpleNetError as error:
            source = str(error)
        print(f"{'weights':14} {source}")
    else:
        _, metadata = read_checkpoint(checkpoint_in(model))
        config = Config.from_json(metadata.get("config", ""))
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
    changed = set()
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
        changed.add(name)
    if config.crop == config.resize and changed & {"resize", "crop"} == {"resize"}:
        values["crop"] = values["resize"]  # nothing is cut off
    return Config.from_json(json.dumps(values))


def _variants(config: Config, changes: list[str]) -> list[Config]:
    """Every combination of the values of ``--set NAME=VALUE,VALUE``."""
    options: dict[str, list[str]] = {}
    for change in changes:
        name, equals, text = change.partition("=")
        if name == "seed":
            raise SimpleNetError(f"--set {change}: seeds are named with --seeds.")
        # The commas of layers are its own: of these one choice a time.
        values = [text] if name == "layers" else text.split(",")
        options.setdefault(name, []).extend(f"{name}{equals}{value}" for value in values)
    return [_changed(config, [*some]) for some in product(*options.values())]


def _find_images(paths: list[Path], output: Path) -> dict[Path, Path]:
    """Every image to predict, and the name of its overlay; an earlier output is left out."""
    from simplenet_lib.dataset import but_passed_over, images_outside, passed_over

    found: dict[Path, Path] = {}
    passed: Counter[str] = Counter()
    for path in paths:
        if path.is_dir():
            for image in images_outside(output, path, passed):
                found[image] = image.relative_to(path).with_suffix(".png")
        elif path.exists():
            found[path] = Path(path.stem + ".png")
        else:
            raise SimpleNetError(f"{path}: no such image or folder.")
    if not found:
        but = but_passed_over(passed)
        raise SimpleNetError(f"{', '.join(map(str, paths))}: no images found{but}.")
    print(f"Found {len(found)} images{'; ' if passed else ''}{passed_over(passed)}.", flush=True)
    return found


def _load(path: Path, weights: Path | None, device: str) -> SimpleNet:
    from simplenet_lib.model import SimpleNet

    device = _device(device)  # a wrong one is named before the file is read
    return SimpleNet.load(path, weights).to(device)


def _device(name: str) -> str:
    import torch

    cuda = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "auto":
        return "cuda" if cuda else "cpu"
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (":" in name and not number.isdecimal()):
        raise SimpleNetError(f"unknown device '{name}'. Known: cpu, cuda, cuda:1, mps, auto.")
    if kind == "cuda" and not cuda:
        raise SimpleNetError("no CUDA device found. Use --device cpu.")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise SimpleNetError("no Apple GPU found. Use --device cpu.")
    if number and int(number) >= max(cuda if kind == "cuda" else 1, 1):
        known = [f"cuda:{other}" for other in range(cuda)] if kind == "cuda" else [kind]
        raise SimpleNetError(f"no device '{name}'. Found: {', '.join(known)}.")
    return name


def _print_promise(count: int, false_alarms: float, asked: bool, how: str) -> None:
    """What the threshold is, and how many false alarms to expect of it."""
    from simplenet_lib.localization import rank

    number = rank(count, false_alarms)
    named = {1: "highest", 2: "second highest", 3: "third highest"}
    place = named.get(number, f"{number}th highest")
    rate = number / (count + 1)
    print(
        f"The threshold is the {place} score of {count} good photos, {how}: expect about"
        f" {rate:.1%} false alarms on good photos like them."
    )
    if asked and rate > false_alarms:
        few = math.ceil(1 / false_alarms - 1 - 1e-9) if false_alarms else 0
        needed = f"{few} photos are needed" if few else "no number is enough"
        print(f"That is more than the {false_alarms:.2%} asked for: for these, {needed}.")


def _print_verdicts(anomalous: int, unfamiliar: int, count: int, threshold: float) -> None:
    print(f"{anomalous} of {count} images are anomalous (score above {threshold:g}).")
    if 2 * unfamiliar > count:
        print(
            f"{unfamiliar} of them look unlike the training photos as a whole (other light, focus,"
            " camera or product?): do not trust these verdicts. See chapter 12."
        )


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
