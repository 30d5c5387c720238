"""Reading images and masks: what is accepted, what is refused, and that both stay aligned."""

import io
import os
import shutil
import struct
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import (
    AnomalyDataset,
    ImageFiles,
    Sample,
    categories,
    image_files,
    make_transform,
    photos,
    read_file,
    read_image,
    read_mask,
    shape_of,
)
from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD

TRANSFORM = make_transform(64, 64)
ORIENTATION = 0x0112


def save(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB", color=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data folder with one category: 3 training images, 2 normal, 2 broken, 1 scratched."""
    part = tmp_path / "data" / "part"
    names = ["train/good/000", "train/good/001", "train/good/002", "test/good/000"]
    names += ["test/good/001", "test/broken/000", "test/broken/001", "test/scratch/000"]
    for name in names:
        save(part / f"{name}.png")
    for name in ("broken/000", "broken/001", "scratch/000"):
        save(part / "ground_truth" / f"{name}_mask.png", mode="L", color=255)
    return tmp_path / "data"


def check_refused(message: str, root: Path, category: str = "part", split: str = "test") -> str:
    """Opening the data set raises an error that contains ``message``."""
    with pytest.raises(SimpleNetError) as caught:
        AnomalyDataset(root, category, split, TRANSFORM)
    assert message in str(caught.value)
    return str(caught.value)


# The layout of the folders


def test_layout_gives_samples_in_order_with_their_masks(root):
    part = root / "part"
    train = AnomalyDataset(root, "part", "train", TRANSFORM)
    good = part / "train" / "good"
    assert train.samples == [Sample(good / f"00{i}.png", "good") for i in range(3)]
    assert (len(train), train.has_masks) == (3, False)

    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    truth = part / "ground_truth"
    assert test.samples == [
        Sample(part / "test/broken/000.png", "broken", truth / "broken/000_mask.png"),
        Sample(part / "test/broken/001.png", "broken", truth / "broken/001_mask.png"),
        Sample(part / "test/good/000.png", "good"),
        Sample(part / "test/good/001.png", "good"),
        Sample(part / "test/scratch/000.png", "scratch", truth / "scratch/000_mask.png"),
    ]
    assert [sample.label for sample in test.samples] == [1, 1, 0, 0, 1]
    assert test.has_masks


def test_a_mask_may_have_the_name_of_its_image_and_another_suffix(root):
    truth = root / "part" / "ground_truth"
    (truth / "broken/000_mask.png").rename(truth / "broken/000.png")
    save(truth / "broken/001.BMP", mode="L", color=255)
    (truth / "broken/001_mask.png").unlink()
    masks = [sample.mask for sample in AnomalyDataset(root, "part", "test", TRANSFORM).samples]
    assert masks[:2] == [truth / "broken/000.png", truth / "broken/001.BMP"]


def test_without_any_masks_images_can_still_be_tested(root):
    for path in (root / "part" / "ground_truth").rglob("*.png"):
        path.unlink()
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    assert (len(test), test.has_masks) == (5, False)
    assert not any(item["mask"].any() for item in test)
    for folder in ("broken", "scratch", ""):
        (root / "part" / "ground_truth" / folder).rmdir()
    assert len(AnomalyDataset(root, "part", "test", TRANSFORM)) == 5


def test_some_masks_missing_is_refused(root):
    (root / "part/ground_truth/broken/001_mask.png").unlink()
    message = check_refused("test/broken/001.png: no mask in", root)
    assert "1 of 3 defect images" in message


@pytest.mark.parametrize("folder", ["broken", "dent"])  # the second has no images at all
def test_a_mask_without_an_image_is_refused(root, folder):
    save(root / f"part/ground_truth/{folder}/007_mask.png", mode="L")
    check_refused(f"ground_truth/{folder}/007_mask.png: a mask without an image", root)


def test_two_masks_for_one_image_are_refused(root):
    save(root / "part/ground_truth/broken/000.png", mode="L")
    check_refused("ground_truth/broken/000.png: a mask without an image", root)


def test_masks_of_normal_images_are_not_needed_and_not_read(root):
    save(root / "part/ground_truth/good/000_mask.png", size=(8, 8), mode="L", color=255)
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    assert all(sample.mask is None for sample in test.samples if not sample.label)


def test_a_mask_of_another_size_is_refused_in_one_sentence(root):
    save(root / "part/test/broken_large/003.png", size=(448, 448))
    mask = save(root / "part/ground_truth/broken_large/003_mask.png", size=(450, 450), mode="L")
    expected = f"{mask}: 450x450, but its image is 448x448."
    assert check_refused(expected, root) == expected


def test_other_files_and_hidden_ones_are_ignored(root):
    good = root / "part" / "train" / "good"
    (good / "notes.txt").write_text("no image")
    (good / ".hidden.png").write_text("no image")
    (good / "._000.png").write_text("what macOS leaves on other disks")
    (good / "folder.png").mkdir()
    save(good / "UPPER.PNG")
    save(good / "b.JpEg")
    assert [path.name for path in image_files(good)] == [
        *("000.png", "001.png", "002.png"),
        *("UPPER.PNG", "b.JpEg"),
    ]
    (root / "part/test/readme.txt").write_text("no folder")
    save(root / "part/test/.thumbnails/000.png")
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    assert {sample.defect for sample in test.samples} == {"good", "broken", "scratch"}


@pytest.mark.parametrize("name", ["two words", "Kratzer_größer", "傷", "a.b", "[x]*?", "it's 100%"])
def test_any_name_a_disk_allows(root, name):
    save(root / f"part/test/{name}/{name}.png", color=(255, 255, 255))
    save(root / f"part/ground_truth/{name}/{name}_mask.png", mode="L", color=255)
    (root / "part").rename(root / name)
    test = AnomalyDataset(root, name, "test", TRANSFORM)
    (item,) = [item for item in test if test.samples[item["index"]].defect == name]
    assert item["mask"].all()
    assert categories(root) == [name]


def test_missing_or_empty_folders_say_which(root):
    part = root / "part"
    check_refused(f"{root / 'nowhere'}: no such folder.", root / "nowhere")
    check_refused("no category 'prat'. Found: part.", root, "prat")
    check_refused("'part' as the category", part, "part")
    check_refused("no CATEGORY/train/good inside", part / "test", "part")
    check_refused("no train/good inside", root / "part", "test")
    for path in (part / "test").rglob("*.png"):
        path.unlink()
    for path in (part / "ground_truth").rglob("*.png"):
        path.unlink()
    check_refused(f"{part / 'test'}: no images in its folders.", root)
    (part / "test").rename(part / "tset")
    check_refused(f"{part / 'test'}: no such folder.", root)
    for path in (part / "train" / "good").iterdir():
        path.unlink()
    check_refused(f"{part / 'train' / 'good'}: no normal images (.bmp", root, split="train")


def test_category_as_root_is_named_even_from_inside(root, monkeypatch):
    monkeypatch.chdir(root / "part")
    check_refused(".: is a category itself. Name its parent", Path("."), "part")
    check_refused("'part' as the category", Path("."), "part")


def test_symlink_loops_end(root):
    part = root / "part"
    (part / "train/good/loop.png").symlink_to("loop.png")
    (part / "test/loop").symlink_to("loop")
    (part / "test/up").symlink_to(part)
    (root / "again").symlink_to(root)
    (root / "round").symlink_to("round")
    assert len(AnomalyDataset(root, "part", "train", TRANSFORM)) == 3
    assert len(AnomalyDataset(root, "part", "test", TRANSFORM)) == 5
    assert len(AnomalyDataset(root / "again" / "again", "part", "test", TRANSFORM)) == 5
    check_refused("no category 'round'", root, "round")
    check_refused(f"{root / 'round'}: no such folder.", root / "round")


def test_photos_of_a_folder_are_normal_samples_in_order(tmp_path):
    for name in ("b.png", "a.jpg", "C.PNG"):
        save(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no image")
    assert photos(tmp_path) == [
        Sample(tmp_path / name, "good") for name in ("C.PNG", "a.jpg", "b.png")
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(SimpleNetError, match="^.*/empty: no normal images [(].bmp, .*[)].$"):
        photos(tmp_path / "empty")


def test_an_image_can_be_given_as_the_bytes_of_its_file(tmp_path):
    samples = [Sample(save(tmp_path / f"{n}.png", color=(9 * n,) * 3), "good") for n in range(3)]
    images = ImageFiles(samples, TRANSFORM)
    data = read_file(samples[1].image)
    assert data == samples[1].image.read_bytes()
    assert [item["index"] for item in images] == [0, 1, 2]
    expected = images[1]
    samples[1].image.unlink()  # it is not looked for
    found = images.item(1, data)
    assert found.keys() == expected.keys() and found["index"] == 1
    assert torch.equal(found["image"], expected["image"])
    assert (np.asarray(read_image(samples[1].image, data)) == 9).all()
    for read in (read_file, read_image, images.item):
        with pytest.raises(SimpleNetError, match="1.png: not a readable image .*No such file"):
            read(1 if read == images.item else samples[1].image)
    with pytest.raises(SimpleNetError, match="1.png: not a readable image"):
        images.item(1, data[:40])
    with pytest.raises(SimpleNetError, match="not a readable image .*directory"):
        read_file(tmp_path)


# Decoding


def test_eight_bit_modes_give_the_colours_they_stand_for(tmp_path):
    colour = (200, 100, 50)
    grey = save(tmp_path / "grey.png", mode="L", color=77)
    assert np.unique(np.asarray(read_image(grey))).tolist() == [77]
    bit = save(tmp_path / "bit.png", mode="1", color=1)
    assert np.unique(np.asarray(read_image(bit))).tolist() == [255]
    saved = [
        save(tmp_path / "rgb.png", color=colour),
        save(tmp_path / "rgba.png", mode="RGBA", color=(*colour, 128)),
        save(tmp_path / "rgb.bmp", color=colour),
        save(tmp_path / "rgb.tiff", color=colour),
        save(tmp_path / "rgb.webp", color=colour, lossless=True),
        tmp_path / "palette.png",
    ]
    Image.new("RGB", (64, 64), colour).quantize(4).save(tmp_path / "palette.png")
    for path in saved:
        image = read_image(path)
        assert (image.mode, image.size) == ("RGB", (64, 64))
        assert (np.asarray(image) == colour).all(), path


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_are_scaled_not_cut_off(tmp_path, suffix):
    values = np.array([[0, 255, 256, 257, 32768, 65535]], dtype=np.uint16).repeat(4, 0)
    Image.fromarray(values).save(tmp_path / f"deep.{suffix}")
    with Image.open(tmp_path / f"deep.{suffix}") as file:
        assert file.mode.startswith("I")
    image = np.asarray(read_image(tmp_path / f"deep.{suffix}"))
    assert image.shape == (4, 6, 3)
    assert image[0, :, 0].tolist() == [0, 0, 0, 1, 127, 255]


def test_cmyk_jpeg_and_what_telephones_write(tmp_path):
    # C, M, Y, K = 0, 255, 255, 0 prints red.
    path = save(tmp_path / "print.jpg", mode="CMYK", color=(0, 255, 255, 0), quality=95)
    assert np.abs(np.asarray(read_image(path)).astype(int) - (255, 0, 0)).max() <= 3
    frames = [Image.new("RGB", (64, 48), color) for color in ("white", "black")]
    frames[0].save(tmp_path / "phone.jpg", format="MPO", save_all=True, append_images=frames[1:])
    assert np.asarray(read_image(tmp_path / "phone.jpg")).min() == 255  # the first one


def test_floating_point_image_is_refused(tmp_path):
    path = save(tmp_path / "float.tiff", mode="F", color=0.5)
    with pytest.raises(SimpleNetError, match="floating-point pixels"):
        read_image(path)


# What a viewer does to the stored pixels, by EXIF orientation (numbers of the EXIF standard).
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.transpose(1, 0, *range(2, stored.ndim)),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: np.rot90(stored, 2).transpose(1, 0, *range(2, stored.ndim)),
    8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_rotated_photograph_lies_under_its_upright_mask(root, orientation):
    stored = np.zeros((48, 64, 3), dtype=np.uint8)
    stored[8:24, 40:56] = 255
    upright = np.ascontiguousarray(UPRIGHT[orientation](stored))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = root / "part/test/turned/000.jpg"
    image.parent.mkdir()
    Image.fromarray(stored).save(image, exif=exif, quality=95)
    mask = root / "part/ground_truth/turned/000_mask.png"
    mask.parent.mkdir()
    Image.fromarray(upright[..., 0]).save(mask)

    decoded = read_image(image)
    assert decoded.size == upright.shape[1::-1]
    assert np.abs(np.asarray(decoded).astype(int) - upright).max() < 30
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    item = test[len(test) - 1]
    assert test.samples[-1].defect == "turned"
    bright = item["image"].mean(dim=0) > 0
    assert (bright == item["mask"]).float().mean() > 0.98
    assert 0.07 < item["mask"].float().mean() < 0.1  # 16 x 16 of 48 x 64


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_shape_of_a_photo_is_that_of_the_upright_picture(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / f"photo.{suffix}", size=(80, 48), exif=exif)
    height, width = UPRIGHT[orientation](np.zeros((48, 80))).shape
    assert read_image(path).size == (width, height)
    assert shape_of([Sample(path, "good")]) == pytest.approx(height / width)
    assert (height > width) == (orientation >= 5)


def test_shape_of_some_photos_is_the_median_and_reads_their_headers_only(tmp_path):
    sizes = [(100, 50), (60, 60), (50, 100), (90, 30)]  # 1/2, 1, 2, 1/3
    samples = [Sample(save(tmp_path / f"{n}.png", size), "good") for n, size in enumerate(sizes)]
    assert shape_of(samples[:3]) == 1
    assert shape_of(samples) == pytest.approx((1 / 2 + 1) / 2)
    assert shape_of(samples[3:]) == pytest.approx(1 / 3)
    for sample in samples[:3]:
        sample.image.write_bytes(sample.image.read_bytes()[:60])  # no pixels are left
        with pytest.raises(SimpleNetError):
            read_image(sample.image)
    assert shape_of(samples[:3]) == 1
    samples[0].image.write_bytes(b"no image")
    with pytest.raises(SimpleNetError, match="0.png: not a readable image"):
        shape_of(samples)


MASKS = {
    "0 and 255": ("L", 255),
    "0 and 1": ("L", 1),
    "1 bit": ("1", 1),
    "RGB": ("RGB", (255, 255, 255)),
    "red": ("RGB", (255, 0, 0)),
    "blue": ("RGB", (0, 0, 255)),
    "RGBA": ("RGBA", (255, 255, 255, 255)),
    "16 bit": ("I;16", 65535),
    "16 bit, 0 and 255": ("I;16", 255),
    "16 bit, 0 and 1": ("I;16", 1),
}


@pytest.mark.parametrize("kind", MASKS)
def test_masks_of_every_kind_mean_the_same(tmp_path, kind):
    mode, value = MASKS[kind]
    image = Image.new(mode, (64, 48), 0 if mode != "RGBA" else (0, 0, 0, 255))
    expected = np.zeros((48, 64), dtype=np.uint8)
    expected[4:12, 8:24] = 1
    if mode == "I;16":  # whose bytes paste() would fill one by one
        image = Image.fromarray(expected.astype(np.uint16) * np.uint16(value))
    else:
        image.paste(value, (8, 4, 24, 12))
    image.save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "mask.png")), expected)


def test_palette_mask_empty_mask_and_full_mask(tmp_path):
    mask = Image.new("P", (64, 48), 0)
    mask.putpalette([0, 0, 0, 128, 0, 0])
    mask.paste(1, (8, 4, 24, 12))
    mask.save(tmp_path / "palette.png")
    assert np.asarray(read_mask(tmp_path / "palette.png")).sum() == 16 * 8
    assert not np.asarray(read_mask(save(tmp_path / "empty.png", mode="L"))).any()
    assert np.asarray(read_mask(save(tmp_path / "full.png", mode="L", color=255))).all()


# What is no image


def bomb(path: Path, side: int) -> Path:
    """A PNG of some bytes that declares ``side`` x ``side`` pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        checksum = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + checksum

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes(100_000))
    data = chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + data)
    return path


def damaged(folder: Path, kind: str) -> Path:
    path = folder / "damaged.png"
    if kind == "missing":
        return path
    if kind == "bomb":
        return bomb(path, 20_000)
    if kind == "truncated jpeg":
        path = path.with_suffix(".jpg")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    contents = {
        "empty": b"",
        "text": b"no image at all\n" * 100,
        "header only": whole[:33],
        "bit flipped": whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:],
        "gif": b"GIF89a" + bytes(100),
    }
    path.write_bytes(contents.get(kind, whole[: len(whole) // 2]))
    return path


KINDS = ["missing", "empty", "text", "header only", "bit flipped", "gif", "bomb"]
KINDS += ["truncated png", "truncated jpeg"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("read", [read_image, read_mask])
def test_what_is_no_image_is_refused_quickly(tmp_path, kind, read):
    path = damaged(tmp_path, kind)
    start = time.process_time()
    with pytest.raises(SimpleNetError, match="not a readable image") as caught:
        read(path)
    assert time.process_time() - start < 1
    assert str(caught.value).startswith(f"{path}: ")


def test_damaged_image_in_a_data_set_is_named(root):
    path = damaged(root / "part/train/good", "truncated png")
    train = AnomalyDataset(root, "part", "train", TRANSFORM)
    with pytest.raises(SimpleNetError, match="good/damaged.png: not a readable image"):
        list(DataLoader(train, batch_size=2))
    os.replace(path, root / "part/ground_truth/broken/000_mask.png")
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    with pytest.raises(SimpleNetError, match="broken/000_mask.png: not a readable image"):
        test[0]


# Anything at all


def encoded(format: str) -> bytes:
    """A small image with something in it, as the bytes of a file."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 9), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(noise).save(file, format)
    return file.getvalue()


@given(
    format=st.sampled_from(["PNG", "JPEG", "BMP", "TIFF", "WEBP"]),
    changes=st.lists(st.tuples(st.integers(0, 2000), st.integers(0, 255)), max_size=4),
    end=st.none() | st.integers(0, 400),
)
def test_changed_image_bytes_are_read_or_refused(
    tmp_path_factory, format: str, changes: list[tuple[int, int]], end: int | None
) -> None:
    data = bytearray(encoded(format))
    for index, value in changes:
        data[index % len(data)] = value
    path = tmp_path_factory.getbasetemp() / "changed.png"
    path.write_bytes(data[:end])
    for read in (read_mask, read_image):
        try:
            image = read(path)
        except SimpleNetError as error:
            assert str(error).startswith(f"{path}: ")
        else:
            if read is read_mask:
                assert set(np.unique(np.asarray(image))) <= {0, 1}
            else:
                assert image.mode == "RGB"


PARTS = st.sampled_from(
    ["train", "test", "ground_truth", "good", "broken", "a.png", "a_mask.png", "b.png", ".x", "é"]
)


@given(
    entries=st.dictionaries(
        st.lists(PARTS, min_size=1, max_size=3).map("/".join),
        st.sampled_from(["folder", "image", "wide image", "text", "link to itself", "link up"]),
        max_size=8,
    ),
    base=st.booleans(),
)
def test_any_folders_are_read_or_refused(
    tmp_path_factory, entries: dict[str, str], base: bool
) -> None:
    root = tmp_path_factory.mktemp("layout")
    if base:  # something that works, to be spoiled
        save(root / "part/train/good/0.png", (4, 4))
        save(root / "part/test/broken/0.png", (4, 4))
        save(root / "part/ground_truth/broken/0_mask.png", (4, 4), "L", 255)
    for name, kind in entries.items():
        path = root / "part" / name
        with suppress(OSError):  # a name that is taken by a file stays one
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "folder":
                path.mkdir(exist_ok=True)
            elif kind == "text":
                path.write_text("no image")
            elif kind.startswith("link"):
                path.symlink_to(path.name if kind == "link to itself" else "..")
            else:
                Image.new("L", (4, 4) if kind == "image" else (5, 4)).save(path, "PNG")
    for split in ("train", "test"):
        try:
            found = AnomalyDataset(root, "part", split, TRANSFORM)
            items = [found[index] for index in range(len(found))]
        except SimpleNetError as error:
            assert str(error)
        else:
            assert items
            assert split == "test" or not any(item["label"] for item in items)
            assert found.has_masks in (True, False)
            for item in items:
                assert item["image"].shape == (3, 64, 64) and item["mask"].shape == (64, 64)
    shutil.rmtree(root)


# The transform


@pytest.mark.parametrize(
    ("size", "crop"), [(40, 32), ((40, 40), (32, 32)), ((48, 80), (32, 64)), ((80, 48), 48)]
)
def test_transform_is_pillows_resize_centre_crop_and_normalisation(tmp_path, size, crop):
    pixels = np.random.default_rng(1).integers(0, 256, (70, 50, 3), dtype=np.uint8)
    path = tmp_path / "image.png"
    Image.fromarray(pixels).save(path)
    item = ImageFiles([Sample(path, "good")], make_transform(size, crop))[0]

    height, width = np.broadcast_to(size, 2).tolist()
    rows, columns = np.broadcast_to(crop, 2).tolist()
    top, left = (height - rows) // 2, (width - columns) // 2
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BILINEAR)
    seen = np.asarray(resized)[top : top + rows, left : left + columns] / 255
    expected = (seen - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert item["image"].shape == (3, rows, columns) and item["mask"].shape == (rows, columns)
    # One grey level is 1 / 255 / 0.225 = 0.017: the two round differently.
    assert np.abs(item["image"].permute(1, 2, 0).numpy() - expected).max() < 0.02


@pytest.mark.parametrize("size", [(900, 700), (64, 64), (50, 90), (33, 200)])
@pytest.mark.parametrize(
    ("resize", "crop"),
    [(64, 64), (80, 64), (329, 288), ((64, 96), (64, 96)), ((160, 48), (96, 32))],
)
def test_marked_square_stays_under_its_mask(tmp_path, size, resize, crop):
    width, height = size
    box = (width * 4 // 10, height * 3 // 10, width * 6 // 10, height * 5 // 10)
    image = Image.new("RGB", size, "black")
    image.paste("white", box)
    image.save(tmp_path / "image.png")
    image.convert("L").save(tmp_path / "mask.png")
    sample = Sample(tmp_path / "image.png", "hole", tmp_path / "mask.png")
    item = ImageFiles([sample], make_transform(resize, crop))[0]
    mask = item["mask"].numpy()
    whole, seen = np.broadcast_to(resize, 2), np.broadcast_to(crop, 2)  # height and width
    assert (mask.shape, mask.dtype) == (tuple(seen), np.bool_)
    white = 1 - IMAGENET_MEAN[1]
    bright = item["image"][1].numpy() * IMAGENET_STD[1] > white - 0.5

    # Where the box lies after resizing, in pixels: its sides are exact to one pixel.
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    expected = []
    for place, side in enumerate(box):
        axis = 1 - place % 2
        offset = round((whole[axis] - seen[axis]) / 2)
        inside = side * whole[axis] / size[1 - axis] - offset
        expected.append(min(max(inside, 0), seen[axis]))
    assert found == pytest.approx(expected, abs=1.0)
    assert mask.sum() == (found[2] - found[0]) * (found[3] - found[1])  # a full rectangle
    # Image and mask may differ by one pixel along the edge of the square.
    rim = 2 * (found[2] - found[0] + found[3] - found[1]) + 4
    assert (mask != bright).sum() <= rim / 2 + 1
    assert (mask & bright).sum() >= 0.8 * mask.sum()


def test_batches_have_the_documented_shapes_and_types(root):
    save(root / "part/test/broken/000.png", size=(91, 17), mode="L")
    save(root / "part/ground_truth/broken/000_mask.png", size=(91, 17), mode="L", color=1)
    save(root / "part/test/good/000.png", size=(1, 1))
    test = AnomalyDataset(root, "part", "test", make_transform(40, 32))
    for workers in (0, 1):
        batch = next(iter(DataLoader(test, batch_size=5, num_workers=workers)))
        assert (batch["image"].shape, batch["image"].dtype) == ((5, 3, 32, 32), torch.float32)
        assert (batch["mask"].shape, batch["mask"].dtype) == ((5, 32, 32), torch.bool)
        assert type(batch["image"]) is torch.Tensor and type(batch["mask"]) is torch.Tensor
        assert batch["mask"].any(dim=(1, 2)).tolist() == [True, True, False, False, True]
        assert batch["label"].tolist() == [1, 1, 0, 0, 1]
        assert batch["index"].tolist() == [0, 1, 2, 3, 4]
