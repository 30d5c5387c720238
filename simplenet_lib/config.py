"""Presets: every number that distinguishes one training from another."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


class SimpleNetError(Exception):
    """Something the user can mend. The message says what was found, where, and what to do."""


FIELD_TYPES = {"int": (int,), "float": (int, float), "bool": (bool,), "str": (str,)}


@dataclass(frozen=True, kw_only=True)
class Config:
    """Everything a training depends on, apart from the images and the weights.

    Attributes
    ----------
    preset : str
        Name of the preset this configuration started from.
    backbone : str
        A torchvision ResNet, such as ``"resnet50"``.
    layers : tuple of str
        Outputs to use; the first one sets the grid.
    resize, crop : int
        Side in pixels to which an image is resized (without keeping its aspect
        ratio), and of the central square that is then cut out.
    neighbourhood : int
        Side, in positions, of the neighbourhood over which features are
        averaged (paper, section 3.1, patch size p); 1 leaves them alone.
    standardise : bool
        Give every channel mean 0 and deviation 1 over the normal images.
    adaptor_channels, hidden_channels : int
        Width of the adapted features and of the discriminator's hidden layer.
    batchnorm : bool
        BatchNorm in the discriminator's hidden layer.
    sigma : float
        Standard deviation of the feature noise (paper, section 3.3), in units of
        the adapted features.
    margin : float
        Margin of the loss on either side of zero (paper, section 3.5).
    steps, batch_size : int
        Optimiser steps, and positions in each.
    adaptor_lr, discriminator_lr : float
        Learning rates.
    smoothing : float
        Standard deviation, in pixels of the network's input, of the Gaussian
        that smooths the anomaly map.
    holdout : float
        Share of the normal training images kept aside for the threshold.
    quantile : float
        Quantile of the held-out normal images' scores that becomes the threshold.
    seed : int
        Seed of the split, the initial parameters, the sampling and the noise.
    """

    preset: str
    backbone: str = "resnet50"
    layers: tuple[str, ...] = ("layer2", "layer3")
    resize: int
    crop: int
    neighbourhood: int
    standardise: bool
    adaptor_channels: int
    hidden_channels: int
    batchnorm: bool
    sigma: float
    margin: float = 0.5
    steps: int
    batch_size: int
    adaptor_lr: float = 1e-4
    discriminator_lr: float = 2e-4
    smoothing: float = 4.0
    holdout: float = 0.1
    quantile: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what cannot be trained, whether typed or read from a file."""
        for field in fields(self):
            value = getattr(self, field.name)
            kind = FIELD_TYPES.get(str(field.type), (tuple,))
            if not isinstance(value, kind) or (isinstance(value, bool) and field.type != "bool"):
                raise SimpleNetError(f"configuration: {field.name} is {value!r}, not {field.type}.")
        if not self.layers or not all(isinstance(layer, str) for layer in self.layers):
            raise SimpleNetError("configuration: layers must name at least one layer.")
        limits = {
            "resize": (32, 4096),
            "crop": (32, self.resize),
            "neighbourhood": (1, 15),
            "adaptor_channels": (1, 16384),
            "hidden_channels": (1, 16384),
            "sigma": (0, 1e6),
            "margin": (0, 1e6),
            "steps": (1, 10**9),
            "batch_size": (2, 2**20),
            "adaptor_lr": (0, 10),
            "discriminator_lr": (0, 10),
            "smoothing": (0, 100),
            "holdout": (0, 0.9),
            "quantile": (0, 1),
            "seed": (0, 2**31 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise SimpleNetError(
                    f"configuration: {name} is {value}, outside {low:g} to {high:g}."
                )
        if self.neighbourhood % 2 == 0:
            raise SimpleNetError(
                f"configuration: neighbourhood is {self.neighbourhood}; it must be odd."
            )

    def to_json(self) -> str:
        """One line of JSON that :meth:`from_json` turns back into an equal configuration."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Read a configuration; a wrong name, type or range raises SimpleNetError."""
        try:
            values: dict[str, Any] = json.loads(text)
            if isinstance(values["layers"], list):  # JSON has no tuples
                values["layers"] = tuple(values["layers"])
            return cls(**values)
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise SimpleNetError(f"not a SimpleNet configuration ({error}).") from error


#: ``course``: the course report's description. ``fast``: the same pieces on
#: standardised features, the default. ``paper``: the published run script.
PRESETS = {
    "course": Config(
        preset="course",
        resize=224,
        crop=224,
        neighbourhood=1,
        standardise=False,
        adaptor_channels=512,
        hidden_channels=512,
        batchnorm=False,
        sigma=0.015,
        steps=4000,
        batch_size=1024,
    ),
    "fast": Config(
        preset="fast",
        resize=320,
        crop=320,
        neighbourhood=1,
        standardise=True,
        adaptor_channels=256,
        hidden_channels=256,
        batchnorm=True,
        sigma=0.5,
        steps=100,
        batch_size=2048,
        adaptor_lr=3e-4,
        discriminator_lr=6e-4,
        smoothing=5.0,
    ),
    "paper": Config(
        preset="paper",
        resize=329,
        crop=288,
        neighbourhood=3,
        standardise=False,
        adaptor_channels=1536,
        hidden_channels=1024,
        batchnorm=True,
        sigma=0.015,
        steps=4180,
        batch_size=8 * 36 * 36,
    ),
}


def preset(name: str, **changes: Any) -> Config:
    """The preset ``name`` with some fields changed.

    Raises
    ------
    SimpleNetError
        If there is no such preset, or a changed value is out of range.
    """
    if name not in PRESETS:
        raise SimpleNetError(f"unknown preset '{name}'. Known: {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
