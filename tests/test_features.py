"""The frozen backbone against a plain forward pass, and the cache against everything at once."""

import gc
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch import nn
from torch.profiler import profile
from torchvision import models

from simplenet_lib import dataset as dataset_module
from simplenet_lib import features
from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import ImageFiles, Sample, make_transform
from simplenet_lib.drift import describe
from simplenet_lib.features import (
    FEATURE_BATCH,
    FeatureMaps,
    FrozenFeatures,
    Standardise,
    ahead,
    at_once,
    batches,
    build_backbone,
    cached_features,
    over_tiles,
    reflect_border,
)
from simplenet_lib.weights import Weights, digest_of

LAYERS = ("layer2", "layer3")


def random_weights(backbone: str, strides: str = "conv2") -> Weights:
    """Weights of a network that was never trained, with statistics of its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = models.get_model(backbone)
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean, std=0.1)
                nn.init.uniform_(module.running_var, 0.5, 1.5)
    state = network.state_dict()
    return Weights(state, "random numbers", digest_of(state, strides), strides)


@pytest.fixture(scope="module")
def weights() -> Weights:
    return random_weights("resnet18")


@pytest.fixture(scope="module")
def extractor(weights) -> FrozenFeatures:
    return FrozenFeatures("resnet18", LAYERS, weights)


def pictures(count: int, side: int = 64) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(count))


def channels_first(features: torch.Tensor) -> torch.Tensor:
    return features.permute(0, 3, 1, 2)


def check_close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal up to the order of float32 sums; the features are of the order of 1."""
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=2e-4)


def hooked(backbone: str, weights: Weights, layers: Sequence[str], images: torch.Tensor):
    """Outputs of torchvision's own network, caught by hooks during its own forward pass."""
    network = models.get_model(backbone)
    network.load_state_dict(weights.state)
    network.eval()
    caught = {}
    for layer in layers:
        module = getattr(network, layer)
        module.register_forward_hook(lambda _, __, out, layer=layer: caught.update({layer: out}))
    with torch.no_grad():
        network(images)
    return [caught[layer] for layer in layers]


# The backbone


@pytest.mark.parametrize(
    ("backbone", "channels"), [("resnet18", (128, 256)), ("resnet50", (512, 1024))]
)
def test_features_are_the_layers_of_the_network_on_one_grid(backbone, channels):
    weights = random_weights(backbone)
    images = pictures(2)
    fine, coarse = hooked(backbone, weights, LAYERS, images)
    assert fine.shape == (2, channels[0], 8, 8) and coarse.shape == (2, channels[1], 4, 4)

    frozen = FrozenFeatures(backbone, LAYERS, weights)
    found = channels_first(frozen(images))
    assert found.shape == (2, sum(channels), 8, 8)
    assert (frozen.channels, frozen.layer_channels) == (sum(channels), list(channels))
    check_close(found[:, : channels[0]], fine)
    # Bilinear from 4 to 8 positions by hand: a quarter of the way to the neighbour.
    index = torch.arange(8)
    near = index // 2
    far = (near + torch.where(index % 2 == 0, -1, 1)).clamp(0, 3)
    rows = 0.75 * coarse[:, :, near] + 0.25 * coarse[:, :, far]
    expected = 0.75 * rows[..., near] + 0.25 * rows[..., far]
    check_close(found[:, channels[0] :], expected)


@pytest.mark.parametrize(
    ("layers", "shape"),
    [
        (("layer1",), (64, 16, 16)),
        (("layer4",), (512, 2, 2)),
        (("layer1", "layer4"), (576, 16, 16)),
        (("layer3", "layer2"), (384, 4, 4)),  # the first one sets the grid
    ],
)
def test_any_layers(weights, layers, shape):
    frozen = FrozenFeatures("resnet18", layers, weights)
    found = channels_first(frozen(pictures(1)))
    assert (frozen.channels, *found.shape[1:]) == (shape[0], *shape)
    hooks = hooked("resnet18", weights, layers, pictures(1))
    assert frozen.layer_channels == [output.shape[1] for output in hooks]
    check_close(found[:, : hooks[0].shape[1]], hooks[0])
    # The layers as they are, each on its own grid, in the order that was asked for.
    outputs = frozen.outputs(pictures(1))
    assert len(outputs) == len(layers)
    for output, hook in zip(outputs, hooks, strict=True):
        check_close(output, hook)
    assert torch.equal(channels_first(frozen.join(outputs)), found)


@pytest.mark.parametrize("side", [96, 100, 65])
def test_odd_grids(weights, side):
    fine, coarse = hooked("resnet18", weights, LAYERS, pictures(1, side))
    found = channels_first(FrozenFeatures("resnet18", LAYERS, weights)(pictures(1, side)))
    check_close(found[:, :128], fine)
    assert found.shape[2:] == fine.shape[2:]
    # Resizing keeps the range of every channel, up to the order of sums, as in check_close.
    assert (found[:, 128:].amax((2, 3)) <= coarse.amax((2, 3)) + 2e-4).all()
    assert (found[:, 128:].amin((2, 3)) >= coarse.amin((2, 3)) - 2e-4).all()


@pytest.mark.parametrize("size", [3, 5])
def test_neighbourhood_is_the_mean_of_what_lies_inside_the_image(weights, size):
    plain = FrozenFeatures("resnet18", ["layer2"], weights)(pictures(1))[0].double().numpy()
    averaged = FrozenFeatures("resnet18", ["layer2"], weights, size)(pictures(1))[0].numpy()
    reach = size // 2
    for row in range(8):
        for column in range(8):
            window = plain[
                max(0, row - reach) : row + reach + 1,
                max(0, column - reach) : column + reach + 1,
            ]
            assert averaged[row, column] == pytest.approx(window.mean(axis=(0, 1)), abs=1e-5)


def test_neighbourhood_comes_after_resizing(weights):
    _, coarse = hooked("resnet18", weights, LAYERS, pictures(1))
    found = FrozenFeatures("resnet18", LAYERS, weights, 3)(pictures(1))[..., 128:]
    # The corner takes the mean of the 2 x 2 fine positions in the corner. Bilinear resizing to
    # twice the side makes these of the coarse corner by 9, 3, 3 and 1 of 16 parts at the inner one.
    corner = coarse[:, :, :2, :2]
    row = torch.tensor([[1.0, 0.0], [0.75, 0.25]])
    expected = (row @ corner @ row.T).mean((2, 3))
    check_close(found[:, 0, 0], expected)


def test_rectangles_are_their_own_squares(weights):
    """Far from the border a part of an image has the features it has in the whole."""
    frozen = FrozenFeatures("resnet18", ["layer1"], weights)
    image = torch.randn(1, 3, 96, 160, generator=torch.Generator().manual_seed(0))
    found = frozen(image)
    assert found.shape == (1, 24, 40, 64)
    left, right = frozen(image[..., :96]), frozen(image[..., 64:])
    # layer1 sees 43 pixels, so up to 6 positions from a cut can tell.
    check_close(found[:, :, :18], left[:, :, :18])
    check_close(found[:, :, 22:], right[:, :, 6:])
    both = FrozenFeatures("resnet18", LAYERS, weights)
    fine, coarse = both.outputs(image)
    assert (fine.shape[1:], coarse.shape[1:]) == ((128, 12, 20), (256, 6, 10))
    upright = both.join([fine.transpose(2, 3), coarse.transpose(2, 3)])
    check_close(both(image), upright.transpose(1, 2))  # rows and columns are treated alike


def test_channels_come_last_and_layers_in_order(weights):
    """By numpy: each layer's maps, as pictures of one value each, in the order of the layers."""
    frozen = FrozenFeatures("resnet18", ("layer3", "layer2"), weights)
    random = torch.Generator().manual_seed(0)
    outputs = [torch.randn(2, c, 3, 5, generator=random) for c in (4, 7)]
    joined = frozen.join(outputs)
    expected = np.concatenate([output.numpy().transpose(0, 2, 3, 1) for output in outputs], axis=3)
    assert np.array_equal(joined.numpy(), expected)
    assert all(map(torch.equal, frozen.on_one_grid(outputs), outputs))


# The border


class ByHand(nn.Module):
    """A convolution whose input is mirrored by numpy."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        side = self.conv.padding[0]
        sides = ((0, 0), (0, 0), (side, side), (side, side))
        mirrored = torch.from_numpy(np.pad(values.numpy(), sides, mode="reflect"))
        return F.conv2d(mirrored, self.conv.weight, self.conv.bias, self.conv.stride)


def test_reflecting_convolutions_see_what_numpy_mirrors():
    torch.manual_seed(0)
    plain = nn.Sequential(
        nn.Conv2d(3, 4, 7, stride=2, padding=3),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 4, 1, stride=2), nn.Conv2d(4, 5, 3, padding=1)),
    ).requires_grad_(False)
    values = torch.randn(2, 3, 24, 37)
    first, _, (point, last) = plain
    expected = ByHand(last)(ByHand(point)(ByHand(first)(values).relu()))
    before = plain(values)
    assert (before - expected).abs().max() > 0.1
    reflect_border(plain)
    found = plain(values)
    check_close(found, expected)
    assert found.shape == before.shape
    check_close(found[..., 2:-2, 2:-2], before[..., 2:-2, 2:-2])  # and only there


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50"])
def test_a_constant_image_is_constant_up_to_the_border(backbone):
    weights = random_weights(backbone)
    images = torch.tensor([0.7, -1.3, 2.0]).view(1, 3, 1, 1).expand(1, 3, 64, 96)
    found = FrozenFeatures(backbone, LAYERS, weights, 3, border="reflect")(images)
    assert found.abs().max() > 0.5
    check_close(found, found[:, :1, :1].expand_as(found))
    zeros = FrozenFeatures(backbone, LAYERS, weights, 3, border="zeros")(images)
    assert (zeros - zeros[:, 4:5, 6:7]).abs().amax() > 0.1
    check_close(zeros, FrozenFeatures(backbone, LAYERS, weights, 3)(images))  # the default


@pytest.mark.parametrize(
    ("layer", "height", "width"),
    [
        ("layer3", 32, 32),
        ("layer4", 48, 64),
        pytest.param(
            *("layer4", 32, 64),
            marks=pytest.mark.xfail(
                raises=RuntimeError, strict=True, reason="one row cannot be mirrored"
            ),
        ),
    ],
)
def test_smallest_images_with_a_reflected_border(weights, layer, height, width):
    """32 pixels are the least that a configuration allows."""
    frozen = FrozenFeatures("resnet18", [layer], weights, border="reflect")
    stride = {"layer3": 16, "layer4": 32}[layer]
    found = frozen(torch.randn(1, 3, height, width))
    assert found.shape == (1, -(-height // stride), -(-width // stride), frozen.channels)
    assert found.isfinite().all()


def symmetric_weights(backbone: str) -> Weights:
    """Weights whose kernels look the same in a mirror, left to right and top to bottom."""
    weights = random_weights(backbone)
    state = {
        name: (value + value.flip(3) + value.flip(2) + value.flip(2, 3)) / 4
        if value.ndim == 4 and value.shape[-1] > 1
        else value
        for name, value in weights.state.items()
    }
    return Weights(state, "symmetric", digest_of(state, "conv2"), "conv2")


def test_a_mirror_symmetric_image_has_mirror_symmetric_features():
    """Of 65 pixels every second one, beginning with the first, is symmetric; of 64 it is not."""
    frozen = FrozenFeatures("resnet18", LAYERS, symmetric_weights("resnet18"), 3, border="reflect")
    half = pictures(1, 65)[..., :33]
    image = torch.cat([half, half[..., :-1].flip(3)], dim=3)
    assert torch.equal(image, image.flip(3)) and image.shape[-1] == 65
    found = frozen(image)
    assert found.shape == (1, 9, 9, 384)
    check_close(found, found.flip(2))
    assert (found - found.flip(1)).abs().max() > 0.1  # top and bottom differ


def test_reflected_border_is_the_border_of_an_endlessly_mirrored_image():
    """Kernels that are symmetric see mirrored features where the image is mirrored, at any depth.

    So mirroring every map at its border is the same as mirroring the image so far that its end
    is out of reach: 128 pixels are more than half of the 211 that layer3 sees.
    """
    weights = symmetric_weights("resnet18")
    image = pictures(1, 65)
    sides = ((0, 0), (0, 0), (128, 128), (128, 128))
    endless = torch.from_numpy(np.pad(image.numpy(), sides, mode="reflect"))
    outputs = FrozenFeatures("resnet18", LAYERS, weights, border="reflect").outputs(image)
    for stride, output, far in zip(
        (8, 16), outputs, hooked("resnet18", weights, LAYERS, endless), strict=True
    ):
        start = 128 // stride
        inside = slice(start, start + output.shape[-1])
        check_close(output, far[..., inside, inside])
        zeros = hooked("resnet18", weights, LAYERS, image)[stride == 16]
        assert (zeros - output).abs().max() > 0.1


def test_nothing_is_trained_and_training_mode_changes_nothing(weights):
    pretrained = {name: tensor.clone() for name, tensor in weights.state.items()}
    frozen = FrozenFeatures("resnet18", LAYERS, weights)
    whole = nn.Sequential(frozen, nn.Linear(384, 4))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    before = {name: tensor.clone() for name, tensor in frozen.state_dict().items()}
    asleep = frozen(pictures(4))
    frozen.train()
    whole.train()
    for _ in range(2):
        awake = frozen(pictures(4))
        whole(pictures(4)).sum().backward()
    assert torch.equal(asleep, awake) and not awake.requires_grad
    assert not any(isinstance(module, nn.BatchNorm2d) for module in frozen.modules())
    assert whole[1].training and whole[1].weight.grad is not None
    after = frozen.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    # And the weights it was built from are as they were.
    assert all(torch.equal(weights.state[name], tensor) for name, tensor in pretrained.items())


def test_an_image_has_the_same_features_in_any_batch(extractor):
    together = extractor(pictures(4))
    for index in range(4):
        alone = extractor(pictures(4)[index : index + 1])
        check_close(alone[0], together[index])


def test_stride_in_conv1_for_weights_that_want_it():
    images = pictures(1)
    ours, theirs = (
        build_backbone("resnet50", random_weights("resnet50", strides)).eval()
        for strides in ("conv1", "conv2")
    )
    where = {
        name: [
            convolution
            for convolution in ("conv1", "conv2", "conv3")
            if getattr(getattr(ours, name)[0], convolution).stride == (2, 2)
        ]
        for name in ("layer1", "layer2", "layer3", "layer4")
    }
    assert where == {"layer1": [], "layer2": ["conv1"], "layer3": ["conv1"], "layer4": ["conv1"]}
    with torch.no_grad():
        stem = ours.layer1(ours.maxpool(ours.relu(ours.bn1(ours.conv1(images)))))
        block = ours.layer2[0]
        # Stride in a 1x1 convolution only drops every other position of its input.
        hidden = F.conv2d(stem[:, :, ::2, ::2], block.conv1.weight)
        hidden = F.relu(block.bn1(hidden))
        hidden = F.relu(block.bn2(F.conv2d(hidden, block.conv2.weight, padding=1)))
        hidden = block.bn3(F.conv2d(hidden, block.conv3.weight))
        expected = F.relu(hidden + block.downsample(stem))
        check_close(block(stem), expected)
        assert (block(stem) - theirs.layer2[0](stem)).abs().max() > 0.1


def test_unknown_backbone_layer_and_weights_of_another_network(weights):
    with pytest.raises(SimpleNetError, match="unknown backbone 'vgg16'. Known: .*resnet50"):
        FrozenFeatures("vgg16", LAYERS, weights)
    for layer in ("layer5", "fc", "conv1", "", "layer2.0"):
        with pytest.raises(SimpleNetError, match=f"unknown layer '{layer}'. Known: layer1"):
            FrozenFeatures("resnet18", ["layer2", layer], weights)
    with pytest.raises(SimpleNetError, match="^random numbers: not the weights of resnet34 [(]M"):
        FrozenFeatures("resnet34", LAYERS, weights)
    narrow = {**weights.state, "conv1.weight": torch.zeros(64, 3, 3, 3)}
    with pytest.raises(SimpleNetError, match="not the weights of resnet18 .*conv1.weight"):
        FrozenFeatures("resnet18", LAYERS, Weights(narrow, "a file", "", "conv2"))


# Standardisation


def test_standardise_is_identity_before_fit():
    values = torch.randn(2, 3, 3, 5) * 1e6
    values[..., 0] = 0
    assert torch.equal(Standardise(5)(values), values)


def test_standardise_is_numpys_mean_and_deviation():
    random = np.random.default_rng(0)
    scale = np.array([1, 10, 0.001, 0, 3])
    maps = (random.normal(size=(6, 7, 4, 5)) * scale + [0, 100, 5, 2, -1]).astype(np.float16)
    images = [0, 2, 5]
    standardise = Standardise(5)
    standardise.fit(maps[image] for image in images)  # any iterable, gone through once

    used = maps[images].astype(np.float64).reshape(-1, 5)
    deviation = used.std(axis=0)
    spread = deviation + Standardise.FLOOR * deviation.mean()
    expected = (maps.astype(np.float64) - used.mean(axis=0)) / spread
    found = standardise(torch.from_numpy(maps.astype(np.float32)))
    assert found.numpy() == pytest.approx(expected, abs=1e-4)
    assert expected[..., 3].max() < 1e-6  # the constant channel stays finite
    # Vectors of any arrangement, and nothing is clipped.
    vectors = torch.from_numpy(maps.astype(np.float32)).flatten(0, 2)
    assert torch.equal(standardise(vectors), found.flatten(0, 2))
    far = (1e9 - used.mean(axis=0)) / spread
    assert standardise(torch.full((5,), 1e9)).numpy() == pytest.approx(far, rel=2e-3)


@settings(max_examples=60)
@given(
    arrays=st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 4))
    .flatmap(lambda shape: hnp.arrays(np.float16, shape, elements=st.floats(0, 64, width=16)))
    .map(lambda maps: maps[:, ::-1])  # not contiguous
)
def test_standardised_features_have_mean_0_and_a_deviation_below_1(arrays):
    standardise = Standardise(arrays.shape[-1])
    arrays.flags.writeable = False  # as a mapped file is
    standardise.fit(arrays)
    found = standardise(torch.from_numpy(arrays.astype(np.float32))).numpy().astype(np.float64)
    deviation = arrays.astype(np.float64).std(axis=(0, 1, 2))
    assert np.isfinite(found).all()
    if deviation.mean() > 0.1:
        # d / (d + 0.3 mean d): 1 / 1.3 for a channel like the mean of all.
        expected = deviation / (deviation + 0.3 * deviation.mean())
        assert found.mean(axis=(0, 1, 2)) == pytest.approx(np.zeros(len(deviation)), abs=1e-2)
        assert found.std(axis=(0, 1, 2)) == pytest.approx(expected, abs=1e-2)
    elif deviation.max() == 0:
        assert not found.any()


def test_standardise_fitted_twice_forgets_the_first_and_travels_in_its_state():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(2, 3, 4, 4, 6)).astype(np.float16)
    twice, once = Standardise(6), Standardise(6)
    twice.fit(first)
    twice.fit(second[:2])
    once.fit(second[:2])
    copy = Standardise(6)
    copy.load_state_dict(twice.state_dict())
    values = torch.randn(1, 2, 2, 6) * 10
    assert torch.equal(twice(values), once(values)) and torch.equal(copy(values), once(values))


# Cached maps


@st.composite
def maps_and_positions(draw):
    shape = draw(st.tuples(*[st.integers(1, 4)] * 4))
    random = np.random.default_rng(draw(st.integers(0, 99)))
    array = random.normal(size=shape).astype(np.float16)
    last = shape[0] * shape[1] * shape[2] - 1
    positions = draw(st.lists(st.integers(0, last), max_size=20))
    return array, np.array(positions, dtype=np.int64)


def as_maps(array: np.ndarray) -> FeatureMaps:
    count = len(array)
    return FeatureMaps(list(array), np.zeros((count, 1), np.float32), ["0" * 64] * count)


@given(maps_and_positions())
def test_vectors_are_gathered_one_by_one(case):
    array, positions = case
    _, height, width, channels = array.shape
    found = as_maps(array).vectors(positions)
    assert (found.shape, found.dtype) == ((len(positions), channels), np.float16)
    for vector, position in zip(found, positions.tolist(), strict=True):
        image, place = position // (height * width), position % (height * width)
        assert np.array_equal(vector, array[image, place // width, place % width])


@given(
    case=maps_and_positions(),
    cut=st.slices(4),
    chosen=st.lists(st.integers(-4, 3), min_size=1, max_size=5),
)
def test_maps_are_indexed_as_one_array_is(case, cut, chosen):
    array, _ = case
    maps = as_maps(array)
    assert (maps.shape, len(maps)) == (array.shape, len(array))
    assert all(map(np.array_equal, maps, array))  # a sequence ends
    for index in [index for index in chosen if -len(array) <= index < len(array)]:
        assert np.array_equal(maps[index], array[index])
        assert np.array_equal(maps[np.int64(index)], array[index])
        assert np.array_equal(maps[[index, 0, index]], array[[index, 0, index]])
        assert np.array_equal(maps[np.array([index, 0])], array[np.array([index, 0])])
    if len(array[cut]):
        assert isinstance(maps[cut], np.ndarray) and maps[cut].dtype == np.float16
        assert np.array_equal(maps[cut], array[cut])
    for outside in (len(array), -len(array) - 1):
        with pytest.raises(IndexError):
            maps[outside]


# The cache


class Counted(nn.Module):
    """A feature extractor that counts the images it is given."""

    def __init__(self, extractor: FrozenFeatures) -> None:
        super().__init__()
        self.extractor = extractor
        self.images = 0

    def outputs(self, images: torch.Tensor) -> list[torch.Tensor]:
        self.images += len(images)
        return self.extractor.outputs(images)

    def join(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        return self.extractor.join(outputs)


@pytest.fixture
def counted(extractor) -> Counted:
    return Counted(extractor)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of our own, filled in equal batches on any machine."""
    monkeypatch.setenv("SIMPLENET_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "at_once", lambda tile: FEATURE_BATCH)
    return tmp_path / "cache"


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN")
@pytest.mark.parametrize("threads", [1, 2])
def test_a_batch_is_large_enough_for_onednn(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with profile() as watched:
            nn.Conv2d(64, 64, 1)(torch.randn(at_once(0), 64, 24, 24))
    finally:
        torch.set_num_threads(before)
    assert "aten::mkldnn_convolution" in {event.key for event in watched.key_averages()}


def write_image(path: Path, seed: int) -> Sample:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return Sample(path, "good")


@pytest.fixture
def dataset(tmp_path) -> ImageFiles:
    """One full batch, and a rest."""
    samples = [write_image(tmp_path / "images" / f"{seed:03}.png", seed) for seed in range(11)]
    return ImageFiles(samples, make_transform(64, 64))


class Watched(ImageFiles):
    """Images that tell when the second batch has been read."""

    def __init__(self, images: ImageFiles) -> None:
        super().__init__(images.samples, images.transform)
        self.second_batch = threading.Event()

    def item(self, index: int, data: bytes | None = None):
        item = super().item(index, data)
        if index == min(len(self), 2 * FEATURE_BATCH) - 1:
            self.second_batch.set()
        return item


def test_batches_come_in_order_and_are_read_ahead(dataset):
    watched = Watched(dataset)
    found = []
    for batch in batches(watched):
        assert watched.second_batch.wait(timeout=30)  # while the first one is still in use
        found.append(batch)
    assert [len(batch["index"]) for batch in found] == [FEATURE_BATCH, 11 - FEATURE_BATCH]
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(11))
    expected = torch.stack([dataset[index]["image"] for index in range(11)])
    assert torch.equal(torch.cat([batch["image"] for batch in found]), expected)


def test_batches_of_some_items_and_of_none(dataset):
    some = (dataset[index] for index in (7, 2, 5))
    (batch,) = batches(some)
    assert batch["index"].tolist() == [7, 2, 5]
    assert torch.equal(batch["image"][1], dataset[2]["image"])
    assert list(batches([])) == []
    full = [batch["index"].tolist() for batch in batches(map(dataset.item, [1] * FEATURE_BATCH))]
    assert full == [[1] * FEATURE_BATCH]


def test_batches_leave_no_thread_behind(dataset):
    before = threading.active_count()
    stopped_early = batches(dataset)
    next(stopped_early)
    stopped_early.close()
    assert threading.active_count() == before
    dataset.samples[9].image.write_bytes(b"no image")
    reading = batches(dataset)
    assert len(next(reading)["image"]) == FEATURE_BATCH
    with pytest.raises(SimpleNetError, match="not a readable image"):
        next(reading)
    assert threading.active_count() == before


def test_ahead_keeps_the_order_and_reads_a_little_ahead_only():
    started = []

    def read(number: int) -> int:
        started.append(number)
        time.sleep(0.002 * (number % 3))  # the later ones are done first
        return -number

    before = threading.active_count()
    for taken, result in enumerate(ahead(read, range(100))):
        assert result == -taken
        assert len(started) <= taken + 1 + FEATURE_BATCH  # memory does not grow with the images
    assert taken == 99 and sorted(started) == list(range(100))
    stopped_early = ahead(read, range(100))
    next(stopped_early)
    stopped_early.close()
    assert threading.active_count() == before

    def fails(number: int) -> int:
        if number == 3:
            raise SimpleNetError("the third")
        return number

    reading = ahead(fails, range(9))
    assert [next(reading) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SimpleNetError, match="the third"):
        next(reading)


def test_a_disk_whose_files_cannot_be_mapped_does_as_well(cache, counted, dataset, monkeypatch):
    mapped = cached(counted, dataset)

    def refuse(*args, **kwargs):
        raise RuntimeError("unable to mmap: No such device (19)")

    monkeypatch.setattr(torch, "from_file", refuse)
    read = cached(counted, dataset)
    assert all(np.array_equal(a, b) for a, b in zip(mapped, read, strict=True))
    assert np.array_equal(mapped.descriptions, read.descriptions)


def cached(extractor: nn.Module, dataset: ImageFiles, key: str = "key") -> FeatureMaps:
    return cached_features(extractor, dataset, key, progress=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_cache_holds_the_features_and_is_read_the_second_time(cache, counted, dataset):
    found = cached(counted, dataset)
    assert (found.shape, len(found)) == ((11, 8, 8, 384), 11)
    direct = torch.stack([item["image"] for item in dataset])
    expected = counted.extractor(direct).numpy()
    # Half precision keeps 11 bits: a relative error of at most 2^-11.
    assert found[:].dtype == np.float16
    assert found[:].astype(np.float32) == pytest.approx(expected, rel=2**-11 + 1e-4, abs=1e-4)
    described = describe(direct, counted.extractor.outputs(direct)[0])
    assert found.descriptions == pytest.approx(described.numpy(), rel=1e-4, abs=1e-4)
    files = [hashlib.sha256(sample.image.read_bytes()).hexdigest() for sample in dataset.samples]
    assert found.digests == files
    assert not any(map_.flags.writeable or map_.flags.owndata for map_ in found)
    mapped = Path("/proc/self/maps")
    if mapped.exists():  # on Linux one can see that they are files, not copies in memory
        assert sum(str(cache) in line for line in mapped.read_text().splitlines()) == 11
    assert len(names(cache)) == 11 and all(name.endswith(".npy") for name in names(cache))

    before = contents(cache)
    again = cached(counted, dataset)
    assert counted.images == 11
    assert np.array_equal(found[:], again[:]) and contents(cache) == before
    assert np.array_equal(found.descriptions, again.descriptions)
    assert found.digests == again.digests


def test_another_photo_costs_the_features_of_one(cache, counted, dataset, tmp_path):
    first = cached(counted, dataset)
    before = contents(cache)
    samples = dataset.samples.copy()
    samples.insert(4, write_image(tmp_path / "images" / "003 again.png", 99))
    more = ImageFiles(samples, dataset.transform)
    found = cached(counted, more)
    assert (counted.images, len(names(cache))) == (12, 12)
    assert before.items() < contents(cache).items()  # and no entry is written again
    assert np.array_equal(np.delete(found[:], 4, axis=0), first[:])
    assert np.array_equal(np.delete(found.descriptions, 4, axis=0), first.descriptions)
    alone = counted.extractor(more[4]["image"][None])[0].numpy()
    assert found[4].astype(np.float32) == pytest.approx(alone, rel=2**-11 + 1e-4, abs=1e-4)

    fewer = ImageFiles(samples[:4] + samples[6:], dataset.transform)
    assert np.array_equal(cached(counted, fewer)[:], found[[*range(4), *range(6, 12)]])
    assert counted.images == 12


def test_cache_depends_on_every_byte_and_on_the_key_but_not_on_the_order(cache, counted, dataset):
    first = cached(counted, dataset)[:]
    reordered = ImageFiles(dataset.samples[::-1], dataset.transform)
    assert np.array_equal(cached(counted, reordered)[:], first[::-1])
    assert (counted.images, len(names(cache))) == (11, 11)
    cached(counted, dataset, "another key")
    assert (counted.images, len(names(cache))) == (22, 22)

    changed = dataset.samples[7].image
    data = bytearray(changed.read_bytes())
    write_image(changed, 99)
    second = cached(counted, dataset)
    assert (counted.images, len(names(cache))) == (23, 23)
    different = [index for index in range(11) if not np.array_equal(first[index], second[index])]
    assert different == [7]
    changed.write_bytes(data)
    assert np.array_equal(cached(counted, dataset)[:], first)
    data += b"\0"  # after the end of the picture, and yet another file
    changed.write_bytes(data)
    cached(counted, dataset)
    assert (counted.images, len(names(cache))) == (24, 24)


def test_moved_and_copied_images_are_recognised(cache, counted, dataset, tmp_path):
    first = cached(counted, dataset)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    samples = [Sample(tmp_path / "elsewhere" / s.image.name, "good") for s in dataset.samples]
    shutil.copy(samples[2].image, tmp_path / "copy.png")
    samples.append(Sample(tmp_path / "copy.png", "good"))
    found = cached(counted, ImageFiles(samples, dataset.transform))
    assert (counted.images, len(names(cache))) == (11, 11)
    assert np.array_equal(found[:], first[[*range(11), 2]])
    # A copy beside the original is one entry from the start.
    again = cached(counted, ImageFiles(samples[::-1], dataset.transform), "new")
    assert len(names(cache)) == 22
    assert np.allclose(again[:], found[::-1], rtol=2e-3, atol=1e-3)


def test_every_image_is_read_once(cache, counted, dataset, monkeypatch):
    reads: Counter[str] = Counter()
    read_file = dataset_module.read_file

    def read(path: Path) -> bytes:
        reads[path.name] += 1
        return read_file(path)

    for module in (features, dataset_module):
        monkeypatch.setattr(module, "read_file", read)
    everyone = [sample.image.name for sample in dataset.samples]
    assert len(cached(counted, dataset)) == 11
    assert reads == Counter(everyone)
    write_image(dataset.samples[10].image, 99)
    cached(counted, dataset)
    assert reads == Counter(2 * everyone)
    # An item whose bytes are there is not read at all.
    item = dataset.item(3, dataset.samples[4].image.read_bytes())
    assert reads == Counter(2 * everyone)
    assert torch.equal(item["image"], dataset[4]["image"]) and item["index"] == 3


def test_no_image_file_is_opened_twice(cache, counted, dataset, tmp_path):
    """By an audit hook, which no way of opening a file gets round."""

    def work() -> str:  # in a child, for a hook cannot be taken off
        opened = []
        images = str(tmp_path / "images")

        def hook(event: str, args: tuple[object, ...]) -> None:
            if event == "open" and str(args[0]).startswith(images):
                opened.append(Path(str(args[0])).name)

        sys.addaudithook(hook)
        cached(counted, dataset)
        return " ".join(opened)

    (opened,) = in_children(1, work)
    assert opened.split() == [sample.image.name for sample in dataset.samples]


class Stopped(ImageFiles):
    """Somebody presses Ctrl-C in the second batch."""

    def item(self, index, data=None):
        if index == 9:
            raise KeyboardInterrupt
        return super().item(index, data)


def test_interrupted_and_failed_runs_keep_what_is_finished(cache, counted, dataset):
    image = dataset.samples[9].image
    data = image.read_bytes()
    with pytest.raises(KeyboardInterrupt):
        cached(counted, Stopped(dataset.samples, dataset.transform))
    finished = contents(cache)
    assert len(finished) == FEATURE_BATCH and all(name.endswith(".npy") for name in finished)
    image.write_bytes(b"no image")
    with pytest.raises(SimpleNetError, match="009.png: not a readable image"):
        cached(counted, dataset)
    image.unlink()
    with pytest.raises(SimpleNetError, match="009.png: not a readable image .*No such file"):
        cached(counted, dataset)
    assert (contents(cache), counted.images) == (finished, FEATURE_BATCH)
    image.write_bytes(data)
    found = cached(counted, dataset)
    assert counted.images == 11 and finished.items() < contents(cache).items()
    direct = counted.extractor(torch.stack([item["image"] for item in dataset])).numpy()
    assert found[:].astype(np.float32) == pytest.approx(direct, rel=2**-11 + 1e-4, abs=1e-4)


@pytest.mark.parametrize("value", [1e6, np.inf, np.nan])
def test_features_beyond_half_precision_are_refused(cache, counted, dataset, value):
    class Loud(Counted):
        def join(self, outputs):
            joined = super().join(outputs)
            joined[-1, 3, 5, 7] = value  # in one place of the last image of the batch
            return joined

    with pytest.raises(SimpleNetError, match="overflow half precision"):
        cached(Loud(counted.extractor), dataset)
    assert names(cache) == []


def damages(data: bytes, description: int) -> dict[str, bytes]:
    """What may be found in place of an entry, whose last bytes are its description."""
    return {
        "empty": b"",
        "cut off": data[: len(data) // 2],
        "text": b"not an array\n" * 1000,
        "zeros": bytes(len(data)),
        "half a header": data[:20],
        "one byte short": data[:-1],
        "no description": data[:-description],
        "description of something": data[:-description] + b"not an array\n" * 100,
    }


DAMAGES = [
    *damages(b"", 1),
    "spoilt header",
    "negative shape",
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_entry_is_computed_anew_and_no_other(cache, counted, dataset, damage):
    first = cached(counted, dataset)
    expected, described = first[:], first.descriptions
    whole = contents(cache)
    entry = cache / names(cache)[5]
    data = entry.read_bytes()
    kinds = damages(data, 128 + first.descriptions[0].nbytes)
    kinds["spoilt header"] = data[:8] + bytes([5]) + data[9:]  # it seems to end after 5 characters
    kinds["negative shape"] = data.replace(b"(8, 8, 384), }", b"(8,-8, 384), }", 1)
    assert kinds[damage] != data
    entry.write_bytes(kinds[damage])
    found = cached(counted, dataset)
    assert counted.images == 12
    assert np.allclose(found[:], expected, rtol=2e-3, atol=1e-3)
    assert found.descriptions == pytest.approx(described, rel=1e-4, abs=1e-4)
    others = {name: data for name, data in whole.items() if name != entry.name}
    assert others.items() < contents(cache).items() and len(names(cache)) == 11
    cached(counted, dataset)
    assert counted.images == 12


def test_cache_that_cannot_be_a_folder(cache, counted, dataset):
    cache.write_text("a file is in the way")
    with pytest.raises(SimpleNetError, match="cache could not be written .* SIMPLENET_CACHE"):
        cached(counted, dataset)


def in_children(count: int, work: Callable[[], str]) -> list[str]:
    """The short text that ``work`` returns in ``count`` copies of this process at once."""
    context = multiprocessing.get_context("fork")  # spawned ones would import torch again
    queue = context.SimpleQueue()

    def child() -> None:
        torch.set_num_threads(1)  # as in the loader's workers: OpenMP's threads did not come along
        queue.put(work())

    processes = [context.Process(target=child, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    return [queue.get() for _ in processes]


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_disk_that_fills_up_while_writing(cache, counted, dataset):
    """A limit on the size of a file fails a write in its middle, as a full disk does."""

    class Filling(ImageFiles):
        def item(self, index, data=None):
            if index == 9:
                wait_until(lambda: len(list(cache.glob("*.npy"))) == FEATURE_BATCH)
                resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, resource.RLIM_INFINITY))
            return super().item(index, data)

    def work() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        with pytest.raises(SimpleNetError) as caught:
            cached(counted, Filling(dataset.samples, dataset.transform))
        return str(caught.value)

    (message,) = in_children(1, work)
    assert message.startswith(f"{cache}: the feature cache could not be written (")
    assert message.endswith(" Free some space, or set SIMPLENET_CACHE to another folder.")
    finished = contents(cache)
    assert len(finished) == FEATURE_BATCH and all(name.endswith(".npy") for name in finished)
    cached(counted, dataset)  # and what was finished is not computed again
    assert counted.images == 11 - FEATURE_BATCH
    assert finished.items() < contents(cache).items()


def test_two_processes_at_once_leave_whole_entries(cache, counted, dataset):
    barrier = multiprocessing.get_context("fork").Barrier(2)

    class Together(ImageFiles):
        def item(self, index, data=None):
            if index in (0, 9):
                barrier.wait(60)  # both have begun, and both have written a part
            return super().item(index, data)

    def work() -> str:
        found = cached(counted, Together(dataset.samples, dataset.transform))
        assert counted.images >= 4  # at least the first, and the last batch
        return hashlib.sha256(found[:]).hexdigest()

    found = in_children(2, work)
    assert len(names(cache)) == 11 and all(name.endswith(".npy") for name in names(cache))
    assert counted.images == 0  # here: the children counted their own
    entries = cached(counted, dataset)
    assert counted.images == 0
    assert found == [hashlib.sha256(entries[:]).hexdigest()] * 2


def test_partial_files_of_two_processes_have_two_names(cache, counted, dataset, monkeypatch):
    """Even if both have the same number, on two machines that share a disk."""
    seen = set()
    save = np.save

    def watched(file, *args, **options):
        seen.update(names(cache))
        save(file, *args, **options)

    monkeypatch.setattr(np, "save", watched)
    cached(counted, dataset)
    for entry in cache.glob("*.npy"):
        entry.unlink()
    cached(counted, dataset)
    partial = [name.split(".", 1) for name in seen if name.endswith(".partial")]
    assert len({entry for entry, _ in partial}) == 11
    assert len({name for _, name in partial}) == 22


def test_limit_forgets_the_least_recently_used(cache, counted, dataset, monkeypatch):
    entries = {}
    for age, key in zip((400, 300, 200), "abc", strict=True):
        known = set(names(cache))
        cached(counted, dataset, key)
        entries[key] = sorted(set(names(cache)) - known)
        for place, name in enumerate(entries[key]):
            long_ago = time.time() - age + place
            os.utime(cache / name, (long_ago, long_ago))
    assert [len(some) for some in entries.values()] == [11, 11, 11]
    cached(counted, dataset, "a")  # now b is the one not used for longest
    size = {(cache / name).stat().st_size for name in names(cache)}
    assert len(size) == 1
    monkeypatch.setattr(features, "CACHE_LIMIT_BYTES", size.pop() * 40 + 1)
    cached(counted, dataset, "d")
    # 44 entries, and room for 40: of b the four are gone that were used before the others.
    assert len(names(cache)) == 40
    assert {*entries["a"], *entries["b"][4:], *entries["c"]} < set(names(cache))


def test_limit_never_forgets_what_is_in_use(cache, counted, dataset, monkeypatch):
    cached(counted, dataset, "a")
    expected = cached(counted, dataset, "b")[:]
    known = set(names(cache))
    for name in known:
        os.utime(cache / name, (1, 1))
    monkeypatch.setattr(features, "CACHE_LIMIT_BYTES", 1)

    def refuse(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:  # so that those in use stay the oldest of all
        patch.setattr(os, "utime", refuse)
        more = ImageFiles(dataset.samples[:3], dataset.transform)
        found = cached(counted, more, "b")
    in_use = set(names(cache))
    assert len(in_use) == 3 and in_use < known
    assert np.array_equal(found[:], expected[:3]) and counted.images == 22
    cached(counted, more, "b")
    assert counted.images == 22


def test_an_entry_in_use_can_be_forgotten_by_another_run(cache, counted, dataset, monkeypatch):
    found = cached(counted, dataset, "a")
    expected = found[:]
    monkeypatch.setattr(features, "CACHE_LIMIT_BYTES", 1)
    cached(counted, dataset, "b")
    gc.collect()
    assert len(names(cache)) == 11 and np.array_equal(found[:], expected)
    cached(counted, dataset, "a")
    assert counted.images == 33


def test_limit_spares_foreign_files_and_removes_old_partial_ones(
    cache, counted, dataset, monkeypatch
):
    cache.mkdir()
    mine = cache / "my measurements.npy"
    np.save(mine, np.zeros(1_000_000))
    stale = cache / f"{'0' * 64}.4711-0123abcd.partial"
    stale.write_bytes(bytes(1_000_000))  # of a process that was killed
    for path in (mine, stale):
        os.utime(path, (1, 1))
    monkeypatch.setattr(features, "CACHE_LIMIT_BYTES", 1)
    cached(counted, dataset)
    assert mine.exists() and not stale.exists() and len(names(cache)) == 12


def test_cache_of_another_user_can_be_read(cache, counted, dataset, monkeypatch):
    first = cached(counted, dataset)[:]

    def refuse(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert np.array_equal(cached(counted, dataset)[:], first)
    assert counted.images == 11


def test_more_images_than_a_process_may_open_files(cache, counted, dataset):
    def work() -> str:
        descriptors = len(os.listdir("/proc/self/fd"))
        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors + 10, most))
        try:
            return str(len(cached(counted, dataset)))
        except SimpleNetError as error:
            return str(error)

    assert in_children(1, work) == ["11"]


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPLENET_CACHE", str(tmp_path))
    assert features.cache_folder() == tmp_path
    monkeypatch.setenv("SIMPLENET_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert features.cache_folder() == tmp_path / "home" / ".cache" / "simplenet"


# Large images in tiles ----------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    height=st.integers(40, 120).map(lambda cells: 8 * cells),
    width=st.integers(300, 900),
    tile=st.integers(256, 1000),
)
def test_tiles_join_to_what_the_whole_image_gives(height: int, width: int, tile: int) -> None:
    """A look that sees 8 x 8 pixels and their neighbours gives the same, tiled or not."""
    image = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))
    seen = []

    def look(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(part.shape[-2:])
        cells = F.avg_pool2d(part, 8, ceil_mode=True)
        around = F.avg_pool2d(F.pad(cells, (1, 1, 1, 1)), 3, stride=1)
        return torch.cat([cells, around], dim=1).permute(0, 2, 3, 1), torch.ones(1, 2)

    whole, _ = look(image)
    seen.clear()
    joined, described = over_tiles(image, tile, look)
    torch.testing.assert_close(joined, whole)
    torch.testing.assert_close(described, torch.ones(1, 2))  # the tiles' shares add up to 1
    assert max(max(sides) for sides in seen) <= tile
    if max(height, width) > tile:
        assert len(seen) > 1


def test_features_in_tiles_are_nearly_those_of_the_whole_image() -> None:
    extractor = FrozenFeatures("resnet18", LAYERS, random_weights("resnet18"), 3, "reflect")
    image = torch.rand(1, 3, 320, 704, generator=torch.Generator().manual_seed(0))

    def look(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return extractor(part), torch.zeros(1, 1)

    with torch.inference_mode():
        whole, _ = look(image)
        joined, _ = over_tiles(image, 320, look)
    error = (joined - whole).norm(dim=-1) / whole.norm(dim=-1)
    assert joined.shape == whole.shape
    assert error.max() < 0.02
