"""The ONNX file against PyTorch: same maps and scores, at any batch size."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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

SEEN = (48, 96)  # height and width


@pytest.fixture(scope="module")
def model() -> SimpleNet:
    """A detector with all that the graph can hold: three heads, three layers, a rectangle."""
    torch.manual_seed(0)
    state = resnet18().state_dict()
    weights = Weights(state, "a test", digest_of(state, "conv2"), "conv2")
    layers = ("layer2", "layer1", "layer3")
    changes = {"neighbourhood": 3, "border": "reflect", "resize": 80, "crop": 64, "ratio": 0.5}
    changes |= {"batchnorm": True, "standardise": True, "heads": 3, "adaptor_channels": 8}
    config = preset("fast", backbone="resnet18", layers=layers, **changes)
    assert config.seen == SEEN
    result = SimpleNet(config, weights).eval()
    result.threshold, result.typical = 1.5, 0.25
    result.standardise.mean.uniform_(-1, 1)
    for units in (result.standardise.std, result.spread, result.scale):
        units.uniform_(0.5, 2)
    for units in (result.centre, result.level):
        units.uniform_(-1, 1)
    for head in result.heads:
        norm = head.discriminator.norm
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
    pixels = torch.rand(count, 3, *SEEN, generator=torch.Generator().manual_seed(count))
    maps, scores = session.run(["map", "score"], {"pixels": pixels.numpy()})
    with torch.inference_mode():
        expected_maps, expected_scores = Detector(model)(pixels)
    assert maps.shape == (count, *SEEN) and scores.shape == (count,)
    assert expected_maps.std() > 1e-2  # or agreement would say nothing
    assert np.abs(maps - expected_maps.numpy()).max() < 1e-4
    assert np.abs(scores - expected_scores.numpy()).max() < 1e-4
    assert scores.tolist() == pytest.approx(maps.max(axis=(1, 2)).tolist())


def test_every_head_counts(model: SimpleNet) -> None:
    """Or the file could agree with PyTorch and hold one head."""
    pixels = torch.rand(1, 3, *SEEN)
    with torch.inference_mode():
        expected, _ = Detector(model)(pixels)
        for head in model.heads:
            weight = head.discriminator.score.weight
            before = weight.clone()
            weight.mul_(-1)
            changed, _ = Detector(model)(pixels)
            weight.copy_(before)
            assert (changed - expected).abs().max() > 0.1


def test_detector_normalises_pixels_itself(model: SimpleNet) -> None:
    pixels = torch.rand(1, 3, *SEEN)
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGENET_MEAN, IMAGENET_STD))
    seen = []
    handle = model.features.extractor.register_forward_pre_hook(
        lambda _, inputs: seen.append(inputs[0])
    )
    with torch.inference_mode():
        Detector(model)(pixels)
    handle.remove()
    (images,) = seen
    assert torch.allclose(images * std + mean, pixels, atol=1e-6)


def test_file_states_its_opset_and_what_the_caller_needs(file: Path, model: SimpleNet) -> None:
    proto = onnx.load(file)
    assert {entry.domain: entry.version for entry in proto.opset_import}[""] == OPSET
    stated = {entry.key: entry.value for entry in proto.metadata_props}
    assert stated.keys() == {"size", "seen", "config"}
    assert json.loads(stated["size"]) == [64, 112] == list(model.config.size)
    assert json.loads(stated["seen"]) == list(SEEN)
    assert stated["config"] == model.config.to_json()


def nodes_of(graph: Any) -> Iterator[Any]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from nodes_of(inner)


def test_no_runtime_lacks_an_operator_of_the_graph(file: Path) -> None:
    """A TopK of more than 3,840 values, such as a median of a map, is beyond TensorRT."""
    proto = onnx.load(file)
    nodes = [*nodes_of(proto.graph)]
    for function in proto.functions:
        nodes += nodes_of(function)
    assert {node.domain for node in nodes} <= {"", "ai.onnx"}
    names = [node.op_type for node in nodes]
    assert names.count("Conv") > 15  # all of them were counted
    assert "TopK" not in names


def test_unwritable_path_is_one_sentence(model: SimpleNet, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(SimpleNetError, match="file"):
        export_onnx(model, tmp_path / "file" / "model.onnx")
