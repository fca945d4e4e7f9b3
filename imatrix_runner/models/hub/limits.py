"""Limits for a hub's answers: a bound on their unpacked size, and a minimum rate for files.

huggingface_hub reads answers of the API whole, and files at any rate. Both are bounded here: a hook of its session replaces the
stream of each answer with one of this module.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Protocol

import httpx2

from imatrix_runner.downloads import Pace
from imatrix_runner.errors import DownloadError
from imatrix_runner.files import human_bytes

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_BYTES = 32 << 20
"""Upper bound, in bytes, for one answer of the API, unpacked. The listing of a repository of 100,000 files has 30 MB."""

_BLOCK = 1 << 18
_AUTOMATIC = 47  # zlib: detect gzip or zlib by the header


class PaceGuard(Protocol):
    """Counts the minutes in which a file hardly grew."""

    def slow_minute(self) -> None:
        """Called for each such minute; raises if there were too many."""


_downloading: ContextVar[PaceGuard] = ContextVar("_downloading")


@contextmanager
def paced(pace_guard: PaceGuard) -> Iterator[None]:
    """While this context is active, files fetched by this thread must arrive at a minimum rate."""
    token = _downloading.set(pace_guard)
    try:
        yield
    finally:
        _downloading.reset(token)


def watch_session(*hooks: Callable[[httpx2.Response], None]) -> None:
    """Bound the answers of the library's current session (it creates a new one after a close), and add ``hooks``."""
    from huggingface_hub import get_session

    session = get_session()
    requests, responses = session.event_hooks["request"], session.event_hooks["response"]
    requests += [hook for hook in (_ask_for_gzip,) if hook not in requests]
    responses += [hook for hook in (*hooks, _bound) if hook not in responses]


def _is_api(request: httpx2.Request) -> bool:
    return "/api/" in request.url.path


def _ask_for_gzip(request: httpx2.Request) -> None:
    if _is_api(request):
        request.headers["Accept-Encoding"] = "gzip"


def _bound(response: httpx2.Response) -> None:
    if response.request.method == "HEAD" or not isinstance(response.stream, httpx2.SyncByteStream):
        return
    pace_guard = _downloading.get(None)
    if pace_guard is not None and response.status_code in (200, 206) and not _is_api(response.request):
        response.stream = _File(response.stream, pace_guard)
        return
    encoding = response.headers.pop("Content-Encoding", "").strip().lower()
    response.stream = _Answer(response.stream, encoding, response.request.url)


class _File(httpx2.SyncByteStream):
    """A file's bytes. A minute in which hardly any arrive ends the connection, and the library continues with another."""

    def __init__(self, stream: httpx2.SyncByteStream, pace_guard: PaceGuard) -> None:
        self._stream, self._pace_guard = stream, pace_guard

    def __iter__(self) -> Iterator[bytes]:
        pace = Pace()
        for block in self._stream:
            if pace.is_slow(len(block)):
                self._pace_guard.slow_minute()
                raise httpx2.ReadTimeout("hardly anything arrived in a minute")
            yield block

    def close(self) -> None:
        self._stream.close()


class _Answer(httpx2.SyncByteStream):
    """An answer's bytes, unpacked, at most :data:`MOST_BYTES`."""

    def __init__(self, stream: httpx2.SyncByteStream, encoding: str, url: httpx2.URL) -> None:
        self._stream, self._encoding, self._url = stream, encoding, url

    def __iter__(self) -> Iterator[bytes]:
        left = MOST_BYTES
        for block in self._unpacked():
            left -= len(block)
            if left < 0:
                raise DownloadError(
                    f"{self._url.host} sends too long an answer",
                    f"its answer to {self._url.path[:120]} unpacks to more than {human_bytes(MOST_BYTES)}",
                    "Check HF_ENDPOINT and your proxy with: imatrix-runner doctor",
                )
            yield block

    def _unpacked(self) -> Iterator[bytes]:
        if self._encoding in ("", "identity"):
            yield from self._stream
            return
        if self._encoding not in ("gzip", "x-gzip", "deflate"):
            raise httpx2.DecodingError(f"the answer is encoded as {self._encoding[:40]!r}, which was not requested")
        unpacker = zlib.decompressobj(_AUTOMATIC)
        try:
            for packed in self._stream:
                while packed:
                    yield unpacker.decompress(packed, _BLOCK)
                    packed = unpacker.unconsumed_tail
            yield unpacker.flush()
        except zlib.error as error:
            raise httpx2.DecodingError(str(error)) from error

    def close(self) -> None:
        self._stream.close()
