"""Chapter 7: the pieces put together, and written to a file that holds data only."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, overload

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from simplenet_lib.adaptor import Adaptor
from simplenet_lib.config import Config, SimpleNetError
from simplenet_lib.discriminator import Discriminator
from simplenet_lib.drift import Drift
from simplenet_lib.features import FrozenFeatures, Standardise, around
from simplenet_lib.localization import Result, Source, in_units, results
from simplenet_lib.noise import add_noise, random_seed
from simplenet_lib.weights import Weights, find_weights

CHECKPOINT_FORMAT = "simplenet-3"
SCALE = ("typical", "threshold")  # what normal images score
FEATURES_FORMAT = 4  # of cached features: another number wherever they are computed otherwise
INITIAL = 0  # stream of random numbers: the initial parameters


class Head(nn.Module):
    """What is trained: adaptor and discriminator, on single standardised feature vectors.

    Parameters
    ----------
    channels : int
        Channels C of the frozen features.
    config : Config
        Widths, noise, and the scale on which the adaptor starts.

    Examples
    --------
    >>> from simplenet_lib.config import preset
    >>> head = Head(1536, preset("fast"))
    >>> head(torch.zeros(28, 28, 1536)).shape
    torch.Size([28, 28])
    >>> normal, noisy = head.normal_and_noisy(torch.zeros(8, 1536), torch.Generator())
    >>> normal.shape, noisy.shape
    (torch.Size([8]), torch.Size([8]))
    """

    def __init__(self, channels: int, config: Config) -> None:
        super().__init__()
        self.sigma = config.sigma
        self.adaptor = Adaptor(channels, config.adaptor_channels)
        self.discriminator = Discriminator(
            config.adaptor_channels, config.hidden_channels, batchnorm=config.batchnorm
        )
        with torch.no_grad():  # the discriminator still starts on inputs of about 1
            self.adaptor.linear.weight.mul_(config.adaptor_scale)
            self.discriminator.hidden.weight.div_(config.adaptor_scale)

    def normal_and_noisy(self, vectors: Tensor, generator: Generator) -> tuple[Tensor, Tensor]:
        """Score adapted vectors, and the same vectors with noise added: D(z) and D(z').

        Gradients reach the adaptor through both. Both halves pass the
        discriminator in one batch, so that BatchNorm treats them alike.
        """
        normal = self.adaptor(vectors)
        noisy = add_noise(normal, self.sigma, generator)
        scores = self.discriminator(torch.cat([normal, noisy]))
        return scores[: len(normal)], scores[len(normal) :]

    def forward(self, vectors: Tensor) -> Tensor:
        """Score -D(z), (...), of standardised features (..., C): high is anomalous."""
        scores: Tensor = -self.discriminator(self.adaptor(vectors))
        return scores


def bounded(values: Tensor, bound: float) -> Tensor:
    """Values that small ones keep and large ones approach ``bound`` with; 0 for no limit.

    Examples
    --------
    >>> bounded(torch.tensor([0.1, 4.0, 400.0]), bound=4.0)
    tensor([0.1000, 3.0464, 4.0000])
    """
    return bound * torch.tanh(values / bound) if bound else values


def first_scales(layer_channels: Sequence[int], fine_scale: float) -> Tensor:
    """Factors on the adaptor's first weights, (C,): those of the first layer are larger.

    Their mean square is 1, so that adapted features start on the same scale.

    Parameters
    ----------
    layer_channels : sequence of int
        Channels C_l of each layer.
    fine_scale : float
        How many times as large as all others.

    Examples
    --------
    >>> first_scales([1, 3], fine_scale=3.0)
    tensor([1.7321, 0.5774, 0.5774, 0.5774])
    """
    scales = torch.ones(sum(layer_channels))
    scales[: layer_channels[0]] = fine_scale
    return scales / scales.square().mean().sqrt()


class SimpleNet(nn.Module):
    """Frozen features and a committee of heads on top of them (paper, section 3).

    The paper has one head. Far from normal features its scores are extrapolation,
    and each head extrapolates in its own way; their mean is steadier and better.

    Parameters
    ----------
    config : Config
        The configuration.
    weights : Weights
        Pretrained parameters of ``config.backbone``.

    Attributes
    ----------
    centre, spread : Tensor
        Mean and standard deviation of each head's scores on normal images it has not
        seen, (K,).
    level, scale : Tensor
        Mean and typical upper deviation of the committee's score on normal images at
        every position, (h, w), in units of the spread.
    drift : Drift
        What the training photos look like as a whole.
    typical, threshold : float
        Image score of the typical normal image, and the one above which an image
        counts as anomalous, in units of the scale; NaN before training. Anomaly maps
        are given on the scale where these two are 0 and 1.
    images : str
        A digest of the images it was trained on, see
        :func:`simplenet_lib.features.digest_of_images`; empty before training.
    photos : set of str
        The first 12 digits of the SHA-256 of each of these.

    Examples
    --------
    >>> model.save(folder / "model.safetensors")
    >>> detector = SimpleNet.load(folder, weights=weights_file)
    >>> result = detector.predict(data / "nut" / "test" / "dent" / "000.png")
    >>> result.score == model.predict(data / "nut" / "test" / "dent" / "000.png").score
    True
    >>> [one.size for one in detector.predict([np.zeros((48, 64), np.uint8)])]
    [(64, 48)]
    """

    PHOTO_DIGEST = 12

    centre: Tensor
    spread: Tensor
    level: Tensor
    scale: Tensor
    heads: Sequence[Head]

    def __init__(self, config: Config, weights: Weights) -> None:
        super().__init__()
        self.config = config
        self.weights_digest = weights.digest
        with torch.random.fork_rng(devices=[]):
            self.features = FrozenFeatures(
                config.backbone, config.layers, weights, config.neighbourhood, config.border
            )
            self.standardise = Standardise(self.features.channels)
            scales = first_scales(self.features.layer_channels, config.fine_scale)
            heads = []
            for number in range(config.heads):
                torch.manual_seed(random_seed(config.seed, INITIAL, number))
                head = Head(self.features.channels, config)
                with torch.no_grad():
                    head.adaptor.linear.weight.mul_(scales)
                heads.append(head)
        self.heads = nn.ModuleList(heads)  # type: ignore[assignment]
        self.register_buffer("centre", torch.zeros(config.heads))
        self.register_buffer("spread", torch.ones(config.heads))
        self.register_buffer("level", torch.zeros(grid(config)))
        self.register_buffer("scale", torch.ones(grid(config)))
        self.drift = Drift(self.features.layer_channels[0])
        self.typical = math.nan
        self.threshold = math.nan
        self.images = ""
        self.photos: set[str] = set()

    def forward(self, images: Tensor) -> Tensor:
        """Score map (N, h, w) of normalised images (N, 3, H, W): high is anomalous."""
        return self.committee(self.score_maps(self.features.outputs(images)))

    def score_maps(
        self, outputs: list[Tensor], layer: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """Every head's score map -D(z), (K, N, h, w), from the layers' outputs.

        As ``head(standardise(features.join(outputs)))``, with less arithmetic. Up to the
        activation of the hidden layer everything is linear: standardising, adapting,
        resampling, averaging. So all heads together become one 1x1 convolution of each
        layer on that layer's own, smaller grid. Its ``layer``, see :meth:`hidden_layer`,
        can be given where it is at hand.
        """
        weight, bias = layer or self.hidden_layer()
        parts = torch.split(weight, [output.shape[1] for output in outputs], dim=1)
        zero = torch.zeros_like(bias)
        maps = self.features.on_one_grid(
            [
                F.conv2d(output, part[:, :, None, None], bias if number == 0 else zero)
                for number, (output, part) in enumerate(zip(outputs, parts, strict=True))
            ]
        )
        joined = maps[0]
        for other in maps[1:]:
            joined += other
        hidden = around(joined, self.features.neighbourhood).permute(0, 2, 3, 1)
        return self.after_hidden_layer(hidden)

    @torch.no_grad()
    def hidden_layer(self, heads: Sequence[int] | None = None) -> tuple[Tensor, Tensor]:
        """Weight (K H, C) and bias (K H,) of some heads, or all, up to their activation.

        In evaluation mode everything before it is linear, standardising included.
        """
        numbers = range(len(self.heads)) if heads is None else heads
        layers = [before_activation(self.heads[number]) for number in numbers]
        weights, biases = zip(*layers, strict=True)
        weight = torch.cat(weights) / self.standardise.std
        return weight, torch.cat(biases) - weight @ self.standardise.mean

    def after_hidden_layer(self, hidden: Tensor, heads: Sequence[int] | None = None) -> Tensor:
        """Scores -D(z), (K, ...), of some heads whose hidden layers' values are (..., K H)."""
        numbers = range(len(self.heads)) if heads is None else heads
        scores = []
        for number, values in zip(numbers, hidden.chunk(len(numbers), dim=-1), strict=True):
            discriminator = self.heads[number].discriminator
            scores.append(-discriminator.score(discriminator.activation(values)).squeeze(-1))
        return torch.stack(scores)

    def committee(self, maps: Tensor) -> Tensor:
        """Score map (N, h, w) of all heads' maps (K, N, h, w): their mean, each in its units.

        Where normal images score higher, or vary more, a score says less: the border of
        the image, or a part that never looks twice the same. So every position has its
        own level and scale, if the configuration asks for them (0 and 1 otherwise). And far
        from normal a score does not say how far: so no position adds more than the bound.
        """
        units = (maps - self.centre[:, None, None, None]) / self.spread[:, None, None, None]
        return bounded((units.mean(dim=0) - self.level) / self.scale, self.config.bound)

    def in_units(self, values: Tensor) -> Tensor:
        """Anomaly maps or image scores on the scale of typical, 0, and threshold, 1."""
        return in_units(values, self.typical, self.threshold)

    def trained_state(self) -> dict[str, Tensor]:
        """Everything that training found; the backbone is not part of it."""
        return {
            name: tensor
            for name, tensor in self.state_dict().items()
            if not name.startswith("features.")
        }

    def save(self, path: Path) -> None:
        """Write heads, configuration and threshold; the backbone's weights stay out."""
        scale = {name: repr(getattr(self, name)) for name in SCALE}
        images = {"images": self.images, "photos": " ".join(sorted(self.photos))}
        write_checkpoint(path, self.trained_state(), {**self.identity(), **scale, **images})

    def identity(self) -> dict[str, str]:
        """Which network this is: format, configuration, and a digest of the weights."""
        return {
            "format": CHECKPOINT_FORMAT,
            "config": self.config.to_json(),
            "weights": self.weights_digest,
        }

    def feature_key(self) -> str:
        """What the frozen features depend on, apart from the images."""
        return json.dumps([FEATURES_FORMAT, self.weights_digest, *self.config.decides_features])

    @classmethod
    def load(cls, path: Path | str, weights: Path | str | None = None) -> SimpleNet:
        """Read what :meth:`save` wrote. Nothing in the file is executed.

        Parameters
        ----------
        path : Path or str
            The checkpoint, or the folder that ``simplenet train`` wrote it to.
        weights : Path or str, optional
            See :func:`simplenet_lib.weights.find_weights`.

        Raises
        ------
        SimpleNetError
            If the file is damaged, holds something else, or was trained on
            other pretrained weights than those found here.
        """
        path = checkpoint_in(Path(path))
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
            head = Head(channels, config).state_dict()
            sizes = {name: tensor.numel() for name, tensor in head.items()}
        held = sum(tensor.numel() for name, tensor in tensors.items() if name.startswith("heads."))
        if held != config.heads * sum(sizes.values()):
            raise SimpleNetError(f"{path}: its heads do not fit its configuration.")
        found = find_weights(config.backbone, Path(weights) if weights else None)
        if found.digest != metadata.get("weights"):
            raise SimpleNetError(
                f"{path}: was trained on other pretrained weights of {config.backbone} than"
                f" {found.source}. Point SIMPLENET_WEIGHTS at the weights it was trained on."
            )
        model = cls(config, found)
        check_tensors(tensors, model.trained_state(), path)
        model.load_state_dict(tensors, strict=False)
        for name, value in scale.items():
            setattr(model, name, value)
        model.images = metadata.get("images", "")
        model.photos = {*metadata.get("photos", "").split()}
        return model.eval()

    @overload
    def predict(
        self,
        images: Source,
        *,
        channels: Literal["rgb", "bgr"] = ...,
        threshold: float = ...,
    ) -> Result: ...

    @overload
    def predict(
        self,
        images: list[Source] | tuple[Source, ...],
        *,
        channels: Literal["rgb", "bgr"] = ...,
        threshold: float = ...,
    ) -> list[Result]: ...

    @overload
    def predict(
        self,
        images: Iterator[Source],
        *,
        channels: Literal["rgb", "bgr"] = ...,
        threshold: float = ...,
    ) -> Iterator[Result]: ...

    def predict(
        self,
        images: Source | list[Source] | tuple[Source, ...] | Iterator[Source],
        *,
        channels: Literal["rgb", "bgr"] = "rgb",
        threshold: float = 1.0,
    ) -> Result | list[Result] | Iterator[Result]:
        """Score an image, a list of images, or one image after another.

        Parameters
        ----------
        images : image, list or iterator
            An image is a path, the bytes of a file, an image of Pillow's, or an array: see
            :func:`simplenet_lib.dataset.as_picture`. A list gives a list. An iterator, such
            as a generator that waits for a camera, gives an iterator: an image is taken when
            its result is asked for, and nothing is kept.
        channels : {"rgb", "bgr"}
            Order of the channels of arrays; OpenCV's is ``"bgr"``.
        threshold : float
            The score above which an image counts as anomalous, on the scale where 1 is the
            model's own.

        Raises
        ------
        SimpleNetError
            If an image cannot be read. In an iterator this ends it; to go on past a damaged
            image, call ``predict`` for each and catch the error.
        """

        def read(some: Sequence[Source], first: int = 0) -> Iterator[Result]:
            names = [
                str(one) if isinstance(one, Path | str) else f"image {number}"
                for number, one in enumerate(some, start=first)
            ]
            for result in results(self, some, names, channels=channels, threshold=threshold):
                if isinstance(result, SimpleNetError):
                    raise result
                yield result

        if isinstance(images, list | tuple):
            return list(read(images))
        if isinstance(images, Iterator):
            every = enumerate(images)
            return (result for number, image in every for result in read([image], number))
        (result,) = read([images])
        return result


def before_activation(head: Head) -> tuple[Tensor, Tensor]:
    """Weight (H, C) and bias (H,) of everything before the hidden layer's activation.

    As it works in evaluation mode: adaptor, hidden layer and BatchNorm in one.

    Examples
    --------
    >>> from simplenet_lib.config import preset
    >>> weight, bias = before_activation(Head(1536, preset("fast")))
    >>> weight.shape, bias.shape
    (torch.Size([128, 1536]), torch.Size([128]))
    """
    linear, hidden = head.adaptor.linear, head.discriminator.hidden
    weight, bias = hidden.weight @ linear.weight, hidden.weight @ linear.bias + hidden.bias
    norm = head.discriminator.norm
    if isinstance(norm, nn.BatchNorm1d):
        assert norm.running_mean is not None and norm.running_var is not None
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        weight = weight * scale[:, None]
        bias = (bias - norm.running_mean) * scale + norm.bias
    return weight, bias


def grid(config: Config) -> tuple[int, int]:
    """Height h and width w of a score map: the grid of the first layer.

    Examples
    --------
    >>> from simplenet_lib.config import preset
    >>> grid(preset("fast")), grid(preset("course"))
    ((48, 48), (28, 28))
    """
    strides = {"layer1": 4, "layer2": 8, "layer3": 16, "layer4": 32}
    height, width = config.seen
    stride = strides.get(config.layers[0], 1)
    return math.ceil(height / stride), math.ceil(width / stride)


def write_checkpoint(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write tensors and metadata as safetensors, whole or not at all.

    Raises
    ------
    SimpleNetError
        If ``path`` cannot be written; an older file there is then untouched.

    Examples
    --------
    >>> write_checkpoint(folder / "a.safetensors", {"x": torch.zeros(2)}, {"format": "simplenet-3"})
    >>> read_checkpoint(folder / "a.safetensors")
    ({'x': tensor([0., 0.])}, {'format': 'simplenet-3'})
    """
    # One entry: safetensors writes several in random order, and equal models must be equal files.
    entry = {"simplenet": json.dumps(metadata, sort_keys=True)}
    data = safetensors.torch.save(
        {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, entry
    )
    write_whole(path, data)


def check_writable(folder: Path) -> None:
    """Fail before the work, not after it, if nothing can be written to ``folder``.

    Examples
    --------
    >>> check_writable(folder / "runs" / "nut")  # nothing is made
    >>> (folder / "runs").exists()
    False
    """
    try:
        existing = folder.absolute()
        while not existing.exists():
            if existing.is_symlink():
                raise SimpleNetError(f"{folder}: a link that leads nowhere. Choose another folder.")
            existing = existing.parent
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise SimpleNetError(f"{folder}: cannot be written to ({error}).") from error


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name shows either the old contents or all of the new.

    Examples
    --------
    >>> write_whole(folder / "new" / "file.bin", b"abc")
    >>> (folder / "new" / "file.bin").read_bytes()
    b'abc'
    """
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


def checkpoint_in(path: Path) -> Path:
    """The checkpoint at ``path``, which may be the folder of a training.

    Examples
    --------
    >>> model.save(folder / "model.safetensors")
    >>> checkpoint_in(folder).name, checkpoint_in(folder / "model.safetensors").name
    ('model.safetensors', 'model.safetensors')
    """
    inside = path / "model.safetensors"
    return inside if inside.is_file() else path


def read_checkpoint(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a checkpoint's tensors and metadata.

    Raises
    ------
    SimpleNetError
        If the file is missing, damaged, or of another format.

    Examples
    --------
    >>> model.save(folder / "model.safetensors")
    >>> tensors, metadata = read_checkpoint(folder / "model.safetensors")
    >>> tensors["level"].shape, metadata["format"]
    (torch.Size([8, 8]), 'simplenet-3')
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
                raise SimpleNetError(_not_ours(path, metadata))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        hint = " Files of this disk cannot be mapped: copy it to another." * (
            "os error 19" in str(error)
        )
        raise SimpleNetError(f"{path}: not a readable checkpoint ({error}).{hint}") from error
    return tensors, metadata


def _not_ours(path: Path, metadata: object) -> str:
    found = metadata.get("format") if isinstance(metadata, dict) else None
    if found in ("simplenet-1", "simplenet-2"):
        return (
            f"{path}: a model of an earlier version ({found}); this one reads"
            f" {CHECKPOINT_FORMAT}. Train it again with the same command."
        )
    return f"{path}: not a checkpoint of this program ({CHECKPOINT_FORMAT})."


def check_tensors(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path
) -> None:
    """Check that the tensors of the file ``path`` have the names and shapes of ``expected``.

    Raises
    ------
    SimpleNetError
        If one is missing, surplus, of another shape or type, or not finite.

    Examples
    --------
    >>> expected = {"x": torch.zeros(2)}
    >>> check_tensors({"x": torch.ones(2)}, expected, Path("a.safetensors"))
    >>> check_tensors({"x": torch.ones(3)}, expected, Path("a.safetensors"))
    Traceback (most recent call last):
        ...
    simplenet_lib.config.SimpleNetError: a.safetensors: x is (3,) of torch.float32, but its ...
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
