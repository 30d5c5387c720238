"""Chapter 7: train heads on cached features, so that a training can be stopped and resumed."""

from __future__ import annotations

import math
import re
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.backends import mkldnn
from torch.overrides import TorchFunctionMode
from tqdm import tqdm

from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.dataset import ImageFiles, own_part, upright_size
from simplenet_lib.features import (
    FeatureMap,
    FeatureMaps,
    Standardise,
    around,
    at_once,
    cached_features,
    digest_of_images,
)
from simplenet_lib.localization import anomaly_map, image_score, scaled_maps, threshold
from simplenet_lib.loss import cross_entropy_loss, margin_loss
from simplenet_lib.model import (
    Head,
    SimpleNet,
    bounded,
    check_tensors,
    read_checkpoint,
    write_checkpoint,
)
from simplenet_lib.noise import random_seed
from simplenet_lib.weights import find_weights

CHECKPOINT_EVERY = 50  # steps
SPLIT, ORDER, NOISE = 1, 2, 3  # streams of random numbers
FOLDS = 5  # at most: a head is trained on four fifths of the images or more
POSITION_IMAGES = 20  # or more give every position a level and scale of its own
SCALE_SIDE = 15  # positions: a scale is measured over a square of so many, across and down
SHIFT_IMAGES = 50  # at most so many say how much lower the committee's scores lie
# Older releases of PyTorch do not tell.
PROCESSOR = str(getattr(torch.cpu, "get_capabilities", dict[str, str])().get("cpu_name", ""))
HAS_ONEDNN: bool = mkldnn.is_available()  # type: ignore[no-untyped-call]
USE_ONEDNN = HAS_ONEDNN and "Intel" not in PROCESSOR


@dataclass
class History:
    """How a training went, one row a step, the mean over all heads.

    Attributes
    ----------
    loss : Tensor
        The loss, (steps,).
    normal, noisy : Tensor
        Share of normal scores above +m and of noisy scores below -m, (steps,).

    Examples
    --------
    >>> history = History(torch.tensor([1.4, 0.9]), torch.zeros(2), torch.zeros(2))
    >>> bool(history.loss[-1] < history.loss[0])
    True
    """

    loss: Tensor
    normal: Tensor
    noisy: Tensor


@dataclass
class Trained:
    """Result of :func:`train`.

    Attributes
    ----------
    model : SimpleNet
        The trained detector.
    history : History
        How the training went.
    scores : ndarray
        Score of every training image, (n,), by the heads that have not seen it, on the
        scale of :class:`~simplenet_lib.localization.Prediction`. NaN for the images
        that a single head was trained on.
    seconds_features, seconds_training : float
        Where the time went.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> normal = AnomalyDataset(data, "nut", "train", make_transform(32, 32))
    >>> trained: Trained = train(normal, model.config, weights=weights_file, progress=False)
    >>> trained.scores.shape, trained.history.loss.shape  # images, steps
    ((6,), torch.Size([3]))
    """

    model: SimpleNet
    history: History
    scores: NDArray[np.float32]
    seconds_features: float
    seconds_training: float


def split_images(count: int, heads: int, seed: int) -> NDArray[np.int64]:
    """The fold of every image, (count,): images of fold f are kept from the heads of fold f.

    Head k belongs to fold k modulo the number of folds, at most FOLDS. A single head
    is trained without a tenth of the images, fold 0; the others have fold -1.

    Raises
    ------
    SimpleNetError
        If there are fewer than two images.

    Examples
    --------
    >>> folds = split_images(count=10, heads=5, seed=0)
    >>> np.bincount(folds).tolist()
    [2, 2, 2, 2, 2]
    >>> int((split_images(count=10, heads=1, seed=0) == 0).sum())
    1
    """
    if count < 2:
        raise SimpleNetError(
            f"{count} normal image: at least 2 are needed, so that one can be scored by a head"
            " that has not seen it."
        )
    order = np.random.default_rng(random_seed(seed, SPLIT)).permutation(count)
    folds = np.full(count, -1, dtype=np.int64)
    if heads == 1:
        folds[order[: max(1, round(count / 10))]] = 0
    else:
        folds[order] = np.arange(count) % min(FOLDS, heads, count)
    return folds


def heads_without(fold: int, folds: NDArray[np.int64], heads: int) -> list[int]:
    """The heads that are trained without the images of ``fold``.

    Examples
    --------
    >>> heads_without(1, split_images(count=10, heads=4, seed=0), heads=4)
    [1]
    """
    return list(range(fold, heads, int(folds.max()) + 1))


def shuffled_positions(count: int, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
    """Endless batches of positions from ``step`` on, every position once an epoch.

    The order of an epoch depends on the seed and its number alone, so a resumed
    training sees the same batches as an undisturbed one.

    Examples
    --------
    >>> positions = shuffled_positions(count=6, batch_size=3, seed=0, step=0)
    >>> sorted(torch.cat([next(positions), next(positions)]).tolist())
    [0, 1, 2, 3, 4, 5]
    """
    epoch, start = divmod(step * batch_size, count)

    def order(number: int) -> Tensor:
        generator = torch.Generator().manual_seed(random_seed(seed, ORDER, number))
        return torch.randperm(count, generator=generator)

    pending = order(epoch)[start:]
    while True:
        while len(pending) < batch_size:
            epoch += 1
            pending = torch.cat([pending, order(epoch)])
        yield pending[:batch_size]
        pending = pending[batch_size:]


def drawn_positions(weights: Tensor, batch_size: int, seed: int, step: int) -> Iterator[Tensor]:
    """Endless batches of positions from ``step`` on, each drawn in proportion to its weight.

    A batch depends on the seed and its step alone, as those of :func:`shuffled_positions`.

    Parameters
    ----------
    weights : Tensor
        One of every position, (count,), 0 or more and not all 0.

    Examples
    --------
    >>> positions = drawn_positions(torch.tensor([0.0, 1.0, 0.0]), batch_size=3, seed=0, step=0)
    >>> next(positions).tolist()
    [1, 1, 1]
    """
    ends = weights.double().cumsum(dim=0)
    while True:
        generator = torch.Generator().manual_seed(random_seed(seed, ORDER, step))
        places = ends[-1] * torch.rand(batch_size, generator=generator, dtype=torch.float64)
        yield torch.searchsorted(ends, places, right=True)
        step += 1


def norms_of(features: FeatureMap, standardise: Standardise) -> Tensor:
    """How far the features (h, w, C) of each position lie from their mean, (h, w), on the CPU.

    Examples
    --------
    >>> from simplenet_lib.features import Standardise
    >>> norms_of(np.ones((2, 3, 64), np.float16), Standardise(64)).unique()
    tensor([8.])
    """
    vectors = torch.from_numpy(features.copy()).to(standardise.mean.device).float()
    norms: Tensor = standardise(vectors).norm(dim=-1)
    return norms.cpu()


def fit(
    heads: Sequence[Head],
    standardise: Standardise,
    features: FeatureMaps,
    folds: NDArray[np.int64],
    config: Config,
    checkpoint: Path | None = None,
    identity: dict[str, str] | None = None,
    *,
    progress: bool = True,
) -> History:
    """Train adaptors and discriminators together on normal images (paper, section 3.5).

    All heads see the same batches, each without the positions of the images it
    leaves out, and each with noise of its own. Most positions of many products look
    alike, such as those of a plain background: with ``config.emphasis`` a position is drawn
    the more often, the further its features lie from their mean.

    Parameters
    ----------
    heads : sequence of Head
        Changed in place.
    standardise : Standardise
        Fitted first if the configuration asks for it.
    features : FeatureMaps
        Cached features of all images.
    folds : ndarray of int, (n,)
        Which images each head leaves out, see :func:`split_images`.
    config : Config
        Steps, batch size, learning rates, loss and seed.
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
        After Ctrl-C, once the steps under way are finished and the state is kept.
    SimpleNetError
        If the loss is not finite, or the checkpoint belongs to something else.

    Examples
    --------
    >>> from simplenet_lib.features import FeatureMaps, Standardise
    >>> values = list(np.random.default_rng(0).random((6, 8, 8, 64)).astype(np.float16))
    >>> features = FeatureMaps(values, np.zeros((6, 8), np.float32), list("abcdef"))
    >>> folds = split_images(6, heads=2, seed=0)
    >>> history = fit(model.heads, Standardise(64), features, folds, model.config, progress=False)
    >>> history.loss.shape
    torch.Size([3])
    """
    device = standardise.mean.device
    count = max(int(folds.max()) + 1, 1)
    images = np.flatnonzero(folds != 0) if count == 1 else np.arange(len(folds))
    if config.standardise:
        standardise.fit(features[int(image)] for image in images)
    optimizers = [optimizer_of(head, config) for head in heads]
    averages = [[tensor.detach().clone() for tensor in _averaged(head)] for head in heads]
    curves = torch.zeros(config.steps, 3)
    done = 0
    if checkpoint is not None and checkpoint.is_file():
        done = _resume(checkpoint, heads, optimizers, averages, curves, identity or {})

    _, height, width, _ = features.shape
    places = height * width
    if config.emphasis:
        norms = torch.stack([norms_of(features[int(image)], standardise) for image in images])
        weights = norms.flatten().pow(config.emphasis).clamp_min(1e-6)  # images all alike: all 0
        positions = drawn_positions(weights, config.batch_size, config.seed, done)
    else:
        positions = shuffled_positions(len(images) * places, config.batch_size, config.seed, done)

    def next_batch() -> tuple[NDArray[np.int64], Tensor]:
        batch = next(positions).numpy()
        image = images[batch // places]
        rows = features.vectors(image * places + batch % places)
        return folds[image], standardise(torch.from_numpy(rows).to(device).float())

    def one_step(
        number: int,
        step: int,
        before: Future[Tensor] | None,
        fold: NDArray[np.int64],
        vectors: Tensor,
    ) -> Tensor:
        if before is not None:
            before.result()
        head, optimizer = heads[number], optimizers[number]
        seen = torch.from_numpy(np.flatnonzero(fold != number % count)).to(device)
        if not len(seen):  # a small batch of nothing but what this head leaves out
            return torch.zeros(3)
        noise = torch.Generator(device)
        noise.manual_seed(random_seed(config.seed, NOISE, step, number))
        with OneDNN():
            normal, noisy = head.normal_and_noisy(vectors.index_select(0, seen), noise)
        loss = (
            margin_loss(normal, noisy, config.margin)
            if config.loss == "margin"
            else cross_entropy_loss(normal, noisy)
        )
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        _average(averages[number], head, config.averaging, step)
        right = (normal > config.margin).float().mean(), (noisy < -config.margin).float().mean()
        return torch.stack([loss.detach(), *right]).cpu()

    for head in heads:
        head.train()
    with (
        _ctrl_c() as stopped,
        _a_thread_each(len(heads)) as threads,
        tqdm(total=config.steps, initial=done, desc="train", disable=not progress) as bar,
    ):
        coming = next_batch()
        under_way: deque[list[Future[Tensor]]] = deque()  # a list a step, at most two of them

        def finish(but: int) -> None:
            """Wait for all steps under way but the last ones."""
            nonlocal done
            while len(under_way) > but:
                curve = torch.stack([job.result() for job in under_way.popleft()]).sum(dim=0)
                curves[done] = curve / len(heads)
                if not torch.isfinite(curves[done, 0]):
                    raise SimpleNetError(
                        f"the loss is {curves[done, 0]} at step {done + 1}: the learning rates"
                        f" ({config.adaptor_lr:g}, {config.discriminator_lr:g}) are too high."
                    )
                done += 1
                bar.update()

        for step in range(done, config.steps):
            before = under_way[-1] if under_way else [None] * len(heads)
            under_way.append(
                [threads.submit(one_step, k, step, before[k], *coming) for k in range(len(heads))]
            )
            coming = next_batch()
            finish(but=1)  # the next one begins before this one ends: no head waits for the others
            # After the last step too: what follows the training may fail or be stopped.
            due = (step + 1) % CHECKPOINT_EVERY == 0 or step + 1 == config.steps
            if due or stopped.is_set():
                finish(but=0)
                if checkpoint is not None:
                    _keep(checkpoint, heads, optimizers, averages, curves, done, identity or {})
                if stopped.is_set():
                    raise KeyboardInterrupt
    for head, average in zip(heads, averages, strict=True):
        head.eval()
        if config.averaging:
            with torch.no_grad():
                for tensor, mean in zip(_averaged(head), average, strict=True):
                    tensor.copy_(mean)
    return History(*curves.T)


class OneDNN(TorchFunctionMode):
    """Linear layers by oneDNN, as convolutions are, except on Intel's processors.

    PyTorch has MKL multiply matrices. That takes twice as long as oneDNN on AMD's
    processors, and three quarters of its time on Intel's.

    Examples
    --------
    >>> layer = torch.nn.Linear(64, 2)
    >>> vectors = torch.randn(8, 64)
    >>> with OneDNN():
    ...     values = layer(vectors)
    >>> torch.allclose(values, layer(vectors), atol=1e-5)
    True
    """

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Compute ``function``, with inputs that tell PyTorch to use oneDNN if it is linear."""
        if function is F.linear and args[0].device.type == "cpu" and USE_ONEDNN:
            vectors, *parameters = args
            return function(vectors.to_mkldnn(), *parameters).to_dense()
        return function(*args, **(kwargs or {}))


def optimizer_of(head: Head, config: Config) -> torch.optim.Optimizer:
    """AdamW with the published learning rates and weight decays of the two parts.

    Examples
    --------
    >>> optimizer = optimizer_of(model.heads[0], model.config)
    >>> [group["lr"] for group in optimizer.param_groups]
    [0.0003, 0.0006]
    """
    adaptor = {"params": [*head.adaptor.parameters()], "lr": config.adaptor_lr}
    discriminator = {"params": [*head.discriminator.parameters()], "lr": config.discriminator_lr}
    return torch.optim.AdamW([adaptor, discriminator | {"weight_decay": 1e-5}], fused=True)


def _averaged(head: Head) -> list[Tensor]:
    """The tensors that are averaged over the last steps: parameters, BatchNorm's statistics."""
    tensors = [*head.parameters(), *head.buffers()]
    return [tensor for tensor in tensors if tensor.is_floating_point()]


@torch.no_grad()
def _average(averages: list[Tensor], head: Head, decay: float, step: int) -> None:
    """Move the averaged weights towards the present ones; the first steps count for less."""
    if decay:
        weight = 1 - min(decay, (1 + step) / (10 + step))
        for mean, tensor in zip(averages, _averaged(head), strict=True):
            mean.lerp_(tensor, weight)


@contextmanager
def _a_thread_each(heads: int) -> Iterator[ThreadPoolExecutor]:
    """Threads in which PyTorch computes on one core each; a single head has all cores.

    The heads share nothing, so a core for each is faster than all cores for one after
    the other. And the results no longer depend on the number of cores.
    """
    cores = torch.get_num_threads()
    torch.set_num_threads(cores if heads == 1 else 1)
    try:
        with ThreadPoolExecutor(min(heads, cores)) as threads:
            yield threads
    finally:
        torch.set_num_threads(cores)


@contextmanager
def _ctrl_c() -> Iterator[threading.Event]:
    """Turn the first Ctrl-C into an event, so that the steps under way can finish."""
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


def _state(
    heads: Sequence[Head], averages: list[list[Tensor]], curves: Tensor
) -> dict[str, Tensor]:
    """The tensors of a training that its optimisers do not hold, by name."""
    state = {"curves": curves}
    for number, (head, average) in enumerate(zip(heads, averages, strict=True)):
        state |= {f"heads.{number}.{name}": value for name, value in head.state_dict().items()}
        state |= {f"averages.{number}.{place}": value for place, value in enumerate(average)}
    return state


def _keep(
    path: Path,
    heads: Sequence[Head],
    optimizers: Sequence[torch.optim.Optimizer],
    averages: list[list[Tensor]],
    curves: Tensor,
    step: int,
    identity: dict[str, str],
) -> None:
    """Write everything the next step depends on; randomness depends on the step alone."""
    tensors = _state(heads, averages, curves[:step])
    for number, optimizer in enumerate(optimizers):
        for place, moments in optimizer.state_dict()["state"].items():
            for moment, tensor in moments.items():
                tensors[f"optimizers.{number}.{place}.{moment}"] = tensor
    write_checkpoint(path, tensors, {**identity, "step": str(step)})


def _resume(
    path: Path,
    heads: Sequence[Head],
    optimizers: Sequence[torch.optim.Optimizer],
    averages: list[list[Tensor]],
    curves: Tensor,
    identity: dict[str, str],
) -> int:
    """Restore what :func:`_keep` wrote and return the number of steps done."""
    try:
        tensors, metadata = read_checkpoint(path)
        step = metadata.pop("step", "")
        if metadata != identity:
            raise SimpleNetError(
                f"{path}: belongs to a training with another configuration, weights or images."
            )
        if not re.fullmatch("[0-9]{1,10}", step) or not 0 < int(step) <= len(curves):
            raise SimpleNetError(f"{path}: '{step[:20]}' is no step of this training.")
        state = _state(heads, averages, curves[: int(step)])
        expected = dict(state)
        for number, head in enumerate(heads):
            for place, parameter in enumerate(head.parameters()):
                like = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
                expected |= {f"optimizers.{number}.{place}.{name}": like[name] for name in like}
        check_tensors(tensors, expected, path)
    except SimpleNetError as error:
        raise SimpleNetError(
            f"{error} Remove it to start anew, or choose another output folder."
        ) from error
    with torch.no_grad():
        for name, tensor in state.items():
            tensor.copy_(tensors[name])
    for number, optimizer in enumerate(optimizers):
        moments: dict[int, dict[str, Tensor]] = {}
        prefix = f"optimizers.{number}."
        for key in (key for key in tensors if key.startswith(prefix)):
            index, moment = key.removeprefix(prefix).split(".")
            moments.setdefault(int(index), {})[moment] = tensors[key]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
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
    """Train a detector on normal images: features, committee, units and threshold.

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

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> normal = AnomalyDataset(data, "nut", "train", make_transform(32, 32))
    >>> trained = train(normal, model.config, weights=weights_file, progress=False)
    >>> trained.model.threshold > trained.model.typical
    True
    """
    if any(sample.label for sample in dataset.samples):
        raise ValueError("a training set holds normal images only")
    folds = split_images(len(dataset), config.heads, config.seed)
    model = SimpleNet(config, find_weights(config.backbone, weights)).to(device)

    start = time.perf_counter()
    features = cached_features(
        model.features, dataset, model.feature_key(), tile=config.tile, progress=progress
    )
    seconds_features = time.perf_counter() - start

    start = time.perf_counter()
    model.images = digest_of_images(features.digests)
    model.photos = {digest[: model.PHOTO_DIGEST] for digest in features.digests}
    identity = {**model.identity(), "images": model.images}
    history = fit(
        model.heads,
        model.standardise,
        features,
        folds,
        config,
        checkpoint,
        identity,
        progress=progress,
    )
    model.drift.fit(torch.from_numpy(features.descriptions).to(device))
    own = [own_part(*upright_size(sample.image), config) for sample in dataset.samples]
    scores = calibrate(model.eval(), features, folds, own)
    return Trained(model, history, scores, seconds_features, time.perf_counter() - start)


@torch.inference_mode()
def score_maps(
    model: SimpleNet, features: FeatureMaps, images: Sequence[int], heads: Sequence[int]
) -> Tensor:
    """Score maps -D(z) of some heads on some cached images, (len(heads), len(images), h, w).

    Examples
    --------
    >>> from simplenet_lib.features import FeatureMaps
    >>> values = list(np.random.default_rng(0).random((6, 8, 8, 64)).astype(np.float16))
    >>> features = FeatureMaps(values, np.zeros((6, 8), np.float32), list("abcdef"))
    >>> score_maps(model, features, images=range(6), heads=[0, 1]).shape
    torch.Size([2, 6, 8, 8])
    """
    weight, bias = model.hidden_layer(heads)
    maps, count = [], at_once(model.config.tile)
    for start in range(0, len(images), count):
        some = torch.from_numpy(features[list(images[start : start + count])])
        channels_first = some.to(weight.device).float().permute(0, 3, 1, 2)
        hidden = F.conv2d(channels_first, weight[:, :, None, None], bias)
        maps.append(model.after_hidden_layer(hidden.permute(0, 2, 3, 1), heads))
    return torch.cat(maps, dim=1)


@torch.inference_mode()
def cached_maps(model: SimpleNet, features: FeatureMaps, images: Sequence[int]) -> Tensor:
    """Anomaly maps, (len(images), H, W), of images whose features are cached.

    Examples
    --------
    >>> from simplenet_lib.features import FeatureMaps
    >>> values = list(np.random.default_rng(0).random((6, 8, 8, 64)).astype(np.float16))
    >>> features = FeatureMaps(values, np.zeros((6, 8), np.float32), list("abcdef"))
    >>> cached_maps(model, features, range(6)).shape
    torch.Size([6, 32, 32])
    """
    scores = model.committee(score_maps(model, features, images, range(len(model.heads))))
    return scaled_maps(scores, model.config, model.typical, model.threshold)


def without_each(values: Tensor) -> Tensor:
    """For each of n values, (n, ...), the mean of all the others.

    Examples
    --------
    >>> without_each(torch.tensor([1.0, 2.0, 6.0]))
    tensor([4.0000, 3.5000, 1.5000])
    """
    return (values.sum(dim=0, keepdim=True) - values) / (len(values) - 1)


@torch.inference_mode()
def calibrate(
    model: SimpleNet,
    features: FeatureMaps,
    folds: NDArray[np.int64],
    own: Sequence[tuple[slice, slice]] | None = None,
) -> NDArray[np.float32]:
    """Give the model its units: what normal images score in heads that have not seen them.

    A photo's own score is that of the heads that were trained without it. A new photo's
    is that of all heads, in which more of their noise cancels, so that its maximum lies
    lower. How much lower is measured on the same photos, beside as many heads that have
    seen them, and taken off.

    Of photos that come in no particular order, the rule that compares a new photo with
    each of n others in the very heads that have not seen that one calls at most
    2 / (n + 1) + (1 - F / n) / (F + 1) of normal ones anomalous, with F folds (Barber et
    al., theorem 4), and about 1 / (n + 1) in practice. The rule here, one mean of all
    heads and one shift, is simpler and has no such proof. The README says how many false
    alarms were measured.

    The level and scale of a position come from the same photos. Measured on a photo itself
    they would make it look more normal than a new one: so each photo's score is taken with
    the level and scale of all the others.

    Parameters
    ----------
    model : SimpleNet
        Its centre, spread, level, scale, typical score and threshold are set.
    features : FeatureMaps
        Cached features of all training images.
    folds : ndarray of int, (n,)
        See :func:`split_images`.
    own : sequence of (slice, slice), optional
        The part of each anomaly map that shows the photo itself, see
        :func:`simplenet_lib.dataset.own_part`; the whole maps without it.

    Returns
    -------
    ndarray
        See :class:`Trained`, ``scores``.

    References
    ----------
    Barber, Candès, Ramdas, Tibshirani: Predictive inference with the jackknife+, Annals of
    Statistics 49, 2021. Kim, Xu, Barber: Predictive inference is free with the
    jackknife+-after-bootstrap, NeurIPS 2020.

    Examples
    --------
    >>> from simplenet_lib.features import FeatureMaps
    >>> values = list(np.random.default_rng(0).random((6, 8, 8, 64)).astype(np.float16))
    >>> features = FeatureMaps(values, np.zeros((6, 8), np.float32), list("abcdef"))
    >>> scores = calibrate(model, features, split_images(6, heads=2, seed=0))
    >>> round(float(np.median(scores)), 3), round(float(scores.max()), 3)
    (0.0, 1.0)
    """
    config = model.config
    count = int(folds.max()) + 1
    groups = [heads_without(fold, folds, len(model.heads)) for fold in range(count)]
    fresh = np.flatnonzero(folds >= 0)
    # A mean of more heads is steadier: every photo is scored by equally many.
    size = len(model.heads) // count

    def mean_of(maps: Tensor, heads: list[int]) -> Tensor:
        centre, spread = (of[heads, None, None, None] for of in (model.centre, model.spread))
        return ((maps - centre) / spread).mean(dim=0)

    means = model.level.new_zeros(len(folds), *model.level.shape)
    for fold, group in enumerate(groups):
        images = np.flatnonzero(folds == fold)
        scores = score_maps(model, features, images.tolist(), group)
        model.centre[group] = scores.mean(dim=(1, 2, 3))
        model.spread[group] = scores.std(dim=(1, 2, 3)).clamp_min(1e-6)
        means[images] = mean_of(scores[:size], group[:size])
    means = means[fresh]
    level, scale = model.level, model.scale
    levels, scales = level.expand_as(means), scale.expand_as(means)
    # Of few images level and scale would fit themselves: none of these could score high.
    if config.position_units and len(fresh) >= POSITION_IMAGES:
        levels = around(without_each(means)[:, None], 3)[:, 0]
        # Third powers: what counts are the highest scores, which become false alarms.
        powers = around((means - levels)[:, None], 3).clamp_min(0).pow(3)
        powers = around(powers, SCALE_SIDE)[:, 0]
        scales = without_each(powers).pow(1 / 3).clamp_min(1e-6)
        level.copy_(around(means.mean(dim=0)[None, None], 3)[0, 0])
        scale.copy_(powers.mean(dim=0).pow(1 / 3).clamp_min(1e-6))
    elif config.bound:  # one scale for all, on which no normal image comes near the bound
        scale.fill_(max(float(means.max()), 1e-6))
        scales = scale.expand_as(means)

    def image_score_of(scores: Tensor, number: int) -> float:
        units = bounded((scores - levels[number]) / scales[number], config.bound)
        maps = anomaly_map(units[None], config.seen, config.smoothing)
        rows, columns = own[fresh[number]] if own else (slice(None), slice(None))
        return image_score(maps[:, rows, columns]).item()

    values = np.array([image_score_of(scores, number) for number, scores in enumerate(means)])
    if count > 1:
        every = list(range(len(model.heads)))
        some = range(0, len(fresh), math.ceil(len(fresh) / SHIFT_IMAGES))
        maps = score_maps(model, features, fresh[list(some)].tolist(), every)
        whole = mean_of(maps, every)
        parts = [mean_of(maps[group[:size]], group[:size]) for group in groups]
        shifts = []
        for place, number in enumerate(some):
            seen = parts[(folds[fresh[number]] + 1) % count]
            shifts.append(
                image_score_of(whole[place], number) - image_score_of(seen[place], number)
            )
        values += float(np.median(shifts))
    model.typical = float(np.median(values))
    model.threshold = threshold(torch.from_numpy(values), config.false_alarms)
    if model.threshold <= model.typical:  # a single image, or all alike
        model.threshold = model.typical + 1.0
    result = np.full(len(folds), np.nan, dtype=np.float32)
    result[fresh] = model.in_units(torch.from_numpy(values)).numpy()
    return result
