"""Make what the page "Try it" needs beside its scripts: graphs, a detector of nuts, answers.

    python live/build.py FOLDER

Everything is computed in the page by four small ONNX graphs and one large one, the frozen
backbone. They are traced from the library's own modules, so page and library cannot drift.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from PIL import Image
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from simplenet_lib.config import Config, preset
from simplenet_lib.dataset import AnomalyDataset, make_transform
from simplenet_lib.export import onnx_graph
from simplenet_lib.features import FrozenFeatures, cache_folder
from simplenet_lib.loss import cross_entropy_loss
from simplenet_lib.model import CHECKPOINT_FORMAT, Head, SimpleNet, first_scales, write_whole
from simplenet_lib.synthetic import generate
from simplenet_lib.training import train
from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD, find_weights

HERE = Path(__file__).parent
RUNTIME = HERE.parent / "node_modules" / "onnxruntime-web" / "dist"
SCRIPT_OF_RUNTIME, RUNTIME_WASM = "ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm"
SCRIPTS = (
    *("try.js", "try.css", "own.js"),
    *("worker.js", "detector.js", "training.js", "checkpoint.js"),
)
NUTS = 3  # good ones to scratch
SHOWN = ("scratch", "dent", "broken_corner", "rust")  # whose answers are there at once

#: The default preset, made light enough for a phone: fewer pixels, heads, steps and vectors.
PAGE = preset("fast", resize=256, crop=256, heads=3, steps=200, batch_size=512)


class Backbone(nn.Module):
    """Pixels (H, W, 3) of uint8 to the outputs of the layers, (1, C_l, h_l, w_l)."""

    mean: Tensor
    std: Tensor

    def __init__(self, features: FrozenFeatures) -> None:
        super().__init__()
        self.features = features
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN))
        self.register_buffer("std", torch.tensor(IMAGENET_STD))

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        images = ((pixels.float() / 255 - self.mean) / self.std).permute(2, 0, 1)[None]
        return tuple(self.features.outputs(images))


class Join(nn.Module):
    """The layers' outputs to the features that training keeps, and their sums.

    Features (h w, C) in half precision, as the library's cache holds them; the sum of every
    channel and of its squares, for the standardisation.
    """

    def __init__(self, features: FrozenFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(self, *outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors = self.features.join(list(outputs))[0].flatten(0, 1).half()
        rounded = vectors.float()
        return vectors, rounded.sum(dim=0), rounded.square().sum(dim=0)


class ScoreMaps(nn.Module):
    """All heads' score maps (K, h, w) from the layers' outputs, as ``SimpleNet.score_maps``.

    The heads are an input: weight (K H, C) and bias (K H,) of all that comes before the
    activation, and the last layer's weights (K, H).
    """

    def __init__(self, features: FrozenFeatures) -> None:
        super().__init__()
        self.features = features

    def forward(
        self, outputs: tuple[Tensor, ...], weight: Tensor, bias: Tensor, score: Tensor
    ) -> Tensor:
        parts = torch.split(weight, self.features.layer_channels, dim=1)
        maps = self.features.on_one_grid(
            [
                F.conv2d(output, part[:, :, None, None])
                for output, part in zip(outputs, parts, strict=True)
            ]
        )
        side = self.features.neighbourhood
        hidden = F.avg_pool2d(sum(maps), side, 1, side // 2, count_include_pad=False)
        hidden = F.leaky_relu(hidden[0] + bias[:, None, None], 0.2)
        heads = hidden.unflatten(0, score.shape)
        return -(heads * score[:, :, None, None]).sum(dim=1)


class VectorScores(nn.Module):
    """Heads' scores (K, n) of cached vectors (n, C); the heads as in :class:`ScoreMaps`."""

    def forward(self, vectors: Tensor, weight: Tensor, bias: Tensor, score: Tensor) -> Tensor:
        hidden = F.leaky_relu(vectors.float() @ weight.T + bias, 0.2)
        return -(hidden.unflatten(1, score.shape) * score).sum(dim=2).T


class VectorNorms(nn.Module):
    """How far cached vectors (n, C) lie from their mean, (n,), as ``training.norms_of``."""

    def forward(self, vectors: Tensor, mean: Tensor, std: Tensor) -> Tensor:
        return ((vectors.float() - mean) / std).square().sum(dim=1).sqrt()


class TrainingStep:
    """One step of ``training.fit`` for one head: forward, gradients, update, moving average.

    A head's state is one tensor (4, P): its parameters and BatchNorm's statistics, their
    moving average, and Adam's two moments; ``layout`` says which tensor lies where.
    """

    def __init__(self, channels: int, config: Config) -> None:
        assert config.batchnorm and config.loss == "cross-entropy" and config.adaptor_scale == 1
        self.config = config
        head = Head(channels, config)
        averaged = [*head.named_parameters(), *head.named_buffers()]
        self.shapes = {name: t.shape for name, t in averaged if t.is_floating_point()}
        self.parameters = [name for name, _ in head.named_parameters()]

    def layout(self, layer_channels: Sequence[int]) -> list[dict[str, Any]]:
        """Name, shape and first values of every tensor: normal, uniform or constant.

        A third entry has factors on them: how many columns in a row, and theirs.
        """
        scales = first_scales(layer_channels, self.config.fine_scale).tolist()
        columns = [[len(list(equal)), scale] for scale, equal in groupby(scales)]
        first = {
            "adaptor.linear.weight": lambda s: [
                "normal",
                (2 / (s[0] + s[1])) ** 0.5,  # Xavier
                columns,
            ],
            "discriminator.hidden.weight": lambda s: ["uniform", s[1] ** -0.5],
            "discriminator.hidden.bias": lambda _: [
                "uniform",
                self.config.adaptor_channels**-0.5,
            ],
            "discriminator.score.weight": lambda s: ["uniform", s[1] ** -0.5],
            "discriminator.norm.weight": lambda _: ["constant", 1.0],
            "discriminator.norm.running_var": lambda _: ["constant", 1.0],
        }
        return [
            {
                "name": name,
                "shape": list(shape),
                "first": first.get(name, lambda _: ["constant", 0.0])(shape),
            }
            for name, shape in self.shapes.items()
        ]

    def __call__(
        self, vectors: Tensor, mean: Tensor, std: Tensor, noise: Tensor, step: Tensor, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """From vectors (B, C), unit noise (B, A) and a state to the next state and the loss."""
        config = self.config
        sizes = [shape.numel() for shape in self.shapes.values()]
        rows = [
            {
                name: part.reshape(shape)
                for (name, shape), part in zip(
                    self.shapes.items(), torch.split(row, sizes), strict=True
                )
            }
            for row in state
        ]
        values, averages, first, second = rows
        inputs = (vectors.float() - mean) / std

        def loss_of(parameters: dict[str, Tensor]) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            p = {name.split(".", 1)[1]: value for name, value in parameters.items()}
            normal = F.linear(inputs, p["linear.weight"], p["linear.bias"])
            both = torch.cat([normal, normal + config.sigma * noise])
            hidden = F.linear(both, p["hidden.weight"], p["hidden.bias"])
            centre = hidden.mean(dim=0)
            variance = (hidden - centre).square().mean(dim=0)
            hidden = (hidden - centre) * torch.rsqrt(variance + 1e-5)
            hidden = hidden * p["norm.weight"] + p["norm.bias"]
            scores = (F.leaky_relu(hidden, 0.2) @ p["score.weight"].T)[:, 0]
            loss = cross_entropy_loss(scores[: len(normal)], scores[len(normal) :])
            return loss, (centre, variance)

        trained = {name: values[name] for name in self.parameters}
        gradients, (loss, (centre, variance)) = torch.func.grad_and_value(loss_of, has_aux=True)(
            trained
        )
        count = 2 * len(vectors)
        new = {
            "discriminator.norm.running_mean": centre,
            "discriminator.norm.running_var": variance * count / (count - 1),
        }
        for name, measured in new.items():
            new[name] = 0.9 * values[name] + 0.1 * measured
        for name, gradient in gradients.items():  # AdamW, as training.optimizer_of
            adaptor = name.startswith("adaptor.")
            rate = config.adaptor_lr if adaptor else config.discriminator_lr
            decay = 1e-2 if adaptor else 1e-5
            first[name] = 0.9 * first[name] + 0.1 * gradient
            second[name] = 0.999 * second[name] + 0.001 * gradient.square()
            steps = step + 1
            # 1e4: the exporter takes a bare 1e-8 for 0 and leaves it out, and a factor of
            # 1 - rate * decay for 1.
            size = 1e4 * (second[name] / (1 - torch.pow(0.999, steps))).sqrt() + 1e-4
            change = 1e4 * first[name] / (1 - torch.pow(0.9, steps)) / size
            new[name] = values[name] - rate * (change + decay * values[name])
        weight = 1 - torch.clamp((1 + step) / (10 + step), max=config.averaging)
        for name in averages:
            averages[name] = averages[name] + weight * (new[name] - averages[name])
        result = [
            torch.cat([row[name].flatten() for name in self.shapes])
            for row in (new, averages, first, second)
        ]
        return torch.stack(result), loss


def export(
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    shapes: tuple[Any, ...] | None = None,
) -> onnx.ModelProto:
    """A module as an ONNX graph, checked, without notes on its source."""
    proto: onnx.ModelProto = onnx_graph(module.eval(), example, inputs, outputs, shapes)
    for node in proto.graph.node:  # where in the source it came from: nothing for a reader
        del node.metadata_props[:]
        node.ClearField("doc_string")
    del proto.graph.value_info[:]
    onnx.checker.check_model(proto)
    return proto


def in_16_bits(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Store large weights as whole numbers of 16 bits and a scale for each output channel.

    Half the size of float32 and several times more exact than half precision. The first
    layers are small and every error in them grows: they stay as they are. The runtime expands
    the others once, when it loads the graph.
    """
    graph = proto.graph
    expand = []
    for tensor in list(graph.initializer):
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.size < 40_000:
            continue
        scale = np.abs(values).max(axis=(1, 2, 3), keepdims=True) / 32767 + 1e-30
        whole = np.rint(values / scale).astype(np.int16)
        name = tensor.name
        graph.initializer.remove(tensor)
        graph.initializer.append(numpy_helper.from_array(whole, f"{name}.whole"))
        graph.initializer.append(numpy_helper.from_array(scale.astype(np.float32), f"{name}.scale"))
        expand += [
            helper.make_node("Cast", [f"{name}.whole"], [f"{name}.cast"], to=TensorProto.FLOAT),
            helper.make_node("Mul", [f"{name}.cast", f"{name}.scale"], [name]),
        ]
    nodes = expand + list(graph.node)
    del graph.node[:]
    graph.node.extend(nodes)
    onnx.checker.check_model(proto)
    return proto


def graphs(model: SimpleNet) -> dict[str, bytes]:
    """The five graphs, for images whose sides are multiples of 16."""
    features, config = model.features, model.config
    height, width = torch.export.Dim("height", min=2), torch.export.Dim("width", min=2)
    pixels = torch.zeros(96, 64, 3, dtype=torch.uint8)
    example = tuple(Backbone(features)(pixels))
    layers = list(config.layers)
    shapes = tuple(
        {2: height * (16 // stride), 3: width * (16 // stride)}
        for stride in (96 // output.shape[2] for output in example)
    )
    backbone = export(
        Backbone(features),
        (pixels,),
        ["pixels"],
        layers,
        ({0: 16 * height, 1: 16 * width},),
    )
    join = export(Join(features), example, layers, ["vectors", "sum", "squares"], (shapes,))

    heads, hidden = 3, 8
    head = (
        torch.randn(heads * hidden, features.channels),
        torch.randn(heads * hidden),
        torch.randn(heads, hidden),
    )
    count, width_of_head = torch.export.Dim("heads", min=1), torch.export.Dim("hidden", min=1)
    rows = torch.export.Dim("rows", min=1)
    names = ["weight", "bias", "score"]
    dynamic = ({0: rows}, {0: rows}, {0: count, 1: width_of_head})
    maps = export(
        ScoreMaps(features), (example, *head), [*layers, *names], ["maps"], (shapes, *dynamic)
    )
    vectors = torch.zeros(7, features.channels, dtype=torch.float16)
    scores = export(
        VectorScores(),
        (vectors, *head),
        ["vectors", *names],
        ["scores"],
        ({0: torch.export.Dim("n", min=2)}, *dynamic),
    )
    channel = torch.zeros(features.channels), torch.ones(features.channels)
    norms = export(
        VectorNorms(),
        (vectors, *channel),
        ["vectors", "channel_mean", "channel_std"],
        ["norms"],
        ({0: torch.export.Dim("n", min=2)}, None, None),
    )
    step = training_graph(features.channels, config)
    return {
        "backbone.onnx": in_16_bits(backbone).SerializeToString(),
        "join.onnx": join.SerializeToString(),
        "maps.onnx": maps.SerializeToString(),
        "scores.onnx": scores.SerializeToString(),
        "norms.onnx": norms.SerializeToString(),
        "step.onnx": step.SerializeToString(),
    }


def training_graph(channels: int, config: Config) -> onnx.ModelProto:
    """:class:`TrainingStep` as a graph."""
    step = TrainingStep(channels, config)
    size = sum(shape.numel() for shape in step.shapes.values())
    example = (
        torch.randn(config.batch_size, channels).half(),
        torch.zeros(channels),
        torch.ones(channels),
        torch.randn(config.batch_size, config.adaptor_channels),
        torch.tensor(0.0),
        torch.rand(4, size),
    )

    class Traced(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.graph = make_fx(step)(*example)

        def forward(self, *arguments: Tensor) -> Any:
            return self.graph(*arguments)

    names = ["vectors", "channel_mean", "channel_std", "noise", "step", "state"]
    return export(Traced(), example, names, ["next", "loss"])


def answers(model: SimpleNet, images: Path, folder: Path) -> list[dict[str, Any]]:
    """What the detector says of the first good nut and of the first with each kind of defect."""
    found = []
    for kind in ("good", *SHOWN):
        path = images / "nut" / "test" / kind / "000.png"
        result = model.predict(path)
        with Image.open(path) as file:
            photo = file.convert("RGB").resize((160, 160), Image.Resampling.LANCZOS)
        overlay = result.overlay().resize((160, 160), Image.Resampling.LANCZOS)
        for name, picture in ((f"{kind}.webp", photo), (f"{kind}-map.webp", overlay)):
            picture.save(folder / name, quality=70, method=6)
        found.append(
            {
                "kind": kind.replace("_", " "),
                "photo": f"{kind}.webp",
                "map": f"{kind}-map.webp",
                "score": round(result.score, 4),
            }
        )
    return found


def build(folder: Path, root: Path, model: SimpleNet, images: Path) -> None:
    """Write all files of the page but its text.

    Parameters
    ----------
    folder : Path
        ``_static/try`` of the built book.
    root : Path
        The built book, whose root holds the service worker.
    model : SimpleNet
        The trained detector of nuts; its configuration is that of own photos, too.
    images : Path
        The synthetic images, see :func:`simplenet_lib.synthetic.generate`.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    for name in SCRIPTS:
        shutil.copy(HERE / name, folder / name)
    shutil.copy(HERE / "sw.js", root / "try-sw.js")
    for name in (SCRIPT_OF_RUNTIME, RUNTIME_WASM):
        shutil.copy(RUNTIME / name, folder / name)
    for name, data in graphs(model).items():
        write_whole(folder / name, data)
    model.save(folder / "nut.safetensors")
    nuts = [f"nut-{number}.png" for number in range(NUTS)]
    for number, name in enumerate(nuts):
        shutil.copy(images / "nut" / "test" / "good" / f"{number:03}.png", folder / name)

    loaded = [RUNTIME_WASM, *sorted(p.name for p in folder.glob("*.onnx")), "nut.safetensors"]
    files = {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        for name in loaded
        for data in [(folder / name).read_bytes()]
    }
    never = {"drift.light": [-3e38, 3e38], "drift.sharpness": [-3e38, 3e38], "drift.limit": [3e38]}
    blank = SimpleNet(model.config, find_weights(model.config.backbone)).trained_state()
    page = {
        "load": loaded,
        "files": files,
        "format": CHECKPOINT_FORMAT,
        "weights": model.weights_digest,
        "config": json.loads(model.config.to_json()),
        "channels": model.features.channels,
        "stride": model.config.seen[0] // model.level.shape[0],
        "layout": TrainingStep(model.features.channels, model.config).layout(
            model.features.layer_channels
        ),
        "tensors": {
            name: {
                "dtype": "F32" if tensor.is_floating_point() else "I64",
                "shape": list(tensor.shape),
                "values": never.get(name, [float(tensor.flatten()[0])]),
            }
            for name, tensor in blank.items()
        },
    }
    info = {
        "bytes": sum(file["bytes"] for file in files.values()),
        "scripts": [*SCRIPTS, SCRIPT_OF_RUNTIME, "page.json", *nuts],
        "nuts": nuts,
        "answers": answers(model, images, folder),
    }
    for name, content in (("page.json", page), ("info.json", info)):
        write_whole(folder / name, json.dumps(content).encode())


def main() -> None:
    """Train the detector of nuts and write the page's files into a built book."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("book", type=Path, help="the built book, _build/html")
    book = parser.parse_args().book
    images = generate(cache_folder() / "synthetic")
    transform = make_transform(PAGE.size, PAGE.seen)
    nuts = AnomalyDataset(images, "nut", "train", transform)
    build(book / "_static" / "try", book, train(nuts, PAGE, progress=False).model, images)


if __name__ == "__main__":
    main()
