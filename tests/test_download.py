"""Downloads against a real server that misbehaves, and archives that do."""

from __future__ import annotations

import hashlib
import io
import os
import signal
import socket
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import Loopback

from simplenet_lib import download
from simplenet_lib.config import SimpleNetError
from simplenet_lib.download import MVTEC_CATEGORIES, download_mvtec, fetch

BODY = bytes(range(256)) * 4096  # 1 MiB


def sha(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


#: What is kept of file.bin when its download breaks off.
PART = f".file.bin.{sha(BODY)[:8]}.part"


def unused_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def press_ctrl_c() -> None:
    """Send the signal that Ctrl-C sends, to the thread that downloads."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def files_in(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def is_one_sentence(message: str) -> bool:
    return "\n" not in message and len(message) < 500 and "HTTPConnection" not in message


def test_fetch_gives_the_whole_file_and_only_once(loopback: Loopback, tmp_path: Path) -> None:
    loopback.answer = loopback.whole(BODY)
    path = tmp_path / "new" / "folder" / "file.bin"
    for _ in range(2):
        assert fetch(loopback.url, path, sha(BODY)[:8]) == path
    assert path.read_bytes() == BODY
    assert len(loopback.requests) == 1
    assert files_in(tmp_path) == ["new/folder/file.bin"]


def test_fetch_replaces_a_damaged_file(loopback: Loopback, tmp_path: Path) -> None:
    loopback.answer = loopback.whole(BODY)
    (tmp_path / "file.bin").write_bytes(BODY[:-1])
    fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY


@pytest.mark.parametrize(
    ("trouble", "words"),
    [
        ("refused", "refused"),
        ("unknown host", "nowhere.invalid"),
        ("403", "the server answered 403 Forbidden"),
        ("404", "the server answered 404 Not Found"),
        ("500", "the server answered 500 Internal Server Error"),
        ("silent from the start", "the server sent nothing for 0.3 s"),
        ("stalls in the middle", "the server sent nothing for 0.3 s"),
        ("closes in the middle", "broke off half-way"),
        ("closes in the middle of unknown length", f"incomplete or another file: {len(BODY) // 2}"),
        ("sends another file", "incomplete or another file"),
        ("no address", "no address"),
        ("malformed host", "label empty"),
    ],
)
def test_fetch_keeps_a_part_at_most_and_a_second_call_succeeds(
    loopback: Loopback, tmp_path: Path, trouble: str, words: str
) -> None:
    url = {
        "refused": f"http://127.0.0.1:{unused_port()}/f",
        "unknown host": "http://nowhere.invalid/f",
        "no address": "no address",
        "malformed host": "http://a..b/f",
    }.get(trouble, f"{loopback.url}/f")
    loopback.answer = {
        "403": loopback.status(403),
        "500": loopback.status(500),
        "silent from the start": lambda handler: loopback.closing.wait(),
        "stalls in the middle": loopback.half(BODY, then=loopback.closing.wait),
        "closes in the middle": loopback.half(BODY),
        "closes in the middle of unknown length": loopback.half(BODY, length=False),
        "sends another file": loopback.whole(BODY[::-1]),
    }.get(trouble, loopback.status(404))

    with pytest.raises(SimpleNetError) as caught:
        fetch(url, tmp_path / "file.bin", sha(BODY), timeout=0.3)
    message = str(caught.value)
    assert words in message and url in message and is_one_sentence(message), message
    breaks = trouble in ("stalls in the middle", "closes in the middle")
    assert ("goes on from there" in message) == breaks
    assert files_in(tmp_path) == ([PART] if breaks else [])

    loopback.answer = loopback.whole(BODY)  # a server that knows no ranges
    fetch(f"{loopback.url}/f", tmp_path / "file.bin", sha(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert files_in(tmp_path) == ["file.bin"]


def test_a_download_goes_on_where_it_broke(loopback: Loopback, tmp_path: Path) -> None:
    third = len(BODY) // 3
    loopback.answer = loopback.rest(BODY, send=third)
    for _ in range(2):
        with pytest.raises(SimpleNetError, match="goes on from there"):
            fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    got = (tmp_path / PART).stat().st_size
    assert 0 < got <= 2 * third and (tmp_path / PART).read_bytes() == BODY[:got]
    loopback.answer = loopback.rest(BODY)
    fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert loopback.ranges[0] is None and loopback.ranges[-1] == f"bytes={got}-"
    assert files_in(tmp_path) == ["file.bin"]


def test_what_was_killed_before_its_name_was_given_is_not_fetched_again(
    loopback: Loopback, tmp_path: Path
) -> None:
    (tmp_path / PART).write_bytes(BODY)
    loopback.answer = loopback.rest(BODY)
    fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    assert files_in(tmp_path) == ["file.bin"]
    assert len(loopback.requests) == 1  # answered with 416


@pytest.mark.parametrize("part", [b"of another file", BODY + b"too long", b""])
def test_a_part_of_another_file_is_thrown_away(
    loopback: Loopback, tmp_path: Path, part: bytes
) -> None:
    (tmp_path / PART).write_bytes(part)
    loopback.answer = loopback.rest(BODY)
    fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert files_in(tmp_path) == ["file.bin"]


def test_two_downloads_at_once_do_not_spoil_each_other(loopback: Loopback, tmp_path: Path) -> None:
    loopback.answer = loopback.rest(BODY)
    both = [
        threading.Thread(target=fetch, args=(loopback.url, tmp_path / "file.bin", sha(BODY)))
        for _ in range(2)
    ]
    for thread in both:
        thread.start()
    for thread in both:
        thread.join()
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert files_in(tmp_path) == ["file.bin"]
    assert len(loopback.requests) == 1  # the second waits, and finds the first one's


def test_after_ctrl_c_the_download_goes_on_from_there(loopback: Loopback, tmp_path: Path) -> None:
    def interrupt() -> None:
        while not (tmp_path / PART).exists() or not (tmp_path / PART).stat().st_size:
            time.sleep(0.001)
        press_ctrl_c()
        loopback.closing.wait()

    loopback.answer = loopback.rest(BODY, send=len(BODY) // 2, then=interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    assert files_in(tmp_path) == [PART]

    loopback.answer = loopback.rest(BODY)
    fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    assert (tmp_path / "file.bin").read_bytes() == BODY
    assert loopback.ranges[-1] is not None
    assert files_in(tmp_path) == ["file.bin"]


def test_full_disk_leaves_nothing(loopback: Loopback, tmp_path: Path) -> None:
    """A limit on the size of files fails a write as a full disk does."""
    resource = pytest.importorskip("resource")
    loopback.answer = loopback.whole(BODY)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(BODY) // 2, before[1]))
    try:
        with pytest.raises(SimpleNetError) as caught:
            fetch(loopback.url, tmp_path / "file.bin", sha(BODY))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    message = str(caught.value)
    assert "file.bin: could not be written (" in message and is_one_sentence(message)
    assert list(tmp_path.iterdir()) == []


def test_folder_that_cannot_be_written(loopback: Loopback, tmp_path: Path) -> None:
    (tmp_path / "occupied").write_bytes(b"a file where a folder should be")
    with pytest.raises(SimpleNetError, match=r"file\.bin: could not be written"):
        fetch(loopback.url, tmp_path / "occupied" / "file.bin", sha(BODY))
    assert loopback.requests == []


def test_importing_download_does_not_import_torch() -> None:
    code = "import sys, simplenet_lib.download; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# --- MVTec AD ---------------------------------------------------------------------------


def regular(name: str, content: bytes = b"image") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    return info, content


def special(name: str, kind: bytes, target: str = "") -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info, b""


def layout(category: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    return [
        special(category, tarfile.DIRTYPE),
        regular(f"{category}/train/good/000.png", f"{category} train".encode()),
        regular(f"{category}/test/broken/000.png", f"{category} test".encode()),
        regular(f"{category}/ground_truth/broken/000_mask.png", b"mask"),
    ]


def pack(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:xz") as tar:
        for info, content in members:
            info.mode = 0o755
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


ARCHIVE = pack(regular("license.txt"), *layout("bottle"), *layout("cable"), *layout("grid"))
CABLE = [
    "cable/ground_truth/broken/000_mask.png",
    "cable/test/broken/000.png",
    "cable/train/good/000.png",
]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for the data, on a disk that need not have room for the real archive."""
    monkeypatch.setattr(download, "MVTEC_BYTES", 10**6)
    monkeypatch.setattr(download, "CATEGORY_BYTES", 10**6)
    yield tmp_path / "data" / "mvtec"
    assert [path.name for path in tmp_path.iterdir()] in ([], ["data"])  # nothing outside


def get(loopback: Loopback, root: Path, *categories: str, archive: bytes = ARCHIVE) -> list[Path]:
    return download_mvtec(root, categories, f"{loopback.url}/a.tar.xz", sha(archive))


def test_installs_the_asked_categories_only(loopback: Loopback, root: Path) -> None:
    loopback.answer = loopback.whole(ARCHIVE)
    assert get(loopback, root, "cable") == [root / "cable"]
    assert files_in(root) == CABLE
    assert (root / "cable/test/broken/000.png").read_bytes() == b"cable test"


def test_installs_all_15_by_default(loopback: Loopback, root: Path) -> None:
    archive = pack(*(member for name in MVTEC_CATEGORIES for member in layout(name)))
    loopback.answer = loopback.whole(archive)
    paths = download_mvtec(root, url=loopback.url, sha256=sha(archive))
    assert paths == [root / name for name in MVTEC_CATEGORIES] and len(paths) == 15
    assert len(files_in(root)) == 45


def test_existing_category_is_untouched_and_reported(
    loopback: Loopback, root: Path, caplog: pytest.LogCaptureFixture
) -> None:
    loopback.answer = loopback.whole(ARCHIVE)
    (root / "bottle").mkdir(parents=True)
    (root / "bottle" / "mine.png").write_bytes(b"mine")
    assert get(loopback, root, "bottle", "cable") == [root / "bottle", root / "cable"]
    assert files_in(root) == ["bottle/mine.png", *CABLE]
    assert f"{root / 'bottle'}: exists, left untouched" in caplog.text
    assert get(loopback, root, "bottle", "cable") == [root / "bottle", root / "cable"]
    assert len(loopback.requests) == 1


def test_archive_placed_by_the_user_is_used_and_kept(loopback: Loopback, root: Path) -> None:
    root.mkdir(parents=True)
    (root / download.MVTEC_FILE).write_bytes(ARCHIVE)
    get(loopback, root, "cable")
    assert files_in(root) == [*CABLE, download.MVTEC_FILE]
    assert loopback.requests == []


def test_unknown_category_names_the_known_ones(loopback: Loopback, root: Path) -> None:
    with pytest.raises(SimpleNetError, match="no category 'bottel'") as caught:
        get(loopback, root, "cable", "bottel")
    assert all(name in str(caught.value) for name in MVTEC_CATEGORIES)
    assert loopback.requests == [] and not root.exists()


def test_full_disk_is_noticed_beforehand(
    loopback: Loopback, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MVTEC_BYTES", 10**18)
    with pytest.raises(SimpleNetError, match=r"GB free, but archive and images need 1000000000"):
        get(loopback, root, "cable")
    assert loopback.requests == []


def test_moved_address_says_what_to_do(loopback: Loopback, root: Path) -> None:
    with pytest.raises(SimpleNetError, match="404") as caught:
        get(loopback, root, "cable")
    message = str(caught.value)
    assert download.MVTEC_PAGE in message and str(root) in message and is_one_sentence(message)
    assert files_in(root) == []


@pytest.mark.parametrize(
    ("evil", "words"),
    [
        (regular("cable/../../evil.png"), "points out of its folder"),
        (regular("../evil.png"), "points out of its folder"),
        (regular("/evil.png"), "points out of its folder"),
        (special("cable/link", tarfile.SYMTYPE, "/etc"), "no file or folder"),
        (special("cable/link", tarfile.LNKTYPE, "cable/train/good/000.png"), "no file or folder"),
        (special("cable/pipe", tarfile.FIFOTYPE), "no file or folder"),
        (special("cable/device", tarfile.CHRTYPE), "no file or folder"),
        (special("grid/link", tarfile.SYMTYPE, "/etc"), "no file or folder"),  # not asked for
        (regular("cable/bomb.png", bytes(2000)), "not MVTec AD"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_evil_archive_is_refused_whole(
    loopback: Loopback,
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    evil: tuple[tarfile.TarInfo, bytes],
    words: str,
    first: bool,
) -> None:
    monkeypatch.setattr(download, "MAX_UNPACKED_BYTES", 1000)
    good = layout("bottle") + layout("cable")
    archive = pack(evil, *good) if first else pack(*good, evil)
    loopback.answer = loopback.whole(archive)
    with pytest.raises(SimpleNetError, match=words) as caught:
        get(loopback, root, "bottle", "cable", archive=archive)
    assert is_one_sentence(str(caught.value))
    assert files_in(root) == [f".{download.MVTEC_FILE}"]

    loopback.answer = loopback.whole(ARCHIVE)
    get(loopback, root, "cable")
    assert files_in(root) == CABLE


def test_archive_with_too_many_members_is_refused(
    loopback: Loopback, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "MAX_MEMBERS", 12)  # ARCHIVE has 13
    loopback.answer = loopback.whole(ARCHIVE)
    with pytest.raises(SimpleNetError, match="more than 12 members"):
        get(loopback, root, "bottle")
    assert files_in(root) == [f".{download.MVTEC_FILE}"]


@pytest.mark.parametrize(
    ("archive", "words"),
    [
        (b"no archive at all", "could not be unpacked"),
        (ARCHIVE[: len(ARCHIVE) // 2], "could not be unpacked"),
        (pack(*layout("bottle")), "holds no cable/train/good"),
        (pack(*layout("bottle"), regular("cable")), "holds no cable/train/good"),
    ],
)
def test_other_archive_is_refused_whole(
    loopback: Loopback, root: Path, archive: bytes, words: str
) -> None:
    loopback.answer = loopback.whole(archive)
    with pytest.raises(SimpleNetError, match=words):
        get(loopback, root, "bottle", "cable", archive=archive)
    assert files_in(root) == [f".{download.MVTEC_FILE}"]


def test_interrupted_unpacking_leaves_no_half_and_keeps_the_archive(
    loopback: Loopback, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loopback.answer = loopback.whole(ARCHIVE)
    extract = tarfile.TarFile.extract

    def interrupted(tar: tarfile.TarFile, member: tarfile.TarInfo, *args: str, **kw: str) -> None:
        if member.name == "cable/test/broken/000.png":
            press_ctrl_c()
        extract(tar, member, *args, **kw)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", interrupted)
        with pytest.raises(KeyboardInterrupt):
            get(loopback, root, "bottle", "cable")
    assert os.listdir(root) == [f".{download.MVTEC_FILE}"]

    get(loopback, root, "cable")
    assert files_in(root) == CABLE
    assert len(loopback.requests) == 1


def test_interrupted_download_leaves_no_category(loopback: Loopback, root: Path) -> None:
    loopback.answer = loopback.half(ARCHIVE, then=press_ctrl_c)
    with pytest.raises(KeyboardInterrupt):
        get(loopback, root, "cable")
    assert not (root / "cable").exists() and not (root / f".{download.MVTEC_FILE}").exists()
    loopback.answer = loopback.whole(ARCHIVE)
    get(loopback, root, "cable")
    assert files_in(root) == CABLE
