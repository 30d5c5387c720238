"""Chapter 7: the pieces put together, and written to a file that holds data only."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Generator, Tensor, nn

from simplenet_lib.adaptor import Adaptor
from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.discriminator import Discriminator
from simplenet_lib.features import FrozenFeatures, Standardise
from simplenet_lib.noise import add_noise
from simplenet_lib.weights import Weights, find_weights

CHECKPOINT_FORMAT = "simplenet-2"
SCALE = ("threshold", "typical", "background")  # what held-out normal images look like


class Head(nn.Module):
    """What is trained: standardisation, adaptor and discriminator on frozen features.

    Parameters
    ----------
    channels : int
        Channels C of the frozen features.
    config : Config
        Widths, noise and whether to standardise.
    """

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.sigma = config.sigma
        self.standardise = Standardise(channels)
        self.adaptor = Adaptor(channels, config.adaptor_channels)
        self.discriminator = Discriminator(
            config.adaptor_channels, config.hidden_channels, batchnorm=config.batchnorm
        )

    def adapt(self, features: Tensor) -> Tensor:
        """Map frozen features (N, C, h, w) to adapted vectors (N*h*w, A), one a position."""
        adapted: Tensor = self.adaptor(self.standardise(features))
        return adapted.permute(0, 2, 3, 1).flatten(0, 2)

    def normal_and_noisy(self, features: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Score adapted vectors, and the same vectors with noise added: D(z) and D(z').

        Gradients reach the adaptor through both. Both halves pass the
        discriminator in one batch, so that BatchNorm treats them alike.
        """
        normal = self.adapt(features)
        noisy = add_noise(normal, self.sigma, generator)
        scores = self.discriminator(torch.cat([normal, noisy]))
        return scores[: len(normal)], scores[len(normal) :]

    def forward(self, features: Tensor) -> Tensor:
        """Score map -D(z), (N, h, w), of frozen features (N, C, h, w): high is anomalous."""
        count, _, height, width = features.shape
        scores: Tensor = -self.discriminator(self.adapt(features))
        return scores.view(count, height, width)


class SimpleNet(nn.Module):
    """Frozen features and the head on top of them (paper, section 3).

    Parameters
    ----------
    config : Config
        The configuration.
    weights : Weights
        Pretrained parameters of ``config.backbone``.

    Attributes
    ----------
    threshold : float
        Images that score above it count as anomalous; NaN before training.
    typical : float
        Median anomaly map value of held-out normal images: where the scale of
        an overlay begins. NaN before training.
    background : float
        Highest :func:`~simplenet_lib.localization.background` of some normal images, the
        held-out ones first; an image above it looks unlike them as a whole. NaN before training.
    """

    def __init__(self, config: Config, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self.weights_digest = weights.digest
        with torch.random.fork_rng(devices=[]):
            self.features = FrozenFeatures(
                config.backbone, config.layers, weights, config.neighbourhood
            )
            torch.manual_seed(config.seed)
            self.head = Head(self.features.channels, config)
        self.threshold = math.nan
        self.typical = math.nan
        self.background = math.nan

    def forward(self, images: Tensor) -> Tensor:
        """Score map (N, h, w) of normalised images (N, 3, H, W): high is anomalous."""
        scores: Tensor = self.head(self.features(images))
        return scores

    def save(self, path: Path) -> None:
        """Write head, configuration and threshold; the backbone's weights stay out."""
        scale = {name: repr(getattr(self, name)) for name in SCALE}
        write_checkpoint(path, self.head.state_dict(), {**self.identity(), **scale})

    def identity(self) -> dict[str, str]:
        """Which network this is: format, configuration, and a digest of the weights."""
        return {
            "format": CHECKPOINT_FORMAT,
            "config": self.config.to_json(),
            "weights": self.weights_digest,
        }

    def feature_key(self) -> str:
        """What the frozen features depend on, apart from the images."""
        config = self.config
        return json.dumps(
            [
                self.weights_digest,
                config.layers,
                config.neighbourhood,
                config.resize,
                config.crop,
            ]
        )

    @classmethod
    def load(cls, path: Path, weights: Path | None = None) -> SimpleNet:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Parameters
        ----------
        path : Path
            The checkpoint.
        weights : Path, optional
            See :func:`simplenet_lib.weights.find_weights`.

        Raises
        ------
        SimpleNetError
            If the file is damaged, holds something else, or was trained on
            other pretrained weights than those found here.
        """
        tensors, metadata = read_checkpoint(path)
        try:
            config = Config.from_json(metadata.get("config", ""))
            scale = {name: float(metadata[name]) for name in SCALE}
        except SimpleNetError as error:
            raise SimpleNetError(f"{path}: {error}") from error
        except (KeyError, ValueError) as error:
            raise SimpleNetError(f"{path}: holds no threshold ({error}).") from error
        if not all(map(math.isfinite, scale.values())):
            raise SimpleNetError(f"{path}: holds no threshold; the model was never trained.")
        # On the device "meta" nothing is allocated, however large the configuration says it is.
        with torch.device("meta"):
            channels = tensors.get("standardise.mean", torch.empty(1)).numel()
            check_tensors(tensors, Head(channels, config).state_dict(), path)
        found = find_weights(config.backbone, weights)
        if found.digest != metadata.get("weights"):
            raise SimpleNetError(
                f"{path}: was trained on other pretrained weights of {config.backbone} than"
                f" {found.source}. Point SIMPLENET_WEIGHTS at the weights it was trained on."
            )
        model = cls(config, found)
        check_tensors(tensors, model.head.state_dict(), path)
        model.head.load_state_dict(tensors)
        for name, value in scale.items():
            setattr(model, name, value)
        return model.eval()


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as safetensors, whole or not at all.

    Raises
    ------
    SimpleNetError
        If ``path`` cannot be written; an older file there is then untouched.
    """
    # One entry: safetensors writes several in random order, and equal models must be equal files.
    entry = {"simplenet": json.dumps(metadata, sort_keys=True)}
    data = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, entry
    )
    write_whole(path, data)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name shows either the old contents or all of the new."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=".partial-") as folder:
            partial = Path(folder) / path.name
            with partial.open("wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
    except OSError as error:
        raise SimpleNetError(f"{path}: could not be written ({error}).") from error


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a checkpoint's tensors and metadata.

    Raises
    ------
    SimpleNetError
        If the file is missing, damaged, or of another format.
    """
    if not path.is_file():
        raise SimpleNetError(f"{path}: no such checkpoint.")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get("simplenet", "{}"))
            if (
                not isinstance(metadata, dict)
                or not all(isinstance(value, str) for value in metadata.values())
                or metadata.get("format") != CHECKPOINT_FORMAT
            ):
                raise SimpleNetError(
                    f"{path}: not a checkpoint of this program ({CHECKPOINT_FORMAT})."
                )
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise SimpleNetError(f"{path}: not a readable checkpoint ({error}).") from error
    return tensors, metadata


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    """Check that the tensors of the file ``path`` have the names and shapes of ``expected``.

    Raises
    ------
    SimpleNetError
        If one is missing, surplus, of another shape or type, or not finite.
    """
    if tensors.keys() != expected.keys():
        name = min(tensors.keys() ^ expected.keys())
        raise SimpleNetError(f"{path}: its tensors do not fit its configuration ({name}).")
    for name, tensor in tensors.items():
        want = expected[name]
        if tensor.shape != want.shape or tensor.dtype != want.dtype:
            raise SimpleNetError(
                f"{path}: {name} is {tuple(tensor.shape)} of {tensor.dtype}, but its"
                f" configuration asks for {tuple(want.shape)} of {want.dtype}."
            )
        if not torch.isfinite(tensor).all():
            raise SimpleNetError(f"{path}: {name} holds values that are not finite.")
