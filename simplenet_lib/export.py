"""Chapter 12: the whole detector as one ONNX file, for programs without PyTorch."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from simplenet_lib.config import SimpleNetError
from simplenet_lib.localization import anomaly_map, image_score
from simplenet_lib.model import SimpleNet, write_whole
from simplenet_lib.weights import IMAGENET_MEAN, IMAGENET_STD

OPSET = 18


class Detector(nn.Module):
    """From pixels to map and score: what one ONNX graph holds.

    Parameters
    ----------
    model : SimpleNet
        A trained model.

    Examples
    --------
    >>> detector = Detector(model).eval()
    >>> maps, scores = detector(torch.rand(2, 3, 32, 32))
    >>> maps.shape, scores.shape
    (torch.Size([2, 32, 32]), torch.Size([2]))
    """

    mean: Tensor
    std: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, model: SimpleNet) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(IMAGENET_MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(IMAGENET_STD)[:, None, None])
        weight, bias = model.hidden_layer()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)

    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Map RGB pixels (N, 3, H, W), 0 to 1, to anomaly maps (N, H, W) and scores (N,)."""
        config = self.model.config
        outputs = self.model.features.outputs((pixels - self.mean) / self.std)
        scores = self.model.committee(self.model.score_maps(outputs, (self.weight, self.bias)))
        maps = self.model.in_units(anomaly_map(scores, config.seen, config.smoothing))
        return maps, image_score(maps)


def onnx_graph(
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: Sequence[str],
    outputs: Sequence[str],
    shapes: Any = None,
) -> Any:
    """A module as an ONNX graph of opset 18.

    Parameters
    ----------
    module : Module
        In evaluation mode.
    example : tuple
        Arguments of its ``forward``.
    inputs, outputs : sequence of str
        Their names in the graph.
    shapes : optional
        Which sides may change, see ``dynamic_shapes`` of :func:`torch.onnx.export`.

    Returns
    -------
    onnx.ModelProto

    Examples
    --------
    >>> graph = onnx_graph(torch.nn.ReLU(), (torch.zeros(2),), ["x"], ["y"]).graph
    >>> [node.op_type for node in graph.node]
    ['Relu']
    """
    with warnings.catch_warnings(), torch.inference_mode(False), torch.no_grad():
        # The exporter warns of its own internals, nothing that a user could mend.
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            example,
            dynamo=True,
            opset_version=OPSET,
            input_names=inputs,
            output_names=outputs,
            dynamic_shapes=shapes,
            verbose=False,
        )
    assert program is not None  # it is, with dynamo
    return program.model_proto


def export_onnx(model: SimpleNet, path: Path) -> None:
    """Write a trained model, its backbone included, as an ONNX file of opset 18.

    Normalisation, backbone, committee, map and score are inside the graph; reading,
    resizing and cropping the image stay outside. Input ``pixels`` (N, 3, H, W), RGB
    from 0 to 1; outputs ``map`` (N, H, W) and ``score`` (N,), on the scale where 1 is
    the threshold; any N. The file's metadata hold ``size`` and ``seen``, height and
    width in pixels to which an image is resized and of the centre then cut out, and
    the whole ``config``, all as JSON; its ``white`` is what is white in images of more
    than 8 bits (:func:`simplenet_lib.dataset.as_rgb`). Of an image of another shape, between
    its mirror images (:func:`simplenet_lib.dataset.fitted`), the score is the maximum of its
    own part of the map; ``score`` is that of the whole map.

    Raises
    ------
    SimpleNetError
        If the packages for the export are missing, ``path`` cannot be written, or the model
        looks at photos in tiles.

    Examples
    --------
    >>> import onnxruntime
    >>> export_onnx(model, folder / "model.onnx")
    >>> session = onnxruntime.InferenceSession(folder / "model.onnx")
    >>> maps, scores = session.run(None, {"pixels": np.zeros((2, 3, 32, 32), np.float32)})
    >>> maps.shape, scores.shape
    ((2, 32, 32), (2,))
    """
    if model.config.tile:
        raise SimpleNetError(
            "a model that looks at photos in tiles cannot be exported: one graph would hold the"
            " backbone once for every tile. Train without --tile and with --set resize=…, crop=…."
        )
    try:
        import onnx
        import onnxscript  # noqa: F401  the exporter needs it
    except ImportError as error:
        raise SimpleNetError(
            f"the export needs the package {error.name}: pip install 'simplenet_lib[export]'."
        ) from error

    detector = Detector(copy.deepcopy(model).cpu()).eval()
    example = torch.rand(2, 3, *model.config.seen)
    any_number = {"pixels": {0: torch.export.Dim("N", min=1, max=1024)}}
    proto = onnx_graph(detector, (example,), ["pixels"], ["map", "score"], any_number)
    config = model.config
    values = {"size": json.dumps(config.size), "seen": json.dumps(config.seen)}
    values |= {"config": config.to_json()}
    onnx.helper.set_model_props(proto, values)
    onnx.checker.check_model(proto, full_check=True)
    write_whole(path, proto.SerializeToString())
