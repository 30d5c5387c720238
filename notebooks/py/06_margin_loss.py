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
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/simplenet-piece-by-piece/blob/main/notebooks/06_margin_loss.ipynb)
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
# You have read [The discriminator](05_discriminator.ipynb). Skim 10 minutes, read 25, work 55; runs in under a
# minute on two CPU cores, no GPU needed.

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
from torch import Tensor

from simplenet_lib import plots
from simplenet_lib.adaptor import Adaptor
from simplenet_lib.benchmark import scoreboard
from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.discriminator import Discriminator
from simplenet_lib.features import Standardise, cache_folder, cached_features
from simplenet_lib.loss import cross_entropy_loss
from simplenet_lib.model import SimpleNet
from simplenet_lib.noise import add_noise
from simplenet_lib.plots import DEFECT, NORMAL, use_book_style
from simplenet_lib.synthetic import generate
from simplenet_lib.weights import find_weights

use_book_style()

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
# The last column says how the loss changes when that one score rises. Training moves
# every score against its slope. So it lifts the two normal scores that are not there yet, lowers
# the two noisy ones, and leaves the other two alone. The score −0.2 is pulled no harder than the
# score 0.3.

# %% mystnb={"image": {"alt": "Cost against score. The cost of a normal score falls in a straight line and is zero from plus 0.5 on; the cost of a noisy score is its mirror image, zero up to minus 0.5. Six dots mark the scores of the table."}, "figure": {"caption": "Cost of a normal and of a noisy score. The dots are the six scores of the table.", "name": "fig-margin-toy"}} tags=["hide-input"]
margin = 0.5
normal = torch.tensor([0.8, 0.3, -0.2])
noisy = torch.tensor([-1.1, -0.4, 0.6])
six = (normal, noisy)
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
# Section 3.5 of the paper calls it a truncated $\ell_1$ loss. Its two thresholds, $th^+ = 0.5$ and $th^- =
# -0.5$, are $m$ and $-m$ here. With the scores $s_i = D_ψ(z_i)$ of $B$ normal vectors and $s'_i = D_ψ(z'_i)$ of
# their $B$ noisy copies,
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
# with the margin loss, 99.4 and 97.8 with cross-entropy (numbers from a secondary source).

# %% [markdown]
# ## Build it
#
# Two tensors of scores go in, `(B,)` each; one number comes out, shape `()`. The maximum of 0 and a number is
# what `relu` computes, so each half of {eq}`eq-margin-loss` is a `relu` and a `mean`.


# %% tags=["library"]
def margin_loss(normal: Tensor, noisy: Tensor, margin: float = 0.5) -> Tensor:
    """Mean of max(0, m - D(z)) plus mean of max(0, m + D(z'))."""
    return F.relu(margin - normal).mean() + F.relu(margin + noisy).mean()


# %% [markdown]
# Check the table: the costs, the loss, and the slopes from `autograd`. Multiplied by $B = 3$ these should be
# 0, −1, −1 and 0, +1, +1.

# %%
halves = [half.clone().requires_grad_() for half in six]
loss = margin_loss(*halves)
loss.backward()
costs = F.relu(margin - normal), F.relu(margin + noisy)
for name, cost, half in zip(("normal", "noisy"), costs, halves, strict=True):
    print(
        f"{name:6} costs {[round(c, 1) for c in cost.tolist()]}, mean {cost.mean():.1f};", end=" "
    )
    print(f"B times the slope {(3 * half.grad).round().int().tolist()}")
print(f"loss {loss.item():.1f}")

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
# after 1,000. The two scores can always be told apart, so the loss has no minimum.
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

# %% [markdown]
# A network that has not reached the step ranks by what it has not learned perfectly, and that can be
# good enough. The library's default uses cross-entropy, the report's system the margin loss.
#
# ## Check it
#
# The loss against a loop in plain Python, its gradient against finite differences, cross-entropy against
# PyTorch's own (which averages over both halves together: ours is twice as large).

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

near = line[:, 0].abs() < 3
assert (learned["cross-entropy"] - ratio)[near].abs().max() < 0.5
assert (learned["margin loss"][near].abs() < 0.8).all()

# %% [markdown]
# ### The trivial solution costs 2m
#
# Suppose the discriminator answers the same number $c$ for everything. Every normal score then costs $m - c$
# and every noisy one $m + c$, as long as $c$ lies between $-m$ and $m$. The sum is $2m$, whatever $c$ is. So
# $2m$, here 1, is the best loss that a discriminator can have without looking: the {term}`trivial solution`.

# %%
for constant in (-0.75, -0.5, -0.2, 0.0, 0.2, 0.5, 0.75):
    same = torch.full((8,), constant)
    costs = (
        f"margin loss {margin_loss(same, same):.2f}, cross-entropy {cross_entropy(same, same):.2f}"
    )
    print(f"the answer is always {constant:5}: {costs}")

# %% [markdown]
# ## What it does
#
# Now both losses on the vectors of chapter 5: standardised features of 20 normal nuts, adapted by an adaptor
# that stays as it was initialised, 512 long. Only the {term}`discriminator` is trained; the test images are
# only there to measure.

# %% tags=["hide-input", "nbval-ignore-output"]
data = generate(cache_folder() / "synthetic")
transform = make_transform(256, 256)
images = AnomalyDataset(data, "nut", "train", transform)
test_images = AnomalyDataset(data, "nut", "test", transform)
labels = [sample.label for sample in test_images.samples]

# One backbone setting for chapters 5 to 8; the library's default has another.
config = preset("fast", resize=256, crop=256, border="zeros", neighbourhood=1)
model = SimpleNet(config, find_weights("resnet50"))
key = model.feature_key()
features = cached_features(model.features, images, key, progress=False)
test_features = cached_features(model.features, test_images, key, progress=False)

standardise = Standardise(1536)
standardise.fit(features[:20])
torch.manual_seed(0)
adaptor = Adaptor(1536, 512)


@torch.no_grad()
def adapt(maps, prepare):
    """Frozen features (N, h, w, C) to adapted features (N, h, w, A), four images at a time."""
    parts = (torch.from_numpy(maps[at : at + 4]).float() for at in range(0, len(maps), 4))
    return torch.cat([adaptor(prepare(part)) for part in parts])


training = adapt(features[:20], standardise).flatten(0, 2)
held_out = adapt(features[20:24], standardise).flatten(0, 2)
test_adapted = adapt(test_features, standardise)


# %% [markdown]
# The loop is that of chapter 5 with the loss as an argument. It keeps four curves: the loss, the *share beyond
# the margin* of normal scores (above $+m$) and of noisy ones (below $-m$), and the gap between the mean normal
# and the mean noisy score.


# %%
def trained(loss_function, seed=0, *, sigma=0.5, batchnorm=True, vectors=training):
    """Train a discriminator on adapted vectors; return it and its curves, (4, 100)."""
    torch.manual_seed(seed)
    network = Discriminator(512, 512, batchnorm=batchnorm)
    optimizer = torch.optim.Adam(network.parameters(), lr=6e-4)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(100):
        z = vectors[torch.randint(len(vectors), (1024,), generator=generator)]
        s, s_noisy = network(torch.cat([z, add_noise(z, sigma, generator)])).chunk(2)
        loss = loss_function(s, s_noisy)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        above, below = (s > margin).float().mean(), (s_noisy < -margin).float().mean()
        rows.append([loss.item(), above, below, (s.mean() - s_noisy.mean()).item()])
    return network.eval(), torch.tensor(rows).T


@torch.no_grad()
def image_scores(network):
    """The highest value of each test image's score map -s, (60,)."""
    return -network(test_adapted).amin((1, 2))


# %% [markdown]
# Both losses, three seeds each. For one seed both start from the same parameters and see the same positions and
# noise. An image's score is the highest of its {term}`score map`, as in chapter 5.

# %% tags=["nbval-ignore-output"]
runs = {
    (name, seed): trained(loss_function, seed)
    for name, loss_function in LOSSES.items()
    for seed in range(3)
}
aurocs = {run: roc_auc_score(labels, image_scores(network)) for run, (network, _) in runs.items()}
for (name, seed), (_, curves) in runs.items():
    print(f"{name:13} seed {seed}: gap {curves[3, -1]:.2f}, AUROC {aurocs[name, seed]:.3f}")
ahead = torch.tensor([aurocs["cross-entropy", s] - aurocs["margin loss", s] for s in range(3)])
error = ahead.std() / 3**0.5
print(f"cross-entropy ahead by {ahead.mean():.3f} ± {error:.3f} (standard error of three pairs)")

# %% mystnb={"image": {"alt": "Gap between the mean normal and the mean noisy score against the training step, three lines for each loss. With cross-entropy the gap grows to nearly three. With the margin loss it grows more slowly and ends about a third above the dotted line, labelled 2m."}, "figure": {"caption": "Distance between mean normal and mean noisy score. Three seeds each. The dotted line is 2m, the gap that the margin asks for.", "name": "fig-margin-gap"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 3))
for (name, seed), (_, curves) in runs.items():
    style = {"color": "black"} if name == "margin loss" else {"color": "C4", "ls": "--"}
    axis.plot(range(1, 101), curves[3], label=name if seed == 0 else None, **style)
axis.axhline(2 * margin, color="0.6", lw=1, ls=":")
axis.text(0, 2 * margin + 0.05, "2m", color="0.4")
axis.set_title("Cross-entropy keeps pushing the scores apart")
axis.set_xlabel("training step")
axis.set_ylabel("gap of the mean scores")
axis.legend(loc="upper left")
plt.show()

# %% [markdown]
# With the margin loss fewer and fewer scores are still pulled, and the gap grows more slowly. It passes $2m$,
# probably because weights that move the last hard positions move the easy ones, too. Here are the positions of
# four new images, with new noise:

# %% mystnb={"image": {"alt": "Two histograms of scores. With the margin loss normal and noisy scores form two humps near the margins, each partly inside its own. With cross-entropy the humps are wider, lie about twice as far apart and mostly beyond the margins."}, "figure": {"caption": "Scores of 4,096 new normal positions and of their noisy copies, seed 0. The dotted lines are the margins.", "name": "fig-margin-histograms"}} tags=["hide-input"]
figure, axes = plt.subplots(1, 2, figsize=(6.8, 3), sharex=True, sharey=True)
titles = ("Margin loss: around the margins", "Cross-entropy: as far as it gets")
both = held_out, add_noise(held_out, 0.5, torch.Generator().manual_seed(9))
for axis, name, title in zip(axes, LOSSES, titles, strict=True):
    for vectors, colour, label in zip(both, (NORMAL, DEFECT), ("normal", "noisy"), strict=True):
        axis.hist(
            runs[name, 0][0](vectors).detach(),
            bins=np.linspace(-4.5, 4.5, 91),
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

# %% [markdown]
# How the losses *behave* differs as the formulas say, in every seed. How well the discriminators *detect*
# three seeds on one category cannot decide.
#
# Why the margin loss, then? Its curve can be read, because you know what a good and a trivial training
# cost.
#
# ### The margin only sets the unit
#
# Double the six scores of the table and double the margin: every cost doubles, 0.7 becomes 1.4, and
# who is beyond the margin stays the same. The last layer of the discriminator has no bias, so doubling
# its weights doubles all scores. A tenfold margin with a tenfold last layer, and ten times its learning rate and
# Adam's `eps`, is therefore the same training in another unit, as long as there is no weight decay.
# If you change nothing but the margin, you ask an unchanged network for ten times the scores.

# %% tags=["hide-input"]
assert math.isclose(margin_loss(2 * six[0], 2 * six[1], margin=1.0), 1.4, rel_tol=1e-6)
for seed in range(3):
    gaps = [runs[name, seed][1][3, -1] for name in ("cross-entropy", "margin loss")]
    assert gaps[0] > 1.5 * gaps[1] > 1.5
assert min(aurocs.values()) > 0.85

# %% [markdown]
# ## What can go wrong
#
# ### Stuck at the trivial solution
#
# Take the noise of the published setting, $σ = 0.015$, on features that are not standardised, and
# no {term}`BatchNorm`. To the discriminator $z$ and $z'$ are the same thing twice (chapter 4).

# %%
unchanged = Standardise(1536)  # never fitted: features pass as they are
raw = adapt(features[:20], unchanged).flatten(0, 2)
_, stuck = trained(margin_loss, sigma=0.015, batchnorm=False, vectors=raw)
print(f"mean loss of the last 20 steps: {stuck[0, -20:].mean():.1f}")

# %% mystnb={"image": {"alt": "Two panels against the training step. Left: the loss of the stuck training swings up in the first steps and then runs along 2m = 1, while the healthy one falls towards zero. Right: in the healthy training the shares of normal scores above plus m and of noisy scores below minus m rise to above a half; in the stuck one they jump in the first steps and then both lie at 0."}, "figure": {"caption": "A training with noise that is far too small, and the healthy one of above (pale).", "name": "fig-margin-stuck"}} tags=["hide-input"]
healthy = runs["margin loss", 0][1]
figure, (left, right) = plt.subplots(1, 2, figsize=(6.8, 3.3), sharex=True)
left.plot(healthy[0], color="0.7", label="healthy")
left.plot(stuck[0], color="black", label="stuck")
left.set(title="Stuck: the loss stays at 2m = 1 ...", xlabel="training step", ylabel="margin loss")
left.set_ylim(0, 1.9)
left.legend(loc="lower left")
for curves, strength, kind in ((healthy, 0.45, "healthy"), (stuck, 1.0, "stuck")):
    right.plot(curves[1], color=NORMAL, alpha=strength, label=f"normal above +m, {kind}")
    right.plot(curves[2], color=DEFECT, alpha=strength, ls="--", label=f"noisy below −m, {kind}")
right.set(title="... and both shares at 0", xlabel="training step", ylim=(-0.03, 1.03))
right.set_ylabel("share beyond the margin")
figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
plt.show()


# %% [markdown]
# Two signs tell you: the loss is
# $2m$, and both shares are at 0. (In the first steps one share or the other jumps up, never both.)
#
# Why does it not get away? Noise leads to $z + ε$ as often as to $z - ε$, so a slope of $D$ adds nothing
# on average. What is left is its curvature: $E[D(z + ε)] - D(z) \approx \frac{σ^2}{2} \, \text{tr} H$,
# with $H$ the second derivatives of $D$ at $z$. That is quadratic in σ: from 0.5 to 0.015 it becomes
# $(0.5 / 0.015)^2 \approx 1100$ times weaker. A linear layer, without curvature, gets nothing at all
# (chapter 5), and LeakyReLU is bent only at its kink: what counts is how often noise carries a unit
# across it. On an untrained discriminator noise raises the mean of the hidden units; half the noise leaves a
# quarter of that:


# %% tags=["hide-input"]
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

# %% [markdown]
# ### Normal and noisy swapped
#
# The two arguments of `margin_loss` look alike. Swap them and the loss falls as it should: the discriminator
# learns to tell the two apart, with the opposite sign. (A position counts as defective if the {term}`mask` of a
# defect touches it.)

# %% tags=["nbval-ignore-output"]
swapped_network, swapped = trained(lambda normal, noisy: margin_loss(noisy, normal))
masks = torch.stack([test_images[i]["mask"].float() for i in range(len(test_images))])
touched = F.adaptive_max_pool2d(masks[:, None], 32).flatten()  # 60 * 32 * 32 positions
by_position = {}
for name, network in (("right", runs["margin loss", 0][0]), ("swapped", swapped_network)):
    by_position[name] = roc_auc_score(touched, -network(test_adapted).detach().flatten())
    image = roc_auc_score(labels, image_scores(network))
    print(f"{name:7}: AUROC of positions {by_position[name]:.2f}, of images {image:.2f}")
print(f"loss {swapped[0, -1]:.2f}, both shares {swapped[1, -1]:.2f} and {swapped[2, -1]:.2f}")

# %% [markdown]
# The AUROC of positions is nearly 1 minus what it was. One near 0 hints at a wrong sign; one somewhat below 0.5
# need not: a detector that has learned nothing lands there half of the time. The two shares
# give the mistake away without any test image: they stay at 0 although the loss falls.

# %% tags=["hide-input"]
assert (stuck[0, -20:].mean() - 1).abs() < 0.04 and stuck[1:3, -20:].mean() < 0.2
assert 3.5 < rises[0.5] / rises[0.25] < 4.2 and 3.5 < rises[0.25] / rises[0.125] < 4.5
assert by_position["right"] > 0.8 and by_position["swapped"] < 0.2
assert swapped[0, -1] < 0.4 and swapped[1:3, -1].max() < 0.05

# %% [markdown]
# ## Exercises
#
# :::{exercise} easy: another margin
# :label: ex-margin-one
#
# Compute the loss of the six scores by hand for $m = 1$. Which scores are beyond the margin now?
# What does the trivial solution cost? Then check with `margin_loss`.
# :::

# %% mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true} tags=["hide-cell"]
# @title Solution
# Expected result: normal mean 0.7, noisy mean 2.2 / 3, loss 1.43. Only -1.1 is beyond the margin. The
# trivial solution costs 2.
# Normal: 0.2, 0.7, 1.2 have the mean 0.7. Noisy: 0, 0.6, 1.6 have the mean 2.2 / 3.
with_margin_1 = margin_loss(*six, margin=1.0)
trivial = margin_loss(torch.zeros(3), torch.zeros(3), margin=1.0)
print(f"loss {with_margin_1:.2f}, trivial solution {trivial:.0f}")
print("beyond the margin:", int((six[0] > 1).sum()), "normal,", int((six[1] < -1).sum()), "noisy")
assert abs(with_margin_1.item() - (0.7 + 2.2 / 3)) < 1e-6 and trivial == 2

# %% [markdown]
# :::{exercise} medium: charge the square
# :label: ex-margin-square
#
# Square what each score lacks: the mean of $\max(0, m - s)^2$ plus the mean of $\max(0, m + s')^2$. Which score
# is best at a point with densities $p$ and $p'$? Does it rank points, or is it a step? Train with it for the
# three seeds of this chapter, and say where it would stand on the scoreboard below.
# :::

# %% mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true} tags=["hide-cell", "nbval-ignore-output"]
# @title Solution
# Expected result: s = m (p - p') / (p + p'), which ranks as the density ratio does. Its row lies within 0.03
# of the others: three seeds cannot tell the losses apart.
# Between the margins the slope of p (m - s)^2 + p' (m + s)^2 is -2 p (m - s) + 2 p' (m + s).


def squared_margin_loss(normal, noisy):
    """Mean of max(0, m - D(z)) squared plus mean of max(0, m + D(z')) squared."""
    return F.relu(margin - normal).square().mean() + F.relu(margin + noisy).square().mean()


p, p_noisy = 0.3, 0.1
grid = torch.arange(-0.5, 0.5, 0.001)
costs = p * F.relu(margin - grid).square() + p_noisy * F.relu(margin + grid).square()
assert abs(grid[costs.argmin()] - margin * (p - p_noisy) / (p + p_noisy)) < 0.002
squared = [
    roc_auc_score(labels, image_scores(trained(squared_margin_loss, seed)[0])) for seed in range(3)
]
print("image AUROC with the squared loss:", np.round(squared, 3))
for name in LOSSES:
    print(f"image AUROC with {name}:", np.round([aurocs[name, seed] for seed in range(3)], 3))
assert min(squared) > 0.85

# %% [markdown]
# :::{exercise} hard: the best score between two Gaussians
# :label: ex-margin-gaussians
#
# Normal values are $\mathcal{N}(0, 1)$, noisy ones $\mathcal{N}(0, 1 + σ^2)$. Derive the score that
# cross-entropy estimates, and where it is zero. Check the formula for $σ^2 = 3$ at $z = 0, 1, 2$: find
# the minimum of $p \log(1 + e^{-s}) + p' \log(1 + e^{s})$ over a grid of $s$. What does the same grid
# give for the margin loss? And what happens to both scores as $σ$ becomes small?
# :::

# %% mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true} tags=["hide-cell"]
# @title Solution
# Expected result: zero at |z| = 1.36; the grid agrees with the formula to its step.
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
# at 0, the noise is too small for the scale of the features.
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
# With the margin loss $+m$ for both. With cross-entropy the logarithm of the density ratio, high for the
# first and little above 0 for the second.
#
# </details>
#
# **3. Would $m = 50$ make a detector that separates normal and defect a hundred times better?**
#
# <details>
# <summary>Answer</summary>
#
# No. Scores have no unit of their own. If you change the margin alone, the network only has further to go.
#
# </details>
#
# ## The scoreboard
#
# The new row is the discriminator of chapter 5, trained with cross-entropy instead of the margin loss (seed 0
# for both). The bars overlap: this test set cannot tell the two losses apart.

# %% mystnb={"image": {"alt": "Image AUROC with error bars in five rows. Pixel statistics lie a little above a half; position statistics, neighbours and the discriminator with either loss lie above 0.9, their bars overlapping."}, "figure": {"caption": "The scoreboard with both losses.", "name": "fig-margin-board"}} tags=["hide-input"]
_, board = scoreboard()
rows = {name: board[name] for name in ("pixel statistics", "position statistics", "neighbours")}
rows["discriminator alone"] = image_scores(runs["margin loss", 0][0])
rows["... with cross-entropy"] = image_scores(runs["cross-entropy", 0][0])
plots.scoreboard(rows, labels, new=["... with cross-entropy"])
plt.show()

# %% [markdown]
# ## Summary
#
# - The margin loss charges a score what it lacks to its margin, +m for normal, −m for noisy; the
#   two means are added.
# - Its slope is −1/B, 0 or +1/B: all scores inside the margin are pulled equally, all others not at
#   all. Cross-entropy pulls all of them, always.
# - Cross-entropy estimates the logarithm of the density ratio; the margin loss only its sign.
# - A loss at 2m with both shares at 0 is the trivial solution: nothing is learned.
# - The margin sets the unit of the scores.
#
# ## References
#
# - {cite:t}`gutmann2010nce`: a classifier between data and noise estimates a density ratio.
# - {cite:t}`bartlett2006convexity`: what the minimisers of classification losses are.
# - {cite:t}`liu2023simplenet`, section 3.5: the truncated $\ell_1$ loss and its two thresholds.
# - {cite:t}`cortes1995svm`: the margin of support vector machines, 1 in place of $m$.
#
# ## Next
#
# All pieces are there; [Training](07_training.ipynb) puts them together into one loop.
