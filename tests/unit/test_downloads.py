"""Downloads from servers that drip, swell or stall: bounded in time and memory."""

from __future__ import annotations

import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from imatrix_runner import downloads
from imatrix_runner.downloads import DownloadAdvice, Fetcher
from imatrix_runner.errors import DownloadError
from imatrix_runner.signals import Stop

ADVICE = DownloadAdvice("Later.", "Check the network.", "It is missing.", "It is refused.")
Write = Callable[[bytes], object]


@contextmanager
def serving(send: Callable[[Write], None], **headers: str) -> Iterator[tuple[str, list[str]]]:
    """A server whose every answer's body is what ``send`` writes; its address, and the paths it was asked for."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(200)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            try:
                send(self.wfile.write)
            except OSError:
                return  # the client has left, which is the point

        def log_message(self, *args: object) -> None:
            """Silence."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/file", asked
        server.shutdown()


@pytest.fixture
def fetcher() -> Fetcher:
    return Fetcher(Stop(), ADVICE, lambda _url: {}, timeout_seconds=5.0, wait_seconds=0.0)


def drip(write: Write) -> None:
    for _ in range(1000):
        write(b".")
        time.sleep(0.02)


def test_a_file_that_drips_is_tried_three_times(fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PACE_SECONDS", 0.2)
    began = time.monotonic()
    with serving(drip) as (url, asked), pytest.raises(DownloadError, match="arrives too slowly") as caught:
        fetcher.file(url, "The archive", tmp_path / "part", size=1000, on_bytes=lambda _done: None)
    assert time.monotonic() - began < 10
    assert len(asked) == 3
    assert "60.00 KiB" in caught.value.why
    assert caught.value.exit_code == 4
    assert list(tmp_path.iterdir()) == []


def test_a_document_that_drips_has_a_time_in_all(fetcher: Fetcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "_DOCUMENT_SECONDS", 0.2)
    with serving(drip) as (url, asked), pytest.raises(DownloadError, match="arrives too slowly") as caught:
        fetcher.read(url, "The list", limit=1 << 20)
    assert "0.2 s" in caught.value.why
    assert len(asked) == 1


def test_a_slow_file_that_still_comes_is_waited_for(fetcher: Fetcher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(downloads, "PACE_SECONDS", 0.2)
    monkeypatch.setattr(downloads, "LEAST_BYTES", 1000)

    def crawl(write: Write) -> None:
        for _ in range(40):
            write(bytes(500))
            time.sleep(0.01)

    with serving(crawl) as (url, asked):
        fetcher.file(url, "The archive", tmp_path / "part", size=20_000, on_bytes=lambda _done: None)
    assert len(asked) == 1


def test_a_document_that_unpacks_to_gigabytes_is_given_up_before(fetcher: Fetcher) -> None:
    zeros = zlib.compressobj(wbits=31)
    packed = b"".join([*(zeros.compress(bytes(1 << 20)) for _ in range(256)), zeros.flush()])
    tracemalloc.start()
    try:
        with (
            serving(lambda write: write(packed), Content_Encoding="gzip") as (url, _),
            pytest.raises(DownloadError, match="larger than announced"),
        ):
            fetcher.read(url, "The list", limit=1 << 20)
        assert tracemalloc.get_traced_memory()[1] < 160 << 20
    finally:
        tracemalloc.stop()
