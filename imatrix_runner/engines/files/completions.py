"""Answers on disk: one appended record for each group of prompts, with its length and checksum.

A kill leaves at most one torn record, which is ignored. The file begins with the fingerprint of the job.
"""

from __future__ import annotations

import hashlib
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec

from imatrix_runner.engines.measures import Completion
from imatrix_runner.files import open_to_continue, sync

_FORM = "answers 1"
_HEAD = 32


class CompletionsFile:
    """``path`` open for appending. It keeps the complete groups of the same ``fingerprint``; anything else in it is dropped.

    ``groups`` and ``prompts``: how many of each it holds.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        head = _head(fingerprint)
        self._handle = open_to_continue(path, "writing answers")
        same = self._handle.read(_HEAD) == head
        found = list(_records(self._handle)) if same else []
        self.groups, self.prompts = len(found), sum(len(completions) for completions, _ in found)
        end = found[-1][1] if found else _HEAD
        if not same:
            self._handle.seek(0)
            self._handle.write(head)
        self._handle.truncate(end)
        self._handle.seek(end)

    def append(self, completions: Sequence[Completion]) -> None:
        """Append a group and sync it to disk."""
        data = msgspec.msgpack.encode(list(completions))
        self._handle.write(len(data).to_bytes(4, "little") + data + zlib.crc32(data).to_bytes(4, "little"))
        self._handle.flush()
        sync(self._handle.fileno())
        self.groups += 1
        self.prompts += len(completions)

    def close(self) -> None:
        self._handle.close()


def read_completions(path: Path, fingerprint: str) -> list[Completion]:
    """The answers stored for ``fingerprint``, in the order of the prompts; empty if the file is missing or of another job."""
    if not path.is_file():
        return []
    with path.open("rb") as handle:
        if handle.read(_HEAD) != _head(fingerprint):
            return []
        found = [completion for completions, _ in _records(handle) for completion in completions]
    return sorted(found, key=lambda completion: completion.prompt)


def _head(fingerprint: str) -> bytes:
    return hashlib.sha256(f"{_FORM}\0{fingerprint}".encode()).digest()


def _records(handle: IO[bytes]) -> Iterator[tuple[list[Completion], int]]:
    """Yield every complete record from the position of ``handle`` on, and the offset of its end."""
    size = os.fstat(handle.fileno()).st_size
    while True:
        length = int.from_bytes(handle.read(4), "little")
        if not 0 < length <= size - handle.tell() - 4:
            return
        data = handle.read(length)
        if zlib.crc32(data).to_bytes(4, "little") != handle.read(4):
            return
        try:
            completions = msgspec.msgpack.decode(data, type=list[Completion])
        except (ValueError, RecursionError):  # the checksum fits, but another program wrote it
            return
        yield completions, handle.tell()
