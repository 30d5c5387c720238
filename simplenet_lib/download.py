"""Fetch files over HTTP, whole and verified, and unpack MVTec AD.

Nothing is visible under its final name before it is whole. A download that breaks off
leaves a hidden part, from which the next one goes on; an unpacking leaves nothing.
"""

from __future__ import annotations

import hashlib
import logging
import lzma
import os
import shutil
import tarfile
import tempfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import requests
from filelock import FileLock
from tqdm import tqdm

from simplenet_lib.config import SimpleNetError

TIMEOUT_SECONDS = 30.0

#: The official archive of MVTec AD (Bergmann et al., CVPR 2019), CC BY-NC-SA 4.0.
#: MVTec has moved it several times; its checksum has stayed the same.
MVTEC_URL = (
    "https://www.mydrive.ch/shares/150996/b52ecdcbf521176e9db9c731f2304b27/"
    "download/420938113-1629960298/mvtec_anomaly_detection.tar.xz"
)
MVTEC_SHA256 = "cf4313b13603bec67abb49ca959488f7eedce2a9f7795ec54446c649ac98cd3d"
MVTEC_PAGE = "https://www.mvtec.com/company/research/datasets/mvtec-ad/downloads"
MVTEC_FILE = "mvtec_anomaly_detection.tar.xz"
MVTEC_CATEGORIES = (
    "bottle",
    "cable",
    "capsule",
    "carpet",
    "grid",
    "hazelnut",
    "leather",
    "metal_nut",
    "pill",
    "screw",
    "tile",
    "toothbrush",
    "transistor",
    "wood",
    "zipper",
)
#: Size of the archive, and of its images too: PNG files do not compress further.
MVTEC_BYTES = 5_300_000_000
#: Upper bound of one unpacked category (the largest, carpet, has 0.7 GB).
CATEGORY_BYTES = 800_000_000

#: An archive that declares more than this is not MVTec AD (about 6,700 files, 5 GB).
MAX_MEMBERS = 20_000
MAX_UNPACKED_BYTES = 10_000_000_000


def sha256_of(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, read in blocks.

    Examples
    --------
    >>> (folder / "empty").touch()
    >>> sha256_of(folder / "empty")[:16]
    'e3b0c44298fc1c14'
    """
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch(url: str, path: Path, sha256: str, *, timeout: float = TIMEOUT_SECONDS) -> Path:
    """Download ``url`` to ``path`` unless a verified copy is already there.

    Parameters
    ----------
    url : str
        Address of the file.
    path : Path
        Where the file shall lie. Its folder is created.
    sha256 : str
        Expected SHA-256 in hexadecimal, or its first digits (torchvision puts
        eight of them into its file names).
    timeout : float
        Seconds without a byte after which the server counts as stalled.

    Raises
    ------
    SimpleNetError
        If the server cannot be reached, answers with an error, stalls, or
        sends bytes with another checksum; or if ``path`` cannot be written.

    Examples
    --------
    >>> _ = (folder / "abc.txt").write_text("abc")
    >>> fetch("https://example.org/abc.txt", folder / "abc.txt", "ba7816bf").name  # it is there
    'abc.txt'
    """
    partial = path.with_name(f".{path.name}.{sha256[:8]}.part")
    lock = partial.with_suffix(".lock")
    try:
        if path.is_file() and sha256_of(path).startswith(sha256):
            return path
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock):  # two that append to one file would spoil it
                if not (path.is_file() and sha256_of(path).startswith(sha256)):
                    _download(url, partial, path, sha256, timeout)
        finally:
            lock.unlink(missing_ok=True)  # not every system removes it
    except (requests.RequestException, ValueError) as error:  # ValueError: a malformed host
        kept = " The same call goes on from there." if partial.exists() else ""
        raise SimpleNetError(
            f"{url}: could not be downloaded: {_reason(error, timeout)}.{kept}"
        ) from error
    except OSError as error:
        if partial.is_file():
            partial.unlink()  # a full disk needs the room
        raise SimpleNetError(f"{path}: could not be written ({error}).") from error
    return path


def _download(url: str, partial: Path, path: Path, sha256: str, timeout: float) -> None:
    """Download to ``partial``, from where an earlier download broke off; name it ``path``."""
    start = partial.stat().st_size if partial.exists() else 0
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    with requests.get(url, headers=headers, stream=True, timeout=timeout) as response:
        if response.status_code != requests.codes.requested_range_not_satisfiable:
            response.raise_for_status()
            if response.status_code != requests.codes.partial_content:
                start = 0  # the server sends the whole file, whatever was asked
            total = start + int(response.headers.get("Content-Length", 0))
            # The delay: a server that cannot be reached should leave no empty bar behind.
            with (
                partial.open("ab" if start else "wb") as file,
                tqdm(
                    total=total, initial=start, unit="B", unit_scale=True, desc=path.name, delay=1
                ) as bar,
            ):
                for block in response.iter_content(1 << 18):
                    file.write(block)
                    bar.update(len(block))
    found, size = sha256_of(partial), partial.stat().st_size
    if found.startswith(sha256):
        os.replace(partial, path)
        return
    partial.unlink()
    if start:  # it may be the part of another file
        _download(url, partial, path, sha256, timeout)
        return
    raise SimpleNetError(
        f"{url}: the download is incomplete or another file: {size} bytes with SHA-256 {found},"
        f" expected {sha256}. Nothing was kept."
    )


def _reason(error: Exception, timeout: float) -> str:
    """Say in a few words what requests says in several nested exceptions."""
    cause = error.args[0] if error.args else error
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return f"the server answered {error.response.status_code} {error.response.reason}"
    # Within the body, requests reports a stall as a ConnectionError.
    if isinstance(error, requests.Timeout) or "Read timed out" in str(cause):
        return f"the server sent nothing for {timeout:g} s"
    if isinstance(error, requests.exceptions.ChunkedEncodingError):
        return "the connection broke off half-way"
    # urllib3: "HTTPSConnection(host='a', port=443): Failed to resolve 'a' (...)"
    return str(getattr(cause, "reason", cause)).split("): ", 1)[-1].rstrip(".")


def download_mvtec(
    root: Path,
    categories: Sequence[str] | None = None,
    url: str = MVTEC_URL,
    sha256: str = MVTEC_SHA256,
) -> list[Path]:
    """Download MVTec AD and unpack the categories you ask for into ``root``.

    The archive holds all 15 categories in 5.3 GB. It is downloaded under a name
    with a leading dot and removed after unpacking; when unpacking fails it
    stays, so that the next call need not download it again. An archive that
    you have put into ``root`` yourself is used instead, and not removed.

    Parameters
    ----------
    root : Path
        Folder that receives one folder for each category.
    categories : sequence of str, optional
        Names out of ``MVTEC_CATEGORIES``. Defaults to all. A category whose
        folder exists is left untouched; a log message says so.
    url, sha256 : str
        Address and checksum of the archive.

    Returns
    -------
    list of Path
        The folders of the categories, in the order asked for.

    Raises
    ------
    SimpleNetError
        If a category is unknown, the disk too full, the download fails, or
        the archive is not what it should be. No category is then half there.

    Examples
    --------
    >>> (folder / "bottle").mkdir()
    >>> [path.name for path in download_mvtec(folder, ["bottle"])]  # it is there
    ['bottle']
    """
    names = list(dict.fromkeys(MVTEC_CATEGORIES if categories is None else categories))
    unknown = [name for name in names if name not in MVTEC_CATEGORIES]
    if unknown:
        raise SimpleNetError(
            f"MVTec AD has no category '{unknown[0]}'. Known: {', '.join(MVTEC_CATEGORIES)}."
        )
    wanted = [name for name in names if not (root / name).exists()]
    for name in names:
        if name not in wanted:
            logging.getLogger(__name__).warning("%s: exists, left untouched.", root / name)
    if not wanted:
        return [root / name for name in names]

    archive = root / MVTEC_FILE
    placed_by_user = archive.exists()
    if not placed_by_user:
        archive = root / f".{MVTEC_FILE}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(root).free
    except OSError as error:
        raise SimpleNetError(f"{root}: not a folder to write to ({error}).") from error
    needed = min(len(wanted) * CATEGORY_BYTES, MVTEC_BYTES) + (
        0 if archive.exists() else MVTEC_BYTES
    )
    if free < needed:
        raise SimpleNetError(
            f"{root}: {free / 1e9:.1f} GB free, but archive and images need {needed / 1e9:.1f} GB. "
            "Free some space or choose another folder."
        )
    try:
        fetch(url, archive, sha256)
    except SimpleNetError as error:
        raise SimpleNetError(
            f"{error} If the address has moved, get {MVTEC_FILE} from {MVTEC_PAGE}, "
            f"put it into {root} and run this again."
        ) from error
    _unpack(archive, root, wanted)
    if not placed_by_user:
        archive.unlink()
    return [root / name for name in names]


def _unpack(archive: Path, root: Path, categories: list[str]) -> None:
    """Unpack categories beside their final place, then rename each into it.

    The archive is read once, as a stream: each pass over it takes minutes.
    """
    count = size = 0
    try:
        with (
            tempfile.TemporaryDirectory(dir=root, prefix=".unpack-") as folder,
            archive.open("rb") as file,
            lzma.open(file) as plain,  # tarfile's own "r|xz" overlooks a truncated archive
            tarfile.open(fileobj=plain, mode="r|") as tar,
            tqdm(total=archive.stat().st_size, desc="Unpacking", unit="B", unit_scale=True) as bar,
        ):
            for member in tar:
                bar.update(file.tell() - bar.n)
                path = PurePosixPath(member.name)
                count, size = count + 1, size + member.size
                if path.is_absolute() or ".." in path.parts:
                    raise SimpleNetError(f"{archive}: '{member.name}' points out of its folder.")
                if not (member.isfile() or member.isdir()):
                    raise SimpleNetError(f"{archive}: '{member.name}' is no file or folder.")
                if count > MAX_MEMBERS or size > MAX_UNPACKED_BYTES:
                    raise SimpleNetError(
                        f"{archive}: more than {MAX_MEMBERS} members or "
                        f"{MAX_UNPACKED_BYTES / 1e9:g} GB; this is not MVTec AD."
                    )
                if path.parts and path.parts[0] in categories:
                    tar.extract(member, folder, filter="data")
            for name in categories:
                if not (Path(folder) / name / "train" / "good").is_dir():
                    raise SimpleNetError(f"{archive}: holds no {name}/train/good.")
            for name in categories:
                os.rename(Path(folder) / name, root / name)
    except (tarfile.TarError, lzma.LZMAError, EOFError) as error:
        raise SimpleNetError(f"{archive}: could not be unpacked ({error}).") from error
    except OSError as error:
        raise SimpleNetError(f"{root}: could not be written ({error}).") from error
