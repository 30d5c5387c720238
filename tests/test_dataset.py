"""Reading images and masks: what is accepted, what is refused, and that both stay aligned."""

import io
import math
import os
import shutil
import struct
import time
import zlib
from collections import Counter
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageOps
from scipy import ndimage
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.transforms import v2

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import (
    AnomalyDataset,
    ImageFiles,
    Sample,
    as_picture,
    as_rgb,
    as_seen,
    categories,
    check,
    enough,
    find_samples,
    fitted,
    image_files,
    is_category,
    kind_of,
    make_transform,
    passed_over,
    photos,
    read_file,
    read_image,
    read_mask,
    shape_of,
    white_level,
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
    message = check_refused("test/broken/001.png: no mask", root)
    assert "1 of 3 defect images" in message


@pytest.mark.parametrize("folder", ["broken", "dent"])  # the second has no images at all
def test_a_mask_without_an_image_is_refused(root, folder):
    save(root / f"part/ground_truth/{folder}/007_mask.png", mode="L")
    check_refused(f"ground_truth/{folder}/007_mask.png: a mask without an image", root)


def test_two_masks_for_one_image_are_refused(root):
    save(root / "part/ground_truth/broken/000.png", mode="L")
    check_refused("ground_truth/broken/000_mask.png: a mask without an image", root)


def test_masks_of_normal_images_are_not_needed_and_not_read(root):
    save(root / "part/ground_truth/good/000_mask.png", size=(8, 8), mode="L", color=255)
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    assert all(sample.mask is None for sample in test.samples if not sample.label)


def test_a_mask_of_another_size_is_left_out_and_named(root):
    save(root / "part/test/broken_large/003.png", size=(448, 448))
    mask = save(root / "part/ground_truth/broken_large/003_mask.png", size=(450, 450), mode="L")
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    assert test.mask_note == (
        f"{mask}: 450x450, but its image is 448x448. Pixel metrics are left out: 1 of 4 masks do"
        " not fit."
    )
    assert not test.has_masks
    assert [sample.mask is None for sample in test.samples if sample.label] == [0, 0, 1, 0]
    assert len(list(test)) == 6
    with pytest.raises(SimpleNetError, match="450x450, but its image is 448x448[.]$"):
        ImageFiles([Sample(root / "part/test/broken_large/003.png", "x", mask)], TRANSFORM)[0]


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
    check_refused("holds no category. What can be read: ", part / "train" / "good", "part")
    check_refused("no such folder", root / "part" / "nothing", "test")
    for path in (part / "test").rglob("*.png"):
        path.unlink()
    for path in (part / "ground_truth").rglob("*.png"):
        path.unlink()
    check_refused(f"{part}: no images to test with. Found 3 normal images to train on.", root)
    (part / "test").rename(part / "tset")
    check_refused(f"{part}: no images to test with.", root)
    for path in (part / "train" / "good").iterdir():
        path.unlink()
    check_refused(f"{part}: no normal images to train on. Found nothing.", root, split="train")


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
    with pytest.raises(SimpleNetError, match="^.*/empty: no normal images. What can be read: "):
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
        save(tmp_path / "rgba.png", mode="RGBA", color=(*colour, 255)),
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


# Depth


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 16])
@pytest.mark.parametrize("kind", ["I;16 png", "I;16 tiff", "I tiff", "F tiff"])
def test_every_depth_in_every_file_is_as_bright_as_with_8_bits(tmp_path, bits, kind):
    mode, suffix = kind.split()
    dtype = {"I;16": np.uint16, "I": np.int32, "F": np.float32}[mode]
    white = 2**bits - 1
    grey = np.arange(256).reshape(16, 16)
    path = tmp_path / f"deep.{suffix}"
    stored = np.round(grey * white / 255)
    Image.fromarray(stored.astype(dtype)).save(path)
    checked = check([Sample(path, "good")])
    assert checked.white == white and not checked.notes and not checked.damaged
    found = np.asarray(read_image(path, white=checked.white))[..., 0].astype(int)
    assert np.abs(found - grey).max() <= 1
    item = ImageFiles([Sample(path, "good")], make_transform(16, 16), checked.white)[0]
    expected = (grey / 255 - IMAGENET_MEAN[0]) / IMAGENET_STD[0]
    assert np.abs(item["image"][0].numpy() - expected).max() < 0.02


@pytest.mark.parametrize("signed", [False, True])
def test_unsigned_numbers_beyond_what_pillow_reads_are_not_taken_for_black(tmp_path, signed):
    path = tmp_path / "deep.tiff"
    values = np.array([[0, 2**31 - 1, -1]] * 3, dtype=np.int32)
    Image.fromarray(values).save(path)
    if not signed:  # Pillow writes them as signed
        kinds = [struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1)]
        assert path.read_bytes().count(kinds[0]) == 1
        path.write_bytes(path.read_bytes().replace(*kinds))
    if signed:
        assert np.asarray(read_image(path, white=2**31 - 1))[0, :, 0].tolist() == [0, 255, 0]
    else:
        with pytest.raises(SimpleNetError, match="deep.tiff: .*values above 2147483647; save it"):
            read_image(path)


def test_a_category_without_training_images_is_one_if_it_has_masks(root):
    shutil.rmtree(root / "part/train")
    assert is_category(root / "part") and categories(root) == ["part"]
    assert len(AnomalyDataset(root, "part", "test", TRANSFORM)) == 5


def test_floating_point_not_a_number_and_infinity(tmp_path):
    values = np.array([[0, 0.5, 1, np.nan, np.inf, -np.inf, -3, 0.25]] * 4, dtype=np.float32)
    Image.fromarray(values).save(tmp_path / "float.tiff")
    checked = check([Sample(tmp_path / "float.tiff", "good")])
    assert checked.white == 1
    found = np.asarray(read_image(tmp_path / "float.tiff", white=1))
    assert found[0, :, 0].tolist() == [0, 127, 255, 0, 255, 0, 0, 63]
    Image.fromarray(np.full((4, 4), np.nan, np.float32)).save(tmp_path / "nothing.tiff")
    assert check([Sample(tmp_path / "nothing.tiff", "good")]).white == 1
    assert not np.asarray(read_image(tmp_path / "nothing.tiff")).any()


@given(st.floats(1e-9, 1e9), st.booleans())
def test_white_is_full_scale_of_the_depth_that_holds_the_highest_value(highest, floating):
    value = highest if floating else math.ceil(highest)
    white = white_level(value, floating)
    assert value <= white
    assert white < 4 * value + 4 or white == 255
    assert white_level(white, floating) == white


def test_the_white_level_of_a_set_is_that_of_its_normal_images(tmp_path):
    def deep(name, high):
        Image.fromarray(np.linspace(0, high, 64, dtype=np.uint16).reshape(8, 8)).save(
            tmp_path / name
        )
        return tmp_path / name

    samples = [Sample(deep("a.png", 900), "good"), Sample(deep("b.png", 3000), "good")]
    samples += [Sample(deep("c.png", 60000), "hole"), Sample(save(tmp_path / "8.png"), "good")]
    assert check(samples).white == 4095
    assert check(samples, white=20000).white == 20000
    assert check(samples[3:]).white == 0
    Image.fromarray(np.ones((4, 4), np.float32)).save(tmp_path / "f.tiff")
    with pytest.raises(SimpleNetError, match="f.tiff: floating point, but .*a.png: whole numbers"):
        check([*samples, Sample(tmp_path / "f.tiff", "good")])


def test_a_set_that_uses_a_small_part_of_its_range_is_told(tmp_path):
    values = np.full((64, 64), 700, dtype=np.uint16)
    values[5, 5] = 65535  # a broken pixel
    Image.fromarray(values).save(tmp_path / "hot.png")
    (note,) = check([Sample(tmp_path / "hot.png", "good")]).notes
    assert "use 1.1% of their range. White is 65535" in note and "--white" in note
    assert not check([Sample(tmp_path / "hot.png", "good")], white=1023).notes
    (note,) = check([Sample(save(tmp_path / "dark.png", color=(9, 12, 3)), "good")]).notes
    assert "use 4.7% of their range" in note


@pytest.mark.parametrize("mode", ["LA", "PA", "RGBA", "P", "L", "RGB"])
def test_what_is_transparent_is_laid_on_white(tmp_path, mode):
    if mode in ("P", "L", "RGB"):  # one value or colour is transparent
        image = Image.new(mode, (4, 2), 0)
        image.info["transparency"] = (0, 0, 0) if mode == "RGB" else 0
        image.save(tmp_path / "a.png", transparency=image.info["transparency"])
    else:
        image = Image.new("RGBA", (4, 2), (0, 0, 0, 0)).convert("LA" if mode == "LA" else "RGBA")
        if mode == "PA":
            image = Image.new("RGBA", (4, 2), (0, 0, 0, 0)).quantize(4)
        image.save(tmp_path / "a.png")
    assert (np.asarray(read_image(tmp_path / "a.png")) == 255).all()
    half = save(tmp_path / "half.png", mode="RGBA", color=(200, 100, 50, 128))
    assert np.abs(np.asarray(read_image(half)).astype(int) - (227, 177, 152)).max() <= 1


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_deep_images_are_turned_upright_too(tmp_path, mode, orientation):
    dtype = {"I;16": np.uint16, "I;16B": ">u2", "I": np.int32, "F": np.float32}[mode]
    stored = np.arange(24).reshape(4, 6)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.fromarray(stored.astype(dtype)).save(tmp_path / "a.tiff", exif=exif)
    found = np.asarray(read_image(tmp_path / "a.tiff", white=255))[..., 0]
    assert np.array_equal(found, UPRIGHT[orientation](stored))


@pytest.mark.parametrize(
    ("suffix", "format"),
    [
        *((".jfif", "JPEG"), (".GIF", "GIF"), (".pgm", "PPM"), (".jp2", "JPEG2000")),
        *((".avif", "AVIF"), (".heic", "HEIF"), (".dib", "DIB"), (".ppm", "PPM")),
    ],
)
def test_formats_of_phones_browsers_and_cameras_are_read(tmp_path, suffix, format):
    if format == "HEIF":
        pytest.importorskip("pillow_heif")
    pixels = np.full((32, 48, 3), 100, dtype=np.uint8)
    pixels[8:16, 8:24] = 200
    image = Image.fromarray(pixels).convert("L" if suffix == ".pgm" else "RGB")
    image.save(tmp_path / f"a{suffix}", format)
    assert image_files(tmp_path) == [tmp_path / f"a{suffix}"]
    found = np.asarray(read_image(tmp_path / f"a{suffix}")).astype(int)
    assert np.abs(found - pixels).mean() < 4


@pytest.mark.parametrize("format", ["TIFF", "GIF", "PNG", "WEBP"])
def test_of_several_pages_the_first_is_read_and_that_is_said(tmp_path, format):
    pages = [Image.new("RGB", (8, 8), color) for color in ("white", "black", "red")]
    path = tmp_path / f"a.{format.lower()}"
    pages[0].save(path, format, save_all=True, append_images=pages[1:])
    assert (np.asarray(read_image(path)) == 255).all()
    one = Sample(save(tmp_path / "one.png", color=(255, 255, 255)), "good")
    (note,) = check([Sample(path, "good"), one]).notes
    assert note == "1 of the files have several pages or frames: the first of each is read."


def test_colours_of_16_bits_are_read_by_the_upper_8_and_that_is_said(tmp_path):
    """Pillow writes no such file: the PNG is made by hand."""
    values = np.array([[[0x1234, 0x80FF, 0xFF00], [0x00FF, 0x4321, 0xABCD]]], dtype=">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    chunks = [(b"IHDR", struct.pack(">IIBBBBB", 2, 1, 16, 2, 0, 0, 0))]
    chunks += [(b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    data = b"\x89PNG\r\n\x1a\n"
    for name, body in chunks:
        check_sum = struct.pack(">I", zlib.crc32(name + body))
        data += struct.pack(">I", len(body)) + name + body + check_sum
    path = tmp_path / "deep.png"
    path.write_bytes(data)
    assert (np.asarray(read_image(path)) == values // 256).all()
    assert [note for note in check([Sample(path, "good")]).notes if "16 bits" in note] == [
        "1 of the files hold colours of 16 bits, of which the upper 8 are read. If they"
        " use a small part of these, save them as 8 bits, or as grey."
    ]
    eight = save(tmp_path / "eight.png", color=(255, 255, 255))
    assert check([Sample(eight, "good")]).notes == []


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
    assert 0.055 < item["mask"].float().mean() < 0.07  # 16 x 16 of 64 x 64


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_a_large_jpeg_is_decoded_at_a_size_that_is_enough(root, orientation):
    """Photo, mask and size are those of the whole file, and only the time is less."""
    rows, columns = np.mgrid[:1200, :1600] / 1600
    waves = [128 + 60 * np.sin(40 * rows + phase) * np.cos(31 * columns) for phase in (0, 1, 2)]
    waves = np.stack(waves, axis=2) + np.random.default_rng(0).normal(0, 8, (1200, 1600, 3))
    stored = waves.clip(0, 255).astype(np.uint8)
    stored[200:400, 800:1200] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    image = root / "part/test/large/000.jpg"
    image.parent.mkdir()
    Image.fromarray(stored).save(image, exif=exif, quality=92)
    upright = UPRIGHT[orientation](stored)
    mask = root / "part/ground_truth/large/000_mask.png"
    mask.parent.mkdir()
    Image.fromarray(np.uint8(255) * (upright == 255).all(axis=2)).save(mask)

    keep = enough(TRANSFORM)
    assert keep == (128, 128)
    large, small = read_image(image), read_image(image, keep=keep)
    assert large.size == upright.shape[1::-1]
    assert small.size == tuple(length // 8 for length in large.size)  # 150 is the shorter side
    picture, size = as_picture(image, "photo", keep=keep)
    assert (picture.size, size) == (small.size, large.size)
    assert as_picture(image.read_bytes(), "photo", keep=keep)[1] == large.size
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    (index,) = (at for at, sample in enumerate(test.samples) if sample.defect == "large")
    assert test.mask_note == "" and test.samples[index].mask == mask
    item = test[index]
    whole = as_seen(large, TRANSFORM)
    assert torch.equal(item["image"], as_seen(small, TRANSFORM))
    levels = (item["image"] - whole).abs() * 255 * torch.tensor(IMAGENET_STD)[:, None, None]
    assert levels.mean() < 1 and levels.quantile(0.99) < 4
    expected = 200 * 400 / (1600 * 1600)  # a square, above and below mirror images without a mark
    assert item["mask"].float().mean() == pytest.approx(expected, rel=0.1)

    Image.new("L", small.size, 255).save(mask)
    test = AnomalyDataset(root, "part", "test", TRANSFORM)
    assert f"but its image is {large.width}x{large.height}." in test.mask_note
    image.write_bytes(image.read_bytes()[:-20_000])
    with pytest.raises(SimpleNetError, match="000.jpg: not a readable image .*truncated"):
        read_image(image, keep=keep)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tiff"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_shape_of_a_photo_is_that_of_the_upright_picture(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = save(tmp_path / f"photo.{suffix}", size=(80, 48), exif=exif)
    height, width = UPRIGHT[orientation](np.zeros((48, 80))).shape
    assert read_image(path).size == (width, height)
    assert shape_of([Sample(path, "good")]) == pytest.approx(
        (height / width, math.sqrt(height * width))
    )
    assert (height > width) == (orientation >= 5)


def test_shape_of_some_photos_is_the_median_and_reads_their_headers_only(tmp_path):
    sizes = [(100, 50), (60, 60), (50, 100), (90, 30)]  # 1/2, 1, 2, 1/3
    samples = [Sample(save(tmp_path / f"{n}.png", size), "good") for n, size in enumerate(sizes)]
    assert shape_of(samples[:3])[0] == 1
    assert shape_of(samples)[0] == pytest.approx((1 / 2 + 1) / 2)
    assert shape_of(samples[3:])[0] == pytest.approx(1 / 3)
    for sample in samples[:3]:
        sample.image.write_bytes(sample.image.read_bytes()[:60])  # no pixels are left
        with pytest.raises(SimpleNetError):
            read_image(sample.image)
    assert shape_of(samples[:3])[0] == 1
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


LABELS = {
    "labels 1, 2, 3": [1, 2, 3],
    "shades of LOCO": [253, 254, 255],
    "a label beside 255": [1, 1, 255],
    "many instances": [1, 90, 200],
}


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "RGB", "F"])
@pytest.mark.parametrize("kind", LABELS)
def test_every_value_but_the_background_is_defect(tmp_path, kind, mode):
    values = np.zeros((48, 64), dtype=np.uint8)
    for number, value in enumerate(LABELS[kind]):
        values[8:20, 4 + 20 * number : 16 + 20 * number] = value
    image = Image.fromarray(values)
    if mode == "P":
        image = Image.fromarray(values).convert("P")
        image.putpalette(
            [part for number in range(256) for part in (number, 0, 255 * (number > 0))]
        )
    elif mode == "I;16":
        image = Image.fromarray(values.astype(np.uint16))
    elif mode == "F":
        image = Image.fromarray(values.astype(np.float32))
    elif mode == "RGB":
        image = Image.merge("RGB", [Image.new("L", image.size), image, image])
    path = tmp_path / ("mask.tiff" if mode == "F" else "mask.png")
    image.save(path)
    assert np.array_equal(np.asarray(read_mask(path)), values > 0)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
@pytest.mark.parametrize("under", [0, 255])
def test_a_mask_painted_on_transparency_is_read_by_it(tmp_path, mode, under):
    values = np.full((48, 64, 4), under, dtype=np.uint8)
    values[..., 3] = 0
    values[4:12, 8:24, 3] = 200
    Image.fromarray(values).convert(mode).save(tmp_path / "mask.png")
    assert np.array_equal(np.asarray(read_mask(tmp_path / "mask.png")), values[..., 3] > 0)


@pytest.mark.parametrize("quality", [98, 90, 75, 50])
@pytest.mark.parametrize("again", [False, True])
def test_seams_of_jpeg_are_no_defect_even_when_saved_as_png_again(tmp_path, quality, again):
    rows, columns = np.mgrid[:96, :128]
    mask = (rows - 40) ** 2 + (columns - 60) ** 2 < 20**2
    mask[80, 10:100] = True
    Image.fromarray((255 * mask).astype(np.uint8)).save(tmp_path / "mask.jpg", quality=quality)
    path = tmp_path / "mask.jpg"
    with Image.open(path) as image:
        assert ((np.asarray(image) > 0) != mask).sum() > 50
        if again:
            path = tmp_path / "mask.png"
            image.save(path)
    assert (np.asarray(read_mask(path)) != mask).sum() <= 8


def test_several_masks_of_one_image_are_merged(tmp_path):
    for number in range(3):
        values = np.zeros((8, 8), dtype=np.uint8)
        values[number, number] = 250 + number
        (tmp_path / "000").mkdir(exist_ok=True)
        Image.fromarray(values).save(tmp_path / "000" / f"{number}.png")
    assert np.array_equal(np.argwhere(read_mask(tmp_path / "000")), [[0, 0], [1, 1], [2, 2]])
    save(tmp_path / "000/3.png", (9, 8), "L")
    with pytest.raises(SimpleNetError, match="000: its masks differ in size"):
        read_mask(tmp_path / "000")


@given(
    places=st.lists(st.tuples(st.integers(0, 89), st.integers(0, 119)), min_size=1, max_size=12),
    size=st.tuples(st.integers(8, 100), st.integers(8, 100)),
)
def test_no_region_of_a_mask_is_lost_by_shrinking(places, size):
    """Each region keeps a pixel where it was; pixels the nearest rule gives stay as they are."""
    mask = torch.zeros(1, 90, 120, dtype=torch.uint8)
    for row, column in places:
        mask[0, row : row + 2, column] = 1
    image = torch.zeros(3, 90, 120, dtype=torch.uint8)
    _, small = make_transform(size, size)(tv_tensors.Image(image), tv_tensors.Mask(mask))
    whole, size = size, fitted(90, 120, size)
    top, left = ((side - taken) // 2 for side, taken in zip(whole, size, strict=True))
    small = small[:, top : top + size[0], left : left + size[1]]
    nearest = v2.functional.resize(mask, list(size), interpolation=v2.InterpolationMode.NEAREST)
    assert ((small > 0) | (nearest == 0)).all()
    regions, count = ndimage.label(mask[0], np.ones((3, 3)))
    added = np.argwhere((small > nearest)[0].numpy())
    assert len(added) <= count
    for row, column in added:  # lies where a pixel of a region is, one pixel of the result around
        scale = np.array([90, 120]) / size
        low, high = (np.array([row, column]) + np.array([[-0.5], [1.5]])) * scale
        (r0, c0), (r1, c1) = np.floor(low).astype(int).clip(0), np.ceil(high).astype(int)
        assert regions[r0:r1, c0:c1].any()
    for region in range(1, count + 1):
        rows, columns = np.nonzero(regions == region)
        spots = (np.stack([rows, columns], 1) + 0.5) * np.array(size) / (90, 120)
        assert any(
            small[0, r, c]
            for row, column in spots.astype(int)
            for r in range(max(0, row - 1), min(size[0], row + 2))
            for c in range(max(0, column - 1), min(size[1], column + 2))
        )


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


@given(
    photo=st.tuples(st.integers(1, 5000), st.integers(1, 5000)),
    size=st.tuples(st.integers(32, 700), st.integers(32, 700)),
)
def test_a_photo_is_stretched_by_a_tenth_or_not_at_all(photo, size):
    taken = fitted(*photo, size)
    scales = np.divide(size, photo)
    if scales.max() > 1.1001 * scales.min():
        assert np.subtract(size, taken).min() == 0 and min(taken) >= 1  # it touches two sides
        exact = np.multiply(photo, scales.min())  # the same scale both ways
        assert taken == pytest.approx(np.maximum(exact, 1), abs=0.501)
    elif scales.max() < 1.0999 * scales.min():
        assert taken == size


def test_a_photo_of_another_shape_keeps_it(root):
    """A disc stays a disc, and beside the photo are its mirror images, marked like itself."""
    rows, columns = np.mgrid[:100, :400]
    disc = (rows - 60) ** 2 + (columns - 200) ** 2 < 30**2
    for folder, suffix, values in (("test", "", disc * 180 + 40), ("ground_truth", "_mask", disc)):
        path = root / f"part/{folder}/flat/000{suffix}.png"
        path.parent.mkdir()
        Image.fromarray((values * (255 if suffix else 1)).astype(np.uint8)).save(path)
    test = AnomalyDataset(root, "part", "test", make_transform((256, 400), (256, 400)))
    (index,) = (at for at, sample in enumerate(test.samples) if sample.defect == "flat")
    item = test[index]
    assert np.array_equal(item["mask"][78:178], disc)
    image = item["image"][0].numpy() * IMAGENET_STD[0] + IMAGENET_MEAN[0]
    assert np.array_equal(np.rint(255 * image[78:178]), disc * 180 + 40)
    for values in (image, item["mask"].numpy()):
        assert np.array_equal(values[:78], values[78:156][::-1])
        assert np.array_equal(values[178:], values[100:178][::-1])


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
    # 70 x 50, and not one of these shapes: its own shape, between its mirror images.
    scale = min(height / 70, width / 50)
    high, wide = round(70 * scale), round(50 * scale)
    resized = np.asarray(Image.fromarray(pixels).resize((wide, high), Image.Resampling.BILINEAR))
    above, beside = (height - high) // 2, (width - wide) // 2
    sides = ((above, height - high - above), (beside, width - wide - beside), (0, 0))
    whole = np.pad(resized, sides, mode="symmetric")
    seen = whole[top : top + rows, left : left + columns] / 255
    expected = (seen - np.array(IMAGENET_MEAN)) / np.array(IMAGENET_STD)
    assert item["image"].shape == (3, rows, columns) and item["mask"].shape == (rows, columns)
    # One grey level is 1 / 255 / 0.225 = 0.017: the two round differently.
    assert np.abs(item["image"].permute(1, 2, 0).numpy() - expected).max() < 0.02


@pytest.mark.parametrize("size", [(900, 700), (64, 64), (50, 90), (90, 200)])
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
    taken = fitted(height, width, tuple(whole.tolist()))
    offsets = [
        round((a - b) / 2) - (a - c) // 2 for a, b, c in zip(whole, seen, taken, strict=True)
    ]
    own = np.zeros_like(mask)  # the photo's own pixels, without its mirror images
    top, left = (max(0, -offset) for offset in offsets)
    own[top : taken[0] - offsets[0], left : taken[1] - offsets[1]] = True
    rows, columns = (np.flatnonzero((mask & own).any(axis=axis)) for axis in (1, 0))
    found = (columns[0], rows[0], columns[-1] + 1, rows[-1] + 1)
    expected = []
    for place, side in enumerate(box):
        axis = 1 - place % 2
        inside = side * taken[axis] / size[1 - axis] - offsets[axis]
        expected.append(min(max(inside, 0), seen[axis]))
    assert found == pytest.approx(expected, abs=1.0)
    area = (found[2] - found[0]) * (found[3] - found[1])
    assert (mask & own).sum() == area  # a full rectangle
    # Image and mask may differ by one pixel along the edge of the square.
    rim = 2 * (found[2] - found[0] + found[3] - found[1]) + 4
    assert (mask != bright)[own].sum() <= rim / 2 + 1
    assert (mask & bright)[own].sum() >= 0.8 * area


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


# Layouts people have

SETS = {
    # what lies in the folder, then: trained on, tested by kind, masks
    "OK and NG": (["OK/{}", "NG/{}"], 4, {"good": 1, "NG": 5}, 0),
    "good and bad": (["Good/{}", "BAD/{}", "bad/mon/{}"], 4, {"good": 1, "BAD": 5, "bad": 5}, 0),
    "normal and anomalies by name": (["normal/{}", "dent/{}"], 4, {"good": 1, "dent": 5}, 0),
    "not_ok": (["ok_front/{}", "not_ok/{}"], 4, {"good": 1, "not_ok": 5}, 0),
    "splits in capitals": (
        ["Train/Good/{}", "Test/GOOD/{}", "Test/Hole/{}", "Ground_Truth/hole/{}_Mask"],
        *(5, {"good": 5, "Hole": 5}, 5),
    ),
    "days and cameras": (
        [
            *("train/good/mon/{}", "train/good/tue/{}", "test/good/mon/cam1/{}"),
            *("test/hole/cam1/{}", "ground_truth/hole/cam1/{}_gt"),
            *("test/hole/cam2/{}", "ground_truth/hole/cam2/{}_seg"),
        ],
        *(10, {"good": 5, "hole": 10}, 10),
    ),
    "train without good": (["train/mon/{}", "train/{}", "test/ng/{}"], 10, {"ng": 5}, 0),
    "defects in train": (["train/ok/{}", "train/ng/{}", "train/x/{}"], 5, {}, 0),
    "two that are good": (["train/good/{}", "train/OK/{}"], 10, {}, 0),
    "masks of the image's name": (
        ["train/good/{}", "test/hole/{}", "masks/hole/{}"],
        *(5, {"hole": 5}, 5),
    ),
    "masks in one folder": (["OK/{}", "NG/x{}", "masks/x{}_label"], 4, {"good": 1, "NG": 5}, 5),
    "masks beside": (
        ["train/good/{}", "test/hole/{}", "test/hole/{}_mask", "test/good/{}", "test/good/{}_mask"],
        *(5, {"good": 5, "hole": 5}, 5),
    ),
    "LOCO": (
        ["train/good/{}", "validation/good/{}", "test/good/{}", "test/logical_anomalies/{}"]
        + [f"ground_truth/logical_anomalies/{{}}/00{n}" for n in range(3)],
        *(5, {"good": 5, "logical_anomalies": 5}, 5),
    ),
    "VisA": (
        ["Data/Images/Normal/{}", "Data/Images/Anomaly/{}", "Data/Masks/Anomaly/{}"],
        *(4, {"good": 1, "Anomaly": 5}, 5),
    ),
    "3D-AD": (
        [f"{where}/{side}/{{}}" for where in ("train/good", "test/good") for side in ("rgb", "xyz")]
        + [f"test/crack/{side}/{{}}" for side in ("rgb", "xyz", "gt")],
        *(5, {"good": 5, "crack": 5}, 5),
    ),
    "AD 2": (
        [
            *("train/good/{}_regular", "validation/good/{}", "test_private/{}"),
            *("test_private_mixed/{}", "test_public/good/{}_regular"),
            *("test_public/bad/{}_regular", "test_public/ground_truth/bad/{}_regular_mask"),
        ],
        *(5, {"good": 5, "bad": 5}, 5),
    ),
}


def make(folder: Path, names: list[str]) -> int:
    for name in names:
        for number in range(5):
            save(folder / f"{name.format(f'{number:03}')}.png", (4, 4))
    return 5 * len(names)


@pytest.mark.parametrize("kind", SETS)
def test_the_layouts_that_people_have(tmp_path, kind):
    names, trained, tested, masks = SETS[kind]
    count = make(tmp_path / "part", names)
    found = find_samples(tmp_path / "part")
    assert categories(tmp_path) == ["part"]
    assert len(found.train) == trained and {s.label for s in found.train} == {0}
    kinds = [sample.defect for sample in found.test]
    assert {kind: kinds.count(kind) for kind in kinds} == tested
    with_mask = [sample for sample in found.test if sample.mask]
    assert len(with_mask) == masks
    for sample in with_mask:  # the number of an image is in its name, and in that of its mask
        assert sample.image.stem.removesuffix("_regular").lstrip("x") in str(sample.mask)
        assert len({part for part in ("cam1", "cam2") if part in str(sample)}) <= 1
    said = found.summary()
    assert f"{trained} normal images to train on" in said
    assert all(f"{number} {kind}" in said for kind, number in tested.items())
    in_test = {sample.image for sample in found.test} | {sample.image for sample in found.train}
    assert len(in_test) == len(found.train) + len(found.test)
    assert sum(found.passed.values()) <= count - len(in_test)
    if tested:
        test = AnomalyDataset(tmp_path, "part", "test", TRANSFORM)
        assert test.samples == found.test and len(list(test)) == len(kinds)


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["train/good/{}", "test/cam1/good/{}", "test/cam1/hole/{}"], "test/cam1/good: good or a"),
        (["train/good/{}", "test/good/bad/{}"], "test/good/bad: good or a defect?"),
        (["train/ng/{}", "test/good/{}"], "no normal images to train on. Found to test with 5 go"),
        (["NG/{}", "bad/{}"], "no normal images to train on. Found to test with 5 NG, 5 bad; 0 m"),
        (["train/good/{}", "test/a/{}", "test/a/{}x", "masks/b/{}"], "a mask without an image"),
        (["bottle/train/good/{}", "bad_old/{}"], "bottle/train/good: train or test inside of a f"),
    ],
)
def test_what_is_not_understood_is_said_with_what_was_seen(tmp_path, names, said):
    make(tmp_path / "part", names)
    with pytest.raises(SimpleNetError) as caught:
        AnomalyDataset(tmp_path, "part", "train", TRANSFORM)
    assert said in str(caught.value) and str(caught.value).startswith(f"{tmp_path / 'part'}")


def test_a_folder_of_categories_beside_one_called_bad_is_no_category(tmp_path):
    make(tmp_path, ["bottle/train/good/{}", "nut/train/good/{}", "bad_old/{}"])
    assert not is_category(tmp_path)
    assert categories(tmp_path) == ["bottle", "nut"]
    save(tmp_path / "nut/train/good/_mask.png")  # a name that is nothing but the ending
    assert len(photos(tmp_path / "nut/train/good")) == 6


def test_a_folder_of_photos_is_not_trusted_where_names_say_otherwise(tmp_path):
    make(tmp_path / "days", ["mon/{}", "tue/cam1/{}", "images/{}", "{}"])
    assert len(photos(tmp_path / "days")) == 20
    for name in ("x/bottle/test/broken/{}", "mon/NG/{}", "y/masks/{}", "{}_label"):
        make(tmp_path / "mixed", ["{}"])
        make(tmp_path / "mixed", [name])
        with pytest.raises(SimpleNetError, match="not photos of good parts alone, for it holds"):
            photos(tmp_path / "mixed")
        shutil.rmtree(tmp_path / "mixed")
    make(tmp_path / "deep", ["sets/bottle/train/good/{}", "sets/bottle/test/broken/{}"])
    with pytest.raises(SimpleNetError, match="Name .*/deep/sets as the data"):
        photos(tmp_path / "deep")


def test_what_systems_leave_and_what_cannot_be_read_is_passed_over_and_counted(tmp_path):
    save(tmp_path / "a.png")
    save(tmp_path / "SUB/deeper/B.JPG")
    for name in ("@eaDir", "__MACOSX", ".ipynb_checkpoints", ".git/x", "$RECYCLE.BIN"):
        save(tmp_path / name / "thumb.png")
    for name in ("Thumbs.db", ".DS_Store", "._a.png", "desktop.ini", "SUB/.b.png"):
        (tmp_path / name).write_text("not a photo")
    for name in ("notes.txt", "SUB/raw.CR2", "README"):
        (tmp_path / name).write_text("not a photo")
    (tmp_path / "lost.png").symlink_to("nowhere.png")
    (tmp_path / "empty").mkdir()
    passed: Counter[str] = Counter()
    assert image_files(tmp_path, passed) == [tmp_path / "SUB/deeper/B.JPG", tmp_path / "a.png"]
    assert passed == {
        "hidden or the system's": 10,
        **{".txt": 1, ".cr2": 1, "without a suffix": 1},
        "links to what is read already or to nothing": 1,
    }
    assert passed_over(passed).startswith("14 files passed over (1 .cr2, 1 .txt, 10 hidden or")
    save(tmp_path / ".mine/c.png")  # what you name yourself may be hidden
    assert image_files(tmp_path / ".mine") == [tmp_path / ".mine/c.png"]


def test_heic_without_its_plug_in_is_named_with_the_remedy(tmp_path, monkeypatch):
    (tmp_path / "a.HEIC").write_bytes(b"")
    monkeypatch.setattr("simplenet_lib.dataset.SUFFIXES", {".png"})
    with pytest.raises(SimpleNetError, match=r"1 .heic, which needs: pip install 'simplenet_lib\["):
        photos(tmp_path, Counter())


def test_links_to_folders_are_followed_once(tmp_path):
    save(tmp_path / "else/1.png")
    save(tmp_path / "photos/2.png")
    save(tmp_path / "photos/mon/3.png")
    for name, target in {
        **{"a": "../else", "b": "../else", "again": "mon", "up": "..", "self": "."},
        "mon/back": "../../photos",
    }.items():
        (tmp_path / "photos" / name).symlink_to(target)
    found = image_files(tmp_path / "photos")
    assert [path.name for path in found] == ["2.png", "1.png", "3.png"]
    assert len({path.resolve() for path in found}) == 3


def test_a_folder_that_cannot_be_opened_is_named(tmp_path, monkeypatch):
    save(tmp_path / "a.png")
    save(tmp_path / "closed/b.png")
    opened = Path.iterdir

    def iterdir(path: Path):  # root may open everything, so a mode would not do
        if path.name == "closed":
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(Path, "iterdir", iterdir)
    passed: Counter[str] = Counter()
    assert image_files(tmp_path, passed) == [tmp_path / "a.png"]
    assert f"1 folder {tmp_path / 'closed'}, which cannot be opened" in passed_over(passed)
    with pytest.raises(SimpleNetError, match="closed: cannot be opened [(]Permission denied[)]"):
        image_files(tmp_path / "closed")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("good", "good"), ("OK", "good"), ("Normal", "good"), ("ok_front", "good")),
        *(("no-defect", "good"), ("defect_free", "good"), ("NG", "bad"), ("Bad", "bad")),
        *(("not_ok", "bad"), ("abnormal", "bad"), ("def_front", "bad"), ("notok", "bad")),
        *(("scratch", None), ("goods", None), ("book", None), ("bent_wire", None), ("cam1", None)),
    ],
)
def test_names_that_say_good_or_bad(name, kind):
    assert kind_of(name) == kind


def test_all_damaged_files_are_named_at_once(root):
    broken = [root / f"part/{name}" for name in ("train/good/001.png", "test/broken/000.png")]
    for path in broken:
        path.write_bytes(path.read_bytes()[:60])
    (root / "part/train/good/002.png").write_bytes(b"")
    mask = root / "part/ground_truth/scratch/000_mask.png"
    mask.write_bytes(b"no image")
    found = find_samples(root / "part")
    damaged = check(found.train + found.test).damaged
    scratched = root / "part/test/scratch/000.png"
    assert damaged.keys() == {*broken, root / "part/train/good/002.png", scratched}
    assert damaged[scratched].startswith(f"{mask}: not a readable image")
    assert "(the file is empty)" in damaged[root / "part/train/good/002.png"]


CHAPTER = Path(__file__).parent.parent / "notebooks/py/12_your_own_photos.py"
MODES = ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "I;16B", "F"]


@pytest.mark.parametrize("white", [0, 200])
@pytest.mark.parametrize("mode", MODES)
def test_the_reader_without_torch_gives_what_the_library_gives(tmp_path, mode, white):
    """That of chapter 12, whose `as_rgb` is the library's by a test of its cells."""
    grey = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(12, 16))
    image = grey.convert(mode) if not mode.startswith(("I", "F")) else grey
    if mode in ("P", "PA"):
        image = Image.merge("RGBA", [grey, grey, grey, grey.rotate(180)]).quantize(8)
    elif mode in ("LA", "RGBA"):
        image.putalpha(grey.rotate(180))
    elif mode.startswith(("I", "F")):
        dtype = {"I": np.int32, "I;16": np.uint16, "I;16B": ">u2", "F": np.float32}[mode]
        image = Image.fromarray(np.asarray(grey).astype(dtype))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    png = mode in ("PA", "P", "LA", "RGBA")
    path = tmp_path / ("a.png" if png else "a.tiff")
    image.save(path, exif=exif)
    chapter = CHAPTER.read_text()
    assert "file.draft(None, enough[::-1] if file.getexif().get(274, 1) > 4 else enough)" in chapter
    assert 'as_rgb(ImageOps.exif_transpose(file), json.loads(facts["config"])["white"])' in chapter
    assert "with Image.open(io.BytesIO(path.read_bytes())) as file:" in chapter
    with Image.open(io.BytesIO(path.read_bytes())) as file:
        theirs = as_rgb(ImageOps.exif_transpose(file), white)
    ours = read_image(path, white=white)
    assert (ours.mode, ours.size) == (theirs.mode, theirs.size) == ("RGB", (12, 16))
    assert ours.tobytes() == theirs.tobytes()
    # Below 257 of 65535 all is black.
    assert (len(set(ours.tobytes())) > 1) == (white > 0 or not mode.startswith("I"))
