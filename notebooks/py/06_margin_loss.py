# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # The margin loss
#
# The {term}`discriminator` gives scores. This chapter says what good scores are: one line of code
# that turns normal and noisy scores into a number to minimise.
#
# ## What you will learn
#
# - **Compute** the {term}`margin loss` and its gradient by hand.
# - **Derive** what it estimates, and what {term}`cross-entropy` estimates.
# - **Recognise** a training that has found only the trivial solution, at a loss of $2m$.
# - **Explain** why the {term}`margin` only sets the unit of the {term}`score`.
#
# ## Before you start
#
# You have read [The discriminator](05_discriminator.ipynb). About 30 minutes to read, 50 to work
# through; runs in under a minute on two CPU cores, no GPU needed.

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
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from torch import Tensor

from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.discriminator import Discriminator
from simplenet_lib.features import Standardise, cache_folder, cached_features
from simplenet_lib.loss import cross_entropy_loss
from simplenet_lib.model import Head, SimpleNet
from simplenet_lib.plots import DEFECT, NORMAL, use_book_style
from simplenet_lib.synthetic import generate
from simplenet_lib.training import History
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
# A normal vector should score high, a noisy one low. How high is high enough? The margin loss names
# a number, the margin $m$, here 0.5. A normal score is good enough from $+m$ upwards, a noisy one
# from $-m$ downwards. A score that is good enough costs nothing. Any other costs what it lacks.
#
# Six scores, worked by hand:
#
# | | score | lacks | cost | slope |
# |---|---|---|---|---|
# | normal | 0.8 | nothing, it is above 0.5 | 0 | 0 |
# | normal | 0.3 | 0.5 − 0.3 | 0.2 | −1/3 |
# | normal | −0.2 | 0.5 − (−0.2) | 0.7 | −1/3 |
# | noisy | −1.1 | nothing, it is below −0.5 | 0 | 0 |
# | noisy | −0.4 | 0.5 + (−0.4) | 0.1 | +1/3 |
# | noisy | 0.6 | 0.5 + 0.6 | 1.1 | +1/3 |
#
# The normal costs have the mean 0.9 / 3 = 0.3, the noisy ones 1.2 / 3 = 0.4. The loss is the sum of
# the two means, **0.7**.
#
# The last column says how the loss changes when that one score rises. If the second score rises by
# 0.1, its cost falls by 0.1 and the mean of three by 0.1 / 3: the slope is −1/3. Training moves
# every score against its slope. So it lifts the two normal scores that are not there yet, lowers
# the two noisy ones, and leaves the other two alone. The score −0.2 is pulled no harder than the
# score 0.3.

# %%
margin = 0.5
normal = torch.tensor([0.8, 0.3, -0.2])
noisy = torch.tensor([-1.1, -0.4, 0.6])
six = (normal, noisy)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Cost against score. The cost of a normal score falls in a straight line and is zero from plus 0.5 on; the cost of a noisy score is its mirror image, zero up to minus 0.5. Six dots mark the scores of the table."}, "figure": {"caption": "Cost of a normal and of a noisy score. The dots are the six scores of the table.", "name": "fig-margin-toy"}}
scores = torch.linspace(-1.5, 1.5, 301)
figure, axis = plt.subplots(figsize=(6.5, 3.2))
axis.plot(scores, (margin - scores).clamp_min(0), color=NORMAL, label="normal score")
axis.plot(scores, (margin + scores).clamp_min(0), color=DEFECT, label="noisy score", ls="--")
axis.plot(normal, (margin - normal).clamp_min(0), "o", color=NORMAL)
axis.plot(noisy, (margin + noisy).clamp_min(0), "s", color=DEFECT)
for at, text in ((margin, "+m"), (-margin, "−m")):
    axis.axvline(at, color="0.6", lw=1, ls=":")
    axis.text(at + 0.03, 1.85, text)
axis.set_title("Beyond its margin a score costs nothing")
axis.set_xlabel("score")
axis.set_ylabel("cost of one score")
axis.legend(loc=(0.75, 0.2))
plt.show()

# %% [markdown]
# ## From the paper
#
# Section 3.5 of the paper calls it a truncated $\ell_1$ loss. It has two thresholds, $th^+ = 0.5$
# for normal and $th^- = -0.5$ for noisy scores. We write $m$ for the one and $-m$ for the other.
# With the scores $s_i = D_ψ(z_i)$ of $B$ normal vectors and $s'_i = D_ψ(z'_i)$ of their $B$ noisy
# copies,
#
# $$
# \begin{aligned}
# \ell = {} & \frac{1}{B} \sum_{i=1}^{B} \max(0, m - s_i) \\
# {} + {} & \frac{1}{B} \sum_{i=1}^{B} \max(0, m + s'_i).
# \end{aligned}
# $$ (eq-margin-loss)
#
# Its gradient has three values and no others:
#
# $$
# \begin{aligned}
# \frac{\partial \ell}{\partial s_i} &=
# \begin{cases} -\frac{1}{B} & s_i < m \\ 0 & s_i > m \end{cases} \\
# \frac{\partial \ell}{\partial s'_i} &=
# \begin{cases} 0 & s'_i < -m \\ +\frac{1}{B} & s'_i > -m. \end{cases}
# \end{aligned}
# $$ (eq-margin-gradient)
#
# Exactly at the margin there is a corner, where the slope is not defined. PyTorch's `relu` answers
# 0 there.
#
# A loss that many would reach for first is cross-entropy. There the score is a {term}`logit`: a
# sigmoid turns it into the probability of "normal". In terms of scores,
#
# $$
# \begin{aligned}
# \ell_\mathrm{CE} = {} & \frac{1}{B} \sum_{i=1}^{B} \log(1 + e^{-s_i}) \\
# {} + {} & \frac{1}{B} \sum_{i=1}^{B} \log(1 + e^{s'_i}).
# \end{aligned}
# $$ (eq-cross-entropy)
#
# Its slope on a normal score is $-(1 - p_i) / B$ with $p_i = 1 / (1 + e^{-s_i})$. It shrinks as the
# score rises, but it is never 0.
#
# The paper compares the two on MVTec AD: 99.6 image and 98.1 pixel {term}`AUROC` (in percent)
# with the margin loss, 99.4 and 97.8 with cross-entropy. We have these four numbers from a
# secondary source, not from the paper itself. The difference is small, and below you see how much
# you can make of such a difference with one category and three seeds.

# %% [markdown]
# ## Build it
#
# Two tensors of scores go in, `(B,)` each; one number comes out, shape `()`. Step by step, with the
# six scores of the table. The maximum of 0 and a number is what `relu` computes.

# %%
cost_normal = F.relu(margin - normal)
cost_noisy = F.relu(margin + noisy)
for name, cost in (("normal", cost_normal), ("noisy", cost_noisy)):
    print(f"{name:6} costs {[round(c, 1) for c in cost.tolist()]}, mean {cost.mean():.1f}")
print(f"loss {cost_normal.mean() + cost_noisy.mean():.1f}")

# %% [markdown]
# These are the numbers of the table. The library's function is the same in one line: each half of
# {eq}`eq-margin-loss` is a `relu` and a `mean`.


# %% tags=["library"]
def margin_loss(normal: Tensor, noisy: Tensor, margin: float = 0.5) -> Tensor:
    """Mean of max(0, m - D(z)) plus mean of max(0, m + D(z'))."""
    return F.relu(margin - normal).mean() + F.relu(margin + noisy).mean()


# %% [markdown]
# The gradient of the six scores, from `autograd`. Multiplied by $B = 3$ it should be 0, −1, −1 and
# 0, +1, +1. While we are at it, count the *share beyond the margin*: how many normal scores are
# above $+m$ and how many noisy ones below $-m$. Here it is one of three, twice.

# %%
halves = [half.clone().requires_grad_() for half in six]
loss = margin_loss(*halves)
loss.backward()
print("loss has shape", tuple(loss.shape), "and each gradient", tuple(halves[0].grad.shape))
for name, half in zip(("normal", "noisy"), halves, strict=True):
    print(f"B times the slope of {name:6} scores:", (3 * half.grad).round().int().tolist())
above, below = (normal > margin).sum(), (noisy < -margin).sum()
print(f"beyond the margin: {above} of 3 normal scores, {below} of 3 noisy scores")

# %% [markdown]
# ### Beside cross-entropy
#
# `softplus` is $\log(1 + e^x)$, so {eq}`eq-cross-entropy` is one line, too. The library has it as
# `cross_entropy_loss`: its default, a committee of several heads, is trained with it.


# %%
def cross_entropy(normal: Tensor, noisy: Tensor) -> Tensor:
    """Mean of log(1 + exp(-D(z))) plus mean of log(1 + exp(D(z')))."""
    return F.softplus(-normal).mean() + F.softplus(noisy).mean()


# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels against the score of a normal vector. Left: the margin loss falls in a straight line to zero at 0.5; cross-entropy falls in a curve and stays above zero. Right: the slope of the margin loss is minus one up to 0.5 and zero from there on; the slope of cross-entropy rises smoothly towards zero."}, "figure": {"caption": "Loss and slope of one normal score. For a noisy score, mirror both pictures left to right and turn the slope upside down.", "name": "fig-margin-slopes"}}
scores = torch.linspace(-2, 3, 500)
figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3.1), sharex=True)
left.plot(scores, F.relu(margin - scores), color="black", label="margin loss")
left.plot(scores, F.softplus(-scores), color="C4", ls="--", label="cross-entropy")
right.step(scores, -(scores < margin).float(), color="black")
right.plot(scores, torch.sigmoid(scores) - 1, color="C4", ls="--")
for axis in (left, right):
    axis.axvline(margin, color="0.6", lw=1, ls=":")
    axis.set_xlabel("score of a normal vector")
left.text(margin + 0.08, 1.1, "+m")
left.legend(loc="upper right")
left.set_ylabel("loss")
right.set_ylabel("slope of the loss")
left.set_title("Both losses ask for a high score ...")
right.set_title("... but only one stops asking")
plt.show()

# %% [markdown]
# The smallest possible training shows what never stopping means. One weight $w$ is everything: the
# normal vector scores $w$, the noisy one $-w$. With learning rate 0.1 the margin loss moves it to 0,
# 0.2, 0.4, 0.6, and there it stays. With cross-entropy it is 0.8 after 10 steps, 2.9 after 100 and 5.3
# after 1,000: every tenfold number of steps adds about 2.3, the logarithm of 10. The two scores can
# always be told apart, so the loss has no minimum.
#
# ### What the losses estimate
#
# Real normal and noisy vectors overlap, and then both losses have a best discriminator. Let $p$ be the
# density of normal vectors and $p'$ that of noisy ones. At a point $z$ cross-entropy is
# $p \log(1 + e^{-s}) + p' \log(1 + e^{s})$, and its slope vanishes at
#
# $$s = \log \frac{p(z)}{p'(z)}$$ (eq-margin-ratio)
#
# This is noise-contrastive estimation {cite:p}`gutmann2010nce`: the score is chapter 4's
# {term}`density ratio`, and ranks points by how normal they are. The margin loss,
# $p \max(0, m - s) + p' \max(0, m + s)$, consists of straight pieces. Its minimum lies in a corner, at
# $+m$ where $p > p'$ and at $-m$ elsewhere {cite:p}`bartlett2006convexity`. So its best discriminator
# says on which side a point lies, and not how far inside. {term}`AUROC` is all about ranking: in theory
# cross-entropy is the better loss for it.
#
# See both on a line. Normal values have standard deviation 1, noisy ones 2. Their densities are equal
# where $|z| = 1.36$. A small discriminator, trained long with each loss:

# %%
LOSSES = {"margin loss": margin_loss, "cross-entropy": cross_entropy}
line = torch.linspace(-4, 4, 161)[:, None]
learned = {}
for name, loss_function in LOSSES.items():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    network = Discriminator(1, 64)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(1500):
        values = torch.randn(2, 1024, 1, generator=generator)
        loss_of_batch = loss_function(network(values[0]), network(2 * values[1]))
        optimizer.zero_grad()
        loss_of_batch.backward()
        optimizer.step()
    learned[name] = network(line).detach()
ratio = math.log(2) - 3 / 8 * line[:, 0].square()  # log of the ratio of the two densities

# %% tags=["hide-input"] mystnb={"image": {"alt": "Score against z from minus 4 to 4. Cross-entropy follows the dotted parabola of the log density ratio. The margin loss is nearly flat at plus 0.5 in the middle and falls to near minus 0.5 outside, in a soft step around 1.36 on either side."}, "figure": {"caption": "What two discriminators learn on a line. Dotted: the logarithm of the density ratio. Grey: where it is zero.", "name": "fig-margin-estimates"}}
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.plot(line, ratio, color="0.5", ls=":", lw=2.5, label="log p/p′")
axis.plot(line, learned["cross-entropy"], color="C4", ls="--", label="cross-entropy")
axis.plot(line, learned["margin loss"], color="black", label="margin loss")
for at in (-1.36, 1.36):
    axis.axvline(at, color="0.85", lw=1, zorder=0)
axis.set(title="A density ratio, and a step", xlabel="z", ylabel="score", ylim=(-5.5, 1.5))
axis.legend(loc="lower center")
plt.show()

# %% tags=["hide-input"]
near = line[:, 0].abs() < 3
assert (learned["cross-entropy"] - ratio)[near].abs().max() < 0.5
assert (learned["margin loss"][near].abs() < 0.8).all()

# %% [markdown]
# A network that has not reached the step ranks by what it has not learned perfectly, and that can be
# good enough. The library's default uses cross-entropy; the report's system and this chapter use the
# margin loss.
#
# ## Check it
#
# The loss against numbers worked by hand and against a loop in plain Python; its gradient against
# {eq}`eq-margin-gradient` and against finite differences, which move one score a little and look at
# the loss; cross-entropy against PyTorch's own. PyTorch averages over both halves together, so ours
# is twice as large.

# %% tags=["hide-input"]
assert abs(loss.item() - 0.7) < 1e-6

generator = torch.Generator().manual_seed(0)
many = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
many_noisy = torch.randn(50, generator=generator, dtype=torch.float64, requires_grad=True)
by_loop = sum(max(0.0, 0.5 - s) for s in many.tolist()) / 50
by_loop += sum(max(0.0, 0.5 + s) for s in many_noisy.tolist()) / 50
value = margin_loss(many, many_noisy)
assert abs(value.item() - by_loop) < 1e-12

slopes, slopes_noisy = torch.autograd.grad(value, (many, many_noisy))
assert torch.equal(slopes, -(many < 0.5).double() / 50)
assert torch.equal(slopes_noisy, (many_noisy > -0.5).double() / 50)
corner = torch.tensor(0.5, requires_grad=True)
assert torch.autograd.grad(margin_loss(corner, -corner), corner)[0] == 0

with torch.no_grad():
    for i in range(50):
        nudge = torch.zeros(50, dtype=torch.float64)
        nudge[i] = 1e-6
        up, down = margin_loss(many + nudge, many_noisy), margin_loss(many - nudge, many_noisy)
        assert abs((up - down) / 2e-6 - slopes[i]) < 1e-6
        up, down = margin_loss(many, many_noisy + nudge), margin_loss(many, many_noisy - nudge)
        assert abs((up - down) / 2e-6 - slopes_noisy[i]) < 1e-6

logits, target = torch.cat([many, many_noisy]), torch.cat([torch.ones(50), torch.zeros(50)])
by_torch = F.binary_cross_entropy_with_logits(logits, target.double())
assert abs(cross_entropy(many, many_noisy) - 2 * by_torch) < 1e-12
assert cross_entropy(many, many_noisy) == cross_entropy_loss(many, many_noisy)
print(f"loss {value.item():.2f}, by loop {by_loop:.2f}")

# %% [markdown]
# ### The trivial solution costs 2m
#
# Suppose the discriminator ignores its input and answers the same number $c$ for everything. Every
# normal score then costs $m - c$ and every noisy one $m + c$, as long as $c$ lies between $-m$ and
# $m$. The sum is $2m$, whatever $c$ is. Beyond the margins it is more. So $2m$, here 1, is the best
# loss that a discriminator can have without looking. We call this the {term}`trivial solution`.

# %%
for constant in (-0.75, -0.5, -0.2, 0.0, 0.2, 0.5, 0.75):
    same = torch.full((8,), constant)
    costs = (
        f"margin loss {margin_loss(same, same):.2f}, cross-entropy {cross_entropy(same, same):.2f}"
    )
    print(f"the answer is always {constant:5}: {costs}")

# %% [markdown]
# With cross-entropy the best such answer costs $2 \log 2$, about 1.39, and only $c = 0$ reaches it.
#
# ## What it does
#
# Now the same comparison on real {term}`features <feature>`. We take the 60 normal images of the
# nut. The library keeps their features on disk; chapter 7 explains how. The test images are only
# there to measure.

# %% tags=["nbval-ignore-output"]
data = generate(cache_folder() / "synthetic")
transform = make_transform(256, 256)
images = AnomalyDataset(data, "nut", "train", transform)
test_images = AnomalyDataset(data, "nut", "test", transform)

CONFIG = preset("fast", **{**ONE_HEAD, "resize": 256, "crop": 256})
model = SimpleNet(CONFIG, find_weights("resnet50"))
key = model.feature_key()
features = cached_features(model.features, images, key, progress=False)
test_features = cached_features(model.features, test_images, key, progress=False)

# %%
print("training features", features.shape, "test features", test_features.shape)
labels = [sample.label for sample in test_images.samples]
print(f"{labels.count(0)} normal test images, {labels.count(1)} with a defect")
standardise = Standardise(features.shape[-1])
standardise.fit(features)

# %% [markdown]
# `Head` is the library's bundle of what you built in chapters 3 to 5: {term}`adaptor`, noise and
# {term}`discriminator`; its `normal_and_noisy` takes vectors and returns the two tensors of scores.
# Every step draws 1,024 positions from all images, standardises them
# ({term}`standardisation`, chapter 2), computes a loss and lets Adam take a step. Adapted features
# and hidden layer are 256 wide. Chapter 7 builds `Head` and a better loop.
#
# The loop keeps the loss, the two shares beyond the margin, and the gap between the mean normal and the
# mean noisy score.

# %%
POSITIONS = len(features) * 32 * 32
RATE = 1e-3


def draw_positions(count, generator, prepare=standardise):
    """Draw the features of random positions, standardised, (count, C)."""
    index = torch.randint(POSITIONS, (count,), generator=generator)
    return prepare(torch.from_numpy(features.vectors(index.numpy())).float())


def new_head(config=CONFIG, seed=0):
    """A head with fresh parameters."""
    torch.manual_seed(seed)
    return Head(features.shape[-1], config)


def short_training(
    head, loss_function, *, optimizer=None, steps=80, batch=1024, seed=0, prepare=standardise
):
    """Train a head in place; return its history and its gaps, (steps,)."""
    if optimizer is None:
        optimizer = torch.optim.Adam(head.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(steps):
        vectors = draw_positions(batch, generator, prepare).type_as(head.adaptor.linear.weight)
        normal, noisy = head.normal_and_noisy(vectors, generator)
        loss = loss_function(normal, noisy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        with torch.no_grad():
            above, below = (normal > margin).float().mean(), (noisy < -margin).float().mean()
            rows.append(torch.stack([loss, above, below, normal.mean() - noisy.mean()]))
    head.eval()
    curves = torch.stack(rows).detach().T
    return History(*curves[:3]), curves[3]


# %% [markdown]
# To see whether a head detects defects we need one number for an image: the highest value of its
# {term}`score map`, $\max(-s)$. The {term}`AUROC` is the probability that an image with a defect
# has a higher one than a normal image. Chapter 8 builds both properly.


# %%
@torch.inference_mode()
def score_maps(head):
    """Score maps -s of all test images, (60, 32, 32)."""
    maps = []
    for start in range(0, len(test_features), 10):
        values = torch.from_numpy(test_features[start : start + 10]).float()
        maps.append(head(standardise(values)))
    return torch.cat(maps)


def image_auroc(maps):
    """Image AUROC, the highest value of a map being the image's score."""
    return roc_auc_score(labels, maps.amax(dim=(1, 2)))


# %% [markdown]
# Both losses, three seeds each. For one seed both start from the same parameters and see the same
# positions and the same noise.

# %%
heads, histories, gaps = {}, {}, {}
for name, loss_function in LOSSES.items():
    for seed in range(3):
        heads[name, seed] = new_head(seed=seed)
        histories[name, seed], gaps[name, seed] = short_training(
            heads[name, seed], loss_function, seed=seed
        )

# %% tags=["hide-input"] mystnb={"image": {"alt": "Gap between the mean normal and the mean noisy score against the training step, three lines for each loss. With cross-entropy the gap bends upwards and ends around three. With the margin loss it grows more evenly and ends about a third above the dotted line, labelled 2m."}, "figure": {"caption": "Distance between mean normal and mean noisy score. Three seeds each. The dotted line is 2m, the gap that the margin asks for.", "name": "fig-margin-gap"}}
figure, axis = plt.subplots(figsize=(6.5, 3))
for (name, seed), gap in gaps.items():
    style = {"color": "black"} if name == "margin loss" else {"color": "C4", "ls": "--"}
    axis.plot(range(1, len(gap) + 1), gap, label=name if seed == 0 else None, **style)
axis.axhline(2 * margin, color="0.6", lw=1, ls=":")
axis.text(0, 2 * margin + 0.05, "2m", color="0.4")
axis.set_title("Cross-entropy keeps pushing the scores apart")
axis.set_xlabel("training step")
axis.set_ylabel("gap of the mean scores")
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# Within these 80 steps the gap of cross-entropy grows faster and faster. That of the margin loss
# does not: fewer and fewer scores are still pulled. It does pass $2m$, because the last hard
# positions can only be moved by weights that move the easy ones, too.
#
# Score 4,096 new positions with new noise, and the test images:


# %%
@torch.inference_mode()
def new_scores(head, seed=1000):
    """Score 4,096 positions and their noisy copies with a trained head."""
    generator = torch.Generator().manual_seed(seed)
    return head.normal_and_noisy(draw_positions(4096, generator), generator)


# %% tags=["nbval-ignore-output"]
final_scores = {run: new_scores(head) for run, head in heads.items()}
aurocs = {run: image_auroc(score_maps(head)) for run, head in heads.items()}
for name, seed in heads:
    run = name, seed
    print(f"{name:13} seed {seed}: gap {gaps[run][-1]:.2f}, image AUROC {aurocs[run]:.3f}")
ahead = torch.tensor([aurocs["cross-entropy", s] - aurocs["margin loss", s] for s in range(3)])
error = ahead.std() / 3**0.5
print(f"cross-entropy ahead by {ahead.mean():.3f} ± {error:.3f} (standard error of three pairs)")

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two histograms of scores. With the margin loss normal and noisy scores form two humps near the margins, each partly inside its own. With cross-entropy the humps are wider, lie about twice as far apart and almost entirely beyond the margins."}, "figure": {"caption": "Scores of 4,096 new normal positions and of their noisy copies, seed 0. The dotted lines are the margins.", "name": "fig-margin-histograms"}}
figure, axes = plt.subplots(1, 2, figsize=(6.8, 3), sharex=True, sharey=True)
titles = ("Margin loss: around the margins", "Cross-entropy: as far as it gets")
for axis, name, title in zip(axes, LOSSES, titles, strict=True):
    for values, colour, label in zip(
        final_scores[name, 0], (NORMAL, DEFECT), ("normal", "noisy"), strict=True
    ):
        axis.hist(
            values.numpy(),
            bins=np.linspace(-3.5, 3.5, 71),
            histtype="stepfilled",
            color=colour,
            alpha=0.7,
            label=label,
        )
    for at in (-margin, margin):
        axis.axvline(at, color="0.3", lw=1, ls=":")
    axis.set_title(title)
    axis.set_xlabel("score")
axes[0].set_ylabel("positions")
axes[0].legend(loc="upper right")
plt.show()

# %% tags=["hide-input"]
for seed in range(3):
    assert gaps["cross-entropy", seed][-1] > 1.5 * gaps["margin loss", seed][-1]
    assert min(aurocs["margin loss", seed], aurocs["cross-entropy", seed]) > 0.8

# %% [markdown]
# How the losses *behave* differs as the formulas say, in every seed. How well the heads *detect* three
# seeds on one category cannot decide: the standard error is as large as the difference.
#
# Why the margin loss, then? Its curve can be read, because you know what a good and a trivial training
# cost. It stops pulling at the margin, but it bounds nothing: scores beyond $\pm m$ are free to grow.
#
# ### The share beyond the margin
#
# A loss of 0.3 can be many scores that lack a little or few that lack a lot. The two shares that
# `History` keeps tell these apart: normal scores above $+m$, noisy scores below $-m$. What is
# missing to 1 is the share still inside the margin or on the wrong side, and only that share is
# pulled.

# %% mystnb={"image": {"alt": "Two panels against the training step. Left: after a jump in the first steps the margin loss falls from about one towards zero. Right: the shares of normal scores above plus m and of noisy scores below minus m jump in the first steps, return to near zero and then rise to well above a half."}, "figure": {"caption": "One training with the margin loss, seed 0: the loss and the two shares beyond the margin.", "name": "fig-margin-shares"}}
healthy = histories["margin loss", 0]
figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3), sharex=True)
left.plot(healthy.loss, color="black")
left.axhline(2 * margin, color="0.6", lw=1, ls=":")
left.text(30, 2 * margin + 0.02, "2m: trivial solution")
right.plot(healthy.normal, color=NORMAL, label="normal above +m")
right.plot(healthy.noisy, color=DEFECT, ls="--", label="noisy below −m")
left.set(
    title="The loss leaves 2m ...", xlabel="training step", ylabel="margin loss", ylim=(0, None)
)
right.set(title="... and the shares leave 0", xlabel="training step", ylim=(0, 1))
right.set_ylabel("share beyond the margin")
right.legend(loc="upper left")
plt.show()

# %% [markdown]
# ### The margin only sets the unit
#
# Double the six scores of the table and double the margin: every cost doubles, 0.7 becomes 1.4, and
# who is beyond the margin stays the same. The last layer of the discriminator has no bias, so doubling
# its weights doubles all scores. A margin of 5 with a tenfold last layer, learning rate of the last layer
# and `eps` of Adam is therefore the same training in another unit, as long as there is no weight decay.
# If you change nothing but the margin, you ask an unchanged network for ten times the scores, and after
# the same number of steps it has got less far.

# %%
print(f"doubled: loss {margin_loss(2 * six[0], 2 * six[1], margin=1.0):.1f}")

# %% [markdown]
# ## What can go wrong
#
# ### Stuck at the trivial solution
#
# Take the noise of the published setting, $σ = 0.015$, on features that are not standardised, and
# no {term}`BatchNorm`. Chapter 4 showed how little such noise changes these vectors. To the
# discriminator $z$ and $z'$ are the same thing twice.

# %%
STUCK = replace(CONFIG, sigma=0.015, batchnorm=False)
unchanged = Standardise(features.shape[-1])  # never fitted: features pass as they are
stuck, _ = short_training(new_head(STUCK), margin_loss, prepare=unchanged)

# %% tags=["hide-input"] mystnb={"image": {"alt": "Two panels against the training step. Left: the loss of the stuck training swings above 1 in the first steps and then runs along 2m = 1, while the healthy one falls towards zero. Right: in the stuck training the shares jump between 0 and 1 in the first steps and then both lie at or very near 0."}, "figure": {"caption": "A training with noise that is far too small (left black, right both lines), and the healthy one of above (grey).", "name": "fig-margin-stuck"}}
figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3), sharex=True)
left.plot(healthy.loss, color="0.7", label="healthy")
left.plot(stuck.loss, color="black", label="stuck")
left.set(title="Stuck: the loss ends at 2m = 1 ...", xlabel="training step", ylabel="margin loss")
left.set_ylim(0, 2.2)
left.legend(loc="upper right")
right.plot(stuck.normal, color=NORMAL, label="normal above +m")
right.plot(stuck.noisy, color=DEFECT, ls="--", label="noisy below −m")
right.set(title="... and both shares at 0", xlabel="training step", ylim=(-0.03, 1.03))
right.set_ylabel("share beyond the margin")
right.legend(loc="upper right")
plt.show()

# %%
print(f"mean loss of the last 20 steps: {stuck.loss[-20:].mean():.1f}")

# %% tags=["hide-input"]
assert (stuck.loss[-20:].mean() - 1).abs() < 0.04
assert (stuck.normal + stuck.noisy)[-20:].mean() < 0.3
assert torch.minimum(stuck.normal, stuck.noisy).max() < 0.4

# %% [markdown]
# Nothing fails, and a flat curve may look like a finished training. Two signs tell you: the loss is
# $2m$, and both shares are at 0. In the first steps all scores swing up and down together: one
# share or the other jumps up, never both, and the loss is above $2m$. Then the swing dies out where
# it is cheapest, and the cheapest answer without looking costs $2m$.
#
# Why does it not get away? Noise leads to $z + ε$ as often as to $z - ε$, so a slope of $D$ adds nothing
# on average. What is left is its curvature: $E[D(z + ε)] - D(z) \approx \frac{σ^2}{2} \, \text{tr} H$,
# with $H$ the second derivatives of $D$ at $z$. That is quadratic in σ: from 0.5 to 0.015 it becomes
# $(0.5 / 0.015)^2 \approx 1100$ times weaker. A linear layer, without curvature, gets nothing at all
# (chapter 5), and LeakyReLU is bent only at its kink: what counts is how often noise carries a unit
# across it. Measure how much noise raises the mean of the hidden units of an untrained discriminator:


# %%
@torch.no_grad()
def mean_rise(sigma):
    """Rise of the mean activation under noise; z + ε and z - ε, so that slopes cancel exactly."""
    torch.manual_seed(0)
    network = Discriminator(256, 256)
    vectors = torch.randn(4096, 256)
    noise = sigma * torch.randn(16, 4096, 256, generator=torch.Generator().manual_seed(0))
    before, plus, minus = (
        network.activation(network.hidden(moved)).mean()
        for moved in (vectors, vectors + noise, vectors - noise)
    )
    return ((plus + minus) / 2 - before).item()


rises = {sigma: mean_rise(sigma) for sigma in (0.5, 0.25, 0.125)}
for sigma, rise in rises.items():
    print(f"σ = {sigma:5}: {rise:.4f}")

# %% tags=["hide-input"]
assert 3.5 < rises[0.5] / rises[0.25] < 4.2 and 3.5 < rises[0.25] / rises[0.125] < 4.5

# %% [markdown]
# Half the noise leaves a quarter of the signal.
#
# ### Normal and noisy swapped
#
# The two arguments of `margin_loss` look alike. Swap them and the loss falls as it should: the head
# learns to tell the two apart, with the opposite sign. Measure it at single positions: a position
# counts as defective if the {term}`mask` of a defect touches it.

# %%
swapped_head = new_head()
swapped, _ = short_training(swapped_head, lambda normal, noisy: margin_loss(noisy, normal))

# %% tags=["nbval-ignore-output"]
masks = torch.stack([test_images[i]["mask"].float() for i in range(len(test_images))])
touched = F.adaptive_max_pool2d(masks[:, None], 32)[:, 0]  # (60, 32, 32)
right_maps, swapped_maps = score_maps(heads["margin loss", 0]), score_maps(swapped_head)
position_aurocs = {
    name: roc_auc_score(touched.flatten(), maps.flatten())
    for name, maps in (("right", right_maps), ("negated", -right_maps), ("swapped", swapped_maps))
}
swapped_auroc = image_auroc(swapped_maps)
print(f"loss at the end:   right {healthy.loss[-1]:.2f}, swapped {swapped.loss[-1]:.2f}")
print("AUROC, positions: ", ", ".join(f"{n} {v:.3f}" for n, v in position_aurocs.items()))
print(f"AUROC, images:     right {image_auroc(right_maps):.3f}, swapped {swapped_auroc:.3f}")

# %% tags=["hide-input"]
assert abs(position_aurocs["right"] + position_aurocs["negated"] - 1) < 1e-6
assert position_aurocs["right"] > 0.8 and position_aurocs["swapped"] < 0.2
assert swapped.loss[-1] < 0.4 and swapped_auroc < 0.6
assert swapped.normal[-1] < 0.05 and swapped.noisy[-1] < 0.05

# %% [markdown]
# Negated maps turn the AUROC of positions into exactly 1 minus what it was, and the swapped training
# comes near that. So an AUROC near 0 hints at a wrong sign. One somewhat below 0.5 need not: a detector
# that has learned nothing lands there by chance half of the time. The image AUROC says less still, since
# the maximum of a negated map lies on the most normal position. The two shares give the mistake away
# without any test image: they stay at 0 although the loss falls.
#
# ### Sum instead of mean
#
# With sums in place of means the loss grows with the batch: you can no longer read $2m$ off the curve,
# and with plain gradient descent a learning rate that is right for the mean is $B$ times too large.
# (Adam divides the gradients by their size and hides the mistake.)
#
# ## Exercises
#
# :::{exercise} easy: another margin
# :label: ex-margin-one
#
# Compute the loss of the six scores by hand for $m = 1$. Which scores are beyond the margin now?
# What does the trivial solution cost? Then check with `margin_loss`.
#
# **Expected result:** normal mean 0.7, noisy mean 2.2 / 3, loss 1.43 after rounding. Only −1.1 is
# beyond the margin. The trivial solution costs 2.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Normal: 0.2, 0.7, 1.2 have the mean 0.7. Noisy: 0, 0.6, 1.6 have the mean 2.2 / 3.
with_margin_1 = margin_loss(*six, margin=1.0)
trivial = margin_loss(torch.zeros(3), torch.zeros(3), margin=1.0)
print(f"loss {with_margin_1:.2f}, trivial solution {trivial:.0f}")
print("beyond the margin:", int((six[0] > 1).sum()), "normal,", int((six[1] < -1).sum()), "noisy")
assert abs(with_margin_1.item() - (0.7 + 2.2 / 3)) < 1e-6 and trivial == 2

# %% [markdown]
# :::{exercise} medium: two thresholds
# :label: ex-margin-thresholds
#
# The paper allows two thresholds, $th^+$ and $th^-$, that need not be opposite. Write
# `two_thresholds(normal, noisy, above, below)`. What does a constant answer between them cost? Then
# shift: show that thresholds 0.9 and −0.1 give the same loss as 0.5 and −0.5 if you subtract 0.4
# from all scores first.
#
# **Expected result:** a constant answer costs $th^+ - th^-$, here 1 in both cases. The losses are
# equal: only the distance of the thresholds matters, as long as the network can shift its scores.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution


def two_thresholds(normal, noisy, above, below):
    """Truncated l1 loss with separate thresholds for normal and noisy scores."""
    return F.relu(above - normal).mean() + F.relu(noisy - below).mean()


constant = torch.full((3,), 0.3)
print(f"a constant answer costs {two_thresholds(constant, constant, 0.9, -0.1):.1f}")
shifted = two_thresholds(six[0] - 0.4, six[1] - 0.4, 0.5, -0.5)
difference = two_thresholds(*six, 0.9, -0.1) - shifted
print(f"difference after the shift: {abs(difference):.3f}")
assert abs(difference) < 1e-6
assert abs(two_thresholds(*six, 0.5, -0.5) - margin_loss(*six)) < 1e-6

# %% [markdown]
# :::{exercise} hard: the best score between two Gaussians
# :label: ex-margin-gaussians
#
# Normal values are $\mathcal{N}(0, 1)$, noisy ones $\mathcal{N}(0, 1 + σ^2)$. Derive the score that
# cross-entropy estimates, and where it is zero. Check the formula for $σ^2 = 3$ at $z = 0, 1, 2$: find
# the minimum of $p \log(1 + e^{-s}) + p' \log(1 + e^{s})$ over a grid of $s$. What does the same grid
# give for the margin loss? And what happens to both scores as $σ$ becomes small?
#
# **Expected result:** zero at $|z| = 1.36$; the grid agrees with the formula to its step.
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# log p - log p' = log(1 + σ²) / 2 - z² / 2 + z² / (2 (1 + σ²)) = log(1 + σ²) / 2 - z² σ² / (2 (1 + σ²))
grid = torch.arange(-3, 3, 0.01, dtype=torch.float64)
for z in (0.0, 1.0, 2.0):
    p, p_noisy = math.exp(-(z**2) / 2), math.exp(-(z**2) / 8) / 2
    by_formula = math.log(4) / 2 - 3 / 8 * z**2
    entropy = p * F.softplus(-grid) + p_noisy * F.softplus(grid)
    hinge = p * F.relu(margin - grid) + p_noisy * F.relu(margin + grid)
    found, corner = grid[entropy.argmin()].item(), grid[hinge.argmin()].item()
    print(f"z = {z:.0f}: formula {by_formula:.2f}, cross-entropy {found:.2f}, margin {corner:.1f}")
    assert abs(found - by_formula) < 0.01 and abs(abs(corner) - margin) < 0.01
# For small σ the formula becomes σ² (1 - z²) / 2: of size σ², but with the same order. The best score of
# the margin loss stays at +m and -m, however little there is to tell.

# %% [markdown]
# ## Quiz
#
# **1. A training with $m = 0.5$ sits at a loss of 1.00 for hundreds of steps. What has it learned,
# and what do you look at next?**
#
# <details>
# <summary>Answer</summary>
#
# Nothing: 1.00 is $2m$, the cost of one answer for everything. Look at the two shares. If both are
# at 0, the discriminator cannot tell noisy from normal vectors: the noise is too small for the
# scale of the features.
#
# </details>
#
# **2. Of two vectors one lies in the middle of the normal ones, the other barely inside. A perfectly
# trained discriminator scores both. Which scores does it give with the margin loss, and which with
# cross-entropy?**
#
# <details>
# <summary>Answer</summary>
#
# With the margin loss $+m$ for both: normal vectors are likelier than noisy ones there, and that is all
# it says. With cross-entropy the logarithm of the density ratio, high for the first and little above 0
# for the second. For a ranking you need the second kind.
#
# </details>
#
# **3. Would $m = 50$ make a detector that separates normal and defect a hundred times better?**
#
# <details>
# <summary>Answer</summary>
#
# No. Scores have no unit of their own. With a last layer and its learning rate a hundred times as large
# (and no weight decay) the training is the same and ranks all positions the same. If you change the
# margin alone, the network only has further to go.
#
# </details>
#
# ## Summary
#
# - The margin loss charges a score what it lacks to its margin, +m for normal, −m for noisy; the
#   two means are added.
# - Its slope is −1/B, 0 or +1/B: all scores inside the margin are pulled equally, all others not at
#   all. Cross-entropy pulls all of them, always.
# - Cross-entropy estimates the logarithm of the density ratio; the margin loss only its sign. On one
#   category, with 80 steps and three seeds, you cannot tell which of the two detects better.
# - A loss at 2m with both shares at 0 is the trivial solution: nothing is learned.
# - The margin sets the unit of the scores, together with the last layer's scale and learning rate.
#
# ## References
#
# - {cite:t}`gutmann2010nce`: a classifier between data and noise estimates a density ratio.
# - {cite:t}`bartlett2006convexity`: what the minimisers of classification losses are.
# - {cite:t}`liu2023simplenet`, section 3.5: the truncated $\ell_1$ loss and its two thresholds.
# - {cite:t}`cortes1995svm`: the idea of a margin, from support vector machines. Their hinge asks
#   for a score of at least 1 on the right side; ours is the same with $m$ in place of 1.
#
# ## Next
#
# All pieces are there; [Training](07_training.ipynb) puts them together into one loop.
