"""Chapter 2: features of a frozen, pretrained backbone, and a cache of them on disk."""

from __future__ import annotations

import ctypes
import hashlib
import math
import os
import secrets
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import default_collate
from torchvision import models
from torchvision.models.feature_extraction import create_feature_extractor
from tqdm import tqdm

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import ImageFiles, Item, read_file
from simplenet_lib.drift import describe
from simplenet_lib.weights import Weights, torchvision_url

FEATURE_BATCH = 8
TILE_OVERLAP = 96  # pixels around a tile that it sees and that do not count: no seam shows
TILE_STEP = 32  # tiles meet at a position of every layer
READERS = min(16, os.cpu_count() or 1)  # threads that decode images
RELEASE_EVERY = 64  # images; what is given back has to be asked for again
CACHE_LIMIT_BYTES = 32 * 10**9


def build_backbone(name: str, weights: Weights) -> models.ResNet:
    """A torchvision ResNet that holds ``weights`` and strides where they want it.

    Raises
    ------
    SimpleNetError
        If the backbone is unknown or the weights are another network's.

    Examples
    --------
    >>> from simplenet_lib.weights import find_weights
    >>> network = build_backbone("resnet18", find_weights("resnet18", weights_file))
    >>> network(torch.zeros(1, 3, 64, 64)).shape
    torch.Size([1, 1000])
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


def reflect_border(network: nn.Module) -> None:
    """Have every convolution see its map mirrored at the border, in place of zeros.

    Zeros around a map are an edge that no photograph has: the features beside them
    differ from all others, and a few odd ones become false alarms. Nothing is added
    to the image and nothing cut off it.

    Examples
    --------
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1))
    >>> reflect_border(network)
    >>> values = network(torch.ones(1, 1, 4, 4))
    >>> bool(torch.allclose(values, values[..., :1, :1]))  # the border looks like the rest
    True
    """
    for parent in list(network.modules()):
        for name, conv in list(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and conv.padding != (0, 0):
                side = int(conv.padding[0])  # a ResNet's kernels are square
                conv.padding = (0, 0)
                setattr(parent, name, nn.Sequential(nn.ReflectionPad2d(side), conv))


def fold_batchnorm(network: nn.Module) -> None:
    """Merge each BatchNorm into the convolution before it, as it works in evaluation mode.

    There it multiplies every channel by a constant and adds another, and so can
    the convolution. What comes out is the same up to rounding, in less time, and
    no statistics are left that training mode could move.

    Examples
    --------
    >>> network = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 1), torch.nn.BatchNorm2d(8))
    >>> fold_batchnorm(network)
    >>> network[1]
    Identity()
    """
    network.eval()
    for parent in list(network.modules()):
        for (name, conv), (norm_name, norm) in pairwise(parent.named_children()):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())


class FrozenFeatures(nn.Module):
    """Outputs of a frozen backbone's layers on one grid (paper, section 3.1).

    The first layer sets the grid. A finer layer is averaged down to it, a coarser one
    interpolated up to it; all are joined along the channels and averaged over a
    neighbourhood of positions. (The published code averages a coarser layer on its own
    grid, over a wider part of the image; that blurs the map.) No parameter is trained,
    and BatchNorm is folded into the convolutions: nothing can change.

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
    border : {"zeros", "reflect"}
        What a convolution sees beyond its map; see :func:`reflect_border`.

    Attributes
    ----------
    layer_channels : list of int
        Channels C_l of each layer, for ResNet-50's layer2 and layer3 512 and 1024.
    channels : int
        Their sum C.

    Examples
    --------
    >>> from simplenet_lib.weights import find_weights
    >>> weights = find_weights("resnet18", weights_file)
    >>> features = FrozenFeatures("resnet18", ["layer2", "layer3"], weights)
    >>> features.layer_channels, features(torch.zeros(1, 3, 64, 64)).shape
    ([128, 256], torch.Size([1, 8, 8, 384]))
    """

    def __init__(
        self,
        backbone: str,
        layers: Sequence[str],
        weights: Weights,
        neighbourhood: int = 1,
        border: str = "zeros",
    ) -> None:
        super().__init__()
        network = build_backbone(backbone, weights)
        fold_batchnorm(network)
        known = ("layer1", "layer2", "layer3", "layer4")
        for layer in layers:
            if layer not in known:
                raise SimpleNetError(f"unknown layer '{layer}'. Known: {', '.join(known)}.")
        last_blocks = [getattr(network, layer)[-1] for layer in layers]
        self.layer_channels = [
            getattr(block, "conv3", block.conv2).out_channels for block in last_blocks
        ]
        self.channels = sum(self.layer_channels)
        if border == "reflect":
            reflect_border(network)
        self.extractor = create_feature_extractor(network, {layer: layer for layer in layers})
        self.extractor.to(memory_format=torch.channels_last)
        self.requires_grad_(False)
        self.layers = tuple(layers)
        self.neighbourhood = neighbourhood

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Map normalised images (N, 3, H, W) to features (N, h, w, C), channels last."""
        return self.join(self.outputs(images))

    def join(self, outputs: list[Tensor]) -> Tensor:
        """Join the layers' outputs to features (N, h, w, C), channels last."""
        joined = torch.cat(self.on_one_grid(outputs), dim=1)
        return around(joined, self.neighbourhood).permute(0, 2, 3, 1)

    def outputs(self, images: Tensor) -> list[Tensor]:
        """The layers' outputs, each on its own grid, (N, C_l, h_l, w_l)."""
        outputs = self.extractor(images.contiguous(memory_format=torch.channels_last))
        return [outputs[layer] for layer in self.layers]

    def on_one_grid(self, outputs: list[Tensor]) -> list[Tensor]:
        """Bring every map (N, _, h_l, w_l) to the grid of the first, (N, _, h, w)."""
        height, width = outputs[0].shape[-2:]
        size = (height, width)
        maps = []
        for features in outputs:
            if features.shape[-1] > size[-1]:
                features = F.adaptive_avg_pool2d(features, size)
            if features.shape[-1] < size[-1]:
                features = F.interpolate(features, size, mode="bilinear", align_corners=False)
            maps.append(features)
        return maps


def around(maps: Tensor, side: int) -> Tensor:
    """Average maps (N, _, h, w) over a square of ``side`` positions around every position.

    Examples
    --------
    >>> around(torch.tensor([[[[0.0, 3.0, 6.0]]]]), side=3)
    tensor([[[[1.5000, 3.0000, 4.5000]]]])
    """
    if side == 1:
        return maps
    # As F.avg_pool2d without what lies outside of the map, in a quarter of its time.
    ones = maps.new_ones(maps.shape[1], 1, side, side)
    counts = F.conv2d(torch.ones_like(maps[:1, :1]), ones[:1], padding=side // 2)
    return F.conv2d(maps, ones, padding=side // 2, groups=len(ones)) / counts


class Standardise(nn.Module):
    """Give every channel mean 0 and deviation about 1 over the normal images.

    Some channels are almost always 0 and fire on a few positions. Divided by
    their tiny deviation alone, these would reach hundreds and upset every batch
    they are in. So 0.3 times the mean deviation of all channels is added to each
    deviation. Until :meth:`fit` features pass unchanged.

    Parameters
    ----------
    channels : int
        Channels C of the features.

    Examples
    --------
    >>> standardise = Standardise(2)
    >>> standardise.fit([np.array([[[0, 10], [2, 30]]], np.float16)])
    >>> standardise.mean, standardise(torch.tensor([1.0, 20.0]))
    (tensor([ 1., 20.]), tensor([0., 0.]))
    """

    FLOOR = 0.3

    mean: Tensor
    std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("std", torch.ones(channels))

    def fit(self, maps: Iterable[FeatureMap]) -> None:
        """Measure every channel over cached maps (h, w, C)."""
        count = 0
        total = torch.zeros(len(self.mean), dtype=torch.float64)
        squares = torch.zeros_like(total)
        for features in maps:
            vectors = torch.from_numpy(features.copy()).double().flatten(0, 1)
            total += vectors.sum(dim=0)
            squares += vectors.square_().sum(dim=0)
            count += len(vectors)
        mean = total / count
        std = (squares / count - mean.square()).clamp_min(0).sqrt()
        self.mean.copy_(mean)
        self.std.copy_((std + self.FLOOR * std.mean()).clamp_min(1e-6))

    def forward(self, features: Tensor) -> Tensor:
        """Standardise features (..., C)."""
        return (features - self.mean) / self.std


def over_tiles(
    images: Tensor, tile: int, look: Callable[[Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Look at large images in overlapping tiles, and join what is found to one map.

    Where tiles overlap, each contributes the half that lies further from its edge.

    Parameters
    ----------
    images : Tensor
        (N, 3, H, W).
    tile : int
        Side of a tile in pixels; 0 to look at the whole images at once.
    look : callable
        Takes images, returns maps (N, h, w, C) and descriptions (N, D).

    Returns
    -------
    maps, descriptions : Tensor
        Those of the whole images; the descriptions are means over the tiles.

    Examples
    --------
    >>> def look(part):
    ...     print(tuple(part.shape))
    ...     return part[:, 0, ::8, ::8, None], part.mean(dim=(2, 3))
    >>> whole, described = over_tiles(torch.zeros(1, 3, 256, 384), 256, look)
    (1, 3, 256, 256)
    (1, 3, 256, 256)
    (1, 3, 256, 256)
    >>> whole.shape, described.shape
    (torch.Size([1, 32, 48, 1]), torch.Size([1, 3]))
    """
    height, width = images.shape[-2:]
    if not tile or max(height, width) <= tile:
        return look(images)
    whole, described = torch.empty(0), torch.zeros(())
    for y, top, bottom in _cuts(height, tile):
        for x, left, right in _cuts(width, tile):
            part = images[..., y : min(bottom + TILE_OVERLAP, height), :]
            part = part[..., x : min(right + TILE_OVERLAP, width)]
            map_, description = look(part)
            stride = math.ceil(part.shape[-1] / map_.shape[2])
            if not whole.numel():
                cells = math.ceil(height / stride), math.ceil(width / stride)
                whole = map_.new_empty(len(images), *cells, map_.shape[3])
                described = torch.zeros_like(description)
            rows = slice(top // stride, math.ceil(bottom / stride))
            columns = slice(left // stride, math.ceil(right / stride))
            whole[:, rows, columns] = map_[
                :,
                rows.start - y // stride : rows.stop - y // stride,
                columns.start - x // stride : columns.stop - x // stride,
            ]
            share = (bottom - top) * (right - left) / (height * width)
            described = described + description * share
    return whole, described


def _cuts(length: int, tile: int) -> list[tuple[int, int, int]]:
    """Where a tile starts, and the first and last pixel that count, along one side."""
    edges = [0]
    while length - edges[-1] > tile - (TILE_OVERLAP if len(edges) > 1 else 0):
        widest = tile - TILE_OVERLAP * min(2, len(edges))
        edges.append(edges[-1] + widest // TILE_STEP * TILE_STEP)
    return [
        (max(0, first - TILE_OVERLAP), first, last) for first, last in pairwise([*edges, length])
    ]


def at_once(tile: int) -> int:
    """Images in a batch: those that take tiles are large and go one by one.

    With one thread there are twice as many, since PyTorch then leaves 1x1 convolutions of
    less than 16 images to MKL, which takes half as long again as oneDNN on some processors.

    Examples
    --------
    >>> at_once(tile=0) in (8, 16), at_once(tile=512)
    (True, 1)
    """
    if tile:
        return 1
    return FEATURE_BATCH if torch.get_num_threads() > 1 else 2 * FEATURE_BATCH


def batches(items: Iterable[Item], count: int = FEATURE_BATCH) -> Iterator[dict[str, Tensor]]:
    """Batches of a dataset's items, each read while the one before is worked on.

    A thread reads them. Unlike processes it leaves nothing behind when the
    caller stops early, and notebooks need no guard around it.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> items = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> [batch["image"].shape for batch in batches(items)]
    [torch.Size([7, 3, 32, 32])]
    """
    waiting = iter(items)

    def read() -> dict[str, Tensor] | None:
        some = list(islice(waiting, count))
        return default_collate(some) if some else None

    try:
        with ThreadPoolExecutor(max_workers=1) as reader:
            coming = reader.submit(read)
            while (batch := coming.result()) is not None:
                coming = reader.submit(read)
                yield batch
    finally:
        if isinstance(waiting, Generator):  # it may have threads of its own
            waiting.close()


One = TypeVar("One")
Read = TypeVar("Read")


def ahead(
    read: Callable[[One], Read], ones: Iterable[One], count: int = FEATURE_BATCH
) -> Iterator[Read]:
    """``read`` of every one, in order, by as many threads as there are cores.

    A batch of ``count`` and a little more is read before it is asked for, never more: memory
    does not grow with the number of images.

    Examples
    --------
    >>> list(ahead(str.upper, ["a", "b", "c"]))
    ['A', 'B', 'C']
    """
    waiting = iter(ones)
    with ThreadPoolExecutor(READERS) as readers:
        coming = deque(readers.submit(read, one) for one in islice(waiting, count))
        try:
            number = 0
            while coming:
                number += 1
                coming.extend(readers.submit(read, one) for one in islice(waiting, 1))
                yield coming.popleft().result()
                if number % RELEASE_EVERY == 0:
                    release_memory()
        finally:
            for future in coming:
                future.cancel()
            release_memory()


def release_memory() -> None:
    """Give memory that is free, but scattered between what is in use, back to Linux.

    The arrays of the backbone are large, and what is kept of an image lies between them: with
    thousands of images there would be more and more gaps that no array fits into.

    Examples
    --------
    >>> release_memory()
    """
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).malloc_trim(0)


#: Cached features of one image, (h, w, C) in half precision, read from disk as needed.
FeatureMap = np.ndarray[Any, np.dtype[np.float16]]


@dataclass
class FeatureMaps(Sequence[FeatureMap]):
    """Cached features of all images of a dataset, one map (h, w, C) an image.

    Attributes
    ----------
    maps : list of ndarray
        Mapped files: only the parts in use take up memory.
    descriptions : ndarray
        What each image looks like as a whole, (n, D): :func:`simplenet_lib.drift.describe`.
    digests : list of str
        SHA-256 of every image file.

    Examples
    --------
    >>> maps = [np.full((2, 3, 4), number, np.float16) for number in (0, 1)]
    >>> features = FeatureMaps(maps, np.zeros((2, 8), np.float32), ["a", "b"])
    >>> features.shape, features.vectors(np.array([0, 6])).tolist()  # 6: first of the second map
    ((2, 2, 3, 4), [[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    """

    maps: list[FeatureMap]
    descriptions: NDArray[np.float32]
    digests: list[str]

    @property
    def shape(self) -> tuple[int, ...]:
        """(n, h, w, C), as of one array."""
        return (len(self.maps), *self.maps[0].shape)

    def __len__(self) -> int:
        return len(self.maps)

    def __getitem__(self, index: Any) -> Any:
        """The map of one image; of several, given as a slice or a list, one array of them."""
        if isinstance(index, slice):
            index = range(len(self))[index]
        if isinstance(index, int | np.integer):
            return self.maps[index]
        return np.stack([self.maps[i] for i in index])

    def vectors(self, positions: NDArray[np.int64]) -> FeatureMap:
        """The vectors (B, C) at ``positions``, counted through all maps in order."""
        _, height, width, channels = self.shape
        images, places = np.divmod(positions, height * width)
        rows, columns = np.divmod(places, width)
        result = np.empty((len(positions), channels), np.float16)
        where = zip(images.tolist(), rows.tolist(), columns.tolist(), strict=True)
        for vector, (image, row, column) in zip(result, where, strict=True):
            vector[:] = self.maps[image][row, column]
        return result


def digest_of_images(digests: Iterable[str]) -> str:
    """One SHA-256 of many, in their order.

    Examples
    --------
    >>> digest_of_images(["a", "b"]) == digest_of_images(["b", "a"])
    False
    """
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def cache_folder() -> Path:
    """Where features are cached: ``SIMPLENET_CACHE``, or ``~/.cache/simplenet``.

    Examples
    --------
    >>> import os
    >>> os.environ["SIMPLENET_CACHE"] = str(folder)
    >>> cache_folder() == folder
    True
    """
    if os.environ.get("SIMPLENET_CACHE"):
        return Path(os.environ["SIMPLENET_CACHE"])
    try:
        return Path.home() / ".cache" / "simplenet"
    except RuntimeError as error:
        raise SimpleNetError(
            "no home folder to keep features in: set SIMPLENET_CACHE to a folder that can be"
            " written."
        ) from error


def cached_features(
    extractor: FrozenFeatures,
    dataset: ImageFiles,
    key: str,
    *,
    tile: int = 0,
    progress: bool = True,
) -> FeatureMaps:
    """Pass every image through the backbone once, ever.

    The features of an image lie in a file of their own. Its name is a hash of
    ``key`` and of the image file's bytes, and it appears under that name only when
    it is complete: another photo in the folder costs the features of one photo.
    Every image file is read once, for its hash and, where needed, its pixels.

    Parameters
    ----------
    extractor : FrozenFeatures
        The frozen backbone; features are computed on its device.
    dataset : ImageFiles
        The images.
    key : str
        Everything else the features depend on: weights, layers, preprocessing.
    tile : int
        See :func:`over_tiles`.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    SimpleNetError
        If an image cannot be read or the cache cannot be written.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> normal = AnomalyDataset(data, "nut", "train", make_transform(32, 32))
    >>> features = cached_features(model.features, normal, model.feature_key(), progress=False)
    >>> features.shape
    (6, 8, 8, 64)
    """
    folder = cache_folder()
    found: dict[int, tuple[FeatureMap, NDArray[np.float32]]] = {}
    digests: dict[int, str] = {}

    def entry(index: int) -> Path:
        return folder / (hashlib.sha256(f"{key}\n{digests[index]}".encode()).hexdigest() + ".npy")

    def missing(index: int) -> Item | None:
        data = read_file(dataset.samples[index].image)
        digests[index] = hashlib.sha256(data).hexdigest()
        try:
            found[index] = _read_features(entry(index))
            return None
        except Exception:  # not there, or damaged in whatever way
            return dataset.item(index, data)

    def look(images: Tensor) -> tuple[Tensor, Tensor]:
        outputs = extractor.outputs(images)
        return extractor.join(outputs).half().cpu(), describe(images, outputs[0]).cpu()

    device = next(extractor.parameters()).device
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tqdm(total=len(dataset), desc="features", unit="image", disable=not progress) as bar:
            reading = ahead(missing, range(len(dataset)), at_once(tile))
            needed = (item for item in reading if item is not None)
            for batch in batches(needed, at_once(tile)):
                with torch.inference_mode():
                    half, descriptions = over_tiles(batch["image"].to(device), tile, look)
                half = half.contiguous()
                # Features come from a ReLU and are never negative: the largest one says it all.
                if not torch.isfinite(half.amax()):
                    raise SimpleNetError("the features overflow half precision: wrong weights?")
                for index, *arrays in zip(
                    batch["index"].tolist(), half.numpy(), descriptions.numpy(), strict=True
                ):
                    _write_features(entry(index), arrays)
                    found[index] = _read_features(entry(index))
                bar.update(len(found) - bar.n)
            bar.update(len(found) - bar.n)
        _forget_oldest({entry(index) for index in found})
    except OSError as error:
        raise SimpleNetError(
            f"{folder}: the feature cache could not be written ({error})."
            " Free some space, or set SIMPLENET_CACHE to another folder."
        ) from error
    every = range(len(dataset))
    return FeatureMaps(
        [found[index][0] for index in every],
        np.stack([found[index][1] for index in every]),
        [digests[index] for index in every],
    )


def _read_features(path: Path) -> tuple[FeatureMap, NDArray[np.float32]]:
    """Features and description of one image, as :func:`_write_features` wrote them."""
    with path.open("rb") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        start, count = file.tell() // dtype.itemsize, math.prod(shape)
        file.seek(count * dtype.itemsize, os.SEEK_CUR)
        description: NDArray[np.float32] = np.load(file, allow_pickle=False)
    # Unlike numpy's memory maps, torch's keep no file open: there may be one for each image.
    try:
        mapped = torch.from_file(str(path), shared=False, size=start + count, dtype=torch.float16)
    except RuntimeError:  # a disk whose files cannot be mapped: they take up memory
        mapped = torch.from_numpy(np.fromfile(path, np.float16, start + count))
    features: FeatureMap = mapped[start:].view(shape).numpy()
    features.flags.writeable = False
    with suppress(OSError):  # the folder may be another user's
        os.utime(path)  # the most recently used entry is forgotten last
    return features, description


def _write_features(path: Path, arrays: Sequence[NDArray[Any]]) -> None:
    # Process numbers alone can clash on a disk that several machines share.
    partial = path.with_suffix(f".{os.getpid()}-{secrets.token_hex(4)}.partial")
    try:
        # A plain write, not a writable memory map: on a full disk a write raises
        # an error that can be caught, a memory map kills the process.
        with partial.open("wb") as file:
            for values in arrays:
                np.save(file, values, allow_pickle=False)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _forget_oldest(in_use: set[Path]) -> None:
    """Remove the least recently used entries beyond the cache's size limit."""
    # A hash is 64 digits: the folder may also hold files of the user's own. What a
    # killed process left behind ends in .partial and counts as well.
    entries = []
    for entry in cache_folder().glob("[0-9a-f]" * 64 + ".*"):
        with suppress(FileNotFoundError):  # another process may forget entries, too
            entries.append((entry.stat().st_mtime_ns, entry.stat().st_size, entry))
    size = sum(entry_size for _, entry_size, _ in entries)
    for _, entry_size, entry in sorted(entries):
        if size > CACHE_LIMIT_BYTES and entry not in in_use:
            size -= entry_size
            with suppress(OSError):  # another user's
                entry.unlink(missing_ok=True)
