"""Chapter 2: features of a frozen, pretrained backbone, and a cache of them on disk."""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from tqdm import tqdm

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import ImageFiles
from simplenet_lib.download import sha256_of
from simplenet_lib.weights import Weights, torchvision_url

FEATURE_BATCH = 8
CACHE_LIMIT_BYTES = 32 * 10**9


def build_backbone(name: str, weights: Weights) -> models.ResNet:
    """A torchvision ResNet that holds ``weights`` and strides where they want it.

    Raises
    ------
    SimpleNetError
        If the backbone is unknown or the weights are another network's.
    """
    torchvision_url(name)  # refuses names outside the ResNet family
    network: models.ResNet = models.get_model(name)
    try:
        network.load_state_dict(weights.state)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise SimpleNetError(f"{weights.source}: not the weights of {name} ({reason})") from error
    if weights.strides == "conv1":
        for stage in (network.layer2, network.layer3, network.layer4):
            stage[0].conv1.stride, stage[0].conv2.stride = (2, 2), (1, 1)
    return network


def fold_batchnorm(network: nn.Module) -> None:
    """Merge each BatchNorm into the convolution before it, as it works in evaluation mode.

    There it multiplies every channel by a constant and adds another, and so can
    the convolution. What comes out is the same up to rounding, in less time, and
    no statistics are left that training mode could move.
    """
    network.eval()
    for parent in list(network.modules()):
        for (name, conv), (norm_name, norm) in pairwise(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


class FrozenFeatures(nn.Module):
    """Outputs of a frozen backbone's layers on one grid (paper, section 3.1).

    The first layer sets the grid. A finer layer is averaged down to it; then
    every layer is averaged over a neighbourhood of positions; a coarser layer is
    interpolated up to it; and all are joined along the channels. No parameter
    is trained, and BatchNorm is folded into the convolutions: nothing can change.

    Parameters
    ----------
    backbone : str
        A torchvision ResNet by name.
    layers : sequence of str
        Some of ``"layer1"`` to ``"layer4"``; the first one sets the grid.
    weights : Weights
        The pretrained parameters, from :func:`simplenet_lib.weights.find_weights`.
    neighbourhood : int
        Odd side of the averaged neighbourhood, in positions; 1 for none.

    Attributes
    ----------
    channels : int
        Channels C of the output, for ResNet-50's layer2 and layer3 512 + 1024.
    """

    def __init__(
        self, backbone: str, layers: Sequence[str], weights: Weights, neighbourhood: int = 1
    ) -> None:
        super().__init__()
        network = build_backbone(backbone, weights)
        fold_batchnorm(network)
        known = ("layer1", "layer2", "layer3", "layer4")
        for layer in layers:
            if layer not in known:
                raise SimpleNetError(f"unknown layer '{layer}'. Known: {', '.join(known)}.")
        self.extractor = create_feature_extractor(network, {layer: layer for layer in layers})
        self.extractor.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.layers = tuple(layers)
        self.neighbourhood = neighbourhood
        last_blocks = [getattr(network, layer)[-1] for layer in layers]
        self.channels = sum(
            getattr(block, "conv3", block.conv2).out_channels for block in last_blocks
        )

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to features (N, C, h, w)."""
        outputs = self.extractor(images.contiguous(memory_format=torch.channels_last))
        size = outputs[self.layers[0]].shape[-2:]
        maps = []
        for layer in self.layers:
            features = outputs[layer]
            if features.shape[-1] > size[-1]:
                features = F.adaptive_avg_pool2d(features, size)
            if self.neighbourhood > 1:
                features = F.avg_pool2d(
                    features,
                    self.neighbourhood,
                    stride=1,
                    padding=self.neighbourhood // 2,
                    count_include_pad=False,
                )
            if features.shape[-1] < size[-1]:
                features = F.interpolate(features, size, mode="bilinear", align_corners=False)
            maps.append(features)
        return torch.cat(maps, dim=1)


class Standardise(nn.Module):
    """Give every channel mean 0 and deviation about 1 over the normal images, and bound it.

    Some channels are almost always 0 and fire on a few positions. Divided by
    their tiny deviation alone, these would reach hundreds and upset every batch
    they are in. So 0.3 times the mean deviation of all channels is added to each
    deviation, and the result is clipped to ±3. Until :meth:`fit` features pass
    unchanged.

    Parameters
    ----------
    channels : int
        Channels C of the features.
    """

    FLOOR = 0.3
    LIMIT = 3.0

    mean: Tensor
    std: Tensor
    limit: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))
        self.register_buffer("limit", torch.tensor(torch.finfo(torch.float32).max))

    def fit(self, features: FeatureMaps, images: Sequence[int]) -> None:
        """Measure every channel over the cached ``images``; features is (n, h, w, C)."""
        total = torch.zeros(len(self.mean), dtype=torch.float64)
        squares = torch.zeros_like(total)
        for image in images:
            vectors = torch.from_numpy(features[image].copy()).float().flatten(0, 1)
            total += vectors.sum(dim=0)
            squares += vectors.square().sum(dim=0)
        count = len(images) * features.shape[1] * features.shape[2]
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_((std + self.FLOOR * std.mean()).clamp_min(1e-6))
        self.limit.fill_(self.LIMIT)

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features (N, C, h, w)."""
        standard = features - self.mean[:, None, None]
        # In place: on a processor a new array of this size costs more than the arithmetic.
        return standard.div_(self.std[:, None, None]).clamp_(-self.limit, self.limit)


def batches(dataset: ImageFiles) -> Iterator[dict[str, Tensor]]:
    """Batches of ``dataset`` in order, each read while the one before is worked on.

    A thread reads them. Unlike processes it leaves nothing behind when the
    caller stops early, and notebooks need no guard around it.
    """
    loader = iter(DataLoader(dataset, batch_size=FEATURE_BATCH))
    with ThreadPoolExecutor(max_workers=1) as reader:
        coming = reader.submit(next, loader, None)
        while (batch := coming.result()) is not None:
            coming = reader.submit(next, loader, None)
            yield batch


#: Features of all images, (n, h, w, C) in half precision, read from disk as needed.
FeatureMaps = np.ndarray[Any, np.dtype[np.float16]]


def cache_folder() -> Path:
    """Where features are cached: ``SIMPLENET_CACHE``, or ``~/.cache/simplenet``."""
    return Path(os.environ.get("SIMPLENET_CACHE") or Path.home() / ".cache" / "simplenet")


def cached_features(
    extractor: FrozenFeatures, dataset: ImageFiles, key: str, *, progress: bool = True
) -> FeatureMaps:
    """Pass every image through the backbone once, ever.

    The features lie in a file that is mapped into memory, so that only the
    parts in use take up RAM. Its name is a hash of ``key`` and of every image
    file's bytes; it appears under that name only when it is complete.

    Parameters
    ----------
    extractor : FrozenFeatures
        The frozen backbone; features are computed on its device.
    dataset : ImageFiles
        The images.
    key : str
        Everything else the features depend on: weights, layers, preprocessing.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    FeatureMaps
        (n, h, w, C) of float16, read-only.

    Raises
    ------
    SimpleNetError
        If an image cannot be read or the cache cannot be written.
    """
    digest = hashlib.sha256(key.encode())
    for sample in dataset.samples:
        try:
            digest.update(sha256_of(sample.image).encode())
        except OSError as error:
            raise SimpleNetError(f"{sample.image}: could not be read ({error}).") from error
    path = cache_folder() / f"{digest.hexdigest()}.npy"
    try:
        return _read_features(path)
    except (OSError, EOFError, ValueError):  # not there, or damaged
        pass
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _write_features(extractor, dataset, path, progress)
        _forget_oldest(path)
        return _read_features(path)
    except OSError as error:
        raise SimpleNetError(
            f"{path.parent}: the feature cache could not be written ({error})."
            " Free some space, or set SIMPLENET_CACHE to another folder."
        ) from error


def _read_features(path: Path) -> FeatureMaps:
    features: FeatureMaps = np.load(path, mmap_mode="r", allow_pickle=False)
    with suppress(OSError):  # the folder may be another user's
        os.utime(path)  # the most recently used entry is forgotten last
    return features


def _write_features(
    extractor: FrozenFeatures, dataset: ImageFiles, path: Path, progress: bool
) -> None:
    device = next(extractor.parameters()).device
    # Process numbers alone can clash on a disk that several machines share.
    partial = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        # Plain writes, not a writable memory map: on a full disk a write raises
        # an error that can be caught, a memory map kills the process.
        with (
            partial.open("wb") as file,
            tqdm(total=len(dataset), desc="features", unit="image", disable=not progress) as bar,
        ):
            for batch in batches(dataset):
                features = extractor(batch["image"].to(device)).permute(0, 2, 3, 1)
                half = features.half().cpu().contiguous()
                # Features come from a ReLU and are never negative: the largest one says it all.
                if not torch.isfinite(half.amax()):
                    raise SimpleNetError("the features overflow half precision: wrong weights?")
                values = half.numpy()
                if file.tell() == 0:
                    shape = (len(dataset), *values.shape[1:])
                    needed, free = 2 * int(np.prod(shape)), shutil.disk_usage(path.parent).free
                    if needed > free:
                        raise OSError(f"needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")
                    header = {"descr": "<f2", "fortran_order": False, "shape": shape}
                    np.lib.format.write_array_header_1_0(file, header)
                for image in values:  # Linux writes a whole batch at once five times slower
                    file.write(image.data)
                bar.update(len(values))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _forget_oldest(newest: Path) -> None:
    """Remove the least recently used entries beyond the cache's size limit."""
    # A hash is 64 digits: the folder may also hold files of the user's own. What a
    # killed process left behind ends in .partial and counts as well.
    entries = []
    for entry in newest.parent.glob("[0-9a-f]" * 64 + ".*"):
        with suppress(FileNotFoundError):  # another process may forget entries, too
            entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry))
    size = sum(entry_size for _, entry_size, _ in entries)
    for _, entry_size, entry in sorted(entries):
        if size > CACHE_LIMIT_BYTES and entry != newest:
            size -= entry_size
            entry.unlink(missing_ok=True)
