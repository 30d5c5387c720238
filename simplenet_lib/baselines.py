"""Chapter 10: three detectors that train no network, to compare with.

Each looks at one map at a time, (C, h, w): the normalised image itself, or its
standardised features. `fit` sees the maps of normal images, `score_map` gives
every position of a new one a number: high is anomalous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor


class PixelGaussian:
    """Squared distance from the mean of a pixel over its variance, as in chapter 1.

    Parameters
    ----------
    delta : float
        Added to every variance, so that a pixel which never changes divides by no zero.
    """

    def __init__(self, delta: float = 0.01) -> None:
        self.delta = delta

    def fit(self, maps: Sequence[Tensor]) -> None:
        """Measure mean and variance of every pixel over maps (C, h, w)."""
        stacked = torch.stack(list(maps))
        self.mean = stacked.mean(dim=0)
        self.variance = stacked.var(dim=0, correction=0)

    def score_map(self, values: Tensor) -> Tensor:
        """Score a map (C, h, w): (h, w)."""
        return ((values - self.mean).square() / (self.variance + self.delta)).mean(dim=0)


class PositionGaussian:
    """Mahalanobis distance from a Gaussian of features at every position: PaDiM's idea.

    Parameters
    ----------
    channels : int
        How many channels, drawn at random, to keep: the covariance has channels² entries.
    seed : int
        Seed of the draw.
    ridge : float
        Added to the diagonal of every covariance: there are fewer images than channels.

    References
    ----------
    Defard, Setkov, Loesch, Audigier: PaDiM, a Patch Distribution Modeling Framework for
    Anomaly Detection and Localization, ICPR workshops 2021.
    """

    def __init__(self, channels: int = 100, seed: int = 0, ridge: float = 0.01) -> None:
        self.channels, self.seed, self.ridge = channels, seed, ridge

    def fit(self, maps: Sequence[Tensor]) -> None:
        """Measure mean and covariance of every position over maps (C, h, w)."""
        generator = torch.Generator().manual_seed(self.seed)
        self.kept = torch.randperm(len(maps[0]), generator=generator)[: self.channels]
        vectors = torch.stack([values[self.kept].flatten(1).T for values in maps])  # (n, h*w, c)
        self.mean = vectors.mean(dim=0)
        centred = (vectors - self.mean).transpose(0, 1)  # (h*w, n, c)
        covariance = centred.transpose(1, 2) @ centred / (len(vectors) - 1)
        covariance.diagonal(dim1=1, dim2=2).add_(self.ridge)
        self.inverse = torch.linalg.inv(covariance)

    def score_map(self, values: Tensor) -> Tensor:
        """Score a map (C, h, w): (h, w)."""
        centred = (values[self.kept].flatten(1).T - self.mean)[:, None]  # (h*w, 1, c)
        squared = (centred @ self.inverse @ centred.transpose(1, 2)).clamp_min(0)
        distances: Tensor = squared.sqrt().view(values.shape[1:])
        return distances


class NearestNeighbour:
    """Distance to the nearest of many remembered normal vectors: PatchCore's idea.

    PatchCore picks what it remembers so that the picks cover all normal vectors; a
    random pick, as here, is simpler and needs more of them.

    Parameters
    ----------
    memory : int
        How many vectors to remember.
    seed : int
        Seed of the pick.

    References
    ----------
    Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: Towards Total Recall in Industrial
    Anomaly Detection, CVPR 2022.
    """

    def __init__(self, memory: int = 4000, seed: int = 0) -> None:
        self.memory, self.seed = memory, seed

    def fit(self, maps: Sequence[Tensor]) -> None:
        """Remember vectors of maps (C, h, w), the same number of each."""
        generator = torch.Generator().manual_seed(self.seed)
        share = -(-self.memory // len(maps))
        picked = []
        for values in maps:
            vectors = values.flatten(1).T
            picked.append(vectors[torch.randperm(len(vectors), generator=generator)[:share]])
        self.neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute")
        self.neighbours.fit(torch.cat(picked)[: self.memory].numpy())

    def score_map(self, values: Tensor) -> Tensor:
        """Score a map (C, h, w): (h, w)."""
        distances, _ = self.neighbours.kneighbors(values.flatten(1).T.contiguous().numpy())
        return torch.from_numpy(distances).view(values.shape[1:]).float()
