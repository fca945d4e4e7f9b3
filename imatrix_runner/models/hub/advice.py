"""Translates errors of requests to a hub into messages with advice. No message contains a token."""

from __future__ import annotations

import os
import re
import socket
from dataclasses import dataclass

from imatrix_runner.errors import DownloadError, RunnerError, UsageError, from_os_error
from imatrix_runner.files import human_seconds
from imatrix_runner.models.model import HubId
from imatrix_runner.untrusted import split_url, whole_number

LONGEST_WAIT = 30.0
"""Seconds to wait at most when a hub requests a pause; a longer one becomes an error."""


@dataclass(frozen=True)
class Asked:
    """A request to a hub, as its messages name it. ``perhaps_path``: the user may have meant a local path."""

    hub_id: HubId
    endpoint: str
    has_token: bool
    repo_type: str = "model"
    perhaps_path: bool = True

    @property
    def host(self) -> str:
        """The hub's host and port, without credentials that the address may contain."""
        parts = split_url(self.endpoint)
        port = f":{parts.port}" if parts.port else ""
        return f"{parts.hostname}{port}" if parts.hostname else "the hub"

    @property
    def page(self) -> str:
        folder = "datasets/" if self.repo_type == "dataset" else ""
        return f"{split_url(self.endpoint).scheme}://{self.host}/{folder}{self.hub_id.repo}"

    @property
    def no_path(self) -> str:
        return "; there is no such local path either" if self.perhaps_path else ""


def is_passing(error: BaseException) -> bool:
    """Whether the error is transient, such as a broken connection or an overloaded server, so that a retry may succeed."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, HfHubHTTPError):
        wait = retry_after(error) or 0
        return error.response.status_code in (408, 429, 500, 502, 503, 504) and wait <= LONGEST_WAIT
    if isinstance(error, OSError) and "Consistency check failed" in str(error):
        return True
    return isinstance(error, httpx2.TransportError) and not isinstance(error, (httpx2.ProxyError, httpx2.UnsupportedProtocol))


def retry_after(error: BaseException) -> float | None:
    """Seconds that the server asks to wait: from ``Retry-After``, or from ``RateLimit`` (``"api";r=0;t=55``); None if
    neither."""
    from huggingface_hub.errors import HfHubHTTPError

    if not isinstance(error, HfHubHTTPError):
        return None
    text = error.response.headers.get("Retry-After", "")
    if (seconds := whole_number(text)) is not None:
        return float(seconds)
    window = re.search(r";\s*r=0\s*;\s*t=(\d{1,9})", error.response.headers.get("RateLimit", ""), re.ASCII)
    return float(window[1]) if window else None


def explain(error: BaseException, asked: Asked) -> RunnerError:
    """The error for the user, for any exception of huggingface_hub or its transport."""
    import httpx2
    from huggingface_hub import errors

    if isinstance(error, RunnerError):
        return error
    # Order matters: GatedRepoError is a RepositoryNotFoundError, all of them are HfHubHTTPError, and that is an OSError.
    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"{asked.hub_id.repo} is gated",
            "its owner requires that you accept the licence" + (", and your account has not" if asked.has_token else ""),
            f"Accept the licence at {asked.page}, then set HF_TOKEN to a token of that account and run the same command again.",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        newest = HubId(asked.hub_id.repo, None, asked.hub_id.file)
        return DownloadError(
            f"{asked.hub_id.repo} has no revision {asked.hub_id.revision or 'main'}",
            f"{asked.host} has the repository, but no branch, tag or commit of that name",
            f"Omit the revision: {'imatrix-runner run ' if asked.repo_type == 'model' else ''}{newest}",
        )
    if isinstance(error, errors.RemoteEntryNotFoundError):
        return DownloadError(
            f"A file of {asked.hub_id.repo} is missing",
            f"{asked.host} lists it but answers that it does not exist",
            "Run the same command again; if that fails as well, choose another revision with org/name@revision.",
        )
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code, asked, retry_after(error))
    if isinstance(error, errors.OfflineModeIsEnabled):
        return offline_without(asked)
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return explain(error.__cause__, asked)  # the library raises this for any failed request about a file
    if isinstance(error, httpx2.HTTPError):
        return _explain_transport(error, asked)
    if isinstance(error, httpx2.InvalidURL):
        return _no_address(asked)
    if isinstance(error, errors.FileMetadataError):
        return no_hub(asked)
    if isinstance(error, errors.HFValidationError):
        return UsageError(
            f"{asked.hub_id.repo!r} is not a hub id",
            "no repository can have that name, for example because it ends in '-', '.' or '.git'",
            "Check the spelling of org/name; there is no such local path either.",
        )
    if isinstance(error, ValueError) and "too large" in str(error):
        return DownloadError(
            f"A file of {asked.hub_id.repo} is too large for plain HTTP",
            "hubs serve files of more than 50 GB only through Xet, whose package is not installed or is disabled",
            "Install it with: pip install hf_xet; and unset HF_HUB_DISABLE_XET.",
        )
    if isinstance(error, OSError) and error.errno is None:
        return DownloadError(
            f"A file of {asked.hub_id.repo} arrived with the wrong length",
            f"{asked.host} sent less or more than it announced, often because of a proxy's error page or a cut connection",
            "Run the same command again; if that fails as well, check your proxy and HF_ENDPOINT.",
        )
    if isinstance(error, OSError):
        return from_os_error(error, f"downloading {asked.hub_id.repo}")
    return DownloadError(
        f"The download of {asked.hub_id.repo} failed",
        f"{type(error).__name__} in the transfer from {asked.host}",
        "Run the same command again; if that fails as well, try HF_HUB_DISABLE_XET=1, which uses plain HTTP.",
    )


def no_hub(asked: Asked) -> DownloadError:
    """The error for an answer that does not come from a hub."""
    return DownloadError(
        f"{asked.host} does not answer like a hub",
        "its answer is not that of a hub; a proxy, a login page or a wrong HF_ENDPOINT may send a web page instead",
        "Check HF_ENDPOINT and your proxy with: imatrix-runner doctor",
    )


def offline_without(asked: Asked) -> DownloadError:
    """The error for offline mode without a complete copy in the cache."""
    return DownloadError(
        f"{asked.hub_id} is not in the cache",
        "offline mode is on (HF_HUB_OFFLINE or --offline), and the cache has no complete copy of that revision",
        "Run the same command once online, or give a local path.",
    )


def _explain_status(status: int, asked: Asked, wait: float | None) -> DownloadError:
    repo = asked.hub_id.repo
    if status == 401 and asked.has_token:
        return DownloadError(
            f"{asked.host} did not accept your token for {repo}",
            "it has expired, is mistyped, or has no access to that repository",
            "Create a new token in your account's settings and set HF_TOKEN, or unset it if the repository is public.",
        )
    if status == 401:
        return DownloadError(
            f"{repo} does not exist or is private",
            f"{asked.host} does not say which without a token{asked.no_path}",
            "Check the spelling; for a private repository set HF_TOKEN to a token that may read it.",
        )
    if status == 403:
        return DownloadError(
            f"{asked.host} forbids access to {repo}",
            "your token lacks the permission, or the repository was disabled",
            f"Open {asked.page} in a browser, then set HF_TOKEN to a token with read permission.",
        )
    if status == 404:
        return DownloadError(
            f"No repository {repo} found",
            f"{asked.host} does not have it{asked.no_path}",
            "Check the spelling of org/name; a private repository needs HF_TOKEN.",
        )
    if status == 429:
        pause = human_seconds(wait) if wait else "some minutes"
        return DownloadError(
            f"{asked.host} limits the rate of requests",
            f"too many came from your address or account (HTTP 429); it asks for a pause of {pause}",
            f"Wait {pause} and run the same command again; with HF_TOKEN set the limit is higher.",
        )
    return DownloadError(
        f"{asked.host} failed to answer",
        f"it sent HTTP status {status} for {repo}",
        "Try again later, or point HF_ENDPOINT at a mirror.",
    )


def require_address() -> None:
    """Raise :class:`UsageError` for an ``HF_ENDPOINT`` with which importing huggingface_hub would fail."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    if endpoint and "://" in endpoint and not split_url(endpoint).hostname:
        raise UsageError(
            "HF_ENDPOINT is not a web address",
            f"it is {endpoint[:60]!r}",
            "Set HF_ENDPOINT to an http:// or https:// address, or unset it.",
        )


def _no_address(asked: Asked) -> DownloadError:
    todo = "Set HF_ENDPOINT to an http:// or https:// address, or unset it."
    return DownloadError("HF_ENDPOINT is not a web address", f"it is {asked.endpoint.split('@')[-1][:60]!r}", todo)


def _explain_transport(error: BaseException, asked: Asked) -> DownloadError:
    import httpx2

    again = "Check the network and run the same command again; HF_HUB_OFFLINE=1 uses a cached copy."
    if isinstance(error, httpx2.ProxyError):
        todo = "Check HTTPS_PROXY and HTTP_PROXY, then run the same command again."
        return DownloadError("The proxy refused the download", f"it does not let requests to {asked.host} through", todo)
    if isinstance(error, httpx2.UnsupportedProtocol):
        return _no_address(asked)
    if isinstance(error, httpx2.TimeoutException):
        return DownloadError(f"{asked.host} does not answer", "it sent nothing within the time limit", again)
    if isinstance(error, httpx2.ConnectError):
        causes = _chain(error)
        if any(isinstance(cause, socket.gaierror) for cause in causes):
            why = "its name cannot be resolved: there is no network, no DNS, or HF_ENDPOINT is mistyped"
        elif any(isinstance(cause, ConnectionRefusedError) for cause in causes):
            why = "the connection was refused"
        else:
            why = "no connection could be made (network down, firewall or TLS)"
        return DownloadError(f"{asked.host} cannot be reached", why, again)
    return DownloadError(
        f"The connection to {asked.host} was cut",
        f"before {asked.hub_id.repo} had arrived completely, and again on each retry",
        again,
    )


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain
