"""The embedded data set: its layout, its determinism, its masks and its difficulty."""

import hashlib
import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from sklearn.metrics import roc_auc_score

from simplenet_lib import synthetic
from simplenet_lib.config import SimpleNetError
from simplenet_lib.synthetic import CATEGORIES, THRESHOLD, draw, generate

SMALL = {"train": 2, "test_good": 1, "test_per_defect": 1, "size": 64}
DEFECTS = [(category, kind) for category in CATEGORIES for kind in CATEGORIES[category][1]]


def hashes(root: Path) -> dict[str, str]:
    """SHA-256 of every picture under ``root``, by relative path."""
    return {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*.png"))
    }


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return generate(tmp_path_factory.mktemp("synthetic") / "data", **SMALL)


def test_layout_is_that_of_mvtec_ad(small):
    for category, (_, defects) in CATEGORIES.items():
        expected = {"train/good/000.png", "train/good/001.png", "test/good/000.png"}
        expected |= {f"test/{kind}/000.png" for kind in defects}
        expected |= {f"ground_truth/{kind}/000_mask.png" for kind in defects}
        assert len(defects) >= 4
        assert set(hashes(small / category)) == expected
    for path in small.rglob("*.png"):
        with Image.open(path) as image:
            mode = "L" if "ground_truth" in path.parts else "RGB"
            assert (image.size, image.mode, image.info) == ((64, 64), mode, {})


def test_same_seed_same_bytes_also_for_one_category_and_more_images(small, tmp_path):
    alone = generate(tmp_path / "alone", categories=["nut"], **{**SMALL, "train": 3})
    both, one = hashes(small), hashes(alone)
    assert one.pop("nut/train/good/002.png")
    assert one == {name: digest for name, digest in both.items() if name.startswith("nut/")}


def test_other_seed_other_bytes(small, tmp_path):
    other = hashes(generate(tmp_path / "other", seed=1, **SMALL))
    images = {name: digest for name, digest in hashes(small).items() if "mask" not in name}
    assert all(other[name] != digest for name, digest in images.items())
    assert len(set(images.values())) == len(images)  # and no image occurs twice


@pytest.mark.parametrize(("category", "kind"), DEFECTS)
def test_mask_is_where_the_defect_changes_the_picture(category, kind):
    for index in range(4):
        sample = draw(category, "test", kind, index, seed=0, size=256)
        changed = abs(sample.clean - sample.reference).max(2) > THRESHOLD
        mask = sample.mask > 0
        assert set(np.unique(sample.mask)) == {0, 255}
        assert not (changed & ~mask).any()  # outside the mask nothing changes
        # Inside, only small gaps are filled: no point is far from a change.
        assert ndimage.distance_transform_edt(~changed)[mask].max() <= 4
        assert 20 <= mask.sum() < 0.25 * mask.size


def test_a_good_image_is_the_same_path_without_a_defect():
    sample = draw("nut", "test", "good", 0, seed=0, size=64)
    assert not sample.mask.any()
    assert np.array_equal(sample.clean, sample.reference)


@pytest.mark.parametrize("category", CATEGORIES)
def test_noise_is_the_same_in_good_and_defective_images(category):
    def noise(kind: str) -> float:
        samples = [draw(category, "test", kind, i, seed=0, size=64) for i in range(4)]
        differences = [s.image / 255 - s.clean for s in samples]
        return float(np.std(differences))

    good = noise("good")
    assert 0.005 < good < 0.03
    for kind in CATEGORIES[category][1]:
        assert noise(kind) == pytest.approx(good, rel=0.2)


@pytest.mark.parametrize("category", CATEGORIES)
def test_pixel_statistics_do_not_solve_it(category):
    """Mean and deviation of every pixel over the training images are not enough."""

    def grey(split: str, kind: str, count: int) -> np.ndarray:
        images = [draw(category, split, kind, i, seed=0, size=128).image for i in range(count)]
        return np.stack(images).mean(3)

    train = grey("train", "good", 40)
    mean, deviation = train.mean(0), train.std(0) + 1e-6
    scores, labels = [], []
    for kind in ("good", *CATEGORIES[category][1]):
        for image in grey("test", kind, 20 if kind == "good" else 6):
            smooth = ndimage.gaussian_filter(abs(image - mean) / deviation, 2)
            scores.append(smooth.max())
            labels.append(kind != "good")
    assert roc_auc_score(labels, scores) < 0.80


def test_a_second_call_leaves_the_files_alone(small):
    before = {path: path.stat().st_mtime_ns for path in small.rglob("*")}
    assert generate(small, **SMALL) == small
    assert before == {path: path.stat().st_mtime_ns for path in small.rglob("*")}


def test_an_existing_folder_that_is_something_else_is_refused(small, tmp_path):
    with pytest.raises(SimpleNetError, match="not this data set"):
        generate(small, **{**SMALL, "seed": 5})
    foreign = tmp_path / "photos"
    foreign.mkdir()
    (foreign / "mine.txt").write_text("keep")
    with pytest.raises(SimpleNetError, match="not this data set"):
        generate(foreign, **SMALL)
    assert [path.name for path in tmp_path.rglob("*")] == ["photos", "mine.txt"]
    assert (foreign / "mine.txt").read_text() == "keep"


def test_a_data_set_that_lost_a_file_is_refused(tmp_path):
    root = generate(tmp_path / "data", categories=["nut"], **SMALL)
    (root / "nut/train/good/000.png").unlink()
    with pytest.raises(SimpleNetError, match="not this data set"):
        generate(root, categories=["nut"], **SMALL)


def test_an_interrupted_call_leaves_nothing(tmp_path, monkeypatch):
    real, calls = synthetic.draw, []

    def stop_at_third(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(synthetic, "draw", stop_at_third)
    with pytest.raises(KeyboardInterrupt):
        generate(tmp_path / "data", **SMALL)
    assert os.listdir(tmp_path) == []


def test_a_target_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(SimpleNetError, match="could not be written"):
        generate(tmp_path / "file" / "data", **SMALL)


@pytest.mark.parametrize(
    "wrong",
    [
        {"categories": ["bolt"]},
        {"categories": []},
        {"categories": ["nut", "nut"]},
        {"size": 8},
        {"train": -1},
        {"seed": -1},
    ],
)
def test_wrong_parameters_are_named(wrong, tmp_path):
    with pytest.raises(SimpleNetError, match=str(next(iter(wrong)))):
        generate(tmp_path / "data", **{**SMALL, **wrong})
    assert os.listdir(tmp_path) == []


def test_manifest_says_what_was_generated(small):
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["seed"] == 0
    assert manifest["files"] == len(hashes(small))
