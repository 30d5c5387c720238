"""Maps, scores and verdicts against SciPy and brute force; figures pixel by pixel."""

import math
import warnings
from fractions import Fraction
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score
from torchvision import models

from simplenet_lib import plots
from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.dataset import AnomalyDataset, ImageFiles, Sample, make_transform
from simplenet_lib.localization import (
    Prediction,
    anomaly_map,
    background,
    evaluate,
    image_score,
    predict,
    threshold,
)
from simplenet_lib.model import SimpleNet
from simplenet_lib.weights import Weights, digest_of


def configuration(**changes: object) -> Config:
    values = {
        "preset": "test",
        "backbone": "resnet18",
        "layers": ("layer2",),
        "resize": 64,
        "crop": 64,
        "neighbourhood": 1,
        "standardise": False,
        "adaptor_channels": 8,
        "hidden_channels": 8,
        "batchnorm": False,
        "sigma": 0.1,
        "steps": 1,
        "batch_size": 2,
        "smoothing": 4.0,
    }
    return Config(**{**values, **changes})


# From a score map to a verdict


def bilinear(scores: np.ndarray, size: int) -> np.ndarray:
    """Resize (h, w) to (size, size) between pixel centres, edges repeated, by SciPy."""
    height, width = scores.shape
    rows = (np.arange(size) + 0.5) * height / size - 0.5
    columns = (np.arange(size) + 0.5) * width / size - 0.5
    grid = np.meshgrid(rows, columns, indexing="ij")
    return ndimage.map_coordinates(scores, grid, order=1, mode="nearest")


@pytest.mark.parametrize(("height", "width", "size"), [(8, 8, 64), (7, 9, 50)])
@pytest.mark.parametrize("smoothing", [0, 1, 4, 5])
def test_map_is_scipys_gaussian_of_a_bilinear_resize(height, width, size, smoothing):
    scores = np.random.default_rng(0).normal(size=(2, height, width))
    found = anomaly_map(torch.from_numpy(scores), size, smoothing)
    assert found.shape == (2, size, size)
    for one, map_ in zip(scores, found.numpy(), strict=True):
        expected = bilinear(one, size)
        if smoothing:
            typical = np.sort(expected, axis=None)[(expected.size - 1) // 2]
            expected = ndimage.gaussian_filter(
                expected, smoothing, mode="constant", cval=typical, truncate=3
            )
        assert map_ == pytest.approx(expected, abs=1e-9)


def test_wide_smoothing_of_a_small_map_and_a_map_of_one_score():
    scores = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = anomaly_map(scores, 32, 100.0)
    assert wide.isfinite().all() and wide.std() < 0.1 * scores.std()
    assert anomaly_map(torch.full((1, 1, 1), 2.5), 32, 4.0).unique().numpy() == pytest.approx(2.5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 4.0, 50.0])
def test_constant_map_stays_constant_up_to_the_border(smoothing):
    maps = anomaly_map(torch.full((3, 8, 8), -7.25), 64, smoothing)
    torch.testing.assert_close(maps, torch.full((3, 64, 64), -7.25))


def test_chance_does_not_prefer_the_border():
    noise = torch.randn(300, 32, 32, generator=torch.Generator().manual_seed(0))
    highest = anomaly_map(noise, 256, 5.0).flatten(1).argmax(dim=1)
    rows, columns = highest // 256, highest % 256
    near = torch.stack([rows, columns, 255 - rows, 255 - columns]).amin(dim=0) < 16
    # 23% of the pixels lie there. A map that is mirrored at its border has 70% of its maxima there.
    assert near.float().mean() < 0.3


@pytest.mark.parametrize("position", [(0, 0), (3, 5), (7, 0), (7, 7)])
def test_peak_stays_where_it_was(position):
    scores = torch.zeros(1, 8, 8)
    scores[0, position[0], position[1]] = 1
    maps = anomaly_map(scores, 64, 2.0)
    row, column = divmod(int(maps.argmax()), 64)
    assert (row // 8, column // 8) == position
    centre = maps[0, position[0] * 8 : position[0] * 8 + 8, position[1] * 8 : position[1] * 8 + 8]
    assert centre.mean() > 3 * maps.mean()


def test_images_of_a_batch_do_not_touch_each_other():
    scores = torch.zeros(3, 8, 8)
    scores[1, 4, 4] = 5
    maps = anomaly_map(scores, 64, 4.0)
    assert maps[0].abs().max() == maps[2].abs().max() == 0 < maps[1].max()


def test_image_score_is_the_largest_value():
    maps = torch.randn(4, 5, 6)
    assert image_score(maps).tolist() == [max(map_.flatten().tolist()) for map_ in maps]


@settings(deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=40),
    st.integers(0, 20).map(lambda twentieths: Fraction(twentieths, 20)),
)
def test_threshold_is_an_order_statistic(scores, quantile):
    limit = threshold(torch.tensor(scores), float(quantile))
    ordered = sorted(scores)
    exact = quantile * (len(scores) - 1)
    # With an exact quantile of 6.0 the rounding of 0.3 * 20 may choose the next score.
    ranks = {math.ceil(exact), min(math.ceil(exact) + (exact.denominator == 1), len(scores) - 1)}
    assert limit in {ordered[rank] for rank in ranks}
    assert sum(score <= limit for score in scores) >= quantile * len(scores)


def test_threshold_by_hand():
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    found = [threshold(scores, quantile) for quantile in (0, 0.2, 0.25, 0.5, 0.51, 0.9, 1)]
    assert found == [1, 2, 2, 3, 4, 5, 5]
    assert threshold(torch.tensor([0.1]), 0.5) == torch.tensor(0.1).item()


# Whole images


@pytest.fixture(scope="module")
def model() -> SimpleNet:
    """A small network that was never trained, and a threshold that divides its scores."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = models.resnet18().state_dict()
    net = SimpleNet(configuration(), Weights(state, "random", digest_of(state, "conv2"), "conv2"))
    net.threshold, net.typical = 0.0, -1.0
    return net


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Five normal and five defect images of noise; the defects are bright squares."""
    random = np.random.default_rng(0)
    for index in range(10):
        pixels = random.integers(0, 80, (64, 64, 3), dtype=np.uint8)
        mask = np.zeros((64, 64), dtype=np.uint8)
        if index % 2:
            mask[8 : 24 + index, 16:40] = 255
            pixels[mask > 0] = 255
        defect = "white square" if index % 2 else "good"
        image = tmp_path / "part" / "test" / defect / f"{index}.png"
        truth = tmp_path / "part" / "ground_truth" / defect / f"{index}_mask.png"
        for path, array in ((image, pixels), (truth, mask)):
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(path)
    (tmp_path / "part" / "train" / "good").mkdir(parents=True)
    return tmp_path


def open_test(root: Path) -> AnomalyDataset:
    return AnomalyDataset(root, "part", "test", make_transform(64, 64))


def test_predictions_are_those_of_the_pieces_one_image_at_a_time(model, root):
    test = open_test(root)
    model.train()  # prediction must not depend on what came before
    predictions = list(predict(model, test, progress=False))
    assert [prediction.sample for prediction in predictions] == test.samples
    model.threshold = float(np.median([prediction.score for prediction in predictions]))
    predictions = list(predict(model, test, progress=False))
    model.eval()
    for item, prediction in zip(test, predictions, strict=True):
        with torch.no_grad():
            map_ = anomaly_map(model(item["image"][None]), 64, 4.0)[0].numpy()
        assert (prediction.map.shape, prediction.map.dtype) == ((64, 64), np.float32)
        assert prediction.map == pytest.approx(map_, abs=1e-5)
        assert prediction.score == prediction.map.max()
        assert prediction.anomalous == (prediction.score > model.threshold)
        assert np.array_equal(prediction.mask, item["mask"].numpy())
    assert 0 < sum(prediction.anomalous for prediction in predictions) < 10


def test_prediction_is_lazy_and_needs_no_gradients(model, root):
    first = next(iter(predict(model, open_test(root), progress=False)))
    assert isinstance(first, Prediction) and not torch.is_inference_mode_enabled()
    assert list(predict(model, ImageFiles([], make_transform(64, 64)), progress=False)) == []


def test_evaluation_has_the_documented_numbers(model, root):
    metrics, predictions = evaluate(model, open_test(root), progress=False)
    image = ["image_auroc", "image_ap", "image_f1max"]
    assert list(metrics) == [*image, "pixel_auroc", "pixel_ap", "aupro"]
    assert all(0 <= value <= 1 for value in metrics.values())
    labels = [prediction.sample.label for prediction in predictions]
    assert sum(labels) == 5
    expected = roc_auc_score(labels, [prediction.score for prediction in predictions])
    assert metrics["image_auroc"] == pytest.approx(expected)
    marked = np.concatenate([prediction.mask.ravel() for prediction in predictions])
    scores = np.concatenate([prediction.map.ravel() for prediction in predictions])
    assert metrics["pixel_auroc"] == pytest.approx(roc_auc_score(marked, scores))

    for path in (root / "part" / "ground_truth").rglob("*.png"):
        path.unlink()
    without, predictions = evaluate(model, open_test(root), progress=False)
    assert without == {name: metrics[name] for name in image}
    assert not any(prediction.mask.any() for prediction in predictions)


@pytest.mark.parametrize(
    ("removed", "message"), [("good", "no normal images"), ("white square", "no images with")]
)
def test_evaluation_needs_both_classes(model, root, removed, message):
    for path in (root / "part").rglob(f"{removed}/*.png"):
        path.unlink()
    with pytest.raises(SimpleNetError, match=message):
        evaluate(model, open_test(root), progress=False)


# Figures


@pytest.mark.parametrize("size", [(329, 329), (900, 900), (450, 1200), (64, 48), (9, 9), (1, 1)])
@pytest.mark.parametrize(("resize", "crop"), [(329, 288), (64, 64), (80, 64), (100, 33)])
def test_seen_box_is_what_the_transform_cuts_out(size, resize, crop):
    width, height = size
    config = configuration(resize=resize, crop=crop)
    left, top, right, bottom = plots.seen_box(width, height, config)
    exact = [round((resize - crop) / 2) / resize * side for side in size]
    exact += [(round((resize - crop) / 2) + crop) / resize * side for side in size]
    assert (left, top, right, bottom) == pytest.approx(exact, abs=0.5)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    if resize == crop:
        assert (left, top, right, bottom) == (0, 0, width, height)


def test_published_crop_by_hand():
    config = configuration(resize=329, crop=288)
    # torchvision cuts rows 20 to 307 out of 329.
    assert plots.seen_box(329, 658, config) == (20, 40, 308, 616)
    pixels = torch.arange(329.0).repeat(3, 329, 1)
    seen = make_transform(329, 288).transforms[1](pixels)
    assert (seen[0, 0, 0], seen[0, 0, -1]) == (20, 307)


def check_same(result: Image.Image, image: Image.Image, where: np.ndarray) -> None:
    assert np.array_equal(np.asarray(result)[where], np.asarray(image)[where])


@pytest.mark.parametrize("size", [(64, 64), (301, 207), (1200, 33)])
def test_typical_map_leaves_the_image_alone(size):
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    before = image.copy()
    for level in (-1.0, -5.0):  # typical, and more normal than that
        map_ = np.full((64, 64), level, dtype=np.float32)
        result = plots.overlay(image, map_, configuration(), typical=-1.0, threshold=2.0)
        assert (result.mode, result.size) == ("RGB", size)
        check_same(result, before, np.ones(size[::-1], dtype=bool))

        config = configuration(resize=80, crop=64)
        left, top, right, bottom = plots.seen_box(*size, config)
        framed = plots.overlay(image, map_, config, typical=-1.0, threshold=2.0)
        frame = np.zeros(size[::-1], dtype=bool)
        frame[top - 1 : bottom + 1, left - 1 : right + 1] = True
        frame[top:bottom, left:right] = False
        check_same(framed, before, ~frame)
        assert (np.asarray(framed)[frame] == 255).all()
    assert image == before  # the image itself is not drawn on


def test_colour_and_line_stand_where_the_map_says():
    image = Image.new("RGB", (320, 320), (0, 90, 0))
    map_ = np.zeros((64, 64), dtype=np.float32)
    map_[:, :32] = 0.5  # half way to the threshold
    map_[16:32, 8:24] = 3.0  # above it
    result = np.asarray(plots.overlay(image, map_, configuration(), 0.0, 1.0)).astype(int)
    assert (result[:, 170:] == (0, 90, 0)).all()
    faint, strong = result[300, 60], result[120, 80]
    assert 0 < abs(faint - (0, 90, 0)).sum() < abs(strong - (0, 90, 0)).sum()
    inferno = 255 * np.array(matplotlib.colormaps["inferno"](1.0)[:3])
    assert strong == pytest.approx((200 * inferno + 55 * np.array([0, 90, 0])) / 255, abs=1)

    white = (result == 255).all(axis=2)
    rows, columns = np.flatnonzero(white.any(axis=1)), np.flatnonzero(white.any(axis=0))
    # The square is rows 80 to 160 and columns 40 to 120; its level is 1 within a map pixel of it.
    box = (rows[0], rows[-1] + 1, columns[0], columns[-1] + 1)
    assert box == pytest.approx((80, 160, 40, 120), abs=5)
    assert not white[box[0] + 6 : box[1] - 6, box[2] + 6 : box[3] - 6].any()  # a line, no area
    inside = np.zeros_like(white)
    inside[box[0] : box[1], box[2] : box[3]] = True
    assert white[inside & ~ndimage.binary_erosion(inside)].mean() > 0.9  # and closed


def test_the_map_lies_on_the_part_that_was_seen():
    image = Image.new("RGB", (658, 329), "black")
    map_ = np.zeros((288, 288), dtype=np.float32)
    map_[100:200, 50:150] = 10.0
    config = configuration(resize=329, crop=288)
    result = np.asarray(plots.overlay(image, map_, config, 0.0, 1.0)).astype(int)
    left, top, right, bottom = plots.seen_box(658, 329, config)
    rows, columns = np.nonzero(result[top:bottom, left:right].sum(axis=2) > 100)
    found = (rows.min() + top, rows.max() + 1 + top, columns.min() + left, columns.max() + 1 + left)
    assert found == pytest.approx((120, 220, 140, 340), abs=3)  # 20 + 100, ..., 2 * (20 + 50), ...


def test_region_at_the_border_is_outlined_there_and_equal_scores_do_not_divide_by_zero():
    image = Image.new("RGB", (64, 64), "black")
    everywhere = np.full((64, 64), 5, dtype=np.float32)
    white = (np.asarray(plots.overlay(image, everywhere, configuration(), 0, 1)) == 255).all(axis=2)
    expected = np.ones((64, 64), dtype=bool)
    expected[1:-1, 1:-1] = False
    assert np.array_equal(white, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flat = plots.overlay(image, np.ones((64, 64), np.float32), configuration(), 1.0, 1.0)
    check_same(flat, image, np.ones((64, 64), dtype=bool))


@pytest.mark.parametrize("resize", [64, 80])
def test_gallery_draws_every_verdict_without_a_warning(tmp_path, resize):
    plt.switch_backend("Agg")
    config = configuration(resize=resize)
    cases = []
    empty, one, full = (np.zeros((64, 64), dtype=bool) for _ in range(3))
    one[30, 30], full[:] = True, True
    masks = {"good": empty, "small_hole": one, "all": full, "un$ure 50 %": empty}
    for index, (defect, mask) in enumerate(masks.items()):
        path = tmp_path / f"{index}.png"
        Image.new("L" if index else "RGB", (90, 70), 100).save(path)
        map_ = np.linspace(-1, 3, 64 * 64, dtype=np.float32).reshape(64, 64)
        cases.append(Prediction(Sample(path, defect), 3.0, index > 1, map_, mask))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1, 4):
            figure = plots.gallery(cases[:count], config, 0.0, 1.0)
            figure.canvas.draw()
            axes = np.array(figure.axes).reshape(3, count)
            for column, prediction in zip(axes.T, cases[:count], strict=True):
                assert column[0].get_title() == prediction.sample.defect.replace("_", " ")
                label = column[2].get_xlabel()
                assert label.startswith("anomalous" if prediction.anomalous else "normal")
                wrong = prediction.anomalous != (prediction.sample.defect != "good")
                assert ("(wrong)" in label) == wrong
                assert len(column[1].collections) == prediction.mask.any()  # the marked defect
            plt.close(figure)
    assert plt.get_fignums() == []


def test_background_is_the_median_and_a_small_defect_does_not_move_it() -> None:
    maps = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 9, 9))).float()
    expected = np.median(maps.numpy().reshape(3, -1), axis=1)
    assert background(maps).tolist() == pytest.approx(expected.tolist())
    marked = maps.clone()
    marked[:, :2, :2] = marked.amax() + 1000
    assert (background(marked) - background(maps)).abs().max() < 0.5
    assert torch.allclose(background(maps + 2), background(maps) + 2)
