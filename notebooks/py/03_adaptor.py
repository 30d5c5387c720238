# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The adaptor
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/simplenet-piece-by-piece/blob/main/notebooks/03_adaptor.ipynb)
#
# The frozen features come from everyday photos. In this chapter you put one linear layer behind them,
# the adaptor, and you measure what it changes and what it cannot. Chapter 7 trains it.
#
# ## What you will learn
#
# - **Show** that a 1x1 convolution is one linear layer, applied at every position.
# - **Count** its parameters by hand, and compare with a 3x3 convolution.
# - **Predict** the scale of its output from the formula of its initialisation.
# - **Measure** how well defects can be told apart before and behind a random adaptor.
# - **Recognise** channels in the wrong place, and a collapse that the loss rewards.
#
# ## Before you start
#
# You have read [The data](01_dataset.ipynb) and [Frozen features](02_features.ipynb). Skim 12 minutes,
# read with the code 30, work 60. It runs in under a minute on two CPU cores; the
# first run also computes the features of 120 images, once.

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
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from simplenet_lib import benchmark, plots
from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import FeatureMaps, Standardise, cache_folder, cached_features
from simplenet_lib.model import SimpleNet
from simplenet_lib.plots import DEFECT, NORMAL
from simplenet_lib.synthetic import generate
from simplenet_lib.weights import find_weights

plots.use_book_style()

# %% [markdown]
# ## The idea
#
# The {term}`backbone` learned to tell dogs from teapots. Some of its {term}`channels <channel>`
# describe things that vary a lot among good parts and do not matter, such as how the light falls.
# Others react to a defect, but only a little. This mismatch is the {term}`domain bias`. The
# {term}`adaptor` is a small trainable layer between the {term}`frozen` features and the rest of the
# detector. It can turn some channels up and others down.
#
# Take {term}`features <feature>` of length 2. The first channel says how bright a {term}`position`
# is, the second how rough. You know four good vectors; then a new good one and a {term}`defect`
# arrive. As in chapter 2, the distance to the nearest known good vector says how unusual each is.

# %%
known_good = torch.tensor([[0.0, 0.0], [4.0, 0.0], [8.0, 0.0], [12.0, 0.0]])
new = torch.tensor([[6.0, 0.0], [8.0, 1.0]])  # a good one, a defect


def nearest(vectors: Tensor, normal: Tensor) -> Tensor:
    """Distance of each vector (n, C) to the nearest normal one (m, C)."""
    return torch.cdist(vectors, normal).amin(dim=1)


good_distance, defect_distance = nearest(new, known_good).tolist()
print(f"frozen:  new good {good_distance:.0f}, defect {defect_distance:.0f}")

# %% [markdown]
# The order is wrong: the good vector is farther away than the defect. Brightness varies by several
# units among good parts, so a step of 2 there means little. Roughness never varies, so a step of 1
# means a lot. Now apply a linear layer, $z = W f + b$, that multiplies the second channel by 4 and
# moves everything 6 to the left ({numref}`fig-adaptor-toy`).

# %%
toy_weight = torch.tensor([[1.0, 0.0], [0.0, 4.0]])
toy_bias = torch.tensor([-6.0, 0.0])
adapted_known, adapted_new = (v @ toy_weight.T + toy_bias for v in (known_good, new))
print("adapted:", adapted_new.int().tolist())
good_distance, defect_distance = nearest(adapted_new, adapted_known).tolist()
print(f"adapted: new good {good_distance:.0f}, defect {defect_distance:.0f}")

# %% [markdown]
# The order is right. The bias $b$ had no part in it: it moves all vectors alike and changes no
# distance. And note where the factor 4 could come from: the good vectors alone show that roughness
# is the quiet channel. You did not need the defect.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two scatter plots side by side. On the left, four blue dots lie on a horizontal line with a blue circle between two of them, and an orange cross lies just above one of the dots. On the right the cross is far above the line, farther than the circle is from its neighbours."}, "figure": {"caption": "Six vectors before and after a linear layer. Grey lines lead to the nearest known good vector.", "name": "fig-adaptor-toy"}}
figure, axes = plt.subplots(1, 2, figsize=(6.5, 2.8), sharey=True)
for axis, known, arrived, name in (
    (axes[0], known_good, new, "Frozen: the defect is the nearer one"),
    (axes[1], adapted_known, adapted_new, "Adapted: the defect stands out"),
):
    for vector in arrived:
        home = known[torch.cdist(vector[None], known).argmin()]
        axis.plot(*torch.stack([vector, home]).T, color="0.6", zorder=0)
    axis.scatter(*known.T, color=NORMAL, label="known good")
    axis.scatter(*arrived[0], s=60, facecolor="white", edgecolor=NORMAL, label="new good")
    axis.scatter(*arrived[1], s=60, color=DEFECT, marker="X", label="defect")
    axis.set(title=name, xlabel="channel 1", ylim=(-1, 5), xticks=known[:, 0].int().tolist())
axes[0].set_ylabel("channel 2")
axes[0].legend(loc="upper left")
plt.show()

# %% [markdown]
# ## From the paper
#
# Section 3.2 of the paper {cite:p}`liu2023simplenet` transfers the features to the target domain
# with a feature adaptor $G_θ$. In our notation, at every position on its own,
#
# $$ z = G_θ(f) = W f + b $$ (eq-adaptor)
#
# where $f$ is the frozen feature with $C$ channels and $z$ the {term}`adapted feature` with $A$
# channels. The matrix $W$ has the shape `(A, C)` and $b$ the shape `(A,)`. Together they are $θ$,
# which is trained. The same $W$ and $b$ serve all positions of all images: a batch of
# `(N, 32, 32, 1536)` features becomes `(N, 32, 32, 512)`.
#
# Why not something stronger? In the paper's ablation on {term}`MVTec AD` one linear layer comes out a few
# tenths of a point of image {term}`AUROC` above none, and above one of several layers. Probably a stronger
# adaptor fits the few normal images too closely.
#
# ## Build it
#
# ### One position at a time
#
# Begin with a map small enough for paper: one image, a grid of 2x2, 2 channels, which come last. At row 0,
# column 1 take $f = (2, 1)$. {eq}`eq-adaptor` gives
#
# $$ z = \begin{pmatrix} 1 \cdot 2 + 2 \cdot 1 + 0 \\ 3 \cdot 2 - 1 \cdot 1 + 10 \end{pmatrix}
#      = \begin{pmatrix} 4 \\ 15 \end{pmatrix}. $$
#
# The other three are yours: $(1, 0) \to (1, 13)$, $(3, 1) \to (5, 18)$, $(4, 0) \to (4, 22)$. In
# code it is a loop over positions.

# %%
toy = torch.tensor([[[[1.0, 0.0], [2.0, 1.0]], [[3.0, 1.0], [4.0, 0.0]]]])
weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
bias = torch.tensor([0.0, 10.0])


def adapt_by_loop(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map features (N, h, w, C) to (N, h, w, A), one position after the other."""
    count, rows, columns, _ = features.shape
    adapted = torch.empty(count, rows, columns, len(bias))
    for n in range(count):
        for row in range(rows):
            for column in range(columns):
                adapted[n, row, column] = weight @ features[n, row, column] + bias
    return adapted


by_loop = adapt_by_loop(toy, weight, bias)
print(by_loop.int().tolist())

# %% [markdown]
# ### The same without a loop
#
# Three ways give the same numbers at once for all positions.
#
# - `nn.Linear` acts on the last dimension, and there the channels are.
# - `einsum` names the dimensions: multiply along `c`, keep the rest.
# - A {term}`1x1 convolution` {cite:p}`lin2014nin` slides a window of one position over the map and applies
#   one linear layer to what it covers. Its weight has the shape `(A, C, 1, 1)`, and it wants its channels
#   first, `(N, C, h, w)`, so they have to move there and back.

# %%
linear = nn.Linear(2, 2)
convolution = nn.Conv2d(2, 2, kernel_size=1)
with torch.no_grad():
    linear.weight.copy_(weight)
    linear.bias.copy_(bias)
    convolution.weight.copy_(weight[:, :, None, None])
    convolution.bias.copy_(bias)

with torch.no_grad():
    results = {
        "linear": linear(toy),
        "einsum": torch.einsum("ac,nhwc->nhwa", weight, toy) + bias,
        "1x1 convolution": convolution(toy.permute(0, 3, 1, 2)).permute(0, 2, 3, 1),
    }
for name, result in results.items():
    print(f"{name:15s}", result.int().tolist())

# %% [markdown]
# The library takes `nn.Linear`: it needs no permute, and a list of single vectors `(B, C)` passes
# through it as well. The two lines with `init` set the first values of $W$ and $b$; you come back to
# them below.


# %% tags=["library"]
# simplenet_lib/adaptor.py


class Adaptor(nn.Module):
    """One linear layer, applied at every position: a 1x1 convolution (paper, section 3.2, G_θ)."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.linear = nn.Linear(in_channels, out_channels)
        nn.init.xavier_normal_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, features: Tensor) -> Tensor:
        """Map features (..., C) to adapted features (..., A)."""
        adapted: Tensor = self.linear(features)
        return adapted


# %% [markdown]
# ### It looks at no neighbour
#
# Change one position of the input. If the layer looks at no neighbour, exactly one position of the
# output changes. A 3x3 convolution, for comparison, changes nine.

# %%
torch.manual_seed(0)
before = torch.randn(1, 7, 7, 6)
after = before.clone()
after[0, 3, 3] += 1.0
single, window = Adaptor(6, 4), nn.Conv2d(6, 4, kernel_size=3, padding=1)
layers = {"1x1": single, "3x3": lambda maps: window(maps.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)}
changed = {}
for name, layer in layers.items():
    with torch.no_grad():
        difference = (layer(after) - layer(before)).abs().amax(dim=-1)[0]
    changed[name] = int((difference > 1e-5).sum())
    print(f"{name}: {changed[name]} of {difference.numel()} positions changed")

# %% [markdown]
# All that a position knows of its surroundings comes from the backbone, through its
# {term}`receptive field`. The adaptor does not blur the map.
#
# ### Parameters, by hand and by code
#
# $W$ has one entry for every pair of an input and an output channel, $b$ one for every output
# channel:
#
# $$ 1536 \cdot 512 + 512 = 786{,}944. $$
#
# A 3x3 convolution has nine such matrices: 7,078,400 parameters to learn from the same 60 images.


# %%
def parameters(layer: nn.Module) -> int:
    """Number of trained values in a layer."""
    return sum(parameter.numel() for parameter in layer.parameters())


C, A = 1536, 512
print(f"1x1: {parameters(Adaptor(C, A)):,}")
print(f"3x3: {parameters(nn.Conv2d(C, A, kernel_size=3)):,}")

# %% [markdown]
# ### The first values, and the scale they give
#
# {term}`Xavier initialisation`, in torch `xavier_normal_`, draws every entry of $W$ from a normal
# distribution with mean 0 and {term}`standard deviation` {cite:p}`glorot2010understanding`
#
# $$ \sqrt{\frac{2}{C + A}} = \sqrt{\frac{2}{2048}} = \frac{1}{32}. $$ (eq-xavier)
#
# What does that do to the size of the vectors? One output entry is a sum of $C$ products. The
# entries of $W$ are independent with variance $1/1024$, so the variance of the sum is $1/1024$
# times the sum of the squared inputs. If the input entries have a root mean square (RMS) of $r$,
# their squares add up to $C r^2$, and the RMS of an output entry is
#
# $$ r \, \sqrt{\frac{2C}{C + A}} = r \sqrt{1.5} \approx 1.22 \, r. $$ (eq-adaptor-scale)
#
# With $A = C$ the factor would be 1. Distances are another matter, because there are fewer entries:
# a squared distance sums over $A = 512$ outputs, each on average $1/1024$ of the squared input distance.
# So distances shrink to $\sqrt{512/1024} \approx 0.71$ of what they were.
#
# And they nearly all shrink *alike*. Each output is an independent random view of the same difference,
# and the average over 512 of them varies by only $1/\sqrt{2A} \approx 3\%$. That a random projection keeps
# distances is the lemma of Johnson and Lindenstrauss {cite:p}`johnson1984extensions`.

# %%
torch.manual_seed(0)
adaptor = Adaptor(C, A)
some = torch.randn(1, 20, 20, C)
with torch.no_grad():
    adapted = adaptor(some)
    some_vectors, adapted_vectors = (maps.flatten(0, 2) for maps in (some, adapted))
    distances = torch.pdist(adapted_vectors) / torch.pdist(some_vectors)
measured_scale = (adapted.square().mean() / some.square().mean()).sqrt().item()
print("output shape:", tuple(adapted.shape))
print(f"deviation of the weights, times 32: {adaptor.linear.weight.std().item() * 32:.1f}")
print(f"RMS out / RMS in: {measured_scale:.2f}, predicted {math.sqrt(2 * C / (C + A)):.2f}")
print(f"distance out / distance in: predicted {math.sqrt(0.5):.1f},", end=" ")
print(f"measured {distances.mean():.1f} give or take {distances.std() / distances.mean():.0%}")

# %% [markdown]
# This scale matters: chapter 4 adds noise to $z$ with a fixed standard deviation $σ$. Whether $σ = 0.5$ is
# much or little depends on how large $z$ is.

# %% tags=["hide-cell"]
# Check: the toys by hand; the adaptor against a 1x1 convolution with the same weights, at full width.
by_hand = torch.tensor([[[[1.0, 13.0], [4.0, 15.0]], [[5.0, 18.0], [4.0, 22.0]]]])
torch.manual_seed(1)
features = torch.randn(2, 5, 4, C)
with torch.no_grad():
    convolution = nn.Conv2d(C, A, kernel_size=1)
    convolution.weight.copy_(adaptor.linear.weight[:, :, None, None])
    convolution.bias.copy_(adaptor.linear.bias)
    expected = convolution(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    assert (adaptor(features) - expected).abs().max().item() < 1e-4
assert torch.equal(by_loop, by_hand) and all(torch.equal(r, by_hand) for r in results.values())
assert changed == {"1x1": 1, "3x3": 9}
assert parameters(adaptor) == 1536 * 512 + 512 == 786_944
assert abs(adaptor.linear.weight.std().item() * 32 - 1) < 0.01
assert 4 < adaptor.linear.weight.abs().max().item() * 32 < 7  # normal; uniform would end at 1.7
assert not adaptor.linear.bias.any()
assert abs(measured_scale - math.sqrt(1.5)) < 0.02
assert abs(distances.mean().item() - math.sqrt(0.5)) < 0.02 and distances.std() < 0.04

# %% [markdown]
# ## What it does
#
# A position stands for 8x8 pixels. It counts as defective if the {term}`mask` covers more than half of
# them. Normal ones are a random 4,000 from the *good* test images: a position beside a defect may well
# see it. As reference, take 6,000 random positions of the training images. Compare the same positions
# *frozen* (standardised, before the adaptor) and *adapted* by the adaptor as it was drawn.

# %% tags=["hide-input", "nbval-ignore-output"]
CONFIG = preset("course", resize=256, crop=256)  # zeros at the border, no neighbourhood
data = generate(cache_folder() / "synthetic")
train_set, test_set = (
    AnomalyDataset(data, "nut", split, make_transform(256, 256)) for split in ("train", "test")
)
model = SimpleNet(CONFIG, find_weights("resnet50"))
train_features, test_features = (
    cached_features(model.features, images, model.feature_key(), progress=False)
    for images in (train_set, test_set)
)

# %% tags=["hide-input"]
covered = torch.stack([item["mask"].float() for item in test_set])
covered = F.adaptive_avg_pool2d(covered, test_features.shape[1:3])
is_good = torch.tensor([sample.label == 0 for sample in test_set.samples])[:, None, None]
generator = torch.Generator().manual_seed(0)


def pick(maps: FeatureMaps, chosen: Tensor, at_most: int) -> Tensor:
    """Random positions of those chosen, (n, h, w), as vectors (at_most, C)."""
    positions = chosen.flatten().nonzero()[:, 0]  # counted through all maps
    keep = torch.randperm(len(positions), generator=generator)[:at_most]
    return torch.from_numpy(maps.vectors(positions[keep].numpy())).float()


standardise = Standardise(C)
standardise.fit(train_features)
frozen = {
    "defective": standardise(pick(test_features, covered > 0.5, 10**6)),
    "normal": standardise(pick(test_features, is_good.expand_as(covered), 4000)),
    "reference": standardise(pick(train_features, torch.ones(train_features.shape[:3]), 6000)),
}
with torch.no_grad():
    behind = {name: adaptor(vectors) for name, vectors in frozen.items()}
for name, vectors in behind.items():
    print(f"{name:9}", tuple(vectors.shape))
rms = {kind: v["reference"].square().mean().sqrt() for kind, v in (("in", frozen), ("out", behind))}
print(f"RMS out / RMS in: {rms['out'] / rms['in']:.1f}")

# %% [markdown]
# The prediction of {eq}`eq-adaptor-scale` holds for real features, too. How well can the defective
# positions be told from the normal ones? Two distances use all channels:
#
# - The distance to the *nearest* reference vector, as in the toy.
# - The {term}`Mahalanobis distance` to the reference's mean: divide the deviation along every
#   direction by the spread of the normal vectors in that direction. One step counts more where
#   normal vectors hardly vary.
#
# AUROC summarises each: the probability that a random defective position is farther away than a
# random normal one. 0.5 is chance, 1 is perfect.


# %% tags=["nbval-ignore-output"]
def mahalanobis(vectors: Tensor, normal: Tensor) -> Tensor:
    """Mahalanobis distance of vectors (n, C) to the distribution of normal ones (m, C)."""
    covariance = torch.cov(normal.T)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    deviation = vectors - normal.mean(dim=0)
    return (deviation * torch.linalg.solve(covariance, deviation.T).T).sum(dim=1).sqrt()


labels = np.repeat([1, 0], [len(frozen["defective"]), len(frozen["normal"])])
quality = {}
for kind, vectors in (("frozen", frozen), ("adapted", behind)):
    both = torch.cat([vectors["defective"], vectors["normal"]])
    quality[kind] = {
        "nearest": roc_auc_score(labels, nearest(both, vectors["reference"][:3000])),
        "Mahalanobis": roc_auc_score(labels, mahalanobis(both, vectors["reference"])),
    }
    print(f"{kind:8s}", *(f"  {measure} {value:.3f}" for measure, value in quality[kind].items()))

# %% tags=["hide-cell"]
# Check with tolerances.
assert abs(rms["out"] / rms["in"] - math.sqrt(1.5)) < 0.1
assert min(min(row.values()) for row in quality.values()) > 0.9
assert abs(quality["frozen"]["nearest"] - quality["adapted"]["nearest"]) < 0.02
assert abs(quality["frozen"]["Mahalanobis"] - quality["adapted"]["Mahalanobis"]) < 0.04

# %% [markdown]
# The nearest distance does not notice the adaptor: it keeps the order of distances, as Johnson and
# Lindenstrauss say. The Mahalanobis distance loses a little.
#
# With a mean, a covariance and no training, positions are ordered with an AUROC of about 0.97. An
# image is harder: its score is its *highest* of 1,024 positions, and one false one is enough. Here are
# chapter 2's two detectors on whole images, before and behind the adaptor.


# %% tags=["nbval-ignore-output"]
def position_scores(train: Tensor, test: Tensor) -> Tensor:
    """Image scores by mean and variance of every position; features (N, h, w, C)."""
    distance = (test - train.mean(dim=0)).square() / (train.var(dim=0, correction=0) + 0.01)
    return distance.mean(dim=-1).flatten(1).amax(dim=1)


def neighbour_scores(train: Tensor, test: Tensor) -> Tensor:
    """Image scores by the distance to the nearest of 2,000 random normal vectors."""
    rows = train.flatten(0, 2)
    memory = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:2000]]
    return torch.stack([nearest(image.flatten(0, 1), memory).max() for image in test])


is_defect = [sample.label for sample in test_set.samples]
frozen_maps, adapted_maps = {}, {}
for name, maps in (("train", train_features), ("test", test_features)):
    frozen_maps[name] = standardise(torch.from_numpy(np.stack(list(maps))).float())
    adapted_maps[name] = adaptor(frozen_maps[name]).detach()
frozen_auroc = roc_auc_score(is_defect, position_scores(**frozen_maps))
print(f"position statistics, frozen  image AUROC {frozen_auroc:.2f}")
live = {
    "position statistics, adapted": position_scores(**adapted_maps),
    "neighbours": neighbour_scores(**frozen_maps),
    "neighbours, adapted": neighbour_scores(**adapted_maps),
}
for name, scores in live.items():
    print(f"{name:28} image AUROC {roc_auc_score(is_defect, scores):.2f}")

# %% [markdown]
# On frozen, standardised features the position statistics reach 0.93 (0.95 on raw ones, chapter 2);
# behind the random adaptor 0.88. Probably because they judge channel by channel, and each adapted
# channel is a random mix of quiet and loud ones: the second exercise undoes it.
#
# What can training change? A linear layer adds no information: $z$ is computed from $f$ alone. It can
# choose which directions are loud and which quiet, as the factor 4 did in the toy. It has no defects to
# choose by: probably it makes the directions quiet in which the *noise* of chapter 4 is to be seen.
# Chapter 10 measures what the adaptor is worth.
#
# ## What can go wrong
#
# ### The channels are not last
#
# What comes out of a convolution has its channels second. On a map that is as wide as it
# has channels, `nn.Linear` does not notice, and neither does a `reshape` where a `permute` is meant.

# %%
small = Adaptor(2, 2)
toy_first = toy.permute(0, 3, 1, 2).contiguous()  # as a convolution has it: (N, C, h, w)
with torch.no_grad():
    small.linear.weight.copy_(weight)
    small.linear.bias.copy_(bias)
    permuted = small(toy_first.permute(0, 2, 3, 1).reshape(4, 2))
    reshaped = small(toy_first.reshape(4, 2))
print("permuted, then reshaped:", permuted.int().tolist())
print("reshaped alone:         ", reshaped.int().tolist())
assert torch.equal(permuted, by_loop.reshape(4, 2))

# %% [markdown]
# Only the first row is right. Nothing warns you: the shapes agree, and a network trains on either.
#
# ### The collapse: one answer for everything
#
# Could you train the adaptor alone? Say, to pull all good vectors towards one point $c$. Then the
# best $W$ is 0, and the best $b$ is $c$.

# %%
torch.manual_seed(0)
good = torch.randn(200, 2) * torch.tensor([4.0, 1.0])
far_defect = torch.tensor([[0.0, 8.0]])
centre = torch.tensor([1.0, 1.0])
alone = nn.Linear(2, 2)
optimizer = torch.optim.Adam(alone.parameters(), lr=0.05)
for _ in range(500):
    optimizer.zero_grad()
    (alone(good) - centre).square().sum(dim=1).mean().backward()
    optimizer.step()
with torch.no_grad():
    pulled = (alone(far_defect) - centre).norm().item()
print(f"distance of the defect to the centre: {pulled:.1f}")
print("b:", [round(value, 1) for value in alone.bias.tolist()])

# %% [markdown]
# The loss is perfect, and the defect lies on the centre with all the others. Deep SVDD
# {cite:p}`ruff2018deep` trains towards one centre like this, and has to forbid biases and bounded
# activations for just this reason.
#
# SimpleNet does not forbid it. With $W = 0$ every position becomes the same vector $b$, and $b$ alone is
# easy to tell from $b$ with noise: the lowest loss, and a blind detector. Probably a real training escapes
# because it starts far away and stops early. So a low loss alone shows nothing: compare the size of
# the adapted vectors before and after.

# %% tags=["hide-cell"]
# Check the collapse.
assert alone.weight.abs().max() < 1e-2 and pulled < 0.05

# %% [markdown]
# ## Exercises
#
# :::{exercise} easy: another first value
# :label: ex-adaptor-initial
#
# Leave out the two lines with `init`, and torch draws $W$ evenly between $-1/\sqrt{C}$ and
# $1/\sqrt{C}$. A uniform distribution between $-a$ and $a$ has the variance $a^2/3$. Predict the
# RMS of the output divided by that of the input (leave the bias at 0), and measure it. By what
# factor would the same noise $σ$ weigh more than behind the library's adaptor?
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: 1/√3, about 0.58; the noise weighs about 2.1 times as much.
torch.manual_seed(0)
default = nn.Linear(C, A)
nn.init.zeros_(default.bias)
with torch.no_grad():
    default_scale = (default(some).square().mean() / some.square().mean()).sqrt().item()
weighs = math.sqrt(1.5) / default_scale
print(f"measured {default_scale:.2f}, predicted {1 / math.sqrt(3):.2f}; factor {weighs:.1f}")
assert abs(default_scale - 1 / math.sqrt(3)) < 0.005
assert abs(weighs - math.sqrt(4.5)) < 0.03

# %% [markdown]
# :::{exercise} medium: an adaptor without training
# :label: ex-adaptor-whiten
#
# Change the detector: make $W$ from the normal features alone. With variances $λ_i$ along their principal
# directions $u_i$ (the columns of `eigenvectors` from `torch.linalg.eigh`), take
# $W = Λ^{-1/2} U^T$, which makes the spread 1 in every direction; add 1% of the mean variance to each
# $λ_i$. Use 10,000 random positions of the training images. Where do both detectors land on the
# scoreboard?
# :::

# %% tags=["hide-cell", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: position statistics about 0.95, neighbours about 0.95 instead of 0.92. The quiet
# directions are loud now: distances have become Mahalanobis distances. On 60 images the gain of 0.03 is
# as large as its ± over test images; the same images take part in both, so it is more than chance may
# be, but not proof.
rows = frozen_maps["train"].flatten(0, 2)
rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[:10000]]
eigenvalues, eigenvectors = torch.linalg.eigh(torch.cov(rows.T))
W = (eigenvectors * (eigenvalues + 0.01 * eigenvalues.mean()).rsqrt()).T
white = {name: (maps - rows.mean(dim=0)) @ W.T for name, maps in frozen_maps.items()}
whitened = {
    "position statistics, whitened": position_scores(**white),
    "neighbours, whitened": neighbour_scores(**white),
}
for name, scores in whitened.items():
    print(f"{name:29} image AUROC {roc_auc_score(is_defect, scores):.2f}")
    assert roc_auc_score(is_defect, scores) > 0.92


# %% [markdown]
# :::{exercise} hard: what a square adaptor cannot change
# :label: ex-adaptor-invertible
#
# Draw 500 vectors with 8 channels of different spread, and a random 8x8 matrix $W$ with a random
# $b$. Compare two distances of every vector to the mean, before and behind $z = W f + b$: the plain
# one, and the Mahalanobis distance (without the small number that the function above adds to the
# covariance; use double precision). Which one changes? Show on paper why the other does not.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: the plain distances change, the Mahalanobis distances agree to many digits.
# The covariance becomes W S W^T and the deviation W d. The Mahalanobis distance squared is then
# d^T W^T (W S W^T)^-1 W d = d^T S^-1 d: W cancels whenever it can be inverted.
torch.manual_seed(0)
old = torch.randn(500, 8, dtype=torch.float64) * torch.arange(1, 9)
new_vectors = old @ torch.randn(8, 8, dtype=torch.float64).T + torch.randn(8, dtype=torch.float64)


def both_distances(vectors: Tensor) -> tuple[Tensor, Tensor]:
    deviation = vectors - vectors.mean(dim=0)
    scaled = torch.linalg.solve(torch.cov(vectors.T), deviation.T).T
    return deviation.norm(dim=1), (deviation * scaled).sum(dim=1).sqrt()


(plain_old, scaled_old), (plain_new, scaled_new) = both_distances(old), both_distances(new_vectors)
for name, ratio in (("plain", plain_new / plain_old), ("Mahalanobis", scaled_new / scaled_old)):
    print(f"{name:11}: new over old from {ratio.min():.1f} to {ratio.max():.1f}")
assert not torch.allclose(plain_old, plain_new, rtol=0.01)
assert torch.allclose(scaled_old, scaled_new, rtol=1e-6)

# %% [markdown]
# ## Quiz
#
# **1. A random adaptor of 1,536 to 512 channels throws two thirds of the numbers away. Why does the
# distance to the nearest normal vector find defects as well as before?**
#
# <details>
# <summary>Answer</summary>
#
# Because every distance shrinks by nearly the same factor, 0.71 give or take 3%. A common factor changes
# no order. What does lose a little is the Mahalanobis distance, which lives on the quiet directions.
#
# </details>
#
# **2. You multiply $W$ by 10 and leave $σ$ as it is. What happens to the noise?**
#
# <details>
# <summary>Answer</summary>
#
# All distances between adapted vectors grow tenfold, and the noise does not. Against them it is ten
# times smaller, so it is far harder to find. $σ$ has a meaning only against the scale of $z$.
#
# </details>
#
# **3. A linear layer adds no information. What can it change at all?**
#
# <details>
# <summary>Answer</summary>
#
# How much each direction counts. It can stretch one direction and shrink another, as in the toy,
# and with fewer outputs than inputs it drops some. A plain distance changes with it.
#
# </details>
#
# ## The scoreboard
#
# No row is trained yet. A random adaptor moves one detector down and leaves the other where it was.

# %% tags=["hide-input"] mystnb={"image": {"alt": "Five rows. Pixel statistics at 0.57, position statistics at 0.95 and neighbours at 0.92 in grey; in colour, position statistics behind the adaptor at 0.88 and neighbours behind it at 0.93."}, "figure": {"caption": "Image AUROC on the 60 test nuts after chapter 3. Bars: standard deviation over test images.", "name": "fig-adaptor-scoreboard"}}
board_labels, rows = benchmark.scoreboard()
assert board_labels == is_defect
board = {name: rows[name] for name in ("pixel statistics", "position statistics")} | live
plots.scoreboard(board, is_defect, new=[name for name in live if "adapted" in name])
plt.show()
reached = {name: roc_auc_score(is_defect, scores) for name, scores in board.items()}
assert abs(reached["neighbours"] - roc_auc_score(is_defect, rows["neighbours"])) < 0.02
assert reached["position statistics, adapted"] < frozen_auroc - 0.02
assert abs(reached["neighbours, adapted"] - reached["neighbours"]) < 0.03

# %% [markdown]
# ## Summary
#
# - The adaptor is $z = W f + b$ at every position: a {term}`1x1 convolution`, 786,944 parameters,
#   no look at a neighbour.
# - {term}`Xavier initialisation` makes the output's RMS about 1.22 times the input's, and
#   distances 0.71 times: predicted, and measured.
# - A random adaptor nearly keeps all distances, so neighbours find defects as before; statistics of single
#   channels lose.
# - A Mahalanobis distance, with nothing trained, orders defective and normal positions with an AUROC of
#   about 0.97: that is the bar for the network to come.
# - $W = 0$ is a solution that a loss without defects may reward, and a blind detector.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.2: the feature adaptor and its ablation.
# - {cite:t}`lin2014nin`, {cite:t}`glorot2010understanding`: the 1x1 convolution, and its initialisation.
# - {cite:t}`johnson1984extensions`: random projections keep distances.
# - {cite:t}`ruff2018deep`: Deep SVDD, which trains towards one centre.
#
# ## Next
#
# [Noise instead of defects](04_noise.ipynb) adds {term}`Gaussian noise` to the adapted features and
# asks how large it must be.
