"""Maps, scores and verdicts against SciPy and brute force; figures pixel by pixel."""

import math
import warnings
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

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

from simplenet_lib import localization, plots
from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.dataset import AnomalyDataset, ImageFiles, Sample, make_transform, own_part
from simplenet_lib.drift import describe
from simplenet_lib.localization import (
    Prediction,
    Region,
    anomaly_map,
    evaluate,
    image_score,
    predict,
    regions,
    rescale,
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


def bilinear(scores: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize (h, w) to ``size`` between pixel centres, edges repeated, by SciPy."""
    lines = [
        (np.arange(new) + 0.5) * old / new - 0.5
        for old, new in zip(scores.shape, size, strict=True)
    ]
    grid = np.meshgrid(*lines, indexing="ij")
    return ndimage.map_coordinates(scores, grid, order=1, mode="nearest")


@pytest.mark.parametrize(
    ("height", "width", "size"),
    [(8, 8, 64), (7, 9, 50), (8, 8, (64, 64)), (6, 10, (48, 80)), (9, 4, (70, 33))],
)
@pytest.mark.parametrize("smoothing", [0, 1, 4, 5])
def test_map_is_scipys_gaussian_of_a_bilinear_resize(height, width, size, smoothing):
    scores = np.random.default_rng(0).normal(size=(2, height, width)) + 0.5
    found = anomaly_map(torch.from_numpy(scores), size, smoothing)
    pixels = (size, size) if isinstance(size, int) else size
    assert found.shape == (2, *pixels)
    for one, map_ in zip(scores, found.numpy(), strict=True):
        expected = bilinear(one, pixels)
        if smoothing:
            expected = ndimage.gaussian_filter(
                expected, smoothing, mode="constant", cval=0, truncate=3
            )
        assert map_ == pytest.approx(expected, abs=1e-9)


def test_wide_smoothing_of_a_small_map_and_a_map_of_one_score():
    scores = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0))
    wide = anomaly_map(scores, 32, 100.0)
    # All of the map lies within a third of a deviation: its mean, as far as it fills the kernel.
    assert wide.isfinite().all() and wide.std() < 0.1 * scores.std()
    kernel = np.exp(-0.5 * (np.arange(-300, 301) / 100) ** 2)
    share = (kernel[300:332].sum() / kernel.sum()) ** 2  # what a corner sees
    assert wide[0, 0, 0].item() == pytest.approx(share * scores.mean().item(), rel=0.3)
    assert anomaly_map(torch.full((1, 1, 1), 2.5), 32, 0.0).unique().tolist() == [2.5]


@pytest.mark.parametrize("smoothing", [0.3, 4.0, 10.0])
def test_outside_of_a_constant_map_is_0(smoothing):
    maps = anomaly_map(torch.full((3, 8, 12), -7.25), (64, 96), smoothing)
    reach = math.ceil(3 * smoothing)
    inside = maps[:, reach : 64 - reach, reach : 96 - reach]
    torch.testing.assert_close(inside, torch.full_like(inside, -7.25))
    # At an edge half of the kernel lies outside, but for half of its middle; twice in a corner.
    offsets = range(-reach, reach + 1)
    middle = 1 / sum(math.exp(-0.5 * (offset / smoothing) ** 2) for offset in offsets)
    edge = (1 + middle) / 2
    assert maps[:, 0, 48].tolist() == pytest.approx([-7.25 * edge] * 3)
    assert maps[:, 32, 95].tolist() == pytest.approx([-7.25 * edge] * 3)
    assert maps[:, 63, 0].tolist() == pytest.approx([-7.25 * edge**2] * 3)


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 4.0, 50.0])
def test_a_map_of_0_stays_0_and_a_map_of_some_height_nowhere_exceeds_it(smoothing):
    assert not anomaly_map(torch.zeros(2, 8, 8), 64, smoothing).any()
    scores = torch.rand(2, 8, 8, generator=torch.Generator().manual_seed(0))
    maps = anomaly_map(scores, 64, smoothing)
    assert maps.min() >= 0 and maps.max() <= scores.max() + 1e-6


@settings(deadline=None, max_examples=40)
@given(
    st.floats(-3, 3),
    st.integers(0, 99),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([0.0, 0.7, 3.0]),
)
def test_map_is_linear_in_the_scores_and_turns_with_them(factor, seed, grid, smoothing):
    first, second = torch.randn(
        2, 1, *grid, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    size = (8 * grid[0], 8 * grid[1])

    def map_of(scores: torch.Tensor) -> torch.Tensor:
        return anomaly_map(scores, size, smoothing)

    expected = factor * map_of(first) + map_of(second)
    torch.testing.assert_close(map_of(factor * first + second), expected)
    torch.testing.assert_close(map_of(first.flip(1)), map_of(first).flip(1))
    turned = anomaly_map(first.transpose(1, 2), size[::-1], smoothing)
    torch.testing.assert_close(turned, map_of(first).transpose(1, 2))


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


@given(
    st.lists(st.integers(-50, 50), min_size=1, max_size=40, unique=True),
    st.integers(0, 10).map(lambda twentieths: Fraction(twentieths, 20)),
)
def test_threshold_keeps_its_promise(scores: list[int], share: Fraction) -> None:
    """Of n + 1 images in any order, count how often the last lies above the others' limit."""
    everyone = [*scores, 60]  # any other value
    above = sum(
        value > threshold(torch.tensor([v for v in everyone if v != value]).float(), float(share))
        for value in everyone
    )
    count = len(scores)
    assert Fraction(above, count + 1) <= max(share, Fraction(1, count + 1))
    assert Fraction(above + 1, count + 1) > share  # one more would be too many


def test_threshold_by_hand() -> None:
    scores = torch.tensor([3.0, 1.0, 2.0, 5.0, 4.0])
    found = [threshold(scores, share) for share in (0, 0.1, 1 / 6, 0.3, 1 / 3, 0.4, 0.5)]
    assert found == [5, 5, 5, 5, 4, 4, 3]
    assert threshold(torch.tensor([0.1]), 0.5) == torch.tensor(0.1).item()


# Whole images


@pytest.fixture(scope="module")
def weights() -> Weights:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = models.resnet18().state_dict()
    return Weights(state, "random", digest_of(state, "conv2"), "conv2")


def untrained(config: Config, weights: Weights) -> SimpleNet:
    net = SimpleNet(config, weights)
    net.threshold, net.typical = 0.25, -0.5
    return net


@pytest.fixture
def model(weights) -> SimpleNet:
    """A small committee that was never trained."""
    config = configuration(heads=2, layers=("layer2", "layer3"), standardise=True)
    return untrained(config, weights)


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
    Image.new("RGB", (64, 64)).save(tmp_path / "part" / "train" / "good" / "0.png")
    return tmp_path


def open_test(root: Path) -> AnomalyDataset:
    return AnomalyDataset(root, "part", "test", make_transform(64, 64))


def test_predictions_are_those_of_the_pieces_one_image_at_a_time(model, root):
    test = open_test(root)
    model.train()  # prediction must not depend on what came before
    model.centre.copy_(torch.tensor([0.1, -0.2]))
    model.spread.copy_(torch.tensor([0.5, 2.0]))
    predictions = list(predict(model, test, progress=False))
    assert [prediction.sample for prediction in predictions] == test.samples
    scores = sorted(prediction.score for prediction in predictions)
    cut = (scores[4] + scores[5]) / 2  # five images lie on either side
    model.threshold = model.typical + cut * (model.threshold - model.typical)
    predictions = list(predict(model, test, progress=False))
    model.eval()
    for item, prediction in zip(test, predictions, strict=True):
        with torch.no_grad():
            map_ = anomaly_map(model(item["image"][None]), 64, 4.0)[0].numpy()
        expected = (map_ - model.typical) / (model.threshold - model.typical)
        assert (prediction.map.shape, prediction.map.dtype) == ((64, 64), np.float32)
        assert prediction.map == pytest.approx(expected, abs=1e-4)
        assert prediction.score == prediction.map.max()
        assert prediction.map is not prediction.map  # of thousands none is kept
        assert prediction.anomalous == (prediction.score > 1) == (map_.max() > model.threshold)
        assert np.array_equal(prediction.mask, item["mask"].numpy())
    assert sum(prediction.anomalous for prediction in predictions) == 5


def test_predictions_tell_what_looks_unlike_the_training_photos(model, root):
    test = open_test(root)
    normal = [index for index, sample in enumerate(test.samples) if not sample.label]
    image = test.samples[normal[2]].image
    descriptions = []
    model.eval()
    with torch.no_grad():
        for item in test:
            images = item["image"][None]
            descriptions.append(describe(images, model.features.outputs(images)[0]))
    model.drift.fit(torch.cat([descriptions[index] for index in normal]))
    pixels = np.asarray(Image.open(image))
    Image.fromarray(255 - pixels // 4).save(image)
    predictions = list(predict(model, test, progress=False))
    found = [predictions[index].unfamiliar for index in normal]
    assert "lighter" in found.pop(2) and found == [[]] * 4
    # Image by image it is what the drift says, whatever batch the image is in.
    for item, prediction in zip(test, predictions, strict=True):
        with torch.no_grad():
            images = item["image"][None]
            alone = model.drift(describe(images, model.features.outputs(images)[0]))
        assert [prediction.unfamiliar] == alone


def test_predictions_of_a_rectangle_have_its_shape(root, weights):
    config = configuration(ratio=0.5, resize=96, crop=80)
    assert (config.size, config.seen) == ((64, 128), (64, 112))
    model = untrained(config, weights).eval()
    test = AnomalyDataset(root, "part", "test", make_transform(config.size, config.seen))
    predictions = list(predict(model, test, progress=False))
    for item, prediction in zip(test, predictions, strict=True):
        # The photos are squares: beside each is its mirror image, which is not judged.
        assert prediction.map.shape == prediction.mask.shape == (64, 64)
        assert np.array_equal(prediction.mask, item["mask"].numpy()[:, 24:88])
        with torch.no_grad():
            map_ = anomaly_map(model(item["image"][None]), (64, 112), 4.0)[0, :, 24:88]
        assert prediction.map == pytest.approx(model.in_units(map_).numpy(), abs=1e-4)
        assert prediction.score == prediction.map.max()


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
@pytest.mark.parametrize("ratio", [0, 0.4, 2])
@pytest.mark.parametrize(("resize", "crop"), [(329, 288), (64, 64), (80, 64), (100, 33)])
def test_seen_box_is_what_the_transform_cuts_out(size, resize, crop, ratio):
    width, height = size
    config = configuration(resize=resize, crop=crop, ratio=ratio)
    left, top, right, bottom = plots.seen_box(width, height, config)
    # The transform itself, on an image whose pixels are the numbers of their rows or columns.
    rows, columns = torch.meshgrid(*map(torch.arange, config.size), indexing="ij")
    seen = make_transform(config.size, config.seen).transforms[1](torch.stack([columns, rows]))
    first, last = seen[:, 0, 0].numpy(), (seen[:, -1, -1] + 1).numpy()
    whole = np.array([config.size[1], config.size[0]])
    scales = np.divide(size, whole)  # pixels of the image in one of the network's
    taken = whole
    if max(scales) > 1.1 * min(scales):  # another shape: one scale for both sides
        taken = np.maximum(1, np.round(np.divide(size, max(scales)))).astype(int)
        scales = np.divide(size, taken)
    before = (whole - taken) // 2
    exact = np.concatenate([(first - before) * scales, (last - before) * scales])
    exact = exact.clip(0, [*size, *size])
    assert (left, top, right, bottom) == pytest.approx(exact, abs=1)
    assert 0 <= left < right <= width and 0 <= top < bottom <= height
    rows, columns = own_part(width, height, config)
    starts, ends = (np.clip(at, first, last) - first for at in (before, before + taken))
    assert (columns.start, rows.start) == tuple(starts)
    assert (columns.stop, rows.stop) == tuple(ends)
    if resize == crop:
        assert (left, top, right, bottom) == (0, 0, width, height)


def test_published_crop_by_hand():
    config = configuration(resize=329, crop=288)
    # torchvision cuts rows 20 to 307 out of 329.
    assert plots.seen_box(329, 329, config) == (20, 20, 308, 308)
    assert plots.seen_box(658, 658, config) == (40, 40, 616, 616)
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
    for level in (0.0, -4.0):  # typical, and more normal than that
        map_ = np.full((64, 64), level, dtype=np.float32)
        result = plots.overlay(image, map_, configuration())
        assert (result.mode, result.size) == ("RGB", size)
        check_same(result, before, np.ones(size[::-1], dtype=bool))

        config = configuration(resize=80, crop=64)
        left, top, right, bottom = plots.seen_box(*size, config)
        framed = plots.overlay(image, map_, config)
        frame = np.zeros(size[::-1], dtype=bool)
        frame[max(top - 1, 0) : bottom + 1, max(left - 1, 0) : right + 1] = True
        frame[top:bottom, left:right] = False
        check_same(framed, before, ~frame)
        assert (np.asarray(framed)[frame] == 255).all()
    assert image == before  # the image itself is not drawn on


def test_colour_and_line_stand_where_the_map_says():
    image = Image.new("RGB", (320, 320), (0, 90, 0))
    map_ = np.zeros((64, 64), dtype=np.float32)
    map_[:, :32] = 0.5  # half way to the threshold
    map_[16:32, 8:24] = 3.0  # above it
    result = np.asarray(plots.overlay(image, map_, configuration())).astype(int)
    assert (result[:, 170:] == (0, 90, 0)).all()
    faint, strong = result[300, 60], result[120, 80]
    assert 0 < abs(faint - (0, 90, 0)).sum() < abs(strong - (0, 90, 0)).sum()
    # From 2 on the colour is the last one, and covers 200 of 255 parts; at 0.5 a quarter of both.
    for colour, at in ((strong, 1.0), (faint, 0.25)):
        inferno = 255 * np.array(matplotlib.colormaps["inferno"](at)[:3])
        cover = int(200 * at) / 255
        assert colour == pytest.approx(cover * inferno + (1 - cover) * np.array([0, 90, 0]), abs=1)

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
    image = Image.new("RGB", (658, 658), "black")
    map_ = np.zeros((288, 288), dtype=np.float32)
    map_[100:200, 50:150] = 10.0
    config = configuration(resize=329, crop=288)
    result = np.asarray(plots.overlay(image, map_, config)).astype(int)
    left, top, right, bottom = plots.seen_box(658, 658, config)
    rows, columns = np.nonzero(result[top:bottom, left:right].sum(axis=2) > 100)
    found = (rows.min() + top, rows.max() + 1 + top, columns.min() + left, columns.max() + 1 + left)
    assert found == pytest.approx((240, 440, 140, 340), abs=3)  # 2 * (20 + 100), ...


def test_nothing_beside_a_photo_of_another_shape_is_judged(model, monkeypatch):
    """Its mirror image is seen, but score, map and regions are those of the photo."""
    wanted = torch.full((1, 64, 64), -1.0)
    wanted[0, 20:44, 32:48] = 10.0  # a photo of 400 x 100 is rows 24 to 39
    wanted[0, :8, :8] = 90.0  # this lies beside it
    monkeypatch.setattr(localization, "scaled_maps", lambda *_: wanted)
    model.typical, model.threshold = 0.0, 1.0
    result = model.predict(Image.new("RGB", (400, 100)))
    assert (result.score, result.seen.shape, result.map.shape) == (10.0, (16, 64), (100, 400))
    high = result.map > 5
    rows, columns = np.flatnonzero(high.any(axis=1)), np.flatnonzero(high.any(axis=0))
    assert (rows[0], rows[-1]) == (0, 99)
    assert (columns[0], columns[-1] + 1) == pytest.approx((200, 300), abs=4)
    assert result.regions == [Region(200, 0, 100, 100, 100 * 100, 10.0)]
    drawn = np.asarray(result.overlay()).sum(axis=2) > 100
    assert drawn[50, 210:290].all() and not drawn[:, :190].any() and not drawn[:, 310:].any()


def test_a_rectangular_map_lies_on_its_image():
    config = configuration(ratio=0.5, resize=96, crop=80)  # seen are 64 x 112 of 64 x 128
    assert plots.seen_box(512, 256, config) == (32, 0, 480, 256)
    map_ = np.zeros((64, 112), dtype=np.float32)
    map_[16:32, 80:100] = 10.0
    result = np.asarray(plots.overlay(Image.new("RGB", (512, 256)), map_, config)).astype(int)
    rows, columns = np.nonzero(result[2:-2, 34:478].sum(axis=2) > 100)
    found = (rows.min() + 2, rows.max() + 3, columns.min() + 34, columns.max() + 35)
    assert found == pytest.approx((64, 128, 32 + 320, 32 + 400), abs=4)


def test_region_at_the_border_is_outlined_there_and_the_threshold_itself_is_not():
    image = Image.new("RGB", (64, 64), "black")
    expected = np.ones((64, 64), dtype=bool)
    expected[1:-1, 1:-1] = False
    for level, outlined in ((5.0, expected), (1.001, expected), (1.0, np.zeros_like(expected))):
        everywhere = np.full((64, 64), level, dtype=np.float32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            result = np.asarray(plots.overlay(image, everywhere, configuration()))
        assert np.array_equal((result == 255).all(axis=2), outlined)
        assert (result[32, 32] > 0).any()


@pytest.mark.parametrize("resize", [64, 80])
def test_gallery_draws_every_verdict_without_a_warning(tmp_path, resize):
    plt.switch_backend("Agg")
    plt.close("all")  # what other tests left open
    config = configuration(resize=resize)
    cases = []
    empty, one, full = (np.zeros((64, 64), dtype=bool) for _ in range(3))
    one[30, 30], full[:] = True, True
    masks = {"good": empty, "small_hole": one, "all": full, "un$ure 50 %": empty}
    for index, (defect, mask) in enumerate(masks.items()):
        path = tmp_path / f"{index}.png"
        Image.new("L" if index else "RGB", (90, 70), 100).save(path)
        map_ = np.linspace(-1, 3, 64 * 64, dtype=np.float32).reshape(64, 64)
        cases.append(
            Prediction(
                Sample(path, defect), 3.0, index > 1, lambda map_=map_: map_, mask, ["darker"]
            )
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for count in (1, 4):
            figure = plots.gallery(cases[:count], config)
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


# Regions


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 999), st.tuples(st.integers(1, 12), st.integers(1, 12)), st.floats(0, 2))
def test_regions_are_the_parts_above_the_threshold(seed, shape, limit):
    map_ = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    scale = 3
    box = (5, 7, 5 + scale * shape[1], 7 + scale * shape[0])
    found = regions(map_, box, limit)
    above = map_ > np.float32(limit)
    assert sum(region.area for region in found) == scale**2 * above.sum()
    assert bool(found) == bool(map_.max() > limit)
    if found:
        assert found[0].peak == map_.max()
    marked = np.zeros_like(above)
    for region in found:
        x, y = (region.x - 5) // scale, (region.y - 7) // scale
        part = np.s_[y : y + region.height // scale, x : x + region.width // scale]
        assert region.peak in map_[part]
        # The box is tight: some pixel above the limit lies on each of its sides.
        inside = above[part]
        assert inside[0].any() and inside[-1].any()
        assert inside[:, 0].any() and inside[:, -1].any()
        marked[part] = True
    assert not (above & ~marked).any()


def test_regions_touch_by_their_corners():
    map_ = np.zeros((6, 6), dtype=np.float32)
    map_[1, 1], map_[2, 2], map_[4, 5] = 2, 3, 5
    assert regions(map_, (0, 0, 60, 30)) == [
        Region(x=50, y=20, width=10, height=5, area=50, peak=5.0),
        Region(x=10, y=5, width=20, height=10, area=100, peak=3.0),
    ]


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=30), st.sampled_from([0.0, 0.1]))
def test_a_new_scale_has_the_typical_photo_at_0_and_the_threshold_at_1(scores, share):
    model = SimpleNamespace(typical=3.0, threshold=7.0)
    values = np.array(scores) / 10
    limit = threshold(torch.from_numpy(values), share)
    if limit <= np.median(values) + 1e-9:
        with pytest.raises(SimpleNetError, match="do not differ"):
            rescale(model, [values[0], values[0]], share)
        return
    rescale(model, values.tolist(), share)
    raw = 3 + 4 * values
    new = (raw - model.typical) / (model.threshold - model.typical)
    assert np.median(new) == pytest.approx(0, abs=1e-9)
    assert (limit - np.median(values)) / (limit - np.median(values)) == 1
    assert new[values == limit] == pytest.approx(1)
    with pytest.raises(SimpleNetError, match="at least 2"):
        rescale(model, [1.0], share)
