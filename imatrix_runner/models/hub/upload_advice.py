"""Translates errors of requests that change a hub into messages with advice. None contains a token or a signed address."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import imatrix_runner
from imatrix_runner.errors import RunnerError, UploadError, from_os_error
from imatrix_runner.files import human_seconds
from imatrix_runner.models.hub.advice import Asked, no_hub, retry_after
from imatrix_runner.safe_text import printable

LONGEST_UPLOAD_WAIT = 900.0
"""Seconds to wait at most when a hub requests a pause during an upload: its windows for limits have five minutes."""

_PACKAGE = Path(imatrix_runner.__file__).parent
_AGAIN = "Run the same command again: it uploads only what is missing."
_QUERY = re.compile(r"\?\S+")
_NO_ANSWER = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError, StopIteration)
_PASSING = (408, 409, 412, 425, 429, 500, 502, 503, 504)


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and what caused it, from the outside in: the library wraps errors of its upload threads."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__


def passes(error: BaseException) -> bool:
    """Whether looking at the repository again and trying once more may succeed: the connection broke, the hub is overloaded,
    or another commit came first."""
    import httpx2
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, RunnerError):
        return False
    for each in causes(error):
        if isinstance(each, HfHubHTTPError):
            return each.response.status_code in _PASSING and (retry_after(each) or 0) <= LONGEST_UPLOAD_WAIT
        if isinstance(each, httpx2.TransportError):
            return not isinstance(each, (httpx2.ProxyError, httpx2.UnsupportedProtocol))
        if isinstance(each, (ConnectionError, TimeoutError)):  # what hf_xet raises
            return True
    return False


def pause_of(error: BaseException | None) -> float | None:
    """The pause in seconds that the hub asks for; None if it names none."""
    return next((wait for each in causes(error) if (wait := retry_after(each)) is not None), None)


def is_bug(error: BaseException) -> bool:
    """Whether an error comes from a line of this program, and not from the library or from what a hub sent."""
    place, last = error.__traceback__, ""
    while place is not None:
        last, place = place.tb_frame.f_code.co_filename, place.tb_next
    return not isinstance(error, (RunnerError, OSError)) and Path(last).is_relative_to(_PACKAGE)


def explain_upload(error: BaseException, asked: Asked) -> RunnerError:
    """The error for the user, for any exception of huggingface_hub or its transport."""
    import httpx2
    from huggingface_hub import errors

    for each in causes(error):
        if isinstance(each, RunnerError):
            return each
        if isinstance(each, errors.GatedRepoError):
            return UploadError(
                f"{asked.hub_id.repo} is gated",
                "your account is not among those that its owner has let in, so it cannot write there either",
                "Publish to a repository of your own with --to, or use a token of an account that may write there.",
            )
        if isinstance(each, errors.LocalTokenNotFoundError):
            return no_token(asked)
        if isinstance(each, errors.OfflineModeIsEnabled):
            return offline(asked)
        if isinstance(each, errors.HfHubHTTPError):
            return _of_status(each, asked)
        if isinstance(each, httpx2.HTTPError):
            return _of_transport(each, asked)
        if isinstance(each, errors.HFValidationError):
            return UploadError(
                f"{asked.hub_id.repo!r} cannot be the name of a repository",
                "a hub refuses it, for example because it ends in '-', '.' or '.git', or is longer than 96 characters",
                "Choose another name: --to ORG/NAME",
            )
    for each in causes(error):
        if isinstance(each, ValueError) and "README.md" in str(each):
            return UploadError(
                f"{asked.host} does not accept the card's metadata",
                printable(str(each))[:300],
                "Correct the block between the --- lines of report.md, or name a licence that the hub knows with --licence.",
            )
        if isinstance(each, OSError) and each.errno is not None:
            return from_os_error(each, f"uploading to {asked.hub_id.repo}")
    innermost = list(causes(error))[-1]
    if isinstance(innermost, _NO_ANSWER):
        found = no_hub(asked)  # not JSON, or values of other types than a hub's
        return UploadError(found.what, found.why, found.todo)
    return UploadError(
        f"The upload to {asked.hub_id.repo} failed",
        f"{type(innermost).__name__}: {_unsigned(innermost)}" if str(innermost) else type(innermost).__name__,
        f"{_AGAIN} If it fails again, try HF_HUB_DISABLE_XET=1, which uses plain HTTP.",
    )


def _unsigned(error: BaseException) -> str:
    """The text of an error without what follows the question mark in addresses, where signatures stand."""
    return _QUERY.sub("?…", printable(str(error)))[:200].rstrip(".")


def no_token(asked: Asked) -> UploadError:
    """The error for an upload without a token."""
    return UploadError(
        f"There is no token for {asked.host}",
        "publishing needs an access token with write permission; HF_TOKEN is not set, and nobody is logged in",
        "Create one in your account's settings, then set HF_TOKEN, or type: hf auth login",
    )


def offline(asked: Asked) -> UploadError:
    """The error for offline mode."""
    return UploadError(
        f"{asked.hub_id.repo} cannot be published offline",
        "offline mode is on (HF_HUB_OFFLINE or --offline)",
        "Unset HF_HUB_OFFLINE, or leave --offline out.",
    )


def may_not_write(asked: Asked, why: str) -> UploadError:
    """The error for an account or a token without write access."""
    return UploadError(
        f"Your token may not write to {asked.hub_id.repo}",
        why,
        "Create a token with write permission for it in your account's settings and set HF_TOKEN, or choose another --to.",
    )


def _of_status(error: BaseException, asked: Asked) -> UploadError:
    from huggingface_hub.errors import HfHubHTTPError

    assert isinstance(error, HfHubHTTPError)
    status, repo = error.response.status_code, asked.hub_id.repo
    said = printable(str(error.server_message or "")).strip()[:200]
    if status == 401:
        return UploadError(
            f"{asked.host} did not accept your token",
            "it has expired, was revoked, or is mistyped",
            "Create a new token with write permission in your account's settings and set HF_TOKEN.",
        )
    if status == 403:
        return may_not_write(asked, said or f"{asked.host} refuses it: it lacks the permission, or the quota is used up")
    if status == 404:
        return UploadError(
            f"{repo} is not on {asked.host}",
            "it was removed, made private or renamed while files were uploaded",
            _AGAIN,
        )
    if status in (409, 412):
        return UploadError(f"{repo} is being changed by others", "again and again, another commit came first", _AGAIN)
    if status == 413:
        return UploadError(
            f"{asked.host} refuses a file of {repo}", said or "it is too large", "Split it: --split-max-size 48G"
        )
    if status == 429:
        wait = pause_of(error)
        pause = human_seconds(wait) if wait else "some minutes"
        return UploadError(
            f"{asked.host} limits the rate of requests",
            f"too many came from your account (HTTP 429); it asks for a pause of {pause}",
            f"Wait {pause}. {_AGAIN}",
        )
    if status == 400 and said:
        return UploadError(f"{asked.host} refuses the upload to {repo}", said, "Correct it, then run the same command again.")
    return UploadError(
        f"{asked.host} failed to answer", f"it sent HTTP status {status} for {repo}", f"Try again later. {_AGAIN}"
    )


def _of_transport(error: BaseException, asked: Asked) -> UploadError:
    import httpx2

    if isinstance(error, httpx2.ProxyError):
        return UploadError(
            "The proxy refused the upload",
            f"it does not let requests to {asked.host} through",
            "Check HTTPS_PROXY and HTTP_PROXY, then run the same command again.",
        )
    if isinstance(error, (httpx2.UnsupportedProtocol, httpx2.InvalidURL)):
        return UploadError(
            "HF_ENDPOINT is not a web address",
            f"it is {asked.endpoint.split('@')[-1][:60]!r}",
            "Set HF_ENDPOINT to an http:// or https:// address, or unset it.",
        )
    if isinstance(error, httpx2.ConnectError):
        return UploadError(f"{asked.host} cannot be reached", "no connection could be made", f"Check the network. {_AGAIN}")
    if isinstance(error, httpx2.TimeoutException):
        return UploadError(f"{asked.host} does not answer", "it sent nothing within the time limit", _AGAIN)
    return UploadError(f"The connection to {asked.host} was cut", "again on each retry", _AGAIN)
