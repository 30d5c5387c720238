"""Fixtures that several test modules share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import settings
from tqdm import tqdm

from simplenet_lib.config import SimpleNetError

# `make stress` asks for the other one. A failing example is printed; none is kept on disk.
settings.register_profile("usual", max_examples=150, deadline=None, database=None)
settings.register_profile("stress", max_examples=2000, deadline=None, database=None)
settings.load_profile("usual")

# A shell that starts the tests in the background has them ignore Ctrl-C; some press it.
signal.signal(signal.SIGINT, signal.default_int_handler)


class Loopback:
    """A real HTTP server on 127.0.0.1 whose answers a test sets, well behaved or not."""

    def __init__(self) -> None:
        self.answer: Callable[[BaseHTTPRequestHandler], None] = self.status(404)
        self.requests: list[str] = []
        self.ranges: list[str | None] = []
        self.closing = threading.Event()
        loopback = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                loopback.requests.append(self.path)
                loopback.ranges.append(self.headers["Range"])
                loopback.answer(self)

            def log_message(self, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def status(self, code: int) -> Callable[[BaseHTTPRequestHandler], None]:
        """Answer with an HTTP error."""
        return lambda handler: handler.send_error(code)

    def whole(self, body: bytes) -> Callable[[BaseHTTPRequestHandler], None]:
        """Answer as a server should."""
        return self.half(body, send=len(body))

    def half(
        self,
        body: bytes,
        *,
        send: int | None = None,
        length: bool = True,
        then: Callable[[], object] = lambda: None,
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        """Promise ``body`` but send only its first bytes, do something, and close."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(200)
            if length:
                handler.send_header("Content-Length", str(len(body)))
            handler.end_headers()
            handler.wfile.write(body[: len(body) // 2 if send is None else send])
            handler.wfile.flush()
            then()

        return answer

    def rest(
        self, body: bytes, *, send: int | None = None, then: Callable[[], object] = lambda: None
    ) -> Callable[[BaseHTTPRequestHandler], None]:
        """Answer from where the client asks, with at most ``send`` bytes, and do something."""

        def answer(handler: BaseHTTPRequestHandler) -> None:
            start = int((handler.headers["Range"] or "bytes=0-")[6:-1])
            if start >= len(body):
                handler.send_error(416)
                return
            handler.send_response(206 if start else 200)
            handler.send_header("Content-Length", str(len(body) - start))
            handler.end_headers()
            handler.wfile.write(body[start : None if send is None else start + send])
            handler.wfile.flush()
            then()

        return answer

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture
def loopback(monkeypatch: pytest.MonkeyPatch) -> Iterator[Loopback]:
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    # A Ctrl-C can strike while tqdm takes its lock, which then stays taken. That harms no command,
    # for the program ends; but here the next test's threads would wait for it for ever.
    tqdm.set_lock(threading.RLock())
    server = Loopback()
    yield server
    server.close()


@pytest.fixture(scope="session")
def pretrained():  # type: ignore[no-untyped-def]  # its type would import torch for every test
    """ResNet-50's pretrained weights. Without them tests skip, but fail in CI."""
    from simplenet_lib.weights import find_weights

    try:
        return find_weights("resnet50")
    except SimpleNetError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Random weights under resnet18's name, a feature cache of our own, and one thread."""
    import torch  # not for every test
    from torchvision.models import resnet18

    folder = tmp_path_factory.mktemp("surroundings")
    torch.manual_seed(0)
    torch.save(resnet18().state_dict(), folder / "resnet18-f37072fd.pth")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SIMPLENET_WEIGHTS", str(folder))
        patch.setenv("SIMPLENET_CACHE", str(folder / "cache"))
        patch.setenv("OMP_NUM_THREADS", "1")
        patch.setenv("PYTHONPATH", str(Path(__file__).parent.parent))
        yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def book(tmp_path_factory: pytest.TempPathFactory, pretrained: object) -> Path:
    """The folder of the book's pages, built anew with warnings as errors, as `make book` does."""
    root = Path(__file__).parent.parent
    if not (root / "node_modules" / "mathjax").is_dir():
        message = "node_modules is missing: `make test` installs it, or `npm ci`"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    output = tmp_path_factory.mktemp("book")
    pages = output / "_build" / "html"
    render = [str(Path(sys.executable).parent / "jupyter-book"), "build", "--warningiserror"]
    render += ["--quiet", "--path-output", str(output), str(root)]
    for command in (render, [sys.executable, str(root / "live" / "build.py"), str(pages)]):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return pages
