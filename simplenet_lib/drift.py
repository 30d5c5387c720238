"""Chapter 12: does a whole photo look like the training photos? A defect is local, drift is not.

A verdict holds for photos like those the detector was trained on. Three properties of a
photo tell whether it is one, and a local change hardly moves them: its light, its
sharpness, and its mean features.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD

LEVELS = 19  # grey levels below which 5%, 10% ... 95% of the pixels lie
FOLDS = 5
DIRECTIONS = 100
FLOOR = 0.03  # of the mean variance: what a direction without variance counts
LIGHT_MARGIN, SHARPNESS_MARGIN = 0.04, 0.15  # in natural logarithms
DISTANCE_MARGIN, QUARTER_SHARE = 1.1, 0.9
VARYING_LIGHT = math.log(1.5)  # training photos that differ by more say nothing about light


def describe(images: Tensor, outputs: Tensor) -> Tensor:
    """Describe whole photos by light, sharpness and the mean features of their quarters.

    Parameters
    ----------
    images : Tensor
        Normalised images, (N, 3, H, W).
    outputs : Tensor
        The first layer's output, (N, C, h, w).

    Returns
    -------
    Tensor
        (N, LEVELS + 1 + 4 C): logarithms of grey levels; logarithm of how much
        neighbouring pixels differ, beside pixels four apart; four quarters' means.

    Examples
    --------
    >>> describe(torch.zeros(2, 3, 32, 32), torch.zeros(2, 8, 4, 4)).shape
    torch.Size([2, 52])
    """
    mean, std = images.new_tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None]
    grey = 255 * (images * std + mean).mean(dim=1)
    shares = torch.linspace(0, 1, LEVELS + 2, device=grey.device)[1:-1]
    levels = torch.quantile(grey[:, ::3, ::3].flatten(1), shares, dim=1).T
    fine, coarse = (
        (grey[:, step:] - grey[:, :-step]).square().mean(dim=(1, 2))
        + (grey[:, :, step:] - grey[:, :, :-step]).square().mean(dim=(1, 2))
        for step in (1, 4)
    )
    sharpness = torch.log((fine + 0.01) / (coarse + 0.04))
    quarters = F.adaptive_avg_pool2d(outputs, 2).flatten(2).transpose(1, 2).flatten(1)
    return torch.cat([torch.log(levels.clamp_min(0) + 4), sharpness[:, None], quarters], dim=1)


class Gaussian(nn.Module):
    """Distance of mean features from those of the training photos.

    A Mahalanobis distance whose variances are those of the main directions and a floor
    in all others: there are fewer photos than channels.

    Parameters
    ----------
    channels : int
        Length C of the mean features.

    Examples
    --------
    >>> gaussian = Gaussian(2)
    >>> gaussian.fit(torch.randn(100, 2, generator=torch.Generator().manual_seed(0)))
    >>> near, far = gaussian(torch.tensor([[0.1, 0.1], [5.0, 5.0]]))
    >>> bool(near < far)
    True
    """

    mean: Tensor
    std: Tensor
    directions: Tensor
    weights: Tensor
    rest: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("directions", torch.zeros(DIRECTIONS, channels))
        self.register_buffer("weights", torch.ones(DIRECTIONS))
        self.register_buffer("rest", torch.ones(()))

    def fit(self, means: Tensor) -> None:
        """Measure mean features (n, C) of normal photos."""
        std = means.std(dim=0, correction=0)
        self.mean.copy_(means.mean(dim=0))
        self.std.copy_((std + 0.1 * std.mean()).clamp_min(1e-6))
        _, singular, directions = torch.linalg.svd(self._standard(means), full_matrices=False)
        variances = singular.square() / len(means)
        floor = (FLOOR * variances.mean()).clamp_min(1e-6)
        kept = min(DIRECTIONS, len(variances))
        self.directions.zero_()[:kept] = directions[:kept]
        self.rest.copy_(1 / floor)
        self.weights.copy_(self.rest)[:kept] = 1 / (variances[:kept] + floor)

    def forward(self, means: Tensor) -> Tensor:
        """Distance (...) of mean features (..., C)."""
        standard = self._standard(means)
        along = (standard @ self.directions.T).square() * (self.weights - self.rest)
        squared = along.sum(dim=-1) + self.rest * standard.square().sum(dim=-1)
        return squared.clamp_min(0).sqrt()

    def _standard(self, means: Tensor) -> Tensor:
        return (means - self.mean) / self.std


class Drift(nn.Module):
    """What training photos look like as a whole, and whether another one looks so.

    Light and sharpness may lie a little outside the range of the training photos. The
    distance of the mean features may reach what it is if one quarter of a training photo
    shows something else: so large a defect is still a defect, not another product.

    Parameters
    ----------
    channels : int
        Channels C of the first layer.

    Examples
    --------
    >>> photos = torch.rand(10, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    >>> drift = Drift(channels=4)
    >>> drift.fit(describe(photos, torch.ones(10, 4, 8, 8)))
    >>> drift(describe(torch.stack([photos[0], photos[0] - 1]), torch.ones(2, 4, 8, 8)))
    [[], ['darker']]
    """

    reference: Tensor
    light: Tensor
    sharpness: Tensor
    limit: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gaussian = Gaussian(channels)
        self.register_buffer("reference", torch.zeros(LEVELS))
        self.register_buffer("light", torch.zeros(2))
        self.register_buffer("sharpness", torch.zeros(2))
        self.register_buffer("limit", torch.zeros(()))

    def fit(self, descriptions: Tensor) -> None:
        """Measure descriptions (n, LEVELS + 1 + 4 C) of normal photos, see :func:`describe`."""
        levels, sharpness, quarters = self._split(descriptions)
        self.reference.copy_(levels.median(dim=0).values)
        light = (levels - self.reference).median(dim=1).values
        everywhere = torch.tensor([-3e38, 3e38])
        steady = light.max() - light.min() < VARYING_LIGHT
        self.light.copy_(_range(light, LIGHT_MARGIN) if steady else everywhere)
        self.sharpness.copy_(_range(sharpness, SHARPNESS_MARGIN))

        means = quarters.mean(dim=1)
        # One quarter shows what the opposite one shows: (n, 4, C).
        changed = means[:, None] + (quarters.flip(1) - quarters) / 4
        folds = torch.arange(len(means), device=means.device) % min(FOLDS, len(means))
        held_out, local = torch.zeros(2, len(means), device=means.device)
        for fold in range(int(folds.max()) + 1):
            if len(means) > 1:
                self.gaussian.fit(means[folds != fold])
            held_out[folds == fold] = self.gaussian(means[folds == fold])
            local[folds == fold] = self.gaussian(changed[folds == fold]).amin(dim=1)
        self.limit.copy_(
            torch.maximum(DISTANCE_MARGIN * held_out.max(), QUARTER_SHARE * local.median())
        )
        self.gaussian.fit(means)

    def forward(self, descriptions: Tensor) -> list[list[str]]:
        """In what way each of N photos looks unlike the training photos; mostly in none."""
        levels, sharpness, quarters = self._split(descriptions)
        light = (levels - self.reference).median(dim=1).values
        findings = {
            "darker": light < self.light[0],
            "lighter": light > self.light[1],
            "less sharp": sharpness < self.sharpness[0],
            "sharper or noisier": sharpness > self.sharpness[1],
            "another scene": self.gaussian(quarters.mean(dim=1)) > self.limit,
        }
        return [
            [reason for reason, found in findings.items() if found[photo]]
            for photo in range(len(descriptions))
        ]

    @staticmethod
    def _split(descriptions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        levels, sharpness, quarters = descriptions.split(
            [LEVELS, 1, descriptions.shape[1] - LEVELS - 1], dim=1
        )  # type: ignore[no-untyped-call]
        return levels, sharpness[:, 0], quarters.unflatten(1, (4, -1))


def _range(values: Tensor, margin: float) -> Tensor:
    """Lowest and highest value and a margin: the next photos may lie a little outside."""
    margin += 2 * float(values.max() - values.min()) / len(values)
    return torch.stack([values.min() - margin, values.max() + margin])
