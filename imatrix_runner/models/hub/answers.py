"""What a hub's answers may cost: a bound on what they unpack to, and a least rate for files.

huggingface_hub reads answers of the API whole, and files at whatever rate they come. Both are bounded here: a hook of its
session puts a stream of this module in the place of the answer's own.
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
"""Of one answer of the API, unpacked. A repository of 100,000 files is listed in 30 MB."""

_BLOCK = 1 << 18
_AUTOMATIC = 47  # zlib: gzip or zlib, whichever header there is


class Hurry(Protocol):
    """Counts the minutes in which a file hardly grew."""

    def slow_minute(self) -> None:
        """Raise when there were too many of them."""


_downloading: ContextVar[Hurry] = ContextVar("_downloading")


@contextmanager
def paced(hurry: Hurry) -> Iterator[None]:
    """Files that this thread fetches meanwhile must arrive at a least rate."""
    token = _downloading.set(hurry)
    try:
        yield
    finally:
        _downloading.reset(token)


def watch_session(*hooks: Callable[[httpx2.Response], None]) -> None:
    """Bound the answers of the library's session as it is now (it makes a new one after it was closed), and add ``hooks``."""
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
    hurry = _downloading.get(None)
    if hurry is not None and response.status_code in (200, 206) and not _is_api(response.request):
        response.stream = _File(response.stream, hurry)
        return
    encoding = response.headers.pop("Content-Encoding", "").strip().lower()
    response.stream = _Answer(response.stream, encoding, response.request.url)


class _File(httpx2.SyncByteStream):
    """A file's bytes. A minute that brings next to nothing ends the connection, and the library continues with another."""

    def __init__(self, stream: httpx2.SyncByteStream, hurry: Hurry) -> None:
        self._stream, self._hurry = stream, hurry

    def __iter__(self) -> Iterator[bytes]:
        pace = Pace()
        for block in self._stream:
            if pace.is_slow(len(block)):
                self._hurry.slow_minute()
                raise httpx2.ReadTimeout("hardly anything arrived in a minute")
            yield block

    def close(self) -> None:
        self._stream.close()


class _Answer(httpx2.SyncByteStream):
    """An answer's bytes, unpacked, and never more of them than :data:`MOST_BYTES`."""

    def __init__(self, stream: httpx2.SyncByteStream, encoding: str, url: httpx2.URL) -> None:
        self._stream, self._encoding, self._url = stream, encoding, url

    def __iter__(self) -> Iterator[bytes]:
        left = MOST_BYTES
        for block in self._unpacked():
            left -= len(block)
            if left < 0:
                raise DownloadError(
                    f"{self._url.host} sends more than a hub does",
                    f"its answer to {self._url.path[:120]} unpacks to more than {human_bytes(MOST_BYTES)}",
                    "Check HF_ENDPOINT and your proxy with: imatrix-runner doctor",
                )
            yield block

    def _unpacked(self) -> Iterator[bytes]:
        if self._encoding in ("", "identity"):
            yield from self._stream
            return
        if self._encoding not in ("gzip", "x-gzip", "deflate"):
            raise httpx2.DecodingError(f"the answer is packed as {self._encoding[:40]!r}, which was not asked for")
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
