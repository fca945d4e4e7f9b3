"""Reads a text file once, block by block, and refuses it as soon as it proves not to be text."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from imatrix_runner.errors import InvalidDataError, from_os_error

MAX_BYTES = 1 << 30
_BLOCK = 1 << 20
_ROLE = "calibration text"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class TextBlock:
    """Consecutive text, of whole lines if lines are shorter than a block. ``offset``: of ``data`` in the file, in bytes."""

    offset: int
    data: bytes
    text: str


@dataclass
class Whole:
    """Size and SHA-256 of a text, set once all blocks are read."""

    n_bytes: int = 0
    sha256: str = ""


def read_blocks(
    path: Path, whole: Whole | None = None, *, role: str = _ROLE, on_bytes: Callable[[int], None] | None = None
) -> Iterator[TextBlock]:
    """The text of ``path`` in blocks of about 1 MiB. ``on_bytes`` is called with the bytes read so far, and may raise to stop.

    Raises :class:`InvalidDataError` for a file that is not UTF-8 text (with byte and line), empty, a folder or over 1 GiB;
    ``role`` names the file's purpose in the message. What is appended to the file after it is opened is not read.
    """
    try:
        if path.exists() and not path.is_file():
            why = "it is a folder" if path.is_dir() else "it is not a regular file"
            raise _bad(path, role, why, "Give a text file.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _bad(
                path, role, f"it is larger than {MAX_BYTES >> 30} GiB", "A few hundred kilobytes are enough: give a part of it."
            )
        digest = hashlib.sha256()
        blank, n_bytes = True, 0
        with path.open("rb", buffering=0) as handle:
            for block in _blocks(path, handle, size, role):
                digest.update(block.data)
                n_bytes += len(block.data)
                blank = blank and not block.text.strip("\ufeff \t\r\n\f\v")
                yield block
                if on_bytes is not None:
                    on_bytes(n_bytes)
    except OSError as error:
        raise from_os_error(error, f"reading the {role}", path) from error
    if blank:
        raise _bad(path, role, "it is empty", "Give a file with text in it.")
    if whole is not None:
        whole.n_bytes, whole.sha256 = n_bytes, digest.hexdigest()


def _blocks(path: Path, handle: IO[bytes], size: int, role: str) -> Iterator[TextBlock]:
    rest, offset, lines = b"", 0, 1
    while True:
        block = handle.read(min(_BLOCK, size - offset - len(rest)))
        data = rest + block
        if not data:
            return
        if offset == 0 and data.startswith(_UTF16):
            raise _bad(path, role, "it is UTF-16, not UTF-8", _convert(path, "utf-16"))
        if (nul := block.find(b"\0")) >= 0:
            raise _bad(
                path, role, f"it is a binary file (NUL at byte {offset + len(rest) + nul})", "Give a file of plain UTF-8 text."
            )
        cut = len(data) if not block else _cut(data)
        whole, rest = data[:cut], data[cut:]
        try:
            text = whole.decode("utf-8")
        except UnicodeDecodeError as error:
            line = lines + whole.count(b"\n", 0, error.start)
            why = f"byte {offset + error.start} (line {line}) is not valid UTF-8"
            raise _bad(path, role, why, _convert(path, "latin1")) from error
        yield TextBlock(offset, whole, text)
        offset += len(whole)
        lines += whole.count(b"\n")


def parts(text: str, size: int) -> Iterator[str]:
    """Split a text into parts of at most ``size`` characters, after a line end or else a space where there is one."""
    start = 0
    while start < len(text):
        end = start + size
        if end < len(text):
            space = text.rfind("\n", start, end)
            space = space if space >= 0 else text.rfind(" ", start, end)
            end = space + 1 if space >= 0 else end
        yield text[start:end]
        start = end


def _cut(data: bytes) -> int:
    """Where to end a block: after the last line end, else after the last space, else between two characters."""
    for mark in (b"\n", b" "):
        if (found := data.rfind(mark)) >= 0:
            return found + 1
    last = len(data) - 1
    while last > len(data) - 4 and last > 0 and data[last] & 0xC0 == 0x80:
        last -= 1
    return last if last and data[last] >= 0xC0 else len(data)


def _convert(path: Path, encoding: str) -> str:
    return f"Convert it, for example: iconv -f {encoding} -t utf-8 {path.name} > {path.stem}-utf8.txt"


def _bad(path: Path, role: str, why: str, todo: str) -> InvalidDataError:
    return InvalidDataError(f"{path} cannot be used as {role}", why, todo)
