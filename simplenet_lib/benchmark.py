"""Chapter 11: a run and its report, tables of many runs, and what others have published."""

from __future__ import annotations

import hashlib
import json
import platform
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision

from simplenet_lib import __version__
from simplenet_lib.config import PRESETS, Config, SimpleNetError
from simplenet_lib.dataset import (
    AnomalyDataset,
    Found,
    ImageFiles,
    Sample,
    check,
    image_files,
    make_transform,
    photos,
    read_file,
    shape_of,
)
from simplenet_lib.features import TILE_STEP, digest_of_images
from simplenet_lib.localization import (
    Maps,
    Prediction,
    Result,
    has_both_kinds,
    mask_note,
    metrics_of,
    predict,
    rescale,
    results,
)
from simplenet_lib.metrics import auroc_deviation, pixel_deviations
from simplenet_lib.model import SimpleNet, read_checkpoint, write_whole
from simplenet_lib.training import PROCESSOR, Trained, train
from simplenet_lib.weights import find_weights

#: Image AUROC and pixel AUROC of SimpleNet on MVTec AD in percent, as the paper
#: states them (table 1); transcribed from secondary sources.
PAPER = {
    "carpet": (99.7, 98.2),
    "grid": (99.7, 98.8),
    "leather": (100.0, 99.2),
    "tile": (99.8, 97.0),
    "wood": (100.0, 94.5),
    "bottle": (100.0, 98.0),
    "cable": (99.9, 97.6),
    "capsule": (97.7, 98.9),
    "hazelnut": (100.0, 97.9),
    "metal_nut": (100.0, 98.8),
    "pill": (99.0, 98.6),
    "screw": (98.2, 99.3),
    "toothbrush": (99.7, 98.5),
    "transistor": (100.0, 97.6),
    "zipper": (99.9, 98.9),
}

#: Mean image AUROC and pixel AUROC over the 15 categories, in percent, and which
#: state of the network they are from; transcribed from secondary sources.
PUBLISHED_MEANS = {
    "SimpleNet, paper": (99.6, 98.1, "best epoch on the test set"),
    "SimpleNet, an independent rerun of the published code": (
        99.63,
        97.87,
        "best epoch on the test set",
    ),
    "SuperSimpleNet": (98.4, 97.5, "last epoch"),
}


@dataclass
class Run:
    """One training and its evaluation.

    Attributes
    ----------
    trained : Trained
        The model and how it was trained.
    predictions : list of Prediction or None
        One for every test image; None if there are none with and without a defect.
    report : dict
        What goes into a JSON file: configuration, metrics, scores of all images, times.

    Examples
    --------
    >>> from simplenet_lib.training import train
    >>> normal, _, config = datasets(data, "nut", model.config)
    >>> done = Run(train(normal, config, weights=weights_file, progress=False), None, {"seed": 0})
    >>> done.trained.model.threshold > done.trained.model.typical
    True
    """

    trained: Trained
    predictions: list[Prediction] | None
    report: dict[str, Any]


@dataclass
class Splits:
    """The images of a category, every file of which has been read once; see :func:`read_splits`.

    Attributes
    ----------
    normal : ImageFiles
        The normal images.
    test : AnomalyDataset or None
        The test images, if there are some.
    white : float
        What white is in their images of more than 8 bits; 0 without such.
    ratio, side : float
        Median height over width of the normal images, and median side √(height · width) in
        pixels.

    Examples
    --------
    >>> splits = read_splits(data, "nut")
    >>> splits.white, splits.ratio, splits.side
    (0, 1.0, 64.0)
    >>> from simplenet_lib.config import PRESETS
    >>> splits.under(PRESETS["fast"]).ratio
    1.0
    """

    normal: ImageFiles
    test: AnomalyDataset | None
    white: float
    ratio: float
    side: float

    def under(self, config: Config) -> Config:
        """Have the images seen as ``config`` asks for, and fill in what it leaves to them."""
        config = replace(config, white=config.white or self.white)
        if config.ratio == 0:
            config = replace(config, ratio=round(self.ratio, 3))
        if config.tile and config.resize == PRESETS[config.preset].resize:
            side = TILE_STEP * round(self.side / TILE_STEP)
            config = replace(config, resize=side, crop=side)
        for split in filter(None, (self.normal, self.test)):
            split.transform = make_transform(config.size, config.seen)
            split.white = config.white
        return config


def read_splits(
    data: Path,
    category: str | None,
    white: float = 0,
    *,
    skip_damaged: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
    progress: bool = False,
) -> Splits:
    """Find a category's images, and read every file once.

    So a damaged one is found now and not after a training.

    Parameters
    ----------
    data : Path
        A folder of categories, or of good photos alone.
    category : str or None
        The category; None for a folder of photos.
    white : float
        What white is in images of more than 8 bits; 0 to find it.
    skip_damaged : bool
        Leave out the files that cannot be read.
    say : callable
        Receives a sentence on everything a user should know of what was found.
    progress : bool
        Show a progress bar on stderr if it takes long.

    Raises
    ------
    SimpleNetError
        See :func:`simplenet_lib.dataset.find_samples`; or if files are damaged: it names
        all of them.

    Examples
    --------
    >>> splits = read_splits(data, "nut", say=print)
    Found 6 normal images to train on; to test with 2 good, 1 broken_corner, ...; 5 masks.
    >>> len(splits.normal), len(splits.test)
    (6, 7)
    """
    transform = make_transform(32, 32)  # until a configuration says how they are seen
    normal: ImageFiles
    test = None
    if category is None:
        passed: Counter[str] = Counter()
        normal = ImageFiles(photos(data, passed), transform)
        say(Found(normal.samples, [], passed).summary())
    else:
        train_split = AnomalyDataset(data, category, "train", transform)
        normal = train_split
        found = train_split.found
        say(found.summary())
        # Read before training: a fault in the test folder should not cost the user a training.
        if found.test:
            test = AnomalyDataset(data, category, "test", transform, found=found)
    splits = [normal] if test is None else [normal, test]
    checked = check(
        [sample for split in splits for sample in split.samples], white, progress=progress
    )
    if checked.damaged:
        reasons = " ".join(checked.damaged.values())
        count = len(checked.damaged)
        if not skip_damaged:
            several = f"{count} files cannot be read: " if count > 1 else ""
            raise SimpleNetError(
                f"{several}{reasons} Mend or remove them, or go on without them: --skip-damaged."
            )
        say(f"{count} damaged files are left out: {reasons}")
        for split in splits:
            split.samples[:] = [s for s in split.samples if s.image not in checked.damaged]
        if not normal.samples:
            raise SimpleNetError(f"{data}: no normal images are left to train on.")
    for note in checked.notes + ([test.mask_note] if test and test.mask_note else []):
        say(note)
    return Splits(normal, test, checked.white, *shape_of(normal.samples))


def datasets(
    data: Path,
    category: str | None,
    config: Config,
    *,
    skip_damaged: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
    progress: bool = False,
) -> tuple[ImageFiles, AnomalyDataset | None, Config]:
    """The normal images, the test images if there are some, and the configuration for them.

    The photos keep their shape: where ``config.ratio`` is 0, the median of theirs takes
    its place, and those of another shape are not stretched to it. So does white in photos
    of more than 8 bits, where ``config.white`` is 0, and with tiles their side, unless
    ``config.resize`` was set.

    Parameters
    ----------
    config : Config
        The configuration.
    data, category, skip_damaged, say, progress
        See :func:`read_splits`.

    Examples
    --------
    >>> from simplenet_lib.config import preset
    >>> normal, test, config = datasets(data, "nut", preset("fast"), say=print)
    Found 6 normal images to train on; to test with 2 good, 1 broken_corner, ...; 5 masks.
    >>> len(normal), len(test), config.seen
    (6, 7, (384, 384))
    """
    splits = read_splits(
        data, category, config.white, skip_damaged=skip_damaged, say=say, progress=progress
    )
    config = splits.under(config)
    return splits.normal, splits.test, config


def can_be_evaluated(test: AnomalyDataset | None) -> bool:
    """Whether there are test images with and without a defect.

    Examples
    --------
    >>> _, test, _ = datasets(data, "nut", model.config)
    >>> can_be_evaluated(test), can_be_evaluated(None)
    (True, False)
    """
    return test is not None and has_both_kinds(test.samples)


def run(
    data: Path,
    category: str | None,
    config: Config,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    splits: Splits | None = None,
    skip_damaged: bool = False,
    say: Callable[[str], None] = lambda sentence: None,
    ready: Callable[[ImageFiles, Config], None] = lambda normal, config: None,
    keep: Callable[[Run], None] = lambda run: None,
    progress: bool = True,
) -> Run:
    """Train on a category, and evaluate if it has test images with and without a defect.

    Parameters
    ----------
    data, category, config, skip_damaged, say
        See :func:`datasets`.
    splits : Splits, optional
        The images, if they have been read already.
    ready : callable
        Receives the normal images and the configuration for them, before the training.
    keep : callable
        Receives the run once it is trained, before anything can go wrong in its evaluation.
    weights, device, checkpoint, progress
        See :func:`simplenet_lib.training.train`.

    Examples
    --------
    >>> done = run(data, "nut", model.config, weights=weights_file, progress=False)
    >>> done.report["train_images"], sorted(done.report["deviation_over_images"])
    (6, ['aupro', 'image_auroc', 'pixel_auroc'])
    """
    if splits is None:
        splits = read_splits(
            data, category, config.white, skip_damaged=skip_damaged, say=say, progress=progress
        )
    config = splits.under(config)
    normal, test = splits.normal, splits.test
    ready(normal, config)
    trained = train(
        normal, config, weights=weights, device=device, checkpoint=checkpoint, progress=progress
    )
    known = np.flatnonzero(np.isfinite(trained.scores))
    oddest = known[np.argsort(-trained.scores[known])][:3]
    report: dict[str, Any] = {
        "dataset": data.resolve().name,
        "category": category or data.resolve().name,
        "preset": config.preset,
        "seed": config.seed,
        "train_images": len(normal),
        "scored_unseen": len(known),
        "images": trained.model.images,
        "oddest_training_images": dict(
            zip(
                short_names([normal.samples[index].image for index in oddest]),
                [round(float(trained.scores[index]), 3) for index in oddest],
                strict=True,
            )
        ),
        "training_scores": [round(float(score), 3) for score in sorted(trained.scores[known])],
        "steps": config.steps,
        "seconds_features": round(trained.seconds_features, 2),
        "seconds_training": round(trained.seconds_training, 2),
        "config": json.loads(config.to_json()),
        "versions": versions(),
        "hardware": hardware(device),
    }
    keep(Run(trained, None, report))
    if test is not None:
        report["test_digest"] = digest_of(test.samples)
    if test is None or not can_be_evaluated(test):
        return Run(trained, None, report)
    start = time.perf_counter()
    predictions = list(predict(trained.model, test, progress=progress))
    report["seconds_evaluation"] = round(time.perf_counter() - start, 2)
    for kind, label in (("normal", 0), ("defect", 1)):
        some = [bool(p.unfamiliar) for p in predictions if p.sample.label == label]
        report[f"unfamiliar_share_{kind}"] = sum(some) / len(some)
    return Run(trained, predictions, report | compare(predictions))


def digest_of(samples: Sequence[Sample]) -> str:
    """One SHA-256 of images, their kinds and their masks, wherever they lie.

    Examples
    --------
    >>> from simplenet_lib.dataset import photos
    >>> good = photos(data / "nut" / "train" / "good")
    >>> digest_of(good) == digest_of(good), digest_of(good) == digest_of(good[1:])
    (True, False)
    """
    digests = []
    for sample in samples:
        masks = [] if sample.mask is None else [sample.mask]
        if sample.mask is not None and sample.mask.is_dir():
            masks = image_files(sample.mask)
        digests.append(sample.defect)
        digests += map(_digest, (sample.image, *masks))
    return digest_of_images(digests)


def _digest(path: Path) -> str:
    """SHA-256 of an image file; one that cannot be read is named."""
    return hashlib.sha256(read_file(path)).hexdigest()


def is_trained(path: Path, normal: ImageFiles, config: Config, weights: Path | None) -> bool:
    """Whether the model at ``path`` is what this training would give.

    Raises
    ------
    SimpleNetError
        If there is another one: it says in what they differ.

    Examples
    --------
    >>> normal, _, config = datasets(data, "nut", model.config)
    >>> is_trained(folder / "model.safetensors", normal, config, weights_file)
    False
    >>> model.save(folder / "model.safetensors")
    >>> is_trained(folder / "model.safetensors", normal, config, weights_file)
    True
    """
    if not path.exists():
        return False
    advice = "Choose another --output, or move it away."
    try:
        _, metadata = read_checkpoint(path)
        trained = json.loads(Config.from_json(metadata.get("config", "")).to_json())
    except SimpleNetError as error:
        raise SimpleNetError(f"{error} It is not overwritten. {advice}") from error
    wanted = json.loads(config.to_json())
    differences = [
        f"{name} {trained[name]} (now {value})"
        for name, value in wanted.items()
        if trained[name] != value
    ]
    if not differences:
        images = digest_of_images(_digest(sample.image) for sample in normal.samples)
        if metadata.get("images") != images:
            differences.append("other images")
        if metadata.get("weights") != find_weights(config.backbone, weights).digest:
            differences.append("other pretrained weights")
    if differences:
        raise SimpleNetError(
            f"{path.parent}: holds a model that was trained with {', '.join(differences)}."
            f" It is not overwritten. {advice}"
        )
    return True


def trained_on(model: Path) -> tuple[Path, str, str]:
    """Data folder and category of the test images beside a training's, and their digest.

    As ``simplenet train`` notes them beside the model, in metrics.json.

    Raises
    ------
    SimpleNetError
        If it is not there, belongs to another model, or there were no test images.

    Examples
    --------
    >>> import json
    >>> model.save(folder / "model.safetensors")
    >>> report = {"category": "nut", "seed": 0, "data": "photos", "test_digest": "e3b0"}
    >>> text = json.dumps(report | {"images": model.images})
    >>> _ = (folder / "metrics.json").write_text(text)
    >>> trained_on(folder / "model.safetensors")
    (...Path('photos'), 'nut', 'e3b0')
    """
    path = model.with_name("metrics.json")
    _, metadata = read_checkpoint(model)
    advice = "Name test images with --data."
    if not path.is_file():
        raise SimpleNetError(f"{path}: not there, so the training's data is unknown. {advice}")
    report = read_run(path)
    if not {"data", "images"} <= report.keys() or report["images"] != metadata.get("images"):
        raise SimpleNetError(f"{path}: not of this model, so its data is unknown. {advice}")
    if "test_digest" not in report:
        raise SimpleNetError(f"{model}: was trained on photos without test images. {advice}")
    return Path(report["data"]), str(report["category"]), str(report["test_digest"])


def recalibrate(
    model: SimpleNet, photos: Sequence[Path], false_alarms: float | None = None
) -> tuple[float, int]:
    """Set a model's threshold anew, by good photos that it was not trained on.

    Parameters
    ----------
    model : SimpleNet
        Changed in place; its accepted false alarms too, if they are given.
    photos : sequence of Path
        Good photos, at least two.
    false_alarms : float, optional
        See :func:`~simplenet_lib.localization.threshold`; the model's own without.

    Returns
    -------
    before : float
        The score that the new threshold had before.
    unfamiliar : int
        How many photos look unlike the training photos as a whole.

    Raises
    ------
    SimpleNetError
        If a photo cannot be read, it was trained on one of them, or they do not differ.

    Examples
    --------
    >>> threshold = model.threshold
    >>> photos = sorted((data / "nut" / "test" / "good").glob("*.png"))
    >>> before, unfamiliar = recalibrate(model, photos, false_alarms=0.0)
    >>> model.threshold == threshold
    False
    """
    known = [photo for photo in photos if _digest(photo)[: model.PHOTO_DIGEST] in model.photos]
    if known:
        raise SimpleNetError(
            f"{len(known)} of the {len(photos)} photos, such as {known[0]}, are those the model was"
            " trained on: it knows them, and the threshold would be too low. Take others."
        )
    found: list[Result] = []
    damaged: list[str] = []
    for result in results(model, photos, [*map(str, photos)], progress=True):
        if isinstance(result, SimpleNetError):
            damaged.append(str(result))
        else:
            found.append(result)
    if damaged:
        raise SimpleNetError(f"{' '.join(damaged)} Mend or remove them.")
    if false_alarms is not None:
        model.config = replace(model.config, false_alarms=false_alarms)
    typical, threshold = model.typical, model.threshold
    rescale(model, [result.score for result in found], model.config.false_alarms)
    before = (model.threshold - typical) / (threshold - typical)
    return before, sum(bool(result.unfamiliar) for result in found)


def compare(predictions: Sequence[Prediction]) -> dict[str, Any]:
    """What a report says of test images: metrics, their uncertainty, verdicts, every score.

    Returns
    -------
    dict
        The metrics of :func:`simplenet_lib.localization.metrics_of`;
        ``deviation_over_images``: of image AUROC by Hanley and McNeil's formula, of the
        pixel metrics by a bootstrap; ``false_alarm_rate`` and ``detection_rate`` at the
        threshold; ``scores`` by defect type and file name; ``mask_note`` if the masks
        are such that pixel metrics would mislead: see :func:`mask_note`.

    Examples
    --------
    >>> from simplenet_lib.localization import predict
    >>> _, test, _ = datasets(data, "nut", model.config)
    >>> report = compare(list(predict(model, test, progress=False)))
    >>> sorted(report["scores"]["good"]), 0 <= report["image_auroc"] <= 1
    (['000', '001'], True)
    """
    metrics = metrics_of(predictions)
    labels = np.array([prediction.sample.label for prediction in predictions])
    verdicts = np.array([prediction.anomalous for prediction in predictions])
    deviations = {
        "image_auroc": auroc_deviation(
            metrics["image_auroc"], int((labels == 0).sum()), int((labels == 1).sum())
        )
    }
    if "aupro" in metrics:
        deviations |= pixel_deviations([p.mask for p in predictions], Maps(predictions))
    scores: dict[str, dict[str, float]] = {}
    for kind in dict.fromkeys(prediction.sample.defect for prediction in predictions):
        of_kind = [p for p in predictions if p.sample.defect == kind]
        stems = [p.sample.image.with_suffix("") for p in of_kind]
        unique = len(set(stems)) == len(stems)
        names = short_names(stems if unique else [p.sample.image for p in of_kind])
        scores[kind] = {name: round(p.score, 4) for name, p in zip(names, of_kind, strict=True)}
    note = mask_note(predictions)
    return (
        metrics
        | ({"mask_note": note} if note else {})
        | {
            "deviation_over_images": {name: round(value, 5) for name, value in deviations.items()},
            "false_alarm_rate": float(verdicts[labels == 0].mean()),
            "detection_rate": float(verdicts[labels == 1].mean()),
            "scores": scores,
        }
    )


def short_names(paths: Sequence[Path]) -> list[str]:
    """The name of each path, with as many of its folders as set it apart from the others.

    Examples
    --------
    >>> short_names([Path("a/good/0.png"), Path("a/hole/0.png"), Path("a/hole/1.png")])
    ['good/0.png', 'hole/0.png', '1.png']
    """
    names = []
    for path in paths:
        parts = 1
        alike = [other.parts for other in paths if other.name == path.name and other != path]
        while parts < len(path.parts) and any(
            other[-parts:] == path.parts[-parts:] for other in alike
        ):
            parts += 1
        names.append("/".join(path.parts[-parts:]))
    return names


def versions() -> dict[str, str]:
    """Versions of everything that decides a number.

    Examples
    --------
    >>> list(versions())
    ['simplenet_lib', 'python', 'torch', 'torchvision']
    """
    return {
        "simplenet_lib": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "torchvision": str(torchvision.__version__),
    }


def hardware(device: str) -> str:
    """The graphics card by name, or the number of threads and the processor.

    Examples
    --------
    >>> hardware("cpu")
    '... CPU threads, ...'
    """
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    if torch.device(device).type == "mps":
        return "Apple GPU"
    return f"{torch.get_num_threads()} CPU threads, {PROCESSOR or platform.machine()}"


def measured_runs(kind: str = "") -> list[dict[str, Any]]:
    """Read the measured runs that come with this library, sorted by file name.

    Parameters
    ----------
    kind : str
        Folder in ``results/``: ``""`` for whole runs of a preset, ``"ablation"``; and of the
        first edition's default, one head, ``"first"``, ``"first_ablation"``,
        ``"first_steps"`` and ``"first_photos"``.

    Examples
    --------
    >>> run = measured_runs()[0]
    >>> run["category"], run["preset"], run["seed"]
    ('bottle', 'course', 0)
    """
    return read_runs(_results() / kind)


def scoreboard() -> tuple[list[int], dict[str, list[float]]]:
    """Labels of the 60 test nuts, and every detector's image scores of them.

    The detectors come in the order in which the book builds them; the file is written by
    ``benchmarks/scoreboard.py``.

    Examples
    --------
    >>> labels, scores = scoreboard()
    >>> len(labels), sum(labels), list(scores)[0]
    (60, 40, 'pixel statistics')
    """
    board = json.loads((_results() / "nuts" / "scoreboard.json").read_text())
    return board["labels"], board["scores"]


def _results() -> Path:
    """The folder of measured runs: inside an installed library, in a checkout beside it."""
    package = Path(__file__).parent
    inside = package / "results"
    return inside if inside.is_dir() else package.parent / "results"


def read_runs(folder: Path) -> list[dict[str, Any]]:
    """Read every run in ``folder``, sorted by file name.

    Raises
    ------
    SimpleNetError
        If a file is not what ``simplenet benchmark`` writes.

    Examples
    --------
    >>> _ = (folder / "nut-fast-0.json").write_text('{"category": "nut", "seed": 0}')
    >>> read_runs(folder)
    [{'category': 'nut', 'seed': 0}]
    """
    return [read_run(path) for path in sorted(folder.glob("*.json"))]


def write_run(path: Path, report: dict[str, Any]) -> None:
    """Write a run's report, whole or not at all.

    Examples
    --------
    >>> write_run(folder / "nut-fast-0.json", {"category": "nut", "seed": 0})
    >>> read_run(folder / "nut-fast-0.json")
    {'category': 'nut', 'seed': 0}
    """
    write_whole(path, (json.dumps(report, indent=2) + "\n").encode())


def read_run(path: Path) -> dict[str, Any]:
    """Read one run; see :func:`read_runs`.

    Examples
    --------
    >>> _ = (folder / "nut-fast-0.json").write_text('{"category": "nut", "seed": 0}')
    >>> read_run(folder / "nut-fast-0.json")["category"]
    'nut'
    """
    try:
        run = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise SimpleNetError(f"{path}: not a readable run ({error}).") from error
    if not isinstance(run, dict) or not {"category", "seed"} <= run.keys():
        raise SimpleNetError(f"{path}: not a run of this program. Move it away.")
    return run


def is_done(path: Path, dataset: str, category: str, config: Config) -> bool:
    """Whether ``path`` holds this very run already.

    Raises
    ------
    SimpleNetError
        If it holds another run: of another data set or configuration.

    Examples
    --------
    >>> from simplenet_lib.config import preset
    >>> is_done(folder / "nut-fast-0.json", "synthetic", "nut", preset("fast"))
    False
    """
    if not path.is_file():
        return False
    run = read_run(path)
    wanted = [dataset, category, json.loads(config.to_json())]
    config_found = {"white": 0.0, "tile": 0, **run.get("config", {})}  # older runs lack them
    if [run.get("dataset"), run.get("category"), config_found] != wanted:
        raise SimpleNetError(
            f"{path}: a run of another data set or configuration. Move it away, or choose"
            " another output folder."
        )
    return True


@dataclass(frozen=True)
class Job:
    """A run that a benchmark asks for.

    Attributes
    ----------
    data : Path
        The folder of categories.
    category : str
        The category.
    config : Config
        The configuration for its images, seed included.
    changes : dict
        What it changes of its preset.
    path : Path
        The JSON file that the run ends in.
    splits : Splits or None
        The images, if they have been read already.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from simplenet_lib.config import PRESETS
    >>> config = replace(PRESETS["fast"], sigma=0.5)
    >>> path = folder / "nut-fast-sigma=0.5-0.json"
    >>> job = Job(data, "nut", config, changes_of(config), path, None)
    >>> job.changes
    {'sigma': 0.5}
    """

    data: Path
    category: str
    config: Config
    changes: dict[str, Any]
    path: Path
    splits: Splits | None

    def run(self, weights: Path | None, device: str, *, progress: bool = True) -> None:
        """Make the run, or go on with it, and write its file."""
        state = self.path.with_suffix(".training.safetensors")
        done = run(
            self.data,
            self.category,
            self.config,
            weights=weights,
            device=device,
            checkpoint=state,
            splits=self.splits,
            progress=progress,
        )
        changes = {"changes": self.changes} if self.changes else {}
        write_run(self.path, done.report | changes)
        state.unlink(missing_ok=True)


def missing_jobs(
    data: Path,
    categories: Iterable[str],
    configs: Sequence[Config],
    seeds: Iterable[int],
    output: Path,
    *,
    skip_damaged: bool = False,
    say: Callable[[str, str], None] = lambda category, sentence: None,
) -> list[Job]:
    """Every run of categories x configurations x seeds that is not in ``output`` yet.

    A run of a preset is ``CATEGORY-PRESET-SEED.json``; what a configuration changes of its
    preset stands before the seed: ``bottle-fast-sigma=0.5-0.json``.

    Parameters
    ----------
    data : Path
        The folder of categories.
    categories : iterable of str
        Their names.
    configs : sequence of Config
        Presets, or changes of one.
    seeds : iterable of int
        The seeds.
    output : Path
        The folder for the runs.
    skip_damaged, say
        See :func:`read_splits`; ``say`` receives the category first.

    Raises
    ------
    SimpleNetError
        If a category cannot be read or evaluated, or ``output`` holds other runs under the
        same names.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from simplenet_lib.config import PRESETS
    >>> configs = [PRESETS["fast"], replace(PRESETS["fast"], sigma=0.5)]
    >>> [job.path.name for job in missing_jobs(data, ["nut"], configs, [0], folder)]
    ['nut-fast-0.json', 'nut-fast-sigma=0.5-0.json']
    """
    jobs = []
    for name in dict.fromkeys(categories):
        # What cannot be read is found now, not after hours; and nothing is read twice.
        splits = read_splits(data, name, skip_damaged=skip_damaged, say=partial(say, name))
        if not can_be_evaluated(splits.test):
            raise SimpleNetError(f"{data / name}: no test images with and without a defect.")
        for config, seed in product(dict.fromkeys(configs), dict.fromkeys(seeds)):
            changes = changes_of(config)
            parts = [name, config.preset, *([named(changes)] if changes else []), str(seed)]
            path = output / f"{'-'.join(parts)}.json"
            seeded = splits.under(replace(config, seed=seed))
            if not is_done(path, data.resolve().name, name, seeded):
                jobs.append(Job(data, name, seeded, changes, path, splits))
    return jobs


def changes_of(config: Config) -> dict[str, Any]:
    """What a configuration changes of its preset, apart from the seed.

    Examples
    --------
    >>> from dataclasses import replace
    >>> from simplenet_lib.config import PRESETS
    >>> changes_of(replace(PRESETS["fast"], sigma=0.5, seed=3))
    {'sigma': 0.5}
    """
    usual = asdict(PRESETS[config.preset])
    return {
        name: value
        for name, value in asdict(config).items()
        if name != "seed" and value != usual[name]
    }


def named(changes: Mapping[str, Any]) -> str:
    """Changes of a preset as a name.

    Examples
    --------
    >>> named({"layers": ["layer1", "layer2"], "sigma": 0.5})
    'layers=layer1+layer2,sigma=0.5'
    """
    values = {
        name: "+".join(value) if isinstance(value, list | tuple) else value
        for name, value in changes.items()
    }
    return ",".join(f"{name}={value}" for name, value in values.items())


def mean_and_deviation(values: Sequence[float]) -> str:
    """Shares between 0 and 1 as percent, ``"99.8 ± 0.2"``; one value has no deviation.

    Examples
    --------
    >>> mean_and_deviation([0.97, 0.99]), mean_and_deviation([0.97])
    ('98.0 ± 1.4', '97.0')
    """
    percent = [100 * value for value in values]
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"


def with_both(runs: Sequence[dict[str, Any]], metric: str) -> str:
    """A metric in percent, ``"97.1 ± 0.3 ± 1.2"``: over the runs' seeds, over test images.

    Examples
    --------
    >>> runs = [{"aupro": 0.9, "deviation_over_images": {"aupro": 0.02}}, {"aupro": 0.94}]
    >>> with_both(runs, "aupro")
    '92.0 ± 2.8 ± 2.0'
    """
    values = [run[metric] for run in runs if metric in run]
    if not values:
        return "no masks"
    deviations = [run.get("deviation_over_images", {}).get(metric) for run in runs]
    text = mean_and_deviation(values)
    known = [value for value in deviations if value is not None]
    if not known:
        return text
    return f"{text}{' ± –' if len(values) == 1 else ''} ± {100 * statistics.mean(known):.1f}"


def table(runs: Iterable[dict[str, Any]]) -> str:
    """One row a category, preset and change of it, as Markdown, metrics in percent.

    The first ± is the standard deviation over seeds, the second the one over test
    images. The seconds of the features are the highest of a row: later seeds read
    them from the cache.

    Examples
    --------
    >>> run = {"category": "nut", "preset": "fast", "image_auroc": 0.98}
    >>> run |= {"seconds_features": 9, "seconds_training": 60}
    >>> print(table([run | {"false_alarm_rate": 0.05, "detection_rate": 0.95}]))
    | category | preset | seeds | image AUROC | pixel AUROC | ...
    | --- | --- | ...
    | nut | `fast` | 1 | 98.0 | no masks | no masks | 5.0 | 95.0 | 9 | 60 |
    """
    columns = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
    rates = {"false_alarm_rate": "false alarms", "detection_rate": "defects found"}
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for run in runs:
        changes = named(run.get("changes", {}))
        variant = f"`{run['preset']}`{', ' if changes else ''}{changes}"
        groups.setdefault((run["category"], variant), []).append(run)
    heading = ["category", "preset", "seeds", *columns.values(), *rates.values()]
    heading += ["features, s", "training, s"]
    lines = [heading, ["---"] * len(heading)]
    for (category, variant), group in groups.items():
        row = [category, variant, str(len(group))]
        row += [with_both(group, metric) for metric in columns]
        row += [mean_and_deviation([run[rate] for run in group if rate in run]) for rate in rates]
        features = max(run["seconds_features"] for run in group)
        training = statistics.mean(run["seconds_training"] for run in group)
        lines.append([*row, f"{features:.0f}", f"{training:.0f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
