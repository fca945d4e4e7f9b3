"""Opens a user's file as a stream of bytes or text, and recognises files that are something else.

``.gz`` is unpacked. Bytes read from the disk are reported, for progress bars. Errors while reading become :class:`RunnerError`
and name the file as ``shown`` to the user.
"""

from __future__ import annotations

import codecs
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from imatrix_runner.bounded import quoted
from imatrix_runner.errors import InvalidDataError, from_os_error

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

BLOCK = 1 << 18
_HEAD = 512  # bytes in which a NUL makes a file binary; further on it makes a record bad
_GZIP = b"\x1f\x8b"
_BOM = codecs.BOM_UTF8

# Common formats that are not text: their first bytes, what they are, a command that converts them.
OTHER_FORMATS = (
    (codecs.BOM_UTF32_LE, "it is UTF-32", "iconv -f UTF-32 -t UTF-8 {} > text.txt"),
    (codecs.BOM_UTF16_LE, "it is UTF-16", "iconv -f UTF-16 -t UTF-8 {} > text.txt"),
    (codecs.BOM_UTF16_BE, "it is UTF-16", "iconv -f UTF-16 -t UTF-8 {} > text.txt"),
    (b"\x28\xb5\x2f\xfd", "it is compressed with zstd", "zstd -d {}"),
    (b"\xfd7zXZ\0", "it is compressed with xz", "unxz --keep {}"),
    (b"BZh", "it is compressed with bzip2", "bunzip2 --keep {}"),
    (
        b"PK\x03\x04",
        "it is a zip archive, or a document that is one (.docx, .epub)",
        "unzip {0} (a document: pandoc -t plain -o text.txt {0})",
    ),
    (b"7z\xbc\xaf\x27\x1c", "it is a 7z archive", "7z x {}"),
    (b"%PDF-", "it is a PDF", "pdftotext {} text.txt"),
    (b"{\\rtf", "it is an RTF document", "unrtf --text {} > text.txt"),
    (b"\xd0\xcf\x11\xe0", "it is an old office document (.doc, .xls)", "catdoc {} > text.txt"),
    (b"SQLite format 3\0", "it is a database (SQLite)", "sqlite3 {} .dump > text.txt"),
)


def bad_source(shown: str, why: str, todo: str) -> InvalidDataError:
    """The error for a source that cannot be used at all."""
    return InvalidDataError(f"{shown} cannot be used as a source of calibration text", why, todo)


@contextmanager
def opened(path: Path, shown: str, on_bytes: Callable[[int], None]) -> Iterator[io.BufferedReader]:
    """The bytes of a file, unpacked. Raises :class:`InvalidDataError` for a known other format or binary data."""
    try:
        raw = path.open("rb", buffering=0)
    except OSError as error:
        raise from_os_error(error, "opening a source of calibration text", shown) from error
    with raw, _buffered(_ReportingReader(raw, shown, on_bytes)) as packed:
        if packed.peek(2)[:2] != _GZIP:
            yield _checked(packed, path, shown)
            return
        with gzip.GzipFile(fileobj=packed) as unzipped, _buffered(_ReportingReader(unzipped, shown)) as stream:
            yield _checked(stream, path, shown)


def _buffered(raw: _ReportingReader) -> io.BufferedReader:
    return io.BufferedReader(raw, BLOCK)


def _checked(stream: io.BufferedReader, path: Path, shown: str) -> io.BufferedReader:
    head = stream.peek(1)
    for magic, why, command in OTHER_FORMATS:
        if head.startswith(magic):
            raise bad_source(shown, why, f"Convert it to text first: {command.format(quoted(path))}")
    if b"\0" in head[:_HEAD]:
        raise _binary(shown, head.index(b"\0"))
    return stream


class _ReportingReader(io.RawIOBase):
    """Reads another file, reports the bytes read, and raises its errors as :class:`RunnerError`."""

    def __init__(self, source: io.FileIO | gzip.GzipFile, shown: str, on_bytes: Callable[[int], None] | None = None) -> None:
        self._source, self._shown, self._on_bytes = source, shown, on_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            count = self._source.readinto(buffer)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise bad_source(self._shown, f"it is a damaged .gz file: {error}", "Download or create it again.") from error
        except OSError as error:
            raise from_os_error(error, "reading a source of calibration text", self._shown) from error
        if self._on_bytes is not None and count:
            self._on_bytes(count)
        return count


def text_blocks(stream: io.BufferedReader, path: Path, shown: str, *, strict: bool = True) -> Iterator[str]:
    """UTF-8 text in blocks, without a byte order mark, with CRLF as LF; the last block may be empty.

    Raises :class:`InvalidDataError` for NUL bytes and for invalid UTF-8, with byte and line. Without ``strict`` invalid bytes
    become lone surrogates, so that the caller can report the record that has them.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("strict" if strict else "surrogateescape")
    at, line, held = 0, 1, ""
    while True:
        block = stream.read(BLOCK)
        if (nul := block.find(b"\0")) >= 0:
            raise _binary(shown, at + nul)
        try:
            text = held + decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            # The decoder may have kept the beginning of a character from the previous block.
            byte = at + error.start - (len(error.object) - len(block))
            line += error.object.count(b"\n", 0, error.start)
            raise bad_source(shown, f"byte {byte} in line {line} is not valid UTF-8", _convert(path)) from error
        text = text.removeprefix("\ufeff") if at == 0 else text
        at += len(block)
        line += block.count(b"\n")
        held = "\r" if block and text.endswith("\r") else ""  # perhaps half of a CRLF
        yield text.removesuffix(held).replace("\r\n", "\n")
        if not block:
            return


def byte_lines(stream: IO[bytes], limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Lines with their numbers, without surrounding white space; None for a line longer than ``limit`` bytes."""
    number = 0
    while line := stream.readline(limit + 1):
        number += 1
        if len(line) <= limit:
            yield number, (line.removeprefix(_BOM) if number == 1 else line).strip()
            continue
        yield number, None
        while line and not line.endswith(b"\n"):
            line = stream.readline(BLOCK)


def _convert(path: Path) -> str:
    return f"Convert it, for example: iconv -f latin1 -t utf-8 {quoted(path)} > {quoted(Path(f'{path.stem}-utf8.txt'))}"


def _binary(shown: str, byte: int) -> InvalidDataError:
    return bad_source(shown, f"it is a binary file (byte {byte} is NUL)", "Give UTF-8 text, JSONL, JSON, CSV or Parquet.")
