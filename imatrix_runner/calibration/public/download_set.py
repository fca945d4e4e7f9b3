"""Downloads one public calibration text from a web address or a hub, and checks that it is text."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING
from urllib.parse import quote

from imatrix_runner.calibration.public.catalogue import (
    CalibrationSet,
    HubSource,
    Rows,
    SetText,
    WantedSet,
    WebSource,
    choose_text,
    listed_texts,
)
from imatrix_runner.context.context import Context
from imatrix_runner.downloads import DownloadAdvice, Fetcher, shown
from imatrix_runner.errors import DownloadError, InvalidDataError, UsageError, from_os_error
from imatrix_runner.events import Finished, Progress, Started
from imatrix_runner.extras import CALIBRATION
from imatrix_runner.files import discard, human_bytes, part_path, require_space, sha256, sync
from imatrix_runner.models.hub import Hub, Listing, RepoFile
from imatrix_runner.safe_text import printable
from imatrix_runner.untrusted import split_url

MOST_BYTES = 64 << 20
"""Upper bound, in bytes, for a text and for the file it is converted from; an imatrix needs less than a megabyte."""

MIRROR = "IMATRIX_RUNNER_CALIBRATION_URL"
"""Environment variable: scheme and host (optionally with a path prefix) that replace those of plain files' addresses."""

_STEP = "calibration-fetch"

_LATER = "Try again later, or choose another set: imatrix-runner calibration list"

_PAGE_MARKS = (b"<!doctype html", b"<html")


@dataclass(frozen=True)
class DownloadedText:
    """A downloaded text in ``part``, to be renamed to ``text.file``. ``source_sha256``: of the file as downloaded, before it
    was ``converted``; ``documents``: number of documents (or lines) converted."""

    text: SetText
    part: Path
    source: str
    licence: str
    source_sha256: str
    converted: str = ""
    documents: int | None = None


def download_text(wanted: WantedSet, folder: Path, context: Context, env: Mapping[str, str]) -> DownloadedText:
    """Download the wanted text into a part file in ``folder``; on any error the part file is removed.

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
) -> DownloadedText:
    url = _address(f"{source.base}/{quote(text.path)}", env)
    named = chosen.named(text.name)
    part = part_path(folder / text.file)
    advice = DownloadAdvice(
        later=_LATER,
        unreachable="Check the network or the proxy (HTTPS_PROXY); --offline uses a copy fetched earlier.",
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
    return DownloadedText(text, part, shown(url), chosen.licence, arrived.sha256)


def _headers(_url: str) -> dict[str, str]:
    return {"User-Agent": "imatrix-runner", "Accept": "text/plain, */*", "Accept-Encoding": "identity"}


def _address(url: str, env: Mapping[str, str]) -> str:
    """The address of a plain file, at the mirror if one is set."""
    mirror = env.get(MIRROR, "").rstrip("/")
    if not mirror:
        return url
    try:
        parts = split_url(mirror)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and not parts.query and not parts.fragment
        _ = parts.port  # raises ValueError for an invalid port
    except ValueError:
        usable = False
    if not usable:
        raise UsageError(
            f"{MIRROR} is not a web address", f"it is {mirror[:80]!r}", "Set it to an http:// or https:// address, or unset it."
        )
    return mirror + split_url(url).path


def _host(url: str) -> str:
    return split_url(url).hostname or url


def _listed(wanted: WantedSet, listing: Listing) -> SetText:
    """The wanted text, checked against the repository's current listing."""
    files = [(file.name, file.size) for file in listing.files]
    text = choose_text(wanted, listed_texts(wanted.set, files) if wanted.set.open else wanted.set.texts)
    if text.path not in {name for name, _ in files}:
        raise DownloadError(
            f"{listing.repo} has no file {text.path}",
            "it existed when this program's list of sets was made",
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
) -> DownloadedText:
    file = next(file for file in listing.files if file.name == text.path)
    if (file.size or 0) > MOST_BYTES:
        raise DownloadError(
            f"{chosen.named(text.name)} is too large",
            f"{text.path} has {human_bytes(file.size or 0)}, and the limit is {human_bytes(MOST_BYTES)}",
            "Choose a smaller one: an imatrix needs less than a megabyte of text.",
        )
    if text.path.endswith(".parquet"):
        CALIBRATION.require("This text is published as Parquet; reading it")
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
        return DownloadedText(text, part, origin, licence, sha256(path), converted, documents)
    except OSError as error:
        discard(part)
        raise from_os_error(error, f"writing {text.file}", part) from error
    except BaseException:
        discard(part)
        raise


def _require_text(part: Path, named: str, source: str) -> None:
    """Raise :class:`DownloadError` if the download is a web page, empty, binary or not UTF-8."""
    try:
        data = part.read_bytes()
    except OSError as error:
        raise from_os_error(error, "reading the download", part) from error
    if data[:1024].lstrip(b"\xef\xbb\xbf \t\r\n").lower().startswith(_PAGE_MARKS):
        raise _web_page(named, _host(source))
    try:
        why = "it is empty" if not data.strip() else "it contains NUL bytes, as binary files do" if b"\0" in data else ""
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        why = f"byte {error.start} is not valid UTF-8"
    if why:
        raise DownloadError(
            f"{named} is not a text", f"the file from {source} is unusable: {why}", f"Nothing was kept. {_LATER}"
        )


def _web_page(named: str, host: str) -> DownloadError:
    return DownloadError(
        f"Received a web page instead of {named}",
        f"{host}, or a network that requires a login, answered with HTML",
        "Nothing was kept. Open any page in a browser to log in to the network, then run the same command again.",
    )


if TYPE_CHECKING:
    import pyarrow.parquet

_COLUMNS = ("text", "content")

_BATCH_ROWS = 128


def parquet_to_text(source: Path, target: IO[bytes], *, rows: Rows, limit: int, check: Callable[[], None]) -> int:
    """Write the text column of ``source`` as UTF-8; return the number of documents (or lines).

    ``documents`` are stripped and separated by one blank line; empty ones are skipped. ``lines`` are written unchanged, an
    empty one as a space and a line end, as in WikiText's own files. Raises :class:`InvalidDataError` for a file that is not
    Parquet, has no text column, or would give more than ``limit`` bytes.
    """
    import pyarrow
    import pyarrow.parquet

    count = written = 0
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            column = _text_column(file, source, limit)
            for row in _rows(file, column):
                check()
                block = _line(row) if rows == "lines" else _document(row, first=count == 0)
                if block:
                    count += 1
                    written += target.write(block)
                if written > limit:
                    raise _too_large(source, limit)
    except OSError as error:
        raise from_os_error(error, "converting a Parquet file to text", source) from error
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise _unusable(source, f"it cannot be read as Parquet ({printable(str(error))[:200]})") from error
    if not written:
        raise _unusable(source, f"its column {column!r} is empty")
    return count


def _rows(file: pyarrow.parquet.ParquetFile, column: str) -> Iterator[str | None]:
    for batch in file.iter_batches(_BATCH_ROWS, columns=[column]):
        yield from batch.column(0).to_pylist()


def _line(row: str | None) -> bytes:
    line = row or " "
    return (line if line.endswith("\n") else f"{line}\n").encode()


def _document(row: str | None, *, first: bool) -> bytes:
    text = (row or "").strip()
    return f"{'' if first else chr(10)}{text}\n".encode() if text else b""


def _text_column(file: pyarrow.parquet.ParquetFile, source: Path, limit: int) -> str:
    """Name of the text column: ``text``, else ``content``, else the only string column.

    Raises :class:`InvalidDataError` if there is none, or if its uncompressed size exceeds ``limit`` bytes.
    """
    import pyarrow.types

    schema = file.schema_arrow
    texts = [field.name for field in schema if pyarrow.types.is_string(field.type) or pyarrow.types.is_large_string(field.type)]
    column = next((name for name in _COLUMNS if name in texts), texts[0] if len(texts) == 1 else None)
    if column is None:
        held = ", ".join(printable(name) for name in schema.names[:8])
        raise _unusable(
            source,
            f"no column is named {' or '.join(_COLUMNS)}, and it has no single text column; its columns: {held or 'none'}",
        )
    metadata = file.metadata
    announced = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        for number in range(row_group.num_columns):
            chunk = row_group.column(number)
            announced += chunk.total_uncompressed_size if chunk.path_in_schema == column else 0
    if announced > limit:
        raise _too_large(source, limit)
    return column


def _too_large(source: Path, limit: int) -> InvalidDataError:
    return InvalidDataError(
        f"{source.name} is too large",
        f"its text would have more than {human_bytes(limit)}",
        "Choose a smaller one: an imatrix needs less than a megabyte of text.",
    )


def _unusable(source: Path, why: str) -> InvalidDataError:
    return InvalidDataError(
        f"{source.name} cannot be converted to text", why, "Choose another set from: imatrix-runner calibration list"
    )
