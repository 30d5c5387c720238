"""Chapter 10: three detectors that train no network, to compare with.

Each looks at one map at a time, (C, h, w): the normalised image itself, or its
standardised features. ``fit`` sees the maps of normal images, ``score_map`` gives
every position of a new one a number: high is anomalous.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from sklearn.neighbors import NearestNeighbors  # type: ignore[import-untyped, unused-ignore]
from torch import Tensor


class PixelGaussian:
    """Squared distance from the mean of a pixel over its variance, as in chapter 1.

    Parameters
    ----------
    delta : float
        Added to every variance, so that a pixel which never changes divides by no zero.

    Examples
    --------
    >>> detector = PixelGaussian(delta=1.0)
    >>> detector.fit([torch.zeros(3, 2, 2), torch.full((3, 2, 2), 2.0)])  # mean 1, variance 1
    >>> detector.score_map(torch.full((3, 2, 2), 3.0))  # (3 - 1)² / (1 + 1)
    tensor([[2., 2.],
            [2., 2.]])
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

    Examples
    --------
    >>> maps = torch.randn(50, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    >>> detector = PositionGaussian(channels=4)
    >>> detector.fit(list(maps))
    >>> bool((detector.score_map(maps[0] + 10) > detector.score_map(maps[0])).all())
    True
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


def coreset(vectors: Tensor, count: int, first: int) -> Tensor:
    """Pick vectors so that every other one has a picked one nearby: greedy k-center.

    Again and again it picks the vector that is farthest from all picked so far.
    A pick costs one pass over the vectors: the distances to the new one are
    computed, and every vector keeps the smallest distance it has seen.

    Parameters
    ----------
    vectors : Tensor
        Vectors to pick from, (n, c).
    count : int
        How many to pick, 1 to n. No vector is picked twice.
    first : int
        Index of the first pick.

    Returns
    -------
    Tensor
        Indices in the order they were picked, (count,).

    References
    ----------
    Gonzalez: Clustering to Minimize the Maximum Intercluster Distance, Theoretical
    Computer Science 38, 1985.

    Examples
    --------
    >>> coreset(torch.tensor([[0.0], [1.0], [9.0], [10.0]]), count=2, first=0)
    tensor([0, 3])
    """
    squares = torch.linalg.vecdot(vectors, vectors)
    nearest = torch.full_like(squares, torch.inf)  # squared distance to the nearest pick
    picks = [first]
    while len(picks) < count:
        newest = picks[-1]
        # |x - c|² = |x|² - 2 x·c + |c|²: one matrix-vector product for all x.
        squared = torch.addmv(squares + squares[newest], vectors, vectors[newest], alpha=-2)
        nearest = torch.minimum(nearest, squared)
        nearest[newest] = -torch.inf  # whatever rounding says, it is not picked again
        picks.append(int(nearest.argmax()))
    return torch.tensor(picks)


class PatchCore:
    """Distance to the nearest of the normal vectors that cover all others: PatchCore.

    Vectors are averages over neighbouring positions. What it remembers of them is a
    coreset: few vectors, chosen so that every other one is near to one of them. The
    choice looks at random projections of the vectors, which are shorter and keep
    distances roughly; scores use the vectors themselves. The paper also raises an
    image's score if the nearest remembered vector is itself a rare one; that is left
    out here.

    Parameters
    ----------
    share : float
        Share of all normal vectors to remember; at least one is.
    neighbourhood : int
        Odd side of the averaged neighbourhood, in positions; 1 for none, for
        instance because the maps are averaged already.
    projection : int
        Length of the projected vectors; vectors that are no longer stay as they are.
    seed : int
        Seed of the projection and of the first pick.

    Attributes
    ----------
    picks : Tensor
        Which vectors it remembers, in the order they were picked, (m,). The vectors
        of all maps are counted through, map after map and row after row.

    Raises
    ------
    ValueError
        If a parameter is out of range.

    References
    ----------
    Roth, Pemula, Zepeda, Schölkopf, Brox, Gehler: Towards Total Recall in Industrial
    Anomaly Detection, CVPR 2022.

    Examples
    --------
    >>> detector = PatchCore(share=1.0, neighbourhood=1)
    >>> detector.fit([torch.zeros(2, 2, 2)])
    >>> detector.score_map(torch.tensor([3.0, 4.0])[:, None, None].expand(2, 2, 2))
    tensor([[5., 5.],
            [5., 5.]])
    """

    def __init__(
        self, share: float = 0.01, neighbourhood: int = 3, projection: int = 128, seed: int = 0
    ) -> None:
        if not 0 < share <= 1:
            raise ValueError(f"share is {share}, not above 0 and at most 1")
        if neighbourhood < 1 or neighbourhood % 2 == 0:
            raise ValueError(f"neighbourhood is {neighbourhood}, not an odd number from 1")
        if projection < 1:
            raise ValueError(f"projection is {projection}, not at least 1")
        self.share, self.neighbourhood = share, neighbourhood
        self.projection, self.seed = projection, seed

    def vectors(self, values: Tensor) -> Tensor:
        """Average a map (C, h, w) over neighbourhoods: (h*w, C)."""
        side = self.neighbourhood
        averaged = F.avg_pool2d(
            values.float(), side, stride=1, padding=side // 2, count_include_pad=False
        )
        return averaged.flatten(1).T.contiguous()

    def fit(self, maps: Sequence[Tensor]) -> None:
        """Remember a coreset of the vectors of maps (C, h, w), all of one shape.

        It goes through the maps twice, so that only projected vectors are ever held
        all at once: first to project them, then to fetch the chosen ones.
        """
        generator = torch.Generator().manual_seed(self.seed)
        channels = len(maps[0])
        directions = torch.eye(channels)
        if channels > self.projection:
            directions = torch.randn(channels, self.projection, generator=generator)
        projected = torch.cat([self.vectors(values) @ directions for values in maps])
        projected -= projected.mean(dim=0)  # distances stay, their rounding errors shrink
        count = max(1, round(self.share * len(projected)))
        first = int(torch.randint(len(projected), (), generator=generator))
        self.picks = coreset(projected, count, first)
        picked = torch.zeros(len(projected), dtype=torch.bool)
        picked[self.picks] = True
        memory = torch.cat(
            [
                self.vectors(values)[chosen]
                for values, chosen in zip(maps, picked.view(len(maps), -1), strict=True)
            ]
        )
        self.neighbours = NearestNeighbors(n_neighbors=1, algorithm="brute")
        self.neighbours.fit(memory.numpy())

    def score_map(self, values: Tensor) -> Tensor:
        """Score a map (C, h, w): (h, w)."""
        distances, _ = self.neighbours.kneighbors(self.vectors(values).numpy())
        return torch.from_numpy(distances).view(values.shape[1:]).float()
