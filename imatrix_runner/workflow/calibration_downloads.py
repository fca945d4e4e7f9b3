"""Downloading one public calibration text, from a plain web address or a hub, and checking that it is a text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from imatrix_runner.calibration.catalogue import (
    CalibrationSet,
    HubSource,
    SetText,
    Wanted,
    WebSource,
    choose_text,
    listed_texts,
)
from imatrix_runner.calibration.parquet_text import parquet_to_text
from imatrix_runner.downloads import Advice, Fetcher, shown
from imatrix_runner.errors import DownloadError, UsageError, from_os_error
from imatrix_runner.events import Finished, Progress, Started
from imatrix_runner.files import discard, human_bytes, part_path, require_space, sha256, sync
from imatrix_runner.models.hub import Hub, Listing, RepoFile
from imatrix_runner.untrusted import split_url
from imatrix_runner.workflow.context import Context

MOST_BYTES = 64 << 20
"""No text, and no file one is made from, is larger than this; a megabyte is more than a matrix needs."""

MIRROR = "IMATRIX_RUNNER_CALIBRATION_URL"
"""Environment variable: scheme and host (and perhaps a path before theirs) to ask instead of a plain file's own."""

_STEP = "calibration-fetch"
_LATER = "Try again later, or choose another set: imatrix-runner calibration list"
_PAGE_MARKS = (b"<!doctype html", b"<html")


@dataclass(frozen=True)
class Came:
    """What a download brought: a plausible text in ``part``, to be named ``text.file``. ``source_sha256``: of the file that
    came, before it was ``converted`` into ``documents`` (or lines)."""

    text: SetText
    part: Path
    source: str
    licence: str
    source_sha256: str
    converted: str = ""
    documents: int | None = None


def download_text(wanted: Wanted, folder: Path, context: Context, env: Mapping[str, str]) -> Came:
    """Download the wanted text into a part file in ``folder``; on any error nothing of it stays.

    Raises :class:`DownloadError`, :class:`UsageError` (no such text), ``InvalidDataError`` (a table without texts),
    ``NoSpaceError``, and ``InterruptedRunError`` once stopped.
    """
    source = wanted.set.source
    if isinstance(source, WebSource):
        came = _from_web(wanted.set, source, choose_text(wanted, wanted.set.texts), folder, context, env)
    else:
        hub = Hub(context.stop, context.sink, offline=False)
        listing = hub.repository(source.repo, "dataset")
        came = _from_hub(wanted.set, source, listing, _listed(wanted, listing), folder, hub, context)
    try:
        _require_text(came.part, wanted.set.named(came.text.name), came.source)
    except BaseException:
        discard(came.part)
        raise
    return came


def _from_web(
    chosen: CalibrationSet, source: WebSource, text: SetText, folder: Path, context: Context, env: Mapping[str, str]
) -> Came:
    url = _address(f"{source.base}/{quote(text.path)}", env)
    named = chosen.named(text.name)
    part = part_path(folder / text.file)
    advice = Advice(
        later=_LATER,
        unreachable="Check the network or the proxy (HTTPS_PROXY); what was fetched before is used with --offline.",
        missing=f"It may have moved: look for it at {chosen.origin}, or choose another set: imatrix-runner calibration list",
        refused=_LATER,
    )
    began = time.monotonic()
    context.sink(Started(_STEP, f"Downloading {named}", None, "B"))
    try:
        arrived = Fetcher(context.stop, advice, _headers).up_to(
            url,
            named,
            part,
            limit=MOST_BYTES,
            on_bytes=lambda done, total: context.sink(Progress(_STEP, done, total)),
        )
        if arrived.content_type.lower().startswith(("text/html", "application/xhtml")):
            raise _web_page(named, _host(url))
    except BaseException as error:
        discard(part)
        context.sink(Finished(_STEP, "failed", str(error), time.monotonic() - began))
        raise
    context.sink(Finished(_STEP, "done", human_bytes(arrived.n_bytes), time.monotonic() - began))
    return Came(text, part, shown(url), chosen.licence, arrived.sha256)


def _headers(_url: str) -> dict[str, str]:
    return {"User-Agent": "imatrix-runner", "Accept": "text/plain, */*", "Accept-Encoding": "identity"}


def _address(url: str, env: Mapping[str, str]) -> str:
    """A plain file's address, at the mirror if one is set."""
    mirror = env.get(MIRROR, "").rstrip("/")
    if not mirror:
        return url
    try:
        parts = split_url(mirror)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        _ = parts.port  # raises for what is no number
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"{MIRROR} is not a web address", f"it is {mirror[:80]!r}", "Set it to an http:// or https:// address, or unset it."
        )
    return mirror + split_url(url).path


def _host(url: str) -> str:
    return split_url(url).hostname or url


def _listed(wanted: Wanted, listing: Listing) -> SetText:
    """The wanted text as its repository has it now."""
    files = [(file.name, file.size) for file in listing.files]
    text = choose_text(wanted, listed_texts(wanted.set, files) if wanted.set.open else wanted.set.texts)
    if text.path not in {name for name, _ in files}:
        raise DownloadError(
            f"{listing.repo} has no file {text.path}",
            "it was there when the list of sets was made",
            f"It may have moved: look for it at {wanted.set.origin}",
        )
    return text


def _from_hub(
    chosen: CalibrationSet,
    source: HubSource,
    listing: Listing,
    text: SetText,
    folder: Path,
    hub: Hub,
    context: Context,
) -> Came:
    file = next(file for file in listing.files if file.name == text.path)
    if (file.size or 0) > MOST_BYTES:
        raise DownloadError(
            f"{chosen.named(text.name)} is too large",
            f"{text.path} has {human_bytes(file.size or 0)}, and no more than {human_bytes(MOST_BYTES)} are taken",
            "Choose a smaller one: a megabyte is more than a matrix needs.",
        )
    path = hub.fetch(listing, RepoFile(file.name, file.size), limit=MOST_BYTES)
    origin = f"{listing.repo}@{listing.commit}:{text.path}"
    licence = listing.licence or chosen.licence
    converted, documents = "", None
    part = part_path(folder / text.file)
    require_space(part, 2 * path.stat().st_size, text.file)
    try:
        with part.open("wb") as handle:
            if text.path.endswith(".parquet"):
                documents = parquet_to_text(path, handle, rows=source.rows, limit=MOST_BYTES, check=context.stop.check)
                what = "separated by one blank line" if source.rows == "documents" else "as they are"
                converted = f"from Parquet: {documents} {source.rows}, {what}"
            else:
                with path.open("rb") as source_file:
                    shutil.copyfileobj(source_file, handle)
            handle.flush()
            sync(handle.fileno())
        return Came(text, part, origin, licence, sha256(path), converted, documents)
    except OSError as error:
        discard(part)
        raise from_os_error(error, f"writing {text.file}", part) from error
    except BaseException:
        discard(part)
        raise


def _require_text(part: Path, named: str, source: str) -> None:
    """Refuse what no calibration text is: a network's login page, nothing, a binary file."""
    try:
        data = part.read_bytes()
    except OSError as error:
        raise from_os_error(error, "reading what was downloaded", part) from error
    if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGE_MARKS):
        raise _web_page(named, _host(source))
    try:
        why = "it is empty" if not data.strip() else "it holds NUL bytes, as binary files do" if b"\0" in data else ""
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not valid UTF-8"
    if why:
        raise DownloadError(f"{named} is no text", f"what came from {source} is not: {why}", f"Nothing was kept. {_LATER}")


def _web_page(named: str, host: str) -> DownloadError:
    return DownloadError(
        f"A web page came instead of {named}",
        f"{host}, or a network that wants a login first, answered with HTML",
        "Nothing was kept. Open any page in a browser to log in to the network, then run the same command again.",
    )
