"""The frozen backbone against a plain forward pass, and the cache against everything at once."""

import gc
import hashlib
import multiprocessing
import os
import resource
import shutil
import signal
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torchvision import models

from simplenet_lib import features
from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import ImageFiles, Sample, make_transform
from simplenet_lib.features import (
    FEATURE_BATCH,
    FrozenFeatures,
    Standardise,
    batches,
    build_backbone,
    cached_features,
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
    found = frozen(images)
    assert found.shape == (2, sum(channels), 8, 8)
    assert frozen.channels == sum(channels)
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
    found = frozen(pictures(1))
    assert (frozen.channels, *found.shape[1:]) == (shape[0], *shape)
    first = hooked("resnet18", weights, layers[:1], pictures(1))[0]
    check_close(found[:, : first.shape[1]], first)


@pytest.mark.parametrize("side", [96, 100, 65])
def test_odd_grids(weights, side):
    fine, coarse = hooked("resnet18", weights, LAYERS, pictures(1, side))
    found = FrozenFeatures("resnet18", LAYERS, weights)(pictures(1, side))
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
                :,
                max(0, row - reach) : row + reach + 1,
                max(0, column - reach) : column + reach + 1,
            ]
            assert averaged[:, row, column] == pytest.approx(window.mean(axis=(1, 2)), abs=1e-5)


def test_neighbourhood_comes_before_resizing(weights):
    _, coarse = hooked("resnet18", weights, LAYERS, pictures(1))
    found = FrozenFeatures("resnet18", LAYERS, weights, 3)(pictures(1))[:, 128:]
    # The corner takes the mean of the 2 x 2 coarse positions in the coarse corner.
    expected = coarse[:, :, :2, :2].mean((2, 3))
    check_close(found[..., 0, 0], expected)


def test_nothing_is_trained_and_training_mode_changes_nothing(weights):
    pretrained = {name: tensor.clone() for name, tensor in weights.state.items()}
    frozen = FrozenFeatures("resnet18", LAYERS, weights)
    whole = nn.Sequential(frozen, nn.Conv2d(384, 4, 1))
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
    values = torch.randn(2, 5, 3, 3) * 1e6
    values[0, 0] = 0
    assert torch.equal(Standardise(5)(values), values)


def test_standardise_is_numpys_mean_and_deviation():
    random = np.random.default_rng(0)
    scale = np.array([1, 10, 0.001, 0, 3])
    maps = (random.normal(size=(6, 7, 4, 5)) * scale + [0, 100, 5, 2, -1]).astype(np.float16)
    images = [0, 2, 5]
    standardise = Standardise(5)
    standardise.fit(maps, images)

    used = maps[images].astype(np.float64).reshape(-1, 5)
    deviation = used.std(axis=0)
    spread = deviation + Standardise.FLOOR * deviation.mean()
    expected = (maps.astype(np.float64) - used.mean(axis=0)) / spread
    expected = expected.clip(-Standardise.LIMIT, Standardise.LIMIT)
    found = standardise(torch.from_numpy(maps.astype(np.float32)).permute(0, 3, 1, 2))
    assert found.permute(0, 2, 3, 1).numpy() == pytest.approx(expected, abs=1e-4)
    assert expected[..., 3].max() < 1e-6  # the constant channel stays finite

    far = torch.full((1, 5, 1, 1), 1e9)
    assert standardise(far).unique().tolist() == [Standardise.LIMIT]
    assert standardise(-far).unique().tolist() == [-Standardise.LIMIT]


def test_standardise_fitted_twice_forgets_the_first_and_travels_in_its_state():
    random = np.random.default_rng(1)
    first, second = random.normal(size=(2, 3, 4, 4, 6)).astype(np.float16)
    twice, once = Standardise(6), Standardise(6)
    twice.fit(first, [0, 1, 2])
    twice.fit(second, [0, 1])
    once.fit(second, [0, 1])
    copy = Standardise(6)
    copy.load_state_dict(twice.state_dict())
    values = torch.randn(1, 6, 2, 2) * 10
    assert torch.equal(twice(values), once(values)) and torch.equal(copy(values), once(values))


# The cache


class Counted(nn.Module):
    """A feature extractor that counts its calls."""

    def __init__(self, extractor: FrozenFeatures) -> None:
        super().__init__()
        self.extractor = extractor
        self.calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.extractor(images)


@pytest.fixture
def counted(extractor) -> Counted:
    return Counted(extractor)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SIMPLENET_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def write_images(folder: Path, count: int, seed: int = 0) -> ImageFiles:
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    for index in range(count):
        pixels = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:03}.png")
    samples = [Sample(path, "good") for path in sorted(folder.iterdir())]
    return ImageFiles(samples, make_transform(64, 64))


@pytest.fixture
def dataset(tmp_path) -> ImageFiles:
    return write_images(tmp_path / "images", 11)  # one full batch, and a rest


class Watched(ImageFiles):
    """Images that tell when the second batch has been read."""

    def __init__(self, images: ImageFiles) -> None:
        super().__init__(images.samples, images.transform)
        self.second_batch = threading.Event()

    def __getitem__(self, index: int):
        item = super().__getitem__(index)
        if index == min(len(self), 2 * FEATURE_BATCH) - 1:
            self.second_batch.set()
        return item


def test_batches_come_in_order_and_are_read_ahead(dataset):
    watched = Watched(dataset)
    found = []
    for batch in batches(watched):
        assert watched.second_batch.wait(timeout=30)  # while the first one is still in use
        found.append(batch)
    assert torch.cat([batch["index"] for batch in found]).tolist() == list(range(11))
    expected = torch.stack([dataset[index]["image"] for index in range(11)])
    assert torch.equal(torch.cat([batch["image"] for batch in found]), expected)


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


def cached(extractor: nn.Module, dataset: ImageFiles, key: str = "key") -> np.ndarray:
    return cached_features(extractor, dataset, key, progress=False)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_cache_holds_the_features_and_is_read_the_second_time(cache, counted, dataset):
    found = cached(counted, dataset)
    assert (found.shape, found.dtype) == ((11, 8, 8, 384), np.float16)
    direct = torch.stack([item["image"] for item in dataset])
    expected = counted.extractor(direct).permute(0, 2, 3, 1).numpy()
    # Half precision keeps 11 bits: a relative error of at most 2^-11.
    assert found.astype(np.float32) == pytest.approx(expected, rel=2**-11 + 1e-4, abs=1e-4)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    assert len(names(cache)) == 1 and names(cache)[0].endswith(".npy")

    calls = counted.calls
    again = cached(counted, dataset)
    assert (calls, counted.calls) == (2, 2)
    assert np.array_equal(found, again)


def test_cache_depends_on_every_byte_on_the_order_and_on_the_key(cache, counted, dataset):
    first = cached(counted, dataset).copy()
    reordered = ImageFiles(dataset.samples[::-1], dataset.transform)
    assert np.allclose(cached(counted, reordered), first[::-1], rtol=2e-3, atol=1e-3)
    cached(counted, dataset, "another key")
    assert len(names(cache)) == 3

    changed = dataset.samples[7].image
    data = bytearray(changed.read_bytes())
    shutil.copy(dataset.samples[0].image, changed)
    second = cached(counted, dataset)
    assert len(names(cache)) == 4
    different = [index for index in range(11) if not np.array_equal(first[index], second[index])]
    assert different == [7]
    changed.write_bytes(data)
    calls = counted.calls
    assert np.array_equal(cached(counted, dataset), first)
    data += b"\0"  # after the end of the picture, and yet another file
    changed.write_bytes(data)
    cached(counted, dataset)
    assert (counted.calls - calls, len(names(cache))) == (2, 5)


def test_moved_images_are_recognised(cache, counted, dataset, tmp_path):
    cached(counted, dataset)
    (tmp_path / "images").rename(tmp_path / "elsewhere")
    samples = [Sample(tmp_path / "elsewhere" / s.image.name, "good") for s in dataset.samples]
    calls = counted.calls
    cached(counted, ImageFiles(samples, dataset.transform))
    assert counted.calls == calls


class Interrupted(ImageFiles):
    """Somebody presses Ctrl-C in the second batch."""

    def __getitem__(self, index):
        if index == 9:
            assert [name[-8:] for name in names(features.cache_folder())] == [".partial"]
            raise KeyboardInterrupt
        return super().__getitem__(index)


def test_interrupted_or_failed_runs_leave_nothing(cache, counted, dataset):
    with pytest.raises(KeyboardInterrupt):
        cached(counted, Interrupted(dataset.samples, dataset.transform))
    assert names(cache) == []
    dataset.samples[9].image.write_bytes(b"no image")
    with pytest.raises(SimpleNetError, match="009.png: not a readable image"):
        cached(counted, dataset)
    assert names(cache) == []
    dataset.samples[9].image.unlink()
    with pytest.raises(SimpleNetError, match="009.png: could not be read"):
        cached(counted, dataset)
    assert names(cache) == []


def test_features_beyond_half_precision_are_refused(cache, dataset):
    class Loud(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1))

        def forward(self, images):
            return images * 1e6

    with pytest.raises(SimpleNetError, match="overflow half precision"):
        cached(Loud(), dataset)
    assert names(cache) == []


@pytest.mark.parametrize("damage", ["empty", "cut off", "text", "no header"])
def test_damaged_entry_is_computed_anew(cache, counted, dataset, damage):
    first = cached(counted, dataset).copy()
    (entry,) = cache.iterdir()
    data = entry.read_bytes()
    contents = {
        "empty": b"",
        "cut off": data[: len(data) // 2],
        "text": b"not an array\n" * 1000,
        "no header": data[:20],
    }
    entry.write_bytes(contents[damage])
    assert np.array_equal(cached(counted, dataset), first)
    assert (counted.calls, entry.read_bytes() == data) == (4, True)


def test_cache_that_cannot_be_a_folder(cache, counted, dataset):
    cache.write_text("a file is in the way")
    with pytest.raises(SimpleNetError, match="cache could not be written .* SIMPLENET_CACHE"):
        cached(counted, dataset)


def test_full_disk_is_found_before_writing(cache, counted, dataset, monkeypatch):
    free = 2 * 11 * 8 * 8 * 384 - 1  # one byte short
    usage = type(shutil.disk_usage("/"))(10**12, 10**12 - free, free)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(SimpleNetError, match="needs 0.0 GB.*Free some space"):
        cached(counted, dataset)
    assert names(cache) == []


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


def test_disk_that_fills_up_while_writing(cache, counted, dataset):
    """A limit on the size of a file fails a write in its middle, as a full disk does."""

    def work() -> str:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, resource.RLIM_INFINITY))
        with pytest.raises(SimpleNetError) as caught:
            cached(counted, dataset)
        return str(caught.value)

    (message,) = in_children(1, work)
    assert "the feature cache could not be written ([Errno 27]" in message
    assert names(cache) == []


def test_two_processes_at_once_leave_one_whole_entry(cache, counted, dataset):
    barrier = multiprocessing.get_context("fork").Barrier(2)

    class Together(ImageFiles):
        def __getitem__(self, index):
            if index in (0, 9):
                barrier.wait(60)  # both have begun to write, and both have written a part
            return super().__getitem__(index)

    together = Together(dataset.samples, dataset.transform)
    found = in_children(2, lambda: hashlib.sha256(cached(counted, together)).hexdigest())
    assert len(names(cache)) == 1
    entry = cached(counted, dataset)
    assert counted.calls == 0  # here: the children counted their own
    assert found == [hashlib.sha256(entry).hexdigest()] * 2


def test_partial_files_of_two_processes_have_two_names(cache, counted, dataset, monkeypatch):
    """Even if both have the same number, on two machines that share a disk."""
    seen = set()

    class Watched(ImageFiles):
        def __getitem__(self, index):
            seen.update(names(cache))
            return super().__getitem__(index)

    watched = Watched(dataset.samples, dataset.transform)
    for key in "ab":
        cached(counted, watched, key)
    partial = {name.split(".", 1)[1] for name in seen if name.endswith(".partial")}
    assert len(partial) == 2


def size_of_one(cache: Path) -> int:
    return max(path.stat().st_size for path in cache.glob("*.npy"))


def test_limit_forgets_the_least_recently_used_never_the_newest(
    cache, counted, dataset, monkeypatch
):
    entries = {}
    for age, key in zip((400, 300, 200), "abc", strict=True):
        known = set(names(cache))
        cached(counted, dataset, key)
        (entries[key],) = set(names(cache)) - known
        long_ago = (cache / entries[key]).stat().st_mtime - age
        os.utime(cache / entries[key], (long_ago, long_ago))
    cached(counted, dataset, "a")  # now b is the one not used for longest
    monkeypatch.setattr(features, "CACHE_LIMIT_BYTES", 3 * size_of_one(cache))
    cached(counted, dataset, "d")
    assert entries["b"] not in names(cache)
    assert {entries["a"], entries["c"]} < set(names(cache)) and len(names(cache)) == 3

    monkeypatch.setattr(features, "CACHE_LIMIT_BYTES", 1)
    calls = counted.calls
    found = cached(counted, dataset, "e")
    assert len(names(cache)) == 1
    cached(counted, dataset, "e")
    assert counted.calls == calls + 2 and found.shape == (11, 8, 8, 384)


def test_an_entry_in_use_can_be_forgotten(cache, counted, dataset, monkeypatch):
    found = cached(counted, dataset, "a")
    expected = found.copy()
    monkeypatch.setattr(features, "CACHE_LIMIT_BYTES", 1)
    cached(counted, dataset, "b")
    gc.collect()
    assert len(names(cache)) == 1 and np.array_equal(found, expected)


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
    assert mine.exists() and not stale.exists() and len(names(cache)) == 2


def test_cache_of_another_user_can_be_read(cache, counted, dataset, monkeypatch):
    first = cached(counted, dataset).copy()

    def refuse(*args, **options):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "utime", refuse)
    assert np.array_equal(cached(counted, dataset), first)
    assert counted.calls == 2


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("SIMPLENET_CACHE", str(tmp_path))
    assert features.cache_folder() == tmp_path
    monkeypatch.setenv("SIMPLENET_CACHE", "")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert features.cache_folder() == tmp_path / "home" / ".cache" / "simplenet"
