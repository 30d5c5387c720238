"""Presets: every number that distinguishes one training from another."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any


class SimpleNetError(Exception):
    """Something the user can mend. The message says what was found, where, and what to do.

    Examples
    --------
    >>> try:
    ...     preset("fats")
    ... except SimpleNetError as error:
    ...     print(error)
    unknown preset 'fats'. Known: course, fast, paper.
    """


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
        Side in pixels of the square that an image is resized to, and of its centre
        that is then cut out. Another ``ratio`` makes both rectangles of the same area.
    ratio : float
        Height over width of what the network sees; 0 for the training photos' own,
        which :func:`simplenet_lib.benchmark.datasets` fills in (a square until then).
    white : float
        What white is in images of more than 8 bits or of floating point; 0 for what the
        training photos' highest value says, which
        :func:`simplenet_lib.benchmark.datasets` fills in if there are such images.
    tile : int
        Side in pixels of the overlapping tiles in which the network sees a photo at its own
        resolution: for small defects in large photos. Unless ``resize`` was set,
        :func:`simplenet_lib.benchmark.datasets` fills in the training photos' own. 0 for
        the whole photo at once.
    border : {"reflect", "zeros"}
        What a convolution of the backbone sees beyond its map.
    neighbourhood : int
        Side, in positions, of the neighbourhood over which features are
        averaged (paper, section 3.1, patch size p); 1 leaves them alone.
    standardise : bool
        Give every channel mean 0 and deviation 1 over the normal images.
    adaptor_channels, hidden_channels : int
        Width of the adapted features and of the discriminator's hidden layer.
    batchnorm : bool
        BatchNorm in the discriminator's hidden layer.
    adaptor_scale : float
        Factor on the adaptor's first weights; the discriminator's are divided by it. It
        sets the scale on which the noise is small or large.
    fine_scale : float
        How much larger the adaptor's first weights are on the channels of the first layer,
        which sets the grid, than on all others. Their mean square stays what it was.
    sigma : float
        Standard deviation of the feature noise (paper, section 3.3), in units of
        the adapted features.
    emphasis : float
        Positions are drawn in proportion to the norm of their features to this power, so
        that what rarely appears is trained on more often; 0 draws all equally often.
    loss : {"margin", "cross-entropy"}
        The published loss, or one that never calls a score good enough.
    margin : float
        Margin of the loss on either side of zero (paper, section 3.5).
    heads : int
        Heads K of the committee, each trained without its share of the images. One
        head is trained without a tenth of them.
    steps, batch_size : int
        Optimiser steps of each head, and positions in each.
    adaptor_lr, discriminator_lr : float
        Learning rates.
    averaging : float
        Decay of the moving average of the weights that is kept; 0 keeps the last weights.
    position_units : bool
        Give every position of the map its own level and scale, if there are 20 normal
        images or more to measure them on.
    bound : float
        What one position adds to the map at most, in units of its scale; 0 for no limit.
    smoothing : float
        Standard deviation, in pixels of the network's input, of the Gaussian
        that smooths the anomaly map.
    false_alarms : float
        Share of normal images that may be called anomalous: so many of the training
        images' scores, each by heads that have not seen it, lie above the threshold. 0 for
        none of them.
    seed : int
        Seed from which split, initial parameters, order and noise draw separate streams.

    Examples
    --------
    >>> config = preset("fast", ratio=0.5)
    >>> config.seen  # as many pixels as the square
    (272, 544)
    >>> Config.from_json(config.to_json()) == config
    True
    """

    preset: str
    backbone: str = "resnet50"
    layers: tuple[str, ...] = ("layer2", "layer3")
    resize: int
    crop: int
    ratio: float = 0.0
    white: float = 0.0
    tile: int = 0
    border: str = "reflect"
    neighbourhood: int
    standardise: bool
    adaptor_channels: int
    hidden_channels: int
    batchnorm: bool
    adaptor_scale: float = 1.0
    fine_scale: float = 1.0
    sigma: float
    emphasis: float = 0.0
    loss: str = "margin"
    margin: float = 0.5
    heads: int = 1
    steps: int
    batch_size: int
    adaptor_lr: float = 1e-4
    discriminator_lr: float = 2e-4
    averaging: float = 0.0
    position_units: bool = False
    bound: float = 0.0
    smoothing: float = 4.0
    false_alarms: float = 0.0
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
            "resize": (32, 8192),
            "crop": (32, self.resize),
            "ratio": (0, 10),
            "white": (0, 2**32),
            "tile": (0, 8192),
            "neighbourhood": (1, 15),
            "adaptor_channels": (1, 16384),
            "hidden_channels": (1, 16384),
            "adaptor_scale": (1e-6, 1e6),
            "fine_scale": (1e-3, 1e3),
            "sigma": (0, 1e6),
            "emphasis": (0, 8),
            "margin": (0, 1e6),
            "heads": (1, 100),
            "steps": (1, 10**9),
            "batch_size": (2, 2**20),
            "adaptor_lr": (0, 10),
            "discriminator_lr": (0, 10),
            "averaging": (0, 0.9999),
            "bound": (0, 1e6),
            "smoothing": (0, 100),
            "false_alarms": (0, 0.5),
            "seed": (0, 2**31 - 1),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise SimpleNetError(
                    f"configuration: {name} is {value}, outside {low:g} to {high:g}."
                )
        if 0 < self.tile < 256:
            raise SimpleNetError(
                f"configuration: tile is {self.tile}; tiles need 256 pixels or more, or 0 for none."
            )
        choices = {"border": ("reflect", "zeros"), "loss": ("margin", "cross-entropy")}
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise SimpleNetError(
                    f"configuration: {name} is '{getattr(self, name)}', not {' or '.join(known)}."
                )
        if self.bound and not self.position_units:
            raise SimpleNetError("configuration: a bound needs position_units; else set it to 0.")
        if self.neighbourhood % 2 == 0:
            raise SimpleNetError(
                f"configuration: neighbourhood is {self.neighbourhood}; it must be odd."
            )

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels that an image is resized to."""
        return _rectangle(self.resize, self.ratio)

    @property
    def seen(self) -> tuple[int, int]:
        """Height and width in pixels of the centre that the network sees."""
        return _rectangle(self.crop, self.ratio)

    @property
    def decides_features(self) -> list[Any]:
        """What the frozen features depend on, apart from the backbone and the images."""
        return [
            self.layers,
            self.neighbourhood,
            self.border,
            self.size,
            self.seen,
            # Named only where they are asked for: as before there were any.
            *([self.white] if self.white else []),
            *([f"tile {self.tile}"] if self.tile else []),
        ]

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


def _rectangle(side: int, ratio: float) -> tuple[int, int]:
    """About side² pixels in the shape ``ratio``; no square's sides are multiples of 16."""
    if ratio in (0, 1):
        return side, side
    root = math.sqrt(ratio)
    height, width = (max(32, 16 * round(length / 16)) for length in (side * root, side / root))
    return height, width


#: ``course``: the course report's system. ``fast``: a committee on standardised
#: features, the default. ``paper``: the published run script.
#:
#: The report leaves open on which scale its adaptor starts. That decides everything: noise
#: of σ = 0.015 vanishes in features that spread over 1, and is hard but possible to see in
#: features that spread over 0.04. So the adaptor starts at a twentieth (``adaptor_scale``)
#: of the usual size; its learning rate is a twentieth of the published one, or its first
#: steps would undo that; and the discriminator's first weights are 20 times as large, so
#: that it still sees inputs of about 1. 1,024 positions a step are little more than one
#: image of 28 x 28 positions, drawn from all images.
#:
#: ``fast`` draws a position twice as often if its features lie twice as far from their mean
#: (``emphasis``): most positions of a photo may show an empty background, and what rarely
#: looks the same needs more examples. The adaptor starts with weights twice as large on
#: layer2 as on layer3 (``fine_scale``): layer3 has twice as many channels and sees further
#: around a position, which gives a defect a halo. And a position adds at most four times its
#: scale to the map (``bound``): far from normal features a score says that they are
#: anomalous, not how much, and a speck would outweigh a scratch.
PRESETS = {
    "course": Config(
        preset="course",
        resize=224,
        crop=224,
        border="zeros",
        neighbourhood=1,
        standardise=False,
        adaptor_channels=512,
        hidden_channels=512,
        batchnorm=False,
        adaptor_scale=0.05,
        sigma=0.015,
        steps=1000,
        batch_size=1024,
        adaptor_lr=5e-6,
    ),
    "fast": Config(
        preset="fast",
        resize=384,
        crop=384,
        neighbourhood=3,
        standardise=True,
        adaptor_channels=128,
        hidden_channels=128,
        batchnorm=True,
        fine_scale=2.0,
        sigma=0.3,
        emphasis=1.0,
        loss="cross-entropy",
        heads=5,
        steps=400,
        batch_size=1024,
        adaptor_lr=3e-4,
        discriminator_lr=6e-4,
        averaging=0.99,
        position_units=True,
        bound=4.0,
        smoothing=8.0,
        false_alarms=0.05,
    ),
    "paper": Config(
        preset="paper",
        resize=329,
        crop=288,
        border="zeros",
        neighbourhood=3,
        standardise=False,
        adaptor_channels=1536,
        hidden_channels=1024,
        batchnorm=True,
        sigma=0.015,
        steps=4320,  # 160 epochs of 27 batches on bottle
        batch_size=8 * 36 * 36,
    ),
}


def preset(name: str, **changes: Any) -> Config:
    """The preset ``name`` with some fields changed.

    Raises
    ------
    SimpleNetError
        If there is no such preset, or a changed value is out of range.

    Examples
    --------
    >>> config = preset("fast", steps=100)
    >>> config.steps, config.backbone, config.layers
    (100, 'resnet50', ('layer2', 'layer3'))
    """
    if name not in PRESETS:
        raise SimpleNetError(f"unknown preset '{name}'. Known: {', '.join(PRESETS)}.")
    return replace(PRESETS[name], **changes)
