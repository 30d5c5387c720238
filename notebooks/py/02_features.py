# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Frozen features
#
# In this chapter you replace pixels by the inner outputs of a network that has seen a million photos, and
# chapter 1's two lines of statistics, unchanged, become a detector.
#
# ## What you will learn
#
# - **Work out** by hand which part of the image one feature vector sees, and measure it.
# - **Take** the outputs of two inner layers of a ResNet-50 with `create_feature_extractor`.
# - **Freeze** a network, and see what happens if you forget `eval()`.
# - **Join** two layers of different resolution on one grid, and bring their channels to one scale.
# - **Compute** chapter 1's statistics on features, and compare them with the nearest normal feature.
#
# ## Before you start
#
# You have read chapter 1. You know what a convolution and a residual network are. Skim 15 minutes, read
# with the code 40, work 90. It runs in about a minute on two CPU cores; the first run downloads the
# weights of ResNet-50, about 100 MB.

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
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np
import seaborn
import torch
import torch.nn.functional as F
from sklearn.decomposition import PCA
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor

from simplenet_lib import benchmark, plots
from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import (
    FeatureMap,
    build_backbone,
    cache_folder,
    fold_batchnorm,
    reflect_border,
)
from simplenet_lib.metrics import auroc_deviation
from simplenet_lib.plots import DEFECT, NORMAL
from simplenet_lib.synthetic import generate
from simplenet_lib.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Weights,
    find_weights,
    torchvision_url,
)

plots.use_book_style()

# %% [markdown]
# ## The idea
#
# A network that can tell 1,000 classes of photos apart has learned, on the way, to describe edges,
# textures and parts. You cut it open and keep what it computes in the middle. That network is the
# {term}`backbone`, and it is {term}`pretrained`: nobody trains it on your product.
#
# What comes out is a grid. At each {term}`position` stands one vector, the {term}`feature` of that
# position. One entry of the vector, seen over the whole grid, is a {term}`channel`. Which part of the
# image does one vector describe?
#
# Take a row of 11 pixels and two layers. The first adds up three neighbours and moves on by two pixels
# each time: kernel 3, {term}`stride` 2. The second adds up three neighbours of the first, with stride
# 1; all weights are 1.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three rows of dots, eleven pixels below, five positions of the first layer in the middle, three of the second on top. Lines run from the middle top dot to three dots of the first layer and from there to seven coloured pixels."}, "figure": {"caption": "Two layers with kernel 3, the first with stride 2. The middle position of the second layer depends on three positions of the first and on seven pixels.", "name": "fig-features-cone"}}
figure, axes = plt.subplots(figsize=(6.5, 2.8))
layers = ((range(11), 0), (range(1, 10, 2), 1), (range(3, 8, 2), 2))
seen = {0: range(2, 9), 1: (3, 5, 7), 2: (5,)}
for below in (3, 5, 7):
    axes.plot((5, below), (2, 1), color="0.6", zorder=0)
    for pixel in range(below - 1, below + 2):
        axes.plot((below, pixel), (1, 0), color="0.8", zorder=0)
for places, level in layers:
    colours = [NORMAL if place in seen[level] else "0.85" for place in places]
    axes.scatter(places, [level] * len(places), c=colours, s=130)
axes.set(
    xlabel="pixel",
    xticks=range(11),
    yticks=range(3),
    yticklabels=("pixels", "first layer", "second layer"),
    ylim=(-0.4, 2.4),
    title="One position of the second layer sees seven pixels",
)
plt.show()

# %% [markdown]
# The pixels that a position depends on are its {term}`receptive field`. You can count it in the
# figure: 7. You can also compute it layer by layer. Let $r$ be the number of pixels that one
# position sees and $j$ the distance in pixels between neighbouring positions. For a single pixel,
# both are 1. A layer with kernel $k$ and stride $s$ takes $k$ positions instead of one, so it adds
# $k - 1$ steps of length $j$; then its stride makes the steps longer:
#
# $$
# r \leftarrow r + (k - 1)\, j, \qquad j \leftarrow j \cdot s
# $$ (eq-receptive)
#
# Here: $r = 1 + 2 \cdot 1 = 3$ and $j = 2$ after the first layer, $r = 3 + 2 \cdot 2 = 7$ and
# $j = 2$ after the second.
#
# The gradient tells the same without any counting. A pixel that a position does not see cannot
# change it, so its gradient is 0. Pixel 4 lies in the windows of two positions of the first layer:
# its gradient is 2.

# %%
row = torch.zeros(1, 1, 11, requires_grad=True)
ones = torch.ones(1, 1, 3)
first = F.conv1d(row, ones, stride=2)
second = F.conv1d(first, ones)
(gradient,) = torch.autograd.grad(second[0, 0, 1], row)
gradient = gradient.flatten().int().tolist()

print("gradient:       ", gradient)
print("receptive field:", sum(value > 0 for value in gradient), "pixels")

# %% [markdown]
# ## From the paper
#
# Section 3.1 of {cite:t}`liu2023simplenet` defines the features. In our notation, with $φ_2(x)$ and
# $φ_3(x)$ for what layer2 and layer3 answer to the image $x$, the feature at row $i$ and column $j$
# is
#
# $$
# f_{i,j} = \big[\; φ_2(x)_{i,j} \;;\; \mathrm{up}(φ_3(x))_{i,j} \;\big] \in \mathbb{R}^{C},
# \qquad C = 512 + 1024 = 1536
# $$ (eq-features)
#
# where $[\,;\,]$ joins two vectors and $\mathrm{up}$ resizes layer3 to the grid of layer2. The paper also
# averages each position with its neighbours; chapter 9 takes that up.
#
# ## Build it
#
# ### Outputs from the middle
#
# The backbone is a ResNet-50 {cite:p}`he2016resnet` with the weights it got on {term}`ImageNet`. Newer
# detectors take DINOv2 {cite:p}`oquab2024dinov2`, trained without labels, as AnomalyDINO
# {cite:p}`damm2025anomalydino` does, or train a small network to imitate the backbone on normal images and
# report where it fails: EfficientAD {cite:p}`batzner2024efficientad`.
#
# `find_weights` looks on your machine, then downloads. If it finds none it stops: random weights would
# run just as smoothly, and you would not notice. `create_feature_extractor` of torchvision takes the
# network and the names of the outputs you want. What lies behind the last of them is left out: `layer4`
# and the classifier `fc`, two thirds of the parameters.
#
# Predict the shapes before you run the cell: the stem (first convolution and pooling) reduces each
# side to a quarter, layer1 keeps that size, layer2 and layer3 halve it once more each.

# %%
weights = find_weights("resnet50")
backbone = build_backbone("resnet50", weights)
extractor = create_feature_extractor(backbone, ["layer2", "layer3"]).eval()
for name, network in (("whole network", backbone), ("as far as used", extractor)):
    print(f"{name}: {sum(values.numel() for values in network.parameters()):,} parameters")

data = generate(cache_folder() / "synthetic")
transform = make_transform(256, 256)
train = {name: AnomalyDataset(data, name, "train", transform) for name in ("nut", "cloth")}
test = {name: AnomalyDataset(data, name, "test", transform) for name in ("nut", "cloth")}


def load(dataset, indices):
    """Some images of a data set as one batch, (N, 3, 256, 256)."""
    return torch.stack([dataset[index]["image"] for index in indices])


pair = load(train["nut"], range(2))
with torch.no_grad():
    print({layer: tuple(output.shape) for layer, output in extractor(pair).items()})

# %% [markdown]
# ### What one position sees
#
# Apply {eq}`eq-receptive` to the ResNet-50. Its blocks have three convolutions, 1x1, 3x3 and 1x1. A 1x1
# convolution has $k - 1 = 0$: it adds nothing to $r$. But in the original network the first one of layer2
# and of layer3 has stride 2, so $j$ doubles before the 3x3 convolutions.
#
# | layers | receptive field |
# |---|---|
# | first, $k = 7$, $s = 2$ | $r = 1 + 6 \cdot 1 = 7$, $j = 2$ |
# | pooling, $k = 3$, $s = 2$ | $r = 7 + 2 \cdot 2 = 11$, $j = 4$ |
# | layer1, three 3x3 | $r = 11 + 3 \cdot 2 \cdot 4 = 35$ |
# | layer2, stride 2, then four 3x3 | $j = 8$, $r = 35 + 4 \cdot 2 \cdot 8 = 99$ |
# | layer3, stride 2, then six 3x3 | $j = 16$, $r = 99 + 6 \cdot 2 \cdot 16 = 291$ |


# %%
def receptive_field(layers):
    """Side r of the receptive field and distance j of two positions, both in pixels."""
    r, j = 1, 1
    for kernel, stride in layers:
        r += (kernel - 1) * j
        j *= stride
    return r, j


upto1 = [(7, 2), (3, 2)] + 3 * [(3, 1)]
upto2 = upto1 + [(1, 2)] + 4 * [(3, 1)]
upto3 = upto2 + [(1, 2)] + 6 * [(3, 1)]
print("toy:", receptive_field([(3, 2), (3, 1)]))
print("layer2:", receptive_field(upto2), " layer3:", receptive_field(upto3))

# %% [markdown]
# One position of layer3 sees more than a whole image of 256 pixels. Let the gradient say it, too: add up
# the channels of the middle position, and ask for the gradient at every pixel of a random image.

# %%
network = build_backbone("resnet50", replace(weights, strides="conv1")).eval()
noise = torch.randn(1, 3, 320, 320, generator=torch.Generator().manual_seed(0)).requires_grad_()
gradients = {}
for layer, output in create_feature_extractor(network, ["layer2", "layer3"])(noise).items():
    middle = output.shape[-1] // 2
    total = output[0, :, middle, middle].sum()
    (gradient,) = torch.autograd.grad(total, noise, retain_graph=True)
    gradients[layer] = gradient[0].abs().sum(dim=0).numpy()
    rows = np.flatnonzero(gradients[layer].any(axis=1))
    print(f"{layer}: rows {rows[0]} to {rows[-1]}, that is {rows[-1] - rows[0] + 1}")

# %% [markdown]
# Hand and gradient agree. But not all pixels in the field count alike: one in the corner acts along a
# single chain of kernel corners, one in the centre along a great many. How small is the square around the
# centre that holds half of all gradient?


# %% tags=["hide-input"] mystnb={"image": {"alt": "Two square heat maps of 320 by 320 pixels. In each, brightness is concentrated in the centre and falls off towards a solid square, outside of which everything is black. The solid square is much larger for layer3 and nearly fills the picture; a small dashed square marks the centre."}, "figure": {"caption": "Gradient of one position at every pixel (brightness: its fifth root, so that faint values show). Solid: the receptive field worked out by hand. Dashed: the square that holds half of the gradient.", "name": "fig-features-receptive"}}
def half_side(gradient, centre=160):
    """Side in pixels of the square around the centre with half of the gradient."""
    for reach in range(centre):
        inside = slice(centre - reach, centre + reach + 1)
        if gradient[inside, inside].sum() > gradient.sum() / 2:
            return 2 * reach + 1


figure, panels = plt.subplots(1, 2, figsize=(6.5, 3.5), sharey=True)
for axes, (layer, gradient), field in zip(panels, gradients.items(), (99, 291), strict=True):
    axes.imshow((gradient / gradient.max()) ** 0.2, cmap="magma")
    half = half_side(gradient)
    assert half < field / 2.5
    for side, style in ((field, "-"), (half, "--")):
        corner = 160 - side / 2
        axes.add_patch(plt.Rectangle((corner, corner), side, side, fill=False, ec="w", ls=style))
    axes.set(title=f"{layer} sees {field} px, half of it in {half}", xlabel="column (px)")
panels[0].set_ylabel("row (px)")
figure.suptitle("A position sees much and looks mostly at its centre", fontsize="medium")
plt.show()

# %% [markdown]
# {cite:t}`luo2016effective` call the part that counts the *effective* receptive field. So a position of
# layer2 describes a spot of a few dozen pixels with its surroundings, and layer3 adds a wider view.
#
# ### Freezing
#
# A {term}`frozen` network does not change. This takes two things, and they are independent:
#
# - `requires_grad_(False)`: no gradient for the parameters, so no optimizer can move them.
# - `eval()`: {term}`evaluation mode`. In training mode {term}`BatchNorm` {cite:p}`ioffe2015batchnorm`
#   standardises each channel by the mean and deviation of the batch at hand,
#   and updates its *running statistics* with them. In evaluation mode it uses the running
#   statistics and leaves them alone.
#
# Running statistics are buffers, not parameters: `requires_grad_(False)` does not protect them. And a new
# network is in training mode until you say otherwise.
#
# In evaluation mode BatchNorm multiplies every channel by one constant and adds another. The convolution
# before it could do that itself, with larger weights and a bias. So the library *folds* each BatchNorm
# into its convolution (appendix), and then there are no statistics left that could move.
#
# ### Two layers on one grid
#
# Layer2 has 32x32 positions and layer3 has 16x16. To join them, layer3 is interpolated. Each new
# position lies a quarter of a step from one old position and three quarters from the next, so it
# takes 3/4 of the nearer and 1/4 of the farther. On a row of three, between 0 and 4 you expect 1 and 3.

# %%
coarse_row = torch.tensor([[[0.0, 4.0, 8.0]]])
fine_row = F.interpolate(coarse_row, 6, mode="linear", align_corners=False)
print(fine_row.flatten().tolist())

# %% [markdown]
# ### All of it in one class
#
# - The backbone is built, its BatchNorm folded away, its border mirrored if you ask for it (appendix), and
#   no parameter has a gradient. A training loop may call `model.train()`: nothing in here has two modes.
# - `outputs` returns each layer on its own grid, `on_one_grid` brings them all to the grid of the
#   first layer named, `join` joins their channels, and `forward` does all three.
# - It returns `(N, 32, 32, 1536)` for our images. From here on the channels are *last*:
#   `features[n, i, j]` is the vector of one position.

# %% tags=["library"]
# simplenet_lib/features.py


class FrozenFeatures(nn.Module):
    """Outputs of a frozen backbone's layers on one grid (paper, section 3.1)."""

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        weights: Weights,
        neighbourhood: int = 1,
        border: str = "zeros",
    ) -> None:
        super().__init__()
        network = build_backbone(backbone, weights)
        fold_batchnorm(network)
        known = ("layer1", "layer2", "layer3", "layer4")
        for layer in layers:
            if layer not in known:
                raise SimpleNetError(f"unknown layer '{layer}'. Known: {', '.join(known)}.")
        last_blocks = [getattr(network, layer)[-1] for layer in layers]
        self.layer_channels = [
            getattr(block, "conv3", block.conv2).out_channels for block in last_blocks
        ]
        self.channels = sum(self.layer_channels)
        if border == "reflect":
            reflect_border(network)
        self.extractor = create_feature_extractor(network, {layer: layer for layer in layers})
        self.extractor.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.layers = tuple(layers)
        self.neighbourhood = neighbourhood

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to features (N, h, w, C), channels last."""
        return self.join(self.outputs(images))

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Join the layers' outputs to features (N, h, w, C), channels last."""
        joined = torch.cat(self.on_one_grid(outputs), dim=1)
        return around(joined, self.neighbourhood).permute(0, 2, 3, 1)

    def outputs(self, images: Tensor) -> list[Tensor]:
        """The layers' outputs, each on its own grid, (N, C_l, h_l, w_l)."""
        outputs = self.extractor(images.contiguous(memory_format=torch.channels_last))
        return [outputs[layer] for layer in self.layers]

    def on_one_grid(self, outputs: list[Tensor]) -> list[Tensor]:
        """Bring every map (N, _, h_l, w_l) to the grid of the first, (N, _, h, w)."""
        height, width = outputs[0].shape[-2:]
        size = (height, width)
        maps = []
        for features in outputs:
            if features.shape[-1] > size[-1]:
                features = F.adaptive_avg_pool2d(features, size)
            if features.shape[-1] < size[-1]:
                features = F.interpolate(features, size, mode="bilinear", align_corners=False)
            maps.append(features)
        return maps


def around(maps: Tensor, side: int) -> Tensor:
    """Average maps (N, _, h, w) over a square of ``side`` positions around every position."""
    if side == 1:
        return maps
    # As F.avg_pool2d without what lies outside of the map, in a quarter of its time.
    ones = maps.new_ones(maps.shape[1], 1, side, side)
    counts = F.conv2d(torch.ones_like(maps[:1, :1]), ones[:1], padding=side // 2)
    return F.conv2d(maps, ones, padding=side // 2, groups=len(ones)) / counts


# %% [markdown]
# ### The scale of the channels
#
# A distance adds up the squared differences of 1,536 channels, so a channel with a large spread has a
# large say. How different are the spreads? Take the {term}`standard deviation` of every channel over
# eight normal images.


# %%
def vectors(features):
    """One row for every position: (N, h, w, C) to (N*h*w, C)."""
    return features.flatten(0, 2)


frozen = FrozenFeatures("resnet50", ("layer2", "layer3"), weights)
normal = {name: frozen(load(train[name], range(8))) for name in ("nut", "cloth")}
parts = {"layer2": slice(0, 512), "layer3": slice(512, 1536)}
deviations = {name: vectors(maps).std(dim=0) for name, maps in normal.items()}
print("features of eight nuts:", tuple(normal["nut"].shape))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two histograms side by side with a logarithmic horizontal axis, for nut and for cloth. Both layers spread over more than a factor of ten; layer3 lies left of layer2. On cloth a long tail reaches down to a thousandth."}, "figure": {"caption": "Standard deviation of every channel over eight normal images. The leftmost bar also holds the channels below the axis.", "name": "fig-features-scale"}}
figure, panels = plt.subplots(1, 2, figsize=(6.5, 3), sharey=True)
edges = np.geomspace(1e-3, 4, 37)
palette = seaborn.color_palette("colorblind")
for axes, name in zip(panels, ("nut", "cloth"), strict=True):
    for layer, colour in (("layer2", palette[2]), ("layer3", palette[4])):
        values = deviations[name][parts[layer]].clip(edges[0]).numpy()
        weight = np.full(len(values), 100 / len(values))
        axes.hist(values, edges, weights=weight, color=colour, alpha=0.6, label=layer)
    axes.set(xscale="log", title=name, xlabel="deviation of a channel")
panels[0].set_ylabel("share of channels (%)")
panels[0].legend(loc="upper left")
figure.suptitle("The channels differ widely in scale", fontsize="medium")
plt.show()

# %% [markdown]
# The spreads differ by a factor of about ten and more, and on cloth dozens of channels are nearly silent:
# detectors of things that do not occur on cloth.
#
# {term}`Standardisation <standardisation>` takes the scale out: subtract each channel's mean over the
# normal images, divide by its deviation. But when a silent channel does fire on a normal image, the
# quotient is huge, and outweighs hundreds of ordinary entries. So the library adds 0.3
# (`FLOOR`) times the *mean* deviation of all channels to each deviation. The 0.3 follows from nothing;
# it is a choice that works. By hand, for three channels and four vectors:
#
# | | channel 1 | channel 2 | channel 3 |
# |---|---|---|---|
# | four vectors | 10, -10, 10, -10 | 2, 2, -2, -2 | 0, 0, 0, 0 |
# | deviation (mean of the three: 4) | 10 | 2 | 0 |
# | divisor: deviation + 0.3 · 4 | 11.2 | 3.2 | 1.2 |
# | a new vector | 5.6 | -3.2 | 6 |
# | standardised | 0.5 | -1 | 5 |
#
# With the floor no channel's deviation exceeds 1. What this buys is independence of the *unit*: one
# size of noise (chapter 4) and one learning rate serve all backbones. It does not promise better
# detection; you test that below. `fit` takes the features of one image after the other, in {term}`half
# precision` as the library stores them.

# %% tags=["library"]
# simplenet_lib/features.py


class Standardise(nn.Module):
    """Give every channel mean 0 and deviation at most 1 over the normal images."""

    FLOOR = 0.3

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, maps: Iterable[FeatureMap]) -> None:
        """Measure every channel over cached maps (h, w, C)."""
        count = 0
        total = torch.zeros(len(self.mean), dtype=torch.float64)
        squares = torch.zeros_like(total)
        for features in maps:
            vectors = torch.from_numpy(features.copy()).double().flatten(0, 1)
            total += vectors.sum(dim=0)
            squares += vectors.square_().sum(dim=0)
            count += len(vectors)
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_((std + self.FLOOR * std.mean()).clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features (..., C)."""
        return (features - self.mean) / self.std


# %%
four = np.array([[10, 2, 0], [-10, 2, 0], [10, -2, 0], [-10, -2, 0]], dtype=np.float16)
toy = Standardise(3)
toy.fit([four.reshape(2, 2, 3)])  # one image with a grid of 2x2
new = torch.tensor([5.6, -3.2, 6.0])
print("divisors:    ", [round(value, 2) for value in toy.std.tolist()])
print("standardised:", [round(value, 2) for value in toy(new).tolist()])

# %% tags=["hide-cell"]
# Check: the features once more, without create_feature_extractor, with every BatchNorm in its place
# (a forward hook is called with the output of a module) and layer3 enlarged by hand; and NumPy's own
# mean and deviation.
caught = {}
plain = build_backbone("resnet50", weights).eval()
for layer in ("layer2", "layer3"):
    getattr(plain, layer).register_forward_hook(
        lambda module, inputs, output, layer=layer: caught.update({layer: output})
    )
with torch.no_grad():
    plain(pair)
index = np.arange(32)
nearer = index // 2
farther = (nearer + np.where(index % 2 == 0, -1, 1)).clip(0, 15)
rows = 0.75 * caught["layer3"][:, :, nearer] + 0.25 * caught["layer3"][:, :, farther]
enlarged = 0.75 * rows[..., nearer] + 0.25 * rows[..., farther]
expected = torch.cat([caught["layer2"], enlarged], dim=1).permute(0, 2, 3, 1)
assert float((frozen(pair) - expected).abs().max()) < 1e-3
assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())

standardise = {}
for name, maps in normal.items():
    arrays = maps.half().numpy()
    standardise[name] = Standardise(frozen.channels)
    standardise[name].fit(arrays)
    centre = arrays.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = arrays.std(axis=(0, 1, 2), dtype=np.float64)
    expected = (arrays[0] - centre) / (deviation + 0.3 * deviation.mean())
    result = standardise[name](torch.from_numpy(arrays[0]).float()).numpy()
    assert float(np.abs(result - expected).max()) < 1e-3
    low, high = np.quantile(deviations[name], (0.01, 0.99))
    assert high > 4 * low

# %% [markdown]
# ## What it does
#
# ### Features as pictures
#
# Nobody can look at 1,536 channels. {term}`PCA` finds the directions in which the vectors differ
# most. Show the first three as red, green and blue, and positions of similar colour have similar
# features. The directions come from normal images only.


# %% tags=["hide-input"] mystnb={"image": {"alt": "Four images above, their coloured feature grids below: a good nut, a nut with a broken corner, good cloth, cloth with a hole. In the grids of the nuts, belt, nut face, rim and hole have different colours; the cloth is an even area with a border of other colours, in which the hole stands out."}, "figure": {"caption": "Test images, and their standardised features reduced to three numbers a position. One colour scheme for each category.", "name": "fig-features-pca"}}
def picture(image):
    """Undo the normalisation: (3, H, W) to (H, W, 3), 0 to 1."""
    undone = image.permute(1, 2, 0) * torch.tensor(IMAGENET_STD) + torch.tensor(IMAGENET_MEAN)
    return undone.clamp(0, 1)


def show(axes, pixels, **options):
    """Draw without frame and ticks."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)
    return axes.imshow(pixels, **options)


kinds = {name: [sample.defect for sample in test[name].samples] for name in test}
columns = []
for name, defect in (("nut", "broken_corner"), ("cloth", "hole")):
    drawn = torch.randperm(8 * 32 * 32, generator=torch.Generator().manual_seed(0))[:2000]
    rows = vectors(standardise[name](normal[name]))[drawn].numpy()
    pca = PCA(3, svd_solver="randomized", random_state=0).fit(rows)
    low, high = np.quantile(pca.transform(rows), (0.02, 0.98), axis=0)
    shown = load(test[name], [kinds[name].index("good"), kinds[name].index(defect)])
    components = pca.transform(vectors(standardise[name](frozen(shown))).numpy())
    colours = ((components - low) / (high - low)).clip(0, 1).reshape(2, 32, 32, 3)
    columns += zip(shown, colours, ("good", defect), strict=True)
figure, panels = plt.subplots(2, 4, figsize=(6.5, 3.6))
for panel, (image, colours, defect) in zip(panels.T, columns, strict=True):
    show(panel[0], picture(image))
    panel[0].set_title(defect.replace("_", " "), fontsize=9)
    show(panel[1], colours, interpolation="nearest")
panels[0, 0].set_ylabel("image")
panels[1, 0].set_ylabel("features, 32 x 32")
figure.suptitle("Similar parts of an image have similar features", fontsize="medium")
plt.show()

# %% [markdown]
# Belt, hexagon and hole come out in different colours, and so does the hole in the cloth. You also see
# a side effect: the outermost positions of the cloth have colours of their own. Beyond the border of
# the image the convolutions see zeros. The library's default mirrors the maps there; the first chapters
# keep the zeros, as the paper does.
#
# ### Chapter 1's statistics on these features
#
# Here are chapter 1's two functions, unchanged except that the channels come last. Judge the maps as in
# chapter 1: the {term}`image score` is the highest value of the {term}`anomaly map`, and {term}`AUROC`
# the probability that a defective image scores higher than a good one. Then: does the highest position
# touch the marked defect? And the AUROC of single pixels, after the map is enlarged to the image.


# %%
def fit_pixels(images):
    """Mean and variance of every place and channel: (N, h, w, C) to two of (h, w, C)."""
    return images.mean(dim=0), images.var(dim=0, correction=0)


def feature_map(images, mean, variance, delta=0.01):
    """Squared distance from the mean over the variance: (N, h, w, C) to (N, h, w)."""
    return ((images - mean) ** 2 / (variance + delta)).mean(dim=-1)


def quality(maps):
    """Image AUROC, and in how many defective images the highest position touches the defect."""
    scores, highest = maps.flatten(1).max(dim=1)
    touches = F.adaptive_max_pool2d(masks.float(), maps.shape[1:]).flatten(1) > 0
    on_defect = touches.gather(1, highest[:, None])[:, 0].numpy()
    return roc_auc_score(labels, scores), int(on_defect[labels == 1].sum())


masks = torch.stack([item["mask"] for item in test["nut"]])
labels = np.array([sample.label for sample in test["nut"].samples])
pixels = {name: load(split["nut"], range(60)) for name, split in (("train", train), ("test", test))}
nut = {name: torch.cat([frozen(batch) for batch in p.split(10)]) for name, p in pixels.items()}
position_maps = feature_map(nut["test"], *fit_pixels(nut["train"]))
print("features:", tuple(nut["test"].shape), " maps:", tuple(position_maps.shape))

# %% tags=["hide-input", "nbval-ignore-output"]
compared = {
    "pixels": {split: images.permute(0, 2, 3, 1) for split, images in pixels.items()},
    "layer2": {split: maps[..., parts["layer2"]] for split, maps in nut.items()},
    "layer3": {split: maps[..., parts["layer3"]] for split, maps in nut.items()},
    "both layers": nut,
}
found = {}
print("statistics of     image AUROC    touched   pixel AUROC")
for name, values in compared.items():
    maps = feature_map(values["test"], *fit_pixels(values["train"]))
    found[name] = quality(maps)
    large = F.interpolate(maps[:, None], (256, 256), mode="bilinear", align_corners=False)
    of_pixels = roc_auc_score(masks.flatten()[::7], large.flatten()[::7])
    image_auroc, touched = found[name]
    error = auroc_deviation(image_auroc, 20, 40)
    print(f"{name:15} {image_auroc:6.2f} ± {error:.2f} {touched:5} of 40 {of_pixels:10.3f}")
assert found["pixels"][0] < 0.65 and found["pixels"][1] <= 4
assert found["both layers"][0] > 0.9 and found["both layers"][1] >= 27
assert abs(found["layer2"][0] - found["layer3"][0]) < 0.06

# %% tags=["hide-input"] mystnb={"image": {"alt": "Four nuts above, their maps below: a good nut, one with a dent, one with a fibre, one with rust; the marked defect is outlined in both rows. In the maps of fibre and rust the brightest spot lies inside the outline; the map of the dent is brightest elsewhere."}, "figure": {"caption": "Above: test nuts, the marked defect outlined. Below: the square root of the position statistics' map, all on one scale; the cross marks the highest position.", "name": "fig-features-position"}}
columns = [kinds["nut"].index(kind) for kind in ("good", "dent", "fibre", "rust")]
figure, panels = plt.subplots(2, 4, figsize=(7.2, 3.9))
drawn_maps = position_maps.sqrt()
limits = {"vmin": 0.5, "vmax": float(drawn_maps[columns].max())}
extent = (0, 256, 256, 0)
for column, place in zip(panels.T, columns, strict=True):
    show(column[0], picture(pixels["test"][place]), extent=extent)
    shown = show(column[1], drawn_maps[place], cmap="magma", extent=extent, **limits)
    if masks[place].any():
        for panel, colour in zip(column, (DEFECT, "white"), strict=True):
            panel.contour(masks[place], levels=[0.5], colors=[colour], linewidths=1)
    column[0].set_title(kinds["nut"][place].replace("_", " "), fontsize=9)
    row, column_of_grid = divmod(int(drawn_maps[place].argmax()), 32)
    column[1].plot(8 * column_of_grid + 4, 8 * row + 4, "x", color="cyan", markersize=8)
figure.colorbar(shown, ax=panels[1], label="distance", fraction=0.02)
figure.suptitle("On features, two lines of statistics find most defects", fontsize="medium")
plt.show()

# %% [markdown]
# The same two lines that guess on pixels reach about 0.95 on features and touch the defect in about 32
# of 40 images. Nothing was trained. This is the idea of PaDiM {cite:p}`defard2021padim`, which also
# uses how the channels of a position vary together.
#
# Either layer alone is about as good as both here, well within the ± of 0.03. SimpleNet takes both, so this
# book does.
#
# ### The distance to the nearest normal feature
#
# The position statistics need the part in the same place in every photo. Another judge does not. Collect
# a *memory*, a random sample of the 61,440 normal vectors from anywhere in the images; a vector is
# suspicious if nothing in memory is near. By hand: from $(5, 5)$ the nearest of $(0, 0)$, $(1, 1)$ and
# $(2, 1)$ is the last, three to the left and four below: distance 5. PatchCore
# {cite:p}`roth2022patchcore` chooses the memory with more care and averages neighbouring positions
# first. A random memory is a matter of luck, so draw it three times.


# %% tags=["nbval-ignore-output"]
def draw_memory(features, seed, size):
    """A random sample of the vectors of all positions, (size, C)."""
    rows = vectors(features)
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))[:size]]


def nearest(features, memory):
    """Distance of every position to its nearest neighbour in the memory, (N, h, w)."""
    return torch.cdist(vectors(features), memory).amin(dim=1).view(features.shape[:3])


scale = Standardise(frozen.channels)
scale.fit(nut["train"].half().numpy())
standard = {split: scale(maps) for split, maps in nut.items()}
neighbours = {}
for name, values, size, draws in (
    ("raw, 512", nut, 512, 3),
    ("standardised, 512", standard, 512, 3),
    ("standardised, 2,000", standard, 2000, 1),
):
    for seed in reversed(range(draws)):
        maps = nearest(values["test"], draw_memory(values["train"], seed, size))
        neighbours.setdefault(name, []).append(quality(maps)[0])
    neighbour_maps = maps  # of the last row and seed 0
    print(f"{name:20} image AUROC", "  ".join(f"{auroc:.2f}" for auroc in neighbours[name]))

# %% tags=["hide-cell"]
# Check the order with tolerances; and the position statistics do not care for the scale.
mean_of = {name: np.mean(values) for name, values in neighbours.items()}
assert mean_of["raw, 512"] + 0.05 < mean_of["standardised, 512"] < found["both layers"][0]
assert mean_of["standardised, 2,000"] > mean_of["standardised, 512"]
rescaled = feature_map(standard["test"], *fit_pixels(standard["train"]))
assert abs(quality(rescaled)[0] - found["both layers"][0]) < 0.05

# %% [markdown]
# Whether standardising helps depends on the method. Neighbours gain a lot by it: a distance over 1,536
# channels listens to the loud ones. The position statistics gain nothing (0.93 instead of 0.95): they
# divide by their own variance anyway.
#
# The draws differ by several hundredths, and a larger memory is better: a random sample
# can miss a normal spot, and then that spot looks anomalous. But every position of every test image is
# compared with every vector in the memory. SimpleNet goes another way: it learns the border of the
# normal vectors once, in a small network, and forgets the vectors.
#
# ## What can go wrong
#
# **You forget `eval()`.** Here is a network that is frozen only halfway: no parameter has a gradient, but
# batches pass in training mode. After each, compute the features of one nut in evaluation mode.
# `FrozenFeatures` goes through the same.

# %%
half_frozen = build_backbone("resnet50", weights).requires_grad_(False)
half_frozen = create_feature_extractor(half_frozen, ["layer2"])
whole = nn.Sequential(frozen, nn.Linear(1536, 512))


def drift(trained, features_of):
    """Change of one nut's features after 0 to 4 batches in training mode, relative."""
    seen = []
    for _ in range(5):
        trained.eval()
        with torch.no_grad():
            seen.append(features_of(pair[:1]))
            trained.train()(pair)
    return [float((features - seen[0]).norm() / seen[0].norm()) for features in seen]


lost = drift(half_frozen, lambda images: half_frozen(images)["layer2"])
kept = drift(whole, frozen)

# %% tags=["hide-input"] mystnb={"image": {"alt": "A line that rises with every batch in training mode, and a flat line at zero for FrozenFeatures."}, "figure": {"caption": "Features of one image in evaluation mode, compared with the correct ones, after more and more batches that passed while `eval()` was forgotten.", "name": "fig-features-eval"}}
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.plot(range(5), np.multiply(lost, 100), "o-", color=DEFECT, label="eval() forgotten")
axes.plot(range(5), np.multiply(kept, 100), "o-", color=NORMAL, label="FrozenFeatures")
axes.set(
    xlabel="batches passed in training mode",
    ylabel="change of the features (%)",
    xticks=range(5),
    ylim=(-3, None),
    title="Every batch without eval() moves the features further",
)
axes.legend(loc="center right")
plt.show()
assert lost[4] > lost[1] > 0.03 and max(kept) < 1e-4

# %% [markdown]
# No optimizer has taken a step: the running statistics have moved.
#
# ## Exercises
#
# :::{exercise} easy: the other stride
# :label: ex-features-receptive
#
# torchvision's own weights have the stride of layer2 and layer3 in the first 3x3 convolution instead of
# the 1x1. What do the two layers then see? And layer4 of the original network, with three blocks? Work it
# out by hand, then check with `receptive_field`.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: 91 and 267 pixels, as the first 3x3 of each takes the shorter steps; layer4 sees 483.
# By hand: 35 + 2 * 4 + 3 * 2 * 8 = 91, then 91 + 2 * 8 + 5 * 2 * 16 = 267; 291 + 3 * 2 * 32 = 483.
other2 = upto1 + [(3, 2)] + 3 * [(3, 1)]
other3 = other2 + [(3, 2)] + 5 * [(3, 1)]
upto4 = upto3 + [(1, 2)] + 3 * [(3, 1)]
seen = [receptive_field(layers)[0] for layers in (other2, other3, upto4)]
print("layer2 {}, layer3 {}; layer4 {}".format(*seen))
assert seen == [91, 267, 483]

# %% [markdown]
# :::{exercise} medium: what the place is worth
# :label: ex-features-place
#
# The position statistics have a mean and a variance for every position *and* channel. Change the detector:
# give all positions of the nut the same, one mean and one variance for each channel, over all positions of
# all training images. Where does it land on the scoreboard, and how often does the highest position touch
# the defect? What does it say about why the position statistics work?
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: about 0.78 instead of 0.95, and 23 of 40 instead of 32. The belt is nothing unusual as
# such, but it is inside the nut: half of what the statistics know is what belongs where. The photos show
# every nut in the middle, and that is a favour they do us.
without_place = feature_map(nut["test"], *fit_pixels(vectors(nut["train"])))
place_auroc, place_touched = quality(without_place)
print(f"image AUROC {place_auroc:.1f}, touched about {round(place_touched, -1)} of 40")
assert abs(place_auroc - 0.78) < 0.06 and 17 <= place_touched <= 29

# %% [markdown]
# :::{exercise} hard: where does layer3 land?
# :label: ex-features-shift
#
# The receptive field of position $(p, p)$ of layer2 is centred on pixel $8p$, that of layer3 on pixel
# $16p$. Bilinear interpolation places the positions differently: it puts the first one half a step
# inside the image. So which pixel is the centre of what position 20 of the *enlarged* layer3 describes?
# How far is that from the centre of position 20 of layer2?
#
# Hint: interpolate the row 0, 16, 32, ... of pixel centres.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: pixel 156 instead of 160, displaced by half a position of layer2.
# Position 20 mixes 3/4 of coarse position 10 (pixel 160) with 1/4 of position 9 (pixel 144).
centres = 16.0 * torch.arange(20).view(1, 1, 20)
enlarged_centres = F.interpolate(centres, 40, mode="linear", align_corners=False).flatten()
shift = 8 * 20 - enlarged_centres[20].item()
print("position 20 of the enlarged layer3 describes pixel", int(enlarged_centres[20]))
print("displaced by", int(shift), "pixels")
assert enlarged_centres[20] == 156 and shift == 4
# With layer3 put in its right place the position statistics reach 0.948 instead of 0.946: four pixels
# are little beside what a position of layer3 sees. The library leaves it, as the paper's code does.

# %% [markdown]
# ## Quiz
#
# **1. A position of layer3 may see more pixels than the image has. Why does layer3 still say
# something about *where* a defect is?**
#
# <details>
# <summary>Answer</summary>
#
# Because the pixels in the receptive field do not count alike. Half of the gradient lies in a
# square around the centre whose side is less than half of the field. Neighbouring positions share
# most of their field but have different centres.
#
# </details>
#
# **2. You call `requires_grad_(False)` on the backbone and put only the adaptor's parameters into
# the optimizer. Why can the features of an image still change during training?**
#
# <details>
# <summary>Answer</summary>
#
# Because BatchNorm's running statistics are not parameters. In training mode each forward pass
# updates them, with no gradient and no optimizer. Only evaluation mode stops that.
#
# </details>
#
# **3. Chapter 1's statistics fail on the nuts' pixels and work on their features. The nut turns in both.
# What is different?**
#
# <details>
# <summary>Answer</summary>
#
# A pixel says how bright a point is, and that changes completely when an edge moves by two pixels. A
# feature describes a spot of some dozen pixels by what is seen there, and it changes slowly when the
# spot moves a little. So the statistics of one position are those of "rim" or "belt", not of whatever
# happened to lie under that pixel.
#
# </details>

# %% [markdown]
# ## The scoreboard
#
# The same 60 test nuts as in chapter 1, at 256 pixels. Two detectors are new, and neither was trained.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three rows. Pixel statistics, grey, at 0.57 with a wide bar; position statistics, coloured, at about 0.95; neighbours, coloured, at about 0.92. The bars of the last two overlap."}, "figure": {"caption": "Image AUROC on the 60 test nuts after chapter 2. Bars: standard deviation over test images.", "name": "fig-features-scoreboard"}}
board_labels, rows = benchmark.scoreboard()
live = {
    "pixel statistics": rows["pixel statistics"],
    "position statistics": position_maps.amax(dim=(1, 2)).numpy(),
    "neighbours": neighbour_maps.amax(dim=(1, 2)).numpy(),
}
plots.scoreboard(live, board_labels, new=["position statistics", "neighbours"])
plt.show()
for name, scores in live.items():
    of_file = roc_auc_score(board_labels, rows[name])
    assert abs(roc_auc_score(board_labels, scores) - of_file) < 0.02, name

# %% [markdown]
# ## Summary
#
# - The feature of a position is the joined output of layer2 and layer3 of a pretrained ResNet-50:
#   1,536 channels on a 32x32 grid for an image of 256 pixels.
# - A position of layer2 sees 99 pixels and one of layer3 more than the image, exactly
#   as $r \leftarrow r + (k - 1) j$ says.
# - Frozen means two things: no gradients, and BatchNorm in evaluation mode.
# - `Standardise` makes what follows independent of the channels' scale, with a floor for silent ones.
# - On features, chapter 1's mean and variance find 0.95 of the pairs of a good and a defective nut
#   instead of 0.57, without training. The nearest of 2,000 random normal features finds 0.92.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.1: the feature extractor of SimpleNet.
# - {cite:t}`he2016resnet`: the residual network, its bottleneck blocks and stages.
# - {cite:t}`araujo2019receptive`, {cite:t}`luo2016effective`: receptive fields, whole and effective.
# - {cite:t}`ioffe2015batchnorm`: BatchNorm, and why it has two modes.
# - {cite:t}`defard2021padim`, {cite:t}`roth2022patchcore`: the two detectors of this chapter, done
#   properly.
# - {cite:t}`oquab2024dinov2`, {cite:t}`damm2025anomalydino`, {cite:t}`batzner2024efficientad`: other
#   backbones.
#
# ## Next
#
# The features describe everyday photos, not nuts: [The adaptor](03_adaptor.ipynb) moves them
# towards your images.
#
# ## Appendix: inside the backbone
#
# Two files of ResNet-50 weights are in use. The original ones, which come from a package of the npm
# registry and with which the numbers of this book were computed, stride in the 1x1 convolution;
# torchvision's, which you mostly get on Colab, in the 3x3. With the wrong stride all weights load, all
# shapes are right, and the features are those of another network. So the library keeps the stride together
# with the weights. With torchvision's the last digits differ.
#
# `fold_batchnorm` finds every pair of a convolution and a BatchNorm; in a ResNet each BatchNorm follows
# its convolution. `reflect_border` has every convolution see its map mirrored at the border.

# %% tags=["library", "hide-cell"]
# simplenet_lib/features.py


def build_backbone(name: str, weights: Weights) -> models.ResNet:
    """A torchvision ResNet that holds ``weights`` and strides where they want it."""
    torchvision_url(name)  # refuses names outside the ResNet family
    network: models.ResNet = models.get_model(name)
    try:
        network.load_state_dict(weights.state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise SimpleNetError(f"{weights.source}: not the weights of {name} ({reason})") from error
    if weights.strides == "conv1":
        for stage in (network.layer2, network.layer3, network.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return network


# %% tags=["library", "hide-cell"]
# simplenet_lib/features.py


def fold_batchnorm(network: nn.Module) -> None:
    """Merge each BatchNorm into the convolution before it, as it works in evaluation mode."""
    network.eval()
    for parent in list(network.modules()):
        for (name, conv), (norm_name, norm) in pairwise(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


# %% tags=["library", "hide-cell"]
# simplenet_lib/features.py


def reflect_border(network: nn.Module) -> None:
    """Have every convolution see its map mirrored at the border, in place of zeros."""
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.padding != (0, 0):
                side = int(conv.padding[0])  # a ResNet's kernels are square
                conv.padding = (0, 0)
                setattr(parent, name, nn.Sequential(nn.ReflectionPad2d(side), conv))


# %% tags=["hide-cell"]
# On an even map of ones, a 3x3 convolution of ones sees four ones in a corner; mirrored, all nine.
small = nn.Sequential(nn.Conv2d(1, 1, kernel_size=3, padding=1, bias=False))
nn.init.ones_(small[0].weight)
with torch.no_grad():
    corners = [small(torch.ones(1, 1, 4, 4))[0, 0, 0, 0].item()]
    reflect_border(small)
    corners.append(small(torch.ones(1, 1, 4, 4))[0, 0, 0, 0].item())
print("corner with zeros around: {:.0f}, mirrored: {:.0f}".format(*corners))
