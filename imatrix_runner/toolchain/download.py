"""What release services offer, over HTTP: the downloads of :mod:`imatrix_runner.downloads` with this room's words."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from imatrix_runner import downloads
from imatrix_runner.errors import DownloadError
from imatrix_runner.signals import Stop
from imatrix_runner.untrusted import UnreadableError, from_lenient_json, split_url

_API_HOST = "api.github.com"
_MAX_JSON = 16 << 20

_LATER = "Try again later, or build from source: imatrix-runner tools build"
_ADVICE = downloads.Advice(
    later=_LATER,
    unreachable="Check the network or the proxy (HTTPS_PROXY), or build from source: imatrix-runner tools build",
    missing="Look for the tag on llama.cpp's releases page, then give it with --tag.",
    refused="Set GITHUB_TOKEN to any token of yours, or wait an hour, and try again.",
)


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
            return from_lenient_json(data)
        except UnreadableError as error:
            raise DownloadError(
                f"{what} could not be read", f"{downloads.shown(url)} did not answer with JSON ({error})", _LATER
            ) from error

    def read(self, url: str, what: str, *, limit: int) -> bytes:
        """A small document of at most ``limit`` bytes."""
        return self._web.read(url, what, limit=limit)

    def file(self, url: str, what: str, part: Path, *, size: int, on_bytes: Callable[[int], None]) -> str:
        """Download exactly ``size`` bytes into ``part``; return their SHA-256 as hex. ``part`` is removed on any failure."""
        return self._web.file(url, what, part, size=size, on_bytes=on_bytes)

    @property
    def _web(self) -> downloads.Fetcher:
        return downloads.Fetcher(
            self.stop, _ADVICE, lambda url: headers_for(url, self.env), self.timeout_seconds, self.wait_seconds
        )


def headers_for(url: str, env: Mapping[str, str]) -> dict[str, str]:
    """Request headers. ``GITHUB_TOKEN`` goes to GitHub's API over HTTPS and to nobody else, redirects included."""
    headers = {"User-Agent": "imatrix-runner", "Accept": "application/json, */*", "Accept-Encoding": "identity"}
    parts = split_url(url)
    if env.get("GITHUB_TOKEN") and parts.scheme == "https" and parts.hostname == _API_HOST and parts.port in (None, 443):
        headers["Authorization"] = f"Bearer {env['GITHUB_TOKEN']}"
    return headers
