"""Training: batches, determinism, being stopped at any moment, and the threshold."""

import dataclasses
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
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
from simplenet_lib.localization import predict
from simplenet_lib.model import Head, SimpleNet, read_checkpoint, write_checkpoint
from simplenet_lib.training import fit, shuffled_positions, split_images, train

CHANNELS = 5
IDENTITY = {"format": "simplenet-2", "config": "toy"}
IMAGES = [0, 1, 3]


def toy(**changes: Any) -> Config:
    values = {"adaptor_channels": 6, "hidden_channels": 4, "steps": 120, "batch_size": 16}
    return preset("fast", **{**values, "adaptor_lr": 1e-2, "discriminator_lr": 2e-2, **changes})


def toy_features() -> np.ndarray:
    """Four images of 3x4 positions, channels of different scale."""
    random = np.random.default_rng(0)
    return (random.normal(size=(4, 3, 4, CHANNELS)) * [1, 2, 5, 0.1, 1]).astype(np.float16)


def new_head(config: Config) -> Head:
    torch.manual_seed(config.seed)
    return Head(CHANNELS, config)


def fit_toy(checkpoint: Path | None = None, config: Config | None = None) -> dict[str, Tensor]:
    """Train and return everything that came of it: the head's state and the curves."""
    config = config or toy()
    head = new_head(config)
    history = fit(head, toy_features(), IMAGES, config, checkpoint, IDENTITY, progress=False)
    return {**head.state_dict(), **dataclasses.asdict(history)}


def assert_same_bits(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


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


@given(count=st.integers(2, 300), holdout=st.floats(0, 0.9), seed=st.integers(0, 2**31 - 1))
def test_split_is_disjoint_complete_and_seeded(count: int, holdout: float, seed: int) -> None:
    training, held_out = split_images(count, holdout, seed)
    assert sorted(training + held_out) == list(range(count))
    assert training == sorted(training)
    assert len(training) >= 1
    assert len(held_out) >= 1
    assert abs(len(held_out) - holdout * count) <= 1
    assert split_images(count, holdout, seed) == (training, held_out)


def test_split_depends_on_the_seed_and_needs_two_images() -> None:
    assert len({tuple(split_images(50, 0.1, seed)[1]) for seed in range(5)}) == 5
    assert split_images(2, 0.9, 0)[0]
    for count in (0, 1):
        with pytest.raises(SimpleNetError, match=f"{count} normal image: at least 2"):
            split_images(count, 0.1, 0)


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


# Fit ----------------------------------------------------------------------------------


def test_same_seed_same_bits(undisturbed: dict[str, Tensor]) -> None:
    assert_same_bits(undisturbed, fit_toy())
    other = fit_toy(config=toy(seed=1))
    assert not torch.equal(other["loss"], undisturbed["loss"])


def test_first_step_by_hand() -> None:
    """One step of plain Adam changes every parameter by its learning rate, against its gradient."""
    config = toy(steps=1, standardise=False, batchnorm=False, batch_size=36)
    head, before = new_head(config), new_head(config)
    features = toy_features()
    history = fit(head, features, IMAGES, config, progress=False)
    # One batch of 36 is every position of the three images, in whatever order.
    vectors = torch.from_numpy(features[IMAGES].reshape(-1, CHANNELS)).float()
    normal = -before(vectors[:, :, None, None]).flatten()
    assert history.normal.item() == pytest.approx((normal > 0.5).float().mean().item())
    order = next(shuffled_positions(36, 36, config.seed, 0))
    noise = torch.Generator().manual_seed(0)
    normal, noisy = before.normal_and_noisy(vectors[order][:, :, None, None], noise)
    loss = torch.clamp(0.5 - normal, min=0).mean() + torch.clamp(0.5 + noisy, min=0).mean()
    assert history.loss.item() == pytest.approx(loss.item(), rel=1e-4)
    loss.backward()
    for old, new, rate, decay in (
        (before.adaptor.conv.weight, head.adaptor.conv.weight, config.adaptor_lr, 0.01),
        (before.discriminator.score.weight, head.discriminator.score.weight, 2e-2, 0.0),
    ):
        clear = old.grad.abs() > 1e-3
        assert clear.any()
        expected = old * (1 - rate * decay) - rate * old.grad.sign()
        torch.testing.assert_close(new[clear], expected[clear], rtol=0, atol=1e-4 * rate + 1e-6)


def test_images_held_out_are_never_read() -> None:
    config, features = toy(steps=20), toy_features()
    expected = new_head(config)
    fit(expected, features, IMAGES, config, progress=False)
    features[2] = np.nan
    head = new_head(config)
    fit(head, features, IMAGES, config, progress=False)
    assert_same_bits(expected.state_dict(), head.state_dict())


def test_loss_falls_and_shares_rise() -> None:
    random = np.random.default_rng(0)  # normal vectors lie on a plane, noise leaves it
    plane = random.normal(size=(8, 10, 10, 2)) @ random.normal(size=(2, 16))
    config = toy(steps=150, batch_size=256, adaptor_channels=32, hidden_channels=32, sigma=1.0)
    torch.manual_seed(0)
    head = Head(16, config)
    history = fit(head, plane.astype(np.float16), list(range(8)), config, progress=False)
    assert history.loss[0] > 0.5
    assert history.loss[-20:].mean() < 0.1
    for share in (history.normal, history.noisy):
        assert 0 <= share.min() <= share.max() <= 1
        assert share[-20:].mean() > share[:5].mean() + 0.3
    assert not head.training


def test_a_loss_that_is_not_finite_stops_with_the_reason(tmp_path: Path) -> None:
    config = toy(steps=5, adaptor_lr=10.0, standardise=False, batchnorm=False)
    head = new_head(config)
    head.discriminator.score.weight.data.fill_(3e38)
    with pytest.raises(
        SimpleNetError, match=r"the loss is (inf|nan) at step 1.*10, 0.02.*too high"
    ):
        fit(head, toy_features(), IMAGES, config, tmp_path / "c", IDENTITY, progress=False)
    assert not (tmp_path / "c").exists()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# Stopping and going on ----------------------------------------------------------------


def stop_at(step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Press Ctrl-C, for real, in the middle of a step."""
    calls = iter(range(10**6))
    loss = training_module.margin_loss

    def pressed(*args: Any) -> Tensor:
        if next(calls) == step:
            signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(training_module, "margin_loss", pressed)


@pytest.mark.parametrize("step", [0, 1, 49, 50, 77, 119])
def test_ctrl_c_keeps_the_state_and_the_bits(
    step: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Tensor]
) -> None:
    path = tmp_path / "training.safetensors"
    stop_at(step, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(path)
    assert read_checkpoint(path)[1]["step"] == str(step + 1)  # the running step was finished
    assert [p.name for p in tmp_path.iterdir()] == ["training.safetensors"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.undo()
    assert_same_bits(fit_toy(path), undisturbed)


def test_ctrl_c_without_a_checkpoint_just_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    stop_at(3, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        fit_toy()


def test_a_second_ctrl_c_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impatient(*args: Any) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    monkeypatch.setattr(training_module, "margin_loss", impatient)
    with pytest.raises(KeyboardInterrupt):
        fit_toy(tmp_path / "c")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_background_job_goes_on_ignoring_ctrl_c(
    monkeypatch: pytest.MonkeyPatch, undisturbed: dict[str, Tensor]
) -> None:
    loss = training_module.margin_loss

    def interrupted(*args: Any) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return loss(*args)

    monkeypatch.setattr(training_module, "margin_loss", interrupted)
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
    monkeypatch.setattr(training_module, "margin_loss", None)  # no step is made again
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
    short = toy(steps=done)
    head = new_head(short)
    history = fit(head, toy_features(), IMAGES, short, progress=False)
    for name, tensor in head.state_dict().items():
        assert torch.equal(tensor, tensors[f"head.{name}"]), name
    assert torch.equal(history.loss, tensors["curves"][:done, 0])


# Checkpoints that must be refused -----------------------------------------------------


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "training.safetensors"
    with monkeypatch.context() as patch:
        stop_at(10, patch)
        with pytest.raises(KeyboardInterrupt):
            fit_toy(path)
    return path


def refused(path: Path) -> str:
    with pytest.raises(SimpleNetError) as caught:
        fit_toy(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "Remove it to start anew" in message
    return message


def test_another_training_is_refused(kept: Path) -> None:
    tensors, metadata = read_checkpoint(kept)
    for change in ({"config": "other"}, {"surplus": "1"}):
        write_checkpoint(kept, tensors, {**metadata, **change})
        assert "another configuration, weights or images" in refused(kept)


def damage(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Tensor]], None]:
    def apply(tensors: dict[str, Tensor]) -> None:
        tensors[name] = change(tensors[name])

    return apply


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop("curves"), "(curves)"),
        (lambda tensors: tensors.pop("adaptor.0.exp_avg"), "(adaptor.0.exp_avg)"),
        (lambda tensors: tensors.pop("head.adaptor.conv.bias"), "(head.adaptor.conv.bias)"),
        (damage("curves", lambda t: t[0]), "curves is (3,)"),  # would broadcast silently
        (damage("adaptor.0.exp_avg", lambda t: t[:1]), "adaptor.0.exp_avg is (1, 5, 1, 1)"),
        (damage("adaptor.0.step", lambda t: t.long()), "torch.int64"),
        (damage("discriminator.0.exp_avg_sq", lambda t: t * torch.nan), "not finite"),
        (damage("head.standardise.std", lambda t: t * torch.inf), "not finite"),
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


# From images to a threshold -----------------------------------------------------------


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
    network = {"backbone": "resnet18", "layers": ("layer2",), "resize": 64, "crop": 64}
    return toy(steps=12, holdout=0.25, **network)


def test_train_end_to_end(
    dataset: ImageFiles, weights: Path, small: Config, tmp_path: Path
) -> None:
    first = train(dataset, small, weights=weights, progress=False)
    assert first.held_out == 3
    assert first.history.loss.shape == (12,)
    assert not first.model.training
    # The threshold is the highest score of the three held-out images, no other's.
    held_out = split_images(12, 0.25, small.seed)[1]
    scores = [p.score for p in predict(first.model, dataset, progress=False)]
    assert first.model.threshold == pytest.approx(max(scores[i] for i in held_out), rel=1e-2)
    maps = [p.map for p in predict(first.model, dataset, progress=False)]
    typical = np.median(np.stack([maps[i] for i in held_out]))
    assert first.model.typical == pytest.approx(float(typical), abs=1e-2)
    # Same seed, same bits, through a file as well.
    second = train(dataset, small, weights=weights, progress=False)
    first.model.save(tmp_path / "first")
    second.model.save(tmp_path / "second")
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    loaded = SimpleNet.load(tmp_path / "first", weights)
    assert [p.score for p in predict(loaded, dataset, progress=False)] == scores


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
    changed = dataclasses.replace(small, sigma=0.25)
    with pytest.raises(SimpleNetError, match="another configuration, weights or images"):
        train(dataset, changed, weights=weights, checkpoint=path, progress=False)
    resumed = train(dataset, small, weights=weights, checkpoint=path, progress=False)
    undisturbed = train(dataset, small, weights=weights, progress=False)
    assert_same_bits(resumed.model.head.state_dict(), undisturbed.model.head.state_dict())
    assert torch.equal(resumed.history.loss, undisturbed.history.loss)
    assert resumed.model.threshold == undisturbed.model.threshold


def test_defects_are_not_trained_on(dataset: ImageFiles, small: Config) -> None:
    samples = [*dataset.samples, Sample(dataset.samples[0].image, "hole")]
    with pytest.raises(ValueError, match="normal images only"):
        train(ImageFiles(samples, dataset.transform), small)
