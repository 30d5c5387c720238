"""Metrics against scikit-learn, brute force by the definition, and numbers worked by hand."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import ndimage
from sklearn.metrics import average_precision_score, roc_auc_score

from simplenet_lib.config import SimpleNetError
from simplenet_lib.metrics import (
    aupro,
    auroc_deviation,
    image_metrics,
    pixel_deviations,
    pixel_metrics,
)

# Two regions, (0,0)+(1,1) touching at a corner and (1,3) alone; five normal pixels.
MASK = np.array([[1, 0, 0, 0], [0, 1, 0, 1]], dtype=bool)
MAP = np.array([[9, 8, 1, 2], [3, 5, 5, 7]], dtype=np.float32)


def brute_force_aupro(masks, maps, limit):
    """The definition, one threshold and one region at a time."""
    regions = []
    for mask, scores in zip(masks, maps, strict=True):
        labelled, count = ndimage.label(mask, structure=[[1, 1, 1]] * 3)
        regions += [scores[labelled == number] for number in range(1, count + 1)]
    normal = np.concatenate([s[~m] for m, s in zip(masks, maps, strict=True)])
    points = [(0.0, 0.0)]
    for threshold in sorted({float(v) for s in maps for v in s.ravel()}, reverse=True):
        fpr = float(np.mean(normal >= threshold))
        points.append((fpr, float(np.mean([np.mean(r >= threshold) for r in regions]))))
    area = 0.0
    for (x0, y0), (x1, y1) in pairwise(points):
        if x0 < limit and x1 > x0:
            end = min(x1, limit)
            y_end = y0 + (y1 - y0) * (end - x0) / (x1 - x0)
            area += (end - x0) * (y0 + y_end) / 2
    return area / limit


def pooled(masks, maps):
    truth = np.concatenate([mask.ravel() for mask in masks])
    return truth, np.concatenate([scores.ravel() for scores in maps])


@st.composite
def scored_masks(draw):
    """One to four images of different sizes, scores with many ties or hardly any."""
    levels = draw(st.sampled_from([2, 5, 1000]))
    masks, maps = [], []
    for _ in range(draw(st.integers(1, 4))):
        shape = draw(st.tuples(st.integers(1, 7), st.integers(1, 7)))
        masks.append(draw(hnp.arrays(bool, shape)))
        integers = draw(hnp.arrays(np.int64, shape, elements=st.integers(-levels, levels)))
        maps.append((integers / 8).astype(np.float32))
    truth = pooled(masks, maps)[0]
    if truth.all() or not truth.any():
        masks.append(np.array([[True, False]]))
        maps.append(np.array([[0.25, -0.0]], dtype=np.float32))
    return masks, maps


def test_pixel_metrics_by_hand():
    # score  enters              FPR   PRO
    #   9    half of region 1    0     1/4
    #   8    normal              1/5   1/4
    #   7    region 2            1/5   3/4
    #   5    normal + the rest   2/5   1      a tie: one slanted line
    # At the limit 3/10, halfway up that line, PRO is 7/8:
    # (2/10 * 1/4 + 1/10 * (3/4 + 7/8) / 2) / (3/10) = 7/16.
    # AUROC: 9 beats 5 normal pixels, 7 beats 4, 5 beats 3 and ties one: 12.5 of 15 pairs.
    # AP: precision 1/1, 2/3 and 3/5 where the three defect pixels are found.
    result = pixel_metrics([MASK], [MAP])
    assert result == pytest.approx(
        {"aupro": 7 / 16, "pixel_auroc": 12.5 / 15, "pixel_ap": (1 + 2 / 3 + 3 / 5) / 3}
    )
    # Up to 1/5 the height is 1/4, whatever happens at 1/5 itself; up to 1 the line ends
    # at (2/5, 1): (1/5 * 1/4 + 1/5 * 7/8 + 3/5) / 1.
    assert aupro([MASK], [MAP], limit=0.2) == pytest.approx(1 / 4)
    assert aupro([MASK], [MAP], limit=1.0) == pytest.approx(33 / 40)


def test_regions_count_equally_and_only_within_their_image():
    # A region of one pixel is found, one of nine in the next image is missed, with the
    # normal pixels in between: PRO is 1/2 although recall is 1/10.
    small, large = np.zeros((2, 5), bool), np.zeros((3, 4), bool)
    small[1, 4] = True
    large[:, :3] = True
    maps = [np.where(small, 2.0, 1.0), np.where(large, 0.0, 1.0)]
    # One step from (0, 1/2) to (1, 1/2): all normal pixels share a score.
    assert aupro([small, large], maps) == pytest.approx(1 / 2)


@settings(max_examples=100, deadline=None)
@given(scored_masks(), st.sampled_from([0.05, 0.3, 1.0]))
def test_aupro_is_the_definition(images, limit):
    assert aupro(*images, limit) == pytest.approx(brute_force_aupro(*images, limit), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(scored_masks())
def test_pixel_metrics_are_those_of_scikit_learn(images):
    truth, scores = pooled(*images)
    result = pixel_metrics(*images)
    assert result["pixel_auroc"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-9)
    assert result["pixel_ap"] == pytest.approx(average_precision_score(truth, scores), abs=1e-9)
    assert result["aupro"] == aupro(*images)


@settings(max_examples=60, deadline=None)
@given(scored_masks())
def test_only_the_order_of_the_scores_matters(images):
    masks, maps = images
    result = pixel_metrics(masks, maps)
    stretched = [np.sign(s) * s.astype(np.float64) ** 2 * 3 - 100 for s in maps]
    assert pixel_metrics(masks, stretched) == pytest.approx(result)
    negated = pixel_metrics(masks, [-s for s in maps])
    assert negated["pixel_auroc"] == pytest.approx(1 - result["pixel_auroc"])
    # The whole PRO curve, too, is turned upside down and back to front.
    whole = aupro(masks, maps, 1.0) + aupro(masks, [-s for s in maps], 1.0)
    assert whole == pytest.approx(1)


@settings(max_examples=40, deadline=None)
@given(scored_masks(), st.floats(-(2.0**99), 2.0**99, width=32))
def test_perfect_and_constant_maps(images, constant):
    masks, _ = images
    truth = np.concatenate([mask.ravel() for mask in masks])
    perfect = pixel_metrics(masks, [mask.astype(np.float32) for mask in masks])
    assert perfect == {"pixel_auroc": 1.0, "pixel_ap": 1.0, "aupro": 1.0}
    flat = pixel_metrics(masks, [np.full(mask.shape, constant, np.float32) for mask in masks])
    # One line from (0, 0) to (1, 1): mean height 0.15 up to 0.3.
    chance = {"pixel_auroc": 0.5, "pixel_ap": truth.mean(), "aupro": 0.15}
    assert flat == pytest.approx(chance)


def test_neighbouring_floats_stay_apart():
    """Scores of any size and type are compared as they are: no binning, no rounding."""
    mask = np.array([[False, True]])
    for score in (np.float32(1e-40), np.float32(-0.7), np.float32(3e38), np.float64(1.0)):
        above = np.nextafter(score, score.dtype.type(np.inf))
        # A map of another type beside it must not round either.
        others = np.zeros((1, 2), bool), np.full((1, 2), score, np.float32)
        for left, right, expected in ((score, above, 1.0), (above, score, 0.0)):
            scores = np.array([[left, right]])
            assert pixel_metrics([mask], [scores])["aupro"] == expected
            result = pixel_metrics([others[0], mask], [others[1], scores])
            truth = [0, 0, 0, 1]
            order = [0, 0, int(left > right), int(right > left)]
            assert result["pixel_auroc"] == pytest.approx(roc_auc_score(truth, order))
    # The two zeros are one score.
    assert pixel_metrics([mask], [[[0.0, -0.0]]])["pixel_auroc"] == 0.5


def test_maps_are_left_as_they_are():
    mask, scores = MASK.copy(), MAP.copy()
    pixel_metrics([mask], [scores])
    assert (mask == MASK).all() and (scores == MAP).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=1, max_size=12))
def test_image_metrics(pairs):
    pairs += [(False, 0), (True, 1)]
    labels = np.array([int(label) for label, _ in pairs])
    scores = np.array([score / 7 for _, score in pairs])
    result = image_metrics(labels, scores)
    assert result["image_auroc"] == pytest.approx(roc_auc_score(labels, scores))
    assert result["image_ap"] == pytest.approx(average_precision_score(labels, scores))
    best = 0.0
    for threshold in scores:
        found = scores >= threshold
        right = np.sum(found & (labels == 1))
        best = max(best, 2 * right / (np.sum(found) + np.sum(labels)))  # Dice's form of F1
    assert result["image_f1max"] == pytest.approx(best)


def test_image_metrics_by_hand():
    # Best threshold 2: both defects and one normal image, precision 2/3, recall 1.
    # Pairs won: 4 beats 3 and 1, 2 beats 1: 3 of 4. AP: (1/1 + 2/3) / 2.
    assert image_metrics([1, 0, 1, 0], [4, 3, 2, 1]) == pytest.approx(
        {"image_auroc": 3 / 4, "image_ap": 5 / 6, "image_f1max": 4 / 5}
    )


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 0], [1, 2], "2 normal and 0 defective"),
        ([1], [1], "0 normal and 1 defective"),
        ([], [], "0 normal and 0 defective"),
        ([0, 1], [1, 2, 3], r"\(2,\) labels and \(3,\) scores"),
        ([0, 2], [1, 2], "must be 0 .normal. or 1"),
        ([0, 1, 1], [1, np.nan, np.inf], "2 of 3 scores are NaN or infinite"),
    ],
)
def test_image_errors(labels, scores, message):
    with pytest.raises(SimpleNetError, match=message):
        image_metrics(labels, scores)


@pytest.mark.parametrize(
    ("masks", "maps", "message"),
    [
        ([], [], "no defect pixel in 0 masks"),
        ([np.zeros((2, 4), bool)], [MAP], "no defect pixel in 1 masks"),
        ([np.ones((2, 4), bool)], [MAP], "no normal pixel in 1 masks"),
        ([MASK, MASK], [MAP, MAP.T], r"image 1: its map has shape \(4, 2\), its mask \(2, 4\)"),
        ([MASK], [MAP[None]], r"image 0: its map has shape \(1, 2, 4\)"),
        ([MASK[None]], [MAP[None]], "image 0: .* both must be"),
        ([MASK, MASK], [MAP], "2 masks and 1 maps"),
        ([MASK, MASK], [MAP, np.full_like(MAP, -np.inf)], "image 1: 8 of 8 scores are NaN"),
        ([MASK], [np.where(MASK, np.nan, MAP)], "image 0: 3 of 8 scores are NaN"),
    ],
)
def test_pixel_errors(masks, maps, message):
    for metric in (pixel_metrics, aupro):
        with pytest.raises(SimpleNetError, match=message):
            metric(masks, maps)


@pytest.mark.parametrize("limit", [0, -0.1, 1.1, float("nan")])
def test_aupro_limit(limit):
    with pytest.raises(SimpleNetError, match="above 0 and at most 1"):
        aupro([MASK], [MAP], limit)


# Deviations


def test_auroc_deviation_by_hand():
    # A = 3/4: Q1 = (3/4) / (5/4) = 3/5, Q2 = (2 * 9/16) / (7/4) = 9/14. With 2 normal images
    # and 3 defects: 3/16 + 2 (3/5 - 9/16) + 1 (9/14 - 9/16) = 3/16 + 3/40 + 9/112 = 12/35.
    assert auroc_deviation(3 / 4, normal=2, defect=3) == pytest.approx((12 / 35 / 6) ** 0.5)
    # One image of each kind: they are in order or not.
    assert auroc_deviation(0.9, 1, 1) == pytest.approx((0.9 * 0.1) ** 0.5)
    assert [auroc_deviation(auroc, 20, 60) for auroc in (0.0, 1.0)] == [0, 0]


@pytest.mark.parametrize(
    ("auroc", "normal", "defect"), [(0.7, 20, 60), (0.95, 30, 10), (0.5, 2, 3)]
)
def test_auroc_deviation_is_that_of_simulated_test_sets(auroc, normal, defect):
    """Of exponential scores, for which the formula is exact: P(defect > normal) = s / (1 + s)."""
    random = np.random.default_rng(0)
    rounds = 20_000
    normals = random.exponential(1, (rounds, normal))
    defects = random.exponential(auroc / (1 - auroc), (rounds, defect))
    won = np.zeros(rounds)
    for column in range(defect):
        won += (defects[:, [column]] > normals).sum(axis=1)
    aurocs = won / (normal * defect)
    labels = [0] * normal + [1] * defect
    scores = np.concatenate([normals[0], defects[0]])
    assert aurocs[0] == pytest.approx(roc_auc_score(labels, scores))
    assert aurocs.mean() == pytest.approx(auroc, abs=0.01)
    # The deviation of 20,000 draws is itself known to about 1 percent.
    assert auroc_deviation(auroc, normal, defect) == pytest.approx(aurocs.std(), rel=0.03)


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 1), st.integers(1, 200), st.integers(1, 200))
def test_auroc_deviation_obeys_its_laws(auroc, normal, defect):
    found = auroc_deviation(auroc, normal, defect)
    # No variable between 0 and 1 with mean A varies more than one that is 0 or 1.
    assert 0 <= found <= (auroc * (1 - auroc)) ** 0.5 + 1e-9
    # Exchanging the two kinds turns the curve around.
    assert auroc_deviation(1 - auroc, defect, normal) == pytest.approx(found, abs=1e-9)
    assert auroc_deviation(auroc, 2 * normal, 2 * defect) <= found + 1e-9


def scored_photos(seed, normal=8, defect=8, side=16):
    """Masks and maps: images differ in how clearly their one or two defects stand out."""
    random = np.random.default_rng(seed)
    masks, maps = [], []
    for number in range(normal + defect):
        mask = np.zeros((side, side + 5), bool)
        scores = random.normal(random.normal(0, 0.3), 1, mask.shape)
        if number >= normal:
            for row, column in random.integers(0, side - 5, (random.integers(1, 3), 2)):
                mask[row : row + random.integers(2, 6), column : column + 4] = True
            scores[mask] += random.uniform(0, 3)
        masks.append(mask)
        maps.append(scores.astype(np.float32))
    order = random.permutation(len(masks))
    return [masks[i] for i in order], [maps[i] for i in order]


@pytest.mark.parametrize("seed", [0, 1])
def test_pixel_deviations_are_those_of_a_bootstrap_of_whole_images(seed):
    """The definition: draw, measure, repeat. 300 draws know a deviation to about 4 percent."""
    masks, maps = scored_photos(seed)
    random = np.random.default_rng(100 + seed)
    kinds = [[i for i, mask in enumerate(masks) if mask.any() == kind] for kind in (False, True)]
    drawn = []
    for _ in range(300):
        images = np.concatenate([random.choice(kind, len(kind)) for kind in kinds])
        drawn.append(pixel_metrics([masks[i] for i in images], [maps[i] for i in images]))
    found = pixel_deviations(masks, maps, rounds=1000)
    assert found.keys() == {"pixel_auroc", "aupro"}
    for name, value in found.items():
        direct = float(np.std([metrics[name] for metrics in drawn], ddof=1))
        assert value == pytest.approx(direct, rel=0.2), name
        assert value > 0.01


def test_pixel_deviations_draw_the_kinds_apart_and_repeat():
    masks, maps = scored_photos(0)
    found = pixel_deviations(masks, maps)
    assert found == pixel_deviations(masks, maps)
    assert found != pixel_deviations(masks, maps, seed=1)
    # Only one image of each kind: whatever is drawn is the same test set.
    defect = next(i for i, mask in enumerate(masks) if mask.any())
    normal = next(i for i, mask in enumerate(masks) if not mask.any())
    both = [normal, defect]
    one = pixel_deviations([masks[i] for i in both], [maps[i] for i in both])
    assert one == pytest.approx({"pixel_auroc": 0, "aupro": 0}, abs=1e-12)
    # And test sets four times as large vary half as much.
    larger = pixel_deviations(masks * 4, maps * 4, rounds=2000)
    smaller = pixel_deviations(masks, maps, rounds=2000)
    for name in larger:
        assert larger[name] == pytest.approx(smaller[name] / 2, rel=0.1)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 99), st.sampled_from([0.25, 3.0, 1000.0]), st.sampled_from([-7.5, 0.0, 2.0]))
def test_pixel_deviations_depend_on_the_order_of_the_scores_only(seed, factor, shift):
    masks, maps = scored_photos(seed, normal=3, defect=3)
    found = pixel_deviations(masks, maps, rounds=20)
    moved = pixel_deviations(masks, [factor * map_.astype(float) + shift for map_ in maps], 20)
    assert moved == pytest.approx(found, rel=0.02, abs=1e-6)


def test_pixel_deviations_of_a_perfect_and_of_a_constant_map_are_0():
    masks, _ = scored_photos(0)
    perfect = pixel_deviations(masks, [mask.astype(np.float32) for mask in masks])
    constant = pixel_deviations(masks, [np.ones(mask.shape) for mask in masks])
    nothing = {"pixel_auroc": 0, "aupro": 0}
    assert perfect == pytest.approx(nothing, abs=1e-12)
    assert constant == pytest.approx(nothing, abs=1e-12)
