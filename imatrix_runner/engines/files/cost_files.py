"""Files of measured costs: one line for each rounding error or trial, appended, with a checksum.

The first line names the kind of records and the fingerprint of what they depend on. A torn or damaged line and everything after
it do not count, and are cut off when the file is continued.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import IO, Any, Generic, TypeVar

import msgspec

from imatrix_runner.engines.cost_jobs import RoundingError, TrialResult
from imatrix_runner.errors import InvalidDataError
from imatrix_runner.files import open_to_continue, sync
from imatrix_runner.untrusted import UnreadableError, first_non_finite, from_json

VERSION = 1

_MOST_BYTES = 1 << 28
"""Upper bound for a file: a million records."""

_MOST_LINE = 1 << 20

_REFERENCE = ".reference"

Cost = TypeVar("Cost", RoundingError, TrialResult)


class _Head(msgspec.Struct, frozen=True):
    version: int
    records: str
    fingerprint: str


class _Line(msgspec.Struct, frozen=True):
    """A record as it is written, and the CRC-32 of its bytes."""

    crc: int
    record: msgspec.Raw


class CostFile(Generic[Cost]):
    """``path`` open for appending. ``records``: those that are there with the same ``fingerprint``, in order; anything else in
    the file is dropped."""

    def __init__(self, path: Path, fingerprint: str, kind: type[Cost]) -> None:
        head = _head(fingerprint, kind)
        self._handle: IO[bytes] = open_to_continue(path, "writing measured costs")
        found = list(_records(self._handle, head, kind))
        self.records: list[Cost] = [record for record, _ in found]
        self._ends = [len(head)] + [end for _, end in found]
        if not found:
            self._handle.seek(0)
            self._handle.write(head)
        self.cut(len(found))

    def cut(self, count: int) -> None:
        """Keep only the first ``count`` records."""
        del self.records[count:], self._ends[count + 1 :]
        if self._handle.seek(0, os.SEEK_END) != self._ends[-1]:
            self._handle.truncate(self._ends[-1])
            self._handle.seek(self._ends[-1])
        self._sync()

    def append(self, records: Sequence[Cost]) -> None:
        """Append records and sync them to disk. Raises :class:`InvalidDataError` for one that a reader would not believe."""
        lines = list(map(_line, records))
        self._handle.write(b"".join(lines))
        self._sync()
        self._ends += accumulate(map(len, lines), initial=self._ends.pop())
        self.records += records

    def _sync(self) -> None:
        self._handle.flush()
        sync(self._handle.fileno())

    def close(self) -> None:
        self._handle.close()


def read_costs(path: Path, fingerprint: str, kind: type[Cost]) -> tuple[Cost, ...]:
    """The records of a file, in order; none if there is no file of this kind and ``fingerprint``."""
    if not path.is_file():
        return ()
    with path.open("rb") as handle:
        return tuple(record for record, _ in _records(handle, _head(fingerprint, kind), kind))


def reference_of(path: Path) -> Path:
    """The scratch file of the predictions that the trials in ``path`` are compared with. Only a killed job leaves it."""
    return path.with_name(f".{path.name}{_REFERENCE}")


def remove_references(folder: Path) -> None:
    """Remove what killed jobs left of :func:`reference_of`; no job may be running."""
    for path in folder.glob(f".*{_REFERENCE}"):
        path.unlink(missing_ok=True)


def _records(handle: IO[bytes], head: bytes, kind: type[Cost]) -> Iterator[tuple[Cost, int]]:
    """Yield the records of a file that begins with ``head``, each with the offset of its end, up to the first line that is torn
    or damaged."""
    size = handle.seek(0, os.SEEK_END)
    handle.seek(0)
    if size > _MOST_BYTES or handle.read(len(head)) != head:
        return
    end = len(head)
    while (line := handle.readline(_MOST_LINE)).endswith(b"\n"):
        try:
            written = from_json(line, _Line)
            record = from_json(bytes(written.record), kind)
        except UnreadableError:
            return
        if zlib.crc32(written.record) != written.crc or not _is_possible(record):
            return
        end += len(line)
        yield record, end


def _is_possible(record: RoundingError | TrialResult) -> bool:
    """Whether the numbers of a record can be measured ones."""
    if first_non_finite(record) is not None:
        return False
    check: Callable[[Any], bool] = _possible_error if isinstance(record, RoundingError) else _possible_result
    return check(record)


def _possible_error(record: RoundingError) -> bool:
    return min(record.weighted, record.squared, record.norm) >= 0


def _possible_result(record: TrialResult) -> bool:
    """Whether all lists have an entry for each chunk, and no count is too small or too large."""
    lists = (record.tokens, record.kld, record.same, record.nll, record.nll_base)
    if not record.chunks or any(len(each) != len(record.chunks) for each in lists):
        return False
    return min(record.chunks) >= 0 and all(0 <= same <= n for same, n in zip(record.same, record.tokens, strict=True))


_encode = msgspec.json.Encoder().encode


def _head(fingerprint: str, kind: type[Cost]) -> bytes:
    return _encode(_Head(VERSION, kind.__name__, fingerprint)) + b"\n"


def _line(record: RoundingError | TrialResult) -> bytes:
    if not _is_possible(record):
        place = first_non_finite(record)
        raise InvalidDataError(
            "A measured cost is impossible",
            f"{record.tensor.name if isinstance(record, RoundingError) else record.trial} has "
            + (f"NaN or infinity in {place}" if place else "a negative error"),
            "The model or the imatrix is damaged, or overflows: download or make it again.",
        )
    data = msgspec.Raw(_encode(record))
    return _encode(_Line(zlib.crc32(data), data)) + b"\n"
