# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Honest numbers
#
# This chapter measures the detector on real photos and puts the numbers beside published ones. Most
# of it is about what such a number means: which images, which state of the network, which measure,
# and how far chance alone would move it.
#
# ## What you will learn
#
# - **Report** a result with two errors: over seeds, and over test images.
# - **Compare** with published numbers, and say where no comparison is allowed.
# - **Measure** what choosing the best step on the test set adds.
# - **Estimate** how much a result owes to the few test images it comes from, also for a difference.
# - **Recognise** two measures under one name, and a number that its protocol flatters.
#
# ## Before you start
#
# You have read chapters 1 to 8. Reading takes about 25 minutes, with the exercises 50; it runs in about half a minute
# on two CPU cores, no GPU needed. The runs on real photos took longer. They come with the library as
# numbers, the score of every test image among them, without images.

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
import os
import statistics
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from IPython.display import Markdown
from scipy import ndimage
from scipy.stats import binomtest
from sklearn.metrics import auc, roc_auc_score

from simplenet_lib import plots
from simplenet_lib.benchmark import (
    PAPER,
    PUBLISHED_MEANS,
    measured_runs,
    run,
    scoreboard,
    table,
)
from simplenet_lib.config import preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.features import cache_folder, cached_features
from simplenet_lib.localization import image_score, predict
from simplenet_lib.metrics import aupro, auroc_deviation
from simplenet_lib.model import SimpleNet
from simplenet_lib.plots import gallery, use_book_style
from simplenet_lib.synthetic import generate
from simplenet_lib.training import cached_maps, train
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
# Roll a die. The mean of many rolls is 3.5. Now roll it twice and report only the better roll. Of
# the 36 pairs, one has the maximum 1, three have 2, five have 3, and so on: $2m - 1$ pairs have the
# maximum $m$. The mean of the maximum is
#
# $$
# \frac{1 \cdot 1 + 3 \cdot 2 + 5 \cdot 3 + 7 \cdot 4 + 9 \cdot 5 + 11 \cdot 6}{36}
# = \frac{161}{36} = 4.47
# $$ (eq-benchmark-dice)
#
# The die has not become better. You looked twice.
#
# The {term}`AUROC` of a training on the {term}`test set` goes up and down from step to step, partly by chance. Whoever
# measures ten times and reports the best look reports the maximum of ten rolls. {numref}`fig-benchmark-dice` shows how
# far the best of $k$ independent looks exceeds their mean.

# %%
pairs = [max(pair) for pair in product(range(1, 7), repeat=2)]
print("pairs with maximum 1 to 6:", [pairs.count(m) for m in range(1, 7)])

rng = np.random.default_rng(0)
looks = rng.standard_normal((20_000, 20))
best_of = np.maximum.accumulate(looks, axis=1).mean(axis=0)
for k in (1, 2, 10):
    print(f"best of {k:2}: {abs(best_of[k - 1]):.1f} standard deviations above the mean")

# %% mystnb={"image": {"alt": "Left, a grid of six by six squares, each with the larger number of two dice; large numbers fill the right and lower part. Right, a curve that rises steeply from 0 for one look to about 1.5 for ten looks and flattens."}, "figure": {"caption": "Left: the maximum of two dice. Right: how far the best of k independent looks lies above their mean, in standard deviations of one look (20,000 repetitions).", "name": "fig-benchmark-dice"}} tags=["hide-input"]
figure, (left, right) = plt.subplots(1, 2, figsize=(6.5, 3), width_ratios=[1, 1.4])
grid = np.reshape(pairs, (6, 6))
left.imshow(grid, cmap="viridis", vmin=-1, vmax=6.5)
for (row, column), value in np.ndenumerate(grid):
    color = "black" if value > 3 else "white"
    left.text(column, row, str(value), ha="center", va="center", fontsize=9, color=color)
left.set_xticks(range(6), range(1, 7))
left.set_yticks(range(6), range(1, 7))
left.set_xlabel("first die")
left.set_ylabel("second die")
left.set_title("Mean 4.47, not 3.5")
right.plot(range(1, 21), best_of, "o-", color="0.2", markersize=4)
right.axhline(0, color="0.6", linestyle=":")
right.set_xticks([1, 5, 10, 15, 20])
right.set_xlabel("looks k (count)")
right.set_ylabel("best look minus mean\n(standard deviations)")
right.set_title("More looks, a better best look")
plt.show()


# %% [markdown]
# So a number alone says little. You need its *protocol*: which **images**, which **state** of the network, which
# **measure**, and how many seeds and test images, for **chance**.
#
# ## From the paper
#
# Section 4 of the paper {cite:p}`liu2023simplenet` reports image AUROC and pixel AUROC for each of
# the 15 categories of {term}`MVTec AD`, and their mean:
#
# $$
# \bar{R} = \frac{1}{15} \sum_{c=1}^{15} R_c
# $$ (eq-benchmark-mean)
#
# where $R_c$ is the result on category $c$: 99.6 and 98.1. The first is in the paper's abstract; the second, and the
# categories in `PAPER`, were copied from texts that quote the paper, of which no list was kept. Look a number up
# before you quote it.
#
# The paper does not say from which state of the network they are. The [published
# code](https://github.com/DonaldRR/SimpleNet) looks at the test set after every fourth epoch and keeps the state with
# the best image AUROC, of equal ones that with the best pixel AUROC; all its metrics are those of this one state. With
# $R_k$ for the image AUROC at look $k$, it reports $\max_k R_k$, and on average
#
# $$
# \mathbb{E}\big[\max_k R_k\big] \;\ge\; \max_k \, \mathbb{E}[R_k]
# $$ (eq-benchmark-best)
#
# The left side is the mean of the better roll, 4.47, the right side any single look, 3.5.
#
# ## Build it
#
# ### One number from several seeds
#
# Take the image AUROCs 0.90, 0.96 and 0.99 of three seeds. Their mean is 95 percent. The deviations from it are
# −5, 1 and 4; their squares 25, 1 and 16 add up to 42. Divided by 2, one less than their number, that is 21, and
# the {term}`standard deviation` is $\sqrt{21} = 4.6$.


# %% tags=["library"]
def mean_and_deviation(values: Sequence[float]) -> str:
    """Shares between 0 and 1 as percent, ``"99.8 ± 0.2"``; one value has no deviation."""
    percent = [100 * value for value in values]
    if len(percent) == 1:
        return f"{percent[0]:.1f}"
    return f"{statistics.mean(percent):.1f} ± {statistics.stdev(percent):.1f}"


# %% [markdown]
# The command `simplenet benchmark --data ROOT --categories bottle,grid --seeds 0,1,2 --output results` makes such runs,
# one JSON file each, with the configuration and the score of every test image in it. Stopped and started
# again, it makes nothing twice.
#
# ### One pair at a time
#
# The scores are all you need for an image AUROC: does defect $i$ score higher than good image $j$? A table of pairs,
# 1 for yes, 0 for no, a half for a tie; the AUROC is its mean (chapter 8).
#
# How much would that mean move with *other* test images of the same kind? Draw as many good images and as many defects
# from those you have, with repetition. In the table of pairs: draw rows and columns. Repeat, and look at the spread.
# This is the {term}`bootstrap` {cite:p}`efron1993bootstrap`.


# %%
def right_order(run: dict) -> np.ndarray:
    """Does each defect score higher than each good image: (defects, good), 0, a half or 1."""
    good = np.array(list(run["scores"]["good"].values()))
    kinds = [scores for kind, scores in run["scores"].items() if kind != "good"]
    defects = np.array([score for scores in kinds for score in scores.values()])
    return (defects[:, None] > good) + 0.5 * (defects[:, None] == good)


def bootstrap(pairs: np.ndarray, draws: int = 1000, seed: int = 0) -> np.ndarray:
    """Mean of a table of pairs over redrawn test images: (draws,)."""
    rng = np.random.default_rng(seed)
    rows, columns = (rng.integers(0, n, size=(draws, n)) for n in pairs.shape)
    return np.array([pairs[np.ix_(i, j)].mean() for i, j in zip(rows, columns, strict=True)])


toy = np.array([[1.0, 1.0], [1.0, 0.0]])  # two defects, two good images, one pair wrong
zero = (bootstrap(toy, draws=20_000) == 0).mean()
print("AUROC", toy.mean(), f"and 0 in {zero:.0%} of the draws, by hand {1 / 16:.0%}")
print("three seeds:", mean_and_deviation([0.90, 0.96, 0.99]))

# %% [markdown]
# By hand: the wrong pair's row is drawn never, once or twice with probability ¼, ½, ¼, its column, too. The
# AUROC is 0 if both are drawn twice, 1 of 16 draws.
#
# ## Check it
#
# `mean_and_deviation` against NumPy, and the pairs against the AUROC that is stored in each report.

# %% tags=["hide-cell"]
rng = np.random.default_rng(0)
for count in (2, 3, 10):
    values = rng.random(count)
    middle, deviation = 100 * values.mean(), 100 * np.std(values, ddof=1)
    assert mean_and_deviation(values.tolist()) == f"{middle:.1f} ± {deviation:.1f}"
runs = [one for one in measured_runs() if one["preset"] == "fast"]
apart = max(abs(right_order(one).mean() - one["image_auroc"]) for one in runs)
assert apart < 1e-3  # stored scores are rounded to four digits
assert abs(zero - 1 / 16) < 0.01
assert sum(pairs) == 161 and abs(best_of[1] - 1 / math.sqrt(math.pi)) < 0.03
paper_means = np.array(list(PAPER.values())).mean(axis=0)
assert len(PAPER) == 15 and [round(float(mean), 1) for mean in paper_means] == [99.6, 98.1]

# %% [markdown]
# ## What it does
#
# ### What was measured
#
# The library's default, preset `fast`, on five categories with five {term}`seeds <seed>` each, at the last
# step:
#
# | category | trained on | tested on | comparable with the paper |
# |---|---|---|---|
# | bottle, screw | 209 and 320 good photos | 20 and 41 good, 63 and 119 defects | yes: official splits, reduced to 448 pixels |
# | grid | 243 good photos | 21 good, 57 defects | **no**: 21 training photos stand in for the good test photos |
# | weld | 29 good photos | 35 good, 93 defects | **no**: another data set |
# | kolektorsdd | its good photos, split by object | 97 good, 50 defects | **no**: another data set |

# %% tags=["hide-input", "nbval-ignore-output"]
Markdown(table(runs))

# %% [markdown]
# The first ± is the standard deviation *over seeds*: what if the same detector were trained again? The second is the
# one *over test images*: what if it were tested on others? (For image AUROC by the formula of Hanley and McNeil, below;
# for the pixel metrics by a bootstrap.) Wherever there is anything left to gain, the second is the larger one. Papers
# print the first.
#
# *Pixel AUROC* is near 90 or above everywhere, AUPRO is not: nearly all pixels are easy background (chapter 8). And
# *defects found* is the verdict at the model's own threshold, which comes from good photos: among the 29 of weld a
# few odd ones set it so high that almost no defect passes. F1-max, which many papers print, chooses its threshold on
# the test set instead:

# %% tags=["hide-input", "nbval-ignore-output"]
print("F1, mean over seeds    best threshold on the test set   the model's own")
for category in dict.fromkeys(one["category"] for one in runs):
    group = [one for one in runs if one["category"] == category]
    own = []
    for one in group:
        good, defects = right_order(one).shape[1], right_order(one).shape[0]
        found, alarms = one["detection_rate"] * defects, one["false_alarm_rate"] * good
        own.append(2 * found / (2 * found + alarms + defects - found))
    best = statistics.mean(one["image_f1max"] for one in group)
    print(f"{category:23}{best:30.2f}{statistics.mean(own):18.2f}")

# %% [markdown]
# ### Beside the published numbers
#
# Only rows where the images are the same may be compared: two of 15.

# %% tags=["hide-input", "nbval-ignore-output"]
print(f"{'':8}{'paper: image / pixel':>24}{'fast: image / pixel AUROC, ± over seeds':>44}")
for category in ("bottle", "screw"):
    group = [one for one in runs if one["category"] == category]
    ours = [
        mean_and_deviation([one[key] for one in group]) for key in ("image_auroc", "pixel_auroc")
    ]
    image, pixel = PAPER[category]
    print(f"{category:8}{f'{image:.1f} / {pixel:.1f}':>24}{' / '.join(ours):>44}")
print("\nmeans over the 15 categories, as published:")
for name, (image, pixel, state) in PUBLISHED_MEANS.items():
    print(f"{image:.1f} / {pixel:.1f}  {name}: {state}")


# %% [markdown]
# Even here the protocols differ: best look against last look, and our default was chosen with an eye on these sets,
# too. SuperSimpleNet {cite:p}`rolih2024supersimplenet` builds on SimpleNet and reports the last epoch. Its authors also
# trained SimpleNet again, with five seeds and without the choice of the best epoch; their paper's table 3 has all
# categories. For carpet, they answer [in their repository](https://github.com/blaz-r/SuperSimpleNet/issues/6), that
# makes an image AUROC of 97.8 instead of 99.7. (The question had been raised [in SimpleNet's
# own](https://github.com/DonaldRR/SimpleNet/issues/7).)
#
# ## Two protocols
#
# What would the published protocol have added to *our* numbers? For bottle, grid and weld, with three
# seeds each, one head was trained with twice its steps and measured on the test set every 20
# steps: ten looks. The *honest* number is the last look, fixed before anyone looked. The
# *published* rule takes the look with the best image AUROC, of equal ones that with the best pixel AUROC, and
# reports all metrics there.


# %%
def curve(training: dict, key: str) -> np.ndarray:
    """One metric over the looks of a training: (looks,)."""
    return np.array([look[key] for look in training["steps"]])


def published_look(training: dict) -> int:
    """The look that the published rule keeps; only image AUROC chooses."""
    image, pixel = curve(training, "image_auroc"), curve(training, "pixel_auroc")
    return max(range(len(image)), key=lambda k: (image[k], pixel[k]))


# %% tags=["hide-input"]
trainings = measured_runs("first_steps")
sets = ("bottle", "grid", "weld")
MEASURES = {"image_auroc": "image AUROC", "pixel_auroc": "pixel AUROC", "aupro": "AUPRO"}
print("published look minus last look, points: each seed, and the mean")
for key, name in MEASURES.items():
    for category in sets:
        gains = [
            100 * (curve(training, key)[published_look(training)] - curve(training, key)[-1])
            for training in trainings
            if training["category"] == category
        ]
        each = "".join(f"{gain:8.2f}" for gain in gains)
        print(f"{name:13}{category:8}{each}{statistics.mean(gains):10.2f}")
equal = sum(curve(t, "image_auroc")[-1] == curve(t, "image_auroc").max() for t in trainings)
assert equal == 4
for training in trainings:
    assert [look["step"] for look in training["steps"]] == list(range(20, 201, 20))

# %% mystnb={"image": {"alt": "Three panels, bottle, grid and weld, with image AUROC over the training steps 20 to 200, one line a seed. Each line goes up and down; a star marks the look that the published rule keeps, a circle the last point."}, "figure": {"caption": "Image AUROC on the test set during training, one line a seed. Star: the look the published rule keeps. Circle: the last look. The vertical axes differ.", "name": "fig-benchmark-steps"}} tags=["hide-input"]
figure, axes = plt.subplots(1, 3, figsize=(7.5, 3))
for axis, category in zip(axes, sets, strict=True):
    for training in (t for t in trainings if t["category"] == category):
        steps, values = curve(training, "step"), 100 * curve(training, "image_auroc")
        (line,) = axis.plot(steps, values, linewidth=1)
        best = published_look(training)
        axis.plot(steps[best], values[best], "*", color=line.get_color(), markersize=11)
        axis.plot(steps[-1], values[-1], "o", color=line.get_color(), markersize=6)
    axis.set_title(category)
    axis.set_xticks([0, 100, 200])
    axis.set_xlabel("step")
axes[0].set_ylabel("image AUROC (percent)")
figure.suptitle("The rule gains on weld, where the curves still move", fontsize=12)
plt.show()

# %% [markdown]
# In image AUROC, the measure that chooses, the rule can only gain: 1.3 points on weld. In 4 of 9 trainings the last
# look is as good as the best one.
#
# In the other measures it gains only where they choose: on bottle, where image AUROCs tie and pixel AUROC
# decides, 0.2 points. On weld the kept state has a lower pixel AUROC than the last step on average, with one seed by
# more than 4 points, and an AUPRO lower by up to 14. The step that was lucky in ranking the images is just some step
# for localisation. That is how you recognise luck: where it was not asked to choose, it is gone.
#
# ## How many test images?
#
# ### One pair
#
# The test set of bottle has 20 good images and 63 defects, so its image AUROC counts
# $20 \cdot 63 = 1260$ pairs. One pair in the wrong order costs $1/1260$, 0.08 percent. 99.8 against 100.0 is a
# difference of two or three pairs: one good image that scores higher than the faintest defects.
#
# ### Real scores, drawn again
#
# Now draw the test images of the measured runs again, seed 0 of each. Beside it, an old formula
# {cite:p}`hanley1982auc` that estimates the same spread from the AUROC $R$ and the numbers of images alone:
#
# $$
# \text{SE}^2 = \frac{R(1 - R) + (n_d - 1)\big(\tfrac{R}{2 - R} - R^2\big)
# + (n_g - 1)\big(\tfrac{2R^2}{1 + R} - R^2\big)}{n_d \, n_g}
# $$ (eq-benchmark-se)

# %% tags=["nbval-ignore-output"]
print("seed 0       image AUROC   95% of the draws   deviation: bootstrap, formula, over seeds")
drawn = {}
for one in (one for one in runs if one["seed"] == 0):
    category, order = one["category"], right_order(one)
    drawn[category] = bootstrap(order)
    low, high = np.quantile(drawn[category], (0.025, 0.975))
    formula = auroc_deviation(order.mean(), order.shape[1], order.shape[0])
    seeds = statistics.stdev(r["image_auroc"] for r in runs if r["category"] == category)
    spreads = f"{drawn[category].std():.3f}     {formula:.3f}     {seeds:.3f}"
    print(f"{category:12}{order.mean():12.3f}   {low:.3f} to {high:.3f}      {spreads:>34}")

# %% mystnb={"image": {"alt": "Histogram of image AUROC on screw over 1,000 draws of the test images, spread over about ten percent with a tail to the left. A solid line marks the measured value, two dashed lines the middle 95 percent, and five short ticks at the bottom, the five seeds, lie close together."}, "figure": {"caption": "Image AUROC of one detector (screw, seed 0) on 1,000 draws of its 160 test images. Solid: measured. Dashed: the middle 95% of the draws. Ticks: the five seeds.", "name": "fig-benchmark-bootstrap"}} tags=["hide-input"]
figure, axis = plt.subplots(figsize=(6.5, 3))
axis.hist(100 * drawn["screw"], bins=40, color="0.75")
screw = [one for one in runs if one["category"] == "screw"]
axis.axvline(100 * screw[0]["image_auroc"], color="black")
for edge in np.quantile(100 * drawn["screw"], (0.025, 0.975)):
    axis.axvline(edge, color="black", linestyle="--", linewidth=1)
axis.plot(
    [100 * one["image_auroc"] for one in screw], [2] * len(screw), "|", color="C3", ms=14, mew=2
)
axis.set_xlabel("image AUROC (percent)")
axis.set_ylabel("draws (count)")
axis.set_title("Other test images move the number more than other seeds")
plt.show()


# %% [markdown]
# The formula assumes smooth distributions of scores, and on screw it is too small: there more than a quarter of all
# wrong pairs hang on one good image, with a bright speck, that scores high, and a draw has it twice or not at all.
#
# ### A difference between two detectors
#
# Is `fast` better on weld than `course`, the course report's system? Subtract the two tables of pairs,
# image by image, and draw *that*: an image that is hard for both then cancels.


# %% tags=["nbval-ignore-output"]
def difference(run: dict, other: dict) -> tuple[float, float, float]:
    """Points of image AUROC by which a run is ahead, and the middle 95% of the draws."""
    assert list(run["scores"]["good"]) == list(other["scores"]["good"])  # the same images
    pairs = 100 * (right_order(run) - right_order(other))
    low, high = np.quantile(bootstrap(pairs), (0.025, 0.975))
    return pairs.mean(), low, high


first = {(one["category"], one["preset"]): one for one in measured_runs() if one["seed"] == 0}
gain, low, high = difference(first["weld", "fast"], first["weld", "course"])
print(f"fast minus course on weld: {gain:+.1f} points, 95% between {low:+.1f} and {high:+.1f}")

# %% [markdown]
# If the interval includes 0, these 128 images do not decide it, whatever the spread over seeds says.
#
# Chapter 10 asked what each piece of the default is worth, with one seed each. Here is every measured variant again:
# in how many of the sets it loses and gains, and in how many of them the interval over test images excludes 0.

# %% tags=["hide-input", "nbval-ignore-output"]
today = {(one["variant"], one["category"]): one for one in measured_runs("ablation")}
print(
    "variant minus today's default, seed 0; sets below / above; * image AUROC with an interval without 0"
)
print(f"{'':28}{'image AUROC':>14}{'AUPRO':>10}   mean of image AUROC and AUPRO, points")
for variant in sorted({variant for variant, _ in today} - {"unchanged"}):
    both = [c for v, c in sorted(today) if v == variant and ("unchanged", c) in today]
    images = [difference(today[variant, c], today["unchanged", c]) for c in both]
    overlap = [100 * (today[variant, c]["aupro"] - today["unchanged", c]["aupro"]) for c in both]
    below, above = (sum(sign * gain > 0 for gain, _, _ in images) for sign in (-1, 1))
    clear = sum(low > 0 or high < 0 for _, low, high in images)
    pro = f"{sum(o < 0 for o in overlap)} / {sum(o > 0 for o in overlap)}"
    middle = statistics.mean(gain for gain, _, _ in images)
    print(
        f"{variant:28}{f'{below} / {above} {clear * chr(42):5}':>14}{pro:>10}"
        f"{middle:+14.1f}{statistics.mean(overlap):+10.1f}"
    )

# %% [markdown]
# More rows have a minus than have a star. With a handful of sets the signs cannot become rarer than coins allow (five
# of five on one side: 1 in 16). A row without a star is not a piece without worth: it is a question that these images
# do not answer.
#
# ### When nothing goes wrong
#
# A perfect result has no spread: every draw of a perfect order is perfect. The bootstrap and the
# formula then say ± 0, which cannot be true. Ask instead: with which true error rate could I still see no
# error in $n$ images? If a share $p$ of all good parts is called anomalous, 20 good images all pass
# with probability $(1 - p)^{20}$. For $p = 0.14$ that is 0.05: no false alarm in 20
# images only says that fewer than about 14 percent of good parts raise one. The rule of thumb for
# this bound is $3 / n$. The same computation for one false alarm or more is the binomial interval.

# %%
for alarms, images in ((0, 20), (2, 20), (0, 300)):
    interval = binomtest(alarms, images).proportion_ci(0.90)  # 5% on either side
    print(f"{alarms} of {images:3}: between {interval.low:.0%} and {interval.high:.0%}")
assert math.isclose(1 - 0.05 ** (1 / 20), binomtest(0, 20).proportion_ci(0.90).high)

# %% [markdown]
# ## What can go wrong
#
# ### Two measures, one name
#
# The published code prints a number it calls PRO. It *widens*: each prediction grows by two pixels to every side
# before its {term}`overlap <per-region overlap>` with the defects is measured, but not before the
# {term}`false positives <false positive rate>` are counted.
# What does that do to a map of pure noise? Let a share $f$ of the normal pixels exceed the threshold. Of the
# defect pixels the same share does, so {term}`AUPRO` is the mean of $f$ from 0 to 0.3, that is 0.15. Widened, a
# defect pixel counts as found if *any* of 25 pixels exceeds the threshold:
#
# $$
# \text{PRO}_{\text{widened}} = 1 - (1 - f)^{25}
# $$ (eq-benchmark-widened)
#
# Its mean for $f$ from 0 to 0.3 is $1 - (1 - 0.7^{26}) / (26 \cdot 0.3) = 0.87$. A detector that knows
# nothing gets 0.87. Measure it, on noise and on the maps of your detector of [chapter 7](07_training.ipynb): a pixel is
# in the widened prediction if the *maximum* of its 5 x 5 neighbourhood exceeds the threshold. The limit
# matters, too: 30% of false positives are generous, newer benchmarks stop at 5%.

# %% tags=["hide-input", "nbval-ignore-output"]
weights = find_weights("resnet50")
data = generate(cache_folder() / "synthetic")
CONFIG = preset("fast", **{**ONE_HEAD, "resize": 256, "crop": 256})
transform = make_transform(256, 256)
test = AnomalyDataset(data, "nut", "test", transform)
yours = cache_folder() / f"chapter-07-nut-{weights.digest[:8]}.safetensors"
model = SimpleNet.load(yours) if yours.is_file() else None
if model is None or model.config != CONFIG:
    model = train(AnomalyDataset(data, "nut", "train", transform), CONFIG, progress=False).model
features = cached_features(model.features, test, model.feature_key(), progress=False)
nut_maps = cached_maps(model, features, range(len(test)))
maps = list(nut_maps.numpy())
masks = [test[index]["mask"].numpy() for index in range(len(test))]
labels = np.array([sample.label for sample in test.samples])


# %% tags=["nbval-ignore-output"]
def share_above(values: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Share of the sorted values (n,) that lie above each of the levels (T,): (T,)."""
    return 1 - np.searchsorted(values, levels, side="right") / len(values)


def published_pro(
    masks: Sequence[np.ndarray], maps: Sequence[np.ndarray], widen: int = 5, thresholds: int = 200
) -> float:
    """PRO by the rules of the published code, for masks and maps (H, W) each."""
    regions = []
    for mask, scores in zip(masks, maps, strict=True):
        wide = ndimage.maximum_filter(scores, size=widen, mode="nearest")
        numbered, count = ndimage.label(mask, structure=np.ones((3, 3)))
        regions += [np.sort(wide[numbered == k]) for k in range(1, count + 1)]
    normal = np.sort(np.concatenate([s[~mask] for mask, s in zip(masks, maps, strict=True)]))

    lowest, highest = min(s.min() for s in maps), max(s.max() for s in maps)
    levels = np.linspace(lowest, highest, thresholds, endpoint=False, dtype=np.float64)
    fpr = share_above(normal, levels)
    pro = np.mean([share_above(region, levels) for region in regions], axis=0)
    kept = fpr < 0.3
    return float(auc(fpr[kept] / fpr[kept].max(), pro[kept]))


noise = list(rng.standard_normal((60, 256, 256)).astype(np.float32))
smooth = [ndimage.gaussian_filter(scores, 5, mode="constant") for scores in noise]
print(f"{'':22}AUPRO 30%   AUPRO 5%   as published")
for name, some in (("noise", noise), ("noise, smoothed by 5", smooth), ("your maps of nut", maps)):
    fair = [aupro(masks, some, limit=limit) for limit in (0.3, 0.05)]
    print(f"{name:22}{fair[0]:9.2f}{fair[1]:11.2f}{published_pro(masks, some):15.2f}")

# %% tags=["hide-cell"]
by_formula = 1 - (1 - 0.7**26) / (26 * 0.3)
assert abs(aupro(masks, noise) - 0.15) < 0.03
assert abs(published_pro(masks, noise) - by_formula) < 0.03
assert abs(published_pro(masks, noise, widen=1) - 0.15) < 0.03
assert abs(published_pro(masks, maps, widen=1) - aupro(masks, maps)) < 0.05

# %% [markdown]
# The finer the map, the larger the gift, for no merit. And from 30% to 5% your detector loses more than most
# detectors differ by. A table that holds one number in one row and another in the next compares nothing.
#
# ### A benchmark that is used up
#
# With means of 99.6, MVTec AD has a few wrong pairs left to fight about. (And a mean hides a failure: 100.0 on 14
# categories and 94.0 on the fifteenth make 99.6, too.) AUPIMO {cite:p}`bertoldo2024aupimo`, which sets
# its limit on normal images alone and gives each defective image a number of its own, still separates detectors there;
# its authors' code and anomalib have it, this library does not. Other data sets ask for more: VisA
# {cite:p}`zou2022visa` has several objects in a picture and finer defects, MVTec LOCO
# {cite:p}`bergmann2022loco` missing or misplaced parts, which no single position can see,
# MVTec AD 2 {cite:p}`hecklerkram2025mvtecad2` other light in the test set and masks that are not published, so that
# nobody can choose by them.
#
# ### Other images under the same name
#
# Our grid reaches the paper's image AUROC. It proves nothing: its good test images are
# training images of the official split that we held back. That is why grid is missing in the comparison above.
#
# ## Exercises
#
# :::{exercise} easy: how many test images?
# :label: ex-benchmark-images
#
# You expect an image AUROC of about 0.97 and want its deviation over test images to be at most half a
# point. With as many good images as defects: how many of each do you need, by {eq}`eq-benchmark-se`? And how
# many if you have only 20 good ones?
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: about 600 of each; with 20 good ones no number of defects is enough.
needed = next(n for n in range(2, 5000) if auroc_deviation(0.97, n, n) <= 0.005)
assert 550 < needed < 650
assert auroc_deviation(0.97, 20, 10**7) > 0.005
print(
    "of each:", needed, f" 20 good, ten million defects: ± {auroc_deviation(0.97, 20, 10**7):.3f}"
)


# %% [markdown]
# :::{exercise} medium: other nuts
# :label: ex-benchmark-nuts
#
# The scoreboard promises your detector an error bar over *other* test images. Test the promise:
# `generate(folder, categories=["nut"], seed=1, train=1)` draws 60 other test nuts. Score them with the same detector.
# How far does its row move, and how often would you expect it to move by more than the bar?
# :::

# %% tags=["hide-cell", "nbval-ignore-output"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: by a few thousandths to two hundredths. The difference of two test sets has a deviation of
# 1.4 bars, so one in two moves by more than a bar, and one in twenty by more than 2.8.
with tempfile.TemporaryDirectory() as folder:
    other = generate(Path(folder) / "nuts", categories=["nut"], seed=1, train=1)
    others = AnomalyDataset(other, "nut", "test", transform)
    other_scores = [one.score for one in predict(model, others, progress=False)]
for name, scores in (("these", image_score(nut_maps).numpy()), ("others", other_scores)):
    area = roc_auc_score(labels, scores)
    print(f"{name:7}{area:.3f} ± {auroc_deviation(area, 20, 40):.3f}")
assert [one.label for one in others.samples] == labels.tolist()
assert roc_auc_score(labels, other_scores) > 0.9

# %% [markdown]
# :::{exercise} hard: a smaller brush
# :label: ex-benchmark-brush
#
# Suppose the published code widened by 3 x 3 pixels only. What PRO would pure noise get? Adapt
# {eq}`eq-benchmark-widened`, take the mean over $f$ from 0 to 0.3, and check it with `noise` and
# `published_pro(..., widen=3)`. Then make the measure fair: let the false positives be counted on
# the widened prediction, too. What does noise get now?
# :::

# %% tags=["hide-cell"] mystnb={"code_prompt_show": "Show the solution", "code_prompt_hide": "Hide the solution"} cellView="form" jupyter={"source_hidden": true}
# @title Solution
# Expected result: 1 - (1 - 0.7**10) / (10 * 0.3) = 0.68; fair, 0.15 again.
small_brush = 1 - (1 - 0.7**10) / (10 * 0.3)
assert abs(published_pro(masks, list(noise), widen=3) - small_brush) < 0.03
# Fair: a map of 3 x 3 maxima is used for overlap and false positives alike.
wide_noise = [ndimage.maximum_filter(scores, size=3, mode="nearest") for scores in noise]
fair = aupro(masks, wide_noise)
assert abs(fair - 0.15) < 0.03
print(f"3 x 3: {small_brush:.2f}; fair: within 0.03 of 0.15")

# %% [markdown]
# ## Quiz
#
# **1. A paper reports 99.9 ± 0.1 on a test set of 20 good images and 60 defects, over five seeds.
# What does the ± tell you, and what not?**
#
# <details>
# <summary>Answer</summary>
#
# It tells how much the number moves when the training is repeated. How much the number would
# move on other images than these 80, it does not tell: there the bootstrap helps, or, with hardly any error to
# count, the rule $3 / n$.
#
# </details>
#
# **2. Your detector has a mean of 99.1 at the last step. A paper has 99.6, at the best epoch on the
# test set. Is the paper's method better?**
#
# <details>
# <summary>Answer</summary>
#
# You cannot tell from these two numbers. Part of the 99.6 is the maximum over many looks. Run both
# methods yourself with one protocol, several seeds, and the last step; or look for someone who has.
# Do not switch to the best step to catch up.
#
# </details>
#
# **3. The published PRO widens the prediction before it measures the overlap. Why not call that a
# tolerance for imprecise masks?**
#
# <details>
# <summary>Answer</summary>
#
# A tolerance would have to apply to both sides. Here a pixel near the defect helps the overlap, but
# the widened part is never counted as a false positive. A fair tolerance widens the prediction for both counts, or leaves a band around the mask out
# of both.
#
# </details>
#
# ## The scoreboard
#
# This chapter has changed no detector, only what you may say about them: near the top 60 nuts leave one to two
# hundredths of room.

# %% mystnb={"image": {"alt": "Five rows of dots with error bars, image AUROC on the 60 test nuts. Pixel statistics lie near 0.57; position statistics, neighbours, one head and the committee lie between 0.9 and 1, with overlapping bars. One head is drawn in colour."}, "figure": {"caption": "The book's detectors on the same 60 test nuts, \u00b1 the standard deviation over other test images. In colour: your detector of chapter 7.", "name": "fig-benchmark-scoreboard"}} tags=["hide-input"]
board_labels, rows = scoreboard()
assert board_labels == labels.tolist()
stored = roc_auc_score(labels, rows["one head"])
rows["one head"] = image_score(nut_maps).numpy()
assert abs(roc_auc_score(labels, rows["one head"]) - stored) < 0.05
plots.scoreboard(rows, labels, new=["one head"])
plt.show()

# %% [markdown]
# ## Summary
#
# - The published rule keeps the state with the best image AUROC on the test set. On our runs that adds 1.3
#   points of image AUROC on weld and takes a point of pixel AUROC away: luck, not learning.
# - A ± over seeds is not a ± over test images. The second is the larger one wherever there is anything left
#   to gain; for a difference, draw both detectors' scores together.
# - 20 good test images leave room for 14 percent false alarms behind a perfect score.
# - The published PRO gives pure noise 0.87 where AUPRO gives 0.15. State the limit, 30% or 5%, with the name.
#
# ## References
#
# - {cite:t}`liu2023simplenet`, section 4: the experiments and their tables.
# - {cite:t}`bergmann2021mvtec`: the data set, and AUPRO as it is meant.
# - {cite:t}`rolih2024supersimplenet`: a successor that reports the last epoch.
# - {cite:t}`bertoldo2024aupimo`: a stricter measure of localisation.
# - {cite:t}`zou2022visa`, {cite:t}`bergmann2022loco`, {cite:t}`hecklerkram2025mvtecad2`: harder data sets.
# - {cite:t}`efron1993bootstrap`: the bootstrap.
# - {cite:t}`hanley1982auc`: the AUROC as a share of pairs, and its standard error.
#
# ## Next
#
# [Your own photos](12_your_own_photos.ipynb) leaves the benchmarks: from a folder of good photos to
# a detector that runs at the line.
#
# ## Appendix: your own copy of MVTec AD
#
# MVTec AD is licensed CC BY-NC-SA 4.0, this book CC BY 4.0, so none of its images is shown here. If
# you have them, the next cell trains on bottle, which takes a few minutes, and shows maps. It looks
# into the folder that `MVTEC_AD` names, then into `data/mvtec_ad`, where `simplenet download` puts them.

# %% tags=["hide-cell", "nbval-ignore-output"] mystnb={"image": {"alt": "Photos of your own copy of MVTec AD in columns, with the marked defect and the anomaly map below each."}, "figure": {"caption": "Bottle from your own copy of MVTec AD, one head.", "name": "fig-benchmark-mvtec"}}
places = [Path(os.environ["MVTEC_AD"])] if "MVTEC_AD" in os.environ else []
places += [Path("../data/mvtec_ad"), Path("data/mvtec_ad")]
mvtec = next((place for place in places if (place / "bottle/train/good").is_dir()), None)
if mvtec is None:
    print("No MVTec AD on this disk. To get it, run in the repository's folder:")
    print("    simplenet download")
    print("(5.3 GB; CC BY-NC-SA 4.0: not for commercial use). The chapter goes on without it.")
else:
    result = run(mvtec, "bottle", preset("fast", **ONE_HEAD, ratio=1.0), progress=False)
    print({name: round(result.report[name], 3) for name in ("image_auroc", "pixel_auroc", "aupro")})
    shown = {prediction.sample.defect: prediction for prediction in result.predictions}
    gallery(list(shown.values()), result.trained.model.config)
    plt.show()
