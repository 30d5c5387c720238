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
# The frozen features come from everyday photos. In this chapter you put one trainable linear layer
# behind them, the adaptor, and you measure what it changes and what it does not.
#
# ## What you will learn
#
# - **Show** that a 1x1 convolution is one linear layer, applied at every position.
# - **Count** its parameters by hand, and compare with a 3x3 convolution.
# - **Predict** the scale of its output from the formula of its initialisation.
# - **Measure** what training it changes in real features, and what stays as it was.
# - **Recognise** three mistakes: channels in the wrong place, a reshape for a permute, and a
#   collapse that the loss does not notice.
#
# ## Before you start
#
# You have read [The data](01_dataset.ipynb) and [Frozen features](02_features.ipynb). About 20
# minutes to read; runs in under a minute on two CPU cores, no GPU needed. The first run also
# computes the features of 120 images, once.

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
import math
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform, read_image
from simplenet_lib.features import FeatureMaps, cache_folder, cached_features
from simplenet_lib.model import SimpleNet
from simplenet_lib.plots import DEFECT, NORMAL, use_book_style
from simplenet_lib.synthetic import generate
from simplenet_lib.training import fit, split_images
from simplenet_lib.weights import find_weights

use_book_style()

# %%
# One head with the margin loss, as these chapters build it; the library's default is a committee.
ONE_HEAD = {
    "resize": 320,
    "crop": 320,
    "border": "zeros",
    "neighbourhood": 1,
    "adaptor_channels": 256,
    "hidden_channels": 256,
    "sigma": 0.5,
    "loss": "margin",
    "heads": 1,
    "steps": 100,
    "batch_size": 2048,
    "averaging": 0.0,
    "smoothing": 5.0,
}

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
# which is trained. The same $W$ and $b$ serve all positions of all images.
#
# Why not something stronger? The paper's ablation finds one linear layer best on {term}`MVTec AD`:
# image {term}`AUROC` 99.6% with it, 99.2% without an adaptor, 98.3% with a more complex one. These
# three figures are transcribed from a secondary source; look them up in the paper before you quote
# them. It is plausible: a stronger adaptor can fit the few normal images too closely.
#
# Predict the shapes before you go on. A batch of `(N, 32, 32, 1536)` features meets a $W$ of shape
# `(512, 1536)`. The grid is untouched, so the output is `(N, 32, 32, 512)`. These 512 channels are
# those of the course report; the detector of the later chapters has 256, and chapter 10 compares the
# two.

# %% [markdown]
# ## Build it
#
# ### One position at a time
#
# Begin with a map small enough for paper: one image, a grid of 2x2, 2 channels. They come last, as
# in the frozen features.

# %%
toy = torch.tensor([[[[1.0, 0.0], [2.0, 1.0]], [[3.0, 1.0], [4.0, 0.0]]]])
weight = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
bias = torch.tensor([0.0, 10.0])
print("map", tuple(toy.shape), "- the position in row 0, column 1 holds", toy[0, 0, 1].tolist())

# %% [markdown]
# At that position $f = (2, 1)$, so {eq}`eq-adaptor` gives
#
# $$ z = \begin{pmatrix} 1 \cdot 2 + 2 \cdot 1 + 0 \\ 3 \cdot 2 - 1 \cdot 1 + 10 \end{pmatrix}
#      = \begin{pmatrix} 4 \\ 15 \end{pmatrix}. $$
#
# The other three are yours: $(1, 0) \to (1, 13)$, $(3, 1) \to (5, 18)$, $(4, 0) \to (4, 22)$. In
# code it is a loop over positions.


# %%
def adapt_by_loop(features: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Map features (N, h, w, C) to (N, h, w, A), one position after the other."""
    count, rows, columns, _ = features.shape
    adapted = torch.empty(count, rows, columns, len(bias))
    for n in range(count):
        for row in range(rows):
            for column in range(columns):
                adapted[n, row, column] = weight @ features[n, row, column] + bias
    return adapted


by_hand = torch.tensor([[[[1.0, 13.0], [4.0, 15.0]], [[5.0, 18.0], [4.0, 22.0]]]])
by_loop = adapt_by_loop(toy, weight, bias)
print("the loop equals the hand:", torch.equal(by_loop, by_hand))

# %% [markdown]
# ### The same without a loop
#
# Three ways give the same numbers at once for all positions.
#
# - `nn.Linear` acts on the last dimension, and there the channels are.
# - `einsum` names the dimensions: multiply along `c`, keep the rest.
# - A {term}`1x1 convolution` is the third. A convolution slides a window over the map and applies
#   one linear layer to what the window covers. A window of 1x1 covers one position. Its weight
#   has the shape `(A, C, 1, 1)`: $W$ with two dimensions of length 1 at the end. A convolution
#   wants its channels first, `(N, C, h, w)`, so they have to move there and back.

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
    print(f"{name:15s} equals the hand: {torch.equal(result, by_hand)}")

# %% [markdown]
# The 1x1 convolution is an old tool: {cite:t}`lin2014nin` used it as a small network that runs at
# every position. Many texts call an adaptor by that name; you have just seen that it is `nn.Linear`
# under another order of the dimensions. The library takes `nn.Linear`: it needs no permute, and a
# list of single vectors `(B, C)` passes through it as well as a map `(N, h, w, C)`. The two lines
# with `init` set the first values of $W$ and $b$; you come back to them below.


# %% tags=["library"]
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
# So all that a position knows of its surroundings comes from the backbone, through its
# {term}`receptive field`. The adaptor does not blur the map.
#
# ### Parameters, by hand and by code
#
# $W$ has one entry for every pair of an input and an output channel, $b$ one for every output
# channel:
#
# $$ 1536 \cdot 512 + 512 = 786{,}944. $$
#
# The matrix alone has 786,432. A 3x3 convolution has nine such matrices. With the 512 of the bias
# that makes 7,078,400 parameters, nine times as many to learn from the same 60 images.


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
# a squared distance sums over $A = 512$ outputs, each $1/1024$ of the squared input distance. So
# distances shrink to $\sqrt{512/1024} \approx 0.71$ of what they were.

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
print(f"measured {distances.mean():.1f} give or take {distances.std():.2f}")

# %% [markdown]
# This scale matters more here than in most networks. Chapter 4 adds noise to $z$: random numbers
# with a fixed standard deviation $σ$. Whether $σ = 0.5$ is much or little depends on how large $z$
# is.
#
# ## Check it

# %%
torch.manual_seed(1)
features = torch.randn(2, 5, 4, C)
with torch.no_grad():
    convolution = nn.Conv2d(C, A, kernel_size=1)  # with the adaptor's weights
    convolution.weight.copy_(adaptor.linear.weight[:, :, None, None])
    convolution.bias.copy_(adaptor.linear.bias)
    expected = convolution(features.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(adaptor(features), expected, rtol=1e-4, atol=1e-4)
    small = Adaptor(2, 2)
    small.linear.weight.copy_(weight)
    small.linear.bias.copy_(bias)
    assert torch.equal(small(toy), by_hand)
assert torch.equal(by_loop, by_hand) and all(torch.equal(r, by_hand) for r in results.values())
assert changed == {"1x1": 1, "3x3": 9}
assert parameters(adaptor) == parameters(convolution) == 1536 * 512 + 512 == 786_944
assert parameters(nn.Conv2d(C, A, kernel_size=3)) == 9 * 1536 * 512 + 512 == 7_078_400
assert abs(adaptor.linear.weight.std().item() * 32 - 1) < 0.01
assert 4 < adaptor.linear.weight.abs().max().item() * 32 < 7  # normal; uniform would end at 1.7
assert not adaptor.linear.bias.any()
assert abs(measured_scale - math.sqrt(1.5)) < 0.02
assert abs(distances.mean().item() - math.sqrt(0.5)) < 0.02 and distances.std() < 0.04
print("OK: equal to a 1x1 convolution, 786,944 parameters, scale as predicted.")

# %% [markdown]
# ## What it does
#
# Load the nuts. The library keeps their features on disk, so that the backbone sees every image
# once; chapter 7 explains it.

# %% tags=["nbval-ignore-output"]
data = generate(cache_folder() / "synthetic")
train_set, test_set = (
    AnomalyDataset(data, "nut", split, make_transform(256, 256)) for split in ("train", "test")
)
CONFIG = preset("fast", **{**ONE_HEAD, "resize": 256, "crop": 256})
# A quarter of the batch of chapter 7, to be quick.
CONFIG = replace(CONFIG, adaptor_channels=512, hidden_channels=512, batch_size=512)
weights = find_weights("resnet50")
model = SimpleNet(CONFIG, weights)
train_features, test_features = (
    cached_features(model.features, images, model.feature_key(), progress=False)
    for images in (train_set, test_set)
)

# %% [markdown]
# The adaptor is not trained alone, but together with the {term}`discriminator`: a small network
# that gives every vector $z$ one number, its {term}`score`. A normal vector should score above
# zero, and the same vector with noise added below. The *loss* says how far the scores are from
# that. It is 1 if every score is zero, and 0 if all vectors are told apart clearly.
#
# Chapters 4 to 7 build these parts. Here you borrow them from the library: a `Head` holds adaptor
# and discriminator. `fit` measures the {term}`standardisation` and trains the head behind it, with
# noise of $σ = 0.5$. It leaves out a tenth of the images, which chapter 7 will need. You train two
# heads from the same first values:
#
# - one as it should be;
# - one whose adaptor stays as it was drawn, because its learning rate is 0. Only the
#   discriminator learns.
#
# The second one tells you what *training* the adaptor brings.

# %% tags=["nbval-ignore-output"]
folds = split_images(len(train_set), heads=1, seed=0)


def train_head(config, model: SimpleNet) -> float:
    """Train the model's head and return the mean loss of the last ten steps."""
    history = fit(model.heads, model.standardise, train_features, folds, config, progress=False)
    return history.loss[-10:].mean().item()


other = SimpleNet(CONFIG, weights)  # seeded, so equal
untrained, trained = model.heads[0], other.heads[0]
assert torch.equal(untrained.adaptor.linear.weight, trained.adaptor.linear.weight)
fixed_loss = train_head(replace(CONFIG, adaptor_lr=0), model)
trained_loss = train_head(CONFIG, other)
print(
    f"loss with the adaptor as drawn: {fixed_loss:.3f}, with a trained adaptor: {trained_loss:.3f}"
)

# %% [markdown]
# ### What to compare
#
# Take the test images. A position stands for 8x8 pixels. It counts as defective if the {term}`mask`
# covers at least half of them, and as normal if the mask touches none. Keep all defective positions
# and a random 4,000 normal ones. As reference, take 6,000 random positions of the training images.

# %%
covered = torch.stack([test_set[i]["mask"] for i in range(len(test_set))]).float()
covered = F.adaptive_avg_pool2d(covered, test_features.shape[1:3])
generator = torch.Generator().manual_seed(0)


def pick(features: FeatureMaps, chosen: Tensor, at_most: int) -> Tensor:
    """Random positions of those chosen, (n, h, w), as vectors (at_most, C)."""
    positions = chosen.flatten().nonzero()[:, 0]  # counted through all maps
    keep = torch.randperm(len(positions), generator=generator)[:at_most]
    return torch.from_numpy(features.vectors(positions[keep].numpy())).float()


defective = pick(test_features, covered >= 0.5, 1_000_000)
normal = pick(test_features, covered == 0, 4000)
reference = pick(train_features, torch.ones(train_features.shape[:3]), 6000)
is_defect = np.repeat([1, 0], [len(defective), len(normal)])
print("defective", tuple(defective.shape), "- normal", tuple(normal.shape))

# %% [markdown]
# Look at three versions of the same positions: *frozen* (standardised, before the adaptor), *as
# drawn* (behind the untrained adaptor), and *trained*.


# %%
@torch.no_grad()
def versions(vectors: Tensor) -> dict[str, Tensor]:
    """Vectors (n, C) before the adaptor, behind the one as drawn, and behind the trained one."""
    standardised = model.standardise(vectors)
    return {
        "frozen": standardised,
        "as drawn": untrained.adaptor(standardised),
        "trained": trained.adaptor(standardised),
    }


references, defects, normals = versions(reference), versions(defective), versions(normal)
for name, vectors in defects.items():
    print(f"{name:8s}", tuple(vectors.shape))
sizes = {name: vectors.square().mean().sqrt().item() for name, vectors in references.items()}
print(f"RMS as drawn / RMS frozen: {sizes['as drawn'] / sizes['frozen']:.1f}")

# %% [markdown]
# The prediction of {eq}`eq-adaptor-scale` holds for real features, too.
#
# A first look at the two directions in which the normal vectors vary most, their first two
# principal components:

# %% tags=["hide-input"] mystnb={"image": {"alt": "Three scatter plots, for frozen, as drawn and trained. In each, orange crosses of defective positions lie in the same cloud as the blue dots of normal ones."}, "figure": {"caption": "Normal and defective positions on the first two principal components of the normal training vectors. The axes of each panel have their own scale.", "name": "fig-adaptor-pca"}}
figure, axes = plt.subplots(1, 3, figsize=(6.5, 3.1))
for axis, name in zip(axes, references, strict=True):
    centre = references[name].mean(dim=0)
    _, directions = torch.linalg.eigh(torch.cov(references[name].T))
    for vectors, colour, marker, label in (
        (normals[name][:800], NORMAL, ".", "normal"),
        (defects[name], DEFECT, "x", "defective"),
    ):
        points = (vectors - centre) @ directions[:, [-1, -2]]
        axis.scatter(*points.T, s=8, color=colour, marker=marker, linewidth=0.7, label=label)
    axis.set(title=name, xlabel="component 1")
axes[0].set_ylabel("component 2")
figure.legend(
    *axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2, markerscale=2
)
figure.suptitle("Two directions do not separate the defects, before or after", fontsize="medium")
plt.show()

# %% [markdown]
# The picture is no proof: two directions of many are a poor view. So measure with two distances
# that use all channels.
#
# - The distance to the *nearest* reference vector, as in the toy.
# - The {term}`Mahalanobis distance` to the reference's mean: divide the deviation along every
#   direction by the spread of the normal vectors in that direction. One step counts more where
#   normal vectors hardly vary.
#
# AUROC summarises each: the probability that a random defective position is farther away than a
# random normal one. 0.5 is chance, 1 is perfect.


# %%
def mahalanobis(vectors: Tensor, normal: Tensor) -> Tensor:
    """Mahalanobis distance of vectors (n, C) to the distribution of normal ones (m, C)."""
    covariance = torch.cov(normal.T)
    covariance += 1e-3 * covariance.diagonal().mean() * torch.eye(len(covariance))
    deviation = vectors - normal.mean(dim=0)
    return (deviation * torch.linalg.solve(covariance, deviation.T).T).sum(dim=1).sqrt()


def auroc(scores: Tensor) -> float:
    """AUROC of scores for defective, then normal positions."""
    return float(roc_auc_score(is_defect, scores.numpy()))


quality = {}
for name in references:
    both = torch.cat([defects[name], normals[name]])
    quality[name] = {
        "nearest": auroc(nearest(both, references[name][:3000])),
        "mahalanobis": auroc(mahalanobis(both, references[name])),
    }
with torch.no_grad():
    for name, head in (("as drawn", untrained), ("trained", trained)):
        both = torch.cat([defects[name], normals[name]])
        quality[name]["discriminator"] = auroc(-head.discriminator(both))  # a defect scores low

# %% tags=["nbval-ignore-output"]
for name, row in quality.items():
    print(f"{name:8s}", *(f"  {measure} {value:.3f}" for measure, value in row.items()))

# %% [markdown]
# Do not look for a winner. A simple distance finds the defects about as well before the adaptor as
# behind it, drawn or trained. The discriminator, too, does about as well on the trained adaptor as
# on the one that was never trained. Differences as small as these mean nothing after one training
# on one category. Three facts explain why the distances agree.
#
# - A linear layer adds no information. $z$ is computed from $f$ alone, and $512$ numbers cannot
#   hold more than the $1536$ that they come from.
# - The trick of the toy, to turn a quiet channel up, is already done: the features were
#   standardised before they reached the adaptor.
# - A random $W$ nearly keeps the order of distances. You saw above that they all shrink to about
#   0.71, and a common factor changes no order. {numref}`fig-adaptor-maps` shows it on one image.

# %% tags=["hide-input"] mystnb={"image": {"alt": "A photo of a hex nut with the outline of a defect, beside three maps of distances, for frozen, as drawn and trained. All three maps are brightest at the defect and look nearly the same."}, "figure": {"caption": "Distance of every position to the nearest reference vector. Each map has its own scale, from its lowest to its highest value.", "name": "fig-adaptor-maps"}}
shown = next(i for i, sample in enumerate(test_set.samples) if sample.defect == "rust")
grid = test_features.shape[1:3]
maps = versions(torch.tensor(test_features[shown]).float().flatten(0, 1))
figure, axes = plt.subplots(1, 4, figsize=(6.5, 2.2))
axes[0].imshow(read_image(test_set.samples[shown].image).resize((256, 256)))
axes[0].contour(test_set[shown]["mask"], levels=[0.5], colors=[DEFECT])
axes[0].set_title("image, defect")
for axis, (name, vectors) in zip(axes[1:], maps.items(), strict=True):
    axis.imshow(nearest(vectors, references[name][:3000]).view(grid), cmap="magma")
    axis.set_title(name)
for axis in axes:
    axis.set_xticks([])
    axis.set_yticks([])
figure.suptitle("The three maps point at the same place", fontsize="medium")
plt.show()

# %% [markdown]
# ### What training does change
#
# The two losses that you printed differ clearly: with a trained adaptor the noise is easier to
# find. So look at what decides whether the noise stands out: how far normal vectors spread in each
# of the 512 directions of its {term}`PCA`. The noise has the same $σ = 0.5$ in all of them. Where
# normal vectors hardly vary, it stands out; where they vary by much more than $σ$, it drowns. Call
# a direction loud if the spread in it is large. {numref}`fig-adaptor-spread` compares the two
# adaptors.


# %%
def spread(vectors: Tensor) -> Tensor:
    """Standard deviation along each principal direction, largest first."""
    return torch.linalg.eigvalsh(torch.cov(vectors.T)).clamp_min(0).sqrt().flip(0)


drawn_spread, trained_spread = (spread(references[name]) for name in ("as drawn", "trained"))
moved = trained.adaptor.linear.weight - untrained.adaptor.linear.weight
relative_move = (moved.norm() / untrained.adaptor.linear.weight.norm()).item()

# %% tags=["nbval-ignore-output"]
print(f"W moved by {relative_move:.0%} of its length")
for name, deviations in (("as drawn", drawn_spread), ("trained", trained_spread)):
    share = (deviations[:10].square().sum() / deviations.square().sum()).item()
    louder = int((deviations > CONFIG.sigma).sum())
    print(f"{name:8s}  10 loudest directions: {share:.0%} of the variance;", end=" ")
    print(f"directions louder than the noise: {louder}")

# %% mystnb={"image": {"alt": "A curve of ratios over the rank of the direction, on a logarithmic axis. For the first few ranks it lies above 1, then it falls below 1 and stays there."}, "figure": {"caption": "Spread of the normal vectors behind the trained adaptor, divided by that behind the adaptor as drawn. Directions are ranked by their spread, for each adaptor on its own.", "name": "fig-adaptor-spread"}}
figure, axis = plt.subplots(figsize=(6.5, 2.8))
axis.plot(range(1, A + 1), trained_spread / drawn_spread, color=NORMAL)
axis.axhline(1, color="0.6", linewidth=1)
axis.set(
    xscale="log",
    xlabel="rank of the direction, 1 = loudest",
    ylabel="spread, trained / drawn",
    title="Training stretches the few loudest directions and quietens the rest",
)
axis.set_xticks([1, 10, 100], ["1", "10", "100"])
plt.show()

# %% [markdown]
# So the trained adaptor gathers what normal vectors do in few directions and leaves the others
# quieter for the noise to be seen in. That is what the loss asks for. Whether real defects then lie
# in the quiet directions, the loss cannot know: it never sees one. On these nuts you measured
# neither a clear gain nor a clear loss. The paper's own gain from the adaptor, 99.2 to 99.6, is
# small, too. It was measured on other images, without standardisation, and after longer training.

# %%
first, second = quality["as drawn"], quality["trained"]
for row in quality.values():
    assert min(row.values()) > 0.85  # every version finds most defective positions
assert all(abs(first[measure] - second[measure]) < 0.04 for measure in first)
assert all(abs(first[measure] - value) < 0.04 for measure, value in quality["frozen"].items())
assert trained_loss < 0.8 * fixed_loss
assert 0.05 < relative_move < 0.3
assert trained_spread[:2].mean() > 1.03 * drawn_spread[:2].mean()
assert trained_spread[20:200].mean() < 0.98 * drawn_spread[20:200].mean()
print("OK: the loss is lower, the loud directions louder, the defects about as visible as before.")

# %% [markdown]
# ## What can go wrong
#
# ### The channels are not last
#
# `nn.Linear` acts on the last dimension. What comes straight out of a convolution has its channels
# second. With 1,536 channels on a grid of 32 columns torch refuses. On a map that is as wide as it
# has channels, such as the toy, it does not.

# %%
toy_first = toy.permute(0, 3, 1, 2).contiguous()  # as a convolution has it: (N, C, h, w)
toy_linear = nn.Linear(2, 2)
with torch.no_grad():
    toy_linear.weight.copy_(weight)
    toy_linear.bias.copy_(bias)
    try:
        nn.Linear(C, A)(torch.zeros(1, C, 32, 32))
    except RuntimeError as error:
        print(type(error).__name__, "on (1, 1536, 32, 32)")
    forgotten = toy_linear(toy_first)
print("no error on", tuple(toy_first.shape))
print("got     ", forgotten.int().tolist())
print("correct ", by_hand.permute(0, 3, 1, 2).int().tolist())

# %% [markdown]
# ### A reshape instead of a permute
#
# You want a list of vectors, one a position: `(4, 2)`. On channels that come first, `reshape` gives
# that shape, but it only cuts the row of numbers in memory into pieces of two. It moves nothing. The
# first "vector" is then channel 0 of two neighbouring positions.

# %%
cut = toy_first.reshape(4, 2)
moved_back = toy_first.permute(0, 2, 3, 1).reshape(4, 2)
with torch.no_grad():
    print("reshape alone:    ", cut.int().tolist(), "->", toy_linear(cut).int().tolist())
    print(
        "permute, reshape: ", moved_back.int().tolist(), "->", toy_linear(moved_back).int().tolist()
    )
    assert not torch.equal(toy_linear(cut), toy_linear(moved_back))
    assert torch.equal(toy_linear(moved_back), by_hand.reshape(4, 2))

# %% [markdown]
# Nothing warns you: the shape is right, the numbers are finite, and a network trains on them. Only
# a test with known numbers finds it.
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
print(f"distance of the defect to the centre: {pulled:.2f}")
print("b:", [round(value, 1) for value in alone.bias.tolist()])
assert alone.weight.abs().max() < 1e-2 and pulled < 0.05

# %% [markdown]
# The loss is perfect, and the defect lies on the centre with all the others. The discriminator and
# the noise do not rule this out. With $W = 0$ every position becomes the same vector $b$, and $b$
# alone is easy to tell from $b$ with noise. See for yourself: the next cell trains a discriminator
# on that constant, with the noise of chapter 4 and the loss of chapter 6.

# %%
from simplenet_lib.discriminator import Discriminator
from simplenet_lib.loss import margin_loss
from simplenet_lib.noise import add_noise

torch.manual_seed(0)
collapsed = Adaptor(C, A)
nn.init.zeros_(collapsed.linear.weight)
discriminator = Discriminator(A, 512, batchnorm=True)
optimizer = torch.optim.Adam(discriminator.parameters(), lr=6e-4)
constant = collapsed.linear.bias.detach().expand(256, A)  # what W = 0 makes of any 256 positions
losses = []
for _ in range(200):
    noisy = add_noise(constant, CONFIG.sigma)
    scores = discriminator(torch.cat([constant, noisy]))
    loss = margin_loss(scores[:256], scores[256:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
discriminator.eval()
with torch.no_grad():
    answers = discriminator(collapsed(defective))
blind = torch.allclose(answers, answers.mean(), atol=1e-5)
print("all defective positions get the same score:", blind)
assert np.mean(losses[-10:]) < 0.2 * np.mean(losses[:3])
assert blind

# %% tags=["nbval-ignore-output"]
print(f"loss: first {losses[0]:.2f}, last {losses[-1]:.3f}")

# %% [markdown]
# So a low loss does not show that the detector sees anything. Your training starts far from this
# solution and is short: you saw that $W$ moves by a small part of its length. Compare the size of
# the adapted vectors before and after a training; if it shrinks towards zero, stop.

# %%
shrunk = sizes["trained"] < 0.9 * sizes["as drawn"]
print("the trained adaptor shrinks its output:", shrunk)
assert not shrunk

# %% [markdown]
# ### Two layers that are one
#
# "If one layer is good, two are better"? Without an activation between them, two linear layers are
# one: $W_2 (W_1 f + b_1) + b_2 = (W_2 W_1) f + (W_2 b_1 + b_2)$.

# %%
torch.manual_seed(0)
two = nn.Sequential(nn.Linear(C, A), nn.Linear(A, A))
one = nn.Linear(C, A)
with torch.no_grad():
    one.weight.copy_(two[1].weight @ two[0].weight)
    one.bias.copy_(two[1].weight @ two[0].bias + two[1].bias)
    torch.testing.assert_close(one(features), two(features), rtol=1e-4, atol=1e-4)
print(f"same output; {parameters(two):,} parameters for what {parameters(one):,} can do")

# %% [markdown]
# ## Exercises
#
# :::{exercise} easy: count the parameters
# :label: ex-adaptor-count
#
# The preset `paper` maps 1,536 channels to 1,536. How many parameters has its adaptor? And how many
# has one that maps `layer2` alone, 512 channels, to 512? Work it out by hand, then check.
#
# **Expected result:** 2,360,832 and 262,656.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
counts = [parameters(Adaptor(1536, 1536)), parameters(Adaptor(512, 512))]
print(f"{counts[0]:,} and {counts[1]:,}")
assert counts == [1536 * 1536 + 1536, 512 * 512 + 512] == [2_360_832, 262_656]

# %% [markdown]
# :::{exercise} medium: another first value
# :label: ex-adaptor-initial
#
# Leave out the two lines with `init`, and torch draws $W$ evenly between $-1/\sqrt{C}$ and
# $1/\sqrt{C}$. A uniform distribution between $-a$ and $a$ has the variance $a^2/3$. Predict the
# RMS of the output divided by that of the input (leave the bias at 0), and measure it. By what
# factor would the same noise $σ$ weigh more than behind the library's adaptor?
#
# **Expected result:** $1/\sqrt{3} \approx 0.58$; the noise weighs about 2.1 times as much.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
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
# :::{exercise} hard: what a square adaptor cannot change
# :label: ex-adaptor-invertible
#
# Draw 500 vectors with 8 channels of different spread, and a random 8x8 matrix $W$ with a random
# $b$. Compare two distances of every vector to the mean, before and behind $z = W f + b$: the plain
# one, and the Mahalanobis distance (without the small number that the function above adds to the
# covariance; use double precision). Which one changes? Show on paper why the other does not.
#
# **Expected result:** the plain distances change, the Mahalanobis distances agree to many digits.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
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
print("plain distances agree:      ", torch.allclose(plain_old, plain_new, rtol=0.01))
print("Mahalanobis distances agree:", torch.allclose(scaled_old, scaled_new, rtol=1e-6))
assert not torch.allclose(plain_old, plain_new, rtol=0.01)
assert torch.allclose(scaled_old, scaled_new, rtol=1e-6)

# %% [markdown]
# ## Quiz
#
# **1. You trained with images of 256 pixels. May the adaptor see features of a larger image?**
#
# <details>
# <summary>Answer</summary>
#
# Yes. Its weight has the shape `(512, 1536)`; the size of the grid appears nowhere. A larger
# grid is only more positions, each treated on its own. Whether the *features* of a larger image
# still look the same is a question to the backbone.
#
# </details>
#
# **2. You multiply $W$ by 10 and leave $σ$ as it is. What happens to the noise?**
#
# <details>
# <summary>Answer</summary>
#
# All distances between adapted vectors grow tenfold, and the noise does not. Against them it is ten
# times smaller, so it is far harder to find. $σ$ has a meaning only against the scale of $z$, and
# that scale is set by the features and by the first values of $W$.
#
# </details>
#
# **3. A linear layer adds no information. What can it change at all?**
#
# <details>
# <summary>Answer</summary>
#
# How much each direction counts. It can stretch one direction and shrink another, as in the toy,
# and with fewer outputs than inputs it drops some. A plain distance changes with it, and so does
# the question which directions the noise, equal in all of them, can be seen in.
#
# </details>
#
# ## Summary
#
# - The adaptor is $z = W f + b$ at every position: a {term}`1x1 convolution`, 786,944 parameters,
#   no look at a neighbour.
# - {term}`Xavier initialisation` makes the output's RMS about 1.22 times the input's, and
#   distances 0.71 times: predicted, and measured.
# - A random adaptor nearly keeps the order of distances, so defects are about as visible behind
#   it as before.
# - Training moves $W$ a little. It stretches the few loudest directions and quietens the rest, so
#   the noise is easier to find. On these nuts the defects did not become clearly easier to find.
# - $W = 0$ gives a low loss and a blind detector. Watch the size of $z$.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.2: the feature adaptor, and the ablation that compares
#   one linear layer with others.
# - {cite:t}`lin2014nin`: where the 1x1 convolution comes from.
# - {cite:t}`glorot2010understanding`: the initialisation, and why its variance lies between what
#   the forward and what the backward pass would like.
#
# ## Next
#
# [Noise instead of defects](04_noise.ipynb) adds {term}`Gaussian noise` to the adapted features and
# asks how large it must be.
