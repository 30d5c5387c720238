"""Figures: one look for the whole project, the same colours for normal and for defect."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import seaborn
from matplotlib.figure import Figure
from numpy.typing import ArrayLike
from PIL import Image, ImageChops, ImageDraw

from simplenet_lib.config import Config
from simplenet_lib.dataset import read_image, seen_box
from simplenet_lib.metrics import auroc_deviation, image_metrics

if TYPE_CHECKING:
    from simplenet_lib.localization import Prediction

NORMAL, DEFECT = (seaborn.color_palette("colorblind")[i] for i in (0, 3))

Map = np.ndarray[Any, np.dtype[np.float32]]


def use_book_style() -> None:
    """Give every figure of this process the look of the book: size on paper, font, colours.

    Examples
    --------
    >>> import matplotlib
    >>> use_book_style()
    >>> matplotlib.rcParams["figure.dpi"]
    90.0
    """
    seaborn.set_theme(
        context="notebook",
        style="ticks",
        palette="colorblind",
        font_scale=0.9,
        rc={
            "figure.dpi": 90,
            "figure.figsize": (6.5, 3.2),
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "image.cmap": "gray",
            "legend.frameon": False,
        },
    )


def overlay(image: Image.Image, map_: Map, config: Config, threshold: float = 1.0) -> Image.Image:
    """Lay an anomaly map over its image, on a scale that is the same for all images.

    The map is invisible at 0, the score of a typical normal image, and opaque at 2; a
    line is drawn at ``threshold``.

    Parameters
    ----------
    image : Image
        RGB, any size.
    map_ : ndarray
        Anomaly map of the part that the network sees, see :func:`seen_box`.
    config : Config
        The configuration of the model.
    threshold : float
        Where the line is drawn.

    Returns
    -------
    Image
        RGB, as large as ``image``.

    Examples
    --------
    >>> photo, map_ = Image.new("RGB", (640, 480)), np.zeros((32, 32), np.float32)
    >>> overlay(photo, map_, model.config).size
    (640, 480)
    """
    box = seen_box(*image.size, config)
    size = (box[2] - box[0], box[3] - box[1])
    resized = Image.fromarray(map_.astype(np.float32)).resize(size, Image.Resampling.BILINEAR)
    level = np.asarray(resized)
    colour = matplotlib.colormaps["inferno"](np.clip(level / 2, 0, 1), bytes=True)[..., :3]
    opacity = np.clip(level / 2, 0, 1) * 200
    result = image.copy()
    result.paste(
        Image.fromarray(np.ascontiguousarray(colour)),
        box[:2],
        Image.fromarray(opacity.astype(np.uint8)),
    )
    inside = Image.fromarray(((level > threshold) * 255).astype(np.uint8))
    result.paste(Image.new("RGB", size, "white"), box[:2], _outline(inside))
    if config.crop < config.resize:
        left, top, right, bottom = box  # a frame around what is seen, not on it
        ImageDraw.Draw(result).rectangle((left - 1, top - 1, right, bottom), outline="white")
    return result


def _outline(region: Image.Image) -> Image.Image:
    """The pixels of a region (0 or 255) that touch its outside, about 1/200 of the image wide."""
    width = max(1, round(max(region.size) / 200))
    padded = np.pad(np.asarray(region) > 0, width)
    inner = padded.copy()
    for axis in (0, 1):
        for shift in (-width, width):
            inner &= np.roll(padded, shift, axis)
    edge = Image.fromarray(((padded & ~inner)[width:-width, width:-width] * 255).astype(np.uint8))
    return ImageChops.darker(edge, region)


def gallery(predictions: Sequence[Prediction], config: Config) -> Figure:
    """One column a prediction: the image, the marked defect, the anomaly map.

    Parameters
    ----------
    predictions : sequence of Prediction
        What to show, at most a dozen.
    config : Config
        The configuration of the model.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> from simplenet_lib.localization import predict
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> figure = gallery(list(predict(model, test, progress=False))[:4], model.config)
    >>> len(figure.axes)
    12
    """
    columns = len(predictions)
    figure, axes = plt.subplots(
        3, columns, figsize=(1.6 * columns + 0.4, 5.4), squeeze=False, layout="constrained"
    )
    for column, prediction in zip(axes.T, predictions, strict=True):
        sample = prediction.sample
        image = read_image(sample.image)
        seen = image.crop(seen_box(*image.size, config))
        result = overlay(image, prediction.map, config)
        column[0].imshow(image)
        column[1].imshow(seen.resize(prediction.mask.shape[::-1]))
        if prediction.mask.any():
            column[1].contourf(prediction.mask, levels=[0.5, 1.5], colors=[DEFECT], alpha=0.6)
        column[2].imshow(result)
        column[0].set_title(sample.defect.replace("_", " "), fontsize=9)
        verdict = "anomalous" if prediction.anomalous else "normal"
        right = prediction.anomalous == bool(sample.label)
        column[2].set_xlabel(
            f"{verdict}{'' if right else ' (wrong)'}",
            fontsize=9,
            color=DEFECT if prediction.anomalous else NORMAL,
        )
        for axis in column:
            axis.set_xticks([])
            axis.set_yticks([])
    for axis, name in zip(axes[:, 0], ("image", "marked defect", "anomaly map"), strict=True):
        axis.set_ylabel(name, fontsize=9)
    return figure


def scoreboard(
    scores: Mapping[str, ArrayLike], labels: ArrayLike, new: Collection[str] = ()
) -> Figure:
    """Draw the image AUROC of several detectors on the same test images.

    A bar is the standard deviation over other test images, see
    :func:`simplenet_lib.metrics.auroc_deviation`.

    Parameters
    ----------
    scores : mapping of str to (n,) array
        Every detector's image scores; high is anomalous. The first is drawn at the top.
    labels : (n,) array
        1 for a defect, 0 for a normal image.
    new : collection of str
        Detectors to draw in colour; the others are grey.

    Examples
    --------
    >>> figure = scoreboard({"pixels": [1, 3, 2, 4], "features": [1, 2, 3, 4]}, [0, 0, 1, 1])
    >>> [label.get_text() for label in figure.axes[0].get_yticklabels()]
    ['pixels', 'features']
    """
    labels = np.asarray(labels)
    normal, defect = int((labels == 0).sum()), int((labels == 1).sum())
    figure, axes = plt.subplots(figsize=(6.5, 0.5 + 0.42 * len(scores)), layout="constrained")
    for row, (name, values) in enumerate(scores.items()):
        auroc = image_metrics(labels, np.asarray(values))["image_auroc"]
        error = auroc_deviation(auroc, normal, defect)
        colour = seaborn.color_palette("colorblind")[2] if name in new else "0.4"
        axes.errorbar(auroc, row, xerr=error, fmt="o", color=colour, capsize=3)
        axes.annotate(f"{auroc:.3f}", (1.02, row), va="center", color=colour, annotation_clip=False)
    axes.axvline(0.5, color="0.8", linewidth=1, zorder=0)
    axes.set(xlim=(0.4, 1.0), ylim=(len(scores) - 0.5, -0.5))
    axes.set_yticks(range(len(scores)), list(scores))
    axes.set_xlabel(f"image AUROC, {normal} normal and {defect} defective test images")
    return figure
