"""Heads and committee against numpy, and checkpoints against everything that can befall a file."""

import json
import math
import pickle
import struct
import subprocess
import sys
import threading
import tracemalloc
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor, nn
from torchvision.models import resnet18

from simplenet_lib import model as model_module
from simplenet_lib.config import Config, SimpleNetError, preset
from simplenet_lib.dataset import ImageFiles, Sample, make_transform
from simplenet_lib.localization import predict
from simplenet_lib.model import (
    CHECKPOINT_FORMAT,
    SCALE,
    Head,
    SimpleNet,
    grid,
    read_checkpoint,
    write_checkpoint,
    write_whole,
)
from simplenet_lib.weights import Weights, digest_of

TINY = {"backbone": "resnet18", "layers": ("layer1",), "resize": 32, "crop": 32}
TINY |= {"batchnorm": True, "adaptor_scale": 1.0, "standardise": True}
CONFIG = preset("fast", **TINY, adaptor_channels=4, hidden_channels=3, heads=2)


def randomise(module: nn.Module, seed: int) -> None:
    """Leave no parameter or statistic at its initial value."""
    random = torch.Generator().manual_seed(seed)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=random) - 0.2)
            if name.split(".")[-1] in ("std", "running_var", "spread", "scale"):
                tensor.add_(0.3)


def head(config: Config = CONFIG, channels: int = 6) -> Head:
    result = Head(channels, config)
    randomise(result, 1)
    return result.eval()


@pytest.fixture(scope="module")
def random_weights() -> Weights:
    torch.manual_seed(0)
    state = resnet18().state_dict()
    return Weights(state, "a test", digest_of(state, "conv2"), "conv2")


@pytest.fixture(autouse=True)
def found(random_weights: Weights, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_module, "find_weights", lambda name, path=None: random_weights)


@pytest.fixture
def trained(random_weights: Weights) -> SimpleNet:
    model = SimpleNet(CONFIG, random_weights).eval()
    for seed, part in enumerate([*model.heads, model.standardise, model.drift]):
        randomise(part, seed)
    for seed, units in enumerate((model.centre, model.spread, model.level, model.scale)):
        units.uniform_(0.3, 2, generator=torch.Generator().manual_seed(seed))
    model.threshold, model.typical = 0.1 + 0.2, -1 / 3  # no short decimal
    return model


# The head -----------------------------------------------------------------------------


def test_forward_is_minus_the_discriminator_at_every_position() -> None:
    h = head()
    features = torch.randn(2, 3, 5, 6)
    s = {name: t.numpy() for name, t in h.state_dict().items()}
    x = features.numpy() @ s["adaptor.linear.weight"].T + s["adaptor.linear.bias"]
    x = x @ s["discriminator.hidden.weight"].T + s["discriminator.hidden.bias"]
    x = (x - s["discriminator.norm.running_mean"]) / np.sqrt(
        s["discriminator.norm.running_var"] + 1e-5
    )
    x = x * s["discriminator.norm.weight"] + s["discriminator.norm.bias"]
    x = np.where(x > 0, x, 0.2 * x) @ s["discriminator.score.weight"].T
    scores = h(features)
    assert scores.shape == (2, 3, 5)
    np.testing.assert_allclose(scores.detach().numpy(), -x[..., 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(h(features[1, 2]), scores[1, 2])  # any shape in front


def test_normal_and_noisy_score_the_same_vectors_with_and_without_noise() -> None:
    h = head()
    vectors = torch.randn(7, 6)
    normal, noisy = h.normal_and_noisy(vectors, torch.Generator().manual_seed(3))
    assert normal.shape == noisy.shape == (7,)
    torch.testing.assert_close(normal, -h(vectors))
    noise = torch.empty(7, 4).normal_(0, CONFIG.sigma, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(noisy, h.discriminator(h.adaptor(vectors) + noise))


def test_batchnorm_sees_both_halves_in_one_batch() -> None:
    h = head().train()
    vectors = torch.randn(7, 6)
    noise = torch.empty(7, 4).normal_(0, CONFIG.sigma, generator=torch.Generator().manual_seed(3))
    adapted = h.adaptor(vectors).detach()
    hidden = h.discriminator.hidden(torch.cat([adapted, adapted + noise]))
    before = h.discriminator.norm.running_mean.clone()
    h.normal_and_noisy(vectors, torch.Generator().manual_seed(3))
    expected = 0.9 * before + 0.1 * hidden.mean(dim=0)
    torch.testing.assert_close(h.discriminator.norm.running_mean, expected)


def test_gradients_reach_the_adaptor_through_both_halves() -> None:
    h = head(preset("fast", **TINY, adaptor_channels=4, hidden_channels=3, sigma=9.0))
    vectors = torch.randn(7, 6)

    def gradient(of_normal: float, of_noisy: float) -> Tensor:
        h.zero_grad()
        normal, noisy = h.normal_and_noisy(vectors, torch.Generator().manual_seed(3))
        (of_normal * normal.sum() + of_noisy * noisy.sum()).backward()
        assert h.adaptor.linear.weight.grad is not None
        return h.adaptor.linear.weight.grad.clone()

    first, second = gradient(1, 0), gradient(0, 1)
    assert first.any()
    assert second.any()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(gradient(1, 1), first + second)


@pytest.mark.parametrize("scale", [0.05, 2.0**-4, 8.0])
def test_the_adaptors_scale_leaves_the_first_scores_alone(scale: float) -> None:
    """The adapted features shrink, and the noise beside them grows; the first scores stay."""
    widths = {"adaptor_channels": 4, "hidden_channels": 3}
    heads = []
    for factor in (1.0, scale):
        torch.manual_seed(0)
        heads.append(Head(6, preset("fast", **{**TINY, "adaptor_scale": factor}, **widths)).eval())
    plain, scaled = heads
    vectors = torch.randn(20, 6)
    torch.testing.assert_close(scaled.adaptor(vectors), scale * plain.adaptor(vectors))
    torch.testing.assert_close(scaled(vectors), plain(vectors))
    assert plain(vectors).std() > 0.01
    if scale.hex().startswith("0x1.0000000000000p"):  # a power of 2 rounds nothing
        assert torch.equal(scaled(vectors), plain(vectors))
    for name in ("adaptor.linear.bias", "discriminator.hidden.bias", "discriminator.score.weight"):
        assert torch.equal(scaled.state_dict()[name], plain.state_dict()[name])


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.floats(0.01, 100))
def test_first_scales_keep_the_mean_square(layer_channels: list[int], fine_scale: float) -> None:
    scales = model_module.first_scales(layer_channels, fine_scale).double()
    first, *others = scales.split(layer_channels)
    assert float(scales.square().mean()) == pytest.approx(1, rel=1e-5)
    for other in others:
        torch.testing.assert_close(first.max() / other, torch.full_like(other, fine_scale))
    ones = torch.ones(sum(layer_channels))
    assert torch.equal(model_module.first_scales(layer_channels, 1.0), ones)


def test_the_first_layer_weighs_more_at_the_start(random_weights: Weights) -> None:
    """Every head draws the weights that it would draw anyway; only their columns differ."""
    config = replace(CONFIG, layers=("layer1", "layer2"))
    plain = SimpleNet(replace(config, fine_scale=1.0), random_weights)
    larger = SimpleNet(replace(config, fine_scale=3.0), random_weights)
    for before, after in zip(plain.heads, larger.heads, strict=True):
        ratio = after.adaptor.linear.weight / before.adaptor.linear.weight
        fine, coarse = ratio.split([64, 128], dim=1)
        torch.testing.assert_close(fine, 3 * coarse[:, :1].expand_as(fine))
        torch.testing.assert_close(coarse, coarse[:1, :1].expand_as(coarse))
        assert torch.equal(before.discriminator.hidden.weight, after.discriminator.hidden.weight)


# SimpleNet ----------------------------------------------------------------------------


def test_only_heads_are_trained_and_the_seed_decides_their_start(random_weights: Weights) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = SimpleNet(CONFIG, random_weights)
    assert torch.equal(torch.rand(3), expected)  # the global generator is not moved
    again = SimpleNet(CONFIG, random_weights)
    changes = {"adaptor_channels": 4, "hidden_channels": 3}
    other = SimpleNet(preset("fast", **TINY, **changes, heads=2, seed=1), random_weights)
    names = ["adaptor.linear.weight", "discriminator.hidden.weight", "discriminator.score.weight"]
    for name in names:
        weights = [
            model.state_dict()[f"heads.{number}.{name}"]
            for model in (first, other)
            for number in range(2)
        ]
        assert len({tuple(weight.flatten().tolist()) for weight in weights}) == 4
        assert torch.equal(weights[0], again.state_dict()[f"heads.0.{name}"])
    trainable = {name for name, p in first.named_parameters() if p.requires_grad}
    assert {name.split(".")[1] for name in trainable} == {"0", "1"}
    assert all(name.startswith("heads.") for name in trainable)
    # A committee of another size starts with the same heads.
    for count in (1, 3):
        config = preset("fast", **TINY, **changes, heads=count)
        state = SimpleNet(config, random_weights).state_dict()
        for number in range(min(count, 2)):
            for name in names:
                key = f"heads.{number}.{name}"
                assert torch.equal(state[key], first.state_dict()[key])


@pytest.mark.parametrize("ratio", [0.0, 0.5])
@pytest.mark.parametrize("neighbourhood", [1, 3])
@pytest.mark.parametrize("layers", [("layer2", "layer1", "layer3"), ("layer3",)])
@pytest.mark.parametrize("batchnorm", [True, False])
def test_score_maps_are_those_of_each_head_on_the_joined_features(
    batchnorm: bool,
    layers: tuple[str, ...],
    neighbourhood: int,
    ratio: float,
    random_weights: Weights,
) -> None:
    changes = {"layers": layers, "resize": 64, "crop": 64, "ratio": ratio, "heads": 3}
    changes |= {"batchnorm": batchnorm}
    changes |= {"neighbourhood": neighbourhood, "adaptor_channels": 4, "hidden_channels": 3}
    model = SimpleNet(preset("fast", **{**TINY, **changes}), random_weights).eval()
    for seed, part in enumerate([*model.heads, model.standardise]):
        randomise(part, seed)
    height, width = model.config.seen
    assert (height, width) == ((64, 64) if ratio == 0 else (48, 96))
    with torch.inference_mode():
        outputs = model.features.outputs(torch.randn(2, 3, height, width))
        maps = model.score_maps(outputs)
        vectors = model.standardise(model.features.join(outputs))
        expected = torch.stack([head(vectors) for head in model.heads])
    assert maps.shape == (3, 2, *model.level.shape)
    assert expected.std(dim=(1, 2, 3)).min() > 1e-2
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("layer", ["layer1", "layer2", "layer3", "layer4"])
@pytest.mark.parametrize(("crop", "ratio"), [(33, 0.0), (64, 0.0), (95, 1.0), (80, 2.1)])
def test_the_grid_is_that_of_the_first_layer(
    layer: str, crop: int, ratio: float, random_weights: Weights
) -> None:
    changes = {"layers": (layer, "layer2"), "resize": 96, "crop": crop, "ratio": ratio}
    config = preset("fast", **{**TINY, **changes}, adaptor_channels=4)
    model = SimpleNet(config, random_weights).eval()
    with torch.inference_mode():
        assert model(torch.zeros(1, 3, *config.seen)).shape == (1, *grid(config))
    assert model.level.shape == model.scale.shape == grid(config)


def test_committee_is_a_mean_in_units(trained: SimpleNet) -> None:
    maps = torch.randn(2, 4, 8, 8)
    numbers = {name: getattr(trained, name).numpy() for name in ("centre", "spread")}
    expected = np.zeros((4, 8, 8))
    for head_map, centre, spread in zip(maps.numpy(), *numbers.values(), strict=True):
        expected += (head_map - centre) / spread / 2
    expected = (expected - trained.level.numpy()) / trained.scale.numpy()
    assert trained.config.bound == 4
    expected = 4 * np.tanh(expected / 4)
    np.testing.assert_allclose(trained.committee(maps).numpy(), expected, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        images = torch.randn(2, 3, 32, 32)
        maps = trained.score_maps(trained.features.outputs(images))
        torch.testing.assert_close(trained(images), trained.committee(maps))


def test_units_start_at_the_typical_score_and_reach_1_at_the_threshold(trained: SimpleNet) -> None:
    trained.typical, trained.threshold = 2.0, 6.0
    values = torch.tensor([[2.0, 6.0], [4.0, 10.0]])
    assert trained.in_units(values).tolist() == [[0, 1], [0.5, 2]]


def test_save_and_load_give_the_same_bits(trained: SimpleNet, tmp_path: Path) -> None:
    path = tmp_path / "new" / "folder" / "model.safetensors"
    trained.save(path)
    loaded = SimpleNet.load(path)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded(images), trained(images))
    assert loaded(images).shape == (2, 8, 8)
    assert all(getattr(loaded, name) == getattr(trained, name) for name in SCALE)
    assert loaded.config == trained.config
    assert not loaded.training
    again = tmp_path / "again.safetensors"
    loaded.save(again)
    assert again.read_bytes() == path.read_bytes()
    assert sorted(p.name for p in path.parent.iterdir()) == ["model.safetensors"]
    for name, tensor in trained.trained_state().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # The backbone's 45 MB stay out; the largest part is the drift's 100 directions of 64 numbers.
    assert not any(name.startswith("features.") for name in read_checkpoint(path)[0])
    assert path.stat().st_size < 40_000


# Damaged checkpoints ------------------------------------------------------------------


@pytest.fixture
def rewritten(trained: SimpleNet, tmp_path: Path) -> Callable[..., Path]:
    """Write the checkpoint of ``trained`` with some tensors or metadata changed or left out."""

    def write(tensors: dict[str, Any] | None = None, **metadata: str | None) -> Path:
        scale = {name: repr(getattr(trained, name)) for name in SCALE}
        state = {**trained.trained_state(), **(tensors or {})}
        data = {**trained.identity(), **scale, **metadata}
        path = tmp_path / "model.safetensors"
        write_checkpoint(
            path,
            {name: tensor for name, tensor in state.items() if tensor is not None},
            {name: text for name, text in data.items() if text is not None},
        )
        return path

    return write


def refused(path: Path) -> str:
    with pytest.raises(SimpleNetError) as caught:
        SimpleNet.load(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message
    return message


def test_the_rewriting_itself_does_no_harm(rewritten: Callable[..., Path]) -> None:
    SimpleNet.load(rewritten())


def test_tensors_that_do_not_fit_are_refused(rewritten: Callable[..., Path]) -> None:
    weight = "heads.0.discriminator.score.weight"
    for name in ("level", "centre", "drift.gaussian.directions", "standardise.std"):
        assert f"({name})" in refused(rewritten({name: None}))
    assert "(surplus)" in refused(rewritten({"surplus": torch.zeros(1)}))
    message = refused(rewritten({"heads.1.adaptor.linear.weight": torch.zeros(64, 4)}))
    assert "heads.1.adaptor.linear.weight is (64, 4)" in message
    assert "asks for (4, 64)" in message
    message = refused(rewritten({"level": torch.zeros(1, 8)}))  # would broadcast silently
    assert "level is (1, 8)" in message and "asks for (8, 8)" in message
    assert "spread is (3,)" in refused(rewritten({"spread": torch.ones(3)}))
    assert "torch.float16" in refused(rewritten({weight: torch.zeros(1, 3).half()}))
    assert "not finite" in refused(rewritten({weight: torch.tensor([[1.0, math.nan, 1.0]])}))
    assert "not finite" in refused(rewritten({weight: torch.tensor([[1.0, math.inf, 1.0]])}))
    assert "not finite" in refused(rewritten({"scale": torch.full((8, 8), math.inf)}))


def test_heads_that_do_not_fit_are_refused(
    rewritten: Callable[..., Path], trained: SimpleNet
) -> None:
    sentence = "its heads do not fit its configuration"
    weight = "heads.0.discriminator.score.weight"
    assert sentence in refused(rewritten({weight: None}))
    assert sentence in refused(rewritten({weight: torch.zeros(1, 4)}))
    config = json.loads(CONFIG.to_json())
    for heads in (1, 3, 100):
        assert sentence in refused(rewritten(config=json.dumps({**config, "heads": heads})))
    second = [name for name in trained.trained_state() if name.startswith("heads.1.")]
    assert sentence in refused(rewritten(dict.fromkeys(second)))
    state = trained.trained_state()
    third = {name.replace(".1.", ".2."): state[name].clone() for name in second}
    assert sentence in refused(rewritten(third))
    renamed = {**dict.fromkeys(second), **third}  # as many numbers, under other names
    assert "its tensors do not fit its configuration" in refused(rewritten(renamed))


def test_a_head_for_another_backbone_is_refused(rewritten: Callable[..., Path]) -> None:
    """All tensors fit each other and the configuration, but not the backbone's 64 channels."""
    tensors = {
        f"heads.{number}.{name}": tensor
        for number in range(2)
        for name, tensor in head(channels=6).state_dict().items()
    }
    narrow = {"standardise.mean": torch.zeros(6), "standardise.std": torch.ones(6)}
    path = rewritten(tensors | narrow)
    assert "6" in (message := refused(path)) and "64" in message
    assert "but its configuration asks for" in message


def test_metadata_that_does_not_fit_is_refused(rewritten: Callable[..., Path]) -> None:
    assert "not a checkpoint of this program" in refused(rewritten(format="simplenet-0"))
    assert "not a checkpoint of this program" in refused(rewritten(format="simplenet-4"))
    assert "not a checkpoint of this program" in refused(rewritten(format=None))
    assert "not a SimpleNet configuration" in refused(rewritten(config=None))
    assert "not a SimpleNet configuration" in refused(rewritten(config="{"))
    assert "not a SimpleNet configuration" in refused(rewritten(config="[1]"))
    assert "not a SimpleNet configuration" in refused(rewritten(config="[" * 100_000))
    config = json.loads(CONFIG.to_json())
    assert "sigma is nan" in refused(rewritten(config=json.dumps({**config, "sigma": math.nan})))
    assert "'surplus'" in refused(rewritten(config=json.dumps({**config, "surplus": 1})))
    assert "seed is '0'" in refused(rewritten(config=json.dumps({**config, "seed": "0"})))
    assert "threshold" in refused(rewritten(threshold=None))
    assert "threshold" in refused(rewritten(threshold="high"))
    assert "never trained" in refused(rewritten(threshold="nan"))
    assert "never trained" in refused(rewritten(typical="inf"))
    message = refused(rewritten(weights="0" * 64))
    assert "trained on other pretrained weights of resnet18" in message
    assert "SIMPLENET_WEIGHTS" in message


@pytest.mark.parametrize("older", ["simplenet-1", "simplenet-2"])
def test_a_model_of_an_earlier_version_says_what_to_do(
    rewritten: Callable[..., Path], older: str
) -> None:
    message = refused(rewritten(format=older))
    assert f"a model of an earlier version ({older})" in message
    assert message.endswith("this one reads simplenet-3. Train it again with the same command.")
    assert CHECKPOINT_FORMAT == "simplenet-3"
    with pytest.raises(SimpleNetError, match="Train it again"):  # a training's state as well
        read_checkpoint(rewritten(format=older))


def test_files_that_are_no_checkpoint_are_refused(
    rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    whole = rewritten().read_bytes()
    path = tmp_path / "damaged.safetensors"
    assert "no such checkpoint" in refused(path)
    (tmp_path / "folder").mkdir()
    assert "no such checkpoint" in refused(tmp_path / "folder")
    for size in [0, 4, 8, 100, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:size])
        assert "not a readable checkpoint" in refused(path)
    path.write_bytes(whole + b"\0")
    assert "not a readable checkpoint" in refused(path)


class Boom:
    """Unpickling it creates a file: the classic attack through a checkpoint."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.trace,)


def test_nothing_is_unpickled(tmp_path: Path) -> None:
    trace, path = tmp_path / "trace", tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Boom(trace)))
    assert "not a readable checkpoint" in refused(path)
    torch.save({"head": Boom(trace)}, path)
    assert "not a readable checkpoint" in refused(path)
    assert not trace.exists()
    with path.open("rb") as file, pytest.raises(pickle.UnpicklingError):  # it is a live pickle
        pickle.loads(pickle.dumps(Boom(trace)))
        assert trace.exists()
        pickle.load(file)


# Fuzz ---------------------------------------------------------------------------------

HEADER_VALUE = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 2**65),
    st.text(max_size=4),
    st.sampled_from(["[" * 5000, "[]", "null", '{"format": 1}', '{"format": "simplenet-3"}']),
    st.sampled_from(["F32", "F64", "I64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64"]),
    st.lists(st.integers(0, 2**63), max_size=3),
)


@pytest.fixture(scope="module")
def valid(random_weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    model = SimpleNet(CONFIG, random_weights)
    model.threshold, model.typical = 1.0, 0.0
    model.save(path)
    return path.read_bytes()


@pytest.fixture
def fast_load(monkeypatch: pytest.MonkeyPatch, random_weights: Weights) -> Iterator[None]:
    """Keep the frozen features of the one backbone, so that a load takes milliseconds."""
    frozen = SimpleNet(CONFIG, random_weights).features

    def features(backbone: str, layers: Any, weights: Any, neighbourhood: int, border: str) -> Any:
        if (backbone, tuple(layers)) != ("resnet18", ("layer1",)):
            raise SimpleNetError("another backbone")
        return frozen

    monkeypatch.setattr(model_module, "FrozenFeatures", features)
    yield


def load_or_refuse(data: bytes, path: Path) -> None:
    """The only two outcomes that are allowed."""
    path.write_bytes(data)
    try:
        model = SimpleNet.load(path)
    except SimpleNetError as error:
        assert str(error)
    else:
        assert all(bool(t.isfinite().all()) for t in model.trained_state().values())


@pytest.mark.usefixtures("fast_load")
def test_changed_bytes_load_or_are_refused(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    header = 8 + struct.unpack("<Q", valid[:8])[0]
    place = st.one_of(st.integers(0, header - 1), st.integers(0, len(valid) - 1))

    @given(
        changes=st.lists(st.tuples(place, st.integers(0, 255)), min_size=1, max_size=4),
        end=st.one_of(st.none(), st.integers(0, len(valid))),
    )
    def fuzz(changes: list[tuple[int, int]], end: int | None) -> None:
        data = bytearray(valid)
        for index, value in changes:
            data[index] = value
        load_or_refuse(bytes(data[:end]), path)

    fuzz()


@pytest.mark.usefixtures("fast_load")
def test_changed_headers_load_or_are_refused(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Headers that are still JSON get further than changed bytes."""
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    length = struct.unpack("<Q", valid[:8])[0]
    header = json.loads(valid[8 : 8 + length])
    entries = sorted(header)
    keys = ["dtype", "shape", "data_offsets", "simplenet", "x"]

    @given(entry=st.sampled_from(entries), key=st.sampled_from(keys), value=HEADER_VALUE)
    @example(entry="standardise.mean", key="shape", value=[0, 2**62])
    @example(entry="heads.0.adaptor.linear.weight", key="dtype", value="F8_E8M0")
    def fuzz(entry: str, key: str, value: Any) -> None:
        changed = json.loads(json.dumps(header))
        changed[entry][key] = value
        text = json.dumps(changed).encode()
        load_or_refuse(struct.pack("<Q", len(text)) + text + valid[8 + length :], path)

    fuzz()


@pytest.mark.usefixtures("fast_load")
@given(
    name=st.sampled_from([*json.loads(CONFIG.to_json()), "surplus"]),
    value=st.recursive(
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5)),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
        max_leaves=4,
    ),
)
def test_changed_configurations_load_or_are_refused(
    valid: bytes, tmp_path_factory: pytest.TempPathFactory, name: str, value: Any
) -> None:
    path = tmp_path_factory.getbasetemp() / "configuration.safetensors"
    tensors = safetensors.torch.load(valid)
    header = json.loads(valid[8 : 8 + struct.unpack("<Q", valid[:8])[0]])
    metadata = json.loads(header["__metadata__"]["simplenet"])
    metadata["config"] = json.dumps({**json.loads(metadata["config"]), name: value})
    write_checkpoint(path, tensors, metadata)
    load_or_refuse(path.read_bytes(), path)


def test_declared_sizes_are_not_believed(valid: bytes, tmp_path: Path) -> None:
    """A small file never makes a large allocation, whatever its header or configuration say."""
    path = tmp_path / "model.safetensors"
    length = struct.unpack("<Q", valid[:8])[0]
    header = json.loads(valid[8 : 8 + length])
    name = "heads.0.adaptor.linear.weight"
    weight = header[name]
    attacks = [struct.pack("<Q", 2**40) + valid[8:], struct.pack("<Q", 2**63) + valid[8:]]
    for shape in ([2**40, 1], [2**31, 2**33], [2**62, 2, 2, 0]):
        for end in (weight["data_offsets"][1], 2**42):
            offsets = [weight["data_offsets"][0], end]
            changed = {
                **header,
                name: {**weight, "shape": shape, "data_offsets": offsets},
            }
            text = json.dumps(changed).encode()
            attacks.append(struct.pack("<Q", len(text)) + text + valid[8 + length :])
    wide = {"adaptor_channels": 16384, "hidden_channels": 16384}
    for change in (wide, {**wide, "heads": 100}, {"heads": 100}):  # heads of a gigabyte each
        config = json.dumps({**json.loads(CONFIG.to_json()), **change})
        large = {**json.loads(header["__metadata__"]["simplenet"]), "config": config}
        write_checkpoint(path, safetensors.torch.load(valid), large)
        attacks.append(path.read_bytes())
    for data in attacks:
        path.write_bytes(data)
        before = resident()
        tracemalloc.start()
        with pytest.raises(SimpleNetError):
            SimpleNet.load(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 10e6
        assert resident() - before < 200e6


def resident() -> float:
    """Largest resident size of this process so far, in bytes (0 where unknown)."""
    try:
        import resource
    except ImportError:
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


# Writing ------------------------------------------------------------------------------


def test_a_failure_leaves_the_older_file_untouched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "metrics.json"
    write_whole(path, b"old")

    def full(fileno: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SimpleNetError, match="metrics.json: could not be written.*No space left"):
        write_whole(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    monkeypatch.undo()
    write_whole(path, b"new")
    assert path.read_bytes() == b"new"


def test_unwritable_places_are_named(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_bytes(b"")
    tensors = {"a": torch.zeros(1)}
    for path in (blocked / "model.safetensors", tmp_path, Path("/proc/nowhere/model.safetensors")):
        with pytest.raises(SimpleNetError, match=f"{path}: could not be written"):
            write_checkpoint(path, tensors, {})
    assert blocked.read_bytes() == b""
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_tensors_of_any_layout_are_written(tmp_path: Path) -> None:
    """Transposed, sliced and shared tensors: safetensors itself wants contiguous ones."""
    path = tmp_path / "a.safetensors"
    base = torch.arange(6.0).view(2, 3)
    tensors = {"transposed": base.T, "slice": base[:, 1], "whole": base, "step": torch.tensor(3)}
    write_checkpoint(path, tensors, {"format": CHECKPOINT_FORMAT})
    read, metadata = read_checkpoint(path)
    assert metadata == {"format": CHECKPOINT_FORMAT}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)


# From a program -----------------------------------------------------------------------


@pytest.fixture
def photo() -> Image.Image:
    """Another aspect ratio than the network's, with three different channels."""
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    pixels[..., 2] //= 3
    return Image.fromarray(pixels).resize((80, 60), Image.Resampling.BICUBIC)


def test_the_library_gives_its_model_and_imports_nothing_before() -> None:
    code = (
        "import sys, simplenet_lib\nassert 'torch' not in sys.modules\n"
        "from simplenet_lib import SimpleNet\n"
        "from simplenet_lib.model import SimpleNet as same\nassert SimpleNet is same\n"
        "assert 'matplotlib' not in sys.modules and not hasattr(simplenet_lib, 'Simple')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_image_of_any_kind_is_judged_as_its_file_is(
    trained: SimpleNet, photo: Image.Image, tmp_path: Path
) -> None:
    path = tmp_path / "photo.png"
    photo.save(path)
    rgb = np.asarray(photo)
    sample = ImageFiles([Sample(path, "good")], make_transform((32, 32), (32, 32)))
    (expected,) = predict(trained, sample, progress=False)
    alike: list[Any] = [path, str(path), path.read_bytes(), photo, rgb, rgb / np.float32(255)]
    alike += [Image.open(path), np.dstack([rgb, np.full((60, 80), 255, np.uint8)])]
    for image in alike:
        result = trained.predict(image)
        assert result.score == pytest.approx(expected.score, abs=1e-4)
        assert result.anomalous == expected.anomalous == (result.verdict == "anomalous")
        assert result.unfamiliar == expected.unfamiliar
        assert np.allclose(result.seen, expected.map, atol=1e-4)
    bgr = np.ascontiguousarray(rgb[..., ::-1])
    assert trained.predict(bgr, channels="bgr").score == pytest.approx(expected.score, abs=1e-4)
    assert abs(trained.predict(bgr).score - expected.score) > 1e-3  # the order does matter
    grey = np.asarray(photo.convert("L"))
    scores = [trained.predict(one).score for one in (grey, grey[..., None], photo.convert("L"))]
    assert scores == pytest.approx([scores[0]] * 3, abs=1e-5)
    turned = photo.transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6  # a camera held upright: turn it by 90 degrees to the right
    turned.save(tmp_path / "turned.png", exif=exif)
    for one in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        assert trained.predict(one).score == pytest.approx(expected.score, abs=1e-4)


def test_16_bits_need_a_white_level(trained: SimpleNet, photo: Image.Image) -> None:
    rgb = np.asarray(photo)
    expected = trained.predict(rgb).score
    deep = (rgb.astype(np.uint16) * 16 + 8).clip(0, 4095)
    with pytest.raises(SimpleNetError, match="knows no white level"):
        trained.predict(deep)
    trained.config = replace(trained.config, white=4095)
    assert trained.predict(deep).score == pytest.approx(expected, abs=0.02)
    assert trained.predict(deep.astype(np.float32)).score == pytest.approx(expected, abs=0.02)


def test_what_could_be_meant_in_more_than_one_way_is_refused(
    trained: SimpleNet, photo: Image.Image, tmp_path: Path
) -> None:
    rgb = np.asarray(photo)
    negative, unknown = rgb.astype(np.float64) / 255, rgb.astype(np.float64) / 255
    negative[0, 0, 0], unknown[0, 0, 0] = -0.1, np.nan
    empty = tmp_path / "empty.png"
    empty.write_bytes(b"")
    for image, sentence in (
        (rgb.astype(np.float64), "holds values from .* Floating point goes from 0 to 1"),
        (negative, "holds values from -0.1"),
        (unknown, "holds values from nan"),
        (rgb.astype(np.int64), "an array of int64 .* Give uint8"),
        (rgb > 99, "an array of bool"),
        (rgb.transpose(2, 0, 1), "Channels come last"),
        (rgb[None], "Give them as a list"),
        (rgb[..., :2], "Expected height, width and 1, 3 or 4 channels"),
        (rgb[:0], "Expected height"),
        (rgb[0, 0], "Expected height"),
        (3, "image 0: a int. Give a path"),
        (torch.from_numpy(rgb.copy()), "a Tensor. Give a path"),
        (b"no image", "image 0: not a readable image"),
        (empty, "empty.png: not a readable image .the file is empty"),
        (str(tmp_path / "gone.png"), "gone.png: not a readable image"),
    ):
        with pytest.raises(SimpleNetError, match=sentence):
            trained.predict(image)  # type: ignore[call-overload]
    with pytest.raises(SimpleNetError, match="channels='bgr' is for arrays"):
        trained.predict(photo, channels="bgr")
    with pytest.raises(SimpleNetError, match="channels is 'grb'"):
        trained.predict(rgb, channels="grb")  # type: ignore[call-overload]
    with pytest.raises(SimpleNetError, match="the threshold is inf"):
        trained.predict(rgb, threshold=math.inf)


def test_a_list_gives_a_list_and_an_iterator_an_iterator(
    trained: SimpleNet, photo: Image.Image
) -> None:
    frames: list[Any] = [photo.rotate(angle) for angle in range(20)]
    scores = [result.score for result in trained.predict(frames)]
    assert scores == pytest.approx([trained.predict(one).score for one in frames], abs=1e-4)
    assert [result.name for result in trained.predict(frames[:2])] == ["image 0", "image 1"]
    assert trained.predict([]) == []
    assert len(trained.predict(tuple(frames[:3]))) == 3

    taken = []

    def camera() -> Iterator[Any]:
        for number, frame in enumerate(frames):
            taken.append(number)
            yield frame
        yield b"damaged"

    before = threading.active_count()
    results = trained.predict(camera())
    assert taken == []
    for number, score in enumerate(scores):
        result = next(results)
        assert taken == list(range(number + 1))  # the next frame is not waited for
        assert (result.name, result.score) == (f"image {number}", pytest.approx(score, abs=1e-4))
    with pytest.raises(SimpleNetError, match="image 20: not a readable image"):
        next(results)
    assert threading.active_count() == before


def test_a_result_is_in_the_pixels_of_its_photo(
    trained: SimpleNet, photo: Image.Image, tmp_path: Path
) -> None:
    result = trained.predict(photo)
    assert result.size == (80, 60)
    assert (result.map.shape, result.map.dtype) == ((60, 80), np.float32)
    assert np.isfinite(result.map).all()
    low = trained.predict(photo, threshold=float(np.median(result.seen)))
    assert (low.verdict, low.score) == ("anomalous", pytest.approx(result.score))
    assert low.regions[0].peak == pytest.approx(result.score)
    share = sum(region.area for region in low.regions) / (80 * 60)
    assert share == pytest.approx((low.seen > low.threshold).mean(), abs=0.05)
    high = trained.predict(photo, threshold=result.score + 1)
    assert (high.verdict, high.regions) == ("normal", [])
    path = tmp_path / "new" / "overlay.png"
    low.save(path)
    with Image.open(path) as picture:
        assert picture.size == (80, 60)
        assert np.array_equal(np.asarray(picture), np.asarray(low.overlay()))
    with pytest.raises(SimpleNetError, match="overlay.what: could not be written"):
        low.save(tmp_path / "overlay.what")
    plt.switch_backend("Agg")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Agg says that it shows nothing
        low.show()
    assert "anomalous" in plt.gcf().axes[0].get_title()
    plt.close("all")


def test_of_a_part_that_is_not_seen_nothing_is_said(trained: SimpleNet) -> None:
    trained.config = replace(trained.config, resize=40, crop=32)
    result = trained.predict(Image.new("RGB", (80, 80), "grey"))
    seen = np.isfinite(result.map)
    expected = np.zeros((80, 80), dtype=bool)
    expected[8:72, 8:72] = True
    assert np.array_equal(seen, expected)


def test_a_score_that_is_no_number_does_not_pass_as_normal(
    trained: SimpleNet, photo: Image.Image
) -> None:
    trained.spread[0] = math.nan
    with pytest.raises(SimpleNetError, match="not finite"):
        trained.predict(photo)


def test_a_folder_of_a_training_is_loaded_and_keeps_the_digest_of_its_images(
    trained: SimpleNet, tmp_path: Path
) -> None:
    trained.images = "0" * 64
    trained.save(tmp_path / "run" / "model.safetensors")
    for path in (tmp_path / "run", str(tmp_path / "run" / "model.safetensors")):
        assert SimpleNet.load(path).images == trained.images
