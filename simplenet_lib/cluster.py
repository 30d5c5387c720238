"""Beyond one machine: sweeps of trainings and photos by the million, with Ray.

Ray places the work, and places it anew when a process or a machine is lost. What is done lies
in files that are there whole or not at all, so the same command goes on where another ended.
All machines must see the same folders: data, output, model and, in ``SIMPLENET_CACHE``, the
features.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import secrets
import shutil
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from simplenet_lib.benchmark import Job, Splits
from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import SUFFIXES, but_passed_over, images_outside, is_system
from simplenet_lib.features import FEATURE_BATCH, cache_folder, cached_features
from simplenet_lib.localization import Source, results
from simplenet_lib.model import SimpleNet, check_writable, checkpoint_in
from simplenet_lib.outputs import PredictionFolder
from simplenet_lib.weights import find_weights

# Ray reads these when it is imported: it shall send nothing, and not warn of its own workings.
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
# Actors of Ray Data work in a thread of their own. What Linux lends to threads beside the main one
# is never kept (see `cli.keep_memory`): theirs shall come from where the main one's comes from.
os.environ.setdefault("MALLOC_ARENA_MAX", "1")
try:
    import fsspec
    import pyarrow as pa
    import pyarrow.parquet as pq
    import ray
    import ray.data
except ImportError as error:
    raise SimpleNetError(
        f'--ray needs more than is installed ({error}): pip install "simplenet_lib[cluster]"'
    ) from error

RETRIES = 3  # of a run whose process or machine was lost, or that failed
CPUS = 1  # cores of a task; one, for features differ in their last bits with the number
PART = 256  # photos at most: what a lost machine has to judge again
PARQUET = "predictions.parquet"
SCHEMA = pa.schema(
    {
        "image": pa.string(),
        "score": pa.float64(),
        "verdict": pa.string(),
        "unfamiliar": pa.list_(pa.string()),
        "regions": pa.list_(
            pa.struct(
                dict.fromkeys(("x", "y", "width", "height", "area"), pa.int64())
                | {"peak": pa.float64()}
            )
        ),
        "size": pa.list_(pa.int64()),
        "overlay": pa.string(),
        "map": pa.string(),
        "error": pa.string(),
    }
)


@contextmanager
def _connected(address: str) -> Iterator[None]:
    """Ray at ``address``; ``"local"`` starts one and leaves nothing of it running.

    Raises
    ------
    SimpleNetError
        If there is none.
    """
    options: dict[str, Any] = {"include_dashboard": False}
    if address != "local":  # machines that were started before: they know nothing of these
        names = ("SIMPLENET_CACHE", "THP_MEM_ALLOC_ENABLE", "OMP_WAIT_POLICY", "MALLOC_")
        known = {name: value for name, value in os.environ.items() if name.startswith(names)}
        if "SIMPLENET_CACHE" in known:
            known["SIMPLENET_CACHE"] = str(cache_folder().absolute())
        options = {"runtime_env": {"env_vars": known}}
    try:
        host, _, port = address.removeprefix("ray://").rpartition(":")
        if host and port.isdecimal():  # Ray itself would knock for minutes
            socket.create_connection((host, int(port)), timeout=5).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except Exception as error:  # Ray raises many types, on a busy machine Exception itself
        ray.shutdown()
        raise SimpleNetError(
            f"no Ray at '{address}' ({str(error).splitlines()[0]}). Start one with"
            " `ray start --head` and say --ray auto, or say --ray local."
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def sweep(
    jobs: Sequence[Job], address: str, *, weights: Path | None, device: str, progress: bool = True
) -> dict[str, str]:
    """Make all runs: the features of a category once, then a small task for each run.

    Parameters
    ----------
    jobs : sequence of Job
        The runs; see :func:`simplenet_lib.benchmark.missing_jobs`. Their paths are absolute.
    address : str
        See ``--ray``.
    weights : Path, optional
        See :func:`simplenet_lib.weights.find_weights`.
    device : str
        ``"cpu"``, ``"cuda"``, or ``"auto"``: a GPU for each task if the cluster has any.
    progress : bool
        Show a progress bar on stderr.

    Returns
    -------
    dict of str to str
        Of every run that failed, after Ray's retries, its file and the reason.

    Examples
    --------
    >>> sweep([], "local", weights=None, device="auto")
    {}
    """
    if not jobs:
        return {}
    weights = weights and weights.absolute()
    waiting: dict[Any, Job] = {}
    failed: dict[str, str] = {}
    with (
        _connected(address),
        tqdm(total=len(jobs), desc="runs", unit="run", disable=not progress) as bar,
    ):
        device, gpus = _device(device)
        shared = {"weights": weights, "device": device, "max_pixels": Image.MAX_IMAGE_PIXELS}
        # What Ray is to know of a task; where and when it runs is Ray's to decide.
        wanted: Any = {"num_cpus": CPUS, "num_gpus": gpus}
        remote: Any = ray.remote(**wanted, max_retries=RETRIES, retry_exceptions=True)
        run, cache = remote(_run), remote(_features)
        splits: dict[str, Any] = {}
        features: dict[tuple[Any, ...], Any] = {}

        def collect() -> None:
            (done,), _ = ray.wait([*waiting], num_returns=1)
            job = waiting.pop(done)
            try:
                ray.get(done)
            except ray.exceptions.RayError as error:
                failed[job.path.name] = _reason(error)
            bar.update()

        # Few more than can be worked on, so that features are still in the cache when needed.
        at_once = 2 * math.ceil(_resources().get("GPU" if gpus else "CPU", 1))
        for job in jobs:
            if len(waiting) >= at_once:
                collect()
            # The lists of files go once for all runs of a category, not with every task.
            if job.category not in splits:
                splits[job.category] = ray.put(job.splits)
            files = splits[job.category]
            key = (job.category, job.config.backbone, *job.config.decides_features)
            if key not in features:
                features[key] = cache.remote(files, job.config, **shared)
            bare = replace(job, splits=None)
            waiting[run.remote(bare, files, features[key], **shared)] = bare
        while waiting:
            collect()
    return failed


def _features(
    splits: Splits,
    config: Any,
    weights: Path | None,
    device: str,
    max_pixels: int | None,
) -> str:
    """Put the features of the normal images into the cache; returns its folder."""
    _prepare(max_pixels)
    model = SimpleNet(config, find_weights(config.backbone, weights)).to(device)
    splits.under(config)
    cached_features(
        model.features, splits.normal, model.feature_key(), tile=config.tile, progress=False
    )
    return str(cache_folder())


def _run(
    job: Job,
    splits: Splits,
    features: str,
    weights: Path | None,
    device: str,
    max_pixels: int | None,
) -> None:
    """Make a run; that it waits for the features is all that it wants of their folder."""
    _prepare(max_pixels)
    replace(job, splits=splits).run(weights, device, progress=False)


def _prepare(max_pixels: int | None) -> None:
    """Set up a process of Ray's as the command has set up its own."""
    torch.set_num_threads(CPUS)
    Image.MAX_IMAGE_PIXELS = max_pixels


def _resources() -> dict[str, float]:
    resources: Any = ray.cluster_resources
    found: dict[str, float] = resources()
    return found


def _device(name: str) -> tuple[str, int]:
    """The device of every task, and how many GPUs it needs."""
    found = _resources().get("GPU", 0)
    kind = ("cuda" if found else "cpu") if name == "auto" else name.partition(":")[0]
    if kind not in ("cpu", "cuda"):
        raise SimpleNetError(f"no device '{name}' with --ray. Known: cpu, cuda, auto.")
    if kind == "cuda" and not found:
        raise SimpleNetError("this Ray has no GPU. Use --device cpu.")
    return kind, int(kind == "cuda")


def _reason(error: BaseException) -> str:
    """What Ray tells of a failure: the sentence of the first cause, or the last line."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, SimpleNetError) and not isinstance(cause, ray.exceptions.RayError):
            return str(cause)
        cause = getattr(cause, "cause", None) or cause.__cause__
    return str(error).strip().splitlines()[-1]


# Photos


def score(
    model: Path,
    images: Sequence[str],
    output: Path,
    address: str,
    threshold: float,
    kinds: Mapping[str, bool],
    *,
    weights: Path | None,
    device: str,
    say: Callable[[str], None] = lambda sentence: None,
    progress: bool = True,
) -> Counter[str]:
    """Judge photos part by part; those that ``output`` knows already are skipped.

    A part is a folder in ``output`` such as :class:`~simplenet_lib.outputs.PredictionFolder`
    fills, and the table as Parquet. It appears when it is whole.

    Parameters
    ----------
    model : Path
        The trained model.
    images : sequence of str
        See :func:`find_photos`.
    output : Path
        The folder for the parts.
    address : str
        See ``--ray``.
    threshold : float
        The score above which an image counts as anomalous.
    kinds : mapping of str to bool
        Whether there shall be ``"overlays"``, ``"maps"`` and ``"records"``.
    weights, device, progress
        See :func:`sweep`.
    say : callable
        Receives a sentence on what was found.

    Returns
    -------
    Counter
        Of all photos in ``output`` how many could be ``"judged"``, are ``"anomalous"``,
        ``"unfamiliar"`` and ``"damaged"``.

    Raises
    ------
    SimpleNetError
        If there are no photos, the model does not load, or ``output`` holds something else.

    Examples
    --------
    >>> kinds = {"overlays": False, "maps": False, "records": False}
    >>> score(folder, ["photos"], folder, "local", 1.0, kinds, weights=None, device="auto")
    Traceback (most recent call last):
    simplenet_lib.config.SimpleNetError: ...: no such checkpoint.
    """
    file = checkpoint_in(model).absolute()
    output = output.absolute()
    SimpleNet.load(file, weights)  # what is wrong with it is said now, in one sentence
    identity = {
        "model": hashlib.sha256(file.read_bytes()).hexdigest(),
        "threshold": repr(threshold),
    }
    _check_parts(output)
    photos = find_photos(images, output)
    output.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(output / ".lock", timeout=0):
            _remove_unfinished(output)
            known = _known(output, identity)
            left = [photo for photo in photos if _as_text(photo) not in known]
            skipped = f", {len(photos) - len(left)} of them judged before" if known else ""
            say(f"Found {len(photos)} images{skipped}.")
            if left:
                settings = {"home": os.getcwd(), "output": output, "threshold": threshold}
                settings |= {"kinds": dict(kinds), "identity": identity, "file": file}
                settings |= {"weights": weights and weights.absolute()}
                _judge_all(left, settings, address, device, progress)
            _remove_unfinished(output)
            return _counts(output)
    except Timeout:
        raise SimpleNetError(
            f"{output}: another `simplenet predict` is writing there. Choose another --output, or"
            " wait."
        ) from None


def _judge_all(
    photos: Sequence[str], settings: dict[str, Any], address: str, device: str, progress: bool
) -> None:
    """Have actors, each with the model in memory, write the parts."""
    with (
        _connected(address),
        tqdm(total=len(photos), desc="predict", unit="image", disable=not progress) as bar,
    ):
        device, gpus = _device(device)
        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        logging.getLogger("ray.data").setLevel(logging.ERROR)
        places = int(_resources()["GPU" if gpus else "CPU"])
        # Whole batches: then a photo stands in the same batch as in one process.
        batch = 2 * FEATURE_BATCH
        some = math.ceil(len(photos) / (2 * places * batch)) * batch
        size = min(PART, some)
        # Only names go through Ray's memory: an actor reads and decodes its photos itself.
        parts = [
            pa.table({"image": [os.fsencode(photo) for photo in photos[at : at + size]]})
            for at in range(0, len(photos), size)
        ]
        # As blocks: of tables Ray would first have workers look how large they are.
        done = ray.data.from_blocks(parts).map_batches(
            _Judge,
            fn_constructor_kwargs=settings
            | {"device": device, "max_pixels": Image.MAX_IMAGE_PIXELS},
            batch_size=None,  # a part is a block
            num_cpus=CPUS,
            num_gpus=gpus,
            compute=ray.data.ActorPoolStrategy(
                min_size=1, max_size=places, initial_size=min(places, len(parts))
            ),
        )
        try:
            for row in done.iter_rows():
                bar.update(row["photos"])
        except ray.exceptions.RayError as error:
            raise SimpleNetError(
                f"{settings['output']}: {_reason(error)} Parts that are there stay; the same"
                " command goes on from there."
            ) from error


class _Judge:
    """An actor of Ray's: it loads the model once and writes parts."""

    def __init__(
        self,
        file: Path,
        weights: Path | None,
        device: str,
        home: str,
        output: Path,
        threshold: float,
        kinds: dict[str, bool],
        identity: dict[str, str],
        max_pixels: int | None,
    ) -> None:
        _prepare(max_pixels)
        self.model = SimpleNet.load(file, weights).to(device)
        self.home, self.output, self.kinds = home, output, kinds
        self.threshold, self.identity = threshold, identity

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[int]]:
        names = [os.fsdecode(name) for name in batch["image"]]
        part = f"part-{hashlib.sha256(b'/'.join(batch['image'])).hexdigest()[:16]}"
        partial = self.output / f".partial-{part}-{secrets.token_hex(4)}"
        wanted = {name: Path(Path(name).name).with_suffix(".png") for name in names}
        photos = _Photos(names, self.home)
        with (
            PredictionFolder(partial, wanted, **self.kinds) as folder,
            closing(results(self.model, photos, names, threshold=self.threshold)) as judged,
        ):
            rows = []
            for name, found in zip(names, judged, strict=True):
                if isinstance(found, SimpleNetError):
                    found = SimpleNetError(_without_place(str(found), name, self.home))
                rows.append(folder.write(name, found))
        for row in rows:
            row["image"] = _as_text(row["image"])
        schema = SCHEMA.with_metadata(self.identity)
        pq.write_table(pa.Table.from_pylist(rows, schema), partial / PARQUET)
        try:
            partial.rename(self.output / part)
        except OSError:
            if not (self.output / part).is_dir():
                raise
            shutil.rmtree(partial)  # a second try of what the first had finished after all
        return {"photos": [len(names)]}


class _Photos(Sequence[Source]):
    """Photos by name: a path, or the bytes of what fsspec finds at an address, when asked for."""

    def __init__(self, names: Sequence[str], home: str) -> None:
        self.names, self.home = names, home

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, number: Any) -> Any:
        name = self.names[number]
        if "://" not in name:
            return Path(self.home, name)
        try:
            with fsspec.open(name, "rb") as file:
                return file.read()
        except Exception as error:  # drivers of fsspec raise many types
            raise SimpleNetError(f"{name}: cannot be read ({error}).") from error


def _without_place(reason: str, name: str, home: str) -> str:
    """A reason without the photo's name in front, in whichever way it was written."""
    for place in (str(Path(home, name)), name, str(Path(name))):
        reason = reason.removeprefix(f"{place}: ")
    return reason


def _as_text(name: str) -> str:
    """A name in Parquet, which holds no bytes that are no text."""
    return name.encode("utf-8", "backslashreplace").decode()


def find_photos(images: Sequence[str], output: Path) -> list[str]:
    """The photos that a command names, in order, each once.

    Parameters
    ----------
    images : sequence of str
        Folders, photos, lists of photos in a ``.txt``, one a line, or addresses of such that
        fsspec knows, as ``s3://BUCKET/FOLDER``.
    output : Path
        What lies in there is left out.

    Raises
    ------
    SimpleNetError
        If there are none, or something is not there.

    Examples
    --------
    >>> photos = find_photos([str(data / "nut" / "train" / "good")], folder / "output")
    >>> [Path(photo).name for photo in photos][:2]
    ['000.png', '001.png']
    """
    found: dict[str, None] = {}
    passed: Counter[str] = Counter()
    for image in images:
        if "://" in image:
            found |= dict.fromkeys(_at_address(image))
        elif Path(image).is_dir():
            found |= dict.fromkeys(map(str, images_outside(output, Path(image), passed)))
        elif not Path(image).exists():
            raise SimpleNetError(f"{image}: no such image or folder.")
        elif image.lower().endswith(".txt"):
            found |= dict.fromkeys(_lines(image, Path(image).read_bytes()))
        else:
            found[str(Path(image))] = None
    if not found:
        raise SimpleNetError(f"{', '.join(images)}: no images found{but_passed_over(passed)}.")
    return [*found]


def _at_address(address: str) -> list[str]:
    try:
        system, path = fsspec.core.url_to_fs(address)
        if system.isdir(path):
            return [
                system.unstrip_protocol(one)
                for one in sorted(system.find(path))
                if Path(one).suffix.lower() in SUFFIXES and not any(map(is_system, Path(one).parts))
            ]
        if address.lower().endswith(".txt"):
            return _lines(address, system.cat_file(path))
        if not system.exists(path):
            raise FileNotFoundError("not there")
    except SimpleNetError:
        raise
    except Exception as error:  # drivers of fsspec raise many types
        raise SimpleNetError(f"{address}: cannot be opened ({error}).") from error
    return [address]


def _lines(name: str, data: bytes) -> list[str]:
    try:
        return [line.strip() for line in data.decode("utf-8-sig").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise SimpleNetError(f"{name}: not a list of photos in UTF-8 ({error}).") from error


def _check_parts(output: Path) -> None:
    """Refuse a folder that holds something else than parts, or cannot be written to."""
    try:
        inside = [path for path in output.iterdir()] if output.exists() else []
    except OSError as error:
        raise SimpleNetError(f"{output}: cannot be opened ({error}).") from error
    for path in inside:
        if not is_system(path.name) and not (path / PARQUET).is_file():
            raise SimpleNetError(
                f"{output}: exists and holds something else ({path.name}). Choose another --output."
            )
    check_writable(output)


def _remove_unfinished(output: Path) -> None:
    """Remove what a lost process has begun."""
    for path in output.glob(".partial-part-*"):
        shutil.rmtree(path, ignore_errors=True)


def _known(output: Path, identity: Mapping[str, str]) -> set[str]:
    """The photos that the parts know."""
    known: set[str] = set()
    for path in sorted(output.glob(f"*/{PARQUET}")):
        table = pq.read_table(path, columns=["image"])
        found = {
            key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()
        }
        if {key: found.get(key) for key in identity} != dict(identity):
            raise SimpleNetError(
                f"{path.parent}: verdicts of another model or threshold. Choose another --output."
            )
        known.update(table["image"].to_pylist())
    return known


def _counts(output: Path) -> Counter[str]:
    """How many photos the parts know, and of which kind."""
    counts: Counter[str] = Counter()
    for path in output.glob(f"*/{PARQUET}"):
        table = pq.read_table(path, columns=["verdict", "unfamiliar", "error"])
        verdicts = table["verdict"].to_pylist()
        counts["damaged"] += sum(error is not None for error in table["error"].to_pylist())
        counts["judged"] += sum(verdict is not None for verdict in verdicts)
        counts["anomalous"] += verdicts.count("anomalous")
        counts["unfamiliar"] += sum(map(bool, table["unfamiliar"].to_pylist()))
    return counts
