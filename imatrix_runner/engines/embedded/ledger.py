"""What an output has on disk already: one line per finished tensor, written after its data was forced to the disk.

It lets a killed pass go on at the tensor where it stopped, and once the output is finished it proves how every tensor of it
came to be, so that another level may copy it. JSON lines, appended; a torn last line is one that was never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from imatrix_runner.files import atomic_writer, sync
from imatrix_runner.untrusted import UnreadableError, from_json

VERSION = 1
_MOST_BYTES = 64 << 20


class Head(msgspec.Struct, frozen=True):
    """``lineage``: model and library; ``fingerprint``: all the output's bytes depend on; ``slab``: elements per checksum."""

    version: int
    lineage: str
    fingerprint: str
    slab: int


class Entry(msgspec.Struct, frozen=True):
    """A finished tensor: its name in the model, its type, the weights it was made with (:func:`~.workload.weights_key`), where
    it lies, and the CRC-32 of its slabs' CRC-32."""

    tensor: str
    type: str
    weights: str
    file: int
    offset: int
    bytes: int
    crc: int


_encode = msgspec.json.Encoder().encode


def read(path: Path) -> tuple[Head, dict[str, Entry]] | None:
    """Head and entries by tensor; None for what is no ledger of ours. What follows a torn or strange line does not count."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        first, *lines = path.read_bytes().split(b"\n")
        head = from_json(first, Head)
    except (OSError, UnreadableError):
        return None
    entries: dict[str, Entry] = {}
    for line in lines[:-1]:  # what follows the last newline is torn
        try:
            entry = from_json(line, Entry)
        except UnreadableError:
            break
        entries[entry.tensor] = entry
    return (head, entries) if head.version == VERSION else None


class Ledger:
    """One output's ledger, open for more. What lies there of another fingerprint is begun anew."""

    def __init__(self, path: Path, head: Head) -> None:
        found = read(path)
        self.entries = found[1] if found is not None and found[0] == head else {}
        with atomic_writer(path) as fresh:  # a torn line does not stay in the middle
            fresh.write(_lines([head, *self.entries.values()]))
        self._file = path.open("ab")

    def append(self, entries: Sequence[Entry]) -> None:
        """Durably; the data must be on the disk before."""
        self._file.write(_lines(entries))
        self._file.flush()
        sync(self._file.fileno())
        self.entries.update((entry.tensor, entry) for entry in entries)

    def close(self) -> None:
        self._file.close()


def _lines(values: Sequence[Head | Entry]) -> bytes:
    return b"".join(_encode(value) + b"\n" for value in values)
