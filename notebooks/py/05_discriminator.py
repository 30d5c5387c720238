# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The discriminator
#
# A small network looks at one feature vector and answers with one number: high for normal, low
# for anomalous. You build it, train it on points in a plane and then on real vectors.
#
# ## What you will learn
#
# - **Compute** a discriminator's score by hand, and **count** its parameters.
# - **See** why one linear layer cannot do the job, and two can.
# - **Find** where a trained discriminator is wrong without knowing: it was never asked there.
# - **Show** that every position is scored on its own, so that a map costs nothing extra.
#
# ## Before you start
#
# You have read chapters 1 to 4: frozen features, the adaptor, noise in feature space. About 30
# minutes to read, 50 to work through; runs in under a minute on two CPU cores, no GPU needed.

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
import copy

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from simplenet_lib.adaptor import Adaptor
from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform, read_image
from simplenet_lib.features import Standardise, cache_folder, cached_features
from simplenet_lib.model import SimpleNet
from simplenet_lib.noise import add_noise
from simplenet_lib.plots import DEFECT, NORMAL, use_book_style
from simplenet_lib.synthetic import generate
from simplenet_lib.weights import find_weights

use_book_style()

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
# You have normal vectors, and noisy copies of them that stand in for defects
# ({term}`synthetic anomalies <synthetic anomaly>`, chapter 4). The {term}`discriminator` is a
# classifier between the two. Its answer is one number, the {term}`score`: above zero for normal,
# below zero for noisy.
#
# Take six vectors in two dimensions. Three are normal and lie along the diagonal. Three are noisy
# and lie off it, on either side.

# %%
vectors = torch.tensor([[1, 1], [3, 2], [4, 5], [10, 0], [0, 10], [12, -3]]).float()
noisy = torch.tensor([False, False, False, True, True, True])
u = vectors[:, 0] - vectors[:, 1]
print("x1 - x2, normal:", u[~noisy].int().tolist())
print("x1 - x2, noisy: ", u[noisy].int().tolist())

# %% [markdown]
# The difference $u = x_1 - x_2$ tells them apart, but not by one threshold: the normal values lie
# *between* the noisy ones. A linear layer has one threshold. Two hidden units have two:
#
# $$h_1 = x_1 - x_2 - 5$$
#
# $$h_2 = -x_1 + x_2 - 5$$
#
# Each unit then passes a {term}`LeakyReLU`, $\max(x, 0.2\,x)$: positive numbers stay as they are,
# negative ones shrink to a fifth. Both results are multiplied by $-1$ and added: that is the score.
# Here are two of the vectors. Work out the other four:
#
# | vector | $h_1$ | $h_2$ | LeakyReLU | score |
# |---|---|---|---|---|
# | (3, 2) | −4 | −6 | −0.8 and −1.2 | $-(-0.8) - (-1.2) = 2$ |
# | (10, 0) | 5 | −15 | 5 and −3 | $-(5) - (-3) = -2$ |

# %%
W1 = torch.tensor([[1, -1], [-1, 1]]).float()  # one row a hidden unit
b1 = torch.tensor([-5, -5]).float()
w2 = torch.tensor([-1, -1]).float()


def leaky(x):
    return torch.maximum(x, 0.2 * x)


def toy_score(x):
    return leaky(x @ W1.T + b1) @ w2


for vector, score in zip(vectors.int().tolist(), toy_score(vectors).tolist(), strict=True):
    print(vector, "score", round(score), "normal" if score > 0 else "noisy")

# %% mystnb={"image": {"alt": "A plane with three normal points near the diagonal and three noisy points off it. A bright diagonal band with positive scores, bounded by two white parallel lines, contains the normal points only."}, "figure": {"caption": "The score of the two-unit discriminator. On the white lines it is zero.", "name": "fig-discriminator-toy"}} tags=["hide-input"]
ticks = torch.linspace(-6, 16, 221)
plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1)
figure, axis = plt.subplots(figsize=(5.2, 4))
field = axis.imshow(
    toy_score(plane.view(-1, 2)).view(221, 221),
    origin="lower",
    extent=(-6, 16, -6, 16),
    cmap="viridis",
    vmin=-6,
    vmax=2,
)
axis.contour(ticks, ticks, toy_score(plane.view(-1, 2)).view(221, 221), levels=[0], colors="white")
axis.scatter(*vectors[~noisy].T, color=NORMAL, edgecolor="white", s=70, label="normal")
axis.scatter(*vectors[noisy].T, color=DEFECT, edgecolor="white", s=70, marker="s", label="noisy")
axis.set(title="Two hidden units bound a band", xlabel="$x_1$", ylabel="$x_2$")
axis.legend(loc="upper left", labelcolor="white")
figure.colorbar(field, label="score (high is normal)", extend="min")
plt.show()

# %% [markdown]
# A band is closed in one direction only. The point (20, 20) lies on the diagonal, far from all
# normal vectors, and still scores 2. In the plane two more units close the region. Among real features
# there are not enough units for that, as *An open region* shows below: each pair of units bounds one
# direction, and the score adds up how far a vector strays from many such bands.

# %%
print("score of (20, 20):", round(toy_score(torch.tensor([20.0, 20.0])).item()))

# %% [markdown]
# ## From the paper
#
# Section 3.4 calls the discriminator $D_ψ$ a "normality scorer": a two-layer perceptron that
# answers with one number for one {term}`adapted feature` $z$. In our notation, with $K$ hidden
# units:
#
# $$s = D_ψ(z) = w_2^\top \, \mathrm{LeakyReLU}(\mathrm{BN}(W_1 z + b_1))$$ (eq-discriminator)
#
# $W_1$ is a matrix of shape `(K, A)`, $b_1$ and $w_2$ are vectors of length $K$. BN is
# {term}`BatchNorm`; the published code has it, the course version leaves it out, and the library
# makes it an option. The second layer has no bias. Zero is where normal and noisy meet, and the
# loss of chapter 6 is symmetric around it.
#
# Predict the shapes for $B$ vectors of length $A = 512$ and $K = 512$: `(B, 512)` goes in,
# `(B, 512)` is the hidden layer, `(B, 1)` comes out of the second layer, and dropping the last
# dimension leaves `(B,)`: one score a vector.

# %% [markdown]
# ## Build it
#
# First in plain steps, one line a symbol of {eq}`eq-discriminator`, without BatchNorm:

# %%
torch.manual_seed(0)
z = torch.randn(6, 512)  # (B, A)
first = nn.Linear(512, 512)  # W1 and b1
second = nn.Linear(512, 1, bias=False)  # w2
hidden = F.leaky_relu(first(z), 0.2)
scores = second(hidden)
print(tuple(z.shape), tuple(hidden.shape), tuple(scores.shape), tuple(scores.squeeze(1).shape))

# %% [markdown]
# The library's version is the same, with the option. `nn.Identity` stands where BatchNorm would
# be, so `forward` needs no `if`. The channels come last, and what stands before them may be any
# shape: `(B, A)` for a batch of vectors, `(N, h, w, A)` for maps. `nn.BatchNorm1d` wants one vector
# a row, so `reshape` lines them up, and `view` gives the scores the shape of what came in, without
# the channels.


# %% tags=["library"]
class Discriminator(nn.Module):
    """Linear, LeakyReLU, Linear on single feature vectors."""

    def __init__(self, channels: int, hidden: int, *, batchnorm: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(channels, hidden)
        self.norm = nn.BatchNorm1d(hidden) if batchnorm else nn.Identity()
        self.activation = nn.LeakyReLU(0.2)
        self.score = nn.Linear(hidden, 1, bias=False)

    def forward(self, vectors: Tensor) -> Tensor:
        """Score vectors (..., A) with one number each, (...): high is normal, low is anomalous."""
        hidden = self.hidden(vectors.reshape(-1, vectors.shape[-1]))  # BatchNorm wants one row each
        scores: Tensor = self.score(self.activation(self.norm(hidden)))
        return scores.view(vectors.shape[:-1])


# %% [markdown]
# Count the parameters before the code does. $W_1$ has 512 · 512 = 262,144 numbers and $b_1$ has
# 512. BatchNorm has a scale and a shift for each hidden unit: 2 · 512 = 1,024. $w_2$ has 512.
# Together 263,168 without BatchNorm and 264,192 with it.

# %%
for batchnorm in (False, True):
    network = Discriminator(512, 512, batchnorm=batchnorm)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"BatchNorm {batchnorm!s:5}: {count:,} parameters")

# %% [markdown]
# ## Check it
#
# Two checks. The class with the six-vector weights must give the scores you computed by hand. And
# on random vectors it must agree with matrix algebra in NumPy that uses no PyTorch layer. BatchNorm
# has two formulas there: in training mode it uses the mean and variance of the batch, in
# {term}`evaluation mode` the ones it remembers.

# %% tags=["hide-input"]
toy = Discriminator(2, 2)
toy.load_state_dict({"hidden.weight": W1, "hidden.bias": b1, "score.weight": w2[None]})
assert torch.allclose(toy(vectors), torch.tensor([2.0, 2, 2, -2, -2, -6]))


def by_matrices(network, x, training):
    """Equation eq-discriminator in float64, from the network's numbers alone."""
    state = {name: value.numpy().astype(float) for name, value in network.state_dict().items()}
    h = x @ state["hidden.weight"].T + state["hidden.bias"]
    if "norm.weight" in state:
        mean = h.mean(0) if training else state["norm.running_mean"]
        variance = h.var(0) if training else state["norm.running_var"]
        h = (h - mean) / np.sqrt(variance + 1e-5) * state["norm.weight"] + state["norm.bias"]
    h = np.where(h > 0, h, 0.2 * h)
    return h @ state["score.weight"][0]


for batchnorm in (False, True):
    network = Discriminator(512, 512, batchnorm=batchnorm)
    assert ("norm.weight" in network.state_dict()) == batchnorm
    x = torch.randn(64, 512)
    for training in (True, False):
        network.train(training)
        expected = by_matrices(network, x.double().numpy(), training)
        np.testing.assert_allclose(network(x).detach().numpy(), expected, atol=1e-4)
print("scores by the class:", [round(score, 1) for score in toy(vectors).tolist()])

# %% [markdown]
# ## One position at a time
#
# The discriminator never sees an image. It sees vectors, and it scores each without looking at the
# others. So you can hand it a whole grid of {term}`positions <position>`, and the scores come back
# as a map. Nothing extra is trained for {term}`anomaly localization`. Shuffle the positions, and the
# scores are shuffled in the same way:

# %%
torch.manual_seed(0)
network = Discriminator(512, 512, batchnorm=True).eval()
grid = torch.randn(1, 32, 32, 512)  # (N, h, w, A)
positions = grid.flatten(0, 2)  # (N*h*w, A)
with torch.no_grad():
    score_map = network(grid)
    scores = score_map.flatten()
    order = torch.randperm(len(positions))
    shuffled = network(positions[order])
    alone = network(positions[:1])
print("grid", tuple(grid.shape), "-> map", tuple(score_map.shape))
print(f"largest change of a score by shuffling: {(shuffled - scores[order]).abs().max():.3f}")

# %% tags=["hide-input"]
assert torch.allclose(shuffled, scores[order], atol=1e-5)
assert torch.allclose(alone, scores[:1], atol=1e-5)

# %% [markdown]
# The price: a position cannot compare itself with its neighbours here. Whatever context a score
# needs must already be in the vector, through the {term}`receptive field` of chapter 2.
#
# ## What it does
#
# ### On points in a plane
#
# Now train one. The normal points lie on a ring of radius 3. The noisy ones are normal points plus
# noise with $σ = 1$, drawn anew at every step. The {term}`margin loss`, here `hinge`, is chapter 6's
# subject; one sentence is enough for now: it asks for normal scores above 0.5 and noisy scores below
# −0.5, and charges what is missing. Both kinds pass the network in one batch; *Separate batches*
# below says why.


# %%
def hinge(normal, noisy):
    """Charge what normal scores lack to 0.5, and what noisy ones exceed -0.5 by."""
    return F.relu(0.5 - normal).mean() + F.relu(0.5 + noisy).mean()


def train(network, draw, sigma, *, steps, rate):
    """Train ``network`` in place on normal vectors from ``draw`` and noisy copies of them."""
    generator = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam(network.parameters(), lr=rate)
    network.train()
    for _ in range(steps):
        normal = draw(generator)
        noisy = add_noise(normal, sigma, generator)
        normal_scores, noisy_scores = network(torch.cat([normal, noisy])).chunk(2)
        optimizer.zero_grad()
        hinge(normal_scores, noisy_scores).backward()
        optimizer.step()
    network.eval()


# %%
def ring(generator, count=256):
    """Points on a circle of radius 3, (count, 2)."""
    angle = 2 * torch.pi * torch.rand(count, generator=generator)
    return 3 * torch.stack([angle.cos(), angle.sin()], dim=1)


ticks = torch.linspace(-7, 7, 141)
plane = torch.stack(torch.meshgrid(ticks, ticks, indexing="xy"), dim=-1).view(-1, 2)
on_ring, fields = {}, {}
for sigma in (None, 1.0, 0.4):
    torch.manual_seed(0)
    on_ring[sigma] = Discriminator(2, 64)
    if sigma is not None:
        train(on_ring[sigma], ring, sigma, steps=500, rate=0.02)
    with torch.no_grad():
        fields[sigma] = on_ring[sigma](plane).view(141, 141)

# %% mystnb={"image": {"alt": "Three score fields over the plane with blue points on a ring and orange noisy points around it. Before training a bent line crosses the plane. After training with sigma 1 two closed curves enclose the ring from inside and outside. With sigma 0.4 only the outer curve is left: the centre counts as normal."}, "figure": {"caption": "Score fields on a toy. White: score zero. With little noise the centre of the ring, where no normal point lies, counts as normal.", "name": "fig-discriminator-ring"}} tags=["hide-input"]
generator = torch.Generator().manual_seed(5)
some = ring(generator, 100)
figure, axes = plt.subplots(1, 3, figsize=(7.2, 2.8), sharey=True)
titles = {None: "untrained: a bent line", 1.0: "σ = 1: closed", 0.4: "σ = 0.4: centre included"}
for axis, (sigma, values) in zip(axes, fields.items(), strict=True):
    field = axis.imshow(
        values, origin="lower", extent=(-7, 7, -7, 7), cmap="viridis", vmin=-2, vmax=1
    )
    axis.contour(ticks, ticks, values, levels=[0], colors="white", linewidths=2)
    axis.scatter(*some.T, color=NORMAL, s=7, label="normal")
    others = add_noise(some, sigma or 1.0, torch.Generator().manual_seed(6))
    axis.scatter(*others.T, color=DEFECT, s=7, label="noisy")
    axis.set(xlabel="$x_1$", xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), title=titles[sigma])
axes[0].set_ylabel("$x_2$")
axes[0].legend(loc="upper left", labelcolor="white", markerscale=2, borderpad=0)
figure.colorbar(field, ax=axes, label="score (high is normal)", extend="both")
plt.show()

# %%
for sigma in (1.0, 0.4):
    score = on_ring[sigma](torch.zeros(1, 2)).item()
    print(f"σ = {sigma}: the centre is", "normal" if score > 0 else "anomalous")

# %% [markdown]
# This is the most important limit of the method. Noise of 0.4 practically never carries a point over
# a distance of 3. The network was never asked about the centre, and whatever it answers there costs
# nothing. It is the same among real features: near normal vectors the score is learned, far from them
# it is extrapolation.

# %% tags=["nbval-ignore-output"]
with torch.no_grad():
    many = ring(generator, 4000)
    normal_scores = on_ring[1.0](many)
    noisy_scores = on_ring[1.0](add_noise(many, 1.0, generator))
print(f"σ = 1: normal points above zero {(normal_scores > 0).float().mean():.0%}")
print(f"       noisy points below zero  {(noisy_scores < 0).float().mean():.0%}")

# %% tags=["hide-input"]
assert (normal_scores > 0).float().mean() > 0.95
assert 0.5 < (noisy_scores < 0).float().mean() < 0.9

# %% [markdown]
# A good share of the noisy points stays above zero, and rightly so: in two dimensions noise often
# moves a point along the ring, or hardly at all. Among 512 dimensions there are many in which normal
# vectors hardly differ; chapter 4 called them thin. Noise shows in each of them a little, and the
# evidence adds up.
#
# ### On real vectors
#
# Take normal nuts. Their frozen features come from the library's cache on disk (chapter 7), are
# standardised (chapter 2) and adapted (chapter 3). The adaptor stays as it was initialised, so that
# all learning sits in the discriminator; chapter 7 trains both. The first 20 images are for
# training. Four other normal images, and the first image of each kind of defect, are only looked at.

# %% tags=["nbval-ignore-output"]
data = generate(cache_folder() / "synthetic")
normal_images = AnomalyDataset(data, "nut", "train", make_transform(256, 256))
test_images = AnomalyDataset(data, "nut", "test", make_transform(256, 256))
config = preset("fast", **{**ONE_HEAD, "resize": 256, "crop": 256})
model = SimpleNet(config, find_weights("resnet50"))
features = cached_features(model.features, normal_images, model.feature_key(), progress=False)

# %%
standardise = Standardise(1536)
standardise.fit(features[:20])
torch.manual_seed(0)
adaptor = Adaptor(1536, 512)


@torch.no_grad()
def adapt(maps):
    """Frozen features (N, h, w, C) to adapted features (N, h, w, A)."""
    return adaptor(standardise(maps))


def cached(images):
    """Frozen features of training images from the cache, (N, h, w, C)."""
    return torch.from_numpy(features[images]).float()


training = torch.cat([adapt(cached(range(at, at + 4))) for at in range(0, 20, 4)]).flatten(0, 2)
held_out = adapt(cached(range(20, 24))).flatten(0, 2)
kinds = [sample.defect for sample in test_images.samples]
chosen = [kinds.index(kind) for kind in sorted({*kinds} - {"good"})]
defects = adapt(model.features(torch.stack([test_images[i]["image"] for i in chosen])))
print("training", tuple(training.shape))
print("held out", tuple(held_out.shape), " defects", tuple(defects.shape))

# %% [markdown]
# Now the same training on vectors of length 512, with $σ = 0.5$ and BatchNorm:


# %%
def draw_real(generator, count=1024):
    """Random training vectors, (count, 512)."""
    return training[torch.randint(len(training), (count,), generator=generator)]


torch.manual_seed(1)
network = Discriminator(512, 512, batchnorm=True)
train(network, draw_real, 0.5, steps=100, rate=6e-4)

noisy_held_out = add_noise(held_out, 0.5, torch.Generator().manual_seed(9))
with torch.no_grad():
    normal_scores, noisy_scores = network(held_out), network(noisy_held_out)
    score_maps = -network(defects)

# %% mystnb={"image": {"alt": "Two histograms of scores. Normal scores lie mostly between 0 and 1.5, noisy scores mostly between minus 1.5 and 0, with a small overlap around zero."}, "figure": {"caption": "Scores of four normal images that were not trained on, and of the same vectors with noise.", "name": "fig-discriminator-scores"}}
figure, axis = plt.subplots(figsize=(6.5, 2.8))
bins = np.linspace(-2.5, 2, 61)
axis.hist(normal_scores, bins, color=NORMAL, alpha=0.7, label="normal")
axis.hist(noisy_scores, bins, color=DEFECT, alpha=0.7, label="noisy")
axis.axvline(0, color="black", linewidth=1)
axis.set(title="Zero separates most of the scores", xlabel="score", ylabel="positions")
axis.legend()
plt.show()


# %% [markdown]
# How well are they separated? One number says it: the share of all pairs of a normal and a noisy
# vector in which the normal one scores higher. It is called {term}`AUROC`; 0.5 is guessing, 1 is
# perfect. Chapter 8 works it out by hand.


# %% tags=["nbval-ignore-output"]
def auroc(high, low):
    """Share of pairs in which the score from ``high`` exceeds the one from ``low``."""
    labels = np.r_[np.ones(len(high)), np.zeros(len(low))]
    return roc_auc_score(labels, np.r_[high, low])


print(f"normal above zero {(normal_scores > 0).float().mean():.1%}")
print(f"noisy below zero  {(noisy_scores < 0).float().mean():.1%}")
print(f"AUROC             {auroc(normal_scores, noisy_scores):.3f}")

# %% tags=["hide-input"]
assert auroc(normal_scores, noisy_scores) > 0.95

# %% [markdown]
# Separating noise is the exercise, not the aim. The discriminator has never seen a defect. Here is
# its {term}`score map`, $-s$ at every position of the 32 x 32 grid, for five defects:

# %% mystnb={"image": {"alt": "Five photographs of nuts with the marked defect outlined, and below each its score map. The maps glow on the broken corner, the fibre and the rust; the dent and the scratch hardly stand out."}, "figure": {"caption": "The first test image of each kind. Top: defect outlined. Bottom: score map, bright is anomalous, one scale for all.", "name": "fig-discriminator-map"}} tags=["hide-input"]
figure, axes = plt.subplots(2, 5, figsize=(7.2, 3.2))
for column, image, score_map in zip(axes.T, chosen, score_maps, strict=True):
    sample = test_images.samples[image]
    column[0].imshow(read_image(sample.image).resize((256, 256)))
    column[0].contour(test_images[image]["mask"], levels=[0.5], colors=[DEFECT], linewidths=1.2)
    column[0].set_title(sample.defect.replace("_", " "))
    shown = column[1].imshow(score_map, cmap="inferno", vmin=-1.5, vmax=2)
    for axis in column:
        axis.set(xticks=[], yticks=[])
figure.suptitle(
    "Trained on noise alone, it points at real defects; the faint ones barely", fontsize="medium"
)
figure.colorbar(shown, ax=axes[1], label="−score", extend="both")
plt.show()

# %% tags=["nbval-ignore-output"]
found = {}
for image, score_map in zip(chosen, score_maps, strict=True):
    mask = test_images[image]["mask"].float()[None]
    marked = F.adaptive_max_pool2d(mask, 32)[0] > 0  # positions that hold a marked pixel
    found[kinds[image]] = round(float(auroc(score_map[marked], score_map[~marked])), 2)
print("AUROC of marked against other positions:", found)

# %% [markdown]
# ## What can go wrong
#
# ### An open region
#
# The region of normal scores is never closed. Take a direction $d$ in which every hidden unit with a
# positive weight in $w_2$ rises and every one with a negative weight falls: $W_1 d = \text{sign}(w_2)$.
# With no more hidden units than inputs, $K \le A$, these are at most as many equations as unknowns,
# and there is a solution. Along $d$ all units push the score up, without bound. Train a discriminator
# with $K = 256$ and walk from a normal vector along $d$, away from everything that is normal:

# %% tags=["nbval-ignore-output"]
torch.manual_seed(1)
half = Discriminator(512, 256, batchnorm=True)
train(half, draw_real, 0.5, steps=100, rate=6e-4)
with torch.no_grad():
    rows = half.hidden.weight * (half.norm.weight / half.norm.running_var.sqrt())[:, None]
    signs = torch.sign(half.score.weight[0])
    away = torch.linalg.lstsq(rows.double(), signs.double()[:, None], driver="gelsd").solution[:, 0]
    away = (away / away.norm()).float()
    walk = [half(held_out[:1] + distance * away).item() for distance in (0, 10, 100, 1000)]
print("length of a normal vector:", f"{held_out.norm(dim=1).mean():.0f}")
for distance, score in zip((0, 10, 100, 1000), walk, strict=True):
    print(f"{distance:4} away: score {score:.1f}")

# %% tags=["hide-input"]
assert walk[0] < walk[1] < walk[2] < walk[3] and walk[3] > walk[0] + 5

# %% [markdown]
# The farther, the *more* normal. The published head, with 1,024 units on 1,536 channels, even has 512
# directions in which its score does not change at all. A defect that leads into such a direction is
# missed. That noise helps nevertheless is because it leads into all directions at once, and the
# discriminator spends its units on those that tell most: the thin ones. One more consequence: far from
# normal vectors two heads trained with other seeds extrapolate differently. The library's default is
# the mean of five.
#
# ### A single linear layer
#
# Why not leave the hidden layer out? A linear score of a noisy vector is
# $s' = w^\top z + b + w^\top ε = s + w^\top ε$: the normal score plus a number that is as often
# positive as negative. So half of the noisy vectors score *higher* than their originals, whatever
# $w$ is. Noise surrounds each vector on all sides, and a plane has only one side that is anomalous.
#
# The loss shows it, too. $ε$ and $-ε$ are equally likely, and moving a score up and down by the
# same amount never makes the average charge smaller. So the charge is at least that of no noise at
# all, $\max(0, 0.5 - s) + \max(0, 0.5 + s)$, and this is never below 1.

# %%
torch.manual_seed(1)
linear = nn.Sequential(nn.Linear(512, 1), nn.Flatten(0))
train(linear, draw_real, 0.5, steps=100, rate=6e-3)
with torch.no_grad():
    linear_normal, linear_noisy = linear(held_out), linear(noisy_held_out)
lower = (linear_noisy < linear_normal).float().mean().item()
linear_loss = hinge(linear_normal, linear_noisy).item()
print(f"noisy vectors that score below their originals: {lower:.1f} of all")
print(f"loss: {linear_loss:.1f}")

# %% tags=["hide-input"]
assert abs(lower - 0.5) < 0.04 and linear_loss > 0.97
assert abs(auroc(linear_normal, linear_noisy) - 0.5) < 0.04

# %% [markdown]
# (On a finite draw of noise the measured loss may fall slightly below 1.)
#
# ### Dead units
#
# Why LeakyReLU {cite:p}`maas2013rectifier` and not ReLU, $\max(x, 0)$? Left of zero ReLU is flat. On
# the six vectors both hidden units are negative for every normal vector: with ReLU their scores are 0,
# and so is every gradient of the weights below.

# %%
for activation in (nn.ReLU(), nn.LeakyReLU(0.2)):
    toy.activation = activation
    toy.zero_grad()
    scores = toy(vectors[~noisy])
    scores.sum().backward()
    size = toy.hidden.weight.grad.abs().sum().item()
    print(
        f"{type(activation).__name__:9} scores {scores.round().int().tolist()}, gradient {size:.1f}"
    )

# %% [markdown]
# A unit that is silent for *every* vector never changes again: it is dead. LeakyReLU keeps a fifth of
# the slope. {term}`BatchNorm` is another insurance: it centres every unit over the batch, whatever its
# bias. From a usual start you may need neither.
#
# ### A sigmoid at the end
#
# Classifiers often end in a sigmoid, $p = 1 / (1 + e^{s})$. This one must not. A sigmoid has no negative
# values, so the loss could never be met. And it ties what is most anomalous: go away from the band of
# six vectors to (50, 0) and (100, 0), with scores −34 and −74. In float32 the numbers just below 1 are
# $6 \cdot 10^{-8}$ apart, so from a score of about −17 on $p$ is exactly 1:

# %%
for s in (-14.0, -34.0, -74.0):
    print(f"score {s:.0f}: p == 1 is {bool(torch.sigmoid(-torch.tensor(s)) == 1)}")

# %% [markdown]
# Keep the score before the sigmoid.
#
# ### Separate batches
#
# The first thing that noise changes is the spread: noisy vectors scatter more. BatchNorm divides by
# the spread of its batch. By hand: normal values −1 and 1 have spread 1. Noisy values −3 and 3 have
# spread 3. Each pair alone becomes −1 and 1. Together, all four are divided by $\sqrt 5$, and the
# noisy ones stay three times as far out.


# %%
def rounded(values):
    return [round(value, 2) for value in values.flatten().tolist()]


norm = nn.BatchNorm1d(1, affine=False)  # a new one is in training mode
inner, outer = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-3.0], [3.0]])
print("separate:", rounded(norm(inner)), rounded(norm(outer)))
print("together:", rounded(norm(torch.cat([inner, outer]))))

# %% [markdown]
# Passing the two kinds one after the other looks harmless in code, but it takes exactly this
# difference away from the training. And in evaluation mode the network then meets an average of
# both kinds' statistics, which it was never trained with. Measured once, with everything else as above:
# the AUROC of normal against noisy falls from 0.99 to 0.86, and the maps hardly show a defect. So
# `torch.cat` in `train` is not a convenience. Without BatchNorm each vector passes on its own, and it
# would make no difference.
#
# ### Scoring in training mode
#
# In training mode BatchNorm uses the batch at hand. Then a vector's score depends on its company, a
# single vector cannot be scored at all, and every call changes the remembered statistics. Score one
# normal vector among normal ones, then among noisy ones:

# %% tags=["nbval-ignore-output"]
companies = (held_out[:1024], torch.cat([held_out[:1], noisy_held_out[:1023]]))
network.eval()
with torch.no_grad():
    calm = [network(company)[0].item() for company in companies]
restless = copy.deepcopy(network).train()
with torch.no_grad():
    moved = [restless(company)[0].item() for company in companies]
print("evaluation mode:", [round(score, 2) for score in calm])
print("training mode:  ", [round(score, 2) for score in moved])

# %% tags=["hide-input"]
assert abs(calm[0] - calm[1]) < 1e-4 and abs(moved[0] - moved[1]) > 0.01

# %% [markdown]
# ## Exercises
#
# :::{exercise} easy: count the published discriminator
# :label: ex-discriminator-count
#
# The published code takes vectors of length 1,536 and has 1,024 hidden units with BatchNorm. Count
# its parameters on paper, then in code.
#
# **Expected result:** 1,576,960.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
by_hand = 1536 * 1024 + 1024 + 2 * 1024 + 1024
published = Discriminator(1536, 1024, batchnorm=True)
by_code = sum(parameter.numel() for parameter in published.parameters())
print(f"{by_hand:,} and {by_code:,}")
assert by_hand == by_code == 1_576_960

# %% [markdown]
# :::{exercise} medium: close the band
# :label: ex-discriminator-close
#
# The two-unit discriminator accepts (20, 20) and (−20, −20). Add two hidden units, by hand, with
# integer weights, so that both get a negative score and the six vectors keep their signs.
#
# **Expected result:** scores above 0 for the three normal vectors, below 0 for the other five.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# The sum x1 + x2 is 2, 5 and 9 for the normal vectors: bound it from above (10) and below (1).
closed = Discriminator(2, 4)
closed.load_state_dict(
    {
        "hidden.weight": torch.cat([W1, torch.tensor([[1.0, 1.0], [-1.0, -1.0]])]),
        "hidden.bias": torch.cat([b1, torch.tensor([-10.0, 1.0])]),
        "score.weight": -torch.ones(1, 4),
    }
)
eight = torch.cat([vectors, torch.tensor([[20.0, 20.0], [-20.0, -20.0]])])
signs = (closed(eight) > 0).tolist()
print("normal:", signs)
assert signs == [True, True, True, False, False, False, False, False]

# %% [markdown]
# :::{exercise} medium: how many hidden units?
# :label: ex-discriminator-width
#
# Train `Discriminator(512, K, batchnorm=True)` as above for $K$ = 2, 16 and 512. How well does each
# tell noise, and how well does its map show the rust? Two units bound one direction. Why are they not
# enough here, although they were for six vectors?
#
# **Expected result:** in the solution.
# :::

# %% tags=["hide-cell", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
rust = kinds.index("rust")
mask = F.adaptive_max_pool2d(test_images[rust]["mask"].float()[None], 32)[0] > 0
widths = {}
for K in (2, 16, 512):
    torch.manual_seed(1)
    other = Discriminator(512, K, batchnorm=True)
    train(other, draw_real, 0.5, steps=100, rate=6e-4)
    with torch.no_grad():
        rusty = -other(defects[chosen.index(rust)])
        widths[K] = (
            auroc(other(held_out), other(noisy_held_out)),
            auroc(rusty[mask], rusty[~mask]),
        )
    print(f"K = {K:3}: normal from noisy {widths[K][0]:.2f}, rust {widths[K][1]:.2f}")
# Noise shows a little in each of many thin directions. Each pair of units hears one of them.
assert widths[2][0] < widths[16][0] < widths[512][0]

# %% [markdown]
# :::{exercise} hard: when a linear layer seems to work
# :label: ex-discriminator-memory
#
# Take 200 vectors of `training` and a noisy copy of each ($σ = 0.5$, drawn once). Find a linear layer
# that separates all 400 (`torch.linalg.lstsq`). Then try it on `held_out` and `noisy_held_out`.
# Why does this not contradict the chapter?
#
# **Expected result:** all 400 right, and about half of the new ones.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# 400 equations with 512 unknowns have an exact solution, so any labels can be memorised.
# The chapter draws the noise anew at every step: there is nothing to memorise.
few = training[:: len(training) // 200][:200].double()
known = torch.cat([few, add_noise(few, 0.5, torch.Generator().manual_seed(3))])
labels = torch.cat([torch.ones(200), -torch.ones(200)]).double()
weights = torch.linalg.lstsq(known, labels, driver="gelsd").solution
right = int((torch.sign(known @ weights) == labels).sum())
new = torch.cat([held_out, noisy_held_out]).double()
new_labels = torch.cat([torch.ones(len(held_out)), -torch.ones(len(held_out))])
share = (torch.sign(new @ weights) == new_labels).float().mean().item()
print(f"known: {right} of 400 right; new: about half right: {abs(share - 0.5) < 0.05}")
assert right == 400 and abs(share - 0.5) < 0.05

# %% [markdown]
# ## Quiz
#
# **1. Why does the discriminator need a hidden layer, although the task has only two classes?**
#
# <details>
# <summary>Answer</summary>
#
# Because noise leads to both sides of every plane equally often. Two hidden units bound one direction
# on both sides, and the score sums over many directions how far a vector strays. They enclose nothing:
# some directions stay open.
#
# </details>
#
# **2. The network is trained on single vectors. Where does the map come from?**
#
# <details>
# <summary>Answer</summary>
#
# Every position of the feature grid is one vector and gets one score, independent of the others.
# Put back into the grid, the scores are a map. A score sees as much of the image as its vector
# does: the receptive field of the backbone.
#
# </details>
#
# **3. You score normal images and defect images in evaluation mode. Why do they not need to be in
# one batch, although in training normal and noisy vectors do?**
#
# <details>
# <summary>Answer</summary>
#
# In evaluation mode BatchNorm uses remembered statistics, the same for every vector, so the batch
# does not matter. In training mode it uses those of the batch, and separate batches would hide the
# difference in spread.
#
# </details>
#
# ## Summary
#
# - The discriminator is Linear, optionally BatchNorm, LeakyReLU, Linear without bias: one vector
#   in, one score out, high for normal. At 512 channels it has 263,168 parameters, or 264,192 with
#   BatchNorm.
# - Noise leads to both sides of normal vectors. A linear layer cannot tell that; a pair of hidden units
#   bounds one direction on both sides. With no more units than channels some directions stay open.
# - It scores each position on its own. A map is the scores, put back into the grid.
# - Near normal vectors the score is learned, far from them it is extrapolation.
# - Keep the raw score: a sigmoid cannot satisfy the margin loss and ties the most anomalous positions.
# - With BatchNorm, pass normal and noisy vectors together, and score in evaluation mode.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.4: the discriminator; section 3.5: how it is trained.
# - {cite:t}`maas2013rectifier`: LeakyReLU, there with a slope of 0.01, and why ReLU units get
#   stuck.
# - {cite:t}`ioffe2015batchnorm`: BatchNorm, with the two formulas for training and inference.
#
# ## Next
#
# You have used a loss that was explained in one sentence. [The margin loss](06_margin_loss.ipynb)
# takes it apart.
