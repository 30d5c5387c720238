"""The baselines against SciPy, NumPy and numbers worked by hand."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cdist, mahalanobis
from torch import Tensor

from simplenet_lib.baselines import PatchCore, PixelGaussian, PositionGaussian, coreset


def maps(count: int, seed: int = 0, shape: tuple[int, int, int] = (5, 2, 3)) -> list[Tensor]:
    """Random maps, (5, 2, 3) unless told otherwise."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator) for _ in range(count)]


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


def greedy(points: np.ndarray, count: int, first: int) -> list[int]:
    """Greedy k-center from the whole matrix of distances."""
    distances = cdist(points, points)
    picks = [first]
    while len(picks) < count:
        picks.append(int(distances[:, picks].min(axis=1).argmax()))
    return picks


def radius(points: np.ndarray, picks: Sequence[int]) -> float:
    """Distance from its nearest pick of the point that is farthest from all picks."""
    return float(cdist(points, points[picks]).min(axis=1).max())


def averaged(values: Tensor, side: int) -> np.ndarray:
    """Vectors (h*w, C) of a map, each the mean of the neighbours that are on the map."""
    _, height, width = values.shape
    reach = side // 2
    return np.array(
        [
            np.mean(
                [
                    values[:, i, j].numpy()
                    for i in range(max(row - reach, 0), min(row + reach + 1, height))
                    for j in range(max(column - reach, 0), min(column + reach + 1, width))
                ],
                axis=0,
            )
            for row in range(height)
            for column in range(width)
        ]
    )


@pytest.mark.parametrize("shift", [0.0, 30.0])
def test_coreset_is_the_greedy_loop_over_all_distances(shift: float) -> None:
    points = torch.randn(60, 7, generator=torch.Generator().manual_seed(0)) + shift
    assert coreset(points, 25, first=11).tolist() == greedy(points.double().numpy(), 25, first=11)
    assert coreset(points, 1, first=11).tolist() == [11]


def test_coreset_by_hand() -> None:
    # From 0 the farthest is 10, then 4 (4 from 0, 6 from 10), then 7 (3 from both), then 1.
    points = torch.tensor([[0.0], [1.0], [4.0], [7.0], [10.0]])
    assert coreset(points, 5, first=0).tolist() == [0, 4, 2, 3, 1]


def test_coreset_picks_no_vector_twice_even_if_all_are_equal() -> None:
    assert sorted(coreset(torch.full((9, 3), 0.1), 9, first=4).tolist()) == list(range(9))


def test_coreset_covers_better_than_a_random_pick() -> None:
    # A crowd and a few far from it: a random pick takes from the crowd.
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(500, 6, generator=generator)
    points[::50] += 20 * torch.randn(10, 6, generator=generator)
    chosen = radius(points.numpy(), coreset(points, 20, first=1).tolist())
    for seed in range(20):
        order = torch.randperm(500, generator=torch.Generator().manual_seed(seed))
        assert chosen < 0.5 * radius(points.numpy(), order[:20].tolist())


@pytest.mark.parametrize("side", [1, 3, 5])
def test_patchcore_averages_as_a_loop_over_neighbours_does(side: int) -> None:
    (values,) = maps(1, shape=(4, 6, 7))
    found = PatchCore(neighbourhood=side).vectors(values).numpy()
    assert found == pytest.approx(averaged(values, side), abs=1e-6)


def test_patchcore_remembers_the_greedy_pick_of_all_vectors() -> None:
    normal = maps(4, shape=(5, 6, 7))
    baseline = PatchCore(share=0.2, projection=5)  # no longer than the vectors: not projected
    baseline.fit(normal)
    points = np.concatenate([averaged(values, 3) for values in normal])
    picks = baseline.picks.tolist()
    assert len(picks) == 34  # a fifth of 4 * 6 * 7, rounded
    assert picks == greedy(points.astype(float), 34, first=picks[0])


def test_patchcore_chooses_on_a_projection_almost_as_well_as_on_the_vectors() -> None:
    normal = maps(3, shape=(64, 6, 7))
    for place in range(6):
        normal[0][:, 0, place] += 20 * (place + 1)  # six that nothing else is near to
    points = np.concatenate(vectors(normal))
    for seed in range(5):
        baseline = PatchCore(share=0.1, neighbourhood=1, projection=16, seed=seed)
        baseline.fit(normal)
        picks = baseline.picks.tolist()
        assert set(range(6)) <= set(picks)
        exact = greedy(points, len(picks), first=picks[0])
        assert radius(points, picks) < 1.2 * radius(points, exact)


def test_patchcore_scores_the_distance_to_the_nearest_remembered_vector() -> None:
    normal, (new,) = maps(4, shape=(9, 6, 7)), maps(1, seed=1, shape=(9, 6, 7))
    baseline = PatchCore(share=0.1, projection=4)
    baseline.fit(normal)
    points = np.concatenate([averaged(values, 3) for values in normal])
    assert baseline.neighbours.n_samples_fit_ == len(baseline.picks) == 17
    expected = cdist(averaged(new, 3), points[baseline.picks]).min(axis=1)
    found = baseline.score_map(new)
    assert found.shape == (6, 7)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx(expected.tolist(), rel=1e-5)


def test_patchcore_scores_what_it_remembers_0_and_nothing_else() -> None:
    normal = maps(3, shape=(9, 6, 7))
    baseline = PatchCore(share=0.1, projection=4)
    baseline.fit(normal)
    scores = torch.cat([baseline.score_map(values).flatten() for values in normal])
    assert scores[baseline.picks].tolist() == pytest.approx([0] * 13, abs=1e-6)
    assert torch.nonzero(scores > 0.1).flatten().tolist() == sorted(
        set(range(126)) - set(baseline.picks.tolist())
    )


@pytest.mark.parametrize(
    ("share", "count"), [(1e-9, 1), (0.01, 1), (0.1, 2), (0.29, 7), (0.5, 12), (1.0, 24)]
)
def test_patchcore_rounds_its_share_and_remembers_at_least_one(share: float, count: int) -> None:
    baseline = PatchCore(share=share)
    baseline.fit(maps(4))  # 4 times 6 vectors
    assert len(set(baseline.picks.tolist())) == baseline.neighbours.n_samples_fit_ == count


def test_patchcore_takes_maps_that_are_made_when_asked_for() -> None:
    class Made(Sequence[Tensor]):
        """Half as precise and made under inference mode, as cached features may be."""

        def __len__(self) -> int:
            return 4

        def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
            with torch.inference_mode():
                return maps(4)[index].half()

    lazy, eager = PatchCore(share=0.3), PatchCore(share=0.3)
    lazy.fit(Made())
    eager.fit([values.half().float() for values in maps(4)])
    (new,) = maps(1, seed=1)
    assert torch.equal(lazy.score_map(new), eager.score_map(new))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("share", 0.0),
        ("share", 1.1),
        ("share", float("nan")),
        ("neighbourhood", 0),
        ("neighbourhood", 2),
        ("projection", 0),
    ],
)
def test_patchcore_refuses_a_parameter_out_of_range(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{name} is {value}"):
        PatchCore(**{name: value})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "parameters"),
    [(PositionGaussian, {"channels": 2}), (PatchCore, {"share": 0.2, "projection": 2})],
)
def test_the_same_seed_gives_the_same_scores(kind: type, parameters: dict[str, float]) -> None:
    def scores(seed: int) -> Tensor:
        baseline = kind(**parameters, seed=seed)
        baseline.fit(maps(6, shape=(5, 6, 7)))
        found: Tensor = baseline.score_map(maps(1, seed=1, shape=(5, 6, 7))[0])
        return found

    assert torch.equal(scores(0), scores(0))
    assert not torch.equal(scores(0), scores(3))
