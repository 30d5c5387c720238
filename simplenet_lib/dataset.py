"""Chapter 1: images and masks in the MVTec AD folder layout.

::

    root/category/train/good/000.png           normal images, the only ones trained on
    root/category/test/good/000.png            normal images kept for the test
    root/category/test/DEFECT/000.png          images with a defect
    root/category/ground_truth/DEFECT/000_mask.png     where the defect is
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypedDict

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from simplenet_lib.config import SimpleNetError
from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
TURNED = (5, 6, 7, 8)  # EXIF orientations of a camera held upright
SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sample:
    """One image on disk: its defect type (``"good"`` if none) and its mask, if it has one."""

    image: Path
    defect: str
    mask: Path | None = None

    @property
    def label(self) -> int:
        """1 for a defect, 0 for a normal image."""
        return int(self.defect != "good")


class Item(TypedDict):
    """What a dataset hands to the loader; a batch has N in front of every shape."""

    image: Tensor  #: (3, H, W), normalised
    mask: Tensor  #: (H, W) of bool, all False without a mask
    label: int  #: 1 for a defect, 0 for a normal image
    index: int  #: position in ``dataset.samples``


def image_files(folder: Path) -> list[Path]:
    """The image files directly inside ``folder``, hidden ones left out, sorted by name."""
    return sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in SUFFIXES and not path.name.startswith(".") and path.is_file()
    )


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises
    ------
    SimpleNetError
        If it is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SimpleNetError(f"{path}: not a readable image ({error}).") from error


def _open(path: Path, data: bytes | None = None) -> Image.Image:
    """Decode an image completely and turn it upright; ``data`` are its bytes, if already read."""
    data = read_file(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise SimpleNetError(f"{path}: not a readable image ({error}).") from error
    return image


def read_image(path: Path, data: bytes | None = None) -> Image.Image:
    """Read an image of 8 or 16 bits, grey, palette or colour, as upright 8-bit RGB.

    Parameters
    ----------
    path : Path
        The file.
    data : bytes, optional
        Its bytes, if they have been read already.

    Raises
    ------
    SimpleNetError
        If the file is missing, damaged, too large to be a photograph, or not an image.
    """
    image = _open(path, data)
    if image.mode == "F":
        raise SimpleNetError(f"{path}: floating-point pixels. Save it with 8 or 16 bits.")
    if image.mode.startswith("I"):  # 16 bit: 65535 is white
        values = np.clip(np.asarray(image).astype(np.int64) // 257, 0, 255)
        image = Image.fromarray(values.astype(np.uint8))
    return image.convert("RGB")


def read_mask(path: Path) -> Image.Image:
    """Read a mask whose values are 0 and any other, mostly 255 or 1, as 8-bit 0 and 1.

    Raises
    ------
    SimpleNetError
        If the file is missing, damaged, or not an image.
    """
    image = _open(path)
    values = np.asarray(image if image.mode.startswith("I") else image.convert("L"))
    # Half the maximum, not 0: JPEG leaves faint traces around a mask.
    return Image.fromarray((values > values.max() / 2).astype(np.uint8))


def make_transform(size: int | tuple[int, int], crop: int | tuple[int, int]) -> Transform:
    """Resize, cut out the centre, normalise; image and mask together.

    The image is interpolated with antialiasing, the mask by its nearest pixel,
    so that it keeps the values 0 and 1.

    Parameters
    ----------
    size, crop : int or (int, int)
        Height and width in pixels of the resized image and of its central cut-out;
        one number for a square.
    """
    height, width = (size, size) if isinstance(size, int) else size
    transform: Transform = v2.Compose(
        [
            v2.Resize((height, width), antialias=True),
            v2.CenterCrop(crop),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return transform


def shape_of(samples: Sequence[Sample]) -> float:
    """Median height over width of some photos, as their files' headers state it, upright."""
    ratios = []
    for sample in samples:
        (width, height), orientation = _header(sample.image)
        ratios.append(width / height if orientation in TURNED else height / width)
    return float(np.median(ratios))


class ImageFiles(Dataset[Item]):
    """Images read from disk and transformed together with their masks.

    Parameters
    ----------
    samples : list of Sample
        The images, in the order of the index.
    transform : callable
        Takes an image (3, h, w) of uint8 and a mask (h, w), returns both as the
        network wants them; see :func:`make_transform`.
    """

    def __init__(self, samples: list[Sample], transform: Transform) -> None:
        self.samples = samples
        self.transform = transform

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return self.item(index)

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))

    def item(self, index: int, data: bytes | None = None) -> Item:
        """Image ``index``; ``data`` are the bytes of its file, if they have been read already."""
        sample = self.samples[index]
        picture, marked = _read(sample, data)
        image, mask = self.transform(
            tv_tensors.Image(v2.functional.pil_to_tensor(picture)),
            tv_tensors.Mask(v2.functional.pil_to_tensor(marked)),
        )
        return {
            "image": image.as_subclass(Tensor),
            "mask": mask.as_subclass(Tensor)[0] > 0,
            "label": sample.label,
            "index": index,
        }


class AnomalyDataset(ImageFiles):
    """One split of one category in the MVTec AD layout.

    Parameters
    ----------
    root : Path
        Folder that holds the categories.
    category : str
        Name of the category's folder.
    split : {"train", "test"}
        ``"train"`` holds normal images only.
    transform : callable
        See :class:`ImageFiles`.

    Attributes
    ----------
    has_masks : bool
        Whether every defect image has a mask; pixel metrics need it.

    Raises
    ------
    SimpleNetError
        If a folder is missing or empty, a mask has no image or another size, or
        only some of the defect images have a mask.
    """

    def __init__(
        self, root: Path, category: str, split: Literal["train", "test"], transform: Transform
    ) -> None:
        folder = _category_folder(root, category)
        samples = photos(folder / "train" / "good") if split == "train" else _test_samples(folder)
        for sample in samples:  # a wrong mask is found now, not after a training
            if sample.mask is not None and _header(sample.image) != _header(sample.mask):
                _read(sample)
        super().__init__(samples, transform)
        defects = [sample for sample in samples if sample.label]
        self.has_masks = bool(defects) and all(sample.mask for sample in defects)


def photos(folder: Path) -> list[Sample]:
    """Every image directly inside a folder of good photos, as normal samples.

    Raises
    ------
    SimpleNetError
        If there are none.
    """
    samples = [Sample(path, "good") for path in image_files(folder)]
    if not samples:
        raise SimpleNetError(f"{folder}: no normal images ({', '.join(sorted(SUFFIXES))}).")
    return samples


def categories(root: Path) -> list[str]:
    """Names of the folders in ``root`` that hold a category, sorted."""
    return sorted(path.name for path in root.iterdir() if (path / "train").is_dir())


def _read(sample: Sample, data: bytes | None = None) -> tuple[Image.Image, Image.Image]:
    """Read an image and its mask, empty if it has none, which must have the same size."""
    picture = read_image(sample.image, data)
    if sample.mask is None:
        return picture, Image.new("L", picture.size)
    mask = read_mask(sample.mask)
    if mask.size != picture.size:
        raise SimpleNetError(f"{sample.mask}: {_size(mask)}, but its image is {_size(picture)}.")
    return picture, mask


def _header(path: Path) -> tuple[tuple[int, int], int]:
    """Size and orientation as the file's header states them, without decoding its pixels."""
    try:
        with Image.open(path, formats=FORMATS) as file:
            # Without this condition Pillow decodes a PNG to look for the orientation behind it.
            exif = file.getexif() if "exif" in file.info else {}
            return file.size, exif.get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as in _open
        raise SimpleNetError(f"{path}: not a readable image ({error}).") from error


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def _category_folder(root: Path, category: str) -> Path:
    if not root.is_dir():
        raise SimpleNetError(f"{root}: no such folder.")
    folder = root / category
    if not folder.is_dir():
        if (root / "train").is_dir():
            raise SimpleNetError(
                f"{root}: is a category itself. Name its parent as the data folder"
                f" and '{root.resolve().name}' as the category."
            )
        known = categories(root)
        if not known:
            raise SimpleNetError(f"{root}: no CATEGORY/train/good inside, not the MVTec AD layout.")
        raise SimpleNetError(f"{root}: no category '{category}'. Found: {', '.join(known)}.")
    if not (folder / "train" / "good").is_dir():
        raise SimpleNetError(f"{folder}: no train/good inside, not the MVTec AD layout.")
    return folder


def _test_samples(folder: Path) -> list[Sample]:
    test = folder / "test"
    if not test.is_dir():
        raise SimpleNetError(f"{test}: no such folder.")
    samples: list[Sample] = []
    for defect in sorted(_folders(test) | _folders(folder / "ground_truth")):
        images = image_files(test / defect) if (test / defect).is_dir() else []
        masks = {} if defect == "good" else _masks(folder / "ground_truth" / defect)
        for image in images:
            mask = masks.pop(f"{image.stem}_mask", None) or masks.pop(image.stem, None)
            samples.append(Sample(image, defect, mask))
        if masks:
            mask = next(iter(masks.values()))
            raise SimpleNetError(f"{mask}: a mask without an image in {test / defect}.")
    if not samples:
        raise SimpleNetError(f"{test}: no images in its folders.")
    defects = [sample for sample in samples if sample.label]
    unmasked = [sample.image for sample in defects if sample.mask is None]
    if unmasked and len(unmasked) < len(defects):
        raise SimpleNetError(
            f"{unmasked[0]}: no mask in {folder / 'ground_truth'}, and {len(unmasked)} of"
            f" {len(defects)} defect images are like it. Give every one a mask, or none."
        )
    return samples


def _folders(folder: Path) -> set[str]:
    """Names of the folders inside ``folder``, hidden ones left out; none if it is missing."""
    inside = folder.iterdir() if folder.is_dir() else ()
    return {path.name for path in inside if path.is_dir() and not path.name.startswith(".")}


def _masks(folder: Path) -> dict[str, Path]:
    """Masks by file name without suffix; a data set without masks has no such folder."""
    return {path.stem: path for path in image_files(folder)} if os.path.isdir(folder) else {}
