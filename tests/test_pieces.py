"""Adaptor, noise, discriminator and loss against numpy, torch's own and numbers by hand."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from simplenet_lib.adaptor import Adaptor
from simplenet_lib.discriminator import Discriminator
from simplenet_lib.loss import cross_entropy_loss, margin_loss
from simplenet_lib.noise import add_noise, random_seed

SIZE = st.integers(1, 7)
SCORES = st.lists(st.floats(-4, 4, width=32), min_size=1, max_size=12)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@settings(deadline=None, max_examples=40)
@given(n=SIZE, channels=SIZE, out=SIZE, height=SIZE, width=SIZE, seed=st.integers(0, 999))
def test_adaptor_is_a_1x1_convolution(
    n: int, channels: int, out: int, height: int, width: int, seed: int
) -> None:
    features = torch.randn(n, height, width, channels, generator=seeded(seed))
    adaptor = Adaptor(channels, out)
    nn.init.normal_(adaptor.linear.bias, generator=seeded(seed))
    convolution = nn.Conv2d(channels, out, 1)
    convolution.weight.data = adaptor.linear.weight.data[:, :, None, None]
    convolution.bias.data = adaptor.linear.bias.data
    adapted = adaptor(features)
    assert adapted.shape == (n, height, width, out)
    channels_first = convolution(features.permute(0, 3, 1, 2))
    torch.testing.assert_close(adapted, channels_first.permute(0, 2, 3, 1), rtol=1e-4, atol=1e-5)
    state = {name: t.numpy() for name, t in adaptor.linear.state_dict().items()}
    by_numpy = np.einsum("dc,nhwc->nhwd", state["weight"], features.numpy()) + state["bias"]
    np.testing.assert_allclose(adapted.detach().numpy(), by_numpy, rtol=1e-4, atol=1e-5)
    # However many axes there are in front, one vector is adapted as it is among many.
    torch.testing.assert_close(adaptor(features[-1, -1]), adapted[-1, -1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(adaptor(features[0, 0, 0]), adapted[0, 0, 0], rtol=1e-4, atol=1e-5)


def test_adaptor_parameters_and_initialisation() -> None:
    adaptor = Adaptor(1536, 512)
    assert sum(p.numel() for p in adaptor.parameters()) == 1536 * 512 + 512
    assert not adaptor.linear.bias.any()
    # Xavier: the variance is 2 / (inputs + outputs).
    assert adaptor.linear.weight.std().item() == pytest.approx((2 / (1536 + 512)) ** 0.5, rel=0.01)


@pytest.mark.parametrize("sigma", [0.015, 0.5])
def test_noise_has_the_moments_of_the_paper(sigma: float) -> None:
    rows, channels = 4000, 64
    z = torch.randn(rows, channels, generator=seeded(1))
    noise = (add_noise(z, sigma, seeded(2)) - z).double().numpy() / sigma
    # Standard errors: 1/sqrt(n) of a mean, 1/sqrt(2n) of a deviation; five of them are allowed.
    n = rows * channels
    assert abs(noise.mean()) < 5 / n**0.5
    assert abs(noise.std() - 1) < 5 / (2 * n) ** 0.5
    assert abs(noise.mean(axis=0)).max() < 5 / rows**0.5  # in every channel
    assert abs(noise.std(axis=0) - 1).max() < 5 / (2 * rows) ** 0.5
    between = np.corrcoef(noise.T)[np.triu_indices(channels, 1)]  # 2,016 pairs of channels
    assert abs(between).max() < 6 / rows**0.5
    along = np.corrcoef(noise[:-1, 0], noise[1:, 0])[0, 1]  # rows are independent as well
    assert abs(along) < 5 / rows**0.5
    # Every vector moves by about sigma * sqrt(C), so noise makes a shell, not a ball.
    lengths = np.linalg.norm(noise, axis=1)
    assert lengths.mean() == pytest.approx(channels**0.5, rel=0.01)
    assert lengths.std() == pytest.approx(0.5**0.5, rel=0.1)


def test_noise_repeats_with_a_generator_and_leaves_its_input_alone() -> None:
    z = torch.randn(5, 3, 2, 2, generator=seeded(0))
    before = z.clone()
    first, again, other = (add_noise(z, 0.5, seeded(seed)) for seed in (7, 7, 8))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(z, before)
    assert torch.equal(add_noise(z, 0.0, seeded(7)), z)
    state = torch.get_rng_state()
    add_noise(z, 0.5, seeded(7))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is not touched
    add_noise(z, 0.5)
    assert not torch.equal(torch.get_rng_state(), state)


def test_noise_passes_gradients_unchanged() -> None:
    z = torch.randn(4, 3, requires_grad=True)
    weights = torch.randn(4, 3)
    (add_noise(z, 0.5) * weights).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad, weights)


STREAM = st.lists(st.integers(0, 2**32 - 1), max_size=4).map(tuple)


@settings(deadline=None, max_examples=100)
@given(
    first=st.tuples(st.integers(0, 2**31 - 1), STREAM),
    second=st.tuples(st.integers(0, 2**31 - 1), STREAM),
)
def test_random_seed_is_numpys_spawned_sequence(
    first: tuple[int, tuple[int, ...]], second: tuple[int, tuple[int, ...]]
) -> None:
    seed, stream = first
    found = random_seed(seed, *stream)
    expected = np.random.SeedSequence(seed, spawn_key=stream).generate_state(2).tolist()
    assert found == (expected[0] + 2**32 * expected[1]) % 2**63  # of two halves
    seeded(found)  # torch takes it
    assert (found == random_seed(second[0], *second[1])) == (first == second)


def test_random_seed_by_numpys_own_children_and_by_pinned_numbers() -> None:
    """A number that changed would change every training: results could not be repeated."""
    child = np.random.SeedSequence(7).spawn(4)[3].spawn(2)[1]
    assert random_seed(7, 3, 1) == int(child.generate_state(1, np.uint64)[0]) % 2**63
    assert random_seed(0) == 6569863346532939966
    assert random_seed(0, 0) == 8668861027912758289
    assert random_seed(0, 0, 0) == 2635072618980576772
    assert random_seed(1, 2, 3) == 1705194861510675083
    # A longer stream is another one, and so is the same of another seed.
    streams = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (0, 0, 0), (2**31,)]
    seeds = {random_seed(seed, *stream) for seed in range(50) for stream in streams}
    assert len(seeds) == 50 * len(streams)


def test_neighbouring_streams_are_independent() -> None:
    count, size = 200, 2000
    numbers = np.array(
        [
            torch.randn(size, generator=seeded(random_seed(0, 3, step))).numpy()
            for step in range(count)
        ]
    )
    # Standard error of a correlation: 1/sqrt(n); 19,900 pairs reach 4.1 of them, 6 are allowed.
    between = np.corrcoef(numbers)[np.triu_indices(count, 1)]
    assert abs(between).max() < 6 / size**0.5
    assert between.std() == pytest.approx(1 / size**0.5, rel=0.05)
    means = numbers.mean(axis=1) * size**0.5
    assert means.std() == pytest.approx(1, abs=5 / (2 * count) ** 0.5)


def discriminator_by_numpy(discriminator: Discriminator, vectors: np.ndarray) -> np.ndarray:
    state = {name: t.numpy() for name, t in discriminator.state_dict().items()}
    hidden = vectors @ state["hidden.weight"].T + state["hidden.bias"]
    if "norm.weight" in state:
        if discriminator.training:
            mean, variance = hidden.mean(axis=0), hidden.var(axis=0)
        else:
            mean, variance = state["norm.running_mean"], state["norm.running_var"]
        hidden = (hidden - mean) / np.sqrt(variance + 1e-5)
        hidden = hidden * state["norm.weight"] + state["norm.bias"]
    hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    return (hidden @ state["score.weight"].T)[:, 0]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_discriminator_equals_numpy(batchnorm: bool, training: bool) -> None:
    torch.manual_seed(0)
    discriminator = Discriminator(6, 5, batchnorm=batchnorm)
    discriminator(3 * torch.randn(50, 6) + 1)  # moves the running statistics of BatchNorm
    discriminator.train(training)
    vectors = torch.randn(9, 6)
    expected = discriminator_by_numpy(discriminator, vectors.numpy())
    # Vectors of any arrangement: as a batch, as one map, as maps of several images.
    for shape in ((9,), (3, 3), (3, 1, 3), (1, 9, 1, 1)):
        scores = discriminator(vectors.view(*shape, 6))
        assert scores.shape == shape
        found = scores.detach().flatten().numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    channels_first = vectors.view(3, 3, 6).permute(2, 0, 1).contiguous()
    found = discriminator(channels_first.permute(1, 2, 0)).detach().flatten().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_discriminator_by_hand() -> None:
    discriminator = Discriminator(2, 2)
    discriminator.hidden.weight.data = torch.tensor([[1.0, 2.0], [-1.0, 1.0]])
    discriminator.hidden.bias.data = torch.tensor([0.0, 1.0])
    discriminator.score.weight.data = torch.tensor([[1.0, 10.0]])
    # (1, 1): hidden (3, 1), score 3 + 10; (4, 1): hidden (6, -2), 6 - 10 * 0.4.
    scores = discriminator(torch.tensor([[1.0, 1.0], [4.0, 1.0]]))
    torch.testing.assert_close(scores, torch.tensor([13.0, 2.0]))
    single = discriminator(torch.tensor([4.0, 1.0]))
    assert (single.shape, single.item()) == ((), 2.0)


@settings(deadline=None, max_examples=30)
@given(batch=st.integers(2, 20), seed=st.integers(0, 999), batchnorm=st.booleans())
def test_discriminator_scores_positions_one_by_one(batch: int, seed: int, batchnorm: bool) -> None:
    discriminator = Discriminator(4, 8, batchnorm=batchnorm).eval()
    vectors = torch.randn(batch, 4, generator=seeded(seed))
    order = torch.randperm(batch, generator=seeded(seed))
    scores = discriminator(vectors)
    torch.testing.assert_close(discriminator(vectors[order]), scores[order])
    torch.testing.assert_close(discriminator(vectors[:1]), scores[:1])


@pytest.mark.parametrize(
    ("batchnorm", "expected"),
    [(False, 512 * 512 + 512 + 512), (True, 512 * 512 + 512 + 512 + 2 * 512)],
)
def test_discriminator_parameter_count(batchnorm: bool, expected: int) -> None:
    """Weights and biases of the hidden layer, BatchNorm's two vectors, and a score without bias."""
    discriminator = Discriminator(512, 512, batchnorm=batchnorm)
    assert sum(p.numel() for p in discriminator.parameters()) == expected


def test_margin_loss_of_six_scores_by_hand() -> None:
    normal = torch.tensor([0.7, 0.2, -0.1], requires_grad=True)  # costs 0, 0.3, 0.6
    noisy = torch.tensor([-0.8, -0.5, 0.4], requires_grad=True)  # costs 0, 0, 0.9
    loss = margin_loss(normal, noisy, margin=0.5)
    assert loss.shape == ()
    assert loss.item() == pytest.approx(0.9 / 3 + 0.9 / 3)
    loss.backward()
    third = 1 / 3
    torch.testing.assert_close(normal.grad, torch.tensor([0.0, -third, -third]))
    torch.testing.assert_close(noisy.grad, torch.tensor([0.0, 0.0, third]))


@settings(deadline=None, max_examples=100)
@given(normal=SCORES, noisy=SCORES, margin=st.floats(0, 2, width=32))
def test_margin_loss_obeys_its_laws(normal: list[float], noisy: list[float], margin: float) -> None:
    def loss(a: list[float], b: list[float]) -> float:
        return margin_loss(torch.tensor(a), torch.tensor(b), margin).item()

    expected = sum(max(0.0, margin - s) for s in normal) / len(normal)
    expected += sum(max(0.0, margin + s) for s in noisy) / len(noisy)
    assert loss(normal, noisy) == pytest.approx(expected, abs=1e-5)
    # Swapping the two sides and every sign changes nothing.
    swapped = loss([-s for s in noisy], [-s for s in normal])
    assert swapped == pytest.approx(loss(normal, noisy), abs=1e-5)
    # A discriminator that always answers 0, or any constant within the margins, costs 2m.
    for constant in (0.0, margin / 2, -margin):
        trivial = loss([constant] * len(normal), [constant] * len(noisy))
        assert trivial == pytest.approx(2 * margin, abs=1e-5)


@settings(deadline=None, max_examples=100)
@given(normal=SCORES, noisy=SCORES)
def test_margin_loss_gradient_is_zero_beyond_and_one_over_b_inside(
    normal: list[float], noisy: list[float]
) -> None:
    a, b = (torch.tensor(s, requires_grad=True) for s in (normal, noisy))
    margin_loss(a, b, 0.5).backward()

    def expected(scores: Tensor, slope: float) -> Tensor:
        inside = -torch.sign(torch.tensor(slope)) * scores.detach() < 0.5
        return inside * slope / len(scores)

    torch.testing.assert_close(a.grad, expected(a, -1.0))
    torch.testing.assert_close(b.grad, expected(b, 1.0))


def test_cross_entropy_loss_by_hand() -> None:
    # D = log 3 says "normal" with probability 3/4: right costs log 4/3, wrong log 4.
    normal = torch.tensor([3.0, 1.0]).log().requires_grad_()
    noisy = torch.tensor([3.0, 1 / 3, 1.0, 1.0]).log().requires_grad_()
    loss = cross_entropy_loss(normal, noisy)
    assert loss.shape == ()
    expected = (np.log(4 / 3) + np.log(2)) / 2
    expected += (np.log(4) + np.log(4 / 3) + 2 * np.log(2)) / 4
    assert loss.item() == pytest.approx(expected)
    loss.backward()
    # The probability of the other answer, divided by the number of scores.
    torch.testing.assert_close(normal.grad, torch.tensor([-1 / 8, -1 / 4]))
    torch.testing.assert_close(noisy.grad, torch.tensor([3 / 16, 1 / 16, 1 / 8, 1 / 8]))


WIDE_SCORES = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12)


@settings(deadline=None, max_examples=100)
@given(normal=SCORES | WIDE_SCORES, noisy=SCORES | WIDE_SCORES)
def test_cross_entropy_loss_is_torchs(normal: list[float], noisy: list[float]) -> None:
    ours = [torch.tensor(scores, requires_grad=True) for scores in (normal, noisy)]
    theirs = [torch.tensor(scores, requires_grad=True) for scores in (normal, noisy)]
    found = cross_entropy_loss(*ours)
    expected = F.binary_cross_entropy_with_logits(theirs[0], torch.ones(len(normal)))
    expected = expected + F.binary_cross_entropy_with_logits(theirs[1], torch.zeros(len(noisy)))
    torch.testing.assert_close(found, expected)
    found.backward()
    expected.backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    # Swapping the two sides and every sign changes nothing; answering 0 costs 2 log 2.
    swapped = cross_entropy_loss(-ours[1].detach(), -ours[0].detach())
    torch.testing.assert_close(swapped, found.detach())
    trivial = cross_entropy_loss(torch.zeros(len(normal)), torch.zeros(len(noisy)))
    assert trivial.item() == pytest.approx(2 * np.log(2))


def test_best_answer_to_cross_entropy_is_the_logarithm_of_the_densities() -> None:
    """Two places: at one normal vectors are 1.5 times as frequent as noisy ones, at one half."""
    answers = torch.zeros(2, requires_grad=True)
    normal, noisy = torch.tensor([0, 0, 0, 1]), torch.tensor([0, 1, 1, 0])
    optimizer = torch.optim.LBFGS([answers], max_iter=100, tolerance_grad=1e-9)

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy_loss(answers[normal], answers[noisy])
        value.backward()
        return value

    optimizer.step(loss)
    expected = torch.tensor([(3 / 4) / (2 / 4), (1 / 4) / (2 / 4)]).log()
    torch.testing.assert_close(answers.detach(), expected, rtol=1e-3, atol=1e-3)
