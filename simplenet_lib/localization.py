"""Chapter 8: from a score map to an anomaly map, an image score and a verdict."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor
from tqdm import tqdm

from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.dataset import (
    AnomalyDataset,
    ImageFiles,
    Sample,
    as_picture,
    as_seen,
    enough,
    make_transform,
    own_part,
    seen_box,
    upright_size,
)
from simplenet_lib.drift import describe
from simplenet_lib.features import ahead, at_once, batches, over_tiles, release_memory
from simplenet_lib.metrics import EIGHT_NEIGHBOURS, image_metrics, pixel_metrics

if TYPE_CHECKING:  # the model imports this module, not the other way round
    from simplenet_lib.model import SimpleNet

Map = np.ndarray[tuple[int, int], np.dtype[np.float32]]
Source = Path | str | bytes | Image.Image | NDArray[Any]
PICTURE_PIXELS = 1_000_000  # at most, of the picture that an overlay is drawn on


def anomaly_map(scores: Tensor, size: int | tuple[int, int], smoothing: float) -> Tensor:
    """Upsample a score map to the image and smooth it (paper, section 3.6).

    Smoothing averages noise away, but less so where it sees less of the map. A
    map that is mirrored at its border therefore has its chance maxima there. So
    outside of the image we assume 0, the mean of a normal image's map.

    Parameters
    ----------
    scores : Tensor
        Score map of a committee, (N, h, w): high is anomalous, 0 is normal on average.
    size : int or (int, int)
        Height and width of the network's input in pixels; one number for a square.
    smoothing : float
        Standard deviation of the Gaussian in pixels; 0 for none.

    Returns
    -------
    Tensor
        Anomaly map, (N, height, width).

    Examples
    --------
    >>> anomaly_map(torch.zeros(1, 8, 8), (64, 96), smoothing=4.0).shape
    torch.Size([1, 64, 96])
    """
    height, width = (size, size) if isinstance(size, int) else size
    rows = resize_and_smooth(scores.new_ones(scores.shape[1]).diag(), height, smoothing)
    columns = resize_and_smooth(scores.new_ones(scores.shape[2]).diag(), width, smoothing)
    return rows.T @ scores @ columns


def resize_and_smooth(values: Tensor, length: int, smoothing: float) -> Tensor:
    """Resize rows (n, w) to ``length`` pixels and smooth them with a Gaussian, (n, length).

    Both are linear, and work along rows and columns one after the other. So what becomes of
    rows that hold a single 1 says how much each position adds to each pixel.

    Examples
    --------
    >>> resize_and_smooth(torch.tensor([[0.0, 1.0]]), 4, smoothing=0)
    tensor([[0.0000, 0.2500, 0.7500, 1.0000]])
    """
    resized = F.interpolate(values[:, None], length, mode="linear", align_corners=False)
    if smoothing > 0:
        radius = math.ceil(3 * smoothing)
        offsets = torch.arange(-radius, radius + 1, dtype=values.dtype, device=values.device)
        kernel = torch.exp(-0.5 * (offsets / smoothing).square())
        resized = F.conv1d(resized, (kernel / kernel.sum()).view(1, 1, -1), padding=radius)
    return resized[:, 0]


def image_score(maps: Tensor) -> Tensor:
    """Score an image by the maximum of its anomaly map: (N, H, W) to (N,).

    Examples
    --------
    >>> image_score(torch.tensor([[[0.0, 2.0]], [[1.0, 0.5]]]))
    tensor([2., 1.])
    """
    return maps.amax(dim=(1, 2))


def threshold(normal_scores: Tensor, false_alarms: float) -> float:
    """Score above which an image counts as anomalous.

    The k-th highest of n scores, with the largest k that keeps k / (n + 1) within
    ``false_alarms``: of images that come in no particular order, a new one is equally
    likely to take each of the n + 1 places. The highest score if there are too few for that.

    Parameters
    ----------
    normal_scores : Tensor
        Scores of normal images that were not trained on, (N,). Scores of
        defects have no place here: a test set cannot choose the threshold.
    false_alarms : float
        Share of normal images that may be called anomalous, 0 to 0.5.

    Examples
    --------
    >>> scores = torch.arange(1.0, 40.0)  # 39 normal photos: 2 / 40 = 5%
    >>> threshold(scores, false_alarms=0.05), threshold(scores, false_alarms=0.0)
    (38.0, 39.0)
    """
    place = rank(len(normal_scores), false_alarms)
    return float(normal_scores.sort(descending=True).values[place - 1])


def rank(count: int, false_alarms: float) -> int:
    """The largest k with k / (count + 1) within ``false_alarms``, of 1 to count.

    Examples
    --------
    >>> rank(39, 0.05), rank(38, 0.05), rank(9, 0.05)
    (2, 1, 1)
    """
    return min(max(1, math.floor(false_alarms * (count + 1) + 1e-9)), count)


def check_threshold(value: float) -> None:
    """Refuse a threshold that no score exceeds, or that is no number.

    Examples
    --------
    >>> check_threshold(1.2)
    >>> check_threshold(float("nan"))
    Traceback (most recent call last):
        ...
    simplenet_lib.config.SimpleNetError: the threshold is nan; it must be a number, such as 1.2.
    """
    if not math.isfinite(value):
        raise SimpleNetError(f"the threshold is {value}; it must be a number, such as 1.2.")


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes
    ----------
    sample : Sample
        The image on disk.
    score : float
        Maximum of the anomaly map: about 0 for a typical normal image, 1 at the threshold.
    anomalous : bool
        Whether the score is above 1.
    draw : callable
        Makes the anomaly map anew from the score map: of thousands of images the small maps
        are kept, and not the large ones.
    mask : ndarray
        Ground truth on the same pixels, bool; all False without a mask.
    unfamiliar : list of str
        In what way the photo as a whole looks unlike the training photos, mostly in none:
        see :class:`simplenet_lib.drift.Drift`. If in any, do not trust the verdict.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> prediction: Prediction = next(predict(model, test, progress=False))
    >>> prediction.sample.defect, prediction.map.shape, prediction.mask.dtype
    ('broken_corner', (32, 32), dtype('bool'))
    """

    sample: Sample
    score: float
    anomalous: bool
    draw: Callable[[], Map]
    mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    unfamiliar: list[str]

    @property
    def map(self) -> Map:
        """Anomaly map, (height, width) of float32, of what the network saw, on the same scale."""
        return self.draw()


class Maps(Sequence[Map]):
    """The anomaly maps of predictions, each drawn when it is asked for and not kept.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> maps = Maps(list(predict(model, test, progress=False)))
    >>> len(maps), maps[0].shape
    (7, (32, 32))
    """

    def __init__(self, predictions: Sequence[Prediction]) -> None:
        self.predictions = predictions

    def __len__(self) -> int:
        return len(self.predictions)

    def __getitem__(self, index: Any) -> Any:
        return self.predictions[index].map


@dataclass(frozen=True)
class Region:
    """A connected part of a photo that is more anomalous than the threshold.

    Attributes
    ----------
    x, y, width, height : int
        The box around it: its left and upper edge and its size, in pixels of the photo.
    area : int
        How many of the photo's pixels it covers, about: it is measured on the map.
    peak : float
        The highest value of the anomaly map in it.

    Examples
    --------
    >>> region = Region(x=120, y=80, width=20, height=10, area=150, peak=1.7)
    >>> region.x + region.width, region.y + region.height  # right and lower edge
    (140, 90)
    """

    x: int
    y: int
    width: int
    height: int
    area: int
    peak: float


def regions(map_: Map, box: tuple[int, int, int, int], threshold: float = 1.0) -> list[Region]:
    """Where an anomaly map exceeds a threshold, the highest first; pixels touch all eight around.

    Parameters
    ----------
    map_ : ndarray
        Anomaly map, (h, w), of the part ``box`` of a photo.
    box : tuple of int
        Left, top, right, bottom in the photo's pixels, see
        :func:`simplenet_lib.dataset.seen_box`.
    threshold : float
        On the map's scale.

    Examples
    --------
    >>> map_ = np.zeros((4, 4), np.float32)
    >>> map_[1:3, 1] = 1.5
    >>> regions(map_, box=(0, 0, 8, 8))
    [Region(x=2, y=2, width=2, height=4, area=8, peak=1.5)]
    """
    labels, count = ndimage.label(map_ > threshold, EIGHT_NEIGHBOURS)
    left, top, right, bottom = box
    across, down = (right - left) / map_.shape[1], (bottom - top) / map_.shape[0]
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    peaks = ndimage.maximum(map_, labels, range(1, count + 1))
    found = []
    for (rows, columns), size, peak in zip(ndimage.find_objects(labels), sizes, peaks, strict=True):
        x, y = left + math.floor(columns.start * across), top + math.floor(rows.start * down)
        width = left + math.ceil(columns.stop * across) - x
        height = top + math.ceil(rows.stop * down) - y
        area = max(1, round(size * across * down))
        found.append(Region(x, y, width, height, area, float(peak)))
    return sorted(found, key=lambda region: -region.peak)


@dataclass(frozen=True, eq=False)
class Result:
    """What the model says of one photo, in the photo's own pixels.

    It keeps a picture of at most one megapixel to draw on. Of very many photos ask for
    one result after another: see :meth:`simplenet_lib.model.SimpleNet.predict`.

    Attributes
    ----------
    name : str
        The file, or for an image without one ``"image"`` and its number.
    score : float
        Maximum of the anomaly map: about 0 for a typical normal photo, 1 at the threshold
        that the model has.
    unfamiliar : list of str
        In what way the photo as a whole looks unlike the training photos, mostly in none. If
        in any, do not trust the verdict.
    size : (int, int)
        Width and height of the photo in pixels.
    threshold : float
        The score above which the photo counts as anomalous.
    seen : ndarray
        Anomaly map, (h, w) of float32, in the resolution of the network, of the part of the
        photo that it sees.
    picture : Image
        The photo, upright, 8-bit RGB, smaller if it is large.
    config : Config
        The configuration of the model.

    Examples
    --------
    >>> result = model.predict(Image.new("RGB", (640, 480)), threshold=1e6)
    >>> result.verdict, result.regions, result.map.shape
    ('normal', [], (480, 640))
    >>> result.save(folder / "overlay.png")
    """

    name: str
    score: float
    unfamiliar: list[str]
    size: tuple[int, int]
    threshold: float
    seen: Map
    picture: Image.Image
    config: Config

    @property
    def anomalous(self) -> bool:
        """Whether the score is above the threshold."""
        return self.score > self.threshold

    @property
    def verdict(self) -> Literal["anomalous", "normal"]:
        """The same as a word."""
        return "anomalous" if self.anomalous else "normal"

    @property
    def map(self) -> Map:
        """Anomaly map, (height, width) of the photo, float32; NaN where the network is blind."""
        width, height = self.size
        left, top, right, bottom = seen_box(width, height, self.config)
        whole = np.full((height, width), np.nan, dtype=np.float32)
        part = Image.fromarray(self.seen).resize(
            (right - left, bottom - top), Image.Resampling.BILINEAR
        )
        whole[top:bottom, left:right] = np.asarray(part)
        return whole

    @cached_property
    def regions(self) -> list[Region]:
        """What is above the threshold, see :func:`regions`; none in a normal photo."""
        return regions(self.seen, seen_box(*self.size, self.config), self.threshold)

    def overlay(self) -> Image.Image:
        """The map laid over the picture, see :func:`simplenet_lib.plots.overlay`."""
        from simplenet_lib.plots import overlay  # matplotlib, which not every program needs

        return overlay(self.picture, self.seen, self.config, self.threshold)

    def show(self) -> None:
        """Show the overlay as a figure, in a notebook or a window."""
        import matplotlib.pyplot as plt

        _, axis = plt.subplots(layout="constrained")
        axis.imshow(self.overlay())
        axis.set_title(f"{Path(self.name).name}: {self.verdict}, score {self.score:.2f}")
        axis.axis("off")
        plt.show()

    def save(self, path: Path | str) -> None:
        """Write the overlay as an image file; its suffix says of which kind.

        Raises
        ------
        SimpleNetError
            If there is no such kind, or ``path`` cannot be written.
        """
        try:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            self.overlay().save(path)
        except (OSError, ValueError) as error:
            raise SimpleNetError(f"{path}: could not be written ({error}).") from error


@torch.inference_mode()
def judge(
    model: SimpleNet, images: Tensor, layer: tuple[Tensor, Tensor] | None = None
) -> list[tuple[Tensor, Map, float, list[str]]]:
    """Score map, anomaly map, image score and what is unfamiliar, of each of N images.

    Every prediction of this library comes from here.

    Parameters
    ----------
    model : SimpleNet
        A trained model; images are moved to its device.
    images : Tensor
        Normalised images, (N, 3, H, W), as :func:`simplenet_lib.dataset.make_transform`
        makes them.
    layer : (Tensor, Tensor), optional
        :meth:`SimpleNet.hidden_layer`, worked out once for many images.

    Raises
    ------
    SimpleNetError
        If a score is not a number: that must not pass as normal.

    Examples
    --------
    >>> ((scores, map_, score, unfamiliar),) = judge(model, torch.zeros(1, 3, 32, 32))
    >>> scores.shape, map_.shape, bool(score == map_.max())
    (torch.Size([8, 8]), (32, 32), True)
    """
    model.eval()
    config = model.config
    images = images.to(next(model.parameters()).device)

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = model.features.outputs(images)
        return model.score_maps(outputs, layer).permute(1, 2, 3, 0), describe(images, outputs[0])

    maps_of_heads, description = over_tiles(images, config.tile, look)
    scores = model.committee(maps_of_heads.permute(3, 0, 1, 2))
    drift = model.drift(description)
    maps = scaled_maps(scores, config, model.typical, model.threshold)
    highest = image_score(maps)
    if not highest.isfinite().all():
        raise SimpleNetError(
            "the network's scores are not finite: the device or the weights are at fault."
        )
    return list(zip(scores, maps.numpy(), highest.tolist(), drift, strict=True))


@torch.inference_mode()
def scaled_maps(scores: Tensor, config: Config, typical: float, threshold: float) -> Tensor:
    """Anomaly maps (N, H, W) of score maps (N, h, w), on the scale of typical, 0, and threshold, 1.

    Examples
    --------
    >>> scaled_maps(torch.zeros(2, 8, 8), model.config, typical=1.0, threshold=2.0).unique()
    tensor([-1.])
    """
    maps = anomaly_map(scores, config.seen, config.smoothing)
    return in_units(maps, typical, threshold).cpu()


def in_units(values: Tensor, typical: float, threshold: float) -> Tensor:
    """Values on the scale of typical, 0, and threshold, 1.

    Examples
    --------
    >>> in_units(torch.tensor([1.0, 2.0, 3.0]), typical=1.0, threshold=3.0)
    tensor([0.0000, 0.5000, 1.0000])
    """
    return (values - typical) / (threshold - typical)


def predict(
    model: SimpleNet, dataset: ImageFiles, *, progress: bool = True
) -> Iterator[Prediction]:
    """Predict every image of ``dataset``, in order, a few at a time.

    Parameters
    ----------
    model : SimpleNet
        A trained model; images are moved to its device.
    dataset : ImageFiles
        Images under the transform the model was trained with.
    progress : bool
        Show a progress bar on stderr.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> [prediction.sample.defect for prediction in predict(model, test, progress=False)]
    ['broken_corner', 'dent', 'fibre', 'good', 'good', 'rust', 'scratch']
    """
    with tqdm(total=len(dataset), desc="predict", unit="image", disable=not progress) as bar:
        count, layer = at_once(model.config.tile), model.hidden_layer()
        reading = batches(ahead(dataset.item, range(len(dataset)), count), count)
        for number, batch in enumerate(reading):
            if number % 2:  # of each image something is kept, in between what is not
                release_memory()
            for index, mask, (scores, map_, _, unfamiliar) in zip(
                batch["index"].tolist(),
                batch["mask"].numpy(),
                judge(model, batch["image"], layer),
                strict=True,
            ):
                sample = dataset.samples[index]
                own = own_part(*upright_size(sample.image), model.config)
                mask, score = mask[own], float(map_[own].max())
                # Of an image without a mask all share one pixel: there may be thousands.
                kept = mask.copy() if sample.mask else np.broadcast_to(np.False_, mask.shape)
                draw = partial(_one_map, scores, own, model.config, model.typical, model.threshold)
                yield Prediction(sample, score, score > 1, draw, kept, unfamiliar)
                bar.update()


def _one_map(scores: Tensor, own: tuple[slice, slice], *scale: Any) -> Map:
    map_: Map = scaled_maps(scores[None], *scale)[0].numpy()
    return map_[own]


def results(
    model: SimpleNet,
    sources: Sequence[Source],
    names: Sequence[str],
    *,
    channels: Literal["rgb", "bgr"] = "rgb",
    threshold: float = 1.0,
    progress: bool = False,
) -> Generator[Result | SimpleNetError, None, None]:
    """Predict images of any kind, in order, each decoded once, a few at a time.

    Parameters
    ----------
    model : SimpleNet
        A trained model; images are moved to its device.
    sources : sequence of Path, str, bytes, Image or ndarray
        See :func:`simplenet_lib.dataset.as_picture`.
    names : sequence of str
        What results and errors call them.
    channels : {"rgb", "bgr"}
        Order of the channels of arrays.
    threshold : float
        The score above which an image counts as anomalous, on the scale where 1 is the
        model's own.
    progress : bool
        Show a progress bar on stderr.

    Yields
    ------
    Result or SimpleNetError
        The error says why an image could not be read.

    Examples
    --------
    >>> frames = [np.zeros((48, 64, 3), np.uint8), np.zeros((2, 2, 2), np.uint8)]
    >>> for result in results(model, frames, ["frame 1", "frame 2"]):
    ...     print(type(result).__name__)
    Result
    SimpleNetError
    """
    check_threshold(threshold)
    config = model.config
    transform = make_transform(config.size, config.seen)
    keep = enough(transform)

    def read(number: int) -> tuple[Tensor, Image.Image, tuple[int, int]] | SimpleNetError:
        try:
            picture, size = as_picture(sources[number], names[number], channels, config.white, keep)
        except SimpleNetError as error:
            return error
        image = as_seen(picture, transform)
        shrink = math.ceil(math.sqrt(picture.width * picture.height / PICTURE_PIXELS))
        return image, picture.reduce(shrink) if shrink > 1 else picture, size

    every, count = range(len(sources)), at_once(config.tile)
    # A single image, as from a camera, needs no thread.
    reading = ahead(read, every, count) if len(sources) > 1 else iter(map(read, every))
    numbers, layer = iter(every), model.hidden_layer()
    with tqdm(total=len(sources), desc="predict", unit="image", disable=not progress) as bar:
        while some := list(islice(reading, count)):
            images = [one[0] for one in some if not isinstance(one, SimpleNetError)]
            judged = iter(judge(model, torch.stack(images), layer) if images else ())
            for one in some:
                number = next(numbers)
                if isinstance(one, SimpleNetError):
                    yield one
                else:
                    _, map_, _, unfamiliar = next(judged)
                    _, picture, size = one
                    map_ = map_[own_part(*size, config)]
                    score = float(map_.max())
                    yield Result(
                        names[number], score, unfamiliar, size, threshold, map_, picture, config
                    )
                bar.update()


def rescale(model: SimpleNet, scores: Sequence[float], false_alarms: float) -> None:
    """Set a model's typical score and threshold anew, by what it says of other good photos.

    Parameters
    ----------
    model : SimpleNet
        Changed in place.
    scores : sequence of float
        Scores of good photos that it was not trained on, on its present scale.
    false_alarms : float
        See :func:`threshold`.

    Raises
    ------
    SimpleNetError
        If the scores are all alike, or there are fewer than two.

    Examples
    --------
    >>> before = model.threshold - model.typical
    >>> rescale(model, [0.0, 0.5, 2.0], false_alarms=0.0)  # what was 0.5 and 2 is now 0 and 1
    >>> round((model.threshold - model.typical) / before, 3)
    1.5
    """
    if len(scores) < 2:
        raise SimpleNetError(f"{len(scores)} good photo: at least 2 are needed for a threshold.")
    values = torch.tensor(scores, dtype=torch.float64)
    values = model.typical + values * (model.threshold - model.typical)
    typical, limit = float(np.median(values.numpy())), threshold(values, false_alarms)
    if limit <= typical:
        raise SimpleNetError(
            f"the {len(scores)} photos do not differ, so they set no threshold: copies of one?"
        )
    # A hair above: by rounding the photo that sets the threshold could come to lie beyond it.
    model.typical, model.threshold = typical, limit + 1e-6 * (limit - typical)


def evaluate(
    model: SimpleNet, dataset: AnomalyDataset, *, progress: bool = True
) -> tuple[dict[str, float], list[Prediction]]:
    """Predict a test split and compare with its labels and masks.

    Returns
    -------
    metrics : dict of str to float
        See :func:`metrics_of`.
    predictions : list of Prediction
        One for every image.

    Raises
    ------
    SimpleNetError
        If the split lacks normal images or images with a defect.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> metrics, predictions = evaluate(model, test, progress=False)
    >>> list(metrics)
    ['image_auroc', 'image_ap', 'image_f1max', 'pixel_auroc', 'pixel_ap', 'aupro']
    """
    check_both_kinds(dataset.samples)
    predictions = list(predict(model, dataset, progress=progress))
    return metrics_of(predictions), predictions


def has_both_kinds(samples: Sequence[Sample]) -> bool:
    """Whether there are images with and without a defect.

    Examples
    --------
    >>> from simplenet_lib.dataset import find_samples
    >>> found = find_samples(data / "nut")
    >>> has_both_kinds(found.test), has_both_kinds(found.train)
    (True, False)
    """
    return {sample.label for sample in samples} == {0, 1}


def check_both_kinds(samples: Sequence[Sample]) -> None:
    """Refuse a test split without normal images or without defects: no metric is defined.

    Examples
    --------
    >>> from simplenet_lib.dataset import find_samples
    >>> check_both_kinds(find_samples(data / "nut").train)
    Traceback (most recent call last):
        ...
    simplenet_lib.config.SimpleNetError: the test split holds no images with a defect: ...
    """
    if not has_both_kinds(samples):
        defects = any(sample.label for sample in samples)
        missing = "normal images (test/good)" if defects else "images with a defect"
        raise SimpleNetError(f"the test split holds no {missing}: nothing to evaluate against.")


def metrics_of(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Compare predictions with the truth, masks and maps on the pixels the network saw.

    Returns
    -------
    dict of str to float
        ``image_auroc``, ``image_ap``, ``image_f1max``, and if every defect has a mask and
        these are no mistake (see :func:`mask_note`) also ``pixel_auroc``, ``pixel_ap`` and
        ``aupro``; all between 0 and 1.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> metrics = metrics_of(list(predict(model, test, progress=False)))
    >>> all(0 <= value <= 1 for value in metrics.values())
    True
    """
    labels = np.array([prediction.sample.label for prediction in predictions])
    metrics = image_metrics(labels, np.array([prediction.score for prediction in predictions]))
    every = all(p.sample.mask is not None for p in predictions if p.sample.label)
    if every and not mask_note(predictions):
        metrics |= pixel_metrics([p.mask for p in predictions], Maps(predictions))
    return metrics


def mask_note(predictions: Sequence[Prediction]) -> str:
    """Why the masks allow no pixel metrics, in one sentence; empty if they do.

    They do not if no mask marks anything, or if most mark more than half of their image:
    then normal is marked and not the defect.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> mask_note(list(predict(model, test, progress=False)))
    ''
    """
    masks = [p.mask for p in predictions if p.sample.label and p.sample.mask is not None]
    if masks and not any(mask.any() for mask in masks):
        return f"No pixel is marked in any of the {len(masks)} masks: pixel metrics are left out."
    inverted = sum(mask.mean() > 0.5 for mask in masks)
    if 2 * inverted > len(masks):
        return (
            f"{inverted} of {len(masks)} masks mark more than half of their image, as if they were"
            " inverted (a defect is everything but 0): pixel metrics are left out."
        )
    return ""
