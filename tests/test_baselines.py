"""The baselines against SciPy, NumPy and numbers worked by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from torch import Tensor

from simplenet_lib.baselines import NearestNeighbour, PixelGaussian, PositionGaussian


def maps(count: int, seed: int = 0) -> list[Tensor]:
    """Random maps (5, 2, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(5, 2, 3, generator=generator) for _ in range(count)]


def vectors(found: Sequence[Tensor]) -> np.ndarray:
    """All vectors of maps, (n, h*w, C)."""
    return np.stack([values.flatten(1).T.numpy() for values in found])


def test_pixel_gaussian_by_hand() -> None:
    # Chapter 1's numbers: two images of two pixels, mean (2, 5), variance (1, 0).
    baseline = PixelGaussian(delta=1.0)
    baseline.fit([torch.tensor([[[1.0, 5.0]]]), torch.tensor([[[3.0, 5.0]]])])
    assert baseline.score_map(torch.tensor([[[4.0, 5.0]]])).tolist() == [[2.0, 0.0]]
    assert baseline.score_map(torch.tensor([[[2.0, 6.0]]])).tolist() == [[0.0, 1.0]]


def test_position_gaussian_is_scipys_mahalanobis_distance() -> None:
    normal, (new,) = maps(12), maps(1, seed=1)
    baseline = PositionGaussian(channels=3, seed=5, ridge=0.1)
    baseline.fit(normal)
    assert len(set(baseline.kept.tolist())) == 3
    at = vectors([values[baseline.kept] for values in normal])  # (12, 6, 3)
    asked = vectors([new[baseline.kept]])[0]
    expected = [
        mahalanobis(
            asked[place],
            at[:, place].mean(axis=0),
            np.linalg.inv(np.cov(at[:, place].T) + 0.1 * np.eye(3)),
        )
        for place in range(6)
    ]
    assert baseline.score_map(new).flatten().tolist() == pytest.approx(expected, rel=1e-4)


def test_nearest_neighbour_is_the_smallest_of_all_distances() -> None:
    normal, (new,) = maps(4), maps(1, seed=1)
    everything = NearestNeighbour(memory=24)  # all 4 times 6 vectors
    everything.fit(normal)
    expected = cdist(vectors([new])[0], np.concatenate(vectors(normal))).min(axis=1)
    found = everything.score_map(new)
    assert found.shape == (2, 3)
    assert found.flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-4)
    for values in normal:  # what it remembers is at distance 0, up to float32
        assert everything.score_map(values).max() < 1e-2


def test_nearest_neighbour_remembers_no_more_than_asked_and_some_of_every_image() -> None:
    normal = [torch.full((5, 2, 3), float(number)) for number in range(4)]
    few = NearestNeighbour(memory=4, seed=1)
    few.fit(normal)
    for values in normal:
        assert few.score_map(values).max() == 0
    assert few.score_map(torch.full((5, 2, 3), 5.0)).flatten().tolist() == pytest.approx(
        [2 * 5**0.5] * 6
    )


@pytest.mark.parametrize("kind", [PositionGaussian, NearestNeighbour])
def test_the_same_seed_gives_the_same_scores(kind: type) -> None:
    def scores(seed: int) -> Tensor:
        baseline = kind(2, seed=seed)
        baseline.fit(maps(6))
        return baseline.score_map(maps(1, seed=1)[0])

    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(3))
