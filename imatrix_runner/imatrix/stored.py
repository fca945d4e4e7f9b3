"""Imatrix data that stays on disk until it is looked at, one entry at a time: a mixture's matrix can be a gigabyte."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from imatrix_runner.errors import InvalidDataError
from imatrix_runner.imatrix.matrix import Counts, Entries, Entry

Kind = Literal["<f4", "<f8"]


class OpenFile:
    """Random reads of an open file, from any thread. It stays readable when another file takes its name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)
        self._lock = threading.Lock()
        self.size = os.fstat(self._descriptor).st_size

    def read(self, offset: int, size: int) -> bytes:
        """Exactly ``size`` bytes, fewer only if the file ends there."""
        pieces: list[bytes] = []
        with self._lock:
            os.lseek(self._descriptor, offset, os.SEEK_SET)
            while size and (piece := os.read(self._descriptor, size)):
                pieces.append(piece)
                size -= len(piece)
        return b"".join(pieces)

    def floats(self, offset: int, count: int, kind: Kind = "<f4") -> npt.NDArray[np.float64]:
        """``count`` little-endian numbers as float64. Raises :class:`InvalidDataError` if the file was cut meanwhile."""
        with np.errstate(invalid="ignore"):  # a signalling NaN, which whoever looks at the values will name
            return self._numbers(offset, count, kind).astype(np.float64)

    def integers(self, offset: int, count: int) -> npt.NDArray[np.int64]:
        """``count`` little-endian int64; raises like :meth:`floats`."""
        return self._numbers(offset, count, "<i8").astype(np.int64)

    def _numbers(self, offset: int, count: int, kind: str) -> npt.NDArray[Any]:
        size = np.dtype(kind).itemsize * count
        data = self.read(offset, size)
        if len(data) < size:
            why = f"it was {self.size} bytes long and now ends earlier"
            raise InvalidDataError(f"{self.path} changed while it was read", why, "Run the same command again.")
        return np.frombuffer(data, kind)


@dataclass(frozen=True)
class Place:
    """Where an entry's sums lie, how many columns each has, its counts (one per row of sums), and how sums are stored."""

    offset: int
    n_columns: int
    counts: Counts
    kind: Kind = "<f4"


class StoredEntries(Entries):
    """Entries by name, sorted; each look-up reads its sums from the file."""

    def __init__(self, file: OpenFile, places: Mapping[str, Place]) -> None:
        self._file = file
        self._places = {name: places[name] for name in sorted(places)}

    def __getitem__(self, name: str) -> Entry:
        place = self._places[name]
        n_mat = len(place.counts)
        sums = self._file.floats(place.offset, n_mat * place.n_columns, place.kind)
        return Entry(sums.reshape(n_mat, -1), place.counts)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, int]:
        """``(n_mat, n_columns)`` without reading."""
        place = self._places[name]
        return len(place.counts), place.n_columns

    def counts(self, name: str) -> Counts:
        return self._places[name].counts

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)
