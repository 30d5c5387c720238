"""Training: folds, batches, determinism, being stopped at any moment, and the threshold."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor
from torchvision.models import resnet18

from simplenet_lib import training as training_module
from simplenet_lib.config import Config, SimpleNetError, preset
from simplenet_lib.dataset import ImageFiles, Sample, make_transform
from simplenet_lib.features import FeatureMaps, Standardise
from simplenet_lib.localization import anomaly_map, predict
from simplenet_lib.model import Head, SimpleNet, read_checkpoint, write_checkpoint
from simplenet_lib.noise import random_seed
from simplenet_lib.training import (
    OneDNN,
    cached_maps,
    calibrate,
    drawn_positions,
    fit,
    heads_without,
    shuffled_positions,
    split_images,
    train,
)
from simplenet_lib.weights import Weights, digest_of

CHANNELS = 5
IDENTITY = {"format": "simplenet-3", "config": "toy"}
FOLDS = np.array([0, 1, 2, 2, 0, 1])
ALONE = np.array([-1, -1, 0, -1, 0, -1])  # one head, trained without images 2 and 4


def toy(**changes: Any) -> Config:
    values = {"adaptor_channels": 6, "hidden_channels": 4, "steps": 120, "batch_size": 32}
    values |= {"standardise": True, "batchnorm": True, "adaptor_scale": 1.0, "sigma": 0.5}
    values |= {"loss": "cross-entropy", "heads": 3, "averaging": 0.9, "false_alarms": 0.0}
    values |= {"position_units": True}
    return preset("fast", **{**values, "adaptor_lr": 1e-2, "discriminator_lr": 2e-2, **changes})


def toy_values() -> np.ndarray:
    """Six images of 3x4 positions, channels of different scale."""
    random = np.random.default_rng(0)
    return (random.normal(size=(6, 3, 4, CHANNELS)) * [1, 2, 5, 0.1, 1]).astype(np.float16)


def feature_maps(values: np.ndarray) -> FeatureMaps:
    descriptions = np.zeros((len(values), 1), np.float32)
    return FeatureMaps(list(values), descriptions, [str(index) for index in range(len(values))])


def new_heads(config: Config, channels: int = CHANNELS) -> list[Head]:
    heads = []
    for number in range(config.heads):
        torch.manual_seed(100 * config.seed + number)
        heads.append(Head(channels, config))
    return heads


def fit_toy(
    checkpoint: Path | None = None,
    config: Config | None = None,
    values: np.ndarray | None = None,
    folds: np.ndarray = FOLDS,
) -> dict[str, Tensor]:
    """Train and return everything that came of it: states of the heads, units and curves."""
    config = config or toy()
    heads, standardise = new_heads(config), Standardise(CHANNELS)
    features = feature_maps(toy_values() if values is None else values)
    history = fit(heads, standardise, features, folds, config, checkpoint, IDENTITY, progress=False)
    assert not any(head.training for head in heads)
    state = {
        f"{k}.{name}": t for k, head in enumerate(heads) for name, t in head.state_dict().items()
    }
    return {**state, **standardise.state_dict(), **dataclasses.asdict(history)}


def state_of(result: dict[str, Tensor], head: int) -> dict[str, Tensor]:
    prefix = f"{head}."
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in result.items()
        if name.startswith(prefix)
    }


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def differ(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    """Whether every trained weight differs somewhere."""
    names = [name for name in first if name.endswith("weight")]
    assert len(names) >= 3
    return all(not torch.equal(first[name], second[name]) for name in names)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from threads, and the number of threads changes the bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def undisturbed() -> dict[str, Tensor]:
    return fit_toy()


# Splits and batches -------------------------------------------------------------------


@given(count=st.integers(2, 300), heads=st.integers(1, 100), seed=st.integers(0, 2**31 - 1))
def test_every_image_is_left_out_by_one_fold_of_equal_size(
    count: int, heads: int, seed: int
) -> None:
    folds = split_images(count, heads, seed)
    assert folds.shape == (count,)
    numbers, sizes = np.unique(folds, return_counts=True)
    if heads == 1:
        assert numbers.tolist() == [-1, 0]  # so neither is empty
        assert abs(sizes[1] - count / 10) <= 0.9
    else:
        assert numbers.tolist() == list(range(min(5, heads, count)))
        assert sizes.max() - sizes.min() <= 1
    # Every head leaves out one fold, and every fold is left out by some head.
    groups = [heads_without(fold, folds, heads) for fold in numbers[numbers >= 0].tolist()]
    assert all(groups)
    assert sorted(chain.from_iterable(groups)) == list(range(heads))
    assert np.array_equal(split_images(count, heads, seed), folds)


def test_split_depends_on_the_seed_and_needs_two_images() -> None:
    for heads in (1, 4):
        assert len({tuple(split_images(50, heads, seed)) for seed in range(5)}) == 5
        for count in (0, 1):
            with pytest.raises(SimpleNetError, match=f"{count} normal image: at least 2"):
                split_images(count, heads, 0)


def test_folds_are_not_runs_of_neighbours() -> None:
    """Photos next to each other on disk are often alike."""
    folds = split_images(100, 5, 0)
    assert 5 < (np.diff(folds) == 0).sum() < 40  # by chance 20 neighbours share a fold
    assert len({tuple(folds[start : start + 5]) for start in range(0, 100, 5)}) > 10


@settings(deadline=None)
@given(
    count=st.integers(1, 40),
    batch=st.integers(1, 100),
    seed=st.integers(0, 2**31 - 1),
    resumed=st.integers(0, 30),
)
def test_every_position_once_an_epoch_and_resuming_changes_nothing(
    count: int, batch: int, seed: int, resumed: int
) -> None:
    endless = shuffled_positions(count, batch, seed, 0)
    batches = [next(endless) for _ in range(resumed + 3)]
    assert all(len(positions) == batch for positions in batches)
    stream = torch.cat(batches)
    for start in range(0, len(stream) - count + 1, count):
        assert sorted(stream[start : start + count].tolist()) == list(range(count))
    again = shuffled_positions(count, batch, seed, resumed)
    for positions in batches[resumed:]:
        assert torch.equal(next(again), positions)


def test_epochs_and_seeds_have_orders_of_their_own() -> None:
    first = shuffled_positions(100, 100, 0, 0)
    orders = [next(first), next(first), next(shuffled_positions(100, 100, 9, 0))]
    assert len({tuple(order.tolist()) for order in orders}) == 3


@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=1, max_size=8).filter(any),
    seed=st.integers(0, 10**6),
    resumed=st.integers(0, 5),
)
def test_positions_are_drawn_by_their_weights_and_resuming_changes_nothing(
    weights: list[float], seed: int, resumed: int
) -> None:
    endless = drawn_positions(torch.tensor(weights), 2000, seed, 0)
    batches = [next(endless) for _ in range(resumed + 1)]
    shares = np.bincount(batches[0].numpy(), minlength=len(weights)) / 2000
    expected = np.array(weights) / sum(weights)
    assert len(shares) == len(weights)
    # Six standard deviations: once in 500 million; what has no weight never comes.
    assert (abs(shares - expected) <= 6 * np.sqrt(expected * (1 - expected) / 2000)).all()
    again = drawn_positions(torch.tensor(weights), 2000, seed, resumed)
    assert torch.equal(next(again), batches[resumed])
    assert not torch.equal(next(again), batches[resumed]) or len({*batches[0].tolist()}) == 1


def test_emphasis_is_on_what_lies_far_from_the_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def recorded(weights: Tensor, *rest: int) -> Iterator[Tensor]:
        asked.append(weights)
        return drawn_positions(weights, *rest)

    monkeypatch.setattr(training_module, "drawn_positions", recorded)
    values = toy_values()
    for emphasis, heads in ((2.0, 3), (1.0, 1), (0.0, 3)):
        config = toy(steps=1, emphasis=emphasis, heads=heads)
        folds = FOLDS if heads > 1 else ALONE
        features = feature_maps(values)
        fit(new_heads(config), Standardise(CHANNELS), features, folds, config, progress=False)
    assert len(asked) == 2
    for weights, emphasis, used in ((asked[0], 2, range(6)), (asked[1], 1, (0, 1, 3, 5))):
        some = values[list(used)].astype(np.float64).reshape(-1, CHANNELS)
        std = some.std(axis=0)
        standardised = (some - some.mean(axis=0)) / (std + 0.3 * std.mean())
        expected = np.linalg.norm(standardised, axis=1) ** emphasis
        np.testing.assert_allclose(weights.numpy(), expected, rtol=1e-3)


def test_images_without_any_difference_are_drawn_all_the_same() -> None:
    config = toy(steps=2)
    features = feature_maps(np.ones((6, 3, 4, CHANNELS), np.float16))
    history = fit(new_heads(config), Standardise(CHANNELS), features, FOLDS, config, progress=False)
    assert history.loss.isfinite().all()


# Fit ----------------------------------------------------------------------------------


def test_same_seed_same_bits(undisturbed: dict[str, Tensor]) -> None:
    assert_same_bits(undisturbed, fit_toy())
    other = fit_toy(config=toy(seed=1))
    assert not torch.equal(other["loss"], undisturbed["loss"])


def test_the_seed_alone_decides_order_and_noise() -> None:
    """The same first weights, another seed: another training."""
    config = toy(steps=3, batchnorm=False, averaging=0.0)
    heads = [new_heads(config) for _ in range(3)]
    for some, seed in zip(heads, (0, 0, 1), strict=True):
        seeded, features = dataclasses.replace(config, seed=seed), feature_maps(toy_values())
        fit(some, Standardise(CHANNELS), features, FOLDS, seeded, progress=False)
    first, again, other = (some[0].state_dict() for some in heads)
    assert_same_bits(first, again)
    assert differ(first, other)


def test_every_head_and_step_has_noise_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds = []
    score = Head.normal_and_noisy

    def recorded(head: Head, vectors: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        seeds.append(generator.initial_seed())
        assert torch.equal(
            generator.get_state(), torch.Generator().manual_seed(seeds[-1]).get_state()
        )
        return score(head, vectors, generator)

    monkeypatch.setattr(Head, "normal_and_noisy", recorded)
    fit_toy(config=toy(steps=20))
    assert len(seeds) == len(set(seeds)) == 20 * 3


@pytest.mark.parametrize("loss", ["margin", "cross-entropy"])
def test_first_step_by_hand(loss: str) -> None:
    """One step of plain Adam changes every parameter by its learning rate, against its gradient."""
    changes = {
        "standardise": False,
        "batchnorm": False,
        "averaging": 0.0,
        "heads": 2,
        "emphasis": 0.0,
    }
    config = toy(steps=1, batch_size=72, loss=loss, margin=0.25, **changes)
    heads, before = new_heads(config), new_heads(config)
    folds, values = FOLDS % 2, toy_values()
    standardise = Standardise(CHANNELS)
    history = fit(heads, standardise, feature_maps(values), folds, config, progress=False)
    # One batch of 72 is every position of the six images, in whatever order.
    order = next(shuffled_positions(72, 72, config.seed, 0)).numpy()
    vectors = torch.from_numpy(values.reshape(-1, CHANNELS)[order]).float()
    losses, normal_shares, noisy_shares = [], [], []
    for number, (head, old_head) in enumerate(zip(heads, before, strict=True)):
        seen = torch.from_numpy(folds[order // 12] != number)
        assert 24 <= seen.sum() <= 48
        noise = torch.Generator().manual_seed(
            random_seed(config.seed, training_module.NOISE, 0, number)
        )
        normal, noisy = old_head.normal_and_noisy(vectors[seen], noise)
        torch.testing.assert_close(normal, -old_head(vectors[seen]))
        if loss == "margin":
            value = (
                torch.clamp(0.25 - normal, min=0).mean() + torch.clamp(0.25 + noisy, min=0).mean()
            )
        else:
            value = torch.log1p(torch.exp(-normal)).mean() + torch.log1p(torch.exp(noisy)).mean()
        losses.append(value.item())
        normal_shares.append((normal > 0.25).float().mean().item())
        noisy_shares.append((noisy < -0.25).float().mean().item())
        value.backward()
        for old, new, rate, decay in (
            (old_head.adaptor.linear.weight, head.adaptor.linear.weight, 1e-2, 0.01),
            (old_head.discriminator.score.weight, head.discriminator.score.weight, 2e-2, 1e-5),
        ):
            clear = old.grad.abs() > 1e-3
            assert clear.any()
            expected = old * (1 - rate * decay) - rate * old.grad.sign()
            torch.testing.assert_close(new[clear], expected[clear], rtol=0, atol=1e-4 * rate + 1e-6)
    assert history.loss.item() == pytest.approx(np.mean(losses), rel=1e-4)
    assert history.normal.item() == pytest.approx(np.mean(normal_shares))
    assert history.noisy.item() == pytest.approx(np.mean(noisy_shares))


@pytest.mark.skipif(not training_module.HAS_ONEDNN, reason="PyTorch without oneDNN")
def test_onednn_computes_what_pytorch_does_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training_module, "USE_ONEDNN", True)  # on Intel's processors it is not used
    layer = torch.nn.Linear(48, 5)
    vectors = torch.randn(30, 48, requires_grad=True)
    by_itself = layer(vectors)
    with OneDNN():
        values = layer(vectors)
    assert "MkldnnLinear" in repr(values.grad_fn.next_functions)
    torch.testing.assert_close(values, by_itself, atol=1e-5, rtol=1e-5)
    asked = [vectors, *layer.parameters()]
    found = torch.autograd.grad(values.square().sum(), asked)
    expected = torch.autograd.grad(by_itself.square().sum(), asked)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    monkeypatch.setattr(training_module, "USE_ONEDNN", False)
    with OneDNN():
        assert torch.equal(layer(vectors), by_itself)


def test_images_left_out_by_a_single_head_are_never_read() -> None:
    config, values = toy(steps=20, heads=1), toy_values()
    expected = fit_toy(None, config, values, ALONE)
    values[[2, 4]] = np.nan
    assert_same_bits(fit_toy(None, config, values, ALONE), expected)
    values = toy_values()
    values[3] += 1
    assert differ(state_of(fit_toy(None, config, values, ALONE), 0), state_of(expected, 0))


def test_a_head_may_be_trained_on_all_images() -> None:
    config, everything = toy(steps=20, heads=1), np.full(6, -1)
    expected = state_of(fit_toy(None, config, None, everything), 0)
    for image in range(6):
        values = toy_values()
        values[image] *= 2
        assert differ(state_of(fit_toy(None, config, values, everything), 0), expected)


@pytest.mark.parametrize("fold", [0, 1, 2])
def test_no_head_learns_from_its_own_fold(fold: int) -> None:
    """Seven heads, so that every fold but one is left out by two of them.

    With an emphasis the fold would decide with how many positions of others it shares a batch.
    """
    config = toy(steps=20, heads=7, standardise=False, emphasis=0.0)
    expected = fit_toy(config=config)
    values = toy_values()
    values[fold == FOLDS] = -3 * values[fold == FOLDS] + 100
    changed = fit_toy(None, config, values)
    for head in range(7):
        if head % 3 == fold:
            assert_same_bits(state_of(changed, head), state_of(expected, head))
        else:
            assert differ(state_of(changed, head), state_of(expected, head))


def test_channels_are_measured_over_the_images_in_use() -> None:
    config = toy(steps=1)
    images = {1: [0, 1, 3, 5], 3: range(6)}
    for heads, folds in ((1, ALONE), (3, FOLDS)):
        result = fit_toy(None, dataclasses.replace(config, heads=heads), None, folds)
        vectors = toy_values()[list(images[heads])].reshape(-1, CHANNELS).astype(np.float64)
        np.testing.assert_allclose(result["mean"], vectors.mean(axis=0), rtol=1e-4, atol=1e-4)
        std = vectors.std(axis=0)
        np.testing.assert_allclose(result["std"], std + 0.3 * std.mean(), rtol=1e-4)
    off = fit_toy(config=dataclasses.replace(config, standardise=False))
    assert off["mean"].tolist() == [0] * CHANNELS and off["std"].tolist() == [1] * CHANNELS


def test_heads_differ_and_more_of_them_change_nothing_for_the_first() -> None:
    six = fit_toy(config=toy(steps=20, heads=6))
    for first in range(6):
        for second in range(first):  # heads 0 and 3 are trained on the same images
            assert differ(state_of(six, first), state_of(six, second))
    three = fit_toy(config=toy(steps=20, heads=3))
    for head in range(3):
        assert_same_bits(state_of(three, head), state_of(six, head))


@pytest.mark.parametrize("decay", [0.3, 0.9])
def test_averaging_is_a_moving_average_of_weights_and_statistics(decay: float) -> None:
    steps = 15
    initial = [head.state_dict() for head in new_heads(toy())]
    results = [fit_toy(config=toy(steps=count, averaging=0.0)) for count in range(1, steps + 1)]
    averaged = fit_toy(config=toy(steps=steps, averaging=decay))
    for head in range(3):
        mean = {name: tensor.double() for name, tensor in initial[head].items()}
        for step, result in enumerate(results):
            kept = min(decay, (1 + step) / (10 + step))  # the first steps count for less
            for name, tensor in state_of(result, head).items():
                mean[name] = kept * mean[name] + (1 - kept) * tensor.double()
        for name, tensor in state_of(averaged, head).items():
            if name.endswith("num_batches_tracked"):
                assert tensor.item() == steps
                continue
            torch.testing.assert_close(tensor.double(), mean[name], rtol=1e-4, atol=1e-5)
            last = state_of(results[-1], head)[name]
            assert not torch.allclose(tensor, last, rtol=1e-3, atol=1e-4), name
    # What is kept has no influence on the training itself.
    assert torch.equal(averaged["loss"], results[-1]["loss"])


def test_loss_falls_and_shares_rise() -> None:
    random = np.random.default_rng(0)  # normal vectors lie on a plane, noise leaves it
    plane = random.normal(size=(8, 10, 10, 2)) @ random.normal(size=(2, 16))
    features = feature_maps(plane.astype(np.float16))
    changes = {"adaptor_channels": 32, "hidden_channels": 32, "heads": 2, "sigma": 1.0}
    for loss, start, end in (("margin", 0.5, 0.1), ("cross-entropy", 1.0, 0.3)):
        config = toy(steps=150, batch_size=256, loss=loss, margin=0.5, **changes)
        heads = new_heads(config, 16)
        folds = np.arange(8) % 2
        history = fit(heads, Standardise(16), features, folds, config, progress=False)
        assert history.loss[0] > start
        assert history.loss[-20:].mean() < end
        for share in (history.normal, history.noisy):
            assert 0 <= share.min() <= share.max() <= 1
            assert share[-20:].mean() > share[:5].mean() + 0.3
        assert not any(head.training for head in heads)


def test_a_loss_that_is_not_finite_stops_with_the_reason(tmp_path: Path) -> None:
    config = toy(steps=5, adaptor_lr=10.0, standardise=False, batchnorm=False)
    heads, path = new_heads(config), tmp_path / "c"
    heads[1].discriminator.score.weight.data.fill_(3e38)  # one of them is enough
    with pytest.raises(
        SimpleNetError, match=r"the loss is (inf|nan) at step 1.*10, 0.02.*too high"
    ):
        features = feature_maps(toy_values())
        fit(heads, Standardise(CHANNELS), features, FOLDS, config, path, IDENTITY, progress=False)
    assert not path.exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Stopping and going on ----------------------------------------------------------------


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch, heads: int = 3) -> None:
    """Press Ctrl-C, for real, in the middle of a step, at its second head."""
    calls = iter(range(10**6))
    loss = training_module.cross_entropy_loss

    def pressed(*args: Any) -> Tensor:
        if next(calls) == heads * step + 1:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(training_module, "cross_entropy_loss", pressed)


@pytest.mark.parametrize("step", [0, 1, 49, 50, 77, 119])
def test_ctrl_c_keeps_the_state_and_the_bits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Tensor]
) -> None:
    path = tmp_path / "training.safetensors"
    stop_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(path)
    kept = int(read_checkpoint(path)[1]["step"])
    assert kept in (step + 1, step + 2)  # the steps under way were finished
    assert [p.name for p in tmp_path.iterdir()] == ["training.safetensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert_same_bits(fit_toy(path), undisturbed)


def test_one_head_without_averaging_goes_on_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, config = tmp_path / "training.safetensors", toy(heads=1, averaging=0.0)
    expected = fit_toy(None, config, None, ALONE)
    stop_at(30, monkeypatch, heads=1)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(path, config, None, ALONE)
    monkeypatch.undo()
    assert_same_bits(fit_toy(path, config, None, ALONE), expected)


def test_ctrl_c_without_a_checkpoint_just_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit_toy()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*args: Any) -> np.ndarray:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    # Here, since signals reach the main thread alone, and heads train in others.
    monkeypatch.setattr(FeatureMaps, "vectors", impatient)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path / "c")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_background_job_goes_on_ignoring_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Tensor]
) -> None:
    loss = training_module.cross_entropy_loss

    def interrupted(*args: Any) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(training_module, "cross_entropy_loss", interrupted)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert_same_bits(fit_toy(), undisturbed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def test_the_state_after_the_last_step_is_kept_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Tensor]
) -> None:
    """If the evaluation fails, the training before it is not lost."""
    path = tmp_path / "training.safetensors"
    fit_toy(path)
    assert read_checkpoint(path)[1]["step"] == "120"
    monkeypatch.setattr(training_module, "cross_entropy_loss", None)  # no step is made again
    assert_same_bits(fit_toy(path), undisturbed)


def train_until_killed(path: Path) -> None:
    torch.set_num_threads(1)
    fit_toy(path, toy(steps=100_000))


def test_a_killed_process_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL cannot be caught: whatever moment it hits, the file is the old or the new one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["simplenet_lib.training", __name__])
    path = tmp_path / "training.safetensors"
    random = np.random.default_rng(0)
    kills = int(os.environ.get("KILLS", "5"))  # `make stress` asks for more
    for _ in range(kills):
        process = context.Process(target=train_until_killed, args=(path,))
        process.start()
        before = path.stat().st_mtime_ns if path.exists() else 0
        deadline = time.monotonic() + 120
        while (path.stat().st_mtime_ns if path.exists() else 0) == before:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(random.uniform(0, 0.05))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        tensors, metadata = read_checkpoint(path)  # always whole
    done = int(metadata["step"])
    assert done >= 50 * kills  # each process went on from where the last was killed
    # The curves' length and the identity belong to 100,000 steps; compare what was done.
    last, averaged = (fit_toy(config=toy(steps=done, averaging=decay)) for decay in (0.0, 0.9))
    for number, head in enumerate(new_heads(toy())):
        for name, tensor in state_of(last, number).items():
            assert torch.equal(tensor, tensors[f"heads.{number}.{name}"]), name
        names = [name for name, _ in head.named_parameters()]
        names += ["discriminator.norm.running_mean", "discriminator.norm.running_var"]
        for place, name in enumerate(names):
            mean = state_of(averaged, number)[name]
            assert torch.equal(mean, tensors[f"averages.{number}.{place}"]), name
    assert torch.equal(last["loss"], tensors["curves"][:done, 0])


# Checkpoints that must be refused -----------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "training.safetensors"
    with monkeypatch.context() as patch:
        stop_at(10, patch)
        with pytest.raises(KeyboardInterrupt):
            fit_toy(path)
    return path


def refused(path: Path, config: Config | None = None) -> str:
    with pytest.raises(SimpleNetError) as caught:
        fit_toy(path, config)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "Remove it to start anew" in message
    return message


def test_another_training_is_refused(kept: Path) -> None:
    tensors, metadata = read_checkpoint(kept)
    for change in ({"config": "other"}, {"surplus": "1"}):
        write_checkpoint(kept, tensors, {**metadata, **change})
        assert "another configuration, weights or images" in refused(kept)


def test_a_state_with_more_or_fewer_heads_is_refused(kept: Path) -> None:
    assert "(averages.2.0)" in refused(kept, toy(heads=2))
    assert "(averages.3.0)" in refused(kept, toy(heads=4))


def damage(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("curves"), "(curves)"),
        (lambda tensors: tensors.pop("optimizers.2.0.exp_avg"), "(optimizers.2.0.exp_avg)"),
        (lambda tensors: tensors.pop("averages.1.3"), "(averages.1.3)"),
        (
            lambda tensors: tensors.pop("heads.0.adaptor.linear.bias"),
            "(heads.0.adaptor.linear.bias)",
        ),
        (damage("curves", lambda t: t[0]), "curves is (3,)"),  # would broadcast silently
        (damage("averages.1.0", lambda t: t[:1]), "averages.1.0 is (1, 5)"),
        (damage("optimizers.0.0.exp_avg", lambda t: t[:1]), "optimizers.0.0.exp_avg is (1, 5)"),
        (damage("optimizers.1.0.step", lambda t: t.long()), "torch.int64"),
        (damage("optimizers.2.5.exp_avg_sq", lambda t: t * torch.nan), "not finite"),
        (damage("heads.1.discriminator.norm.running_var", lambda t: t * torch.inf), "not finite"),
    ],
)
def test_damaged_states_are_refused(
    kept: Path, change: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    tensors, metadata = read_checkpoint(kept)
    change(tensors)
    write_checkpoint(kept, tensors, metadata)
    assert message in refused(kept)


def test_damaged_files_and_steps_are_refused(kept: Path) -> None:
    whole = kept.read_bytes()
    for size in (0, 20, len(whole) - 1):
        kept.write_bytes(whole[:size])
        assert "not a readable checkpoint" in refused(kept)
    kept.write_bytes(whole)
    tensors, metadata = read_checkpoint(kept)
    for step in ("", "x", "-3", "0", "121", "9" * 9000, "²"):
        write_checkpoint(kept, tensors, {**metadata, "step": step})
        assert "no step of this training" in refused(kept)


# Units and threshold ------------------------------------------------------------------

NETWORK = {"backbone": "resnet18", "layers": ("layer2",), "resize": 64, "crop": 64}
GRID, WIDTH = 8, 128  # positions a side and channels of layer2


def units_of(**changes: Any) -> SimpleNet:
    """A detector with trained-looking heads, before it has units."""
    torch.manual_seed(0)
    state = resnet18().state_dict()
    weights = Weights(state, "a test", digest_of(state, "conv2"), "conv2")
    model = SimpleNet(toy(**NETWORK, smoothing=3.0, **changes), weights).eval()
    random = torch.Generator().manual_seed(1)
    for head in model.heads:
        norm = head.discriminator.norm
        norm.running_mean.normal_(generator=random)
        norm.running_var.uniform_(0.5, 2, generator=random)
        head.discriminator.score.weight.data.normal_(generator=random)
    model.standardise.mean.normal_(generator=random)
    model.standardise.std.uniform_(0.5, 2, generator=random)
    return model


def random_maps(count: int, seed: int = 2) -> np.ndarray:
    values = np.random.default_rng(seed).normal(size=(count, GRID, GRID, WIDTH))
    values[:, 5:, 5:] *= 2  # normal images vary more in this corner
    return values.astype(np.float16)


def clipped_mean(values: np.ndarray, side: int) -> np.ndarray:
    """Mean over what a square around every position shares with the map."""
    reach = side // 2
    result = np.empty_like(values)
    for row, column in np.ndindex(values.shape):
        rows = slice(max(0, row - reach), row + reach + 1)
        result[row, column] = values[rows, max(0, column - reach) : column + reach + 1].mean()
    return result


def by_hand(
    model: SimpleNet,
    values: np.ndarray,
    folds: np.ndarray,
    *,
    false_alarms: float = 0.0,
    limit: int = 50,
    positions: bool = True,
) -> dict[str, Any]:
    """What `calibrate` should find, from every head's scores on every image."""
    count, heads = folds.max() + 1, len(model.heads)
    with torch.inference_mode():
        vectors = model.standardise(torch.from_numpy(values).float())
        raw = np.stack([head(vectors).double().numpy() for head in model.heads])
    left_out = [np.flatnonzero(folds == head % count) for head in range(heads)]
    unseen = [raw[head, left_out[head]] for head in range(heads)]
    centre = np.array([scores.mean() for scores in unseen])
    spread = np.array([scores.std(ddof=1) for scores in unseen])
    units = (raw - centre[:, None, None, None]) / spread[:, None, None, None]
    fresh = np.flatnonzero(folds >= 0)
    own = [
        units[[head for head in range(heads) if image in left_out[head]], image].mean(axis=0)
        for image in fresh
    ]
    level, scale = np.zeros((GRID, GRID)), np.ones((GRID, GRID))
    levels, scales = [level] * len(own), [scale] * len(own)
    if positions:  # a photo's level and scale come from all the others
        level = clipped_mean(np.mean(own, axis=0), 3)
        others = [[k for k in range(len(own)) if k != number] for number in range(len(own))]
        levels = [clipped_mean(np.mean([own[k] for k in rest], axis=0), 3) for rest in others]
        upper = [
            np.maximum(clipped_mean(map_ - its, 3), 0) ** 3
            for map_, its in zip(own, levels, strict=True)
        ]
        scale = clipped_mean(np.mean(upper, axis=0), 5) ** (1 / 3)
        scales = [
            clipped_mean(np.mean([upper[k] for k in rest], axis=0), 5) ** (1 / 3) for rest in others
        ]

    def score(map_: np.ndarray, number: int) -> float:
        units = (map_ - levels[number]) / scales[number]
        if bound := model.config.bound:
            units = bound * (1 - 2 / (np.exp(2 * units / bound) + 1))
        return anomaly_map(torch.from_numpy(units)[None], (64, 64), 3.0).max().item()

    scores = np.array([score(map_, number) for number, map_ in enumerate(own)])
    shift = 0.0
    if count > 1:
        differences = []
        for number in range(0, len(fresh), -(-len(fresh) // limit)):
            image = fresh[number]
            neighbour = (folds[image] + 1) % count
            seen = [head for head in range(heads) if head % count == neighbour]
            assert all(image not in left_out[head] for head in seen)
            everyone = score(units[:, image].mean(axis=0), number)
            differences.append(everyone - score(units[seen, image].mean(axis=0), number))
        shift = float(np.median(differences))
    scores += shift
    threshold = np.sort(scores)[-max(1, int(false_alarms * (len(scores) + 1)))]
    result = {"centre": centre, "spread": spread, "level": level, "scale": scale}
    return result | {"own": scores, "fresh": fresh, "shift": shift, "threshold": threshold}


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have six images be enough for units at every position of a small map."""
    monkeypatch.setattr(training_module, "POSITION_IMAGES", 6)
    monkeypatch.setattr(training_module, "SCALE_SIDE", 5)


@pytest.mark.usefixtures("few")
@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(
    ("heads", "false_alarms", "limit"), [(6, 0.0, 50), (3, 0.0, 2), (2, 0.45, 50), (1, 0.0, 50)]
)
def test_calibration_by_hand(
    heads: int, false_alarms: float, limit: int, positions: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training_module, "SHIFT_IMAGES", limit)
    count = min(heads, 3)
    folds = np.arange(11) % count if heads > 1 else np.array([-1, 0, -1, -1, 0, 0, 0, -1, 0, -1, 0])
    changes = {"position_units": positions, "bound": 1.5 if positions else 0.0}
    model = units_of(heads=heads, false_alarms=false_alarms, **changes)
    values = random_maps(11)
    expected = by_hand(
        model, values, folds, false_alarms=false_alarms, limit=limit, positions=positions
    )
    scores = calibrate(model, feature_maps(values), folds)
    for name in ("centre", "spread", "level", "scale"):
        np.testing.assert_allclose(
            getattr(model, name).numpy(), expected[name], rtol=2e-3, atol=2e-4, err_msg=name
        )
    typical, threshold = float(np.median(expected["own"])), float(expected["threshold"])
    assert threshold > typical + 0.01
    assert (abs(expected["shift"]) > 0.01) == (heads > 1)
    assert model.typical == pytest.approx(typical, abs=2e-3)
    assert model.threshold == pytest.approx(threshold, abs=2e-3)
    # A training photo is scored if some head has not seen it; the highest is the threshold.
    assert np.isfinite(scores).tolist() == (folds >= 0).tolist()
    in_units = (expected["own"] - typical) / (threshold - typical)
    np.testing.assert_allclose(scores[expected["fresh"]], in_units, rtol=5e-4, atol=1e-2)
    assert np.nanmedian(scores) == pytest.approx(0, abs=1e-5)
    if not false_alarms:
        assert np.nanmax(scores) == pytest.approx(1, abs=1e-5)
    else:
        assert (scores > 1 + 1e-5).sum() == 4  # 5 of 12 is within 0.45


def test_few_images_say_nothing_of_single_positions() -> None:
    model, values = units_of(heads=2, bound=0.0), random_maps(20)
    calibrate(model, feature_maps(values[:19]), np.arange(19) % 2)
    assert (model.level == 0).all() and (model.scale == 1).all()
    unbounded = model.typical, model.threshold
    model = units_of(heads=2, bound=4.0)
    calibrate(model, feature_maps(values[:19]), np.arange(19) % 2)
    scale = model.scale.unique()
    assert (model.level == 0).all() and len(scale) == 1
    # No normal image comes near the bound: the scores are those without, in another unit.
    for found, expected in zip((model.typical, model.threshold), unbounded, strict=True):
        assert found * float(scale) == pytest.approx(expected, rel=0.03)
    calibrate(model, feature_maps(values), np.arange(20) % 2)
    assert (model.level != 0).all() and (model.scale != 1).all()


@pytest.mark.usefixtures("few")
def test_heads_that_agree_shift_nothing() -> None:
    """Equal heads, and folds of the same images: the own scores are the committee's."""
    model, values = units_of(heads=3, position_units=False, bound=0.0), random_maps(4)
    for head in model.heads:
        head.load_state_dict(model.heads[0].state_dict())
    values = np.concatenate([values] * 3)
    features, folds = feature_maps(values), np.arange(12) // 4
    scores = calibrate(model, features, folds)
    expected = by_hand(model, values, folds, positions=False)
    assert expected["shift"] == pytest.approx(0, abs=1e-12)
    maps = cached_maps(model, features, range(12))
    assert maps.shape == (12, 64, 64)
    np.testing.assert_allclose(scores, maps.amax(dim=(1, 2)).numpy(), atol=1e-4)
    assert len(np.unique(scores.round(3))) == 4


@pytest.mark.usefixtures("few")
def test_maps_of_cached_features_are_those_of_predict() -> None:
    model, values = units_of(heads=3, neighbourhood=1), random_maps(6)
    features = feature_maps(values)
    calibrate(model, features, np.arange(6) % 3)
    with torch.inference_mode():
        layer = torch.from_numpy(values[[4, 1]]).float().permute(0, 3, 1, 2)
        scores = model.committee(model.score_maps([layer]))
        expected = model.in_units(anomaly_map(scores, (64, 64), 3.0))
    assert expected.std() > 0.1 and model.level.std() > 0.01
    torch.testing.assert_close(cached_maps(model, features, [4, 1]), expected, rtol=0, atol=1e-3)


def test_few_photos_promise_no_more_than_they_hold() -> None:
    """The highest of 24 scores: about one new photo in 25 lies above it, level and scale or not."""
    model, folds = units_of(heads=5), np.arange(24) % 5
    for head in model.heads:  # heads that differ a lot make the threshold too careful
        head.load_state_dict(model.heads[0].state_dict())
    rates = []
    for draw in range(20):
        maps = random_maps(24 + 50, seed=draw)
        calibrate(model, feature_maps(maps[:24]), folds)
        fresh = cached_maps(model, feature_maps(maps[24:]), range(50))
        rates.append((fresh.amax(dim=(1, 2)) > 1).float().mean().item())
    # 0.04 on average, give or take 0.01; 0.07 with level and scale from the very same photos.
    assert 0.01 < np.mean(rates) < 0.055


def test_one_score_still_makes_a_threshold() -> None:
    """One image, or several that are alike, say nothing of how far scores spread."""
    model, values = units_of(heads=1), random_maps(3)
    scores = calibrate(model, feature_maps(values), np.array([-1, 0, -1]))
    assert model.threshold == model.typical + 1
    assert scores[1] == 0 and np.isnan(scores[[0, 2]]).all()
    model = units_of(heads=1)
    scores = calibrate(model, feature_maps(values[[0, 1, 1, 1]]), np.array([-1, 0, 0, 0]))
    assert model.threshold == model.typical + 1
    assert scores[1:].tolist() == [0, 0, 0]


# From images to a detector ------------------------------------------------------------


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> ImageFiles:
    folder = tmp_path_factory.mktemp("normal")
    random = np.random.default_rng(0)
    samples = []
    for number in range(12):
        path = folder / f"{number:03d}.png"
        pixels = random.normal(120, 30, size=(40, 40, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(path)
        samples.append(Sample(path, "good"))
    return ImageFiles(samples, make_transform(64, 64))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "resnet18.pth"
    torch.save(resnet18().state_dict(), path)
    return path


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Config:
    cache = tmp_path_factory.getbasetemp() / "cache"  # one for all tests
    monkeypatch.setenv("SIMPLENET_CACHE", str(cache))
    return toy(steps=12, **NETWORK)


def test_train_end_to_end(
    dataset: ImageFiles, weights: Path, small: Config, tmp_path: Path
) -> None:
    first = train(dataset, small, weights=weights, progress=False)
    assert first.history.loss.shape == (12,)
    assert not first.model.training
    # Every image was scored by heads that have not seen it, and the highest is the threshold.
    assert first.scores.shape == (12,)
    assert first.scores.max() == pytest.approx(1, abs=1e-5)
    assert np.median(first.scores) == pytest.approx(0, abs=1e-5)
    predictions = list(predict(first.model, dataset, progress=False))
    scores = [p.score for p in predictions]
    assert not any(p.unfamiliar for p in predictions)
    # Same seed, same bits, through a file as well.
    second = train(dataset, small, weights=weights, progress=False)
    assert np.array_equal(first.scores, second.scores)
    first.model.save(tmp_path / "first")
    second.model.save(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    loaded = SimpleNet.load(tmp_path / "first", weights)
    assert [p.score for p in predict(loaded, dataset, progress=False)] == scores


def test_a_single_head_is_scored_on_the_tenth_it_has_not_seen(
    dataset: ImageFiles, weights: Path, small: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its scores are those that `predict` gives: there is nothing to shift."""
    one = dataclasses.replace(small, heads=1, emphasis=0.0)
    more = ImageFiles(dataset.samples * 3, dataset.transform)  # 36 photos, so 4 of them
    trained = train(more, one, weights=weights, progress=False)
    left_out = np.flatnonzero(split_images(36, 1, one.seed) == 0)
    assert np.flatnonzero(np.isfinite(trained.scores)).tolist() == left_out.tolist()
    assert len(left_out) == 4
    scores = np.array([p.score for p in predict(trained.model, more, progress=False)])
    np.testing.assert_allclose(scores[left_out], trained.scores[left_out], atol=0.02)
    assert scores[left_out].max() == pytest.approx(1, abs=0.02)


def test_a_state_of_other_images_is_refused(
    dataset: ImageFiles,
    weights: Path,
    small: Config,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "training.safetensors"
    with monkeypatch.context() as patch:
        stop_at(5, patch)
        with pytest.raises(KeyboardInterrupt):
            train(dataset, small, weights=weights, checkpoint=path, progress=False)
    others = ImageFiles(dataset.samples[::-1], dataset.transform)
    with pytest.raises(SimpleNetError, match="another configuration, weights or images"):
        train(others, small, weights=weights, checkpoint=path, progress=False)
    for change in ({"sigma": 0.25}, {"heads": 2}, {"averaging": 0.0}):
        changed = dataclasses.replace(small, **change)
        with pytest.raises(SimpleNetError, match="another configuration, weights or images"):
            train(dataset, changed, weights=weights, checkpoint=path, progress=False)
    resumed = train(dataset, small, weights=weights, checkpoint=path, progress=False)
    undisturbed = train(dataset, small, weights=weights, progress=False)
    assert_same_bits(resumed.model.trained_state(), undisturbed.model.trained_state())
    assert torch.equal(resumed.history.loss, undisturbed.history.loss)
    assert resumed.model.threshold == undisturbed.model.threshold
    assert resumed.model.typical == undisturbed.model.typical
    assert np.array_equal(resumed.scores, undisturbed.scores)


def test_defects_are_not_trained_on(dataset: ImageFiles, small: Config) -> None:
    samples = [*dataset.samples, Sample(dataset.samples[0].image, "hole")]
    with pytest.raises(ValueError, match="normal images only"):
        train(ImageFiles(samples, dataset.transform), small)
