"""What ``simplenet predict`` leaves in its folder, written while the images are judged."""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from simplenet_lib.config import SimpleNetError
from simplenet_lib.dataset import is_system
from simplenet_lib.localization import Prediction, Result
from simplenet_lib.model import check_writable, write_whole

if sys.platform != "win32":
    import fcntl

TABLE, RECORDS, OVERLAYS, MAPS = "predictions.csv", "predictions.json", "overlays", "maps"
COLUMNS = ("image", "score", "verdict", "unfamiliar", "regions", "overlay", "map", "error")
TABLE_REGIONS = 10  # in a cell of the table; the list in JSON has all
BOM = b"\xef\xbb\xbf"  # by which a spreadsheet knows that accents are UTF-8


def check_folder(folder: Path) -> None:
    """Refuse a folder of predictions that holds something else, or cannot be written to.

    Examples
    --------
    >>> check_folder(folder)  # empty: predictions may go there
    >>> (folder / "thesis.txt").touch()
    >>> check_folder(folder)
    Traceback (most recent call last):
        ...
    simplenet_lib.config.SimpleNetError: ...: exists and holds something else. Choose another.
    """
    refusal = SimpleNetError(f"{folder}: exists and holds something else. Choose another.")
    try:
        if folder.exists() and not folder.is_dir():
            raise refusal
        inside = [path for path in folder.iterdir()] if folder.is_dir() else []
    except OSError as error:
        raise SimpleNetError(f"{folder}: cannot be opened ({error}).") from error
    names = {path.name for path in inside if not is_system(path.name)}
    if names and not (names <= {TABLE, RECORDS, OVERLAYS, MAPS} and _is_ours(folder / TABLE)):
        raise refusal
    check_writable(folder)


def _is_ours(table: Path) -> bool:
    """Whether a table is one that an earlier run wrote."""
    if table.is_symlink() or not table.is_file():
        return False
    with table.open("rb") as file:
        start = file.read(100).removeprefix(BOM)
    return not start or start.startswith(b"image,score,verdict,")


class PredictionFolder:
    """The folder that ``simplenet predict`` fills, image by image.

    A table, and if asked for one list of records in JSON, an overlay and a map of every
    image. Whatever happens, table and list hold the images judged so far, and what they name
    is there and whole. What an earlier run has left, and its table names, is removed first;
    nothing else ever is.

    Parameters
    ----------
    folder : Path
        It may exist, be a link or a mount; see :func:`check_folder`.
    images : mapping of Path or str to Path
        Every image, and the name that its overlay and map would like to have.
    overlays, maps, records : bool
        What to write beside the table: the overlays (PNG), the maps (``.npy``, float32, of
        the photo's size), the list in JSON.

    Raises
    ------
    SimpleNetError
        If something cannot be written, or another run is writing there.

    Examples
    --------
    >>> photo = data / "nut" / "test" / "dent" / "000.png"
    >>> with PredictionFolder(folder, {photo: Path("dent.png")}, overlays=False) as output:
    ...     row = output.write(photo, model.predict(photo))
    >>> (folder / "predictions.csv").read_text("utf-8-sig").splitlines()[0]
    'image,score,verdict,unfamiliar,regions,overlay,map,error'
    """

    def __init__(
        self,
        folder: Path,
        images: Mapping[Path, Path] | Mapping[str, Path],
        *,
        overlays: bool = True,
        maps: bool = False,
        records: bool = False,
    ) -> None:
        self.folder = folder
        self.images = images
        self.overlays = overlays
        self.maps = maps
        self.records = records
        self.written = 0

    @property
    def made(self) -> list[str]:
        """Names of what is written."""
        every = {TABLE: True, RECORDS: self.records, OVERLAYS: self.overlays, MAPS: self.maps}
        return [name for name, wanted in every.items() if wanted]

    def __enter__(self) -> PredictionFolder:
        check_folder(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._table = os.fdopen(
                os.open(self.folder / TABLE, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0
            )
            try:
                self._lock()
                self._remove_earlier()
                self._names = unique_names(self.images, self.folder)
                self._table.truncate(0)
                _write(self._table, 0, BOM + _line(COLUMNS))
                if self.records:
                    self._json = (self.folder / RECORDS).open("x+b", buffering=0)
                    _write(self._json, 0, b"[\n]\n")
            except BaseException:
                self._table.close()
                raise
        except OSError as error:
            raise self._failed(error) from error
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._table.close()
        if self.records:
            self._json.close()

    def write(self, image: Path | str, found: Result | SimpleNetError) -> dict[str, Any]:
        """Add what the model says of an image, or why it could not be read; returns the record."""
        row: dict[str, Any] = dict.fromkeys(("image", "size", *COLUMNS[1:]))
        row["image"] = str(image)
        made: list[Path] = []
        try:
            if isinstance(found, SimpleNetError):
                row["error"] = str(found).removeprefix(f"{image}: ")
            else:
                row |= {"score": found.score, "verdict": found.verdict}
                row |= {"unfamiliar": found.unfamiliar, "size": found.size}
                row["regions"] = [asdict(region) for region in found.regions]
                name = self._names[image]
                if self.overlays:
                    data = io.BytesIO()
                    found.overlay().save(data, "PNG", compress_level=1)
                    row["overlay"] = self._put(Path(OVERLAYS, name), data, made)
                if self.maps:
                    data = io.BytesIO()
                    np.save(data, found.map, allow_pickle=False)
                    row["map"] = self._put(Path(MAPS, name).with_suffix(".npy"), data, made)
            self._add(row)
        except BaseException as error:  # what the table does not name should not be there
            for path in made:
                path.unlink(missing_ok=True)
            if isinstance(error, OSError):
                raise self._failed(error) from error
            raise
        self.written += 1
        return row

    def _failed(self, error: OSError) -> SimpleNetError:
        kept = f" What is known of {self.written} images is kept." if self.written else ""
        return SimpleNetError(f"{self.folder}: could not be written ({error}).{kept}")

    def _lock(self) -> None:
        """Refuse to write where another run does; the lock ends with the process."""
        if sys.platform != "win32":
            try:
                fcntl.flock(self._table, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise SimpleNetError(
                    f"{self.folder}: another `simplenet predict` is writing there. Choose another"
                    " --output, or wait."
                ) from None
            except OSError:
                pass  # a disk that knows no locks

    def _remove_earlier(self) -> None:
        """Remove the files that the earlier table names, and folders that this leaves empty."""
        self._table.seek(0)
        text = self._table.read().removeprefix(BOM).decode(errors="surrogateescape")
        try:
            rows = list(csv.DictReader(io.StringIO(text, newline="")))
        except csv.Error as error:
            raise SimpleNetError(
                f"{self.folder / TABLE}: damaged ({error}). Remove it and what belongs to it, or"
                " choose another --output."
            ) from error
        for row in rows:
            for column, top in (("overlay", OVERLAYS), ("map", MAPS)):
                name = Path(row.get(column) or "")
                if name.parts[:1] != (top,) or ".." in name.parts:
                    continue  # not a name that we gave
                (self.folder / name).unlink(missing_ok=True)
                for parent in name.parents[:-1]:
                    try:
                        (self.folder / parent).rmdir()
                    except OSError:  # not empty, or a link of the user's
                        break
        (self.folder / RECORDS).unlink(missing_ok=True)

    def _put(self, name: Path, data: io.BytesIO, made: list[Path]) -> str:
        """Write a new file, whole or not at all; returns its name for the table."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("xb") as file:
            made.append(path)
            file.write(data.getbuffer())
        return name.as_posix()

    def _add(self, row: dict[str, Any]) -> None:
        cells = {**row, "image": cell_of(row["image"])}
        if row["score"] is not None:
            cells["score"] = f"{row['score']:.6g}"
            cells["unfamiliar"] = ", ".join(row["unfamiliar"])
            cells["regions"] = "; ".join(
                " ".join(
                    f"{key}={value:.4g}" if key == "peak" else f"{key}={value}"
                    for key, value in region.items()
                )
                for region in row["regions"][:TABLE_REGIONS]
            )
        line = _line([cells[column] for column in COLUMNS])
        end = os.fstat(self._table.fileno()).st_size
        _write(self._table, end, line)
        if self.records:
            try:
                # The list ends in two lines, "\n]\n", and is a whole list after every image.
                record = json.dumps(row).encode()
                place = os.fstat(self._json.fileno()).st_size - len(b"\n]\n")
                comma = b",\n" if self.written else b"\n"
                _write(self._json, place, comma + record + b"\n]\n", rest=b"\n]\n")
            except BaseException:
                self._table.truncate(end)
                raise


def _write(file: io.FileIO, place: int, data: bytes, rest: bytes = b"") -> None:
    """Write at ``place``, all or nothing: then the file ends there with ``rest``."""
    try:
        file.seek(place)
        done = 0
        while done < len(data):  # a full disk takes a part first, and then refuses
            done += file.write(data[done:])
    except BaseException:
        file.truncate(place)
        file.seek(place)
        file.write(rest)
        raise


def _line(cells: Any) -> bytes:
    """A line of the table. Names that are no text are escaped: the table stays UTF-8."""
    text = io.StringIO(newline="")
    csv.writer(text).writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")


def check_evaluation(path: Path) -> None:
    """Refuse a table of an evaluation that would replace something else.

    Examples
    --------
    >>> check_evaluation(folder / "evaluation.csv")  # not there yet
    >>> check_evaluation(folder)
    Traceback (most recent call last):
        ...
    simplenet_lib.config.SimpleNetError: ...: a folder. Name a file for the table, ...
    """
    if path.is_dir():
        raise SimpleNetError(f"{path}: a folder. Name a file for the table, such as table.csv.")
    if path.exists():
        with path.open("rb") as file:
            if file.read(len(BOM) + 11) != BOM + b"image,kind,":
                raise SimpleNetError(f"{path}: exists and is something else. Choose another.")
    try:
        check_writable(path.parent)
    except SimpleNetError as error:
        raise SimpleNetError(f"{error} Or name a file elsewhere with --output.") from error


def write_evaluation(
    path: Path, predictions: Sequence[Prediction], threshold: float
) -> list[Prediction]:
    """Write one line for each test image; returns the wrong verdicts, worst first.

    Examples
    --------
    >>> from simplenet_lib.dataset import AnomalyDataset, make_transform
    >>> from simplenet_lib.localization import predict
    >>> test = AnomalyDataset(data, "nut", "test", make_transform(32, 32))
    >>> predictions = list(predict(model, test, progress=False))
    >>> wrong = write_evaluation(folder / "evaluation.csv", predictions, threshold=1.0)
    >>> (folder / "evaluation.csv").read_text("utf-8-sig").splitlines()[0]
    'image,kind,score,verdict,right,unfamiliar'
    """
    lines = [_line(("image", "kind", "score", "verdict", "right", "unfamiliar"))]
    wrong = []
    for prediction in predictions:
        sample = prediction.sample
        verdict = "anomalous" if prediction.anomalous else "normal"
        right = prediction.anomalous == bool(sample.label)
        if not right:
            wrong.append(prediction)
        unlike = ", ".join(prediction.unfamiliar)
        lines.append(
            _line(
                (
                    cell_of(sample.image),
                    cell_of(Path(sample.defect)),
                    f"{prediction.score:.6g}",
                    verdict,
                    "yes" if right else "no",
                    unlike,
                )
            )
        )
    write_whole(path, BOM + b"".join(lines))
    return sorted(wrong, key=lambda prediction: -abs(prediction.score - threshold))


def cell_of(path: Path | str) -> str:
    """The path as a table holds it: still the same path, and never a spreadsheet's formula.

    A spreadsheet computes a cell that starts with ``=``, ``+``, ``-`` or ``@``. So a relative
    path that starts with anything but a letter, a digit, ``.`` or ``_`` gets ``./`` in front.

    Examples
    --------
    >>> cell_of(Path("photo.png")), cell_of(Path("=1+1.png"))
    ('photo.png', './=1+1.png')
    """
    text = str(path)
    harmless = text[0].isalnum() or text[0] in "._/\\"
    return text if harmless else f"./{text}"


def unique_names(
    images: Mapping[Path, Path] | Mapping[str, Path], folder: Path
) -> dict[Path | str, Path]:
    """A name for what is written of each image that is no other's, on any disk.

    Disks of Windows and macOS take ``a`` and ``A``, or two ways to write ``é``, for one; and
    an image can have the name of a folder. What lies in ``folder`` already is the user's.

    Examples
    --------
    >>> names = {Path("one/a.jpg"): Path("a.jpg"), Path("two/A.jpg"): Path("A.jpg")}
    >>> [str(name) for name in unique_names(names, folder).values()]
    ['a.png', 'A-2.png']
    """

    def seen_by_any_disk(name: Path) -> str:
        return unicodedata.normalize("NFC", name.as_posix()).casefold()

    taken = {seen_by_any_disk(parent) for name in images.values() for parent in name.parents}
    result: dict[Path | str, Path] = {}
    for image, name in images.items():
        stem = name.stem
        while len(os.fsencode(stem)) > 200:  # with a number behind it a name may become too long
            stem = stem[:-1]
        number, unique = 1, name.with_name(f"{stem}.png")
        while (
            seen_by_any_disk(unique) in taken
            or os.path.lexists(folder / OVERLAYS / unique)
            or os.path.lexists(folder / MAPS / unique.with_suffix(".npy"))
        ):
            number += 1
            unique = name.with_name(f"{stem}-{number}.png")
        taken.add(seen_by_any_disk(unique))
        result[image] = unique
    return result
