"""Groups of results on disk: one appended record for each group, with its length and checksum.

A kill leaves at most one torn record, which is ignored. The file begins with the hash of its form and of the job's fingerprint.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Generic, TypeVar

import msgspec

from imatrix_runner.files import open_to_continue, sync

T = TypeVar("T")

_HEAD = 32


class AppendedGroups(Generic[T]):
    """``path`` open for appending groups of ``kind``. It keeps the complete groups of the same ``form`` and ``fingerprint``;
    anything else in it is dropped. ``what`` is being written, for errors.

    ``groups`` and ``items``: how many of each it holds.
    """

    def __init__(self, path: Path, form: str, fingerprint: str, kind: type[T], what: str) -> None:
        head = _head(form, fingerprint)
        self._handle = open_to_continue(path, what)
        same = self._handle.read(_HEAD) == head
        found = list(_records(self._handle, kind)) if same else []
        self.groups, self.items = len(found), sum(len(group) for group, _ in found)
        end = found[-1][1] if found else _HEAD
        if not same:
            self._handle.seek(0)
            self._handle.write(head)
        self._handle.truncate(end)
        self._handle.seek(end)

    def append(self, group: Sequence[T]) -> None:
        """Append a group and sync it to disk."""
        data = msgspec.msgpack.encode(list(group))
        self._handle.write(len(data).to_bytes(4, "little") + data + zlib.crc32(data).to_bytes(4, "little"))
        self._handle.flush()
        sync(self._handle.fileno())
        self.groups += 1
        self.items += len(group)

    def close(self) -> None:
        self._handle.close()


def read_groups(path: Path, form: str, fingerprint: str, kind: type[T]) -> list[T]:
    """The items of all complete groups, in the order of the file; empty if the file is missing or of another job."""
    if not path.is_file():
        return []
    with path.open("rb") as handle:
        if handle.read(_HEAD) != _head(form, fingerprint):
            return []
        return [item for group, _ in _records(handle, kind) for item in group]


def _head(form: str, fingerprint: str) -> bytes:
    return hashlib.sha256(f"{form}\0{fingerprint}".encode()).digest()


def _records(handle: IO[bytes], kind: type[T]) -> Iterator[tuple[list[T], int]]:
    """Yield every complete record from the position of ``handle`` on, and the offset of its end."""
    size = os.fstat(handle.fileno()).st_size
    decoder: msgspec.msgpack.Decoder[list[T]] = msgspec.msgpack.Decoder(list[kind])  # type: ignore[valid-type]
    while True:
        length = int.from_bytes(handle.read(4), "little")
        if not 0 < length <= size - handle.tell() - 4:
            return
        data = handle.read(length)
        if zlib.crc32(data).to_bytes(4, "little") != handle.read(4):
            return
        try:
            group = decoder.decode(data)
        except (ValueError, RecursionError):  # the checksum fits, but another program wrote it
            return
        yield group, handle.tell()
