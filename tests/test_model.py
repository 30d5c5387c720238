"""The head against numpy, and checkpoints against everything that can befall a file."""

import json
import math
import pickle
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models import resnet18

from simplenet_lib import model as model_module
from simplenet_lib.config import Config, SimpleNetError, preset
from simplenet_lib.model import (
    CHECKPOINT_FORMAT,
    SCALE,
    Head,
    SimpleNet,
    read_checkpoint,
    write_checkpoint,
    write_whole,
)
from simplenet_lib.weights import Weights, digest_of

TINY = {"backbone": "resnet18", "layers": ("layer1",), "resize": 32, "crop": 32}
CONFIG = preset("fast", **TINY, adaptor_channels=4, hidden_channels=3)


def head(config: Config = CONFIG, channels: int = 6) -> Head:
    """A head in which no parameter or statistic has its initial value."""
    result = Head(channels, config)
    random = torch.Generator().manual_seed(1)
    for name, tensor in result.state_dict().items():
        if tensor.is_floating_point() and name != "standardise.limit":
            tensor.copy_(torch.rand(tensor.shape, generator=random) - 0.2)
    result.standardise.std.add_(0.3)
    result.discriminator.norm.running_var.add_(0.3)
    result.standardise.limit.fill_(3.0)
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
    model.head.load_state_dict(head(channels=64).state_dict())
    model.threshold, model.typical = 0.1 + 0.2, -1 / 3  # no short decimal
    model.background = 1 / 7
    return model


# The head -----------------------------------------------------------------------------


def test_forward_is_minus_the_discriminator_at_every_position() -> None:
    h = head()
    features = torch.randn(2, 6, 3, 5)
    s = {name: t.numpy() for name, t in h.state_dict().items()}
    x = features.permute(0, 2, 3, 1).numpy()
    x = np.clip((x - s["standardise.mean"]) / s["standardise.std"], -3, 3)
    x = x @ s["adaptor.conv.weight"][:, :, 0, 0].T + s["adaptor.conv.bias"]
    x = x @ s["discriminator.hidden.weight"].T + s["discriminator.hidden.bias"]
    x = (x - s["discriminator.norm.running_mean"]) / np.sqrt(
        s["discriminator.norm.running_var"] + 1e-5
    )
    x = x * s["discriminator.norm.weight"] + s["discriminator.norm.bias"]
    x = np.where(x > 0, x, 0.2 * x) @ s["discriminator.score.weight"].T
    scores = h(features)
    assert scores.shape == (2, 3, 5)
    np.testing.assert_allclose(scores.detach().numpy(), -x[..., 0], rtol=1e-4, atol=1e-5)


def test_normal_and_noisy_score_the_same_vectors_with_and_without_noise() -> None:
    h = head()
    features = torch.randn(7, 6, 1, 1)
    normal, noisy = h.normal_and_noisy(features, torch.Generator().manual_seed(3))
    torch.testing.assert_close(normal, -h(features).flatten())
    noise = torch.empty(7, 4).normal_(0, CONFIG.sigma, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(noisy, h.discriminator(h.adapt(features) + noise))


def test_batchnorm_sees_both_halves_in_one_batch() -> None:
    h = head().train()
    features = torch.randn(7, 6, 1, 1)
    noise = torch.empty(7, 4).normal_(0, CONFIG.sigma, generator=torch.Generator().manual_seed(3))
    vectors = h.adapt(features).detach()
    hidden = h.discriminator.hidden(torch.cat([vectors, vectors + noise]))
    before = h.discriminator.norm.running_mean.clone()
    h.normal_and_noisy(features, torch.Generator().manual_seed(3))
    expected = 0.9 * before + 0.1 * hidden.mean(dim=0)
    torch.testing.assert_close(h.discriminator.norm.running_mean, expected)


def test_gradients_reach_the_adaptor_through_both_halves() -> None:
    h = head(preset("fast", **TINY, adaptor_channels=4, hidden_channels=3, sigma=9.0))
    features = torch.randn(7, 6, 1, 1)

    def gradient(of_normal: float, of_noisy: float) -> Tensor:
        h.zero_grad()
        normal, noisy = h.normal_and_noisy(features, torch.Generator().manual_seed(3))
        (of_normal * normal.sum() + of_noisy * noisy.sum()).backward()
        assert h.adaptor.conv.weight.grad is not None
        return h.adaptor.conv.weight.grad.clone()

    first, second = gradient(1, 0), gradient(0, 1)
    assert first.any()
    assert second.any()
    assert not torch.allclose(first, second)
    torch.testing.assert_close(gradient(1, 1), first + second)


# SimpleNet ----------------------------------------------------------------------------


def test_only_the_head_is_trained_and_the_seed_decides_its_start(random_weights: Weights) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = SimpleNet(CONFIG, random_weights)
    assert torch.equal(torch.rand(3), expected)  # the global generator is not moved
    again = SimpleNet(CONFIG, random_weights)
    other = SimpleNet(preset("fast", **TINY, adaptor_channels=4, seed=1), random_weights)
    weight = "head.adaptor.conv.weight"
    assert torch.equal(first.state_dict()[weight], again.state_dict()[weight])
    assert not torch.equal(first.state_dict()[weight], other.state_dict()[weight])
    trainable = {name for name, p in first.named_parameters() if p.requires_grad}
    assert trainable
    assert all(name.startswith("head.") for name in trainable)


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
    # The backbone's weights stay out: 4 * 64 + 4 + 4 * 3 + 3 + 3 and the statistics.
    assert path.stat().st_size < 10_000


# Damaged checkpoints ------------------------------------------------------------------


@pytest.fixture
def rewritten(trained: SimpleNet, tmp_path: Path) -> Callable[..., Path]:
    """Write the checkpoint of ``trained`` with some tensors or metadata changed or left out."""

    def write(tensors: dict[str, Any] | None = None, **metadata: str | None) -> Path:
        scale = {name: repr(getattr(trained, name)) for name in SCALE}
        state = {**trained.head.state_dict(), **(tensors or {})}
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
    weight = "discriminator.score.weight"
    assert f"({weight})" in refused(rewritten({weight: None}))
    assert "(standardise.mean)" in refused(rewritten({"standardise.mean": None}))
    assert "(surplus)" in refused(rewritten({"surplus": torch.zeros(1)}))
    message = refused(rewritten({weight: torch.zeros(1, 4)}))
    assert f"{weight} is (1, 4)" in message
    assert "asks for (1, 3)" in message
    assert "torch.float16" in refused(rewritten({weight: torch.zeros(1, 3).half()}))
    assert "not finite" in refused(rewritten({weight: torch.tensor([[1.0, math.nan, 1.0]])}))
    assert "not finite" in refused(rewritten({weight: torch.tensor([[1.0, math.inf, 1.0]])}))


def test_a_head_for_another_backbone_is_refused(tmp_path: Path, random_weights: Weights) -> None:
    """All tensors fit each other and the configuration, but not the backbone's 64 channels."""
    path = tmp_path / "model.safetensors"
    identity = {
        "format": CHECKPOINT_FORMAT,
        "config": CONFIG.to_json(),
        "weights": random_weights.digest,
    }
    scale = {"threshold": "1.0", "typical": "0.0", "background": "0.5"}
    write_checkpoint(path, head(channels=6).state_dict(), identity | scale)
    assert "asks for (4, 64, 1, 1)" in refused(path)


def test_metadata_that_does_not_fit_is_refused(rewritten: Callable[..., Path]) -> None:
    assert "not a checkpoint of this program" in refused(rewritten(format="simplenet-0"))
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


def test_files_that_are_no_checkpoint_are_refused(
    rewritten: Callable[..., Path], tmp_path: Path
) -> None:
    whole = rewritten().read_bytes()
    path = tmp_path / "damaged.safetensors"
    assert "no such checkpoint" in refused(path)
    assert "no such checkpoint" in refused(tmp_path)
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
    st.sampled_from(["[" * 5000, "[]", "null", '{"format": 1}', '{"format": "simplenet-2"}']),
    st.sampled_from(["F32", "F64", "I64", "BF16", "F8_E4M3", "F8_E8M0", "F4", "C64", "U64"]),
    st.lists(st.integers(0, 2**63), max_size=3),
)


@pytest.fixture(scope="module")
def valid(random_weights: Weights, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fuzz") / "model.safetensors"
    model = SimpleNet(CONFIG, random_weights)
    model.threshold, model.typical, model.background = 1.0, 0.0, 0.5
    model.save(path)
    return path.read_bytes()


@pytest.fixture
def fast_load(monkeypatch: pytest.MonkeyPatch, random_weights: Weights) -> Iterator[None]:
    """Keep the frozen features of the one backbone, so that a load takes milliseconds."""
    frozen = SimpleNet(CONFIG, random_weights).features

    def features(backbone: str, layers: Any, weights: Any, neighbourhood: int) -> Any:
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
        assert all(bool(t.isfinite().all()) for t in model.head.state_dict().values())


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
    @example(entry="standardise.limit", key="shape", value=[0, 2**62])
    @example(entry="adaptor.conv.weight", key="dtype", value="F8_E8M0")
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
    weight = header["adaptor.conv.weight"]
    attacks = [struct.pack("<Q", 2**40) + valid[8:], struct.pack("<Q", 2**63) + valid[8:]]
    for shape in ([2**40, 1, 1, 1], [2**31, 2**31, 4, 1], [2**62, 2, 2, 0]):
        for end in (weight["data_offsets"][1], 2**42):
            offsets = [weight["data_offsets"][0], end]
            changed = {
                **header,
                "adaptor.conv.weight": {**weight, "shape": shape, "data_offsets": offsets},
            }
            text = json.dumps(changed).encode()
            attacks.append(struct.pack("<Q", len(text)) + text + valid[8 + length :])
    config = {**json.loads(CONFIG.to_json()), "adaptor_channels": 16384, "hidden_channels": 16384}
    large = {**json.loads(header["__metadata__"]["simplenet"]), "config": json.dumps(config)}
    write_checkpoint(path, safetensors.torch.load(valid), large)  # a head of a gigabyte
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
