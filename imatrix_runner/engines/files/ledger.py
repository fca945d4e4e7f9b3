"""Ledger of an output: one line for each tensor on disk, written after its data was synced.

It lets a killed pass continue at the tensor where it stopped. For a finished output it records how every tensor was made, so
that another level may copy it. JSON lines, appended; a torn last line is ignored.

Workers that share a pass each have a partial ledger of their own next to it, of the same form and with the same head. A pass
of one worker takes them in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec

from imatrix_runner.engines.pass_parts import LedgerEntry
from imatrix_runner.files import atomic_writer, sync
from imatrix_runner.untrusted import UnreadableError, from_json

VERSION = 1
_MOST_BYTES = 64 << 20


class LedgerHead(msgspec.Struct, frozen=True):
    """``lineage``: model and library. ``fingerprint``: everything the output's bytes depend on. ``slab``: elements per
    checksum."""

    version: int
    lineage: str
    fingerprint: str
    slab: int


_encode = msgspec.json.Encoder().encode


def read(path: Path) -> tuple[LedgerHead, dict[str, LedgerEntry]] | None:
    """Return head and entries by tensor; None if the file is not a ledger. Everything after an unreadable line is ignored."""
    try:
        if path.stat().st_size > _MOST_BYTES:
            return None
        first, *lines = path.read_bytes().split(b"\n")
        head = from_json(first, LedgerHead)
    except (OSError, UnreadableError):
        return None
    entries: dict[str, LedgerEntry] = {}
    for line in lines[:-1]:  # what follows the last newline is torn
        try:
            entry = from_json(line, LedgerEntry)
        except UnreadableError:
            break
        entries[entry.tensor] = entry
    return (head, entries) if head.version == VERSION else None


def part_ledger(folder: Path, name: str) -> Path:
    """The partial ledger of the worker ``name``, next to an output's own ledger."""
    return folder / f"ledger-{name}.jsonl"


def part_ledgers(folder: Path) -> list[Path]:
    """All partial ledgers in an output's folder."""
    return sorted(folder.glob(part_ledger(folder, "*").name))


class Ledger:
    """One output's ledger, open for appending. A ledger with another head is replaced by an empty one."""

    def __init__(self, path: Path, head: LedgerHead) -> None:
        found = read(path)
        self.head = head
        self.entries = found[1] if found is not None and found[0] == head else {}
        with atomic_writer(path) as fresh:  # drops a torn last line
            fresh.write(_lines([head, *self.entries.values()]))
        self._file = path.open("ab")

    def append(self, entries: Sequence[LedgerEntry]) -> None:
        """Append entries and sync them to disk; the tensors' data must be on disk before."""
        self._file.write(_lines(entries))
        self._file.flush()
        sync(self._file.fileno())
        self.entries.update((entry.tensor, entry) for entry in entries)

    def take_in(self, partial: Sequence[Path]) -> None:
        """Add the entries of partial ledgers with the same head, then remove them all."""
        found = [each for each in map(read, partial) if each is not None and each[0] == self.head]
        entries = {tensor: entry for _, more in found for tensor, entry in more.items() if tensor not in self.entries}
        if entries:
            self.append(list(entries.values()))
        for path in partial:
            path.unlink(missing_ok=True)

    def close(self) -> None:
        self._file.close()


def _lines(values: Sequence[LedgerHead | LedgerEntry]) -> bytes:
    return b"".join(_encode(value) + b"\n" for value in values)
