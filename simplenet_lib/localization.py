"""Chapter 8: from a score map to an anomaly map, an image score and a verdict."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import AnomalyDataset, ImageFiles, Sample
from simplenet_lib.features import batches
from simplenet_lib.metrics import image_metrics, pixel_metrics
from simplenet_lib.model import SimpleNet


def anomaly_map(scores: Tensor, size: int, smoothing: float) -> Tensor:
    """Upsample a score map to the image and smooth it (paper, section 3.6).

    Smoothing averages noise away, but less so where it sees less of the map. A
    map that is mirrored at its border therefore has its chance maxima there. So
    outside of the image we assume the map's median.

    Parameters
    ----------
    scores : Tensor
        Score map -D(z), (N, h, w): high is anomalous.
    size : int
        Side of the network's input in pixels.
    smoothing : float
        Standard deviation of the Gaussian in pixels; 0 for none.

    Returns
    -------
    Tensor
        Anomaly map, (N, size, size).
    """
    maps = F.interpolate(scores[:, None], (size, size), mode="bilinear", align_corners=False)
    if smoothing > 0:
        radius = math.ceil(3 * smoothing)
        offsets = torch.arange(-radius, radius + 1, dtype=maps.dtype, device=maps.device)
        kernel = torch.exp(-0.5 * (offsets / smoothing).square())
        kernel = kernel / kernel.sum()
        # Beyond its border a map goes on as it typically is: with its median.
        typical = maps.flatten(1).median(dim=1).values[:, None, None, None]
        maps = F.pad(maps - typical, (radius, radius, radius, radius))
        # A Gaussian is separable: one pass along the rows, one along the columns.
        maps = F.conv2d(F.conv2d(maps, kernel.view(1, 1, 1, -1)), kernel.view(1, 1, -1, 1))
        maps = maps + typical
    return maps[:, 0]


def image_score(maps: Tensor) -> Tensor:
    """Score an image by the maximum of its anomaly map: (N, H, W) to (N,)."""
    return maps.amax(dim=(1, 2))


def background(maps: Tensor) -> Tensor:
    """Median of each anomaly map: (N, H, W) to (N,).

    A defect covers a small part of an image and hardly moves the median. What
    raises it is a change of the whole picture: light, focus, camera, product.
    """
    return maps.flatten(1).median(dim=1).values


def threshold(normal_scores: Tensor, quantile: float) -> float:
    """Score above which an image counts as anomalous.

    The smallest observed score at or above the quantile, so that an image must
    score higher than a normal image that was really seen.

    Parameters
    ----------
    normal_scores : Tensor
        Scores of normal images that were not trained on, (N,). Scores of
        defects have no place here: a test set cannot choose the threshold.
    quantile : float
        Between 0 and 1.
    """
    return float(np.quantile(normal_scores.numpy(), quantile, method="higher"))


@dataclass(frozen=True)
class Prediction:
    """What the model says of one image.

    Attributes
    ----------
    sample : Sample
        The image on disk.
    score : float
        Maximum of the anomaly map.
    anomalous : bool
        Whether the score is above the model's threshold.
    map : ndarray
        Anomaly map, (crop, crop) of float32: the central cut-out that the network saw.
    mask : ndarray
        Ground truth on the same pixels, bool; all False without a mask.
    """

    sample: Sample
    score: float
    anomalous: bool
    map: np.ndarray[tuple[int, int], np.dtype[np.float32]]
    mask: np.ndarray[tuple[int, int], np.dtype[np.bool_]]


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
            scores = model(batch["image"].to(device))
            maps = anomaly_map(scores, config.crop, config.smoothing).cpu()
            for index, map_, score, mask in zip(
                batch["index"].tolist(),
                maps.numpy(),
                image_score(maps).tolist(),
                batch["mask"].numpy(),
                strict=True,
            ):
                sample = dataset.samples[index]
                yield Prediction(sample, score, score > model.threshold, map_, mask)
                bar.update()


def evaluate(
    model: SimpleNet, dataset: AnomalyDataset, *, progress: bool = True
) -> tuple[dict[str, float], list[Prediction]]:
    """Predict a test split and compare with its labels and masks.

    Masks and maps are compared on the pixels the network saw.

    Returns
    -------
    metrics : dict of str to float
        ``image_auroc``, ``image_ap``, ``image_f1max``, and with masks also
        ``pixel_auroc``, ``pixel_ap`` and ``aupro``; all between 0 and 1.
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
    metrics = image_metrics(labels, np.array([p.score for p in predictions]))
    if dataset.has_masks:
        metrics |= pixel_metrics([p.mask for p in predictions], [p.map for p in predictions])
    return metrics, predictions
