# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The data
#
# An inspection camera sees thousands of good parts and a handful of defects. In this chapter you
# read such images with their masks, and you measure how far comparing them pixel by pixel gets.
#
# ## What you will learn
#
# - **Explain** why a detector is trained on good parts only.
# - **Read** the folder layout of MVTec AD, with a mask for every defect.
# - **Build** a `Dataset` that transforms an image and its mask together.
# - **Measure** how far a pixel-by-pixel comparison gets, with an error bar, and see where it fails.
# - **Show** what a test set may not be used for.
#
# ## Before you start
#
# You know basic PyTorch: tensors, `Dataset`, `DataLoader`. You need to know nothing about anomaly
# detection. Skim 15 minutes, read with the code 35, work 80. It runs in under a minute on two CPU
# cores and downloads nothing.

# %% tags=["hide-cell", "nbval-ignore-output"]
# On Colab this installs the library; on your machine `make setup` has done so.
import importlib.util
import subprocess
import sys

REPOSITORY = "https://github.com/OWNER/simplenet-piece-by-piece"
if importlib.util.find_spec("simplenet_lib") is None:
    if "/OWNER/" in REPOSITORY:
        raise SystemExit(
            "Set the repository's address first: make repository URL=https://github.com/..."
        )
    source = f"simplenet_lib[export] @ git+{REPOSITORY}"
    command = [sys.executable, "-m", "pip", "install", "--quiet", source]
    subprocess.run(command, check=True)

# %% tags=["hide-cell"]
import io
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from sklearn.metrics import roc_auc_score
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from simplenet_lib import benchmark, plots
from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import (
    FORMATS,
    TURNED,
    AnomalyDataset,
    MaskSizeError,
    ResizeBoth,
    Size,
    _fills_areas,
    _is_unsigned,
    _mask_values,
    _not_readable,
    _whole_size,
    enough,
    image_files,
    read_file,
    read_image,
    read_mask,
)
from simplenet_lib.features import cache_folder
from simplenet_lib.plots import DEFECT, NORMAL
from simplenet_lib.synthetic import generate
from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD

plots.use_book_style()


def bare(ax):
    """Axes around a picture need no frame and no ticks."""
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)


# %% [markdown]
# ## The idea
#
# A photo of a part is either a {term}`normal image` or it shows a {term}`defect`. That sounds like
# a classifier with two classes, but the data does not allow one. A line delivers a photo
# of a good part every few seconds. Defects are rare, and the next one may look like none before it.
#
# A toy shows what goes wrong. Measure the width and the length of every part, in millimetres. Four good
# parts lie around $(5, 4)$. So far you have seen one defect, at $(9, 4)$.
#
# A classifier that learned from both classes asks: is the part nearer to the good ones or nearer to
# the known defect? Between $(5, 4)$ and $(9, 4)$ the border runs at width 7. Now a new kind of
# defect appears at $(1, 4)$. It is 4 away from the centre of the good parts and 8 away from the
# known defect, so the classifier calls it good.
#
# The other question needs no defect: how far is the part from normal? No good part is farther than 1
# from the centre, and both defects are at 4. Any limit in between, such as 2, finds both.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four blue dots around the point (5, 4), an orange cross to their right and an orange star to their left. A dashed vertical line at width 7 separates only the cross from the dots. A circle of radius 2 around the dots leaves both the cross and the star outside."}, "figure": {"caption": "A border between good parts and one known defect (dashed) leaves the unforeseen defect on the good side. A limit on the distance from normal (circle) needs no defect to be drawn.", "name": "fig-dataset-toy"}}
good = np.array([[4, 4], [6, 4], [5, 5], [5, 3]])
known, unforeseen = (9, 4), (1, 4)
figure, axes = plt.subplots(figsize=(6.5, 3.2))
axes.scatter(*good.T, color=NORMAL, s=50, label="good part")
axes.scatter(*known, color=DEFECT, marker="X", s=80, label="known defect")
axes.scatter(*unforeseen, color=DEFECT, marker="*", s=140, label="unforeseen defect")
axes.axvline(7, color="0.4", linestyle="--", label="classifier's border")
turn = np.linspace(0, 2 * np.pi, 200)
axes.plot(5 + 2 * np.cos(turn), 4 + 2 * np.sin(turn), color=NORMAL, label="distance 2 from normal")
axes.set(
    xlim=(0, 10),
    ylim=(1.6, 6.4),
    aspect="equal",
    xlabel="width (mm)",
    ylabel="length (mm)",
    title="A classifier misses what it has not been shown",
)
axes.legend(loc="center left", bbox_to_anchor=(1.02, 0.5))
plt.show()

# %% [markdown]
# That is {term}`anomaly detection`: learn what is normal, and report what is far from it. Where it lies
# is the second question, {term}`anomaly localization`. Defects belong in the {term}`test set` and
# nowhere else: without some you cannot measure whether the detector works.
#
# ## From the paper
#
# The paper {cite:p}`liu2023simplenet` has no equation for the data (section 3.1). In our notation an
# image is $x \in \mathbb{R}^{3 \times H \times W}$ and its label is $y \in \{0, 1\}$, where 1 means
# defect.
#
# - Training set: $x_1, \dots, x_n$, all with $y = 0$.
# - Test set: images of both kinds. Each has a {term}`mask` in $\{0, 1\}^{H \times W}$ that says
#   which pixels belong to a defect; for a good image it is 0 everywhere.
#
# Wanted is an {term}`anomaly map`: one number for every pixel, high where something is wrong. Its
# maximum is the {term}`image score`, one number for the image. A {term}`threshold` on the image
# score gives the verdict, good or defect.
#
# Before you build a network, know what the simplest method achieves. Ours remembers the mean and the
# variance of every pixel $p$ and colour $c$ over the $n$ normal images:
#
# $$
# \begin{aligned}
# μ_{c,p} &= \frac{1}{n} \sum_{i=1}^{n} x_{i,c,p} \\
# v_{c,p} &= \frac{1}{n} \sum_{i=1}^{n} \left(x_{i,c,p} - μ_{c,p}\right)^2
# \end{aligned}
# $$ (eq-dataset-statistics)
#
# A pixel of a new image is anomalous if it is far from the mean, against the variance:
#
# $$
# a_p(x) = \frac{1}{3} \sum_{c=1}^{3} \frac{\left(x_{c,p} - μ_{c,p}\right)^2}{v_{c,p} + δ}
# $$ (eq-dataset-baseline)
#
# The small $δ$ keeps a pixel that never changes from dividing by zero. This is not from the paper. It is
# a {term}`baseline`: what SimpleNet has to beat.
#
# ## Build it
#
# ### The folders
#
# `generate` draws the book's data set: photos of hex nuts and of woven cloth, two
# {term}`categories <category>`, with defects and exact masks.

# %%
data = generate(cache_folder() / "synthetic")

for category in ("nut", "cloth"):
    print(f"{category}/")
    for folder in sorted(path for path in (data / category).rglob("*") if path.is_dir()):
        depth = len(folder.relative_to(data / category).parts)
        name = "    " * depth + folder.name + "/"
        files = sorted(path.name for path in folder.glob("*.png"))
        print(f"{name:<28}{len(files)} files: {files[0]} ..." if files else name)

# %% [markdown]
# This layout is that of {term}`MVTec AD` {cite:p}`bergmann2019mvtec,bergmann2021mvtec`, the data set on
# which the field compares its methods: photos of 15 products and textures. Your own photos can lie the
# same way. The name of a folder is the label, and below `train` there is only `good`. The defect in
# `test/KIND/000.png` is marked in `ground_truth/KIND/000_mask.png`. {term}`Ground truth <ground truth>`
# is what a person would have marked; here the program that drew the defect knows.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two rows of five close-ups with the edge of each defect outlined. Nuts with a broken corner, a dent, a fibre, rust and a scratch; cloth with a cut, a fibre, a hole, a missing thread and a stain."}, "figure": {"caption": "One defect of every kind: 96 of the photo's 256 pixels a side. The line is the edge of the mask.", "name": "fig-dataset-samples"}}
figure, axes = plt.subplots(2, 5, figsize=(6.5, 3))
side = 96
for row, category in zip(axes, ("nut", "cloth"), strict=True):
    kinds = sorted(path.name for path in (data / category / "ground_truth").iterdir())
    for ax, kind in zip(row, kinds, strict=True):
        photo = np.asarray(Image.open(data / category / "test" / kind / "000.png"))
        mask = np.asarray(Image.open(data / category / "ground_truth" / kind / "000_mask.png")) > 0
        middle = [int((where.min() + where.max()) / 2) for where in np.nonzero(mask)]
        top, left = (min(max(at - side // 2, 0), 256 - side) for at in middle)
        part = (slice(top, top + side), slice(left, left + side))
        ax.imshow(photo[part])
        ax.contour(mask[part], [0.5], colors=[DEFECT], linewidths=1)
        ax.set_title(kind.replace("_", " "), fontsize=9)
        bare(ax)
    row[0].set_ylabel(category)
figure.suptitle("Most defects are small, and each kind looks different", fontsize="medium")
plt.show()

# %% [markdown]
# ### A list of samples
#
# `Sample` is the triple of image, kind of defect and mask. The next cell, and every cell below whose
# first line says so, is the library's own code with shorter docstrings.

# %% tags=["library"]
# simplenet_lib/dataset.py


@dataclass(frozen=True)
class Sample:
    """An image on disk, its defect type (``"good"`` if none) and its mask, if any."""

    image: Path
    defect: str
    mask: Path | None = None

    @property
    def label(self) -> int:
        """1 for a defect, 0 for a normal image."""
        return int(self.defect != "good")


# %% [markdown]
# `read_image` and `read_mask` give 8-bit RGB for an image and 0 and 1 for a mask, whatever is in the file.
# Predict before you run: the photos are 256 pixels wide and high. What are the shapes of an image and its
# mask?

# %%
scratch = Sample(
    data / "nut" / "test" / "scratch" / "000.png",
    "scratch",
    data / "nut" / "ground_truth" / "scratch" / "000_mask.png",
)
image, mask = read_image(scratch.image), read_mask(scratch.mask)
print("image:", np.asarray(image).shape, np.asarray(image).dtype)
print("mask: ", np.asarray(mask).shape, np.unique(np.asarray(mask)))
print("label:", scratch.label)

# %% [markdown]
# ### Transforming both together
#
# The network wants images of one size, with normalised values. Whatever moves the pixels of
# an image must move its mask in the same way, or the mask marks the wrong place. But the two are
# not *resized* in the same way. Take this mask of 4 x 4 pixels and halve it:

# %%
toy = torch.zeros(1, 4, 4)
toy[:, 1:, 1:] = 1
print(toy[0].long())

blend = v2.functional.resize(
    toy, [2, 2], interpolation=v2.InterpolationMode.BILINEAR, antialias=False
)
nearest = v2.functional.resize(toy, [2, 2], interpolation=v2.InterpolationMode.NEAREST)
print("bilinear:", blend[0].tolist())
print("nearest: ", nearest[0].tolist())

# %% [markdown]
# *Bilinear* interpolation here averages each block of 2 x 2 pixels. In the first block one pixel of
# four is marked, so the result is 0.25: right for a photo, meaningless for a mask, where a pixel belongs
# to a defect or does not. *Nearest* takes one pixel of each block and keeps the values 0 and 1, but a
# scratch one pixel wide can fall between the pixels it takes. So when you judge a map, enlarge the map to
# the mask rather than shrink the mask.
#
# torchvision's transforms (`v2`) do this if you wrap the image in `tv_tensors.Image` and the mask in
# `tv_tensors.Mask`: every transform moves both, interpolates the image smoothly and the mask by its
# nearest pixel, and normalises only the image. `ResizeBoth` is `v2.Resize`, and brings back one pixel of
# a defect that the reduction has lost. Nor does it stretch a photo by more than a tenth: one of another shape
# stands in the middle, between its mirror images. The mean and deviation are those that the network of
# [chapter 2](02_features.ipynb) was trained with.

# %% tags=["library"]
# simplenet_lib/dataset.py

Transform = Callable[[tv_tensors.Image, tv_tensors.Mask], tuple[Tensor, Tensor]]


def make_transform(size: int | tuple[int, int], crop: int | tuple[int, int]) -> Transform:
    """Resize, cut out the centre, normalise; image and mask together."""
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


# %% [markdown]
# ### The dataset
#
# A PyTorch `Dataset` needs a length and a way to fetch one item. Ours reads the two files, checks
# that they have the same size, transforms them together and returns a dictionary. A good image gets an
# empty mask, so that every item has the same parts and a loader can stack them.

# %% tags=["library"]
# simplenet_lib/dataset.py


class Item(TypedDict):
    """What a dataset hands to the loader; a batch has N in front of every shape."""

    image: Tensor  #: (3, H, W), normalised
    mask: Tensor  #: (H, W) of bool, all False without a mask
    label: int  #: 1 for a defect, 0 for a normal image
    index: int  #: position in ``dataset.samples``


class ImageFiles(Dataset[Item]):
    """Images read from disk and transformed together with their masks."""

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


# %% [markdown]
# What is left is to find the samples of one category; this is the library's `AnomalyDataset` in short.
# Predict the shapes of a batch of 8 before you run the cell: the channels now come first.


# %%
class ShortAnomalyDataset(ImageFiles):
    """One split of one category in the MVTec AD layout, without the error messages."""

    def __init__(self, root, category, split, transform):
        folder = root / category
        samples = []
        for kind in sorted(path.name for path in (folder / split).iterdir()):
            for image in image_files(folder / split / kind):
                mask = folder / "ground_truth" / kind / f"{image.stem}_mask.png"
                samples.append(Sample(image, kind, mask if kind != "good" else None))
        super().__init__(samples, transform)


transform = make_transform(256, 256)
mixed = ShortAnomalyDataset(data, "nut", "test", transform)
print("test:", dict(Counter(sample.defect for sample in mixed.samples)))
batch = next(iter(DataLoader(mixed, batch_size=8)))
for name, value in batch.items():
    print(f"{name}: {tuple(value.shape)} {value.dtype}")

# %% [markdown]
# ### The baseline
#
# Equation {eq}`eq-dataset-statistics` is one line, equation {eq}`eq-dataset-baseline` another. Check
# them by hand on images of two pixels and one colour. Two normal images, $(1, 5)$ and $(3, 5)$,
# have the mean $(2, 5)$ and the variance $(1, 0)$. Take $δ = 1$. A new image $(4, 5)$ then gets
# $(2^2 / (1 + 1),\ 0) = (2, 0)$. Another one, $(2, 6)$, gets $(0,\ 1^2 / (0 + 1)) = (0, 1)$.


# %%
def fit_pixels(images):
    """Mean and variance of every pixel: (N, 3, H, W) to two of (3, H, W)."""
    return images.mean(dim=0), images.var(dim=0, correction=0)


def pixel_map(images, mean, variance, delta=0.01):
    """Squared distance from the mean over the variance: (N, 3, H, W) to (N, H, W)."""
    return ((images - mean) ** 2 / (variance + delta)).mean(dim=1)


two = fit_pixels(torch.tensor([[[[1.0, 5.0]]], [[[3.0, 5.0]]]]))
new = torch.tensor([[[[4.0, 5.0]]], [[[2.0, 6.0]]]])
print("mean and variance:", [values.flatten().tolist() for values in two])
print("map:              ", pixel_map(new, *two, delta=1.0).flatten(1).tolist())

# %% tags=["hide-cell"]
# Check: the library's data set finds the same files; an item is what Pillow reads from them; the
# variance is NumPy's.
for category in ("nut", "cloth"):
    for split in ("train", "test"):
        mine = ShortAnomalyDataset(data, category, split, transform).samples
        theirs = AnomalyDataset(data, category, split, transform).samples
        assert [vars(sample) for sample in mine] == [vars(sample) for sample in theirs]
for index in (0, 12, 47):
    item, sample = mixed[index], mixed.samples[index]
    undone = item["image"].permute(1, 2, 0) * torch.tensor(IMAGENET_STD)
    undone = (undone + torch.tensor(IMAGENET_MEAN)) * 255
    assert np.abs(undone.numpy() - np.asarray(Image.open(sample.image))).max() < 1e-3
    stored = np.asarray(Image.open(sample.mask)) > 0 if sample.mask else np.zeros((256, 256), bool)
    assert np.array_equal(item["mask"].numpy(), stored)
assert np.allclose(
    fit_pixels(batch["image"])[1].numpy(), np.var(batch["image"].numpy(), axis=0), atol=1e-5
)

# %% [markdown]
# ## What it does
#
# Apply the baseline to the test images of both categories.


# %%
def load(category, split):
    """All images (N, 3, 256, 256), masks (N, 256, 256) and labels (N,) of one split."""
    dataset = ShortAnomalyDataset(data, category, split, transform)
    everything = next(iter(DataLoader(dataset, batch_size=len(dataset))))
    return everything["image"], everything["mask"], everything["label"].numpy()


train, tested, statistics, maps, scores = {}, {}, {}, {}, {}
for category in ("nut", "cloth"):
    train[category] = load(category, "train")[0]
    tested[category] = load(category, "test")
    statistics[category] = fit_pixels(train[category])
    maps[category] = pixel_map(tested[category][0], *statistics[category])
    scores[category] = maps[category].amax(dim=(1, 2)).numpy()
    print(category, "maps", tuple(maps[category].shape), "scores", scores[category].shape)

# %% [markdown]
# How good are these scores? Take every pair of one defect image and one good image. The
# {term}`AUROC` is the share of pairs in which the defect has the higher score: 0.5 is chance, 1 is
# perfect. [Chapter 8](08_localization.ipynb) takes it apart.
#
# How sure is such a number? With other test images it would be another one. For a score that knows
# nothing, the spread of the AUROC over new draws of $n_0$ good and $n_1$ defective images is
#
# $$
# \sqrt{\frac{n_0 + n_1 + 1}{12\, n_0\, n_1}}
# $$ (eq-dataset-error)
#
# With 20 and 40 that is $\sqrt{61 / 9600} = 0.08$; for one kind of defect, 20 and 8, it is 0.12. Better
# scores vary less {cite:p}`hanley1982auc`.
#
# A second question is where the map is highest. Does the highest pixel lie on the defect? A random
# pixel would in fewer than 1 of 40 images: half of the defects cover less than 1% of theirs.


# %% tags=["nbval-ignore-output"]
def on_defect(maps, masks):
    """For each image: does the highest pixel of its map (N, H, W) lie on the defect?"""
    highest = maps.flatten(1).argmax(dim=1, keepdim=True)
    return masks.flatten(1).gather(1, highest)[:, 0].numpy()


result = {}
print("category  defect          image AUROC   highest pixel on the defect")
for category in ("nut", "cloth"):
    _, masks, labels = tested[category]
    hits = on_defect(maps[category], masks)
    samples = ShortAnomalyDataset(data, category, "test", transform).samples
    kind_of = np.array([sample.defect for sample in samples])
    for kind in ("all", *sorted(set(kind_of) - {"good"})):
        chosen = (labels == 1) if kind == "all" else (kind_of == kind)
        both = chosen | (labels == 0)
        auroc = roc_auc_score(labels[both], scores[category][both])
        result[category, kind] = (auroc, hits[chosen].sum())
        print(f"{category:9} {kind:15} {auroc:6.2f} {hits[chosen].sum():18} of {chosen.sum()}")

# %% tags=["hide-cell"]
# Check the table with tolerances.
assert 0.5 < result["nut", "all"][0] < 0.65 and result["nut", "all"][1] <= 3
assert 0.5 < result["cloth", "all"][0] < 0.72 and 13 <= result["cloth", "all"][1] <= 21
assert result["cloth", "missing_thread"][0] < 0.55 and result["cloth", "missing_thread"][1] >= 6
assert result["cloth", "hole"][0] > 0.8

# %% [markdown]
# ### Where it fails, and where not
#
# A pixel's mean is meant to say what belongs in that place. But every nut lies turned in its own way, and
# the light comes from another side each time: the same pixel sees metal in one image and the belt in the
# next.


# %% tags=["hide-input"] mystnb={"image": {"alt": "Four pictures in a row: a sharp hex nut; the mean of 60 nuts, a grey ring with washed-out edges and no corners; woven cloth with distinct yarns; the mean of 60 pieces of cloth, an almost even grey without yarns."}, "figure": {"caption": "One training image of each category, and the mean over all 60.", "name": "fig-dataset-mean"}}
def picture(image):
    """Undo the normalisation: (3, H, W) to (H, W, 3), 0 to 1."""
    undone = image.permute(1, 2, 0) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    return undone.clamp(0, 1)


figure, axes = plt.subplots(1, 4, figsize=(6.5, 2.1))
for pair, category in zip((axes[:2], axes[2:]), ("nut", "cloth"), strict=True):
    shown = {f"one {category}": train[category][0], "mean of 60": statistics[category][0]}
    for ax, (name, image) in zip(pair, shown.items(), strict=True):
        ax.imshow(picture(image))
        ax.set_title(name, fontsize=9)
        bare(ax)
figure.suptitle("The mean of good images is not a good image: it is a blur", fontsize="medium")
plt.show()

# %% [markdown]
# What is far from a blur? A corner that happens to point where few others did; a highlight where none
# was. So the map shows how this image differs from the average photo, defect or not:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three columns. Each shows a nut above and its baseline map below. The left nut is good, the others have a scratch and rust, outlined in orange. In all three maps the bright places lie along edges and highlights of the nut; the outlined defects do not stand out."}, "figure": {"caption": "Test images of the nut (orange: edge of the mask) and the baseline's maps, all on one colour scale.", "name": "fig-dataset-maps"}}
images, masks, labels = tested["nut"]
kinds = [sample.defect for sample in mixed.samples]
figure, axes = plt.subplots(2, 3, figsize=(5.6, 3.8))
for column, kind in zip(axes.T, ("good", "scratch", "rust"), strict=True):
    index = kinds.index(kind)
    column[0].imshow(picture(images[index]))
    mapped = column[1].imshow(maps["nut"][index].sqrt(), cmap="viridis", vmin=0, vmax=6)
    for ax in column:
        if labels[index]:
            ax.contour(masks[index], [0.5], colors=[DEFECT], linewidths=1.2)
        bare(ax)
    column[0].set_title(kind, fontsize=9)
figure.colorbar(mapped, ax=axes[1], label=r"$\sqrt{a_p}$", extend="max")
figure.suptitle("The map shows edges and highlights, not defects", fontsize="medium")
plt.show()

# %% [markdown]
# Cloth is different: there the highest pixel lies on 6 of 8 holes and on 7 of 8 missing threads,
# probably because they show a brightness that cloth itself hardly has. Yet missing threads do not get
# higher *image scores* than good cloth: 0.43. The map ranks places within one image correctly, and the
# images among each other not at all, because good images have equally high pixels somewhere. Finding
# and localising are two questions.
#
# Where parts lie still, the same two lines are strong: on the bottles of MVTec AD, photographed from
# above in one place, they reach an image AUROC of 0.99 ± 0.01. On its screws, which lie turned, 0.36 ±
# 0.05. So never skip a baseline: on your line it may be all you need. The best methods reach more than
# 0.99 on the mean of the 15 products, and the few pairs that are left no longer tell them apart: MVTec
# AD is *saturated*. VisA {cite:p}`zou2022visa`, with finer defects and several objects in a picture,
# and MVTec AD 2 {cite:p}`hecklerkram2025mvtecad2`, with changing light, ask for more.
#
# What has to change for the nuts is not the statistics but what they are computed on. You need numbers
# that describe *what* is seen and that stay the same when it moves a little. A pretrained network
# provides them; that is [chapter 2](02_features.ipynb).
#
# ## What can go wrong
#
# ### The mask does not follow its image
#
# Resize to 320 and cut out the central 256 pixels. If you do it to the image and only resize the mask to
# 256, the sizes agree, nothing complains, and the mask is wrong.

# %% tags=["hide-input"] mystnb={"image": {"alt": "The same enlarged nut with a dent twice. On the left, the orange outline lies around the dent. On the right, the outline is smaller and lies beside it, nearer to the centre of the image."}, "figure": {"caption": "Left: image and mask are resized and cropped together. Right: the mask is only resized.", "name": "fig-dataset-crop"}}
dented = mixed.samples[8]
together = ImageFiles([dented], make_transform(320, 256))[0]
apart = ImageFiles([dented], make_transform(256, 256))[0]["mask"]
shared = float((together["mask"] & apart).sum() / (together["mask"] | apart).sum())

figure, axes = plt.subplots(1, 2, figsize=(5.6, 3))
for ax, mask, name in zip(
    axes,
    (together["mask"], apart),
    ("together", f"mask not cropped: {shared:.0%} in common"),
    strict=True,
):
    ax.imshow(picture(together["image"]))
    ax.contour(mask, [0.5], colors=[DEFECT], linewidths=1.5)
    ax.set_title(name, fontsize=9)
    bare(ax)
figure.suptitle("A mask that is not cropped with its image marks another place", fontsize="medium")
plt.show()
assert shared < 0.5

# %% [markdown]
# ### The test set is used to choose
#
# You try ten variants of a method, measure each on the test set, and report the best. That number is too
# high; here is how much. A thousand "detectors" that know nothing give random
# scores to 60 images, 20 good and 40 with a defect. The best of them is chosen on this test set and
# measured again on 60 new images. The whole is repeated 200 times.


# %%
def pair_auroc(scores, labels):
    """AUROC as a share of pairs, a tie counting half: (V, N) for V detectors to (V,)."""
    difference = scores[:, labels == 1, None] - scores[:, None, labels == 0]
    return ((difference > 0) + 0.5 * (difference == 0)).mean(axis=(1, 2))


rng = np.random.default_rng(0)
labels = np.repeat([0, 1], [20, 40])
variants = [1, 10, 100, 1000]
on_test, on_new = [], []
for _ in range(200):
    found = pair_auroc(rng.standard_normal((1000, 60)), labels)
    on_test.append([found[:count].max() for count in variants])
    # A detector that knows nothing gives new images new random scores.
    on_new.append(pair_auroc(rng.standard_normal((len(variants), 60)), labels))
for row in zip(variants, np.mean(on_test, axis=0), np.mean(on_new, axis=0), strict=True):
    print("best of {:>4}: {:.2f} on the test set, {:.2f} on new images".format(*row))

# %% tags=["hide-cell"]
# Check the AUROC against scikit-learn, and the spread of a single one against the formula.
sample = rng.standard_normal((1, 60))
assert abs(pair_auroc(sample, labels)[0] - roc_auc_score(labels, sample[0])) < 1e-12
assert abs(np.std(on_new) - (61 / 9600) ** 0.5) < 0.01

# %% [markdown]
# The best of a thousand knows as little as the first, and looks better than our baseline. With real
# variants the effect is smaller, but it is there (third exercise). So nothing may be chosen by looking at
# the test set: not the number of training steps, not the $δ$, not the {term}`seed`, not the threshold.
#
# What may you use instead? Normal images that you hold back from training, as chapter 8 does for its
# threshold; other categories; the settings of a publication, fixed before you look.
#
# ## Exercises
#
# :::{exercise} easy: how many test images?
# :label: ex-dataset-error
#
# Use {eq}`eq-dataset-error`. You own photos of 5 good and 5 defective parts: how large is the ± of an AUROC
# near chance? How many photos of each kind make it 0.04, if you have equally many?
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: 0.19; about 105 of each.


def chance_error(good, defect):
    """Standard deviation of the AUROC of scores that know nothing."""
    return ((good + defect + 1) / (12 * good * defect)) ** 0.5


# (2n + 1) / (12 n²) = 0.04² gives n = 104.7.
five = chance_error(5, 5)
needed = next(n for n in range(1, 1000) if chance_error(n, n) <= 0.04)
print(f"± {five:.2f} with 5 of each; {needed} of each for ± 0.04")
assert needed == 105 and abs(five - 0.19) < 0.005

# %% [markdown]
# :::{exercise} medium: take the light out
# :label: ex-dataset-light
#
# The light comes from another side in each photo. Change the detector: before the statistics, subtract
# from each pixel the mean of the 15 x 15 pixels around it (`F.avg_pool2d(images, 15, 1, 7)`) and take the
# absolute value. What becomes of the image AUROC and of the highest pixel? Add the row to the scoreboard
# below. Is the gain larger than chance?
# :::

# %% tags=["hide-cell", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: 0.67 instead of 0.57, and the highest pixel lies on 8 defects instead of 1. With
# ± 0.08 the first alone decides nothing; eight hits where chance gives one do. The rotation stays.


def local_contrast(images):
    """How far each pixel is from the mean of its surroundings, (N, 3, H, W)."""
    return (images - F.avg_pool2d(images, 15, 1, 7)).abs()


images, masks, labels = tested["nut"]
contrast_maps = pixel_map(local_contrast(images), *fit_pixels(local_contrast(train["nut"])))
contrast_scores = contrast_maps.amax(dim=(1, 2)).numpy()
contrast_auroc = roc_auc_score(labels, contrast_scores)
contrast_hits = on_defect(contrast_maps, masks).sum()
print(f"image AUROC {contrast_auroc:.2f}, highest pixel on the defect {contrast_hits} of 40")
# On the board: plots.scoreboard({"pixel statistics": scores["nut"], "contrast": contrast_scores}, ...)
assert 0.6 < contrast_auroc < 0.74 and 5 <= contrast_hits <= 12

# %% [markdown]
# :::{exercise} hard: how much does choosing help the baseline?
# :label: ex-dataset-choice
#
# Make 36 variants of the baseline for the nut: $δ$ of 0.001, 0.01, 0.1 and 1; images averaged over
# blocks of 1, 4 and 16 pixels (`F.avg_pool2d`); as image score the maximum of the
# map, its mean, or the mean of its highest 1%. Split the test set at random into halves with 10
# good and 20 defect images each. Choose the best variant on one half and measure it on the other.
# Repeat 200 times and compare the two mean AUROCs.
# :::

# %% tags=["hide-cell", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: about 0.64 on the half that chose, about 0.52 on the other.
images, _, labels = tested["nut"]
variant_scores = []
for block in (1, 4, 16):
    coarse = fit_pixels(F.avg_pool2d(train["nut"], block))
    reduced = F.avg_pool2d(images, block)
    for delta in (0.001, 0.01, 0.1, 1):
        flat = pixel_map(reduced, *coarse, delta).flatten(1)
        highest = flat.topk(max(1, flat.shape[1] // 100), dim=1).values
        variant_scores += [flat.amax(1), flat.mean(1), highest.mean(1)]
variant_scores = torch.stack(variant_scores).numpy()

rng = np.random.default_rng(0)
on_chosen, on_other = [], []
for _ in range(200):
    good = rng.permutation(np.flatnonzero(labels == 0))
    defects = rng.permutation(np.flatnonzero(labels == 1))
    half, other = np.r_[good[:10], defects[:20]], np.r_[good[10:], defects[20:]]
    here = pair_auroc(variant_scores[:, half], labels[half])
    on_chosen.append(here.max())
    on_other.append(pair_auroc(variant_scores[:, other], labels[other])[here.argmax()])
chosen, elsewhere = np.mean(on_chosen), np.mean(on_other)
print(
    f"{len(variant_scores)} variants: {chosen:.2f} on the half that chose, {elsewhere:.2f} elsewhere"
)
assert len(variant_scores) == 36 and chosen > 0.58 and elsewhere < 0.56

# %% [markdown]
# ## Quiz
#
# **1. You have 5,000 photos of good parts and 12 of defects. Why not train a classifier on both?**
#
# <details>
# <summary>Answer</summary>
#
# It would learn what separates the good parts from these 12. A defect of another kind can lie on
# the good side of that border, as in the toy. The 12 are worth more in the test set: without them you
# could not measure whether any detector works.
#
# </details>
#
# **2. On cloth with a missing thread the highest pixel lies on the defect in 7 of 8 images, and the image
# AUROC is 0.43. How can both be true?**
#
# <details>
# <summary>Answer</summary>
#
# The first compares pixels within one image, the second one image with another. The missing thread is
# the highest place of its own image, but the highest places of good images are as high.
#
# </details>
#
# **3. A colleague trains with 50 seeds and reports the best image AUROC on the test set. What is
# wrong, and what should the report say?**
#
# <details>
# <summary>Answer</summary>
#
# The best of 50 profits from chance on just these test images. The report should give the mean and the
# standard deviation over the seeds.
#
# </details>
#
# ## The scoreboard
#
# Every chapter ends with the same picture: the image AUROC of all detectors you have met so far, on the
# same 60 test nuts, with the standard deviation over other test images. So far there is one.

# %% tags=["hide-input"] mystnb={"image": {"alt": "One row, pixel statistics, with a dot at 0.57 and a bar from 0.49 to 0.65; chance, at 0.5, lies within the bar."}, "figure": {"caption": "Image AUROC on the 60 test nuts after chapter 1. Bars: standard deviation over test images.", "name": "fig-dataset-scoreboard"}}
labels, rows = benchmark.scoreboard()
live = scores["nut"]
plots.scoreboard({"pixel statistics": live}, labels, new=["pixel statistics"])
plt.show()
of_file = roc_auc_score(labels, rows["pixel statistics"])
assert abs(roc_auc_score(labels, live) - of_file) < 0.02

# %% [markdown]
# ## Summary
#
# - Defects are few and the next may be unlike all before. So you train on normal images only and ask how
#   far an image is from normal.
# - In the MVTec AD layout the folder is the label, and each defect image has a mask.
# - Image and mask are resized and cropped together; the mask takes the nearest pixel.
# - Mean and variance of each pixel are a poor picture of normal if the part turns or the yarns
#   shift: image AUROC 0.57 on the nut, 0.62 on cloth, each ± 0.08. On a part that lies still they are
#   strong.
# - The test set measures, once. Whatever is chosen on it looks better than it is.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.1: the training set and the test set.
# - {cite:t}`bergmann2019mvtec,bergmann2021mvtec`: MVTec AD, its masks, and how methods are compared on it.
# - {cite:t}`zou2022visa`, {cite:t}`hecklerkram2025mvtecad2`: VisA and MVTec AD 2.
# - {cite:t}`hanley1982auc`: the error of an AUROC.
#
# ## Next
#
# Pixels do not stay put, but what they show can be recognised: [Frozen features](02_features.ipynb)
# looks at the images through a pretrained network.
#
# ## Appendix: reading any file
#
# Whatever is in the file, `read_image` makes upright 8-bit RGB of it, and names a file that is damaged.
# `white` is the value that is white in a file of more than 8 bits: a camera with 12 bits may store its 0
# to 4,095 in a 16-bit file, which is almost black without `white=4095`. Of a JPEG `keep` says which width and height
# are enough: it holds blocks of frequencies, and without the high ones it gives a picture of a half, a quarter
# or an eighth of the size in less time. `ImageFiles` keeps at least twice what the network sees.
#
# In a mask everything but 0 is defect. One exception: a mask once saved as JPEG has faint traces around its
# edge. Values up to a quarter of the maximum count as such, unless they fill whole areas.

# %% tags=["library", "hide-cell"]
# simplenet_lib/dataset.py


def read_file(path: Path) -> bytes:
    """The bytes of an image file."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise SimpleNetError(f"{path}: not a readable image ({error}).") from error


def _open(path: Path, data: bytes | None = None, keep: Size | None = None) -> Image.Image:
    """Decode an image's first page and turn it upright; ``data`` are its bytes, if read."""
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


def as_rgb(image: Image.Image, white: float = 0) -> Image.Image:
    """An image of any depth, with or without transparency, as 8-bit RGB."""
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
    """Read an image of any depth, grey, palette or colour, as upright 8-bit RGB."""
    return as_rgb(_open(path, data, keep), white)


# %% tags=["library", "hide-cell"]
# simplenet_lib/dataset.py


def read_mask(path: Path) -> Image.Image:
    """Read a mask as 8-bit 0 and 1: every value but that of the background, 0, is defect."""
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
