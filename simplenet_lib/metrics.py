"""Chapter 8: how well the scores separate normal images and pixels from defects."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import ndimage  # type: ignore[import-untyped, unused-ignore]
from sklearn.metrics import (  # type: ignore[import-untyped, unused-ignore]
    average_precision_score,
    precision_recall_curve,
    roc_auc_score,
)

from simplenet_lib.config import SimpleNetError

# A pixel touches all eight around it, as in the MVTec AD evaluation.
EIGHT_NEIGHBOURS = np.ones((3, 3), dtype=bool)
SAMPLE_PIXELS = 10_000_000  # at most, of all maps, that say where scores lie


def image_metrics(labels: ArrayLike, scores: ArrayLike) -> dict[str, float]:
    """Detection: do defective images score higher than normal ones?

    Parameters
    ----------
    labels : array_like of int, shape (N,)
        0 for a normal image, 1 for one with a defect.
    scores : array_like of float, shape (N,)
        Image scores, higher for more anomalous.

    Returns
    -------
    dict of str to float
        ``image_auroc``, area under the ROC curve; ``image_ap``, average precision;
        ``image_f1max``, the highest F1 score that any threshold reaches. All in 0..1.

    Raises
    ------
    SimpleNetError
        If the shapes differ, a label is not 0 or 1, a score is not finite, or
        only one class is present, for which none of the three is defined.

    Examples
    --------
    >>> image_metrics([0, 0, 1, 1], [0.1, 0.4, 0.3, 0.9])["image_auroc"]  # 3 of 4 pairs
    0.75
    """
    truth, values = np.asarray(labels), np.asarray(scores, dtype=np.float64)
    if truth.ndim != 1 or truth.shape != values.shape:
        raise SimpleNetError(
            f"image scores: {truth.shape} labels and {values.shape} scores; "
            "give one label and one score per image."
        )
    if not np.isin(truth, (0, 1)).all():
        raise SimpleNetError("image scores: labels must be 0 (normal) or 1 (defect).")
    _check_finite(values, "image scores")
    normal, defect = int(np.sum(truth == 0)), int(np.sum(truth == 1))
    if not normal or not defect:
        raise SimpleNetError(
            f"image scores: {normal} normal and {defect} defective images; "
            "a metric needs at least one of each."
        )
    precision, recall, _ = precision_recall_curve(truth, values)
    # Both are 0 where a threshold finds no defect; F1 is 0 there, not 0/0.
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(float).tiny)
    return {
        "image_auroc": float(roc_auc_score(truth, values)),
        "image_ap": float(average_precision_score(truth, values)),
        "image_f1max": float(f1.max()),
    }


def pixel_metrics(masks: Sequence[ArrayLike], maps: Sequence[ArrayLike]) -> dict[str, float]:
    """Localization: do defect pixels score higher than normal ones?

    Parameters
    ----------
    masks : sequence of array_like of bool, each (H, W)
        True on defect pixels; all False for a normal image. Sizes may differ.
    maps : sequence of array_like of float, each (H, W)
        Anomaly maps, each of the size of its mask.

    Returns
    -------
    dict of str to float
        ``pixel_auroc``, area under the ROC curve over all pixels; ``pixel_ap``, their
        average precision, Σ (R_n - R_{n-1}) P_n with recall R_n and precision P_n
        at the n-th highest score; ``aupro``, see :func:`aupro`. All in 0..1.

    Raises
    ------
    SimpleNetError
        If a map and its mask differ in size, a score is not finite, or there is
        no defect pixel or no normal pixel at all.

    Examples
    --------
    >>> mask = np.array([[0, 0, 1, 1]])
    >>> pixel_metrics([mask], [[[0.1, 0.4, 0.3, 0.9]]])["pixel_auroc"]
    0.75
    """
    curves = _threshold_curves(masks, maps)
    precision = curves.tp / (curves.tp + curves.fp)
    return {
        "pixel_auroc": _area(curves, curves.tp / curves.tp[-1], limit=1.0),
        "pixel_ap": float(np.sum(np.diff(curves.tp, prepend=0) * precision) / curves.tp[-1]),
        "aupro": _area(curves, curves.pro, limit=0.3),
    }


def aupro(masks: Sequence[ArrayLike], maps: Sequence[ArrayLike], limit: float = 0.3) -> float:
    """Area under the per-region-overlap curve, up to a false-positive rate.

    With the connected regions C_1..C_K of all masks (8-connectivity) and P_t the
    pixels that score at least t::

        PRO(t) = 1/K Σ_k |P_t ∩ C_k| / |C_k|,
        FPR(t) = |P_t ∩ normal pixels| / |normal pixels|,
        AUPRO  = 1/limit ∫ PRO d(FPR) from 0 to limit.

    A small region thus counts as much as a large one. Every distinct score is a
    threshold, the points are joined by straight lines starting at (0, 0), and the
    line that crosses the limit is cut there, as in the MVTec AD evaluation.

    Parameters
    ----------
    masks, maps : sequences of array_like, each (H, W)
        As in :func:`pixel_metrics`.
    limit : float
        False-positive rate at which the integration ends, above 0, at most 1.

    Returns
    -------
    float
        In 0..1; chance is about limit / 2.

    Raises
    ------
    SimpleNetError
        As :func:`pixel_metrics`, and if the limit is out of range.

    References
    ----------
    Bergmann, Batzner, Fauser, Sattlegger, Steger: The MVTec Anomaly Detection
    Dataset, International Journal of Computer Vision 129, 2021, section 5.

    Examples
    --------
    >>> mask = np.array([[0, 0, 1, 1]])
    >>> aupro([mask], [[[0.1, 0.2, 0.3, 0.9]]])
    1.0
    """
    if not 0 < limit <= 1:
        raise SimpleNetError(f"aupro: limit is {limit}; it must be above 0 and at most 1.")
    curves = _threshold_curves(masks, maps)
    return _area(curves, curves.pro, limit)


def auroc_deviation(auroc: float, normal: int, defect: int) -> float:
    """Standard deviation of an AUROC over other test images of the same kind.

    Parameters
    ----------
    auroc : float
        Measured, 0..1.
    normal, defect : int
        How many test images of each kind it was measured on.

    References
    ----------
    Hanley, McNeil: The meaning and use of the area under a receiver operating
    characteristic (ROC) curve, Radiology 143, 1982, equation 1.

    Examples
    --------
    >>> round(auroc_deviation(0.95, normal=20, defect=40), 3)
    0.027
    """
    one = auroc / (2 - auroc)  # a normal image below two defects
    two = 2 * auroc**2 / (1 + auroc)  # a defect above two normal images
    variance = auroc * (1 - auroc) + (defect - 1) * (one - auroc**2)
    variance += (normal - 1) * (two - auroc**2)
    return float(np.sqrt(max(variance, 0.0) / (normal * defect)))


def pixel_deviations(
    masks: Sequence[ArrayLike], maps: Sequence[ArrayLike], rounds: int = 200, seed: int = 0
) -> dict[str, float]:
    """Standard deviation of pixel AUROC and AUPRO over other test images: a bootstrap.

    Whole images are drawn with replacement, those with a defect apart from those
    without. Scores are sorted into 2,000 equally filled bins, which moves a metric
    by less than a thousandth.

    Parameters
    ----------
    masks, maps : sequences of array_like, each (H, W)
        As in :func:`pixel_metrics`.
    rounds : int
        How many times the images are drawn.
    seed : int
        Seed of the draws.

    Returns
    -------
    dict of str to float
        ``pixel_auroc`` and ``aupro``.

    Examples
    --------
    >>> random = np.random.default_rng(0)
    >>> masks = [random.random((8, 8)) > 0.8 for _ in range(6)]
    >>> maps = [mask + random.normal(size=mask.shape) for mask in masks]
    >>> deviations = pixel_deviations(masks, maps)
    >>> 0 < deviations["pixel_auroc"] < 0.2
    True
    """
    step = max(7, math.ceil(sum(map(np.size, masks)) / SAMPLE_PIXELS))
    sample = np.concatenate([np.asarray(map_).ravel()[::step].astype(float) for map_ in maps])
    edges = np.unique(np.quantile(sample, np.linspace(0, 1, 2001)[1:-1]))
    bins = len(edges) + 1
    normal, defect, share = (np.zeros((len(maps), bins)) for _ in range(3))
    regions = np.zeros(len(maps))
    for index, (mask_like, map_) in enumerate(zip(masks, maps, strict=True)):
        mask, values = np.asarray(mask_like, dtype=bool), np.asarray(map_, dtype=np.float64)
        place = np.searchsorted(edges, values, side="right")
        normal[index] = np.bincount(place[~mask], minlength=bins)
        if mask.any():
            labelled, count = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
            region = labelled[mask] - 1
            weights = (1 / np.bincount(region))[region]
            defect[index] = np.bincount(place[mask], minlength=bins)
            share[index] = np.bincount(place[mask], weights, minlength=bins)
            regions[index] = count
    generator = np.random.default_rng(seed)
    drawn = np.zeros((rounds, len(maps)))
    for kind in (regions > 0, regions == 0):
        if kind.any():
            size = int(kind.sum())
            drawn[:, kind] = generator.multinomial(size, np.full(size, 1 / size), size=rounds)

    def curve(histogram: NDArray[np.float64]) -> NDArray[np.float64]:
        """Share of what scores at least as high as each bin, highest first, from 0 to 1."""
        total = np.cumsum((drawn @ histogram)[:, ::-1], axis=1)
        return np.pad(total / total[:, -1:], ((0, 0), (1, 0)))

    fpr, tpr, pro = curve(normal), curve(defect), curve(share)
    limited = np.linspace(0, 0.3, 301)
    auroc = [np.trapezoid(y, x) for x, y in zip(fpr, tpr, strict=True)]
    aupro = [np.interp(limited, x, y).mean() for x, y in zip(fpr, pro, strict=True)]
    return {"pixel_auroc": float(np.std(auroc, ddof=1)), "aupro": float(np.std(aupro, ddof=1))}


@dataclass(frozen=True)
class _Curves:
    """What is found at each of the T distinct scores of defect pixels, highest first.

    ``above`` and ``fp`` (T,): normal pixels that score higher, and at least as high.
    ``tp`` (T,): defect pixels that score at least as high. ``pro`` (T,): PRO(t).
    """

    normal_pixels: int
    above: NDArray[np.int64]
    fp: NDArray[np.int64]
    tp: NDArray[np.int64]
    pro: NDArray[np.float64]


def _threshold_curves(masks: Sequence[ArrayLike], maps: Sequence[ArrayLike]) -> _Curves:
    """Sort once for all three pixel metrics.

    Between two scores of defect pixels only false positives are added: all curves
    run level there. So the normal scores need sorting but no labels, and only the
    few defect pixels carry one (their share of their region).
    """
    if len(masks) != len(maps):
        raise SimpleNetError(f"pixel scores: {len(masks)} masks and {len(maps)} maps.")
    defect_parts, share_parts, normal_pixels = [], [], 0
    for index, (mask_like, map_like) in enumerate(zip(masks, maps, strict=True)):
        mask, scores = np.asarray(mask_like, dtype=bool), np.asarray(map_like)
        if mask.ndim != 2 or mask.shape != scores.shape:
            raise SimpleNetError(
                f"image {index}: its map has shape {scores.shape}, its mask {mask.shape}; "
                "both must be (height, width) and equal."
            )
        _check_finite(scores, f"image {index}")
        normal_pixels += int(mask.size - mask.sum())
        if mask.any():
            labelled, _ = ndimage.label(mask, structure=EIGHT_NEIGHBOURS)
            region = labelled[mask] - 1
            defect_parts.append(_as_float(scores[mask]))
            share_parts.append((1 / np.bincount(region))[region])
    if not defect_parts or not normal_pixels:
        missing = "normal" if defect_parts else "defect"
        raise SimpleNetError(
            f"pixel scores: no {missing} pixel in {len(masks)} masks; "
            "a metric needs defect pixels and normal ones."
        )

    defect, share = np.concatenate(defect_parts), np.concatenate(share_parts)
    del defect_parts, share_parts
    order = np.argsort(defect)[::-1]
    defect, share = defect[order], share[order]
    del order
    # Pixels of one score enter together: keep the last of each run of equal scores.
    last = np.flatnonzero(np.append(defect[1:] != defect[:-1], True))
    thresholds = np.ascontiguousarray(defect[last][::-1])
    overlap = np.cumsum(share, out=share)[last]
    # Normal pixels by how many thresholds they exceed, and reach: image by image, for all of
    # them together would take up as much memory as all maps.
    exceeding, reaching = np.zeros((2, len(thresholds) + 1), dtype=np.int64)
    for mask_like, map_like in zip(masks, maps, strict=True):
        normal = np.sort(_as_float(np.asarray(map_like)[~np.asarray(mask_like, dtype=bool)]))
        exceeded = np.searchsorted(thresholds, normal, side="left")
        reached = np.searchsorted(thresholds, normal, side="right")
        for counts, passed in ((exceeding, exceeded), (reaching, reached)):
            places, number = np.unique(passed, return_counts=True)
            counts[places] += number
    return _Curves(
        normal_pixels=normal_pixels,
        above=np.cumsum(exceeding[:0:-1]),
        fp=np.cumsum(reaching[:0:-1]),
        tp=last + 1,
        pro=overlap / overlap[-1],  # the last is the number of regions, up to rounding
    )


def _as_float(scores: NDArray[Any]) -> NDArray[Any]:
    return scores.astype(np.result_type(scores, np.float32), copy=False)


def _area(curves: _Curves, y: NDArray[np.float64], limit: float) -> float:
    """Mean height, for FPR from 0 to ``limit``, of the curve that reaches y (T,) at each score.

    Taken by rows: a rise of the curve counts for every normal pixel still to come
    before the limit. A rise that shares its score with normal pixels slants over
    them: it counts by its share inside the limit, at the middle of that share.
    """
    budget = limit * curves.normal_pixels
    left = np.maximum(budget - curves.above, 0)
    right = np.maximum(budget - curves.fp, 0)
    tied = curves.fp - curves.above
    inside = np.divide(left - right, tied, out=np.ones_like(y), where=tied > 0)
    left += right
    return float(np.sum(np.diff(y, prepend=0) * inside * left) / (2 * budget))


def _check_finite(scores: NDArray[np.generic], where: str) -> None:
    """Refuse NaN and infinity: they have no place in an order of scores."""
    bad = scores.size - int(np.isfinite(scores).sum())
    if bad:
        raise SimpleNetError(
            f"{where}: {bad} of {scores.size} scores are NaN or infinite; "
            "check the model and the image that produced them."
        )
