"""Careful downloads over HTTP: bounded, with progress, retried, and every way to fail in words of its own."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

import tenacity

from imatrix_runner.errors import DownloadError, from_os_error
from imatrix_runner.signals import Stop

if TYPE_CHECKING:
    import httpx2

T = TypeVar("T")

_API_HOST = "api.github.com"
_MAX_JSON = 16 << 20
_BLOCK = 1 << 18
_ATTEMPTS = 3


class _TryAgain(Exception):
    """A failure that may pass by itself; carries the error to show when it does not."""

    def __init__(self, error: DownloadError) -> None:
        super().__init__(str(error))
        self.error = error


@dataclass(frozen=True)
class Fetcher:
    """Gets things by URL. ``wait_seconds`` is the pause before the second attempt; it doubles."""

    stop: Stop
    env: Mapping[str, str]
    timeout_seconds: float = 30.0
    wait_seconds: float = 1.0

    def json(self, url: str, what: str) -> Any:
        """A JSON document of a release service."""
        data = self.read(url, what, limit=_MAX_JSON)
        try:
            return json.loads(data)
        except ValueError as error:
            raise DownloadError(
                f"{what} could not be read", f"{_shown(url)} did not answer with JSON ({error})", _LATER
            ) from error

    def read(self, url: str, what: str, *, limit: int) -> bytes:
        """A small document of at most ``limit`` bytes."""
        parts: list[bytes] = []

        def attempt() -> None:
            parts.clear()
            self._stream(url, what, limit, parts.append)

        self._persist(attempt)
        return b"".join(parts)

    def file(self, url: str, what: str, part: Path, *, size: int, on_bytes: Callable[[int], None]) -> str:
        """Download exactly ``size`` bytes into ``part``; return their SHA-256 as hex. ``part`` is removed on any failure."""
        try:
            return self._persist(lambda: self._file_once(url, what, part, size, on_bytes))
        except OSError as error:
            part.unlink(missing_ok=True)
            raise from_os_error(error, f"downloading {what}", part) from error
        except BaseException:
            part.unlink(missing_ok=True)
            raise

    def _file_once(self, url: str, what: str, part: Path, size: int, on_bytes: Callable[[int], None]) -> str:
        digest = hashlib.sha256()
        done = 0
        with part.open("wb") as handle:

            def write(block: bytes) -> None:
                nonlocal done
                handle.write(block)
                digest.update(block)
                done += len(block)
                on_bytes(done)

            self._stream(url, what, size, write)
            handle.flush()
            os.fsync(handle.fileno())
        if done != size:
            raise _TryAgain(_cut(what, f"{done} of {size} bytes arrived"))
        return digest.hexdigest()

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

    def _stream(self, url: str, what: str, limit: int, write: Callable[[bytes], object]) -> None:
        import httpx2

        self.stop.check()
        if urlsplit(url).scheme not in ("https", "http"):
            raise DownloadError(f"{what} has an unusable address", f"{url!r} is not an http address", _LATER)
        seen = 0
        try:
            with (
                httpx2.Client(follow_redirects=True, timeout=self.timeout_seconds) as client,
                client.stream("GET", url, headers=headers_for(url, self.env)) as answer,
            ):
                _require_success(answer, url, what)
                for block in answer.iter_bytes(_BLOCK):
                    self.stop.check()
                    seen += len(block)
                    if seen > limit:
                        raise DownloadError(f"{what} is larger than announced", f"more than {limit} bytes came", _LATER)
                    write(block)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            raise _TryAgain(
                DownloadError(
                    f"{what} could not be reached",
                    f"no connection to {urlsplit(url).netloc} ({error})",
                    "Check the network or the proxy (HTTPS_PROXY), or build from source: imatrix-runner tools build",
                )
            ) from error
        except httpx2.TransportError as error:
            raise _TryAgain(_cut(what, str(error) or type(error).__name__)) from error
        except httpx2.HTTPError as error:
            raise DownloadError(f"{what} could not be downloaded", f"{_shown(url)}: {error}", _LATER) from error


_LATER = "Try again later, or build from source: imatrix-runner tools build"


def headers_for(url: str, env: Mapping[str, str]) -> dict[str, str]:
    """Request headers. ``GITHUB_TOKEN`` goes to GitHub's API over HTTPS and to nobody else, redirects included."""
    headers = {"User-Agent": "imatrix-runner", "Accept": "application/json, */*", "Accept-Encoding": "identity"}
    parts = urlsplit(url)
    if env.get("GITHUB_TOKEN") and parts.scheme == "https" and parts.hostname == _API_HOST and parts.port in (None, 443):
        headers["Authorization"] = f"Bearer {env['GITHUB_TOKEN']}"
    return headers


def _require_success(answer: httpx2.Response, url: str, what: str) -> None:
    status = answer.status_code
    if status == 200:
        return
    where = f"{_shown(url)} answered {status}"
    if status == 404:
        raise DownloadError(
            f"{what} does not exist", where, "Look for the tag on llama.cpp's releases page, then give it with --tag."
        )
    if status in (403, 429):
        limited = status == 429 or answer.headers.get("x-ratelimit-remaining") == "0"
        why = f"{where}: the hourly limit for this address is used up" if limited else f"{where}: access is refused"
        raise DownloadError(
            f"{what} was refused", why, "Set GITHUB_TOKEN to any token of yours, or wait an hour, and try again."
        )
    error = DownloadError(f"{what} could not be downloaded", where, _LATER)
    raise _TryAgain(error) if status >= 500 else error


def _cut(what: str, why: str) -> DownloadError:
    return DownloadError(f"The download of {what} was cut off", why, "Nothing was kept; run the same command again.")


def _shown(url: str) -> str:
    """An address without what may be secret in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.hostname or ''}{f':{parts.port}' if parts.port else ''}{parts.path}"
