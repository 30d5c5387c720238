"""Chapter 1: any folder of photos as normal and defect samples with masks, and their pixels.

The layout is that of MVTec AD::

    root/category/train/good/000.png           normal images, the only ones trained on
    root/category/test/good/000.png            normal images kept for the test
    root/category/test/DEFECT/000.png          images with a defect
    root/category/ground_truth/DEFECT/000_mask.png     where the defect is

or one of those that :func:`find_samples` names.
"""

from __future__ import annotations

import io
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypedDict

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from scipy import ndimage
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD

try:  # phones' HEIC files: the optional extra `heic`
    from pillow_heif import register_heif_opener
except ImportError:
    pass
else:
    register_heif_opener()

Image.init()
FORMATS = tuple(
    name
    for name in (
        *("PNG", "JPEG", "MPO", "BMP", "DIB", "TIFF", "WEBP", "GIF", "PPM"),
        *("JPEG2000", "AVIF", "HEIF"),
    )
    if name in Image.OPEN
)
SUFFIXES = {suffix for suffix, name in Image.registered_extensions().items() if name in FORMATS}
SUFFIXES |= {".jif", ".mpo"}
STRETCH = 1.1  # at most: a photo of a more different shape keeps its own
TURNED = (5, 6, 7, 8)  # EXIF orientations of a camera held upright
SAMPLE_FORMAT = 339  # TIFF's tag; 1: unsigned
PAGED = {".tif", ".tiff", ".gif", ".webp", ".apng"}  # may have several pages or frames

#: What systems and programs put beside photos, in lower case; and all that starts with a dot.
SYSTEM = {
    *("@eadir", "#recycle", "#snapshot", "$recycle.bin", "__macosx", "__pycache__", "lost+found"),
    *("system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}
SYSTEMS, SEEN = "hidden or the system's", "links to what is read already or to nothing"
TRAIN, TEST = {"train", "training"}, {"test", "testing", "test_public"}
NOT_USED = {"validation", "valid", "val", "test_private", "test_private_mixed", "xyz"}
MASKS = {"ground_truth", "groundtruth", "gt", "masks", "mask"}
BETWEEN = {"data", "images", "image", "imgs", "rgb"}  # folders that say nothing of their images
GOOD = {"good", "ok", "normal"}
BAD = {"bad", "ng", "nok", "abnormal", "anomaly", "anomalies", "anomalous", "faulty", "nogood"}
BAD |= {"defect", "defects", "defective", "def", "notok"}
NOT = {"no", "not", "non", "without", "free"}
MASK_SUFFIX = re.compile(r"(?<=.)[ ._-](mask|gt|label|seg)$", re.IGNORECASE)
LAYOUTS = (
    "What can be read: a folder of good photos alone; folders OK and NG; or train/good, test/good,"
    " test/DEFECT and, if there are masks, ground_truth/DEFECT."
)

Size = tuple[int, int]  # width and height of a picture, in pixels
Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Sample:
    """One image on disk: its defect type (``"good"`` if none) and its mask, if it has one.

    The mask is a file, or a folder of several that are merged.

    Examples
    --------
    >>> Sample(Path("test/hole/000.png"), "hole").label, Sample(Path("000.png"), "good").label
    (1, 0)
    """

    image: Path
    defect: str
    mask: Path | None = None

    @property
    def label(self) -> int:
        """1 for a defect, 0 for a normal image."""
        return int(self.defect != "good")


class Item(TypedDict):
    """What a dataset hands to the loader; a batch has N in front of every shape.

    Examples
    --------
    >>> items = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> item: Item = items[0]
    >>> item["image"].shape, item["mask"].shape, item["label"]
    (torch.Size([3, 32, 32]), torch.Size([32, 32]), 1)
    """

    image: Tensor  #: (3, H, W), normalised
    mask: Tensor  #: (H, W) of bool, all False without a mask
    label: int  #: 1 for a defect, 0 for a normal image
    index: int  #: position in ``dataset.samples``


# Folders


def is_system(name: str) -> bool:
    """Whether a file or folder is hidden, or of a system's or a program's making.

    Examples
    --------
    >>> is_system("Thumbs.db"), is_system(".hidden"), is_system("photo.png")
    (True, True, False)
    """
    return name.startswith(".") or name.lower() in SYSTEM


def image_files(folder: Path, passed: Counter[str] | None = None) -> list[Path]:
    """The images in a folder and in the folders inside it, sorted by path.

    What is hidden, or a system's own, is never read. A link to a folder is followed if
    its target is not read anyway and does not lead back.

    Parameters
    ----------
    folder : Path
        Where to look.
    passed : Counter, optional
        Receives how many files were passed over, by the reason.

    Raises
    ------
    SimpleNetError
        If the folder itself cannot be opened; one inside it counts as passed over.

    Examples
    --------
    >>> from collections import Counter
    >>> (folder / "notes.txt").touch()
    >>> (folder / "photo.png").touch()
    >>> passed = Counter()
    >>> [path.name for path in image_files(folder, passed)], passed
    (['photo.png'], Counter({'.txt': 1}))
    """
    passed = Counter() if passed is None else passed
    found: list[Path] = []
    links: list[Path] = []
    inside = [folder]
    home = folder.resolve()
    seen = set(home.parents)
    while inside or links:
        here = inside.pop() if inside else links.pop(0)
        real = here.resolve()
        if real in seen:
            passed[SEEN] += 1
            continue
        seen.add(real)
        try:
            entries = list(here.iterdir())
        except OSError as error:
            if here == folder:
                raise SimpleNetError(f"{folder}: cannot be opened ({error.strerror}).") from error
            passed[f"folder {here}, which cannot be opened ({error.strerror})"] += 1
            continue
        for path in entries:
            if is_system(path.name):
                passed[SYSTEMS] += 1
            elif os.path.isdir(path):
                (links if path.is_symlink() else inside).append(path)
            elif not os.path.isfile(path):
                passed[SEEN] += 1
            elif path.suffix.lower() in SUFFIXES:
                found.append(path)
            else:
                passed[_unreadable(path)] += 1
    return sorted(found)


def _unreadable(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in (".heic", ".heif", ".hif"):
        return f"{suffix}, which needs: pip install 'simplenet_lib[heic]'"
    return suffix or "without a suffix"


def passed_over(passed: Counter[str]) -> str:
    """``"3 files passed over (2 .txt, 1 hidden or the system's)"``, or nothing.

    Examples
    --------
    >>> from collections import Counter
    >>> passed_over(Counter({".txt": 2}))
    '2 files passed over (2 .txt)'
    """
    if not passed:
        return ""
    count = sum(passed.values())
    reasons = ", ".join(f"{number} {reason}" for reason, number in sorted(passed.items()))
    return f"{count} {'files' if count > 1 else 'file'} passed over ({reasons})"


def but_passed_over(passed: Counter[str] | None) -> str:
    """The same behind a sentence that says what is missing, or nothing.

    Examples
    --------
    >>> from collections import Counter
    >>> f"no images found{but_passed_over(Counter({'.txt': 2}))}."
    'no images found, but 2 files passed over (2 .txt).'
    """
    return f", but {passed_over(passed)}" if passed else ""


def images_outside(output: Path, folder: Path, passed: Counter[str]) -> list[Path]:
    """The images in a folder, see :func:`image_files`, without those of an earlier output in it.

    Examples
    --------
    >>> from collections import Counter
    >>> (folder / "out").mkdir()
    >>> for name in ("photo.png", "out/photo.png"):
    ...     (folder / name).touch()
    >>> [found.name for found in images_outside(folder / "out", folder, Counter())]
    ['photo.png']
    """
    out = output.resolve()
    return [path for path in image_files(folder, passed) if not path.resolve().is_relative_to(out)]


def kind_of(name: str) -> str | None:
    """``"good"`` or ``"bad"`` if a folder's name says so, in any case: OK, Good, not_ok.

    Examples
    --------
    >>> kind_of("OK"), kind_of("not_ok"), kind_of("hole")
    ('good', 'bad', None)
    """
    words = set(re.split(r"[ ._-]+", name.lower()))
    good, bad, negated = (bool(words & some) for some in (GOOD, BAD, NOT))
    if good == bad:
        return None
    return "good" if good != negated else "bad"


@dataclass
class Found:
    """What a folder holds.

    Attributes
    ----------
    train, test : list of Sample
        Normal images to train on; images to test with.
    passed : Counter
        How many files were passed over, by the reason.

    Examples
    --------
    >>> Found(test=[Sample(Path("0.png"), "hole"), Sample(Path("1.png"), "good")]).summary()
    'Found to test with 1 good, 1 hole; 0 masks.'
    """

    train: list[Sample] = field(default_factory=list)
    test: list[Sample] = field(default_factory=list)
    passed: Counter[str] = field(default_factory=Counter)

    def summary(self) -> str:
        """One sentence: so many normal, of each defect, masks, and files passed over."""
        kinds = Counter(sample.defect for sample in self.test)
        tests = [f"{kinds.pop('good')} good"] if "good" in kinds else []
        tests += [f"{count} {kind}" for kind, count in sorted(kinds.items())]
        masks = sum(sample.mask is not None for sample in self.test)
        parts = [f"{len(self.train)} normal images to train on"] if self.train else []
        parts += [f"to test with {', '.join(tests)}; {masks} masks"] if tests else []
        parts += [passed_over(self.passed)] if self.passed else []
        return f"Found {'; '.join(parts) or 'nothing'}."


def photos(folder: Path, passed: Counter[str] | None = None) -> list[Sample]:
    """Every image in a folder of good photos and the folders in it, as normal samples.

    Raises
    ------
    SimpleNetError
        If there are none, or the name of a folder or file says that not all are good.

    Examples
    --------
    >>> samples = photos(data / "nut" / "train" / "good")
    >>> len(samples), samples[0].image.name, samples[0].defect
    (6, '000.png', 'good')
    """
    images = image_files(folder, passed)
    if not images:
        raise SimpleNetError(f"{folder}: no normal images{but_passed_over(passed)}. {LAYOUTS}")
    every = {image.with_suffix("") for image in images}
    for image in images:
        names = {part.lower() for part in image.relative_to(folder).parent.parts}
        odd = names & (TRAIN | TEST | MASKS) or "bad" in map(kind_of, names)
        if odd or _is_beside(image, every):
            above = [here for here in image.parents if here.is_relative_to(folder)]
            better = next((here.parent for here in above[1:] if is_category(here)), None)
            hint = f"Name {better} as the data." if better else LAYOUTS
            raise SimpleNetError(
                f"{folder}: not photos of good parts alone, for it holds"
                f" {image.relative_to(folder)}. {hint}"
            )
    return [Sample(image, "good") for image in images]


@dataclass(frozen=True)
class _Place:
    """What the folders above an image say of it."""

    image: Path
    split: str  # train, test, a split that is not used, or nothing
    is_mask: bool
    parts: tuple[str, ...]  # the other folders

    @property
    def kind(self) -> str:
        return self.parts[0] if self.parts else ""


def _place(image: Path, folder: Path) -> _Place:
    split, is_mask, parts = "", False, []
    for depth, part in enumerate(image.relative_to(folder).parent.parts):
        name = part.lower()
        if name in MASKS or (depth == 0 and name in ("label", "labels")):
            is_mask = True
        elif name in NOT_USED and (depth == 0 or name == "xyz"):
            split = part
        elif depth == 0 and name in TRAIN | TEST:
            split = "train" if name in TRAIN else "test"
        elif name not in BETWEEN:
            parts.append(part)
    return _Place(image, split, is_mask, tuple(parts))


def _is_beside(image: Path, every: Collection[Path]) -> bool:
    """Whether an image is the mask of another in its folder; ``every`` are without suffix."""
    base = _base(image.stem)
    return base != image.stem and image.with_name(base) in every


def _base(stem: str) -> str:
    return MASK_SUFFIX.sub("", stem)


def is_category(folder: Path) -> bool:
    """Whether a folder has what makes a category: train, test and masks, OK, NG, or VisA's Data.

    Examples
    --------
    >>> is_category(data / "nut"), is_category(data)
    (True, False)
    """
    inside = {path.name.lower(): path for path in _folders(folder)}
    if "data" in inside and inside.keys() == {"data"}:
        return any(path.name.lower() == "images" for path in _folders(inside["data"]))
    if inside.keys() & TRAIN or (inside.keys() & TEST and inside.keys() & MASKS):
        return True
    below = {path.name.lower() for one in inside.values() for path in _folders(one)}
    return any(map(kind_of, inside)) and not below & TRAIN  # those are categories, beside others


def categories(root: Path) -> list[str]:
    """Names of the folders in ``root`` that hold a category, sorted.

    Examples
    --------
    >>> categories(data)
    ['nut']
    """
    return sorted(path.name for path in _folders(root) if is_category(path))


def _folders(folder: Path) -> list[Path]:
    """The folders inside ``folder``; none if it cannot be opened, which `image_files` tells."""
    try:
        inside = list(folder.iterdir())
    except OSError:
        return []
    return [path for path in inside if os.path.isdir(path) and not is_system(path.name)]


def find_samples(folder: Path) -> Found:
    """Understand the folder of one category by the names of the folders in it.

    Read are, in any case: ``train`` and ``test`` with ``good`` (or ``OK``, ``normal``) and
    one folder a defect, masks in ``ground_truth`` or ``masks``, as in MVTec AD, its
    successors LOCO, 3D (its RGB images) and AD 2 (``test_public``); ``train`` with photos
    alone; and without ``train`` the folders ``OK`` and ``NG`` (``good`` and ``bad``,
    ``Normal`` and ``Anomaly``, or defects by name), also in ``Data/Images`` as in VisA. Of
    such every fifth normal image is kept for the test, if there are five or more.

    A mask has its image's name, or that with ``_mask``, ``_gt``, ``_label`` or ``_seg``; it
    may lie beside its image, and a folder of several has the image's name.

    Raises
    ------
    SimpleNetError
        If folders contradict each other, a mask has no image, or only some defects have masks.

    Examples
    --------
    >>> found = find_samples(data / "nut")
    >>> len(found.train), len(found.test)
    (6, 7)
    >>> found.test[0].defect, found.test[0].mask.name
    ('broken_corner', '000_mask.png')
    """
    found = Found()
    images = image_files(folder, found.passed)
    every = {image.with_suffix("") for image in images}
    places: list[_Place] = []
    masks: list[_Place] = []
    for image in images:
        place = _place(image, folder)
        (masks if place.is_mask or _is_beside(image, every) else places).append(place)
    laid_out = any(path.name.lower() in TRAIN | TEST for path in _folders(folder))
    if laid_out:
        _by_split(places, found)
    else:
        _by_kind(places, found)
    if found.test:
        _match(masks, folder, found)
    return found


def _by_split(places: Sequence[_Place], found: Found) -> None:
    """Sort images that lie in train and test."""
    kinds = {place: {kind_of(part) for part in place.parts} for place in places}
    sure = any("good" in kinds[place] for place in places if place.split == "train")
    for place in places:
        if place.split == "train":
            if "bad" in kinds[place] or (sure and "good" not in kinds[place]):
                found.passed[f"in train/{place.kind}, not trained on"] += 1
            else:
                found.train.append(Sample(place.image, "good"))
        elif place.split == "test" and place.parts:
            good = kind_of(place.kind) == "good"
            if ("bad" if good else "good") in map(kind_of, place.parts[1:]):
                raise SimpleNetError(
                    f"{place.image.parent}: good or a defect? The folder directly in test says"
                    f" which, and it is '{place.kind}'. {LAYOUTS}"
                )
            found.test.append(Sample(place.image, "good" if good else place.kind))
        elif place.split == "test":
            found.passed["directly in test, where no folder says which kind"] += 1
        else:
            where = place.split or place.kind
            found.passed[f"in {where}, not used" if where else "beside the folders"] += 1


def _by_kind(places: Sequence[_Place], found: Found) -> None:
    """Sort images by folders such as OK and NG; every fifth normal one is kept for the test."""
    sure = any(kind_of(place.kind) == "good" for place in places)
    normal: list[Sample] = []
    for place in places:
        kind = kind_of(place.kind)
        if set(map(str.lower, place.parts)) & (TRAIN | TEST):
            raise SimpleNetError(
                f"{place.image.parent}: train or test inside of a folder that is neither. {LAYOUTS}"
            )
        if place.split:
            found.passed[f"in {place.split}, not used"] += 1
        elif kind == "good" or (not sure and kind is None):
            normal.append(Sample(place.image, "good"))
        elif place.parts:
            found.test.append(Sample(place.image, place.kind))
        else:
            found.passed["beside the folders, so of no kind"] += 1
    if found.test:
        found.test = sorted(found.test + normal[4::5], key=lambda sample: sample.image)
        del normal[4::5]
    found.train = normal


def _match(masks: Sequence[_Place], folder: Path, found: Found) -> None:
    """Give the defects in ``found.test`` their masks."""
    alike: dict[str, list[tuple[Sample, tuple[str, ...]]]] = {}
    for sample in found.test + found.train:
        parts = tuple(part.lower() for part in _place(sample.image, folder).parts)
        alike.setdefault(sample.image.stem, []).append((sample, parts))

    def image_of(name: str, parts: tuple[str, ...]) -> Sample | None:
        """The one image of this name in just these folders, or in these and others."""
        inside = [pair for pair in alike.get(name, []) if set(parts) <= set(pair[1])]
        inside = [pair for pair in inside if pair[1] == parts] or inside
        return inside[0][0] if len(inside) == 1 else None

    given: dict[Path, Path] = {}
    for place in masks:
        parts, stem, mask = tuple(map(str.lower, place.parts)), place.image.stem, place.image
        match = image_of(_base(stem), parts) or image_of(stem, parts)
        if match is None and parts:  # one of several, in a folder that has the image's name
            match, mask = image_of(place.parts[-1], parts[:-1]), mask.parent
        if match is None and kind_of(place.kind) == "good":
            continue
        if match is None or given.setdefault(match.image, mask) != mask:
            raise SimpleNetError(
                f"{place.image}: a mask without an image in {folder / 'test' / place.kind}."
            )
    defects = [sample for sample in found.test if sample.label]
    unmasked = [sample.image for sample in defects if sample.image not in given]
    if len(unmasked) == len(defects):
        return
    if unmasked:
        raise SimpleNetError(
            f"{unmasked[0]}: no mask, and {len(unmasked)} of {len(defects)} defect images are"
            " like it. Give every one a mask, or none."
        )
    found.test = [
        replace(sample, mask=given[sample.image]) if sample.label else sample
        for sample in found.test
    ]


# Pixels


class MaskSizeError(SimpleNetError):
    """A mask has another size than its image.

    Examples
    --------
    >>> Image.new("RGB", (8, 8)).save(folder / "photo.png")
    >>> Image.new("L", (4, 4)).save(folder / "mask.png")
    >>> sample = Sample(folder / "photo.png", "hole", folder / "mask.png")
    >>> ImageFiles([sample], make_transform(32, 32))[0]
    Traceback (most recent call last):
        ...
    simplenet_lib.dataset.MaskSizeError: ...mask.png: 4x4, but its image is 8x8.
    """


def read_file(path: Path) -> bytes:
    """The bytes of an image file.

    Raises
    ------
    SimpleNetError
        If it is missing or cannot be read.

    Examples
    --------
    >>> read_file(data / "nut" / "train" / "good" / "000.png")[1:4]
    b'PNG'
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise SimpleNetError(f"{path}: not a readable image ({error}).") from error


def _open(path: Path, data: bytes | None = None, keep: Size | None = None) -> Image.Image:
    """Decode an image's first page and turn it upright; ``data`` are its bytes, if read.

    ``keep``: width and height, upright, that are enough of a JPEG, or None for all of it.
    """
    data = read_file(path) if data is None else data
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if keep and file.format in ("JPEG", "MPO"):
                turned = file.getexif().get(ExifTags.Base.Orientation) in TURNED
                file.draft(None, keep[::-1] if turned else keep)
            image: Image.Image = ImageOps.exif_transpose(file)
            image.load()
            if image.mode == "I" and _is_unsigned(file) and np.asarray(image).min() < 0:
                raise ValueError("it holds values above 2147483647; save it as 16 bits")
    except Exception as error:  # Pillow's decoders raise many types on damaged files
        raise SimpleNetError(_not_readable(path, error)) from error
    return image


def _is_unsigned(file: Image.Image) -> bool:
    """Whether the numbers of a TIFF are unsigned: Pillow makes the larger of 32 bits negative."""
    formats = getattr(file, "tag_v2", {}).get(SAMPLE_FORMAT, (1,))
    return file.format == "TIFF" and formats == (1,)


def _not_readable(path: Path, error: Exception) -> str:
    reason = str(error)
    if path.exists() and not path.stat().st_size:
        reason = "the file is empty"
    elif isinstance(error, UnidentifiedImageError):
        reason = "no image, or of an unknown format"
    large = isinstance(error, Image.DecompressionBombError)
    hint = " If it is a scan of that size, allow it with --max-pixels." if large else ""
    return f"{path}: not a readable image ({reason}).{hint}"


def as_rgb(image: Image.Image, white: float = 0) -> Image.Image:
    """An image of any depth, with or without transparency, as 8-bit RGB.

    Parameters
    ----------
    image : Image
        Of any mode that Pillow has.
    white : float
        The value that is white in an image of more than 8 bits or of floating point; 0
        for 65535, and 1 for floating point. What is transparent is laid on white.

    Examples
    --------
    >>> deep = Image.fromarray(np.array([[0, 4095]], dtype=np.uint16))
    >>> np.asarray(as_rgb(deep, white=4095)).tolist()
    [[[0, 0, 0], [255, 255, 255]]]
    """
    if image.mode.startswith(("I", "F")):
        white = white or (1 if image.mode == "F" else 65535)
        values = np.nan_to_num(np.clip(np.asarray(image, dtype=np.float64), 0, white))
        # 0.001: a product that should be whole may be a little less.
        image = Image.fromarray(np.floor(values * (255 / white) + 0.001).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def read_image(
    path: Path, data: bytes | None = None, white: float = 0, keep: Size | None = None
) -> Image.Image:
    """Read an image of any depth, grey, palette or colour, as upright 8-bit RGB.

    Parameters
    ----------
    path : Path
        The file. Of several pages or frames the first is read.
    data : bytes, optional
        Its bytes, if they have been read already.
    white : float
        See :func:`as_rgb`.
    keep : (int, int), optional
        A JPEG may be decoded at a half, a quarter or an eighth of its size, which takes less
        time, if at least this width and height are left.

    Raises
    ------
    SimpleNetError
        If the file is missing, damaged, too large to be a photograph, or not an image.

    Examples
    --------
    >>> image = read_image(data / "nut" / "train" / "good" / "000.png")
    >>> image.mode, image.size
    ('RGB', (64, 64))
    """
    return as_rgb(_open(path, data, keep), white)


def as_picture(
    source: Path | str | bytes | Image.Image | NDArray[Any],
    name: str,
    channels: Literal["rgb", "bgr"] = "rgb",
    white: float = 0,
    keep: Size | None = None,
) -> tuple[Image.Image, Size]:
    """Any image of a program's as upright 8-bit RGB, and its width and height.

    Parameters
    ----------
    source : Path, str, bytes, Image or ndarray
        A file or its bytes; an image of Pillow's, of any mode; or an array (H, W), (H, W, 1),
        (H, W, 3) or (H, W, 4): of uint8; of floating point from 0 to ``white``; of uint16
        if ``white`` is known.
    name : str
        What an error calls it.
    channels : {"rgb", "bgr"}
        Order of the channels of an array; OpenCV's is ``"bgr"``.
    white, keep
        See :func:`read_image`. The size is that of the whole.

    Raises
    ------
    SimpleNetError
        If it cannot be read, or could be meant in more than one way.

    Examples
    --------
    >>> frame = np.zeros((48, 64, 3), np.uint8)
    >>> picture, size = as_picture(frame, "frame 1", channels="bgr")
    >>> picture.mode, size
    ('RGB', (64, 48))
    """
    if channels not in ("rgb", "bgr"):
        raise SimpleNetError(f"channels is '{channels}', not rgb or bgr.")
    if channels == "bgr" and not isinstance(source, np.ndarray):
        raise SimpleNetError(f"{name}: channels='bgr' is for arrays; a file says its order itself.")
    if isinstance(source, str | Path):
        name, source = str(source), read_file(Path(source))
    if isinstance(source, bytes | bytearray | memoryview):
        path, data = Path(name), bytes(source)
        picture = read_image(path, data, white, keep)
        return picture, _whole_size(picture, path, data) if keep else picture.size
    if isinstance(source, Image.Image):
        try:
            picture = as_rgb(ImageOps.exif_transpose(source), white)
        except Exception as error:  # it may be a damaged file that is decoded only now
            raise SimpleNetError(f"{name}: not a readable image ({error}).") from error
        return picture, picture.size
    if not isinstance(source, np.ndarray):
        raise SimpleNetError(
            f"{name}: a {type(source).__name__}. Give a path, bytes, a Pillow image or a NumPy"
            " array of height, width and channels."
        )
    picture = _array_as_picture(source, name, channels, white)
    return picture, picture.size


def _array_as_picture(array: NDArray[Any], name: str, channels: str, white: float) -> Image.Image:
    what = f"{name}: an array of {array.dtype} and shape {array.shape}"
    if array.ndim == 4:
        raise SimpleNetError(f"{what}. Several images? Give them as a list.")
    if array.ndim == 3 and array.shape[0] in (1, 3, 4) and array.shape[2] not in (1, 3, 4):
        raise SimpleNetError(f"{what}. Channels come last: array.transpose(1, 2, 0).")
    if array.ndim not in (2, 3) or array.size == 0 or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise SimpleNetError(f"{what}. Expected height, width and 1, 3 or 4 channels.")
    if array.dtype == np.uint16 and not white:
        raise SimpleNetError(
            f"{what}. The model was trained on photos of 8 bits and knows no white level for 16:"
            " give uint8."
        )
    if array.dtype.kind == "f":
        top = white or 1
        low, high = float(array.min()), float(array.max())
        if not (low >= 0 and high <= top):  # NaN, too
            raise SimpleNetError(
                f"{what} holds values from {low:g} to {high:g}. Floating point goes from 0 to"
                f" {top:g}; or give uint8."
            )
    elif array.dtype not in (np.uint8, np.uint16):
        raise SimpleNetError(f"{what}. Give uint8 from 0 to 255, or floating point from 0 to 1.")
    planes = array[..., None] if array.ndim == 2 else array
    if channels == "bgr" and planes.shape[2] >= 3:
        planes = planes[..., [2, 1, 0, *range(3, planes.shape[2])]]
    if planes.dtype == np.uint8:
        eight = [planes[..., number] for number in range(planes.shape[2])]
    else:
        deep = np.float32 if planes.dtype.kind == "f" else np.uint16
        eight = [
            np.asarray(as_rgb(Image.fromarray(planes[..., number].astype(deep)), white))[..., 0]
            for number in range(planes.shape[2])
        ]
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[len(eight)]
    return as_rgb(Image.merge(mode, [Image.fromarray(plane) for plane in eight]))


def read_mask(path: Path) -> Image.Image:
    """Read a mask as 8-bit 0 and 1: every value but that of the background, 0, is defect.

    A mask painted on transparency is read by it. Values near 0 in an otherwise bright
    mask are the traces of JPEG, and background, unless they fill areas as labels do.

    Parameters
    ----------
    path : Path
        The file, or a folder of several masks of one image.

    Raises
    ------
    SimpleNetError
        If a file is missing, damaged, or not an image, or if several differ in size.

    Examples
    --------
    >>> Image.fromarray(np.array([[0, 255], [0, 0]], np.uint8)).save(folder / "mask.png")
    >>> np.asarray(read_mask(folder / "mask.png")).tolist()
    [[0, 1], [0, 0]]
    """
    if path.is_dir():
        several = [read_mask(file) for file in image_files(path)]
        if len({mask.size for mask in several}) > 1:
            raise MaskSizeError(f"{path}: its masks differ in size.")
        return Image.fromarray(np.maximum.reduce([np.asarray(mask) for mask in several]))
    image = _open(path)
    values = _mask_values(image)
    high = values.max()
    low = (values > 0) & (values <= high / 4)
    if high > 32 and not _fills_areas(values, low):
        values = np.where(low, 0, values)
    return Image.fromarray((values > 0).astype(np.uint8))


def _mask_values(image: Image.Image) -> NDArray[Any]:
    """Of a mask in any mode, one value a pixel, 0 for the background."""
    if image.mode.startswith(("I", "F")):
        whole: NDArray[Any] = np.nan_to_num(np.asarray(image))
        return whole
    if image.has_transparency_data:
        alpha: NDArray[Any] = np.asarray(image.convert("RGBA"))[..., 3]
        if alpha.min() < alpha.max() or not alpha.any():
            return alpha
    values: NDArray[Any] = np.asarray(image.convert("RGB")).max(axis=2)
    if image.mode == "P" and values.min() == values.max():  # a palette of one colour
        return np.asarray(image)
    return values


def _fills_areas(values: NDArray[Any], some: NDArray[np.bool_]) -> bool:
    """Whether most of ``some`` pixels lie in blocks of 2 x 2 of one value."""
    if min(values.shape) < 2:
        return False
    blocks = np.lib.stride_tricks.sliding_window_view(values, (2, 2)).reshape(
        values.shape[0] - 1, values.shape[1] - 1, 4
    )
    same = (blocks == blocks[..., :1]).all(axis=2)
    flat = ndimage.binary_dilation(np.pad(same, ((0, 1), (0, 1))), np.ones((2, 2)), origin=(-1, -1))
    return bool(2 * (flat & some).sum() >= max(1, some.sum()))


def make_transform(size: int | tuple[int, int], crop: int | tuple[int, int]) -> Transform:
    """Resize, cut out the centre, normalise; image and mask together.

    The image is interpolated with antialiasing, the mask by its nearest pixel, so that it
    keeps the values 0 and 1. A defect that no pixel is left of keeps one, at its centre. What
    becomes of a photo of another shape :class:`ResizeBoth` says.

    Parameters
    ----------
    size, crop : int or (int, int)
        Height and width in pixels of the resized image and of its central cut-out;
        one number for a square.

    Examples
    --------
    >>> from torchvision import tv_tensors
    >>> transform = make_transform(256, 224)
    >>> image = tv_tensors.Image(torch.zeros(3, 480, 640, dtype=torch.uint8))
    >>> mask = tv_tensors.Mask(torch.zeros(1, 480, 640, dtype=torch.uint8))
    >>> [tuple(one.shape) for one in transform(image, mask)]
    [(3, 224, 224), (1, 224, 224)]
    """
    height, width = (size, size) if isinstance(size, int) else size
    transform: Transform = v2.Compose(
        [
            ResizeBoth((height, width), antialias=True),
            v2.CenterCrop(crop),
            v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True),
            v2.Normalize(IMAGENET_MEAN, IMAGENET_STD),
        ]
    )
    return transform


def enough(transform: Transform) -> Size | None:
    """Width and height that are kept of a large JPEG: twice what it is resized to.

    The rest is resized by the transform, with antialiasing, so that what the network sees
    differs by a level or two of 255. None, all of it, for other transforms.

    Examples
    --------
    >>> enough(make_transform((256, 320), 224))
    (640, 512)
    """
    first = getattr(transform, "transforms", [None])[0]
    if not isinstance(first, ResizeBoth):
        return None
    height, width = first.size
    return 2 * width, 2 * height


def fitted(height: int, width: int, size: tuple[int, int]) -> tuple[int, int]:
    """Height and width that a photo takes of the rectangle ``size``, in whose middle it stands.

    All of it where the two shapes differ by a tenth or less, since a photo may be stretched so
    much. One of another shape keeps its own and touches two sides.

    Examples
    --------
    >>> fitted(480, 640, (304, 400)), fitted(480, 640, (304, 608))
    ((304, 400), (304, 405))
    """
    wider = (width * size[0]) / (height * size[1])
    if 1 / STRETCH <= wider <= STRETCH:
        return size
    if wider > 1:
        return max(1, round(size[0] / wider)), size[1]
    return size[0], max(1, round(size[1] * wider))


def own_part(width: int, height: int, config: Config) -> tuple[slice, slice]:
    """Rows and columns of what the network sees that show the photo, and no mirror image of it.

    Examples
    --------
    >>> from simplenet_lib.config import preset
    >>> own_part(640, 480, preset("fast"))
    (slice(48, 336, None), slice(0, 384, None))
    """
    rows, columns = (
        slice(max(start, 0), min(start + taken, seen))
        for start, taken, seen in _places(width, height, config)
    )
    return rows, columns


def _places(width: int, height: int, config: Config) -> list[tuple[int, int, int]]:
    """Along rows and columns: where in the view a photo begins, how long it is, and the view."""
    taken = fitted(height, width, config.size)
    return [
        ((whole - own) // 2 - round((whole - seen) / 2), own, seen)  # as CenterCrop rounds it
        for whole, seen, own in zip(config.size, config.seen, taken, strict=True)
    ]


def seen_box(width: int, height: int, config: Config) -> tuple[int, int, int, int]:
    """The central part of a ``width`` x ``height`` image that the network sees.

    Returns
    -------
    tuple of int
        Left, top, right, bottom in pixels.

    Examples
    --------
    >>> from simplenet_lib.config import preset
    >>> seen_box(640, 480, preset("paper", ratio=0.75))
    (40, 27, 600, 453)
    >>> seen_box(640, 480, preset("fast"))
    (0, 0, 640, 480)
    """
    (top, bottom), (left, right) = (
        [round(length * min(max(at, 0), taken) / taken) for at in (-start, seen - start)]
        for length, (start, taken, seen) in zip(
            (height, width), _places(width, height, config), strict=True
        )
    )
    # Of an image of a few pixels at least one is seen.
    left, top = min(left, width - 1), min(top, height - 1)
    return left, top, max(right, left + 1), max(bottom, top + 1)


class ResizeBoth(v2.Resize):  # type: ignore[misc]  # torchvision carries no types
    """Resize an image and its mask, of which no region is lost.

    The mask takes its nearest pixels. A connected region that none of them belongs to
    keeps one pixel, where its middle was. A photo of another shape than this rectangle, see
    :func:`fitted`, stands in its middle, between its own mirror images.

    Examples
    --------
    >>> from torchvision import tv_tensors
    >>> mask = torch.zeros(1, 64, 64, dtype=torch.uint8)
    >>> mask[0, 5, 5] = 1
    >>> resize = ResizeBoth((4, 4), antialias=True)
    >>> _, small = resize(tv_tensors.Image(torch.zeros(3, 64, 64)), tv_tensors.Mask(mask))
    >>> small[0].nonzero().tolist()
    [[0, 0]]
    """

    def forward(
        self, image: tv_tensors.Image, mask: tv_tensors.Mask
    ) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
        """Resize an image (3, h, w) and a mask of 0 and 1, (1, h, w)."""
        height, width = image.shape[1:]
        taken = list(fitted(height, width, tuple(self.size)))
        small = v2.functional.resize(image, taken, antialias=self.antialias)
        marked = v2.functional.resize(mask, taken)
        if mask.any():  # of a large photo, labelling takes longer than reading it
            self._keep_regions(mask, marked)
        if taken != list(self.size):
            small, marked = (self._amid_mirrors(one) for one in (small, marked))
        return small, marked

    def _keep_regions(self, mask: tv_tensors.Mask, marked: tv_tensors.Mask) -> None:
        regions, count = ndimage.label(mask[0].numpy(), np.ones((3, 3)))
        left = v2.functional.resize(
            tv_tensors.Mask(torch.from_numpy(regions)[None]), list(marked.shape[1:])
        )
        lost = np.setdiff1d(np.arange(1, count + 1), left.numpy())
        places, of = np.argwhere(regions), regions[regions > 0]
        order = np.argsort(of, kind="stable")
        ends = (np.searchsorted(of[order], lost, side) for side in ("left", "right"))
        middle = places[order[sum(ends) // 2]] + 0.5
        rows, columns = (middle * marked.shape[1:] / regions.shape).astype(int).T
        marked[0, rows, columns] = 1

    def _amid_mirrors(self, values: Tensor) -> Tensor:
        places = []
        for whole, taken in zip(self.size, values.shape[1:], strict=True):
            at = (torch.arange(whole) - (whole - taken) // 2) % (2 * taken)
            places.append(torch.minimum(at, 2 * taken - 1 - at))
        rows, columns = places
        filled: Tensor = tv_tensors.wrap(values[:, rows[:, None], columns], like=values)
        return filled


def as_seen(picture: Image.Image, transform: Transform) -> Tensor:
    """An image without a mask as the network sees it, (3, H, W).

    Examples
    --------
    >>> as_seen(Image.new("RGB", (640, 480)), make_transform(256, 224)).shape
    torch.Size([3, 224, 224])
    """
    no_mask = tv_tensors.Mask(torch.zeros(1, 1, 1, dtype=torch.uint8))
    image, _ = transform(tv_tensors.Image(v2.functional.pil_to_tensor(picture)), no_mask)
    return image.as_subclass(Tensor)


def upright_size(path: Path, data: bytes | None = None) -> Size:
    """Width and height of a photo, upright, as its file's header states them.

    Examples
    --------
    >>> Image.new("RGB", (640, 480)).save(folder / "photo.png")
    >>> upright_size(folder / "photo.png")
    (640, 480)
    """
    size, orientation = _header(path, data)
    return size[::-1] if orientation in TURNED else size


def shape_of(samples: Sequence[Sample]) -> tuple[float, float]:
    """Median height over width of some photos, upright, and median side √(height · width).

    As their files' headers state it.

    Examples
    --------
    >>> Image.new("RGB", (640, 480)).save(folder / "photo.png")
    >>> ratio, side = shape_of(photos(folder))
    >>> ratio, round(side)
    (0.75, 554)
    """
    sizes = [upright_size(sample.image) for sample in samples]
    shapes = [(height / width, math.sqrt(width * height)) for width, height in sizes]
    ratio, side = np.median(shapes, axis=0)
    return float(ratio), float(side)


@dataclass
class Checked:
    """What reading all files once has shown.

    Attributes
    ----------
    damaged : dict of Path to str
        A sentence on every file that cannot be read.
    white : float
        What white is in images of more than 8 bits, see :func:`white_level`; 0 without.
    notes : list of str
        Sentences on what a user should know of these files.

    Examples
    --------
    >>> _ = (folder / "photo.png").write_bytes(b"no image")
    >>> checked: Checked = check(photos(folder))
    >>> list(checked.damaged.values())
    ['...photo.png: not a readable image (no image, or of an unknown format).']
    """

    damaged: dict[Path, str] = field(default_factory=dict)
    white: float = 0
    notes: list[str] = field(default_factory=list)


def white_level(highest: float, floating: bool) -> float:
    """White of images whose highest value is known: full scale of the depth that holds it.

    Of whole numbers the depths are 8, 10, 12 ... bits. Floating-point values up to 1 have
    a power of two, 1 as a rule; beyond 1 they count as whole numbers of any depth.

    Examples
    --------
    >>> white_level(3000, floating=False), white_level(0.9, floating=True)
    (4095.0, 1.0)
    """
    if highest <= 0:
        return 1 if floating else 65535
    if floating and highest <= 1:
        return float(2.0 ** math.ceil(math.log2(highest)))
    bits = math.ceil(math.log2(math.ceil(highest) + 1))
    return float(2**bits - 1 if floating else 2 ** max(8, bits + bits % 2) - 1)


def check(samples: Sequence[Sample], white: float = 0, *, progress: bool = False) -> Checked:
    """Read every image and mask, so that nothing is found damaged only after hours.

    Parameters
    ----------
    samples : sequence of Sample
        The images; white is that of the normal ones.
    white : float
        What white is, if it is known; 0 to find it.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    SimpleNetError
        If images of whole numbers and of floating point are mixed: no white fits both.

    Examples
    --------
    >>> checked = check(find_samples(data / "nut").train)
    >>> checked.damaged, checked.white, checked.notes
    ({}, 0, [])
    """
    checked = Checked()
    deep: dict[str, Path] = {}
    highest, usual, several, colours = 0.0, [], 0, 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as readers,
        tqdm(total=len(samples), desc="check", unit="image", disable=not progress, delay=1) as bar,
    ):
        for sample, (levels, error) in zip(samples, readers.map(_levels, samples), strict=True):
            bar.update()
            if levels is None:
                checked.damaged[sample.image] = error
                continue
            several += levels.pages > 1
            colours += levels.deep_colour
            if sample.label:
                continue
            if levels.depth:
                deep.setdefault(levels.depth, sample.image)
                highest = max(highest, levels.highest)
            usual.append(levels)
    if len(deep) > 1:
        raise SimpleNetError(
            f"{deep['F']}: floating point, but {deep['I']}: whole numbers, and white cannot be the"
            " same in both. Save all in one way."
        )
    if deep:
        checked.white = white or white_level(highest, "F" in deep)
    if several:
        checked.notes.append(
            f"{several} of the files have several pages or frames: the first of each is read."
        )
    if colours:
        checked.notes.append(
            f"{colours} of the files hold colours of 16 bits, of which the upper 8 are read. If"
            " they use a small part of these, save them as 8 bits, or as grey."
        )
    bright = max((levels.bright(checked.white) for levels in usual), default=1)
    if bright < 1 / 8:
        remedy = (
            f"White is {checked.white:g} for them; if that is a broken pixel's, say --white."
            if deep
            else "Expose longer, or scale them."
        )
        checked.notes.append(f"The training photos use {bright:.1%} of their range. {remedy}")
    return checked


@dataclass(frozen=True)
class _Levels:
    """The values in one image: of an image of 8 bits ``depth`` is empty."""

    depth: str
    highest: float
    usual: float
    pages: int
    deep_colour: bool

    def bright(self, white: float) -> float:
        return self.usual / (white if self.depth else 255)


def _levels(sample: Sample) -> tuple[_Levels | None, str]:
    """What values an image has, or why it or its mask cannot be read."""
    try:
        data = read_file(sample.image)
        image = _open(sample.image, data)
        if sample.mask is not None:
            read_mask(sample.mask)
    except SimpleNetError as error:
        return None, str(error)
    about = _pages_and_depth(data)
    if image.mode.startswith(("I", "F")):
        values = np.asarray(image)
        finite = values[np.isfinite(values)] if image.mode == "F" else values
        if not finite.size:
            finite = np.zeros(1)
        usual = float(np.percentile(finite.ravel()[::7], 99.9))
        return _Levels(image.mode[0], float(finite.max()), usual, *about), ""
    # Of a palette and of ink the highest value says nothing.
    if image.mode not in ("L", "LA", "RGB", "RGBA"):
        return _Levels("", 255, 255, *about), ""
    bands = image.getextrema()
    highest = float(max(np.ravel(bands[:3] if image.mode.startswith("RGB") else bands)[1::2]))
    return _Levels("", highest, highest, *about), ""


def has_pages(path: Path) -> bool:
    """Whether an image file, of which the first page is read, has others.

    Examples
    --------
    >>> pages = [Image.new("L", (8, 8), grey) for grey in (0, 255)]
    >>> pages[0].save(folder / "scan.tiff", save_all=True, append_images=pages[1:])
    >>> has_pages(folder / "scan.tiff")
    True
    """
    return path.suffix.lower() in PAGED and _pages_and_depth(read_file(path))[0] > 1


def _pages_and_depth(data: bytes) -> tuple[int, bool]:
    """How many pages or frames there are, and whether colours have more than 8 bits.

    One page if those behind the first are damaged. Of deep colours Pillow reads the upper bits.
    """
    pages, deep = 1, False
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            deep = file.mode.startswith("RGB") and ";16" in str(getattr(file, "tile", ""))
            pages = getattr(file, "n_frames", 1)
    except Exception:  # as in _open; the first page was read
        pass
    return pages, deep


class ImageFiles(Dataset[Item]):
    """Images read from disk and transformed together with their masks.

    Parameters
    ----------
    samples : list of Sample
        The images, in the order of the index.
    transform : callable
        Takes an image (3, h, w) of uint8 and a mask (h, w), returns both as the
        network wants them; see :func:`make_transform`.
    white : float
        What white is in images of more than 8 bits, see :func:`as_rgb`.

    Examples
    --------
    >>> normal = ImageFiles(photos(data / "nut" / "train" / "good"), make_transform(32, 32))
    >>> len(normal), normal[0]["image"].shape, bool(normal[0]["mask"].any())
    (6, torch.Size([3, 32, 32]), False)
    """

    def __init__(self, samples: list[Sample], transform: Transform, white: float = 0) -> None:
        self.samples = samples
        self.transform = transform
        self.white = white
        self.keep = enough(transform)

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Item:
        return self.item(index)

    def __iter__(self) -> Iterator[Item]:
        return map(self.item, range(len(self)))

    def item(self, index: int, data: bytes | None = None) -> Item:
        """Image ``index``; ``data`` are the bytes of its file, if they have been read already."""
        sample = self.samples[index]
        picture, marked = _read(sample, data, self.white, self.keep)
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
    """One split of one category, in a layout that :func:`find_samples` reads.

    Parameters
    ----------
    root : Path
        Folder that holds the categories.
    category : str
        Name of the category's folder.
    split : {"train", "test"}
        ``"train"`` holds normal images only.
    transform, white
        See :class:`ImageFiles`.
    found : Found, optional
        What the category's folder holds, as the other split has found it.

    Attributes
    ----------
    found : Found
        What the category's folder holds.
    mask_note : str
        A sentence if masks have another size than their images: they are left out.
    has_masks : bool
        Whether every defect image has a mask; pixel metrics need it.

    Raises
    ------
    SimpleNetError
        If a folder is missing or empty, a mask has no image, or only some of the defect
        images have a mask.

    Examples
    --------
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> len(test), test.has_masks
    (7, True)
    """

    def __init__(
        self,
        root: Path,
        category: str,
        split: Literal["train", "test"],
        transform: Transform,
        white: float = 0,
        found: Found | None = None,
    ) -> None:
        folder = _category_folder(root, category)
        self.found = find_samples(folder) if found is None else found
        misfits: list[str] = []
        samples = self.found.train
        if split == "train" and not samples:
            raise SimpleNetError(
                f"{folder}: no normal images to train on. {self.found.summary()} {LAYOUTS}"
            )
        if split == "test":
            samples = [_fitting(sample, misfits) for sample in self.found.test]
            if not samples:
                raise SimpleNetError(f"{folder}: no images to test with. {self.found.summary()}")
        super().__init__(samples, transform, white)
        defects = [sample for sample in samples if sample.label]
        self.has_masks = bool(defects) and all(sample.mask for sample in defects)
        self.mask_note = ""
        if misfits:
            self.mask_note = (
                f"{misfits[0]} Pixel metrics are left out: {len(misfits)} of {len(defects)} masks"
                " do not fit."
            )


def _fitting(sample: Sample, misfits: list[str]) -> Sample:
    """The sample without its mask if that has another size: images can still be judged."""
    if sample.mask is None:
        return sample
    masks = image_files(sample.mask) if sample.mask.is_dir() else [sample.mask]
    try:
        if {_header(mask) for mask in masks} != {_header(sample.image)}:
            _read(sample)
    except MaskSizeError as error:
        misfits.append(str(error))
        return replace(sample, mask=None)
    except SimpleNetError:
        pass  # damaged: named when it is read
    return sample


def _read(
    sample: Sample, data: bytes | None = None, white: float = 0, keep: Size | None = None
) -> tuple[Image.Image, Image.Image]:
    """Read an image and its mask, empty if it has none, which must have the same size."""
    data = read_file(sample.image) if data is None else data
    picture = read_image(sample.image, data, white, keep)
    if sample.mask is None:
        return picture, Image.new("L", picture.size)
    mask = read_mask(sample.mask)
    size = _whole_size(picture, sample.image, data) if keep else picture.size
    if mask.size != size:
        raise MaskSizeError(
            f"{sample.mask}: {mask.width}x{mask.height}, but its image is {size[0]}x{size[1]}."
        )
    return picture, mask


def _whole_size(picture: Image.Image, path: Path, data: bytes) -> Size:
    """Width and height of what ``picture`` was decoded from, if need be at a smaller size."""
    size = upright_size(path, data)
    return picture.size if sorted(size) == sorted(picture.size) else size


def _header(path: Path, data: bytes | None = None) -> tuple[Size, int]:
    """Size and orientation as the file's header states them, without decoding its pixels."""
    try:
        with Image.open(path if data is None else io.BytesIO(data), formats=FORMATS) as file:
            # Without this condition Pillow decodes a PNG to look for the orientation behind it.
            exif = file.getexif() if "exif" in file.info else {}
            return file.size, exif.get(ExifTags.Base.Orientation, 1)
    except Exception as error:  # as in _open
        raise SimpleNetError(_not_readable(path, error)) from error


def _category_folder(root: Path, category: str) -> Path:
    if not root.is_dir():
        raise SimpleNetError(f"{root}: no such folder.")
    folder = root / category
    if not folder.is_dir():
        if is_category(root):
            raise SimpleNetError(
                f"{root}: is a category itself. Name its parent as the data folder"
                f" and '{root.resolve().name}' as the category."
            )
        known = categories(root)
        if not known:
            raise SimpleNetError(f"{root}: holds no category. {LAYOUTS}")
        raise SimpleNetError(f"{root}: no category '{category}'. Found: {', '.join(known)}.")
    return folder
