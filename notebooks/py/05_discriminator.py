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
# - **See** why one linear layer cannot do the job.
# - **Find** where a trained discriminator is wrong without knowing: it was never asked there.
# - **Place** it on the scoreboard, beside the detectors of the first chapters.
#
# ## Before you start
#
# You have read chapters 1 to 4. Skim 10 minutes,
# read 30, work 60; runs in under a minute on two CPU cores, no GPU needed.

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
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from simplenet_lib import plots
from simplenet_lib.adaptor import Adaptor
from simplenet_lib.benchmark import scoreboard
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
    "fine_scale": 1.0,
    "sigma": 0.5,
    "emphasis": 0.0,
    "loss": "margin",
    "heads": 1,
    "steps": 100,
    "batch_size": 2048,
    "averaging": 0.0,
    "bound": 0.0,
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
# Take six vectors in two dimensions. Three are normal, (1, 1), (3, 2) and (4, 5): they lie along the
# diagonal. Three are noisy, (10, 0), (0, 10) and (12, −3): they lie off it, on either side. The
# difference $u = x_1 - x_2$ is 0, 1 and −1 for the first three, 10, −10 and 15 for the others. It tells them
# apart, but not by one threshold: the normal values lie *between* the noisy ones. A linear layer has one
# threshold. Two hidden units have two:
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
vectors = torch.tensor([[1, 1], [3, 2], [4, 5], [10, 0], [0, 10], [12, -3]]).float()
noisy = torch.tensor([False, False, False, True, True, True])
W1 = torch.tensor([[1, -1], [-1, 1]]).float()  # one row a hidden unit
b1 = torch.tensor([-5, -5]).float()
w2 = torch.tensor([-1, -1]).float()


def leaky(x):
    return torch.maximum(x, 0.2 * x)


def toy_score(x):
    return leaky(x @ W1.T + b1) @ w2


far = torch.tensor([[20.0, 20.0]])
for vector, score in zip(
    torch.cat([vectors, far]).int().tolist(),
    toy_score(torch.cat([vectors, far])).tolist(),
    strict=True,
):
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
# A band is closed in one direction only. The last vector, (20, 20), lies on the diagonal, far from all
# normal ones, and still scores 2. In the plane two more units close the region. Among real features
# there are not enough units for that, as *An open region* shows below: each pair bounds one direction, and
# the score adds up how far a vector strays from many such bands.
#
# ## From the paper
#
# Section 3.4 calls the discriminator $D_ψ$ a "normality scorer": a two-layer perceptron that
# answers with one number for one {term}`adapted feature` $z$. In our notation, with $K$ hidden
# units:
#
# $$s = D_ψ(z) = w_2^\top \, \mathrm{LeakyReLU}(\mathrm{BN}(W_1 z + b_1))$$ (eq-discriminator)
#
# $W_1$ is a matrix of shape `(K, A)`, $b_1$ and $w_2$ are vectors of length $K$. BN is {term}`BatchNorm`; the
# published code has it, the course version leaves it out. The second layer has no bias: zero is where normal
# and noisy meet.

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
# The library's version is the same, with BatchNorm as an option. The channels come last, and what stands
# before them may be any shape: `(B, A)` for a batch of vectors, `(N, h, w, A)` for maps.


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
# Count the parameters before the code does: $W_1$ has 512 · 512 = 262,144 numbers, $b_1$ and $w_2$ have 512
# each, BatchNorm has a scale and a shift for each of 512 hidden units.

# %%
for batchnorm in (False, True):
    network = Discriminator(512, 512, batchnorm=batchnorm)
    count = sum(parameter.numel() for parameter in network.parameters())
    print(f"BatchNorm {batchnorm!s:5}: {count:,} parameters")

# %% [markdown]
# ## Check it
#
# The class must give the scores you computed by hand, and agree with matrix algebra in NumPy, with BatchNorm
# in training mode (mean and variance of the batch) and in {term}`evaluation mode` (those it remembers).

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

# %% [markdown]
# ## One position at a time
#
# Each vector is scored without looking at the others. So you can hand the discriminator a whole grid of
# {term}`positions <position>`, and the scores come back as a map: {term}`anomaly localization` costs nothing
# extra. Shuffle the positions, and the scores are shuffled in the same way:

# %%
torch.manual_seed(0)
network = Discriminator(512, 512, batchnorm=True).eval()
grid = torch.randn(1, 32, 32, 512)  # (N, h, w, A)
order = torch.randperm(32 * 32)
with torch.no_grad():
    score_map = network(grid)
    shuffled = network(grid.flatten(0, 2)[order])
print("grid", tuple(grid.shape), "-> map", tuple(score_map.shape))
print(f"largest change by shuffling: {(shuffled - score_map.flatten()[order]).abs().max():.3f}")


# %% [markdown]
# Whatever context a score needs must already be in the vector, through the {term}`receptive field` of
# chapter 2.
#
# ## What it does
#
# ### On points in a plane
#
# Now train one. The normal points lie on a ring of radius 3. The noisy ones are normal points plus
# noise with $σ = 1$, drawn anew at every step. The {term}`margin loss`, here `hinge`, is chapter 6's
# subject: it asks for normal scores above 0.5 and noisy scores below −0.5, and charges what is missing.


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


# %% tags=["nbval-ignore-output"]
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
        train(on_ring[sigma], ring, sigma, steps=1000, rate=0.005)
    with torch.no_grad():
        fields[sigma] = on_ring[sigma](plane).view(141, 141)

with torch.no_grad():
    many = ring(torch.Generator().manual_seed(5), 4000)
    others = add_noise(many, 1.0, torch.Generator().manual_seed(6))
    kept, left = (on_ring[1.0](many) > 0).float(), (on_ring[1.0](others) > 0).float()
    centre = {sigma: on_ring[sigma](torch.zeros(1, 2)).item() for sigma in (1.0, 0.4)}
print(
    f"σ = 1: above zero are {kept.mean():.0%} of the normal and {left.mean():.0%} of the noisy points"
)
print(f"score of the centre: {centre[1.0]:.1f} with σ = 1, {centre[0.4]:.1f} with σ = 0.4")

# %% mystnb={"image": {"alt": "Three score fields over the plane with blue points on a ring and orange noisy points around it. Before training a bent line crosses the plane. After training with sigma 1 two closed curves enclose the ring from inside and outside. With sigma 0.4 only the outer curve is left: the centre counts as normal."}, "figure": {"caption": "Score fields on a toy. White: score zero. With little noise the centre of the ring, where no normal point lies, counts as normal.", "name": "fig-discriminator-ring"}} tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(7.2, 3.1), sharey=True)
titles = {None: "untrained: a bent line", 1.0: "σ = 1: closed", 0.4: "σ = 0.4: centre included"}
for axis, (sigma, values) in zip(axes, fields.items(), strict=True):
    field = axis.imshow(
        values, origin="lower", extent=(-7, 7, -7, 7), cmap="viridis", vmin=-2, vmax=1
    )
    axis.contour(ticks, ticks, values, levels=[0], colors="white", linewidths=2)
    some = add_noise(many[:100], sigma or 1.0, torch.Generator().manual_seed(6))
    dots = [axis.scatter(*many[:100].T, color=NORMAL, s=7)]
    dots.append(axis.scatter(*some.T, color=DEFECT, s=7))
    axis.set(xlabel="$x_1$", xlim=(-5.5, 5.5), ylim=(-5.5, 5.5), title=titles[sigma])
axes[0].set_ylabel("$x_2$")
figure.legend(dots, ["normal", "noisy"], loc="outside lower center", ncols=2, markerscale=2)
figure.colorbar(field, ax=axes, label="score (high is normal)", extend="both")
plt.show()

# %% [markdown]
# This is the most important limit of the method. Noise of 0.4 practically never carries a point over a
# distance of 3. The network was never asked about the centre, and whatever it answers there costs nothing.
# Among real features it is the same: near normal vectors the score is learned, far from them it is
# extrapolation.
#
# A good share of the noisy points stays above zero, and rightly so: in two dimensions noise often moves a
# point along the ring. Among 512 dimensions many are thin (chapter 4). Noise shows in each of them a little,
# and the evidence adds up.
#
# ### On real vectors
#
# Take normal nuts. Their frozen features come from the library's cache on disk (chapter 7), are
# standardised (chapter 2) and adapted (chapter 3). The adaptor stays as it was initialised; chapter 7 trains
# both. The first 20 images are for training. Four others and the test images are only looked at.

# %% tags=["hide-input", "nbval-ignore-output"]
data = generate(cache_folder() / "synthetic")
normal_images = AnomalyDataset(data, "nut", "train", make_transform(256, 256))
test_images = AnomalyDataset(data, "nut", "test", make_transform(256, 256))
config = preset("fast", **{**ONE_HEAD, "resize": 256, "crop": 256})
model = SimpleNet(config, find_weights("resnet50"))
key = model.feature_key()
features = cached_features(model.features, normal_images, key, progress=False)
test_features = cached_features(model.features, test_images, key, progress=False)

# %%
standardise = Standardise(1536)
standardise.fit(features[:20])
torch.manual_seed(0)
adaptor = Adaptor(1536, 512)


@torch.no_grad()
def adapt(maps):
    """Frozen features (N, h, w, C) to adapted features (N, h, w, A), four images at a time."""
    parts = (torch.from_numpy(maps[at : at + 4]).float() for at in range(0, len(maps), 4))
    return torch.cat([adaptor(standardise(part)) for part in parts])


training = adapt(features[:20]).flatten(0, 2)
held_out = adapt(features[20:24]).flatten(0, 2)
test_adapted = adapt(test_features)
print("training", tuple(training.shape), " held out", tuple(held_out.shape))
print("test", tuple(test_adapted.shape))


# %% [markdown]
# Now the same training on vectors of length 512, with $σ = 0.5$ and BatchNorm. One number says how well
# normal and noisy vectors are separated: the share of pairs in which the normal one scores higher, the
# {term}`AUROC`; 0.5 is guessing, 1 is perfect. Chapter 8 works it out by hand.


# %% tags=["nbval-ignore-output"]
def draw_real(generator, count=1024):
    """Random training vectors, (count, 512)."""
    return training[torch.randint(len(training), (count,), generator=generator)]


def auroc(high, low):
    """Share of pairs in which the score from ``high`` exceeds the one from ``low``."""
    return roc_auc_score(np.r_[np.ones(len(high)), np.zeros(len(low))], np.r_[high, low])


torch.manual_seed(1)
network = Discriminator(512, 512, batchnorm=True)
train(network, draw_real, 0.5, steps=100, rate=6e-4)

noisy_held_out = add_noise(held_out, 0.5, torch.Generator().manual_seed(9))
with torch.no_grad():
    normal_scores, noisy_scores = network(held_out), network(noisy_held_out)
    score_maps = -network(test_adapted)  # (60, 32, 32)
print(f"above zero: {(normal_scores > 0).float().mean():.1%} of the normal vectors,", end=" ")
print(f"{(noisy_scores > 0).float().mean():.1%} of the noisy ones")
print(f"AUROC {auroc(normal_scores, noisy_scores):.3f}")

# %% mystnb={"image": {"alt": "Two histograms of scores. Normal scores lie mostly between 0 and 1.5, noisy scores mostly between minus 1.5 and 0, with a small overlap around zero."}, "figure": {"caption": "Scores of four normal images that were not trained on, and of the same vectors with noise.", "name": "fig-discriminator-scores"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 2.8))
bins = np.linspace(-2.5, 2, 61)
for values, colour, label in ((normal_scores, NORMAL, "normal"), (noisy_scores, DEFECT, "noisy")):
    axis.hist(values, bins, color=colour, alpha=0.7, histtype="stepfilled", label=label)
axis.axvline(0, color="black", linewidth=1)
axis.set(title="Zero separates most of the scores", xlabel="score", ylabel="positions")
axis.legend()
plt.show()

# %% [markdown]
# Separating noise is the exercise, not the aim. The discriminator has never seen a defect. Here is its
# {term}`score map`, $-s$ at every position of the grid, for the first test image of each kind of defect:

# %% mystnb={"image": {"alt": "Five photographs of nuts with the marked defect outlined, and below each its score map. The maps glow on the broken corner, the fibre and the rust; the dent and the scratch hardly stand out."}, "figure": {"caption": "The first test image of each kind. Top: defect outlined. Bottom: score map, bright is anomalous, one scale for all.", "name": "fig-discriminator-map"}} tags=["hide-input"]
kinds = [sample.defect for sample in test_images.samples]
chosen = [kinds.index(kind) for kind in sorted({*kinds} - {"good"})]
figure, axes = plt.subplots(2, 5, figsize=(7.2, 3.2))
for column, image in zip(axes.T, chosen, strict=True):
    sample = test_images.samples[image]
    column[0].imshow(read_image(sample.image).resize((256, 256)))
    column[0].contour(test_images[image]["mask"], levels=[0.5], colors=[DEFECT], linewidths=1.2)
    column[0].set_title(sample.defect.replace("_", " "))
    shown = column[1].imshow(score_maps[image], cmap="inferno", vmin=-1.5, vmax=2)
    for axis in column:
        axis.set(xticks=[], yticks=[])
figure.suptitle(
    "Trained on noise alone, it points at real defects; the faint ones barely", fontsize="medium"
)
figure.colorbar(shown, ax=axes[1], label="−score", extend="both")
plt.show()

# %% tags=["hide-input", "nbval-ignore-output"]
touched = {}
for image in chosen:
    mask = test_images[image]["mask"].float()[None]
    touched[kinds[image]] = F.adaptive_max_pool2d(mask, 32)[0] > 0  # positions with a marked pixel
found = {
    kinds[image]: auroc(score_maps[image][mask], score_maps[image][~mask])
    for image, mask in zip(chosen, touched.values(), strict=True)
}
print("AUROC of marked against other positions:")
print(", ".join(f"{kind.replace('_', ' ')} {value:.2f}" for kind, value in found.items()))

# %% tags=["hide-input"]
assert centre[1.0] < 0 < centre[0.4]
assert kept.mean() > 0.95 and 0.3 < left.mean() < 0.6
assert auroc(normal_scores, noisy_scores) > 0.95

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

# %% [markdown]
# The farther, the *more* normal. The published head, with 1,024 units on 1,536 channels, even has 512
# directions in which its score does not change at all. Noise helps nevertheless because it leads into all
# directions at once, and the discriminator spends its units on those that tell most: the thin ones. And far
# from normal vectors two trainings with other seeds extrapolate differently. Chapter 8 makes use of that.
#
# ### A single linear layer
#
# Why not leave the hidden layer out? A linear score of a noisy vector is
# $s' = w^\top z + b + w^\top ε = s + w^\top ε$: the normal score plus a number that is as often
# positive as negative. So half of the noisy vectors score *higher* than their originals, whatever
# $w$ is. And moving a score up and down by the same amount never makes the average charge smaller: it stays
# at least that of no noise at all, $\max(0, 0.5 - s) + \max(0, 0.5 + s)$, which is never below 1.

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


# %% [markdown]
# ### Dead units
#
# Why LeakyReLU {cite:p}`maas2013rectifier` and not ReLU, $\max(x, 0)$? Left of zero ReLU is flat. On
# the six vectors both hidden units are negative for every normal vector: with ReLU their scores would be 0,
# and so would every gradient of $W_1$. A unit that is silent for *every* vector never changes again: it is
# dead. LeakyReLU keeps a fifth of the slope.
#
# ### A sigmoid at the end
#
# Classifiers often end in a sigmoid, $p = 1 / (1 + e^{s})$. This one must not: it would tie what is most
# anomalous. In float32 $p$ is exactly 1 for every score below about −17, whether −34, as at (50, 0) in the
# plane of the six vectors, or −74, as at (100, 0).
#
# ### Separate batches
#
# Noisy vectors scatter more, and BatchNorm divides by the spread of its batch. By hand: normal values −1
# and 1 have spread 1. Noisy values −3 and 3 have spread 3. Each pair alone becomes −1 and 1. Together, all
# four are divided by $\sqrt 5$, and the noisy ones stay three times as far out.


# %%
def rounded(values):
    return [round(value, 2) for value in values.flatten().tolist()]


norm = nn.BatchNorm1d(1, affine=False)  # a new one is in training mode
inner, outer = torch.tensor([[-1.0], [1.0]]), torch.tensor([[-3.0], [3.0]])
print("separate:", rounded(norm(inner)), rounded(norm(outer)))
print("together:", rounded(norm(torch.cat([inner, outer]))))

# %% [markdown]
# So passing the two kinds one after the other takes exactly this difference away. Measured once, all else as
# above: the AUROC of normal against noisy falls from 0.99 to 0.86. That is why `train` uses `torch.cat`.
#
# And score in evaluation mode: in training mode a vector's score depends on its company.

# %% tags=["hide-input"]
assert walk[0] < walk[1] < walk[2] < walk[3] and walk[3] > walk[0] + 5
assert abs(lower - 0.5) < 0.04 and linear_loss > 0.97  # may be just below 1 on a finite draw
toy.activation = nn.ReLU()
toy.zero_grad()
toy(vectors[~noisy]).sum().backward()
assert not toy.hidden.weight.grad.any()
assert torch.sigmoid(torch.tensor(34.0)) == 1 and toy_score(torch.tensor([50.0, 0])).round() == -34
with torch.no_grad():
    company = network(torch.cat([held_out[:1], noisy_held_out[:1023]]))[0]
assert abs(company - normal_scores[0]) < 1e-4

# %% [markdown]
# ## Exercises
#
# :::{exercise} easy: close the band
# :label: ex-discriminator-close
#
# The two-unit discriminator accepts (20, 20) and (−20, −20). Add two hidden units with integer weights, so that
# both get a negative score and the six vectors keep their signs.
# :::

# %% mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true} tags=["hide-cell"]
# @title Solution
# Expected result: scores above 0 for the three normal vectors, below 0 for the other five.
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
print("called normal:", eight[closed(eight) > 0].int().tolist())
assert signs == [True, True, True, False, False, False, False, False]

# %% [markdown]
# :::{exercise} medium: how many hidden units?
# :label: ex-discriminator-width
#
# Train `Discriminator(512, K, batchnorm=True)` as above for $K$ = 2, 16 and 512. How well does each
# tell noise, and where would it stand on the scoreboard below? Two units bound one direction. Why are they
# not enough here, although they were for six vectors?
# :::

# %% mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true} tags=["hide-cell", "nbval-ignore-output"]
# @title Solution
# Expected result: both rise with K. With 2 units the row falls to about 0.7, with 16 to about 0.9.
labels = [sample.label for sample in test_images.samples]
widths = {}
for K in (2, 16, 512):
    torch.manual_seed(1)
    other = Discriminator(512, K, batchnorm=True)
    train(other, draw_real, 0.5, steps=100, rate=6e-4)
    with torch.no_grad():
        image_scores = (-other(test_adapted)).amax((1, 2))
        noise_found = auroc(other(held_out), other(noisy_held_out))
    widths[K] = noise_found, roc_auc_score(labels, image_scores)
    print(f"K = {K:3}: normal from noisy {noise_found:.2f}, image AUROC {widths[K][1]:.2f}")
# Noise shows a little in each of many thin directions. Each pair of units hears one of them.
assert widths[2][0] < widths[16][0] < widths[512][0] and widths[2][1] < widths[512][1]

# %% [markdown]
# :::{exercise} hard: when a linear layer seems to work
# :label: ex-discriminator-memory
#
# Take 200 vectors of `training` and a noisy copy of each ($σ = 0.5$, drawn once). Find a linear layer
# that separates all 400 (`torch.linalg.lstsq`). Then try it on `held_out` and `noisy_held_out`.
# Why does this not contradict the chapter?
# :::

# %% mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true} tags=["hide-cell"]
# @title Solution
# Expected result: all 400 right, and about half of the new ones.
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
print(f"known: {right} of 400 right; new: {share:.1f} of all right")
assert right == 400 and abs(share - 0.5) < 0.05

# %% [markdown]
# ## Quiz
#
# **1. Why does the discriminator need a hidden layer, although the task has only two classes?**
#
# <details>
# <summary>Answer</summary>
#
# Noise leads to both sides of every plane equally often. Two hidden units bound one direction on both sides,
# and the score sums over many directions how far a vector strays.
#
# </details>
#
# **2. A defect makes vectors that noise with your σ never reaches. What does the discriminator answer?**
#
# <details>
# <summary>Answer</summary>
#
# It was never asked there and extrapolates. Along an open direction it may call the defect more normal than
# every normal vector.
#
# </details>
#
# **3. You score normal images and defect images in evaluation mode. Why do they not need to be in
# one batch, although in training normal and noisy vectors do?**
#
# <details>
# <summary>Answer</summary>
#
# In evaluation mode BatchNorm uses remembered statistics. In training mode it uses those of the batch, and
# separate batches would hide the difference in spread.
#
# </details>
#
# ## The scoreboard
#
# The new row is the discriminator of this chapter; an image's score is the highest of its score map. Its
# adaptor is untrained, it has seen 20 images, and it is at least on a par with the older rows. A bar is one
# standard deviation over other test images; another seed moves the row by about 0.02, too.

# %% mystnb={"image": {"alt": "Image AUROC with error bars in four rows. Pixel statistics lie a little above a half; position statistics, neighbours and the new row, discriminator alone, lie above 0.9, their bars overlapping."}, "figure": {"caption": "The scoreboard with the discriminator of this chapter.", "name": "fig-discriminator-board"}} tags=["hide-input"]
labels, board = scoreboard()
rows = {name: board[name] for name in ("pixel statistics", "position statistics", "neighbours")}
rows["discriminator alone"] = score_maps.amax((1, 2))
assert labels == [sample.label for sample in test_images.samples]
assert roc_auc_score(labels, rows["discriminator alone"]) > 0.9
plots.scoreboard(rows, labels, new=["discriminator alone"])
plt.show()

# %% [markdown]
# ## Summary
#
# - The discriminator is Linear, optionally BatchNorm, LeakyReLU, Linear without bias: one vector
#   in, one score out, high for normal. A map is the scores of all positions, put back into the grid.
# - A linear layer cannot tell noise; a pair of hidden units bounds one direction on both sides. With no more
#   units than channels some directions stay open.
# - Near normal vectors the score is learned, far from them it is extrapolation.
# - Keep the raw score; pass normal and noisy together; score in evaluation mode.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, sections 3.4 and 3.5: the discriminator and its training.
# - {cite:t}`maas2013rectifier`: LeakyReLU, there with a slope of 0.01.
# - {cite:t}`ioffe2015batchnorm`: BatchNorm, with the two formulas for training and inference.
#
# ## Next
#
# You have used a loss that was explained in one sentence. [The margin loss](06_margin_loss.ipynb)
# takes it apart.
