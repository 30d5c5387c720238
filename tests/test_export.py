"""The ONNX file against PyTorch: same maps and scores, at any batch size."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import resnet18

from simplenet_lib.config import SimpleNetError, preset
from simplenet_lib.export import OPSET, Detector, export_onnx
from simplenet_lib.model import SimpleNet
from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD, Weights, digest_of

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def model() -> SimpleNet:
    """A detector with all that the graph can hold: three layers, a neighbourhood, a crop."""
    torch.manual_seed(0)
    state = resnet18().state_dict()
    weights = Weights(state, "a test", digest_of(state, "conv2"), "conv2")
    layers = ("layer2", "layer1", "layer3")
    config = preset("fast", backbone="resnet18", layers=layers, neighbourhood=3, resize=80, crop=64)
    result = SimpleNet(config, weights).eval()
    result.threshold, result.typical, result.background = 1.5, 0.25, 0.75
    result.head.standardise.mean.uniform_(-1, 1)
    result.head.standardise.std.uniform_(0.5, 2)
    result.head.standardise.limit.fill_(3.0)
    norm = result.head.discriminator.norm
    assert isinstance(norm, nn.BatchNorm1d)
    for values in (norm.running_mean, norm.running_var, norm.weight.data, norm.bias.data):
        values.uniform_(0.5, 2)
    return result


@pytest.fixture(scope="module")
def file(model: SimpleNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    before = repr(model)
    export_onnx(model, path)
    assert repr(model) == before  # the BatchNorms are folded in a copy
    return path


@pytest.mark.parametrize("count", [1, 2, 5])
def test_onnx_runtime_agrees_with_pytorch(model: SimpleNet, file: Path, count: int) -> None:
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    pixels = torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(count))
    maps, scores = session.run(["map", "score"], {"pixels": pixels.numpy()})
    with torch.inference_mode():
        expected_maps, expected_scores = Detector(model)(pixels)
    assert maps.shape == (count, 64, 64) and scores.shape == (count,)
    assert expected_maps.std() > 1e-3  # or agreement would say nothing
    assert np.abs(maps - expected_maps.numpy()).max() < 1e-4
    assert np.abs(scores - expected_scores.numpy()).max() < 1e-4
    assert scores.tolist() == pytest.approx(maps.max(axis=(1, 2)).tolist())


def test_detector_normalises_pixels_itself(model: SimpleNet) -> None:
    pixels = torch.rand(1, 3, 64, 64)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    seen = []
    handle = model.features.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.inference_mode():
        Detector(model)(pixels)
    handle.remove()
    assert torch.allclose(seen[0] * std + mean, pixels, atol=1e-6)


def test_file_states_its_opset_and_what_the_caller_needs(file: Path, model: SimpleNet) -> None:
    proto = onnx.load(file)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == OPSET
    stated = {entry.key: entry.value for entry in proto.metadata_props}
    assert float(stated["threshold"]) == model.threshold
    assert float(stated["background"]) == model.background
    assert (stated["resize"], stated["crop"]) == ("80", "64")
    assert stated["config"] == model.config.to_json()


def test_unwritable_path_is_one_sentence(model: SimpleNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SimpleNetError, match="file"):
        export_onnx(model, tmp_path / "file" / "model.onnx")
