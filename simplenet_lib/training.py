"""Chapter 7: train the head on cached features, so that it can be stopped and resumed."""

from __future__ import annotations

import hashlib
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor
from tqdm import tqdm

from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.dataset import ImageFiles
from simplenet_lib.download import sha256_of
from simplenet_lib.features import FeatureMaps, cached_features
from simplenet_lib.localization import anomaly_map, background, image_score, threshold
from simplenet_lib.loss import margin_loss
from simplenet_lib.model import Head, SimpleNet, check_tensors, read_checkpoint, write_checkpoint
from simplenet_lib.weights import find_weights

CHECKPOINT_EVERY = 50  # steps
BACKGROUND_IMAGES = 20  # normal images that say what a familiar image looks like, or more


@dataclass
class History:
    """How a training went, one row a step.

    Attributes
    ----------
    loss : Tensor
        Margin loss, (steps,).
    normal, noisy : Tensor
        Share of normal scores above +m and of noisy scores below -m, (steps,).
    """

    loss: Tensor
    normal: Tensor
    noisy: Tensor


@dataclass
class Trained:
    """Result of :func:`train`: the model, how it went, and where the time went (seconds)."""

    model: SimpleNet
    history: History
    held_out: int
    seconds_features: float
    seconds_training: float


def split_images(count: int, holdout: float, seed: int) -> tuple[list[int], list[int]]:
    """Split image indices into those trained on and those held out for the threshold.

    Raises
    ------
    SimpleNetError
        If there are fewer than two images.
    """
    if count < 2:
        raise SimpleNetError(
            f"{count} normal image: at least 2 are needed, one to train on and one to hold out"
            " for the threshold."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    held_out = min(max(1, round(holdout * count)), count - 1)
    return sorted(order[held_out:]), sorted(order[:held_out])


def shuffled_positions(count: int, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
    """Endless batches of positions from ``step`` on, every position once an epoch.

    The order of an epoch depends on the seed and its number alone, so a resumed
    training sees the same batches as an undisturbed one.
    """
    epoch, start = divmod(step * batch_size, count)

    def order(number: int) -> Tensor:
        return torch.randperm(
            count, generator=torch.Generator().manual_seed(seed * 1_000_003 + number)
        )

    pending = order(epoch)[start:]
    while True:
        while len(pending) < batch_size:
            epoch += 1
            pending = torch.cat([pending, order(epoch)])
        yield pending[:batch_size]
        pending = pending[batch_size:]


def fit(
    head: Head,
    features: FeatureMaps,
    images: list[int],
    config: Config,
    checkpoint: Path | None = None,
    identity: dict[str, str] | None = None,
    *,
    progress: bool = True,
) -> History:
    """Train adaptor and discriminator together on normal images (paper, section 3.5).

    Parameters
    ----------
    head : Head
        Changed in place; its standardisation is fitted first.
    features : FeatureMaps
        Cached features of all images, (n, h, w, C).
    images : list of int
        Indices of the images to train on.
    config : Config
        Steps, batch size, learning rates, margin and seed.
    checkpoint : Path, optional
        Where to keep the state of the training. If the file exists, the
        training goes on from there and ends with the same bits.
    identity : dict, optional
        Names the training; a checkpoint with another identity is refused.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    KeyboardInterrupt
        After Ctrl-C, once the step is finished and the state is kept.
    SimpleNetError
        If the loss is not finite, or the checkpoint belongs to something else.
    """
    device = head.standardise.mean.device
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adaptor": torch.optim.AdamW(head.adaptor.parameters(), lr=config.adaptor_lr),
        "discriminator": torch.optim.Adam(
            head.discriminator.parameters(), lr=config.discriminator_lr, weight_decay=1e-5
        ),
    }
    curves = torch.zeros(config.steps, 3)
    done = 0
    if checkpoint is not None and checkpoint.is_file():
        done = _resume(checkpoint, head, optimizers, curves, identity or {})
    if done == 0 and config.standardise:
        head.standardise.fit(features, images)

    _, height, width, channels = features.shape
    rows = features.reshape(-1, channels)
    first_row = torch.tensor(images) * (height * width)
    count = len(images) * height * width
    positions = shuffled_positions(count, config.batch_size, config.seed, done)
    noise = torch.Generator(device)
    head.train()
    with (
        _ctrl_c() as stopped,
        tqdm(total=config.steps, initial=done, desc="train", disable=not progress) as bar,
    ):
        for step in range(done, config.steps):
            batch = next(positions)
            index = first_row[batch // (height * width)] + batch % (height * width)
            vectors = torch.from_numpy(rows[index.numpy()]).to(device).float()
            # One image, one position wide and as high as the batch: (1, C, B, 1). A batch of
            # 1x1 images gives the same numbers, but its convolution takes twice as long.
            tall = vectors.T.contiguous()[None, :, :, None]
            noise.manual_seed(config.seed * 1_000_003 + step)
            normal, noisy = head.normal_and_noisy(tall, noise)
            loss = margin_loss(normal, noisy, config.margin)
            for optimizer in optimizers.values():
                optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            for optimizer in optimizers.values():
                optimizer.step()

            curves[step] = torch.stack(
                [
                    loss.detach(),
                    (normal > config.margin).float().mean(),
                    (noisy < -config.margin).float().mean(),
                ]
            )
            if not torch.isfinite(curves[step, 0]):
                raise SimpleNetError(
                    f"the loss is {curves[step, 0]} at step {step + 1}: the learning rates"
                    f" ({config.adaptor_lr:g}, {config.discriminator_lr:g}) are too high."
                )
            bar.update()
            done = step + 1
            # After the last step too: what follows the training may fail or be stopped.
            due = stopped.is_set() or done % CHECKPOINT_EVERY == 0 or done == config.steps
            if checkpoint is not None and due:
                _keep(checkpoint, head, optimizers, curves, done, identity or {})
            if stopped.is_set():
                raise KeyboardInterrupt
    head.eval()
    return History(*curves.T)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that the running step can finish."""
    stopped = threading.Event()
    background = signal.getsignal(signal.SIGINT) is signal.SIG_IGN  # as a shell starts `train &`
    if background or threading.current_thread() is not threading.main_thread():
        yield stopped  # only the main thread may handle signals
        return

    def remember(number: int, frame: FrameType | None) -> None:
        stopped.set()
        signal.signal(signal.SIGINT, before)  # a second Ctrl-C stops at once

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


def _keep(
    path: Path,
    head: Head,
    optimizers: dict[str, torch.optim.Optimizer],
    curves: Tensor,
    step: int,
    identity: dict[str, str],
) -> None:
    """Write everything the next step depends on; randomness depends on the step alone."""
    tensors = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    tensors["curves"] = curves
    for name, optimizer in optimizers.items():
        for number, moments in optimizer.state_dict()["state"].items():
            for moment, tensor in moments.items():
                tensors[f"{name}.{number}.{moment}"] = tensor
    write_checkpoint(path, tensors, {**identity, "step": str(step)})


def _resume(
    path: Path,
    head: Head,
    optimizers: dict[str, torch.optim.Optimizer],
    curves: Tensor,
    identity: dict[str, str],
) -> int:
    """Restore what :func:`_keep` wrote and return the number of steps done."""
    expected = {f"head.{name}": tensor for name, tensor in head.state_dict().items()}
    expected["curves"] = curves
    for name, optimizer in optimizers.items():
        for number, parameter in enumerate(optimizer.param_groups[0]["params"]):
            like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
            expected |= {f"{name}.{number}.{moment}": tensor for moment, tensor in like.items()}
    try:
        tensors, metadata = read_checkpoint(path)
        step = metadata.pop("step", "")
        if metadata != identity:
            raise SimpleNetError(
                f"{path}: belongs to a training with another configuration, weights or images."
            )
        check_tensors(tensors, expected, path)
        if not re.fullmatch("[0-9]{1,10}", step) or not 0 < int(step) <= len(curves):
            raise SimpleNetError(f"{path}: '{step[:20]}' is no step of this training.")
    except SimpleNetError as error:
        raise SimpleNetError(
            f"{error} Remove it to start anew, or choose another output folder."
        ) from error
    head.load_state_dict({name: tensors[f"head.{name}"] for name in head.state_dict()})
    curves.copy_(tensors["curves"])
    for name, optimizer in optimizers.items():
        state: dict[int, dict[str, Tensor]] = {}
        for key in (key for key in tensors if key.startswith(f"{name}.")):
            _, index, moment = key.split(".")
            state.setdefault(int(index), {})[moment] = tensors[key]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
    return int(step)


def train(
    dataset: ImageFiles,
    config: Config,
    *,
    weights: Path | None = None,
    device: str = "cpu",
    checkpoint: Path | None = None,
    progress: bool = True,
) -> Trained:
    """Train a detector on normal images: features, head, threshold.

    Parameters
    ----------
    dataset : ImageFiles
        Normal images only, under the transform that ``config`` asks for.
    config : Config
        The configuration.
    weights : Path, optional
        See :func:`simplenet_lib.weights.find_weights`.
    device : str
        ``"cpu"`` or ``"cuda"``.
    checkpoint : Path, optional
        See :func:`fit`.
    progress : bool
        Show progress bars on stderr.

    Raises
    ------
    ValueError
        If ``dataset`` holds a defect.
    SimpleNetError
        See :func:`fit`, :func:`~simplenet_lib.features.cached_features`.
    """
    if any(sample.label for sample in dataset.samples):
        raise ValueError("a training set holds normal images only")
    training, held_out = split_images(len(dataset), config.holdout, config.seed)
    model = SimpleNet(config, find_weights(config.backbone, weights)).to(device)

    start = time.perf_counter()
    features = cached_features(model.features, dataset, model.feature_key(), progress=progress)
    seconds_features = time.perf_counter() - start

    start = time.perf_counter()
    images = "".join(sha256_of(sample.image) for sample in dataset.samples)
    identity = {**model.identity(), "images": hashlib.sha256(images.encode()).hexdigest()}
    history = fit(model.head, features, training, config, checkpoint, identity, progress=progress)
    # Two or three held-out images would say too little of what an image looks like as a
    # whole; trained on or not hardly matters there, unlike for the threshold.
    familiar = [*held_out, *training][: max(BACKGROUND_IMAGES, len(held_out))]
    maps = cached_maps(model, features, familiar)
    model.background = float(background(maps).max())
    maps = maps[: len(held_out)]
    model.threshold = threshold(image_score(maps), config.quantile)
    model.typical = float(maps.median())
    seconds_training = time.perf_counter() - start
    return Trained(model.eval(), history, len(held_out), seconds_features, seconds_training)


@torch.inference_mode()
def cached_maps(model: SimpleNet, features: FeatureMaps, images: Sequence[int]) -> Tensor:
    """Anomaly maps, (len(images), H, W), of images whose features are cached."""
    device = model.head.standardise.mean.device
    maps = []
    for image in images:
        values = torch.from_numpy(features[image].copy()).to(device).float()
        scores = model.head(values.permute(2, 0, 1)[None])
        maps.append(anomaly_map(scores, model.config.crop, model.config.smoothing).cpu())
    return torch.cat(maps)
