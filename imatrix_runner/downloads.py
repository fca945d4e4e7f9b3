"""Downloads over HTTP: bounded in size, with progress and retries, and an error message for each kind of failure."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import tenacity

from imatrix_runner.errors import DownloadError, from_os_error
from imatrix_runner.files import human_bytes, sync
from imatrix_runner.signals import Stop
from imatrix_runner.untrusted import split_url, whole_number

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")
OnBytes = Callable[[int, int | None], None]
"""Called with the bytes received so far and the total that the server announced, or None; may raise to stop."""

_ATTEMPTS = 3
_DOCUMENT_SECONDS = 120.0
"""Time limit for a whole small document."""

PACE_SECONDS = 60.0
LEAST_BYTES = 60 << 10
"""Bytes that a connection must deliver in every :data:`PACE_SECONDS`: 1 KiB/s, a fifth of a telephone modem's rate."""


class Pace:
    """Detects a connection too slow to ever deliver a file: one byte a second would satisfy every other timeout."""

    def __init__(self) -> None:
        self._began, self._bytes = time.monotonic(), 0

    def is_slow(self, count: int) -> bool:
        """Add ``count`` received bytes; return whether a whole period delivered less than :data:`LEAST_BYTES`."""
        self._bytes += count
        now = time.monotonic()
        if now - self._began < PACE_SECONDS:
            return False
        slow = self._bytes < LEAST_BYTES
        self._began, self._bytes = now, 0
        return slow


class _TryAgain(Exception):
    """A failure that may be temporary; carries the error to show after the last attempt."""

    def __init__(self, error: DownloadError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class DownloadAdvice:
    """The remedies of error messages, a sentence each. ``missing``: for 404; ``refused``: for 403 and 429."""

    later: str
    unreachable: str
    missing: str
    refused: str


@dataclass(frozen=True)
class Arrived:
    """A finished download. ``sha256`` is hex; ``content_type`` is what the server sent, or empty."""

    sha256: str
    n_bytes: int
    content_type: str


@dataclass(frozen=True)
class Fetcher:
    """Downloads by URL. ``headers`` returns a request's headers for its URL; ``wait_seconds`` is the pause before the second
    attempt and doubles."""

    stop: Stop
    advice: DownloadAdvice
    headers: Callable[[str], Mapping[str, str]]
    timeout_seconds: float = 30.0
    wait_seconds: float = 1.0

    def read(self, url: str, what: str, *, limit: int) -> bytes:
        """Return a small document of at most ``limit`` bytes."""
        parts: list[bytes] = []

        def attempt() -> None:
            parts.clear()
            until = time.monotonic() + _DOCUMENT_SECONDS

            def keep(block: bytes, _total: int | None) -> None:
                if time.monotonic() > until:
                    raise _too_slow(what, f"it was not complete after {_DOCUMENT_SECONDS:g} s")
                parts.append(block)

            self._stream(url, what, limit, keep, self._longer(what, limit))

        self._persist(attempt)
        return b"".join(parts)

    def file(self, url: str, what: str, part: Path, *, size: int, on_bytes: Callable[[int], None]) -> str:
        """Download exactly ``size`` bytes into ``part``; return their SHA-256 as hex. ``part`` is removed on any failure."""

        def attempt() -> Arrived:
            arrived = self._once(url, what, part, size, lambda done, _total: on_bytes(done), self._longer(what, size))
            if arrived.n_bytes != size:
                raise _TryAgain(_cut(what, f"{arrived.n_bytes} of {size} bytes arrived"))
            return arrived

        return self._into(part, what, attempt).sha256

    def up_to(self, url: str, what: str, part: Path, *, limit: int, on_bytes: OnBytes) -> Arrived:
        """Download a file of unknown length, but at most ``limit`` bytes, into ``part``, which is removed on any failure.

        A file that announces more is refused at its first block.
        """
        large = DownloadError(
            f"{what} is too large", f"the server offers more than the limit of {human_bytes(limit)}", self.advice.later
        )

        def heed(done: int, total: int | None) -> None:
            if total is not None and total > limit:
                raise large
            on_bytes(done, total)

        return self._into(part, what, lambda: self._once(url, what, part, limit, heed, large))

    def _into(self, part: Path, what: str, attempt: Callable[[], Arrived]) -> Arrived:
        try:
            return self._persist(attempt)
        except OSError as error:
            part.unlink(missing_ok=True)
            raise from_os_error(error, f"downloading {what}", part) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _once(self, url: str, what: str, part: Path, limit: int, on_bytes: OnBytes, too_large: DownloadError) -> Arrived:
        digest = hashlib.sha256()
        done = 0
        with part.open("wb") as handle:

            def write(block: bytes, total: int | None) -> None:
                nonlocal done
                handle.write(block)
                digest.update(block)
                done += len(block)
                on_bytes(done, total)

            content_type = self._stream(url, what, limit, write, too_large)
            handle.flush()
            sync(handle.fileno())
        return Arrived(digest.hexdigest(), done, content_type)

    def _persist(self, attempt: Callable[[], T]) -> T:
        retrying = tenacity.Retrying(
            stop=tenacity.stop_after_attempt(_ATTEMPTS),
            wait=tenacity.wait_exponential(multiplier=self.wait_seconds),
            retry=tenacity.retry_if_exception_type(_TryAgain),
            reraise=True,
        )
        try:
            return retrying(attempt)
        except _TryAgain as last:
            raise last.error from last

    def _stream(
        self, url: str, what: str, limit: int, write: Callable[[bytes, int | None], object], too_large: DownloadError
    ) -> str:
        """Pass every block of a response, with its announced length, to ``write``; return the content type."""
        import httpx2

        self.stop.check()
        if split_url(url).scheme not in ("https", "http"):
            raise DownloadError(f"{what} has an unusable address", f"{url!r} is not an http address", self.advice.later)
        seen = 0
        try:
            with (
                httpx2.Client(follow_redirects=True, timeout=self.timeout_seconds) as client,
                client.stream("GET", url, headers=dict(self.headers(url))) as answer,
            ):
                self._require_success(answer, url, what)
                total = _announced(answer)
                pace = Pace()
                for block in answer.iter_bytes():
                    self.stop.check()
                    if pace.is_slow(len(block)):
                        why = f"in {PACE_SECONDS:g} s less than {human_bytes(LEAST_BYTES)} arrived"
                        raise _TryAgain(_too_slow(what, why))
                    seen += len(block)
                    if seen > limit:
                        raise too_large
                    write(block, total)
                return str(answer.headers.get("content-type", ""))
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            why = f"no connection to {split_url(shown(url)).netloc} ({error})"
            raise _TryAgain(DownloadError(f"{what} could not be reached", why, self.advice.unreachable)) from error
        except httpx2.TransportError as error:
            raise _TryAgain(_cut(what, str(error) or type(error).__name__)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise DownloadError(f"{what} could not be downloaded", f"{shown(url)}: {error}", self.advice.later) from error

    def _require_success(self, answer: httpx2.Response, url: str, what: str) -> None:
        status = answer.status_code
        if status == 200:
            return
        where = f"{shown(url)} answered {status}"
        if status == 404:
            raise DownloadError(f"{what} does not exist", where, self.advice.missing)
        if status in (403, 429):
            limited = status == 429 or answer.headers.get("x-ratelimit-remaining") == "0"
            why = f"{where}: the hourly limit for this address is used up" if limited else f"{where}: access is refused"
            raise DownloadError(f"{what} was refused", why, self.advice.refused)
        error = DownloadError(f"{what} could not be downloaded", where, self.advice.later)
        raise _TryAgain(error) if status >= 500 else error

    def _longer(self, what: str, limit: int) -> DownloadError:
        return DownloadError(f"{what} is larger than announced", f"more than {limit} bytes arrived", self.advice.later)


def shown(url: str) -> str:
    """Return a URL without the parts that may hold secrets."""
    parts = split_url(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"


def _announced(answer: httpx2.Response) -> int | None:
    return whole_number(answer.headers.get("content-length", ""))


def _too_slow(what: str, why: str) -> DownloadError:
    return DownloadError(
        f"{what} arrives too slowly", why, "Run the same command again on a better connection, or at another time."
    )


def _cut(what: str, why: str) -> DownloadError:
    return DownloadError(f"The download of {what} was cut off", why, "Nothing was kept; run the same command again.")
