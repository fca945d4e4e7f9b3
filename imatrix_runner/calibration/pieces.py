"""A text file of any length, read once and piece by piece, and refused as soon as it turns out to be none."""

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
class Piece:
    """Some consecutive characters, whole lines where lines are shorter than a piece. ``offset`` and ``data`` in bytes."""

    offset: int
    data: bytes
    text: str


@dataclass
class Whole:
    """What is known once every piece was read."""

    n_bytes: int = 0
    sha256: str = ""


def read_pieces(
    path: Path, whole: Whole | None = None, *, role: str = _ROLE, on_bytes: Callable[[int], None] | None = None
) -> Iterator[Piece]:
    """The text of ``path`` in pieces of about 1 MiB; ``on_bytes`` hears how far it is (and may raise to stop).

    Raises :class:`InvalidDataError` for what is no UTF-8 text (with byte and line), empty, a folder or beyond 1 GiB; ``role``
    names the file's purpose in it. The file is bounded by the size it has when it is opened: one that grows is not followed.
    """
    try:
        if path.exists() and not path.is_file():
            why = "it is a folder" if path.is_dir() else "it is not an ordinary file"
            raise _bad(path, role, why, "Give a text file.")
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise _bad(
                path, role, f"it is larger than {MAX_BYTES >> 30} GiB", "A few hundred kilobytes are enough: give a part."
            )
        digest = hashlib.sha256()
        blank, n_bytes = True, 0
        with path.open("rb", buffering=0) as handle:
            for piece in _pieces(path, handle, size, role):
                digest.update(piece.data)
                n_bytes += len(piece.data)
                blank = blank and not piece.text.strip("\ufeff \t\r\n\f\v")
                yield piece
                if on_bytes is not None:
                    on_bytes(n_bytes)
    except OSError as error:
        raise from_os_error(error, f"reading the {role}", path) from error
    if blank:
        raise _bad(path, role, "it is empty", "Give a file with text in it.")
    if whole is not None:
        whole.n_bytes, whole.sha256 = n_bytes, digest.hexdigest()


def _pieces(path: Path, handle: IO[bytes], size: int, role: str) -> Iterator[Piece]:
    rest, offset, lines = b"", 0, 1
    while True:
        block = handle.read(min(_BLOCK, size - offset - len(rest)))
        data = rest + block
        if not data:
            return
        if offset == 0 and data.startswith(_UTF16):
            raise _bad(path, role, "it begins like UTF-16, not UTF-8", _convert(path, "utf-16"))
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
        yield Piece(offset, whole, text)
        offset += len(whole)
        lines += whole.count(b"\n")


def parts(text: str, size: int) -> Iterator[str]:
    """A long text in parts of at most ``size`` characters, which end behind a white space where there is one."""
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
    """Where to end a piece: behind the last line, else behind the last space, else between two characters."""
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
