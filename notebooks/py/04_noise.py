# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Noise instead of defects
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/simplenet-piece-by-piece/blob/main/notebooks/04_noise.ipynb)
#
# You have normal images and no defects, but you want to train a network that tells them apart.
# SimpleNet makes its own anomalies: a normal feature plus random noise. In this chapter you write
# that one line, and you find out how large the noise has to be.
#
# ## What you will learn
#
# - **Predict** how long Gaussian noise is in 512 channels, and at which angle it stands to anything
#   else.
# - **Compare** a σ with the features it is added to, because σ alone means nothing.
# - **Measure** what a σ that is too small or too large does to a trained detector.
# - **Show** with gradients why the noise is added after the adaptor.
# - **Judge** how much like real defects the noise is.
#
# ## Before you start
#
# You have read chapters 1 to 3. About 25 minutes to read; runs in under a minute on two CPU cores,
# no GPU needed. The first run also computes the features of 120 images, once.

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
from scipy import stats
from sklearn.metrics import roc_auc_score
from torch import Generator, Tensor

from simplenet_lib.adaptor import Adaptor
from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.discriminator import Discriminator
from simplenet_lib.features import FeatureMaps, Standardise, cache_folder, cached_features
from simplenet_lib.loss import margin_loss
from simplenet_lib.model import Head, SimpleNet
from simplenet_lib.plots import DEFECT, NORMAL, use_book_style
from simplenet_lib.synthetic import generate
from simplenet_lib.training import fit
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
# To learn a boundary, a classifier needs examples from both sides. You have one side only. So you
# take a normal vector, push it in a random direction, and call the result anomalous: a
# {term}`synthetic anomaly`. A network that tells the two apart has to learn where normal vectors
# lie. What lies elsewhere then scores like the pushed ones, real defects included. That is the
# hope; further down you check it.
#
# Start with six vectors in two dimensions and six pushes. Each push has length 5: for the first,
# $3^2 + 4^2 = 25$, and the root of 25 is 5.

# %%
normal = torch.tensor([[1, 0], [0, 0], [0, 1], [4, 4], [5, 4], [4, 5]]).float()
push = torch.tensor([[3, 4], [-3, 4], [-4, -3], [5, 0], [4, -3], [0, 5]]).float()
pushed = normal + push

nearest = torch.cdist(pushed, normal).min(dim=1).values
print("length of the pushes:       ", push.norm(dim=1).tolist())
print("distance to nearest normal: ", [round(value, 1) for value in nearest.tolist()])

# %% mystnb={"image": {"alt": "Six normal points in two groups, with an arrow of equal length from each. Five arrows end away from all normal points; one ends exactly on a point of the other group."}, "figure": {"caption": "Six normal vectors (blue) and what a push makes of them (orange crosses).", "name": "fig-noise-toy"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 3.4))
axis.quiver(
    *normal.T, *push.T, angles="xy", scale_units="xy", scale=1, width=0.004, color="0.7", zorder=1
)
axis.scatter(*normal.T, color=NORMAL, s=50, label="normal", zorder=2)
axis.scatter(*pushed.T, color=DEFECT, marker="x", s=60, label="pushed", zorder=3)
axis.annotate(
    "lands on a\nnormal vector", (4, 4), (-3, 7.5), arrowprops={"arrowstyle": "->", "color": "0.2"}
)
axis.set(
    title="In two dimensions a push can end where normal vectors lie",
    xlabel="channel 1",
    ylabel="channel 2",
    aspect="equal",
    xlim=(-6, 14),
    ylim=(-3, 11),
    xticks=range(-4, 13, 4),
    yticks=range(0, 11, 4),
)
axis.legend(loc="lower right")
plt.show()

# %% [markdown]
# The first push ends at $(1, 0) + (3, 4) = (4, 4)$, exactly on another normal vector. It would be
# labelled anomalous, and wrongly so. With two channels such accidents happen. With 512 channels
# they practically do not, and the next two sections say why.
#
# ### How long is noise?
#
# A push whose entries are all $+1$ or $-1$ has length $\sqrt{A}$ in $A$ channels: $A$ squares of 1,
# added up. {term}`Gaussian noise` with {term}`standard deviation` 1 has random entries, but their
# squares are 1 *on average*. The more channels, the better the averaging. Predict the three lengths
# before you run the cell: $\sqrt{4}$, $\sqrt{16}$, $\sqrt{512}$.

# %%
generator = torch.Generator().manual_seed(0)
for channels in (4, 16, 512):
    signs = torch.randint(0, 2, (channels,), generator=generator) * 2.0 - 1.0
    lengths = torch.randn(4000, channels, generator=generator).norm(dim=1)
    relative = (lengths / math.sqrt(channels)).std().item()
    print(f"A = {channels:3}: ±1 entries {signs.norm():4.1f}, Gaussian varies by {relative:.0%}")

# %% mystnb={"image": {"alt": "Three histograms of noise length divided by the root of A. For 2 channels it is spread from 0 to 2, for 16 channels from 0.5 to 1.5, for 512 channels it is a narrow spike at 1."}, "figure": {"caption": "Length of Gaussian noise, divided by σ√A, for 2, 16 and 512 channels.", "name": "fig-noise-length"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 3))
for channels, shade in ((2, "0.75"), (16, "0.5"), (512, DEFECT)):
    noise = torch.randn(4000, channels, generator=generator)
    axis.hist(
        (noise.norm(dim=1) / math.sqrt(channels)).numpy(),
        bins=np.linspace(0, 2.5, 101),
        density=True,
        histtype="stepfilled",
        alpha=0.8,
        color=shade,
        label=f"A = {channels}",
    )
axis.set(
    title="With many channels all noise vectors have the same length",
    xlabel="length of the noise / (σ √A)",
    ylabel="density",
)
axis.legend()
plt.show()

# %% [markdown]
# In 512 channels every noise vector has length $σ\sqrt{512} \approx 22.6\,σ$, give or take 3%. A
# cloud of noise is not a ball around the normal vector: it is a thin *shell*, with nothing inside.
#
# ### Which way does noise point?
#
# Take any fixed vector and ask for its cosine with fresh noise: 1 is parallel, 0 is at a right
# angle. In $A$ channels the cosine is about $1/\sqrt{A}$ in size, because the fixed vector is one
# direction out of $A$ and noise shares its length among all of them.

# %%
for channels in (2, 16, 512):
    noise = torch.randn(4000, channels, generator=generator)
    fixed = torch.arange(1.0, channels + 1)
    cosine = F.cosine_similarity(noise, fixed, dim=1)
    print(f"A = {channels:3}: cosine with a fixed vector is about ±{cosine.std():.2f}")

# %% [markdown]
# So in 512 channels noise stands at nearly a right angle to everything you can name: to the feature
# itself, to the way to another normal feature, to the way to a real defect. Pythagoras then tells
# how far a noisy vector is from *any* normal vector $n$: the squared distance is
# $\|z - n\|^2 + σ^2 A$. Noise leads away from all of them at once. The accident of
# {numref}`fig-noise-toy` practically cannot happen.
#
# ## From the paper
#
# Section 3.3 of {cite:t}`liu2023simplenet`, the anomalous feature generator, adds noise to an
# {term}`adapted feature` $z$:
#
# $$
# z' = z + ε, \qquad ε \sim \mathcal{N}(0,\, σ^2 I)
# $$ (eq-noise)
#
# The entries of $ε$ are independent, each with standard deviation $σ$. So the expected squared
# length is the sum of $A$ variances, and the length is close to its root:
#
# $$
# \mathbb{E}\,\|ε\|^2 = A\,σ^2, \qquad \|ε\| \approx σ\sqrt{A}
# $$ (eq-noise-length)
#
# The paper uses $σ = 0.015$. In $A = 512$ channels {eq}`eq-noise-length` makes that a length of
# $0.015 \cdot 22.6 = 0.34$. Whether this is much or little, the number alone does not say.
#
# ## Build it
#
# {eq}`eq-noise` in the plainest PyTorch is one line. Features of 8 positions have shape `(8, 512)`.
# Noise has an entry for every entry of the features, so the result is `(8, 512)` again.

# %%
z = torch.zeros(8, 512)
noisy = z + 0.015 * torch.randn_like(z)
print(tuple(noisy.shape))

# %% [markdown]
# Two things are missing. You want to repeat an experiment with the same noise without resetting
# the generator that all of PyTorch shares, so the function takes a `Generator` of your own. And
# the noise has to be of the features' type and on their device. `torch.randn_like` does the second
# and, in older versions of PyTorch, cannot do the first. `torch.empty(...).normal_(...)` does both:
# it allocates the right tensor and fills it in place.


# %% tags=["library"]
def add_noise(features: Tensor, sigma: float, generator: Generator | None = None) -> Tensor:
    """Return z + ε with ε ~ N(0, σ²), drawn anew for every entry (paper, section 3.3)."""
    noise = torch.empty(features.shape, dtype=features.dtype, device=features.device)
    noise.normal_(0.0, sigma, generator=generator)
    return features + noise


# %% [markdown]
# `features + noise` makes a new tensor, so the normal features stay as they are: the training needs
# both. And `noise` is a constant to autograd, so a gradient passes through the sum unchanged.
#
# ## Check it
#
# Each property has a number to compare with: the moments of a normal distribution, the length from
# {eq}`eq-noise-length`, and SciPy's test of whether a sample is Gaussian.

# %%
z = torch.randn(2000, 512, generator=generator)
before = z.clone()
noise = add_noise(z, 0.5, torch.Generator().manual_seed(1)) - z

assert abs(noise.mean().item()) < 0.005
assert abs(noise.std().item() - 0.5) < 0.005
assert stats.kstest(noise.flatten()[:20000].numpy(), "norm", args=(0, 0.5)).statistic < 0.02
assert (noise.norm(dim=1) / (0.5 * math.sqrt(512)) - 1).abs().max() < 0.2
assert F.cosine_similarity(noise[1:], noise[:-1]).abs().max() < 0.3, "every row has its own noise"
by_hand = 0.5 * torch.randn(z.shape, generator=torch.Generator().manual_seed(1))
torch.testing.assert_close(noise, by_hand, atol=1e-5, rtol=0)

same = add_noise(z, 0.5, torch.Generator().manual_seed(1)) - z
running = torch.Generator().manual_seed(1)
first, second = add_noise(z, 0.5, running), add_noise(z, 0.5, running)
assert torch.equal(noise, same), "same generator, same noise"
assert not torch.equal(first, second), "the next call draws new noise"

assert torch.equal(z, before), "the features are not changed"
assert add_noise(z.double(), 0.5).dtype == torch.float64
assert torch.equal(add_noise(z, 0.0), z)
leaf = z.clone().requires_grad_()
add_noise(leaf, 0.5).sum().backward()
assert torch.equal(leaf.grad, torch.ones_like(z)), "the gradient passes unchanged"
print("OK: moments, length, generator, type and gradient are as they should be")

# %% [markdown]
# ## What it does
#
# Now to real features: the synthetic nuts, and the features of chapter 2. The library keeps them on
# disk; chapter 7 says how. You take positions of the first 50 training images as a memory of what
# is normal, and positions of the other 10 as new normal vectors.

# %% tags=["nbval-ignore-output"]
CONFIG = preset("fast", **{**ONE_HEAD, "resize": 256, "crop": 256})
CONFIG = replace(CONFIG, adaptor_channels=512, hidden_channels=512)
data = generate(cache_folder() / "synthetic")
transform = make_transform(256, 256)
train = AnomalyDataset(data, "nut", "train", transform)
test = AnomalyDataset(data, "nut", "test", transform)
model = SimpleNet(CONFIG, find_weights("resnet50"))
train_maps = cached_features(model.features, train, model.feature_key(), progress=False)
test_maps = cached_features(model.features, test, model.feature_key(), progress=False)
standardise, adaptor = model.standardise, model.heads[0].adaptor.requires_grad_(False)
standardise.fit(train_maps[:50])


# %%
def draw(maps: FeatureMaps, images: range, count: int) -> Tensor:
    """Frozen features of ``count`` random positions of some images, (count, 1536)."""
    _, height, width, _ = maps.shape
    places = height * width
    chosen = torch.randperm(len(images) * places, generator=generator)[:count]
    return torch.from_numpy(maps.vectors(images.start * places + chosen.numpy())).float()


memory_f = draw(train_maps, range(50), 8000)
new_f = draw(train_maps, range(50, 60), 1000)
memory, new = adaptor(standardise(memory_f)), adaptor(standardise(new_f))
print("frozen features: ", tuple(new_f.shape))
print("adapted features:", tuple(new.shape))

# %% [markdown]
# ### σ against the scale of the features
#
# Is $σ = 0.015$ much or little? Compare it with two things: with the spread of one channel, and,
# as a length, with the distance from a new normal feature to the nearest one in memory. Measure
# both for frozen and for adapted features, as they come from the backbone and after
# {term}`standardisation`. The adaptor is untrained here.

# %% tags=["nbval-ignore-output"]
kinds = {
    "frozen, raw": (memory_f, new_f),
    "frozen, standardised": (standardise(memory_f), standardise(new_f)),
    "adapted, raw": (adaptor(memory_f), adaptor(new_f)),
    "adapted, standardised": (memory, new),
}
ratios = {}
table = ["                        channel spread      nearest   0.015·√A   ratio   0.5·√A   ratio"]
for name, (known, fresh) in kinds.items():
    spread = known.std(dim=0)
    near = torch.cdist(fresh[:500], known[:6000]).min(dim=1).values.median().item()
    small, large = (sigma * math.sqrt(known.shape[1]) for sigma in (0.015, 0.5))
    ratios[name] = (small / near, large / near)
    table.append(
        f"{name:22} {spread.mean():5.2f} ({spread.min():.2f} to {spread.max():.2f})"
        f"   {near:7.1f}   {small:8.2f}   {small / near:5.3f}   {large:6.1f}   {large / near:5.2f}"
    )
print("\n".join(table))

# %%
for small_ratio, large_ratio in ratios.values():
    assert 0.01 < small_ratio < 0.06
    assert 0.4 < large_ratio < 2.0
print("OK: 0.015 is a few hundredths of the nearest distance, 0.5 about as long")

# %% [markdown]
# Three observations, one of them a surprise.
#
# - With $σ = 0.015$ the noise is a few hundredths as long as the way from one normal feature to its
#   nearest neighbour. A synthetic anomaly lies much nearer to its own normal feature than any other
#   normal feature does.
# - With $σ = 0.5$ it is about as long as that way.
# - Standardising hardly changes these ratios, because the spread of these raw features happens to
#   be below 1 already. With another backbone it need not be. What it changes is the *evenness* of
#   the frozen channels: without it their spread differs by a factor of about a hundred, with it by
#   about ten. Behind the adaptor they are even in any case, as each mixes all of the frozen ones.
#   But a loud channel then speaks loudly in each.

# %% mystnb={"image": {"alt": "Histogram of distances from new normal features to the nearest known one, between about 7 and 25, with vertical lines for the noise lengths: those of 0.015 and 0.15 lie left of all distances, that of 0.5 near their peak, those of 1 and 2 to their right."}, "figure": {"caption": "Distances between neighbouring normal features, and the length of the noise for five values of σ. Adapted, standardised features.", "name": "fig-noise-scale"}} tags=["hide-input"]
distances = torch.cdist(new, memory).min(dim=1).values
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.hist(distances.numpy(), bins=40, color=NORMAL, alpha=0.7)
top = axis.get_ylim()[1]
for sigma, height in ((0.015, 1.16), (0.15, 1.03), (0.5, 1.16), (1.0, 1.16), (2.0, 1.16)):
    length = sigma * math.sqrt(512)
    axis.vlines(length, 0, top * (height + 0.06), color=DEFECT)
    axis.text(length + 0.4, top * height, f"σ = {sigma:g}", color=DEFECT, fontsize=9)
axis.set(
    title="At σ = 0.015 noise is far shorter than any step between normal features",
    xlabel="distance to the nearest normal feature, or length of the noise",
    ylabel="normal positions",
    xlim=(-1, 52),
    ylim=(0, top * 1.28),
)
plt.show()

# %% [markdown]
# Pythagoras makes a prediction about real features, too. Add noise with $σ = 0.5$ to the new normal
# features. The nearest distance should grow from $d$ to about $\sqrt{d^2 + σ^2 A}$.

# %%
noisy = add_noise(new, 0.5, generator)
measured = torch.cdist(noisy, memory).min(dim=1).values
predicted = (distances.square() + 0.5**2 * 512).sqrt()
cosine = F.cosine_similarity(noisy - new, new, dim=1)

assert (measured / predicted - 1).abs().median() < 0.05
assert cosine.abs().mean() < 0.06
print("OK: noise is at right angles to the features, and leads away from all of them")

# %% [markdown]
# ### How well could anyone tell them apart?
#
# Distance is not the whole story. Normal features do not fill their space evenly: in some
# directions they vary much, in others hardly at all. Noise is as large in the thin directions as in
# all others, and there it shows first (chapter 3 called them quiet).
#
# To see it, rotate the features so that each axis is one direction of variation (principal
# components, the eigenvectors of their covariance), and compare the spread along each with σ. Then
# let an {term}`ideal observer` judge. It knows the variance $λ_i$ of normal features along every
# direction $i$, knows $σ$, and takes both for Gaussian. For a vector with coordinate $u_i$ along
# direction $i$, measured from the mean, the evidence for "noisy" is
#
# $$
# \sum_i u_i^2 \left( \frac{1}{λ_i} - \frac{1}{λ_i + σ^2} \right),
# $$ (eq-noise-observer)
#
# the logarithm of the ratio of the two Gaussian densities, up to constants and a factor of two. How
# often does it give a noisy vector more evidence than a normal one? That is the {term}`AUROC`: 0.5
# is guessing, 1 is never wrong.


# %%
def observe(known: Tensor, fresh: Tensor, sigmas: list[float]) -> tuple[Tensor, list[float]]:
    """Spread of ``known`` along its directions, and the ideal observer's AUROC on ``fresh``."""
    mean = known.mean(dim=0)
    variance, directions = torch.linalg.eigh(torch.cov(known.T))
    variance = variance.clamp_min(1e-8)
    aurocs = []
    for sigma in sigmas:
        weight = 1 / variance - 1 / (variance + sigma**2)
        vectors = torch.cat([fresh, add_noise(fresh, sigma, generator)])
        evidence = ((vectors - mean) @ directions).square() @ weight
        labels = np.repeat([0, 1], len(fresh))
        aurocs.append(float(roc_auc_score(labels, evidence.numpy())))
    return variance.sqrt(), aurocs


SIGMAS = [0.015, 0.05, 0.15, 0.5, 1.0, 2.0, 4.0]
spread, ideal = observe(memory, new, SIGMAS)

# %% tags=["nbval-ignore-output"]
for sigma, auroc in zip(SIGMAS, ideal, strict=True):
    thinner = (spread < sigma).float().mean()
    print(f"σ = {sigma:5}: thinner than σ are {thinner:4.0%} of the directions, AUROC {auroc:.3f}")

# %%
assert spread.min() > 2 * 0.015 and (spread < 0.5).float().mean() > 0.5
assert ideal[0] < 0.6 and ideal[3] > 0.98
print("OK: at 0.015 even the ideal observer guesses, at 0.5 it is hardly ever wrong")

# %% mystnb={"image": {"alt": "Spread of normal features along 512 directions on a logarithmic axis, rising from about 0.15 to 7. Horizontal lines: sigma 0.015 lies below the whole curve, 0.15 touches its lower end, 0.5 and 1 cross it."}, "figure": {"caption": "Spread of adapted, standardised features along each of their 512 principal directions, and four values of σ.", "name": "fig-noise-spectrum"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.semilogy(spread.numpy(), color=NORMAL, linewidth=2.5)
for sigma in (0.015, 0.15, 0.5, 1.0):
    axis.axhline(sigma, color=DEFECT, linewidth=1)
    axis.text(515, sigma, f"σ = {sigma:g}", color=DEFECT, fontsize=9, va="center")
axis.set(
    title="At σ = 0.015 normal features vary more than noise in every direction",
    xlabel="direction, thinnest first",
    ylabel="spread (standard deviation)",
    xlim=(0, 512),
)
axis.set_yticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
plt.show()

# %% [markdown]
# In *no* direction do these normal features vary less than 0.015. So the noise drowns in what is
# normal anyway, and no discriminator can be expected to find it in these features. At $σ = 0.5$
# noise exceeds the normal spread in more than half of the directions.
#
# ### Train with it
#
# What comes out of a training? The network that separates normal from noisy vectors, its loss and
# the training loop are the next three chapters. For now the library's `fit` does it, as in chapter
# 3: 60 steps of 512 positions, much shorter than it should be, only to compare values of σ. Each
# trained {term}`discriminator` has to answer two questions. Does it tell normal vectors from
# *noisy* ones, as it was asked to? And does it tell them from real *defects*, which it has never
# seen? It should score a normal vector above 0 and the others below.
#
# Count the share of correctly scored positions, as the mean of the two kinds, so that always giving
# the same answer scores 0.5. The AUROC is printed beside it: it looks at the order of the scores
# only and does not care where zero is. A position counts as defect if the {term}`mask` covers more
# than half of it, and as normal if its image is good.

# %%
shown = range(0, len(test), 2)  # every second test image: 10 normal, 20 with a defect
masks = torch.stack([test[index]["mask"].float().reshape(1, 256, 256) for index in shown])
covered = F.avg_pool2d(masks, 8).flatten()  # (30*32*32,), share of each position
is_good = torch.tensor([test.samples[index].label == 0 for index in shown])
positions_f = torch.from_numpy(test_maps[shown].reshape(-1, 1536))
defect_f = positions_f[covered > 0.5].float()
normal_f = positions_f[is_good.repeat_interleave(32 * 32)][::5].float()  # every fifth
print(f"{len(defect_f)} defect positions, {len(normal_f)} normal ones")


def auroc(higher: Tensor, lower: Tensor) -> float:
    """Probability that one of ``higher`` is above one of ``lower``."""
    labels = np.repeat([1, 0], [len(higher), len(lower)])
    return float(roc_auc_score(labels, torch.cat([higher, lower]).numpy()))


def trial(sigma: float, **changes: bool) -> dict[str, float]:
    """Train a fresh head with this σ for a few steps, and judge its discriminator."""
    config = replace(CONFIG, sigma=sigma, steps=60, batch_size=512, **changes)
    torch.manual_seed(0)
    head, own = Head(1536, config), Standardise(1536)
    folds = np.array([-1, 0] * 30)  # train on every second image
    fit([head], own, train_maps, folds, config, progress=False)
    with torch.no_grad():
        z, z_defect = (head.adaptor(own(f)) for f in (normal_f, defect_f))
        score, defect_score = head.discriminator(z), head.discriminator(z_defect)
        noisy_score = head.discriminator(add_noise(z, sigma, generator))
    normal_right = (score > 0).float().mean().item()
    defect_right = (defect_score < 0).float().mean().item()
    noisy_right = (noisy_score < 0).float().mean().item()
    return {
        "noisy right": (normal_right + noisy_right) / 2,
        "noisy auroc": auroc(score, noisy_score),
        "defects right": (normal_right + defect_right) / 2,
        "defects auroc": auroc(score, defect_score),
        "defects found": defect_right,
        "spread": z.std(dim=0).mean().item(),
    }


results = {sigma: trial(sigma) for sigma in SIGMAS}
course = trial(0.015, standardise=False, batchnorm=False)
course_larger = trial(0.5, standardise=False, batchnorm=False)

# %% tags=["nbval-ignore-output"]
rows = {f"standardised, σ = {sigma}": result for sigma, result in results.items()}
rows["raw, no BatchNorm, σ = 0.015"] = course
rows["raw, no BatchNorm, σ = 0.5"] = course_larger
print("                                  normal from noisy   normal from defects   defects")
print("                                  right       AUROC   right         AUROC   below 0")
for name, row in rows.items():
    print(
        f"{name:30} {row['noisy right']:8.0%} {row['noisy auroc']:11.3f}"
        f" {row['defects right']:7.0%} {row['defects auroc']:13.3f} {row['defects found']:9.0%}"
    )

# %%
small, middle, large = results[0.015], results[0.5], results[4.0]
assert course["noisy right"] < 0.55 and small["noisy right"] < 0.55, "too small: guessing"
assert course_larger["noisy auroc"] > course["noisy auroc"] + 0.2, "only σ has changed"
assert middle["noisy right"] > 0.8 and large["noisy right"] > 0.95, "large enough: learned"
assert middle["defects right"] > small["defects right"] + 0.2
assert middle["defects right"] > large["defects right"] + 0.1
assert large["defects found"] < 0.5 and large["defects auroc"] > 0.85, (
    "the order of the scores survives"
)
print("OK: 0.5 scores more defects correctly than 0.015 and than 4")

# %% mystnb={"image": {"alt": "Two curves against sigma on a logarithmic axis. The one for noise rises from 0.5 at small sigma to 1 at large sigma. The one for real defects rises to a peak at 0.5 and falls again."}, "figure": {"caption": "Share of positions that the discriminator scores correctly after 60 short steps, against the σ it was trained with.", "name": "fig-noise-sweep"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 3))
for key, line, colour, label in (
    ("noisy right", "o--", "0.5", "normal and noisy"),
    ("defects right", "o-", DEFECT, "normal and real defects"),
):
    axis.semilogx(SIGMAS, [row[key] for row in results.values()], line, color=colour, label=label)
axis.set(
    title="Too small a σ teaches nothing, too large a σ misses defects",
    xlabel="σ in training",
    ylabel="share scored correctly",
    ylim=(0.45, 1.05),
    xticks=SIGMAS,
    xticklabels=[f"{sigma:g}" for sigma in SIGMAS],
)
axis.minorticks_off()
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# Read the two curves together.
#
# - **Too small.** At 0.015 and 0.05 the discriminator cannot do the task it was set. At 0.015 it
#   cannot do it on raw features without {term}`BatchNorm` either. What it says about defects is
#   then mostly an accident of its random start. With $σ = 0.5$ the same raw features can be
#   learned: the only thing that has changed is σ. (BatchNorm and standardisation speed it up
#   further.)
# - **About right.** At 0.15 learning has begun, and the order of the scores already points the
#   right way. At 0.5 the task can be done but takes care, and most defects score below 0.
# - **Too large.** At 4 the task is done almost perfectly, and still most defects score *above* 0,
#   as if they were normal. The noise is so far out that a boundary anywhere in the wide gap will
#   do, and most defects lie on its inner side. A task that is too easy teaches little.
#
# The AUROC tells more: at $σ = 4$ it is still high, so defects do score lower than normal
# positions. What is wrong is where zero lies. Chapter 8 chooses its {term}`threshold` from normal
# images and repairs that in part. Do not read finer differences out of the table: it is one seed,
# one product and a very short training.

# %% [markdown]
# ### Where real defects lie
#
# Is noise like a defect? Measure, for every defect position, the distance to the nearest normal
# feature, and set it beside new normal positions (of the normal test images) and beside noisy ones.

# %%
normal_z, defect_z = adaptor(standardise(normal_f)), adaptor(standardise(defect_f))
noisy_z = add_noise(normal_z, 0.5, generator)

normal_far = torch.cdist(normal_z, memory).min(dim=1).values
defect_far, where = torch.cdist(defect_z, memory).min(dim=1)
noisy_far = torch.cdist(noisy_z, memory).min(dim=1).values
way = defect_z - memory[where]  # from the nearest normal feature to the defect
cosine = F.cosine_similarity(way, add_noise(torch.zeros_like(way), 0.5, generator), dim=1)

# %% tags=["nbval-ignore-output"]
for name, far in (("normal", normal_far), ("defect", defect_far), ("σ = 0.5", noisy_far)):
    low, middle, high = far.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    print(f"{name:8}: nearest normal feature at {middle:5.1f} (90% within {low:.1f} to {high:.1f})")
print(f"cosine between the way to a defect and noise: at most {cosine.abs().max():.2f}")

# %%
assert normal_far.median() < defect_far.median()
assert defect_far.quantile(0.05) < normal_far.quantile(0.99), "they overlap"
assert (defect_far > noisy_far.median()).float().mean() > 0.8, "most are beyond the noise"
assert cosine.abs().max() < 0.25
assert defect_far.max() < 2.0 * math.sqrt(512), "all nearer than noise of σ = 2"
print(
    "OK: defects are farther than normal positions, overlap with them, and noise points elsewhere"
)

# %% mystnb={"image": {"alt": "Three histograms of distance to the nearest normal feature. Normal positions lie around 12, noisy ones around 17, real defect positions are spread from about 16 to 44 with most beyond the noisy ones."}, "figure": {"caption": "Distance to the nearest normal feature in memory: normal test positions, real defect positions, and normal positions plus noise with σ = 0.5.", "name": "fig-noise-defects"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 3))
bins = np.linspace(0, 45, 61)
style = {"bins": bins, "density": True}
axis.hist(normal_far.numpy(), **style, color=NORMAL, alpha=0.6, label="normal")
axis.hist(defect_far.numpy(), **style, color=DEFECT, alpha=0.6, label="real defect")
axis.hist(
    noisy_far.numpy(), **style, color="0.2", histtype="step", linewidth=1.8, label="normal + noise"
)
axis.set(
    title="Most real defects lie beyond the noise of σ = 0.5, a few among the normal",
    xlabel="distance to the nearest normal feature",
    ylabel="density",
)
axis.legend()
plt.show()

# %% [markdown]
# The honest picture has two sides.
#
# - Real defects are no noise. The way from a normal feature to a defect is at nearly a right angle
#   to every noise vector. No synthetic anomaly looks like a scratch.
# - Still, the noise does its work. Most defect positions lie farther out than noise with $σ = 0.5$,
#   so a boundary between the blue cloud and the black shell catches them. A few lie among the
#   normal ones: no boundary by distance catches those without false alarms. And noise with $σ = 2$
#   starts at $2\sqrt{512} = 45$, beyond all of them. A boundary just inside *that* shell misses
#   everything.
#
# So noise does not show the discriminator what a defect is. It shows where normal ends, in all
# directions at once. You could use the distance to memory itself as a score; PatchCore
# {cite:p}`roth2022patchcore` does. SimpleNet replaces the memory with a small network.
#
# ## Why 0.015 works in the published setting
#
# Here $σ = 0.015$ teaches nothing, yet the published code reaches its results with it. Two
# differences may explain it: more training and a square adaptor. Two other things also touch the
# scale of the features, and are easily taken for the reason.
#
# **More training.** The published run trains 160 epochs. On the 209 images of MVTec AD's category
# bottle, in batches of 8 images with a grid of 36 x 36 positions:

# %%
steps, positions = 209 * 160 // 8, 8 * 36 * 36
print(f"published: {steps:,} steps of {positions:,} positions")
print("here:      60 steps of 512 positions")
print(f"factor:    {steps * positions / (60 * 512):,.0f}")

# %% [markdown]
# **A square adaptor.** The published adaptor maps 1,536 channels to 1,536. A random square matrix
# nearly crushes some directions, and after it normal features hardly vary there, so even a small
# noise sticks out. A matrix from 1,536 to 512 crushes none of the directions it keeps. Compare the
# largest and smallest stretch of both (their singular values) and call the ideal observer again.
# Both adaptors are untrained and see raw features.

# %%
torch.manual_seed(0)
square = Adaptor(1536, 1536).requires_grad_(False)
known, fresh = memory_f[:6000], new_f
comparison = {}
for name, candidate in (("1536 to 512", adaptor), ("1536 to 1536", square)):
    stretch = torch.linalg.svdvals(candidate.linear.weight)
    thin, aurocs = observe(candidate(known), candidate(fresh), [0.015])
    comparison[name] = (stretch[0] / stretch[-1], (thin < 0.015).float().mean(), aurocs[0])

# %% tags=["nbval-ignore-output"]
for name, (uneven, thinner, auroc) in comparison.items():
    print(f"{name:12}: largest stretch {uneven:8,.1f} times the smallest")
    print(f"              {thinner:.1%} of directions thinner than 0.015, ideal AUROC {auroc:.3f}")

# %%
assert comparison["1536 to 512"][0] < 6 and comparison["1536 to 1536"][0] > 100
assert comparison["1536 to 512"][2] < 0.6 and comparison["1536 to 1536"][2] > 0.9
print("OK: behind the square adaptor 0.015 can be seen, behind the narrow one it cannot")

# %% [markdown]
# The ideal observer is told the directions; a discriminator has to find them, step by step. That is
# where the long training goes. (The published code also averages features over neighbours and uses
# a wider network; this cell does neither.)
#
# **BatchNorm in the discriminator.** It divides by the spread of the batch. So BatchNorm frees the
# discriminator from the *overall* scale: vectors ten times as large, noise included, give the same
# scores. Without it they give scores about ten times as large. But the ratio of noise to features
# is the same before and after:


# %%
def score_ten_times(batchnorm: bool) -> float:
    """Spread of the scores of ten times larger vectors, relative to the scores of the vectors."""
    torch.manual_seed(0)
    discriminator = Discriminator(512, 512, batchnorm=batchnorm).train()
    vectors = torch.cat([new[:500], add_noise(new[:500], 0.015, generator)])
    with torch.no_grad():
        return (discriminator(10 * vectors).std() / discriminator(vectors).std()).item()


with_norm, without = score_ten_times(True), score_ten_times(False)
print(f"with BatchNorm {with_norm:.1f} times, without {without:.0f} times")

# %% [markdown]
# **A trained adaptor.** σ is fixed, but the features it is added to are not: multiply the adaptor's
# weights by 2, and the same noise is half as large in comparison. So training itself changes what σ
# means. It could make the features smaller, and the noise easier to find. Look at the spread of the
# adapted features, a mean over the channels, after the trainings above:

# %% tags=["nbval-ignore-output"]
print(f"untrained:         {normal_z.std(dim=0).mean():.2f}")
for sigma, result in results.items():
    print(f"trained, σ = {sigma:<5}: {result['spread']:.2f}")

# %%
untrained = normal_z.std(dim=0).mean()
assert all(result["spread"] > 0.95 * untrained for result in results.values())
assert results[1.0]["spread"] > 1.05 * untrained
print("OK: no training has shrunk the features, and that with σ = 1 has made them larger")

# %% [markdown]
# ## Why the noise comes after the adaptor
#
# ### Gradients reach the adaptor twice
#
# Write $D_ψ(z)$ for the discriminator's score of $z$. The loss wants $D_ψ(z)$ high and $D_ψ(z')$
# low. It depends on the adaptor twice, through $z = G_θ(f)$ and through $z' = G_θ(f) + ε$. Detach
# one branch at a time, and you see the share of the other. The two add up to the whole gradient.


# %%
def adaptor_gradient(sigma: float, through: tuple[str, ...]) -> Tensor:
    """Gradient of the margin loss for the adaptor's weights, through the named branches only."""
    torch.manual_seed(0)
    fresh_adaptor, discriminator = Adaptor(1536, 512), Discriminator(512, 512)
    z = fresh_adaptor(standardise(new_f[:500]))
    noisy = add_noise(z, sigma, torch.Generator().manual_seed(1))
    normal_score = discriminator(z if "normal" in through else z.detach())
    noisy_score = discriminator(noisy if "noisy" in through else noisy.detach())
    margin_loss(normal_score, noisy_score).backward()
    return fresh_adaptor.linear.weight.grad


remains = {}
for sigma in (0.015, 0.5):
    both = adaptor_gradient(sigma, ("normal", "noisy"))
    from_normal = adaptor_gradient(sigma, ("normal",))
    from_noisy = adaptor_gradient(sigma, ("noisy",))
    assert from_normal.norm() > 0 and from_noisy.norm() > 0
    assert (both - from_normal - from_noisy).norm() < 1e-3 * from_normal.norm()
    remains[sigma] = (both.norm() / (from_normal.norm() + from_noisy.norm())).item()
print("OK: both branches reach the adaptor, and their gradients add up")

# %% tags=["nbval-ignore-output"]
for sigma, share in remains.items():
    print(f"σ = {sigma:5}: the sum is {share:.1%} as long as the two gradients laid end to end")

# %%
assert remains[0.015] < 0.2 and remains[0.015] < 0.75 * remains[0.5]
print("OK: at 0.015 the two gradients nearly cancel")

# %% [markdown]
# The two branches pull in opposite directions: one wants $D_ψ(z)$ to rise, the other $D_ψ(z')$ to
# fall.
# With $σ = 0.015$ there is hardly a difference between $z$ and $z'$, so the two pulls nearly
# cancel. With $σ = 0.5$ more remains: the discriminator is untrained, and already sees some
# difference. You have found the same slow learning a third time, now in the gradient.
#
# ### Noise before the adaptor takes the adaptor's shape
#
# Add the noise to $f$ instead, and the adaptor's matrix $W$ turns it into $Wε$. In two dimensions,
# with a $W$ that shrinks the second channel tenfold:

# %%
W = torch.tensor([[1.0, 0.0], [0.0, 0.1]])
eps = torch.tensor([3.0, 4.0])
print("noise after the adaptor: ", eps.tolist(), "length", eps.norm().item())
print("noise before the adaptor:", [round(v, 1) for v in (W @ eps).tolist()], end=" ")
print("length", round((W @ eps).norm().item(), 1))

# %% [markdown]
# The adaptor is trained, so it could even shrink the noise away. Here is one that does, made by
# hand: it keeps the 32 directions in which normal features vary most, of 1,536. Count how much of
# the features' squared length it keeps, and how much of the noise's.

# %%
torch.manual_seed(0)
vectors = standardise(memory_f[:4000])
centred = vectors - vectors.mean(dim=0)
_, _, directions = torch.svd_lowrank(centred, q=64, niter=4)
W = directions[:, :32].T  # (32, 1536), rows of length 1
noise = add_noise(torch.zeros_like(centred), 0.5, generator)
kept = {
    "features": ((centred @ W.T).square().sum() / centred.square().sum()).item(),
    "noise": ((noise @ W.T).square().sum() / noise.square().sum()).item(),
}
assert abs(kept["noise"] - 32 / 1536) < 0.002
assert kept["features"] > 10 * kept["noise"]
print(f"of the noise it keeps {kept['noise']:.0%}, of the features more than ten times that share")

# %% [markdown]
# Noise that is added *after* the adaptor has the same deviation $σ$ in every direction that the
# discriminator sees, whatever the adaptor has become. {eq}`eq-noise-length` stays true for the
# whole training.
#
# ## What can go wrong
#
# **The same noise again and again.** Drawing one noise vector and keeping it looks harmless, and it
# saves time. Train two small discriminators on the same adapted features, one with a fixed $ε$, one
# with fresh noise in every step. Then show both fresh noise.


# %%
def train_small(reuse: bool) -> tuple[float, dict[str, float]]:
    """Last loss and shares of correct scores, after 80 steps with one or with fresh noise."""
    torch.manual_seed(0)
    discriminator = Discriminator(512, 256)
    optimizer = torch.optim.Adam(discriminator.parameters(), lr=1e-3)
    draws = torch.Generator().manual_seed(0)
    only = add_noise(torch.zeros(512), 0.5, draws)
    for _ in range(80):
        z = memory[torch.randint(len(memory), (512,), generator=draws)]
        noisy = z + only if reuse else add_noise(z, 0.5, draws)
        loss = margin_loss(discriminator(z), discriminator(noisy))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = {
            "normal above 0": discriminator(new) > 0,
            "first noise below 0": discriminator(new + only) < 0,
            "fresh noise below 0": discriminator(add_noise(new, 0.5, draws)) < 0,
            "defects below 0": discriminator(defect_z) < 0,
        }
    return loss.item(), {name: share.float().mean().item() for name, share in right.items()}


(reused_loss, reused), (fresh_loss, drawn_anew) = train_small(reuse=True), train_small(reuse=False)

# %% tags=["nbval-ignore-output"]
print("share of correct scores   one noise vector   fresh noise")
for name in reused:
    print(f"{name:24} {reused[name]:17.0%} {drawn_anew[name]:13.0%}")
print(f"{'loss at the last step':24} {reused_loss:17.2f} {fresh_loss:13.2f}")

# %%
assert reused_loss < 0.1 * fresh_loss and reused["first noise below 0"] > 0.95
assert reused["fresh noise below 0"] < 0.2
assert drawn_anew["fresh noise below 0"] > reused["fresh noise below 0"] + 0.3
assert drawn_anew["defects below 0"] > reused["defects below 0"] + 0.2
print("OK: with one noise vector only that vector is found")

# %% [markdown]
# With a reused vector the training looks perfect: its loss is almost zero. The discriminator has
# learned one direction out of 512, and any other noise, and any defect, is at a right angle to it.
# Fresh noise in every step leaves no direction out. That is why `add_noise` draws anew at every
# call, and why a generator that is seeded anew before every call would be a bug.
#
# **σ taken for a length.** "Noise of size 0.5" can mean that each *entry* has deviation 0.5, or
# that the *vector* has length 0.5. In 512 channels the two differ by a factor of 22.6:

# %%
entries = add_noise(torch.zeros(1000, 512), 0.5, generator)
vectors = 0.5 * F.normalize(entries, dim=1)
print(f"σ = 0.5 for every entry: length {entries.norm(dim=1).mean():.0f}")
print(f"a vector of length 0.5:  σ = {vectors.std():.3f} for every entry")

# %% [markdown]
# The second σ is nearly as small as the one that teaches nothing here.
#
# ## Exercises
#
# :::{exercise} easy: choose σ for a length
# :label: ex-noise-length
#
# You want noise of length 12 in 512 channels. Which σ? And how long is noise of the same σ in 1,536
# channels? Work it out by hand with {eq}`eq-noise-length`, then check with `add_noise`.
#
# **Expected result:** σ is about 0.53; the length in 1,536 channels is about 21 (a factor of
# $\sqrt{3}$ more).
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
sigma = 12 / math.sqrt(512)
narrow = add_noise(torch.zeros(1000, 512), sigma, generator).norm(dim=1).mean().item()
wide = add_noise(torch.zeros(1000, 1536), sigma, generator).norm(dim=1).mean().item()
assert abs(narrow - 12) < 0.1 and abs(wide - 12 * math.sqrt(3)) < 0.1
print(f"σ = {sigma:.2f}, length in 512 channels {narrow:.0f}, in 1,536 channels {wide:.0f}")

# %% [markdown]
# :::{exercise} medium: noise that fits every channel
# :label: ex-noise-channel
#
# The raw features of `new_f` differ widely in spread from channel to channel. Write noise whose
# standard deviation in channel $c$ is $0.5$ times the spread of that channel, without standardising
# the features. Show that the ratio of noise to spread is the same in all channels, and that with
# `add_noise(new_f, 0.5)` it is not.
#
# **Expected result:** with your noise the largest ratio is less than 1.5 times the smallest; with
# one σ for all it is more than 10 times the smallest.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
spread_f = new_f.std(dim=0)
fitted = add_noise(torch.zeros_like(new_f), 0.5, generator) * spread_f
one_for_all = add_noise(torch.zeros_like(new_f), 0.5, generator)
ratio_fitted = fitted.std(dim=0) / spread_f
ratio_one = one_for_all.std(dim=0) / spread_f
assert ratio_fitted.max() / ratio_fitted.min() < 1.5
assert ratio_one.max() / ratio_one.min() > 10
print("fitted noise: the ratio is the same in all channels")
print("one σ for all: the ratio differs more than tenfold")

# %% [markdown]
# :::{exercise} hard: noise of equal length before the adaptor
# :label: ex-noise-before
#
# Which σ must noise on $f$ have, so that after the untrained adaptor with matrix $W$ it is on
# average as long as noise with $σ = 0.5$ on $z$? Use $\mathbb{E}\,\|Wε\|^2 = σ_f^2\,\|W\|_F^2$,
# where $\|W\|_F^2$ is the sum of all squared entries. Check the length. Is it then the same noise?
# Compare the most and the least noisy direction of both.
#
# **Expected result:** $σ_f = 0.5\sqrt{512} / \|W\|_F$, about 0.41. The lengths agree, the noise
# does not: after the adaptor its deviation in the most noisy direction is more than three times
# that in the least noisy one. Noise on $z$ is the same in all directions.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
W = adaptor.linear.weight  # (512, 1536)
sigma_f = 0.5 * math.sqrt(512) / W.norm().item()
through = add_noise(torch.zeros(2000, 1536), sigma_f, generator) @ W.T
assert abs(through.norm(dim=1).mean().item() / (0.5 * math.sqrt(512)) - 1) < 0.03

# Wε has covariance σ² W Wᵀ: its deviation along each direction is σ times a singular value of W.
deviation = sigma_f * torch.linalg.svdvals(W)
assert abs(sigma_f - 0.41) < 0.01
assert deviation[0] / deviation[-1] > 3
print(
    f"σ_f = {sigma_f:.2f}: as long, but more than three times as noisy in one direction as another"
)

# %% [markdown]
# ## Quiz
#
# **1. You double the number of adapted channels and leave σ as it is. How does the length of the
# noise change, and how does its spread in one channel?**
#
# <details>
# <summary>Answer</summary>
#
# The length grows by $\sqrt{2}$, because it is $σ\sqrt{A}$. The spread in one channel stays σ. So a
# σ chosen by comparing *lengths* depends on the number of channels, and one chosen by comparing
# with the spread of a channel does not.
#
# </details>
#
# **2. A colleague trains with a large σ and reports that the discriminator is right on 100% of the
# noisy vectors. Is the detector good?**
#
# <details>
# <summary>Answer</summary>
#
# You cannot tell, and there is reason for doubt. If noise lies far beyond everything normal, almost
# any boundary separates it. The sweep of this chapter shows it: at σ = 4 the task is solved, and
# fewer defects score below 0 than at σ = 0.5. Only real defects tell whether the boundary is close
# enough to the normal features.
#
# </details>
#
# **3. Why does the training not end in an adaptor that maps everything to zero? Then all normal
# features would be equal.**
#
# <details>
# <summary>Answer</summary>
#
# Nothing in the loss forbids it. Noise is added after the adaptor and keeps its length, so behind
# such an adaptor it would be easy to tell from the constant normal features, and the loss would be
# low. The detector would be useless, since defects would be mapped to zero as well: the collapse of
# chapter 3. In the trainings above it does not happen: the adapted features do not shrink, and with
# a large σ they grow. The training is short, and once two vectors are told apart clearly, the loss
# no longer pulls at them. It is one more reason to judge a detector by defects and not by its loss.
#
# </details>
#
# ## Summary
#
# - A synthetic anomaly is a normal adapted feature plus Gaussian noise, drawn anew every time.
# - In $A$ channels the noise has length $σ\sqrt{A}$, almost without variation, and stands at nearly
#   a right angle to everything else.
# - σ means nothing alone. Against these features 0.015 is a few hundredths of the step between
#   neighbours, and cannot be learned; 0.5 is about one step.
# - Too small a σ teaches nothing. Too large a σ teaches a boundary that lies too far out.
# - After the adaptor, noise has the same spread in every direction, and both branches send
#   gradients to the adaptor.
# - Noise does not resemble defects. It marks where normal ends.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, section 3.3: the anomalous feature generator.
# - {cite:t}`vershynin2018highdim`, chapter 3: why the length of a random vector concentrates, and
#   why independent random vectors are nearly orthogonal.
# - {cite:t}`roth2022patchcore`: the distance to a memory of normal features as the score.
# - {cite:t}`ioffe2015batchnorm`: what BatchNorm does to the scale of its input.
#
# ## Next
#
# You have normal and noisy vectors. [The discriminator](05_discriminator.ipynb) is the network that
# tells them apart.
