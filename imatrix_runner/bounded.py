"""Reads a binary file whose lengths may be wrong, on purpose or by damage."""

from __future__ import annotations

import shlex
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from imatrix_runner.errors import InvalidDataError, from_os_error
from imatrix_runner.safe_text import printable

_MAX_STRING = 16 << 20  # the longest real value, a chat template, is far below 1 MiB

_MAX_KEPT = 32 << 20

_OBJECT = 64
"""Overhead in bytes counted for each kept string, in addition to its own: a sparse file can announce millions of small ones."""

_WINDOW = 1 << 20


class MoreBytesNeeded(Exception):
    """The beginning of a file ends before ``end``, a byte that is read."""

    def __init__(self, end: int) -> None:
        super().__init__(f"{end} bytes are needed")
        self.end = end


class BoundedReader:
    """Reads little-endian values through a sliding window. Nothing is allocated for bytes that the file does not hold, and at
    most ``kept`` bytes of strings and arrays are kept: a sparse file can announce any size. ``partial``: only the beginning of
    the file is there, and :class:`MoreBytesNeeded` is raised at its end."""

    def __init__(self, handle: IO[bytes], path: Path, size: int, kept: int = _MAX_KEPT, *, partial: bool = False) -> None:
        self._left = kept
        self._partial = partial
        self._handle = handle
        self.path = path
        self.size = size
        self._window = b""
        self._base = 0
        self._at = 0

    @property
    def position(self) -> int:
        """Bytes from the start of the file."""
        return self._base + self._at

    def need(self, count: int) -> None:
        """Raise unless ``count`` more bytes follow."""
        if count > self.size - self.position:
            raise damaged(
                self.path,
                "is truncated in its header",
                f"{count} bytes are announced at byte {self.position}, but the file ends at byte {self.size}",
            )

    def _fill(self, count: int) -> None:
        """Fill the window with at least ``count`` bytes from the position on."""
        self.need(count)
        if self._at + count <= len(self._window):
            return
        self._base, self._at = self.position, 0
        self._handle.seek(self._base)
        self._window = self._handle.read(max(count, _WINDOW))
        if len(self._window) < count:
            if self._partial:
                raise MoreBytesNeeded(self._base + count)
            raise damaged(self.path, "changed while it was read", f"it was {self.size} bytes long and now ends earlier")

    def keep(self, count: int) -> None:
        """Account for ``count`` bytes that are about to be kept."""
        self._left -= count
        if self._left < 0:
            why = f"at byte {self.position}; no model has nearly that much, so the file is probably damaged"
            raise damaged(self.path, "announces more metadata than is read", why)

    def head(self, count: int) -> bytes:
        """Up to ``count`` bytes from the position on, without moving."""
        count = min(count, self.size - self.position)
        self._fill(count)
        return self._window[self._at : self._at + count]

    def take(self, count: int) -> bytes:
        """The next ``count`` bytes."""
        self._fill(count)
        data = self._window[self._at : self._at + count]
        self._at += count
        return data

    def skip(self, count: int) -> None:
        """Step over ``count`` bytes that must be there."""
        self.need(count)
        self._at += count  # perhaps past the window: the next fill moves it there

    def skip_strings(self, count: int) -> None:
        """Step over strings; one tight loop per window, for vocabularies have hundreds of thousands."""
        unpack = struct.Struct("<Q").unpack_from
        while count:
            self._fill(8)
            window, at, last = self._window, self._at, len(self._window) - 8
            while count and at <= last:
                at += 8 + unpack(window, at)[0]
                count -= 1
            self.skip(at - self._at)

    def number(self, code: str) -> Any:
        """One little-endian number, by its ``struct`` code."""
        shape = "<" + code
        return struct.unpack(shape, self.take(struct.calcsize(shape)))[0]

    def count(self, limit: int, each: int, what: str) -> int:
        """A u64 that says how many entries of at least ``each`` bytes follow."""
        count = int(self.number("Q"))
        if count > limit or count * each > self.size - self.position:
            why = f"a file of {self.size} bytes cannot hold them, or no model has that many"
            raise damaged(self.path, f"announces {count} {what} at byte {self.position - 8}", why)
        return count

    def string(self) -> str:
        """A key or a name; these must be UTF-8, and harmless on a terminal."""
        try:
            name = self.raw_string().decode("utf-8")
        except UnicodeDecodeError as error:
            raise damaged(self.path, "holds a name that is not UTF-8", f"it ends at byte {self.position}") from error
        if not name.isprintable():
            raise damaged(self.path, "holds a name with control characters", f"{name[:80]!r} ends at byte {self.position}")
        return name

    def raw_string(self) -> bytes:
        """Read a string that follows its u64 length, as raw bytes."""
        length = int(self.number("Q"))
        if length > _MAX_STRING:
            why = f"at byte {self.position - 8}; no model has a string that long"
            raise damaged(self.path, f"announces a string of {length} bytes", why)
        self.keep(length + _OBJECT)
        return self.take(length)


@contextmanager
def opened(path: Path, kept: int = _MAX_KEPT, size: int | None = None) -> Iterator[BoundedReader]:
    """A reader at the start of an ordinary file, for at most ``kept`` bytes of strings and arrays. ``size``: of the whole file,
    where ``path`` has its beginning. Raises :class:`RunnerError` for errors of the file system."""
    try:
        if path.exists() and not path.is_file():
            raise InvalidDataError(f"{path} is not a file", "a GGUF model is an ordinary file", "Name the .gguf file itself.")
        with path.open("rb", buffering=0) as handle:
            yield BoundedReader(handle, path, path.stat().st_size if size is None else size, kept, partial=size is not None)
    except OSError as error:
        raise from_os_error(error, f"reading {path.name}", path) from error


def quoted(path: Path) -> str:
    """Return a path quoted for a shell command, without control characters."""
    return printable(shlex.quote(str(path)))


def damaged(path: Path, what: str, why: str) -> InvalidDataError:
    """Return the error for a damaged file of the right kind; ``what`` continues the sentence after its name."""
    return InvalidDataError(f"{path} {what}", why, "Delete it and download or make it again.")
