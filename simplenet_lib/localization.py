"""Chapter 8: from a score map to an anomaly map, an image score and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import AnomalyDataset, ImageFiles, Sample
from simplenet_lib.drift import describe
from simplenet_lib.features import batches
from simplenet_lib.metrics import image_metrics, pixel_metrics
from simplenet_lib.model import SimpleNet


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
    """
    maps = F.interpolate(scores[:, None], size, mode="bilinear", align_corners=False)
    if smoothing > 0:
        radius = math.ceil(3 * smoothing)
        offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
        kernel = torch.exp(-0.5 * (offsets / smoothing).square())
        kernel = kernel / kernel.sum()
        # A Gaussian is separable: one pass along the rows, one along the columns.
        maps = F.conv2d(maps, kernel.view(1, 1, 1, -1), padding=(0, radius))
        maps = F.conv2d(maps, kernel.view(1, 1, -1, 1), padding=(radius, 0))
    return maps[:, 0]


def image_score(maps: Tensor) -> Tensor:
    """Score an image by the maximum of its anomaly map: (N, H, W) to (N,)."""
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
    """
    rank = max(1, allowed(len(normal_scores), false_alarms))
    return float(normal_scores.sort(descending=True).values[rank - 1])


def allowed(count: int, false_alarms: float) -> int:
    """The largest k with k / (count + 1) within ``false_alarms``."""
    return math.floor(false_alarms * (count + 1) + 1e-9)


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
    map : ndarray
        Anomaly map, (height, width) of float32, of what the network saw, on the same scale.
    mask : ndarray
        Ground truth on the same pixels, bool; all False without a mask.
    unfamiliar : list of str
        In what way the photo as a whole looks unlike the training photos, mostly in none:
        see :class:`simplenet_lib.drift.Drift`. If in any, do not trust the verdict.
    """

    sample: Sample
    score: float
    anomalous: bool
    map: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]]
    unfamiliar: list[str]


@torch.inference_mode()
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
    """
    model.eval()
    config = model.config
    device = next(model.parameters()).device
    with tqdm(total=len(dataset), desc="predict", unit="image", disable=not progress) as bar:
        for batch in batches(dataset):
            images = batch["image"].to(device)
            outputs = model.features.outputs(images)
            scores = model.committee(model.score_maps(outputs))
            drift = model.drift(describe(images, outputs[0]))
            maps = model.in_units(anomaly_map(scores, config.seen, config.smoothing)).cpu()
            for index, map_, score, mask, unfamiliar in zip(
                batch["index"].tolist(),
                maps.numpy(),
                image_score(maps).tolist(),
                batch["mask"].numpy(),
                drift,
                strict=True,
            ):
                sample = dataset.samples[index]
                yield Prediction(sample, score, score > 1, map_, mask, unfamiliar)
                bar.update()


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
    """
    labels = np.array([sample.label for sample in dataset.samples])
    if len(set(labels)) < 2:
        missing = "images with a defect" if not labels.any() else "normal images (test/good)"
        raise SimpleNetError(f"the test split holds no {missing}: nothing to evaluate against.")
    predictions = list(predict(model, dataset, progress=progress))
    return metrics_of(predictions), predictions


def metrics_of(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Compare predictions with the truth, masks and maps on the pixels the network saw.

    Returns
    -------
    dict of str to float
        ``image_auroc``, ``image_ap``, ``image_f1max``, and if every defect has a mask and
        these are no mistake (see :func:`mask_note`) also ``pixel_auroc``, ``pixel_ap`` and
        ``aupro``; all between 0 and 1.
    """
    labels = np.array([prediction.sample.label for prediction in predictions])
    metrics = image_metrics(labels, np.array([prediction.score for prediction in predictions]))
    every = all(p.sample.mask is not None for p in predictions if p.sample.label)
    if every and not mask_note(predictions):
        metrics |= pixel_metrics([p.mask for p in predictions], [p.map for p in predictions])
    return metrics


def mask_note(predictions: Sequence[Prediction]) -> str:
    """Why the masks allow no pixel metrics, in one sentence; empty if they do.

    They do not if no mask marks anything, or if most mark more than half of their image:
    then normal is marked and not the defect.
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
